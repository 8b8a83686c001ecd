"""The report of a run: its contents, and that it works in a browser."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import act, printed
from encoders import write_encoder_to

from cdssl_dist.cli import main as cdssl
from cdssl_dist.look.report import of_run, write_safely
from cdssl_dist.mlops.mlflow_server import connect, experiment

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
    events = [
        {"step": 30, "time": 30, "event": "skip", "why": HOSTILE},
        {"step": 50, "time": 50, "event": "checkpoint"},
    ]
    events += [{"step": None, "time": t, "event": "workers failed", "what": "killed"} for t in (1, 72)]
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
    results = {"errors": errors, "task": task, "encoder": {"ref": "models:/x/1"}, "sources": [{"name": HOSTILE}]}
    results |= {"crystals": [{"train": 7, "val": 2, "test": 3}], "settings": {"members": 2}, "data_digest": "d" * 64}
    worth = {"factor": 3.5, "covered": 0.625, "uncalibrated": 0.25, "rank": None}
    results |= {"uncertainty": {HOSTILE: worth}}
    history = [
        {"arm": "pretrained", "member": m, "epoch": e, "val": v} for m, e, v in [(0, 0, 3), (1, 0, 1), (0, 1, 2)]
    ]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    (folder / "results.json").write_text(json.dumps(results))
    columns = {f"true:{HOSTILE}": [0.0, 1.0, None], f"pretrained:{HOSTILE}": [0.5, 1.0, 2.0]}
    pq.write_table(pa.table(columns), folder / "predictions.parquet")
    return folder


@pytest.fixture
def mapped(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    columns = {"key": [HOSTILE, *(f"c-{i}" for i in range(19))], "formula": ["NaCl"] * 20}
    columns |= {"density": random.random(20), "embedding": random.random((20, 3)).tolist()}
    pq.write_table(pa.table(columns), tmp_path / "vectors.parquet")
    assert cdssl(["map", str(tmp_path / "vectors.parquet"), "--method", "pca", "--out", str(tmp_path / "map")]) == 0
    return tmp_path / "map"


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
POINT = """
const area = canvas.getBoundingClientRect(), [x, y] = place(0), s = canvas.width / area.width;
canvas.dispatchEvent(new PointerEvent("pointermove", {clientX: area.left + x / s, clientY: area.top + y / s}));
said.crystal = told.textContent; said.kept = document.getElementById("kept").textContent;
"""


def test_the_report_in_a_browser(run: Path, tuned: Path, mapped: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    more = ["--finetune", str(tuned), "--map", str(mapped)]
    assert cdssl(["report", str(run), *more, "--out", str(out)]) == 0
    said = act(out, ACT + POINT, tmp_path)
    assert said["at"] == "train/loss 0.04 at step 100"
    charts = ["Loss", "Skill beyond each distance alone (values above −½)", "Gradient norm, and actions of the guard"]
    assert said["charts"] == [*charts, "Lowest validation error so far, eV"]
    assert (said["marks"], said["dots"], said["images"]) == (3, 2, 0)
    assert re.findall(r"(\d+)\s+workers failed", said["text"]) == ["0", "70"]  # the last step before each
    for text in ("done", "0.25", "models:/x/1", HOSTILE, "CC0"):
        assert text in said["text"]
    assert said["wide"]  # on a phone nothing is cut off
    assert said["crystal"].startswith(HOSTILE) and "density" in said["kept"]


def test_the_page_of_a_fine_tuning_in_a_browser(tuned: Path, tmp_path: Path) -> None:
    assert cdssl(["report", str(tuned)]) == 0
    said = act(tuned / "report.html", ACT, tmp_path)
    assert said["at"] == "pretrained 1.5 at epoch 1"  # the first network's 2, and the 1 at which the second stopped
    assert (said["dots"], said["images"], said["wide"]) == (2, 0, True)
    for text in ("0.25 eV", "7 / 2 / 3", "0.625", HOSTILE):
        assert text in said["text"]


def test_on_paper(run: Path, tuned: Path, mapped: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert cdssl(["report", str(run), "--finetune", str(tuned), "--map", str(mapped), "--out", str(out)]) == 0
    pdf = printed(out, tmp_path)
    assert pdf.startswith(b"%PDF") and 2 <= len(re.findall(rb"/Type /Page\b", pdf)) <= 6


def test_what_cannot_be_reported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert cdssl(["report", str(tmp_path / "empty")]) == 2
    assert "is this the folder of a run?" in capsys.readouterr().err
    assert cdssl(["report", str(run), "--finetune", str(tmp_path / "empty")]) == 2
    assert "no results.json" in capsys.readouterr().err
    assert cdssl(["report", str(run), "--map", str(tmp_path / "empty")]) == 2
    assert "not a readable table of cdssl map" in capsys.readouterr().err
    assert cdssl(["report", str(run), "--upload"]) == 2
    assert "not a run that was tracked in MLflow" in capsys.readouterr().err
    assert cdssl(["report", str(run)]) == 0 and (run / "report.html").exists()


def test_no_secret_is_in_a_page(run: Path) -> None:
    """It is there to be passed on, and goes into MLflow."""
    (run / "config.yaml").write_text("tracking:\n  uri: https://alice:S3cret@mlflow.example.org\n")
    with open(run / "events.jsonl", "a") as file:
        told = {"step": 3, "time": 1, "event": "not copied", "what": "s3://bucket/run?token=abcTOKEN: no answer"}
        file.write(json.dumps(told) + "\n")
    text = of_run(run)
    assert "mlflow.example.org" in text and "no answer" in text
    assert "S3cret" not in text and "abcTOKEN" not in text


def test_a_page_that_cannot_be_made_costs_a_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_safely(run, lambda drawn: of_run(run, drawn=drawn), lambda: 1 / 0)  # type: ignore[arg-type,return-value]
    assert "has no map (ZeroDivisionError" in capsys.readouterr().err
    assert "Gradient norm" in (run / "report.html").read_text()
    (run / "report.html").unlink()
    (run / "status.json").write_text("no JSON\n")
    write_safely(run, lambda drawn: of_run(run, drawn=drawn))
    assert "status.json: cannot be read" in capsys.readouterr().err and not (run / "report.html").exists()


def test_a_page_is_replaced_in_mlflow(run: Path, mlflow_store: Path) -> None:
    shutil.copy(mlflow_store, run.parent / "mlflow.db")
    uri = f"sqlite:///{run.parent}/mlflow.db"
    (run / "config.yaml").write_text(f"tracking: {{uri: '{uri}'}}\n")
    client = connect(uri)
    run_id = client.create_run(experiment(client, uri, "pretraining")).info.run_id
    (run / "mlflow-run.json").write_text(json.dumps({"run_id": run_id}))
    assert cdssl(["report", str(run), "--upload"]) == 0
    (artifact,) = client.list_artifacts(run_id)
    assert artifact.path == "report.html" and artifact.file_size == (run / "report.html").stat().st_size
