"""What a report amounts to: every comparison with its verdict, the canaries, and one line for all of it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from fastdiff.bench.stats import pairs_needed
from fastdiff.bench.summary import Report
from fastdiff.bench.verdict import Judgement, Verdict, judge
from fastdiff.bench.words import counted

WORDS: Mapping[Verdict, str] = {
    "IMPROVEMENT": "faster",
    "NO-CHANGE": "no change",
    "REGRESSION": "slower",
    "INCONCLUSIVE": "inconclusive",
    "INVALID": "invalid",
}
"""A verdict on two arms of one run, where nothing regressed: one arm is the faster."""

CANARIES = {"a_a": "the same work twice", "slower_10_percent": "a tenth more work"}
"""Comparisons whose outcome is known beforehand, as a report and a reader call them."""


LEAST_ERROR = 1e-5  # of float32 against float64, relative: no table is wrong for less


class Wrong(NamedTuple):
    """One wrong answer: the section of the report that it is in, the case, who gave it, and why it is wrong."""

    section: Literal["images", "rows", "fates", "errors"]
    case: str
    arm: str
    reason: str


@dataclass(frozen=True)
class Compared:
    """Two arms of a case; `ratio` is None where one of them answered wrongly."""

    kind: Literal["images", "rows"]
    case: Report
    base: str
    arm: str
    ratio: Report | None
    judgement: Judgement

    @property
    def word(self) -> str:
        """The verdict for a reader who sees the ratio beside it."""
        return WORDS[self.judgement.verdict]


@dataclass(frozen=True)
class Outcome:
    """The whole run in one line. `word` is a verdict, or says that there was nothing to give one on."""

    word: str
    sentence: str
    alarming: bool


def comparisons(report: Report) -> Iterator[Compared]:
    """Every comparison that was asked for, in the report's order, those without a valid pair included."""
    doubt = distrust(report)
    for case in report["images"]:
        for base, arm in case["compare"]:
            yield _compared("images", case, base, arm, report["settings"]["level"], doubt)
    for case in report["rows"]:
        for arm in case["arms"]:
            if arm != "diffusers":
                yield _compared("rows", case, "diffusers", arm, report["settings"]["level"], doubt)


def tally(report: Report) -> dict[str, int]:
    """How many comparisons ended how, in words."""
    words = Counter(one.word for one in comparisons(report))
    return {word: words[word] for word in WORDS.values() if words[word]}


def canaries(report: Report) -> list[tuple[str, Mapping[str, Any]]]:
    """Those that the run has, as a reader calls them, with their judgements."""
    known = report["canaries"] or {}
    return [(label, known[name]) for name, label in CANARIES.items() if known.get(name)]


def distrust(report: Report) -> str:
    """Why no time of this run is to be believed; empty if no canary gives a reason. Without any, see `unvouched`."""
    return str((report["canaries"] or {}).get("doubt") or "")


def unvouched(report: Report) -> str:
    """Said of a run whose times no canary vouches for: not doubtful, but not known to be sound either."""
    timed = report["images"] or report["rows"] or report["setup"]
    return "without canaries: nothing vouches for its times" if timed and len(canaries(report)) < 2 else ""


def changes(report: Report) -> list[Report]:
    """Deterministic figures that are not what the baseline says."""
    return list((report["gates"] or {}).get("changes") or ())


def accepted(report: Report) -> bool:
    """Whether this run's deterministic figures have become the baseline."""
    return bool((report["gates"] or {}).get("accepted"))


def regressions(report: Report) -> list[str]:
    """Deterministic figures that got worse, unless the run was there to accept them."""
    worse = [change["name"] for change in changes(report) if change["verdict"] == "REGRESSION"]
    return [] if accepted(report) else worse


def moved(report: Report) -> str:
    """How many deterministic figures are other than the baseline's, in words; one that it lacks has not moved."""
    verdicts = Counter(change["verdict"] for change in changes(report))
    count = verdicts["REGRESSION"] + verdicts["IMPROVEMENT"]
    return f"{count or 'none'} moved" + (f", {verdicts['new']} new" if verdicts["new"] else "")


def unmeasured(report: Report) -> list[str]:
    """Deterministic figures that this run should have and could not measure."""
    return [name for name, value in (report["gates"] or {"figures": {}})["figures"].items() if value is None]


def wrong_answers(report: Report) -> list[Wrong]:
    """Everything that this run shows to be wrong: no other code decides what is.

    An arm whose samples differ from the reference; interleaved requests that went wrong on an owner that isolates them
    (that a shared one lets them go wrong is what it is there to show); a table that led to infinities or NaN, or that
    errs more than twice as much against float64 as diffusers does.
    """
    found = []
    for section in ("images", "rows"):
        for case in report[section]:
            wrong = ((arm, measured) for arm, measured in case["arms"].items() if measured["status"] != "ok")
            found += [Wrong(section, case["name"], arm, measured["reason"]) for arm, measured in wrong]
    for one in report["fates"]:
        fates = [str(fate["fate"]) for fate in one["fates"] if fate["fate"] != "right"]
        if fates and not one["arm"].startswith("shared"):
            reason = f"interleaved requests, {one['workload']}: {', '.join(fates)}"
            found.append(Wrong("fates", one["sampler"], one["arm"], reason))
    for one in report["errors"]:
        if one["fastdiff"] is None:
            found.append(Wrong("errors", one["sampler"], "tensorized", "infinities or NaN against float64"))
        elif one["fastdiff"] > (allowed := max(LEAST_ERROR, 2 * (one["diffusers"] or 0.0))):
            reason = f"differs from float64 by {one['fastdiff']:.2g}, more than {allowed:.2g}"
            found.append(Wrong("errors", one["sampler"], "tensorized", reason))
    return found


def exit_code(report: Report) -> int:
    """What a run amounts to: 3 where anything is wrong, 1 where a deterministic figure got worse, 4 where anything
    could not be measured, else 0. Times play no part: they are judged in pairs of processes, by `ab`."""
    if wrong_answers(report):
        return 3
    if regressions(report):
        return 1
    return 4 if report["unsupported"] or unmeasured(report) else 0


def headline(report: Report) -> Report | None:
    """The attribution's last step from its baseline: all that was gained."""
    steps = report["summary"]["attribution"]
    whole = [step for step in steps if step["base"] == steps[0]["base"]]
    return whole[-1] if whole else None


def outcome(report: Report) -> Outcome:
    """The worst thing that happened, else the best that can be said; and whether its times are vouched for."""
    found, without = _outcome(report), unvouched(report)
    return replace(found, sentence=f"{found.sentence}; {without}") if without else found


def _outcome(report: Report) -> Outcome:
    doubt, changed = distrust(report), changes(report)
    if wrong := wrong_answers(report):
        first = _first([f"{one.case}, {one.arm}" for one in wrong])
        return Outcome("INVALID", f"{counted(len(wrong), 'wrong answer')}, however fast: {first}", True)
    if regressed := regressions(report):
        figures = counted(len(regressed), "deterministic figure")
        return Outcome("REGRESSION", f"{figures} got worse: {_first(regressed)}", True)
    if doubt:
        return Outcome("INVALID", f"no time of this run is to be believed: {doubt}", True)
    if report["unsupported"]:
        return Outcome("INCOMPLETE", f"{counted(len(report['unsupported']), 'piece')} could not be measured", True)
    if missing := unmeasured(report):
        figures = counted(len(missing), "deterministic figure")
        return Outcome("INCOMPLETE", f"{figures} could not be measured: {_first(missing)}", True)
    if accepted(report):
        return Outcome("ACCEPTED", f"the deterministic figures are the new baseline: {moved(report)}", False)
    if not report["complete"]:
        return Outcome("INCOMPLETE", "a part of the suite was run", False)
    gates = report["gates"] or {}
    if gates.get("changes") is None:
        return Outcome("MEASURED", "no answer is wrong; there was no baseline to compare with", False)
    improved = sum(change["verdict"] == "IMPROVEMENT" for change in changed)
    compared = f"{counted(len(gates['figures']), 'deterministic figure')} compared with the baseline"
    if unknown := sum(change["verdict"] == "not measured" for change in changed):
        compared += f", which has not measured {unknown}"
    if improved:
        return Outcome("IMPROVEMENT", f"{compared}, {improved} shrank", False)
    return Outcome("NO-CHANGE", f"{compared}, {moved(report)}", False)


def _compared(kind: Literal["images", "rows"], case: Report, base: str, arm: str, level: float, doubt: str) -> Compared:
    found = [one["ratio"] for one in case["comparisons"] if (one["base"], one["arm"]) == (base, arm)]
    if not found:
        reasons = [case["arms"][name]["reason"] for name in (base, arm) if case["arms"][name]["reason"]]
        return Compared(kind, case, base, arm, None, Judgement("INVALID", None, None, None, 0, "; ".join(reasons)))
    times = (case["arms"][base]["total_s"], case["arms"][arm]["total_s"])
    judgement = judge(*times, level=level, least_pairs=pairs_needed(level))  # one process: the interval is exact
    if doubt:
        judgement = Judgement("INVALID", judgement.change, judgement.low, judgement.high, judgement.pairs, doubt)
    return Compared(kind, case, base, arm, found[0], judgement)


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
