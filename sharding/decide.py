"""Stage 2: within a range of formulas, find twins, drop excluded and repeated crystals, and split by groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from sharding import spill, twins
from sharding.convert import hashes_of
from sharding.crystal import Refusal
from sharding.manifest import SPLITS
from sharding.settings import ShardSettings
from sharding.spill import Spill
from sharding.twins import Catalogue


@dataclass(frozen=True)
class Decision:
    """One task: all crystals whose formula's hash lies in [low, high)."""

    low: int
    high: int
    graphs: list[Path]  # files of stage 1
    excluded: list[Path]  # files of stage 1 for the crystals to exclude
    path: Path
    settings: ShardSettings


def decide(task: Decision) -> tuple[int, list[Refusal]]:
    """Write the crystals that are kept, sorted by a seeded hash of their keys, with their splits.

    Returns:
        The number of crystals kept, and the refusals.
    """
    if not task.path.exists():
        found = spill.gather(task.graphs, task.low, task.high)
        excluded = spill.gather(task.excluded, task.low, task.high) if task.excluded else None
        spill.write(task.path, decided(found, excluded, task.settings))
    return len(spill.read(task.path)), spill.refusals(task.path)


def decided(found: Spill, excluded: Spill | None, settings: ShardSettings) -> Spill:
    """Return the crystals that are kept, with groups and splits, and the refusals."""
    refusals: list[Refusal] = []

    def drop(code: str, reasons: dict[int, str]) -> None:
        nonlocal found
        if not reasons:
            return
        refusals.extend(refusal(found.rows, i, code, text) for i, text in reasons.items())
        found = chosen(found, np.setdiff1d(np.arange(len(found)), np.fromiter(reasons, np.int64, len(reasons))))

    drop("duplicate_key", repeated_keys(found.rows))
    if settings.fingerprints and len(found):
        if excluded is not None and len(excluded):
            excluded_keys = [f"{i}" for i in range(len(excluded))]  # numbered, since keys may repeat across sources
            near = twins.match(_catalogue(excluded, excluded_keys), _catalogue(found))
            names = excluded.rows["key"].to_pylist()
            drop("excluded", {i: f"a twin of {names[j]!r}, which is excluded" for i, j in enumerate(near) if j >= 0})
        if settings.duplicates != "keep" and len(found):
            repeated = twins.exact_duplicates if settings.duplicates == "exact" else twins.near_duplicates
            stands = repeated(_catalogue(found))
            keys = found.graphs.keys
            drop("duplicate", {i: f"repeats {keys[j]!r}" for i, j in enumerate(stands) if i != j})
    groups = groups_of(found, settings)
    splits = np.array([SPLITS.index(split_of(group, settings)) for group in groups], np.uint8)
    rows = _set(_set(found.rows, "group", pa.array(groups, pa.string())), "split", pa.array(splits))
    return spill.sort(hashes_of(found.graphs.keys, settings.seed), found.graphs, rows, refusals)


def groups_of(found: Spill, settings: ShardSettings) -> list[str]:
    """The group of each crystal: the one its source names, else its twin group (its formula without fingerprints).

    A twin of a crystal with a source-named group joins that group. Source-named groups are never merged: the prototypes
    of ``aflow:`` are so similar that all would become one.
    """
    given = found.rows["group"].to_pylist()
    formulas = found.rows["formula"].to_pylist()
    if not settings.fingerprints or len(found) == 0:
        return [group or formula for group, formula in zip(given, formulas, strict=True)]
    stands = twins.twin_groups(_catalogue(found))
    names: dict[int, str] = {}  # twin group → the smallest of the names that sources give its members
    for own, s in zip(given, stands.tolist(), strict=True):
        if own:
            names[s] = min(own, names.get(s, own))
    return [
        own or names.get(s) or f"{formula} {found.graphs.keys[s]}"
        for own, formula, s in zip(given, formulas, stands.tolist(), strict=True)
    ]


def split_of(group: str, settings: ShardSettings) -> str:
    """The split of a group, from a seeded hash of its name: adding other groups never moves it."""
    u = xxhash.xxh3_64_intdigest(f"split/{group}".encode(), settings.seed) / 2**64
    return "val" if u < settings.val else "test" if u < settings.val + settings.test else "train"


def repeated_keys(rows: pa.Table) -> dict[int, str]:
    """Find rows whose key already occurs earlier in the sources: index → message."""
    keys, order = rows["key"].to_pylist(), np.asarray(rows["order"])
    first: dict[str, int] = {}
    repeated = {}
    for i in np.argsort(order).tolist():
        if (at := first.setdefault(keys[i], i)) != i:
            repeated[i] = f"{keys[i]!r} was met before, in {rows['source'][at]}, {rows['position'][at]}"
    return repeated


def chosen(found: Spill, index: NDArray[np.int64]) -> Spill:
    """Some of the crystals, in ascending order of their indices."""
    return Spill(found.hashes[index], found.graphs.take(index), found.rows.take(index), [])


def refusal(rows: pa.Table, i: int, code: str, text: str) -> Refusal:
    """The quarantine entry for a row."""
    key, source, position = (rows[name][i].as_py() for name in ("key", "source", "position"))
    return Refusal(key, source, position, code, text)


def _catalogue(found: Spill, keys: Sequence[str] | None = None) -> Catalogue:
    rows = found.rows
    vectors: NDArray[np.float32] = np.asarray(rows["fingerprint"].combine_chunks().flatten(), np.float32)
    return Catalogue(
        keys=found.graphs.keys if keys is None else keys,
        formulas=rows["formula"].to_pylist(),
        fingerprints=vectors.reshape(len(found), -1),
        volumes=np.asarray(rows["volume"]) / found.graphs.n_atoms,
    )


def _set(rows: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), values)
