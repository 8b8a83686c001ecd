"""What the deviation between members of an ensemble says about its errors: scaled on some crystals, checked on others.

Members that agree are not thereby right: the deviation is mostly too small. It is therefore multiplied by the factor
that would have covered 68% of the errors of the validation crystals (a normalised conformal interval: Lei et al. 2018,
doi:10.1080/01621459.2017.1307116), and the test crystals tell what that covers where nothing was chosen by them. The
validation crystals have also stopped the training, so that the factor is a little too small rather than too large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from cdssl_dist.finetune.targets import Array

SHARE: Final = 0.68  # of the errors to cover: what one standard deviation covers of a normal distribution
FEWEST: Final = 10  # validation labels to take a factor from
NONE: Final = 1e-9  # of the error: a deviation that is rounding


@dataclass(frozen=True)
class Uncertainty:
    """What the deviation is worth for one target; NaN where there were too few labels to tell."""

    factor: float  # times the deviation: half-width of an interval that is to cover ``SHARE``
    covered: float  # share of the test labels in that interval
    uncalibrated: float  # share of the test labels within one deviation as it is
    rank: (
        float  # Spearman's correlation of deviation and absolute error, test crystals: 0 if it does not tell them apart
    )


def factor(off: Array, std: Array, share: float = SHARE) -> float:
    """The smallest factor with which deviations cover a share of errors, with one error to spare for the next crystal.

    Args:
        off: (n,) absolute errors, NaN where there is no label.
        std: (n,) deviations between members.
        share: to cover.

    Returns:
        NaN where there are too few labels, or members agree where they are wrong: no factor would cover the share.
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
    """The check on test crystals.

    Args:
        off: (n,) absolute errors, NaN where there is no label.
        std: (n,) deviations between members.
        factors: (n,) of the split in which each crystal tests, from validation crystals of that split alone.
        overall: the factor from the validation crystals of all splits, which the model will be used with.
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
