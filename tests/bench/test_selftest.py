"""The grade of a machine, on made-up trials without a clock; and the command, with as little work as it can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdiff.bench import ab, selftest
from fastdiff.bench.__main__ import main
from fastdiff.bench.verdict import Judgement, judge, judged_at


def trials(count: int, slower: float, noise: float, seed: int) -> list[Judgement]:
    """Rounds on a machine whose speed drifts, with noise of its own in each block."""
    random = np.random.default_rng(seed)
    judged = []
    for _ in range(count):
        speed = 1 + 0.2 * np.sin(np.linspace(0, random.uniform(1, 9), selftest.MAX_PAIRS))
        base, head = speed * np.exp(random.normal(0, noise, (2, selftest.MAX_PAIRS)))
        judged.append(judge(base, head * (1 + slower)))
    return judged


@pytest.mark.parametrize(
    ("noise", "letter", "delta"), [(0.01, "A", 0.02), (0.025, "A", 0.02), (0.05, "B", 0.02), (0.3, "C", None)]
)
def test_a_quieter_machine_gets_a_better_grade(noise: float, letter: str, delta: float | None) -> None:
    report = selftest.assess(trials(40, 0.0, noise, seed=7), trials(20, 0.05, noise, seed=8))
    assert (report["grade"], report["delta"], report["passed"]) == (letter, delta, True)
    assert (report["flagged"], report["wrong"]) == (0, 0)
    assert report["found"] >= 19 or letter == "C"
    assert report["judged_at"] == (delta or 0.02)


def test_what_gates_is_half_as_much_again_as_the_same_code_differs_by() -> None:
    deltas = [made_up(0, 0, 0, phi)["delta"] for phi in (0.001, 0.007, 0.0133, 0.014, 0.015, 0.016)]
    assert deltas == [0.02, 0.02, 0.02, pytest.approx(0.021), pytest.approx(0.0225), None]
    assert made_up(0, 0, 0, 0.014)["meaning"] == "times gate at 2.1%"


def test_the_floor_is_the_95th_percentile_of_what_the_same_code_differs_by() -> None:
    a_a = [trial(change) for change in np.linspace(-0.01, 0.01, 41)]
    assert selftest.assess(a_a, [])["phi"] == pytest.approx(0.0095)
    assert [selftest.grade_of(phi).letter for phi in (0.007, 0.0071, 0.015, 0.0151)] == ["A", "B", "B", "C"]


def trial(change: float, low: float = -0.01, high: float = 0.01) -> Judgement:
    return judged_at(Judgement("NO-CHANGE", change, low, high, 400, ""), 0.02)


FOUND, MISSED, MISJUDGED = trial(0.05, 0.035, 0.065), trial(0.05, 0.015, 0.085), trial(-0.05, -0.06, -0.04)


def made_up(flagged: int, missed: int, misjudged: int, phi: float, whole: bool = True) -> dict[str, Any]:
    counts = selftest.FULL if whole else selftest.QUICK
    a_a = [trial(phi)] * (counts["a_a"] - flagged) + [trial(phi, 0.035, 0.05), trial(-phi, -0.05, -0.035)][:flagged]
    return selftest.assess(a_a, [FOUND] * (counts["slower"] - missed) + [MISSED] * missed + [MISJUDGED] * misjudged)


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
    report = made_up(flagged, missed, misjudged, phi)
    assert report["passed"] is passed
    assert (report["flagged"], report["found"], report["wrong"]) == (flagged, 20 - missed, misjudged)
    assert (report["delta"] is None) == (not passed or report["grade"] == "C")


@pytest.mark.parametrize(
    ("flagged", "missed", "passed"), [(0, 0, True), (1, 1, True), (2, 0, False), (0, 2, False), (0, 3, False)]
)
def test_a_short_test_fails_only_where_a_whole_one_would_hardly_pass(flagged: int, missed: int, passed: bool) -> None:
    assert made_up(flagged, missed, 0, phi=0.001, whole=False)["passed"] is passed


def test_an_instrument_as_good_as_it_has_to_be_passes_a_short_test_nineteen_times_in_twenty() -> None:
    random = np.random.default_rng(0)
    for kind, count in selftest.QUICK.items():
        wrong = random.binomial(count, 1 / selftest.ONE_IN[kind], 4000)
        assert (wrong <= selftest.may_go_wrong(kind, count)).mean() > 0.95
        bad = random.binomial(count, 0.5, 4000)
        assert (bad <= selftest.may_go_wrong(kind, count)).mean() < 0.25


def test_the_instrument_is_judged_at_the_slowdown_that_its_grade_gates_at() -> None:
    slower = [trial(0.05, 0.0215, 0.0785)] * 20  # above 2 %, not above 2.25 %
    quiet, noisy = (selftest.assess([trial(phi)] * 40, slower) for phi in (0.005, 0.015))
    assert (quiet["grade"], quiet["judged_at"], quiet["found"], quiet["passed"]) == ("A", 0.02, 20, True)
    assert (noisy["grade"], noisy["judged_at"], noisy["found"], noisy["passed"]) == ("B", 0.0225, 0, False)
    assert {one["verdict"] for one in noisy["trials"]["slower"]} == {"INCONCLUSIVE"}


def test_trials_that_no_verdict_could_be_given_on_do_not_pass() -> None:
    report = selftest.assess([Judgement("INVALID", None, None, None, 8, "too few")] * 40, [])
    assert (report["grade"], report["phi"], report["passed"]) == ("C", None, False)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two trials of a moment each, too short for any verdict but INVALID."""
    monkeypatch.chdir(tmp_path)
    for length in ("FULL", "QUICK"):
        monkeypatch.setattr(selftest, length, {"a_a": 1, "slower": 1})
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
    known = selftest.recorded(report["machine"])
    assert known is not None
    assert (known.grade, known.delta, known.created) == ("C", None, report["created"])
    assert ab._gate(report["machine"], deterministic=False).why_no_times.startswith("this machine is of grade C, by ")


def test_a_short_test_is_never_in_the_place_of_a_whole_one(
    short: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["selftest", "--quick"]) == 3
    (place,) = (tmp_path / "reports" / "runs" / "selftest").iterdir()
    assert {file.name for file in place.iterdir()} == {"quick.json", "quick.md"}
    assert not (tmp_path / "reports" / "selftest").exists()
    report = json.loads((place / "quick.json").read_text())
    assert ab._gate(report["machine"], deterministic=False).why_no_times  # all that is known of this machine
    write(report | GRADE_B, selftest.SAVED)
    assert ab._gate(report["machine"], deterministic=False).delta == 0.021
    with pytest.raises(SystemExit) as stopped:
        main(["selftest", "--quick", "--save"])
    assert stopped.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err.splitlines()[-1]


MACHINE = {"id": "0", "cpu": "one", "packages": {"fastdiff-runtime": "0.1.0", "torch": "2.13"}, "load_average": [1.0]}
GRADE_B = {"grade": "B", "delta": 0.021, "meaning": "times gate at 2.1%", "created": "2026-01-01 00:00:00 UTC"}
REPORT = {"schema": selftest.SCHEMA, "machine": MACHINE, **GRADE_B}


def write(report: dict[str, Any], folder: Path = selftest.LATEST) -> Path:
    path = folder / str(report["machine"]["id"]) / "selftest.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(report))
    return path


def test_a_grade_is_of_a_machine_and_not_of_a_version_of_fastdiff(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert selftest.recorded(MACHINE) is None
    write(REPORT)
    packages = {"fastdiff-runtime": "0.2.0", "torch": "2.13"}
    newer = {**MACHINE, "id": "1", "packages": packages, "load_average": [0.5]}
    assert ab._gate(newer, deterministic=False) == (0.021, "grade B, by the self-test of 2026-01-01 00:00:00 UTC", "")
    assert selftest.recorded({**newer, "cpu": "another"}) is None
    assert selftest.recorded({**newer, "packages": {**packages, "torch": "2.14"}}) is None
    assert ab._gate({**newer, "cpu": "another"}, deterministic=False).delta == 0.02
    assert ab._gate(newer, deterministic=True).why_no_times.startswith("not asked for")
    later = {"grade": "A", "delta": 0.02, "created": "2026-01-02 00:00:00 UTC"}
    write({**REPORT, **later, "machine": newer})
    assert ab._gate(MACHINE, deterministic=False).delta == 0.02


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        json.dumps(REPORT)[:-20],
        json.dumps({**REPORT, "schema": "another"}),
        json.dumps({**REPORT, "grade": "D"}),
        json.dumps({**REPORT, "delta": 0.5}),
        json.dumps({**REPORT, "delta": 0.03}),
        json.dumps({**REPORT, "delta": "0.02"}),
        json.dumps({**REPORT, "created": None}),
        json.dumps({**REPORT, "machine": 1}),
        json.dumps({**REPORT, "machine": {"id": "0"}}),
    ],
)
def test_what_no_self_test_wrote_is_refused_in_one_line(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(REPORT)
    path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        ab._gate(MACHINE, deterministic=False)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path}: expected what `selftest` writes, got something else" in line
