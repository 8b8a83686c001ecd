"""Predict properties of any number of crystals with a fine-tuned model.

cdssl predict --model models:/NAME@champion --data FILE --out predictions.parquet
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from cdssl_dist.data.stream import Rows, add_arguments, check_out, parts_of, write_rows
from cdssl_dist.finetune.predictor import Predictor, read_property, read_property_card
from cdssl_dist.mlops import registry
from cdssl_dist.mlops.mlflow_server import tracking_uri
from cdssl_dist.mlops.models import PROPERTY, kind_of
from sharding.commands import RUNS, Parser, command
from sharding.crystal import SYMBOLS
from sharding.graph import Multigraphs


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Pull a model, predict, write a Parquet file."""
    p = Parser("cdssl predict", "Predict properties of crystals with a fine-tuned model, in bounded memory.")
    p.add_argument("--model", required=True, help="models:/NAME@ALIAS, or a folder that cdssl finetune made")
    add_arguments(p)
    args = p.parse_args(argv)

    check_out(args.out, args.data)
    pulled = registry.pull_version(args.model, tracking_uri(args.registry, RUNS))
    if kind_of(pulled.folder) is not PROPERTY:
        raise registry.RegistryError(f"{args.model} is an encoder; fine-tune it with cdssl finetune to predict")
    model = _model(pulled.folder, read_property_card(pulled.folder).weights_sha256)
    parts = parts_of(args.data, model.card.cutoff, args.split, args.where)
    rows = Rows(args.out, fields(model), {"model": pulled.uri, "task": json.dumps(model.card.task)})
    use = functools.partial(columns, pulled.folder, model.card.weights_sha256)
    refused = write_rows(rows, parts, use, "predict", args.workers, args.threads)
    more = f"; {refused:,} could not be used (see the column `refused`)" if refused else ""
    print(f"{args.out}: {rows.rows - refused:,} crystals by {pulled.uri}{more}")
    return 0


def fields(model: Predictor) -> list[tuple[str, pa.DataType]]:
    """Output columns: a prediction per target or class, its uncertainty (ensembles only), and unseen elements."""
    names = model.task.columns
    deviations = [(f"std:{name}", pa.float64()) for name in names] if len(model.networks) > 1 else []
    deviations += [(f"within68:{name}", pa.float64()) for name in model.card.uncertainty]
    label = [("class", pa.string())] if model.task.classes else []
    return [*((name, pa.float64()) for name in names), *deviations, *label, ("unseen_elements", pa.string())]


@functools.lru_cache(maxsize=1)
def _model(folder: Path, digest: str) -> Predictor:
    """Read the model once per process."""
    return read_property(folder)


def columns(folder: Path, digest: str, graphs: Multigraphs) -> dict[str, Any]:
    """Values of ``fields``, predicted by the model in ``folder``; ``digest``, of its weights, keys the cache."""
    model = _model(folder, digest)
    mean, std = model.predict(graphs)
    names = model.task.columns
    found: dict[str, Any] = {name: mean[:, i] for i, name in enumerate(names)}
    if len(model.networks) > 1:
        found |= {f"std:{name}": std[:, i] for i, name in enumerate(names)}
        found |= {f"within68:{name}": f * std[:, names.index(name)] for name, f in model.card.uncertainty.items()}
    if model.task.classes:
        found["class"] = [model.task.classes[i] for i in mean.argmax(axis=1)]
    strange = model.unseen(graphs)
    found["unseen_elements"] = [" ".join(SYMBOLS[z] for z in numbers) or None for numbers in strange]
    return found


if __name__ == "__main__":
    sys.exit(main())
