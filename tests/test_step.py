"""The step against the reference application of the same rows, and what a captured step must never do."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.noise import copy_generator, row_noise, run_noise
from fastdiff.plan import CapturePlan
from fastdiff.slots import Slots
from fastdiff.state import RequestState
from fastdiff.step import denoise_step
from tests.conftest import LATENT_SHAPE, SAMPLERS, random_state, table, toy_model

N = len(SAMPLERS)


def plan(**capacities: Any) -> CapturePlan:
    return CapturePlan(latent_shape=LATENT_SHAPE, dtype=torch.float32, batch_sizes=(1, N), rows=12, **capacities)


def mixed_states(steps: int = 5) -> list[RequestState]:
    return [random_state(table(name, steps), seed) for seed, name in enumerate(SAMPLERS)]


def load_all(slots: Slots, states: list[RequestState], boundary: int | None = None) -> None:
    for slot, state in enumerate(states):
        slots.load(slot, state, boundary)
        put_all_noise(slots, slot, state)


def put_all_noise(slots: Slots, slot: int, state: RequestState) -> None:
    own, _ = state.prepared
    assert state.generator is not None
    noise = run_noise(copy_generator(state.generator), own.draws, LATENT_SHAPE, torch.float32, torch.device("cpu"))
    slots.put_noise(slot, 0, noise)


def late_model(sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
    """What the rows of a second segment call."""
    return 0.5 * toy_model(sample, timestep, conditioning, guidance) - 0.1


def reference_run(
    state: RequestState, guidance: float = 1.0, boundary: int | None = None, guidance_2: float = 1.0
) -> list[Tensor]:
    """The latents [K, ...] after each row, by `StepTable.advance` alone; from `boundary` on by the late model."""
    own, latents = state.prepared
    assert state.generator is not None
    generator = copy_generator(state.generator)
    after = []
    for row in range(len(own)):
        noise = row_noise(generator, own.draws[row], LATENT_SHAPE, torch.float32, torch.device("cpu"))
        timestep = own.timesteps[row].float()[None]
        sample = own.model_input(row, latents)[None]
        late = boundary is not None and row >= boundary
        model, scale = (late_model, guidance_2) if late else (toy_model, guidance)
        model_output = model(sample, timestep, {}, torch.tensor([scale]))[0]
        latents = own.advance(row, latents, model_output, noise)
        after.append(latents)
    return after


def test_mixed_samplers_advance_as_their_tables_do() -> None:
    slots, states = Slots(plan(), "cpu"), mixed_states()
    load_all(slots, states)
    references = [reference_run(state) for state in states]
    for row in range(max(map(len, references))):
        denoise_step(toy_model, slots.batch(N))
        for slot, reference in enumerate(references):
            expected = reference[min(row, len(reference) - 1)]
            torch.testing.assert_close(slots.read(slot, len(expected)), expected, rtol=1e-5, atol=1e-5)


def test_each_segments_rows_are_run_by_its_own_model_once() -> None:
    """Slots cross their boundaries in different rows; the second segment goes first, so that none moves twice."""
    slots, states = Slots(plan(segments=2), "cpu"), mixed_states()
    boundaries = [slot % (len(state.prepared[0]) + 1) for slot, state in enumerate(states)]  # none and all among them
    for slot, (state, boundary) in enumerate(zip(states, boundaries, strict=True)):
        state.guidance_scale, state.guidance_scale_2 = 2.0, 3.0
        slots.load(slot, state, boundary)
        put_all_noise(slots, slot, state)
    references = [reference_run(*one) for one in zip(states, [2.0] * N, boundaries, [3.0] * N, strict=True)]
    for row in range(max(map(len, references))):
        denoise_step(late_model, slots.batch(N, segment=1))
        denoise_step(toy_model, slots.batch(N, segment=0))
        for slot, reference in enumerate(references):
            expected = reference[min(row, len(reference) - 1)]
            torch.testing.assert_close(slots.read(slot, len(expected)), expected, rtol=1e-5, atol=1e-5)
    before = [slots.read(slot, 1) for slot in range(N)]
    for slot, state in enumerate(states):
        slots.load(slot, state, boundaries[slot])
        slots.park(slot)
    for segment, model in enumerate((toy_model, late_model)):
        denoise_step(model, slots.batch(N, segment))
    for slot, state in enumerate(states):  # an idle slot is in neither
        assert not torch.equal(slots.read(slot, 1), before[slot])
        assert torch.equal(slots.read(slot, 1)[0], state.prepared[1][0])


def test_guidance_is_the_slots_own() -> None:
    slots = Slots(plan(), "cpu")
    states = [random_state(table("DDIMScheduler"), 0) for _ in range(2)]
    states[1].guidance_scale = 5.0
    load_all(slots, states)
    for _ in range(5):
        denoise_step(toy_model, slots.batch(N))
    for slot, scale in enumerate((1.0, 5.0)):
        torch.testing.assert_close(slots.read(slot, 1), reference_run(states[slot], scale)[-1])


@pytest.mark.parametrize("neighbour", ["zeros", "noise", "nan"])
def test_a_slot_is_bitwise_the_same_whatever_its_neighbours_hold(neighbour: str) -> None:
    fills = {"zeros": 0.0, "noise": 3.7, "nan": float("nan")}
    for own_slot, state in enumerate(mixed_states()):
        alone, crowded = Slots(plan(), "cpu"), Slots(plan(), "cpu")
        for slot, other in enumerate(mixed_states()):
            if slot != own_slot:
                _, latents = other.prepared
                other.latents = torch.full_like(latents, fills[neighbour])
                crowded.load(slot, other)
        for slots in (alone, crowded):
            slots.load(own_slot, state)
            put_all_noise(slots, own_slot, state)
        memory = state.prepared[0].memory
        for _ in range(len(state.prepared[0])):
            for slots in (alone, crowded):
                denoise_step(toy_model, slots.batch(N))
            assert torch.equal(alone.read(own_slot, memory), crowded.read(own_slot, memory))


def test_a_spent_slot_is_held_bitwise_and_a_parked_one_too() -> None:
    slots, states = Slots(plan(), "cpu"), mixed_states(steps=2)
    load_all(slots, states)
    slots.park(1)
    parked = slots.read(1, plan().memory)
    for _ in range(len(states[0].prepared[0])):
        denoise_step(toy_model, slots.batch(N))
    spent = slots.read(0, plan().memory)
    for _ in range(4):
        denoise_step(toy_model, slots.batch(N))
    assert torch.equal(slots.read(0, plan().memory), spent)
    assert torch.equal(slots.read(1, plan().memory), parked)


def test_nothing_stays_in_a_slot_that_a_nan_request_left() -> None:
    fresh, used = Slots(plan(), "cpu"), Slots(plan(), "cpu")
    poison = random_state(table("UniPCMultistepScheduler"), 0)
    poison.latents = torch.full_like(poison.prepared[1], float("nan"))
    used.load(0, poison)
    used.put_noise(0, 0, torch.full((1, 1, *LATENT_SHAPE), float("nan")))
    for _ in range(3):
        denoise_step(toy_model, used.batch(1))
    state = random_state(table("EulerDiscreteScheduler"), 1)
    for slots in (fresh, used):
        slots.load(0, state)
    for _ in range(5):
        for slots in (fresh, used):
            denoise_step(toy_model, slots.batch(1))
        assert torch.equal(fresh.read(0, plan().memory), used.read(0, plan().memory))
    assert torch.isfinite(used.read(0, plan().memory)).all()


class OpCounter(TorchDispatchMode):
    """Counts the aten operations of one step."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[str(func)] += 1
        return func(*args, **(kwargs or {}))


HOST_READS = {
    "aten._local_scalar_dense.default",
    "aten.nonzero.default",
    "aten.equal.default",
    "aten.is_nonzero.default",
}


def test_a_step_reads_nothing_on_the_host_and_costs_the_same_whatever_it_serves() -> None:
    counted = []
    for states in (mixed_states(), mixed_states(steps=1), [random_state(table("EulerDiscreteScheduler"), 0)]):
        slots = Slots(plan(), "cpu")
        load_all(slots, states)
        for n in (1, N):
            with OpCounter() as counter:
                denoise_step(toy_model, slots.batch(n))
            assert not HOST_READS & counter.ops.keys()
            counted.append(counter.ops)
    assert all(ops == counted[0] for ops in counted)


def test_half_precision_model_inputs_keep_a_float32_state() -> None:
    seen = []

    def model(sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        seen.append(sample.dtype)
        return sample

    half = CapturePlan(latent_shape=LATENT_SHAPE, dtype=torch.bfloat16, batch_sizes=(1,), rows=12)
    slots = Slots(half, "cpu")
    slots.load(0, random_state(table("EulerDiscreteScheduler"), 0))
    denoise_step(model, slots.batch(1))
    assert seen == [torch.bfloat16]
    assert slots.batch(1).planes[0].dtype == torch.float32
