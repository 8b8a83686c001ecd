"""Shared by several readers: cell parameters and site disorder."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sharding.crystal import RefusedError
from sharding.sources import ReadOptions

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

SAME: Final = 0.1  # Å; positions closer than this are one site, but for rounding
EXCLUSIVE: Final = 0.7  # Å; of two partly occupied sites this close, only one is occupied at a time
FULL: Final = 1e-3  # an occupancy this close to 1 counts as 1


def lattice_of(a: float, b: float, c: float, alpha: float, beta: float, gamma: float) -> Floats:
    """Cell vectors from cell parameters, rows in Å: a along x, b in the xy plane.

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
        raise RefusedError(
            "partial_occupancy", f"{text}; `cdssl shard --occupancy majority` keeps the commonest species"
        )
    return partial > 0


def majority(fractional: Floats, lattice: Floats, occupancy: Floats) -> Indices:
    """Choose the sites to keep in a disordered crystal.

    At each place, keep the species with the largest share, unless the place is more often empty than not; of places too
    close to be occupied together, keep the one with the larger share. Ties go to the first one listed.
    """
    kept = occupancy >= 1 - FULL
    for i in np.argsort(-occupancy, kind="stable"):
        if kept[i] or occupancy[i] == 0:
            continue
        distance = distances(fractional, fractional[i], lattice)
        share = occupancy[distance < SAME].sum()
        kept[i] = share >= 0.5 - FULL and not (kept & (distance < EXCLUSIVE)).any()
    return np.flatnonzero(kept)


def distances(a: Floats, b: Floats, lattice: Floats) -> Floats:
    """Distances between fractional positions and the nearest images of others, in Å; exact where they are small."""
    shift = a - b
    shift -= np.round(shift)
    return np.linalg.norm(shift @ lattice, axis=-1)
