"""Models for downstream tasks: an encoder with one of three readouts."""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor, nn

from cdssl_dist.data.batch import GraphBatch
from cdssl_dist.model.edges import GaussianExpansion, distances
from cdssl_dist.model.megnet import Dense, MEGNet, pooled, segment_mean

ReadoutName = Literal["set2set", "atoms", "linear"]


class Set2SetReadout(nn.Module):
    """x̂ and û through Set2Set (Vinyals et al. 2016), concatenated with ŝ, then an MLP.

    Args:
        width: of the encoder.
        hidden: of the MLP.
        targets: number of outputs.
        steps: processing steps of Set2Set.
    """

    def __init__(self, width: int, hidden: int = 64, targets: int = 1, steps: int = 3) -> None:
        super().__init__()
        from torch_geometric.nn.aggr import Set2Set  # takes two seconds, and is needed only here

        self.nodes = Set2Set(width, processing_steps=steps)
        self.edges = Set2Set(width, processing_steps=steps)
        self.mlp = nn.Sequential(Dense(5 * width, hidden, hidden // 2), nn.Linear(hidden // 2, targets))

    def forward(self, x: Tensor, u: Tensor, s: Tensor, batch: GraphBatch) -> Tensor:
        """(N, W), (E, W), (G, W) → (G, targets)."""
        nodes = self.nodes(x, batch.graph_of_atom, dim_size=batch.n_graphs)
        # Edges are sorted by receiver, and atoms by graph: so edges are sorted by graph, as Set2Set requires.
        edges = self.edges(u, batch.graph_of_edge, dim_size=batch.n_graphs)
        return self.mlp(torch.cat([nodes, edges, s], dim=1))


class AtomsReadout(nn.Module):
    """A contribution of each atom, by an MLP of x̂, the mean of û over its edges, and ŝ; the output is their mean.

    So an extensive target, N times the output, is a sum over atoms (as in SchNet, Schütt et al. 2018).

    Args:
        width: of the encoder.
        hidden: of the MLP.
        targets: number of outputs.
    """

    def __init__(self, width: int, hidden: int = 64, targets: int = 1) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Dense(3 * width, hidden, hidden // 2), nn.Linear(hidden // 2, targets))

    def forward(self, x: Tensor, u: Tensor, s: Tensor, batch: GraphBatch) -> Tensor:
        """(N, W), (E, W), (G, W) → (G, targets)."""
        edges = segment_mean(u, batch.receiver, batch.edges_of_atom)
        each = self.mlp(torch.cat([x, edges, s.index_select(0, batch.graph_of_atom)], dim=1))
        return segment_mean(each, batch.graph_of_atom, batch.atoms_of_graph)


class LinearReadout(nn.Module):
    """A linear function of a crystal's vector, mean x̂, mean û and ŝ; solved, not trained: see ``finetune.linear``.

    Args:
        width: of the encoder.
        targets: number of outputs.
    """

    center: Tensor  # (3W,), of the training crystals
    scale: Tensor

    def __init__(self, width: int, targets: int = 1) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(3 * width))
        self.register_buffer("scale", torch.ones(3 * width))
        self.linear = nn.Linear(3 * width, targets)

    def forward(self, x: Tensor, u: Tensor, s: Tensor, batch: GraphBatch) -> Tensor:
        """(N, W), (E, W), (G, W) → (G, targets)."""
        return self.linear((pooled(x, u, s, batch) - self.center) / self.scale)


READOUTS: Final[dict[ReadoutName, type[Set2SetReadout | AtomsReadout | LinearReadout]]] = {
    "set2set": Set2SetReadout,
    "atoms": AtomsReadout,
    "linear": LinearReadout,
}


class PropertyModel(nn.Module):
    """Encoder and readout, from a batch of clean crystals to standardised targets."""

    def __init__(
        self, encoder: MEGNet, expansion: GaussianExpansion, targets: int = 1, readout: ReadoutName = "set2set"
    ) -> None:
        super().__init__()
        self.encoder, self.expansion = encoder, expansion
        self.readout = READOUTS[readout](encoder.width, targets=targets)

    def forward(self, batch: GraphBatch) -> Tensor:
        """(G, targets), padding graphs included."""
        features = self.expansion(distances(batch, batch.positions))
        return self.readout(*self.encoder(features, batch), batch)
