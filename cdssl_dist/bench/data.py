"""Inputs of the benchmarks: databases as text, from shared data beside the checkout if present, else generated."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from sharding.crystal import SYMBOLS, Crystal
from sharding.sources import open_source

SHARED: Final = Path("../shared/data")  # relative to the checkout, in which benchmarks are run


def json_records(count: int) -> Iterator[dict[str, Any]]:
    """Records with a ``structure`` in pymatgen's form: Alexandria and WBM, repeated under new ids, else ``aflow:``."""
    records: list[dict[str, Any]] = []
    for path in sorted((SHARED / "raw").glob("*.json.gz")):
        records += json.loads(gzip.decompress(path.read_bytes()))
    if not records:
        records = [{"structure": _pymatgen(crystal)} for crystal in made(min(count, 2000))]
    for i in range(count):
        yield {"id": f"bench-{i}", "structure": records[i % len(records)]["structure"]}


def write_json(path: Path, count: int) -> None:
    """Write ``json_records`` as a JSON list."""
    path.write_text(json.dumps(list(json_records(count))))


def write_csv(path: Path, count: int) -> None:
    """Write a CSV with a ``cif`` column: carbon_24, repeated under new ids, else ``aflow:`` as CIFs in P1."""
    source = SHARED / "raw" / "carbon_24-val.csv"
    if source.exists():
        with open(source, newline="") as file:
            cifs = [row["cif"] for row in csv.DictReader(file)]
    else:
        cifs = [_cif(crystal) for crystal in made(min(count, 2000))]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["material_id", "cif"])
        writer.writerows([f"bench-{i}", cifs[i % len(cifs)]] for i in range(count))


def mofs() -> dict[str, Path]:
    """The archives of MOF CIFs in the package ``core-mof``, where it is installed."""
    found = importlib.util.find_spec("CoRE_MOF")
    locations = found.submodule_search_locations if found else None
    folder = Path(next(iter(locations))) / "data" if locations else Path("nowhere")
    return {f"mof {path.name.split('.')[0]}": path for path in sorted(folder.glob("*.tar.xz"))}


def made(count: int) -> list[Crystal]:
    """Crystals of ``aflow:``."""
    return [record.payload for record in open_source(f"aflow:{count}").records()]


def _pymatgen(crystal: Crystal) -> dict[str, Any]:
    fractional = crystal.positions @ np.linalg.inv(crystal.lattice)
    sites = [
        {"species": [{"element": SYMBOLS[z], "occu": 1}], "abc": abc, "xyz": xyz}
        for z, abc, xyz in zip(crystal.atomic_numbers, fractional.tolist(), crystal.positions.tolist(), strict=True)
    ]
    lattice = {"matrix": crystal.lattice.tolist(), "pbc": [True] * 3}
    return {"@module": "pymatgen.core.structure", "@class": "Structure", "lattice": lattice, "sites": sites}


def _cif(crystal: Crystal) -> str:
    lengths = np.linalg.norm(crystal.lattice, axis=1)
    unit = crystal.lattice / lengths[:, None]
    angles = np.degrees(np.arccos(np.clip([unit[1] @ unit[2], unit[0] @ unit[2], unit[0] @ unit[1]], -1, 1)))
    cell = [f"_cell_length_{n} {v:.8f}" for n, v in zip("abc", lengths, strict=True)]
    cell += [f"_cell_angle_{n} {v:.8f}" for n, v in zip(("alpha", "beta", "gamma"), angles, strict=True)]
    columns = ["_atom_site_type_symbol", *(f"_atom_site_fract_{axis}" for axis in "xyz")]
    fractional = crystal.positions @ np.linalg.inv(crystal.lattice)
    sites = [
        f"{SYMBOLS[z]} {x:.8f} {y:.8f} {w:.8f}" for z, (x, y, w) in zip(crystal.atomic_numbers, fractional, strict=True)
    ]
    symmetry = ["_symmetry_space_group_name_H-M 'P 1'", "_symmetry_Int_Tables_number 1"]
    return "\n".join(["data_bench", *symmetry, *cell, "loop_", *columns, *sites, ""])
