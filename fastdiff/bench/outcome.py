"""What a report amounts to: every comparison with its verdict, the canaries, and one line for all of it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastdiff.bench.stats import pairs_needed
from fastdiff.bench.summary import Report
from fastdiff.bench.verdict import Judgement, Verdict, judge

WORDS: Mapping[Verdict, str] = {
    "IMPROVEMENT": "faster",
    "NO-CHANGE": "no change",
    "REGRESSION": "slower",
    "INCONCLUSIVE": "inconclusive",
    "INVALID": "invalid",
}
"""A verdict on two arms of one run, where nothing regressed: one arm is the faster."""


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
    counted = Counter(one.word for one in comparisons(report))
    return {word: counted[word] for word in WORDS.values() if counted[word]}


def canaries(report: Report) -> list[tuple[str, Mapping[str, Any]]]:
    """Comparisons whose outcome is known beforehand, with their judgements; those that the run has."""
    known = report.get("canaries") or {}
    labels = {"a_a": "the same work twice", "slower_10_percent": "a tenth more work"}
    return [(label, known[name]) for name, label in labels.items() if known.get(name)]


def distrust(report: Report) -> str:
    """Why no time of this run is to be believed; empty if no canary gives a reason. Without any, see `unvouched`."""
    return str((report.get("canaries") or {}).get("doubt") or "")


def unvouched(report: Report) -> str:
    """Said of a run whose times no canary vouches for: not doubtful, but not known to be sound either."""
    timed = report["images"] or report["rows"] or report["setup"]
    return "without canaries: nothing vouches for its times" if timed and len(canaries(report)) < 2 else ""


def changes(report: Report) -> list[Report]:
    """Deterministic figures that are not what the baseline says."""
    gates = report.get("gates") or {}
    return [change for change in gates.get("changes") or () if change["verdict"] != "NO-CHANGE"]


def moved(report: Report) -> str:
    """How many deterministic figures are other than the baseline's, in words; one that it lacks has not moved."""
    counted = Counter(change["verdict"] for change in changes(report))
    count = counted["REGRESSION"] + counted["IMPROVEMENT"]
    return f"{count or 'none'} moved" + (f", {counted['new']} new" if counted["new"] else "")


def unmeasured(report: Report) -> list[str]:
    """Deterministic figures that this run should have and could not measure."""
    return [name for name, value in (report.get("gates") or {}).get("figures", {}).items() if value is None]


def not_finite(report: Report) -> list[str]:
    """Samplers whose table led to infinities or NaN."""
    return [one["sampler"] for one in report["errors"] if one["fastdiff"] is None]


def wrong_answers(report: Report) -> list[tuple[Report, str, str]]:
    """Case, arm and reason of every arm that answered wrongly."""
    return [
        (case, arm, measured["reason"])
        for case in (*report["images"], *report["rows"])
        for arm, measured in case["arms"].items()
        if measured["status"] != "ok"
    ]


def wrong_fates(report: Report) -> list[Report]:
    """Interleaved requests that went wrong on an owner that isolates them."""
    return [
        one
        for one in report["fates"]
        if not one["arm"].startswith("shared") and any(fate["fate"] != "right" for fate in one["fates"])
    ]


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
    wrong, doubt, changed = wrong_answers(report), distrust(report), changes(report)
    regressed = [change for change in changed if change["verdict"] == "REGRESSION"]
    if fates := wrong_fates(report):
        return Outcome("INVALID", f"{fates[0]['arm']} let {fates[0]['sampler']}'s interleaved requests go wrong", True)
    if wrong:
        return Outcome("INVALID", f"{_number(len(wrong), 'arm')} answered wrongly, however fast", True)
    if samplers := not_finite(report):
        return Outcome("INVALID", f"{_first(samplers)}: infinities or NaN against float64", True)
    if regressed:
        names = _first([change["name"] for change in regressed])
        return Outcome("REGRESSION", f"{_number(len(regressed), 'deterministic figure')} got worse: {names}", True)
    if doubt:
        return Outcome("INVALID", f"no time of this run is to be believed: {doubt}", True)
    if report["unsupported"]:
        return Outcome("INCOMPLETE", f"{_number(len(report['unsupported']), 'piece')} could not be measured", True)
    if missing := unmeasured(report):
        counted = _number(len(missing), "deterministic figure")
        return Outcome("INCOMPLETE", f"{counted} could not be measured: {_first(missing)}", True)
    if not report.get("complete", True):
        return Outcome("INCOMPLETE", "a part of the suite was run", False)
    gates = report.get("gates") or {}
    if gates.get("changes") is None:
        return Outcome("MEASURED", "no answer is wrong; there was no baseline to compare with", False)
    improved = sum(change["verdict"] == "IMPROVEMENT" for change in changed)
    compared = f"{_number(len(gates['figures']), 'deterministic figure')} compared with the baseline"
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


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
