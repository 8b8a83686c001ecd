"""What the kernels share: activations, a linear layer on a tile, and how many programs there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTHS: Final = (16, 32, 64, 128)
FEW: Final = 3  # programs that share the tiles where there is no device: in the interpreter, which is a test


def check_width(name: str, value: int) -> None:
    """Raise ValueError where a layer is not one that the kernels were written for."""
    if value not in WIDTHS:
        raise ValueError(
            f"the Triton kernels take a {name} of {', '.join(map(str, WIDTHS))}, not {value}: "
            "a program holds whole layers; use engine.kernels=torch"
        )


def tuned(*shapes: tuple[int, int]) -> Callable[[Any], Any]:
    """Decorate a kernel that ends with ``TILE``: how many edges a program handles at once, and in how many warps.

    For each size and type of a layer all shapes are tried at the first call on a device; the fastest is kept on disk,
    so that the next process starts with it, and adds in the same order. Loads are not staged (``num_stages=1``): the
    buffers would take the shared memory that weights need.
    """
    if triton.knobs.runtime.interpret:  # on a CPU, which is a test
        shapes = ((16, 4),)
    configs = [triton.Config({"TILE": tile}, num_warps=warps, num_stages=1) for tile, warps in shapes]
    keys = ["CENTERS", "WIDTH", "HIDDEN", "DENSE", "RESIDUAL"]
    return lambda kernel: triton.autotune(
        configs, [key for key in keys if key in kernel.arg_names], cache_results=True
    )(kernel)


def programs(device: torch.device) -> int:
    """Of a kernel in which each program goes through several tiles and keeps sums of its own."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else FEW


def tiles_of(rows: int) -> Callable[[dict[str, int]], tuple[int]]:
    """The grid of a kernel with a program for each tile; at least one, so that no edges need no case of their own."""
    return lambda about: (max(triton.cdiv(rows, about["TILE"]), 1),)


def partial(count: int, like: Tensor) -> Tensor:
    """Room for the sums of each program."""
    return torch.empty(count, *like.shape, dtype=torch.float32, device=like.device)


def total(parts: Tensor, like: Tensor) -> Tensor:
    """Added up in a fixed order, in the type of the weight."""
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
    """Of one program, f32."""
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    at = tl.program_id(0) * ROWS * COLUMNS + r[:, None] * COLUMNS + c[None, :]
    tl.store(to + at, value)


@triton.jit
def store_vector(to: tl.tensor, value: tl.tensor, SIZE: tl.constexpr) -> None:
    """Of one program, f32."""
    tl.store(to + tl.program_id(0) * SIZE + tl.arange(0, SIZE), value)
