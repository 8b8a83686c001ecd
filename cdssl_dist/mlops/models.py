"""Models that can be registered: pretrained encoders and fine-tuned models, each as two files of data only."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from cdssl_dist.finetune import predictor
from cdssl_dist.finetune.predictor import PropertyCard
from cdssl_dist.model import export
from cdssl_dist.model.export import EncoderCard, ExportError
from sharding.commands import one_line

CHAMPION: Final = "models:/cdssl-encoder@champion"  # pulled by default

Card = EncoderCard | PropertyCard


class RegistryError(ValueError):
    """A request that the registry cannot fulfil; the message is one line and says what helps."""


@dataclass(frozen=True)
class Kind:
    """A kind of model."""

    stem: str  # of its two files
    format: str
    version: int  # newest known
    read_card: Callable[[str | Path], Card]
    describe: Callable[[Any], dict[str, str]]  # card → tags
    comparable: tuple[str, ...]  # tags that must agree to compare scores
    score: str  # the tag by which the champion is chosen; higher is better

    @property
    def files(self) -> tuple[str, str]:
        """Weights and card."""
        return f"{self.stem}.safetensors", f"{self.stem}.json"


def _encoder_tags(card: EncoderCard) -> dict[str, str]:
    return {
        "config_digest": card.config_digest,
        "validation_digest": card.validation_digest,
        "sigma": json.dumps(card.sigma),
        "cutoff": json.dumps(card.cutoff),
        "expansion": json.dumps([card.centers, card.end, card.gamma]),
        "skill": str(card.metrics.get("val/skill", math.nan)),
        "skill_edge": str(card.metrics.get("val/skill_edge", math.nan)),
    }


def _property_tags(card: PropertyCard) -> dict[str, str]:
    return {
        "targets": _listed([t["name"] for t in card.task["targets"]]),
        "units": _listed([t["unit"] for t in card.task["targets"]]),
        "members": str(len(card.scalers)),
        "encoder": str(card.encoder["ref"]),  # the parent
        "encoder_weights_sha256": str(card.encoder["weights_sha256"]),
        "skill_test": str(card.metrics.get("test/skill", math.nan)),
    }


ENCODER: Final = Kind(
    export.STEM,
    export.FORMAT,
    export.VERSION,
    export.read_card,
    _encoder_tags,
    ("validation_digest", "sigma", "cutoff", "expansion"),
    "skill_edge",
)
PROPERTY: Final = Kind(
    predictor.STEM,
    predictor.FORMAT,
    predictor.VERSION,
    predictor.read_property_card,
    _property_tags,
    ("data_digest", "targets"),
    "skill_test",
)
KINDS: Final = (ENCODER, PROPERTY)


def model_folder(folder: Path) -> Path:
    """The folder of a model: what is given, or the ``model`` in what ``cdssl finetune`` left there."""
    tuned = folder / "model"
    return tuned if (tuned / PROPERTY.files[1]).exists() and not (folder / ENCODER.files[1]).exists() else folder


def kind_of(folder: Path) -> Kind:
    """The kind of model in a folder; an encoder if there is none, so that the error names the missing files."""
    return next((k for k in KINDS if (folder / k.files[1]).exists()), ENCODER)


def kind_of_tags(uri: str, tags: dict[str, str]) -> Kind:
    """The kind of a registered version, from its tag ``format``.

    Raises:
        RegistryError: if cdssl did not register it, or it is newer than this program.
    """
    name, _, version = tags.get("format", "").partition(" ")
    kind = next((k for k in KINDS if k.format == name), None)
    if kind is None:
        raise RegistryError(f"{uri}: not a model that cdssl registered: its tag 'format' is missing or unknown")
    if version.isdecimal() and int(version) > kind.version:
        text = f"{uri}: format {name} {version}; this program reads up to {kind.version}: update cdssl_dist"
        raise RegistryError(text)
    return kind


def tags_of(folder: Path, kind: Kind) -> dict[str, str]:
    """Tags that describe the model of a version."""
    card = kind.read_card(folder)
    return {
        "format": f"{card.format} {json.loads((folder / kind.files[1]).read_text())['version']}",
        "weights_sha256": card.weights_sha256,
        "card_sha256": sha256(folder / kind.files[1]),
        "data_digest": card.data_digest,
        "code_version": card.code_version,
        "code_digest": code_digest(),
        "metrics": json.dumps(card.metrics, sort_keys=True)[:5000],
        "licences": _listed(sorted({s.get("licence") or "unknown" for s in card.sources})),
        "sources": _listed([s.get("name", "?") for s in card.sources]),
        **kind.describe(card),
    }


def _listed(texts: list[str]) -> str:
    """A list as a tag: at most 5,000 characters (MLflow's limit), and ASCII, as some databases take nothing else."""
    return json.dumps(texts)[:5000]


def checked(folder: Path, kind: Kind) -> Card:
    """Read the card of a folder, and check that its weights are safetensors with the card's digest.

    Raises:
        RegistryError: if they are not, or the card cannot be read.
    """
    path = folder / kind.files[0]
    try:
        card = kind.read_card(folder)
        if sha256(path) != card.weights_sha256:
            raise RegistryError(f"{path}: its SHA-256 is not the one in {kind.files[1]}; it is damaged, get it again")
        with safe_open(str(path), "numpy"):
            return card
    except (ExportError, KeyError, TypeError, OSError, SafetensorError) as why:
        text = one_line(why, 200)
        raise RegistryError(f"{folder}: holds no {' and '.join(kind.files)} to use ({text})") from None


@functools.cache
def code_digest(*parts: str) -> str:
    """SHA-256 of the Python files of this program: a version number alone does not tell one checkout from another.

    Args:
        parts: files and folders to include; the whole program by default.
    """
    home = Path(__file__).parents[2]
    named = [home / part for part in parts or ("cdssl_dist", "sharding")]
    files = [p for part in named for p in ([part] if part.is_file() else part.rglob("*.py"))]
    listed = sorted(f"{p.relative_to(home).as_posix()} {sha256(p)}\n" for p in files)
    return hashlib.sha256("".join(listed).encode()).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
