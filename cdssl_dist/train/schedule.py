"""The learning rate as a pure function of applied steps."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    applied: int,
    *,
    peak: float,
    steps: int,
    kind: Literal["cosine", "constant", "wsd"] = "cosine",
    warmup: int = 0,
    decay: float = 0.2,
    final: float = 0.01,
) -> float:
    """The rate for the next update.

    Args:
        applied: updates made so far.
        peak: largest rate.
        steps: length of the schedule.
        kind: cosine to ``final · peak``; constant; or wsd (warm-up, stable, and a linear decay in the last share).
        warmup: linear from 0, steps.
        decay: the share of the steps in which wsd decays.
        final: rate at the end, as a share of the peak.
    """
    if applied < warmup:
        return peak * (applied + 1) / warmup
    if kind == "constant":
        return peak
    if kind == "cosine":
        done = min((applied - warmup) / max(steps - warmup, 1), 1.0)
        return peak * (final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done)))
    left = max(steps - applied, 0) / max(decay * steps, 1)
    return peak * (final + (1.0 - final) * min(left, 1.0))
