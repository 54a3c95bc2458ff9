"""The grade of a machine, on made-up trials without a clock; and the command, with as little work as it can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdiff.bench import ab, selftest
from fastdiff.bench.__main__ import main
from fastdiff.bench.verdict import Judgement, judge


def trials(count: int, slower: float, noise: float, seed: int) -> list[Judgement]:
    """Rounds on a machine whose speed drifts, with noise of its own in each block."""
    random = np.random.default_rng(seed)
    judged = []
    for _ in range(count):
        speed = 1 + 0.2 * np.sin(np.linspace(0, random.uniform(1, 9), 160))
        base, head = speed * np.exp(random.normal(0, noise, (2, 160)))
        judged.append(judge(base, head * (1 + slower)))
    return judged


@pytest.mark.parametrize(
    ("noise", "letter", "delta"), [(0.01, "A", 0.02), (0.025, "A", 0.02), (0.05, "B", 0.03), (0.3, "C", None)]
)
def test_a_quieter_machine_gets_a_better_grade(noise: float, letter: str, delta: float | None) -> None:
    report = selftest.assess(trials(40, 0.0, noise, seed=1), trials(20, 0.05, noise, seed=2))
    assert (report["grade"], report["delta"], report["passed"]) == (letter, delta, True)
    assert (report["flagged"], report["wrong"]) == (0, 0)
    assert report["found"] == 20 or letter == "C"


def test_the_floor_is_the_95th_percentile_of_what_the_same_code_differs_by() -> None:
    a_a = [same(change) for change in np.linspace(-0.01, 0.01, 41)]
    assert selftest.assess(a_a, [])["phi"] == pytest.approx(0.0095)
    assert [selftest.grade_of(phi).letter for phi in (0.007, 0.0071, 0.015, 0.0151)] == ["A", "B", "B", "C"]


def same(change: float, verdict: Any = "NO-CHANGE") -> Judgement:
    return Judgement(verdict, change, change - 0.01, change + 0.01, 40, "")


@pytest.mark.parametrize(
    ("flagged", "missed", "misjudged", "phi", "passed"),
    [
        (1, 1, 0, 0.001, True),
        (2, 0, 0, 0.001, False),
        (0, 2, 0, 0.001, False),
        (0, 0, 1, 0.001, False),
        (0, 20, 0, 0.02, True),  # grade C: nothing needs to be found
        (2, 0, 0, 0.02, False),
        (0, 0, 1, 0.02, False),
    ],
)
def test_what_the_instrument_may_get_wrong(flagged: int, missed: int, misjudged: int, phi: float, passed: bool) -> None:
    a_a = [same(phi)] * (40 - flagged) + [same(phi, "REGRESSION"), same(-phi, "IMPROVEMENT")][:flagged]
    slower = [same(0.05, "REGRESSION")] * (20 - missed) + [same(0.01, "INCONCLUSIVE")] * missed
    report = selftest.assess(a_a, slower + [same(-0.05, "IMPROVEMENT")] * misjudged)
    assert report["passed"] is passed
    assert (report["flagged"], report["found"], report["wrong"]) == (flagged, 20 - missed, misjudged)
    assert (report["delta"] is None) == (not passed or report["grade"] == "C")


def test_trials_that_no_verdict_could_be_given_on_do_not_pass() -> None:
    report = selftest.assess([Judgement("INVALID", None, None, None, 8, "too few")] * 40, [])
    assert (report["grade"], report["phi"], report["passed"]) == ("C", None, False)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, one_thread: Any) -> None:
    """Two trials of a moment each, too short for any verdict but INVALID."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(selftest, "FULL", {"a_a": 1, "slower": 1})
    monkeypatch.setattr(selftest, "TRIAL_S", 0.0)


def test_the_command_writes_what_ab_goes_by(short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--save"]) == 3
    page = capsys.readouterr().out
    (place,) = (tmp_path / "reports" / "selftest").iterdir()
    (latest,) = (tmp_path / "reports" / "runs" / "selftest").iterdir()
    assert place.name == latest.name
    for folder in (place, latest):
        assert (folder / "selftest.md").read_text() == page
    assert page.startswith("# Self-test: grade C, FAILED\n")
    assert "| 5 % more work | 1 |" in page
    report = json.loads((place / "selftest.json").read_text())
    assert report["machine"]["id"] == place.name
    assert [len(report["trials"][kind]) for kind in ("a_a", "slower")] == [1, 1]
    assert selftest.recorded(place.name) == report
    assert selftest.recorded("another machine") is None

    assert ab._gate(place.name, deterministic=False)[1].startswith("this machine is of grade C (")
    assert ab._gate("another machine", deterministic=False) == (0.02, "")
    (latest / "selftest.json").write_text(json.dumps(report | {"delta": 0.03}))
    assert ab._gate(place.name, deterministic=False) == (0.03, "")
    assert ab._gate(place.name, deterministic=True)[1].startswith("not asked for")
