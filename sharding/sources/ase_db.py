"""ASE databases: SQLite (``.db``) and LMDB (``.aselmdb``, as OMat24 is shipped), read without ASE and without pickle.

A label is a column of the row (``energy``) or one of its key-value pairs. The files are opened read-only.

A file that is shorter than its header states is not read: SQLite would read zeros past its end, and LMDB, which maps
the file into memory and trusts it, would crash the process.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
import struct
import zlib
from collections.abc import Generator, Iterator
from typing import Any, Final
from urllib.parse import quote

import numpy as np

from sharding.crystal import Crystal, Refusal, RefusedError
from sharding.sources import ReadOptions, Record, Source, SourceError, dialects
from sharding.sources.json_lines import loads
from sharding.sources.pieces import Fault, Piece, batched, parsed
from sharding.sources.streams import redacted

BLOBS: Final = ("numbers", "positions", "cell")


def open_source(spec: str, options: ReadOptions) -> Source:
    """Open an ASE database.

    Raises:
        SourceError: if it is not one, or the package for its format is not installed.
    """
    if "://" in spec:
        raise SourceError(f"{redacted(spec)}: a database is read from a disk, not from a URL; copy it first")
    name = options.name or os.path.basename(spec)
    reader = _lmdb_pieces if spec.lower().endswith(".aselmdb") else _sqlite_pieces
    with contextlib.closing(reader(spec, options)) as pieces:
        next(pieces, None)
    return Source(
        name=name,
        records=functools.partial(_records, reader, spec, name, options),
        parse=functools.partial(_parse, name, options),
    )


def _records(reader: Any, spec: str, name: str, options: ReadOptions) -> Iterator[Record]:
    with contextlib.closing(reader(spec, options)) as pieces:
        yield from batched(pieces, name, options)


def _parse(name: str, options: ReadOptions, record: Record) -> Iterator[Crystal | Refusal]:
    return parsed(_row, name, options, record.payload)


def _row(piece: Piece, options: ReadOptions) -> Iterator[Crystal | Fault]:
    if piece.format == "lmdb":
        row = loads(_unpacked(piece.text, options.max_record_bytes))
        if not isinstance(row, dict):
            raise RefusedError("unparsable", "the row is no JSON object")
    else:
        row = dict(zip(piece.columns, piece.text, strict=True))
        row["key_value_pairs"] = loads((row["key_value_pairs"] or "{}").encode())
        row["numbers"] = np.frombuffer(row["numbers"], "<i4")
        row["positions"] = np.frombuffer(row["positions"], "<f8")
        row["cell"] = np.frombuffer(row["cell"], "<f8")
        row["pbc"] = [bool(row["pbc"])]  # one bit per direction
    row.pop("id", None)  # the number of the row in this file
    return dialects.crystals(row, piece.key, piece.stem, options)


def _unpacked(text: bytes, limit: int) -> bytes:
    unpacker = zlib.decompressobj()
    unpacked = unpacker.decompress(text, limit + 1)
    if len(unpacked) > limit:
        raise RefusedError("too_large", f"is larger than {limit:,} bytes")
    if not unpacker.eof:
        raise RefusedError("unparsable", "the compressed row is cut")
    return unpacked


def _sqlite_pieces(spec: str, options: ReadOptions) -> Generator[Piece | Fault]:
    stem = os.path.splitext(options.name or os.path.basename(spec))[0]
    with open(spec, "rb") as file:
        page_size, pages = struct.unpack(">16xH10xI", file.read(32).ljust(32, b"\0"))
    _check_length(spec, (2**16 if page_size == 1 else page_size) * pages)
    try:
        database = sqlite3.connect(f"file:{quote(os.path.abspath(spec))}?mode=ro", uri=True)
    except sqlite3.Error as why:
        raise SourceError(f"{spec}: cannot be opened ({why})") from None
    with contextlib.closing(database):
        database.execute("PRAGMA trusted_schema = OFF")  # do not call functions named in the file's own schema
        try:
            there = {column for _, column, *_ in database.execute("PRAGMA table_info(systems)")}
        except sqlite3.DatabaseError as why:
            raise SourceError(f"{spec}: not an SQLite database ({why})") from None
        if not there.issuperset(("id", "pbc", "key_value_pairs", *BLOBS)):
            raise SourceError(f"{spec}: not an ASE database: it has no table of systems")
        labels = [column for column in dict.fromkeys(options.labels.values()) if column in there]
        columns = ("id", "pbc", "key_value_pairs", *BLOBS, *(c for c in labels if c not in ("id", "pbc", *BLOBS)))
        names = ", ".join('"' + column.replace('"', '""') + '"' for column in columns)
        size = " + ".join(f"ifnull(length({column}), 0)" for column in ("key_value_pairs", *BLOBS))
        at = "the first row"
        try:
            for size_of, *row in database.execute(f"SELECT {size}, {names} FROM systems ORDER BY id"):
                at = f"row {row[0]}"
                if size_of > options.max_record_bytes:
                    yield Fault(at, "too_large", f"is larger than {options.max_record_bytes:,} bytes")
                else:
                    yield Piece(f"{stem}#{row[0]}", at, tuple(row), stem, columns=columns, format="sqlite")
        except sqlite3.Error as why:
            yield Fault(f"after {at}", "truncated", f"the database cannot be read to its end: {why}")


def _check_length(spec: str, needed: int) -> None:
    length = os.path.getsize(spec)
    if length < needed:
        raise SourceError(f"{spec}: is truncated, or not such a database: it has {length:,} of {needed:,} bytes")


def _lmdb_pieces(spec: str, options: ReadOptions) -> Generator[Piece | Fault]:
    try:
        import lmdb
    except ImportError:
        raise SourceError(f"{spec}: reading .aselmdb needs the package lmdb: pip install lmdb") from None
    stem = os.path.splitext(options.name or os.path.basename(spec))[0]
    try:
        database = lmdb.open(spec, subdir=False, readonly=True, lock=False)
    except lmdb.Error as why:
        raise SourceError(f"{spec}: not an LMDB database ({why})") from None
    with contextlib.closing(database):
        _check_length(spec, (database.info()["last_pgno"] + 1) * database.stat()["psize"])
        with database.begin() as transaction:
            for key, value in transaction.cursor():
                if key.isdigit():  # the others hold the database's own book-keeping
                    number = key.decode()
                    yield Piece(f"{stem}#{number}", f"row {number}", value, stem, format="lmdb")
