"""Crystals → periodic multigraphs: every image of every atom within the cutoff, ties included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sharding.crystal import MIN_DISTANCE, Crystal, RefusedError, check
from sharding.jit import compiled
from sharding.neighbours import half_edges

Array = NDArray[Any]

TIE: Final = 1e-8  # Å added to the cutoff, so that a pair at exactly the cutoff is an edge despite rounding
MAX_SHIFT: Final = 127  # image shifts are stored as i8
POROUS: Final = 0.12  # atoms/Å³, least density assumed for array sizes: between its pores, a crystal is dense
MAX_ATOMS: Final = 65_535  # edges are stored as 16-bit indices


@dataclass(frozen=True, slots=True)
class Multigraphs:
    """Multigraphs of G crystals, N atoms and E half edges, as flat arrays: one graph after the other.

    An edge (i, j, n) and its mirror (j, i, −n) are stored as one half edge: the one with src < dst or, between an atom
    and its own image, with n lexicographically > 0. Half edges are sorted by (src, dst, n) within a graph.
    """

    keys: list[str]  # (G,)
    n_atoms: NDArray[np.uint32]  # (G,)
    n_edges: NDArray[np.uint32]  # (G,) | half edges
    lattice: NDArray[np.float32]  # (G, 3, 3) | rows, Å
    atomic_numbers: NDArray[np.uint8]  # (N,)
    positions: NDArray[np.float32]  # (N, 3) | Cartesian, wrapped into the cell, Å
    edge_src: NDArray[np.unsignedinteger]  # (E,) | index inside the graph
    edge_dst: NDArray[np.unsignedinteger]  # (E,)
    edge_shift: NDArray[np.int8]  # (E, 3) | image of dst, in cells
    labels: dict[str, NDArray[np.float32]]  # name → (G,), NaN where missing

    def __len__(self) -> int:
        return len(self.keys)

    def scored_edges(self) -> NDArray[np.int64]:
        """The number of half edges between different atoms, per graph: (G,)."""
        return segment_sum(self.edge_src != self.edge_dst, self.n_edges)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays of ``ARRAYS`` by name."""
        return {name: getattr(self, name) for name in ARRAYS}

    def slice(self, begin: int, end: int) -> Multigraphs:
        """Graphs begin … end − 1, as views."""
        labels = {name: values[begin:end] for name, values in self.labels.items()}
        return Multigraphs(keys=self.keys[begin:end], labels=labels, **sliced(self.arrays(), begin, end))

    def take(self, graphs: NDArray[np.int64]) -> Multigraphs:
        """The graphs with these indices, in this order."""
        atoms = offsets(self.n_atoms)[graphs], self.n_atoms[graphs].astype(np.int64)
        edges = offsets(self.n_edges)[graphs], self.n_edges[graphs].astype(np.int64)
        return Multigraphs(
            keys=[self.keys[i] for i in graphs],
            n_atoms=self.n_atoms[graphs],
            n_edges=self.n_edges[graphs],
            lattice=self.lattice[graphs],
            atomic_numbers=_segments(self.atomic_numbers, *atoms),
            positions=_segments(self.positions, *atoms),
            edge_src=_segments(self.edge_src, *edges),
            edge_dst=_segments(self.edge_dst, *edges),
            edge_shift=_segments(self.edge_shift, *edges),
            labels={name: values[graphs] for name, values in self.labels.items()},
        )


def concatenate(parts: Sequence[Multigraphs]) -> Multigraphs:
    """Several sets of graphs as one; all must carry the same labels."""
    return Multigraphs(
        keys=[key for part in parts for key in part.keys],
        labels={name: np.concatenate([p.labels[name] for p in parts]) for name in parts[0].labels},
        **{name: np.concatenate([getattr(p, name) for p in parts]) for name in ARRAYS},
    )


_PER_GRAPH: Final = ("n_atoms", "n_edges", "lattice")
_PER_ATOM: Final = ("atomic_numbers", "positions")
_PER_EDGE: Final = ("edge_src", "edge_dst", "edge_shift")
ARRAYS: Final = _PER_GRAPH + _PER_ATOM + _PER_EDGE


def sliced(arrays: dict[str, NDArray[Any]], begin: int, end: int) -> dict[str, NDArray[Any]]:
    """The arrays of graphs begin … end − 1, as views, from those of all graphs."""
    atoms, edges = offsets(arrays["n_atoms"]), offsets(arrays["n_edges"])
    return (
        {name: arrays[name][begin:end] for name in _PER_GRAPH}
        | {name: arrays[name][atoms[begin] : atoms[end]] for name in _PER_ATOM}
        | {name: arrays[name][edges[begin] : edges[end]] for name in _PER_EDGE}
    )


def offsets(counts: NDArray[Any]) -> NDArray[np.int64]:
    """Where each segment begins: (G,) → (G + 1,), the last is the total."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def ranges(starts: NDArray[Any], counts: NDArray[Any]) -> NDArray[np.int64]:
    """The integers start … start + count − 1 of every segment, one segment after the other."""
    counts = counts.astype(np.int64)
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


def _segments(values: NDArray[Any], starts: NDArray[Any], counts: NDArray[Any]) -> NDArray[Any]:
    """The values of some segments, one segment after the other."""
    out = np.empty((int(counts.sum()), *values.shape[1:]), values.dtype)
    size = values.itemsize * math.prod(values.shape[1:])  # bytes; one compiled function copies all types
    _copy_runs(_as_bytes(values), starts * size, counts * size, _as_bytes(out))
    return out


def _as_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


@compiled
def _copy_runs(values: Array, starts: Array, counts: Array, out: Array) -> None:
    at = 0
    for g in range(len(starts)):
        out[at : at + counts[g]] = values[starts[g] : starts[g] + counts[g]]
        at += counts[g]


def segment_sum(values: NDArray[Any], counts: NDArray[Any]) -> NDArray[np.int64]:
    """Sum of the values of each segment, empty segments included: (G,)."""
    total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return np.diff(total[offsets(counts)])


def upper_triangular(lattice: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rotate cells so that c lies on the third axis and b in the plane of the last two.

    Args:
        lattice: (..., 3, 3) rows, Å.

    Returns:
        The rotated lattices, upper triangular with a positive diagonal, and Q with ``rotated = lattice @ Q``. Q may
        hold a reflection, which changes no distance.
    """
    q, r = np.linalg.qr(np.swapaxes(lattice[..., ::-1, :], -1, -2))  # columns c, b, a
    sign = np.sign(np.diagonal(r, axis1=-2, axis2=-1))
    q, r = q * sign[..., None, :], r * sign[..., :, None]
    return np.ascontiguousarray(np.swapaxes(r, -1, -2)[..., ::-1, ::-1]), q[..., ::-1]


def build(
    crystals: Sequence[Crystal], cutoff: float, label_names: Sequence[str] = ()
) -> tuple[Multigraphs, dict[int, RefusedError]]:
    """Build the multigraphs of a batch of crystals.

    Args:
        crystals: as read; unwrapped atoms are fine.
        cutoff: Å; a pair at exactly the cutoff is an edge.
        label_names: the labels to carry along, NaN where a crystal has none.

    Returns:
        The graphs of the good crystals, in order, and index → reason for the others: those of ``crystal.check``,
        ``too_many_atoms`` (over 65,535), ``too_close`` (two atoms under 0.5 Å), ``isolated_atom`` (an atom without an
        edge) and ``shift_range`` (an image shift beyond ±127).
    """
    refused = check(crystals)
    for i, crystal in enumerate(crystals):
        if i not in refused and len(crystal.atomic_numbers) > MAX_ATOMS:
            text = f"{len(crystal.atomic_numbers)} atoms; an edge's index reaches {MAX_ATOMS}"
            refused[i] = RefusedError("too_many_atoms", text)
    kept = [i for i in range(len(crystals)) if i not in refused]
    good = [crystals[i] for i in kept]
    n_atoms = np.array([len(c.atomic_numbers) for c in good], np.uint32)
    lattice = np.array([c.lattice for c in good], np.float64).reshape(-1, 3, 3)
    positions = np.concatenate([np.empty((0, 3)), *(c.positions for c in good)])
    inverse = np.linalg.inv(lattice)
    fractional = _apply(positions, inverse, n_atoms)
    fractional -= np.floor(fractional)
    fractional[fractional >= 1.0] = 0.0  # a tiny negative number plus one rounds to one
    positions = _apply(fractional, lattice, n_atoms)
    heights = 1 / np.linalg.norm(inverse, axis=1)
    cells, rotation = upper_triangular(lattice)
    starts = offsets(n_atoms)

    n_edges = np.empty(len(good), np.uint32)
    widest = np.empty(len(good), np.int64)
    nearest = np.empty(len(positions))
    density = np.maximum(n_atoms / np.abs(np.linalg.det(lattice)), POROUS)
    capacity = int((n_atoms * density).sum() * 2.2 * cutoff**3) + 4096  # half of 4/3 π r³ per atom, plus some slack
    while True:
        src = np.empty(capacity, np.uint16)
        dst = np.empty(capacity, np.uint16)
        shift = np.empty((capacity, 3), np.int16)
        points = _apply(positions, rotation, n_atoms)
        count = half_edges(
            cells, points, fractional, heights, starts, cutoff + TIE, src, dst, shift, n_edges, nearest, widest
        )
        if count <= capacity:
            break
        capacity = count

    fine = []
    closest = np.sqrt(np.minimum.reduceat(nearest, starts[:-1])) if good else nearest
    farthest = np.maximum.reduceat(nearest, starts[:-1]) if good else nearest
    for g, i in enumerate(kept):
        if closest[g] < MIN_DISTANCE:
            text = f"two atoms are {closest[g]:.3g} Å apart, less than {MIN_DISTANCE} Å"
            refused[i] = RefusedError("too_close", text)
        elif not np.isfinite(farthest[g]):
            refused[i] = RefusedError("isolated_atom", f"an atom has no neighbour within {cutoff} Å")
        elif widest[g] > MAX_SHIFT:
            text = f"an image shift of {widest[g]} cells; the format holds ±{MAX_SHIFT}"
            refused[i] = RefusedError("shift_range", text)
        else:
            fine.append(g)
    graphs = Multigraphs(
        keys=[c.key for c in good],
        n_atoms=n_atoms,
        n_edges=n_edges,
        lattice=lattice.astype(np.float32),
        atomic_numbers=np.concatenate([np.empty(0, np.uint8), *(c.atomic_numbers for c in good)]),
        positions=positions.astype(np.float32),
        edge_src=src[:count],
        edge_dst=dst[:count],
        edge_shift=shift[:count].astype(np.int8),
        labels={n: np.array([c.labels.get(n, np.nan) for c in good], np.float32) for n in label_names},
    )
    return graphs if len(fine) == len(good) else graphs.take(np.array(fine, np.int64)), refused


def _apply(vectors: NDArray[np.float64], matrices: NDArray[Any], counts: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Row vectors times the matrix of their graph: (N, 3), (G, 3, 3) → (N, 3)."""
    return np.einsum("ni,nij->nj", vectors, np.repeat(matrices, counts, axis=0))
