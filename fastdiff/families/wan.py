"""Wan: videos from UMT5 text, one transformer or two experts split by timestep, guidance in one batch at 2n."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff.denoiser import Denoiser, guide_pairs, paired
from fastdiff.errors import PlanMismatch
from fastdiff.families.base import DECODING, ENCODING, Family, batched, config_of, image_size, statistics, text_length
from fastdiff.plan import TensorSpec
from fastdiff.request import Request
from fastdiff.table import StepTable


class Wan(Family):
    """A `diffusers.WanPipeline` as stages see it: Wan 2.1, and Wan 2.2 with an expert for high noise and one for low.

    A video has `num_frames` frames, as many as the pipeline's own call makes (81) if None. `guidance_scale_2` is the
    second expert's scale; `guidance_scale` alone says whether there is guidance at all, as in the pipeline.
    Texts have zeros behind them up to `max_sequence_length` UMT5 tokens: the model attends to them.
    """

    def __init__(
        self,
        pipe: Any,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        max_sequence_length: int | None = None,
    ) -> None:
        if pipe.config.expand_timesteps:
            raise PlanMismatch(
                "expected one timestep a sample, got a WanPipeline with expand_timesteps (Wan 2.2 5B), where each "
                "token has its own; pipe.scheduler = fastdiff.table_scheduler(pipe.scheduler) works with it"
            )
        ratio = pipe.config.boundary_ratio
        experts = {name: getattr(pipe, name) for name in ("transformer", "transformer_2")[: 1 if ratio is None else 2]}
        for name, expert in experts.items():
            if expert is None:
                raise PlanMismatch(f"expected a {name} with boundary_ratio {ratio}, got none; load it too")
        super().__init__(pipe, pipe.transformer)
        self.experts: tuple[torch.nn.Module, ...] = tuple(experts.values())
        places = {f"{expert.dtype} on {expert.device}" for expert in experts.values()}
        if len(places) > 1:
            raise PlanMismatch(f"expected both experts in one dtype on one device, got {' and '.join(sorted(places))}")
        config, own = pipe.transformer.config, inspect.signature(type(pipe).__call__).parameters
        spatial, (_, *patch) = pipe.vae_scale_factor_spatial, config.patch_size
        default = (own["height"].default, own["width"].default)
        height, width = image_size(height, width, default, math.lcm(16, *(spatial * side for side in patch)))
        num_frames = own["num_frames"].default if num_frames is None else num_frames
        frames = latent_frames(num_frames, pipe.vae_scale_factor_temporal)
        self.latent_shape = (config.in_channels, frames, height // spatial, width // spatial)
        self.latent_dtype = torch.float32  # as the pipeline keeps them, whatever the experts' dtype
        self.text_shape = (text_length(pipe, max_sequence_length), config.text_dim)
        self.conditioning = {"prompt_embeds": TensorSpec((2, *self.text_shape), self.dtype)}
        self.by_expert = tuple(partial(guided, expert) for expert in self.experts)
        self.denoiser = self.by_expert[0]

    @property
    def models(self) -> tuple[torch.nn.Module, ...]:
        """The experts: high noise, then low."""
        return self.experts

    @property
    def denoisers(self) -> tuple[Denoiser, ...]:
        """One per expert."""
        return self.by_expert

    def boundary(self, table: StepTable) -> int:
        """How many rows the first expert makes: compared, as in the pipeline, in the dtype of the timesteps."""
        if len(self.experts) == 1:
            return len(table)
        high = table.timesteps >= self.pipe.config.boundary_ratio * self.scheduler.config.num_train_timesteps
        rows = int(high.sum())
        if not high[:rows].all():
            raise PlanMismatch(
                f"{table.source}: expected timesteps that cross the experts' boundary once, falling, got "
                f"{table.timesteps.tolist()}"
            )
        return rows

    def check(self, request: Request) -> None:
        """Raise unless the request is one of text, and its own tensors have this pipeline's shapes."""
        self.check_takes_text(request)
        self.check_takes_no(request, "pooled_prompt_embeds", "negative_pooled_prompt_embeds", "guidance_rescale")
        request.check_tensors("latent_shape", latents=self.latent_shape)
        request.check_tensors(
            "conditioning.prompt_embeds", prompt_embeds=self.text_shape, negative_prompt_embeds=self.text_shape
        )

    def encode(self, request: Request) -> dict[str, Tensor]:
        """Unconditional, conditional; without guidance both are the prompt's: `conditioning` has the shapes."""
        with ENCODING:
            conditional, unconditional = self.pipe.encode_prompt(
                request.prompt,
                request.negative_prompt,
                do_classifier_free_guidance=self.guided(request),
                prompt_embeds=batched(request.prompt_embeds),
                negative_prompt_embeds=batched(request.negative_prompt_embeds),
                max_sequence_length=self.text_shape[0],
                device=self.device,
            )
        return {"prompt_embeds": self.both(request, unconditional, conditional)}

    def guidance_2(self, request: Request) -> float | None:
        """The scale of the second expert's rows, None where it is the first's."""
        return request.guidance_scale_2 if self.guided(request) else None

    def schedule(self, request: Request, scheduler: Any) -> dict[str, Any]:
        """As asked; PlanMismatch for a scheduler whose timesteps run over another range than the boundary's."""
        own = self.scheduler.config.num_train_timesteps
        other = config_of(scheduler).get("num_train_timesteps", own)
        if len(self.experts) == 2 and other != own:
            raise PlanMismatch(
                f"scheduler: expected num_train_timesteps {own}, of which the experts' boundary is a part, got {other}"
            )
        return request.schedule

    def decode(self, sample: Tensor) -> Tensor:
        """The video [F, C, H, W] float32 in [0, 1] on the CPU."""
        vae = self.pipe.vae
        latents = sample[None].to(self.device, vae.dtype)
        mean, std = statistics(vae.config, latents)
        with DECODING:
            decoded = vae.decode(latents * std + mean, return_dict=False)[0]
        video: Tensor = self.pipe.video_processor.postprocess_video(decoded, output_type="pt")[0]
        return video.float().cpu()


def latent_frames(num_frames: int, scale: int) -> int:
    """Frames of the latent: one for the first, one more for every `scale`; PlanMismatch where that does not divide."""
    if not isinstance(num_frames, int):
        raise PlanMismatch(f"num_frames: expected 1 more than a multiple of {scale}, got {num_frames!r}")
    if num_frames < 1 or (num_frames - 1) % scale:
        nearest = max(0, round((num_frames - 1) / scale)) * scale + 1
        raise PlanMismatch(
            f"num_frames: expected 1 more than a multiple of {scale}, got {num_frames}; {nearest} would do"
        )
    return (num_frames - 1) // scale + 1


def guided(
    transformer: Callable[..., tuple[Tensor]],
    sample: Tensor,
    timestep: Tensor,
    conditioning: Mapping[str, Tensor],
    guidance: Tensor,
) -> Tensor:
    """The guided output [n, C, F, H, W] float32 of one call at batch 2n: each slot unconditional, conditional."""
    sample, timestep, pairs = paired(sample, timestep, conditioning)
    text = pairs["prompt_embeds"]
    output = transformer(hidden_states=sample, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]
    return guide_pairs(output, guidance)
