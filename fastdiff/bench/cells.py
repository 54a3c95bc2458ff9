"""A suite as pieces, and what each adds to the report: every sample, count and outcome, as JSON can hold them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff.bench import arms, canary, gates, rows
from fastdiff.bench.arms import Workbench
from fastdiff.bench.machine import Nvml
from fastdiff.bench.measure import Block, Sample, StopRule, compare, interleave, worse
from fastdiff.bench.rows import RowBench
from fastdiff.bench.suite import FateCase, ImageCase, MemoryCase, RowCase, SetupCase, Suite
from fastdiff.bench.summary import compiled_part
from fastdiff.bench.vram import vram_peak
from fastdiff.bench.words import dimensions
from fastdiff.stages import table_of

IMAGE_TOLERANCE = 1e-3  # of a pixel in [0, 1], a quarter of a grey level: batching alone moves pixels by up to 1e-4
ROW_TOLERANCE = 1e-4  # largest difference of the last samples, relative to their largest element
CANARY_PAIRS = 250

SECTIONS = ("gates", "setup", "counts", "fates", "errors", "memory", "rows", "images", "canaries")

Entry = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """One piece of a run: what it adds to which section of the report."""

    section: str
    title: str
    measure: Callable[[RowBench], Iterable[Entry]]
    max_s: float | None = None  # of sampling; None where nothing is timed


class ArmsFailed(Exception):
    """Which arms of a case could not run, and why; the others are measured all the same."""


def pieces(suite: Suite, seed: int) -> Iterator[Piece]:
    """The suite as pieces, the quick and exact ones first, the canaries last."""
    yield Piece("gates", "deterministic figures", _figures)
    for setup in suite.setup:
        for sampler in setup.samplers:
            measure = partial(_setup, sampler=sampler, case=setup, suite=suite, seed=seed)
            yield Piece("setup", f"set-up: {sampler}", measure, suite.row_max_s)
    for count in suite.count:
        yield Piece("counts", "operations and syncs", partial(rows.counts, case=count))
    for fate in suite.fate:
        for sampler in fate.samplers:
            measure = partial(_fates, sampler=sampler, case=fate, seed=seed)
            yield Piece("fates", f"interleaved requests: {sampler}", measure)
    for error in suite.error:
        yield Piece("errors", "error against float64", partial(rows.errors, case=error))
    for memory in suite.memory:
        yield Piece("memory", f"memory: {memory.name}", partial(_memory, case=memory))
    for row in suite.row:
        max_s = suite.row_max_s if row.max_s is None else row.max_s
        yield Piece("rows", f"rows: {row.name}", partial(_rows, case=row, suite=suite, seed=seed), max_s)
    for image in suite.image:
        measure = partial(_images, case=image, suite=suite, seed=seed)
        yield Piece("images", f"images: {image.name}", measure, image.max_s)
    yield Piece("canaries", "canaries", partial(_canaries, suite=suite, seed=seed), suite.canary_max_s)


def choose(pieces: Sequence[Piece], text: str) -> list[Piece]:
    """Those with `text` in their title; with one that is timed go the canaries, which vouch for its times."""
    chosen = [piece for piece in pieces if text in piece.title]
    timed = any(piece.max_s is not None for piece in chosen)
    return [piece for piece in pieces if piece in chosen or (timed and piece.section == "canaries")]


def measure(piece: Piece, row_bench: RowBench, threads: int) -> Entry:
    """One line of the journal: what the piece adds, and what that took.

    A piece that cannot run (a sampler without a table, a schedule that diffusers refuses) has its reason instead, and
    one of which a part cannot (a model that cannot be captured) has both.
    """
    torch.set_num_threads(threads)
    bench = row_bench.bench
    compiled, started = set(bench.compile_s), time.perf_counter()
    entries: list[Entry] = []
    reason = None
    try:
        entries += piece.measure(row_bench)
    except Exception as error:  # whatever a sampler raises is the reason
        reason = _reason(error)
    new = bench.compile_s.keys() - compiled
    return {
        "section": piece.section, "title": piece.title, "entries": entries, "reason": reason,
        "compile_s": {what: seconds for what, seconds in bench.compile_s.items() if what in new},
        "compile_cache": {what: cache for what, cache in bench.compile_cache.items() if what in new},
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def assemble(suite: Suite, finished: Sequence[Entry]) -> Entry:
    """The sections of a report, from lines of the journal. Pure."""
    sections: dict[str, list[Entry]] = {section: [] for section in SECTIONS}
    compile_s: dict[str, float] = {}
    compile_cache: dict[str, str] = {}
    for one in finished:
        sections[one["section"]] += one["entries"]
        compile_s = {**one["compile_s"], **compile_s}  # after a resumption a step is compiled again; the first counts
        compile_cache = {**one["compile_cache"], **compile_cache}
    return {
        **sections,
        **{single: next(iter(sections[single]), None) for single in ("gates", "canaries")},
        "unsupported": [{"what": one["title"], "reason": one["reason"]} for one in finished if one["reason"]],
        **{name: [asdict(one) for one in getattr(suite, name)] for name in ("attribution", "no_gain", "target")},
        "compile_s": compile_s,
        "compile_cache": compile_cache,
        "seconds": {
            "compile": sum(compile_s.values()),
            "all": sum(one["seconds"] for one in finished),
            "pieces": {one["title"]: one["seconds"] for one in finished},
        },
    }


def _figures(row_bench: RowBench) -> Iterator[Entry]:
    bench = row_bench.bench
    torch.set_num_threads(1)  # counted, not timed: threads would only wait for each other
    yield {"key": gates.key(bench.device), "figures": gates.figures(bench)}


def _canaries(row_bench: RowBench, suite: Suite, seed: int) -> Iterator[Entry]:
    rule = StopRule(level=suite.level, half_width=0.01, max_pairs=CANARY_PAIRS, max_s=suite.canary_max_s)
    measured = _interleave(row_bench.bench, canary.blocks(row_bench.bench), canary.COMPARISONS, rule, seed)
    yield canary.judged(
        {name: [sample.total_s for sample in samples] for name, samples in measured.items()}, suite.level
    )


def _setup(row_bench: RowBench, sampler: str, case: SetupCase, suite: Suite, seed: int) -> Iterator[Entry]:
    blocks = rows.setup_blocks(row_bench.bench, sampler, case)
    # A probe takes a thousand times as long as the other calls, and leaves them cold caches: it has a turn of its own.
    probes = {name: blocks.pop(name) for name in list(blocks) if name in rows.PROBES}
    measured: dict[str, list[Sample]] = {}
    for some in (blocks, probes):
        measured |= _interleave(row_bench.bench, some, [], _rule(suite, max_s=suite.row_max_s / 2), seed)
    call_s = {name: [sample.total_s for sample in samples] for name, samples in measured.items()}
    yield {"sampler": sampler, "steps": case.steps, "call_s": call_s}


def _memory(row_bench: RowBench, case: MemoryCase) -> Iterator[Entry]:
    yield {**asdict(case), "entries": list(rows.memory(row_bench, case))}


def _rows(row_bench: RowBench, case: RowCase, suite: Suite, seed: int) -> Iterator[Entry]:
    torch.set_num_threads(case.threads)  # before anything is compiled: the kernels are made for so many
    made = {"diffusers": row_bench.diffusers_rows(case)}
    for mode in case.modes:
        made[f"tensorized/{mode}"] = row_bench.table_block(case, mode)
    for name, (block, _) in made.items():
        row_bench.bench.first_call(f"null-model step, {dimensions(case.latent_shape)}, batch {case.batch}", name, block)
    reference = rows.last_samples(made["diffusers"][1])
    checked = {
        name: _Checked(block, partial(_row_error, lasts, reference), ROW_TOLERANCE)
        for name, (block, lasts) in made.items()
    }
    pairs = [("diffusers", name) for name in made if name != "diffusers"]
    rule = _rule(suite, suite.row_max_s if case.max_s is None else case.max_s)
    measured = _measured(row_bench.bench, checked, pairs, rule, seed)
    yield {
        **asdict(case),
        "arms": {name: _arm(measured.get(name, []), one.error, ROW_TOLERANCE) for name, one in checked.items()},
        "comparisons": _compared(measured, pairs, suite.level),
    }


def _row_error(lasts: Sequence[Tensor], reference: Tensor) -> float:
    return ((rows.last_samples(lasts) - reference).abs().max() / reference.abs().max()).item()


def _images(row_bench: RowBench, case: ImageCase, suite: Suite, seed: int) -> Iterator[Entry]:
    bench = row_bench.bench
    requests = arms.requests_of(bench, case.samplers, case.steps, case.guidance, case.batch, seed)
    sequential = case.workload == "sequential"
    checked, peaks = {}, {}
    failed: list[str] = []
    with torch.no_grad():
        reference = torch.stack(arms.images_of(bench, "shared-sequential/eager", requests, True, bench.stopwatch()))
        for arm in case.arms:
            lasts: list[Tensor] = []
            block = arms.image_block(bench, arm, requests, sequential, lasts)
            try:
                bench.first_call(compiled_part(arm, case.batch), arm, block)
            except Exception as error:  # whatever compiling or capturing this model raises
                failed.append(f"{arm}: {_reason(error)}")
                continue
            checked[arm] = _Checked(block, partial(_image_error, lasts, reference), IMAGE_TOLERANCE)
            peaks[arm] = vram_peak(bench.device, block)
    if not checked:
        raise ArmsFailed("; ".join(failed))
    pairs = [pair for pair in case.compare if set(pair) <= checked.keys()]
    measured = _measured(bench, checked, pairs, _rule(suite, case.max_s), seed)
    yield {
        **asdict(case),
        "compare": pairs,
        "rows": sum(len(table_of(bench.family, request)) for request in requests),
        "arms": {
            arm: {**_arm(measured.get(arm, []), one.error, IMAGE_TOLERANCE), "vram_peak_bytes": peaks[arm]}
            for arm, one in checked.items()
        },
        "comparisons": _compared(measured, pairs, suite.level),
    }
    if failed:
        raise ArmsFailed("; ".join(failed))


def _image_error(lasts: Sequence[Tensor], reference: Tensor) -> float:
    return (torch.stack(list(lasts)) - reference).abs().max().item()


class _Checked:
    """A block whose answer is looked at after each time that it runs, outside of what is timed; the worst one counts.

    It has run once, untimed.
    """

    def __init__(self, block: Block, error_now: Callable[[], float], tolerance: float) -> None:
        self._block, self._error_now, self._tolerance = block, error_now, tolerance
        self.error = error_now()

    @property
    def right(self) -> bool:
        """Whether every answer so far was; NaN is not."""
        return self.error <= self._tolerance

    def __call__(self) -> Sample:
        """Run, then look."""
        sample = self._block()
        self.error = worse(self.error, self._error_now())
        return sample


def _measured(
    bench: Workbench, checked: Mapping[str, _Checked], pairs: Sequence[tuple[str, str]], rule: StopRule, seed: int
) -> dict[str, list[Sample]]:
    """The samples of those arms that are right at first and were so each time."""
    valid = {name: one for name, one in checked.items() if one.right}
    asked = [pair for pair in pairs if set(pair) <= valid.keys()]
    measured = _interleave(bench, valid, asked, rule, seed)
    return {name: samples for name, samples in measured.items() if checked[name].right}


def _interleave(
    bench: Workbench, blocks: Mapping[str, Block], pairs: Sequence[tuple[str, str]], rule: StopRule, seed: int
) -> dict[str, list[Sample]]:
    """`interleave`, with what NVML says of the device beside each sample, where it says anything."""
    nvml = Nvml(bench.device)
    return interleave(blocks, pairs, rule, seed, None if nvml.reason else nvml)


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
        "gpu_s": [sample.gpu_s for sample in samples if sample.gpu_s is not None],
        "gpu": [{**asdict(sample.gpu), "flags": sample.gpu.flags} for sample in samples if sample.gpu],
    }


def _compared(measured: Mapping[str, list[Sample]], pairs: Iterable[tuple[str, str]], level: float) -> list[Entry]:
    return [
        {"base": base, "arm": arm, "ratio": asdict(compare(measured[base], measured[arm], level))}
        for base, arm in pairs
        if measured.keys() >= {base, arm}
    ]


def _fates(row_bench: RowBench, sampler: str, case: FateCase, seed: int) -> Iterator[Entry]:
    """What became of two requests that ran interleaved, against each one alone."""
    bench = row_bench.bench
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
