"""Watch a run through its folder, local or remote: a snapshot, a page of text, a live view."""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from cdssl_dist.train.rank import STARTING
from cdssl_dist.train.runlog import lines_of
from sharding.commands import one_line
from sharding.sources import SourceError
from sharding.sources.streams import folder_system, redacted

POLL: Final = 1.0  # s
TAIL: Final = 1 << 17  # bytes read from the end of a log
SILENT: Final = 120.0  # s without output after which a run counts as silent; or three times the usual interval
PROGRESS: Final = re.compile(r"step \d+(/\d+)?  ")  # lines of the log that the live view replaces


class RunFolderError(ValueError):
    """There is no run at this place."""


@dataclass(frozen=True)
class Snapshot:
    """The state of a run, as seen from outside.

    Attributes:
        state: ``starting``, ``training``, ``silent`` (should be training, but writes nothing), ``done``,
            ``stopped``, ``failed`` or ``refused``.
        age: s since it last wrote something.
        steps_s: steps per second over the last lines; None before there are two.
        metrics: the latest value of each.
        validated: step of the last validation.
        events: the latest ones.
    """

    run: str
    state: str
    step: int = 0
    steps: int = 0
    world_size: int = 0
    age: float | None = None
    steps_s: float | None = None
    reason: str = ""
    validated: int | None = None
    metrics: dict[str, float | None] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the current rate; None if the run is not training."""
        return (self.steps - self.step) / self.steps_s if self.state == "training" and self.steps_s else None

    @property
    def over(self) -> bool:
        """Whether the run has ended, though it may be resumed later."""
        return self.state in ("done", "stopped", "failed", "refused")

    def json(self) -> str:
        """All fields as JSON, on one line."""
        return json.dumps(asdict(self) | {"seconds_left": self.seconds_left})


def snapshot(run: str) -> Snapshot:
    """Take a snapshot of a run.

    Args:
        run: a run folder, or the URL of one, for any file system that fsspec supports.

    Raises:
        RunFolderError: if there is no run, or it cannot be read.
    """
    system, root = _place(run)
    try:
        system.invalidate_cache()
        status = _status(_tail(system, f"{root}/status.json"))
        lines = lines_of(_tail(system, f"{root}/metrics.jsonl"))
        there = status or lines or system.exists(f"{root}/config.yaml")
        events = lines_of(_tail(system, f"{root}/events.jsonl"))
    except Exception as why:  # each kind of remote storage has errors of its own
        raise RunFolderError(f"{redacted(run)}: cannot be read ({one_line(why)})") from None
    if not there:
        raise RunFolderError(
            f"{redacted(run)}: no run here (neither config.yaml nor status.json), or the server does not answer; give "
            "the run folder of a pretraining"
        )
    metrics = {name: value for line in lines for name, value in line.items() if name not in ("step", "time")}
    training = [line for line in lines if "train/loss" in line][-10:]
    rate, usual = _rate(training)
    spoken = max((part["time"] for part in (status, *lines[-1:], *events[-1:]) if part), default=None)
    age = None if spoken is None else max(time.time() - spoken / 1000.0, 0.0)
    state = status.get("state", "starting")
    patience = max(SILENT, 3.0 * usual) if state == "training" else STARTING
    if state in ("training", "starting") and age is not None and age > patience:
        state = "silent"
    return Snapshot(
        run=run,
        state=state,
        step=max([status.get("step", 0), *(line["step"] for line in lines[-1:])]),
        steps=status.get("steps", 0),
        world_size=status.get("world_size", 0),
        age=age,
        steps_s=rate,
        reason=status.get("reason", ""),
        validated=max((line["step"] for line in lines if "val/loss" in line), default=None),
        metrics=metrics,
        events=events[-5:],
    )


def _place(run: str) -> tuple[Any, str]:
    try:
        return folder_system(run)
    except SourceError as why:
        raise RunFolderError(str(why)) from None


def _status(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:  # half-written, on storage without atomic renames
        return {}
    return found if isinstance(found, dict) else {}


def _tail(system: Any, path: str) -> str:
    """Read the end of a file, from the start of a line; empty if there is no file."""
    try:
        start = max((system.size(path) or 0) - TAIL, 0)  # a web server may not say how large it is
        text: str = system.cat_file(path, start=start or None).decode(errors="replace")
    except FileNotFoundError:
        return ""
    return text.partition("\n")[2] if start else text


def _rate(lines: list[dict[str, Any]]) -> tuple[float | None, float]:
    """Return steps per second and s between lines: medians, since some gaps include a validation or a resume."""
    gaps = [
        (b["step"] - a["step"], max(b["time"] - a["time"], 1) / 1000.0) for a, b in zip(lines, lines[1:], strict=False)
    ]
    if not gaps:
        return None, 0.0
    return statistics.median(steps / seconds for steps, seconds in gaps), statistics.median(s for _, s in gaps)


def rows(seen: Snapshot) -> list[tuple[str, str]]:
    """Return a page of text, as (heading, text)."""
    m = seen.metrics
    ranks = f", {seen.world_size} rank{'s' * (seen.world_size != 1)}" if seen.world_size else ""
    about = {"silent": f"no output for {duration(seen.age)}: killed, or hanging", "starting": "no step yet"}
    say = seen.reason or about.get(seen.state, "")
    found = [("run", f"{seen.run}: {seen.state}{ranks}{f' ({say})' if say else ''}")]
    if seen.steps:
        rate = f", {seen.steps_s:.3g} steps/s" if seen.steps_s else ""
        left = f", {duration(seen.seconds_left)} left" if seen.seconds_left is not None else ""
        found.append(("step", f"{seen.step:,} of {seen.steps:,} ({seen.step / seen.steps:.1%}){rate}{left}"))
    for split in ("train", "val"):
        names = [name for name in m if name.startswith(f"{split}/")]
        at = f"step {seen.validated:,}: " if split == "val" and seen.validated is not None else ""
        found.append((split, at + "  ".join(f"{n.partition('/')[2]} {_short(m[n])}" for n in names) if names else ""))
    if "guard/norm" in m:
        found.append(
            ("guard", f"norm {_short(m['guard/norm'])}  z {_short(m.get('guard/z'))}  lr {_short(m.get('lr'))}")
        )
    if "perf/edges_s" in m:
        speed = f"{m['perf/edges_s'] or 0:,.0f} edges/s, {m.get('perf/graphs_s') or 0:,.0f} graphs/s, "
        found.append(
            ("speed", speed + f"MFU {m.get('perf/mfu') or 0:.1%}, waits for data {m.get('perf/data_wait') or 0:.1%}")
        )
    load = [f"{n.partition('/')[2]} {_short(v)}" for n, v in m.items() if n.startswith("system/")]
    found.append(("machine", "  ".join(load)))
    for i, event in enumerate(seen.events):
        extra = " ".join(f"{k} {v}" for k, v in event.items() if k not in ("step", "time", "event", "packs"))
        at = "" if event.get("step") is None else f"step {event['step']}: "
        found.append(("" if i else "events", f"{at}{event['event']} {extra}".strip()[:160]))
    if seen.age is not None:
        found.append(("written", f"{duration(seen.age)} ago"))
    return [(heading, text) for heading, text in found if text]


def page(seen: Snapshot) -> str:
    """Format a snapshot as plain text."""
    return "\n".join(f"{heading:9} {text}" for heading, text in rows(seen))


def table(seen: Snapshot) -> Any:
    """Format a snapshot as a rich table, with a progress bar."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    for heading, text in rows(seen):
        grid.add_row(Text(heading, style="bold"), Text(text))
        if heading == "step":
            grid.add_row("", ProgressBar(total=seen.steps, completed=seen.step, width=60))
    return grid


def line(seen: Snapshot) -> str:
    """Format a snapshot as one line, for logs."""
    loss, skill = (_short(seen.metrics.get(f"train/{name}")) for name in ("loss", "skill"))
    left = f"  {duration(seen.seconds_left)} left" if seen.seconds_left is not None else ""
    return f"{seen.state}  step {seen.step}/{seen.steps}  loss {loss}  skill {skill}{left}"


def duration(seconds: float | None) -> str:
    """``45 s``, ``3 min``, ``2 h 05 min``."""
    if seconds is None:
        return "?"
    minutes = round(seconds / 60.0)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


@contextlib.contextmanager
def watching(folder: Path) -> Iterator[None]:
    """Show a run while the block drives it: a live view on a terminal, else the lines of ``train.log`` as they come."""
    done = threading.Event()
    log = folder / "train.log"
    start = log.stat().st_size if log.exists() else 0
    show = _show_live if sys.stderr.isatty() else _show_lines
    thread = threading.Thread(target=show, args=(folder, start, done), name="cdssl-live", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(10.0)


def _new_lines(path: Path, start: int, done: threading.Event) -> Iterator[list[str]]:
    """Yield, once a second, the lines added to a file, until ``done`` is set, and then once more."""
    at = start
    while True:
        last = done.wait(POLL)
        found = []
        if path.exists():
            with open(path) as file:
                file.seek(at)
                found = file.read().splitlines()
                at = file.tell()
        yield found
        if last:
            return


def _show_lines(folder: Path, start: int, done: threading.Event) -> None:
    for lines in _new_lines(folder / "train.log", start, done):
        if lines:
            print("\n".join(lines), file=sys.stderr, flush=True)


def _show_live(folder: Path, start: int, done: threading.Event) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True)
    with Live(console=console, auto_refresh=False) as live:  # what others print appears above it
        for lines in _new_lines(folder / "train.log", start, done):
            for text in lines:
                if not PROGRESS.match(text):
                    console.print(text, markup=False, highlight=False)
            live.update(table(snapshot(str(folder))), refresh=True)
