"""Distances along edges and their Gaussian expansion, always in f32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cdssl_dist.batch import GraphBatch


def distances(batch: GraphBatch, positions: Tensor) -> Tensor:
    """Distances d = ‖x_sender + n·L − x_receiver‖ for every directed edge.

    Args:
        batch: edges, shifts and lattices.
        positions: (N, 3) f32, Å; clean or displaced.

    Returns:
        (E,) f32, Å.
    """
    lattice = batch.lattice.index_select(0, batch.graph_of_edge)
    image = torch.einsum("ei,eij->ej", batch.shift, lattice)
    vector = positions.index_select(0, batch.sender) + image - positions.index_select(0, batch.receiver)
    return torch.sqrt((vector * vector).sum(dim=1))


@dataclass(frozen=True)
class GaussianExpansion:
    """e_m(d) = exp(−(d − μ_m)² / γ²), as in MEGNet (Chen et al. 2019).

    No module and no buffer: an engine that casts a model to bf16 must not touch the centres.
    """

    centers: int  # M, spread evenly over [0, end]
    end: float  # Å
    gamma: float  # Å

    def __call__(self, distance: Tensor) -> Tensor:
        """(E,) f32, Å → (E, M) f32."""
        mu = torch.linspace(0.0, self.end, self.centers, device=distance.device)
        scaled = (distance[:, None] - mu) / self.gamma
        return torch.exp(-scaled * scaled)
