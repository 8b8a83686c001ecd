"""Where a data set goes: a folder, or behind a URL, where nothing can be renamed and the manifest is the commit.

For a URL the data set is made in a folder of this machine, which a rerun finds again, and then uploaded: the shards,
the tables, and the manifest as the last object. What was uploaded before a crash is not uploaded again.
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
UPLOADS: Final = 8  # at a time
UNWRITABLE: Final = {  # what is wrong with a folder, and not with what is read
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EEXIST", "EIO", "ESTALE")
}


class TargetError(OSError):
    """The data set cannot be written where it should go."""


class Folder:
    """A data set in a folder; it is made in place.

    Attributes:
        folder: where it is made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self) -> None:
        """Nothing to ask: the folder itself says whether it is taken."""

    def publish(self, manifest: Manifest) -> None:
        """It is where it should be."""

    def remove(self) -> None:
        """Nothing is left over."""


class Remote:
    """A data set behind a URL.

    Args:
        url: of what fsspec knows: ``s3://bucket/prefix``, ``gs://…``, ``memory://…``.
        work: a folder to make it in; CDSSL_CACHE or ``~/.cache/cdssl`` where left out. Workers of a cluster write into
            it, so it must then be on storage that all of them see.

    Raises:
        SourceError: where fsspec lacks a package for the URL.
    """

    def __init__(self, url: str, work: Path | None = None) -> None:
        self.url = redacted(url.rstrip("/"))
        self._system, self._path = filesystem(url.rstrip("/"))
        root = work or Path(os.environ.get("CDSSL_CACHE") or Path.home() / ".cache" / "cdssl")
        self.folder = root / "unfinished" / f"{base_name(url)}-{hashlib.sha256(self.url.encode()).hexdigest()[:12]}"

    def check(self) -> None:
        """Look before hours of work.

        Raises:
            DataSetError: where a data set is there already.
            TargetError: where the place cannot be reached.
        """
        if (self.folder / MANIFEST).exists():
            if (self.folder / WORK).exists():
                return  # made, but perhaps not published: ``publish`` compares
            self.remove()  # published
        with self._told("reached"):
            taken = self._system.exists(f"{self._path}/{MANIFEST}")
        if taken:
            raise self._taken()

    def publish(self, manifest: Manifest) -> None:
        """Upload what the manifest names, and then the manifest, which must not be there yet.

        Raises:
            DataSetError: where another run has published a data set there meanwhile.
            TargetError: where something cannot be written; a rerun goes on.
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
                raise TargetError(f"{self.url}: {lost[0]} was uploaded and is not there; run the same command again")
            if not self._committed(content):
                with contextlib.suppress(FileExistsError):  # by another run, just now: told apart by its content
                    self._system.pipe_file(f"{self._path}/{MANIFEST}", content, mode="create")
                self._committed(content)

    def remove(self) -> None:
        """What was made here is there now."""
        shutil.rmtree(self.folder)

    def _committed(self, content: bytes) -> bool:
        """Whether the manifest is there; another one is an error."""
        self._system.invalidate_cache()
        try:
            found = self._system.cat_file(f"{self._path}/{MANIFEST}")
        except FileNotFoundError:
            return False
        if found != content:
            raise self._taken()
        return True

    def _missing(self, sizes: dict[str, int]) -> list[str]:
        """The files that are not there, whole and uploaded by us."""
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
        """Exists once a file of this data set was uploaded; one of the same size may be another's."""
        return self.folder / WORK / "uploaded" / name

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Each kind of remote storage has errors of its own."""
        try:
            yield
        except (DataSetError, TargetError):
            raise
        except Exception as why:
            text = one_line(why)
            raise TargetError(f"{self.url}: cannot be {what} ({text}); run the same command again to go on") from why

    def _taken(self) -> DataSetError:
        return DataSetError(f"{self.url}: holds a data set already; give another place or remove it")


def target_of(out: str | Path, work: str | Path | None = None) -> Folder | Remote:
    """The target that a user names.

    Raises:
        DataSetError: where ``work`` is given for a folder, which needs none.
        SourceError: where fsspec lacks a package for the URL.
    """
    if is_remote(out):
        return Remote(str(out), Path(work) if work else None)
    if work:
        raise DataSetError(f"{out}: a data set in a folder is made in place; --work is for one behind a URL")
    return Folder(local_path(out))


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Any]:
    """What goes wrong with the folder, in one line that says what to do.

    Raises:
        TargetError: instead of the operating system's error.
    """
    try:
        yield
    except OSError as why:
        if isinstance(why, TargetError) or why.errno not in UNWRITABLE:
            raise
        text = f"{folder}: cannot be written ({why.strerror}); mend that and run the same command again to go on"
        raise TargetError(text) from why
