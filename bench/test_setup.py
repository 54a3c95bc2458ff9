"""What a request costs before its first row: its table, its lease or handle of a scheduler, its copy into a slot."""

from __future__ import annotations

from typing import Any, Literal

import diffusers
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import fastdiff
from fastdiff.noise import normal, seeded
from fastdiff.plan import CapturePlan
from fastdiff.slots import Slots
from fastdiff.state import RequestState
from tests import oracle

torch.set_num_threads(1)  # nothing here is large enough to share

STEPS = 20
SAMPLERS: dict[str, dict[str, Any]] = {"Euler": {}, "DDIM": {}, "UniPCMultistep": {}, "PNDM": {"skip_prk_steps": True}}
"""Of one, one, four and six latents."""


@pytest.fixture(params=SAMPLERS)
def scheduler(request: pytest.FixtureRequest) -> Any:
    name = f"{request.param}DiscreteScheduler" if request.param == "Euler" else f"{request.param}Scheduler"
    return getattr(diffusers, name)(**SAMPLERS[request.param])


@pytest.mark.benchmark(group="tabulate, cold")
def test_tabulate_cold(benchmark: BenchmarkFixture, scheduler: Any) -> None:
    benchmark.pedantic(fastdiff.tabulate, (scheduler, STEPS), setup=fastdiff.table_cache.clear, rounds=20)  # type: ignore[no-untyped-call]


@pytest.mark.benchmark(group="tabulate, cached")
def test_tabulate_cached(benchmark: BenchmarkFixture, scheduler: Any) -> None:
    assert benchmark(fastdiff.tabulate, scheduler, STEPS) is fastdiff.tabulate(scheduler, STEPS)


@pytest.mark.benchmark(group="acquire and release")
@pytest.mark.parametrize("ownership", ["shared", "cloned", "tensorized"])
def test_acquire(benchmark: BenchmarkFixture, ownership: Literal["shared", "cloned", "tensorized"]) -> None:
    template = diffusers.UniPCMultistepScheduler()

    def lease() -> str:
        if ownership == "shared":
            held = fastdiff.acquire(template, "reuse")
        else:
            held = fastdiff.acquire(template, "isolate", isolated=ownership)
        held.release()
        return held.ownership

    assert benchmark(lease) == ownership


@pytest.mark.benchmark(group="Slots.load, 4x64x64")
def test_load(benchmark: BenchmarkFixture, scheduler: Any) -> None:
    plan = CapturePlan(latent_shape=(4, 64, 64), dtype=torch.float32, batch_sizes=(1,))
    slots = Slots(plan, "cuda" if torch.cuda.is_available() else "cpu")
    table = fastdiff.tabulate(scheduler, STEPS)
    latents = table.init(normal(seeded(0), plan.latent_shape, torch.float32, slots.device))
    state = RequestState(request=None, table=table, latents=latents)

    def load() -> None:
        slots.load(0, state)
        if slots.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark(load)
    assert torch.equal(slots.read(0, table.memory), latents)


@pytest.mark.benchmark(group="for_request")
@pytest.mark.parametrize("when", ["before a run", "in mid-run"])
@pytest.mark.parametrize("name", oracle.AFFINE)
def test_for_request(benchmark: BenchmarkFixture, name: str, when: str) -> None:
    cell = oracle.short_cells(name)[0]
    handle = fastdiff.table_scheduler(cell.build(), strict=True)
    timesteps, _ = oracle.prepare(cell, handle)
    if when == "in mid-run":
        sample = torch.zeros(1, 4, 8, 8)
        for timestep in timesteps[: (len(timesteps) + 1) // 2]:
            if hasattr(handle, "scale_model_input"):
                handle.scale_model_input(sample, timestep)
            handle.step(sample, timestep, sample, **cell.arguments()[1])
        assert handle.stats.hits
    assert benchmark(handle.for_request).stats == (0, 0)
