"""The files that an encoder is shared as: ``encoder.safetensors`` and ``encoder.json``, pure data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from cdssl_dist.model.edges import GaussianExpansion
from cdssl_dist.model.megnet import MEGNet
from sharding.commands import one_line
from sharding.graph import TIE
from sharding.manifest import write_atomically

FORMAT: Final = "cdssl-encoder"
VERSION: Final = 2
STEM: Final = "encoder"
PREFIX: Final = "encoder."  # of the encoder's weights in a pretext model


Upgrade = Callable[[dict[str, Any]], dict[str, Any]]
# version → upgrade to the next one. 1 → 2: the elements seen in pretraining.
UPGRADES: Final[dict[int, Upgrade]] = {1: lambda content: content | {"elements": []}}


class ExportError(ValueError):
    """An encoder cannot be read; the message is one line."""


@dataclass(frozen=True)
class EncoderCard:
    """Everything that is needed to use the weights, and where they come from."""

    cutoff: float  # Å
    centers: int
    end: float  # Å, of the last Gaussian
    gamma: float  # Å
    model: dict[str, Any]  # width, hidden, blocks
    sigma: tuple[float, float]  # Å
    precision: str
    data_digest: str
    validation_digest: str  # of the validation blocks and their noise: metrics are comparable if it is equal
    config_digest: str
    metrics: dict[str, float]
    sources: list[dict[str, str]]
    code_version: str
    elements: list[int] = field(default_factory=list)  # atomic numbers seen in pretraining; empty if unknown
    weights_sha256: str = ""
    tie: float = TIE
    format: str = FORMAT
    version: int = VERSION
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def expansion(self) -> GaussianExpansion:
        """The expansion that the encoder was trained with."""
        return GaussianExpansion(self.centers, self.end, self.gamma)


def write_encoder(folder: Path, weights: dict[str, Tensor], card: EncoderCard) -> None:
    """Write both files; the JSON, which holds the digest of the other, last."""
    mine = {n.removeprefix(PREFIX): w for n, w in weights.items() if n.startswith(PREFIX)}
    write_pair(folder, STEM, mine, asdict(card))


def read_card(folder: str | Path) -> EncoderCard:
    """Read ``encoder.json``.

    Raises:
        ExportError: if it is missing, not a card, or of a newer version.
    """
    path = Path(folder) / f"{STEM}.json"
    if not path.exists() and path.with_name("property.json").exists():
        raise ExportError(f"{folder}: a fine-tuned model, but an encoder is needed; property.json names the one it has")
    content = read_content(path, FORMAT, VERSION, UPGRADES)
    try:
        return EncoderCard(**{**content, "sigma": tuple(content["sigma"])})
    except (TypeError, KeyError) as why:
        raise ExportError(f"{path}: a key is missing or unknown ({why})") from None


def read_encoder(folder: str | Path) -> tuple[MEGNet, EncoderCard]:
    """Read an encoder: safetensors and JSON only, checked against the digest.

    Raises:
        ExportError: if a file is missing, damaged, or does not fit the card.
    """
    card = read_card(folder)
    path = Path(folder) / f"{STEM}.safetensors"
    weights = read_weights(path, card.weights_sha256)
    encoder = MEGNet(edge_features=card.centers, **card.model)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as why:
        raise ExportError(f"{path}: the weights do not fit the card ({one_line(why)})") from None
    return encoder, card


def write_pair(folder: Path, stem: str, weights: dict[str, Tensor], card: dict[str, Any]) -> None:
    """Write ``STEM.safetensors``, then ``STEM.json`` with its digest as ``weights_sha256``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}.safetensors"
    data = save({name: w.contiguous() for name, w in weights.items()})
    write_atomically(path, data)  # safetensors writes files that only their owner can read
    content = card | {"weights_sha256": hashlib.sha256(data).hexdigest()}
    write_atomically(folder / f"{stem}.json", json.dumps(content, indent=1, sort_keys=True).encode())


def read_content(path: Path, format_name: str, version: int, upgrades: dict[int, Upgrade]) -> dict[str, Any]:
    """Read the content of a card, upgraded to the newest version.

    Args:
        path: of the JSON file.
        format_name: the format it must have.
        version: the newest version known here.
        upgrades: version → function that upgrades the content to the next one.

    Raises:
        ExportError: if it is missing, not such a card, or of a newer version.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as why:
        raise ExportError(f"{path}: cannot be read ({why})") from None
    if not isinstance(content, dict) or content.get("format") != format_name:
        raise ExportError(f"{path}: not the card of a {format_name}")
    found = content.get("version")
    if not isinstance(found, int) or not 1 <= found <= version:
        raise ExportError(f"{path}: format version {found}; this program reads up to {version}: update cdssl_dist")
    for step in range(found, version):
        content = upgrades[step](content) | {"version": step + 1}
    return content


def read_weights(path: Path, digest: str) -> dict[str, Tensor]:
    """Read and verify the tensors of a safetensors file.

    Raises:
        ExportError: if it is missing, damaged, or not a safetensors file.
    """
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ExportError(f"{path}: its SHA-256 is not the one in its card; the download is damaged")
        return load_file(str(path))
    except (OSError, SafetensorError) as why:
        raise ExportError(f"{path}: not readable ({why})") from None
