"""The noise: Philox as published, normal, and a function of (seed, epoch, block, atom) alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from cdssl_dist.data.batch import GraphBatch, PackShape, widen
from cdssl_dist.data.dataset import DataSet
from cdssl_dist.data.plan import Entry
from cdssl_dist.model.edges import GaussianExpansion
from cdssl_dist.model.noise import gaussian, philox, sigma_of
from cdssl_dist.model.pretext import Denoising

TASK = Denoising(GaussianExpansion(8, 6.0, 0.5), (0.3, 0.3), seed=11)


def counters(epochs: int, blocks: int, atoms: int) -> Tensor:
    """All counters (epoch, block, atom) below these numbers."""
    return torch.cartesian_prod(torch.arange(epochs), torch.arange(blocks), torch.arange(atoms))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),  # from kat_vectors of Random123, philox4x32 with 10 rounds
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    def words(text: str) -> list[int]:
        return [int(word, 16) for word in text.split()]

    k0, k1 = words(key)
    assert philox(torch.tensor([words(counter)] * 2), (k0, k1)).tolist() == [words(expected)] * 2


def test_components_are_standard_normal() -> None:
    noise = gaussian(counters(2, 50, 300), seed=7).numpy()
    assert noise.dtype == np.float32
    for component in noise.T:
        assert stats.kstest(component, "norm").pvalue > 1e-3
    assert noise.mean() == pytest.approx(0.0, abs=0.02)
    assert (noise**2).mean() == pytest.approx(1.0, abs=0.02)
    assert stats.kurtosis(noise.ravel()) == pytest.approx(0.0, abs=0.05)
    length = np.linalg.norm(noise, axis=1)
    assert stats.kstest(length, "chi", args=(3,)).pvalue > 1e-3  # the components are independent, not only normal


def test_neighbouring_counters_and_seeds_are_uncorrelated() -> None:
    noise = gaussian(counters(10, 20, 100), seed=7).reshape(10, 20, 100, 3).double()
    other = gaussian(counters(10, 20, 100), seed=8).reshape(10, 20, 100, 3).double()
    pairs = {
        "components": (noise[..., 0], noise[..., 1]),
        "pair of Box and Muller": (noise[..., 0], noise[..., 2]),
        "atoms": (noise[:, :, 1:], noise[:, :, :-1]),
        "blocks": (noise[:, 1:], noise[:, :-1]),
        "epochs": (noise[1:], noise[:-1]),
        "seeds": (noise, other),
        "squares": (noise[..., 0] ** 2 - 1, noise[..., 2] ** 2 - 1),
    }
    for name, (a, b) in pairs.items():
        correlation = float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())
        assert abs(correlation) < 5 / a.numel() ** 0.5, name


@pytest.mark.parametrize("large", [2**31, 2**32 - 1, 2**40])
def test_every_word_of_the_counter_and_the_seed_counts(large: int) -> None:
    seeds = (0, 1, large, large + 2**33)
    places = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, min(large, 2**32 - 1), 0))
    drawn = {
        tuple(gaussian(torch.tensor([place]), seed)[0].tolist()) for seed, place in itertools.product(seeds, places)
    }
    assert len(drawn) == len(seeds) * len(places)


def test_sigma_is_log_uniform() -> None:
    sigma = sigma_of(counters(3, 40, 100), 0.05, 0.8, seed=3).double().numpy()
    assert sigma.min() >= 0.05 * (1 - 1e-6)
    assert sigma.max() <= 0.8 * (1 + 1e-6)
    assert stats.kstest(np.log(sigma / 0.05) / np.log(16.0), "uniform").pvalue > 1e-3
    fixed = sigma_of(counters(1, 2, 3), 0.3, 0.3, seed=3)
    torch.testing.assert_close(fixed, torch.full((6,), 0.3))


def test_sigma_and_displacement_of_one_counter_are_independent() -> None:
    places = counters(3, 40, 100)
    log_sigma = sigma_of(places, 0.1, 1.0, seed=3).double().log()
    length = gaussian(places, seed=3).double().square().sum(dim=1)
    assert abs(np.corrcoef(log_sigma, length)[0, 1]) < 5 / len(places) ** 0.5


# -- in packs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(data_folder: Path) -> DataSet:
    return DataSet(data_folder)


def batch_of(data: DataSet, entries: list[tuple[int, int]], shape: PackShape | None = None) -> GraphBatch:
    """A pack of (epoch, block of the training split) entries."""
    return widen(data.pack([Entry(*entry) for entry in entries], data.table("train"), shape))


def displacements(task: Denoising, batch: GraphBatch) -> dict[tuple[int, int, int], tuple[float, ...]]:
    """(epoch, block, atom) → displacement, without padding."""
    moves = task.displaced_positions(batch) - batch.positions
    real = batch.atomic_numbers > 0
    keys = batch.noise_counter[real].tolist()
    return {(e, b, a): tuple(move) for (e, b, a), move in zip(keys, moves[real].tolist(), strict=True)}


@pytest.mark.parametrize("sigma", [(0.3, 0.3), (0.05, 0.5)])
def test_a_displacement_does_not_depend_on_the_pack(data: DataSet, sigma: tuple[float, float]) -> None:
    """Neither on the company nor the place of a block, nor on the padding."""
    task = Denoising(TASK.expansion, sigma, seed=11)
    shape = data.shape("train", 4)
    alone = displacements(task, batch_of(data, [(2, 5)]))
    crowded = displacements(task, batch_of(data, [(0, 1), (3, 5), (2, 5), (2, 7)], shape))
    assert len(alone) == int(data.blocks["atoms"][5])
    assert {place: crowded[place] for place in alone} == alone
    assert len(set(crowded.values())) == len(crowded)  # another epoch, block or atom: another displacement


def test_the_seed_of_a_run_changes_every_displacement(data: DataSet) -> None:
    batch = batch_of(data, [(0, 1)])
    first = displacements(TASK, batch)
    second = displacements(Denoising(TASK.expansion, TASK.sigma, seed=12), batch)
    assert all(first[place] != second[place] for place in first)


def test_displacements_have_the_width_that_was_asked_for(data: DataSet) -> None:
    batch = batch_of(data, [(epoch, block) for epoch in range(6) for block in range(8)])
    moves = np.array(list(displacements(TASK, batch).values())) / 0.3
    assert len(moves) > 2_000
    assert stats.kstest(moves.ravel(), "norm").pvalue > 1e-3


def test_a_crystal_is_displaced_by_one_sigma_of_its_own(data: DataSet) -> None:
    low, high = 0.01, 1.0
    task = Denoising(TASK.expansion, (low, high), seed=11)
    batch = batch_of(data, [(epoch, 0) for epoch in range(200)])
    moves = (task.displaced_positions(batch) - batch.positions).double()
    of_graph = torch.zeros(batch.n_graphs, dtype=torch.float64)
    of_graph = of_graph.index_add(0, batch.graph_of_atom, moves.square().sum(dim=1))
    atoms = batch.atoms_of_graph
    width = (of_graph / (3 * atoms)).sqrt()[atoms >= 12][:-1].log()
    uniform = (width - np.log(low)) / np.log(high / low)
    assert stats.kstest(uniform, "uniform").statistic < 0.1


def test_an_atom_and_its_images_move_together(data: DataSet) -> None:
    batch = batch_of(data, [(0, block) for block in range(10)])
    displaced, clean = TASK.distances(batch)
    own = batch.src == batch.dst
    assert own.sum() > 100
    torch.testing.assert_close(displaced[own], clean[own], atol=2e-6, rtol=0)
    assert (displaced[~own] - clean[~own]).abs().mean() > 0.1


@pytest.mark.gpu
def test_a_gpu_draws_the_same_numbers(data: DataSet) -> None:
    places = counters(10, 100, 1_000)
    torch.testing.assert_close(gaussian(places.cuda(), 7).cpu(), gaussian(places, 7), atol=0, rtol=0)
    torch.testing.assert_close(
        sigma_of(places.cuda(), 0.1, 1.0, 7).cpu(), sigma_of(places, 0.1, 1.0, 7), atol=0, rtol=0
    )
