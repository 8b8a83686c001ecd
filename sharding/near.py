"""Which atoms of a large cell may be within the cutoff of another: the neighbour search need not try all pairs.

An atom lies on a layer parallel to each face of the cell. Two atoms whose layers are farther apart than the cutoff,
periodic images included, have no edge; and atoms are sorted into bins no thinner than the cutoff, where that
leaves out more than it costs.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sharding.jit import compiled

Array = NDArray[Any]

BINNED: Final = 64  # atoms; of fewer, all are looked at
SLACK: Final = 1e-6  # Å, for the rounding of layers


@compiled
def bins_of(heights: Array, cutoff: float, n_atoms: int) -> Array:
    """Into how many bins each axis of a cell is cut: (3,).

    None is thinner than the cutoff, so that neighbours are in the same bin or the next. An axis with fewer than four is
    not cut: the bins around an atom would be nearly all.
    """
    bins = np.ones(3, np.int64)
    if n_atoms >= BINNED:
        for k in range(3):
            fit = int(heights[k] / (cutoff + SLACK))
            if fit >= 4:
                bins[k] = fit
    return bins


@compiled
def fill_bins(fractional: Array, bins: Array) -> tuple[Array, Array]:
    """The atoms of each bin: bin b has ``members[ends[b] : ends[b + 1]]``, in ascending order."""
    of_atom = np.empty(len(fractional), np.int64)
    ends = np.zeros(bins.prod() + 1, np.int64)
    for i in range(len(fractional)):
        number = 0
        for k in range(3):
            number = number * bins[k] + min(int(fractional[i, k] * bins[k]), bins[k] - 1)
        of_atom[i] = number
        ends[number + 1] += 1
    ends = np.cumsum(ends)
    at = ends.copy()
    members = np.empty(len(fractional), np.int64)
    for i in range(len(fractional)):
        members[at[of_atom[i]]] = i
        at[of_atom[i]] += 1
    return ends, members


@compiled
def near_atoms(
    fractional: Array, heights: Array, cutoff: float, bins: Array, ends: Array, members: Array, i: int, near: Array
) -> int:
    """Set ``near`` to the atoms from i on that may be within the cutoff of atom i; returns how many they are.

    Args:
        fractional: (n, 3) positions in units of the cell vectors, in [0, 1).
        heights: (3,) distances between opposite faces, Å.
        cutoff: Å.
        bins, ends, members: of ``bins_of`` and ``fill_bins``; not used where there is one bin.
        i: the atom.
        near: (n,) to be set; in ascending order inside a bin.
    """
    count = 0
    if bins[0] * bins[1] * bins[2] == 1:
        for j in range(i, len(fractional)):
            near[count] = j
            count += 1
    else:
        at = np.empty(3, np.int64)
        reach = np.empty(3, np.int64)
        for k in range(3):
            at[k] = min(int(fractional[i, k] * bins[k]), bins[k] - 1)
            reach[k] = 1 if bins[k] > 1 else 0
        for a in range(at[0] - reach[0], at[0] + reach[0] + 1):
            for b in range(at[1] - reach[1], at[1] + reach[1] + 1):
                for c in range(at[2] - reach[2], at[2] + reach[2] + 1):
                    number = (a % bins[0] * bins[1] + b % bins[1]) * bins[2] + c % bins[2]
                    for m in range(ends[number], ends[number + 1]):
                        near[count] = members[m]
                        count += members[m] >= i
    f0, f1, f2 = fractional[i, 0], fractional[i, 1], fractional[i, 2]
    r0, r1, r2 = (cutoff + SLACK) / heights[0], (cutoff + SLACK) / heights[1], (cutoff + SLACK) / heights[2]
    found = 0
    for m in range(count):  # without a branch: whether an atom is near cannot be predicted
        j = near[m]
        d0 = abs(fractional[j, 0] - f0)
        d1 = abs(fractional[j, 1] - f1)
        d2 = abs(fractional[j, 2] - f2)
        near[found] = j
        found += (min(d0, 1 - d0) <= r0) & (min(d1, 1 - d1) <= r1) & (min(d2, 1 - d2) <= r2)
    return found


@compiled
def sort_by_dst(dst: Array, shift: Array) -> None:
    """Sort the edges of one atom, which are few, in place; edges to one other atom stay in their order."""
    for e in range(1, len(dst)):
        j, na, nb, nc = dst[e], shift[e, 0], shift[e, 1], shift[e, 2]
        to = e
        while to > 0 and dst[to - 1] > j:
            dst[to] = dst[to - 1]
            shift[to, 0], shift[to, 1], shift[to, 2] = shift[to - 1, 0], shift[to - 1, 1], shift[to - 1, 2]
            to -= 1
        dst[to] = j
        shift[to, 0], shift[to, 1], shift[to, 2] = na, nb, nc
