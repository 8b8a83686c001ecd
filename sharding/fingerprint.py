"""A crystal fingerprint, invariant to the choice of cell, origin and orientation, to mirroring, and to atom order.

For each pair of kinds of atoms (a, b), a the more common, it holds the distance from an atom of kind a to its nearest,
second nearest, … atom of kind b, averaged over the atoms of kind a, in units of (volume per atom)^(1/3). This is the
average minimum distance of Widdowson et al. (MATCH Commun. Math. Comput. Chem. 87, 529, 2022;
doi:10.46793/match.87-3.529W), resolved by element: distances that ignore the elements cannot tell apart orderings of
the same sites, as in alloys or double perovskites. Counted from the more common kind, as many numbers reach farther.

It is exact: the search for the nearest atoms misses none in any cell. It is continuous: moving every atom by at most
ε changes no component by more than 2ε / (V/N)^(1/3). It is not complete: different crystals can share it, as
long-period stacking variants nearly do. Lengths are normalised, since density functionals disagree on lattice constants
by a few per cent; where scale matters, the volume per atom is compared as well.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sharding.graph import offsets, upper_triangular
from sharding.jit import compiled

Array = NDArray[Any]

NEAR_SLOTS: Final = 48  # components by which crystals are compared
FAR_SLOTS: Final = 16  # further ones, which tell duplicates from stacking variants of the same layers
FAR_BLOCK: Final = 8  # neighbours averaged into each of these
WIDTH: Final = NEAR_SLOTS + FAR_SLOTS
MAX_KINDS: Final = 9  # 45 pairs; in crystals with more elements, all beyond the eighth count as one kind
MARGIN: Final = 0.2  # added to the first search radius, in (V/N)^(1/3) of the kind sought; affects only speed
GROWTH: Final = 1.3  # factor for the search radius if it held too few atoms


def fingerprints(
    lattice: Array, positions: Array, atomic_numbers: NDArray[np.uint8], n_atoms: NDArray[Any]
) -> NDArray[np.float32]:
    """Compute the fingerprints of G crystals with N atoms in total, from flat arrays like those of ``Multigraphs``.

    Args:
        lattice: (G, 3, 3) rows, Å; not singular.
        positions: (N, 3) Cartesian, Å; wrapped or not.
        atomic_numbers: (N,)
        n_atoms: (G,) all at least 1.

    Returns:
        (G, 64) in units of (V/N)^(1/3). Kinds are ordered by count, the commonest first, and by atomic number where
        counts are equal. The pairs (0, 0), (0, 1), …, (1, 1), … share the first 48 components evenly, in ascending
        order inside a pair. The other 16 are the 128 nearest among the rarest kind, averaged in blocks of 8. Only
        fingerprints of the same reduced formula can be compared.
    """
    vectors = np.asarray(lattice, np.float64).reshape(-1, 3, 3)
    longest_first = np.argsort(-np.linalg.norm(vectors, axis=2), axis=1, kind="stable")  # few, long inner loops
    cells, rotation = upper_triangular(np.take_along_axis(vectors, longest_first[..., None], axis=1))
    out = np.empty((len(cells), WIDTH), np.float32)
    _fill(cells, rotation, np.asarray(positions, np.float64), np.asarray(atomic_numbers), offsets(n_atoms), out)
    return out


def distance(a: Array, b: Array) -> Any:
    """The distance of two crystals with the same reduced formula: the largest difference of the first 48 components.

    Args:
        a, b: (..., 64) fingerprints; they broadcast.

    Returns:
        (...) in units of (V/N)^(1/3), which is 2 to 3 Å: about 1e-6 for one crystal in two cells, 0.02 for one crystal
        relaxed with two functionals, mostly over 0.3 for two structure types. The thresholds are in ``sharding.twins``.
    """
    return np.abs(np.asarray(a)[..., :NEAR_SLOTS] - np.asarray(b)[..., :NEAR_SLOTS]).max(axis=-1)


def volume_per_atom(lattice: Array, n_atoms: NDArray[Any]) -> NDArray[np.float64]:
    """The volume per atom, which the fingerprint leaves out: (G, 3, 3), (G,) → (G,), Å³."""
    return np.abs(np.linalg.det(np.asarray(lattice, np.float64))) / n_atoms


@compiled
def _fill(cells: Array, rotation: Array, positions: Array, numbers: Array, starts: Array, out: Array) -> None:
    """Set the fingerprint of every crystal.

    Args:
        cells: (G, 3, 3) upper triangular lattices, rows, Å.
        rotation: (G, 3, 3) from the original axes to the axes of ``cells``.
        positions: (N, 3) in the original axes, Å.
        numbers: (N,) atomic numbers.
        starts: (G + 1,) first atom of each crystal.
        out: (G, WIDTH) to be set.
    """
    best = np.empty(FAR_SLOTS * FAR_BLOCK)
    mean = np.empty(len(best))
    for g in range(len(cells)):
        n = starts[g + 1] - starts[g]
        order, bounds = _by_kind(numbers[starts[g] : starts[g + 1]])
        points = np.empty((n, 3))
        for i in range(n):
            x = positions[starts[g] + order[i]]
            for axis in range(3):
                points[i, axis] = (
                    x[0] * rotation[g, 0, axis] + x[1] * rotation[g, 1, axis] + x[2] * rotation[g, 2, axis]
                )
        volume = cells[g, 0, 0] * cells[g, 1, 1] * cells[g, 2, 2]
        unit = (volume / n) ** (1 / 3)
        kinds = len(bounds) - 1
        pairs = kinds * (kinds + 1) // 2
        pair = 0
        for a in range(kinds):
            for b in range(a, kinds):
                low, high = NEAR_SLOTS * pair // pairs, NEAR_SLOTS * (pair + 1) // pairs
                k = len(mean) if pair == pairs - 1 else high - low  # the last pair, of the rarest kind, looks farther
                _mean_distances(cells[g], points, bounds, a, b, best, mean[:k])
                for m in range(high - low):
                    out[g, low + m] = mean[m] / unit
                pair += 1
        for m in range(FAR_SLOTS):
            out[g, NEAR_SLOTS + m] = mean[m * FAR_BLOCK : (m + 1) * FAR_BLOCK].mean() / unit


@compiled
def _mean_distances(cell: Array, points: Array, bounds: Array, a: int, b: int, best: Array, mean: Array) -> None:
    """Set ``mean[m]`` to the distance from an atom of kind a to its m-th nearest of kind b, averaged over kind a, Å.

    ``best`` is a work array at least as long as ``mean``.
    """
    k = len(mean)
    per_atom = cell[0, 0] * cell[1, 1] * cell[2, 2] / (bounds[b + 1] - bounds[b])
    radius = ((3 / (4 * np.pi) * k) ** (1 / 3) + MARGIN) * per_atom ** (1 / 3)
    mean[:] = 0.0
    for i in range(bounds[a], bounds[a + 1]):
        reach = radius
        while _nearest(cell, points, i, bounds[b], bounds[b + 1], k, reach, best) < k:
            reach *= GROWTH
        for m in range(k):
            mean[m] += np.sqrt(best[m])
    mean /= bounds[a + 1] - bounds[a]


@compiled
def _by_kind(numbers: Array) -> tuple[Array, Array]:
    """Order of the atoms by kind, and where each kind begins and the last ends: (n,) → (n,), (kinds + 1,)."""
    counts = np.zeros(256, np.int64)
    for z in numbers:
        counts[z] += 1
    found = np.argsort(-counts, kind="mergesort")  # stable: the smaller atomic number first where counts are equal
    elements = 0
    while elements < 256 and counts[found[elements]] > 0:
        elements += 1
    kind = np.zeros(256, np.int64)
    bounds = np.zeros(min(elements, MAX_KINDS) + 1, np.int64)
    for e in range(elements):
        kind[found[e]] = min(e, MAX_KINDS - 1)
        bounds[min(e, MAX_KINDS - 1) + 1] += counts[found[e]]
    bounds = np.cumsum(bounds)
    following = bounds.copy()
    order = np.empty(len(numbers), np.int64)
    for i in range(len(numbers)):
        order[following[kind[numbers[i]]]] = i
        following[kind[numbers[i]]] += 1
    return order, bounds


@compiled
def _nearest(cell: Array, points: Array, i: int, first: int, last: int, k: int, radius: float, best: Array) -> int:
    """Find the k images of atoms first … last − 1 that are nearest to atom i, excluding atom i itself.

    Images inside a sphere are enumerated as in ``neighbours``; it shrinks to the k-th distance once k are known.

    Args:
        cell: (3, 3) upper triangular, rows, Å.
        points: (n, 3) in the same axes, Å.
        i, first, last, k: as above.
        radius: of the sphere, Å.
        best: set to their squared distances, ascending, Å².

    Returns:
        How many there are within the radius, at most k. If fewer than k, ``best`` is not meaningful.
    """
    a0, a1, a2 = cell[0, 0], cell[0, 1], cell[0, 2]
    b1, b2, c2 = cell[1, 1], cell[1, 2], cell[2, 2]
    per_a, per_b, per_c = 1 / a0, 1 / b1, 1 / c2
    limit = radius * radius
    found = 0
    for j in range(first, last):
        x0 = points[j, 0] - points[i, 0]
        y0 = points[j, 1] - points[i, 1]
        z0 = points[j, 2] - points[i, 2]
        reach = np.sqrt(limit)
        for na in range(int(np.ceil((-reach - x0) * per_a)), int(np.floor((reach - x0) * per_a)) + 1):
            x = x0 + na * a0
            if x * x > limit:
                continue
            room = np.sqrt(limit - x * x)
            y1 = y0 + na * a1
            z1 = z0 + na * a2
            for nb in range(int(np.ceil((-room - y1) * per_b)), int(np.floor((room - y1) * per_b)) + 1):
                y = y1 + nb * b1
                flat = x * x + y * y
                if flat > limit:
                    continue
                left = np.sqrt(limit - flat)
                z2 = z1 + nb * b2
                for nc in range(int(np.ceil((-left - z2) * per_c)), int(np.floor((left - z2) * per_c)) + 1):
                    z = z2 + nc * c2
                    squared = flat + z * z
                    if squared > limit or (i == j and na == 0 and nb == 0 and nc == 0):
                        continue
                    m = min(found, k - 1)
                    while m > 0 and best[m - 1] > squared:
                        best[m] = best[m - 1]
                        m -= 1
                    best[m] = squared
                    found = min(found + 1, k)
                    if found == k:
                        limit = best[k - 1]
    return found
