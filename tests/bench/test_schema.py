"""report.json: pytest-benchmark's tools and ours read it; what is no report is refused in one line."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pytest
from pytest_benchmark.stats import Stats

from fastdiff.bench import compare as compared
from fastdiff.bench import schema
from fastdiff.bench.export import junit
from fastdiff.bench.outcome import exit_code
from fastdiff.bench.page import html
from fastdiff.bench.report import markdown
from fastdiff.bench.schema import BadReport, benchmarks, document, load, statistics
from tests.bench.reports import small

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


def extract_pytest_result(output: str) -> list[dict[str, Any]]:
    """github-action-benchmark's extractPytestResult (src/extract.ts), line by line."""
    found = []
    for bench in json.loads(output)["benchmarks"]:
        stats = bench["stats"]
        mean, unit = stats["mean"], "sec"
        for smaller in ("msec", "usec", "nsec"):
            if mean >= 1:
                break
            mean, unit = mean * 1000, smaller
        found.append(
            {
                "name": bench["fullname"], "value": stats["ops"], "unit": "iter/sec",
                "range": f"stddev: {stats['stddev']}", "extra": f"mean: {mean} {unit}\nrounds: {stats['rounds']}",
            }
        )  # fmt: skip
    return found


def test_github_action_benchmark_extracts_the_raw_samples_figures() -> None:
    report = load(COMMITTED[0])
    found = {one["name"]: one for one in extract_pytest_result((COMMITTED[0] / "report.json").read_text())}
    assert len(found) == len(benchmarks(report))  # a name twice would be one chart
    for case in report["images"]:
        for arm, measured in case["arms"].items():
            images_s = [time / case["batch"] for time in measured["total_s"]]
            one = found[f"run::{case['name']}[{arm}]"]
            assert one["value"] == pytest.approx(len(images_s) / sum(images_s))
            assert float(one["range"].removeprefix("stddev: ")) == pytest.approx(stdev(images_s))
            extra = re.fullmatch(r"mean: ([\d.]+) msec\nrounds: (\d+)", one["extra"])
            assert extra is not None
            assert float(extra[1]) == pytest.approx(1e3 * sum(images_s) / len(images_s))
            assert int(extra[2]) == len(images_s)


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


def changed(part: str, value: Any) -> str:
    content = json.loads((COMMITTED[0] / "report.json").read_text())
    content["fastdiff"][part] = value
    return json.dumps(content)


def without_reference() -> str:
    content = document(small())
    case = content["fastdiff"]["rows"][0]
    case["name"], case["arms"] = "row of one", {}
    return json.dumps(content)


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in JSON, of a list's the first."""
    inside = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for name, part in inside:
        yield (*above, name)
        yield from places(part, (*above, name))


def test_whatever_is_missing_a_report_is_refused_or_every_page_is_made_of_it(tmp_path: Path) -> None:
    """In turn, each thing in it is left out, or is something else."""
    report, file = small(), tmp_path / "report.json"
    tried, accepted, gone = 0, 0, object()
    for place in places(report):
        for other in (gone, None, {}, "x", -1):
            amiss = copy.deepcopy(report)
            inside = amiss
            for name in place[:-1]:
                inside = inside[name]
            if other is gone:
                del inside[place[-1]]
            else:
                inside[place[-1]] = other
            file.write_text(json.dumps({"fastdiff": amiss}))
            tried += 1
            with suppress(BadReport):
                read = load(file)
                for make in (markdown, html, junit, exit_code):
                    make(read)
                for pair in ((report, read), (read, report)):
                    compared.markdown(compared.compare(*pair), "base", "head")
                accepted += 1
    assert 0 < 2 * accepted < tried


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1, 2]", "got JSON that is a list"),
        ("{}", "got other JSON"),
        ('{"benchmarks": 3, "machine_info": {}}', "got other JSON"),
        ('{"benchmarks": [1], "machine_info": {}}', "benchmarks, 0: expected an object, got 1"),
        (
            '{"benchmarks": [{"fullname": "x", "stats": {"median": 0}}], "machine_info": {}}',
            "benchmarks, 0, stats, median: expected a number above 0, got 0",
        ),
        ('{"fastdiff": 1}', "expected a report of schema"),
        ('{"fastdiff": {"schema": "fastdiff.bench/99"}}', "expected a report of schema 'fastdiff.bench/1'"),
        ('{"schema": "fastdiff.bench/1", "suite": "run"}', "measure again"),
        ('{"fastdiff": NaN}', "NaN is no number"),
        (b"\xff\xfe\x00", "bytes that are no text"),
        (without("images"), "the report, images: missing"),
        (without("summary"), "the report, summary: missing"),
        (changed("machine", {}), "the report, machine, id: missing"),
        (changed("rows", [{}]), "the report, rows, 0, name: missing"),
        (without_reference(), "the report, rows, row of one: has no arm of 'diffusers'"),
        (changed("complete", 1), "the report, complete: expected true or false, got 1"),
        (changed("commit", None), "the report, commit: expected an object, got None"),
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
