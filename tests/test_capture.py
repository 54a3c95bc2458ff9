"""Compiled steps: the same result as eager ones, whatever the slots hold when they run."""

from __future__ import annotations

import pytest
import torch

from fastdiff.capture import Steps
from fastdiff.plan import CapturePlan
from fastdiff.slots import Slots
from fastdiff.step import denoise_step
from tests.conftest import LATENT_SHAPE, SAMPLERS, toy_model
from tests.test_step import load_all, mixed_states

PLAN = CapturePlan(latent_shape=LATENT_SHAPE, dtype=torch.float32, batch_sizes=(len(SAMPLERS),), rows=12)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode: expected 'eager' or 'compiled', got 'fast'"):
        Steps(toy_model, Slots(PLAN, "cpu"), "fast")  # type: ignore[arg-type]


def test_views_made_beforehand_change_no_bit() -> None:
    n = len(SAMPLERS)
    plain, viewed = Slots(PLAN, "cpu"), Slots(PLAN, "cpu")
    steps = Steps(toy_model, viewed, "eager")
    for slots in (plain, viewed):
        load_all(slots, mixed_states())
    for _ in range(10):
        denoise_step(toy_model, plain.batch(n))
        steps(n)
        for slot in range(n):
            assert torch.equal(plain.read(slot, PLAN.memory), viewed.read(slot, PLAN.memory))


@pytest.mark.compiles
def test_compiled_is_eager_and_no_coefficient_is_frozen() -> None:
    """One compiled callable serves tables, rows and latents that it was not compiled with."""
    n = len(SAMPLERS)
    eager_slots, compiled_slots = Slots(PLAN, "cpu"), Slots(PLAN, "cpu")
    eager, compiled = Steps(toy_model, eager_slots, "eager"), Steps(toy_model, compiled_slots, "compiled")
    for order in (1, -1):  # the second time every slot gets another table
        states = mixed_states()[::order]
        for slots in (eager_slots, compiled_slots):
            load_all(slots, states)
        for _ in range(10):
            with torch.no_grad():
                eager(n)
                compiled(n)
            for slot in range(n):
                torch.testing.assert_close(
                    compiled_slots.read(slot, PLAN.memory), eager_slots.read(slot, PLAN.memory), rtol=1e-5, atol=1e-5
                )
    assert compiled.compile_seconds.keys() == {n}
