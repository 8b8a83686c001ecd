"""Labeled crystals in memory, for everything downstream: from a data set of shards, or straight from a database."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import gemmi
import numpy as np
from numpy.typing import NDArray

from cdssl_dist.data.dataset import DataSet, is_data_set, no_split
from cdssl_dist.data.subset import read, select
from cdssl_dist.data.tables import read_columns
from sharding.crystal import SYMBOLS, Crystal, Refusal, reduced_formula
from sharding.graph import Multigraphs, build, concatenate, offsets
from sharding.manifest import DataSetError
from sharding.progress import Progress
from sharding.sources import ReadOptions, open_source, parse_records
from sharding.sources.pieces import MISSING, is_other_text, number

DALTON_PER_CUBIC_ANGSTROM: Final = 1.66053906660  # in g/cm³ (CODATA 2018)
CRYSTALS_AT_ONCE: Final = 512
_ATOMIC_WEIGHT: Final = np.array([0.0] + [gemmi.Element(z).weight for z in range(1, len(SYMBOLS))])  # Da


@dataclass(frozen=True)
class Labeled:
    """Crystals with labels."""

    graphs: Multigraphs
    targets: NDArray[np.float64]  # (n, T), NaN where missing
    groups: list[str]  # crystals of one group never straddle a split
    names: tuple[str, ...]  # of the targets
    units: tuple[str, ...]
    columns: dict[str, list[Any]]  # further columns requested, (n,) each; None if a crystal has no value
    sources: list[dict[str, str]]  # name, licence, cite

    def __len__(self) -> int:
        return len(self.targets)

    def digest(self) -> str:
        """SHA-256 of keys and labels."""
        text = json.dumps([self.names, self.graphs.keys], ensure_ascii=False)
        return hashlib.sha256(text.encode() + self.targets.tobytes()).hexdigest()


def volume(graphs: Multigraphs) -> NDArray[np.float64]:
    """Volume of each cell, Å³: (G,)."""
    return np.abs(np.linalg.det(graphs.lattice.astype(np.float64)))


def density(graphs: Multigraphs) -> NDArray[np.float64]:
    """Mass density of each crystal, g/cm³, from its cell and the standard atomic weights: (G,)."""
    mass = _ATOMIC_WEIGHT[graphs.atomic_numbers]
    starts = np.concatenate([[0], np.cumsum(graphs.n_atoms, dtype=np.int64)[:-1]])
    return DALTON_PER_CUBIC_ANGSTROM * np.add.reduceat(mass, starts) / volume(graphs)


def volume_per_atom(graphs: Multigraphs) -> NDArray[np.float64]:
    """Volume per atom, Å³: (G,)."""
    return volume(graphs) / graphs.n_atoms


def formulas_of(graphs: Multigraphs) -> list[str]:
    """Reduced formula of each crystal."""
    start = offsets(graphs.n_atoms)
    return [reduced_formula(graphs.atomic_numbers[a:b]) for a, b in zip(start[:-1], start[1:], strict=True)]


# Targets that need no label: name → how it is computed, and its unit.
COMPUTED: Final[dict[str, tuple[Callable[[Multigraphs], NDArray[np.float64]], str]]] = {
    "computed:density": (density, "g/cm³"),
    "computed:volume_per_atom": (volume_per_atom, "Å³/atom"),
}


def load_labeled(
    path: str,
    targets: str | Sequence[str],
    cutoff: float,
    split: str | None = None,
    *,
    keys: Sequence[str] | None = None,
    where: str | None = None,
    columns: Sequence[str] = (),
    table: str | None = None,
    classes: bool = False,
    unlabeled: bool = False,
) -> Labeled:
    """Load the crystals that have at least one target.

    Args:
        path: a data set of shards, a folder or a URL, or anything that ``cdssl shard`` reads.
        targets: names of labels or columns, or of ``COMPUTED`` targets.
        cutoff: of the encoder that will use the graphs, Å.
        split: a split of a data set of shards; all of them if omitted.
        keys: ids of crystals; the result is in this order, without those that have no target.
        where: a condition on columns of the graph table of a data set of shards; see ``subset.condition``.
        columns: further columns to read, numbers or text: from the CSV or Parquet file itself, or from ``table``.
        table: a CSV or Parquet file that holds labels and columns, by the ids of the crystals.
        classes: the only target is a class name, so it may be text; it is read like ``columns``, not as a number.
        unlabeled: include crystals without any target, too.

    Raises:
        DataSetError: if a target, a column or a key does not exist, no crystal has a target, or the cutoff is
            another one.
    """
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    if len(set(names)) != len(names):
        raise DataSetError(f"a target is named twice: {', '.join(names)}")
    looked_up = [n for n in names if n not in COMPUTED] if table or classes else []
    stored = [n for n in names if n not in COMPUTED and n not in looked_up]
    if is_data_set(path):
        having = [f"y.{stored[0]}"] if len(stored) == 1 and not unlabeled else []  # other blocks are not read
        graphs, groups, units, sources = _from_shards(path, stored, having, cutoff, split, keys, where)
    elif split or where:
        raise no_split(path)
    else:
        graphs, groups, units, sources = _from_source(path, stored, cutoff, keys)
    wanted = list(dict.fromkeys([*looked_up, *columns]))
    found = read_columns(table or path, wanted, graphs.keys, "refuse" if table else "first") if wanted else {}
    values = np.full((len(graphs), len(names)), np.nan)
    for t, name in enumerate(names):
        if name in COMPUTED:
            compute, units[name] = COMPUTED[name]
            values[:, t] = compute(graphs)
        elif classes:
            order = {c: i for i, c in enumerate(class_names(found[name]))}
            values[:, t] = [np.nan if (c := _class(v)) is None else order[c] for v in found[name]]
        elif name in looked_up:
            values[:, t] = _numbers(table or path, name, found[name])
        else:
            values[:, t] = graphs.labels[name]
    values[~np.isfinite(values)] = np.nan
    for t, name in enumerate(names):
        if len(values) and np.isnan(values[:, t]).all():
            hint = "" if classes else ": does the column exist, and hold numbers? A column of text is for classes"
            raise DataSetError(f"{path}: no crystal has a finite value of {name!r}{hint}")
    known = np.flatnonzero(np.isfinite(values).any(axis=1))
    if unlabeled:
        known = np.arange(len(graphs))
    return Labeled(
        graphs.take(known),
        values[known],
        [groups[i] for i in known],
        names,
        tuple(units.get(n, "") for n in names),
        {name: [found[name][i] for i in known] for name in wanted},
        sources,
    )


def _numbers(path: str, name: str, column: Sequence[Any]) -> list[float]:
    """Convert a column to numbers, NaN if missing; a column of both numbers and text is an error."""
    values = [math.nan if (v := number(x)) is None else v for x in column]
    known = sum(map(math.isfinite, values))
    if known and (texts := [x for x in column if is_other_text(x)]):
        raise DataSetError(
            f"{path}: {len(texts)} values of {name!r} are text, such as {texts[0]!r}, and {known} are numbers; "
            "dropping them could bias what is learned: make them numbers, or leave them empty"
        )
    return values


def class_names(column: Sequence[Any]) -> tuple[str, ...]:
    """The classes of a column, in the order of their indices."""
    return tuple(sorted({c for v in column if (c := _class(v)) is not None}))


def _class(value: Any) -> str | None:
    """The name of a class, None if missing; 1, 1.0 and "1" are the same class."""
    text = "" if value is None else str(value).strip()
    if text.lower() in MISSING:
        return None
    as_number = number(value) if not isinstance(value, bool) else None
    if as_number is None or not math.isfinite(as_number):
        return text
    return str(int(as_number)) if as_number.is_integer() else repr(as_number)


Loaded = tuple[Multigraphs, list[str], dict[str, str], list[dict[str, str]]]


def _from_shards(
    path: str,
    targets: list[str],
    having: list[str],
    cutoff: float,
    split: str | None,
    keys: Sequence[str] | None,
    where: str | None,
) -> Loaded:
    with DataSet(path) as data:
        manifest = data.manifest
        data.check_cutoff(cutoff)
        for target in targets:
            if target not in manifest.labels:
                raise DataSetError(f"{path}: no label {target!r}; {_known(manifest.labels)}")
        rows = select(data, split=split, keys=keys, where=where, having=having, columns=["group"])
        graphs = read(data, rows)
    units = {t: manifest.labels[t].get("unit", "") for t in targets}
    return graphs, rows["group"].to_pylist(), units, manifest.sources


def _from_source(path: str, targets: list[str], cutoff: float, keys: Sequence[str] | None) -> Loaded:
    source = open_source(path, ReadOptions(labels={t: t for t in targets}))
    parts: list[Multigraphs] = []
    groups: list[str] = []
    refused: Counter[str] = Counter()  # reasons
    repeated = 0
    seen: set[str] = set()
    with Progress("read", "crystals") as progress:
        for crystals, unreadable in in_batches(parse_records(source, source.records()), CRYSTALS_AT_ONCE):
            new = []
            for crystal in crystals:
                if crystal.key not in seen:
                    seen.add(crystal.key)
                    new.append(crystal)
            graphs, bad = build(new, cutoff, tuple(targets))
            refused.update(refusal.text for refusal in unreadable)
            refused.update(why.text for why in bad.values())
            repeated += len(crystals) - len(new)
            parts.append(graphs)
            groups += [c.group or reduced_formula(c.atomic_numbers) for i, c in enumerate(new) if i not in bad]
            progress.add(len(graphs))
    reasons = "; ".join(f"{text} ({n:,})" for text, n in refused.most_common(3))
    if refused:
        more = "" if len(refused) <= 3 else "; …; `cdssl shard` lists all with their reasons"
        print(f"{path}: {refused.total():,} inputs cannot be used: {reasons}{more}", file=sys.stderr)
    if repeated:
        print(
            f"{path}: {repeated} crystals have the id of an earlier one; the first of each id is used", file=sys.stderr
        )
    if not parts or sum(len(p) for p in parts) == 0:
        hint = "; a column of text is for classes" if "label" in reasons else ""
        raise DataSetError(f"{path}: no crystal can be used; {refused.total()} were refused: {reasons}{hint}")
    graphs = concatenate(parts)
    if keys is not None:
        place = {key: i for i, key in enumerate(graphs.keys)}
        if absent := [key for key in keys if key not in place]:
            raise DataSetError(
                f"{path}: {len(absent)} of {len(keys)} keys are not in it, e.g. {absent[0]!r}; its keys look like "
                f"{graphs.keys[0]!r}"
            )
        graphs, groups = graphs.take(np.array([place[k] for k in keys])), [groups[place[k]] for k in keys]
    about = {"name": source.name, "licence": source.licence, "cite": source.cite}
    return graphs, groups, {t: source.units.get(t, "") for t in targets}, [about]


def in_batches(items: Iterator[Crystal | Refusal], size: int) -> Iterator[tuple[list[Crystal], list[Refusal]]]:
    """Yield batches of crystals, each with the refusals met on the way."""
    crystals: list[Crystal] = []
    refused: list[Refusal] = []
    for item in items:
        if isinstance(item, Refusal):
            refused.append(item)
        else:
            crystals.append(item)
        if len(crystals) == size or len(refused) == size:
            yield crystals, refused
            crystals, refused = [], []
    yield crystals, refused


def _known(names: dict[str, dict[str, str]]) -> str:
    listed = ", ".join([*names, *COMPUTED])
    return f"known are {listed} (cdssl shard --label NAME=COLUMN stores further labels)"
