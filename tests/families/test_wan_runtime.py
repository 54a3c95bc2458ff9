"""Wan in a runtime: requests at different experts in the same step, each as its own pipeline makes it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff import PlanMismatch, Request, Runtime
from fastdiff.stages import table_of
from tests.families.tiny import WORDS, images_of, relative_error
from tests.families.tiny_wan import SAMPLERS, video_of_diffusers, wan

BOUNDARY = 0.875
FRAMES = 5
SIZE: dict[str, Any] = {"height": 32, "width": 32, "num_frames": FRAMES}


@pytest.fixture(scope="module")
def two() -> Any:
    return wan(experts=2, boundary_ratio=BOUNDARY)


@pytest.fixture(scope="module")
def runtime(two: Any) -> Runtime:
    return Runtime(two, max_batch=3, **SIZE)


def ask(i: int, **fields: Any) -> Request:
    asked = {"prompt": f"a handwritten {WORDS[i]}", "negative_prompt": "a two", "steps": 4, "seed": i}
    return Request(**{**asked, "guidance_scale": 5.0, **fields})


def mixed() -> list[Request]:
    """Of 3, 9 and 5 rows; the first expert makes 1, 3 and 2 of them."""
    return [
        ask(0, scheduler=SAMPLERS["FlowMatchEuler"], steps=3, guidance_scale_2=2.0),
        ask(1, scheduler=SAMPLERS["UniPC"], steps=9),
        ask(2, scheduler=SAMPLERS["FlowMatchEuler"], steps=5, guidance_scale=1.0, guidance_scale_2=4.0),
    ]


def errors_of(pipe: Any, runtime: Runtime, requests: Sequence[Request]) -> list[float]:
    """Each request's, all in one call, against the untouched pipeline's own videos."""
    expected = [video_of_diffusers(pipe, request, **SIZE) for request in requests]
    found = images_of(runtime, requests)
    return [relative_error(video, own) for video, own in zip(found, expected, strict=True)]


def test_in_one_step_one_slot_is_at_the_first_expert_and_another_at_the_second(runtime: Runtime) -> None:
    tables = [table_of(runtime.family, request) for request in mixed()]
    crossings = [(runtime.family.boundary(table), len(table)) for table in tables]
    assert all(0 < boundary < rows for boundary, rows in crossings)
    late = [set(range(boundary, rows)) for boundary, rows in crossings]
    assert late[0] & set(range(crossings[1][0]))


def test_each_of_a_mixed_batch_is_that_of_the_pipeline(two: Any, runtime: Runtime) -> None:
    assert max(errors_of(two, runtime, mixed())) <= 1e-4


def test_one_expert_mixes_as_any_family_does() -> None:
    pipe = wan()
    requests = [replace(request, guidance_scale_2=None) for request in mixed()]
    assert max(errors_of(pipe, Runtime(pipe, max_batch=3, **SIZE), requests)) <= 1e-4


def test_more_requests_than_slots_take_the_places_of_those_that_are_done(two: Any, runtime: Runtime) -> None:
    requests = [*mixed(), ask(0, steps=2, guidance_scale_2=1.0), ask(1, scheduler=SAMPLERS["UniPC"], seed=9)]
    assert max(errors_of(two, runtime, requests)) <= 1e-4


@pytest.mark.parametrize("index", range(3))
def test_a_request_alone_is_the_same_beside_the_two_others(runtime: Runtime, index: int) -> None:
    (alone,) = images_of(runtime, [mixed()[index]])
    assert relative_error(images_of(runtime, mixed())[index], alone) <= 1e-4


def test_what_the_neighbours_are_changes_no_bit(runtime: Runtime) -> None:
    *_, asked = mixed()
    others = [ask(0, prompt="a nine", steps=2, guidance_scale_2=7.0), ask(1, steps=6, guidance_scale=1.0)]
    first, second = (images_of(runtime, [*neighbours, asked])[2] for neighbours in (mixed()[:2], others))
    assert torch.equal(first, second)


@pytest.mark.parametrize("change", [{"guidance_scale_2": 3.0}, {"guidance_scale": 3.0, "guidance_scale_2": 5.0}])
def test_each_expert_has_its_scale(runtime: Runtime, change: dict[str, Any]) -> None:
    asked, other = images_of(runtime, [ask(0), ask(0, **change)])
    assert relative_error(other, asked) > 1e-3


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_a_request_is_saved_on_either_side_of_the_boundary_and_resumes(
    runtime: Runtime, tmp_path: Path, rows: int
) -> None:
    request, path = replace(mixed()[1], guidance_scale_2=2.0), tmp_path / "request.safetensors"
    with runtime.session() as session:
        slot = session.add(runtime.prepare(request))
        for _ in range(rows):
            session.step()
        session.save(slot, path)
        resumed = session.load(path)
        while len(session.step()) < 2:
            pass
        torch.testing.assert_close(session.take(resumed).sample, session.take(slot).sample)


def test_a_second_scale_without_a_second_expert_is_refused_before_any_model_work() -> None:
    pipe = wan()
    runtime = Runtime(pipe, max_batch=1, **SIZE)
    called: list[Any] = []
    hooks = [
        part.register_forward_pre_hook(lambda *_: called.append(_)) for part in (pipe.transformer, pipe.text_encoder)
    ]
    try:
        with pytest.raises(ValueError, match="guidance_scale_2: expected none: this pipeline has one model"):
            runtime.generate([ask(0, guidance_scale_2=3.0)])
    finally:
        for hook in hooks:
            hook.remove()
    assert not called


def test_a_plan_of_one_segment_does_not_fit_two_experts(two: Any, runtime: Runtime) -> None:
    with pytest.raises(PlanMismatch, match="segments: the pipeline has 2, the plan 1"):
        Runtime(two, plan=replace(runtime.plan, segments=1), **SIZE)


def test_bfloat16_errs_no_more_than_twice_as_diffusers_does(two: Any) -> None:
    half = copy.deepcopy(two).to(torch.bfloat16)
    errors = {"ours": 0.0, "theirs": 0.0}
    found = images_of(Runtime(half, max_batch=3, **SIZE), mixed())
    for video, request in zip(found, mixed(), strict=True):
        reference = video_of_diffusers(two, request, **SIZE)
        errors["ours"] += relative_error(video, reference)
        errors["theirs"] += relative_error(video_of_diffusers(half, request, **SIZE), reference)
    assert 0 < errors["theirs"] < 1
    assert errors["ours"] <= 2 * errors["theirs"]


@pytest.mark.cuda
def test_captured_experts_make_the_videos_of_eager_ones(two: Any) -> None:
    pipe = copy.deepcopy(two).to("cuda")
    eager = images_of(Runtime(pipe, max_batch=3, **SIZE), mixed())
    captured = images_of(Runtime(pipe, max_batch=3, mode="step-graph", compile="none", **SIZE), mixed())
    for one, other in zip(eager, captured, strict=True):
        assert relative_error(other, one) <= 1e-4
