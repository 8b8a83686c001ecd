"""The benchmarks measure what they say: their data is readable, their figures are complete."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cdssl_dist.bench import data
from cdssl_dist.bench.__main__ import main
from sharding.crystal import Crystal
from sharding.graph import build
from sharding.sources import open_source


@pytest.mark.parametrize("write", [data.write_json, data.write_csv])
def test_what_is_made_where_nothing_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: object) -> None:
    """Texts say the same crystals as ``aflow:`` itself."""
    monkeypatch.setattr(data, "SHARED", tmp_path)
    path = tmp_path / ("some.json" if write is data.write_json else "some.csv")
    write(path, 40)  # type: ignore[operator]
    source = open_source(str(path))
    crystals = [item for record in source.records() for item in source.parse(record)]
    assert all(isinstance(item, Crystal) for item in crystals)
    expected, _ = build(data.made(40), 5.0)
    graphs, refused = build(crystals, 5.0)  # type: ignore[arg-type]
    assert not refused
    assert graphs.n_edges.tolist() == expected.n_edges.tolist()
    assert len(set(graphs.keys)) == 40


@pytest.mark.slow
def test_the_figures_are_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "--json", "--repeat", "1", "--crystals", "512"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert {"json", "csv"} <= figures["text to shard"].keys()
    for search in figures["neighbour search"].values():
        assert search["directed edges"] == search["pymatgen's directed edges"] > 0
    assert [row["crystals"] for row in figures["growth"]] == [64, 128, 256, 512]


WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("ray", "deepspeed", "pymatgen", "pydantic", "mlflow"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from cdssl_dist.bench.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_plain_step_needs_torch_and_a_data_set_only(data_folder: Path) -> None:
    arguments = ["step", "--engine", "plain", "--data", str(data_folder), "--steps", "1", "--repeat", "1", "--json"]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["ms per step"]["plain torch"] > 0


def test_a_step_with_everything(data_folder: Path) -> None:
    arguments = ["step", "--data", str(data_folder), "--steps", "2", "--repeat", "1", "--json", "--dtype", "bf16"]
    command = [sys.executable, "-m", "cdssl_dist.bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout[done.stdout.index("{\n") :])
    assert set(figures["ms per step"]) == {"plain torch", "engine", "engine, guard, metrics"}
    assert 0 < figures["checkpoint"]["share"] < 1
    assert figures["kill to new step, s"] > 0


def test_wrong_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["graph", "--repeat", "0"])
    assert "--repeat must be 1" in capsys.readouterr().err.splitlines()[-1]
