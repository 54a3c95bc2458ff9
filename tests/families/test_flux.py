"""Flux: encoded, called and decoded as its own pipeline does, its guidance an input of the model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import pytest
import torch

from fastdiff import PlanMismatch, Request, Runtime
from fastdiff.families import family_of
from tests.families import tiny_pipelines
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
SIZE: dict[str, Any] = {"height": 32, "width": 32}
TINY = PIPELINES["FluxPipeline"]
SAMPLERS = TINY.samplers


@pytest.fixture(scope="module")
def flux() -> Any:
    return TINY()


@pytest.fixture(scope="module")
def runtime(flux: Any) -> Runtime:
    return Runtime(flux, max_batch=3, **SIZE)


def ask(i: int, **fields: Any) -> Request:
    return Request(
        **{"prompt": f"a handwritten {WORDS[i]}", "steps": STEPS, "seed": i, "guidance_scale": 3.5, **fields}
    )


def call_of(request: Request) -> dict[str, Any]:
    return {"guidance_scale": request.guidance_scale}


def mixed() -> list[Request]:
    return [
        ask(0, guidance_scale=0.5),
        ask(1, steps=3, scheduler=SAMPLERS["UniPC"]),
        ask(2, guidance_scale=9.0, steps=6),
    ]


@pytest.mark.parametrize("guidance_scale", [0.5, 3.5])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_is_that_of_the_pipeline(flux: Any, runtime: Runtime, sampler: str, guidance_scale: float) -> None:
    request = ask(0, scheduler=SAMPLERS[sampler], guidance_scale=guidance_scale)
    (image,) = images_of(runtime, [request])
    assert relative_error(image, image_of_diffusers(flux, request, **call_of(request), **SIZE)) <= 1e-4


def test_prompts_steps_guidance_and_samplers_mix_in_one_batch(flux: Any, runtime: Runtime) -> None:
    for image, request in zip(images_of(runtime, mixed()), mixed(), strict=True):
        assert relative_error(image, image_of_diffusers(flux, request, **call_of(request), **SIZE)) <= 1e-4


def test_steps_sigmas_and_guidance_are_the_pipelines_own_unless_asked_for(flux: Any, runtime: Runtime) -> None:
    asked = [
        ask(0, steps=None, guidance_scale=None),
        ask(0, steps=None, guidance_scale=None, sigmas=[1.0, 0.6, 0.3]),
    ]
    calls: list[dict[str, Any]] = [{}, {"sigmas": [1.0, 0.6, 0.3]}]
    for result, request, call in zip(runtime.generate(asked), asked, calls, strict=True):
        expected = flux(
            request.prompt, generator=torch.Generator().manual_seed(0), output_type="pt", **call, **SIZE
        ).images[0]  # fmt: skip
        assert result.rows == len(call.get("sigmas", range(28)))
        assert result.image is not None
        assert relative_error(result.image, expected) <= 1e-4


@pytest.mark.parametrize("change", [{"prompt": "a nine"}, {"guidance_scale": 1.0}, {"seed": 9}])
def test_what_a_request_asks_for_shows_in_its_image(runtime: Runtime, change: dict[str, Any]) -> None:
    asked, other = images_of(runtime, [ask(0), ask(0, **change)])
    assert relative_error(other, asked) > 1e-3


def test_an_image_need_not_be_square_and_a_model_without_guidance_has_none() -> None:
    schnell = replace(TINY, build=partial(tiny_pipelines.flux, guidance_embeds=False))()
    size: dict[str, Any] = {"height": 16, "width": 48}
    schnell.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    one, other = images_of(Runtime(schnell, max_batch=2, **size), [ask(1), ask(1, guidance_scale=9.0)])
    assert torch.equal(one, other)
    assert relative_error(one, image_of_diffusers(schnell, ask(1), **size)) <= 1e-4


def test_bfloat16_errs_no_more_than_twice_as_diffusers_does(flux: Any) -> None:
    calls = [call_of(request) for request in mixed()]
    assert_half_precision_errs_no_more_than_twice_diffusers(flux, mixed(), calls, **SIZE)


def test_embeddings_stand_for_their_prompt_and_nothing_of_the_pipeline_changes(flux: Any, runtime: Runtime) -> None:
    prompt_embeds, pooled, _ = flux.encode_prompt("a one")
    before = digest(runtime.family)
    as_tensors = ask(0, prompt=None, prompt_embeds=prompt_embeds[0], pooled_prompt_embeds=pooled[0])
    text, tensors = images_of(runtime, [ask(0, prompt="a one"), as_tensors])
    assert digest(runtime.family) == before
    torch.testing.assert_close(text, tensors)


def test_latents_are_packed_in_the_pipelines_dtype(flux: Any, runtime: Runtime) -> None:
    noise = torch.randn(1, 64, 16)
    (result,) = runtime.generate([ask(0, latents=noise[0])])
    expected = flux(
        ask(0).prompt, num_inference_steps=STEPS, latents=noise, output_type="latent", **SIZE
    ).images[0]  # fmt: skip
    assert (result.latents.shape, result.latents.dtype) == (expected.shape, expected.dtype)
    assert relative_error(result.latents, expected) <= 1e-4


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"negative_prompt": "x"}, PlanMismatch, "negative_prompt: expected none, one call a row is all"),
        ({"guidance_rescale": 0.5}, ValueError, "expected no guidance_rescale: FluxPipeline takes none"),
        ({"prompt": None, "class_label": 3}, ValueError, "expected a prompt or prompt_embeds, got class_label"),
        ({"prompt": None, "prompt_embeds": torch.zeros(512, 32)}, ValueError, "need pooled_prompt_embeds beside them"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(256, 32), "pooled_prompt_embeds": torch.zeros(32)},
            PlanMismatch,
            r"prompt_embeds: expected shape \(512, 32\), got \(256, 32\)",
        ),
        ({"scheduler": 3}, TypeError, "expected a diffusers scheduler, got int"),
        ({"scheduler": diffusers.DDIMScheduler()}, TypeError, "DDIMScheduler"),
        ({"latents": torch.full((256, 16), torch.nan)}, PlanMismatch, r"latents: expected shape \(64, 16\)"),
        ({"latents": torch.full((64, 16), torch.nan)}, ValueError, "latents: expected finite values"),
    ],
)
def test_what_it_cannot_serve_raises_before_any_model_work(
    flux: Any, runtime: Runtime, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    called: list[Any] = []
    hooks = [
        part.register_forward_pre_hook(lambda *_: called.append(_))
        for part in (flux.transformer, flux.text_encoder, flux.text_encoder_2)
    ]
    try:
        with pytest.raises(error, match=message):
            runtime.generate([ask(0), ask(1, **fields)])
    finally:
        for hook in hooks:
            hook.remove()
    assert not called


def test_a_size_that_does_not_pack_is_refused(flux: Any) -> None:
    with pytest.raises(PlanMismatch, match="divisible by 4, got 32 x 34; 32 x 32 would do"):
        family_of(flux, height=32, width=34)
