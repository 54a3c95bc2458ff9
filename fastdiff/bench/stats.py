"""Estimates and their limits: paired ratios with an exact Wilcoxon interval, tails where n allows. Pure; no clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Ratio:
    """How many times less an arm takes than its base: 1.2 is 20 % less time per unit of work done, 1 no difference."""

    value: float
    low: float  # the interval's ends, at the level it was asked for
    high: float
    pairs: int

    @property
    def half_width(self) -> float:
        """Half the interval's width, relative to the value: what sampling stops on."""
        return math.sqrt(self.high / self.low) - 1.0


def ratio(base_s: Sequence[float], arm_s: Sequence[float], level: float = 0.99) -> Ratio:
    """The paired ratio base / arm of times, from rounds in which both ran once. ValueError on fewer pairs than the
    level needs (8 at 99 %), and on times that are not positive and finite."""
    base, arm = (np.asarray(times, dtype=np.float64) for times in (base_s, arm_s))
    if base.shape != arm.shape or base.ndim != 1:
        raise ValueError(f"expected two equally long lists of times, got shapes {base.shape} and {arm.shape}")
    for times in (base, arm):
        if not (np.isfinite(times).all() and (times > 0).all()):
            raise ValueError("expected times that are positive and finite")
    middle, low, high = hodges_lehmann(np.log(base) - np.log(arm), level)
    return Ratio(math.exp(middle), math.exp(low), math.exp(high), base.size)


def hodges_lehmann(differences: NDArray[np.float64], level: float) -> tuple[float, float, float]:
    """The median of the Walsh averages and the ends of the inverted Wilcoxon signed-rank interval at `level`."""
    first, second = np.triu_indices(differences.size)
    walsh = np.sort((differences[first] + differences[second]) / 2)
    outside = _outside(differences.size, level)
    return float(np.median(walsh)), float(walsh[outside]), float(walsh[-1 - outside])


def pairs_needed(level: float) -> int:
    """The fewest pairs for which an interval at `level` exists."""
    return math.ceil(1 - math.log2(1 - level))


def percentile(times_s: Sequence[float], percent: float) -> float | None:
    """A percentile of the tail; None where too few times were taken to tell it."""
    if len(times_s) < times_needed(percent):
        return None
    return float(np.percentile(times_s, percent))


def times_needed(percent: float) -> int:
    """The fewest times whose largest is beyond a percentile with 99 % confidence: 44 for p90, 90 for p95, 459 for p99.

    MLPerf's rule for stopping early with no query over the limit.
    """
    return math.ceil(math.log(0.01) / math.log(percent / 100))


@lru_cache(maxsize=256)
def _outside(pairs: int, level: float) -> int:
    """How many Walsh averages lie beyond either end, from the exact null distribution of the signed-rank sum."""
    if pairs < pairs_needed(level):
        raise ValueError(f"an interval at {level:.0%} needs {pairs_needed(level)} pairs, got {pairs}")
    probability = np.zeros(pairs * (pairs + 1) // 2 + 1)
    probability[0] = 1.0
    for rank in range(1, pairs + 1):
        shifted = np.zeros_like(probability)
        shifted[rank:] = probability[:-rank]
        probability = (probability + shifted) / 2
    return int(np.searchsorted(np.cumsum(probability), (1 - level) / 2, side="right")) - 1
