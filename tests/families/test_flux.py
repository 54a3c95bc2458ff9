"""Flux: guidance as an input of the model, any number of it or none, and sigmas of its own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import diffusers
import pytest
import torch

from fastdiff import PlanMismatch, Request, Runtime
from tests.families import tiny_pipelines
from tests.families.tiny import image_of_diffusers, images_of, no_model_work, relative_error
from tests.families.tiny_pipelines import IMAGE, PIPELINES, shared


@pytest.fixture(scope="module")
def flux() -> Any:
    return shared("FluxPipeline")


@pytest.fixture(scope="module")
def runtime(flux: Any) -> Runtime:
    return Runtime(flux, max_batch=3, **IMAGE)


def ask(**fields: Any) -> Request:
    return Request(**{"prompt": "a handwritten one", "steps": 4, **fields})


def test_guidance_has_no_off_and_sigmas_may_be_given(flux: Any, runtime: Runtime) -> None:
    asked = [ask(guidance_scale=0.5), ask(guidance_scale=9.0), ask(steps=None, sigmas=[1.0, 0.6, 0.3])]
    for image, request in zip(images_of(runtime, asked), asked, strict=True):
        assert relative_error(image, image_of_diffusers(flux, request, **IMAGE)) <= 1e-4


def test_sigmas_are_refused_where_the_scheduler_makes_its_own(runtime: Runtime) -> None:
    """As the pipeline drops them without a word."""
    own = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="sigmas: expected none, as a scheduler with use_flow_sigmas makes its own"):
        runtime.generate([ask(steps=None, sigmas=[1.0, 0.6, 0.3], scheduler=own)])
    assert runtime.supports(ask(scheduler=own)) is None


def test_a_model_without_guidance_has_none() -> None:
    schnell = replace(PIPELINES["FluxPipeline"], build=partial(tiny_pipelines.flux, guidance_embeds=False))()
    schnell.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    one, other = images_of(Runtime(schnell, max_batch=2, **IMAGE), [ask(), ask(guidance_scale=9.0)])
    assert torch.equal(one, other)
    assert relative_error(one, image_of_diffusers(schnell, ask(), **IMAGE)) <= 1e-4


def test_a_second_call_a_row_and_a_sampler_that_is_not_of_flow_are_refused_before_any_model_work(
    flux: Any, runtime: Runtime
) -> None:
    with no_model_work(flux), pytest.raises(PlanMismatch, match="negative_prompt_embeds: expected none, one call"):
        runtime.generate([ask(), ask(negative_prompt_embeds=torch.zeros(512, 32))])
    with no_model_work(flux), pytest.raises(TypeError, match="DDIMScheduler"):
        runtime.generate([ask(), ask(scheduler=diffusers.DDIMScheduler())])
