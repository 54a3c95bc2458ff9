"""Stable Diffusion 3: schedules that are shifted by size, and texts without T5."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest

from fastdiff import Request, Runtime
from tests.families.tiny import image_of_diffusers, images_of, relative_error
from tests.families.tiny_pipelines import shared


@pytest.fixture(scope="module")
def sd3() -> Any:
    return shared("StableDiffusion3Pipeline")


def ask(**fields: Any) -> Request:
    return Request(prompt="a handwritten one", steps=4, **fields)


def test_a_schedule_is_shifted_by_the_size_where_its_sampler_says_so(sd3: Any) -> None:
    shifted = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    size: dict[str, Any] = {"height": 16, "width": 48}
    asked = [ask(scheduler=shifted), ask()]
    for image, request in zip(images_of(Runtime(sd3, max_batch=2, **size), asked), asked, strict=True):
        assert relative_error(image, image_of_diffusers(sd3, request, **size)) <= 1e-4


def test_a_pipeline_without_t5_is_served_as_it_serves_itself(sd3: Any) -> None:
    without = diffusers.StableDiffusion3Pipeline(**{**sd3.components, "text_encoder_3": None, "tokenizer_3": None})
    without.set_progress_bar_config(disable=True)
    (image,) = images_of(Runtime(without, max_batch=1), [ask()])
    assert relative_error(image, image_of_diffusers(without, ask())) <= 1e-4
