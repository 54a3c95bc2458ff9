"""Stable Diffusion 3: encoded, called and decoded as its own pipeline does, guidance and samplers mixed."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from fastdiff import PlanMismatch, Request, Runtime
from fastdiff.families import family_of
from tests.families.tiny import (
    WORDS,
    assert_half_precision_errs_no_more_than_twice_diffusers,
    image_of_diffusers,
    images_of,
    relative_error,
)
from tests.families.tiny_pipelines import PIPELINES
from tests.purity import digest

STEPS = 4
TINY = PIPELINES["StableDiffusion3Pipeline"]
SAMPLERS = {
    **TINY.samplers,
    "FlowMatchEuler shifted by size": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
}


@pytest.fixture(scope="module")
def sd3() -> Any:
    return TINY()


@pytest.fixture(scope="module")
def runtime(sd3: Any) -> Runtime:
    return Runtime(sd3, max_batch=3)


def ask(i: int, **fields: Any) -> Request:
    return Request(**{"prompt": f"a handwritten {WORDS[i]}", "steps": STEPS, "seed": i, **fields})


def call_of(request: Request) -> dict[str, Any]:
    return {"guidance_scale": request.guidance_scale, "negative_prompt": request.negative_prompt}


def mixed() -> list[Request]:
    return [
        ask(0, guidance_scale=5.0, negative_prompt="a four"),
        ask(1, guidance_scale=1.0, steps=3, scheduler=SAMPLERS["UniPC"]),
        ask(2, guidance_scale=3.0, steps=6, scheduler=SAMPLERS["FlowMatchEuler shifted by size"]),
    ]


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_is_that_of_the_pipeline(sd3: Any, runtime: Runtime, sampler: str, guidance_scale: float) -> None:
    request = ask(0, scheduler=SAMPLERS[sampler], guidance_scale=guidance_scale)
    (image,) = images_of(runtime, [request])
    assert relative_error(image, image_of_diffusers(sd3, request, **call_of(request))) <= 1e-4


def test_prompts_steps_guidance_and_samplers_mix_in_one_batch(sd3: Any, runtime: Runtime) -> None:
    for image, request in zip(images_of(runtime, mixed()), mixed(), strict=True):
        assert relative_error(image, image_of_diffusers(sd3, request, **call_of(request))) <= 1e-4


@pytest.mark.parametrize("change", [{"prompt": "a nine"}, {"negative_prompt": "a four"}, {"guidance_scale": 2.0}])
def test_what_a_request_asks_for_shows_in_its_image(runtime: Runtime, change: dict[str, Any]) -> None:
    asked, other = images_of(runtime, [ask(0), ask(0, **change)])
    assert relative_error(other, asked) > 1e-3


def test_an_image_need_not_be_square_and_steps_are_the_pipelines_own(sd3: Any) -> None:
    request = ask(1, steps=None)
    size: dict[str, Any] = {"height": 16, "width": 48}
    (result,) = Runtime(sd3, max_batch=1, **size).generate([request])
    expected = sd3(
        request.prompt, generator=torch.Generator().manual_seed(1), output_type="pt", **size
    ).images[0]  # fmt: skip
    assert result.rows == 28
    assert result.image is not None
    assert relative_error(result.image, expected) <= 1e-4


def test_bfloat16_errs_no_more_than_twice_as_diffusers_does(sd3: Any) -> None:
    calls = [call_of(request) for request in mixed()]
    assert_half_precision_errs_no_more_than_twice_diffusers(sd3, mixed(), calls)


def test_embeddings_stand_for_their_prompt_and_nothing_of_the_pipeline_changes(sd3: Any, runtime: Runtime) -> None:
    found = sd3.encode_prompt("a one", None, None, negative_prompt="a two")
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    before = digest(runtime.family)
    as_tensors = ask(0, prompt=None, **{name: tensor[0] for name, tensor in zip(names, found, strict=True)})
    text, tensors = images_of(runtime, [ask(0, prompt="a one", negative_prompt="a two"), as_tensors])
    assert digest(runtime.family) == before
    torch.testing.assert_close(text, tensors)


def test_a_pipeline_without_t5_is_served_as_it_serves_itself(sd3: Any) -> None:
    without = diffusers.StableDiffusion3Pipeline(**{**sd3.components, "text_encoder_3": None, "tokenizer_3": None})
    without.set_progress_bar_config(disable=True)
    (image,) = images_of(Runtime(without, max_batch=1), [ask(0)])
    assert relative_error(image, image_of_diffusers(without, ask(0))) <= 1e-4


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"guidance_rescale": 0.5}, ValueError, "expected no guidance_rescale: StableDiffusion3Pipeline takes none"),
        ({"prompt": None, "class_label": 3}, ValueError, "expected a prompt or prompt_embeds, got class_label"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(272, 64), "pooled_prompt_embeds": torch.zeros(64)},
            ValueError,
            "prompt_embeds need negative_prompt_embeds and negative_pooled_prompt_embeds beside them",
        ),
        (
            {"negative_prompt_embeds": torch.zeros(77, 64), "negative_pooled_prompt_embeds": torch.zeros(64)},
            PlanMismatch,
            r"negative_prompt_embeds: expected shape \(272, 64\), got \(77, 64\)",
        ),
        ({"latents": torch.full((4, 16, 16), torch.inf)}, ValueError, "latents: expected finite values"),
    ],
)
def test_what_it_cannot_serve_raises_before_any_model_work(
    sd3: Any, runtime: Runtime, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    called: list[Any] = []
    hooks = [
        part.register_forward_pre_hook(lambda *_: called.append(_))
        for part in (sd3.transformer, sd3.text_encoder, sd3.text_encoder_3)
    ]
    try:
        with pytest.raises(error, match=message):
            runtime.generate([ask(0), ask(1, **fields)])
    finally:
        for hook in hooks:
            hook.remove()
    assert not called


def test_a_size_that_does_not_divide_into_patches_is_refused(sd3: Any) -> None:
    with pytest.raises(PlanMismatch, match="divisible by 4, got 34 x 32; 32 x 32 would do"):
        family_of(sd3, height=34)
