"""Wan: encoded, called and decoded as its own pipeline does, by one transformer or by two experts."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import PlanMismatch, Request, stages
from fastdiff.audit import audit
from fastdiff.families.wan import Wan
from fastdiff.plan import CapturePlan, TensorSpec
from fastdiff.slots import Slots
from fastdiff.state import RequestState
from tests.families.tiny import WIDTH, WORDS, relative_error
from tests.families.tiny_wan import SAMPLERS, call_of, video_of_diffusers, wan
from tests.purity import digest

STEPS = 4
BOUNDARY = 0.875  # with the samplers here both experts make at least one of four rows
SIZE: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5}


@pytest.fixture(scope="module")
def one() -> Any:
    return wan()


@pytest.fixture(scope="module")
def two() -> Any:
    return wan(experts=2, boundary_ratio=BOUNDARY)


def other(pipe: Any, **config: Any) -> Any:
    """The same components with another config."""
    return diffusers.WanPipeline(**{**pipe.components, "boundary_ratio": pipe.config.boundary_ratio, **config})


def ask(i: int, **fields: Any) -> Request:
    asked = {"prompt": f"a handwritten {WORDS[i]}", "negative_prompt": "a two", "steps": STEPS, "seed": i}
    return Request(**{**asked, "guidance_scale": 5.0, **fields})


def prepared(family: Wan, request: Request) -> RequestState:
    state = RequestState(request=request)
    for stage in (stages.encode, stages.schedule, stages.prepare_latents):
        state = stage(family, state)
    return state


def video_of(family: Wan, request: Request) -> Tensor:
    video = stages.decode(family, stages.denoise(family, prepared(family, request))).image
    assert video is not None
    return video


def error_of(pipe: Any, request: Request, **size: Any) -> float:
    size = size or SIZE
    return relative_error(video_of(Wan(pipe, **size), request), video_of_diffusers(pipe, request, **size))


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("experts", ["one", "two"])
def test_a_video_is_that_of_the_pipeline(
    request: pytest.FixtureRequest, experts: str, sampler: str, guidance_scale: float
) -> None:
    pipe = request.getfixturevalue(experts)
    assert error_of(pipe, ask(0, scheduler=SAMPLERS[sampler], guidance_scale=guidance_scale)) <= 1e-4


@pytest.mark.parametrize("guidance_scale_2", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_second_expert_has_a_scale_of_its_own(two: Any, sampler: str, guidance_scale_2: float) -> None:
    request = ask(0, scheduler=SAMPLERS[sampler], guidance_scale_2=guidance_scale_2)
    expected = video_of_diffusers(two, request, **SIZE)
    family = Wan(two, **SIZE)
    assert relative_error(video_of(family, request), expected) <= 1e-4
    assert relative_error(video_of(family, replace(request, guidance_scale_2=None)), expected) > 1e-3


def test_the_first_scale_alone_says_whether_there_is_guidance(two: Any) -> None:
    request, family = ask(0, guidance_scale=1.0, guidance_scale_2=5.0), Wan(two, **SIZE)
    assert relative_error(video_of(family, request), video_of_diffusers(two, request, **SIZE)) <= 1e-4
    assert torch.equal(video_of(family, request), video_of(family, ask(0, guidance_scale=1.0)))


def test_scale_and_steps_are_the_pipelines_own_unless_asked_for(two: Any) -> None:
    request, family = ask(0, guidance_scale=None, negative_prompt=None, steps=None), Wan(two, **SIZE)
    expected = two(request.prompt, generator=torch.Generator().manual_seed(0), output_type="pt", **SIZE).frames[0]
    assert len(stages.table_of(family, request)) == 50
    assert relative_error(video_of(family, request), expected) <= 1e-4


@pytest.mark.parametrize("scheduler", [*SAMPLERS.values(), diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)])
@pytest.mark.parametrize("ratio", [0.0, 0.5, BOUNDARY, 1.0, 1.1])
def test_each_expert_makes_the_rows_that_it_makes_in_the_pipeline(two: Any, scheduler: Any, ratio: float) -> None:
    pipe, request = other(two, boundary_ratio=ratio), ask(0, scheduler=scheduler, guidance_scale=1.0)
    rows = [0, 0]
    hooks = [
        expert.register_forward_pre_hook(lambda *_, i=i: rows.__setitem__(i, rows[i] + 1))
        for i, expert in enumerate((pipe.transformer, pipe.transformer_2))
    ]
    pipe.set_progress_bar_config(disable=True)
    try:
        video_of_diffusers(pipe, request, **SIZE)
    finally:
        for hook in hooks:
            hook.remove()
    table = stages.table_of(Wan(pipe, **SIZE), request)
    boundary = Wan(pipe, **SIZE).boundary(table)
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
        family = Wan(pipe, **SIZE)
        assert family.boundary(table) == len(table)
        assert (family.denoisers, family.models) == ((family.denoiser,), (pipe.transformer,))
    family = Wan(two, **SIZE)
    assert (len(family.denoisers), family.models) == (2, (two.transformer, two.transformer_2))
    assert family.denoisers[0] == family.denoiser


def test_a_schedule_that_comes_back_to_the_first_expert_is_refused(two: Any) -> None:
    table = fastdiff.tabulate(SAMPLERS["FlowMatchEuler"], STEPS)
    with pytest.raises(PlanMismatch, match=r"cross the experts' boundary once, falling, got \[.*, 1000\.0\]"):
        Wan(two, **SIZE).boundary(replace(table, timesteps=table.timesteps.flip(0)))


def test_a_scheduler_of_another_range_is_refused_where_there_is_a_boundary(one: Any, two: Any) -> None:
    request = ask(0, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=500))
    with pytest.raises(PlanMismatch, match=r"expected num_train_timesteps 1000, .*, got 500"):
        stages.table_of(Wan(two, **SIZE), request)
    assert error_of(one, request) <= 1e-4


@pytest.mark.parametrize(
    "change", [{"prompt": "a nine"}, {"negative_prompt": "a four"}, {"guidance_scale": 2.0}, {"seed": 9}]
)
def test_what_a_request_asks_for_shows_in_its_video(two: Any, change: dict[str, Any]) -> None:
    family = Wan(two, **SIZE)
    assert relative_error(video_of(family, ask(0, **change)), video_of(family, ask(0))) > 1e-3


@pytest.mark.parametrize("size", [(16, 48, 9), (48, 32, 1)])
def test_a_video_has_any_shape_and_length(two: Any, size: tuple[int, int, int]) -> None:
    height, width, num_frames = size
    own = {"height": height, "width": width, "num_frames": num_frames}
    assert video_of(Wan(two, **own), ask(1)).shape == (num_frames, 3, height, width)
    assert error_of(two, ask(1), **own) <= 1e-4


def test_without_a_size_it_is_that_of_the_pipelines_own_call(two: Any) -> None:
    assert Wan(two).latent_shape == (4, 21, 60, 104)
    assert CapturePlan.load("wan22-a14b-480p").latent_shape == (16, 21, 60, 104)


def test_latents_given_are_the_first_noise(two: Any) -> None:
    noise = torch.randn(1, 4, 2, 4, 4)
    family, request = Wan(two, **SIZE), ask(0, latents=noise[0])
    family.check(request)
    latents = stages.denoise(family, prepared(family, request)).sample
    expected = two(
        request.prompt, num_inference_steps=STEPS, latents=noise, output_type="latent", **call_of(request), **SIZE
    ).frames[0]  # fmt: skip
    assert (latents.shape, latents.dtype) == (expected.shape, expected.dtype)
    assert relative_error(latents, expected) <= 1e-4


def test_embeddings_stand_for_their_prompt_and_nothing_of_the_pipeline_changes(two: Any) -> None:
    family = Wan(two, **SIZE)
    positive, negative = (two.encode_prompt(text, max_sequence_length=512)[0][0] for text in ("a one", "a two"))
    as_text = video_of(family, ask(0, prompt="a one", negative_prompt="a two"))
    before = digest(family)
    as_tensors = ask(0, prompt=None, prompt_embeds=positive, negative_prompt=None, negative_prompt_embeds=negative)
    family.check(as_tensors)
    torch.testing.assert_close(video_of(family, as_tensors), as_text)
    assert digest(family) == before


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


def test_both_experts_are_safe_to_capture_and_treat_every_slot_apart(two: Any) -> None:
    family = Wan(two, **SIZE)
    plan = CapturePlan(
        latent_shape=family.latent_shape, dtype=family.dtype, conditioning=family.conditioning, batch_sizes=(2,), rows=5
    )  # fmt: skip
    for denoiser, model in zip(family.denoisers, family.models, strict=True):
        assert audit(denoiser, Slots(plan, "cpu").batch(2), model) == []


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"guidance_rescale": 0.5}, ValueError, "expected no guidance_rescale: WanPipeline takes none"),
        ({"prompt": None, "class_label": 3}, ValueError, "expected a prompt or prompt_embeds, got class_label"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(226, WIDTH)},
            PlanMismatch,
            r"prompt_embeds: expected shape \(512, 32\), got \(226, 32\)",
        ),
        (
            {"negative_prompt": None, "negative_prompt_embeds": torch.full((512, WIDTH), torch.nan)},
            ValueError,
            "negative_prompt_embeds: expected finite values, got NaN",
        ),
        ({"latents": torch.zeros(4, 5, 4, 4)}, PlanMismatch, r"latents: expected shape \(4, 2, 4, 4\)"),
    ],
)
def test_what_it_cannot_serve_is_refused(
    two: Any, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    family = Wan(two, **SIZE)
    family.check(ask(0))
    with pytest.raises(error, match=message):
        family.check(ask(0, **fields))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"height": 40}, "divisible by 16, got 40 x 832; 32 x 832 would do"),
        ({"num_frames": 80}, "num_frames: expected 1 more than a multiple of 4, got 80; 81 would do"),
        ({"num_frames": 2}, "got 2; 1 would do"),
        ({"num_frames": -3}, "got -3; 1 would do"),
    ],
)
def test_a_size_that_does_not_divide_is_refused(one: Any, size: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanMismatch, match=message):
        Wan(one, **size)


def test_pipelines_that_work_otherwise_are_refused_with_what_still_works(one: Any, two: Any) -> None:
    with pytest.raises(PlanMismatch, match=r"expand_timesteps \(Wan 2.2 5B\).*table_scheduler\(pipe.scheduler\) works"):
        Wan(other(one, expand_timesteps=True))
    with pytest.raises(
        PlanMismatch, match=r"expected a transformer_2 with boundary_ratio 0\.875, got none; load it too"
    ):
        Wan(other(one, boundary_ratio=BOUNDARY))
    with pytest.raises(PlanMismatch, match=r"expected a transformer with boundary_ratio 0\.875, got none; load it too"):
        Wan(other(two, transformer=None))
    half = wan(experts=2, boundary_ratio=BOUNDARY)
    half.transformer_2.to(torch.bfloat16)
    with pytest.raises(
        PlanMismatch, match=r"one dtype on one device, got torch\.bfloat16 on cpu and torch\.float32 on cpu"
    ):
        Wan(half)


def test_the_pipeline_that_is_refused_takes_a_table_scheduler(one: Any) -> None:
    pipe = other(one, expand_timesteps=True)
    pipe.set_progress_bar_config(disable=True)
    expected = video_of_diffusers(pipe, ask(0), **SIZE)
    handle = fastdiff.table_scheduler(pipe.scheduler)
    found = video_of_diffusers(pipe, ask(0, scheduler=handle), **SIZE)
    assert relative_error(found, expected) <= 1e-4


def test_the_plan_that_ships_is_that_of_the_model_at_480p() -> None:
    plan = CapturePlan.load("wan22-a14b-480p")
    assert (plan.dtype, plan.batch_sizes, plan.segments) == (torch.bfloat16, (1,), 2)
    assert plan.conditioning == {"prompt_embeds": TensorSpec((2, 512, 4096), torch.bfloat16)}
