"""``cdssl bench scaling``: the training loop on one rank and on several of this machine, and a cost model of many GPUs.

Measured are the terms of the model that a single machine can show: bytes reduced and saved, and how much time more
ranks lose, and to what (``lost``). The speeds of GPU, network and storage must be given (``--rate``, ``--between``, …).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cdssl_dist.bench.common import BenchError, Figures, add_repeat, data_folder, failed, free_port
from cdssl_dist.bench.step import CENTERS, SIZES, fresh
from cdssl_dist.config import Config, parse
from cdssl_dist.data.dataset import DataSet
from cdssl_dist.data.plan import EpochPlan

GPUS: Final = (1, 8, 64, 512, 4096)
PER_NODE: Final = 8
WARM: Final = 5  # steps that are not counted
SAVED: Final = 12  # bytes per parameter in a checkpoint: weight and two moments, f32
RANK: Final = "import sys; from cdssl_dist.bench.scaling import rank; rank(sys.argv[1])"


@dataclass(frozen=True)
class Machine:
    """Given parameters of the cost model. The rate is that of one GPU; bandwidths are in bytes per second."""

    rate: float  # directed edges per second in the training step
    inside: float  # bandwidth of the all-reduce among the GPUs of a node
    between: float  # bandwidth of each GPU's share of the network between nodes
    latency: float  # s per hop
    storage: float  # bandwidth of the shared storage for checkpoints, all writers together


@dataclass(frozen=True)
class Job:
    """What is trained: per GPU and step ``packs`` packs of ``edges`` directed edges."""

    edges: int
    packs: int
    parameters: int
    gradient: int  # bytes of a parameter's gradient, on the wire
    checkpoint_every: int  # steps


def step_seconds(gpus: int, machine: Machine, job: Job) -> dict[str, float]:
    """The terms of one step, s. Nothing overlaps, as in the engine today (except for reading).

    A two-level ring: each GPU sends and receives 2 (n − 1)/n of the gradient in its node, and of its 1/n-th between
    nodes (Thakur, Rabenseifner and Gropp 2005), with a hop of latency for each partner.
    """
    inside, nodes = min(gpus, PER_NODE), math.ceil(gpus / PER_NODE)
    size = float(job.parameters * job.gradient)

    def ring(n: int, size: float, bandwidth: float) -> float:
        return 2.0 * (n - 1) / n * size / bandwidth

    hops = 2.0 * (inside - 1) + 2.0 * math.ceil(math.log2(nodes) if nodes > 1 else 0)
    return {
        "compute": job.packs * job.edges / machine.rate,
        "all-reduce": ring(inside, size, machine.inside) + ring(nodes, size / inside, machine.between),
        "latency": 2.0 * hops * machine.latency,  # of the gradient's all-reduce, and of the guard's
        "checkpoint": job.parameters * SAVED / machine.storage / job.checkpoint_every,
    }


def add_arguments(parser: ArgumentParser) -> None:
    """See ``cdssl_dist.bench``."""
    add_repeat(parser, default=1)
    parser.add_argument("--data", help="data set; if omitted, shared data or aflow: is sharded")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model: 64/32 × 3 blocks, 256 × 6")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="numbers of ranks to compare with one")
    parser.add_argument("--steps", type=int, default=40, help="steps that are timed")
    parser.add_argument("--packs", type=int, default=4, help="packs per step; in the model, per GPU")
    parser.add_argument("--rate", type=float, default=1e8, help="model: directed edges/s of a GPU")
    parser.add_argument("--inside", type=float, default=2e11, help="model: B/s among the GPUs of a node")
    parser.add_argument("--between", type=float, default=2.5e10, help="model: B/s of a GPU's share between nodes")
    parser.add_argument("--latency", type=float, default=1e-5, help="model: s of a hop")
    parser.add_argument("--storage", type=float, default=2e9, help="model: B/s of shared storage")


def measure(args: Namespace) -> Figures:
    """All figures."""
    if wrong := [ranks for ranks in args.ranks if args.packs % ranks]:
        raise BenchError(f"--packs {args.packs} is not a multiple of {wrong[0]} ranks, whose work would be unequal")
    with data_folder(args.data) as folder:
        with DataSet(folder) as data:
            table = data.table("train")
            shape, plan = data.shape("train", 1), EpochPlan(table, 0, 1, args.packs)
            steps = range(min(plan.steps_before(1), 200))
            filled = [[sum(int(table.edges[e.index]) for e in pack) for pack in plan.step(s)] for s in steps]
        measured = {str(ranks): _measured(folder, ranks, args) for ranks in args.ranks}
    room = 2 * shape.half_edges
    parameters = sum(p.numel() for p in fresh(args.size).parameters())
    machine = Machine(args.rate, args.inside, args.between, args.latency, args.storage)
    fill = statistics.mean(sum(packs) for packs in filled) / (room * args.packs)
    job = Job(room, args.packs, parameters, gradient=4, checkpoint_every=500)
    return {
        "model": args.size,
        "parameters": parameters,
        "gradient, bytes": parameters * job.gradient,
        "checkpoint, bytes": parameters * SAVED,
        "edges of a pack": room,
        "fill": fill,
        # Packs have one shape, so ranks do equal work; this is how unequal it would be if only real edges counted.
        "fullest pack over mean": statistics.mean(max(packs) / statistics.mean(packs) for packs in filled),
        "measured": measured,
        "modelled": {str(n): step_seconds(n, machine, job) for n in GPUS},
        "told": vars(machine),
    }


def lost(whole: float, part: float, beside: float, together: float, ranks: int) -> dict[str, float]:
    """How much of the time of several ranks is lost, and to what.

    Args:
        whole: s per step of one rank with all packs.
        part: s per step of one rank with a rank's share of the packs, alone on the machine.
        beside: the same, while ``ranks`` independent processes do so at the same time.
        together: s per step of all ranks training together.
        ranks: number of ranks.

    Returns:
        Shares of ``together``, which add up to 1: the efficiency; the fixed cost of a step, which is not divided among
        ranks; the slowdown of processes that share a machine; and reducing and waiting.
    """
    return {
        "efficiency": whole / ranks / together,
        "not divided": (part - whole / ranks) / together,
        "one machine": (beside - part) / together,
        "reducing and waiting": (together - beside) / together,
    }


def _measured(folder: str, ranks: int, args: Namespace) -> Figures:
    """The time of a step on one rank and on ``ranks``, and where the difference goes."""
    share = args.packs // ranks
    whole, part = _step(folder, [1], args.packs, args), _step(folder, [1], share, args)
    beside, together = _step(folder, [1] * ranks, share, args), _step(folder, [ranks], args.packs, args)
    return {
        name: {"one rank": whole[name], "together": together[name]}
        | lost(whole[name], part[name], beside[name], together[name], ranks)
        for name in whole
    }


def _step(folder: str, groups: Sequence[int], packs: int, args: Namespace) -> dict[str, float]:
    """Wall and CPU seconds of a rank's step, while groups of these numbers of ranks train at the same time."""
    found = [_once(folder, groups, packs, args) for _ in range(args.repeat)]
    return {name: statistics.median(once[name] for once in found) for name in found[0]}


def _once(folder: str, groups: Sequence[int], packs: int, args: Namespace) -> dict[str, float]:
    with contextlib.ExitStack() as stack:
        found = []
        for ranks in groups:
            run = stack.enter_context(tempfile.TemporaryDirectory(prefix="cdssl-bench-"))
            command = [sys.executable, "-c", RANK, _config(run, folder, packs, args).model_dump_json()]
            environment = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
            environment |= {"MASTER_PORT": str(free_port())}
            found += [
                subprocess.Popen(
                    command,
                    env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for r in range(ranks)
            ]
        answers = [process.communicate() for process in found]
    for process, (_, said) in zip(found, answers, strict=True):
        if process.returncode:
            raise failed(f"one of {len(found)} ranks", process.returncode, said)
    each = [json.loads(out.splitlines()[-1]) for out, _ in answers]
    return {name: statistics.mean(rank[name] for rank in each) for name in each[0]}


def _config(run: str, folder: str, packs: int, args: Namespace) -> Config:
    steps = WARM + args.steps
    return parse(
        {
            "run": run,
            "data": {"path": folder, "packs_per_step": packs, "val_packs": 1},
            "model": SIZES[args.size],
            "graph": {"centers": CENTERS},
            "schedule": {"steps": steps, "warmup": 0},
            "checkpoint": {"every": steps},
            "tracking": {"every": steps, "validate_every": steps, "baseline_packs": 1},
            "engine": {"device": "cpu"},
        }
    )


def rank(content: str) -> None:
    """Train as one rank, and print the median wall and CPU time of its steps."""
    from cdssl_dist.train.loop import train

    at: list[tuple[float, float]] = []

    def asked() -> bool:  # once a step, after its backward pass
        at.append((time.perf_counter(), time.process_time()))
        return False

    train(Config.model_validate_json(content), stop_requested=asked, echo=False)
    gaps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(at[WARM:], at[WARM + 1 :], strict=False)]
    clock, cpu = (statistics.median(values) for values in zip(*gaps, strict=True))
    print(json.dumps({"clock": clock, "cpu": cpu}))


def table(figures: Figures) -> str:
    """The figures for people."""
    lines = [
        f"{figures['model']}: {figures['parameters']:,} parameters, {figures['gradient, bytes'] / 1e6:.2f} MB reduced "
        f"a step, {figures['checkpoint, bytes'] / 1e6:.2f} MB a checkpoint; packs of "
        f"{figures['edges of a pack']:,} directed edges, {figures['fill']:.1%} filled",
        "",
        "ranks        one rank, s  together, s  efficiency  lost: not divided  one machine  reducing and waiting",
    ]
    for ranks, by in figures["measured"].items():
        for name, m in by.items():
            shares = [m[what] for what in ("efficiency", "not divided", "one machine", "reducing and waiting")]
            widths = (11, 18, 12, 21)
            text = "".join(f"{value:{width}.1%}" for value, width in zip(shares, widths, strict=True))
            lines.append(f"{ranks:>5}  {name:5} {m['one rank']:11.3f} {m['together']:12.3f} {text}")
    lines += ["", f"modelled, not measured, for {figures['told']}: ms of a step"]
    lines.append(" GPUs  " + "  ".join(f"{name:>10}" for name in _terms(figures)) + "  efficiency")
    for gpus, terms in figures["modelled"].items():
        values = "  ".join(f"{1e3 * v:10.3f}" for v in terms.values())
        lines.append(f"{gpus:>5}  {values}  {terms['compute'] / sum(terms.values()):10.1%}")
    return "\n".join(lines)


def _terms(figures: Figures) -> list[str]:
    return list(next(iter(figures["modelled"].values())))
