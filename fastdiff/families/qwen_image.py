"""Qwen-Image: one masked text, packed latents, classifier-free guidance at the conditional norm in one batch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastdiff.denoiser import guide, paired, unpaired
from fastdiff.errors import PlanMismatch
from fastdiff.families.base import (
    DECODING,
    ENCODING,
    PackedFamily,
    batched,
    config_of,
    even_sigmas,
    flow_shift,
    statistics,
    text_length,
)
from fastdiff.plan import TensorSpec
from fastdiff.request import Request

LONGEST = 1024  # tokens that the pipeline takes
Rotations = tuple[Tensor, Tensor]  # complex, of image tokens and of text tokens


class QwenImage(PackedFamily):
    """A `diffusers.QwenImagePipeline` as stages see it.

    `guidance_scale` is the pipeline's `true_cfg_scale`, and as there it guides nothing without a negative prompt, for
    which " " will do. Texts are padded to `max_sequence_length` tokens, and what they lack is masked.
    """

    scale_name = "true_cfg_scale"

    def __init__(
        self, pipe: Any, height: int | None = None, width: int | None = None, max_sequence_length: int | None = None
    ) -> None:
        super().__init__(pipe, height, width)
        config = pipe.transformer.config
        for name in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            if config.get(name):
                raise PlanMismatch(f"expected a transformer of Qwen-Image's first kind, got one with {name}")
        self.text_width: int = config.joint_attention_dim
        self.text_length = text_length(pipe, max_sequence_length, LONGEST)
        self.conditioning = {
            "prompt_embeds": TensorSpec((2, self.text_length, self.text_width), self.dtype),
            "prompt_embeds_mask": TensorSpec((2, self.text_length), torch.bool),
        }
        rotary = rotations(pipe.transformer, *self.tokens, self.text_length, self.device)
        self.denoiser = partial(guided, pipe.transformer, rotary)

    def check(self, request: Request) -> None:
        """Raise unless the request is one of text, and its own tensors have this pipeline's shapes."""
        self.check_takes_text(request)
        self.check_takes_no(request, "pooled_prompt_embeds", "negative_pooled_prompt_embeds", "guidance_rescale")
        request.check_tensors("latent_shape", latents=self.latent_shape)
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            embeds = getattr(request, name)
            if embeds is not None:
                length = min(max(len(embeds), 1), self.text_length)
                request.check_tensors("conditioning.prompt_embeds", **{name: (length, self.text_width)})

    def encode(self, request: Request) -> dict[str, Tensor]:
        """Unconditional, conditional, padded; without guidance both are the prompt's: `conditioning` has the shapes."""
        texts = [(request.prompt, request.prompt_embeds)] * 2
        if self.guided(request):
            texts[0] = (request.negative_prompt, request.negative_prompt_embeds)
        with ENCODING:
            found = [self._text(*text) for text in texts]
        embeds, masks = (torch.stack(tensors) for tensors in zip(*found, strict=True))
        return {"prompt_embeds": embeds, "prompt_embeds_mask": masks}

    def _text(self, prompt: str | None, prompt_embeds: Tensor | None) -> tuple[Tensor, Tensor]:
        """Embeddings [L, D] and mask [L] of one text: alone it has no padding of its own."""
        embeds, _ = self.pipe.encode_prompt(
            prompt, self.device, prompt_embeds=batched(prompt_embeds), max_sequence_length=self.text_length
        )
        length = embeds.shape[1]
        padded = pad(embeds[0].to(self.device, self.dtype), (0, 0, 0, self.text_length - length))
        return padded, torch.arange(self.text_length, device=self.device) < length

    def guided(self, request: Request) -> bool:
        """Whether guidance has any effect: a scale > 1, and a negative prompt to guide away from."""
        negatives = (request.negative_prompt, request.negative_prompt_embeds)
        return super().guided(request) and any(negative is not None for negative in negatives)

    def schedule(self, request: Request, scheduler: Any) -> dict[str, Any]:
        """Even sigmas, shifted by the number of image tokens."""
        return {"mu": flow_shift(config_of(scheduler), self.latent_shape[0]), **even_sigmas(request)}

    def decode(self, sample: Tensor) -> Tensor:
        """The image [C, H, W] float32 in [0, 1] on the CPU."""
        latents = self.unpacked(sample)  # [1, C, 1, H, W]
        mean, std = statistics(self.pipe.vae.config, latents)
        with DECODING:
            decoded = self.pipe.vae.decode(latents * std + mean, return_dict=False)[0]
        return self.pixels(decoded[:, :, 0])


def rotations(transformer: Any, rows: int, columns: int, text: int, device: torch.device) -> Rotations:
    """The rotary embeddings of an image of rows x columns tokens and of a text, which no row changes."""
    found: Rotations = transformer.pos_embed([[(1, rows, columns)]], max_txt_seq_len=text, device=device)
    return found


def forward(
    transformer: Any, rotary: Rotations, sample: Tensor, timestep: Tensor, prompt_embeds: Tensor, mask: Tensor
) -> Tensor:
    """`transformer.forward`, part by part: given a mask it would make a tensor on the host, which no capture allows."""
    hidden = transformer.img_in(sample)
    text = transformer.txt_in(transformer.txt_norm(prompt_embeds))
    embedded_time = transformer.time_text_embed(timestep.to(hidden.dtype), hidden)
    for block in transformer.transformer_blocks:
        text, hidden = block(
            hidden_states=hidden,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            temb=embedded_time,
            image_rotary_emb=rotary,
        )
    output: Tensor = transformer.proj_out(transformer.norm_out(hidden, embedded_time))
    return output


def guided(
    transformer: Any,
    rotary: Rotations,
    sample: Tensor,
    timestep: Tensor,
    conditioning: Mapping[str, Tensor],
    guidance: Tensor,
) -> Tensor:
    """The guided output [n, tokens, C] float32 of one call at batch 2n: each slot unconditional, conditional.

    Guidance keeps each token's direction and takes its norm from the conditional output.
    """
    sample, timestep, pairs = paired(sample, timestep.to(sample.dtype), conditioning)
    text, mask = pairs["prompt_embeds"], pairs["prompt_embeds_mask"]
    unconditional, conditional = unpaired(forward(transformer, rotary, sample, timestep / 1000, text, mask).float())
    combined = guide(unconditional, conditional, guidance)
    norms = [torch.linalg.vector_norm(tensor, dim=-1, keepdim=True) for tensor in (conditional, combined)]
    return torch.where(guidance[:, None, None] == 1, conditional, combined * (norms[0] / norms[1]))
