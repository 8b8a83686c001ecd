"""``cdssl verify`` finds every kind of damage, even if the checksums were made to match, and nothing else."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import damage
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from sharding import verify_graphs
from sharding.block import Budget
from sharding.crystal import Crystal
from sharding.executor import Executor
from sharding.findings import Report
from sharding.pipeline import shard
from sharding.settings import ShardSettings
from sharding.sources import from_crystals
from sharding.verify import main, verify

Content = dict[str, Any]
EDGES = ("edge_src", "edge_dst", "edge_shift")


@pytest.fixture
def folder(tmp_path: Path, data_folder: Path) -> Path:
    """A copy of the small data set, to be damaged."""
    return shutil.copytree(data_folder, tmp_path / "copy")


def codes(report: Report) -> set[str]:
    return {finding.code for finding in report.findings}


# -- good data sets ----------------------------------------------------------------------------------------------------


def test_a_good_data_set_is_one_line(data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(data_folder), "--workers", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"ok: {data_folder}: 118 crystals")


def test_everything_was_read(data_folder: Path) -> None:
    report = verify(data_folder, sample=1)
    manifest = damage.manifest_of(data_folder)
    assert report.ok
    assert report.digest == manifest["digest"]
    assert report.shards == len(manifest["shards"])
    assert report.bytes == sum(path.stat().st_size for path in data_folder.glob("*.tar"))
    for name in ("blocks", "graphs", "edges"):
        assert getattr(report, name) == sum(split[name] for split in manifest["splits"].values())
    assert report.recomputed == report.blocks


def test_the_sample(data_folder: Path) -> None:
    """One block of each shard at least, and the share that was asked for."""
    assert verify(data_folder, sample=0).recomputed == 0
    few, half = verify(data_folder, sample=1e-9).recomputed, verify(data_folder, sample=0.5).recomputed
    assert few == len(damage.manifest_of(data_folder)["shards"]) < half < len(damage.block_rows(data_folder))


def skewed(rng: np.random.Generator, i: int) -> Crystal:
    """Any cell, however skewed, with atoms on its faces and corners, outside it, and far away from the origin."""
    cell = rng.normal(size=(3, 3)) + 3 * np.eye(3)
    cell *= (rng.uniform(8, 40) * 4 / abs(np.linalg.det(cell))) ** (1 / 3)
    shear = np.eye(3) + np.triu(rng.integers(-3, 4, (3, 3)), 1)
    at = rng.choice([0.0, 0.5, 1.0, -1e-17, 1e-9, 1 - 1e-9, 0.25, 7.75], (4, 3)) + rng.uniform(0, 0.3, (4, 3)).round(1)
    cell = shear @ cell
    return Crystal(
        f"skewed-{i}", cell, at @ cell, rng.integers(1, 119, 4).astype(np.uint8), {"gap": float(i % 2) or np.nan}
    )


def large(i: int, side: float = 120.0, step: float = 1.25) -> Crystal:
    """A chain whose fourth neighbours are ties at the cutoff, or just too far."""
    z = np.arange(0, side, step) + 0.123456789 * i
    row = np.column_stack([np.full_like(z, 7.7777777), np.full_like(z, 3.3333333), z])
    return Crystal(f"large-{i}-{step}", np.diag([8.0, 7.0, side]), row, np.full(len(z), 6, np.uint8))


def test_rounding_is_no_damage(tmp_path: Path, aflow: list[Crystal]) -> None:
    """Ties at the cutoff, atoms on faces, cells of 120 Å and skewed ones, labels with holes; blocks packed twice."""
    rng = np.random.default_rng(0)
    cubic = [Crystal(f"tie-{n}", (5.0 / n) * np.eye(3), np.zeros((1, 3)), np.array([29], np.uint8)) for n in (1, 2)]
    crystals = [
        *(skewed(rng, i) for i in range(300)),
        *(large(i, step=step) for i in range(8) for step in (1.25, 1.250001)),
        *cubic,
        *aflow[120:200],
    ]
    several = {"budget": Budget(edges=4_096, atoms=512, graphs=64), "bucket_bytes": 2**16, "blocks_per_shard": 7}
    splits = {"val": 0.2, "test": 0.2, "labels": {"gap": "gap"}, "fingerprints": False, "duplicates": "keep"}
    settings = ShardSettings(**several, **splits)
    shard([from_crystals(crystals)], tmp_path / "d", settings)
    report = verify(tmp_path / "d", sample=1)
    assert [str(finding) for finding in report.findings] == []
    assert report.graphs > 250
    assert len(list((tmp_path / "d" / "graphs.parquet").iterdir())) > 3


def test_the_wide_index(tmp_path: Path) -> None:
    """Cells of 400 Å, where f32 positions are off by more than the margin of the cutoff."""
    chains = [large(i, side=400.0, step=step) for i in range(5) for step in (1.25, 1.250001)]
    shard([from_crystals(chains)], tmp_path / "d", ShardSettings(val=0, duplicates="keep"))
    assert damage.manifest_of(tmp_path / "d")["graph"]["index_dtype"] == "uint16"
    report = verify(tmp_path / "d", sample=1)
    assert [str(finding) for finding in report.findings] == []
    assert report.graphs == 10


def test_workers_find_the_same(folder: Path) -> None:
    damage.change_bytes(folder / "train-000001.tar", 3_000, b"!")
    (folder / "train-000003.tar").unlink()
    one, two = verify(folder), verify(folder, Executor(2))
    assert one.findings
    assert one == two


# -- inside a block ----------------------------------------------------------------------------------------------------


def between_atoms(c: Content) -> int:
    return int(np.flatnonzero(c["edge_src"] != c["edge_dst"])[0])


def without(c: Content, edges: Any) -> None:
    """Take edges out of the first graph."""
    before = len(c["edge_src"])
    for name in EDGES:
        c[name] = np.delete(c[name], edges, axis=0)
    c["n_edges"][0] -= before - len(c["edge_src"])


def nothing(c: Content) -> None:
    pass


def index_outside(c: Content) -> None:
    c["edge_dst"][between_atoms(c)] = 200


def other_of_the_pair(c: Content) -> None:
    e = between_atoms(c)
    c["edge_src"][e], c["edge_dst"][e] = c["edge_dst"][e], c["edge_src"][e]
    c["edge_shift"][e] *= -1


def other_of_an_atoms_own_pair(c: Content) -> None:
    c["edge_shift"][np.flatnonzero(c["edge_src"] == c["edge_dst"])[0]] *= -1


def an_edge_to_itself(c: Content) -> None:
    c["edge_shift"][np.flatnonzero(c["edge_src"] == c["edge_dst"])[0]] = 0


def two_swapped(c: Content) -> None:
    for name in EDGES:
        c[name][[0, 1]] = c[name][[1, 0]]


def one_twice(c: Content) -> None:
    for name in EDGES:
        c[name][1] = c[name][0]


def one_missing(c: Content) -> None:
    without(c, [3])


def an_atom_isolated(c: Content) -> None:
    mine = slice(0, int(c["n_edges"][0]))
    without(c, np.flatnonzero((c["edge_src"][mine] == 1) | (c["edge_dst"][mine] == 1)))


def another_image(c: Content) -> None:
    c["edge_shift"][between_atoms(c), 2] = 100


def out_of_the_cell(c: Content) -> None:
    """An atom one cell further, all its edges with it: the same crystal, not wrapped."""
    c["positions"][1] += c["lattice"][0][0]
    mine = slice(0, int(c["n_edges"][0]))
    src, dst = c["edge_src"][mine] == 1, c["edge_dst"][mine] == 1
    c["edge_shift"][mine, 0] += src.astype(np.int8) - dst.astype(np.int8)


def a_position_that_is_no_number(c: Content) -> None:
    c["positions"][2, 1] = np.nan


def an_infinite_cell(c: Content) -> None:
    c["lattice"][0, 0, 0] = np.inf


def element_0(c: Content) -> None:
    c["atomic_numbers"][0] = 0


def element_119(c: Content) -> None:
    c["atomic_numbers"][0] = 119


def scaled(factor: float) -> Callable[[Content], None]:
    def change(c: Content) -> None:
        c["lattice"] *= np.float32(factor)
        c["positions"] *= np.float32(factor)

    change.__name__ = f"scaled_{factor}"
    return change


def a_flat_cell(c: Content) -> None:
    c["lattice"][0][2] = c["lattice"][0][1]


def no_cell(c: Content) -> None:
    c["lattice"][0] = 0


def two_atoms_together(c: Content) -> None:
    c["positions"][1] = c["positions"][0] + np.float32(0.05)


def an_extra_label(c: Content) -> None:
    c["labels"]["gap"] = np.zeros(len(c["keys"]), np.float32)


def no_key(c: Content) -> None:
    c["keys"][0] = ""


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (nothing, set()),
        (index_outside, {"index"}),
        (other_of_the_pair, {"not_canonical", "order", "incomplete"}),
        (other_of_an_atoms_own_pair, {"not_canonical", "incomplete"}),
        (an_edge_to_itself, {"not_canonical", "too_close", "incomplete"}),
        (two_swapped, {"order"}),
        (one_twice, {"order", "incomplete"}),
        (one_missing, {"incomplete"}),
        (an_atom_isolated, {"isolated_atom", "incomplete"}),
        (another_image, {"too_long", "incomplete"}),
        (out_of_the_cell, {"unwrapped"}),
        (a_position_that_is_no_number, {"not_finite"}),
        (an_infinite_cell, {"not_finite", "graph_table"}),
        (element_0, {"species", "graph_table"}),
        (element_119, {"species", "graph_table"}),
        (scaled(1.02), {"too_long"}),
        (scaled(0.98), {"incomplete"}),
        (scaled(10), {"volume", "too_long"}),
        (scaled(0.4), {"volume", "incomplete"}),
        (a_flat_cell, {"singular_cell", "too_long"}),
        (no_cell, {"singular_cell", "too_long", "too_close"}),
        (two_atoms_together, {"too_close", "too_long"}),
        (an_extra_label, {"labels"}),
        (no_key, {"key"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_signed_damage_in_a_block(folder: Path, change: Callable[[Content], None], found: set[str]) -> None:
    """All checksums and counts fit: only the check of the invariant itself can tell."""
    damage.change_block(folder, 0, change)
    report = verify(folder, sample=1)
    assert codes(report) == found
    row = damage.block_rows(folder)[0]
    for finding in report.findings:
        in_shard = ("train-000000.tar", row["offset"], row["size"])
        in_table = ("graphs.parquet", None, None)
        where = in_table if finding.code == "graph_table" else in_shard
        assert (finding.file, finding.offset, finding.size, finding.block) == (*where, 0)


def test_a_finding_names_the_crystal_and_how_often(folder: Path) -> None:
    def last_atoms(c: Content) -> None:
        c["atomic_numbers"][-2:] = 200

    damage.change_block(folder, 2, last_atoms)
    found = next(f for f in verify(folder).findings if f.code == "species")
    keys = damage.decode(damage.read_block(folder, 2))
    owners = np.repeat(np.arange(len(keys)), keys.n_atoms)[-2:]
    assert (found.key, found.count) == (keys.keys[owners[0]], 2)


def test_what_is_not_in_the_sample_is_not_built_again(folder: Path) -> None:
    damage.change_block(folder, 1, one_missing)
    assert verify(folder, sample=0).ok
    assert codes(verify(folder, sample=1)) == {"incomplete"}


def test_pairs_of_an_atom_that_is_wrapped_again(folder: Path) -> None:
    """Built again, an atom may come out on the other side of its cell; its missing edges are found all the same."""
    removed = 0

    def change(c: Content) -> None:
        nonlocal removed
        out_of_the_cell(c)
        before = len(c["edge_src"])
        an_atom_isolated(c)
        removed = before - len(c["edge_src"])

    damage.change_block(folder, 0, change)
    found = {finding.code: finding.count for finding in verify(folder, sample=1).findings}
    assert found == {"unwrapped": 1, "isolated_atom": 1, "incomplete": removed}


def test_a_block_of_the_other_width(folder: Path) -> None:
    damage.change_block(folder, 4, nothing, np.uint16)
    assert codes(verify(folder)) == {"index_dtype"}


@pytest.mark.parametrize("data", [b"", b"no block", struct.pack("<Q", 2**60) + b"{}"], ids=["empty", "text", "huge"])
def test_signed_bytes_that_are_no_block(folder: Path, data: bytes) -> None:
    damage.replace_block(folder, 5, data)
    report = verify(folder)
    assert codes(report) == {"undecodable"}
    assert report.blocks == len(damage.block_rows(folder)) - 1


def test_a_block_that_only_we_could_read(folder: Path) -> None:
    """A hole between two arrays: our views do not mind, safetensors does."""
    data = damage.read_block(folder, 5)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    end = max(entry["data_offsets"][1] for name, entry in header.items())
    begin, last = header["key"]["data_offsets"]
    header["key"]["data_offsets"] = [end + 8, end + 8 + last - begin]
    text = json.dumps(header).encode()
    body = data[8 + size :]
    damage.replace_block(folder, 5, struct.pack("<Q", len(text)) + text + body + bytes(8) + body[begin:last])
    with pytest.raises(safetensors.SafetensorError):
        safetensors.numpy.load(damage.read_block(folder, 5))
    assert codes(verify(folder)) == {"undecodable"}


# -- bytes of files ----------------------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_in_a_shard_is_named(folder: Path) -> None:
    """The first bad byte range holds it, in a block as in a header, in padding as behind the end."""
    rng = random.Random(0)
    path = folder / "train-000001.tar"
    good = path.read_bytes()
    rows = [row for row in damage.block_rows(folder) if row["shard"] == 1]
    ends = [row["offset"] + row["size"] for row in rows]
    special = [0, 100, 148, 156, 511, 512, *ends, ends[-1] + 600, ends[-1] + 1_200, len(good) - 1]
    for at in [*special, *(rng.randrange(len(good)) for _ in range(25))]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :])
        first = verify(folder).first_bad
        assert first is not None, at
        assert first.file == path.name
        assert first.offset is not None and first.size is not None
        assert first.offset <= at < first.offset + first.size <= len(good), at
        if any(row["offset"] <= at < row["offset"] + row["size"] for row in rows):
            assert first.code == "xxh3"
        if at < 512 or ends[0] <= at < ends[0] + 512:
            assert first.size == 512


@pytest.mark.parametrize(
    "name", ["blocks.parquet", "quarantine.jsonl", "graphs.parquet/part-00000.parquet", "manifest.json"]
)
def test_a_flipped_bit_anywhere_in_a_table_is_noticed(folder: Path, name: str) -> None:
    rng = random.Random(1)
    good = (folder / name).read_bytes()
    for _ in range(8):
        at = rng.randrange(len(good))
        (folder / name).write_bytes(good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :])
        report = verify(folder)
        assert any(finding.file == name for finding in report.findings)
        assert report.first_bad is not None and report.first_bad.file == name


@pytest.mark.parametrize("keep", [0, 300, 512, 2_000, -1, -5_000])
def test_a_shard_that_is_cut(folder: Path, keep: int) -> None:
    path = folder / "val-000007.tar"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    report = verify(folder)
    size = next(f for f in report.findings if f.code == "size")
    assert (size.offset, size.size) == (len(data[:keep]), len(data) - len(data[:keep]))
    rows = [row for row in damage.block_rows(folder) if row["shard"] == 7]
    lost = {row["block"] for row in rows if row["offset"] + row["size"] > len(data[:keep])}
    assert {f.block for f in report.findings if f.code == "cut"} == lost
    assert report.blocks == len(damage.block_rows(folder)) - len(lost)


def test_a_shard_with_something_behind_it(folder: Path) -> None:
    with open(folder / "train-000000.tar", "ab") as file:
        file.write(b"more")
    assert codes(verify(folder)) == {"tar", "size", "sha256"}
    damage.sign(folder)
    assert codes(verify(folder)) == {"tar"}


@pytest.mark.parametrize(
    "name", ["train-000002.tar", "blocks.parquet", "quarantine.jsonl", "graphs.parquet/part-00001.parquet"]
)
def test_a_missing_file_hides_nothing_else(folder: Path, name: str) -> None:
    damage.change_bytes(folder / "train-000004.tar", 4_000, b"!!!")
    (folder / name).unlink()
    report = verify(folder)
    assert name in {finding.file for finding in report.findings if finding.code == "missing"}
    assert "sha256" in {finding.code for finding in report.findings if finding.file == "train-000004.tar"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(folder: Path) -> None:
    (folder / "train-000002.tar").chmod(0)
    assert codes(verify(folder)) == {"unreadable"}


@pytest.mark.parametrize("name", ["train-000099.tar", "graphs.parquet/part-00099.parquet", "graphs.parquet/.hidden"])
def test_a_file_that_a_reader_would_take_for_a_part(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    (folder / "README.md").write_text("notes are nobody's business")
    report = verify(folder)
    assert [(f.code, f.file) for f in report.findings] == [("unlisted", name)]


# -- signed damage of the tar file -------------------------------------------------------------------------------------


def header(folder: Path, change: Callable[[bytearray], None]) -> None:
    """Change the first header of a shard, give it the right checksum, and sign."""
    path = folder / "train-000000.tar"
    record = bytearray(path.read_bytes()[:512])
    change(record)
    record[148:156] = b" " * 8
    record[148:156] = f"{sum(record):06o}\0 ".encode()
    damage.change_bytes(path, 0, bytes(record))
    damage.sign(folder)


def renamed(record: bytearray) -> None:
    record[:9] = b"000000007"


def no_block_name(record: bytearray) -> None:
    record[:3] = b"../"


def a_link(record: bytearray) -> None:
    record[156:157] = b"2"


def claims_8_gigabytes(record: bytearray) -> None:
    record[124:136] = b"77777777777\0"


def claims_nothing(record: bytearray) -> None:
    record[124:136] = b"00000000000\0"


@pytest.mark.parametrize("change", [renamed, no_block_name, a_link, claims_8_gigabytes, claims_nothing])
def test_signed_damage_of_a_header(folder: Path, change: Callable[[bytearray], None]) -> None:
    """The blocks themselves are good, and are read from where the table says they are."""
    header(folder, change)
    report = verify(folder)
    assert codes(report) == {"tar"}
    assert report.blocks == len(damage.block_rows(folder))


def test_a_tar_file_without_an_end(folder: Path) -> None:
    rows = [row for row in damage.block_rows(folder) if row["shard"] == 0]
    path = folder / "train-000000.tar"
    end = -(-(rows[-1]["offset"] + rows[-1]["size"]) // 512) * 512
    for extra in (0, 512):
        path.write_bytes(path.read_bytes()[:end] + bytes(extra))
        damage.sign(folder)
        assert codes(verify(folder)) == {"tar"}


# -- signed damage of the tables ---------------------------------------------------------------------------------------


def wrong_checksum(rows: list[Content]) -> None:
    rows[3]["xxh3"] ^= 1


def one_atom_more(rows: list[Content]) -> None:
    rows[3]["atoms"] += 1


def moved(rows: list[Content]) -> None:
    rows[3]["offset"] += 512


def behind_the_end(rows: list[Content]) -> None:
    rows[3]["offset"] = 2**63


def numbered_twice(rows: list[Content]) -> None:
    rows[3]["block"] = 2


def left_out(rows: list[Content]) -> None:
    del rows[-1]


def in_no_shard(rows: list[Content]) -> None:
    rows[3]["shard"] = 77


def in_another_split(rows: list[Content]) -> None:
    rows[3]["split"] = 1


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (wrong_checksum, {"xxh3"}),
        (one_atom_more, {"counts"}),
        (moved, {"tar", "xxh3"}),
        (behind_the_end, {"tar", "cut", "block_table"}),
        (numbered_twice, {"block_table", "tar", "graph_table"}),
        (left_out, {"counts", "tar", "graph_table"}),
        (in_no_shard, {"block_table", "tar"}),
        (in_another_split, {"block_table", "counts"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_signed_damage_of_the_block_table(
    folder: Path, change: Callable[[list[Content]], None], found: set[str]
) -> None:
    damage.change_blocks(folder, change)
    assert codes(verify(folder)) == found


def test_a_block_table_with_other_columns(folder: Path) -> None:
    """The blocks are read all the same, by the members of the shards."""
    pq.write_table(pq.read_table(folder / "blocks.parquet").drop(["xxh3"]), folder / "blocks.parquet")
    damage.sign(folder)
    report = verify(folder)
    assert codes(report) == {"block_table"}
    assert report.graphs == 118


def another_key(rows: list[Content]) -> None:
    rows[2]["key"] = "other"


def another_formula(rows: list[Content]) -> None:
    rows[2]["formula"] = "Xx"


def another_volume(rows: list[Content]) -> None:
    rows[2]["volume"] *= 1.001


def another_number_of_edges(rows: list[Content]) -> None:
    rows[2]["n_edges"] += 2


def another_split(rows: list[Content]) -> None:
    rows[2]["split"] = "test"


def no_key_at_all(rows: list[Content]) -> None:
    rows[2]["key"] = None


def one_row_less(rows: list[Content]) -> None:
    del rows[2]


def out_of_order(rows: list[Content]) -> None:
    rows.reverse()


def of_a_block_that_is_not_there(rows: list[Content]) -> None:
    rows[-1]["block"] = 4_000_000_000


@pytest.mark.parametrize(
    "change",
    [
        another_key,
        another_formula,
        another_volume,
        another_number_of_edges,
        another_split,
        no_key_at_all,
        one_row_less,
        out_of_order,
        of_a_block_that_is_not_there,
    ],
)
def test_signed_damage_of_the_graph_table(folder: Path, change: Callable[[list[Content]], None]) -> None:
    damage.change_graphs(folder, change)
    report = verify(folder)
    assert codes(report) == {"graph_table"}
    assert report.graphs == 118


def test_a_graph_table_with_other_columns(folder: Path) -> None:
    path = folder / "graphs.parquet/part-00000.parquet"
    pq.write_table(pq.read_table(path, partitioning=None).drop(["group"]), path)
    damage.sign(folder)
    report = verify(folder)
    assert codes(report) == {"graph_table"}
    assert "group" in str(report.findings[0])


@pytest.mark.parametrize("at_once", [2**24, 10])
def test_one_key_for_two_crystals(folder: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """In two blocks, each of which is right by itself; hashes are compared all at once, or a few at a time."""
    monkeypatch.setattr(verify_graphs, "KEYS_AT_ONCE", at_once)
    key = damage.decode(damage.read_block(folder, 20)).keys[0]
    damage.change_block(folder, 0, lambda c: c["keys"].__setitem__(0, key))
    report = verify(folder)
    assert [(f.code, f.key, f.count) for f in report.findings] == [("duplicate_key", key, 2)]


@pytest.mark.parametrize("at_once", [2**24, 10])
def test_a_group_in_two_splits(folder: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(verify_graphs, "KEYS_AT_ONCE", at_once)
    of_val = pq.read_table(folder / "graphs.parquet/part-00001.parquet", partitioning=None)["group"][0].as_py()
    damage.change_graphs(folder, lambda rows: rows[5].update(group=of_val))
    report = verify(folder)
    assert [f.code for f in report.findings] == ["straddle"]
    assert repr(of_val) in report.findings[0].text


def test_many_repeated_keys_are_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_graphs, "_NAMED", 3)
    path = folder / "graphs.parquet/part-00000.parquet"
    table = pq.read_table(path, partitioning=None)
    pq.write_table(pa.concat_tables([table, table]), path)
    damage.sign(folder)
    repeated = [f for f in verify(folder).findings if f.code == "duplicate_key"]
    assert len(repeated) == 4
    assert repeated[-1].count == len(table) - 3


def test_the_quarantine(folder: Path) -> None:
    path = folder / "quarantine.jsonl"
    good = path.read_bytes()
    for damaged, found in [
        (good.splitlines(keepends=True)[0], {"counts"}),
        (good + b"{}\n", {"quarantine"}),
        (good + b"[[[[\n", {"quarantine"}),
        (good.replace(b"oversized", b"oversight", 1), {"counts"}),
    ]:
        path.write_bytes(damaged)
        damage.sign(folder)
        assert codes(verify(folder)) == found


def smaller_budget(content: Content) -> None:
    content["budget"]["atoms"] = 60


def other_totals(content: Content) -> None:
    content["splits"]["train"]["graphs"] -= 1


@pytest.mark.parametrize(("change", "found"), [(smaller_budget, {"budget", "block_table"}), (other_totals, {"counts"})])
def test_a_manifest_that_says_otherwise(folder: Path, change: Callable[[Content], None], found: set[str]) -> None:
    damage.change_manifest(folder, change)
    assert codes(verify(folder)) == found


MALFORMED: list[tuple[str, Callable[[Content], object]]] = [
    ("cutoff", lambda c: c["graph"].update(cutoff="5")),
    ("endless", lambda c: c["graph"].update(cutoff=1e9)),
    ("width", lambda c: c["graph"].update(index_dtype="object")),
    ("budget", lambda c: c["budget"].update(edges=None)),
    ("no budget", lambda c: c.pop("budget")),
    ("outside", lambda c: c["shards"][0].update(name="../train-000000.tar")),
    ("twice", lambda c: c["shards"].append(c["shards"][0])),
    ("tables", lambda c: c["tables"].update({"../../etc/passwd": "0" * 64})),
    ("no table", lambda c: c["tables"].pop("blocks.parquet")),
    ("splits", lambda c: c["splits"].pop("test")),
    ("negative", lambda c: c["splits"]["train"].update(graphs=-1)),
    ("shards", lambda c: c.update(shards={"a": 1})),
    ("labels", lambda c: c.update(labels=[1])),
    ("unknown field", lambda c: c.update(extra=1)),
]


@pytest.mark.parametrize("change", [change for _, change in MALFORMED], ids=[name for name, _ in MALFORMED])
def test_a_signed_manifest_that_is_malformed(folder: Path, change: Callable[[Content], object]) -> None:
    damage.change_manifest(folder, change)
    assert codes(verify(folder)) == {"manifest"}


# -- behind a URL ------------------------------------------------------------------------------------------------------


@pytest.fixture
def url(folder: Path) -> Iterator[str]:
    """The copy, in fsspec's memory."""
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder}/", "/verify/set/", recursive=True)
    yield "memory://verify/set"
    memory.rm("/verify", recursive=True)


def test_a_data_set_behind_a_url(url: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(url, sample=1) == verify(folder, sample=1)
    assert main([url, "--workers", "1"]) == 0
    assert main([f"file://{folder}", "--workers", "1"]) == 0
    with fsspec.open(f"{url}/val-000006.tar", "r+b") as file:
        file.seek(700)
        file.write(b"!!")
    with fsspec.open(f"{url}/more.tar", "wb") as file:
        file.write(b"")
    fsspec.filesystem("memory").rm("/verify/set/train-000001.tar")
    report = verify(url)
    assert {(f.code, f.file) for f in report.findings} == {
        ("unlisted", "more.tar"),
        ("missing", "train-000001.tar"),
        ("xxh3", "val-000006.tar"),
        ("sha256", "val-000006.tar"),
    }


def test_urls_that_lead_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory://verify/none"]) == 2
    assert main(["nowhere://verify/none"]) == 2
    assert main(["http://127.0.0.1:9/none"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert all(line.startswith("error: ") for line in said)


def test_a_manifest_behind_a_url_that_is_damaged(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with fsspec.open(f"{url}/manifest.json", "wb") as file:
        file.write(b'{"format": "cdssl-shards", "version": 1}')
    assert main([url]) == 1
    assert "digest" in capsys.readouterr().out


# -- the command -------------------------------------------------------------------------------------------------------


def test_damage_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = damage.block_rows(folder)[7]
    name = damage.manifest_of(folder)["shards"][row["shard"]]["name"]
    damage.change_bytes(folder / name, row["offset"] + 100, b"\xff\xff")
    assert main([str(folder), "--json", "--workers", "1"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert answer["first_bad"] == {"file": name, "offset": row["offset"], "size": row["size"]}
    assert answer["counts"] == {"xxh3": 1, "sha256": 1}
    assert {f["code"]: f["block"] for f in answer["findings"]} == {"xxh3": 7, "sha256": None}
    assert answer["checked"]["blocks"] == len(damage.block_rows(folder)) - 1
    assert answer["digest"] == damage.manifest_of(folder)["digest"]


def test_damage_for_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = damage.block_rows(folder)[0]
    damage.change_bytes(folder / "train-000000.tar", row["offset"] + 100, b"\xff\xff")
    assert main([str(folder), "--workers", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == f"first bad bytes: train-000000.tar, offset {row['offset']}, size {row['size']}"
    assert lines[-1] == f"damaged: {folder}: 2 findings"


def test_a_hostile_key_does_not_reach_the_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def hostile(c: Content) -> None:
        c["keys"][0] = "\x1b[2J\x1b]0;pwned\x07" + "x" * 1_000
        c["atomic_numbers"][0] = 0

    damage.change_block(folder, 0, hostile)
    assert main([str(folder), "--workers", "1"]) == 1
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\x07" not in said
    assert max(map(len, said.splitlines())) < 400


def test_wrong_use(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    assert main([str(tmp_path)]) == 2
    assert main([str(folder), "--sample", "2"]) == 2
    damage.change_manifest(folder, lambda content: content.update(version=2))
    assert main([str(folder)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in said)
    assert "update it" in said[-1]


def test_a_manifest_changed_by_hand(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = damage.manifest_of(folder)
    content["sources"][0]["licence"] = "do what you like"
    (folder / "manifest.json").write_text(json.dumps(content))
    assert main([str(folder)]) == 1
    assert "digest" in capsys.readouterr().out


def test_budgets_are_those_of_the_data_set(data_folder: Path) -> None:
    """The fixture has a budget of its own, so that the check of budgets is not one of the default."""
    assert Budget(**damage.manifest_of(data_folder)["budget"]) != Budget()
