"""``torch.compile`` for the model: part by part, cached on disk, for the static shape of packs or for any shape."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from cdssl_dist.data.batch import GraphBatch
from cdssl_dist.model.edges import gaussians
from cdssl_dist.model.loss import squared_error
from cdssl_dist.model.megnet import MEGNet, PretextModel
from cdssl_dist.model.pretext import Denoising

LIMIT: Final = 64  # compilations, of parts and shapes, before torch gives up; torch's default is 8


class NoCompilerError(RuntimeError):
    """torch.compile generates C++, but there is no C++ compiler."""


def default_folder() -> Path:
    """CDSSL_COMPILED, else ``~/.cache/cdssl/compiled``."""
    return Path(os.environ.get("CDSSL_COMPILED") or Path.home() / ".cache" / "cdssl" / "compiled")


def compile_model(model: PretextModel, backend: str = "inductor") -> PretextModel:
    """Compile the training pass of a model, in place; names and values of its parameters stay as they are.

    Blocks are compiled one by one, not as a whole: all but the first share their code, which is compiled once, so that
    a deep model starts as fast as a shallow one. Passes without gradients (validation) stay eager: they are rare, and
    have another shape. Compiled code is cached on disk under a digest of code, shapes and versions.

    Args:
        model: the model, before an engine wraps it.
        backend: of ``torch.compile``.

    Returns:
        The model.

    Raises:
        NoCompilerError: if there is no C++ compiler.
    """
    _compile([model.encoder.input_u, *model.encoder.blocks, model.head], backend, dynamic=False)
    return model


def compile_encoder(encoder: MEGNet, backend: str = "inductor") -> None:
    """Compile an encoder for fine-tuning, in place, for batches of any shape.

    Raises:
        NoCompilerError: if there is no C++ compiler.
    """
    _compile([encoder.input_u, *encoder.blocks], backend, dynamic=True)


class CompiledDenoising(Denoising):
    """The same task with fused passes over (E, M): expansions are computed where needed, and never stored twice.

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


# Created once, compiled at the first call. Centres are arguments: compiled code would recompute them for each edge.
_expand: Callable[..., Tensor] = torch.compile(gaussians, dynamic=False)
_squared_error: Callable[..., Tensor] = torch.compile(_error, dynamic=False)


def _compile(parts: Iterable[Any], backend: str, dynamic: bool) -> None:
    if backend == "inductor":
        _check_compiler()
        # Must precede the first compilation; a value that the user has set takes precedence.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(default_folder()))
    torch._dynamo.config.recompile_limit = max(LIMIT, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.specialize_float = True  # so that LOG1P stay constants, even if sizes are dynamic
    for part in parts:
        part.forward = _trained(part.forward, torch.compile(part.forward, dynamic=dynamic, backend=backend))


def _trained(eager: Callable[..., Any], fast: Callable[..., Any]) -> Callable[..., Any]:
    """Run compiled code if gradients are enabled, eager code otherwise."""
    return lambda *args: fast(*args) if torch.is_grad_enabled() else eager(*args)


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise NoCompilerError("torch.compile needs a C++ compiler; install g++, or set CXX") from None
