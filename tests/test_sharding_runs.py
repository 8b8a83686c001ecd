"""Sharding that is killed, disturbed, or spread over processes: the bytes are those of an undisturbed run."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from killable import Killable, until
from pymatgen.core import Lattice, Structure
from test_format import contents, graphs_of, optimade, refusals_of

from sharding.__main__ import main
from sharding.block import Budget
from sharding.crystal import SYMBOLS, Crystal
from sharding.executor import Executor
from sharding.manifest import DataSetError, read_manifest
from sharding.pipeline import StrictError, shard
from sharding.settings import ShardSettings
from sharding.sources import Record, files, from_crystals, open_source, payload

SETTINGS = ShardSettings(
    budget=Budget(edges=2_048, atoms=256, graphs=16), blocks_per_shard=5, val=0.2, bucket_bytes=200_000
)
COMMAND = "--block-edges 2048 --block-atoms 256 --block-graphs 16 --blocks-per-shard 5 --val 0.2".split()


def sharded(source: Path, out: Path, workers: int = 1) -> None:
    shard([open_source(str(source))], out, SETTINGS, Executor(workers))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, aflow: list[Crystal]) -> Path:
    """960 crystals in 15 tasks: 240 different ones, repeated at other volumes, with a few bad rows."""
    many = [
        Crystal(f"{n}/{c.key}", c.lattice * (1 + n / 50), c.positions * (1 + n / 50), c.atomic_numbers)
        for n in range(4)
        for c in aflow[:240]
    ]
    path = tmp_path_factory.mktemp("source") / "some.parquet"
    return optimade(path, many, {3: {"species_at_sites": ["Xx"]}, 800: {"id": many[0].key}}, group=64)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """What one process makes of it, in several buckets."""
    folder = tmp_path_factory.mktemp("undisturbed") / "d"
    sharded(source, folder)
    return folder


# -- killed ------------------------------------------------------------------------------------------------------------


def finished(folder: Path) -> dict[Path, tuple[int, int]]:
    """The files that say of a task that it is done, and which they are: one that is made again is another."""
    done = [*folder.glob(".work/1-*/[!.]*"), *folder.glob(".work/2-*/[!.]*"), *folder.glob(".work/[34]-*/[!.]*.json")]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in done}


def disturbed(source: Path, out: Path, workers: int, chance: random.Random, longest: float) -> int:
    """Kill at random moments and run again, until a run comes through; returns how often it was killed."""
    for kills in itertools.count():
        before = finished(out)
        if (out / "manifest.json").exists() and not (out / ".work" / "task.json").exists():
            return kills
        with Killable(out.with_suffix(".log"), sharded, source, out, workers) as run:
            deadline = time.monotonic() + chance.uniform(0, longest * 1.1**kills)  # in the end a run comes through
            while run.running() and time.monotonic() < deadline:
                time.sleep(0.002)
            killed = run.running()
            run.kill()
        assert killed or run.wait() == 0, out.with_suffix(".log").read_text()
        after = finished(out)
        if not (out / "manifest.json").exists():  # then the work is cleared away
            assert {path: after.get(path) for path in before} == before
        if not killed:
            return kills
    raise AssertionError


def kill_often(source: Path, undisturbed: Path, tmp_path: Path, workers: int, least: int, longest: float) -> None:
    chance = random.Random(workers)
    expected = contents(undisturbed)
    kills = rounds = 0
    while kills < least:
        kills += disturbed(source, tmp_path / f"{rounds}", workers, chance, longest)
        assert contents(tmp_path / f"{rounds}") == expected
        rounds += 1


def test_killed_when_all_but_an_empty_folder_was_gone(undisturbed: Path, source: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "d")
    (tmp_path / "d" / ".work").mkdir()
    with pytest.raises(DataSetError, match="holds a data set already"):
        sharded(source, tmp_path / "d")
    assert contents(tmp_path / "d") == contents(undisturbed) and not (tmp_path / "d" / ".work").exists()


def test_what_is_done_is_not_parsed_again(tmp_path: Path, aflow: list[Crystal]) -> None:
    """A run breaks off at the third task; the next one parses that and what follows."""
    parsed: list[str] = []
    broken = True

    def parse(record: Record) -> list[Crystal]:
        if broken and record.position == "1100":
            raise OSError("the network is down")
        parsed.append(record.position)
        return payload(record)

    crystals = [replace(c, key=f"{n}/{c.key}") for n in range(5) for c in aflow[:240]]
    source = replace(from_crystals(crystals), parse=parse)
    with pytest.raises(OSError, match="the network is down"):
        shard([source], tmp_path / "d")
    broken = False
    shard([source], tmp_path / "d")
    counts = Counter(parsed)
    assert {counts[str(i)] for i in range(1024)} == {1}
    assert set(counts) == {str(i) for i in range(1200)}


def test_a_source_that_is_mended_is_read_again(tmp_path: Path, aflow: list[Crystal]) -> None:
    """A run stops at a bad row; what the user changes must not be taken for what was read before."""
    bad = replace(aflow[3], lattice=0.0 * aflow[3].lattice)
    with pytest.raises(StrictError, match="3:"):
        shard([from_crystals([*aflow[:3], bad, *aflow[4:60]])], tmp_path / "d", SETTINGS, strict=True)
    shard([from_crystals(aflow[:60])], tmp_path / "d", SETTINGS, strict=False)
    shard([from_crystals(aflow[:60])], tmp_path / "fresh", SETTINGS)
    assert contents(tmp_path / "d") == contents(tmp_path / "fresh")


def test_a_header_that_is_mended_is_read_again(tmp_path: Path, aflow: list[Crystal]) -> None:
    """The rows are the same bytes, and mean something else."""
    cif = "data_a\n" + "".join(f"_cell_length_{x} 3\n" for x in "abc")
    cif += "".join(f"_cell_angle_{x} 90\n" for x in ("alpha", "beta", "gamma"))
    cif += "loop_\n_atom_site_type_symbol\n_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\nFe 0 0 0\n"

    def run(header: str, rows: str, *more: str) -> int:
        (tmp_path / "a.csv").write_text(f"{header}\n{rows}")
        return main([str(tmp_path / "a.csv"), "--out", str(tmp_path / "d"), "--label", "y=y", "--val", "0.3", *more])

    rows = "".join(f'm-{i},{i},{10 + i},"{cif.replace(" 3", f" 3.{i}")}"\n' for i in range(4))
    assert run("id,y,z,cif", rows + 'm-9,1,2,"data_a"\n', "--strict") == 2
    assert run("id,z,y,cif", rows) == 0
    values = {y for graphs in graphs_of(tmp_path / "d").values() for y in graphs.labels["y"].tolist()}
    assert values == {10.0, 11.0, 12.0, 13.0}


def test_one_label_in_two_units_is_refused(aflow: list[Crystal], tmp_path: Path) -> None:
    sources = [from_crystals(aflow[:3], "a", units={"y": "eV"}), from_crystals(aflow[3:6], "b", units={"y": "meV"})]
    with pytest.raises(DataSetError, match="'y' is in eV in a, and in meV in b"):
        shard(sources, tmp_path / "d")


def test_strict_ends_at_a_key_of_two_crystals(aflow: list[Crystal], tmp_path: Path) -> None:
    twice = [*aflow[:20], replace(aflow[30], key=aflow[3].key)]
    with pytest.raises(StrictError, match="duplicate_key"):
        shard([from_crystals(twice)], tmp_path / "d", SETTINGS, strict=True)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--blocks-per-shard", "0"], "each must be at least 1"),
        (["--block-graphs", "0"], "each must be at least 1"),
        (["--no-fingerprints", "--duplicates", "near"], "duplicates are found by fingerprints"),
        (["--label", "a=x", "--label", "a=y"], "the same name is given to two columns"),
        (["--exclude", "aflow:9", "--exclude-keys", "EMPTY"], "contains no keys, so nothing would be excluded"),
        (["--exclude", "aflow:9", "--exclude-keys", "BINARY"], "not a text file with one key per line"),
    ],
)
def test_options_that_would_do_nothing_or_harm(
    more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "EMPTY").write_text("\n")
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe\x00")
    more = [str(tmp_path / m) if m.isupper() else m for m in more]
    assert main(["aflow:9", "--out", str(tmp_path / "d"), *more]) == 2
    assert said in capsys.readouterr().err


def test_killed_at_random_moments_and_run_again(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    kill_often(source, undisturbed, tmp_path, 1, least=12, longest=1.0)


def test_killed_with_its_workers(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    kill_often(source, undisturbed, tmp_path, 2, least=2, longest=6.0)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "least", "longest"), [(1, 100, 1.5), (2, 30, 9.0)])
def test_killed_many_times(
    source: Path, undisturbed: Path, tmp_path: Path, workers: int, least: int, longest: float
) -> None:
    kill_often(source, undisturbed, tmp_path, workers, least, longest)


def test_a_pool_ends_with_its_parent(source: Path, tmp_path: Path) -> None:
    with Killable(tmp_path / "log", sharded, source, tmp_path / "d", 2) as run:
        until(run.children)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        until(run.alone)


def test_killed_between_the_manifest_and_the_end(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The manifest is the commit: the run that finds it has only to clear away."""
    out = tmp_path / "d"
    shard([open_source(str(source))], tmp_path / "other", SETTINGS)
    with Killable(tmp_path / "log", sharded, source, out) as run:
        until((out / ".work" / "task.json").exists)
        run.kill()
    shutil.copytree(undisturbed, out, dirs_exist_ok=True)
    with pytest.raises(DataSetError, match="holds a data set already"):
        shard([from_crystals([])], out, SETTINGS)
    sharded(source, out)
    assert contents(out) == contents(undisturbed)
    with pytest.raises(DataSetError, match="holds a data set already"):
        sharded(source, out)


# -- spread ------------------------------------------------------------------------------------------------------------


def test_several_buckets(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Every crystal comes once, whatever the buckets; and blocks are as full as with one."""
    shard([open_source(str(source))], tmp_path / "one", replace(SETTINGS, bucket_bytes=2**30))
    parts = len(list((undisturbed / "graphs.parquet").iterdir()))
    assert parts > 8 > len(list((tmp_path / "one" / "graphs.parquet").iterdir()))
    keys = pq.read_table(source, columns=["id"])["id"].to_pylist()
    full = []
    for folder in (undisturbed, tmp_path / "one"):
        kept = pq.read_table(folder / "graphs.parquet").to_pylist()
        assert Counter([row["key"] for row in kept] + [r["key"] for r in refusals_of(folder)]) == Counter(keys)
        train = read_manifest(folder).splits["train"]
        full.append(train["edges"] / train["blocks"] / SETTINGS.budget.edges)
    assert full[0] > full[1] - 0.01 > 0.9


def test_several_buckets_by_two_workers(source: Path, undisturbed: Path, tmp_path: Path) -> None:
    sharded(source, tmp_path / "two", 2)
    assert contents(tmp_path / "two") == contents(undisturbed)


def test_buckets_of_very_much_data_are_larger_not_more(
    source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sharding.pipeline.MOST_BUCKETS", 3)
    sharded(source, tmp_path / "d")
    kept = [
        pq.read_table(d / "graphs.parquet", columns=["key"])["key"].to_pylist() for d in (tmp_path / "d", undisturbed)
    ]
    assert Counter(kept[0]) == Counter(kept[1])
    parts = [len(list((d / "graphs.parquet").iterdir())) for d in (tmp_path / "d", undisturbed)]
    assert parts[0] <= 2 * (3 + 2) < parts[1]  # for each split: of each bucket, and of what they set aside


def test_many_small_files_are_merged(
    source: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sharding.pipeline.MANY_READS", 10)
    sharded(source, tmp_path / "d")
    assert "merge: 940 crystals" in capsys.readouterr().err
    kept = [
        Counter(pq.read_table(d / "graphs.parquet", columns=["key"])["key"].to_pylist())
        for d in (tmp_path / "d", undisturbed)
    ]
    assert kept[0] == kept[1]


def test_every_stage_shows_its_progress(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sharded(source, tmp_path / "d")
    said = capsys.readouterr().err
    assert [line.split(":")[0] for line in said.splitlines()] == ["convert", "find twins", "pack", "write"]


def test_two_runs_into_one_folder(
    source: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "d"
    with Killable(tmp_path / "log", sharded, source, out) as first:
        until(lambda: finished(out))
        first.signal(signal.SIGSTOP)
        assert main([str(source), "--out", str(out)]) == 2
        assert "another process is sharding into this folder" in line_of(capsys)
        first.signal(signal.SIGCONT)
        assert first.wait() == 0
    assert contents(out) == contents(undisturbed)


def test_other_settings_do_not_go_on_with_the_work(source: Path, tmp_path: Path) -> None:
    with pytest.raises(StrictError):
        shard([open_source(str(source))], tmp_path / "d", SETTINGS, strict=True)
    for changed in ({"settings": replace(SETTINGS, seed=1)}, {"exclude": [from_crystals([])]}):
        with pytest.raises(DataSetError, match="other sources or settings"):
            shard([open_source(str(source))], tmp_path / "d", **({"settings": SETTINGS} | changed))  # type: ignore[arg-type]


def test_another_way_to_read_does_not_go_on_with_the_work(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(source), "--out", str(tmp_path / "d"), "--workers", "1", "--strict"]) == 2
    command = [str(source), "--out", str(tmp_path / "d"), "--workers", "1"]
    assert main([*command, "--occupancy", "majority"]) == 2
    assert "other sources or settings" in capsys.readouterr().err.splitlines()[-1]
    assert main(command) == 0


# -- what fails --------------------------------------------------------------------------------------------------------


def line_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of what a command said, which is the error; the lines before it are of progress."""
    *progress, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert all(" crystals" in other or " files" in other for other in progress), progress
    return line


def limited(size: int, source: Path, out: Path, workers: int) -> int:
    """Shard where no file may be larger: to a program that looks like a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return main([str(source), "--out", str(out), "--workers", str(workers), *COMMAND])


@pytest.mark.parametrize("size", [3_000, 60_000, 400_000])
def test_no_room(source: Path, tmp_path: Path, size: int) -> None:
    """The limits are met in different stages."""
    log = tmp_path / "log"
    with Killable(log, limited, size, source, tmp_path / "d", 1) as run:
        assert run.wait() == 1, log.read_text()
    said = log.read_text().splitlines()
    assert said[-1].startswith(f"error: {tmp_path / 'd'}: cannot be written (")
    assert "run the same command again" in said[-1]
    assert "Traceback" not in log.read_text()
    assert main([str(source), "--out", str(tmp_path / "d"), "--workers", "1", *COMMAND]) == 0
    assert not list(tmp_path.rglob("*.tmp"))


DISK = """
mount -t tmpfs -o size=1500k none "$1"
shift
"$@"; echo "exit code $?" >&2
mount -o remount,size=100m "$out"
"$@" && cp -r "$out/d" "$copy"
"""


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="mounting a small disk needs root")
def test_a_full_disk(source: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [sys.executable, "-m", "sharding", str(source), "--out", f"{disk}/d", "--workers", "1", *COMMAND]
    answer = subprocess.run(
        ["unshare", "--mount", "sh", "-c", DISK, "sh", str(disk), *command],
        env=os.environ | {"out": str(disk), "copy": str(tmp_path / "copy")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "mount:" in answer.stderr:
        pytest.skip("no disk can be mounted here")
    assert "cannot be written (No space left on device)" in answer.stderr
    assert "exit code 1" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert main([str(source), "--out", str(tmp_path / "elsewhere"), "--workers", "1", *COMMAND]) == 0
    assert contents(tmp_path / "copy") == contents(tmp_path / "elsewhere")


@pytest.mark.parametrize("below", ["", "below"])
def test_a_target_that_is_no_folder(
    source: Path, tmp_path: Path, below: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert main([str(source), "--out", str(tmp_path / "file" / below)]) == 1
    assert "cannot be written" in line_of(capsys)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_worker_that_is_killed(source: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Killable(log, main, [str(source), "--out", str(tmp_path / "d"), "--workers", "2", *COMMAND]) as run:
        until(lambda: finished(tmp_path / "d"))
        os.kill(run.children()[0], signal.SIGKILL)
        assert run.wait() == 1
    said = log.read_text()
    assert said.splitlines()[-1].startswith("error: a worker process died")
    assert "Traceback" not in said
    assert main([str(source), "--out", str(tmp_path / "d"), "--workers", "1", *COMMAND]) == 0


def test_a_folder_that_vanishes_half_way(
    tmp_path: Path, aflow: list[Crystal], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files are listed, then they are gone: that is no file that cannot be read, which is quarantined."""
    (tmp_path / "source").mkdir()
    for i, crystal in enumerate(aflow[:20]):
        (tmp_path / "source" / f"{i:02d}.extxyz").write_text(xyz(crystal))
    walk = files._walk

    def vanishing(spec: str) -> Iterator[tuple[str, str]]:
        for i, found in enumerate(list(walk(spec))):
            if i == 10:
                (tmp_path / "source").rename(tmp_path / "elsewhere")
            yield found

    command = [str(tmp_path / "source"), "--out", str(tmp_path / "d"), "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(files, "_walk", vanishing)
        assert main(command) == 2
    assert "10.extxyz: vanished" in line_of(capsys)
    (tmp_path / "elsewhere").rename(tmp_path / "source")
    assert main(command) == 0
    assert sum(split["graphs"] for split in read_manifest(tmp_path / "d").splits.values()) == 20


class Breaking(BaseHTTPRequestHandler):
    """A server that hangs up in the middle of a file, the first time."""

    data = b""
    whole = False

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        with contextlib.suppress(ConnectionError):  # a client that has read enough hangs up
            self.wfile.write(self.data if type(self).whole else self.data[: len(self.data) // 2])

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Breaking) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.mark.server
def test_a_source_that_vanishes_half_way(
    server: str, tmp_path: Path, aflow: list[Crystal], capsys: pytest.CaptureFixture[str]
) -> None:
    Breaking.data = "".join(xyz(c) for c in aflow * 20).encode()  # half is much more than a task
    command = [f"{server}/some.extxyz", "--out", str(tmp_path / "d"), "--workers", "1"]
    assert main(command) == 2
    assert "reading broke off" in (line := line_of(capsys))
    assert "run again" in line
    assert finished(tmp_path / "d")
    Breaking.whole = True
    assert main(command) == 0
    local = tmp_path / "some.extxyz"
    local.write_bytes(Breaking.data)
    assert main([str(local), "--out", str(tmp_path / "local"), "--workers", "1"]) == 0
    assert contents(tmp_path / "d") == contents(tmp_path / "local")


def xyz(crystal: Crystal) -> str:
    """A frame of extended XYZ."""
    cell = " ".join(f"{x:.12g}" for x in crystal.lattice.ravel())
    rows = zip(crystal.atomic_numbers, crystal.positions, strict=True)
    atoms = "".join(f"{SYMBOLS[z]} {x:.12g} {y:.12g} {w:.12g}\n" for z, (x, y, w) in rows)
    head = f'Lattice="{cell}" Properties=species:S:1:pos:R:3 id="{crystal.key}" pbc="T T T" note="{"long " * 500}"'
    return f"{len(crystal.positions)}\n{head}\n{atoms}"


# -- labels ------------------------------------------------------------------------------------------------------------


def test_a_label_that_nobody_has_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelled column of a JSON file cannot be known before it was read whole."""
    rock_salt = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.6), ["Na", "Cl"], [[0] * 3, [0.5] * 3]).as_dict()
    rows = [{"id": f"x{i}", "gap": float(i), "structure": rock_salt} for i in range(4)]
    (tmp_path / "some.json").write_text(json.dumps(rows))
    labels = ["--label", "gap=gap", "--label", "energy=enrgy"]
    command = [str(tmp_path / "some.json"), "--out", str(tmp_path / "d"), "--workers", "1", "--duplicates", "keep"]
    assert main([*command, *labels]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == ["warning: no crystal has a label 'energy'; is 'enrgy' the name of its column?"]


def test_a_label_that_does_not_fit_is_no_infinity(tmp_path: Path, aflow: list[Crystal]) -> None:
    labels = [1.0, -3e38, 1e39, float("nan"), float("-inf")]
    crystals = [replace(aflow[i], labels={"gap": value}) for i, value in enumerate(labels)]
    shard([from_crystals(crystals)], tmp_path / "d", replace(SETTINGS, labels={"gap": "gap"}))
    refused = {line["key"]: line["text"] for line in refusals_of(tmp_path / "d")}
    assert refused.keys() == {aflow[2].key, aflow[4].key}
    assert refused[aflow[2].key] == "label 'gap' is 1e+39, which 32-bit floats cannot hold"
