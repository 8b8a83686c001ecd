"""JSON lines: one record per line, in any of the dialects; the header of OPTIMADE's export is skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import orjson

from sharding.crystal import Crystal, RefusedError
from sharding.sources import ReadOptions, dialects
from sharding.sources.pieces import Fault, Piece, cut
from sharding.sources.streams import Stream


def split(stream: Stream, stem: str, options: ReadOptions) -> Iterator[Piece | Fault]:
    """Yield one piece per line."""
    for number, (text, last) in enumerate(cut(stream, _line_feed, options.max_record_bytes)):
        position = f"line {number + 1}"
        if text is None:
            yield Fault(position, "too_large", f"is larger than {options.max_record_bytes:,} bytes")
        elif not text.isspace():
            yield Piece(f"{stem}#{number}", position, text, stem, last=last)


def parse(piece: Piece, options: ReadOptions) -> Iterator[Crystal | Fault]:
    """The crystal of a record in JSON."""
    record = loads(piece.text)
    if isinstance(record, list) and piece.columns:
        record = dict(zip(piece.columns, record, strict=True))
    if not isinstance(record, dict):
        raise RefusedError("unparsable", f"the record is a {type(record).__name__}, not an object")
    if "x-optimade" in record or record.get("type") == "info":
        return
    yield from dialects.crystals(record, piece.key, piece.stem, options, named=piece.named)


def _line_feed(text: bytes, at: int) -> int:
    return text.find(b"\n", at)


def loads(text: bytes) -> Any:
    """Parse JSON, including Python's non-standard NaN and Infinity, which the fast parser rejects."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)
