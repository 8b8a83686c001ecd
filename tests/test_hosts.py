"""A run over several hosts that are cut off, killed and added, at any ZeRO stage, submitted as a job."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from launch import launch
from pods import in_namespaces
from test_train import config, metrics, run_training


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not importlib.util.find_spec("aiohttp_cors"), reason="a head that takes jobs needs ray[default]")
def test_hosts_come_and_go_and_the_run_is_as_if_they_had_not(data_folder: Path, tmp_path: Path) -> None:
    sizes = {"data": {"packs_per_step": 4}, "schedule": {"steps": 1000}, "checkpoint": {"every": 5}}
    sizes |= {"tracking": {"every": 5, "validate_every": 1000}, "engine": {"stage": 2}}
    cluster = {"workers": [1, 2], "resize_every": 5, "hang_after": 60, "max_failures": -1}
    content = config(tmp_path / "runs" / "run", data_folder, **sizes, cluster=cluster, registry={"name": None})
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "run.json").write_text(json.dumps(content))
    print(in_namespaces("hosts_run.py", tmp_path, tmp_path / "config" / "run.json"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["stranger"] != 0
    assert len(results["failures"]) >= 2 and results["failures of the drain"] == 0
    assert results["stopped"]["state"] == "stopped" and "stopped with its state saved" in results["said"]
    assert (
        "succeeded" in results["status"].lower()
        and "resumed from step" in results["logs"]
        and "encoder:" in results["logs"]
    )

    launch(2, run_training, config(tmp_path / "runs" / "undisturbed", data_folder, **sizes), 200)
    found, expected = (dict(metrics(tmp_path / "runs" / name, "train/loss")) for name in ("run", "undisturbed"))
    assert sorted(found) == list(range(5, 1001, 5))
    np.testing.assert_allclose([found[s] for s in expected], list(expected.values()), rtol=1e-3)
