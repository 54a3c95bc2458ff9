"""report.json: our report as "fastdiff", in a file of pytest-benchmark's form, so that its readers and ours read it.

The report holds every raw sample and is all that our pages are made of: `load` returns it. "benchmarks" beside it is
worked out from it, an entry for each case and arm that was timed, in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fastdiff.bench import shape
from fastdiff.bench.journal import REPORT
from fastdiff.bench.stats import percentile, times_needed
from fastdiff.bench.summary import Report, unit

SCHEMA = "fastdiff.bench/1"
AB = "fastdiff.ab/1"  # of ab.json, which `ab` writes
PYTEST_BENCHMARK = "pytest-benchmark"  # stands for SCHEMA in what `load` makes of a file that pytest-benchmark wrote
FORM = "5.3.1"  # the version of pytest-benchmark whose form the file has
NAMES = (REPORT, "ab.json")  # what a run's folder has one of

_RESULTS = ("arms", "comparisons", "compare", "modes", "rows", "max_s")
"""What of a case is measured, or does not change what an arm's times are of."""


class BadReport(ValueError):
    """A file that holds no report; one line says why."""


def document(report: Report) -> dict[str, Any]:
    """The report as report.json holds it."""
    return {
        "machine_info": _machine_info(report["machine"]),
        "commit_info": report["commit"],
        "benchmarks": benchmarks(report),
        "datetime": report["created"],
        "version": FORM,
        "fastdiff": report,
    }


def load(path: Path) -> dict[str, Any]:
    """The report in a file, or in a folder's report.json or ab.json. BadReport where there is none.

    A file that pytest-benchmark wrote becomes {"schema": "pytest-benchmark", "machine_info", "benchmarks"}.
    """
    inside = [path / name for name in NAMES if (path / name).exists()]
    file = [*inside, path / NAMES[0]][0] if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text, parse_constant=lambda name: _refuse(file, f"{name} is no number of a report"))
    except OSError as error:
        raise BadReport(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadReport(f"{file}: expected JSON, got bytes that are no text") from None
    except json.JSONDecodeError as error:
        raise BadReport(f"{file}: cut off, or no JSON: {error}") from None
    if not isinstance(content, dict):
        _refuse(file, f"expected a report, got JSON that is a {type(content).__name__}")
    if content.get("schema") == SCHEMA:
        _refuse(file, "a report of before reports were readable by pytest-benchmark; measure again")
    from fastdiff.bench import forms  # with pydantic, which is of the bench extra

    if "fastdiff" in content:
        return _checked(content["fastdiff"], forms.Report, file)
    if content.get("schema") == AB:
        return _fitting(content, forms.Ab, file)
    if not (isinstance(content.get("benchmarks"), list) and isinstance(content.get("machine_info"), dict)):
        _refuse(file, "expected a report of fastdiff.bench or pytest-benchmark, got other JSON")
    content = _fitting(content, forms.PytestBenchmark, file)
    return {
        "schema": PYTEST_BENCHMARK, "machine_info": content["machine_info"], "benchmarks": content["benchmarks"]
    }  # fmt: skip


def benchmarks(report: Report) -> list[dict[str, Any]]:
    """An entry per case and arm that was timed: seconds per image, per row of the whole batch, or per call."""
    return list(_benchmarks(report))


def _benchmarks(report: Report) -> Iterator[dict[str, Any]]:
    for case in (*report["images"], *report["rows"]):
        per, units = unit(case)
        for arm, measured in case["arms"].items():
            if measured["total_s"]:
                times = [seconds / units for seconds in measured["total_s"]]
                yield _benchmark(report, case["name"], arm, times, params(case), per)
    for one in report["setup"]:
        for call, times in one["call_s"].items():
            of = {"samplers": [one["sampler"]], "steps": one["steps"]}
            yield _benchmark(report, f"set-up: {one['sampler']}", call, times, of, "call")


def params(case: Report) -> dict[str, Any]:
    """What an arm's times are of: two cases with the same do the same work."""
    return {name: value for name, value in case.items() if name not in _RESULTS}


def _benchmark(
    report: Report, case: str, arm: str, times: Sequence[float], params: Mapping[str, Any], per: str
) -> dict[str, Any]:
    tails = {
        f"p{percent}_s": percentile(times, percent) or f"n too small: {len(times)} of {times_needed(percent)}"
        for percent in (90, 95, 99)
    }
    name = f"{case}[{arm}]"
    return {
        "group": case,
        "name": name,
        "fullname": f"{report['suite']}::{name}",
        "params": {**params, "name": case, "arm": arm},
        "param": arm,
        "extra_info": {"per": per, **tails},
        "options": {"disable_gc": True, "timer": "perf_counter", "warmup": True},
        "stats": statistics(times),
    }


def statistics(times_s: Sequence[float]) -> dict[str, Any]:
    """pytest-benchmark's statistics of a list of times."""
    times = np.sort(np.asarray(times_s, dtype=np.float64))
    mean, stddev = times.mean(), times.std(ddof=1) if times.size > 1 else np.float64(0)
    q1, median, q3 = np.quantile(times, (0.25, 0.5, 0.75), method="hazen")
    iqr = q3 - q1
    inside = times[(times >= q1 - 1.5 * iqr) & (times <= q3 + 1.5 * iqr)]
    far = int((abs(times - mean) > stddev).sum())
    return {
        "min": times[0].item(),
        "max": times[-1].item(),
        "mean": mean.item(),
        "stddev": stddev.item(),
        "rounds": times.size,
        "median": median.item(),
        "iqr": iqr.item(),
        "q1": q1.item(),
        "q3": q3.item(),
        "iqr_outliers": times.size - inside.size,
        "stddev_outliers": far,
        "outliers": f"{far};{times.size - inside.size}",
        "ld15iqr": inside[0].item(),
        "hd15iqr": inside[-1].item(),
        "ops": (times.size / times.sum()).item(),
        "total": times.sum().item(),
        "iterations": 1,
    }


def _machine_info(machine: Report) -> dict[str, Any]:
    """A machine in pytest-benchmark's words; its fingerprint in place of its name on the network."""
    return {
        "node": machine["id"],
        "processor": machine["cpu"],
        "machine": machine["architecture"],
        "system": machine["system"],
        "python_version": machine["python"],
        "cpu": {"arch": machine["architecture"], "brand_raw": machine["cpu"], "count": machine["cpus_usable"]},
    }


def _checked(report: Any, form: Any, file: Path) -> dict[str, Any]:
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        _refuse(file, f"expected a report of schema {SCHEMA!r}")
    fitting = _fitting(report, form, file)
    if why := shape.unmatched(fitting):
        _refuse(file, why)
    return fitting


def _fitting(content: dict[str, Any], form: Any, file: Path) -> dict[str, Any]:
    if why := shape.misfit(content, form, "the report"):
        _refuse(file, f"{why}; it is of no form that is read here")
    return content


def _refuse(file: Path, why: str) -> NoReturn:
    raise BadReport(f"{file}: {why}")
