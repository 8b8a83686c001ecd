"""CIF files, read by gemmi; pymatgen's parser decides where gemmi's reading leaves doubt.

A CIF lists the atoms of an asymmetric unit and the symmetry operations that fill the cell with them. Explicit
operations take precedence over names of space groups. Atoms on special positions are mapped to themselves by some of
the operations: they are moved exactly onto the position, and counted once.

We fall back to ``pymatgen.io.cif.CifParser`` if the text violates the syntax, an element can only be guessed from a
label, the space group is unknown or has two origins, or the symmetry is magnetic. It is 8 to 50 times slower, so it is
used only for texts up to ``SLOW_LIMIT``. If it fails too, both reasons are given.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Final

import gemmi
import numpy as np
from numpy.typing import NDArray

from sharding.crystal import ATOMIC_NUMBER, Crystal, RefusedError, atomic_numbers
from sharding.sources import ReadOptions, dialects
from sharding.sources.pieces import Fault, Piece, labels_of
from sharding.sources.sites import Floats, check_occupancy, lattice_of, majority
from sharding.sources.streams import Stream
from sharding.sources.symmetry import AmbiguousCifError, Operations, expand, operations_of, unknown

SLOW_LIMIT: Final = 2**20  # bytes
CELL: Final = tuple(f"_cell_length_{x}" for x in "abc") + tuple(f"_cell_angle_{x}" for x in ("alpha", "beta", "gamma"))
FRACTIONAL: Final = tuple(f"_atom_site_fract_{x}" for x in "xyz")
ONE: Final = frozenset(("1", "1.0", "1.00", "1.000", "1.0000", "1.00000000", ".", "?"))  # full occupancy
NONE: Final = frozenset(("0", ".", "?"))
# an element with an optional charge or count: "Fe", "Fe3+", "O2-", "C1"
SYMBOL: Final = re.compile(r"([A-Z][a-z]?)(?:[\d+-][\w+-]*)?$")

HEADING: Final = re.compile(rb"^data_", re.M | re.I)
SITES: Final = re.compile(rb"^\s*(_cell_length_a|_atom_site_fract_x)\b", re.M | re.I)
# `_symmetry_space_group_name_H-M    P 1`, as ASE wrote it for years
UNQUOTED: Final = re.compile(
    rb"^(\s*_\w*space_group_name_H-M\w*[ \t]+)([A-Za-z][^'\"\r\n]*[ \t][^'\"\r\n]*?)[ \t]*\r?$", re.M
)


def split(stream: Stream, stem: str, options: ReadOptions) -> Iterator[Piece]:
    """One piece: the file."""
    yield Piece(stem, "", stream.whole(options.max_record_bytes), stem)


def parse(piece: Piece, options: ReadOptions) -> Iterator[Crystal | Fault]:
    """The crystals of a CIF file; a label is a tag in it."""
    return crystals(piece.text, piece.key, options)


def crystals(
    text: bytes | str, key: str, options: ReadOptions, labels: Mapping[str, float] | None = None
) -> Iterator[Crystal | Fault]:
    """The crystals of a text in CIF: one for each data block that has a cell or atoms.

    Args:
        text: the CIF.
        key: key of the crystal; if there are several, the names of their blocks are appended.
        options: the labels to read, and what to do about disorder.
        labels: labels from the table that holds the CIF in a column; None to read them from the CIF.

    Raises:
        RefusedError: ``unparsable``, ``no_atoms``, ``species``, ``partial_occupancy``, ``singular_cell``. If there
            are several blocks, a refused one yields a ``Fault`` instead.
    """
    try:
        document = _document(text)
    except (RuntimeError, ValueError) as why:
        yield from _read_blockwise(text, key, options, labels, str(why))
        return
    # the other blocks describe authors, or the measurement
    blocks = [b for b in document if b.find_value(CELL[0]) or b.find_loop(FRACTIONAL[0])]
    if not blocks:
        raise RefusedError("unparsable", "no data block has a cell and atoms")
    if len(blocks) == 1:
        yield from _block(blocks[0], text if len(document) == 1 else None, key, options, labels)
        return
    for name, block in zip(_unique_names([block.name for block in blocks]), blocks, strict=True):
        try:
            yield from _block(block, None, f"{key}#{name}", options, labels)
        except RefusedError as why:
            yield Fault(f"block {name}", why.code, why.text, f"{key}#{name}")


def _unique_names(names: Sequence[str]) -> Iterator[str]:
    """Make names of blocks unique: a name that occurs repeatedly, as some programs write it, gets a number appended."""
    repeated = Counter(names)
    for number, name in enumerate(names):
        yield f"{name}#{number}" if repeated[name] > 1 else name


def _document(text: bytes | str) -> gemmi.cif.Document:
    """Parse the text, repairing the one syntax error that occurs in whole databases (``UNQUOTED``)."""
    try:
        return _parsed(text)
    except (RuntimeError, ValueError):
        there = text.encode() if isinstance(text, str) else text
        repaired = UNQUOTED.sub(rb"\1'\2'", there, count=1)
        if repaired == there:
            raise
        return _parsed(repaired)


def _parsed(text: bytes | str) -> gemmi.cif.Document:
    try:
        return gemmi.cif.read_string(text)
    except (RuntimeError, ValueError) as why:
        if "duplicate block name" not in str(why):
            raise
        document = gemmi.cif.Document()
        document.parse_string(text if isinstance(text, str) else text.decode("utf-8", "replace"))
        return document


def _read_blockwise(
    text: bytes | str, key: str, options: ReadOptions, labels: Mapping[str, float] | None, why: str
) -> Iterator[Crystal | Fault]:
    """Read a text that gemmi rejects block by block, so that a broken block affects no other."""
    whole = text.encode() if isinstance(text, str) else text
    starts = [match.start() for match in HEADING.finditer(whole)]
    parts = [whole[a:b] for a, b in pairwise([*starts, len(whole)])]
    parts = [part for part in parts if SITES.search(part)]
    if len(parts) < 2:
        yield from _read_with_pymatgen(text, key, options, labels, why)
        return
    headings = [part.split(maxsplit=1)[0][len(b"data_") :].decode("utf-8", "replace") for part in parts]
    for name, part in zip(_unique_names(headings), parts, strict=True):
        try:
            yield from crystals(part, f"{key}#{name}", options, labels)
        except RefusedError as refused:
            yield Fault(f"block {name}", refused.code, refused.text, f"{key}#{name}")


def _block(
    block: gemmi.cif.Block,
    text: bytes | str | None,
    key: str,
    options: ReadOptions,
    labels: Mapping[str, float] | None,
) -> list[Crystal]:
    """The crystal of a block; ``text`` is the original text if this is its only block, else None."""
    if labels is None:
        labels = _labels_of(block.find_value, options)
    try:
        return [_crystal(block, key, options, labels)]
    except RefusedError:
        raise
    except (AmbiguousCifError, RuntimeError, ValueError) as why:  # the last two are gemmi's
        return _read_with_pymatgen(text or block.as_string(), key, options, labels, str(why))


def _labels_of(value: Callable[[str], str | None], options: ReadOptions) -> Mapping[str, float]:
    """The labels that tags of a CIF hold."""
    tags: dict[str, float | str] = {}
    for tag in options.labels.values():
        if tag.startswith("_") and (text := value(tag)) is not None:
            as_number = _number(text)
            tags[tag] = gemmi.cif.as_string(text) if math.isnan(as_number) else as_number
    return labels_of(tags, options.labels)


def _crystal(block: gemmi.cif.Block, key: str, options: ReadOptions, labels: Mapping[str, float]) -> Crystal:
    cell = _numbers([block.find_value(tag) for tag in CELL])
    if not math.isfinite(sum(cell)):
        raise AmbiguousCifError("the cell is incomplete")
    loop = block.find_loop(FRACTIONAL[0]).get_loop()
    if loop is None:
        if block.find_loop("_atom_site_Cartn_x").get_loop() is not None:
            raise RefusedError("unparsable", "positions are Cartesian, and their axes are not defined")
        raise RefusedError("no_atoms", "the CIF lists no atoms")
    values, width = loop.values, loop.width()
    columns = {tag.lower(): values[i::width] for i, tag in enumerate(loop.tags)}
    try:
        fractional = np.array([_numbers(columns[tag]) for tag in FRACTIONAL]).T
    except KeyError as missing:
        raise AmbiguousCifError(f"{missing} is missing") from None
    if not math.isfinite(fractional.sum()):
        raise RefusedError("unparsable", "an atom has no coordinates")
    if not NONE.issuperset(columns.get("_atom_site_attached_hydrogens", ())):
        raise RefusedError("unparsable", "hydrogen atoms are listed without positions")
    lattice = lattice_of(*cell)
    numbers = _species(columns.get("_atom_site_type_symbol"), columns.get("_atom_site_label"))
    occupancy = columns.get("_atom_site_occupancy")
    operations = operations_of(block, alpha=cell[3], gamma=cell[5])
    if occupancy is not None and not ONE.issuperset(occupancy):
        fractional, numbers = _disordered(fractional, numbers, lattice, _numbers(occupancy), operations, options)
    elif operations is not None:
        fractional, site = expand(fractional, numbers, lattice, *operations)
        numbers = numbers[site]
    return Crystal(key, lattice, fractional @ lattice, numbers, labels)


def _disordered(
    fractional: Floats,
    numbers: NDArray[np.uint8],
    lattice: Floats,
    shares: list[float],
    operations: Operations | None,
    options: ReadOptions,
) -> tuple[Floats, NDArray[np.uint8]]:
    """The sites to keep in a cell whose occupancies are not all 1, as the options specify."""
    occupancy = np.array(shares)
    occupancy[np.isnan(occupancy)] = 1  # "?" and "." mean full
    partial = check_occupancy(occupancy, options)
    there = occupancy > 0
    fractional, numbers, occupancy = fractional[there], numbers[there], occupancy[there]
    if operations is not None:
        # partly occupied sites may coincide, which ``majority`` resolves
        fractional, site = expand(fractional, None if partial else numbers, lattice, *operations)
        numbers, occupancy = numbers[site], occupancy[site]
    if partial:
        keep = majority(fractional, lattice, occupancy)
        fractional, numbers = fractional[keep], numbers[keep]
    return fractional, numbers


def _number(value: str | None) -> float:
    """A number of a CIF, which may have an uncertainty: ``1.234(5)``; NaN where unknown."""
    return math.nan if value is None else gemmi.cif.as_number(gemmi.cif.as_string(value))


def _numbers(values: Sequence[str | None]) -> list[float]:
    try:
        return list(map(float, values))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return [_number(value) for value in values]


def _species(types: list[str] | None, labels: list[str] | None) -> NDArray[np.uint8]:
    """Atomic numbers, from the types of the atoms or else from their labels."""
    if types is None:
        if labels is None:
            raise RefusedError("species", "the atoms have neither types nor labels")
        return atomic_numbers([_from_label(label) for label in labels])
    if ATOMIC_NUMBER.keys() >= set(types):
        return atomic_numbers(types)
    if any(map(unknown, types)):
        labels = labels or types
        types = [_from_label(label) if unknown(t) else t for t, label in zip(types, labels, strict=True)]
    return atomic_numbers([_symbol(gemmi.cif.as_string(t)) for t in types])


@functools.lru_cache(maxsize=1024)
def _symbol(text: str) -> str:
    """The element of a type symbol. Anything else is returned unchanged, to be refused by name."""
    match = SYMBOL.match(text if len(text) < 2 or not text[:2].isalpha() else text[:2].capitalize() + text[2:])
    return match[1] if match else text


@functools.lru_cache(maxsize=4096)
def _from_label(label: str) -> str:
    """The element that a label begins with, where that is certain: ``Ca1`` is, ``CA1`` and ``Hw`` are not."""
    match = re.match(r"([A-Z][a-z]?)(?=$|[\d_+(*'-])", gemmi.cif.as_string(label))
    if match is None or match[1] not in ATOMIC_NUMBER:
        raise AmbiguousCifError(f"the element of the label {label} has to be guessed")
    return match[1]


def _read_with_pymatgen(
    text: bytes | str, key: str, options: ReadOptions, labels: Mapping[str, float] | None, why: str
) -> list[Crystal]:
    """Read with pymatgen, where gemmi is in doubt."""
    if len(text) > SLOW_LIMIT:
        raise RefusedError("unparsable", f"{why} (too long to ask pymatgen)")
    from pymatgen.io.cif import CifFile, CifParser

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about rounding and the like; real problems raise
            decoded = text if isinstance(text, str) else text.decode("utf-8", "replace")
            structures = CifParser.from_str(decoded).parse_structures(primitive=False)
            if labels is None and options.labels:  # gemmi could not even read the tags
                blocks = list(CifFile.from_str(decoded).data.values())
                if len(blocks) > 1:
                    raise ValueError("which of several blocks a label belongs to cannot be told")
                labels = _labels_of(blocks[0].data.get, options)
    except Exception as also:  # a parser of free text raises anything
        raise RefusedError("unparsable", f"gemmi: {why}; pymatgen: {also}") from None
    keys = [f"{key}#{i}" for i in range(len(structures))] if len(structures) > 1 else [key]
    pairs = zip(structures, keys, strict=True)
    return [dialects.pymatgen(structure.as_dict(), name, labels or {}, options) for structure, name in pairs]
