"""Models by name: versions in an MLflow registry that other jobs pull, and which of them is the champion.

A version holds ``encoder.safetensors`` and ``encoder.json``, or ``property.safetensors`` and ``property.json``.
``pull`` takes these two files and nothing else: no code that lies in a registry is executed to use a model.
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

JUDGED: Final = "judged"  # tag of a version that was compared with the champion: that is done once


@dataclass(frozen=True)
class Registered:
    """What came of a registration."""

    name: str
    version: int
    aliases: tuple[str, ...]
    uri: str  # what ``pull`` takes
    created: bool  # False where this very model had been registered before
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
    """Register a model; it becomes the champion where it is provably better, or there is none.

    The same weights are registered once: a repetition finds their version, and changes no alias that is set. So what
    a dying server left half done is tried again without harm, and several jobs may register under one name at a time.

    Args:
        folder: holds ``encoder.safetensors`` and ``encoder.json``, or the two files of a fine-tuned model; or what
            ``cdssl finetune`` left.
        name: of the registered model.
        uri: of the MLflow server or SQLite file.
        run_id: the MLflow run that trained it.
        tries: how often a registry that does not answer is asked.

    Raises:
        RegistryError: where the folder holds no sound model, or the registry does not do its part.
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
    """Whether a model of a kind could be registered under a name: to be asked before the work that makes it.

    Raises:
        RegistryError: where the name is none, holds another kind, or the registry does not answer.
    """
    _check_name(name)
    with session(uri, 10, create=True) as client:
        if name in names(client):
            _check_kind(name, versions(client, name), kind)


def _check_name(name: str) -> None:
    if not REF.fullmatch(f"models:/{name}@latest") or name.endswith(LOCK):
        raise RegistryError(f"{name!r} is no name for a model: use letters, digits, - and _")


def _check_kind(name: str, there: list[Version], kind: Kind) -> None:
    if there and there[0].tags.get("format", kind.format).partition(" ")[0] != kind.format:
        raise RegistryError(f"{name!r} holds {there[0].tags['format']}, not {kind.format}: take another name")


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
            else:  # also where an earlier registration was cut off before it came to this
                reason = _objection(kind, tags, champion)
                if not reason:
                    move_champion(client, name, version)
                    above = f"{kind.score} above that of version {champion.version}" if champion else ""
                    reason = above or "the first one"
                client.set_model_version_tag(name, str(version), JUDGED, "yes")
            mine = next(v for v in versions(client, name) if v.version == version)
        return Registered(name, version, mine.aliases, mine.uri, not known, reason)


def list_versions(name: str | None, uri: str) -> list[Version]:
    """All versions of a model, newest first; of all models, one name after the other, where none is named."""
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
    """Tags in which two versions differ: name → (of the first, of the second), "" where one has none."""
    with session(uri, 10) as client:
        a, b = resolve(client, first).tags, resolve(client, second).tags
    return {k: (a.get(k, ""), b.get(k, "")) for k in sorted({*a, *b}) if a.get(k) != b.get(k)}


def promote(ref: str, uri: str) -> Version:
    """Make a version the champion; the one before is kept as ``previous``."""
    with session(uri, 10) as client:
        found = resolve(client, ref)
        with exclusive(client, found.name):
            move_champion(client, found.name, found.version)
        return resolve(client, found.uri)


def rollback(name: str, uri: str) -> Version:
    """Make the previous champion the champion again; what was the champion becomes the previous one."""
    with session(uri, 10) as client:
        known_name(client, name)
        with exclusive(client, name):
            found = resolve(client, f"models:/{name}@previous")
            move_champion(client, name, found.version)
        return resolve(client, found.uri)


def delete(ref: str, uri: str) -> Version:
    """Delete a version from the registry; copies that were pulled stay.

    Raises:
        RegistryError: for the champion and the previous one, which others rely on.
    """
    with session(uri, 10) as client:
        found = resolve(client, ref)
        with exclusive(client, found.name):
            found = resolve(client, found.uri)  # its aliases, now that nobody else moves them
            held = [a for a in found.aliases if a != "latest"]
            if held:
                raise RegistryError(f"{found.uri} is the {' and '.join(held)}: promote another version first")
            client.delete_model_version(found.name, str(found.version))
    return found


def pull(ref: str, uri: str, cache: Path | None = None) -> Path:
    """The folder of ``pull_version``."""
    return pull_version(ref, uri, cache).folder


def pull_version(ref: str, uri: str, cache: Path | None = None) -> Pulled:
    """A folder that holds the two files of a model, checked against their digests.

    Args:
        ref: ``models:/name@champion``, ``models:/name/3``, or a folder.
        uri: of the MLflow server or SQLite file. Where it does not answer, what ``ref`` was last is taken.
        cache: folder for downloads; CDSSL_CACHE, else ``~/.cache/cdssl``, where left out.

    Raises:
        RegistryError: where there is no such model, it is damaged, or of a newer format.
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
            if not re.fullmatch("[0-9a-f]{64}", digest):  # it names a folder here
                raise RegistryError(f"{version.uri}: no model that cdssl registered: it has no tag weights_sha256")
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
            raise RegistryError(f"{ref}: {why}; and there is no sound copy of an earlier pull") from None
        say(f"{ref}: {why}; using what it was on {known['date']}: version {known['version']}")
        return Pulled(folder, f"models:/{_name(ref)}/{known['version']}")
    content = {"uri": redact(uri), "ref": ref, "version": version.version, "date": time.strftime("%F %R")}
    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(note, json.dumps(content | {"weights_sha256": folder.name}, indent=1).encode())
    return Pulled(folder, version.uri)


def _name(ref: str) -> str:
    match = REF.fullmatch(ref)
    return match["name"] if match else ref


def _objection(kind: Kind, tags: dict[str, str], champion: Version | None) -> str:
    """Why a model does not replace the champion; nothing where it does."""
    if champion is None:
        return ""
    its = f"the champion, version {champion.version}"
    if differ := [n for n in kind.comparable if tags[n] != champion.tags.get(n)]:
        return f"not comparable to {its}: {', '.join(differ)} differ; promote by hand"
    mine, others = (float(t.get(kind.score, "nan")) for t in (tags, champion.tags))
    if not (math.isfinite(mine) and math.isfinite(others)):
        return f"no {kind.score} to compare with {its}; promote by hand"
    return "" if mine > others else f"{kind.score} {mine:.4f} is not above the {others:.4f} of {its}"


def _description(kind: Kind, tags: dict[str, str]) -> str:
    about = f"Trained on {tags['sources']}, licences {tags['licences']}. See MODEL_CARD.md among its artifacts."
    if kind.stem == "encoder":
        code = "As a pyfunc it carries code, which is for registries you trust; encoder.safetensors and .json are data."
        return f"A crystal encoder, cutoff {tags['cutoff']} Angstrom. {code} {about}"
    return f"Predicts {tags['targets']} of crystals; fine-tuned from {tags['encoder']}. {about}"


def _download(uri: str, source: str, kind: Kind, version: Version, target: Path) -> None:
    """Fetch the two files, check them, and put them into place at once."""
    import mlflow.artifacts

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        new = Path(scratch) / "new"
        for name in kind.files:
            try:
                mlflow.artifacts.download_artifacts(f"{source}/artifacts/{name}", dst_path=str(new), tracking_uri=uri)
            except Exception as why:  # each kind of store has errors of its own
                text = f"{name} cannot be downloaded ({one_line(why)}); nothing else, and nothing pickled, is read"
                raise RegistryError(f"{version.uri}: {text}") from None
        checked(new, kind)
        if not _is_version(new, kind, version):
            raise RegistryError(
                f"{version.uri}: not the files that were registered, by the digests in its tags; register it anew"
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
