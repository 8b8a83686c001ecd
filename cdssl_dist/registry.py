"""Encoders by name: versions in an MLflow registry that other jobs pull, and which of them is the champion.

A version is a pyfunc model whose artifacts are ``encoder.safetensors`` and ``encoder.json``. ``pull`` takes these two
files and nothing else: no code that lies in a registry is executed to use an encoder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from cdssl_dist.export import EncoderCard, ExportError, read_card
from cdssl_dist.mlflow_server import connect, experiment, http_limits, one_line, redact, say, sqlite_file
from sharding.manifest import write_atomically

FILES: Final = ("encoder.safetensors", "encoder.json")
COMPARABLE: Final = ("validation_digest", "sigma", "cutoff", "expansion")  # tags that must agree to compare skills
ANSWERS: Final = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "BAD_REQUEST")
DENIED: Final = ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")
REF: Final = re.compile(r"models:/(?P<name>[^/:@'\"]+)(?:/(?P<version>\d+)|@(?P<alias>[\w.-]+))")


class RegistryError(ValueError):
    """What the registry cannot do, and what helps: one line."""


@dataclass(frozen=True)
class Version:
    """One version of a registered encoder."""

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


@dataclass(frozen=True)
class Registered:
    """What came of a registration."""

    name: str
    version: int
    aliases: tuple[str, ...]
    uri: str  # what ``pull`` takes
    created: bool  # False where this very encoder had been registered before
    reason: str  # why it is the champion, or not

    def __str__(self) -> str:
        done = "registered as" if self.created else "is already"
        return f"encoder {done} {self.uri} ({', '.join(self.aliases)}): {self.reason}"


def register(folder: Path, name: str, uri: str, run_id: str | None = None) -> Registered:
    """Register an encoder; it becomes the champion where it is provably better, or there is none.

    The same weights are registered once: a repetition finds their version, and changes no alias that is set.

    Args:
        folder: holds ``encoder.safetensors`` and ``encoder.json``.
        name: of the registered model.
        uri: of the MLflow server or SQLite file.
        run_id: the MLflow run that trained it.

    Raises:
        RegistryError: where the folder holds no sound encoder, or the registry does not do its part.
    """
    if not REF.fullmatch(f"models:/{name}@latest"):
        raise RegistryError(f"{name!r} is no name for an encoder: use letters, digits, - and _")
    card, tags = _checked(folder), _tags(folder)
    with _session(uri, 60, create=True) as client:
        from mlflow.exceptions import MlflowException

        try:
            client.create_registered_model(name)
        except MlflowException as why:
            if why.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        known = [v for v in _versions(client, name) if v.tags.get("weights_sha256") == tags["weights_sha256"]]
        champion = _champion(client, name)
        if known:
            version, reason = known[0].version, "these weights were registered before"
        else:
            version = _create(client, uri, folder, card, name, run_id, tags)
            reason = _objection(tags, champion)
        if champion is None or (not known and not reason):
            _move_champion(client, name, version)
            reason = "the first one" if champion is None else f"skill_edge above that of version {champion.version}"
        mine = next(v for v in _versions(client, name) if v.version == version)
        return Registered(name, version, mine.aliases, mine.uri, not known, reason)


def list_versions(name: str, uri: str) -> list[Version]:
    """All versions of an encoder, newest first."""
    with _session(uri, 10) as client:
        _known(client, name)
        return _versions(client, name)


def show(ref: str, uri: str) -> Version:
    """The version that ``models:/name@alias`` or ``models:/name/version`` names."""
    with _session(uri, 10) as client:
        return _resolve(client, ref)


def promote(name: str, version: int, uri: str) -> Version:
    """Make a version the champion; the one before is kept as ``previous``."""
    with _session(uri, 10) as client:
        found = _resolve(client, f"models:/{name}/{version}")
        _move_champion(client, name, found.version)
        return _resolve(client, found.uri)


def rollback(name: str, uri: str) -> Version:
    """Make the previous champion the champion again; what was the champion becomes the previous one."""
    with _session(uri, 10) as client:
        found = _resolve(client, f"models:/{name}@previous")
        _move_champion(client, name, found.version)
        return _resolve(client, found.uri)


def pull(ref: str, uri: str, cache: Path | None = None) -> Path:
    """A folder that holds ``encoder.safetensors`` and ``encoder.json``, checked against their digests.

    Args:
        ref: ``models:/name@champion``, ``models:/name/3``, or a folder.
        uri: of the MLflow server or SQLite file. Where it does not answer, what ``ref`` was last is taken.
        cache: folder for downloads; CDSSL_CACHE, else ``~/.cache/cdssl``, where left out.

    Raises:
        RegistryError: where there is no such encoder, or it is damaged.
    """
    if not ref.startswith("models:"):
        _checked(Path(ref))
        return Path(ref)
    root = cache or Path(os.environ.get("CDSSL_CACHE") or Path.home() / ".cache" / "cdssl")
    note = root / "refs" / f"{hashlib.sha256(f'{redact(uri)} {ref}'.encode()).hexdigest()[:32]}.json"
    try:
        with _session(uri, 10) as client:
            version = _resolve(client, ref)
            digest = version.tags.get("weights_sha256", "")
            if not re.fullmatch("[0-9a-f]{64}", digest):  # it names a folder here
                raise RegistryError(f"{version.uri}: no encoder that cdssl registered: it has no tag weights_sha256")
            folder = root / "encoders" / digest
            if not _is_version(folder, version):
                source = client.get_model_version_download_uri(version.name, str(version.version))
                _download(uri, source, version, folder)
    except _UnreachableError as why:
        try:
            known = json.loads(note.read_text())
            folder = root / "encoders" / known["weights_sha256"]
            _checked(folder)
        except (OSError, ValueError, KeyError):
            raise RegistryError(f"{ref}: {why}; and there is no sound copy of an earlier pull") from None
        say(f"{ref}: {why}; using what it was on {known['date']}: version {known['version']}")
        return folder
    content = {"uri": redact(uri), "ref": ref, "version": version.version, "date": time.strftime("%F %R")}
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(note, json.dumps(content | {"weights_sha256": folder.name}, indent=1).encode())
    return folder


class _UnreachableError(RegistryError):
    """The registry gave no answer at all."""


@contextlib.contextmanager
def _session(uri: str, timeout: int, create: bool = False) -> Iterator[Any]:
    """A client, whose errors become one line."""
    file = sqlite_file(uri)
    if file and not file.exists() and not create:  # MLflow would make an empty one, and say that nothing is in it
        raise _UnreachableError(f"{redact(uri)} does not exist; set MLFLOW_TRACKING_URI to the registry's")
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
            raise _UnreachableError(f"{redact(uri)} does not answer ({one_line(why)}); {hint}") from None
        except (OSError, SQLAlchemyError) as why:
            raise _UnreachableError(f"{redact(uri)} cannot be used ({one_line(why)})") from None


def _resolve(client: Any, ref: str) -> Version:
    from mlflow.exceptions import MlflowException

    match = REF.fullmatch(ref)
    if not match:
        raise RegistryError(f"{ref}: an encoder is named models:/NAME@ALIAS or models:/NAME/VERSION, or by its folder")
    name = match["name"]
    _known(client, name)
    try:
        if match["alias"]:
            number = int(client.get_model_version_by_alias(name, match["alias"]).version)
        else:
            number = int(client.get_model_version(name, match["version"]).version)
    except MlflowException as why:
        if why.error_code not in ANSWERS:
            raise
        versions = "; ".join(f"{v.version} {' '.join(v.aliases)}".strip() for v in _versions(client, name))
        raise RegistryError(f"{ref}: there is no such version of {name!r}; there are: {versions or 'none'}") from None
    return next(v for v in _versions(client, name) if v.version == number)


def _known(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException as why:
        if why.error_code not in ANSWERS:
            raise
        names = ", ".join(m.name for m in client.search_registered_models(max_results=20))
        raise RegistryError(f"the registry has no encoder {name!r}; it has: {names or 'none'}") from None


def _versions(client: Any, name: str) -> list[Version]:
    """Newest first. MLflow itself resolves the alias ``latest``, and lets nobody set it."""
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


def _champion(client: Any, name: str) -> Version | None:
    return next((v for v in _versions(client, name) if "champion" in v.aliases), None)


def _move_champion(client: Any, name: str, version: int) -> None:
    champion = _champion(client, name)
    if champion and champion.version != version:
        client.set_registered_model_alias(name, "previous", str(champion.version))  # first: a crash loses no champion
    client.set_registered_model_alias(name, "champion", str(version))


def _objection(tags: dict[str, str], champion: Version | None) -> str:
    """Why an encoder does not replace the champion; nothing where it does."""
    if champion is None:
        return ""
    differ = [n for n in COMPARABLE if tags[n] != champion.tags.get(n)]
    if differ:
        return (
            f"not comparable to the champion, version {champion.version}: {', '.join(differ)} differ; promote by hand"
        )
    mine, its = (float(t.get("skill_edge", "nan")) for t in (tags, champion.tags))
    if not (math.isfinite(mine) and math.isfinite(its)):
        return f"no skill_edge to compare with the champion, version {champion.version}; promote by hand"
    return (
        ""
        if mine > its
        else f"skill_edge {mine:.4f} is not above the {its:.4f} of the champion, version {champion.version}"
    )


def _tags(folder: Path) -> dict[str, str]:
    card = read_card(folder)
    return {
        "format": f"{card.format} {card.version}",
        "weights_sha256": card.weights_sha256,
        "card_sha256": _sha256(folder / "encoder.json"),
        "data_digest": card.data_digest,
        "config_digest": card.config_digest,
        "validation_digest": card.validation_digest,
        "code_version": card.code_version,
        "sigma": json.dumps(card.sigma),
        "cutoff": json.dumps(card.cutoff),
        "expansion": json.dumps([card.centers, card.end, card.gamma]),
        "skill": str(card.metrics.get("val/skill", math.nan)),
        "skill_edge": str(card.metrics.get("val/skill_edge", math.nan)),
    }


def _create(
    client: Any, uri: str, folder: Path, card: EncoderCard, name: str, run_id: str | None, tags: dict[str, str]
) -> int:
    """A new version: the model is saved here, and uploaded as a model of the run."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    from cdssl_dist.model_folder import save_model

    where = client.get_run(run_id).info.experiment_id if run_id else experiment(client, uri, name)
    model = client.create_logged_model(where, "encoder", run_id, tags, model_type="crystal-encoder")
    about = Model(
        artifact_path=model.artifact_location, model_uuid=model.model_id, run_id=run_id, model_id=model.model_id
    )
    with tempfile.TemporaryDirectory() as scratch:
        save_model(Path(scratch) / "model", folder, card.model["width"], mlflow_model=about)
        client.log_model_artifacts(model.model_id, str(Path(scratch) / "model"))
    client.finalize_logged_model(model.model_id, "READY")
    if run_id:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    # Without a server MLflow would look for the model at its global URI, not at the client's.
    model_id = None if sqlite_file(uri) else model.model_id
    text = (
        f"A crystal encoder: {json.dumps(card.model)}, cutoff {card.cutoff} Å. As a pyfunc it carries code, which is "
        "for registries you trust; encoder.safetensors and encoder.json are data. Trained on: "
        + "; ".join(f"{s.get('name', '?')} ({s.get('licence', '?')})" for s in card.sources)
    )
    version = client.create_model_version(name, model.artifact_location, run_id, tags, None, text[:5000], 60, model_id)
    if sqlite_file(uri):  # what a server does by itself: the link from the model to its version
        link = json.dumps([{"name": name, "version": int(version.version)}])
        client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": link})
    return int(version.version)


def _download(uri: str, source: str, version: Version, target: Path) -> None:
    """Fetch the two files, check them, and put them into place at once."""
    import mlflow.artifacts

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        new = Path(scratch) / "new"
        for name in FILES:
            try:
                mlflow.artifacts.download_artifacts(f"{source}/artifacts/{name}", dst_path=str(new), tracking_uri=uri)
            except Exception as why:  # each kind of store has errors of its own
                text = f"{name} cannot be downloaded ({one_line(why)}); nothing else, and nothing pickled, is read"
                raise RegistryError(f"{version.uri}: {text}") from None
        _checked(new)
        if not _is_version(new, version):
            raise RegistryError(
                f"{version.uri}: not the files that were registered, by the digests in its tags; register it anew"
            )
        if target.exists():  # damaged, or the same weights with another card
            target.rename(Path(scratch) / "old")
        with contextlib.suppress(OSError):  # another process was faster
            new.rename(target)
    _checked(target)


def _is_version(folder: Path, version: Version) -> bool:
    tags = (version.tags.get("weights_sha256"), version.tags.get("card_sha256"))
    return all(
        (folder / name).is_file() and _sha256(folder / name) == tag for name, tag in zip(FILES, tags, strict=True)
    )


def _checked(folder: Path) -> EncoderCard:
    """The card of a folder whose weights are safetensors with the card's digest."""
    path = folder / FILES[0]
    try:
        card = read_card(folder)
        if _sha256(path) != card.weights_sha256:
            raise RegistryError(f"{path}: its SHA-256 is not the one in encoder.json: damaged; get it again")
        with safe_open(str(path), "numpy"):
            return card
    except (ExportError, KeyError, TypeError, OSError, SafetensorError) as why:
        raise RegistryError(
            f"{folder}: holds no encoder.safetensors and encoder.json to use ({one_line(why)})"
        ) from None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
