"""Tiny pipelines of random weights, and diffusers' own images to compare with. Offline: the tokenizer of every text
encoder is that of the shipped digits pipeline, which reads any text letter by letter."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from fastdiff import Request, Runtime
from fastdiff.models.train_digits import build_tokenizer
from fastdiff.stages import scheduler_of

WIDTH = 32  # of every text encoder
WORDS = ("one", "two", "three")


def ready(pipe: Any, spread: float = 1.0) -> Any:
    """The pipeline in float32 and quiet: every weight is set, and `spread` times as wide where it is the model's."""
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
            assert all(tensor.isfinite().all() for tensor in part.state_dict().values()), f"{name}: not initialised"
    model = getattr(pipe, "transformer", None) or pipe.unet
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(spread)  # so that prompts and guidance show in the image
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def fill(part: nn.Module) -> None:
    """Random numbers in every parameter that is zero, so that nothing that it multiplies goes unseen."""
    for parameter in part.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)


def tokenizer() -> Any:
    """Of any text encoder here; 16 tokens, or as many as a pipeline asks for."""
    return build_tokenizer()


def clip(projected: bool, positions: int = 16) -> Any:
    """A CLIP text encoder, with the projection of its pooled output or without."""
    own = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(own), hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=WIDTH, max_position_embeddings=positions,
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def t5(width: int = WIDTH) -> Any:
    """A T5 text encoder."""
    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer()), d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    )


def qwen() -> Any:
    """A Qwen2.5-VL, of which an image pipeline takes the text."""
    text = {
        "vocab_size": len(tokenizer()), "hidden_size": WIDTH, "intermediate_size": 37, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "rope_theta": 1000000.0,
        "rope_scaling": {"mrope_section": [2, 2, 4], "rope_type": "default", "type": "default"},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def vae(**config: Any) -> Any:
    """An autoencoder of 4 channels at half the size, unless `config` says otherwise."""
    return diffusers.AutoencoderKL(
        **{
            "block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 32,
            "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, **config,
        }
    )  # fmt: skip


def flow_unipc(**config: Any) -> Any:
    """The second sampler of the flow families: UniPC, with memory and another way to its sigmas."""
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, **config)


def image_of_diffusers(pipe: Any, request: Request, output_type: str = "pt", **call: Any) -> Tensor:
    """The pipeline's own image [C, H, W] or video [F, C, H, W], from a copy of the request's scheduler.

    What the request leaves open is left open to the pipeline; `call` is what else it is given.
    """
    renamed = {"steps": "num_inference_steps", "class_label": "class_labels"}
    if isinstance(pipe, diffusers.QwenImagePipeline):
        renamed["guidance_scale"] = "true_cfg_scale"
    named: dict[str, Any] = {}
    for field in set(vars(request)) - {"scheduler", "scheduler_options", "seed"}:
        value = getattr(request, field)
        if value is not None:
            batched = value[None] if isinstance(value, Tensor) else [value] if field == "class_label" else value
            named[renamed.get(field, field)] = batched
    kept, generator = pipe.scheduler, torch.Generator().manual_seed(request.seed)
    try:
        pipe.scheduler = copy.deepcopy(scheduler_of(kept, request.scheduler))
        image: Tensor = pipe(**{**named, **call}, generator=generator, output_type=output_type)[0][0]
        return image
    finally:
        pipe.scheduler = kept


def images_of(runtime: Runtime, requests: Sequence[Request]) -> list[Tensor]:
    """fastdiff's images, all requests in one call."""
    images = []
    for result in runtime.generate(requests):
        assert result.image is not None, result.error
        images.append(result.image)
    return images


@contextmanager
def no_model_work(pipe: Any) -> Iterator[None]:
    """Asserts that no module of the pipeline is called meanwhile."""
    called: list[str] = []
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, part in parts.items()
        for module in part.modules()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    assert not called


def relative_error(image: Tensor, expected: Tensor) -> float:
    """In the Frobenius norm."""
    return float((image - expected).norm() / expected.norm())
