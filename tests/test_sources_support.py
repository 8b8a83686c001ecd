"""Helpers shared by the tests of the sources; contains no tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen.core import Structure

from sharding.crystal import SYMBOLS, Crystal, Refusal
from sharding.sources import ReadOptions, open_source, parse_records

CHOSEN = (0, 5, 17, 55, 70, 88, 120, 150, 200, 240)  # of the AFLOW prototypes: 2 to 40 atoms, all crystal systems


def structures_of(crystals: list[Crystal]) -> list[Structure]:
    """Ten prototypes as pymatgen structures."""
    return [
        Structure(
            crystals[i].lattice,
            [SYMBOLS[z] for z in crystals[i].atomic_numbers],
            crystals[i].positions,
            coords_are_cartesian=True,
        )
        for i in CHOSEN
    ]


def read(spec: str | Path, **options: Any) -> tuple[list[Crystal], list[Refusal]]:
    """All crystals and refusals of a source."""
    source = open_source(str(spec), ReadOptions(**options))
    return sort(parse_records(source, source.records()))


def sort(items: Iterable[Crystal | Refusal]) -> tuple[list[Crystal], list[Refusal]]:
    """Crystals and refusals apart."""
    found = list(items)
    return [i for i in found if isinstance(i, Crystal)], [i for i in found if isinstance(i, Refusal)]


def assert_same(crystal: Crystal, structure: Structure, tolerance: float = 1e-3) -> None:
    """The same crystal, up to a rotation, the order of atoms, and whole lattice vectors."""
    assert crystal.lattice.dtype == crystal.positions.dtype == np.float64
    assert crystal.atomic_numbers.dtype == np.uint8
    numbers = np.array([site.specie.Z for site in structure])
    assert sorted(crystal.atomic_numbers) == sorted(numbers)
    lattice = structure.lattice.matrix
    np.testing.assert_allclose(crystal.lattice @ crystal.lattice.T, lattice @ lattice.T, atol=1e-3)
    fractional = crystal.positions @ np.linalg.inv(crystal.lattice)
    taken = np.zeros(len(numbers), bool)
    for z, position in zip(crystal.atomic_numbers, fractional, strict=True):
        shift = structure.frac_coords - position
        distance = np.linalg.norm((shift - np.round(shift)) @ lattice, axis=1)
        distance[taken | (numbers != z)] = np.inf
        assert distance.min() < tolerance
        taken[distance.argmin()] = True


def assert_all_same(crystals: list[Crystal], structures: list[Structure]) -> None:
    """The same crystals in the same order."""
    assert len(crystals) == len(structures)
    for crystal, structure in zip(crystals, structures, strict=True):
        assert_same(crystal, structure)
