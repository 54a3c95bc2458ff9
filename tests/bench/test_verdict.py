"""The instrument on seeded synthetic times, no clock: what must not be flagged, what must be found, what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from fastdiff.bench import verdict
from fastdiff.bench.verdict import Judgement, judge_processes

PAIRS, NOISE, SEEDS = 200, 0.02, range(20)
UNCHANGED = {"NO-CHANGE", "INCONCLUSIVE"}
Times = NDArray[np.float64]


def judge(base: Times, head: Times, least_pairs: int = 20) -> Judgement:
    return verdict.judge(base.tolist(), head.tolist(), least_pairs=least_pairs)


def times(seed: int, change: float = 0.0, pairs: int = PAIRS) -> tuple[Times, Times]:
    """Base and head of a quiet machine; head is slower by `change`."""
    rng = np.random.default_rng(seed)
    base, head = 1e-3 * np.exp(rng.normal(0, NOISE, (2, pairs)))
    return base, head * (1 + change)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_work_is_no_change(seed: int) -> None:
    assert judge(*times(seed)).verdict == "NO-CHANGE"


@pytest.mark.parametrize("seed", SEEDS)
def test_few_pairs_of_the_same_work_flag_nothing(seed: int) -> None:
    assert judge(*times(seed, pairs=20)).verdict in UNCHANGED


@pytest.mark.parametrize("seed", SEEDS)
def test_a_drift_on_both_arms_is_no_change(seed: int) -> None:
    ramp = np.linspace(1, 1.5, PAIRS)
    base, head = times(seed)
    assert judge(base * ramp, head * ramp).verdict == "NO-CHANGE"


@pytest.mark.parametrize("seed", SEEDS)
def test_throttle_steps_are_no_change_even_where_one_falls_within_a_pair(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    speed = np.repeat(rng.choice([1.0, 1.3], PAIRS // 10), 10)
    base, head = times(seed)
    slowed = head * speed
    slowed[::10] = head[::10] * np.roll(speed, 1)[::10]  # head ran before the step, base after it
    assert judge(base * speed, slowed).verdict == "NO-CHANGE"


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("arm", [0, 1])
def test_one_tenfold_spike_is_no_change_and_hides_none(seed: int, arm: int) -> None:
    for change, expected in ((0.0, "NO-CHANGE"), (0.05, "REGRESSION")):
        both = times(seed, change)
        both[arm][seed] *= 10
        assert judge(*both).verdict == expected


def test_five_per_cent_more_is_a_regression() -> None:
    judgements = [judge(*times(seed, 0.05, pairs=120)) for seed in SEEDS]
    assert {one.verdict for one in judgements} == {"REGRESSION"}
    for one in judgements:
        assert one.change is not None
        assert one.low is not None
        assert one.high is not None
        assert 0.02 < one.low < one.change < one.high
        assert one.change == pytest.approx(0.05, abs=0.015)


def test_a_change_below_delta_is_never_flagged_however_sure_it_is() -> None:
    judgement = judge(*times(0, 0.01, pairs=400))
    assert judgement.verdict == "NO-CHANGE"
    assert judgement.low is not None
    assert judgement.low > 0


def test_another_slowdown_that_counts_is_another_verdict_on_the_same_interval() -> None:
    both = [one.tolist() for one in times(0, 0.04, pairs=60)]
    for delta, expected in ((0.02, "REGRESSION"), (0.032, "INCONCLUSIVE"), (0.05, "NO-CHANGE")):
        judgement = verdict.judged_at(verdict.judge(*both), delta)
        assert judgement.verdict == expected
        direct = verdict.judge(*both, delta=delta)
        assert (judgement.verdict, judgement.reason, judgement.pairs) == (direct.verdict, direct.reason, direct.pairs)
        assert judgement.low == pytest.approx(direct.low)
    nothing = verdict.judge(both[0][:3], both[1][:3])
    assert verdict.judged_at(nothing, 0.05) is nothing


@pytest.mark.parametrize("change", [0.0, 0.01, 0.021, 0.05, 0.5])
def test_swapping_the_arms_swaps_the_verdict(change: float) -> None:
    swapped = {"REGRESSION": "IMPROVEMENT", "IMPROVEMENT": "REGRESSION"}
    for seed in SEEDS:
        base, head = times(seed, change)
        forward, backward = judge(base, head), judge(head, base)
        assert backward.verdict == swapped.get(forward.verdict, forward.verdict)
        assert forward.change is not None
        assert backward.change is not None
        assert (1 + forward.change) * (1 + backward.change) == pytest.approx(1)


def test_the_unit_of_time_does_not_matter() -> None:
    for seed in SEEDS:
        base, head = times(seed, 0.03)
        seconds, nanoseconds = judge(base, head), judge(1e9 * base, 1e9 * head)
        assert seconds.verdict == nanoseconds.verdict
        assert seconds.low == pytest.approx(nanoseconds.low)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1e-3])
@pytest.mark.parametrize("arm", [0, 1])
def test_a_time_that_is_none_makes_it_invalid(bad: float, arm: int) -> None:
    both = times(0)
    both[arm][5] = bad
    judgement = judge(*both)
    assert (judgement.verdict, judgement.change) == ("INVALID", None)
    assert "positive and finite" in judgement.reason


def test_too_few_pairs_are_invalid_and_say_how_many_it_takes() -> None:
    base, head = times(0, 0.5, pairs=19)
    assert judge(base, head).verdict == "INVALID"
    assert judge(base, head).reason == "19 pairs, where a verdict needs 20"
    assert judge(base, head, least_pairs=8).verdict == "REGRESSION"
    assert judge(base[:0], head[:0]).verdict == "INVALID"


def test_unpaired_times_are_invalid() -> None:
    base, head = times(0)
    assert "equally long" in judge(base, head[:-1]).reason


def log_ratios(seed: int, change: float, processes: int = 10) -> list[float]:
    rng = np.random.default_rng(seed)
    return [math.log1p(change) + noise for noise in rng.normal(0, 0.01, processes).tolist()]


def test_process_pairs_find_five_per_cent_and_nothing_else() -> None:
    assert {judge_processes(log_ratios(seed, 0.05)).verdict for seed in SEEDS} == {"REGRESSION"}
    assert {judge_processes(log_ratios(seed, -0.05)).verdict for seed in SEEDS} == {"IMPROVEMENT"}
    assert {judge_processes(log_ratios(seed, 0.0)).verdict for seed in SEEDS} <= UNCHANGED
    assert {judge_processes(log_ratios(seed, 0.0, processes=16)).verdict for seed in SEEDS} == {"NO-CHANGE"}


def test_the_interval_of_processes_is_students() -> None:
    from scipy import stats

    values = log_ratios(1, 0.05, processes=6)
    low, high = stats.t.interval(0.99, 5, loc=np.mean(values), scale=stats.sem(values))
    judgement = judge_processes(values)
    assert (judgement.low, judgement.high) == pytest.approx((math.expm1(low), math.expm1(high)))


def test_one_process_pair_in_six_that_stalled_flags_nothing() -> None:
    values = [0.0, 0.001, -0.002, 0.5, 0.001, 0.0]
    assert judge_processes(values).verdict == "INCONCLUSIVE"


@pytest.mark.parametrize(
    ("values", "reason"), [([0.1] * 5, "5 process pairs"), ([0.1] * 5 + [math.nan], "finite"), ([], "0 process pairs")]
)
def test_too_few_processes_and_nan_are_invalid(values: list[float], reason: str) -> None:
    judgement = judge_processes(values)
    assert judgement.verdict == "INVALID"
    assert reason in judgement.reason
