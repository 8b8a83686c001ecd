"""Shared by all commands: the argument parser, exit codes, and one-line reports of user errors."""

from __future__ import annotations

import argparse
import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DONE, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130
RUNS = Path("runs")  # default folder for results, and for the registry if no other is configured


class UseError(ValueError):
    """Command-line options are missing, invalid or contradictory."""


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Show defaults in the help text, except None, False and empty lists."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser with the program name that the user types; its help shows the defaults."""

    def __init__(self, prog: str, description: str = "", **more: Any) -> None:
        super().__init__(prog, description=description, formatter_class=_Help, **more)


def positive(text: str) -> int:
    """Parse a positive integer; for use as an ``argparse`` type."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """The type of a seed: 0 or more."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} up, not {text!r}")
    return int(text)


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Report errors in one line and return an exit code: 2 for what the user can fix (a ``ValueError``), 1 otherwise.

    Only our own bugs show a traceback; CDSSL_TRACEBACK=1 shows it for every error. SIGTERM ends a command as Ctrl-C
    does: open resources are closed and partial output is removed.
    """

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> int:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _interrupt)
        try:
            return main(*args, **kwargs)
        except (ValueError, RuntimeError, OSError) as why:
            named = type(why).__module__.split(".")[0] in ("cdssl_dist", "sharding") or isinstance(why, OSError)
            if os.environ.get("CDSSL_TRACEBACK") or not named:
                raise
            print(f"error: {why}", file=sys.stderr)
            return WRONG_USE if isinstance(why, ValueError) else FAILED
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED

    return run


def one_line(why: object, limit: int = 300) -> str:
    """Collapse an error message to one line of at most ``limit`` characters; the exception type if it is empty."""
    return " ".join(str(why).split())[:limit] or type(why).__name__


def run_child(command: Sequence[str]) -> int:
    """Run a child process that may need time to stop, and return its exit code.

    Ctrl-C reaches the child directly; a SIGTERM to this process is forwarded. Either way we then wait for the child,
    which may be saving its work. A second interrupt kills it at once.
    """
    with subprocess.Popen(command) as child:
        try:
            return child.wait()
        except KeyboardInterrupt as why:
            if isinstance(why, _TerminatedError):
                child.terminate()
            try:
                return child.wait()
            except KeyboardInterrupt:
                child.kill()
                raise


class _TerminatedError(KeyboardInterrupt):
    """Raised on SIGTERM, which, unlike Ctrl-C, no terminal sends to the whole process group."""


def _interrupt(*_: Any) -> None:
    raise _TerminatedError
