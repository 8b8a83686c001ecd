"""Mapping a function over tasks: here, in processes, or on a Ray cluster. Results come in the order of the tasks."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from sharding.ray_start import LOCAL, start_ray

T = TypeVar("T")
R = TypeVar("R")
QUEUED: Final = 3  # tasks handed out for each process of the pool: one at work, two that wait for it
EARLY: Final = 64  # results for each worker that may wait for one that comes before them


class WorkerError(RuntimeError):
    """A worker died, or the cluster did; what was finished is kept."""


@dataclass
class Executor:
    """Where tasks run. The processes of a pool start with the first task and end with the ``with`` block.

    Args:
        workers: processes on this machine; 1 runs everything in this one.
        address: of a Ray cluster instead, "local" for one of its own that ends with the ``with`` block; ``workers``
            then is the number of tasks at a time, 0 for as many as it has CPUs. Plain Ray tasks and not Ray Data: a
            stage is a list of independent files to make, in an order that the result must not depend on, and which of
            them exist already is all the state that a rerun needs.
        resources: what a Ray task takes, as in ``{"num_cpus": 2}``; one CPU where nothing is said.
    """

    workers: int = 1
    address: str | None = None
    resources: dict[str, float] = field(default_factory=dict)
    _pool: ProcessPoolExecutor | None = field(default=None, init=False, repr=False)
    _started: bool = field(default=False, init=False, repr=False)

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Results in the order of the tasks; only a few tasks are taken ahead, so that memory stays bounded.

        Raises:
            WorkerError: where a process dies, by the kernel's out-of-memory killer, say, or the cluster fails.
        """
        try:
            if self.address:
                yield from self._on_ray(self.address, function, tasks)
            elif self.workers <= 1:
                yield from map(function, tasks)
            else:
                yield from self._in_processes(function, tasks)
        except MemoryError:
            raise WorkerError("out of memory; run the same command again to go on, with fewer --workers") from None

    def attempt(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R | Failed]:
        """Like ``map``, but an error stands in the place of its result, and the other tasks go on.

        On Ray the death of a process is such an error, too, once Ray's own repetitions are used up.
        """
        caught = functools.partial(_caught, function)
        if self.address:
            yield from self._on_ray(self.address, caught, tasks, _settled)
        else:
            yield from self.map(caught, tasks)

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        if self._started:
            import ray

            ray.shutdown()
            self._started = False

    def _in_processes(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        if self._pool is None:
            # spawn: a fork of a process that runs threads (pyarrow's, say) can deadlock
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_begin)
        pool = self._pool
        try:
            started = (pool.submit(function, task) for task in tasks)
            yield from _in_order(started, QUEUED * self.workers, EARLY * self.workers)
        except BrokenProcessPool:
            self._pool = None
            raise WorkerError(
                "a worker process died, most likely for lack of memory; run the same command again to go on, "
                "with fewer --workers"
            ) from None

    def _on_ray(
        self,
        address: str,
        function: Callable[[T], R],
        tasks: Iterable[T],
        settle: Callable[[Future[R]], Any] = Future.result,
    ) -> Iterator[Any]:
        self._join_cluster(address)  # which imports Ray as it must be
        import ray
        from ray.exceptions import RayError, RayTaskError

        remote = ray.remote(_call).options(**self.resources)
        shared = ray.put(function)  # once, with all that is bound to it
        try:
            workers = self.workers or max(int(ray.cluster_resources().get("CPU", 1)), 1)
            started = (remote.remote(shared, task).future() for task in tasks)
            yield from _in_order(started, workers, EARLY * workers, settle)
        except RayTaskError as why:  # its text is a traceback; what our function raised is inside
            raise why.cause if isinstance(why.cause, Exception) else WorkerError(_line(why)) from None
        except RayError as why:
            text = f"the Ray cluster at {address}: {_line(why)}; run the same command again to go on"
            raise WorkerError(text) from None

    def _join_cluster(self, address: str) -> None:
        """Connect, once."""
        try:
            self._started |= start_ray(address) and address == LOCAL
        except Exception as why:  # one kind for each part of Ray that fails
            raise WorkerError(f"no Ray cluster at {address} can be joined: {_line(why)}") from None


def _call(function: Callable[[T], R], task: T) -> R:
    return function(task)


@dataclass(frozen=True)
class Failed:
    """What a task ended with."""

    why: str  # one line


def _caught(function: Callable[[T], R], task: T) -> R | Failed:
    try:
        return function(task)
    except Exception as why:
        return Failed(f"{type(why).__name__}: {_line(why)}")


def _settled(future: Future[Any]) -> Any:
    why = future.exception()
    return future.result() if why is None else Failed(f"its process died ({_line(why)})")


def _in_order(
    started: Iterator[Future[R]], running: int, early: int, settle: Callable[[Future[R]], Any] = Future.result
) -> Iterator[Any]:
    """The results of tasks that are started as they are drawn from an iterator.

    Args:
        started: draws one more task and starts it.
        running: tasks started and not finished, at most.
        early: finished tasks that wait for one before them, at most.
        settle: makes of a finished task what is yielded.
    """
    waiting: deque[Future[R]] = deque()
    for future in started:
        waiting.append(future)
        while waiting:
            unfinished = [f for f in waiting if not f.done()]
            if waiting[0].done() or len(waiting) >= running + early:
                yield settle(waiting.popleft())
            elif len(unfinished) >= running:
                wait(unfinished, return_when=FIRST_COMPLETED)
            else:
                break
    while waiting:
        yield settle(waiting.popleft())


def _begin() -> None:
    """What a process of the pool does first: leave Ctrl-C to its parent, and end when that does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)  # a process without a parent would wait for tasks for ever, and write into a folder that others use


def _line(why: BaseException) -> str:
    """The first line of an error's text that says something."""
    lines = [line.strip() for line in str(why).splitlines() if line.strip()]
    return lines[0] if lines else type(why).__name__
