"""The run that a CUDA machine is lent for: its journal, its order, its page; and all of it once on a CPU, in small."""

from __future__ import annotations

import argparse
import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.bench import gpu, gpu_suite, selftest
from fastdiff.bench.gpu import (
    Cell,
    Journal,
    add_arguments,
    cells_of,
    code,
    main,
    measure,
    measure_apart,
    run,
    wait_for_all,
)
from fastdiff.bench.gpu_arms import (
    Arm,
    DiffusersRows,
    Entry,
    ModelAlone,
    SlotRows,
    Work,
    longest,
    measure_rows,
    traced_calls,
)
from fastdiff.bench.gpu_cells import GRAPH_ARMS
from fastdiff.bench.gpu_report import markdown, outcomes
from fastdiff.bench.gpu_settings import Settings
from fastdiff.bench.gpu_tests import read_junit, read_log
from fastdiff.bench.loop import cloned_deepcopy, shared
from fastdiff.bench.rows import null_model
from fastdiff.bench.words import NEEDS_CUDA
from fastdiff.capture import Steps
from fastdiff.models.geometries import Inputs, geometry
from fastdiff.plan import CapturePlan
from fastdiff.profile import Kernel
from fastdiff.slots import Slots

ROOT = Path(__file__).parents[2]
RULE = Settings(torch.device("cpu"), True, Path()).rule


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.jsonl")


def cell(name: str, *entries: Entry, then: BaseException | None = None) -> Cell:
    def entered() -> Iterator[Entry]:
        yield from entries
        if then is not None:
            raise then

    return Cell("A", name, entered)


NOTE = {"kind": "note", "value": 0.1 + 0.2}


# The journal


def test_a_cut_in_the_middle_of_a_cell_loses_nothing_and_the_next_run_goes_on_there(journal: Journal) -> None:
    cells = [cell("one", NOTE), cell("two", NOTE, then=KeyboardInterrupt()), cell("three", NOTE)]
    with pytest.raises(KeyboardInterrupt):
        run(cells, journal)
    assert [(one["event"], one.get("cell")) for one in journal.read()] == [
        ("start", "one"), ("entry", "one"), ("end", "one"), ("start", "two"), ("entry", "two"), ("end", "two"),
    ]  # fmt: skip
    assert journal.read()[4]["entry"] == NOTE
    assert outcomes(journal.read()) == {"one": "ok", "two": "cut"}
    before = len(journal.read())
    run([cells[0], cell("two", NOTE), cells[2]], journal)
    assert outcomes(journal.read()) == {"one": "ok", "two": "ok", "three": "ok"}
    assert [one["cell"] for one in journal.read()[before:] if one["event"] == "start"] == ["three", "two"]


def test_a_cell_that_raises_is_journalled_and_tried_again_by_the_next_run(journal: Journal) -> None:
    cells = [cell("one", NOTE, then=RuntimeError("no such kernel")), cell("two")]
    run(cells, journal)
    assert outcomes(journal.read()) == {"one": "failed", "two": "ok"}
    (end,) = (one for one in journal.read() if one["event"] == "end" and one["cell"] == "one")
    assert end["reason"].endswith("RuntimeError: no such kernel")
    assert "test_gpu.py" in end["reason"]
    run([cell("one", NOTE)], journal)
    assert outcomes(journal.read()) == {"one": "ok", "two": "ok"}


def test_a_torn_line_is_dropped_and_the_journal_goes_on_behind_the_last_whole_one(journal: Journal) -> None:
    journal.append(event="start", cell="one")
    whole = journal.read()
    with journal.path.open("ab") as file:
        file.write(b'{"event": "entry", "cell": "on')
    assert journal.read() == whole
    journal.append(event="end", cell="one", status="ok", reason=None, seconds=1.0)
    assert [one["event"] for one in journal.read()] == ["start", "end"]


def test_what_json_cannot_hold_is_an_error_of_the_cell_that_says_it(journal: Journal) -> None:
    run([cell("one", {"kind": "note", "value": float("nan")})], journal)
    assert outcomes(journal.read()) == {"one": "failed"}


# Order, and what is left


def test_what_failed_or_was_cut_comes_after_what_was_not_reached_and_alone_if_asked_for(journal: Journal) -> None:
    cells = [cell("one", then=RuntimeError("red")), cell("two", NOTE), cell("three", NOTE)]
    run(cells[:2], journal)
    before = len(journal.read())
    run(cells, journal)
    assert [one["cell"] for one in journal.read()[before:] if one["event"] == "start"] == ["three", "one"]
    run(cells[1:2], journal, again=True)
    assert [one["cell"] for one in journal.read() if one["event"] == "start"][-1] == "two"


def test_a_cell_is_given_its_own_limit_or_what_is_left(journal: Journal) -> None:
    limits = []

    def apart(one: Cell, journal: Journal, limit_s: float) -> None:
        limits.append(limit_s)
        measure(one, journal)

    cells = [replace(cell("one"), max_s=5.0), replace(cell("too long"), max_s=500.0), replace(cell("two"), max_s=90.0)]
    run(cells, journal, 60.0, apart)
    assert limits[0] == 5.0
    assert 45 < limits[1] < 60
    assert outcomes(journal.read()) == {"one": "ok", "two": "ok"}


def test_cells_come_by_tier_and_every_geometry_at_its_cheapest_first() -> None:
    settings = Settings(torch.device("cpu"), True, Path())
    every = cells_of("CBA", settings)
    assert [one.tier for one in every] == sorted(one.tier for one in every)
    assert len({one.name for one in every}) == len(every)
    names = [one.name for one in every]
    assert names[:5] == ["CUDA tests", "ceilings", "null model x 1", "dit-xl-256 x 1", "sd15-512 x 1"]
    assert names[5:9] == ["null model x 8", "dit-xl-256 x 8", "sd15-512 x 8", "graphs of sd15-512"]
    assert [one.name for one in every if one.tier == "B"][-3:] == ["null model x 4", "dit-xl-256 x 4", "sd15-512 x 4"]
    assert names[-2:] == [f"{name} x 1, max-autotune-no-cudagraphs" for name in ("dit-xl-256", "sd15-512")]
    assert all(one.max_s < 600 for one in every)  # none may hang for as long as a run takes
    assert [one.name for one in cells_of("B", settings)] == [one.name for one in every if one.tier == "B"]


def test_cells_that_the_budget_does_not_reach_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--device", "cpu", "--tiny", "--out", str(tmp_path / "out"))
    assert main(parsed(*options, "--list")) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "A  not reached sd15-512 x 8" in listed
    assert not (tmp_path / "out").exists()
    assert main(parsed(*options, "--budget-s", "1e-9")) == 4
    page = capsys.readouterr().out
    for line in listed:
        assert f"- tier A, {line[15:]}: not reached" in page
    assert (tmp_path / "out" / "report.md").read_text() == page


def test_cells_are_listed_on_any_machine_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(parsed("--list", "--tier", "ABC", "--out", str(tmp_path / "out"))) == 0
    assert "flux-dev-1024 x 1" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--tier", "D"), "expected A, B, C or several of them, got 'D'"),
        (("--budget-s", "0"), "expected seconds > 0, got '0'"),
        (("--device", "cpu", "--tiny", "--cell", "nothing"), "--cell: expected a name that --list --tier ABC shows"),
        (("--device", "cpu"), "expected a CUDA device for real geometries; on a CPU add --tiny"),
    ],
)
def test_bad_arguments(
    arguments: tuple[str, ...], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(parsed("--out", str(tmp_path), *arguments))
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("changed", [{"torch": "1.0"}, {"gpu": "NVIDIA H200"}])
def test_a_journal_of_other_settings_is_refused(
    changed: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = parsed("--device", "cpu", "--tiny", "--budget-s", "1e-9", "--out", str(tmp_path))
    main(options)
    journal = Journal(tmp_path / "journal.jsonl")
    (begun,) = journal.read()
    assert begun["settings"]["gpu"] is None
    journal.append(**begun | {"settings": begun["settings"] | changed})
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert stopped.value.code == 2
    assert "name another folder" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "limit_s", "status"), [("ceilings", 120.0, "unsupported"), ("ceilings", 0.1, "cut")])
def test_a_cell_in_a_process_of_its_own(name: str, limit_s: float, status: str, journal: Journal) -> None:
    out = str(journal.path.parent)
    measure_apart(parsed("--device", "cpu", "--tiny", "--out", out), cell(name), journal, limit_s)
    assert outcomes(journal.read()) == {name: status}


def test_a_process_that_dies_is_journalled_as_that(journal: Journal) -> None:
    out = str(journal.path.parent)
    measure_apart(parsed("--device", "cpu", "--tiny", "--out", out), cell("none of that name"), journal, 120.0)
    (end,) = journal.read()
    assert (end["status"], end["reason"]) == ("failed", "its process ended with code 1")


def test_a_process_that_dies_before_its_start_takes_no_good_end_from_its_cell(journal: Journal) -> None:
    measured = records_of("one", *made_up())
    died = {**measured[-1], "status": "failed", "reason": "its process ended with code 1"}
    assert outcomes([*measured, died]) == {"one": "ok"}
    assert markdown([*measured, died]) == markdown(measured)
    assert outcomes([*measured, died, died]) == {"one": "ok"}
    assert outcomes([died, *measured]) == {"one": "ok"}
    for record in [*measured, died]:
        journal.append(**record)
    before = len(journal.read())
    run([cell("one", NOTE)], journal)
    assert len(journal.read()) == before  # nothing is missing

    # What was cut keeps its entries; what of other code begins and fails is the last word.
    cut = [*measured[:-1], {**measured[-1], "status": "cut"}]
    assert markdown([*cut, died]) == markdown(cut)
    failed = [{**measured[1], "code": "b"}, died]
    assert outcomes([*measured, died, *failed]) == {"one": "failed"}


def test_a_run_that_is_ended_journals_the_cell_that_it_was_in(journal: Journal) -> None:
    former = signal.signal(signal.SIGALRM, lambda *_: sys.exit(4))  # as `main` does of SIGTERM
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    out = str(journal.path.parent)
    try:
        with pytest.raises(SystemExit):
            measure_apart(parsed("--device", "cpu", "--tiny", "--out", out), cell("null model x 8"), journal, 120.0)
    finally:
        signal.signal(signal.SIGALRM, former)
    end = journal.read()[-1]
    assert (end["event"], end["status"], end["reason"]) == ("end", "cut", "the run ended in it")


@pytest.mark.parametrize(("ends", "limit_s", "expected"), [("sys.exit(3)", 60.0, 3), ("time.sleep(60)", 2.0, None)])
def test_nothing_that_a_process_started_outlives_it(
    ends: str, limit_s: float, expected: int | None, tmp_path: Path
) -> None:
    left = tmp_path / "pid"
    program = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path({str(left)!r}).write_text(str(child.pid))\n"
        f"{ends}\n"
    )
    assert wait_for_all([sys.executable, "-c", program], limit_s) == expected
    for _ in range(100):  # until its new parent has noticed
        if not running(int(left.read_text())):
            return
        time.sleep(0.05)
    raise AssertionError("the child lives on")


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


# Parity comes before time


def small_work(samplers: tuple[str, ...] = ("Euler", "UniPCMultistep"), steps: int = 6) -> Work:
    first = torch.randn(len(samplers), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    work = Work(samplers, steps, Inputs(first, torch.ones(2), {}, torch.ones(2)), tolerance=1e-4)
    work.settle(DiffusersRows("cloned-deepcopy", work, cloned_deepcopy, None))
    return work


def slots_of(work: Work) -> Slots:
    return Slots(CapturePlan(latent_shape=(4, 8, 8), dtype=torch.float32, batch_sizes=(2,)), "cpu")


@pytest.mark.parametrize(("steps", "calls"), [(24, 3), (4, 2), (2, 1)])
def test_a_schedule_has_a_row_for_every_call_that_is_traced(steps: int, calls: int) -> None:
    """Both halves of them: diffusers refuses a row after the last."""
    work = small_work(("FlowMatchEuler", "FlowMatchEuler"), steps)
    arm = DiffusersRows("cloned-deepcopy", work, cloned_deepcopy, None)
    assert traced_calls(arm, work) == calls
    arm.start()
    arm.run(2 * calls)
    with pytest.raises(IndexError):
        arm.run(steps - 2 * calls + 1)


@pytest.mark.parametrize("wrong", ["stands still", "stops short", "other answer", "nan"])
def test_a_wrong_arm_is_invalid_and_not_timed(wrong: str) -> None:
    work = small_work()
    right, slots = slots_of(work), slots_of(work)
    calls = 0

    def planted(sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        return sample * (float("nan") if wrong == "nan" else 1.001)

    steps = Steps(planted if wrong in ("other answer", "nan") else null_model, slots)

    def step() -> None:
        nonlocal calls
        calls += 1
        if wrong != "stands still" and not (wrong == "stops short" and calls % 6 == 0):
            steps(2)

    good = Steps(null_model, right)
    arms: list[Arm] = [
        DiffusersRows("cloned-deepcopy", work, cloned_deepcopy, None),
        SlotRows("good", work, right, lambda: good(2)),
        SlotRows("planted", work, slots, step),
    ]
    pairs = [("cloned-deepcopy", "good"), ("cloned-deepcopy", "planted")]
    with torch.no_grad():
        entry = measure_rows(arms, work, pairs, RULE, {"absent": "not here"})
    assert calls == 6  # checked, and never again
    assert entry["arms"]["planted"]["status"] == "INVALID"
    assert entry["arms"]["planted"]["row_s"] == []
    assert entry["arms"]["absent"] == {"status": "unsupported", "reason": "not here"}
    assert entry["pairs"] == [["cloned-deepcopy", "good"]]
    assert len(entry["arms"]["good"]["row_s"]) == len(entry["arms"]["cloned-deepcopy"]["host_s"]) == 2
    assert [name for name, arm in entry["arms"].items() if arm["status"] == "ok"] == ["cloned-deepcopy", "good"]
    json.dumps(entry, allow_nan=False)
    page = markdown(records_of("one", {"model": "null model", **entry}))
    assert "- planted: INVALID: differs from the reference by" in page
    assert "- one: planted: INVALID: differs" in page.partition("## one")[0]


def test_an_arm_that_goes_wrong_while_it_is_timed_has_no_times() -> None:
    """Right when it is checked first, and for one schedule more: a graph of weights that moved away, say."""
    work = small_work()
    slots, calls = slots_of(work), 0
    good = Steps(null_model, slots)

    def step() -> None:
        nonlocal calls
        calls += 1
        if calls <= 2 * work.steps:
            good(2)

    arms: list[Arm] = [
        DiffusersRows("cloned-deepcopy", work, cloned_deepcopy, None), SlotRows("planted", work, slots, step),
    ]  # fmt: skip
    with torch.no_grad():
        entry = measure_rows(arms, work, [("cloned-deepcopy", "planted")], RULE)
    assert calls > 2 * work.steps
    assert entry["arms"]["planted"]["status"] == "INVALID"
    assert entry["arms"]["planted"]["row_s"] == []
    assert entry["pairs"] == []
    assert entry["arms"]["cloned-deepcopy"]["status"] == "ok"


def test_one_scheduler_for_all_is_right_while_they_sample_alike() -> None:
    work = small_work(("UniPCMultistep", "UniPCMultistep"))
    arms = [
        DiffusersRows("shared", work, shared, None, together=True),
        DiffusersRows("cloned-deepcopy", work, cloned_deepcopy, None),
    ]
    entry = measure_rows(arms, work, [], RULE)
    assert [arm["status"] for arm in entry["arms"].values()] == ["ok", "ok"]


def test_an_arm_may_err_twice_as_much_as_the_usual_one() -> None:
    """All of them against a reference of more digits."""
    samplers, first = ("DPMSolverMultistep",), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def work_of(sample: Tensor) -> Work:
        return Work(samplers, 6, Inputs(sample, torch.ones(1), {}, torch.ones(1)))

    work = work_of(first.bfloat16())
    usual = DiffusersRows("usual", work, cloned_deepcopy, null_model)
    work.settle(DiffusersRows("float32", work_of(first.bfloat16().float()), cloned_deepcopy, null_model))
    work.allow(2.0, usual)
    usual.start()
    usual.run(work.steps)
    assert 1e-4 < work.tolerance == 2 * usual.error() < 0.1
    coarse = DiffusersRows("coarse", work, cloned_deepcopy, lambda sample, *_: sample * (1 + 4 * work.tolerance))
    arms = measure_rows([usual, coarse], work, [], RULE)["arms"]
    assert [arm["status"] for arm in arms.values()] == ["ok", "INVALID"]


def test_a_model_alone_is_held_against_its_own_output() -> None:
    work = small_work()
    expected = null_model(*work.inputs)
    alone = ModelAlone(lambda sample, *_: sample * 1.01, work.inputs, expected, 0.02)
    alone.run(1)
    assert alone.error() == pytest.approx(0.01, rel=1e-3)
    assert measure_rows([alone], work, [], RULE)["arms"]["model/graph"]["status"] == "ok"  # by its own tolerance


# The page


def records_of(name: str, *entries: Entry, status: str = "ok", tiny: bool = False) -> list[dict[str, Any]]:
    planned = [{"tier": "A", "cell": name}, {"tier": "B", "cell": "never begun"}]
    run_of = {
        "settings": {"device": "cuda", "gpu": "NVIDIA H200", "tiny": tiny},
        "machine": "a machine",
        "commit": "c0ffee",
    }
    return [
        {"event": "run", "at": "today", **run_of, "cells": planned},
        {"event": "start", "cell": name, "code": "a"},
        *({"event": "entry", "cell": name, "entry": entry} for entry in entries),
        {"event": "end", "cell": name, "status": status, "reason": None, "seconds": 12.0},
    ]


def made_up_arm(row_s: float) -> Entry:
    jitter = [row_s * (1 + step / 1000) for step in range(8)]
    return {
        "status": "ok", "reason": None, "error": 0.01, "row_s": jitter, "host_s": [1e-5] * 8, "start_s": [1e-3] * 8,
    }  # fmt: skip


def made_up(**changes: float) -> list[Entry]:
    """What an H200 could say of SD 1.5; every figure is invented."""
    times = {
        "cloned-deepcopy/eager": 16e-3, "cloned-deepcopy/compiled": 8e-3, "tensorized/compiled": 8e-3,
        "tensorized/step-graph": 4.2e-3, "model/graph": 4.195e-3, **changes,
    }  # fmt: skip
    built = {"compile_s": 0.0, "warm_up_s": 0.5, "capture_s": 0.5, "torch_bytes": 137_000_000, "driver_bytes": 9_000}
    seen = {"launches": 450.0, "device_s": 4e-3, "syncs": 0, "allocations": 3}
    return [
        {"kind": "built", "arm": "tensorized/compiled", **built, "compile_s": 40.0},
        {"kind": "built", "arm": "tensorized/step-graph", **built},
        {
            "kind": "rows", "model": "sd15-512", "compile": "default", "batch": 1, "samplers": ["Euler"], "rows": 8,
            "tolerance": 0.1, "level": 0.99, "pairs": [["cloned-deepcopy/eager", "tensorized/step-graph"]],
            "arms": {name: made_up_arm(row_s) for name, row_s in times.items()},
        },
        {
            "kind": "profile", "n": 1, "gpu": "NVIDIA H200", "operations": 759, "flops": 1.6e12, "regime": None,
            "floor_s": 2e-3, "roofline_s": 2.9e-3, "step_bytes": 860_000,
        },
        {"kind": "observed", "samplers": ["Euler"], "rows": 8, "arms": {"tensorized/step-graph": seen}},
    ]  # fmt: skip


def lines_with(page: str, *texts: str) -> list[str]:
    return [line for line in page.splitlines() if all(text in line for text in texts)]


def test_the_page_is_a_function_of_the_journal_alone_and_changes_nothing_in_it() -> None:
    records = records_of("sd15-512 x 1", *made_up())
    before = copy.deepcopy(records)
    assert markdown(records) == markdown(json.loads(json.dumps(records)))
    assert records == before


def test_figures_stand_beside_their_targets() -> None:
    page = markdown(records_of("sd15-512 x 1", *made_up()))
    (row,) = lines_with(page, "sd15-512 x 1: a step graph's row", "4.3 ms")
    assert row.endswith("| &lt;= 4.3 ms | met |")
    (overhead,) = lines_with(page, "beyond the model's graph")
    assert "5.02 us [" in overhead
    assert overhead.endswith("| &lt;= 10 us | met |")
    (host,) = lines_with(page, "host time of it")
    assert "10 us" in host
    (syncs,), (allocations,) = (
        lines_with(page, "syncs of its schedule"),
        lines_with(page, "allocations of its schedule"),
    )
    assert syncs.endswith("| 0 (Euler) | 0 | met |")
    assert allocations.endswith("| 3 (Euler) | 0 | **not met** |")
    slow = markdown(records_of("sd15-512 x 1", *made_up(**{"tensorized/step-graph": 5e-3})))
    assert len(lines_with(slow, "| **not met** |")) == 3  # the row, its overhead, the allocations


def test_of_many_samplers_the_worst_is_held_against_the_target() -> None:
    entries = [
        {
            "kind": "rows", "model": "null model", "batch": 8, "samplers": [sampler] * 8, "rows": 48, "tolerance": 1e-4,
            "level": 0.99, "pairs": [], "arms": {"tensorized/step-graph": made_up_arm(row_s)},
        }
        for sampler, row_s in (("Euler", 8e-6), ("UniPCMultistep", 12e-6), ("FlowMatchEuler", 7e-6))
    ]  # fmt: skip
    (row,) = lines_with(markdown(records_of("null model x 8", *entries)), "null model x 8: a step graph's row")
    assert row.endswith("| 12 us (UniPCMultistep) | &lt;= 10 us | **not met** |")


def test_arms_ratios_and_break_even_are_on_the_page() -> None:
    page = markdown(records_of("sd15-512 x 1", *made_up()))
    (row,) = lines_with(page, "| tensorized/step-graph | 4.2")
    assert "| 2.11 | 10 us | 450 | 95% | 0 | 0.375 | 1 ms | 0.01 | cloned-deepcopy/eager 3.81" in row
    assert "Against cloned-deepcopy/eager, 41 s of set-up are paid back after 69.2 images of 50 rows." in page
    assert "Against cloned-deepcopy/compiled, 1 s of set-up are paid back after 5.24 images of 50 rows." in page


def test_cells_that_never_began_or_did_not_end_well_are_on_the_page() -> None:
    page = markdown(records_of("sd15-512 x 1", *made_up()[:2], status="cut"))
    assert "- tier A, sd15-512 x 1: cut: the run ended in it" in page
    assert "- tier B, never begun: not reached" in page
    assert "| tensorized/compiled | 40 s |" in page  # what was measured before the cut


def test_a_cell_that_was_cut_earlier_than_before_keeps_what_it_had_unless_the_code_changed() -> None:
    first, second = (records_of("sd15-512 x 1", *entries, status="cut") for entries in (made_up(), made_up()[:1]))
    assert "paid back" in markdown(first + second)
    assert "## sd15-512 x 1 (cut, 12 s)" in markdown(first + second)
    second[1]["code"] = "b"
    page = markdown(first + second)
    assert "paid back" not in page
    assert "| tensorized/compiled | 40 s |" in page
    well = records_of("sd15-512 x 1", *made_up()[:1])
    assert outcomes(first + well) == outcomes(well + first) == {"sd15-512 x 1": "ok"}


def test_cells_of_different_code_say_so() -> None:
    one, other = records_of("sd15-512 x 1", *made_up()), records_of("dit-xl-256 x 1", *made_up())
    assert "code a" not in markdown(one + other)
    other[1]["code"] = "b"
    page = markdown(one + other)
    assert "## sd15-512 x 1 (ok, 12 s, code a)" in page
    assert "## dit-xl-256 x 1 (ok, 12 s, code b)" in page
    assert len(code()) == 12


def test_pools_are_held_against_the_largest_batch_and_tiny_figures_say_what_they_are() -> None:
    size = {"compile_s": 0, "warm_up_s": 0.1, "capture_s": 0.2, "torch_bytes": 0, "driver_bytes": 50 * 2**20}
    graphs = {
        "kind": "graphs", "model": "sd15-512", "largest_alone_bytes": 1_000, "pool_bytes": 1_050, "state_bytes": 10,
        "sizes": {"1": size, "8": {**size, "torch_bytes": 1_000}},
    }  # fmt: skip
    page = markdown(records_of("graphs of sd15-512", graphs, tiny=True))
    assert lines_with(page, "pool of all sizes over that of 8 alone", "| 1.050 | &lt;= 1.10 | met |")
    assert lines_with(page, "the most that a further size takes", "| 50.0 MiB (of 1) | &lt;= 40.0 MiB | **not met** |")
    assert "tiny: toy models, the times say nothing" in page


def test_test_results_are_read_with_every_failure() -> None:
    read = read_junit(
        "<testsuites><testsuite><testcase classname='a' name='good'/>"
        "<testcase classname='a' name='bad'><failure message='assert 1 == 2&#10;more'/></testcase>"
        "<testcase classname='a' name='broken'><error message='no device'/></testcase>"
        "<testcase classname='a' name='other'><skipped message='not here'/></testcase></testsuite></testsuites>"
    )
    assert read == {
        "passed": 1, "skipped": 1,
        "failures": [{"test": "a.bad", "message": "assert 1 == 2"}, {"test": "a.broken", "message": "no device"}],
    }  # fmt: skip
    page = markdown(records_of("CUDA tests", {"kind": "tests", "seconds": 3.0, "code": 1, "log_tail": [], **read}))
    assert lines_with(page, "| CUDA tests |", "1 passed, 2 failed, 1 skipped", "**not met**")
    assert "- a.bad: assert 1 == 2" in page


def test_a_cuda_test_that_failed_is_in_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"kind": "tests", "seconds": 1.0, "code": 1, "passed": 1, "skipped": 0, "log_tail": []}
    for failures, expected in (([{"test": "a.bad", "message": "no"}], 1), ([], 0)):
        tests = replace(cell("CUDA tests", {**entry, "failures": failures}), tier="A")
        monkeypatch.setattr(gpu, "cells_of", lambda tiers, settings, tests=tests: [tests])
        place = tmp_path / str(expected)
        assert main(parsed("--tiny", "--device", "cpu", "--out", str(place))) == expected
    assert "a.bad: no" in capsys.readouterr().out


def test_make_takes_no_setting_of_the_environments() -> None:
    """Such as an OUT that others empty before each command, and the journal with it."""
    command = ["make", "--dry-run", "gpu", "BUDGET=60"]
    surroundings = os.environ | {"OUT": "/nowhere", "TIER": "C", "CELL": "ceilings"}
    said = subprocess.run(command, cwd=ROOT, env=surroundings, check=True, capture_output=True, text=True).stdout
    assert "--tier A --out reports/runs/gpu --budget-s 60 \n" in said


def test_the_kernels_that_take_longest_are_told_by_name() -> None:
    found = longest([Kernel("copy", 1e-6), Kernel("conv", 4e-6), *[Kernel("gemm", 2e-6)] * 4], rows=2)
    assert [(one["kernel"], one["launches"]) for one in found] == [("gemm", 2.0), ("conv", 0.5), ("copy", 0.5)]
    assert found[0]["device_s"] == pytest.approx(4e-6)


def test_of_tests_that_ran_out_of_time_the_log_tells_how_far_they_came() -> None:
    log = "collected 3\ntests/a.py::one PASSED [ 33%]\ntests/a.py::two FAILED [ 66%]\ntests/a.py::three "
    read = read_log(log)
    assert read == {"passed": 1, "skipped": 0, "failures": [{"test": "tests/a.py::two", "message": ""}]}
    tests = {"kind": "tests", "seconds": 150.0, "code": None, "log_tail": log.splitlines()[-1:], **read}
    page = markdown(records_of("CUDA tests", tests))
    assert lines_with(page, "| CUDA tests |", "1 passed, 1 failed, 0 skipped, then out of time", "**not met**")
    assert "tests/a.py::three" in page


# All of it


@pytest.fixture
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every kind of cell that a CPU can go through the cheapest."""
    names = ("CUDA tests", "ceilings", "null model x 4", "dit-xl-256 x 1", "self-test")
    own = gpu_suite.load()
    own = replace(
        own,
        null_model=replace(own.null_model, samplers=("Euler", "UniPCMultistep")),
        cell=tuple(replace(case, tier="A") for case in own.cell if case.name in names),
    )
    monkeypatch.setattr(gpu_suite, "load", lambda: own)
    monkeypatch.setattr(selftest, "TRIAL_S", 0.0)


def test_a_run_on_a_cpu_and_a_second_one_that_finds_nothing_to_do(
    shorter: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--device", "cpu", "--tiny", "--out", str(tmp_path))
    assert main(parsed(*options)) == 0
    page = capsys.readouterr().out
    journal = Journal(tmp_path / "journal.jsonl")
    assert outcomes(journal.read()) == {
        "CUDA tests": "unsupported", "ceilings": "unsupported", "dit-xl-256 x 1": "ok", "null model x 4": "ok",
        "self-test": "ok",
    }  # fmt: skip
    entries = [one["entry"] for one in journal.read() if one["event"] == "entry"]
    built = [entry["arm"] for entry in entries if entry["kind"] == "built"]
    compiled = ["tensorized/compiled", "cloned-deepcopy/compiled", "cloned-deepcopy/reduce-overhead"]
    assert sorted(built) == sorted([*compiled, "tensorized/compiled"])
    rows = [entry for entry in entries if entry["kind"] == "rows"]
    for entry in rows:
        assert {name for name, arm in entry["arms"].items() if arm["status"] == "INVALID"} == set()
        assert all(min(arm["row_s"]) > 0 for arm in entry["arms"].values() if arm["status"] == "ok")
        assert all(set(pair) <= entry["arms"].keys() for pair in entry["pairs"])
    null = [entry for entry in rows if entry["model"] == "null model"]
    stages = [
        {name for name, arm in entry["arms"].items() if arm["status"] == "ok"}
        for entry in rows
        if entry["model"] == "tiny-dit-xl-256"
    ]
    assert [entry["samplers"] for entry in null] == [
        ["Euler"] * 4, ["UniPCMultistep"] * 4, ["Euler", "UniPCMultistep"] * 2,
    ]  # fmt: skip
    for entry in null:
        assert entry["arms"]["tensorized/compiled"]["status"] == "ok"
        assert all(entry["arms"][name] == {"status": "unsupported", "reason": NEEDS_CUDA} for name in GRAPH_ARMS)
    eager = "cloned-deepcopy/eager"
    assert stages == [
        {eager, "tensorized/eager"}, {eager, "cloned-deepcopy/compiled", "tensorized/compiled"},
        {eager, "cloned-deepcopy/reduce-overhead"},
    ]  # fmt: skip
    assert json.loads((tmp_path / "machine.json").read_text())["gpu"] is None
    assert (tmp_path / "report.md").read_text() == page == markdown(journal.read())
    assert "two arms of the same code differ by" in page

    begun = sum(one["event"] == "start" for one in journal.read())
    assert main(parsed(*options)) == 0
    assert sum(one["event"] == "start" for one in journal.read()) == begun
    assert main(parsed(*options, "--cell", "ceilings")) == 0
    assert [one["cell"] for one in journal.read() if one["event"] == "start"][begun:] == ["ceilings"]
    capsys.readouterr()
    main(parsed(*options, "--list"))
    assert "A  ok          dit-xl-256 x 1" in capsys.readouterr().out


# CUDA


def on_cuda(name: str, tmp_path: Path) -> list[Any]:
    (cell,) = (one for one in cells_of("ABC", Settings(torch.device("cuda", 0), True, tmp_path)) if one.name == name)
    with torch.no_grad():
        return list(cell.measure())


@pytest.mark.cuda
def test_a_shared_scheduler_keeps_what_a_request_left_and_a_clone_does_not(tmp_path: Path) -> None:
    held = {
        (one["sampler"], one["ownership"]): one
        for one in on_cuda("schedulers by ownership", tmp_path)
        if one["shape"].startswith("SD 1.5")
    }
    assert held["UniPCMultistep", "shared"]["after_bytes"] > 4 * 64 * 64 * 2
    for sampler in ("Euler", "DPMSolverMultistep", "UniPCMultistep"):
        assert held[sampler, "cloned-deepcopy"]["after_bytes"] == held[sampler, "cloned-shallow"]["after_bytes"] == 0
        slot = held[sampler, "tensorized"]
        assert slot["before_bytes"] == slot["after_bytes"] > 0


@pytest.mark.cuda
def test_the_bytes_of_graphs_are_told_by_phase_and_size(tmp_path: Path) -> None:
    *phases, last = on_cuda("graphs of dit-xl-256", tmp_path)
    (graphs,) = (one for one in phases if one["kind"] == "graphs")
    sizes = geometry("tiny-dit-xl-256", "cpu", torch.bfloat16).plan.batch_sizes
    assert graphs["sizes"].keys() == {str(n) for n in sizes}
    assert graphs["pool_bytes"] >= graphs["largest_alone_bytes"] > 0
    assert last["phase"] == "graphs and slots released"
    held = {one["phase"]: one["reserved_bytes"] for one in (*phases, last) if one["kind"] == "phase"}
    assert held["model loaded"] <= held["graphs and slots released"] < held["all batches captured"]


@pytest.mark.cuda
def test_ceilings_are_measured(tmp_path: Path) -> None:
    (entry,) = on_cuda("ceilings", tmp_path)
    assert len(entry["product_s"]) == len(entry["copy_s"]) == 10
    assert min(entry["product_s"] + entry["copy_s"]) > 0
