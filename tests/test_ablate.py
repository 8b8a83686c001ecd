"""Ablations: which variants are trained, which are reused, and what the table reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from encoders import write_encoder_to

from cdssl_dist import ablate
from cdssl_dist.cli import main as cdssl
from cdssl_dist.config import load, packaged
from cdssl_dist.pretrain import with_absolute_paths

VARIANTS = {"base": [], "low": ["noise.sigma=0.1"], "same": ["noise.seed=0"]}
TARGET = "computed:density"


@pytest.fixture
def config(tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three variants that are done; the third one's encoder is that of the first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CDSSL_DATA", str(data_folder))
    content = {
        "out": "ablation",
        "config": "pretrain/demo.yaml",
        "overrides": ["schedule.steps=7", "data.path=null"],
        "variants": VARIANTS,
        "probe": {"targets": [TARGET], "crystals": 200, "folds": 3},
    }
    path = tmp_path / "ablation.yaml"
    path.write_text(yaml.safe_dump(content))
    for i, (name, changes) in enumerate(VARIANTS.items()):
        folder = write_encoder_to(tmp_path / "ablation" / name, seed=i % 2)
        known = ["schedule.steps=7", "data.path=null", *changes, f"run=ablation/{name}", "registry.name=null"]
        made = with_absolute_paths(load(packaged("pretrain/demo.yaml"), known))
        (folder / "config.yaml").write_text(yaml.safe_dump(made.model_dump(mode="json")))
        status = {"state": "done", "step": 7, "val/skill": 0.5, "val/skill_edge": 0.125}
        (folder / "status.json").write_text(json.dumps(status))
        (folder / "metrics.jsonl").write_text('{"step": 7, "perf/edges_s": 250000}\n')
    return path


def run(config: Path, *more: str) -> int:
    return cdssl(["ablate", "--config", str(config), "--data", "aflow:100", *more])


def test_what_is_done_is_probed_and_not_trained_again(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ablate, "run_child", lambda *_: pytest.fail("trains"))
    assert run(config) == 0
    text = Path("ablation/table.md").read_text()
    assert text in capsys.readouterr().out
    rows = {cells[0]: cells for line in text.splitlines() if len(cells := line.strip("| ").split(" | ")) > 5}
    assert rows["base"][2:6] == ["7", "0.250", "0.500", "0.125"]
    assert rows["base"][-1] == rows["same"][-1] != rows["low"][-1]

    assert (
        cdssl(["probe", "--encoder", "ablation/base", "--data", "aflow:100", "--target", TARGET, "--folds", "3"]) == 0
    )
    said = {line[:34].strip(): line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    for name in ("composition", "composition + volume"):  # the same crystals in another order, in other folds
        assert float(rows[name][-1]) == pytest.approx(float(said[name]), abs=0.15)


def test_vectors_of_others_have_a_row(config: Path) -> None:
    assert cdssl(["embed", "--encoder", "ablation/base", "--data", "aflow:100", "--out", "own.parquet"]) == 0
    assert run(config, "probe.vectors={other: own.parquet}") == 0
    rows = [line.strip("| ").split(" | ") for line in Path("ablation/table.md").read_text().splitlines()]
    score = {cells[0]: cells[-1] for cells in rows}
    assert float(score["other"]) == pytest.approx(float(score["base"]), abs=0.002)


def test_what_is_not_done_is_trained(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Sequence[str]] = []

    def trains(command: Sequence[str]) -> int:
        called.append(command)
        return 0 if len(called) == 1 else 75

    monkeypatch.setattr(ablate, "run_child", trains)
    (Path("ablation/base/status.json")).write_text('{"state": "training", "step": 3}')
    assert run(config, "variants.low=[noise.sigma=0.2]") == 75  # stopped: what comes after it is for another time
    first, second = (command[command.index("pretrain") + 1 :] for command in called)
    assert {"run=ablation/base", "registry.name=null", "schedule.steps=7"} <= set(first)
    assert {"run=ablation/low", "noise.sigma=0.2"} <= set(second)
    assert not Path("ablation/table.md").exists()


def test_a_variant_is_a_folder(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(config, "variants.a/b=[]") == 2
    assert "'a/b': a variant is a folder below out" in capsys.readouterr().err


def test_what_is_missing_is_said_before_anything_is_trained(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ablate, "run_child", lambda *_: pytest.fail("trains"))
    more = ["variants.low=[noise.sigma=0.2]"]  # which is not done
    for change, said in {
        "variants={}": "variants",
        "probe.folds=1": "probe.folds",
        "probe.targets=[nope]": "nope",
        "probe.vectors.mine=absent.parquet": "absent.parquet",
    }.items():
        assert run(config, *more, change) == 2
        assert said in capsys.readouterr().err
