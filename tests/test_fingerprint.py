"""Fingerprints against brute force and all representations of a crystal; twins against scipy and StructureMatcher."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure
from scipy.sparse.csgraph import connected_components
from scipy.spatial.transform import Rotation

from sharding.crystal import ATOMIC_NUMBER, Crystal, reduced_formula
from sharding.fingerprint import FAR_BLOCK, FAR_SLOTS, NEAR_SLOTS, WIDTH, distance, fingerprints, volume_per_atom
from sharding.twins import EXACT, NEAR, SPLIT, Catalogue, exact_duplicates, match, near_duplicates, twin_groups

SAME = 2e-5  # what rounding may leave between two ways to write a crystal down
STRUCTURE_TYPES_APART = 0.3


def prints(*crystals: Crystal) -> NDArray[np.float32]:
    return fingerprints(
        np.array([c.lattice for c in crystals]),
        np.concatenate([c.positions for c in crystals]),
        np.concatenate([c.atomic_numbers for c in crystals]),
        np.array([len(c.atomic_numbers) for c in crystals]),
    )


def catalogue(crystals: Sequence[Crystal]) -> Catalogue:
    lattice = np.array([c.lattice for c in crystals])
    return Catalogue(
        [c.key for c in crystals],
        [reduced_formula(c.atomic_numbers) for c in crystals],
        prints(*crystals),
        volume_per_atom(lattice, np.array([len(c.atomic_numbers) for c in crystals])),
    )


def crystal(lattice: Sequence[Sequence[float]] | NDArray[np.float64], sites: str, fractional: object) -> Crystal:
    """A crystal from element symbols with spaces between and fractional coordinates."""
    cell = np.array(lattice, float)
    numbers = np.array([ATOMIC_NUMBER[s] for s in sites.split()], np.uint8)
    return Crystal(sites, cell, np.array(fractional, float).reshape(-1, 3) @ cell, numbers)


def supercell(c: Crystal, matrix: NDArray[np.int64]) -> Crystal:
    """The crystal in the cell ``matrix @ lattice``; ±1 as determinant only changes the cell vectors."""
    cell = matrix @ c.lattice
    reach = range(-np.abs(matrix).sum(), np.abs(matrix).sum() + 1)
    shifts = np.array(list(itertools.product(reach, repeat=3)))
    inside = shifts @ np.linalg.inv(matrix)
    shifts = shifts[((inside > -1e-9) & (inside < 1 - 1e-9)).all(axis=1)]
    assert len(shifts) == round(abs(np.linalg.det(matrix)))
    positions = (c.positions[None] + (shifts @ c.lattice)[:, None]).reshape(-1, 3)
    return replace(c, lattice=cell, positions=positions, atomic_numbers=np.tile(c.atomic_numbers, len(shifts)))


def unimodular(rng: np.random.Generator) -> NDArray[np.int64]:
    low, high = np.tril(rng.integers(-2, 3, (3, 3)), -1), np.triu(rng.integers(-2, 3, (3, 3)), 1)
    return (np.eye(3, dtype=int) + low) @ (np.eye(3, dtype=int) + high)


def test_no_way_to_write_a_crystal_down_changes_it(aflow: list[Crystal]) -> None:
    rng = np.random.default_rng(0)
    crystals = aflow[::2]
    assert len(crystals) >= 100
    expected = prints(*crystals)
    assert expected.shape == (len(crystals), WIDTH) and np.isfinite(expected).all()

    def turned(c: Crystal, sign: int) -> Crystal:
        q = sign * Rotation.random(random_state=rng.integers(2**31)).as_matrix()
        return replace(c, lattice=c.lattice @ q, positions=c.positions @ q)

    def moved(c: Crystal) -> Crystal:
        lattice_vectors = rng.integers(-3, 4, c.positions.shape) @ c.lattice
        return replace(c, positions=c.positions + lattice_vectors + rng.normal(0, 5, 3))

    def permuted(c: Crystal) -> Crystal:
        order = rng.permutation(len(c.atomic_numbers))
        return replace(c, positions=c.positions[order], atomic_numbers=c.atomic_numbers[order])

    def multiplied(c: Crystal) -> Crystal:
        matrix = np.diag(rng.permutation([1, 1, 2 + (len(c.atomic_numbers) < 8)]))
        matrix[np.triu_indices(3, 1)] = rng.integers(0, 2, 3)
        return supercell(c, matrix)

    ways = {
        "rotation": lambda c: turned(c, 1),
        "reflection": lambda c: turned(c, -1),
        "origin and images": moved,
        "order": permuted,
        "cell vectors": lambda c: supercell(c, unimodular(rng)),
        "supercell": multiplied,
        "all at once": lambda c: permuted(moved(turned(supercell(multiplied(c), unimodular(rng)), -1))),
        "scale": lambda c: replace(c, lattice=1.07 * c.lattice, positions=1.07 * c.positions),
    }
    for name, way in ways.items():
        found = prints(*(way(c) for c in crystals))
        np.testing.assert_allclose(found, expected, atol=SAME, rtol=0, err_msg=name)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 0.3])
def test_small_steps_make_small_changes(aflow: list[Crystal], size: float) -> None:
    rng = np.random.default_rng(1)
    crystals = aflow[1::3]
    steps = []
    for c in crystals:
        step = rng.normal(size=c.positions.shape)
        steps.append(replace(c, positions=c.positions + size * step / np.linalg.norm(step, axis=1).max()))
    change = np.abs(prints(*steps) - prints(*crystals))
    unit = np.cbrt(catalogue(crystals).volumes)
    assert (change.max(axis=1) <= 2 * size / unit + SAME).all()
    assert (change.max(axis=1) > 0).mean() > 0.9, "a fingerprint that never changes is continuous too"


def brute_force(c: Crystal) -> NDArray[np.float64]:
    """The definition, from all images in a box that surely holds every sphere."""
    numbers, counts = np.unique(c.atomic_numbers, return_counts=True)
    by_count = numbers[np.lexsort((numbers, -counts))]
    kind = np.array([min(list(by_count).index(z), 8) for z in c.atomic_numbers])
    kinds = range(kind.max() + 1)
    pairs = [(a, b) for a in kinds for b in kinds if a <= b]
    slots = [NEAR_SLOTS * (p + 1) // len(pairs) - NEAR_SLOTS * p // len(pairs) for p in range(len(pairs))]
    wanted = [*zip(pairs, slots, strict=True), ((kind.max(), kind.max()), FAR_SLOTS * FAR_BLOCK)]
    heights = 1 / np.linalg.norm(np.linalg.inv(c.lattice), axis=0)
    spread = np.linalg.norm(c.positions[:, None] - c.positions, axis=2).max()
    volume = abs(np.linalg.det(c.lattice))
    parts: list[NDArray[np.float64]] = []
    for (a, b), k in wanted:
        radius = 0.8 * (k * volume / (kind == b).sum()) ** (1 / 3)
        while True:
            axes = [np.arange(-m, m + 1) for m in np.ceil((radius + spread) / heights).astype(int)]
            images = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3) @ c.lattice
            images = images[np.linalg.norm(images, axis=1) <= radius + spread]
            rows = []
            for i in np.flatnonzero(kind == a):
                d = np.linalg.norm(c.positions[kind == b][:, None] - c.positions[i] + images, axis=2).ravel()
                rows.append(np.sort(d)[(1 if a == b else 0) :][:k])
            if min(map(len, rows)) == k and max(row[-1] for row in rows) <= radius:
                break
            radius *= 1.2
        parts.append(np.mean(rows, axis=0) / np.cbrt(volume / len(kind)))
    parts[-1] = parts[-1].reshape(FAR_SLOTS, FAR_BLOCK).mean(axis=1)
    return np.concatenate(parts)


def test_distances_are_those_of_brute_force(aflow: list[Crystal]) -> None:
    rng = np.random.default_rng(2)
    one = crystal(3 * np.eye(3), "C", [0, 0, 0])
    skewed = np.array([[2.9, 0, 0], [7.3, 3.1, 0], [-4.7, 6.9, 2.7]])
    flat = np.diag([2.6, 2.7, 31.0])
    many = crystal(9 * np.eye(3), "H He Li Be B C N O F Ne Na H H He", rng.random((14, 3)))  # more than 9 kinds
    cases = [
        one,
        crystal(skewed, "C", [0, 0, 0]),
        crystal(skewed, "Na Cl Na", rng.random((3, 3)) * 4 - 2),
        crystal(flat, "Mo S S", [[0.1, 0.2, 0.5], [0.6, 0.7, 0.55], [0.6, 0.7, 0.45]]),
        many,
        *[c for c in aflow if len(c.atomic_numbers) <= 8][::4],
    ]
    found = prints(*cases)
    for c, vector in zip(cases, found, strict=True):
        np.testing.assert_allclose(vector, brute_force(c), atol=2e-6 * vector.max(), rtol=0, err_msg=c.key)
    np.testing.assert_allclose(found[0, :26], np.repeat([1, 2**0.5, 3**0.5], [6, 12, 8]), rtol=1e-6)


FCC = np.array([[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])


def test_polymorphs_are_far_apart() -> None:
    quarter, half, none = [0.25] * 3, [0.5] * 3, [0.0] * 3
    binary = prints(
        crystal(5.6 * FCC, "Na Cl", [none, half]),
        crystal(3.5 * np.eye(3), "Na Cl", [none, half]),
        crystal(6.1 * FCC, "Na Cl", [none, quarter]),
    )
    u = 0.305
    rutile = crystal(
        np.diag([4.594, 4.594, 2.959]),
        "Ti Ti O O O O",
        [none, half, [u, u, 0], [-u, -u, 0], [0.5 + u, 0.5 - u, 0.5], [0.5 - u, 0.5 + u, 0.5]],
    )
    z = 0.2081
    anatase = crystal(
        np.array([[-1.892, 1.892, 4.757], [1.892, -1.892, 4.757], [1.892, 1.892, -4.757]]),
        "Ti Ti O O O O",
        [none, [0.75, 0.25, 0.5], [z, z, 0], [-z, -z, 0], [0.75 + z, 0.25 + z, 0.5], [0.75 - z, 0.25 - z, 0.5]],
    )
    for group in (binary, prints(rutile, anatase)):
        for a, b in itertools.combinations(group, 2):
            assert distance(a, b) > STRUCTURE_TYPES_APART
    assert distance(binary[:, None], binary).shape == (3, 3)


def test_who_sits_where_matters_as_it_does_to_a_chemist() -> None:
    sites = [[0, 0, 0], [0.25] * 3]
    zincblende, swapped = (crystal(5.4 * FCC, names, sites) for names in ("Zn S", "S Zn"))
    assert distance(*prints(zincblende, swapped)) < SAME

    x = 0.3875  # MgAl2O4; origin on magnesium
    spinel = Structure.from_spacegroup(
        "Fd-3m", Lattice.cubic(8.08), ["Mg", "Al", "O"], [[0] * 3, [5 / 8] * 3, [x] * 3]
    ).get_primitive_structure()
    numbers = np.array(spinel.atomic_numbers, np.uint8)
    normal = Crystal("normal", spinel.lattice.matrix, spinel.cart_coords, numbers)
    inverse_numbers = numbers.copy()
    magnesium, aluminium = np.flatnonzero(numbers == 12), np.flatnonzero(numbers == 13)
    inverse_numbers[magnesium], inverse_numbers[aluminium[:2]] = 13, 12
    inverse = replace(normal, key="inverse", atomic_numbers=inverse_numbers)
    assert len(numbers) == 14 and distance(*prints(normal, inverse)) > STRUCTURE_TYPES_APART

    # two orderings of one lattice, all of whose distances between atoms alike are the same
    cube = 3.9 * np.eye(3)
    l1_0 = crystal(cube, "Cu Cu Au Au", [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    l1_1 = crystal(3.9 * np.array([[0.5, 0.5, 0], [0, 0.5, 0.5], [1, 0, 1]]), "Cu Au", [[0, 0, 0], [0, 0, 0.5]])
    assert distance(*prints(l1_0, l1_1)) > STRUCTURE_TYPES_APART


def stacked(turns: str) -> Crystal:
    """Close-packed layers: at h the stacking turns round, at c it goes on. Repeated until it closes."""
    layers, direction, place = [], 1, 0
    for turn in itertools.cycle(turns):
        if layers and len(layers) % len(turns) == 0 and place == 0 and direction == 1:
            break
        layers.append(place)
        direction = -direction if turn == "h" else direction
        place = (place + direction) % 3
    n = len(layers)
    hexagonal = np.array([[1, 0, 0], [-0.5, 0.75**0.5, 0], [0, 0, n * (2 / 3) ** 0.5]]) * 2.9
    return crystal(hexagonal, " ".join(["La"] * n), [[p / 3, -p / 3, i / n] for i, p in enumerate(layers)])


def test_stacking_variants_are_twins_but_no_duplicates() -> None:
    short, long = replace(stacked("cchcch"), key="a"), replace(stacked("cccchh"), key="b")
    both = catalogue([short, long])
    assert distance(*both.fingerprints) < 1e-5, "the first 48 see two layers to each side, and those are alike"
    assert twin_groups(both).tolist() == near_duplicates(both).tolist() == [0, 0]
    assert exact_duplicates(both).tolist() == [0, 1]


def random_catalogue(rng: np.random.Generator, n: int) -> Catalogue:
    """Points along lines in the space of fingerprints, dense enough for chains."""
    vectors = np.zeros((n, WIDTH), np.float32)
    vectors[:, :3] = rng.random((n, 3)) * [8 * SPLIT, 3 * SPLIT, SPLIT]
    formulas = rng.choice(["C", "ClNa", "O2Ti"], n, p=[0.2, 0.5, 0.3]).tolist()
    return Catalogue([f"k{i}" for i in rng.permutation(10 * n)[:n]], formulas, vectors, 10 + rng.random(n))


def taken(c: Catalogue, order: NDArray[np.int64]) -> Catalogue:
    return Catalogue(
        [c.keys[i] for i in order], [c.formulas[i] for i in order], c.fingerprints[order], c.volumes[order]
    )


def test_twin_groups_are_connected_components() -> None:
    rng = np.random.default_rng(3)
    c = random_catalogue(rng, 300)
    for threshold in (0.02, 0.1, SPLIT, 1.0):
        near = distance(c.fingerprints[:, None], c.fingerprints) < threshold
        near &= np.array(c.formulas)[:, None] == np.array(c.formulas)
        _, labels = connected_components(near)
        groups = twin_groups(c, threshold)
        for label in range(labels.max() + 1):
            members = np.flatnonzero(labels == label)
            assert (groups[members] == min(members, key=lambda i: c.keys[i])).all()


def test_only_keys_decide() -> None:
    rng = np.random.default_rng(4)
    c = random_catalogue(rng, 400)
    excluded, rest = np.arange(0, 400, 4), np.flatnonzero(np.arange(400) % 4)
    exact = lambda x: exact_duplicates(x, 0.2, 0.05)  # noqa: E731
    for function in (twin_groups, near_duplicates, exact):
        expected = {key: c.keys[i] for key, i in zip(c.keys, function(c), strict=True)}
        assert 1 < len(set(expected.values())) < 400
        shuffled = taken(c, rng.permutation(400))
        assert {key: shuffled.keys[i] for key, i in zip(shuffled.keys, function(shuffled), strict=True)} == expected

    def matches(out: Catalogue, left: Catalogue) -> dict[str, str | None]:
        return {key: out.keys[i] if i >= 0 else None for key, i in zip(left.keys, match(out, left), strict=True)}

    expected_matches = matches(taken(c, excluded), taken(c, rest))
    assert matches(taken(c, rng.permutation(excluded)), taken(c, rng.permutation(rest))) == expected_matches
    assert {None} < set(expected_matches.values())


def test_duplicates_are_those_of_a_plain_loop() -> None:
    c = random_catalogue(np.random.default_rng(6), 200)
    logs = np.log(c.volumes)
    for threshold, volume in ((0.1, math.inf), (0.3, 0.01), (1.0, math.inf)):
        kept: list[int] = []
        expected = np.arange(200)
        for i in sorted(range(200), key=lambda i: c.keys[i]):
            near = (
                j
                for j in kept
                if c.formulas[i] == c.formulas[j]
                and np.abs(c.fingerprints[i] - c.fingerprints[j]).max() < threshold
                and abs(logs[i] - logs[j]) <= math.log1p(volume)
            )
            expected[i] = next(near, i)
            if expected[i] == i:
                kept.append(i)
        assert exact_duplicates(c, threshold, volume).tolist() == expected.tolist()


def line(*places: float, volumes: Sequence[float] | None = None, formula: str = "C") -> Catalogue:
    vectors = np.zeros((len(places), WIDTH), np.float32)
    vectors[:, 0] = places
    return Catalogue(
        [f"k{i}" for i in range(len(places))],
        [formula] * len(places),
        vectors,
        np.array(volumes or [9.0] * len(places)),
    )


def test_a_chain_is_one_group_but_only_repetitions_are_dropped() -> None:
    step = 0.9 * NEAR
    chain = line(0, step, 2 * step, 3 * step, 3 * step + 1)
    assert twin_groups(chain, NEAR).tolist() == [0, 0, 0, 0, 4]
    assert near_duplicates(chain).tolist() == [0, 0, 2, 2, 4]


def test_duplicates_agree_in_volume_too() -> None:
    c = line(0, 0.5 * EXACT, 0.5 * EXACT, 2 * EXACT, volumes=[9, 9.001, 9.1, 9])
    assert exact_duplicates(c).tolist() == [0, 0, 2, 3]
    assert exact_duplicates(c, volume=math.inf).tolist() == [0, 0, 0, 3]
    assert near_duplicates(c).tolist() == [0, 0, 0, 0]


def test_match_names_the_nearest_and_knows_formulas() -> None:
    excluded = line(0.0, 0.1, 0.1, 5.0)
    assert match(excluded, line(0.02, 0.09, 1.0, 5.2)).tolist() == [0, 1, -1, 3]
    assert match(excluded, line(0.02, formula="Si")).tolist() == [-1]
    empty = line()
    assert match(empty, excluded).tolist() == [-1] * 4 and match(excluded, empty).tolist() == []
    assert twin_groups(empty).tolist() == exact_duplicates(empty).tolist() == near_duplicates(empty).tolist() == []


def test_a_catalogue_that_cannot_be_judged_is_refused() -> None:
    c = line(0, 1)
    with pytest.raises(ValueError, match="differ in length"):
        Catalogue(c.keys, ["C"], c.fingerprints, c.volumes)
    with pytest.raises(ValueError, match="not unique"):
        Catalogue(["k", "k"], c.formulas, c.fingerprints, c.volumes)
    with pytest.raises(ValueError, match="NaN"):
        Catalogue(c.keys, c.formulas, c.fingerprints * np.nan, c.volumes)


@pytest.mark.shared
def test_an_exclude_list_keeps_out_what_structure_matcher_calls_the_same(shared: Path) -> None:
    rng = np.random.default_rng(5)
    names = [shared / "data" / f"{name}.parquet" for name in ("mp2025", "jarvis_dft3d_2021")]
    formulas = [set(pq.read_table(p, columns=["chemical_formula_reduced"])[0].to_pylist()) for p in names]
    chosen = rng.choice(sorted(formulas[0] & formulas[1]), 80, replace=False)
    databases = []
    for path in names:
        rows = pq.read_table(path, filters=[("chemical_formula_reduced", "in", chosen.tolist())]).to_pylist()
        databases.append([_read(row) for row in rows if row["nsites"] <= 30])
    candidates, excluded = databases
    found = match(catalogue(excluded), catalogue(candidates))
    matcher = StructureMatcher()
    out = [Structure(c.lattice, c.atomic_numbers, c.positions, coords_are_cartesian=True) for c in excluded]
    same = []
    for c in candidates:
        s = Structure(c.lattice, c.atomic_numbers, c.positions, coords_are_cartesian=True)
        same.append(
            any(matcher.fit(s, o) for o in out if o.composition.reduced_formula == s.composition.reduced_formula)
        )
    assert sum(same) > 50
    assert (found >= 0)[same].mean() >= 0.98


def _read(row: dict[str, object]) -> Crystal:
    numbers = np.array([ATOMIC_NUMBER[s] for s in row["species_at_sites"]], np.uint8)  # type: ignore[attr-defined]
    lattice, positions = (np.array(row[k], float) for k in ("lattice_vectors", "cartesian_site_positions"))
    return Crystal(str(row["id"]), lattice, positions, numbers)
