"""Sharding on a Ray cluster: the same bytes as on one machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_commands import alone
from test_format import contents, optimade
from test_sharding_runs import COMMAND

from sharding.__main__ import main
from sharding.crystal import Crystal
from sharding.executor import Executor, WorkerError

# A cluster of its own, in namespaces of its own: it ends with the first of its processes.
SCRIPT = """
set -e
ray start --head --port 6399 --num-cpus 2 --temp-dir "$RAY_TMPDIR" --include-dashboard false \
    --disable-usage-stats --object-store-memory 80000000 > "$RAY_TMPDIR.log" 2>&1
RAY_AUTH_TOKEN=$WRONG "$@" || echo "exit code $?" >&2
"$@"
"""


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A short path: it becomes part of the names of sockets."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.netns
@pytest.mark.server
def test_the_same_bytes_on_ray(tmp_path: Path, aflow: list[Crystal], ray_folder: Path) -> None:
    source = optimade(tmp_path / "some.parquet", aflow[:200], {5: {"species_at_sites": ["Xx"]}}, group=32)
    namespaces = alone()
    namespaces[1:1] = ["--pid", "--fork", "--kill-child", "--mount-proc"]
    command = [sys.executable, "-m", "sharding", str(source), *COMMAND]
    on_ray = ["--out", str(tmp_path / "ray"), "--address", "127.0.0.1:6399", "--workers", "2"]
    tokens = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 63 + "1", "WRONG": "0" * 64}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    answer = subprocess.run(
        [*namespaces, "sh", "-c", SCRIPT, "sh", *command, *on_ray],
        env=os.environ | tokens | {"RAY_TMPDIR": str(ray_folder), "PATH": path},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert answer.returncode == 0, answer.stderr
    refused = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
    assert len(refused) == 1
    assert "no Ray cluster at 127.0.0.1:6399 can be joined" in refused[0]
    assert "exit code 1" in answer.stderr
    assert "Traceback" not in answer.stderr
    assert main([*command[3:], "--out", str(tmp_path / "here"), "--workers", "1"]) == 0
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")


@pytest.mark.netns
def test_no_cluster_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="no Ray cluster at nonsense can be joined"):
        list(Executor(address="nonsense").map(len, [[]]))


@pytest.mark.parametrize(
    ("code", "mode", "said"),
    [
        ("", "disabled", "RAY_AUTH_MODE is not token: anyone who can reach the ports"),
        ("import ray", None, "Ray was imported before RAY_AUTH_MODE=token was set"),
    ],
)
def test_a_cluster_of_its_own_is_never_open(code: str, mode: str | None, said: str) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": mode} if mode else {}
    program = f"{code}\nfrom sharding.ray_start import start_ray\nstart_ray('local')"
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and said in run.stderr
