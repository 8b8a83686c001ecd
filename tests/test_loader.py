"""From shards to steps: the same every time, widened correctly, and damage reported by name."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cdssl_dist.data.batch import NO_BLOCK, GraphBatch, PackShape, RawPack, collate, to_pyg, widen
from cdssl_dist.data.dataset import BadBlockError, DataSet
from cdssl_dist.data.loader import Loader, Step
from cdssl_dist.data.plan import BlockTable, Entry, EpochPlan
from sharding.block import decode, decode_arrays, encode
from sharding.crystal import Crystal
from sharding.graph import Multigraphs, build, concatenate
from sharding.manifest import DataSetError
from sharding.pipeline import shard
from sharding.sources import from_crystals

P = 4  # packs a step


@pytest.fixture(scope="module")
def data(data_folder: Path) -> DataSet:
    return DataSet(data_folder)


@pytest.fixture
def copy(data_folder: Path, tmp_path: Path) -> Path:
    """A data set that a test may damage."""
    shutil.copytree(data_folder, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("cdssl")] == []


def plan_of(data: DataSet, k: int = 1) -> EpochPlan:
    return EpochPlan(data.table("train"), 3, k, P)


def loader(
    data: DataSet, first: int = 0, last: int = 9, rank: int = 0, world_size: int = 1, prefetch: int = 4
) -> Loader:
    plan, shape = plan_of(data), data.shape("train", 1)
    return Loader(data, plan, shape, rank=rank, world_size=world_size, first=first, end=last, prefetch=prefetch)


def steps(data: DataSet, **which: int) -> list[Step]:
    with loader(data, **which) as found:
        return list(found)


def same(a: RawPack, b: RawPack) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(RawPack))


def assert_same_steps(a: list[Step], b: list[Step]) -> None:
    assert [(s.number, s.edges, len(s.packs)) for s in a] == [(s.number, s.edges, len(s.packs)) for s in b]
    assert all(same(x, y) for s, t in zip(a, b, strict=True) for x, y in zip(s.packs, t.packs, strict=True))


# -- widening ----------------------------------------------------------------------------------------------------------


def graphs_in(data: DataSet, block: int) -> Multigraphs:
    return decode(bytes(data.read(block)))


def batch_of(data: DataSet, blocks: list[int], shape: PackShape | None = None) -> GraphBatch:
    return widen(data.pack([Entry(0, b) for b in blocks], data.table("train"), shape))


def directed(batch: GraphBatch) -> list[tuple[int, ...]]:
    """(receiver, sender, image of the sender) of every edge, by the half edge that each says it is."""
    rows, seen = [], set[int]()
    edges = zip(batch.receiver.tolist(), batch.sender.tolist(), batch.half.tolist(), strict=True)
    for receiver, sender, h in edges:
        ends = (int(batch.src[h]), int(batch.dst[h]))
        assert (receiver, sender) in (ends, ends[::-1])
        forward = (receiver, sender) == ends and h not in seen  # of a self image, the first stands for the stored one
        seen.add(h) if forward else None
        rows.append((receiver, sender, *(n if forward else -n for n in batch.shift[h].int().tolist())))
    return rows


@pytest.mark.parametrize("padded", [False, True])
def test_widened_edges_are_both_directions_of_the_stored_ones(data: DataSet, padded: bool) -> None:
    blocks = [4, 0, 7]
    batch = batch_of(data, blocks, data.shape("train", 4) if padded else None)
    found = sorted(directed(batch))
    expected, first_atom, g = [], 0, 0
    for graphs in (graphs_in(data, block) for block in blocks):
        for one in (graphs.take(np.array([i])) for i in range(len(graphs))):
            rows = zip(one.edge_src.tolist(), one.edge_dst.tolist(), one.edge_shift.tolist(), strict=True)
            for src, dst, n in rows:
                expected.append((first_atom + src, first_atom + dst, *n))
                expected.append((first_atom + dst, first_atom + src, *(-i for i in n)))
            atoms = slice(first_atom, first_atom + len(one.positions))
            np.testing.assert_array_equal(batch.positions[atoms], one.positions)
            np.testing.assert_array_equal(batch.lattice[g], one.lattice[0])
            assert batch.atomic_numbers[atoms].tolist() == one.atomic_numbers.tolist()
            assert set(batch.graph_of_atom[atoms].tolist()) == {g}
            assert batch.atoms_of_graph[g] == len(one.positions)
            assert batch.edges_of_graph[g] == 2 * len(one.edge_src)
            first_atom, g = atoms.stop, g + 1
    padding = [row for row in found if row[0] >= first_atom]
    assert [row for row in found if row[0] < first_atom] == sorted(expected)
    assert set(padding) <= {(first_atom, first_atom, 0, 0, 0)}
    assert bool(padding) == padded


def test_edges_are_sorted_by_receiver_and_know_their_reverse(data: DataSet) -> None:
    batch = batch_of(data, [1, 2, 3], data.shape("train", 5))
    e = torch.arange(len(batch.receiver))
    assert (batch.receiver.diff() >= 0).all()
    assert (batch.graph_of_edge.diff() >= 0).all()  # what Set2Set asks for
    for atom in range(batch.n_atoms):
        assert (batch.receiver[batch.row_ptr[atom] : batch.row_ptr[atom + 1]] == atom).all()
    assert batch.row_ptr[0] == 0
    assert batch.row_ptr[-1] == len(e)
    torch.testing.assert_close(batch.mirror[batch.mirror], e)
    assert (batch.mirror != e).all()
    torch.testing.assert_close(batch.receiver[batch.mirror], batch.sender)
    torch.testing.assert_close(batch.half[batch.mirror], batch.half)
    torch.testing.assert_close(batch.half.bincount(), torch.full_like(batch.src, 2))
    torch.testing.assert_close(batch.graph_of_edge, batch.graph_of_atom[batch.sender])


def test_scored_edges_are_those_that_the_plan_counts(data: DataSet) -> None:
    plan, shape = plan_of(data, k=2), data.shape("train", 2)
    for step in range(6):
        batches = [widen(data.pack(entries, plan.table, shape)) for entries in plan.step(step)]
        assert sum(int(batch.scored.sum()) for batch in batches) == plan.edges_of(step)
        assert not any((batch.scored & (batch.atomic_numbers[batch.receiver] == 0)).any() for batch in batches)


def test_counters_number_atoms_and_graphs_inside_their_block(data: DataSet) -> None:
    table = data.table("train")
    batch = widen(data.pack([Entry(5, 3), Entry(6, 1)], table, data.shape("train", 3)))
    expected_atoms, expected_graphs = [], []
    for epoch, block in ((5, 3), (6, 1)):
        expected_atoms += [[epoch, block, i] for i in range(data.blocks["atoms"][block])]
        expected_graphs += [[epoch, block, i] for i in range(data.blocks["graphs"][block])]
    assert batch.noise_counter[: len(expected_atoms)].tolist() == expected_atoms
    assert batch.graph_counter[: len(expected_graphs)].tolist() == expected_graphs
    assert set(batch.noise_counter[len(expected_atoms) :, 1].tolist()) == {NO_BLOCK}


def test_an_empty_pack_is_all_padding(data: DataSet) -> None:
    raw = data.pack([], data.table("train"), data.shape("train", 1))
    batch = widen(raw)
    assert not batch.scored.any()
    assert not batch.atomic_numbers.any()
    full = data.pack([Entry(0, 0)], data.table("train"), data.shape("train", 1))
    for f in fields(RawPack):
        if not f.name.startswith(("block", "epoch")):  # one entry for each block
            assert getattr(raw, f.name).shape == getattr(full, f.name).shape, f.name


def test_an_empty_pack_has_the_types_of_a_full_one(data: DataSet) -> None:
    """Compiled code would be compiled again for another type."""
    raw = data.pack([], data.table("train"), data.shape("train", 1))
    full = data.pack([Entry(0, 0)], data.table("train"), data.shape("train", 1))
    assert {f.name: getattr(raw, f.name).dtype for f in fields(RawPack)} == {
        f.name: getattr(full, f.name).dtype for f in fields(RawPack)
    }


def test_every_pack_fits_the_static_shape_and_one_less_does_not(data: DataSet) -> None:
    plan = plan_of(data, k=2)
    for split in ("train", "val"):
        table, shape = data.table(split), data.shape(split, 1)
        for i in range(len(table)):
            data.pack([Entry(0, i)], table, shape)
    shape = data.shape("train", 2)
    assert len({tuple(data.pack(p, plan.table, shape).positions.shape) for s in range(6) for p in plan.step(s)}) == 1
    tight = data.pack([Entry(0, 0)], data.table("train"), None)
    exact = PackShape(len(tight.n_atoms), len(tight.positions), len(tight.edge_src))
    data.pack([Entry(0, 0)], data.table("train"), exact)
    for name in PackShape._fields:
        with pytest.raises(ValueError, match="exceeds"):
            data.pack([Entry(0, 0)], data.table("train"), exact._replace(**{name: getattr(exact, name) - 1}))


def test_as_torch_geometric_has_it(data: DataSet) -> None:
    """Each graph by itself, its distances computed from torch_geometric's fields alone."""
    batch = batch_of(data, [6, 2], data.shape("train", 3))
    stored = concatenate([graphs_in(data, 6), graphs_in(data, 2)])
    graphs = [stored.take(np.array([g])) for g in range(len(stored))]
    data_list = to_pyg(batch).to_data_list()
    assert len(data_list) == len(graphs)
    for found, graph in zip(data_list, graphs, strict=True):
        assert found.z.tolist() == graph.atomic_numbers.tolist()
        assert found.num_edges == 2 * len(graph.edge_src)
        sender, receiver = found.edge_index
        d = (found.pos[sender] + found.shift @ found.cell[0] - found.pos[receiver]).norm(dim=1)
        half = graph.positions[graph.edge_dst] + graph.edge_shift @ graph.lattice[0] - graph.positions[graph.edge_src]
        np.testing.assert_allclose(np.sort(d), np.sort(np.repeat(np.linalg.norm(half, axis=1), 2)), atol=1e-5)
        assert d.min() > 0.5
        assert d.max() < 5.0001


# -- steps -------------------------------------------------------------------------------------------------------------


def test_steps_are_what_the_plan_says(data: DataSet) -> None:
    plan = plan_of(data)
    for step in steps(data):
        assert step.edges == plan.edges_of(step.number)
        for pack, entries in zip(step.packs, plan.step(step.number), strict=True):
            assert pack.block.tolist() == [*(int(plan.table.block[e.index]) for e in entries), NO_BLOCK]
            assert pack.epoch.tolist()[:-1] == [e.epoch for e in entries]
            expected = graphs_in(data, int(pack.block[0]))
            atoms = len(expected.positions)
            np.testing.assert_array_equal(pack.positions[:atoms], expected.positions)
            assert not pack.positions[atoms:].any()


def test_an_epoch_of_steps_holds_every_crystal_once(data: DataSet) -> None:
    epoch = EpochPlan(data.table("train"), 3, 1, P, last="pad")
    with Loader(data, epoch, data.shape("train", 1), rank=0, world_size=1, first=0, end=epoch.steps_before(1)) as found:
        atoms = [pack.atomic_numbers for step in found for pack in step.packs]
    assert sum(int((z > 0).sum()) for z in atoms) == data.manifest.splits["train"]["atoms"]


def test_the_same_steps_again_and_from_the_middle(data: DataSet) -> None:
    whole = steps(data)
    assert [step.number for step in whole] == list(range(9))
    assert_same_steps(steps(data, prefetch=1), whole)
    assert_same_steps(steps(DataSet(data.folder), first=4), whole[4:])
    assert not same(whole[0].packs[0], whole[1].packs[0])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_together_read_what_one_reads(data: DataSet, ranks: int) -> None:
    together = [steps(data, rank=rank, world_size=ranks) for rank in range(ranks)]
    for n, alone in enumerate(steps(data)):
        parts = [mine[n] for mine in together]
        assert {len(part.packs) for part in parts} == {-(-P // ranks)}
        assert {part.edges for part in parts} == {alone.edges}
        packs = [pack for part in parts for pack in part.packs if len(pack.block) > 1]
        assert len(packs) == P
        assert all(same(a, b) for a, b in zip(packs, alone.packs, strict=True))


def test_fewer_blocks_than_ranks(data: DataSet) -> None:
    """Every step takes them more than once; all ranks have work, and none waits for another."""
    table = data.table("train")
    few = BlockTable(table.block[:2], table.shard[:2], table.edges[:2])
    plan, shape = EpochPlan(few, 0, 1, P), data.shape("train", 1)
    for rank in range(P):
        with Loader(data, plan, shape, rank=rank, world_size=P, first=0, end=5) as found:
            blocks = [step.packs[0].block[0] for step in found]
        assert blocks == [few.block[plan.pack(step, rank)[0].index] for step in range(5)]


def test_no_steps_is_no_mistake(data: DataSet) -> None:
    assert steps(data, first=5, last=5) == []


def test_a_consumer_that_leaves_early_leaves_no_thread(data: DataSet) -> None:
    with loader(data, last=10**6, prefetch=1) as found:
        assert [step.number for step in islice(found, 3)] == [0, 1, 2]
        assert "cdssl-loader" in [t.name for t in threading.enumerate()]
    with pytest.raises(ZeroDivisionError), loader(data, last=10**6) as found:
        next(found)
        raise ZeroDivisionError
    with loader(data, last=10**6):
        pass  # the fixture above looks for the threads


@pytest.mark.parametrize("how", ["to the end", "an exception", "a bad block"])
def test_nothing_is_left_behind(copy: Path, how: str) -> None:
    """No thread, descriptor or shared memory, however a loop ends."""

    def held() -> tuple[set[str], int, set[str]]:
        gc.collect()
        return {t.name for t in threading.enumerate()}, len(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm"))

    def go() -> None:
        with DataSet(copy) as data, loader(data, last=30) as found:
            for step in found:
                if how == "an exception" and step.number == 4:
                    raise ZeroDivisionError

    if how == "a bad block":
        spoiled(copy, [3])
    before = held()
    error = {"an exception": ZeroDivisionError, "a bad block": BadBlockError}.get(how)
    with pytest.raises(error) if error else contextlib.nullcontext():
        go()
    assert held() == before


def test_a_step_asked_for_after_the_end_is_an_error_and_no_hang(data: DataSet) -> None:
    for taken in (0, 3):
        with loader(data) as found:
            list(islice(found, taken))
        with pytest.raises(RuntimeError, match="after the end"):
            next(found)


def test_steps_are_read_ahead_but_not_without_end(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    read, plain = [], DataSet.pack

    def pack(self: DataSet, *rest: object) -> RawPack:
        read.append(rest)
        return plain(self, *rest)

    monkeypatch.setattr(DataSet, "pack", pack)
    with loader(data, last=10**6, prefetch=2 * P) as found:
        next(found)
        until = time.monotonic() + 5
        while len(read) < 4 * P and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(read) == 4 * P  # one step taken, two waiting, and one in the hand of the thread


# -- damage ------------------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_a_flipped_bit_is_an_error_that_names_shard_and_offset(copy: Path, where: float) -> None:
    before = DataSet(copy)
    block = int(before.table("train").block[7])
    shard, offset, size = (int(before.blocks[name][block]) for name in ("shard", "offset", "size"))
    name = before.manifest.shards[shard]["name"]
    flip(copy / name, offset + int(where * (size - 1)))
    data = DataSet(copy)
    with pytest.raises(DataSetError, match=rf"{name}: block {block} at byte {offset} \(\+{size}\)"):
        steps(data)
    unharmed = [b for b in range(len(data.blocks["block"])) if b != block]
    assert sum(len(decode(bytes(data.read(b)))) for b in unharmed) > 100


def test_steps_before_the_damage_are_delivered(copy: Path, data: DataSet) -> None:
    bad = 3  # in the first epoch, so that the block is met here first
    entry = plan_of(data).pack(bad, 2)[0]
    block = int(plan_of(data).table.block[entry.index])
    flip(copy / data.manifest.shards[data.blocks["shard"][block]]["name"], int(data.blocks["offset"][block]))
    taken = []
    with pytest.raises(DataSetError, match=f"block {block} "), loader(DataSet(copy)) as found:
        for step in found:
            taken.append(step)
    assert_same_steps(taken, steps(data)[:bad])


def spoiled(copy: Path, blocks: list[int]) -> DataSet:
    """The data set with blocks that are bad."""
    data = DataSet(copy)
    for block in blocks:
        name = data.manifest.shards[data.blocks["shard"][block]]["name"]
        flip(copy / name, int(data.blocks["offset"][block]))
    return data


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_skipped_block_is_missing_in_its_pack_and_nowhere_else(
    copy: Path, data: DataSet, ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The normaliser stays what all ranks know; every other block is where it was, with the noise that it had."""
    bad = int(plan_of(data).table.block[plan_of(data).pack(2, 1)[0].index])
    harmed = spoiled(copy, [bad])
    plan, shape = plan_of(data, k=2), data.shape("train", 2)
    for rank in range(ranks):
        about: dict[str, Any] = {"rank": rank, "world_size": ranks, "first": 0, "end": 3}
        with (
            Loader(data, plan, shape, **about) as sound,
            Loader(harmed, plan, shape, **about, bad_blocks="skip") as found,
        ):
            for a, b in zip(sound, found, strict=True):
                assert (a.number, a.edges) == (b.number, b.edges)
                here = [block for pack in a.packs for block in pack.block.tolist()[:-1] if block == bad]
                assert b.skipped == tuple(here)
                for x, y in zip(a.packs, b.packs, strict=True):
                    if bad not in x.block.tolist():
                        assert same(x, y)
                        continue
                    left = [i for i in range(2) if x.block[i] != bad]
                    assert y.block.tolist() == [*(int(x.block[i]) for i in left), NO_BLOCK]
                    wide, entries = widen(y), [Entry(int(x.epoch[i]), int(x.block[i])) for i in left]
                    alone = widen(data.pack(entries, BlockTable(*[np.arange(len(data.checksums))] * 3), shape))
                    assert torch.equal(wide.noise_counter, alone.noise_counter)
                    assert torch.equal(wide.positions, alone.positions)
                    assert wide.scored.sum() == alone.scored.sum() < widen(x).scored.sum()
    told = capsys.readouterr().err.splitlines()
    assert told
    assert all(f"block {bad} " in line and line.endswith("it is skipped") for line in told)


def test_a_lost_shard_is_never_skipped(copy: Path) -> None:
    data = DataSet(copy)
    (copy / "train-000002.tar").unlink()
    lost = Loader(data, plan_of(data), data.shape("train", 1), rank=0, world_size=1, first=0, end=9, bad_blocks="skip")
    with pytest.raises(DataSetError, match="lost after the start"), lost as found:
        list(found)


def test_data_that_are_bad_throughout_are_not_skipped(copy: Path) -> None:
    data = spoiled(copy, list(range(13)))
    many = Loader(data, plan_of(data), data.shape("train", 1), rank=0, world_size=1, first=0, end=9, bad_blocks="skip")
    with pytest.raises(DataSetError, match=r"11 of .* too many to skip"), many as found:
        list(found)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"), [(shorten, "bytes, .* expected"), (empty, "0 bytes"), (Path.unlink, "missing")]
)
def test_shards_that_are_short_or_missing(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy / "train-000002.tar")
    with pytest.raises(DataSetError, match=f"train-000002.tar: .*{message}"):
        DataSet(copy)


@pytest.mark.parametrize("damage", [halve, empty, Path.unlink])
def test_shards_lost_after_opening(copy: Path, damage: Callable[[Path], None]) -> None:
    """Such as by a clean-up of scratch space under a waiting job."""
    data = DataSet(copy)
    for path in copy.glob("*.tar"):
        damage(path)
    block = int(data.blocks["block"][data.blocks["shard"] == 1][-1])
    with pytest.raises(DataSetError, match=data.manifest.shards[1]["name"]):
        data.read(block)


def test_swapped_shards_are_noticed(copy: Path) -> None:
    """Of equal size, so that only checksums can tell."""
    sizes = {path.stat().st_size: path for path in sorted(copy.glob("train-*.tar"))}
    by_size = [(a, b) for a in sorted(copy.glob("train-*.tar")) if (b := sizes[a.stat().st_size]) != a]
    a, b = by_size[0]
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    with pytest.raises(DataSetError, match="does not match its checksum"):
        steps(DataSet(copy))


def test_a_foreign_block_table(copy: Path, tmp_path: Path, aflow: list[Crystal]) -> None:
    shard([from_crystals(aflow[:10])], tmp_path / "other")
    shutil.copy(tmp_path / "other" / "blocks.parquet", copy)
    with pytest.raises(DataSetError, match="another data set"):
        DataSet(copy)


def test_an_empty_split_says_so(data: DataSet) -> None:
    with pytest.raises(DataSetError, match="'test' is empty"):
        data.table("test")


@pytest.mark.gpu
def test_packs_in_pinned_memory_arrive_as_they_were(data: DataSet) -> None:
    plan, shape = plan_of(data), data.shape("train", 1)
    with Loader(data, plan, shape, rank=0, world_size=1, first=0, end=9, pin=True) as found:
        for step in found:
            for raw, entries in zip(step.packs, plan.step(step.number), strict=True):
                assert all(getattr(raw, f.name).is_pinned() for f in fields(RawPack))
                there, here = widen(raw.to(torch.device("cuda"))), widen(data.pack(entries, plan.table, shape))
                for f in fields(GraphBatch):
                    assert torch.equal(getattr(there, f.name).cpu(), getattr(here, f.name)), f.name


def test_any_error_of_the_thread_reaches_the_loop(data: DataSet) -> None:
    plan = replace(plan_of(data), blocks_per_pack=2)  # two blocks do not fit into the shape of one
    with (
        pytest.raises(ValueError, match="exceeds"),
        Loader(data, plan, data.shape("train", 1), rank=0, world_size=1, first=0, end=9) as found,
    ):
        list(found)


def test_a_pack_of_crystals_that_never_were_in_a_shard(aflow: list[Crystal]) -> None:
    """What fine-tuning does: build, collate, widen."""
    graphs, _ = build(aflow[:7], 5.0)
    raw = collate([decode_arrays(encode(graphs, np.uint16))], [(0, 0)])
    batch = widen(raw)
    assert isinstance(batch.positions, Tensor)
    assert batch.atoms_of_graph.tolist() == [*graphs.n_atoms.tolist(), 1]
    assert batch.edges_of_graph.tolist() == [*(2 * graphs.n_edges.astype(int)).tolist(), 0]
