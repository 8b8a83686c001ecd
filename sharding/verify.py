"""``cdssl verify``: read an entire data set and check it against its checksums and the format."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from sharding.commands import DONE, FAILED, Parser, UseError, command, positive
from sharding.executor import Executor
from sharding.findings import Report
from sharding.invariants import Rules
from sharding.manifest import Manifest
from sharding.place import Place, place_of
from sharding.progress import Progress
from sharding.sources.streams import redacted
from sharding.verify_graphs import GraphTable, check_keys, key_tasks, open_graph_table
from sharding.verify_shard import ShardTask, check_shard
from sharding.verify_tables import (
    BLOCKS,
    check_block_table,
    check_files,
    check_quarantine,
    read_block_table,
    read_checked,
)

SAMPLE: Final = 0.05  # fraction of the blocks whose neighbour lists are recomputed
_SHOWN: Final = 200  # findings for people; --json has them all


def verify(folder: str | Path, executor: Executor | None = None, *, sample: float = SAMPLE) -> Report:
    """Check everything that the format promises of a data set.

    Every byte is read once. Memory holds a block, the rows of a shard's graphs and a bounded number of hashes of keys.

    Args:
        folder: the data set, or its URL.
        executor: where shards are read, several at a time.
        sample: fraction of the blocks whose neighbour lists are recomputed from the stored positions, at least one per
            shard; 0 skips this check, 1 covers all blocks.

    Returns:
        What was read and what was found; a valid data set has no findings.

    Raises:
        DataSetError: if the folder is not a data set, or one of a newer version.
        OSError: if it cannot be reached.
    """
    place, executor = place_of(folder), executor or Executor()
    place.require()
    manifest, found = read_checked(place)
    report = Report(findings=found)
    if manifest is None:
        return report
    report.digest = manifest.digest
    report.findings += check_files(place, manifest)
    # A damaged table must not make good shards look bad: they are not checked against it.
    damaged = {finding.file for finding in report.findings}
    blocks = None
    if BLOCKS not in damaged:
        blocks, found = read_block_table(place)
        report.findings += found
    if blocks is not None:
        report.findings += check_block_table(blocks, manifest)
    n_blocks = 0 if blocks is None else len(blocks["block"])
    graphs, found = open_graph_table(place, manifest, n_blocks, damaged)
    report.findings += found
    report.findings += check_quarantine(place, manifest)

    tasks = _shard_tasks(place, manifest, blocks, graphs, sample)
    with Progress("verify", "MB", total=sum(task.entry["size"] for task in tasks) // 10**6) as progress:
        for part in executor.map(check_shard, tasks):
            before = report.bytes
            _add(report, part)
            progress.add(report.bytes // 10**6 - before // 10**6)
    with Progress("verify keys", "crystals", total=len(graphs)) as progress:
        for found in executor.map(check_keys, key_tasks(graphs)):
            report.findings += found
        progress.add(len(graphs))
    return report


def _shard_tasks(
    place: Place, manifest: Manifest, blocks: dict[str, np.ndarray] | None, graphs: GraphTable, sample: float
) -> list[ShardTask]:
    labels = frozenset(manifest.labels)
    rules = Rules(manifest.cutoff, manifest.graph["index_dtype"], manifest.budget, labels)
    tasks = []
    order = bounds = np.empty(0, np.int64)
    if blocks is not None:
        order = np.lexsort((blocks["offset"], blocks["shard"]))
        bounds = np.searchsorted(blocks["shard"][order], np.arange(len(manifest.shards) + 1))
    for i, entry in enumerate(manifest.shards):
        mine = rows = None
        if blocks is not None:
            mine = {name: column[order[bounds[i] : bounds[i + 1]]] for name, column in blocks.items()}
            rows = graphs.rows(mine["block"])
        split = str(entry["name"]).split("-")[0]
        tasks.append(ShardTask(place, entry, mine, rows, split, rules, sample, manifest.seed))
    return tasks


def _add(report: Report, part: Report) -> None:
    for name in ("shards", "blocks", "graphs", "edges", "bytes", "recomputed"):
        setattr(report, name, getattr(report, name) + getattr(part, name))
    report.findings += part.findings


def parser() -> Parser:
    """The command line."""
    p = Parser(
        "cdssl verify",
        "Read an entire data set and check it against its checksums and its format. Exits with 1 if anything is wrong.",
    )
    p.add_argument("folder", metavar="DIR", help="the data set: a folder, or a URL")
    p.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes that read shards")
    p.add_argument("--address", help="address of a Ray cluster to run on, with --workers shards at a time")
    p.add_argument("--sample", type=float, default=SAMPLE, help="fraction of the blocks whose edges are recomputed")
    p.add_argument("--json", action="store_true", help="print one JSON object with all findings")
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Verify a data set and print the findings; exit code 0 if it is valid, 1 if not, 2 for a wrong argument."""
    args = parser().parse_args(argv)
    if not 0 <= args.sample <= 1:
        raise UseError(f"--sample {args.sample}: must be a fraction from 0 to 1")
    started = time.monotonic()
    with Executor(args.workers, args.address) as executor:
        report = verify(args.folder, executor, sample=args.sample)
    seconds = time.monotonic() - started
    print(json.dumps(report.as_dict(), indent=1) if args.json else describe(report, redacted(args.folder), seconds))
    return DONE if report.ok else FAILED


def describe(report: Report, folder: str, seconds: float) -> str:
    """Format the report for people; one line for a valid data set."""
    if report.ok:
        return (
            f"ok: {folder}: {report.graphs:,} crystals in {report.blocks:,} blocks and {report.shards:,} shards, "
            f"{report.bytes / 1e6:,.1f} MB in {seconds:.0f} s, neighbour lists of {report.recomputed:,} blocks "
            f"recomputed; digest {report.digest}"
        )
    lines = [str(finding) for finding in report.findings[:_SHOWN]]
    if len(report.findings) > _SHOWN:
        lines.append(f"… and {len(report.findings) - _SHOWN:,} more; --json lists all")
    if first := report.first_bad:
        lines.append(f"first bad bytes: {first.file}, offset {first.offset}, size {first.size}")
    counted = f"{len(report.findings):,} finding{'s' if len(report.findings) > 1 else ''}"
    return "\n".join([*lines, f"damaged: {folder}: {counted}"])


if __name__ == "__main__":
    sys.exit(main())
