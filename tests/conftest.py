"""Fixtures that many tests share: the shipped pipeline, a runtime over it, samplers and a model for bare steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.capture import Steps
from fastdiff.state import RequestState
from fastdiff.table import StepTable

torch.set_num_threads(1)  # two cores, shared: threads that wait for each other only add noise


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of CUDA are skipped, and say so, where torch finds no device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))


SAMPLERS: dict[str, dict[str, Any]] = {
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "DDIMScheduler": {"clip_sample": True},
    "HeunDiscreteScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
}
"""The oracle's short list: every kind of row at once (memory, noise, clipping, repeated timesteps)."""

LATENT_SHAPE = (2, 3, 5)


def table(name: str, steps: int = 5, **options: Any) -> StepTable:
    """The table of one diffusers class by name."""
    scheduler = getattr(diffusers, name)(**SAMPLERS.get(name, {}))
    return fastdiff.tabulate(scheduler, steps, **options)


def random_state(own: StepTable, seed: int) -> RequestState:
    """A prepared state of LATENT_SHAPE with random latents and a generator."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(LATENT_SHAPE, generator=generator)
    return RequestState(request=None, table=own, generator=generator, latents=own.init(sample * own.init_noise_sigma))


def toy_model(sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor) -> Tensor:
    """A denoiser without weights: smooth, per sample, dependent on everything that it is given."""
    scale = (timestep / 1000 + 0.1 * guidance).view(-1, *[1] * (sample.ndim - 1))
    return torch.sin(sample.float()) * scale + 0.1 * torch.tanh(sample.float())


class Unrolled(Steps):
    """What a loop graph does, uncaptured: the eager step, `unroll` times a call."""

    def __init__(self, runtime: fastdiff.Runtime) -> None:
        super().__init__(runtime.family.denoisers, runtime.slots)
        self.rows_per_call = runtime.plan.unroll

    def __call__(self, count: int, segment: int = 0) -> None:
        """Advance `unroll` rows."""
        for _ in range(self.rows_per_call):
            super().__call__(count, segment)


@pytest.fixture(scope="session")
def pipe() -> Any:
    """The shipped digits pipeline; tests must leave it as it is."""
    return fastdiff.models.digits()


@pytest.fixture(scope="session")
def runtime(pipe: Any) -> fastdiff.Runtime:
    """An eager runtime with room for every sampler."""
    return fastdiff.Runtime(pipe, max_batch=4, memory=6)
