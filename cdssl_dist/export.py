"""The encoder as it is shared: ``encoder.safetensors`` and ``encoder.json``, data and nothing else."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cdssl_dist.edges import GaussianExpansion
from cdssl_dist.megnet import MEGNet
from sharding.graph import TIE
from sharding.manifest import write_atomically

FORMAT: Final = "cdssl-encoder"
VERSION: Final = 1
PREFIX: Final = "encoder."  # of the encoder's weights in a pretext model


class ExportError(ValueError):
    """An encoder that cannot be read: said in one line."""


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
    validation_digest: str  # of the validation blocks and of how they are displaced: what makes figures comparable
    config_digest: str
    metrics: dict[str, float]
    sources: list[dict[str, str]]
    code_version: str
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
    """Write both files; the JSON, which names the digest of the other, last."""
    path = folder / "encoder.safetensors"
    mine = {n.removeprefix(PREFIX): w.contiguous() for n, w in weights.items() if n.startswith(PREFIX)}
    temporary = path.with_suffix(".tmp")
    save_file(mine, str(temporary))
    temporary.replace(path)
    content = asdict(card) | {"weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    write_atomically(folder / "encoder.json", json.dumps(content, indent=1, sort_keys=True).encode())


def read_card(folder: str | Path) -> EncoderCard:
    """Read ``encoder.json``.

    Raises:
        ExportError: where it is missing, no card, or of a newer version.
    """
    path = Path(folder) / "encoder.json"
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as why:
        raise ExportError(f"{path}: not an encoder ({why})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ExportError(f"{path}: not the card of a {FORMAT}")
    version = content.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ExportError(f"{path}: format version {version}; this program reads up to {VERSION}: update it")
    try:
        return EncoderCard(**{**content, "sigma": tuple(content["sigma"])})
    except (TypeError, KeyError) as why:
        raise ExportError(f"{path}: a key is missing or unknown ({why})") from None


def read_encoder(folder: str | Path) -> tuple[MEGNet, EncoderCard]:
    """Read an encoder: safetensors and JSON only, checked against the digest.

    Raises:
        ExportError: where a file is missing, damaged, or does not fit the card.
    """
    card = read_card(folder)
    path = Path(folder) / "encoder.safetensors"
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != card.weights_sha256:
            raise ExportError(f"{path}: its SHA-256 is not the one in encoder.json; the download is damaged")
        weights = load_file(str(path))
    except (OSError, SafetensorError) as why:
        raise ExportError(f"{path}: not readable ({why})") from None
    encoder = MEGNet(edge_features=card.centers, **card.model)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as why:
        raise ExportError(f"{path}: the weights do not fit the card ({' '.join(str(why).split())[:300]})") from None
    return encoder, card
