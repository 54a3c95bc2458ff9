"""Errors against float64: the worst of several seeds, and nothing is worse than what is no number."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.bench import rows
from fastdiff.bench.arms import Workbench
from fastdiff.bench.rows import RowBench, errors, worst
from fastdiff.bench.suite import ErrorCase

CASE = ErrorCase(samplers=("Euler",), latent_shape=(4, 8, 8), steps=4, seeds=3)


@pytest.mark.parametrize("planted", [math.nan, math.inf])
@pytest.mark.parametrize("seed", range(CASE.seeds))
def test_a_seed_that_leads_to_no_number_is_the_worst_whichever_it_is(
    planted: float, seed: int, tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = rows._fastdiff_float32, 0

    def plant(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        last = run(*arguments)
        return torch.full_like(last, planted) if calls == seed + 1 else last

    monkeypatch.setattr(rows, "_fastdiff_float32", plant)
    (entry,) = errors(RowBench(Workbench(tiny_pipe), 0), CASE)
    assert calls == CASE.seeds
    assert entry["fastdiff"] is None
    assert 0 < entry["diffusers"] < 1e-5
    json.dumps(entry, allow_nan=False)  # as the journal holds it


def test_the_worst_error_is_the_largest() -> None:
    assert worst([1e-7, 3e-7, 2e-7]) == 3e-7
    assert worst([1e-7, math.nan]) is worst([math.nan, 1e-7]) is None
