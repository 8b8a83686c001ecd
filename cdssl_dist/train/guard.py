"""The gradient guard: a pure state machine that looks at the norm of every step before it is applied.

Statistics are of the logarithm of the norm, exponentially weighted. A non-finite norm or loss is never applied and
never enters the statistics; a spike enters clipped, so that the statistics follow a moderate rise that lasts.

Several bad steps in a row call for a roll-back; too many overall, or too many roll-backs, for a stop. One kind of
streak is harmless: norms that are high but agree with one another, while the loss is unchanged. That is a new level,
due to other data or another phase of training; after some steps the statistics move there. Only the loss tells it from
a network that one step has thrown far off, whose norms agree, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final, Literal

from cdssl_dist.config import GuardConfig

Verdict = Literal["apply", "clip", "skip", "rollback", "stop"]
VERDICTS: Final = ("apply", "clip", "skip", "rollback", "stop")
WINDOW: Final = 1000  # steps over which the share of bad ones is tracked


@dataclass(frozen=True, slots=True)
class GuardState:
    """The guard's memory, saved with a checkpoint and rolled back with it."""

    seen: int = 0  # finite norms
    mean: float = 0.0  # of the log norm
    variance: float = 0.0
    bad_in_row: int = 0
    bad_recent: float = 0.0  # bad steps of the last WINDOW, exponentially forgotten
    applied: int = 0  # steps
    loss: float = 0.0  # of applied steps, running mean; 0 before the first
    level_steps: int = 0  # spikes in a row that may be a new level
    level_low: float = 0.0  # their log norms
    level_high: float = 0.0
    level_sum: float = 0.0


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on one step, and why."""

    verdict: Verdict
    z: float  # of the log norm; nan before there are statistics, inf for a non-finite norm
    reason: str = ""

    @property
    def code(self) -> float:
        """The verdict as a number, for metrics: 0 apply, 1 clip, 2 skip, 3 rollback, 4 stop."""
        return float(VERDICTS.index(self.verdict))


class GuardStop(RuntimeError):
    """The guard stopped the run; the message says why."""


class Guard:
    """The state machine together with its state, for a loop that calls it once per step."""

    def __init__(self, rules: GuardConfig) -> None:
        self.rules, self.state = rules, GuardState()
        self.norm, self.last = math.nan, Judgement("apply", math.nan)

    def judge(self, norm: float, rollbacks: int, loss: float | None = None) -> None:
        """Judge a step, and keep the judgement in ``last``."""
        self.norm = norm
        self.last, self.state = judge(norm, self.state, self.rules, rollbacks, loss)


def z_score(norm: float, state: GuardState, rules: GuardConfig) -> float:
    """How far the log norm is above its running mean, in running standard deviations."""
    if not math.isfinite(norm):
        return math.inf
    if state.seen < 2:
        return math.nan
    deviation = max(math.sqrt(state.variance), rules.min_deviation)
    return (math.log(max(norm, 1e-30)) - state.mean) / deviation


def judge(
    norm: float, state: GuardState, rules: GuardConfig, rollbacks: int = 0, loss: float | None = None
) -> tuple[Judgement, GuardState]:
    """Judge one step.

    Args:
        norm: global gradient norm, all-reduced; NaN or infinite if a gradient is.
        state: before the step.
        rules: every threshold.
        rollbacks: how often the run was rolled back already (from the ledger, which no checkpoint resets).
        loss: of the step, over all ranks; without it, no rise is taken for a new level.

    Returns:
        The judgement and the state after it.
    """
    z = z_score(norm, state, rules)
    finite = math.isfinite(norm) and (loss is None or math.isfinite(loss))
    spike = finite and rules.on_spike != "apply" and state.seen >= rules.warmup and z > rules.z_spike
    bad = spike or not finite
    state = _level(norm, loss, spike, _count(state, bad), rules)
    if finite and norm > 0.0:  # a step without scored edges has no gradient, and says nothing about other steps
        state = _learn(norm, state, rules)
    if not bad:
        return Judgement("apply", z), _applied(state, loss, rules)

    what = f"gradient norm {norm:.4g}" + (f", {z:.1f} deviations above the mean" if spike else "")
    if loss is not None and not math.isfinite(loss):
        what += f", loss {loss:.4g}"
    if state.level_steps >= rules.level_after:
        mean = state.level_sum / state.level_steps
        reason = f"{what}; accepted as a new level: {state.level_steps} norms agree, with an unchanged loss"
        return Judgement("clip", z, reason), _applied(replace(state, mean=mean, level_steps=0), loss, rules)
    if state.bad_recent > rules.max_bad_share * WINDOW:
        return Judgement("stop", z, f"{what}; {state.bad_recent:.0f} bad steps of the last {WINDOW}"), state
    if state.bad_in_row >= rules.rollback_after and state.level_steps < state.bad_in_row:
        if rollbacks >= rules.max_rollbacks:
            return Judgement("stop", z, f"{what}; {state.bad_in_row} in a row after {rollbacks} roll-backs"), state
        return Judgement("rollback", z, f"{what}; {state.bad_in_row} bad steps in a row"), state
    if finite and rules.on_spike == "clip":
        return Judgement("clip", z, what), _applied(state, loss, rules)
    return Judgement("skip", z, what), state


def _applied(state: GuardState, loss: float | None, rules: GuardConfig) -> GuardState:
    mean = state.loss if loss is None else rules.memory * state.loss + (1.0 - rules.memory) * loss
    if loss is not None and state.loss == 0.0:
        mean = loss
    return replace(state, applied=state.applied + 1, loss=mean)


def _level(norm: float, loss: float | None, spike: bool, state: GuardState, rules: GuardConfig) -> GuardState:
    """Count the spikes in a row that agree with one another while the loss is unchanged."""
    if not spike or loss is None or loss > rules.level_loss * state.loss:
        return replace(state, level_steps=0)
    value = math.log(norm)
    low, high = (min(value, state.level_low), max(value, state.level_high)) if state.level_steps else (value, value)
    if high - low > rules.level_spread:
        return replace(state, level_steps=1, level_low=value, level_high=value, level_sum=value)
    total = (state.level_sum if state.level_steps else 0.0) + value
    return replace(state, level_steps=state.level_steps + 1, level_low=low, level_high=high, level_sum=total)


def _count(state: GuardState, bad: bool) -> GuardState:
    recent = state.bad_recent * (1.0 - 1.0 / WINDOW) + bad
    return replace(state, bad_in_row=state.bad_in_row + 1 if bad else 0, bad_recent=recent)


def _learn(norm: float, state: GuardState, rules: GuardConfig) -> GuardState:
    """Update the running mean and variance; the first norms weigh equally, as in a plain average.

    After the warm-up, norms are clipped on both sides first, so that none widens the statistics so much that the next
    spike goes unnoticed.
    """
    value = math.log(max(norm, 1e-30))
    if state.seen >= rules.warmup:
        reach = rules.z_spike * max(math.sqrt(state.variance), rules.min_deviation)
        value = min(max(value, state.mean - reach), state.mean + reach)
    seen = state.seen + 1
    rate = max(1.0 / seen, 1.0 - rules.memory)
    delta = value - state.mean
    variance = (1.0 - rate) * (state.variance + rate * delta * delta)
    return replace(state, seen=seen, mean=state.mean + rate * delta, variance=variance)
