"""Record finished work as an MLflow run: settings, metrics and files. The work itself never waits for a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cdssl_dist.mlops.mlflow_server import connect, experiment, http_limits, metric_name, one_line, redact, say


def record(
    uri: str,
    where: str,
    name: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    files: Sequence[Path],
    began: float,
) -> str | None:
    """Record finished work as a run. If the server fails, a line says why; nothing is raised.

    Args:
        uri: URI of the MLflow server or SQLite file.
        where: name of the experiment, created if missing.
        name: name of the run.
        params, metrics, tags: contents of the run.
        files: files to upload as its artifacts.
        began: start of the work, s since the epoch.

    Returns:
        The id of the run; None if it could not be created.
    """
    from mlflow.entities import Metric, Param, RunTag

    run_id = None
    try:
        with http_limits(timeout=20):
            client = connect(uri)
            run = client.create_run(experiment(client, uri, where), int(1000 * began), run_name=name)
            run_id = str(run.info.run_id)
            at = int(1000 * began)
            settings = [Param(k, redact(str(v))[:500]) for k, v in params.items()]
            client.log_batch(
                run_id,
                metrics=[Metric(metric_name(k), float(v), at, 0) for k, v in metrics.items()][:1000],  # MLflow's limits
                params=settings[:100],
                tags=[RunTag(k, redact(v)[:5000]) for k, v in tags.items()][:100],
            )
            _upload(client, run_id, files)
            client.set_terminated(run_id)
    except Exception as why:  # whatever a client library raises, the work is done
        half = f"; run {run_id} is not complete" if run_id else ""
        say(f"mlflow: this work could not be recorded at {redact(uri)} ({one_line(why)}){half}")
    return run_id


def attach(uri: str, run_id: str, files: Sequence[Path]) -> bool:
    """Add files to a run, or replace those of the same name; if that fails, say why and return False."""
    try:
        with http_limits(timeout=20):
            _upload(connect(uri), run_id, files)
        return True
    except Exception as why:
        say(f"mlflow: {', '.join(f.name for f in files)} could not be uploaded to {redact(uri)} ({one_line(why)})")
        return False


def _upload(client: Any, run_id: str, files: Sequence[Path]) -> None:
    for file in files:
        client.log_artifact(run_id, str(file))
