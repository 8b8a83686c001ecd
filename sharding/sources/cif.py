"""CIF files, read by gemmi; pymatgen's parser is asked where gemmi's reading leaves doubt.

A CIF lists the atoms of an asymmetric unit and the symmetry operations that fill the cell with them. Explicit
operations are believed before names of space groups. Atoms on special positions are mapped to themselves by some of
the operations: they are put exactly there, and counted once.

The fast reading gives up, and ``pymatgen.io.cif.CifParser`` decides, where the text breaks the syntax, an element can
only be guessed from a label, the space group is named but unknown to gemmi, or the symmetry is magnetic. It is some
fifty times slower, so it is asked for texts up to ``SLOW_LIMIT`` only. Where it fails too, gemmi's reason stands.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

import gemmi
import numpy as np
from numpy.typing import NDArray

from sharding.crystal import ATOMIC_NUMBER, Crystal, RefusedError, atomic_numbers
from sharding.sources import ReadOptions, dialects
from sharding.sources.pieces import Piece, labels_of
from sharding.sources.sites import Floats, check_occupancy, expand, lattice_of, majority
from sharding.sources.streams import Stream

SLOW_LIMIT: Final = 2**20  # bytes
OPERATIONS: Final = ("_symmetry_equiv_pos_as_xyz", "_space_group_symop_operation_xyz")
GROUPS: Final = (
    "_space_group_name_Hall",
    "_symmetry_space_group_name_Hall",
    "_space_group_name_H-M_alt",
    "_symmetry_space_group_name_H-M",
    "_space_group_IT_number",
    "_symmetry_Int_Tables_number",
)
MAGNETIC: Final = ("_space_group_symop_magn_operation.xyz", "_space_group_symop_magn_operation_xyz")
CELL: Final = tuple(f"_cell_length_{x}" for x in "abc") + tuple(f"_cell_angle_{x}" for x in ("alpha", "beta", "gamma"))
FRACTIONAL: Final = tuple(f"_atom_site_fract_{x}" for x in "xyz")
ONE: Final = frozenset(("1", "1.0", "1.00", "1.000", "1.0000", "1.00000000", ".", "?"))  # full occupancy
# an element with an optional charge or count: "Fe", "Fe3+", "O2-", "C1"
SYMBOL: Final = re.compile(r"([A-Z][a-z]?)(?:[\d+-][\w+-]*)?$")
UNKNOWN: Final = (None, "", "?", ".")


Operations = tuple[Floats, Floats]  # rotations (m, 3, 3) and translations (m, 3) of fractional columns


class _DoubtError(Exception):
    """The fast reading is not sure."""


def split(stream: Stream, stem: str, options: ReadOptions) -> Iterator[Piece]:
    """One piece: the file."""
    yield Piece(stem, "", stream.whole(options.max_record_bytes), stem)


def parse(piece: Piece, options: ReadOptions) -> Iterator[Crystal]:
    """The crystals of a CIF file; a label is a tag in it."""
    return crystals(piece.text, piece.key, options)


def crystals(
    text: bytes | str, key: str, options: ReadOptions, labels: Mapping[str, float] | None = None
) -> Iterator[Crystal]:
    """The crystals of a text in CIF: one for each data block that has a cell or atoms.

    Args:
        text: the CIF.
        key: of the crystal; with several, the names of their blocks are added.
        options: the labels to read, and what to do about disorder.
        labels: those of a table that has the CIF in a column; None to read them from the CIF.

    Raises:
        RefusedError: ``unparsable``, ``no_atoms``, ``species``, ``partial_occupancy``, ``singular_cell``.
    """
    try:
        # the other blocks tell of authors, or of the measurement
        document = gemmi.cif.read_string(text)
        blocks = [b for b in document if b.find_value(CELL[0]) or b.find_loop(FRACTIONAL[0])]
        found = [_crystal(block, key, options, labels) for block in blocks]
    except RefusedError:
        raise
    except (_DoubtError, RuntimeError, ValueError) as why:  # the last two are gemmi's
        found = _slowly(text, key, options, labels, str(why))
        blocks = []
    if not found:
        raise RefusedError("unparsable", "no data block has a cell and atoms")
    if len(found) == 1:
        yield found[0]
        return
    for i, crystal in enumerate(found):
        yield replace(crystal, key=f"{key}#{blocks[i].name if blocks else i}")


def _crystal(block: gemmi.cif.Block, key: str, options: ReadOptions, labels: Mapping[str, float] | None) -> Crystal:
    cell = [_number(block.find_value(tag)) for tag in CELL]
    if not math.isfinite(sum(cell)):
        raise _DoubtError("the cell is incomplete")
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
        raise _DoubtError(f"{missing} is missing") from None
    if not math.isfinite(fractional.sum()):
        raise RefusedError("unparsable", "an atom has no coordinates")
    lattice = lattice_of(*cell)
    numbers = _species(columns.get("_atom_site_type_symbol"), columns.get("_atom_site_label"))
    occupancy = columns.get("_atom_site_occupancy")
    operations = _operations(block, cell)
    if occupancy is not None and not ONE.issuperset(occupancy):
        fractional, numbers = _disordered(fractional, numbers, lattice, _numbers(occupancy), operations, options)
    elif operations is not None:
        fractional, site = expand(fractional, numbers, lattice, *operations)
        numbers = numbers[site]
    if labels is None:
        tags = {tag: _number(block.find_value(tag)) for tag in options.labels.values() if tag.startswith("_")}
        labels = labels_of(tags, options.labels)
    return Crystal(key, lattice, fractional @ lattice, numbers, labels)


def _disordered(
    fractional: Floats,
    numbers: NDArray[np.uint8],
    lattice: Floats,
    shares: list[float],
    operations: Operations | None,
    options: ReadOptions,
) -> tuple[Floats, NDArray[np.uint8]]:
    """The sites of a cell in which occupancies are not all 1, as the options want it."""
    occupancy = np.array(shares)
    occupancy[np.isnan(occupancy)] = 1  # "?" and "." mean full
    partial = check_occupancy(occupancy, options)
    there = occupancy > 0
    fractional, numbers, occupancy = fractional[there], numbers[there], occupancy[there]
    if operations is not None:
        # sites may coincide where they are partly occupied, which ``majority`` looks into
        fractional, site = expand(fractional, None if partial else numbers, lattice, *operations)
        numbers, occupancy = numbers[site], occupancy[site]
    if partial:
        keep = majority(fractional, lattice, occupancy)
        fractional, numbers = fractional[keep], numbers[keep]
    return fractional, numbers


def _number(value: str | None) -> float:
    """A number of a CIF, which may have an uncertainty: ``1.234(5)``; NaN where unknown."""
    return math.nan if value is None else gemmi.cif.as_number(gemmi.cif.as_string(value))


def _numbers(values: list[str]) -> list[float]:
    try:
        return list(map(float, values))
    except ValueError:
        return [_number(value) for value in values]


def _species(types: list[str] | None, labels: list[str] | None) -> NDArray[np.uint8]:
    """Atomic numbers, from the types of the atoms or else from their labels."""
    if types is None:
        if labels is None:
            raise RefusedError("species", "the atoms have neither types nor labels")
        return atomic_numbers([_from_label(label) for label in labels])
    if ATOMIC_NUMBER.keys() >= set(types):
        return atomic_numbers(types)
    if any(t in UNKNOWN for t in types):
        labels = labels or types
        types = [_from_label(label) if t in UNKNOWN else t for t, label in zip(types, labels, strict=True)]
    return atomic_numbers([_symbol(gemmi.cif.as_string(t)) for t in types])


@functools.lru_cache(maxsize=1024)
def _symbol(text: str) -> str:
    """The element of a type symbol. What is none is returned as it is, to be refused by name."""
    match = SYMBOL.match(text if len(text) < 2 or not text[:2].isalpha() else text[:2].capitalize() + text[2:])
    return match[1] if match else text


@functools.lru_cache(maxsize=4096)
def _from_label(label: str) -> str:
    """The element that a label begins with, where that is certain: ``Ca1`` is, ``CA1`` and ``Hw`` are not."""
    match = re.match(r"([A-Z][a-z]?)(?=$|[\d_+(*'-])", gemmi.cif.as_string(label))
    if match is None or match[1] not in ATOMIC_NUMBER:
        raise _DoubtError(f"the element of the label {label} has to be guessed")
    return match[1]


def _operations(block: gemmi.cif.Block, cell: list[float]) -> Operations | None:
    """The symmetry operations; None where there is only the identity."""
    for tag in OPERATIONS:
        listed = block.find_values(tag)
        if len(listed):
            return _matrices(tuple(listed))
    if any(block.find_values(tag) for tag in MAGNETIC):
        raise _DoubtError("the symmetry is magnetic")
    for tag in GROUPS:
        name = block.find_value(tag)
        if name not in UNKNOWN:
            return _named(tag, gemmi.cif.as_string(name), cell[3], cell[5])
    return None


@functools.lru_cache(maxsize=512)
def _named(tag: str, name: str, alpha: float, gamma: float) -> Operations | None:
    """The operations of a space group by its Hall or Hermann-Mauguin symbol, or its number."""
    if "Hall" in tag:
        return _matrices(tuple(op.triplet() for op in gemmi.symops_from_hall(name)))
    if name.isdecimal():
        group = gemmi.find_spacegroup_by_number(int(name))
        name = group.hm if group else name
    group = gemmi.find_spacegroup_by_name(name, alpha, gamma)
    if group is None:
        raise _DoubtError(f"the space group {name!r} is not known")
    if group.ext in ("1", "2") and ":" not in name:
        raise _DoubtError(f"the space group {name!r} has two origins in use")
    return _matrices(tuple(op.triplet() for op in group.operations()))


@functools.lru_cache(maxsize=512)
def _matrices(triplets: tuple[str, ...]) -> Operations | None:
    operations = [gemmi.Op(gemmi.cif.as_string(triplet)) for triplet in triplets]
    if len(operations) == 1 and operations[0] == gemmi.Op():
        return None
    rotations = np.array([op.rot for op in operations], np.float64) / gemmi.Op.DEN
    return rotations, np.array([op.tran for op in operations], np.float64) / gemmi.Op.DEN


def _slowly(
    text: bytes | str, key: str, options: ReadOptions, labels: Mapping[str, float] | None, why: str
) -> list[Crystal]:
    """What pymatgen reads, where gemmi is in doubt."""
    if len(text) > SLOW_LIMIT:
        raise RefusedError("unparsable", f"{why} (too long to ask pymatgen)")
    from pymatgen.io.cif import CifParser

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about rounding and the like; what matters raises
            decoded = text if isinstance(text, str) else text.decode("utf-8", "replace")
            structures = CifParser.from_str(decoded).parse_structures(primitive=False)
    except Exception as also:  # a parser of free text raises anything
        raise RefusedError("unparsable", f"gemmi: {why}; pymatgen: {also}") from None
    return [dialects.pymatgen(structure.as_dict(), key, labels or {}, options) for structure in structures]
