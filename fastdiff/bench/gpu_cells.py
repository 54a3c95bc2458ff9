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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff.bench.arms import (
    cloned_deepcopy,
    cloned_shallow,
    init_noise_sigma,
    scale_model_input,
    set_timesteps,
    shared,
)
from fastdiff.bench.gpu_arms import Arm, DiffusersRows, Entry, Model, ModelAlone, SlotRows, Work, measure_rows, observe
from fastdiff.bench.measure import StopRule
from fastdiff.bench.rows import null_model
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

NULL_SAMPLERS = ("Euler", "DPMSolverMultistep", "UniPCMultistep", "FlowMatchEuler")
NULL_TOLERANCE = 1e-4  # float32, against diffusers in float32
TOLERANCE = 0.08  # bfloat16: rounding alone makes 0.01 to 0.03 of Work.error on the CPU
GUIDANCE = 2.0  # a higher scale multiplies rounding: 6 makes 0.07 of SD 1.5's, and costs the same
UNROLL = 8  # rows in a loop graph
STEPS = 8  # of a geometry's requests: one loop graph, as few-step models run
TESTS_LIMIT_S = 150.0
NEEDS_CUDA = "needs CUDA"
CUDA_ARMS = ("tensorized/compiled", "tensorized/step-graph", "tensorized/loop-graph")
TREES = {"default": "reduce-overhead", "max-autotune-no-cudagraphs": "max-autotune"}
"""torch.compile's mode that captures graphs by itself, beside each of ours that does not."""
SHAPES = {"SD 1.5, 512 x 512": (4, 64, 64), "SDXL, 1024 x 1024": (4, 128, 128), "Flux, 1024 x 1024": (4096, 64)}


class Unsupported(Exception):
    """A cell that cannot run here, and why."""


@dataclass(frozen=True)
class Settings:
    """What all cells share."""

    device: torch.device
    tiny: bool  # toy geometries and few samples: whether it runs, not how fast
    out: Path

    @property
    def on_cuda(self) -> bool:
        """Whether there is anything to measure."""
        return self.device.type == "cuda"

    @property
    def rule(self) -> StopRule:
        """When an arm has been timed often enough."""
        if self.tiny:
            return StopRule(level=0.5, half_width=1.0, max_pairs=2, max_s=0.0)
        return StopRule(level=0.99, half_width=0.005, max_pairs=24, max_s=4.0)

    def require_cuda(self) -> None:
        """Raise Unsupported on any other device."""
        if not self.on_cuda:
            raise Unsupported(NEEDS_CUDA)


def cuda_tests(settings: Settings) -> Iterator[Entry]:
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
            timeout=TESTS_LIMIT_S,
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


def ceilings(settings: Settings) -> Iterator[Entry]:
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


def null_rows(settings: Settings, n: int) -> Iterator[Entry]:
    """The sampler alone, by ownership and mode: the model gives back what it gets."""
    shape = (4, 8, 8) if settings.tiny else SHAPES["SD 1.5, 512 x 512"]
    steps = STEPS if settings.tiny else 6 * STEPS
    plan = CapturePlan(latent_shape=shape, dtype=torch.float32, batch_sizes=(n,), unroll=UNROLL)
    ready = _Ready(settings, null_model, plan, model=None)
    if settings.on_cuda:
        yield from ready.build()
    timed = []
    generator = torch.Generator(settings.device).manual_seed(0)
    first = torch.randn(n, *shape, generator=generator, device=settings.device)
    inputs = Inputs(first, torch.ones(n), {}, torch.ones(n))
    mixes = [(sampler,) * n for sampler in NULL_SAMPLERS]
    if n > 1:
        mixes.append(tuple(NULL_SAMPLERS[index % len(NULL_SAMPLERS)] for index in range(n)))
    for samplers in mixes:
        work, alike = Work(samplers, steps, inputs, NULL_TOLERANCE), len(set(samplers)) == 1
        deepcopy = DiffusersRows("cloned-deepcopy", work, cloned_deepcopy, None)
        work.settle(deepcopy)
        arms: list[Arm] = [deepcopy, DiffusersRows("cloned-shallow", work, cloned_shallow, None), *ready.arms(work)]
        if alike:
            arms.insert(0, DiffusersRows("shared", work, shared, None, together=True))
        unsupported = {} if alike else {"shared": "one scheduler cannot be several samplers"}
        if not settings.on_cuda:
            unsupported |= dict.fromkeys(CUDA_ARMS, NEEDS_CUDA)
        names = [arm.name for arm in arms]
        pairs = [("cloned-deepcopy", name) for name in names if name != "cloned-deepcopy"]
        rows = measure_rows(arms, work, pairs, settings.rule, unsupported)
        yield {"model": "null model", **rows}
        timed.append((arms, work, rows))
    yield ready.profile([])
    if settings.on_cuda:
        yield from (observe(*one) for one in timed)


SAMPLERS = {"flux-dev-1024": "FlowMatchEuler"}
"""Of a geometry's requests, where it is not DPM++ 2M."""
PAIRS = [
    ("cloned-deepcopy/eager", "cloned-deepcopy/compiled"),
    ("cloned-deepcopy/eager", "tensorized/eager"),
    ("cloned-deepcopy/compiled", "tensorized/compiled"),
    ("tensorized/compiled", "tensorized/step-graph"),
    ("tensorized/step-graph", "tensorized/loop-graph"),
    ("cloned-deepcopy/compiled", "tensorized/step-graph"),
    ("cloned-deepcopy/eager", "tensorized/step-graph"),
    ("model/graph", "tensorized/step-graph"),
]
"""Base and arm: what each change of mode or ownership is worth, then what all of them are."""


def geometry_rows(settings: Settings, name: str, n: int, how: Compile = "default") -> Iterator[Entry]:
    """A geometry's rows as diffusers, torch.compile and fastdiff run them, and what each took to make ready."""
    own = geometry(f"tiny-{name}" if settings.tiny else name, settings.device, torch.bfloat16)
    ready = _Ready(settings, own.denoiser, replace(own.plan, batch_sizes=(n,), unroll=UNROLL, compile=how), own.model)
    inputs = own.inputs(n)._replace(guidance=torch.full((n,), GUIDANCE, device=settings.device))
    work = Work((SAMPLERS.get(name, "DPMSolverMultistep"),) * n, STEPS, inputs, TOLERANCE)
    eager = DiffusersRows("cloned-deepcopy/eager", work, cloned_deepcopy, own.denoiser)
    work.settle(eager)
    trees, arms = f"cloned-deepcopy/{TREES[how]}", list[Arm]([eager])
    unsupported: dict[str, str] = {}
    if not settings.on_cuda:
        unsupported = dict.fromkeys(("cloned-deepcopy/compiled", trees, *CUDA_ARMS, ModelAlone.name), NEEDS_CUDA)
    elif own.plan.regional:
        unsupported[trees] = "compiled by region, every call of a block would be a graph of its own"
        unsupported["tensorized/loop-graph"] = "a row of so large a model is far longer than its launch"
    if settings.on_cuda:
        model = _compiled_model(own, n, how)
        yield _built("cloned-deepcopy/compiled", Built(compile_s=_first_call(lambda: model(*work.inputs))))
        yield from ready.build()
        alone = ModelAlone(model, own.denoiser, work.inputs)
        yield _built(alone.name, alone.capture(n))
        arms += [DiffusersRows("cloned-deepcopy/compiled", work, cloned_deepcopy, model), alone]
    arms += ready.arms(work)
    title = {"model": own.name, "compile": how}
    rows = title | measure_rows(arms, work, PAIRS, settings.rule, unsupported)
    yield rows
    timed = [(arms, work, rows)]
    if settings.on_cuda and trees not in unsupported:
        marked = _with_trees(own.denoiser, TREES[how])
        yield _built(trees, Built(compile_s=_first_call(lambda: marked(*work.inputs))))
        by_itself = DiffusersRows(trees, work, cloned_deepcopy, marked)
        arms = [eager, by_itself, *(arm for arm in arms if arm.name == "tensorized/step-graph")]
        pairs = [("cloned-deepcopy/eager", trees), (trees, "tensorized/step-graph")]
        rows = title | measure_rows(arms, work, pairs, settings.rule)
        yield rows
        timed.append(([by_itself], work, rows))
    yield ready.profile([*own.model.parameters(), *own.model.buffers()])
    if settings.on_cuda:
        yield from (observe(*one) for one in timed)


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
        """Compile, then capture one row and `UNROLL` rows of the compiled step."""
        slots = Slots(self._plan, self._settings.device, planar=True)
        steps = Steps(self._denoiser, slots, "compiled", self._model)
        step = partial(steps, self._n)
        compile_s = _first_call(step)
        yield _built("tensorized/compiled", Built(compile_s=compile_s))
        self._modes["tensorized/compiled"] = slots, step, 1
        for name, unroll in (("tensorized/step-graph", 1), ("tensorized/loop-graph", self._plan.unroll)):
            if unroll > 1 and self._plan.regional:
                continue
            graphs = StepGraphs(self._settings.device, unroll)
            graphs.capture(self._n, step)
            yield _built(name, graphs.built[self._n])
            self._modes[name] = slots, partial(graphs.replay, self._n), unroll

    def arms(self, work: Work) -> list[SlotRows]:
        """An arm for each mode that is built."""
        return [SlotRows(name, work, slots, step, unroll) for name, (slots, step, unroll) in self._modes.items()]


def _built(arm: str, built: Built) -> Entry:
    return {"kind": "built", "arm": arm, **asdict(built)}


def _first_call(work: Callable[[], object]) -> float:
    """Seconds of a call that compiles."""
    started = time.perf_counter()
    work()
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


def graph_memory(settings: Settings, name: str) -> Iterator[Entry]:
    """VRAM from load to release, and what each batch size's graph adds. Eager kernels: compiling them takes minutes."""
    settings.require_cuda()
    yield _phase(settings, "nothing")
    own = geometry(f"tiny-{name}" if settings.tiny else name, settings.device, torch.bfloat16)
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
    _collect()
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
        "sizes": {str(n): asdict(built) for n, built in sorted(steps.built.items())},
    }
    for n in plan.batch_sizes * 20:
        steps(n)
    yield _phase(settings, "steady: 20 replays of every size")
    steps.close()
    del steps, slots
    _collect()
    yield _phase(settings, "graphs and slots released")


def _collect() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def _phase(settings: Settings, name: str) -> Entry:
    """Bytes at this point, and torch's peak since the last."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info(settings.device)
    entry = {
        "kind": "phase",
        "phase": name,
        "allocated_bytes": torch.cuda.memory_allocated(settings.device),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(settings.device),
        "reserved_bytes": torch.cuda.memory_reserved(settings.device),
        "driver_bytes": total - free,
    }
    torch.cuda.reset_peak_memory_stats(settings.device)
    return entry


def ownership_memory(settings: Settings) -> Iterator[Entry]:
    """Device bytes that each ownership of a scheduler holds before, during and after a request, by torch's allocator.

    bfloat16 latents. A sample is its caller's and not counted; in a slot it is a part of the slot, and counted.
    """
    settings.require_cuda()
    for title, shape in SHAPES.items():
        samplers = NULL_SAMPLERS[:3] if len(shape) == 3 else ("FlowMatchEuler", "DPMSolverMultistep")
        for sampler in samplers:
            _scheduler_held(settings, scheduler_class(sampler)(), cloned_deepcopy, shape)  # libraries take workspaces
            for ownership, owner in (
                ("shared", shared), ("cloned-deepcopy", cloned_deepcopy), ("cloned-shallow", cloned_shallow),
            ):  # fmt: skip
                held = _scheduler_held(settings, scheduler_class(sampler)(), owner, shape)
                yield {"kind": "ownership", "shape": title, "sampler": sampler, "ownership": ownership, **held}
            held = _slot_held(settings, scheduler_class(sampler)(), shape)
            yield {"kind": "ownership", "shape": title, "sampler": sampler, "ownership": "tensorized", **held}


def _scheduler_held(settings: Settings, template: Any, owner: Callable[[Any], Any], shape: tuple[int, ...]) -> Entry:
    bytes_now = partial(torch.cuda.memory_allocated, settings.device)
    _collect()
    nothing = bytes_now()
    scheduler = owner(template)
    set_timesteps(scheduler, STEPS, settings.device)
    before, during = bytes_now() - nothing, 0
    sample = torch.randn(1, *shape, device=settings.device, dtype=torch.bfloat16) * init_noise_sigma(scheduler)
    sample_bytes = bytes_now() - nothing - before
    for timestep in list(scheduler.timesteps):
        output = torch.randn_like(scale_model_input(scheduler, sample, timestep))  # a tensor of its own, as a model's
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
        del output
        during = max(during, bytes_now() - nothing - sample_bytes)
    del scheduler, sample, timestep
    gc.collect()
    return {"before_bytes": before, "during_bytes": during, "after_bytes": bytes_now() - nothing}


def _slot_held(settings: Settings, template: Any, shape: tuple[int, ...]) -> Entry:
    bytes_now = partial(torch.cuda.memory_allocated, settings.device)
    table = tabulate(template, STEPS)
    plan = CapturePlan(
        latent_shape=shape, dtype=torch.bfloat16, batch_sizes=(1,), memory=table.memory, rows=len(table),
        draws=table.max_draws,
    )  # fmt: skip
    _collect()
    nothing = bytes_now()
    slots = Slots(plan, settings.device)
    before, during = bytes_now() - nothing, 0
    sample = torch.randn(*shape, device=settings.device, dtype=torch.bfloat16)
    slots.load(0, RequestState(request=None, table=table, latents=table.init(sample * table.init_noise_sigma)))
    del sample
    for _ in range(len(table)):
        denoise_step(null_model, slots.batch(1))
        during = max(during, bytes_now() - nothing)
    slots.park(0)
    return {"before_bytes": before, "during_bytes": during, "after_bytes": bytes_now() - nothing}


# Start-up


def starts(settings: Settings, name: str) -> Iterator[Entry]:
    """Two processes that ready the same step graph, sharing the compiler's cache, which is empty at first."""
    settings.require_cuda()
    code = "import sys; from fastdiff.bench.gpu_cells import start; start(*sys.argv[1:])"
    asked = f"tiny-{name}" if settings.tiny else name
    with tempfile.TemporaryDirectory() as cache:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_CACHE_DIR"}
        environment["TORCHINDUCTOR_CACHE_DIR"] = cache
        for which in ("cold", "warm"):
            started = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", code, asked, str(settings.device)], env=environment, capture_output=True,
                text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"the {which} start failed: {done.stderr.strip().splitlines()[-1]}")
            process_s = time.perf_counter() - started
            printed = json.loads(done.stdout.splitlines()[-1])
            yield {"kind": "start", "model": asked, "start": which, "process_s": process_s, **printed}


def start(name: str, device: str) -> None:
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
    sys.stdout.write(json.dumps({"load_s": load_s, "ready_s": ready_s, **asdict(steps.built[1])}) + "\n")
