"""The report of a run: what stands in it, and that it works in a browser."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import act
from encoders import write_encoder_to

from cdssl_dist.cli import main as cdssl

HOSTILE = "<img src=x onerror=alert(1)></script>"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = write_encoder_to(tmp_path / "run", sources=[{"name": HOSTILE, "licence": "CC0", "cite": ""}])
    lines = [
        {
            "step": s,
            "time": s,
            "train/loss": 4.0 / s,
            "val/skill_edge": s / 100,
            "guard/norm": None if s == 30 else 1.0 + s,
        }
        for s in range(10, 101, 10)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    events = [{"step": 30, "time": 1, "event": "skip", "why": HOSTILE}, {"step": 50, "time": 1, "event": "checkpoint"}]
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    (folder / "status.json").write_text(json.dumps({"state": "done", "steps": 100}))
    (folder / "config.yaml").write_text(f"name: {HOSTILE}\n")
    return folder


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    folder = tmp_path / "tuned"
    folder.mkdir()
    task = {"targets": [{"name": HOSTILE, "unit": "eV", "per_atom": False}], "classes": []}
    errors = {"pretrained": {HOSTILE: 0.25}, "median": {HOSTILE: 1.0}}
    results = {"errors": errors, "task": task, "encoder": {"ref": "models:/x/1"}}
    (folder / "results.json").write_text(json.dumps(results))
    columns = {f"true:{HOSTILE}": [0.0, 1.0, None], f"pretrained:{HOSTILE}": [0.5, 1.0, 2.0]}
    pq.write_table(pa.table(columns), folder / "predictions.parquet")
    return folder


ACT = """
const chart = document.querySelector(".chart"), box = chart.querySelector("svg").getBoundingClientRect();
const at = {clientX: box.right - 8, clientY: box.top + 9};
chart.querySelector("svg").dispatchEvent(new PointerEvent("pointermove", at));
said.at = chart.querySelector("output").textContent;
said.charts = [...document.querySelectorAll(".chart b")].map(b => b.textContent);
said.marks = document.querySelectorAll(".mark").length; said.dots = document.querySelectorAll(".parity circle").length;
said.text = document.body.innerText; said.images = document.images.length;
said.wide = document.documentElement.scrollWidth <= window.innerWidth;
"""


def test_the_report_in_a_browser(run: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert cdssl(["report", str(run), "--finetune", str(tuned), "--out", str(out)]) == 0
    said = act(out, ACT, tmp_path)
    assert said["at"] == "train/loss 0.04 at step 100"
    assert said["charts"] == ["Loss", "Skill beyond each distance alone", "Gradient norm, with what the guard did"]
    assert (said["marks"], said["dots"], said["images"]) == (1, 2, 0)
    for text in ("done", "0.25", "models:/x/1", HOSTILE, "CC0"):
        assert text in said["text"]
    assert said["wide"]  # on a phone nothing is cut off


def test_what_cannot_be_reported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert cdssl(["report", str(tmp_path / "empty")]) == 2
    assert "is it the folder of a run?" in capsys.readouterr().err
    assert cdssl(["report", str(run), "--finetune", str(tmp_path / "empty")]) == 2
    assert "no results.json" in capsys.readouterr().err
    assert cdssl(["report", str(run)]) == 0 and (run / "report.html").exists()
