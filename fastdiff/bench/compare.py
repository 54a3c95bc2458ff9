"""`python -m fastdiff.bench compare BASE HEAD`: exact figures gate; times that were not taken in pairs hint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fastdiff.bench import gates, outcome, schema, words
from fastdiff.bench.arguments import refuse
from fastdiff.bench.machine import lasting
from fastdiff.bench.schema import PYTEST_BENCHMARK, BadReport
from fastdiff.bench.summary import Report
from fastdiff.bench.verdict import DELTA

LEAST_ROUNDS = 20

Hint = Literal["slower", "faster", "cannot tell", "too few rounds"]


@dataclass(frozen=True)
class Time:
    """One benchmark in both: medians, and whether the middle halves of the times are apart."""

    name: str
    base_s: float
    head_s: float
    hint: Hint

    @property
    def change(self) -> float:
        """+0.05 is 5 % slower."""
        return self.head_s / self.base_s - 1


@dataclass(frozen=True)
class Comparison:
    """What two reports say of each other. A reason stands where they cannot be compared, empty where they can."""

    wrong: tuple[str, ...]  # what is wrong in head
    missing: tuple[str, ...]  # what head could not measure, with its reason
    changes: tuple[gates.Change, ...]
    no_figures: str
    times: tuple[Time, ...]
    untimed: tuple[str, ...]  # what base has times of and head has not
    no_times: str
    doubt: str  # of either report's canaries

    def exit_code(self, fail_on_time: bool) -> int:
        """3 where head is wrong or nothing can be compared, 1 where anything gated got worse, 4 where head could not
        measure all of it, or no time was taken often enough to be judged where times are asked for, else 0: no head
        passes here that `run` fails for a wrong answer or a missing one."""
        if self.wrong or (self.no_times and (self.no_figures or fail_on_time)) or (self.doubt and fail_on_time):
            return 3
        slower = bool(self.untimed) or any(time.hint == "slower" for time in self.times)
        if any(change.verdict == "REGRESSION" for change in self.changes) or (fail_on_time and slower):
            return 1
        unjudged = bool(self.times) and all(time.hint == "too few rounds" for time in self.times)
        return 4 if self.missing or (fail_on_time and unjudged) else 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """BASE, HEAD and --fail-on-time."""
    for name in ("base", "head"):
        parser.add_argument(
            name, type=Path, metavar=name.upper(), help="a report's folder or file, or pytest-benchmark's"
        )
    parser.add_argument("--fail-on-time", action="store_true", help="exit with 1 where head looks slower, too")


def main(options: argparse.Namespace) -> int:
    """Compare and print Markdown."""
    try:
        base, head = (_load(path) for path in (options.base, options.head))
    except BadReport as error:
        refuse(str(error))
    compared = compare(base, head)
    sys.stdout.write(markdown(compared, str(options.base), str(options.head)))
    return compared.exit_code(options.fail_on_time)


def _load(path: Path) -> Report:
    report = schema.load(path)
    if report["schema"] == schema.AB:
        raise BadReport(f"{path}: it is of ab, which has compared already; expected a run's report")
    return report


def compare(base: Report, head: Report) -> Comparison:
    """Everything that both have. Pure."""
    no_figures, no_times = _no_figures(base, head), _no_times(base, head)
    wrong = outcome.wrong_answers(head) if head["schema"] == schema.SCHEMA else []
    known, new = _benchmarks(base), _benchmarks(head)
    return Comparison(
        wrong=tuple(f"{one.case}, {one.arm}: {one.reason}" for one in wrong),
        missing=_missing(base, head),
        changes=() if no_figures else tuple(gates.compare(head["gates"]["figures"], base["gates"]["figures"])),
        no_figures=no_figures,
        times=() if no_times else tuple(_time(name, known[name], new[name]) for name in known if name in new),
        untimed=() if no_times else tuple(name for name in known if name not in new),
        no_times=no_times,
        doubt="; ".join(filter(None, (_doubt(base), _doubt(head)))),
    )


def markdown(compared: Comparison, base: str, head: str) -> str:
    """What is wrong first, what did not change last."""
    lines = [f"# {_headline(compared)}", "", f"{head} against {base}."]
    lines += [f"- INVALID: {one}" for one in compared.wrong]
    lines += [f"- not measured: {one}" for one in compared.missing]
    if compared.changes:
        figures = [(one.name, words.number(one.base), words.number(one.head), one.verdict) for one in compared.changes]
        lines += ["", words.table(("figure", "base", "head", ""), figures, words=(0, 3))]
    unmeasured = sum(change.verdict == "not measured" for change in compared.changes)
    changed = len(compared.changes) - unmeasured
    same = f"{changed} changed" if changed else "none changed" if unmeasured else "all the same"
    same += f", {unmeasured} not measured" if unmeasured else ""
    lines += ["", f"Exact figures: {f'incomparable, {compared.no_figures}' if compared.no_figures else same}."]
    apart = [time for time in compared.times if time.hint in ("slower", "faster")]
    few = sum(time.hint == "too few rounds" for time in compared.times)
    fewer = f"; {few} have fewer and were not judged" if few else ""
    if apart:
        times = [
            (one.name, f"{one.base_s * 1e3:.4g} ms", f"{one.head_s * 1e3:.4g} ms", f"{one.change:+.1%}", one.hint)
            for one in sorted(apart, key=lambda time: -time.change)
        ]
        lines += ["", words.table(("time", "base", "head", "change", ""), times, words=(0, 4))]
    lines += [f"- no longer timed: {name}" for name in compared.untimed]
    if compared.no_times:
        lines += ["", f"Times: incomparable, {compared.no_times}."]
    else:
        lines += [
            "",
            f"Times: {len(apart)} of {len(compared.times)} are apart: from one quartile to the other by more than "
            f"{DELTA:.0%}, {LEAST_ROUNDS} rounds or more on each side{fewer}. They were not taken in pairs, so this is "
            "a hint and no verdict; `ab` gives one.",
        ]
    if compared.doubt:
        lines += ["", f"No time is to be believed: {compared.doubt}."]
    return "\n".join(lines) + "\n"


def _headline(compared: Comparison) -> str:
    verdicts = [change.verdict for change in compared.changes]
    counted = [(len(compared.wrong), "INVALID")]
    counted += [(verdicts.count(verdict), verdict) for verdict in get_args(gates.Verdict) if verdict != "not measured"]
    unknown = [change for change in compared.changes if change.verdict == "not measured" and change.head is not None]
    counted.insert(2, (len(compared.missing) + len(unknown), "not measured"))
    hints = [time.hint for time in compared.times]
    counted += [(hints.count(hint), f"{hint} (unpaired)") for hint in ("slower", "faster")]
    if compared.no_figures and compared.no_times and not compared.wrong:
        return "Incomparable"
    return ", ".join(f"{count} {what}" for count, what in counted if count) or "No change"


def _no_figures(base: Report, head: Report) -> str:
    """Why exact figures cannot be compared; empty if they can."""
    keys = [(report.get("gates") or {}).get("key") for report in (base, head)]
    if None in keys:
        return f"{'base' if keys[0] is None else 'head'} has none"
    models = [report["model"]["name"] for report in (base, head)]
    if models[0] != models[1]:
        return f"they are of {models[0]} and {models[1]}"
    return "" if keys[0] == keys[1] else f"they are of {keys[0]} and {keys[1]}"


def _no_times(base: Report, head: Report) -> str:
    """Why times cannot be compared, what differs between the machines; empty if they can."""
    places = [_place(base), _place(head)]
    differing = [name for name in {**places[0], **places[1]} if places[0].get(name) != places[1].get(name)]
    return f"they are of different places: {', '.join(differing)}" if differing else ""


def _place(report: Report) -> dict[str, Any]:
    """What times depend on, by name. A clock rate is not in it: it is another at each look."""
    if report["schema"] == PYTEST_BENCHMARK:
        info = report["machine_info"]
        known = {name: info.get(name) for name in ("node", "machine", "system", "python_version")}
        return {**known, "cpu": (info.get("cpu") or {}).get("brand_raw")}
    known = lasting(report["machine"])
    return {**known.pop("packages"), **known, "device": report["settings"]["device"], "model": report["model"]["name"]}


def _benchmarks(report: Report) -> dict[str, Mapping[str, Any]]:
    found = report["benchmarks"] if report["schema"] == PYTEST_BENCHMARK else schema.benchmarks(report)
    return {one["fullname"]: one for one in found}


def _time(name: str, base: Mapping[str, Any], head: Mapping[str, Any]) -> Time:
    before, after = base["stats"], head["stats"]
    hint: Hint = "cannot tell"
    if min(before["rounds"], after["rounds"]) < LEAST_ROUNDS:
        hint = "too few rounds"
    elif base.get("params") == head.get("params"):
        if after["q1"] > before["q3"] * (1 + DELTA):
            hint = "slower"
        elif before["q1"] > after["q3"] * (1 + DELTA):
            hint = "faster"
    return Time(name, before["median"], after["median"], hint)


def _missing(base: Report, head: Report) -> tuple[str, ...]:
    """What head could not measure, and whether it has no figures at all where base has some."""
    missing = []
    if head["schema"] == schema.SCHEMA:
        missing += [f"{one['what']}: {one['reason']}" for one in head["unsupported"]]
        missing += outcome.unmeasured(head)
    if base.get("gates") and not head.get("gates"):
        missing.append("exact figures: base has them, head has none")
    return tuple(missing)


def _doubt(report: Report) -> str:
    return str((report.get("canaries") or {}).get("doubt", ""))
