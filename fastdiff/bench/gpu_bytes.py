"""The cells of `bench gpu` that count bytes: of captured graphs by batch size, of a scheduler by its ownership."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from fastdiff.bench.gpu_arms import Entry
from fastdiff.bench.gpu_settings import Settings
from fastdiff.bench.gpu_suite import CellCase
from fastdiff.bench.loop import OWNERS, Loop, cloned_deepcopy
from fastdiff.bench.rows import null_model
from fastdiff.bench.suite import MemoryCase
from fastdiff.bench.vram import device_bytes, settle_device
from fastdiff.capture import StepGraphs, Steps, step_function
from fastdiff.plan import CapturePlan
from fastdiff.probe import tabulate
from fastdiff.slots import Slots
from fastdiff.stages import scheduler_class
from fastdiff.state import RequestState
from fastdiff.step import denoise_step


def graph_memory(settings: Settings, case: CellCase) -> Iterator[Entry]:
    """VRAM from load to release, and what each batch size's graph adds. Eager kernels: compiling them takes minutes."""
    settings.require_cuda()
    settle_device(settings.device)
    yield _phase(settings, "nothing")
    own = settings.geometry(case)
    plan = replace(own.plan, compile="none")
    settle_device(settings.device)
    yield _phase(settings, "model loaded")
    slots = Slots(plan, settings.device, planar=True)
    yield _phase(settings, "slots")
    eager = Steps(own.denoiser, slots, "eager")
    for _ in range(2):
        eager(plan.max_batch)
    yield _phase(settings, "warm-up: eager rows of the largest batch")
    del eager
    largest = StepGraphs(settings.device, unroll=1)
    largest.capture(plan.max_batch, step_function(own.denoiser, slots.batch(plan.max_batch).with_views()))
    largest_bytes = largest.pool_bytes
    largest.close()
    del largest
    settle_device(settings.device)
    yield _phase(settings, "the largest batch captured alone, and released")
    steps = Steps(own.denoiser, slots, "step-graph", own.model)
    assert steps.graphs is not None  # a graph mode has them from its constructor on
    yield _phase(settings, "all batches captured")
    yield {
        "kind": "graphs",
        "model": own.name,
        "largest_alone_bytes": largest_bytes,
        "pool_bytes": steps.graphs.pool_bytes,
        "state_bytes": slots.nbytes,
        "sizes": {str(n): asdict(built) for (_, n), built in sorted(steps.built.items())},
    }
    for n in plan.batch_sizes * 20:
        steps(n)
    yield _phase(settings, "steady: 20 replays of every size")
    steps.close()
    del steps, slots
    settle_device(settings.device)
    yield _phase(settings, "graphs and slots released")


def _phase(settings: Settings, name: str) -> Entry:
    """Bytes at this point, and torch's peak since the last."""
    held = device_bytes(settings.device)
    return {
        "kind": "phase",
        "phase": name,
        "allocated_bytes": held.allocated_bytes,
        "peak_allocated_bytes": held.allocated_peak_bytes,
        "reserved_bytes": held.reserved_bytes,
        "driver_bytes": held.used_bytes,
    }


def ownership_memory(settings: Settings, case: CellCase) -> Iterator[Entry]:
    """Device bytes that each ownership of a scheduler holds before, during and after a request, by torch's allocator.

    bfloat16 latents. A sample is its caller's and not counted; in a slot it is a part of the slot, and counted.
    """
    settings.require_cuda()
    for one in settings.suite.ownership:
        for sampler in one.samplers:
            _scheduler_held(settings, sampler, cloned_deepcopy, one)  # libraries take workspaces
            for ownership, owner in OWNERS.items():
                held = _scheduler_held(settings, sampler, owner, one)
                yield {"kind": "ownership", "shape": one.name, "sampler": sampler, "ownership": ownership, **held}
            held = _slot_held(settings, sampler, one)
            yield {"kind": "ownership", "shape": one.name, "sampler": sampler, "ownership": "tensorized", **held}


def _allocated(device: torch.device) -> int:
    """By torch's allocator, without what cuBLAS took: UniPC solves a system by it, and it keeps its workspace."""
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated(device)


def _scheduler_held(settings: Settings, sampler: str, owner: Callable[[Any], Any], of: MemoryCase) -> Entry:
    bytes_now = partial(_allocated, settings.device)
    template = scheduler_class(sampler)()
    settle_device(settings.device)
    nothing = bytes_now()
    loop = Loop(owner(template), settings.device, num_inference_steps=of.steps)
    before, during = bytes_now() - nothing, 0
    loop.begin(torch.randn(1, *of.latent_shape, device=settings.device, dtype=torch.bfloat16))
    sample_bytes = bytes_now() - nothing - before
    while loop.unfinished:
        loop.advance(torch.randn_like(loop.model_input()))  # a tensor of its own, as a model's
        during = max(during, bytes_now() - nothing - sample_bytes)
    del loop
    gc.collect()
    return {"before_bytes": before, "during_bytes": during, "after_bytes": bytes_now() - nothing}


def _slot_held(settings: Settings, sampler: str, of: MemoryCase) -> Entry:
    bytes_now = partial(_allocated, settings.device)
    table = tabulate(scheduler_class(sampler)(), of.steps)
    plan = CapturePlan(
        latent_shape=of.latent_shape, dtype=torch.bfloat16, batch_sizes=(1,), memory=table.memory, rows=len(table),
        draws=table.max_draws,
    )  # fmt: skip
    settle_device(settings.device)
    nothing = bytes_now()
    slots = Slots(plan, settings.device)
    before, during = bytes_now() - nothing, 0
    sample = torch.randn(*of.latent_shape, device=settings.device, dtype=torch.bfloat16)
    slots.load(0, RequestState(request=None, table=table, latents=table.init(sample * table.init_noise_sigma)))
    del sample
    for _ in range(len(table)):
        denoise_step(null_model, slots.batch(1))
        during = max(during, bytes_now() - nothing)
    slots.park(0)
    return {"before_bytes": before, "during_bytes": during, "after_bytes": bytes_now() - nothing}
