"""Paired times -> one of five verdicts. Pure; no clock. A verdict is the interval's, never the estimate's alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtrit

from fastdiff.bench.stats import ratio

Verdict = Literal["REGRESSION", "IMPROVEMENT", "NO-CHANGE", "INCONCLUSIVE", "INVALID"]

DELTA = 0.02  # the slowdown that counts, where no grade of the machine says another
WIDTH = 1.5  # times the slowdown that counts: the change, either way, that does not
MARGIN = WIDTH * DELTA
LEAST_PROCESSES = 6  # pairs of them, for a verdict on their mean


@dataclass(frozen=True)
class Judgement:
    """What became of the time from base to head: +0.05 is 5 % slower, None where it was not worked out."""

    verdict: Verdict
    change: float | None
    low: float | None  # the interval's ends
    high: float | None
    pairs: int
    reason: str


def judge(
    base_s: Sequence[float],
    head_s: Sequence[float],
    *,
    level: float = 0.99,
    delta: float = DELTA,
    least_pairs: int = 20,
) -> Judgement:
    """The verdict on rounds in which base and head ran once each: the Hodges-Lehmann estimate and its interval.

    REGRESSION if the whole interval is above `delta`, NO-CHANGE if it is within WIDTH times that. Both hold for ratios,
    so that swapping base and head swaps REGRESSION and IMPROVEMENT exactly.
    """
    pairs = min(len(base_s), len(head_s))
    if pairs < least_pairs:
        return _invalid(pairs, f"{pairs} pairs, where a verdict needs {least_pairs}")
    try:
        measured = ratio(head_s, base_s, level)
    except ValueError as error:
        return _invalid(pairs, str(error))
    return _judged(math.log(measured.value), math.log(measured.low), math.log(measured.high), pairs, delta)


def judge_processes(
    log_ratios: Sequence[float],
    *,
    level: float = 0.99,
    delta: float = DELTA,
) -> Judgement:
    """The verdict on ln(head / base), one number per pair of processes: their mean and its t interval.

    Two processes of the same code differ by more than the pairs within them say, so the process is the sample.
    """
    values = np.asarray(log_ratios, dtype=np.float64)
    if values.size < LEAST_PROCESSES:
        return _invalid(values.size, f"{values.size} process pairs, where a verdict needs {LEAST_PROCESSES}")
    if not np.isfinite(values).all():
        return _invalid(values.size, "expected log ratios that are finite")
    middle = float(values.mean())
    half = float(stdtrit(values.size - 1, 0.5 + level / 2) * values.std(ddof=1) / math.sqrt(values.size))
    return _judged(middle, middle - half, middle + half, values.size, delta)


def judged_at(judgement: Judgement, delta: float) -> Judgement:
    """What the same interval says where another slowdown counts."""
    if judgement.change is None or judgement.low is None or judgement.high is None:
        return judgement
    middle, low, high = (math.log1p(change) for change in (judgement.change, judgement.low, judgement.high))
    return _judged(middle, low, high, judgement.pairs, delta)


def _judged(middle: float, low: float, high: float, pairs: int, delta: float) -> Judgement:
    """The five rules, on logarithms of head / base."""
    margin = WIDTH * delta
    beyond, within = math.log1p(delta), math.log1p(margin)
    verdict: Verdict
    if low > beyond:
        verdict, reason = "REGRESSION", f"the whole interval is above +{delta:.1%}"
    elif high < -beyond:
        verdict, reason = "IMPROVEMENT", f"the whole interval is faster by more than {delta:.1%}"
    elif -within <= low and high <= within:
        verdict, reason = "NO-CHANGE", f"the whole interval is within {margin:.1%} either way"
    else:
        verdict, reason = (
            "INCONCLUSIVE",
            f"the interval excludes only changes above {math.expm1(high):+.1%} and below {math.expm1(low):+.1%}",
        )
    return Judgement(verdict, math.expm1(middle), math.expm1(low), math.expm1(high), pairs, reason)


def _invalid(pairs: int, reason: str) -> Judgement:
    return Judgement("INVALID", None, None, None, pairs, reason)
