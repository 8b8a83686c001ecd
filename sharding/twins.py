"""Twins: crystals of one reduced formula that are the same structure, up to scale and small displacements.

Pure functions of what is compared; nothing depends on the order in which crystals arrive, keys decide. Formulas are
independent of each other, so any set of whole formulas can be worked on by itself.

A threshold is a fingerprint distance (``fingerprint.distance``). NEAR was chosen on same-formula pairs, stratified by
distance and judged by pymatgen's StructureMatcher with its default tolerances; docs/twins.md has the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sharding.jit import compiled

Array = NDArray[Any]

NEAR: Final = 0.2  # twins: kept out by an exclude list, and never on both sides of a split
EXACT: Final = 1e-3  # duplicates: the same but for the rounding of coordinates
EXACT_VOLUME: Final = 1e-3  # relative difference of the volume per atom of duplicates


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What is known of G crystals when they are compared."""

    keys: Sequence[str]  # (G,) | unique
    formulas: Sequence[str]  # (G,) | reduced
    fingerprints: NDArray[np.float32]  # (G, D)
    volumes: NDArray[np.float64]  # (G,) | per atom, Å³

    def __post_init__(self) -> None:
        lengths = {len(self.keys), len(self.formulas), len(self.fingerprints), len(self.volumes)}
        if len(lengths) != 1:
            raise ValueError(f"keys, formulas, fingerprints and volumes differ in length: {sorted(lengths)}")
        if len(set(self.keys)) != len(self.keys):
            raise ValueError("keys are not unique, so that they cannot decide which of two twins comes first")

    def __len__(self) -> int:
        return len(self.keys)


def twin_groups(crystals: Catalogue, threshold: float = NEAR) -> NDArray[np.int64]:
    """Connected components of "same formula and closer than the threshold".

    Made for splits: whatever is on one side, no twin of it is on the other. A chain of small steps joins crystals that
    are no twins themselves, so this is not the way to drop near duplicates; ``duplicates`` is.

    Returns:
        (G,) the index of the representative of each crystal's group: the member with the smallest key.
    """
    order, ends, rank = _arranged(crystals)
    parent = np.arange(len(order))
    _join(_vectors(crystals, order), ends, threshold, parent)
    group = np.empty(len(order), np.int64)
    group[order] = parent
    first = np.full(len(order), len(order))
    np.minimum.at(first, group, rank)
    by_key = np.argsort(rank)
    return by_key[first[group]]


def duplicates(crystals: Catalogue, threshold: float = EXACT, volume: float = EXACT_VOLUME) -> NDArray[np.int64]:
    """Which crystals repeat another one: in order of keys, each is kept unless one kept before is within the threshold.

    Args:
        crystals: compared inside their formulas.
        threshold: fingerprint distance; ``NEAR`` gives near duplicates.
        volume: relative difference of the volume per atom at most; ``math.inf`` compares shapes alone.

    Returns:
        (G,) the index of the crystal that stands for each: itself where it is kept, else the first kept one in order of
        keys that it repeats.
    """
    order, ends, _ = _arranged(crystals)
    stands = np.arange(len(order))
    logs = np.log(np.asarray(crystals.volumes, np.float64))[order]
    _sieve(_vectors(crystals, order), logs, ends, threshold, np.log1p(volume), stands)
    result = np.empty(len(order), np.int64)
    result[order] = order[stands]
    return result


def match(excluded: Catalogue, candidates: Catalogue, threshold: float = NEAR) -> NDArray[np.int64]:
    """Which candidates are twins of an excluded crystal.

    Returns:
        (candidates,) the index of the nearest excluded crystal closer than the threshold, the smaller key where two are
        equally near; −1 where there is none.
    """
    order, ends, _ = _arranged(excluded)
    names = np.asarray(excluded.formulas, object)[order]
    range_of = {name: (i, int(ends[i])) for i, name in reversed(list(enumerate(names)))}
    ranges = np.array([range_of.get(name, (0, 0)) for name in candidates.formulas], np.int64).reshape(-1, 2)
    found = np.empty(len(candidates), np.int64)
    vectors = np.ascontiguousarray(candidates.fingerprints)
    _look_up(_vectors(excluded, order), vectors, ranges, threshold, found)
    return np.where(found < 0, -1, np.append(order, -1)[found])


def _arranged(crystals: Catalogue) -> tuple[Array, Array, Array]:
    """Indices in order of formula and key; for each place in that order, the end of its formula; each crystal's rank."""
    keys = np.asarray(crystals.keys, object)
    rank = np.empty(len(keys), np.int64)
    rank[np.argsort(keys, kind="stable")] = np.arange(len(keys))
    _, formula = np.unique(np.asarray(crystals.formulas, object), return_inverse=True)
    order = np.lexsort((rank, formula))
    ends = np.cumsum(np.bincount(formula, minlength=1))[formula[order]]
    return order, ends, rank


def _vectors(crystals: Catalogue, order: Array) -> Array:
    return np.ascontiguousarray(crystals.fingerprints[order])


@compiled
def _near(a: Array, b: Array, limit: float) -> bool:
    """Whether no component differs by as much as the limit."""
    for k in range(len(a)):
        if abs(a[k] - b[k]) >= limit:
            return False
    return True


@compiled
def _root(parent: Array, i: int) -> int:
    """Where i's tree begins; halves the path to it."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@compiled
def _join(vectors: Array, ends: Array, threshold: float, parent: Array) -> None:
    """Union-find over all pairs of one formula: (G, D), (G,) → ``parent`` (G,), at the end the root of each."""
    for i in range(len(vectors)):
        for j in range(i + 1, ends[i]):
            a, b = _root(parent, i), _root(parent, j)
            if a != b and _near(vectors[i], vectors[j], threshold):
                parent[max(a, b)] = min(a, b)
    for i in range(len(vectors)):
        parent[i] = _root(parent, i)


@compiled
def _sieve(vectors: Array, logs: Array, ends: Array, threshold: float, volume: float, stands: Array) -> None:
    """``stands`` (G,): the first place before i that is kept and near it, else i."""
    first = 0
    for i in range(len(vectors)):
        if i > 0 and i == ends[i - 1]:
            first = i
        for j in range(first, i):
            if stands[j] == j and abs(logs[i] - logs[j]) <= volume and _near(vectors[i], vectors[j], threshold):
                stands[i] = j
                break


@compiled
def _look_up(vectors: Array, wanted: Array, ranges: Array, threshold: float, found: Array) -> None:
    """``found`` (C,): the place in its range of the vector nearest to each wanted one below the threshold, else −1."""
    for c in range(len(wanted)):
        found[c] = -1
        best = threshold
        for j in range(ranges[c, 0], ranges[c, 1]):
            widest = 0.0
            for k in range(vectors.shape[1]):
                widest = max(widest, abs(vectors[j, k] - wanted[c, k]))
                if widest >= best:
                    break
            if widest < best:
                best = widest
                found[c] = j
