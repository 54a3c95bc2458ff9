"""The section of reports/coverage.md about pipelines, from the tables that the tests are parametrised with.

`python -m tests.families.coverage FILE` writes it anew at the end of FILE.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from fastdiff.capture import GRAPH_MODES
from fastdiff.families import FAMILIES
from fastdiff.models import digits
from fastdiff.stages import scheduler_of
from tests import test_capture, test_geometries, test_runtime
from tests.families.tiny_pipelines import NOT_LINEAR, NOT_TAKEN, PIPELINES

HEADING = "## Pipelines"
Test = Callable[..., Any]

SHIPPED = "StableDiffusionPipeline"
"""The class of the shipped pipeline, on which the runtime and its modes are tested as a whole."""

GEOMETRY = {
    "StableDiffusionXLPipeline": "tiny-sdxl-1024", "DiTPipeline": "tiny-dit-xl-256",
    "FluxPipeline": "tiny-flux-dev-1024", "StableDiffusion3Pipeline": "tiny-sd35-medium-1024",
    "QwenImagePipeline": "tiny-qwen-image-1024",
}  # fmt: skip
"""Of the others, the bare denoiser that stands for each in the tests of modes."""

TEXT = f"""{HEADING}

Written by `make coverage` from the tables that the tests are parametrised with; a test compares it with them. "Images"
in eager mode are whole images or videos in float32, within 1e-4 of those of the pipeline's untouched `__call__`; the
pipelines are tiny, their weights random, but for the trained one that fastdiff ships: Stable Diffusion's of tier 2.

Tier 1 is the pipeline's own loop with `pipe.scheduler = fastdiff.table_scheduler(pipe.scheduler)`, where no step falls
back, or after `fastdiff.accelerate(pipe)`, whose mode `compiled` is compared with the drop-in's images, on the own
sampler, as dynamo traces the forward; its mode `graph` is tested on the shipped pipeline, where there is CUDA.

Tier 2 is `fastdiff.Runtime(pipe)`. In its other modes, "images" are compared with those of eager mode, "one graph" is
the model with its guidance traced by dynamo without a break, and "one call" the same, captured and replayed on other
inputs. CUDA is where a test needs a device; where there is none it is skipped.
"""


def section() -> str:
    """The text, one row per pipeline and tier, and what is not supported with its reason."""
    lines = [
        *TEXT.splitlines(), "",
        "| pipeline | tier | samplers | eager | compiled | step-graph | loop-graph |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, tiny in PIPELINES.items():
        lines.append(f"| {name} | 1 | {', '.join(tiny.samplers)} | CPU: images | CPU: images | none | none |")
    for name in FAMILIES:
        cells = (tested(name, mode) for mode in ("compiled", *GRAPH_MODES))
        lines.append(f"| {name} | 2 | {', '.join(samplers(name))} | CPU: images | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Not supported:", "", *map("- {}".format, unsupported())]) + "\n"


def unsupported() -> Iterator[str]:
    """What is refused, by whom and why."""
    for refusal in NOT_LINEAR:
        yield f"{refusal.pipeline} with {refusal.sampler}, in tier 1: {refusal.message}"
    for refusal in NOT_TAKEN:
        yield (
            f"{refusal.pipeline} with {refusal.sampler}, in tier 1: the untouched pipeline raises "
            f"{refusal.error.__name__}, and so does the drop-in in it: {refusal.message}"
        )
    without = [name for name in PIPELINES if pipeline_of(name) not in FAMILIES]
    yield (
        f"{', '.join(without)}, in tier 2: they have no family in `fastdiff/families`, and `Runtime` raises "
        "PlanMismatch; `fastdiff/families/README.md` shows how to add one, PixArt-Sigma's"
    )
    yield f"{' and '.join(GRAPH_MODES)} in tier 1: the loop is the pipeline's own, which no graph holds"
    yield f"{' and '.join(GRAPH_MODES)} without a CUDA device: `CannotCapture`"


def pipeline_of(name: str) -> str:
    """The class of an entry of PIPELINES."""
    return name.partition(" ")[0]


def samplers(name: str) -> list[str]:
    """Those that the tests of the pipeline's family compare its images over."""
    if name == SHIPPED:
        own = digits().scheduler
        found = [type(scheduler_of(own, request.scheduler)).__name__ for request in test_runtime.MIXED]
        return [name.removesuffix("Scheduler").removesuffix("Discrete") for name in dict.fromkeys(found)]
    family = FAMILIES[name].__module__.rpartition(".")[2]
    return list(import_module(f"tests.families.test_{family}").SAMPLERS)


def tested(name: str, mode: str) -> str:
    """Which test covers the mode for the family, and where it runs."""
    if name == SHIPPED:
        test = test_runtime.test_compiled_images_are_the_eager_ones
        if mode in GRAPH_MODES:
            test = test_capture.test_a_graphed_runtime_makes_the_images_of_an_eager_one
            assert mode in values(test, "mode")
        return f"{where(test)}: images"
    test, what = {
        "compiled": (test_geometries.test_dynamo_sees_one_graph, "one graph"),
        "step-graph": (test_geometries.test_on_a_gpu_a_captured_call_follows_its_inputs, "one call"),
    }.get(mode, (None, ""))
    return f"{where(test)}: {what}" if test and GEOMETRY.get(name) in values(test, "name") else "no test"


def where(test: Test) -> str:
    """The device that a test needs."""
    return "CUDA" if any(mark.name == "cuda" for mark in marks(test)) else "CPU"


def values(test: Test, argument: str) -> list[Any]:
    """What a test is parametrised with."""
    found = [mark.args for mark in marks(test) if mark.name == "parametrize"]
    return [value for name, listed, *_ in found if name == argument for value in listed]


def marks(test: Test) -> list[Any]:
    return list(getattr(test, "pytestmark", []))


def write(page: Path) -> None:
    """The page with the section in place of the one that it has."""
    page.write_text(f"{page.read_text().partition(HEADING)[0].rstrip()}\n\n{section()}")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
