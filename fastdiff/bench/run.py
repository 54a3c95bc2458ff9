"""A suite on a pipeline -> the report's raw data: every sample, count and outcome, as JSON can hold them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastdiff
from fastdiff.bench import arms, rows
from fastdiff.bench.arms import Workbench
from fastdiff.bench.measure import Sample, StopRule, compare, interleave
from fastdiff.bench.suite import FateCase, ImageCase, MemoryCase, RowCase, SetupCase, Suite
from fastdiff.bench.vram import vram_peak

IMAGE_TOLERANCE = 1e-3  # of a pixel in [0, 1], a quarter of a grey level: batching alone moves pixels by up to 1e-4
ROW_TOLERANCE = 1e-4  # largest difference of the last samples, relative to their largest element

Entry = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Piece:
    """One piece of a run: what it adds to which list of the report."""

    section: str
    title: str
    measure: Callable[[], Iterable[Entry]]


def run(pipe: Any, suite: Suite, seed: int, say: Say) -> dict[str, Any]:
    """Every case of `suite`. `say` is called with the title of each piece when it starts.

    A piece that cannot run (a sampler without a table, a schedule that diffusers refuses) is listed with its reason.
    """
    bench = Workbench(pipe)
    sections = ("setup", "counts", "fates", "errors", "memory", "rows", "images", "unsupported")
    results: dict[str, list[Entry]] = {section: [] for section in sections}
    piece_s: dict[str, float] = {}
    started = time.perf_counter()
    for piece in pieces(bench, suite, seed):
        say(piece.title)
        torch.set_num_threads(suite.threads)
        piece_started = time.perf_counter()
        try:
            results[piece.section] += piece.measure()
        except Exception as error:  # whatever a sampler raises is the reason
            reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
            results["unsupported"].append({"what": piece.title, "reason": reason})
        piece_s[piece.title] = time.perf_counter() - piece_started
    return {
        **results,
        **{name: [asdict(one) for one in getattr(suite, name)] for name in ("attribution", "no_gain", "target")},
        "latent_shape": list(bench.family.latent_shape),
        "compile_s": dict(bench.compile_s),
        "seconds": {"compile": sum(bench.compile_s.values()), "all": time.perf_counter() - started, "pieces": piece_s},
    }


def count_pieces(suite: Suite) -> int:
    """How many pieces `run` makes of `suite`."""
    by_sampler = [case.samplers for case in suite.setup] + [case.samplers for case in suite.fate]
    return sum(map(len, (*by_sampler, suite.count, suite.error, suite.memory, suite.row, suite.image)))


def pieces(bench: Workbench, suite: Suite, seed: int) -> Iterator[Piece]:
    """The suite as pieces, the quick and exact ones first."""
    row_bench = rows.RowBench(bench, seed)
    for setup in suite.setup:
        for sampler in setup.samplers:
            yield Piece("setup", f"set-up: {sampler}", partial(_setup, bench, sampler, setup, suite, seed))
    for count in suite.count:
        yield Piece("counts", "operations and syncs", partial(rows.counts, row_bench, count))
    for fate in suite.fate:
        for sampler in fate.samplers:
            yield Piece("fates", f"interleaved requests: {sampler}", partial(_fates, bench, sampler, fate, seed))
    for error in suite.error:
        yield Piece("errors", "error against float64", partial(rows.errors, row_bench, error))
    for memory in suite.memory:
        yield Piece("memory", f"memory: {memory.name}", partial(_memory, row_bench, memory))
    for row in suite.row:
        yield Piece("rows", f"rows: {row.name}", partial(_rows, row_bench, row, suite, seed))
    for image in suite.image:
        yield Piece("images", f"images: {image.name}", partial(_images, bench, image, suite, seed))


def _setup(bench: Workbench, sampler: str, case: SetupCase, suite: Suite, seed: int) -> Iterator[Entry]:
    blocks = rows.setup_blocks(bench, sampler, case)
    measured = interleave(blocks, [], _rule(suite, max_s=suite.row_max_s), seed)
    call_s = {name: [sample.total_s for sample in samples] for name, samples in measured.items()}
    yield {"sampler": sampler, "steps": case.steps, "call_s": call_s}


def _memory(row_bench: rows.RowBench, case: MemoryCase) -> Iterator[Entry]:
    yield {**asdict(case), "entries": list(rows.memory(row_bench, case))}


def _rows(row_bench: rows.RowBench, case: RowCase, suite: Suite, seed: int) -> Iterator[Entry]:
    torch.set_num_threads(case.threads)  # before anything is compiled: the kernels are made for so many
    made = {"diffusers": row_bench.diffusers_rows(case)}
    shape = "x".join(map(str, case.latent_shape))
    for mode in case.modes:
        made[f"tensorized/{mode}"] = row_bench.table_block(case, mode)
    for name, (block, _) in made.items():
        row_bench.bench.first_call(f"null-model step, {shape}, batch {case.batch}", name, block)
    lasts = {name: rows.last_samples(last) for name, (_, last) in made.items()}
    reference = lasts["diffusers"]
    errors = {name: ((last - reference).abs().max() / reference.abs().max()).item() for name, last in lasts.items()}
    valid = {name: block for name, (block, _) in made.items() if errors[name] <= ROW_TOLERANCE}
    pairs = [("diffusers", name) for name in made if name != "diffusers" and name in valid]
    measured = interleave(valid, pairs, _rule(suite, case.max_s or suite.row_max_s), seed)
    yield {
        **asdict(case),
        "arms": {name: _arm(measured.get(name, []), errors[name], ROW_TOLERANCE) for name in made},
        "comparisons": _compared(measured, pairs, suite.level),
    }


def _images(bench: Workbench, case: ImageCase, suite: Suite, seed: int) -> Iterator[Entry]:
    requests = arms.requests_of(bench, case.samplers, case.steps, case.guidance, case.batch, seed)
    sequential = case.workload == "sequential"
    blocks = {arm: arms.image_block(bench, arm, requests, sequential) for arm in case.arms}
    errors, peaks = {}, {}
    with torch.no_grad():
        reference = torch.stack(arms.images_of(bench, "shared-sequential/eager", requests, True, bench.stopwatch()))
        for arm, block in blocks.items():
            what = "denoiser and step" if arm.startswith("tensorized") else "denoiser"
            bench.first_call(f"{what}, batch {case.batch}", arm, block)
            images = torch.stack(arms.images_of(bench, arm, requests, sequential, bench.stopwatch()))
            errors[arm] = (images - reference).abs().max().item()
            peaks[arm] = vram_peak(bench.device, block)
    valid = {arm: block for arm, block in blocks.items() if errors[arm] <= IMAGE_TOLERANCE}
    pairs = [pair for pair in case.compare if set(pair) <= valid.keys()]
    measured = interleave(valid, pairs, _rule(suite, case.max_s), seed)
    yield {
        **asdict(case),
        "rows": sum(len(fastdiff.tabulate(request.scheduler, request.steps)) for request in requests),
        "arms": {
            arm: {**_arm(measured.get(arm, []), errors[arm], IMAGE_TOLERANCE), "vram_peak_bytes": peaks[arm]}
            for arm in case.arms
        },
        "comparisons": _compared(measured, pairs, suite.level),
    }


def _rule(suite: Suite, max_s: float) -> StopRule:
    return StopRule(level=suite.level, half_width=suite.half_width, max_pairs=suite.max_pairs, max_s=max_s)


def _arm(samples: list[Sample], error: float, tolerance: float) -> Entry:
    """An arm's part of a cell. A wrong answer has no times: however fast, it is INVALID."""
    right = error <= tolerance  # NaN is not
    return {
        "status": "ok" if right else "INVALID",
        "reason": None if right else f"differs from the reference by {error:.2g}, more than {tolerance:g}",
        "error": error if math.isfinite(error) else None,
        "total_s": [sample.total_s for sample in samples],
        "loop_s": [sample.loop_s for sample in samples if sample.loop_s is not None],
    }


def _compared(measured: Mapping[str, list[Sample]], pairs: Iterable[tuple[str, str]], level: float) -> list[Entry]:
    return [
        {"base": base, "arm": arm, "ratio": asdict(compare(measured[base], measured[arm], level))}
        for base, arm in pairs
    ]


def _fates(bench: Workbench, sampler: str, case: FateCase, seed: int) -> Iterator[Entry]:
    """What became of two requests that ran interleaved, against each one alone."""
    for workload, steps in (("concurrent-equal", (case.steps,) * 2), ("concurrent-mixed", (case.steps, case.unequal))):
        requests = arms.requests_of(bench, (sampler,), steps, case.guidance, 2, seed)
        with torch.no_grad():
            solo = arms.images_of(bench, "cloned-deepcopy/eager", requests, True, bench.stopwatch())
            for arm in case.arms:
                outcomes = arms.interleaved(bench, arm, requests)
                yield {
                    "sampler": sampler,
                    "workload": workload,
                    "arm": arm,
                    "steps": list(steps),
                    "fates": [_fate(outcome, image) for outcome, image in zip(outcomes, solo, strict=True)],
                }


def _fate(outcome: Tensor | Exception, solo: Tensor) -> Entry:
    if isinstance(outcome, Exception):
        return {"fate": "raised", "error": type(outcome).__name__, "difference": None}
    difference = (outcome - solo).abs().max().item()
    right = difference <= IMAGE_TOLERANCE
    return {
        "fate": "right" if right else "silently wrong",
        "error": None,
        "difference": difference if math.isfinite(difference) else None,
    }
