"""``cdssl bench graph``: how fast databases become shards, per core, and how time and memory grow with the data.

Rates are per second of CPU time, in one process and thread, so that a busy machine matters less; growth and the
complete run are wall times of ``cdssl shard`` in processes of its own.
"""

from __future__ import annotations

import contextlib
import functools
import io
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
from cdssl_dist.bench.common import BenchError, Figures, add_repeat, elsewhere, failed, median
from sharding.crystal import Crystal
from sharding.graph import build
from sharding.pipeline import shard
from sharding.settings import ShardSettings
from sharding.sources import ReadOptions, Source, open_source
from sharding.summary import inspect

CUTOFF: Final = 5.0  # Å
GROWTH: Final = (1, 2, 4, 8)


def add_arguments(parser: ArgumentParser) -> None:
    """See ``cdssl_dist.bench``."""
    add_repeat(parser)
    parser.add_argument("--crystals", type=int, default=16_000, help="crystals in the largest input file; at least 64")


def measure(args: Namespace) -> Figures:
    """All figures: structures per second and core, unless named otherwise."""
    if args.crystals < 64:
        raise BenchError("--crystals must be at least 64")
    with tempfile.TemporaryDirectory(prefix="cdssl-bench-") as folder:
        return _figures(Path(folder), args.crystals, args.repeat)


def _figures(folder: Path, crystals: int, repeat: int) -> Figures:
    texts = {"json": folder / "some.json", "csv": folder / "some.csv", **data.mofs()}
    data.write_json(texts["json"], crystals)
    data.write_csv(texts["csv"], crystals // 4)
    figures: Figures = {"text to shard": {}, "neighbour search": {}, "matgl": {}}
    for name, path in texts.items():
        source = open_source(str(path), ReadOptions(limit=crystals // 16 if name.startswith("mof") else None))
        figures["text to shard"][name] = {
            title: median(repeat, functools.partial(_sharding, source, fingerprints))
            for title, fingerprints in (("without fingerprints", False), ("with fingerprints", True))
        }
        figures["neighbour search"][name] = _searches(source, repeat)
        rates = elsewhere("matgl_graph.py", path, 1_000, repeat) if path.suffix in (".json", ".csv") else None
        if rates:
            figures["matgl"][name] = statistics.median(rates)
    data.write_json(folder / "growth.json", 4 * crystals)
    arguments = [str(folder / "growth.json"), "--workers", "1", "--duplicates", "keep", "--limit"]
    counts = [4 * crystals * factor // GROWTH[-1] for factor in GROWTH]
    runs = [[_run([*arguments, str(count)]) for count in counts] for _ in range(repeat)]
    figures["growth"] = [
        {"crystals": count}
        | {name: statistics.median(run[i][name] for run in runs) for name in ("seconds", "peak MiB")}
        for i, count in enumerate(counts)
    ]
    if (whole := data.SHARED / "mp2025.parquet").exists():
        figures["mp2025 complete"] = _run([str(whole), "--workers", "2"])
    return figures


def _sharding(source: Source, fingerprints: bool) -> float:
    """Structures per second of one worker, from text to the manifest."""
    settings = ShardSettings(cutoff=CUTOFF, fingerprints=fingerprints, duplicates="keep")
    with tempfile.TemporaryDirectory(prefix="cdssl-bench-") as out, contextlib.redirect_stderr(io.StringIO()):
        begin = time.process_time()
        manifest = shard([source], Path(out) / "d", settings)
        seconds = time.process_time() - begin
    return (sum(c["graphs"] for c in manifest.splits.values()) + sum(manifest.quarantined.values())) / seconds


def _searches(source: Source, repeat: int) -> Figures:
    """Our search, batched as in sharding, and pymatgen's compiled one, called per crystal, with the edges of both."""
    from pymatgen.optimization.neighbors import find_points_in_spheres

    items = [item for record in source.records() for item in source.parse(record)]
    crystals = [item for item in items if isinstance(item, Crystal)][:2_048]
    graphs, refused = build(crystals, CUTOFF)
    crystals = [crystal for i, crystal in enumerate(crystals) if i not in refused]
    periodic = np.ones(3, np.int64)
    counted = 0

    def ours() -> float:
        begin = time.process_time()
        for i in range(0, len(crystals), 512):
            build(crystals[i : i + 512], CUTOFF)
        return len(crystals) / (time.process_time() - begin)

    def pymatgen() -> float:
        nonlocal counted
        counted = 0
        begin = time.process_time()
        for crystal in crystals:
            at, cell = np.ascontiguousarray(crystal.positions), np.ascontiguousarray(crystal.lattice)
            distances = find_points_in_spheres(at, at, CUTOFF, periodic, cell, 1e-8)[3]
            counted += int((distances > 1e-8).sum())
        return len(crystals) / (time.process_time() - begin)

    rates = {"ours, with checks and graph arrays": median(repeat, ours), "pymatgen": median(repeat, pymatgen)}
    return rates | {"directed edges": 2 * len(graphs.edge_src), "pymatgen's directed edges": counted}


def _run(arguments: list[str]) -> Figures:
    """Run ``cdssl shard`` in a process: its wall time, and the peak memory of it and its workers together."""
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(tempfile.TemporaryDirectory(prefix="cdssl-bench-"))
        begin = time.perf_counter()
        command = [sys.executable, "-m", "sharding", *arguments, "--out", f"{out}/d"]
        said = stack.enter_context(tempfile.TemporaryFile("w+"))  # a pipe that nobody reads would fill up
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, sum(map(_memory, _family(process.pid))))
            time.sleep(0.1)
        seconds = time.perf_counter() - begin
        if process.returncode:
            said.seek(0)
            raise failed(f"cdssl shard {' '.join(arguments)}", process.returncode, said.read())
        found = inspect(f"{out}/d")
    return {"seconds": seconds, "peak MiB": peak} | {
        name: found[name] for name in ("graphs", "edges", "bytes_per_edge", "fill")
    }


def _family(pid: int) -> list[int]:
    """The ids of a process and all its descendants."""
    children = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += [int(child) for child in path.read_text().split()]
    return [pid, *(one for child in children for one in _family(child))]


def _memory(pid: int) -> float:
    """Memory of a process in MiB; shared pages count proportionally (PSS)."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024
    return 0.0  # it has ended


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
    if whole := figures.get("mp2025 complete"):
        lines.append("mp2025 complete: " + ", ".join(f"{name} {value:,.4g}" for name, value in whole.items()))
    return "\n".join(lines)
