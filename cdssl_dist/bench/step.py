"""``cdssl bench step``: one training step (forward, backward, AdamW) on packs of real crystals, and of alternatives.

On CPU, rates are per second of CPU time, so that a busy machine matters less; on a GPU, of wall time, synchronised with
the device. With ``--data``, it needs only torch, numpy, pyarrow, safetensors and xxhash. On CPU, each step begins with
collating the arrays of decoded blocks, as matgl's begins with its graphs; on a GPU, packs wait in pinned memory.
"""

from __future__ import annotations

import contextlib
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cdssl_dist.bench.common import BenchError, Figures, add_repeat, data_folder, in_turns
from cdssl_dist.bench.concatenating import concatenating
from cdssl_dist.bench.matgl_process import Matgl
from cdssl_dist.data.batch import PackShape, RawPack, collate, widen
from cdssl_dist.data.dataset import DataSet
from cdssl_dist.data.plan import EpochPlan
from cdssl_dist.model.compiled import CompiledDenoising, compile_model
from cdssl_dist.model.edges import GaussianExpansion
from cdssl_dist.model.megnet import PretextModel
from cdssl_dist.model.pretext import Denoising
from sharding.block import decode, decode_arrays, encode
from sharding.graph import Multigraphs, concatenate

SIZES: Final = {
    "small": {"width": 32, "hidden": 64, "blocks": 3},
    "wide": {"width": 256, "hidden": 256, "blocks": 6},
}
CENTERS: Final = 100
DTYPES: Final = {"f32": torch.float32, "bf16": torch.bfloat16}
PACKS: Final = 4


class Engine(Protocol):
    """What a step needs of an engine; ``cdssl_dist.train.engine.Engine`` has it too."""

    @property
    def module(self) -> nn.Module:
        """The model, to be called."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Backward pass and update."""
        ...


class Plain:
    """AdamW without DeepSpeed: weights in the precision of the step, master weights and moments in f32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.module = model.to(dtype)
        self.weights: list[Tensor] = list(model.parameters())
        self.masters = [p.detach().float() if dtype != torch.float32 else p for p in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, fused=True)

    def backward(self, loss: Tensor) -> None:
        """See ``Engine``."""
        torch.autograd.backward(loss)
        if self.masters[0] is not self.weights[0]:
            for master, weight in zip(self.masters, self.weights, strict=True):
                assert weight.grad is not None
                master.grad = weight.grad.float()
        self.optimizer.step()
        with torch.no_grad():
            if self.masters[0] is not self.weights[0]:
                torch._foreach_copy_(self.weights, self.masters)
        for weight in self.weights:
            weight.grad = None


def plain(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Engine:
    """An engine of torch alone."""
    return Plain(model.to(device), dtype)


ENGINES: Final[dict[str, Callable[[nn.Module, torch.dtype, torch.device], Engine]]] = {"plain": plain}


@dataclass(frozen=True)
class Packs:
    """Packs that steps cycle through: crystals of the training split, in packs of one shape."""

    graphs: list[Multigraphs]
    arrays: list[dict[str, Any]]
    shape: PackShape
    edges: list[int]  # directed, no padding

    def raw(self, i: int) -> RawPack:
        """Pack i, collated now."""
        return collate([self.arrays[i]], [(i, 0)], self.shape, self.arrays[i]["edge_src"].dtype)


def add_arguments(parser: ArgumentParser) -> None:
    """See ``cdssl_dist.bench``."""
    add_repeat(parser)
    parser.add_argument("--data", help="data set; if omitted, shared data or aflow: is sharded")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model: 64/32 × 3 blocks, 256 × 6")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="precision of the weights")
    parser.add_argument("--engine", choices=ENGINES, default="plain", help="what updates the weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--edges", type=int, help="directed edges of a pack; by default 32,768, or 1,048,576 on a GPU")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads used by torch")
    parser.add_argument("--eager", action="store_true", help="skip torch.compile, which takes minutes")


def measure(args: Namespace) -> Figures:
    """All figures; rates are medians, directed edges (no padding) per second."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    with data_folder(args.data) as folder, DataSet(folder) as data:
        packs = packs_of(data, args.edges or (2**20 if device.type == "cuda" else 2**15))
        end = data.manifest.cutoff + 1.0
    beside = device.type == "cpu" and Matgl.available()
    expansion = GaussianExpansion(CENTERS, end, 0.5)
    steps: dict[str, Step] = {}
    for dtype in args.dtype:
        for name, change in CONTESTANTS.items():
            if (beside and name.startswith("concatenating")) or (args.eager and name.endswith("compiled")):
                continue
            model = change(fresh(args.size))
            engine = ENGINES[args.engine](model, DTYPES[dtype], device)
            kind = CompiledDenoising if name.endswith("compiled") else Denoising
            steps[f"{name}, {dtype}"] = Step(engine, kind(expansion, (0.3, 0.3), 0), packs, device)
        if device.type == "cuda" and args.size == "small":
            # Triton comes with torch for CUDA.
            from cdssl_dist.model.kernels.model import FusedDenoising, FusedPretextModel

            torch.manual_seed(0)
            fused = FusedPretextModel(expansion=expansion, **SIZES[args.size])
            engine = ENGINES[args.engine](fused, DTYPES[dtype], device)
            steps[f"ours, kernels, {dtype}"] = Step(engine, FusedDenoising(expansion, (0.3, 0.3), 0), packs, device)
    with contextlib.ExitStack() as stack:
        measures: dict[str, Callable[[], float]] = {name: step.per_edge for name, step in steps.items()}
        if beside:
            matgl = stack.enter_context(Matgl(packs.graphs, SIZES[args.size], args.threads))
            measures["matgl, f32"] = matgl.per_edge
        seconds = in_turns(args.repeat, measures)
    return {
        "data": {
            "packs": len(packs.edges),
            "edges of a pack": packs.shape.half_edges * 2,
            "padding": 1 - float(np.mean(packs.edges)) / (2 * packs.shape.half_edges),
        },
        "model": args.size,
        "engine": args.engine,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "us per edge": {name: 1e6 * value for name, value in seconds.items()},
        "edges/s": {name: 1 / value for name, value in seconds.items()},
        "first step, s": {name: step.first for name, step in steps.items()},
        "peak MiB": {name: step.peak for name, step in steps.items() if step.peak},
    }


def fresh(size: str) -> PretextModel:
    """A model with the same initial weights each time."""
    torch.manual_seed(0)
    return PretextModel(edge_features=CENTERS, **SIZES[size])


CONTESTANTS: Final[dict[str, Callable[[PretextModel], PretextModel]]] = {
    "concatenating, eager": concatenating,
    "ours, eager": lambda model: model,
    "concatenating, compiled": lambda model: compile_model(concatenating(model)),
    "ours, compiled": compile_model,
}


def packs_of(data: DataSet, edges: int) -> Packs:
    """The first crystals of an epoch, in packs of one shape with at most this many directed edges."""
    plan = EpochPlan(data.table("train"), 0, 1, 1)
    order = plan.order(0)
    crystals = _crystals(data, [int(plan.table.block[i]) for i in order])
    graphs = [found for _, found in zip(range(PACKS), _filled(crystals, edges), strict=False)]
    arrays = [decode_arrays(encode(g, np.uint16)) for g in graphs]
    shape = PackShape(
        max(len(g) for g in graphs) + 1,
        max(len(g.atomic_numbers) for g in graphs) + 1,
        max(len(g.edge_src) for g in graphs),
    )
    return Packs(graphs, arrays, shape, [2 * len(g.edge_src) for g in graphs])


def _crystals(data: DataSet, blocks: Sequence[int]) -> Iterator[Multigraphs]:
    """Decoded blocks, over and over."""
    while True:
        for block in blocks:
            yield decode(data.read(block))


def _filled(blocks: Iterator[Multigraphs], edges: int) -> Iterator[Multigraphs]:
    """Packs of crystals from consecutive blocks, each with at most this many directed edges."""
    while True:
        parts: list[Multigraphs] = []
        left = edges // 2
        while left > 0:
            block = next(blocks)
            count = int(np.searchsorted(np.cumsum(block.n_edges.astype(np.int64)), left, side="right"))
            if count:
                parts.append(block.take(np.arange(count)))
                left -= int(parts[-1].n_edges.sum())
            if count < len(block):
                break
        if not parts:
            raise BenchError(f"--edges {edges} has no room for even one crystal; give more")
        yield concatenate(parts)


class Step:
    """One contestant: its engine and task, and its position in the packs."""

    def __init__(self, engine: Engine, task: Denoising, packs: Packs, device: torch.device) -> None:
        self.engine, self.task, self.packs, self.device = engine, task, packs, device
        self.ready = [packs.raw(i).pin() for i in range(len(packs.edges))] if device.type == "cuda" else []
        self.next = 0
        self.first = 0.0  # seconds by the clock of the first step, compilation included
        self.peak = 0.0  # MiB of the device

    def per_edge(self) -> float:
        """Seconds per directed edge: of CPU time over one pack, or by the clock over many."""
        begin = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            edges = sum(self.step() for _ in range(32 if self.first else 1))
            torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
            self.peak = torch.cuda.max_memory_allocated() / 2**20
        else:
            before = time.process_time()
            edges = self.step()
            seconds = time.process_time() - before
        self.first = self.first or time.perf_counter() - begin
        return seconds / edges

    def step(self) -> int:
        """Train on the next pack; returns its directed edges."""
        i = self.next % len(self.packs.edges)
        self.next += 1
        raw = self.ready[i] if self.ready else self.packs.raw(i)
        batch = widen(raw.to(self.device))
        squared, _ = self.task.loss(self.engine.module, batch)
        self.engine.backward(squared / self.packs.edges[i])
        return self.packs.edges[i]


def table(figures: Figures) -> str:
    """The figures for people."""
    about, each = figures["data"], figures["us per edge"]
    lines = [
        f"{figures['model']} on {figures['device']}, engine {figures['engine']}: {about['packs']} packs of "
        f"{about['edges of a pack']:,} directed edges, {about['padding']:.1%} of them padding"
    ]
    beside = "matgl" if "matgl, f32" in each else "concatenating"
    for name, value in each.items():
        other = each.get("matgl, f32") or each.get(f"concatenating, eager, {name.rpartition(', ')[2]}")
        ratio = f"  {other / value:5.2f} × {beside}" if other else ""
        first = f"  first step {figures['first step, s'][name]:.1f} s" if name in figures["first step, s"] else ""
        peak = f"  {figures['peak MiB'][name]:,.0f} MiB" if name in figures["peak MiB"] else ""
        lines.append(f"{name:30} {value:10.4g} µs/edge  {1 / value:10.4g} M edges/s{ratio}{first}{peak}")
    return "\n".join(lines)
