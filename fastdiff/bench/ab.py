"""`python -m fastdiff.bench ab`: is one commit slower than another? Two worktrees, pairs of processes, one verdict."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from fastdiff.bench import canary, machine, selftest, suite
from fastdiff.bench.arguments import device, refuse
from fastdiff.bench.cells import IMAGE_TOLERANCE, ROW_TOLERANCE
from fastdiff.bench.stats import pairs_needed, ratio
from fastdiff.bench.verdict import DELTA, Judgement, judge_processes

SCHEMA = "fastdiff.ab/1"
LEVEL = 0.99  # for all looks together
LEAST_PROCESSES = 6
BLOCK_S = 0.02
CANARY_ROUNDS = 15  # of three blocks, in each pair of processes: a second beside ten or so of start and cases
MARGIN = 1.5  # times the slowdown that counts, which the machine's grade says: the width that counts as no change
TOLERANCES = {"row": ROW_TOLERANCE, "image": IMAGE_TOLERANCE}
SIDES = ("base", "head")
WORKER = Path(__file__).with_name("worker.py")


class Revision(NamedTuple):
    """One side of a comparison."""

    ref: str
    commit: str


class Work(NamedTuple):
    """A case in one mode, by the name that a worker knows it by."""

    name: str
    kind: str  # row or image
    max_s: float


class CannotMeasure(Exception):
    """What a worker could not do, and why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--base, --head and how much to measure."""
    parser.add_argument("--base", required=True, metavar="REF", help="the commit to compare with")
    parser.add_argument("--head", default="HEAD", metavar="REF", help="the commit in question (default: HEAD)")
    parser.add_argument("-k", default="", metavar="EXPR", help="only cases with this in their name")
    parser.add_argument(
        "--processes", type=looks, default=(6, 10, 16), metavar="N,N,..",
        help="process pairs after which to look (default: 6,10,16)",
    )  # fmt: skip
    parser.add_argument("--deterministic", action="store_true", help="results and counts alone, no times")
    parser.add_argument("--suite", default="ab", metavar="NAME", help="a suite of bench/, or a file (default: ab)")
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
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
    place.mkdir(parents=True, exist_ok=True)
    (place / "ab.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (place / "ab.md").write_text(text, encoding="utf-8")
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
    if options.head == "HEAD" and git("status", "--porcelain", "--untracked-files=no"):
        _say("what is not committed is on neither side")
    torch.set_num_threads(chosen.threads)
    taken_on = machine.fingerprint(torch.device(options.device))
    delta, why_no_times = _gate(taken_on["id"], options.deterministic)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fastdiff-ab-") as folder, worktrees(revisions, Path(folder)) as trees:
        bench = Bench(trees, Path(folder), document(chosen), options.device, options.seed)
        exact = _compare_exactly(bench, work)
        sound = [one for one in work if exact["results"].get(one.name, {}).get("right")]
        times, known = (
            ({}, None)
            if why_no_times
            else _compare_times(bench, sound, chosen.max_pairs, options, delta, exact["failed"])
        )
    return {
        "schema": SCHEMA,
        "created": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "command": ["python", "-m", "fastdiff.bench", *sys.argv[1:]],
        "revisions": {side: revision._asdict() for side, revision in revisions.items()},
        "settings": {"device": options.device, "seed": options.seed, "suite": options.suite, "delta": delta},
        "machine": taken_on,
        **exact,
        "canaries": known,
        "times": times,
        "why_no_times": why_no_times,
        "seconds": time.perf_counter() - started,
    }


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


def _gate(machine_id: str, deterministic: bool) -> tuple[float, str]:
    """The slowdown that counts, by the machine's grade; and why no times are taken, if they are not."""
    if deterministic:
        return DELTA, "not asked for (--deterministic)"
    known = selftest.recorded(machine_id)
    if known is None:
        _say("this machine has no grade: `selftest` finds out whether its times mean anything")
        return DELTA, ""
    if known["delta"] is None:
        return DELTA, f"this machine is of grade {known['grade']} ({known['created']}): {known['meaning']}"
    return known["delta"], ""


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


# Git


def git(*arguments: str) -> str:
    """What git prints; its own words and exit code 2 where it refuses."""
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        refuse(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def resolve(ref: str) -> Revision:
    """A ref and the commit that it names now."""
    asked = ["git", "rev-parse", "--quiet", "--verify", "--end-of-options", f"{ref}^{{commit}}"]
    commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    if not commit:
        refuse(f"expected a branch, tag or commit of this repository, got {ref!r}")
    return Revision(ref, commit)


def check_dependencies(base: Revision, head: Revision) -> None:
    """Both sides run on the packages that are installed: refuse revisions that ask for different ones."""
    for name, read in (("pyproject.toml", _dependencies), ("constraints.txt", str)):
        wanted = [read(git("show", f"{revision.commit}:{name}")) for revision in (base, head)]
        if wanted[0] != wanted[1]:
            refuse(
                f"{name}: {base.ref} and {head.ref} want different packages, and both would run on the installed ones; "
                f"make an environment for each and compare two runs instead: python -m fastdiff.bench compare"
            )


def _dependencies(text: str) -> Any:
    project = tomllib.loads(text)["project"]
    return project.get("dependencies"), project.get("optional-dependencies", {}).get("bench")


@contextmanager
def worktrees(revisions: Mapping[str, Revision], folder: Path) -> Iterator[dict[str, Path]]:
    """A checkout of each, gone again afterwards, whatever happens meanwhile."""
    trees = {side: folder / side for side in revisions}
    try:
        for side, revision in revisions.items():
            git("worktree", "add", "--quiet", "--detach", str(trees[side]), revision.commit)
        yield trees
    finally:
        for tree in trees.values():
            if tree.exists():
                git("worktree", "remove", "--force", str(tree))


# Processes


class Bench(NamedTuple):
    """What a pair of processes is started from."""

    trees: Mapping[str, Path]
    folder: Path
    suite: Mapping[str, Any]
    device: str
    seed: int

    @contextmanager
    def pair(self, sides: Sequence[str] = SIDES) -> Iterator[dict[str, Process]]:
        """One process of each side, alive together."""
        with ExitStack() as stack:
            pair = {side: stack.enter_context(Process(self, side)) for side in sides}
            for process in pair.values():
                process.start()
            yield pair


class Process:
    """One side, in a process of its own that runs `worker.py` on that side's worktree."""

    def __init__(self, bench: Bench, side: str) -> None:
        self.side = side
        self._tree, self._log = bench.trees[side].resolve(), bench.folder / f"{side}.log"
        self._task = {"suite": bench.suite, "device": bench.device, "seed": bench.seed}
        environment = {
            **os.environ,
            "PYTHONPATH": str(self._tree),
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": str(bench.suite["threads"]),
            "TORCHINDUCTOR_CACHE_DIR": str(bench.folder / f"inductor-{side}"),  # warm from the second pair on
        }
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)],  # -P: not its folder, which has a profile.py
                cwd=self._tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                start_new_session=True,  # Ctrl-C is for this process, which ends that one
            )  # fmt: skip
        self.tell("start", self._task)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # it holds nothing that it would have to save
        self._process.communicate()

    def start(self) -> None:
        """Wait until it is ready."""
        imported = Path(self.answer())
        if not imported.is_relative_to(self._tree):
            raise CannotMeasure(f"{self.side}: expected fastdiff from {self._tree}, got {imported}")

    def tell(self, name: str, *arguments: Any) -> None:
        """Ask for something, and do not wait for it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def answer(self) -> Any:
        """What it says to the oldest question."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        answer = json.loads(line)
        if "error" in answer:
            raise CannotMeasure(f"{self.side}: {answer['error']}")
        return answer["value"]

    def ask(self, name: str, *arguments: Any) -> Any:
        """Ask, and wait for the answer."""
        self.tell(name, *arguments)
        return self.answer()

    def _death(self) -> CannotMeasure:
        last = (self._log.read_text(errors="replace").strip().splitlines() or ["it left no message"])[-1]
        return CannotMeasure(f"{self.side}: the process ended: {last}")


def _of_both(pair: Mapping[str, Process], name: str, arguments: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """One question to both at once: for what no clock measures."""
    for side, process in pair.items():
        process.tell(name, *arguments[side])
    answers, failures = {}, []
    for side, process in pair.items():
        try:
            answers[side] = process.answer()
        except CannotMeasure as error:
            failures.append(str(error))
    if failures:
        raise CannotMeasure("; ".join(failures))
    return answers


# Results and counts


def _compare_exactly(bench: Bench, work: Sequence[Work]) -> dict[str, Any]:
    """Whether both compute the same, and the figures of both: one process of each side is enough."""
    from fastdiff.bench import gates

    figures: dict[str, dict[str, int]] = {side: {} for side in SIDES}
    results, failed = {}, {}
    _say("results and counts")
    try:
        with bench.pair() as pair:
            for one in work:
                try:
                    files = {side: [one.name, str(bench.folder / f"{side}.npy")] for side in SIDES}
                    _of_both(pair, "outputs", files)
                    results[one.name] = _parity(one, *(np.load(files[side][1]) for side in SIDES))
                    counted = _of_both(pair, "figures", {side: [one.name] for side in SIDES})
                except CannotMeasure as error:
                    failed[one.name] = str(error)
                    continue
                for side in SIDES:
                    figures[side] |= {f"{name}: {one.name}": value for name, value in counted[side].items()}
    except CannotMeasure as error:
        failed = {one.name: str(error) for one in work}
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
    of processes; there are none where too few pairs were made to judge anything.
    """
    level = 1 - (1 - LEVEL) / len(options.processes)
    order = np.random.default_rng(options.seed)
    log_ratios: dict[str, list[float]] = {one.name: [] for one in work}
    canaries: dict[str, list[float]] = {name: [] for name in canary.PROCESSES}
    canary_s = 0.0
    judged: dict[str, Judgement] = {}
    undecided = list(work)
    for number in range(1, options.processes[-1] + 1):
        if not undecided:
            break
        try:
            with bench.pair(SIDES[:: 1 if number % 2 else -1]) as pair:  # each is as often the first to start
                for process in pair.values():
                    process.ask("settle", _core(number))
                started = time.perf_counter()
                for name, log_ratio in _canary_log_ratios(pair, order).items():
                    canaries[name].append(log_ratio)
                canary_s += time.perf_counter() - started
                for one in undecided:
                    _say(f"process pair {number} of {options.processes[-1]} at most: {one.name}")
                    log_ratios[one.name].append(_log_ratio(pair, one, block_pairs, order))
        except CannotMeasure as error:
            failed.update({one.name: str(error) for one in undecided})
            break
        if number in options.processes:
            for one in undecided:
                judged[one.name] = judge_processes(
                    log_ratios[one.name], level=level, delta=delta, margin=MARGIN * delta
                )
            undecided = [one for one in undecided if judged[one.name].verdict == "INCONCLUSIVE"]
    times = {
        name: {"judgement": asdict(judgement), "log_ratios": log_ratios[name]} for name, judgement in judged.items()
    }
    if not judged:
        return times, None
    known = canary.judged_processes(canaries, delta=delta, margin=MARGIN * delta)
    return _distrusted(times, known["doubt"]), {**known, "seconds": canary_s}


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
    """One process pair's number: ln(head / base), the Hodges-Lehmann estimate of its blocks, which took turns."""
    warm_s = max(process.ask("block", work.name, 1) for process in pair.values())
    repeats = max(1, math.ceil(BLOCK_S / warm_s))
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    started = time.perf_counter()
    for done in range(block_pairs):
        if done >= pairs_needed(LEVEL) and time.perf_counter() - started > work.max_s:
            break
        for index in order.permutation(len(SIDES)):
            times[SIDES[index]].append(pair[SIDES[index]].ask("block", work.name, repeats))
    return math.log(ratio(times["head"], times["base"], LEVEL).value)


def _canary_log_ratios(pair: Mapping[str, Process], order: np.random.Generator) -> dict[str, float]:
    """One process pair's number for each canary: work that is none of the revisions', clocked as theirs is."""
    warm_s = max(min(process.ask("canary", 10) for _ in range(2)) for process in pair.values())
    tens = max(1, math.ceil(BLOCK_S / warm_s))
    arms = {"base": ("base", 10 * tens), "a_a": ("head", 10 * tens), "slower_10_percent": ("head", 11 * tens)}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(CANARY_ROUNDS):
        for name in order.permutation(list(arms)):
            side, rows = arms[name]
            times[name].append(pair[side].ask("canary", rows))
    return {name: math.log(ratio(times[name], times["base"], LEVEL).value) for name in canary.PROCESSES}


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
    lines += [f"- not measured: {name}: {reason}" for name, reason in report["failed"].items()]
    if report["changes"]:
        lines += ["", "| figure | base | head | verdict |", "| --- | ---: | ---: | --- |"]
        lines += [
            f"| {change['name']} | {_number(change['base'])} | {_number(change['head'])} | {change['verdict']} |"
            for change in report["changes"]
        ]
    unchanged = len(report["figures"]["head"]) - sum(change["head"] is not None for change in report["changes"])
    lines += ["", f"{unchanged} counted figures are the same in both."]
    if report["times"]:
        lines += ["", "| time | change | interval | process pairs | verdict |", "| --- | ---: | --- | ---: | --- |"]
        lines += [_time_line(name, one["judgement"]) for name, one in report["times"].items()]
        if known:
            lines += [
                _time_line(f"canary: {what}", known[name]["judgement"]) for name, what in canary.PROCESSES.items()
            ]
        lines += ["", f"A slowdown counts from {report['settings']['delta']:.0%}."]
        if known:
            share = known["seconds"] / report["seconds"]
            lines += [f"Canaries, whose outcome is known, took {known['seconds']:.0f} s, {share:.0%} of the run."]
    elif report["why_no_times"]:
        lines += ["", f"No times: {report['why_no_times']}."]
    return "\n".join(lines) + "\n"


def _headline(report: Mapping[str, Any], wrong: Mapping[str, str]) -> str:
    verdicts = Counter(change["verdict"] for change in report["changes"])
    verdicts.update(one["judgement"]["verdict"] for one in report["times"].values())
    verdicts["INVALID"] += len(wrong)
    named = [f"{verdicts[word]} {word}" for word in ("INVALID", "REGRESSION", "IMPROVEMENT") if verdicts[word]]
    named += [f"{len(report['failed'])} not measured"] if report["failed"] else []
    inconclusive = f", {verdicts['INCONCLUSIVE']} inconclusive" if verdicts["INCONCLUSIVE"] else ""
    return (", ".join(named) or "No change") + inconclusive


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _time_line(name: str, judgement: Mapping[str, Any]) -> str:
    if judgement["change"] is None:
        return f"| {name} | | | {judgement['pairs']} | {judgement['verdict']}: {judgement['reason']} |"
    return (
        f"| {name} | {judgement['change']:+.1%} | {judgement['low']:+.1%} to {judgement['high']:+.1%} "
        f"| {judgement['pairs']} | {judgement['verdict']} |"
    )
