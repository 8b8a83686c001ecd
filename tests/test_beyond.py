"""Pretraining options beyond the paper: each computes what it claims to."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from launch import launch
from scipy.spatial.transform import Rotation
from test_model import EXPANSION, FEATURES, TASK, batch_of, changed, room_for, scaled
from test_train import config, metrics, run_training, weights
from torch import Tensor

from cdssl_dist.config import ConfigError, parse
from cdssl_dist.data.batch import GraphBatch
from cdssl_dist.model.beyond import BeyondDenoising, BeyondModel, CompiledBeyond, Options
from cdssl_dist.model.compiled import compile_model
from cdssl_dist.model.edges import gaussians
from cdssl_dist.model.export import read_encoder
from cdssl_dist.model.loss import fit_baseline, metrics_of
from cdssl_dist.model.megnet import PretextModel
from cdssl_dist.model.noise import masked, sigma_of, strain_of
from cdssl_dist.train.replay import replay
from sharding.crystal import Crystal

ALL = {"strain": 0.05, "sigma_in_state": True, "conditioned": True, "displacement": 0.5, "masked": 0.3}
SIZE = {"edge_features": FEATURES, "width": 16, "hidden": 24, "blocks": 2}
SIGMA = (0.1, 0.4)


@pytest.fixture(scope="module")
def crystals(aflow: list[Crystal]) -> list[Crystal]:
    """Twenty, of 1 to 20 atoms."""
    return [crystal for crystal in aflow if len(crystal.positions) <= 20][::10][:20]


def model_of(options: Options) -> BeyondModel:
    model = scaled(BeyondModel(options=options, **SIZE))
    assert isinstance(model, BeyondModel)
    return model


def task_of(options: Options) -> BeyondDenoising:
    return BeyondDenoising(EXPANSION, SIGMA, 5, options)


def gradients(model: BeyondModel, task: BeyondDenoising, batch: GraphBatch) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss, _ = task.loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def test_without_options_it_is_the_paper_s_task(crystals: list[Crystal]) -> None:
    plain = scaled(PretextModel(**SIZE))
    model = model_of(Options())
    model.load_state_dict(plain.state_dict())
    batch = batch_of(crystals)
    task = replace(TASK, sigma=SIGMA)
    assert torch.equal(task_of(Options()).loss(model, batch)[0], task.loss(plain, batch)[0])


def test_strains_are_alike_in_all_directions() -> None:
    counter = torch.stack([torch.arange(60_000), torch.full((60_000,), 3), torch.arange(60_000)], dim=1)
    strain = strain_of(counter, 0.05, seed=7).double()
    assert torch.equal(strain, strain.transpose(1, 2))
    rotation = torch.tensor(Rotation.random(random_state=1).as_matrix())
    for found in (strain, rotation @ strain @ rotation.T):
        spread = found.std(dim=0) / 0.05
        expected = torch.full((3, 3), math.sqrt(0.5), dtype=torch.float64).fill_diagonal_(1.0)
        torch.testing.assert_close(spread, expected, atol=0.01, rtol=0)
    assert torch.equal(strain_of(counter[777:778], 0.05, 7).double(), strain[777:778])  # of the counter alone


def test_a_strained_crystal_is_another_crystal(crystals: list[Crystal]) -> None:
    """Lengths are those of the crystal whose lattice and displaced atoms are strained by hand."""
    task = task_of(Options(strain=0.05))
    batch = batch_of(crystals)
    strain = np.eye(3) + strain_of(batch.graph_counter, 0.05, 5).double().numpy()
    displaced = task.displaced_positions(batch).double().numpy()
    of_atom, of_half = batch.graph_of_atom.numpy(), batch.graph_of_half.numpy()
    atoms = np.einsum("ni,nij->nj", displaced, strain[of_atom])
    lattice = np.einsum("gij,gjk->gik", batch.lattice.double().numpy(), strain)
    image = np.einsum("hi,hij->hj", batch.shift.double().numpy(), lattice[of_half])
    by_hand = np.linalg.norm(atoms[batch.dst.numpy()] + image - atoms[batch.src.numpy()], axis=1)
    found, clean = task.distances(batch)
    np.testing.assert_allclose(found.numpy(), by_hand, atol=1e-5)
    self_images = (batch.src == batch.dst).numpy()
    assert np.abs(by_hand - clean.numpy())[self_images].max() > 0.1  # which displacements alone leave as they are


def test_the_state_is_told_sigma_and_nothing_of_a_crystal_as_it_is(crystals: list[Crystal]) -> None:
    options = Options(sigma_in_state=True)
    model, batch = model_of(options), batch_of(crystals)
    features = EXPANSION(task_of(options).distances(batch)[0])
    none, some = (model(features, batch, None, torch.full((batch.n_graphs,), t)).edges for t in (0.0, 0.7))
    plain = PretextModel(**SIZE)
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(none, plain(features, batch))
    assert float((some - none).detach().abs().mean()) > 1e-3
    assert gradients(model, task_of(options), batch)[1]["of_sigma"].abs().min() > 0


def test_the_true_crystal_is_told_through_the_state_alone(crystals: list[Crystal]) -> None:
    options = Options(conditioned=True)
    model, task, batch = model_of(options), task_of(options), batch_of(crystals)
    noisy, clean = (EXPANSION(d) for d in task.distances(batch))
    sigma = torch.ones(batch.n_graphs)
    told = model(noisy, batch, clean, sigma).edges
    assert float((told - model(noisy, batch, noisy, sigma).edges).abs().mean()) > 1e-3
    with torch.no_grad():
        model.of_true.weight.zero_()
    torch.testing.assert_close(model(noisy, batch, clean, sigma).edges, model(noisy, batch, noisy, sigma).edges)


def test_what_pulls_an_atom_is_the_mean_along_its_edges(crystals: list[Crystal]) -> None:
    """By a loop over the edges, in f64, from the ends of each."""
    task, batch = task_of(Options(displacement=1.0)), batch_of(crystals)
    pulls = torch.randn(len(batch.receiver), generator=torch.Generator().manual_seed(0))
    found = task._pulled(pulls, batch)
    moved, lattice = task.displaced_positions(batch).double().numpy(), batch.lattice.double().numpy()
    expected = np.zeros((batch.n_atoms, 3))
    for e in range(len(pulls)):
        half, atom = int(batch.half[e]), int(batch.receiver[e])
        if not batch.scored[e]:
            continue
        src, dst = int(batch.src[half]), int(batch.dst[half])
        shift = batch.shift[half].double().numpy() @ lattice[int(batch.graph_of_half[half])]
        away = moved[dst] + shift - moved[src] if atom == src else moved[src] - shift - moved[dst]
        expected[atom] += float(pulls[e]) * away / np.linalg.norm(away)
    degree = np.bincount(batch.receiver.numpy(), minlength=batch.n_atoms)
    np.testing.assert_allclose(found.numpy(), expected / np.maximum(degree, 1)[:, None], atol=1e-5)


def test_the_loss_of_displacements_does_not_turn_with_the_crystal(crystals: list[Crystal]) -> None:
    """What pulls is a function of distances, and so the sum over the edges of an atom turns as the crystal does."""
    task = task_of(Options(displacement=1.0))
    rotation = Rotation.random(random_state=4).as_matrix()
    crystal = max(crystals, key=lambda c: len(c.positions))
    turned = changed(crystal, lattice=crystal.lattice @ rotation, positions=crystal.positions @ rotation)
    still = replace(task, sigma=(1e-9, 1e-9))
    pulled = [
        still._pulled(d, b) for b in map(batch_of, ([crystal], [turned])) for d in [EXPANSION(_of(still, b))[:, 3]]
    ]
    expected = pulled[0].double() @ torch.tensor(rotation)
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(pulled[1].double(), expected, atol=1e-5, rtol=1e-4)


def _of(task: BeyondDenoising, batch: GraphBatch) -> Tensor:
    return task.distances(batch)[0].index_select(0, batch.half)


def test_a_displacement_of_all_atoms_is_none(crystals: list[Crystal]) -> None:
    batch = batch_of(crystals)
    found = task_of(Options(displacement=1.0))._displacements(batch)
    for g in range(len(crystals)):
        torch.testing.assert_close(found[batch.graph_of_atom == g].sum(dim=0), torch.zeros(3), atol=1e-5, rtol=0)
    one_atom = batch.atoms_of_graph[batch.graph_of_atom] == 1
    assert one_atom.any() and not found[one_atom][:-1].any()


def test_hidden_elements_are_a_share_and_no_input(crystals: list[Crystal]) -> None:
    counter = torch.stack([torch.full((50_000,), 2), torch.arange(50_000) // 100, torch.arange(50_000) % 100], dim=1)
    assert float(masked(counter, 0.15, 5).double().mean()) == pytest.approx(0.15, abs=4 * math.sqrt(0.15 * 0.85 / 5e4))

    options = Options(masked=0.3)
    model, task, batch = model_of(options), task_of(options), batch_of(crystals)
    hides = masked(batch.noise_counter, 0.3, 5)
    seen: list[Tensor] = []
    model.encoder.element.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    _, found = gradients(model, task, batch)
    assert torch.equal(seen[0], torch.where(hides, 0, batch.atomic_numbers))
    hidden_only = set(batch.atomic_numbers[hides].tolist()) - set(batch.atomic_numbers[~hides].tolist())
    assert all(not found["encoder.element.weight"][z].any() for z in hidden_only)

    with torch.no_grad():  # the loss of elements is −log softmax at the true one, counted by scored edges
        sigma = torch.ones(batch.n_graphs)
        logits = model(
            EXPANSION(task.distances(batch)[0]), replace(batch, atomic_numbers=seen[0]), None, sigma
        ).elements
        p = torch.softmax(logits.double(), dim=1)
        edges = np.bincount(batch.receiver[batch.scored].numpy(), minlength=batch.n_atoms)
        by_hand = -sum(edges[i] * math.log(p[i, int(batch.atomic_numbers[i])]) for i in torch.nonzero(hides)[:, 0])
        predicted, loss, _ = task.recovered(model, EXPANSION(task.distances(batch)[0]), task.distances(batch)[1], batch)
        edges_loss = task.squared_error(predicted, task.distances(batch)[1], batch)
    assert float(loss - edges_loss) == pytest.approx(by_hand, rel=1e-4)


def test_what_options_recover_is_told(crystals: list[Crystal]) -> None:
    """By numpy, from positions and logits; over two packs."""
    options = Options(displacement=0.5, masked=0.3)
    model, task = model_of(options), task_of(options)
    errors, sums = np.zeros(4), torch.zeros(len(task.sums), dtype=torch.float64)
    for batch in (batch_of(crystals[:9]), batch_of(crystals[9:])):
        with torch.no_grad():
            baseline = fit_baseline(task.baseline_sums(batch), task.expansion.end)
            _, found = task.loss(model, batch, baseline)
            hides = masked(batch.noise_counter, 0.3, 5)
            seen = replace(batch, atomic_numbers=batch.atomic_numbers.masked_fill(hides, 0))
            given = model(EXPANSION(task.distances(batch)[0]), seen, None, torch.ones(batch.n_graphs))
            pulled = task._pulled(given.pulls, batch).double().numpy()
        assert found is not None
        sums += found
        of, scored = batch.graph_of_atom.numpy(), batch.scored
        edges = np.bincount(batch.receiver[scored].numpy(), minlength=batch.n_atoms)
        sigma = sigma_of(batch.graph_counter, *SIGMA, 5).double().numpy()
        moved = (task.displaced_positions(batch).double() - batch.positions.double()).numpy() / sigma[of, None]
        moved -= (np.stack([np.bincount(of, m) for m in moved.T]) / np.bincount(of)).T[of]
        errors[:2] += [(edges * (v**2).sum(axis=1)).sum() for v in (pulled - moved, moved)]
        right = given.elements.argmax(dim=1).numpy() == batch.atomic_numbers.numpy()
        errors[2:] += [(edges * hides.numpy() * right).sum(), (edges * hides.numpy()).sum()]
    metrics = task.metrics(sums)
    assert metrics["skill_displacement"] == pytest.approx(1 - errors[0] / errors[1], rel=1e-4)
    assert metrics["element_accuracy"] == pytest.approx(errors[2] / errors[3]) and errors[3] > 0
    assert metrics["loss"] == pytest.approx(metrics_of(sums[:6], task.expansion.centers)["loss"])
    alone = task_of(Options(masked=0.3)).metrics(torch.zeros(8)).keys()
    assert alone - task_of(Options()).metrics(torch.zeros(6)).keys() == {"element_accuracy"}


@pytest.mark.parametrize("options", [*({name: value} for name, value in ALL.items()), ALL])
def test_padding_changes_neither_loss_nor_gradients(options: dict[str, float], crystals: list[Crystal]) -> None:
    model, task = model_of(Options(**options)), task_of(Options(**options))
    tight = batch_of(crystals)
    loss, grads = gradients(model, task, tight)
    padded_loss, padded = gradients(model, task, batch_of(crystals, room_for(tight)))
    assert padded_loss == pytest.approx(loss, rel=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(padded[name], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()), msg=name)
    unused = {name for name, grad in grads.items() if not grad.any()}
    assert unused == set()  # each weight has its part in the loss


def test_compiled_is_eager(crystals: list[Crystal]) -> None:
    options = Options(**ALL)
    eager, fast = model_of(options), compile_model(model_of(options), backend="aot_eager")
    assert isinstance(fast, BeyondModel)
    batch = batch_of(crystals)
    loss, grads = gradients(eager, task_of(options), batch)
    compiled = CompiledBeyond(EXPANSION, SIGMA, 5, options)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as m:  # the fused passes over (E, M), without inductor's minutes
        m.setattr("cdssl_dist.model.compiled._expand", gaussians)
        m.setattr("cdssl_dist.model.compiled._squared_error", _error)
        same_loss, same = gradients(fast, compiled, batch)
    assert same_loss == pytest.approx(loss, rel=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(same[name], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()), msg=name)


def _error(predicted: Tensor, clean: Tensor, centers: Tensor, scored: Tensor) -> Tensor:
    return ((predicted - gaussians(clean, centers)) * scored[:, None]).square().sum()


@pytest.mark.parametrize("name", ["displacement", "masked"])
def test_what_is_asked_for_is_learned(name: str, crystals: list[Crystal]) -> None:
    """Beyond what can be said without looking: no displacement, and the frequencies of the elements."""
    torch.manual_seed(0)
    options = Options(**{name: ALL[name]})
    model, task = BeyondModel(options=options, **SIZE), task_of(options)
    batch = batch_of([c for c in crystals if len(c.positions) > 1])
    noisy, (_, clean) = EXPANSION(task.distances(batch)[0]), task.distances(batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def besides() -> Tensor:
        predicted, loss, _ = task.recovered(model, noisy, clean, batch)
        return loss - task.squared_error(predicted, clean, batch)

    edges = np.bincount(batch.receiver[batch.scored].numpy(), minlength=batch.n_atoms)
    if name == "displacement":
        error = task._displacements(batch).square().sum(dim=1).numpy()
        blind = options.displacement * float((edges * error).sum())
    else:
        hides = masked(batch.noise_counter, options.masked, 5).numpy()
        numbers = batch.atomic_numbers.numpy()[hides]
        _, where, counts = np.unique(numbers, return_inverse=True, return_counts=True)
        blind = float((edges[hides] * -np.log(counts / counts.sum())[where]).sum())
    for _ in range(80):
        optimizer.zero_grad()
        (besides() / batch.scored.sum()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(besides()) < 0.8 * blind


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_run_with_all_options_resumes_replays_and_leaves_a_plain_encoder(
    stage: int, data_folder: Path, tmp_path: Path
) -> None:
    content = config(tmp_path / "two", data_folder, pretext=ALL, noise={"sigma": list(SIGMA)}, engine={"stage": stage})
    assert launch(2, run_training, content, 3) == [False, False]
    assert launch(2, run_training, content) == [True, True]
    one = config(tmp_path / "one", data_folder, pretext=ALL, noise={"sigma": list(SIGMA)})
    assert launch(1, run_training, one) == [True]
    for name in ("train/loss", "val/loss", "guard/norm"):
        a, b = ([v for _, v in metrics(tmp_path / run, name)] for run in ("two", "one"))
        np.testing.assert_allclose(a, b, rtol=1e-4)
    encoder, card = read_encoder(tmp_path / "two")
    assert set(encoder.state_dict()) == set(weights(tmp_path / "one"))
    assert card.extra == {"pretext": ALL}

    (tmp_path / "one" / "config.yaml").write_text(yaml.safe_dump(one))
    found = replay(tmp_path / "one", 4)
    assert found.loss == pytest.approx(dict(metrics(tmp_path / "one", "train/loss"))[5], rel=1e-4)


def test_what_options_do_not_go_with() -> None:
    with pytest.raises(ConfigError, match=r"supports only the paper's task, but pretext\.strain is set"):
        parse({"pretext": {"strain": 0.1}, "engine": {"kernels": "triton"}})
    for wrong in ({"strain": 0.5}, {"masked": 1.0}, {"displacement": -1}):
        with pytest.raises(ConfigError, match=rf"pretext\.{next(iter(wrong))}"):
            parse({"pretext": wrong})
