"""MEGNet (Chen et al., Chem. Mater. 2019), the encoder, and the pretext head of CDSSL (New et al. 2024).

Shapes: G graphs, N atoms, H half edges, E = 2H directed edges, W width. Weights may be bf16; every mean is
summed in f32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cdssl_dist.data.batch import GraphBatch

LOG_2 = math.log(2.0)
N_ELEMENTS = 119  # row z is the element of atomic number z; row 0 is padding
ELEMENT_WIDTH = 16


# log(1 + t) = t·Σ c tⁿ for 0 ≤ t ≤ 1, to 1.2e-7: Chebyshev interpolation of degree 8, as powers of t.
LOG1P: Final = (
    *(1.0, -0.49999502301216125, 0.33319270610809326, -0.24844369292259216, 0.19111430644989014),
    *(-0.13674770295619965, 0.07836166769266129, -0.02958850748836994, 0.005253457929939032),
)


class CompiledSoftplus(torch.autograd.Function):
    """softplus(x) − ln 2 for compiled code: one pass forward and one backward, f32.

    log1p is a polynomial, which is faster than the function. The output is kept for the backward pass rather than the
    input, since the next layer keeps it, too; the derivative is 1 − exp(−y)/2.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Elementwise."""
        t = torch.exp(-x.abs())
        series = t * LOG1P[-1] + LOG1P[-2]
        for c in LOG1P[-3::-1]:
            series = series * t + c
        y = x.clamp(min=0.0) + (series * t - LOG_2)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Elementwise."""
        (y,) = ctx.saved_tensors
        return gradients[0] * (1.0 - 0.5 * torch.exp(-y))


class CompiledBias(torch.autograd.Function):
    """x + b for compiled code: fused into the next pass over x, with the gradient of b as a product with ones.

    A matrix product that adds b would first copy it to every row; a sum over rows would read them once per 16 columns.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        """(n, W), (W,) → (n, W)."""
        return (x.unsqueeze(0) + bias).squeeze(0)  # in two dimensions torch would merge it into the product again

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the bias."""
        (gradient,) = gradients
        return gradient, gradient.new_ones(1, len(gradient)).mm(gradient).squeeze(0)


def _is_fused(x: Tensor) -> bool:
    """Whether passes over it are compiled, in f32: bf16 is too coarse to derive the gradient from the output."""
    return torch.compiler.is_compiling() and x.dtype == torch.float32


def shifted_softplus(x: Tensor) -> Tensor:
    """softplus(x) − ln 2: zero at zero."""
    if _is_fused(x):
        return CompiledSoftplus.apply(x)  # type: ignore[no-untyped-call]
    return F.softplus(x).sub_(LOG_2)  # in place: the gradient of softplus needs x alone


class Linear(nn.Linear):
    """``nn.Linear``, split in compiled code into the product and the bias."""

    def forward(self, input: Tensor) -> Tensor:
        """(n, in) → (n, out)."""
        if _is_fused(input):
            return CompiledBias.apply(input @ self.weight.t(), self.bias)  # type: ignore[no-untyped-call]
        return super().forward(input)


class Dense(nn.Module):
    """Linear layers, each followed by the shifted softplus."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """(n, first size) → (n, last size)."""
        for layer in self.layers:
            x = shifted_softplus(layer(x))
        return x


class SplitLinear(nn.Module):
    """A linear layer on concatenated inputs, applied to each input separately.

    W·[a; b; …] + bias = W_a·a + W_b·b + … + bias, so that inputs of atoms or graphs are multiplied once per atom or
    graph and gathered afterwards, not once per edge.
    """

    def __init__(self, parts: int, width: int, out: int) -> None:
        super().__init__()
        self.parts = parts
        self.joint = nn.Linear(parts * width, out)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """The contribution of each input, in order; the bias is in the last."""
        # Transpose before splitting: the gradients are then joined first, not transposed one by one, which torch 2.13's
        # compiled code for CPUs gets wrong in bf16 (occasional NaNs).
        *others, last = self.joint.weight.t().chunk(self.parts)
        *before, x = inputs
        return [*map(torch.mm, before, others), torch.addmm(self.joint.bias, x, last)]


def segment_sum(values: Tensor, index: Tensor, segments: int) -> Tensor:
    """Sum of the rows of each segment, in f32 at least: (n, W), (n,) → (segments, W)."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    out = torch.zeros(segments, values.shape[1], dtype=dtype, device=values.device)
    return out.index_add(0, index, values.to(dtype))


def averaged(sums: Tensor, counts: Tensor) -> Tensor:
    """Means of segments from their sums, 0 where one is empty: (segments, W), (segments,) → (segments, W)."""
    return sums / counts.clamp(min=1)[:, None]


def segment_mean(values: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    """Mean of the rows of each segment, in f32 at least: (n, W), (n,), (segments,) → (segments, W)."""
    return averaged(segment_sum(values, index, len(counts)), counts)


class EdgeUpdate(nn.Module):
    """φ_e: (x_v, x_v', u, s) → u', equation 1 of the paper."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first = SplitLinear(4, width, hidden)
        self.rest = Dense(hidden, hidden, width)

    def forward(self, x: Tensor, u: Tensor, s: Tensor, batch: GraphBatch) -> Tensor:
        """(N, W), (E, W), (G, W) → (E, W)."""
        receiving, sending, edge, state = self.first(x, x, u, s)
        # The state of a graph is added to its atoms first: one gather fewer over the edges.
        receiving = receiving + state.index_select(0, batch.graph_of_atom)
        # In two dimensions, compiled code would gather first, copy the result and add the product to it.
        h = edge.unsqueeze(0) if torch.compiler.is_compiling() else edge
        h = h.add_(receiving.index_select(0, batch.receiver)).add_(sending.index_select(0, batch.sender))
        return self.rest(shifted_softplus(h.view_as(edge)))


class Block(nn.Module):
    """One MEGNet block: dense layers on each input, edge, node and state update, and skip connections.

    Args:
        width: of node, edge and state vectors.
        hidden: of the layers inside.
        dense: whether dense layers precede the updates; the first block follows the input layers instead.
    """

    def __init__(self, width: int, hidden: int, dense: bool) -> None:
        super().__init__()
        before: Callable[[], nn.Module] = lambda: Dense(width, hidden, width) if dense else nn.Identity()  # noqa: E731
        self.dense_x, self.dense_u, self.dense_s = before(), before(), before()
        self.edge = EdgeUpdate(width, hidden)
        self.node = Dense(3 * width, hidden, hidden, width)
        self.state = Dense(3 * width, hidden, hidden, width)

    def forward(self, x: Tensor, u: Tensor, s: Tensor, batch: GraphBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(N, W), (E, W), (G, W) → the same shapes."""
        x1, u1, s1 = self.dense_x(x), self.dense_u(u), self.dense_s(s)
        u2 = self.edge(x1, u1, s1, batch)

        received = segment_sum(u2, batch.receiver, batch.n_atoms)
        edges = averaged(received, batch.edges_of_atom).to(x.dtype)
        x2 = self.node(torch.cat([edges, x1, s1.index_select(0, batch.graph_of_atom)], dim=1))

        # Per graph: from the sums of its atoms, which are far fewer than its edges.
        received = segment_sum(received, batch.graph_of_atom, batch.n_graphs)
        edges = averaged(received, batch.edges_of_graph).to(x.dtype)
        nodes = segment_mean(x2, batch.graph_of_atom, batch.atoms_of_graph).to(x.dtype)
        s2 = self.state(torch.cat([edges, nodes, s1], dim=1))
        return x + x2, u + u2, s + s2


class MEGNet(nn.Module):
    """The encoder.

    Args:
        edge_features: number of Gaussians M.
        width, hidden, blocks: sizes; the paper's are 32, 64 and 3.
        recompute: recompute the inside of each block in the backward pass instead of keeping it.
    """

    def __init__(
        self, *, edge_features: int, width: int = 32, hidden: int = 64, blocks: int = 3, recompute: bool = False
    ) -> None:
        super().__init__()
        self.width, self.recompute = width, recompute
        self.element = nn.Embedding(N_ELEMENTS, ELEMENT_WIDTH)
        self.initial_state = nn.Parameter(torch.randn(1, ELEMENT_WIDTH))  # not 0: its weights must get a gradient
        self.input_x = Dense(ELEMENT_WIDTH, hidden, width)
        self.input_u = Dense(edge_features, hidden, width)
        self.input_s = Dense(ELEMENT_WIDTH, hidden, width)
        self.blocks = nn.ModuleList(Block(width, hidden, dense=i > 0) for i in range(blocks))

    def forward(
        self, edge_features: Tensor, batch: GraphBatch, hint: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode.

        Args:
            edge_features: (H, M) f32, the Gaussian expansion of the distances of half edges. The input layers see only
                these, so their output is the same in both directions of an edge.
            batch: the graphs.
            hint: (G, 16), added to the initial state; used only by pretraining options.

        Returns:
            x̂ (N, W), û (E, W) and ŝ (G, W), after the last block.
        """
        dtype = self.element.weight.dtype
        x = self.input_x(self.element(batch.atomic_numbers))
        u = self.input_u(edge_features.to(dtype)).index_select(0, batch.half)
        state = self.initial_state.expand(batch.n_graphs, -1)
        s = self.input_s(state if hint is None else state + hint)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x, u, s = checkpoint(block, x, u, s, batch, use_reentrant=False)
            else:
                x, u, s = block(x, u, s, batch)
        return x, u, s


class PretextModel(nn.Module):
    """Encoder and head: recovers the embedding of the clean distance of every edge from a displaced crystal.

    The head is one more edge update, on nodes, edges and state, so that every parameter of every block is trained.
    """

    def __init__(self, *, edge_features: int, width: int = 32, hidden: int = 64, **encoder: Any) -> None:
        super().__init__()
        self.encoder = MEGNet(edge_features=edge_features, width=width, hidden=hidden, **encoder)
        self.head = EdgeUpdate(width, hidden)
        self.out = nn.Linear(width, edge_features)

    def forward(self, edge_features: Tensor, batch: GraphBatch) -> Tensor:
        """Expansion of the displaced crystal, (H, M) → ê, that of the true crystal, (E, M) f32."""
        x, u, s = self.encoder(edge_features, batch)
        return self.out(self.head(x, u, s, batch)).to(torch.float32)


def pooled(x: Tensor, u: Tensor, s: Tensor, batch: GraphBatch) -> Tensor:
    """The representation of a crystal for probes and maps: mean x̂, mean û and ŝ, (G, 3W) f32."""
    nodes = segment_mean(x, batch.graph_of_atom, batch.atoms_of_graph)
    edges = segment_mean(u, batch.graph_of_edge, batch.edges_of_graph)
    return torch.cat([nodes, edges, s.float()], dim=1)
