"""Stable Diffusion 1.x and 2.x: CLIP text, UNet, KL autoencoder, classifier-free guidance in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from fastdiff.denoiser import guide_pairs, paired
from fastdiff.families.base import ENCODING, Family, batched, check_beside, check_unet, image_size
from fastdiff.plan import TensorSpec
from fastdiff.request import Request


class StableDiffusion(Family):
    """A `diffusers.StableDiffusionPipeline` as stages see it."""

    def __init__(self, pipe: Any, height: int | None = None, width: int | None = None) -> None:
        super().__init__(pipe, pipe.unet)
        check_unet(pipe.unet)
        config, scale = pipe.unet.config, pipe.vae_scale_factor
        side = config.sample_size
        rows, columns = (side, side) if isinstance(side, int) else side
        height, width = image_size(height, width, (rows * scale, columns * scale), scale)
        self.latent_shape = (config.in_channels, height // scale, width // scale)
        self.text_shape = (pipe.tokenizer.model_max_length, config.cross_attention_dim)  # (L, D)
        self.conditioning = {"prompt_embeds": TensorSpec((2, *self.text_shape), self.dtype)}
        self.denoiser = partial(guided, pipe.unet)

    def check(self, request: Request) -> None:
        """Raise unless the request is one of text, and its own tensors have this pipeline's shapes."""
        self.check_takes_text(request)
        self.check_takes_no(request, "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        if request.guidance_rescale is not None:  # every row of every request would pay for its reductions
            raise ValueError(
                f"guidance_rescale: expected none in a runtime's step, got {request.guidance_rescale}; leave it out, "
                "or give it to the pipe itself, which takes it after fastdiff.accelerate(pipe) too"
            )
        request.check_tensors("latent_shape", latents=self.latent_shape)
        request.check_tensors(
            "conditioning.prompt_embeds", prompt_embeds=self.text_shape, negative_prompt_embeds=self.text_shape
        )
        if self.guided(request):
            check_beside(request, "prompt_embeds", "negative_prompt_embeds")

    def encode(self, request: Request) -> dict[str, Tensor]:
        """{"prompt_embeds": [2, L, D]}: unconditional, conditional. Without guidance both are the prompt's."""
        with ENCODING:
            conditional, unconditional = self.pipe.encode_prompt(
                request.prompt,
                self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=self.guided(request),
                negative_prompt=request.negative_prompt,
                prompt_embeds=batched(request.prompt_embeds),
                negative_prompt_embeds=batched(request.negative_prompt_embeds),
            )
        return {"prompt_embeds": self.both(request, unconditional, conditional)}

    def decode(self, sample: Tensor) -> Tensor:
        """The image [C, H, W] float32 in [0, 1] on the CPU, black where the pipeline's safety checker has it so."""
        vae = self.pipe.vae
        latents = sample[None].to(self.device, vae.dtype) / vae.config.scaling_factor
        image = vae.decode(latents, return_dict=False)[0]
        image, flagged = self.pipe.run_safety_checker(image, self.device, self.dtype)
        return self.pixels(image, None if flagged is None else [not flag for flag in flagged])


def guided(
    unet: Callable[..., tuple[Tensor]],
    sample: Tensor,
    timestep: Tensor,
    conditioning: Mapping[str, Tensor],
    guidance: Tensor,
) -> Tensor:
    """The guided output [n, C, H, W] float32 of one UNet call at batch 2n: each slot unconditional, conditional."""
    sample, timestep, pairs = paired(sample, timestep, conditioning)
    output = unet(sample, timestep, encoder_hidden_states=pairs["prompt_embeds"], return_dict=False)[0]
    return guide_pairs(output, guidance)
