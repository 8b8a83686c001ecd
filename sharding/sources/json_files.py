"""JSON documents: the names at their beginning decide which arrays and objects hold the crystals.

- ``[…]``: an array of records, as pymatgen, JARVIS and many others write;
- ``{"entries": […]}``, ``{"data": […]}``: the same inside an object (Alexandria, OPTIMADE responses);
- ``{"columns": […], "index": […], "data": [[…], …]}``: a pandas table, split (Matbench);
- ``{"structure": {"0": {…}, …}, …}``: a pandas table, by column (Matbench Discovery);
- ``{"mp-1": {…}, …}`` and ``{"mp-1": {"mp-1-0-0": {…}, …}, …}``: records by id, in one level or two (MPtrj);
- records one after the other, as in JSON lines, or a single one.

The possible forms of a record are described in ``dialects``.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, Final

import orjson

from sharding.sources import ReadOptions
from sharding.sources.json_lines import loads, parse
from sharding.sources.json_text import FIRST, HEAD, Cursor
from sharding.sources.pieces import IDS, Fault, Piece
from sharding.sources.streams import DamagedError, Stream, TooLargeError

__all__ = ["parse", "split"]

ARRAYS: Final = ("entries", "data", "structures", "results", "docs")  # names of arrays of records
ENVELOPE: Final = (*ARRAYS, "index", "columns", "links", "meta", "response", "included")
FIELDS: Final = {  # names of members of records, or of structures
    *IDS,
    *"structure lattice matrix sites species atoms lattice_mat entry cif formula composition".split(),
    *"charge energy correction parameters properties type attributes lattice_vectors x-optimade".split(),
    *"numbers positions cell array pbc key_value_pairs data __ndarray__".split(),
}

STRUCTURE: Final = {
    "structure",
    "lattice",
    "sites",
    "atoms",
    "lattice_mat",
    "lattice_vectors",
    "cif",
}  # never ids of records
NEIGHBOURS: Final = STRUCTURE | {"numbers", "positions"}  # found beside an array that is a field of a record
OBJECTS: Final = re.compile(rb"\[\s*\{")
TOKEN: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|[{}\[\]]|:\s*')


def split(stream: Stream, stem: str, options: ReadOptions) -> Iterator[Piece | Fault]:
    """Yield one piece per record."""
    cursor = Cursor(stream, options.max_record_bytes)
    number = 0
    if not cursor.peek():
        raise DamagedError("the file is empty")
    while cursor.peek():
        if cursor.peek() == b"[":
            yield from _elements(cursor, stem, (b"", b"[", b"{"))
            continue
        kind, depth = _kind(cursor.look(HEAD), options)
        if kind == "envelope":
            yield from _envelope(cursor, stem)
        elif kind == "columns":
            yield from _columns(cursor, stem, options)
        elif kind == "mapping":
            yield from _mapping(cursor, stem, depth)
        else:
            number += 1
            yield _piece(cursor, f"{stem}#{number}" if number > 1 else stem, f"record {number}", stem)


def _leading_member_names(head: bytes, at: int = 0) -> list[str]:
    """The name of an object's first member, that of the member's first member if it is an object, and so on."""
    names = []
    while match := FIRST.match(head, at):
        names.append(match[1].decode("utf-8", "replace"))
        at = match.end()
    return names


def _kind(head: bytes, options: ReadOptions) -> tuple[str, int]:
    """Classify an object by its beginning; also return how many levels of ids it has."""
    names = _leading_member_names(head)
    kind, depth = _kind_of(names)
    if kind in ("envelope", "columns"):
        return kind, depth
    places = dict(_members(head))
    if not places.keys() & NEIGHBOURS and any(head[places[n] :][:1] == b"[" for n in ARRAYS if n in places):
        return "envelope", 0  # preceded by a version, or a description
    if kind == "record":
        return kind, depth
    # A record, or a table by column, may begin with an object that is not a known field: the members after it decide.
    members = {name: _leading_member_names(head, at) for name, at in places.items()}
    rows = len(names) > 1 and names[1].isdecimal()
    by_column = {name for name, inside in members.items() if _is_column(name) and inside and inside[0].isdecimal()}
    if by_column or (rows and names[0] in {column.split(".")[0] for column in options.labels.values()}):
        return "columns", 0
    named = any(name in IDS and not inside for name, inside in members.items())
    return ("record", 0) if named or members.keys() & STRUCTURE else (kind, depth)


def _members(head: bytes) -> Iterator[tuple[str, int]]:
    """The names in the outermost object of a text that may be cut off, and where their values begin."""
    depth, last = 0, b""
    for token in TOKEN.finditer(head):
        text = token[0]
        if text in (b"{", b"["):
            depth += 1
        elif text in (b"}", b"]"):
            depth -= 1
        elif depth == 1 and text[:1] == b":":
            yield last.decode("utf-8", "replace"), token.end()
        elif depth == 1:
            last = text[1:-1]


def _kind_of(names: list[str]) -> tuple[str, int]:
    """Classify an object by its first names alone."""
    if not names:
        return "record", 0
    if names[0] in ENVELOPE and not (len(names) > 1 and names[0] == "index"):
        return "envelope", 0
    ids = next((i for i, name in enumerate(names) if _is_field(name)), len(names))
    if ids == 0:
        # {"structure": {"0": …}} is a column where {"structure": {"lattice": …}} is a record
        by_column = len(names) > 1 and not _is_field(names[1]) and _is_column(names[0])
        return ("columns", 0) if by_column else ("record", 0)
    depth = min(ids, len(names) - 1)
    return ("mapping", depth) if depth else ("record", 0)


def _is_field(name: str) -> bool:
    return name in FIELDS or name.startswith(("@", "_")) or name.endswith("structure")


def _is_column(name: str) -> bool:
    return name in (*IDS, "entry", "atoms", "cif", "formula", "energy") or name.endswith("structure")


def _elements(
    cursor: Cursor, stem: str, after: tuple[bytes, ...], columns: tuple[str, ...] = (), index: list[Any] | None = None
) -> Iterator[Piece | Fault]:
    for number, text in enumerate(cursor.elements(after)):
        position = f"element {number}"
        key, named = f"{stem}#{number}", False
        if index is not None and number < len(index):
            named = isinstance(index[number], str)
            key = index[number] if named else f"{stem}#{index[number]}"
        if isinstance(text, bytes):
            yield Piece(key, position, text, stem, named, columns)
        elif isinstance(text, TooLargeError):
            yield Fault(position, "too_large", str(text), key)
        else:
            yield Fault(position, "unparsable", f"quotes or brackets do not match: {text}", key)


def _envelope(cursor: Cursor, stem: str) -> Iterator[Piece | Fault]:
    """The array of records in an object."""
    about: dict[str, Any] = {}
    found = False
    for name in cursor.members():
        if name in ARRAYS and cursor.peek() == b"[":
            found = True
            columns = tuple(map(str, about.get("columns", ())))
            yield from _elements(cursor, stem, (b",", b"}"), columns, about.get("index"))
        elif name in ARRAYS and cursor.peek() == b"{":
            found = True
            yield _piece(cursor, stem, name, stem)
        elif name in ("columns", "index"):
            about[name] = loads(cursor.value())
        else:
            _pass(cursor)
    if not found:
        yield Fault("", "unparsable", f"the object has none of {', '.join(ARRAYS)}")


def _mapping(cursor: Cursor, stem: str, depth: int) -> Iterator[Piece | Fault]:
    """Records by id, ``depth`` levels deep."""
    for name in cursor.members():
        if cursor.peek() != b"{":
            if OBJECTS.match(cursor.look(HEAD)):
                yield Fault(name, "unparsable", "an array of objects among records by id is not read")
            _pass(cursor)  # a remark beside the records, such as ASE's "nextid"
        elif depth > 1:
            yield from _mapping(cursor, stem, depth - 1)
        else:
            key = f"{stem}#{name}" if name.isdecimal() else name
            yield _piece(cursor, key, name, stem, named=not name.isdecimal())


def _columns(cursor: Cursor, stem: str, options: ReadOptions) -> Iterator[Piece | Fault]:
    """A pandas table by column: columns of scalars are kept for the column of structures that follows."""
    wanted = {*IDS, *(column.split(".")[0] for column in options.labels.values())}
    known: dict[str, dict[str, Any]] = {}
    done = ""
    for column in cursor.members():
        nested = len(_leading_member_names(cursor.look(HEAD))) > 1
        if nested and done:
            raise DamagedError(f"columns {done} and {column} both hold objects; keep one of them")
        if nested:
            done = column
            columns = (column, *known)
            for row in cursor.members():
                key = f"{stem}#{row}" if row.isdecimal() else row
                piece = _piece(cursor, key, f"row {row}", stem, named=not row.isdecimal())
                if isinstance(piece, Piece):
                    others = orjson.dumps([values.get(row) for values in known.values()])
                    text = b"[" + piece.text + (b"," if known else b"") + others[1:]
                    piece = piece._replace(text=text, columns=columns)
                yield piece
        elif column in wanted and done:
            raise DamagedError(f"column {column} comes after the structures; put it before them")
        elif column in wanted:
            known[column] = loads(cursor.value())
        else:
            _pass(cursor)


def _piece(cursor: Cursor, key: str, position: str, stem: str, *, named: bool = False) -> Piece | Fault:
    try:
        return Piece(key, position, cursor.value(), stem, named)
    except TooLargeError as why:
        return Fault(position, "too_large", str(why), key)


def _pass(cursor: Cursor) -> None:
    """Consume a value that is of no interest, however large."""
    with contextlib.suppress(TooLargeError):
        cursor.value()
