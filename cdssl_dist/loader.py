"""Shards → packs, in the order of the plan, read ahead in a thread.

Every block is checked against its checksum before it is used. What goes wrong is raised in the loop that asks for the
next pack, never swallowed in the thread.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import pyarrow as pa
import xxhash

from cdssl_dist.batch import PackShape, RawPack, collate
from cdssl_dist.plan import BlockTable, Entry, EpochPlan, table_of
from sharding.block import decode_arrays
from sharding.manifest import SPLITS, DataSetError, Manifest, read_blocks, read_manifest


class DataSet:
    """An opened data set: manifest, block table, and verified reads of blocks.

    Raises:
        DataSetError: where the folder is not a data set, or a shard is missing or of the wrong size.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = read_manifest(folder)
        table = read_blocks(folder, self.manifest)
        self.blocks = {name: np.asarray(table[name]).astype(np.int64) for name in table.column_names if name != "xxh3"}
        self.checksums = np.asarray(table["xxh3"])
        self._table: pa.Table = table
        self._files: dict[int, int] = {}  # shard → file descriptor
        self._lock = threading.Lock()
        for shard in self.manifest.shards:
            path = self.folder / shard["name"]
            if not path.exists():
                raise DataSetError(f"{path}: the shard is missing; copy it again from where the data set was made")
            if path.stat().st_size != shard["size"]:
                raise DataSetError(
                    f"{path}: {path.stat().st_size} bytes, {shard['size']} expected; the shard is damaged"
                )

    def table(self, split: str) -> BlockTable:
        """The block table of a split.

        Raises:
            DataSetError: where the split holds nothing.
        """
        table = table_of(self._table, SPLITS.index(split))
        if len(table) == 0:
            raise DataSetError(f"{self.folder}: the split {split!r} is empty; shard with a larger share for it")
        return table

    def shape(self, split: str, blocks_per_pack: int) -> PackShape:
        """The static shape that every pack of a split fits into."""
        mine = self.blocks["split"] == SPLITS.index(split)
        largest = {name: int(self.blocks[name][mine].max()) for name in ("graphs", "atoms", "edges")}
        k = blocks_per_pack
        return PackShape(k * largest["graphs"] + 1, k * largest["atoms"] + 1, k * largest["edges"] // 2)

    def read(self, block: int) -> bytes:
        """The verified bytes of one block.

        Raises:
            DataSetError: where they are not what the block table says.
        """
        shard, offset, size = (int(self.blocks[name][block]) for name in ("shard", "offset", "size"))
        # Not mapped: a shard that is cut while it is read must be an error and not a bus error.
        data = os.pread(self._file(shard), size, offset)
        if xxhash.xxh3_64_intdigest(data) != int(self.checksums[block]):
            name = self.manifest.shards[shard]["name"]
            raise DataSetError(
                f"{self.folder / name}: block {block} at byte {offset} (+{size}) does not match its checksum; "
                "the shard is damaged or belongs to another data set"
            )
        return data

    def pack(self, entries: Sequence[Entry], table: BlockTable, shape: PackShape | None) -> RawPack:
        """Read and join the blocks of one pack."""
        numbers = [(int(table.block[e.index]), e.epoch) for e in entries]
        blocks = [decode_arrays(self.read(block)) for block, _ in numbers]
        return collate(blocks, numbers, shape, np.dtype(self.manifest.graph["index_dtype"]))

    def _file(self, shard: int) -> int:
        with self._lock:
            if shard not in self._files:
                path = self.folder / self.manifest.shards[shard]["name"]
                try:
                    self._files[shard] = os.open(path, os.O_RDONLY)
                except OSError as why:
                    raise DataSetError(f"{path}: the shard was lost after the start ({why.strerror})") from None
            return self._files[shard]

    def close(self) -> None:
        """Close the shards that were read."""
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()


@dataclass(frozen=True, slots=True)
class Step:
    """What one rank does in one step."""

    number: int
    edges: int  # scored edges of the whole step, all ranks
    packs: list[RawPack]  # one for each micro-step; empty packs are all padding


class Loader:
    """The steps of one rank, from ``first`` to before ``last``, read ahead.

    Args:
        data: the data set.
        plan: of the split.
        shape: static shape of a pack.
        rank, world_size: which lanes are read.
        first, last: steps.
        prefetch: packs read ahead.
        pin: copy packs to pinned memory, for a GPU.
    """

    def __init__(
        self,
        data: DataSet,
        plan: EpochPlan,
        shape: PackShape,
        *,
        rank: int,
        world_size: int,
        first: int,
        last: int,
        prefetch: int = 4,
        pin: bool = False,
    ) -> None:
        self.data, self.plan, self.shape = data, plan, shape
        self.lanes, self.micro = plan.lanes(rank, world_size), plan.micro_steps(world_size)
        self.first, self.last, self.pin = first, last, pin
        self._queue: queue.Queue[Step | Exception | None] = queue.Queue(max(1, prefetch // self.micro))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="cdssl-loader", daemon=True)

    def __enter__(self) -> Iterator[Step]:
        self._thread.start()
        return self._steps()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _steps(self) -> Iterator[Step]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def _work(self) -> None:
        try:
            for number in range(self.first, self.last):
                self._put(self._step(number))
                if self._stop.is_set():
                    return
            self._put(None)
        except Exception as error:  # handed over: raised where the next step is asked for
            self._put(error)

    def _step(self, number: int) -> Step:
        packs = [self.data.pack(self.plan.pack(number, lane), self.plan.table, self.shape) for lane in self.lanes]
        packs += [self.data.pack([], self.plan.table, self.shape) for _ in range(self.micro - len(packs))]
        return Step(number, self.plan.edges_of(number), [pack.pin() for pack in packs] if self.pin else packs)

    def _put(self, item: Any) -> None:
        """Wait for room, but not once nobody takes any more."""
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=POLL)
            except queue.Full:
                continue


POLL: Final = 0.1  # s
