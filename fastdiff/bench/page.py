"""A report's JSON -> one self-contained HTML page. Pure: the same JSON gives the same page, and it loads nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, get_args

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from fastdiff.bench import outcome
from fastdiff.bench.report import command, facts, introduction
from fastdiff.bench.suite import ARMS, split
from fastdiff.bench.summary import Report, unit_s
from fastdiff.bench.tables import MAKERS, arm_name, attribution_table, by_sampler, meaning, parity, ratio_text, samplers
from fastdiff.bench.verdict import MARGIN
from fastdiff.bench.words import byte_count, dimensions, duration
from fastdiff.capture import Mode

NO_CHANGE = 1 + MARGIN  # the band that is shaded
DOTS_WITHIN = 2.0  # a dot plot reaches from half the median to twice


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis around 1; places on it are per cent of its width."""

    low: float
    high: float

    @classmethod
    def around(cls, ratios: Iterable[Report]) -> Axis:
        """Room for every estimate, and for intervals up to half as far again: one wild interval hides no other."""
        found = list(ratios)
        least = min((ratio["value"] for ratio in found), default=1.0)
        most = max((ratio["value"] for ratio in found), default=1.0)
        low = max(min((ratio["low"] for ratio in found), default=1.0), least / 1.5)
        high = min(max((ratio["high"] for ratio in found), default=1.0), most * 1.5)
        low, high = min(low, 1 / 1.1), max(high, 1.1)
        room = (high / low) ** 0.04
        return cls(low / room, high * room)

    def at(self, value: float) -> float:
        """Where a value is, held within the axis."""
        place = math.log(max(value, 1e-300) / self.low) / math.log(self.high / self.low)
        return round(100 * min(max(place, 0.0), 1.0), 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """At most seven round numbers, 1 among them: place and label."""
        for digits in _DIGITS:
            values = [digit * 10.0**power for power in range(-4, 6) for digit in digits]
            values = [value for value in values if self.low <= value <= self.high]
            if len(values) <= 7:
                break
        return [(self.at(value), f"{value:g}") for value in values]

    @property
    def band(self) -> tuple[float, float]:
        """Left end and width of what counts as no change."""
        left = self.at(1 / NO_CHANGE)
        return left, round(self.at(NO_CHANGE) - left, 2)


_DIGITS = (
    (1, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 1.7, 2, 2.5, 3, 4, 5, 6, 7, 8, 9, 9.5),
    (1, 1.2, 1.5, 2, 3, 4, 5, 6, 8, 9),
    (1, 1.5, 2, 3, 5, 7),
    (1, 2, 5),
    (1,),
)
"""Digits of an axis' ticks, the finest first."""


@dataclass(frozen=True)
class Strip:
    """A ratio and its interval on an axis; cut where the interval goes on beyond it."""

    low: float
    value: float
    high: float
    cut_low: bool
    cut_high: bool


def strip(ratio: Report | None, axis: Axis) -> Strip | None:
    """Where a ratio is drawn; None where there is none."""
    if ratio is None:
        return None
    low, value, high = (axis.at(ratio[key]) for key in ("low", "value", "high"))
    return Strip(low, value, high, ratio["low"] < axis.low, ratio["high"] > axis.high)


@dataclass(frozen=True)
class Dots:
    """Raw samples of one arm in the order they were taken, as an SVG path in a box of 100 by 100."""

    arm: str
    count: int
    middle: str
    path: str


def html(report: Report) -> str:
    """The whole page."""
    return _template().render(
        report=report,
        outcome=outcome.outcome(report),
        facts=list(facts(report)),
        attribution=_attribution(report),
        matrices=list(_matrices(report)),
        arms=[(name, meaning) for name, meaning in ARMS.items() if name != "shared-racing"],
        plots=list(_plots(report)),
        level=f"{report['settings']['level']:.0%}",
        loops=list(_loops(report)),
        memory=list(_memory(report)),
        tables={name: make(report) for name, make in MAKERS.items()},
        dots=list(_dots(report)),
        command=command(report),
        introduction=introduction(report),
        machine=list(_flat({**report["machine"], "commit": report.get("commit", {})})),
        pieces=[(title, f"{seconds:.1f} s") for title, seconds in report["seconds"].get("pieces", {}).items()],
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["emphasis"] = emphasis
    return environment.get_template("page.html.j2")


def emphasis(text: str) -> Markup:
    """The tables' `**strong**`, `*emphasis*` and backquotes as tags, everything else escaped."""
    safe = str(escape(text))
    for mark, tag in ((r"\*\*(.+?)\*\*", "strong"), (r"(?<!\w)\*([^*]+)\*(?!\w)", "em"), (r"`([^`]+)`", "code")):
        safe = re.sub(mark, rf"<{tag}>\1</{tag}>", safe)
    return Markup(safe)


def _attribution(report: Report) -> dict[str, Any]:
    """The steps with a bar each for their time, then the cases where no gain was expected."""
    steps, limits = report["summary"]["attribution"], report["summary"]["no_gain"]
    words_of = {(one.case["name"], one.base, one.arm): one.word for one in outcome.comparisons(report)}
    axis = Axis.around(step["ratio"] for step in (*steps, *limits) if step["ratio"])
    longest_s = max((step[key] for step in steps for key in ("base_s", "arm_s") if step[key]), default=math.inf)

    def row(step: Report, against: str) -> dict[str, Any]:
        return {
            "label": step["label"],
            "against": against,
            "time": duration(step["arm_s"], step["per"]),
            "bar": round(100 * (step["arm_s"] or 0) / longest_s, 1),
            "strip": strip(step["ratio"], axis),
            "ratio": ratio_text(step["ratio"]),
            "word": words_of.get((step["case"], step["base"], step["arm"]), "invalid"),
        }

    rows = [row(step, arm_name(step["base"])) for step in steps]
    if steps:
        baseline = {**steps[0], "label": f"baseline: {meaning(steps[0]['base'])}", "arm_s": steps[0]["base_s"]}
        rows.insert(0, {**row(baseline, ""), "ratio": "", "word": ""})
    no_gain = [row(step, f"{arm_name(step['base'])}, {duration(step['base_s'], step['per'])}") for step in limits]
    return {
        "axis": axis,
        "steps": rows,
        "no_gain": [{**one, "bar": 0} for one in no_gain],  # of other cases: on no common scale
        "note": attribution_table(report).note,
    }


def _matrices(report: Report) -> Iterator[dict[str, Any]]:
    """Cases down, arms across."""
    for kind, per, time, error in (
        ("images", "image", "Time per image", "Largest error of a pixel"),
        ("rows", "row", "Time per row of the batch, null model", "Largest error of the last sample"),
    ):
        known = {arm for case in report[kind] for arm in case["arms"]}
        every = ["diffusers", *(f"{name}/{mode}" for mode in get_args(Mode) for name in ARMS)]
        arms = [arm for arm in every if arm in known]
        rows = [
            {"case": case["name"], "detail": _detail(case), "cells": [_cell(case, arm, per) for arm in arms]}
            for case in report[kind]
        ]
        if rows:
            titles = {"time": time, "error": error}
            yield {"titles": titles, "arms": [arm_name(arm) for arm in arms], "rows": rows}


def _cell(case: Report, arm: str, per: str) -> dict[str, Any]:
    """One arm of one case; `over` is how many times as fast as its base it is, the model in the same mode."""
    measured = case["arms"].get(arm)
    if measured is None:
        return {}
    rivals = [name for name in case["arms"] if name == "diffusers" or split(name)[1] == split(arm)[1]]
    times = [time_s for name in rivals if (time_s := unit_s(case, name)) is not None]
    own = unit_s(case, arm)
    over = [one["ratio"] for one in case["comparisons"] if one["arm"] == arm and one["base"] in rivals]
    peak = measured.get("vram_peak_bytes")
    return {
        "reason": measured["reason"],
        "time": duration(own, per),
        "best": len(times) > 1 and own == min(times),
        "over": f"{over[0]['value']:.2f}x" if over else "",
        "peak": byte_count(peak) if peak is not None else "",
        "error": parity(measured),
    }


def _detail(case: Report) -> str:
    return f"{case['batch']} x {samplers(case)}"


def _plots(report: Report) -> Iterator[dict[str, Any]]:
    """A forest plot of whole images, one of rows; each on its own axis."""
    compared = list(outcome.comparisons(report))
    for kind, title in (("images", "Whole images"), ("rows", "The sampler's row alone, null model")):
        own = [one for one in compared if one.kind == kind]
        axis = Axis.around(one.ratio for one in own if one.ratio)
        rows = [
            {
                "case": "" if previous and previous.case is one.case else one.case["name"],
                "arm": arm_name(one.arm),
                "base": arm_name(one.base),
                "strip": strip(one.ratio, axis),
                "ratio": ratio_text(one.ratio),
                "word": one.word,
            }
            for previous, one in zip([None, *own], own, strict=False)
        ]
        if rows:
            yield {"title": title, "axis": axis, "rows": rows}


def _loops(report: Report) -> Iterator[dict[str, Any]]:
    """How an image's time divides between the denoise loop and everything else, where an arm can tell."""
    for case in report["images"]:
        arms = {
            arm: (unit_s(case, arm), median(measured["loop_s"]) / case["batch"])
            for arm, measured in case["arms"].items()
            if measured["loop_s"]
        }
        longest = max((whole for whole, _ in arms.values() if whole), default=0.0)
        rows = [
            {
                "arm": arm_name(arm),
                "loop": round(100 * loop / longest, 1),
                "rest": round(100 * max(0.0, whole - loop) / longest, 1),
                "whole": duration(whole, "image"),
                "share": f"{min(1.0, loop / whole):.0%}",
                "row": duration(loop * case["batch"] / case["rows"], "image"),
            }
            for arm, (whole, loop) in arms.items()
            if whole
        ]
        if rows:
            yield {"case": case["name"], "detail": _detail(case), "rows": rows}


def _memory(report: Report) -> Iterator[dict[str, Any]]:
    """What a request holds, and the peak of its rows: by a clone beside its sample, and by a slot."""
    for case in report["memory"]:
        for index, (sampler, owned) in enumerate(by_sampler(case).items()):
            clone, slot = owned["cloned-deepcopy"], owned["tensorized"]
            yield {
                "case": "" if index else f"{case['name']} ({dimensions(case['latent_shape'])})",
                "sampler": sampler,
                "pairs": [
                    ("held", _pair(clone["during_bytes"] + clone["latent_bytes"], slot["during_bytes"])),
                    ("peak of a row", _pair(owned["shared"]["row_peak_bytes"], slot["row_peak_bytes"])),
                ],
            }


def _pair(*counts: int) -> list[dict[str, Any]]:
    return [{"text": byte_count(count), "share": round(100 * count / max(*counts, 1), 1)} for count in counts]


def _dots(report: Report) -> Iterator[dict[str, Any]]:
    """Every raw sample of every case, the canaries' included."""
    for kind, per in (("images", "image"), ("rows", "row")):
        for case in report[kind]:
            arms = [
                _dots_of(arm, measured["total_s"], duration(unit_s(case, arm), per))
                for arm, measured in case["arms"].items()
                if measured["total_s"]
            ]
            if arms:
                yield {"case": case["name"], "detail": _detail(case), "arms": arms}
    samples = (report.get("canaries") or {}).get("total_s", {})
    if arms := [_dots_of(name, times, duration(median(times), "image")) for name, times in samples.items() if times]:
        yield {"case": "canaries", "detail": "", "arms": arms}


def _dots_of(arm: str, times_s: Sequence[float], middle: str) -> Dots:
    centre = median(times_s)
    step = 100 / len(times_s)
    places = []
    for index, time_s in enumerate(times_s):
        away = math.log(time_s / centre) / math.log(DOTS_WITHIN)
        places.append(f"M{(index + 0.5) * step:.1f} {50 - 50 * min(max(away, -1.0), 1.0):.0f}h0")
    return Dots(arm_name(arm), len(times_s), middle, "".join(places))


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """A nested mapping as lines."""
    for key, value in values.items():
        name = f"{above}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}: ")
        else:
            yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
