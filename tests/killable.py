"""Processes that a test can kill, forked from one that has everything imported and compiled, so they start at once.

Each leads a process group of its own, and what it prints goes to a file.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
TESTS = Path(__file__).resolve().parent


class Killable:
    """A function that runs in a process group of its own; a context, so that nothing outlives its test."""

    def __init__(self, log: Path, function: Callable[..., Any], *arguments: Any) -> None:
        self.log = log
        warm()
        self._process = CONTEXT.Process(target=_enter, args=(log, function, arguments))
        self._process.start()

    @property
    def pid(self) -> int:
        return int(self._process.pid or 0)

    def signal(self, number: int) -> None:
        """Send a signal to all of the group that is left."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # over already, or not yet a group of its own
            if self.running():
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def running(self) -> bool:
        return self._process.is_alive()

    def wait(self, timeout: float = 120) -> int:
        """The exit code; −9 after SIGKILL."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still runs: {self.log.read_text()}"
        return self._process.exitcode

    def alone(self) -> bool:
        """Whether the group is empty."""
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def children(self) -> list[int]:
        """The processes of its pool, by id."""
        found = []
        for task in Path(f"/proc/{self.pid}/task").glob("*/children"):
            for child in map(int, task.read_text().split()):
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(child)
        return found

    def __enter__(self) -> Killable:
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGKILL)
        self._process.join(10)


@functools.cache
def warm() -> None:
    """Start the process to fork from, with a path on which it finds what it loads."""
    CONTEXT.set_forkserver_preload(["killable_warm"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{TESTS}{os.pathsep}{TESTS.parent}")
        forkserver.ensure_running()
    first = CONTEXT.Process(target=time.sleep, args=(0,))  # its start waits until all is loaded
    first.start()
    first.join()


def _enter(log: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = function(*arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


def until(true: Callable[[], Any], timeout: float = 60) -> Any:
    """Wait for something, and return it."""
    deadline = time.monotonic() + timeout
    while not (value := true()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)
    return value
