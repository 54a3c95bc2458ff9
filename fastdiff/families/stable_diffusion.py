"""Stable Diffusion 1.x and 2.x: CLIP text, UNet, KL autoencoder, classifier-free guidance in one batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastdiff.denoiser import guide
from fastdiff.errors import PlanMismatch
from fastdiff.plan import TensorSpec
from fastdiff.request import Request


class StableDiffusion:
    """A `diffusers.StableDiffusionPipeline` as stages see it; the pipeline's components are read, never changed."""

    def __init__(self, pipe: Any, height: int | None = None, width: int | None = None) -> None:
        self.pipe = pipe
        config, scale = pipe.unet.config, pipe.vae_scale_factor
        side = config.sample_size
        default_height, default_width = (side, side) if isinstance(side, int) else side
        height, width = height or default_height * scale, width or default_width * scale
        if height % scale or width % scale:
            raise PlanMismatch(f"expected a height and width divisible by {scale}, got {height} x {width}")
        self.latent_shape: tuple[int, ...] = (config.in_channels, height // scale, width // scale)
        self.model: torch.nn.Module = pipe.unet
        self.device: torch.device = pipe.unet.device
        self.dtype: torch.dtype = pipe.unet.dtype
        self.text_shape = (pipe.tokenizer.model_max_length, config.cross_attention_dim)  # (L, D)
        self.conditioning = {"prompt_embeds": TensorSpec((2, *self.text_shape), self.dtype)}
        self._encoding = threading.Lock()  # fast tokenizers raise "Already borrowed" when two threads call one

    @property
    def scheduler(self) -> Any:
        """The pipeline's own scheduler."""
        return self.pipe.scheduler

    def denoiser(
        self, sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor
    ) -> Tensor:
        """The guided output [n, C, H, W] float32."""
        return guided(self.pipe.unet, sample, timestep, conditioning, guidance)

    def check(self, request: Request) -> None:
        """Raise PlanMismatch unless the request's own tensors have this pipeline's shapes."""
        if request.class_label is not None:
            raise ValueError(
                f"expected a prompt or prompt_embeds, got class_label: {type(self.pipe).__name__} takes text"
            )
        request.check_tensors(
            prompt_embeds=self.text_shape, negative_prompt_embeds=self.text_shape, latents=self.latent_shape
        )
        if request.guided and request.prompt_embeds is not None and request.negative_prompt_embeds is None:
            raise ValueError("prompt_embeds with guidance need negative_prompt_embeds beside them")

    def encode(self, request: Request) -> dict[str, Tensor]:
        """{"prompt_embeds": [2, L, D]}: unconditional, conditional. Without guidance both are the prompt's."""
        with self._encoding:
            conditional, unconditional = self.pipe.encode_prompt(
                request.prompt,
                self.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=request.guided,
                negative_prompt=request.negative_prompt,
                prompt_embeds=_batched(request.prompt_embeds),
                negative_prompt_embeds=_batched(request.negative_prompt_embeds),
            )
        if not request.guided:
            unconditional = conditional
        return {"prompt_embeds": torch.cat([unconditional, conditional]).to(self.device, self.dtype)}

    def decode(self, sample: Tensor) -> Tensor:
        """The image [C, H, W] float32 in [0, 1] on the CPU."""
        latents = sample[None].to(self.device, self.pipe.vae.dtype) / self.pipe.vae.config.scaling_factor
        image = self.pipe.vae.decode(latents, return_dict=False)[0]
        processed = self.pipe.image_processor.postprocess(image, output_type="pt")
        return processed[0].float().cpu()  # type: ignore[no-any-return]  # diffusers is untyped


def guided(
    unet: Callable[..., tuple[Tensor]],
    sample: Tensor,
    timestep: Tensor,
    conditioning: Mapping[str, Tensor],
    guidance: Tensor,
) -> Tensor:
    """The guided output [n, C, H, W] float32 of one UNet call at batch 2n: each slot unconditional, conditional.

    What `conditioning` has beside the text goes in by its name, as SDXL's `text_embeds` and `time_ids` do.
    """
    both = {name: tensor.flatten(0, 1) for name, tensor in conditioning.items()}  # [2n, ...]
    prompt_embeds = both.pop("prompt_embeds")  # [2n, L, D]
    output = unet(
        sample.repeat_interleave(2, dim=0),
        timestep.repeat_interleave(2),
        encoder_hidden_states=prompt_embeds,
        added_cond_kwargs=both,
        return_dict=False,
    )[0]
    unconditional, conditional = output.unflatten(0, (-1, 2)).unbind(1)
    return guide(unconditional, conditional, guidance)


def _batched(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor[None]
