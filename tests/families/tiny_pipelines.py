"""Tiny pipelines of diffusers, by class: random weights that all count, two samplers each, what their call is given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import diffusers
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)

from fastdiff import NotLinear, PlanMismatch
from fastdiff.families import FAMILIES
from tests.families.tiny import WIDTH, clip, fill, flow_unipc, qwen, ready, t5, tokenizer, vae

LETTERS = 16  # tokens of a text, wherever a pipeline lets its length be chosen
TEXT = {"prompt": "a handwritten one", "negative_prompt": "a two"}
IMAGE: dict[str, Any] = {"height": 32, "width": 32}
VIDEO = {**IMAGE, "num_frames": 9}
AS_ASKED = {"use_resolution_binning": False, "clean_caption": False}


@dataclass(frozen=True, eq=False)
class TinyPipeline:
    """How one pipeline class is built and called. Its own sampler comes first, then another that is linear."""

    build: Callable[[Any], Any]  # the pipeline of a sampler
    samplers: Mapping[str, Any]
    call: Mapping[str, Any]
    spread: float = 1.5  # of the model's weights, so that prompts and guidance show

    def __call__(self) -> Any:
        """The pipeline, the same at every call: float32, quiet, and no weight that starts as zero left so."""
        torch.manual_seed(0)
        pipe = self.build(copy.deepcopy(next(iter(self.samplers.values()))))
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                fill(part)
        return ready(pipe, self.spread)


def transformer_of(name: str, **config: Any) -> Any:
    """A transformer by its class, with two heads of 16 in one layer unless `config` says otherwise."""
    return getattr(diffusers, name)(**{"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, **config})


def text_config(**config: Any) -> dict[str, Any]:
    """Of a causal language model whose hidden states are a text's embeddings."""
    own = tokenizer()
    return {
        "vocab_size": len(own), "hidden_size": WIDTH, "intermediate_size": 37, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": own.bos_token_id,
        "eos_token_id": own.eos_token_id, "pad_token_id": own.pad_token_id, **config,
    }  # fmt: skip


def chat_tokenizer(content: str) -> Any:
    """A tokenizer whose chats are the last message alone, where `content` has its text."""
    own = tokenizer()
    own.chat_template = f"{{{{ messages[-1]{content} }}}}"
    return own


def stable_diffusion(scheduler: Any, cls: str = "StableDiffusionPipeline", **config: Any) -> Any:
    """Of that class, whose UNet has what `config` says otherwise."""
    unet = diffusers.UNet2DConditionModel(
        **{
            "sample_size": 16, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1,
            "attention_head_dim": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": WIDTH, **config,
        }
    )  # fmt: skip
    return getattr(diffusers, cls)(
        vae=vae(), text_encoder=clip(False), tokenizer=tokenizer(), unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def stable_diffusion_xl(scheduler: Any) -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4), use_linear_projection=True,
        cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=clip(False), text_encoder_2=clip(True), tokenizer=tokenizer(),
        tokenizer_2=tokenizer(), unet=unet, scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip


def stable_diffusion_3(scheduler: Any) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=2 * WIDTH, caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=24, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=scheduler, vae=vae(shift_factor=0.1), text_encoder=clip(True),
        tokenizer=tokenizer(), text_encoder_2=clip(True), tokenizer_2=tokenizer(), text_encoder_3=t5(2 * WIDTH),
        tokenizer_3=tokenizer(),
    )  # fmt: skip


def flux(scheduler: Any, guidance_embeds: bool = True) -> Any:
    transformer = transformer_of(
        "FluxTransformer2DModel", in_channels=16, num_single_layers=1, axes_dims_rope=(4, 4, 8),
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=guidance_embeds,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        scheduler=scheduler, vae=vae(shift_factor=0.1), text_encoder=clip(False), tokenizer=tokenizer(),
        text_encoder_2=t5(), tokenizer_2=tokenizer(), transformer=transformer,
    )  # fmt: skip


def flux_2(scheduler: Any) -> Any:
    transformer = transformer_of(
        "Flux2Transformer2DModel", patch_size=1, in_channels=16, num_single_layers=1, axes_dims_rope=(4, 4, 4, 4),
        joint_attention_dim=2 * WIDTH,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
    )  # fmt: skip
    vision = {"model_type": "pixtral", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
              "intermediate_size": 37, "image_size": 30, "patch_size": 6}  # fmt: skip
    mistral = Mistral3Config(text_config={"model_type": "mistral", **text_config()}, vision_config=vision)
    return diffusers.Flux2Pipeline(
        scheduler=scheduler, vae=autoencoder, text_encoder=Mistral3ForConditionalGeneration(mistral),
        tokenizer=chat_tokenizer("['content'][0]['text']"), transformer=transformer,
    )  # fmt: skip


def qwen_image(scheduler: Any) -> Any:
    transformer = transformer_of(
        "QwenImageTransformer2DModel", in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.5, 2.0, 1.0],
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        scheduler=scheduler, vae=autoencoder, text_encoder=qwen(), tokenizer=tokenizer(), transformer=transformer
    )


def z_image(scheduler: Any) -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=WIDTH, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return diffusers.ZImagePipeline(
        scheduler=scheduler, vae=vae(shift_factor=0.1), text_encoder=Qwen3Model(Qwen3Config(**text_config())),
        tokenizer=chat_tokenizer("['content']"), transformer=transformer,
    )  # fmt: skip


def wan(scheduler: Any, experts: int = 1) -> Any:
    transformers = [
        transformer_of(
            "WanTransformer3DModel", attention_head_dim=12, in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=16,
            ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        )
        for _ in range(experts)
    ]  # fmt: skip
    two = {"transformer_2": transformers[1], "boundary_ratio": 0.9} if experts == 2 else {}
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer()), d_model=WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    )
    autoencoder = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.5, 2.0, 1.0],
    )  # fmt: skip
    return diffusers.WanPipeline(
        tokenizer=tokenizer(), text_encoder=encoder, vae=autoencoder, scheduler=scheduler,
        transformer=transformers[0], **two,
    )  # fmt: skip


def ltx(scheduler: Any) -> Any:
    transformer = transformer_of(
        "LTXVideoTransformer3DModel", in_channels=4, out_channels=4, cross_attention_dim=32, caption_channels=WIDTH
    )
    autoencoder = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )  # fmt: skip
    return diffusers.LTXPipeline(
        scheduler=scheduler, vae=autoencoder, text_encoder=t5(), tokenizer=tokenizer(), transformer=transformer
    )


def pixart_sigma(scheduler: Any) -> Any:
    transformer = transformer_of(
        "PixArtTransformer2DModel", sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8,
        num_attention_heads=4, in_channels=4, out_channels=8, caption_channels=WIDTH, cross_attention_dim=32,
        attention_bias=True,
    )  # fmt: skip
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer(), text_encoder=t5(), vae=vae(), transformer=transformer, scheduler=scheduler
    )


def sana(scheduler: Any) -> Any:
    transformer = transformer_of(
        "SanaTransformer2DModel", in_channels=4, out_channels=4, num_cross_attention_heads=2,
        cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=WIDTH, sample_size=16, patch_size=1,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
        scaling_factor=0.41407,
    )  # fmt: skip
    return diffusers.SanaPipeline(
        tokenizer=tokenizer(), text_encoder=Gemma2Model(Gemma2Config(**text_config())), vae=autoencoder,
        transformer=transformer, scheduler=scheduler,
    )  # fmt: skip


def hunyuan_video(scheduler: Any) -> Any:
    transformer = transformer_of(
        "HunyuanVideoTransformer3DModel", in_channels=4, out_channels=4, num_single_layers=1, num_refiner_layers=1,
        patch_size=1, text_embed_dim=WIDTH, pooled_projection_dim=WIDTH, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        norm_num_groups=4,
    )  # fmt: skip
    return diffusers.HunyuanVideoPipeline(
        text_encoder=LlamaModel(LlamaConfig(**text_config(num_hidden_layers=3))), tokenizer=tokenizer(),
        text_encoder_2=clip(False, positions=77), tokenizer_2=tokenizer(), transformer=transformer,
        vae=autoencoder, scheduler=scheduler,
    )  # fmt: skip


def cogvideox(scheduler: Any) -> Any:
    transformer = transformer_of(
        "CogVideoXTransformer3DModel", in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=WIDTH,
        sample_width=4, sample_height=4, sample_frames=9, patch_size=2, max_text_seq_length=LETTERS,
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    return diffusers.CogVideoXPipeline(
        tokenizer=tokenizer(), text_encoder=t5(), vae=autoencoder, transformer=transformer, scheduler=scheduler
    )


def dit(scheduler: Any, out_channels: int = 8) -> Any:
    """Of the 1000 classes of ImageNet, with words for two of them; its model puts out a variance beside the noise."""
    transformer = transformer_of(
        "DiTTransformer2DModel", attention_head_dim=8, num_layers=2, sample_size=8, out_channels=out_channels
    )
    labels = {2: "great white shark, white shark", 879: "umbrella"}
    return diffusers.DiTPipeline(transformer, vae(sample_size=16), scheduler, id2label=labels)


def flow_euler(**config: Any) -> Any:
    """What the flow pipelines are published with."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


DYNAMIC = {
    "FlowMatchEuler": flow_euler(use_dynamic_shifting=True, shift=3.0),
    "UniPC": flow_unipc(use_dynamic_shifting=True),
}
SHIFTED = {"FlowMatchEuler": flow_euler(shift=3.0), "UniPC": flow_unipc(flow_shift=3.0)}
FLOW_DPM = diffusers.DPMSolverMultistepScheduler(
    prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
)
CLASSIC = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

PIPELINES: dict[str, TinyPipeline] = {
    "StableDiffusionPipeline": TinyPipeline(
        stable_diffusion,
        {
            "PNDM": diffusers.PNDMScheduler(**CLASSIC, skip_prk_steps=True, steps_offset=1),
            "EulerAncestral": diffusers.EulerAncestralDiscreteScheduler(**CLASSIC, steps_offset=1),
        },
        TEXT,
    ),
    "StableDiffusionXLPipeline": TinyPipeline(
        stable_diffusion_xl,
        {
            "Euler": diffusers.EulerDiscreteScheduler(**CLASSIC, timestep_spacing="leading", steps_offset=1),
            "DPMSolverMultistep": diffusers.DPMSolverMultistepScheduler(**CLASSIC, use_karras_sigmas=True),
        },
        TEXT,
    ),
    "StableDiffusion3Pipeline": TinyPipeline(stable_diffusion_3, SHIFTED, TEXT),
    "FluxPipeline": TinyPipeline(flux, DYNAMIC, {"prompt": TEXT["prompt"], **IMAGE}),
    "Flux2Pipeline": TinyPipeline(
        flux_2,
        DYNAMIC,
        {"prompt": TEXT["prompt"], **IMAGE, "max_sequence_length": LETTERS, "text_encoder_out_layers": (1, 2)},
    ),
    "QwenImagePipeline": TinyPipeline(
        qwen_image,
        {
            "FlowMatchEuler": flow_euler(
                use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
            ),
            "UniPC": DYNAMIC["UniPC"],
        },
        {**TEXT, **IMAGE, "true_cfg_scale": 4.0},
        spread=3.0,
    ),
    "ZImagePipeline": TinyPipeline(
        z_image,
        {"FlowMatchEuler": SHIFTED["FlowMatchEuler"], "FlowMatchLCM": diffusers.FlowMatchLCMScheduler(shift=3.0)},
        {**TEXT, **IMAGE, "max_sequence_length": LETTERS},
    ),
    "WanPipeline": TinyPipeline(
        wan, dict(reversed(SHIFTED.items())), {**TEXT, **VIDEO, "max_sequence_length": LETTERS}, spread=3.0
    ),
    "WanPipeline with two experts": TinyPipeline(
        partial(wan, experts=2),
        dict(reversed(SHIFTED.items())),
        {**TEXT, **VIDEO, "max_sequence_length": LETTERS, "guidance_scale": 4.0, "guidance_scale_2": 3.0},
    ),
    "LTXPipeline": TinyPipeline(ltx, DYNAMIC, {**TEXT, **VIDEO, "max_sequence_length": LETTERS}),
    "PixArtSigmaPipeline": TinyPipeline(
        pixart_sigma,
        {
            "DPMSolverMultistep": diffusers.DPMSolverMultistepScheduler(),
            "Heun": diffusers.HeunDiscreteScheduler(),
        },
        {**TEXT, **IMAGE, "max_sequence_length": LETTERS, **AS_ASKED},
    ),
    "SanaPipeline": TinyPipeline(
        sana,
        {"DPMSolverMultistep": FLOW_DPM, "FlowMatchEuler": flow_euler(shift=3.0)},
        {**TEXT, **IMAGE, "max_sequence_length": LETTERS, **AS_ASKED, "complex_human_instruction": None},
    ),
    "HunyuanVideoPipeline": TinyPipeline(
        hunyuan_video,
        SHIFTED,
        {
            **TEXT,
            **VIDEO,
            "max_sequence_length": LETTERS,
            "true_cfg_scale": 2.0,
            "prompt_template": {"template": "{}", "crop_start": 0},
        },
    ),
    "CogVideoXPipeline": TinyPipeline(
        cogvideox,
        {"CogVideoXDDIM": diffusers.CogVideoXDDIMScheduler(), "DDIM": diffusers.DDIMScheduler(**CLASSIC)},
        {**TEXT, **VIDEO, "max_sequence_length": LETTERS},
    ),
    "DiTPipeline": TinyPipeline(
        dit,
        {"DDIM": diffusers.DDIMScheduler(), "DPMSolverMultistep": diffusers.DPMSolverMultistepScheduler()},
        {"class_labels": [879]},
    ),
}
"""Every one of them takes the drop-in."""


def class_of(name: str) -> str:
    """The pipeline class of an entry of PIPELINES."""
    return name.partition(" ")[0]


TIER_2 = [name for name in PIPELINES if class_of(name) in FAMILIES]
"""Those of which the class has a family."""


@cache
def shared(name: str) -> Any:
    """One of PIPELINES, built once for all tests, which leave it as it is."""
    return PIPELINES[name]()


def sizes_of(name: str) -> dict[str, Any]:
    """What its call asks for of what a runtime fixes; the rest is the pipeline's own."""
    call = PIPELINES[name].call
    return {size: call[size] for size in ("height", "width", "num_frames", "max_sequence_length") if size in call}


@dataclass(frozen=True, eq=False)
class Refusal:
    """A sampler that a pipeline does not run with, and the error that says so."""

    pipeline: str
    sampler: str
    scheduler: Any
    error: type[Exception]
    message: str


NOT_LINEAR = [
    Refusal(
        "CogVideoXPipeline", "CogVideoXDPM", diffusers.CogVideoXDPMScheduler(), NotLinear,
        "CogVideoXDPMScheduler is not a table: its step() takes the previous x0 as an argument and draws noise that "
        "it throws away. Use instead: CogVideoXDDIMScheduler.",
    ),
]  # fmt: skip
"""Samplers that a pipeline runs with, and that have no table."""

NOT_TAKEN = [
    Refusal(
        "FluxPipeline", "FlowMatchHeun", diffusers.FlowMatchHeunDiscreteScheduler(), ValueError,
        "`set_timesteps` does not support custom sigmas schedules.",
    ),
    Refusal(
        "ZImagePipeline", "UniPC", SHIFTED["UniPC"], TypeError, "can't multiply sequence by non-int of type 'float'",
    ),
    Refusal(
        "LTXPipeline", "LTXEulerAncestralRF", diffusers.LTXEulerAncestralRFScheduler(), TypeError,
        "`sigmas` must be a list or torch.Tensor, got <class 'numpy.ndarray'>.",
    ),
]  # fmt: skip
"""Samplers that have a table, and that the untouched pipeline itself does not run with."""


@dataclass(frozen=True, eq=False)
class Unserved:
    """What a pipeline that has a family does and a runtime over it does not, and the error that says so."""

    pipeline: str
    what: str
    error: type[Exception]
    message: str
    changed: Callable[[Any], Any] = lambda pipe: pipe  # the pipeline that does it
    fields: Mapping[str, Any] = field(default_factory=dict)  # of the request that asks for it


def with_components(pipe: Any, **components: Any) -> Any:
    """The same pipeline with some components, or some of its config, of its own."""
    return type(pipe)(**{**pipe.components, **components})


def with_config(part: str, **config: Any) -> Callable[[Any], Any]:
    """What makes a pipeline with another config of one of its parts."""
    return lambda pipe: with_components(
        pipe, **{part: type(pipe.components[part]).from_config(pipe.components[part].config, **config)}
    )


FROM_INSIDE = (
    "expected a UNet that is guided from outside, got one that takes guidance as an input (time_cond_proj_dim)"
)
NOT_SERVED = [
    Unserved(
        "StableDiffusionPipeline", "an LCM UNet", PlanMismatch, FROM_INSIDE,
        changed=with_config("unet", time_cond_proj_dim=8),
    ),
    Unserved(
        "StableDiffusionXLPipeline", "an LCM UNet", PlanMismatch, FROM_INSIDE,
        changed=with_config("unet", time_cond_proj_dim=8),
    ),
    Unserved(
        "StableDiffusionXLPipeline", "a half-precision VAE that must be upcast", PlanMismatch,
        "expected an autoencoder that may decode in float16, got one that overflows there; call "
        "pipe.vae.to(torch.float32) first",
        changed=lambda pipe: with_components(pipe, vae=vae().half()),
    ),
    Unserved(
        "StableDiffusionPipeline", "guidance_rescale", ValueError,
        "guidance_rescale: expected none in a runtime's step", fields={"guidance_rescale": 0.7},
    ),
    Unserved(
        "FluxPipeline", "a negative prompt (true_cfg_scale)", PlanMismatch,
        "negative_prompt: expected none, one call a row is all that the plan's conditioning.prompt_embeds holds",
        fields={"negative_prompt": "a two"},
    ),
    *(
        Unserved(
            "QwenImagePipeline", f"a transformer with {name}, another kind's (Edit, Layered)", PlanMismatch,
            f"expected a transformer of Qwen-Image's first kind, got one with {name}",
            changed=with_config("transformer", **{name: True}),
        )
        for name in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
    ),
    Unserved(
        "WanPipeline", "expand_timesteps (Wan 2.2 5B)", PlanMismatch,
        "expected one timestep a sample, got a WanPipeline with expand_timesteps (Wan 2.2 5B), where each token has "
        "its own",
        changed=lambda pipe: with_components(pipe, expand_timesteps=True),
    ),
]  # fmt: skip

OF_NO_FAMILY = (
    "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionControlNetPipeline",
    "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLControlNetPipeline", "StableDiffusion3Img2ImgPipeline",
    "FluxImg2ImgPipeline", "FluxControlNetPipeline", "FluxKontextPipeline", "QwenImageImg2ImgPipeline",
    "QwenImageEditPipeline", "QwenImageEditPlusPipeline", "QwenImageControlNetPipeline", "WanImageToVideoPipeline",
    "WanVideoToVideoPipeline",
)  # fmt: skip
"""Of the models that tier 2 serves, pipelines that it does not."""
