"""MLflow servers: their URIs, clients, time limits, and messages without credentials."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # mlflow takes seconds to import
    from mlflow import MlflowClient

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported, which happens later
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # hides log lines about new tables


def redact(text: str) -> str:
    """Hide passwords and signatures in URIs, wherever they stand in the text."""
    text = re.sub(r"(\w://)(?:[^/\s\"']*|[^/\s\"':@]+:[^\s\"']*)@", r"\1***@", text)
    secret = r"(?i)([?&;][\w.-]*(?:token|sig|signature|key|secret|password|credential)=)[^&\s\"']+"
    return re.sub(secret, r"\1***", text)


def tracking_uri(config_uri: str | None, home: Path) -> str:
    """Where MLflow is: the config's URI, else MLFLOW_TRACKING_URI, else ``mlflow.db`` in ``home``.

    The path of a SQLite file is made absolute, so that what is cached of one project's registry is not used in another.
    """
    uri = config_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home}/mlflow.db"
    file = sqlite_file(uri)
    return f"sqlite:///{file.resolve()}{''.join(uri.partition('?')[1:])}" if file else uri


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite URI; None for a server."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def connect(uri: str) -> MlflowClient:
    """A client for a server, or for a SQLite file, which need not exist yet."""
    from mlflow import MlflowClient

    if (file := sqlite_file(uri)) and not file.exists():
        _create(file)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _create(file: Path) -> None:
    """Make MLflow's tables in a new SQLite file, which appears whole.

    MLflow takes seconds to make them, and cannot use a file in which it was interrupted.
    """
    from mlflow import MlflowClient

    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".mlflow-") as scratch:
        new = Path(scratch) / file.name
        MlflowClient(tracking_uri=f"sqlite:///{new.resolve()}").search_experiments(max_results=1)
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(new, file)


def experiment(client: MlflowClient, uri: str, name: str) -> str:
    """The id of an experiment, created if missing; with SQLite, its artifacts are stored beside the file."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    file = sqlite_file(uri)
    try:  # without a location MLflow would write into the current folder
        return str(client.create_experiment(name, (file.resolve().parent / "mlartifacts").as_uri() if file else None))
    except MlflowException:
        if found := client.get_experiment_by_name(name):  # someone else was faster
            return str(found.experiment_id)
        raise


@contextlib.contextmanager
def http_limits(timeout: int, retries: int = 1) -> Iterator[None]:
    """Fail in seconds where MLflow would block for four minutes; limits that the user has set are kept."""
    limits = {"TIMEOUT": str(timeout), "MAX_RETRIES": str(retries), "BACKOFF_FACTOR": "1"}
    limits = {f"MLFLOW_HTTP_REQUEST_{name}": value for name, value in limits.items()}
    ours = limits.keys() - os.environ.keys()
    os.environ.update({name: limits[name] for name in ours})
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def say(line: str) -> None:
    """Print a line to stderr."""
    print(line, file=sys.stderr, flush=True)


def one_line(why: BaseException) -> str:
    """The first line of an error, without credentials."""
    return redact(str(why).strip().partition("\n")[0])[:200] or type(why).__name__


def metric_name(name: str) -> str:
    """A metric name that MLflow accepts: a target may be called ``band gap (eV)``."""
    return re.sub(r"[^\w./: -]", "_", name)
