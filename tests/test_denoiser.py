"""Guidance."""

from __future__ import annotations

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

from fastdiff.denoiser import guide, rescale


def test_guidance_is_diffusers_formula_per_sample() -> None:
    unconditional, conditional = torch.randn(2, 3, 4, 5, 6).unbind(0)
    guided = guide(unconditional, conditional, torch.tensor([2.0, 1.0, 0.0]))
    assert torch.equal(guided[0], unconditional[0] + 2.0 * (conditional[0] - unconditional[0]))
    assert torch.equal(guided[1], conditional[1])
    assert torch.equal(guided[2], unconditional[2])


def test_scale_one_never_reads_the_unconditional_output() -> None:
    conditional = torch.randn(1, 2, 3, 4)
    assert torch.equal(guide(torch.full_like(conditional, float("nan")), conditional, torch.ones(1)), conditional)


def test_guidance_is_computed_in_float32() -> None:
    halves = torch.randn(2, 1, 2, 2, 2, dtype=torch.bfloat16)
    assert guide(halves[0], halves[1], torch.tensor([3.0])).dtype == torch.float32


def test_rescale_is_diffusers_formula_per_sample() -> None:
    guided, conditional = torch.randn(2, 3, 4, 5, 6).mul(torch.tensor([3.0, 1.0]).view(2, 1, 1, 1, 1)).unbind(0)
    rescaled = rescale(guided, conditional, torch.tensor([0.0, 0.7, 1.0]))
    assert torch.equal(rescaled[0], guided[0])
    for i, phi in ((1, 0.7), (2, 1.0)):
        expected = rescale_noise_cfg(guided[i : i + 1], conditional[i : i + 1], guidance_rescale=phi)[0]
        torch.testing.assert_close(rescaled[i], expected)


def test_without_rescale_a_constant_output_stays_as_it_is() -> None:
    constant = torch.ones(1, 2, 3, 4)
    assert torch.equal(rescale(constant, torch.randn(1, 2, 3, 4), torch.zeros(1)), constant)
