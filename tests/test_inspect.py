"""``cdssl inspect``: its numbers agree with the blocks, and nothing in the data can run as code in the page."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import damage
import fsspec
import numpy as np
import pytest
from pymatgen.core import Element

from sharding.block import Budget
from sharding.crystal import ATOMIC_NUMBER, SYMBOLS, Crystal
from sharding.graph import Multigraphs, concatenate
from sharding.page import _place, page
from sharding.pipeline import shard
from sharding.settings import ShardSettings
from sharding.sources import from_crystals
from sharding.summary import inspect, main

REQUIRED = {"graphs", "atoms", "edges", "blocks", "shards", "fill", "bytes_per_edge", "quarantined", "digest"}
HOSTILE = '</title><script>alert("1")</script><img src=x onerror=alert(1)>\u202e\x1b[2J&amp;\''


@pytest.fixture(scope="module")
def stored(data_folder: Path) -> Multigraphs:
    """All graphs of the small data set, out of its shards."""
    rows = damage.block_rows(data_folder)
    return concatenate([damage.decode(damage.read_block(data_folder, row["block"])) for row in rows])


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory, aflow: list[Crystal]) -> Path:
    """A data set in which every text that a stranger chooses is markup."""
    folder = tmp_path_factory.mktemp("hostile") / "<b>bold"
    labels = {"gap": 1.0}
    crystals = [
        Crystal(f"{HOSTILE}{i}", c.lattice, c.positions, c.atomic_numbers, labels) for i, c in enumerate(aflow[:30])
    ]
    bad = Crystal(f"{HOSTILE}bad", np.zeros((3, 3)), np.zeros((1, 3)), np.array([1], np.uint8), position=HOSTILE)
    no_text = Crystal("\ud800", aflow[0].lattice, aflow[0].positions, aflow[0].atomic_numbers)
    about = {"licence": HOSTILE, "cite": HOSTILE, "units": {"gap": HOSTILE}}
    settings = ShardSettings(labels={"gap": HOSTILE}, fingerprints=False, duplicates="keep")
    shard([from_crystals([*crystals, bad, no_text], HOSTILE, **about)], folder, settings)

    def formula(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["formula"] = HOSTILE

    damage.change_graphs(folder, formula)
    return folder


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_counts_agree_with_the_blocks(data_folder: Path, stored: Multigraphs) -> None:
    found = inspect(data_folder)
    rows, manifest = damage.block_rows(data_folder), damage.manifest_of(data_folder)
    assert found["graphs"] == len(stored)
    assert found["atoms"] == len(stored.positions)
    assert found["edges"] == 2 * len(stored.edge_src)
    assert (found["blocks"], found["shards"]) == (len(rows), len(manifest["shards"]))
    assert found["fill"] == pytest.approx(found["edges"] / (len(rows) * 2_048))
    size = sum(path.stat().st_size for path in data_folder.glob("*.tar"))
    assert (found["bytes"], found["bytes_per_edge"]) == (size, pytest.approx(size / found["edges"]))
    assert found["quarantined"] == {"oversized": 2}
    assert found["digest"] == manifest["digest"]
    assert list(found["splits"]) == ["train", "val", "test"]
    assert sum(split["graphs"] for split in found["splits"].values()) == len(stored)


def test_sizes_agree_with_the_blocks(data_folder: Path, stored: Multigraphs) -> None:
    for name, values in (("atoms", stored.n_atoms.astype(int)), ("edges", 2 * stored.n_edges.astype(int))):
        sizes = inspect(data_folder)["sizes"][name]
        assert sizes["mean"] == pytest.approx(values.mean())
        assert sizes["max"] == values.max()
        assert sizes["median"] == np.quantile(values, 0.5, method="inverted_cdf")
        assert sizes["p99"] == np.quantile(values, 0.99, method="inverted_cdf")
        histogram = sizes["histogram"]
        assert [b["graphs"] for b in histogram] == [
            int(((values > b["over"]) & (values <= b["to"])).sum()) for b in histogram
        ]
        assert sum(b["graphs"] for b in histogram) == len(stored)


def test_elements_agree_with_the_blocks(data_folder: Path, stored: Multigraphs) -> None:
    owner = np.repeat(np.arange(len(stored)), stored.n_atoms)
    pairs = {(g, SYMBOLS[z]) for g, z in zip(owner.tolist(), stored.atomic_numbers.tolist(), strict=True)}
    elements = inspect(data_folder)["elements"]
    assert elements == Counter(symbol for _, symbol in pairs)
    assert list(elements.values()) == sorted(elements.values(), reverse=True)


def test_the_largest_crystals(data_folder: Path, stored: Multigraphs) -> None:
    largest = inspect(data_folder)["largest"]
    assert [row["edges"] for row in largest] == sorted((2 * stored.n_edges.astype(int)).tolist(), reverse=True)[:10]
    for row in largest:
        i = stored.keys.index(row["key"])
        assert (row["atoms"], row["edges"]) == (stored.n_atoms[i], 2 * stored.n_edges[i])


def test_a_budget_refuses_what_is_larger(data_folder: Path, stored: Multigraphs, aflow: list[Crystal]) -> None:
    """Crystals that were refused for their size count as well, since their size is known."""
    edges = 2 * stored.n_edges.astype(int)
    low, high, enough = inspect(data_folder, [500, 3_000, 10**6])["budgets"]
    assert (low["refused"], low["of"]) == ((edges > 500).sum() + 2, len(stored) + 2)
    assert low["share"] == low["refused"] / low["of"]
    oversized = [json.loads(line)["text"] for line in (data_folder / "quarantine.jsonl").read_text().splitlines()]
    assert high["refused"] == sum(int(text.split()[0]) > 3_000 for text in oversized)
    assert enough["refused"] == enough["unknown"] == 0


def test_labels_and_sources(tmp_path: Path, aflow: list[Crystal]) -> None:
    def crystal(i: int, c: Crystal, name: str) -> Crystal:
        return Crystal(f"{name}{i}", c.lattice, c.positions, c.atomic_numbers, {"gap": float(i)} if i % 4 else {})

    one = from_crystals(
        [crystal(i, c, "a") for i, c in enumerate(aflow[:20])], "one", licence="CC0", units={"gap": "eV"}
    )
    two = from_crystals([crystal(i, c, "b") for i, c in enumerate(aflow[20:30])], "two", cite="Someone 2020")
    settings = ShardSettings(labels={"gap": "band_gap"}, fingerprints=False, duplicates="keep")
    shard([one, two], tmp_path / "d", settings)
    found = inspect(tmp_path / "d")
    kept = [row["key"] for part in range(2) for row in graph_rows(tmp_path / "d", part)]
    values = [float(key[1:]) for key in kept if int(key[1:]) % 4]
    gap = found["labels"]["gap"]
    assert (gap["unit"], gap["column"]) == ("eV", "band_gap")
    assert gap["missing"] == pytest.approx(1 - len(values) / len(kept))
    assert (gap["min"], gap["max"], gap["mean"]) == (min(values), max(values), pytest.approx(np.mean(values)))
    assert [(s["name"], s["licence"], s["cite"]) for s in found["sources"]] == [
        ("one", "CC0", ""),
        ("two", "unknown", "Someone 2020"),
    ]
    assert [s["graphs"] for s in found["sources"]] == [sum(key[0] == name for key in kept) for name in "ab"]


def graph_rows(folder: Path, part: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if (folder / f"graphs.parquet/part-{part:05d}.parquet").exists():
        damage.change_graphs(folder, rows.extend, part)
    return rows


def test_duplicates(tmp_path: Path, aflow: list[Crystal]) -> None:
    again = [Crystal(f"again/{c.key}", c.lattice, c.positions, c.atomic_numbers) for c in aflow[:3]]
    crystals = [*aflow[:40], *again, aflow[5]]
    shard([from_crystals(crystals)], tmp_path / "d", exclude=[from_crystals(aflow[10:12])])
    duplicates = inspect(tmp_path / "d")["duplicates"]
    assert duplicates.keys() == {"duplicate", "duplicate_key", "excluded"}
    assert duplicates["duplicate"] >= 3
    assert duplicates["duplicate_key"] == 1
    assert duplicates["excluded"] >= 2


# -- the command -------------------------------------------------------------------------------------------------------


def test_json_is_one_object(data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(data_folder), "--json", "--budget", "1000"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() >= REQUIRED
    assert all(isinstance(found[name], int) for name in ("graphs", "atoms", "edges", "blocks", "shards"))
    assert found["budgets"][0]["edges"] == 1_000


def test_text(data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(data_folder), "--budget", "1000"]) == 0
    said = capsys.readouterr().out
    for words in ("118 crystals", "2 oversized", damage.manifest_of(data_folder)["digest"], "exceed 1,000 edges"):
        assert words in said


def test_shards_are_not_needed(data_folder: Path, tmp_path: Path) -> None:
    """A billion crystals are told about from their tables."""
    folder = shutil.copytree(data_folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.tar"))
    assert inspect(folder) == inspect(data_folder)


def test_a_data_set_behind_a_url(data_folder: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{data_folder}/", "/inspect/set/", recursive=True)
    try:
        assert inspect("memory://inspect/set") == inspect(data_folder)
        assert main(["memory://inspect/set", "--html", str(tmp_path / "page.html")]) == 0
    finally:
        memory.rm("/inspect", recursive=True)
    assert "<title>set:" in (tmp_path / "page.html").read_text()


def test_wrong_use_and_damage(data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    assert main([str(tmp_path)]) == 2
    folder = shutil.copytree(data_folder, tmp_path / "copy")
    assert main([str(folder), "--html", str(tmp_path / "none" / "page.html")]) == 1
    (folder / "quarantine.jsonl").write_text("no json\n")
    assert main([str(folder)]) == 1
    (folder / "graphs.parquet/part-00000.parquet").write_bytes(b"PAR1")
    assert main([str(folder)]) == 1
    (folder / "manifest.json").write_text("{}")
    assert main([str(folder)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 6
    assert all(line.startswith("error: ") for line in said)
    assert "cdssl verify" in said[3]


def test_control_characters_do_not_reach_the_terminal(hostile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(hostile)]) == 0
    said = capsys.readouterr().out
    assert HOSTILE[:20] in said
    assert not {"\x1b", "\u202e"} & set(said)


# -- the page ----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would make of the page: its tags, their attributes and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: Counter[str] = Counter()
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attrs)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_nothing_in_the_data_acts_in_the_page(hostile: Path, tmp_path: Path) -> None:
    assert main([str(hostile), "--html", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text and "<img" not in text and "<b>bold" not in text
    found = Page(text)
    assert found.open == []
    assert not {"script", "img", "link", "iframe", "a", "object"} & set(found.tags)
    assert not {name for name in found.attributes if name.startswith("on") or name in ("src", "href")}
    # key and formula of the largest; licence, cite, unit, column; and the refusals: each is there, as text
    assert found.text.count(HOSTILE) >= 2 * 10 + 4 + 2


def test_the_page_needs_no_network(data_folder: Path) -> None:
    text = page(inspect(data_folder), "name")
    for word in ("http:", "https:", "url(", "@import", "//"):
        assert word not in text
    assert "default-src 'none'" in text


def test_the_page_shows_the_numbers(data_folder: Path) -> None:
    found = inspect(data_folder, [1_000])
    shown = Page(page(found, "name"))
    assert shown.open == []
    for words in (f"{found['edges']:,}", f"{found['fill']:.1%}", found["digest"], "oversized", "aflow"):
        assert words in shown.text
    bars = sum(len(sizes["histogram"]) for sizes in found["sizes"].values())
    assert (shown.tags["svg"], shown.tags["rect"]) == (2, bars)
    assert f"{found['elements']['O']:,} crystals" in page(found, "name")


def test_the_places_of_the_elements() -> None:
    for symbol in SYMBOLS[1:]:
        row, column = _place(ATOMIC_NUMBER[symbol])
        element = Element(symbol)
        if element.is_lanthanoid or element.is_actinoid:
            assert row == (9 if element.is_lanthanoid else 10)
        else:
            assert (row, column) == (element.row, element.group)
    assert len({_place(z) for z in range(1, 119)}) == 118


def test_a_page_of_very_little(tmp_path: Path, aflow: list[Crystal]) -> None:
    """One crystal, no label, nothing refused."""
    shard([from_crystals(aflow[:1])], tmp_path / "d", ShardSettings(val=0, budget=Budget(edges=100_000)))
    assert Page(page(inspect(tmp_path / "d"), "d")).open == []
