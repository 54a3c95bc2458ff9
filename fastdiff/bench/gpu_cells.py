"""What each cell of `bench gpu` measures: a generator of entries, each journalled as soon as it is there."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.bench import gpu_suite, selftest
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
from fastdiff.bench.gpu_suite import TREES, CellCase, GpuSuite
from fastdiff.bench.loop import Loop, cloned_deepcopy, cloned_shallow, shared
from fastdiff.bench.measure import StopRule
from fastdiff.bench.rows import null_model
from fastdiff.bench.suite import MemoryCase
from fastdiff.bench.vram import device_bytes, settle_device
from fastdiff.bench.words import NEEDS_CUDA
from fastdiff.capture import Built, Regions, StepGraphs, Steps, compiled, step_function
from fastdiff.denoiser import Denoiser
from fastdiff.models.geometries import Geometry, Inputs, geometry
from fastdiff.plan import CapturePlan, Compile
from fastdiff.probe import tabulate
from fastdiff.profile import profile_step
from fastdiff.slots import Slots
from fastdiff.stages import scheduler_class
from fastdiff.state import RequestState
from fastdiff.step import denoise_step

GRAPH_ARMS = ("tensorized/step-graph", "tensorized/loop-graph")
TESTS_END_S = 15  # of their cell's max_s, for it to start and to say how far they came


class Unsupported(Exception):
    """A cell that cannot run here, and why."""


@dataclass(frozen=True)
class Settings:
    """What all cells share."""

    device: torch.device
    tiny: bool  # whether it runs, not how fast: see GpuSuite.tiny
    out: Path

    @property
    def on_cuda(self) -> bool:
        """Whether there is anything to measure."""
        return self.device.type == "cuda"

    @cached_property
    def suite(self) -> GpuSuite:
        """What there is to measure."""
        suite = gpu_suite.load()
        return suite.tiny() if self.tiny else suite

    @property
    def rule(self) -> StopRule:
        """When an arm has been timed often enough."""
        own = self.suite
        return StopRule(level=own.level, half_width=own.half_width, max_pairs=own.max_pairs, max_s=own.max_s)

    def require_cuda(self) -> None:
        """Raise Unsupported on any other device."""
        if not self.on_cuda:
            raise Unsupported(NEEDS_CUDA)

    def compiler(self) -> AbstractContextManager[object]:
        """What torch.compile does within: on a CPU it only traces, to show that it can."""
        return nullcontext() if self.on_cuda else torch.compiler.set_stance("default", force_backend="eager")


def cuda_tests(settings: Settings, case: CellCase) -> Iterator[Entry]:
    """The tests that are marked `cuda`, in a process of their own."""
    settings.require_cuda()
    root = Path(fastdiff.__file__).parents[1]
    if not (root / "tests").is_dir():
        raise Unsupported(f"there are no tests beside the package in {root}")
    results, log = settings.out / "tests.xml", settings.out / "tests.log"
    results.unlink(missing_ok=True)  # an earlier attempt's
    command = [sys.executable, "-m", "pytest", "-vv", "-m", "cuda", "-p", "no:cacheprovider", "--durations=10"]
    # Only files that have some: the others import what such a machine may lack. The nearest to the root come first.
    files = [file for file in (root / "tests").rglob("test_*.py") if "mark.cuda" in file.read_text(encoding="utf-8")]
    command += [f"--junitxml={results.resolve()}", *map(str, sorted(files, key=lambda file: (len(file.parts), file)))]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # the log of a test that hangs ends with its name
    started, code = time.perf_counter(), None
    with log.open("w", encoding="utf-8") as output, suppress(subprocess.TimeoutExpired):  # which no code says
        code = subprocess.run(
            command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False,
            timeout=case.max_s and max(1.0, case.max_s - TESTS_END_S),
        ).returncode  # fmt: skip
    seconds, said = time.perf_counter() - started, log.read_text(encoding="utf-8")
    counts = read_junit(results.read_text(encoding="utf-8")) if results.exists() else read_log(said)
    yield {"kind": "tests", "seconds": seconds, "code": code, **counts, "log_tail": said.splitlines()[-5:]}
    if code != 0:
        ended = "was cut at its limit" if code is None else f"ended with code {code}"
        raise RuntimeError(f"pytest {ended}: see {log}")


def read_junit(text: str) -> Entry:
    """Counts, and the failures by name with the first line of what they say."""
    found: dict[str, list[Entry]] = {"passed": [], "failure": [], "error": [], "skipped": []}
    for case in ElementTree.fromstring(text).iter("testcase"):
        outcome = next((one for one in case if one.tag in found), None)
        message = (outcome.get("message") or "").partition("\n")[0] if outcome is not None else ""
        name = f"{case.get('classname')}.{case.get('name')}"
        found["passed" if outcome is None else outcome.tag].append({"test": name, "message": message})
    return {
        "passed": len(found["passed"]),
        "skipped": len(found["skipped"]),
        "failures": found["failure"] + found["error"],
    }


def read_log(text: str) -> Entry:
    """The same of pytest's log, where a run did not come to its end."""
    lines = text.splitlines()
    return {
        "passed": sum(" PASSED" in line for line in lines),
        "skipped": sum(" SKIPPED" in line for line in lines),
        "failures": [{"test": line.partition(" ")[0], "message": ""} for line in lines if " FAILED" in line],
    }


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
    own = _geometry(settings, case)
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
        marked = _with_trees(own.denoiser, TREES[how])
        yield _built(trees, Built(compile_s=_first_call(settings, lambda: marked(*inputs))))
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


def _geometry(settings: Settings, case: CellCase) -> Geometry:
    assert case.geometry is not None  # CellCase asks for it wherever it is needed
    return geometry(case.geometry, settings.device, torch.bfloat16)


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


# Bytes


def graph_memory(settings: Settings, case: CellCase) -> Iterator[Entry]:
    """VRAM from load to release, and what each batch size's graph adds. Eager kernels: compiling them takes minutes."""
    settings.require_cuda()
    yield _phase(settings, "nothing")
    own = _geometry(settings, case)
    plan = replace(own.plan, compile="none")
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
            for ownership, owner in (
                ("shared", shared), ("cloned-deepcopy", cloned_deepcopy), ("cloned-shallow", cloned_shallow),
            ):  # fmt: skip
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
    "tests": cuda_tests,
    "ceilings": ceilings,
    "null model": null_rows,
    "rows": geometry_rows,
    "graphs": graph_memory,
    "ownership": ownership_memory,
    "start": starts,
    "selftest": self_test,
}
"""By the word that the suite's cells have for it."""
