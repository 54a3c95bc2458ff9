"""How a diffusers scheduler is walked: its schedule, a pristine copy, its step(); and which are refused, and why."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastdiff.errors import NotLinear
from fastdiff.fingerprint import is_latent, is_scheduler

_BROWNIAN = (
    "its noise comes from a Brownian tree over sigmas, not from a generator",
    "DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++' draws ordinary noise",
)
_TOKENS = ("it samples discrete tokens, not latents", "run its own pipeline")
_ARGUMENTS = ("its step() needs tensors beyond the sample and the model output", "step it directly")

REFUSED: dict[str, tuple[str, str]] = {
    "DPMSolverSDEScheduler": _BROWNIAN,
    "CosineDPMSolverMultistepScheduler": _BROWNIAN,
    "AmusedScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "ScoreSdeVeScheduler": ("its corrector divides by norms of latents", "EulerAncestralDiscreteScheduler"),
    "CogVideoXDPMScheduler": (
        "its step() takes the previous x0 as an argument and draws noise that it throws away",
        "CogVideoXDDIMScheduler",
    ),
    "RePaintScheduler": _ARGUMENTS,
    "HeliosDMDScheduler": ("its step() takes the re-noising tensors as arguments", "fastdiff.renoise"),
    "PiflowScheduler": ("its model output holds one latent per policy grid point", "step it directly"),
    "RFD4ProteinaScheduler": _ARGUMENTS,
    "KarrasVeScheduler": ("its step() takes sigmas and adds noise in a call of its own", "HeunDiscreteScheduler"),
    "DDPMWuerstchenScheduler": ("its step() takes a timestep per sample", "DDPMScheduler"),
    "ScoreSdeVpScheduler": ("it has step_pred() and no step()", "DDPMScheduler"),
}

_OPTIONAL = ("num_inference_steps", "timesteps", "sigmas", "mu")
_RESERVED = ("generator", "return_dict", "model_output", "timestep", "sample", "variance_noise", "device")


def not_linear(subject: str, why: str, instead: str) -> NotLinear:
    """The one form of a refusal: who, why, and what to use instead."""
    return NotLinear(f"{subject} is not a table: {why}. Use instead: {instead}.")


def check_scheduler(scheduler: Any) -> None:
    """Raise TypeError for what is no scheduler, NotLinear for one whose class has no table."""
    name = type(scheduler).__name__
    if isinstance(scheduler, type) and is_scheduler(scheduler):
        own = scheduler.__name__
        raise TypeError(f"expected a diffusers scheduler, got the class {own}; {own}() makes a scheduler of it")
    for cls in type(scheduler).__mro__:
        if cls.__name__ in REFUSED:
            why, instead = REFUSED[cls.__name__]
            raise not_linear(name, why, instead)
        if "step" in vars(cls):
            break  # of its own, or of one that is not refused
    if not is_scheduler(scheduler):
        raise TypeError(f"expected a diffusers scheduler, got {name}")


@dataclass(frozen=True)
class Schedule:
    """The arguments of one tabulation, sorted by the method that takes them."""

    set_timesteps: dict[str, Any]
    step: dict[str, Any]
    begin_index: int

    @classmethod
    def of(cls, scheduler: Any, begin_index: int, named: dict[str, Any]) -> Schedule:
        """Sorts `named`; one of diffusers' pipelines' own four that is None was not given."""
        name = type(scheduler).__name__
        schedule_names, step_names = _named_parameters(scheduler.__class__)
        to_set_timesteps: dict[str, Any] = {}
        to_step: dict[str, Any] = {}
        for key, value in named.items():
            if value is None and key in _OPTIONAL:
                continue
            if key in _RESERVED or (key not in schedule_names and key not in step_names):
                offered = sorted((schedule_names | step_names) - set(_RESERVED) - {"num_inference_steps"})
                raise TypeError(f"{name} takes no {key!r}; it takes {', '.join(offered)}")
            if key not in schedule_names and isinstance(value, (Tensor, np.ndarray)) and value.ndim:
                raise not_linear(f"{name} with {key}", "rows hold numbers, not tensors", f"it without {key}")
            (to_set_timesteps if key in schedule_names else to_step)[key] = value
        if operator.index(begin_index) < 0:
            raise ValueError(f"begin_index: expected an integer >= 0, got {begin_index!r}")
        return cls(to_set_timesteps, to_step, operator.index(begin_index))


@cache
def _named_parameters(cls: Any) -> tuple[frozenset[str], frozenset[str]]:
    """The parameter names of a scheduler class's `set_timesteps` and `step`; inspect.signature costs 20 us a call."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

    def of(method: Any) -> frozenset[str]:
        return frozenset(key for key, p in inspect.signature(method).parameters.items() if p.kind in named) - {"self"}

    return of(cls.set_timesteps), of(cls.step)


def pristine(scheduler: Any) -> Any:
    """A copy to step: without its latents, on the CPU, its config attributes reset to the config's items.

    Not `from_config`, which loses `set_shift` and edited alphas; and not a plain deepcopy, which keeps what an earlier
    `set_timesteps(mu=)` wrote into the config's attributes.
    """
    copied = copy.copy(scheduler)
    for key, value in vars(scheduler).items():
        setattr(copied, key, _pristine_value(value))
    return copied


def _pristine_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return None if is_latent(value) else value.detach().to("cpu", copy=True)
    if type(value) in (list, tuple):
        return type(value)(map(_pristine_value, value))
    if type(value) is dict:
        return {key: _pristine_value(item) for key, item in value.items()}
    if is_scheduler(value):
        return pristine(value)
    if type(value).__name__ == "FrozenDict":
        return type(value)(copy.deepcopy(dict(value)))
    return copy.deepcopy(value)


@dataclass(frozen=True)
class _Latent:
    """A latent-shaped tensor inside a scheduler: where it is, and how to replace it."""

    path: str
    value: Tensor
    put: Callable[[Tensor], None]


def latents_in(holder: Any, shape: torch.Size, prefix: str = "") -> Iterator[_Latent]:
    """Every tensor of `shape` in the scheduler's attributes, its lists and its nested schedulers, in a fixed order."""
    if isinstance(holder, (list, dict)):
        entries = list(enumerate(holder) if isinstance(holder, list) else holder.items())
        for key, value in entries:

            def put_item(tensor: Tensor, key: Any = key) -> None:
                holder[key] = tensor

            yield from _latent_or_inside(value, shape, f"{prefix}[{key!r}]", put_item)
    else:
        for key, value in list(vars(holder).items()):

            def put_attribute(tensor: Tensor, key: str = key) -> None:
                setattr(holder, key, tensor)

            yield from _latent_or_inside(value, shape, f"{prefix}.{key}".lstrip("."), put_attribute)


def _latent_or_inside(value: Any, shape: torch.Size, path: str, put: Callable[[Tensor], None]) -> Iterator[_Latent]:
    if isinstance(value, Tensor):
        if value.shape == shape:
            yield _Latent(path, value, put)
    elif type(value) in (list, dict) or is_scheduler(value):
        yield from latents_in(value, shape, path)


class Stepper:
    """A pristine scheduler after `set_timesteps`, and the one way in which its rows are walked."""

    def __init__(self, scheduler: Any, schedule: Schedule) -> None:
        self.name = type(scheduler).__name__
        self.scheduler = pristine(scheduler)
        self.step_kwargs = dict(schedule.step)
        if getattr(self.scheduler.config, "variance_type", None) in ("learned", "learned_range"):
            default = inspect.signature(type(scheduler)).parameters["variance_type"].default
            raise not_linear(
                f"{self.name} with variance_type={self.scheduler.config.variance_type!r}",
                "the model predicts the variance",
                f"variance_type={default!r}",
            )
        set_timesteps = dict(schedule.set_timesteps)
        if "device" in _named_parameters(scheduler.__class__)[0]:
            set_timesteps["device"] = "cpu"
        self.scheduler.set_timesteps(**set_timesteps)
        if not len(self.scheduler.timesteps):
            raise ValueError(f"{self.name} makes no row of this schedule: {schedule.set_timesteps}")
        if schedule.begin_index >= len(self.scheduler.timesteps):
            raise ValueError(
                f"begin_index: expected less than the schedule's {len(self.scheduler.timesteps)} rows, "
                f"got {schedule.begin_index}"
            )
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(schedule.begin_index)
        self.timesteps = self.scheduler.timesteps[schedule.begin_index :]
        if hasattr(self.scheduler, "get_lms_coefficient"):
            self.scheduler.get_lms_coefficient = _unwatched(self.scheduler.get_lms_coefficient)
        self.takes_return_dict = "return_dict" in inspect.signature(self.scheduler.step).parameters

    def refuse(self, why: str) -> NotLinear:
        """The refusal of this scheduler, with the option to do without where one explains it."""
        options = ("thresholding", "scale_factors", "clip_sample")
        chosen = [option for option in options if getattr(self.scheduler.config, option, None)]
        return not_linear(self.name, why, f"the same without {chosen[0]}" if chosen else "its own step()")

    def scale(self, sample: Tensor, timestep: Tensor) -> Tensor:
        if not hasattr(self.scheduler, "scale_model_input"):
            return sample
        return self.scheduler.scale_model_input(sample, timestep)  # type: ignore[no-any-return]

    def step(
        self, sample: Tensor, timestep: Tensor, model_output: Tensor, scheduler: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """The next sample, and the x0 prediction if the output carries one; of a fork where one is given."""
        scheduler = scheduler or self.scheduler
        if self.takes_return_dict:
            output = scheduler.step(model_output, timestep, sample, **self.step_kwargs, return_dict=True)
        else:
            output = scheduler.step(model_output, timestep, sample, **self.step_kwargs)
        if isinstance(output, tuple):
            return output[0], None
        x0 = getattr(output, "pred_original_sample", None)
        return output.prev_sample, x0 if x0 is not None else getattr(output, "denoised", None)


def _unwatched(coefficient: Callable[..., float]) -> Callable[..., float]:
    """A number by numerical integration: thousands of operations, none on a latent, so none need be intercepted."""

    def computed(*args: Any, **kwargs: Any) -> float:
        with _disable_current_modes():
            return coefficient(*args, **kwargs)

    return computed


def fork(scheduler: Any) -> Any:
    """A copy whose next step leaves the original alone: attributes and lists copied, tensors shared."""
    forked = copy.copy(scheduler)
    for key, value in vars(scheduler).items():
        if type(value) is list:
            setattr(forked, key, list(value))
        elif is_scheduler(value):
            setattr(forked, key, fork(value))
    return forked


@contextmanager
def plain_torch() -> Iterator[None]:
    """No autograd and new tensors on the CPU, whatever the caller's thread has set."""
    on_cpu = torch.get_default_device().type == "cpu"  # torch.device() as a context costs 3 us an operation
    with torch.inference_mode(False), torch.no_grad(), nullcontext() if on_cpu else torch.device("cpu"):
        yield
