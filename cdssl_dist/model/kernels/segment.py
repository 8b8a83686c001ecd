"""Sums over consecutive rows, and gathers whose gradient is such a sum: no atomics, a fixed order of addition."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # rows added at once


@triton.jit
def _sum(
    values: tl.tensor,
    order: tl.tensor,
    row_ptr: tl.tensor,
    stop: tl.tensor,
    out: tl.tensor,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    ORDERED: tl.constexpr,
) -> None:
    segment = tl.program_id(0)
    begin = tl.load(row_ptr + segment)
    end = tl.minimum(tl.load(row_ptr + segment + 1), tl.load(stop))
    column = tl.arange(0, PADDED)
    inside = column < WIDTH
    total = tl.zeros([PADDED], tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        live = row < end
        at = tl.load(order + row, mask=live, other=0) if ORDERED else row
        found = tl.load(
            values + at.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=live[:, None] & inside[None, :], other=0.0
        )
        total += tl.sum(found.to(tl.float32), 0)
    tl.store(out + segment * WIDTH + column, total, mask=inside)


def sum_rows(values: Tensor, row_ptr: Tensor, stop: Tensor, order: Tensor | None = None) -> Tensor:
    """Sums of the rows of each segment, f32.

    Args:
        values: (n, W).
        row_ptr: (segments + 1,) integers; rows of segment i are row_ptr[i] : row_ptr[i + 1].
        stop: () of the same type; rows from here on are padding, and not added, since one program would add them all.
        order: (n,) which row to take at each place; if omitted, rows are taken as they lie.

    Returns:
        (segments, W) f32.
    """
    segments, width = len(row_ptr) - 1, values.shape[1]
    out = torch.empty(segments, width, dtype=torch.float32, device=values.device)
    padded = triton.next_power_of_2(width)
    index = row_ptr if order is None else order
    _sum[(segments,)](
        values.contiguous(), index, row_ptr, stop, out, width, padded, ROWS, order is not None, num_warps=1
    )
    return out


class SegmentSum(torch.autograd.Function):
    """Sum of the rows of each segment: see ``sum_rows``; ``index`` is the segment of each row."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, row_ptr: Tensor, stop: Tensor, index: Tensor) -> Tensor:
        """(n, W) → (segments, W) f32."""
        ctx.save_for_backward(index)
        ctx.dtype = values.dtype
        return sum_rows(values, row_ptr, stop)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Each row gets the gradient of its segment."""
        (index,) = ctx.saved_tensors
        return gradients[0].index_select(0, index).to(ctx.dtype), None, None, None


class Gather(torch.autograd.Function):
    """Give every member of a segment the row of that segment."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, row_ptr: Tensor, stop: Tensor, index: Tensor) -> Tensor:
        """(segments, W) → (n, W)."""
        ctx.save_for_backward(row_ptr, stop)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The sum over each segment."""
        row_ptr, stop = ctx.saved_tensors
        return sum_rows(gradients[0], row_ptr, stop).to(gradients[0].dtype), None, None, None
