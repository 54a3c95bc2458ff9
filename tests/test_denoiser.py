"""Guidance."""

from __future__ import annotations

import torch

from fastdiff.denoiser import guide


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
