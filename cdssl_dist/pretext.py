"""The pretext task on one pack: displace, expand, predict, compare."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from cdssl_dist.batch import GraphBatch
from cdssl_dist.edges import GaussianExpansion, distances
from cdssl_dist.loss import Baseline, baseline_sums, figures, squared_error
from cdssl_dist.noise import gaussian, sigma_of


@dataclass(frozen=True)
class Denoising:
    """How crystals are displaced and what is recovered; plain numbers, no state."""

    expansion: GaussianExpansion
    sigma: tuple[float, float]  # Å; log-uniform per graph between the two
    seed: int

    def displaced(self, batch: GraphBatch) -> Tensor:
        """x̃ = x + σε: (N, 3), Å."""
        sigma = sigma_of(batch.graph_counter, *self.sigma, self.seed).index_select(0, batch.graph_of_atom)
        return batch.positions + sigma[:, None] * gaussian(batch.noise_counter, self.seed)

    def inputs(self, batch: GraphBatch) -> tuple[Tensor, Tensor]:
        """d̃, (E,) Å, and the clean embedding e(d), (E, M): never an input of the model."""
        return distances(batch, self.displaced(batch)), self.expansion(distances(batch, batch.positions))

    def loss(
        self, model: nn.Module, batch: GraphBatch, baseline: Baseline | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Sum of squared errors of a pack, and with a baseline the sums behind all metrics."""
        displaced, target = self.inputs(batch)
        noisy = self.expansion(displaced)
        predicted = model(noisy, batch)
        squared = squared_error(predicted, target, batch.scored)
        if baseline is None:
            return squared, None
        return squared, figures(predicted.detach(), target, noisy, displaced, batch.scored, baseline)

    def fused_loss(self, model: nn.Module, batch: GraphBatch) -> Tensor:
        """``loss`` of a ``kernels.model.FusedPretextModel``, which makes both embeddings of the distances itself."""
        return model(distances(batch, self.displaced(batch)), batch, distances(batch, batch.positions))

    def baseline_sums(self, batch: GraphBatch, end: float) -> Tensor:
        """See ``loss.baseline_sums``."""
        displaced, target = self.inputs(batch)
        return baseline_sums(target, displaced, batch.scored, end)
