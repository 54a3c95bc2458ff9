"""What a run's raw data says: the attribution, where fastdiff does not help, and the targets. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any, Literal

SETUP_TARGET_US = 50.0

Report = Mapping[str, Any]


def summarize(report: Report) -> dict[str, Any]:
    """The report's "summary", worked out from everything else in it: of a part of the suite, what that part has."""
    return {
        "attribution": [_step(report, step) for step in _chosen(report, "attribution")],
        "no_gain": [_step(report, step) for step in _chosen(report, "no_gain")],
        "targets": list(_targets(report)),
    }


def find_case(report: Report, name: str) -> Report | None:
    """The image or row case of that name; None if it could not run."""
    return next((case for case in (*report["images"], *report["rows"]) if case["name"] == name), None)


def find_ratio(report: Report, case: str, base: str, arm: str) -> dict[str, Any] | None:
    """The measured ratio base / arm; None where one of them was not valid or could not run."""
    for comparison in (find_case(report, case) or {"comparisons": ()})["comparisons"]:
        if (comparison["base"], comparison["arm"]) == (base, arm):
            ratio: dict[str, Any] = comparison["ratio"]
            return ratio
    return None


def section(case: Report) -> Literal["images", "rows"]:
    """The list of the report that a case is in."""
    return "images" if "workload" in case else "rows"


def unit(case: Report) -> tuple[Literal["image", "row"], int]:
    """What a case's times are given per, and how many of those a sample has: images, or rows of the whole batch."""
    return ("image", case["batch"]) if section(case) == "images" else ("row", case["steps"])


def compiled_part(arm: str, batch: int) -> str:
    """What of an image arm is compiled: the key of its seconds in the report's "compile_s"."""
    return f"{'denoiser and step' if arm.startswith('tensorized/') else 'denoiser'}, batch {batch}"


def unit_s(case: Report | None, arm: str) -> float | None:
    """Median seconds of an arm per image (image cases) or per row of the whole batch (row cases)."""
    times = case["arms"][arm]["total_s"] if case and arm in case["arms"] else ()  # one that failed is not there
    return median(times) / unit(case)[1] if case and times else None


def _chosen(report: Report, what: str) -> list[Report]:
    """A case that is not there could not run, unless nobody asked for it."""
    return [one for one in report[what] if report["complete"] or find_case(report, one["case"])]


def _step(report: Report, step: Report) -> dict[str, Any]:
    case = find_case(report, step["case"])
    return {
        **step,
        "per": unit(case)[0] if case else "row",
        "base_s": unit_s(case, step["base"]),
        "arm_s": unit_s(case, step["arm"]),
        "ratio": find_ratio(report, step["case"], step["base"], step["arm"]),
    }


def _targets(report: Report) -> Iterator[dict[str, Any]]:
    """Each with whether it was met: None where it is but reported, or where the canaries say that no time counts."""
    doubt = (report["canaries"] or {}).get("doubt", "")
    for target in _chosen(report, "target"):
        found = [find_ratio(report, target["case"], target["base"], arm) for arm in target["arms"]]
        ratios = [ratio for ratio in found if ratio is not None]
        best = max(ratios, key=lambda ratio: ratio["value"]) if ratios else None
        at_least, slower_at_most = target["at_least"], target["slower_at_most"]
        if slower_at_most is not None:
            goal = f"interval below +{slower_at_most:.0%}"
            measured = slower(best) if best else None
            met = best is not None and 1 / best["low"] - 1 < slower_at_most
        else:
            goal = f">= {at_least:g}x" if at_least is not None else "reported"
            measured = speed_up(best) if best else None
            met = best is not None and (at_least is None or best["value"] >= at_least)
        untold = doubt or (goal == "reported" and best)
        yield _target(target["label"], goal, _doubted(measured, doubt), None if untold else met)
    if report["counts"]:
        operations = {count for one in report["counts"] for count in one["fastdiff"]["operations"]}
        syncs = sum(sum(one["fastdiff"]["syncs"]) for one in report["counts"])
        spread = "/".join(map(str, sorted(operations)))
        yield _target("Host syncs of a tensorized row, any samplers and batch", "0", str(syncs), syncs == 0)
        yield _target(
            "Operations of a tensorized row, any samplers and batch", "constant", spread, len(operations) == 1
        )
    if report["setup"]:
        worst = max(report["setup"], key=lambda one: median(one["call_s"]["cached table + load"]))
        worst_us = median(worst["call_s"]["cached table + load"]) * 1e6
        yield _target(
            "Set-up of a request with a cached table, text and noise apart (slowest sampler)",
            f"<= {SETUP_TARGET_US:g} us",
            _doubted(f"{worst_us:.0f} us ({worst['sampler']})", doubt),
            None if doubt else worst_us <= SETUP_TARGET_US,
        )


def _doubted(measured: str | None, doubt: str) -> str | None:
    return f"{measured}, INVALID: {doubt}" if measured and doubt else measured


def _target(label: str, goal: str, measured: str | None, met: bool | None) -> dict[str, Any]:
    return {"label": label, "goal": goal, "measured": measured or "not measured", "met": met}


def speed_up(ratio: Report) -> str:
    """`1.23x [1.20, 1.26]`."""
    return f"{ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def slower(ratio: Report) -> str:
    """How much slower the arm is than its base, `+0.5 % [-1.0 %, +2.0 %]`."""
    middle, low, high = (1 / ratio[key] - 1 for key in ("value", "high", "low"))
    return f"{100 * middle:+.1f} % [{100 * low:+.1f} %, {100 * high:+.1f} %]"
