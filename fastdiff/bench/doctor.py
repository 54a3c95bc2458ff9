"""`python -m fastdiff.bench doctor`: what keeps a pipeline's denoise step from being captured, line by line."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.audit import Finding, audit
from fastdiff.bench.arguments import pipeline, refuse, shared
from fastdiff.bench.terminal import require_rich, say, show
from fastdiff.errors import FastdiffError, NotLinear, NumericalError, PlanMismatch
from fastdiff.families import FAMILIES, Family, family_of
from fastdiff.plan import CapturePlan, TensorSpec
from fastdiff.slots import Slots

SCHEMA = "fastdiff.doctor/1"
SLOTS = 2  # enough to see one in the other
STEPS = 20  # of the schedule that the scheduler is asked for
TEXT_LENGTH, SIDE = 16, 4  # of a bare model's inputs: tokens of text, and of an image whose size no config tells
SMALL = {"height": 128, "width": 128, "num_frames": 5, "max_sequence_length": TEXT_LENGTH}  # of a family's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and --json."""
    shared(parser, "model", "--json")


def main(options: argparse.Namespace) -> int:
    """Audit, print; 0 for a pipeline that can be captured as it is, 1 for one with findings."""
    if not options.json:
        require_rich()
    pipe, name = pipeline(options.model, "cpu")
    try:
        report = examine(pipe, name)
    except FastdiffError as error:
        refuse(str(error))
    if options.json:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        print_report(report)
    return 1 if report["findings"] or report["not_linear"] else 0


def examine(pipe: Any, name: str) -> dict[str, Any]:
    """The findings of a pipeline's step and scheduler; PlanMismatch where its model cannot be called."""
    findings: list[Finding] = []
    if type(pipe).__name__ in FAMILIES:
        family = _small(pipe)
        model: nn.Module = family.model
        for denoiser, own in zip(family.denoisers, family.models, strict=True):
            found = audit_denoiser(denoiser, own, family.latent_shape, family.conditioning, family.dtype)
            findings += [one for one in found if one not in findings]  # experts of one class have their code in common
    else:
        model = _model_of(pipe)
        findings += audit_model(model)
    scheduler = pipe.scheduler
    return report_of(name, type(model).__name__, type(scheduler).__name__, findings, _not_linear(scheduler))


def _small(pipe: Any) -> Family:
    """The family at a small size, or at the pipeline's own if that is smaller, or the only one that there is.

    What a step does at all hardly depends on its size, while its time and memory do.
    """
    own = family_of(pipe)
    takes = inspect.signature(FAMILIES[type(pipe).__name__]).parameters
    try:
        small = family_of(pipe, **{name: size for name, size in SMALL.items() if name in takes})
    except PlanMismatch:
        return own
    return min(own, small, key=lambda family: math.prod(family.latent_shape))


def report_of(
    name: str, step: str, scheduler: str, findings: Sequence[Finding], not_linear: str | None
) -> dict[str, Any]:
    """The report as JSON knows it; `not_linear` says why the scheduler has no table."""
    kinds = {finding.kind for finding in findings}
    if kinds - {"row coupling"}:
        capturable = "nothing: a graph would fail on these lines, or repeat what they did at capture"
    else:
        sizes = "batch size 1 alone" if kinds else "any batch size"
        rows = (
            f"the rows of {scheduler}" if not_linear is None else f"another scheduler's rows, {scheduler} having none"
        )
        capturable = f"the step of {step} at {sizes}, with {rows}"
    return {
        "schema": SCHEMA,
        "model": name,
        "step": step,
        "scheduler": scheduler,
        "findings": [asdict(finding) for finding in findings],
        "not_linear": not_linear,
        "capturable": capturable,
    }


def audit_denoiser(
    denoiser: Any,
    model: nn.Module,
    latent_shape: tuple[int, ...],
    conditioning: Mapping[str, TensorSpec],
    dtype: torch.dtype,
) -> list[Finding]:
    """The findings of a denoise step over slots of these shapes, on the model's device."""
    plan = CapturePlan(
        latent_shape=latent_shape, dtype=dtype, conditioning=conditioning, batch_sizes=(SLOTS,), memory=2, rows=8
    )
    device = next(model.parameters()).device
    return audit(denoiser, Slots(plan, device).batch(SLOTS), model)


def audit_model(model: nn.Module) -> list[Finding]:
    """The findings of a diffusers model by itself, called with what its config says; PlanMismatch if that fails."""
    bare = BareModel(model)
    shape, conditioning, dtype = bare.latent_shape, bare.conditioning, bare.dtype
    device = next(model.parameters()).device
    zeros = {name: torch.zeros(1, *spec.shape, dtype=spec.dtype, device=device) for name, spec in conditioning.items()}
    number = torch.ones(1, device=device)
    try:
        with torch.no_grad():
            output = bare(torch.zeros(1, *shape, dtype=dtype, device=device), number, zeros, number)
    except Exception as error:  # a model refuses inputs in as many ways as there are models
        raise PlanMismatch(
            f"{type(model).__name__}: its forward refuses inputs made from its config ({str(error).splitlines()[0]}); "
            "call fastdiff.audit.audit with a denoiser of your own"
        ) from error
    if output.shape[1:] != shape:
        raise PlanMismatch(
            f"{type(model).__name__}: expected an output of {shape} for each sample, got {tuple(output.shape[1:])}; "
            "call fastdiff.audit.audit with a denoiser of your own"
        )
    return audit_denoiser(bare, bare, shape, conditioning, dtype)


class BareModel(nn.Module):
    """A denoiser of a model that has no family: one call, without guidance, with inputs made from its config."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.dtype = model, model.dtype
        config, takes = model.config, inspect.signature(model.forward).parameters
        self.conditioning: dict[str, TensorSpec] = {}
        self.takes_guidance = bool(config.get("guidance_embeds"))
        text_dim = config.get("joint_attention_dim") or config.get("cross_attention_dim")
        if "encoder_hidden_states" in takes and isinstance(text_dim, int):
            self.conditioning["encoder_hidden_states"] = TensorSpec((TEXT_LENGTH, text_dim), self.dtype)
        if "pooled_projections" in takes and config.get("pooled_projection_dim"):
            self.conditioning["pooled_projections"] = TensorSpec((config.pooled_projection_dim,), self.dtype)
        if "class_labels" in takes and (config.get("num_embeds_ada_norm") or config.get("num_class_embeds")):
            self.conditioning["class_labels"] = TensorSpec((), torch.int64)
        if config.get("addition_embed_type") == "text_time":  # SDXL: pooled text, and sizes of six numbers
            pooled_dim = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            self.conditioning["text_embeds"] = TensorSpec((pooled_dim,), self.dtype)
            self.conditioning["time_ids"] = TensorSpec((6,), self.dtype)
        self.latent_shape: tuple[int, ...]
        if "img_ids" in takes:  # tokens, and positions that all samples share
            self.latent_shape = (SIDE * SIDE, config.in_channels)
            places = torch.cartesian_prod(torch.arange(1), torch.arange(SIDE), torch.arange(SIDE))
            self.register_buffer("img_ids", places.to(model.device, self.dtype))
            self.register_buffer("txt_ids", torch.zeros(TEXT_LENGTH, 3, device=model.device, dtype=self.dtype))
        else:
            side = config.get("sample_size") or SIDE
            self.latent_shape = (config.in_channels, *((side, side) if isinstance(side, int) else side))
        known = {"timestep", *self.conditioning}
        first, *others = takes.values()
        needed = [one.name for one in others if one.default is one.empty and one.name not in known]
        if needed:
            raise PlanMismatch(
                f"{type(model).__name__}: no {' or '.join(needed)} can be made from its config; "
                "call fastdiff.audit.audit with a denoiser of your own"
            )
        self.sample_name = first.name

    def forward(self, sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor) -> Tensor:
        """The first channels of the model's output; behind them may be a learned variance."""
        inputs: dict[str, Any] = {self.sample_name: sample, "timestep": timestep, **conditioning}
        inputs |= self.named_buffers(recurse=False)
        if self.takes_guidance:
            inputs["guidance"] = guidance
        if "time_ids" in inputs:
            inputs["added_cond_kwargs"] = {name: inputs.pop(name) for name in ("text_embeds", "time_ids")}
        output: Tensor = self.model(**inputs, return_dict=False)[0]
        return output[:, : sample.shape[1]]


def _model_of(pipe: Any) -> nn.Module:
    for name in ("unet", "transformer"):
        model = getattr(pipe, name, None)
        if isinstance(model, nn.Module):
            return model
    raise PlanMismatch(f"expected a pipeline with a unet or a transformer, got {type(pipe).__name__}")


def _not_linear(scheduler: Any) -> str | None:
    """Why the scheduler has no table; None if it has one."""
    mu = 1.0 if scheduler.config.get("use_dynamic_shifting") else None  # of an image's size; any will do
    try:
        fastdiff.tabulate(scheduler, STEPS, mu=mu)
    except (NotLinear, NumericalError) as error:
        return str(error)
    return None


# The page


def print_report(report: dict[str, Any]) -> None:
    """One table of what was found, what to do about each kind, and a last line that says what can be captured."""
    rows = [
        (one["kind"], one["operation"], f"{_short(one['file'])}:{one['line']}", str(one["count"]))
        for one in report["findings"]
    ]
    advice = {one["kind"]: one["message"] for one in report["findings"]}
    if report["not_linear"]:
        rows.append(("non-linear option", report["scheduler"], "", ""))
        advice["non-linear option"] = report["not_linear"]
    if rows:
        title = f"{report['model']}: {report['step']}, {report['scheduler']}"
        show(title, ("what", "operation", "where", "times a step"), rows, words=(0, 1, 2))
    for label, sentence in (*advice.items(), ("Open to capture", report["capturable"])):
        say(f"{label}: {sentence}.")


def _short(file: str) -> str:
    """The path from the import path's entry that it lies under."""
    roots = [root for root in map(Path, sys.path) if root.is_absolute() and Path(file).is_relative_to(root)]
    return str(Path(file).relative_to(max(roots, key=lambda root: len(root.parts)))) if roots else file
