"""One rank in a Ray worker: everything around the training loop.

The only cost within a step is the check whether to stop, which reads three variables.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from cdssl_dist.config import Config

STOP_FILE: Final = "stop-requested"  # in the run folder: creating it makes the run save and stop
STACKS: Final = "stacks"  # folder in the run folder
POLL: Final = 1.0  # s
STARTING: Final = 600.0  # s allowed for a start, at least
OTHERS: Final = 5.0  # s that ranks give each other to write their stacks
HUNG: Final = 70  # exit code of a rank that its watchdog ended

Outcome = tuple[str, str]  # done, stopped, moved, failed or refused; and why


def run(content: dict[str, Any]) -> Outcome:
    """Train as one rank of Ray's worker group; return the outcome of all ranks.

    An error that a restart would only repeat is returned as an outcome, since Ray would restart a failed worker. Only
    errors that all ranks raise (see ``together``) may become outcomes: others would wait for a rank that left alone.
    """
    import torch
    import torch.distributed as dist

    from cdssl_dist.data.dataset import BadBlockError
    from cdssl_dist.train.checkpoint import CheckpointError
    from cdssl_dist.train.guard import GuardStop
    from cdssl_dist.train.loop import train
    from cdssl_dist.train.setup import SetupError

    config = Config.model_validate(content)
    folder, rank = Path(config.run), dist.get_rank()
    if config.cluster.gpus_per_worker > 0:
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
    requests = Requests(folder / STOP_FILE if rank == 0 else None)
    stacks = folder / STACKS / f"{int(time.time())}-rank-{rank:05d}.txt"
    with watchdog(stacks, config.cluster.hang_after, first=max(config.cluster.hang_after, STARTING)) as progress:

        def stop_requested() -> bool:
            progress()
            return requests.stop

        try:
            complete = train(config, stop_requested=stop_requested, report=Gauges(folder.name), echo=False)
        except (GuardStop, BadBlockError) as why:
            return "failed", str(why)
        except (CheckpointError, SetupError) as why:
            return "refused", str(why)
    if complete:
        return "done", ""
    # Another rank may have been the first to see that its node will be removed, and rank 0 answers for all.
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (requests.asked, requests.drained))
    asked, drained = (any(flags) for flags in zip(*seen, strict=True))
    return ("moved" if drained and not asked else "stopped"), ""


class Requests:
    """Whether this rank was asked to stop, and how; checked once a second in a thread.

    Attributes:
        asked: by a SIGTERM to this process, or by the stop file (rank 0).
        drained: Ray has announced that a node of the group will be removed.
    """

    def __init__(self, stop_file: Path | None) -> None:
        self.stop_file, self.asked, self.drained = stop_file, False, False
        import ray

        # Training does not run on the worker's main thread, the only one that can set a signal handler.
        ray.get(ray.get_runtime_context().current_actor.execute.remote(_catch_sigterm))
        threading.Thread(target=self._look, name="cdssl-requests", daemon=True).start()

    @property
    def stop(self) -> bool:
        """Whether to save and stop."""
        return self.asked or self.drained

    def _look(self) -> None:
        from ray.train.v2._internal.execution.context import get_train_context

        # The public get_preemption_info is a barrier of all ranks; the guard's collective shares this already.
        context = get_train_context().preemption_context
        while not self.stop:
            self.asked = _SIGTERM.is_set() or (self.stop_file is not None and self.stop_file.exists())
            self.drained = context.preemption_info is not None
            time.sleep(POLL)


_SIGTERM = threading.Event()


def _catch_sigterm() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def ask(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, before)  # a second one ends the worker
        _SIGTERM.set()

    signal.signal(signal.SIGTERM, ask)


class Gauges:
    """Metrics for Ray's own Prometheus exporter: ``train/loss`` becomes ``ray_cdssl_train_loss{run="…"}``.

    Args:
        run: the name of the run folder.
    """

    def __init__(self, run: str) -> None:
        self.run, self.made = run, dict[str, Any]()

    def __call__(self, step: int, values: dict[str, float]) -> None:
        """Publish a line of metrics."""
        from ray.util.metrics import Counter, Gauge

        for key, value in {"step": float(step), **values}.items():
            name, event = "cdssl_" + key.replace("/", "_"), key.startswith("event/")
            if name not in self.made:
                kind = Counter if event else Gauge
                self.made[name] = kind(name, description=f"{key} of a pretraining run", tag_keys=("run",))
                self.made[name].set_default_tags({"run": self.run})
            self.made[name].inc(value) if event else self.made[name].set(value)


@contextlib.contextmanager
def watchdog(path: Path, seconds: float, first: float) -> Iterator[Any]:
    """End this process if it makes no progress for too long, after writing the stacks of its threads.

    Ray then restarts the group. If one rank hangs, all do, and each writes its stacks: those that wait in a collective
    wait for another rank, and the one that does not is the culprit.

    Args:
        path: file for the stacks; removed after the block if nothing was written.
        seconds: allowed since the last progress.
        first: s allowed from the start of the block to the first progress, which includes imports and compilation.

    Yields:
        A function to call when progress is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline, over = [time.monotonic() + first], threading.Event()
    with open(path, "w") as file:

        def watch() -> None:
            while not over.wait(POLL):
                # The interpreter's own timer, in case a call holds the GIL and this thread cannot run either.
                faulthandler.dump_traceback_later(max(seconds, first) + OTHERS, exit=True, file=file)
                if time.monotonic() > deadline[0]:
                    faulthandler.dump_traceback(file=file, all_threads=True)
                    os.fsync(file.fileno())
                    over.wait(OTHERS)
                    os._exit(HUNG)

        thread = threading.Thread(target=watch, name="cdssl-watchdog", daemon=True)
        thread.start()

        def progress() -> None:
            deadline[0] = time.monotonic() + seconds

        try:
            yield progress
        finally:
            over.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()
    if not path.stat().st_size:
        path.unlink()


def forget_empty_stacks(folder: Path) -> None:
    """Remove the empty files left by ranks that were killed."""
    for path in (folder / STACKS).glob("*.txt"):
        if not path.stat().st_size:
            path.unlink()


def hung(folder: Path, since: float) -> list[str]:
    """Explain, from their stacks, why ranks were ended by their watchdogs since a time (s since the epoch)."""
    found = [p for p in sorted((folder / STACKS).glob("*.txt")) if p.stat().st_size and p.stat().st_mtime >= since]
    stuck = {path: _top(path.read_text()) for path in found}
    # A rank that waits in a collective waits for another.
    guilty = [path for path, frames in stuck.items() if not any("torch/distributed" in f for f in frames)]
    if found and not guilty:
        waiting = ", ".join(str(_rank(path)) for path in found)
        return [f"rank {waiting} waited for another that left no stack: it was suspended, disconnected or lost"]
    return [
        f"rank {_rank(path)} made no progress, stuck in {(stuck[path] or ['?'])[0]}; all stacks are in {path.parent}"
        for path in guilty
    ]


def _rank(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _top(text: str) -> list[str]:
    """The frames of the training thread, innermost first."""
    for thread in text.split("\n\n"):
        frames = [line.strip() for line in thread.splitlines() if line.startswith("  File ")]
        if any("train/loop.py" in frame for frame in frames):
            return frames
    return []
