"""The map: its numbers are right, and its page works in a browser."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import act

from cdssl_dist.cli import main as cdssl
from cdssl_dist.look.map import neighbour_skill, read_map, reduced

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A curve in space, along which density grows; n_atoms is noise."""
    random = np.random.default_rng(0)
    t = np.sort(random.uniform(0, 3, 80))
    points = np.stack([np.cos(t), np.sin(t), t], axis=1) + random.normal(0, 0.01, (80, 3))
    columns = {
        "key": [HOSTILE, *(f"c-{i}" for i in range(1, 81))],
        "formula": ["NaCl", *["Cu"] * 80],
        "density": [*t, None],
        "n_atoms": random.integers(1, 9, 81),
        "embedding": [*points.tolist(), None],
    }
    path = tmp_path_factory.mktemp("map") / "e.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def test_neighbours_tell_what_the_map_keeps(vectors: Path) -> None:
    points = np.array(pq.read_table(vectors)["embedding"].to_pylist()[:80])
    t = np.array(pq.read_table(vectors)["density"].to_pylist()[:80])
    place = reduced(points, "tsne", 0)
    kept = neighbour_skill("density", t, place, points)
    assert kept.on_map > 0.8 and kept.in_vectors > 0.8
    noise = np.random.default_rng(1).normal(size=80)
    assert neighbour_skill("noise", noise, place, points).on_map < 0.1
    # The same by hand, for the vectors.
    distance = np.linalg.norm(points[:, None] - points[None], axis=2) + np.diag(np.full(80, np.inf))
    told = t[np.argsort(distance, axis=1)[:, :10]].mean(axis=1)
    assert kept.in_vectors == pytest.approx(1 - np.abs(told - t).mean() / np.abs(t - np.median(t)).mean())


def test_umap_is_used_where_it_is_installed(vectors: Path) -> None:
    pytest.importorskip("umap", reason="needs umap-learn: pip install cdssl-dist[umap]")
    points = np.array(pq.read_table(vectors)["embedding"].to_pylist()[:80])
    place = reduced(points, "umap", 0)
    assert place.shape == (80, 2) and np.isfinite(place).all()
    np.testing.assert_array_equal(place, reduced(points, "umap", 0))  # one seed, one map
    t = np.array(pq.read_table(vectors)["density"].to_pylist()[:80])
    assert neighbour_skill("density", t, place, points).on_map > 0.8


def test_columns_that_are_called_as_coordinates_often_are(vectors: Path, tmp_path: Path) -> None:
    table, x = pq.read_table(vectors), np.arange(81.0)
    for name in ("x", "y", "map_x"):  # the last one from a map before
        table = table.append_column(name, pa.array(x))
    pq.write_table(table, tmp_path / "named.parquet")
    assert cdssl(["map", str(tmp_path / "named.parquet"), "--out", str(tmp_path), "--method", "pca"]) == 0
    found = read_map(tmp_path)
    assert found.columns.keys() == {"density", "n_atoms", "x", "y"}
    np.testing.assert_array_equal(found.columns["x"], x[:80])
    written = pq.read_table(tmp_path / "map.parquet")
    np.testing.assert_array_equal(np.column_stack([written["map_x"], written["map_y"]]), found.place)
    assert not np.array_equal(found.place[:, 0], x[:80])


def test_without_umap_nothing_else_is_taken_silently(
    vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    assert cdssl(["map", str(vectors), "--out", str(tmp_path / "out"), "--method", "umap"]) == 2
    assert "pip install umap-learn, or use --method tsne" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


ACT = """
const out = document.querySelector("output");
said.columns = [...column.options].map(o => o.value);
const box = canvas.getBoundingClientRect(), [x, y] = place(0), s = canvas.width / box.width;
const at = {clientX: box.left + x / s, clientY: box.top + y / s};
canvas.dispatchEvent(new PointerEvent("pointermove", at)); said.at = out.textContent;
said.kept = document.getElementById("kept").textContent;
const before = canvas.toDataURL();
column.value = "n_atoms"; column.dispatchEvent(new Event("change"));
said.recoloured = canvas.toDataURL() !== before; said.low = document.getElementById("low").textContent;
find.value = "nacl"; find.dispatchEvent(new Event("input")); said.hits = document.getElementById("hits").textContent;
said.wide = document.documentElement.scrollWidth <= window.innerWidth;
"""


def test_the_page_in_a_browser(vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cdssl(["map", str(vectors), "--out", str(tmp_path), "--method", "pca"]) == 0
    assert "density" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"map.png", "map.html", "map.parquet"}
    assert len(pq.read_table(tmp_path / "map.parquet")) == 80
    said = act(tmp_path / "map.html", ACT, tmp_path)
    assert said["columns"] == ["density", "n_atoms"]
    assert said["at"].startswith(HOSTILE) and "density" in said["at"]  # shown as text
    assert said["recoloured"] and said["low"] == "1" and said["hits"] == "1 found" and said["wide"]


def test_what_cannot_be_mapped(vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = tmp_path / "few.parquet"
    pq.write_table(pq.read_table(vectors).slice(0, 5), few)
    for arguments, said in (
        ([str(few)], "too few"),
        ([str(vectors), "--color", "key"], "no numeric column 'key'; there are density, n_atoms"),
        ([str(tmp_path / "none.parquet")], "not a readable Parquet file"),
    ):
        assert cdssl(["map", *arguments, "--out", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
