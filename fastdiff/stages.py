"""The stages of a request: `(family, state) -> state`. What a request changes is in the state that comes back."""

from __future__ import annotations

import re
import weakref
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch

from fastdiff.families import Family
from fastdiff.noise import normal, row_noise, seeded
from fastdiff.probe import tabulate
from fastdiff.request import Request
from fastdiff.state import RequestState
from fastdiff.stepper import REFUSED, not_linear
from fastdiff.table import StepTable


def encode(family: Family, state: RequestState) -> RequestState:
    """The text stage: fills `conditioning`."""
    request = _asked(state)
    with torch.no_grad():
        conditioning = family.encode(request)
    return replace(
        state,
        conditioning=conditioning,
        guidance_scale=family.guidance(request),
        guidance_scale_2=family.guidance_2(request),
        dtype=family.latent_dtype,
    )


def schedule(family: Family, state: RequestState) -> RequestState:
    """The schedule stage: fills `table`. A state that has one keeps it: a prepared request is never prepared again."""
    if state.table is not None:
        return state
    return replace(state, table=table_of(family, _asked(state)))


def prepare_latents(family: Family, state: RequestState) -> RequestState:
    """The latents stage: draws the first noise from the request's own generator and scales it."""
    if state.table is None:
        raise ValueError("expected a scheduled state, got one without a table; run the schedule stage first")
    request = _asked(state)
    generator = seeded(request.seed)
    if request.latents is None:
        sample = family.noise(lambda shape: normal(generator, shape, family.latent_dtype, family.device))
    else:
        sample = request.latents.to(family.device, family.latent_dtype)
    latents = state.table.init(sample * state.table.init_noise_sigma)
    return replace(state, generator=generator, latents=latents, row=0)


def denoise(family: Family, state: RequestState, rows: int | None = None) -> RequestState:
    """The denoise stage, for one request and in plain sight: the reference that sessions are compared with.

    Runs the next `rows` rows, all that are left if None.
    """
    state = state.fork()
    table, latents = state.prepared
    conditioning = {name: tensor[None] for name, tensor in state.conditioning.items()}
    second = state.guidance_scale if state.guidance_scale_2 is None else state.guidance_scale_2
    by_segment = [[state.guidance_scale], [second]]
    guidance = torch.tensor(by_segment, dtype=torch.float32, device=latents.device)
    boundary = family.boundary(table)
    end = len(table) if rows is None else min(len(table), state.row + rows)
    with torch.no_grad():
        for row in range(state.row, end):
            noise = []
            if table.draws[row]:
                if state.generator is None:
                    raise ValueError(f"{table.source} draws noise at row {row}, and the state has no generator")
                noise = row_noise(state.generator, table.draws[row], latents.shape[1:], state.dtype, latents.device)
            sample = table.model_input(row, latents).to(family.dtype)[None]
            timestep = table.timesteps[row : row + 1].to(latents.device, torch.float32)
            segment = int(row >= boundary)
            model_output = family.denoisers[segment](sample, timestep, conditioning, guidance[segment])[0]
            latents = table.advance(row, latents, model_output, noise)
    return replace(state, latents=latents, row=end)


def decode(family: Family, state: RequestState) -> RequestState:
    """The image stage: fills `image`."""
    with torch.no_grad():
        return replace(state, image=family.decode(state.sample))


def table_of(family: Family, request: Request) -> StepTable:
    """The request's step table, from its own scheduler, the one that it names, or the pipeline's."""
    scheduler = scheduler_of(family.scheduler, request.scheduler)
    return tabulate(scheduler, **family.schedule(request, scheduler))


def scheduler_of(template: Any, wanted: Any) -> Any:
    """`wanted` if it is a scheduler, `template` if None; a name is made from the template's config, once for each."""
    if wanted is None:
        return template
    if not isinstance(wanted, str):
        return wanted
    named = _named.setdefault(template, {})
    config, made = named.get(wanted, (None, None))
    if config is not template.config:  # which register_to_config replaces
        config, made = named[wanted] = template.config, scheduler_class(wanted).from_config(template.config)
    return made


_named: weakref.WeakKeyDictionary[Any, dict[str, tuple[Any, Any]]] = weakref.WeakKeyDictionary()


def scheduler_class(name: str) -> Any:
    """The diffusers class by its name, with or without `Scheduler` and `Discrete`.

    Raises ValueError with the nearest names for an unknown one, all of them where none is near; NotLinear for one that
    has no table.
    """
    import diffusers

    refused = {_short(key): key for key in REFUSED}
    if _short(name) in refused:  # first: diffusers may hold but a stand-in for it that raises for want of torchsde
        why, instead = REFUSED[refused[_short(name)]]
        raise not_linear(refused[_short(name)], why, instead)
    classes = {_short(key): getattr(diffusers, key) for key in dir(diffusers) if key.endswith("Scheduler")}
    usable = {short: cls for short, cls in classes.items() if issubclass(cls, diffusers.SchedulerMixin)}
    usable = {short: cls for short, cls in usable.items() if cls.__name__ not in REFUSED}
    if _short(name) not in usable:
        spelled = {short.lower(): short for short in sorted(usable)}
        asked = re.sub("[^a-z0-9]", "", name.lower()).removesuffix("scheduler").removesuffix("discrete")
        near = [short for short in spelled if short.startswith(asked)]
        near = near or [short for short in spelled if short[:3] == asked[:3]]  # papers say "DPM++ 2M"
        near = near or get_close_matches(asked, spelled)
        such = "diffusers' schedulers, such as " if near else ""
        names = ", ".join(spelled[short] for short in near or spelled)
        raise ValueError(f"scheduler: expected one of {such}{names}; got {name!r}")
    return usable[_short(name)]


def _short(name: str) -> str:
    return name.removesuffix("Scheduler").removesuffix("Discrete")


def _asked(state: RequestState) -> Request:
    if state.request is None:
        raise ValueError("expected a state with its request, got one that was loaded from a file")
    return state.request
