"""A data set as readers see it: manifest, block table, and blocks that are checked before anybody uses them."""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final

import numpy as np
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from cdssl_dist.data.batch import PackShape, RawPack, collate
from cdssl_dist.data.cache import ShardCache, default_folder
from cdssl_dist.data.plan import BlockTable, Entry, table_of
from cdssl_dist.data.remote import DeniedError, Remote
from cdssl_dist.data.storage import LocalShards, RemoteShards, Storage
from cdssl_dist.data.waiting import Patience
from sharding.block import decode_arrays
from sharding.manifest import BLOCK_SCHEMA, SPLITS, WORK, DataSetError, Manifest, read_manifest
from sharding.sources import SCHEMES
from sharding.sources.streams import is_remote, local_path

CACHE_GB: Final = 50.0
BATCH: Final = 2**20  # blocks


class BadBlockError(DataSetError):
    """Bytes that are not those of the block table."""


class DataSet:
    """An opened data set.

    Args:
        folder: a path, or a URL that fsspec knows (``s3://``, ``gs://``, ``https://``, …). From a URL, manifest and
            block table are read now, and shards when they are needed, into a folder of this node: see ``cache.py``.
        cache_gb: largest size of that folder, 10⁹ bytes; 0 reads block by block over the network.
        patience: how long a remote endpoint is waited for.

    Attributes:
        blocks: columns of the block table, each (blocks,), as narrow as they are stored.

    Raises:
        DataSetError: where the folder is not a data set, a local shard is missing or of the wrong size, or the endpoint
            is dead.
    """

    def __init__(self, folder: str | Path, *, cache_gb: float = CACHE_GB, patience: Patience | None = None) -> None:
        self.folder = folder if is_remote(folder) else local_path(folder)
        self._storage: Storage
        if isinstance(self.folder, str):
            remote = Remote(self.folder, patience)
            self.name = remote.name
            self.manifest, self.blocks = _fetch_tables(remote)
            cache = ShardCache(default_folder(), int(cache_gb * 1e9), patience) if cache_gb else None
            self._storage = RemoteShards(remote, self.manifest.shards, cache)
        else:
            self.name = str(self.folder)
            self.manifest = read_manifest(self.folder)
            self.blocks = _read_blocks(self.folder, self.manifest)
            self._storage = LocalShards(self.folder, self.manifest.shards)
        self.checksums = self.blocks.pop("xxh3")

    def check_cutoff(self, cutoff: float) -> None:
        """Whether its graphs are those that a model with this cutoff, Å, was trained on.

        Raises:
            DataSetError: where they are others.
        """
        if abs(self.manifest.cutoff - cutoff) > 1e-6:
            raise DataSetError(
                f"{self.name}: graphs with a cutoff of {self.manifest.cutoff} Å, the encoder wants {cutoff} Å; shard "
                f"again with --cutoff {cutoff}, or give the database itself"
            )

    @property
    def counts(self) -> dict[str, Any]:
        """Its name, its cutoff and how much is in each split: what a person tells one data set from another by."""
        return {"name": self.name, "cutoff": self.manifest.cutoff, **self.manifest.splits}

    def table(self, split: str) -> BlockTable:
        """The block table of a split.

        Raises:
            DataSetError: where the split holds nothing.
        """
        table = table_of(self.blocks, SPLITS.index(split))
        if len(table) == 0:
            raise DataSetError(f"{self.name}: the split {split!r} is empty; shard with a larger share for it")
        return table

    def shape(self, split: str, blocks_per_pack: int) -> PackShape:
        """The static shape that every pack of a split fits into."""
        mine = self.blocks["split"] == SPLITS.index(split)
        largest = {name: int(self.blocks[name][mine].max()) for name in ("graphs", "atoms", "edges")}
        k = blocks_per_pack
        return PackShape(k * largest["graphs"] + 1, k * largest["atoms"] + 1, k * largest["edges"] // 2)

    def read(self, block: int, stop: threading.Event | None = None) -> bytes:
        """The verified bytes of one block. Those of a remote shard are fetched once more where they are wrong.

        Args:
            block: its number.
            stop: ends the waiting for an endpoint with ``StoppedError``.

        Raises:
            BadBlockError: where they are not what the block table says.
            DataSetError: where the shard is lost, or the endpoint dead.
        """
        shard, offset, size = (int(self.blocks[name][block]) for name in ("shard", "offset", "size"))
        wanted = int(self.checksums[block])
        data = self._storage.read(shard, offset, size, stop)
        if xxhash.xxh3_64_intdigest(data) != wanted and self._storage.distrust(shard):
            data = self._storage.read(shard, offset, size, stop)
        if xxhash.xxh3_64_intdigest(data) != wanted:
            raise BadBlockError(
                f"{self.name}/{self.manifest.shards[shard]['name']}: block {block} at byte {offset} (+{size}) does not "
                "match its checksum; the shard is damaged or belongs to another data set"
            )
        return data

    def fetch(self, shard: int, stop: threading.Event | None = None) -> bool:
        """Load a remote shard into the cache before its blocks are read; raises as ``read`` does.

        Returns:
            False where it is not kept there, since the data set is local, or the cache refuses it.
        """
        return self._storage.fetch(shard, stop)

    def pack(
        self,
        entries: Sequence[Entry],
        table: BlockTable,
        shape: PackShape | None,
        read: Callable[[int], bytes | None] | None = None,
    ) -> RawPack:
        """Read and join the blocks of one pack.

        Args:
            entries: which blocks.
            table: that the entries point into.
            shape: what to pad to.
            read: in place of ``read``; what it returns None for is left out.
        """
        found = [((b := int(table.block[e.index])), e.epoch, (read or self.read)(b)) for e in entries]
        kept = [(block, epoch, data) for block, epoch, data in found if data is not None]
        blocks = [decode_arrays(data) for _, _, data in kept]
        index_dtype = np.dtype(self.manifest.graph["index_dtype"])
        return collate(blocks, [(block, epoch) for block, epoch, _ in kept], shape, index_dtype)

    def open(self, name: str) -> IO[bytes]:
        """A file of the data set other than a shard, to read and to seek in."""
        return self._storage.open(name)

    def close(self) -> None:
        """Close the shards that were read; they are opened again where they are asked for again."""
        self._storage.close()

    def __enter__(self) -> DataSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def no_split(path: str) -> DataSetError:
    """What is said where a part is asked for of something that has none."""
    return DataSetError(f"{path}: not a data set of shards, so there is no split and no condition to choose by")


def is_data_set(path: str) -> bool:
    """Whether there is a manifest below a path or URL, or the work of a sharding that was not finished.

    Raises:
        DataSetError: where the endpoint of a URL is dead.
    """
    if path.split(":", 1)[0] in SCHEMES:
        return False
    if not is_remote(path):
        folder = local_path(path)
        return any((folder / name).exists() for name in ("manifest.json", WORK))
    try:
        return Remote(path).has("manifest.json")
    except DeniedError:  # what S3 says of a file that is not there, to those who may not list
        return False


def _fetch_tables(remote: Remote) -> tuple[Manifest, dict[str, NDArray[Any]]]:
    """Manifest and block table of a remote data set, checked as local ones are."""
    if not remote.has("manifest.json"):
        raise DataSetError(f"{remote.name}: not a data set, manifest.json is missing")
    with tempfile.TemporaryDirectory(prefix="cdssl-") as folder:
        for name in ("manifest.json", "blocks.parquet"):
            Path(folder, name).write_bytes(remote.read(name))
        try:
            manifest = read_manifest(folder)
            return manifest, _read_blocks(Path(folder), manifest)
        except DataSetError as why:
            raise DataSetError(str(why).replace(folder, remote.name)) from None


def _read_blocks(folder: Path, manifest: Manifest) -> dict[str, NDArray[Any]]:
    """The block table, checked against the manifest: column → (blocks,), as narrow as it is stored.

    Column after column, in batches: a table of 2·10⁷ blocks is 0.9 GB, and never in memory twice.
    """
    path = folder / "blocks.parquet"
    try:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != manifest.tables["blocks.parquet"]:
                raise DataSetError(
                    f"{path}: its SHA-256 is not the one in the manifest; it belongs to another data set"
                )
        table = pq.ParquetFile(path)
        found = {}
        for field in BLOCK_SCHEMA:
            values = np.empty(table.metadata.num_rows, field.type.to_pandas_dtype())
            at = 0
            for batch in table.iter_batches(BATCH, columns=[field.name]):
                values[at : at + len(batch)] = batch.column(0).to_numpy()
                at += len(batch)
            found[field.name] = values
        return found
    except OSError as why:
        raise DataSetError(f"{path}: cannot be read ({why.strerror or why})") from None
