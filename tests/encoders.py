"""Small encoders for tests of code that uses encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cdssl_dist.model.export import EncoderCard, write_encoder
from cdssl_dist.model.megnet import PretextModel

SIZE = {"width": 8, "hidden": 16, "blocks": 2}


def write_encoder_to(folder: Path, seed: int = 0, skill: float | None = 0.3, **card: Any) -> Path:
    """A small random encoder."""
    torch.manual_seed(seed)
    about = {
        "cutoff": 4.0,
        "centers": 20,
        "end": 5.0,
        "gamma": 0.5,
        "model": SIZE,
        "sigma": (0.3, 0.3),
        "precision": "fp32",
        "data_digest": "d" * 64,
        "validation_digest": "v",
        "config_digest": "c" * 64,
        "metrics": {} if skill is None else {"val/skill": 0.5, "val/skill_edge": skill},
        "sources": [{"name": "AFLOW", "licence": "CC-BY-4.0"}],
        "code_version": "0.1.0",
    }
    write_encoder(folder, PretextModel(edge_features=20, **SIZE).state_dict(), EncoderCard(**about | card))
    return folder
