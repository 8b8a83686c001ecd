"""Invariants of a block, checked for all its graphs at once. Nothing here reads files.

Positions and cells are stored in f32, so a length or a fractional coordinate recomputed from them carries their
rounding error, u = 2⁻²⁴ relative to each coordinate that enters. Violations within that error, or within ``MARGIN`` of
a limit, are not reported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sharding.block import Budget
from sharding.crystal import MAX_VOLUME_PER_ATOM, MIN_DISTANCE, MIN_VOLUME_PER_ATOM, SYMBOLS, Crystal
from sharding.graph import MAX_ATOMS, Multigraphs, build, offsets

Array = NDArray[Any]

MARGIN: Final = 1e-5  # Å; pairs this close to a limit are not reported
_U: Final = 2.0**-24  # relative rounding of f32
_TOO_CLOSE: Final = f"pairs of atoms are less than {MIN_DISTANCE} Å apart"
_RADIX: Final = 400  # range of shifts in an edge's code, with room for atoms that wrap differently when recomputed


@dataclass(frozen=True, slots=True)
class Rules:
    """What the manifest guarantees for every block."""

    cutoff: float  # Å
    index_dtype: str
    budget: Budget
    labels: frozenset[str]


@dataclass(frozen=True, slots=True)
class Problem:
    """A violated invariant."""

    code: str
    text: str
    graph: int | None = None  # index of the first graph that violates it
    count: int = 1


def problems(graphs: Multigraphs, rules: Rules) -> list[Problem]:
    """All violations in a block; geometry is checked only for graphs with valid indices and finite coordinates."""
    found = [*_whole(graphs, rules), *_labels(graphs), *_atoms(graphs), *_edges(graphs)]
    # A graph with an invalid index or a non-finite coordinate has no geometry.
    fine = np.flatnonzero(_computable(graphs))
    measured = graphs if len(fine) == len(graphs) else graphs.take(fine)
    return found + [_map(problem, fine) for problem in _geometry(measured, rules)]


def incomplete(graphs: Multigraphs, cutoff: float) -> list[Problem]:
    """Recompute the neighbour lists of a block; report pairs too close, or within the cutoff but not stored."""
    fine = np.flatnonzero(_computable(graphs))
    mine = graphs.take(fine)
    at = offsets(mine.n_atoms)
    cells, points = mine.lattice.astype(np.float64), mine.positions.astype(np.float64)
    crystals = [
        Crystal(key, cells[i], points[at[i] : at[i + 1]], mine.atomic_numbers[at[i] : at[i + 1]])
        for i, key in enumerate(mine.keys)
    ]
    again, refused = build(crystals, cutoff)
    stored = _Geometry(mine)
    judged = np.ones(len(mine), bool)  # skips graphs with a stored pair right at the minimum distance
    judged[stored.graph_of_edge[stored.lengths() < MIN_DISTANCE + MARGIN]] = False
    close = np.array([i for i, why in refused.items() if why.code == "too_close" and judged[i]], np.int64)
    found = [_map(p, fine) for p in _report("too_close", _TOO_CLOSE, np.sort(close))]
    kept = np.setdiff1d(np.arange(len(mine)), np.fromiter(refused, np.int64, len(refused)))
    mine, fine = mine.take(kept), fine[kept]
    if len(mine) == 0:
        return found
    geometry = _Geometry(replace(again, lattice=mine.lattice, positions=mine.positions))
    # An atom on a face of its cell may now wrap to the opposite face; the shifts of its edges must follow.
    inverse = np.linalg.inv(mine.lattice.astype(np.float64))[geometry.graph_of_atom]
    apart = mine.positions.astype(np.float64) - again.positions
    moved = np.rint(np.einsum("ni,nij->nj", apart, inverse)).astype(np.int64)
    geometry.shift = again.edge_shift.astype(np.int64) + moved[geometry.src] - moved[geometry.dst]
    wanted, has = geometry.codes(), np.append(np.sort(_Geometry(mine).codes()), -1)
    absent = np.flatnonzero(has[np.searchsorted(has[:-1], wanted)] != wanted)
    lengths = geometry.lengths(absent)
    absent = absent[lengths <= cutoff - np.maximum(MARGIN, geometry.rounding(absent))]
    pairs = "pairs of atoms within the cutoff are not stored as edges"
    return found + [_map(p, fine) for p in _report("incomplete", pairs, absent, geometry.graph_of_edge)]


def _whole(graphs: Multigraphs, rules: Rules) -> Iterator[Problem]:
    """Check the block as a whole: index types, names of labels, and the budget."""
    widths = {str(graphs.edge_src.dtype), str(graphs.edge_dst.dtype)}
    if widths != {rules.index_dtype}:
        text = f"edge indices are {' and '.join(sorted(widths))}; the manifest says {rules.index_dtype}"
        yield Problem("index_dtype", text)
    if graphs.labels.keys() != rules.labels:
        text = f"carries the labels {sorted(graphs.labels)}; the manifest says {sorted(rules.labels)}"
        yield Problem("labels", text)
    sizes = {"edges": 2 * len(graphs.edge_src), "atoms": len(graphs.positions), "graphs": len(graphs)}
    for name, size in sizes.items():
        if size > getattr(rules.budget, name):
            yield Problem("budget", f"holds {size:,} {name}, more than the budget of {getattr(rules.budget, name):,}")
    if len(graphs) == 0:
        yield Problem("counts", "holds no graph")


def _labels(graphs: Multigraphs) -> Iterator[Problem]:
    for name, values in graphs.labels.items():
        yield from _report("not_finite", f"values of the label {name!r} are infinite", np.isinf(values))
    yield from _report("key", "keys are empty", np.array([not key for key in graphs.keys], bool))


def _atoms(graphs: Multigraphs) -> Iterator[Problem]:
    owner = np.repeat(np.arange(len(graphs)), graphs.n_atoms)
    yield from _report("counts", "graphs have no atoms", graphs.n_atoms == 0)
    yield from _report("counts", f"graphs have more than {MAX_ATOMS:,} atoms", graphs.n_atoms > MAX_ATOMS)
    numbers = graphs.atomic_numbers
    outside = (numbers < 1) | (numbers >= len(SYMBOLS))
    yield from _report("species", "atomic numbers are outside 1–118", outside, owner)
    cells, points = np.isfinite(graphs.lattice).all(axis=(1, 2)), np.isfinite(graphs.positions).all(axis=1)
    yield from _report("not_finite", "cells are not finite", np.logical_not(cells))
    yield from _report("not_finite", "positions are not finite", np.logical_not(points), owner)


def _edges(graphs: Multigraphs) -> Iterator[Problem]:
    """Check the integers: that edges are the canonical half list."""
    owner = np.repeat(np.arange(len(graphs)), graphs.n_edges)
    outside = _outside_graph(graphs, owner)
    yield from _report("index", "edges lead to atoms that their graph does not have", outside, owner)
    a, b, c = graphs.edge_shift.T
    positive = (a > 0) | ((a == 0) & ((b > 0) | ((b == 0) & (c > 0))))
    half = (graphs.edge_src < graphs.edge_dst) | ((graphs.edge_src == graphs.edge_dst) & positive)
    yield from _report("not_canonical", "edges are not the stored one of their mirrored pair", ~half, owner)
    if not outside.any():
        steps = np.diff(_Geometry(graphs).codes())
        yield from _report("order", "edges are not sorted by (src, dst, shift)", np.flatnonzero(steps < 0) + 1, owner)
        yield from _report("order", "edges are stored twice", np.flatnonzero(steps == 0) + 1, owner)


def _geometry(graphs: Multigraphs, rules: Rules) -> Iterator[Problem]:
    """Check cells, wrapping and lengths."""
    geometry = _Geometry(graphs)
    cells = geometry.cells
    volumes, lengths = np.abs(np.linalg.det(cells)), np.linalg.norm(cells, axis=2).prod(axis=1)
    error = 8 * _U * lengths  # Å³, of the determinant
    flat = volumes <= 1e-6 * lengths - error
    yield from _report("singular_cell", "cells are (nearly) flat", flat)
    n = np.maximum(graphs.n_atoms, 1)
    outside = ((volumes + error) / n < MIN_VOLUME_PER_ATOM) | ((volumes - error) / n > MAX_VOLUME_PER_ATOM)
    limits = f"{MIN_VOLUME_PER_ATOM}–{MAX_VOLUME_PER_ATOM} Å³"
    yield from _report("volume", f"volumes per atom are outside {limits}", outside & ~flat)
    yield from _report("unwrapped", "positions are outside their cell", geometry.unwrapped(), geometry.graph_of_atom)

    length, owner = geometry.lengths(), geometry.graph_of_edge
    long = np.flatnonzero(length > rules.cutoff + MARGIN)
    long = long[length[long] > rules.cutoff + geometry.rounding(long)]
    farthest = f", up to {length[long].max():.4g} Å" if len(long) else ""
    yield from _report("too_long", f"edges are longer than the cutoff of {rules.cutoff} Å{farthest}", long, owner)
    close = np.flatnonzero(length < MIN_DISTANCE - MARGIN)
    close = close[length[close] < MIN_DISTANCE - geometry.rounding(close)]
    yield from _report("too_close", _TOO_CLOSE, close, owner)
    reached = np.zeros(len(graphs.positions), bool)
    reached[geometry.src] = reached[geometry.dst] = True
    yield from _report("isolated_atom", "atoms have no edge", ~reached, geometry.graph_of_atom)


class _Geometry:
    """The geometry of a block in f64, with atom indices that run through the whole block."""

    def __init__(self, graphs: Multigraphs) -> None:
        g = np.arange(len(graphs))
        self.graph_of_atom, self.graph_of_edge = np.repeat(g, graphs.n_atoms), np.repeat(g, graphs.n_edges)
        first = offsets(graphs.n_atoms)[self.graph_of_edge]
        self.src, self.dst = first + graphs.edge_src, first + graphs.edge_dst
        self.local_dst, self.widest = graphs.edge_dst, int(graphs.n_atoms.max(initial=1))
        self.shift = graphs.edge_shift.astype(np.int64)  # (E, 3)
        self.cells, self.points = graphs.lattice.astype(np.float64), graphs.positions.astype(np.float64)

    def codes(self) -> NDArray[np.int64]:
        """One integer for each edge, in the order of (graph, src, dst, shift): (E,)."""
        code = self.src * self.widest + self.local_dst
        for axis in range(3):
            code = code * _RADIX + (self.shift[:, axis] + _RADIX // 2)
        return code

    def lengths(self, edges: Array | None = None) -> NDArray[np.float64]:
        """Å; of all edges, or of some."""
        src, dst, shift, graph = self.src, self.dst, self.shift, self.graph_of_edge
        if edges is not None:
            src, dst, shift, graph = src[edges], dst[edges], shift[edges], graph[edges]
        vectors = np.take(self.points, dst, axis=0) - np.take(self.points, src, axis=0)
        vectors += np.einsum("ei,eij->ej", shift.astype(np.float64), np.take(self.cells, graph, axis=0))
        return np.sqrt(np.einsum("ei,ei->e", vectors, vectors))

    def rounding(self, edges: Array) -> NDArray[np.float64]:
        """The largest rounding error of the length of each edge, Å."""
        crossed = np.einsum("ei,eij->ej", np.abs(self.shift[edges]), np.abs(self.cells[self.graph_of_edge[edges]]))
        summed = np.abs(self.points[self.dst[edges]]) + np.abs(self.points[self.src[edges]]) + crossed
        return _U * np.linalg.norm(summed, axis=1)

    def unwrapped(self) -> NDArray[np.int64]:
        """Atoms outside their cell by more than rounding explains."""
        singular = np.linalg.det(self.cells) == 0
        cells = np.where(singular[:, None, None], np.eye(3), self.cells)
        inverse = np.linalg.inv(cells)
        fractions = np.einsum("ni,nij->nj", self.points, inverse[self.graph_of_atom])
        far = ((fractions < 0) | (fractions > 1)).any(axis=1) & ~singular[self.graph_of_atom]
        atoms = np.flatnonzero(far)
        g = self.graph_of_atom[atoms]
        # fraction = point · L⁻¹, where point and L are each rounded
        summed = np.abs(self.points[atoms]) + np.abs(cells[g]).sum(axis=1)
        error = 2 * _U * np.einsum("ni,nij->nj", summed, np.abs(inverse[g])) + 1e-9
        return atoms[((fractions[atoms] < -error) | (fractions[atoms] > 1 + error)).any(axis=1)]


def _outside_graph(graphs: Multigraphs, owner: Array) -> NDArray[np.bool_]:
    n = graphs.n_atoms[owner]
    return (graphs.edge_src >= n) | (graphs.edge_dst >= n)


def _computable(graphs: Multigraphs) -> NDArray[np.bool_]:
    """Mask of the graphs with valid indices and finite coordinates: (G,)."""
    fine: NDArray[np.bool_] = np.isfinite(graphs.lattice).all(axis=(1, 2)) & (graphs.n_atoms > 0)
    fine[np.repeat(np.arange(len(graphs)), graphs.n_atoms)[~np.isfinite(graphs.positions).all(axis=1)]] = False
    owner = np.repeat(np.arange(len(graphs)), graphs.n_edges)
    fine[owner[_outside_graph(graphs, owner)]] = False
    return fine


def _report(code: str, text: str, bad: Array, owner: Array | None = None) -> Iterator[Problem]:
    """Yield one problem if any graph is bad (a mask or indices) or, with ``owner``, any of its atoms or edges."""
    at = np.flatnonzero(bad) if bad.dtype == bool else bad
    if len(at):
        first = int(at[0] if owner is None else owner[at[0]])
        yield Problem(code, text, first, len(at))


def _map(problem: Problem, indices: Array | Sequence[int]) -> Problem:
    return problem if problem.graph is None else replace(problem, graph=int(indices[problem.graph]))
