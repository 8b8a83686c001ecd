"""What the stages of sharding hand to one another: files of graphs with a row of facts for each, sorted by a hash.

One file is one finished task: it is written under a temporary name and renamed, so that it is whole or not there, and a
rerun takes what it finds. A task of the next stage reads one range of hashes out of every file of the stage before.
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
MAPPED: Final = 64  # files at a time: a mapped file is an open one


@dataclass(frozen=True, slots=True)
class Spill:
    """Graphs, their rows and what was refused on the way.

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
    """A spill from graphs in any order; equal hashes stay in theirs. With ``select``, those of the sorted ones."""
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
    """What was refused in a task."""
    text = views(np.memmap(path, np.uint8, mode="r"))[REFUSALS].tobytes()
    return [Refusal(**refusal) for refusal in json.loads(text)]


def gather(paths: Sequence[Path], low: int, high: int, select: NDArray[np.int64] | None = None) -> Spill:
    """One range of hashes of many files (one at least), sorted again.

    Args:
        paths: the files.
        low, high: the range, [low, high).
        select: which of the sorted graphs, in which order; all where left out.
    """
    groups: list[Spill] = []
    parts: list[Spill] = []
    for number, path in enumerate(paths, 1):
        part = read(path, low, high)
        if len(part) or (number == len(paths) and not groups and not parts):  # one at least, for its columns
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
    """A task: several files as one."""

    parts: list[Path]
    path: Path


def merge(task: Merging) -> int:
    """Merge, without what was refused; returns the number of graphs."""
    if not task.path.exists():
        write(task.path, gather(task.parts, 0, 2**64))
    return len(read(task.path))


def _joined(parts: list[Spill]) -> Spill:
    """One after the other; of several, a copy, so that their files are closed."""
    if len(parts) == 1:
        return parts[0]
    graphs = concatenate([part.graphs for part in parts])
    rows = pa.concat_tables([part.rows for part in parts]).combine_chunks()
    return Spill(np.concatenate([part.hashes for part in parts]), graphs, rows, [])


def ranges_of(buckets: int) -> list[tuple[int, int]]:
    """All hashes, divided evenly: [low, high) of each bucket."""
    at = [2**64 * b // buckets for b in range(buckets + 1)]
    return list(zip(at[:-1], at[1:], strict=True))
