"""`python -m fastdiff.bench ab`: is one commit slower than another? Two worktrees, pairs of processes, one verdict."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastdiff.bench import canary, gates, machine, schema, selftest, suite, words
from fastdiff.bench.arguments import refuse, shared
from fastdiff.bench.cells import IMAGE_TOLERANCE, ROW_TOLERANCE
from fastdiff.bench.files import write
from fastdiff.bench.journal import stamp
from fastdiff.bench.outcome import CANARIES
from fastdiff.bench.sides import (
    SIDES,
    Bench,
    Process,
    Work,
    ask_both,
    check_dependencies,
    in_turn,
    resolve,
    uncommitted,
    worktrees,
)
from fastdiff.bench.stats import pairs_needed, ratio
from fastdiff.bench.verdict import DELTA, LEAST_PROCESSES, WIDTH, Judgement, judge_processes

LEVEL = 0.99  # for all looks together
LOOKS = (6, 10, 16, 24, 36)  # a sound case is done by the third; the others are for what is neither clear nor nothing
BLOCK_S = 0.02
CANARY_WORK = tuple(Work(name, "canary", max_s=0.6) for name in CANARIES)  # beside ten seconds of start and cases
TOLERANCES = {"row": ROW_TOLERANCE, "image": IMAGE_TOLERANCE}


class Gate(NamedTuple):
    """What the machine's grade says: the slowdown that counts, and why no times are taken, if they are not."""

    delta: float
    grade: str
    why_no_times: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--base, --head and how much to measure."""
    parser.add_argument("--base", required=True, metavar="REF", help="the commit to compare with")
    parser.add_argument("--head", default="HEAD", metavar="REF", help="the commit in question (default: HEAD)")
    parser.add_argument("-k", default="", metavar="TEXT", help="only cases with this in their name")
    parser.add_argument(
        "--processes", type=looks, default=LOOKS, metavar="N,N,..",
        help=f"process pairs after which to look (default: {','.join(map(str, LOOKS))})",
    )  # fmt: skip
    parser.add_argument("--deterministic", action="store_true", help="results and counts alone, no times")
    parser.add_argument("--suite", default="ab", metavar="NAME", help="a suite of bench/, or a file (default: ab)")
    shared(parser, "--device")
    parser.add_argument("--seed", type=int, default=0, help="of latents, noise and the order of sides")


def looks(text: str) -> tuple[int, ...]:
    """Rising numbers of process pairs."""
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if numbers[0] < LEAST_PROCESSES or numbers != sorted(set(numbers)):
        raise argparse.ArgumentTypeError(f"expected rising numbers >= {LEAST_PROCESSES} such as 6,10,16, got {text!r}")
    return tuple(numbers)


def main(options: argparse.Namespace) -> int:
    """Compare, print Markdown, write ab.json and ab.md; 1 names what regressed, 3 what is wrong, 4 what failed."""
    report = compare(options)
    text = markdown(report)
    place = Path("reports", "runs", time.strftime("%Y%m%d-%H%M%S-ab"))
    write(place / "ab.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    write(place / "ab.md", text)
    sys.stdout.write(text)
    sys.stderr.write(f"wrote {place / 'ab.md'}\n")
    return exit_code(report)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Both revisions side by side: what they compute, what can be counted, and how long they take."""
    try:
        chosen = suite.load(options.suite)
    except (FileNotFoundError, ValueError) as error:
        refuse(f"--suite: {error}")
    work = [one for one in works(chosen) if options.k in one.name]
    if not work:
        refuse(f"-k {options.k}: expected part of one of {'; '.join(one.name for one in works(chosen))}")
    revisions = {side: resolve(ref) for side, ref in zip(SIDES, (options.base, options.head), strict=True)}
    check_dependencies(*revisions.values())
    torch.set_num_threads(chosen.threads)
    taken_on = machine.fingerprint(torch.device(options.device))
    gate = _gate(taken_on, options.deterministic)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fastdiff-ab-") as folder, worktrees(revisions, Path(folder)) as trees:
        bench = Bench(trees, Path(folder), document(chosen), options.device, options.seed)
        exact = _compare_exactly(bench, work)
        sound = [one for one in work if one.name not in exact["failed"] and exact["results"][one.name]["right"]]
        times, known = (
            ({}, None)
            if gate.why_no_times
            else _compare_times(bench, sound, chosen.max_pairs, options, gate.delta, exact["failed"])
        )
    return {
        "schema": schema.AB,
        **stamp(),
        "revisions": {side: revision._asdict() for side, revision in revisions.items()},
        "uncommitted": uncommitted(revisions["head"]),
        "settings": {
            "device": options.device, "seed": options.seed, "suite": options.suite, "looks": options.processes,
            "level": _level(options.processes), "delta": gate.delta, "grade": gate.grade,
        },
        "machine": taken_on,
        **exact,
        "canaries": known,
        "times": times,
        "why_no_times": gate.why_no_times,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def exit_code(report: Mapping[str, Any]) -> int:
    """3 where a result is wrong or a verdict INVALID, as all are where a canary is amiss; 1 where anything regressed, 4
    where a case failed, else 0: INCONCLUSIVE is no failure."""
    verdicts = {one["judgement"]["verdict"] for one in report["times"].values()}
    verdicts |= {change["verdict"] for change in report["changes"]}
    if "INVALID" in verdicts or not all(one["right"] for one in report["results"].values()):
        return 3
    if "REGRESSION" in verdicts:
        return 1
    return 4 if report["failed"] else 0


def _gate(taken_on: Mapping[str, Any], deterministic: bool) -> Gate:
    """What times of this machine are good for. A self-test that cannot be read is refused."""
    if deterministic:
        return Gate(DELTA, "", "not asked for (--deterministic)")
    try:
        known = selftest.recorded(taken_on)
    except ValueError as error:
        refuse(str(error))
    if known is None:
        return Gate(DELTA, "a machine without a grade: `selftest` finds out whether its times mean anything", "")
    grade = f"grade {known.grade}, by the self-test of {known.created}"
    if known.delta is None:
        return Gate(DELTA, grade, f"this machine is of {grade}: {known.meaning}")
    return Gate(known.delta, grade, "")


# The suite


def works(chosen: suite.Suite) -> Iterator[Work]:
    """Everything in a suite that is fastdiff's own."""
    for row in chosen.row:
        for mode in row.modes:
            yield Work(f"{row.name}, {mode}", "row", row.max_s or chosen.row_max_s)
    for image in chosen.image:
        for arm in image.arms:
            if arm.startswith("tensorized/"):
                yield Work(f"{image.name}, {arm}", "image", image.max_s)


def document(chosen: suite.Suite) -> dict[str, Any]:
    """The row and image cases as a TOML file has them, with nothing in it that an older revision need not know."""

    def written(case: Any) -> dict[str, Any]:
        values = {one.name: (getattr(case, one.name), one.default) for one in fields(case)}
        return {name: value for name, (value, default) in values.items() if value != default}

    cases = {"row": [written(case) for case in chosen.row], "image": [written(case) for case in chosen.image]}
    return {"threads": chosen.threads, "row_max_s": chosen.row_max_s, **cases}


# Results and counts


def _compare_exactly(bench: Bench, work: Sequence[Work]) -> dict[str, Any]:
    """Whether both compute the same, and the figures of both: one process of each side is enough."""
    figures: dict[str, dict[str, int]] = {side: {} for side in SIDES}
    results: dict[str, dict[str, Any]] = {}

    def measure(pair: Mapping[str, Process], one: Work) -> None:
        files = {side: [one.name, str(bench.folder / f"{side}.npy")] for side in SIDES}

        def results_now() -> dict[str, Any]:
            ask_both(pair, "outputs", files)
            return _parity(one, *(np.load(files[side][1]) for side in SIDES))

        first = results_now()
        counted = ask_both(pair, "figures", {side: [one.name] for side in SIDES})
        results[one.name] = results_now() if first["right"] else first  # as right after many requests as at first
        for side in SIDES:
            figures[side] |= {f"{name}: {one.name}": value for name, value in counted[side].items()}

    _say("results and counts")
    failed = in_turn(bench, SIDES, work, lambda pair: None, measure)
    changes = [asdict(change) for change in gates.compare(figures["head"], figures["base"])]
    return {"results": results, "figures": figures, "changes": changes, "failed": failed}


def _parity(work: Work, base: Any, head: Any) -> dict[str, Any]:
    tolerance = TOLERANCES[work.kind]
    if base.shape != head.shape:
        return {"right": False, "reason": f"expected the base's shape {base.shape}, got {head.shape}"}
    scale = np.abs(base).max() if work.kind == "row" else 1.0
    difference = float(np.abs(base - head).max() / scale)
    if difference <= tolerance:  # NaN is not
        return {"right": True, "reason": None}
    return {"right": False, "reason": f"differs from the base by {difference:.2g}, more than {tolerance:g}"}


# Times


def _compare_times(
    bench: Bench,
    work: Sequence[Work],
    block_pairs: int,
    options: argparse.Namespace,
    delta: float,
    failed: dict[str, str],
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Every case until it is decided, or after the last look; those that fail on the way go into `failed`.

    The level is split among the looks, so that looking early costs no false alarm. The canaries go along in every pair
    of processes and are judged at every look: one that is undecided then gets more pairs, as a case does.
    """
    order, nvml = np.random.default_rng(options.seed), machine.Nvml(torch.device(options.device))
    log_ratios: dict[str, list[float]] = {one.name: [] for one in (*CANARY_WORK, *work)}
    clocks: dict[str, Counter[str]] = {one.name: Counter() for one in work}
    canaries, undecided = list(CANARY_WORK), list(work)
    judged: dict[str, Judgement] = {}
    vouched: dict[str, Judgement] = {}
    canary_s = 0.0

    def judge(name: str) -> Judgement:
        return judge_processes(log_ratios[name], level=_level(options.processes), delta=delta)

    def settle(pair: Mapping[str, Process]) -> None:
        for process in pair.values():
            process.ask("settle", _core(number))

    def measure(pair: Mapping[str, Process], one: Work) -> None:
        nonlocal canary_s
        _say(f"process pair {number} of {options.processes[-1]} at most: {one.name}")
        started = time.perf_counter()
        log_ratios[one.name].append(_log_ratio(pair, one, block_pairs, order))
        if one.kind == "canary":
            canary_s += time.perf_counter() - started
        elif state := nvml.state():  # both sides have a context on the device, and neither is foreign
            clocks[one.name].update(replace(state, foreign_processes=None).flags)

    for number in range(1, options.processes[-1] + 1):
        sides = SIDES[:: 1 if number % 2 else -1]  # each is as often the first to start
        failed |= in_turn(bench, sides, [*canaries, *undecided], settle, measure)
        canaries, undecided = ([one for one in some if one.name not in failed] for some in (canaries, undecided))
        if number in options.processes:
            judged |= {one.name: judge(one.name) for one in undecided}
            undecided = [one for one in undecided if judged[one.name].verdict == "INCONCLUSIVE"]
            vouched = {one.name: judge(one.name) for one in CANARY_WORK}
        settled = not judged or all(one.verdict != "INCONCLUSIVE" for one in vouched.values())
        if not undecided and settled:
            break
    if not judged:
        return {}, None
    doubt = canary.doubt(vouched["a_a"], vouched["slower_10_percent"])
    times = {
        name: {"judgement": asdict(one), "log_ratios": log_ratios[name], "clocks": dict(clocks[name])}
        for name, one in judged.items()
    }
    known = {name: {"judgement": asdict(one), "log_ratios": log_ratios[name]} for name, one in vouched.items()}
    return _distrusted(times, doubt), {"doubt": doubt, "seconds": canary_s, **known}


def _level(looks: Sequence[int]) -> float:
    """That of one look's intervals."""
    return 1 - (1 - LEVEL) / len(looks)


def _distrusted(times: Mapping[str, Any], doubt: str) -> dict[str, Any]:
    """The times, none of which has a verdict but INVALID where a canary is amiss."""
    amiss = {"verdict": "INVALID", "reason": f"no time of this run is to be believed: {doubt}"} if doubt else {}
    return {name: {**one, "judgement": {**one["judgement"], **amiss}} for name, one in times.items()}


def _core(number: int) -> int | None:
    """The core that both sides of a process pair share: on two, they differ by what else runs there."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    cores = sorted(os.sched_getaffinity(0))
    return cores[number % len(cores)]


def _log_ratio(pair: Mapping[str, Process], work: Work, block_pairs: int, order: np.random.Generator) -> float:
    """One process pair's number: ln(head / base), the Hodges-Lehmann estimate of its blocks, which took turns.

    A canary's blocks take turns as a case's do, so that being the next in turn costs both sides of either the same.
    """
    block = _canary_block(pair, work) if work.kind == "canary" else _block(pair, work)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    started = time.perf_counter()
    for done in range(block_pairs):
        if done >= pairs_needed(LEVEL) and time.perf_counter() - started > work.max_s:
            break
        for index in order.permutation(len(SIDES)):
            side = SIDES[index]
            times[side].append(pair[side].ask(*block[side]))
    return math.log(ratio(times["head"], times["base"], LEVEL).value)


def _block(pair: Mapping[str, Process], work: Work) -> dict[str, tuple[Any, ...]]:
    """What to ask either side for: a block of a case, long enough for a clock."""
    warm_s = max(process.ask("block", work.name, 1) for process in pair.values())
    return dict.fromkeys(SIDES, ("block", work.name, max(1, math.ceil(BLOCK_S / warm_s))))


def _canary_block(pair: Mapping[str, Process], work: Work) -> dict[str, tuple[Any, ...]]:
    """The same of work that is none of the revisions', and on purpose a tenth more in the head of the slower canary."""
    warm_s = max(min(process.ask("canary", 10) for _ in range(2)) for process in pair.values())
    repeats = max(1, math.ceil(BLOCK_S / warm_s))
    return {side: ("canary", rows * repeats) for side, rows in canary.ROWS[work.name].items()}


def _say(what: str) -> None:
    sys.stderr.write(f"{what}\n")


# The page


def markdown(report: Mapping[str, Any]) -> str:
    """The report for a terminal and for a CI step summary: what is wrong first, what did not change last."""
    base, head = (f"{revision['ref']} ({revision['commit'][:10]})" for revision in report["revisions"].values())
    wrong = {name: one["reason"] for name, one in report["results"].items() if not one["right"]}
    lines = [
        f"# {_headline(report, wrong)}",
        "",
        f"{head} against {base}, on {machine.describe(report['machine'])}.",
        "",
    ]
    lines += [f"- INVALID: {name} {reason}" for name, reason in wrong.items()]
    known = report["canaries"]
    if known and known["doubt"]:
        lines += [f"- INVALID: no time of this run is to be believed: {known['doubt']}"]
    lines += [f"- not measured: {CANARIES.get(name, name)}: {why}" for name, why in report["failed"].items()]
    if report["uncommitted"]:
        lines += [f"- on neither side, because no commit has it: {', '.join(report['uncommitted'])}"]
    if report["changes"]:
        moved = [
            (change["name"], words.number(change["base"]), words.number(change["head"]), change["verdict"])
            for change in report["changes"]
        ]
        lines += ["", words.table(("figure", "base", "head", "verdict"), moved, words=(0, 3))]
    unchanged = len(report["figures"]["head"]) - sum(change["head"] is not None for change in report["changes"])
    lines += ["", f"{unchanged} counted figures are the same in both."]
    if report["times"]:
        lines += _times(report)
    elif report["why_no_times"]:
        lines += ["", f"No times: {report['why_no_times']}."]
    return "\n".join(lines) + "\n"


def _times(report: Mapping[str, Any]) -> Iterator[str]:
    """The table of times with its canaries, what a verdict means, and what makes a time doubtful."""
    known, settings = report["canaries"], report["settings"]
    header = ("time", "change", "interval", "slowdowns excluded", "process pairs", "verdict")
    rows = [_time_row(name, one["judgement"]) for name, one in report["times"].items()]
    rows += [_time_row(f"canary: {what}", known[name]["judgement"]) for name, what in CANARIES.items()]
    yield from ("", words.table(header, rows, words=(0, 2, 5)))
    delta = settings["delta"]
    yield from (
        "",
        f"REGRESSION: slower, the whole interval by more than {delta:.1%}. NO-CHANGE: the whole interval is within "
        f"{WIDTH * delta:.1%} either way, so that less than that may go unseen. Neither: INCONCLUSIVE. Intervals are "
        f"at {settings['level']:.1%}, {LEVEL:.0%} for all {len(settings['looks'])} looks together.",
        f"Those {delta:.1%} are of {settings['grade']}.",
        f"Canaries, whose outcome is known, took {known['seconds']:.0f} s, "
        f"{known['seconds'] / report['seconds']:.0%} of the run.",
    )
    for name, one in report["times"].items():
        held = ", ".join(f"{flag} in {count}" for flag, count in one["clocks"].items())
        if held:
            yield f"- {name}: clocks were held down, by process pairs: {held}"


def _headline(report: Mapping[str, Any], wrong: Mapping[str, str]) -> str:
    verdicts = Counter(change["verdict"] for change in report["changes"])
    verdicts.update(one["judgement"]["verdict"] for one in report["times"].values())
    verdicts["INVALID"] += len(wrong)
    named = [f"{verdicts[word]} {word}" for word in ("INVALID", "REGRESSION", "IMPROVEMENT") if verdicts[word]]
    named += [f"{len(report['failed'])} not measured"] if report["failed"] else []
    inconclusive = f", {verdicts['INCONCLUSIVE']} inconclusive" if verdicts["INCONCLUSIVE"] else ""
    same = len({revision["commit"] for revision in report["revisions"].values()}) == 1
    return ("A/A, one commit on both sides: " if same else "") + (", ".join(named) or "No change") + inconclusive


def _time_row(name: str, judgement: Mapping[str, Any]) -> tuple[str, ...]:
    pairs = str(judgement["pairs"])
    if judgement["change"] is None:
        return name, "", "", "", pairs, f"{judgement['verdict']}: {judgement['reason']}"
    interval = f"{judgement['low']:+.1%} to {judgement['high']:+.1%}"
    excluded = "" if judgement["verdict"] == "INVALID" else f"above {max(0.0, judgement['high']):.1%}"
    return name, f"{judgement['change']:+.1%}", interval, excluded, pairs, judgement["verdict"]
