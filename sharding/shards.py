"""Blocks → a WebDataset tar shard, byte for byte reproducible."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import xxhash

_TAR_RECORD: Final = 512


class ShardWriter:
    """Write one shard under a temporary name; the end of the ``with`` block syncs and renames it.

    Attributes:
        entry: name, size and SHA-256, for the manifest; empty until the shard is finished.
    """

    def __init__(self, path: Path) -> None:
        # webdataset imports torch if it is installed, which takes a second: only processes that write pay for it.
        from webdataset.writer import TarWriter

        self.path = path
        self.entry: dict[str, Any] = {}
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = _Hashing(self._temporary)
        self._tar = TarWriter(self._file, user="", group="", mtime=0, encoder=False, compress=False)
        self._end = 0  # of the last member

    def add(self, block: int, data: bytes) -> tuple[int, int, int]:
        """Append one block; returns offset and size of its bytes in the shard, and their xxh3."""
        self._tar.write({"__key__": f"{block:09d}", "safetensors": data})
        offset = self._end + _TAR_RECORD
        # Computed, since tarfile buffers its writes: a member is a header and whole records.
        self._end = offset + -(-len(data) // _TAR_RECORD) * _TAR_RECORD
        return offset, len(data), xxhash.xxh3_64_intdigest(data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._tar.close()
        self._file.close()
        if kind is not None:
            self._temporary.unlink(missing_ok=True)
            return
        os.replace(self._temporary, self.path)
        self.entry = {"name": self.path.name, "size": self._file.size, "sha256": self._file.digest.hexdigest()}


class _Hashing:
    """A file that hashes what is written to it, with the methods that tarfile's stream mode needs."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
