"""Markdown that fits, JUnit and CSV that others' readers take, the index of committed reports, and the command."""

from __future__ import annotations

import csv as csv_module
import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pandas
import pytest

from fastdiff.bench.__main__ import main
from fastdiff.bench.export import csv, index, junit
from fastdiff.bench.outcome import comparisons, exit_code, headline, outcome, tally, unvouched
from fastdiff.bench.page import html
from fastdiff.bench.report import STEP_SUMMARY_BYTES, facts, markdown, print_tables
from fastdiff.bench.tables import break_even_table, compile_table, tables
from fastdiff.bench.words import escape
from tests.bench.reports import (
    COMMITTED,
    HOSTILE,
    REPORTS,
    bare,
    baseline_moved,
    committed,
    doubtful,
    hostile,
    judgement,
    wrong,
)

EVERY = {
    "committed": committed, "hostile": hostile, "moved": baseline_moved, "doubtful": doubtful, "wrong": wrong,
    "bare": bare,
}  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_every_form_of_every_report(name: str) -> None:
    report = EVERY[name]()
    before = json.dumps(report)
    assert markdown(report) == markdown(report)
    suite = ElementTree.fromstring(junit(report))
    assert int(suite.attrib["tests"]) == len(suite.findall("testcase"))
    rows = pandas.read_csv(io.StringIO(csv(report)))
    assert len(rows) == sum(len(case["arms"]) for case in (*report["images"], *report["rows"]))
    assert json.dumps(report) == before  # pure


# What it amounts to


def test_the_outcome_is_the_worst_thing_that_happened() -> None:
    words = {name: outcome(make()).word for name, make in EVERY.items()}
    assert words == {
        "committed": outcome(committed()).word, "hostile": "INVALID", "moved": "REGRESSION", "doubtful": "INVALID",
        "wrong": "INVALID", "bare": "INCOMPLETE",
    }  # fmt: skip
    report = committed()
    report["gates"] = {"key": "k", "figures": {"ops": 21}, "changes": []}
    assert outcome(report).word == "NO-CHANGE"
    report["gates"]["changes"] = [{"name": "ops", "base": 22, "head": 21, "verdict": "IMPROVEMENT"}]
    assert outcome(report).word == "IMPROVEMENT"
    report["gates"]["changes"] = None
    assert outcome(report).word == "MEASURED"
    report["unsupported"] = [{"what": "rows: x", "reason": "NotLinear"}]
    assert outcome(report).word == "INCOMPLETE"


def test_a_comparisons_word_is_its_whole_intervals() -> None:
    report = committed()
    delta = 1.02
    for one in comparisons(report):
        assert one.ratio is not None
        if one.word == "faster":
            assert one.ratio["low"] > delta
        elif one.word == "slower":
            assert one.ratio["high"] < 1 / delta
        else:
            assert one.ratio["low"] <= delta
            assert one.ratio["high"] >= 1 / delta
    assert sum(tally(report).values()) == sum(len(case["comparisons"]) for case in (*report["images"], *report["rows"]))


def test_the_headline_is_the_last_step_from_the_baseline() -> None:
    report = committed()
    step = headline(report)
    assert step is not None
    assert (step["base"], step["arm"]) == ("pipeline/eager", "tensorized/compiled")
    assert headline(bare()) is None


def test_canaries_and_gates_are_told_in_words() -> None:
    report = committed()
    report["canaries"] = {
        "a_a": judgement("NO-CHANGE", 0.001), "slower_10_percent": judgement("INVALID", None), "doubt": "",
        "total_s": {},
    }  # fmt: skip
    report["gates"] = {"key": "torch-2-cpu", "figures": {"ops": 21}, "changes": None}
    told = dict(facts(report))
    assert told["Canaries"] == (
        "the same work twice: no change, +0.1% [-0.9%, +1.1%] in time; a tenth more work: INVALID, why"
    )
    assert told["Deterministic figures"] == "1 counted; no baseline for torch-2-cpu"


def test_a_figure_that_could_not_be_measured_is_told_and_is_no_regression() -> None:
    report = committed()
    name = "launches per row: model, batch 1"
    change = {"name": name, "base": 450, "head": None, "verdict": "not measured"}
    report["gates"] = {"key": "torch-2-cuda", "figures": {"ops": 21, name: None}, "changes": [change]}
    assert (outcome(report).word, outcome(report).alarming) == ("INCOMPLETE", True)
    assert outcome(report).sentence == f"1 deterministic figure could not be measured: {name}"
    assert exit_code(report) == 4
    assert dict(facts(report))["Deterministic figures"] == (
        f"1 compared with torch-2-cuda; none moved; not measured: {name}"
    )
    assert outcomes(report)["figures: error"] == ["not measured: 450 -> None"]
    assert f"| {name} | 450 | - |  | not measured |" in markdown(report)
    report["gates"]["changes"] = None
    assert outcome(report).word == "INCOMPLETE"
    report["gates"] |= {"figures": {name: 450}, "changes": [{**change, "base": None, "head": 450}]}
    assert outcome(report).sentence.endswith("compared with the baseline, which has not measured 1, none moved")
    assert outcomes(report)["figures: skipped"] == ["not measured: None -> 450"]
    assert exit_code(report) == 0


def test_a_figure_that_the_baseline_lacks_has_not_moved_and_is_told() -> None:
    report = committed()
    change = {"name": "ops", "base": None, "head": 21, "verdict": "new"}
    report["gates"] = {"key": "torch-2-cpu", "figures": {"ops": 21, "syncs": 0}, "changes": [change]}
    assert outcome(report).word == "NO-CHANGE"
    assert outcome(report).sentence.endswith("compared with the baseline, none moved, 1 new")
    assert dict(facts(report))["Deterministic figures"] == "2 compared with torch-2-cpu; none moved, 1 new"
    report["gates"]["changes"].append({"name": "syncs", "base": 1, "head": 0, "verdict": "IMPROVEMENT"})
    assert dict(facts(report))["Deterministic figures"] == "2 compared with torch-2-cpu; 1 moved, 1 new"


def test_a_table_that_led_to_nan_is_invalid() -> None:
    report = committed()
    one = report["errors"][0]
    one["fastdiff"] = None
    assert (outcome(report).word, outcome(report).alarming) == ("INVALID", True)
    assert outcome(report).sentence == f"1 wrong answer, however fast: {one['sampler']}, tensorized"
    assert exit_code(report) == 3
    assert outcomes(report)["errors: failure"] == ["INVALID: infinities or NaN against float64"]
    assert f"| {one['sampler']}, {one['steps']} steps | {one['diffusers']:.1e} | **not finite** |" in markdown(report)


@pytest.mark.parametrize("canaries", [None, {}, {"doubt": "", "a_a": judgement("NO-CHANGE", 0.001)}])
def test_a_run_without_canaries_is_said_to_be_without(canaries: dict[str, Any] | None) -> None:
    report = committed() | {"canaries": canaries}
    assert outcome(report).sentence == f"{outcome(committed()).sentence}; {unvouched(report)}"
    assert unvouched(report) == "without canaries: nothing vouches for its times"
    assert outcomes(report)["instrument: skipped"] == [f"unvouched: {unvouched(report)}"]
    assert unvouched(committed()) == ""
    assert unvouched(bare()) == ""  # nor has it any times


# Markdown


def test_markdown_fits_a_step_summary_and_says_what_it_leaves_out() -> None:
    report = committed()
    whole = markdown(report)
    assert len(whole.encode()) < STEP_SUMMARY_BYTES
    short = markdown(report, 5000)
    assert len(short.encode()) <= 5000
    kept, note = short.rstrip().rsplit("\n\n", 1)
    assert whole.startswith(kept + "\n")
    assert note.startswith(f"Cut here: the whole page has {len(whole.encode()):,} bytes, 5,000 are allowed.")
    report["unsupported"] = [{"what": f"piece {number}", "reason": "é" * 1000} for number in range(2000)]
    assert len(markdown(report).encode()) <= STEP_SUMMARY_BYTES


def test_markdown_opens_with_the_verdict_and_keeps_every_table_whole() -> None:
    report = hostile()
    page = markdown(report)
    assert page.split("\n\n")[1].startswith("**INVALID**: 1 wrong answer, however fast: ")
    assert "<" not in page.replace("<br>", "")
    for table in tables(report):
        start = page.index(f"## {escape(table.title)}")
        lines = [line for line in page[start:].split("\n## ")[0].splitlines() if line.startswith("|")]
        assert len(lines) == len(table.rows) + 2
        assert {line.replace("\\|", "").count("|") for line in lines} == {len(table.header) + 1}


def test_the_tables_order_is_the_pages() -> None:
    titles = [table.title for table in tables(baseline_moved())]
    assert titles[0].startswith("What each step is worth")
    assert titles[1:3] == ["What changed", "Targets"]
    order = ["Images", "Operations", "Memory", "Set-up", "Compilation", "Break-even", "Fate", "Error"]
    places = [next(place for place, title in enumerate(titles) if title.startswith(name)) for name in order]
    assert places == sorted(places)


def test_compilation_pays_off_after_its_time_over_what_it_saves() -> None:
    report = bare()
    arms = {
        f"tensorized/{mode}": {"status": "ok", "reason": None, "error": 0.0, "total_s": [time_s] * 3, "loop_s": []}
        for mode, time_s in (("eager", 0.8), ("compiled", 0.4))
    }
    case = {**committed()["images"][2], "name": "x", "batch": 4, "arms": arms, "compare": [], "comparisons": []}
    what = "denoiser and step, batch 4"
    report.update(images=[case], compile_s={what: 2.05}, compile_cache={what: "cold"})
    assert break_even_table(report).rows == (("x: tensorized, batch 4", "2.0 s, cold", "100 ms", "21 images"),)
    assert compile_table(report).rows == ((what, "2.0 s", "cold"),)
    arms["tensorized/compiled"]["total_s"] = [0.9] * 3
    assert break_even_table(report).rows[0][3] == "never: no faster than eager"


def test_a_first_call_from_a_warm_cache_has_no_break_even() -> None:
    report = committed()
    report.pop("compile_cache")  # as reports are that did not record it yet
    untold = break_even_table(report).rows
    assert untold
    for row in untold:
        assert row[1].endswith(", not recorded")
        assert "images" not in row[3] or row[3].endswith(", if the cache was cold: it was not recorded")
    report["compile_cache"] = dict.fromkeys(report["compile_s"], "warm")
    for row in break_even_table(report).rows:
        assert row[1].endswith(", warm")
        assert "images" not in row[3]
        assert "TORCHINDUCTOR_CACHE_DIR" in row[3] or "never" in row[3]
    for page in (markdown(report), html(report)):
        assert "warm cache, run with an empty TORCHINDUCTOR_CACHE_DIR for it" in page


def test_what_a_gpu_did_between_blocks_is_shown() -> None:
    report = committed()
    state = {"sm_mhz": 1980, "temperature_c": 55, "throttles": ["power cap"], "foreign_processes": 0}
    other = {**state, "sm_mhz": 1755, "throttles": None, "temperature_c": None, "foreign_processes": 1}
    report["rows"][0]["arms"]["diffusers"]["gpu"] = [state, other, None]
    (table,) = [table for table in tables(report) if table.title == "The GPU between blocks"]
    name = f"{report['rows'][0]['name']}: diffusers step()"
    assert table.rows == ((name, "1755 to 1980 MHz", "55 C", "power cap in 1 of 2", "**in 1 of 2**"),)


def test_a_terminal_is_told_names_and_no_commands(capsys: pytest.CaptureFixture[str]) -> None:
    print_tables(hostile())
    printed = capsys.readouterr().out
    assert "<script>" in printed
    assert "\x1b" not in printed
    assert "\x00" not in printed


# JUnit and CSV


def outcomes(report: dict[str, Any]) -> dict[str, list[str]]:
    """The messages of failures and skips, by the kind of testcase."""
    found: dict[str, list[str]] = {}
    for case in ElementTree.fromstring(junit(report)).findall("testcase"):
        for child in case:
            if child.tag != "system-out":
                found.setdefault(f"{case.attrib['classname']}: {child.tag}", []).append(child.attrib["message"])
    return found


def test_junit_fails_what_is_wrong_and_skips_what_nobody_knows() -> None:
    report = hostile()
    found = outcomes(report)
    assert len(found["images: failure"]) == 1
    assert found["images: failure"][0].startswith("INVALID: tensorized/eager: <script>alert(1)</script>")
    assert found["pieces: error"][0].startswith("unsupported: </table>")
    assert outcomes(baseline_moved())["figures: failure"] == ["REGRESSION: 412 -> 438"]
    assert outcomes(doubtful())["instrument: failure"] == ["INVALID: a tenth more work was judged NO-CHANGE"]
    assert not any("failure" in kind for kind in outcomes(committed()))
    assert len(outcomes(wrong())["rows: failure"]) == len(committed()["rows"])


def test_junit_skips_a_case_only_if_no_comparison_came_to_a_conclusion() -> None:
    report = committed()
    skipped = len(outcomes(report).get("images: skipped", ()))
    for case in report["images"]:
        for measured in case["arms"].values():
            measured["total_s"] = [1.0, 2.0] * 10  # in step: no change
    assert "images: skipped" not in outcomes(report)
    for case in report["images"]:
        for number, measured in enumerate(case["arms"].values()):
            measured["total_s"] = [1.0 + (index + number) % 2 for index in range(20)]
    assert len(outcomes(report)["images: skipped"]) >= max(1, skipped)


def test_junit_names_a_suite_without_what_xml_cannot_write() -> None:
    report = committed() | {"suite": "mine\x07\x00<&"}
    assert ElementTree.fromstring(junit(report)).attrib["name"] == "fastdiff.bench: mine??<&"


def test_csv_has_the_figures_of_the_report() -> None:
    report = committed()
    rows = pandas.read_csv(io.StringIO(csv(report)))
    one = rows[(rows["case"] == "mixed") & (rows["ownership"] == "tensorized") & (rows["mode"] == "compiled")].iloc[0]
    (case,) = [case for case in report["images"] if case["name"] == "mixed"]
    (ratio,) = [
        known["ratio"]
        for known in case["comparisons"]
        if (known["base"], known["arm"]) == ("cloned-deepcopy/compiled", "tensorized/compiled")
    ]
    assert (one["base"], one["ratio"], one["low"]) == ("cloned-deepcopy/compiled", ratio["value"], ratio["low"])
    assert one["samples"] == len(case["arms"]["tensorized/compiled"]["total_s"])
    (first, *_) = list(csv_module.DictReader(io.StringIO(csv(hostile()))))
    assert first["model"] == first["case"] == HOSTILE


def pair(**parts: Any) -> dict[str, Any]:
    """What ab.json has of two revisions that are the same, but for `parts`."""
    same = {"judgement": judgement("NO-CHANGE", 0.001)}
    return {
        "schema": "fastdiff.ab/1", "results": {"mixed, eager": {"right": True, "reason": None}}, "failed": {},
        "changes": [], "times": {"mixed, eager": same}, "canaries": {"doubt": ""}, **parts,
    }  # fmt: skip


def outcomes_of_pair(folder: Path, **parts: Any) -> list[tuple[str, str, str]]:
    """Kind of testcase, tag and message, by way of the command."""
    (folder / "ab.json").write_text(json.dumps(pair(**parts)))
    assert main(["report", str(folder), "--junit", str(folder / "ab.xml")]) == 0
    suite = ElementTree.parse(folder / "ab.xml").getroot()
    found = [
        (case.attrib["classname"], child.tag, child.attrib["message"])
        for case in suite.findall("testcase")
        for child in case
    ]
    assert int(suite.attrib["tests"]) == len(suite.findall("testcase")) > 0
    counted = sum(int(suite.attrib[name]) for name in ("failures", "errors", "skipped"))
    assert counted == len(found)
    return found


def test_junit_of_ab_names_what_regressed_and_the_counts_that_grew_with_it(tmp_path: Path) -> None:
    assert outcomes_of_pair(tmp_path) == []
    grown = [
        {"name": "ops per row: mixed, eager", "base": 21, "head": 22, "verdict": "REGRESSION"},
        {"name": "ops per row: other, eager", "base": 21, "head": 20, "verdict": "IMPROVEMENT"},
    ]
    slower = {"mixed, eager": {"judgement": judgement("REGRESSION", 0.12)}}
    assert outcomes_of_pair(tmp_path, changes=grown, times=slower) == [
        ("figures", "failure", "REGRESSION: 21 -> 22"),
        ("times", "failure", "REGRESSION: +12.0% [+11.0%, +13.0%]; ops per row: mixed, eager 21 -> 22"),
    ]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"results": {"a": {"right": False, "reason": "differs"}}}, ("results", "failure", "INVALID: differs")),
        ({"failed": {"a": "the process ended"}}, ("cases", "error", "not measured: the process ended")),
        ({"times": {"a": {"judgement": judgement("INCONCLUSIVE", 0.01)}}}, ("times", "skipped", "INCONCLUSIVE: why")),
        ({"times": {"a": {"judgement": judgement("INVALID", None)}}}, ("times", "failure", "INVALID: why")),
        ({"canaries": {"doubt": "amiss"}}, ("instrument", "failure", "INVALID: amiss")),
        (
            {"changes": [{"name": "a", "base": 1, "head": None, "verdict": "not measured"}]},
            ("figures", "error", "not measured: 1 -> None"),
        ),
    ],
)
def test_junit_of_ab(parts: dict[str, Any], expected: tuple[str, str, str], tmp_path: Path) -> None:
    assert outcomes_of_pair(tmp_path, **parts) == [expected]


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        (pair(), (), "is of ab: expected --junit and nothing else"),
        (pair(), ("--csv", "x.csv"), "is of ab: expected --junit and nothing else"),
        ({**pair(), "times": {"a": {}}}, ("--junit", "x.xml"), "the report, times, a, judgement: missing"),
    ],
)
def test_of_ab_there_is_junit_and_nothing_else(
    content: dict[str, Any],
    options: tuple[str, ...],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "ab.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path / "ab.json"), *options])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_an_arm_is_never_called_by_anothers_mode() -> None:
    report = committed()
    (case,) = [case for case in report["images"] if case["name"] == "mixed"]
    arms = {"tensorized/step-graph": case["arms"]["tensorized/compiled"], **case["arms"]}
    case["arms"] = arms
    rows = pandas.read_csv(io.StringIO(csv(report)))
    found = rows[(rows["case"] == "mixed") & (rows["ownership"] == "tensorized")]
    assert sorted(found["mode"]) == ["compiled", "eager", "step-graph"]
    assert '<th scope="col">tensorized / step-graph</th>' in html(report)  # a column of its own


# The index and the command


def test_the_index_is_that_of_the_committed_reports() -> None:
    fresh = index(REPORTS)
    for folder in COMMITTED:
        assert f"[{folder.name}]({folder.name}/report.md)" in fresh
    assert (REPORTS / "README.md").read_text(encoding="utf-8") == fresh, fresh.splitlines()[2]


def test_the_command_writes_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"html": "<!doctype html>", "markdown": "# fastdiff", "junit": "<?xml", "csv": "created,"}
    options = [text for name in names for text in (f"--{name}", str(tmp_path / "deep" / name))]
    assert main(["report", str(COMMITTED[0]), *options]) == 0
    for name, opening in names.items():
        assert (tmp_path / "deep" / name).read_text(encoding="utf-8").lstrip().startswith(opening)
    assert capsys.readouterr().out == ""
    assert main(["report", str(COMMITTED[0] / "report.json")]) == 0
    assert "What each step is worth" in capsys.readouterr().out
    assert main(["report", str(REPORTS), "--markdown", str(tmp_path / "index.md")]) == 0
    assert (tmp_path / "index.md").read_text(encoding="utf-8") == index(REPORTS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "No such file"),
        ("{", "cut off, or no JSON"),
        ('{"benchmarks": [], "machine_info": {}}', "expected a report of fastdiff.bench, got one of pytest-benchmark"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(
    text: str | None, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(file)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_a_folder_of_reports_has_an_index_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(REPORTS), "--html", "x.html"])
    assert stopped.value.code == 2
    assert "expected --markdown, for its index, and nothing else" in capsys.readouterr().err
