"""`python -m fastdiff.bench selftest`: whether times mean anything on this machine, found out with real work."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.special import bdtr

from fastdiff.bench.arguments import pipeline, shared
from fastdiff.bench.arms import Workbench
from fastdiff.bench.files import write
from fastdiff.bench.journal import stamp
from fastdiff.bench.machine import Nvml, describe, fingerprint, lasting
from fastdiff.bench.measure import StopRule, interleave
from fastdiff.bench.rows import RowBench
from fastdiff.bench.suite import RowCase
from fastdiff.bench.verdict import DELTA, WIDTH, Judgement, judge, judged_at
from fastdiff.bench.words import table

SCHEMA = "fastdiff.selftest/1"
LATEST = Path("reports", "runs", "selftest")  # by machine, as below
SAVED = Path("reports", "selftest")
WHOLE, SHORT = "selftest", "quick"  # the files' names: a short one is never in the place of a whole one
FULL = {"a_a": 40, "slower": 20}
QUICK = {"a_a": 10, "slower": 5}
ONE_IN = {"a_a": 40, "slower": 20}  # trials may go wrong: one flagged, one missed
PLAUSIBLE = 0.95  # of all instruments that go wrong just so often pass a short test
ROWS = {"a_a": 40, "slower": 42}  # of the second arm; the first always makes 40, some 5 ms
MAX_PAIRS = 400
HALF_WIDTH = 0.0075
TRIAL_S = 6.0  # of sampling, at the most: sixty trials are six minutes
SAMPLERS = (
    "Euler", "EulerAncestral", "DPMSolverMultistep", "UniPCMultistep", "DDIM", "Heun", "FlowMatchEuler",
    "DEISMultistep",
)  # fmt: skip

Letter = Literal["A", "B", "C"]


@dataclass(frozen=True)
class Grade:
    """What times on a machine are good for."""

    letter: Letter
    phi_at_most: float
    gates: bool  # else they are for information

    def delta(self, phi: float | None) -> float | None:
        """The slowdown that gates: what counts anywhere, and half as much again as the same code differs by."""
        return max(DELTA, WIDTH * phi) if self.gates and phi is not None else None

    @property
    def most(self) -> float | None:
        """The largest slowdown that gates on such a machine."""
        return self.delta(self.phi_at_most)


GRADES = (Grade("A", 0.007, True), Grade("B", 0.015, True), Grade("C", float("inf"), False))
FAILED = "the instrument failed its own test: no time of this machine counts"
INFORMS = "times are for information only; deterministic figures gate"


def grade_of(phi: float | None) -> Grade:
    """The grade for an A/A floor; the last for one that could not be measured."""
    return next((grade for grade in GRADES if phi is not None and phi <= grade.phi_at_most), GRADES[-1])


@dataclass(frozen=True)
class Known:
    """What an earlier self-test found out about a machine."""

    machine: Mapping[str, Any]
    created: str
    grade: Letter
    delta: float | None
    meaning: str


def recorded(machine: Mapping[str, Any]) -> Known | None:
    """The last whole self-test of a machine, else the one that was saved, else the last short one, from the working
    directory's reports/; None where there is none. ValueError for a file that no self-test wrote."""
    for folder, name in ((LATEST, WHOLE), (SAVED, WHOLE), (LATEST, SHORT)):
        known = [read(path) for path in sorted(folder.glob(f"*/{name}.json"))]
        known = [one for one in known if lasting(one.machine) == lasting(machine)]
        if known:
            return max(known, key=lambda one: one.created)
    return None


def read(path: Path) -> Known:
    """What a self-test wrote. ValueError for anything else."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        known = Known(**{field.name: report[field.name] for field in fields(Known)})
        (grade,) = (one for one in GRADES if one.letter == known.grade)
        sound = (
            report["schema"] == SCHEMA
            and (known.delta is None or (grade.most is not None and DELTA <= known.delta <= grade.most))
            and isinstance(known.created, str)
            and isinstance(known.meaning, str)
            and bool(lasting(known.machine))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise ValueError(f"{path}: expected what `selftest` writes, got something else; remove it, or make it anew")
    return known


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--quick, --device, --seed and --save."""
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="a quarter of the trials: for a machine not yet known")
    length.add_argument("--save", action="store_true", help=f"write {SAVED}/MACHINE/ as well")
    shared(parser, "--device")
    parser.add_argument("--seed", type=int, default=0, help="of latents, noise and the order of trials and arms")


def main(options: argparse.Namespace) -> int:
    """Measure, print, write what `ab` goes by; 0, or 3 where the instrument failed its own test."""
    report = measure(options.device, QUICK if options.quick else FULL, options.seed)
    text = markdown(report)
    name = SHORT if options.quick else WHOLE
    for folder in (LATEST, SAVED) if options.save else (LATEST,):
        place = folder / report["machine"]["id"]
        write(place / f"{name}.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
        write(place / f"{name}.md", text)
        sys.stderr.write(f"wrote {place / name}.md\n")
    sys.stdout.write(text)
    return 0 if report["passed"] else 3


def measure(device: str, trials: Mapping[str, int], seed: int) -> dict[str, Any]:
    """So many trials of each kind in random order, so that a drift of the machine meets both; and what they say."""
    checks = dict(_before())
    torch.set_num_threads(1)
    pipe, _ = pipeline(None, device)
    bench = Workbench(pipe)
    kinds = [kind for kind, count in trials.items() for _ in range(count)]
    np.random.default_rng(seed).shuffle(kinds)
    judged: dict[str, list[Judgement]] = {kind: [] for kind in trials}
    flags: Counter[str] = Counter()
    started = time.perf_counter()
    for number, kind in enumerate(kinds):
        judged[kind].append(_trial(bench, kind, seed + number, flags))
        sys.stderr.write(f"{number + 1} of {len(kinds)} trials\r")
    return {
        "schema": SCHEMA,
        **stamp(),
        "machine": fingerprint(bench.device),
        "checks": checks | dict(_after(bench.device, flags)),
        "seconds": time.perf_counter() - started,
        **assess(judged["a_a"], judged["slower"]),
    }


def _trial(bench: Workbench, kind: str, seed: int, flags: Counter[str]) -> Judgement:
    """Two arms built apart, so that what differs between two builds of the same code counts as noise, as it should.

    `flags` counts blocks with something that makes a GPU's times doubtful.
    """
    blocks = {}
    for name, rows in (("base", ROWS["a_a"]), ("head", ROWS[kind])):
        case = RowCase(name=name, samplers=SAMPLERS, latent_shape=(4, 8, 8), steps=rows, modes=("eager",))
        blocks[name], _ = RowBench(bench, seed).table_block(case, "eager")
    rule = StopRule(level=0.99, half_width=HALF_WIDTH, max_pairs=MAX_PAIRS, max_s=TRIAL_S)
    samples = interleave(blocks, [("base", "head")], rule, seed)
    flags.update(flag for arm in samples.values() for sample in arm if sample.gpu for flag in sample.gpu.flags)
    base, head = ([sample.total_s for sample in samples[name]] for name in ("base", "head"))
    return judge(base, head)


def assess(a_a: Sequence[Judgement], slower: Sequence[Judgement]) -> dict[str, Any]:
    """The floor phi, the grade, and whether the instrument, judging as that grade has it judge, flags what it should
    and nothing else. Pure.

    phi: the 95th percentile of |change| between two arms of the same code. On grade C nothing needs to be found.
    """
    changes = [abs(one.change) for one in a_a if one.change is not None]
    phi = float(np.percentile(changes, 95)) if changes else None
    grade = grade_of(phi)
    delta = grade.delta(phi)
    counts = delta or DELTA
    a_a, slower = ([judged_at(one, counts) for one in trials] for trials in (a_a, slower))
    flagged = sum(one.verdict not in ("NO-CHANGE", "INCONCLUSIVE") for one in a_a)
    found = sum(one.verdict == "REGRESSION" for one in slower)
    wrong = sum(one.verdict in ("IMPROVEMENT", "INVALID") for one in slower)
    honest = flagged <= may_go_wrong("a_a", len(a_a)) and not wrong
    passed = honest and (delta is None or len(slower) - found <= may_go_wrong("slower", len(slower)))
    return {
        "phi": phi,
        "grade": grade.letter,
        "delta": delta if passed else None,
        "meaning": FAILED if not passed else f"times gate at {delta:.1%}" if delta else INFORMS,
        "judged_at": counts,
        "flagged": flagged,
        "found": found,
        "wrong": wrong,
        "passed": passed,
        "trials": {"a_a": [asdict(one) for one in a_a], "slower": [asdict(one) for one in slower]},
    }


def may_go_wrong(kind: str, trials: int) -> int:
    """How many of so many trials: one in 40 flagged and one in 20 missed in a whole test. A short one fails only where
    it is not plausible that a whole one would pass: of five, one may be missed."""
    one_in = ONE_IN[kind]
    if trials >= one_in:
        return trials // one_in
    return next(wrong for wrong in range(trials + 1) if bdtr(wrong, trials, 1 / one_in) >= PLAUSIBLE)


def _before() -> Iterator[tuple[str, str]]:
    """What of a machine moves its times, as far as it tells; nothing is changed."""
    files = Path("/sys/devices/system/cpu").glob("cpu*/cpufreq/scaling_governor")
    governors = {file.read_text().strip() for file in files}
    yield "CPU governor", ", ".join(sorted(governors)) or "not told by this machine"
    if hasattr(os, "getloadavg"):
        loads = ", ".join(f"{load:.2f}" for load in os.getloadavg())
        yield "load average before the trials (1, 5, 15 min): what else runs here", loads


def _after(device: torch.device, flags: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The same of a GPU, warm from the trials."""
    if device.type != "cuda":
        return
    nvml = Nvml(device)
    state = nvml.state()
    if state is None:
        yield "GPU", f"not told: {nvml.reason}"
        return
    told = {
        "SM clock, MHz": state.sm_mhz,
        "GPU temperature, C": state.temperature_c,
        "GPU clocks held down by": None if state.throttles is None else ", ".join(state.throttles) or "nothing",
        "foreign processes on the GPU": state.foreign_processes,
    }
    yield from ((name, "not told" if value is None else str(value)) for name, value in told.items())
    counted = ", ".join(f"{count} {flag}" for flag, count in flags.items())
    yield "blocks with doubtful GPU times", counted or "none"


def markdown(report: Mapping[str, Any]) -> str:
    """The self-test on half a page."""
    trials = report["trials"]
    may_flag = may_go_wrong("a_a", len(trials["a_a"]))
    must_find = len(trials["slower"]) - may_go_wrong("slower", len(trials["slower"]))
    phi = "not measured" if report["phi"] is None else f"{report['phi']:.2%}"
    header = ("trials", "number", "expected", "verdicts", "change, smallest to largest")
    rows = [
        _row("the same work (A/A)", f"at most {may_flag} flagged", trials["a_a"]),
        _row("5 % more work", f"at least {must_find} REGRESSION; on grade C no IMPROVEMENT", trials["slower"]),
    ]
    lines = [
        f"# Self-test: grade {report['grade']}, {'passed' if report['passed'] else 'FAILED'}",
        "",
        f"{report['created']}, {describe(report['machine'])}.",
        f"Two arms of the same code differ by phi = {phi} (95th percentile): {report['meaning']}.",
        "",
        f"The instrument itself, judging where a slowdown counts from {report['judged_at']:.1%}:",
        "",
        table(header, rows, words=(0, 2, 3, 4)),
        "",
        *(f"- {name}: {value}" for name, value in report["checks"].items()),
        f"- trials took {report['seconds']:.0f} s",
    ]
    return "\n".join(lines) + "\n"


def _row(what: str, expected: str, trials: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    verdicts = Counter(trial["verdict"] for trial in trials)
    changes = sorted(trial["change"] for trial in trials if trial["change"] is not None)
    span = f"{changes[0]:+.2%} to {changes[-1]:+.2%}" if changes else ""
    tally = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    return what, str(len(trials)), expected, tally, span
