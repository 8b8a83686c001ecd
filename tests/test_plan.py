"""The plan: every block once per epoch, whatever the number of ranks."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdssl_dist.data.plan import BlockTable, EpochPlan


def table(n: int, per_shard: int = 5, first: int = 0) -> BlockTable:
    """n blocks, numbered from ``first``, in shards of a few; no two have the same number of edges."""
    index = np.arange(n)
    return BlockTable(first + index, index // per_shard, 1_000 + 7 * index)


@st.composite
def plans(draw: st.DrawFn, last: str = "carry") -> EpochPlan:
    k, p = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    n = draw(st.integers(k * p if last == "drop" else 1, 120))
    return EpochPlan(table(n, draw(st.integers(1, 12))), draw(st.integers(0, 9)), k, p, last)


def taken(plan: EpochPlan, steps: range) -> Counter[tuple[int, int]]:
    """How often each (epoch, block) is in these steps."""
    return Counter((e.epoch, e.index) for s in steps for pack in plan.step(s) for e in pack)


def once(plan: EpochPlan, epochs: range) -> Counter[tuple[int, int]]:
    return Counter(itertools.product(epochs, range(len(plan.table))))


# -- what an epoch holds -----------------------------------------------------------------------------------------------


@given(plans(), st.integers(1, 5))
def test_carried_epochs_hold_every_block_once(plan: EpochPlan, epochs: int) -> None:
    """What is taken after so many epochs is all of them, but for less than one step."""
    steps = range(plan.steps_before(epochs))
    assert all(len(pack) == plan.blocks_per_pack for s in steps for pack in plan.step(s))
    got, wanted = taken(plan, steps), once(plan, range(epochs))
    assert got <= wanted
    assert (wanted - got).total() < plan.blocks_per_step
    complete = len(steps) * plan.blocks_per_step // len(plan.table)
    assert all(epoch >= complete for epoch, _ in wanted - got)


@given(plans("pad"), st.integers(0, 3))
def test_a_padded_epoch_stands_alone(plan: EpochPlan, epoch: int) -> None:
    steps = range(plan.steps_before(epoch), plan.steps_before(epoch + 1))
    assert len(steps) == -(-len(plan.table) // plan.blocks_per_step)
    assert taken(plan, steps) == once(plan, range(epoch, epoch + 1))


@given(plans("pad"), st.integers(0, 3))
def test_empty_places_come_last(plan: EpochPlan, epoch: int) -> None:
    """In each lane, so that ranks are idle at the end and nowhere else."""
    steps = range(plan.steps_before(epoch), plan.steps_before(epoch + 1))
    for lane in range(plan.packs_per_step):
        filled = [len(plan.pack(step, lane)) for step in steps]
        assert filled == sorted(filled, reverse=True)
        assert sum(0 < n < plan.blocks_per_pack for n in filled) <= 1


@given(plans("drop"), st.integers(0, 3))
def test_dropping_takes_whole_steps_of_an_epoch(plan: EpochPlan, epoch: int) -> None:
    steps = range(plan.steps_before(epoch), plan.steps_before(epoch + 1))
    got, wanted = taken(plan, steps), once(plan, range(epoch, epoch + 1))
    assert got <= wanted
    assert got.total() == len(steps) * plan.blocks_per_step > len(plan.table) - plan.blocks_per_step
    assert all(len(pack) == plan.blocks_per_pack for s in steps for pack in plan.step(s))


def test_dropping_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="use 'carry' or 'pad'"):
        EpochPlan(table(7), 0, 2, 4, "drop")
    with pytest.raises(ValueError, match="no blocks"):
        EpochPlan(table(0), 0, 1, 1)


@given(plans() | plans("pad") | plans("drop"), st.integers(0, 400))
def test_steps_and_epochs_agree(plan: EpochPlan, step: int) -> None:
    epoch = plan.epoch_of(step)
    assert plan.steps_before(epoch) <= step < plan.steps_before(epoch + 1)
    assert plan.steps_before(0) == 0


@given(plans() | plans("pad"), st.integers(0, 60))
def test_the_edges_of_a_step_are_those_of_its_blocks(plan: EpochPlan, step: int) -> None:
    edges = dict(enumerate(plan.table.edges.tolist()))
    assert plan.edges_of(step) == sum(edges[e.index] for pack in plan.step(step) for e in pack)


def test_a_step_larger_than_the_split_takes_several_epochs() -> None:
    plan = EpochPlan(table(3), 0, 2, 4)
    assert taken(plan, range(3)) == once(plan, range(8))
    assert {epoch for epoch, _ in taken(plan, range(1))} == {0, 1, 2}


# -- ranks -------------------------------------------------------------------------------------------------------------


@given(plans(), st.integers(0, 50))
def test_ranks_share_the_lanes(plan: EpochPlan, step: int) -> None:
    """For every number of ranks the same packs, each on one rank, as evenly as whole packs allow."""
    for ranks in range(1, plan.packs_per_step + 1):
        lanes = [plan.lanes(rank, ranks) for rank in range(ranks)]
        assert [lane for mine in lanes for lane in mine] == list(range(plan.packs_per_step))
        assert {len(mine) for mine in lanes} <= {plan.micro_steps(ranks), plan.packs_per_step // ranks}
        assert plan.micro_steps(ranks) == max(map(len, lanes)) == -(-plan.packs_per_step // ranks)
        assert [plan.pack(step, lane) for mine in lanes for lane in mine] == plan.step(step)


def test_more_ranks_than_packs_is_an_error() -> None:
    with pytest.raises(ValueError, match="5 ranks share 4 packs"):
        EpochPlan(table(50), 0, 1, 4).micro_steps(5)


@given(plans())
def test_idle_is_what_is_missing_to_equal_numbers_of_packs(plan: EpochPlan) -> None:
    for ranks in range(1, plan.packs_per_step + 1):
        taken = [len(plan.lanes(rank, ranks)) for rank in range(ranks)]
        assert plan.idle(ranks) == pytest.approx(1 - sum(taken) / (ranks * max(taken)))
        line, *warnings = plan.about(ranks)
        assert f"{len(plan.table) / plan.blocks_per_step:,.1f} steps" in line
        assert bool(warnings) == (plan.idle(ranks) > 0.05)


def read_amplification(plan: EpochPlan, epoch: int) -> float:
    """Shards read by all lanes together in the steps of an epoch, each lane counting for itself, per shard."""
    read = set()
    for step in range(plan.steps_before(epoch), plan.steps_before(epoch + 1)):
        for lane, pack in enumerate(plan.step(step)):
            read |= {(lane, e.epoch, int(plan.table.shard[e.index])) for e in pack}
    return len(read) / len({(epoch, shard) for _, epoch, shard in read})


@pytest.mark.parametrize(("shards", "per_shard", "packs"), [(32, 20, 8), (37, 23, 8), (64, 33, 16), (160, 20, 4)])
def test_lanes_share_the_shards_at_their_borders_only(shards: int, per_shard: int, packs: int) -> None:
    """A lane ends inside a shard, which its neighbour reads too; in carry mode so does an epoch."""
    plan = EpochPlan(table(shards * per_shard - 3, per_shard), 0, 2, packs)
    for epoch in (1, 2):
        by_lane = read_amplification(plan, epoch)
        assert by_lane <= 1 + (packs + 1) / shards
        assert plan.read_amplification(epoch, packs) == pytest.approx(by_lane, abs=1.5 / shards)


def test_nodes_of_eight_ranks_read_hardly_a_shard_twice() -> None:
    plan = EpochPlan(table(4 * 64 * 5, 5), 0, 1, 64)  # four shards for each of 64 lanes, on eight nodes
    assert plan.read_amplification(1, readers=8) <= 1.1


# -- order -------------------------------------------------------------------------------------------------------------


def test_every_epoch_and_seed_has_an_order_of_its_own() -> None:
    plans = [replace(EpochPlan(table(200), 0, 1, 1), seed=seed) for seed in range(4)]
    orders = {tuple(plan.order(epoch).tolist()) for plan in plans for epoch in range(4)}
    assert len(orders) == 16  # in particular seed 1 in epoch 2 is not seed 2 in epoch 1
    assert all(sorted(order) == list(range(200)) for order in orders)


def test_neighbours_change_and_every_place_is_reached() -> None:
    plan = EpochPlan(table(200, 10), 3, 1, 1)
    orders = np.array([plan.segment(epoch) % 200 for epoch in range(300)])
    follows = Counter((a, b) for order in orders for a, b in itertools.pairwise(order.tolist()))
    assert max(follows.values()) < 25  # of 300; 40 blocks are mixed, 7.5 ± 2.7 for two of one shard. Unmixed, 30
    place = np.argsort(orders, axis=1).mean(axis=0)  # the mean place of a block; of a uniform one 99.5 ± 3.3
    assert np.abs(place - 99.5).max() < 5 * 3.3


def test_the_order_never_changes_between_versions() -> None:
    """A checkpoint holds a step number only: were the order another, resuming would repeat and miss blocks."""
    plan = EpochPlan(table(12, 2), 42, 1, 2)
    assert plan.order(0).tolist() == [10, 11, 5, 4, 0, 1, 9, 8, 7, 6, 3, 2]
    assert [[(e.epoch, e.index) for e in pack] for pack in plan.step(7)] == [[(1, 6)], [(1, 10)]]


def test_the_order_depends_on_the_table_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the numbers of the blocks, the width of the integers, or what was asked before."""
    plan = EpochPlan(table(60), 5, 2, 3)
    steps = [plan.step(s) for s in range(30)]
    again = EpochPlan(table(60, first=1_000), 5, 2, 3)
    assert [again.step(s) for s in reversed(range(30))] == steps[::-1]
    wide = table(60)
    narrow = BlockTable(*(column.astype(np.uint32) for column in (wide.block, wide.shard, wide.edges)))
    monkeypatch.setattr("cdssl_dist.data.plan.CHUNK", 7)
    assert [EpochPlan(narrow, 5, 2, 3).step(s) for s in range(30)] == steps
    assert [EpochPlan(narrow, 5, 2, 3).edges_of(s) for s in range(30)] == [plan.edges_of(s) for s in range(30)]


SCALE = """
import resource, sys, time
import numpy as np
from cdssl_dist.data.plan import BlockTable, EpochPlan

blocks, shards, lanes = 20_000_000, 100_000, 4_096
index = np.arange(blocks, dtype=np.uint32)
plan = EpochPlan(BlockTable(index, index // (blocks // shards), 60_000 + index % 5_000), 0, 1, lanes)
step = plan.steps_before(1) + 100  # in the second epoch, which begins with what the first leaves over
begin = time.process_time()
plan.pack(step, 17)
ready = time.process_time() - begin
begin = time.process_time()
for s in range(step, step + 1_000):
    plan.pack(s, 17)
pack = (time.process_time() - begin) / 1_000
begin = time.process_time()
for s in range(step, step + 100):
    plan.edges_of(s)
edges = (time.process_time() - begin) / 100
print(ready, pack, edges, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_a_billion_crystals_on_four_thousand_ranks() -> None:
    """2·10⁷ blocks of some 50 crystals: the plan is ready in seconds, in little memory, and a pack in microseconds."""
    run = subprocess.run([sys.executable, "-c", SCALE], capture_output=True, text=True, check=True)
    ready, pack, edges, gib = map(float, run.stdout.split())
    print(f"ready {ready:.1f} s, a pack {1e6 * pack:.1f} µs, edges_of {1e6 * edges:.0f} µs, {gib:.2f} GiB")
    assert ready < 15
    assert gib < 2
    assert pack < 100e-6
    assert edges < 0.02


def test_a_share_of_the_blocks_is_part_of_a_larger_one() -> None:
    whole = table(100, first=7)
    parts = {share: whole.part(share) for share in (0.001, 0.1, 0.5)}
    assert [len(part) for part in parts.values()] == [1, 10, 50]
    assert set(parts[0.001].block) < set(parts[0.1].block) < set(parts[0.5].block) < set(whole.block)
    tenth = parts[0.1]
    assert tenth.shard.tolist() == ((tenth.block - 7) // 5).tolist()  # the other columns came along
    assert tenth.edges.tolist() == (1_000 + 7 * (tenth.block - 7)).tolist()
    assert 5 < np.median(tenth.shard) < 15  # drawn all over, not from the front
    assert whole.part(1.0) is whole
