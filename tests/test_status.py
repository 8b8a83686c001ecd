"""A run seen from outside: from its folder, from a URL, on a terminal and off it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from cdssl_dist.train import live, status
from cdssl_dist.train.rank import STARTING
from cdssl_dist.train.runlog import RunLog, append_event, read_lines

START = 1_700_000_000_000  # ms


def write_run(folder: Path, state: str = "training", end: int | None = None) -> None:
    """Forty steps of a hundred: lines two seconds and ten steps apart, a validation between, the last at ``end``."""
    now = int(time.time() * 1000) if end is None else end
    log = RunLog(folder, 0, echo=False)
    log.close()
    lines = [
        {"step": s, "time": now - 200 * (40 - s), "train/loss": 1.0 / s, "perf/edges_s": 1e5} for s in (10, 20, 30)
    ]
    lines += [{"step": 30, "time": now - 1500, "val/loss": 0.5}]
    lines += [{"step": 40, "time": now, "train/loss": None, "perf/edges_s": 2e5, "system/cpu": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step": 50, "tr')
    (folder / "events.jsonl").write_text(json.dumps({"step": 35, "time": now, "event": "skip", "norm": 9.0}) + "\n")
    (folder / "status.json").write_text(
        json.dumps({"time": now, "state": state, "step": 40, "steps": 100, "world_size": 2})
    )


def test_what_is_seen_is_what_the_folder_says(tmp_path: Path) -> None:
    write_run(tmp_path)
    seen = live.snapshot(str(tmp_path))
    assert (seen.state, seen.step, seen.steps, seen.world_size, seen.validated) == ("training", 40, 100, 2, 30)
    assert seen.steps_s == pytest.approx(5.0) and seen.seconds_left == pytest.approx(12.0)
    assert seen.metrics["perf/edges_s"] == 2e5 and seen.metrics["train/loss"] is None and not seen.over
    text = live.page(seen)
    for part in (
        "40 of 100 (40.0%), 5 steps/s, 12 s left",
        "step 30: loss 0.5",
        "200,000 edges/s",
        "step 35: skip norm",
    ):
        assert part in text

    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/runs/", recursive=True)
    there = live.snapshot(f"memory://runs/{tmp_path.name}")
    assert (there.step, there.metrics, there.events) == (seen.step, seen.metrics, seen.events)


def test_a_run_that_says_it_trains_and_is_silent(tmp_path: Path) -> None:
    write_run(tmp_path, end=START)
    seen = live.snapshot(str(tmp_path))
    assert seen.state == "silent" and seen.seconds_left is None
    assert "no output for" in live.page(seen) and not seen.over


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path)
    monkeypatch.setattr(live, "TAIL", 150)
    seen = live.snapshot(str(tmp_path))
    assert seen.step == 40 and seen.metrics["perf/edges_s"] == 2e5


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    assert status.main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["val/loss"] == 0.5
    write_run(tmp_path, state="failed")
    assert status.main([str(tmp_path), "--follow"]) == 1  # and ends by itself
    assert "failed  step 40/100" in capsys.readouterr().out
    assert status.main([str(tmp_path / "elsewhere")]) == 2
    assert "no run here" in capsys.readouterr().err


def test_a_run_that_never_got_beyond_its_start(tmp_path: Path) -> None:
    long_ago = 1_000 * int(time.time() - 2 * STARTING)
    (tmp_path / "status.json").write_text(json.dumps({"state": "starting", "time": long_ago}))
    assert live.snapshot(str(tmp_path)).state == "silent"
    (tmp_path / "status.json").write_text(json.dumps({"state": "starting", "time": 1_000 * int(time.time())}))
    assert live.snapshot(str(tmp_path)).state == "starting"


def test_what_cannot_be_read_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    (tmp_path / "status.json").write_text('{"state": "trai')  # a storage that does not rename
    assert live.snapshot(str(tmp_path)).step == 40
    assert status.main([str(tmp_path), "--follow", "--every", "-1"]) == 2
    assert "must be above 0" in capsys.readouterr().err
    assert status.main(["https://user:secret@localhost:1/run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: https://localhost:1/run: ") and "secret" not in said


def test_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.log").write_text("of an earlier life\n")
    with live.watching(tmp_path), open(tmp_path / "train.log", "a") as log:
        log.write("step 1/2  loss 3\n")
    assert capsys.readouterr().err == "step 1/2  loss 3\n"


def test_a_live_view_on_a_terminal(tmp_path: Path) -> None:
    write_run(tmp_path)
    ours, theirs = pty.openpty()
    code = (
        "import sys; from pathlib import Path; from cdssl_dist.train.live import watching\n"
        "folder = Path(sys.argv[1])\n"
        "with watching(folder), open(folder / 'train.log', 'a') as log: log.write('step 40/100  loss\\nresumed\\n')"
    )
    env = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], stderr=theirs, env=env, check=True, timeout=60)
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "40 of 100" in shown and "━" in shown and "resumed" in shown and "step 40/100" not in shown


def test_an_event_is_a_metric_too_and_one_of_the_cluster_is_never_cut(tmp_path: Path) -> None:
    told: list[tuple[int, dict[str, float]]] = []
    log = RunLog(tmp_path, 0, echo=False, report=lambda step, values: told.append((step, values)))
    log.event(3, "skip", norm=7.0)
    log.event(4, "checkpoint")
    log.close()
    assert told == [(3, {"event/skip": 1.0})] and read_lines(tmp_path / "metrics.jsonl")[0]["event/skip"] == 1.0
    append_event(tmp_path, None, "workers failed", what="killed")
    RunLog(tmp_path, 2, echo=False).close()
    assert [line["event"] for line in read_lines(tmp_path / "events.jsonl")] == ["workers failed"]
    assert read_lines(tmp_path / "metrics.jsonl") == []


def test_what_belongs_to_a_step_is_cut_with_it(tmp_path: Path) -> None:
    """Step 5 is the first after a checkpoint at 5: a life that resumes there does it again, and tells of it again."""
    log = RunLog(tmp_path, 0, echo=False)
    log.event(4, "skip", within=True)
    log.event(5, "checkpoint")
    log.event(5, "skip", within=True)
    log.close()
    RunLog(tmp_path, 5, echo=False).close()
    assert [(line["step"], line["event"]) for line in read_lines(tmp_path / "events.jsonl")] == [
        (4, "skip"),
        (5, "checkpoint"),
    ]
