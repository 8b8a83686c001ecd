"""The data of a study: read and turned into graphs once, then mapped into memory by every process that needs them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from sklearn.model_selection import KFold

from cdssl_dist.data import subset
from cdssl_dist.data.dataset import DataSet, is_data_set
from cdssl_dist.data.labeled import formulas_of, load_labeled
from cdssl_dist.data.tables import rows_of
from cdssl_dist.finetune.splits import hold_out
from cdssl_dist.finetune.targets import Array
from cdssl_dist.study.config import Folds, Shares, SplitColumn, StudyConfig
from sharding.graph import ARRAYS, Multigraphs
from sharding.manifest import DataSetError, write_atomically

VERSION: Final = 2  # of the cached form


@dataclass(frozen=True)
class StudyCrystals:
    """The crystals of one data set, with everything a study reads; one entry per crystal, in order."""

    graphs: Multigraphs  # arrays mapped into memory
    groups: list[str]
    formulas: list[str]  # reduced
    labels: dict[str, Array]  # target → NaN where missing; per atom where the target is extensive
    parts: dict[str, NDArray[np.int64]]  # target → TRAIN, EVALUATE, PREDICT or NONE; with folds, the fold's number
    source: str  # digest of what was read
    without: dict[str, list[str]]  # target → ids of crystals to predict that have no graph


TRAIN, EVALUATE, PREDICT, NONE = 0, 1, 2, -1


def prepare(config: StudyConfig, name: str, path: str, cutoff: float, folder: Path) -> Path:
    """Read a data set and cache its graphs below ``folder``; an existing cache is reused.

    Args:
        config: the study; only what it says about this data set is used.
        name: name of the data set.
        path: anything that ``cdssl finetune --data`` takes.
        cutoff: cutoff of the encoder, Å.
        folder: parent folder of the caches of all data sets.

    Returns:
        The folder of this data set, for ``open_crystals``.

    Raises:
        DataSetError: if a column is missing, or nothing can be read.
    """
    data = config.data[name]
    targets = {t: about for t, about in config.targets.items() if about.data == name}
    columns = {t: about.column or data.column.format(target=t) for t, about in targets.items()}
    split = data.split
    texts = {t: split.column.format(target=t) for t in targets} if isinstance(split, SplitColumn) else {}
    source = digest_of(path)
    extensive = sorted(t for t, about in targets.items() if about.extensive)
    about = {"version": VERSION, "source": source, "cutoff": cutoff, "columns": columns, "extensive": extensive}
    about["split"] = split.model_dump(mode="json")
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    place = folder / f"{name}-{key[:16]}"
    if (place / "about.json").exists():
        return place

    found = load_labeled(
        path, list(dict.fromkeys(columns.values())), cutoff, columns=list(dict.fromkeys(texts.values())), unlabeled=True
    )
    per_atom = found.graphs.n_atoms.astype(np.float64)
    table: dict[str, Any] = {
        "key": found.graphs.keys,
        "group": found.groups,
        "formula": formulas_of(found.graphs),
    }
    for t, column in columns.items():
        values = found.targets[:, found.names.index(column)]
        if isinstance(split, Folds):
            table[f"part.{t}"] = _folds(path, found.graphs.keys, split)
        elif isinstance(split, Shares):
            table[f"part.{t}"] = _shares(found.groups, split)
        else:
            names = {split.train: TRAIN, split.evaluate: EVALUATE, split.predict: PREDICT}
            table[f"part.{t}"] = [names.get(str(v).strip(), NONE) for v in found.columns[texts[t]]]
            if not {TRAIN, EVALUATE} <= set(table[f"part.{t}"]):
                raise DataSetError(
                    f"{path}: column {texts[t]!r} must contain both {split.train!r} and {split.evaluate!r}"
                )
            values = np.where(np.isin(table[f"part.{t}"], (TRAIN, EVALUATE)), values, np.nan)  # others stay secret
        table[f"y.{t}"] = values / per_atom if t in extensive else values
    without = _without_graph(path, texts, split, set(found.graphs.keys)) if isinstance(split, SplitColumn) else {}
    temporary = folder / f".{place.name}.{os.getpid()}.tmp"
    temporary.mkdir(parents=True)
    for array, content in found.graphs.arrays().items():
        np.save(temporary / f"{array}.npy", content)
    pq.write_table(pa.table(table), temporary / "crystals.parquet")
    write_atomically(
        temporary / "about.json", json.dumps(about | {"sources": found.sources, "without": without}).encode()
    )
    shutil.rmtree(place, ignore_errors=True)  # left by a killed process
    temporary.rename(place)
    return place


@functools.lru_cache(maxsize=4)
def open_crystals(place: Path) -> StudyCrystals:
    """Open what ``prepare`` wrote; arrays are memory-mapped, so the processes of one machine share them."""
    arrays = {name: np.asarray(np.load(place / f"{name}.npy", mmap_mode="r")) for name in ARRAYS}
    table = pq.read_table(place / "crystals.parquet")
    targets = [name[2:] for name in table.column_names if name.startswith("y.")]
    about = json.loads((place / "about.json").read_text())
    return StudyCrystals(
        graphs=Multigraphs(keys=table["key"].to_pylist(), labels={}, **arrays),
        groups=table["group"].to_pylist(),
        formulas=table["formula"].to_pylist(),
        labels={t: np.array(table[f"y.{t}"], np.float64) for t in targets},
        parts={t: np.array(table[f"part.{t}"], np.int64) for t in targets},
        source=about["source"],
        without=about["without"],
    )


def pretraining_formulas(path: str) -> set[str]:
    """Reduced formulas of the training crystals of a data set of shards."""
    with DataSet(path) as data:
        return subset.formulas(data, "train")


def _without_graph(path: str, columns: dict[str, str], split: SplitColumn, known: set[str]) -> dict[str, list[str]]:
    """For each target, the ids that its split column marks for prediction but that have no graph."""
    names = list(dict.fromkeys(columns.values()))
    found: dict[str, list[str]] = {target: [] for target in columns}
    stems = {key.rpartition("#")[2] for key in known if "#" in key}  # ids that are mere numbers
    for key, row in rows_of(path, names):
        for target, column in columns.items() if key not in known and key not in stems else ():
            if str(row[names.index(column)]).strip() == split.predict:
                found[target].append(key)
    return found


def _shares(groups: list[str], shares: Shares) -> NDArray[np.int64]:
    """TRAIN or EVALUATE for each crystal."""
    part = np.full(len(groups), TRAIN)
    part[hold_out(np.arange(len(groups)), groups, shares.evaluate, shares.seed)[1]] = EVALUATE
    return part


def _folds(path: str, keys: list[str], folds: Folds) -> NDArray[np.int64]:
    """The fold in which each crystal is evaluated, from its row number, with which its key ends."""
    if Path(path).suffixes[:1] == [".csv"]:  # its keys do not count rows without a crystal
        raise DataSetError(f"{path}: folds need row numbers, which the keys of a CSV do not give; use Matbench's JSON")
    of_row = np.empty(folds.rows, np.int64)
    for number, (_, rows) in enumerate(KFold(folds.k, shuffle=True, random_state=folds.seed).split(of_row)):
        of_row[rows] = number
    try:
        rows_of = [int(key.rpartition("#")[2]) for key in keys]
        return of_row[rows_of]
    except (ValueError, IndexError):
        raise DataSetError(
            f"{path}: folds need row numbers below {folds.rows}, the configured number of rows, but there is the id "
            f"{keys[-1]!r}; give the file in its official order, with its number of rows"
        ) from None


def digest_of(path: str) -> str:
    """SHA-256 of a file, or of all files of a folder, or the digest of a data set of shards.

    For other sources, which are read over a network, only the name is hashed.
    """
    if is_data_set(path):
        with DataSet(path) as data:
            return data.manifest.digest
    place = Path(path)
    if place.is_dir():
        files = sorted(p for p in place.rglob("*") if p.is_file())
        return hashlib.sha256(json.dumps([[str(p.relative_to(place)), _sha256(p)] for p in files]).encode()).hexdigest()
    return _sha256(place) if place.is_file() else hashlib.sha256(path.encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
