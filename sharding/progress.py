"""Progress of long work: count, rate and remaining time, on one line of a terminal or as a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO


class Progress:
    """Counts up; prints at most every ``interval`` seconds (half a second on a terminal).

    Example:
        >>> with Progress("convert", "crystals", total=2, stream=sys.stdout) as progress:
        ...     progress.add(2)
        convert: 2 crystals (done in 0 s)
    """

    def __init__(
        self, what: str, unit: str, total: int | None = None, stream: TextIO | None = None, interval: float = 10.0
    ) -> None:
        self.what, self.unit, self.total = what, unit, total
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.interval = 0.5 if self.live else interval
        self.count = 0
        self.started = self.printed = time.monotonic()

    def add(self, n: int = 1) -> None:
        """Count ``n`` more."""
        self.count += n
        now = time.monotonic()
        if now - self.printed >= self.interval:
            self.printed = now
            self._print(now)

    def _print(self, now: float) -> None:
        rate = self.count / max(now - self.started, 1e-9)
        line = f"{self.what}: {self.count:,} {self.unit}, {rate:,.0f}/s"
        if self.total:
            left = (self.total - self.count) / max(rate, 1e-9)
            line += f", {self.count / self.total:.0%}, {left:.0f} s left"
        self.stream.write(f"\r\x1b[K{line}" if self.live else line + "\n")
        self.stream.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = "stopped" if kind else "done"
        seconds = time.monotonic() - self.started
        clear = "\r\x1b[K" if self.live else ""
        self.stream.write(f"{clear}{self.what}: {self.count:,} {self.unit} ({end} in {seconds:.0f} s)\n")
        self.stream.flush()
