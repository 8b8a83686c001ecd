"""Sources → a data set, in three stages: convert in parallel, decide on keys and splits, pack into shards.

Nothing depends on the order in which workers finish: crystals are ordered by a seeded hash of their keys, of crystals
with one key the first in the order of the sources is kept, and a split is drawn from a seeded hash of the group. So the
bytes of the result are the same for any number of workers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from sharding.block import Budget, decode, encode
from sharding.crystal import Crystal, Refusal, reduced_formula
from sharding.graph import TIE, Multigraphs, build, concatenate
from sharding.manifest import BLOCK_SCHEMA, SPLITS, DataSetError, Manifest, read_manifest
from sharding.packing import pack, shuffled
from sharding.progress import Progress
from sharding.shards import ShardWriter
from sharding.sources import Record, Source, parse_records

T = TypeVar("T")
R = TypeVar("R")
CRYSTALS_PER_TASK: Final = 512


@dataclass(frozen=True)
class ShardSettings:
    """Everything that shapes the result."""

    cutoff: float = 5.0  # Å
    budget: Budget = field(default_factory=Budget)
    blocks_per_shard: int = 256
    val: float = 0.05  # share of the groups
    test: float = 0.0
    seed: int = 0
    labels: dict[str, str] = field(default_factory=dict)  # label name → column
    strict: bool = False  # the first refusal is fatal

    def __post_init__(self) -> None:
        if not 0.5 < self.cutoff <= 20:
            raise ValueError(f"cutoff {self.cutoff} Å is outside 0.5–20 Å")
        if min(self.val, self.test) < 0 or self.val + self.test >= 1:
            raise ValueError(f"val {self.val} and test {self.test} must leave something to train on")


@dataclass(frozen=True, slots=True)
class Spill:
    """What one conversion task leaves: graphs in a file of the block format, and what stage two decides on."""

    path: Path
    keys: list[str]
    groups: list[str]
    formulas: list[str]
    positions: list[str]
    volumes: list[float]  # Å³
    source: str
    refusals: list[Refusal]


def shard(
    sources: Sequence[Source], out: str | Path, settings: ShardSettings | None = None, workers: int = 1
) -> Manifest:
    """Convert crystal databases into a data set.

    Args:
        sources: read in this order.
        out: a folder that does not hold a data set yet.
        settings: what shapes the result.
        workers: processes that convert; the result does not depend on it.

    Raises:
        DataSetError: where ``out`` holds a data set already, or no crystal is left.
        StrictError: with ``settings.strict``, at the first refusal.
    """
    settings = settings or ShardSettings()
    folder = Path(out)
    if (folder / "manifest.json").exists():
        raise DataSetError(f"{folder}: holds a data set already; give another folder or remove it")
    work = folder / ".work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)

    spills, refusals = convert(sources, work, settings, workers)
    chosen, duplicates = choose(spills, settings)
    manifest = write_data_set(folder, spills, chosen, refusals + duplicates, sources, settings)
    shutil.rmtree(work)
    return manifest


# -- stage 1: convert ------------------------------------------------------------------------------------------------


class StrictError(ValueError):
    """The first refusal, with ``strict``."""


def convert(
    sources: Sequence[Source], work: Path, settings: ShardSettings, workers: int
) -> tuple[list[Spill], list[Refusal]]:
    """Parse and build the graphs of all sources, a spill file for each batch of records."""
    tasks = (
        (_sent(source), records, work / f"{s:03d}-{n:07d}.safetensors", settings)
        for s, source in enumerate(sources)
        for n, records in enumerate(_batches(source.records()))
    )
    spills: list[Spill] = []
    refusals: list[Refusal] = []
    with Progress("convert", "crystals") as progress:
        for spill in ordered_map(convert_records, tasks, workers):
            if settings.strict and spill.refusals:
                first = spill.refusals[0]
                raise StrictError(f"{first.source}, {first.position}: {first.text} [{first.code}]")
            refusals += spill.refusals
            if spill.keys:
                spills.append(spill)
            progress.add(len(spill.keys))
    return spills, refusals


def convert_records(task: tuple[Source, list[Record], Path, ShardSettings]) -> Spill:
    """Stage one for one batch of records, in a worker."""
    source, records, path, settings = task
    crystals: list[Crystal] = []
    refusals: list[Refusal] = []
    for item in parse_records(source, records):
        (crystals if isinstance(item, Crystal) else refusals).append(item)  # type: ignore[arg-type]
    graphs, refused = build(crystals, settings.cutoff, tuple(settings.labels))
    for i, why in sorted(refused.items()):
        refusals.append(Refusal(crystals[i].key, source.name, crystals[i].position, why.code, why.text))
    kept = [c for i, c in enumerate(crystals) if i not in refused]
    fits = (graphs.n_edges.astype(np.int64) * 2 <= settings.budget.edges) & (graphs.n_atoms <= settings.budget.atoms)
    for i in np.flatnonzero(~fits).tolist():
        text = f"{2 * graphs.n_edges[i]} edges and {graphs.n_atoms[i]} atoms do not fit into a block; raise its budget"
        refusals.append(Refusal(graphs.keys[i], source.name, kept[i].position, "oversized", text))
    if not fits.all():
        graphs = graphs.take(np.flatnonzero(fits))
        kept = [c for c, fit in zip(kept, fits, strict=True) if fit]
    if kept:
        path.write_bytes(encode(graphs, np.uint16))
    formulas = [reduced_formula(c.atomic_numbers) for c in kept]
    return Spill(
        path=path,
        keys=graphs.keys,
        groups=[c.group or formula for c, formula in zip(kept, formulas, strict=True)],
        formulas=formulas,
        positions=[c.position for c in kept],
        volumes=np.abs(np.linalg.det(graphs.lattice.astype(np.float64))).tolist(),
        source=source.name,
        refusals=refusals,
    )


def _sent(source: Source) -> Source:
    """The source as it travels to a worker, which parses but does not read: an open file cannot be sent."""
    return replace(source, records=_no_records)


def _no_records() -> Iterator[Record]:
    return iter(())


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    """Records for one task each. A record of many crystals is a task by itself."""
    for first in records:
        many = not isinstance(first.payload, Crystal)
        yield [first] if many else [first, *itertools.islice(records, CRYSTALS_PER_TASK - 1)]


def ordered_map(function: Callable[[T], R], tasks: Iterable[T], workers: int) -> Iterator[R]:
    """Map in processes; results in the order of the tasks, few tasks ahead so that memory stays bounded."""
    if workers <= 1:
        yield from map(function, tasks)
        return
    ahead: deque[Future[R]] = deque()
    # spawn: a fork of a process that runs threads (pyarrow's, say) can deadlock
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for task in tasks:
                ahead.append(pool.submit(function, task))
                if len(ahead) >= 3 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


# -- stage 2: decide -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chosen:
    """The graphs of one split in the order of their seeded hash: which spill, and which graph of it."""

    spill: np.ndarray  # (G,)
    graph: np.ndarray  # (G,)
    keys: list[str]


def choose(spills: list[Spill], settings: ShardSettings) -> tuple[dict[str, Chosen], list[Refusal]]:
    """One graph for each key, a split for each group, an order for all."""
    seen: dict[str, tuple[int, int]] = {}
    duplicates: list[Refusal] = []
    for s, spill in enumerate(spills):
        for g, key in enumerate(spill.keys):
            if key in seen:
                text = f"{key!r} was met before, in {spills[seen[key][0]].source}; the first one is kept"
                duplicates.append(Refusal(key, spill.source, spill.positions[g], "duplicate_key", text))
            else:
                seen[key] = (s, g)
    members: dict[str, list[str]] = {split: [] for split in SPLITS}
    for key, (s, g) in seen.items():
        members[split_of(spills[s].groups[g], settings)].append(key)
    chosen = {}
    for split, keys in members.items():
        keys = [keys[i] for i in shuffled(keys, settings.seed)]
        at = np.array([seen[key] for key in keys], np.int64).reshape(-1, 2)
        chosen[split] = Chosen(at[:, 0], at[:, 1], keys)
    return chosen, duplicates


def split_of(group: str, settings: ShardSettings) -> str:
    """The split of a group, from a seeded hash of its name: adding data never moves a group to another split."""
    u = xxhash.xxh3_64_intdigest(f"split/{group}".encode(), settings.seed) / 2**64
    return "val" if u < settings.val else "test" if u < settings.val + settings.test else "train"


# -- stage 3: pack and write -----------------------------------------------------------------------------------------


def write_data_set(
    folder: Path,
    spills: list[Spill],
    chosen: dict[str, Chosen],
    refusals: list[Refusal],
    sources: Sequence[Source],
    settings: ShardSettings,
) -> Manifest:
    """Pack every split into blocks, write shards and tables, and the manifest last."""
    total = sum(len(c.keys) for c in chosen.values())
    if total == 0:
        raise DataSetError(f"no crystal is left of {', '.join(s.name for s in sources)}: {_summary(refusals)}")
    loaded = [decode(spill.path.read_bytes()) for spill in spills]
    widest = max(int(graphs.n_atoms.max()) for graphs in loaded)
    index_dtype = np.uint8 if widest <= 256 else np.uint16

    blocks: list[dict[str, int]] = []
    shards: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    with Progress("pack", "crystals", total) as progress:
        for split_index, split in enumerate(SPLITS):
            writer: ShardWriter | None = None
            for graphs, rows in _blocks_of(chosen[split], spills, loaded, settings.budget):
                if writer is None:
                    writer = ShardWriter(folder / f"{split}-{len(shards):06d}.tar")
                number = len(blocks)
                writer.add(number, encode(graphs, index_dtype))
                _, offset, size, xxh3 = writer.members[-1]
                blocks.append(
                    {
                        "block": number,
                        "shard": len(shards),
                        "offset": offset,
                        "size": size,
                        "split": split_index,
                        "graphs": len(graphs),
                        "atoms": int(graphs.n_atoms.sum()),
                        "edges": 2 * int(graphs.n_edges.sum()),
                        "scored_edges": 2 * int(graphs.scored_edges().sum()),
                        "xxh3": xxh3,
                    }
                )
                table += [row | {"block": number, "split": split} for row in rows]
                if len(writer.members) == settings.blocks_per_shard:
                    shards.append(writer.close())
                    writer = None
                progress.add(len(graphs))
            if writer is not None:
                shards.append(writer.close())

    pq.write_table(pa.Table.from_pylist(blocks, BLOCK_SCHEMA), folder / "blocks.parquet")
    (folder / "graphs.parquet").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(table), folder / "graphs.parquet" / "part-00000.parquet")
    with open(folder / "quarantine.jsonl", "w") as file:
        for refusal in sorted(refusals, key=lambda r: (r.source, r.position, r.key, r.code)):
            file.write(json.dumps(asdict(refusal), sort_keys=True) + "\n")
    names = ("blocks.parquet", "graphs.parquet/part-00000.parquet", "quarantine.jsonl")
    units = {name: unit for source in sources for name, unit in source.units.items()}
    return Manifest(
        graph={"cutoff": settings.cutoff, "tie": TIE, "index_dtype": np.dtype(index_dtype).name},
        budget=settings.budget,
        seed=settings.seed,
        splits={split: _totals(blocks, i) for i, split in enumerate(SPLITS)},
        sources=[{"name": s.name, "licence": s.licence, "cite": s.cite} for s in sources],
        labels={n: {"column": column, "unit": units.get(n, "unknown")} for n, column in settings.labels.items()},
        quarantined=dict(sorted(Counter(r.code for r in refusals).items())),
        shards=shards,
        tables={name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names},
    ).write(folder)


def _blocks_of(
    chosen: Chosen, spills: list[Spill], loaded: list[Multigraphs], budget: Budget
) -> Iterator[tuple[Multigraphs, list[dict[str, Any]]]]:
    """The blocks of one split, each with the rows of its graphs for the graph table."""
    edges = np.array([2 * loaded[s].n_edges[g] for s, g in zip(chosen.spill, chosen.graph, strict=True)], np.int64)
    atoms = np.array([loaded[s].n_atoms[g] for s, g in zip(chosen.spill, chosen.graph, strict=True)], np.int64)
    block_of, _ = pack(edges, atoms, budget)
    order = np.argsort(block_of, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(block_of[order])) + 1):
        if len(members) == 0:
            continue
        graphs = concatenate([loaded[chosen.spill[i]].take(chosen.graph[i : i + 1]) for i in members])
        yield graphs, [_row(spills[chosen.spill[i]], loaded[chosen.spill[i]], int(chosen.graph[i])) for i in members]


def _row(spill: Spill, graphs: Multigraphs, g: int) -> dict[str, Any]:
    """One line of the graph table."""
    return {
        "key": spill.keys[g],
        "formula": spill.formulas[g],
        "n_atoms": int(graphs.n_atoms[g]),
        "n_edges": 2 * int(graphs.n_edges[g]),
        "volume": spill.volumes[g],
        "group": spill.groups[g],
        "source": spill.source,
        **{f"y.{name}": float(values[g]) for name, values in graphs.labels.items()},
    }


def _totals(blocks: list[dict[str, int]], split: int) -> dict[str, int]:
    mine = [b for b in blocks if b["split"] == split]
    counted = ("graphs", "atoms", "edges", "scored_edges")
    return {"blocks": len(mine)} | {name: sum(b[name] for b in mine) for name in counted}


def _summary(refusals: list[Refusal]) -> str:
    counts = Counter(r.code for r in refusals)
    return ", ".join(f"{n} × {code}" for code, n in counts.most_common()) or "the sources are empty"


def existing(folder: str | Path) -> Manifest | None:
    """The manifest of a finished data set, or None where there is nothing yet."""
    return read_manifest(folder) if (Path(folder) / "manifest.json").exists() else None
