"""The demo's crystals, checked against pymatgen, spglib and measured cells."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from collections import Counter
from statistics import median

import numpy as np
import pytest
from pymatgen.core import Composition, Element, Lattice, Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from sharding.crystal import Crystal, Refusal, check, reduced_formula
from sharding.sources import ReadOptions, SourceError, open_source

IN_ANOTHER_PROCESS = """
import sys
from sharding.sources import open_source
open_source("aflow:")
assert not any(name.startswith("pymatgen") for name in sys.modules), "opening alone must stay cheap"
sys.path.insert(0, sys.argv[1])
from test_aflow import fingerprint, read
print(fingerprint(read("aflow:")))
"""


def read(spec: str, options: ReadOptions | None = None) -> list[Crystal]:
    source = open_source(spec, options)
    found: list[Crystal] = []
    for record in source.records():
        for crystal in source.parse(pickle.loads(pickle.dumps(record))):  # as on its way to a worker
            assert not isinstance(crystal, Refusal)
            found.append(crystal)
    return found


@pytest.fixture(scope="module")
def crystals() -> list[Crystal]:
    return read("aflow:")


@pytest.fixture(scope="module")
def by_key(crystals: list[Crystal]) -> dict[str, Crystal]:
    return {crystal.key: crystal for crystal in crystals}


def fingerprint(crystals: list[Crystal]) -> str:
    digest = hashlib.sha256()
    for c in crystals:
        digest.update(f"{c.key} {c.group}".encode())
        for array in (c.lattice, c.positions, c.atomic_numbers):
            digest.update(array.tobytes())
    return digest.hexdigest()


def structure(crystal: Crystal) -> Structure:
    return Structure(crystal.lattice, crystal.atomic_numbers.tolist(), crystal.positions, coords_are_cartesian=True)


def volume_per_atom(crystal: Crystal) -> float:
    return abs(float(np.linalg.det(crystal.lattice))) / len(crystal.positions)


def shortest_distance(s: Structure) -> float:
    """Shortest distance between two atoms, or an atom and its image, in Å."""
    between = s.distance_matrix + np.diag(np.full(len(s), np.inf))
    shifts = np.array([n for n in np.ndindex(5, 5, 5) if n != (2, 2, 2)]) - 2
    own = np.linalg.norm(shifts @ Lattice(s.lattice.matrix).get_lll_reduced_lattice().matrix, axis=1)
    return min(float(between.min()), float(own.min()))


def test_there_are_as_many_as_asked_for(crystals: list[Crystal]) -> None:
    assert len(crystals) == 3000
    keys = [crystal.key for crystal in crystals]
    assert len(set(keys)) == 3000
    assert all(key.isascii() and key.startswith(f"aflow/{c.group}/") for key, c in zip(keys, crystals, strict=True))
    assert [c.key for c in read("aflow:700")] == keys[:700]
    assert [c.key for c in read("aflow:", ReadOptions(limit=300))] == keys[:300]
    assert [c.key for c in read("aflow:real")] == [c.key for c in read("aflow:288")] == keys[:288]
    assert check(crystals) == {}


def test_the_first_are_the_library_unchanged(crystals: list[Crystal]) -> None:
    from pymatgen.analysis.prototypes._data import AFLOW_PROTOTYPE_LIBRARY

    assert len(AFLOW_PROTOTYPE_LIBRARY) == 288
    for crystal, entry in zip(crystals, AFLOW_PROTOTYPE_LIBRARY, strict=False):
        expected = entry["snl"].structure
        assert crystal.group == entry["tags"]["aflow"]
        assert ">" not in crystal.key
        assert Composition(crystal.key.split("/")[2]).reduced_formula == expected.composition.reduced_formula
        assert crystal.atomic_numbers.tolist() == list(expected.atomic_numbers)
        np.testing.assert_array_equal(crystal.lattice, expected.lattice.matrix)
        np.testing.assert_allclose(crystal.positions, expected.cart_coords, atol=1e-12)


@pytest.mark.parametrize("seed", ["1", "4711"])
def test_same_crystals_in_every_process(crystals: list[Crystal], seed: str) -> None:
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, os.path.dirname(__file__)]
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == fingerprint(crystals)


def test_distinct_and_spread_over_the_prototypes(crystals: list[Crystal]) -> None:
    assert len({(c.group, reduced_formula(c.atomic_numbers)) for c in crystals}) == 3000
    real, rest = crystals[:288], crystals[288:]
    assert {c.group for c in rest} <= {c.group for c in real}
    assert len({c.group for c in real}) == 273
    per_entry = Counter(c.key.split(">")[0] for c in crystals)
    assert set(per_entry) == {c.key for c in real}
    assert max(per_entry.values()) <= 20
    assert median(per_entry.values()) >= 10


def test_substitution_is_one_element_for_one(crystals: list[Crystal], by_key: dict[str, Crystal]) -> None:
    for crystal in crystals[288:]:
        parent = by_key[crystal.key.split(">")[0]]
        became = {(int(a), int(b)) for a, b in zip(parent.atomic_numbers, crystal.atomic_numbers, strict=True)}
        old, new = {a for a, _ in became}, {b for _, b in became}
        assert len(became) == len(old) == len(new)
        assert all(b not in old for a, b in became if a != b)
        assert any(a != b for a, b in became)
        for z in new:
            element = Element.from_Z(z)
            assert z <= 83
            assert not element.is_noble_gas
            assert not element.is_radioactive
        grown = crystal.lattice @ np.linalg.inv(parent.lattice)
        np.testing.assert_allclose(grown, np.eye(3) * grown[0, 0], atol=1e-9)


def test_no_atoms_on_top_of_each_other(crystals: list[Crystal], by_key: dict[str, Crystal]) -> None:
    for crystal in crystals[::8]:
        s = structure(crystal)
        assert shortest_distance(s) > 0.7
        assert 1.5 < volume_per_atom(crystal) < 500
        assert 0.4 < volume_per_atom(crystal) / volume_per_atom(by_key[crystal.key.split(">")[0]]) < 2.5


def test_space_group_of_the_prototype(crystals: list[Crystal], by_key: dict[str, Crystal]) -> None:
    for crystal in crystals[300::120]:
        parent = by_key[crystal.key.split(">")[0]]
        growth = float(np.cbrt(volume_per_atom(crystal) / volume_per_atom(parent)))
        before = SpacegroupAnalyzer(structure(parent), symprec=1e-2)
        after = SpacegroupAnalyzer(structure(crystal), symprec=1e-2 * growth)
        assert after.get_space_group_number() == before.get_space_group_number(), crystal.key


@pytest.mark.parametrize(
    ("parent", "charges"),
    [
        ("aflow/AB_cF8_225_a_b/NaCl", (1, -1)),
        ("aflow/A2B_tP6_136_f_a/TiO2", (4, -2)),
        ("aflow/AB2_cF12_225_a_c/CaF2", (2, -1)),
        ("aflow/A2B3_hR10_167_c_e/Al2O3", (3, -2)),
        ("aflow/AB3C_cP5_221_a_c_b/CaTiO3", (2, 4, -2)),
        ("aflow/A2BC4_cF56_227_d_a_e/MgAl2O4", (2, 3, -2)),
        ("aflow/ABC3_hR10_167_a_b_e/LiNbO3", (1, 5, -2)),
    ],
)
def test_ions_keep_their_charge(crystals: list[Crystal], parent: str, charges: tuple[int, ...]) -> None:
    children = [c.key.split(">")[1] for c in crystals if c.key.startswith(f"{parent}>")]
    assert len(children) >= 5
    for formula in children:
        composition = Composition(formula)  # keeps the order of the formula, which is that of the parent
        expected = {element.symbol: charge for element, charge in zip(composition, charges, strict=True)}
        assert sum(composition[symbol] * charge for symbol, charge in expected.items()) == 0
        assert expected in composition.oxi_state_guesses(all_oxi_states=True), formula


@pytest.mark.parametrize(
    ("key", "volume"),  # measured, Å³ per atom
    [
        ("aflow/AB_cF8_225_a_b/NaCl>KBr", 6.600**3 / 8),
        ("aflow/AB_cF8_225_a_b/NaCl>LiCl", 5.140**3 / 8),
        ("aflow/AB_cP2_221_b_a/CsCl>TlBr", 3.985**3 / 2),
        ("aflow/A2BC4_cF56_227_d_a_e/MgAl2O4>CoFe2O4", 8.39**3 / 56),
        ("aflow/A2B_tP6_136_f_a/TiO2>SnO2", 4.737**2 * 3.186 / 6),
        ("aflow/AB2_cF12_225_a_c/CaF2>BaF2", 6.200**3 / 12),
        ("aflow/AB_cF8_216_c_a/ZnS>CdSe", 6.050**3 / 8),
        ("aflow/A_cF4_225_a/Cu>Au", 4.078**3 / 4),
        ("aflow/A_cI2_229_a/W>Nb", 3.301**3 / 2),
    ],
)
def test_volume_of_compounds_that_exist(by_key: dict[str, Crystal], key: str, volume: float) -> None:
    assert volume_per_atom(by_key[key]) == pytest.approx(volume, rel=0.12)


def test_asking_for_more_than_there_are_is_said(caplog: pytest.LogCaptureFixture) -> None:
    everything = {record.payload.key for record in open_source("aflow:1000000").records()}
    assert 3000 < len(everything) < 1_000_000
    assert f"has only {len(everything)} crystals" in caplog.text


@pytest.mark.parametrize("spec", ["aflow:many", "aflow:-3", "aflow:1.5"])
def test_a_wrong_specification_is_refused(spec: str) -> None:
    with pytest.raises(SourceError, match="aflow:500"):
        open_source(spec)


def test_labels_are_refused_and_the_origin_is_stated() -> None:
    with pytest.raises(SourceError, match="band_gap"):
        open_source("aflow:", ReadOptions(labels={"band_gap": "gap"}))
    source = open_source("aflow:")
    assert source.name == "aflow:"
    assert "10.1016/j.commatsci.2017.01.017" in source.cite
    assert "MIT" in source.licence
