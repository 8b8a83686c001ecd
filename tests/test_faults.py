"""Faults during runs: ranks and drivers that are killed, hang or are asked to stop, and memory that runs out."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
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
from test_survival import equal
from test_train import config, run_training

from cdssl_dist.config import Config
from cdssl_dist.data.dataset import DataSet
from cdssl_dist.train.rank import HUNG, hung
from cdssl_dist.train.runlog import read_lines, read_status


class Driven:
    """A run of ``cdssl pretrain``, which starts Ray in a network namespace of its own."""

    def __init__(self, work: Path, content: dict[str, Any], **env: str) -> None:
        self.folder, self.said, self.config = Path(content["run"]), work / "said", work / "run.json"
        self.command = [*alone(), sys.executable, "-m", "cdssl_dist.pretrain", "--config", str(self.config)]
        self.env = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{work}/mlflow.db", "RAY_TMPDIR": "/tmp"} | env
        self.start(content)

    def start(self, content: dict[str, Any] | None = None) -> None:
        """Run the command, for the first time or again, with another configuration or the same."""
        if content:
            self.config.write_text(json.dumps(content))  # JSON is YAML
        self.driver = subprocess.Popen(self.command, env=self.env, stderr=open(self.said, "a"))

    def until(self, true: Callable[[], Any], limit: float = 600.0) -> None:
        end = time.monotonic() + limit
        while not true():
            assert self.driver.poll() is None, f"the driver ended: {self.said.read_text()[-3000:]}"
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.05)

    def step(self) -> int:
        return self.status().get("step", 0)

    def status(self) -> dict[str, Any]:
        return read_status(self.folder)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in read_lines(self.folder / "events.jsonl") if line["event"] == kind]

    def processes(self, name: str) -> list[psutil.Process]:
        """Those of Ray whose command line has such a word in it."""
        found = []
        for process in psutil.Process(self.driver.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # gone meanwhile
                if any(name in part for part in process.cmdline()):
                    found.append(process)
        return found

    def has_stopped_with_its_state(self) -> None:
        assert self.driver.wait(300) == 75
        assert "stopped with its state saved" in self.said.read_text()
        assert self.status()["state"] == "stopped"
        assert self.events("checkpoint")[-1]["step"] == self.step()

    def equals(self, undisturbed: Path) -> None:
        """The command comes to its end, and what it leaves is what the other run left."""
        assert self.driver.wait(900) == 0, self.said.read_text()[-3000:]
        equal(self.folder, undisturbed)

    def ranks(self) -> list[psutil.Process]:
        """The processes that train."""
        return self.processes("RayTrainWorker")


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_that_everything_befalls_equals_an_undisturbed_one(data_folder: Path, tmp_path: Path) -> None:
    # Long enough that no request, which is looked up once a second, comes when the run has ended.
    steps = {"schedule": {"steps": 600}, "checkpoint": {"every": 10}, "tracking": {"every": 1, "validate_every": 300}}
    launch(2, run_training, config(tmp_path / "undisturbed", data_folder, **steps))
    cluster = {"workers": 2, "hang_after": 25}
    run = Driven(tmp_path, config(tmp_path / "run", data_folder, **steps, cluster=cluster, registry={"name": None}))

    # A rank is killed, and later one hangs: the group starts again, twice.
    run.until(lambda: run.step() >= 25)
    run.ranks()[1].kill()
    run.until(lambda: len(run.events("workers failed")) == 1 and run.step() >= 45)
    run.ranks()[1].suspend()
    run.until(lambda: len(run.events("workers failed")) == 2)
    assert "made no progress" in run.events("workers failed")[1]["what"]
    assert any("all_reduce" in p.read_text() for p in (run.folder / "stacks").iterdir())
    run.until(lambda: run.step() >= 65)
    # The driver is killed: its workers go too, and the next one goes on.
    orphans = run.ranks()
    run.driver.kill()
    run.driver.wait()
    assert not psutil.wait_procs(orphans, timeout=60)[1]
    # One worker is told to go: all save, and the driver says that it wants to be run again.
    before = run.step()
    run.start()
    run.until(lambda: run.step() >= before + 20)  # trains again, so that workers listen
    run.ranks()[1].send_signal(signal.SIGTERM)
    run.has_stopped_with_its_state()
    run.start()
    run.equals(tmp_path / "undisturbed")


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_stop_that_cannot_save_in_time_ends_all_the_same(data_folder: Path, tmp_path: Path) -> None:
    steps = {"schedule": {"steps": 400}, "checkpoint": {"every": 10}, "tracking": {"every": 1, "validate_every": 200}}
    launch(2, run_training, config(tmp_path / "undisturbed", data_folder, **steps))
    cluster = {"workers": 2, "stop_within": 5.0}
    content = config(tmp_path / "run", data_folder, **steps, cluster=cluster, registry={"name": None})
    run = Driven(tmp_path, content)
    run.until(lambda: run.step() >= 25)
    orphans = run.ranks()
    orphans[0].suspend()  # from here on no step can be completed, until the kernel continues what has lost its parent
    seen = run.step()
    run.driver.send_signal(signal.SIGTERM)
    assert run.driver.wait(120) == 75
    assert "not saved within 5 s: the last checkpoint remains" in run.said.read_text()
    assert "with its state saved" not in run.said.read_text()
    assert not psutil.wait_procs(orphans, timeout=60)[1]

    content["cluster"]["stop_within"] = 120.0  # from here on it can be saved, on however busy a machine
    run.start(content)  # as a cluster does that retries the code
    run.until(lambda: "resumed from step" in run.said.read_text())
    resumed = int(re.findall(r"resumed from step (\d+)", run.said.read_text())[-1])
    assert seen - 10 <= resumed <= seen + 2  # behind seen where the workers saved while they were being ended
    run.until(lambda: run.step() > seen)
    run.driver.send_signal(signal.SIGTERM)
    run.has_stopped_with_its_state()
    run.start()
    run.equals(tmp_path / "undisturbed")


KILLS = {"a rank": 4, "all ranks": 3, "the driver": 3, "the head": 3}


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_at_random_through_ray(data_folder: Path, tmp_path: Path) -> None:
    steps = {"schedule": {"steps": 600}, "checkpoint": {"every": 10}, "tracking": {"every": 1, "validate_every": 200}}
    launch(2, run_training, config(tmp_path / "undisturbed", data_folder, **steps))
    cluster, begin, dice = {"workers": 2, "max_failures": -1}, time.monotonic(), random.Random(0)
    content = config(tmp_path / "run", data_folder, **steps, cluster=cluster, registry={"name": None})
    run = Driven(tmp_path, content, RAY_gcs_rpc_server_reconnect_timeout_s="5")  # how long a driver waits for its head
    kills = [kind for kind, number in KILLS.items() for _ in range(number)]
    dice.shuffle(kills)
    for kind in kills:
        before = run.step()
        if dice.random() < 0.8:  # else while it starts, again or for the first time
            run.until(lambda before=before: run.step() > before)
        else:
            run.until(run.ranks)
        time.sleep(dice.uniform(0.0, 0.5))
        victims = {"a rank": lambda: [dice.choice(run.ranks())], "all ranks": run.ranks}
        if kind in victims:
            run.until(run.ranks)
            for rank in victims[kind]():
                rank.kill()
            continue
        if kind == "the driver":
            run.driver.kill()
        else:
            for process in [*run.processes("gcs_server"), *run.processes("raylet/raylet")]:
                process.kill()
        assert run.driver.wait(180) != 0
        run.start()
    assert run.driver.wait(1800) == 0, run.said.read_text()[-3000:]
    print(f"\n{KILLS} in {time.monotonic() - begin:.0f} s; restarts by Ray: {len(run.events('workers failed'))}")
    equal(run.folder, tmp_path / "undisturbed")


def stuck(content: dict[str, Any], rank: int) -> None:
    """On each rank: train under the watchdog; one goes to sleep in its third step."""
    import torch
    import torch.distributed as dist

    from cdssl_dist.train import loop
    from cdssl_dist.train.rank import STACKS, watchdog

    plain = loop.Trainer._step

    def drowsy(self: Any, step: Any) -> Any:
        if step.number == 2 and dist.get_rank() == rank:
            time.sleep(600)
        return plain(self, step)

    loop.Trainer._step = drowsy  # type: ignore[method-assign]
    torch.set_num_threads(1)
    run = Config.model_validate(content)
    path = Path(run.run) / STACKS / f"1-rank-{os.environ['RANK']:>05}.txt"
    with watchdog(path, 8.0, first=200.0) as progress:
        loop.train(run, stop_requested=lambda: bool(progress()), echo=False)


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

    from cdssl_dist.train import loop
    from cdssl_dist.train.system import OutOfMemory

    plain = loop.Trainer._step

    def hungry(self: Any, step: Any) -> Any:
        if step.number == 3:
            torch.empty(1 << 55)
        return plain(self, step)

    loop.Trainer._step = hungry  # type: ignore[method-assign]
    try:
        loop.train(Config.model_validate(content), echo=False)
    except OutOfMemory as why:
        return str(why)
    finally:
        dist.destroy_process_group()
    return ""


def test_memory_that_runs_out_is_reported_with_the_pack(data_folder: Path, tmp_path: Path) -> None:
    from cdssl_dist.data.plan import EpochPlan

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
