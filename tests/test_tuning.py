"""Fine-tuning: what is learned, masked, scaled and frozen, when it stops, and which crystals are tested."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from encoders import write_encoder_to
from ray import cloudpickle
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression, RidgeCV
from torch._inductor.exc import InvalidCxxCompiler

from cdssl_dist.data.labeled import volume_per_atom
from cdssl_dist.finetune import tuning
from cdssl_dist.finetune.baselines import ALPHAS, baselines
from cdssl_dist.finetune.experiment import LINEAR, PRETRAINED, SCRATCH, compare, new_encoder, predict
from cdssl_dist.finetune.predictor import network_of
from cdssl_dist.finetune.splits import Split, folds_of_column, hold_out, k_folds, split_by_group, split_of_column
from cdssl_dist.finetune.targets import Scaler, Target, Task
from cdssl_dist.finetune.tuning import FineTuning, TuningError, fit, stages_of, stopping_error
from cdssl_dist.finetune.uncertainty import factor, measured
from cdssl_dist.model import compiled
from cdssl_dist.model.compiled import compile_encoder
from cdssl_dist.model.embedding import batch_of, embed_graphs
from cdssl_dist.model.export import EncoderCard, read_encoder
from cdssl_dist.model.megnet import MEGNet
from sharding.crystal import Crystal
from sharding.graph import Multigraphs, build

ONE = Task((Target("volume", "Å³/atom"),))
TWO = Task((Target("volume", "Å³/atom"), Target("atoms", "1")))
QUICK = FineTuning(epochs=8, lr=3e-3, batch_size=16, patience=8)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[MEGNet, EncoderCard]:
    return read_encoder(write_encoder_to(tmp_path_factory.mktemp("encoder")))


@pytest.fixture(scope="module")
def graphs(aflow: list[Crystal]) -> Multigraphs:
    found, _ = build([c for c in aflow if len(c.atomic_numbers) <= 8], 4.0)
    return found.slice(0, 100)


@pytest.fixture(scope="module")
def split(graphs: Multigraphs) -> Split:
    return split_by_group(graphs.keys, 0.6, 0.2, 0)


def test_it_learns_and_one_seed_gives_one_result(
    encoder: tuple[MEGNet, EncoderCard], graphs: Multigraphs, split: Split
) -> None:
    network, card = encoder
    y = volume_per_atom(graphs)[:, None]
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    how = replace(QUICK, epochs=20, patience=20, lr=1e-2)
    member = fit(network, card.expansion, graphs, y, split, ONE, how)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    short = [fit(network, card.expansion, graphs, y, split, ONE, replace(QUICK, epochs=2, seed=s)) for s in (0, 0, 1)]
    assert short[0].history == short[1].history != short[2].history
    learned = predict(member, card, graphs.take(split.train), ONE)
    error = np.abs(learned - y[split.train]).mean()
    assert error < 0.5 * np.abs(np.median(y[split.train]) - y[split.train]).mean()
    # What is kept are the weights of the best epoch, and its error is in the unit of the target.
    best = min(line["val"] for line in member.history)
    assert member.history[member.best]["val"] == best
    held = predict(member, card, graphs.take(split.val), ONE)
    assert np.abs(held - y[split.val]).mean() == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_is_the_training(
    encoder: tuple[MEGNet, EncoderCard],
    graphs: Multigraphs,
    split: Split,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
) -> None:
    """Batches differ in shape, and one code serves them all; stages that learn later are seen."""
    network, card = encoder
    y = volume_per_atom(graphs)[:, None]
    how = replace(QUICK, epochs=3, warmup=1, batch_size=8)
    eager = fit(network, card.expansion, graphs, y, split, ONE, how)
    monkeypatch.setattr(compiled, "compile_encoder", partial(compile_encoder, backend=backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fast = fit(network, card.expansion, graphs, y, split, ONE, replace(how, compile=True))
    # Two blocks are one code, so there are three parts; a part that does not learn yet is another code.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6
    for one, same in zip(eager.history, fast.history, strict=True):
        assert same == pytest.approx(one, rel=1e-3)
    assert list(fast.weights) == list(eager.weights)


def test_without_a_compiler_compiled_training_says_what_is_missing(
    encoder: tuple[MEGNet, EncoderCard], graphs: Multigraphs, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", absent)
    y = volume_per_atom(graphs)[:, None]
    with pytest.raises(TuningError, match=r"compile: .* C\+\+ compiler; install g\+\+"):
        fit(encoder[0], encoder[1].expansion, graphs, y, split, ONE, replace(QUICK, compile=True))


def test_missing_labels_are_as_if_they_were_not_there(
    encoder: tuple[MEGNet, EncoderCard], graphs: Multigraphs, split: Split
) -> None:
    """A crystal without any label changes nothing; the gradient of a target comes from its labels alone."""
    network, card = encoder
    y = np.stack([volume_per_atom(graphs), graphs.n_atoms.astype(float)], axis=1)
    y[split.train[::3]] = np.nan
    without = Split(np.setdiff1d(split.train, split.train[::3]), split.val, split.test)
    how = replace(QUICK, epochs=2)
    runs = [fit(network, card.expansion, graphs, y, s, TWO, how) for s in (split, without)]
    assert runs[0].history == runs[1].history

    model = network_of(card, 2)
    wanted = torch.from_numpy(np.where(np.arange(200).reshape(100, 2) % 3 == 0, np.nan, y)).float()
    wanted[np.isnan(y)] = torch.nan
    index = np.arange(12)
    loss = tuning._backward(model, graphs, index, wanted, TWO)
    with torch.inference_mode():
        alone = [model(batch_of(graphs.take(index[i : i + 1]), torch.device("cpu")))[0] for i in index]
    off = [abs(float(alone[i][t] - wanted[i, t])) for i in index for t in range(2) if torch.isfinite(wanted[i, t])]
    assert loss == pytest.approx(np.mean(off), rel=1e-5)


def test_large_batches_go_through_in_parts_with_the_same_gradient(
    encoder: tuple[MEGNet, EncoderCard], graphs: Multigraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = torch.from_numpy(volume_per_atom(graphs)[:, None]).float()
    found = []
    for limit in (10**9, 300):
        monkeypatch.setattr(tuning, "HALF_EDGES", limit)
        model = network_of(encoder[1], 1)
        torch.manual_seed(0)
        _ = [torch.nn.init.normal_(w, std=0.2) for w in model.parameters()]
        tuning._backward(model, graphs, np.arange(30), wanted, ONE)
        found.append(torch.cat([w.grad.flatten() for w in model.parameters()]))  # type: ignore[union-attr]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_what_is_frozen_stays_and_what_is_near_the_input_moves_less(
    encoder: tuple[MEGNet, EncoderCard], graphs: Multigraphs, split: Split
) -> None:
    network, card = encoder
    y = volume_per_atom(graphs)[:, None]

    def moved(how: FineTuning) -> list[float]:
        member = fit(network, card.expansion, graphs, y, Split(split.train, split.val[:0], split.test), ONE, how)
        after = network_of(card, 1)
        after.load_state_dict(member.weights)
        before = network_of(card, 1)
        before.encoder.load_state_dict(network.state_dict())
        pairs = zip(stages_of(before)[:-1], stages_of(after)[:-1], strict=True)
        return [max(float((a - b).detach().abs().max()) for a, b in zip(*p, strict=True)) for p in pairs]

    assert moved(replace(QUICK, epochs=1, freeze=3)) == [0, 0, 0]
    first, second, third = moved(replace(QUICK, epochs=1, freeze=1))
    assert first == 0 and second > 0 and third > 0
    assert moved(replace(QUICK, epochs=2, warmup=2)) == [0, 0, 0]
    assert min(moved(replace(QUICK, epochs=3, warmup=2))) > 0
    # One step of Adam moves a weight by about its rate.
    one = replace(QUICK, epochs=1, batch_size=1000, layer_decay=0.1, lr=1e-2)
    for stage, rate in zip(moved(one), (1e-5, 1e-4, 1e-3), strict=True):
        assert stage == pytest.approx(rate, rel=0.1)
    with pytest.raises(TuningError, match="3 stages"):
        moved(replace(QUICK, freeze=4))


def test_per_atom_targets_are_learned_as_such(graphs: Multigraphs) -> None:
    task = Task((Target("total", "eV", per_atom=True), Target("b")))
    total = 3.0 * graphs.n_atoms + np.arange(100) / 50
    y = np.stack([total, np.full(100, 7.0)], axis=1)
    scaler = Scaler.fit(task, y, graphs.n_atoms)
    learned = scaler.forward(y, graphs.n_atoms)
    per_atom = total / graphs.n_atoms
    np.testing.assert_allclose(learned[:, 0], (per_atom - per_atom.mean()) / per_atom.std())
    np.testing.assert_allclose(learned[:, 1], 0)  # constant, and not divided by 0
    np.testing.assert_allclose(scaler.back(learned, graphs.n_atoms), y)
    with pytest.raises(ValueError, match="label of b"):
        Scaler.fit(task, np.stack([total, np.full(100, np.nan)], axis=1), graphs.n_atoms)


def test_of_a_long_tail_the_logarithm_is_learned(
    encoder: tuple[MEGNet, EncoderCard], graphs: Multigraphs, split: Split
) -> None:
    tail = np.exp(np.random.default_rng(0).normal(size=100))
    total = tail * graphs.n_atoms
    task = Task((Target("tail", "1", log=True), Target("total", "eV", per_atom=True, log=True)))
    y = np.stack([tail, total], axis=1)
    scaler = Scaler.fit(task, y, graphs.n_atoms)
    learned = scaler.forward(y, graphs.n_atoms)
    for t in range(2):
        np.testing.assert_allclose(learned[:, t], (np.log(tail) - np.log(tail).mean()) / np.log(tail).std())
    np.testing.assert_allclose(scaler.back(learned, graphs.n_atoms), y)

    found = baselines(task, graphs, y, split)
    np.testing.assert_allclose(found["median"][:, 1], np.exp(np.median(np.log(tail[split.train]))) * graphs.n_atoms)
    assert (found["ridge on composition"] > 0).all()

    # Labels a thousand times as large: the same network, and answers a thousand times as large.
    one = Task((Target("tail", log=True),))
    answers = []
    for times in (1.0, 1000.0):
        member = fit(encoder[0], encoder[1].expansion, graphs, times * tail[:, None], split, one, QUICK)
        answers.append(predict(member, encoder[1], graphs, one))
    np.testing.assert_allclose(answers[1], 1000 * answers[0], rtol=1e-4)

    y[split.train[3], 0] = -2.0
    with pytest.raises(TuningError, match=r"1 of .* labels are not above 0 \(the smallest is -2\)"):
        fit(encoder[0], encoder[1].expansion, graphs, y, split, task, QUICK)


def test_what_is_not_finite_is_no_small_error() -> None:
    true = np.array([[1.0, 1.0], [2.0, np.nan]])
    errors = TWO.errors(true, np.array([[1.0, 1.5], [np.inf, np.inf]]))
    assert errors == {"volume": math.inf, "atoms": 0.5}
    assert TWO.errors(true, np.array([[1.0, 1.5], [np.nan, 3.0]]))["volume"] == math.inf
    scaler = Scaler(np.zeros(2), np.ones(2), TWO.targets)
    assert stopping_error(TWO, true, np.array([[1.0, 1.5], [np.inf, 1.0]]), scaler, np.ones(2)) == math.inf


def test_a_linear_readout_is_a_ridge_on_frozen_vectors(
    encoder: tuple[MEGNet, EncoderCard], graphs: Multigraphs, split: Split
) -> None:
    network, card = encoder
    task = Task((Target("volume", log=True), Target("atoms", per_atom=True)))
    y = np.stack([volume_per_atom(graphs), 3.0 * graphs.n_atoms + graphs.atomic_numbers[: len(graphs)]], axis=1)
    y[split.train[:4], 0] = np.nan
    how = replace(QUICK, readout="linear")
    member = fit(network, card.expansion, graphs, y, split, task, how)
    for name, weight in network.state_dict().items():
        assert torch.equal(member.weights[f"encoder.{name}"], weight)
    found = predict(member, card, graphs, task)

    x = embed_graphs(network, card.expansion, graphs).astype(np.float64)
    learned = np.stack([np.log(y[:, 0]), y[:, 1] / graphs.n_atoms], axis=1)
    train = np.concatenate([split.train, split.val])  # nothing is stopped early
    for t in range(2):
        known = train[np.isfinite(learned[train, t])]
        mean, std = x[train].mean(axis=0), x[train].std(axis=0)
        spread = learned[known, t].std()
        ridge = RidgeCV(alphas=np.logspace(-3, 5, 17)).fit((x[known] - mean) / std, learned[known, t] / spread)
        said = ridge.predict((x - mean) / std) * spread
        expected = np.exp(said) if t == 0 else said * graphs.n_atoms
        np.testing.assert_allclose(found[:, t], expected, rtol=1e-3)
    assert len(member.history) == 1

    outcome = compare(*encoder, graphs, y, task, [split], replace(QUICK, epochs=1))
    np.testing.assert_allclose(outcome.predictions[LINEAR][split.test], found[split.test])
    same = compare(*encoder, graphs, y, task, [split], how, scratch=replace(how, seed=5))
    np.testing.assert_allclose(same.predictions[PRETRAINED][split.test], found[split.test])
    assert LINEAR not in same.predictions
    assert not np.allclose(same.predictions[SCRATCH][split.test], found[split.test])


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_a_linear_readout_of_classes_is_a_logistic_regression(
    classes: int, encoder: tuple[MEGNet, EncoderCard], graphs: Multigraphs, split: Split
) -> None:
    network, card = encoder
    task = Task((Target("kind"),), tuple("abcd"[:classes]))
    kind = (graphs.atomic_numbers[: len(graphs)] % min(classes, 3)).astype(float)[
        :, None
    ]  # of four, one is never there
    member = fit(network, card.expansion, graphs, kind, split, task, replace(QUICK, readout="linear"))
    found = predict(member, card, graphs, task)
    x = embed_graphs(network, card.expansion, graphs).astype(np.float64)
    train = np.concatenate([split.train, split.val])
    x = (x - x[train].mean(axis=0)) / x[train].std(axis=0)
    model = LogisticRegression(C=0.1, max_iter=2000).fit(x[train], kind[train, 0])
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    if classes == 4:
        assert (found[:, 3] > 0).all() and found[:, 3].max() < 0.02
        found = found[:, :3] / found[:, :3].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, model.predict_proba(x), atol=2e-3)
    one = np.where(np.isin(np.arange(len(graphs)), train), 1.0, kind[:, 0])[:, None]
    alone = fit(network, card.expansion, graphs, one, split, task, replace(QUICK, readout="linear"))
    assert (predict(alone, card, graphs, task)[:, 1] > 0.9).all()


def test_a_class_that_no_training_crystal_has_is_not_impossible(graphs: Multigraphs, split: Split) -> None:
    task = Task((Target("kind"),), ("a", "b", "rare"))
    y = (np.arange(100) % 2).astype(float)[:, None]
    y[split.test[0]] = 2.0
    found = baselines(task, graphs, y, split)["logistic on composition"]
    np.testing.assert_allclose(found.sum(axis=1), 1.0)
    assert (found > 1e-6).all() and found.max() > 0.5
    assert task.errors(y[split.test], found[split.test])["log_loss"] < 5.0


def test_a_large_group_trains() -> None:
    rng = np.random.default_rng(0)
    groups = ["SiO2"] * 900 + [f"g{i}" for i in range(100)]
    for seed in range(50):
        train, val = hold_out(rng.permutation(1000), groups, 0.1, seed)
        assert len(train) >= 900 and 0 < len(val) <= 100
        split = split_by_group(groups, 0.8, 0.1, seed)
        assert len(split.train) >= 900 and min(len(split.val), len(split.test)) > 0
    half = ["a"] * 50 + ["b"] * 30 + ["c"] * 20  # all are larger than the share
    train, val = hold_out(np.arange(100), half, 0.1, 0)
    assert set(val) == set(range(80, 100)) and set(train) == set(range(80))


def test_it_stops_early(encoder: tuple[MEGNet, EncoderCard], graphs: Multigraphs, split: Split) -> None:
    noise = np.random.default_rng(0).normal(size=(100, 1))  # nothing to learn
    how = replace(QUICK, epochs=60, patience=3)
    member = fit(encoder[0], encoder[1].expansion, graphs, noise, split, ONE, how)
    assert len(member.history) == member.best + 4 < 60


def test_classes(encoder: tuple[MEGNet, EncoderCard], graphs: Multigraphs, split: Split) -> None:
    graph = np.repeat(np.arange(100), graphs.n_atoms)
    dense = (np.bincount(graph, graphs.atomic_numbers > 30) > 0).astype(float)[:, None]
    dense[split.train[:3]] = np.nan
    task = Task((Target("dense"),), ("no", "yes"))
    how = replace(QUICK, epochs=12, patience=12, lr=1e-2)
    outcome = compare(*encoder, graphs, dense, task, [split], how, members=2)
    chance = outcome.predictions[PRETRAINED][split.test]
    np.testing.assert_allclose(chance.sum(axis=1), 1)
    assert all(m.history[-1]["loss"] < 0.35 for m in outcome.members[PRETRAINED])  # ln 2 says nothing was learned
    right = dense[split.test, 0].astype(int)
    expected = -np.log(chance[np.arange(len(right)), right]).mean()
    assert outcome.errors[PRETRAINED]["log_loss"] == pytest.approx(expected)


def test_folds_members_and_baselines(encoder: tuple[MEGNet, EncoderCard], graphs: Multigraphs) -> None:
    y = np.stack([volume_per_atom(graphs), graphs.n_atoms.astype(float)], axis=1)
    y[::7, 1] = np.nan
    task = Task((TWO.targets[0], replace(TWO.targets[1], per_atom=True)))
    splits = k_folds([f"g{i // 2}" for i in range(100)], 3, 0.2, 0)
    tested = np.concatenate([s.test for s in splits])
    assert sorted(tested.tolist()) == list(range(100))
    how = replace(QUICK, epochs=1)
    outcome = compare(*encoder, graphs, y, task, splits, how, how, members=2)
    assert [len(outcome.members[arm]) for arm in (PRETRAINED, SCRATCH)] == [6, 6]
    assert not np.allclose(outcome.predictions[PRETRAINED], outcome.predictions[SCRATCH])  # one recipe, other weights
    first = splits[1]
    members = outcome.members[PRETRAINED][2:4]
    each = np.stack([predict(m, encoder[1], graphs.take(first.test), task) for m in members])
    np.testing.assert_allclose(outcome.predictions[PRETRAINED][first.test], each.mean(axis=0))
    np.testing.assert_allclose(outcome.deviations[PRETRAINED][first.test], each.std(axis=0))
    known = np.isfinite(y[:, 1])
    expected = np.abs(outcome.predictions["median"] - y)[known, 1].mean()
    assert outcome.errors["median"]["atoms"] == pytest.approx(expected)

    fractions = np.array([np.bincount(graphs.slice(i, i + 1).atomic_numbers, minlength=119) for i in range(100)])
    fractions = fractions / fractions.sum(axis=1, keepdims=True)
    ridge = RidgeCV(alphas=ALPHAS).fit(fractions[first.train], y[first.train, 0])
    found = baselines(task, graphs, y, first)["ridge on composition"]
    np.testing.assert_allclose(found[:, 0], ridge.predict(fractions))
    np.testing.assert_allclose(found[:, 1], graphs.n_atoms, rtol=1e-3)  # one atom an atom
    assert not torch.equal(new_encoder(encoder[1], 0).element.weight, new_encoder(encoder[1], 1).element.weight)


def test_trainings_elsewhere_are_the_same(encoder: tuple[MEGNet, EncoderCard], graphs: Multigraphs) -> None:
    """What a cluster would do: everything that a training needs is in one picklable call."""
    y = volume_per_atom(graphs)[:, None]
    splits, how, ticks = k_folds(graphs.keys, 2, 0.3, 0), replace(QUICK, epochs=2), []

    def backwards(function: Any, tasks: Iterable[Any]) -> Iterator[Any]:
        """In another order, by another process as it were."""
        done = {task: cloudpickle.loads(cloudpickle.dumps(function))(task) for task in reversed(list(tasks))}
        yield from (done[task] for task in sorted(done, key=lambda t: (t[0], t[1] == SCRATCH, t[2])))

    here = compare(*encoder, graphs, y, ONE, splits, how, how, members=2)
    there = compare(
        *encoder, graphs, y, ONE, splits, how, how, members=2, tick=lambda: ticks.append(1), elsewhere=backwards
    )
    assert len(ticks) == 2 * 2 * 2 * 2  # folds, arms, members, epochs
    for arm in (PRETRAINED, SCRATCH):
        np.testing.assert_array_equal(here.predictions[arm], there.predictions[arm])
        for a, b in zip(here.members[arm], there.members[arm], strict=True):
            assert a.history == b.history and all(torch.equal(a.weights[n], b.weights[n]) for n in a.weights)
    assert here.uncertainty == there.uncertainty


def test_the_uncertainty_is_scaled_on_some_crystals_and_checked_on_others() -> None:
    random = np.random.default_rng(0)
    std = random.uniform(0.5, 2.0, 4000)
    off = np.abs(random.normal(0.0, 3.0 * std))  # three times what the members say
    off[::7] = np.nan
    found = factor(off[:2000], std[:2000])
    assert found == pytest.approx(3 * 0.9945, rel=0.05)  # 68% of a normal distribution lie within 0.9945 deviations
    held = np.flatnonzero(np.isfinite(off[:2000]))
    assert (off[held] <= found * std[held]).mean() == pytest.approx(0.68, abs=2 / len(held))
    told = measured(off[2000:], std[2000:], np.full(2000, found), found)
    assert told.covered == pytest.approx(0.68, abs=0.03)  # crystals that were not asked
    assert told.uncalibrated == pytest.approx(0.26, abs=0.03)  # a third of a deviation
    known = np.isfinite(off[2000:])
    assert told.rank == pytest.approx(spearmanr(off[2000:][known], std[2000:][known]).statistic, abs=1e-9)
    assert np.isnan(factor(off[:9], std[:9]))  # too few to tell
    assert np.isnan(factor(off[:2000], np.full(2000, 1e-17)))  # members that agree where they are wrong
    assert factor(np.zeros(20), np.zeros(20)) == 0  # constant labels, which all members know


def test_an_ensemble_says_what_its_deviation_is_worth(encoder: tuple[MEGNet, EncoderCard], graphs: Multigraphs) -> None:
    y = volume_per_atom(graphs)[:, None]
    splits = k_folds(graphs.keys, 2, 0.4, 0)
    outcome = compare(*encoder, graphs, y, ONE, splits, replace(QUICK, epochs=2), members=2)
    ratios, covered = [], []
    for number, split in enumerate(splits):  # the same by hand
        members = outcome.members[PRETRAINED][2 * number : 2 * number + 2]
        each = np.stack([predict(m, encoder[1], graphs.take(split.val), ONE)[:, 0] for m in members])
        own = np.sort(np.abs(each.mean(axis=0) - y[split.val, 0]) / each.std(axis=0))
        own_factor = own[int(np.ceil(0.68 * (len(own) + 1))) - 1]
        off = np.abs(outcome.predictions[PRETRAINED] - y)[split.test]
        covered += (off <= own_factor * outcome.deviations[PRETRAINED][split.test]).tolist()
        ratios += own.tolist()
    found = outcome.uncertainty["volume"]
    assert found.factor == pytest.approx(np.sort(ratios)[int(np.ceil(0.68 * (len(ratios) + 1))) - 1])
    assert found.covered == pytest.approx(np.mean(covered))
    assert compare(*encoder, graphs, y, ONE, splits, replace(QUICK, epochs=1)).uncertainty == {}  # one network


def test_who_tests() -> None:
    groups = [f"g{i // 3}" for i in range(60)]
    for splits in (k_folds(groups, 5, 0.2, 0), [split_by_group(groups, 0.6, 0.2, 0)]):
        for split in splits:
            parts = [{groups[i] for i in part} for part in (split.train, split.val, split.test)]
            assert all(parts) and not (parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2])
    with pytest.raises(ValueError, match="between 2 and 20"):
        k_folds(groups, 21, 0.2, 0)
    with pytest.raises(ValueError, match="3 crystals in 3 groups split into"):
        split_by_group(["a", "b", "c"], 0.5, 0.1, 0)

    column = ["train"] * 30 + ["Valid"] * 6 + ["test"] * 12 + [None] * 6 + ["extra"] * 6
    split = split_of_column(column, groups, 0.2, 0)
    assert [p.tolist() for p in (split.train, split.val, split.test)] == [
        [*range(30)],
        [*range(30, 36)],
        [*range(36, 48)],
    ]
    other = split_of_column(column, groups, 0.2, 0, test="val")
    assert other.test.tolist() == [*range(30, 36)] and 0 < len(other.val) < 12
    assert sorted([*other.train, *other.val]) == [*range(30)]
    with pytest.raises(ValueError, match=r"extra: 6.*'train' and 'holdout' are needed"):
        split_of_column(column, groups, 0.2, 0, test="holdout")

    folds = folds_of_column([i % 4 if i < 50 else float("nan") for i in range(60)], groups, 0.2, 0)
    assert [f.test.tolist() for f in folds] == [[*range(k, 50, 4)] for k in range(4)]
    assert all(max(np.concatenate([f.train, f.val])) < 50 for f in folds)
    train, val = hold_out(np.array([4, 5, 9]), groups, 0.1, 0)  # two groups: none is given away
    assert len(train) == 3 and len(val) == 0


@pytest.mark.parametrize("n", [1, 3])
def test_hardly_any_labels(n: int, encoder: tuple[MEGNet, EncoderCard], graphs: Multigraphs) -> None:
    few = graphs.slice(0, n)
    split = Split(np.arange(n), np.arange(0), np.arange(n))
    outcome = compare(*encoder, few, np.full((n, 1), 5.0), ONE, [split], replace(QUICK, epochs=2))
    assert np.isfinite(outcome.errors[PRETRAINED]["volume"])
    assert outcome.errors["ridge on composition"]["volume"] == pytest.approx(0, abs=1e-9)


def test_trouble_is_said(encoder: tuple[MEGNet, EncoderCard], graphs: Multigraphs, split: Split) -> None:
    y = volume_per_atom(graphs)[:, None]
    with pytest.raises(TuningError, match="no training crystal"):
        fit(encoder[0], encoder[1].expansion, graphs, np.full((100, 1), np.nan), split, ONE, QUICK)
    with pytest.raises(TuningError, match="use a learning rate that is lower than"):
        fit(encoder[0], encoder[1].expansion, graphs, y, split, ONE, replace(QUICK, lr=1e30))
    with pytest.raises(TuningError, match="epochs must be above 0"):
        FineTuning(epochs=0)
