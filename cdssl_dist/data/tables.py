"""Columns of a CSV or Parquet file by the ids of crystals: splits, folds, classes, and labels that lie elsewhere."""

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

KEYS: Final = ("key", *IDS, "immutable_id")  # columns that hold the id


def read_columns(
    path: str, names: Sequence[str], keys: Sequence[str], repeated: Literal["refuse", "first"] = "refuse"
) -> dict[str, list[Any]]:
    """Some columns of a table, in the order of crystals.

    Args:
        path: a CSV or Parquet file.
        names: of the columns.
        keys: of the crystals. A row belongs to the crystal with its id; where ids are mere numbers, to the crystal
            whose key ends in # and the id.
        repeated: what to do where rows of one id differ: refuse the table, or take the first, as of crystals.

    Returns:
        Name → a value for each crystal, None where the table has none.

    Raises:
        DataSetError: where it is no table, a column is missing, ids included, no row is a crystal's, two rows of one
            id differ, or a number is the id of two crystals.
    """
    values: dict[str, tuple[Any, ...]] = {}
    for key, row in rows_of(path, names):
        differ = _difference(names, values.setdefault(key, row), row)
        if differ and repeated == "refuse":
            raise DataSetError(f"{path}: two rows have the id {key!r} and differ: {differ}; keep the right one")
    owner: dict[str, str] = {}  # of an id that is a mere number
    for key in keys:
        number = key.rpartition("#")[2]
        if key not in values and number in values and owner.setdefault(number, key) != key:
            raise DataSetError(
                f"{path}: the id {number!r} is that of {owner[number]!r} and of {key!r}; write the whole ids"
            )
    nothing = (None,) * len(names)
    found = [values.get(key) or values.get(key.rpartition("#")[2]) or nothing for key in keys]
    if keys and all(row is nothing for row in found):
        raise DataSetError(
            f"{path}: no row has the id of a crystal; ids are e.g. {keys[0]!r} and {next(iter(values), None)!r}"
        )
    return {name: [row[i] for row in found] for i, name in enumerate(names)}


def rows_of(path: str, names: Sequence[str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The id of every row of a CSV or Parquet file, and its values of some columns; errors as of ``read_columns``."""
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
            raise DataSetError(f"{path}: {listed} can be read of a CSV or Parquet file; give one by --labels")
    except (OSError, pa.ArrowException, csv.Error, UnicodeDecodeError) as why:
        raise DataSetError(f"{path}: no table that can be read ({why})") from None


def _difference(names: Sequence[str], first: tuple[Any, ...], second: tuple[Any, ...]) -> str:
    """Where two rows differ; two NaN do not."""
    pairs = zip(names, first, second, strict=True)
    return ", ".join(f"{name} is {a!r} and {b!r}" for name, a, b in pairs if a != b and (a == a or b == b))


def _check(path: str, there: Sequence[str], names: Sequence[str]) -> str:
    """The column of ids; complains about columns that are missing."""
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
            f"{path}: no column of ids, so nothing tells which crystal a row of {', '.join(names)} belongs to; "
            f"add one of {', '.join(KEYS)}"
        )
    return key
