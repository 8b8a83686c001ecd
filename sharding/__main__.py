"""``cdssl shard``: crystal databases → a data set of shards."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sharding.block import Budget
from sharding.commands import DONE, INTERRUPTED, Parser, UseError, command, positive
from sharding.executor import Executor
from sharding.manifest import Manifest
from sharding.pipeline import shard
from sharding.settings import ShardSettings
from sharding.sources import ReadOptions, open_sources

DEFAULT = ShardSettings()


def parser() -> Parser:
    """The command line."""
    p = Parser("cdssl shard", "Turn crystal databases into shards of precomputed periodic multigraphs.")
    p.add_argument("sources", nargs="+", metavar="SOURCE", help="a file, or a scheme such as aflow:")
    p.add_argument("--out", required=True, help="folder or URL (s3://…) of the data set; must not hold one yet")
    p.add_argument("--work", help="folder in which to build a data set bound for a URL; if omitted, under CDSSL_CACHE")
    p.add_argument("--cutoff", type=float, default=DEFAULT.cutoff, help="longest edge, Å")
    p.add_argument("--label", action="append", default=[], metavar="NAME=COLUMN", help="keep this column as a label")
    p.add_argument("--val", type=float, default=DEFAULT.val, help="share of the groups for validation")
    p.add_argument("--test", type=float, default=DEFAULT.test, help="share of the groups for testing")
    p.add_argument("--seed", type=int, default=DEFAULT.seed, help="seed of splits and order")
    p.add_argument("--block-edges", type=int, default=DEFAULT.budget.edges, help="maximum directed edges per block")
    p.add_argument("--block-atoms", type=int, default=DEFAULT.budget.atoms, help="maximum atoms per block")
    p.add_argument("--block-graphs", type=int, default=DEFAULT.budget.graphs, help="maximum graphs per block")
    p.add_argument("--blocks-per-shard", type=int, default=DEFAULT.blocks_per_shard, help="blocks per tar file")
    p.add_argument("--limit", type=positive, help="read at most this many records (rows or files) per source")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="worker processes")
    p.add_argument("--address", help="address of a Ray cluster to run on, with --workers tasks at a time")
    p.add_argument("--exclude", action="append", default=[], metavar="SOURCE", help="leave out twins of these crystals")
    p.add_argument("--exclude-keys", metavar="FILE", help="restrict --exclude to the keys in this file, one per line")
    p.add_argument(
        "--duplicates",
        choices=("keep", "exact", "near"),
        help=f"which duplicates to drop; if omitted, {DEFAULT.duplicates}, or keep without fingerprints",
    )
    p.add_argument("--no-fingerprints", action="store_true", help="do not look for twins; split by formula")
    p.add_argument(
        "--occupancy",
        choices=("refuse", "majority"),
        default="refuse",
        help="if a site has several species: refuse the crystal, or keep the most abundant one",
    )
    p.add_argument("--strict", action="store_true", help="stop at the first refused crystal")
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Shard the sources and print a summary."""
    args = parser().parse_args(argv)
    pairs = [_pair(text) for text in args.label]
    labels = dict(pairs)
    if len(labels) < len(pairs):
        raise UseError("--label: the same name is given to two columns")
    settings = ShardSettings(
        cutoff=args.cutoff,
        budget=Budget(args.block_edges, args.block_atoms, args.block_graphs),
        blocks_per_shard=args.blocks_per_shard,
        val=args.val,
        test=args.test,
        seed=args.seed,
        labels=labels,
        fingerprints=not args.no_fingerprints,
        duplicates=args.duplicates or ("keep" if args.no_fingerprints else DEFAULT.duplicates),
    )
    options = ReadOptions(labels=labels, limit=args.limit, occupancy=args.occupancy)
    excluded = ReadOptions(occupancy=args.occupancy, keys=_keys(args.exclude_keys))
    if args.exclude_keys and not args.exclude:
        raise UseError("--exclude-keys selects among the crystals of --exclude: give --exclude too")
    try:
        manifest = shard(
            open_sources(args.sources, options),
            args.out,
            settings,
            Executor(args.workers, args.address),
            exclude=open_sources(args.exclude, excluded),
            strict=args.strict,
            work=args.work,
        )
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return INTERRUPTED
    print(summary(manifest, args.out))
    return DONE


def summary(manifest: Manifest, folder: str) -> str:
    """Summarize a data set in a few lines."""
    lines = [f"{folder}: {sum(c['graphs'] for c in manifest.splits.values()):,} crystals, cutoff {manifest.cutoff} Å"]
    for split, c in manifest.splits.items():
        if c["graphs"]:
            fill = c["edges"] / (c["blocks"] * manifest.budget.edges)
            lines.append(
                f"  {split:5}  {c['graphs']:>9,} crystals  {c['atoms']:>11,} atoms  {c['edges']:>13,} directed edges"
                f"  {c['blocks']:>7,} blocks, {fill:.1%} full"
            )
    size = sum(s["size"] for s in manifest.shards)
    edges = sum(c["edges"] for c in manifest.splits.values())
    lines.append(f"  {len(manifest.shards)} shards, {size / 1e6:,.1f} MB, {size / edges:.2f} bytes per directed edge")
    refused = ", ".join(f"{n} {code}" for code, n in manifest.quarantined.items())
    lines.append(f"  quarantined: {refused or 'none'}")
    lines.append(f"  digest {manifest.digest}")
    return "\n".join(lines)


def _keys(path: str | None) -> frozenset[str] | None:
    if path is None:
        return None
    try:
        keys = frozenset(line.strip() for line in Path(path).read_text().splitlines() if line.strip())
    except UnicodeDecodeError:
        raise UseError(f"--exclude-keys {path}: not a text file with one key per line") from None
    if not keys:
        raise UseError(f"--exclude-keys {path}: contains no keys, so nothing would be excluded")
    return keys


def _pair(text: str) -> tuple[str, str]:
    name, equals, column = text.partition("=")
    if not name or not equals or not column:
        raise UseError(f"--label {text}: must be NAME=COLUMN")
    return name, column


if __name__ == "__main__":
    sys.exit(main())
