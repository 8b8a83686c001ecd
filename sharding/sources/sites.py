"""What several readers share about cells and sites: cell parameters, disorder, symmetry."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sharding.crystal import RefusedError
from sharding.sources import ReadOptions

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

SAME: Final = 0.1  # Å; positions closer than that are one site, written with rounding
EXCLUSIVE: Final = 0.7  # Å; of two partly occupied sites that close, one is occupied at a time
FULL: Final = 1e-3  # an occupancy that near to 1 is 1
MAX_PAIRS: Final = 2**20


def lattice_of(a: float, b: float, c: float, alpha: float, beta: float, gamma: float) -> Floats:
    """Cell vectors of cell parameters, rows in Å: a along x, b in the xy plane.

    Raises:
        RefusedError: ``singular_cell`` where there is no such cell.
    """
    cos_a, cos_b, cos_g = _cos(alpha), _cos(beta), _cos(gamma)
    sin_g = math.sqrt(1 - cos_g**2)
    squared = 1 - cos_a**2 - cos_b**2 - cos_g**2 + 2 * cos_a * cos_b * cos_g
    if not (min(a, b, c, alpha, beta, gamma, sin_g, squared) > 0 and max(alpha, beta, gamma) < 180):
        raise RefusedError("singular_cell", f"there is no cell {a:g} {b:g} {c:g} {alpha:g} {beta:g} {gamma:g}")
    rows = [
        [a, 0, 0],
        [b * cos_g, b * sin_g, 0],
        [c * cos_b, c * (cos_a - cos_b * cos_g) / sin_g, c * math.sqrt(squared) / sin_g],
    ]
    return np.array(rows, dtype=np.float64)


def _cos(degrees: float) -> float:
    """The cosine, and 0 for 90° exactly: 6e-17 would tilt every rectangular cell."""
    return 0.0 if degrees == 90 else math.cos(math.radians(degrees))


def check_occupancy(occupancy: Floats, options: ReadOptions) -> bool:
    """Whether any site is partly occupied.

    Raises:
        RefusedError: ``partial_occupancy``, unless the options allow it; ``unparsable`` where it is no share.
    """
    low, high = occupancy.min(initial=1.0), occupancy.max(initial=1.0)
    if not (low >= 0 and high <= 1 + FULL):
        raise RefusedError("unparsable", f"an occupancy is not between 0 and 1: {low:g}, {high:g}")
    if low >= 1 - FULL:
        return False
    partial = int(((occupancy > 0) & (occupancy < 1 - FULL)).sum())  # an empty site is no site
    if partial and options.occupancy == "refuse":
        text = f"{partial} of {len(occupancy)} sites are partly occupied"
        raise RefusedError("partial_occupancy", f"{text}; occupancy='majority' keeps the commonest species")
    return partial > 0


def majority(fractional: Floats, lattice: Floats, occupancy: Floats) -> Indices:
    """The sites to keep of a disordered crystal.

    At each place the species with the largest share, unless the place is more often empty than not; of places too
    close to be occupied together the one with the larger share. The first one listed where they are equal.
    """
    kept = occupancy >= 1 - FULL
    for i in np.argsort(-occupancy, kind="stable"):
        if kept[i] or occupancy[i] == 0:
            continue
        distance = _distances(fractional, fractional[i], lattice)
        share = occupancy[distance < SAME].sum()
        kept[i] = share >= 0.5 - FULL and not (kept & (distance < EXCLUSIVE)).any()
    return np.flatnonzero(kept)


def expand(
    fractional: Floats, numbers: NDArray[np.uint8] | None, lattice: Floats, rotations: Floats, translations: Floats
) -> tuple[Floats, Indices]:
    """Fill a cell from its asymmetric unit.

    Args:
        fractional: (n, 3), the sites of the asymmetric unit.
        numbers: (n,), their species, with which sites that are images of another are left out; None to leave them.
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
    first = np.ones(images.shape[:2], bool)  # (n, m): images that are not there yet
    multiplicity = fixed.sum(axis=1)  # (n,): how often each image comes
    for i in np.flatnonzero(multiplicity > 1):
        first[i] = _first(images[i], lattice, len(rotations) // multiplicity[i])
    if numbers is not None:
        first[_repeated(fractional, numbers, images, lattice)] = False
    site = np.repeat(np.arange(len(images)), first.sum(axis=1))
    return images[first], site


def _first(images: Floats, lattice: Floats, expected: int) -> NDArray[np.bool_]:
    """Which of some positions (m, 3) have not come before."""
    cells = np.rint(images * 10**6).astype(np.int64) % 10**6
    _, index = np.unique(cells @ np.array([1, 10**6, 10**12]), return_index=True)
    if len(index) == expected:
        first = np.zeros(len(images), bool)
        first[index] = True
        return first
    # two roundings of one position, or operations that are no group: compare all with all
    same = _distances(images[:, None], images, lattice) < SAME
    return same.argmax(axis=1) == np.arange(len(same))


def _repeated(fractional: Floats, numbers: NDArray[np.uint8], images: Floats, lattice: Floats) -> list[int]:
    """Sites that are an image of an earlier one: some writers list the whole cell and its symmetry too."""
    repeated = []
    n, m = images.shape[:2]
    step = max(1, MAX_PAIRS // (n * m))  # rows at a time, so that memory stays bounded
    for begin in range(1, n, step):
        rows = np.arange(begin, min(begin + step, n))
        same = _distances(fractional[rows][:, None, None], images[None, : rows[-1]], lattice) < SAME
        same &= (np.arange(rows[-1]) < rows[:, None])[:, :, None]
        for row, earlier in zip(*np.nonzero(same.any(axis=2)), strict=True):
            if numbers[rows[row]] != numbers[earlier]:
                raise RefusedError("unparsable", "different elements are at one place")
            repeated.append(int(rows[row]))
    return repeated


def _distances(a: Floats, b: Floats, lattice: Floats) -> Floats:
    """Distances between fractional positions and the nearest images of others, in Å; exact where they are small."""
    shift = a - b
    shift -= np.round(shift)
    return np.linalg.norm(shift @ lattice, axis=-1)
