"""VASP's POSCAR and CONTCAR. VASP 4 writes no line of elements: the comment must then name them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Final

import numpy as np

from sharding.crystal import ATOMIC_NUMBER, Crystal, RefusedError, atomic_numbers
from sharding.sources import ReadOptions
from sharding.sources.pieces import Piece
from sharding.sources.streams import Stream

POTENTIAL: Final = re.compile(r"[_/].*")  # Fe_pv, Si/0b4a9c: what VASP adds to an element


def split(stream: Stream, stem: str, options: ReadOptions) -> Iterator[Piece]:
    """One piece: the file."""
    yield Piece(stem, "", stream.whole(options.max_record_bytes), stem)


def parse(piece: Piece, options: ReadOptions) -> Iterator[Crystal]:
    """The crystal of a POSCAR.

    Raises:
        RefusedError: ``unparsable``, ``truncated``, ``no_atoms``, ``species``.
    """
    lines = piece.text.decode("utf-8", "replace").splitlines()
    if len(lines) < 7:
        raise RefusedError("truncated", f"{len(lines)} lines are no POSCAR")
    lattice = np.array([[float(x) for x in line.split()[:3]] for line in lines[2:5]])
    scale = np.array([float(x) for x in lines[1].split() if _is_number(x)])
    if len(scale) == 1 and scale[0] < 0:  # minus the volume
        scale = np.cbrt(-scale / abs(np.linalg.det(lattice)))
    if len(scale) not in (1, 3) or not (scale > 0).all():
        raise RefusedError("unparsable", f"the scaling factor is {lines[1].strip()!r}")
    lattice = lattice * scale
    at = 5
    names = lines[0].split()
    if not lines[at].split()[0].isdecimal():
        names = lines[at].split()
        at += 1
        while len(lines) > at and not lines[at].split()[0].isdecimal():  # long lists of species go on
            names += lines[at].split()
            at += 1
    counts = [int(x) for x in lines[at].split() if x.isdecimal()]
    names = [POTENTIAL.sub("", name) for name in names]
    if len(names) != len(counts) or (at == 5 and not all(name in ATOMIC_NUMBER for name in names)):
        raise RefusedError("species", f"{len(counts)} kinds of atoms, and the elements are not named")
    at += 1
    if lines[at].lstrip()[:1] in ("S", "s"):  # selective dynamics
        at += 1
    cartesian = lines[at].lstrip()[:1] in ("C", "c", "K", "k")
    rows = lines[at + 1 : at + 1 + sum(counts)]
    if sum(counts) == 0:
        raise RefusedError("no_atoms", "the cell holds no atoms")
    if len(rows) < sum(counts):
        raise RefusedError("truncated", f"{sum(counts)} atoms are announced, {len(rows)} are there")
    positions = np.array([[float(x) for x in row.split()[:3]] for row in rows])
    if positions.shape[1] != 3:
        raise RefusedError("truncated", "an atom has fewer than three coordinates")
    numbers = np.repeat(atomic_numbers(names), counts)
    yield Crystal(piece.key, lattice, positions * scale if cartesian else positions @ lattice, numbers)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
