"""Cut files, flipped bits, bombs and bad rows: a loss is small, bounded in memory, and always written down."""

from __future__ import annotations

import functools
import gzip
import io
import json
import os
import random
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Structure
from pymatgen.io.cif import CifWriter
from pymatgen.io.vasp import Poscar
from test_sources_formats import COMPRESS, extxyz
from test_sources_support import read, sort, structures_of

from sharding.crystal import Crystal
from sharding.sources import SourceError, open_source, parse_records


@pytest.fixture(scope="module")
def structures(aflow: list[Crystal]) -> list[Structure]:
    return structures_of(aflow) * 4


@pytest.fixture(scope="module")
def texts(structures: list[Structure]) -> dict[str, bytes]:
    cifs = [str(CifWriter(s)) for s in structures]
    dicts = [json.dumps({"material_id": f"mp-{i}", "structure": s.as_dict()}) for i, s in enumerate(structures)]
    return {
        ".csv": pd.DataFrame({"material_id": [f"mp-{i}" for i in range(len(cifs))], "cif": cifs}).to_csv().encode(),
        ".json": f"[{', '.join(dicts)}]".encode(),
        ".jsonl": "\n".join([*dicts, ""]).encode(),
        ".extxyz": extxyz(structures),
        ".tar": tar({f"{i}.cif": text.encode() for i, text in enumerate(cifs)}),
        ".zip": zipped({f"{i}.cif": text.encode() for i, text in enumerate(cifs)}),
    }


def tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, text in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return file.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return file.getvalue()


def same(a: Crystal, b: Crystal) -> bool:
    return (
        a.key == b.key
        and np.array_equal(a.positions, b.positions)
        and np.array_equal(a.lattice, b.lattice)
        and np.array_equal(a.atomic_numbers, b.atomic_numbers)
    )


ENDINGS = (".csv", ".json", ".jsonl", ".extxyz", ".tar", ".zip")
MARKS = {  # of the beginning of a crystal
    ".csv": b",mp-",
    ".json": b'"material_id"',
    ".jsonl": b'"material_id"',
    ".extxyz": b"Lattice=",
    ".tar": b".cif\0",
    ".zip": b"PK\3\4",
}


@pytest.mark.parametrize("compression", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_truncated(ending: str, compression: str, texts: dict[str, bytes], tmp_path: Path) -> None:
    """What is before the cut is read, unchanged, and the cut is noted."""
    if ending == ".zip" and compression:
        pytest.skip("a zip is compressed inside")
    path = tmp_path / f"some{ending}{compression}"
    whole = COMPRESS[compression](texts[ending]) if compression else texts[ending]
    path.write_bytes(whole)
    expected, refusals = read(path)
    assert len(expected) == 40
    assert not refusals
    rng = random.Random(ending + compression)
    for cut in [len(whole) // 2, len(whole) - 1, *(rng.randrange(100, len(whole)) for _ in range(4))]:
        if ending in (".jsonl", ".extxyz", ".csv") and not compression and whole[cut - 1 : cut + 1].count(b"\n"):
            continue  # cut between two lines: nothing can tell
        path.write_bytes(whole[:cut])
        try:
            crystals, refusals = read(path)
        except SourceError as why:
            assert "the first line is no CSV header" in str(why)  # a compression of large blocks
            continue
        assert all(same(a, b) for a, b in zip(crystals, expected, strict=False))
        assert refusals[-1].code == "truncated", (cut, refusals)
        assert all(r.code in ("truncated", "unparsable") for r in refusals)
        if not compression:
            assert len(crystals) >= whole[:cut].count(MARKS[ending]) - 1


def test_cut_at_every_byte(structures: list[Structure], tmp_path: Path) -> None:
    """The end of a small tar.gz, byte by byte."""
    whole = gzip.compress(tar({f"{i}.vasp": Poscar(s).get_str().encode() for i, s in enumerate(structures[:3])}))
    for cut in range(len(whole)):
        (tmp_path / "a.tar.gz").write_bytes(whole[:cut])
        refusals = read(tmp_path / "a.tar.gz")[1]
        assert refusals
        assert refusals[-1].code == "truncated"


@pytest.mark.parametrize("ending", ENDINGS)
def test_flipped_bits(ending: str, texts: dict[str, bytes], tmp_path: Path) -> None:
    """Any one flipped bit costs at most the crystals it touches: the one it is in, or also the one after."""
    whole = texts[ending]
    (tmp_path / f"some{ending}").write_bytes(whole)
    expected = {c.key: c for c in read(tmp_path / f"some{ending}")[0]}
    rng = random.Random(ending)
    for _ in range(60):
        at, bit = rng.randrange(200, len(whole)), 1 << rng.randrange(8)
        damaged = bytearray(whole)
        damaged[at] ^= bit
        path = tmp_path / f"some{ending}"
        path.write_bytes(damaged)
        crystals, refusals = read(path)
        unchanged = [c for c in crystals if c.key in expected and same(c, expected[c.key])]
        context = (at, bit, bytes(whole[at - 20 : at + 20]), refusals)
        assert len(unchanged) >= 38, context
        assert len(crystals) + len(refusals) >= 40, context  # nothing vanishes


@pytest.mark.parametrize("packed", [".json.gz", ".tar.gz"])
def test_flipped_bits_in_compressed_streams(packed: str, texts: dict[str, bytes], tmp_path: Path) -> None:
    """Checksums tell: never is a crystal changed without a refusal."""
    path = tmp_path / f"some{packed}"
    whole = gzip.compress(texts["." + packed.split(".")[1]])
    path.write_bytes(whole)
    expected = {c.key: c for c in read(path)[0]}
    rng = random.Random(packed)
    for _ in range(30):
        damaged = bytearray(whole)
        damaged[rng.randrange(10, len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        crystals, refusals = read(path)
        if not (len(crystals) == 40 and all(same(c, expected[c.key]) for c in crystals)):
            assert "truncated" in [r.code for r in refusals]


LIMIT = 2**20


@functools.cache
def bomb(size: int = 100 * 2**20) -> bytes:
    """Zeros, compressed a thousandfold."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [packer.compress(b"0" * 2**20) for _ in range(size // 2**20)]
    return b"".join([*parts, packer.flush()])


@pytest.mark.parametrize("name", ["a.cif.gz", "a.json.gz", "a.jsonl.gz", "a.csv.gz", "a.xyz.gz", "a.vasp.gz"])
def test_bombs(name: str, tmp_path: Path) -> None:
    prefix = {"a.json.gz": b'["', "a.csv.gz": b'cif\n"', "a.xyz.gz": b"1\n"}.get(name, b"")
    (tmp_path / name).write_bytes(gzip.compress(prefix) + bomb())
    tracemalloc.start()
    crystals, refusals = read(tmp_path / name, max_record_bytes=LIMIT)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not crystals
    assert {r.code for r in refusals} <= {"too_large", "truncated"}
    assert refusals
    assert peak < 24 * 2**20


def test_bombs_in_archives(structures: list[Structure], tmp_path: Path) -> None:
    good = Poscar(structures[0]).get_str().encode()
    (tmp_path / "a.tar").write_bytes(tar({"a.cif.gz": bomb(), "b.cif": b"0" * 2 * LIMIT, "c.vasp": good}))
    (tmp_path / "a.zip").write_bytes(zipped({"a.cif": b"0" * 2 * LIMIT, "c.vasp": good}))
    for name in ("a.tar", "a.zip"):
        crystals, refusals = read(tmp_path / name, max_record_bytes=LIMIT)
        assert [c.key for c in crystals] == ["c"]
        assert {r.code for r in refusals} == {"too_large"}


def test_bad_rows(texts: dict[str, bytes], tmp_path: Path) -> None:
    rows = pd.read_csv(io.BytesIO(texts[".csv"]), index_col=0)
    rows["y"] = np.arange(40, dtype=float).astype(object)
    rows.loc[1, "cif"] = "no cif"
    rows.loc[2, "cif"] = None
    rows.loc[3, "y"] = "na"
    rows.loc[4, "y"] = None
    rows.loc[5, "cif"] = rows.loc[5, "cif"].replace(" Fe", " Qq").replace(" Mo", " Qq").replace(" Hg", " Qq")
    text = rows.to_csv().encode()
    (tmp_path / "a.csv").write_bytes(text + b'99,mp-99,"data_x"\n')
    crystals, refusals = read(tmp_path / "a.csv", labels={"y": "y"})
    assert {r.code for r in refusals} <= {"unparsable", "species", "truncated"}
    assert len(crystals) + len(refusals) == 41
    labels = {c.key: c.labels for c in crystals}
    assert labels["mp-0"] == {"y": 0.0}
    assert labels["mp-3"] == labels["mp-4"] == {}
    assert not {"mp-1", "mp-2", "mp-99"} & labels.keys()
    assert all(len(r.text) <= 300 and "\n" not in r.text for r in refusals)


def test_lost_quotes(texts: dict[str, bytes], tmp_path: Path) -> None:
    """The quote that closes a CIF, or opens it, is gone: that row is lost, or the next one with it."""
    for old, new in ((b'",', b"',"), (b'"\n', b"'\n"), (b'"#', b"'#")):
        parts = texts[".csv"].split(old)
        damaged = old.join(parts[:7]) + new + old.join(parts[7:])
        (tmp_path / "a.csv").write_bytes(damaged)
        crystals, refusals = read(tmp_path / "a.csv")
        assert len(crystals) >= 38
        assert refusals


def test_tables_without_crystals(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"")
    with pytest.raises(SourceError, match="no CSV header"):
        open_source(str(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_bytes(b"id,formula\n1,Fe\n")
    with pytest.raises(SourceError, match="no column cif; it has id, formula"):
        open_source(str(tmp_path / "a.csv"))
    (tmp_path / "a.zip").write_bytes(zipped({"a.csv": b"id,formula\n1,Fe\n", "README": b""}))
    assert [(r.position, r.code) for r in read(tmp_path / "a.zip")[1]] == [("a.csv", "unparsable")]
    (tmp_path / "a.zip").write_bytes(zipped({"README": b""}))
    assert [r.code for r in read(tmp_path / "a.zip")[1]] == ["unparsable"]


def test_damaged_tar_header(texts: dict[str, bytes], tmp_path: Path) -> None:
    whole = texts[".tar"]
    second = whole.index(b"1.cif")
    (tmp_path / "a.tar").write_bytes(whole[:second] + b"X" + whole[second + 1 :])
    crystals, refusals = read(tmp_path / "a.tar")
    assert len(crystals) == 39
    assert [(r.position, r.code) for r in refusals] == [("member 1", "unparsable")]


def test_two_tars_in_one(texts: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(texts[".tar"] * 2)
    assert len(read(tmp_path / "a.tar")[0]) == 80


def test_encrypted_zip(tmp_path: Path) -> None:
    whole = bytearray(zipped({"a.cif": b"data_x"}))
    whole[6] |= 1
    whole[whole.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(whole)
    assert [r.code for r in read(tmp_path / "a.zip")[1]] == ["unparsable"]


def test_special_files_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "d" / "a.cif")  # opening it would wait for ever
    os.symlink(tmp_path / "nowhere", tmp_path / "d" / "b.cif")
    os.symlink(tmp_path, tmp_path / "d" / "round")
    refusals = read(tmp_path / "d")[1]
    assert [(r.position, r.code) for r in refusals] == [(name, "unparsable") for name in ("a.cif", "b.cif", "round")]


def test_a_bug_in_a_record_costs_that_record(texts: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(texts[".jsonl"])
    source = open_source(str(tmp_path / "a.jsonl"))
    records = list(source.records())
    piece: Any = records[0].payload[3]
    records[0].payload[3] = piece._replace(text=b'{"sites": [{}], "lattice": {"matrix": "x"}}')
    crystals, refusals = sort(parse_records(source, records))
    assert len(crystals) == 39
    assert refusals[0].position == "line 4"
