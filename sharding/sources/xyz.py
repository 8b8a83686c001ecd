"""Extended XYZ: each frame has the number of atoms, a comment (``Lattice="…" Properties=…``), and one line per atom.

Labels are values in the comment (``energy=-1.5``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import numpy as np

from sharding.crystal import Crystal, RefusedError, atomic_numbers
from sharding.sources import ReadOptions
from sharding.sources.pieces import Fault, Piece, cut, key_of, labels_of
from sharding.sources.streams import Stream

# No line of an atom is a single integer, so a frame begins wherever such a line is, whatever came before
FRAME: Final = re.compile(rb"\n(?=[ \t]*\d+[ \t]*\r?\n)")
PAIR: Final = re.compile(r"""([^\s="']+)\s*=\s*(?:"([^"]*)"|'([^']*)'|\{([^}]*)\}|(\S+))""")
PLAIN: Final = "species:S:1:pos:R:3"


def split(stream: Stream, stem: str, options: ReadOptions) -> Iterator[Piece | Fault]:
    """Yield one piece per frame."""
    for number, (text, last) in enumerate(cut(stream, _frame, options.max_record_bytes)):
        position = f"frame {number}"
        if text is None:
            yield Fault(position, "too_large", f"is larger than {options.max_record_bytes:,} bytes")
        elif text.strip():
            yield Piece(f"{stem}#{number}", position, text, stem, last=last)


def parse(piece: Piece, options: ReadOptions) -> Iterator[Crystal]:
    """The crystal of a frame.

    Raises:
        RefusedError: ``unparsable``, ``truncated``, ``no_atoms``, ``species``, ``not_periodic``.
    """
    lines = piece.text.decode("utf-8", "replace").strip("\r\n").split("\n")
    count = int(lines[0])
    rows = [line.split() for line in lines[2:] if line.strip()]
    if len(rows) != count:
        raise RefusedError("unparsable", f"{count} atoms are announced, {len(rows)} are there")
    about = {match[1]: next(v for v in match.groups()[1:] if v is not None) for match in PAIR.finditer(lines[1])}
    named = {name.lower(): value for name, value in about.items()}
    if "lattice" not in named:
        raise RefusedError("not_periodic", "the comment names no Lattice")
    if "pbc" in named and not re.search(r"\b[1TtYy]", named["pbc"]):
        raise RefusedError("not_periodic", "no direction is periodic")
    if count == 0:
        raise RefusedError("no_atoms", "the cell holds no atoms")
    columns = _columns(named.get("properties", PLAIN))
    if "pos" not in columns:
        raise RefusedError("unparsable", "Properties names no positions")
    if len({len(row) for row in rows}) != 1:
        raise RefusedError("unparsable", "the lines of the atoms differ in length")
    start = columns["pos"]
    positions = np.array([row[start : start + 3] for row in rows], dtype=np.float64)
    if "species" in columns:
        numbers = atomic_numbers([row[columns["species"]] for row in rows])
    elif "z" in columns or "numbers" in columns:
        numbers = np.array([row[columns.get("z", columns.get("numbers", 0))] for row in rows]).astype(np.uint8)
    else:
        raise RefusedError("species", "Properties names no species")
    lattice = np.array(named["lattice"].split(), dtype=np.float64).reshape(3, 3)
    key = key_of(about, piece.stem) or piece.key
    yield Crystal(key, lattice, positions, numbers, labels_of(about, options.labels))


def _frame(text: bytes, at: int) -> int:
    match = FRAME.search(text, at)
    return match.start() if match else -1


def _columns(properties: str) -> dict[str, int]:
    """The first column of each property: ``species:S:1:pos:R:3`` puts positions at 1."""
    fields = properties.split(":")
    columns, at = {}, 0
    for name, width in zip(fields[::3], fields[2::3], strict=True):
        columns[name.lower()] = at
        at += int(width)
    return columns
