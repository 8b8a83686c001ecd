"""Embed any number of crystals: a Parquet file of their representations.

cdssl embed --encoder models:/cdssl-encoder@champion --data FILE --out embeddings.parquet
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from cdssl_dist.commands import Parser, command
from cdssl_dist.data.labeled import density, formulas_of, volume_per_atom
from cdssl_dist.data.stream import Rows, add_arguments, stream, write_rows
from cdssl_dist.encoder import CrystalEncoder
from cdssl_dist.finetune.predictor import unseen_elements
from cdssl_dist.mlops.models import CHAMPION
from sharding.crystal import SYMBOLS
from sharding.graph import Multigraphs


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Pull an encoder, embed, write a Parquet file."""
    p = Parser("cdssl embed", "Embed crystals with a pretrained encoder, in bounded memory.")
    p.add_argument("--encoder", default=CHAMPION, help="models:/NAME@ALIAS, or a folder")
    add_arguments(p)
    args = p.parse_args(argv)

    torch.set_num_threads(args.threads)
    encoder = CrystalEncoder.from_registry(args.encoder, args.registry)
    fields = [
        ("formula", pa.string()),
        ("n_atoms", pa.int32()),
        ("density", pa.float64()),
        ("volume_per_atom", pa.float64()),
        ("unseen_elements", pa.string()),
        ("embedding", pa.list_(pa.float32())),
    ]

    def use(graphs: Multigraphs) -> dict[str, object]:
        strange = unseen_elements(encoder.card.elements, graphs)
        return {
            "formula": formulas_of(graphs),
            "n_atoms": graphs.n_atoms.astype(np.int32),
            "density": density(graphs),
            "volume_per_atom": volume_per_atom(graphs),
            "unseen_elements": [" ".join(SYMBOLS[z] for z in numbers) or None for numbers in strange],
            "embedding": list(encoder.embed_graphs(graphs)),
        }

    about = {"encoder": args.encoder, "weights_sha256": encoder.card.weights_sha256}
    rows = Rows(args.out, fields, about)
    refused = write_rows(rows, stream(args.data, encoder.cutoff, args.split, args.where), use, "embed")
    more = f"; {refused:,} could not be used, the column `refused` says why" if refused else ""
    print(f"{args.out}: {rows.rows - refused:,} vectors of {encoder.dim} numbers{more}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
