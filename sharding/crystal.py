"""The record that every source yields: one crystal, or the reason why an input is not one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

MIN_DISTANCE: Final = 0.5  # Å between atoms
MIN_HEIGHT: Final = 0.01  # Å between opposite faces of a cell; below this, its vectors count as linearly dependent
MIN_VOLUME_PER_ATOM: Final = 1.5  # Å³
MAX_VOLUME_PER_ATOM: Final = 500.0  # Å³
MAX_LABEL: Final = 3.4e38  # just below the largest 32-bit float

# fmt: off
SYMBOLS: Final = (  # the index is the atomic number; index 0 is no element
    "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr "
    "Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu "
    "Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg "
    "Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
).split()
# fmt: on
ATOMIC_NUMBER: Final = {symbol: z for z, symbol in enumerate(SYMBOLS) if z} | {"D": 1, "T": 1}


@dataclass(frozen=True, slots=True)
class Crystal:
    """One ordered periodic structure, as read: not wrapped, not checked.

    Not called ``Structure``, because user scripts often import pymatgen's class of that name too.
    """

    key: str  # unique inside a data set, e.g. "mp-149"
    lattice: NDArray[np.float64]  # (3, 3) | rows are the cell vectors, Å
    positions: NDArray[np.float64]  # (n_atoms, 3) | Cartesian, Å
    atomic_numbers: NDArray[np.uint8]  # (n_atoms,)
    labels: Mapping[str, float] = field(default_factory=dict)  # name → value, NaN where missing
    group: str | None = None  # crystals of one group never straddle a split
    position: str = ""  # where in its source, for the quarantine

    def at(self, position: str) -> Crystal:
        """Return a copy with this position (``dataclasses.replace`` would cost a tenth of the reading time)."""
        c = self
        return Crystal(c.key, c.lattice, c.positions, c.atomic_numbers, c.labels, c.group, position)


@dataclass(frozen=True, slots=True)
class Refusal:
    """One input that did not become a graph: a line of ``quarantine.jsonl``."""

    key: str  # of the crystal; "" if it could not be read
    source: str  # as named by the user
    position: str  # where in the source: a row, a member, a line
    code: str  # one of the documented reason codes
    text: str  # for people


class RefusedError(ValueError):
    """Raised by readers and builders for one input that cannot be used."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


def atomic_numbers(symbols: list[str]) -> NDArray[np.uint8]:
    """Atomic numbers of element symbols.

    Raises:
        RefusedError: ``species`` where a symbol is no element (dummy or unknown species).
    """
    try:
        return np.array([ATOMIC_NUMBER[s] for s in symbols], dtype=np.uint8)
    except KeyError as unknown:
        raise RefusedError("species", f"{unknown.args[0]!r} is not a chemical element") from None


def check(crystals: Sequence[Crystal]) -> dict[int, RefusedError]:
    """Check that crystals are physically possible and can be stored; return index → reason for those to refuse.

    Reason codes: ``unparsable`` (shapes), ``no_atoms``, ``not_finite``, ``key``, ``species``, ``too_close``,
    ``label``, ``singular_cell``, ``volume``.
    """
    refused: dict[int, RefusedError] = {}
    not_finite = _where(lambda x: ~np.isfinite(x), [c.lattice for c in crystals])
    not_finite |= _where(lambda x: ~np.isfinite(x), [c.positions for c in crystals])
    no_elements = _where(lambda z: (z < 1) | (z >= len(SYMBOLS)), [c.atomic_numbers for c in crystals])
    for i, c in enumerate(crystals):
        n = len(c.atomic_numbers)
        if n == 0:
            refused[i] = RefusedError("no_atoms", "the cell holds no atoms")
        elif c.positions.shape != (n, 3) or c.lattice.shape != (3, 3):
            refused[i] = RefusedError("unparsable", "the numbers of species and of positions differ")
        elif i in not_finite:
            refused[i] = RefusedError("not_finite", "a cell vector or a position is NaN or infinite")
        elif not _is_text(c.key):
            refused[i] = RefusedError("key", "the key is empty or not UTF-8 text")
        elif i in no_elements:
            refused[i] = RefusedError("species", "an atomic number is outside 1–118")
        elif wrong := [name for name, value in c.labels.items() if abs(value) > MAX_LABEL]:
            text = f"label {wrong[0]!r} is {c.labels[wrong[0]]:g}, which 32-bit floats cannot hold"
            refused[i] = RefusedError("label", text)
    rest = [i for i in range(len(crystals)) if i not in refused]
    lattice = np.array([crystals[i].lattice for i in rest]).reshape(-1, 3, 3)
    volume = np.abs(np.linalg.det(lattice))
    length = np.linalg.norm(lattice, axis=2)
    faces = np.linalg.norm(np.cross(lattice, np.roll(lattice, -1, axis=1)), axis=2)
    height = volume / np.maximum(faces.max(axis=1), 1e-300)  # Å between the closest layers of the cell
    dependent = (volume <= 1e-6 * length.prod(axis=1)) | ((height < MIN_HEIGHT) & (length.min(axis=1) >= MIN_DISTANCE))
    per_atom = volume / np.array([len(crystals[i].atomic_numbers) for i in rest])
    for i, singular, shortest, v in zip(rest, dependent, length.min(axis=1), per_atom, strict=True):
        if singular:
            refused[i] = RefusedError("singular_cell", "the cell vectors are (nearly) linearly dependent")
        elif shortest < MIN_DISTANCE:
            refused[i] = RefusedError("too_close", f"an atom and its own image are {shortest:.3g} Å apart")
        elif not MIN_VOLUME_PER_ATOM <= v <= MAX_VOLUME_PER_ATOM:
            limits = f"{MIN_VOLUME_PER_ATOM}–{MAX_VOLUME_PER_ATOM} Å³"
            refused[i] = RefusedError("volume", f"{v:.3g} Å³ per atom is outside {limits}")
    return refused


def _where(wrong: Callable[[NDArray[Any]], NDArray[np.bool_]], arrays: Sequence[NDArray[Any]]) -> set[int]:
    """Return the indices of the arrays with a wrong value. Checking all at once is faster than one by one."""
    values = np.concatenate([np.empty(0), *(array.ravel() for array in arrays)])
    ends = np.cumsum([array.size for array in arrays])
    return set(np.searchsorted(ends, np.flatnonzero(wrong(values)), side="right").tolist())


def _is_text(key: str) -> bool:
    try:
        return bool(key.encode())
    except UnicodeEncodeError:
        return False


def reduced_formula(numbers: NDArray[np.uint8]) -> str:
    """Formula divided by the greatest common divisor, elements in alphabetical order (as OPTIMADE writes it)."""
    counts = Counter(numbers.astype(np.uint8, copy=False).tobytes())  # counting bytes runs in C
    divisor = math.gcd(*counts.values())
    parts = sorted((SYMBOLS[z], n // divisor) for z, n in counts.items())
    return "".join(symbol + (str(n) if n > 1 else "") for symbol, n in parts)
