"""The gradient guard and the learning-rate schedule: pure functions, tested on made-up runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdssl_dist.config import GuardConfig
from cdssl_dist.train.guard import GuardState, Judgement, judge, z_score
from cdssl_dist.train.schedule import learning_rate


def changed(rules: GuardConfig, **settings: Any) -> GuardConfig:
    return GuardConfig(**rules.model_dump() | settings)


RULES = GuardConfig(warmup=20)
PATIENT = changed(RULES, rollback_after=10_000, max_bad_share=1.0)
NOT_FINITE = [math.nan, math.inf, -math.inf]


def run(
    norms: Iterable[float],
    rules: GuardConfig = RULES,
    state: GuardState | None = None,
    rollbacks: int = 0,
    loss: float | None = None,
) -> tuple[list[Judgement], GuardState]:
    """The judgements of a run, up to the first roll-back or stop, and the state after the last."""
    state, judgements = state or GuardState(), []
    for norm in norms:
        judgement, state = judge(norm, state, rules, rollbacks, loss)
        judgements.append(judgement)
        if judgement.verdict in ("rollback", "stop"):
            break
    return judgements, state


def verdicts(judgements: list[Judgement]) -> list[str]:
    return [j.verdict for j in judgements]


def quiet(steps: int, seed: int = 0) -> list[float]:
    """Norms around 2, log-normal with a deviation of 0.2."""
    return (2.0 * np.exp(0.2 * np.random.default_rng(seed).normal(size=steps))).tolist()


@pytest.fixture
def settled() -> GuardState:
    """After 300 quiet steps."""
    judgements, state = run(quiet(300))
    assert set(verdicts(judgements)) == {"apply"}
    assert (state.seen, state.applied) == (300, 300)
    return state


def test_the_statistics_are_those_of_the_log_norm() -> None:
    """As long as no norm is forgotten; afterwards they follow the newest."""
    norms = quiet(100)
    _, state = run(norms, changed(RULES, memory=0.999))
    assert state.mean == pytest.approx(np.log(norms).mean())
    assert state.variance == pytest.approx(np.log(norms).var())
    _, later = run([10 * norm for norm in quiet(2_000, seed=1)], changed(PATIENT, z_spike=1e9), state)
    assert later.mean == pytest.approx(math.log(20.0), abs=0.1)
    assert math.sqrt(later.variance) == pytest.approx(0.2, abs=0.05)


def test_z_counts_deviations(settled: GuardState) -> None:
    deviation = math.sqrt(settled.variance)
    assert deviation == pytest.approx(0.2, abs=0.05)
    assert z_score(math.exp(settled.mean + 3 * deviation), settled, RULES) == pytest.approx(3.0)
    assert z_score(math.exp(settled.mean + 3 * deviation), replace(settled, variance=0.0), RULES) == pytest.approx(
        3 * deviation / RULES.min_deviation
    )


@pytest.mark.parametrize("norm", NOT_FINITE)
@pytest.mark.parametrize("policy", ["skip", "clip"])
@pytest.mark.parametrize("steps_before", [0, 1, 5, 300])
def test_what_is_not_finite_is_never_applied_nor_learnt(norm: float, policy: str, steps_before: int) -> None:
    rules = changed(RULES, on_spike=policy)
    _, before = run(quiet(steps_before), rules)
    judgement, after = judge(norm, before, rules)
    assert judgement.verdict == "skip"
    assert (after.seen, after.mean, after.variance) == (before.seen, before.mean, before.variance)
    assert after.applied == before.applied


@given(st.lists(st.sampled_from([1.0, 2.0, 3.0, 1e3, 1e-3, 0.0, 1e300, *NOT_FINITE]), max_size=150), st.booleans())
def test_whatever_comes_the_state_stays_sane(norms: list[float], clip: bool) -> None:
    rules = changed(PATIENT, warmup=5, on_spike="clip" if clip else "skip")
    judgements, state = run(norms, rules)
    finite = [norm for norm in norms if math.isfinite(norm)]
    verdict = Counter(verdicts(judgements))
    assert state.seen == sum(norm > 0 for norm in finite)
    assert state.applied == verdict["apply"] + verdict["clip"]
    assert len(norms) - len(finite) <= verdict["skip"]
    assert math.isfinite(state.mean)
    assert state.variance >= 0.0
    assert all(j.reason for j in judgements if j.verdict != "apply")


def test_no_verdict_on_a_finite_norm_before_warm_up() -> None:
    wild = [1.0, 1e3, 1e-3, 1e6, 5.0, 1e9] * 3 + [1.0]
    assert len(wild) == RULES.warmup - 1
    judgements, _ = run(wild)
    assert set(verdicts(judgements)) == {"apply"}
    assert verdicts(run([*quiet(RULES.warmup - 1), 1e9])[0])[-1] == "apply"
    assert verdicts(run([*quiet(RULES.warmup), 1e9])[0])[-1] == "skip"


def test_what_is_not_finite_does_not_end_the_warm_up() -> None:
    norms = quiet(10) + [math.nan, 2.0] * 9 + [1e9]
    assert verdicts(run(norms, PATIENT)[0])[-1] == "apply"


@pytest.mark.parametrize(("policy", "applied"), [("skip", 0), ("clip", 1)])
def test_a_spike(settled: GuardState, policy: str, applied: int) -> None:
    judgement, after = judge(2_000.0, settled, changed(RULES, on_spike=policy))
    assert judgement.verdict == policy
    assert judgement.z == pytest.approx(math.log(1_000) / math.sqrt(settled.variance), rel=0.05)
    assert "2000" in judgement.reason
    assert after.applied - settled.applied == applied
    as_large_as_allowed = math.exp(settled.mean + RULES.z_spike * math.sqrt(settled.variance))
    _, clipped = judge(as_large_as_allowed * 0.999999, settled, RULES)
    assert after.mean == pytest.approx(clipped.mean, rel=1e-5)
    assert after.variance == pytest.approx(clipped.variance, rel=1e-4)


def test_a_spike_does_not_blind_the_guard(settled: GuardState) -> None:
    """A hundred steps after one of a million, a smaller one is still seen."""
    _, state = run([2e6, *quiet(100)], state=settled)
    assert judge(40.0, state, RULES)[0].verdict == "skip"


@pytest.mark.parametrize("low", [0.0, 1e-4])
def test_a_vanishing_norm_does_not_blind_the_guard(settled: GuardState, low: float) -> None:
    """Such as that of a step without scored edges."""
    _, state = run([low, *quiet(20)], state=settled)
    assert judge(2_000.0, state, RULES)[0].verdict == "skip"


def test_a_vanishing_norm_in_the_warm_up_does_not_blind_the_guard() -> None:
    _, state = run([*quiet(10), 0.0, *quiet(300)])
    assert judge(2_000.0, state, RULES)[0].verdict == "skip"


def test_low_norms_are_no_spikes(settled: GuardState) -> None:
    assert set(verdicts(run([1e-3, 0.0, 2.0], state=settled)[0])) == {"apply"}


@pytest.mark.parametrize("factor", [5.0, 20.0, 1_000.0])
@pytest.mark.parametrize("policy", ["skip", "clip"])
def test_a_lasting_rise_is_a_new_level_where_the_loss_is_as_before(
    settled: GuardState, factor: float, policy: str
) -> None:
    """With the rules as they are: no roll-back, no stop; and afterwards a spike is one again."""
    rules = changed(RULES, on_spike=policy)
    higher = [factor * norm for norm in quiet(300, seed=2)]
    judgements, state = run(higher, rules, replace(settled, loss=1.0), loss=1.2)
    found = verdicts(judgements)
    assert len(found) == 300
    last = max(i for i, verdict in enumerate(found) if verdict != "apply")
    assert last < 3 * RULES.level_after
    assert found[0] == policy
    if factor == 1_000.0:
        assert found[: RULES.level_after] == [policy] * (RULES.level_after - 1) + ["clip"]
        assert "new level" in judgements[RULES.level_after - 1].reason
    assert judge(1_000 * factor, state, rules, 0, 1.2)[0].verdict == policy


@pytest.mark.parametrize("loss", [None, 2.0, math.nan, math.inf])
def test_a_lasting_rise_is_rolled_back_where_the_loss_rose_too(settled: GuardState, loss: float | None) -> None:
    higher = [20 * norm for norm in quiet(300, seed=2)]
    found = verdicts(run(higher, RULES, replace(settled, loss=1.0), loss=loss)[0])
    assert found == ["skip"] * (RULES.rollback_after - 1) + ["rollback"]


def test_spikes_that_do_not_agree_are_no_level(settled: GuardState) -> None:
    found = verdicts(run([1e2, 1e3, 1e4, 1e5, 1e6, 1e7], RULES, replace(settled, loss=1.0), loss=1.0)[0])
    assert found == ["skip"] * (RULES.rollback_after - 1) + ["rollback"]


def test_the_loss_is_the_running_mean_of_applied_steps(settled: GuardState) -> None:
    _, state = run([2.0] * 3, RULES, settled, loss=3.0)
    assert state.loss == pytest.approx(3.0)
    _, skipped = judge(1e9, state, RULES, 0, 1e9)
    assert skipped.loss == state.loss
    _, state = run([2.0] * 2_000, RULES, state, loss=1.0)
    assert state.loss == pytest.approx(1.0, abs=1e-6)


def test_where_spikes_are_applied_only_what_is_not_finite_is_held_back(settled: GuardState) -> None:
    rules = changed(RULES, on_spike="apply")
    assert verdicts(run([1e9, math.nan, 1e9, 1e30], rules, settled)[0]) == ["apply", "skip", "apply", "apply"]


@pytest.mark.parametrize("policy", ["skip", "clip"])
@pytest.mark.parametrize("bad", [[math.nan] * 9, [1e9] * 9, [1e9, math.inf] * 5])
def test_several_bad_steps_in_a_row_roll_back(settled: GuardState, policy: str, bad: list[float]) -> None:
    found = run(bad, changed(RULES, on_spike=policy), settled)[0]
    assert len(found) == RULES.rollback_after == 5
    assert found[-1].verdict == "rollback"
    assert set(verdicts(found[:-1])) <= {"skip", policy}
    assert "5 bad steps in a row" in found[-1].reason


def test_a_good_step_breaks_the_row(settled: GuardState) -> None:
    bad_but_not_in_a_row = ([math.nan] * 4 + [2.0]) * 5
    assert "rollback" not in verdicts(run(bad_but_not_in_a_row, state=settled)[0])


@pytest.mark.parametrize(("rollbacks", "verdict"), [(0, "rollback"), (2, "rollback"), (3, "stop"), (4, "stop")])
def test_after_too_many_roll_backs_it_stops(settled: GuardState, rollbacks: int, verdict: str) -> None:
    found = run([math.nan] * 9, state=settled, rollbacks=rollbacks)[0]
    assert (len(found), found[-1].verdict) == (5, verdict)
    assert verdict == "rollback" or f"after {rollbacks} roll-backs" in found[-1].reason


@pytest.mark.parametrize(("period", "stops"), [(5, True), (8, True), (13, False), (50, False)])
def test_too_large_a_share_of_bad_steps_stops(settled: GuardState, period: int, stops: bool) -> None:
    """A tenth is the most; every fifth or eighth is too many, every thirteenth is not, for however long."""
    norms = [math.nan if i % period == 0 else 2.0 for i in range(8_000)]
    found = verdicts(run(norms, state=settled)[0])
    assert (found[-1] == "stop") == stops
    assert len(found) > 100 * period / 2  # not at the first few


def test_a_hundred_steps_all_bad_stop_even_a_patient_guard(settled: GuardState) -> None:
    rules = changed(RULES, rollback_after=10_000)
    found = verdicts(run([math.nan] * 500, rules, settled)[0])
    assert 100 < len(found) < 115
    assert found[-1] == "stop"


def test_a_state_is_all_that_is_remembered(settled: GuardState) -> None:
    """From a saved state a run goes on as if it had not been interrupted."""
    norms = [*quiet(30, seed=3), 1e5, math.nan, *quiet(30, seed=4), 80.0]
    whole, end = run(norms, state=settled)
    _, middle = run(norms[:31], state=settled)
    rest, same_end = run(norms[31:], state=middle)
    assert repr(rest) == repr(whole[31:])  # nan is not equal to itself
    assert same_end == end


# -- the schedule ------------------------------------------------------------------------------------------------------


def test_cosine() -> None:
    def lr(applied: int) -> float:
        return learning_rate(applied, peak=2.0, steps=1_100, warmup=100, final=0.1)

    assert [lr(0), lr(49), lr(99), lr(100)] == pytest.approx([0.02, 1.0, 2.0, 2.0])
    assert [lr(100 + 250), lr(100 + 500), lr(100 + 750)] == pytest.approx(
        [0.2 + 1.8 * (1 + 2**-0.5) / 2, 1.1, 0.2 + 1.8 * (1 - 2**-0.5) / 2]
    )
    assert [lr(1_100), lr(5_000)] == pytest.approx([0.2, 0.2])
    rates = [lr(n) for n in range(100, 1_101)]
    assert rates == sorted(rates, reverse=True)


def test_warm_up_stable_decay() -> None:
    def lr(applied: int) -> float:
        return learning_rate(applied, peak=1.0, steps=1_000, kind="wsd", warmup=10, decay=0.2, final=0.0)

    assert [lr(0), lr(9), lr(10), lr(500), lr(800)] == pytest.approx([0.1, 1.0, 1.0, 1.0, 1.0])
    assert [lr(850), lr(900), lr(950), lr(1_000), lr(2_000)] == pytest.approx([0.75, 0.5, 0.25, 0.0, 0.0])


def test_constant_and_no_warm_up() -> None:
    assert [learning_rate(n, peak=3.0, steps=10, kind="constant") for n in (0, 5, 100)] == [3.0] * 3
    assert learning_rate(0, peak=3.0, steps=10) == 3.0
    assert learning_rate(4, peak=3.0, steps=4, warmup=4) == 3.0  # all warm-up, then the peak


@given(
    st.integers(0, 300), st.integers(1, 200), st.integers(0, 250), st.floats(0, 1), st.floats(0.01, 1),
    st.sampled_from(["cosine", "constant", "wsd"]),
)  # fmt: skip
def test_a_rate_is_never_above_the_peak_nor_zero_in_warm_up(
    applied: int, steps: int, warmup: int, final: float, decay: float, kind: str
) -> None:
    lr = learning_rate(applied, peak=0.5, steps=steps, kind=kind, warmup=warmup, decay=decay, final=final)  # type: ignore[arg-type]
    least = 0.5 / warmup if applied < warmup else 0.5 * final
    assert least * (1 - 1e-9) <= lr <= 0.5 * (1 + 1e-9)
