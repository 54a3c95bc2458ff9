"""Stable Diffusion XL: encoded, called and decoded as its own pipeline does, guidance, rescale and samplers mixed."""

from __future__ import annotations

from pathlib import Path
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
    vae,
)
from tests.families.tiny_pipelines import PIPELINES
from tests.purity import digest

STEPS = 5
TINY = PIPELINES["StableDiffusionXLPipeline"]
SAMPLERS = TINY.samplers


@pytest.fixture(scope="module")
def sdxl() -> Any:
    return TINY()


@pytest.fixture(scope="module")
def runtime(sdxl: Any) -> Runtime:
    return Runtime(sdxl, max_batch=3)


def ask(i: int, **fields: Any) -> Request:
    return Request(**{"prompt": f"a handwritten {WORDS[i]}", "steps": STEPS, "seed": i, **fields})


def call_of(request: Request) -> dict[str, Any]:
    return {
        "guidance_scale": request.guidance_scale,
        "guidance_rescale": request.guidance_rescale or 0.0,
        "negative_prompt": request.negative_prompt,
    }


def mixed() -> list[Request]:
    return [
        ask(0, guidance_scale=5.0, guidance_rescale=0.7),
        ask(1, guidance_scale=1.0, steps=4, scheduler=SAMPLERS["DPMSolverMultistep"]),
        ask(2, guidance_scale=3.0, steps=6, negative_prompt="a four"),
    ]


@pytest.mark.parametrize("guidance_scale", [1.0, 6.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_is_that_of_the_pipeline(sdxl: Any, runtime: Runtime, sampler: str, guidance_scale: float) -> None:
    request = ask(0, scheduler=SAMPLERS[sampler], guidance_scale=guidance_scale)
    (image,) = images_of(runtime, [request])
    assert relative_error(image, image_of_diffusers(sdxl, request, **call_of(request))) <= 1e-4


def test_prompts_steps_guidance_rescale_and_samplers_mix_in_one_batch(sdxl: Any, runtime: Runtime) -> None:
    images = images_of(runtime, mixed())
    for image, request in zip(images, mixed(), strict=True):
        assert relative_error(image, image_of_diffusers(sdxl, request, **call_of(request))) <= 1e-4


@pytest.mark.parametrize("change", [{"prompt": "a nine"}, {"negative_prompt": "a four"}, {"guidance_rescale": 1}])
def test_what_a_request_asks_for_shows_in_its_image(runtime: Runtime, change: dict[str, Any]) -> None:
    asked, other = images_of(runtime, [ask(0), ask(0, **change)])
    assert relative_error(other, asked) > 1e-3


def test_an_image_need_not_be_square(sdxl: Any) -> None:
    (image,) = images_of(Runtime(sdxl, max_batch=1, height=16, width=48), [ask(1)])
    assert relative_error(image, image_of_diffusers(sdxl, ask(1), height=16, width=48)) <= 1e-4


def test_bfloat16_errs_no_more_than_twice_as_diffusers_does(sdxl: Any) -> None:
    calls = [call_of(request) for request in mixed()]
    assert_half_precision_errs_no_more_than_twice_diffusers(sdxl, mixed(), calls)


def test_embeddings_stand_for_their_prompt_and_nothing_of_the_pipeline_changes(sdxl: Any, runtime: Runtime) -> None:
    positive, negative, pooled, negative_pooled = sdxl.encode_prompt("a one", negative_prompt="a two")
    half = {"prompt_embeds": positive, "pooled_prompt_embeds": pooled}
    both = {**half, "negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}
    requests = [
        ask(0, prompt="a one", negative_prompt="a two"),
        ask(0, prompt=None, **{name: tensor[0] for name, tensor in both.items()}),
        ask(1, prompt=None, **{name: tensor[0] for name, tensor in half.items()}),
    ]
    expected = image_of_diffusers(sdxl, requests[2], **half)
    before = digest(runtime.family)
    text, tensors, unasked = images_of(runtime, requests)
    assert digest(runtime.family) == before
    torch.testing.assert_close(text, tensors)
    assert relative_error(unasked, expected) <= 1e-4


def test_a_request_is_saved_and_resumes_where_it_was(runtime: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "request.safetensors"
    with runtime.session() as session:
        slot = session.add(runtime.prepare(ask(0)))
        session.step()
        session.save(slot, path)
        resumed = session.load(path)
        while len(session.step()) < 2:
            pass
        torch.testing.assert_close(session.take(resumed).sample, session.take(slot).sample)


def test_latents_come_in_the_pipelines_shape_and_dtype(sdxl: Any, runtime: Runtime) -> None:
    noise = torch.randn(1, 4, 16, 16)
    request = ask(0, latents=noise[0])
    (result,) = runtime.generate([request])
    expected = sdxl(request.prompt, num_inference_steps=STEPS, latents=noise, output_type="latent").images[0]
    assert (result.latents.shape, result.latents.dtype) == (expected.shape, expected.dtype)
    assert relative_error(result.latents, expected) <= 1e-4


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"prompt": None, "class_label": 3}, ValueError, "expected a prompt or prompt_embeds, got class_label"),
        ({"prompt": None, "prompt_embeds": torch.zeros(16, 64)}, ValueError, "prompt_embeds need pooled_prompt_embeds"),
        ({"negative_prompt_embeds": torch.zeros(16, 64)}, ValueError, "need negative_pooled_prompt_embeds beside them"),
        (
            {
                "prompt": None,
                "negative_prompt": "x",
                "prompt_embeds": torch.zeros(16, 64),
                "pooled_prompt_embeds": torch.zeros(32),
            },
            ValueError,
            "prompt_embeds need negative_prompt_embeds and negative_pooled_prompt_embeds beside them",
        ),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(77, 64), "pooled_prompt_embeds": torch.zeros(32)},
            PlanMismatch,
            r"prompt_embeds: expected shape \(16, 64\), got \(77, 64\)",
        ),
        (
            {
                "prompt": None,
                "prompt_embeds": torch.zeros(16, 64),
                "pooled_prompt_embeds": torch.full((32,), torch.nan),
            },
            ValueError,
            "pooled_prompt_embeds: expected finite values, got NaN",
        ),
    ],
)
def test_what_it_cannot_serve_raises_before_any_model_work(
    sdxl: Any, runtime: Runtime, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    called: list[Any] = []
    hooks = [
        part.register_forward_pre_hook(lambda *_: called.append(_)) for part in (sdxl.unet, sdxl.text_encoder, sdxl.vae)
    ]
    try:
        with pytest.raises(error, match=message):
            runtime.generate([ask(0), ask(1, **fields)])
    finally:
        for hook in hooks:
            hook.remove()
    assert not called


def test_sizes_and_models_that_do_not_fit_are_refused(sdxl: Any) -> None:
    with pytest.raises(PlanMismatch, match="divisible by 8, got 36 x 32; 32 x 32 would do"):
        family_of(sdxl, height=36)
    half = diffusers.StableDiffusionXLPipeline(**{**sdxl.components, "vae": vae().half()}, add_watermarker=False)
    with pytest.raises(PlanMismatch, match=r"call pipe.vae.to\(torch.float32\) first"):
        family_of(half)
