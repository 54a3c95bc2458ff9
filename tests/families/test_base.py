"""What all families have in common: the guidance of the pipeline's own call, and no NaN in what is given."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import PlanMismatch, Request, Runtime
from fastdiff.families import FAMILIES, family_of
from fastdiff.families.base import image_size, text_length
from tests.families.tiny_pipelines import shared, sizes_of

TEXT = ("prompt_embeds", "negative_prompt_embeds")
POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
OWN_SCALE = {
    "DiTPipeline": 4.0, "FluxPipeline": 3.5, "QwenImagePipeline": 4.0, "StableDiffusion3Pipeline": 7.0,
    "StableDiffusionPipeline": 7.5, "StableDiffusionXLPipeline": 5.0, "WanPipeline": 5.0,
}  # fmt: skip
TENSORS: dict[str, tuple[str, ...]] = {
    "DiTPipeline": (), "FluxPipeline": ("prompt_embeds", "pooled_prompt_embeds"), "QwenImagePipeline": TEXT,
    "StableDiffusion3Pipeline": (*TEXT, *POOLED), "StableDiffusionPipeline": TEXT,
    "StableDiffusionXLPipeline": (*TEXT, *POOLED), "WanPipeline": TEXT,
}  # fmt: skip
"""Embeddings that each takes; all take latents."""


@cache
def family(name: str) -> Any:
    return family_of(shared(name), **sizes_of(name))


def test_every_family_is_here() -> None:
    assert OWN_SCALE.keys() == TENSORS.keys() == FAMILIES.keys()


@pytest.mark.parametrize(("name", "scale"), OWN_SCALE.items())
def test_guidance_is_that_of_the_pipelines_own_call_unless_asked_for(name: str, scale: float) -> None:
    negative = "a two" if "negative_prompt_embeds" in TENSORS[name] else None
    request = Request(prompt="a one", negative_prompt=negative)
    assert family(name).guidance(request) == scale
    assert family(name).guidance(replace(request, guidance_scale=2)) == 2.0
    if name != "FluxPipeline":  # whose guidance is an input of the model, which has no off
        assert family(name).guidance(replace(request, guidance_scale=0.5)) == 1.0


def given(name: str) -> dict[str, Any]:
    """A request's own tensors, all that the family takes."""
    own = family(name)
    found: dict[str, Any] = {"latents": torch.zeros(own.latent_shape)}
    for field in TENSORS[name]:
        text_shape = own.text_shape if hasattr(own, "text_shape") else (7, own.text_width)
        found[field] = torch.zeros(own.pooled_shape if field in POOLED else text_shape)
    return found if TENSORS[name] else {**found, "class_label": 3}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name in TENSORS for field in ("latents", *TENSORS[name])]
)
def test_what_is_given_must_be_finite(name: str, field: str, value: float) -> None:
    fields = given(name)
    family(name).check(Request(**fields))
    spoilt: Tensor = fields[field].clone()
    spoilt.view(-1)[-1] = value
    with pytest.raises(ValueError, match=f"^{field}: expected finite values, got NaN or infinity"):
        family(name).check(Request(**{**fields, field: spoilt}))


@pytest.mark.parametrize("name", TENSORS)
def test_nothing_that_is_given_is_kept(name: str) -> None:
    """A host may use its buffers again as soon as a request is prepared."""
    fields = given(name)
    theirs = {tensor.untyped_storage().data_ptr() for tensor in fields.values() if isinstance(tensor, Tensor)}
    runtime = Runtime(shared(name), max_batch=1, certify=False, **sizes_of(name))
    state = runtime.prepare(Request(**fields, steps=4))
    ours = {tensor.untyped_storage().data_ptr() for tensor in (state.prepared[1], *state.conditioning.values())}
    assert theirs.isdisjoint(ours)


@pytest.mark.parametrize("side", ["32", 32.0, float("nan")])
def test_a_size_of_another_type_is_told_as_it_was_given(side: Any) -> None:
    for height, width, got in ((side, None, f"{side!r} x 32"), (32, side, f"32 x {side!r}")):
        with pytest.raises(PlanMismatch, match=f"^expected a height and width that are integers, got {got}$"):
            image_size(height, width, default=(32, 32), multiple=4)


def test_a_length_of_another_type_is_told_as_it_was_given() -> None:
    with pytest.raises(PlanMismatch, match="expected 1 to 512, what FluxPipeline takes, got '77'"):
        text_length(shared("FluxPipeline"), "77", 512)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_all_runtimes_of_a_pipeline_encode_one_request_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share its tokenizers, which keep how they pad between two lines of a call."""
    pipe, inside, most = shared(name), 0, 0
    encode = pipe.encode_prompt

    def watched(*arguments: Any, **named: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.05)  # long enough for the other thread to come in, if it could
        try:
            return encode(*arguments, **named)
        finally:
            inside -= 1

    monkeypatch.setattr(pipe, "encode_prompt", watched)
    families = [family_of(pipe, **sizes_of(name)) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda own: own.encode(Request(prompt="a handwritten one")), families))
    assert most == 1
