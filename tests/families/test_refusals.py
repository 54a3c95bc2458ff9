"""What a family cannot serve is refused by name, with what still works; what it can serve is never dropped silently."""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor

import fastdiff
from fastdiff import PlanMismatch, Request, Runtime
from fastdiff.families import FAMILIES, family_of
from fastdiff.noise import seeded
from tests.families.tiny import images_of, ready, relative_error
from tests.families.tiny_pipelines import PIPELINES

PROMPT, NEGATIVE, STEPS = "a handwritten one", "a two", 3
SIZE: dict[str, Any] = {"height": 32, "width": 32}
VIDEO: dict[str, Any] = {**SIZE, "num_frames": 5}
TEXT_LENGTHS: dict[str, tuple[int, int | None]] = {
    "FluxPipeline": (512, 512), "QwenImagePipeline": (512, 1024), "StableDiffusion3Pipeline": (256, 512),
    "WanPipeline": (512, None),
}  # fmt: skip
"""The pipeline's own, and the longest that it takes."""


@cache
def tiny(name: str) -> Any:
    """The tiny pipeline of that class; tests must leave it as it is."""
    return PIPELINES[name]()


def other(name: str, **components: Any) -> Any:
    """The same pipeline with some components of its own."""
    pipe = tiny(name)
    config = {"requires_safety_checker": False} if name == "StableDiffusionPipeline" else {}
    own = type(pipe)(**{**pipe.components, **components}, **config)
    own.set_progress_bar_config(disable=True)
    return own


def own_image(pipe: Any, seed: int = 0, **call: Any) -> Tensor:
    """What the pipeline itself makes, [C, H, W] or [F, C, H, W]."""
    asked = {"prompt": PROMPT, "num_inference_steps": STEPS, "generator": seeded(seed), "output_type": "pt"}
    image: Tensor = pipe(**asked, **call)[0][0]
    return image


# Models and pipelines


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_a_unet_that_takes_guidance_as_an_input_is_refused_and_accelerate_serves_it(name: str) -> None:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel.from_config(tiny(name).unet.config, time_cond_proj_dim=8)
    pipe = ready(other(name, unet=unet, scheduler=diffusers.LCMScheduler(steps_offset=1)))
    with pytest.raises(
        PlanMismatch,
        match=r"expected a UNet that is guided from outside, got one that takes guidance as an input "
        r"\(time_cond_proj_dim\); fastdiff.accelerate\(pipe\) works with it",
    ):
        Runtime(pipe)
    expected = own_image(pipe, guidance_scale=8.5)
    assert relative_error(own_image(pipe, guidance_scale=2.0), expected) > 1e-3
    with fastdiff.accelerated(pipe):
        assert relative_error(own_image(pipe, guidance_scale=8.5), expected) <= 1e-4


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_a_unet_with_an_ip_adapter_is_refused(name: str) -> None:
    unet = diffusers.UNet2DConditionModel.from_config(tiny(name).unet.config)
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")  # as loading an IP-Adapter does
    with pytest.raises(
        PlanMismatch, match=r"text alone, got encoder_hid_dim_type 'ip_image_proj'.*fastdiff.accelerate"
    ):
        Runtime(other(name, unet=unet))


def test_a_class_without_a_family_is_told_of_the_tier_that_serves_it() -> None:
    pipe = tiny("SanaPipeline")
    with pytest.raises(
        PlanMismatch,
        match=r"expected one of .*, got SanaPipeline; .* fastdiff\.accelerate\(pipe\), or .*table_scheduler",
    ):
        Runtime(pipe)


# Fields of a request


def test_rescale_is_refused_truthfully_and_accelerate_serves_it() -> None:
    pipe = tiny("StableDiffusionPipeline")
    request = Request(prompt=PROMPT, guidance_rescale=0.7)
    with pytest.raises(
        ValueError, match=r"guidance_rescale: expected none .*, got 0.7; .* fastdiff.accelerate\(pipe\)"
    ):
        family_of(pipe).check(request)
    expected = own_image(pipe, guidance_rescale=0.7)
    assert relative_error(own_image(pipe), expected) > 1e-3
    with fastdiff.accelerated(pipe):
        assert relative_error(own_image(pipe, guidance_rescale=0.7), expected) <= 1e-4


def test_a_negative_prompt_of_flux_says_what_has_no_room_and_accelerate_serves_it() -> None:
    pipe = tiny("FluxPipeline")
    with pytest.raises(
        PlanMismatch,
        match=r"negative_prompt: expected none, .* conditioning.prompt_embeds holds, got one; .* fastdiff.accelerate",
    ):
        family_of(pipe, **SIZE).check(Request(prompt=PROMPT, negative_prompt=NEGATIVE))
    call = {"negative_prompt": NEGATIVE, "true_cfg_scale": 4.0, **SIZE}
    expected = own_image(pipe, **call)
    with fastdiff.accelerated(pipe):
        assert relative_error(own_image(pipe, **call), expected) <= 1e-4


@pytest.mark.parametrize(
    ("name", "fields", "room"),
    [
        ("FluxPipeline", {"latents": (4, 8)}, "latent_shape"),
        ("FluxPipeline", {"prompt_embeds": (9, 32), "pooled_prompt_embeds": (32,)}, "conditioning.prompt_embeds"),
        (
            "FluxPipeline",
            {"prompt_embeds": (512, 32), "pooled_prompt_embeds": (9,)},
            "conditioning.pooled_prompt_embeds",
        ),
        ("QwenImagePipeline", {"prompt_embeds": (9, 31)}, "conditioning.prompt_embeds"),
        (
            "StableDiffusionXLPipeline",
            {"prompt_embeds": (16, 64), "pooled_prompt_embeds": (9,)},
            "conditioning.text_embeds",
        ),
        (
            "StableDiffusion3Pipeline",
            {"prompt_embeds": (9, 64), "pooled_prompt_embeds": (64,)},
            "conditioning.prompt_embeds",
        ),
        ("WanPipeline", {"prompt_embeds": (9, 32)}, "conditioning.prompt_embeds"),
    ],
)
def test_a_shape_that_does_not_fit_names_a_field_of_the_plan(
    name: str, fields: dict[str, tuple[int, ...]], room: str
) -> None:
    family = family_of(tiny(name), **SIZE)
    tensors: dict[str, Any] = {field: torch.zeros(shape) for field, shape in fields.items()}
    asked: dict[str, Any] = tensors if "prompt_embeds" in fields else {"prompt": PROMPT, **tensors}
    with pytest.raises(PlanMismatch, match=f"expected shape .*, got .*; the plan's {room} holds no other"):
        family.check(Request(**asked, guidance_scale=1.0))
    assert room == "latent_shape" or room.removeprefix("conditioning.") in family.conditioning


# Sizes


@pytest.mark.parametrize("size", [{"height": 0}, {"width": 0}, {"height": -32}, {"width": 32.0}])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_size_that_is_no_positive_integer_is_refused(name: str, size: dict[str, Any]) -> None:
    with pytest.raises(PlanMismatch, match=f"expected a .*height and width .*got .*{next(iter(size.values()))}"):
        family_of(tiny(name), **size)


@pytest.mark.parametrize("frames", [0, -4, 5.0])
def test_frames_that_are_no_positive_integer_are_refused(frames: Any) -> None:
    with pytest.raises(PlanMismatch, match=f"num_frames: expected 1 more than a multiple of 4, got {frames}"):
        family_of(tiny("WanPipeline"), **SIZE, num_frames=frames)


# Text lengths


@pytest.mark.parametrize("length", [7, 40])
@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline", "StableDiffusion3Pipeline"])
def test_an_image_of_texts_of_another_length_is_that_of_the_pipeline(name: str, length: int) -> None:
    """Seven tokens cut the prompt, forty pad it."""
    pipe = tiny(name)
    runtime = Runtime(pipe, max_batch=2, **SIZE, max_sequence_length=length)
    negative: dict[str, Any] = {} if name == "FluxPipeline" else {"negative_prompt": NEGATIVE}
    call = {**SIZE, **negative, "true_cfg_scale" if name == "QwenImagePipeline" else "guidance_scale": 4.0}
    request = Request(prompt=PROMPT, **negative, steps=STEPS, guidance_scale=4.0)
    unguided = Request(prompt="a nine", steps=STEPS, guidance_scale=1.0)
    image, _ = images_of(runtime, [request, unguided])
    expected = own_image(pipe, **call, max_sequence_length=length)
    assert relative_error(image, expected) <= 1e-4
    if length == 7:
        assert relative_error(own_image(pipe, **call), expected) > 1e-3


def test_a_video_of_a_text_of_another_length_is_that_of_the_pipeline() -> None:
    pipe = tiny("WanPipeline")
    request = Request(prompt=PROMPT, negative_prompt=NEGATIVE, steps=STEPS, guidance_scale=4.0)
    (video,) = images_of(Runtime(pipe, max_batch=1, **VIDEO, max_sequence_length=7), [request])
    call = {**VIDEO, "negative_prompt": NEGATIVE, "guidance_scale": 4.0}
    assert relative_error(video, own_image(pipe, **call, max_sequence_length=7)) <= 1e-4
    assert relative_error(video, own_image(pipe, **call)) > 1e-3


@pytest.mark.parametrize(("name", "lengths"), TEXT_LENGTHS.items())
def test_a_length_is_the_pipelines_own_unless_asked_for_and_within_its_range(
    name: str, lengths: tuple[int, int | None]
) -> None:
    pipe, (own, longest) = tiny(name), lengths

    def tokens(length: int | None) -> int:
        shape = family_of(pipe, **SIZE, max_sequence_length=length).conditioning["prompt_embeds"].shape
        return shape[-2] - (pipe.tokenizer_max_length if name == "StableDiffusion3Pipeline" else 0)

    assert (tokens(None), tokens(7)) == (own, 7)
    for length in (0, -1, 7.5, *([] if longest is None else [longest + 1])):
        with pytest.raises(PlanMismatch, match=rf"max_sequence_length: expected 1 .*{name} takes, got {length};"):
            tokens(length)  # type: ignore[arg-type]
    if longest is not None:
        assert tokens(longest) == longest
        with pytest.raises(ValueError, match=f"cannot be greater than {longest}"):
            own_image(pipe, **SIZE, max_sequence_length=longest + 1)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - TEXT_LENGTHS.keys()))
def test_a_pipeline_without_a_text_length_refuses_one(name: str) -> None:
    with pytest.raises(
        PlanMismatch, match=f"max_sequence_length: expected none, {name} takes none, got 64; leave it out"
    ):
        Runtime(tiny(name), max_sequence_length=64)


# What the pipeline does beside the model


@pytest.mark.parametrize("fires", [True, False])
def test_the_safety_checker_makes_of_an_image_what_it_makes_in_the_pipeline(fires: bool) -> None:
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8)).eval()
    checker.concept_embeds_weights.data.fill_(-2.0 if fires else 2.0)  # of cosines, which are -1 to 1
    extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pipe = other("StableDiffusionPipeline", safety_checker=checker, feature_extractor=extractor)
    expected = pipe(PROMPT, num_inference_steps=STEPS, generator=seeded(0), output_type="pt")
    assert expected.nsfw_content_detected == [fires]
    (image,) = images_of(Runtime(pipe, max_batch=1), [Request(prompt=PROMPT, steps=STEPS)])
    torch.testing.assert_close(image, expected.images[0], rtol=0, atol=1e-4)
    assert bool(image.any()) != fires


@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline"])
def test_packed_latents_restart_from_the_noise_that_the_pipeline_draws_next(name: str) -> None:
    pipe = tiny(name)
    runtime = Runtime(pipe, max_batch=1, **SIZE)
    state, generator = runtime.prepare(Request(prompt=PROMPT, steps=STEPS)), seeded(0)
    for _ in range(2):
        drawn = pipe.prepare_latents(1, 4, 32, 32, torch.float32, torch.device("cpu"), generator)
    next_noise = drawn[0] if isinstance(drawn, tuple) else drawn  # Flux has positions beside it
    with pytest.raises(ValueError, match=r"packed latents are drawn as images: .*noise=runtime.family.noise"):
        state.restart()
    assert torch.equal(state.restart(noise=runtime.family.noise).sample, next_noise[0])


def test_latents_that_are_not_packed_restart_with_the_familys_noise_as_without() -> None:
    runtime = Runtime(tiny("StableDiffusionPipeline"), max_batch=1)
    states = [runtime.prepare(Request(prompt=PROMPT, steps=STEPS)) for _ in range(2)]
    assert torch.equal(states[0].restart().sample, states[1].restart(noise=runtime.family.noise).sample)
