"""DiT: classes by number or word beside the null class, whether its transformer puts out a variance or not."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from fastdiff import PlanMismatch, Request, Runtime
from fastdiff.families import family_of
from tests.families import tiny_pipelines
from tests.families.tiny import image_of_diffusers, images_of, no_model_work, relative_error
from tests.families.tiny_pipelines import PIPELINES, shared


@pytest.fixture(scope="module")
def dit() -> Any:
    return shared("DiTPipeline")


def test_a_transformer_without_a_variance_is_served_as_it_serves_itself() -> None:
    plain = replace(PIPELINES["DiTPipeline"], build=partial(tiny_pipelines.dit, out_channels=4))()
    request = Request(class_label=879, steps=6)
    (image,) = images_of(Runtime(plain, max_batch=1), [request])
    assert relative_error(image, image_of_diffusers(plain, request)) <= 1e-4


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
    ],
)
def test_what_is_no_class_of_its_raises_before_any_model_work(dit: Any, fields: dict[str, Any], message: str) -> None:
    runtime = Runtime(dit, max_batch=1)
    with no_model_work(dit), pytest.raises(ValueError, match=message):
        runtime.generate([Request(class_label=0), Request(**fields)])


def test_a_size_of_another_model_is_refused(dit: Any) -> None:
    with pytest.raises(PlanMismatch, match="expected a height and width of 16, DiT's own, got 32 x None"):
        family_of(dit, height=32)
