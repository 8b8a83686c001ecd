"""Embed any number of crystals: write their vectors to a Parquet file.

cdssl embed --encoder models:/cdssl-encoder@champion --data FILE --out embeddings.parquet
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from cdssl_dist.data.labeled import density, formulas_of, volume_per_atom
from cdssl_dist.data.stream import Rows, add_arguments, check_out, parts_of, write_rows
from cdssl_dist.encoder import CrystalEncoder
from cdssl_dist.finetune.experiment import new_encoder
from cdssl_dist.finetune.predictor import unseen_elements
from cdssl_dist.mlops import registry
from cdssl_dist.mlops.mlflow_server import tracking_uri
from cdssl_dist.mlops.models import CHAMPION
from cdssl_dist.model.export import read_card
from sharding.commands import RUNS, Parser, command, natural
from sharding.crystal import SYMBOLS
from sharding.graph import Multigraphs

FIELDS: Final = [
    ("formula", pa.string()),
    ("n_atoms", pa.int32()),
    ("density", pa.float64()),
    ("volume_per_atom", pa.float64()),
    ("unseen_elements", pa.string()),
    ("embedding", pa.list_(pa.float32())),
]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Pull an encoder, embed, write a Parquet file."""
    p = Parser("cdssl embed", "Embed crystals with a pretrained encoder, in bounded memory.")
    p.add_argument("--encoder", default=CHAMPION, help="models:/NAME@ALIAS, or a folder")
    p.add_argument("--random", type=natural, metavar="SEED", help="as a control: the same network with new weights")
    add_arguments(p)
    args = p.parse_args(argv)

    check_out(args.out, args.data)
    folder = registry.pull(args.encoder, tracking_uri(args.registry, RUNS))
    weights = read_card(folder).weights_sha256 if args.random is None else f"random {args.random}"
    encoder = _encoder(folder, weights, args.random)
    about = {"encoder": args.encoder, "weights_sha256": weights}
    use = functools.partial(columns, folder, weights, args.random)
    parts = parts_of(args.data, encoder.cutoff, args.split, args.where)
    rows = Rows(args.out, FIELDS, about)
    refused = write_rows(rows, parts, use, "embed", args.workers, args.threads)
    more = f"; {refused:,} could not be used (see the column `refused`)" if refused else ""
    print(f"{args.out}: {rows.rows - refused:,} vectors of {encoder.dim} numbers{more}")
    return 0


def columns(folder: Path, weights: str, seed: int | None, graphs: Multigraphs) -> dict[str, Any]:
    """Values of ``FIELDS``, computed by the encoder in a folder; see ``_encoder``."""
    encoder = _encoder(folder, weights, seed)
    strange = unseen_elements(encoder.card.elements, graphs)
    return {
        "formula": formulas_of(graphs),
        "n_atoms": graphs.n_atoms.astype(np.int32),
        "density": density(graphs),
        "volume_per_atom": volume_per_atom(graphs),
        "unseen_elements": [" ".join(SYMBOLS[z] for z in numbers) or None for numbers in strange],
        "embedding": list(encoder.embed_graphs(graphs)),
    }


@functools.lru_cache(maxsize=1)
def _encoder(folder: Path, weights: str, seed: int | None) -> CrystalEncoder:
    """Read the encoder once per process; with a seed, an untrained one of its shape. ``weights`` keys the cache."""
    encoder = CrystalEncoder.from_folder(folder)
    return encoder if seed is None else CrystalEncoder(new_encoder(encoder.card, seed), encoder.card)


if __name__ == "__main__":
    sys.exit(main())
