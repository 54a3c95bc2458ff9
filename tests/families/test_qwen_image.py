"""Qwen-Image: texts of any length masked in one batch, and guidance only where there is a negative one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdiff import PlanMismatch, Request, Runtime
from fastdiff.families import qwen_image
from tests.families.tiny import WIDTH, image_of_diffusers, images_of, no_model_work, relative_error
from tests.families.tiny_pipelines import IMAGE, shared


@pytest.fixture(scope="module")
def qwen_pipe() -> Any:
    return shared("QwenImagePipeline")


@pytest.fixture(scope="module")
def runtime(qwen_pipe: Any) -> Runtime:
    return Runtime(qwen_pipe, max_batch=3, **IMAGE)


def ask(**fields: Any) -> Request:
    return Request(**{"prompt": "a handwritten one", "steps": 4, "guidance_scale": 4.0, **fields})


def test_without_a_negative_prompt_nothing_guides_as_in_the_pipeline(qwen_pipe: Any, runtime: Runtime) -> None:
    image, guided = images_of(runtime, [ask(), ask(negative_prompt=" ")])
    assert relative_error(image, image_of_diffusers(qwen_pipe, ask(), **IMAGE)) <= 1e-4
    assert relative_error(image, guided) > 1e-3


def test_the_transformer_part_by_part_is_the_transformer(qwen_pipe: Any) -> None:
    model, generator = qwen_pipe.transformer, torch.Generator().manual_seed(0)
    sample, text = torch.randn(2, 6, 16, generator=generator), torch.randn(2, 5, WIDTH, generator=generator)
    mask, timestep = torch.tensor([[True] * 5, [True, True, False, False, False]]), torch.tensor([0.9, 0.2])
    rotary = qwen_image.rotations(model, 2, 3, 5, torch.device("cpu"))
    expected = model(
        sample, encoder_hidden_states=text, encoder_hidden_states_mask=mask, timestep=timestep,
        img_shapes=[[(1, 2, 3)]] * 2, return_dict=False,
    )[0]  # fmt: skip
    assert torch.equal(qwen_image.forward(model, rotary, sample, timestep, text, mask), expected)


@pytest.mark.parametrize(
    ("shape", "expected"), [((600, WIDTH), r"\(512, 32\), got \(600, 32\)"), ((7, 31), r"\(7, 32\), got \(7, 31\)")]
)
def test_embeddings_are_of_any_length_up_to_the_longest(
    qwen_pipe: Any, runtime: Runtime, shape: tuple[int, int], expected: str
) -> None:
    with no_model_work(qwen_pipe), pytest.raises(PlanMismatch, match=f"prompt_embeds: expected shape {expected}"):
        runtime.generate([ask(), ask(prompt=None, prompt_embeds=torch.zeros(shape))])
