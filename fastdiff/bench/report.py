"""A report's JSON -> tables, in Markdown or on a terminal. Pure: the same JSON gives the same page."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from fastdiff.bench.machine import describe
from fastdiff.bench.suite import ARMS, split
from fastdiff.bench.summary import Report, find_case, find_ratio, speed_up, unit_s


@dataclass(frozen=True)
class Table:
    """One table of the page; the first column holds words, the others figures."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def markdown(report: Report) -> str:
    """The whole page."""
    parts = [f"# fastdiff.bench: {report['suite']}", *introduction(report)]
    for table in tables(report):
        parts += [f"## {table.title}", *([table.note] if table.note else []), markdown_table(table)]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """The bare table, as the README quotes it."""
    rule = ["---"] + ["---:"] * (len(table.header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (table.header, rule, *table.rows))


def introduction(report: Report) -> list[str]:
    """What was measured on what, in a few paragraphs of one line."""
    model, settings = report["model"], report["settings"]
    toy = "**A toy model**: ratios of a real one will differ. " if model["toy"] else ""
    return [
        f"{toy}Model: {model['name']}, {model['parameters']:,} parameters, latents "
        f"{'x'.join(map(str, model['latent_shape']))}, {model['dtype']}, on {settings['device']}.",
        f"Machine: {describe(report['machine'])}.",
        f"{report['created']}, seed {settings['seed']}, {report['seconds']['all']:.0f} s, "
        f"{report['seconds']['compile']:.0f} s of it compiling. "
        f"Arms run turn by turn in random order; a ratio is the Hodges-Lehmann estimate of base / arm with its "
        f"{settings['level']:.0%} Wilcoxon interval; times are medians. Above 1 the arm is faster than its base.",
    ]


def tables(report: Report) -> Iterator[Table]:
    """Every table of the page, in order; those without data are left out."""
    makers = (
        attribution_table, targets_table, invalid_table, unsupported_table, images_table, rows_table,
        samplers_table, setup_table, counts_table, fates_table, errors_table, memory_table, compile_table,
    )  # fmt: skip
    yield from (table for make in makers if (table := make(report)).rows)


def attribution_table(report: Report) -> Table:
    """What each step is worth, against what it changes; then where nothing is gained. The README quotes it."""
    steps, limits = report["summary"]["attribution"], report["summary"]["no_gain"]
    baseline = [(f"baseline: {_words(step['base'])}", _time(step["base_s"], step["per"]), "", "") for step in steps[:1]]
    worth = [
        (step["label"], _time(step["arm_s"], step["per"]), _arm_name(step["base"]), _speed_up(step["ratio"]))
        for step in steps
    ]
    costs = [
        (
            f"no gain: {step['label']}",
            _time(step["arm_s"], step["per"]),
            f"{_arm_name(step['base'])}, {_time(step['base_s'], step['per'])}",
            _speed_up(step["ratio"]),
        )
        for step in limits
    ]
    note = ""
    case = find_case(report, steps[0]["case"]) if steps else None
    if case:
        note = (
            f"{case['batch']} concurrent requests, text to pixels, {case['rows']} rows in all, samplers "
            f"{', '.join(case['samplers'])}; times per image. *No gain*: cases where none was expected."
        )
    header = ("step", "time", "against", "ratio [interval]")
    return Table(f"What each step is worth{_toy(report)}", header, (*baseline, *worth, *costs), note)


def targets_table(report: Report) -> Table:
    """The figures to reach."""
    verdicts = {True: "met", False: "**not met**", None: "-"}
    rows = tuple(
        (target["label"], target["goal"], target["measured"], verdicts[target["met"]])
        for target in report["summary"]["targets"]
    )
    return Table("Targets", ("figure", "target", "measured", ""), rows)


def invalid_table(report: Report) -> Table:
    """Arms that answered wrongly; they have no times."""
    rows = tuple(
        (case["name"], _arm_name(arm), measured["reason"])
        for case in (*report["images"], *report["rows"])
        for arm, measured in case["arms"].items()
        if measured["status"] != "ok"
    )
    return Table("INVALID: a wrong answer, however fast", ("case", "arm", "reason"), rows)


def unsupported_table(report: Report) -> Table:
    """Pieces that could not run."""
    rows = tuple((one["what"], one["reason"]) for one in report["unsupported"])
    return Table("Unsupported", ("what", "reason"), rows)


def images_table(report: Report) -> Table:
    """Whole requests by ownership."""
    rows = []
    peaks = [arm["vram_peak_bytes"] for case in report["images"] for arm in case["arms"].values()]
    on_cuda = any(peak is not None for peak in peaks)
    for case in report["images"]:
        for arm, measured in case["arms"].items():
            loop = median(measured["loop_s"]) / case["rows"] if measured["loop_s"] else None
            ratios = [
                f"{_speed_up(one['ratio'])} over {_arm_name(one['base'])}"
                for one in case["comparisons"]
                if one["arm"] == arm
            ]
            cells = [
                f"{case['workload']}, {case['batch']} x {_samplers(case)}",
                _arm_name(arm),
                _status(measured),
                _time(unit_s(case, arm), "image"),
                _time(loop, "image"),
                *([_bytes(measured["vram_peak_bytes"])] if on_cuda else []),
                "; ".join(ratios),
            ]
            rows.append(tuple(cells))
    return Table(
        "Images by ownership" + _toy(report),
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
                    f"{case['batch']} x {_samplers(case)}, {'between' if case['between'] else 'hot'}",
                    _latents(case["latent_shape"]),
                    str(case["threads"]),
                    _arm_name(arm),
                    _status(measured),
                    _time(unit_s(case, arm), "row"),
                    _speed_up(ratio) if ratio else "",
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
                f"{_latents(case['latent_shape'])}, batch {case['batch']}",
                *(
                    _time(None if times.get(arm) is None else times[arm] / case["batch"], "row")
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
        (f"{one['sampler']}, {one['steps']} steps", *(_time(median(one["call_s"][name]), "row") for name in names))
        for one in entries
    )
    return Table("Set-up of a request, text and noise apart", ("sampler", *names), rows)


def counts_table(report: Report) -> Table:
    """Operations and syncs."""
    rows = tuple(
        (
            _samplers(one),
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
        (f"{one['sampler']}, {one['steps']} steps", f"{one['diffusers']:.1e}", f"{one['fastdiff']:.1e}")
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
    owners = ("shared", "cloned-deepcopy", "cloned-shallow", "tensorized")
    rows = []
    for case in report["memory"]:
        entries: dict[str, dict[str, Mapping[str, int]]] = {}
        for one in case["entries"]:
            entries.setdefault(one["sampler"], {})[one["ownership"]] = one
        for sampler, by_owner in entries.items():
            rows.append(
                (
                    f"{case['name']} ({_latents(case['latent_shape'])}), {sampler}",
                    _bytes(by_owner["shared"]["latent_bytes"]),
                    *(
                        " / ".join(_bytes(by_owner[owner][f"{when}_bytes"]) for when in ("before", "during", "after"))
                        for owner in owners
                    ),
                    " / ".join(_bytes(by_owner[owner]["row_peak_bytes"]) for owner in ("shared", "tensorized")),
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


def compile_table(report: Report) -> Table:
    """Compilation, apart from everything else."""
    rows = tuple((name, f"{seconds:.1f} s") for name, seconds in report["compile_s"].items())
    return Table("Compilation, apart from all of the above", ("what", "first call"), rows)


def print_tables(report: Report) -> None:
    """The same page on a terminal."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 160)
    for paragraph in introduction(report):
        console.print(Text(paragraph.replace("**", "")))
    for table in tables(report):
        shown = RichTable(title=table.title, title_justify="left", caption=table.note or None, caption_justify="left")
        for number, heading in enumerate(table.header):
            shown.add_column(heading, justify="right" if number else "left", overflow="fold")
        for cells in table.rows:
            shown.add_row(*(Text(cell.replace("**", "")) for cell in cells))
        console.print()
        console.print(shown)


# Words and figures


def _toy(report: Report) -> str:
    return " (toy model)" if report["model"]["toy"] else ""


def _words(arm: str) -> str:
    name, mode = split(arm)
    return f"{ARMS[name]}, model {mode}"


def _arm_name(arm: str) -> str:
    return "diffusers step()" if arm == "diffusers" else arm.replace("/", " / ")


def _status(measured: Mapping[str, Any]) -> str:
    if measured["status"] != "ok":
        return "**INVALID**"
    return "exact" if measured["error"] == 0 else f"{measured['error']:.0e}"


def _speed_up(ratio: Report | None) -> str:
    return speed_up(ratio) if ratio else "no valid pair"


def _time(seconds: float | None, per: str) -> str:
    if seconds is None:
        return "-"
    if per == "image":
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.0f} us" if seconds >= 1e-5 else f"{seconds * 1e6:.1f} us"


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _fates(fates: Sequence[Mapping[str, Any]]) -> str:
    named = [f"{one['fate']} ({one['error']})" if one["error"] else str(one["fate"]) for one in fates]
    if len(set(named)) == 1:
        return named[0]
    return ", ".join(f"{named.count(name)} {name}" for name in dict.fromkeys(named))


def _samplers(case: Mapping[str, Any]) -> str:
    return "mixed" if len(case["samplers"]) > 1 else str(case["samplers"][0])


def _latents(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _bytes(count: int) -> str:
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
