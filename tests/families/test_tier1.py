"""Tier 1: an untouched pipeline of diffusers makes its own images on the drop-in scheduler, and nothing falls back."""

from __future__ import annotations

import copy
import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff import table_scheduler
from tests.families.tiny import relative_error
from tests.families.tiny_pipelines import NOT_LINEAR, NOT_TAKEN, PIPELINES, Refusal

STEPS = 4


@cache
def built(name: str) -> Any:
    return PIPELINES[name]()


def made(name: str, scheduler: Any, seed: int = 0, **changes: Any) -> Tensor:
    """The images or frames of the pipeline's own `__call__`, one, in [0, 1]."""
    pipe = built(name)
    own, pipe.scheduler = pipe.scheduler, scheduler
    try:
        return called(name, seed, **changes)
    finally:
        pipe.scheduler = own


def called(name: str, seed: int = 0, **changes: Any) -> Tensor:
    """The same, of the pipeline as it is."""
    torch.manual_seed(seed)  # Z-Image gives its sampler no generator
    call = {**PIPELINES[name].call, "num_inference_steps": STEPS, **changes}
    output: Tensor = built(name)(**call, generator=torch.Generator().manual_seed(seed), output_type="pt")[0]
    return output


@pytest.mark.parametrize(
    ("name", "sampler"), [(name, sampler) for name in PIPELINES for sampler in PIPELINES[name].samplers]
)
def test_the_images_are_the_pipelines_own(name: str, sampler: str) -> None:
    scheduler = PIPELINES[name].samplers[sampler]
    drop_in = table_scheduler(scheduler)
    expected = made(name, copy.deepcopy(scheduler))
    image = made(name, drop_in)
    assert image.dtype == expected.dtype == torch.float32
    assert relative_error(image, expected) <= 1e-4
    assert drop_in.stats == (len(drop_in.timesteps), 0)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("name", PIPELINES)
def test_accelerated_the_images_are_the_drop_ins(name: str, mode: Any) -> None:
    """Dynamo's own backend compiles nothing: what it traced is run as it is."""
    pipe = built(name)
    expected = made(name, table_scheduler(copy.deepcopy(pipe.scheduler)))
    with fastdiff.accelerated(pipe, mode, _backend="eager") as handle:
        image = called(name)
    assert torch.equal(image, expected) if mode == "eager" else relative_error(image, expected) <= 1e-4
    assert (handle.stats.calls, handle.stats.fallbacks) == (1, 0)
    assert (handle.stats.built > 0) == (mode == "compiled")


@pytest.mark.parametrize("name", PIPELINES)
def test_what_is_asked_for_shows_in_the_image(name: str) -> None:
    """By ten times the tolerance above: an image that is right then says something about how it was made."""
    call, scheduler = PIPELINES[name].call, built(name).scheduler
    text = {"prompt": "a nine"} if "prompt" in call else {"class_labels": [2]}
    guidance = {"true_cfg_scale" if "true_cfg_scale" in call else "guidance_scale": 1.5}
    own = made(name, scheduler)
    for change in (text, guidance, {"num_inference_steps": STEPS - 1}, {"seed": 1}):
        assert relative_error(made(name, scheduler, **change), own) > 1e-3, change


@pytest.mark.parametrize("name", PIPELINES)
def test_a_tiny_pipeline_is_the_same_at_every_call(name: str) -> None:
    """Nothing in it is what the memory happened to hold."""
    pipe, again = built(name), PIPELINES[name]()
    for part, other in zip(pipe.components.values(), again.components.values(), strict=True):
        if isinstance(part, nn.Module):
            theirs = other.state_dict()
            assert all(torch.equal(tensor, theirs[key]) for key, tensor in part.state_dict().items())


def named(refusal: Refusal) -> str:
    return f"{refusal.pipeline}-{refusal.sampler}"


@pytest.mark.parametrize("refusal", NOT_LINEAR, ids=named)
def test_a_sampler_without_a_table_is_refused_and_the_pipeline_runs_with_it(refusal: Refusal) -> None:
    with pytest.raises(refusal.error, match=re.escape(refusal.message)):
        table_scheduler(refusal.scheduler)
    assert made(refusal.pipeline, copy.deepcopy(refusal.scheduler)).isfinite().all()


@pytest.mark.parametrize("refusal", NOT_TAKEN, ids=named)
def test_a_sampler_that_the_pipeline_does_not_take_fails_as_it_does_untouched(refusal: Refusal) -> None:
    for scheduler in (copy.deepcopy(refusal.scheduler), table_scheduler(refusal.scheduler)):
        with pytest.raises(refusal.error, match=re.escape(refusal.message)):
            made(refusal.pipeline, scheduler)
