"""Splits into training, validation (early stopping) and test: by shares or folds of whole groups, or by a column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
NAMES: Final = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class SplitError(ValueError):
    """Crystals that cannot be split as requested; the message is one line."""


@dataclass(frozen=True)
class Split:
    """Indices of crystals; ``val`` is empty if there is no early stopping."""

    train: Indices
    val: Indices
    test: Indices

    def merge_val(self) -> Split:
        """The split for models without early stopping, which also train on the validation crystals."""
        return Split(np.concatenate([self.train, self.val]), self.val[:0], self.test)

    def sizes(self) -> dict[str, int]:
        """Number of crystals in each part."""
        return {"train": len(self.train), "val": len(self.val), "test": len(self.test)}


def split_by_group(groups: Sequence[str], train: float, val: float, seed: int) -> Split:
    """Shuffle groups, then fill train, validation and test by numbers of crystals; no group is divided.

    Groups larger than the validation or the test part come first, so they are trained on.

    Args:
        groups: group of each crystal.
        train, val: shares of the crystals; the rest is for testing.
        seed: seed of the shuffle.

    Raises:
        SplitError: if a part is empty.
    """
    if not (train > 0 and val > 0 and train + val < 1):
        raise SplitError(f"train {train:g} and val {val:g}: both must be above 0, and leave something to test on")
    rank, member = _shuffled(groups, seed, large_first=min(val, 1 - train - val))
    before = _share_before(rank)
    trained = float((before < train).mean())
    # If large groups leave too little for validation and test, these divide it in proportion.
    until = train + val if trained < train + val else trained + (1 - trained) * val / (1 - train)
    part = np.where(before < train, 0, np.where(before < until, 1, 2))
    split = Split(*(np.flatnonzero(part == p) for p in range(3)))
    sizes = list(split.sizes().values())
    if min(sizes) == 0:
        raise SplitError(
            f"{len(rank)} crystals in {len(set(member.tolist()))} groups split into {sizes[0]} train, {sizes[1]} "
            f"validation and {sizes[2]} test crystals; none may be empty: give more data or other shares"
        )
    return split


def hold_out(among: Indices, groups: Sequence[str], share: float, seed: int) -> tuple[Indices, Indices]:
    """Hold out a share of some crystals for early stopping, by whole groups; of fewer than three groups, none.

    Groups larger than the share are trained on, unless all are.

    Returns:
        The crystals to train on, and those to validate with.

    Raises:
        SplitError: if the share is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise SplitError(f"validation share {share:g}: it must be at least 0, and below 1")
    rank, _ = _shuffled([groups[i] for i in among], seed, large_last=share)
    if share <= 0 or len(among) == 0 or len(np.unique(rank)) < 3:
        return among, among[:0]
    held = _share_before(rank) < share  # at least the first group, and not the last one
    held &= rank < rank.max()
    return among[~held], among[held]


def k_folds(groups: Sequence[str], k: int, val: float, seed: int) -> list[Split]:
    """k-fold cross-validation by whole groups; each fold holds out a share ``val`` of the rest for early stopping.

    Raises:
        SplitError: if there are fewer groups than folds.
    """
    rank, _ = _shuffled(groups, seed)
    n_groups = len(np.unique(rank))
    if not 2 <= k <= n_groups:
        raise SplitError(f"{k} folds of {len(rank)} crystals in {n_groups} groups: take between 2 and {n_groups}")
    fold = np.minimum((_share_before(rank) * k).astype(np.int64), k - 1)
    if len(np.unique(fold)) < k:  # a group larger than a fold
        fold = rank % k
    return _folds(fold, range(k), groups, val, seed)


def folds_of_column(values: Sequence[Any], groups: Sequence[str], val: float, seed: int) -> list[Split]:
    """One fold for each value of a column; crystals without a value are left out.

    Raises:
        SplitError: if there are fewer than two values.
    """
    names = sorted({v for v in values if not _absent(v)}, key=str)
    if len(names) < 2:
        raise SplitError(f"the column of folds has {len(names)} different values; at least two are needed")
    fold = np.array([-1 if _absent(v) else names.index(v) for v in values])
    return _folds(fold, range(len(names)), groups, val, seed)


def split_of_column(values: Sequence[Any], groups: Sequence[str], val: float, seed: int, test: str = "test") -> Split:
    """Split by a column that holds train, val (or valid, validation) and test; other crystals are left out.

    Args:
        values: the column.
        groups, val, seed: used to hold out some training crystals if the column names none for validation.
        test: the value that marks test crystals, e.g. "val" if the labels of those marked "test" are secret.

    Raises:
        SplitError: if no crystals are left to train on or to test.
    """
    texts = ["" if _absent(v) else str(v).strip().lower() for v in values]
    said = np.array([NAMES.get(t, t) for t in texts], dtype=object)
    test = NAMES.get(test.lower(), test.lower())
    if test == "train":
        raise SplitError("--test-value train: training crystals cannot be test crystals, too")
    train, tested = np.flatnonzero(said == "train"), np.flatnonzero(said == test)
    if len(train) == 0 or len(tested) == 0:
        found = ", ".join(f"{name or 'nothing'}: {(said == name).sum()}" for name in sorted(set(said.tolist())))
        hint = "; --test-value names another value to test on" if len(train) else ""
        raise SplitError(f"the labeled crystals have these splits: {found}; 'train' and {test!r} are needed{hint}")
    held = np.flatnonzero(said == "val") if test != "val" else train[:0]
    if len(held) == 0:
        train, held = hold_out(train, groups, val, seed)
    return Split(train, held, tested)


def _folds(fold: Indices, numbers: Sequence[int], groups: Sequence[str], val: float, seed: int) -> list[Split]:
    splits = []
    for number in numbers:
        rest = np.flatnonzero((fold != number) & (fold >= 0))
        splits.append(Split(*hold_out(rest, groups, val, seed + number), np.flatnonzero(fold == number)))
    return splits


def _shuffled(
    groups: Sequence[str], seed: int, *, large_first: float = 1.0, large_last: float = 1.0
) -> tuple[Indices, Indices]:
    """Rank of each crystal's group in a seeded random order of the groups, and the number of the group: (n,), (n,).

    Groups with more than the share ``large_first`` of the crystals are moved to the front, the largest first; those
    with more than ``large_last`` to the end, the largest last.
    """
    names, member, sizes = np.unique(np.array(groups), return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    for share, first in ((large_first, True), (large_last, False)):
        large = sizes[order] > share * len(groups) + 1e-9
        apart = order[large][np.argsort(sizes[order[large]], kind="stable")]
        order = np.concatenate([apart[::-1], order[~large]] if first else [order[~large], apart])
    place = np.empty(len(names), np.int64)
    place[order] = np.arange(len(names))
    return place[member], member


def _share_before(rank: Indices) -> NDArray[np.float64]:
    """For each crystal, the share of all crystals that are in earlier groups: (n,)."""
    sizes = np.bincount(rank)
    return (np.concatenate([[0], np.cumsum(sizes)[:-1]]) / len(rank))[rank]


def _absent(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan")
    return value is None or (isinstance(value, float) and np.isnan(value))
