"""The ways of owning a scheduler, each as a host would run it, over one model that they all share."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdiff import stages
from fastdiff.bench.loop import OWNERS, Loop, shared
from fastdiff.bench.measure import Block, Sample, Stopwatch
from fastdiff.bench.suite import split
from fastdiff.capture import Mode, compiled
from fastdiff.denoiser import Denoiser
from fastdiff.families import Family, family_of
from fastdiff.noise import normal, seeded
from fastdiff.request import Request
from fastdiff.runtime import Runtime
from fastdiff.state import RequestState

Result = TypeVar("Result")

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SAMPLER_OPTIONS = {"PNDM": {"skip_prk_steps": True}}  # as Stable Diffusion ships it; with them PNDM holds 6 latents


class Workbench:
    """The model, one scheduler template per sampler, and whatever was compiled or built once for all cases."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.family: Family = family_of(pipe)
        self.device = self.family.device
        self.compile_s: dict[str, float] = {}
        self.compile_cache: dict[str, str] = {}  # whether the disk's cache had it: warm or cold
        self._templates: dict[str, Any] = {}
        self._compiled: dict[int, Denoiser] = {}
        self._runtimes: dict[tuple[Mode, int], Runtime] = {}

    def template(self, sampler: str) -> Any:
        """The scheduler that all requests for `sampler` share, clone or tabulate."""
        if sampler not in self._templates:
            options = SAMPLER_OPTIONS.get(sampler, {})
            cls = stages.scheduler_class(sampler)
            known = {*inspect.signature(cls).parameters, "_use_default_values"}  # the rest from_config warns about
            config = {key: value for key, value in self.pipe.scheduler.config.items() if key in known}
            self._templates[sampler] = cls.from_config(config, **options)
        return self._templates[sampler]

    def stopwatch(self) -> Stopwatch:
        """A stopwatch that waits for the model's device."""
        return Stopwatch(self.device)

    def runtime(self, mode: Mode, batch: int) -> Runtime:
        """A runtime with `batch` slots; compiled or captured, it runs at that one size."""
        key = (mode, batch)
        if key not in self._runtimes:
            sizes = tuple(range(1, batch + 1)) if mode == "eager" else (batch,)
            self._runtimes[key] = Runtime(self.pipe, batch, mode, batch_sizes=sizes)
        return self._runtimes[key]

    def denoiser(self, mode: Mode, batch: int) -> Denoiser:
        """The denoiser that the runtime calls, eager, or compiled alone for one batch size."""
        if mode == "eager":
            return self.family.denoiser
        if batch not in self._compiled:
            # The same forward at the same batch as fastdiff compiles, with the same settings, guards dropped included.
            def denoiser(*inputs: Any) -> Tensor:
                return self.family.denoiser(*inputs)

            self._compiled[batch] = compiled(denoiser, f"denoiser_{batch}", "default")
        return self._compiled[batch]

    def first_call(self, what: str, arm: str, call: Callable[[], Result]) -> Result:
        """What the first call returns; its time, and its cache, are recorded where `arm` has `what` compiled by it."""
        if split(arm)[1] != "compiled" or what in self.compile_s:
            return call()
        before, started = _cache_hits(), time.perf_counter()
        result = call()
        self.compile_s[what] = time.perf_counter() - started
        self.compile_cache[what] = "warm" if _cache_hits() > before else "cold"
        return result


def _cache_hits() -> int:
    """How many graphs of this process inductor found on the disk."""
    from torch._dynamo.utils import counters  # a second's import, for what compiles

    return int(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"])


def requests_of(
    bench: Workbench,
    samplers: Sequence[str],
    steps: Sequence[int],
    guidance: Sequence[float],
    count: int,
    seed: int,
) -> list[Request]:
    """`count` requests: prompts, seeds, samplers, steps and guidance dealt out in turn."""
    return [
        Request(
            prompt=f"a handwritten {DIGITS[i % len(DIGITS)]}",
            steps=steps[i % len(steps)],
            guidance_scale=guidance[i % len(guidance)],
            seed=seed + i,
            scheduler=bench.template(samplers[i % len(samplers)]),
        )
        for i in range(count)
    ]


ARM_OWNERS = OWNERS | dict.fromkeys(("shared-sequential", "shared-locked", "shared-racing"), shared)


# Running requests on schedulers of diffusers


class Run:
    """One request on one diffusers scheduler, prepared as diffusers' pipelines and SGLang's stages prepare it."""

    def __init__(self, family: Family, request: Request, scheduler: Any) -> None:
        generator = seeded(request.seed)
        self.loop = Loop(scheduler, family.device, generator, **family.schedule(request, scheduler))
        self.conditioning = {name: tensor[None] for name, tensor in family.encode(request).items()}
        self.guidance = torch.tensor([family.guidance(request)], device=family.device)
        noise = family.noise(lambda shape: normal(generator, shape, family.latent_dtype, family.device))
        self.loop.begin(noise[None])


def alone(
    family: Family, request: Request, owner: Callable[[], Any], watch: Stopwatch
) -> Generator[None, None, Tensor]:
    """One request at batch 1, pausing after each row so that a driver may interleave others; the image.

    `owner` is asked when the request starts, not before: a clone is taken of the template as it is then.
    """
    run = Run(family, request, owner())
    loop = run.loop
    with watch:  # the whole loop: on a device each watch waits for it, and no other arm waits once a row
        while loop.unfinished:
            timestep = loop.timesteps[loop.row].float()[None]
            output = family.denoiser(loop.model_input(), timestep, run.conditioning, run.guidance)
            loop.advance(output.to(family.dtype))
            yield
    return family.decode(loop.sample[0])


def finish(running: Generator[None, None, Tensor]) -> Tensor:
    """Drive a request to its image."""
    while True:
        try:
            next(running)
        except StopIteration as finished:
            return finished.value  # type: ignore[no-any-return]  # typeshed has Any here


def round_robin(running: Sequence[Generator[None, None, Tensor]]) -> list[Tensor | Exception]:
    """Drive requests a row each in turn: what unlocked concurrent callers do, made deterministic."""
    outcomes: dict[int, Tensor | Exception] = {}
    while len(outcomes) < len(running):
        for index, one in enumerate(running):
            if index in outcomes:
                continue
            try:
                next(one)
            except StopIteration as finished:
                outcomes[index] = finished.value
            except Exception as error:  # whatever a shared scheduler raises is the result
                outcomes[index] = error
    return [outcomes[index] for index in range(len(running))]


def served_in_turn(
    bench: Workbench, owner: Callable[[Any], Any], requests: Sequence[Request], watch: Stopwatch
) -> list[Tensor]:
    """One request after another: a sequential host, and concurrent callers that queue for one locked scheduler.

    One thread does it: which caller waits makes no difference to what is computed, and each further thread would bring
    workers of its own, with which OpenMP slows down every other arm of the run.
    """
    return [finish(alone(bench.family, request, partial(owner, request.scheduler), watch)) for request in requests]


def together(
    family: Family,
    denoiser: Denoiser,
    requests: Sequence[Request],
    owner: Callable[[Any], Any],
    watch: Stopwatch,
    *,
    padded: bool,
) -> list[Tensor]:
    """One batched model call per row, then each request's own scheduler stepped in Python (vLLM-Omni's loop).

    `padded` keeps finished requests in the batch, for a model compiled at one size.
    """
    runs = [Run(family, request, owner(request.scheduler)) for request in requests]
    with watch:
        batch: list[Run] = []
        while active := [run for run in runs if run.loop.unfinished]:
            members = runs if padded else active
            if members != batch:
                batch = list(members)
                conditioning = {
                    name: torch.cat([run.conditioning[name] for run in batch]) for name in batch[0].conditioning
                }
                guidance = torch.cat([run.guidance for run in batch])
            loops = [run.loop for run in batch]
            inputs = torch.cat([loop.model_input() if loop.unfinished else loop.sample for loop in loops])
            timesteps = torch.stack([loop.timesteps[min(loop.row, len(loop.timesteps) - 1)].float() for loop in loops])
            outputs = denoiser(inputs, timesteps, conditioning, guidance).to(family.dtype)
            for loop, output in zip(loops, outputs.split(1), strict=True):
                if loop.unfinished:
                    loop.advance(output)
    return [family.decode(run.loop.sample[0]) for run in runs]


def pipeline(bench: Workbench, requests: Sequence[Request]) -> list[Tensor]:
    """diffusers' own `__call__`, one request after another."""
    pipe, own, images = bench.pipe, bench.pipe.scheduler, []
    try:
        for request in requests:
            pipe.scheduler = request.scheduler
            output = pipe(
                request.prompt,
                num_inference_steps=request.steps,
                **{bench.family.scale_name: request.guidance_scale},
                generator=seeded(request.seed),
                output_type="pt",
            )
            images.append(output.images[0].float().cpu())
    finally:
        pipe.scheduler = own
    return images


# Running requests on fastdiff


def served(runtime: Runtime, states: Sequence[RequestState], watch: Stopwatch) -> list[RequestState]:
    """A host's own loop over a session: all states in the batch, a row each per step."""
    with runtime.session() as session, watch:
        slots = [session.add(state) for state in states]
        while len(session.step()) < len(slots):
            pass
        return [session.take(slot) for slot in slots]


def tensorized(runtime: Runtime, requests: Iterable[Request], watch: Stopwatch) -> list[Tensor]:
    """All requests in the batch, text to pixels."""
    states = [runtime.prepare(request) for request in requests]
    return [
        image
        for state in served(runtime, states, watch)
        if (image := stages.decode(runtime.family, state).image) is not None
    ]


def images_of(
    bench: Workbench, arm: str, requests: Sequence[Request], sequential: bool, watch: Stopwatch
) -> list[Tensor]:
    """One pass of `arm` ("<arm>/<mode>") over the requests, text to pixels."""
    name, mode = split(arm)
    if name == "pipeline":
        return pipeline(bench, requests)
    if name == "tensorized":
        if sequential:
            runtime = bench.runtime(mode, 1)
            return [image for request in requests for image in tensorized(runtime, [request], watch)]
        return tensorized(bench.runtime(mode, len(requests)), requests, watch)
    owner = ARM_OWNERS[name]
    if sequential or owner is shared:
        return served_in_turn(bench, owner, requests, watch)
    denoiser = bench.denoiser(mode, len(requests))
    return together(bench.family, denoiser, requests, owner, watch, padded=mode == "compiled")


def interleaved(bench: Workbench, arm: str, requests: Sequence[Request]) -> list[Tensor | Exception]:
    """Concurrent requests a row each in turn, each request's image or what it raised."""
    if arm == "tensorized":
        return list(tensorized(bench.runtime("eager", len(requests)), requests, bench.stopwatch()))
    owner = ARM_OWNERS[arm]
    if arm == "shared-locked":
        return list(served_in_turn(bench, owner, requests, bench.stopwatch()))
    return round_robin(
        [alone(bench.family, request, partial(owner, request.scheduler), bench.stopwatch()) for request in requests]
    )


def image_block(
    bench: Workbench, arm: str, requests: Sequence[Request], sequential: bool, lasts: list[Tensor] | None = None
) -> Block:
    """`images_of` as a timed block, which leaves its images in `lasts`."""

    def block() -> Sample:
        total, loop = bench.stopwatch(), bench.stopwatch()
        with torch.no_grad(), total:
            images = images_of(bench, arm, requests, sequential, loop)
        if lasts is not None:
            lasts[:] = images
        return Sample(total.seconds, loop.seconds or None, total.gpu_s)

    return block
