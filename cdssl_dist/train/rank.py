"""One rank in a Ray worker: what surrounds the training loop there. Nothing here is asked on the path of a step but
whether to stop, which is a look at three variables.
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

STOP_FILE: Final = "stop-requested"  # in the run folder: whoever makes it has the run saved and stopped
STACKS: Final = "stacks"  # folder in the run folder
POLL: Final = 1.0  # s
STARTING: Final = 600.0  # s that a start may take at least
OTHERS: Final = 5.0  # s that ranks leave each other to write their stacks
HUNG: Final = 70  # the exit code of a rank that ended itself

Outcome = tuple[str, str]  # done, stopped, moved, failed or refused; and why


def run(content: dict[str, Any]) -> Outcome:
    """Train as one rank of Ray's worker group; the outcome is that of all ranks.

    A stop that another start would only meet again is an outcome, not a failure of a worker, which Ray would restart.
    Only what all ranks raise may become one (``together``): of a rank that went alone the others would wait.
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
    # The rank that saw first that its node is to go may not be this one, and rank 0 answers for all.
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (requests.asked, requests.drained))
    asked, drained = (any(flags) for flags in zip(*seen, strict=True))
    return ("moved" if drained and not asked else "stopped"), ""


class Requests:
    """Whether this rank was asked to stop, and by whom; looked up beside training, once a second.

    Attributes:
        asked: by a SIGTERM to this process, or by the stop file (rank 0).
        drained: Ray has said that a node of the group will be taken away.
    """

    def __init__(self, stop_file: Path | None) -> None:
        self.stop_file, self.asked, self.drained = stop_file, False, False
        import ray

        # Training is not on the main thread of the worker, where alone a handler can be set.
        ray.get(ray.get_runtime_context().current_actor.execute.remote(_catch_sigterm))
        threading.Thread(target=self._look, name="cdssl-requests", daemon=True).start()

    @property
    def stop(self) -> bool:
        """Save and stop."""
        return self.asked or self.drained

    def _look(self) -> None:
        from ray.train.v2._internal.execution.context import get_train_context

        # The public get_preemption_info is a barrier of all ranks; ours is the guard's collective.
        context = get_train_context().preemption_context
        while not self.stop:
            self.asked = _SIGTERM.is_set() or (self.stop_file is not None and self.stop_file.exists())
            self.drained = context.preemption_info is not None
            time.sleep(POLL)


_SIGTERM = threading.Event()


def _catch_sigterm() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def ask(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, before)  # the second one ends the worker
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
    """End this process when it makes no progress for so long; the stacks of its threads are written first.

    Ray then restarts the group. All ranks hang when one does, and each writes its stacks: who waits in a collective
    waits for the others, and who does not is the one to look at.

    Args:
        path: of the stacks; gone after the block where nothing was written.
        seconds: after the last progress.
        first: s from the beginning of the block to the first progress, which is preceded by imports and compilation.

    Yields:
        A function to call when progress is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline, over = [time.monotonic() + first], threading.Event()
    with open(path, "w") as file:

        def watch() -> None:
            while not over.wait(POLL):
                # The interpreter's own alarm, for a call that holds its lock, when this thread cannot run either.
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
    """Remove what ranks that were killed left open."""
    for path in (folder / STACKS).glob("*.txt"):
        if not path.stat().st_size:
            path.unlink()


def hung(folder: Path, since: float) -> list[str]:
    """What the stacks of a run folder say, of ranks that ended themselves after a time (s since the epoch)."""
    found = [p for p in sorted((folder / STACKS).glob("*.txt")) if p.stat().st_size and p.stat().st_mtime >= since]
    stuck = {path: _top(path.read_text()) for path in found}
    # A rank that waits in a collective waits for another.
    guilty = [path for path, frames in stuck.items() if not any("torch/distributed" in f for f in frames)]
    if found and not guilty:
        waiting = ", ".join(str(_rank(path)) for path in found)
        return [f"rank {waiting} waited for another that made no progress and left no stack: stopped, cut off or gone"]
    return [
        f"rank {_rank(path)} made no progress, stuck in {(stuck[path] or ['?'])[0]}; all stacks are in {path.parent}"
        for path in guilty
    ]


def _rank(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _top(text: str) -> list[str]:
    """The frames of the thread that trains, innermost first."""
    for thread in text.split("\n\n"):
        frames = [line.strip() for line in thread.splitlines() if line.startswith("  File ")]
        if any("train/loop.py" in frame for frame in frames):
            return frames
    return []
