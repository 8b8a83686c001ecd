"""Subsets of a data set: crystals are selected by their rows, and only blocks that hold some are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from cdssl_dist.data.dataset import DataSet
from cdssl_dist.data.labeled import load_labeled
from cdssl_dist.data.subset import condition, elements, read, select
from sharding.block import Budget, decode
from sharding.crystal import Crystal
from sharding.manifest import DataSetError
from sharding.pipeline import shard
from sharding.settings import ShardSettings
from sharding.sources import from_crystals


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, aflow: list[Crystal]) -> Path:
    """60 crystals in some ten blocks; the label ``e`` is a number on two of three."""
    crystals = [replace(c, labels={"e": float(i)} if i % 3 else {}) for i, c in enumerate(aflow[:60])]
    out = tmp_path_factory.mktemp("labeled") / "data"
    settings = ShardSettings(budget=Budget(edges=2_048, atoms=256, graphs=8), val=0.3, labels={"e": "column"})
    shard([from_crystals(crystals)], out, settings)
    return out


@pytest.fixture(scope="module")
def data(folder: Path) -> DataSet:
    return DataSet(folder)


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[dict[str, object]]:
    """The graph table, as plain Python."""
    return pq.read_table(folder / "graphs.parquet").to_pylist()


def blocks_read(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    plain = DataSet.read
    monkeypatch.setattr(DataSet, "read", lambda self, block: seen.append(block) or plain(self, block))
    return seen


CONDITIONS = [
    ("n_atoms <= 6", lambda r: r["n_atoms"] <= 6),
    ("2 < n_atoms <= 6 and volume > 50", lambda r: 2 < r["n_atoms"] <= 6 and r["volume"] > 50),
    ("not n_atoms > 6 or formula == 'ClNa'", lambda r: r["n_atoms"] <= 6 or r["formula"] == "ClNa"),
    ("y.e is None", lambda r: r["y.e"] is None or np.isnan(r["y.e"])),
    ("y.e is not None and y.e != 4", lambda r: not np.isnan(r["y.e"]) and r["y.e"] != 4),
    ("n_atoms in [2, 4] and split not in ('val',)", lambda r: r["n_atoms"] in (2, 4) and r["split"] != "val"),
    ("not y.e < 30", lambda r: not r["y.e"] < 30),
    ("10 > y.e >= -1.5", lambda r: 10 > r["y.e"] >= -1.5),
]


@pytest.mark.parametrize(("where", "meets"), CONDITIONS)
def test_conditions_choose_as_python_would(data: DataSet, rows: list[dict], where: str, meets: object) -> None:
    expected = {r["key"] for r in rows if meets(r)}  # type: ignore[operator]
    assert 0 < len(expected) < len(rows)
    assert set(select(data, where=where)["key"].to_pylist()) == expected


def test_what_is_read_is_what_the_rows_name(data: DataSet, rows: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = select(data, split="val", where="n_atoms > 2", columns=["group"])
    expected = {r["key"]: r for r in rows if r["split"] == "val" and r["n_atoms"] > 2}
    assert {key: group for key, _, group in zip(*chosen.to_pydict().values(), strict=True)} == {
        key: r["group"] for key, r in expected.items()
    }
    seen = blocks_read(data, monkeypatch)
    graphs = read(data, chosen)
    assert graphs.keys == chosen["key"].to_pylist()
    assert [int(n) for n in graphs.n_atoms] == [expected[key]["n_atoms"] for key in graphs.keys]
    np.testing.assert_array_equal(graphs.labels["e"], [expected[key]["y.e"] for key in graphs.keys])
    assert seen == sorted({r["block"] for r in expected.values()})
    assert len(seen) < len(data.checksums)


def test_a_list_of_keys_gives_its_order(data: DataSet, rows: list[dict]) -> None:
    keys = [str(r["key"]) for r in rows][::-7]
    graphs = read(data, select(data, keys=keys))
    assert graphs.keys == keys
    whole = {
        key: (g, i) for b in range(len(data.checksums)) for g in [decode(data.read(b))] for i, key in enumerate(g.keys)
    }
    for place, key in enumerate(keys):
        found, stored = graphs.take(np.array([place])), whole[key][0].take(np.array([whole[key][1]]))
        for name, array in found.arrays().items():
            np.testing.assert_array_equal(array, stored.arrays()[name])


def test_rows_that_have_a_value(data: DataSet, rows: list[dict]) -> None:
    expected = {r["key"] for r in rows if not np.isnan(r["y.e"])}
    assert set(select(data, having=["y.e"])["key"].to_pylist()) == expected
    with pytest.raises(DataSetError, match=r"no column 'y.f'; did you mean 'y.e'"):
        select(data, having=["y.f"])


def test_keys_that_do_not_exist_are_named(data: DataSet, rows: list[dict]) -> None:
    keys = [str(r["key"]) for r in rows]
    with pytest.raises(DataSetError, match="2 of 62 keys are not in it: 'nobody', 'nothing'"):
        select(data, keys=[*keys, "nobody", "nothing"])
    with pytest.raises(DataSetError, match=r"1 of .* keys are not in it: 'nobody'"):
        select(data, keys=[*keys, "nobody"], where="n_atoms == 2")
    two = select(data, keys=keys, where="n_atoms == 2")
    assert two["key"].to_pylist() == [r["key"] for r in rows if r["n_atoms"] == 2]  # others are there, and left out


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("natoms < 3", "no column 'natoms'; did you mean 'n_atoms'"),
        ("n_atoms <", "cannot read the condition"),
        ("n_atoms", "expected a comparison"),
        ("1 < 2", "names no column"),
        ("__import__('os').getcwd() == 'a'", "cannot read the condition"),
        ("n_atoms in 'abc'", "needs a list"),
        ("n_atoms == None", "None cannot be used in a comparison"),
        ("n_atoms < 'three'", "cannot be read with the condition"),
        ("(" * 500 + "n_atoms < 3" + ")" * 500, "cannot read the condition"),
    ],
)
def test_conditions_that_make_no_sense(data: DataSet, where: str, message: str) -> None:
    with pytest.raises(DataSetError, match=message):
        select(data, where=where)


def test_nothing_that_meets_the_conditions_is_said(data: DataSet, rows: list[dict[str, object]]) -> None:
    with pytest.raises(DataSetError, match="no crystal meets the conditions"):
        read(data, select(data, where="n_atoms > 10000"))
    with pytest.raises(DataSetError, match="no crystal meets the conditions"):
        read(data, select(data, where="n_atoms > 10000", keys=[str(row["key"]) for row in rows[:3]]))
    with pytest.raises(DataSetError, match="no split 'trian'"):
        select(data, split="trian")


def test_conditions_are_expressions() -> None:
    assert str(condition("a.b < 3", ["a.b"])) == "(a.b < 3)"


def test_a_foreign_graph_table(folder: Path, data: DataSet) -> None:
    chosen = select(data, where="n_atoms <= 6")
    moved = chosen.set_column(1, "block", [np.roll(np.asarray(chosen["block"]), 5)])
    with pytest.raises(DataSetError, match=r"graphs.parquet belongs to another data set"):
        read(data, moved)


def test_elements_of_a_split(folder: Path, rows: list[dict]) -> None:
    with DataSet(folder) as data:
        for split in ("train", "val"):
            graphs = read(data, select(data, split=split))
            assert elements(data, split) == sorted(set(graphs.atomic_numbers.tolist()))


# -- labels ------------------------------------------------------------------------------------------------------------


def test_labeled_crystals_are_those_with_a_number(folder: Path, rows: list[dict]) -> None:
    found = load_labeled(str(folder), "e", 5.0)
    expected = {r["key"]: r for r in rows if not np.isnan(r["y.e"])}
    assert dict(zip(found.graphs.keys, found.targets[:, 0].tolist(), strict=True)) == {
        k: r["y.e"] for k, r in expected.items()
    }
    assert dict(zip(found.graphs.keys, found.groups, strict=True)) == {k: r["group"] for k, r in expected.items()}


def test_labeled_crystals_by_split_key_and_condition(folder: Path, rows: list[dict]) -> None:
    keys = [str(r["key"]) for r in rows][::-1]
    found = load_labeled(str(folder), "e", 5.0, "train", keys=keys, where="n_atoms <= 6")
    expected = [r for r in rows[::-1] if r["split"] == "train" and r["n_atoms"] <= 6 and not np.isnan(r["y.e"])]
    assert found.graphs.keys == [r["key"] for r in expected]
    assert found.targets[:, 0].tolist() == [r["y.e"] for r in expected]


def test_a_computed_target_needs_no_label(folder: Path, rows: list[dict]) -> None:
    found = load_labeled(str(folder), "computed:volume_per_atom", 5.0, "val")
    expected = {r["key"]: r["volume"] / r["n_atoms"] for r in rows if r["split"] == "val"}
    assert set(found.graphs.keys) == set(expected)
    np.testing.assert_allclose(found.targets[:, 0], [expected[key] for key in found.graphs.keys], rtol=1e-5)


def test_labeled_crystals_behind_a_url(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDSSL_CACHE", str(tmp_path))
    system = fsspec.filesystem("memory")
    system.put(str(folder), "/labeled/data", recursive=True)
    near, far = load_labeled(str(folder), "e", 5.0, "val"), load_labeled("memory://labeled/data", "e", 5.0, "val")
    assert far.graphs.keys == near.graphs.keys
    np.testing.assert_array_equal(far.targets, near.targets)
    np.testing.assert_array_equal(far.graphs.positions, near.graphs.positions)
    system.rm("/labeled", recursive=True)


def test_conditions_on_what_is_no_data_set() -> None:
    for more in ({"split": "val"}, {"where": "n_atoms == 2"}):
        with pytest.raises(DataSetError, match="not a data set of shards"):
            load_labeled("aflow:20", "computed:density", 5.0, **more)
    some = load_labeled("aflow:20", "computed:density", 5.0)
    keys = [some.graphs.keys[7], some.graphs.keys[3]]
    few = load_labeled("aflow:20", "computed:density", 5.0, keys=keys)
    assert few.graphs.keys == keys
    assert few.targets.tolist() == some.targets[[7, 3]].tolist()
    with pytest.raises(DataSetError, match="1 of 1 keys"):
        load_labeled("aflow:20", "computed:density", 5.0, keys=["nobody"])


def test_what_a_target_must_be(folder: Path) -> None:
    with pytest.raises(DataSetError, match="no label 'gap'; known are e"):
        load_labeled(str(folder), "gap", 5.0)
    with pytest.raises(DataSetError, match=r"a cutoff of 5.0 Å, the encoder needs 4.0"):
        load_labeled(str(folder), "e", 4.0)


def test_elements_of_some_blocks(data: DataSet) -> None:
    table = data.table("train")
    part = table.part(0.2)
    found = set()
    for block in part.block.tolist():
        found |= set(decode(data.read(block)).atomic_numbers.tolist())
    assert elements(data, "train", part.block) == sorted(found)
    assert set(elements(data, "train", part.block)) < set(elements(data, "train"))
