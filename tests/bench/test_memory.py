"""The command in processes of its own: all phases, what they hold, and one line where it cannot be measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.bench import memory
from fastdiff.bench.memory import SCHEMA, print_report
from tests.bench.conftest import run

PHASES = ["import", "load", "warm-up", "capture", "steady", "after release"]


def test_digits_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(memory, "--batch", "2", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["schema"], report["mode"], report["batch"], report["device"]) == (SCHEMA, "eager", 2, "cpu")
    assert report["graph_bytes"] is None
    assert report["nvml_reason"] == "cpu is no CUDA device"
    phases = {phase["name"]: phase for phase in report["phases"]}
    assert list(phases) == PHASES
    held = {name: phase["tensor_bytes"] for name, phase in phases.items()}
    assert held["import"] == 0
    assert held["load"] >= report["weights_bytes"] > 0
    assert held["load"] < held["warm-up"] == held["after release"]  # what is kept is a table in the cache
    assert held["capture"] == held["steady"] >= held["warm-up"] + report["state_bytes"]
    for phase in phases.values():
        assert (
            phase["allocated_bytes"] is phase["reserved_bytes"] is phase["unseen_bytes"] is phase["nvml_bytes"] is None
        )
    if Path("/proc/self/status").exists():
        resident = [phase["rss_bytes"] for phase in report["phases"]]
        assert all(report["phases"][-1]["rss_peak_bytes"] >= nbytes > 0 for nbytes in resident)

    print_report(report)
    page = capsys.readouterr().out
    assert all(f"{name}: " in page for name in PHASES)
    assert "resident host memory of the process (RSS)" in page
    assert "allocated by torch" not in page
    assert "Nothing from NVML: cpu is no CUDA device." in page


def test_graphs_without_cuda_are_an_error_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(memory, "--batch", "1", "--mode", "step-graph", "--compile", "none") == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("not measured: fastdiff.errors.CannotCapture: CUDA graphs need a CUDA device")


def test_a_folder_that_holds_no_pipeline_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert run(memory, str(tmp_path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path} is not a saved diffusers pipeline" in line


def made_up() -> dict[str, Any]:
    """A report as a GPU would make it; every figure is invented."""
    phase = {
        "what": "invented", "tensor_bytes": 1_000_000, "rss_bytes": 2_000_000, "rss_peak_bytes": 3_000_000,
        "allocated_bytes": 4_000_000, "allocated_peak_bytes": 5_000_000, "reserved_bytes": 6_000_000,
        "reserved_peak_bytes": 7_000_000, "unseen_bytes": 8_000_000, "nvml_bytes": None,
    }  # fmt: skip
    pools = {"0.0": 9_000_000}
    return {
        "model": "made up [a name]", "device": "NVIDIA H200", "mode": "step-graph", "batch": 2, "weights_bytes": 10_000,
        "state_bytes": 20_000, "graph_bytes": {"1": 30_000, "2": 40_000}, "foreign_processes": 3,
        "nvml_reason": "no such process",
        "phases": [
            {"name": "load", **phase, "pool_bytes": pools},
            {"name": "capture", **phase, "pool_bytes": {**pools, "0.1": 11_000_000}},
        ],
    }  # fmt: skip


def test_the_page_of_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(made_up())
    page = capsys.readouterr().out
    for text in (
        "made up [a name], step-graph, 2 slots, NVIDIA H200", "reserved in pool 0.1", "10.5 MiB", "6.7 MiB",
        "The graph of batch size 2: 39.1 KiB", "Nothing from NVML: no such process.",
        "Other processes on the device: 3.",
    ):  # fmt: skip
        assert text in page
    assert "by NVML" not in page


@pytest.mark.cuda
def test_digits_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(memory, "--device", "cuda", "--batch", "2", "--compile", "none", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["device"] == torch.cuda.get_device_name()
    assert report["graph_bytes"].keys() == {"1", "2"}
    phases = {phase["name"]: phase for phase in report["phases"]}
    assert list(phases) == PHASES
    assert phases["load"]["pool_bytes"].keys() <= {"0.0"}
    assert phases["capture"]["pool_bytes"].keys() > {"0.0"}
    assert phases["capture"]["unseen_bytes"] >= phases["load"]["unseen_bytes"] > 0
    assert phases["after release"]["pool_bytes"].keys() == {"0.0"}
    assert phases["after release"]["allocated_bytes"] == phases["warm-up"]["allocated_bytes"]
    for phase in phases.values():
        assert phase["allocated_peak_bytes"] >= phase["allocated_bytes"] >= phase["tensor_bytes"]
        assert sum(phase["pool_bytes"].values()) == phase["reserved_bytes"] >= phase["allocated_bytes"]
