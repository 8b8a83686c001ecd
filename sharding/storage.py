"""Where a data set is written: a folder, or a URL, where nothing can be renamed and the manifest acts as the commit.

For a URL, the data set is built in a local folder, which a rerun finds again, and then uploaded: shards and tables
first, the manifest last. What was uploaded before a crash is not uploaded again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from sharding.commands import one_line
from sharding.manifest import WORK, DataSetError, Manifest
from sharding.progress import Progress
from sharding.sources.streams import base_name, filesystem, is_remote, local_path, redacted

MANIFEST: Final = "manifest.json"
UPLOADS: Final = 8  # concurrent uploads
UNWRITABLE: Final = {  # errors of the output folder, not of the input
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EEXIST", "EIO", "ESTALE")
}


class TargetError(OSError):
    """The data set cannot be written where it should go."""


class Folder:
    """A data set that is written in place, in a folder.

    Attributes:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self) -> None:
        """Do nothing: ``Workspace`` checks whether the folder is taken."""

    def publish(self, manifest: Manifest) -> None:
        """Do nothing: the data set is already in place."""

    def remove(self) -> None:
        """Do nothing: there is no local copy to remove."""


class Remote:
    """A data set that is uploaded to a URL.

    Args:
        url: an fsspec URL: ``s3://bucket/prefix``, ``gs://…``, ``memory://…``.
        work: the folder to build it in; by default under CDSSL_CACHE or ``~/.cache/cdssl``. The workers of a cluster
            write into it, so on a cluster it must be on shared storage.

    Raises:
        SourceError: where fsspec lacks a package for the URL.
    """

    def __init__(self, url: str, work: Path | None = None) -> None:
        self.url = redacted(url.rstrip("/"))
        self._system, self._path = filesystem(url.rstrip("/"))
        root = work or Path(os.environ.get("CDSSL_CACHE") or Path.home() / ".cache" / "cdssl")
        self.folder = root / "unfinished" / f"{base_name(url)}-{hashlib.sha256(self.url.encode()).hexdigest()[:12]}"

    def check(self) -> None:
        """Check the URL before hours of work.

        Raises:
            DataSetError: if the URL already holds a data set.
            TargetError: if the URL cannot be reached.
        """
        if (self.folder / MANIFEST).exists():
            if (self.folder / WORK).exists():
                return  # built, but perhaps not published: ``publish`` compares
            self.remove()  # published
        with self._told("reached"):
            taken = self._system.exists(f"{self._path}/{MANIFEST}")
        if taken:
            raise self._taken()

    def publish(self, manifest: Manifest) -> None:
        """Upload what the manifest names, and then the manifest, which must not be there yet.

        Raises:
            DataSetError: if another run has published a data set there in the meantime.
            TargetError: if something cannot be written; a rerun continues.
        """
        content = (self.folder / MANIFEST).read_bytes()
        sizes = {name: (self.folder / name).stat().st_size for name in manifest.tables}
        sizes |= {shard["name"]: shard["size"] for shard in manifest.shards}
        with self._told("written"):
            if self._committed(content):
                return
            missing = self._missing(sizes)
            with Progress("upload", "files", len(missing)) as progress, ThreadPoolExecutor(UPLOADS) as pool:
                for _ in pool.map(self._upload, missing):
                    progress.add()
            if lost := self._missing(sizes):
                raise TargetError(f"{self.url}: {lost[0]} was uploaded but is missing; run the same command again")
            if not self._committed(content):
                with contextlib.suppress(FileExistsError):  # another run was first: its content is compared next
                    self._system.pipe_file(f"{self._path}/{MANIFEST}", content, mode="create")
                self._committed(content)

    def remove(self) -> None:
        """Remove the local copy, now that it is published."""
        shutil.rmtree(self.folder)

    def _committed(self, content: bytes) -> bool:
        """Whether our manifest is at the URL; a different one is an error."""
        self._system.invalidate_cache()
        try:
            found = self._system.cat_file(f"{self._path}/{MANIFEST}")
        except FileNotFoundError:
            return False
        if found != content:
            raise self._taken()
        return True

    def _missing(self, sizes: dict[str, int]) -> list[str]:
        """The files that are yet to be uploaded: absent, of another size, or not marked as uploaded by us."""
        self._system.invalidate_cache()
        there = {
            path[len(self._path.rstrip("/")) + 1 :]: info["size"]
            for path, info in self._system.find(self._path, detail=True).items()
        }
        return [name for name, size in sizes.items() if there.get(name) != size or not self._mark(name).exists()]

    def _upload(self, name: str) -> None:
        self._system.put_file(str(self.folder / name), f"{self._path}/{name}")
        self._mark(name).parent.mkdir(parents=True, exist_ok=True)
        self._mark(name).touch()

    def _mark(self, name: str) -> Path:
        """A marker file: we have uploaded this file. One of the same size at the URL could be from another data set."""
        return self.folder / WORK / "uploaded" / name

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Convert the errors of remote storage, which have types of their own, to TargetError."""
        try:
            yield
        except (DataSetError, TargetError):
            raise
        except Exception as why:
            text = one_line(why)
            raise TargetError(f"{self.url}: cannot be {what} ({text}); run the same command again to continue") from why

    def _taken(self) -> DataSetError:
        return DataSetError(f"{self.url}: holds a data set already; give another URL or remove it")


def target_of(out: str | Path, work: str | Path | None = None) -> Folder | Remote:
    """Return the target that a path or URL names.

    Raises:
        DataSetError: if ``work`` is given for a folder, which needs none.
        SourceError: where fsspec lacks a package for the URL.
    """
    if is_remote(out):
        return Remote(str(out), Path(work) if work else None)
    if work:
        raise DataSetError(f"{out}: a data set in a folder is built in place; --work is only for URLs")
    return Folder(local_path(out))


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Any]:
    """Convert errors of the output folder to one line that says what to do.

    Raises:
        TargetError: instead of the operating system's error.
    """
    try:
        yield
    except OSError as why:
        if isinstance(why, TargetError) or why.errno not in UNWRITABLE:
            raise
        text = f"{folder}: cannot be written ({why.strerror}); fix that and run the same command again to continue"
        raise TargetError(text) from why
