"""Symmetries of the model, what its parts compute, and the sums behind the metrics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from cdssl_dist.data.batch import GraphBatch, PackShape, collate, widen
from cdssl_dist.model.compiled import compile_model
from cdssl_dist.model.edges import GaussianExpansion, distances
from cdssl_dist.model.heads import READOUTS, PropertyModel, ReadoutName
from cdssl_dist.model.loss import BINS, SUMS, Baseline, baseline_sums, figures, fit_baseline, metrics_of, squared_error
from cdssl_dist.model.megnet import CompiledSoftplus, MEGNet, PretextModel, SplitLinear, pooled, segment_sum
from cdssl_dist.model.pretext import Denoising
from sharding.block import decode_arrays, encode
from sharding.crystal import Crystal
from sharding.graph import build

CUTOFF = 5.0137  # Å; no pair of the test crystals is this far apart, so that rounding moves no edge across it
FEATURES = 20
EXPANSION = GaussianExpansion(FEATURES, 6.0, 0.5)
TASK = Denoising(EXPANSION, (0.3, 0.3), seed=5)


def batch_of(crystals: list[Crystal], shape: PackShape | None = None) -> GraphBatch:
    graphs, refused = build(crystals, CUTOFF)
    assert refused == {}
    return widen(collate([decode_arrays(encode(graphs, np.uint16))], [(0, 0)], shape))


def room_for(batch: GraphBatch, graphs: int = 7, atoms: int = 50, half_edges: int = 333) -> PackShape:
    """A shape with much room for padding."""
    return PackShape(batch.n_graphs + graphs, batch.n_atoms + atoms, len(batch.receiver) // 2 + half_edges)


def scaled(model: nn.Module, seed: int = 0, gain: float = 1.6) -> nn.Module:
    """Weights large enough that every layer bends and every input shows: a fresh model is nearly constant."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and parameter.shape[0] > 1:
                parameter.normal_(0.0, gain / math.sqrt(parameter.shape[1]))
            else:
                parameter.normal_(0.0, 0.3)
    return model


@pytest.fixture(scope="module")
def model() -> PretextModel:
    return scaled(PretextModel(edge_features=FEATURES, width=16, hidden=24, blocks=3))


@pytest.fixture(scope="module")
def crystals(aflow: list[Crystal]) -> list[Crystal]:
    """Forty of them, of 1 to 20 atoms."""
    return [crystal for crystal in aflow if len(crystal.positions) <= 20][::5][:40]


@torch.no_grad()
def represented(model: PretextModel, crystals: list[Crystal], shape: PackShape | None = None) -> Tensor:
    """What is known of each crystal whatever the order of its atoms and edges: x̂, û, ŝ, ê and ê² pooled, (G, F)."""
    batch = batch_of(crystals, shape)
    features = EXPANSION(distances(batch, batch.positions))
    predicted = model(features, batch)
    moments = segment_sum(torch.cat([predicted, predicted**2], dim=1), batch.graph_of_edge, batch.n_graphs)
    moments = moments / batch.edges_of_graph.clamp(min=1)[:, None]
    return torch.cat([pooled(*model.encoder(features, batch), batch), moments], dim=1)[: len(crystals)]


def changed(crystal: Crystal, **changes: NDArray[np.float64]) -> Crystal:
    rest = {"lattice": crystal.lattice, "positions": crystal.positions, "atomic_numbers": crystal.atomic_numbers}
    return Crystal(crystal.key, **(rest | changes))


Change = Callable[[Crystal, np.random.Generator], Crystal]


def turned(c: Crystal, rng: np.random.Generator) -> Crystal:
    rotation = Rotation.random(random_state=int(rng.integers(1000))).as_matrix()
    return changed(c, lattice=c.lattice @ rotation, positions=c.positions @ rotation)


def reflected(c: Crystal, rng: np.random.Generator) -> Crystal:
    mirror = np.eye(3) - 2 * np.outer(n := (v := rng.normal(size=3)) / np.linalg.norm(v), n)
    return changed(c, lattice=c.lattice @ mirror, positions=c.positions @ mirror)


def translated(c: Crystal, rng: np.random.Generator) -> Crystal:
    return changed(c, positions=c.positions + rng.normal(size=3) * 10)


def reordered(c: Crystal, rng: np.random.Generator) -> Crystal:
    order = rng.permutation(len(c.positions))
    return changed(c, positions=c.positions[order], atomic_numbers=c.atomic_numbers[order])


def in_another_cell(c: Crystal, rng: np.random.Generator) -> Crystal:
    while True:
        matrix = rng.integers(-2, 3, (3, 3))
        if abs(round(np.linalg.det(matrix))) == 1:
            return changed(c, lattice=matrix @ c.lattice)


def doubled(c: Crystal, rng: np.random.Generator) -> Crystal:
    lattice, axis = c.lattice.copy(), int(rng.integers(3))
    lattice[axis] *= 2
    positions = np.concatenate([c.positions, c.positions + c.lattice[axis]])
    return changed(c, lattice=lattice, positions=positions, atomic_numbers=np.tile(c.atomic_numbers, 2))


def one_atom_displaced(c: Crystal, rng: np.random.Generator) -> Crystal:
    positions = c.positions.copy()
    positions[-1] += (direction := rng.normal(size=3)) / np.linalg.norm(direction) * 0.3
    return changed(c, positions=positions)


def another_element(c: Crystal, rng: np.random.Generator) -> Crystal:
    numbers = c.atomic_numbers.copy()
    numbers[-1] = 8 if numbers[-1] != 8 else 16
    return changed(c, atomic_numbers=numbers)


def stretched(c: Crystal, rng: np.random.Generator) -> Crystal:
    return changed(c, lattice=c.lattice * 1.01, positions=c.positions * 1.01)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Difference of the features of each crystal, in units of how much they differ between crystals: (G,)."""
    return ((a - b) / a.std(dim=0)).square().mean(dim=1).sqrt()


@pytest.mark.parametrize("change", [turned, reflected, translated, reordered, in_another_cell, doubled])
def test_the_same_crystal_written_otherwise(model: PretextModel, crystals: list[Crystal], change: Change) -> None:
    rng = np.random.default_rng(1)
    same = represented(model, [change(c, rng) for c in crystals])
    assert difference(represented(model, crystals), same).max() < 1e-4


@pytest.mark.parametrize("change", [one_atom_displaced, another_element, stretched])
def test_another_crystal(model: PretextModel, crystals: list[Crystal], change: Change) -> None:
    """The test above is not blind: another crystal gives another answer, by thirty times the bound on rounding."""
    rng = np.random.default_rng(1)
    several = [c for c in crystals if len(c.positions) > 1]
    other = represented(model, [change(c, rng) for c in several])
    assert difference(represented(model, several), other).min() > 3e-3


def test_batched_is_alone(model: PretextModel, crystals: list[Crystal]) -> None:
    together = represented(model, crystals)
    alone = torch.cat([represented(model, [c]) for c in crystals])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert difference(together, together.roll(1, dims=0)).min() > 0.1


def test_messages_come_from_neighbours_and_travel_one_edge_a_block(model: PretextModel) -> None:
    """A chain of atoms 3 Å apart, the last of which changes: who hears of it after each block."""
    positions = np.array([[3.0 * i, 0.0, 0.0] for i in range(8)])
    chain = Crystal("chain", np.diag([100.0, 6.0, 6.0]), positions, np.full(8, 6, np.uint8))
    ends = Crystal("end", chain.lattice, positions, np.array([6] * 7 + [8], np.uint8))
    encoder = model.encoder
    a, b = batch_of([chain]), batch_of([ends])
    for blocks in (1, 2, 3):
        xs = []
        for batch in (a, b):
            features = EXPANSION(distances(batch, batch.positions))
            x = encoder.input_x(encoder.element(batch.atomic_numbers))
            u = encoder.input_u(features)[batch.half]
            s = encoder.input_s(encoder.initial_state.expand(batch.n_graphs, -1))
            for block in encoder.blocks[:blocks]:
                x, u, _ = block(x, u, s, batch)  # the state, which reaches every atom at once, stays as it was
            xs.append(x)
        moved = (xs[0] - xs[1]).abs().amax(dim=1)[:8] > 1e-6
        assert moved.tolist() == [i >= 7 - blocks for i in range(8)]


# -- padding -----------------------------------------------------------------------------------------------------------


def test_padding_changes_no_output(model: PretextModel, crystals: list[Crystal]) -> None:
    tight = represented(model, crystals)
    padded = represented(model, crystals, room_for(batch_of(crystals)))
    torch.testing.assert_close(padded, tight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("readout", READOUTS)
def test_padding_changes_no_prediction_of_a_property(crystals: list[Crystal], readout: ReadoutName) -> None:
    model = scaled(PropertyModel(MEGNet(edge_features=FEATURES, width=8, hidden=12), EXPANSION, 2, readout))
    tight = model(batch_of(crystals))[: len(crystals)]
    padded = model(batch_of(crystals, room_for(batch_of(crystals))))[: len(crystals)]
    alone = torch.cat([model(batch_of([c]))[:1] for c in crystals])
    torch.testing.assert_close(padded, tight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone, tight, rtol=1e-4, atol=1e-4)
    assert tight.std(dim=0).min() > 0.1


def test_a_readout_of_atoms_is_the_mean_of_what_they_add(crystals: list[Crystal]) -> None:
    """By hand, atom by atom."""
    crystal = max(crystals, key=lambda c: len(c.positions))
    model = scaled(PropertyModel(MEGNet(edge_features=FEATURES, width=8, hidden=12), EXPANSION, 2, "atoms"))
    batch = batch_of([crystal])
    with torch.no_grad():
        x, u, s = model.encoder(EXPANSION(distances(batch, batch.positions)), batch)
        each = [
            model.readout.mlp(torch.cat([x[v], u[batch.receiver == v].mean(dim=0), s[0]])[None])[0]
            for v in range(len(crystal.positions))
        ]
        torch.testing.assert_close(model(batch)[0], torch.stack(each).mean(dim=0), rtol=1e-5, atol=1e-6)


def gradients(model: nn.Module, batch: GraphBatch) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss, _ = TASK.loss(model, batch)
    loss = loss / batch.scored.sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_padding_changes_neither_loss_nor_gradients(model: PretextModel, crystals: list[Crystal]) -> None:
    tight = batch_of(crystals)
    loss, grads = gradients(model, tight)
    padded_loss, padded_grads = gradients(model, batch_of(crystals, room_for(tight)))
    assert padded_loss == pytest.approx(loss, rel=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(padded_grads[name], grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max()), msg=name)


def test_a_pack_of_padding_has_neither_loss_nor_gradients(model: PretextModel) -> None:
    batch = widen(collate([], [], PackShape(3, 5, 7)))
    model.zero_grad()
    loss, _ = TASK.loss(model, batch)
    loss.backward()
    assert loss == 0
    assert not any(p.grad.any() for p in model.parameters())


def test_every_figure_ignores_padding(model: PretextModel, crystals: list[Crystal]) -> None:
    tight = batch_of(crystals)
    padded = batch_of(crystals, room_for(tight))
    baseline = fit_baseline(TASK.baseline_sums(tight), EXPANSION.end)
    torch.testing.assert_close(TASK.baseline_sums(padded), TASK.baseline_sums(tight))
    with torch.no_grad():
        torch.testing.assert_close(TASK.loss(model, padded, baseline)[1], TASK.loss(model, tight, baseline)[1])


# -- gradients and parts -----------------------------------------------------------------------------------------------


def fresh() -> PretextModel:
    """As a run begins."""
    torch.manual_seed(0)
    return PretextModel(edge_features=FEATURES, width=16, hidden=24, blocks=3)


@pytest.mark.parametrize("make", [fresh, lambda: scaled(fresh())], ids=["fresh", "scaled"])
def test_every_parameter_is_trained(crystals: list[Crystal], make: Callable[[], nn.Module]) -> None:
    _, grads = gradients(make(), batch_of(crystals))
    still = {name for name, grad in grads.items() if not grad.any()}
    assert still == set()
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    numbers = {int(z) for c in crystals if len(c.positions) > 1 for z in c.atomic_numbers}  # else nothing is scored
    rows = grads["encoder.element.weight"].any(dim=1)
    assert set(rows.nonzero()[:, 0].tolist()) == numbers  # elements that are not there, and padding, are not


def test_after_one_update_every_parameter_is_trained(crystals: list[Crystal]) -> None:
    model, batch = fresh(), batch_of(crystals)
    gradients(model, batch)
    torch.optim.AdamW(model.parameters()).step()
    _, grads = gradients(model, batch)
    assert all(grad.any() for grad in grads.values())


def test_training_learns_the_task(crystals: list[Crystal]) -> None:
    """One pack by heart: from worse than handing the noisy embedding back to a third better."""
    model, batch = fresh(), batch_of(crystals[:6])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    baseline = fit_baseline(TASK.baseline_sums(batch), EXPANSION.end)
    skills = []
    for _ in range(100):
        optimizer.zero_grad()
        loss, sums = TASK.loss(model, batch, baseline)
        skills.append(metrics_of(sums, FEATURES)["skill"])
        (loss / batch.scored.sum()).backward()
        optimizer.step()
    assert skills[0] < 0
    assert skills[-1] > 0.33


def test_a_split_layer_is_the_layer_on_the_concatenation() -> None:
    torch.manual_seed(0)
    split = scaled(SplitLinear(4, 16, 24), gain=20.0).double()
    inputs = [torch.randn(50, 16, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    direction = torch.randn(50, 24, dtype=torch.float64)
    variables = [*inputs, *split.parameters()]

    apart = sum(split(*inputs))
    joint = nn.functional.linear(torch.cat(inputs, dim=1), split.joint.weight, split.joint.bias)
    torch.testing.assert_close(apart, joint)
    assert joint.std() > 20
    for a, b in zip(
        torch.autograd.grad((apart * direction).sum(), variables),
        torch.autograd.grad((joint * direction).sum(), variables),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_an_edge_update_is_the_paper_s(model: PretextModel, crystals: list[Crystal]) -> None:
    """φ_e on [x_v; x_v'; u; s], edge by edge, with the concatenation written out."""
    batch = batch_of(crystals[:5])
    torch.manual_seed(1)
    x, u, s = (torch.randn(n, 16) for n in (batch.n_atoms, len(batch.receiver), batch.n_graphs))
    update = model.head
    out = update(x, u, s, batch)
    layers = [update.first.joint, *update.rest.layers]
    for e in range(0, len(u), 37):
        v, w = int(batch.receiver[e]), int(batch.sender[e])
        h = torch.cat([x[v], x[w], u[e], s[int(batch.graph_of_atom[v])]])
        for layer in layers:
            h = torch.log1p(torch.exp(layer.weight @ h + layer.bias)) - math.log(2)
        torch.testing.assert_close(out[e], h, rtol=1e-4, atol=1e-4)


def test_a_block_takes_means(model: PretextModel, crystals: list[Crystal]) -> None:
    """Node and state update of one block, written out with loops: û to nodes, û and x̂ to the state."""
    batch = batch_of(crystals[:6])
    block = model.encoder.blocks[1]
    torch.manual_seed(2)
    x, u, s = (torch.randn(n, 16) for n in (batch.n_atoms, len(batch.receiver), batch.n_graphs))
    x_out, u_out, s_out = block(x, u, s, batch)
    x1, s1, u2, x2 = block.dense_x(x), block.dense_s(s), u_out - u, x_out - x
    for g in range(6):
        atoms = [i for i in range(batch.n_atoms) if batch.graph_of_atom[i] == g]
        for i in atoms[:3]:
            mean = u2[batch.receiver == i].mean(dim=0)
            torch.testing.assert_close(x2[i], block.node(torch.cat([mean, x1[i], s1[g]])), rtol=1e-3, atol=1e-4)
        mean_u = torch.stack([u2[e] for e in range(len(u2)) if int(batch.receiver[e]) in atoms]).mean(dim=0)
        expected = block.state(torch.cat([mean_u, x2[atoms].mean(dim=0), s1[g]]))
        torch.testing.assert_close(s_out[g] - s[g], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segment_sum_is_a_loop_in_f32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values, index = torch.randn(5_000, 3).add(1.0).to(dtype), torch.randint(0, 4, (5_000,))
    expected = torch.zeros(6, 3, dtype=torch.float64)
    for row, segment in zip(values, index, strict=True):
        expected[segment] += row.double()
    found = segment_sum(values, index, 6)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)  # a sum in bf16 is off by a hundred


def test_recomputing_changes_nothing(crystals: list[Crystal]) -> None:
    batch = batch_of(crystals)
    size = {"edge_features": FEATURES, "width": 16, "hidden": 24, "blocks": 3}
    plain, frugal = (scaled(PretextModel(**size, recompute=recompute)) for recompute in (False, True))
    loss, grads = gradients(plain, batch)
    same_loss, same_grads = gradients(frugal, batch)
    assert same_loss == loss
    for name, grad in grads.items():
        torch.testing.assert_close(same_grads[name], grad, msg=name)


def test_the_softplus_of_compiled_code_is_the_function() -> None:
    x = torch.cat([torch.linspace(-30, 30, 20001), torch.tensor([-1e30, -100.0, 0.0, 100.0, 1e30])]).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, reference = CompiledSoftplus.apply(x), torch.nn.functional.softplus(exact) - math.log(2.0)
    torch.autograd.backward([y.sum(), reference.sum()])
    assert x.grad is not None and exact.grad is not None
    assert torch.isfinite(y).all() and float(y[20003].detach()) == pytest.approx(0.0, abs=1e-7)
    torch.testing.assert_close(y.double(), reference, atol=2.5e-7, rtol=1e-7)
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=2.5e-7, rtol=0.0)


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_parts_are_the_model(crystals: list[Crystal], recompute: bool) -> None:
    """Captured and differentiated as torch.compile does it; the code that inductor makes of it is in a slower test."""
    size = {"edge_features": FEATURES, "width": 16, "hidden": 24, "blocks": 3, "recompute": recompute}
    eager, fast = scaled(PretextModel(**size)), compile_model(scaled(PretextModel(**size)), backend="aot_eager")
    batch = batch_of(crystals)
    loss, grads = gradients(eager, batch)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    same_loss, same_grads = gradients(fast, batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4  # of five parts, two blocks are one code
    assert same_loss == pytest.approx(loss, rel=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(same_grads[name], grad, rtol=1e-4, atol=1e-6 * float(grad.abs().max()), msg=name)
    assert list(fast.state_dict()) == list(eager.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_compiled_gradients_are_those_of_the_reference(
    crystals: list[Crystal], dtype: torch.dtype, tolerance: float
) -> None:
    """What inductor makes of it, at the paper's sizes: code for others is other code, which may be right by chance."""
    size = {"edge_features": FEATURES, "width": 32, "hidden": 64, "blocks": 3}
    exact, fast = scaled(PretextModel(**size)), compile_model(scaled(PretextModel(**size))).to(dtype)
    batch = batch_of(crystals)
    torch._dynamo.reset()
    (_, wanted), (_, found) = gradients(exact, batch), gradients(fast, batch)
    for name, gradient in wanted.items():
        error = (found[name].double() - gradient.double()).norm() / gradient.double().norm()
        assert error < tolerance, f"{name}: {error}"  # where it is no number, too


def test_distances_are_those_of_the_crystal(crystals: list[Crystal]) -> None:
    """Of all pairs within the cutoff, in f64 from the crystal as it was read."""
    for crystal in crystals[:10]:
        batch = batch_of([crystal])
        axes = [np.arange(-8, 9)] * 3
        images = np.array(list(itertools.product(*axes))) @ crystal.lattice
        x = crystal.positions
        d = np.linalg.norm((x[:, None, None] + images - x[None, :, None]), axis=-1).ravel()
        expected = np.sort(d[(d > 1e-6) & (d < CUTOFF)])
        found = np.sort(distances(batch, batch.positions)[batch.half].double().numpy())
        np.testing.assert_allclose(found, expected, atol=5e-6)


def test_the_expansion_is_megnets() -> None:
    expansion = GaussianExpansion(100, 6.0, 0.5)
    d = torch.tensor([0.5, 3.1, 5.0])
    mu = np.linspace(0, 6, 100)
    expected = np.exp(-((d.numpy()[:, None] - mu) ** 2) / 0.5**2)
    np.testing.assert_allclose(expansion(d), expected, atol=1e-6)
    assert float(expansion(torch.tensor([6.0]))[0, -1]) == 1.0


def test_a_bf16_model_takes_and_gives_f32(crystals: list[Crystal]) -> None:
    batch = batch_of(crystals)
    model = fresh().bfloat16()
    exact = fresh()
    features = EXPANSION(distances(batch, TASK.displaced_positions(batch)))
    predicted = model(features, batch)
    assert predicted.dtype == torch.float32
    torch.testing.assert_close(predicted, exact(features, batch), atol=0.02, rtol=0.05)


# -- loss and figures --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guesses() -> dict[str, NDArray[np.float64]]:
    """200 edges, of which about a third are not scored; and wild values there, which must not show."""
    rng = np.random.default_rng(3)
    d = rng.uniform(2.0, 5.0, 200)
    noisy = np.abs(d + 0.4 * rng.normal(size=200))
    mu = np.linspace(0, 6, FEATURES)
    target, features = (np.exp(-(((x[:, None] - mu) / 0.5) ** 2)) for x in (d, noisy))
    scored = rng.random(200) < 0.66
    predicted = target + 0.1 * rng.normal(size=target.shape)
    predicted[~scored] = 1e6
    return {"predicted": predicted, "target": target, "features": features, "noisy": noisy, "scored": scored}


def tensors(arrays: dict[str, NDArray[np.float64]]) -> dict[str, Tensor]:
    return {n: torch.from_numpy(a) if a.dtype == bool else torch.from_numpy(a).float() for n, a in arrays.items()}


def test_loss_and_metrics_as_numpy_has_them(guesses: dict[str, NDArray[np.float64]]) -> None:
    t = tensors(guesses)
    baseline = fit_baseline(baseline_sums(t["target"], t["noisy"], t["scored"], 6.0), 6.0)
    found = metrics_of(figures(**t, baseline=baseline), FEATURES)

    kept = {name: values[guesses["scored"]] for name, values in guesses.items()}
    target = kept["target"]

    def mse(guess: NDArray[np.float64]) -> float:
        return float(((guess - target) ** 2).mean())

    bins = np.minimum((kept["noisy"] / 6.0 * BINS).astype(int), BINS - 1)
    best = np.stack([target[bins == b].mean(axis=0) for b in bins])
    expected = {
        "loss": mse(kept["predicted"]) * FEATURES,
        "mae": float(np.abs(kept["predicted"] - target).mean()),
        "r2": 1 - mse(kept["predicted"]) / mse(target.mean(axis=0)),
        "skill": 1 - mse(kept["predicted"]) / mse(kept["features"]),
        "skill_edge": 1 - mse(kept["predicted"]) / mse(best),
    }
    assert found == pytest.approx(expected, rel=1e-3)
    squared = squared_error(t["predicted"], t["target"], t["scored"])
    assert float(squared) == pytest.approx(((kept["predicted"] - target) ** 2).sum(), rel=1e-5)


def test_figures_add_up_over_packs(guesses: dict[str, NDArray[np.float64]]) -> None:
    t = tensors(guesses)
    baseline = fit_baseline(baseline_sums(t["target"], t["noisy"], t["scored"], 6.0), 6.0)
    parts = [{n: v[i::3] for n, v in t.items()} for i in range(3)]
    whole = figures(**t, baseline=baseline)
    torch.testing.assert_close(sum(figures(**part, baseline=baseline) for part in parts), whole, rtol=1e-5, atol=0)
    fitted = sum(baseline_sums(p["target"], p["noisy"], p["scored"], 6.0) for p in parts)
    torch.testing.assert_close(fit_baseline(fitted, 6.0).table, baseline.table)


@pytest.fixture(scope="module")
def fitted(crystals: list[Crystal]) -> tuple[dict[str, Tensor], Baseline]:
    """The pretext task on real crystals, and the baseline of its own edges."""
    batch = batch_of(crystals)
    noisy, clean = (d[batch.half] for d in TASK.distances(batch))
    target = EXPANSION(clean)
    task = {"target": target, "features": EXPANSION(noisy), "noisy": noisy, "scored": batch.scored}
    return task, fit_baseline(TASK.baseline_sums(batch), EXPANSION.end)


def test_references_score_zero_against_themselves(fitted: tuple[dict[str, Tensor], Baseline]) -> None:
    task, baseline = fitted

    def metrics(predicted: Tensor) -> dict[str, float]:
        return metrics_of(figures(predicted, **task, baseline=baseline), FEATURES)

    assert metrics(baseline.predict(task["noisy"]))["skill_edge"] == 0.0
    assert metrics(task["features"])["skill"] == 0.0
    assert metrics(baseline.mean.expand_as(task["target"]))["r2"] == 0.0
    perfect = metrics(task["target"])
    assert perfect == {"loss": 0.0, "mae": 0.0, "r2": 1.0, "skill": 1.0, "skill_edge": 1.0}


def test_no_function_of_the_distance_beats_the_baseline(fitted: tuple[dict[str, Tensor], Baseline]) -> None:
    task, baseline = fitted

    def skill_edge(predicted: Tensor) -> float:
        return metrics_of(figures(predicted, **task, baseline=baseline), FEATURES)["skill_edge"]

    d = task["noisy"]
    torch.manual_seed(0)
    for shrink in (0.5, 0.8, 0.9, 1.0, 1.1):
        assert skill_edge(EXPANSION(3.8 + shrink * (d - 3.8))) < 0  # towards the usual distance
    for size in (1e-3, 1e-2):
        table = baseline.table + size * torch.randn_like(baseline.table)
        assert skill_edge(Baseline(baseline.mean, table, baseline.end).predict(d)) < 0
    powers = torch.stack([(d / 6) ** n for n in range(9)], dim=1)[task["scored"]].double()
    fit = torch.linalg.lstsq(powers, task["target"][task["scored"]].double()).solution
    polynomial = (torch.stack([(d / 6) ** n for n in range(9)], dim=1).double() @ fit).float()
    assert -1 < skill_edge(polynomial) < 0
    assert skill_edge(task["features"]) < -0.05


class Echo(nn.Module):
    """Hands its input back."""

    def forward(self, edge_features: Tensor, batch: GraphBatch) -> Tensor:
        return edge_features[batch.half]


def test_the_answer_is_no_input(crystals: list[Crystal], model: PretextModel) -> None:
    """The model is handed the noisy distances; the clean positions in the batch are for the loss alone."""
    batch = batch_of(crystals)
    baseline = fit_baseline(TASK.baseline_sums(batch), EXPANSION.end)
    loss, sums = TASK.loss(Echo(), batch, baseline)
    metrics = metrics_of(sums, FEATURES)
    assert metrics["skill"] == 0.0
    assert metrics["skill_edge"] < 0.0
    scored = batch.half[batch.scored]
    noisy = EXPANSION(distances(batch, TASK.displaced_positions(batch)))[scored].double()
    clean = EXPANSION(distances(batch, batch.positions))[scored].double()
    assert float(loss) == pytest.approx(float((noisy - clean).square().sum()), rel=1e-5)

    nowhere = replace(batch, positions=batch.positions * math.nan, lattice=batch.lattice * math.nan)
    features = torch.rand(len(batch.src), FEATURES)
    torch.testing.assert_close(model(features, nowhere), model(features, batch))


def test_no_scored_edges_are_no_division_by_zero() -> None:
    metrics = metrics_of(torch.zeros(len(SUMS)), FEATURES)
    assert metrics["loss"] == metrics["mae"] == 0.0
    assert all(math.isnan(metrics[name]) for name in ("r2", "skill", "skill_edge"))
    empty = fit_baseline(torch.zeros(BINS, FEATURES + 1, dtype=torch.float64), 7.0)
    assert not empty.predict(torch.tensor([0.0, 3.0, 100.0])).any()
