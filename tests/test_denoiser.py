"""Guidance."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg
from torch import Tensor

from fastdiff.denoiser import guide, guide_pairs, paired, rescale


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


def test_guidance_as_two_calls_is_one_call_at_twice_the_batch() -> None:
    """The protocol allows both: two calls hold the activations of n samples at a time, one launches half as much."""

    def model(sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return torch.sin(sample * text[:, :, None, None]) + timestep.view(-1, 1, 1, 1) / 1000

    def one_call(sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor) -> Tensor:
        sample, timestep, pairs = paired(sample, timestep, conditioning)
        assert len(sample) == len(timestep) == len(pairs["text"]) == 6
        return guide_pairs(model(sample, timestep, pairs["text"]), guidance)

    def two_calls(sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor) -> Tensor:
        unconditional, conditional = (model(sample, timestep, text) for text in conditioning["text"].unbind(1))
        return guide(unconditional, conditional, guidance)

    sample, text, timestep = torch.randn(3, 4, 5, 6), torch.randn(3, 2, 4), torch.tensor([900.0, 500.0, 3.0])
    inputs = (sample, timestep, {"text": text}, torch.tensor([3.0, 1.0, 0.5]))
    torch.testing.assert_close(two_calls(*inputs), one_call(*inputs))
    assert not torch.allclose(two_calls(*inputs), two_calls(sample, timestep, {"text": text.flip(1)}, inputs[3]))
