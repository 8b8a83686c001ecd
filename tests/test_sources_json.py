"""The JSON splitter against ``json``: boundaries, limits, and recovery from damage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sources_support import read

from sharding.crystal import Crystal
from sharding.sources import ReadOptions, json_files
from sharding.sources.json_text import Cursor
from sharding.sources.pieces import Fault, Piece
from sharding.sources.streams import DamagedError, Stream, TooLargeError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(), v, max_size=4), max_leaves=20
)
SEPARATORS = st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t:\r\n")])


def stream_of(text: bytes, step: int = 2**20) -> Stream:
    """A stream that hands out a few bytes at a time."""
    parts = (text[i : i + step] for i in range(0, len(text), step))
    return Stream(lambda n: next(parts, b""))


def elements(text: bytes, step: int = 2**20, limit: int = 2**20) -> list[Any]:
    return list(Cursor(stream_of(text, step), limit).elements())


@settings(max_examples=150)
@given(st.lists(VALUES, max_size=6), SEPARATORS, st.booleans(), st.integers(1, 40))
def test_elements(values: list[Any], separators: tuple[str, str], ascii_only: bool, step: int) -> None:
    text = json.dumps(values, separators=separators, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    found = elements(text, step)
    assert [json.loads(element.decode("utf-8", "surrogatepass")) for element in found] == values


@settings(max_examples=100)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), VALUES, max_size=6), st.integers(1, 40))
def test_members(values: dict[str, Any], step: int) -> None:
    cursor = Cursor(stream_of(json.dumps(values).encode(), step), 2**20)
    found = [(json.loads(f'"{name}"'), json.loads(cursor.value())) for name in cursor.members()]
    assert found == list(values.items())
    assert cursor.peek() == b""


@settings(max_examples=150)
@given(st.binary(max_size=60) | st.text('[]{}",:\\a1 \n', max_size=60).map(str.encode), st.integers(1, 40))
def test_any_bytes_end(text: bytes, step: int) -> None:
    """Garbage is pieces, faults, or one of two errors; never another one, never without end."""
    options = ReadOptions(max_record_bytes=50)
    try:
        found = list(json_files.split(stream_of(text, step), "x", options))
        assert all(isinstance(piece, (Piece, Fault)) for piece in found)
    except (DamagedError, TooLargeError):
        pass


@settings(max_examples=60)
@given(st.data())
def test_cut_anywhere(data: st.DataObject) -> None:
    """What is before the cut is read, and the cut is noticed."""
    text = json.dumps([{"id": i, "s": '\\"]}', "v": [[i]]} for i in range(9)]).encode()
    cut = data.draw(st.integers(0, len(text) - 1))
    found: list[Any] = []
    with pytest.raises(DamagedError):
        for element in Cursor(stream_of(text[:cut]), 2**20).elements():
            found.append(element)
    assert all(json.loads(element) == {"id": i, "s": '\\"]}', "v": [[i]]} for i, element in enumerate(found))
    assert len(found) >= text[:cut].count(b'"id"') - 1


def records(n: int) -> Iterator[dict[str, Any]]:
    for i in range(n):
        yield {"name": f"a{i}", "text": "x]}[{,", "values": [{"name": i}, {"deep": {"name": [i]}}]}


@pytest.mark.parametrize("step", [7, 2**20])
@pytest.mark.parametrize(
    ("victim", "old", "new"), [(5, b'"text"', b'"text#'), (5, b"[{", b"[}"), (7, b'"a7"', b"#a7#"), (3, b"}]}", b"}]#")]
)
def test_unbalanced_elements(victim: int, old: bytes, new: bytes, step: int) -> None:
    """A quote or bracket that is lost costs the element it is in, and no more."""
    texts = [json.dumps(record).encode() for record in records(12)]
    whole = list(texts)
    assert old in texts[victim]
    texts[victim] = texts[victim].replace(old, new)
    found = elements(b"[" + b", ".join(texts) + b"]", step)
    assert [e for e in found if e in whole] == whole[:victim] + whole[victim + 1 :]
    assert len([e for e in found if e not in whole]) <= 3


def test_unbalanced_element_over_the_limit() -> None:
    texts = [json.dumps(record).encode() for record in records(3000)]
    texts[5] = texts[5].replace(b'"text"', b'"text#')
    found = elements(b"[" + b",".join(texts) + b"]", limit=50_000)
    assert [e for e in found if not isinstance(e, bytes)] != [] or len(found) == 2999
    assert sum(e in set(texts) for e in found if isinstance(e, bytes)) == 2999


@pytest.mark.parametrize("step", [100, 2**20])
def test_large_elements_are_passed_over(step: int) -> None:
    text = json.dumps([1, "x" * 5000, {"a": [0] * 5000}, 2]).encode()
    found = elements(text, step, limit=1000)
    assert [type(e) for e in found] == [bytes, TooLargeError, TooLargeError, bytes]


def test_memory_does_not_grow() -> None:
    held = []
    parts = iter([b"[", *([b'{"a": "' + b"x" * 1000 + b'"},'] * 3000), b"{}]"])
    cursor = Cursor(Stream(lambda n: next(parts, b"")), 10_000)
    for _ in cursor.elements():
        held.append(len(cursor._text))
    assert max(held) < 3 * 2**20


def test_deep_nesting(tmp_path: Path) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    (tmp_path / "a.json").write_bytes(b'[{"structure": ' + deep + b"}, 7, {}]")
    crystals, refusals = read(tmp_path / "a.json")
    assert not crystals
    assert [r.code for r in refusals] == ["unparsable"] * 3


def test_what_python_writes_beyond_json(aflow: list[Crystal], tmp_path: Path) -> None:
    c = aflow[0]
    atoms = {
        "lattice_mat": c.lattice.tolist(),
        "coords": c.positions.tolist(),
        "elements": ["Hg"] * 6,
        "cartesian": True,
    }
    (tmp_path / "a.json").write_text(json.dumps([{"jid": "a", "atoms": atoms, "gap": float("nan"), "x": float("inf")}]))
    crystals, refusals = read(tmp_path / "a.json", labels={"gap": "gap", "x": "x"})
    assert not refusals
    assert crystals[0].labels == {"x": float("inf")}


@pytest.mark.parametrize(
    "text", [b"", b" \n", b'[{"a": 1},', b'{"data": [{}', b'{"entries": ', b'{"mp-1": {"structure": {', b"["]
)
def test_truncated(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text)
    crystals, refusals = read(tmp_path / "a.json")
    assert not crystals
    assert refusals[-1].code == "truncated"


def test_documents_without_crystals(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"meta": {}, "links": []}')
    assert [r.code for r in read(tmp_path / "a.json")[1]] == ["unparsable"]
    (tmp_path / "a.json").write_text('[{"name": "x"}, 5, "y", null, [1]]')
    assert [r.code for r in read(tmp_path / "a.json")[1]] == ["unparsable"] * 5
    (tmp_path / "a.json").write_text("[]")
    assert read(tmp_path / "a.json") == ([], [])


STRUCTURE: dict[str, Any] = {
    "lattice": {"matrix": [[3, 0, 0], [0, 3, 0], [0, 0, 3]]},
    "sites": [{"species": [{"element": "Fe", "occu": 1}], "abc": [0, 0, 0.5]}],
}


@pytest.mark.parametrize(
    ("species", "code"),
    [
        ([{"element": "Fe", "occu": 0.5}, {"element": "Ni", "occu": 0.5}], "partial_occupancy"),
        ([{"element": "Fe", "occu": 0.5}], "partial_occupancy"),
        ([{"element": "Qq", "occu": 1}], "species"),
        ([{"element": "Fe", "occu": 1.5}], "unparsable"),
        ([{"occu": 1}], "unparsable"),
    ],
)
def test_sites(species: list[dict[str, Any]], code: str, tmp_path: Path) -> None:
    damaged = STRUCTURE | {"sites": [{"species": species, "abc": [0, 0, 0.5]}]}
    (tmp_path / "a.json").write_text(json.dumps([damaged, STRUCTURE]))
    crystals, refusals = read(tmp_path / "a.json")
    assert [(r.code, r.position, r.key) for r in refusals] == [(code, "element 0", "a#0")]
    assert [c.key for c in crystals] == ["a#1"]
    assert crystals[0].positions.tolist() == [[0, 0, 1.5]]
    if code == "partial_occupancy":
        assert len(read(tmp_path / "a.json", occupancy="majority")[0]) == 2


def test_structures_in_unknown_columns(tmp_path: Path) -> None:
    records = [{"final": STRUCTURE}, {"initial": STRUCTURE, "final": STRUCTURE}, {"x": {"structure": STRUCTURE}}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    crystals, refusals = read(tmp_path / "a.json")
    assert [c.key for c in crystals] == ["a#0", "a#2"]
    assert "several structures among initial, final" in refusals[0].text


def test_records_that_begin_with_another_object(tmp_path: Path) -> None:
    """Documents of the Materials Project, a file each, and in an array."""
    record = {"builder_meta": {"version": "1"}, "nsites": 1, "material_id": "mp-1", "structure": STRUCTURE, "gap": 1.5}
    for content in (record, [record], {k: v for k, v in record.items() if k != "nsites"}):
        (tmp_path / "a.json").write_text(json.dumps(content))
        crystals, refusals = read(tmp_path / "a.json", labels={"gap": "gap"})
        assert not refusals and [(c.key, c.labels) for c in crystals] == [("mp-1", {"gap": 1.5})]
    by_id = {f"mp-{i}": {"structure": STRUCTURE, "gap": float(i)} for i in range(3)}
    (tmp_path / "a.json").write_text(json.dumps(by_id))
    assert [c.key for c in read(tmp_path / "a.json")[0]] == list(by_id)


@pytest.mark.parametrize("first", ["gap", "note"])
def test_a_table_by_column_that_begins_with_another(first: str, tmp_path: Path) -> None:
    table = {first: {"0": 1.5, "1": 2.5}, "structure": {"0": STRUCTURE, "1": STRUCTURE}}
    (tmp_path / "a.json").write_text(json.dumps(table))
    crystals, refusals = read(tmp_path / "a.json", labels={"gap": "gap"} if first == "gap" else {})
    assert not refusals and [c.key for c in crystals] == ["a#0", "a#1"]
    assert [c.labels for c in crystals] == ([{"gap": 1.5}, {"gap": 2.5}] if first == "gap" else [{}, {}])


def test_optimade_disorder_and_vacancies(tmp_path: Path) -> None:
    def entry(symbols: list[str], shares: list[float]) -> dict[str, Any]:
        species = {"name": "A", "chemical_symbols": symbols, "concentration": shares}
        sites = {"cartesian_site_positions": [[0, 0, 0]], "species_at_sites": ["A"], "species": [species]}
        return {"lattice_vectors": [[3, 0, 0], [0, 3, 0], [0, 0, 3]]} | sites

    entries = [entry(["Fe"], [1.0]), entry(["Fe", "vacancy"], [0.9, 0.1]), entry(["X"], [1.0])]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, entries)))
    crystals, refusals = read(tmp_path / "a.jsonl")
    assert len(crystals) == 1
    assert [r.code for r in refusals] == ["partial_occupancy", "species"]


@pytest.mark.parametrize("before", ['"version": 1', '"metadata": {"a": {"b": 1}}', '"jsonapi": {"version": "1.0"}'])
def test_an_array_of_records_behind_other_members(before: str, tmp_path: Path) -> None:
    lattice = {"matrix": [[3, 0, 0], [0, 3, 0], [0, 0, 3]]}
    site = {"species": [{"element": "Fe", "occu": 1}], "abc": [0, 0, 0]}
    rows = ", ".join(json.dumps({"id": f"m-{i}", "structure": {"lattice": lattice, "sites": [site]}}) for i in range(3))
    (tmp_path / "a.json").write_text(f'{{{before}, "entries": [{rows}]}}')
    crystals, refusals = read(tmp_path / "a.json")
    assert [c.key for c in crystals] == ["m-0", "m-1", "m-2"] and refusals == []
    (tmp_path / "b.json").write_text(f'{{"m-1": {rows.split(", {")[0]}, "others": [{rows}]}}')
    crystals, refusals = read(tmp_path / "b.json")
    assert len(crystals) == 1 and [r.text for r in refusals] == ["an array of objects among records by id is not read"]
