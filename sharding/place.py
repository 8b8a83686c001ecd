"""Where a finished data set is read from: a folder or an fsspec URL."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from sharding.commands import one_line
from sharding.manifest import VERSION, DataSetError, Manifest, read_manifest
from sharding.sources.streams import filesystem, is_remote, local_path, redacted

MANIFEST: Final = "manifest.json"
_AHEAD: Final = 8 * 2**20  # bytes per request for a remote file


@dataclass(frozen=True)
class Place:
    """The location of a data set; file names are relative to it. Can be sent to workers."""

    root: str
    remote: bool

    def __str__(self) -> str:
        return redacted(self.root)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A file, for reading.

        Raises:
            OSError: if the file is missing (``FileNotFoundError``) or cannot be opened, local or remote.
        """
        if not self.remote:
            with open(Path(self.root) / name, "rb") as file:
                yield file
            return
        with _as_os_error():
            system, path = _filesystem(self.root)
            raw = system.open(f"{path}/{name}", "rb", block_size=_AHEAD)
        with io.BufferedReader(_Remote(raw)) as file:
            yield file

    def size(self, name: str) -> int:
        """The size of a file, bytes."""
        if not self.remote:
            return (Path(self.root) / name).stat().st_size
        with _as_os_error():
            system, path = _filesystem(self.root)
            return int(system.size(f"{path}/{name}"))

    def files(self) -> list[str]:
        """The names of all files, sorted."""
        if not self.remote:
            found = (path for path in Path(self.root).rglob("*") if path.is_file())
            return sorted(str(path.relative_to(self.root)) for path in found)
        with _as_os_error():
            system, path = _filesystem(self.root)
            within = path.rstrip("/") + "/"
            return sorted(file.removeprefix(within) for file in system.find(within))

    def manifest(self) -> Manifest:
        """Read and check the manifest, as ``manifest.read_manifest`` does.

        Raises:
            DataSetError: if there is none, or it is damaged, or newer than this program.
        """
        if not self.remote:
            return read_manifest(self.root)
        try:
            with self.open(MANIFEST) as file, tempfile.TemporaryDirectory() as folder:
                (Path(folder) / MANIFEST).write_bytes(file.read())
                try:
                    return read_manifest(folder)
                except DataSetError as why:
                    raise DataSetError(str(why).replace(folder, str(self))) from None
        except FileNotFoundError:
            raise DataSetError(f"{self}: not a data set, manifest.json is missing") from None

    def require(self) -> None:
        """Raise if this is not a data set that this program can read (a wrong argument); damage is not checked.

        Raises:
            DataSetError: with a message that says what to do.
            OSError: if a remote place cannot be reached.
        """
        try:
            with self.open(MANIFEST) as file:
                version = json.load(file)["version"]
        except (FileNotFoundError, NotADirectoryError):
            self.manifest()
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        else:
            if isinstance(version, int) and version > VERSION:
                self.manifest()


def place_of(folder: str | Path) -> Place:
    """Return the place that a path or URL names.

    Raises:
        SourceError: if fsspec lacks a package for a URL.
    """
    if not is_remote(folder):
        return Place(str(local_path(folder)), False)
    root = str(folder).rstrip("/")
    _filesystem(root)
    return Place(root, True)


class _Remote(io.RawIOBase):
    """A remote file whose read errors are OSErrors, like those of a local file."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, at: int, whence: int = io.SEEK_SET) -> int:
        return int(self._file.seek(at, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def readinto(self, buffer: Any) -> int:
        with _as_os_error():
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@functools.lru_cache(maxsize=4)
def _filesystem(url: str) -> tuple[Any, str]:
    return filesystem(url)


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Convert the errors of remote storage, which have types of their own, to OSError."""
    try:
        yield
    except FileNotFoundError as why:  # fsspec reports every HTTP error as a missing file
        cause = why.__cause__
        http = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
        if not http or isinstance(cause, FileNotFoundError) or getattr(cause, "status", None) == 404:
            raise
        raise OSError(str(cause)) from why
    except OSError:
        raise
    except Exception as why:
        raise OSError(one_line(why)) from why
