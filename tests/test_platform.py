"""The platform in k8s/, run for real except for Kubernetes itself: see platform_run.py."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from pods import in_namespaces

MODULES = ("aiohttp_cors", "boto3", "flask_wtf", "moto", "psycopg2")


@pytest.mark.slow
@pytest.mark.netns
@pytest.mark.server
@pytest.mark.timeout(1800)
def test_submit_pretrain_register_finetune(tmp_path: Path) -> None:
    if lacking := [name for name in MODULES if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(lacking)}: make setup")
    if not any(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        pytest.skip("needs postgresql")
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents:  # the user of the pods must find its volumes
        if folder.stat().st_mode & 0o001 == 0:
            folder.chmod(folder.stat().st_mode | 0o011)
    print(in_namespaces("platform_run.py", tmp_path))

    results = json.loads((tmp_path / "results.json").read_text())
    assert "s3://cdssl/shards/main" in results["shard"]
    assert "SUCCEEDED" in results["shard"]
    assert "SUCCEEDED" not in results["wrong token"]
    code, _, seconds, at = results["hook"]
    assert code == 0
    assert seconds < 120  # cdssl.dev/checkpoint-seconds
    assert at["state"] == "stopped"
    assert 0 < at["step"] < 400
    assert "stopped with its state saved" in results["stopped"]
    assert "FAILED" in results["stopped"]  # so that the operator tries again
    assert results["status"]["state"] == "done"
    assert "models:/cdssl-encoder/1" in results["pretrain"]
    assert "SUCCEEDED" in results["pretrain"]
    assert "SUCCEEDED" in results["finetune"]
    assert "from scratch" in results["finetune"]
    assert "champion" in results["list"]
    code, said = results["promote"]
    assert code == 2
    assert "not allowed" in said
