"""What the families have in common: a diffusers pipeline as stages see it, and the checks that several of them make."""

from __future__ import annotations

import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.denoiser import Denoiser
from fastdiff.errors import PlanMismatch
from fastdiff.plan import TensorSpec
from fastdiff.request import Request
from fastdiff.table import StepTable

EMBEDDINGS = ("prompt_embeds", "pooled_prompt_embeds")
NEGATIVE_EMBEDDINGS = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")


# Pipelines share components, so these are of the process.
ENCODING = threading.RLock()  # fast tokenizers keep how they pad, and some raise "Already borrowed" for a second thread
DECODING = threading.Lock()  # autoencoders of videos carry frames over in attributes of their own


class Family(ABC):
    """A diffusers pipeline as stages see it; the pipeline's components are read, never changed.

    A family sets `latent_shape`, `conditioning` and `denoiser`, and adds `check`, `encode` and `decode`. The rest is
    what most pipelines do, and is replaced where one does something else. Nothing changes after construction.
    """

    denoiser: Denoiser
    """The model and its guidance."""
    latent_shape: tuple[int, ...]
    """One request's latent, (C, H, W), of a video (C, F, H, W), or packed, (tokens, C)."""
    conditioning: Mapping[str, TensorSpec]
    """One slot's conditioning by name."""
    scale_name = "guidance_scale"
    """The argument of the pipeline's call that is a request's guidance_scale."""

    def __init__(self, pipe: Any, model: Any) -> None:
        self.pipe = pipe
        self.model: torch.nn.Module = model  # that the denoiser calls, whose weights a captured graph reads
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.latent_dtype = self.dtype  # of noise draws and returned latents; in some float32 whatever the model's is
        call = inspect.signature(type(pipe).__call__).parameters
        self.own_scale = float(call[self.scale_name].default) if self.scale_name in call else 1.0
        self._eta = {"eta": call["eta"].default} if "eta" in call else {}  # for steps that take one; TCD's own is 0.3

    @abstractmethod
    def check(self, request: Request) -> None:
        """Raise PlanMismatch or ValueError unless this family can serve `request`; no model work."""

    @abstractmethod
    def encode(self, request: Request) -> dict[str, Tensor]:
        """The request's conditioning, by name."""

    @abstractmethod
    def decode(self, sample: Tensor) -> Tensor:
        """The image [C, H, W], or the video [F, C, H, W], float32 in [0, 1] on the CPU, of a finished latent."""

    @property
    def scheduler(self) -> Any:
        """The pipeline's own scheduler: the template of requests that name none."""
        return self.pipe.scheduler

    def scale(self, request: Request) -> float:
        """The request's guidance scale; where it has none, the default of the pipeline's own call."""
        return self.own_scale if request.guidance_scale is None else float(request.guidance_scale)

    def guided(self, request: Request) -> bool:
        """Whether classifier-free guidance has any effect: diffusers' rule, scale > 1."""
        return self.scale(request) > 1.0

    def guidance(self, request: Request) -> float:
        """The scale that the request's rows carry to the denoiser; 1 where classifier-free guidance is off."""
        return self.scale(request) if self.guided(request) else 1.0

    @property
    def denoisers(self) -> tuple[Denoiser, ...]:
        """One per segment of a schedule: the first for the early rows, a second where the late ones have their own."""
        return (self.denoiser,)

    @property
    def models(self) -> tuple[torch.nn.Module, ...]:
        """The module of each denoiser."""
        return (self.model,)

    def guidance_2(self, request: Request) -> float | None:
        """The scale that the rows of the second segment carry; None if it is the same, or there is no such segment."""
        return None

    def boundary(self, table: StepTable) -> int:
        """How many rows the first segment makes: all of them, where there is no second one."""
        return len(table)

    def schedule(self, request: Request, scheduler: Any) -> dict[str, Any]:
        """The keyword arguments of `fastdiff.tabulate` for the request on `scheduler`, as the pipeline passes them."""
        passed = self._eta if _takes_eta(getattr(type(scheduler), "step", object)) else {}
        return passed | request.schedule

    def noise(self, draw: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        """The first noise as a latent; `draw` makes standard normal noise of a shape from the request's generator."""
        return draw(self.latent_shape)

    def both(self, request: Request, unconditional: Any, conditional: Tensor) -> Tensor:
        """[2, ...] of two [1, ...], in the pipeline's dtype; twice the second one where nothing guides."""
        first: Tensor = unconditional if self.guided(request) else conditional
        return torch.cat([first, conditional]).to(self.device, self.dtype)

    def pixels(self, decoded: Tensor, denormalize: list[bool] | None = None) -> Tensor:
        """[C, H, W] float32 in [0, 1] on the CPU of what the autoencoder made, through the pipeline's own processor."""
        processed: Tensor = self.pipe.image_processor.postprocess(decoded, output_type="pt", do_denormalize=denormalize)
        return processed[0].float().cpu()

    def check_takes_no(self, request: Request, *names: str) -> None:
        """Raise if the request has one of these fields, for which the pipeline has no use."""
        for name in names:
            if getattr(request, name) is not None:
                raise ValueError(f"expected no {name}: {type(self.pipe).__name__} takes none; leave it out")

    def check_takes_text(self, request: Request) -> None:
        """Raise unless the request has a prompt or its embeddings."""
        if request.class_label is not None:
            raise ValueError(
                f"expected a prompt or prompt_embeds, got class_label: {type(self.pipe).__name__} takes text"
            )


class PackedFamily(Family):
    """A transformer whose latents are squares of 2 x 2, packed into tokens [tokens, C]."""

    def __init__(self, pipe: Any, height: int | None, width: int | None) -> None:
        super().__init__(pipe, pipe.transformer)
        scale, channels = pipe.vae_scale_factor, pipe.transformer.config.in_channels
        side = pipe.default_sample_size * scale
        self.size = image_size(height, width, (side, side), 2 * scale)
        self.tokens = (self.size[0] // scale // 2, self.size[1] // scale // 2)  # rows, columns
        self.unpacked_shape = (channels // 4, 2 * self.tokens[0], 2 * self.tokens[1])
        self.latent_shape = (self.tokens[0] * self.tokens[1], channels)

    def noise(self, draw: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        """Drawn as an image, then packed."""
        packed: Tensor = self.pipe._pack_latents(draw(self.unpacked_shape)[None], 1, *self.unpacked_shape)
        return packed[0]

    def unpacked(self, sample: Tensor) -> Tensor:
        """[1, ...] as the autoencoder takes it, in its dtype."""
        packed = sample[None].to(self.device, self.pipe.vae.dtype)
        latents: Tensor = self.pipe._unpack_latents(packed, *self.size, self.pipe.vae_scale_factor)
        return latents


def check_pooled(request: Request, text_shape: tuple[int, ...], pooled_shape: tuple[int, ...], pooled: str) -> None:
    """Raise unless embeddings have these shapes, the second the plan's `pooled`, and each comes with its pooled one."""
    request.check_tensors("conditioning.prompt_embeds", prompt_embeds=text_shape, negative_prompt_embeds=text_shape)
    request.check_tensors(pooled, pooled_prompt_embeds=pooled_shape, negative_pooled_prompt_embeds=pooled_shape)
    check_beside(request, *EMBEDDINGS)
    check_beside(request, *NEGATIVE_EMBEDDINGS)


def pooled_embeddings(request: Request) -> dict[str, Tensor | None]:
    """What the request has of embeddings, [1, ...], by the names that `encode_prompt` takes."""
    return {name: batched(getattr(request, name)) for name in EMBEDDINGS + NEGATIVE_EMBEDDINGS}


def check_beside(request: Request, name: str, *others: str) -> None:
    """Raise if the request has field `name` and lacks one of `others`."""
    missing = [other for other in others if getattr(request, other) is None]
    if getattr(request, name) is not None and missing:
        raise ValueError(f"{name} need {' and '.join(missing)} beside them")


def image_size(height: int | None, width: int | None, default: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The size in pixels, `default` where None; PlanMismatch unless both are positive multiples of `multiple`."""
    size = (default[0] if height is None else height, default[1] if width is None else width)
    if not all(isinstance(side, int) for side in size):
        raise PlanMismatch(f"expected a height and width that are integers, got {size[0]!r} x {size[1]!r}")
    if any(side < 1 or side % multiple for side in size):
        nearest = " x ".join(str(max(1, side // multiple) * multiple) for side in size)
        raise PlanMismatch(
            f"expected a positive height and width divisible by {multiple}, got {size[0]} x {size[1]}; "
            f"{nearest} would do"
        )
    return size


def text_length(pipe: Any, asked: int | None, longest: int | None = None) -> int:
    """Tokens of a text, as many as the pipeline's own call takes where None; PlanMismatch unless 1 to `longest`."""
    if asked is None:
        return int(inspect.signature(type(pipe).__call__).parameters["max_sequence_length"].default)
    if not isinstance(asked, int) or asked < 1 or (longest is not None and asked > longest):
        span = "1 or more" if longest is None else f"1 to {longest}"
        raise PlanMismatch(
            f"max_sequence_length: expected {span}, what {type(pipe).__name__} takes, got {asked!r}; leave it out for "
            "the pipeline's own"
        )
    return asked


def check_unet(unet: Any) -> None:
    """PlanMismatch for a UNet that takes what no request has: its scale as an input, as an LCM's does, or an image."""
    if unet.config.encoder_hid_dim_type is not None:
        raise PlanMismatch(
            f"expected a UNet that takes text alone, got encoder_hid_dim_type {unet.config.encoder_hid_dim_type!r}, as "
            "an IP-Adapter sets it; fastdiff.accelerate(pipe) works with it"
        )
    if unet.config.time_cond_proj_dim is not None:
        raise PlanMismatch(
            "expected a UNet that is guided from outside, got one that takes guidance as an input "
            "(time_cond_proj_dim); fastdiff.accelerate(pipe) works with it"
        )


def statistics(config: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of an autoencoder's latents by channel, to broadcast with `latents` [1, C, ...]."""
    shape = (1, -1, *[1] * (latents.ndim - 2))
    return latents.new_tensor(config.latents_mean).view(shape), latents.new_tensor(config.latents_std).view(shape)


def batched(tensor: Tensor | None) -> Tensor | None:
    """[...] as [1, ...]."""
    return None if tensor is None else tensor[None]


@cache
def _takes_eta(step: Callable[..., Any]) -> bool:
    return "eta" in inspect.signature(step).parameters


def config_of(scheduler: Any) -> Mapping[str, Any]:
    """Its config; empty for what is no scheduler, which `tabulate` refuses by name."""
    return getattr(scheduler, "config", {})


def flow_shift(config: Mapping[str, Any], tokens: int, max_shift: float = 1.15) -> float:
    """mu: how far a flow schedule is shifted for an image of so many tokens, as its scheduler's config says."""
    base_tokens, max_tokens = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return float(tokens * slope + (base_shift - slope * base_tokens))


def even_sigmas(request: Request) -> dict[str, Any]:
    """The request's schedule with the sigmas 1 to 1 / steps that flow pipelines pass where it has none of its own."""
    named = request.schedule
    steps = named.pop("num_inference_steps", None)
    if request.timesteps is None and request.sigmas is None:
        named["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    return named
