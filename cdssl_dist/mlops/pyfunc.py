"""The encoder as an MLflow pyfunc: crystals in, vectors out, without this package installed.

MLflow executes this file ("models from code") from the model's folder, which also holds copies of the modules that it
imports. So neither it nor they import anything compiled, configured or distributed: numpy, torch and safetensors are
enough, plus a CIF reader for CIFs. If you need only the weights, use ``registry.pull``, which executes nothing.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from numpy.typing import NDArray
from safetensors.torch import load_file

from cdssl_dist.data.structures import RefusedStructuresError, as_list
from cdssl_dist.model.edges import GaussianExpansion
from cdssl_dist.model.embedding import embed_structures
from cdssl_dist.model.megnet import MEGNet


class CdsslEncoder(PythonModel):  # type: ignore[misc]
    """Reads ``encoder.safetensors`` and ``encoder.json``; predicts the pooled representation of crystals."""

    def load_context(self, context: Any) -> None:
        """Read the artifacts ``weights`` and ``card``.

        Raises:
            ValueError: if the weights are not those of the card.
        """
        weights, card = Path(context.artifacts["weights"]), json.loads(Path(context.artifacts["card"]).read_text())
        if hashlib.sha256(weights.read_bytes()).hexdigest() != card["weights_sha256"]:
            raise ValueError(f"{weights}: its SHA-256 is not the one in encoder.json; the model is damaged")
        self.cutoff = float(card["cutoff"])
        self.expansion = GaussianExpansion(card["centers"], card["end"], card["gamma"])
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder = MEGNet(edge_features=card["centers"], **card["model"]).eval().requires_grad_(False)
        self.encoder.load_state_dict(load_file(str(weights)))
        self.encoder.to(self.device)

    # MLflow inspects the type of the input, and warns about more specific ones.
    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> NDArray[np.float32]:
        """Embed crystals.

        Args:
            context: not used.
            model_input: a data frame with the column ``structure``, or a list. An item is text: a CIF, or the JSON
                of a pymatgen ``Structure`` or another dialect that ``sharding`` reads. A list may also hold such JSON
                as dictionaries, ``Structure`` objects or ASE ``Atoms``; MLflow's own input checks let only text
                through, so pass objects to ``load_model(...).unwrap_python_model().predict(None, [...])``.
            params: ``refused``: "error", or "nan" to give items that are not ordered crystals rows of NaN.

        Returns:
            (n, 3W) f32: mean x̂, mean û and ŝ of each crystal.

        Raises:
            ValueError: naming the rows that are not ordered crystals.
        """
        policy = (params or {}).get("refused", "error")
        if policy not in ("error", "nan"):
            raise ValueError(f"refused={policy!r}: must be 'error' or 'nan'")
        items = _items(model_input)
        rows, refused = embed_structures(self.encoder, self.expansion, self.cutoff, items)
        if refused and policy == "error":
            raise RefusedStructuresError(refused, len(items), "params={'refused': 'nan'} gives them rows of NaN")
        return rows


def _items(model_input: Any) -> list[Any]:
    """The structures of a data frame, or of anything list-like; one structure is a list of one."""
    if hasattr(model_input, "columns"):
        if "structure" not in model_input.columns:
            raise ValueError(f"the column 'structure' is missing; there are {[str(c) for c in model_input.columns]}")
        return list(model_input["structure"])
    return as_list(model_input)


set_model(CdsslEncoder())
