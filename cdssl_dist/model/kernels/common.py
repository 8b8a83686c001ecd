"""Code shared by the kernels: activations, a linear layer on a tile, and the number of programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTHS: Final = (16, 32, 64, 128)
FEW: Final = 3  # programs that share the tiles without a GPU: in the interpreter, for tests


def check_width(name: str, value: int) -> None:
    """Raise ValueError if the kernels do not support the width of a layer."""
    if value not in WIDTHS:
        raise ValueError(
            f"the Triton kernels take a {name} of {', '.join(map(str, WIDTHS))}, not {value}: "
            "a program holds whole layers; use engine.kernels=torch"
        )


def tuned(*shapes: tuple[int, int]) -> Callable[[Any], Any]:
    """Autotune a kernel, whose last argument is ``TILE``, over shapes: edges per program, and warps.

    For each size and type of a layer, all shapes are tried at the first call on a device; the fastest is cached on
    disk, so that later processes start with it, and add in the same order. Loads are not pipelined (``num_stages=1``):
    the buffers would take the shared memory that weights need.
    """
    if triton.knobs.runtime.interpret:  # on a CPU, for tests
        shapes = ((16, 4),)
    configs = [triton.Config({"TILE": tile}, num_warps=warps, num_stages=1) for tile, warps in shapes]
    keys = ["CENTERS", "WIDTH", "HIDDEN", "DENSE", "RESIDUAL"]
    return lambda kernel: triton.autotune(
        configs, [key for key in keys if key in kernel.arg_names], cache_results=True
    )(kernel)


def programs(device: torch.device) -> int:
    """Number of programs of a kernel in which each program loops over several tiles and keeps its own sums."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else FEW


def tiles_of(rows: int) -> Callable[[dict[str, int]], tuple[int]]:
    """The grid of a kernel with one program per tile; at least one, so that zero edges are not a special case."""
    return lambda about: (max(triton.cdiv(rows, about["TILE"]), 1),)


def partial(count: int, like: Tensor) -> Tensor:
    """Allocate the sums of all programs."""
    return torch.empty(count, *like.shape, dtype=torch.float32, device=like.device)


def total(parts: Tensor, like: Tensor) -> Tensor:
    """Add up the sums of all programs, in a fixed order; the result has the type of the weight."""
    return parts.sum(dim=0).to(like.dtype)


@triton.jit
def softplus(x: tl.tensor) -> tl.tensor:
    """The shifted softplus, zero at zero, f32."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x))) - 0.6931471805599453


@triton.jit
def linear(x: tl.tensor, weight: tl.tensor, INPUT: tl.constexpr, OUTPUT: tl.constexpr) -> tl.tensor:
    """X Wᵀ of a tile: (B, INPUT), weight (OUTPUT, INPUT) in memory → (B, OUTPUT) f32."""
    i = tl.arange(0, INPUT)
    o = tl.arange(0, OUTPUT)
    transposed = tl.load(weight + o[None, :] * INPUT + i[:, None])
    return tl.dot(x, transposed, input_precision="tf32x3")


@triton.jit
def back(dz: tl.tensor, weight: tl.tensor, INPUT: tl.constexpr, OUTPUT: tl.constexpr) -> tl.tensor:
    """Dz W: (B, OUTPUT) → (B, INPUT) f32, the gradient of what ``linear`` was given."""
    i = tl.arange(0, INPUT)
    o = tl.arange(0, OUTPUT)
    stored = tl.load(weight + o[:, None] * INPUT + i[None, :])
    return tl.dot(dz, stored, input_precision="tf32x3")


@triton.jit
def outer(dz: tl.tensor, x: tl.tensor) -> tl.tensor:
    """dzᵀ x: (B, OUTPUT), (B, INPUT) → (OUTPUT, INPUT) f32, the gradient of a weight."""
    return tl.dot(tl.trans(dz), x, input_precision="tf32x3")


@triton.jit
def store_matrix(to: tl.tensor, value: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> None:
    """Store the matrix of one program, f32."""
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    at = tl.program_id(0) * ROWS * COLUMNS + r[:, None] * COLUMNS + c[None, :]
    tl.store(to + at, value)


@triton.jit
def store_vector(to: tl.tensor, value: tl.tensor, SIZE: tl.constexpr) -> None:
    """Store the vector of one program, f32."""
    tl.store(to + tl.program_id(0) * SIZE + tl.arange(0, SIZE), value)
