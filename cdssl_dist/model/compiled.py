"""``torch.compile`` for the model: part by part, for the one static shape of a run's packs, kept on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from cdssl_dist.data.batch import GraphBatch
from cdssl_dist.model.edges import gaussians
from cdssl_dist.model.loss import squared_error
from cdssl_dist.model.megnet import PretextModel
from cdssl_dist.model.pretext import Denoising

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


class CompiledDenoising(Denoising):
    """The same task, its passes over (E, M) fused: expansions are made where they are needed, and never stored twice.

    As with the model, passes without gradients stay eager.
    """

    def expand(self, distance: Tensor) -> Tensor:
        """See ``Denoising``."""
        return _expand(*self.expansion.scaled(distance)) if torch.is_grad_enabled() else super().expand(distance)

    def squared_error(self, predicted: Tensor, clean: Tensor, batch: GraphBatch) -> Tensor:
        """See ``Denoising``."""
        if not torch.is_grad_enabled():
            return super().squared_error(predicted, clean, batch)
        return _squared_error(predicted, *self.expansion.scaled(clean.index_select(0, batch.half)), batch.scored)


def _error(predicted: Tensor, clean: Tensor, centers: Tensor, scored: Tensor) -> Tensor:
    return squared_error(predicted, gaussians(clean, centers), scored)


# Made once and compiled at the first call. Centres come from outside: compiled code would make them anew for each edge.
_expand: Callable[..., Tensor] = torch.compile(gaussians, dynamic=False)
_squared_error: Callable[..., Tensor] = torch.compile(_error, dynamic=False)


def _compile(part: Any, backend: str) -> None:
    eager = part.forward
    fast: Callable[..., Any] = torch.compile(eager, dynamic=False, backend=backend)

    def forward(*args: Any) -> Any:
        return fast(*args) if torch.is_grad_enabled() else eager(*args)

    part.forward = forward
