"""The section of reports/coverage.md about pipelines, from the tables that the tests are parametrised with.

`python -m tests.families.coverage FILE` writes it anew at the end of FILE.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import diffusers

from fastdiff import Request, Runtime
from fastdiff.acceleration import AccelerateMode
from fastdiff.capture import GRAPH_MODES
from fastdiff.families import FAMILIES
from tests import test_acceleration, test_runtime
from tests.families import test_tier1, test_tier2
from tests.families.tiny_pipelines import NOT_LINEAR, NOT_SERVED, NOT_TAKEN, OF_NO_FAMILY, PIPELINES, TIER_2

HEADING = "## Pipelines"
Test = Callable[..., Any]

SHIPPED = "StableDiffusionPipeline"
"""The class of the shipped pipeline, on which the runtime and its modes are tested as a whole."""

BY_ANOTHER_NAME = {
    "num_inference_steps": "steps", "generator": "seed", "class_labels": "class_label", "eta": "scheduler_options",
    "mu": "scheduler_options", "prompt_embeds_mask": "prompt_embeds", "negative_prompt_embeds_mask": "prompt_embeds",
}  # fmt: skip
"""Arguments of pipelines' calls that a request has a field for."""
OF_THE_CALL = ("self", "kwargs", "output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt")
"""Those that say nothing about an image: how many, and how they come back."""

SAMPLERS = sorted({one.scheduler.removesuffix("Discrete") for one in test_runtime.MIXED if one.scheduler})

TEXT = f"""{HEADING}

Written by `make coverage` from the tables that the tests are parametrised with; a test compares it with them. "Images"
in eager mode are whole images or videos in float32, within 1e-4 of those of the pipeline's untouched `__call__`; the
pipelines are tiny, their weights random. In the other modes "images" are compared with those of eager mode. CUDA is
where a test needs a device; where there is none it is skipped, and no run on one has been committed yet.

Tier 1 is the pipeline's own loop with `pipe.scheduler = fastdiff.table_scheduler(pipe.scheduler)`, where no step falls
back, or after `fastdiff.accelerate(pipe)`, of which compiled images are those of dynamo's trace, on the own sampler.

Tier 2 is `fastdiff.Runtime(pipe)`: an image alone, and three in one batch of unequal samplers, steps, guidance and
texts; in bfloat16, by twice diffusers' own error at most. "One graph" is the model with its guidance traced by dynamo
without a break, with the eager outputs bit by bit. The pipeline that fastdiff ships, of Stable Diffusion's class and
trained, has its images compared with its own `__call__` on {", ".join(SAMPLERS)}
too, and those that inductor compiled with the eager ones.
"""


def section() -> str:
    """The text, one row per pipeline and tier, and what is not supported with its reason."""
    modes = ["eager", "compiled", "graph", *GRAPH_MODES]
    lines = [*TEXT.splitlines(), "", f"| pipeline | tier | samplers | {' | '.join(modes)} |", "|---" * 8 + "|"]
    for tier, names, tested in ((1, PIPELINES, accelerated), (2, TIER_2, served)):
        for name in names:
            cells = " | ".join(tested(name, mode) for mode in modes)
            lines.append(f"| {name} | {tier} | {', '.join(PIPELINES[name].samplers)} | {cells} |")
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
    yield f"{' and '.join(GRAPH_MODES)} in tier 1: the loop is the pipeline's own, which no graph holds"
    for unserved in NOT_SERVED:
        yield f"{unserved.pipeline} with {unserved.what}, in tier 2: `{unserved.error.__name__}`, {unserved.message}"
    without = [*(name for name in PIPELINES if name not in TIER_2), *OF_NO_FAMILY]
    yield (
        f"{', '.join(without)}, in tier 2: they have no family in `fastdiff/families`, and `Runtime` raises "
        "PlanMismatch; `fastdiff/families/README.md` shows how to add one, PixArt-Sigma's"
    )
    for name in FAMILIES:
        if arguments := without_a_field(name):
            yield f"{name}, in tier 2: neither `Request` nor `Runtime` takes {', '.join(arguments)}"
    yield f"{' and '.join(GRAPH_MODES)} without a CUDA device: `CannotCapture`"


def without_a_field(name: str) -> list[str]:
    """Arguments of the pipeline's call that neither a request nor a runtime takes."""
    taken = {field.name for field in fields(Request)} | inspect.signature(Runtime).parameters.keys()
    taken |= {*BY_ANOTHER_NAME, *OF_THE_CALL}
    if name == "QwenImagePipeline":
        taken |= {"true_cfg_scale"}  # which is a request's guidance_scale
    return [
        argument
        for argument in inspect.signature(getattr(diffusers, name).__call__).parameters
        if argument not in taken
    ]


def accelerated(name: str, mode: str) -> str:
    """Which test covers the mode for the pipeline in tier 1, and where it runs."""
    if mode not in get_args(AccelerateMode):
        return "none"
    if mode == "graph":
        return images(test_acceleration.test_a_graph_makes_the_drop_ins_image) if name == SHIPPED else "no test"
    test = test_tier1.test_accelerated_the_images_are_the_drop_ins
    return images(test) if name in values(test, "name") and mode in values(test, "mode") else "no test"


def served(name: str, mode: str) -> str:
    """The same for tier 2."""
    if mode == "graph":
        return "none"
    graphed = test_tier2.test_graphs_make_the_images_of_eager_steps
    tests: dict[str, Test] = {
        "eager": test_tier2.test_an_image_is_that_of_the_pipeline,
        "compiled": test_tier2.test_dynamo_sees_one_graph,
        **dict.fromkeys(GRAPH_MODES, graphed),
    }
    test = tests[mode]
    if mode == "compiled":
        return f"{where(test)}: one graph" if name in values(test, "name") else "no test"
    return images(test) if name in values(test, "name") else "no test"


def images(test: Test) -> str:
    return f"{where(test)}: images"


def where(test: Test) -> str:
    """The device that a test needs."""
    return "CUDA" if any(mark.name == "cuda" for mark in marks(test)) else "CPU"


def values(test: Test, argument: str) -> list[Any]:
    """What a test is parametrised with."""
    found = []
    for mark in marks(test):
        if mark.name == "parametrize":
            names, listed = mark.args
            names = [names] if isinstance(names, str) else list(names)
            if argument in names:
                found += [row[names.index(argument)] if len(names) > 1 else row for row in listed]
    return found


def marks(test: Test) -> list[Any]:
    return list(getattr(test, "pytestmark", []))


def write(page: Path) -> None:
    """The page with the section in place of the one that it has."""
    page.write_text(f"{page.read_text().partition(HEADING)[0].rstrip()}\n\n{section()}")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
