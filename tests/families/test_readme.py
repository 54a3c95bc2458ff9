"""The example in fastdiff/families/README.md serves its pipeline; without it the pipeline is told what still works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest

import fastdiff
from fastdiff import PlanMismatch, Request, Runtime
from fastdiff.families import FAMILIES, family_of
from tests.families.tiny import image_of_diffusers, images_of, relative_error
from tests.families.tiny_pipelines import shared

README = (Path(fastdiff.__file__).parent / "families" / "README.md").read_text()


@pytest.fixture(scope="module")
def pixart() -> Any:
    return shared("PixArtSigmaPipeline")


def test_a_class_without_a_family_is_told_what_still_works(pixart: Any) -> None:
    with pytest.raises(PlanMismatch, match=r"QwenImagePipeline.*, got PixArtSigmaPipeline; .*table_scheduler"):
        family_of(pixart)


def test_the_example_is_short_and_serves_its_pipeline(pixart: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) < 60
    monkeypatch.setitem(FAMILIES, "PixArtSigmaPipeline", FAMILIES["DiTPipeline"])  # so that it is taken out again
    exec(compile(code, "README.md", "exec"), {})
    requests = [
        Request(prompt="a handwritten one", negative_prompt="a two", guidance_scale=4.5, steps=5, seed=1),
        Request(prompt="a three", guidance_scale=1.0, steps=4, seed=2),
        Request(prompt="a nine", guidance_scale=3.0, steps=6, seed=3, scheduler=diffusers.EulerDiscreteScheduler()),
    ]
    for image, request in zip(images_of(Runtime(pixart, max_batch=3), requests), requests, strict=True):
        expected = image_of_diffusers(pixart, request, use_resolution_binning=False)
        assert relative_error(image, expected) <= 1e-4
