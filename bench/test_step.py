"""A row of eight mixed samplers around a model that costs nothing, in each mode."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import fastdiff
from fastdiff.bench.rows import null_model
from fastdiff.capture import GRAPH_MODES, Mode, Steps
from fastdiff.noise import normal, seeded
from fastdiff.plan import CapturePlan
from fastdiff.slots import Slots
from fastdiff.stages import scheduler_class
from fastdiff.state import RequestState

torch.set_num_threads(1)  # nothing here is large enough to share

SAMPLERS = (
    "Euler", "EulerAncestral", "DPMSolverMultistep", "UniPCMultistep", "DDIM", "Heun", "FlowMatchEuler",
    "DEISMultistep",
)  # fmt: skip
N = len(SAMPLERS)
UNROLL = 4
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")


@pytest.mark.benchmark(group=f"denoise_step, 4x64x64, batch {N}")
@pytest.mark.parametrize(
    "mode",
    [
        "eager",
        pytest.param("compiled", marks=pytest.mark.compiles),
        pytest.param("step-graph", marks=NEEDS_CUDA),
        pytest.param("loop-graph", marks=NEEDS_CUDA, id=f"loop-graph of {UNROLL} rows"),
    ],
)
def test_denoise_step(benchmark: BenchmarkFixture, mode: Mode) -> None:
    unroll = UNROLL if mode == "loop-graph" else 1
    plan = CapturePlan(latent_shape=(4, 64, 64), dtype=torch.float32, batch_sizes=(N,), unroll=unroll)
    slots = Slots(plan, "cuda" if torch.cuda.is_available() else "cpu", planar=mode != "eager")
    steps = Steps(null_model, slots, mode)
    for slot, sampler in enumerate(SAMPLERS):
        table = fastdiff.tabulate(scheduler_class(sampler)(), 20)
        latents = table.init(normal(seeded(slot), plan.latent_shape, torch.float32, slots.device))
        slots.load(slot, RequestState(request=None, table=table, latents=latents))

    def step() -> None:  # after the last row too: it costs the same
        steps(N)
        if slots.device.type == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad():
        benchmark(step)
    assert (steps.graphs is not None) == (mode in GRAPH_MODES)
    assert slots.batch(N).row.min() > 0
