"""Stage 1: records of a source → graphs, sorted by a hash of the reduced formula. One task is one file."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from sharding import spill
from sharding.crystal import Crystal, Refusal, reduced_formula
from sharding.fingerprint import WIDTH, fingerprints
from sharding.graph import Multigraphs, build
from sharding.settings import ShardSettings
from sharding.sources import Record, Source, parse_records
from sharding.sources.pieces import Piece

CRYSTALS_PER_TASK: Final = 512

ROWS: Final = pa.schema(
    [
        ("key", pa.string()),
        ("formula", pa.string()),  # reduced
        ("group", pa.string()),  # "" where the source gives none
        ("source", pa.string()),
        ("position", pa.string()),
        ("order", pa.uint64()),  # position in the sources; of two crystals with the same key, the lower is kept
        ("volume", pa.float64()),  # of the cell, Å³
        ("fingerprint", pa.list_(pa.float32())),  # empty if fingerprints are off
        ("split", pa.uint8()),  # index into SPLITS; decided in stage 2
    ]
)


@dataclass(frozen=True)
class Conversion:
    """One task: some records of a source."""

    source: Source  # used for parsing only; it yields no records
    records: list[Record]
    number: int  # of the task, in the order of the sources
    folder: Path
    settings: ShardSettings


@dataclass(frozen=True)
class Converted:
    """The result of one conversion task."""

    path: Path
    size: int  # bytes
    crystals: int
    refused: list[Refusal]


def tasks(sources: Sequence[Source], folder: Path, settings: ShardSettings) -> Iterator[Conversion]:
    """The work, numbered in an order that depends on the sources alone."""
    batches = (batch for source in sources for batch in batches_of(source))
    for number, (source, records) in enumerate(batches):
        yield Conversion(source, records, number, folder, settings)


def convert(task: Conversion) -> Converted:
    """Parse records, build their graphs and write them, unless an earlier run did so for the same records.

    The file name contains a hash of the records, because a source may be repaired between a failed run and the next.
    """
    content = xxhash.xxh3_64()
    for record in task.records:
        _digest(content, (record.position, record.payload))
    path = task.folder / f"{task.number:08d}-{content.hexdigest()}.spill"
    if not path.exists():
        with _gc_disabled():
            spill.write(path, converted(task.records, task.source, task.number, task.settings))
    return Converted(path, path.stat().st_size, len(spill.read(path)), spill.refusals(path))


def converted(records: Iterable[Record], source: Source, number: int, settings: ShardSettings) -> spill.Spill:
    """Convert records to graphs and collect the refusals."""
    crystals: list[Crystal] = []
    refusals: list[Refusal] = []
    for item in parse_records(source, records):
        (crystals if isinstance(item, Crystal) else refusals).append(item)  # type: ignore[arg-type]
    graphs, refused = build(crystals, settings.cutoff, tuple(settings.labels))
    for i, why in sorted(refused.items()):
        refusals.append(Refusal(crystals[i].key, source.name, crystals[i].position, why.code, why.text))
    kept = [c for i, c in enumerate(crystals) if i not in refused]
    edges, atoms = 2 * graphs.n_edges.astype(np.int64), graphs.n_atoms
    fits = (edges <= settings.budget.edges) & (atoms <= settings.budget.atoms)
    for i in np.flatnonzero(~fits).tolist():
        text = f"{edges[i]} directed edges and {atoms[i]} atoms are more than a block holds; raise its budget"
        refusals.append(Refusal(kept[i].key, source.name, kept[i].position, "oversized", text))
    if not fits.all():
        graphs = graphs.take(np.flatnonzero(fits))
        kept = [c for c, fit in zip(kept, fits, strict=True) if fit]

    formulas = [reduced_formula(c.atomic_numbers) for c in kept]
    first = number << 32
    rows = pa.table(
        {
            "key": [c.key for c in kept],
            "formula": formulas,
            "group": [c.group or "" for c in kept],
            "source": [source.name] * len(kept),
            "position": [c.position for c in kept],
            "order": np.arange(first, first + len(kept), dtype=np.uint64),
            "volume": np.abs(np.linalg.det(graphs.lattice.astype(np.float64))),
            "fingerprint": _fingerprints(graphs, settings),
            "split": np.zeros(len(kept), np.uint8),
        },
        schema=ROWS,
    )
    return spill.sort(hashes_of(formulas), graphs, rows, refusals)


def hashes_of(texts: Sequence[str], seed: int = 0) -> NDArray[np.uint64]:
    """Hash each text to 64 bits."""
    return np.array([xxhash.xxh3_64_intdigest(text.encode(), seed) for text in texts], np.uint64)


def _fingerprints(graphs: Multigraphs, settings: ShardSettings) -> Any:
    width = WIDTH if settings.fingerprints else 0
    values = np.empty(0, np.float32)
    if settings.fingerprints:
        values = fingerprints(graphs.lattice, graphs.positions, graphs.atomic_numbers, graphs.n_atoms).ravel()
    at = np.arange(len(graphs) + 1, dtype=np.int32) * width
    return pa.ListArray.from_arrays(pa.array(at), pa.array(values))


def _digest(content: xxhash.xxh3_64, value: Any) -> None:
    """Add a payload to a hash: text, numbers, arrays, tables, and sequences of these."""
    if isinstance(value, Piece) and isinstance(value.text, bytes):  # fast path for the most common case
        content.update(repr((*value._replace(text=b""), len(value.text))).encode())
        content.update(value.text)
    elif isinstance(value, (bytes, str)):
        content.update(value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass"))
        content.update(b"\0")
    elif isinstance(value, (tuple, list)):
        for part in value:
            _digest(content, part)
    elif isinstance(value, np.ndarray):
        content.update(value.tobytes())
    elif isinstance(value, pa.RecordBatch):
        content.update(value.serialize())
    elif isinstance(value, (Crystal, Refusal)):
        for name in value.__slots__:
            _digest(content, getattr(value, name))
    else:
        content.update(repr(value).encode())


@contextmanager
def _gc_disabled() -> Iterator[None]:
    """Disable garbage collection: parsing makes many small objects but no cycles, and scanning them costs 4%."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _no_records() -> Iterator[Record]:
    return iter(())


def batches_of(source: Source) -> Iterator[tuple[Source, list[Record]]]:
    """Group records into tasks, with a source that parses them. A record of many crystals is its own task."""
    parsing = replace(source, records=_no_records)  # an open file cannot be sent to a worker, which does not need it
    records = source.records()
    for first in records:
        more = itertools.islice(records, CRYSTALS_PER_TASK - 1) if isinstance(first.payload, Crystal) else ()
        yield parsing, [first, *more]
