"""Crystals from Python objects: pymatgen structures, ASE atoms, CIF or JSON text, our own ``Crystal``."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from io import StringIO
from typing import Any, Final

from sharding.crystal import Crystal, RefusedError
from sharding.graph import Multigraphs, build
from sharding.sources import ReadOptions, dialects
from sharding.sources.pieces import Fault

CHUNK: Final = 256  # structures in memory as graphs at a time


class RefusedStructuresError(ValueError):
    """Inputs that are not ordered crystals, by row."""

    def __init__(self, refused: Mapping[int, str], given: int, hint: str = "") -> None:
        some = "; ".join(f"row {i}: {refused[i]}" for i in sorted(refused)[:5])
        super().__init__(
            f"{len(refused)} of {given} structures cannot be used ({some})" + (f"; {hint}" if hint else "")
        )
        self.refused = dict(refused)


def graphs_of(items: Sequence[Any], cutoff: float, refused: dict[int, str]) -> Iterator[Multigraphs]:
    """Yield the multigraphs of structures, in chunks; their keys are the row numbers.

    Args:
        items: see ``read_crystal``.
        cutoff: Å.
        refused: filled with the rows that are not ordered crystals, and the reasons.
    """
    for first in range(0, len(items), CHUNK):
        crystals: list[Crystal] = []
        for i, item in enumerate(items[first : first + CHUNK], first):
            try:
                crystals.append(read_crystal(item, str(i)))
            except RefusedError as why:
                refused[i] = why.text
        graphs, no_graph = build(crystals, cutoff)
        refused |= {int(crystals[i].key): why.text for i, why in no_graph.items()}
        yield graphs


def as_list(structures: Any) -> list[Any]:
    """Return structures as a list: those of a list, an array or a series, or a single one."""
    one = isinstance(structures, (str, Mapping, Crystal)) or _is_atoms(structures) or _is_structure(structures)
    return [structures] if one else list(structures)


def read_crystal(item: Any, key: str) -> Crystal:
    """Read one crystal from any supported form, exactly as training data are read.

    Args:
        item: a pymatgen ``Structure``, ASE ``Atoms``, a ``Crystal``, text or a dictionary. Text is a CIF, or the JSON
            of a ``Structure`` or of another dialect that ``sharding`` reads; a dictionary is such JSON, parsed.
        key: of the crystal.

    Raises:
        RefusedError: if it is not a crystal, or not an ordered one.
    """
    try:
        found = list(_read(item, key))
    except RefusedError:
        raise
    except Exception as why:  # readers raise all sorts of things on bad input; what matters is the row
        raise RefusedError("unparsable", f"{type(why).__name__}: {' '.join(str(why).split())[:200]}") from None
    if len(found) != 1:
        raise RefusedError("unparsable", f"the text holds {len(found)} crystals, not one")
    if not isinstance(found[0], Crystal):
        raise RefusedError(found[0].code, found[0].text)
    return replace(found[0], key=key)


def _read(item: Any, key: str) -> Iterable[Crystal | Fault]:
    if isinstance(item, Crystal):
        return [item]
    if isinstance(item, str):
        if not item.lstrip().startswith("{"):
            return _read_cif(item, key)
        item = json.loads(item)
    elif _is_atoms(item):
        numbers, positions = item.get_atomic_numbers(), item.get_positions()
        item = {"numbers": numbers, "positions": positions, "cell": item.cell[:], "pbc": item.pbc}
    elif _is_structure(item):
        item = item.as_dict()
    if not isinstance(item, Mapping):
        raise RefusedError("unparsable", f"a {type(item).__name__} is not a structure: give CIF or JSON text")
    return dialects.crystals(item, key, "", ReadOptions())


def _read_cif(text: str, key: str) -> Iterable[Crystal | Fault]:
    """Read CIF with gemmi, pymatgen or ASE, the first that is installed."""
    if importlib.util.find_spec("gemmi"):
        from sharding.sources import cif

        return cif.crystals(text, key, ReadOptions())
    if importlib.util.find_spec("pymatgen"):
        from pymatgen.core import Structure

        return _read(Structure.from_str(text, fmt="cif"), key)
    if importlib.util.find_spec("ase"):
        from ase.io import read

        return _read(read(StringIO(text), format="cif"), key)
    raise RefusedError("no_reader", "to read CIF, install gemmi (or pymatgen, or ase); JSON text needs none of them")


def _is_atoms(item: Any) -> bool:
    return hasattr(item, "get_atomic_numbers") and hasattr(item, "get_positions")


def _is_structure(item: Any) -> bool:
    return hasattr(item, "lattice") and hasattr(item, "as_dict")
