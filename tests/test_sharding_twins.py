"""Duplicates and leakage through all of sharding: copies in other cells are found, and kept if the settings say so."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from pymatgen.core import Lattice, Structure
from scipy.spatial.transform import Rotation
from test_format import optimade, refusals_of

from sharding.__main__ import main
from sharding.crystal import Crystal, reduced_formula
from sharding.manifest import DataSetError, read_manifest
from sharding.pipeline import StrictError, shard
from sharding.settings import Duplicates, ShardSettings
from sharding.sources import from_crystals


def disguised(crystal: Crystal, seed: int, scale: float = 1.0) -> Crystal:
    """The same crystal in a supercell, with another origin, orientation and order of atoms; twice scaled, if wanted."""
    rng = np.random.default_rng(seed)
    repeats = np.array([[1, 0, 0], [0, 2, 0], [1, 0, 1]]) if seed % 2 else np.array([[1, 1, 0], [0, 1, 0], [0, 0, 2]])
    cell = Structure(Lattice(crystal.lattice), crystal.atomic_numbers, crystal.positions, coords_are_cartesian=True)
    cell.make_supercell(repeats, to_unit_cell=True)
    order = rng.permutation(len(cell))
    turn = Rotation.random(random_state=seed).as_matrix()
    lattice = scale * cell.lattice.matrix @ turn
    positions = (scale * cell.cart_coords[order] + rng.uniform(-5, 5, 3)) @ turn
    return Crystal(f"copy of {crystal.key}", lattice, positions, np.array(cell.atomic_numbers, np.uint8)[order])


@pytest.fixture(scope="module")
def plain(aflow: list[Crystal]) -> list[Crystal]:
    """200 compounds, without the groups that their source gives them."""
    return [replace(crystal, group=None) for crystal in aflow[:200]]


def kept(folder: Path) -> dict[str, str]:
    """Key → split."""
    return {row["key"]: row["split"] for row in pq.read_table(folder / "graphs.parquet").to_pylist()}


def test_what_is_excluded_stays_out_in_any_disguise(plain: list[Crystal], tmp_path: Path) -> None:
    """Through the command: a labeled test set in other cells, some per cent larger, as another functional gives it."""
    test_set = [disguised(crystal, i, scale=1.03) for i, crystal in enumerate(plain[::5])]
    source = optimade(tmp_path / "all.parquet", plain, {})
    labeled = optimade(tmp_path / "test.parquet", test_set, {})
    command = [str(source), "--out", str(tmp_path / "d"), "--exclude", str(labeled), "--workers", "1"]
    assert main(command) == 0
    names = {crystal.key for crystal in plain[::5]}
    out = {r["key"]: r["text"] for r in refusals_of(tmp_path / "d") if r["code"] == "excluded"}
    assert names <= out.keys()
    assert not names & kept(tmp_path / "d").keys()
    assert len(out) < 1.2 * len(names)  # and hardly anything else
    assert read_manifest(tmp_path / "d").quarantined["excluded"] == len(out)


def test_only_some_of_a_file_are_excluded(
    plain: list[Crystal], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A labeled file holds its training part too; the keys of its test part say what is kept out."""
    labeled = optimade(tmp_path / "labeled.parquet", [disguised(c, i) for i, c in enumerate(plain[:20])], {})
    source = optimade(tmp_path / "all.parquet", plain, {})
    keys = [f"copy of {c.key}" for c in plain[:10]]
    (tmp_path / "test.txt").write_text("\n".join(keys) + "\n")
    command = [
        str(source),
        "--out",
        str(tmp_path / "d"),
        "--workers",
        "1",
        "--exclude-keys",
        str(tmp_path / "test.txt"),
    ]
    assert main(command) == 2
    assert "give --exclude too" in capsys.readouterr().err
    assert main([*command, "--exclude", str(labeled)]) == 0
    out = {r["text"] for r in refusals_of(tmp_path / "d") if r["code"] == "excluded"}
    assert out == {f"a twin of {key!r}, which is excluded" for key in keys}

    (tmp_path / "test.txt").write_text("\n".join([*keys, "JVASP-1"]))
    assert main([*command, "--exclude", str(labeled), "--out", str(tmp_path / "e")]) == 2
    assert "1 of 11 keys to exclude are in no excluded source: 'JVASP-1'" in capsys.readouterr().err


def test_an_excluded_crystal_that_cannot_be_compared_is_said(plain: list[Crystal], tmp_path: Path) -> None:
    """It keeps nothing out, which would be a leak that nobody sees."""
    thin = replace(plain[0], key="thin", lattice=100 * plain[0].lattice)
    shard([from_crystals(plain)], tmp_path / "d", exclude=[from_crystals([thin, plain[7]], "labeled")])
    (line,) = [r for r in refusals_of(tmp_path / "d") if r["code"] == "exclude_refused"]
    assert (line["key"], line["source"]) == ("thin", "labeled") and "[volume]" in line["text"]
    assert plain[0].key in kept(tmp_path / "d") and plain[7].key not in kept(tmp_path / "d")
    with pytest.raises(StrictError, match=r"labeled.*\[volume\]"):
        shard([from_crystals(plain)], tmp_path / "e", exclude=[from_crystals([thin], "labeled")], strict=True)


def test_a_twin_joins_the_group_that_a_source_names(plain: list[Crystal], tmp_path: Path) -> None:
    """Prototypes are split as wholes; the same compounds from another database must not land on the other side."""
    named = [replace(c, group=f"prototype {len(reduced_formula(c.atomic_numbers))}") for c in plain]
    copies = [disguised(c, i) for i, c in enumerate(plain)]
    settings = ShardSettings(duplicates="keep", val=0.5)
    shard([from_crystals(copies, "other"), from_crystals(named)], tmp_path / "d", settings)
    split = kept(tmp_path / "d")
    assert {"train", "val"} <= set(split.values())
    assert all(split[c.key] == split[f"copy of {c.key}"] for c in named)


@pytest.mark.parametrize(
    ("policy", "exact", "near"), [("keep", False, False), ("exact", True, False), ("near", True, True)]
)
def test_policies_of_duplicates(
    plain: list[Crystal], tmp_path: Path, policy: Duplicates, exact: bool, near: bool
) -> None:
    """Copies are dropped by "exact" and "near"; scaled by 3%, they are other crystals to "exact"."""
    same = [disguised(crystal, i) for i, crystal in enumerate(plain[:60])]
    larger = [disguised(replace(c, key=f"larger {c.key}"), i, 1.03) for i, c in enumerate(plain[60:120])]
    settings = ShardSettings(duplicates=policy)
    shard([from_crystals([*plain, *same, *larger])], tmp_path / "d", settings)
    dropped = {r["key"] for r in refusals_of(tmp_path / "d") if r["code"] == "duplicate"}

    def repeated(copies: list[Crystal], prefix: str) -> int:  # of a crystal and its copy, either may have gone
        return sum(bool({c.key, c.key.removeprefix(prefix)} & dropped) for c in copies)

    assert repeated(same, "copy of ") == (60 if exact else 0)
    assert repeated(larger, "copy of larger ") == (60 if near else 0)
    assert Counter([*kept(tmp_path / "d"), *dropped]) == Counter(c.key for c in [*plain, *same, *larger])


def test_twins_never_straddle_splits(plain: list[Crystal], tmp_path: Path) -> None:
    copies = [disguised(crystal, i, 1 + (i % 3) / 50) for i, crystal in enumerate(plain)]
    settings = ShardSettings(duplicates="keep", val=0.3, test=0.2, bucket_bytes=100_000)
    shard([from_crystals(plain), from_crystals(copies, "copies")], tmp_path / "d", settings)
    split = kept(tmp_path / "d")
    pairs = [(split[c.key], split[f"copy of {c.key}"]) for c in plain if c.key in split and f"copy of {c.key}" in split]
    assert len(pairs) > 190
    assert all(a == b for a, b in pairs)
    assert {"train", "val", "test"} == set(split.values())


def test_without_fingerprints_nothing_can_be_excluded(plain: list[Crystal], tmp_path: Path) -> None:
    settings = ShardSettings(fingerprints=False, duplicates="keep")
    with pytest.raises(DataSetError, match="--exclude compares fingerprints"):
        shard([from_crystals(plain)], tmp_path / "d", settings, exclude=[from_crystals(plain)])


def test_everything_is_excluded(plain: list[Crystal], tmp_path: Path) -> None:
    with pytest.raises(DataSetError, match=r"no crystal is left of python: \d+ × excluded"):
        shard([from_crystals(plain)], tmp_path / "d", exclude=[from_crystals(plain)])
