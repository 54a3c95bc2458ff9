"""`python -m bench.families`: whole calls of each tiny pipeline of the tests, untouched, in tier 1 and in tier 2.

Every arm makes one image of the same request, in one process, turn by turn in random order. Writes
reports/families/samples.json, with the raw samples, and README.md. Tiny models are all dispatch: what is compared is
what the runtime adds to a call, not what a real model takes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

import fastdiff
from fastdiff.bench.journal import commit
from fastdiff.bench.machine import fingerprint
from fastdiff.bench.measure import Block, Sample, StopRule, Stopwatch, compare, interleave
from fastdiff.bench.summary import speed_up
from fastdiff.bench.words import table
from fastdiff.families import FAMILIES
from tests.families.tiny import relative_error
from tests.families.tiny_pipelines import PIPELINES, sizes_of

OUT = Path("reports", "families")
STEPS = 8
NOTES = (
    "Rows are model evaluations: PNDM makes one more than its steps.",
    "QwenImagePipeline takes as many tokens as a prompt has; a runtime pads them to `max_sequence_length`, 512 by "
    "default, of which this prompt fills few. FluxPipeline and StableDiffusion3Pipeline are padded untouched too.",
    "Tier 1 compiled is left out, for the time that its compilations take.",
)
TOLERANCE = 1e-3  # of an image, relative: more is INVALID, however fast
RULE = StopRule(level=0.99, half_width=0.02, max_pairs=60, max_s=8.0)
ARMS = {
    "untouched": "the pipeline as diffusers has it",
    "tier 1": "`fastdiff.accelerate(pipe)`: its scheduler a table",
    "tier 2 eager": "`fastdiff.Runtime(pipe, 1)`",
    "tier 2 compiled": "`fastdiff.Runtime(pipe, 1, mode='compiled')`",
}


def main() -> None:
    """Measure every pipeline, and write the report."""
    torch.set_num_threads(1)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    cpu = torch.device("cpu")
    cells = {name: measured(name) for name in track(PIPELINES, "pipelines")}
    report = {"machine": fingerprint(cpu), "commit": commit(), "steps": STEPS, "rule": asdict(RULE), "cells": cells}
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "samples.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (OUT / "README.md").write_text(markdown(report), encoding="utf-8")


def measured(name: str) -> dict[str, Any]:
    """One pipeline's arms: errors against the untouched one, samples, and what each arm gains."""
    untouched = PIPELINES[name]()
    arms = arms_of(name, untouched)
    with torch.no_grad():
        images = {arm: call() for arm, call in arms.items()}  # and whatever is compiled is compiled
    errors = {arm: relative_error(image, images["untouched"]) for arm, image in images.items()}
    blocks = {arm: block_of(call) for arm, call in arms.items() if errors[arm] <= TOLERANCE}
    pairs = [("untouched", arm) for arm in blocks if arm != "untouched"]
    samples = interleave(blocks, pairs, RULE, seed=0)
    return {
        "rows": len(untouched.scheduler.timesteps),  # of its last run
        "errors": errors,
        "total_s": {arm: [one.total_s for one in of] for arm, of in samples.items()},
        "ratios": {arm: asdict(compare(samples["untouched"], samples[arm], RULE.level)) for _, arm in pairs},
    }


def arms_of(name: str, untouched: Any) -> dict[str, Callable[[], Tensor]]:
    """A call of each arm: one image, or one video, of the same request."""
    tiny = PIPELINES[name]
    call = {**tiny.call, "num_inference_steps": STEPS, "output_type": "pt"}

    def of(pipe: Any) -> Callable[[], Tensor]:
        def image() -> Tensor:
            made: Tensor = pipe(**call, generator=torch.Generator().manual_seed(0))[0][0]
            return made

        return image

    accelerated, pipe = tiny(), tiny()
    fastdiff.accelerate(accelerated)
    arms = {"untouched": of(untouched), "tier 1": of(accelerated)}
    if type(pipe).__name__ not in FAMILIES:
        return arms
    request = fastdiff.Request(
        prompt=call.get("prompt"),
        negative_prompt=call.get("negative_prompt"),
        class_label=call["class_labels"][0] if "class_labels" in call else None,
        guidance_scale=call.get("true_cfg_scale", call.get("guidance_scale")),
        guidance_scale_2=call.get("guidance_scale_2"),
        steps=STEPS,
    )

    def served(runtime: fastdiff.Runtime) -> Callable[[], Tensor]:
        def image() -> Tensor:
            result = runtime.generate([request])[0]
            assert result.image is not None
            return result.image

        return image

    for mode in ("eager", "compiled"):
        arms[f"tier 2 {mode}"] = served(fastdiff.Runtime(pipe, 1, mode, **sizes_of(name)))
    return arms


def block_of(call: Callable[[], Tensor]) -> Block:
    """A call as a timed block."""

    def block() -> Sample:
        watch = Stopwatch(torch.device("cpu"))
        with torch.no_grad(), watch:
            call()
        return Sample(watch.seconds)

    return block


def markdown(report: dict[str, Any]) -> str:
    """The page: rates of all arms, and ratios to the untouched call, each with its interval."""
    rows = [(name, *(spelled(cell, arm) for arm in ARMS)) for name, cell in report["cells"].items()]
    lines = [
        "# families", "",
        f"Whole calls of the tests' tiny pipelines, random weights, one request of {STEPS} steps, text to pixels, on "
        f"{report['machine']['cpu']}, one thread. Rows per second, by the median call, and how many times the "
        "untouched pipeline's rate that is, with its 99 % interval: above 1 is faster. Tiny models are all dispatch, "
        "so this is what a call costs around a model, and no real model's gain. Written by `python -m bench.families`; "
        "raw samples in samples.json.", "",
        table(("pipeline", *ARMS), rows),
    ]  # fmt: skip
    notes = (*(f"{arm}: {what}" for arm, what in ARMS.items()), *NOTES)
    return "\n".join([*lines, "", *map("- {}".format, notes)]) + "\n"


def spelled(cell: dict[str, Any], arm: str) -> str:
    """An arm's rate, its ratio and interval, or why there is none."""
    if arm not in cell["errors"]:
        return "no family"
    if arm not in cell["total_s"]:
        return f"INVALID: differs by {cell['errors'][arm]:.2g}"
    rate = f"{cell['rows'] / median(cell['total_s'][arm]):.0f} rows/s"
    if arm == "untouched":
        return rate
    return f"{rate}, {speed_up(cell['ratios'][arm])}"


if __name__ == "__main__":
    main()
