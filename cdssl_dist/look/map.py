"""A map of crystals: their vectors in two dimensions, coloured by density or another number.

    cdssl embed --data data/mp --out embeddings.parquet
    cdssl map embeddings.parquet --out map

The quality of a map is reported with it: how well a crystal's neighbours on the map predict its value.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from cdssl_dist.look.map_page import page
from sharding.commands import Parser, command, natural, positive

NEIGHBOURS: Final = 10
FEWEST: Final = NEIGHBOURS + 2  # crystals needed for a map
PLACE: Final = ("map_x", "map_y")  # columns of the coordinates; a table may have an x of its own
METHODS: Final = ("umap", "tsne", "pca")


class MapError(ValueError):
    """Vectors that cannot be mapped; the message is one line."""


@dataclass(frozen=True)
class NeighbourSkill:
    """How well ten neighbours predict a value: 1 − error / error of the median; 0 means not at all."""

    column: str
    on_map: float
    in_vectors: float  # the same before the dimensions were reduced


@dataclass(frozen=True)
class CrystalMap:
    """n crystals in two dimensions."""

    name: str  # of what is mapped
    method: str
    place: NDArray[np.float64]  # (n, 2)
    keys: list[str]
    formulas: list[str]
    columns: dict[str, NDArray[np.float64]]  # name → (n,), NaN where unknown; the first is shown first
    kept: dict[str, NeighbourSkill]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Read vectors, map them, draw."""
    p = Parser("cdssl map", "Map the vectors of cdssl embed: a picture, a page that can be explored, and coordinates.")
    p.add_argument("embeddings", help="Parquet of cdssl embed, or one with key, embedding and numbers")
    p.add_argument("--color", help="numeric column; if omitted, density, else the first one")
    p.add_argument("--method", choices=METHODS, default="tsne", help="umap needs the package umap-learn")
    p.add_argument("--sample", type=positive, default=10_000, help="maximum number of crystals, chosen at random")
    p.add_argument("--seed", type=natural, default=0, help="seed of the sample and of the map")
    p.add_argument("--out", default="runs/map", help="folder for map.png, map.html and map.parquet")
    args = p.parse_args(argv)

    table, vectors = read_vectors(args.embeddings, args.sample, args.seed)
    columns = numbers(table)
    color = args.color or ("density" if "density" in columns else next(iter(columns), "to colour by"))
    if color not in columns:
        raise MapError(f"{args.embeddings}: no numeric column {color!r}; there are {', '.join(columns) or 'none'}")
    columns = {color: columns[color]} | columns
    names = table["key"].to_pylist()
    formulas = table["formula"].to_pylist() if "formula" in table.column_names else [""] * len(names)
    found = draw_map(Path(args.embeddings).name, names, formulas, columns, vectors, args.method, args.seed)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_map(out / "map.parquet", found, table)
    draw(out / "map.png", found.place, color, columns[color])
    (out / "map.html").write_text(page(found))
    print(f"{len(names):,} crystals by {args.method}; skill of {NEIGHBOURS} neighbours (1 is perfect, 0 none):")
    for k in found.kept.values():
        print(f"  {k.column:20} on the map {k.on_map:.3f}, in the vectors {k.in_vectors:.3f}")
    print(f"  {out}/map.png, map.html, map.parquet")
    return 0


def draw_map(
    name: str,
    keys: list[str],
    formulas: list[str],
    columns: dict[str, NDArray[np.float64]],
    vectors: NDArray[np.float64],
    method: str = "tsne",
    seed: int = 0,
) -> CrystalMap:
    """Map standardised vectors (n, d), and measure how well neighbours predict each column."""
    place = reduced(vectors, method, seed)
    kept = {column: neighbour_skill(column, values, place, vectors) for column, values in columns.items()}
    return CrystalMap(name, method, place, keys, formulas, columns, kept)


def write_map(path: Path, found: CrystalMap, table: pa.Table) -> None:
    """Write the table with the coordinates; the method and the skills go into its metadata."""
    for name, column in zip(PLACE, found.place.T, strict=True):
        table = table.append_column(name, pa.array(column))
    about = {"method": found.method, "kept": json.dumps([asdict(k) for k in found.kept.values()])}
    pq.write_table(table.replace_schema_metadata(about), path)


def read_map(folder: Path) -> CrystalMap:
    """Read the map that ``cdssl map`` wrote to a folder.

    Raises:
        MapError: if there is none, or it cannot be read.
    """
    path = folder / "map.parquet"
    try:
        table = pq.read_table(path)
        about = table.schema.metadata or {}
        kept = {k["column"]: NeighbourSkill(**k) for k in json.loads(about[b"kept"])}
        columns = numbers(table)
        place = np.column_stack([columns.pop(name) for name in PLACE])
        names = table["key"].to_pylist()
        formulas = table["formula"].to_pylist() if "formula" in table.column_names else [""] * len(names)
    except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as why:
        raise MapError(f"{path}: not a readable table of cdssl map ({why})") from None
    return CrystalMap(
        folder.name, about[b"method"].decode(), place, names, formulas, {c: columns[c] for c in kept}, kept
    )


def read_vectors(path: str, sample: int, seed: int) -> tuple[pa.Table, NDArray[np.float64]]:
    """A sample of the crystals that have a vector, in the order of the file: their other columns, and (n, d)."""
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as why:
        raise MapError(f"{path}: not a readable Parquet file ({why})") from None
    if not {"key", "embedding"} <= set(table.column_names):
        raise MapError(f"{path}: has no columns key and embedding; cdssl embed writes such a file")
    table = table.filter(pa.compute.is_valid(table["embedding"]))
    if len(table) < FEWEST:
        raise MapError(f"{path}: {len(table)} vectors are too few for a map")
    if len(table) > sample:
        table = table.take(np.sort(np.random.default_rng(seed).choice(len(table), sample, replace=False)))
    try:
        vectors = np.array(table["embedding"].to_pylist(), np.float64)
    except (TypeError, ValueError):
        vectors = np.empty(0)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise MapError(f"{path}: embeddings must be vectors of finite numbers, all of the same length")
    others = [name for name in table.column_names if name not in ("embedding", *PLACE)]
    return table.select(others), StandardScaler().fit_transform(vectors)


def numbers(table: pa.Table) -> dict[str, NDArray[np.float64]]:
    """The numeric columns that are not constant."""
    names = [n for n in table.column_names if pa.types.is_floating(table[n].type) or pa.types.is_integer(table[n].type)]
    columns = {n: np.array(table[n].to_pylist(), np.float64) for n in names}
    return varied({n: np.where(np.isfinite(column), column, np.nan) for n, column in columns.items()})


def varied(columns: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """The columns that are not constant."""
    return {n: values for n, values in columns.items() if np.unique(values[np.isfinite(values)]).size > 1}


def reduced(vectors: NDArray[np.float64], method: str, seed: int) -> NDArray[np.float64]:
    """Reduce vectors to two dimensions: (n, d) → (n, 2).

    Raises:
        MapError: if the method is not installed.
    """
    if method == "pca":
        from sklearn.decomposition import PCA

        return PCA(2, random_state=seed).fit_transform(vectors)
    if method == "tsne":
        from sklearn.manifold import TSNE

        perplexity = min(30.0, (len(vectors) - 1) / 3)
        return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(vectors).astype(np.float64)
    try:
        from umap import UMAP
    except ImportError:
        raise MapError("umap is not installed: pip install umap-learn, or use --method tsne") from None
    return UMAP(n_components=2, random_state=seed, n_jobs=1).fit_transform(vectors).astype(np.float64)


def neighbour_skill(
    column: str, values: NDArray[np.float64], place: NDArray[np.float64], vectors: NDArray[np.float64]
) -> NeighbourSkill:
    """Predict each value by the mean over its neighbours, on the map and among the vectors."""
    known = np.isfinite(values)
    v = values[known]
    trivial = np.abs(v - np.median(v)).mean()

    def skill(points: NDArray[np.float64]) -> float:
        k = min(NEIGHBOURS, len(v) - 1)
        if k < 1 or trivial == 0:
            return float("nan")
        near = NearestNeighbors(n_neighbors=k).fit(points[known]).kneighbors(return_distance=False)  # not itself
        return float(1.0 - np.abs(v[near].mean(axis=1) - v).mean() / trivial)

    return NeighbourSkill(column, skill(place), skill(vectors))


def draw(path: Path, place: NDArray[np.float64], name: str, values: NDArray[np.float64]) -> None:
    """Draw the picture; colours span the middle 96% of the values."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    low, high = np.nanpercentile(values, [2, 98])
    figure, axes = plt.subplots(figsize=(6.4, 5.4), constrained_layout=True)
    size = float(np.clip(20_000 / len(place), 2, 25))
    shown = axes.scatter(place[:, 0], place[:, 1], c=values, s=size, vmin=low, vmax=high, linewidths=0, alpha=0.8)
    axes.set(xticks=[], yticks=[], title=f"{len(place):,} crystals")
    figure.colorbar(shown, label=name)
    figure.savefig(path, dpi=160)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
