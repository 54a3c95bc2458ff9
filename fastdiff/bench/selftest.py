"""`python -m fastdiff.bench selftest`: whether times mean anything on this machine, found out with real work."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastdiff.bench.arguments import device, pipeline
from fastdiff.bench.verdict import Judgement, judge

SCHEMA = "fastdiff.selftest/1"
LATEST = Path("reports", "runs", "selftest")  # by machine, as below
SAVED = Path("reports", "selftest")
FULL = {"a_a": 40, "slower": 20}
QUICK = {"a_a": 10, "slower": 5}
ROWS = {"a_a": 40, "slower": 42}  # of the second arm; the first always makes 40, some 5 ms
TRIAL_S = 3.0  # of sampling, at the most: sixty trials are three minutes
FLAGGED_AT_MOST = 1 / 40
FOUND_AT_LEAST = 19 / 20
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
    delta: float | None  # the slowdown that gates; None where times are for information
    meaning: str


GRADES = (
    Grade("A", 0.007, 0.02, "times gate at 2 %"),
    Grade("B", 0.015, 0.03, "times gate at 3 %"),
    Grade("C", float("inf"), None, "times are for information only; deterministic figures gate"),
)


def grade_of(phi: float | None) -> Grade:
    """The grade for an A/A floor; the last for one that could not be measured."""
    return next((grade for grade in GRADES if phi is not None and phi <= grade.phi_at_most), GRADES[-1])


def recorded(machine_id: str) -> dict[str, Any] | None:
    """The last self-test on a machine, or the one that was saved, from the working directory's reports/; else None."""
    for folder in (LATEST, SAVED):
        path = folder / machine_id / "selftest.json"
        if path.is_file():
            report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return report
    return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--quick, --device, --seed and --save."""
    parser.add_argument("--quick", action="store_true", help="a quarter of the trials, within a minute")
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of latents, noise and the order of trials and arms")
    parser.add_argument("--save", action="store_true", help=f"write {SAVED}/MACHINE/ as well")


def main(options: argparse.Namespace) -> int:
    """Measure, print, write what `ab` goes by; 0, or 3 where the instrument failed its own test."""
    report = measure(options.device, QUICK if options.quick else FULL, options.seed)
    text = markdown(report)
    for folder in (LATEST, SAVED) if options.save else (LATEST,):
        place = folder / report["machine"]["id"]
        place.mkdir(parents=True, exist_ok=True)
        (place / "selftest.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (place / "selftest.md").write_text(text, encoding="utf-8")
        sys.stderr.write(f"wrote {place / 'selftest.md'}\n")
    sys.stdout.write(text)
    return 0 if report["passed"] else 3


def measure(device: str, trials: Mapping[str, int], seed: int) -> dict[str, Any]:
    """So many trials of each kind in random order, so that a drift of the machine meets both; and what they say."""
    import torch

    from fastdiff.bench import machine
    from fastdiff.bench.arms import Workbench

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
        "created": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "command": ["python", "-m", "fastdiff.bench", *sys.argv[1:]],
        "machine": machine.fingerprint(bench.device),
        "checks": checks | dict(_after(bench.device, flags)),
        "seconds": time.perf_counter() - started,
        "trials": {kind: [asdict(one) for one in judgements] for kind, judgements in judged.items()},
        **assess(judged["a_a"], judged["slower"]),
    }


def _trial(bench: Any, kind: str, seed: int, flags: Counter[str]) -> Judgement:
    """Two arms built apart, so that what differs between two builds of the same code counts as noise, as it should.

    `flags` counts blocks with something that makes a GPU's times doubtful.
    """
    from fastdiff.bench.measure import StopRule, interleave
    from fastdiff.bench.rows import RowBench
    from fastdiff.bench.suite import RowCase

    blocks = {}
    for name, rows in (("base", ROWS["a_a"]), ("head", ROWS[kind])):
        case = RowCase(name=name, samplers=SAMPLERS, latent_shape=(4, 8, 8), steps=rows, modes=("eager",))
        blocks[name], _ = RowBench(bench, seed).table_block(case, "eager")
    rule = StopRule(level=0.99, half_width=0.01, max_pairs=200, max_s=TRIAL_S)
    samples = interleave(blocks, [("base", "head")], rule, seed)
    flags.update(flag for arm in samples.values() for sample in arm if sample.gpu for flag in sample.gpu.flags)
    base, head = ([sample.total_s for sample in samples[name]] for name in ("base", "head"))
    return judge(base, head)


def assess(a_a: Sequence[Judgement], slower: Sequence[Judgement]) -> dict[str, Any]:
    """The floor phi, the grade, and whether the instrument flags what it should and nothing else. Pure.

    phi: the 95th percentile of |change| between two arms of the same code. The bounds are those of 40 and 20 trials,
    1 flagged and 19 found, in proportion. On grade C nothing needs to be found.
    """
    changes = [abs(one.change) for one in a_a if one.change is not None]
    phi = float(np.percentile(changes, 95)) if changes else None
    grade = grade_of(phi)
    flagged = sum(one.verdict not in ("NO-CHANGE", "INCONCLUSIVE") for one in a_a)
    found = sum(one.verdict == "REGRESSION" for one in slower)
    wrong = sum(one.verdict in ("IMPROVEMENT", "INVALID") for one in slower)
    honest = flagged <= FLAGGED_AT_MOST * len(a_a) and not wrong
    passed = honest and (grade.delta is None or found >= FOUND_AT_LEAST * len(slower))
    return {
        "phi": phi,
        "grade": grade.letter,
        "delta": grade.delta if passed else None,
        "meaning": grade.meaning if passed else "the instrument failed its own test: no time of this machine counts",
        "flagged": flagged,
        "found": found,
        "wrong": wrong,
        "passed": passed,
    }


def _before() -> Iterator[tuple[str, str]]:
    """What of a machine moves its times, as far as it tells; nothing is changed."""
    files = Path("/sys/devices/system/cpu").glob("cpu*/cpufreq/scaling_governor")
    governors = {file.read_text().strip() for file in files}
    yield "CPU governor", ", ".join(sorted(governors)) or "not told by this machine"
    if hasattr(os, "getloadavg"):
        loads = ", ".join(f"{load:.2f}" for load in os.getloadavg())
        yield "load average before the trials (1, 5, 15 min): what else runs here", loads


def _after(device: Any, flags: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """The same of a GPU, warm from the trials."""
    from fastdiff.bench.machine import Nvml

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
    from fastdiff.bench import machine

    trials = report["trials"]
    phi = "not measured" if report["phi"] is None else f"{report['phi']:.2%}"
    lines = [
        f"# Self-test: grade {report['grade']}, {'passed' if report['passed'] else 'FAILED'}",
        "",
        f"{report['created']}, {machine.describe(report['machine'])}.",
        f"Two arms of the same code differ by phi = {phi} (95th percentile): {report['meaning']}.",
        "",
        "| trials | number | expected | verdicts | change, smallest to largest |",
        "| --- | ---: | --- | --- | --- |",
        _line("the same work (A/A)", "at most 1 of 40 flagged", trials["a_a"]),
        _line("5 % more work", "at least 19 of 20 REGRESSION; on grade C no IMPROVEMENT", trials["slower"]),
        "",
        *(f"- {name}: {value}" for name, value in report["checks"].items()),
        f"- trials took {report['seconds']:.0f} s",
    ]
    return "\n".join(lines) + "\n"


def _line(what: str, expected: str, trials: Sequence[Mapping[str, Any]]) -> str:
    verdicts = Counter(trial["verdict"] for trial in trials)
    changes = sorted(trial["change"] for trial in trials if trial["change"] is not None)
    span = f"{changes[0]:+.2%} to {changes[-1]:+.2%}" if changes else ""
    tally = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    return f"| {what} | {len(trials)} | {expected} | {tally} | {span} |"
