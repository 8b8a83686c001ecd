"""CSV tables with a CIF in the column ``cif``, as CDVAE and others ship them."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Callable, Iterator
from typing import Final

from sharding.crystal import Crystal, RefusedError
from sharding.sources import ReadOptions, SourceError, cif
from sharding.sources.pieces import Fault, Piece, cut, key_of, labels_of
from sharding.sources.streams import CHUNK, DamagedError, Stream

CIF: Final = "cif"


def check(stream: Stream, name: str, options: ReadOptions) -> None:
    """Check that the header has the columns needed.

    Raises:
        SourceError: if a column is missing.
    """
    try:
        columns, _ = _header(stream)
    except (DamagedError, ValueError, csv.Error) as why:
        raise SourceError(f"{name}: the first line is no CSV header ({why})") from None
    missing = [column for column in (CIF, *options.labels.values()) if column not in columns]
    if missing:
        raise SourceError(f"{name}: no column {', '.join(missing)}; it has {', '.join(columns[:40])}")


def split(stream: Stream, stem: str, options: ReadOptions) -> Iterator[Piece | Fault]:
    """Yield one piece per row."""
    columns, rest = _header(stream)
    if CIF not in columns:
        yield Fault("", "unparsable", f"no column {CIF}; the columns are {', '.join(columns[:20])}")
        return
    for number, (text, last) in enumerate(cut(rest, _row_finder(columns.index(CIF)), options.max_record_bytes)):
        position = f"row {number}"
        if text is None:
            yield Fault(position, "too_large", f"is larger than {options.max_record_bytes:,} bytes")
        elif not text.isspace():
            yield Piece(f"{stem}#{number}", position, text, stem, columns=columns, last=last)


def parse(piece: Piece, options: ReadOptions) -> Iterator[Crystal | Fault]:
    """The crystals of a row, and of rows after it whose beginning was not recognized (see ``_row_finder``)."""
    for number, row in enumerate(_rows(piece.text.decode("utf-8", "replace"))):
        key = f"{piece.key}.{number}" if number else piece.key
        try:
            if len(row) != len(piece.columns):
                raise RefusedError("unparsable", f"the row has {len(row)} fields, the header {len(piece.columns)}")
            record = dict(zip(piece.columns, row, strict=True))
            key = key_of(record, piece.stem) or key
            if not record[CIF].strip():
                raise RefusedError("unparsable", "there is no CIF")
            yield from cif.crystals(record[CIF], key, options, labels_of(record, options.labels))
        except RefusedError as why:
            code = "truncated" if piece.last and len(row) != len(piece.columns) else why.code
            yield Fault(f"{number} behind it" if number else "", code, why.text, key)


def _rows(text: str) -> Iterator[list[str]]:
    csv.field_size_limit(sys.maxsize)  # the piece is bounded already
    try:
        # nearly always one row: read as one line it takes 5.4 µs, as a file 9.1 µs
        rows = list(csv.reader([text], strict=True))
    except csv.Error:
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)  # type: ignore[assignment]
    yield from filter(None, rows)


def _row_finder(before: int) -> Callable[[bytes, int], int]:
    """Make a function that finds where a row begins: at a line with ``before`` fields, followed by a quoted text.

    Inside quoted text every quote is doubled, so no line of a CIF looks like this, whatever it holds. A row that does
    not look like this (its CIF is empty, or an earlier field has several lines) stays attached to the row before it.
    """
    field = rb'(?:"(?:[^"\r\n]|"")*"|[^",\r\n]*),'
    start = re.compile(rb'\n(?:%s){%d}"[^",\r\n]' % (field, before))

    def find(text: bytes, at: int) -> int:
        while (quote := text.find(b'"', at)) >= 0:  # few lines have one
            line = text.rfind(b"\n", at, quote)
            if line >= 0 and start.match(text, line):
                return line
            at = text.find(b"\n", quote)
            if at < 0:
                break
        return -1

    return find


def _header(stream: Stream) -> tuple[tuple[str, ...], Stream]:
    """The columns, and the stream of what follows."""
    text = stream.exactly(CHUNK)
    end = text.find(b"\n")
    if end < 0:
        raise DamagedError("there is no line with names of columns")
    line = text[:end].decode("utf-8-sig").rstrip("\r")
    columns = tuple(next(csv.reader([line], strict=True), []))
    rest = text[end:]  # including the line feed, after which a row may begin

    def read(n: int) -> bytes:
        nonlocal rest
        if not rest:
            return stream.read(n)
        part, rest = rest[:n], rest[n:]
        return part

    return columns, Stream(read)
