"""The arms of `bench gpu`: rows of diffusers, of fastdiff, of a model alone; checked, timed in turns, then traced."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff.bench.loop import Loop
from fastdiff.bench.measure import Block, Sample, StopRule, Stopwatch, interleave, worse
from fastdiff.bench.vram import count_syncs
from fastdiff.capture import Built, StepGraphs
from fastdiff.models.geometries import Inputs
from fastdiff.probe import tabulate
from fastdiff.profile import TRACED_CALLS, Kernel, trace_kernels
from fastdiff.slots import Slots
from fastdiff.stages import scheduler_class
from fastdiff.state import RequestState

LONGEST = 15  # kernels of an arm that are told by name

Entry = dict[str, Any]
Model = Callable[[Tensor, Tensor, Mapping[str, Tensor], Tensor], Tensor]
"""A denoiser, called with its arguments in order."""


class Arm(Protocol):
    """One way to run the rows of a cell's requests."""

    name: str
    rows_per_call: int  # as many at a time as a call cannot do with fewer

    def start(self) -> None:
        """What a host does before the first row."""

    def run(self, rows: int) -> None:
        """Enqueue that many rows, and wait for nothing."""

    @property
    def tolerance(self) -> float:
        """The most that its error may be."""
        ...

    def error(self) -> float:
        """How far all rows of a schedule led from what they should have."""
        ...


class Work:
    """The requests of one cell, a sampler each, and what the reference makes of them."""

    def __init__(self, samplers: Sequence[str], steps: int, inputs: Inputs, tolerance: float = 0.0) -> None:
        self.samplers, self.steps, self.inputs = tuple(samplers), steps, inputs
        self.device = inputs.sample.device
        self.templates = [scheduler_class(name)() for name in samplers]
        self.guidance: list[float] = inputs.guidance.tolist()
        self.tolerance = tolerance
        self._reference = self._silent = torch.empty(0)

    def settle(self, reference: DiffusersRows) -> None:
        """Let `reference` say what is right."""
        reference.start()
        reference.run(self.steps)
        self._reference, self._silent = reference.last().double(), self._without_a_model()

    def allow(self, ratio: float, usual: DiffusersRows) -> None:
        """Let every arm err `ratio` times as much as the `usual` one does."""
        usual.start()
        usual.run(self.steps)
        self.tolerance = ratio * usual.error()

    def error(self, last: Tensor) -> float:
        """The worst request's distance from the reference, relative to it or to the model's part in it if that is less.

        The first noise is in all of them, and would hide a model that is wrong.
        """
        wrong, whole, part = (
            one.flatten(1).norm(dim=1)
            for one in (last.double() - self._reference, self._reference, self._reference - self._silent)
        )
        return float((wrong / torch.minimum(whole, part)).max())

    def _without_a_model(self) -> Tensor:
        """The last samples [n, ...] float64 that zeros in the model's place lead to."""
        last = []
        for template, first in zip(self.templates, self.inputs.sample.double().cpu(), strict=True):
            table = tabulate(template, self.steps)
            latents = table.init(first * table.init_noise_sigma)
            for row in range(len(table)):
                latents = table.advance(row, latents, torch.zeros_like(first))
            last.append(latents[0])
        return torch.stack(last).to(self.device)


class DiffusersRows:
    """Schedulers of diffusers stepped in Python around one model call a row, as pipelines and hosts do it.

    A scheduler for each request, or one for all, which they can share while they sample alike and in step. Without a
    model, what goes in comes out.
    """

    rows_per_call = 1

    def __init__(
        self, name: str, work: Work, owner: Callable[[Any], Any], model: Model | None, *, together: bool = False
    ) -> None:
        self.name, self._work, self._owner, self._model = name, work, owner, model
        samplers = work.samplers[:1] if together else work.samplers
        self._templates = [scheduler_class(sampler)() for sampler in samplers]  # own ones: a shared one remembers
        self._size = len(work.samplers) // len(samplers)  # requests of each

    def start(self) -> None:
        """Own and prepare the schedulers, scale the first noise."""
        work = self._work
        owned = [self._owner(template) for template in self._templates]
        self._loops = [Loop(scheduler, work.device, num_inference_steps=work.steps) for scheduler in owned]
        every = [scheduler.timesteps.float() for scheduler in owned for _ in range(self._size)]
        # What the model sees, [n] a row; views would not be aligned, and a compiled model copies such inputs.
        self._seen_timesteps = [row.clone() for row in torch.stack(every, dim=1)]
        for loop, part in zip(self._loops, work.inputs.sample.split(self._size), strict=True):
            loop.begin(part)
        self._row = 0

    @property
    def tolerance(self) -> float:
        """What is allowed of its requests."""
        return self._work.tolerance

    def run(self, rows: int) -> None:
        """Scale, call the model, step every scheduler."""
        for _ in range(rows):
            self._advance()

    def _advance(self) -> None:
        work = self._work
        outputs = [loop.model_input() for loop in self._loops]
        if self._model is not None:
            seen, timestep = torch.cat(outputs) if len(outputs) > 1 else outputs[0], self._seen_timesteps[self._row]
            output = self._model(seen, timestep, work.inputs.conditioning, work.inputs.guidance)
            outputs = list(output.to(seen.dtype).split(self._size))
        for loop, output in zip(self._loops, outputs, strict=True):
            loop.advance(output)
        self._row += 1

    def last(self) -> Tensor:
        """The samples [n, ...]."""
        return torch.cat([loop.sample for loop in self._loops])

    def error(self) -> float:
        """Against the reference."""
        return self._work.error(self.last())


class SlotRows:
    """Requests in slots, advanced by `step`, which is one row or several."""

    def __init__(self, name: str, work: Work, slots: Slots, step: Callable[[], None], rows_per_call: int = 1) -> None:
        self.name, self.rows_per_call = name, rows_per_call
        self._work, self._slots, self._step = work, slots, step

    def start(self) -> None:
        """Look up the tables, load the slots."""
        inputs = self._work.inputs
        for slot, template in enumerate(self._work.templates):
            table = tabulate(template, self._work.steps)
            state = RequestState(
                request=None,
                guidance_scale=self._work.guidance[slot],
                conditioning={name: tensor[slot] for name, tensor in inputs.conditioning.items()},
                table=table,
                latents=table.init(inputs.sample[slot] * table.init_noise_sigma),
            )
            self._slots.load(slot, state)

    @property
    def tolerance(self) -> float:
        """What is allowed of its requests."""
        return self._work.tolerance

    def run(self, rows: int) -> None:
        """One call for every `rows_per_call` rows."""
        for _ in range(rows // self.rows_per_call):
            self._step()

    def error(self) -> float:
        """Against the reference."""
        last = [self._slots.read(slot, 1)[0] for slot in range(len(self._work.samplers))]
        return self._work.error(torch.stack(last))


class ModelAlone:
    """The model on inputs that stay, captured and nothing around it: what a step takes beyond it is overhead."""

    name = "model/graph"
    rows_per_call = 1

    def __init__(self, model: Model, inputs: Inputs, expected: Tensor, tolerance: float) -> None:
        self._model, self._inputs = model, inputs
        self._expected, self.tolerance = expected.double(), tolerance
        self._output = torch.empty(0)
        self._replay: Callable[[], None] = self._call

    def _call(self) -> None:
        self._output = self._model(*self._inputs)

    def capture(self, n: int) -> Built:
        """Capture the model; its output stays where a replay writes it."""
        graphs = StepGraphs(self._inputs.sample.device, unroll=1)
        graphs.capture(n, self._call)
        self._replay = partial(graphs.replay, n)
        return graphs.built[0, n]

    def start(self) -> None:
        """Nothing: the inputs are there."""

    def run(self, rows: int) -> None:
        """One replay a row."""
        for _ in range(rows):
            self._replay()

    def error(self) -> float:
        """Of its output."""
        return relative_error(self._output, self._expected)


def relative_error(output: Tensor, expected: Tensor) -> float:
    """How far an output is from what it should be, by their norms."""
    return float((output.double() - expected.double()).norm() / expected.double().norm())


# Measuring


@dataclass(frozen=True)
class RowSample(Sample):
    """One schedule of one arm, per row: `total_s` by the device's clock, or the host's where there is no other."""

    host_s: float = 0.0  # to enqueue it: a schedule's second call, before which the device has nothing to do
    start_s: float = 0.0  # before the first row, all requests together


def measure_rows(
    arms: Sequence[Arm],
    work: Work,
    pairs: Sequence[tuple[str, str]],
    rule: StopRule,
    unsupported: Mapping[str, str] | None = None,
) -> Entry:
    """The arms checked, then timed in turns, and checked again each time; one whose answer is wrong has no times. Every
    raw sample is in the entry.

    `unsupported`: arms that cannot run here, and why.
    """
    errors = {}
    for arm in arms:
        arm.start()
        arm.run(work.steps)
        errors[arm.name] = arm.error()
    allowed = {arm.name: arm.tolerance for arm in arms}
    valid = {arm.name: arm for arm in arms if errors[arm.name] <= allowed[arm.name]}  # NaN is not
    compared = [pair for pair in pairs if set(pair) <= valid.keys()]
    blocks = {name: _block(arm, work, errors) for name, arm in valid.items()}
    samples = interleave(blocks, compared, rule, seed=0) if blocks else {}
    wrong = {name for name, error in errors.items() if not error <= allowed[name]}
    samples = {name: own for name, own in samples.items() if name not in wrong}
    compared = [pair for pair in compared if wrong.isdisjoint(pair)]
    entries: dict[str, Entry] = {}
    for name, error in errors.items():
        right = name not in wrong
        own = [sample for sample in samples.get(name, ()) if isinstance(sample, RowSample)]
        entries[name] = {
            "status": "ok" if right else "INVALID",
            "reason": None if right else f"differs from the reference by {error:.2g}, more than {allowed[name]:.2g}",
            "error": error if math.isfinite(error) else None,
            "row_s": [sample.total_s for sample in own],
            "host_s": [sample.host_s for sample in own],
            "start_s": [sample.start_s for sample in own],
        }
    for name, reason in (unsupported or {}).items():
        entries[name] = {"status": "unsupported", "reason": reason}
    return {
        "kind": "rows",
        "batch": len(work.samplers),
        "samplers": list(work.samplers),
        "rows": work.steps,
        "tolerance": work.tolerance,
        "level": rule.level,
        "pairs": [list(pair) for pair in compared],
        "arms": entries,
    }


def _block(arm: Arm, work: Work, errors: dict[str, float]) -> Block:
    """All rows of a schedule by the device's events, begun with nothing under way; `errors` keeps the arm's worst."""
    rows, device = work.steps, work.device

    def block() -> Sample:
        setup = Stopwatch(device)
        with setup:
            arm.start()
        if device.type != "cuda":
            rows_watch = Stopwatch(device)
            with rows_watch:
                arm.run(rows)
            row_s = host_s = rows_watch.seconds / rows
        else:
            begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begun.record()
            arm.run(rows)
            ended.record()
            ended.synchronize()
            row_s = begun.elapsed_time(ended) / 1e3 / rows
        errors[arm.name] = worse(errors[arm.name], arm.error())
        if device.type == "cuda":
            host_s = _host_s(arm)
        return RowSample(row_s, host_s=host_s, start_s=setup.seconds)

    return block


def _host_s(arm: Arm) -> float:
    """How long the host takes to enqueue a row, with nothing under way that it would have to wait for.

    Not the first one: schedulers look for their place then, and know no earlier row that a corrector would go by.
    """
    arm.start()
    arm.run(arm.rows_per_call)
    torch.cuda.synchronize()
    started = time.perf_counter()
    arm.run(arm.rows_per_call)
    seconds = time.perf_counter() - started
    torch.cuda.synchronize()
    return seconds / arm.rows_per_call


def observe(arms: Sequence[Arm], work: Work) -> Entry:
    """What only a CUDA device tells of arms that were timed.

    Afterwards nothing must be timed in this process: a profiler that has been there makes every launch slower.
    """
    return {
        "kind": "observed",
        "samplers": list(work.samplers),
        "rows": work.steps,
        "arms": {arm.name: _observe(arm, work) for arm in arms},
    }


def traced_calls(arm: Arm, work: Work) -> int:
    """How many calls of `arm` are traced: no more than one schedule has rows for, since diffusers refuses a further."""
    return max(1, min(TRACED_CALLS, work.steps // (2 * arm.rows_per_call)))


def longest(kernels: Sequence[Kernel], rows: int) -> list[Entry]:
    """The kernels in which most of the time went, longest first: which ones a library and a compiler chose."""
    seconds: dict[str, list[float]] = {}
    for one in kernels:
        seconds.setdefault(one.name, []).append(one.seconds)
    entries: list[Entry] = [
        {"kernel": name, "launches": len(own) / rows, "device_s": sum(own) / rows} for name, own in seconds.items()
    ]
    return sorted(entries, key=lambda entry: -entry["device_s"])[:LONGEST]


def _observe(arm: Arm, work: Work) -> Entry:
    """Kernels, times that the host waited, allocations."""
    calls = traced_calls(arm, work)
    arm.start()
    kernels = trace_kernels(partial(arm.run, arm.rows_per_call), calls)
    traced_rows = calls * arm.rows_per_call
    arm.start()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    waited = count_syncs(partial(arm.run, work.steps))
    return {
        # Per row; a graph's kernels are counted one by one. None where the profiler may not read the device.
        "launches": len(kernels) / traced_rows if kernels else None,
        "device_s": sum(one.seconds for one in kernels) / traced_rows if kernels else None,
        "longest": longest(kernels, traced_rows),
        # Of a whole schedule.
        "syncs": waited,
        "allocations": torch.cuda.memory_stats()["allocation.all.allocated"] - allocated,
    }
