"""A run folder reaches MLflow completely, exactly once, and without the server affecting the run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from cdssl_dist.config import Config, parse
from cdssl_dist.mlops import tracking
from cdssl_dist.mlops.mlflow_server import connect, metric_name, redact, tracking_uri
from cdssl_dist.mlops.tracking import Spool, follow_pretraining
from cdssl_dist.train.runlog import RunLog, read_lines

SECRET = "hunter2-correct-horse"


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without content: making one takes seconds."""
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def home(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a SQLite MLflow, the default for run folders in it."""
    for name in [n for n in os.environ if n.startswith("MLFLOW_") and n != "MLFLOW_DISABLE_TELEMETRY"]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(tracking, "BATCH", 25)  # many batches out of few lines
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


def test_a_database_that_was_interrupted_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow could not use it ever after."""
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sqlalchemy.orm.Session.commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            connect(uri).search_experiments()
    assert list((tmp_path / "new").iterdir()) == []
    assert [e.name for e in connect(uri).search_experiments()] == ["Default"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["mlflow.db"]


def write(folder: Path, steps: range, cursor: int = 10**9, value: float = 0.0) -> None:
    """Lines of metrics as a run writes them, after a cut at ``cursor``."""
    log = RunLog(folder, cursor, echo=False)
    for step in steps:
        log.metrics(step, {"train/loss": value + 1 / step, "train/skill": value - step, "guard/norm": float("inf")})
    log.event(steps[-1], "checkpoint")
    log.close()


def history(uri: str, run_id: str | None, key: str = "train/loss") -> list[tuple[int, int, float]]:
    found = connect(uri).get_metric_history(run_id, key)
    return sorted((m.step, m.timestamp, m.value) for m in found)


def in_file(folder: Path, key: str = "train/loss") -> list[tuple[int, int, float]]:
    return sorted((line["step"], line["time"], line[key]) for line in read_lines(folder / "metrics.jsonl"))


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def tracked(folder: Path, config: Config | None = None, **options: Any) -> Any:
    options = {"params": {"graphs": 120}, "tags": {"data_digest": "abc"}, "period": 0.1, **options}
    return follow_pretraining(folder, config or Config(), **options)


def test_two_sessions_and_a_cut(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    sent: list[int] = []  # MLflow would hide it if all were sent again and again
    log_batch = MlflowClient.log_batch

    def recorded(self: MlflowClient, run_id: str, metrics: Any = (), **others: Any) -> None:
        sent.extend(m.step for m in metrics if m.key == "train/loss")
        log_batch(self, run_id, metrics=metrics, **others)

    monkeypatch.setattr(MlflowClient, "log_batch", recorded)
    run, uri = home / "run", f"sqlite:///{home}/mlflow.db"
    with tracked(run) as first:
        write(run, range(1, 61))
    before = in_file(run)
    assert history(uri, first.run_id) == before
    assert sent == list(range(1, 61))
    sent.clear()

    # A resume from step 40: what lay beyond is written again, with other times and values.
    with tracked(run) as second:
        write(run, range(41, 81), cursor=40, value=0.5)
    assert second.run_id == first.run_id
    assert history(uri, second.run_id) == sorted(set(before) | set(in_file(run)))
    latest = connect(uri).get_run(second.run_id).data.metrics
    assert latest["train/skill"] == 0.5 - 80
    assert sent == list(range(sent[0], 81)) and 30 < sent[0] <= 41
    assert second.spooled() == 0 and json.loads((run / "mlflow-run.json").read_text())["offset"] > 0


def test_a_cut_while_it_follows_and_a_torn_line(home: Path) -> None:
    run, uri = home / "run", f"sqlite:///{home}/mlflow.db"
    with tracked(run) as follower:
        write(run, range(1, 31))
        wait_for(lambda: follower.spooled() == 0 and follower.spool.offset > 0)
        before = in_file(run)
        write(run, range(11, 41), cursor=10, value=2.0)  # longer than before the cut: its size tells nothing
        with open(run / "metrics.jsonl", "a") as file:
            file.write("not a line of metrics\n")
            file.write('{"step": 41, "time": 5, "train/loss": 0.')
            file.flush()
            wait_for(lambda: follower.spool.offset == (run / "metrics.jsonl").stat().st_size - 40)
            assert 41 not in [step for step, _, _ in history(uri, follower.run_id)]
            file.write("25}\n")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines.remove("not a line of metrics")
    after = [(x["step"], x["time"], x["train/loss"]) for x in map(json.loads, lines)]
    assert history(uri, follower.run_id) == sorted(set(before) | set(after))
    assert (41, 5, 0.25) in after


def test_a_cut_costs_about_what_it_took_away(tmp_path: Path) -> None:
    file, spool = tmp_path / "metrics.jsonl", Spool("here")
    lines = [f'{{"step": {i}, "time": {i}}}\n'.encode() for i in range(5000)]
    file.write_bytes(b"".join(lines))
    for i in range(0, 5000, 2):  # batches of two lines
        spool.advance(len(lines[i]) + len(lines[i + 1]), lines[i + 1])
    assert len(spool.marks) <= 64

    def rewound(content: list[bytes]) -> int:
        file.write_bytes(b"".join(content))
        with open(file, "rb") as opened:
            copy = Spool("here", marks=list(spool.marks))
            copy.rewind(opened)
        return copy.offset

    assert rewound(lines) == len(b"".join(lines))
    for cut in (4990, 4800, 4000, 2000):
        new = [*lines[:cut], *(line.replace(b'"time": ', b'"time": 1') for line in lines[cut:])]
        kept = len(b"".join(lines[:cut]))
        lost = len(b"".join(lines)) - kept
        assert kept - 0.3 * lost - 200 <= rewound(new) <= kept
    assert rewound([b'{"step": 0, "time": 9}\n', *lines[1:]]) <= rewound(lines)
    assert rewound([]) == 0


def test_what_a_run_says_about_itself(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home}/mlflow.db")
    run = home / "run"
    path = f"s3://user:{SECRET}@host/data?sig={SECRET}"
    config = parse({"data": {"path": path}, "engine": {"deepspeed": {"comment": "x" * 900}}})
    run.mkdir()
    (run / "config.yaml").write_text(f"data:\n  path: {path}\n")
    (run / "encoder.json").write_text("{}")
    with tracked(run, config) as follower:
        write(run, range(1, 3))
    with tracked(run, config.model_copy(update={"run": "elsewhere"})):
        pass
    client = connect(os.environ["MLFLOW_TRACKING_URI"])
    found = client.get_run(follower.run_id)
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    assert found.data.params["optim.lr"] == "0.002" and found.data.params["graphs"] == "120"
    assert found.data.params["data.path"] == "s3://***@host/data?sig=***"
    assert len(found.data.params["engine.deepspeed.comment"]) == 500
    tags = found.data.tags
    assert tags["data_digest"] == "abc" and tags["config_digest"] == config.digest() and "version.torch" in tags
    assert tags["changed.run"] == "elsewhere"  # MLflow keeps the first value of a parameter
    assert found.data.metrics["guard/norm"] != found.data.metrics["guard/norm"]  # what is not finite is seen as NaN
    assert {a.path for a in client.list_artifacts(follower.run_id)} == {"config.yaml", "encoder.json", "events.jsonl"}
    stored = [home / "mlflow.db", *(p for p in (home / "mlartifacts").rglob("*") if p.is_file())]
    assert all(SECRET.encode() not in p.read_bytes() for p in stored)
    assert not (home / "mlruns").exists()


def test_the_end_of_a_run(home: Path) -> None:
    uri = f"sqlite:///{home}/mlflow.db"

    def status(run: Path) -> str:
        return str(connect(uri).get_run(json.loads((run / "mlflow-run.json").read_text())["run_id"]).info.status)

    with pytest.raises(ZeroDivisionError), tracked(home / "failed"):
        1 / 0  # noqa: B018
    assert status(home / "failed") == "FAILED"
    with tracked(home / "stopped"):
        RunLog(home / "stopped", 0, echo=False).status(state="stopped")
    assert status(home / "stopped") == "KILLED"  # to be started again

    with tracked(home / "lost") as first:
        write(home / "lost", range(1, 20))
    connect(uri).delete_run(first.run_id)
    with tracked(home / "lost") as second:
        wait_for(lambda: second.run_id != first.run_id and second.spooled() == 0)
        again = second.run_id
        connect(uri).delete_run(again)  # while it is followed
        write(home / "lost", range(20, 40))
    assert second.run_id not in (first.run_id, again)
    assert history(uri, second.run_id) == in_file(home / "lost")


def test_where_mlflow_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri(None, home) == f"sqlite:///{home}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there")
    assert tracking_uri(None, home) == "http://there" and tracking_uri("http://here", home) == "http://here"
    assert (
        redact("failed: https://me:pw@host:5000/api?token=abc&x=1") == "failed: https://***@host:5000/api?token=***&x=1"
    )
    assert redact("mysql://me:p/w@db/x") == "mysql://***@db/x"
    assert redact("postgresql+psycopg://me:p@w@db/x and file:///a@b") == "postgresql+psycopg://***@db/x and file:///a@b"


@contextmanager
def serving(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """An MLflow server; ends with the block."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "store"),
    ]
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:

        def healthy() -> bool:
            try:
                return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).status == 200)
            except OSError:
                return False

        wait_for(healthy, 120)
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)  # its workers too
        server.wait()


@pytest.mark.server
def test_a_server_that_is_down_at_first(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_registry import write_encoder_to

    from cdssl_dist.mlops import registry

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    config, run = parse({"tracking": {"uri": uri}}), home / "run"

    start = time.monotonic()
    with tracked(run, config) as follower:
        write(run, range(1, 41))
        assert time.monotonic() - start < 1.0  # the run does not wait
    assert time.monotonic() - start < 15.0
    assert follower.run_id is None
    said = capsys.readouterr().err.splitlines()[-1]
    assert uri in said and "40 lines" in said and str(run) in said and "next start" in said

    with tracked(run, config) as follower:
        write(run, range(41, 81))
        wait_for(lambda: "metrics wait in" in capsys.readouterr().err)
        with serving(home, port):
            wait_for(lambda: follower.spooled() == 0, 120)  # it asks ever more rarely
            assert history(uri, follower.run_id) == in_file(run)
            write(run, range(81, 101))
            wait_for(lambda: follower.spooled() == 0)

            # The registry through HTTP, in the same run.
            folder = write_encoder_to(home / "encoder")
            done = registry.register(folder, "encoder", uri, follower.run_id)
            assert registry.show("models:/encoder@champion", uri).run_id == follower.run_id
            pulled = registry.pull("models:/encoder@latest", uri, home / "cache")
            assert (pulled / "encoder.json").read_bytes() == (folder / "encoder.json").read_bytes()
            assert done.aliases == ("champion", "latest")
            assert history(uri, follower.run_id) == in_file(run)
        capsys.readouterr()
        write(run, range(101, 121))
    said = capsys.readouterr().err
    assert "20 lines of metrics are spooled" in said
    assert registry.pull("models:/encoder@latest", uri, home / "cache") == pulled
    assert "which was pulled on" in capsys.readouterr().err
    assert "MLFLOW_TRACKING_URI" not in os.environ and "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


@pytest.mark.server
@pytest.mark.slow
def test_a_server_that_is_down_slow_killed_and_back_gets_everything_once(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    tried: list[tuple[int, int]] = []  # first and last step of each batch, accepted or not
    log_batch = MlflowClient.log_batch

    def recorded(self: MlflowClient, run_id: str, metrics: Any = (), **others: Any) -> None:
        if metrics:
            tried.append((metrics[0].step, metrics[-1].step))
        log_batch(self, run_id, metrics=metrics, **others)

    monkeypatch.setattr(MlflowClient, "log_batch", recorded)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config, run = parse({"tracking": {"uri": f"http://127.0.0.1:{port}"}}), home / "run"
    stop, log = threading.Event(), RunLog(run, 0, echo=False)

    def train() -> None:
        for step in range(1, 10**6):
            log.metrics(step, {"train/loss": 1 / step, "train/skill": -step, "guard/norm": float("inf")})
            if step % 50 == 0:
                log.event(step, "skip")
            if stop.wait(0.05):
                return

    training = threading.Thread(target=train, daemon=True)
    with tracked(run, config, patience=120.0) as follower:
        training.start()
        wait_for(lambda: "metrics wait in" in capsys.readouterr().err)  # down
        with serving(home, port) as server:
            wait_for(lambda: "answers again" in capsys.readouterr().err, 120)
            os.killpg(server.pid, signal.SIGSTOP)  # slow: requests are heard, and answered when we no longer listen
            wait_for(lambda: "metrics wait in" in capsys.readouterr().err, 120)
            os.killpg(server.pid, signal.SIGCONT)
            wait_for(lambda: "answers again" in capsys.readouterr().err, 120)
            os.killpg(server.pid, signal.SIGKILL)  # in the middle of whatever it does
        wait_for(lambda: "metrics wait in" in capsys.readouterr().err, 60)
        with serving(home, port):
            wait_for(lambda: "answers again" in capsys.readouterr().err, 120)
            stop.set()
            training.join()
            log.close()
            wait_for(lambda: follower.spooled() == 0, 120)
            for key in ("train/loss", "train/skill", "event/skip"):
                wanted = [(x["step"], x["time"], x[key]) for x in read_lines(run / "metrics.jsonl") if key in x]
                assert history(follower.uri, follower.run_id, key) == sorted(wanted)  # a list: twice would be seen
    reached = 0
    for begin, end in tried:  # in order: none is sent before those in front of it
        assert begin <= reached + 1
        reached = max(reached, end)


def test_names_that_mlflow_would_refuse() -> None:
    from mlflow.utils.validation import _validate_metric_name

    for name in ("test/pretrained/band gap (eV)", "log10(K_VRH)", "a%", "E_hull, eV", "κ [W/(m K)]"):
        _validate_metric_name(metric_name(name))
    assert metric_name("test/from scratch/bulk-modulus_kv.2: x") == "test/from scratch/bulk-modulus_kv.2: x"
