"""Both ends of the edge path: Gaussian expansion with the input layers, and the last layer with the loss.

Values with a column per Gaussian are computed from distances, in registers, and never stored.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cdssl_dist.model.edges import GaussianExpansion
from cdssl_dist.model.kernels.common import (
    back,
    linear,
    outer,
    partial,
    programs,
    softplus,
    store_matrix,
    store_vector,
    tiles_of,
    total,
    tuned,
)


@triton.jit
def _expanded(distance: tl.tensor, spacing: tl.tensor, gamma: tl.tensor, PADDED: tl.constexpr) -> tl.tensor:
    """(B,) Å → (B, PADDED) f32; columns beyond the last centre meet weights of zero."""
    scaled = (distance[:, None] - tl.arange(0, PADDED).to(tl.float32)[None, :] * spacing) / gamma
    return tl.exp(-scaled * scaled)


@triton.jit
def _padded(weight: tl.tensor, ROWS: tl.constexpr, CENTERS: tl.constexpr, PADDED: tl.constexpr) -> tl.tensor:
    """(ROWS, CENTERS) in memory → (PADDED, ROWS), zeros beyond."""
    r = tl.arange(0, ROWS)
    m = tl.arange(0, PADDED)
    return tl.load(weight + r[None, :] * CENTERS + m[:, None], mask=(m < CENTERS)[:, None], other=0.0)


@triton.jit
def _input_layers(
    features: tl.tensor,
    w1: tl.tensor,
    b1: tl.tensor,
    w2: tl.tensor,
    b2: tl.tensor,
    CENTERS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
) -> tl.tensor:
    first = _padded(w1, HIDDEN, CENTERS, PADDED)
    z1 = tl.dot(features, first, input_precision="tf32x3")
    z1 += tl.load(b1 + tl.arange(0, HIDDEN)).to(tl.float32)[None, :]
    h1 = softplus(z1).to(features.dtype)
    z2 = linear(h1, w2, HIDDEN, WIDTH) + tl.load(b2 + tl.arange(0, WIDTH)).to(tl.float32)[None, :]
    return z1, h1, z2


@tuned((64, 4), (64, 8), (32, 4), (16, 4))
@triton.jit
def _expand_forward(
    distance: tl.tensor,
    w1: tl.tensor,
    b1: tl.tensor,
    w2: tl.tensor,
    b2: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    spacing: tl.tensor,
    gamma: tl.tensor,
    CENTERS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = row < n
    d = tl.load(distance + row, mask=live, other=0.0)
    features = _expanded(d, spacing, gamma, PADDED).to(w1.dtype.element_ty)
    _, _, z2 = _input_layers(features, w1, b1, w2, b2, CENTERS, PADDED, WIDTH, HIDDEN)
    at = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(out + at, softplus(z2).to(features.dtype), mask=live[:, None])


@tuned((64, 4), (64, 8), (32, 4), (32, 8), (16, 8))
@triton.jit
def _expand_backward(
    distance: tl.tensor,
    w1: tl.tensor,
    b1: tl.tensor,
    w2: tl.tensor,
    b2: tl.tensor,
    g_out: tl.tensor,
    g_w1: tl.tensor,
    g_b1: tl.tensor,
    g_w2: tl.tensor,
    g_b2: tl.tensor,
    n: tl.tensor,
    spacing: tl.tensor,
    gamma: tl.tensor,
    CENTERS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    a_w1 = tl.zeros([HIDDEN, PADDED], tl.float32)
    a_b1 = tl.zeros([HIDDEN], tl.float32)
    a_w2 = tl.zeros([WIDTH, HIDDEN], tl.float32)
    a_b2 = tl.zeros([WIDTH], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n, TILE), tl.num_programs(0)):
        row = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        live = row < n
        d = tl.load(distance + row, mask=live, other=0.0)
        features = _expanded(d, spacing, gamma, PADDED).to(w1.dtype.element_ty)
        z1, h1, z2 = _input_layers(features, w1, b1, w2, b2, CENTERS, PADDED, WIDTH, HIDDEN)
        at = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        g = tl.load(g_out + at, mask=live[:, None], other=0.0).to(tl.float32)
        gz2 = (g * tl.sigmoid(z2)).to(features.dtype)
        a_w2 += outer(gz2, h1)
        a_b2 += tl.sum(gz2.to(tl.float32), 0)
        gz1 = (back(gz2, w2, HIDDEN, WIDTH) * tl.sigmoid(z1)).to(features.dtype)
        a_w1 += outer(gz1, features)
        a_b1 += tl.sum(gz1.to(tl.float32), 0)
    h = tl.arange(0, HIDDEN)
    m = tl.arange(0, PADDED)
    at = tl.program_id(0) * HIDDEN * CENTERS + h[:, None] * CENTERS + m[None, :]
    tl.store(g_w1 + at, a_w1, mask=(m < CENTERS)[None, :])
    store_vector(g_b1, a_b1, HIDDEN)
    store_matrix(g_w2, a_w2, WIDTH, HIDDEN)
    store_vector(g_b2, a_b2, WIDTH)


class Expand(torch.autograd.Function):
    """Distances → edge vectors after the two input layers."""

    @staticmethod
    def forward(ctx: Any, distance: Tensor, expansion: GaussianExpansion, *weights: Tensor) -> Tensor:
        """(E,) f32, Å; weights (H, M), (H,), (W, H), (W,) → (E, W)."""
        held = [w.contiguous() for w in weights]
        n, (hidden, centers), width = len(distance), held[0].shape, len(held[3])
        out = torch.empty(n, width, dtype=held[0].dtype, device=distance.device)
        _expand_forward[tiles_of(n)](
            distance, *held, out, n, *_numbers(expansion), centers, _padding(centers), width, hidden
        )
        ctx.save_for_backward(distance, *held)
        ctx.expansion = expansion
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Gradients of the weights; distances need none."""
        distance, *held = ctx.saved_tensors
        n, (hidden, centers), width = len(distance), held[0].shape, len(held[3])
        count = programs(distance.device)
        parts = [partial(count, w) for w in held]
        _expand_backward[(count,)](
            *(distance, *held, gradients[0].contiguous(), *parts, n, *_numbers(ctx.expansion)),
            *(centers, _padding(centers), width, hidden),
        )
        return None, None, *(total(p, w) for p, w in zip(parts, held, strict=True))


@triton.jit
def _errors(
    u: tl.tensor,
    row: tl.tensor,
    live: tl.tensor,
    clean: tl.tensor,
    scored: tl.tensor,
    w: tl.tensor,
    b: tl.tensor,
    spacing: tl.tensor,
    gamma: tl.tensor,
    CENTERS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """ê − e of a tile, zero where it is not scored: (B, PADDED) f32."""
    m = tl.arange(0, PADDED)
    c = tl.arange(0, WIDTH)
    inside = m < CENTERS
    last = tl.load(w + m[None, :] * WIDTH + c[:, None], mask=inside[None, :], other=0.0)
    guess = tl.dot(u, last, input_precision="tf32x3") + tl.load(b + m, mask=inside, other=0.0).to(tl.float32)[None, :]
    d = tl.load(clean + row, mask=live, other=0.0)
    counts = tl.load(scored + row, mask=live, other=0) != 0
    return tl.where(counts[:, None] & inside[None, :], guess - _expanded(d, spacing, gamma, PADDED), 0.0)


@tuned((64, 4), (64, 8), (32, 4), (16, 4))
@triton.jit
def _loss_forward(
    u: tl.tensor,
    clean: tl.tensor,
    scored: tl.tensor,
    w: tl.tensor,
    b: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    spacing: tl.tensor,
    gamma: tl.tensor,
    CENTERS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    squared = tl.zeros([TILE], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n, TILE), tl.num_programs(0)):
        row = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        live = row < n
        at = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        values = tl.load(u + at, mask=live[:, None], other=0.0)
        error = _errors(values, row, live, clean, scored, w, b, spacing, gamma, CENTERS, PADDED, WIDTH)
        squared += tl.sum(error * error, 1)
    tl.store(out + tl.program_id(0), tl.sum(squared, 0))


@tuned((64, 4), (64, 8), (32, 4), (32, 8), (16, 8))
@triton.jit
def _loss_backward(
    u: tl.tensor,
    clean: tl.tensor,
    scored: tl.tensor,
    w: tl.tensor,
    b: tl.tensor,
    gradient: tl.tensor,
    du: tl.tensor,
    g_w: tl.tensor,
    g_b: tl.tensor,
    n: tl.tensor,
    spacing: tl.tensor,
    gamma: tl.tensor,
    CENTERS: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    m = tl.arange(0, PADDED)
    c = tl.arange(0, WIDTH)
    inside = m < CENTERS
    twice = 2.0 * tl.load(gradient)
    a_w = tl.zeros([PADDED, WIDTH], tl.float32)
    a_b = tl.zeros([PADDED], tl.float32)
    stored = tl.load(w + m[:, None] * WIDTH + c[None, :], mask=inside[:, None], other=0.0)
    for tile in range(tl.program_id(0), tl.cdiv(n, TILE), tl.num_programs(0)):
        row = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        live = row < n
        at = row[:, None] * WIDTH + c[None, :]
        values = tl.load(u + at, mask=live[:, None], other=0.0)
        error = _errors(values, row, live, clean, scored, w, b, spacing, gamma, CENTERS, PADDED, WIDTH)
        g = (twice * error).to(values.dtype)
        a_w += outer(g, values)
        a_b += tl.sum(g.to(tl.float32), 0)
        tl.store(du + at, tl.dot(g, stored, input_precision="tf32x3").to(values.dtype), mask=live[:, None])
    at = tl.program_id(0) * CENTERS * WIDTH + m[:, None] * WIDTH + c[None, :]
    tl.store(g_w + at, a_w, mask=inside[:, None])
    tl.store(g_b + tl.program_id(0) * CENTERS + m, a_b, mask=inside)


class Loss(torch.autograd.Function):
    """The last layer, the clean embedding and Σ (ê − e)² over scored edges."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, clean: Tensor, scored: Tensor, expansion: GaussianExpansion, w: Tensor, b: Tensor
    ) -> Tensor:
        """(E, W), (E,) f32 Å, (E,) bool, (M, W), (M,) → () f32."""
        u, w, counts = u.contiguous(), w.contiguous(), scored.to(torch.int8)
        centers, width = w.shape
        ctx.about = (*_numbers(expansion), centers, _padding(centers), width)
        out = torch.empty(programs(u.device), dtype=torch.float32, device=u.device)
        _loss_forward[(len(out),)](u, clean, counts, w, b, out, len(u), *ctx.about)
        ctx.save_for_backward(u, clean, counts, w, b)
        return out.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Gradients of edges and weights."""
        u, clean, counts, w, b = ctx.saved_tensors
        count = programs(u.device)
        du, g_w, g_b = torch.empty_like(u), partial(count, w), partial(count, b)
        gradient = gradients[0].to(torch.float32).contiguous()
        _loss_backward[(count,)](u, clean, counts, w, b, gradient, du, g_w, g_b, len(u), *ctx.about)
        return du, None, None, None, total(g_w, w), total(g_b, b)


def _numbers(expansion: GaussianExpansion) -> tuple[float, float]:
    """Spacing of the centres and γ, Å."""
    return expansion.end / (expansion.centers - 1), expansion.gamma


def _padding(centers: int) -> int:
    """Columns of a matrix product over Gaussians: a power of two, at least 16."""
    return max(int(triton.next_power_of_2(centers)), 16)
