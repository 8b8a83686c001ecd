"""Checkpoints: uniquely named folders, written by all ranks and committed by a marker with checksums.

The marker alone decides what is resumed; a folder without one was left by a crash, and is removed. Full tensors are
saved by name, as safetensors, each by one rank, so that a run can resume at any number of ranks and any ZeRO stage
without conversion, and nothing is pickled.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch.distributed as dist
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cdssl_dist.config import Config
from cdssl_dist.train.gate import EMA
from cdssl_dist.train.guard import GuardState
from cdssl_dist.train.ledger import Ledger
from sharding.manifest import write_atomically

if TYPE_CHECKING:
    from cdssl_dist.train.engine import Engine  # imports DeepSpeed, which readers of checkpoints do without

VERSION: Final = 2
MARKER: Final = "COMMITTED"
# A change of these makes another network, which the weights do not fit.
NETWORK_KEYS: Final = ("model.width", "model.hidden", "model.blocks", "graph.", "pretext.", "data.cutoff")


class CheckpointError(ValueError):
    """A checkpoint does not fit the run, or is damaged; the message is one line."""


@dataclass(frozen=True)
class Progress:
    """All of a run's state except its weights; everything else follows from the config."""

    cursor: int  # number of consumed steps, and so of the next one
    guard: GuardState
    data_digest: str
    config_digest: str
    config: dict[str, Any]  # to report what differs
    world_size: int
    data: dict[str, Any]  # counts of the data set, to report what differs
    loss: float | None = None  # val/loss of these weights, if they were validated
    saved: float = 0.0  # seconds since the epoch
    version: int = VERSION


@dataclass(frozen=True)
class Retention:
    """Which checkpoints to keep besides the newest good one, which a roll-back would return to."""

    keep: int = 2  # the newest
    quiet: int = 50  # steps after which a checkpoint counts as good
    best: bool = True  # the one with the lowest validation loss
    hours: float | None = None  # one per span of this length


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    folder: Path
    progress: Progress


def save(root: Path, engine: Engine, progress: Progress, retention: Retention, ledger: Ledger) -> Path:
    """Save and commit a checkpoint, remove those not kept, and return its folder; a collective."""
    rank = dist.get_rank()
    name = [f"step-{progress.cursor:09d}-w{progress.world_size}-{uuid.uuid4().hex[:8]}"]
    dist.broadcast_object_list(name, src=0)
    folder = root / name[0]
    folder.mkdir(parents=True, exist_ok=True)
    mine = {}
    for i, (tensor_name, tensor) in enumerate(engine.tensors()):
        if i % progress.world_size == rank:
            mine[tensor_name] = tensor.cpu().contiguous()
    path = folder / f"state-{rank:05d}-of-{progress.world_size:05d}.safetensors"
    save_file(mine, str(path))
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    dist.barrier()
    if rank == 0:
        write_atomically(folder / "progress.json", json.dumps(asdict(progress), indent=1).encode())
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        sums = {str(p.relative_to(folder)): _checksum(p) for p in files}
        write_atomically(folder / MARKER, json.dumps(sums, indent=1).encode())
        _retain(root, retention, ledger, progress.cursor)
    dist.barrier()
    return folder


def load(found: Checkpoint, engine: Engine) -> None:
    """Read a checkpoint into an engine, whatever number of ranks wrote it; a collective."""
    with opened(found.folder) as where:

        def read(name: str) -> Tensor:
            if name not in where and name.startswith(f"{EMA}/"):  # saved without: start from the weights
                name = name.replace(f"{EMA}/", "weight/", 1)
            return where[name].get_tensor(name)

        engine.set_tensors(read, found.progress.guard.applied)


@contextmanager
def opened(folder: Path) -> Iterator[dict[str, Any]]:
    """Open the files of a checkpoint; yield the open file of each tensor, by tensor name."""
    with ExitStack() as files:
        where: dict[str, Any] = {}
        for path in sorted(folder.glob("state-*.safetensors")):
            file = files.enter_context(safe_open(str(path), framework="pt"))
            where |= dict.fromkeys(file.keys(), file)
        yield where


def newest(root: Path, ledger: Ledger, before: int | None = None) -> Checkpoint | None:
    """The committed checkpoint with the highest cursor, verified.

    Args:
        root: folder of the checkpoints.
        ledger: its roll-backs; checkpoints that they discarded are left out.
        before: the highest cursor allowed.

    Raises:
        CheckpointError: if one of its files does not match its marker.
    """
    found = [f for f in _not_discarded(root, ledger) if before is None or cursor_of(f.name) <= before]
    if not found:
        return None
    verified(found[-1])
    return Checkpoint(found[-1], read_progress(found[-1]))


def verified(folder: Path) -> None:
    """Check every file of a committed checkpoint.

    Raises:
        CheckpointError: if a file is missing or does not match the marker.
    """
    for name, expected in json.loads((folder / MARKER).read_text()).items():
        if not (folder / name).exists() or _checksum(folder / name) != expected:
            raise CheckpointError(
                f"{folder / name}: missing, or not what {MARKER} says; remove {folder} to resume from the one before it"
            )


def read_progress(folder: Path) -> Progress:
    """Read the progress stored in a checkpoint, upgraded to this version.

    Raises:
        CheckpointError: if a newer version wrote it.
    """
    content = json.loads((folder / "progress.json").read_text())
    if content["version"] > VERSION:
        raise CheckpointError(f"{folder}: written by a newer version of this program; update it")
    for version in range(content["version"], VERSION):
        content = UPGRADES[version](content)
    content["guard"] = GuardState(**content["guard"])
    return Progress(**content)


def _upgrade_1(content: dict[str, Any]) -> dict[str, Any]:
    """Version 2 adds the loss, counts of the data set, the time of saving, and the guard's detection of new levels."""
    level = {"loss": 0.0, "level_steps": 0, "level_low": 0.0, "level_high": 0.0, "level_sum": 0.0}
    new: dict[str, Any] = {"data": {}, "loss": None, "saved": 0.0, "version": 2}
    return content | new | {"guard": content["guard"] | level}


UPGRADES: Final = {1: _upgrade_1}  # version → to the next


def check_fits(checkpoint: Checkpoint, config: Config, digest: str, counts: dict[str, Any]) -> list[str]:
    """Check that a checkpoint belongs to this run.

    Args:
        checkpoint: the checkpoint to resume from.
        config: the current configuration; its ``checkpoint.allow_changed`` names what may differ.
        digest, counts: of the current data set.

    Returns:
        The differences that are allowed, each ``section.key: old → new``.

    Raises:
        CheckpointError: if anything else differs; the message lists it.
    """
    old = checkpoint.progress
    # Parsed as a typed config, so that settings unknown to an older version have their defaults.
    before = Config.model_validate(old.config).decisive()
    changes = dict(_differences(before, config.decisive()))
    if old.data_digest != digest:
        counted = "".join(f", {key}: {change}" for key, change in _differences(old.data, counts))
        if "cutoff" in old.data and old.data["cutoff"] != counts["cutoff"]:
            changes["data.cutoff"] = f"{old.data['cutoff']} Å → {counts['cutoff']} Å"
        changes["data"] = f"digest {old.data_digest[:12]} → {digest[:12]}{counted}"
    refused = {key: change for key, change in changes.items() if key not in config.checkpoint.allow_changed}
    shape = {key: change for key, change in changes.items() if key.startswith(NETWORK_KEYS)}
    ended = {"data": changes["data"]} if "data" in changes and old.cursor >= config.schedule.steps else {}
    if found := shape or ended or refused:
        way = "another network, which these weights do not fit: use another run folder"
        if ended and not shape:
            way = "the run has ended, and its encoder was not trained on other data: use another run folder"
        elif not shape:
            way = f"use another run folder, or continue anyway with --allow-changed {','.join(refused)}"
        raise CheckpointError(
            f"{checkpoint.folder}: this run began with other settings or data: "
            + "; ".join(f"{key}: {change}" for key, change in found.items())
            + f"; {way}"
        )
    return [f"{key}: {change}" for key, change in changes.items()]


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """``section.key`` and ``old → new`` for each difference."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", f"{a} → {b}"))
    return found


def cursor_of(name: str) -> int:
    """Consumed steps of a checkpoint, by the name of its folder."""
    return int(name.split("-")[1])


def committed(root: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    found = (p.parent for p in root.glob(f"step-*/{MARKER}"))
    return sorted(found, key=lambda p: (cursor_of(p.name), p.stat().st_mtime_ns))


def _not_discarded(root: Path, ledger: Ledger) -> list[Path]:
    return [folder for folder in committed(root) if not ledger.discarded(cursor_of(folder.name))]


def _retain(root: Path, retention: Retention, ledger: Ledger, cursor: int) -> None:
    """Remove, markers first, checkpoints that are not kept, were left by crashes or discarded by a roll-back."""
    found = _not_discarded(root, ledger)
    good = [f for f in found if cursor_of(f.name) <= cursor - retention.quiet]
    kept = {*found[-retention.keep :], *good[-1:], *found[len(good) :]}  # the later ones may yet prove bad
    about = {f: read_progress(f) for f in found}
    validated = [(p.loss, f) for f, p in about.items() if p.loss is not None and math.isfinite(p.loss)]
    if retention.best and validated:
        kept.add(min(validated, key=lambda pair: pair[0])[1])
    if retention.hours:
        spans: dict[int, Path] = {}
        for folder, progress in about.items():
            spans.setdefault(int(progress.saved // (3600 * retention.hours)), folder)
        kept |= set(spans.values())
    for folder in root.glob("step-*"):
        if folder not in kept and folder.is_dir():
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(run: Path) -> None:
    """Remove what crashes left: checkpoints without a marker, which fill a disk, and copies that were being fetched."""
    unmarked = [f for f in (run / "checkpoints").glob("step-*") if f.is_dir() and not (f / MARKER).exists()]
    for folder in [*unmarked, *run.glob("restore.*.tmp")]:
        shutil.rmtree(folder, ignore_errors=True)


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
