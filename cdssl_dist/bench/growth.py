"""``cdssl bench growth``: how the cost of a training step grows with pack, model and cutoff, on one CPU core.

One thing is varied at a time, starting from the small model at 5 Å. Each time is compared with a cost model that is
fitted to all of them, with three terms: seconds per FLOP of matrix products, per byte saved for backward, and per step.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from scipy.optimize import nnls

from cdssl_dist.bench.common import Figures, add_repeat, in_turns
from cdssl_dist.bench.data import SHARED
from cdssl_dist.bench.step import Packs, Step, plain
from cdssl_dist.data.batch import PackShape
from cdssl_dist.data.labeled import in_batches
from cdssl_dist.model.cost import flops_per_edge, saved_per_edge
from cdssl_dist.model.edges import GaussianExpansion
from cdssl_dist.model.megnet import PretextModel
from cdssl_dist.model.pretext import Denoising
from sharding.block import decode_arrays, encode
from sharding.crystal import Crystal
from sharding.graph import Multigraphs, build
from sharding.sources import open_source, parse_records


@dataclass(frozen=True)
class Point:
    """A configuration to measure."""

    edges: int = 16_384  # directed, of a pack, at most
    width: int = 32
    hidden: int = 64
    blocks: int = 3
    centers: int = 100
    cutoff: float = 5.0  # Å

    @property
    def sizes(self) -> dict[str, int]:
        """Size of the model, as arguments of ``model.cost``."""
        return {"centers": self.centers, "width": self.width, "hidden": self.hidden, "blocks": self.blocks}


SERIES: Final[dict[str, list[dict[str, Any]]]] = {
    "directed edges of a pack": [{"edges": n} for n in (2_048, 4_096, 8_192, 16_384, 32_768, 65_536)],
    "width (hidden: twice that)": [{"width": w, "hidden": 2 * w} for w in (16, 32, 64, 128, 256)],
    "blocks": [{"blocks": n} for n in (1, 2, 3, 6, 12)],
    "Gaussians": [{"centers": n} for n in (20, 40, 100, 200)],
    "cutoff, Å, of the same crystals": [{"cutoff": r} for r in (4.0, 5.0, 6.0, 8.0)],
}
CRYSTALS: Final = 4_000  # from which packs are taken


def add_arguments(parser: ArgumentParser) -> None:
    """See ``cdssl_dist.bench``."""
    add_repeat(parser)
    parser.add_argument("--plot", type=Path, help="file to draw a figure to")
    parser.add_argument("--only", choices=[name.split()[0].strip(",") for name in SERIES], help="only this series")


def measure(args: Namespace) -> Figures:
    """Seconds of CPU for each point, medians taken in turns, and the fitted terms."""
    torch.set_num_threads(1)
    chosen = {name: rows for name, rows in SERIES.items() if args.only in (None, name.split()[0].strip(","))}
    points = {name: [replace(Point(), **row) for row in rows] for name, rows in chosen.items()}
    crystals = first_crystals(CRYSTALS)
    packs = {point: pack(crystals, point) for point in {p for row in points.values() for p in row}}
    steps = {
        point: Step(
            plain(_model(point), torch.float32, torch.device("cpu")),
            Denoising(GaussianExpansion(point.centers, point.cutoff + 1.0, 0.5), (0.3, 0.3), 0),
            pack,
            torch.device("cpu"),
        )
        for point, pack in packs.items()
    }
    per_edge = in_turns(args.repeat, {point: step.per_edge for point, step in steps.items()})
    seconds = {point: per_edge[point] * packs[point].edges[0] for point in per_edge}
    terms, fitted = fit(seconds, {point: pack.edges[0] for point, pack in packs.items()})

    def told(p: Point) -> dict[str, Any]:
        return asdict(p) | {"directed edges": packs[p].edges[0], "seconds": seconds[p], "model": fitted[p]}

    figures: Figures = {"series": {name: [told(p) for p in row] for name, row in points.items()}, "terms": terms}
    if args.plot:
        draw(args.plot, figures)
    return figures


def first_crystals(count: int) -> list[Crystal]:
    """The first crystals of the shared Materials Project data, else of ``aflow:``."""
    shared = SHARED / "mp2025.parquet"
    source = open_source(str(shared) if shared.exists() else f"aflow:{count}")
    return next(in_batches(parse_records(source, source.records()), count))[0]


def _model(point: Point) -> PretextModel:
    torch.manual_seed(0)
    return PretextModel(edge_features=point.centers, width=point.width, hidden=point.hidden, blocks=point.blocks)


def pack(crystals: list[Crystal], point: Point) -> Packs:
    """One pack; with another cutoff, it has the same crystals as with the default one."""
    graphs, _ = build(crystals, Point.cutoff)
    count = int(np.searchsorted(np.cumsum(2 * graphs.n_edges.astype(np.int64)), point.edges, side="right"))
    graphs = graphs.take(np.arange(max(count, 1)))
    if point.cutoff != Point.cutoff:
        wanted = set(graphs.keys)
        graphs, _ = build([crystal for crystal in crystals if crystal.key in wanted], point.cutoff)
    return Packs([graphs], [decode_arrays(encode(graphs, np.uint16))], _shape(graphs), [2 * len(graphs.edge_src)])


def _shape(graphs: Multigraphs) -> PackShape:
    return PackShape(len(graphs) + 1, len(graphs.atomic_numbers) + 1, len(graphs.edge_src))


def fit(seconds: dict[Point, float], edges: dict[Point, int]) -> tuple[dict[str, float], dict[Point, float]]:
    """Fit the terms by least squares of the relative errors, none below zero; also return the fitted seconds."""
    names = ("FLOP", "saved byte", "step")
    rows = [
        (edges[p] * flops_per_edge(**p.sizes), edges[p] * saved_per_edge(bf16=False, **p.sizes), 1.0) for p in seconds
    ]
    a, t = np.array(rows), np.array(list(seconds.values()))
    scale = a.max(axis=0)
    found = nnls(a / scale / t[:, None], np.ones(len(t)))[0] / scale
    fitted = dict(zip(seconds, (a @ found).tolist(), strict=True))
    return dict(zip(names, found.tolist(), strict=True)), fitted


def draw(path: Path, figures: Figures) -> None:
    """Plot each series in a panel: measured times and the cost model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    series = figures["series"]
    size = (3.4 * len(series), 3.2)
    picture, panels = plt.subplots(1, len(series), figsize=size, layout="constrained", squeeze=False)
    for panel, (name, rows) in zip(panels[0], series.items(), strict=True):
        x = [row[_varied(rows)] for row in rows]
        panel.loglog(x, [row["seconds"] for row in rows], "o", label="measured")
        panel.loglog(x, [row["model"] for row in rows], "-", label="model")
        panel.set_xticks(x, [f"{v:g}" for v in x], rotation=30)
        panel.minorticks_off()
        panel.set_xlabel(name)
    panels[0, 0].set_ylabel("CPU s per step")
    panels[0, 0].legend()
    picture.savefig(path, dpi=120)
    plt.close(picture)


def _varied(rows: list[dict[str, Any]]) -> str:
    """The field that varies in a series; the first one if two vary together."""
    return next(f.name for f in fields(Point) if len({row[f.name] for row in rows}) > 1)


def table(figures: Figures) -> str:
    """The figures for people."""
    lines = []
    for name, rows in figures["series"].items():
        lines += [f"{name:>32}  edges      ms a step   µs an edge   model / measured"]
        for row in rows:
            edges, seconds = row["directed edges"], row["seconds"]
            lines.append(
                f"{row[_varied(rows)]:32g}  {edges:7,}  {1e3 * seconds:11.1f}  {1e6 * seconds / edges:11.2f}"
                f"  {row['model'] / seconds:13.2f}"
            )
        lines.append("")
    terms = figures["terms"]
    return "\n".join(
        [
            *lines,
            f"model: {1e-9 / max(terms['FLOP'], 1e-30):.3g} GFLOP/s of matrix products, "
            f"{1e-9 / max(terms['saved byte'], 1e-30):.3g} GB/s of what is saved, {1e3 * terms['step']:.3g} ms a step",
        ]
    )
