"""Copies of the newest checkpoints on shared storage, made during training and fetched if none is left locally.

Training only hands over a folder and goes on. If checkpoints are committed while a copy is under way, only the newest
of them is copied next. A copy, too, is committed by its marker, which is uploaded last. A dead endpoint costs the
copy, which is reported in the events, but never the run.
"""

from __future__ import annotations

import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from cdssl_dist.train.checkpoint import MARKER, CheckpointError, committed, cursor_of, verified
from cdssl_dist.train.ledger import Ledger
from sharding.commands import one_line
from sharding.manifest import DataSetError
from sharding.sources.streams import folder_system, redacted

RUN_FILES: Final = ("guard-ledger.json", "metrics.jsonl", "events.jsonl")  # uploaded before the marker
KEEP: Final = 2  # number of copies


class Mirror:
    """Copies checkpoints of a run in a thread of rank 0.

    Args:
        url: where to copy; each run needs its own place.
        run: the run folder.
        tell: called from the thread with what went wrong, or with what was copied.
    """

    def __init__(self, url: str, run: Path, tell: Callable[[str, str], None]) -> None:
        self.run, self._tell = run, tell
        self._system, self._root = folder_system(url)
        self.name = redacted(url)
        shutil.rmtree(run / "mirror", ignore_errors=True)  # left by a process that was killed while copying
        self._next: Path | None = None
        self._changed = threading.Condition()
        self._closed = self._busy = False
        self._thread = threading.Thread(target=self._work, name="cdssl-mirror", daemon=True)
        self._thread.start()

    def copy(self, folder: Path) -> None:
        """Queue a committed checkpoint for copying; return at once."""
        staged = self.run / "mirror" / folder.name
        with self._changed:
            if self._next is not None:
                shutil.rmtree(self._next, ignore_errors=True)
            shutil.copytree(folder, staged, copy_function=_link, dirs_exist_ok=True)  # retention cannot take these away
            self._next = staged
            self._changed.notify_all()

    def close(self, wait: float) -> bool:
        """Wait at most ``wait`` seconds for pending copies; return whether they are done."""
        deadline = time.monotonic() + wait
        with self._changed:
            while (self._next is not None or self._busy) and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            done = self._next is None and not self._busy
            self._closed = True
            self._changed.notify_all()
        return done

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next is not None)
                if self._closed:
                    return
                folder, self._next, self._busy = self._next, None, True
            assert folder is not None
            try:
                begin = time.monotonic()
                if folder.name in _found(self._system, self._root):  # a resumed run hands over what it starts from
                    continue
                self._upload(folder)
                self._say("copied", f"{folder.name} to {self.name} in {time.monotonic() - begin:.1f} s")
            except Exception as why:  # each kind of storage has errors of its own, and none may end the run
                self._say("not copied", f"{folder.name} to {self.name}: {one_line(why)}")
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _say(self, kind: str, what: str) -> None:
        if not self._closed:  # after that the log of the run is closed, too
            self._tell(kind, what)

    def _upload(self, folder: Path) -> None:
        there = f"{self._root}/{folder.name}"
        self._system.makedirs(there, exist_ok=True)
        for path in sorted(folder.iterdir()):
            if path.name != MARKER:
                self._system.put_file(str(path), f"{there}/{path.name}")
        for name in RUN_FILES:
            if (self.run / name).exists():
                self._system.pipe_file(f"{self._root}/{name}", (self.run / name).read_bytes())
        self._system.pipe_file(f"{there}/{MARKER}", (folder / MARKER).read_bytes())
        for name in _found(self._system, self._root)[:-KEEP]:
            self._system.rm(f"{self._root}/{name}/{MARKER}")
            self._system.rm(f"{self._root}/{name}", recursive=True)


def restore(url: str, run: Path) -> str | None:
    """Fetch the copies that no roll-back discarded, if the run folder has no committed checkpoint.

    The run resumes from the newest; the guard may want to go back to the one before.

    Returns:
        The name of the newest, or None if nothing was fetched.

    Raises:
        DataSetError: if the endpoint cannot be read, or the copy is damaged: the run must not start over silently.
    """
    checkpoints = run / "checkpoints"
    if committed(checkpoints):
        return None
    system, root = folder_system(url)
    temporary = run / f"restore.{uuid.uuid4().hex[:8]}.tmp"  # where nobody looks for checkpoints
    try:
        temporary.mkdir(parents=True)
        names = _found(system, root)
        if not names:
            return None
        for name in RUN_FILES:
            if system.exists(f"{root}/{name}"):
                (temporary / name).write_bytes(system.cat_file(f"{root}/{name}"))
        ledger = Ledger.read(run if (run / RUN_FILES[0]).exists() else temporary)
        good = [name for name in names if not ledger.discarded(cursor_of(name))]
        if not good:
            raise DataSetError(f"roll-backs passed over all of {', '.join(names)}")
        fetched: list[Path] = []
        for name in reversed(good):
            folder = temporary / name
            folder.mkdir()
            for path in system.ls(f"{root}/{name}", detail=False):
                (folder / path.rsplit("/", 1)[-1]).write_bytes(system.cat_file(path))
            try:
                verified(folder)
                fetched.append(folder)
            except CheckpointError as why:
                if fetched:
                    continue
                there = f"{redacted(url)}/{name}"
                raise DataSetError(f"{there}: damaged ({why}); remove it there to resume from the one before") from None
        for name in RUN_FILES:  # only now that the checkpoint is complete
            if (temporary / name).exists() and not (run / name).exists():
                (temporary / name).rename(run / name)
        checkpoints.mkdir(exist_ok=True)
        for folder in fetched:  # the newest first: if this is interrupted, the run must not resume from another
            folder.rename(checkpoints / folder.name)
        return good[-1]
    except DataSetError:
        raise
    except Exception as why:
        text = one_line(why)
        raise DataSetError(
            f"{redacted(url)}: the copy of the checkpoints cannot be read ({text}); run the same command again, or "
            "without checkpoint.mirror to start over"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _found(system: Any, root: str) -> list[str]:
    """Names of the committed copies, oldest first."""
    system.invalidate_cache()
    if not system.exists(root):
        return []
    names = [path.rsplit("/", 1)[-1] for path in system.ls(root, detail=False)]
    return sorted(n for n in names if n.startswith("step-") and system.exists(f"{root}/{n}/{MARKER}"))


def _link(source: str, target: str) -> None:
    """Create a hard link, which copies nothing; or a copy, if the file system has no hard links."""
    Path(target).unlink(missing_ok=True)
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)
