"""What is put on an encoder downstream: the Set2Set readout and a multilayer perceptron."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cdssl_dist.data.batch import GraphBatch
from cdssl_dist.model.edges import GaussianExpansion, distances
from cdssl_dist.model.megnet import Dense, MEGNet


class Readout(nn.Module):
    """x̂ and û through Set2Set (Vinyals et al. 2016), concatenated with ŝ, then an MLP.

    Args:
        width: of the encoder.
        hidden: of the MLP.
        targets: number of outputs.
        steps: processing steps of Set2Set.
    """

    def __init__(self, width: int, hidden: int = 64, targets: int = 1, steps: int = 3) -> None:
        super().__init__()
        from torch_geometric.nn.aggr import Set2Set  # two seconds of imports, which a list of models does without

        self.nodes = Set2Set(width, processing_steps=steps)
        self.edges = Set2Set(width, processing_steps=steps)
        self.mlp = nn.Sequential(Dense(5 * width, hidden, hidden // 2), nn.Linear(hidden // 2, targets))

    def forward(self, x: Tensor, u: Tensor, s: Tensor, batch: GraphBatch) -> Tensor:
        """(N, W), (E, W), (G, W) → (G, targets)."""
        nodes = self.nodes(x, batch.graph_of_atom, dim_size=batch.n_graphs)
        # Edges are sorted by receiver, and atoms by graph: edges are sorted by graph as Set2Set wants them.
        edges = self.edges(u, batch.graph_of_edge, dim_size=batch.n_graphs)
        return self.mlp(torch.cat([nodes, edges, s], dim=1))


class PropertyModel(nn.Module):
    """Encoder and readout, from a batch of clean crystals to standardised targets."""

    def __init__(self, encoder: MEGNet, expansion: GaussianExpansion, targets: int = 1) -> None:
        super().__init__()
        self.encoder, self.expansion = encoder, expansion
        self.readout = Readout(encoder.width, targets=targets)

    def forward(self, batch: GraphBatch) -> Tensor:
        """(G, targets), padding graphs included."""
        features = self.expansion(distances(batch, batch.positions))
        return self.readout(*self.encoder(features, batch), batch)
