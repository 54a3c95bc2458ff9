"""Stable Diffusion 3 and 3.5: two CLIP texts and T5, flow matching, classifier-free guidance in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from fastdiff.denoiser import guide_pairs, paired
from fastdiff.families.base import (
    ENCODING,
    NEGATIVE_EMBEDDINGS,
    Family,
    check_beside,
    check_pooled,
    config_of,
    flow_shift,
    image_size,
    pooled_embeddings,
    text_length,
)
from fastdiff.plan import TensorSpec
from fastdiff.request import Request

LONGEST = 512  # T5 tokens that the pipeline takes
STEPS = 28


class StableDiffusion3(Family):
    """A `diffusers.StableDiffusion3Pipeline` as stages see it.

    `max_sequence_length` T5 tokens, padded, are behind those of CLIP: the model attends to the padding.
    """

    def __init__(
        self, pipe: Any, height: int | None = None, width: int | None = None, max_sequence_length: int | None = None
    ) -> None:
        super().__init__(pipe, pipe.transformer)
        config, scale = pipe.transformer.config, pipe.vae_scale_factor
        side = pipe.default_sample_size * scale
        height, width = image_size(height, width, (side, side), scale * config.patch_size)
        self.latent_shape = (config.in_channels, height // scale, width // scale)
        self.tokens = (height // scale // config.patch_size) * (width // scale // config.patch_size)
        self.t5_length = text_length(pipe, max_sequence_length, LONGEST)
        self.text_shape = (pipe.tokenizer_max_length + self.t5_length, config.joint_attention_dim)
        self.pooled_shape = (config.pooled_projection_dim,)
        self.conditioning = {
            "prompt_embeds": TensorSpec((2, *self.text_shape), self.dtype),
            "pooled_prompt_embeds": TensorSpec((2, *self.pooled_shape), self.dtype),
        }
        self.denoiser = partial(guided, pipe.transformer)

    def check(self, request: Request) -> None:
        """Raise unless the request is one of text, and its own tensors have this pipeline's shapes."""
        self.check_takes_text(request)
        self.check_takes_no(request, "guidance_rescale")
        request.check_tensors("latent_shape", latents=self.latent_shape)
        check_pooled(request, self.text_shape, self.pooled_shape, "conditioning.pooled_prompt_embeds")
        if self.guided(request):
            check_beside(request, "prompt_embeds", *NEGATIVE_EMBEDDINGS)

    def encode(self, request: Request) -> dict[str, Tensor]:
        """Unconditional, conditional; without guidance both are the prompt's: `conditioning` has the shapes."""
        with ENCODING:
            conditional, unconditional, pooled, negative_pooled = self.pipe.encode_prompt(
                request.prompt,
                None,
                None,
                device=self.device,
                do_classifier_free_guidance=self.guided(request),
                negative_prompt=request.negative_prompt,
                max_sequence_length=self.t5_length,
                **pooled_embeddings(request),
            )
        return {
            "prompt_embeds": self.both(request, unconditional, conditional),
            "pooled_prompt_embeds": self.both(request, negative_pooled, pooled),
        }

    def schedule(self, request: Request, scheduler: Any) -> dict[str, Any]:
        """As asked, shifted by the number of image tokens where the scheduler's config says so."""
        config, asked = config_of(scheduler), request.with_steps(STEPS).schedule
        if not config.get("use_dynamic_shifting"):
            return asked
        return {"mu": flow_shift(config, self.tokens, max_shift=1.16), **asked}

    def decode(self, sample: Tensor) -> Tensor:
        """The image [C, H, W] float32 in [0, 1] on the CPU."""
        vae = self.pipe.vae
        latents = sample[None].to(self.device, vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        return self.pixels(vae.decode(latents, return_dict=False)[0])


def guided(
    transformer: Callable[..., tuple[Tensor]],
    sample: Tensor,
    timestep: Tensor,
    conditioning: Mapping[str, Tensor],
    guidance: Tensor,
) -> Tensor:
    """The guided output [n, C, H, W] float32 of one call at batch 2n: each slot unconditional, conditional."""
    sample, timestep, pairs = paired(sample, timestep, conditioning)
    output = transformer(
        hidden_states=sample,
        timestep=timestep,
        encoder_hidden_states=pairs["prompt_embeds"],
        pooled_projections=pairs["pooled_prompt_embeds"],
        return_dict=False,
    )[0]
    return guide_pairs(output, guidance)
