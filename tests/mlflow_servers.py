"""Real MLflow servers on loopback, and what stands behind them in a cluster: PostgreSQL and an object store."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from launch import free_port


@contextmanager
def process(command: Sequence[str], log: Path, env: Mapping[str, str], cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program and its children, ended with the body."""
    with open(log, "wb") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=cwd, start_new_session=True
        )
    try:
        yield server
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if server.poll() is None:
                os.killpg(server.pid, number)
                try:
                    server.wait(10)
                except subprocess.TimeoutExpired:
                    continue


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path, seconds: float = 120) -> None:
    """Until something answers, whatever it says."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"{url} does not answer\n{log.read_text()[-3000:]}")


@contextmanager
def mlflow_server(
    home: Path, *options: str, store: str | None = None, artifacts: str | None = None, **env: str
) -> Iterator[str]:
    """The URL of an MLflow server that keeps everything in a folder, where nothing else is said."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store or f"sqlite:///{home}/server.db"]
    command += ["--artifacts-destination", artifacts or str(home / "artifacts"), *options]
    about = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    about |= {"MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONWARNINGS": "ignore"} | env
    with process(command, home / "server.log", about, home) as server:
        wait_for(f"{url}/health", server, home / "server.log")
        yield url


@contextmanager
def postgres(home: Path) -> Iterator[str]:
    """The URI of a new PostgreSQL database on loopback. It refuses to run as root, so it then runs as its own user."""
    port, data = free_port(), Path(tempfile.mkdtemp(prefix="postgres-"))  # not in home, which is root's alone
    run: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(data, "postgres", "postgres")
        run = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C"}  # so its encoding is SQL_ASCII, the least there is
    made = subprocess.run(
        [*run, "initdb", "-D", str(data), "-U", "mlflow", "-A", "trust"], env=env, capture_output=True, cwd="/"
    )
    assert made.returncode == 0, made.stderr
    options = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={data}", "-p", str(port)]
    with process([*run, "postgres", "-D", str(data), *options], home / "postgres.log", env, Path("/")):
        address = f"mlflow@127.0.0.1:{port}/postgres"
        import psycopg2

        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg2.connect(f"postgresql://{address}").close()
                break
            except psycopg2.OperationalError:
                assert time.monotonic() < deadline, (home / "postgres.log").read_text()
                time.sleep(0.2)
        yield f"postgresql+psycopg2://{address}"  # SQLAlchemy 2.1 takes another driver where none is named
    shutil.rmtree(data)


@contextmanager
def object_store(home: Path, bucket: str) -> Iterator[str]:
    """The URL of a server that speaks S3, with an empty bucket."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with process(command, home / "s3.log", os.environ, home) as server:
        url = f"http://127.0.0.1:{port}"
        wait_for(url, server, home / "s3.log")
        urllib.request.urlopen(urllib.request.Request(f"{url}/{bucket}", method="PUT"), timeout=10).close()
        yield url
