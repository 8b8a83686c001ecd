"""Every format, written by an independent library and read back, alone, compressed, in folders and in archives."""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import json
import lzma
import pickle
import tarfile
import threading
import zipfile
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import ase.io
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from monty.json import MontyEncoder
from pymatgen.core import Molecule, Structure
from pymatgen.entries.computed_entries import ComputedStructureEntry
from pymatgen.io.ase import AseAtomsAdaptor
from pymatgen.io.cif import CifWriter
from pymatgen.io.vasp import Poscar
from test_sources_support import assert_all_same, assert_same, read, sort, structures_of

from sharding.crystal import Crystal
from sharding.sources import ReadOptions, SourceError, from_crystals, open_source, open_sources, parse_records

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda text: pa.Codec("zstd").compress(text).to_pybytes(),
}


@pytest.fixture(scope="module")
def structures(aflow: list[Crystal]) -> list[Structure]:
    return structures_of(aflow)


def cif(structure: Structure) -> str:
    return str(CifWriter(structure, significant_figures=12))


def poscar(structure: Structure) -> str:
    return Poscar(structure).get_str(significant_figures=12)


def extxyz(structures: list[Structure]) -> bytes:
    file = io.StringIO()
    for i, structure in enumerate(structures):
        atoms = AseAtomsAdaptor.get_atoms(structure)
        atoms.info |= {"energy": -1.5 * i, "name": "a b"}
        atoms.arrays["forces"] = np.zeros((len(atoms), 3))
        ase.io.write(file, atoms, format="extxyz")
    return file.getvalue().encode()


def entries(structures: list[Structure]) -> list[dict[str, Any]]:
    return [
        ComputedStructureEntry(s, -2.0 * i, data={"mat_id": f"agm{i}", "e_above_hull": i / 8}).as_dict()
        for i, s in enumerate(structures)
    ]


def jarvis(structures: list[Structure]) -> list[dict[str, Any]]:
    records = []
    for i, s in enumerate(structures):
        cartesian = bool(i % 2)
        atoms = {
            "lattice_mat": s.lattice.matrix.tolist(),
            "coords": (s.cart_coords if cartesian else s.frac_coords).tolist(),
            "elements": [site.specie.symbol for site in s],
            "cartesian": cartesian,
        }
        records.append({"jid": f"JVASP-{i}", "atoms": atoms, "gap": "na" if i == 0 else i / 4})
    return records


def optimade(structures: list[Structure]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"odbx/{i}",
            "type": "structures",
            "attributes": {
                "lattice_vectors": s.lattice.matrix.tolist(),
                "cartesian_site_positions": s.cart_coords.tolist(),
                "species_at_sites": [f"{site.specie.symbol}1" for site in s],
                "species": [
                    {"name": f"{e.symbol}1", "chemical_symbols": [e.symbol], "concentration": [1.0]}
                    for e in s.composition
                ],
                "_odbx_energy": i / 4,
            },
        }
        for i, s in enumerate(structures)
    ]


def frame(structures: list[Structure]) -> pd.DataFrame:
    rows = {"structure": [s.as_dict() for s in structures], "e_form": [i / 4 for i in range(len(structures))]}
    return pd.DataFrame(rows, index=[f"mb-{i}" for i in range(len(structures))])


def documents(structures: list[Structure]) -> dict[str, tuple[str, Any, dict[str, str]]]:
    """Name of the format → ending, text, labels."""
    dicts = [{"material_id": f"mp-{i}", "structure": s.as_dict(), "y": i / 4} for i, s in enumerate(structures)]
    trajectory: dict[str, dict[str, Any]] = {}
    for i, s in enumerate(structures):
        of_material = trajectory.setdefault(f"mp-{i // 3}", {})
        of_material[f"mp-{i // 3}-0-{i}"] = {"mp_id": f"mp-{i // 3}", "structure": s.as_dict(), "y": i / 4}
    lines = [json.dumps({"x-optimade": {"meta": {}}}), *map(json.dumps, optimade(structures))]
    columns = frame(structures).reset_index(names="material_id")[["material_id", "e_form", "structure"]]
    return {
        "list": (".json", json.dumps(dicts), {"y": "y"}),
        "indented": (".json", json.dumps(dicts, indent=1), {"y": "y"}),
        "lines": (".jsonl", "\n".join(map(json.dumps, dicts)), {"y": "y"}),
        "lines as json": (".json", "\n".join(map(json.dumps, dicts)) + "\n", {"y": "y"}),
        "bare": (".json", json.dumps([s.as_dict() for s in structures]), {}),
        "entries": (
            ".json",
            json.dumps({"entries": entries(structures)}, cls=MontyEncoder),
            {"y": "data.e_above_hull"},
        ),
        "entry list": (".json", json.dumps(entries(structures)), {"y": "energy"}),
        "by id": (".json", json.dumps({d["material_id"]: d["structure"] for d in dicts}), {}),
        "trajectory": (".json", json.dumps(trajectory), {"y": "y"}),
        "split": (".json", frame(structures).to_json(orient="split"), {"y": "e_form"}),
        "pandas": (".json", columns.to_json(), {"y": "e_form"}),
        "jarvis": (".json", json.dumps(jarvis(structures)), {"y": "gap"}),
        "optimade": (
            ".json",
            json.dumps({"links": {"next": None}, "data": optimade(structures)}),
            {"y": "_odbx_energy"},
        ),
        "optimade lines": (".jsonl", "\n".join(lines), {"y": "_odbx_energy"}),
        "cif in json": (".json", json.dumps([{"id": f"x{i}", "cif": cif(s)} for i, s in enumerate(structures)]), {}),
        "csv": (
            ".csv",
            pd.DataFrame(
                {"material_id": [d["material_id"] for d in dicts], "cif": map(cif, structures), "y": 0.5}
            ).to_csv(),
            {"y": "y"},
        ),
        "quoted csv": (".csv", pd.DataFrame({"cif": map(cif, structures), "a": 'x"\ny,'}).to_csv(quoting=1), {}),
        "extxyz": (".extxyz", extxyz(structures).decode(), {"y": "energy"}),
    }


KINDS = tuple(documents([]))


@pytest.fixture(scope="module")
def texts(structures: list[Structure]) -> dict[str, tuple[str, str, dict[str, str]]]:
    return documents(structures)


@pytest.mark.parametrize("kind", KINDS)
def test_documents(kind: str, texts: dict[str, Any], structures: list[Structure], tmp_path: Path) -> None:
    ending, text, labels = texts[kind]
    (tmp_path / f"some{ending}").write_text(text)
    crystals, refusals = read(tmp_path / f"some{ending}", labels=labels)
    assert refusals == []
    assert_all_same(crystals, structures)
    assert len({c.key for c in crystals}) == len({c.position for c in crystals}) == len(structures)
    for i, crystal in enumerate(crystals):
        missing = not labels or (kind == "jarvis" and i == 0)
        assert list(crystal.labels) == ([] if missing else ["y"])
    if labels:
        assert crystals[-1].labels["y"] in (9 / 4, 9 / 8, -18.0, 0.5, -13.5)


def test_keys(texts: dict[str, Any], tmp_path: Path) -> None:
    expected = {
        "list": "mp-9",
        "bare": "some#9",
        "entries": "agm9",
        "by id": "mp-9",
        "trajectory": "mp-3-0-9",
        "split": "mb-9",
        "pandas": "mb-9",
        "jarvis": "JVASP-9",
        "optimade": "odbx/9",
        "csv": "mp-9",
        "extxyz": "some#9",
    }
    for kind, key in expected.items():
        ending, text, _ = texts[kind]
        (tmp_path / f"some{ending}").write_text(text)
        assert read(tmp_path / f"some{ending}")[0][-1].key == key, kind


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", ["list", "lines", "csv", "extxyz"])
def test_compressed(
    kind: str, compression: str, texts: dict[str, Any], structures: list[Structure], tmp_path: Path
) -> None:
    ending, text, _ = texts[kind]
    path = tmp_path / f"some{ending}{compression}"
    packed = COMPRESS[compression]
    path.write_bytes(packed(text[:99].encode()) + packed(text[99:].encode()))  # two streams, one after the other
    crystals, refusals = read(path)
    assert refusals == []
    assert_all_same(crystals, structures)


def test_one_file_each(structures: list[Structure], tmp_path: Path) -> None:
    for i, s in enumerate(structures):
        (tmp_path / f"c{i}.cif").write_text(cif(s))
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}/POSCAR").write_text(poscar(s))
        (tmp_path / f"v{i}.vasp.gz").write_bytes(gzip.compress(poscar(s).encode()))
        crystals = [
            *read(tmp_path / f"c{i}.cif")[0],
            *read(tmp_path / f"{i}/POSCAR")[0],
            *read(tmp_path / f"v{i}.vasp.gz")[0],
        ]
        assert [c.key for c in crystals] == [f"c{i}", "POSCAR", f"v{i}"]
        assert_all_same(crystals, [s] * 3)


def test_files_of_one_name_are_told_apart_by_their_folders(structures: list[Structure], tmp_path: Path) -> None:
    """Crystals without ids would otherwise pass for one another, and all but the first be dropped."""
    for i, s in enumerate(structures[:3]):
        folder = tmp_path / f"run{i}" / "out"
        folder.mkdir(parents=True)
        (folder / "POSCAR").write_text(poscar(s))
        (folder / "relaxed.cif").write_text(cif(s))
        (folder / "md.extxyz").write_bytes(extxyz(structures[i : i + 2]))
    for name, keys in {
        "POSCAR": ["run0/out", "run1/out", "run2/out"],
        "relaxed.cif": ["run0/out/relaxed", "run1/out/relaxed", "run2/out/relaxed"],
        "md.extxyz": [f"run{i}/out/md#{n}" for i in range(3) for n in range(2)],
    }.items():
        sources = open_sources([str(tmp_path / f"run{i}" / "out" / name) for i in range(3)], ReadOptions())
        assert [source.name for source in sources] == [f"run{i}/out/{name}" for i in range(3)]
        assert [c.key for source in sources for c in sort(parse_records(source, source.records()))[0]] == keys
    alone = open_sources([str(tmp_path / "run0/out/POSCAR"), str(tmp_path / "run1/out/md.extxyz")], ReadOptions())
    assert [source.name for source in alone] == ["POSCAR", "md.extxyz"]
    keys = [c.key for c in read(tmp_path)[0]]
    assert len(set(keys)) == len(keys) == 12 and {"run1/out", "relaxed", "run1/out/relaxed", "md#0"} <= set(keys)


def test_what_a_folder_holds_and_is_not_read_in_it_is_said(structures: list[Structure], tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "d", tmp_path / "elsewhere"
    for place in (folder, elsewhere):
        place.mkdir()
        (place / "a.cif").write_text(cif(structures[0]))
    (folder / "linked").symlink_to(elsewhere)
    (folder / "b.parquet").write_bytes(b"PAR1")
    (folder / "c.csv").write_bytes("id;größe\n1;2\n".encode("utf-16"))  # a spreadsheet's
    (folder / "e.json").write_text('{"columns": null, "data": [[1]]}')
    crystals, refusals = read(folder)
    assert [c.key for c in crystals] == ["a"]
    assert {r.position: r.code for r in refusals} == {
        **dict.fromkeys(["b.parquet", "linked", "c.csv", "e.json"], "unparsable"),
    }
    assert all("a source of its own" in r.text for r in refusals if r.position in ("b.parquet", "linked"))


def test_an_archive_of_poscars_is_an_archive(structures: list[Structure], tmp_path: Path) -> None:
    path = tmp_path / "POSCARs.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for i, s in enumerate(structures):
            info = tarfile.TarInfo(f"{i}/POSCAR")
            info.size = len(poscar(s).encode())
            archive.addfile(info, io.BytesIO(poscar(s).encode()))
    crystals, refusals = read(path)
    assert refusals == [] and [c.key for c in crystals] == [str(i) for i in range(len(structures))]


def test_folder(structures: list[Structure], tmp_path: Path) -> None:
    for i, s in enumerate(structures):
        folder = tmp_path / "many" / f"{i}"
        folder.mkdir(parents=True)
        (folder / ("CONTCAR" if i % 2 else "x.cif")).write_text(poscar(s) if i % 2 else cif(s))
        (folder / "README.md").write_text("not a crystal")
        (folder / "._x.cif").write_text("nor is this")
    crystals, refusals = read(tmp_path / "many")
    assert refusals == []
    assert_all_same(crystals, structures)
    assert [c.key for c in crystals][:4] == ["x", "1", "2/x", "3"]
    positions = [record.position for record in open_source(str(tmp_path / "many")).records()]
    assert positions == ["0/x.cif"]
    with pytest.raises(SourceError, match="no file in this folder"):
        (tmp_path / "none").mkdir()
        read(tmp_path / "none")


@pytest.mark.parametrize("ending", ["tar", "tar.gz", "tgz", "tar.bz2", "tar.xz", "tar.zst", "zip"])
def test_archive(ending: str, structures: list[Structure], tmp_path: Path) -> None:
    names = [
        "../../up.cif",
        "/abs/POSCAR",
        "b.vasp.gz",
        "d" * 150 + "/ü.cif",
        "e.cif.bz2",
        *(f"{i}.cif" for i in range(5)),
    ]
    texts = []
    for name, s in zip(names, structures, strict=True):
        text = (cif(s) if ".cif" in name else poscar(s)).encode()
        texts.append(COMPRESS[Path(name).suffix](text) if Path(name).suffix in COMPRESS else text)
    path = tmp_path / f"some.{ending}"
    if ending == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in zip(names, texts, strict=True):
                archive.writestr(name, text)
            link = zipfile.ZipInfo("link.cif")
            link.external_attr = 0o120777 << 16
            archive.writestr(link, "/etc/passwd")
            archive.writestr("inner.tar", "")
    else:
        file = io.BytesIO()
        mode = {"gz": "w:gz", "tgz": "w:gz", "bz2": "w:bz2", "xz": "w:xz"}.get(ending.rpartition(".")[2], "w")
        formats = tarfile.GNU_FORMAT if ending == "tar" else tarfile.PAX_FORMAT
        with tarfile.open(fileobj=file, mode=mode, format=formats) as archive:  # type: ignore[call-overload]
            for name, text in zip(names, texts, strict=True):
                member = tarfile.TarInfo(name)
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text))
            link = tarfile.TarInfo("link.cif")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(link)
            archive.addfile(tarfile.TarInfo("inner.tar"))
            folder = tarfile.TarInfo("folder.cif")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
        path.write_bytes(COMPRESS[".zst"](file.getvalue()) if ending == "tar.zst" else file.getvalue())
    crystals, refusals = read(path)
    assert_all_same(crystals, structures)
    assert [c.key for c in crystals] == ["up", "abs", "b", "ü", "e", "0", "1", "2", "3", "4"]
    assert [(r.position, r.code, r.source) for r in refusals] == [
        ("link.cif", "unparsable", f"some.{ending}"),
        ("inner.tar", "unparsable", f"some.{ending}"),
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_json_in_zip(texts: dict[str, Any], structures: list[Structure], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "jdft.json.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("jdft.json", texts["jarvis"][1])
    crystals, refusals = read(tmp_path / "jdft.json.zip")
    assert not refusals
    assert_all_same(crystals, structures)


def test_url(texts: dict[str, Any], structures: list[Structure]) -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/some.json.gz", gzip.compress(texts["list"][1].encode()))
    system.pipe("/bucket/cifs/a/1.cif", cif(structures[0]).encode())
    system.pipe("/bucket/cifs/b/2.cif", cif(structures[1]).encode())
    assert_all_same(read("memory://bucket/some.json.gz")[0], structures)
    assert [c.key for c in read("memory://bucket/cifs")[0]] == ["1", "2"]
    with pytest.raises(SourceError, match="cannot be opened"):
        open_source("memory://bucket/none.json")
    with pytest.raises(SourceError, match="install"):
        open_source("dropbox://bucket/none.json")


@pytest.mark.server
def test_web_server(texts: dict[str, Any], structures: list[Structure], tmp_path: Path) -> None:
    """A plain one, which cannot give parts of a file."""
    (tmp_path / "some.json.gz").write_bytes(gzip.compress(texts["list"][1].encode()))
    (tmp_path / "cut.json").write_text(texts["list"][1])

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def copyfile(self, source: Any, outputfile: Any) -> None:
            outputfile.write(source.read(5000) if "cut" in self.path else source.read())

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        assert_all_same(read(f"{url}/some.json.gz")[0], structures)
        with pytest.raises(SourceError, match="cannot be opened"):
            open_source(f"{url}/none.json")
        with pytest.raises(SourceError, match="reading broke off"):  # and not: the file is cut
            read(f"{url}/cut.json")
    finally:
        server.shutdown()
        server.server_close()


def test_secrets_in_urls_are_not_shown() -> None:
    with pytest.raises(SourceError) as raised:
        open_source("memory://user:secret@bucket/none.json?token=secret")
    assert "secret" not in str(raised.value)


def test_options(texts: dict[str, Any], structures: list[Structure], tmp_path: Path) -> None:
    for kind in KINDS:
        ending, text, _ = texts[kind]
        (tmp_path / f"some{ending}").write_text(text)
        crystals, refusals = read(tmp_path / f"some{ending}", limit=3)
        assert len(crystals) in ([2, 3] if kind == "optimade lines" else [3])  # its header is a line too
        assert not refusals
    (tmp_path / "some.csv").write_text(texts["csv"][1])
    with pytest.raises(SourceError, match=r"no column nope; it has , material_id, cif, y"):
        open_source(str(tmp_path / "some.csv"), ReadOptions(labels={"y": "nope"}))


def test_sources_travel_and_repeat(texts: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text(texts["list"][1])
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path / "some.json"))))
    records = pickle.loads(pickle.dumps(list(source.records())))
    assert [r.position for r in records] == [r.position for r in source.records()]
    assert len(list(parse_records(source, records))) == 10


def test_records_are_batches(structures: list[Structure], tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text("\n".join([json.dumps({"structure": structures[9].as_dict()})] * 700))
    source = open_source(str(tmp_path / "some.jsonl"))
    assert [len(record.payload) for record in source.records()] == [512, 188]


def test_unknown(tmp_path: Path) -> None:
    (tmp_path / "some.doc").write_text("")
    with pytest.raises(SourceError, match=r"no reader.*optimade:.*\.cif"):
        open_source(str(tmp_path / "some.doc"))
    with pytest.raises(SourceError, match="no such file"):
        open_source(str(tmp_path / "none.cif"))


def test_crystals_of_a_program(aflow: list[Crystal]) -> None:
    source = from_crystals(aflow[:3], licence="mine")
    found, _ = sort(parse_records(source, source.records()))
    assert [c.key for c in found] == [c.key for c in aflow[:3]]
    assert [c.position for c in found] == ["0", "1", "2"]
    assert source.licence == "mine"


def test_not_periodic(tmp_path: Path) -> None:
    water = Molecule(["O", "H", "H"], [[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    (tmp_path / "a.json").write_text(json.dumps([water.as_dict()]))
    (tmp_path / "b.xyz").write_text(water.to(fmt="xyz") + "\n")
    (tmp_path / "c.xyz").write_text('1\nLattice="9 0 0 0 9 0 0 0 9" pbc="F F F"\nO 0 0 0\n')
    crystals, refusals = read(tmp_path)
    assert not crystals
    assert [r.code for r in refusals] == ["not_periodic"] * 3


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("c\n-8\n2 0 0\n0 2 0\n0 0 2\nSi_sv/ab12\n1\nSelective\nCart\n0 0 0 T T F\n", None),
        ("c\n1 1 2\n2 0 0\n0 2 0\n0 0 1\nSi\n1\nDirect\n0 0 0\n\n0 0 0\n", None),
        ("Si\n1\n2 0 0\n0 2 0\n0 0 2\n1\nDirect\n0 0 0 Si\n", None),  # VASP 4, elements in the comment
        ("my cell\n1\n2 0 0\n0 2 0\n0 0 2\n1\nDirect\n0 0 0\n", "species"),
        ("c\n1\n2 0 0\n0 2 0\n0 0 2\nXx\n1\nDirect\n0 0 0\n", "species"),
        ("c\n1\n2 0 0\n0 2 0\n0 0 2\nSi\n2\nDirect\n0 0 0\n", "truncated"),
        ("c\n1\n2 0 0\n0 2 0\n0 0 2\nSi\n0\nDirect\n", "no_atoms"),
        ("c\nx\n2 0 0\n0 2 0\n0 0 2\nSi\n1\nDirect\n0 0 0\n", "unparsable"),
        ("", "truncated"),
    ],
)
def test_poscar(text: str, code: str | None, tmp_path: Path) -> None:
    (tmp_path / "POSCAR_a").write_text(text)
    crystals, refusals = read(tmp_path / "POSCAR_a")
    assert [r.code for r in refusals] == ([code] if code else [])
    for crystal in crystals:
        np.testing.assert_allclose(crystal.lattice, 2 * np.eye(3), atol=1e-12)
        assert crystal.key == "POSCAR_a"
        assert crystal.atomic_numbers.tolist() == [14]


def test_poscar_cartesian(structures: list[Structure], tmp_path: Path) -> None:
    for i, s in enumerate(structures):
        ase.io.write(tmp_path / f"{i}.vasp", AseAtomsAdaptor.get_atoms(s), format="vasp", direct=False)
        assert_same(read(tmp_path / f"{i}.vasp")[0][0], s)
