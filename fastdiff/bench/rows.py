"""The sampler alone, on a null model: diffusers' step() beside the table's row. Times, counts, errors and bytes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdiff
from fastdiff.bench.arms import Workbench
from fastdiff.bench.loop import OWNERS, Loop, cloned_deepcopy, cloned_shallow, set_timesteps
from fastdiff.bench.measure import Block, Sample, Stopwatch
from fastdiff.bench.suite import CountCase, ErrorCase, MemoryCase, RowCase, SetupCase
from fastdiff.bench.vram import CountingDevice, reachable_tensors, storage_bytes
from fastdiff.capture import Mode, Steps
from fastdiff.denoiser import Denoiser
from fastdiff.emulated import on_host
from fastdiff.noise import normal, row_noise, run_noise, seeded
from fastdiff.plan import CapturePlan
from fastdiff.probe import table_cache
from fastdiff.slots import Slots
from fastdiff.state import RequestState
from fastdiff.step import denoise_step
from fastdiff.table import StepTable

PROBES = ("tabulate, cold",)  # of what `setup_blocks` times
NOISE_SEED = 1000  # step noise comes from generators of its own, so that both sides draw alike whatever came before


def null_model(sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor) -> Tensor:
    """A denoiser that costs nothing: the output is the input."""
    return sample


@dataclass(frozen=True)
class TableRows:
    """Slots and the step over them, built once per mode, latent shape and batch."""

    slots: Slots
    steps: Steps


class Counted(NamedTuple):
    """What an emulated device saw of some steps."""

    operations: list[int]  # of each step
    syncs: list[int]  # of each step
    peak_bytes: int  # the most that device tensors took at any time


class RowBench:
    """What row cases share: the workbench's schedulers, and the steps compiled so far."""

    def __init__(self, bench: Workbench, seed: int) -> None:
        self.bench, self.seed = bench, seed
        self._rows: dict[tuple[Mode, tuple[int, ...], int], TableRows] = {}

    def table_rows(self, mode: Mode, latent_shape: tuple[int, ...], batch: int) -> TableRows:
        """The static memory and the step for one kind of case."""
        key = (mode, latent_shape, batch)
        if key not in self._rows:
            plan = CapturePlan(latent_shape=latent_shape, dtype=torch.float32, batch_sizes=(batch,))
            slots = Slots(plan, self.bench.device, planar=mode == "compiled")
            self._rows[key] = TableRows(slots, Steps(null_model, slots, mode))
        return self._rows[key]

    def samplers(self, case: RowCase) -> list[str]:
        """One sampler per request, dealt out in turn."""
        return [case.samplers[i % len(case.samplers)] for i in range(case.batch)]

    def first_noise(self, index: int, latent_shape: tuple[int, ...]) -> Tensor:
        """Standard normal [1, C, H, W] of request `index`."""
        generator = seeded(self.seed + index)
        return normal(generator, latent_shape, torch.float32, self.bench.device)[None]

    def diffusers_rows(self, case: RowCase) -> tuple[Block, list[Tensor]]:
        """`batch` schedulers of diffusers stepped in Python; the list holds a block's last samples [1, C, H, W]."""
        schedulers = [copy.deepcopy(self.bench.template(name)) for name in self.samplers(case)]
        lasts: list[Tensor] = []
        model_call = self._model_call(case)

        def block() -> Sample:
            loops = []
            for index, scheduler in enumerate(schedulers):
                generator = seeded(NOISE_SEED + index)
                loops.append(Loop(scheduler, self.bench.device, generator, num_inference_steps=case.steps))
                loops[index].begin(self.first_noise(index, case.latent_shape))

            def row() -> None:
                for loop in loops:
                    loop.advance(loop.model_input())

            sample = self._timed(case, self.bench.stopwatch(), row, model_call)
            lasts[:] = [loop.sample for loop in loops]
            return sample

        return block, lasts

    def table_block(self, case: RowCase, mode: Mode) -> tuple[Block, list[Tensor]]:
        """The same rows as one step over slots; the noise of stochastic samplers is drawn ahead, in the timed part."""
        rows = self.table_rows(mode, case.latent_shape, case.batch)
        tables = [fastdiff.tabulate(self.bench.template(name), case.steps) for name in self.samplers(case)]
        lasts: list[Tensor] = []
        model_call = self._model_call(case)

        def draw(slot: int, table: StepTable) -> None:
            generator = seeded(NOISE_SEED + slot)
            draws = table.draws[: case.steps]
            noise = run_noise(generator, draws, case.latent_shape, torch.float32, self.bench.device)
            rows.slots.put_noise(slot, 0, noise)

        def block() -> Sample:
            for slot, table in enumerate(tables):
                sample = self.first_noise(slot, case.latent_shape)[0] * table.init_noise_sigma
                rows.slots.load(slot, RequestState(request=None, table=table, latents=table.init(sample)))
            watch = self.bench.stopwatch()
            with watch:
                for slot, table in enumerate(tables):
                    if table.max_draws:
                        draw(slot, table)
            timed = self._timed(case, watch, lambda: rows.steps(case.batch), model_call)
            lasts[:] = [rows.slots.read(slot, 1) for slot in range(case.batch)]
            return timed

        return block, lasts

    def _model_call(self, case: RowCase) -> Callable[[], object] | None:
        if not case.between:
            return None
        family, batch = self.bench.family, case.batch
        sample = torch.zeros(batch, *family.latent_shape, dtype=family.dtype, device=family.device)
        numbers = torch.ones(batch, device=family.device)
        conditioning = {
            name: torch.zeros(batch, *spec.shape, dtype=spec.dtype, device=family.device)
            for name, spec in family.conditioning.items()
        }
        return lambda: family.denoiser(sample, numbers, conditioning, numbers)

    def _timed(
        self, case: RowCase, watch: Stopwatch, row: Callable[[], None], model_call: Callable[[], object] | None
    ) -> Sample:
        """All rows in one go, or each alone after a real model call that is not timed; on top of `watch`."""
        with torch.no_grad():
            if model_call is None:
                with watch:
                    for _ in range(case.steps):
                        row()
            else:
                for _ in range(case.steps):
                    model_call()
                    with watch:
                        row()
        return Sample(watch.seconds, gpu_s=watch.gpu_s)


def setup_blocks(bench: Workbench, sampler: str, case: SetupCase) -> dict[str, Block]:
    """What a request does before its first row, by name; each block is a few calls, its time that of one."""
    template = bench.template(sampler)
    shape = bench.family.latent_shape
    prepared = cloned_shallow(template)
    slots = Slots(CapturePlan(latent_shape=shape, dtype=bench.family.dtype, batch_sizes=(1,)), bench.device)
    table = fastdiff.tabulate(template, case.steps)
    latents = table.init(torch.zeros(shape, device=bench.device))

    def cold() -> None:
        table_cache.clear()
        fastdiff.tabulate(template, case.steps)

    def cached() -> StepTable:
        return fastdiff.tabulate(template, case.steps)

    def load() -> None:
        slots.load(0, RequestState(request=None, table=table, latents=latents))

    def cached_and_load() -> None:
        slots.load(0, RequestState(request=None, table=cached(), latents=latents))

    calls: dict[str, tuple[Callable[[], object], int]] = {
        "deepcopy": (lambda: cloned_deepcopy(template), 5),
        "shallow copy": (lambda: cloned_shallow(template), 20),
        "set_timesteps": (lambda: set_timesteps(prepared, bench.device, num_inference_steps=case.steps), 5),
        "tabulate, cold": (cold, 1),
        "tabulate, cached": (cached, 20),
        "Slots.load": (load, 20),
        "cached table + load": (cached_and_load, 20),
    }

    def block_of(call: Callable[[], object], repeats: int) -> Block:
        def block() -> Sample:
            watch = bench.stopwatch()
            with watch:
                for _ in range(repeats):
                    call()
            return Sample(watch.seconds / repeats)

        return block

    return {name: block_of(call, repeats) for name, (call, repeats) in calls.items()}


def counts(rows: RowBench, case: CountCase) -> Iterator[dict[str, Any]]:
    """Operations and host syncs of each row, per mix and batch; noise draws are not counted on either side."""
    for mix in case.mixes:
        for batch in case.batches:
            one = RowCase(name="count", samplers=mix, latent_shape=case.latent_shape, batch=batch, steps=case.steps)
            counted = count_tables(rows, one)
            yield {
                "samplers": list(mix),
                "batch": batch,
                "diffusers": _count_diffusers(rows, one),
                "fastdiff": {"operations": counted.operations, "syncs": counted.syncs},
            }


def _count_diffusers(rows: RowBench, case: RowCase) -> dict[str, list[int]]:
    device = CountingDevice()
    counted: dict[str, list[int]] = {"operations": [], "syncs": []}
    with torch.no_grad(), device:
        loops = [
            _on_emulated(
                device, copy.deepcopy(rows.bench.template(name)), case.steps, rows.first_noise(index, case.latent_shape)
            )
            for index, name in enumerate(rows.samplers(case))
        ]
        for _ in range(case.steps):
            device.operations = device.syncs = 0
            for loop in loops:
                loop.advance(loop.model_input())
            counted["operations"].append(device.operations)
            counted["syncs"].append(device.syncs)
    return counted


def _on_emulated(device: CountingDevice, scheduler: Any, steps: int, noise: Tensor) -> Loop:
    """A loop whose sample and timesteps, but not its sigmas, are on the device, as `set_timesteps(device=)` has it.

    `device` is entered.
    """
    loop = Loop(scheduler, torch.device("cpu"), seeded(NOISE_SEED), num_inference_steps=steps)
    scheduler.timesteps = device.put(scheduler.timesteps)
    loop.timesteps = list(scheduler.timesteps)
    loop.begin(noise.cpu())
    loop.sample = device.put(loop.sample)
    return loop


def count_tables(rows: RowBench, case: RowCase) -> Counted:
    """The step around a null model, over slots of the case's samplers."""
    plan = CapturePlan(latent_shape=case.latent_shape, dtype=torch.float32, batch_sizes=(case.batch,))
    slots = Slots(plan, "cpu")
    for slot, name in enumerate(rows.samplers(case)):
        table = fastdiff.tabulate(rows.bench.template(name), case.steps)
        latents = table.init(rows.first_noise(slot, case.latent_shape)[0].cpu())
        slots.load(slot, RequestState(request=None, table=table, latents=latents))
    return count_steps(null_model, slots, case.batch, case.steps)


def count_steps(denoiser: Denoiser, slots: Slots, n: int, steps: int) -> Counted:
    """What an emulated device sees of so many steps over slots on the CPU."""
    device = CountingDevice()
    batch = device.put(slots.batch(n))
    operations, syncs = [], []
    with torch.no_grad(), device:
        for _ in range(steps):
            device.operations = device.syncs = 0
            denoise_step(denoiser, batch)
            operations.append(device.operations)
            syncs.append(device.syncs)
    return Counted(operations, syncs, device.peak_bytes)


def errors(rows: RowBench, case: ErrorCase) -> Iterator[dict[str, Any]]:
    """Per sampler, the worst error over seeds of the last sample, relative to its largest element; None: not finite.

    The reference is the table in float64, which tabulate proved against the scheduler in float64 to 1e-9.
    """
    for sampler in case.samplers:
        table = fastdiff.tabulate(rows.bench.template(sampler), case.steps)
        found: dict[str, list[float]] = {"diffusers": [], "fastdiff": []}
        for seed in range(rows.seed, rows.seed + case.seeds):
            generator = seeded(seed)
            noise = normal(generator, case.latent_shape, torch.float32, torch.device("cpu"))
            outputs = torch.randn(len(table), *case.latent_shape, generator=generator)
            reference = _float64(table, noise, outputs)
            for side, run in (("diffusers", _diffusers_float32), ("fastdiff", _fastdiff_float32)):
                last = run(rows, sampler, case, table, noise, outputs)
                error = (last.double() - reference).abs().max() / reference.abs().max()
                found[side].append(error.item())
        yield {"sampler": sampler, "steps": case.steps, **{side: worst(seen) for side, seen in found.items()}}


def worst(errors: Sequence[float]) -> float | None:
    """The largest; None where one is not finite, for none is worse, wherever it stands."""
    return max(errors) if all(map(math.isfinite, errors)) else None


def _float64(table: StepTable, noise: Tensor, outputs: Tensor) -> Tensor:
    generator = seeded(NOISE_SEED)
    state = table.init((noise * table.init_noise_sigma).double())
    for row in range(len(table)):
        drawn = row_noise(generator, table.draws[row], noise.shape, torch.float32, noise.device)
        state = table.advance(row, state, outputs[row].double(), [eps.double() for eps in drawn])
    return state[0]


def _diffusers_float32(
    rows: RowBench, sampler: str, case: ErrorCase, table: StepTable, noise: Tensor, outputs: Tensor
) -> Tensor:
    scheduler = copy.deepcopy(rows.bench.template(sampler))
    loop = Loop(scheduler, torch.device("cpu"), seeded(NOISE_SEED), num_inference_steps=case.steps)
    loop.begin(noise[None])
    for output in outputs:
        loop.model_input()  # the outputs are given, but samplers insist on the call
        loop.advance(output[None])
    return loop.sample[0]


def _fastdiff_float32(
    rows: RowBench, sampler: str, case: ErrorCase, table: StepTable, noise: Tensor, outputs: Tensor
) -> Tensor:
    slots = Slots(_plan_of(table, case.latent_shape), "cpu")
    slots.load(0, RequestState(request=None, table=table, latents=table.init(noise * table.init_noise_sigma)))
    generator = seeded(NOISE_SEED)
    for row in range(len(table)):
        slots.put_noise(0, row, run_noise(generator, [table.draws[row]], noise.shape, torch.float32, noise.device))
        output = outputs[row]
        denoise_step(lambda sample, timestep, conditioning, guidance, output=output: output, slots.batch(1))
    return slots.read(0, 1)[0]


def _plan_of(table: StepTable, latent_shape: tuple[int, ...]) -> CapturePlan:
    """One slot, sized to one table."""
    return CapturePlan(
        latent_shape=latent_shape, dtype=torch.float32, batch_sizes=(1,), memory=table.memory, rows=len(table),
        draws=table.max_draws,
    )  # fmt: skip


def memory(rows: RowBench, case: MemoryCase) -> Iterator[dict[str, Any]]:
    """Device bytes reachable from the scheduler or the slot, before, during (the most of any row) and after a request.

    float32 latents. The sample itself stands in a slot and is held by the caller beside a scheduler, so it is listed
    apart as `latent_bytes`. `row_peak_bytes`: all device tensors alive at once within a row, temporaries included.
    """
    latent_bytes = 4 * torch.Size(case.latent_shape).numel()
    for sampler in case.samplers:
        template = rows.bench.template(sampler)
        for ownership, owner in OWNERS.items():
            fresh = type(template).from_config(template.config)
            measured = _scheduler_bytes(fresh, owner, case)
            yield {"sampler": sampler, "ownership": ownership, "latent_bytes": latent_bytes, **measured}
        table = fastdiff.tabulate(template, case.steps)
        yield {
            "sampler": sampler, "ownership": "tensorized", "latent_bytes": latent_bytes, **_slot_bytes(table, case)
        }  # fmt: skip


def _scheduler_bytes(template: Any, owner: Callable[[Any], Any], case: MemoryCase) -> dict[str, int]:
    device = CountingDevice()

    def reachable(*holders: Any) -> int:
        return storage_bytes(tensor for tensor in reachable_tensors(list(holders)) if not on_host(tensor))

    with torch.no_grad(), device:
        scheduler = owner(template)
        before = reachable(scheduler, template)
        loop = _on_emulated(device, scheduler, case.steps, torch.zeros(1, *case.latent_shape))
        during = 0
        while loop.unfinished:
            loop.advance(torch.zeros_like(loop.model_input()))  # a tensor of its own, as a model returns
            # The sample is the caller's; a scheduler that holds on to the same tensor adds nothing.
            own = storage_bytes([loop.sample])
            during = max(during, reachable(scheduler, template, loop.sample) - own)
        del scheduler, loop
        after = reachable(template)
    return {
        "before_bytes": before, "during_bytes": during, "after_bytes": after, "row_peak_bytes": device.peak_bytes
    }  # fmt: skip


def _slot_bytes(table: StepTable, case: MemoryCase) -> dict[str, int]:
    slots = Slots(_plan_of(table, case.latent_shape), "cpu")
    slots.load(0, RequestState(request=None, table=table, latents=table.init(torch.zeros(case.latent_shape))))
    before = storage_bytes(slots.tensors())
    counted = count_steps(null_model, slots, 1, len(table))
    slots.park(0)
    after = storage_bytes(slots.tensors())
    return {
        "before_bytes": before, "during_bytes": before, "after_bytes": after, "row_peak_bytes": counted.peak_bytes
    }  # fmt: skip


def last_samples(results: Sequence[Tensor]) -> Tensor:
    """[n, C, H, W] on the CPU, for parity."""
    return torch.cat([result.cpu().float() for result in results])
