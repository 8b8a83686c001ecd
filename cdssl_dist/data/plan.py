"""Which blocks are in which pack of which step: integer arithmetic, the same at any number of ranks.

The blocks of all epochs, each epoch in its own seeded order, form one endless stream. A step takes P·k blocks. The
steps that fall into an epoch (starting with blocks left over from the previous one) form a segment of the stream,
which is cut into P contiguous lanes. Pack p of a step is the next k blocks of lane p. A rank owns whole lanes, so that
it reads few shards, and the content of a step does not depend on who reads it. The cursor of a run is its step number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

SHARDS_MIXED: Final = 4  # consecutive shards of a lane whose blocks are shuffled together
IDLE: Final = 0.05  # idle share of the ranks' time above which the user is warned
CHUNK: Final = 2**20  # blocks: maximum length of temporary arrays

Last = Literal["carry", "pad", "drop"]


@dataclass(frozen=True, eq=False)
class BlockTable:
    """The blocks of one split, as arrays over its n blocks, of any integer type."""

    block: NDArray[Any]  # (n,) | number in the data set
    shard: NDArray[Any]  # (n,)
    edges: NDArray[Any]  # (n,) | scored edges, directed

    def __len__(self) -> int:
        return len(self.block)

    def part(self, share: float) -> BlockTable:
        """A fixed random share of the blocks, at least one; a smaller share is a subset of a larger one."""
        if share == 1.0:
            return self
        drawn = np.random.default_rng(0).permutation(len(self))[: max(1, round(share * len(self)))]
        chosen = np.sort(drawn)
        return BlockTable(self.block[chosen], self.shard[chosen], self.edges[chosen])


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
        last: what to do with blocks that do not fill a step at the end of an epoch: ``carry`` them into the next
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

    @property
    def window(self) -> int:
        """Blocks of a lane that are shuffled together: those of a few shards."""
        return _window(self.table)

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
        return self._entries(self._places(step)[lane])

    def step(self, step: int) -> list[list[Entry]]:
        """All P packs of a step."""
        return [self._entries(places) for places in self._places(step)]

    def edges_of(self, step: int) -> int:
        """Scored edges of a whole step, which normalise its loss: known before anything is read."""
        places = self._places(step)
        return int(self.table.edges[places[places >= 0] % len(self.table)].sum(dtype=np.int64))

    def _places(self, step: int) -> NDArray[np.int64]:
        """The places of one step, see ``segment``: (P, k)."""
        epoch = self.epoch_of(step)
        begin = (step - self.steps_before(epoch)) * self.blocks_per_pack
        lanes = self.segment(epoch).reshape(self.packs_per_step, -1)
        return lanes[:, begin : begin + self.blocks_per_pack]

    def _entries(self, places: NDArray[np.int64]) -> list[Entry]:
        return [Entry(*divmod(place, len(self.table))) for place in places.tolist() if place >= 0]

    def micro_steps(self, world_size: int) -> int:
        """Packs that each rank takes in a step, empty ones included.

        Raises:
            ValueError: if there are more ranks than packs.
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
        return read / len(_shards(self.table))

    def idle(self, world_size: int) -> float:
        """Share of the ranks' packs that are empty because P is not a multiple of the number of ranks."""
        return 1 - self.packs_per_step / (self.micro_steps(world_size) * world_size)

    def about(self, world_size: int) -> list[str]:
        """Describe the cost of the plan at this number of ranks, in lines for the user."""
        idle = self.idle(world_size)
        read = self.read_amplification(self.epoch_of(0), world_size)
        lines = [
            f"an epoch is {len(self.table) / self.blocks_per_step:,.1f} steps; "
            f"a shard is read by {read:.2f} of {world_size} ranks on average"
        ]
        if idle > IDLE:
            lines.append(
                f"warning: {self.packs_per_step} packs a step on {world_size} ranks leave {idle:.0%} of their time "
                "idle; choose a number of workers that divides data.packs_per_step"
            )
        return lines


def _random(plan: EpochPlan, epoch: int, use: str) -> np.random.Philox:
    """A source of random words; its raw output is the same in every version of numpy."""
    hashed = hashlib.blake2b(f"{plan.seed}/{epoch}/{use}".encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(hashed, np.uint64))


def _shuffled(
    n: int, group_of: Callable[[slice], NDArray[Any]], groups: int, source: np.random.Philox
) -> NDArray[np.int64]:
    """Return the numbers 0 … n − 1, sorted by group, in random order within each: (n,).

    Sorts 64-bit words of group, random bits and number. No two are equal, so that all machines sort them alike.
    """
    number_bits, group_bits = (n - 1).bit_length(), (groups - 1).bit_length()
    random_bits = 64 - number_bits - group_bits
    assert random_bits >= 16, f"{n} numbers in {groups} groups"
    words = np.empty(n, np.uint64)
    for part in _chunks(n):
        word = source.random_raw(part.stop - part.start) >> np.uint64(64 - random_bits)
        word |= group_of(part).astype(np.uint64) << np.uint64(random_bits)
        word <<= np.uint64(number_bits)
        word |= np.arange(part.start, part.stop, dtype=np.uint64)
        words[part] = word
    words.sort()
    words &= np.uint64(2**number_bits - 1)
    return words.view(np.int64)


def _order(plan: EpochPlan, epoch: int) -> NDArray[np.int64]:
    """See ``EpochPlan.order``."""
    source = _random(plan, epoch, "shards")
    shards = _shards(plan.table)
    place = np.empty(int(shards[-1]) + 1, np.int64)  # of each shard in this epoch
    place[shards[np.argsort(source.random_raw(len(shards)), kind="stable")]] = np.arange(len(shards))
    return _shuffled(len(plan.table), lambda part: place[plan.table.shard[part]], len(shards), source)


@lru_cache(maxsize=3)  # two training epochs, as shards are fetched ahead, and one of validation
def _segment(plan: EpochPlan, epoch: int) -> NDArray[np.int64]:
    """See ``EpochPlan.segment``.

    Blocks are shuffled once more in windows of a few shards inside each lane, so that a block's neighbours change from
    epoch to epoch and yet no lane reads more shards.
    """
    n, p = len(plan.table), plan.packs_per_step
    first, end = plan.steps_before(epoch) * plan.blocks_per_step, plan.steps_before(epoch + 1) * plan.blocks_per_step
    places = np.full(end - first, -1, np.int64)
    if plan.last == "carry":
        for e in range(first // n, -(-end // n)):  # what is left of the previous epoch, then this one
            begin, stop = max(first, e * n), min(end, (e + 1) * n)
            np.add(plan.order(e)[begin - e * n : stop - e * n], e * n, out=places[begin - first : stop - first])
    else:
        used = min(end - first, n)
        np.add(plan.order(epoch)[:used], epoch * n, out=places[:used])
    source = _random(plan, epoch, "lanes")
    for lane in places.reshape(p, -1) if len(places) else ():
        _mix(lane, plan.window, source)
    return places


def _mix(lane: NDArray[np.int64], window: int, source: np.random.Philox) -> None:
    """Shuffle the places of a lane within windows; empty places stay behind the blocks."""

    def group_of(part: slice) -> NDArray[np.int64]:
        return 2 * (np.arange(part.start, part.stop) // window) + (lane[part] < 0)

    lane[:] = lane[_shuffled(len(lane), group_of, 2 * (len(lane) // window + 1), source)]


def _shards(table: BlockTable) -> NDArray[np.int64]:
    """The shards that hold blocks of a table, ascending."""
    found = np.zeros(int(table.shard.max()) + 1, np.bool_)
    for part in _chunks(len(table)):
        found[table.shard[part]] = True
    return np.flatnonzero(found)


@lru_cache(maxsize=3)
def _window(table: BlockTable) -> int:
    """See ``EpochPlan.window``."""
    return max(SHARDS_MIXED * len(table) // len(_shards(table)), 1)


def _chunks(n: int) -> Iterator[slice]:
    for begin in range(0, n, CHUNK):
        yield slice(begin, min(begin + CHUNK, n))


def table_of(blocks: Any, split: int) -> BlockTable:
    """The block table of one split, from the columns of ``blocks.parquet``; copied only if necessary."""
    mine = np.asarray(blocks["split"]) == split
    columns = [np.asarray(blocks[name]) for name in ("block", "shard", "scored_edges")]
    return BlockTable(*(columns if mine.all() else [column[mine] for column in columns]))
