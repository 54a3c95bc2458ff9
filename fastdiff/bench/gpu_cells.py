"""What each cell of `bench gpu` measures: a generator of entries, each journalled as soon as it is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.bench import gpu_bytes, gpu_tests, selftest
from fastdiff.bench.gpu_arms import (
    Arm,
    DiffusersRows,
    Entry,
    Model,
    ModelAlone,
    SlotRows,
    Work,
    measure_rows,
    observe,
    relative_error,
)
from fastdiff.bench.gpu_settings import Settings
from fastdiff.bench.gpu_suite import TREES, CellCase
from fastdiff.bench.loop import cloned_deepcopy, cloned_shallow, shared
from fastdiff.bench.rows import null_model
from fastdiff.bench.words import NEEDS_CUDA
from fastdiff.capture import Built, Regions, StepGraphs, Steps, compiled
from fastdiff.denoiser import Denoiser
from fastdiff.models.geometries import Geometry, Inputs, geometry
from fastdiff.plan import CapturePlan, Compile
from fastdiff.profile import profile_step
from fastdiff.slots import Slots

GRAPH_ARMS = ("tensorized/step-graph", "tensorized/loop-graph")


def ceilings(settings: Settings, case: CellCase) -> Iterator[Entry]:
    """What this very card sustains on random data: the rates that floors assume can be checked against it."""
    settings.require_cuda()
    side, numbers = (512, 2**20) if settings.tiny else (8192, 2**31)
    generator = torch.Generator(settings.device).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": settings.device, "dtype": torch.bfloat16}
    a, b = torch.randn(2, side, side, **options)
    source = torch.randn(numbers, **options)
    target = torch.empty_like(source)
    yield {
        "kind": "ceilings",
        "flops": 2 * side**3,
        "product_s": _event_seconds(lambda: torch.mm(a, b)),
        "copied_bytes": 2 * source.nbytes,  # read and written
        "copy_s": _event_seconds(lambda: target.copy_(source)),
    }


def _event_seconds(work: Callable[[], object]) -> list[float]:
    """Ten timed calls after three."""
    for _ in range(3):
        work()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize()
    return [begun.elapsed_time(ended) / 1e3 for begun, ended in pairwise(events)]


# Rows


def null_rows(settings: Settings, case: CellCase) -> Iterator[Entry]:
    """The sampler alone, by ownership and mode: the model gives back what it gets."""
    own, n = settings.suite.null_model, _batch(case)
    shape, unroll = own.latent_shape, settings.suite.unroll
    plan = CapturePlan(latent_shape=shape, dtype=torch.float32, batch_sizes=(n,), unroll=unroll)
    ready = _Ready(settings, null_model, plan, model=None)
    yield from ready.build()
    generator = torch.Generator(settings.device).manual_seed(0)
    first = torch.randn(n, *shape, generator=generator, device=settings.device)
    inputs = Inputs(first, torch.ones(n), {}, torch.ones(n))
    mixes = [(sampler,) * n for sampler in own.samplers]
    if n > 1:
        mixes.append(tuple(own.samplers[index % len(own.samplers)] for index in range(n)))
    for samplers in mixes:
        work, alike = Work(samplers, own.steps, inputs, own.tolerance), len(set(samplers)) == 1
        deepcopy = DiffusersRows("cloned-deepcopy", work, cloned_deepcopy, None)
        work.settle(deepcopy)
        arms: list[Arm] = [deepcopy, DiffusersRows("cloned-shallow", work, cloned_shallow, None), *ready.arms(work)]
        if alike:
            arms.insert(0, DiffusersRows("shared", work, shared, None, together=True))
        unsupported = {} if alike else {"shared": "one scheduler cannot be several samplers"}
        if not settings.on_cuda:
            unsupported |= dict.fromkeys(GRAPH_ARMS, NEEDS_CUDA)
        arms = [arm for arm in arms if arm.name in own.arms]
        pairs = [("cloned-deepcopy", arm.name) for arm in arms if arm.name != "cloned-deepcopy"]
        rows = measure_rows(arms, work, pairs, settings.rule, _listed(unsupported, own.arms))
        yield {"model": "null model", **rows}
    yield ready.profile([])
    if settings.on_cuda:
        # Of the last requests alone, where several are mixed: an arm is traced for longer than it is timed.
        yield observe([arm for arm in arms if rows["arms"][arm.name]["status"] == "ok"], work)


def geometry_rows(settings: Settings, case: CellCase) -> Iterator[Entry]:
    """A geometry's rows as diffusers, torch.compile and fastdiff run them, and what each took to make ready.

    In stages, so that a cut loses only those that it did not come to: what is there at once, what fastdiff's own
    settings compile, what torch.compile captures by itself.
    """
    suite, n, how = settings.suite, _batch(case), case.compile or "default"
    own = settings.geometry(case)
    plan = replace(own.plan, batch_sizes=(n,), unroll=suite.unroll, compile=how)
    inputs = own.inputs(n)._replace(guidance=torch.full((n,), suite.rows.guidance, device=settings.device))
    samplers, steps = (case.sampler or "DPMSolverMultistep",) * n, case.steps or suite.rows.steps
    work = Work(samplers, steps, inputs)
    eager = DiffusersRows("cloned-deepcopy/eager", work, cloned_deepcopy, own.denoiser)
    with _in_float32(own.model):
        precise = _precise(inputs)
        work.settle(DiffusersRows("float32", Work(samplers, steps, precise), cloned_deepcopy, own.denoiser))
        expected = own.denoiser(*precise)
    work.allow(suite.rows.error_ratio, eager)
    stages = _Stages(settings, work, {"model": own.name, "compile": how})
    ready = _Ready(settings, own.denoiser, plan, own.model)
    yield stages.rows([eager, *ready.arms(work)])

    yield from ready.build()
    model, trees = _compiled_model(own, n, how), f"cloned-deepcopy/{TREES[how]}"
    compile_s = _first_call(settings, lambda: model(*inputs))
    yield _built("cloned-deepcopy/compiled", Built(compile_s=compile_s))
    arms: list[Arm] = [DiffusersRows("cloned-deepcopy/compiled", work, cloned_deepcopy, model), *ready.arms(work)[1:]]
    unsupported: dict[str, str] = {}
    if settings.on_cuda:
        tolerance = suite.rows.error_ratio * relative_error(own.denoiser(*inputs), expected)
        alone = ModelAlone(model, inputs, expected, tolerance)
        yield _built(alone.name, alone.capture(n))
        arms.append(alone)
    else:
        unsupported = dict.fromkeys((*GRAPH_ARMS, ModelAlone.name), NEEDS_CUDA)
    if plan.regional:
        unsupported[trees] = "compiled by region, every call of a block would be a graph of its own"
        unsupported.setdefault("tensorized/loop-graph", "a row of so large a model is far longer than its launch")
    yield stages.rows(arms, unsupported)

    if trees in suite.rows.arms and trees not in unsupported:
        from torch._dynamo.utils import counters  # a second's import, for what compiles

        marked, skipped = _with_trees(own.denoiser, TREES[how]), counters["inductor"]["cudagraph_skips"]
        # It captures in the second call, and says nowhere but here that it did not.
        yield _built(trees, Built(compile_s=_first_call(settings, lambda: [marked(*inputs) for _ in range(3)])))
        if counters["inductor"]["cudagraph_skips"] > skipped:
            yield stages.rows([], {trees: "torch.compile captured nothing: TORCH_LOGS=cudagraphs says why"})
        else:
            yield stages.rows([DiffusersRows(trees, work, cloned_deepcopy, marked)])
    yield ready.profile([*own.model.parameters(), *own.model.buffers()])
    if settings.on_cuda:
        yield observe(list(stages.valid.values()), work)


class _Stages:
    """The rows of a geometry's arms as they become ready: new ones, and those before that they are compared with.

    A ratio is only ever of arms that were interleaved, in one entry.
    """

    def __init__(self, settings: Settings, work: Work, title: Entry) -> None:
        self.valid: dict[str, Arm] = {}
        self._settings, self._work, self._title = settings, work, title

    def rows(self, new: Sequence[Arm], unsupported: Mapping[str, str] | None = None) -> Entry:
        """The entry of a stage."""
        asked = self._settings.suite.rows
        every = self.valid | {arm.name: arm for arm in new if arm.name in asked.arms}
        names = every.keys() - self.valid.keys()
        pairs = [pair for pair in asked.compare if set(pair) <= every.keys() and not names.isdisjoint(pair)]
        names |= {name for pair in pairs for name in pair}
        arms = [arm for name, arm in every.items() if name in names]
        refused = _listed(unsupported or {}, asked.arms)
        entry = self._title | measure_rows(arms, self._work, pairs, self._settings.rule, refused)
        self.valid |= {arm.name: arm for arm in arms if entry["arms"][arm.name]["status"] == "ok"}
        return entry


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """The model in float32, and back: every bfloat16 value is one of float32, so its weights are what they were.

    On CUDA convolutions then round to TF32, torch's default: eight times finer than bfloat16.
    """
    own = next(model.parameters()).dtype
    nn.Module.to(model, torch.float32)  # diffusers' `to` warns of casts
    try:
        yield
    finally:
        nn.Module.to(model, own)


def _precise(inputs: Inputs) -> Inputs:
    conditioning = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.conditioning.items()
    }
    return inputs._replace(sample=inputs.sample.float(), conditioning=conditioning)


def _batch(case: CellCase) -> int:
    assert case.batch is not None  # CellCase asks for it wherever it is needed
    return case.batch


def _listed(unsupported: Mapping[str, str], arms: Sequence[str]) -> dict[str, str]:
    """Of the arms that cannot run, those that the suite asks for."""
    return {name: reason for name, reason in unsupported.items() if name in arms}


class _Ready:
    """The step of one batch size in every mode that runs here; compiled once, captured as it was compiled."""

    def __init__(
        self, settings: Settings, denoiser: Denoiser, plan: CapturePlan, model: torch.nn.Module | None
    ) -> None:
        self._settings, self._denoiser, self._plan, self._model = settings, denoiser, plan, model
        self._n = plan.max_batch
        slots = Slots(plan, settings.device)
        self._eager = slots, partial(Steps(denoiser, slots, "eager"), self._n)
        self._modes: dict[str, tuple[Slots, Callable[[], None], int]] = {"tensorized/eager": (*self._eager, 1)}

    def profile(self, weights: Sequence[Tensor]) -> Entry:
        """The eager row."""
        slots, step = self._eager
        profile = profile_step(step, self._denoiser, slots.batch(self._n), weights)
        return {
            "kind": "profile",
            **asdict(profile),
            # What the row touches beside the model: latents, rows and noise.
            "step_bytes": profile.floor_bytes - sum(one.nbytes for one in weights) - self._plan.conditioning_bytes,
        }

    def build(self) -> Iterator[Entry]:
        """Compile, then capture one row and the plan's `unroll` rows of the compiled step, where there are graphs."""
        slots = Slots(self._plan, self._settings.device, planar=True)
        steps = Steps(self._denoiser, slots, "compiled", self._model)
        step = partial(steps, self._n)
        compile_s = _first_call(self._settings, step)
        yield _built("tensorized/compiled", Built(compile_s=compile_s))
        self._modes["tensorized/compiled"] = slots, step, 1
        if not self._settings.on_cuda:
            return
        for name, unroll in zip(GRAPH_ARMS, (1, self._plan.unroll), strict=True):
            if unroll > 1 and self._plan.regional:
                continue
            graphs = StepGraphs(self._settings.device, unroll)
            graphs.capture(self._n, step)
            yield _built(name, graphs.built[0, self._n])
            self._modes[name] = slots, partial(graphs.replay, self._n), unroll

    def arms(self, work: Work) -> list[SlotRows]:
        """An arm for each mode that is built."""
        return [SlotRows(name, work, slots, step, unroll) for name, (slots, step, unroll) in self._modes.items()]


def _built(arm: str, built: Built) -> Entry:
    return {"kind": "built", "arm": arm, **asdict(built)}


def _first_call(settings: Settings, work: Callable[[], object]) -> float:
    """Seconds of a call that compiles."""
    started = time.perf_counter()
    work()
    if settings.on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _compiled_model(own: Geometry, n: int, how: Compile) -> Model:
    """The denoiser alone, compiled with the settings of fastdiff's step."""

    denoiser = own.denoiser

    def call(sample: Tensor, timestep: Tensor, conditioning: dict[str, Tensor], guidance: Tensor) -> Tensor:
        return denoiser(sample, timestep, conditioning, guidance)

    if not own.plan.regional:
        return compiled(call, f"denoiser_{n}", how)
    blocks = Regions(own.model, n, how, "inductor")

    def by_region(*arguments: Any) -> Tensor:
        with blocks:
            return call(*arguments)

    return by_region


def _with_trees(denoiser: Denoiser, mode: str) -> Model:
    """The denoiser as torch.compile captures it by itself; every row says that the last one's output is done with."""

    def call(sample: Tensor, timestep: Tensor, conditioning: dict[str, Tensor], guidance: Tensor) -> Tensor:
        return denoiser(sample, timestep, conditioning, guidance)

    trees: Callable[..., Tensor] = torch.compile(call, fullgraph=True, dynamic=False, mode=mode)

    def marked(*arguments: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return trees(*arguments)

    return marked


# Start-up


def starts(settings: Settings, case: CellCase) -> Iterator[Entry]:
    """Two processes that ready the same step graph, sharing the compiler's cache, which is empty at first."""
    settings.require_cuda()
    code = "import sys; from fastdiff.bench.gpu_cells import ready_once; ready_once(*sys.argv[1:])"
    with tempfile.TemporaryDirectory() as cache:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_CACHE_DIR"}
        environment["TORCHINDUCTOR_CACHE_DIR"] = cache
        for which in ("cold", "warm"):
            started = time.perf_counter()
            command = [sys.executable, "-c", code, str(case.geometry), str(settings.device)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"the {which} start failed: {done.stderr.strip().splitlines()[-1]}")
            process_s = time.perf_counter() - started
            printed = json.loads(done.stdout.splitlines()[-1])
            yield {"kind": "start", "model": case.geometry, "start": which, "process_s": process_s, **printed}


def ready_once(name: str, device: str) -> None:
    """Ready the step graph of one slot, run a row, print what that took."""
    started = time.perf_counter()
    own = geometry(name, device, torch.bfloat16)
    torch.cuda.synchronize()
    load_s = time.perf_counter() - started
    slots = Slots(replace(own.plan, batch_sizes=(1,)), device, planar=True)
    with torch.no_grad():
        steps = Steps(own.denoiser, slots, "step-graph", own.model)
        steps(1)
    torch.cuda.synchronize()
    ready_s = time.perf_counter() - started
    sys.stdout.write(json.dumps({"load_s": load_s, "ready_s": ready_s, **asdict(steps.built[0, 1])}) + "\n")


def self_test(settings: Settings, case: CellCase) -> Iterator[Entry]:
    """Whether times of eager rows on this device tell 5 % more work from the same work, and nothing from nothing."""
    report = selftest.measure(str(settings.device), {"a_a": 1, "slower": 1} if settings.tiny else selftest.QUICK, 0)
    told = ("seconds", "phi", "grade", "meaning", "flagged", "found", "wrong", "passed", "checks", "trials")
    yield {"kind": "selftest", **{name: report[name] for name in told}}


MEASURES: Mapping[str, Callable[[Settings, CellCase], Iterator[Entry]]] = {
    "tests": gpu_tests.cuda_tests,
    "ceilings": ceilings,
    "null model": null_rows,
    "rows": geometry_rows,
    "graphs": gpu_bytes.graph_memory,
    "ownership": gpu_bytes.ownership_memory,
    "start": starts,
    "selftest": self_test,
}
"""By the word that the suite's cells have for it."""
