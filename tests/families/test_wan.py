"""Wan: rows split between two experts by the timestep, requests at either of them in one step, videos of any length."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import PlanMismatch, Request, Runtime, stages
from fastdiff.audit import audit
from fastdiff.families.wan import Wan
from fastdiff.plan import CapturePlan, TensorSpec
from fastdiff.slots import Slots
from tests.conftest import Unrolled
from tests.families.tiny import WORDS, image_of_diffusers, images_of, relative_error
from tests.families.tiny_pipelines import PIPELINES, shared, sizes_of

STEPS = 4
BOUNDARY = 0.875  # with the samplers here both experts make at least one of four rows
SAMPLERS = PIPELINES["WanPipeline"].samplers
SIZES: dict[str, Any] = sizes_of("WanPipeline")
HEUN = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)


@pytest.fixture(scope="module")
def one() -> Any:
    return shared("WanPipeline")


@pytest.fixture(scope="module")
def two() -> Any:
    return other(shared("WanPipeline with two experts"), boundary_ratio=BOUNDARY)


@pytest.fixture(scope="module")
def runtime(two: Any) -> Runtime:
    return Runtime(two, max_batch=3, **SIZES)


def other(pipe: Any, **config: Any) -> Any:
    """The same components with another config."""
    own = diffusers.WanPipeline(**{**pipe.components, "boundary_ratio": pipe.config.boundary_ratio, **config})
    own.set_progress_bar_config(disable=True)
    return own


def ask(i: int, **fields: Any) -> Request:
    asked = {"prompt": f"a handwritten {WORDS[i]}", "negative_prompt": "a two", "steps": STEPS, "seed": i}
    return Request(**{**asked, "guidance_scale": 5.0, **fields})


def mixed() -> list[Request]:
    """Of 3, 9 and 5 rows; the first expert makes 1, 3 and 2 of them."""
    return [
        ask(0, scheduler=SAMPLERS["FlowMatchEuler"], steps=3, guidance_scale_2=2.0),
        ask(1, scheduler=SAMPLERS["UniPC"], steps=9),
        ask(2, scheduler=SAMPLERS["FlowMatchEuler"], steps=5, guidance_scale=1.0, guidance_scale_2=4.0),
    ]


# Which expert makes a row, and at which scale


@pytest.mark.parametrize("scheduler", [*SAMPLERS.values(), HEUN])
@pytest.mark.parametrize("ratio", [0.0, 0.5, BOUNDARY, 1.0, 1.1])
def test_each_expert_makes_the_rows_that_it_makes_in_the_pipeline(two: Any, scheduler: Any, ratio: float) -> None:
    pipe, request = other(two, boundary_ratio=ratio), ask(0, scheduler=scheduler, guidance_scale=1.0)
    rows = [0, 0]
    hooks = [
        expert.register_forward_pre_hook(lambda *_, i=i: rows.__setitem__(i, rows[i] + 1))
        for i, expert in enumerate((pipe.transformer, pipe.transformer_2))
    ]
    try:
        image_of_diffusers(pipe, request, **SIZES)
    finally:
        for hook in hooks:
            hook.remove()
    family = Wan(pipe, **SIZES)
    table = stages.table_of(family, request)
    boundary = family.boundary(table)
    assert [boundary, len(table) - boundary] == rows


def test_a_boundary_is_compared_in_the_dtype_of_the_timesteps(two: Any) -> None:
    table = fastdiff.tabulate(SAMPLERS["FlowMatchEuler"], STEPS)
    timestep = table.timesteps[1]
    assert timestep.dtype == torch.float32
    just_above = (float(timestep) + 1e-6) / 1000
    assert just_above * 1000 > float(timestep)
    assert timestep >= just_above * 1000  # as the pipeline asks
    assert Wan(other(two, boundary_ratio=just_above)).boundary(table) == 2
    assert Wan(other(two, boundary_ratio=just_above + 1e-6)).boundary(table) == 1


def test_one_expert_makes_all_rows(one: Any, two: Any) -> None:
    table = fastdiff.tabulate(SAMPLERS["UniPC"], STEPS)
    for pipe in (one, other(two, boundary_ratio=None)):  # without a boundary the second one has no part in it
        family = Wan(pipe, **SIZES)
        assert family.boundary(table) == len(table)
        assert (family.denoisers, family.models) == ((family.denoiser,), (pipe.transformer,))
    family = Wan(two, **SIZES)
    assert (len(family.denoisers), family.models) == (2, (two.transformer, two.transformer_2))
    assert family.denoisers[0] == family.denoiser


@pytest.mark.parametrize(
    "change",
    [{"guidance_scale_2": 0.5}, {"guidance_scale_2": 1.0}, {"guidance_scale": 3.0, "guidance_scale_2": 5.0}],
)
def test_each_expert_has_its_scale(two: Any, runtime: Runtime, change: dict[str, Any]) -> None:
    same, own = images_of(runtime, [ask(0), ask(0, **change)])
    assert relative_error(own, image_of_diffusers(two, ask(0, **change), **SIZES)) <= 1e-4
    assert relative_error(own, same) > 1e-3


def test_the_first_scale_alone_says_whether_there_is_guidance(two: Any, runtime: Runtime) -> None:
    request = ask(0, guidance_scale=1.0, guidance_scale_2=5.0)
    (video,) = images_of(runtime, [request])
    assert relative_error(video, image_of_diffusers(two, request, **SIZES)) <= 1e-4
    assert torch.equal(video, images_of(runtime, [ask(0, guidance_scale=1.0)])[0])


def test_a_schedule_that_comes_back_to_the_first_expert_is_refused(two: Any) -> None:
    table = fastdiff.tabulate(SAMPLERS["FlowMatchEuler"], STEPS)
    with pytest.raises(PlanMismatch, match=r"cross the experts' boundary once, falling, got \[.*, 1000\.0\]"):
        Wan(two, **SIZES).boundary(replace(table, timesteps=table.timesteps.flip(0)))


def test_a_scheduler_of_another_range_is_refused_where_there_is_a_boundary(one: Any, runtime: Runtime) -> None:
    request = ask(0, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=500))
    with pytest.raises(PlanMismatch, match=r"expected num_train_timesteps 1000, .*, got 500"):
        runtime.generate([request])
    (video,) = images_of(Runtime(one, max_batch=1, **SIZES), [request])
    assert relative_error(video, image_of_diffusers(one, request, **SIZES)) <= 1e-4


# Requests at both experts in one step


def test_in_one_step_one_slot_is_at_the_first_expert_and_another_at_the_second(runtime: Runtime) -> None:
    tables = [stages.table_of(runtime.family, request) for request in mixed()]
    crossings = [(runtime.family.boundary(table), len(table)) for table in tables]
    assert all(0 < boundary < rows for boundary, rows in crossings)
    late = [set(range(boundary, rows)) for boundary, rows in crossings]
    assert late[0] & set(range(crossings[1][0]))


def test_more_requests_than_slots_take_the_places_of_those_that_are_done(two: Any, runtime: Runtime) -> None:
    requests = [*mixed(), ask(0, steps=2, guidance_scale_2=1.0), ask(1, scheduler=SAMPLERS["UniPC"], seed=9)]
    for video, request in zip(images_of(runtime, requests), requests, strict=True):
        assert relative_error(video, image_of_diffusers(two, request, **SIZES)) <= 1e-4


def test_what_the_neighbours_are_changes_no_bit(runtime: Runtime) -> None:
    *_, asked = mixed()
    others = [ask(0, prompt="a nine", steps=2, guidance_scale_2=7.0), ask(1, steps=6, guidance_scale=1.0)]
    first, second = (images_of(runtime, [*neighbours, asked])[2] for neighbours in (mixed()[:2], others))
    assert torch.equal(first, second)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_a_request_is_saved_on_either_side_of_the_boundary_and_resumes(
    runtime: Runtime, tmp_path: Path, rows: int
) -> None:
    request, path = replace(mixed()[1], guidance_scale_2=2.0), tmp_path / "request.safetensors"
    with runtime.session() as session:
        slot = session.add(runtime.prepare(request))
        for _ in range(rows):
            session.step()
        session.save(slot, path)
        resumed = session.load(path)
        while len(session.step()) < 2:
            pass
        torch.testing.assert_close(session.take(resumed).sample, session.take(slot).sample)


@pytest.mark.parametrize("unroll", [2, 3, 4])
def test_a_call_of_several_rows_that_ends_at_the_boundary_leaves_the_noise_in_order(two: Any, unroll: int) -> None:
    """Noise is drawn for whole calls; one that the boundary cuts short has drawn for rows that are yet to run."""
    noisy = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    own = Runtime(two, max_batch=1, unroll=unroll, ring_bytes=0, certify=False, **SIZES)
    own.steps = Unrolled(own)
    assert own.plan.ring_depth == unroll
    boundaries = set()
    for steps in range(4, 12):
        state = own.prepare(ask(0, scheduler=noisy, steps=steps))
        boundaries.add(own.family.boundary(state.prepared[0]) % unroll)
        expected = stages.denoise(own.family, state)
        with own.session() as session:
            slot = session.add(state)
            forks = [session.fork(slot)]
            while not session.step():
                forks.append(session.fork(slot))
            forks.append(session.take(slot))
        for fork in forks:  # each with the generator of its own row
            assert relative_error(stages.denoise(own.family, fork).sample, expected.sample) <= 1e-4
    assert boundaries == set(range(unroll))


def test_where_one_expert_raises_the_others_rows_have_run(two: Any) -> None:
    """A transient error in the first: the second's slot is a row further, on the host as on the device."""
    noisy = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    own = Runtime(two, max_batch=2, ring_bytes=0, certify=False, **SIZES)
    late, early = (own.prepare(ask(i, scheduler=noisy, steps=8)) for i in range(2))
    expected = [stages.denoise(own.family, state).sample for state in (late, early)]

    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("for once")

    with own.session() as session:
        slots = [session.add(late)]
        for _ in range(own.family.boundary(late.prepared[0])):
            session.step()
        slots.append(session.add(early))
        before = two.transformer.register_forward_pre_hook(fails)
        try:
            with pytest.raises(torch.OutOfMemoryError, match="for once"):
                session.step()
        finally:
            before.remove()
        forks = [session.fork(slot) for slot in slots]
        assert forks[0].row > own.family.boundary(late.prepared[0])
        assert forks[1].row == 0
        while len(session.step()) < 2:
            pass
        for slot, fork, right in zip(slots, forks, expected, strict=True):
            assert relative_error(session.take(slot).sample, right) <= 1e-4
            assert relative_error(stages.denoise(own.family, fork).sample, right) <= 1e-4


def test_both_experts_are_safe_to_capture_and_treat_every_slot_apart(runtime: Runtime) -> None:
    plan = replace(runtime.plan, batch_sizes=(2,), rows=5, segments=1)
    for denoiser, model in zip(runtime.family.denoisers, runtime.family.models, strict=True):
        assert audit(denoiser, Slots(plan, "cpu").batch(2), model) == []


def test_a_plan_of_one_segment_does_not_fit_two_experts(two: Any, runtime: Runtime) -> None:
    with pytest.raises(PlanMismatch, match="segments: the pipeline has 2, the plan 1"):
        Runtime(two, plan=replace(runtime.plan, segments=1), **SIZES)


# Videos


@pytest.mark.parametrize("num_frames", [1, 5])
def test_a_video_has_any_length(two: Any, num_frames: int) -> None:
    sizes = {**SIZES, "num_frames": num_frames}
    (video,) = images_of(Runtime(two, max_batch=1, **sizes), [ask(1)])
    assert video.shape == (num_frames, 3, 32, 32)
    assert relative_error(video, image_of_diffusers(two, ask(1), **sizes)) <= 1e-4


def test_without_sizes_they_are_those_of_the_pipelines_own_call(two: Any) -> None:
    assert Wan(two).latent_shape == (4, 21, 60, 104)
    plan = CapturePlan.load("wan22-a14b-480p")
    assert (plan.latent_shape, plan.dtype) == ((16, 21, 60, 104), torch.bfloat16)
    assert (plan.batch_sizes, plan.segments) == ((1,), 2)
    assert plan.conditioning == {"prompt_embeds": TensorSpec((2, 512, 4096), torch.bfloat16)}


def test_two_threads_decode_apart(one: Any) -> None:
    family = Wan(one, height=32, width=32, num_frames=17)
    samples = [torch.randn(family.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    with torch.no_grad():
        expected = [family.decode(sample) for sample in samples]
    found: dict[int, Tensor] = {}

    def decode(index: int) -> None:
        with torch.no_grad():
            found[index] = family.decode(samples[index])

    threads = [threading.Thread(target=decode, args=(index,)) for index in range(len(samples))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], video) for index, video in enumerate(expected))


# What is refused


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_frames": "9"}, "num_frames: expected 1 more than a multiple of 4, got '9'"),
        ({"num_frames": 80}, "num_frames: expected 1 more than a multiple of 4, got 80; 81 would do"),
        ({"num_frames": 2}, "got 2; 1 would do"),
        ({"num_frames": -3}, "got -3; 1 would do"),
    ],
)
def test_a_length_that_does_not_divide_is_refused(one: Any, sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanMismatch, match=message):
        Wan(one, **sizes)


def test_pipelines_that_work_otherwise_are_refused(one: Any, two: Any) -> None:
    with pytest.raises(
        PlanMismatch, match=r"expected a transformer_2 with boundary_ratio 0\.875, got none; load it too"
    ):
        Wan(other(one, boundary_ratio=BOUNDARY))
    with pytest.raises(PlanMismatch, match=r"expected a transformer with boundary_ratio 0\.875, got none; load it too"):
        Wan(other(two, transformer=None))
    half = other(two, transformer_2=copy.deepcopy(two.transformer_2).to(torch.bfloat16))
    with pytest.raises(PlanMismatch, match=r"one dtype on one device, got torch\.bfloat16 on cpu and torch\.float32"):
        Wan(half)


def test_a_pipeline_with_a_timestep_for_each_token_takes_a_table_scheduler(one: Any) -> None:
    pipe = other(one, expand_timesteps=True)
    expected = image_of_diffusers(pipe, ask(0), **SIZES)
    found = image_of_diffusers(pipe, ask(0, scheduler=fastdiff.table_scheduler(pipe.scheduler)), **SIZES)
    assert relative_error(found, expected) <= 1e-4
