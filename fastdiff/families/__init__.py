"""Pipeline families: how each encodes, is called and decodes. One file each; `family_of` picks it by pipeline class.

A family is a reading of one diffusers pipeline, made once and never changed: stages ask it for what differs between
pipelines, and it answers with the pipeline's own components. In the order of a request:

- `check` refuses what the pipeline cannot serve, before any model work;
- `encode` gives one slot's conditioning, in the shapes and dtypes that `conditioning` has promised. What guidance
  compares is stacked in front, [2, ...]: unconditional, conditional;
- `guidance` gives the one number that the slot's rows carry, `schedule` the arguments of the step table, `noise` the
  first latent, drawn in the pipeline's shape and packed as its model wants it;
- `denoiser` is the model and its guidance as a pure function of device tensors: it makes nothing on the host, reads
  nothing back, and treats every sample of the batch apart. What never changes, such as positions, is made beforehand;
- `decode` makes the image of a finished latent.

A pipeline with two experts (Wan 2.2) has a denoiser and a model for each, a `boundary` in each table, and may have a
`guidance_2`; the others leave these to `PipelineFamily`.

`PipelineFamily` in `base.py` has what most pipelines share. README.md beside it has a whole family as an example;
`FAMILIES` takes new ones: `FAMILIES["MyPipeline"] = MyFamily`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff.denoiser import Denoiser
from fastdiff.errors import PlanMismatch
from fastdiff.families.dit import DiT
from fastdiff.families.flux import Flux
from fastdiff.families.qwen_image import QwenImage
from fastdiff.families.stable_diffusion import StableDiffusion
from fastdiff.families.stable_diffusion_3 import StableDiffusion3
from fastdiff.families.stable_diffusion_xl import StableDiffusionXL
from fastdiff.families.wan import Wan
from fastdiff.plan import TensorSpec
from fastdiff.request import Request
from fastdiff.table import StepTable


class Family(Protocol):
    """The components that stages work with. Nothing here changes after construction."""

    @property
    def scheduler(self) -> Any:
        """The pipeline's own scheduler: the template of requests that name none."""
        ...

    @property
    def denoiser(self) -> Denoiser:
        """The model and its guidance."""
        ...

    @property
    def model(self) -> torch.nn.Module:
        """The module that the denoiser calls, whose weights a captured graph reads."""
        ...

    @property
    def denoisers(self) -> tuple[Denoiser, ...]:
        """One per segment of a schedule: the first for the early rows, a second where the late ones have their own."""
        ...

    @property
    def models(self) -> tuple[torch.nn.Module, ...]:
        """The module of each denoiser."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The pipeline's dtype."""
        ...

    @property
    def latent_dtype(self) -> torch.dtype:
        """Of noise draws and returned latents: in most pipelines the model's, in some float32 whatever that is."""
        ...

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """One request's latent, (C, H, W), of a video (C, F, H, W), or packed, (tokens, C)."""
        ...

    @property
    def conditioning(self) -> Mapping[str, TensorSpec]:
        """One slot's conditioning by name."""
        ...

    def check(self, request: Request) -> None:
        """Raise PlanMismatch or ValueError unless this family can serve `request`; no model work."""
        ...

    def encode(self, request: Request) -> dict[str, Tensor]:
        """The request's conditioning, by name."""
        ...

    def guidance(self, request: Request) -> float:
        """The scale that the request's rows carry to the denoiser; 1 where classifier-free guidance is off."""
        ...

    def guidance_2(self, request: Request) -> float | None:
        """The scale that the rows of the second segment carry; None if it is the same."""
        ...

    def boundary(self, table: StepTable) -> int:
        """How many rows the first segment makes: all of them, where there is no second one."""
        ...

    def schedule(self, request: Request, scheduler: Any) -> dict[str, Any]:
        """The keyword arguments of `fastdiff.tabulate` for the request on `scheduler`, as the pipeline passes them."""
        ...

    def noise(self, draw: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        """The first noise as a latent; `draw` makes standard normal noise of a shape from the request's generator."""
        ...

    def decode(self, sample: Tensor) -> Tensor:
        """The image [C, H, W], or the video [F, C, H, W], float32 in [0, 1] on the CPU, of a finished latent."""
        ...


FAMILIES: dict[str, Callable[..., Family]] = {
    "DiTPipeline": DiT,
    "FluxPipeline": Flux,
    "QwenImagePipeline": QwenImage,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "WanPipeline": Wan,
}


def family_of(
    pipe: Any,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    max_sequence_length: int | None = None,
) -> Family:
    """The family that serves `pipe`, for images of `height` x `width` pixels (the model's own size if None), or videos
    of `num_frames` of them, from texts of `max_sequence_length` tokens (the pipeline's own call's if None)."""
    family = FAMILIES.get(type(pipe).__name__)
    if family is None:
        raise PlanMismatch(
            f"expected one of {', '.join(FAMILIES)}, got {type(pipe).__name__}; any diffusers pipeline still "
            "takes fastdiff.accelerate(pipe), or pipe.scheduler = fastdiff.table_scheduler(pipe.scheduler) alone, and "
            "fastdiff/families/README.md shows how to add a family"
        )
    lengths = {"num_frames": num_frames, "max_sequence_length": max_sequence_length}
    asked = {name: length for name, length in lengths.items() if length is not None}
    for name, length in asked.items():
        if name not in inspect.signature(family).parameters:
            raise PlanMismatch(f"{name}: expected none, {type(pipe).__name__} takes none, got {length}; leave it out")
    return family(pipe, height, width, **asked)
