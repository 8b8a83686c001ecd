"""The manifest of a data set, and the table of its blocks: all that a reader needs to know.

``manifest.json`` is written last. A folder without one is not a data set.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from sharding.block import Budget

FORMAT: Final = "cdssl-shards"
VERSION: Final = 1
SPLITS: Final = ("train", "val", "test")
WORK: Final = ".work"  # subfolder of a data set for unfinished work

BLOCK_SCHEMA: Final = pa.schema(
    [
        ("block", pa.uint32()),  # number, unique in the data set; names the member and keys the noise
        ("shard", pa.uint32()),  # index into the manifest's shards
        ("offset", pa.uint64()),  # of the block's bytes in the shard
        ("size", pa.uint32()),  # bytes
        ("split", pa.uint8()),  # index into SPLITS
        ("graphs", pa.uint32()),
        ("atoms", pa.uint32()),
        ("edges", pa.uint32()),  # directed
        ("scored_edges", pa.uint32()),  # directed, between different atoms
        ("xxh3", pa.uint64()),  # of the block's bytes
    ]
)


class DataSetError(ValueError):
    """Not a usable data set: missing, damaged, unfinished or already there. The message is one line."""


@dataclass(frozen=True)
class Manifest:
    """The description of a data set; see ``docs/format.md``."""

    graph: dict[str, Any]  # cutoff and tie tolerance, Å; index dtype
    budget: Budget
    seed: int
    splits: dict[str, dict[str, int]]  # split → blocks, graphs, atoms, edges, scored_edges
    sources: list[dict[str, str]]  # name, licence, cite
    labels: dict[str, dict[str, str]]  # label → unit, column
    quarantined: dict[str, int]  # reason code → count
    shards: list[dict[str, Any]]  # name, size, sha256
    tables: dict[str, str]  # file → sha256
    format: str = FORMAT
    version: int = VERSION
    digest: str = field(default="")

    @property
    def cutoff(self) -> float:
        """Å."""
        return float(self.graph["cutoff"])

    def compute_digest(self) -> str:
        """SHA-256 of everything that defines the data; it does not depend on time, host, path or worker count."""
        return _digest(asdict(self))

    def write(self, folder: Path) -> Manifest:
        """Write ``manifest.json``, synced and renamed into place; returns the manifest with its digest."""
        content = asdict(self) | {"digest": self.compute_digest()}
        write_atomically(folder / "manifest.json", json.dumps(content, indent=1, sort_keys=True).encode())
        return read_manifest(folder)


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary name, sync, rename: a reader sees all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _digest(content: dict[str, Any]) -> str:
    """The digest of a manifest's content, ignoring its field ``digest``."""
    rest = {k: v for k, v in content.items() if k != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check ``manifest.json``.

    Raises:
        DataSetError: if there is none, it has a newer version, or its digest is wrong.
    """
    path = Path(folder) / "manifest.json"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        hint = "the sharding was not finished" if Path(folder).is_dir() else "there is no such folder"
        raise DataSetError(f"{folder}: not a data set, manifest.json is missing ({hint})") from None
    except (ValueError, OSError) as why:
        raise DataSetError(f"{path}: unreadable manifest ({why})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataSetError(f"{path}: not the manifest of a {FORMAT} data set")
    version = content.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise DataSetError(f"{path}: format version {version}; this program reads up to {VERSION}: update it")
    if content.get("digest") != _digest(content):
        raise DataSetError(f"{path}: the digest does not match the content; the manifest was edited or damaged")
    content["budget"] = Budget(**content["budget"])
    return Manifest(**content)
