"""Vectors of crystals from a file, written by ``cdssl embed`` or any other program."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sharding.commands import one_line
from sharding.manifest import DataSetError


def vectors_of(path: str | Path, keys: Sequence[str]) -> NDArray[np.float64]:
    """Read vectors from a Parquet file with ``key`` and ``embedding``, in the order of ``keys``: (n, features).

    Raises:
        DataSetError: if it cannot be read, or has no vector for some of them.
    """
    try:
        place, rows = _read(Path(path), Path(path).stat().st_mtime_ns)
    except (OSError, ValueError, AttributeError, pa.ArrowException) as why:
        raise DataSetError(f"{path}: not a Parquet file with key and embedding ({one_line(why, 200)})") from None
    if missing := [key for key in keys if key not in place]:
        raise DataSetError(
            f"{path}: no vector for {len(missing):,} of {len(keys):,} crystals, e.g. {missing[0]}; only vectors of "
            "the same crystals can be compared: embed these as well, or leave them out of the data"
        )
    return rows[[place[key] for key in keys]]


@functools.lru_cache(maxsize=4)
def _read(path: Path, _written: int) -> tuple[dict[str, int], NDArray[np.float64]]:
    """Return key → row number, and the rows. The first row with an id counts; refused rows have no vector."""
    table = pq.read_table(path, columns=["key", "embedding"])
    table = table.filter(table["embedding"].is_valid())
    numbers = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    rows = numbers.astype(np.float64).reshape(len(table), len(numbers) // max(len(table), 1))
    return {key: i for i, key in reversed(list(enumerate(table["key"].to_pylist())))}, rows
