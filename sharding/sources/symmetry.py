"""Symmetry operations of a CIF, and the cell that they fill."""

from __future__ import annotations

import functools
from typing import Final

import gemmi
import numpy as np
from numpy.typing import NDArray

from sharding.crystal import RefusedError
from sharding.sources.sites import SAME, Floats, Indices, distances

OPERATIONS: Final = ("_symmetry_equiv_pos_as_xyz", "_space_group_symop_operation_xyz")
GROUPS: Final = (
    "_space_group_name_Hall",
    "_symmetry_space_group_name_Hall",
    "_space_group_name_H-M_alt",
    "_symmetry_space_group_name_H-M",
    "_space_group_IT_number",
    "_symmetry_Int_Tables_number",
)
MAGNETIC: Final = ("_space_group_symop_magn_operation.xyz", "_space_group_symop_magn_operation_xyz")
MAX_PAIRS: Final = 2**20  # distances computed at once

Operations = tuple[Floats, Floats]  # rotations (m, 3, 3) and translations (m, 3) of fractional columns


class AmbiguousCifError(Exception):
    """A CIF can be read in more than one way."""


def unknown(value: str | None) -> bool:
    """Whether a CIF value is missing or unknown."""
    return value in (None, "", "?", ".")


def operations_of(block: gemmi.cif.Block, *, alpha: float, gamma: float) -> Operations | None:
    """The symmetry operations of a CIF; None where there is only the identity.

    Args:
        block: the block of the CIF.
        alpha: angle of the cell, in degrees: a rhombohedral group has two settings.
        gamma: angle of the cell, in degrees.

    Raises:
        AmbiguousCifError: if they are ambiguous, unknown or magnetic.
        RuntimeError: if gemmi cannot read them.
    """
    for tag in OPERATIONS:
        listed = block.find_values(tag)
        if len(listed):
            return _matrices(tuple(listed))
    if any(block.find_values(tag) for tag in MAGNETIC):
        raise AmbiguousCifError("the symmetry is magnetic")
    for tag in GROUPS:
        name = block.find_value(tag)
        if not unknown(name):
            return _named(tag, gemmi.cif.as_string(name), alpha, gamma)
    return None


@functools.lru_cache(maxsize=512)
def _named(tag: str, name: str, alpha: float, gamma: float) -> Operations | None:
    """The operations of a space group by its Hall or Hermann-Mauguin symbol, or its number."""
    if "Hall" in tag:
        return _matrices(tuple(op.triplet() for op in gemmi.symops_from_hall(name)))
    if name.isdecimal():
        group = gemmi.find_spacegroup_by_number(int(name))
        name = group.hm if group else name
    group = gemmi.find_spacegroup_by_name(name, alpha, gamma)
    if group is None:
        raise AmbiguousCifError(f"the space group {name!r} is not known")
    if group.ext in ("1", "2") and ":" not in name:
        raise AmbiguousCifError(f"the space group {name!r} has two origins in use")
    return _matrices(tuple(op.triplet() for op in group.operations()))


@functools.lru_cache(maxsize=512)
def _matrices(triplets: tuple[str, ...]) -> Operations | None:
    operations = [gemmi.Op(gemmi.cif.as_string(triplet)) for triplet in triplets]
    if len(operations) == 1 and operations[0] == gemmi.Op():
        return None
    rotations = np.array([op.rot for op in operations], np.float64) / gemmi.Op.DEN
    return rotations, np.array([op.tran for op in operations], np.float64) / gemmi.Op.DEN


def expand(
    fractional: Floats, numbers: NDArray[np.uint8] | None, lattice: Floats, rotations: Floats, translations: Floats
) -> tuple[Floats, Indices]:
    """Fill a cell from its asymmetric unit.

    Args:
        fractional: (n, 3), the sites of the asymmetric unit.
        numbers: (n,), their species, to drop sites that are images of another site; None to keep all sites.
        lattice: (3, 3), rows in Å.
        rotations: (m, 3, 3), of the symmetry operations.
        translations: (m, 3).

    Returns:
        Fractional positions (N, 3) and, for each, the site it comes from (N,).

    Raises:
        RefusedError: ``unparsable`` where images of different species coincide.
    """
    images = np.einsum("mij,nj->nmi", rotations, fractional) + translations
    shift = images - fractional[:, None]
    shift -= np.round(shift)
    fixed = np.linalg.norm(shift @ lattice, axis=2) < SAME  # (n, m): operations that map a site to itself
    # the mean over these operations lies on the special position exactly: 0.3333 becomes 1/3
    fractional = fractional + np.einsum("nm,nmi->ni", fixed, shift) / np.maximum(fixed.sum(axis=1), 1)[:, None]
    images = (np.einsum("mij,nj->nmi", rotations, fractional) + translations) % 1
    first = np.ones(images.shape[:2], bool)  # (n, m): images that do not repeat an earlier one
    multiplicity = fixed.sum(axis=1)  # (n,): how often each image comes
    for i in np.flatnonzero(multiplicity > 1):
        first[i] = _first(images[i], lattice, len(rotations) // multiplicity[i])
    if numbers is not None:
        first[_repeated(fractional, numbers, images, lattice)] = False
    site = np.repeat(np.arange(len(images)), first.sum(axis=1))
    return images[first], site


def _first(images: Floats, lattice: Floats, expected: int) -> NDArray[np.bool_]:
    """Mask of the positions (m, 3) that do not repeat an earlier one."""
    cells = np.rint(images * 10**6).astype(np.int64) % 10**6
    _, index = np.unique(cells @ np.array([1, 10**6, 10**12]), return_index=True)
    if len(index) == expected:
        first = np.zeros(len(images), bool)
        first[index] = True
        return first
    # two roundings of one position, or operations that do not form a group: compare all pairs
    same = distances(images[:, None], images, lattice) < SAME
    return same.argmax(axis=1) == np.arange(len(same))


def _repeated(fractional: Floats, numbers: NDArray[np.uint8], images: Floats, lattice: Floats) -> list[int]:
    """Sites that are an image of an earlier one: some writers list the whole cell and its symmetry too."""
    repeated = []
    n, m = images.shape[:2]
    step = max(1, MAX_PAIRS // (n * m))  # rows at a time, so that memory stays bounded
    for begin in range(1, n, step):
        rows = np.arange(begin, min(begin + step, n))
        same = distances(fractional[rows][:, None, None], images[None, : rows[-1]], lattice) < SAME
        same &= (np.arange(rows[-1]) < rows[:, None])[:, :, None]
        for row, earlier in zip(*np.nonzero(same.any(axis=2)), strict=True):
            if numbers[rows[row]] != numbers[earlier]:
                raise RefusedError("unparsable", "different elements are at one place")
            repeated.append(int(rows[row]))
    return repeated
