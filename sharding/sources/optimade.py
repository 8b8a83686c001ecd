"""Parquet tables in OPTIMADE property names, as LeMat-Bulk and others ship them.

Columns: ``id`` (or another of ``KEYS``), ``lattice_vectors``, ``cartesian_site_positions``, ``species_at_sites``, and
``species`` where sites may be disordered; any numeric column may be a label. The manifest records
``licence`` and ``cite`` from the schema metadata, and the unit of a label from the metadata of its field or from the
JSON object ``units`` in the schema metadata.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sharding.crystal import Crystal, Refusal, RefusedError, atomic_numbers
from sharding.sources import ReadOptions, Record, Source, SourceError, dialects
from sharding.sources.pieces import IDS, key_of, label_value, refusal
from sharding.sources.streams import base_name, opened, redacted

SITES: Final = ("lattice_vectors", "cartesian_site_positions", "species_at_sites")
KEYS: Final = (*IDS, "immutable_id")
ROWS_PER_RECORD: Final = 512
VECTORS: Final = pa.list_(pa.list_(pa.float64()))


def open_source(spec: str, options: ReadOptions) -> Source:
    """Open one Parquet file; it is streamed, one slice of rows per record."""
    try:
        with opened(spec) as file:
            schema = pq.read_schema(file)
    except SourceError:
        raise
    except (pa.ArrowException, OSError, ValueError) as why:
        raise SourceError(f"{redacted(spec)}: not a readable Parquet file ({why})") from None
    there = schema.names
    missing = [name for name in (*SITES, *options.labels.values()) if name not in there]
    if missing:
        raise SourceError(f"{redacted(spec)}: no column {', '.join(missing)}; it has {', '.join(there[:40])}")
    key = next((name for name in KEYS if name in there), None)
    if key is None:
        raise SourceError(f"{redacted(spec)}: no column of ids; expected one of {', '.join(KEYS)}")
    for column, (right, wanted) in (_TYPES | {key: (_is_id, "text or whole numbers")}).items():
        if column in there and not right(kind := schema.field(column).type):
            raise SourceError(f"{redacted(spec)}: column {column} holds {kind}, but must hold {wanted}")
    species = ["species"] if "species" in there else []
    columns = list(dict.fromkeys([key, *SITES, *species, *options.labels.values()]))
    about = {k.decode(): v.decode("utf-8", "replace") for k, v in (schema.metadata or {}).items()}
    name = options.name or base_name(spec)
    return Source(
        name=name,
        records=functools.partial(_records, spec, name, columns, options),
        parse=functools.partial(_parse, name, key, options),
        licence=about.get("licence", about.get("license", "unknown")),
        cite=about.get("cite", ""),
        units=_units(schema, about, options),
    )


def _is_list_of(inner: Callable[[pa.DataType], bool]) -> Callable[[pa.DataType], bool]:
    def right(kind: pa.DataType) -> bool:
        listed = any(is_(kind) for is_ in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))
        return listed and inner(kind.value_type)

    return right


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_id(kind: pa.DataType) -> bool:
    return _is_text(kind) or bool(pa.types.is_integer(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def _is_species(kind: pa.DataType) -> bool:
    fields = {field.name for field in kind} if pa.types.is_struct(kind) else set()
    return fields >= {"name", "chemical_symbols", "concentration"}


_TYPES: Final = {  # of columns, as OPTIMADE defines them
    "lattice_vectors": (_is_list_of(_is_list_of(_is_number)), "lists of three vectors"),
    "cartesian_site_positions": (_is_list_of(_is_list_of(_is_number)), "lists of vectors"),
    "species_at_sites": (_is_list_of(_is_text), "lists of texts"),
    "species": (_is_list_of(_is_species), "lists of structs with name, chemical_symbols and concentration"),
}


def _units(schema: pa.Schema, about: dict[str, str], options: ReadOptions) -> dict[str, str]:
    """Label → unit, where the table states it in a form that a program can read."""
    try:
        listed = orjson.loads(about.get("units", "{}"))
    except orjson.JSONDecodeError:
        listed = {}  # prose
    units = {}
    for label, column in options.labels.items():
        own = (schema.field(column).metadata or {}).get(b"unit", b"").decode("utf-8", "replace")
        unit = own or (listed.get(column) if isinstance(listed, dict) else None)
        if isinstance(unit, str) and unit:
            units[label] = unit
    return units


def _records(spec: str, name: str, columns: list[str], options: ReadOptions) -> Iterator[Record]:
    with opened(spec) as file:
        table = pq.ParquetFile(spec if "://" not in spec else file, memory_map="://" not in spec)
        first, left = 0, options.limit
        for group in range(table.num_row_groups):
            row = first
            first += table.metadata.row_group(group).num_rows
            try:
                for batch in table.iter_batches(ROWS_PER_RECORD, row_groups=[group], columns=columns):
                    if left is not None:
                        batch = batch.slice(0, left)
                        left -= batch.num_rows
                    if batch.num_rows:
                        yield Record(f"row {row}", (row, batch))
                    row += batch.num_rows
            except (pa.ArrowException, OSError) as why:  # a damaged page: the next row group may be whole
                text = f"rows {row} to {first - 1} cannot be read: {why}"
                yield Record(f"row {row}", refusal("", name, f"row {row}", "truncated", text))
            if left == 0:
                return


def _parse(source: str, key: str, options: ReadOptions, record: Record) -> Iterator[Crystal | Refusal]:
    if isinstance(record.payload, Refusal):
        yield record.payload
        return
    first, batch = record.payload
    stem = source.removesuffix(".parquet")
    keys = batch.column(key).to_pylist()
    lattices = _rows(batch.column("lattice_vectors"))
    positions = _rows(batch.column("cartesian_site_positions"))
    names = batch.column("species_at_sites").to_pylist()
    species = None if _ordered(batch) else batch.column("species").to_pylist()
    labels = {name: batch.column(column).to_pylist() for name, column in options.labels.items()}
    for i, given in enumerate(keys):
        name = key_of({"id": given}, stem)
        try:
            if name is None or lattices[i] is None or positions[i] is None or names[i] is None:
                raise RefusedError("unparsable", "a required column is null")
            values = {label: label_value(label, column[i]) for label, column in labels.items()}
            found = {label: value for label, value in values.items() if value is not None}
            if species is None:
                crystal = Crystal(name, lattices[i], positions[i], atomic_numbers(names[i]), found)
            else:
                entry = dict(zip(SITES, (lattices[i], positions[i], names[i]), strict=True)) | {"species": species[i]}
                crystal = dialects.optimade(entry, name, found, options)
            yield crystal.at(f"row {first + i}")
        except (RefusedError, ValueError, KeyError, TypeError) as why:
            code = why.code if isinstance(why, RefusedError) else "unparsable"
            yield refusal(name or "", source, f"row {first + i}", code, str(why))


def _ordered(batch: pa.RecordBatch) -> bool:
    """Whether every species of every row is one element, under its own name, so that site names suffice."""
    if "species" not in batch.schema.names:
        return True
    species = batch.column("species").flatten()
    symbols, shares = species.field("chemical_symbols"), species.field("concentration")
    if species.null_count or symbols.null_count or shares.null_count:
        return False
    if len(species) == 0 or not pc.all(pc.equal(pc.list_value_length(symbols), 1)).as_py():
        return len(species) == 0
    same = pc.all(pc.equal(symbols.flatten(), species.field("name"))).as_py()
    return bool(same and pc.all(pc.equal(shares.flatten(), 1.0)).as_py() and not species.null_count)


def _rows(column: Any) -> list[Any]:
    """A column of lists of 3-vectors as one (n, 3) float64 array a row, None where null or ragged."""
    column = column.cast(VECTORS)  # lists of fixed size and large lists too
    rows: list[Any] = [None] * len(column)
    inner = column.values  # lists of lists: the vectors of all rows
    numbers = np.asarray(inner.values.fill_null(np.nan), np.float64)
    ends, starts = np.asarray(column.offsets[1:]), np.asarray(column.offsets[:-1])
    at = np.asarray(inner.offsets)
    valid = np.asarray(column.is_valid())
    for i in range(len(column)):
        edges = at[starts[i] : ends[i] + 1]
        if valid[i] and (np.diff(edges) == 3).all():
            rows[i] = numbers[edges[0] : edges[-1]].reshape(-1, 3)
    return rows
