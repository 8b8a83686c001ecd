"""Sources → a data set: a shuffle in stages, each a list of independent tasks that make a file.

1. convert   records → graphs, sorted by a hash of the reduced formula
2. decide    a range of formulas: twins, duplicates, exclusions, groups, splits; sorted by a seeded hash of the key
3. arrange   a range of keys: pack each split into blocks, count them
4. write     now that all blocks are numbered: shards and the graph table

How many ranges there are depends on the data alone, and within a range order comes from hashes and keys. So the bytes
of the result do not depend on the number of workers or their speed; and since a file is renamed into place when it is
whole, a rerun after a kill does what is missing, and its result is the same. The manifest is written last.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from sharding import convert, decide, spill, write
from sharding.crystal import Refusal
from sharding.executor import Executor
from sharding.graph import TIE
from sharding.manifest import BLOCK_SCHEMA, SPLITS, DataSetError, Manifest, write_atomically
from sharding.progress import Progress
from sharding.settings import ShardSettings
from sharding.sources import Source

WORK: Final = ".work"


class StrictError(ValueError):
    """The first refusal, with ``strict``."""


def shard(
    sources: Sequence[Source],
    out: str | Path,
    settings: ShardSettings | None = None,
    executor: Executor | None = None,
    *,
    exclude: Sequence[Source] = (),
    strict: bool = False,
) -> Manifest:
    """Convert crystal databases into a data set; run again after a failure, it goes on.

    Args:
        sources: read in this order; of crystals with one key the first is kept.
        out: a folder that does not hold a finished data set.
        settings: what shapes the result.
        executor: where tasks run; the result does not depend on it.
        exclude: crystals whose twins are kept out, of a labeled test set, say.
        strict: the first refusal is fatal.

    Raises:
        DataSetError: where ``out`` holds a data set or another sharding's work, is in use, or no crystal is left.
        StrictError: with ``strict``, at the first refusal.
    """
    settings, executor = settings or ShardSettings(), executor or Executor()
    if exclude and not settings.fingerprints:
        raise DataSetError("--exclude compares fingerprints: leave them on")
    folder = Path(out)
    if (folder / "manifest.json").exists():
        raise DataSetError(f"{folder}: holds a data set already; give another folder or remove it")
    work = folder / WORK
    with _locked(work):
        _same_task(work, [*sources, *exclude], settings)
        excluded, _ = _convert(exclude, work / "excluded", replace(settings, labels={}), executor, "exclude")
        graphs, refusals = _convert(sources, work / "1-graphs", settings, executor, "convert", strict)
        if not graphs:
            raise DataSetError(f"nothing to read in {', '.join(s.name for s in sources)}")
        decided, dropped = _decide(graphs, excluded, work / "2-decided", settings, executor)
        written, index_dtype, repeated = _write(decided, folder, settings, executor)
        refused = [*refusals, *dropped, *repeated]
        if not any(w["graphs"] for w in written):
            names = ", ".join(s.name for s in sources)
            raise DataSetError(f"no crystal is left of {names}: {_summary(refused)}")
        manifest = _finish(folder, written, refused, sources, settings, index_dtype)
    shutil.rmtree(work)
    return manifest


def _convert(
    sources: Sequence[Source],
    folder: Path,
    settings: ShardSettings,
    executor: Executor,
    title: str,
    strict: bool = False,
) -> tuple[list[Path], list[Refusal]]:
    """Stage 1: the files, and what was refused."""
    if not sources:
        return [], []
    folder.mkdir(exist_ok=True)
    paths: list[Path] = []
    refused: list[Refusal] = []
    with Progress(title, "crystals") as progress:
        for count, _, refusals in executor.map(convert.convert, convert.tasks(sources, folder, settings)):
            paths.append(folder / f"{len(paths):08d}.spill")
            refused += refusals
            if strict and refusals:
                first = refusals[0]
                raise StrictError(f"{first.source}, {first.position}: {first.text} [{first.code}]")
            progress.add(count)
    return paths, refused


def _decide(
    graphs: list[Path], excluded: list[Path], folder: Path, settings: ShardSettings, executor: Executor
) -> tuple[list[Path], list[Refusal]]:
    """Stage 2: the files, and what was dropped."""
    folder.mkdir(exist_ok=True)
    tasks = [
        decide.Decision(low, high, graphs, excluded, folder / f"{b:06d}.spill", settings)
        for b, (low, high) in enumerate(spill.ranges_of(_buckets(graphs, settings)))
    ]
    dropped: list[Refusal] = []
    with Progress("find twins", "crystals") as progress:
        for count, refusals in executor.map(decide.decide, tasks):
            dropped += refusals
            progress.add(count)
    return [task.path for task in tasks], dropped


def _write(
    decided: list[Path], folder: Path, settings: ShardSettings, executor: Executor
) -> tuple[list[dict[str, Any]], str, list[Refusal]]:
    """Stages 3 and 4: what each task wrote, in the order of the blocks; the type of indices; what was dropped."""
    work = folder / WORK
    for name in (work / "3-packed", work / "4-written", folder / "graphs.parquet"):
        name.mkdir(exist_ok=True)
    buckets = _buckets(decided, settings)
    ranges = [
        write.Packing(low, high, decided, work / "3-packed" / f"{b:06d}.spill", buckets > 1, settings)
        for b, (low, high) in enumerate(spill.ranges_of(buckets))
    ]
    packed = list(executor.map(write.arrange, ranges))
    if buckets > 1:  # what was set aside, once more and all together
        last = write.Packing(0, 2**64, [r.path for r in ranges], work / "3-packed" / "rest.spill", False, settings)
        ranges.append(last)
        packed.append(write.arrange(last))

    dtype = "uint8" if max(p.widest for p in packed) <= 256 else "uint16"
    tasks: list[write.Writing] = []
    block = shard = 0
    for split in range(len(SPLITS)):
        for packing, counts in zip(ranges, packed, strict=True):
            if n := counts.blocks[split]:
                part = len(tasks)
                path = work / "4-written" / f"{part:06d}.json"
                tasks.append(write.Writing(packing, split, n, block, shard, dtype, part, folder, path))
                block += n
                shard += -(-n // settings.blocks_per_shard)
    written = []
    with Progress("write", "crystals") as progress:
        for result in executor.map(write.write, tasks):
            written.append(result)
            progress.add(result["graphs"])
    return written, dtype, [refusal for p in packed for refusal in p.refusals]


def _finish(
    folder: Path,
    written: list[dict[str, Any]],
    refused: list[Refusal],
    sources: Sequence[Source],
    settings: ShardSettings,
    index_dtype: str,
) -> Manifest:
    """Tables, quarantine, and the manifest last."""
    blocks = [block for w in written for block in w["blocks"]]
    pq.write_table(pa.Table.from_pylist(blocks, BLOCK_SCHEMA), folder / "blocks.parquet")
    lines = "".join(json.dumps(asdict(refusal), sort_keys=True) + "\n" for refusal in refused)
    write_atomically(folder / "quarantine.jsonl", lines.encode())
    names = ["blocks.parquet", "quarantine.jsonl", *(w["part"] for w in written)]
    units = {name: unit for source in sources for name, unit in source.units.items()}
    return Manifest(
        graph={"cutoff": settings.cutoff, "tie": TIE, "index_dtype": index_dtype},
        budget=settings.budget,
        seed=settings.seed,
        splits={split: _totals(blocks, i) for i, split in enumerate(SPLITS)},
        sources=[{"name": s.name, "licence": s.licence, "cite": s.cite} for s in sources],
        labels={n: {"column": column, "unit": units.get(n, "unknown")} for n, column in settings.labels.items()},
        quarantined=dict(sorted(Counter(r.code for r in refused).items())),
        shards=[shard for w in written for shard in w["shards"]],
        tables={name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names},
    ).write(folder)


def _buckets(files: list[Path], settings: ShardSettings) -> int:
    """How many ranges a stage has: from the size of what it reads, so from the data alone."""
    return max(1, -(-sum(path.stat().st_size for path in files) // settings.bucket_bytes))


def _totals(blocks: list[dict[str, int]], split: int) -> dict[str, int]:
    mine = [b for b in blocks if b["split"] == split]
    counted = ("graphs", "atoms", "edges", "scored_edges")
    return {"blocks": len(mine)} | {name: sum(b[name] for b in mine) for name in counted}


def _summary(refused: list[Refusal]) -> str:
    counts = Counter(r.code for r in refused)
    return ", ".join(f"{n} × {code}" for code, n in counts.most_common()) or "the sources are empty"


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """One sharding in a folder at a time; the lock goes with the process, however that ends.

    Raises:
        DataSetError: where another process is at work.
    """
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataSetError(f"{work.parent}: another process is sharding into this folder; wait for it") from None
        for leftover in work.parent.rglob(".*.tmp"):
            leftover.unlink()
        yield


def _same_task(work: Path, sources: Sequence[Source], settings: ShardSettings) -> None:
    """Refuse to go on with the work of other sources or settings.

    Raises:
        DataSetError: says what to do.
    """
    path = work / "task.json"
    task = json.dumps({"sources": [s.name for s in sources], "settings": asdict(settings)}, indent=1).encode()
    if not path.exists():
        write_atomically(path, task)
    elif path.read_bytes() != task:
        raise DataSetError(
            f"{work.parent}: holds unfinished work with other sources or settings ({path}); "
            "finish it with those, or remove the folder"
        )
