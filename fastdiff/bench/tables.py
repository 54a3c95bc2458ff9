"""A report's JSON -> its tables, as text. Pure: the same JSON gives the same tables."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from fastdiff.bench import outcome
from fastdiff.bench.shape import OWNERS
from fastdiff.bench.suite import ARMS, split
from fastdiff.bench.summary import Report, compiled_part, find_case, find_ratio, speed_up, unit_s
from fastdiff.bench.words import NONE, byte_count, dimensions, duration, number

WARM = "warm cache, run with an empty TORCHINDUCTOR_CACHE_DIR for it"


@dataclass(frozen=True)
class Table:
    """One table of the page; the first column holds words, the others figures."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def attribution_table(report: Report) -> Table:
    """What each step is worth, against what it changes; then where nothing is gained. The README quotes it."""
    steps, limits = report["summary"]["attribution"], report["summary"]["no_gain"]
    baseline = [
        (f"baseline: {meaning(step['base'])}", duration(step["base_s"], step["per"]), "", "") for step in steps[:1]
    ]
    worth = [
        (step["label"], duration(step["arm_s"], step["per"]), arm_name(step["base"]), ratio_text(step["ratio"]))
        for step in steps
    ]
    costs = [
        (
            f"no gain: {step['label']}",
            duration(step["arm_s"], step["per"]),
            f"{arm_name(step['base'])}, {duration(step['base_s'], step['per'])}",
            ratio_text(step["ratio"]),
        )
        for step in limits
    ]
    note = ""
    case = find_case(report, steps[0]["case"]) if steps else None
    if case:
        note = (
            f"{case['batch']} concurrent requests, text to pixels, {case['rows']} rows in all, samplers "
            f"{', '.join(case['samplers'])}; times per image."
            f"{' *No gain*: cases where none was expected.' if limits else ''}"
        )
    header = ("step", "time", "against", "ratio [interval]")
    return Table(f"What each step is worth{toy(report)}", header, (*baseline, *worth, *costs), note)


def changes_table(report: Report) -> Table:
    """Deterministic figures that moved against the baseline."""
    rows = tuple(
        (
            change["name"],
            number(change["base"]),
            number(change["head"]),
            f"{change['head'] / change['base'] - 1:+.1%}" if change["base"] and change["head"] is not None else "",
            f"**{change['verdict']}**" if change["verdict"] == "REGRESSION" else change["verdict"],
        )
        for change in outcome.changes(report)
    )
    key = f"Against the committed baseline of {report['gates']['key']}; counted, not timed." if rows else ""
    return Table("What changed", ("figure", "baseline", "this run", "change", "verdict"), rows, key)


def targets_table(report: Report) -> Table:
    """The figures to reach."""
    verdicts = {True: "met", False: "**not met**", None: "-"}
    rows = tuple(
        (target["label"], target["goal"], target["measured"], verdicts[target["met"]])
        for target in report["summary"]["targets"]
    )
    return Table("Targets", ("figure", "target", "measured", ""), rows)


def invalid_table(report: Report) -> Table:
    """What is wrong; an arm that is has no times."""
    rows = tuple((one.case, arm_name(one.arm), one.reason) for one in outcome.wrong_answers(report))
    return Table("INVALID: a wrong answer, however fast", ("case", "arm", "reason"), rows)


def unsupported_table(report: Report) -> Table:
    """Pieces that could not run."""
    rows = tuple((one["what"], one["reason"]) for one in report["unsupported"])
    return Table("Unsupported", ("what", "reason"), rows)


def images_table(report: Report) -> Table:
    """Whole requests by ownership."""
    rows = []
    peaks = [arm.get("vram_peak_bytes") for case in report["images"] for arm in case["arms"].values()]
    on_cuda = any(peak is not None for peak in peaks)
    for case in report["images"]:
        for arm, measured in case["arms"].items():
            loop = median(measured["loop_s"]) / case["rows"] if measured["loop_s"] else None
            ratios = [
                f"{ratio_text(one['ratio'])} over {arm_name(one['base'])}"
                for one in case["comparisons"]
                if one["arm"] == arm
            ]
            cells = [
                f"{case['workload']}, {case['batch']} x {samplers(case)}",
                arm_name(arm),
                parity(measured),
                duration(unit_s(case, arm), "image"),
                duration(loop, "image"),
                *([byte_count(measured.get("vram_peak_bytes"))] if on_cuda else []),
                "; ".join(ratios),
            ]
            rows.append(tuple(cells))
    return Table(
        "Images by ownership" + toy(report),
        ("workload", "arm / model", "parity", "per image", "per row", *(["peak VRAM"] if on_cuda else []), "ratio"),
        tuple(rows),
        "Text, denoising and decoding of every request; a row is one model evaluation of one request, in the denoise "
        "loop alone. Parity: the largest pixel difference from the request run alone. Ownerships are compared within "
        "one mode of the model: "
        + "; ".join(f"*{name}*: {meaning}" for name, meaning in ARMS.items() if name != "shared-racing")
        + ".",
    )


def rows_table(report: Report) -> Table:
    """The sampler alone."""
    rows = []
    for case in report["rows"]:
        for arm, measured in case["arms"].items():
            ratio = None if arm == "diffusers" else find_ratio(report, case["name"], "diffusers", arm)
            rows.append(
                (
                    f"{case['batch']} x {samplers(case)}, {'between' if case['between'] else 'hot'}",
                    dimensions(case["latent_shape"]),
                    str(case["threads"]),
                    arm_name(arm),
                    parity(measured),
                    duration(unit_s(case, arm), "row"),
                    ratio_text(ratio) if ratio else "",
                )
            )
    return Table(
        "One row of the sampler alone, null model",
        ("case", "latents", "threads", "arm", "parity", "per row of the batch", "over diffusers"),
        tuple(rows),
        "Hot: rows back to back. Between: each row follows a real model call that is not timed. "
        "Step noise is drawn in the timed part on both sides.",
    )


def samplers_table(report: Report) -> Table:
    """Host time of one request's scheduler per row."""
    rows = []
    for case in report["rows"]:
        if len(set(case["samplers"])) > 1 or case["between"]:
            continue
        times = {arm: unit_s(case, arm) for arm in case["arms"]}
        rows.append(
            (
                case["samplers"][0],
                f"{dimensions(case['latent_shape'])}, batch {case['batch']}",
                *(
                    duration(None if times.get(arm) is None else times[arm] / case["batch"], "row")
                    for arm in ("diffusers", "tensorized/eager", "tensorized/compiled")
                ),
            )
        )
    return Table(
        "Scheduler time per request and row",
        ("sampler", "latents", "diffusers step()", "table, eager", "table, compiled"),
        tuple(rows),
        "The time of a row of the batch, divided by the requests in it.",
    )


def setup_table(report: Report) -> Table:
    """A request's set-up."""
    entries = report["setup"]
    names = list(entries[0]["call_s"]) if entries else []
    rows = tuple(
        (
            f"{one['sampler']}, {one['steps']} steps",
            *(duration(_median(one["call_s"].get(name)), "row") for name in names),
        )
        for one in entries
    )
    return Table("Set-up of a request, text and noise apart", ("sampler", *names), rows)


def _median(times_s: Sequence[float] | None) -> float | None:
    return median(times_s) if times_s else None


def counts_table(report: Report) -> Table:
    """Operations and syncs."""
    rows = tuple(
        (
            samplers(one),
            str(one["batch"]),
            *(
                text
                for side in ("diffusers", "fastdiff")
                for text in (_range(one[side]["operations"]), _range(one[side]["syncs"]))
            ),
        )
        for one in report["counts"]
    )
    return Table(
        "Operations and host syncs per row",
        ("sampler", "batch", "diffusers ops", "diffusers syncs", "fastdiff ops", "fastdiff syncs"),
        rows,
        "Counted without a clock, views and noise draws apart. A sync is a read that would make the host wait were "
        "latents, model outputs and timesteps on a GPU.",
    )


def fates_table(report: Report) -> Table:
    """What became of interleaved requests."""
    workloads = {"concurrent-equal": "equal steps", "concurrent-mixed": "unequal steps"}
    arms = list(dict.fromkeys(one["arm"] for one in report["fates"]))
    by_case: dict[tuple[str, str], dict[str, str]] = {}
    for one in report["fates"]:
        by_case.setdefault((one["sampler"], one["workload"]), {})[one["arm"]] = _fates(one["fates"])
    rows = tuple(
        (f"{sampler}, {workloads[workload]}", *(fates.get(arm, "") for arm in arms))
        for (sampler, workload), fates in by_case.items()
    )
    return Table(
        "Fate of the images when two requests interleave",
        ("sampler", *arms),
        rows,
        "Row by row in turn, each image against the same request alone.",
    )


def errors_table(report: Report) -> Table:
    """Error against float64."""
    rows = tuple(
        (
            f"{one['sampler']}, {one['steps']} steps",
            *("**not finite**" if one[side] is None else f"{one[side]:.1e}" for side in ("diffusers", "fastdiff")),
        )
        for one in report["errors"]
    )
    return Table(
        "Error against float64",
        ("sampler", "diffusers float32", "fastdiff float32"),
        rows,
        "Largest difference of the last sample over its largest element, the same model outputs and noise for all; "
        "worst of several seeds.",
    )


def memory_table(report: Report) -> Table:
    """Device bytes by ownership, one line per latent shape and sampler."""
    rows = []
    for case in report["memory"]:
        for sampler, by_owner in by_sampler(case).items():
            rows.append(
                (
                    f"{case['name']} ({dimensions(case['latent_shape'])}), {sampler}",
                    byte_count(by_owner["shared"]["latent_bytes"]),
                    *(
                        " / ".join(
                            byte_count(by_owner[owner][f"{when}_bytes"]) for when in ("before", "during", "after")
                        )
                        for owner in OWNERS
                    ),
                    " / ".join(byte_count(by_owner[owner]["row_peak_bytes"]) for owner in ("shared", "tensorized")),
                )
            )
    return Table(
        "Memory: device bytes reachable from the scheduler or slot, before / during / after a request",
        (
            "latents, sampler",
            "one latent",
            "shared",
            "deepcopy",
            "shallow",
            "tensorized: slot",
            "row peak: step() / table",
        ),
        tuple(rows),
        "float32, null model, batch 1; counted, not sampled. *After* is what stays reachable from the template once "
        "the request is gone: a shared one keeps its history until the next request's set_timesteps. The sample itself "
        "(one latent) is in the slot, and beside a scheduler in the caller's hands. A slot stays allocated for whoever "
        "comes next. *Row peak*: all device tensors alive at once within an eager row, temporaries included.",
    )


def by_sampler(case: Report) -> dict[str, dict[str, Report]]:
    """A memory case's entries: by sampler, then by ownership."""
    entries: dict[str, dict[str, Report]] = {}
    for one in case["entries"]:
        entries.setdefault(one["sampler"], {})[one["ownership"]] = one
    return entries


def compile_table(report: Report) -> Table:
    """Compilation, apart from everything else."""
    rows = tuple((name, f"{seconds:.1f} s", _cache(report, name)) for name, seconds in report["compile_s"].items())
    return Table(
        "Compilation, apart from all of the above",
        ("what", "first call", "inductor's cache"),
        rows,
        "Warm: the disk had what inductor made of it, and nothing was compiled. Cold: all of it was made.",
    )


def break_even_table(report: Report) -> Table:
    """After how many images a compilation has paid for itself."""
    rows = []
    for case in report["images"]:
        for arm in case["arms"]:
            name, mode = split(arm)
            what = compiled_part(arm, case["batch"])
            cost_s = report["compile_s"].get(what)
            if mode != "compiled" or cost_s is None or f"{name}/eager" not in case["arms"]:
                continue
            eager_s, compiled_s = unit_s(case, f"{name}/eager"), unit_s(case, arm)
            if eager_s is None or compiled_s is None:
                continue
            saved_s = eager_s - compiled_s
            cache = _cache(report, what)
            after = f"{math.ceil(cost_s / saved_s):,} images" if saved_s > 0 else "never: no faster than eager"
            if saved_s > 0 and cache != "cold":
                after = WARM if cache == "warm" else f"{after}, if the cache was cold: it was not recorded"
            saved = duration(saved_s, "image") if saved_s > 0 else NONE
            rows.append((f"{case['name']}: {name}, batch {case['batch']}", f"{cost_s:.1f} s, {cache}", saved, after))
    return Table(
        "Break-even of compilation",
        ("case", "first call", "saved per image", "pays off after"),
        tuple(rows),
        "The first call's seconds over the difference of the medians, compiled against eager.",
    )


def _cache(report: Report, what: str) -> str:
    """Whether a first call found its kernels on the disk; reports from before that was counted do not tell."""
    return str(report.get("compile_cache", {}).get(what, "not recorded"))


def clocks_table(report: Report) -> Table:
    """What the GPU did meanwhile, for arms that were timed on one."""
    rows = []
    for case in (*report["images"], *report["rows"]):
        for arm, measured in case["arms"].items():
            states = [state for state in measured.get("gpu") or () if state]
            if not states:
                continue
            clocks = [state["sm_mhz"] for state in states if state["sm_mhz"] is not None]
            heat = [state["temperature_c"] for state in states if state["temperature_c"] is not None]
            reasons = Counter(reason for state in states for reason in state["throttles"] or ())
            company = sum(bool(state["foreign_processes"]) for state in states)
            rows.append(
                (
                    f"{case['name']}: {arm_name(arm)}",
                    f"{_range(clocks)} MHz" if clocks else "not told",
                    f"{_range(heat)} C" if heat else "not told",
                    ", ".join(f"{reason} in {count} of {len(states)}" for reason, count in reasons.items()) or "none",
                    f"**in {company} of {len(states)}**" if company else "none",
                )
            )
    return Table(
        "The GPU between blocks",
        ("case", "SM clock", "temperature", "clocks held down by", "foreign processes"),
        tuple(rows),
        "As NVML tells; read only. An idle GPU's clocks are low, which holds nothing down.",
    )


MAKERS: Mapping[str, Callable[[Report], Table]] = {
    "attribution": attribution_table, "changes": changes_table, "targets": targets_table, "invalid": invalid_table,
    "unsupported": unsupported_table, "images": images_table, "rows": rows_table, "samplers": samplers_table,
    "counts": counts_table, "memory": memory_table, "setup": setup_table, "compile": compile_table,
    "break_even": break_even_table, "fates": fates_table, "errors": errors_table, "clocks": clocks_table,
}  # fmt: skip
"""Every table by name, in the page's order."""


def tables(report: Report) -> Iterator[Table]:
    """Every table of the page, in order; those without data are left out."""
    yield from (table for make in MAKERS.values() if (table := make(report)).rows)


# Words and figures


def toy(report: Report) -> str:
    """Said of times of a model whose ratios are no real one's."""
    return " (toy model)" if report["model"]["toy"] else ""


def meaning(arm: str) -> str:
    """What an arm is, and how its model runs."""
    name, mode = split(arm)
    return f"{ARMS.get(name, name)}, model {mode}"


def arm_name(arm: str) -> str:
    """As a reader is told of it."""
    return "diffusers step()" if arm == "diffusers" else arm.replace("/", " / ")


def parity(measured: Mapping[str, Any]) -> str:
    """How far an arm's answer is from the reference."""
    if measured["status"] != "ok":
        return "**INVALID**"
    return "exact" if measured["error"] == 0 else f"{measured['error']:.0e}"


def ratio_text(ratio: Report | None) -> str:
    """The estimate and its interval."""
    return speed_up(ratio) if ratio else "no valid pair"


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _fates(fates: Sequence[Mapping[str, Any]]) -> str:
    named = [f"{one['fate']} ({one['error']})" if one["error"] else str(one["fate"]) for one in fates]
    if set(named) == {"right"}:
        return "right"
    if len(set(named)) == 1:
        return f"**{named[0]}**"
    return "**" + ", ".join(f"{named.count(name)} {name}" for name in dict.fromkeys(named)) + "**"


def samplers(case: Mapping[str, Any]) -> str:
    """The one sampler, or that there are several."""
    return "mixed" if len(case["samplers"]) > 1 else str(case["samplers"][0])
