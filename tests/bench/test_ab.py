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
from fastdiff.bench import ab, canary, machine, suite, worker
from fastdiff.bench.__main__ import main
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
    one_thread: Any,
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
    work = ab.Work(HOT, "row", max_s=1.0)
    assert ab._parity(work, np.array([1.0, 2.0]), np.array(head)) == {"right": reason is None, "reason": reason}


def test_a_revision_that_cannot_run_is_said(compare: Any) -> None:
    code, page, report = compare("broken", HOT)
    assert code == 4
    assert report["failed"] == {HOT: "head: the process ended: RuntimeError: planted"}
    assert f"- not measured: {HOT}: head: the process ended: RuntimeError: planted" in page


def test_ctrl_c_leaves_nothing_behind(repository: Path, tmp_path: Path) -> None:
    running = subprocess.Popen(
        [sys.executable, "-P", "-m", "fastdiff.bench", "ab", "--base", "base", "--deterministic"],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
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


def test_a_pair_of_processes_yields_one_number(repository: Path, tmp_path: Path) -> None:
    chosen = suite.load("ab")
    bench = ab.Bench(dict.fromkeys(ab.SIDES, repository), tmp_path, ab.document(chosen), "cpu", seed=0)
    work = ab.Work(HOT, "row", max_s=0.1)
    with bench.pair() as pair:
        for process in pair.values():
            process.ask("settle", ab._core(0))
        order = np.random.default_rng(0)
        assert math.isfinite(ab._log_ratio(pair, work, chosen.max_pairs, order))
        canaries = ab._canary_log_ratios(pair, order)
        assert canaries.keys() == canary.PROCESSES.keys()
        assert all(map(math.isfinite, canaries.values()))
        with pytest.raises(ab.CannotMeasure, match="head: KeyError: 'no such case'"):
            pair["head"].ask("block", "no such case", 1)


class MadeUp:
    """Stands for a Bench: pairs of processes whose times are made up, `head` by so much the slower.

    `biased`: so much slower is the head's side of this machine, whatever it runs. `deaf`: the clock of canaries stands
    still while there is more work than usual.
    """

    def __init__(
        self, slower: float, noise: float, lives: int = 100, *, biased: float = 0.0, deaf: bool = False
    ) -> None:
        self._slower, self._noise, self._lives, self._random = slower, noise, lives, np.random.default_rng(0)
        self._biased, self._deaf, self._canaries = biased, deaf, np.random.default_rng(1)
        self._speed: dict[str, float] = {}

    @contextmanager
    def pair(self, sides: Sequence[str]) -> Iterator[dict[str, Any]]:
        self._lives -= 1
        self._speed = {side: math.exp(self._random.normal(0, self._noise)) for side in sides}
        self._speed["head"] *= 1 + self._biased
        yield {side: SimpleNamespace(ask=partial(self._ask, side)) for side in sides}

    def _ask(self, side: str, question: str, *arguments: Any) -> float:
        if self._lives == 0:
            raise ab.CannotMeasure(f"{side}: gone")
        if question == "canary":
            rows = int(arguments[0])
            heard = rows // 11 * 10 if self._deaf and rows % 11 == 0 else rows
            return 0.00005 * heard * self._speed[side] * float(self._canaries.normal(1, 0.02))
        if question == "block":
            slower = 1 + self._slower * (side == "head")
            return 0.005 * slower * self._speed[side] * int(arguments[1]) * float(self._random.normal(1, 0.02))
        assert question == "settle"
        return 0.0


@pytest.mark.parametrize(
    ("slower", "noise", "verdict", "pairs"),
    [
        (0.0, 0.005, "NO-CHANGE", 6),
        (0.08, 0.01, "REGRESSION", 6),
        (-0.08, 0.01, "IMPROVEMENT", 6),
        (0.0, 0.015, "NO-CHANGE", 10),
        (0.0, 0.2, "INCONCLUSIVE", 16),
    ],
)
def test_processes_are_started_until_a_look_decides(slower: float, noise: float, verdict: str, pairs: int) -> None:
    times, canaries, failed = compare_times(MadeUp(slower, noise))
    assert times[HOT]["judgement"]["verdict"] == verdict
    assert times[HOT]["judgement"]["pairs"] == len(times[HOT]["log_ratios"]) == pairs
    assert failed == {}
    assert canaries["doubt"] == ""
    assert {len(canaries[name]["log_ratios"]) for name in canary.PROCESSES} == {pairs}
    assert canaries["slower_10_percent"]["judgement"]["verdict"] == ("REGRESSION" if noise < 0.1 else "INCONCLUSIVE")
    if noise < 0.01:
        assert canaries["a_a"]["judgement"]["verdict"] == "NO-CHANGE"


@pytest.mark.parametrize(
    ("made_up", "doubt"),
    [
        (MadeUp(0.0, 0.005, biased=0.08), "the same work in both was judged REGRESSION"),
        (MadeUp(0.08, 0.005, biased=-0.08), "the same work in both was judged IMPROVEMENT"),
        (MadeUp(0.0, 0.005, deaf=True), "a tenth more work in the head was judged NO-CHANGE"),
        (MadeUp(0.08, 0.005, deaf=True), "a tenth more work in the head was judged NO-CHANGE"),
    ],
)
def test_where_a_canary_is_amiss_no_time_has_a_verdict(made_up: MadeUp, doubt: str) -> None:
    times, canaries, _ = compare_times(made_up)
    assert canaries["doubt"].split("; ")[0] == doubt
    judgement = times[HOT]["judgement"]
    assert (judgement["verdict"], judgement["pairs"]) == ("INVALID", 6)
    assert judgement["reason"] == f"no time of this run is to be believed: {canaries['doubt']}"
    assert judgement["change"] is not None  # what was measured stays
    report = {**report_of(), "times": times, "canaries": canaries}
    assert ab.exit_code(report) == 3
    page = ab.markdown(report)
    assert page.startswith("# 1 INVALID\n")
    assert f"- INVALID: no time of this run is to be believed: {doubt}" in page


def test_a_process_that_dies_on_the_way_fails_the_undecided_cases() -> None:
    assert compare_times(MadeUp(0.0, 0.01, lives=3)) == ({}, None, {HOT: "base: gone"})


def compare_times(bench: Any) -> tuple[dict[str, Any], Any, dict[str, str]]:
    failed: dict[str, str] = {}
    options = argparse.Namespace(processes=(6, 10, 16), seed=0)
    times, canaries = ab._compare_times(bench, [ab.Work(HOT, "row", 100.0)], 10, options, DELTA, failed)
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
        "revisions": {side: {"ref": side, "commit": "0" * 40} for side in ab.SIDES},
        "settings": {"delta": 0.02},
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
        "times": {HOT: {"judgement": judgement, "log_ratios": []}},
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
    assert f"| {HOT} | +5.0% | +3.0% to +7.0% | 6 | " in page
    assert "| canary: the same work in both | +0.1% | +3.0% to +7.0% | 6 | NO-CHANGE |" in page
    assert "took 12 s, 10% of the run." in page


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
