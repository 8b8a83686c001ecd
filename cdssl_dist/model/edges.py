"""Distances along edges and their Gaussian expansion, always in f32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cdssl_dist.data.batch import GraphBatch


def vectors(batch: GraphBatch, positions: Tensor) -> Tensor:
    """x_dst + n·L − x_src of every half edge.

    Args:
        batch: half edges, shifts and lattices.
        positions: (N, 3) f32, Å; clean or displaced.

    Returns:
        (H, 3) f32, Å.
    """
    lattice = batch.lattice.index_select(0, batch.graph_of_half)
    image = torch.einsum("hi,hij->hj", batch.shift, lattice)
    return positions.index_select(0, batch.dst) + image - positions.index_select(0, batch.src)


def norms(vector: Tensor) -> Tensor:
    """Lengths of vectors: (n, 3) → (n,)."""
    return torch.sqrt((vector * vector).sum(dim=1))


def distances(batch: GraphBatch, positions: Tensor) -> Tensor:
    """Lengths of the half edges, (H,) f32, Å; an edge and its reverse share one. See ``vectors``.

    ``distances(…).index_select(0, batch.half)`` gives those of the directed edges.
    """
    return norms(vectors(batch, positions))


@dataclass(frozen=True)
class GaussianExpansion:
    """e_m(d) = exp(−(d − μ_m)² / γ²), as in MEGNet (Chen et al. 2019).

    Neither a module nor a buffer, so that an engine that casts a model to bf16 leaves the centres alone.
    """

    centers: int  # M, spread evenly over [0, end]
    end: float  # Å
    gamma: float  # Å

    def __call__(self, distance: Tensor) -> Tensor:
        """(n,) f32, Å → (n, M) f32. Distances carry no gradient, so it is computed in place."""
        return gaussians(*self.scaled(distance))

    def scaled(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        """d/γ, (n,), and μ/γ, (M,)."""
        return distance / self.gamma, torch.linspace(0.0, self.end, self.centers, device=distance.device) / self.gamma


def gaussians(distance: Tensor, centers: Tensor) -> Tensor:
    """exp(−(d − μ)²), both in units of γ: (n,), (M,) → (n, M)."""
    return (distance[:, None] - centers).square_().neg_().exp_()
