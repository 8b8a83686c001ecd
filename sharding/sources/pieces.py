"""Pieces: what a reader cuts a source into, so that workers can do the parsing, many pieces at a time.

The ``split`` of a format runs in the reading process and does not look inside pieces; ``parse`` runs in the workers.
Both must expect any input: damage costs only the piece it is in, and every loss is recorded as a refusal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from sharding.crystal import Crystal, Refusal, RefusedError
from sharding.sources import ReadOptions, Record
from sharding.sources.streams import CHUNK, DamagedError, Stream

PIECES_PER_RECORD: Final = 512
BYTES_PER_RECORD: Final = 2**20  # a record is sent to another process
MISSING: Final = ("", "nan", "na", "n/a", "<na>", "null", "none")  # words for a value that is not known
IDS: Final = ("id", "material_id", "mat_id", "jid", "entry_id", "structure_id", "mp_id", "index")


class Piece(NamedTuple):
    """One crystal, not parsed yet (a CIF file may hold several)."""

    key: str  # used if the text holds no id
    position: str  # where in the source
    text: Any  # bytes, or a tuple for a row of a database
    stem: str  # of the file name; prefixed to ids that are only numbers
    named: bool = False  # whether the key is an id rather than a place in the file
    columns: tuple[str, ...] = ()  # of a table
    format: str = ""  # the module that parses it
    last: bool = False  # whether the file ends with it, so that it may have been cut off


class Fault(NamedTuple):
    """A part of a source that cannot even be cut into pieces, or a part of a piece that is no crystal."""

    position: str  # in the source, or in the piece
    code: str
    text: str
    key: str = ""


Parse = Callable[[Piece, ReadOptions], Iterable[Crystal | Fault]]


def batched(pieces: Iterator[Piece | Fault], name: str, options: ReadOptions) -> Iterator[Record]:
    """Group pieces into records large enough to send to another process; stop after ``options.limit`` pieces."""
    left = math.inf if options.limit is None else options.limit
    batch: list[Piece | Refusal] = []
    position, size = "", 0
    while left > 0 and (piece := next(pieces, None)) is not None:
        position = position or piece.position
        if isinstance(piece, Fault):
            batch.append(refusal(piece.key, name, piece.position, piece.code, piece.text))
        else:
            batch.append(piece)
            size += len(piece.text) if isinstance(piece.text, bytes) else sum(map(_length, piece.text))
            left -= 1
        if len(batch) >= PIECES_PER_RECORD or size >= BYTES_PER_RECORD:
            yield Record(position, batch)
            batch, position, size = [], "", 0
    if batch:
        yield Record(position, batch)


def parsed(
    parse: Parse, name: str, options: ReadOptions, pieces: Iterable[Piece | Refusal]
) -> Iterator[Crystal | Refusal]:
    """The crystals of some pieces, and a refusal for each piece that has none."""
    found: list[Crystal | Refusal] = []
    with np.errstate(all="ignore"):  # infinite numbers are refused by ``crystal.check``
        for piece in pieces:
            found += [piece] if isinstance(piece, Refusal) else _parsed(parse, name, options, piece)
    yield from found  # outside the ``with``, which would also silence the consumer's errors


def _parsed(parse: Parse, name: str, options: ReadOptions, piece: Piece) -> Iterator[Crystal | Refusal]:
    found: list[Crystal | Fault] = []
    try:
        for item in parse(piece, options):
            found.append(item)
    except RefusedError as why:
        code = "truncated" if piece.last and why.code == "unparsable" else why.code
        found.append(Fault("", code, why.text, piece.key))
    except Exception as why:  # whatever hostile bytes provoke in a parser costs this piece and no other
        code = "truncated" if piece.last else "unparsable"
        found.append(Fault("", code, f"{type(why).__name__}: {why}", piece.key))
    for item in found:
        if isinstance(item, Fault):
            position = f"{piece.position}, {item.position}" if item.position else piece.position
            yield refusal(item.key, name, position, item.code, item.text)
        else:
            yield item.at(piece.position)


def refusal(key: str, source: str, position: str, code: str, text: str) -> Refusal:
    """A refusal whose text fits on a line."""
    return Refusal(key[:300], source, position[:300], code, " ".join(text.split())[:300])


def cut(stream: Stream, find: Callable[[bytes, int], int], limit: int) -> Iterator[tuple[bytes | None, bool]]:
    """Cut text before each line that looks like the first one of a record.

    Whatever is in one piece, the next begins at the next such line: damage does not spread.

    Args:
        stream: the text.
        find: (text, from where) → the line feed before such a line, or −1.
        limit: the largest piece, in bytes.

    Yields:
        The text, None where it is over the limit, and whether it is the last one of the file.

    Raises:
        DamagedError: after every complete piece before the damage has been yielded.
    """
    text, seen, too_large = b"", 0, False
    while True:
        try:
            chunk = stream.exactly(max(CHUNK, len(text)))  # doubling: a large piece is not copied over and over
        except DamagedError:
            if too_large:
                yield None, True
            raise  # the piece in hand is dropped, since its last number may be cut
        if not chunk:
            break
        text += chunk
        begin = 0
        while (end := find(text, seen) + 1) > 0:
            if too_large or end > begin:
                yield (None if too_large or end - begin > limit else text[begin:end]), False
            too_large, begin, seen = False, end, end
        text = text[begin:]
        seen = max(text.rfind(b"\n"), 0)  # the line after it is not whole yet: it may still match
        if len(text) > limit:
            text, seen, too_large = text[seen:], 0, True
            if len(text) > limit:
                text = b""
    if too_large or text:
        yield (None if too_large else text), True


def labels_of(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, float]:
    """The labels of a record: label name → value, without those that are missing. A column is a name or a dotted path.

    Raises:
        RefusedError: ``label``, see ``label_value``.
    """
    found = {label: label_value(label, _look_up(record, column)) for label, column in columns.items()}
    return {label: value for label, value in found.items() if value is not None}


def label_value(label: str, value: Any) -> float | None:
    """The value of a label, or None where it is missing.

    Raises:
        RefusedError: ``label`` for other text, such as ">35": to drop it silently could bias what is learned.
    """
    found = number(value)
    if is_other_text(value):
        raise RefusedError("label", f"label {label!r} is {value[:40]!r}, which is not a number")
    return found


def is_other_text(value: Any) -> bool:
    """Whether a value is text that is neither a number nor a word or sign for a missing one."""
    if not isinstance(value, str) or number(value) is not None:
        return False
    return value.strip().lower() not in MISSING and bool(value.strip(" -?."))


def number(value: Any) -> float | None:
    """A number, or None where there is none: databases write ``null``, ``NaN``, ``"na"``, ``""`` for a missing one."""
    if value is None or isinstance(value, (list, dict)):
        return None
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return None if math.isnan(found) else found


def key_of(record: Mapping[str, Any], stem: str) -> str | None:
    """The id of a record. A plain number, which another database may use as well, is prefixed with the stem."""
    for name in IDS:
        value = record.get(name)
        if isinstance(value, str) and value and not value.isdecimal():
            return value
        if isinstance(value, (str, int)) and value != "":
            return f"{stem}#{value}"
    return None


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (bytes, str)) else 8


def _look_up(record: Mapping[str, Any], column: str) -> Any:
    if column in record:
        return record[column]
    value: Any = record
    for name in column.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value
