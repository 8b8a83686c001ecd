"""Stream any number of crystals, in chunks: for processing each of them in bounded memory."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cdssl_dist.data.dataset import DataSet, is_data_set, no_split
from cdssl_dist.data.labeled import in_batches
from cdssl_dist.data.subset import select
from sharding.block import decode
from sharding.commands import UseError, positive
from sharding.convert import batches_of
from sharding.crystal import Refusal
from sharding.executor import Executor
from sharding.graph import Multigraphs, build
from sharding.manifest import SPLITS, DataSetError
from sharding.progress import Progress
from sharding.sources import ReadOptions, Record, Source, open_source, parse_records

AT_ONCE: Final = 512  # crystals in memory
ROWS_PER_GROUP: Final = 16_384

Chunk = tuple[Multigraphs, list[Refusal]]


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Add the arguments of commands that stream crystals through a model into a file."""
    p.add_argument("--registry", help="MLflow URI; if omitted, MLFLOW_TRACKING_URI, else runs/mlflow.db")
    p.add_argument("--data", required=True, help="a data set of shards, or a file or source that cdssl shard reads")
    p.add_argument("--split", choices=("train", "val", "test"), help="use this split of a data set of shards only")
    p.add_argument("--where", metavar="CONDITION", help="filter a data set of shards, as in 'n_atoms <= 20'")
    p.add_argument("--out", required=True, help="Parquet file: a row for each crystal")
    p.add_argument("--workers", type=positive, default=1, help="processes; each holds the model")
    p.add_argument("--threads", type=positive, default=1, help="threads of torch in each process, on CPU")


@dataclass(frozen=True)
class FromSource:
    """Records of a database, to be parsed by the process that uses the part."""

    source: Source  # used to parse, not to read
    records: list[Record]
    cutoff: float

    def chunks(self) -> Iterator[Chunk]:
        """Yield their graphs, and what was refused."""
        for crystals, refused in in_batches(parse_records(self.source, self.records), AT_ONCE):
            graphs, bad = build(crystals, self.cutoff)
            name = self.source.name
            no_graph = [Refusal(crystals[i].key, name, crystals[i].position, w.code, w.text) for i, w in bad.items()]
            yield graphs, refused + no_graph


@dataclass(frozen=True)
class FromBlock:
    """A block of a data set of shards, or some of its crystals."""

    path: str
    digest: str  # of the data set
    block: int
    keys: frozenset[str] | None = None  # if omitted, all

    def chunks(self) -> Iterator[Chunk]:
        """Yield its graphs; none is refused."""
        graphs = decode(_opened(self.path, self.digest).read(self.block))
        if self.keys is not None:
            graphs = graphs.take(np.array([i for i, key in enumerate(graphs.keys) if key in self.keys]))
        yield graphs, []


Part = FromSource | FromBlock


@functools.lru_cache(maxsize=1)
def _opened(path: str, digest: str) -> DataSet:
    """Open a data set, once per process."""
    return DataSet(path)


def parts_of(path: str, cutoff: float, split: str | None = None, where: str | None = None) -> Iterator[Part]:
    """Cut a data set of shards into blocks, or anything else that ``cdssl shard`` reads into batches of records.

    Args:
        path: of either.
        cutoff: of the model that will use the graphs, Å.
        split, where: which crystals of a data set of shards; see ``subset.select``.

    Raises:
        DataSetError: if the cutoff is another one, or ``split`` or ``where`` is given for anything but shards.
    """
    if is_data_set(path):
        yield from _of_shards(path, cutoff, split, where)
        return
    if split or where:
        raise no_split(path)
    for source, records in batches_of(open_source(path, ReadOptions())):
        yield FromSource(source, records, cutoff)


def stream(path: str, cutoff: float, split: str | None = None, where: str | None = None) -> Iterator[Chunk]:
    """Yield the chunks of all ``parts_of``; a bad input does not affect others."""
    for part in parts_of(path, cutoff, split, where):
        yield from part.chunks()


def _of_shards(path: str, cutoff: float, split: str | None, where: str | None) -> Iterator[FromBlock]:
    with DataSet(path) as data:
        digest = data.manifest.digest
        data.check_cutoff(cutoff)
        if where:
            rows = select(data, split=split, where=where)
            keys, blocks = rows["key"], np.asarray(rows["block"])
            for block in np.unique(blocks).tolist():
                yield FromBlock(path, digest, block, frozenset(keys.filter(pa.array(blocks == block)).to_pylist()))
            return
        if split and split not in SPLITS:
            raise DataSetError(f"no split {split!r}; known are {', '.join(SPLITS)}")
        for block, own in enumerate(data.blocks["split"].tolist()):
            if not split or own == SPLITS.index(split):
                yield FromBlock(path, digest, block)


def check_out(out: str, data: str) -> None:
    """Check that ``Rows`` can be written to a path.

    Raises:
        UseError: if its name is not that of a Parquet file, or it is a folder or the data themselves.
    """
    path = Path(out)
    if path.suffix != ".parquet" or path.is_dir():
        raise UseError(f"--out {out}: must be a Parquet file, such as vectors.parquet")
    if path.exists() and Path(data).exists() and path.samefile(data):
        raise UseError(f"--out {out}: the data would be replaced; name another file")


class Rows:
    """A Parquet file that appears when it is complete: a row for each crystal, refused ones included.

    Args:
        path: of the file.
        fields: its columns, besides ``key`` and ``refused``.
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
        """Add rows, given by column; omitted columns are null."""
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
        try:
            if kind is None:
                self._flush()
            self.writer.close()
            if kind is None:
                self.temporary.replace(self.path)
        finally:  # a full disk is met at the end, too
            self.temporary.unlink(missing_ok=True)


Use = Callable[[Multigraphs], dict[str, Any]]
Answers = tuple[list[dict[str, Any]], list[Refusal]]


def write_rows(rows: Rows, parts: Iterator[Part], use: Use, what: str, workers: int = 1, threads: int = 1) -> int:
    """Apply a function to all graphs, and write its results, in the order of the parts.

    Args:
        rows: the file.
        parts: of ``parts_of``.
        use: graphs → columns of the file; it is sent to the workers.
        what: label of the progress line.
        workers: number of processes; 1 does everything in this one.
        threads: of torch in each.

    Returns:
        The number of inputs that were refused; each has a row that says why.

    Raises:
        DataSetError: if there is no input at all.
    """
    refusals = 0
    answer = functools.partial(_answer, use, threads)
    with rows, Executor(workers) as executor, Progress(what, "crystals") as progress:
        for answers, refused in executor.map(answer, parts):
            for columns in answers:
                rows.add(columns)
                progress.add(len(columns["key"]))
            if refused:
                refusals += len(refused)
                reasons = [f"{r.code}: {r.text}" for r in refused]
                rows.add({"key": [r.key or f"{r.source}, {r.position}" for r in refused], "refused": reasons})
        if not rows.rows:
            raise DataSetError("there is no crystal in the data")
    return refusals


def _answer(use: Use, threads: int, part: Part) -> Answers:
    torch.set_num_threads(threads)
    answers, refusals = [], []
    for graphs, refused in part.chunks():
        refusals += refused
        if len(graphs):
            answers.append({"key": graphs.keys} | use(graphs))
    return answers, refusals
