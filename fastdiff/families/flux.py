"""Flux.1: CLIP and T5 text, packed latents, guidance as an input of the transformer, one call at batch n."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import PlanMismatch
from fastdiff.families.base import (
    ENCODING,
    PackedFamily,
    batched,
    check_beside,
    config_of,
    even_sigmas,
    flow_shift,
    text_length,
)
from fastdiff.plan import TensorSpec
from fastdiff.request import Request

LONGEST = 512  # T5 tokens that the pipeline takes
STEPS = 28


class Flux(PackedFamily):
    """A `diffusers.FluxPipeline` as stages see it.

    `guidance_scale` is the distilled model's input, any number, and nothing to a model that has none (schnell).
    Classifier-free guidance, which would make two calls of every row for all requests alike, is refused.
    Texts are padded to `max_sequence_length` T5 tokens: the model attends to the padding.
    """

    def __init__(
        self, pipe: Any, height: int | None = None, width: int | None = None, max_sequence_length: int | None = None
    ) -> None:
        super().__init__(pipe, height, width)
        config = pipe.transformer.config
        self.takes_guidance: bool = config.guidance_embeds
        self.text_shape = (text_length(pipe, max_sequence_length, LONGEST), config.joint_attention_dim)
        self.pooled_shape = (config.pooled_projection_dim,)
        self.conditioning = {
            "prompt_embeds": TensorSpec(self.text_shape, self.dtype),
            "pooled_prompt_embeds": TensorSpec(self.pooled_shape, self.dtype),
        }
        self.img_ids = image_ids(*self.tokens, self.dtype, self.device)
        self.txt_ids = torch.zeros(self.text_shape[0], 3, dtype=self.dtype, device=self.device)

    def denoiser(
        self, sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor
    ) -> Tensor:
        """The output [n, tokens, C]."""
        scale = guidance if self.takes_guidance else None
        return called(self.pipe.transformer, self.img_ids, self.txt_ids, sample, timestep, conditioning, scale)

    def check(self, request: Request) -> None:
        """Raise unless the request is one of text alone, and its own tensors have this pipeline's shapes."""
        self.check_takes_text(request)
        self.check_takes_no(request, "guidance_rescale")
        for name in ("negative_prompt", "negative_prompt_embeds"):
            if getattr(request, name) is not None:
                raise PlanMismatch(
                    f"{name}: expected none, one call a row is all that the plan's conditioning.prompt_embeds holds, "
                    "got one; leave it out, or give it to the pipe itself, which takes it after "
                    "fastdiff.accelerate(pipe) too"
                )
        check_beside(request, "prompt_embeds", "pooled_prompt_embeds")
        request.check_tensors("conditioning.prompt_embeds", prompt_embeds=self.text_shape)
        request.check_tensors("conditioning.pooled_prompt_embeds", pooled_prompt_embeds=self.pooled_shape)
        request.check_tensors("latent_shape", latents=self.latent_shape)

    def encode(self, request: Request) -> dict[str, Tensor]:
        """{"prompt_embeds": [L, D], "pooled_prompt_embeds": [P]}."""
        with ENCODING:
            prompt_embeds, pooled, _ = self.pipe.encode_prompt(
                request.prompt,
                device=self.device,
                prompt_embeds=batched(request.prompt_embeds),
                pooled_prompt_embeds=batched(request.pooled_prompt_embeds),
                max_sequence_length=self.text_shape[0],
            )
        embeddings = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}
        return {name: tensor[0].to(self.device, self.dtype, copy=True) for name, tensor in embeddings.items()}

    def guidance(self, request: Request) -> float:
        """The scale as it is: an input of the model, which has no off."""
        return self.scale(request)

    def schedule(self, request: Request, scheduler: Any) -> dict[str, Any]:
        """Even sigmas, shifted by the number of image tokens."""
        config, request = config_of(scheduler), request.with_steps(STEPS)
        makes_its_own = config.get("use_flow_sigmas")
        if makes_its_own and request.sigmas is not None:
            raise ValueError("sigmas: expected none, as a scheduler with use_flow_sigmas makes its own; give steps")
        asked = request.schedule if makes_its_own else even_sigmas(request)
        return {"mu": flow_shift(config, self.latent_shape[0]), **asked}

    def decode(self, sample: Tensor) -> Tensor:
        """The image [C, H, W] float32 in [0, 1] on the CPU."""
        vae = self.pipe.vae
        latents = self.unpacked(sample) / vae.config.scaling_factor + vae.config.shift_factor
        return self.pixels(vae.decode(latents, return_dict=False)[0])


def image_ids(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where each image token is, [rows * columns, 3]: 0, row, column."""
    row, column = (torch.arange(count, dtype=dtype, device=device) for count in (rows, columns))
    return torch.cartesian_prod(row.new_zeros(1), row, column)


def called(
    transformer: Callable[..., tuple[Tensor]],
    img_ids: Tensor,
    txt_ids: Tensor,
    sample: Tensor,
    timestep: Tensor,
    conditioning: Mapping[str, Tensor],
    guidance: Tensor | None,
) -> Tensor:
    """The output [n, tokens, C] of one call at batch n."""
    return transformer(
        hidden_states=sample,
        encoder_hidden_states=conditioning["prompt_embeds"],
        pooled_projections=conditioning["pooled_prompt_embeds"],
        timestep=timestep.to(sample.dtype) / 1000,
        guidance=guidance,
        img_ids=img_ids,
        txt_ids=txt_ids,
        return_dict=False,
    )[0]
