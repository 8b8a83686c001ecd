"""A pretrained encoder in Python.

>>> from cdssl_dist import CrystalEncoder  # doctest: +SKIP
>>> encoder = CrystalEncoder.from_registry("models:/cdssl-encoder@champion")  # doctest: +SKIP
>>> vectors = encoder.embed(structures)  # (n, 3W)  # doctest: +SKIP
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cdssl_dist.data.structures import RefusedStructuresError, as_list
from cdssl_dist.mlops import registry
from cdssl_dist.mlops.mlflow_server import tracking_uri
from cdssl_dist.mlops.models import CHAMPION
from cdssl_dist.model.embedding import embed_graphs, embed_structures
from cdssl_dist.model.export import EncoderCard, read_encoder
from cdssl_dist.model.megnet import MEGNet
from sharding.commands import RUNS
from sharding.graph import Multigraphs


class CrystalEncoder:
    """A pretrained encoder: structures in, vectors out.

    Args:
        network: the encoder.
        card: its metadata.
        folder: folder of its files.
        device: "cpu", "cuda", …; if omitted, a GPU if there is one, else the CPU.

    Attributes:
        dim: length of a vector, 3W.
        cutoff: cutoff of its graphs, Å.
    """

    def __init__(self, network: MEGNet, card: EncoderCard, folder: Path | None = None, device: str | None = None):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.network = network.eval().requires_grad_(False).to(self.device)
        self.card, self.folder = card, folder
        self.dim, self.cutoff = 3 * network.width, card.cutoff

    @classmethod
    def from_registry(
        cls, ref: str = CHAMPION, registry_uri: str | None = None, device: str | None = None
    ) -> CrystalEncoder:
        """Pull an encoder by name. It is cached on this machine, so that later pulls work offline.

        Only safetensors and JSON are read, checked against the digests that were registered; no code is executed.

        Args:
            ref: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, or a folder.
            registry_uri: URI of the MLflow server or SQLite file; if omitted, MLFLOW_TRACKING_URI, else runs/mlflow.db.
            device: see the class.

        Raises:
            registry.RegistryError: if there is no such encoder, or it is damaged or of a newer format.
        """
        return cls.from_folder(registry.pull(ref, tracking_uri(registry_uri, RUNS)), device)

    @classmethod
    def from_folder(cls, folder: str | Path, device: str | None = None) -> CrystalEncoder:
        """Read ``encoder.safetensors`` and ``encoder.json``, as a run or a pull leaves them.

        Raises:
            export.ExportError: if they are missing, damaged or of a newer format.
        """
        return cls(*read_encoder(folder), Path(folder), device)

    def embed(self, structures: Any, refused: Literal["error", "nan"] = "error") -> NDArray[np.float32]:
        """Embed crystals: mean x̂, mean û and ŝ of each.

        Args:
            structures: a list of pymatgen ``Structure``, ASE ``Atoms``, CIF or JSON text, dictionaries or our
                ``Crystal``, in any mixture; or a single one.
            refused: what to do with an input that is not an ordered crystal: raise an error that names its row, or
                return a row of NaN.

        Returns:
            (n, 3W) f32.

        Raises:
            RefusedStructuresError: if an input is refused; its ``refused`` maps rows to reasons.
        """
        if refused not in ("error", "nan"):
            raise ValueError(f"refused={refused!r}: must be 'error' or 'nan'")
        items = as_list(structures)
        rows, bad = embed_structures(self.network, self.card.expansion, self.cutoff, items)
        if bad and refused == "error":
            raise RefusedStructuresError(bad, len(items), "refused='nan' gives them rows of NaN")
        return rows

    def embed_graphs(self, graphs: Multigraphs) -> NDArray[np.float32]:
        """Embed graphs that were built with the encoder's cutoff: (G, 3W) f32."""
        return embed_graphs(self.network, self.card.expansion, graphs)

    def __repr__(self) -> str:
        return f"CrystalEncoder(dim={self.dim}, cutoff={self.cutoff}, weights={self.card.weights_sha256[:12]})"
