"""The neighbour search: which images of which atoms of a crystal lie within the cutoff of each atom.

All in one file, because numba's cache of a function does not notice changes in functions it calls from other files.

For atoms i, j it lists the integer shifts n with ‖x_j + nL − x_i‖ ≤ r as lattice points in a ball (Fincke and Pohst
1985): in axes where L is upper triangular, n_a is bounded by the first coordinate alone, n_b by the second given n_a,
and n_c by the third. Few shifts are tried that are not edges, no image box has to be guessed, and the shifts come out
in lexicographic order, which is the order stored.

In large cells not all pairs are tried. An atom lies on a layer parallel to each face of the cell; two atoms whose
layers are farther apart than the cutoff, periodic images included, have no edge; and atoms are sorted into bins no
thinner than the cutoff, where that saves more than it costs.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sharding.jit import compiled

Array = NDArray[Any]

BINNED: Final = 64  # atoms; smaller cells are not binned
SLACK: Final = 1e-6  # Å, for the rounding of layers


@compiled
def _bins_of(heights: Array, cutoff: float, n_atoms: int) -> Array:
    """The number of bins along each axis of a cell: (3,).

    No bin is thinner than the cutoff, so neighbours are in the same bin or an adjacent one. An axis that would have
    fewer than four bins is not divided: the bins around an atom would be nearly all of them.
    """
    bins = np.ones(3, np.int64)
    if n_atoms >= BINNED:
        for k in range(3):
            fit = int(heights[k] / (cutoff + SLACK))
            if fit >= 4:
                bins[k] = fit
    return bins


@compiled
def _fill_bins(fractional: Array, bins: Array) -> tuple[Array, Array]:
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
def _near_atoms(
    fractional: Array, heights: Array, cutoff: float, bins: Array, ends: Array, members: Array, i: int, near: Array
) -> int:
    """Set ``near`` to the atoms j ≥ i that may be within the cutoff of atom i, and return how many there are.

    Args:
        fractional: (n, 3) positions in units of the cell vectors, in [0, 1).
        heights: (3,) distances between opposite faces, Å.
        cutoff: Å.
        bins, ends, members: from ``_bins_of`` and ``_fill_bins``; unused if there is only one bin.
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
    for m in range(count):  # branch-free, since the branch would be unpredictable
        j = near[m]
        d0 = abs(fractional[j, 0] - f0)
        d1 = abs(fractional[j, 1] - f1)
        d2 = abs(fractional[j, 2] - f2)
        near[found] = j
        found += (min(d0, 1 - d0) <= r0) & (min(d1, 1 - d1) <= r1) & (min(d2, 1 - d2) <= r2)
    return found


@compiled
def _sort_by_dst(dst: Array, shift: Array) -> None:
    """Sort the (few) edges of one atom by destination, in place and stably."""
    for e in range(1, len(dst)):
        j, na, nb, nc = dst[e], shift[e, 0], shift[e, 1], shift[e, 2]
        to = e
        while to > 0 and dst[to - 1] > j:
            dst[to] = dst[to - 1]
            shift[to, 0], shift[to, 1], shift[to, 2] = shift[to - 1, 0], shift[to - 1, 1], shift[to - 1, 2]
            to -= 1
        dst[to] = j
        shift[to, 0], shift[to, 1], shift[to, 2] = na, nb, nc


@compiled
def half_edges(
    cells: Array,
    points: Array,
    fractional: Array,
    heights: Array,
    starts: Array,
    cutoff: float,
    src: Array,
    dst: Array,
    shift: Array,
    n_edges: Array,
    nearest: Array,
    widest: Array,
) -> int:
    """List the half edges of every crystal; once the arrays are full, only count.

    Args:
        cells: (G, 3, 3) upper triangular lattices, rows, Å.
        points: (N, 3) wrapped positions in the same axes, Å.
        fractional: (N, 3) the same in units of the cell vectors, in [0, 1).
        heights: (G, 3) distances between opposite faces of the cells, Å.
        starts: (G + 1,) first atom of each crystal.
        cutoff: Å, the tie tolerance already added.
        src, dst, shift: filled in order.
        n_edges: (G,) set to the number of half edges.
        nearest: (N,) set to the squared distance to the nearest neighbour, inf without one.
        widest: (G,) set to the largest component of a shift.

    Returns:
        The number of half edges of all crystals.
    """
    capacity = len(src)
    limit = cutoff * cutoff
    slack = 1e-9 * (1.0 + cutoff)  # an interval end rounded inwards must not lose a tie
    count = 0
    nearest[:] = np.inf
    near = np.empty(np.diff(starts).max() if len(cells) else 0, np.int64)
    ends, members = near, near  # so that numba can infer their types
    for g in range(len(cells)):
        a0, a1, a2 = cells[g, 0, 0], cells[g, 0, 1], cells[g, 0, 2]
        b1, b2, c2 = cells[g, 1, 1], cells[g, 1, 2], cells[g, 2, 2]
        before = count
        widest[g] = 0
        atoms = fractional[starts[g] : starts[g + 1]]
        # If some opposite faces are farther apart than this, some atoms are out of reach; if all are, at most one
        # image of an atom is within the cutoff.
        some_wide = heights[g].max() > 2 * (cutoff + SLACK)
        all_wide = heights[g].min() > 2 * (cutoff + SLACK)
        bins = _bins_of(heights[g], cutoff, len(atoms))
        binned = bins.max() > 1
        if binned:
            ends, members = _fill_bins(atoms, bins)
        for i in range(starts[g], starts[g + 1]):
            first = count
            n_near = starts[g + 1] - i
            if some_wide:
                n_near = _near_atoms(atoms, heights[g], cutoff, bins, ends, members, i - starts[g], near)
            for m in range(n_near):
                j = starts[g] + near[m] if some_wide else i + m
                x0 = points[j, 0] - points[i, 0]
                y0 = points[j, 1] - points[i, 1]
                z0 = points[j, 2] - points[i, 2]
                if all_wide:
                    low_a = high_a = int(np.rint(fractional[i, 0] - fractional[j, 0]))
                else:
                    low_a = int(np.ceil((-cutoff - x0 - slack) / a0))
                    high_a = int(np.floor((cutoff - x0 + slack) / a0))
                    if i == j:
                        low_a = 0  # of ±n only one is kept
                for na in range(low_a, high_a + 1):
                    x = x0 + na * a0
                    y1 = y0 + na * a1
                    z1 = z0 + na * a2
                    if all_wide:
                        low_b = high_b = int(np.rint(fractional[i, 1] - fractional[j, 1]))
                    else:
                        room = np.sqrt(max(limit - x * x, 0.0)) + slack
                        low_b = int(np.ceil((-room - y1) / b1))
                        high_b = int(np.floor((room - y1) / b1))
                        if i == j and na == 0:
                            low_b = 0
                    for nb in range(low_b, high_b + 1):
                        y = y1 + nb * b1
                        z2 = z1 + nb * b2
                        if all_wide:
                            low_c = high_c = int(np.rint(fractional[i, 2] - fractional[j, 2]))
                        else:
                            left = np.sqrt(max(limit - x * x - y * y, 0.0)) + slack
                            low_c = int(np.ceil((-left - z2) / c2))
                            high_c = int(np.floor((left - z2) / c2))
                        if i == j and na == 0 and nb == 0:
                            low_c = 1
                        for nc in range(low_c, high_c + 1):
                            z = z2 + nc * c2
                            squared = x * x + y * y + z * z
                            if squared > limit:
                                continue
                            if count < capacity:
                                src[count] = i - starts[g]
                                dst[count] = j - starts[g]
                                shift[count, 0] = na
                                shift[count, 1] = nb
                                shift[count, 2] = nc
                            count += 1
                            nearest[i] = min(nearest[i], squared)
                            nearest[j] = min(nearest[j], squared)
                            widest[g] = max(widest[g], abs(na), abs(nb), abs(nc))
            if binned and count <= capacity:
                _sort_by_dst(dst[first:count], shift[first:count])
        n_edges[g] = count - before
    return count
