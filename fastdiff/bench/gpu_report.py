"""The page of `bench gpu`: a pure function of its journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from fastdiff.bench.stats import hodges_lehmann, ratio
from fastdiff.bench.words import NONE, byte_count, prefixed, table
from fastdiff.profile import RATES, break_even

Record = Mapping[str, Any]
Row = Sequence[str]

OVERHEAD_S = 10e-6  # of a step over its model's graph, or
OVERHEAD_FLOORS = 1.5  # times what moving the step's own bytes takes, where that is more
HOST_S = 15e-6
POOL_RATIO = 1.10
SIZE_BYTES = 40 * 2**20
ROW_TARGETS_S = {"sd15-512": 4.3e-3, "sdxl-1024": 31e-3, "dit-xl-256": 1.4e-3, "flux-dev-1024": 128e-3}
"""By geometry, at batch 1."""
IMAGE_ROWS = 50  # rows of a schedule, for break-even
GRAPH, ALONE = "tensorized/step-graph", "model/graph"
MEASURED = ("ok", "unsupported")
LEGEND = """\
Arms: `cloned-deepcopy` is a diffusers scheduler for each request, stepped in Python; `shared` one for all, which works
while they sample alike and in step; `tensorized` is fastdiff; `model/graph` is the model captured alone.
Times are medians per row. `launches` are kernels, copies and fills, those of a graph one by one; `before a row` is what
all requests of the batch take to get ready. Ratios are base / arm with their interval: above 1, the arm is faster.
Errors of real geometries are against diffusers in float32, those of the null model against cloned-deepcopy."""


@dataclass
class Outcome:
    """An attempt at a cell."""

    code: str | None = None  # a hash of what ran; None if it died before it could tell
    status: str = "cut"  # until its end is journalled
    reason: str | None = None
    seconds: float | None = None  # None until then
    entries: list[dict[str, Any]] = field(default_factory=list)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Its entries of one kind, in order."""
        return [entry for entry in self.entries if entry["kind"] == kind]


class Target(NamedTuple):
    """A figure that the design asks for."""

    figure: str
    value: float
    measured: str  # the value with its unit, and what goes with it
    goal: str
    met: bool


def attempts(records: Sequence[Record]) -> dict[str, Outcome]:
    """Every cell that was begun, by name: the last attempt, or one that the same code got further in."""
    kept: dict[str, Outcome] = {}
    found: dict[str, Outcome] = {}
    for record in records:
        name, event = record.get("cell", ""), record["event"]
        former = found.get(name)
        # An end without a start: the cell's process died before it could journal one.
        if event == "start" or (event == "end" and (former is None or former.seconds is not None)):
            if former is not None:
                kept[name] = _better(kept.get(name), found.pop(name))  # the order is that of the last attempts
            found[name] = Outcome(record.get("code"))
        if event == "entry":
            found[name].entries.append(record["entry"])
        elif event == "end":
            one = found[name]
            one.status, one.reason, one.seconds = record["status"], record["reason"], record["seconds"]
    return {name: _better(kept.get(name), one) for name, one in found.items()}


def _better(former: Outcome | None, one: Outcome) -> Outcome:
    if former is None or one.status in MEASURED or one.code not in (None, former.code):
        return one
    further = former.status in MEASURED or len(former.entries) > len(one.entries)
    return former if further else one


def outcomes(records: Sequence[Record]) -> dict[str, str]:
    """What became of every cell that was begun: ok, failed, unsupported or cut."""
    return {name: one.status for name, one in attempts(records).items()}


def markdown(records: Sequence[Record]) -> str:
    """The whole page."""
    found = attempts(records)
    runs = [record for record in records if record["event"] == "run"]
    planned = {one["cell"]: one["tier"] for run in runs for one in run["cells"]}
    gpu = next((entry["gpu"] for one in found.values() for entry in one.of_kind("profile")), None)
    page = ["# What a CUDA machine tells", ""]
    for run in runs:
        tiny = ", **tiny: toy models, the times say nothing**" if run["settings"]["tiny"] else ""
        page.append(f"- {run['at']}: {run['machine']}, commit {run['commit']}{tiny}")
    page += ["", LEGEND, ""]
    page += _not_measured(planned, found)
    targets = [target for one in found.values() for target in _targets(one, gpu)]
    if targets:
        met = [(one.figure, one.measured, one.goal, "met" if one.met else "**not met**") for one in targets]
        page += ["## Targets", "", table(("figure", "measured", "target", ""), met), ""]
    several = len({one.code for one in found.values()}) > 1
    for name, one in ((name, one) for name, one in found.items() if one.entries):
        seconds = "" if one.seconds is None else f", {one.seconds:.0f} s"
        ran = f", code {one.code}" if several else ""
        page += [f"## {name} ({one.status}{seconds}{ran})", ""]
        for kind, render in _RENDERED.items():
            if entries := one.of_kind(kind):
                page += [*render(entries, one), ""]
    return "\n".join(page).strip() + "\n"


def _not_measured(planned: Mapping[str, str], found: Mapping[str, Outcome]) -> list[str]:
    lines = []
    for name, tier in planned.items():
        one = found.get(name)
        if one is None:
            lines.append(f"- tier {tier}, {name}: not reached")
        elif one.status != "ok":
            said = (one.reason or "the run ended in it").splitlines()[-1]
            lines.append(f"- tier {tier}, {name}: {one.status}: {said}")
    for name, one in found.items():
        for entry in one.of_kind("rows"):
            invalid = {arm: it["reason"] for arm, it in entry["arms"].items() if it["status"] == "INVALID"}
            lines += [f"- {name}: {arm}: INVALID: {reason}" for arm, reason in invalid.items()]
    return ["## Not measured", "", *lines, ""] if lines else ["Everything was measured.", ""]


# Targets


def _targets(outcome: Outcome, gpu: str | None) -> list[Target]:
    """Of what was measured more than once, with other samplers or beside other arms, the worst."""
    worst: dict[str, Target] = {}
    for one in _all_targets(outcome, gpu):
        if one.figure not in worst or one.value > worst[one.figure].value:
            worst[one.figure] = one
    return list(worst.values())


def _all_targets(outcome: Outcome, gpu: str | None) -> Iterator[Target]:
    for tests in outcome.of_kind("tests"):
        yield Target("CUDA tests", 0, _tests_said(tests), "all pass", tests["code"] == 0 and not tests["failures"])
    for entry in outcome.of_kind("rows"):
        if entry["arms"].get(GRAPH, {}).get("row_s"):
            yield from _row_targets(entry, outcome, gpu)
    for graphs in outcome.of_kind("graphs"):
        largest, *rest = sorted(map(int, graphs["sizes"]), reverse=True)
        pool = graphs["pool_bytes"] / max(1, graphs["largest_alone_bytes"])
        what = f"{graphs['model']}: pool of all sizes over that of {largest} alone"
        yield Target(what, pool, f"{pool:.3f}", f"<= {POOL_RATIO:.2f}", pool <= POOL_RATIO)
        for n in rest:
            built = graphs["sizes"][str(n)]
            what, size = f"{graphs['model']}: the most that a further size takes", _size_bytes(built)
            yield Target(what, size, f"{byte_count(size)} (of {n})", f"<= {byte_count(SIZE_BYTES)}", size <= SIZE_BYTES)


def _row_targets(entry: Record, outcome: Outcome, gpu: str | None) -> Iterator[Target]:
    graph, observed = entry["arms"][GRAPH], _observed(entry, outcome).get(GRAPH, {})
    row_s, host_s = median(graph["row_s"]), median(graph["host_s"])
    what, of = f"{entry['model']} x {entry['batch']}", f" ({', '.join(dict.fromkeys(entry['samplers']))})"
    if entry.get("compile", "default") != "default":
        what = f"{what}, {entry['compile']}"
    overhead_goal_s = max(OVERHEAD_S, OVERHEAD_FLOORS * _state_floor_s(outcome, gpu))
    if entry["model"] == "null model":  # the whole row is overhead, the launch of its graph included
        yield _time_target(f"{what}: a step graph's row", row_s, overhead_goal_s, of)
    elif overhead := _overhead_s(entry):
        middle, low, high = overhead
        beyond, interval = f"{what}: a step graph's row beyond the model's graph", f" [{_s(low)}, {_s(high)}]"
        yield _time_target(beyond, middle, overhead_goal_s, interval)
    yield _time_target(f"{what}: host time of it", host_s, HOST_S, of)
    for counted in ("syncs", "allocations") if observed else ():
        count = observed[counted]
        yield Target(f"{what}: {counted} of its schedule", count, f"{count}{of}", "0", count == 0)
    if entry["batch"] == 1 and entry["model"] in ROW_TARGETS_S:
        yield _time_target(f"{what}: a step graph's row", row_s, ROW_TARGETS_S[entry["model"]], of)


def _time_target(figure: str, value_s: float, goal_s: float, more: str) -> Target:
    return Target(figure, value_s, _s(value_s) + more, f"<= {_s(goal_s)}", value_s <= goal_s)


def _overhead_s(entry: Record) -> tuple[float, float, float] | None:
    """What a step graph's row takes beyond the model's graph, from the rounds in which both ran, and its interval."""
    step, model = (entry["arms"].get(arm, {}).get("row_s") for arm in (GRAPH, ALONE))
    if not step or not model:
        return None
    return hodges_lehmann(np.asarray(step) - np.asarray(model), entry["level"])


def _state_floor_s(outcome: Outcome, gpu: str | None) -> float:
    """How long the device moves what a row touches beside its model; 0 for a device without rates."""
    rates = next((rates for (name, _), rates in RATES.items() if name == gpu), None)
    profiles = outcome.of_kind("profile")
    return profiles[0]["step_bytes"] / rates.bytes_per_s if rates and profiles else 0.0


def _size_bytes(built: Record) -> int:
    total: int = built["torch_bytes"] + built["driver_bytes"]
    return total


# Kinds of entries


def _tests(entries: Sequence[Record], outcome: Outcome) -> Iterator[str]:
    for entry in entries:
        yield f"{_tests_said(entry)}, in {entry['seconds']:.0f} s"
        yield from (f"- {one['test']}: {one['message']}" for one in entry["failures"])
        if entry["code"] not in (0, 1):
            yield from ("", "```", *entry["log_tail"], "```")


def _tests_said(entry: Record) -> str:
    counts = f"{entry['passed']} passed, {len(entry['failures'])} failed, {entry['skipped']} skipped"
    if entry["code"] is None:
        return f"{counts}, then out of time"
    return counts if entry["code"] in (0, 1) else f"{counts}, then exit code {entry['code']}"


def _ceilings(entries: Sequence[Record], outcome: Outcome) -> Iterator[str]:
    for entry in entries:
        yield f"- matrix product, random bfloat16: {prefixed(entry['flops'] / median(entry['product_s']), 'FLOP/s')}"
        yield f"- copy, read and written: {prefixed(entry['copied_bytes'] / median(entry['copy_s']), 'B/s')}"


def _profiles(entries: Sequence[Record], outcome: Outcome) -> Iterator[str]:
    for entry in entries:
        floor, roofline = (NONE if entry[key] is None else _s(entry[key]) for key in ("floor_s", "roofline_s"))
        yield (
            f"An eager row of {entry['n']}: {entry['operations']} operations, {prefixed(entry['flops'], 'FLOP')}, "
            f"{entry['regime'] or 'regime unknown'}; floor of any mode {floor}, of eager mode {roofline}; "
            f"the step beside the model touches {byte_count(entry['step_bytes'])}."
        )


def _builds(entries: Sequence[Record], outcome: Outcome) -> Iterator[str]:
    rows = [
        (
            entry["arm"], *(_s(entry[key]) if entry[key] else NONE for key in ("compile_s", "warm_up_s", "capture_s")),
            byte_count(entry["torch_bytes"]), byte_count(entry["driver_bytes"]),
        )
        for entry in entries
    ]  # fmt: skip
    yield table(("made ready", "compile", "warm-up", "capture", "torch", "driver"), rows)
    yield from _break_even(outcome)


def _break_even(outcome: Outcome) -> Iterator[str]:
    """Images until the whole set-up is paid back against eager diffusers, and capture alone against torch.compile."""
    built = {entry["arm"]: entry for entry in outcome.of_kind("built")}
    for entry in outcome.of_kind("rows"):
        arms, ready = entry["arms"], built.get(GRAPH)
        if ready is None or not arms.get(GRAPH, {}).get("row_s"):
            continue
        capture_s = ready["compile_s"] + ready["warm_up_s"] + ready["capture_s"]
        compile_s = built["tensorized/compiled"]["compile_s"]
        for base, setup_s in (
            ("cloned-deepcopy/eager", compile_s + capture_s), ("cloned-deepcopy/compiled", capture_s),
        ):  # fmt: skip
            if not arms.get(base, {}).get("row_s"):
                continue
            saved_s = median(arms[base]["row_s"]) - median(arms[GRAPH]["row_s"])
            images = break_even(setup_s, saved_s, IMAGE_ROWS / entry["batch"])
            paid = "never paid back" if images is None else f"paid back after {images:.3g} images of {IMAGE_ROWS} rows"
            yield f"\nAgainst {base}, {_s(setup_s)} of set-up are {paid}."
        return  # later entries repeat these arms


def _rows(entries: Sequence[Record], outcome: Outcome) -> Iterator[str]:
    floor_s = next((entry["floor_s"] for entry in outcome.of_kind("profile")), None)
    heads = ("arm", "row", "x floor", "host", "launches", "busy", "syncs", "allocations", "before a row", "error")
    for entry in entries:
        samplers, observed = ", ".join(dict.fromkeys(entry["samplers"])), _observed(entry, outcome)
        yield (
            f"{entry['model']} x {entry['batch']}, {samplers}, {entry['rows']} rows, "
            f"error at most {entry['tolerance']:.2g}:"
        )
        yield ""
        timed = {name: arm for name, arm in entry["arms"].items() if arm.get("row_s")}
        rows = [_arm(name, arm, observed.get(name, {}), floor_s) for name, arm in timed.items()]
        against = [(*row, *_ratios(entry, row[0])) for row in rows]
        yield table((*heads, f"base / arm, {entry['level']:.0%}"), against)
        yield ""
        for reason, names in _reasons(entry).items():
            yield f"- {', '.join(names)}: {reason}"
        yield ""


def _arm(name: str, arm: Record, observed: Record, floor_s: float | None) -> Row:
    row_s, launches, device_s = median(arm["row_s"]), observed.get("launches"), observed.get("device_s")
    return (
        name,
        _s(row_s),
        NONE if not floor_s else f"{row_s / floor_s:.2f}",
        _s(median(arm["host_s"])),
        NONE if launches is None else f"{launches:g}",
        NONE if device_s is None else f"{min(1.0, device_s / row_s):.0%}",
        *(NONE if not observed else f"{observed[key] / observed['rows']:g}" for key in ("syncs", "allocations")),
        _s(median(arm["start_s"])),
        f"{arm['error']:.2g}",
    )


def _ratios(entry: Record, arm: str) -> Row:
    """How much faster than each of its bases."""
    found = {
        base: ratio(entry["arms"][base]["row_s"], entry["arms"][arm]["row_s"], entry["level"])
        for base, other in entry["pairs"]
        if other == arm
    }
    return ("; ".join(f"{base} {one.value:.3f} [{one.low:.3f}, {one.high:.3f}]" for base, one in found.items()),)


def _reasons(entry: Record) -> dict[str, list[str]]:
    """The arms that were not timed, by why."""
    found: dict[str, list[str]] = {}
    for name, arm in entry["arms"].items():
        if not arm.get("row_s"):
            found.setdefault(f"{arm['status']}: {arm['reason']}", []).append(name)
    return found


def _observed(entry: Record, outcome: Outcome) -> dict[str, Record]:
    """What was seen of these requests' arms after they were timed."""
    return {
        name: {"rows": one["rows"], **arm}
        for one in outcome.of_kind("observed")
        if one["samplers"] == entry["samplers"]
        for name, arm in one["arms"].items()
    }


def _graphs(entries: Sequence[Record], outcome: Outcome) -> Iterator[str]:
    for entry in entries:
        yield (
            f"{entry['model']}: pool {byte_count(entry['pool_bytes'])}, of the largest batch alone "
            f"{byte_count(entry['largest_alone_bytes'])}; slots {byte_count(entry['state_bytes'])}. "
            "Captured largest first:"
        )
        yield ""
        sizes = sorted(entry["sizes"].items(), key=lambda one: -int(one[0]))
        rows = [
            (n, byte_count(one["torch_bytes"]), byte_count(one["driver_bytes"]), _s(one["capture_s"]))
            for n, one in sizes
        ]
        yield table(("batch", "torch", "driver", "capture"), rows)


def _phases(entries: Sequence[Record], outcome: Outcome) -> Iterator[str]:
    keys = ("allocated_bytes", "peak_allocated_bytes", "reserved_bytes", "driver_bytes")
    rows = [(entry["phase"], *(byte_count(entry[key]) for key in keys)) for entry in entries]
    yield table(("after", "allocated", "peak since the last", "reserved", "driver's view"), rows)


def _ownerships(entries: Sequence[Record], outcome: Outcome) -> Iterator[str]:
    keys = ("before_bytes", "during_bytes", "after_bytes")
    rows = [
        (entry["shape"], entry["sampler"], entry["ownership"], *(byte_count(entry[key]) for key in keys))
        for entry in entries
    ]
    yield table(("latents", "sampler", "ownership", "before", "during", "after"), rows)


def _starts(entries: Sequence[Record], outcome: Outcome) -> Iterator[str]:
    keys = ("process_s", "load_s", "compile_s", "warm_up_s", "capture_s", "ready_s")
    rows = [(entry["model"], entry["start"], *(_s(entry[key]) for key in keys)) for entry in entries]
    yield table(("model", "start", "process", "load", "compile", "warm-up", "capture", "first row"), rows)


def _selftests(entries: Sequence[Record], outcome: Outcome) -> Iterator[str]:
    for entry in entries:
        phi = "not measured" if entry["phi"] is None else f"{entry['phi']:.2%}"
        a_a, slower = (len(entry["trials"][kind]) for kind in ("a_a", "slower"))
        yield (
            f"Grade {entry['grade']}, {'passed' if entry['passed'] else '**failed**'}: two arms of the same code "
            f"differ by {phi} (95th percentile), {entry['flagged']} of {a_a} were flagged; of {slower} with 5 % more "
            f"work {entry['found']} were found, {entry['wrong']} misjudged."
        )
        yield from ("", *(f"- {name}: {value}" for name, value in entry["checks"].items()))


_RENDERED: dict[str, Callable[[Sequence[Record], Outcome], Iterator[str]]] = {
    "tests": _tests, "ceilings": _ceilings, "profile": _profiles, "built": _builds, "rows": _rows, "graphs": _graphs,
    "phase": _phases, "ownership": _ownerships, "start": _starts,
    "selftest": _selftests,
}  # fmt: skip


# Text


def _s(value: float) -> str:
    return prefixed(value, "s") if value >= 0 else f"-{prefixed(-value, 's')}"
