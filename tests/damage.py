"""Damage data sets on purpose and recompute their checksums, so that only a deeper check can detect it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from sharding.block import decode, encode
from sharding.graph import Multigraphs
from sharding.manifest import BLOCK_SCHEMA

SPLITS = ("train", "val", "test")


def manifest_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return content


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and give it the digest of what it says now."""
    content = manifest_of(folder)
    change(content)
    del content["digest"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(content))


def sign(folder: Path) -> None:
    """Let the manifest name the files as they are."""

    def update(content: dict[str, Any]) -> None:
        for shard in content["shards"]:
            data = (folder / shard["name"]).read_bytes()
            shard |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name in content["tables"]:
            content["tables"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()

    change_manifest(folder, update)


def block_rows(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "blocks.parquet").to_pylist()
    return rows


def change_blocks(folder: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change the block table, and sign."""
    rows = block_rows(folder)
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, BLOCK_SCHEMA), folder / "blocks.parquet")
    sign(folder)


def change_graphs(folder: Path, change: Callable[[list[dict[str, Any]]], object], part: int = 0) -> None:
    """Change a part of the graph table, and sign."""
    path = folder / f"graphs.parquet/part-{part:05d}.parquet"
    table = pq.read_table(path, partitioning=None)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    sign(folder)


def change_bytes(path: Path, at: int, new: bytes) -> None:
    """Overwrite some bytes of a file, and do not sign."""
    data = bytearray(path.read_bytes())
    data[at : at + len(new)] = new
    path.write_bytes(bytes(data))


def read_block(folder: Path, number: int) -> bytes:
    row = block_rows(folder)[number]
    data = (folder / manifest_of(folder)["shards"][row["shard"]]["name"]).read_bytes()
    return data[row["offset"] : row["offset"] + row["size"]]


def replace_block(folder: Path, number: int, data: bytes) -> None:
    """Write a shard again with other bytes for one block; tables, totals and checksums follow."""
    rows = block_rows(folder)
    shard = rows[number]["shard"]
    path = folder / manifest_of(folder)["shards"][shard]["name"]
    new = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=new, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for member in old.getmembers():
            content = data if int(member.name[:9]) == number else old.extractfile(member).read()  # type: ignore[union-attr]
            row = rows[int(member.name[:9])]
            member.size = len(content)
            row |= {"offset": tar.offset + 512, "size": len(content), "xxh3": xxhash.xxh3_64_intdigest(content)}
            tar.addfile(member, io.BytesIO(content))
    path.write_bytes(new.getvalue())
    change_blocks(folder, lambda old_rows: old_rows.__setitem__(slice(None), rows))


def replace_graphs(folder: Path, number: int, graphs: Multigraphs, dtype: Any = np.uint8) -> None:
    """Other graphs for a block, with all counts, and the rows of the graph table, as they should be for them."""
    replace_block(folder, number, encode(graphs, dtype))

    def count(rows: list[dict[str, Any]]) -> None:
        rows[number] |= {
            "graphs": len(graphs),
            "atoms": len(graphs.positions),
            "edges": 2 * len(graphs.edge_src),
            "scored_edges": 2 * int((graphs.edge_src != graphs.edge_dst).sum()),
        }

    change_blocks(folder, count)
    rows = block_rows(folder)

    def total(content: dict[str, Any]) -> None:
        for i, split in enumerate(SPLITS):
            mine = [row for row in rows if row["split"] == i]
            content["splits"][split] = {"blocks": len(mine)} | {
                name: sum(row[name] for row in mine) for name in ("graphs", "atoms", "edges", "scored_edges")
            }

    change_manifest(folder, total)

    def describe(table: list[dict[str, Any]]) -> None:
        mine = [row for row in table if row["block"] == number]
        if len(mine) == len(graphs):
            for i, row in enumerate(mine):
                row["key"] = graphs.keys[i]
                row["n_atoms"], row["n_edges"] = int(graphs.n_atoms[i]), 2 * int(graphs.n_edges[i])
                row["volume"] = float(abs(np.linalg.det(graphs.lattice[i].astype(float))))

    for part in range(len(list((folder / "graphs.parquet").iterdir()))):
        change_graphs(folder, describe, part)


def change_block(folder: Path, number: int, change: Callable[[dict[str, Any]], object], dtype: Any = np.uint8) -> None:
    """Change copies of the arrays of a block; counts and checksums follow."""
    graphs = decode(read_block(folder, number))
    content = {name: array.copy() for name, array in graphs.arrays().items()}
    content |= {"keys": list(graphs.keys), "labels": dict(graphs.labels)}
    change(content)
    replace_graphs(folder, number, Multigraphs(**content), dtype)
