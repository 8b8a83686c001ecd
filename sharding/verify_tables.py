"""Manifest, block table, graph table and quarantine: what can be checked without reading a shard."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sharding.findings import Finding
from sharding.graph import TIE
from sharding.manifest import BLOCK_SCHEMA, SPLITS, DataSetError, Manifest
from sharding.place import MANIFEST, Place
from sharding.verify_rows import GRAPHS

COUNTS: Final = ("graphs", "atoms", "edges", "scored_edges")
BLOCKS, QUARANTINE = "blocks.parquet", "quarantine.jsonl"
_PIECE: Final = 2**20
SHARD: Final = re.compile(r"(train|val|test)-\d{6,}\.tar")
_PART: Final = re.compile(r"graphs\.parquet/part-\d{5,}\.parquet")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_LONGEST_LINE: Final = 2**24  # bytes of a line of the quarantine
_REFUSAL: Final = {"key", "source", "position", "code", "text"}


def read_checked(place: Place) -> tuple[Manifest | None, list[Finding]]:
    """Read the manifest; if it is invalid, return None and the findings: nothing else can be checked without it."""
    try:
        manifest = place.manifest()
        wrong = _malformed(manifest)
    except (DataSetError, TypeError, KeyError, RecursionError) as why:
        text = str(why).removeprefix(f"{place}/{MANIFEST}: ")
        return None, [Finding("manifest", text, MANIFEST, 0, place.size(MANIFEST))]
    if wrong:
        return None, [Finding("manifest", f"{wrong}: not what the format says", MANIFEST)]
    return manifest, []


def _malformed(manifest: Manifest) -> str | None:
    """The first field of a manifest that violates the format, which a correct digest does not rule out."""
    graph, budget = manifest.graph, manifest.budget

    def count(value: Any, least: int = 0) -> bool:
        return type(value) is int and value >= least

    def texts(value: Any) -> bool:
        return isinstance(value, dict) and all(isinstance(text, str) for item in value.items() for text in item)

    rules: dict[str, Callable[[], bool]] = {
        "graph": lambda: (
            isinstance(graph["cutoff"], int | float)
            and 0.5 < graph["cutoff"] <= 20
            and graph["tie"] == TIE
            and graph["index_dtype"] in ("uint8", "uint16")
        ),
        "budget": lambda: all(count(n, 1) for n in (budget.edges, budget.atoms, budget.graphs)),
        "seed": lambda: type(manifest.seed) is int,
        "splits": lambda: (
            manifest.splits.keys() == set(SPLITS)
            and all(s.keys() == {"blocks", *COUNTS} and all(map(count, s.values())) for s in manifest.splits.values())
        ),
        "sources": lambda: isinstance(manifest.sources, list) and all(map(texts, manifest.sources)),
        "labels": lambda: isinstance(manifest.labels, dict) and all(map(texts, manifest.labels.values())),
        "quarantined": lambda: (
            isinstance(manifest.quarantined, dict) and all(map(count, manifest.quarantined.values()))
        ),
        "shards": lambda: all(
            s.keys() == {"name", "size", "sha256"}
            and SHARD.fullmatch(s["name"])
            and count(s["size"])
            and _SHA256.fullmatch(s["sha256"])
            for s in manifest.shards
        ),
        "names of shards": lambda: len({s["name"] for s in manifest.shards}) == len(manifest.shards),
        "tables": lambda: all(
            (name in (BLOCKS, QUARANTINE) or _PART.fullmatch(name)) and _SHA256.fullmatch(digest)
            for name, digest in manifest.tables.items()
        ),
        "tables: one is not named": lambda: {BLOCKS, QUARANTINE} <= manifest.tables.keys(),
    }
    for name, holds in rules.items():
        try:
            if not holds():
                return name
        except (TypeError, KeyError, AttributeError):
            return name
    return None


def check_files(place: Place, manifest: Manifest) -> Iterator[Finding]:
    """Check the digests of the tables, and find stray files that a reader might take for a part of the data set."""
    for name, digest in manifest.tables.items():
        try:
            found = hashlib.sha256()
            with place.open(name) as file:
                while piece := file.read(_PIECE):
                    found.update(piece)
            if found.hexdigest() != digest:
                yield Finding("sha256", "the SHA-256 is not the one in the manifest", name, 0, place.size(name))
        except FileNotFoundError:
            yield Finding("missing", "the table is missing", name)
        except OSError as why:
            yield Finding("unreadable", f"cannot be read ({why.strerror or why})", name)
    known = {*manifest.tables, *(shard["name"] for shard in manifest.shards)}
    try:
        present = place.files()
    except OSError:
        present = []  # a web server may not list its files
    for name in present:
        read = (name.endswith(".tar") and "/" not in name) or name.startswith(f"{GRAPHS}/")
        if read and name not in known:
            yield Finding("unlisted", "not in the manifest, but anyone who reads all files here would read it", name)


def read_block_table(place: Place) -> tuple[dict[str, NDArray[Any]] | None, list[Finding]]:
    """The columns of the block table, or None if they cannot be used."""
    try:
        with place.open(BLOCKS) as file:
            table = pq.read_table(file)
    except (OSError, pa.ArrowException) as why:
        return None, [Finding("block_table", f"cannot be read ({why!s:.200})", BLOCKS)]
    if not table.schema.equals(BLOCK_SCHEMA) or any(column.null_count for column in table.columns):
        return None, [Finding("block_table", "its columns are not those of the format", BLOCKS)]
    return {name: table[name].to_numpy() for name in table.column_names}, []


def check_block_table(blocks: dict[str, NDArray[Any]], manifest: Manifest) -> Iterator[Finding]:
    """Check the block table by itself, and against the manifest."""

    def finding(text: str, bad: NDArray[np.bool_]) -> Iterator[Finding]:
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            yield Finding("block_table", f"{text}, first in row {first}", BLOCKS, block=first, count=int(bad.sum()))

    number = np.arange(len(blocks["block"]))
    yield from finding("blocks are not numbered 0, 1, 2, …", blocks["block"] != number)
    lost = (blocks["shard"] >= len(manifest.shards)) | (blocks["split"] >= len(SPLITS))
    yield from finding("shards or splits that do not exist", lost)
    wide = {name: blocks[name].astype(np.int64) for name in (*COUNTS, "size", "shard", "split")}
    for name in ("edges", "atoms", "graphs"):
        yield from finding(f"more {name} than the budget", wide[name] > getattr(manifest.budget, name))
    odd = (wide["edges"] % 2 != 0) | (wide["scored_edges"] % 2 != 0) | (wide["scored_edges"] > wide["edges"])
    yield from finding("edge counts that are odd, or smaller than the number of scored edges", odd)
    if lost.any():
        return
    prefix = [SPLITS.index(str(shard["name"]).split("-")[0]) for shard in manifest.shards]
    yield from finding(
        "blocks of one split in a shard of another", np.array(prefix, int)[wide["shard"]] != wide["split"]
    )
    sizes = np.array([shard["size"] for shard in manifest.shards], np.uint64)[wide["shard"]]
    end = blocks["offset"] + wide["size"].astype(np.uint64)
    yield from finding("blocks that end after the end of their shard", (end > sizes) | (end < blocks["offset"]))
    order = np.lexsort((blocks["offset"], wide["shard"]))
    overlap = np.zeros(len(number), bool)
    same = np.diff(wide["shard"][order]) == 0
    overlap[order[1:]] = same & (blocks["offset"][order][1:] < end[order][:-1])
    yield from finding("blocks that overlap", overlap)
    for i, split in enumerate(SPLITS):
        mine = wide["split"] == i
        totals = {"blocks": int(mine.sum())} | {name: int(wide[name][mine].sum()) for name in COUNTS}
        if totals != manifest.splits[split]:
            text = f"holds {totals} of {split}; the manifest says {manifest.splits[split]}"
            yield Finding("counts", text, BLOCKS)


def check_quarantine(place: Place, manifest: Manifest) -> Iterator[Finding]:
    """Check the quarantine, line by line, against the counts in the manifest."""
    counts: Counter[str] = Counter()
    try:
        with place.open(QUARANTINE) as file:
            at = 0
            while line := file.readline(_LONGEST_LINE):
                code = _code(line)
                if code is None:
                    yield Finding("quarantine", "a line that is no refusal", QUARANTINE, at, len(line))
                else:
                    counts[code] += 1
                at += len(line)
    except OSError:
        return  # reported by check_files
    if dict(counts) != manifest.quarantined:
        text = f"refuses {dict(sorted(counts.items()))}; the manifest says {manifest.quarantined}"
        yield Finding("counts", text, QUARANTINE)


def _code(line: bytes) -> str | None:
    try:
        refusal = json.loads(line)
        if refusal.keys() != _REFUSAL or not all(isinstance(text, str) for text in refusal.values()):
            return None
        return str(refusal["code"])
    except (ValueError, AttributeError, RecursionError):
        return None
