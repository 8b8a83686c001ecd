"""Parquet tables in OPTIMADE property names, as LeMat-Bulk and others ship them.

Columns: ``id``, ``lattice_vectors``, ``cartesian_site_positions``, ``species_at_sites``; any numeric column may be a
label. Schema metadata ``licence``, ``cite`` are carried into the manifest.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sharding.crystal import Crystal, Refusal, RefusedError, atomic_numbers
from sharding.sources import ReadOptions, Record, Source, SourceError

COLUMNS: Final = ("id", "lattice_vectors", "cartesian_site_positions", "species_at_sites")
ROWS_PER_RECORD: Final = 512


def open_source(spec: str, options: ReadOptions) -> Source:
    """Open one Parquet file; it is streamed, a slice of rows a record."""
    try:
        schema = pq.read_schema(spec)
    except (pa.ArrowException, OSError) as why:
        raise SourceError(f"{spec}: not a readable Parquet file ({why})") from None
    missing = [name for name in (*COLUMNS, *options.labels.values()) if name not in schema.names]
    if missing:
        raise SourceError(f"{spec}: no column {', '.join(missing)}; it has {', '.join(schema.names[:40])}")
    about = {k.decode(): v.decode() for k, v in (schema.metadata or {}).items()}
    name = os.path.basename(spec)
    return Source(
        name=name,
        records=functools.partial(_records, spec, options),
        parse=functools.partial(_parse, name, options),
        licence=about.get("licence", about.get("license", "unknown")),
        cite=about.get("cite", ""),
    )


def _records(path: str, options: ReadOptions) -> Iterator[Record]:
    columns = [*COLUMNS, *options.labels.values()]
    row = 0
    with pq.ParquetFile(path, memory_map=True) as table:
        for batch in table.iter_batches(ROWS_PER_RECORD, columns=columns):
            if options.limit is not None:
                batch = batch.slice(0, max(options.limit - row, 0))
            if batch.num_rows == 0:
                return
            yield Record(f"row {row}", (row, batch))
            row += batch.num_rows


def _parse(source: str, options: ReadOptions, record: Record) -> Iterator[Crystal | Refusal]:
    first, batch = record.payload
    keys = batch.column("id").to_pylist()
    lattices = _rows(batch.column("lattice_vectors"))
    positions = _rows(batch.column("cartesian_site_positions"))
    species = batch.column("species_at_sites").to_pylist()
    labels = {name: batch.column(column).to_pylist() for name, column in options.labels.items()}
    for i, key in enumerate(keys):
        try:
            if key is None or lattices[i] is None or positions[i] is None or species[i] is None:
                raise RefusedError("unparsable", "a required column is null")
            yield Crystal(
                key=str(key),
                lattice=lattices[i],
                positions=positions[i],
                atomic_numbers=atomic_numbers(species[i]),
                labels={n: float(v[i]) for n, v in labels.items() if v[i] is not None},
            )
        except (RefusedError, ValueError) as why:
            code = why.code if isinstance(why, RefusedError) else "unparsable"
            yield Refusal(str(key or ""), source, f"row {first + i}", code, str(why))


def _rows(column: Any) -> list[Any]:
    """A column of lists of 3-vectors as one (n, 3) float64 array a row, None where null or ragged."""
    rows: list[Any] = [None] * len(column)
    inner = column.values  # lists of lists: the vectors of all rows
    numbers = np.asarray(inner.values.cast(pa.float64()).fill_null(np.nan), np.float64)
    ends, starts = np.asarray(column.offsets[1:]), np.asarray(column.offsets[:-1])
    at = np.asarray(inner.offsets)
    valid = np.asarray(column.is_valid())
    for i in range(len(column)):
        edges = at[starts[i] : ends[i] + 1]
        if valid[i] and (np.diff(edges) == 3).all():
            rows[i] = numbers[edges[0] : edges[-1]].reshape(-1, 3)
    return rows
