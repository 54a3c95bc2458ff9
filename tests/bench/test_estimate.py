"""What `--dry-run` goes by: the newest report of the same work, and of no other."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.bench import schema
from fastdiff.bench.__main__ import main
from fastdiff.bench.machine import fingerprint
from fastdiff.bench.suite import load
from tests.bench.reports import committed

SUITE = """
threads = 1
row_max_s = 2

[[row]]
name = "mine"
samplers = ["Euler"]
latent_shape = [4, 8, 8]
"""
WRONG: dict[str, Any] = {"status": "INVALID", "reason": "why", "error": None, "total_s": [], "loop_s": []}
ROW = {"arms": {"diffusers": WRONG}, "comparisons": []}
TITLES = ("deterministic figures", "rows: mine", "canaries")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a suite of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(SUITE)
    return tmp_path


def keep(folder: Path, name: str, took_s: float, **changes: Any) -> None:
    """A report of that suite, each piece of which took so long."""
    report = committed()
    rows = [{**ROW, **asdict(case)} for case in load("mine.toml").row]
    report.update(suite="mine", rows=rows, images=[], created="2030-01-02")
    report["seconds"]["pieces"] = dict.fromkeys(TITLES, took_s)
    report.update(changes)
    place = folder / "reports" / name
    place.mkdir(parents=True)
    (place / "report.json").write_text(json.dumps(schema.document(report)))


def planned(capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    assert main(["--suite", "mine.toml", "--dry-run", *options]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_newest_report_of_the_same_work_tells_how_long(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep(folder, "a", 9.0)
    keep(folder, "b", 7.0, created="2030-01-03")
    keep(folder, "c", 5.0, created="2029-12-31")
    (folder / "reports" / "broken").mkdir()
    (folder / "reports" / "broken" / "report.json").write_text("{")
    *pieces, total = planned(capsys)
    assert pieces == [f"     7 s  {title}" for title in TITLES]
    assert total.startswith("3 pieces, about 21 s in all: what they took in reports/b of 2030-01-03, on ")
    assert f"(fingerprint {committed()['machine']['id']})" in total
    assert planned(capsys, "-k", "mine")[-1].startswith("2 pieces, about 14 s in all")


def test_runs_that_are_not_kept_count_and_those_of_this_machine_come_first(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {**committed()["machine"], "cpu": "another"}
    keep(folder, "kept", 9.0, machine=other, created="2030-01-09")
    keep(folder, "runs/1", 7.0, machine=fingerprint(torch.device("cpu")), created="2030-01-03")
    keep(folder, "runs/2", 5.0, machine=fingerprint(torch.device("cpu")))
    keep(folder, "runs/3", 3.0, machine=other, created="2030-01-10")
    assert "21 s in all: what they took in reports/runs/1 of 2030-01-03" in planned(capsys)[-1]
    shutil.rmtree(folder / "reports" / "runs" / "1")
    shutil.rmtree(folder / "reports" / "runs" / "2")
    assert "9 s in all: what they took in reports/runs/3 of 2030-01-10, on another" in planned(capsys)[-1]


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"suite": "other"}, ()),
        ({"seconds": {"all": 9.0, "compile": 0.0, "pieces": {"rows: mine": 9.0}}}, ()),
        ({"settings": {**committed()["settings"], "device": "cuda:0"}}, ()),
        ({"model": {**committed()["model"], "name": "other"}}, ()),
        (
            {"rows": [{**ROW, **asdict(load("run").row[0]), "name": "mine"}]},
            (),
        ),
        ({}, ("--steps", "3")),
    ],
)
def test_a_report_of_other_work_tells_nothing(
    changes: dict[str, Any], options: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(folder, "a", 9.0, **changes)
    *pieces, total = planned(capsys, *options)
    assert pieces == [f"          {TITLES[0]}", f"     2 s  {TITLES[1]}", f"     5 s  {TITLES[2]}"]
    assert total.startswith("3 pieces, at most 7 s of sampling in 2 of them. ")
    assert total.endswith("has no report of the same work that tells how long.")
