"""DiT: class-conditional, one transformer, KL autoencoder, classifier-free guidance in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff.denoiser import guide_pairs, paired
from fastdiff.errors import PlanMismatch
from fastdiff.families.base import Family
from fastdiff.plan import TensorSpec
from fastdiff.request import Request


class DiT(Family):
    """A `diffusers.DiTPipeline` as stages see it.

    A sampler whose first latents are not of unit variance (Euler, Heun, LMS) gets them scaled here, and an ancestral
    one draws from the request's generator; `DiTPipeline` itself does neither.
    """

    def __init__(self, pipe: Any, height: int | None = None, width: int | None = None) -> None:
        super().__init__(pipe, pipe.transformer)
        config, scale = pipe.transformer.config, 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        side = config.sample_size * scale
        if {height, width} - {None, side}:
            raise PlanMismatch(
                f"expected a height and width of {side}, DiT's own, got {height} x {width}; leave them out"
            )
        self.latent_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.classes: int = config.num_embeds_ada_norm  # and the number of the null class
        self.conditioning = {"class_labels": TensorSpec((2,), torch.int64)}
        self.denoiser = partial(guided, pipe.transformer)

    def check(self, request: Request) -> None:
        """Raise unless the request asks for a class of this pipeline, and its latents have its shape."""
        for name in ("prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds"):
            if getattr(request, name) is not None:
                raise ValueError(f"expected a class_label alone, got {name}: {type(self.pipe).__name__} takes no text")
        self.check_takes_no(request, "guidance_rescale")
        self._number(request.class_label)
        request.check_tensors("latent_shape", latents=self.latent_shape)

    def encode(self, request: Request) -> dict[str, Tensor]:
        """{"class_labels": [2]}: the null class, the request's. Without guidance both are the request's."""
        label = self._number(request.class_label)
        unconditional = self.classes if self.guided(request) else label
        return {"class_labels": torch.tensor([unconditional, label], device=self.device)}

    def decode(self, sample: Tensor) -> Tensor:
        """The image [C, H, W] float32 in [0, 1] on the CPU."""
        vae = self.pipe.vae
        latents = 1 / vae.config.scaling_factor * sample[None].to(self.device, vae.dtype)
        image: Tensor = vae.decode(latents, return_dict=False)[0][0]
        return (image / 2 + 0.5).clamp(0, 1).float().cpu()

    def _number(self, label: int | str | None) -> int:
        if isinstance(label, str):
            if label not in self.pipe.labels:
                raise ValueError(f"class_label: expected one of the {len(self.pipe.labels)} pipe.labels, got {label!r}")
            return int(self.pipe.labels[label])
        if label is None or not 0 <= label < self.classes:
            raise ValueError(f"class_label: expected 0 to {self.classes - 1}, or one of pipe.labels, got {label}")
        return label


def guided(
    transformer: Callable[..., tuple[Tensor]],
    sample: Tensor,
    timestep: Tensor,
    conditioning: Mapping[str, Tensor],
    guidance: Tensor,
) -> Tensor:
    """The guided output [n, C, H, W] float32 of one call at batch 2n: each slot the null class, then its own."""
    sample, timestep, pairs = paired(sample, timestep, conditioning)
    output = transformer(sample, timestep=timestep, class_labels=pairs["class_labels"], return_dict=False)[0]
    output = output[:, : sample.shape[1]]  # the channels behind it are a learned variance, which no sampler reads
    return guide_pairs(output, guidance)
