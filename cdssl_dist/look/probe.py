"""Linear probes: how well an encoder's vectors predict a property, compared with vectors that were not learned.

    cdssl probe --encoder models:/cdssl-encoder@champion --data FILE --target COLUMN

A ridge on frozen features, with cross-validation over whole groups. The encoder is compared with the same network with
random weights, which shows what the architecture alone is worth, and with element fractions and the volume per atom.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from cdssl_dist.data.labeled import COMPUTED, load_labeled
from cdssl_dist.data.vectors import vectors_of
from cdssl_dist.encoder import CrystalEncoder
from cdssl_dist.finetune.baselines import simple_features, vector_ridge
from cdssl_dist.finetune.experiment import new_encoder
from cdssl_dist.finetune.splits import Split, k_folds
from cdssl_dist.finetune.targets import Array
from cdssl_dist.mlops.models import CHAMPION
from cdssl_dist.model.embedding import embed_graphs
from sharding.commands import Parser, command, natural, positive
from sharding.graph import Multigraphs
from sharding.manifest import DataSetError

RANDOM_SEEDS: Final = 3


@dataclass(frozen=True)
class Probed:
    """How well a ridge on some features predicts, over the folds."""

    mae: list[float]  # of each fold, in the unit of the target
    r2: float  # over all crystals, each predicted in the fold that tests it


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Embed labeled crystals, probe, print a table."""
    p = Parser("cdssl probe", "Cross-validated linear probes, compared with a random encoder and simple descriptors.")
    p.add_argument("--encoder", default=CHAMPION, help="models:/NAME@ALIAS, or a folder")
    p.add_argument("--registry", help="MLflow URI; if omitted, MLFLOW_TRACKING_URI, else runs/mlflow.db")
    p.add_argument("--data", required=True, help="a data set of shards, or a file or source that cdssl shard reads")
    p.add_argument("--labels", metavar="FILE", help="CSV or Parquet with ids, to read targets from")
    p.add_argument("--target", required=True, nargs="+", help=f"labels or columns, or any of {', '.join(COMPUTED)}")
    p.add_argument(
        "--vectors",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="other vectors to probe as well: Parquet with key and embedding, as cdssl embed writes it",
    )
    p.add_argument("--split", choices=("train", "val", "test"), help="use this split of a data set of shards only")
    p.add_argument("--where", metavar="CONDITION", help="filter a data set of shards, as in 'n_atoms <= 20'")
    p.add_argument("--folds", type=int, default=5, help="folds of the cross-validation, by whole groups")
    p.add_argument("--seed", type=natural, default=0, help="seed of the folds and of the random encoders")
    p.add_argument("--out", metavar="FILE", help="write the results as JSON")
    p.add_argument("--threads", type=positive, default=1, help="threads of torch, on CPU")
    args = p.parse_args(argv)
    torch.set_num_threads(args.threads)

    encoder = CrystalEncoder.from_registry(args.encoder, args.registry)
    data = load_labeled(args.data, args.target, encoder.cutoff, args.split, where=args.where, table=args.labels)
    every = features(encoder, data.graphs, args.seed)
    for said in args.vectors:
        name, equals, path = said.partition("=")
        if not name or not equals or name in every:
            raise DataSetError(f"--vectors {said}: must be NAME=FILE, where NAME is not one of {', '.join(every)}")
        every[name] = vectors_of(path, data.graphs.keys)
    results = {}
    for t, name in enumerate(data.names):
        known = np.flatnonzero(np.isfinite(data.targets[:, t]))
        folds = k_folds([data.groups[i] for i in known], args.folds, 0.0, args.seed)
        chosen = {about: values[known] for about, values in every.items()}
        found = probe(chosen, data.targets[known, t], folds)
        results[name] = {about: {"mae": p.mae, "r2": p.r2} for about, p in found.items()}
        print(table(name, data.units[t], len(known), found))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(results, indent=1))
    return 0


def features(encoder: CrystalEncoder, graphs: Multigraphs, seed: int) -> dict[str, Array]:
    """The features to probe: name → (n, features)."""
    simple = simple_features(graphs)
    found = {"encoder": encoder.embed_graphs(graphs).astype(np.float64)}
    for i in range(RANDOM_SEEDS):
        random = new_encoder(encoder.card, seed + i).eval().to(encoder.device)
        found[f"random encoder {i + 1}"] = embed_graphs(random, encoder.card.expansion, graphs).astype(np.float64)
    found["composition"] = simple[:, :-1]
    found["composition + volume"] = simple
    found["encoder + composition + volume"] = np.column_stack([found["encoder"], simple])
    return found


def probe(features: Mapping[str, Array], target: Array, folds: Sequence[Split]) -> dict[str, Probed]:
    """Cross-validate a ridge on standardised features, its penalty chosen within the training part.

    Args:
        features: name → (n, features).
        target: (n,), all finite.
        folds: splits in which each crystal is tested once.

    Returns:
        Name → how well it does; the median of the training part comes last.
    """
    predicted = {name: np.empty_like(target) for name in (*features, "median")}
    for fold in folds:
        train = np.concatenate([fold.train, fold.val])
        for name, values in features.items():
            model = vector_ridge().fit(values[train], target[train])
            predicted[name][fold.test] = model.predict(values[fold.test])
        predicted["median"][fold.test] = np.median(target[train])
    spread = float(((target - target.mean()) ** 2).sum())
    found = {}
    for name, p in predicted.items():
        off = p - target
        r2 = 1.0 - float((off**2).sum()) / spread if spread > 0 else float("nan")
        found[name] = Probed([float(np.abs(off[f.test]).mean()) for f in folds], r2)
    return found


def table(name: str, unit: str, crystals: int, found: dict[str, Probed]) -> str:
    """Format the results as lines of text."""
    folds = len(next(iter(found.values())).mae)
    lines = [f"{name}, {unit or 'no unit given'}: {crystals:,} crystals, {folds} folds; MAE ± standard error, R²"]
    for about, p in found.items():
        error = np.std(p.mae, ddof=1) / np.sqrt(folds)
        lines.append(f"  {about:32} {np.mean(p.mae):10.4f} ± {error:.4f} {p.r2:8.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
