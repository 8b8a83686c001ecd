"""Pretraining options beyond the paper. None is on by default: docs/results.md reports what each is worth.

The encoder is unchanged, so that fine-tuning does not depend on the options: whatever they add is discarded with the
pretext head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdssl_dist.data.batch import GraphBatch
from cdssl_dist.model.compiled import CompiledDenoising
from cdssl_dist.model.edges import norms, vectors
from cdssl_dist.model.megnet import ELEMENT_WIDTH, N_ELEMENTS, PretextModel, segment_mean, segment_sum
from cdssl_dist.model.noise import gaussian, masked, sigma_of, strain_of
from cdssl_dist.model.pretext import Denoising


@dataclass(frozen=True)
class Options:
    """The options, and their strengths.

    Attributes:
        strain: of the cell, which is denoised as well: standard deviation of a diagonal component.
        sigma_in_state: give the state the σ of the displacements; for a crystal that is not displaced, nothing.
        conditioned: give the state the encoder's output for the true crystal, a bottleneck of one vector
            (self-conditioned denoising, Perez and Gómez-Bombarelli 2026).
        displacement: weight of a node-level loss on the displacements (Zaidi et al. 2022), in units of σ.
        masked: share of the atoms whose element is hidden, and recovered from their surroundings.
    """

    strain: float = 0.0
    sigma_in_state: bool = False
    conditioned: bool = False
    displacement: float = 0.0
    masked: float = 0.0


class Recovered(NamedTuple):
    """The outputs of the model."""

    edges: Tensor  # (E, M) f32 | ê
    pulls: Tensor | None  # (E,) f32 | along each edge, on the atom that receives
    elements: Tensor | None  # (N, 119) f32 | logits


class BeyondModel(PretextModel):
    """``PretextModel`` with what the options need; its encoder has the same parameters."""

    def __init__(self, *, options: Options, width: int = 32, **size: Any) -> None:
        super().__init__(width=width, **size)
        self.of_sigma = nn.Parameter(torch.randn(1, ELEMENT_WIDTH)) if options.sigma_in_state else None
        self.of_true = nn.Linear(width, ELEMENT_WIDTH) if options.conditioned else None
        self.pull = nn.Linear(width, 1) if options.displacement else None
        self.which = nn.Linear(width, N_ELEMENTS) if options.masked else None

    def forward(  # type: ignore[override]
        self, noisy: Tensor, batch: GraphBatch, clean: Tensor | None, sigma: Tensor
    ) -> Recovered:
        """Compute from e(d̃) of half edges, (H, M) f32, e(d) if ``conditioned``, and σ / max σ of each graph, (G,)."""
        dtype = self.out.weight.dtype
        hint = None
        if self.of_sigma is not None:
            hint = sigma[:, None].to(dtype) * self.of_sigma
        if self.of_true is not None:
            assert clean is not None
            _, _, true = self.encoder(clean, batch)
            told = self.of_true(true)
            hint = told if hint is None else hint + told
        x, u, s = self.encoder(noisy, batch, hint)
        edges = self.head(x, u, s, batch)
        return Recovered(
            self.out(edges).float(),
            None if self.pull is None else self.pull(edges)[:, 0].float(),
            None if self.which is None else self.which(x).float(),
        )


@dataclass(frozen=True)
class BeyondDenoising(Denoising):
    """The task for a ``BeyondModel``.

    Losses per atom are weighted by the atom's number of scored edges, so that all losses share the step's normaliser.
    """

    options: Options

    @property
    def sums(self) -> tuple[str, ...]:
        """See ``Denoising``."""
        options = self.options
        return (
            super().sums
            + ("pulled", "displaced") * bool(options.displacement)
            + ("found", "hidden") * bool(options.masked)
        )

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Add ``skill_displacement``, against predicting zero, and ``element_accuracy``, of the hidden elements."""
        named = dict(zip(self.sums, sums.tolist(), strict=True))
        metrics = super().metrics(sums)
        if self.options.displacement:
            metrics["skill_displacement"] = 1 - named["pulled"] / named["displaced"] if named["displaced"] else math.nan
        if self.options.masked:
            metrics["element_accuracy"] = named["found"] / named["hidden"] if named["hidden"] else math.nan
        return metrics

    def distances(self, batch: GraphBatch) -> tuple[Tensor, Tensor]:
        """See ``Denoising``."""
        return norms(self._strained(batch)), norms(vectors(batch, batch.positions))

    def _strained(self, batch: GraphBatch) -> Tensor:
        """Vectors along half edges between displaced atoms of a strained crystal: (H, 3), Å."""
        vector = vectors(batch, self.displaced_positions(batch))
        if not self.options.strain:
            return vector
        strain = strain_of(batch.graph_counter, self.options.strain, self.seed).index_select(0, batch.graph_of_half)
        return vector + torch.einsum("hi,hij->hj", vector, strain)

    def recovered(
        self, model: nn.Module, features: Tensor, clean: Tensor, batch: GraphBatch
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """See ``Denoising``; the loss is the weighted sum of all losses."""
        hides = masked(batch.noise_counter, self.options.masked, self.seed) if self.options.masked else None
        seen = batch if hides is None else replace(batch, atomic_numbers=batch.atomic_numbers.masked_fill(hides, 0))
        sigma = sigma_of(batch.graph_counter, *self.sigma, self.seed) / self.sigma[1]
        true = self.expand(clean) if self.options.conditioned else None
        found: Recovered = model(features, seen, true, sigma)
        loss = self.squared_error(found.edges, clean, batch)
        scored_edges = segment_sum(batch.scored[:, None], batch.receiver, batch.n_atoms)[:, 0]
        further: list[Tensor] = []
        if found.pulls is not None:
            displaced = self._displacements(batch)
            error = self._pulled(found.pulls, batch) - displaced
            pulled, still = ((scored_edges * v.square().sum(dim=1)).sum() for v in (error, displaced))
            loss = loss + self.options.displacement * pulled
            further += [pulled, still]
        if found.elements is not None and hides is not None:
            entropy = F.cross_entropy(found.elements, batch.atomic_numbers, reduction="none")
            weight = scored_edges * hides
            loss = loss + (weight * entropy).sum()
            further += [(weight * (found.elements.argmax(dim=1) == batch.atomic_numbers)).sum(), weight.sum()]
        return found.edges, loss, further

    def _pulled(self, pulls: Tensor, batch: GraphBatch) -> Tensor:
        """Mean of the pulls along the edges of each atom, equivariant under rotations: (E,) → (N, 3)."""
        vector = self._strained(batch)
        towards_sender = torch.where(batch.receiver == batch.src.index_select(0, batch.half), 1.0, -1.0)
        direction = (vector / norms(vector).clamp(min=1e-6)[:, None]).index_select(0, batch.half)
        pull = direction * (pulls * towards_sender * batch.scored)[:, None]
        return segment_mean(pull, batch.receiver, batch.edges_of_atom)

    def _displacements(self, batch: GraphBatch) -> Tensor:
        """ε minus its mean over each crystal, which cannot be recovered: (N, 3), in units of σ."""
        noise = gaussian(batch.noise_counter, self.seed)
        mean = segment_mean(noise, batch.graph_of_atom, batch.atoms_of_graph)
        return noise - mean.index_select(0, batch.graph_of_atom)


class CompiledBeyond(CompiledDenoising, BeyondDenoising):
    """``BeyondDenoising`` with fused passes over (E, M)."""
