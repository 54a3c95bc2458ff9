"""Changes planted in a copy of this repository: `ab` names them, by counts and results alone; and leaves nothing."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.bench import ab, machine, sides, suite, worker
from fastdiff.bench.__main__ import main
from fastdiff.bench.outcome import CANARIES
from fastdiff.bench.verdict import DELTA

ROOT = Path(fastdiff.__file__).parents[1]
HOT, IMAGE = "mixed, hot, eager", "digits, batch 1, tensorized/eager"

STEP = """
_step = denoise_step

def denoise_step(denoiser, batch, *update):
    {}
"""
LEAK = """
_kept, _decode = [], decode

def decode(family, state):
    _kept.append(state.sample.clone())
    return _decode(family, state)
"""
PLANTED = {
    "comment": {"fastdiff/step.py": "# no change\n"},
    "slower": {
        "fastdiff/step.py": STEP.format("_step(denoiser, batch, *update); batch.end.add_(0); batch.row[0].item()"),
        "fastdiff/stages.py": LEAK,
    },
    "wrong": {"fastdiff/step.py": STEP.format("_step(lambda *given: denoiser(*given) * 1.01, batch, *update)")},
    "broken": {"fastdiff/bench/rows.py": "raise RuntimeError('planted')\n"},
    "one-broken": {"fastdiff/bench/arms.py": "\n\ndef requests_of(*given):\n    raise RuntimeError('planted')\n"},
    "pin": {"constraints.txt": "more==1.0\n"},
}
"""By branch: files, and what is appended to each."""


def git(repository: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", *identity, *arguments], cwd=repository, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the working tree has, committed on `base`, and a branch for each planted change."""
    place = tmp_path_factory.mktemp("ab") / "repository"
    shutil.copytree(ROOT / "fastdiff", place / "fastdiff", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, place)
    git(place, "init", "--quiet", "--initial-branch=base")
    git(place, "add", ".")
    git(place, "commit", "--quiet", "--message=base")
    for branch, files in PLANTED.items():
        git(place, "checkout", "--quiet", "-b", branch, "base")
        for name, text in files.items():
            with (place / name).open("a") as file:
                file.write(text)
        git(place, "commit", "--quiet", "--all", f"--message={branch}")
    git(place, "checkout", "--quiet", "-b", "dependency", "base")
    project = place / "pyproject.toml"
    project.write_text(project.read_text().replace('"torch>=', '"torch!=2.12,>='))
    git(place, "commit", "--quiet", "--all", "--message=dependency")
    git(place, "checkout", "--quiet", "base")
    return place


@pytest.fixture
def compare(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str, dict[str, Any]]]:
    """Runs `ab` against the planted branch: its exit code, its page and its report. Nothing of it stays."""

    def run(branch: str, cases: str) -> tuple[int, str, dict[str, Any]]:
        monkeypatch.chdir(repository)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        code = main(["ab", "--base", "base", "--head", branch, "--deterministic", "-k", cases])
        assert_clean(repository, tmp_path)
        (written,) = repository.glob("reports/runs/*-ab/ab.json")
        report = json.loads(written.read_text())
        shutil.rmtree(repository / "reports")
        return code, capsys.readouterr().out, report

    return run


def assert_clean(repository: Path, temporary: Path) -> None:
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert list(temporary.iterdir()) == []


def changed(report: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {change["name"]: (change["base"], change["head"]) for change in report["changes"]}


def test_a_comment_changes_nothing(compare: Any) -> None:
    code, page, report = compare("comment", "")
    assert code == 0
    assert report["changes"] == []
    assert report["failed"] == {}
    assert (report["times"], report["canaries"]) == ({}, None)
    assert len(report["results"]) == 3
    assert all(one["right"] for one in report["results"].values())
    assert page.startswith("# No change\n")
    assert f"{len(report['figures']['base'])} counted figures are the same in both" in page
    assert report["uncommitted"] == []  # of what is checked out, which is not the head


def test_a_host_sync_an_operation_and_a_leak_are_named(compare: Any) -> None:
    code, page, report = compare("slower", "")
    figures, passes = report["figures"]["base"], f"{worker.PASSES} requests: {IMAGE}"
    bytes_left = worker.PASSES * 4 * torch.Size(suite.load("ab").row[0].latent_shape).numel()
    ops = figures[f"ops per row: {HOT}"]
    assert code == 1
    assert changed(report)[f"host syncs per row: {HOT}"] == (0, 1)
    assert changed(report)[f"ops per row: {HOT}"] == (ops, ops + 1)
    assert changed(report)[f"tensors left by {passes}"] == (0, worker.PASSES)
    assert changed(report)[f"bytes left by {passes}"] == (0, bytes_left)
    assert f"state bytes: {HOT}" in figures.keys() - changed(report).keys()
    assert f"| host syncs per row: {HOT} | 0 | 1 | REGRESSION |" in page
    assert page.startswith(f"# {len(report['changes'])} REGRESSION\n")


def test_a_wrong_result_is_invalid_whatever_else_changed(compare: Any) -> None:
    code, page, report = compare("wrong", HOT)
    assert code == 3
    assert changed(report)[f"ops per row: {HOT}"]
    assert f"- INVALID: {HOT} differs from the base by " in page


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        ([1.0, 2.0 + 1e-4], None),
        ([1.0, 2.0 + 3e-4], "differs from the base by 0.00015, more than 0.0001"),
        ([1.0, math.nan], "differs from the base by nan, more than 0.0001"),
        ([1.0], "expected the base's shape (2,), got (1,)"),
    ],
)
def test_parity(head: list[float], reason: str | None) -> None:
    work = sides.Work(HOT, "row", max_s=1.0)
    assert ab._parity(work, np.array([1.0, 2.0]), np.array(head)) == {"right": reason is None, "reason": reason}


def test_a_revision_that_cannot_run_is_said(compare: Any) -> None:
    code, page, report = compare("broken", HOT)
    assert code == 4
    assert report["failed"] == {HOT: "head: the process ended: RuntimeError: planted"}
    assert f"- not measured: {HOT}: head: the process ended: RuntimeError: planted" in page


def test_a_case_that_a_revision_cannot_make_fails_alone(compare: Any) -> None:
    code, _, report = compare("one-broken", "")
    assert code == 4
    assert len(report["failed"]) == 2
    assert set(report["failed"].values()) == {"head: RuntimeError: planted"}
    assert list(report["results"]) == [HOT]
    assert report["results"][HOT]["right"]
    assert f"ops per row: {HOT}" in report["figures"]["head"]


def test_what_no_commit_has_is_named(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    head = sides.resolve("HEAD")
    assert sides.uncommitted(head) == []
    step = repository / "fastdiff" / "step.py"
    text = step.read_text()
    try:
        step.write_text(f"{text}# not committed\n")
        assert sides.uncommitted(head) == ["fastdiff/step.py"]
        assert sides.uncommitted(sides.resolve("wrong")) == []
    finally:
        step.write_text(text)


def test_ctrl_c_leaves_nothing_behind(repository: Path, tmp_path: Path) -> None:
    running = subprocess.Popen(
        [sys.executable, "-P", "-m", "fastdiff.bench", "ab", "--base", "base", "--deterministic"],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )
    try:
        waiting = time.monotonic() + 120
        while not list(tmp_path.glob("fastdiff-ab-*/head.log")):  # both processes are started
            assert running.poll() is None
            assert time.monotonic() < waiting
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=60) == -signal.SIGINT
    finally:
        running.kill()
    assert_clean(repository, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--base", "nothing"), "expected a branch, tag or commit of this repository, got 'nothing'"),
        (("--base", "base", "--head", "dependency"), "pyproject.toml: base and dependency want different packages"),
        (("--base", "base", "--head", "pin"), "constraints.txt: base and pin want different packages"),
        (("--base", "base", "-k", "nothing"), "-k nothing: expected part of one of mixed, hot, eager; "),
        (("--base", "base", "--suite", "nothing"), "--suite: expected a suite"),
        (("--base", "base", "--processes", "3,10"), "expected rising numbers >= 6 such as 6,10,16, got '3,10'"),
        (("--base", "base", "--processes", "10,6"), "expected rising numbers >= 6"),
        ((), "the following arguments are required: --base"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    repository: Path,
    arguments: tuple[str, ...],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(repository)
    with pytest.raises(SystemExit) as stopped:
        main(["ab", *arguments])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_a_pair_of_processes_yields_one_number_and_one_that_hangs_is_ended(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = suite.load("ab")
    (tmp_path / "sitecustomize.py").write_text(
        "import os; open(f'{os.path.dirname(__file__)}/{os.getpid()}.seen', 'w')"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # where this process finds packages they look, too
    bench = sides.Bench(dict.fromkeys(sides.SIDES, repository), tmp_path, ab.document(chosen), "cpu", seed=0)
    with bench.pair() as pair:
        for process in pair.values():
            process.ask("settle", ab._core(0))
        assert len(list(tmp_path.glob("*.seen"))) >= 2
        order = np.random.default_rng(0)
        for work in (sides.Work(HOT, "row", max_s=0.1), *ab.CANARY_WORK):
            assert math.isfinite(ab._log_ratio(pair, work, chosen.max_pairs, order))
        with pytest.raises(sides.CannotMeasure, match="head: KeyError: 'no such case'"):
            pair["head"].ask("block", "no such case", 1)
        monkeypatch.setattr(sides, "ANSWER_S", 0.5)
        with pytest.raises(sides.Gone, match=r"head: no answer within 0\.5 s"):
            pair["head"].ask("canary", 10**9)  # rows: for hours
        with pytest.raises(sides.Gone, match="head: the process ended"):
            pair["head"].ask("canary", 1)
        assert pair["base"].ask("canary", 1) > 0


COLD = "digits, cold"


class MadeUp:
    """Stands for a Bench: pairs of processes whose times are made up, `head` by so much the slower.

    `biased`: so much slower is the head's side of this machine, whatever it runs. `turn`: so much longer takes a block
    that follows one of the other side. `deaf`: the clock of canaries stands still while there is more work than usual.
    `raises`, `dies`: from which pair on the cold case does so, and in which the processes do not even start.
    """

    def __init__(
        self, slower: float, noise: float, *, biased: float = 0.0, turn: float = 0.0, deaf: bool = False,
        raises: int = 100, dies: int = 100, starts: int = 100,
    ) -> None:  # fmt: skip
        self._slower, self._noise, self._biased, self._turn, self._deaf = slower, noise, biased, turn, deaf
        self._raises, self._dies, self._starts = raises, dies, starts
        self._random, self._canaries = np.random.default_rng(0), np.random.default_rng(1)
        self._speed: dict[str, float] = {}
        self._last = ""
        self.pairs = 0

    @contextmanager
    def pair(self, order: Sequence[str]) -> Iterator[dict[str, Any]]:
        self.pairs += 1
        if self.pairs >= self._starts:
            raise sides.CannotMeasure("base: gone")
        self._speed = {side: math.exp(self._random.normal(0, self._noise)) for side in order}
        self._speed["head"] *= 1 + self._biased
        yield {side: SimpleNamespace(ask=partial(self._ask, side)) for side in order}

    def _ask(self, side: str, question: str, *arguments: Any) -> float:
        if question == "settle":
            return 0.0
        speed = self._speed[side] * (1 + self._turn * (self._last != side))
        self._last = side
        if question == "canary":
            rows = int(arguments[0])
            heard = rows // 11 * 10 if self._deaf and rows % 11 == 0 else rows
            return 0.00005 * heard * speed * float(self._canaries.normal(1, 0.02))
        assert question == "block"
        if arguments[0] == COLD and self.pairs >= self._raises:
            raise sides.CannotMeasure(f"{side}: no")
        if arguments[0] == COLD and self.pairs >= self._dies:
            raise sides.Gone(f"{side}: gone")
        slower = 1 + self._slower * (side == "head")
        return 0.005 * slower * speed * int(arguments[1]) * float(self._random.normal(1, 0.02))


@pytest.mark.parametrize(
    ("slower", "noise", "verdict", "pairs"),
    [
        (0.0, 0.005, "NO-CHANGE", 6),
        (0.08, 0.01, "REGRESSION", 6),
        (-0.08, 0.01, "IMPROVEMENT", 6),
        (0.0, 0.015, "NO-CHANGE", 10),
    ],
)
def test_processes_are_started_until_a_look_decides(slower: float, noise: float, verdict: str, pairs: int) -> None:
    times, canaries, failed = compare_times(MadeUp(slower, noise))
    assert times[HOT]["judgement"]["verdict"] == verdict
    assert times[HOT]["judgement"]["pairs"] == len(times[HOT]["log_ratios"]) == pairs
    assert times[HOT]["clocks"] == {}
    assert failed == {}
    assert canaries["doubt"] == ""
    assert canaries["slower_10_percent"]["judgement"]["verdict"] == "REGRESSION"
    assert canaries["a_a"]["judgement"]["verdict"] == "NO-CHANGE"
    assert len({len(canaries[name]["log_ratios"]) for name in CANARIES}) == 1


def test_a_look_at_five_per_cent_more_finds_it_where_pairs_of_processes_differ_by_three() -> None:
    found = 0
    for seed in range(20):
        made_up = MadeUp(0.05, 0.02)  # of either side: their ratio's is 2.8 %
        made_up._random = np.random.default_rng(seed)
        times, canaries, _ = compare_times(made_up)
        found += times[HOT]["judgement"]["verdict"] == "REGRESSION"
        assert canaries["doubt"] == ""
    assert found >= 19


def test_a_canary_that_is_undecided_gets_more_pairs_than_the_case_that_is_not() -> None:
    times, canaries, _ = compare_times(MadeUp(0.3, 0.02))
    judgement = times[HOT]["judgement"]
    assert (judgement["verdict"], judgement["pairs"]) == ("REGRESSION", 6)
    assert len(canaries["a_a"]["log_ratios"]) > 6
    assert canaries["doubt"] == ""


def test_what_a_turn_costs_biases_neither_canary_nor_case() -> None:
    times, canaries, _ = compare_times(MadeUp(0.0, 0.005, turn=0.5))
    assert abs(times[HOT]["judgement"]["change"]) < 0.02
    assert abs(canaries["a_a"]["judgement"]["change"]) < 0.02
    assert canaries["slower_10_percent"]["judgement"]["change"] == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(
    ("made_up", "doubt", "pairs"),
    [
        (MadeUp(0.0, 0.005, biased=0.08), "the same work twice was judged REGRESSION", 6),
        (MadeUp(0.08, 0.005, biased=-0.08), "the same work twice was judged IMPROVEMENT", 6),
        (MadeUp(0.0, 0.005, deaf=True), "a tenth more work was judged NO-CHANGE", 6),
        (MadeUp(0.08, 0.005, deaf=True), "a tenth more work was judged NO-CHANGE", 6),
        (MadeUp(0.0, 0.2), "a tenth more work was judged INCONCLUSIVE", 36),  # too noisy to find anything
    ],
)
def test_where_a_canary_is_amiss_no_time_has_a_verdict(made_up: MadeUp, doubt: str, pairs: int) -> None:
    times, canaries, _ = compare_times(made_up)
    assert canaries["doubt"].split("; ")[0] == doubt
    judgement = times[HOT]["judgement"]
    assert (judgement["verdict"], judgement["pairs"]) == ("INVALID", pairs)
    assert judgement["reason"] == f"no time of this run is to be believed: {canaries['doubt']}"
    assert judgement["change"] is not None  # what was measured stays
    report = {**report_of(), "times": times, "canaries": canaries}
    assert ab.exit_code(report) == 3
    page = ab.markdown(report)
    assert page.startswith("# 1 INVALID\n")
    assert f"- INVALID: no time of this run is to be believed: {doubt}" in page


@pytest.mark.parametrize(
    ("made_up", "why", "pairs"),
    [
        (MadeUp(0.08, 0.01, raises=3), "base: no", 6),
        (MadeUp(0.08, 0.01, dies=3), "base: gone", 6),  # the rest of the third is measured in a fourth
    ],
)
def test_a_case_that_fails_on_the_way_does_so_alone_and_hides_no_regression(
    made_up: MadeUp, why: str, pairs: int
) -> None:
    times, canaries, failed = compare_times(made_up, COLD, HOT)
    assert failed == {COLD: why}
    assert list(times) == [HOT]
    assert times[HOT]["judgement"]["verdict"] == "REGRESSION"
    assert len(times[HOT]["log_ratios"]) == pairs
    assert canaries["doubt"] == ""
    assert ab.exit_code({**report_of(failed=True), "times": times, "canaries": canaries}) == 1


def test_processes_that_do_not_start_fail_whatever_is_undecided_and_alone() -> None:
    times, canaries, failed = compare_times(MadeUp(0.0, 0.01, starts=3), HOT, COLD)
    assert (times, canaries) == ({}, None)
    assert {HOT, COLD} <= failed.keys()
    assert set(failed.values()) == {"base: gone"}


def compare_times(bench: Any, *names: str) -> tuple[dict[str, Any], Any, dict[str, str]]:
    failed: dict[str, str] = {}
    options = argparse.Namespace(processes=ab.LOOKS, seed=0, device="cpu")
    work = [sides.Work(name, "row", 100.0) for name in names or (HOT,)]
    times, canaries = ab._compare_times(bench, work, 10, options, DELTA, failed)
    return times, canaries, failed


def test_the_suite_comes_through_as_it_is_written() -> None:
    chosen = suite.load("ab")
    sent = json.loads(json.dumps(ab.document(chosen)))
    received = suite.parse(sent)
    assert (received.row, received.image, received.threads) == (chosen.row, chosen.image, chosen.threads)
    assert "between" not in sent["row"][0]  # a default, which an older revision need not know


def report_of(verdict: str = "NO-CHANGE", change: str = "new", right: bool = True, failed: bool = False) -> Any:
    judgement = {"verdict": verdict, "change": 0.05, "low": 0.03, "high": 0.07, "pairs": 6, "reason": ""}
    return {
        "revisions": {side: {"ref": side, "commit": f"{number}" * 40} for number, side in enumerate(sides.SIDES)},
        "uncommitted": [],
        "settings": {"delta": 0.03, "level": 0.998, "looks": ab.LOOKS, "grade": "grade B"},
        "machine": machine.fingerprint(torch.device("cpu")),
        "results": {HOT: {"right": right, "reason": "differs"}},
        "figures": {"base": {}, "head": {"ops": 2}},
        "changes": [{"name": "ops", "base": None, "head": 2, "verdict": change}],
        "failed": {IMAGE: "why"} if failed else {},
        "canaries": {
            "doubt": "", "seconds": 12.0,
            "a_a": {"judgement": {**judgement, "verdict": "NO-CHANGE", "change": 0.001}, "log_ratios": []},
            "slower_10_percent": {"judgement": {**judgement, "verdict": "REGRESSION"}, "log_ratios": []},
        },
        "times": {HOT: {"judgement": judgement, "log_ratios": [], "clocks": {}}},
        "why_no_times": "",
        "seconds": 120.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("report", "code", "headline"),
    [
        (report_of(), 0, "# No change\n"),
        (report_of("INCONCLUSIVE"), 0, "# No change, 1 inconclusive\n"),
        (report_of("IMPROVEMENT"), 0, "# 1 IMPROVEMENT\n"),
        (report_of("REGRESSION"), 1, "# 1 REGRESSION\n"),
        (report_of(change="REGRESSION", failed=True), 1, "# 1 REGRESSION, 1 not measured\n"),
        (report_of("REGRESSION", right=False), 3, "# 1 INVALID, 1 REGRESSION\n"),
        (report_of("INVALID"), 3, "# 1 INVALID\n"),
        (report_of(failed=True), 4, "# 1 not measured\n"),
    ],
)
def test_exit_codes_and_headlines(report: Any, code: int, headline: str) -> None:
    assert ab.exit_code(report) == code
    page = ab.markdown(report)
    assert page.startswith(headline)
    excluded = "" if "INVALID" in headline and report["results"][HOT]["right"] else "above 7.0%"
    assert f"| {HOT} | +5.0% | +3.0% to +7.0% | {excluded} | 6 | " in page
    assert "| canary: the same work twice | +0.1% | +3.0% to +7.0% | above 7.0% | 6 | NO-CHANGE |" in page
    assert (
        "REGRESSION: slower, the whole interval by more than 3.0%. NO-CHANGE: the whole interval is within 4.5%" in page
    )
    assert "at 99.8%, 99% for all 5 looks together." in page
    assert "Those 3.0% are of grade B." in page
    assert "took 12 s, 10% of the run." in page


def test_the_headline_says_that_one_commit_was_compared_with_itself() -> None:
    report = report_of()
    report["revisions"]["head"] = report["revisions"]["base"]
    assert ab.markdown(report).startswith("# A/A, one commit on both sides: No change\n")


def test_the_page_says_what_was_on_neither_side_and_whether_clocks_were_held_down() -> None:
    report = report_of()
    assert "neither side" not in ab.markdown(report)
    assert "held down" not in ab.markdown(report)
    report["uncommitted"] = ["fastdiff/step.py"]
    report["times"][HOT]["clocks"] = {"thermal slowdown": 3}
    page = ab.markdown(report)
    assert "- on neither side, because no commit has it: fastdiff/step.py\n" in page
    assert f"- {HOT}: clocks were held down, by process pairs: thermal slowdown in 3\n" in page


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda tensor: tensor + 1, (1, 0)),
        (lambda tensor: tensor.view(2, 2)[0].unsqueeze(0), (0, 0)),
        (lambda tensor: tensor[torch.tensor([0, 1])], (1, 0)),
        (lambda tensor: float(tensor[0]), (0, 1)),
        (lambda tensor: tensor.cpu(), (0, 1)),
        (lambda tensor: tensor.tolist(), (0, 1)),
        (lambda tensor: tensor.numpy(), (0, 1)),
        (lambda tensor: tensor.nonzero(), (0, 1)),
        (lambda tensor: tensor[tensor > 0], (1, 1)),
        (lambda tensor: bool((tensor > 0).any()), (2, 1)),
    ],
)
def test_what_is_counted(work: Callable[[Tensor], object], expected: tuple[int, int]) -> None:
    tensor = torch.ones(4)
    assert worker.counted(lambda: work(tensor)) == expected


def test_live_tensors_are_counted_with_the_bytes_behind_them() -> None:
    before = worker.live_tensors(torch.device("cpu"))
    kept = [torch.zeros(1000)]
    kept.append(kept[0][:10])  # of the same storage
    after = worker.live_tensors(torch.device("cpu"))
    assert (after[0] - before[0], after[1] - before[1]) == (2, 4000)
