"""Statistics over the cells of a study: means and errors over seeds, paired comparisons, wins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from cdssl_dist.finetune.targets import Array
from cdssl_dist.study.run import Result

NAN = float("nan")


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    value: float
    error: float  # standard error of the mean; NaN for one seed
    seeds: int


@dataclass(frozen=True)
class Comparison:
    """An arm compared with the reference, on the same crystals, samples and seeds."""

    target: str
    size: int
    arm: str
    own: Mean  # MAE of the arm
    reference: Mean
    change: float  # own / reference − 1, of the means
    change_error: float  # standard error of the change over seeds
    p_seeds: float  # paired t-test of log MAE, over seeds
    p_crystals: float  # Wilcoxon's signed-rank test over crystals, of absolute errors averaged over seeds
    crystals: int

    @property
    def won(self) -> bool:
        """Whether the arm is better."""
        return self.change < 0


@dataclass(frozen=True)
class Wins:
    """How often an arm is better than the reference."""

    won: int
    lost: int
    p: float  # two-sided sign test; ties are left out
    clear: int  # won with p_crystals < 0.05
    clearly_lost: int
    median_change: float


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and its standard error."""
    n = len(values)
    if n == 0:
        return Mean(NAN, NAN, 0)
    error = float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else NAN
    return Mean(float(np.mean(values)), error, n)


def absolute_errors(result: Result, chosen: frozenset[str] | None = None) -> dict[str, float]:
    """|predicted − true| of each chosen crystal whose label is known."""
    off = np.abs(result.predicted - result.true)
    known = np.isfinite(result.true)
    return {key: float(off[i]) for i, key in enumerate(result.keys) if known[i] and (chosen is None or key in chosen)}


def compare(
    own: Sequence[Result], reference: Sequence[Result], chosen: frozenset[str] | None = None
) -> Comparison | None:
    """Compare an arm with the reference in one case, paired by seed.

    Args:
        own, reference: results of one target and size, one for each seed.
        chosen: keys of the crystals to count; None: all.

    Returns:
        The comparison; None if no seed has results of both on the same crystals.
    """
    by_seed = {r.cell.seed: r for r in reference}
    pairs = [(r, by_seed[r.cell.seed]) for r in own if r.cell.seed in by_seed]
    each = [(absolute_errors(a, chosen), absolute_errors(b, chosen)) for a, b in pairs]
    each = [(a, b) for a, b in each if a and a.keys() == b.keys()]
    if not each:
        return None
    a, b = (np.array([np.mean(list(pair[i].values())) for pair in each]) for i in (0, 1))
    ratios = a / b
    differences: dict[str, list[float]] = {}
    for first, second in each:
        for key, value in first.items():
            differences.setdefault(key, []).append(value - second[key])
    off = np.array([np.mean(values) for values in differences.values()])
    cell = pairs[0][0].cell
    return Comparison(
        target=cell.target,
        size=cell.size,
        arm=cell.arm,
        own=mean_of(a.tolist()),
        reference=mean_of(b.tolist()),
        change=float(a.mean() / b.mean() - 1),
        change_error=mean_of(ratios.tolist()).error,
        p_seeds=float(stats.ttest_rel(np.log(a), np.log(b)).pvalue) if len(a) > 1 and np.ptp(ratios) > 0 else NAN,
        p_crystals=float(stats.wilcoxon(off).pvalue) if off.any() else NAN,
        crystals=len(off),
    )


def wins_of(cases: Iterable[Comparison]) -> Wins:
    """Count wins over cases. Cases of one target share crystals, so the sign test is overconfident."""
    found = [case for case in cases if case.change != 0]
    won = sum(case.won for case in found)
    clear = [case.won for case in found if case.p_crystals < 0.05]
    return Wins(
        won=won,
        lost=len(found) - won,
        p=float(stats.binomtest(won, len(found)).pvalue) if found else NAN,
        clear=sum(clear),
        clearly_lost=len(clear) - sum(clear),
        median_change=float(np.median([case.change for case in found])) if found else NAN,
    )


def ensemble(results: Sequence[Result]) -> tuple[list[str], Array, Array]:
    """Keys, labels and mean predictions of several seeds, which must have been evaluated on the same crystals."""
    assert all(r.keys == results[0].keys for r in results)
    predicted: NDArray[np.float64] = np.mean([r.predicted for r in results], axis=0)
    return results[0].keys, results[0].true, predicted
