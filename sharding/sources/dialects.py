"""One crystal as a dictionary, in the dialects that databases write: pymatgen, JARVIS, OPTIMADE, ASE, a CIF in JSON.

Plain dictionaries become arrays directly; pymatgen's own objects would take ten times as long.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from sharding.crystal import Crystal, RefusedError, atomic_numbers
from sharding.sources import ReadOptions
from sharding.sources.pieces import Fault, key_of, labels_of
from sharding.sources.sites import check_occupancy, lattice_of, majority

Labels = Mapping[str, float]
VACANCY: Final = "vacancy"  # OPTIMADE's name of the species of an empty site


def crystals(
    record: Mapping[str, Any], key: str, stem: str, options: ReadOptions, *, named: bool = False
) -> Iterator[Crystal | Fault]:
    """The crystal of a record of any dialect.

    Args:
        record: one entry of a database.
        key: used if the record has no id of its own.
        stem: stem of the file name; prefixed to ids that are only numbers.
        options: the labels to read, and what to do about disorder.
        named: whether ``key`` is an id, which takes precedence over those in the record.

    Raises:
        RefusedError: ``unparsable``, ``no_atoms``, ``species``, ``partial_occupancy``, ``not_periodic``.
    """
    outer = record
    for name in ("attributes", "key_value_pairs"):  # OPTIMADE and ASE put columns there
        if isinstance(record.get(name), dict):
            outer = {**record[name], **record}
    if not named:
        data = record.get("data")  # of a ``ComputedStructureEntry``
        key = key_of(outer, stem) or (key_of(data, stem) if isinstance(data, dict) else None) or key
    labels = labels_of(outer, options.labels)
    if "lattice_vectors" in outer:
        yield optimade(outer, key, labels, options)
    elif "lattice_mat" in record:
        yield jarvis(record, key, labels)
    elif isinstance(record.get("atoms"), dict) and "lattice_mat" in record["atoms"]:
        yield jarvis(record["atoms"], key, labels)
    elif "numbers" in record and "positions" in record:
        yield ase(record, key, labels)
    elif isinstance(record.get("cif"), str):
        from sharding.sources import cif

        yield from cif.crystals(record["cif"], key, options, labels)
    else:
        yield pymatgen(_structure(record), key, labels, options)


def _structure(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The pymatgen structure in a record: itself, its ``structure``, or the only one among its values."""
    if "sites" in record:
        return record
    if isinstance(record.get("structure"), dict):
        return record["structure"]
    found = {name: value for name, value in record.items() if isinstance(value, dict)}
    for name, value in list(found.items()):
        if isinstance(value.get("structure"), dict):  # an entry in a column
            found[name] = value["structure"]
    found = {name: value for name, value in found.items() if "sites" in value and "lattice" in value}
    if len(found) != 1:
        names = ", ".join(found or [str(name) for name in record][:20])
        what = "several structures" if found else "no crystal in a known dialect"
        raise RefusedError("unparsable", f"{what} among {names}")
    return next(iter(found.values()))


def pymatgen(structure: Mapping[str, Any], key: str, labels: Labels, options: ReadOptions) -> Crystal:
    """The dictionary of ``Structure.as_dict()``."""
    cell = structure.get("lattice")
    if cell is None:
        raise RefusedError("not_periodic", "there is no lattice: a molecule")
    lattice = _lattice(cell)
    sites = structure["sites"]
    if not sites:
        raise RefusedError("no_atoms", "the cell holds no atoms")
    positions = _vectors([site["xyz"] for site in sites] if "xyz" in sites[0] else [site["abc"] for site in sites])
    if "xyz" not in sites[0]:
        positions = positions @ lattice
    species = [site["species"] for site in sites]
    if all([len(s) == 1 and s[0]["occu"] == 1 for s in species]):  # noqa: C419 (a list is faster)
        return Crystal(key, lattice, positions, atomic_numbers([s[0]["element"] for s in species]), labels)
    rows = [i for i, shared in enumerate(species) for _ in shared]
    numbers = atomic_numbers([s["element"] for shared in species for s in shared])
    shares = [float(s["occu"]) for shared in species for s in shared]
    return _ordered(Crystal(key, lattice, positions[rows], numbers, labels), shares, options)


def jarvis(atoms: Mapping[str, Any], key: str, labels: Labels) -> Crystal:
    """JARVIS's ``Atoms.to_dict()``."""
    lattice = _vectors(atoms["lattice_mat"])
    positions = _vectors(atoms["coords"])
    if not atoms.get("cartesian", False):
        positions = positions @ lattice
    return Crystal(key, lattice, positions, atomic_numbers([s.strip() for s in atoms["elements"]]), labels)


def optimade(entry: Mapping[str, Any], key: str, labels: Labels, options: ReadOptions) -> Crystal:
    """The properties of an OPTIMADE structure. Names at sites refer to ``species`` where these are given."""
    for name in ("lattice_vectors", "cartesian_site_positions", "species_at_sites"):
        if entry.get(name) is None:
            raise RefusedError("unparsable", f"{name} is missing or null")
    if any(None in vector for vector in entry["lattice_vectors"]) or entry.get("nperiodic_dimensions") == 0:
        raise RefusedError("not_periodic", "a lattice vector is null: not a crystal")
    lattice = _vectors(entry["lattice_vectors"])
    positions = _vectors(entry["cartesian_site_positions"])
    names = entry["species_at_sites"]
    if not entry.get("species"):
        return Crystal(key, lattice, positions, atomic_numbers(names), labels)
    species = {s["name"]: s for s in entry["species"]}
    sites = [  # (site, element, share)
        (i, symbol, share)
        for i, name in enumerate(names)
        for symbol, share in zip(species[name]["chemical_symbols"], species[name]["concentration"], strict=True)
        if symbol != VACANCY
    ]
    rows = [i for i, _, _ in sites]
    numbers = atomic_numbers([symbol for _, symbol, _ in sites])
    return _ordered(Crystal(key, lattice, positions[rows], numbers, labels), [share for _, _, share in sites], options)


def ase(row: Mapping[str, Any], key: str, labels: Labels) -> Crystal:
    """A row of an ASE database. A slab (periodic in two directions) is read with the vacuum of its cell."""
    periodic = np.ravel(array_of(row.get("pbc", [True])))
    if not periodic.any():
        raise RefusedError("not_periodic", "no direction is periodic")
    numbers = np.asarray(array_of(row["numbers"])).ravel()
    if len(numbers) and not (numbers.min() >= 1 and numbers.max() <= 118):
        raise RefusedError("species", "an atomic number is outside 1–118")
    positions = np.asarray(array_of(row["positions"]), np.float64).reshape(-1, 3)
    lattice = np.asarray(array_of(row["cell"]), np.float64).reshape(3, 3)
    return Crystal(key, lattice, positions, numbers.astype(np.uint8), labels)


def array_of(value: Any) -> Any:
    """Decode an array as ASE's JSON writes it; other values are returned unchanged."""
    if isinstance(value, dict) and "__ndarray__" in value:
        shape, dtype, flat = value["__ndarray__"]
        if dtype not in ("int64", "int32", "float64", "float32", "bool"):
            raise RefusedError("unparsable", f"an array of {dtype}")
        return np.array(flat, dtype=dtype).reshape(shape)
    if isinstance(value, dict) and "array" in value:  # ``Cell``
        return array_of(value["array"])
    return value


def _ordered(crystal: Crystal, shares: Sequence[float], options: ReadOptions) -> Crystal:
    """Apply ``options.occupancy`` to a crystal whose sites have these occupancies."""
    occupancy = np.array(shares, np.float64)
    if check_occupancy(occupancy, options):
        keep = majority(crystal.positions @ np.linalg.inv(crystal.lattice), crystal.lattice, occupancy)
    else:
        keep = np.flatnonzero(occupancy)
    return replace(crystal, positions=crystal.positions[keep], atomic_numbers=crystal.atomic_numbers[keep])


def _lattice(cell: Mapping[str, Any]) -> Any:
    if "matrix" in cell:
        return _vectors(cell["matrix"])
    return lattice_of(*(float(cell[name]) for name in ("a", "b", "c", "alpha", "beta", "gamma")))


def _vectors(values: Any) -> Any:
    """Vectors as (n, 3); None becomes NaN, which ``crystal.check`` refuses."""
    vectors = np.array(values, dtype=np.float64)
    if vectors.ndim != 2 or vectors.shape[1] != 3:
        raise RefusedError("unparsable", f"positions or cell vectors have the shape {vectors.shape}")
    return vectors
