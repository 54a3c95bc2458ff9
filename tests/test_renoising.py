"""Few-step sampling: re-noised tables against diffusers' own x0 and noise."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch

import fastdiff
from fastdiff.errors import NotLinear
from tests.test_probe import randn, snapshot

TIMES = [1000.0, 757.0, 522.0]


def test_renoise_is_the_dmd_loop_over_flow_matching() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0)
    before = snapshot(scheduler)
    table = fastdiff.renoise(scheduler, TIMES)
    assert snapshot(scheduler) == before
    assert (len(table), table.memory, table.draws) == (3, 1, ((None,), (None,), ()))
    assert table.timesteps.tolist() == TIMES

    real = copy.deepcopy(scheduler)
    real.set_timesteps(1000)
    x = randn(0)
    state = table.init(x)
    for row, time in enumerate(TIMES):
        m, eps = randn(10 + row), randn(20 + row)
        nearest = (real.timesteps - time).abs().argmin()
        clean = x - real.sigmas[nearest].double() * m
        assert torch.allclose(table.x0(row, state, m, [eps][: len(table.draws[row])]), clean, rtol=1e-6, atol=1e-6)
        state = table.advance(row, state, m, [eps][: len(table.draws[row])])
        x = clean
        if row + 1 < len(TIMES):
            following = real.timesteps[(real.timesteps - TIMES[row + 1]).abs().argmin()]
            x = real.scale_noise(clean, following[None], eps)
        assert torch.allclose(state[0], x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
        ("DDIMScheduler", {"clip_sample": True}),
        ("LCMScheduler", {}),
    ],
)
def test_renoise_is_x0_then_add_noise(name: str, config: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, name)(**config)
    times = [999.0, 749.0, 499.0, 249.0]
    table = fastdiff.renoise(scheduler, times)

    real = copy.deepcopy(scheduler)
    arguments = {"original_inference_steps": 1000} if name == "LCMScheduler" else {}
    real.set_timesteps(1000, **arguments)
    x = randn(0)
    state = table.init(x)
    for row, time in enumerate(times):
        m, eps = randn(10 + row), randn(20 + row)
        output = real.step(m, int(time), x)
        clean = output.denoised if name == "LCMScheduler" else output.pred_original_sample
        x = clean
        if row + 1 < len(times):
            x = real.add_noise(clean, eps, torch.tensor([int(times[row + 1])]))
        state = table.advance(row, state, m, [eps][: len(table.draws[row])])
        assert torch.allclose(state[0], x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("times", [[], [500.0, 500.0], [100.0, 900.0]])
def test_renoise_wants_falling_timesteps(times: list[float]) -> None:
    with pytest.raises(ValueError, match="timesteps: expected a falling sequence"):
        fastdiff.renoise(diffusers.FlowMatchEulerDiscreteScheduler(), times)


@pytest.mark.parametrize("times", [[float("nan")], [5000.0, 500.0], [999.0, -5.0], [float("inf"), 3.0]])
def test_renoise_wants_timesteps_that_there_are(times: list[float]) -> None:
    with pytest.raises(ValueError, match="timesteps: expected numbers from 0 to 1000, num_train_timesteps"):
        fastdiff.renoise(diffusers.FlowMatchEulerDiscreteScheduler(), times)


def test_renoise_refuses_a_scheduler_without_x0() -> None:
    with pytest.raises(NotLinear, match=r"PNDMScheduler re-noised is not a table: it tells no x0 .*Use instead"):
        fastdiff.renoise(diffusers.PNDMScheduler(), TIMES)


def test_renoise_is_cached() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    assert fastdiff.renoise(scheduler, TIMES) is fastdiff.renoise(scheduler, TIMES)
    assert fastdiff.renoise(scheduler, TIMES[:2]) != fastdiff.renoise(scheduler, TIMES)
