"""The gate of the ``digits`` pipeline: its digits must be readable, varied and drawn by every sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import SchedulerMixin, StableDiffusionPipeline
from torch import Tensor

from fastdiff import Request, Runtime, acquire
from fastdiff.models import DIGITS_FOLDER, digits
from tests.digits.classifier import DigitClassifier, load_classifier, load_held_out, read_digits

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GUIDANCE_SCALE = 3.0
IMAGES = 100
LABELS = torch.arange(IMAGES) % 10


@dataclass(frozen=True, slots=True)
class Sampler:
    """A diffusers scheduler class by name, with what its config needs beyond the pipeline's own."""

    scheduler: str
    options: tuple[tuple[str, object], ...] = ()

    def build(self, pipeline: StableDiffusionPipeline) -> SchedulerMixin:
        """Builds the scheduler from the config of the pipeline's own."""
        return getattr(diffusers, self.scheduler).from_config(pipeline.scheduler.config, **dict(self.options))


DDIM = Sampler("DDIMScheduler")
GATED = {
    "DDIM": (DDIM, 25, 95),
    "DPM++ 2M": (Sampler("DPMSolverMultistepScheduler", (("algorithm_type", "dpmsolver++"),)), 25, 95),
    "UniPC": (Sampler("UniPCMultistepScheduler"), 25, 95),
    "Euler ancestral": (Sampler("EulerAncestralDiscreteScheduler"), 25, 95),
    "DDIM, 8 steps": (DDIM, 8, 90),
}
OTHERS = (
    "EulerDiscreteScheduler",
    "PNDMScheduler",
    "HeunDiscreteScheduler",
    "DEISMultistepScheduler",
    "LMSDiscreteScheduler",
)


def handwritten(labels: Tensor) -> list[str]:
    """The main prompt of each digit in ``labels`` [count]."""
    return [f"a handwritten {DIGIT_WORDS[label]}" for label in labels.tolist()]


def generate(
    pipeline: StableDiffusionPipeline,
    scheduler: SchedulerMixin,
    steps: int,
    prompts: list[str],
    first_seed: int = 0,
) -> Tensor:
    """Draws one image per prompt, the n-th from seed ``first_seed + n``: RGB [count, 3, 32, 32] in 0..1.

    The pipeline has its own scheduler back afterwards.
    """
    generators = [torch.Generator().manual_seed(first_seed + number) for number in range(len(prompts))]
    own = pipeline.scheduler
    pipeline.scheduler = scheduler
    try:
        images: Tensor = pipeline(
            prompts,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE,
            generator=generators,
            output_type="pt",
        ).images
    finally:
        pipeline.scheduler = own
    return images


def ink_of(images: Tensor) -> Tensor:
    """The ink [count, 1, 32, 32] of RGB images [count, 3, 32, 32]: the mean of the three channels."""
    return images.mean(dim=1, keepdim=True)


def count_right(classifier: DigitClassifier, images: Tensor, labels: Tensor) -> int:
    """How many RGB images [count, 3, 32, 32] the classifier reads as their labels [count]."""
    return int((read_digits(classifier, ink_of(images)) == labels).sum())


def mean_distance_within_classes(ink: Tensor, labels: Tensor) -> float:
    """Mean over the ten digits of the mean L2 distance between two different images of that digit."""
    return sum(float(torch.pdist(ink[labels == digit].flatten(1)).mean()) for digit in range(10)) / 10


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    """The packaged pipeline."""
    return digits()


@pytest.fixture(scope="module")
def classifier() -> DigitClassifier:
    """The judge, trained on real digits alone."""
    return load_classifier()


@pytest.fixture(scope="module")
def drawn(pipeline: StableDiffusionPipeline) -> Callable[[str], Tensor]:
    """Draws the digits 0-9 ten times, from seeds 0..99, under a sampler of ``GATED``; once for each sampler."""

    @cache
    def draw(name: str) -> Tensor:
        sampler, steps, _ = GATED[name]
        return generate(pipeline, sampler.build(pipeline), steps, handwritten(LABELS))

    return draw


def test_the_judge_reads_real_digits(classifier: DigitClassifier) -> None:
    ink, labels = load_held_out()
    right = int((read_digits(classifier, ink) == labels).sum())
    assert len(labels) == 1000
    assert right >= 980, f"the classifier reads {right} of 1000 held-out real digits, 980 are needed"


@pytest.mark.parametrize("name", GATED)
def test_drawn_digits_are_read(name: str, drawn: Callable[[str], Tensor], classifier: DigitClassifier) -> None:
    _, steps, needed = GATED[name]
    right = count_right(classifier, drawn(name), LABELS)
    assert right >= needed, f"{name}, {steps} steps: {right} of {IMAGES} drawn digits are read, {needed} are needed"


@pytest.mark.parametrize("name", GATED)
def test_drawn_digits_vary(name: str, drawn: Callable[[str], Tensor]) -> None:
    ink, labels = load_held_out()
    real = mean_distance_within_classes(ink, labels)
    own = mean_distance_within_classes(ink_of(drawn(name)), LABELS)
    assert own >= 0.5 * real, f"{name}: mean distance {own:.2f} within a class, real digits have {real:.2f}"


@pytest.mark.parametrize("scheduler", OTHERS)
def test_other_samplers_draw(scheduler: str, pipeline: StableDiffusionPipeline, classifier: DigitClassifier) -> None:
    labels = torch.arange(10)
    images = generate(pipeline, Sampler(scheduler).build(pipeline), 25, handwritten(labels))
    right = count_right(classifier, images, labels)
    assert right >= 8, f"{scheduler}, 25 steps: {right} of 10 drawn digits are read, 8 are needed"


@pytest.mark.parametrize(
    "prompt", ["a handwritten {character}", "the digit {word}", "the number {character}", "{word}"]
)
def test_paraphrases_draw_the_same_digit(
    prompt: str, pipeline: StableDiffusionPipeline, classifier: DigitClassifier
) -> None:
    labels = torch.arange(10)
    prompts = [prompt.format(character=digit, word=DIGIT_WORDS[digit]) for digit in range(10)]
    right = count_right(classifier, generate(pipeline, DDIM.build(pipeline), 12, prompts), labels)
    assert right >= 8, f"{prompt!r}: {right} of 10 drawn digits are read, 8 are needed"


@pytest.mark.parametrize("name", GATED)
def test_every_ownership_draws_the_same_digits(
    name: str, pipeline: StableDiffusionPipeline, classifier: DigitClassifier, drawn: Callable[[str], Tensor]
) -> None:
    """Shared and cloned bitwise; tensorized within 1e-4, and read as the same digits."""
    sampler, steps, _ = GATED[name]
    template, labels = sampler.build(pipeline), LABELS[:20]
    prompts = handwritten(labels)
    images = {}
    for ownership, lease in (
        ("shared", acquire(template, "reuse")),
        ("cloned", acquire(template, "isolate", isolated="cloned")),
    ):
        with lease:
            assert lease.ownership == ownership
            images[ownership] = generate(pipeline, lease.scheduler, steps, prompts)
    requests = [
        Request(prompt=prompt, steps=steps, seed=seed, guidance_scale=GUIDANCE_SCALE, scheduler=template)
        for seed, prompt in enumerate(prompts)
    ]
    tensorized = torch.stack(
        [result.image for result in Runtime(pipeline).generate(requests) if result.image is not None]
    )
    assert torch.equal(images["shared"], images["cloned"])
    assert (tensorized - images["shared"]).abs().max() <= 1e-4
    read = read_digits(classifier, ink_of(tensorized))
    assert torch.equal(read, read_digits(classifier, ink_of(images["shared"])))
    assert torch.equal(read, read_digits(classifier, ink_of(drawn(name)[:20])))


def test_the_folder_is_small_and_data_alone(pipeline: StableDiffusionPipeline) -> None:
    files = [path for path in Path(DIGITS_FOLDER).rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    assert size <= 8_000_000, f"{size} bytes"
    assert not [path for path in files if path.suffix == ".py"]
    networks = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    parameters = [parameter for network in networks for parameter in network.parameters()]
    count = sum(parameter.numel() for parameter in parameters)
    assert count <= 1_900_000, f"{count} parameters"
    assert {parameter.dtype for parameter in parameters} == {torch.float32}


def test_loads_as_a_plain_stable_diffusion_pipeline(pipeline: StableDiffusionPipeline) -> None:
    assert type(pipeline) is StableDiffusionPipeline
    assert pipeline.safety_checker is None
    image = pipeline("a handwritten seven", num_inference_steps=2).images[0]
    assert image.size == (32, 32)


def test_each_call_returns_a_pipeline_of_its_own(pipeline: StableDiffusionPipeline) -> None:
    assert digits().unet is not pipeline.unet
