"""What a run survives: roll-backs, a kill at any moment, a full disk, a lost disk."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from killable import CONTEXT, warm
from launch import free_port, launch
from test_train import config, metrics, run_training, weights

from cdssl_dist.config import Config
from cdssl_dist.train import checkpoint
from cdssl_dist.train.ledger import Ledger
from cdssl_dist.train.runlog import read_lines

STEPS = 32
SPIKES = range(16, 19)  # steps whose gradients are too large, each by another factor
GUARD = {"warmup": 4, "z_spike": 4.0, "min_deviation": 0.3, "rollback_after": 3, "max_rollbacks": 2}


def disturbed(run: Path, data_folder: Path, **changes: Any) -> dict[str, Any]:
    return config(
        run,
        data_folder,
        schedule={"steps": STEPS},
        checkpoint={"every": 2, "quiet": 4, "keep": 1},
        guard=GUARD,
        optim={"ema": 0.9},
        tracking={"every": 1, "validate_every": 20},
        **changes,
    )


class Died(Exception):
    pass


def spiked(content: dict[str, Any], last: int = SPIKES.stop, die: str = "") -> bool:
    """On each rank: train with spikes from the first of SPIKES to before ``last``; die around the roll-back."""
    import torch.distributed as dist

    from cdssl_dist.model.pretext import Denoising
    from cdssl_dist.train import loop

    class Bad(Denoising):
        factor = 1.0

        def loss(self, *args: Any) -> Any:
            squared, figures = super().loss(*args)
            squared.register_hook(lambda gradient: gradient * self.factor)
            return squared, figures

    class Spiked(loop.Trainer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.task = Bad(self.task.expansion, self.task.sigma, self.task.seed)

        def _step(self, step: Any) -> Any:
            bad = SPIKES.start <= step.number < last
            Bad.factor = 10.0 ** (3 + 2 * (step.number % 3)) if bad else 1.0
            return super()._step(step)

        def _load(self, found: Any) -> list[str]:
            if die == "before the reload" and self.ledger.rollbacks:
                raise Died(die)
            return super()._load(found)

        def _roll_back(self) -> None:
            if die == "before the ledger":
                raise Died(die)
            super()._roll_back()

    loop.Trainer = Spiked  # type: ignore[misc]  # in this process, which ends with the run
    complete = loop.train(Config.model_validate(content), echo=False)
    dist.destroy_process_group()
    return complete


@pytest.fixture(scope="module")
def undisturbed(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with spikes and a roll-back, and nothing else."""
    run = tmp_path_factory.mktemp("survival") / "undisturbed"
    assert launch(2, spiked, disturbed(run, data_folder)) == [True, True]
    return run


def equal(run: Path, other: Path) -> None:
    """All figures and weights, bit for bit."""
    for name in ("train/loss", "train/skill_edge", "val/loss", "guard/norm", "guard/z", "guard/verdict", "lr"):
        assert metrics(run, name) == metrics(other, name), name
    a, b = weights(run), weights(other)
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert Ledger.read(run) == Ledger.read(other)


def test_spikes_in_a_row_lead_back_and_to_a_lower_rate(undisturbed: Path) -> None:
    (rollback,) = Ledger.read(undisturbed).rollbacks
    assert rollback.resumed_at == SPIKES.stop
    assert rollback.to == SPIKES.start - 4  # the newest that four steps were quiet after
    verdicts = dict(metrics(undisturbed, "guard/verdict"))
    assert [verdicts[step + 1] for step in SPIKES if step + 1 in verdicts] == [2.0, 2.0]  # skip; the third rolls back
    rates = dict(metrics(undisturbed, "lr"))
    # Four applied steps are forgotten and three never were: the schedule stands where it stood seven steps before.
    assert rates[SPIKES.stop + 1] == pytest.approx(0.5 * rates[rollback.to + 1])


@pytest.mark.parametrize("die", ["before the ledger", "before the reload"])
def test_a_death_during_the_roll_back_forgets_nothing(
    die: str, undisturbed: Path, data_folder: Path, tmp_path: Path
) -> None:
    content = disturbed(tmp_path / "run", data_folder)
    with pytest.raises(AssertionError, match=f"Died: {die}"):
        launch(2, spiked, content, SPIKES.stop, die)
    assert launch(2, spiked, content) == [True, True]
    equal(tmp_path / "run", undisturbed)


def test_roll_backs_do_not_loop(data_folder: Path, tmp_path: Path) -> None:
    content = disturbed(tmp_path / "run", data_folder)
    with pytest.raises(AssertionError, match=r"GuardStop: step 24: gradient norm .* 3 in a row after 2 roll-backs"):
        launch(2, spiked, content, STEPS)
    assert len(Ledger.read(tmp_path / "run").rollbacks) == 2
    with pytest.raises(AssertionError, match="3 in a row after 2 roll-backs"):  # and again, where it is run again
        launch(2, spiked, content, STEPS)


# -- kills -------------------------------------------------------------------------------------------------------------


def life(rank: int, port: int, content: dict[str, Any], how: str, when: int) -> None:
    """One rank, which may meet its end in the ``when``-th save."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    count = itertools.count(1)

    def at_last(function: Callable[..., None], end: Callable[..., None]) -> Callable[..., None]:
        return lambda *args: end(*args) if next(count) == when else function(*args)

    def half_written(_: Any, path: str) -> None:
        Path(path).write_bytes(b"half a checkpoint")
        os.kill(os.getpid(), signal.SIGKILL)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def killed(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if how == "during a save" and rank == 1:
        checkpoint.save_file = at_last(checkpoint.save_file, half_written)
    elif how == "disk full":
        checkpoint.save_file = at_last(checkpoint.save_file, full)
    elif how == "before the marker" and rank == 0:
        plain = checkpoint.write_atomically
        end = at_last(plain, killed)
        checkpoint.write_atomically = lambda path, data: (end if path.name == checkpoint.MARKER else plain)(path, data)
    spiked(content)


def live(content: dict[str, Any], how: str, random: random.Random) -> bool:
    """Two ranks until they are done, which is told, or one of them dies."""
    warm()
    port, log = free_port(), Path(content["run"]) / "metrics.jsonl"
    written = log.stat().st_mtime_ns if log.exists() else 0
    ranks = [CONTEXT.Process(target=life, args=(r, port, content, how, random.randint(1, 6))) for r in range(2)]
    for process in ranks:
        process.start()
    try:
        if how.startswith("kill"):
            deadline = time.monotonic() + 60
            if random.random() < 0.8:  # else somewhere in the start
                while time.monotonic() < deadline and all(p.is_alive() for p in ranks):
                    if log.exists() and log.stat().st_mtime_ns > written:
                        break
                    time.sleep(0.005)
            time.sleep(random.uniform(0.0, 1.0))
            for process in ranks if how == "kill all" else [random.choice(ranks)]:
                process.kill()
        while all(p.is_alive() for p in ranks):
            time.sleep(0.005)
        for process in ranks:
            process.join(0 if any(p.exitcode not in (None, 0) for p in ranks) else 30)
        return [p.exitcode for p in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.join()


HOWS = ("kill one", "kill all", "kill one", "kill all", "during a save", "before the marker", "disk full")


def chaos(kills: int, undisturbed: Path, data_folder: Path, folder: Path) -> Counter[str]:
    """Runs until so many ends were met; each run that is completed must equal the undisturbed one."""
    dice, met = random.Random(0), Counter[str]()
    for number in itertools.count():
        content = disturbed(folder / f"run-{number}", data_folder)
        while met.total() - met["completed"] < kills:
            how = dice.choice(HOWS)
            if live(content, how, dice):
                break
            met[how] += 1
        else:
            if not live(content, "", dice):
                pytest.fail("a life without a disturbance did not end well")
        met["completed"] += 1
        equal(folder / f"run-{number}", undisturbed)
        if met.total() - met["completed"] >= kills:
            return met
    raise AssertionError


def test_a_few_kills(undisturbed: Path, data_folder: Path, tmp_path: Path) -> None:
    chaos(4, undisturbed, data_folder, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_kills(undisturbed: Path, data_folder: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    met = chaos(100, undisturbed, data_folder, tmp_path)
    assert set(met) == {*HOWS, "completed"}
    print(f"\n{dict(met)} in {time.monotonic() - begin:.0f} s")


# -- the mirror --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on a server that speaks S3."""
    pytest.importorskip("s3fs", reason="needs s3fs: pip install cdssl-dist[s3]")
    moto = pytest.importorskip("moto.server", reason="needs a server that speaks S3: pip install 'moto[s3]'")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.filesystem("s3").mkdir("survival")
    yield "s3://survival/run"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


def test_a_run_goes_on_from_the_mirror_where_its_folder_is_gone(
    bucket: str, undisturbed: Path, data_folder: Path, tmp_path: Path
) -> None:
    plain = disturbed(tmp_path / "run", data_folder)
    content = plain | {"checkpoint": {**plain["checkpoint"], "mirror": bucket}}
    assert launch(2, stopped, content, 21) == [False, False]
    system = fsspec.filesystem("s3")
    there = [path for path in system.find("survival/run") if path.endswith(checkpoint.MARKER)]
    assert 1 <= len(there) <= 2
    assert "step-000000021" in max(there)
    shutil.rmtree(tmp_path / "run")
    assert launch(2, spiked, content) == [True, True]
    equal(tmp_path / "run", undisturbed)


def stopped(content: dict[str, Any], after: int) -> bool:
    """``spiked``, asked to stop once ``after`` steps are consumed."""
    from cdssl_dist.train import loop

    plain = loop.train

    def train(config: Config, **more: Any) -> bool:
        trainer: list[Any] = []
        built = loop.Trainer.__init__
        loop.Trainer.__init__ = lambda self, *a: (trainer.append(self), built(self, *a))[1]  # type: ignore
        return plain(config, stop_requested=lambda: trainer[0].cursor + 1 >= after, **more)

    loop.train = train
    return spiked(content)


def test_a_dead_endpoint_costs_the_copy_and_not_the_run(
    undisturbed: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "no-folder"
    blocked.write_text("a file where a folder should be")
    plain = disturbed(tmp_path / "run", data_folder)
    content = plain | {"checkpoint": {**plain["checkpoint"], "mirror": str(blocked / "mirror")}}
    assert launch(2, spiked, content) == [True, True]
    equal(tmp_path / "run", undisturbed)
    assert "not copied" in {line["event"] for line in read_lines(tmp_path / "run" / "events.jsonl")}


def test_a_damaged_checkpoint_is_not_resumed(undisturbed: Path, data_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    newest = max((run / "checkpoints").iterdir())
    state = next(newest.glob("state-*"))
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    with pytest.raises(AssertionError, match=f"{state.name}: missing, or not what COMMITTED says"):
        launch(2, run_training, json.loads((newest / "progress.json").read_text())["config"] | {"run": str(run)})
