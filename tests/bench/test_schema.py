"""report.json: pytest-benchmark's tools and ours read it; what is no report is refused in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.stats import Stats

from fastdiff.bench import schema
from fastdiff.bench.schema import BadReport, benchmarks, document, load, statistics

COMMITTED = sorted((Path(__file__).parents[2] / "reports").glob("digits-cpu-*"))


def test_there_are_committed_reports() -> None:
    assert len(COMMITTED) >= 3


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_the_committed_reports_are_what_would_be_written_of_them(folder: Path) -> None:
    file = folder / "report.json"
    report = load(folder)
    assert report == load(file)
    assert json.dumps(document(report), indent=1, allow_nan=False) + "\n" == file.read_text()


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 5, 6, 7, 8, 41])
def test_the_statistics_are_pytest_benchmarks_own(rounds: int) -> None:
    times = np.random.default_rng(rounds).lognormal(0, 0.7, rounds).tolist()
    theirs: Any = Stats()  # type: ignore[no-untyped-call]  # pytest-benchmark has no types
    for time in times:
        theirs.update(time)
    ours = statistics(times)
    assert ours.pop("iterations") == 1
    expected = theirs.as_dict()
    assert ours.keys() == expected.keys()
    assert ours.pop("outliers") == expected.pop("outliers")
    assert ours == pytest.approx(expected)


def test_every_arm_that_was_timed_has_an_entry_in_seconds() -> None:
    report = load(COMMITTED[0])
    found = {one["fullname"]: one for one in benchmarks(report)}
    timed = sum(bool(arm["total_s"]) for case in (*report["images"], *report["rows"]) for arm in case["arms"].values())
    assert len(found) == timed + sum(len(one["call_s"]) for one in report["setup"])
    case = next(case for case in report["images"] if case["name"] == "mixed")
    one = found["run::mixed[tensorized/eager]"]
    times = case["arms"]["tensorized/eager"]["total_s"]
    assert one["stats"]["total"] == pytest.approx(sum(times) / case["batch"])
    assert one["extra_info"]["per"] == "image"
    assert one["extra_info"]["p99_s"] == f"n too small: {len(times)} of 459"


def test_pytest_benchmarks_own_command_compares_our_files(tmp_path: Path) -> None:
    files = [str(folder / "report.json") for folder in COMMITTED[:2]]
    columns = "--columns=median,iqr,ops,rounds,outliers"
    done = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", *files, columns, "--group-by=fullname"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Failed to load" not in done.stdout + done.stderr
    assert "run::mixed[tensorized/eager]" in done.stdout
    assert done.stdout.count("2 tests") == len(benchmarks(load(COMMITTED[0])))


def test_github_action_benchmark_finds_what_it_extracts() -> None:
    """Its `pytest` tool: name, value and unit, range and extra of each entry (src/extract.ts)."""
    for one in document(load(COMMITTED[0]))["benchmarks"]:
        stats = one["stats"]
        assert isinstance(one["fullname"], str)
        assert stats["ops"] > 0
        assert stats["stddev"] >= 0
        assert 0 < stats["mean"] < 60
        assert stats["rounds"] >= 8


def refused(tmp_path: Path, content: str | bytes) -> str:
    file = tmp_path / "report.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(BadReport) as caught:
        load(tmp_path)
    line = str(caught.value)
    assert line.startswith(f"{file}: ")
    assert "\n" not in line
    return line


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_file_that_was_cut_off_is_refused(tmp_path: Path, share: float) -> None:
    text = (COMMITTED[0] / "report.json").read_text().rstrip()
    assert "cut off, or no JSON" in refused(tmp_path, text[: int(share * len(text))])


def without(part: str) -> str:
    content = json.loads((COMMITTED[0] / "report.json").read_text())
    del content["fastdiff"][part]
    return json.dumps(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1, 2]", "got JSON that is a list"),
        ("{}", "got other JSON"),
        ('{"benchmarks": 3, "machine_info": {}}', "got other JSON"),
        ('{"benchmarks": [1], "machine_info": {}}', "a benchmark without"),
        ('{"benchmarks": [{"fullname": "x", "stats": {"median": 0}}], "machine_info": {}}', "a benchmark without"),
        ('{"fastdiff": 1}', "expected a report of schema"),
        ('{"fastdiff": {"schema": "fastdiff.bench/99"}}', "expected a report of schema 'fastdiff.bench/1'"),
        ('{"schema": "fastdiff.bench/1", "suite": "run"}', "measure again"),
        ('{"fastdiff": NaN}', "NaN is no number"),
        (b"\xff\xfe\x00", "bytes that are no text"),
        (without("images"), "a report without 'images'"),
        (without("summary"), "a report without 'summary'"),
    ],
)
def test_foreign_json_is_refused(tmp_path: Path, content: str | bytes, reason: str) -> None:
    assert re.search(re.escape(reason), refused(tmp_path, content))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadReport, match="No such file"):
        load(tmp_path)


def test_a_file_of_pytest_benchmark_is_taken_as_it_is(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "machine_info": {"node": "n"},
        "benchmarks": [{"name": "a", "fullname": "t::a", "stats": {"median": 1.0, "q1": 0.9, "q3": 1.1, "rounds": 30}}],
        "version": "5.1.0",
    }
    file = tmp_path / "0001_x.json"
    file.write_text(json.dumps(content))
    assert load(file) == {
        "schema": schema.PYTEST_BENCHMARK, "machine_info": {"node": "n"}, "benchmarks": content["benchmarks"]
    }  # fmt: skip
