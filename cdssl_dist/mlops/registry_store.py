"""Access to an MLflow registry: sessions with one-line errors, versions, aliases, uploads.

MLflow has no transactions. Jobs that change the aliases of one name are serialised by a lock in the registry itself:
the registered model ``NAME.lock``, since two jobs cannot create the same name.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cdssl_dist.mlops.mlflow_server import connect, experiment, http_limits, one_line, redact, sqlite_file
from cdssl_dist.mlops.model_card import NAME as MODEL_CARD
from cdssl_dist.mlops.model_card import write_model_card
from cdssl_dist.mlops.models import Kind, RegistryError

ANSWERS: Final = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "BAD_REQUEST")
DENIED: Final = ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")
REF: Final = re.compile(r"models:/(?P<name>[^/:@'\"]+)(?:/(?P<version>\d+)|@(?P<alias>[\w.-]+))")
LOCK: Final = ".lock"
STALE: Final = 600.0  # s until a lock is taken over: jobs hold it for a second, or for minutes with retries


@dataclass(frozen=True)
class Version:
    """One version of a registered model."""

    name: str
    version: int
    aliases: tuple[str, ...]
    tags: dict[str, str]
    run_id: str | None
    created: int  # ms since the epoch

    @property
    def uri(self) -> str:
        """What ``pull`` takes."""
        return f"models:/{self.name}/{self.version}"


class UnreachableError(RegistryError):
    """The registry gave no answer at all."""


@contextlib.contextmanager
def session(uri: str, timeout: int, create: bool = False) -> Iterator[Any]:
    """Open a client whose errors are raised as one-line RegistryErrors."""
    file = sqlite_file(uri)
    if file and not file.exists() and not create:  # MLflow would create an empty one
        raise UnreachableError(f"{redact(uri)} does not exist; set MLFLOW_TRACKING_URI to that of the registry")
    with http_limits(timeout):
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield connect(uri)
        except MlflowException as why:
            if why.error_code in ANSWERS:
                raise RegistryError(f"{redact(uri)}: {one_line(why)}") from None
            if why.error_code in DENIED:
                hint = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
                raise RegistryError(f"{redact(uri)}: not allowed ({one_line(why)}); {hint}") from None
            hint = "is MLFLOW_TRACKING_URI right, and the server up?"
            raise UnreachableError(f"{redact(uri)} does not answer ({one_line(why)}); {hint}") from None
        except (OSError, SQLAlchemyError) as why:
            raise UnreachableError(f"{redact(uri)} cannot be used ({one_line(why)})") from None


def resolve(client: Any, ref: str) -> Version:
    """The version that a reference names.

    Raises:
        RegistryError: if there is none; the message lists those that exist.
    """
    from mlflow.exceptions import MlflowException

    match = REF.fullmatch(ref)
    if not match:
        raise RegistryError(f"{ref}: a version must be given as models:/NAME@ALIAS or models:/NAME/VERSION")
    name = match["name"]
    known_name(client, name)
    try:
        if match["alias"]:
            number = int(client.get_model_version_by_alias(name, match["alias"]).version)
        else:
            number = int(client.get_model_version(name, match["version"]).version)
    except MlflowException as why:
        if why.error_code not in ANSWERS:
            raise
        known = "; ".join(f"{v.version} {' '.join(v.aliases)}".strip() for v in versions(client, name))
        raise RegistryError(f"{ref}: there is no such version of {name!r}; there are: {known or 'none'}") from None
    return next(v for v in versions(client, name) if v.version == number)


def known_name(client: Any, name: str) -> None:
    """Raise RegistryError if no model has this name; the message lists those that exist."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException as why:
        if why.error_code not in ANSWERS:
            raise
        there = ", ".join(names(client)[:20])
        raise RegistryError(f"the registry has no model {name!r}; it has: {there or 'none'}") from None


def names(client: Any) -> list[str]:
    """Names of all registered models."""
    found: list[str] = []
    token = None
    while token != "":
        page = client.search_registered_models(page_token=token)
        found, token = [*found, *(m.name for m in page if not m.name.endswith(LOCK))], page.token or ""
    return sorted(found)


def versions(client: Any, name: str) -> list[Version]:
    """All versions of a model, newest first. The alias ``latest`` is resolved by MLflow and cannot be set."""
    aliases = client.get_registered_model(name).aliases
    found: list[Any] = []
    token = None
    while token != "":
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found, token = [*found, *page], page.token or ""
    found.sort(key=lambda v: -int(v.version))
    latest = [("latest", found[0].version)] if found else []
    return [
        Version(
            name,
            int(v.version),
            tuple(sorted(a for a, n in [*aliases.items(), *latest] if int(n) == int(v.version))),
            dict(v.tags),
            v.run_id or None,
            int(v.creation_timestamp),
        )
        for v in found
    ]


def champion_of(found: list[Version]) -> Version | None:
    """The version with the alias ``champion``, if there is one."""
    return next((v for v in found if "champion" in v.aliases), None)


def move_champion(client: Any, name: str, version: int) -> None:
    """Make a version the champion; the former one becomes ``previous``. Call it only under ``exclusive``."""
    champion = champion_of(versions(client, name))
    if champion and champion.version != version:
        client.set_registered_model_alias(name, "previous", str(champion.version))  # first: a crash loses no champion
    client.set_registered_model_alias(name, "champion", str(version))


@contextlib.contextmanager
def exclusive(client: Any, name: str, patience: float = 900.0, stale: float = STALE) -> Iterator[None]:
    """Hold the lock of a name. A lock with the same holder for ``stale`` seconds is taken over: that job has died.

    Raises:
        RegistryError: if other jobs hold the lock for longer than ``patience`` seconds.
    """
    from mlflow.exceptions import MlflowException

    lock, token = name + LOCK, uuid.uuid4().hex
    deadline, holder, since = time.monotonic() + patience, "", 0.0
    while True:
        try:
            client.create_registered_model(lock, description=token)
            break
        except MlflowException as why:
            # The second code: if the name is taken, MLflow looks up the model, which may just have been deleted.
            if why.error_code not in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
                raise
        now, found = time.monotonic(), _holder(client, lock)
        if found != holder:
            holder, since = found, now
        elif found and now - since > stale and _holder(client, lock) == holder:  # nobody else was faster
            with contextlib.suppress(MlflowException):
                client.delete_registered_model(lock)
        if now > deadline:
            raise RegistryError(
                f"{name}: other jobs have held {lock} for {patience:.0f} s; if there are none, delete it"
            )
        time.sleep(random.uniform(0.05, 0.3))
    try:
        yield
    finally:
        if _holder(client, lock) == token:
            client.delete_registered_model(lock)


def _holder(client: Any, lock: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(lock).description or ""
    except MlflowException as why:
        if why.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return ""


def upload(client: Any, uri: str, folder: Path, kind: Kind, name: str, run_id: str | None, tags: dict[str, str]) -> Any:
    """Save the model locally, and upload it as a model of the run; return MLflow's logged model."""
    from mlflow.entities import LoggedModelOutput

    from cdssl_dist.mlops.model_folder import save_data, save_model

    where = client.get_run(run_id).info.experiment_id if run_id else experiment(client, uri, name)
    model = client.create_logged_model(where, kind.stem, run_id, tags, model_type=f"crystal-{kind.stem}")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model"
        if kind.stem == "encoder":
            save_model(path, folder, model, run_id)
        else:
            save_data(path, folder, kind.files)
        write_model_card(path / "artifacts").rename(path / MODEL_CARD)
        client.log_model_artifacts(model.model_id, str(path))
    client.finalize_logged_model(model.model_id, "READY")
    if run_id:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return model


def create_version(
    client: Any, uri: str, model: Any, name: str, run_id: str | None, tags: dict[str, str], text: str
) -> int:
    """Create a version of ``name`` from an uploaded model; return its number."""
    # Without a server MLflow would look for the model at its global URI, not at the client's.
    model_id = None if sqlite_file(uri) else model.model_id
    version = client.create_model_version(name, model.artifact_location, run_id, tags, None, text[:5000], 60, model_id)
    if sqlite_file(uri):  # a server links the model to its version by itself
        link = json.dumps([{"name": name, "version": int(version.version)}])
        client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": link})
    return int(version.version)
