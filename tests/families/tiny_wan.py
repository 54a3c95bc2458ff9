"""Tiny Wan pipelines of random weights, one transformer or two experts, and their own videos to compare with."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from fastdiff import Request
from tests.families.tiny import WIDTH, flow_unipc, ready, tokenizer

SAMPLERS = {
    "FlowMatchEuler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "UniPC": flow_unipc(flow_shift=3.0),  # Wan's own
}


def wan(experts: int = 1, boundary_ratio: float | None = None, **config: Any) -> Any:
    """Wan 2.1 of one expert, 2.2 of two: 4 channels at an eighth of the size and, but for the first, of the frames."""
    torch.manual_seed(0)
    transformers = [transformer() for _ in range(experts)]
    pipe = diffusers.WanPipeline(
        tokenizer=tokenizer(), text_encoder=umt5(), vae=autoencoder(), scheduler=SAMPLERS["UniPC"],
        transformer=transformers[0], transformer_2=transformers[1] if experts == 2 else None,
        boundary_ratio=boundary_ratio, **config,
    )  # fmt: skip
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            fill(part)
    for expert in transformers:
        spread(expert, 2.0)  # so that prompts and guidance show in the video
    spread(pipe.vae.decoder, 1.1)
    return ready(pipe)


def transformer() -> Any:
    """An expert."""
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def autoencoder() -> Any:
    """Of 4 channels at an eighth of the size."""
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.5, 2.0, 1.0],
    )  # fmt: skip


def umt5() -> Any:
    """A UMT5 text encoder."""
    return UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer()), d_model=WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    )


@torch.no_grad()
def fill(part: nn.Module) -> None:
    """Random numbers in every parameter that is zero, so that nothing that it multiplies goes unseen."""
    for parameter in part.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)


@torch.no_grad()
def spread(part: nn.Module, factor: float) -> None:
    """Every weight so many times as wide."""
    for parameter in part.parameters():
        if parameter.ndim > 1:
            parameter.mul_(factor)


def call_of(request: Request) -> dict[str, Any]:
    """The request as the pipeline's own call takes it."""
    named = ("guidance_scale", "guidance_scale_2", "negative_prompt")
    asked = {name: getattr(request, name) for name in named}
    return {name: value for name, value in asked.items() if value is not None}


def video_of_diffusers(pipe: Any, request: Request, **call: Any) -> Tensor:
    """The pipeline's own video [F, C, H, W], from a copy of the request's scheduler."""
    kept = pipe.scheduler
    try:
        pipe.scheduler = copy.deepcopy(request.scheduler or kept)
        generator = torch.Generator().manual_seed(request.seed)
        named = {"prompt": request.prompt, "num_inference_steps": request.steps, "generator": generator}
        video: Tensor = pipe(**named, **call_of(request), **call, output_type="pt").frames[0].float()
        return video
    finally:
        pipe.scheduler = kept
