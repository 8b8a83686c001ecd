"""The pretext task on one pack: displace, expand, predict, compare."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cdssl_dist.data.batch import GraphBatch
from cdssl_dist.model.edges import GaussianExpansion, distances
from cdssl_dist.model.loss import SUMS, Baseline, SquaredError, baseline_sums, figures, metrics_of
from cdssl_dist.model.noise import gaussian, sigma_of


@dataclass(frozen=True)
class Denoising:
    """How crystals are displaced and what is recovered; plain settings, no state."""

    expansion: GaussianExpansion
    sigma: tuple[float, float]  # Å; log-uniform per graph between the two
    seed: int

    @property
    def sums(self) -> tuple[str, ...]:
        """Names of the sums behind the metrics, in their order."""
        return SUMS

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Compute metrics from sums over packs and ranks; see ``loss.metrics_of``."""
        return metrics_of(sums[: len(SUMS)], self.expansion.centers)

    def displaced_positions(self, batch: GraphBatch) -> Tensor:
        """x̃ = x + σε: (N, 3), Å."""
        sigma = sigma_of(batch.graph_counter, *self.sigma, self.seed).index_select(0, batch.graph_of_atom)
        return batch.positions + sigma[:, None] * gaussian(batch.noise_counter, self.seed)

    def distances(self, batch: GraphBatch) -> tuple[Tensor, Tensor]:
        """Lengths of half edges, Å: noisy d̃, (H,), whose expansion is the input, and clean d, (H,), the target's."""
        return distances(batch, self.displaced_positions(batch)), distances(batch, batch.positions)

    def expand(self, distance: Tensor) -> Tensor:
        """e(d), the Gaussian expansion: (n,) Å → (n, M)."""
        return self.expansion(distance)

    def loss(
        self, model: nn.Module, batch: GraphBatch, baseline: Baseline | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the loss of a pack, summed over its scored edges, and, given a baseline, the sums behind all metrics.

        Returns:
            The loss, () f32, and the sums that ``sums`` names, f64, or None without a baseline.
        """
        noisy, clean = self.distances(batch)
        features = self.expand(noisy)
        predicted, loss, further = self.recovered(model, features, clean, batch)
        if baseline is None:
            return loss, None
        target = self.expand(clean).index_select(0, batch.half)
        features, noisy = features.index_select(0, batch.half), noisy.index_select(0, batch.half)
        found = figures(predicted.detach(), target, features, noisy, batch.scored, baseline)
        return loss, torch.cat([found, *(value.detach().double()[None] for value in further)])

    def recovered(
        self, model: nn.Module, features: Tensor, clean: Tensor, batch: GraphBatch
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return ê, (E, M), from e(d̃), (H, M); its loss, given d, (H,); and the sums behind further metrics."""
        predicted = model(features, batch)
        return predicted, self.squared_error(predicted, clean, batch), []

    def squared_error(self, predicted: Tensor, clean: Tensor, batch: GraphBatch) -> Tensor:
        """Σ (ê − e(d))² over scored edges and features, from ê, (E, M), and d of half edges, (H,) Å."""
        target = self.expand(clean).index_select(0, batch.half)
        return SquaredError.apply(predicted, target, batch.scored)  # type: ignore[no-untyped-call]

    def baseline_sums(self, batch: GraphBatch) -> Tensor:
        """See ``loss.baseline_sums``."""
        noisy, clean = (d.index_select(0, batch.half) for d in self.distances(batch))
        return baseline_sums(self.expand(clean), noisy, batch.scored, self.expansion.end)
