"""Sources → a data set: a shuffle in four stages, each a list of independent tasks that write one file each.

1. convert   records → graphs, sorted by a hash of the reduced formula (many small files are merged into fewer)
2. decide    a range of formulas: twins, duplicates, exclusions, groups, splits; sorted by a seeded hash of the key
3. arrange   a range of keys: pack each split into blocks, count them
4. write     now that all blocks are numbered: shards and the graph table

The number of ranges depends on the data alone, and the order within a range on hashes and keys. So the bytes of the
result do not depend on the number of workers or their speed; and since a file is renamed into place when complete, a
rerun after a kill does only what is missing, with the same result. The manifest is written last.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from sharding import convert, decide, spill, write
from sharding.crystal import Refusal
from sharding.executor import Executor
from sharding.graph import TIE
from sharding.manifest import BLOCK_SCHEMA, SPLITS, DataSetError, Manifest, write_atomically
from sharding.progress import Progress
from sharding.settings import ShardSettings
from sharding.sources import Source
from sharding.storage import target_of, writing
from sharding.workspace import Quarantine, Workspace, describe

MANY_READS: Final = 20_000  # reads, of half a millisecond each; if stage 2 would need more, files are merged first
MOST_BUCKETS: Final = 4_096  # each reads from all files of the previous stage, of which there are as many


class StrictError(ValueError):
    """Raised at the first refusal if ``strict`` is set."""


def shard(
    sources: Sequence[Source],
    out: str | Path,
    settings: ShardSettings | None = None,
    executor: Executor | None = None,
    *,
    exclude: Sequence[Source] = (),
    strict: bool = False,
    work: str | Path | None = None,
) -> Manifest:
    """Convert crystal databases into a data set. Run again after a failure, it continues where it stopped.

    Args:
        sources: read in this order; of crystals with the same key, the first is kept.
        out: a folder or fsspec URL that does not hold a finished data set.
        settings: everything besides the sources that determines the result.
        executor: where tasks run; the result does not depend on it.
        exclude: sources whose twins are left out, for example a labeled test set.
        strict: raise at the first refusal.
        work: for a URL, the folder in which the data set is built before it is uploaded; see ``storage.Remote``.

    Raises:
        DataSetError: if ``out`` holds a data set or another task's work, is in use, or no crystal is left.
        StrictError: with ``strict``, at the first refusal.
        SourceError: if a source fails midway, or fsspec lacks a package for ``out``.
        TargetError: if ``out`` cannot be written, for example because the disk is full.
        WorkerError: if a worker process died.
    """
    settings = settings or ShardSettings()
    if exclude and not settings.fingerprints:
        raise DataSetError("--exclude compares fingerprints: do not turn them off")
    _check_units(sources)
    target = target_of(out, work)
    target.check()
    with writing(target.folder), Workspace(target.folder, describe(sources, exclude, settings)).opened() as space:
        manifest = space.finished
        if manifest is None:
            with executor or Executor() as workers, Quarantine(space.folder / "quarantine.jsonl") as refused:
                manifest = _Stages(settings, workers, space, refused, strict).run(sources, exclude)
        target.publish(manifest)
        space.remove()
    target.remove()
    return manifest


@dataclass(frozen=True)
class _Stages:
    """The stages of one sharding run, and what they share."""

    settings: ShardSettings
    executor: Executor
    space: Workspace
    refused: Quarantine
    strict: bool

    def run(self, sources: Sequence[Source], exclude: Sequence[Source]) -> Manifest:
        """Run all stages."""
        excluded = self.exclude(exclude)
        graphs = self.convert("convert", sources, self._folder("1-graphs"), self.settings) if sources else []
        names = ", ".join(source.name for source in sources)
        if not graphs:
            raise DataSetError(f"nothing to read in {names}")
        self.space.converted([*excluded, *graphs])
        decided = self.decide(self.merge(graphs), excluded)
        packings, packed = self.pack(decided)
        if not any(sum(p.blocks) for p in packed):
            raise DataSetError(f"no crystal is left of {names}: {self.refused.summary() or 'the sources are empty'}")
        return self.write(packings, packed, sources)

    def exclude(self, sources: Sequence[Source]) -> list[Path]:
        """Stage 1 for the sources to exclude, where refusals matter too: twins of a refused crystal are not found."""
        if not sources:
            return []
        unlabelled = replace(self.settings, labels={})
        files = self.convert("exclude", sources, self._folder("excluded"), unlabelled, _hides_twins)
        _all_met(sources, files)
        return files

    def convert(
        self,
        title: str,
        sources: Sequence[Source],
        folder: Path,
        settings: ShardSettings,
        noted: Callable[[Refusal], Refusal] = lambda refusal: refusal,
    ) -> list[Path]:
        """Run stage 1 and return its files."""
        paths: list[Path] = []
        with Progress(title, "crystals") as progress:
            for done in self.executor.map(convert.convert, convert.tasks(sources, folder, settings)):
                paths.append(done.path)
                if self.strict and done.refused:
                    first = done.refused[0]
                    raise StrictError(f"{first.source}, {first.position}: {first.text} [{first.code}]")
                self.refused.add(list(map(noted, done.refused)))
                progress.add(done.crystals)
        return paths

    def merge(self, files: list[Path]) -> list[Path]:
        """Merge many files into fewer, since each task of stage 2 reads from every file."""
        if len(files) * _buckets(files, self.settings) <= MANY_READS:
            return files
        folder = self._folder("2-merged")
        groups = _together(files, _bucket_bytes(files, self.settings))
        tasks = [spill.Merging(parts, folder / f"{i:06d}.spill") for i, parts in enumerate(groups)]
        with Progress("merge", "crystals") as progress:
            for count in self.executor.map(spill.merge, tasks):
                progress.add(count)
        return [task.path for task in tasks]

    def decide(self, graphs: list[Path], excluded: list[Path]) -> list[Path]:
        """Run stage 2 and return its files."""
        folder = self._folder("2-decided")
        tasks = [
            decide.Decision(low, high, graphs, excluded, folder / f"{b:06d}.spill", self.settings)
            for b, (low, high) in enumerate(spill.ranges_of(_buckets(graphs, self.settings)))
        ]
        with Progress("find twins", "crystals") as progress:
            for count, refusals in self.executor.map(decide.decide, tasks):
                self.drop(refusals)
                progress.add(count)
        return [task.path for task in tasks]

    def pack(self, decided: list[Path]) -> tuple[list[write.Packing], list[write.Packed]]:
        """Run stage 3; return the packings in the order of their blocks, and their results.

        What the ranges set aside is packed again, several files at a time, until one task holds all that is left.
        """
        folder, settings = self._folder("3-packed"), self.settings
        ranges = spill.ranges_of(_buckets(decided, settings))
        tasks = [
            write.Packing(low, high, decided, folder / f"{b:06d}.spill", len(ranges) > 1, settings)
            for b, (low, high) in enumerate(ranges)
        ]
        packings: list[write.Packing] = []
        packed: list[write.Packed] = []
        with Progress("pack", "crystals") as progress:
            while tasks:
                for result in self.executor.map(write.arrange, tasks):
                    packed.append(result)
                    self.drop(result.refusals)
                    progress.add(result.graphs)
                packings += tasks
                rests = _together([task.path for task in tasks if task.set_aside], settings.bucket_bytes)
                tasks = [
                    write.Packing(0, 2**64, paths, folder / f"{b:06d}.spill", len(rests) > 1, settings)
                    for b, paths in enumerate(rests, len(packings))
                ]
        return packings, packed

    def write(self, packings: list[write.Packing], packed: list[write.Packed], sources: Sequence[Source]) -> Manifest:
        """Run stage 4, then write the tables, the quarantine and, last, the manifest."""
        done, folder, settings = self._folder("4-written"), self.space.folder, self.settings
        (folder / "graphs.parquet").mkdir(exist_ok=True)
        index_dtype = "uint8" if max(p.widest for p in packed) <= 256 else "uint16"
        tasks: list[write.Writing] = []
        block = shard = 0
        for split in range(len(SPLITS)):
            for packing, counts in zip(packings, packed, strict=True):
                if n := counts.blocks[split]:
                    part = len(tasks)
                    path = done / f"{part:06d}.json"
                    tasks.append(write.Writing(packing, split, n, block, shard, index_dtype, part, folder, path))
                    block += n
                    shard += -(-n // settings.blocks_per_shard)
        names, shards, tables = [], [], []
        labelled: Counter[str] = Counter()
        with Progress("write", "crystals", sum(p.graphs for p in packed)) as progress:
            for result in self.executor.map(write.write, tasks):
                names.append(result["part"])
                shards += result["shards"]
                tables.append(pa.Table.from_pylist(result["blocks"], BLOCK_SCHEMA))
                labelled.update(result["labelled"])
                progress.add(result["graphs"])

        for name, column in settings.labels.items():
            if not labelled[name]:
                print(
                    f"warning: no crystal has a label {name!r}; is {column!r} the name of its column?", file=sys.stderr
                )
        blocks = pa.concat_tables(tables).combine_chunks()
        write_atomically(folder / "blocks.parquet", write.parquet(blocks))
        self.refused.finish()
        units = {name: unit for source in sources for name, unit in source.units.items()}
        return Manifest(
            graph={"cutoff": settings.cutoff, "tie": TIE, "index_dtype": index_dtype},
            budget=settings.budget,
            seed=settings.seed,
            splits={split: _totals(blocks, i) for i, split in enumerate(SPLITS)},
            sources=[{"name": s.name, "licence": s.licence, "cite": s.cite} for s in sources],
            labels={n: {"column": column, "unit": units.get(n, "unknown")} for n, column in settings.labels.items()},
            quarantined=dict(sorted(self.refused.counts.items())),
            shards=shards,
            tables={
                name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
                for name in ("blocks.parquet", "quarantine.jsonl", *names)
            },
        ).write(folder)

    def drop(self, refusals: Sequence[Refusal]) -> None:
        """Record the refusals of stages 2 and 3. With ``strict``, a repeated key raises; a dropped twin does not."""
        for refusal in refusals:
            if self.strict and refusal.code == "duplicate_key":
                raise StrictError(f"{refusal.source}, {refusal.position}: {refusal.text} [{refusal.code}]")
        self.refused.add(refusals)

    def _folder(self, name: str) -> Path:
        folder = self.space.path / name
        folder.mkdir(exist_ok=True)
        return folder


def _check_units(sources: Sequence[Source]) -> None:
    """Require one unit per label: in a single column, values in different units could not be told apart."""
    stated: dict[str, tuple[str, str]] = {}
    for source in sources:
        for label, unit in source.units.items():
            other, there = stated.setdefault(label, (source.name, unit))
            if there != unit:
                raise DataSetError(
                    f"label {label!r} is in {there} in {other}, and in {unit} in {source.name}: convert one of them"
                )


def _hides_twins(refusal: Refusal) -> Refusal:
    text = f"of the excluded: {refusal.text} [{refusal.code}]; twins of it, if there are any, are not kept out"
    return replace(refusal, code="exclude_refused", text=text)


def _all_met(exclude: Sequence[Source], files: list[Path]) -> None:
    """Check that the keys to exclude exist: a list of wrong ids would exclude nothing."""
    wanted = {key for source in exclude for key in (source.options and source.options.keys) or ()}
    if not wanted:
        return
    met = {key for path in files for key in spill.read(path).rows["key"].to_pylist()}
    met |= {refusal.key for path in files for refusal in spill.refusals(path)}
    if absent := sorted(wanted - met):
        listed = ", ".join(map(repr, absent[:5])) + (", …" if len(absent) > 5 else "")
        raise DataSetError(f"{len(absent)} of {len(wanted)} keys to exclude are in no excluded source: {listed}")


def _buckets(files: list[Path], settings: ShardSettings) -> int:
    """The number of ranges of a stage, from the size of its input, so from the data alone."""
    return max(1, -(-_size(files) // _bucket_bytes(files, settings)))


def _bucket_bytes(files: list[Path], settings: ShardSettings) -> int:
    """Bytes a task holds at a time; more for very large inputs, since reads grow with the square of the buckets."""
    return max(settings.bucket_bytes, -(-_size(files) // MOST_BUCKETS))


def _size(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def _together(files: list[Path], size: int) -> list[list[Path]]:
    """Group neighbouring files to about ``size`` bytes, at least two each where possible, so that they get fewer."""
    groups: list[list[Path]] = []
    room = 0
    for path in files:
        bytes_ = path.stat().st_size
        if not groups or (bytes_ > room and len(groups[-1]) > 1):
            groups.append([])
            room = size
        groups[-1].append(path)
        room -= bytes_
    return groups


def _totals(blocks: pa.Table, split: int) -> dict[str, int]:
    mine = blocks.filter(pc.equal(blocks["split"], split))
    counted = ("graphs", "atoms", "edges", "scored_edges")
    return {"blocks": len(mine)} | {name: pc.sum(mine[name]).as_py() or 0 for name in counted}
