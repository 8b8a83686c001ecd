"""Models by name: versions in an MLflow registry, which other jobs pull; one of them is the champion.

A version holds ``encoder.safetensors`` and ``encoder.json``, or ``property.safetensors`` and ``property.json``.
``pull`` downloads only these two files: no code from a registry is executed to use a model.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cdssl_dist.mlops.mlflow_server import one_line, redact, say
from cdssl_dist.mlops.models import Kind, RegistryError, checked, kind_of, kind_of_tags, model_folder, sha256, tags_of
from cdssl_dist.mlops.registry_store import (
    LOCK,
    REF,
    UnreachableError,
    Version,
    champion_of,
    create_version,
    exclusive,
    known_name,
    move_champion,
    names,
    resolve,
    session,
    upload,
    versions,
)
from sharding.manifest import write_atomically

__all__ = ["Pulled", "Registered", "RegistryError", "Version", "check_free", "delete", "diff", "list_versions"]
__all__ += ["promote", "pull", "pull_version", "register", "rollback", "show"]

JUDGED: Final = "judged"  # tag of a version that was compared with the champion, which is done only once


@dataclass(frozen=True)
class Registered:
    """The outcome of a registration."""

    name: str
    version: int
    aliases: tuple[str, ...]
    uri: str  # what ``pull`` takes
    created: bool  # False if these weights had been registered before
    reason: str  # why it is the champion, or not

    def __str__(self) -> str:
        done = "registered as" if self.created else "is already"
        return f"{done} {self.uri} ({', '.join(self.aliases)}): {self.reason}"


@dataclass(frozen=True)
class Pulled:
    """A model on this machine."""

    folder: Path
    uri: str  # models:/NAME/VERSION, or the folder


def register(folder: Path, name: str, uri: str, run_id: str | None = None, tries: int = 3) -> Registered:
    """Register a model; it becomes the champion if there is none, or if its score is comparable and higher.

    The same weights are registered only once: a repeated call finds their version, and changes no alias that is set.
    So a registration that a failing server cut off can be repeated safely, and several jobs may register under one
    name at the same time.

    Args:
        folder: holds ``encoder.safetensors`` and ``encoder.json``, or the two files of a fine-tuned model; or what
            ``cdssl finetune`` left.
        name: name of the registered model.
        uri: URI of the MLflow server or SQLite file.
        run_id: the MLflow run that trained it.
        tries: how often to try a registry that does not answer.

    Raises:
        RegistryError: if the folder holds no valid model, or the registry fails.
    """
    _check_name(name)
    folder = model_folder(folder)
    kind = kind_of(folder)
    checked(folder, kind)
    for left in reversed(range(tries)):
        try:
            return _register(folder, kind, name, uri, run_id)
        except UnreachableError as why:
            if not left:
                raise
            say(f"{why}; trying again")
            time.sleep(2.0)
    raise AssertionError("unreachable")


def check_free(name: str, kind: Kind, uri: str) -> None:
    """Check that a model of this kind can be registered under a name, before the work of making it.

    Raises:
        RegistryError: if the name is invalid or holds another kind, or the registry does not answer.
    """
    _check_name(name)
    with session(uri, 10, create=True) as client:
        if name in names(client):
            _check_kind(name, versions(client, name), kind)


def _check_name(name: str) -> None:
    if not REF.fullmatch(f"models:/{name}@latest") or name.endswith(LOCK):
        raise RegistryError(f"{name!r} is not a valid name for a model: use letters, digits, - and _")


def _check_kind(name: str, there: list[Version], kind: Kind) -> None:
    if there and there[0].tags.get("format", kind.format).partition(" ")[0] != kind.format:
        raise RegistryError(f"{name!r} holds {there[0].tags['format']}, not {kind.format}: use another name")


def _register(folder: Path, kind: Kind, name: str, uri: str, run_id: str | None) -> Registered:
    tags = tags_of(folder, kind)

    def same(found: list[Version]) -> Version | None:
        return next((v for v in found if v.tags.get("weights_sha256") == tags["weights_sha256"]), None)

    with session(uri, 60, create=True) as client:
        from mlflow.exceptions import MlflowException

        try:
            client.create_registered_model(name)
        except MlflowException as why:
            if why.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        there = versions(client, name)
        _check_kind(name, there, kind)
        model = None if same(there) else upload(client, uri, folder, kind, name, run_id, tags)
        with exclusive(client, name):
            there = versions(client, name)
            known, champion = same(there), champion_of(there)
            if known is None and model is None:
                raise RegistryError(f"{name}: the version with these weights was deleted just now; register again")
            if known is None:
                version = create_version(client, uri, model, name, run_id, tags, _description(kind, tags))
            else:
                version = known.version
            if known and JUDGED in known.tags and champion:
                reason = "these weights were registered before"
            else:  # also if an earlier registration was cut off before the comparison
                reason = _objection(kind, tags, champion)
                if not reason:
                    move_champion(client, name, version)
                    above = f"{kind.score} above that of version {champion.version}" if champion else ""
                    reason = above or "the first one"
                client.set_model_version_tag(name, str(version), JUDGED, "yes")
            mine = next(v for v in versions(client, name) if v.version == version)
        return Registered(name, version, mine.aliases, mine.uri, not known, reason)


def list_versions(name: str | None, uri: str) -> list[Version]:
    """All versions of a model, newest first; without a name, those of all models, name by name."""
    with session(uri, 10) as client:
        if name is None:
            return [version for each in names(client) for version in versions(client, each)]
        known_name(client, name)
        return versions(client, name)


def show(ref: str, uri: str) -> Version:
    """The version that ``models:/name@alias`` or ``models:/name/version`` names."""
    with session(uri, 10) as client:
        return resolve(client, ref)


def diff(first: str, second: str, uri: str) -> dict[str, tuple[str, str]]:
    """Tags in which two versions differ: name → (value of the first, of the second), "" if missing."""
    with session(uri, 10) as client:
        a, b = resolve(client, first).tags, resolve(client, second).tags
    return {k: (a.get(k, ""), b.get(k, "")) for k in sorted({*a, *b}) if a.get(k) != b.get(k)}


def promote(ref: str, uri: str) -> Version:
    """Make a version the champion; the former champion becomes ``previous``."""
    with session(uri, 10) as client:
        found = resolve(client, ref)
        with exclusive(client, found.name):
            move_champion(client, found.name, found.version)
        return resolve(client, found.uri)


def rollback(name: str, uri: str) -> Version:
    """Make the previous champion the champion again; the current one becomes ``previous``."""
    with session(uri, 10) as client:
        known_name(client, name)
        with exclusive(client, name):
            found = resolve(client, f"models:/{name}@previous")
            move_champion(client, name, found.version)
        return resolve(client, found.uri)


def delete(ref: str, uri: str) -> Version:
    """Delete a version from the registry; copies that were already pulled remain.

    Raises:
        RegistryError: for the champion and the previous one, which others rely on.
    """
    with session(uri, 10) as client:
        found = resolve(client, ref)
        with exclusive(client, found.name):
            found = resolve(client, found.uri)  # read its aliases again, now that no other job can move them
            held = [a for a in found.aliases if a != "latest"]
            if held:
                raise RegistryError(f"{found.uri} is the {' and '.join(held)}: promote another version first")
            client.delete_model_version(found.name, str(found.version))
    return found


def pull(ref: str, uri: str, cache: Path | None = None) -> Path:
    """Pull a model and return its folder; see ``pull_version``."""
    return pull_version(ref, uri, cache).folder


def pull_version(ref: str, uri: str, cache: Path | None = None) -> Pulled:
    """Pull a model: a folder with its two files, checked against their digests.

    Args:
        ref: ``models:/name@champion``, ``models:/name/3``, or a folder.
        uri: URI of the MLflow server or SQLite file. If it does not answer, the version last pulled as ``ref`` is used.
        cache: folder for downloads; by default CDSSL_CACHE, else ``~/.cache/cdssl``.

    Raises:
        RegistryError: if there is no such model, or it is damaged or of a newer format.
    """
    if not ref.startswith("models:"):
        folder = model_folder(Path(ref))
        checked(folder, kind_of(folder))
        return Pulled(folder, ref)
    root = cache or Path(os.environ.get("CDSSL_CACHE") or Path.home() / ".cache" / "cdssl")
    note = root / "refs" / f"{hashlib.sha256(f'{redact(uri)} {ref}'.encode()).hexdigest()[:32]}.json"
    try:
        with session(uri, 10) as client:
            version = resolve(client, ref)
            kind, digest = kind_of_tags(version.uri, version.tags), version.tags.get("weights_sha256", "")
            if not re.fullmatch("[0-9a-f]{64}", digest):  # it becomes the name of a folder
                raise RegistryError(f"{version.uri}: not a model that cdssl registered: it has no tag weights_sha256")
            folder = root / "encoders" / digest
            if not _is_version(folder, kind, version):
                source = client.get_model_version_download_uri(version.name, str(version.version))
                _download(uri, source, kind, version, folder)
    except UnreachableError as why:
        try:
            known = json.loads(note.read_text())
            folder = root / "encoders" / known["weights_sha256"]
            checked(folder, kind_of(folder))
        except (OSError, ValueError, KeyError):
            raise RegistryError(f"{ref}: {why}; and there is no intact copy of an earlier pull") from None
        say(f"{ref}: {why}; using version {known['version']}, which was pulled on {known['date']}")
        return Pulled(folder, f"models:/{_name(ref)}/{known['version']}")
    content = {"uri": redact(uri), "ref": ref, "version": version.version, "date": time.strftime("%F %R")}
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(note, json.dumps(content | {"weights_sha256": folder.name}, indent=1).encode())
    return Pulled(folder, version.uri)


def _name(ref: str) -> str:
    match = REF.fullmatch(ref)
    return match["name"] if match else ref


def _objection(kind: Kind, tags: dict[str, str], champion: Version | None) -> str:
    """Why a model does not replace the champion; empty if it does."""
    if champion is None:
        return ""
    its = f"the champion, version {champion.version}"
    if differ := [n for n in kind.comparable if tags[n] != champion.tags.get(n)]:
        return f"not comparable to {its}: {', '.join(differ)} differ; promote it yourself if it is better"
    mine, others = (float(t.get(kind.score, "nan")) for t in (tags, champion.tags))
    if not (math.isfinite(mine) and math.isfinite(others)):
        return f"no {kind.score} to compare with {its}; promote it yourself if it is better"
    return "" if mine > others else f"{kind.score} {mine:.4f} is not above the {others:.4f} of {its}"


def _description(kind: Kind, tags: dict[str, str]) -> str:
    about = f"Trained on {tags['sources']}, licences {tags['licences']}. See MODEL_CARD.md among its artifacts."
    if kind.stem == "encoder":
        code = "Its pyfunc is code: load it only from registries you trust. encoder.safetensors and .json are data."
        return f"A crystal encoder, cutoff {tags['cutoff']} Angstrom. {code} {about}"
    return f"Predicts {tags['targets']} of crystals; fine-tuned from {tags['encoder']}. {about}"


def _download(uri: str, source: str, kind: Kind, version: Version, target: Path) -> None:
    """Download the two files, check them, and move them into place atomically."""
    import mlflow.artifacts

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        new = Path(scratch) / "new"
        for name in kind.files:
            try:
                mlflow.artifacts.download_artifacts(f"{source}/artifacts/{name}", dst_path=str(new), tracking_uri=uri)
            except Exception as why:  # each kind of store raises its own errors
                text = f"{name} cannot be downloaded ({one_line(why)}); nothing else, pickled or not, is ever read"
                raise RegistryError(f"{version.uri}: {text}") from None
        checked(new, kind)
        if not _is_version(new, kind, version):
            raise RegistryError(
                f"{version.uri}: its files do not match the digests in its tags; register the model again"
            )
        if target.exists():  # damaged, or the same weights with another card
            target.rename(Path(scratch) / "old")
        with contextlib.suppress(OSError):  # another process was faster
            new.rename(target)
    checked(target, kind)


def _is_version(folder: Path, kind: Kind, version: Version) -> bool:
    tags = (version.tags.get("weights_sha256"), version.tags.get("card_sha256"))
    return all(
        (folder / name).is_file() and sha256(folder / name) == tag for name, tag in zip(kind.files, tags, strict=True)
    )
