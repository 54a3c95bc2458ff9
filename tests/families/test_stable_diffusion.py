"""Stable Diffusion: the trained pipeline encoded, called and decoded part by part, and in bfloat16 over many seeds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import Request, Runtime
from fastdiff.families import family_of
from fastdiff.stages import scheduler_of
from tests.families.tiny import images_of


def test_encode_is_the_pipelines_own_unconditional_then_conditional(pipe: Any) -> None:
    family = family_of(pipe)
    positive, negative = pipe.encode_prompt("a handwritten six", "cpu", 1, True, "a handwritten one")
    encoded = family.encode(Request(prompt="a handwritten six", negative_prompt="a handwritten one"))
    assert torch.equal(encoded["prompt_embeds"], torch.cat([negative, positive]))
    alone = family.encode(Request(prompt="a handwritten six", guidance_scale=1.0))["prompt_embeds"]
    assert torch.equal(alone, torch.cat([positive, positive]))


def test_the_denoiser_is_the_unet_with_guidance(pipe: Any) -> None:
    family = family_of(pipe)
    sample = torch.randn(3, *family.latent_shape)
    timestep, guidance = torch.tensor([900.0, 500.0, 3.0]), torch.tensor([4.0, 1.0, 2.0])
    words = ("one", "two", "three")
    embeds = torch.stack([family.encode(Request(prompt=f"a handwritten {word}"))["prompt_embeds"] for word in words])
    with torch.no_grad():
        output = family.denoiser(sample, timestep, {"prompt_embeds": embeds}, guidance)
        for i in range(3):
            inputs = torch.cat([sample[i : i + 1]] * 2)
            own = pipe.unet(inputs, timestep[i].long(), encoder_hidden_states=embeds[i], return_dict=False)[0]
            expected = own[0] + guidance[i] * (own[1] - own[0])
            torch.testing.assert_close(output[i], expected, rtol=1e-4, atol=1e-5)


def test_decode_is_the_pipelines_own(pipe: Any) -> None:
    family = family_of(pipe)
    sample = torch.randn(family.latent_shape)
    with torch.no_grad():
        image = pipe.vae.decode(sample[None] / pipe.vae.config.scaling_factor, return_dict=False)[0]
        assert torch.equal(family.decode(sample), pipe.image_processor.postprocess(image, output_type="pt")[0])


@pytest.mark.parametrize("scheduler", ["UniPCMultistep", "EulerAncestral"])
def test_bfloat16_errs_no_more_than_diffusers_does(pipe: Any, scheduler: str) -> None:
    """Mean error over 16 seeds against the float32 pipeline's images: at most 1.05 times diffusers' own."""
    half = copy.deepcopy(pipe).to(torch.bfloat16)
    seeds, steps = range(16), 10
    prompts = [f"a handwritten {word}" for word in ("two", "five", "eight", "nine")] * 4

    def of_diffusers(own: Any) -> Tensor:
        kept = own.scheduler
        try:
            own.scheduler = copy.deepcopy(scheduler_of(kept, scheduler))
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            return own(prompts, num_inference_steps=steps, generator=generators, output_type="pt").images.float()  # type: ignore[no-any-return]
        finally:
            own.scheduler = kept

    reference = of_diffusers(pipe)
    requests = [
        Request(prompt=prompt, steps=steps, seed=seed, scheduler=scheduler)
        for seed, prompt in zip(seeds, prompts, strict=True)
    ]
    ours = torch.stack(images_of(Runtime(half, max_batch=16, certify=False), requests))
    assert (ours - reference).abs().mean() <= 1.05 * (of_diffusers(half) - reference).abs().mean()
