"""Read packs from shards, in the order of the plan, ahead of use in a thread.

Every block is verified against its checksum before use. Errors are raised in the loop that asks for the next step,
never swallowed in the thread.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal

from cdssl_dist.data.batch import PackShape, RawPack
from cdssl_dist.data.dataset import BadBlockError, DataSet
from cdssl_dist.data.plan import EpochPlan
from cdssl_dist.data.waiting import POLL, StoppedError, warn
from sharding.manifest import DataSetError
from sharding.sources.streams import is_remote

FEW: Final = 10  # bad blocks that ``skip`` always tolerates
SHARE: Final = 0.01  # of the blocks read: if more are bad, the data as a whole are suspect

BadBlocks = Literal["error", "skip"]


@dataclass(frozen=True, slots=True)
class Step:
    """What one rank does in one step."""

    number: int
    edges: int  # scored edges of the whole step, all ranks, those of skipped blocks too
    packs: list[RawPack]  # one for each micro-step; empty packs are all padding
    skipped: tuple[int, ...] = ()  # blocks of this rank that were bad
    error: str = ""  # why they must end the run, with ``defer_errors``


class Loader:
    """The steps of one rank, from ``first`` to before ``end``, read ahead.

    Args:
        data: the data set.
        plan: of the split.
        shape: static shape of a pack.
        rank, world_size: which lanes are read.
        first, end: range of steps; ``end`` is exclusive.
        prefetch: packs read ahead. For a remote data set, another thread loads the shards that each lane mixes next
            into the cache.
        pin: copy packs to pinned memory, for a GPU.
        bad_blocks: what to do with a block that does not match the block table. ``error`` raises ``BadBlockError``.
            ``skip`` leaves it out of its pack, but changes nothing else: order, noise and ``Step.edges`` stay as
            planned. So all ranks agree on the normaliser without communication; the step's loss is that of a model
            without error on the block, and its gradient is smaller by the block's share, about 1/(P·k). A lost shard
            or a dead endpoint is always an error, and so are more than 1% bad blocks, once there are more than ten.
        defer_errors: store an error from bad blocks in ``Step.error``, for all ranks to raise together, instead of
            raising it here, since others would wait for a rank that ended alone. The block is left out meanwhile.

    Raises:
        DataSetError, BadBlockError: from ``next``; steps before the bad one are delivered.
        RuntimeError: from ``next``, after the end of the ``with`` block.
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
        end: int,
        prefetch: int = 4,
        pin: bool = False,
        bad_blocks: BadBlocks = "error",
        defer_errors: bool = False,
    ) -> None:
        self.data, self.plan, self.shape = data, plan, shape
        self.bad_blocks, self.defer_errors = bad_blocks, defer_errors
        self.lanes, self.micro = plan.lanes(rank, world_size), plan.micro_steps(world_size)
        self.first, self.end, self.pin = first, end, pin
        self._read, self._bad = 0, 0  # blocks
        self._queue: queue.Queue[Step | BaseException | None] = queue.Queue(max(1, prefetch // self.micro))
        self._stop = threading.Event()
        self._at = first  # the step being read
        self._threads = [threading.Thread(target=self._work, name="cdssl-loader", daemon=True)]
        if is_remote(data.folder):
            self._threads.append(threading.Thread(target=self._fetch, name="cdssl-loader-shards", daemon=True))

    def __enter__(self) -> Iterator[Step]:
        for thread in self._threads:
            thread.start()
        return self._steps()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _steps(self) -> Iterator[Step]:
        while (item := self._get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def _get(self) -> Step | BaseException | None:
        while not self._stop.is_set():
            try:
                return self._queue.get(timeout=POLL)
            except queue.Empty:
                continue
        raise RuntimeError("a step was asked for after the end of the loader's with block")

    def _work(self) -> None:
        try:
            for number in range(self.first, self.end):
                self._at = number
                self._put(self._step(number))
                if self._stop.is_set():
                    return
            self._put(None)
        except StoppedError:
            pass
        except BaseException as error:  # passed on, to be raised where the next step is asked for
            self._put(error)

    def _fetch(self) -> None:
        """Load shards before they are read. Failures are ignored, since reading will try again."""
        reach = -(-self.plan.window // self.plan.blocks_per_pack)  # steps: the shards that are mixed next
        try:
            for number in range(self.first, self.end):
                while number > self._at + reach:
                    if self._stop.wait(POLL):
                        return
                for shard in self._shards(number) if number > self._at else ():
                    with contextlib.suppress(DataSetError):
                        self.data.fetch(shard, self._stop)
        except StoppedError:
            pass
        except BaseException as error:
            self._put(error)

    def _shards(self, number: int) -> list[int]:
        """The shards that this rank's lanes read in a step."""
        packs = [self.plan.pack(number, lane) for lane in self.lanes]
        return list(dict.fromkeys(int(self.plan.table.shard[e.index]) for pack in packs for e in pack))

    def _step(self, number: int) -> Step:
        skipped: list[int] = []
        errors: list[str] = []

        def read(block: int) -> bytes | None:
            self._read += 1
            try:
                return self.data.read(block, self._stop)
            except BadBlockError as why:
                self._bad += 1
                error = ""
                if self.bad_blocks == "error":
                    error = f"{why}; `cdssl verify` finds all such blocks, data.bad_blocks=skip leaves them out"
                elif self._bad > max(FEW, SHARE * self._read):
                    error = f"{why}; {self._bad} of {self._read} blocks were bad, too many to skip"
                if error and not self.defer_errors:
                    raise BadBlockError(error) from why
                errors.append(error)
                if not error:
                    warn(f"step {number}: {why}; it is skipped")
                skipped.append(block)
                return None

        packs = [self.data.pack(self.plan.pack(number, lane), self.plan.table, self.shape, read) for lane in self.lanes]
        packs += [self.data.pack([], self.plan.table, self.shape) for _ in range(self.micro - len(packs))]
        packs = [pack.pin() for pack in packs] if self.pin else packs
        return Step(number, self.plan.edges_of(number), packs, tuple(skipped), next(filter(None, errors), ""))

    def _put(self, item: Step | BaseException | None) -> None:
        """Add an item to the queue, waiting for room until the loader is stopped."""
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=POLL)
            except queue.Full:
                continue
