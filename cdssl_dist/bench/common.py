"""What all benchmarks share."""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

# Python of the environment that `make bench` creates in the current folder, with packages that only benchmarks need.
PYTHON: Final = Path(".bench-venv/bin/python")

Figures = dict[str, Any]
K = TypeVar("K")


class BenchError(ValueError):
    """A measurement that is not possible here, or that failed."""


def elsewhere(script: str, *arguments: object) -> Any:
    """Run a script of this package in the environment of ``make bench``, in one thread.

    Returns:
        The JSON of its last line of output; None if there is no such environment.

    Raises:
        BenchError: if the script fails.
    """
    if not PYTHON.exists():
        return None
    command = [str(PYTHON), str(Path(__file__).with_name(script)), *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return json.loads(output_of(command, env).splitlines()[-1])


def output_of(command: list[str], env: Mapping[str, str] | None = None) -> str:
    """Run a command and return its output.

    Raises:
        BenchError: if it fails; the message ends with the end of its stderr.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise failed(" ".join(command), done.returncode, done.stderr)
    return done.stdout


def failed(what: str, code: int, stderr: str) -> BenchError:
    """The error for a process that failed, with the end of its stderr."""
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    return BenchError(f"{what[:200]} {how}" + (f":\n{text[-2000:]}" if (text := stderr.strip()) else ""))


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def median(repeat: int, measure: Callable[[], float]) -> float:
    """The median of ``repeat`` runs, after a warm-up run."""
    measure()
    return statistics.median(measure() for _ in range(repeat))


def turns(repeat: int, measures: Mapping[K, Callable[[], float]]) -> dict[K, list[float]]:
    """All values of each measure, taken in turns, so that load affects all alike; the first round is a warm-up."""
    found: dict[K, list[float]] = {name: [] for name in measures}
    for i in range(repeat + 1):
        for name, measure in measures.items():
            value = measure()
            if i:
                found[name].append(value)
    return found


def in_turns(repeat: int, measures: Mapping[K, Callable[[], float]]) -> dict[K, float]:
    """The median of each measure; see ``turns``."""
    return {name: statistics.median(values) for name, values in turns(repeat, measures).items()}


def add_repeat(parser: ArgumentParser, default: int = 5) -> None:
    """Add the option ``--repeat``."""
    parser.add_argument("--repeat", type=int, default=default, help="runs of each measure; the median is reported")


def machine() -> Figures:
    """Describe the machine on which figures are measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load before": round(os.getloadavg()[0], 2),
    }


@contextlib.contextmanager
def data_folder(given: str | None) -> Iterator[str]:
    """Yield the given data set, or else a temporary one."""
    if given:
        yield given
        return
    from cdssl_dist.bench.data import SHARED
    from sharding.pipeline import shard
    from sharding.settings import ShardSettings
    from sharding.sources import open_source

    shared = SHARED / "mp2025.parquet"
    source = open_source(str(shared) if shared.exists() else "aflow:20000")
    with tempfile.TemporaryDirectory(prefix="cdssl-bench-") as out:
        with contextlib.redirect_stderr(io.StringIO()):
            shard([source], Path(out) / "d", ShardSettings(fingerprints=False, duplicates="keep"))
        yield f"{out}/d"
