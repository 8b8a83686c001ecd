"""A fine-tuned model as it is shared: one network or an ensemble, ``property.safetensors`` and ``property.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from cdssl_dist import __version__
from cdssl_dist.finetune.targets import Array, Scaler, Task
from cdssl_dist.finetune.tuning import Member, outputs
from cdssl_dist.model.edges import GaussianExpansion
from cdssl_dist.model.export import EncoderCard, ExportError, Upgrade, read_content, read_weights, write_pair
from cdssl_dist.model.heads import PropertyModel, ReadoutName
from cdssl_dist.model.megnet import MEGNet
from sharding.commands import one_line
from sharding.graph import Multigraphs

FORMAT: Final = "cdssl-property"
VERSION: Final = 4
STEM: Final = "property"

# Version → function that upgrades a card to the next version. New in 2: factors for the deviation of an ensemble; in 3:
# whether the logarithm of a target is learned; in 4: the readout.
UPGRADES: Final[dict[int, Upgrade]] = {
    1: lambda content: content | {"uncertainty": {}},
    2: lambda content: content,
    3: lambda content: content | {"readout": "set2set"},
}


@dataclass(frozen=True)
class PropertyCard:
    """Everything needed to predict, and the provenance of the weights."""

    task: dict[str, Any]  # see targets.Task
    scalers: list[dict[str, list[float]]]  # of each member: center, scale
    cutoff: float  # Å
    centers: int
    end: float  # Å
    gamma: float  # Å
    model: dict[str, Any]  # of the encoder: width, hidden, blocks
    elements: list[int]  # atomic numbers seen in pretraining or fine-tuning; empty where not known
    encoder: dict[str, Any]  # ref, weights_sha256, data_digest of the encoder
    data_digest: str  # of the labeled crystals: keys, labels and test sets
    settings: dict[str, Any]
    metrics: dict[str, float]
    sources: list[dict[str, str]]
    code_version: str
    readout: ReadoutName = "set2set"
    uncertainty: dict[str, float] = field(default_factory=dict)  # target → see uncertainty.Uncertainty.factor
    weights_sha256: str = ""
    format: str = FORMAT
    version: int = VERSION
    extra: dict[str, Any] = field(default_factory=dict)


class Prediction(NamedTuple):
    """Predictions of an ensemble."""

    mean: Array  # (n, T) in the units of the targets, or (n, C) probabilities
    std: Array  # same shape: standard deviation between members, 0 for a single one


class Predictor:
    """An ensemble of fine-tuned networks.

    Args:
        networks: one or more, all for the same task.
        scalers: one for each network.
        task: what they predict.
        card: their card.
    """

    def __init__(self, networks: Sequence[PropertyModel], scalers: Sequence[Scaler], task: Task, card: PropertyCard):
        self.networks, self.scalers, self.task, self.card = list(networks), list(scalers), task, card
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for network in self.networks:
            network.to(device)

    def predict(self, graphs: Multigraphs) -> Prediction:
        """Predictions for graphs that were built with the card's cutoff."""
        each = np.stack([outputs(n, graphs, s, self.task) for n, s in zip(self.networks, self.scalers, strict=True)])
        return Prediction(each.mean(axis=0), each.std(axis=0))

    def unseen(self, graphs: Multigraphs) -> list[list[int]]:
        """Atomic numbers in each crystal that neither pretraining nor fine-tuning has seen: predictions are guesses."""
        return unseen_elements(self.card.elements, graphs)


def unseen_elements(seen: Sequence[int], graphs: Multigraphs) -> list[list[int]]:
    """Atomic numbers in each crystal that are not in ``seen``; no numbers at all if ``seen`` is empty (unknown)."""
    known = np.zeros(256, bool)
    known[list(seen)] = True
    strange = np.full(len(graphs.atomic_numbers), False) if not len(seen) else ~known[graphs.atomic_numbers]
    found: list[list[int]] = [[] for _ in range(len(graphs))]
    if strange.any():
        graph = np.repeat(np.arange(len(graphs)), graphs.n_atoms)
        for g, z in sorted({*zip(graph[strange].tolist(), graphs.atomic_numbers[strange].tolist(), strict=True)}):
            found[g].append(z)
    return found


def network_of(card: EncoderCard | PropertyCard, outputs_: int, readout: ReadoutName = "set2set") -> PropertyModel:
    """An untrained network of the right shape."""
    expansion = GaussianExpansion(card.centers, card.end, card.gamma)
    return PropertyModel(MEGNet(edge_features=card.centers, **card.model), expansion, outputs_, readout)


def write_property(folder: Path, members: Sequence[Member], card: PropertyCard) -> None:
    """Write both files, the JSON last, as it holds the digest of the weights."""
    weights = {f"{i}.{name}": w for i, member in enumerate(members) for name, w in member.weights.items()}
    write_pair(folder, STEM, weights, asdict(card))


def property_card(
    encoder: EncoderCard,
    ref: str,
    members: Sequence[Member],
    task: Task,
    graphs: Multigraphs,
    settings: dict[str, Any],
    **known: Any,
) -> PropertyCard:
    """Build the card of networks that were trained from an encoder.

    Args:
        encoder: card of the encoder.
        ref: reference by which the encoder was pulled.
        members: the networks.
        task: what they predict.
        graphs: the crystals they were trained on.
        settings: settings of the training.
        known: further fields of the card; without them, it has no metrics and says nothing about the data.
    """
    seen = sorted({*encoder.elements, *np.unique(graphs.atomic_numbers).tolist()}) if encoder.elements else []
    nothing: dict[str, Any] = {"data_digest": "", "metrics": {}, "sources": []}
    return PropertyCard(
        task=asdict(task),
        scalers=[{"center": m.scaler.center.tolist(), "scale": m.scaler.scale.tolist()} for m in members],
        cutoff=encoder.cutoff,
        centers=encoder.centers,
        end=encoder.end,
        gamma=encoder.gamma,
        model=encoder.model,
        elements=seen,
        encoder={"ref": ref, "weights_sha256": encoder.weights_sha256, "data_digest": encoder.data_digest},
        settings=settings,
        readout=members[0].readout,
        code_version=__version__,
        **nothing | known,
    )


def read_property_card(folder: str | Path) -> PropertyCard:
    """Read ``property.json``.

    Raises:
        ExportError: if it is missing, is not such a card, or has a newer version.
    """
    path = Path(folder) / f"{STEM}.json"
    try:
        return PropertyCard(**read_content(path, FORMAT, VERSION, UPGRADES))
    except (TypeError, KeyError) as why:
        raise ExportError(f"{path}: a key is missing or unknown ({why})") from None


def read_property(folder: str | Path) -> Predictor:
    """Read a fine-tuned model: safetensors and JSON only, checked against the digest.

    Raises:
        ExportError: if a file is missing or damaged, or does not fit the card.
    """
    card = read_property_card(folder)
    path = Path(folder) / f"{STEM}.safetensors"
    weights = read_weights(path, card.weights_sha256)
    try:
        task = Task.read(card.task)
        networks, scalers = [], []
        for i, scaler in enumerate(card.scalers):
            network = network_of(card, task.outputs, card.readout)
            network.load_state_dict({n.removeprefix(f"{i}."): w for n, w in weights.items() if n.startswith(f"{i}.")})
            networks.append(network)
            scalers.append(Scaler(np.array(scaler["center"]), np.array(scaler["scale"]), task.targets))
    except (RuntimeError, TypeError, KeyError) as why:
        raise ExportError(f"{path}: the weights do not fit the card ({one_line(why)})") from None
    return Predictor(networks, scalers, task, card)
