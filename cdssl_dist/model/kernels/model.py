"""The pretext model with its edge path in Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cdssl_dist.data.batch import GraphBatch
from cdssl_dist.model.edges import GaussianExpansion
from cdssl_dist.model.kernels.common import check_width
from cdssl_dist.model.kernels.edge import EdgeStep, Rows
from cdssl_dist.model.kernels.ends import Expand, Loss
from cdssl_dist.model.kernels.segment import Gather, SegmentSum
from cdssl_dist.model.loss import Baseline
from cdssl_dist.model.megnet import Dense, EdgeUpdate, PretextModel, averaged
from cdssl_dist.model.pretext import Denoising


class FusedPretextModel(PretextModel):
    """``PretextModel`` with the same parameters under the same names, from distances to the loss.

    Args:
        expansion: Gaussian expansion of distances.
        width, hidden: each a power of two from 16 to 128.

    Raises:
        ValueError: for other sizes.
    """

    def __init__(self, *, expansion: GaussianExpansion, width: int = 32, hidden: int = 64, **encoder: Any) -> None:
        check_width("width", width)
        check_width("hidden size", hidden)
        super().__init__(edge_features=expansion.centers, width=width, hidden=hidden, **encoder)
        self.expansion = expansion

    def forward(
        self, edge_features: Tensor | None, batch: GraphBatch, distances: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Run the reference (see ``PretextModel``) or, given noisy and clean distances, ``fused_loss``.

        Both share this entry point, since it is the only one that an engine wraps.
        """
        if distances is not None:
            return self.fused_loss(*distances, batch)
        assert edge_features is not None
        return super().forward(edge_features, batch)

    def fused_loss(self, noisy: Tensor, clean: Tensor, batch: GraphBatch) -> Tensor:
        """Σ (ê − e)² over scored edges, f32, from d̃ and d of half edges, (H,) f32, Å."""
        encoder, rows = self.encoder, Rows.of(batch)
        x = encoder.input_x(encoder.element(batch.atomic_numbers))
        u = Expand.apply(noisy.index_select(0, batch.half), self.expansion, *_weights(encoder.input_u))
        s = encoder.input_s(encoder.initial_state.expand(batch.n_graphs, -1))
        for block in encoder.blocks:
            x, u, s = _block(block, x, u, s, batch, rows)
        u, _ = _edge_step(self.head, None, x, u, s, batch, rows)
        return Loss.apply(
            u, clean.index_select(0, batch.half), batch.scored, self.expansion, self.out.weight, self.out.bias
        )


class FusedDenoising(Denoising):
    """The same task for a ``FusedPretextModel``; passes without gradients, and all metrics, use the reference."""

    def loss(
        self, model: nn.Module, batch: GraphBatch, baseline: Baseline | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See ``Denoising``."""
        if not torch.is_grad_enabled():
            return super().loss(model, batch, baseline)
        squared = model(None, batch, self.distances(batch))
        if baseline is None:
            return squared, None
        with torch.no_grad():
            _, figures = super().loss(model, batch, baseline)
        return squared, figures


def _weights(dense: Any) -> list[Tensor]:
    """Weight and bias of each layer; empty for an identity."""
    found: list[Tensor] = []
    for layer in dense.layers if isinstance(dense, Dense) else []:
        found += [layer.weight, layer.bias]  # type: ignore[list-item]
    return found


def _edge_step(
    update: EdgeUpdate, dense: nn.Module | None, x: Tensor, u: Tensor, s: Tensor, batch: GraphBatch, rows: Rows
) -> tuple[Tensor, Tensor]:
    """Run an edge update; with ``dense``, also the layers before it, the residual and the sums of a block."""
    of_receiver, of_sender, of_edge, of_state = update.first.joint.weight.chunk(4, dim=1)
    of_graph = nn.functional.linear(s, of_state, update.first.joint.bias)
    state = Gather.apply(of_graph, rows.graph_ptr, rows.atoms, batch.graph_of_atom)
    received = nn.functional.linear(x, of_receiver) + state
    sent = nn.functional.linear(x, of_sender)
    weights = [of_edge, *_weights(update.rest), *(_weights(dense) if dense is not None else [])]
    return EdgeStep.apply(u, received, sent, rows, dense is not None, *weights)


def _block(block: Any, x: Tensor, u: Tensor, s: Tensor, batch: GraphBatch, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """``Block.forward``, with nodes and state, which are few, in torch, and sums over graphs in kernels."""
    x1, s1 = block.dense_x(x), block.dense_s(s)
    u, edge_sum = _edge_step(block.edge, block.dense_u, x1, u, s1, batch, rows)
    edge_mean = averaged(edge_sum, batch.edges_of_atom).to(x.dtype)
    state = Gather.apply(s1, rows.graph_ptr, rows.atoms, batch.graph_of_atom)
    x2 = block.node(torch.cat([edge_mean, x1, state], dim=1))

    def of_graphs(values: Tensor, counts: Tensor) -> Tensor:
        total = SegmentSum.apply(values, rows.graph_ptr, rows.atoms, batch.graph_of_atom)
        return averaged(total, counts).to(x.dtype)

    edges, nodes = of_graphs(edge_sum, batch.edges_of_graph), of_graphs(x2, batch.atoms_of_graph)
    s2 = block.state(torch.cat([edges, nodes, s1], dim=1))
    return x + x2, u, s + s2
