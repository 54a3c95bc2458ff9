"""The page of what is supported says about pipelines what the tests cover."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdiff.families import FAMILIES
from tests.families import coverage
from tests.families.tiny_pipelines import PIPELINES

PAGE = Path(__file__).parents[2] / "reports" / "coverage.md"


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text()
    assert page[page.index(coverage.HEADING) :] == coverage.section(), "run `make coverage`"


def test_every_pipeline_and_family_has_its_row() -> None:
    rows = [line.split(" | ")[:2] for line in coverage.section().splitlines()]
    for name in PIPELINES:
        assert [f"| {name}", "1"] in rows
    for name in FAMILIES:
        assert [f"| {name}", "2"] in rows


def test_writing_replaces_the_section_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "coverage.md"
    page.write_text("# Coverage\n\n## DDIMScheduler\n")
    for _ in range(2):
        coverage.write(page)
        assert page.read_text() == f"# Coverage\n\n## DDIMScheduler\n\n{coverage.section()}"


@pytest.mark.parametrize(
    ("name", "mode", "cell"),
    [
        ("StableDiffusionPipeline", "compiled", "CPU: images"),
        ("StableDiffusionPipeline", "loop-graph", "CUDA: images"),
        ("FluxPipeline", "compiled", "CPU: one graph"),
        ("StableDiffusionXLPipeline", "compiled", "no test"),
        ("FluxPipeline", "step-graph", "CUDA: one call"),
        ("FluxPipeline", "loop-graph", "no test"),
    ],
)
def test_a_mode_is_tested_only_where_a_test_is(name: str, mode: str, cell: str) -> None:
    assert coverage.tested(name, mode) == cell
