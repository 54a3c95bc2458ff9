"""The published geometries of real models with random weights, built on the device: all that timing needs of a model.

Time and memory of a dense model depend on its shapes, not on what its weights hold, so nothing is downloaded and
nothing passes through the host. The `tiny-` variants are the same architectures in small widths, for tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.denoiser import Denoiser
from fastdiff.families import dit, flux, qwen_image, stable_diffusion, stable_diffusion_3, stable_diffusion_xl, wan
from fastdiff.plan import CapturePlan, TensorSpec


class Inputs(NamedTuple):
    """The arguments of a denoiser, in its order."""

    sample: Tensor
    timestep: Tensor
    conditioning: dict[str, Tensor]
    guidance: Tensor


@dataclass(frozen=True, eq=False)
class Geometry:
    """A model of random weights, how it is called, and the plan that it is captured by."""

    name: str
    plan: CapturePlan
    model: nn.Module
    denoiser: Denoiser
    toy: bool  # its times say nothing about a real model

    def inputs(self, n: int, seed: int = 0) -> Inputs:
        """Random inputs of n requests on the model's device: no zeros, each its own timestep and guidance above 1."""
        device = next(self.model.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)

        def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            if dtype.is_floating_point:
                # Drawn in float32: on a CPU torch 2.11 draws zeros in bfloat16, and coarse values.
                return torch.randn(n, *shape, generator=generator, device=device).to(dtype)
            whole = torch.randint(1, 1000, (n, *shape), generator=generator, device=device)
            return whole > 500 if dtype == torch.bool else whole.to(dtype)  # masks, classes

        uniform = torch.rand(2, n, generator=generator, device=device)
        return Inputs(
            sample=values(self.plan.latent_shape, self.plan.dtype),
            timestep=1 + 998 * uniform[0],
            conditioning={name: values(*spec) for name, spec in self.plan.conditioning.items()},
            guidance=1.5 + 6 * uniform[1],
        )


def geometry(name: str, device: torch.device | str, dtype: torch.dtype) -> Geometry:
    """The geometry of that name, one of GEOMETRIES, its weights drawn on `device` in `dtype`, the same every time.

    Sets torch's default dtype while it builds, which all threads share.
    """
    if name not in GEOMETRIES:
        raise ValueError(f"geometry: expected one of {', '.join(GEOMETRIES)}, got {name!r}")
    real, toy = name.removeprefix("tiny-"), name.startswith("tiny-")
    architecture, plan = _ARCHITECTURES[real], CapturePlan.load(real)
    config = dict(architecture.config)
    if toy:
        config |= architecture.tiny
        plan = _tiny(plan, architecture.tiny_shapes)
    specs = {name: _cast(spec, dtype) for name, spec in plan.conditioning.items()}
    plan = replace(plan, dtype=dtype, conditioning=specs)
    model = _build(architecture.model, config, torch.device(device), dtype)
    return Geometry(name, plan, model, architecture.denoiser(model, plan), toy)


def _tiny(plan: CapturePlan, shapes: Mapping[str, tuple[int, ...]]) -> CapturePlan:
    conditioning = {name: spec._replace(shape=shapes.get(name, spec.shape)) for name, spec in plan.conditioning.items()}
    return replace(plan, latent_shape=shapes["latent"], conditioning=conditioning, batch_sizes=(1, 2, 3, 4))


def _cast(spec: TensorSpec, dtype: torch.dtype) -> TensorSpec:
    return spec._replace(dtype=dtype) if spec.dtype.is_floating_point else spec


def _build(name: str, config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
    import diffusers

    default = torch.get_default_dtype()
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            model: nn.Module = getattr(diffusers, name)(**config)
        finally:
            torch.set_default_dtype(default)
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        # As one serves it: cuDNN and inductor would lay every convolution's weights out anew in each row.
        nn.Module.to(model, memory_format=torch.channels_last)  # type: ignore[call-overload]
    nn.Module.to(model, dtype)  # buffers with a dtype of their own, as a pipeline's; diffusers' `to` warns of casts
    return model.eval().requires_grad_(False)


# How each is called


def _plain(guided: Callable[..., Tensor]) -> Callable[[nn.Module, CapturePlan], Denoiser]:
    """A family's own function, which needs nothing but the model."""
    return lambda model, plan: partial(guided, model)


def _flux(model: nn.Module, plan: CapturePlan) -> Denoiser:
    """Where a token is never changes, so it is made once, as the family does."""
    side, device = math.isqrt(plan.latent_shape[0]), next(model.parameters()).device
    txt_ids = torch.zeros(plan.conditioning["prompt_embeds"].shape[0], 3, dtype=plan.dtype, device=device)
    return partial(flux.called, model, flux.image_ids(side, side, plan.dtype, device), txt_ids)


def _qwen_image(model: nn.Module, plan: CapturePlan) -> Denoiser:
    """Rotations made once, as the family does."""
    side, text = math.isqrt(plan.latent_shape[0]), plan.conditioning["prompt_embeds"].shape[1]
    rotary = qwen_image.rotations(model, side, side, text, next(model.parameters()).device)
    return partial(qwen_image.guided, model, rotary)


# What each is


@dataclass(frozen=True)
class _Architecture:
    model: str  # a class of diffusers
    config: Mapping[str, Any]  # as published, as far as it decides the geometry
    tiny: Mapping[str, Any]  # the widths and depths of the toy
    tiny_shapes: Mapping[str, tuple[int, ...]]  # of the toy's latent and conditioning
    denoiser: Callable[[nn.Module, CapturePlan], Denoiser]


_ARCHITECTURES = {
    "sd15-512": _Architecture(  # stable-diffusion-v1-5/stable-diffusion-v1-5, unet/config.json
        model="UNet2DConditionModel",
        config={
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
        },
        tiny={
            "sample_size": 16,
            "block_out_channels": (32, 64, 64, 64),
            "attention_head_dim": 4,
            "cross_attention_dim": 32,
        },
        tiny_shapes={"latent": (4, 16, 16), "prompt_embeds": (2, 77, 32)},
        denoiser=_plain(stable_diffusion.guided),
    ),
    "sdxl-1024": _Architecture(  # stabilityai/stable-diffusion-xl-base-1.0, unet/config.json
        model="UNet2DConditionModel",
        config={
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        tiny={
            "sample_size": 16,
            "block_out_channels": (32, 64, 64),
            "transformer_layers_per_block": (1, 2, 3),
            "attention_head_dim": (2, 4, 4),
            "cross_attention_dim": 32,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 32 + 6 * 8,
        },
        tiny_shapes={"latent": (4, 16, 16), "prompt_embeds": (2, 77, 32), "text_embeds": (2, 32)},
        denoiser=_plain(stable_diffusion_xl.guided),
    ),
    "dit-xl-256": _Architecture(  # facebook/DiT-XL-2-256, transformer/config.json
        model="DiTTransformer2DModel",
        config={
            "sample_size": 32,
            "patch_size": 2,
            "out_channels": 8,
            "num_layers": 28,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "num_embeds_ada_norm": 1000,
        },
        tiny={"sample_size": 8, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16},
        tiny_shapes={"latent": (4, 8, 8)},
        denoiser=_plain(dit.guided),
    ),
    "flux-dev-1024": _Architecture(  # black-forest-labs/FLUX.1-dev, transformer/config.json
        model="FluxTransformer2DModel",
        config={
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
        tiny={
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "axes_dims_rope": (4, 6, 6),
            "joint_attention_dim": 32,
            "pooled_projection_dim": 16,
        },
        tiny_shapes={"latent": (16, 64), "prompt_embeds": (8, 32), "pooled_prompt_embeds": (16,)},
        denoiser=_flux,
    ),
    "sd35-medium-1024": _Architecture(  # stabilityai/stable-diffusion-3.5-medium, transformer/config.json
        model="SD3Transformer2DModel",
        config={
            "sample_size": 128,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        tiny={
            "sample_size": 16,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 24,
            "dual_attention_layers": (0,),
        },
        tiny_shapes={"latent": (16, 16, 16), "prompt_embeds": (2, 8, 32), "pooled_prompt_embeds": (2, 16)},
        denoiser=_plain(stable_diffusion_3.guided),
    ),
    "qwen-image-1024": _Architecture(  # Qwen/Qwen-Image, transformer/config.json
        model="QwenImageTransformer2DModel",
        config={
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
        },
        tiny={
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        tiny_shapes={"latent": (16, 64), "prompt_embeds": (2, 8, 32), "prompt_embeds_mask": (2, 8)},
        denoiser=_qwen_image,
    ),
    "wan21-1.3b-480p": _Architecture(  # Wan-AI/Wan2.1-T2V-1.3B-Diffusers, transformer/config.json
        model="WanTransformer3DModel",
        config={
            "num_layers": 30,
            "attention_head_dim": 128,
            "num_attention_heads": 12,
            "ffn_dim": 8960,
            "text_dim": 4096,
        },
        tiny={
            "num_layers": 2,
            "attention_head_dim": 12,
            "num_attention_heads": 2,
            "ffn_dim": 32,
            "freq_dim": 16,
            "text_dim": 32,
        },
        tiny_shapes={"latent": (16, 3, 4, 6), "prompt_embeds": (2, 8, 32)},
        denoiser=_plain(wan.guided),
    ),
}

GEOMETRIES = (*_ARCHITECTURES, *(f"tiny-{name}" for name in _ARCHITECTURES))
"""The names that `geometry` takes."""
