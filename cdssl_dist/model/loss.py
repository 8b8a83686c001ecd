"""The pretext loss and its metrics, all as sums that add up over packs and ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BINS = 512  # of the noisy distance, in the baseline of skill_edge

# Order of the sums in a vector of figures; each is over scored edges and features.
SUMS = ("edges", "squared", "absolute", "noisy", "mean", "single")


def squared_error(predicted: Tensor, target: Tensor, scored: Tensor) -> Tensor:
    """Σ over scored edges and features of (ê − e)², f32."""
    return ((predicted - target).square().sum(dim=1) * scored).sum()


class SquaredError(torch.autograd.Function):
    """``squared_error`` with the fewest passes over (E, M): half the time of autograd's version on CPU."""

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, target: Tensor, scored: Tensor) -> Tensor:
        """See ``squared_error``."""
        error = (predicted - target).mul_(scored[:, None])
        ctx.save_for_backward(error)
        return error.square().sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """2 (ê − e)."""
        (error,) = ctx.saved_tensors
        return error * (2 * gradients[0]), None, None


@dataclass(frozen=True, slots=True)
class Baseline:
    """Predictions of the clean embedding without messages, fitted on training packs."""

    mean: Tensor  # (M,) the mean embedding
    table: Tensor  # (BINS, M) the mean embedding given the bin of the noisy distance
    end: float  # Å, upper end of the last bin

    def predict(self, noisy: Tensor) -> Tensor:
        """Best function of the noisy distance alone: (E,) Å → (E, M)."""
        return self.table.index_select(0, bin_of(noisy, self.end))


def bin_of(distance: Tensor, end: float) -> Tensor:
    """(E,) Å → (E,) i64 bin."""
    return (distance * (BINS / end)).long().clamp(0, BINS - 1)


def baseline_sums(target: Tensor, noisy: Tensor, scored: Tensor, end: float) -> Tensor:
    """Sums that a baseline is fitted from: (BINS, M + 1) f64, embeddings and, last, counts. They add up over packs."""
    weighted = torch.cat([target, torch.ones_like(target[:, :1])], dim=1) * scored[:, None]
    sums = torch.zeros(BINS, weighted.shape[1], dtype=torch.float64, device=target.device)
    return sums.index_add(0, bin_of(noisy, end), weighted.double())


def fit_baseline(sums: Tensor, end: float) -> Baseline:
    """The baseline from the sums over all fitting packs, (BINS, M + 1). Empty bins predict the overall mean."""
    total = sums.sum(dim=0)
    mean = total[:-1] / total[-1].clamp(min=1)
    counts = sums[:, -1:]
    table = torch.where(counts > 0, sums[:, :-1] / counts.clamp(min=1), mean)
    return Baseline(mean.float(), table.float(), end)


def figures(
    predicted: Tensor, target: Tensor, features: Tensor, noisy: Tensor, scored: Tensor, baseline: Baseline
) -> Tensor:
    """The sums behind all metrics, in the order of ``SUMS``: (6,) f64.

    Args:
        predicted, target, features: (E, M) ê, e(d) and e(d̃).
        noisy: (E,) d̃, Å.
        scored: (E,) bool.
        baseline: what ``r2`` and ``skill_edge`` compare with.
    """
    weight = scored[:, None]

    def squares(guess: Tensor) -> Tensor:
        error = (guess - target) * weight
        return (error * error).sum().double()

    absolute = ((predicted - target).abs() * weight).sum().double()
    return torch.stack(
        [
            scored.sum().double(),
            squares(predicted),
            absolute,
            squares(features),
            squares(baseline.mean),
            squares(baseline.predict(noisy)),
        ]
    )


def metrics_of(sums: Tensor, features: int) -> dict[str, float]:
    """Compute metrics from summed figures, which are divided only here.

    Returns:
        ``loss`` (per scored edge), ``mae`` (per feature), ``r2`` against the mean embedding, ``skill`` against
        returning the noisy embedding, ``skill_edge`` against the best function of the noisy distance alone.
    """
    edges, squared, absolute, noisy, mean, single = (float(v) for v in sums)
    edges = max(edges, 1.0)

    def skill(beside: float) -> float:
        return 1.0 - squared / beside if beside > 0 else float("nan")

    return {
        "loss": squared / edges,
        "mae": absolute / (edges * features),
        "r2": skill(mean),
        "skill": skill(noisy),
        "skill_edge": skill(single),
    }
