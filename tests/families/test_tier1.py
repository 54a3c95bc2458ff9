"""Tier 1: an untouched pipeline of diffusers makes its own images on the drop-in scheduler, whatever it was given."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import accelerate
import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers.callbacks import IPAdapterScaleCutoffCallback
from diffusers.guiders import AdaptiveProjectedMixGuidance
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import fastdiff
from fastdiff import NotLinear, table_scheduler
from fastdiff.acceleration import DENOISERS
from tests.families.tiny import WIDTH, clip, fill, ready, relative_error, tokenizer
from tests.families.tiny_pipelines import NOT_LINEAR, NOT_TAKEN, PIPELINES, TEXT, Refusal, shared, stable_diffusion

STEPS = 4


def made(name: str, scheduler: Any, seed: int = 0, **changes: Any) -> Tensor:
    """The images or frames of the pipeline's own `__call__`, one, in [0, 1]."""
    pipe = shared(name)
    own, pipe.scheduler = pipe.scheduler, scheduler
    try:
        return called(name, seed, **changes)
    finally:
        pipe.scheduler = own


def called(name: str, seed: int = 0, **changes: Any) -> Tensor:
    """The same, of the pipeline as it is."""
    torch.manual_seed(seed)  # Z-Image gives its sampler no generator
    call = {**PIPELINES[name].call, "num_inference_steps": STEPS, **changes}
    output: Tensor = shared(name)(**call, generator=torch.Generator().manual_seed(seed), output_type="pt")[0]
    return output


@pytest.mark.parametrize(
    ("name", "sampler"), [(name, sampler) for name in PIPELINES for sampler in PIPELINES[name].samplers]
)
def test_the_images_are_the_pipelines_own(name: str, sampler: str) -> None:
    scheduler = PIPELINES[name].samplers[sampler]
    drop_in = table_scheduler(scheduler)
    expected = made(name, copy.deepcopy(scheduler))
    image = made(name, drop_in)
    assert image.dtype == expected.dtype == torch.float32
    assert relative_error(image, expected) <= 1e-4
    assert drop_in.stats == (len(drop_in.timesteps), 0)


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("name", PIPELINES)
def test_accelerated_the_images_are_the_drop_ins(name: str, mode: Any) -> None:
    """Dynamo's own backend compiles nothing: what it traced is run as it is."""
    pipe = shared(name)
    expected = made(name, table_scheduler(copy.deepcopy(pipe.scheduler)))
    with fastdiff.accelerated(pipe, mode, _backend="eager") as handle:
        image = called(name)
    assert torch.equal(image, expected) if mode == "eager" else relative_error(image, expected) <= 1e-4
    assert (handle.stats.calls, handle.stats.fallbacks) == (1, 0)
    assert (handle.stats.built > 0) == (mode == "compiled")


@pytest.mark.parametrize("name", PIPELINES)
def test_what_is_asked_for_shows_in_the_image(name: str) -> None:
    """By ten times the tolerance above: an image that is right then says something about how it was made."""
    call, scheduler = PIPELINES[name].call, shared(name).scheduler
    text = {"prompt": "a nine"} if "prompt" in call else {"class_labels": [2]}
    guidance = {"true_cfg_scale" if "true_cfg_scale" in call else "guidance_scale": 1.5}
    own = made(name, scheduler)
    for change in (text, guidance, {"num_inference_steps": STEPS - 1}, {"seed": 1}):
        assert relative_error(made(name, scheduler, **change), own) > 1e-3, change


@pytest.mark.parametrize("name", PIPELINES)
def test_a_tiny_pipeline_is_the_same_at_every_call(name: str) -> None:
    """Nothing in it is what the memory happened to hold."""
    pipe, again = shared(name), PIPELINES[name]()
    for part, other in zip(pipe.components.values(), again.components.values(), strict=True):
        if isinstance(part, nn.Module):
            theirs = other.state_dict()
            assert all(torch.equal(tensor, theirs[key]) for key, tensor in part.state_dict().items())


def named(refusal: Refusal) -> str:
    return f"{refusal.pipeline}-{refusal.sampler}"


@pytest.mark.parametrize("refusal", NOT_LINEAR, ids=named)
def test_a_sampler_without_a_table_is_refused_and_the_pipeline_runs_with_it(refusal: Refusal) -> None:
    with pytest.raises(refusal.error, match=re.escape(refusal.message)):
        table_scheduler(refusal.scheduler)
    assert made(refusal.pipeline, copy.deepcopy(refusal.scheduler)).isfinite().all()


@pytest.mark.parametrize("refusal", NOT_TAKEN, ids=named)
def test_a_sampler_that_the_pipeline_does_not_take_fails_as_it_does_untouched(refusal: Refusal) -> None:
    for scheduler in (copy.deepcopy(refusal.scheduler), table_scheduler(refusal.scheduler)):
        with pytest.raises(refusal.error, match=re.escape(refusal.message)):
            made(refusal.pipeline, scheduler)


# What people add to a model: adapters, control nets, other attention, offload; and pipelines with another denoiser


MODES = ["eager", "compiled"]


@pytest.fixture
def own() -> Any:
    """A Stable Diffusion of the test's own, which it may change."""
    return PIPELINES["StableDiffusionPipeline"]()


def image(pipe: Any, seed: int = 0, **changes: Any) -> Tensor:
    call = {**TEXT, "guidance_scale": 5.0, "num_inference_steps": STEPS, "output_type": "pt", **changes}
    output: Tensor = pipe(**call, generator=torch.Generator().manual_seed(seed))[0]
    return output


def drop_ins(pipe: Any, calls: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """What `calls` of `pipe` give with the drop-in, which is what an untouched pipeline gives."""
    kept = pipe.scheduler
    untouched = [call() for call in calls]
    pipe.scheduler = table_scheduler(kept, strict=True)
    expected = [call() for call in calls]
    pipe.scheduler = kept
    for one, other in zip(untouched, expected, strict=True):
        assert relative_error(other, one) <= 1e-4
    for number, one in enumerate(expected):  # so that a wrong one shows
        assert all(relative_error(other, one) > 1e-3 for other in expected[:number]), number
    return expected


def assert_accelerated(pipe: Any, mode: Any, calls: Sequence[Callable[[], Tensor]], built: int | None = None) -> None:
    """The images of `calls`, made twice, are the drop-in's: eager bitwise; nothing is compiled again that was."""
    expected = drop_ins(pipe, calls)
    with fastdiff.accelerated(pipe, mode, _backend="eager") as handle:
        for _ in range(2):
            for number, (call, one) in enumerate(zip(calls, expected, strict=True)):
                got = call()
                assert torch.equal(got, one) if mode == "eager" else relative_error(got, one) <= 1e-4, number
        assert (handle.stats.calls, handle.stats.fallbacks, handle.stats.renewed) == (2 * len(calls), 0, 0)
        if mode == "compiled":
            assert handle.stats.built == (len(calls) if built is None else built)


def with_lora(pipe: Any) -> Any:
    """Two adapters in the denoiser, one in the text encoder."""
    torch.manual_seed(1)
    for name in ("one", "two"):
        config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False)
        pipe.unet.add_adapter(config, name)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    pipe.text_encoder.add_adapter(config, "one")
    pipe.unet.set_adapters(["one"], [1.0])
    return pipe


@pytest.mark.parametrize("mode", MODES)
def test_lora_adapters_are_switched_and_scaled_between_calls_and_within(own: Any, mode: Any) -> None:
    with_lora(own)

    def adapted(names: list[str], weights: list[float], then: str = "", **changes: Any) -> Callable[[], Tensor]:
        def callback(call: Any, row: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if then and row == 1:
                call.unet.set_adapters([then], [2.0])
            return tensors

        def call() -> Tensor:
            own.unet.set_adapters(names, weights)
            return image(own, callback_on_step_end=callback, **changes)

        return call

    def disabled() -> Tensor:
        own.unet.disable_adapters()
        try:
            return image(own)
        finally:
            own.unet.enable_adapters()

    calls = [
        adapted(["one"], [1.0]),
        adapted(["two"], [2.0]),
        adapted(["one"], [1.0], cross_attention_kwargs={"scale": 0.3}),
        adapted(["one"], [1.0], then="two"),  # both of which are there
    ]
    if mode == "eager":  # each of these would be another compilation
        calls += [disabled, adapted(["one", "two"], [0.7, 0.4]), adapted(["one"], [0.3])]
    assert_accelerated(own, mode, calls, built=3)


def test_threads_scale_the_layers_that_they_share_one_at_a_time(own: Any) -> None:
    with_lora(own)
    scales = (0.25, 0.5)
    with fastdiff.accelerated(own), ThreadPoolExecutor(2) as pool:

        def scaled(scale: float) -> Tensor:
            return image(own, cross_attention_kwargs={"scale": scale})

        alone = [scaled(scale) for scale in scales]
        assert relative_error(*alone) > 1e-3
        for _ in range(4):
            assert all(map(torch.equal, alone, pool.map(scaled, scales)))


def with_ip_adapter(pipe: Any, tokens: int = 4) -> Any:
    """An IP-Adapter of random weights."""
    torch.manual_seed(1)
    width = pipe.unet.config.cross_attention_dim
    state = {
        "image_proj": {
            "proj.weight": torch.randn(tokens * width, WIDTH), "proj.bias": torch.randn(tokens * width),
            "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
        },
        "ip_adapter": {},
    }  # fmt: skip
    crossing = [name for name in pipe.unet.attn_processors if "attn2" in name]
    for number, name in enumerate(crossing):
        hidden = pipe.unet.get_submodule(name.removesuffix(".processor")).inner_dim
        for which in "kv":
            state["ip_adapter"][f"{2 * number + 1}.to_{which}_ip.weight"] = torch.randn(hidden, width)
    pipe.unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    return pipe


@pytest.mark.parametrize("mode", MODES)
def test_an_ip_adapters_scale_is_set_between_calls_and_within(own: Any, mode: Any) -> None:
    with_ip_adapter(own)
    embeds = [torch.randn(2, 1, WIDTH)]

    def scaled(scale: float, cutoff: int | None = None) -> Callable[[], Tensor]:
        def call() -> Tensor:
            own.set_ip_adapter_scale(scale)
            cut = {"callback_on_step_end": IPAdapterScaleCutoffCallback(None, cutoff)} if cutoff is not None else {}
            return image(own, ip_adapter_image_embeds=embeds, **cut)

        return call

    assert_accelerated(own, mode, [scaled(0.3), scaled(0.0), scaled(0.3, cutoff=1)], built=2)


PERTURBED: list[dict[str, Any]] = [
    {"guidance_scale": 1.0, "pag_scale": 3.0},
    {"guidance_scale": 5.0, "pag_scale": 0.0},
]
"""Perturbed and unguided, guided and not perturbed: the batches have the same shape."""


@pytest.fixture
def perturbing(own: Any) -> Any:
    return ready(diffusers.StableDiffusionPAGPipeline(**own.components, requires_safety_checker=False))


@pytest.mark.parametrize("mode", MODES)
def test_perturbed_attention_is_of_its_call_alone(perturbing: Any, mode: Any) -> None:
    assert_accelerated(perturbing, mode, [lambda one=one: image(perturbing, **one) for one in PERTURBED])  # type: ignore[misc]


def test_threads_perturb_the_attention_that_they_share_one_at_a_time(perturbing: Any) -> None:
    with fastdiff.accelerated(perturbing), ThreadPoolExecutor(2) as pool:
        alone = [image(perturbing, **one) for one in PERTURBED]
        for _ in range(4):
            assert all(map(torch.equal, alone, pool.map(lambda one: image(perturbing, **one), PERTURBED)))


def gligen() -> Any:
    """Whose call switches its fusers off after a part of its steps; with gates as wide open as trained ones."""
    torch.manual_seed(0)
    sampler = diffusers.DDIMScheduler(clip_sample=False)
    pipe = filled(stable_diffusion(sampler, "StableDiffusionGLIGENPipeline", attention_type="gated"))
    for name, parameter in pipe.unet.named_parameters():
        if name.endswith(("alpha_attn", "alpha_dense")):
            parameter.data.fill_(1.0)
    return ready(pipe, 1.5)


BOXED: dict[str, Any] = {"gligen_phrases": ["a two"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]}


@pytest.mark.parametrize("mode", MODES)
def test_fusers_that_a_call_switches_off_are_off_in_the_rows_after_it(mode: Any) -> None:
    own = gligen()
    calls = [lambda beta=beta: image(own, **BOXED, gligen_scheduled_sampling_beta=beta) for beta in (0.25, 1.0)]
    assert_accelerated(own, mode, calls, built=2)


def ledits() -> Any:
    """Whose call has a method of its own set the attention processors."""
    blocks = {"down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2), "block_out_channels": (8, 16, 16)}
    blocks["up_block_types"] = (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D")
    sampler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", steps_offset=1)
    pipe = ready(filled(stable_diffusion(sampler, "LEditsPPPipelineStableDiffusion", **blocks)), 1.5)
    drawn = Image.fromarray(np.random.RandomState(0).randint(0, 256, (32, 32, 3), np.uint8))
    pipe.invert(drawn, num_inversion_steps=6, skip=0.1, generator=torch.Generator().manual_seed(0))
    return pipe


def edited(pipe: Any, prompts: list[str], scale: float) -> Tensor:
    images: Tensor = pipe(
        editing_prompt=prompts, edit_guidance_scale=scale, edit_threshold=0.7, use_cross_attn_mask=True,
        output_type="pt",
    ).images  # fmt: skip
    return images


def easy_animate() -> Any:
    """Whose autoencoder keeps the last frames in its layers."""
    spatial = "SpatialDownBlock3D", "SpatialUpBlock3D"
    down, up = ([first, *[first.replace("Spatial", "SpatialTemporal")] * 3] for first in spatial)
    vae = diffusers.AutoencoderKLMagvit(
        down_block_types=down, up_block_types=up, block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1,
        norm_num_groups=2, spatial_group_norm=False,
    )  # fmt: skip
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, num_layers=1,
        text_embed_dim=WIDTH, text_embed_dim_t5=None, sample_width=16, sample_height=16, patch_size=2,
    )  # fmt: skip
    sampler = diffusers.FlowMatchEulerDiscreteScheduler()
    return filled(
        diffusers.EasyAnimatePipeline(
            vae=vae, text_encoder=None, tokenizer=None, transformer=transformer, scheduler=sampler
        )
    )


def animated(pipe: Any, seed: int) -> Tensor:
    embeds, mask = torch.ones(1, 8, WIDTH), torch.ones(1, 8)
    frames: Tensor = pipe(
        prompt_embeds=embeds, negative_prompt_embeds=-embeds, prompt_attention_mask=mask,
        negative_prompt_attention_mask=mask, height=32, width=32, num_frames=5, num_inference_steps=2,
        generator=torch.Generator().manual_seed(seed), output_type="pt",
    ).frames  # fmt: skip
    return frames


def hunyuan_image() -> Any:
    """Whose guider counts the rows, and keeps a momentum."""
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=(1, 1), text_embed_dim=WIDTH, text_embed_2_dim=WIDTH,
        rope_axes_dim=(8, 8), guidance_embeds=False,
    )  # fmt: skip
    guider = AdaptiveProjectedMixGuidance(
        guidance_scale=4.0, adaptive_projected_guidance_start_step=2, adaptive_projected_guidance_scale=10.0
    )
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    sampler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return filled(diffusers.HunyuanImagePipeline(transformer=transformer, guider=guider, scheduler=sampler, **nothing))


def guided(pipe: Any, steps: int) -> Tensor:
    embeds, mask = torch.ones(1, 6, WIDTH), torch.ones(1, 6).long()
    sides = {"prompt_embeds": 1, "prompt_embeds_2": 2, "negative_prompt_embeds": -1, "negative_prompt_embeds_2": -2}
    masks = dict.fromkeys([name.replace("embeds", "embeds_mask") for name in sides], mask)
    latents: Tensor = pipe(
        **{name: side * embeds for name, side in sides.items()}, **masks, height=256, width=256,
        num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="latent",
    ).images  # fmt: skip
    return latents


@pytest.mark.parametrize(
    ("built", "call", "asked"),
    [
        (hunyuan_image, guided, [(5,), (7,)]),
        (gligen, lambda pipe, beta: image(pipe, **BOXED, gligen_scheduled_sampling_beta=beta), [(0.25,), (1.0,)]),
        (ledits, edited, [(["a one", "zz"], 3.0), (["seven"], 9.0)]),
        (easy_animate, animated, [(0,), (1,)]),
    ],
)
def test_threads_take_turns_where_a_call_changes_layers(
    built: Callable[[], Any], call: Callable[..., Tensor], asked: list[Any]
) -> None:
    pipe = built()
    with fastdiff.accelerated(pipe), ThreadPoolExecutor(2) as pool:
        alone = [call(pipe, *one) for one in asked]
        for _ in range(2):
            assert all(map(torch.equal, alone, pool.map(lambda one: call(pipe, *one), asked)))


def test_a_model_that_fills_its_tables_in_its_first_forward_is_compiled_after_it() -> None:
    """Z-Image's rotations, in a way that dynamo cannot follow."""
    name = "ZImagePipeline"
    own, expected = PIPELINES[name](), made(name, copy.deepcopy(shared(name).scheduler))
    torch.manual_seed(0)
    with fastdiff.accelerated(own, "compiled", _backend="eager") as handle:
        call = {**PIPELINES[name].call, "num_inference_steps": STEPS}
        output = own(**call, generator=torch.Generator().manual_seed(0), output_type="pt")[0]
    assert relative_error(output, expected) <= 1e-4
    assert (handle.stats.built, handle.stats.renewed) == (1, 0)


def test_a_scheduler_that_the_pipeline_copies_in_its_call_is_counted(own: Any) -> None:
    """Text2Video-Zero steps a second time from the middle, which a multistep sampler's table does not know."""
    components = {name: part for name, part in own.components.items() if name != "image_encoder"}
    zero = ready(diffusers.TextToVideoZeroPipeline(**components, requires_safety_checker=False))
    zero.scheduler = diffusers.UniPCMultistepScheduler()
    with fastdiff.accelerated(zero) as handle, pytest.warns(UserWarning, match="its own step"):
        zero(prompt="a one", height=32, width=32, video_length=2, num_inference_steps=4, t0=1, t1=2, output_type="pt")
    assert handle.stats.fallbacks > 0


def test_every_denoiser_of_diffusers_pipelines_has_its_name_here_or_is_left_out_for_a_reason() -> None:
    """A name that is missed runs eagerly in the midst of a compiled pipeline."""
    found = set()
    for name in dir(diffusers):
        cls = getattr(diffusers, name)
        if isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline):
            found |= {
                argument
                for argument, parameter in inspect.signature(cls).parameters.items()
                if re.search("Transformer|UNet", str(parameter.annotation)) and "ControlNet" not in str(parameter)
            }
    combined, upscaled, versatile = {"prior_prior"}, {"super_res_first", "super_res_last"}, {"image_unet", "text_unet"}
    assert found - combined - upscaled - versatile == set(DENOISERS)


@pytest.mark.parametrize("mode", MODES)
def test_control_nets(own: Any, mode: Any) -> None:
    torch.manual_seed(1)
    nets = [diffusers.ControlNetModel.from_unet(own.unet, conditioning_embedding_out_channels=(8, 8)) for _ in range(2)]
    for net in nets:
        fill(net)  # its last layers start as zero
    control = [torch.rand(1, 3, 32, 32) for _ in nets]
    one, both = (
        ready(diffusers.StableDiffusionControlNetPipeline(**given, **own.components, requires_safety_checker=False))
        for given in ({"controlnet": nets[0]}, {"controlnet": diffusers.MultiControlNetModel(nets)})
    )
    calls = [
        lambda: image(one, image=control[0]),
        lambda: image(one, image=control[0], control_guidance_end=0.5),
        lambda: image(one, image=control[0], controlnet_conditioning_scale=0.4),
        lambda: image(one, image=control[0], guess_mode=True),
    ]
    assert_accelerated(one, mode, calls, built=1)
    assert_accelerated(both, mode, [lambda: image(both, image=control, control_guidance_end=[0.5, 1.0])], built=1)


@pytest.mark.parametrize("mode", MODES)
def test_inpainting(own: Any, mode: Any) -> None:
    painter = ready(diffusers.StableDiffusionInpaintPipeline(**own.components, requires_safety_checker=False))
    given: dict[str, Any] = {
        "image": torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        "mask_image": torch.ones(1, 1, 32, 32).triu(), "height": 32, "width": 32,
    }  # fmt: skip
    calls = [lambda: image(painter, **given), lambda: image(painter, **given, strength=0.7)]
    assert_accelerated(painter, mode, calls, built=1)


def group_offloaded(model: nn.Module) -> None:
    cpu = torch.device("cpu")
    diffusers.hooks.apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def offloaded(model: nn.Module) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("offload", [group_offloaded, offloaded])
def test_offloaded_models_keep_their_hooks(own: Any, offload: Callable[[nn.Module], None]) -> None:
    plain = image(own)
    offload(own.unet)
    assert_accelerated(own, "eager", [lambda: image(own)])
    with fastdiff.accelerated(own), ThreadPoolExecutor(3) as pool:
        assert all(torch.equal(image(own), got) for got in pool.map(lambda _: image(own), range(3)))
    assert relative_error(image(own), plain) <= 1e-4
    with pytest.raises(fastdiff.CannotCapture, match="runs no hooks of offload"):
        fastdiff.accelerate(own, "compiled")


def kandinsky_prior() -> Any:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=37, projection_dim=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        image_size=30, patch_size=15,
    )  # fmt: skip
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, embedding_dim=WIDTH, num_embeddings=16
    )
    return diffusers.KandinskyV22PriorPipeline(
        prior=prior, image_encoder=CLIPVisionModelWithProjection(vision), text_encoder=clip(True),
        tokenizer=tokenizer(), image_processor=None,
        scheduler=diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
    )  # fmt: skip


def stable_cascade_prior(scheduler: Any) -> Any:
    torch.manual_seed(0)
    unet = diffusers.models.StableCascadeUNet(
        conditioning_dim=16, block_out_channels=(16, 16), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1), clip_image_in_channels=WIDTH, clip_text_in_channels=WIDTH,
        clip_text_pooled_in_channels=WIDTH, in_channels=4, out_channels=4, switch_level=(False,),
        timestep_ratio_embedding_dim=8, dropout=(0.1, 0.1), down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1), block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
    )  # fmt: skip
    return diffusers.StableCascadePriorPipeline(
        tokenizer=tokenizer(), text_encoder=clip(True), prior=unet,
        scheduler=scheduler,
    )  # fmt: skip


def filled(pipe: Any) -> Any:
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            fill(part)
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("mode", MODES)
def test_priors_are_denoisers_too(mode: Any) -> None:
    cascade = filled(stable_cascade_prior(diffusers.DDPMScheduler(clip_sample=False)))
    assert_accelerated(cascade, mode, [lambda: image(cascade), lambda: image(cascade, seed=1)], built=1)
    kandinsky = filled(kandinsky_prior())
    untouched = image(kandinsky)
    with fastdiff.accelerated(kandinsky, mode, _backend="eager") as handle:
        assert relative_error(image(kandinsky), untouched) <= 1e-4
    assert handle.stats.built == (mode == "compiled")


def test_stable_cascades_own_sampler_is_what_is_refused() -> None:
    pipe = stable_cascade_prior(diffusers.DDPMWuerstchenScheduler())
    with pytest.raises(NotLinear, match="DDPMWuerstchenScheduler is not a table"):
        fastdiff.accelerate(pipe)
