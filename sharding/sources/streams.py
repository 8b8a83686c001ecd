"""Forward-only streams of bytes from a path or a URL, decompressed by extension, with one error for all damage."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import posixpath
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import unquote, urlsplit

from sharding.sources import COMPRESSIONS, SourceError

CHUNK: Final = 2**20  # bytes; what a reader asks for at once


class DamagedError(Exception):
    """The data is truncated or corrupt."""


class TooLargeError(Exception):
    """One record is larger than ``ReadOptions.max_record_bytes``."""


class Stream:
    """Bytes that can only be read forward, in constant memory."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        """Wrap ``read(n)``, which returns 1 to n bytes, and none at the end."""
        self._read = read
        self._damage: DamagedError | None = None

    def read(self, n: int = CHUNK) -> bytes:
        """At least one and at most n bytes; none at the end.

        Raises:
            DamagedError: if the file or a compressed stream is truncated or corrupt; again at every later call.
        """
        if self._damage is not None:
            raise self._damage
        try:
            return self._read(n)
        except DamagedError as why:
            self._damage = why
        except (EOFError, OSError, lzma.LZMAError, zlib.error) as why:  # pyarrow's errors are OSErrors here
            self._damage = DamagedError(str(why) or type(why).__name__)
        raise self._damage

    def exactly(self, n: int) -> bytes:
        """Read n bytes, or fewer where the end or damage follows; damage is raised by the next call."""
        parts: list[bytes] = []
        try:
            while n > 0 and (part := self.read(min(n, CHUNK))):
                parts.append(part)
                n -= len(part)
        except DamagedError:
            if not parts:
                raise
        return b"".join(parts)

    def whole(self, limit: int) -> bytes:
        """Everything up to the end.

        Raises:
            TooLargeError: if that is more than ``limit`` bytes; no more than that is held in memory.
            DamagedError: if the end was not reached.
        """
        text = self.exactly(limit + 1)
        if len(text) > limit:
            raise TooLargeError(f"is larger than {limit:,} bytes")
        self.read(1)
        return text

    def skip(self) -> None:
        """Read to the end and forget it."""
        while self.read():
            pass

    def part(self, size: int) -> Stream:
        """The next ``size`` bytes as a stream of their own, to be read before this one goes on.

        Reading beyond what is there raises ``DamagedError``.
        """
        left = size

        def read(n: int) -> bytes:
            nonlocal left
            text = self.read(min(n, left)) if left else b""
            if left and not text:
                raise DamagedError(f"ends {left:,} bytes early")
            left -= len(text)
            return text

        return Stream(read)


def decompressed(stream: Stream, path: str) -> Stream:
    """Decompress a stream by the extension of its path; return it unchanged if that names no compression."""
    ending = os.path.splitext(path.lower())[1]
    # read1, not read: it returns the data before the damage, and only then raises
    if ending in (".gz", ".tgz"):
        return Stream(gzip.GzipFile(fileobj=cast(Any, stream), mode="rb").read1)
    if ending in (".bz2", ".tbz2"):
        return Stream(bz2.BZ2File(cast(Any, stream)).read1)
    if ending in (".xz", ".txz"):
        return Stream(lzma.LZMAFile(cast(Any, stream)).read1)
    if ending == ".zst":
        import pyarrow as pa

        unpacked = pa.CompressedInputStream(pa.PythonFile(_File(stream), mode="r"), "zstd")
        # small reads: an error loses the whole read in which it happens
        return Stream(lambda n: unpacked.read(min(n, 2**13)))
    return stream


class _File:
    """What pyarrow asks of a file object."""

    closed = False

    def __init__(self, stream: Stream) -> None:
        self.read = stream.read

    def close(self) -> None:
        """The owner closes the file."""


def stream_of(file: Any, spec: str) -> Stream:
    """The bytes of an open file.

    A disk or a network that fails is not a damaged file: it raises ``SourceError``, so that the source is not taken to
    end there.
    """

    def read(n: int) -> bytes:
        try:
            return file.read(n)
        except Exception as why:  # each kind of remote storage has errors of its own
            raise SourceError(f"{redacted(spec)}: reading broke off ({type(why).__name__}: {why}); run again") from None

    return Stream(read)


@contextlib.contextmanager
def opened(spec: str, *, forward: bool = False) -> Iterator[Any]:
    """Open a path or a URL as a binary file.

    Args:
        spec: the path or URL.
        forward: the file will only be read from front to back; otherwise it must be seekable.

    Raises:
        SourceError: if it cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        try:
            if "://" in spec:
                system, path = filesystem(spec)
                # in one request: many web servers do not support range requests
                whole = {"block_size": 0} if forward and spec.startswith("http") else {}
                file = stack.enter_context(system.open(path, "rb", **whole))
            else:
                if not stat.S_ISREG(os.stat(spec).st_mode):  # asked first: opening a pipe would wait for its writer
                    raise SourceError(f"{spec}: not a regular file")
                file = stack.enter_context(open(spec, "rb"))
        except OSError as why:
            raise SourceError(f"{redacted(spec)}: cannot be opened ({type(why).__name__})") from None
        yield file


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it."""
    import fsspec

    try:
        options = {}
        if url.startswith("http"):
            import aiohttp

            # the default timeout ends any download after five minutes
            options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}}
        return fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as why:  # fsspec's ImportError names the package to install
        raise SourceError(f"{redacted(url)}: {why}") from None


def is_remote(path: object) -> bool:
    """Whether a path is a URL of something that is not a local file."""
    return isinstance(path, str) and "://" in path and not path.startswith("file://")


def local_path(path: str | Path) -> Path:
    """The path of something local, which ``file://`` may name."""
    text = str(path)
    return Path(unquote(urlsplit(text).path)) if text.startswith("file://") else Path(path)


def folder_system(place: str) -> tuple[Any, str]:
    """The fsspec file system of a folder, whether a path or a URL names it, and the path in it."""
    system, root = filesystem(place.rstrip("/") if is_remote(place) else f"file://{local_path(place).resolve()}")
    return system, root.rstrip("/")


def redacted(spec: str) -> str:
    """A path or URL without user, password and query, which may hold secrets."""
    if "://" not in spec:
        return spec
    url = urlsplit(spec)
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"


def base_name(spec: str) -> str:
    """The last part of a path or URL: how the manifest names the source."""
    path = urlsplit(spec).path or urlsplit(spec).netloc if "://" in spec else spec.replace(os.sep, "/")
    return posixpath.basename(path.rstrip("/")) or "."


def uncompressed_name(path: str) -> str:
    """The path without the ending of a compression."""
    root, ending = os.path.splitext(path)
    return root if ending.lower() in COMPRESSIONS else path
