"""``cdssl bench overhead``: what the engine, the guard, metrics and checkpoints add to a plain torch loop.

All variants take the same packs and initial weights, in turns. On CPU, process time is measured, which other processes
hardly affect; on a GPU, wall time. ``--engine plain`` needs only torch and a data set, not DeepSpeed, Ray, pydantic or
pymatgen.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from cdssl_dist.bench.common import BenchError, Figures, add_repeat, data_folder, free_port, turns
from cdssl_dist.bench.step import CENTERS, SIZES
from cdssl_dist.data.batch import RawPack, widen
from cdssl_dist.data.dataset import DataSet
from cdssl_dist.data.plan import EpochPlan
from cdssl_dist.model.edges import GaussianExpansion
from cdssl_dist.model.loss import Baseline, fit_baseline
from cdssl_dist.model.megnet import PretextModel
from cdssl_dist.model.precision import bf16_twin, round_into
from cdssl_dist.model.pretext import Denoising

METRICS_EVERY: Final = 20  # steps, the defaults of the config
CHECKPOINT_EVERY: Final = 500
CLIP: Final = 1.0
RATE: Final = 1e-3

Run = Callable[[int], None]  # runs this many steps


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """See ``cdssl_dist.bench``."""
    add_repeat(parser)
    parser.add_argument("--data", help="data set; if omitted, shared data or aflow: is sharded")
    parser.add_argument("--engine", choices=("plain", "deepspeed", "both"), default="both", help="what is measured")
    parser.add_argument("--size", choices=tuple(SIZES), default="small", help="64/32 units × 3 blocks, or 256 × 6")
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32", help="type of weights and activations")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=1, help="ZeRO stage")
    parser.add_argument("--steps", type=int, default=20, help="steps of each turn")
    parser.add_argument("--packs", type=int, default=4, help="different packs, which steps take in turn")


def measure(args: argparse.Namespace) -> Figures:
    """All figures; see the module's docstring."""
    with tempfile.TemporaryDirectory(prefix="cdssl-bench-") as made, data_folder(args.data) as folder:
        device = torch.device(args.device)
        if device.type == "cpu":
            torch.set_num_threads(1)
        with DataSet(folder) as data:
            table = data.table("train")
            plan, shape = EpochPlan(table, 0, 1, 1), data.shape("train", 1)
            packs = [data.pack(plan.pack(i, 0), table, shape).to(device) for i in range(min(args.packs, len(table)))]
            cutoff = data.manifest.cutoff
        expansion = GaussianExpansion(CENTERS, cutoff + 1.0, 0.5)
        task = Denoising(expansion, (0.3, 0.3), 0)
        runs: dict[str, Run] = {}
        if args.engine != "deepspeed":
            runs["plain torch"] = _plain(task, packs, args, device)
        engine = None
        if args.engine != "plain":
            engine, more = _engine(task, packs, args, device)
            runs |= more
        seconds = turns(args.repeat, {n: functools.partial(_timed, run, args.steps, device) for n, run in runs.items()})
        figures: Figures = {
            "directed edges of a pack": 2 * shape.half_edges,
            "size": args.size, "dtype": args.dtype, "device": args.device, "stage": args.stage,
            "ms per step": {name: 1e3 * statistics.median(each) for name, each in seconds.items()},
            "µs per edge": {n: 1e6 * statistics.median(each) / (2 * shape.half_edges) for n, each in seconds.items()},
        }  # fmt: skip
        if engine is not None:
            if args.engine == "both":
                figures["engine over plain"] = _over(seconds, "engine", "plain torch")
            figures["guard and metrics over engine"] = _over(seconds, "engine, guard, metrics", "engine")
            step = statistics.median(seconds["engine, guard, metrics"])
            figures["checkpoint"] = _checkpoint(engine, Path(made) / "checkpoints", args.repeat, step)
            if device.type == "cpu":
                figures["kill to new step, s"] = _restart(folder, Path(made) / "run", args)
        return figures


def _model(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    return PretextModel(edge_features=CENTERS, **SIZES[args.size])


def _plain(task: Denoising, packs: list[RawPack], args: argparse.Namespace, device: torch.device) -> Run:
    """A plain torch loop, as one would write it without this project."""
    model = _model(args).to(device)
    twin = bf16_twin(model) if args.dtype == "bf16" else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=device.type == "cuda")

    def run(steps: int) -> None:
        for i in range(steps):
            batch = widen(packs[i % len(packs)])
            squared, _ = task.loss(model, batch)
            (squared / batch.scored.sum()).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            if twin is not None:
                round_into(twin, model)

    return run


def _engine(
    task: Denoising, packs: list[RawPack], args: argparse.Namespace, device: torch.device
) -> tuple[Any, dict[str, Run]]:
    """One engine and two ways to run it: with a gate that is always open, and with guard and metrics as in training."""
    import torch.distributed as dist

    from cdssl_dist.config import GuardConfig
    from cdssl_dist.train.deepspeed_json import EngineSettings
    from cdssl_dist.train.engine import Engine, init_distributed
    from cdssl_dist.train.guard import Guard

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    init_distributed(device)
    guard = Guard(GuardConfig(on_spike="clip", rollback_after=10**9, max_bad_share=1.0))
    state: dict[str, Any] = {"guarded": False, "loss": torch.zeros((), device=device)}

    def decide(norm: float) -> float | None:
        if state["guarded"]:
            shared = torch.stack([state["loss"], torch.zeros((), device=device)])
            dist.all_reduce(shared)
            guard.judge(norm, 0, shared.tolist()[0])
        return RATE

    precision: Any = {"f32": "fp32", "bf16": "bf16"}[args.dtype]
    settings = EngineSettings(stage=args.stage, precision=precision, micro_steps=1, clip=CLIP)
    engine = Engine(_model(args), settings, device, decide)
    sums = torch.stack([task.baseline_sums(widen(pack)) for pack in packs]).sum(dim=0)
    baseline: Baseline = fit_baseline(sums, task.expansion.end)

    def run(guarded: bool, steps: int) -> None:
        state["guarded"] = guarded
        for i in range(steps):
            batch = widen(packs[i % len(packs)])
            due = guarded and i % METRICS_EVERY == METRICS_EVERY - 1
            squared, figures = task.loss(engine.module, batch, baseline if due else None)
            loss = squared / batch.scored.sum()
            state["loss"] = loss.detach()
            engine.backward(loss)
            if figures is not None:
                dist.all_reduce(figures)
                figures.tolist()

    plain, guarded = functools.partial(run, False), functools.partial(run, True)
    return engine, {"engine": plain, "engine, guard, metrics": guarded}


def _timed(run: Run, steps: int, device: torch.device) -> float:
    """Seconds per step."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    begin = clock()
    run(steps)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (clock() - begin) / steps


def _over(seconds: dict[str, list[float]], one: str, other: str) -> float:
    """The relative extra time of one over the other: the median over rounds."""
    return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True)) - 1.0


def _checkpoint(engine: Any, root: Path, repeat: int, step: float) -> Figures:
    """How long a checkpoint stalls training, and the share of the time that this takes at the default interval."""
    from cdssl_dist.train.checkpoint import Progress, Retention, save
    from cdssl_dist.train.guard import GuardState
    from cdssl_dist.train.ledger import Ledger

    root.mkdir()
    stalls = []
    for i in range(repeat):
        progress = Progress(i, GuardState(), "", "", {}, 1, {})
        begin = time.perf_counter()
        save(root, engine, progress, Retention(keep=1, quiet=0), Ledger())
        stalls.append(time.perf_counter() - begin)
    stall = statistics.median(stalls)
    return {"stall, ms": 1e3 * stall, "share": stall / (stall + CHECKPOINT_EVERY * step)}


def _restart(data: str, run: Path, args: argparse.Namespace) -> float:
    """Seconds from the SIGKILL of a single rank, started without Ray, to its first step after a restart."""
    from cdssl_dist.config import parse

    content = {
        "run": str(run),
        "data": {"path": data, "packs_per_step": 1},
        "model": SIZES[args.size],
        "checkpoint": {"every": 3},
        "tracking": {"every": 1, "baseline_packs": 1, "validate_every": 10**6},
        "engine": {"device": args.device, "stage": args.stage},
    }
    parse(content)
    code = (
        "import json, sys; from cdssl_dist.config import parse; from cdssl_dist.train.loop import train; "
        "train(parse(json.loads(sys.argv[1])), echo=False)"
    )
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}

    def life(until: Callable[[], bool]) -> None:
        process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(content)],
            env=environment | {"MASTER_PORT": str(free_port())},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while not until():
                if process.poll() is not None:
                    raise BenchError("the run that was to be killed ended by itself")
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()

    def steps() -> int:
        return (run / "train.log").read_text().count("edges/s")

    life(lambda: any(run.glob("checkpoints/*/COMMITTED")))
    begin, before = time.perf_counter(), steps()
    life(lambda: steps() > before)
    return time.perf_counter() - begin


def table(figures: Figures) -> str:
    """The figures for people."""
    lines = [f"{figures['directed edges of a pack']:,} directed edges a pack, {figures['size']}, {figures['dtype']}"]
    for name, ms in figures["ms per step"].items():
        lines.append(f"{name:24} {ms:8.1f} ms per step, {figures['µs per edge'][name]:.3f} µs per edge")
    for name in ("engine over plain", "guard and metrics over engine"):
        if name in figures:
            lines.append(f"{name:30} {figures[name]:+.1%}")
    if "checkpoint" in figures:
        stall = figures["checkpoint"]
        lines.append(f"checkpoint: {stall['stall, ms']:.0f} ms, {stall['share']:.2%} of the time at every 500 steps")
    if "kill to new step, s" in figures:
        lines.append(f"kill to new step: {figures['kill to new step, s']:.1f} s")
    return "\n".join(lines)
