"""Check the graph table: rows in the order of the blocks, unique keys, and groups that stay in one split.

It is read by row groups. Keys are compared by 64-bit hashes, a range of hashes at a time, and those with equal hashes
by name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from sharding.findings import Finding
from sharding.graph import offsets
from sharding.manifest import SPLITS, Manifest
from sharding.place import Place
from sharding.spill import ranges_of
from sharding.verify_rows import GRAPHS, Rows

KEYS_AT_ONCE: Final = 2**24  # in one range of hashes, roughly: some 300 MB
_COLUMNS: Final = {  # besides the labels
    "key": pa.string(),
    "formula": pa.string(),
    "split": pa.string(),
    "n_atoms": pa.uint32(),
    "n_edges": pa.uint32(),
    "volume": pa.float64(),
    "group": pa.string(),
    "source": pa.string(),
    "block": pa.uint32(),
}
_NAMED: Final = 100  # keys and groups named in a report; more are only counted


@dataclass(frozen=True)
class GraphTable:
    """The readable parts of the graph table, and where the rows of each block are in them."""

    place: Place
    parts: list[tuple[str, int, int]]  # file, and the rows [begin, end) of the table that it holds
    starts: NDArray[np.int64] | None  # (blocks + 1,) first row of each; None where rows are out of order
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return self.parts[-1][2] if self.parts else 0

    def rows(self, blocks: NDArray[Any]) -> Rows | None:
        """Where the rows of these blocks are; None if that is not known."""
        if self.starts is None or len(blocks) == 0 or int(blocks.max()) >= len(self.starts) - 1:
            return None
        of_block = {int(b): (int(self.starts[b]), int(self.starts[b + 1])) for b in blocks.tolist()}
        first, last = min(begin for begin, _ in of_block.values()), max(end for _, end in of_block.values())
        parts = tuple(part for part in self.parts if part[1] < last and part[2] > first)
        columns = ("key", "formula", "split", "n_atoms", "n_edges", "volume", *(f"y.{name}" for name in self.labels))
        return Rows(self.place, parts, first, last, of_block, columns)


def open_graph_table(
    place: Place, manifest: Manifest, n_blocks: int, damaged: set[str]
) -> tuple[GraphTable, list[Finding]]:
    """Find the rows of each block; parts in ``damaged``, or found to be damaged here, are left out."""
    found: list[Finding] = []
    parts: list[tuple[str, int, int]] = []
    counts = np.zeros(n_blocks, np.int64)
    names = [name for name in manifest.tables if name.startswith(GRAPHS)]
    wanted = _COLUMNS | {f"y.{name}": pa.float32() for name in manifest.labels}
    rows = last = 0
    ordered = True
    for name in sorted(names, key=lambda name: (len(name), name)):
        if name in damaged:
            ordered = False
            continue
        try:
            with place.open(name) as opened, pq.ParquetFile(opened) as file:
                has = {field.name: field.type for field in file.schema_arrow}
                if wrong := [column for column, kind in wanted.items() if has.get(column) != kind]:
                    text = f"the columns {', '.join(wrong)} are missing or of another type"
                    found.append(Finding("graph_table", text, name))
                    ordered = False
                    continue
                for batch in file.iter_batches(columns=["block"], use_threads=False):
                    block = batch["block"].to_numpy(zero_copy_only=False)
                    if len(block) and not (block[0] >= last and (np.diff(block.astype(float)) >= 0).all()):
                        ordered = False
                    last = int(block[-1]) if len(block) and ordered else last
                    if ordered and last < n_blocks:
                        counts += np.bincount(block, minlength=n_blocks)
                parts.append((name, rows, rows + file.metadata.num_rows))
                rows += file.metadata.num_rows
        except (OSError, pa.ArrowException) as why:
            found.append(Finding("graph_table", f"cannot be read ({why!s:.200})", name))
            ordered = False
    if n_blocks and (not ordered or last >= n_blocks):
        text = "rows are missing or not in the order of the blocks, so they are not compared with the blocks"
        found.append(Finding("graph_table", text, GRAPHS))
    fine = ordered and last < n_blocks
    return GraphTable(place, parts, offsets(counts) if fine else None, tuple(manifest.labels)), found


@dataclass(frozen=True)
class KeyTask:
    """Keys and groups whose hashes lie in [low, high), over the whole data set."""

    place: Place
    parts: tuple[str, ...]
    low: int
    high: int


def key_tasks(table: GraphTable) -> list[KeyTask]:
    """Divide the keys among enough tasks to bound the memory of each."""
    parts = tuple(name for name, _, _ in table.parts)
    return [KeyTask(table.place, parts, low, high) for low, high in ranges_of(max(1, -(-len(table) // KEYS_AT_ONCE)))]


def check_keys(task: KeyTask) -> list[Finding]:
    """Find keys that several crystals share, and groups in several splits."""
    try:
        return [*_repeated(task), *_straddling(task)]
    except (OSError, pa.ArrowException) as why:
        return [Finding("graph_table", f"its keys cannot be read ({why!s:.200})", GRAPHS)]


def _repeated(task: KeyTask) -> Iterator[Finding]:
    hashes = np.concatenate([np.empty(0, np.uint64), *(hashes for hashes, _ in _hashed(task, ["key"]))])
    hashes.sort()
    suspects = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    times: dict[str, int] = defaultdict(int)
    for some, (keys,) in _hashed(task, ["key"], suspects[:_NAMED]):
        for key in keys if len(some) else ():
            times[key] += 1
    for key, n in sorted(times.items()):
        if n > 1:
            yield Finding("duplicate_key", f"{n} crystals have the key {key!r:.80}", GRAPHS, key=key, count=n)
    if len(suspects) > _NAMED:
        more = len(suspects) - _NAMED
        yield Finding("duplicate_key", f"and {more:,} more keys occur repeatedly", GRAPHS, count=more)


def _straddling(task: KeyTask) -> Iterator[Finding]:
    pairs = np.empty(0, np.uint64)
    for hashes, (_, splits) in _hashed(task, ["group", "split"]):
        numbers = np.array([SPLITS.index(s) if s in SPLITS else len(SPLITS) for s in splits], np.uint64)
        pairs = np.unique(np.concatenate([pairs, hashes & ~np.uint64(3) | numbers]))
    groups = pairs >> np.uint64(2)
    suspects = np.unique(groups[1:][groups[1:] == groups[:-1]])
    found: dict[str, set[str]] = defaultdict(set)
    for _, (names, splits) in _hashed(task, ["group", "split"], suspects[:_NAMED], 2):
        for name, split in zip(names, splits, strict=True):
            found[name].add(split)
    for name, of_group in sorted(found.items()):
        if len(of_group) > 1:
            text = f"the group {name!r:.80} is in {' and '.join(sorted(of_group))}"
            yield Finding("straddle", text, GRAPHS)
    if len(suspects) > _NAMED:
        more = len(suspects) - _NAMED
        yield Finding("straddle", f"and {more:,} more groups are in two splits", GRAPHS, count=more)


def _hashed(
    task: KeyTask, columns: Sequence[str], only: NDArray[np.uint64] | None = None, shift: int = 0
) -> Iterator[tuple[NDArray[np.uint64], list[list[str]]]]:
    """Yield, batch by batch, hashes of the first column that lie in the range, and the texts of all columns.

    With ``only``, yield only rows whose hash, shifted right by ``shift`` bits, is one of these.
    """
    if only is not None and len(only) == 0:
        return
    for name in task.parts:
        with task.place.open(name) as opened, pq.ParquetFile(opened) as file:
            for batch in file.iter_batches(columns=list(columns), use_threads=False):
                texts = [[text or "" for text in batch[name].to_pylist()] for name in columns]
                hashes = np.fromiter((xxhash.xxh3_64_intdigest(t.encode()) for t in texts[0]), np.uint64, len(batch))
                keep = (hashes >= np.uint64(task.low)) & (hashes <= np.uint64(task.high - 1))
                if only is not None:
                    keep &= np.isin(hashes >> np.uint64(shift), only)
                at = np.flatnonzero(keep).tolist()
                yield hashes[at], [[column[i] for i in at] for column in texts]
