"""The page of what is supported says about pipelines what the tests cover."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastdiff.families import FAMILIES
from tests.families import coverage
from tests.families.tiny_pipelines import PIPELINES, TIER_2, class_of

PAGE = Path(__file__).parents[2] / "reports" / "coverage.md"


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text()
    assert page[page.index(coverage.HEADING) :] == coverage.section(), "run `make coverage`"


def test_every_pipeline_has_its_rows_and_every_family_an_entry() -> None:
    rows = [line.split(" | ")[:2] for line in coverage.section().splitlines()]
    for tier, names in (("1", PIPELINES), ("2", TIER_2)):
        assert all([f"| {name}", tier] in rows for name in names)
    assert {class_of(name) for name in TIER_2} == FAMILIES.keys()


def test_writing_replaces_the_section_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "coverage.md"
    page.write_text("# Coverage\n\n## DDIMScheduler\n")
    for _ in range(2):
        coverage.write(page)
        assert page.read_text() == f"# Coverage\n\n## DDIMScheduler\n\n{coverage.section()}"


@pytest.mark.parametrize(
    ("tested", "name", "mode", "cell"),
    [
        (coverage.accelerated, "SanaPipeline", "compiled", "CPU: images"),
        (coverage.accelerated, "StableDiffusionPipeline", "graph", "CUDA: images"),
        (coverage.accelerated, "FluxPipeline", "graph", "no test"),
        (coverage.accelerated, "FluxPipeline", "step-graph", "none"),
        (coverage.served, "WanPipeline", "eager", "CPU: images"),
        (coverage.served, "WanPipeline with two experts", "loop-graph", "CUDA: images"),
        (coverage.served, "StableDiffusionXLPipeline", "compiled", "CPU: one graph"),
        (coverage.served, "SanaPipeline", "step-graph", "no test"),
    ],
)
def test_a_mode_is_tested_only_where_a_test_is(tested: Any, name: str, mode: str, cell: str) -> None:
    assert tested(name, mode) == cell


def test_what_a_request_has_no_field_for_is_found_in_the_signature() -> None:
    assert "true_cfg_scale" in coverage.without_a_field("FluxPipeline")
    assert "true_cfg_scale" not in coverage.without_a_field("QwenImagePipeline")
    assert "skip_guidance_layers" in coverage.without_a_field("StableDiffusion3Pipeline")
    assert "ip_adapter_image" in coverage.without_a_field("StableDiffusionPipeline")
