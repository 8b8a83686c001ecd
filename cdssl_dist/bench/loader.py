"""``cdssl bench loader``: from shards to the tensors sent to the device, per core, compared with other loaders.

Rates are per second of CPU time, so that a busy machine matters less. With ``--data``, it needs only torch, numpy,
pyarrow, safetensors and xxhash; other loaders are measured if they are installed.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from cdssl_dist.bench import loader_others
from cdssl_dist.bench.common import BenchError, Figures, add_repeat, data_folder, in_turns, output_of
from cdssl_dist.data.batch import PackShape, RawPack, widen
from cdssl_dist.data.dataset import DataSet
from cdssl_dist.data.loader import Loader
from cdssl_dist.data.plan import EpochPlan
from sharding.block import decode_arrays

RANKS: Final = (8, 16, 32, 64)
MEMORY: Final = "import json, sys; from cdssl_dist.bench.loader import memory; print(json.dumps(memory(sys.argv[1])))"


def add_arguments(parser: ArgumentParser) -> None:
    """See ``cdssl_dist.bench``."""
    add_repeat(parser)
    parser.add_argument(
        "--data", help="a data set; if omitted, the shared one of the Materials Project, or aflow:, is sharded"
    )
    parser.add_argument("--crystals", type=int, default=8_000, help="crystals for rates; other figures use all")


def measure(args: Namespace) -> Figures:
    """All figures; rates are medians, per second of CPU time, except those to the device (wall time)."""
    torch.set_num_threads(1)
    with data_folder(args.data) as folder, DataSet(folder) as data:
        plan, shape = EpochPlan(data.table("train"), 0, 1, 8), data.shape("train", 1)
        packs = _packs(data, plan, args.crystals)
        raw = [data.pack(plan.pack(*at), plan.table, shape) for at in packs[:32]]
        ours: loader_others.Contestants = {
            "shard to tensors": lambda: _deliver(data, plan, shape, packs),
            "with a thread that reads ahead": lambda: _ahead(data, plan, shape, len(packs) // 8),
        }
        blocks = [int(plan.table.block[plan.pack(*at)[0].index]) for at in packs]
        crystals, edges = (int(data.blocks[name][blocks].sum()) for name in ("graphs", "edges"))
        with loader_others.contestants(data, blocks, crystals // len(packs)) as others:
            seconds = in_turns(args.repeat, ours | others | {"widen": lambda: _widen(raw)})
        widening, inline = seconds.pop("widen") / len(raw), seconds["shard to tensors"]
        return {
            "data": {"crystals": crystals, "directed edges": edges, "packs": len(packs)},
            "rates": {name: _rates(crystals, edges, s) for name, s in seconds.items()}
            | loader_others.matgl(data, blocks, crystals // len(packs), args.repeat)
            | {"shard to tensors, then widened on CPU": _rates(crystals, edges, inline + len(packs) * widening)},
            "widening": {"ms per pack": 1e3 * widening, "directed edges": 2 * shape.half_edges / widening},
            "device": _to_device(data, plan, shape, packs, raw, crystals, args.repeat),
            "padding": _padding(data, shape),
            "imbalance": _imbalance(data, plan),
            "memory": _memory(folder),
        }


def _rates(crystals: int, edges: int, seconds: float) -> Figures:
    return {"crystals": crystals / seconds, "directed edges": edges / seconds}


def _packs(data: DataSet, plan: EpochPlan, crystals: int) -> list[tuple[int, int]]:
    """(step, lane) of the packs in the first steps of a plan that hold at least this many crystals."""
    found, steps = 0, 0
    while found < crystals and steps < plan.steps_before(1):
        blocks = [int(plan.table.block[e.index]) for pack in plan.step(steps) for e in pack]
        found, steps = found + int(data.blocks["graphs"][blocks].sum()), steps + 1
    if not steps:
        raise BenchError(f"{data.name}: too small to be measured; it needs at least 8 blocks")
    return [(step, lane) for step in range(steps) for lane in range(plan.packs_per_step)]


def _deliver(data: DataSet, plan: EpochPlan, shape: PackShape, packs: list[tuple[int, int]]) -> float:
    """CPU seconds, in one thread, to plan, read, check, join and pad packs."""
    begin = time.process_time()
    for step, lane in packs:
        data.pack(plan.pack(step, lane), plan.table, shape)
    return time.process_time() - begin


def _ahead(data: DataSet, plan: EpochPlan, shape: PackShape, steps: int) -> float:
    """The same with the loader's thread, as in training: CPU seconds of both threads."""
    begin = time.process_time()
    with Loader(data, plan, shape, rank=0, world_size=1, first=0, end=steps, prefetch=16) as found:
        for _ in found:
            pass
    return time.process_time() - begin


def _widen(packs: list[RawPack]) -> float:
    begin = time.process_time()
    for raw in packs:
        widen(raw)
    return time.process_time() - begin


def _to_device(
    data: DataSet,
    plan: EpochPlan,
    shape: PackShape,
    packs: list[tuple[int, int]],
    raw: list[RawPack],
    crystals: int,
    repeat: int,
) -> Figures:
    """Wall time as in training: packs are read ahead, pinned, copied and widened on the device, a GPU if present."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    ready = [one.pin() for one in raw] if gpu else raw
    there = [one.to(device) for one in ready]

    def timed(run: Callable[[], None]) -> float:
        begin = time.perf_counter()
        run()
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def whole() -> None:
        last = len(packs) // plan.packs_per_step
        with Loader(data, plan, shape, rank=0, world_size=1, first=0, end=last, prefetch=16, pin=gpu) as found:
            for step in found:
                for one in step.packs:
                    widen(one.to(device))

    def copied() -> None:
        for one in ready:
            one.to(device)

    def widened() -> None:
        for one in there:
            widen(one)

    runs = {"whole": whole, "copied": copied, "widened": widened}
    seconds = in_turns(repeat, {name: functools.partial(timed, run) for name, run in runs.items()})
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "crystals": crystals / seconds["whole"],
        "copy, ms per pack": 1e3 * seconds["copied"] / len(raw),
        "widening, ms per pack": 1e3 * seconds["widened"] / len(raw),
    }


def _padding(data: DataSet, shape: PackShape) -> Figures:
    """Share of padding in what is sent to the device, over an epoch of the training split."""
    mine = data.blocks["split"] == 0
    room = {"graphs": shape.graphs, "atoms": shape.atoms, "edges": 2 * shape.half_edges}
    return {name: 1 - float(data.blocks[name][mine].mean()) / size for name, size in room.items()}


def _imbalance(data: DataSet, plan: EpochPlan) -> list[Figures]:
    """Largest over mean work among the ranks of a step, in real (not padding) directed edges, over an epoch.

    ``fixed count`` has the same crystals, shuffled, in batches of a fixed number: the average of our packs.
    """
    blocks = plan.table.block.tolist()
    edges = 2 * np.concatenate([decode_arrays(data.read(b))["n_edges"] for b in blocks]).astype(np.int64)
    shuffled = np.random.default_rng(0).permutation(edges)
    count = len(edges) // len(blocks)
    naive = shuffled[: len(shuffled) // count * count].reshape(-1, count).sum(1)
    of_block = np.zeros(max(blocks) + 1, np.int64)
    of_block[blocks] = data.blocks["edges"][blocks]
    rows = []
    for ranks in RANKS:
        if len(blocks) < ranks:
            break
        p = EpochPlan(plan.table, 0, 1, ranks)
        packs = p.segment(0).reshape(ranks, -1).T  # of each step
        ours = _largest_over_mean(of_block[plan.table.block[packs % len(blocks)]])
        fixed = _largest_over_mean(naive[: len(naive) // ranks * ranks].reshape(-1, ranks))
        rows.append({"ranks": ranks, "ours": _spread(ours), "fixed count": _spread(fixed)})
    return rows


def _largest_over_mean(work: NDArray[np.int64]) -> NDArray[np.float64]:
    """(steps, ranks) → (steps,)."""
    largest: NDArray[np.float64] = work.max(1) / work.mean(1)
    return largest


def _spread(values: NDArray[np.float64]) -> Figures:
    return {"median": float(np.median(values)), "mean": float(values.mean()), "worst": float(values.max())}


def _memory(folder: str) -> Figures:
    """Run ``memory`` in a process of its own."""
    found: Figures = json.loads(output_of([sys.executable, "-c", MEMORY, folder]))
    return found


def memory(folder: str) -> Figures:
    """Resident memory of a single rank over an epoch, MiB."""
    data = DataSet(folder)
    plan, shape = EpochPlan(data.table("train"), 0, 1, 8), data.shape("train", 1)
    imported, steps, seen, size = _resident(), plan.steps_before(1), list[float](), 0
    with Loader(data, plan, shape, rank=0, world_size=1, first=0, end=steps, prefetch=16) as found:
        for step in found:
            size = sum(getattr(step.packs[0], f.name).nbytes for f in fields(RawPack))
            seen.append(_resident())
    tenth = max(len(seen) // 10, 1)
    return {
        "before": imported,
        "after a tenth": seen[tenth - 1],
        "at the end": seen[-1],
        "largest": max(seen),
        "16 packs read ahead": 16 * size / 2**20,
    }


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def table(figures: Figures) -> str:
    """The figures for people."""
    about: dict[str, Any] = figures["data"]
    lines = [f"{about['crystals']:,} crystals, {about['directed edges']:,} directed edges, {about['packs']} packs"]
    for name, rate in figures["rates"].items():
        lines.append(f"{name}: {rate['crystals']:,.0f} crystals/s, {rate['directed edges'] / 1e6:,.1f} M edges/s")
    widening = figures["widening"]
    lines.append(
        f"widening on CPU, apart: {widening['ms per pack']:.2f} ms a pack, "
        f"{widening['directed edges'] / 1e6:,.1f} M edges/s"
    )
    device = figures["device"]
    lines.append(
        f"to {device['device']}, wall: {device['crystals']:,.0f} crystals/s; a pack is copied in "
        f"{device['copy, ms per pack']:.3f} ms and widened in {device['widening, ms per pack']:.3f} ms"
    )
    lines.append("padding: " + ", ".join(f"{share:.2%} of {name}" for name, share in figures["padding"].items()))
    for row in figures["imbalance"]:
        shown = (
            f"{how} {row[how]['median']:.3f} (mean {row[how]['mean']:.3f}, worst {row[how]['worst']:.3f})"
            for how in ("ours", "fixed count")
        )
        lines.append(f"largest over mean work, {row['ranks']} ranks: " + ", ".join(shown))
    lines.append("memory, MiB: " + ", ".join(f"{name} {value:,.0f}" for name, value in figures["memory"].items()))
    return "\n".join(lines)
