"""A bounded cache of whole shards on a node's disk, shared by its processes; evicts the least recently used first.

A shard is named by its SHA-256, so that data sets may share the folder. It is downloaded to ``<sha256>.part``, and
renamed to ``<sha256>.tar`` once complete and verified. The process that downloads it holds a lock on the ``.part``,
which ends with the process: one without a lock was left by a crash. A shard that is removed while a process reads it
stays readable to that process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Final

from cdssl_dist.data.waiting import Patience, warn

RETRY_AFTER: Final = 600.0  # s before a shard or disk that could not be used is tried again
LOOK: Final = 0.05  # s between two attempts to take a lock
CHUNK: Final = 2**20  # bytes
FULL: Final = (errno.ENOSPC, errno.EDQUOT)

Download = Callable[[int], None]  # writes a shard to an open file; raises OSError only if writing fails


class _UnkeptError(Exception):
    """This shard cannot be cached."""


def default_folder() -> Path:
    """CDSSL_CACHE, else ``~/.cache/cdssl/shards``."""
    return Path(os.environ.get("CDSSL_CACHE") or Path.home() / ".cache" / "cdssl" / "shards")


class ShardCache:
    """A bounded folder of shards.

    Args:
        folder: shared by the processes of a node; created if missing.
        limit: maximum total size of its files, bytes.
        patience: how long to wait for a shard that another process is loading.
    """

    def __init__(self, folder: Path, limit: int, patience: Patience | None = None) -> None:
        self.folder, self.limit = folder, limit
        self.patience = patience or Patience()
        self._refused: dict[str, float] = {}  # SHA-256, or "" for all → until when
        self._told = set[str]()  # kinds of refusals already reported

    def open(self, sha256: str, size: int, download: Download, stop: Event | None = None) -> int | None:
        """Return a descriptor of a shard, loading it first if it is not cached.

        Args:
            sha256, size: expected digest, and size in bytes.
            download: called with an open, empty file to write it to.
            stop: ends waiting with ``StoppedError``.

        Returns:
            The descriptor, or None if the shard cannot be cached (a full disk, a shard larger than the limit or with
            another SHA-256, another process that does not finish loading it): the caller must do without the cache.
            It is not tried again for a while.
        """
        if self._is_refused("") or self._is_refused(sha256):
            return None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return self._find_or_load(self.folder / f"{sha256}.tar", size, download, stop)
        except _UnkeptError as why:
            self._refuse(sha256, f"shard {sha256[:12]}… {why}")
        except OSError as why:
            self._refuse("", why.strerror or str(why))
        return None

    def drop(self, sha256: str, descriptor: int) -> None:
        """Remove a damaged shard, unless another process has replaced it already."""
        path = self.folder / f"{sha256}.tar"
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                path.unlink()

    def _find_or_load(self, path: Path, size: int, download: Download, stop: Event | None) -> int:
        end = self.patience.clock() + self.patience.give_up
        while self.patience.clock() < end:
            if (found := _open(path)) is not None:
                return found
            with _locked(path.with_suffix(".part")) as part:
                if part is not None:
                    found = _open(path)  # another process has just loaded it
                    return self._load(part, path, size, download) if found is None else found
            self.patience.pause(LOOK, stop)
        raise _UnkeptError(f"has been loading in another process for {self.patience.give_up:g} s")

    def _load(self, part: int, path: Path, size: int, download: Download) -> int:
        """Download into the locked ``.part``, verify it and rename it."""
        for _ in range(2):
            os.ftruncate(part, 0)  # a crash may have left something
            self._reserve(part, size)
            download(part)
            if _sha256(part) == path.stem:
                # Not synced: damage by a crash of the machine is found by the checksums of the blocks.
                os.replace(path.with_suffix(".part"), path)
                return os.dup(part)
        raise _UnkeptError("does not have the SHA-256 in the manifest")

    def _reserve(self, part: int, size: int) -> None:
        """Make room and allocate it on disk, so that a full disk is noticed before the download."""
        end = self.patience.clock() + self.patience.give_up
        while self.patience.clock() < end:
            with _locked(self.folder / "lock") as lock:
                if lock is None:
                    self.patience.pause(LOOK)
                    continue
                shards, used = self._content()
                while used + size > self.limit and shards:
                    _, freed, path = shards.pop(0)
                    path.unlink(missing_ok=True)
                    used -= freed
                if used + size > self.limit:
                    raise _UnkeptError(f"does not fit into the {self.limit / 1e9:g} GB of the cache")
                while not _allocate(part, size):
                    if not shards:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    shards.pop(0)[2].unlink(missing_ok=True)  # others filled the disk: make room
                return
        raise _UnkeptError("found the cache locked by another process")

    def _content(self) -> tuple[list[tuple[int, int, Path]], int]:
        """Return (last use, bytes, path) of all shards, oldest first, and total bytes; remove what crashes left."""
        shards, used = [], 0
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.suffix == ".part":
                    with _locked(path, create=False):
                        pass  # nobody else holds it: removed at the end
                if path.suffix in (".tar", ".part"):
                    about = path.stat()
                    used += about.st_size
                    if path.suffix == ".tar":
                        shards.append((about.st_mtime_ns, about.st_size, path))
        return sorted(shards), used

    def _is_refused(self, what: str) -> bool:
        return self.patience.clock() < self._refused.get(what, float("-inf"))

    def _refuse(self, what: str, why: str) -> None:
        self._refused[what] = self.patience.clock() + RETRY_AFTER
        if (kind := "all" if what == "" else "a shard") not in self._told:
            self._told.add(kind)
            warn(f"{self.folder}: {why}; blocks are read over the network one by one, which is slow (see CDSSL_CACHE)")


def _open(path: Path) -> int | None:
    """Open a shard and mark it as used now; None if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):  # it may have been removed just now
        os.utime(path)
    return descriptor


@contextlib.contextmanager
def _locked(path: Path, create: bool = True) -> Iterator[int | None]:
    """Lock a file and yield its descriptor; None if another process holds the lock, or just renamed or removed it.

    A ``.part`` that was not renamed by the end is removed.
    """
    descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
    try:
        mine = False
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = _names(path, descriptor)
        try:
            yield descriptor if mine else None
        finally:
            if mine and path.suffix == ".part" and _names(path, descriptor):
                path.unlink()
    finally:
        os.close(descriptor)


def _names(path: Path, descriptor: int) -> bool:
    """Whether a path still refers to an open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _allocate(descriptor: int, size: int) -> bool:
    """Allocate disk space for an empty file; False if the disk is full."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:  # macOS
            os.ftruncate(descriptor, size)
    except OSError as why:
        os.ftruncate(descriptor, 0)
        if why.errno not in FULL:
            raise
        return False
    return True


def _sha256(descriptor: int) -> str:
    """SHA-256 of a whole open file."""
    found, at = hashlib.sha256(), 0
    while data := os.pread(descriptor, CHUNK, at):
        found.update(data)
        at += len(data)
    return found.hexdigest()
