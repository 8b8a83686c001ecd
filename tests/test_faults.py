"""What befalls runs: ranks and drivers that are killed, that hang, that are told to go, and memory that runs out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from launch import launch
from test_commands import alone
from test_train import config, metrics, run_training, weights

from cdssl_dist.config import Config
from cdssl_dist.loader import DataSet
from cdssl_dist.rank import HUNG, hung
from cdssl_dist.runlog import read_lines


def until(true: Callable[[], Any], driver: subprocess.Popen[Any], limit: float = 600.0) -> None:
    end = time.monotonic() + limit
    while not true():
        assert driver.poll() is None and time.monotonic() < end, "the driver ended, or nothing happened"
        time.sleep(0.2)


def ranks(driver: subprocess.Popen[Any]) -> list[psutil.Process]:
    """The processes that train."""
    family = psutil.Process(driver.pid).children(recursive=True)
    return [p for p in family if any("RayTrainWorker" in part for part in p.cmdline())]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / "events.jsonl") if line["event"] == kind]


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_that_everything_befalls_equals_an_undisturbed_one(data_folder: Path, tmp_path: Path) -> None:
    steps = {"schedule": {"steps": 200}, "checkpoint": {"every": 10}, "tracking": {"every": 1, "validate_every": 100}}
    launch(2, run_training, config(tmp_path / "undisturbed", data_folder, **steps))
    run = tmp_path / "run"
    content = config(run, data_folder, **steps, cluster={"workers": 2, "hang_after": 25}, registry={"name": None})
    (tmp_path / "run.json").write_text(json.dumps(content))  # JSON is YAML
    command = [*alone(), sys.executable, "-m", "cdssl_dist.pretrain", "--config", str(tmp_path / "run.json")]
    env = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "RAY_TMPDIR": "/tmp"}

    def start() -> subprocess.Popen[Any]:
        return subprocess.Popen(command, env=env, stderr=open(tmp_path / "said", "a"))

    def step() -> int:
        return max((line["step"] for line in read_lines(run / "metrics.jsonl")), default=0)

    # A rank is killed, and later one hangs: the group starts again, twice.
    driver = start()
    until(lambda: step() >= 25, driver)
    ranks(driver)[1].kill()
    until(lambda: len(events(run, "workers failed")) == 1 and step() >= 45, driver)
    ranks(driver)[1].suspend()
    until(lambda: len(events(run, "workers failed")) == 2, driver)
    assert "made no progress" in events(run, "workers failed")[1]["what"]
    assert any("all_reduce" in p.read_text() for p in (run / "stacks").iterdir())
    until(lambda: step() >= 65, driver)
    # The driver is killed: its workers go too, and the next one goes on.
    orphans = ranks(driver)
    driver.kill()
    driver.wait()
    assert not psutil.wait_procs(orphans, timeout=60)[1]
    # One worker is told to go: all save, and the driver says that it wants to be run again.
    driver = start()
    until(lambda: step() >= 85 and len(ranks(driver)) == 2, driver)
    ranks(driver)[1].send_signal(signal.SIGTERM)
    assert driver.wait(300) == 75
    saved = json.loads((run / "status.json").read_text())
    assert saved["state"] == "stopped" and events(run, "checkpoint")[-1]["step"] == saved["step"]
    driver = start()
    assert driver.wait(900) == 0, (tmp_path / "said").read_text()[-3000:]

    for name in ("train/loss", "val/loss", "guard/norm", "lr"):
        assert metrics(run, name) == metrics(tmp_path / "undisturbed", name)
    expected = weights(tmp_path / "undisturbed")
    assert all((tensor == expected[name]).all() for name, tensor in weights(run).items())


def stuck(content: dict[str, Any], rank: int) -> None:
    """On each rank: train under the watchdog; one goes to sleep in its third step."""
    import torch
    import torch.distributed as dist

    from cdssl_dist import train_loop
    from cdssl_dist.rank import STACKS, watched

    plain = train_loop.Trainer._step

    def drowsy(self: Any, step: Any) -> Any:
        if step.number == 2 and dist.get_rank() == rank:
            time.sleep(600)
        return plain(self, step)

    train_loop.Trainer._step = drowsy  # type: ignore[method-assign]
    torch.set_num_threads(1)
    run = Config.model_validate(content)
    path = Path(run.run) / STACKS / f"1-rank-{os.environ['RANK']:>05}.txt"
    with watched(path, 8.0, first=200.0) as progress:
        train_loop.train(run, stop_requested=lambda: bool(progress()), echo=False)


def test_ranks_that_hang_end_themselves_and_tell_who_is_to_blame(data_folder: Path, tmp_path: Path) -> None:
    code = "import json, sys; from test_faults import stuck; stuck(json.loads(sys.argv[1]), 1)"
    from launch import free_port

    content = json.dumps(config(tmp_path, data_folder))
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    found = [
        subprocess.Popen(
            [sys.executable, "-c", code, content],
            env=os.environ | where | {"RANK": str(r), "LOCAL_RANK": str(r), "PYTHONPATH": path},
        )
        for r in range(2)
    ]
    assert [process.wait(120) for process in found] == [HUNG, HUNG]
    (told,) = hung(tmp_path, since=0.0)
    assert "rank 1 made no progress" in told and "in drowsy" in told
    assert hung(tmp_path, since=time.time() + 1.0) == []


def greedy(content: dict[str, Any]) -> str:
    """On each rank: train, and ask for more memory than there is in step 3."""
    import torch
    import torch.distributed as dist

    from cdssl_dist import train_loop
    from cdssl_dist.system import OutOfMemory

    plain = train_loop.Trainer._step

    def hungry(self: Any, step: Any) -> Any:
        if step.number == 3:
            torch.empty(1 << 55)
        return plain(self, step)

    train_loop.Trainer._step = hungry  # type: ignore[method-assign]
    try:
        train_loop.train(Config.model_validate(content), echo=False)
    except OutOfMemory as why:
        return str(why)
    finally:
        dist.destroy_process_group()
    return ""


def test_memory_that_runs_out_is_reported_with_the_pack(data_folder: Path, tmp_path: Path) -> None:
    from cdssl_dist.plan import EpochPlan

    told = launch(2, greedy, config(tmp_path, data_folder))
    table = DataSet(str(data_folder)).table("train")
    for rank, text in enumerate(told):
        ((entry,),) = [EpochPlan(table, 0, 1, 2).step(3)[rank]]
        assert f"step 3 on rank {rank} of 2, pack of blocks [{table.block[entry.index]}]" in text
        assert "data.blocks_per_pack" in text


def test_a_range_of_workers() -> None:
    from cdssl_dist.config import ConfigError, load

    cluster = load(None, ["cluster.workers=[2, 8]"]).cluster
    assert (cluster.min_workers, cluster.max_workers) == (2, 8)
    for wrong, said in (("[2, 9]", "packs_per_step"), ("[3, 2]", "ascending"), ("0", "workers"), ("[0, 2]", "workers")):
        with pytest.raises(ConfigError, match=said):
            load(None, [f"cluster.workers={wrong}"])
