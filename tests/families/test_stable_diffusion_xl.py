"""Stable Diffusion XL: guidance rescale, and embeddings without their negative."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdiff import Request, Runtime
from tests.families.tiny import image_of_diffusers, images_of, no_model_work, relative_error
from tests.families.tiny_pipelines import shared


@pytest.fixture(scope="module")
def sdxl() -> Any:
    return shared("StableDiffusionXLPipeline")


@pytest.fixture(scope="module")
def runtime(sdxl: Any) -> Runtime:
    return Runtime(sdxl, max_batch=3)


def ask(**fields: Any) -> Request:
    return Request(**{"prompt": "a handwritten one", "steps": 5, **fields})


def test_guidance_is_rescaled_per_request(sdxl: Any, runtime: Runtime) -> None:
    asked = [ask(guidance_rescale=0.7), ask(), ask(guidance_rescale=1.0, guidance_scale=1.0)]
    images = images_of(runtime, asked)
    for image, request in zip(images, asked, strict=True):
        assert relative_error(image, image_of_diffusers(sdxl, request)) <= 1e-4
    assert relative_error(images[0], images[1]) > 1e-3


def test_embeddings_without_a_negative_are_guided_away_from_zeros(sdxl: Any, runtime: Runtime) -> None:
    positive, _, pooled, _ = sdxl.encode_prompt("a one")
    request = ask(prompt=None, prompt_embeds=positive[0], pooled_prompt_embeds=pooled[0])
    (image,) = images_of(runtime, [request])
    assert relative_error(image, image_of_diffusers(sdxl, request)) <= 1e-4


def test_negative_embeddings_need_their_pooled_one(sdxl: Any, runtime: Runtime) -> None:
    message = "negative_prompt_embeds need negative_pooled_prompt_embeds beside them"
    with no_model_work(sdxl), pytest.raises(ValueError, match=message):
        runtime.generate([ask(), ask(negative_prompt_embeds=torch.zeros(16, 64))])
