"""Upload a run folder to MLflow: the process that started the run follows its files; training never waits for a server.

``metrics.jsonl`` is the spool. Complete lines are uploaded in batches with their own steps and times; MLflow stores
each point once, however often it is sent. Progress is kept in ``mlflow-run.json``, written after each accepted batch,
so after a kill or with a dead server, lines are at worst sent again. A resume truncates the file at its checkpoint;
the upload then goes back to the last known line that is unchanged. Points beyond the cut stay in MLflow, which cannot
delete them; the same steps are sent again with later times, and MLflow shows the latest value.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from cdssl_dist import __version__
from cdssl_dist.config import Config
from cdssl_dist.mlops.mlflow_server import (
    connect,
    experiment,
    http_limits,
    metric_name,
    one_line,
    redact,
    say,
    tracking_uri,
)
from sharding.manifest import write_atomically

if TYPE_CHECKING:  # mlflow takes seconds to import
    from mlflow.entities import Metric

BATCH: Final = 1000  # metrics of one call: MLflow's limit
ARTIFACTS: Final = ("config.yaml", "events.jsonl", "encoder.json", "report.html")
PACKAGES: Final = ("torch", "deepspeed", "ray", "numpy", "mlflow", "webdataset", "torch-geometric")


@dataclass
class Spool:
    """``mlflow-run.json``: which MLflow run a folder belongs to, and how much of its metrics is uploaded."""

    uri: str  # redacted: only to see whether it is still the same
    key: str = field(default_factory=lambda: uuid.uuid4().hex)  # tag to find a run whose creation got no answer
    run_id: str | None = None
    offset: int = 0  # bytes of metrics.jsonl that MLflow has accepted
    marks: list[tuple[int, int, str]] = field(default_factory=list)  # start, end and digest of lines accepted
    version: int = 1

    @staticmethod
    def read(path: Path, uri: str) -> Spool:
        """Read what an earlier process left; a new spool if there is none, or it was for another server."""
        try:
            content = json.loads(path.read_text())
            content["marks"] = [tuple(mark) for mark in content["marks"]]
            spool = Spool(**content)
        except (OSError, ValueError, KeyError, TypeError):
            return Spool(uri)
        return spool if (spool.uri, spool.version) == (uri, 1) else Spool(uri)

    def rewind(self, file: BinaryIO) -> None:
        """Go back to the last mark whose line in the file is still the uploaded one."""
        while self.marks:
            start, end, digest = self.marks[-1]
            file.seek(start)
            if _digest(file.read(end - start)) == digest:
                break
            self.marks.pop()
        self.offset = self.marks[-1][1] if self.marks else 0

    def advance(self, size: int, last: bytes) -> None:
        """Note that ``size`` more bytes were accepted, which end with the line ``last``."""
        self.offset += size
        self.marks.append((self.offset - len(last), self.offset, _digest(last)))
        if len(self.marks) > 64:  # thin out old marks: after a cut, about as much is sent again as was cut
            ends = [end for _, end, _ in self.marks]
            cost = [(ends[i + 1] - ends[i - 1]) / (self.offset - ends[i - 1]) for i in range(1, 64)]
            del self.marks[1 + cost.index(min(cost))]


class Follower:
    """Uploads what is added to a run folder. Every method may fail, and can then be called again."""

    def __init__(
        self,
        folder: Path,
        uri: str,
        experiment: str,
        params: dict[str, str],
        tags: dict[str, str],
        artifacts: Sequence[str] = ARTIFACTS,
    ) -> None:
        self.folder, self.uri, self.experiment, self.params, self.tags = folder, uri, experiment, params, tags
        self.artifacts = artifacts
        self.spool = Spool.read(folder / "mlflow-run.json", redact(uri))
        self.batch, self.refused, self.opened = BATCH, -1, False
        self.client: Any = None

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run; None until the server has answered once."""
        return self.spool.run_id

    def open(self) -> None:
        """Create the MLflow run, or continue it."""
        self.client = self.client or connect(self.uri)
        run = self._existing()
        if run is None:
            self.spool = Spool(self.spool.uri, self.spool.key)
            self._save()  # save the key before the run is created
            where = experiment(self.client, self.uri, self.experiment)
            found = self.client.search_runs([where], f"tags.cdssl_key = '{self.spool.key}'")
            tags = {"cdssl_key": self.spool.key}
            run = found[0] if found else self.client.create_run(where, run_name=self.folder.name, tags=tags)
            self.spool.run_id = run.info.run_id
            self._save()
        self.client.update_run(self.run_id, status="RUNNING")
        known = run.data.params  # MLflow does not allow a parameter to change
        changed = {f"changed.{k}": v for k, v in self.params.items() if known.get(k, v) != v}
        self._describe({k: v for k, v in self.params.items() if k not in known}, self.tags | changed)
        self.opened = True

    def _existing(self) -> Any:
        from mlflow.exceptions import MlflowException

        if self.run_id is None:
            return None
        try:
            run = self.client.get_run(self.run_id)
        except MlflowException as why:
            if why.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage != "active":
            say(f"mlflow: run {self.run_id} was deleted from {redact(self.uri)}; its metrics go into a new one")
            self.spool = Spool(self.spool.uri)
            return None
        return run

    def _describe(self, params: dict[str, str], tags: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        many = [Param(k, v) for k, v in params.items()]
        labels = [RunTag(k, v[:5000]) for k, v in tags.items()]
        for i in range(0, max(len(many), len(labels)), 100):  # MLflow's limit
            self.client.log_batch(self.run_id, params=many[i : i + 100], tags=labels[i : i + 100])

    def upload(self) -> bool:
        """Upload one batch; return False if nothing is left."""
        from mlflow.exceptions import MlflowException

        try:
            file = open(self.folder / "metrics.jsonl", "rb")
        except FileNotFoundError:
            return False
        with file:  # one open file: what is checked is what is read, even if it is replaced meanwhile
            self.spool.rewind(file)
            file.seek(self.spool.offset)
            lines = [line for line in file.readlines(1 << 17) if line.endswith(b"\n")]
        metrics: list[Metric] = []
        size, last = 0, b""
        for line in lines:
            more = _metrics(line)
            if metrics and len(metrics) + len(more) > self.batch:
                break
            metrics += more[:BATCH]
            size, last = size + len(line), line
        if not last:
            return False
        try:
            self.client.log_batch(self.run_id, metrics=metrics)
            self.batch = min(self.batch * 2, BATCH)
        except MlflowException as why:
            self.batch = max(self.batch // 2, 50)  # a slow server may manage less at a time
            self.opened = False  # check whether the run still exists
            before, self.refused = self.refused, self.spool.offset
            if why.error_code != "INVALID_PARAMETER_VALUE" or before != self.spool.offset:
                raise
            say(f"mlflow: refused {len(metrics)} metrics, which stay in {file.name} ({one_line(why)})")
        self.spool.advance(size, last)
        self._save()
        return True

    def close(self, status: str) -> None:
        """Upload the artifacts and end the run."""
        for name in self.artifacts:
            path = self.folder / name
            try:
                if path.exists() and path.suffix in (".yaml", ".jsonl"):
                    self.client.log_text(self.run_id, redact(path.read_text()), name)
                elif path.exists():
                    self.client.log_artifact(self.run_id, str(path))
            except Exception as why:  # the store's libraries may raise anything; the run is done all the same
                say(f"mlflow: {path} could not be uploaded ({one_line(why)})")
        self.client.set_terminated(self.run_id, status)

    def spooled(self) -> int:
        """Number of lines of metrics that are not uploaded yet."""
        path = self.folder / "metrics.jsonl"
        return path.read_bytes()[self.spool.offset :].count(b"\n") if path.exists() else 0

    def _save(self) -> None:
        write_atomically(self.folder / "mlflow-run.json", json.dumps(asdict(self.spool)).encode())


class _Worker(threading.Thread):
    """Follows until told to finish. A daemon, so that a call that hangs cannot keep the program alive."""

    def __init__(self, follower: Follower, period: float) -> None:
        super().__init__(daemon=True, name="mlflow")
        self.follower, self.period = follower, period
        self.closing = threading.Event()
        self.status, self.deadline, self.done, self.trouble = "FINISHED", float("inf"), False, ""

    def run(self) -> None:
        wait, failures = 0.0, 0
        while time.monotonic() < self.deadline and not (failures >= 3 and self.closing.is_set()):
            closing = self.closing.wait(wait)
            try:
                if not self.follower.opened:
                    self.follower.open()
                while self.follower.upload() and time.monotonic() < self.deadline:
                    pass
                if self.trouble:
                    say(f"mlflow: {redact(self.follower.uri)} answers again; everything is uploaded")
                wait, failures, self.trouble = self.period, 0, ""
                if closing and time.monotonic() < self.deadline:
                    self.follower.close(self.status)
                    self.done = True
                    return
            except Exception as why:  # whatever a client library raises, training goes on and this is tried again
                if not self.trouble:
                    where = f"metrics wait in {self.follower.folder}"
                    say(f"mlflow: {redact(self.follower.uri)} fails; {where} ({one_line(why)})")
                self.trouble = one_line(why)
                wait, failures = min(max(2 * wait, self.period), 60.0), failures + 1
                if closing:
                    time.sleep(min(1.0, self.period))


@contextlib.contextmanager
def follow_pretraining(
    folder: Path,
    config: Config,
    *,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    home: Path | None = None,
    period: float = 3.0,
    patience: float = 30.0,
) -> Iterator[Follower]:
    """Track a pretraining run while the body of the ``with`` trains it; see ``follow``.

    Args:
        folder: folder of the run, on a disk that this process shares with rank 0.
        config: configuration of the run; logged as parameters.
        params: more parameters, e.g. of the data set.
        tags: tags of the run, at least the digest of the data.
        home: folder of the SQLite file if no server is given; by default the parent of the run folder.
        period, patience: see ``follow``.
    """
    uri = tracking_uri(config.tracking.uri, home or folder.parent)
    about = config.model_dump(mode="json") | dict(params)
    named = {"config_digest": config.digest()} | dict(tags)
    with follow(folder, uri, config.tracking.experiment, about, named, period=period, patience=patience) as follower:
        yield follower


@contextlib.contextmanager
def follow(
    folder: Path,
    uri: str,
    experiment: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    artifacts: Sequence[str] = ARTIFACTS,
    *,
    period: float = 3.0,
    patience: float = 30.0,
) -> Iterator[Follower]:
    """Track whatever writes ``metrics.jsonl`` in a folder, while the body of the ``with`` runs.

    Never raises because of MLflow, and never makes the body wait for it. What could not be uploaded stays in the run
    folder, and is uploaded the next time the run is followed.

    Args:
        folder: folder of the run.
        uri: URI of MLflow.
        experiment: name of the MLflow experiment.
        params, tags: parameters and tags of the run; versions of packages are added to the tags.
        artifacts: files of the folder to upload at the end, if they exist.
        period: s between two looks at the files.
        patience: s to wait for the upload at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    follower = Follower(folder, uri, experiment, _flat(params), _versions() | dict(tags), artifacts)
    worker = _Worker(follower, period)
    with http_limits(timeout=10):
        worker.start()
        try:
            yield follower
            worker.status = "KILLED" if _stopped(folder) else "FINISHED"
        except BaseException:
            worker.status = "FAILED"
            raise
        finally:
            worker.deadline = time.monotonic() + patience
            worker.closing.set()
            worker.join(patience + 1.0)
            if not worker.done:
                why = worker.trouble or f"{patience:.0f} s were not enough"
                say(
                    f"mlflow: {redact(uri)} is not up to date ({why}): {follower.spooled()} lines of metrics are "
                    f"spooled in {folder}, and will be uploaded at the next start of this run"
                )


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:16]


def _metrics(line: bytes) -> list[Metric]:
    """The metrics of a line; none if it is not a line of metrics. MLflow shows NaN where RunLog writes null."""
    from mlflow.entities import Metric

    try:
        content = json.loads(line)
        step, at = int(content.pop("step")), int(content.pop("time"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return []
    numbers = {k: float("nan") if v is None else v for k, v in content.items()}
    return [Metric(metric_name(k), float(v), at, step) for k, v in numbers.items() if isinstance(v, (int, float))]


def _text(value: Any) -> str:
    return redact(value if isinstance(value, str) else json.dumps(value, default=str))[:500]


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} → {"a.b": "1"}; older MLflow servers take values of at most 500 characters."""
    flat: dict[str, str] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: _text(value)}
    return flat


def _versions() -> dict[str, str]:
    """Versions of the code; never anything from the environment."""
    tags = {"code_version": __version__, "version.python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            tags[f"version.{package}"] = importlib.metadata.version(package)
    checkout = Path(__file__).parents[2]
    if (checkout / ".git").exists():
        describe = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            tags["git"] = subprocess.run(describe, capture_output=True, text=True, timeout=5).stdout.strip()
    return {k: v for k, v in tags.items() if v}


def _stopped(folder: Path) -> bool:
    """Whether the run saved its state and ended early, to be started again."""
    try:
        return bool(json.loads((folder / "status.json").read_text())["state"] == "stopped")
    except (OSError, ValueError, KeyError, TypeError):
        return False
