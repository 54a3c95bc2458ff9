"""Capacities: validated, immutable, and named when a request does not fit."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from fastdiff.errors import PlanMismatch
from fastdiff.plan import CapturePlan


def plan(**fields: Any) -> CapturePlan:
    defaults: dict[str, Any] = {"latent_shape": (4, 8, 8), "dtype": torch.float32}
    return CapturePlan(**defaults | fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [("memory", 0), ("rows", 0), ("draws", -1), ("latent_shape", ()), ("latent_shape", (4, 0, 8)),
     ("batch_sizes", ()), ("batch_sizes", (2, 1)), ("batch_sizes", (0, 1)), ("batch_sizes", (1, 1))],
)  # fmt: skip
def test_a_capacity_that_makes_no_sense_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"CapturePlan.{field}: expected"):
        plan(**{field: value})


def test_a_plan_cannot_be_changed() -> None:
    own = plan(conditioning={"text": (2, 3)})
    with pytest.raises(FrozenInstanceError):
        own.rows = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        own.conditioning["more"] = (1,)  # type: ignore[index]


def test_size_for_is_the_smallest_that_serves() -> None:
    own = plan(batch_sizes=(1, 2, 4))
    assert [own.size_for(count) for count in (1, 2, 3, 4)] == [1, 2, 4, 4]
    with pytest.raises(PlanMismatch, match="at most 4 slots, got 5"):
        own.size_for(5)


def test_the_ring_holds_a_whole_run_only_where_that_is_small() -> None:
    assert plan(rows=50).ring_depth == 50
    video = plan(latent_shape=(16, 21, 60, 104), rows=50)
    assert video.ring_depth == 1
    assert video.latent_numel * 4 * 50 > video.ring_bytes
    assert plan(rows=50, ring_bytes=0).ring_depth == 1
