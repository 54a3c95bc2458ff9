"""Reports to make pages of: the committed ones, and those with something wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdiff.bench import schema
from fastdiff.bench.summary import summarize

REPORTS = Path(__file__).parents[2] / "reports"
COMMITTED = sorted(path.parent for path in REPORTS.glob("*/report.json"))

HOSTILE = "<script>alert(1)</script> | **{{ 7*7 }}** <img src=x onerror=alert(1)>\n\x00\x1b[31m" + "x" * 300
"""A name with a meaning in HTML, Markdown, templates, XML and terminals."""


def committed() -> dict[str, Any]:
    return schema.load(COMMITTED[0])


def judgement(verdict: str, change: float | None) -> dict[str, Any]:
    ends = (None, None) if change is None else (change - 0.01, change + 0.01)
    return {"verdict": verdict, "change": change, "low": ends[0], "high": ends[1], "pairs": 40, "reason": "why"}


def hostile() -> dict[str, Any]:
    """Others' words wherever there are any, and an arm that answered wrongly."""
    report = committed()
    report["model"]["name"] = report["machine"]["cpu"] = HOSTILE
    report["command"].append(HOSTILE)
    report["images"][0]["name"] = report["rows"][0]["name"] = HOSTILE
    report["unsupported"] = [{"what": HOSTILE, "reason": "</table>" + HOSTILE}]
    _make_wrong(report["images"][2], "tensorized/eager", HOSTILE)
    report["summary"] = summarize(report)
    return report


def baseline_moved() -> dict[str, Any]:
    """One figure of each verdict against a baseline."""
    report = committed()
    moves = (
        ("launches per row: mixed, batch 8", 412, 438, "REGRESSION"),
        ("peak bytes", 2048, 1024, "IMPROVEMENT"),
        ("host syncs", None, 0, "new"),
    )
    changes = [dict(zip(("name", "base", "head", "verdict"), move, strict=True)) for move in moves]
    report["gates"] = {"key": "torch-2-cpu", "figures": {name: head for name, _, head, _ in moves}, "changes": changes}
    return report


def doubtful() -> dict[str, Any]:
    """The slow canary went unnoticed."""
    report = committed()
    report["canaries"] = {
        "a_a": judgement("NO-CHANGE", 0.001),
        "slower_10_percent": judgement("NO-CHANGE", 0.002),
        "doubt": "a tenth more work was judged NO-CHANGE",
        "total_s": {"base": [0.02, 0.021], "the same": [0.02, 0.02]},
    }
    report["summary"] = summarize(report)
    return report


def wrong() -> dict[str, Any]:
    """Every arm answered wrongly."""
    report = committed()
    for case in (*report["images"], *report["rows"]):
        for arm in case["arms"]:
            _make_wrong(case, arm, "differs from the reference by nan, more than 0.001")
    report["summary"] = summarize(report)
    return report


def bare() -> dict[str, Any]:
    """Nothing was measured."""
    report = committed()
    for section in ("setup", "counts", "fates", "errors", "memory", "rows", "images", "unsupported"):
        report[section] = []
    for section in ("attribution", "no_gain", "target"):
        report[section] = []
    report.update(compile_s={}, canaries=None, gates=None, complete=False)
    report["seconds"] = {"compile": 0.0, "all": 0.0, "pieces": {}}
    report["summary"] = summarize(report)
    return report


def small() -> dict[str, Any]:
    """One of everything, three samples each."""
    report = committed()
    for section in ("rows", "setup", "counts", "fates", "errors", "memory"):
        del report[section][1:]
    report["images"] = [case for case in report["images"] if case["name"] == "mixed"]
    case, sampler = report["memory"][0], report["errors"][0]["sampler"]
    case["entries"] = [one for one in case["entries"] if one["sampler"] == sampler]
    for one in (*report["images"], *report["rows"]):
        for measured in one["arms"].values():
            measured.update(total_s=measured["total_s"][:3], loop_s=measured["loop_s"][:3], gpu_s=[])
    report["setup"][0]["call_s"] = {name: times[:3] for name, times in report["setup"][0]["call_s"].items()}
    state = {"sm_mhz": 1980, "temperature_c": 55, "throttles": ["power cap"], "foreign_processes": 0}
    report["rows"][0]["arms"]["diffusers"]["gpu"] = [state]
    report.update(
        gates=baseline_moved()["gates"], unsupported=[{"what": "x", "reason": "y"}], no_gain=[], target=[],
        compile_cache={"denoiser, batch 8": "warm"}, attribution=report["attribution"][:1],
    )  # fmt: skip
    report["machine"]["packages"] = {name: report["machine"]["packages"][name] for name in ("torch", "diffusers")}
    report["seconds"]["pieces"] = {"a": 1.0}
    report["canaries"]["total_s"] = {"base": [0.02, 0.021]}
    report["summary"] = {**summarize(report), "targets": summarize(report)["targets"][:1]}
    return report


def _make_wrong(case: dict[str, Any], arm: str, reason: str) -> None:
    case["arms"][arm].update(status="INVALID", reason=reason, error=None, total_s=[], loop_s=[])
    case["comparisons"] = [one for one in case["comparisons"] if arm not in (one["base"], one["arm"])]
