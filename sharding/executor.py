"""Map a function over tasks: in this process, in a pool, or on a Ray cluster. Results keep the order of the tasks."""

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
QUEUED: Final = 3  # tasks submitted per process of the pool: one running, two waiting
EARLY: Final = 64  # finished results per worker that may wait for an earlier one


class WorkerError(RuntimeError):
    """A worker or the cluster died; finished work is kept."""


@dataclass
class Executor:
    """Where tasks run. The processes of a pool start with the first task and end with the ``with`` block.

    Args:
        workers: number of processes on this machine; 1 runs everything in the current process.
        address: address of a Ray cluster to use instead, or "local" to start one that ends with the ``with`` block.
            ``workers`` is then the number of concurrent tasks, 0 for as many as the cluster has CPUs. We use plain Ray
            tasks, not Ray Data: a stage is a list of independent files, the result must not depend on the order in
            which they are made, and the files that already exist are the only state that a rerun needs.
        resources: resources of each Ray task, for example ``{"num_cpus": 2}``; one CPU by default.
    """

    workers: int = 1
    address: str | None = None
    resources: dict[str, float] = field(default_factory=dict)
    _pool: ProcessPoolExecutor | None = field(default=None, init=False, repr=False)
    _started: bool = field(default=False, init=False, repr=False)

    def map(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R]:
        """Yield results in the order of the tasks; only a few are drawn ahead, so that memory stays bounded.

        Raises:
            WorkerError: if a process dies, for example by the kernel's out-of-memory killer, or the cluster fails.
        """
        try:
            if self.address:
                yield from self._on_ray(self.address, function, tasks)
            elif self.workers <= 1:
                yield from map(function, tasks)
            else:
                yield from self._in_processes(function, tasks)
        except MemoryError:
            raise WorkerError("out of memory; run the same command again to continue, with fewer --workers") from None

    def attempt(self, function: Callable[[T], R], tasks: Iterable[T]) -> Iterator[R | Failed]:
        """Like ``map``, but a failed task yields ``Failed`` in place of its result, and the other tasks continue.

        On Ray, the death of a worker process is also such a failure, once Ray's own retries are used up.
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
                "a worker process died, most likely for lack of memory; run the same command again to continue, "
                "with fewer --workers"
            ) from None

    def _on_ray(
        self,
        address: str,
        function: Callable[[T], R],
        tasks: Iterable[T],
        settle: Callable[[Future[R]], Any] = Future.result,
    ) -> Iterator[Any]:
        self._join_cluster(address)  # imports Ray with the right settings, so it must come first
        import ray
        from ray.exceptions import RayError, RayTaskError

        remote = ray.remote(_call).options(**self.resources)
        shared = ray.put(function)  # stored once, with everything bound to it
        try:
            workers = self.workers or max(int(ray.cluster_resources().get("CPU", 1)), 1)
            started = (remote.remote(shared, task).future() for task in tasks)
            yield from _in_order(started, workers, EARLY * workers, settle)
        except RayTaskError as why:  # its text is a traceback; its cause is what our function raised
            raise why.cause if isinstance(why.cause, Exception) else WorkerError(_line(why)) from None
        except RayError as why:
            text = f"the Ray cluster at {address}: {_line(why)}; run the same command again to continue"
            raise WorkerError(text) from None

    def _join_cluster(self, address: str) -> None:
        """Connect to the cluster, if not connected already."""
        try:
            self._started |= start_ray(address) and address == LOCAL
        except Exception as why:  # each part of Ray raises its own types
            raise WorkerError(f"no Ray cluster at {address} can be joined: {_line(why)}") from None


def _call(function: Callable[[T], R], task: T) -> R:
    return function(task)


@dataclass(frozen=True)
class Failed:
    """Stands in for the result of a task that failed."""

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
    """Yield the results, in order, of tasks that start as they are drawn from an iterator.

    Args:
        started: iterator that starts one more task each time it is advanced.
        running: maximum number of started, unfinished tasks.
        early: maximum number of finished tasks that wait for an earlier one.
        settle: converts a finished future to the value to yield.
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
    """Initialize a process of the pool: leave Ctrl-C to the parent, and exit when the parent ends, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)  # an orphan would wait for tasks forever, and write into a folder that others use


def _line(why: BaseException) -> str:
    """The first non-blank line of an error's message, or the error's type."""
    lines = [line.strip() for line in str(why).splitlines() if line.strip()]
    return lines[0] if lines else type(why).__name__
