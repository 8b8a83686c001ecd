"""Waiting for endpoints and other processes: how long, how it is cancelled, and how the user is warned."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

POLL: Final = 0.1  # s between checks whether to stop waiting


class StoppedError(Exception):
    """Reading was stopped because its result is no longer needed."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for an endpoint.

    After failure n comes a pause drawn from (p/2, p), p = ``first_pause`` · 2ⁿ, at most ``longest_pause``.
    """

    request: float = 30.0  # s until one request must be answered completely
    give_up: float = 120.0  # s of failures of one piece after which the endpoint counts as dead
    first_pause: float = 0.25  # s
    longest_pause: float = 10.0  # s
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    uniform: Callable[[float, float], float] = random.uniform

    def pause(self, seconds: float, stop: threading.Event | None = None) -> None:
        """Sleep, unless stopped.

        Raises:
            StoppedError: soon after ``stop`` was set.
        """
        end = self.clock() + seconds
        while (left := end - self.clock()) > 0:
            if stop is not None and stop.is_set():
                raise StoppedError
            self.sleep(min(left, POLL))


def warn(text: str) -> None:
    """Print a one-line warning for the user."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
