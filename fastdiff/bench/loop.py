"""The loop around a scheduler of diffusers as its pipelines and SGLang's stages run it, and who owns the scheduler."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Owning a scheduler


def shared(template: Any) -> Any:
    """The template itself: SGLang's sequential path (`get_or_create_request_scheduler` with isolate=False)."""
    return template


def cloned_deepcopy(template: Any) -> Any:
    """SGLang's `clone_scheduler_runtime` (diffusion_scheduler_utils.py) and vLLM-Omni's per-request scheduler."""
    return copy.deepcopy(template)


def cloned_shallow(template: Any) -> Any:
    """The best possible clone: tables shared, lists copied because schedulers append to them in place."""
    clone = copy.copy(template)
    for key, value in vars(template).items():
        if isinstance(value, list):
            setattr(clone, key, list(value))
    return clone


OWNERS: dict[str, Callable[[Any], Any]] = {
    "shared": shared,
    "cloned-deepcopy": cloned_deepcopy,
    "cloned-shallow": cloned_shallow,
}


# Stepping it


class Loop:
    """The rows of one request, or of several alike, on one scheduler: prepared, begun, then a model output a row.

    `asked` holds arguments of `set_timesteps` (`num_inference_steps`, `mu`) and of `step` (`eta`).
    """

    def __init__(
        self, scheduler: Any, device: torch.device, generator: torch.Generator | None = None, **asked: Any
    ) -> None:
        self.scheduler = scheduler
        takes = _parameters(type(scheduler).step)  # of which `prepare_extra_step_kwargs` passes what is asked for
        self._options = {name: value for name, value in {**asked, "generator": generator}.items() if name in takes}
        set_timesteps(scheduler, device, **{name: value for name, value in asked.items() if name not in takes})
        self.timesteps = list(scheduler.timesteps)  # the request's own, whatever happens to a shared scheduler
        self.sample = torch.empty(0)
        self.row = 0

    def begin(self, noise: Tensor) -> None:
        """Scale the first noise [n, ...]; flow matching schedulers do not say by what."""
        self.sample = noise * float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    @property
    def unfinished(self) -> bool:
        """Whether rows are left."""
        return self.row < len(self.timesteps)

    def model_input(self) -> Tensor:
        """What the model sees next [n, ...]; flow matching schedulers have no method for it."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return self.sample
        scaled: Tensor = self.scheduler.scale_model_input(self.sample, self.timesteps[self.row])
        return scaled

    def advance(self, model_output: Tensor) -> None:
        """One `step()` on the guided model output [n, ...]."""
        timestep = self.timesteps[self.row]
        self.sample = self.scheduler.step(model_output, timestep, self.sample, **self._options, return_dict=False)[0]
        self.row += 1


@cache
def _parameters(step: Callable[..., Any]) -> Collection[str]:
    return inspect.signature(step).parameters.keys()


def set_timesteps(scheduler: Any, device: torch.device, **asked: Any) -> None:
    """`set_timesteps`, and the begin index where there is one: SDXL's and Flux's pipelines and SGLang set it, and it
    saves the search for the first timestep."""
    scheduler.set_timesteps(**asked, device=device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
