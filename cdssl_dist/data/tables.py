"""Columns of a CSV or Parquet file, looked up by crystal id: splits, folds, classes, and separate labels."""

from __future__ import annotations

import csv
import difflib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from sharding.manifest import DataSetError
from sharding.sources.pieces import IDS

KEYS: Final = ("key", *IDS, "immutable_id")  # possible id columns, in order of preference


def read_columns(
    path: str, names: Sequence[str], keys: Sequence[str], repeated: Literal["refuse", "first"] = "refuse"
) -> dict[str, list[Any]]:
    """Read columns of a table, in the order of the crystals.

    Args:
        path: a CSV or Parquet file.
        names: of the columns.
        keys: of the crystals. A row belongs to the crystal with its id or, if ids are plain numbers, to the crystal
            whose key ends in # and the id.
        repeated: what to do if rows with the same id differ: refuse the table, or use the first, as for crystals.

    Returns:
        Name → a value for each crystal, None if the table has none.

    Raises:
        DataSetError: if the file is not a table, a column (or that of ids) is missing, no row belongs to a crystal,
            rows with the same id differ and are refused, or a number is the id of two crystals.
    """
    values: dict[str, tuple[Any, ...]] = {}
    for key, row in rows_of(path, names):
        differ = _difference(names, values.setdefault(key, row), row)
        if differ and repeated == "refuse":
            raise DataSetError(f"{path}: two rows have the id {key!r} and differ: {differ}; keep the right one")
    owner: dict[str, str] = {}  # id that is a plain number → key
    for key in keys:
        number = key.rpartition("#")[2]
        if key not in values and number in values and owner.setdefault(number, key) != key:
            raise DataSetError(f"{path}: the id {number!r} fits both {owner[number]!r} and {key!r}; write the full ids")
    nothing = (None,) * len(names)
    found = [values.get(key) or values.get(key.rpartition("#")[2]) or nothing for key in keys]
    if keys and all(row is nothing for row in found):
        raise DataSetError(
            f"{path}: no row has the id of a crystal; ids are e.g. {keys[0]!r} and {next(iter(values), None)!r}"
        )
    return {name: [row[i] for row in found] for i, name in enumerate(names)}


def rows_of(path: str, names: Sequence[str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield the id of each row of a CSV or Parquet file, and its values in ``names``; raises as ``read_columns``."""
    ending = Path(path).suffix.lower()
    try:
        if ending == ".parquet":
            file = pq.ParquetFile(path)
            key = _check(path, file.schema_arrow.names, names)
            for batch in file.iter_batches(columns=list(dict.fromkeys([key, *names]))):
                columns = [batch.column(name).to_pylist() for name in names]
                yield from zip(map(str, batch.column(key).to_pylist()), zip(*columns, strict=True), strict=True)
        elif ending == ".csv":
            csv.field_size_limit(sys.maxsize)
            with open(path, encoding="utf-8-sig", newline="") as text:
                reader = csv.DictReader(text)
                key = _check(path, list(reader.fieldnames or ()), names)
                for record in reader:
                    yield str(record[key]), tuple(record[name] for name in names)
        else:
            listed = ", ".join(names)
            raise DataSetError(f"{path}: {listed} can only be read from a CSV or Parquet file; give one with --labels")
    except (OSError, pa.ArrowException, csv.Error, UnicodeDecodeError) as why:
        raise DataSetError(f"{path}: cannot be read as a table ({why})") from None


def _difference(names: Sequence[str], first: tuple[Any, ...], second: tuple[Any, ...]) -> str:
    """Describe where two rows differ; NaN equals NaN."""
    pairs = zip(names, first, second, strict=True)
    return ", ".join(f"{name} is {a!r} and {b!r}" for name, a, b in pairs if a != b and (a == a or b == b))


def _check(path: str, there: Sequence[str], names: Sequence[str]) -> str:
    """Return the name of the id column; raise if a column is missing."""
    for name in names:
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(there[:40])}"
            if len(there) == 1 and (mark := next((m for m in ";\t" if m in there[0]), None)):
                hint = f"its columns are separated by {mark!r}: separate them by commas"
            raise DataSetError(f"{path}: no column {name!r}; {hint}")
    key = next((name for name in KEYS if name in there), None)
    if key is None:
        raise DataSetError(
            f"{path}: no column of ids, so rows of {', '.join(names)} cannot be assigned to crystals; "
            f"add one of {', '.join(KEYS)}"
        )
    return key
