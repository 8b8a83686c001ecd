"""``cdssl bench graph``: how fast databases become shards, per core, and how time and memory grow with the data.

Every figure is the median of repeated runs in this process, or of runs in a process of their own where memory is
measured. What stands beside ours is run on the same files, in turns, so that a busy machine is busy for all.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Final

import numpy as np

from cdssl_dist.bench import data
from cdssl_dist.bench.common import ENVIRONMENT, BenchError, Figures, median
from sharding.crystal import Crystal
from sharding.graph import build
from sharding.pipeline import shard
from sharding.settings import ShardSettings
from sharding.sources import ReadOptions, Source, open_source

CUTOFF: Final = 5.0  # Å
GROWTH: Final = (1, 2, 4, 8)


def add_arguments(parser: ArgumentParser) -> None:
    """See ``cdssl_dist.bench``."""
    parser.add_argument("--crystals", type=int, default=16_000, help="in the largest text that is read; 64 at least")


def measure(args: Namespace) -> Figures:
    """All figures: structures per second and core, unless named otherwise."""
    if args.crystals < 64:
        raise BenchError("--crystals must be 64 at least")
    with tempfile.TemporaryDirectory(prefix="cdssl-bench-") as folder:
        return _figures(Path(folder), args.crystals, args.repeat)


def _figures(folder: Path, crystals: int, repeat: int) -> Figures:
    texts = {"json": folder / "some.json", "csv": folder / "some.csv", "mof": data.mofs()}
    data.write_json(folder / "some.json", crystals)
    data.write_csv(folder / "some.csv", crystals // 4)
    limits = {"json": crystals, "csv": crystals // 4, "mof": max(crystals // 16, 64)}
    figures: Figures = {"text to shard": {}, "neighbour search": {}, "matgl": {}, "growth": []}
    for name, path in texts.items():
        if path is None:
            continue
        source = open_source(str(path), ReadOptions(limit=limits[name]))
        rates = {}
        for title, fingerprints in (("without fingerprints", False), ("with fingerprints", True)):
            settings = ShardSettings(cutoff=CUTOFF, fingerprints=fingerprints, duplicates="keep")
            rates[title] = median(repeat, lambda s=settings, src=source: _sharding(src, s))  # type: ignore[misc]
        figures["text to shard"][name] = rates
        figures["neighbour search"][name] = _searches(source, repeat)
        if (ENVIRONMENT / "bin" / "python").exists() and path.suffix in (".json", ".csv"):
            figures["matgl"][name] = _matgl(path, min(limits[name], 1_000), repeat)
    figures["growth"] = [_growth(folder, crystals * factor // GROWTH[-1], repeat) for factor in GROWTH]
    return figures


def _sharding(source: Source, settings: ShardSettings) -> float:
    """Structures per second of one worker, from text to the manifest."""
    with tempfile.TemporaryDirectory(prefix="cdssl-bench-") as out, contextlib.redirect_stderr(io.StringIO()):
        begin = time.perf_counter()
        manifest = shard([source], Path(out) / "d", settings)
        seconds = time.perf_counter() - begin
    return (sum(c["graphs"] for c in manifest.splits.values()) + sum(manifest.quarantined.values())) / seconds


def _searches(source: Source, repeat: int) -> Figures:
    """Ours, batched as in sharding, beside pymatgen's compiled search, called for each crystal; edges must agree."""
    from pymatgen.optimization.neighbors import find_points_in_spheres

    items = [item for record in source.records() for item in source.parse(record)]
    crystals = [item for item in items if isinstance(item, Crystal)][:2_048]
    graphs, refused = build(crystals, CUTOFF)
    crystals = [crystal for i, crystal in enumerate(crystals) if i not in refused]
    periodic = np.ones(3, np.int64)
    counted = 0

    def ours() -> float:
        begin = time.perf_counter()
        for i in range(0, len(crystals), 512):
            build(crystals[i : i + 512], CUTOFF)
        return len(crystals) / (time.perf_counter() - begin)

    def pymatgen() -> float:
        nonlocal counted
        counted = 0
        begin = time.perf_counter()
        for crystal in crystals:
            at, cell = np.ascontiguousarray(crystal.positions), np.ascontiguousarray(crystal.lattice)
            distances = find_points_in_spheres(at, at, CUTOFF, periodic, cell, 1e-8)[3]
            counted += int((distances > 1e-8).sum())
        return len(crystals) / (time.perf_counter() - begin)

    rates = {"ours, with checks and graph arrays": median(repeat, ours), "pymatgen": median(repeat, pymatgen)}
    return rates | {"directed edges": 2 * len(graphs.edge_src), "pymatgen's directed edges": counted}


def _matgl(path: Path, limit: int, repeat: int) -> float:
    script = Path(__file__).with_name("matgl_graph.py")
    answer = subprocess.run(
        [str(ENVIRONMENT / "bin" / "python"), str(script), str(path), str(limit), str(repeat)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if answer.returncode:
        raise RuntimeError(f"matgl's path failed:\n{answer.stderr[-2000:]}")
    return statistics.median(json.loads(answer.stdout.splitlines()[-1]))


def _growth(folder: Path, crystals: int, repeat: int) -> Figures:
    """Seconds and the largest memory of ``cdssl shard --workers 1``, in a process of its own."""
    seconds, memory = [], []
    for _ in range(repeat):
        with tempfile.TemporaryDirectory(prefix="cdssl-bench-") as out:
            arguments = [str(folder / "some.json"), "--out", f"{out}/d", "--workers", "1", "--duplicates", "keep"]
            begin = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-m", "sharding", *arguments, "--limit", str(crystals)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise RuntimeError(f"cdssl shard of {crystals} crystals ended with {process.returncode}")
            seconds.append(time.perf_counter() - begin)
            memory.append(usage.ru_maxrss / 1024)
    return {"crystals": crystals, "seconds": statistics.median(seconds), "peak MiB": statistics.median(memory)}


def table(figures: Figures) -> str:
    """The figures for people."""
    lines = []
    for title in ("text to shard", "neighbour search"):
        for name, rates in figures[title].items():
            shown = ", ".join(f"{what} {value:,.0f}" for what, value in rates.items())
            lines.append(f"{title}, {name}: {shown} (structures/s per core)")
    lines += [f"matgl, {name}: {rate:,.0f} structures/s" for name, rate in figures["matgl"].items()]
    for row in figures["growth"]:
        lines.append(f"growth: {row['crystals']:,} crystals in {row['seconds']:.1f} s, {row['peak MiB']:,.0f} MiB")
    return "\n".join(lines)
