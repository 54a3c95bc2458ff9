"""Pipeline families: how each encodes, is called and decodes. One file each; `family_of` picks it by pipeline class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff.denoiser import Denoiser
from fastdiff.errors import PlanMismatch
from fastdiff.families.dit import DiT
from fastdiff.families.stable_diffusion import StableDiffusion
from fastdiff.plan import TensorSpec
from fastdiff.request import Request


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
    def device(self) -> torch.device:
        """Where the model is."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The pipeline's dtype."""
        ...

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """One request's latent, (C, H, W)."""
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

    def decode(self, sample: Tensor) -> Tensor:
        """The image [C, H, W] float32 in [0, 1] on the CPU, of a sample [C, H, W]."""
        ...


FAMILIES: dict[str, Callable[[Any, int | None, int | None], Family]] = {
    "DiTPipeline": DiT,
    "StableDiffusionPipeline": StableDiffusion,
}


def family_of(pipe: Any, height: int | None = None, width: int | None = None) -> Family:
    """The family that serves `pipe`, for images of `height` x `width` pixels (the model's own size if None)."""
    family = FAMILIES.get(type(pipe).__name__)
    if family is None:
        raise PlanMismatch(f"expected one of {', '.join(FAMILIES)}, got {type(pipe).__name__}")
    return family(pipe, height, width)
