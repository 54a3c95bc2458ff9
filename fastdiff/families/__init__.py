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
`guidance_2`; the others leave these to `Family`.

`Family` in `base.py` has what most pipelines share. README.md beside it has a whole family as an example;
`FAMILIES` takes new ones: `FAMILIES["MyPipeline"] = MyFamily`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fastdiff.errors import PlanMismatch
from fastdiff.families.base import Family
from fastdiff.families.dit import DiT
from fastdiff.families.flux import Flux
from fastdiff.families.qwen_image import QwenImage
from fastdiff.families.stable_diffusion import StableDiffusion
from fastdiff.families.stable_diffusion_3 import StableDiffusion3
from fastdiff.families.stable_diffusion_xl import StableDiffusionXL
from fastdiff.families.wan import Wan

__all__ = ["FAMILIES", "Family", "family_of"]

FAMILIES: dict[str, Callable[..., Family]] = {
    "DiTPipeline": DiT,
    "FluxPipeline": Flux,
    "QwenImagePipeline": QwenImage,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "WanPipeline": Wan,
}


def family_of(pipe: Any, **size: int | None) -> Family:
    """The family that serves `pipe`, for images of `height` x `width` pixels (the model's own size if None), or videos
    of `num_frames` of them, from texts of `max_sequence_length` tokens (the pipeline's own call's if None)."""
    family = FAMILIES.get(type(pipe).__name__)
    if family is None:
        raise PlanMismatch(
            f"expected one of {', '.join(FAMILIES)}, got {type(pipe).__name__}; any diffusers pipeline still "
            "takes fastdiff.accelerate(pipe), or pipe.scheduler = fastdiff.table_scheduler(pipe.scheduler) alone, and "
            "fastdiff/families/README.md shows how to add a family"
        )
    asked = {name: value for name, value in size.items() if value is not None}
    for name, value in asked.items():
        if name not in inspect.signature(family).parameters:
            raise PlanMismatch(f"{name}: expected none, {type(pipe).__name__} takes none, got {value}; leave it out")
    return family(pipe, **asked)
