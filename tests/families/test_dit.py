"""DiT: encoded, called and decoded as its own pipeline does, classes and samplers mixed in one batch."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fastdiff import PlanMismatch, Request, Runtime
from fastdiff.families import family_of

STEPS = 6
SAMPLERS = {
    "DDIM": diffusers.DDIMScheduler,
    "DPMSolverMultistep": diffusers.DPMSolverMultistepScheduler,
}


def tiny_dit(out_channels: int) -> Any:
    """A DiTPipeline of random weights: the 1000 classes of ImageNet, and words for two of them."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8, out_channels=out_channels
    )
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.5)  # so that classes and guidance show in the image
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    labels = {2: "great white shark, white shark", 879: "umbrella"}
    pipe = diffusers.DiTPipeline(transformer.eval(), vae.eval(), diffusers.DDIMScheduler(), id2label=labels)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=[4, 8], ids=["plain", "learned-variance"])
def dit(request: pytest.FixtureRequest) -> Any:
    """A pipeline whose transformer puts out the noise alone, and one that puts out its variance too."""
    return tiny_dit(request.param)


def images_of_diffusers(pipe: Any, sampler: str, labels: list[int], guidance_scale: float) -> Tensor:
    """One image per class, the n-th from seed n. The pipeline has its own scheduler back afterwards."""
    own, generators = pipe.scheduler, [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
    pipe.scheduler = SAMPLERS[sampler].from_config(own.config)
    try:
        images: Tensor = pipe(labels, guidance_scale, generators, STEPS, output_type="pt").images
    finally:
        pipe.scheduler = own
    return images


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_are_those_of_the_pipeline(dit: Any, sampler: str, guidance_scale: float) -> None:
    labels = [879, 2, 404]
    expected = images_of_diffusers(dit, sampler, labels, guidance_scale)
    requests = [
        Request(class_label=label, steps=STEPS, seed=seed, scheduler=sampler, guidance_scale=guidance_scale)
        for seed, label in enumerate(labels)
    ]
    for image, result in zip(expected, Runtime(dit, max_batch=3).generate(requests), strict=True):
        assert result.image is not None
        torch.testing.assert_close(result.image, image, rtol=1e-4, atol=1e-4)
    assert (expected[0] - expected[1]).abs().max() > 0.01


def test_samplers_guidance_and_classes_mix_in_one_batch(dit: Any) -> None:
    asked = [("DDIM", 1.0, 7), ("DPMSolverMultistep", 4.0, 8), ("DDIM", 2.0, 9)]
    requests = [
        Request(class_label=label, steps=STEPS, scheduler=sampler, guidance_scale=guidance_scale)
        for sampler, guidance_scale, label in asked
    ]
    for own, result in zip(asked, Runtime(dit, max_batch=3).generate(requests), strict=True):
        sampler, guidance_scale, label = own
        assert result.image is not None
        expected = images_of_diffusers(dit, sampler, [label], guidance_scale)[0]
        torch.testing.assert_close(result.image, expected, rtol=1e-4, atol=1e-4)


def test_encode_is_the_null_class_then_the_requests(dit: Any) -> None:
    family = family_of(dit)
    for label in (879, "umbrella"):
        assert family.encode(Request(class_label=label))["class_labels"].tolist() == [1000, 879]
    assert family.encode(Request(class_label="white shark", guidance_scale=1.0))["class_labels"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_label": 1000}, "class_label: expected 0 to 999, or one of pipe.labels, got 1000"),
        ({"class_label": -1}, "class_label: expected 0 to 999"),
        ({"class_label": "shark"}, "class_label: expected one of the 3 pipe.labels, got 'shark'"),
        ({"prompt": "a shark"}, "expected a class_label alone, got prompt"),
        ({"class_label": 3, "negative_prompt": "a shark"}, "expected a class_label alone, got negative_prompt"),
        ({"class_label": 3, "latents": torch.full((4, 8, 8), torch.nan)}, "latents: expected finite values"),
    ],
)
def test_what_it_cannot_serve_raises_before_any_model_work(dit: Any, fields: dict[str, Any], message: str) -> None:
    runtime = Runtime(dit, max_batch=1)
    called: list[Any] = []
    hook = dit.transformer.register_forward_pre_hook(lambda *_: called.append(_))
    try:
        with pytest.raises(ValueError, match=message):
            runtime.generate([Request(class_label=0), Request(**fields)])
    finally:
        hook.remove()
    assert not called


def test_a_size_or_latents_of_another_shape_are_refused(dit: Any) -> None:
    with pytest.raises(PlanMismatch, match="expected a height and width of 16, DiT's own, got 32 x None"):
        family_of(dit, height=32)
    with pytest.raises(PlanMismatch, match=r"latents: expected shape \(4, 8, 8\), got \(4, 8\)"):
        family_of(dit).check(Request(class_label=0, latents=torch.zeros(4, 8)))


def test_a_pipeline_of_text_refuses_a_class(pipe: Any) -> None:
    with pytest.raises(ValueError, match="expected a prompt or prompt_embeds, got class_label"):
        family_of(pipe).check(Request(class_label=3))
