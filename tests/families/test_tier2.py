"""Tier 2: a runtime makes the images of the untouched pipeline, every family alike, in each mode that it runs in."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fastdiff import PlanMismatch, Request, Runtime
from fastdiff.capture import Mode
from fastdiff.families import family_of
from tests.families.test_base import TENSORS, given
from tests.families.tiny import WORDS, image_of_diffusers, images_of, no_model_work, relative_error
from tests.families.tiny_pipelines import (
    NOT_SERVED,
    OF_NO_FAMILY,
    PIPELINES,
    TIER_2,
    Unserved,
    class_of,
    shared,
    sizes_of,
)
from tests.purity import digest

STEPS = 4
LABELS = (879, 2, 404)
LONG = "a rather long description of all that there is not"


@cache
def runtime_of(name: str) -> Runtime:
    """Eager, for three requests."""
    return Runtime(shared(name), max_batch=3, **sizes_of(name))


def ask(name: str, i: int = 0, **fields: Any) -> Request:
    """The i-th of three requests, guided, on the pipeline's own sampler."""
    call = PIPELINES[name].call
    texts = {"prompt": f"a handwritten {WORDS[i]}", "negative_prompt": call.get("negative_prompt")}
    asked = texts if "prompt" in call else {"class_label": LABELS[i]}
    return Request(**{**asked, "steps": STEPS, "seed": i, "guidance_scale": 4.0, **fields})


def mixed(name: str) -> list[Request]:
    """Of unequal samplers, steps, guidance and texts, one of them not guided."""
    first, second = PIPELINES[name].samplers.values()
    longer = {"negative_prompt": LONG} if "negative_prompt" in PIPELINES[name].call else {}
    return [
        ask(name, 0, scheduler=first),
        ask(name, 1, scheduler=second, steps=3, guidance_scale=1.0),
        ask(name, 2, scheduler=first, steps=6, guidance_scale=2.5, **longer),
    ]


def of_diffusers(name: str, request: Request, **call: Any) -> Tensor:
    return image_of_diffusers(shared(name), request, **sizes_of(name), **call)


@cache
def mixed_of_diffusers(name: str) -> list[Tensor]:
    return [of_diffusers(name, request) for request in mixed(name)]


# Images


@pytest.mark.parametrize(
    ("name", "sampler"), [(name, sampler) for name in TIER_2 for sampler in PIPELINES[name].samplers]
)
def test_an_image_is_that_of_the_pipeline(name: str, sampler: str) -> None:
    request = ask(name, scheduler=PIPELINES[name].samplers[sampler])
    (image,) = images_of(runtime_of(name), [request])
    expected = of_diffusers(name, request)
    assert image.dtype == expected.dtype == torch.float32
    assert relative_error(image, expected) <= 1e-4


@pytest.mark.parametrize("name", TIER_2)
def test_samplers_steps_guidance_and_texts_mix_in_one_batch(name: str) -> None:
    for image, expected in zip(images_of(runtime_of(name), mixed(name)), mixed_of_diffusers(name), strict=True):
        assert relative_error(image, expected) <= 1e-4


@pytest.mark.parametrize("name", TIER_2)
def test_what_is_asked_for_shows_in_the_image(name: str) -> None:
    """By ten times the tolerance above: an image that is right then says something about how it was made."""
    text = {"prompt": "a nine"} if "prompt" in PIPELINES[name].call else {"class_label": 2}
    changes = [text, {"guidance_scale": 1.5}, {"steps": STEPS - 1}, {"seed": 1}]
    if "negative_prompt" in PIPELINES[name].call:
        changes.append({"negative_prompt": LONG})
    own, *others = images_of(runtime_of(name), [ask(name), *(ask(name, **change) for change in changes)])
    for change, image in zip(changes, others, strict=True):
        assert relative_error(image, own) > 1e-3, change


@pytest.mark.parametrize("name", [name for name in TIER_2 if name != "DiTPipeline"])
def test_an_image_need_not_be_square_and_what_is_left_open_is_the_pipelines_own(name: str) -> None:
    size = {**sizes_of(name), "height": 16, "width": 48}
    request = ask(name, 1, steps=None, guidance_scale=None)
    (result,) = Runtime(shared(name), max_batch=1, **size).generate([request])
    assert result.rows >= inspect.signature(type(shared(name)).__call__).parameters["num_inference_steps"].default
    assert result.image is not None
    assert relative_error(result.image, image_of_diffusers(shared(name), request, **size)) <= 1e-4


@pytest.mark.parametrize("name", TIER_2)
def test_bfloat16_errs_no_more_than_twice_as_diffusers_does(name: str) -> None:
    """Decoded, against diffusers' in float32, all of a mixed batch together."""
    half = copy.deepcopy(shared(name)).to(torch.bfloat16)
    ours = theirs = 0.0
    found = images_of(Runtime(half, max_batch=3, certify=False, **sizes_of(name)), mixed(name))
    for image, request, reference in zip(found, mixed(name), mixed_of_diffusers(name), strict=True):
        ours += relative_error(image, reference)
        theirs += relative_error(image_of_diffusers(half, request, **sizes_of(name)).float(), reference)
    assert 0 < theirs < 3  # of three images: torch 2.11 draws other noise in bfloat16 on a CPU, and so another image
    assert ours <= 2 * theirs


# What a request may bring, and what becomes of it


def embeddings(name: str, prompt: str, negative: str) -> dict[str, Any]:
    """What the pipeline's own encoders make of two texts, by the names of a request's fields."""
    pipe = shared(name)
    takes, own = (inspect.signature(call).parameters for call in (pipe.encode_prompt, type(pipe).__call__))
    asked: dict[str, Any] = {
        "device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True, "prompt_2": None,
        "prompt_3": None, "negative_prompt": negative,
    }  # fmt: skip
    if "max_sequence_length" in own:
        asked["max_sequence_length"] = sizes_of(name).get("max_sequence_length", own["max_sequence_length"].default)
    asked = {key: value for key, value in asked.items() if key in takes}
    found = pipe.encode_prompt(prompt=prompt, **asked)
    if class_of(name) == "QwenImagePipeline":  # one text a call, and its mask
        found = found[0], pipe.encode_prompt(prompt=negative, **asked)[0]
    return {field: tensor[0] for field, tensor in zip(TENSORS[class_of(name)], found, strict=False)}


@pytest.mark.parametrize("name", [name for name in TIER_2 if name != "DiTPipeline"])
def test_embeddings_stand_for_their_text_and_nothing_of_the_pipeline_changes(name: str) -> None:
    runtime, negative = runtime_of(name), "a handwritten two" if "negative_prompt" in PIPELINES[name].call else None
    as_text = ask(name, prompt="a one", negative_prompt=negative)
    as_tensors = replace(as_text, prompt=None, negative_prompt=None, **embeddings(name, "a one", "a handwritten two"))
    before = digest(runtime.family)
    text, tensors = images_of(runtime, [as_text, as_tensors])
    assert digest(runtime.family) == before
    torch.testing.assert_close(tensors, text)


@pytest.mark.parametrize("name", TIER_2)
def test_latents_given_are_the_first_noise_in_the_pipelines_shape_and_dtype(name: str) -> None:
    runtime, generator = runtime_of(name), torch.Generator().manual_seed(0)
    noise = runtime.family.noise(lambda shape: torch.randn(shape, generator=generator))
    request = ask(name, seed=9, latents=noise)
    drawn, given = runtime.generate([ask(name), request])
    torch.testing.assert_close(given.latents, drawn.latents)
    if "latents" in inspect.signature(type(shared(name)).__call__).parameters:
        expected = of_diffusers(name, request, output_type="latent")
        assert (given.latents.shape, given.latents.dtype) == (expected.shape, expected.dtype)
        assert relative_error(given.latents, expected) <= 1e-4


@pytest.mark.parametrize("name", TIER_2)
def test_a_request_is_saved_and_resumes_where_it_was(name: str, tmp_path: Path) -> None:
    path = tmp_path / "request.safetensors"
    with runtime_of(name).session() as session:
        slot = session.add(runtime_of(name).prepare(ask(name)))
        session.step()
        session.save(slot, path)
        resumed, done = session.load(path), 0
        while done < 2:
            done += len(session.step())
        torch.testing.assert_close(session.take(resumed).sample, session.take(slot).sample)


# What is refused


def refused(name: str) -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
    """Fields that no pipeline of its kind can serve, and the error for each."""
    kind, family = class_of(name), runtime_of(name).family
    yield {"scheduler": 3}, TypeError, "expected a diffusers scheduler, got int"
    yield {"latents": torch.zeros(1, 2)}, PlanMismatch, r"latents: expected shape .*, got \(1, 2\)"
    yield {"latents": torch.full(family.latent_shape, torch.nan)}, ValueError, "latents: expected finite values"
    if kind != "StableDiffusionXLPipeline":
        yield {"guidance_rescale": 0.5}, ValueError, "guidance_rescale"
    if len(family.denoisers) == 1:
        yield {"guidance_scale_2": 3.0}, ValueError, "guidance_scale_2: expected none: this pipeline has one model"
    if kind == "DiTPipeline":
        return
    open_text: dict[str, Any] = {"prompt": None, "negative_prompt": None}
    tensors = {**open_text, **given(kind)}
    yield {**open_text, "class_label": 3}, ValueError, "expected a prompt or prompt_embeds, got class_label"
    for field in TENSORS[kind]:
        yield {**tensors, field: tensors[field][..., 1:]}, PlanMismatch, f"{field}: expected shape"
    if "pooled_prompt_embeds" in tensors:
        alone = {**open_text, "prompt_embeds": tensors["prompt_embeds"]}
        yield alone, ValueError, "prompt_embeds need pooled_prompt_embeds beside them"
    if kind.startswith("StableDiffusion"):
        negatives = dict.fromkeys((field for field in tensors if "negative" in field), None)
        yield {**tensors, **negatives, "negative_prompt": "x"}, ValueError, "need negative_prompt_embeds"


@pytest.mark.parametrize("name", TIER_2)
def test_what_it_cannot_serve_raises_before_any_model_work(name: str) -> None:
    cases = list(refused(name))
    with no_model_work(shared(name)):
        for fields, error, message in cases:
            with pytest.raises(error, match=rf"requests\[1\]: .*{message}"):
                runtime_of(name).generate([ask(name), ask(name, 1, **fields)])


@pytest.mark.parametrize("name", [name for name in TIER_2 if name != "DiTPipeline"])
def test_a_size_that_does_not_divide_is_refused_and_the_one_that_is_named_would_do(name: str) -> None:
    size = {**sizes_of(name), "height": 33, "width": 50}
    with pytest.raises(PlanMismatch, match=r"divisible by \d+, got 33 x 50; \d+ x \d+ would do") as caught:
        family_of(shared(name), **size)
    height, width = map(int, re.findall(r"(\d+) x (\d+) would do", str(caught.value))[0])
    family_of(shared(name), **{**size, "height": height, "width": width})


@pytest.mark.parametrize("unserved", NOT_SERVED, ids=lambda one: f"{one.pipeline}-{one.what}")
def test_what_a_runtime_does_not_do_is_refused_with_the_reason(unserved: Unserved) -> None:
    pipe = unserved.changed(shared(unserved.pipeline))
    request = ask(unserved.pipeline, **unserved.fields)
    with no_model_work(pipe), pytest.raises(unserved.error, match=re.escape(unserved.message)):
        Runtime(pipe, max_batch=1, **sizes_of(unserved.pipeline)).generate([request])


@pytest.mark.parametrize("name", OF_NO_FAMILY)
def test_a_class_without_a_family_is_told_what_still_works(name: str) -> None:
    cls = getattr(diffusers, name)
    with pytest.raises(PlanMismatch, match=rf"expected one of .*, got {name}; .*table_scheduler"):
        family_of(cls.__new__(cls))  # of which the class is all that is looked at


# Modes


@pytest.mark.parametrize("name", TIER_2)
def test_dynamo_sees_one_graph(name: str) -> None:
    """No inductor: what breaks a graph does so while it is traced. Bit by bit, for each expert."""
    family, asked = runtime_of(name).family, [ask(name, i) for i in range(2)]
    with torch.no_grad():
        encoded = [family.encode(request) for request in asked]
        inputs = (
            torch.randn(2, *family.latent_shape, generator=torch.Generator().manual_seed(0)),
            torch.tensor([900.0, 300.0]),
            {field: torch.stack([one[field] for one in encoded]) for field in family.conditioning},
            torch.tensor([4.0, 1.0]),
        )
        for denoiser in family.denoisers:
            traced = torch.compile(denoiser, backend="eager", fullgraph=True, dynamic=False)
            assert torch.equal(traced(*inputs), denoiser(*inputs))


@pytest.mark.cuda
@pytest.mark.parametrize("name", TIER_2)
def test_graphs_make_the_images_of_eager_steps(name: str) -> None:
    """At one batch size, so that libraries choose the same kernels."""
    pipe = copy.deepcopy(shared(name)).to("cuda")

    def images(mode: Mode) -> list[Tensor]:
        # Rings that hold a call's noise and no more, as those of large latents do.
        options: dict[str, Any] = {"batch_sizes": (3,), "compile": "none", "unroll": 2, "ring_bytes": 0}
        options |= sizes_of(name)
        runtime = Runtime(pipe, mode=mode, certify=False, progress=False, **options)
        made = images_of(runtime, mixed(name))
        runtime.close()
        return made

    expected = images("eager")
    modes: tuple[Mode, ...] = ("step-graph", "loop-graph")
    for mode in modes:
        for image, own in zip(images(mode), expected, strict=True):
            assert relative_error(image, own) <= 1e-4, mode
