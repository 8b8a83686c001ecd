"""The Triton kernels against the reference in torch, in Triton's interpreter where there is no GPU.

The interpreter does not support bf16, so weights narrower than sums are tested in f16. Needs ``triton``, which comes
with torch for CUDA; without it there is nothing to test.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed; it comes with torch for CUDA")
from test_model import EXPANSION, FEATURES, TASK, batch_of, room_for, scaled

from cdssl_dist.bench import gpu
from cdssl_dist.bench.kernels import SHARED
from cdssl_dist.data.batch import GraphBatch, PackShape, collate, widen
from cdssl_dist.model.cost import flops_per_edge
from cdssl_dist.model.edges import GaussianExpansion, distances
from cdssl_dist.model.kernels.ends import Loss
from cdssl_dist.model.kernels.model import FusedPretextModel
from cdssl_dist.model.kernels.segment import sum_rows
from cdssl_dist.model.loss import squared_error
from cdssl_dist.model.megnet import PretextModel
from sharding.crystal import Crystal

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = {"width": 16, "hidden": 32, "blocks": 2}


@pytest.fixture(scope="module")
def batch(aflow: list[Crystal]) -> GraphBatch:
    """One-atom cells and others, an odd number of edges, and padding."""
    one = [c for c in aflow if len(c.positions) == 1][:2]
    several = [c for c in aflow if 2 <= len(c.positions) <= 4][:3]
    tight = batch_of([*one, *several])
    return batch_of([*one, *several], room_for(tight, atoms=3, half_edges=17))


def inputs(batch: GraphBatch) -> tuple[Tensor, Tensor]:
    return distances(batch, TASK.displaced_positions(batch)), distances(batch, batch.positions)


def on_device(batch: GraphBatch) -> GraphBatch:
    return GraphBatch(*(getattr(batch, field.name).to(DEVICE) for field in fields(batch)))


def reference(dtype: torch.dtype = torch.float64, gain: float = 1.6) -> PretextModel:
    return scaled(PretextModel(edge_features=FEATURES, **SIZE), gain=gain).to(dtype)


def fused(dtype: torch.dtype = torch.float32, gain: float = 1.6) -> FusedPretextModel:
    model = FusedPretextModel(expansion=EXPANSION, **SIZE)
    model.load_state_dict(reference(torch.float32, gain).state_dict())
    return model.to(DEVICE, dtype)


def expected(batch: GraphBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients in f64."""
    displaced, clean = inputs(batch)
    model = reference()
    u = model.encoder(EXPANSION(displaced).double(), batch)
    guess = model.out(model.head(*u, batch))
    loss = squared_error(guess, EXPANSION(clean).double()[batch.half], batch.scored)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def found(model: FusedPretextModel, batch: GraphBatch) -> tuple[Tensor, dict[str, Tensor]]:
    noisy, clean = (d.to(DEVICE) for d in inputs(batch))
    loss = model(None, on_device(batch), (noisy, clean))
    (loss / batch.scored.sum().clamp(min=1)).backward()
    grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach().cpu(), grads


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-2)])
def test_loss_and_all_gradients_are_the_reference_s(batch: GraphBatch, dtype: torch.dtype, tolerance: float) -> None:
    loss, gradients = expected(batch)
    same, others = found(fused(dtype), batch)
    assert float(same) == pytest.approx(float(loss), rel=tolerance)
    assert others.keys() == gradients.keys()
    scale = float(batch.scored.sum())
    for name, gradient in gradients.items():
        error = (others[name].double() * scale - gradient).norm() / gradient.norm()
        assert error < tolerance, f"{name}: {error}"


def test_the_check_of_the_bench_is_right_and_sees_a_wrong_kernel(
    batch: GraphBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    expansion = GaussianExpansion(100, 6.0, 0.5)
    found = gpu.check(on_device(batch), expansion, torch.float32)
    assert found["same bits again"]
    assert all(value < 1e-5 for name, value in found.items() if name != "same bits again")
    monkeypatch.setattr(Loss, "forward", staticmethod(lambda ctx, *a, plain=Loss.forward: 1.01 * plain(ctx, *a)))
    found = gpu.check(on_device(batch), expansion, torch.float32)
    assert found["kernels: loss"] == pytest.approx(0.01, rel=1e-3) and found["torch: loss"] < 1e-5


def test_the_bench_counts_the_flops_of_the_kernels() -> None:
    """Backward passes compute all again: forward once, and three times its products behind it."""
    sizes = {"width": 32, "hidden": 64, "blocks": 3}
    forward, backward = (
        sum(flops for name, (_, flops) in gpu.by_hand(100, **sizes).items() if name.endswith(end))
        for end in ("forward", "backward")
    )
    assert backward == 3 * forward + 2 * (3 - 1) * 2 * 32 * 64  # what dense layers make, once for each of two kernels
    inputs = 100 * 64 + 64 * 32  # which the reference has once for each half edge, and the kernels for each edge
    assert 3 * (forward - inputs) == pytest.approx(flops_per_edge(100, **sizes), rel=0.12)  # that has nodes as well


def test_two_runs_give_the_same_bits(batch: GraphBatch) -> None:
    (a, first), (b, second) = found(fused(), batch), found(fused(), batch)
    assert torch.equal(a, b)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shape", [PackShape(3, 5, 7), PackShape(1, 1, 0)])
def test_a_pack_of_padding_has_neither_loss_nor_gradients(shape: PackShape) -> None:
    loss, gradients = found(fused(), widen(collate([], [], shape)))
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


def test_zero_distances_and_huge_values_are_finite(batch: GraphBatch) -> None:
    model = fused(gain=5.0)
    noisy, clean = inputs(batch)
    noisy = noisy.clone()
    noisy[::3], noisy[1::3] = 0.0, 1e4
    loss = model(None, on_device(batch), (noisy.to(DEVICE), clean.to(DEVICE)))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_sums_of_rows() -> None:
    """Segments without rows, with one, and with more than are added at once; in another order; none beyond stop."""
    counts = torch.tensor([0, 1, 70, 0, 32, 5])
    row_ptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int().to(DEVICE)
    torch.manual_seed(0)
    values, order = torch.randn(108, 12, device=DEVICE), torch.randperm(108).int().to(DEVICE)
    stop = torch.tensor(103, dtype=torch.int32, device=DEVICE)
    for given in (None, order):
        rows = values if given is None else values[given.long()]
        parts = rows[:103].double().split([0, 1, 70, 0, 32])
        wanted = torch.stack([part.sum(dim=0) for part in parts] + [torch.zeros_like(rows[0]).double()])
        torch.testing.assert_close(sum_rows(values, row_ptr, stop, given).double(), wanted, rtol=1e-5, atol=1e-5)


def test_sizes_that_the_kernels_do_not_take() -> None:
    with pytest.raises(ValueError, match=r"width of 16, 32, 64, 128, not 256.*engine.kernels=torch"):
        FusedPretextModel(expansion=EXPANSION, width=256)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--first"], id="first shapes"),
        pytest.param([], marks=pytest.mark.slow, id="all shapes"),
        pytest.param(["--width", "128", "--hidden", "128"], marks=pytest.mark.slow, id="largest"),
        pytest.param(["--width", "16", "--hidden", "16", "--dtype", "f32"], marks=pytest.mark.slow, id="smallest"),
    ],
)
def test_each_launch_of_a_step_compiles_for_a_device(options: list[str]) -> None:
    """The interpreter takes what the compiler refuses, and has all the shared memory and registers that there are."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "cdssl_dist.bench", "kernels", "--json", *options]
    found = json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    by_kernel: dict[str, list[float]] = {}
    for row in found["kernels"]:
        by_kernel.setdefault(f"{row['kernel']}, {row['of']}", []).append(row["shared"] / 1024)
    assert {name.split(",")[0] for name in by_kernel} == set(gpu.by_hand(100, 32, 64, 3))
    for name, shared in by_kernel.items():
        assert min(shared) <= SHARED[90], f"{name}: no shape fits"
