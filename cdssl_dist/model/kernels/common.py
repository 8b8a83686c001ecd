"""What the kernels share: activations, a linear layer on a tile, and how many programs there are."""

from __future__ import annotations

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


def rows_per_tile(widest: int) -> int:
    """Edges that a program handles at once."""
    return 64 if widest <= 64 else 32


def programs(tiles: int, device: torch.device) -> int:
    """Of a kernel in which each program goes through several tiles and keeps sums of its own."""
    if device.type != "cuda":
        return min(tiles, FEW)
    return min(tiles, 2 * torch.cuda.get_device_properties(device).multi_processor_count)


def tiles_of(rows: int, per_tile: int) -> int:
    """At least one, so that a pack without edges needs no case of its own."""
    return max(-(-rows // per_tile), 1)


def partial(count: int, like: Tensor) -> Tensor:
    """Room for the sums of each program."""
    return torch.empty(count, *like.shape, dtype=torch.float32, device=like.device)


def total(parts: Tensor, like: Tensor) -> Tensor:
    """Added up in a fixed order, in the type of the weight."""
    return parts.sum(dim=0).to(like.dtype)


@triton.jit
def softplus(x: Any) -> Any:
    """The shifted softplus, zero at zero, f32."""
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x))) - 0.6931471805599453


@triton.jit
def linear(x: Any, weight: Any, INPUT: tl.constexpr, OUTPUT: tl.constexpr) -> Any:
    """X Wᵀ of a tile: (B, INPUT), weight (OUTPUT, INPUT) in memory → (B, OUTPUT) f32."""
    i = tl.arange(0, INPUT)
    o = tl.arange(0, OUTPUT)
    transposed = tl.load(weight + o[None, :] * INPUT + i[:, None])
    return tl.dot(x, transposed, input_precision="ieee")


@triton.jit
def back(dz: Any, weight: Any, INPUT: tl.constexpr, OUTPUT: tl.constexpr) -> Any:
    """Dz W: (B, OUTPUT) → (B, INPUT) f32, the gradient of what ``linear`` was given."""
    i = tl.arange(0, INPUT)
    o = tl.arange(0, OUTPUT)
    stored = tl.load(weight + o[:, None] * INPUT + i[None, :])
    return tl.dot(dz, stored, input_precision="ieee")


@triton.jit
def outer(dz: Any, x: Any) -> Any:
    """dzᵀ x: (B, OUTPUT), (B, INPUT) → (OUTPUT, INPUT) f32, the gradient of a weight."""
    return tl.dot(tl.trans(dz), x, input_precision="ieee")


@triton.jit
def store_matrix(to: Any, value: Any, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> None:
    """Of one program, f32."""
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    at = tl.program_id(0) * ROWS * COLUMNS + r[:, None] * COLUMNS + c[None, :]
    tl.store(to + at, value)


@triton.jit
def store_vector(to: Any, value: Any, SIZE: tl.constexpr) -> None:
    """Of one program, f32."""
    tl.store(to + tl.program_id(0) * SIZE + tl.arange(0, SIZE), value)
