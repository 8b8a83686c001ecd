"""The registry with real servers: several jobs at once, a server that dies, passwords, the stores of a cluster."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from encoders import write_encoder_to
from mlflow_servers import mlflow_server, object_store, postgres

from cdssl_dist.mlops import registry, registry_store
from cdssl_dist.mlops.mlflow_server import connect
from cdssl_dist.mlops.registry import RegistryError

pytestmark = pytest.mark.server

REGISTER = """
import sys
from pathlib import Path
from cdssl_dist.mlops import registry
print(registry.register(Path(sys.argv[1]), "crystals", sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDSSL_CACHE", str(tmp_path / "cache"))


def at_once(uri: str, folders: list[Path]) -> list[str]:
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", REGISTER, str(f), uri], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for f in folders
    ]
    found = [job.communicate(timeout=240) for job in jobs]
    assert all(job.returncode == 0 for job in jobs), "\n".join(error[-1500:] for _, error in found)
    return [out for out, _ in found]


def whole_life(uri: str, home: Path) -> None:
    """What can be done with a registry, with several jobs at once in the beginning."""
    skills = [0.5, 0.3, 0.3]  # the last two are the same encoder
    folders = [write_encoder_to(home / f"e{i}", seed=int(s * 10), skill=s) for i, s in enumerate(skills)]
    at_once(uri, folders)
    versions = registry.list_versions("crystals", uri)
    assert sorted(v.version for v in versions) == [1, 2]  # the same weights once
    by_alias = {a: v for v in versions for a in v.aliases}
    assert by_alias["champion"].tags["skill_edge"] == "0.5"  # whoever came last
    assert by_alias["latest"].version == 2
    assert not [m for m in connect(uri).search_registered_models() if m.name.endswith(registry_store.LOCK)]

    best = by_alias["champion"].version
    other = next(v.version for v in versions if v.version != best)
    assert "champion" in registry.promote(f"models:/crystals/{other}", uri).aliases
    assert registry.rollback("crystals", uri).version == best
    folder = registry.pull("models:/crystals@champion", uri)
    assert (folder / "encoder.json").read_bytes() == (home / "e0" / "encoder.json").read_bytes()
    changed = registry.diff(f"models:/crystals/{best}", f"models:/crystals/{other}", uri)
    assert {"skill_edge", "weights_sha256"} <= set(changed) and "sigma" not in changed
    with pytest.raises(RegistryError, match="is the previous"):
        registry.delete(f"models:/crystals/{other}", uri)
    third = registry.register(write_encoder_to(home / "third", seed=9, skill=0.2), "crystals", uri)
    assert third.aliases == ("latest",)
    registry.delete(third.uri, uri)
    assert sorted(v.version for v in registry.list_versions("crystals", uri)) == [1, 2]


def with_passwords(home: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """Options and environment of a server that knows who may do what."""
    if importlib.util.find_spec("flask_wtf") is None:
        pytest.skip("needs mlflow[auth]")
    config = home / "auth.ini"
    config.write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = sqlite:///{home}/auth.db\nadmin_username = admin\nadmin_password = a-long-password\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    about = {"MLFLOW_FLASK_SERVER_SECRET_KEY": "k" * 32, "MLFLOW_AUTH_CONFIG_PATH": str(config)}
    return ("--app-name", "basic-auth"), about


def only_the_right_password_opens(uri: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards the environment holds it."""
    with pytest.raises(RegistryError, match="MLFLOW_TRACKING_USERNAME"):
        registry.list_versions("crystals", uri)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-password")
    with pytest.raises(RegistryError, match="not allowed"):
        registry.register(write_encoder_to(home / "e"), "crystals", uri)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-long-password")


def test_a_server_and_its_end(tmp_path: Path, mlflow_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(mlflow_store, tmp_path / "server.db")
    with mlflow_server(tmp_path) as uri:
        whole_life(uri, tmp_path)
    folder = registry.pull("models:/crystals@champion", uri)  # the server is gone
    assert folder.is_dir() and "does not answer" in capsys.readouterr().err
    with pytest.raises(RegistryError, match="does not answer"):
        registry.list_versions("crystals", uri)


@pytest.mark.slow
def test_several_jobs_on_one_file(tmp_path: Path, mlflow_store: Path) -> None:
    shutil.copy(mlflow_store, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    registry.register(write_encoder_to(tmp_path / "first", seed=99, skill=0.01), "crystals", uri)
    at_once(uri, [write_encoder_to(tmp_path / f"e{i}", seed=i, skill=0.1 + 0.1 * i) for i in range(3)])
    versions = registry.list_versions("crystals", uri)
    assert len(versions) == 4
    (champion,) = [v for v in versions if "champion" in v.aliases]
    assert float(champion.tags["skill_edge"]) == pytest.approx(0.3)


def test_a_lock_whose_holder_died_is_taken_over(tmp_path: Path, mlflow_store: Path) -> None:
    shutil.copy(mlflow_store, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = connect(uri)
    client.create_registered_model("crystals")
    client.create_registered_model("crystals.lock", description="of a job that was killed")
    with pytest.raises(RegistryError, match="other jobs have held"):
        with registry_store.exclusive(client, "crystals", patience=0.5, stale=100):
            pass
    held = False
    with registry_store.exclusive(client, "crystals", patience=20, stale=0.5):
        held = True
        assert client.get_registered_model("crystals.lock").description != "of a job that was killed"
    assert held and not [m for m in client.search_registered_models() if m.name.endswith(".lock")]


def test_a_lock_that_is_released_while_it_is_asked_for(tmp_path: Path, mlflow_store: Path) -> None:
    """MLflow finds the name taken, looks who has it, and by then nobody does: 15 times in 1,900 locks of three jobs."""
    shutil.copy(mlflow_store, tmp_path / "mlflow.db")
    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    client.create_registered_model("crystals.lock", description="of another job")
    store = client._get_registry_client().store
    look = store.get_registered_model

    def gone(name: str) -> Any:
        store.get_registered_model = look
        client.delete_registered_model(name)
        return look(name)

    store.get_registered_model = gone
    with registry_store.exclusive(client, "crystals", patience=5):
        assert store.get_registered_model is look
        assert client.get_registered_model("crystals.lock").description != "of another job"


@pytest.mark.slow  # a password is hashed for every request
def test_passwords_on_sqlite(tmp_path: Path, mlflow_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(mlflow_store, tmp_path / "server.db")
    options, about = with_passwords(tmp_path)
    with mlflow_server(tmp_path, *options, **about) as uri:
        only_the_right_password_opens(uri, tmp_path, monkeypatch)
        done = registry.register(tmp_path / "e", "crystals", uri)
        assert registry.pull(done.uri, uri).is_dir()
        assert "a-long-password" not in json.dumps(registry.show(done.uri, uri).tags)


@pytest.mark.slow
def test_postgres_an_object_store_and_passwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = [p for p in ("initdb", "postgres") if shutil.which(p) is None]
    absent += [m for m in ("psycopg2", "moto") if importlib.util.find_spec(m) is None]
    if absent:
        pytest.skip(f"needs {', '.join(absent)}")
    options, about = with_passwords(tmp_path)
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
    with postgres(tmp_path) as store, object_store(tmp_path, "models") as s3:
        about |= keys | {"MLFLOW_S3_ENDPOINT_URL": s3}
        with mlflow_server(tmp_path, *options, store=store, artifacts="s3://models/mlflow", **about) as uri:
            only_the_right_password_opens(uri, tmp_path, monkeypatch)
            whole_life(uri, tmp_path)
            assert not (tmp_path / "artifacts").exists()  # they went into the bucket, through the server
    assert not os.environ.get("AWS_SECRET_ACCESS_KEY")
