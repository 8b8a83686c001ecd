"""A data set as readers see it: manifest, block table, and blocks that are verified before use."""

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
    """The bytes of a block do not match the checksum in the block table."""


class DataSet:
    """An opened data set.

    Args:
        folder: a path, or a URL that fsspec supports (``s3://``, ``gs://``, ``https://``, …). From a URL, manifest and
            block table are read now, and shards when they are needed, into a cache on this node: see ``cache.py``.
        cache_gb: maximum size of that cache, 10⁹ bytes; 0 reads block by block over the network.
        patience: how long to wait for a remote endpoint.

    Attributes:
        blocks: columns of the block table, each (blocks,), in the types they are stored in.

    Raises:
        DataSetError: if the folder is not a data set, a local shard is missing or of the wrong size, or the endpoint
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
        """Check that the graphs were built with a given cutoff, Å, that of a model.

        Raises:
            DataSetError: if they were built with another one.
        """
        if abs(self.manifest.cutoff - cutoff) > 1e-6:
            raise DataSetError(
                f"{self.name}: its graphs have a cutoff of {self.manifest.cutoff} Å, the encoder needs {cutoff} Å; "
                f"shard again with --cutoff {cutoff}, or give the database itself"
            )

    @property
    def counts(self) -> dict[str, Any]:
        """Name, cutoff and counts of each split, by which people can tell data sets apart."""
        return {"name": self.name, "cutoff": self.manifest.cutoff, **self.manifest.splits}

    def table(self, split: str) -> BlockTable:
        """The block table of a split.

        Raises:
            DataSetError: if the split is empty.
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
        """Read and verify the bytes of one block; wrong bytes of a remote shard are fetched once more.

        Args:
            block: its number.
            stop: ends waiting for an endpoint, with ``StoppedError``.

        Raises:
            BadBlockError: if they do not match the block table.
            DataSetError: if the shard is lost, or the endpoint is dead.
        """
        shard, offset, size = (int(self.blocks[name][block]) for name in ("shard", "offset", "size"))
        wanted = int(self.checksums[block])
        data = self._storage.read(shard, offset, size, stop)
        if xxhash.xxh3_64_intdigest(data) != wanted and self._storage.report_corrupt(shard):
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
            False if it is not cached, because the data set is local or the cache refuses it.
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
            entries: the blocks, as entries of ``table``.
            table: the block table of the split.
            shape: shape to pad to; see ``collate``.
            read: used instead of ``self.read``; blocks for which it returns None are left out.
        """
        found = [((b := int(table.block[e.index])), e.epoch, (read or self.read)(b)) for e in entries]
        kept = [(block, epoch, data) for block, epoch, data in found if data is not None]
        blocks = [decode_arrays(data) for _, _, data in kept]
        index_dtype = np.dtype(self.manifest.graph["index_dtype"])
        return collate(blocks, [(block, epoch) for block, epoch, _ in kept], shape, index_dtype)

    def open(self, name: str) -> IO[bytes]:
        """Open a file of the data set other than a shard, for reading and seeking."""
        return self._storage.open(name)

    def close(self) -> None:
        """Close the open shards; reading opens them again."""
        self._storage.close()

    def __enter__(self) -> DataSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def no_split(path: str) -> DataSetError:
    """The error for a split or condition on something that is not a data set of shards."""
    return DataSetError(f"{path}: not a data set of shards, so crystals cannot be chosen by split or condition")


def is_data_set(path: str) -> bool:
    """Whether a path or URL holds a manifest, or the work of an unfinished sharding.

    Raises:
        DataSetError: if the endpoint of a URL is dead.
    """
    if path.split(":", 1)[0] in SCHEMES:
        return False
    if not is_remote(path):
        folder = local_path(path)
        return any((folder / name).exists() for name in ("manifest.json", WORK))
    try:
        return Remote(path).has("manifest.json")
    except DeniedError:  # S3's answer for a missing file, to those who may not list the bucket
        return False


def _fetch_tables(remote: Remote) -> tuple[Manifest, dict[str, NDArray[Any]]]:
    """Fetch the manifest and block table of a remote data set, and check them like local ones."""
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
    """Read the block table and check it against the manifest: column → (blocks,), in the type it is stored in.

    Reads column by column, in batches, so that a table of 2·10⁷ blocks (0.9 GB) is never in memory twice.
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
