"""Read from an object store or a web server, with timeouts and a bounded number of retries.

Everything goes through fsspec, so ``s3://`` needs s3fs to be installed, and ``gs://`` gcsfs.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from cdssl_dist.data.waiting import POLL, Patience, StoppedError, warn
from sharding.manifest import DataSetError
from sharding.sources.streams import redacted

PIECE: Final = 4 * 2**20  # bytes of one request; a slow link must carry FETCHERS of them within ``Patience.request``
FETCHERS: Final = 4  # concurrent requests
PASSING: Final = (408, 425, 429)  # the HTTP 4xx statuses that may pass on a retry
LONG: Final = 2.0  # s; the user is told about pauses of this length or more

CREDENTIALS: Final = ("NoCredentialsError", "DefaultCredentialsError")  # of botocore and Google: no credentials found

T = TypeVar("T")


class MissingError(DataSetError):
    """The endpoint answers, but has no such file."""


class DeniedError(DataSetError):
    """The endpoint answers, but denies access."""


class Remote:
    """The files below a URL.

    Every method takes ``stop``: an event that ends waiting, with ``StoppedError``.

    Raises:
        DataSetError: if no file system is installed for the URL.
    """

    def __init__(self, url: str, patience: Patience | None = None) -> None:
        self.name = redacted(url).rstrip("/")  # for messages
        self.patience = patience or Patience()
        self._system, self._root = _filesystem(url.rstrip("/"))
        self._parts = True  # whether the server supports range requests
        self._told = False

    def size(self, name: str, stop: threading.Event | None = None) -> int:
        """Size of a file, bytes.

        Raises:
            MissingError: if there is none.
            DataSetError: if the endpoint is dead, or refuses.
        """

        def checked(info: dict[str, Any]) -> int:
            if info.get("size") is None:
                raise OSError("the server does not report the size of the file")
            return int(info["size"])

        return self._retried(name, lambda limit: checked(self._answer("info", name, limit, stop)), stop)

    def has(self, name: str, stop: threading.Event | None = None) -> bool:
        """Whether there is such a file."""
        try:
            return self.size(name, stop) >= 0
        except MissingError:
            return False

    def range(self, name: str, begin: int, end: int, stop: threading.Event | None = None) -> bytes:
        """The bytes [begin, end) of a file; raises as ``size`` does."""

        def checked(data: bytes) -> bytes:
            if len(data) > end - begin and len(data) >= end:  # the whole file: the server ignores ranges
                self._parts = False
                data = data[begin:end]
            if len(data) != end - begin:
                raise OSError(f"received {len(data)} of {end - begin} bytes")
            return data

        def request(limit: float) -> bytes:
            return checked(self._answer("cat_file", name, limit, stop, start=begin, end=end))

        return self._retried(name, request, stop) if end > begin else b""

    def read(self, name: str, stop: threading.Event | None = None) -> bytes:
        """A whole file; raises as ``size`` does."""
        size = self.size(name, stop)
        data = bytearray(size)

        def keep(begin: int, piece: bytes) -> None:
            data[begin : begin + len(piece)] = piece

        self._in_pieces(name, size, keep, stop)
        return bytes(data)

    def download(self, name: str, size: int, descriptor: int, stop: threading.Event | None = None) -> None:
        """Write a whole file of a known size to an open local one.

        Raises:
            DataSetError: as ``size`` does.
            OSError: if it cannot be written.
        """

        def keep(begin: int, piece: bytes) -> None:
            if os.pwrite(descriptor, piece, begin) != len(piece):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        self._in_pieces(name, size, keep, stop)

    def _in_pieces(
        self, name: str, size: int, keep: Callable[[int, bytes], None], stop: threading.Event | None
    ) -> None:
        begin = min(PIECE, size)
        keep(0, self.range(name, 0, begin, stop))  # alone: it shows whether ranges are supported

        def fetch(begin: int) -> None:
            keep(begin, self.range(name, begin, min(begin + step, size), stop))

        step = PIECE if self._parts else max(size, 1)
        with concurrent.futures.ThreadPoolExecutor(FETCHERS, "cdssl-fetch") as pool:
            try:
                for _ in pool.map(fetch, range(begin, size, step)):
                    pass
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _retried(self, name: str, request: Callable[[float], T], stop: threading.Event | None) -> T:
        """Return the result of ``request(timeout)``, retried until patience runs out."""
        patience = self.patience
        begin, pause, tries, text = patience.clock(), patience.first_pause, 0, ""
        while True:
            left = begin + patience.give_up - patience.clock()
            limit = min(patience.request if self._parts else patience.give_up, max(left, POLL))
            try:
                tries += 1
                return request(limit)
            except StoppedError:
                raise
            except Exception as error:  # each kind of storage has errors of its own
                why = _behind(error)
                if not text or limit >= patience.request:  # ignore a last try cut short
                    text = f"{type(why).__name__}: {why}"
                if _missing(why):
                    raise MissingError(f"{self.name}/{name}: there is no such file") from None
                if _lasting(why):
                    raise DeniedError(f"{self.name}/{name}: access denied ({text}); check the credentials") from None
            wait = patience.uniform(pause / 2, pause)
            if patience.clock() + wait >= begin + patience.give_up:
                raise DataSetError(
                    f"{self.name}/{name}: not available after {patience.give_up:g} s and {tries} tries, the last: "
                    f"{text}; are the endpoint and the network up?"
                )
            if wait >= LONG and not self._told:
                self._told = True
                warn(f"{self.name}/{name}: {text}; trying again for {patience.give_up:g} s")
            patience.pause(wait, stop)
            pause = min(2 * pause, patience.longest_pause)

    def _answer(self, method: str, name: str, limit: float, stop: threading.Event | None, **more: Any) -> Any:
        """Make one call to the file system, with a timeout of ``limit`` seconds."""
        path = f"{self._root}/{name}"
        if not self._system.async_impl:  # memory, local: they do not hang
            return getattr(self._system, method)(path, **more)
        call = getattr(self._system, "_" + method)(path, **more)
        future = asyncio.run_coroutine_threadsafe(call, self._system.loop)
        end = time.monotonic() + limit
        try:
            while not concurrent.futures.wait([future], POLL).done:
                if stop is not None and stop.is_set():
                    raise StoppedError
                if time.monotonic() > end:
                    raise TimeoutError(f"no complete answer within {limit:g} s")
            return future.result()
        finally:
            future.cancel()


def _filesystem(url: str) -> tuple[Any, str]:
    """Create an fsspec file system for a URL; return it, and the path in it."""
    import fsspec

    # compression would change byte offsets
    options = {"headers": {"Accept-Encoding": "identity"}} if url.startswith("http") else {}
    try:
        return fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)
    except (ImportError, ValueError) as why:  # fsspec's ImportError names the package to install
        raise DataSetError(f"{redacted(url)}: {why}") from None


def _status(error: BaseException) -> int | None:
    """The HTTP status of a file system's error, where it has one."""
    found = getattr(error, "status", None) or getattr(error, "code", None)
    return found if isinstance(found, int) else None


def _behind(error: Exception) -> BaseException:
    """Return the underlying error, since fsspec's ``info`` over HTTP reports any error as a missing file."""
    cause = error.__cause__
    http = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
    return cause if cause is not None and http and isinstance(error, FileNotFoundError) else error


def _missing(error: BaseException) -> bool:
    return isinstance(error, FileNotFoundError) or _status(error) == 404


def _lasting(error: BaseException) -> bool:
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in PASSING
    return isinstance(error, PermissionError) or type(error).__name__ in CREDENTIALS
