"""The cell of `bench gpu` that runs the tests marked `cuda`."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import fastdiff
from fastdiff.bench.gpu_arms import Entry
from fastdiff.bench.gpu_settings import Settings, Unsupported
from fastdiff.bench.gpu_suite import CellCase

TESTS_END_S = 15  # before their cell's limit, for it to start and to say how far they came


def cuda_tests(settings: Settings, case: CellCase) -> Iterator[Entry]:
    """The tests that are marked `cuda`, in a process of their own; those that fail are not run again with the rest."""
    settings.require_cuda()
    root = Path(fastdiff.__file__).parents[1]
    if not (root / "tests").is_dir():
        raise Unsupported(f"there are no tests beside the package in {root}")
    results, log = settings.out / "tests.xml", settings.out / "tests.log"
    results.unlink(missing_ok=True)  # an earlier attempt's
    command = [sys.executable, "-m", "pytest", "-vv", "-m", "cuda", "-p", "no:cacheprovider", "--durations=10"]
    command += ["-o", "faulthandler_timeout=90"]  # where one hangs, in the log
    # Only files that have some: the others import what such a machine may lack. The nearest to the root come first.
    files = [file for file in (root / "tests").rglob("test_*.py") if "mark.cuda" in file.read_text(encoding="utf-8")]
    command += [f"--junitxml={results.resolve()}", *map(str, sorted(files, key=lambda file: (len(file.parts), file)))]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # the log of a test that hangs ends with its name
    started, code = time.perf_counter(), None
    with log.open("w", encoding="utf-8") as output, suppress(subprocess.TimeoutExpired):  # which no code says
        code = subprocess.run(
            command, cwd=root, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False,
            timeout=max(1.0, settings.limit_s - TESTS_END_S) if math.isfinite(settings.limit_s) else None,
        ).returncode  # fmt: skip
    seconds, said = time.perf_counter() - started, log.read_text(encoding="utf-8")
    counts = read_junit(results.read_text(encoding="utf-8")) if results.exists() else read_log(said)
    yield {"kind": "tests", "seconds": seconds, "code": code, **counts, "log_tail": said.splitlines()[-5:]}
    if code not in (0, 1):  # 1: some failed, and the page says which
        ended = "was cut at its limit" if code is None else f"ended with code {code}"
        raise RuntimeError(f"pytest {ended}: see {log}")


def read_junit(text: str) -> Entry:
    """Counts, and the failures by name with the first line of what they say."""
    found: dict[str, list[Entry]] = {"passed": [], "failure": [], "error": [], "skipped": []}
    for case in ElementTree.fromstring(text).iter("testcase"):
        outcome = next((one for one in case if one.tag in found), None)
        message = (outcome.get("message") or "").partition("\n")[0] if outcome is not None else ""
        name = f"{case.get('classname')}.{case.get('name')}"
        found["passed" if outcome is None else outcome.tag].append({"test": name, "message": message})
    return {
        "passed": len(found["passed"]),
        "skipped": len(found["skipped"]),
        "failures": found["failure"] + found["error"],
    }


def read_log(text: str) -> Entry:
    """The same of pytest's log, where a run did not come to its end."""
    lines = text.splitlines()
    return {
        "passed": sum(" PASSED" in line for line in lines),
        "skipped": sum(" SKIPPED" in line for line in lines),
        "failures": [{"test": line.partition(" ")[0], "message": ""} for line in lines if " FAILED" in line],
    }
