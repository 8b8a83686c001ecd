"""Crystals of any number, some at a time: for what is done to each of them, in bounded memory."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cdssl_dist.data.dataset import DataSet, is_data_set
from cdssl_dist.data.labeled import in_batches
from cdssl_dist.data.subset import select
from sharding.block import decode
from sharding.crystal import Refusal
from sharding.graph import Multigraphs, build
from sharding.manifest import SPLITS, DataSetError
from sharding.progress import Progress
from sharding.sources import ReadOptions, open_source, parse_records

AT_ONCE: Final = 512  # crystals in memory
ROWS_PER_GROUP: Final = 16_384

Chunk = tuple[Multigraphs, list[Refusal]]


def add_arguments(p: argparse.ArgumentParser) -> None:
    """What all commands take that stream crystals through a model into a file."""
    p.add_argument("--registry", help="MLflow URI; MLFLOW_TRACKING_URI, else runs/mlflow.db, where left out")
    p.add_argument("--data", required=True, help="a data set of shards, or a file or source that cdssl shard reads")
    p.add_argument("--split", choices=("train", "val", "test"), help="use this split of a data set of shards only")
    p.add_argument("--where", metavar="CONDITION", help="of a data set of shards, as in 'n_atoms <= 20'")
    p.add_argument("--out", required=True, help="Parquet file: a row for each crystal")
    p.add_argument("--threads", type=int, default=1, help="of torch, on CPU")


def stream(path: str, cutoff: float, split: str | None = None, where: str | None = None) -> Iterator[Chunk]:
    """The graphs of a data set of shards, block by block, or of anything that ``cdssl shard`` reads.

    Args:
        path: of either.
        cutoff: of the model that will see them, Å.
        split, where: of a data set of shards, which crystals; see ``subset.select``.

    Yields:
        Graphs, and what was refused meanwhile: one bad input costs no other.

    Raises:
        DataSetError: where the cutoff is another one, or there is nothing to choose by.
    """
    if Path(path).is_dir() or is_data_set(path):
        yield from _of_shards(path, cutoff, split, where)
        return
    if split or where:
        raise DataSetError(f"{path}: not a data set of shards, so there is no split and no condition to choose by")
    source = open_source(path, ReadOptions())
    for crystals, refused in in_batches(parse_records(source, source.records()), AT_ONCE):
        graphs, bad = build(crystals, cutoff)
        no_graph = [
            Refusal(crystals[i].key, source.name, crystals[i].position, why.code, why.text) for i, why in bad.items()
        ]
        yield graphs, refused + no_graph


def _of_shards(path: str, cutoff: float, split: str | None, where: str | None) -> Iterator[Chunk]:
    with DataSet(path) as data:
        if abs(data.manifest.cutoff - cutoff) > 1e-6:
            raise DataSetError(
                f"{path}: graphs with a cutoff of {data.manifest.cutoff} Å, the model wants {cutoff} Å; "
                f"shard again with --cutoff {cutoff}, or give the database itself"
            )
        if where:
            rows = select(data, split=split, where=where)
            keys, blocks = rows["key"], np.asarray(rows["block"])
            for block in np.unique(blocks).tolist():
                chosen = set(keys.filter(pa.array(blocks == block)).to_pylist())
                graphs = decode(data.read(block))
                yield graphs.take(np.array([i for i, key in enumerate(graphs.keys) if key in chosen])), []
            return
        if split and split not in SPLITS:
            raise DataSetError(f"no split {split!r}; known are {', '.join(SPLITS)}")
        for block, own in enumerate(data.blocks["split"].tolist()):
            if not split or own == SPLITS.index(split):
                yield decode(data.read(block)), []


class Rows:
    """A Parquet file that appears when it is complete: a row for each crystal, refused ones included.

    Args:
        path: of the file.
        fields: its columns, beside ``key`` and ``refused``.
        about: metadata of the schema.
    """

    def __init__(self, path: str | Path, fields: list[tuple[str, pa.DataType]], about: dict[str, str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = self.path.with_name(f".{self.path.name}.tmp")
        columns = [("key", pa.string()), *fields, ("refused", pa.string())]
        self.schema = pa.schema(columns, metadata=about)
        self.writer = pq.ParquetWriter(self.temporary, self.schema, compression="zstd")
        self.waiting: list[pa.RecordBatch] = []
        self.rows = 0

    def add(self, columns: dict[str, Any]) -> None:
        """Rows by column; a column that is left out is null."""
        n = len(columns["key"])
        arrays = [
            pa.array(columns[f.name], f.type, from_pandas=True) if f.name in columns else pa.nulls(n, f.type)
            for f in self.schema
        ]
        self.waiting.append(pa.RecordBatch.from_arrays(arrays, schema=self.schema))
        self.rows += n
        if sum(b.num_rows for b in self.waiting) >= ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self.waiting:
            self.writer.write_table(pa.Table.from_batches(self.waiting))
            self.waiting = []

    def __enter__(self) -> Rows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self.writer.close()
        if kind is None:
            self.temporary.replace(self.path)
        else:
            self.temporary.unlink(missing_ok=True)


def write_rows(rows: Rows, chunks: Iterator[Chunk], use: Callable[[Multigraphs], dict[str, Any]], what: str) -> int:
    """Apply a function to all graphs, and write what it says.

    Args:
        rows: the file.
        chunks: of ``stream``.
        use: graphs → columns of the file.
        what: for the progress line.

    Returns:
        The number of inputs that were refused; each has a row that says why.
    """
    refusals = 0
    with rows, Progress(what, "crystals") as progress:
        for graphs, refused in chunks:
            if len(graphs):
                rows.add({"key": graphs.keys} | use(graphs))
            if refused:
                refusals += len(refused)
                reasons = [f"{r.code}: {r.text}" for r in refused]
                rows.add({"key": [r.key or f"{r.source}, {r.position}" for r in refused], "refused": reasons})
            progress.add(len(graphs))
    return refusals
