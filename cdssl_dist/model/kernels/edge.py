"""The edge path of a block: dense layers, edge update and residual in one kernel; two for backward, which recompute.

For edge e from v' to v: u₁ = dense(u), z₁ = W_e u₁ + r[v] + t[v'], and u' = φ(W₃ φ(W₂ φ(z₁) + b₂) + b₃), where r and t
are the projections of nodes (and state, and bias), computed once per atom. Per edge, only u is kept for backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cdssl_dist.data.batch import GraphBatch
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
from cdssl_dist.model.kernels.segment import sum_rows


@dataclass(frozen=True)
class Rows:
    """Which atoms an edge joins, and which edges and atoms form a segment, as 32-bit integers."""

    receiver: Tensor  # (E,)
    sender: Tensor  # (E,)
    row_ptr: Tensor  # (N + 1,)
    mirror: Tensor  # (E,)
    edges: Tensor  # () | number of real edges; padding follows them
    graph_ptr: Tensor  # (G + 1,) | atoms of graph g are graph_ptr[g] : graph_ptr[g + 1]
    atoms: Tensor  # () | number of atoms, padding included

    @staticmethod
    def of(batch: GraphBatch) -> Rows:
        """Build from a batch, on its device, without synchronizing."""
        graph_ptr = torch.zeros(batch.n_graphs + 1, dtype=torch.int32, device=batch.positions.device)
        graph_ptr[1:] = torch.cumsum(batch.atoms_of_graph, 0)
        return Rows(
            receiver=batch.receiver.int(),
            sender=batch.sender.int(),
            row_ptr=batch.row_ptr.int(),
            mirror=batch.mirror.int(),
            edges=batch.row_ptr[-1].int() - batch.edges_of_graph[-1].int(),
            graph_ptr=graph_ptr,
            atoms=graph_ptr[-1],
        )


@triton.jit
def _before(
    u: tl.tensor,
    w: tl.tensor,
    b: tl.tensor,
    v: tl.tensor,
    c: tl.tensor,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
) -> tl.tensor:
    """The dense layers: (B, WIDTH) → φ' and φ of both, in the type of the edges."""
    z1 = linear(u, w, WIDTH, HIDDEN) + tl.load(b + tl.arange(0, HIDDEN)).to(tl.float32)[None, :]
    h1 = softplus(z1).to(u.dtype)
    z2 = linear(h1, v, HIDDEN, WIDTH) + tl.load(c + tl.arange(0, WIDTH)).to(tl.float32)[None, :]
    return tl.sigmoid(z1).to(u.dtype), h1, tl.sigmoid(z2).to(u.dtype), softplus(z2).to(u.dtype)


@triton.jit
def _update(
    u: tl.tensor,
    row: tl.tensor,
    live: tl.tensor,
    received: tl.tensor,
    sent: tl.tensor,
    receiver: tl.tensor,
    sender: tl.tensor,
    we: tl.tensor,
    w2: tl.tensor,
    b2: tl.tensor,
    w3: tl.tensor,
    b3: tl.tensor,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
) -> tl.tensor:
    """The edge update: (B, WIDTH) → φ' and φ of the three layers, in the type of the edges but for the last φ, f32."""
    h = tl.arange(0, HIDDEN)
    v = tl.load(receiver + row, mask=live, other=0).to(tl.int64)
    s = tl.load(sender + row, mask=live, other=0).to(tl.int64)
    z1 = linear(u, we, WIDTH, HIDDEN)
    z1 += tl.load(received + v[:, None] * HIDDEN + h[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    z1 += tl.load(sent + s[:, None] * HIDDEN + h[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    h1 = softplus(z1).to(u.dtype)
    z2 = linear(h1, w2, HIDDEN, HIDDEN) + tl.load(b2 + h).to(tl.float32)[None, :]
    h2 = softplus(z2).to(u.dtype)
    z3 = linear(h2, w3, HIDDEN, WIDTH) + tl.load(b3 + tl.arange(0, WIDTH)).to(tl.float32)[None, :]
    d1, d2, d3 = tl.sigmoid(z1).to(u.dtype), tl.sigmoid(z2).to(u.dtype), tl.sigmoid(z3).to(u.dtype)
    return d1, h1, d2, h2, d3, softplus(z3)


@tuned((64, 4), (64, 8), (32, 4), (16, 4), (16, 8))
@triton.jit
def _forward(
    u: tl.tensor,
    received: tl.tensor,
    sent: tl.tensor,
    receiver: tl.tensor,
    sender: tl.tensor,
    we: tl.tensor,
    w2: tl.tensor,
    b2: tl.tensor,
    w3: tl.tensor,
    b3: tl.tensor,
    dw1: tl.tensor,
    db1: tl.tensor,
    dw2: tl.tensor,
    db2: tl.tensor,
    out: tl.tensor,
    update: tl.tensor,
    n: tl.tensor,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    DENSE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    live = row < n
    at = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    u0 = tl.load(u + at, mask=live[:, None], other=0.0)
    u1 = u0
    if DENSE:
        _, _, _, u1 = _before(u0, dw1, db1, dw2, db2, WIDTH, HIDDEN)
    _, _, _, _, _, u2 = _update(u1, row, live, received, sent, receiver, sender, we, w2, b2, w3, b3, WIDTH, HIDDEN)
    if RESIDUAL:
        tl.store(update + at, u2.to(u0.dtype), mask=live[:, None])
        u2 += u0.to(tl.float32)
    tl.store(out + at, u2.to(u0.dtype), mask=live[:, None])


@tuned((64, 4), (64, 8), (128, 8), (32, 4), (16, 4), (16, 8))
@triton.jit
def _backward(
    u: tl.tensor,
    received: tl.tensor,
    sent: tl.tensor,
    receiver: tl.tensor,
    sender: tl.tensor,
    we: tl.tensor,
    w2: tl.tensor,
    b2: tl.tensor,
    w3: tl.tensor,
    b3: tl.tensor,
    dw1: tl.tensor,
    db1: tl.tensor,
    dw2: tl.tensor,
    db2: tl.tensor,
    g_out: tl.tensor,
    g_sum: tl.tensor,
    du: tl.tensor,
    dz: tl.tensor,
    g_we: tl.tensor,
    g_w2: tl.tensor,
    g_b2: tl.tensor,
    g_w3: tl.tensor,
    g_b3: tl.tensor,
    n: tl.tensor,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    DENSE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Backward of the edge update; ``du`` is the gradient of its input: of the dense layers' output, if any."""
    c = tl.arange(0, WIDTH)
    h = tl.arange(0, HIDDEN)
    a_we = tl.zeros([HIDDEN, WIDTH], tl.float32)
    a_w2 = tl.zeros([HIDDEN, HIDDEN], tl.float32)
    a_b2 = tl.zeros([HIDDEN], tl.float32)
    a_w3 = tl.zeros([WIDTH, HIDDEN], tl.float32)
    a_b3 = tl.zeros([WIDTH], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n, TILE), tl.num_programs(0)):
        row = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        live = row < n
        at = row[:, None] * WIDTH + c[None, :]
        u1 = tl.load(u + at, mask=live[:, None], other=0.0)
        if DENSE:
            _, _, _, u1 = _before(u1, dw1, db1, dw2, db2, WIDTH, HIDDEN)
        d1, h1, d2, h2, d3, _ = _update(
            u1, row, live, received, sent, receiver, sender, we, w2, b2, w3, b3, WIDTH, HIDDEN
        )
        g = tl.load(g_out + at, mask=live[:, None], other=0.0).to(tl.float32)
        own = g
        if RESIDUAL:
            v = tl.load(receiver + row, mask=live, other=0).to(tl.int64)
            g += tl.load(g_sum + v[:, None] * WIDTH + c[None, :], mask=live[:, None], other=0.0)
        gz3 = (g * d3).to(u1.dtype)
        a_w3 += outer(gz3, h2)
        a_b3 += tl.sum(gz3.to(tl.float32), 0)
        gz2 = (back(gz3, w3, HIDDEN, WIDTH) * d2).to(u1.dtype)
        a_w2 += outer(gz2, h1)
        a_b2 += tl.sum(gz2.to(tl.float32), 0)
        gz1 = (back(gz2, w2, HIDDEN, HIDDEN) * d1).to(u1.dtype)
        a_we += outer(gz1, u1)
        tl.store(dz + row[:, None] * HIDDEN + h[None, :], gz1, mask=live[:, None])
        gu = back(gz1, we, WIDTH, HIDDEN)
        if RESIDUAL and not DENSE:
            gu += own
        tl.store(du + at, gu.to(u1.dtype), mask=live[:, None])
    store_matrix(g_we, a_we, HIDDEN, WIDTH)
    store_matrix(g_w2, a_w2, HIDDEN, HIDDEN)
    store_vector(g_b2, a_b2, HIDDEN)
    store_matrix(g_w3, a_w3, WIDTH, HIDDEN)
    store_vector(g_b3, a_b3, WIDTH)


@tuned((64, 4), (64, 8), (128, 8), (32, 4), (16, 4), (16, 8))
@triton.jit
def _dense_backward(
    u: tl.tensor,
    dw1: tl.tensor,
    db1: tl.tensor,
    dw2: tl.tensor,
    db2: tl.tensor,
    g_dense: tl.tensor,
    g_out: tl.tensor,
    du: tl.tensor,
    g_dw1: tl.tensor,
    g_db1: tl.tensor,
    g_dw2: tl.tensor,
    g_db2: tl.tensor,
    n: tl.tensor,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Backward of the dense layers, from the gradient of their output; separate, to fit into registers."""
    a_dw1 = tl.zeros([HIDDEN, WIDTH], tl.float32)
    a_db1 = tl.zeros([HIDDEN], tl.float32)
    a_dw2 = tl.zeros([WIDTH, HIDDEN], tl.float32)
    a_db2 = tl.zeros([WIDTH], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n, TILE), tl.num_programs(0)):
        row = (tile * TILE + tl.arange(0, TILE)).to(tl.int64)
        live = row < n
        at = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        u0 = tl.load(u + at, mask=live[:, None], other=0.0)
        d1, h1, d2, _ = _before(u0, dw1, db1, dw2, db2, WIDTH, HIDDEN)
        g2 = (tl.load(g_dense + at, mask=live[:, None], other=0.0) * d2).to(u0.dtype)
        a_dw2 += outer(g2, h1)
        a_db2 += tl.sum(g2.to(tl.float32), 0)
        g1 = (back(g2, dw2, HIDDEN, WIDTH) * d1).to(u0.dtype)
        a_dw1 += outer(g1, u0)
        a_db1 += tl.sum(g1.to(tl.float32), 0)
        gu = back(g1, dw1, WIDTH, HIDDEN)
        if RESIDUAL:
            gu += tl.load(g_out + at, mask=live[:, None], other=0.0).to(tl.float32)
        tl.store(du + at, gu.to(u0.dtype), mask=live[:, None])
    store_matrix(g_dw1, a_dw1, HIDDEN, WIDTH)
    store_vector(g_db1, a_db1, HIDDEN)
    store_matrix(g_dw2, a_dw2, WIDTH, HIDDEN)
    store_vector(g_db2, a_db2, WIDTH)


class EdgeStep(torch.autograd.Function):
    """u, projections of nodes, and weights → the updated edges, and Σ u' over the edges of each atom.

    Without ``residual`` (in the head): u' itself, and no sums.
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, received: Tensor, sent: Tensor, rows: Rows, residual: bool, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(E, W), twice (N, H) → (E, W), (N, W) f32.

        ``weights``: W_e (H, W), W₂ (H, H), b₂, W₃ (W, H), b₃, and of dense layers, if any, (H, W), (H,), (W, H), (W,).
        """
        u, received, sent = (t.contiguous() for t in (u, received, sent))
        held = [w.contiguous() for w in weights]
        n, width, hidden = len(u), u.shape[1], received.shape[1]
        out = torch.empty_like(u)
        update = torch.empty_like(u) if residual else out
        _forward[tiles_of(n)](
            *(u, received, sent, rows.receiver, rows.sender, *_filled(held), out, update, n),
            *(width, hidden, len(held) == 9, residual),
        )
        sums = sum_rows(update, rows.row_ptr, rows.edges) if residual else update.new_empty(0, dtype=torch.float32)
        ctx.save_for_backward(u, received, sent, *held)
        ctx.rows, ctx.residual = rows, residual
        return out, sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Recompute everything, tile by tile."""
        u, received, sent, *held = ctx.saved_tensors
        rows, residual, dense = ctx.rows, ctx.residual, held[5:]
        n, width, hidden = len(u), u.shape[1], received.shape[1]
        count = programs(u.device)
        du, dz = torch.empty_like(u), torch.empty(n, hidden, dtype=u.dtype, device=u.device)
        parts = [partial(count, w) for w in held]
        g_out, g_sum = gradients[0].contiguous(), gradients[1].contiguous()
        _backward[(count,)](
            *(u, received, sent, rows.receiver, rows.sender, *_filled(held), g_out, g_sum, du, dz, *parts[:5], n),
            *(width, hidden, len(dense) > 0, residual),
        )
        if dense:
            g_dense, du = du, torch.empty_like(u)
            _dense_backward[(count,)](u, *dense, g_dense, g_out, du, *parts[5:], n, width, hidden, residual)
        d_received = sum_rows(dz, rows.row_ptr, rows.edges).to(received.dtype)
        d_sent = sum_rows(dz, rows.row_ptr, rows.edges, rows.mirror).to(sent.dtype)
        return du, d_received, d_sent, None, None, *(total(p, w) for p, w in zip(parts, held, strict=True))


def _filled(weights: list[Tensor]) -> list[Tensor]:
    """Pad to nine pointers; placeholders for absent dense layers are never read."""
    return weights + weights[:1] * (9 - len(weights))
