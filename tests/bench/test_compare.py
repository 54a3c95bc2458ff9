"""Two reports against each other: exact figures gate, times only hint, other machines are incomparable."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastdiff.bench import schema
from fastdiff.bench.__main__ import main
from fastdiff.bench.compare import compare, markdown
from fastdiff.bench.outcome import exit_code
from fastdiff.bench.summary import summarize

COMMITTED = Path(__file__).parents[2] / "reports" / "digits-cpu-1"
CASE = max(schema.load(COMMITTED)["rows"], key=lambda case: len(case["arms"]["diffusers"]["total_s"]))["name"]
"""A case with rounds enough for a hint."""
FIGURES = {"ops per row: mixed, batch 8": 21, "host syncs per row: mixed, batch 8": 0}


@pytest.fixture
def base() -> dict[str, Any]:
    """A committed report, with figures."""
    report = schema.load(COMMITTED)
    return {**report, "gates": {"key": "torch-2-cpu", "figures": dict(FIGURES), "changes": None}}


@pytest.fixture
def head(base: dict[str, Any]) -> dict[str, Any]:
    """The same again, to be changed."""
    return copy.deepcopy(base)


def slow_down(report: dict[str, Any], case: str, arm: str, factor: float) -> None:
    found = next(one for one in (*report["rows"], *report["images"]) if one["name"] == case)
    found["arms"][arm]["total_s"] = [factor * time for time in found["arms"][arm]["total_s"]]


def command(tmp_path: Path, base: dict[str, Any], head: dict[str, Any], *flags: str) -> int:
    places = []
    for name, report in (("base", base), ("head", head)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "report.json").write_text(json.dumps(schema.document(report)))
        places.append(str(tmp_path / name))
    return main(["compare", *places, *flags])


def test_a_report_against_itself_is_no_change(tmp_path: Path, base: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path, base, base, "--fail-on-time") == 0
    page = capsys.readouterr().out
    assert page.startswith("# No change\n")
    assert "Exact figures: all the same." in page


def test_a_grown_figure_fails_and_is_named(
    tmp_path: Path, base: Any, head: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    head["gates"]["figures"]["host syncs per row: mixed, batch 8"] = 1
    assert command(tmp_path, base, head) == 1
    assert "| host syncs per row: mixed, batch 8 | 0 | 1 | REGRESSION |" in capsys.readouterr().out
    assert command(tmp_path, head, base) == 0  # an improvement


def test_a_figure_that_is_gone_fails(tmp_path: Path, base: Any, head: Any) -> None:
    del head["gates"]["figures"]["host syncs per row: mixed, batch 8"]
    assert command(tmp_path, base, head) == 1


def test_a_figure_that_could_not_be_measured_is_said_and_is_no_regression(
    tmp_path: Path, base: Any, head: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    head["gates"]["figures"]["host syncs per row: mixed, batch 8"] = None
    assert command(tmp_path, base, head) == 4
    page = capsys.readouterr().out
    assert page.startswith("# 1 not measured\n")
    assert "| host syncs per row: mixed, batch 8 | 0 | - | not measured |" in page
    assert "Exact figures: none changed, 1 not measured." in page
    assert command(tmp_path, head, base) == 0  # here it is the base that lacks it
    assert "1 not measured" in capsys.readouterr().out
    head["gates"]["figures"]["ops per row: mixed, batch 8"] += 1
    assert command(tmp_path, base, head) == 1


def test_time_fails_only_where_asked_to(
    tmp_path: Path, base: Any, head: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    slow_down(head, CASE, "tensorized/eager", 3.0)
    assert command(tmp_path, base, head) == 0
    page = capsys.readouterr().out
    assert "1 slower (unpaired)" in page
    assert "+200.0% | slower |" in page
    assert command(tmp_path, base, head, "--fail-on-time") == 1
    assert command(tmp_path, head, base, "--fail-on-time") == 0  # faster


def test_a_small_change_and_too_few_rounds_cannot_be_told(base: Any, head: Any) -> None:
    slow_down(head, CASE, "tensorized/eager", 1.01)
    few = next(case for case in head["images"] if case["name"] == "mixed")["arms"]["tensorized/eager"]
    few["total_s"] = [9.0] * 19
    compared = compare(base, head)
    hints = {time.name: time.hint for time in compared.times}
    assert hints["run::mixed[tensorized/eager]"] == "too few rounds"
    assert set(hints.values()) == {"cannot tell", "too few rounds"}
    count = list(hints.values()).count("too few rounds")
    assert f"; {count} have fewer and were not judged." in markdown(compared, "base", "head")


def test_times_that_were_asked_for_and_could_not_be_judged_are_no_pass(base: Any, head: Any) -> None:
    for report in (base, head):
        for case in (*report["rows"], *report["images"]):
            for arm in case["arms"].values():
                arm["total_s"] = [9.0 if report is head else 1.0] * 12
        report["setup"] = []
    compared = compare(base, head)
    assert {time.hint for time in compared.times} == {"too few rounds"}
    assert (compared.exit_code(False), compared.exit_code(True)) == (0, 4)


def test_another_case_under_the_same_name_cannot_be_told(base: Any, head: Any) -> None:
    slow_down(head, CASE, "tensorized/eager", 3.0)
    next(case for case in head["rows"] if case["name"] == CASE)["steps"] = 60
    assert {time.hint for time in compare(base, head).times if CASE in time.name} == {"cannot tell"}


def test_an_arm_that_is_no_longer_timed_is_named(tmp_path: Path, base: Any, head: Any) -> None:
    head["rows"] = [case for case in head["rows"] if case["name"] != "DDIM"]
    compared = compare(base, head)
    assert set(compared.untimed) == {
        f"run::DDIM[{arm}]" for arm in ("diffusers", "tensorized/eager", "tensorized/compiled")
    }
    assert "- no longer timed: run::DDIM[diffusers]" in markdown(compared, "base", "head")
    assert (compared.exit_code(False), compared.exit_code(True)) == (0, 1)


@pytest.mark.parametrize(("diffusers", "error", "code"), [(1e-4, 1.9e-4, 0), (1e-4, 2.1e-4, 3), (1e-7, 0.9, 3)])
def test_an_error_of_more_than_twice_diffusers_own_is_wrong(
    tmp_path: Path, base: Any, head: Any, diffusers: float, error: float, code: int
) -> None:
    head["errors"][0] |= {"diffusers": diffusers, "fastdiff": error}
    assert command(tmp_path, base, head) == code


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"cpu": "another CPU"}, "cpu"),
        ({"packages": {"torch": "2.12"}}, "torch"),
        ({"gpu": {"name": "H200"}}, "gpu"),
        ({"threads": 7}, "threads"),
    ],
)
def test_another_machines_times_are_incomparable(base: Any, head: Any, change: Any, named: str) -> None:
    packages = {**base["machine"]["packages"], **change.get("packages", {})}
    head["machine"] = {**head["machine"], **change, "packages": packages}
    compared = compare(base, head)
    assert named in compared.no_times
    assert compared.times == ()
    assert compared.exit_code(False) == 0  # the figures are still the same
    assert compared.exit_code(True) == 3
    head["gates"]["figures"]["ops per row: mixed, batch 8"] = 22
    assert compare(base, head).exit_code(False) == 1


def test_another_version_of_fastdiff_is_what_is_compared(base: Any, head: Any) -> None:
    head["machine"]["packages"]["fastdiff-runtime"] = "9.9"
    head["machine"]["id"] = "another"
    assert compare(base, head).no_times == ""


def test_figures_of_other_versions_are_incomparable_and_nothing_at_all_is_invalid(base: Any, head: Any) -> None:
    head["gates"]["key"] = "torch-3-cpu"
    head["gates"]["figures"] = {"ops per row: mixed, batch 8": 99}
    compared = compare(base, head)
    assert compared.no_figures == "they are of torch-2-cpu and torch-3-cpu"
    assert compared.exit_code(False) == 0  # the times were compared
    head["machine"]["cpu"] = "another"
    nothing = compare(base, head)
    assert nothing.exit_code(False) == 3
    assert markdown(nothing, "base", "head").startswith("# Incomparable")


def test_a_wrong_answer_is_invalid(tmp_path: Path, base: Any, head: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arm = next(case for case in head["rows"] if case["name"] == "DDIM")["arms"]["tensorized/eager"]
    arm.update(status="INVALID", reason="differs from the reference by 1, more than 0.0001", total_s=[])
    assert command(tmp_path, base, head) == 3
    assert "- INVALID: DDIM, tensorized/eager: differs from the reference by 1" in capsys.readouterr().out


def test_interleaved_requests_that_went_wrong_and_nan_are_invalid_too(base: Any, head: Any) -> None:
    head["fates"] = [one for one in head["fates"] if one["arm"] == "cloned-deepcopy"][:1]
    head["fates"][0]["fates"][0]["fate"] = "silently wrong"
    head["errors"][0]["fastdiff"] = None
    compared = compare(base, head)
    assert compared.exit_code(False) == exit_code(head) == 3
    sampler = head["fates"][0]["sampler"]
    assert compared.wrong == (
        f"{sampler}, cloned-deepcopy: interleaved requests, concurrent-equal: silently wrong",
        f"{head['errors'][0]['sampler']}, tensorized: infinities or NaN against float64",
    )


def test_a_head_that_could_not_count_does_not_pass(tmp_path: Path, base: Any, head: Any) -> None:
    head["gates"] = None
    compared = compare(base, head)
    assert compared.exit_code(False) == 4
    assert "- not measured: exact figures: base has them, head has none" in markdown(compared, "base", "head")
    assert command(tmp_path, head, base) == 0  # here it is the base that lacks them
    assert compare(head, head).exit_code(False) == 0


def test_a_head_with_a_piece_that_could_not_run_does_not_pass(base: Any, head: Any) -> None:
    head["unsupported"] = [{"what": "deterministic figures", "reason": "RuntimeError: no"}]
    compared = compare(base, head)
    assert compared.exit_code(False) == exit_code(head) == 4
    page = markdown(compared, "base", "head")
    assert page.startswith("# 1 not measured\n")
    assert "- not measured: deterministic figures: RuntimeError: no" in page
    head["gates"]["figures"]["ops per row: mixed, batch 8"] += 1
    assert compare(base, head).exit_code(False) == 1
    assert compare(head, base).exit_code(False) == 0


def test_times_that_the_canaries_doubt_are_no_gate(base: Any, head: Any) -> None:
    head["canaries"] = {"doubt": "the same work twice was judged REGRESSION"}
    compared = compare(base, head)
    assert (compared.exit_code(False), compared.exit_code(True)) == (0, 3)
    assert "No time is to be believed: the same work twice" in markdown(compared, "base", "head")


def test_the_targets_of_a_doubted_run_are_neither_met_nor_missed(base: Any, head: Any) -> None:
    head["canaries"] = {"doubt": "a tenth more work was judged NO-CHANGE"}
    for before, after in zip(summarize(base)["targets"], summarize(head)["targets"], strict=True):
        if before["goal"] in ("0", "constant"):
            assert after == before  # counted, not timed
        else:
            assert after["met"] is None
            assert after["measured"].endswith("INVALID: a tenth more work was judged NO-CHANGE")


def foreign(path: Path, median_s: float, node: str = "n") -> str:
    stats = {"median": median_s, "q1": 0.99 * median_s, "q3": 1.01 * median_s, "rounds": 30}
    info = {"node": node, "cpu": {"brand_raw": "a CPU", "hz_actual": [median_s, 0]}}
    path.write_text(json.dumps({"machine_info": info, "benchmarks": [{"fullname": "t::a", "stats": stats}]}))
    return str(path)


def test_files_of_pytest_benchmark_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, head = foreign(tmp_path / "1.json", 1.0), foreign(tmp_path / "2.json", 1.5)
    assert main(["compare", base, head]) == 0
    assert "| t::a | 1000 ms | 1500 ms | +50.0% | slower |" in capsys.readouterr().out
    assert main(["compare", base, head, "--fail-on-time"]) == 1
    assert main(["compare", base, foreign(tmp_path / "3.json", 1.5, node="other")]) == 3
    assert main(["compare", base, str(COMMITTED)]) == 3


def test_a_real_file_of_pytest_benchmark_is_read(tmp_path: Path) -> None:
    (tmp_path / "test_sum.py").write_text("def test_sum(benchmark): benchmark(sum, [1, 2, 3])\n")
    options = ["-p", "no:cacheprovider", "--benchmark-json=out.json", "--benchmark-max-time=0.05", "-q"]
    alone = {
        name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"
    }  # else it times nothing
    subprocess.run([sys.executable, "-m", "pytest", *options], cwd=tmp_path, env=alone, check=True, capture_output=True)
    (only,) = schema.load(tmp_path / "out.json")["benchmarks"]
    assert only["name"] == "test_sum"
    assert main(["compare", str(tmp_path / "out.json"), str(tmp_path / "out.json"), "--fail-on-time"]) == 0


def test_what_is_no_report_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.json"
    parts = '"results": {}, "failed": {}, "changes": [], "times": {}, "canaries": null'
    for text, expected in (
        ('{"fastdiff": {"schema"', "cut off, or no JSON"),
        (json.dumps({"fastdiff": {**schema.load(COMMITTED), "machine": {}}}), "the report, machine, id: missing"),
        ('{"schema": "fastdiff.ab/1", ' + parts + "}", "it is of ab, which has compared already"),
    ):
        broken.write_text(text)
        with pytest.raises(SystemExit) as stopped:
            main(["compare", str(broken), str(COMMITTED)])
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{broken}: {expected}" in line
