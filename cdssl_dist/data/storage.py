"""Where the shards of an opened data set lie: in a folder, or behind a URL with a cache on this node."""

from __future__ import annotations

import io
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Final, Protocol

from cdssl_dist.data.cache import ShardCache
from cdssl_dist.data.remote import PIECE, Remote
from sharding.manifest import DataSetError

OPEN_SHARDS: Final = 128  # per process; usually more than its lanes times the shards mixed
STALE: Final = 60.0  # s; a shard evicted from the cache is closed, freeing its disk space, if not read for so long

Entries = Sequence[dict[str, Any]]  # of the manifest: name, size, sha256


class Storage(Protocol):
    """The files of a data set."""

    def read(self, shard: int, offset: int, size: int, stop: threading.Event | None) -> bytes:
        """Bytes of a shard, unverified and perhaps too few."""

    def fetch(self, shard: int, stop: threading.Event | None) -> bool:
        """Load a shard into the cache before it is read; False if it is not cached, and nothing was done."""

    def report_corrupt(self, shard: int) -> bool:
        """Report that a shard gave wrong bytes; return whether reading again may help."""

    def open(self, name: str) -> IO[bytes]:
        """Open a file other than a shard."""

    def close(self) -> None:
        """Close all open shards; reading opens them again."""


class LocalShards:
    """Shards in a folder.

    Raises:
        DataSetError: if one is missing or of the wrong size.
    """

    def __init__(self, folder: Path, entries: Entries) -> None:
        self._paths = [folder / entry["name"] for entry in entries]
        self._folder, self._open = folder, _Descriptors()
        for path, entry in zip(self._paths, entries, strict=True):
            if not path.exists():
                raise DataSetError(f"{path}: the shard is missing; copy it again from the original data set")
            if path.stat().st_size != entry["size"]:
                raise DataSetError(
                    f"{path}: {path.stat().st_size} bytes, {entry['size']} expected; the shard is damaged"
                )

    def read(self, shard: int, offset: int, size: int, stop: threading.Event | None) -> bytes:
        """See ``Storage``."""
        try:
            file = self._open.get(shard, lambda: os.open(self._paths[shard], os.O_RDONLY))
            assert file is not None
            # Not memory-mapped: truncating a shard that is being read must raise an error, not kill the process.
            return os.pread(file.number, size, offset)
        except OSError as why:
            raise DataSetError(f"{self._paths[shard]}: the shard was lost after the start ({why.strerror})") from None

    def fetch(self, shard: int, stop: threading.Event | None) -> bool:
        """Do nothing: the operating system reads ahead."""
        return False

    def report_corrupt(self, shard: int) -> bool:
        """Return False: a disk would give the same bytes again."""
        return False

    def open(self, name: str) -> IO[bytes]:
        """See ``Storage``."""
        try:
            return open(self._folder / name, "rb")
        except OSError as why:
            raise DataSetError(f"{self._folder / name}: cannot be read ({why.strerror})") from None

    def close(self) -> None:
        """See ``Storage``."""
        self._open.clear()


class RemoteShards:
    """Shards behind a URL: read from a cache on this node, or by range requests if they cannot be cached."""

    def __init__(self, remote: Remote, entries: Entries, cache: ShardCache | None) -> None:
        self._remote, self._entries, self._cache = remote, entries, cache
        self._open = _Descriptors()

    def read(self, shard: int, offset: int, size: int, stop: threading.Event | None) -> bytes:
        """See ``Storage``; raises ``StoppedError`` soon after ``stop`` was set."""
        file = self._open.get(shard, lambda: self._cached(shard, stop))
        if file is not None:
            return os.pread(file.number, size, offset)
        return self._remote.range(self._entries[shard]["name"], offset, offset + size, stop)

    def fetch(self, shard: int, stop: threading.Event | None) -> bool:
        """See ``Storage``; raises as ``read`` does."""
        return self._open.get(shard, lambda: self._cached(shard, stop)) is not None

    def report_corrupt(self, shard: int) -> bool:
        """Drop the cached copy; a second download may be intact."""
        file = self._open.take(shard)
        if file is not None and self._cache is not None:
            self._cache.drop(self._entries[shard]["sha256"], file.number)
        return True

    def open(self, name: str) -> IO[bytes]:
        """See ``Storage``."""
        return io.BufferedReader(_RemoteFile(self._remote, name))

    def close(self) -> None:
        """See ``Storage``."""
        self._open.clear()

    def _cached(self, shard: int, stop: threading.Event | None) -> int | None:
        if self._cache is None:
            return None
        entry = self._entries[shard]

        def download(file: int) -> None:
            self._remote.download(entry["name"], entry["size"], file, stop)

        return self._cache.open(entry["sha256"], entry["size"], download, stop)


class _RemoteFile(io.RawIOBase):
    """A remote file with the interface of Python's ``io``."""

    def __init__(self, remote: Remote, name: str) -> None:
        self._remote, self._name, self._size, self._at = remote, name, remote.size(name), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size, self._at + PIECE)
        data = self._remote.range(self._name, self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Descriptor:
    """An open file, closed with the last reference to it, so that one thread cannot close it while another reads."""

    __slots__ = ("number", "used")

    def __init__(self, number: int) -> None:
        self.number, self.used = number, time.monotonic()

    def __del__(self) -> None:
        os.close(self.number)


class _Descriptors:
    """The open shards; the least recently used are closed first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[int, _Descriptor] = OrderedDict()

    def get(self, shard: int, opened: Callable[[], int | None]) -> _Descriptor | None:
        """Return an open shard, or open it with ``opened`` and keep it."""
        with self._lock:
            if shard in self._files:
                self._files.move_to_end(shard)
                self._files[shard].used = time.monotonic()
                return self._files[shard]
        number = opened()  # not under the lock: it may take long, and other shards are read meanwhile
        if number is None:
            return None
        file = _Descriptor(number)
        with self._lock:
            self._files[shard] = file
            while len(self._files) > OPEN_SHARDS:
                self._files.popitem(last=False)
            old = [s for s, f in self._files.items() if f.used < file.used - STALE and os.fstat(f.number).st_nlink == 0]
            for s in old:
                del self._files[s]
        return file

    def take(self, shard: int) -> _Descriptor | None:
        """Remove and return one."""
        with self._lock:
            return self._files.pop(shard, None)

    def clear(self) -> None:
        """Remove all."""
        with self._lock:
            self._files.clear()
