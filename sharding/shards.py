"""Blocks → WebDataset tar shards, byte for byte reproducible."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Final

import xxhash

_TAR_RECORD: Final = 512


class ShardWriter:
    """Writes one shard under a temporary name; ``close`` syncs and renames it.

    Attributes:
        members: (block, offset, size, xxh3) of each block written.
    """

    def __init__(self, path: Path) -> None:
        # Importing webdataset imports torch where it is installed: a second that only the process that writes pays.
        from webdataset.writer import TarWriter

        self.path = path
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.members: list[tuple[int, int, int, int]] = []
        self._end = 0  # of the last member
        self._file = _Hashing(self.temporary)
        self._tar = TarWriter(self._file, user="", group="", mtime=0, encoder=False, compress=False)

    def add(self, block: int, data: bytes) -> None:
        """Append one block."""
        self._tar.write({"__key__": f"{block:09d}", "safetensors": data})
        self.members.append((block, self._end + _TAR_RECORD, len(data), xxhash.xxh3_64_intdigest(data)))
        # Counted, not asked of the file: tarfile writes it in larger pieces. A member is a header and whole records.
        self._end += _TAR_RECORD + -(-len(data) // _TAR_RECORD) * _TAR_RECORD

    def close(self) -> dict[str, Any]:
        """Finish the shard; returns its entry in the manifest."""
        self._tar.close()
        self._file.close()
        os.replace(self.temporary, self.path)
        return {"name": self.path.name, "size": self._file.size, "sha256": self._file.digest.hexdigest()}


class _Hashing:
    """A file that hashes what is written to it, as tarfile's stream mode needs it."""

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
