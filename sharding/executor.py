"""Mapping a function over tasks: here, in processes, or on a Ray cluster. Results come in the order of the tasks."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Final, TypeVar

T = TypeVar("T")
R = TypeVar("R")
AHEAD: Final = 3  # tasks in flight for each worker: more would only fill the memory


class WorkerError(RuntimeError):
    """A worker died; what it had finished is kept."""


@dataclass(frozen=True)
class Executor:
    """Where tasks run.

    Args:
        workers: processes on this machine; 1 runs everything in this one.
        address: of a Ray cluster instead; ``workers`` then is the number of tasks at a time. Plain Ray tasks and not
            Ray Data: a stage is a list of independent files to make, in an order that the result must not depend on,
            and which of them exist already is all the state that a rerun needs.
    """

    workers: int = 1
    address: str | None = None

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Results in the order of the tasks; only a few tasks are taken ahead, so that memory stays bounded.

        Raises:
            WorkerError: where a process dies, by the kernel's out-of-memory killer, say.
        """
        if self.address:
            yield from self._on_ray(function, tasks)
        elif self.workers <= 1:
            yield from map(function, tasks)
        else:
            yield from self._in_processes(function, tasks)

    def _in_processes(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        # spawn: a fork of a process that runs threads (pyarrow's, say) can deadlock
        with ProcessPoolExecutor(self.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                for future in _ahead((pool.submit(function, task) for task in tasks), AHEAD * self.workers):
                    yield future.result()
            except BrokenProcessPool:
                raise WorkerError(
                    "a worker process died, most likely for lack of memory; run the same command again to go on, "
                    "with fewer --workers"
                ) from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _on_ray(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        import ray

        ray.init(address=self.address, ignore_reinit_error=True, log_to_driver=False)
        remote = ray.remote(function)
        for reference in _ahead((remote.remote(task) for task in tasks), AHEAD * self.workers):
            yield ray.get(reference)


def _ahead(started: Iterable[Any], limit: int) -> Iterator[Any]:
    """Pass through, with ``limit`` items drawn before the first is given out."""
    waiting: deque[Any] = deque()
    for item in started:
        waiting.append(item)
        if len(waiting) >= limit:
            yield waiting.popleft()
    yield from waiting
