"""The estimator on seeded synthetic times: coverage, symmetry, units, refusals. No clock."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastdiff.bench.stats import hodges_lehmann, pairs_needed, percentile, ratio, times_needed


def drifting_times(rng: np.random.Generator, pairs: int, true_ratio: float) -> tuple[list[float], list[float]]:
    """Times of two arms on a machine whose speed wanders: both arms of a pair see the same speed."""
    speed = np.exp(np.cumsum(rng.normal(0, 0.05, pairs)))
    base = 1e-3 * speed * np.exp(rng.normal(0, 0.03, pairs))
    arm = 1e-3 * speed / true_ratio * np.exp(rng.normal(0, 0.03, pairs))
    return base.tolist(), arm.tolist()


@pytest.mark.parametrize("true_ratio", [1.0, 1.15, 20.0])
@pytest.mark.parametrize("pairs", [8, 20, 60])
def test_the_interval_covers_the_true_ratio_as_often_as_it_says(true_ratio: float, pairs: int) -> None:
    rng = np.random.default_rng(pairs)
    trials = 400
    covered = 0
    for _ in range(trials):
        measured = ratio(*drifting_times(rng, pairs, true_ratio))
        covered += measured.low <= true_ratio <= measured.high
    assert covered >= trials * 0.99 - 3 * math.sqrt(trials * 0.99 * 0.01)


def test_the_level_is_no_wider_than_it_has_to_be() -> None:
    rng = np.random.default_rng(1)
    outside = 0
    for _ in range(2000):
        _, low, high = hodges_lehmann(rng.normal(0, 1, 20), level=0.90)
        outside += not low <= 0 <= high
    assert 0.07 <= outside / 2000 <= 0.105


def test_swapping_the_arms_inverts_the_ratio() -> None:
    base, arm = drifting_times(np.random.default_rng(2), 25, 1.3)
    forward, backward = ratio(base, arm), ratio(arm, base)
    assert forward.value == pytest.approx(1 / backward.value)
    assert forward.low == pytest.approx(1 / backward.high)
    assert forward.half_width == pytest.approx(backward.half_width)


def test_the_unit_of_time_does_not_matter() -> None:
    base, arm = drifting_times(np.random.default_rng(3), 25, 1.3)
    in_ms = ratio([1e3 * t for t in base], [1e3 * t for t in arm])
    assert in_ms.value == pytest.approx(ratio(base, arm).value)


def test_one_stall_moves_nothing_much() -> None:
    base, arm = drifting_times(np.random.default_rng(4), 40, 1.0)
    calm = ratio(base, arm)
    arm[7] *= 100
    assert ratio(base, arm).value == pytest.approx(calm.value, rel=0.01)


def test_the_interval_of_eight_pairs_is_their_extremes() -> None:
    differences = np.array([0.3, -0.1, 0.2, 0.5, 0.4, 0.1, 0.0, 0.6])
    _, low, high = hodges_lehmann(differences, level=0.99)
    assert (low, high) == (-0.1, 0.6)


def test_too_few_pairs_are_refused() -> None:
    assert pairs_needed(0.99) == 8
    assert pairs_needed(0.95) == 6
    with pytest.raises(ValueError, match="needs 8 pairs, got 7"):
        ratio([1.0] * 7, [1.0] * 7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("side", [0, 1])
def test_times_that_are_no_times_are_refused(bad: float, side: int) -> None:
    times = ([1.0] * 10, [1.0] * 10)
    times[side][3] = bad
    with pytest.raises(ValueError, match="positive and finite"):
        ratio(*times)


def test_unpaired_times_are_refused() -> None:
    with pytest.raises(ValueError, match="equally long"):
        ratio([1.0] * 10, [1.0] * 9)


def test_a_tail_is_told_only_where_n_allows() -> None:
    assert [times_needed(percent) for percent in (90, 95, 99)] == [44, 90, 459]
    times = [float(n) for n in range(1, 91)]
    assert percentile(times[:43], 90) is None
    assert percentile(times[:44], 90) == pytest.approx(39.7)
    assert percentile(times, 95) == pytest.approx(85.55)
    assert percentile(times, 99) is None
