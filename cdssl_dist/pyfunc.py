"""The encoder as an MLflow pyfunc: crystals in, vectors out, without this package installed.

MLflow executes this file ("models from code") out of the model's folder, where the modules that it imports lie beside
it. So neither it nor they import what is compiled, configured or distributed: numpy, torch and safetensors do, and a
reader of CIF where CIFs come. Whoever needs only the weights takes ``registry.pull``, which executes nothing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from io import StringIO
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from numpy.typing import NDArray
from safetensors.torch import load_file

from cdssl_dist.batch import collate, widen
from cdssl_dist.edges import GaussianExpansion, distances
from cdssl_dist.megnet import MEGNet, pooled
from sharding.crystal import Crystal, RefusedError
from sharding.graph import Multigraphs, build, offsets
from sharding.sources import ReadOptions, dialects
from sharding.sources.pieces import Fault

CHUNK: Final = 64  # crystals whose graphs are built at a time
HALF_EDGES: Final = 32_768  # of one forward pass: bounds the memory


class CdsslEncoder(PythonModel):  # type: ignore[misc]
    """Reads ``encoder.safetensors`` and ``encoder.json``; predicts the pooled representation of crystals."""

    def load_context(self, context: Any) -> None:
        """Read the artifacts ``weights`` and ``card``.

        Raises:
            ValueError: where the weights are not those of the card.
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

    # MLflow reads the type of the input, and warns in red of those that say more.
    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> NDArray[np.float32]:
        """Embed crystals.

        Args:
            context: not used.
            model_input: a data frame with the column ``structure``, or a list. An item is text: a CIF, or the JSON
                of a pymatgen ``Structure`` or another dialect that ``sharding`` reads. In a list also such a JSON as
                a dictionary, a ``Structure``, or ASE ``Atoms``; MLflow's own checks of the input let only text
                through, so objects go to ``load_model(...).unwrap_python_model().predict(None, [...])``.
            params: ``refused``: "error", or "nan" to give what is no ordered crystal a row of NaN.

        Returns:
            (n, 3W) f32: mean x̂, mean û and ŝ of each crystal.

        Raises:
            ValueError: naming the rows that are not ordered crystals.
        """
        policy = (params or {}).get("refused", "error")
        if policy not in ("error", "nan"):
            raise ValueError(f"refused={policy!r}: must be 'error' or 'nan'")
        items = _items(model_input)
        rows = np.full((len(items), 3 * self.encoder.width), np.nan, np.float32)
        refused: dict[int, str] = {}
        for first in range(0, len(items), CHUNK):
            crystals: list[Crystal] = []
            for i, item in enumerate(items[first : first + CHUNK], first):
                try:
                    crystals.append(read_crystal(item, str(i)))
                except RefusedError as why:
                    refused[i] = why.text
            graphs, no_graph = build(crystals, self.cutoff)
            refused |= {int(crystals[i].key): why.text for i, why in no_graph.items()}
            for part in _parts(graphs):
                rows[[int(key) for key in part.keys]] = self._embed(part)
        if refused and policy == "error":
            some = "; ".join(f"row {i}: {refused[i]}" for i in sorted(refused)[:5])
            text = f"{len(refused)} of {len(items)} structures cannot be embedded ({some})"
            raise ValueError(f"{text}; params={{'refused': 'nan'}} gives them rows of NaN")
        return rows

    @torch.inference_mode()
    def _embed(self, graphs: Multigraphs) -> NDArray[np.float32]:
        arrays = {f.name: getattr(graphs, f.name) for f in fields(graphs)}
        batch = widen(collate([arrays], [(0, 0)]).to(self.device))
        x, u, s = self.encoder(self.expansion(distances(batch, batch.positions)), batch)
        return pooled(x, u, s, batch)[: len(graphs)].cpu().numpy()


def read_crystal(item: Any, key: str) -> Crystal:
    """One crystal from whatever it is given as; see ``CdsslEncoder.predict``. Read as training data are read.

    Raises:
        RefusedError: where it is none, or not an ordered one.
    """
    try:
        found = list(_read(item, key))
    except RefusedError:
        raise
    except Exception as why:  # readers raise all sorts of things on bad input; what matters is the row
        raise RefusedError("unparsable", f"{type(why).__name__}: {' '.join(str(why).split())[:200]}") from None
    if len(found) != 1:
        raise RefusedError("unparsable", f"the text holds {len(found)} crystals, not one")
    if not isinstance(found[0], Crystal):
        raise RefusedError(found[0].code, found[0].text)
    return replace(found[0], key=key)


def _read(item: Any, key: str) -> Iterable[Crystal | Fault]:
    if isinstance(item, str):
        if not item.lstrip().startswith("{"):
            return _read_cif(item, key)
        item = json.loads(item)
    elif _is_atoms(item):
        numbers, positions = item.get_atomic_numbers(), item.get_positions()
        item = {"numbers": numbers, "positions": positions, "cell": item.cell[:], "pbc": item.pbc}
    elif _is_structure(item):
        item = item.as_dict()
    if not isinstance(item, Mapping):
        raise RefusedError("unparsable", f"a {type(item).__name__} is no structure: give CIF or JSON text")
    return dialects.crystals(item, key, "", ReadOptions())


def _read_cif(text: str, key: str) -> Iterable[Crystal | Fault]:
    """With the first of gemmi, pymatgen and ASE that is installed."""
    if importlib.util.find_spec("gemmi"):
        from sharding.sources import cif

        return cif.crystals(text, key, ReadOptions())
    if importlib.util.find_spec("pymatgen"):
        from pymatgen.core import Structure

        return _read(Structure.from_str(text, fmt="cif"), key)
    if importlib.util.find_spec("ase"):
        from ase.io import read

        return _read(read(StringIO(text), format="cif"), key)
    raise RefusedError("no_reader", "to read CIF, install gemmi (or pymatgen, or ase); JSON text needs none of them")


def _is_atoms(item: Any) -> bool:
    return hasattr(item, "get_atomic_numbers") and hasattr(item, "get_positions")


def _is_structure(item: Any) -> bool:
    return hasattr(item, "lattice") and hasattr(item, "as_dict")


def _items(model_input: Any) -> list[Any]:
    """The structures of a data frame, or of anything list-like; one structure is a list of one."""
    if hasattr(model_input, "columns"):
        if "structure" not in model_input.columns:
            raise ValueError(f"the column 'structure' is missing; there are {[str(c) for c in model_input.columns]}")
        return list(model_input["structure"])
    one = isinstance(model_input, (str, Mapping)) or _is_atoms(model_input) or _is_structure(model_input)
    return [model_input] if one else list(model_input)


def _parts(graphs: Multigraphs) -> Iterator[Multigraphs]:
    """Cut into parts of about HALF_EDGES."""
    part = offsets(graphs.n_edges)[:-1] // HALF_EDGES
    for p in np.unique(part):
        yield graphs.take(np.flatnonzero(part == p))


set_model(CdsslEncoder())
