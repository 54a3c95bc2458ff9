"""What a user asks for and what comes back. Both frozen and host-only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import PlanMismatch

_DECIDES = {
    "latent_shape": "its height and width, and num_frames of a video",
    "conditioning": "its model, and its max_sequence_length where the pipeline takes one",
}
"""By field of a plan, what decides the shapes there."""

_TENSORS = (
    "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds", "latents",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One image or video to make. Needs a `prompt`, `prompt_embeds` or `class_label`; the rest has diffusers' default.

    `scheduler` is a diffusers scheduler, the name of one with or without `Scheduler` and `Discrete` ("Euler",
    "UniPCMultistep"), or None for the pipeline's; it is read and never changed. `timesteps` and `sigmas` are custom
    schedules in its terms, `scheduler_options` whatever else its `set_timesteps` and `step` take by name (`eta`,
    `s_churn`, `mu`). `guidance_scale` is the default of the pipeline's own call where it is None; 1 or less means no
    guidance, but to a model that takes it as an input.
    `seed` makes the initial latents and the step noise, in diffusers' order, so the same seed gives diffusers' image;
    `latents` replaces the first draw, in the shape that the family's latents have.
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    steps: int | None = None  # as many as the pipeline makes, 50 for most, unless timesteps or sigmas say otherwise
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None  # of the late rows, where these have a model of their own; None is the same
    guidance_rescale: float | None = None  # 0 to 1, SDXL's; None is 0
    seed: int = 0
    scheduler: Any = None
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    prompt_embeds: Tensor | None = None  # [L, D]
    negative_prompt_embeds: Tensor | None = None  # [L, D]
    pooled_prompt_embeds: Tensor | None = None  # [D], beside prompt_embeds where the pipeline has them
    negative_pooled_prompt_embeds: Tensor | None = None  # [D]
    class_label: int | str | None = None  # of a class-conditional model: its number or one of its words
    latents: Tensor | None = None  # [C, H, W] or packed, standard normal, not yet scaled

    def __post_init__(self) -> None:
        if sum(asked is not None for asked in (self.prompt, self.prompt_embeds, self.class_label)) != 1:
            raise ValueError("expected exactly one of prompt, prompt_embeds and class_label")
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if not isinstance(text, (str, NoneType)):
                raise ValueError(f"{name}: expected one text, got {text!r}; make a request of each")
            if text and not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ValueError(f"{name}: expected Unicode, got half a character, as of JSON cut in two: {text!r}")
        for name in _TENSORS:
            tensor = getattr(self, name)
            if tensor is not None and not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"{name}: expected a tensor of a floating dtype, got {got}; convert it to one")
        if isinstance(self.scheduler, type):
            raise ValueError(
                f"scheduler: expected a scheduler, its name or None, got a class; make one: {self.scheduler.__name__}()"
            )
        if not isinstance(self.scheduler_options, Mapping):
            raise ValueError(
                f"scheduler_options: expected a mapping of names to values, got {self.scheduler_options!r}; "
                "leave it out for none"
            )
        for name, value in self.scheduler_options.items():
            if value is None:
                raise ValueError(f"scheduler_options: expected a value for {name!r}, got None; leave it out for none")
        if not isinstance(self.class_label, (int, str, NoneType)):
            raise ValueError(f"class_label: expected an integer or a word, got {self.class_label!r}")
        if self.negative_prompt is not None and self.negative_prompt_embeds is not None:
            raise ValueError("expected at most one of negative_prompt and negative_prompt_embeds")
        for name in ("seed", "steps", "guidance_scale", "guidance_scale_2", "guidance_rescale"):
            number = getattr(self, name)
            if isinstance(number, np.number):  # as numpy's generators and pandas give them
                object.__setattr__(self, name, number.item())
        if self.steps is not None and (not _is_integer(self.steps) or self.steps < 1):
            raise ValueError(f"steps: expected an integer >= 1, got {self.steps!r}")
        if self.timesteps is not None and self.sigmas is not None:
            raise ValueError("expected at most one of timesteps and sigmas")
        for name in ("guidance_scale", "guidance_scale_2"):
            scale = getattr(self, name)
            if scale is not None and not is_scale(scale):
                raise ValueError(f"{name}: expected a finite number of float32, got {scale!r}")
        for pooled in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
            embeds = pooled.replace("pooled_", "")
            if getattr(self, pooled) is not None and getattr(self, embeds) is None:
                raise ValueError(f"{pooled}: expected {embeds} beside them, got none")
        phi = self.guidance_rescale
        if phi is not None and not (isinstance(phi, (int, float)) and 0 <= phi <= 1):
            raise ValueError(f"guidance_rescale: expected a number from 0 to 1, got {self.guidance_rescale!r}")
        if not _is_integer(self.seed) or not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed: expected a 64-bit integer, got {self.seed!r}")

    def check_tensors(self, room: str, **shapes: tuple[int, ...]) -> None:
        """Raise unless the request's own tensors, by field, have the shapes that the plan's `room` holds, and finite
        values."""
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise PlanMismatch(
                    f"{name}: expected shape {shape}, got {tuple(tensor.shape)}; the plan's {room} holds no other: "
                    f"bring it into that shape, or build the runtime for {_DECIDES[room.partition('.')[0]]}"
                )
            if tensor is not None and not torch.isfinite(tensor).all():
                raise ValueError(f"{name}: expected finite values, got NaN or infinity")

    def with_steps(self, default: int) -> Request:
        """This request, of `default` steps where it says nothing about its schedule."""
        unsaid = self.steps is None and self.timesteps is None and self.sigmas is None
        return replace(self, steps=default) if unsaid else self

    @property
    def schedule(self) -> dict[str, Any]:
        """The keyword arguments of `fastdiff.tabulate`."""
        if self.timesteps is None and self.sigmas is None:
            return {"num_inference_steps": self.steps or 50, **self.scheduler_options}
        named = {"num_inference_steps": self.steps, "timesteps": self.timesteps, "sigmas": self.sigmas}
        return {key: value for key, value in named.items() if value is not None} | dict(self.scheduler_options)


def is_scale(value: Any) -> bool:
    """Whether `value` can be a guidance scale, which a row holds in float32."""
    return isinstance(value, (int, float)) and abs(value) <= torch.finfo(torch.float32).max


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """What came of a request: copied out, never an alias of static memory.

    `error` is set, and `image` is None, when this request alone went wrong; its neighbours are not affected.
    """

    request: Request
    latents: Tensor  # [C, H, W], of a video [C, F, H, W], in the pipeline's dtype, on its device
    image: Tensor | None  # [C, H, W], of a video [F, C, H, W], float32 in [0, 1], on the CPU
    rows: int  # model evaluations
    mode: str  # how its steps ran, as chosen by the runtime where that was left to it
    error: Exception | None = None

    def to_pil(self) -> Any:
        """The image as a PIL.Image; raises the request's own error if it has none."""
        if self.image is None:
            raise self.error or ValueError("this result has no image")
        if self.image.ndim == 4:
            raise ValueError(
                f"expected an image, got a video of {len(self.image)} frames; write it with a video library"
            )
        from PIL import Image

        pixels = (self.image.permute(1, 2, 0) * 255).round().byte().numpy()  # [H, W, C]
        return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
