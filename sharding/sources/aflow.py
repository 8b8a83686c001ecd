"""The demo's crystals: the AFLOW prototypes that ship with pymatgen, and variants with exchanged elements.

``aflow:`` gives 3,000 crystals, ``aflow:500`` the first 500 of the same sequence, ``aflow:real`` only the 288 compounds
of the library. Those come first, unchanged. Then the prototypes take turns, each with its next compound, in which
elements are exchanged for similar ones and the cell is rescaled: plausible, not relaxed, and not known to exist.
There are no random numbers, so that the sequence is the same everywhere.
"""

from __future__ import annotations

import functools
import gzip
import json
import logging
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from sharding.crystal import SYMBOLS, Crystal, reduced_formula
from sharding.sources import ReadOptions, Record, Source, SourceError, numbered, payload

if TYPE_CHECKING:  # at run time pymatgen is imported where it is needed: other sources do without it
    from pymatgen.core.composition import Composition
    from pymatgen.core.periodic_table import Element

CITE: Final = (
    "M. J. Mehl et al., Comput. Mater. Sci. 136, S1 (2017), doi:10.1016/j.commatsci.2017.01.017; "
    "D. Hicks et al., Comput. Mater. Sci. 161, S1 (2019), doi:10.1016/j.commatsci.2018.10.043; as shipped with pymatgen"
)
HEAVIEST: Final = 83  # Bi; what lies beyond is radioactive
UNWANTED: Final = {"Tc", "Pm", "He", "Ne", "Ar", "Kr", "Xe"}  # radioactive, or without chemistry
IONIC_RATIO: Final = 1.35  # of two radii; admits Na/K and O/S, not F/Cl
ATOMIC_RATIO: Final = 1.25  # admits Ga/In and Se/Te, not C/Si
LARGEST_GUESSED: Final = 24  # atoms per formula unit; beyond (Cr23C6), guessing charges takes seconds
REACH: Final = 6.0  # Å; the closest contacts of two elements are sought within it
CLOSEST: Final = 0.7  # Å, the shortest distance allowed after a substitution
CLOSEST_CONTACT: Final = 0.75  # a contact is a distance divided by the sum of the two radii
CLOSEST_CHANGE: Final = 0.8  # least ratio of a contact after a substitution to the contact before


@dataclass(frozen=True, slots=True)
class Prototype:
    """One compound of the library and how its elements may be exchanged."""

    real: Crystal
    elements: tuple[int, ...]  # atomic numbers, from the least to the most electronegative element
    site: NDArray[np.intp]  # (n_atoms,) | which of the elements sits there
    radii: NDArray[np.float64]  # (n_elements,) | Å, NaN where not tabled
    replacements: tuple[dict[int, float], ...]  # per element: what may take its place, itself included → radius, Å
    closest: NDArray[np.float64]  # (n_elements, n_elements) | shortest distances, images included, Å; inf beyond REACH


def open_source(spec: str, options: ReadOptions) -> Source:
    """Open ``aflow:``, ``aflow:real`` or ``aflow:<number of crystals>``.

    Raises:
        SourceError: if the specification is none of these, or labels are asked for.
    """
    wanted = {"aflow:": "3000", "aflow:real": "288"}.get(spec, spec.removeprefix("aflow:"))
    if not (wanted.isascii() and wanted.isdigit()):
        raise SourceError(f"{spec}: write aflow:, aflow:real, or a number of crystals as in aflow:500")
    if options.labels:
        raise SourceError(f"{spec}: the prototypes carry no labels, so {', '.join(options.labels)} cannot be read")
    count = int(wanted) if options.limit is None else min(int(wanted), options.limit)
    return Source(
        name=spec,
        records=functools.partial(_records, count),
        parse=payload,
        licence="MIT (pymatgen)",
        cite=CITE,
    )


def _records(count: int) -> Iterator[Record]:
    return numbered(crystals(count))


def crystals(count: int) -> Iterator[Crystal]:
    """The first ``count`` crystals; fewer, with a warning, where substitution cannot make as many."""
    turns = deque(_compounds(prototype, first) for first, prototype in enumerate(_library()))
    seen: set[tuple[str | None, str]] = set()  # holds all real compounds before the first substitution is looked up
    while turns and len(seen) < count:
        compounds = turns.popleft()
        for crystal in compounds:
            identity = (crystal.group, reduced_formula(crystal.atomic_numbers))
            if identity not in seen:
                seen.add(identity)
                turns.append(compounds)
                yield crystal
                break
    if len(seen) < count:
        logging.getLogger(__name__).warning("aflow: has only %d crystals, not the %d requested", len(seen), count)


def _library() -> Iterator[Prototype]:
    """The prototypes, in the order of pymatgen's file."""
    from pymatgen.core.periodic_table import Element
    from pymatgen.core.structure import Structure

    # read directly, because importing pymatgen.analysis.prototypes costs three seconds
    path = files("pymatgen.analysis") / "prototypes" / "aflow_prototypes.json.gz"
    for entry in json.loads(gzip.decompress(path.read_bytes())):
        structure, label = Structure.from_dict(entry["snl"]), entry["tags"]["aflow"]
        symbols = sorted(Element(symbol) for symbol in structure.symbol_set)  # pymatgen sorts by electronegativity
        elements = tuple(element.Z for element in symbols)
        numbers = np.array(structure.atomic_numbers, np.uint8)
        site = np.array([elements.index(z) for z in numbers])
        centre, neighbour, _, distance = structure.get_neighbor_list(REACH)
        closest = np.full((len(elements), len(elements)), np.inf)
        np.minimum.at(closest, (site[centre], site[neighbour]), distance)
        key = f"aflow/{label}/{_formula(elements, site)}"
        real = Crystal(key, structure.lattice.matrix, structure.cart_coords, numbers, group=label)
        radii, replacements = _replacements(symbols, _charges(structure.composition))
        yield Prototype(real, elements, site, np.array(radii), tuple(replacements), closest)


def _charges(composition: Composition) -> dict[str, int]:
    """The likeliest charges, one integer per element; empty where there are none, or none with tabled radii."""
    from pymatgen.core.periodic_table import Element

    reduced = composition.reduced_composition
    for guess in reduced.oxi_state_guesses() if reduced.num_atoms <= LARGEST_GUESSED else ():
        if all(charge in Element(symbol).ionic_radii for symbol, charge in guess.items()):
            return {symbol: int(charge) for symbol, charge in guess.items()}
    return {}


def _replacements(elements: list[Element], charges: dict[str, int]) -> tuple[list[float], list[dict[int, float]]]:
    """The radius of each element of a compound, and the elements of similar radius that may take its place; in Å.

    With charges, an ion gives way to ions that commonly have the same charge; radii are Shannon's crystal radii.
    Without, an atom gives way to others of its group, a transition metal also to those of the two groups on either
    side; radii are metallic where tabled, else Slater's atomic radii.
    """
    from pymatgen.core.periodic_table import Element

    def radius(element: Element, charge: int | None) -> float:
        neutral = element.data.get("Metallic radius") or element.atomic_radius
        return float((element.ionic_radii.get(charge) if charge else neutral) or math.nan)

    def alike(old: Element, new: Element, charge: int | None) -> bool:
        if charge:  # a non-metal that is a cation, such as Se in selenates, may replace its own group only
            metallic = new.is_metal or new.is_metalloid
            return charge in new.common_oxidation_states and (charge < 0 or metallic or new.group == old.group)
        return abs(old.group - new.group) <= (2 if old.block == new.block == "d" else 0)

    stable = [Element.from_Z(z) for z in range(1, HEAVIEST + 1) if SYMBOLS[z] not in UNWANTED]
    radii, replacements = [], []
    for old in elements:
        charge = charges.get(old.symbol)
        size, ratio = radius(old, charge), IONIC_RATIO if charge else ATOMIC_RATIO
        candidates = [e for e in stable if e is old or (e not in elements and alike(old, e, charge))]
        radii.append(size)
        replacements.append({e.Z: r for e in candidates if size / ratio <= (r := radius(e, charge)) <= size * ratio})
    return radii, replacements


def _compounds(prototype: Prototype, first: int) -> Iterator[Crystal]:
    """The real compound, then all sensible substitutions in it, starting at a different one for each ``first``.

    They are visited in steps of about the golden section of their number, so that the first few already differ widely.
    """
    yield prototype.real
    if not (prototype.closest >= CLOSEST_CONTACT * np.add.outer(prototype.radii, prototype.radii)).all():
        return  # a suspect entry, such as NiSbS with atoms 1.03 Å apart, or an element without a tabled radius
    choices = [tuple(replacements) for replacements in prototype.replacements]
    shape = tuple(map(len, choices))
    combinations = math.prod(shape)
    step = next(n for n in range(int(0.618 * combinations) + 1, 2 * combinations + 2) if math.gcd(n, combinations) == 1)
    for turn in range(first, first + combinations):
        picked = np.unravel_index(turn * step % combinations, shape)
        elements = tuple(choice[i] for choice, i in zip(choices, picked, strict=True))
        if elements != prototype.elements and len(set(elements)) == len(elements):
            yield from _substituted(prototype, elements)


def _substituted(prototype: Prototype, elements: tuple[int, ...]) -> Iterator[Crystal]:
    """Yield a prototype with other elements, or nothing if atoms would come too close.

    Each cell vector grows as Σ r ∛n over the elements, of radius r and with n atoms each (reference lattice scaling,
    I.-H. Chu et al., Comput. Mater. Sci. 146, 184 (2018); pymatgen's ``RLSVolumePredictor``).
    """
    radii = np.array([replacements[z] for replacements, z in zip(prototype.replacements, elements, strict=True)])
    weight = np.cbrt(np.bincount(prototype.site))
    scale = float(radii @ weight / (prototype.radii @ weight))
    contact = prototype.closest * scale / np.add.outer(radii, radii)
    least = CLOSEST_CHANGE * prototype.closest / np.add.outer(prototype.radii, prototype.radii)
    if prototype.closest.min() * scale >= CLOSEST and (contact >= np.maximum(least, CLOSEST_CONTACT)).all():
        real, key = prototype.real, f"{prototype.real.key}>{_formula(elements, prototype.site)}"
        numbers = np.array(elements, np.uint8)[prototype.site]
        yield Crystal(key, real.lattice * scale, real.positions * scale, numbers, group=real.group)


def _formula(elements: tuple[int, ...], site: NDArray[np.intp]) -> str:
    """Reduced formula in the order given, so that NaCl>KBr shows which element replaced which."""
    counts = np.bincount(site)
    parts = zip(elements, counts // np.gcd.reduce(counts), strict=True)
    return "".join(SYMBOLS[z] + (str(n) if n > 1 else "") for z, n in parts)
