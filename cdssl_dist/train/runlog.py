"""The run folder: what a run writes as it goes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from sharding.manifest import write_atomically

COUNTED: Final = ("clip", "skip", "rollback", "stop", "bad blocks")  # events also logged as metrics, for charts


class RunLog:
    """Appends to ``metrics.jsonl`` and ``events.jsonl``, rewrites ``status.json``; rank 0 only.

    Args:
        folder: of the run.
        cursor: consumed steps; lines of later steps, from a process that died before its next checkpoint, are removed.
        echo: also print the lines of ``train.log``.
        report: also called with each line of metrics.
        ended: the last step is consumed already, and the final validation will be repeated.
    """

    def __init__(
        self,
        folder: Path,
        cursor: int,
        echo: bool = True,
        report: Callable[[int, dict[str, float]], None] = lambda step, values: None,
        ended: bool = False,
    ) -> None:
        self.folder, self.echo, self.report = folder, echo, report
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "events.jsonl"):
            _cut(folder / name, cursor, ended)
        self._metrics = open(folder / "metrics.jsonl", "a", buffering=1)
        self._train = open(folder / "train.log", "a", buffering=1)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Write one line of metrics; ``step`` is the number of consumed steps."""
        self._metrics.write(_line(step, values))
        self.report(step, values)

    def event(self, step: int, kind: str, *, within: bool = False, **about: Any) -> None:
        """Write an event: a verdict, a checkpoint, a roll-back.

        Args:
            step: number of consumed steps or, if ``within``, the 0-based number of the step itself.
            kind: what happened.
            within: whether it belongs to the step, and recurs if the step is repeated.
            about: further fields.
        """
        consumed = step + within
        append_event(self.folder, step, kind, **({"consumed": consumed} if within else {}), **about)
        if kind in COUNTED:
            self.metrics(consumed, {f"event/{kind.replace(' ', '_')}": 1.0})
        if kind != "checkpoint":
            shown = {k: v for k, v in about.items() if k not in ("packs", "losses", "graphs")}
            self.say(f"step {step}: {kind}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))

    def status(self, **about: Any) -> None:
        """Replace ``status.json``."""
        write_status(self.folder, **about)

    def say(self, line: str) -> None:
        """Write a line to ``train.log``, which the driver of a cluster run prints as it grows."""
        self._train.write(line + "\n")
        if self.echo:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Sync and close."""
        for file in (self._metrics, self._train):
            file.flush()
            os.fsync(file.fileno())
            file.close()


class NullRunLog:
    """The log of all ranks but the first: the same methods, which write nothing."""

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """See ``RunLog``."""

    def event(self, step: int, kind: str, *, within: bool = False, **about: Any) -> None:
        """See ``RunLog``."""

    def status(self, **about: Any) -> None:
        """See ``RunLog``."""

    def say(self, line: str) -> None:
        """See ``RunLog``."""

    def close(self) -> None:
        """See ``RunLog``."""


def append_event(folder: Path, step: int | None, kind: str, **about: Any) -> None:
    """Append a line to ``events.jsonl``; one without a step is about the cluster, and no resume removes it."""
    with open(folder / "events.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "time": _now(), "event": kind, **about}, default=str) + "\n")


def append_metrics(folder: Path, step: int, values: dict[str, float]) -> None:
    """Append a line to ``metrics.jsonl`` of a run without a ``RunLog``; nothing is ever removed from it."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(_line(step, values))


def _line(step: int, values: dict[str, float]) -> str:
    finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
    return json.dumps({"step": step, "time": _now(), **finite}) + "\n"


def write_status(folder: Path, **about: Any) -> None:
    """Write ``status.json``."""
    write_atomically(folder / "status.json", json.dumps({**about, "time": _now()}, indent=1).encode())


def update_status(folder: Path, **about: Any) -> None:
    """Change fields of ``status.json``; the others stay."""
    write_status(folder, **read_status(folder) | about)


def read_status(folder: Path) -> dict[str, Any]:
    """Read ``status.json``; empty for a new run."""
    path = folder / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


@contextlib.contextmanager
def locked_run_folder(folder: Path) -> Iterator[None]:
    """Lock a run folder; the lock ends with the process, however that ends.

    Raises:
        RunningError: if another process is training in it: each would remove what the other writes.
    """
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunningError(
                f"{folder}: another process is training in this folder; wait for it (cdssl status {folder}), end it, "
                "or use another run folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


class RunningError(ValueError):
    """A run folder that is in use."""


def _now() -> int:
    """Milliseconds since the epoch, as MLflow counts."""
    return time.time_ns() // 1_000_000


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the valid lines of a JSON-lines file, without any that a kill left incomplete."""
    return lines_of(path.read_text(errors="replace")) if path.exists() else []


def lines_of(text: str) -> list[dict[str, Any]]:
    """See ``read_lines``."""
    found = []
    for line in text.split("\n")[:-1]:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def _cut(path: Path, cursor: int, ended: bool) -> None:
    kept = [line for line in read_lines(path) if line["step"] is None or line.get("consumed", line["step"]) <= cursor]
    if ended:
        kept = [line for line in kept if line["step"] != cursor or "val/loss" not in line]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
