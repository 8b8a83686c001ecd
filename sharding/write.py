"""Stages 3 and 4: within a range of hashed keys, pack each split into blocks; then number the blocks and write shards.

Each range ends with blocks that are not full. If there are several ranges, these are set aside and packed again, all
together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sharding import spill
from sharding.block import encode
from sharding.crystal import Refusal
from sharding.decide import refusal, repeated_keys
from sharding.manifest import SPLITS, write_atomically
from sharding.packing import pack
from sharding.settings import ShardSettings
from sharding.shards import ShardWriter

FULL: Final = 0.97  # fraction of the edge budget; emptier blocks are packed again


@dataclass(frozen=True)
class Packing:
    """A task of stage 3: all crystals whose hashed key is in [low, high), or, over all hashes, what was set aside."""

    low: int
    high: int
    graphs: list[Path]
    path: Path  # file for what is set aside
    set_aside: bool  # whether blocks that are not full are set aside
    settings: ShardSettings


@dataclass(frozen=True)
class Packed:
    """The result of one packing task."""

    blocks: list[int]  # to be written, for each split
    graphs: int  # in them
    widest: int  # atoms of the largest crystal
    refusals: list[Refusal]


@dataclass(frozen=True)
class Writing:
    """A task of stage 4: the blocks of one split in one range, whose numbers are known by now."""

    packing: Packing
    split: int
    blocks: int
    first_block: int
    first_shard: int
    index_dtype: str
    part: int  # of the graph table
    folder: Path
    path: Path


def arrange(task: Packing) -> Packed:
    """Pack, count, and write what is set aside."""
    result = task.path.with_suffix(".json")
    if not result.exists():
        facts, keep, dropped = _facts(task)
        rest = [np.empty(0, np.int64)]
        counts = []
        for split in range(len(SPLITS)):
            blocks, left = _blocks(facts, keep, split, task)
            counts.append(len(blocks))
            rest += left
        aside = np.sort(np.concatenate(rest))
        if task.set_aside:
            spill.write(task.path, spill.gather(task.graphs, task.low, task.high, aside))
        graphs = len(keep) - (len(aside) if task.set_aside else 0)
        widest = int(np.asarray(facts["n_atoms"]).max(initial=0))
        packed = Packed(counts, graphs, widest, dropped)
        write_atomically(result, json.dumps(asdict(packed)).encode())
    content = json.loads(result.read_text())
    return Packed(**content | {"refusals": [Refusal(**r) for r in content["refusals"]]})


def write(task: Writing) -> dict[str, Any]:
    """Write the shards and the part of the graph table.

    Returns:
        ``blocks``: rows of the block table; ``shards``: entries of the manifest; ``graphs``: how many;
        ``labelled``: how many have each label; ``part``: the file with the rows of the graphs.
    """
    if not task.path.exists():
        packing = task.packing
        facts, keep, _ = _facts(packing)
        members, _ = _blocks(facts, keep, task.split, packing)
        assert len(members) == task.blocks
        found = spill.gather(packing.graphs, packing.low, packing.high, np.concatenate(members))
        graphs = found.graphs
        shards = _write_shards(task, graphs, np.array([len(m) for m in members]))
        part = f"graphs.parquet/part-{task.part:05d}.parquet"
        numbers = np.repeat(np.arange(task.first_block, task.first_block + task.blocks), [len(m) for m in members])
        columns = _graph_table(graphs, found.rows).append_column("block", pa.array(numbers.astype(np.uint32)))
        write_atomically(task.folder / part, parquet(columns))
        labelled = {name: int(np.isfinite(values).sum()) for name, values in graphs.labels.items()}
        counts = {"graphs": len(graphs), "labelled": labelled}
        write_atomically(task.path, json.dumps({**shards, **counts, "part": part}).encode())
    result: dict[str, Any] = json.loads(task.path.read_text())
    return result


def parquet(table: pa.Table) -> bytes:
    """The bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def _facts(task: Packing) -> tuple[pa.Table, NDArray[np.int64], list[Refusal]]:
    """The facts of the crystals in a range; which to keep, one per key, since crystals of different formulas did not
    meet in stage 2; and the refusals of the others.
    """
    facts = spill.facts(task.graphs, task.low, task.high)
    repeated = repeated_keys(facts)
    keep = np.setdiff1d(np.arange(len(facts)), np.fromiter(repeated, np.int64, len(repeated)))
    return facts, keep, [refusal(facts, i, "duplicate_key", text) for i, text in repeated.items()]


def _blocks(
    facts: pa.Table, keep: NDArray[np.int64], split: int, task: Packing
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """The blocks of a split as indices into the range: those to be written, and those set aside."""
    mine = keep[np.asarray(facts["split"])[keep] == split]
    edges, atoms = 2 * np.asarray(facts["n_edges"])[mine].astype(np.int64), np.asarray(facts["n_atoms"])[mine]
    block_of, count = pack(edges, atoms, task.settings.budget)
    if count == 0:
        return [], []
    order = np.argsort(block_of, kind="stable")
    members = np.split(mine[order], np.cumsum(np.bincount(block_of))[:-1])
    if not task.set_aside:
        return members, []
    full = np.bincount(block_of, weights=edges) >= FULL * task.settings.budget.edges
    return [members[b] for b in np.flatnonzero(full)], [members[b] for b in np.flatnonzero(~full)]


def _write_shards(task: Writing, graphs: Any, sizes: NDArray[np.int64]) -> dict[str, Any]:
    """Write blocks of these sizes, ``blocks_per_shard`` of them per shard."""
    blocks: list[dict[str, int]] = []
    shards: list[dict[str, Any]] = []
    at = 0
    for numbers in _groups(task.blocks, task.packing.settings.blocks_per_shard):
        shard = task.first_shard + len(shards)
        with ShardWriter(task.folder / f"{SPLITS[task.split]}-{shard:06d}.tar") as writer:
            for i in numbers:
                block = graphs.slice(at, at + int(sizes[i]))
                at += int(sizes[i])
                offset, size, xxh3 = writer.add(task.first_block + i, encode(block, np.dtype(task.index_dtype)))
                blocks.append(
                    {
                        "block": task.first_block + i,
                        "shard": shard,
                        "offset": offset,
                        "size": size,
                        "split": task.split,
                        "graphs": len(block),
                        "atoms": int(block.n_atoms.sum()),
                        "edges": 2 * int(block.n_edges.sum()),
                        "scored_edges": 2 * int((block.edge_src != block.edge_dst).sum()),
                        "xxh3": xxh3,
                    }
                )
        shards.append(writer.entry)
    return {"blocks": blocks, "shards": shards}


def _groups(count: int, size: int) -> Iterator[range]:
    for begin in range(0, count, size):
        yield range(begin, min(begin + size, count))


def _graph_table(graphs: Any, rows: pa.Table) -> pa.Table:
    """The rows of the graph table, without the block."""
    columns = {
        "key": rows["key"],
        "formula": rows["formula"],
        "split": pa.array([SPLITS[s] for s in rows["split"].to_pylist()]),
        "n_atoms": graphs.n_atoms,
        "n_edges": (2 * graphs.n_edges).astype(np.uint32),  # directed
        "volume": rows["volume"],
        "group": rows["group"],
        "source": rows["source"],
        "fingerprint": rows["fingerprint"],
    }
    return pa.table(columns | {f"y.{name}": values for name, values in graphs.labels.items()})
