"""The neighbour search, against arithmetic, brute force, pymatgen and ase."""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.neighborlist import neighbor_list
from numpy.typing import NDArray
from pymatgen.core import Composition, Structure
from scipy.spatial.transform import Rotation

from sharding import graph
from sharding.crystal import SYMBOLS, Crystal, reduced_formula
from sharding.graph import TIE, Multigraphs, build, concatenate, upper_triangular
from sharding.sources import ReadOptions, open_source, parse_records

CUTOFF = 5.0137  # Å; no pair of the test crystals is this far apart, so that no library meets a tie


def cubic(a: float, *fractional: tuple[float, float, float]) -> Crystal:
    """Carbon atoms in a cube; one at the origin where none is given."""
    points = np.array(fractional or [(0.0, 0.0, 0.0)])
    return Crystal("cube", a * np.eye(3), a * points, np.full(len(points), 6, np.uint8))


def moved(crystal: Crystal, **changes: NDArray[np.float64]) -> Crystal:
    """The crystal with another lattice or other positions."""
    rest = {"lattice": crystal.lattice, "positions": crystal.positions} | changes
    return Crystal(crystal.key, atomic_numbers=crystal.atomic_numbers, **rest)


def only(crystal: Crystal, cutoff: float = CUTOFF) -> Multigraphs:
    """The graph of one crystal that is not refused."""
    graphs, refused = build([crystal], cutoff)
    assert refused == {}
    return graphs


def in_order(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    return rows[np.lexsort(rows.T[::-1])]


def directed(crystal: Crystal, cutoff: float = CUTOFF) -> NDArray[np.int64]:
    """Rows (i, j, n) of both directions of every stored edge, the shift n between the atoms where the crystal has them.

    Storing wraps atoms into the cell, which renumbers the images; here that is undone.
    """
    graphs = only(crystal, cutoff)
    wrapped = np.rint((graphs.positions - crystal.positions) @ np.linalg.inv(crystal.lattice)).astype(int)
    i, j = graphs.edge_src.astype(int), graphs.edge_dst.astype(int)
    n = graphs.edge_shift + wrapped[j] - wrapped[i]
    return in_order(np.concatenate([np.column_stack([i, j, n]), np.column_stack([j, i, -n])]))


def brute_force(crystal: Crystal, cutoff: float = CUTOFF) -> NDArray[np.int64]:
    """The same rows from all images in a box that surely holds the sphere."""
    x, lattice = crystal.positions, crystal.lattice
    heights = 1.0 / np.linalg.norm(np.linalg.inv(lattice), axis=0)  # between the faces of the cell
    reach = cutoff + np.linalg.norm(x[:, None] - x, axis=2).max()
    axes = [np.arange(-m, m + 1) for m in np.ceil(reach / heights).astype(int) + 1]
    shifts = np.array(list(itertools.product(*axes)))
    rows = []
    for i, j in itertools.product(range(len(x)), repeat=2):
        distance = np.linalg.norm(x[j] + shifts @ lattice - x[i], axis=1)
        assert np.abs(distance - cutoff).min() > 1e-7, "a tie: libraries would disagree"
        near = shifts[distance <= cutoff + TIE]
        rows.append(np.column_stack([np.full((len(near), 2), (i, j)), near]))
    found = np.concatenate(rows)
    itself = (found[:, 0] == found[:, 1]) & (found[:, 2:] == 0).all(axis=1)
    return in_order(found[~itself])


def by_pymatgen(crystal: Crystal, cutoff: float = CUTOFF) -> NDArray[np.int64]:
    numbers = crystal.atomic_numbers.tolist()
    structure = Structure(crystal.lattice, numbers, crystal.positions, coords_are_cartesian=True)
    i, j, shift, _ = structure.get_neighbor_list(cutoff)
    return in_order(np.column_stack([i, j, np.rint(shift).astype(int)]))


def by_ase(crystal: Crystal, cutoff: float = CUTOFF) -> NDArray[np.int64]:
    atoms = Atoms(crystal.atomic_numbers, crystal.positions, cell=crystal.lattice, pbc=True)
    i, j, shift = neighbor_list("ijS", atoms, cutoff)
    return in_order(np.column_stack([i, j, shift]))


def change_of_cell(rng: np.random.Generator, largest: int = 3) -> NDArray[np.int64]:
    """A random integer matrix of determinant ±1: the rows of another cell of the same lattice."""
    while True:
        matrix = rng.integers(-largest, largest + 1, (3, 3))
        if abs(round(np.linalg.det(matrix))) == 1:
            return matrix


def supercell(crystal: Crystal, matrix: NDArray[np.int64]) -> Crystal:
    """The crystal with the cell ``matrix @ lattice``, which is |det| times larger."""
    reach = np.abs(matrix).sum(axis=0)
    axes = [np.arange(-m, m + 1) for m in reach]
    points = np.array(list(itertools.product(*axes)))
    fractional = points @ np.linalg.inv(matrix)
    inside = points[((fractional > -1e-9) & (fractional < 1 - 1e-9)).all(axis=1)]
    assert len(inside) == abs(round(np.linalg.det(matrix)))
    positions = (crystal.positions + (inside @ crystal.lattice)[:, None]).reshape(-1, 3)
    return Crystal(crystal.key, matrix @ crystal.lattice, positions, np.tile(crystal.atomic_numbers, len(inside)))


FCC = ((0.0, 0.0, 0.0), (0.5, 0.5, 0.0), (0.5, 0.0, 0.5), (0.0, 0.5, 0.5))


@pytest.mark.parametrize(
    ("crystal", "neighbours"),
    [
        (cubic(5.0), 6),
        (cubic(2.5), 32),  # 6 at a, 12 at √2 a, 8 at √3 a and 6 at 2 a, a tie
        (cubic(5.0 * 2**0.5, *FCC), 12),
        (moved(cubic(5.0), positions=np.array([[1e3, -77.7, 0.1]])), 6),
    ],
    ids=["simple cubic", "simple cubic, dense", "face-centred cubic", "far from the cell"],
)
def test_an_atom_at_exactly_the_cutoff_is_a_neighbour(crystal: Crystal, neighbours: int) -> None:
    rotations = [np.eye(3), *Rotation.random(20, random_state=1).as_matrix()]
    turned = [moved(crystal, lattice=crystal.lattice @ r, positions=crystal.positions @ r) for r in rotations]
    for each in turned:
        receivers = directed(each, 5.0)[:, 0]
        assert np.bincount(receivers).tolist() == [neighbours] * len(crystal.positions)


def test_the_tolerance_of_a_tie_is_what_the_format_says() -> None:
    assert len(directed(cubic(5.0 + 0.5e-8), 5.0)) == 6
    _, refused = build([cubic(5.0 + 2e-8)], 5.0)
    assert refused[0].code == "isolated_atom"


def test_real_crystals_as_brute_force_and_pymatgen_find_them(aflow: list[Crystal]) -> None:
    small = [c for c in aflow if len(c.positions) <= 20]
    assert len(small) >= 200
    for crystal in small:
        np.testing.assert_array_equal(directed(crystal), brute_force(crystal), crystal.key)
    for crystal in aflow:
        np.testing.assert_array_equal(directed(crystal), by_pymatgen(crystal), crystal.key)


def test_skewed_cells_and_unwrapped_atoms(aflow: list[Crystal]) -> None:
    """Another cell of the lattice, and atoms anywhere: the same neighbours under other labels, known by arithmetic."""
    rng = np.random.default_rng(2)
    steepest = 0.0
    for crystal in aflow[:200]:
        if len(crystal.positions) > 12:
            continue
        cell = change_of_cell(rng)
        moves = rng.integers(-4, 5, crystal.positions.shape)
        skewed = moved(crystal, lattice=cell @ crystal.lattice, positions=crystal.positions + moves @ crystal.lattice)
        expected = brute_force(crystal)
        i, j = expected[:, 0], expected[:, 1]
        shift = (expected[:, 2:] - moves[j] + moves[i]) @ np.rint(np.linalg.inv(cell)).astype(int)
        np.testing.assert_array_equal(directed(skewed), in_order(np.column_stack([i, j, shift])), crystal.key)
        steepest = max(steepest, np.linalg.cond(skewed.lattice))
    assert steepest > 50


@pytest.mark.parametrize(("search", "every"), [(by_pymatgen, 3), (by_ase, 31)])
def test_skewed_supercells_as_libraries_find_them(
    aflow: list[Crystal], search: Callable[[Crystal], NDArray[np.int64]], every: int
) -> None:
    rng = np.random.default_rng(3)
    tried = 0
    for crystal in aflow[::every]:
        matrix = change_of_cell(rng, 2) @ np.diag(rng.integers(1, 3, 3)) @ change_of_cell(rng, 1)
        if len(crystal.positions) * abs(np.linalg.det(matrix)) < 40:
            larger = supercell(crystal, matrix)
            np.testing.assert_array_equal(directed(larger), search(larger), crystal.key)
            tried += 1
    assert tried >= 7


@pytest.mark.parametrize(
    ("lengths", "each"),
    [((33, 27, 30), 4.1), ((7, 26, 41), 3.7), ((3, 4, 130), 3.0), ((12, 12, 12), 2.9), ((22, 41, 9), 3.9)],
    ids=["wide", "slab", "needle", "between", "porous"],
)
def test_large_cells_as_libraries_find_them(lengths: tuple[float, float, float], each: float) -> None:
    """Cells in which not every pair is tried: wide ones, and ones wide along some axes; straight and skewed."""
    rng = np.random.default_rng(6)
    for skew in (0.0, 0.6):
        lattice = np.diag(lengths) + skew * np.tril(rng.uniform(-1, 1, (3, 3)), -1) * np.array(lengths)
        grid = np.array(list(itertools.product(*(np.arange(1, n // each + 1) for n in lengths))))
        fractional = grid / (np.array(lengths) // each) + rng.uniform(-0.2, 0.2, grid.shape) * each / np.array(lengths)
        fractional = rng.permutation(fractional)[: len(grid) * 3 // 4] + rng.integers(-2, 3, 3)
        crystal = Crystal("large", lattice, fractional @ lattice, np.full(len(fractional), 6, np.uint8))
        graphs, found = only(crystal), directed(crystal)
        np.testing.assert_array_equal(found, by_ase(crystal))
        np.testing.assert_array_equal(found, by_pymatgen(crystal))
        rows = np.column_stack([graphs.edge_src, graphs.edge_dst, graphs.edge_shift]).astype(int)
        np.testing.assert_array_equal(rows, in_order(rows), "the stored order")


def test_a_supercell_has_the_same_distances(aflow: list[Crystal]) -> None:
    def distances(crystal: Crystal) -> NDArray[np.float64]:
        i, j, *n = directed(crystal).T
        x = crystal.positions
        return np.sort(np.linalg.norm(x[j] + np.array(n).T @ crystal.lattice - x[i], axis=1))

    rng = np.random.default_rng(4)
    for crystal in aflow[:60:6]:
        larger = supercell(crystal, change_of_cell(rng, 1) @ np.diag([2, 1, 3]))
        np.testing.assert_allclose(distances(larger), np.repeat(distances(crystal), 6), atol=1e-9)


def test_cells_of_one_atom() -> None:
    """All neighbours are the atom's own images, down to cells far thinner than the cutoff."""
    rng = np.random.default_rng(5)
    tried = 0
    while tried < 50:
        crystal = moved(cubic(1.0), lattice=rng.uniform(-4, 4, (3, 3)))
        expected = brute_force(crystal)
        _, refused = build([crystal], CUTOFF)
        if refused:
            assert {why.code for why in refused.values()} <= {"volume", "too_close", "isolated_atom"}
        else:
            np.testing.assert_array_equal(directed(crystal), expected)
            tried += 1


def test_the_stored_list_is_canonical(aflow: list[Crystal]) -> None:
    graphs, refused = build(aflow, CUTOFF)
    assert refused == {}
    ends = np.cumsum(graphs.n_edges)
    assert ends[-1] == len(graphs.edge_src)
    for g, (begin, end) in enumerate(zip(ends - graphs.n_edges, ends, strict=True)):
        src, dst, shift = (a[begin:end].tolist() for a in (graphs.edge_src, graphs.edge_dst, graphs.edge_shift))
        rows = [(i, j, *n) for i, j, n in zip(src, dst, shift, strict=True)]
        assert all(i < j or (i == j and tuple(n) > (0, 0, 0)) for i, j, *n in rows)
        assert rows == sorted(set(rows))
        assert max(dst) < graphs.n_atoms[g]
        assert graphs.scored_edges()[g] == sum(i != j for i, j, *_ in rows)


def test_stored_positions_lie_in_the_cell_and_make_the_same_distances(aflow: list[Crystal]) -> None:
    crystal = max(aflow[:100], key=lambda c: len(c.positions))
    graphs = only(moved(crystal, positions=crystal.positions + 3 * crystal.lattice.sum(axis=0) - 1.0))
    fractional = graphs.positions @ np.linalg.inv(crystal.lattice)
    assert fractional.min() > -1e-6
    assert fractional.max() < 1 + 1e-6
    x, lattice = graphs.positions.astype(float), graphs.lattice[0].astype(float)
    vectors = x[graphs.edge_dst] + graphs.edge_shift @ lattice - x[graphs.edge_src]
    assert np.linalg.norm(vectors, axis=1).max() <= CUTOFF + 1e-5


def bad_crystals() -> dict[str, Crystal]:
    """One crystal for every reason to refuse one."""
    fine, pair = cubic(3.0), cubic(4.0, (0.0, 0.0, 0.0), (0.5, 0.5, 0.5))
    numbers = [np.array(z, np.uint8) for z in ([], [0], [119], [6, 6])]
    return {
        "not_finite: position": moved(fine, positions=np.array([[0.0, np.nan, 0.0]])),
        "not_finite: infinite position": moved(fine, positions=np.array([[0.0, np.inf, -np.inf]])),
        "not_finite: lattice": moved(fine, lattice=np.diag([3.0, np.inf, 3.0])),
        "singular_cell: two equal vectors": moved(fine, lattice=np.ones((3, 3)) + np.diag([1.0, 0.0, 0.0])),
        "singular_cell: almost": moved(fine, lattice=np.array([[9e2, 0.0, 0.0], [9e2, 1e-4, 0.0], [0.0, 0.0, 9e2]])),
        "singular_cell: no vector": moved(fine, lattice=np.zeros((3, 3))),
        "volume: dense": cubic(1.1),
        "volume: thin": cubic(8.0),
        "too_close: two atoms": moved(pair, positions=np.array([[0.0, 0.0, 0.0], [0.2, 0.3, 0.3]])),
        "too_close: one atom twice": moved(pair, positions=np.zeros((2, 3))),
        "too_close: across the boundary": moved(pair, positions=np.array([[0.1, 0.1, 0.1], [3.9, 3.9, 3.9]])),
        "too_close: own image": moved(fine, lattice=np.diag([0.45, 8.0, 8.0])),
        "isolated_atom: alone": cubic(6.0),
        "isolated_atom: far from a pair": moved(
            cubic(11.0, *[(0.0, 0.0, 0.0)] * 3), positions=np.array([[0, 0, 0], [1.5, 0, 0], [5.5, 5.5, 5.5]])
        ),
        "species: zero": Crystal("zero", fine.lattice, fine.positions, numbers[1]),
        "species: 119": Crystal("119", fine.lattice, fine.positions, numbers[2]),
        "no_atoms": Crystal("none", fine.lattice, np.zeros((0, 3)), numbers[0]),
        "unparsable: a position is missing": Crystal("short", fine.lattice, fine.positions, numbers[3]),
        "unparsable: two dimensions": moved(fine, lattice=np.eye(2)),
        "shift_range": moved(fine, lattice=np.array([[3.0, 0.0, 0.0], [450.1, 3.0, 0.0], [0.0, 0.0, 3.0]])),
        "too_many_atoms": moved(
            Crystal("many", fine.lattice, fine.positions, np.full(65_536, 6, np.uint8)),
            lattice=100 * np.eye(3),
            positions=np.zeros((65_536, 3)),
        ),
    }


@pytest.mark.parametrize("reason", bad_crystals())
def test_what_is_refused_and_why(reason: str) -> None:
    graphs, refused = build([bad_crystals()[reason]], 5.0)
    assert len(graphs) == 0
    assert {i: why.code for i, why in refused.items()} == {0: reason.split(":")[0]}
    assert refused[0].text


def test_bad_crystals_take_nothing_with_them(aflow: list[Crystal]) -> None:
    bad = list(bad_crystals().values())
    mixed = [c for pair in zip(aflow, bad, strict=False) for c in pair]
    graphs, refused = build(mixed, CUTOFF, ["gap"])
    assert set(refused) == set(range(1, len(mixed), 2))
    alone = concatenate([build([c], CUTOFF, ["gap"])[0] for c in aflow[: len(bad)]])
    assert_equal(graphs, alone)


def test_a_needle_is_refused_at_once() -> None:
    start = time.perf_counter()
    _, refused = build([moved(cubic(3.0), lattice=np.diag([1e-6, 1e2, 1e5]))], CUTOFF)
    assert refused[0].code == "too_close"
    assert time.perf_counter() - start < 0.1


def test_nothing_is_no_mistake() -> None:
    graphs, refused = build([], CUTOFF, ["gap"])
    assert (len(graphs), refused) == (0, {})
    assert graphs.labels["gap"].shape == (0,)


def assert_equal(a: Multigraphs, b: Multigraphs) -> None:
    assert a.keys == b.keys
    assert a.labels.keys() == b.labels.keys()
    for name in ("n_atoms", "n_edges", "lattice", "atomic_numbers", "positions", "edge_src", "edge_dst", "edge_shift"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype, name
        np.testing.assert_array_equal(left, right, name)
    for name, values in a.labels.items():
        np.testing.assert_array_equal(values, b.labels[name], name)


def test_taking_graphs_is_building_them_in_another_order(aflow: list[Crystal]) -> None:
    order = np.random.default_rng(6).permutation(40)
    assert_equal(build(aflow[:40], CUTOFF)[0].take(order), build([aflow[i] for i in order], CUTOFF)[0])


def test_upper_triangular_is_the_same_cell_turned() -> None:
    rng = np.random.default_rng(7)
    lattices = rng.normal(size=(500, 3, 3)) * 10.0 ** rng.uniform(-1, 2, (500, 3, 1))
    rotated, turn = upper_triangular(lattices)
    np.testing.assert_array_equal(rotated, np.triu(rotated))
    assert (np.diagonal(rotated, axis1=1, axis2=2) > 0).all()
    np.testing.assert_allclose(turn @ np.swapaxes(turn, 1, 2), np.broadcast_to(np.eye(3), turn.shape), atol=1e-12)
    scale = np.linalg.norm(lattices, axis=2, keepdims=True)
    np.testing.assert_allclose(lattices @ turn / scale, rotated / scale, atol=1e-12)


def test_interpreted_is_compiled(aflow: list[Crystal], monkeypatch: pytest.MonkeyPatch) -> None:
    few = [*aflow[:12], *bad_crystals().values()][:-1]
    compiled, refused = build(few, CUTOFF)
    monkeypatch.setattr(graph, "half_edges", graph.half_edges.py_func)
    interpreted, also_refused = build(few, CUTOFF)
    assert_equal(interpreted, compiled)
    assert {i: why.text for i, why in also_refused.items()} == {i: why.text for i, why in refused.items()}


def test_an_installation_that_cannot_be_written(tmp_path: Path, repo: Path) -> None:
    """As in a container with a read-only root and no home: slower, but it starts."""
    shutil.copytree(repo / "sharding", tmp_path / "sharding", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "sharding" / "__pycache__").write_text("not a folder")
    nowhere = {**os.environ, "HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", "import sharding.graph; print(sharding.graph.__file__)"]
    run = subprocess.run(command, env=nowhere, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.strip() == str(tmp_path / "sharding" / "graph.py"), run.stderr


def test_more_edges_than_were_reserved_for() -> None:
    """125 atoms in one corner of a cell have twenty times the pairs that its mean density promises."""
    points = 0.6 * np.array(list(itertools.product(range(5), repeat=3)))
    graphs = only(moved(cubic(36.0, *points), positions=points))
    pairs = list(zip(graphs.edge_src.tolist(), graphs.edge_dst.tolist(), strict=True))
    assert pairs == list(itertools.combinations(range(125), 2))
    assert not graphs.edge_shift.any()


def test_the_reduced_formula_as_pymatgen_reads_it(aflow: list[Crystal]) -> None:
    for crystal in aflow:
        formula = reduced_formula(crystal.atomic_numbers)
        species = Counter(SYMBOLS[z] for z in crystal.atomic_numbers)
        read = {str(element): int(n) for element, n in Composition(formula).items()}
        factor = species.total() // sum(read.values())
        assert {symbol: n * factor for symbol, n in read.items()} == species
        assert math.gcd(*read.values()) == 1
        assert re.findall("[A-Z][a-z]?", formula) == sorted(species)


@pytest.mark.shared
def test_crystals_of_the_materials_project(shared: Path) -> None:
    source = open_source(str(shared / "data" / "mp2025.parquet"), ReadOptions(limit=4096))
    crystals = [c for c in parse_records(source, source.records()) if isinstance(c, Crystal)][::8]
    assert len(crystals) > 400
    _, refused = build(crystals, CUTOFF)
    for i, crystal in enumerate(crystals):
        if i not in refused:
            np.testing.assert_array_equal(directed(crystal), by_pymatgen(crystal), crystal.key)
    assert len(refused) < 10
