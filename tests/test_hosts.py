"""A run over several hosts that are cut off, killed and added, at any ZeRO stage, submitted as a job."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launch import launch
from test_train import config, metrics, run_training

HERE = Path(__file__).parent


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces with names need root and ip"
)
@pytest.mark.skipif(not importlib.util.find_spec("aiohttp_cors"), reason="a head that takes jobs needs ray[default]")
def test_hosts_come_and_go_and_the_run_is_as_if_they_had_not(data_folder: Path, tmp_path: Path) -> None:
    sizes = {"data": {"packs_per_step": 4}, "schedule": {"steps": 600}, "checkpoint": {"every": 5}}
    sizes |= {"tracking": {"every": 5, "validate_every": 600}, "engine": {"stage": 2}}
    cluster = {"workers": [1, 2], "resize_every": 5, "hang_after": 60, "max_failures": -1}
    content = config(tmp_path / "run", data_folder, **sizes, cluster=cluster, registry={"name": None})
    (tmp_path / "run.json").write_text(json.dumps(content))
    namespaces = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    told = subprocess.run(
        [*namespaces, sys.executable, str(HERE / "hosts_run.py"), str(tmp_path), str(tmp_path / "run.json")],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["stranger"] != 0
    assert len(results["failures"]) >= 2 and results["failures of the drain"] == 0
    assert results["stopped"]["state"] == "stopped" and "stopped with its state saved" in results["said"]
    assert (
        "succeeded" in results["status"].lower()
        and "resumed from step" in results["logs"]
        and "encoder:" in results["logs"]
    )

    launch(2, run_training, config(tmp_path / "undisturbed", data_folder, **sizes), 200)
    found, expected = (dict(metrics(tmp_path / name, "train/loss")) for name in ("run", "undisturbed"))
    assert sorted(found) == list(range(5, 601, 5))
    np.testing.assert_allclose([found[s] for s in expected], list(expected.values()), rtol=1e-3)
