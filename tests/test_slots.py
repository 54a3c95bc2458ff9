"""Static memory: fixed addresses, exact accounting, loads that leave nothing behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastdiff.errors import PlanMismatch
from fastdiff.plan import CapturePlan, TensorSpec
from fastdiff.slots import Slots
from fastdiff.table import GUIDANCE
from tests.conftest import LATENT_SHAPE, random_state, table

PLAN = CapturePlan(
    latent_shape=LATENT_SHAPE,
    dtype=torch.bfloat16,
    conditioning={"text": TensorSpec((2, 7), torch.bfloat16)},
    batch_sizes=(1, 3),
    rows=9,
)


def prepared(name: str = "UniPCMultistepScheduler", seed: int = 0, fill: float = 1.0):  # type: ignore[no-untyped-def]
    state = random_state(table(name), seed)
    return replace(state, conditioning={"text": torch.full((2, 7), fill, dtype=torch.bfloat16)})


def test_state_bytes_of_the_plan_are_those_of_the_slots() -> None:
    for plan in (PLAN, replace(PLAN, memory=6, draws=0), replace(PLAN, draws=2, rows=40)):
        slots = Slots(plan, "cpu")
        assert slots.nbytes == plan.state_bytes == sum(tensor.nbytes for tensor in slots.tensors())


def test_addresses_never_change() -> None:
    slots = Slots(PLAN, "cpu")
    before = [tensor.data_ptr() for tensor in slots.tensors()]
    for slot, name in enumerate(("UniPCMultistepScheduler", "EulerAncestralDiscreteScheduler")):
        slots.load(slot, prepared(name))
        slots.put_noise(slot, 0, torch.ones(1, 1, *LATENT_SHAPE))
        slots.park(slot)
    assert [tensor.data_ptr() for tensor in slots.tensors()] == before


def test_load_then_read_gives_the_latents_back_as_a_copy() -> None:
    slots, state = Slots(PLAN, "cpu"), prepared()
    slots.load(2, state)
    read = slots.read(2, state.prepared[0].memory)
    assert torch.equal(read, state.prepared[1])
    read.fill_(7)
    assert torch.equal(slots.read(2, state.prepared[0].memory), state.prepared[1])


def test_load_writes_its_own_slot_alone() -> None:
    slots = Slots(PLAN, "cpu")
    for slot in range(3):
        slots.load(slot, prepared(seed=slot, fill=slot))
    others = [[tensor[slot].clone() for tensor in slots.tensors()] for slot in (0, 2)]
    slots.load(1, replace(prepared("HeunDiscreteScheduler", 9, fill=9.0), guidance_scale=3.0))
    for slot, before in zip((0, 2), others, strict=True):
        for tensor, old in zip(slots.tensors(), before, strict=True):
            assert torch.equal(tensor[slot], old)
    assert (slots.batch(3).table[1, :9, GUIDANCE] == 3.0).all()


def test_the_parking_row_has_a_timestep_that_the_model_knows() -> None:
    slots, state = Slots(PLAN, "cpu"), prepared()
    own = state.prepared[0]
    slots.load(0, state)
    assert slots.batch(1).table[0, len(own), 0] == own.timesteps[-1]


def test_a_table_beyond_the_plan_is_refused_naming_the_capacity() -> None:
    slots = Slots(replace(PLAN, memory=2), "cpu")
    with pytest.raises(PlanMismatch, match=r"UniPCMultistepScheduler needs memory = 4, the plan has 2.*memory=4"):
        slots.load(0, prepared())
    with pytest.raises(PlanMismatch, match="needs rows = 20"):
        Slots(PLAN, "cpu").load(0, random_state(table("EulerDiscreteScheduler", 20), 0))
    with pytest.raises(PlanMismatch, match="needs draws = 1"):
        Slots(replace(PLAN, draws=0), "cpu").load(0, prepared("EulerAncestralDiscreteScheduler"))
