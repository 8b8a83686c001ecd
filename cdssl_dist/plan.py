"""Which blocks are in which pack of which step: integer arithmetic, the same at any number of ranks.

The blocks of epoch after epoch, each epoch in a seeded order of its own, form one endless stream. Steps take P·k
blocks: the steps that lie inside an epoch (with what the epoch before left over) form a segment of the stream, and a
segment is cut into P contiguous lanes. Pack p of a step is the next k blocks of lane p. A rank owns whole lanes, so
that it reads few shards, and what a step holds does not depend on who reads it. The cursor of a run is its step number.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

SHARDS_MIXED: Final = 4  # consecutive shards of a lane whose blocks are shuffled together

Last = Literal["carry", "pad", "drop"]


@dataclass(frozen=True, eq=False)
class BlockTable:
    """The blocks of one split, as arrays over its n blocks."""

    block: NDArray[np.int64]  # (n,) | number in the data set
    shard: NDArray[np.int64]  # (n,)
    edges: NDArray[np.int64]  # (n,) | scored edges, directed

    def __len__(self) -> int:
        return len(self.block)


@dataclass(frozen=True)
class Entry:
    """One block in a pack: which block, and which pass over the data it belongs to (it keys the noise)."""

    epoch: int
    index: int  # into the block table


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The plan of a run over one split.

    Args:
        table: the blocks of the split.
        seed: of the order; hashed with the epoch.
        blocks_per_pack: k.
        packs_per_step: P.
        last: what becomes of the blocks that do not fill a step at the end of an epoch: ``carry`` them into the next
            epoch, ``pad`` the last step with empty places (each epoch stands alone), or ``drop`` them.
    """

    table: BlockTable
    seed: int
    blocks_per_pack: int
    packs_per_step: int
    last: Last = "carry"

    def __post_init__(self) -> None:
        if len(self.table) == 0:
            raise ValueError("the split holds no blocks; nothing can be planned")
        if self.last == "drop" and len(self.table) < self.blocks_per_step:
            raise ValueError(
                f"{len(self.table)} blocks do not fill one step of {self.blocks_per_step}, and last='drop' would drop "
                "them all; use 'carry' or 'pad', or smaller steps"
            )

    @property
    def blocks_per_step(self) -> int:
        """P·k."""
        return self.blocks_per_pack * self.packs_per_step

    def steps_before(self, epoch: int) -> int:
        """Number of the first step of an epoch's segment."""
        n, full = len(self.table), self.blocks_per_step
        if self.last == "carry":
            return epoch * n // full
        return epoch * (n // full if self.last == "drop" else -(-n // full))

    def epoch_of(self, step: int) -> int:
        """The epoch whose segment holds a step."""
        n, full = len(self.table), self.blocks_per_step
        if self.last == "carry":  # the smallest epoch with steps_before(epoch + 1) > step
            return -(-(step + 1) * full // n) - 1
        return step // self.steps_before(1)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The order of the blocks in an epoch: (n,) indices into the table; shards shuffled, and blocks in each."""
        return _order(self, epoch)

    def segment(self, epoch: int) -> NDArray[np.int64]:
        """All places of the steps of an epoch, lane after lane: (P·k·steps,).

        A place holds ``epoch · n + index`` of a block, or −1 where it is empty.
        """
        return _segment(self, epoch)

    def pack(self, step: int, lane: int) -> list[Entry]:
        """The blocks of one pack; fewer than k, or none, only with ``last='pad'``: in the last lanes and steps."""
        epoch = self.epoch_of(step)
        first = self.steps_before(epoch)
        lane_length = (self.steps_before(epoch + 1) - first) * self.blocks_per_pack
        begin = lane * lane_length + (step - first) * self.blocks_per_pack
        places = self.segment(epoch)[begin : begin + self.blocks_per_pack]
        return [Entry(*divmod(int(place), len(self.table))) for place in places if place >= 0]

    def step(self, step: int) -> list[list[Entry]]:
        """All P packs of a step."""
        return [self.pack(step, lane) for lane in range(self.packs_per_step)]

    def edges_of(self, step: int) -> int:
        """Scored edges of a whole step, which normalise its loss: known before anything is read."""
        return sum(int(self.table.edges[e.index]) for pack in self.step(step) for e in pack)

    def micro_steps(self, world_size: int) -> int:
        """Packs that each rank takes in a step, empty ones included.

        Raises:
            ValueError: with more ranks than packs.
        """
        if world_size > self.packs_per_step:
            raise ValueError(
                f"{world_size} ranks share {self.packs_per_step} packs a step: some would never work; "
                "raise data.packs_per_step or use fewer workers"
            )
        return -(-self.packs_per_step // world_size)

    def lanes(self, rank: int, world_size: int) -> range:
        """The lanes that a rank owns."""
        p = self.packs_per_step
        return range(rank * p // world_size, (rank + 1) * p // world_size)

    def read_amplification(self, epoch: int, readers: int) -> float:
        """How often a shard is read in an epoch, on average, when ``readers`` nodes each read the lanes they own."""
        places = self.segment(epoch).reshape(self.packs_per_step, -1)
        read = 0
        for reader in range(readers):
            mine = places[list(self.lanes(reader, readers))]
            read += len(np.unique(self.table.shard[mine[mine >= 0] % len(self.table)]))
        return read / len(np.unique(self.table.shard))


def _random(plan: EpochPlan, epoch: int, use: str) -> np.random.Philox:
    """A source of random words; its raw output is the same in every version of numpy."""
    hashed = hashlib.blake2b(f"{plan.seed}/{epoch}/{use}".encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(hashed, np.uint64))


def _shuffle_inside(groups: NDArray[np.int64], source: np.random.Philox) -> NDArray[np.int64]:
    """The order that sorts by group, at random inside each: (n,). One sort, of 64-bit words."""
    words = (groups.astype(np.uint64) << np.uint64(36)) | (source.random_raw(len(groups)) >> np.uint64(28))
    return np.argsort(words, kind="stable")  # stable: ties are rare, but no two machines may break them differently


@lru_cache(maxsize=4)
def _order(plan: EpochPlan, epoch: int) -> NDArray[np.int64]:
    """See ``EpochPlan.order``."""
    source = _random(plan, epoch, "shards")
    names, dense = np.unique(plan.table.shard, return_inverse=True)
    place = np.empty(len(names), np.int64)  # of each shard in this epoch
    place[np.argsort(source.random_raw(len(names)), kind="stable")] = np.arange(len(names))
    return _shuffle_inside(place[dense], source)


@lru_cache(maxsize=2)
def _segment(plan: EpochPlan, epoch: int) -> NDArray[np.int64]:
    """See ``EpochPlan.segment``.

    Blocks are shuffled once more in windows of a few shards inside each lane, so that a block's neighbours change from
    epoch to epoch and yet no lane reads more shards.
    """
    n, p = len(plan.table), plan.packs_per_step
    first, end = plan.steps_before(epoch), plan.steps_before(epoch + 1)
    size = (end - first) * plan.blocks_per_step
    if plan.last == "carry":
        stream = first * plan.blocks_per_step + np.arange(size)
        epochs, inner = np.divmod(stream, n)
        places = np.empty(size, np.int64)
        for e in range(int(epochs[0]), int(epochs[-1]) + 1) if size else ():
            mine = epochs == e
            places[mine] = e * n + plan.order(e)[inner[mine]]
    else:
        places = np.full(size, -1, np.int64)
        used = min(size, n)
        places[:used] = epoch * n + plan.order(epoch)[:used]
    if size == 0:
        return places
    lane, within = np.divmod(np.arange(size), size // p)
    window = max(SHARDS_MIXED * n // len(np.unique(plan.table.shard)), 1)
    windows = lane * (size // p // window + 1) + within // window  # ascending: sorting by it keeps lanes together
    empty = places < 0  # stay behind the blocks of their lane
    order = _shuffle_inside(2 * windows + empty if empty.any() else windows, _random(plan, epoch, "lanes"))
    return places[order]


def table_of(blocks: Any, split: int) -> BlockTable:
    """The block table of one split, from the data set's ``blocks.parquet`` (a pyarrow table)."""
    mine = np.asarray(blocks["split"]) == split
    columns = (np.asarray(blocks[name])[mine].astype(np.int64) for name in ("block", "shard", "scored_edges"))
    return BlockTable(*columns)
