"""DiT: encoded, called and decoded as its own pipeline does, classes and samplers mixed in one batch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import PlanMismatch, Request, Runtime
from fastdiff.families import family_of
from tests.families import tiny_pipelines
from tests.families.tiny_pipelines import PIPELINES

STEPS = 6
TINY = PIPELINES["DiTPipeline"]
SAMPLERS = TINY.samplers


@pytest.fixture(scope="module", params=[4, 8], ids=["plain", "learned-variance"])
def dit(request: pytest.FixtureRequest) -> Any:
    """A pipeline whose transformer puts out the noise alone, and one that puts out its variance too."""
    return replace(TINY, build=partial(tiny_pipelines.dit, out_channels=request.param))()


def images_of_diffusers(pipe: Any, sampler: str, labels: list[int], guidance_scale: float) -> Tensor:
    """One image per class, the n-th from seed n. The pipeline has its own scheduler back afterwards."""
    own, generators = pipe.scheduler, [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
    pipe.scheduler = type(SAMPLERS[sampler]).from_config(own.config)
    try:
        images: Tensor = pipe(labels, guidance_scale, generators, STEPS, output_type="pt").images
    finally:
        pipe.scheduler = own
    return images


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_are_those_of_the_pipeline(dit: Any, sampler: str, guidance_scale: float) -> None:
    labels = [879, 2, 404]
    expected = images_of_diffusers(dit, sampler, labels, guidance_scale)
    requests = [
        Request(class_label=label, steps=STEPS, seed=seed, scheduler=sampler, guidance_scale=guidance_scale)
        for seed, label in enumerate(labels)
    ]
    for image, result in zip(expected, Runtime(dit, max_batch=3).generate(requests), strict=True):
        assert result.image is not None
        torch.testing.assert_close(result.image, image, rtol=1e-4, atol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 0.01


def test_samplers_guidance_and_classes_mix_in_one_batch(dit: Any) -> None:
    asked = [("DDIM", 1.0, 7), ("DPMSolverMultistep", 4.0, 8), ("DDIM", 2.0, 9)]
    requests = [
        Request(class_label=label, steps=STEPS, scheduler=sampler, guidance_scale=guidance_scale)
        for sampler, guidance_scale, label in asked
    ]
    for own, result in zip(asked, Runtime(dit, max_batch=3).generate(requests), strict=True):
        sampler, guidance_scale, label = own
        assert result.image is not None
        expected = images_of_diffusers(dit, sampler, [label], guidance_scale)[0]
        torch.testing.assert_close(result.image, expected, rtol=1e-4, atol=1e-4)


def test_encode_is_the_null_class_then_the_requests(dit: Any) -> None:
    family = family_of(dit)
    for label in (879, "umbrella"):
        assert family.encode(Request(class_label=label))["class_labels"].tolist() == [1000, 879]
    assert family.encode(Request(class_label="white shark", guidance_scale=1.0))["class_labels"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_label": 1000}, "class_label: expected 0 to 999, or one of pipe.labels, got 1000"),
        ({"class_label": -1}, "class_label: expected 0 to 999"),
        ({"class_label": "shark"}, "class_label: expected one of the 3 pipe.labels, got 'shark'"),
        ({"prompt": "a shark"}, "expected a class_label alone, got prompt"),
        ({"class_label": 3, "negative_prompt": "a shark"}, "expected a class_label alone, got negative_prompt"),
        ({"class_label": 3, "latents": torch.full((4, 8, 8), torch.nan)}, "latents: expected finite values"),
    ],
)
def test_what_it_cannot_serve_raises_before_any_model_work(dit: Any, fields: dict[str, Any], message: str) -> None:
    runtime = Runtime(dit, max_batch=1)
    called: list[Any] = []
    hook = dit.transformer.register_forward_pre_hook(lambda *_: called.append(_))
    try:
        with pytest.raises(ValueError, match=message):
            runtime.generate([Request(class_label=0), Request(**fields)])
    finally:
        hook.remove()
    assert not called


def test_a_size_or_latents_of_another_shape_are_refused(dit: Any) -> None:
    with pytest.raises(PlanMismatch, match="expected a height and width of 16, DiT's own, got 32 x None"):
        family_of(dit, height=32)
    with pytest.raises(PlanMismatch, match=r"latents: expected shape \(4, 8, 8\), got \(4, 8\)"):
        family_of(dit).check(Request(class_label=0, latents=torch.zeros(4, 8)))


def test_a_pipeline_of_text_refuses_a_class(pipe: Any) -> None:
    with pytest.raises(ValueError, match="expected a prompt or prompt_embeds, got class_label"):
        family_of(pipe).check(Request(class_label=3))
