"""``cdssl bench gpu``: what only a GPU can show, in one report and a few minutes.

Whether the kernels are correct on the GPU (against f64), whether two runs agree bit for bit, and what a step costs with
each implementation; for each kernel, its bytes and FLOPs (from a formula), its time, and the share of the bound that it
reaches.
"""

from __future__ import annotations

import importlib.util
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from cdssl_dist.bench import step as bench_step
from cdssl_dist.bench.common import BenchError, Figures, add_repeat, data_folder
from cdssl_dist.data.batch import GraphBatch, widen
from cdssl_dist.data.dataset import DataSet
from cdssl_dist.model.cost import matmul_flops
from cdssl_dist.model.edges import GaussianExpansion
from cdssl_dist.model.megnet import PretextModel
from cdssl_dist.model.pretext import Denoising

CHECKED_EDGES: Final = 65_536  # of the pack for checks, which must fit into memory in f64, too
PROFILED: Final = 10  # steps


def add_arguments(parser: ArgumentParser) -> None:
    """See ``cdssl_dist.bench``."""
    add_repeat(parser)
    parser.add_argument("--data", help="data set; if omitted, shared data or aflow: is sharded")
    parser.add_argument("--edges", type=int, default=2**20, help="directed edges of a timed pack")
    parser.add_argument("--eager", action="store_true", help="skip torch.compile, which takes minutes")


def measure(args: Namespace) -> Figures:
    """All figures.

    Raises:
        BenchError: where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise BenchError("no CUDA device is visible; the kernels are checked on CPU by tests/test_kernels.py")
    if importlib.util.find_spec("triton") is None:
        raise BenchError("this needs triton, which comes with torch for CUDA")
    device = torch.device("cuda")
    with data_folder(args.data) as folder, DataSet(folder) as data:
        end = data.manifest.cutoff + 1.0
        expansion = GaussianExpansion(bench_step.CENTERS, end, 0.5)
        checked = bench_step.packs_of(data, CHECKED_EDGES)
        batch = widen(checked.raw(0).to(device))
        figures: Figures = {
            "device": torch.cuda.get_device_name(),
            "checks": {name: check(batch, expansion, dtype) for name, dtype in bench_step.DTYPES.items()},
        }
        packs = bench_step.packs_of(data, args.edges)
        figures["bound"] = {"FLOP/s": matmul_flops(device, torch.bfloat16), "bytes/s": _bandwidth(device)}
        figures["kernels"] = _profiled(packs, expansion, figures["bound"], device)
        common = {"data": folder, "device": "cuda", "threads": 1, "repeat": args.repeat}
        figures["steps"] = {}
        for size, edges in (("small", args.edges), ("wide", args.edges // 4)):  # wide edges need nine times the memory
            given = Namespace(**common, size=size, edges=edges, dtype=["bf16"], engine="plain", eager=args.eager)
            try:
                figures["steps"][size] = bench_step.measure(given)
            except torch.OutOfMemoryError as why:
                figures["steps"][size] = {"error": f"{size}: {str(why).splitlines()[0]}; try --edges {args.edges // 2}"}
    return figures


def check(batch: GraphBatch, expansion: GaussianExpansion, dtype: torch.dtype) -> dict[str, float | bool]:
    """Compare loss and gradients in one dtype with a reference in f64, and check that two runs agree bit for bit.

    Returns:
        For the kernels and for plain torch in the same dtype, the relative errors of the loss and of all gradients
        (norm of the difference); and whether two runs of the kernels agree.
    """
    from cdssl_dist.model.kernels.model import FusedDenoising, FusedPretextModel  # needs Triton

    device = batch.positions.device
    torch.manual_seed(0)
    exact = PretextModel(edge_features=expansion.centers, **bench_step.SIZES["small"]).to(device)
    weights = {name: value.to(dtype) for name, value in exact.state_dict().items()}  # all start from the same numbers
    exact.load_state_dict(weights)
    plain = PretextModel(edge_features=expansion.centers, **bench_step.SIZES["small"]).to(device, dtype)
    plain.load_state_dict(weights)
    fused = FusedPretextModel(expansion=expansion, **bench_step.SIZES["small"]).to(device, dtype)
    fused.load_state_dict(weights)

    task, kernels = Denoising(expansion, (0.3, 0.3), 0), FusedDenoising(expansion, (0.3, 0.3), 0)
    loss, gradient = _gradient(_in_f64, exact.double(), task, batch)
    found = {
        name: _gradient(_loss, model, used, batch)
        for name, model, used in (("torch", plain, task), ("kernels", fused, kernels), ("again", fused, kernels))
    }
    figures: dict[str, float | bool] = {}
    for name in ("torch", "kernels"):
        figures[f"{name}: loss"] = abs(found[name][0] / loss - 1.0)
        figures[f"{name}: gradients"] = float((found[name][1] - gradient).norm() / gradient.norm())
    same = found["kernels"][0] == found["again"][0] and torch.equal(found["kernels"][1], found["again"][1])
    return figures | {"same bits again": same}


def _loss(model: nn.Module, task: Denoising, batch: GraphBatch) -> Tensor:
    squared, _ = task.loss(model, batch)
    return squared


def _in_f64(model: nn.Module, task: Denoising, batch: GraphBatch) -> Tensor:
    """The reference, by a formula of its own; distances and their expansions are in f32 for all."""
    noisy, clean = task.distances(batch)
    assert isinstance(model, PretextModel)
    guess = model.out(model.head(*model.encoder(task.expand(noisy).double(), batch), batch))
    error = (guess - task.expand(clean).double().index_select(0, batch.half)) * batch.scored[:, None]
    return error.square().sum()


def _gradient(
    loss: Callable[[nn.Module, Denoising, GraphBatch], Tensor], model: nn.Module, task: Denoising, batch: GraphBatch
) -> tuple[float, Tensor]:
    """Loss per scored edge, and its gradient for all weights, concatenated, in f64."""
    model.zero_grad()
    value = loss(model, task, batch) / batch.scored.sum().clamp(min=1)
    torch.autograd.backward(value)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return value.item(), torch.cat([part.flatten().double() for part in parts])


def by_hand(centers: int, width: int, hidden: int, blocks: int) -> dict[str, tuple[float, float]]:
    """Bytes and FLOPs of each kernel per directed edge, summed over its launches in a step, in bf16, from a formula.

    Gathered rows of atoms are counted as if read from memory each time. Backward passes recompute the forward pass.
    """
    m, w, h = centers, width, hidden
    dense, update = 2 * w * h, 2 * w * h + h * h
    inputs = m * h + h * w
    steps = blocks + 1  # the head has no dense layers, nor has the first block
    again = (blocks - 1) * dense
    layers = again + steps * update
    gathered = 2 * 2 * h + 8  # two rows of projections, two indices
    return {
        "_expand_forward": (4 + 2 * w, 2 * inputs),
        "_expand_backward": (4 + 2 * w, 3 * 2 * inputs),
        "_forward": (steps * (2 * w + gathered + 2 * w) + blocks * 2 * w, 2 * layers),
        "_backward": (steps * (3 * 2 * w + gathered + 2 * h) + blocks * 4 * w, 2 * (again + 3 * steps * update)),
        "_dense_backward": ((blocks - 1) * 4 * 2 * w, 3 * 2 * again),
        "_loss_forward": (2 * w + 5, 2 * w * m),
        "_loss_backward": (2 * w + 5 + 2 * w, 3 * 2 * w * m),
        "_sum": (blocks * 2 * w + steps * (2 * 2 * h + 4), 0.0),
    }


def _profiled(
    packs: bench_step.Packs, expansion: GaussianExpansion, bound: dict[str, float], device: torch.device
) -> list[dict[str, Any]]:
    """Time of each kernel in a step of the small model in bf16, the longest first."""
    from cdssl_dist.model.kernels.model import FusedDenoising, FusedPretextModel

    torch.manual_seed(0)
    fused = FusedPretextModel(expansion=expansion, **bench_step.SIZES["small"])
    engine = bench_step.plain(fused, torch.bfloat16, device)
    step = bench_step.Step(engine, FusedDenoising(expansion, (0.3, 0.3), 0), packs, device)
    step.per_edge()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        edges = sum(step.step() for _ in range(PROFILED))
        torch.cuda.synchronize()
    expected = by_hand(expansion.centers, **bench_step.SIZES["small"])
    rows = []
    for event in seen.key_averages():
        seconds = event.self_device_time_total / 1e6 / edges
        if not seconds:
            continue
        launches, picoseconds = event.count / PROFILED, 1e12 * seconds
        row: dict[str, Any] = {"kernel": event.key[:60], "launches": launches, "ps an edge": picoseconds}
        if event.key in expected:
            size, flops = expected[event.key]
            least = max(size / bound["bytes/s"], flops / bound["FLOP/s"])
            row |= {"bytes": size, "FLOPs": flops, "of the bound": least / seconds}
        rows.append(row)
    return sorted(rows, key=lambda row: -row["ps an edge"])


def _bandwidth(device: torch.device) -> float:
    """Bytes/s, read plus written, of a copy within the device's memory; the best of five."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        torch.cuda.synchronize(device)
        before = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - before)
    return 2 * source.numel() / best


def table(figures: Figures) -> str:
    """The figures for people."""
    lines = [f"{figures['device']}: {figures['bound']['FLOP/s'] / 1e12:.0f} TFLOP/s of a bf16 product"]
    lines[0] += f", {figures['bound']['bytes/s'] / 1e12:.2f} TB/s of a copy"
    for dtype, found in figures["checks"].items():
        shown = (f"{name} {value if isinstance(value, bool) else f'{value:.1e}'}" for name, value in found.items())
        lines.append(f"compared with f64, {dtype}: " + ", ".join(shown))
    for found in figures["steps"].values():
        lines += ["", found["error"] if "error" in found else bench_step.table(found)]
    lines += ["", f"{'kernel, small, bf16':60}  launches  ps/edge  bytes/edge  FLOPs/edge  of the bound"]
    for row in figures["kernels"][:20]:
        known = f"  {row['bytes']:10,.0f}  {row['FLOPs']:10,.0f}  {row['of the bound']:12.0%}" if "bytes" in row else ""
        lines.append(f"{row['kernel']:60}  {row['launches']:8.1f}  {row['ps an edge']:7.1f}{known}")
    return "\n".join(lines)
