"""Database files (ASE's SQLite and LMDB, Parquet tables), and the client of the Materials Project."""

from __future__ import annotations

import re
import sqlite3
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import ase.db
import fsspec
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ase import Atoms
from pymatgen.core import Structure
from pymatgen.io.ase import AseAtomsAdaptor
from test_sources_support import assert_all_same, assert_same, read, sort, structures_of

from sharding.crystal import Crystal
from sharding.sources import ReadOptions, SourceError, open_source, parse_records


@pytest.fixture(scope="module")
def structures(aflow: list[Crystal]) -> list[Structure]:
    return structures_of(aflow)


def atoms_of(structure: Structure, energy: float) -> Atoms:
    from ase.calculators.singlepoint import SinglePointCalculator

    atoms = Atoms(AseAtomsAdaptor.get_atoms(structure))
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((len(atoms), 3)))
    return atoms


def write_ase(path: Path, structures: list[Structure]) -> None:
    with ase.db.connect(path) as database:
        for i, s in enumerate(structures):
            ids = {"material_id": f"m-{i}"} if i else {}
            database.write(atoms_of(s, -1.5 * i), gap=i / 4, data={"x": [1, 2]}, **ids)


@pytest.mark.parametrize("ending", [".db", ".json"])
def test_ase(ending: str, structures: list[Structure], tmp_path: Path) -> None:
    path = tmp_path / f"some{ending}"
    write_ase(path, structures)
    crystals, refusals = read(path, labels={"e": "energy", "g": "gap", "no": "nothing"})
    assert refusals == []
    assert_all_same(crystals, structures)
    assert [c.key for c in crystals] == ["some#1", *(f"m-{i}" for i in range(1, 10))]
    assert crystals[4].labels == {"e": -6.0, "g": 1.0}
    assert len(read(path, limit=4)[0]) == 4


def test_ase_rows_that_are_no_crystals(structures: list[Structure], tmp_path: Path) -> None:
    path = tmp_path / "some.db"
    with ase.db.connect(path) as database:
        database.write(Atoms("H2O", positions=np.eye(3)))
        database.write(atoms_of(structures[0], 0.0))
        database.write(Atoms("X", cell=[3, 3, 3], pbc=True))
        slab = atoms_of(structures[1], 0.0)
        slab.pbc = (True, True, False)
        database.write(slab)
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE systems SET positions = x'00' WHERE id = 2")
    crystals, refusals = read(path)
    assert_all_same(crystals, [structures[1]])
    assert [(r.position, r.code) for r in refusals] == [
        ("row 1", "not_periodic"),
        ("row 2", "unparsable"),
        ("row 3", "species"),
    ]


def test_ase_limits(structures: list[Structure], tmp_path: Path) -> None:
    write_ase(tmp_path / "some.db", structures)
    crystals, refusals = read(tmp_path / "some.db", max_record_bytes=600)
    assert {r.code for r in refusals} == {"too_large"}
    assert len(crystals) + len(refusals) == 10


def test_ase_damage(structures: list[Structure], tmp_path: Path) -> None:
    path = tmp_path / "some.db"
    write_ase(path, structures * 10)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match="is truncated"):  # SQLite itself would make up what is missing
        open_source(str(path))
    middle = len(whole) // 2 // 4096 * 4096
    path.write_bytes(whole[:middle] + b"\xff" * 4096 * 9 + whole[middle + 4096 * 9 :])
    crystals, refusals = read(path)
    assert len(crystals) >= 10
    assert [r.code for r in refusals] == ["truncated"]


def test_no_ase_database(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(SourceError, match="is truncated, or not such a database"):
        open_source(str(tmp_path / "a.db"))
    (tmp_path / "a.db").write_bytes(b"short")
    with pytest.raises(SourceError, match=r"not an SQLite database|no table of systems"):
        open_source(str(tmp_path / "a.db"))
    with sqlite3.connect(tmp_path / "b.db") as raw:
        raw.execute("CREATE TABLE x (y)")
    with pytest.raises(SourceError, match="no table of systems"):
        open_source(str(tmp_path / "b.db"))
    with pytest.raises(SourceError, match="copy it first"):
        open_source("s3://bucket/a.db")


def write_lmdb(path: Path, structures: list[Structure]) -> None:
    """As ase-db-backends and fairchem write it: values are zlib over JSON; arrays as lists, or as ASE encodes them."""
    lmdb = pytest.importorskip("lmdb")
    from ase.io.jsonio import encode

    environment = lmdb.open(str(path), subdir=False, map_size=2**24)
    with environment.begin(write=True) as transaction:
        for i, s in enumerate(structures, start=1):
            atoms = atoms_of(s, -1.5 * i)
            row = {
                "numbers": atoms.numbers,
                "positions": atoms.positions,
                "cell": np.asarray(atoms.cell),
                "pbc": atoms.pbc,
                "energy": -1.5 * i,
                "key_value_pairs": {"gap": i / 4},
                "data": {},
            }
            text = encode(row).encode() if i % 2 else orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)
            transaction.put(str(i).encode(), zlib.compress(text))
        transaction.put(b"nextid", zlib.compress(b"11"))
    environment.close()


def test_aselmdb(structures: list[Structure], tmp_path: Path) -> None:
    path = tmp_path / "data0.aselmdb"
    write_lmdb(path, structures)
    crystals, refusals = read(path, labels={"e": "energy", "g": "gap"})
    assert refusals == []
    order = sorted(range(1, 11), key=str)
    assert [c.key for c in crystals] == [f"data0#{i}" for i in order]
    assert_all_same(crystals, [structures[i - 1] for i in order])
    assert crystals[0].labels == {"e": -1.5, "g": 0.25}


def test_aselmdb_damage(structures: list[Structure], tmp_path: Path) -> None:
    path = tmp_path / "data0.aselmdb"
    write_lmdb(path, structures)
    lmdb = pytest.importorskip("lmdb")
    environment = lmdb.open(str(path), subdir=False, map_size=2**24)
    with environment.begin(write=True) as transaction:
        transaction.put(b"3", zlib.compress(b"[1]"))
        transaction.put(b"4", zlib.compress(b"{}" * 9)[:-3])
        transaction.put(b"5", zlib.compress(b'{"a": "' + b"0" * 2**21))
        transaction.put(b"6", b"not compressed")
    environment.close()
    crystals, refusals = read(path, max_record_bytes=2**20)
    assert len(crystals) == 6
    assert [(r.key, r.code) for r in refusals] == [
        ("data0#3", "unparsable"),
        ("data0#4", "unparsable"),
        ("data0#5", "too_large"),
        ("data0#6", "unparsable"),
    ]
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(SourceError, match="is truncated"):
        open_source(str(path))
    path.write_bytes(b"x" * 9000)
    with pytest.raises(SourceError, match="not an LMDB database"):
        open_source(str(path))


def test_aselmdb_without_lmdb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    (tmp_path / "a.aselmdb").touch()
    with pytest.raises(SourceError, match="pip install lmdb"):
        open_source(str(tmp_path / "a.aselmdb"))


def table_of(structures: list[Structure]) -> dict[str, list[Any]]:
    return {
        "id": [f"x-{i}" for i in range(len(structures))],
        "lattice_vectors": [s.lattice.matrix.tolist() for s in structures],
        "cartesian_site_positions": [s.cart_coords.tolist() for s in structures],
        "species_at_sites": [[site.specie.symbol for site in s] for s in structures],
        "y": [None, *(i / 4 for i in range(1, len(structures)))],
    }


FIXED = pa.list_(pa.list_(pa.float32(), 3), 3)


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("species", ["Fe"], "species holds list<"),
        ("lattice_vectors", "[[1, 0, 0]]", "lattice_vectors holds string, but must hold lists of three vectors"),
        ("id", 1.5, "id holds double, but must hold text or whole numbers"),
    ],
)
def test_columns_of_other_types_are_named(
    structures: list[Structure], tmp_path: Path, column: str, values: Any, said: str
) -> None:
    table = table_of(structures)
    pq.write_table(pa.table(table | {column: [values] * len(structures)}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=re.escape(f"column {said}")):
        open_source(str(tmp_path / "a.parquet"))


def test_parquet(structures: list[Structure], tmp_path: Path) -> None:
    table = pa.table(table_of(structures))
    schema = table.schema.set(1, pa.field("lattice_vectors", FIXED)).set(
        4, pa.field("y", pa.float32(), metadata={"unit": "eV"})
    )
    table = table.cast(schema.with_metadata({"licence": "CC0", "cite": "me"}))
    pq.write_table(table, tmp_path / "some.parquet", row_group_size=4)
    source = open_source(str(tmp_path / "some.parquet"), ReadOptions(labels={"gap": "y"}))
    assert (source.licence, source.cite, source.units) == ("CC0", "me", {"gap": "eV"})
    crystals, refusals = sort(parse_records(source, source.records()))
    assert not refusals
    assert_all_same(crystals, structures)
    assert crystals[0].labels == {}
    assert crystals[4].labels == {"gap": 1.0}
    assert len(read(tmp_path / "some.parquet", limit=6)[0]) == 6
    fsspec.filesystem("memory").pipe("/some.parquet", (tmp_path / "some.parquet").read_bytes())
    assert len(read("memory://some.parquet")[0]) == 10
    with pytest.raises(SourceError, match="no column nope"):
        open_source(str(tmp_path / "some.parquet"), ReadOptions(labels={"gap": "nope"}))


def test_parquet_rows(structures: list[Structure], tmp_path: Path) -> None:
    rows = table_of(structures) | {"id": list(range(10))}
    rows["lattice_vectors"][1] = None
    rows["cartesian_site_positions"][2][0] = [1.0]
    rows["species_at_sites"][3] = ["Qq"] * len(structures[3])
    rows["id"][4] = None
    units = orjson.dumps({"y": "eV/atom"}).decode()
    pq.write_table(pa.table(rows).replace_schema_metadata({"units": units}), tmp_path / "some.parquet")
    assert open_source(str(tmp_path / "some.parquet"), ReadOptions(labels={"g": "y"})).units == {"g": "eV/atom"}
    crystals, refusals = read(tmp_path / "some.parquet")
    assert [c.key for c in crystals] == [f"some#{i}" for i in (0, 5, 6, 7, 8, 9)]
    assert [(r.position, r.code) for r in refusals] == [
        ("row 1", "unparsable"),
        ("row 2", "unparsable"),
        ("row 3", "species"),
        ("row 4", "unparsable"),
    ]


def test_parquet_species(structures: list[Structure], tmp_path: Path) -> None:
    """Names at sites are looked up among the species, and disorder is seen."""
    rows = table_of(structures[:3])
    rows["species"] = [
        [{"name": e.symbol, "chemical_symbols": [e.symbol], "concentration": [1.0]} for e in s.composition]
        for s in structures[:3]
    ]
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    assert_all_same(read(tmp_path / "a.parquet")[0], structures[:3])
    rows["species"][1][0]["concentration"] = [0.5]
    rows["species"][2][0]["name"] = "A1"
    rows["species_at_sites"][2] = [
        n.replace(structures[2].species[0].symbol, "A1") for n in rows["species_at_sites"][2]
    ]
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    crystals, refusals = read(tmp_path / "a.parquet")
    assert_all_same(crystals, [structures[0], structures[2]])
    assert [r.code for r in refusals] == ["partial_occupancy"]


def test_parquet_damage(structures: list[Structure], tmp_path: Path) -> None:
    path = tmp_path / "some.parquet"
    pq.write_table(pa.table(table_of(structures)), path, row_group_size=2, compression="zstd")
    whole = path.read_bytes()
    start = pq.ParquetFile(path).metadata.row_group(2).column(2).data_page_offset
    path.write_bytes(whole[:start] + b"\xff" * 40 + whole[start + 40 :])
    crystals, refusals = read(path)
    assert [c.key for c in crystals] == [f"x-{i}" for i in (0, 1, 2, 3, 6, 7, 8, 9)]
    assert [(r.position, r.code) for r in refusals] == [("row 4", "truncated")]
    path.write_bytes(whole[:-9])
    with pytest.raises(SourceError, match="not a readable Parquet file"):
        open_source(str(path))


class Search:
    """What is used of ``MPRester``: summaries by criteria, or by ids."""

    def __init__(self, structures: list[Structure]) -> None:
        self.structures = {f"mp-{i}": s for i, s in enumerate(structures)}
        self.materials = types.SimpleNamespace(summary=self)

    def __call__(self, mute_progress_bars: bool) -> Search:
        return self

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def search(self, fields: list[str], material_ids: list[str] | None = None, **criteria: Any) -> list[Any]:
        if material_ids is None:
            assert criteria in (
                {"deprecated": False, "include_gnome": False},
                {"chemsys": "Hg-S", "include_gnome": False},
            )
            return [types.SimpleNamespace(material_id=key) for key in reversed(self.structures)]
        return [
            types.SimpleNamespace(material_id=key, structure=self.structures[key], band_gap=np.float64(1.5))
            for key in reversed(material_ids)
            if key != "mp-3"
        ]


@pytest.mark.parametrize("spec", ["mp:", "mp:Hg-S"])
def test_materials_project(spec: str, structures: list[Structure], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mp_api", types.ModuleType("mp_api"))
    monkeypatch.setitem(sys.modules, "mp_api.client", types.SimpleNamespace(MPRester=Search(structures)))
    source = open_source(spec, ReadOptions(labels={"gap": "band_gap"}))
    assert source.units == {"gap": "eV"}
    crystals, refusals = sort(parse_records(source, source.records()))
    assert [c.key for c in crystals] == [f"mp-{i}" for i in range(10) if i != 3]
    assert [r.key for r in refusals] == ["mp-3"]
    assert_same(crystals[-1], structures[9])
    assert crystals[0].labels == {"gap": 1.5}
    monkeypatch.setattr(Search, "search", lambda self, **_: 1 / 0)
    with pytest.raises(SourceError, match="gives no answer"):
        list(source.records())


def test_materials_project_without_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mp_api", None)
    with pytest.raises(SourceError, match="pip install mp-api"):
        open_source("mp:")
