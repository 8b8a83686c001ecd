"""Uncertainty from the deviation between members of an ensemble: calibrated on some crystals, checked on others.

Members can agree and still be wrong, so the deviation is usually too small. It is therefore multiplied by the factor
that would have covered 68% of the errors of the validation crystals (a normalised conformal interval: Lei et al. 2018,
doi:10.1080/01621459.2017.1307116), and its coverage is measured on the test crystals, by which nothing was chosen. As
the validation crystals have also stopped the training, the factor tends to be a little too small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from cdssl_dist.finetune.targets import Array

SHARE: Final = 0.68  # of the errors to cover, as one standard deviation covers of a normal distribution
FEWEST: Final = 10  # validation labels needed to choose a factor
NONE: Final = 1e-9  # relative to the error: a smaller deviation is rounding


@dataclass(frozen=True)
class Uncertainty:
    """Calibration of the deviation for one target; NaN where there were too few labels."""

    factor: float  # times the deviation is the half-width of an interval meant to cover ``SHARE``
    covered: float  # share of the test labels in that interval
    uncalibrated: float  # share of the test labels within one deviation as it is
    rank: float  # Spearman's correlation of deviation and absolute error on the test crystals


def factor(off: Array, std: Array, share: float = SHARE) -> float:
    """The smallest factor by which deviations cover a share of the errors, with the conformal correction (n + 1).

    Args:
        off: (n,) absolute errors, NaN where there is no label.
        std: (n,) deviations between members.
        share: share of the errors to cover.

    Returns:
        The factor; NaN if there are too few labels, or if members agree where they are wrong, so no factor suffices.
    """
    known = np.isfinite(off)
    off, std = off[known], std[known]
    ratios = np.where(off > 0, np.inf, 0.0)
    differ = std > NONE * off
    ratios[differ] = off[differ] / std[differ]
    ratios = np.sort(ratios)
    at = math.ceil(share * (len(ratios) + 1)) - 1
    usable = len(ratios) >= FEWEST and at < len(ratios) and np.isfinite(ratios[at])
    return float(ratios[at]) if usable else math.nan


def measured(off: Array, std: Array, factors: Array, overall: float) -> Uncertainty:
    """Measure the coverage of the scaled deviations on test crystals.

    Args:
        off: (n,) absolute errors, NaN where there is no label.
        std: (n,) deviations between members.
        factors: (n,) factor of the split in which each crystal is tested, from that split's validation crystals alone.
        overall: the factor from the validation crystals of all splits, with which the model will be used.
    """
    known = np.isfinite(off)
    off, std, factors = off[known], std[known], factors[known]
    told = len(off) > 2 and np.ptp(off) > 0 and np.ptp(std) > 0
    return Uncertainty(
        factor=overall,
        covered=float((off <= factors * std).mean()) if len(off) and np.isfinite(factors).all() else math.nan,
        uncalibrated=float((off <= std).mean()) if len(off) else math.nan,
        rank=float(np.corrcoef(_ranks(off), _ranks(std))[0, 1]) if told else math.nan,
    )


def _ranks(values: Array) -> Array:
    return values.argsort().argsort().astype(np.float64)
