"""What all commands share: a parser, and errors of the user said in one line."""

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
RUNS = Path("runs")  # where results go, and the registry where no other is named


class UseError(ValueError):
    """Options that say too little, or contradict one another."""


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something: not None, False or an empty list."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser named as the user calls it; its help shows the defaults."""

    def __init__(self, prog: str, description: str = "", **more: Any) -> None:
        super().__init__(prog, description=description, formatter_class=_Help, **more)


def positive(text: str) -> int:
    """The type of an argument that counts something: 1 or more."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """The type of a seed: 0 or more."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number from {least} up, not {text!r}")
    return int(text)


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Turn errors into a line and an exit code: 2 for what the user can fix (a ``ValueError``), 1 for the rest.

    A traceback is for our own bugs; CDSSL_TRACEBACK=1 shows it for every error. SIGTERM ends a command as Ctrl-C does:
    what it has begun is closed, and what is half done removed.
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
    """What a library says of an error, in one line that is not too long; its kind where it says nothing."""
    return " ".join(str(why).split())[:limit] or type(why).__name__


def run_child(command: Sequence[str]) -> int:
    """Run another command, which may take its time to stop; returns its exit code.

    Ctrl-C reaches it by itself, a SIGTERM to this process is passed on, and then its end is waited for, as it may save
    what it has done. A second one ends it at once.
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
    """SIGTERM, which no terminal sends to the whole group."""


def _interrupt(*_: Any) -> None:
    raise _TerminatedError
