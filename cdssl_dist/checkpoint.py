"""Checkpoints: a uniquely named folder, written by all ranks, and a marker with checksums last.

The marker alone decides what is resumed. A folder without one is what a crash left, and is removed. What is saved are
full tensors by name, in safetensors, each by one of the ranks: so a run goes on at any number of ranks and any ZeRO
stage without a conversion, and nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from cdssl_dist.engine import EMA, Engine
from cdssl_dist.guard import GuardState
from cdssl_dist.runlog import Ledger
from sharding.manifest import write_atomically

VERSION: Final = 1
MARKER: Final = "COMMITTED"


class CheckpointError(ValueError):
    """A checkpoint that does not fit the run, or is damaged: said in one line."""


@dataclass(frozen=True)
class Progress:
    """All of a run's state that is not weights: everything else follows from the config."""

    cursor: int  # consumed steps: the next step to take
    guard: GuardState
    data_digest: str
    config_digest: str
    config: dict[str, Any]  # to print what differs
    world_size: int
    version: int = VERSION


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    folder: Path
    progress: Progress


def save(root: Path, engine: Engine, progress: Progress, keep: int, quiet: int) -> None:
    """Save, commit, and remove what is not kept; a collective.

    Kept are the newest ``keep``, and the newest that ``quiet`` steps have passed since: the one to roll back to.
    """
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
        _retain(root, keep, progress.cursor - quiet)
    dist.barrier()


def load(found: Checkpoint, engine: Engine) -> None:
    """Read a checkpoint into an engine, whatever number of ranks wrote it; a collective."""
    with ExitStack() as opened:
        where: dict[str, Any] = {}
        for path in sorted(found.folder.glob("state-*.safetensors")):
            file = opened.enter_context(safe_open(str(path), framework="pt"))
            where |= dict.fromkeys(file.keys(), file)

        def read(name: str) -> Tensor:
            if name not in where and name.startswith(f"{EMA}/"):  # saved without: the mean begins here
                name = name.replace(f"{EMA}/", "weight/", 1)
            return where[name].get_tensor(name)

        engine.set_tensors(read, found.progress.guard.applied)


def newest(root: Path, ledger: Ledger, before: int | None = None) -> Checkpoint | None:
    """The committed checkpoint with the highest cursor, verified.

    Args:
        root: folder of the checkpoints.
        ledger: checkpoints that a roll-back has passed over are left out.
        before: the highest cursor allowed.

    Raises:
        CheckpointError: where a file of it is not what its marker says.
    """
    found = [
        folder
        for folder in _committed(root)
        if ledger.resume_point(_cursor(folder)) is not None and (before is None or _cursor(folder) <= before)
    ]
    if not found:
        return None
    folder = found[-1]
    for name, expected in json.loads((folder / MARKER).read_text()).items():
        if not (folder / name).exists() or _checksum(folder / name) != expected:
            raise CheckpointError(
                f"{folder / name}: missing, or not what {MARKER} says; remove {folder} to resume from the one before it"
            )
    content = json.loads((folder / "progress.json").read_text())
    if content["version"] > VERSION:
        raise CheckpointError(f"{folder}: written by a newer version of this program; update it")
    content["guard"] = GuardState(**content["guard"])
    return Checkpoint(folder, Progress(**content))


def check_fits(checkpoint: Checkpoint, progress: Progress) -> None:
    """Refuse to continue another run.

    Raises:
        CheckpointError: where the data set or the configuration is another one; says what differs.
    """
    old = checkpoint.progress
    if old.data_digest != progress.data_digest:
        raise CheckpointError(
            f"{checkpoint.folder}: trained on another data set (digest {old.data_digest[:12]}, now "
            f"{progress.data_digest[:12]}); use another run folder"
        )
    if old.config_digest != progress.config_digest:
        changed = ", ".join(_differences(old.config, progress.config))
        raise CheckpointError(f"{checkpoint.folder}: the configuration changed: {changed}; use another run folder")


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """``section.key: old → new`` for each difference."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a} → {b}")
    return lines


def _cursor(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def _committed(root: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted((p.parent for p in root.glob(f"*/{MARKER}")), key=lambda p: (_cursor(p), p.stat().st_mtime_ns))


def _retain(root: Path, keep: int, quiet_before: int) -> None:
    """Remove what is not kept, markers first, and what crashes left."""
    found = _committed(root)
    kept = found[-keep:] + [f for f in found if _cursor(f) <= quiet_before][-1:]
    for folder in root.iterdir():
        if folder not in kept:
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
