"""The canaries on made-up times and verdicts: what leaves no doubt about a run, and what does."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastdiff.bench.canary import BASE, SAME, SLOWER, doubt, judged
from fastdiff.bench.verdict import Judgement, Verdict


def canaries(same: float, slower: float, noise: float = 0.02) -> dict[str, list[float]]:
    rng = np.random.default_rng(7)
    work = {BASE: 1.0, SAME: 1 + same, SLOWER: 1 + slower}
    return {name: (0.02 * factor * np.exp(rng.normal(0, noise, 80))).tolist() for name, factor in work.items()}


def test_canaries_that_behave_leave_no_doubt() -> None:
    found = judged(canaries(0.0, 0.1), 0.99)
    assert found["doubt"] == ""
    assert found["a_a"]["verdict"] == "NO-CHANGE"
    assert found["slower_10_percent"]["verdict"] == "REGRESSION"


@pytest.mark.parametrize(
    ("same", "slower", "noise", "expected"),
    [
        (0.06, 0.1, 0.02, "the same work twice was judged REGRESSION"),
        (-0.06, 0.1, 0.02, "the same work twice was judged IMPROVEMENT"),
        (0.0, 0.0, 0.02, "a tenth more work was judged NO-CHANGE"),
        (0.0, 0.1, 0.5, "a tenth more work was judged INCONCLUSIVE"),  # a machine too noisy to tell
        (math.nan, 0.1, 0.02, "the same work twice was judged INVALID"),
    ],
)
def test_a_canary_that_misbehaves_is_named(same: float, slower: float, noise: float, expected: str) -> None:
    assert judged(canaries(same, slower, noise), 0.99)["doubt"] == expected


@pytest.mark.parametrize(
    ("same", "slower", "expected"),
    [
        ("NO-CHANGE", "REGRESSION", ""),
        ("INCONCLUSIVE", "REGRESSION", ""),  # so are the cases, then
        ("NO-CHANGE", "INCONCLUSIVE", "a tenth more work was judged INCONCLUSIVE"),  # nothing would have been found
        ("INCONCLUSIVE", "INCONCLUSIVE", "a tenth more work was judged INCONCLUSIVE"),
        (
            "REGRESSION", "IMPROVEMENT",
            "the same work twice was judged REGRESSION; a tenth more work was judged IMPROVEMENT",
        ),
        ("INVALID", "REGRESSION", "the same work twice was judged INVALID"),
    ],
)  # fmt: skip
def test_the_one_rule_of_every_run(same: Verdict, slower: Verdict, expected: str) -> None:
    assert doubt(*(Judgement(verdict, 0.0, -0.01, 0.01, 20, "") for verdict in (same, slower))) == expected
