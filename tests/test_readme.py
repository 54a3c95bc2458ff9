"""The README's examples run as printed, and its figures are those of the committed run that it names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diffusers
import pytest

import fastdiff
from fastdiff.bench import schema
from fastdiff.bench.report import markdown_table
from fastdiff.bench.tables import attribution_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def example(opening: str) -> str:
    """The one python block that has `opening` in it."""
    found: list[str] = [block for block in EXAMPLES if opening in block]
    assert len(found) == 1
    return found[0]


def run(code: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), namespace)
    return namespace


def test_the_library_example_makes_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = example("runtime.generate")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    run(code)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.png", "2.png"]


def test_the_packages_own_example_makes_its_image(pipe: Any) -> None:
    code = re.findall(r"^    (.*)$", fastdiff.__doc__ or "", re.MULTILINE)
    namespace = {"fastdiff": fastdiff, "pipe": pipe}
    exec(compile("\n".join(code), "fastdiff/__init__.py", "exec"), namespace)
    (result,) = namespace["results"]
    assert (result.rows, result.error) == (12, None)


def test_the_host_loop_serves_everything(runtime: fastdiff.Runtime) -> None:
    code = example("session.step()")
    assert len(code.splitlines()) <= 30
    namespace = run(code)
    assert namespace["refused"] == []
    assert sorted(namespace["images"]) == list(range(6))
    for seed, name in enumerate(["DDIM", "Euler", "Heun", "DPMSolverMultistep", "UniPCMultistep", "LCM"]):
        request = fastdiff.Request(prompt="a handwritten five", scheduler=name, steps=4 + seed, seed=seed)
        (result,) = runtime.generate([request])
        assert result.image is not None
        assert (result.image - namespace["images"][seed]).abs().max() <= 1e-4


def test_the_opening_figures_are_those_of_the_committed_run_that_it_names() -> None:
    quoted = re.search(r"<!-- attribution: (\S+) -->\n(.*?)\n<!-- /attribution -->", README, re.DOTALL)
    assert quoted is not None
    report = schema.load(ROOT / quoted[1])
    assert quoted[2].strip() == markdown_table(attribution_table(report)).strip()
    assert report["model"]["toy"]
    assert "toy model" in README[: quoted.start()]


def test_the_printed_table_is_what_tabulate_gives() -> None:
    printed = example("fastdiff.tabulate").splitlines()[-1].removesuffix("...)")
    assert repr(fastdiff.tabulate(diffusers.UniPCMultistepScheduler(), 20)).startswith(printed)
