"""``torch.compile`` for the model: part by part, for the one static shape of a run's packs, kept on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from cdssl_dist.megnet import PretextModel

LIMIT: Final = 64  # shapes and parts that are compiled before torch gives up; 8 where nothing is said


def default_folder() -> Path:
    """CDSSL_COMPILED, else ``~/.cache/cdssl/compiled``."""
    return Path(os.environ.get("CDSSL_COMPILED") or Path.home() / ".cache" / "cdssl" / "compiled")


def compile_model(model: PretextModel, backend: str = "inductor") -> PretextModel:
    """Compile the training pass of a model, in place; names and values of its parameters stay as they are.

    Blocks are compiled one by one and not the whole: all but the first are the same code, which is compiled once, so
    that a deep model starts as soon as a flat one. Passes without gradients (validation) stay eager: they come rarely,
    and in another shape. What was compiled is kept on disk under a digest of code, shapes and versions.

    Args:
        model: as it was made, before an engine takes it.
        backend: of ``torch.compile``.

    Returns:
        The model.
    """
    if backend == "inductor":
        # Before the first compilation; where torch was told otherwise, that holds.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(default_folder()))
    torch._dynamo.config.recompile_limit = max(LIMIT, torch._dynamo.config.recompile_limit)
    for part in [model.encoder.input_u, *model.encoder.blocks, model.head]:
        _compile(part, backend)
    return model


def _compile(part: Any, backend: str) -> None:
    eager = part.forward
    fast: Callable[..., Any] = torch.compile(eager, dynamic=False, backend=backend)

    def forward(*args: Any) -> Any:
        return fast(*args) if torch.is_grad_enabled() else eager(*args)

    part.forward = forward
