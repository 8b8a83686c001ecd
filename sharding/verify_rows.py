"""Compare the rows of the graph table with the blocks that they describe."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sharding.crystal import SYMBOLS
from sharding.graph import Multigraphs
from sharding.invariants import Problem
from sharding.place import Place

GRAPHS: Final = "graphs.parquet"
_ALPHABETICAL: Final = np.array(sorted(range(1, len(SYMBOLS)), key=SYMBOLS.__getitem__))
_VOLUME: Final = 1e-6  # relative tolerance for volumes


@dataclass(frozen=True)
class Rows:
    """Where the rows of some blocks are, in the order of the blocks and of the graphs in them."""

    place: Place
    parts: tuple[tuple[str, int, int], ...]  # files, and the rows [begin, end) of the table that they hold
    first: int  # first row needed
    last: int  # after the last row needed
    of_block: dict[int, tuple[int, int]]  # block → its rows [begin, end)
    columns: tuple[str, ...]

    def load(self) -> pa.Table:
        """Load all rows that are needed."""
        return _load(self.place, self.parts, self.first, self.last, self.columns)

    def of(self, block: int) -> pa.Table:
        """The rows of a block, which may be none."""
        begin, end = self.of_block.get(block, (self.first, self.first))
        return self.load().slice(begin - self.first, end - begin)


@functools.lru_cache(maxsize=1)  # the rows of one shard at a time
def _load(
    place: Place, parts: tuple[tuple[str, int, int], ...], first: int, last: int, columns: tuple[str, ...]
) -> pa.Table:
    """Rows first … last − 1 of the table; of large files only the row groups that hold them."""
    tables = []
    for name, begin, end in parts:
        if end <= first or begin >= last:
            continue
        with place.open(name) as opened, pq.ParquetFile(opened) as file:
            for i in range(file.num_row_groups):
                size = file.metadata.row_group(i).num_rows
                low, high = max(first, begin), min(last, begin + size)
                if low < high:
                    group = file.read_row_group(i, columns=list(columns), use_threads=False)
                    tables.append(group.slice(low - begin, high - low))
                begin += size
    return pa.concat_tables(tables).combine_chunks() if tables else pa.table({name: [] for name in columns})


def compare(rows: Rows, number: int, graphs: Multigraphs, split: str) -> Iterator[Problem]:
    """Report where the graph table differs from the block."""
    table = rows.of(number)
    if len(table) != len(graphs):
        yield Problem("graph_table", f"holds {len(graphs):,} graphs; the graph table has {len(table):,} rows for it")
        return
    with np.errstate(invalid="ignore"):  # non-finite cells are reported elsewhere
        volumes = np.abs(np.linalg.det(graphs.lattice.astype(np.float64)))
        other = ~(np.abs(_numbers(table["volume"]) - volumes) <= _VOLUME * volumes)
    differs = {
        "key": _unequal(table["key"].to_pylist(), graphs.keys),
        "formula": _unequal(table["formula"].to_pylist(), formulas(graphs)),
        "split": _unequal(table["split"].to_pylist(), [split] * len(graphs)),
        "n_atoms": _numbers(table["n_atoms"]) != graphs.n_atoms,
        "n_edges": _numbers(table["n_edges"]) != 2 * graphs.n_edges.astype(np.int64),
        "volume": other,
    }
    for name, values in graphs.labels.items():
        if f"y.{name}" in table.column_names:
            given = _numbers(table[f"y.{name}"])
            differs[f"y.{name}"] = (given != values) & ~(np.isnan(given) & np.isnan(values))
    for name, bad in differs.items():
        if bad.any():
            text = f"rows of the graph table have a different {name}"
            yield Problem("graph_table", text, int(np.flatnonzero(bad)[0]), int(bad.sum()))


def formulas(graphs: Multigraphs) -> list[str]:
    """The reduced formula of each graph, as ``crystal.reduced_formula`` writes it."""
    owner = np.repeat(np.arange(len(graphs)), graphs.n_atoms)
    counts = np.bincount(owner * 256 + graphs.atomic_numbers, minlength=256 * len(graphs)).reshape(-1, 256)
    counts = counts[:, _ALPHABETICAL]
    counts //= np.maximum(np.gcd.reduce(counts, axis=1), 1)[:, None]
    parts: list[list[str]] = [[] for _ in range(len(graphs))]
    graph, element = np.nonzero(counts)
    symbols = [SYMBOLS[z] for z in _ALPHABETICAL[element]]
    for g, symbol, n in zip(graph.tolist(), symbols, counts[graph, element].tolist(), strict=True):
        parts[g].append(symbol if n == 1 else f"{symbol}{n}")
    return ["".join(of_graph) for of_graph in parts]


def _unequal(one: list[Any], other: list[Any]) -> NDArray[np.bool_]:
    return np.fromiter((a != b for a, b in zip(one, other, strict=True)), bool, len(one))


def _numbers(column: pa.ChunkedArray) -> NDArray[Any]:
    """Values, NaN for a null."""
    return np.asarray(column.to_numpy())
