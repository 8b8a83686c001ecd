"""``cdssl inspect``: what is in a data set, from its manifest and its tables. Shards are not read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from sharding.commands import DONE, FAILED, Parser, command
from sharding.manifest import SPLITS, DataSetError, Manifest, write_atomically
from sharding.page import page
from sharding.place import Place, place_of
from sharding.sources.streams import base_name, redacted
from sharding.tally import Refusals, Rows, Sizes, ratio

DUPLICATES: Final = ("duplicate", "duplicate_key", "excluded")  # reasons that are not errors of the crystal
_BATCH: Final = 65_536  # rows


def inspect(folder: str | Path, budgets: Sequence[int] = ()) -> dict[str, Any]:
    """Describe a data set as one JSON object; ``docs/format.md`` lists its fields.

    Args:
        folder: the data set, or its URL.
        budgets: block sizes in directed edges; for each, the number of graphs that would not fit is given.

    Raises:
        DataSetError: if the folder is not a data set, or a table cannot be read.
    """
    place = place_of(folder)
    manifest = place.manifest()
    rows = Rows(tuple(manifest.labels))
    refused = Refusals()
    try:
        for batch in _batches(place, manifest):
            rows.add(batch)
        with place.open("quarantine.jsonl") as file:
            for line in file:
                refused.add(json.loads(line))
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as why:
        raise DataSetError(f"{place}: a table cannot be read ({why}); `cdssl verify` shows what is damaged") from None
    return _totals(manifest) | {
        "sizes": {"atoms": rows.atoms.summary(), "edges": rows.edges.summary()},
        "elements": rows.elements(),
        "labels": {name: about | rows.labels[name].summary() for name, about in manifest.labels.items()},
        "sources": [source | {"graphs": rows.sources[source["name"]]} for source in manifest.sources],
        "largest": [{"key": key, "formula": formula, "atoms": n, "edges": e} for e, n, key, formula in rows.largest],
        "refusals": refused.examples,
        "budgets": [_over(budget, rows.edges, refused) for budget in budgets],
    }


def _totals(manifest: Manifest) -> dict[str, Any]:
    """What the manifest itself says."""
    names = ("graphs", "atoms", "edges", "scored_edges", "blocks")
    total = {name: sum(split[name] for split in manifest.splits.values()) for name in names}
    size = sum(shard["size"] for shard in manifest.shards)
    budget = manifest.budget
    splits = {
        split: manifest.splits[split]
        | {"fill": ratio(manifest.splits[split]["edges"], manifest.splits[split]["blocks"] * budget.edges)}
        for split in SPLITS
    }
    return total | {
        "shards": len(manifest.shards),
        "bytes": size,  # of the shards
        "fill": ratio(total["edges"], total["blocks"] * budget.edges),
        "bytes_per_edge": ratio(size, total["edges"]),
        "digest": manifest.digest,
        "version": manifest.version,
        "cutoff": manifest.cutoff,
        "index_dtype": manifest.graph["index_dtype"],
        "budget": {"edges": budget.edges, "atoms": budget.atoms, "graphs": budget.graphs},
        "seed": manifest.seed,
        "splits": splits,
        "quarantined": manifest.quarantined,
        "duplicates": {code: manifest.quarantined.get(code, 0) for code in DUPLICATES},
    }


def _over(budget: int, edges: Sizes, refused: Refusals) -> dict[str, Any]:
    """Count the graphs too large for a block of this many edges, including those already refused for their size."""
    stored, oversized = edges.counts.total(), refused.oversized.counts.total()
    over = edges.over(budget) + refused.oversized.over(budget)
    of = stored + oversized
    return {"edges": budget, "refused": over, "of": of, "share": ratio(over, of), "unknown": refused.unknown}


def _batches(place: Place, manifest: Manifest) -> Iterator[pa.RecordBatch]:
    names = [name for name in manifest.tables if name.startswith("graphs.parquet/")]
    columns = ["key", "formula", "n_atoms", "n_edges", "source", *(f"y.{name}" for name in manifest.labels)]
    for name in sorted(names):
        with place.open(name) as opened, pq.ParquetFile(opened) as file:
            yield from file.iter_batches(_BATCH, columns=columns, use_threads=False)


def describe(found: dict[str, Any], folder: str) -> str:
    """Format what ``inspect`` returns for people."""

    def listed(items: Iterable[str]) -> str:
        return ", ".join(items) or "none"

    def sized(name: str) -> str:
        s = found["sizes"][name]
        most = max((b["graphs"] for b in s["histogram"]), default=1)
        bars = "".join(" ▁▂▃▄▅▆▇█"[-(-8 * b["graphs"] // most)] for b in s["histogram"])
        return f"mean {s['mean']:,.0f}, median {s['median']:,}, 99% up to {s['p99']:,}, at most {s['max']:,}  {bars}"

    elements = [f"{s} {ratio(n, found['graphs']):.0%}" for s, n in list(found["elements"].items())[:12]]
    labels = [f"{n} [{about['unit']}] {about['missing']:.1%} missing" for n, about in found["labels"].items()]
    counts = [f"{n:,} {code}" for code, n in found["quarantined"].items()]
    lines = {
        "": f"{found['graphs']:,} crystals, {found['atoms']:,} atoms, {found['edges']:,} directed edges within "
        f"{found['cutoff']} Å",
        "splits": listed(
            f"{n} {s['graphs']:,} ({s['fill']:.1%} full)" for n, s in found["splits"].items() if s["graphs"]
        ),
        "stored": f"{found['shards']:,} shards, {found['blocks']:,} blocks, {found['fill']:.1%} full, "
        f"{found['bytes'] / 1e6:,.1f} MB, {found['bytes_per_edge']:.2f} bytes per directed edge",
        "atoms": sized("atoms"),
        "edges": sized("edges"),
        "elements": f"{len(found['elements'])}: {listed(elements)}{', …' if len(found['elements']) > 12 else ''}",
        "labels": listed(labels),
        "refused": listed(counts),
        "duplicates": listed(f"{n:,} {code}" for code, n in found["duplicates"].items() if n),
        "sources": listed(f"{s['name']} ({s['licence']}): {s['graphs']:,}" for s in found["sources"]),
        "digest": found["digest"],
    }
    text = [f"{folder}: {lines.pop('')}", *(f"  {name:11} {line}" for name, line in lines.items())]
    for b in found["budgets"]:
        unknown = f", and {b['unknown']:,} of unknown size" if b["unknown"] else ""
        text.append(f"  {b['refused']:,} of {b['of']:,} graphs ({b['share']:.3%}) exceed {b['edges']:,} edges{unknown}")
    return "\n".join("".join(c if c.isprintable() else "�" for c in line) for line in text)


def _name(folder: str) -> str:
    return base_name(folder) if "://" in folder else Path(folder).resolve().name


def parser() -> Parser:
    """The command line."""
    p = Parser("cdssl inspect", "Show what is in a data set.")
    p.add_argument("folder", metavar="DIR", help="the data set: a folder, or a URL")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("--html", metavar="FILE", help="write a page with histograms and an element heat map")
    p.add_argument(
        "--budget",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="show how many graphs would not fit a block of N directed edges (repeatable)",
    )
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Inspect a data set; exit code 0, 1 if it is damaged, 2 for a wrong argument."""
    args = parser().parse_args(argv)
    place_of(args.folder).require()
    try:
        found = inspect(args.folder, args.budget)
    except ValueError as why:  # the data set exists, so the data is at fault, not the arguments
        print(f"error: {why}", file=sys.stderr)
        return FAILED
    if args.html:
        write_atomically(Path(args.html), page(found, _name(args.folder)).encode(errors="replace"))
    print(json.dumps(found, indent=1) if args.json else describe(found, redacted(args.folder)))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
