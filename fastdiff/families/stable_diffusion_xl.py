"""Stable Diffusion XL: two CLIP texts, sizes as conditioning, classifier-free guidance with rescale in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff.denoiser import guide, paired, rescale, unpaired
from fastdiff.errors import PlanMismatch
from fastdiff.families.base import (
    ENCODING,
    NEGATIVE_EMBEDDINGS,
    Family,
    check_beside,
    check_pooled,
    check_unet,
    image_size,
    pooled_embeddings,
    statistics,
)
from fastdiff.plan import TensorSpec
from fastdiff.request import Request


class StableDiffusionXL(Family):
    """A `diffusers.StableDiffusionXLPipeline` as stages see it.

    The original and the target size are the image's own, uncropped, as the pipeline has it by default.
    """

    def __init__(self, pipe: Any, height: int | None = None, width: int | None = None) -> None:
        super().__init__(pipe, pipe.unet)
        config, scale = pipe.unet.config, pipe.vae_scale_factor
        check_unet(pipe.unet)
        if pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast:
            raise PlanMismatch(
                "expected an autoencoder that may decode in float16, got one that overflows there; "
                "call pipe.vae.to(torch.float32) first"
            )
        side = pipe.default_sample_size * scale
        self.size = image_size(height, width, (side, side), max(8, scale))
        self.latent_shape = (config.in_channels, self.size[0] // scale, self.size[1] // scale)
        self.text_shape = (pipe.tokenizer_2.model_max_length if pipe.tokenizer_2 else 77, config.cross_attention_dim)
        self.pooled_shape = (config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim,)
        self.conditioning = {
            "prompt_embeds": TensorSpec((2, *self.text_shape), self.dtype),
            "text_embeds": TensorSpec((2, *self.pooled_shape), self.dtype),
            "time_ids": TensorSpec((2, 6), self.dtype),
            "guidance_rescale": TensorSpec((), torch.float32),
        }
        self.denoiser = partial(guided, pipe.unet)

    def check(self, request: Request) -> None:
        """Raise unless the request is one of text, and its own tensors have this pipeline's shapes."""
        self.check_takes_text(request)
        request.check_tensors("latent_shape", latents=self.latent_shape)
        check_pooled(request, self.text_shape, self.pooled_shape, "conditioning.text_embeds")
        zeros = self.pipe.config.force_zeros_for_empty_prompt and request.negative_prompt is None
        if self.guided(request) and not zeros:
            check_beside(request, "prompt_embeds", *NEGATIVE_EMBEDDINGS)

    def encode(self, request: Request) -> dict[str, Tensor]:
        """Unconditional, conditional; without guidance both are the prompt's: `conditioning` has the shapes."""
        with ENCODING:
            conditional, unconditional, pooled, negative_pooled = self.pipe.encode_prompt(
                request.prompt,
                device=self.device,
                do_classifier_free_guidance=self.guided(request),
                negative_prompt=request.negative_prompt,
                **pooled_embeddings(request),
            )
        time_ids = torch.tensor([[*self.size, 0, 0, *self.size]])  # original size, crop, target size
        rescaled = float(request.guidance_rescale or 0) if self.guided(request) else 0.0
        return {
            "prompt_embeds": self.both(request, unconditional, conditional),
            "text_embeds": self.both(request, negative_pooled, pooled),
            "time_ids": self.both(request, time_ids, time_ids),
            "guidance_rescale": torch.tensor(rescaled, dtype=torch.float32, device=self.device),
        }

    def decode(self, sample: Tensor) -> Tensor:
        """The image [C, H, W] float32 in [0, 1] on the CPU."""
        config = self.pipe.vae.config
        latents = sample[None].to(self.device, self.pipe.vae.dtype)
        if config.latents_mean is not None and config.latents_std is not None:
            mean, std = statistics(config, latents)
            latents = latents * std / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor
        image = self.pipe.vae.decode(latents, return_dict=False)[0]
        if self.pipe.watermark is not None:
            image = self.pipe.watermark.apply_watermark(image)
        return self.pixels(image)


def guided(
    unet: Callable[..., tuple[Tensor]],
    sample: Tensor,
    timestep: Tensor,
    conditioning: Mapping[str, Tensor],
    guidance: Tensor,
) -> Tensor:
    """The guided output [n, C, H, W] float32 of one UNet call at batch 2n: each slot unconditional, conditional."""
    inputs = {name: conditioning[name] for name in ("prompt_embeds", "text_embeds", "time_ids")}
    sample, timestep, pairs = paired(sample, timestep, inputs)
    text = pairs.pop("prompt_embeds")
    output = unet(sample, timestep, encoder_hidden_states=text, added_cond_kwargs=pairs, return_dict=False)[0]
    unconditional, conditional = unpaired(output)
    return rescale(guide(unconditional, conditional, guidance), conditional, conditioning["guidance_rescale"])
