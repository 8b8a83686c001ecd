"""Labeled crystals in memory, for everything downstream: from a data set of shards, or straight from a database."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import gemmi
import numpy as np
import torch
from numpy.typing import NDArray

from cdssl_dist.batch import GraphBatch
from cdssl_dist.dataset import DataSet, is_data_set
from cdssl_dist.embedding import batch_of
from cdssl_dist.subset import read, select
from sharding.crystal import SYMBOLS, Crystal, Refusal, reduced_formula
from sharding.graph import Multigraphs, build, concatenate
from sharding.manifest import DataSetError
from sharding.progress import Progress
from sharding.sources import ReadOptions, open_source, parse_records

DALTON_PER_CUBIC_ANGSTROM: Final = 1.66053906660  # in g/cm³ (CODATA 2018)
CRYSTALS_AT_ONCE: Final = 512
_ATOMIC_WEIGHT: Final = np.array([0.0] + [gemmi.Element(z).weight for z in range(1, len(SYMBOLS))])  # Da


@dataclass(frozen=True)
class Labeled:
    """Crystals with one number each."""

    graphs: Multigraphs
    target: NDArray[np.float64]  # (n,)
    groups: list[str]  # crystals of one group never straddle a split
    name: str  # of the target
    unit: str

    def __len__(self) -> int:
        return len(self.target)

    def batch(self, index: NDArray[np.int64], device: torch.device) -> tuple[GraphBatch, torch.Tensor]:
        """Some of the crystals as one batch, and their targets (n,) f32."""
        target = torch.from_numpy(self.target[index]).float().to(device)
        return batch_of(self.graphs.take(index), device), target


def volume(graphs: Multigraphs) -> NDArray[np.float64]:
    """Å³ of each cell: (G,)."""
    return np.abs(np.linalg.det(graphs.lattice.astype(np.float64)))


def density(graphs: Multigraphs) -> NDArray[np.float64]:
    """Mass density of each crystal, g/cm³, from its cell and the standard atomic weights: (G,)."""
    mass = _ATOMIC_WEIGHT[graphs.atomic_numbers]
    starts = np.concatenate([[0], np.cumsum(graphs.n_atoms, dtype=np.int64)[:-1]])
    return DALTON_PER_CUBIC_ANGSTROM * np.add.reduceat(mass, starts) / volume(graphs)


def volume_per_atom(graphs: Multigraphs) -> NDArray[np.float64]:
    """Å³ per atom: (G,)."""
    return volume(graphs) / graphs.n_atoms


# Targets that need no label: name → how it is computed, and its unit.
COMPUTED: Final[dict[str, tuple[Callable[[Multigraphs], NDArray[np.float64]], str]]] = {
    "computed:density": (density, "g/cm³"),
    "computed:volume_per_atom": (volume_per_atom, "Å³/atom"),
}


def load_labeled(
    path: str,
    target: str,
    cutoff: float,
    split: str | None = None,
    *,
    keys: Sequence[str] | None = None,
    where: str | None = None,
) -> Labeled:
    """Crystals that have a target.

    Args:
        path: a data set of shards, a folder or a URL, or anything that ``cdssl shard`` reads.
        target: a label or column, or one of ``COMPUTED``.
        cutoff: of the encoder that will see them, Å.
        split: which split of a data set of shards; all of them where left out.
        keys: ids of crystals; the result is in this order, less those without the target.
        where: a condition on columns of the graph table of a data set of shards; see ``subset.condition``.

    Raises:
        DataSetError: where the target or a key does not exist, no crystal has it, or the cutoff is another one.
    """
    if Path(path).is_dir() or is_data_set(path):
        graphs, groups, unit = _from_shards(path, target, cutoff, split, keys, where)
    elif split or where:
        raise DataSetError(f"{path}: not a data set of shards, so there is no split and no condition to choose by")
    else:
        graphs, groups, unit = _from_source(path, target, cutoff)
        if keys is not None:
            place = {key: i for i, key in enumerate(graphs.keys)}
            if absent := [key for key in keys if key not in place]:
                raise DataSetError(f"{path}: {len(absent)} of {len(keys)} keys are not in it, as {absent[0]!r}")
            graphs, groups = graphs.take(np.array([place[k] for k in keys])), [groups[place[k]] for k in keys]
    if target in COMPUTED:
        compute, unit = COMPUTED[target]
        values = compute(graphs)
    else:
        values = graphs.labels[target].astype(np.float64)
    known = np.flatnonzero(np.isfinite(values))
    if len(known) == 0:
        raise DataSetError(f"{path}: no crystal has a finite value of {target!r}")
    return Labeled(graphs.take(known), values[known], [groups[i] for i in known], target, unit)


def _from_shards(
    path: str, target: str, cutoff: float, split: str | None, keys: Sequence[str] | None, where: str | None
) -> tuple[Multigraphs, list[str], str]:
    with DataSet(path) as data:
        manifest = data.manifest
        if abs(manifest.cutoff - cutoff) > 1e-6:
            raise DataSetError(
                f"{path}: graphs with a cutoff of {manifest.cutoff} Å, the encoder wants {cutoff} Å; "
                f"shard again with --cutoff {cutoff}"
            )
        if target not in COMPUTED and target not in manifest.labels:
            raise DataSetError(f"{path}: no label {target!r}; {_known(manifest.labels)}")
        having = [] if target in COMPUTED else [f"y.{target}"]  # blocks without a labeled crystal are not read
        rows = select(data, split=split, keys=keys, where=where, having=having, columns=["group"])
        graphs = read(data, rows)
    return graphs, rows["group"].to_pylist(), manifest.labels.get(target, {}).get("unit", "")


def _from_source(path: str, target: str, cutoff: float) -> tuple[Multigraphs, list[str], str]:
    labels = {} if target in COMPUTED else {target: target}
    source = open_source(path, ReadOptions(labels=labels))
    parts: list[Multigraphs] = []
    groups: list[str] = []
    refused = 0
    with Progress("read", "crystals") as progress:
        for crystals, unreadable in _batches(parse_records(source, source.records())):
            graphs, bad = build(crystals, cutoff, tuple(labels))
            refused += unreadable + len(bad)
            parts.append(graphs)
            groups += [c.group or reduced_formula(c.atomic_numbers) for i, c in enumerate(crystals) if i not in bad]
            progress.add(len(graphs))
    if refused:
        print(f"{path}: {refused} inputs cannot be used; `cdssl shard` lists them with their reasons")
    if not parts or sum(len(p) for p in parts) == 0:
        raise DataSetError(f"{path}: no crystal can be used ({refused} were refused)")
    return concatenate(parts), groups, source.units.get(target, "unknown unit")


def _batches(items: Iterator[Crystal | Refusal]) -> Iterator[tuple[list[Crystal], int]]:
    crystals: list[Crystal] = []
    refused = 0
    for item in items:
        if isinstance(item, Refusal):
            refused += 1
        else:
            crystals.append(item)
        if len(crystals) == CRYSTALS_AT_ONCE:
            yield crystals, refused
            crystals, refused = [], 0
    yield crystals, refused


def _known(names: dict[str, dict[str, str]]) -> str:
    listed = ", ".join([*names, *COMPUTED])
    return f"known are {listed} (labels are carried along by cdssl shard --label NAME=COLUMN)"
