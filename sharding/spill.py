"""Intermediate files between the stages of sharding: graphs, each with a row of metadata, sorted by a hash.

One file is one finished task. It is written under a temporary name and renamed, so it is either complete or absent, and
a rerun reuses what it finds. A task of the next stage reads one range of hashes from every file of the previous stage.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors.numpy import save

from sharding.block import views
from sharding.crystal import Refusal
from sharding.graph import Multigraphs, concatenate, sliced
from sharding.manifest import write_atomically

ROWS: Final = "rows"  # an Arrow table, as bytes
REFUSALS: Final = "refusals"  # JSON
LABEL: Final = "y."
MAPPED: Final = 64  # files mapped at a time, since each counts as an open file


@dataclass(frozen=True, slots=True)
class Spill:
    """Graphs, their rows, and what was refused in the same task.

    The columns of the rows are those of ``convert.ROWS``.
    """

    hashes: NDArray[np.uint64]  # (G,) ascending
    graphs: Multigraphs
    rows: pa.Table
    refusals: list[Refusal]

    def __len__(self) -> int:
        return len(self.hashes)


def sort(
    hashes: NDArray[np.uint64],
    graphs: Multigraphs,
    rows: pa.Table,
    refusals: list[Refusal],
    select: NDArray[np.int64] | None = None,
) -> Spill:
    """Sort graphs by hash (stably) into a spill; with ``select``, keep only those indices of the sorted graphs."""
    order = np.argsort(hashes, kind="stable")
    if select is not None:
        order = order[select]
    return Spill(hashes[order], graphs.take(order), rows.take(order), refusals)


def write(path: Path, spill: Spill) -> None:
    """Write, sync and rename."""
    arrays = spill.graphs.arrays()
    arrays |= {LABEL + name: values for name, values in spill.graphs.labels.items()}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, spill.rows.schema) as stream:
        stream.write_table(spill.rows)
    arrays["hashes"] = spill.hashes
    arrays[ROWS] = np.frombuffer(sink.getvalue(), np.uint8)
    refusals = json.dumps([asdict(r) for r in spill.refusals]).encode()
    arrays[REFUSALS] = np.frombuffer(refusals, np.uint8)
    write_atomically(path, save({name: np.ascontiguousarray(a) for name, a in arrays.items()}))


def read(path: Path, low: int = 0, high: int = 2**64) -> Spill:
    """The graphs with hashes in [low, high); arrays are views of the mapped file."""
    arrays = views(np.memmap(path, np.uint8, mode="r"))
    hashes = arrays["hashes"]
    begin = int(np.searchsorted(hashes, np.uint64(low)))
    end = len(hashes) if high >= 2**64 else int(np.searchsorted(hashes, np.uint64(high)))
    rows = pa.ipc.open_stream(pa.py_buffer(arrays[ROWS])).read_all().slice(begin, end - begin)
    labels = {n.removeprefix(LABEL): v[begin:end] for n, v in arrays.items() if n.startswith(LABEL)}
    graphs = Multigraphs(keys=rows["key"].to_pylist(), labels=labels, **sliced(arrays, begin, end))
    return Spill(hashes[begin:end], graphs, rows, [])


def refusals(path: Path) -> list[Refusal]:
    """Read the refusals of a task."""
    text = views(np.memmap(path, np.uint8, mode="r"))[REFUSALS].tobytes()
    return [Refusal(**refusal) for refusal in json.loads(text)]


def gather(paths: Sequence[Path], low: int, high: int, select: NDArray[np.int64] | None = None) -> Spill:
    """Read one range of hashes from one or more files, and sort the result.

    Args:
        paths: the files.
        low, high: the range, [low, high).
        select: indices into the sorted graphs, in the order wanted; all if omitted.
    """
    groups: list[Spill] = []
    parts: list[Spill] = []
    for number, path in enumerate(paths, 1):
        part = read(path, low, high)
        if len(part) or (number == len(paths) and not groups and not parts):  # at least one part, for its columns
            parts.append(part)
        if len(parts) == MAPPED or (number == len(paths) and parts):
            groups.append(_joined(parts))
            parts = []
    joined = _joined(groups)
    return sort(joined.hashes, joined.graphs, joined.rows, [], select)


def facts(paths: Sequence[Path], low: int, high: int) -> pa.Table:
    """The rows of one range of hashes of many files, sorted, with ``n_atoms`` and ``n_edges`` (half edges).

    That is what packing needs to know; the graphs themselves are not read.
    """
    tables: list[pa.Table] = []
    hashes: list[NDArray[np.uint64]] = []
    for number, path in enumerate(paths, 1):
        part = read(path, low, high)
        if len(part) or number == 1:
            hashes.append(part.hashes.copy())
            sizes = {"n_atoms": part.graphs.n_atoms.copy(), "n_edges": part.graphs.n_edges.copy()}
            rows = part.rows
            for name, values in sizes.items():
                rows = rows.append_column(name, pa.array(values))
            tables.append(rows)
        if number % MAPPED == 0:
            tables = [pa.concat_tables(tables).combine_chunks()]
    return pa.concat_tables(tables).combine_chunks().take(np.argsort(np.concatenate(hashes), kind="stable"))


@dataclass(frozen=True)
class Merging:
    """A task: merge several files into one."""

    parts: list[Path]
    path: Path


def merge(task: Merging) -> int:
    """Merge the graphs, without the refusals, and return their number."""
    if not task.path.exists():
        write(task.path, gather(task.parts, 0, 2**64))
    return len(read(task.path))


def _joined(parts: list[Spill]) -> Spill:
    """Concatenate spills; several are copied, so that their files can be closed."""
    if len(parts) == 1:
        return parts[0]
    graphs = concatenate([part.graphs for part in parts])
    rows = pa.concat_tables([part.rows for part in parts]).combine_chunks()
    return Spill(np.concatenate([part.hashes for part in parts]), graphs, rows, [])


def ranges_of(buckets: int) -> list[tuple[int, int]]:
    """Divide the hash space evenly: [low, high) of each bucket."""
    at = [2**64 * b // buckets for b in range(buckets + 1)]
    return list(zip(at[:-1], at[1:], strict=True))
