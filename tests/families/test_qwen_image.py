"""Qwen-Image: encoded, called and decoded as its own pipeline does, texts of any length masked in one batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from fastdiff import PlanMismatch, Request, Runtime
from fastdiff.families import family_of, qwen_image
from tests.families.tiny import (
    WIDTH,
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
TINY = PIPELINES["QwenImagePipeline"]
SAMPLERS = TINY.samplers


@pytest.fixture(scope="module")
def qwen_pipe() -> Any:
    return TINY()


@pytest.fixture(scope="module")
def runtime(qwen_pipe: Any) -> Runtime:
    return Runtime(qwen_pipe, max_batch=3, **SIZE)


def ask(i: int, **fields: Any) -> Request:
    asked = {"prompt": f"a handwritten {WORDS[i]}", "negative_prompt": " ", "steps": STEPS, "seed": i}
    return Request(**{**asked, "guidance_scale": 4.0, **fields})


def call_of(request: Request) -> dict[str, Any]:
    return {"true_cfg_scale": request.guidance_scale, "negative_prompt": request.negative_prompt}


def mixed() -> list[Request]:
    return [
        ask(0, negative_prompt="a rather long description of all that there is not"),
        ask(1, prompt="one", guidance_scale=1.0, steps=3, scheduler=SAMPLERS["UniPC"]),
        ask(2, guidance_scale=2.5, steps=6),
    ]


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_is_that_of_the_pipeline(
    qwen_pipe: Any, runtime: Runtime, sampler: str, guidance_scale: float
) -> None:
    request = ask(0, scheduler=SAMPLERS[sampler], guidance_scale=guidance_scale)
    (image,) = images_of(runtime, [request])
    assert relative_error(image, image_of_diffusers(qwen_pipe, request, **call_of(request), **SIZE)) <= 1e-4


def test_texts_of_any_length_steps_guidance_and_samplers_mix_in_one_batch(qwen_pipe: Any, runtime: Runtime) -> None:
    for image, request in zip(images_of(runtime, mixed()), mixed(), strict=True):
        assert relative_error(image, image_of_diffusers(qwen_pipe, request, **call_of(request), **SIZE)) <= 1e-4


def test_without_a_negative_prompt_nothing_guides_as_in_the_pipeline(qwen_pipe: Any, runtime: Runtime) -> None:
    request = ask(0, negative_prompt=None)
    (image,) = images_of(runtime, [request])
    assert relative_error(image, image_of_diffusers(qwen_pipe, request, **call_of(request), **SIZE)) <= 1e-4
    assert relative_error(image, images_of(runtime, [ask(0)])[0]) > 1e-3


@pytest.mark.parametrize("change", [{"prompt": "a nine"}, {"negative_prompt": "a four"}, {"guidance_scale": 2.0}])
def test_what_a_request_asks_for_shows_in_its_image(runtime: Runtime, change: dict[str, Any]) -> None:
    asked, other = images_of(runtime, [ask(0), ask(0, **change)])
    assert relative_error(other, asked) > 1e-3


def test_an_image_need_not_be_square_and_guidance_is_the_pipelines_own(qwen_pipe: Any) -> None:
    size: dict[str, Any] = {"height": 16, "width": 48}
    request = ask(1, guidance_scale=None)
    (image,) = images_of(Runtime(qwen_pipe, max_batch=1, **size), [request])
    assert relative_error(image, image_of_diffusers(qwen_pipe, request, negative_prompt=" ", **size)) <= 1e-4


def test_the_transformer_part_by_part_is_the_transformer(qwen_pipe: Any) -> None:
    model, generator = qwen_pipe.transformer, torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 6, 16, generator=generator), torch.randn(2, 5, WIDTH, generator=generator)
    mask, timestep = torch.tensor([[True] * 5, [True, True, False, False, False]]), torch.tensor([0.9, 0.2])
    rotary = qwen_image.rotations(model, 2, 3, 5, torch.device("cpu"))
    expected = model(
        sample, encoder_hidden_states=text, encoder_hidden_states_mask=mask, timestep=timestep,
        img_shapes=[[(1, 2, 3)]] * 2, return_dict=False,
    )[0]  # fmt: skip
    assert torch.equal(qwen_image.forward(model, rotary, sample, timestep, text, mask), expected)


def test_bfloat16_errs_no_more_than_twice_as_diffusers_does(qwen_pipe: Any) -> None:
    calls = [call_of(request) for request in mixed()]
    assert_half_precision_errs_no_more_than_twice_diffusers(qwen_pipe, mixed(), calls, **SIZE)


def test_embeddings_stand_for_their_prompt_and_nothing_of_the_pipeline_changes(
    qwen_pipe: Any, runtime: Runtime
) -> None:
    positive, negative = (qwen_pipe.encode_prompt(text)[0][0] for text in ("a one", "a handwritten two"))
    assert len(positive) < len(negative)
    before = digest(runtime.family)
    as_tensors = ask(0, prompt=None, prompt_embeds=positive, negative_prompt=None, negative_prompt_embeds=negative)
    as_text = ask(0, prompt="a one", negative_prompt="a handwritten two")
    text, tensors = images_of(runtime, [as_text, as_tensors])
    assert digest(runtime.family) == before
    torch.testing.assert_close(text, tensors)


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


def test_latents_are_packed_in_the_pipelines_dtype(qwen_pipe: Any, runtime: Runtime) -> None:
    noise = torch.randn(1, 16, 16)
    (result,) = runtime.generate([ask(0, latents=noise[0])])
    expected = qwen_pipe(
        ask(0).prompt, num_inference_steps=STEPS, latents=noise, output_type="latent", **call_of(ask(0)), **SIZE
    ).images[0]  # fmt: skip
    assert (result.latents.shape, result.latents.dtype) == (expected.shape, expected.dtype)
    assert relative_error(result.latents, expected) <= 1e-4


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"guidance_rescale": 0.5}, ValueError, "expected no guidance_rescale: QwenImagePipeline takes none"),
        ({"prompt": None, "class_label": 3}, ValueError, "expected a prompt or prompt_embeds, got class_label"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(600, 32)},
            PlanMismatch,
            r"prompt_embeds: expected shape \(512, 32\), got \(600, 32\)",
        ),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(7, 31)},
            PlanMismatch,
            r"prompt_embeds: expected shape \(7, 32\), got \(7, 31\)",
        ),
        (
            {"prompt": None, "prompt_embeds": torch.full((7, 32), torch.nan)},
            ValueError,
            "prompt_embeds: expected finite values, got NaN",
        ),
    ],
)
def test_what_it_cannot_serve_raises_before_any_model_work(
    qwen_pipe: Any, runtime: Runtime, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    called: list[Any] = []
    parts = (qwen_pipe.transformer.transformer_blocks[0], qwen_pipe.text_encoder)
    hooks = [part.register_forward_pre_hook(lambda *_: called.append(_)) for part in parts]
    try:
        with pytest.raises(error, match=message):
            runtime.generate([ask(0), ask(1, **fields)])
    finally:
        for hook in hooks:
            hook.remove()
    assert not called


def test_sizes_and_models_that_do_not_fit_are_refused(qwen_pipe: Any) -> None:
    with pytest.raises(PlanMismatch, match="divisible by 8, got 32 x 36; 32 x 32 would do"):
        family_of(qwen_pipe, height=32, width=36)
    other = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6), zero_cond_t=True,
    )  # fmt: skip
    edit = diffusers.QwenImagePipeline(**{**qwen_pipe.components, "transformer": other})
    with pytest.raises(PlanMismatch, match="got one with zero_cond_t"):
        family_of(edit)
