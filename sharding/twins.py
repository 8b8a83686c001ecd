"""Twins: crystals of one reduced formula that are the same structure, up to scale and small displacements.

Pure functions: ties are broken by key, so nothing depends on the order in which crystals arrive. Formulas are
independent of each other, so any set of complete formulas can be processed by itself.

Thresholds are fingerprint distances (``fingerprint.distance``), chosen on stratified samples of same-formula pairs that
pymatgen's StructureMatcher judged with its default tolerances. They differ because errors differ in cost: twins on
both sides of a split, or in pretraining and a test set, are leakage; a crystal dropped needlessly is lost data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sharding.fingerprint import NEAR_SLOTS
from sharding.jit import compiled

Array = NDArray[Any]

EXACT: Final = 2e-4  # duplicates: the same but for the rounding of coordinates
EXACT_VOLUME: Final = 1e-3  # relative difference of their volumes per atom
NEAR: Final = 0.05  # near duplicates, which may be dropped
EXCLUDE: Final = 0.25  # what is left out as a twin of an excluded crystal
SPLIT: Final = 0.3  # what must not straddle a split; a group that is too large does no harm


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The data by which G crystals are compared."""

    keys: Sequence[str]  # (G,) | unique
    formulas: Sequence[str]  # (G,) | reduced
    fingerprints: NDArray[np.float32]  # (G, 64)
    volumes: NDArray[np.float64]  # (G,) | per atom, Å³

    def __post_init__(self) -> None:
        lengths = {len(self.keys), len(self.formulas), len(self.fingerprints), len(self.volumes)}
        if len(lengths) != 1:
            raise ValueError(f"keys, formulas, fingerprints and volumes differ in length: {sorted(lengths)}")
        if len(set(self.keys)) != len(self.keys):
            raise ValueError("keys are not unique, so they cannot decide which of two twins comes first")
        if not (np.isfinite(self.fingerprints).all() and np.isfinite(self.volumes).all()):
            raise ValueError("a fingerprint or a volume is NaN or infinite, so it cannot be compared with a threshold")

    def __len__(self) -> int:
        return len(self.keys)


def twin_groups(crystals: Catalogue, threshold: float = SPLIT) -> NDArray[np.int64]:
    """Connected components of "same formula and closer than the threshold".

    Meant for splits: no crystal has a twin on the other side. A chain of small steps joins crystals that are not twins
    themselves, so use ``near_duplicates``, not this, to drop near duplicates.

    Returns:
        (G,) the index of the representative of each crystal's group: the member with the smallest key.
    """
    order, ends = _arranged(crystals)
    parent = np.arange(len(order))
    _join(_near_part(crystals, order), ends, threshold, parent)
    # inside a formula places are in order of keys, and a root is the first place of its group
    result = np.empty(len(order), np.int64)
    result[order] = order[parent]
    return result


def exact_duplicates(crystals: Catalogue, threshold: float = EXACT, volume: float = EXACT_VOLUME) -> NDArray[np.int64]:
    """Which crystals repeat another one in all 64 components and in volume.

    In order of keys, each is kept unless it is within the tolerances of one kept before.

    Args:
        crystals: compared only within a formula.
        threshold: maximum difference of any component.
        volume: maximum relative difference of the volume per atom.

    Returns:
        (G,) the index of the crystal that represents each: itself if it is kept, else the first kept crystal, in order
        of keys, that it repeats.
    """
    order, ends = _arranged(crystals)
    return _sieved(np.ascontiguousarray(crystals.fingerprints[order]), crystals, order, ends, threshold, volume)


def near_duplicates(crystals: Catalogue, threshold: float = NEAR) -> NDArray[np.int64]:
    """Like ``exact_duplicates``, for crystals closer than the threshold, whatever their volumes."""
    order, ends = _arranged(crystals)
    return _sieved(_near_part(crystals, order), crystals, order, ends, threshold, math.inf)


def match(excluded: Catalogue, candidates: Catalogue, threshold: float = EXCLUDE) -> NDArray[np.int64]:
    """Which candidates are twins of an excluded crystal.

    Returns:
        (candidates,) the index of the nearest excluded crystal closer than the threshold, the smaller key where two are
        equally near; −1 where there is none.
    """
    order, ends = _arranged(excluded)
    names = np.asarray(excluded.formulas, object)[order]
    range_of = {name: (i, int(ends[i])) for i, name in reversed(list(enumerate(names)))}
    ranges = np.array([range_of.get(name, (0, 0)) for name in candidates.formulas], np.int64).reshape(-1, 2)
    found = np.empty(len(candidates), np.int64)
    wanted = _near_part(candidates, np.arange(len(candidates)))
    _look_up(_near_part(excluded, order), wanted, ranges, threshold, found)
    return np.where(found < 0, -1, np.append(order, -1)[found])


def _arranged(crystals: Catalogue) -> tuple[Array, Array]:
    """Indices in order of formula and key, and for each place in that order the end of its formula."""
    keys = np.asarray(crystals.keys, object)
    rank = np.empty(len(keys), np.int64)
    rank[np.argsort(keys, kind="stable")] = np.arange(len(keys))
    _, formula = np.unique(np.asarray(crystals.formulas, object), return_inverse=True)
    order = np.lexsort((rank, formula))
    ends = np.cumsum(np.bincount(formula, minlength=1))[formula[order]]
    return order, ends


def _near_part(crystals: Catalogue, order: Array) -> Array:
    """The components that are compared, with crystals in this order."""
    return np.ascontiguousarray(crystals.fingerprints[order, :NEAR_SLOTS])


def _sieved(vectors: Array, crystals: Catalogue, order: Array, ends: Array, threshold: float, volume: float) -> Array:
    """The result of ``exact_duplicates`` and ``near_duplicates``, from vectors in this order."""
    stands = np.arange(len(order))
    logs = np.log(np.asarray(crystals.volumes, np.float64))[order]
    _sieve(vectors, logs, ends, threshold, np.log1p(volume), stands)
    result = np.empty(len(order), np.int64)
    result[order] = order[stands]
    return result


@compiled
def _near(a: Array, b: Array, limit: float) -> bool:
    """Whether every component differs by less than the limit."""
    k = 0
    while k < len(a) and abs(a[k] - b[k]) < limit:
        k += 1
    return k == len(a)


@compiled
def _root(parent: Array, i: int) -> int:
    """Find the root of i's tree, with path halving."""
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
