"""The working folder of an unfinished sharding run: one process at a time, one task, and nothing stale in it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Final

from sharding.crystal import Refusal
from sharding.manifest import SPLITS, WORK, DataSetError, Manifest, read_manifest, write_atomically
from sharding.settings import ShardSettings
from sharding.sources import ReadOptions, Source

TEMPORARY: Final = re.compile(r"\..+\.\d+\.tmp")
SHARD: Final = re.compile(rf"({'|'.join(SPLITS)})-\d{{6,}}\.tar")


class Workspace:
    """Unfinished work in the folder of a data set.

    Attributes:
        path: the folder for intermediate files.
        finished: the manifest, if an earlier run of the same task wrote it but was stopped before it cleaned up.
    """

    def __init__(self, folder: Path, task: bytes) -> None:
        self.folder = folder
        self.path = folder / WORK
        self._task = task
        self.finished: Manifest | None = None

    @contextmanager
    def opened(self) -> Iterator[Workspace]:
        """Lock the folder. The lock is released when the process ends, however it ends.

        Raises:
            DataSetError: if another process is at work, or the folder holds a data set or another task's work.
        """
        complete = self.folder / "manifest.json"
        taken = DataSetError(f"{self.folder}: holds a data set already; give another folder or remove it")
        if complete.exists() and not self.path.exists():
            raise taken
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataSetError(
                    f"{self.folder}: another process is sharding into this folder; wait for it, or give another folder"
                ) from None
            same = self._same_task()
            if complete.exists():
                if same is None:  # what a killed ``remove`` left behind
                    shutil.rmtree(self.path)
                if same is not True:
                    raise taken
                self.finished = read_manifest(self.folder)
            elif same is False:
                raise DataSetError(
                    f"{self.folder}: holds unfinished work with other sources or settings ({self.path / 'task.json'}); "
                    "finish it with those, or remove the folder"
                )
            elif same is None:
                write_atomically(self.path / "task.json", self._task)
            self._sweep()
            yield self

    def _same_task(self) -> bool | None:
        """Whether the existing work is this task's; None if there is none."""
        path = self.path / "task.json"
        return path.read_bytes() == self._task if path.exists() else None

    def _sweep(self) -> None:
        """Remove what a killed process was writing."""
        stages = [path for path in self.path.iterdir() if path.is_dir()]
        for place in (self.folder, self.path, self.folder / "graphs.parquet", *stages):
            for path in place.iterdir() if place.is_dir() else ():
                if TEMPORARY.fullmatch(path.name):
                    path.unlink()

    def converted(self, files: Iterable[Path]) -> None:
        """Record the files of stage 1; if they have changed, remove what later stages made of them."""
        digest = hashlib.sha256("\n".join(path.name for path in files).encode()).hexdigest()
        path = self.path / "converted"
        if path.exists() and path.read_text() != digest:
            for stage in self.path.glob("[2-9]-*"):
                shutil.rmtree(stage)
            shutil.rmtree(self.folder / "graphs.parquet", ignore_errors=True)
            for shard in self.folder.iterdir():
                if SHARD.fullmatch(shard.name):
                    shard.unlink()
        write_atomically(path, digest.encode())

    def remove(self) -> None:
        """Remove the finished work. ``task.json``, which identifies it, goes last, so that a kill here does no harm."""
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "task.json":
                path.unlink()
        shutil.rmtree(self.path)


class Quarantine:
    """Write ``quarantine.jsonl`` as refusals come, since there may be millions; rename it when it is complete."""

    def __init__(self, path: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = open(self._temporary, "w", encoding="utf-8")

    def add(self, refusals: Iterable[Refusal]) -> None:
        """Write one line for each refusal."""
        for refusal in refusals:
            self.counts[refusal.code] += 1
            self._file.write(json.dumps(asdict(refusal), sort_keys=True) + "\n")

    def __enter__(self) -> Quarantine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def finish(self) -> None:
        """Sync and rename."""
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._temporary, self._path)

    def summary(self) -> str:
        """The counts, the largest first."""
        return ", ".join(f"{n} × {code}" for code, n in self.counts.most_common())


def describe(sources: Sequence[Source], exclude: Sequence[Source], settings: ShardSettings) -> bytes:
    """Serialize what identifies a task: a run with other sources or settings must not continue its work."""
    named = {
        part: [{"name": source.name} | _shaping(source.options) for source in listed]
        for part, listed in (("sources", sources), ("exclude", exclude))
    }
    return json.dumps(named | {"settings": asdict(settings)}, indent=1).encode()


def _shaping(options: ReadOptions | None) -> dict[str, object]:
    """The options of a source that affect its output; labels are in the settings."""
    if options is None:
        return {}
    keys = hashlib.sha256("\0".join(sorted(options.keys)).encode()).hexdigest() if options.keys is not None else None
    return {"occupancy": options.occupancy, "keys": keys}
