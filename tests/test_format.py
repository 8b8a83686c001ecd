"""Blocks, shards, tables and manifest: what is written can be read by others, and what is damaged is noticed."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import webdataset as wds
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Composition

from cdssl_dist.data.dataset import DataSet
from sharding.block import BlockError, Budget, decode, encode
from sharding.crystal import SYMBOLS, Crystal
from sharding.executor import Executor
from sharding.graph import Multigraphs, build, concatenate
from sharding.manifest import DataSetError, read_manifest
from sharding.packing import pack, shuffled
from sharding.pipeline import StrictError, shard
from sharding.settings import ShardSettings
from sharding.sources import ReadOptions, Source, from_crystals, open_source

FIELDS = {  # name → dtype, shape after the first axis; of the format, version 1
    "n_atoms": ("uint32", ()),
    "n_edges": ("uint32", ()),
    "lattice": ("float32", (3, 3)),
    "atomic_numbers": ("uint8", ()),
    "positions": ("float32", (3,)),
    "edge_src": ("uint8", ()),
    "edge_dst": ("uint8", ()),
    "edge_shift": ("int8", (3,)),
}


def a_block() -> Multigraphs:
    """Three graphs, a key that is not ASCII, a label with a hole."""
    numbers = np.array([11, 17], np.uint8)
    pair = np.array([[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]])
    crystals = [
        Crystal("NaCl/ä–Ω", 4.0 * np.eye(3), pair, numbers, {"gap": 5.0}),
        Crystal("b", 3.0 * np.eye(3), pair[:1], numbers[:1], {"gap": 0.1}),
        Crystal("x" * 40, np.diag([3.0, 4.0, 5.0]), pair[1:], numbers[1:]),
    ]
    graphs, refused = build(crystals, 5.0, ["gap"])
    assert refused == {}
    return graphs


BLOCK = a_block()
BYTES = encode(BLOCK, np.uint8)
HEADER_SIZE = int.from_bytes(BYTES[:8], "little")


def is_a_block(graphs: Multigraphs) -> bool:
    """Whether types and shapes are those of the format, and the counts add up."""
    n = {"n_atoms": len(graphs), "n_edges": len(graphs), "lattice": len(graphs)}
    n |= dict.fromkeys(("atomic_numbers", "positions"), int(graphs.n_atoms.sum()))
    n |= dict.fromkeys(("edge_src", "edge_dst", "edge_shift"), int(graphs.n_edges.sum()))
    width = str(graphs.edge_src.dtype)
    return width in ("uint8", "uint16") and all(
        getattr(graphs, name).shape == (n[name], *tail)
        and str(getattr(graphs, name).dtype) == (width if name in ("edge_src", "edge_dst") else dtype)
        for name, (dtype, tail) in FIELDS.items()
    )


def decodes_or_says_why(data: bytes) -> None:
    try:
        assert is_a_block(decode(data))
    except BlockError as why:
        assert str(why)


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [np.uint8, np.uint16])
def test_a_block_comes_back(width: type) -> None:
    back = decode(encode(BLOCK, width))
    assert back.keys == BLOCK.keys == ["NaCl/ä–Ω", "b", "x" * 40]
    assert back.edge_src.dtype == back.edge_dst.dtype == width
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(back, name), getattr(BLOCK, name), name)
    np.testing.assert_array_equal(back.labels["gap"], np.array([5.0, 0.1, np.nan], np.float32))


def test_a_block_is_plain_safetensors() -> None:
    arrays = safetensors.numpy.load(BYTES)
    assert set(arrays) == {*FIELDS, "key", "key_offsets", "y.gap"}
    assert {name: (str(arrays[name].dtype), arrays[name].shape[1:]) for name in FIELDS} == FIELDS
    assert arrays["key"].tobytes().decode() == "".join(BLOCK.keys)
    assert str(arrays["key_offsets"].dtype) == "uint32"


def test_every_truncation_is_noticed() -> None:
    for size in range(len(BYTES)):
        with pytest.raises(BlockError):
            decode(BYTES[:size])


@settings(max_examples=400)
@given(st.lists(st.tuples(st.integers(0, len(BYTES) - 1), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bits_anywhere(flips: list[tuple[int, int]]) -> None:
    data = bytearray(BYTES)
    for at, bits in flips:
        data[at] ^= bits
    decodes_or_says_why(bytes(data))


@settings(max_examples=400)
@given(st.integers(8, 7 + HEADER_SIZE), st.sampled_from(b'0123456789-[]{}",:.eEFUI'))
def test_another_letter_in_the_header(at: int, letter: int) -> None:
    decodes_or_says_why(BYTES[:at] + bytes([letter]) + BYTES[at + 1 :])


@settings(max_examples=300)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes(data: bytes, with_a_size: bool) -> None:
    decodes_or_says_why(len(data).to_bytes(8, "little") + data if with_a_size else data)


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from(["F32", "U8", "I8", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["shape", "dtype"]), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=600)
@given(
    st.sampled_from([*FIELDS, "key", "key_offsets", "y.gap"]),
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "U8", "U16", "U32", "I8", "F64", "BOOL"]) | anything,
            "shape": st.lists(st.integers(-1, 30), max_size=3) | anything,
            "data_offsets": st.tuples(st.integers(-80, 600), st.integers(-80, 600)).map(list) | anything,
        },
    ),
)
def test_hostile_headers(name: str, entry: dict[str, Any]) -> None:
    decodes_or_says_why(with_header({name: entry}))


def with_header(changes: dict[str, dict[str, Any]], body: bytes = BYTES[8 + HEADER_SIZE :]) -> bytes:
    """The block with some entries of its header changed."""
    header = json.loads(BYTES[8 : 8 + HEADER_SIZE])
    for name, entry in changes.items():
        header[name] = header.get(name, {}) | entry
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


NOTICED = [
    {"key_offsets": {"data_offsets": [2**80, 2**80 + 16]}},
    {"lattice": {"shape": [2**40, 2**40, 0]}},
    {"n_atoms": {"shape": [2**70]}},
    {"edge_shift": {"dtype": "U8"}},  # −1 would be read as 255
    {"lattice": {"dtype": "U32"}},
    {"key_offsets": {"dtype": "F32"}},
    {"n_atoms": {"shape": [], "dtype": "U8", "data_offsets": [0, 1]}},
    {"positions": {"data_offsets": [-48, 0]}},  # the end of the header
    {"positions": {"data_offsets": [-52, -4]}},  # counted from the end
    {"lattice": {"shape": [3, 9]}},
    {"lattice": {"shape": [3, -1]}},
    {"y.gap": {"shape": [3, 1]}},
    {"y.gap": {"dtype": "U32"}},
]


@pytest.mark.parametrize("changes", NOTICED, ids=str)
def test_headers_that_contradict_the_format(changes: dict[str, dict[str, Any]]) -> None:
    assert decode(with_header({})).keys == BLOCK.keys
    with pytest.raises(BlockError):
        decode(with_header(changes))


@pytest.mark.parametrize("name", [*FIELDS, "key_offsets", "y.gap"])
def test_arrays_that_contradict_one_another(name: str) -> None:
    """Each a valid array by itself, one row too short."""
    header = json.loads(BYTES[8 : 8 + HEADER_SIZE])
    rows, *tail = header[name]["shape"]
    begin, end = header[name]["data_offsets"]
    shorter = {"shape": [rows - 1, *tail], "data_offsets": [begin, end - (end - begin) // rows]}
    with pytest.raises(BlockError, match=r"contradict|divide"):
        decode(with_header({name: shorter}))


def test_keys_that_overlap_do_not_fill_the_memory() -> None:
    """Key offsets that jump to and fro would make thousands of keys of the same 64 kB."""
    offsets, keys = np.array([0, 65_536] * 4_000, np.uint32).tobytes(), b"x" * 65_536
    body = BYTES[8 + HEADER_SIZE :]
    end = len(body) + len(offsets)
    data = with_header(
        {
            "key_offsets": {"shape": [8_000], "data_offsets": [len(body), end]},
            "key": {"shape": [len(keys)], "data_offsets": [end, end + len(keys)]},
        },
        body + offsets + keys,
    )
    tracemalloc.start()
    try:
        with pytest.raises(BlockError):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(data)
    finally:
        tracemalloc.stop()


# -- a data set --------------------------------------------------------------------------------------------------------


def graphs_of(folder: Path) -> dict[str, Multigraphs]:
    """All graphs of each split, read without the code that trains."""
    blocks = pq.read_table(folder / "blocks.parquet").to_pylist()
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    parts: dict[str, list[Multigraphs]] = {}
    for row in blocks:
        with open(folder / shards[row["shard"]]["name"], "rb") as file:
            file.seek(row["offset"])
            parts.setdefault(("train", "val", "test")[row["split"]], []).append(decode(file.read(row["size"])))
    return {split: concatenate(of_split) for split, of_split in parts.items()}


def refusals_of(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def test_shards_are_webdatasets(data_folder: Path) -> None:
    """A plain WebDataset pipeline reads them, and finds the blocks in the order of the table."""
    names = sorted(path.name for path in data_folder.glob("*.tar"))
    blocks = pq.read_table(data_folder / "blocks.parquet").to_pylist()
    found = {}
    for name in names:
        for sample in wds.WebDataset(str(data_folder / name), shardshuffle=False):
            found[sample["__key__"]] = safetensors.numpy.load(sample["safetensors"])
    assert list(found) == [f"{row['block']:09d}" for row in sorted(blocks, key=lambda row: row["shard"])]
    for row in blocks:
        arrays = found[f"{row['block']:09d}"]
        src, dst = arrays["edge_src"], arrays["edge_dst"]
        assert row["graphs"] == len(arrays["n_atoms"])
        assert row["atoms"] == len(arrays["positions"]) == arrays["n_atoms"].sum()
        assert row["edges"] == 2 * len(src) == 2 * arrays["n_edges"].sum()
        assert row["scored_edges"] == 2 * (src != dst).sum()


def test_the_block_table_points_at_the_members(data_folder: Path) -> None:
    manifest = json.loads((data_folder / "manifest.json").read_text())
    rows = pq.read_table(data_folder / "blocks.parquet").to_pylist()
    assert len(manifest["shards"]) >= 7
    assert [row["block"] for row in rows] == list(range(len(rows)))
    for number, entry in enumerate(manifest["shards"]):
        data = (data_folder / entry["name"]).read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        with tarfile.open(data_folder / entry["name"]) as tar:
            members = {int(m.name.removesuffix(".safetensors")): m for m in tar.getmembers()}
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members.values()} == {(0, 0, 0, "", "")}
        mine = [row for row in rows if row["shard"] == number]
        assert [row["block"] for row in mine] == list(members)
        for row in mine:
            member = members[row["block"]]
            assert (row["offset"], row["size"]) == (member.offset_data, member.size)
            block = data[row["offset"] : row["offset"] + row["size"]]
            assert row["xxh3"] == xxhash.xxh3_64(block).intdigest()


def test_every_table_has_its_digest(data_folder: Path) -> None:
    manifest = json.loads((data_folder / "manifest.json").read_text())
    written = {str(p.relative_to(data_folder)) for p in data_folder.rglob("*") if p.is_file()}
    assert written == {"manifest.json", *manifest["tables"], *(s["name"] for s in manifest["shards"])}
    for name, digest in manifest["tables"].items():
        assert hashlib.sha256((data_folder / name).read_bytes()).hexdigest() == digest


def test_every_crystal_is_there_once_or_refused(data_folder: Path, aflow: list[Crystal]) -> None:
    kept = [key for graphs in graphs_of(data_folder).values() for key in graphs.keys]
    refused = [refusal["key"] for refusal in refusals_of(data_folder)]
    assert Counter(kept + refused) == Counter(crystal.key for crystal in aflow[:120])
    everything, _ = build(aflow[:120], 5.0)
    n_edges = dict(zip(everything.keys, 2 * everything.n_edges.astype(int), strict=True))
    assert set(refused) == {key for key, n in n_edges.items() if n > 2_048}
    manifest = read_manifest(data_folder)
    assert manifest.quarantined == {"oversized": len(refused)} == {"oversized": 2}
    for split, graphs in graphs_of(data_folder).items():
        totals = manifest.splits[split]
        assert (totals["graphs"], totals["atoms"]) == (len(graphs), len(graphs.positions))
        assert (totals["edges"], totals["scored_edges"]) == (2 * len(graphs.edge_src), 2 * graphs.scored_edges().sum())


def test_what_was_written_is_what_was_built(data_folder: Path, aflow: list[Crystal]) -> None:
    for graphs in graphs_of(data_folder).values():
        by_key = {c.key: c for c in aflow}
        again, _ = build([by_key[key] for key in graphs.keys], 5.0)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(graphs, name), getattr(again, name), name)


def test_groups_do_not_straddle_splits(data_folder: Path, aflow: list[Crystal]) -> None:
    group = {crystal.key: crystal.group for crystal in aflow}
    splits = {split: {group[key] for key in graphs.keys} for split, graphs in graphs_of(data_folder).items()}
    assert not splits["train"] & splits["val"]
    assert 12 <= len(splits["val"]) <= 36  # of about 117 groups, of which a fifth was asked for


def test_without_groups_a_composition_is_one(tmp_path: Path, aflow: list[Crystal]) -> None:
    """Polymorphs stay together: crystals without a group are grouped by formula."""
    copies = [
        Crystal(f"{n}/{c.key}", c.lattice * (1 + n / 100), c.positions * (1 + n / 100), c.atomic_numbers)
        for c in aflow[:40]
        for n in range(3)
    ]
    shard([from_crystals(copies)], tmp_path / "d", ShardSettings(val=0.3, test=0.3))
    formulas = {c.key: Composition.from_dict(Counter(SYMBOLS[z] for z in c.atomic_numbers)) for c in copies}
    splits = {
        split: {formulas[key].reduced_composition for key in graphs.keys}
        for split, graphs in graphs_of(tmp_path / "d").items()
    }
    assert set(splits) == {"train", "val", "test"}
    assert sum(map(len, splits.values())) == len(set.union(*splits.values())) >= 30


def test_more_data_moves_no_crystal_to_another_split(tmp_path: Path, aflow: list[Crystal], data_folder: Path) -> None:
    settings = ShardSettings(budget=Budget(edges=2_048, atoms=256, graphs=16), val=0.2)
    shard([from_crystals(aflow)], tmp_path / "d", settings)
    for split, graphs in graphs_of(data_folder).items():
        assert set(graphs.keys) < set(graphs_of(tmp_path / "d")[split].keys)


def test_the_graph_table_describes_the_graphs(data_folder: Path) -> None:
    table = pq.read_table(data_folder / "graphs.parquet").to_pylist()
    order = [key for split in ("train", "val") for key in graphs_of(data_folder)[split].keys]
    assert [row["key"] for row in table] == order
    graphs = concatenate([graphs_of(data_folder)[split] for split in ("train", "val")])
    assert [row["n_atoms"] for row in table] == graphs.n_atoms.tolist()
    assert [row["n_edges"] for row in table] == (2 * graphs.n_edges.astype(int)).tolist()
    volumes = np.abs(np.linalg.det(graphs.lattice.astype(float)))
    np.testing.assert_allclose([row["volume"] for row in table], volumes, rtol=1e-6)


# -- sharding ----------------------------------------------------------------------------------------------------------


def optimade(path: Path, crystals: list[Crystal], rows: dict[int, dict[str, Any]], group: int = 16) -> Path:
    """A Parquet file of crystals in OPTIMADE's names, with a label on every other; ``rows`` are changed as said."""
    table = [
        {
            "id": crystal.key,
            "lattice_vectors": crystal.lattice.tolist(),
            "cartesian_site_positions": crystal.positions.tolist(),
            "species_at_sites": [SYMBOLS[z] for z in crystal.atomic_numbers],
            "_test_gap": float(len(crystal.positions)) if i % 2 else None,
        }
        | rows.get(i, {})
        for i, crystal in enumerate(crystals)
    ]
    pq.write_table(pa.Table.from_pylist(table), path, row_group_size=group)
    return path


SETTINGS = ShardSettings(
    budget=Budget(edges=2_048, atoms=256, graphs=16),
    blocks_per_shard=3,
    val=0.2,
    labels={"gap": "_test_gap"},
    duplicates="keep",
)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory, aflow: list[Crystal]) -> Path:
    """1,200 crystals, three of which are bad."""
    many = [Crystal(f"{n}/{c.key}", c.lattice, c.positions, c.atomic_numbers) for n in range(6) for c in aflow[:200]]
    path = tmp_path_factory.mktemp("source") / "some.parquet"
    bad = {3: {"species_at_sites": ["Xx"]}, 700: {"id": many[0].key}, 1100: {"lattice_vectors": [[0.0] * 3] * 3}}
    return optimade(path, many, bad)


def sharded(parquet: Path, out: Path, workers: int = 1, settings: ShardSettings = SETTINGS) -> Path:
    shard([open_source(str(parquet), ReadOptions(labels=settings.labels))], out, settings, Executor(workers))
    return out


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, parquet: Path) -> Path:
    """The data set of those crystals, made by one worker."""
    return sharded(parquet, tmp_path_factory.mktemp("labelled") / "one")


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_bytes_again(tmp_path: Path, parquet: Path, labelled: Path, workers: int) -> None:
    assert contents(sharded(parquet, tmp_path / "again", workers)) == contents(labelled)
    assert len(contents(labelled)) > 20


@pytest.mark.parametrize("source", [open_source("aflow:3"), from_crystals([])], ids=["aflow", "python"])
def test_a_source_travels_to_another_process(source: Source) -> None:
    assert pickle.loads(pickle.dumps(source)).name == source.name


def test_another_seed_is_another_shuffle(tmp_path: Path, parquet: Path, labelled: Path) -> None:
    other = graphs_of(sharded(parquet, tmp_path / "other", settings=replace(SETTINGS, seed=1)))
    first = graphs_of(labelled)
    assert set(other["val"].keys) != set(first["val"].keys)
    assert sum(len(g) for g in other.values()) == sum(len(g) for g in first.values())


def test_labels_travel_with_their_crystal(labelled: Path, parquet: Path) -> None:
    truth = {row["id"]: row["_test_gap"] for row in reversed(pq.read_table(parquet).to_pylist())}
    values = {}
    for graphs in graphs_of(labelled).values():
        values |= dict(zip(graphs.keys, graphs.labels["gap"].tolist(), strict=True))
    assert values.keys() <= truth.keys()
    assert {key for key, value in values.items() if np.isnan(value)} == {key for key in values if truth[key] is None}
    assert all(value == truth[key] for key, value in values.items() if truth[key] is not None)
    table = {row["key"]: row["y.gap"] for row in pq.read_table(labelled / "graphs.parquet").to_pylist()}
    np.testing.assert_array_equal(list(table.values()), [values[key] for key in table])


def test_refusals_say_what_and_where(labelled: Path, parquet: Path) -> None:
    rows = pq.read_table(parquet).to_pylist()
    refusals = {r["code"]: r for r in refusals_of(labelled) if r["code"] != "oversized"}
    assert {code: r["key"] for code, r in refusals.items()} == {
        "species": rows[3]["id"],
        "duplicate_key": rows[0]["id"],
        "singular_cell": rows[1100]["id"],
    }
    assert {r["source"] for r in refusals_of(labelled)} == {"some.parquet"}
    assert refusals["species"]["position"] == "row 3"


def test_a_refusal_names_the_row_of_its_crystal(labelled: Path, parquet: Path) -> None:
    rows = pq.read_table(parquet).to_pylist()
    refusals = refusals_of(labelled)
    assert all(rows[int(r["position"].removeprefix("row "))]["id"] == r["key"] for r in refusals)
    assert {r["position"] for r in refusals if r["code"] != "oversized"} == {"row 3", "row 700", "row 1100"}
    assert sum(r["code"] == "oversized" for r in refusals) > 5


def test_strict_stops_at_the_first_refusal(tmp_path: Path, parquet: Path) -> None:
    with pytest.raises(StrictError, match="row 3: 'Xx' is not a chemical element"):
        shard([open_source(str(parquet))], tmp_path / "d", strict=True)
    assert not (tmp_path / "d" / "manifest.json").exists()


def test_a_key_that_is_no_text_is_refused(tmp_path: Path, aflow: list[Crystal]) -> None:
    first = aflow[0]
    bad = Crystal("\ud800", first.lattice, first.positions, first.atomic_numbers)
    shard([from_crystals([*aflow[1:5], bad])], tmp_path)
    assert sum(len(graphs) for graphs in graphs_of(tmp_path).values()) == 4
    assert len(refusals_of(tmp_path)) == 1


def test_a_finished_data_set_is_not_overwritten(tmp_path: Path, aflow: list[Crystal]) -> None:
    shard([from_crystals(aflow[:5])], tmp_path)
    before = contents(tmp_path)
    with pytest.raises(DataSetError, match="holds a data set already"):
        shard([from_crystals(aflow[:9])], tmp_path)
    assert contents(tmp_path) == before


def test_what_a_killed_run_left_is_no_data_set_and_in_nobodys_way(tmp_path: Path, aflow: list[Crystal]) -> None:
    def broken() -> Any:
        yield from aflow[:30]
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        shard([from_crystals(broken())], tmp_path / "a")
    with pytest.raises(DataSetError, match="not finished"):
        read_manifest(tmp_path / "a")
    for folder in ("a", "b"):
        shard([from_crystals(aflow[:30])], tmp_path / folder)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_nothing_left_is_an_error_that_says_why(tmp_path: Path, aflow: list[Crystal]) -> None:
    with pytest.raises(DataSetError, match="1 × oversized"):
        shard([from_crystals(aflow[:1])], tmp_path, ShardSettings(budget=Budget(edges=10)))


@pytest.mark.parametrize(("atoms", "width"), [(256, "uint8"), (257, "uint16")])
def test_one_width_of_index_for_a_whole_data_set(tmp_path: Path, atoms: int, width: str) -> None:
    """256 atoms have indices up to 255."""
    row = np.column_stack([2.0 * np.arange(atoms), np.zeros((atoms, 2))])
    long = Crystal("long", np.diag([2.0 * atoms, 3.0, 3.0]), row, np.full(atoms, 6, np.uint8), group="a")
    short = Crystal("short", 3.0 * np.eye(3), np.zeros((1, 3)), np.array([6], np.uint8), group="b")
    shard([from_crystals([long, short])], tmp_path, ShardSettings(budget=Budget(edges=40_000, graphs=1), val=0))
    blocks = graphs_of(tmp_path)["train"]
    assert read_manifest(tmp_path).graph["index_dtype"] == str(blocks.edge_src.dtype) == width
    assert int(blocks.edge_dst.max()) == atoms - 1
    assert sorted(blocks.keys) == ["long", "short"]


# -- packing -----------------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(1, 50)), max_size=300),
    st.integers(100, 400),
    st.integers(50, 120),
    st.integers(1, 12),
)
def test_no_block_exceeds_its_budget(sizes: list[tuple[int, int]], edges: int, atoms: int, graphs: int) -> None:
    e, a = np.array(sizes, np.int64).reshape(-1, 2).T
    block_of, n = pack(e, a, Budget(edges, atoms, graphs))
    assert set(block_of.tolist()) == set(range(n))
    assert all(np.bincount(block_of, e, n) <= edges)
    assert all(np.bincount(block_of, a, n) <= atoms)
    assert all(np.bincount(block_of, minlength=n) <= graphs)


def test_blocks_are_full() -> None:
    """Sizes as those of MP at 5 Å: 780 edges and 22 atoms on average, log-normal, a few over a tenth of a block."""
    rng = np.random.default_rng(0)
    edges = 2 * np.clip(rng.lognormal(5.6, 0.8, 50_000), 3, 4_000).astype(np.int64)
    budget = Budget(edges=65_536, atoms=4_096, graphs=1_024)
    _, n = pack(edges, edges // 35 + 1, budget)
    assert n >= 500
    assert edges.sum() / (n * budget.edges) >= 0.97


def test_blocks_are_full_whichever_budget_binds() -> None:
    """Sparse crystals fill the atoms, dense ones the edges: together hardly more blocks than the larger alone."""
    rng = np.random.default_rng(1)
    dense = rng.random(20_000) < 0.5
    edges = np.where(dense, rng.integers(400, 1_600, 20_000), rng.integers(20, 80, 20_000))
    atoms = np.where(dense, rng.integers(5, 20, 20_000), rng.integers(20, 80, 20_000))
    budget = Budget(edges=16_384, atoms=1_024, graphs=1_024)
    least = max(edges.sum() / budget.edges, atoms.sum() / budget.atoms)
    _, together = pack(edges, atoms, budget)
    assert together < 1.1 * least


def test_the_shuffle_depends_on_keys_and_seed_alone() -> None:
    keys = [f"mp-{n}" for n in range(500)]
    order = [keys[i] for i in shuffled(keys, 7)]
    backwards = keys[::-1]
    assert [backwards[i] for i in shuffled(backwards, 7)] == order
    assert [keys[i] for i in shuffled(keys, 8)] != order
    place = np.argsort(shuffled(keys, 7))
    assert abs(np.corrcoef(place, np.arange(500))[0, 1]) < 0.15


# -- manifest ----------------------------------------------------------------------------------------------------------


def test_every_changed_byte_of_a_manifest_is_noticed(tmp_path: Path, data_folder: Path) -> None:
    good, manifest = (data_folder / "manifest.json").read_bytes(), read_manifest(data_folder)
    for at in range(0, len(good), 3):
        changed = good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]
        (tmp_path / "manifest.json").write_bytes(changed)
        try:
            assert read_manifest(tmp_path) == manifest, "what was changed means the same, such as another blank"
        except DataSetError as why:
            assert str(tmp_path) in str(why)


def newer(content: dict[str, Any]) -> None:
    content["version"] = 2


def fewer(content: dict[str, Any]) -> None:
    content["splits"]["train"]["graphs"] -= 1


def foreign(content: dict[str, Any]) -> None:
    content["format"] = "something-else"


def unversioned(content: dict[str, Any]) -> None:
    del content["version"]


def text_for_version(content: dict[str, Any]) -> None:
    content["version"] = "1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (newer, "format version 2; this program reads up to 1"),
        (fewer, "digest"),
        (foreign, "not the manifest"),
        (unversioned, "format version None"),
        (text_for_version, "format version"),
    ],
)
def test_manifests_changed_by_hand(
    tmp_path: Path, data_folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    content = json.loads((data_folder / "manifest.json").read_text())
    change(content)
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataSetError, match=message):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "missing"), ("", "unreadable"), ("{", "unreadable"), ("[1]", "not the manifest")]
)
def test_folders_that_are_no_data_set(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataSetError, match=message):
        read_manifest(tmp_path)


def test_a_foreign_block_table_is_noticed(data_folder: Path, labelled: Path, tmp_path: Path) -> None:
    shutil.copytree(data_folder, tmp_path / "data")
    shutil.copy(labelled / "blocks.parquet", tmp_path / "data")
    with pytest.raises(DataSetError, match="another data set"):
        DataSet(tmp_path / "data")
