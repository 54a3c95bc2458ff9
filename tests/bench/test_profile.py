"""The command on the shipped model's kind: what a CPU can tell, what it leaves to a GPU, and the page of both."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fastdiff.bench import profile
from fastdiff.bench.profile import measure, print_report
from fastdiff.profile import Profile, choose
from tests.bench.conftest import run


def test_json_of_a_saved_pipeline(tiny_folder: Path, tiny_pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(profile, str(tiny_folder), "--batch", "2", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    eager = Profile(**report["eager"])
    assert (report["schema"], report["model"], eager.n, eager.gpu) == ("fastdiff.profile/1", "tiny", 2, None)
    assert eager.floor_bytes > sum(one.nbytes for one in tiny_pipe.unet.parameters())
    assert report["choice"] == asdict(choose(eager))
    assert report["rows"] == 50  # of the pipeline's own DDIM
    assert report["graph"] is report["unsupported"] is None


def test_a_cpu_prints_what_it_knows_and_guesses_nothing(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(profile, str(tiny_folder)) == 0
    page = capsys.readouterr().out
    told = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in page.splitlines() if "│" in line}
    need = {label for label, figure in told.items() if figure == "needs CUDA"}
    assert need == {
        "launches: kernels, copies, fills", "device time", "device busy", "regime", "floor of any mode",
        "floor of eager mode",
    }  # fmt: skip
    assert told.keys() - need == {
        "time of a row", "host time", "operations", "FLOPs", "bytes, at the least", "bytes, operation by operation",
    }  # fmt: skip
    assert "A row of 1: tiny, float32, cpu" in page
    assert "Do graphs pay: needs CUDA: graphs need a CUDA device, and the model is not on one." in page
    assert "Break-even: needs CUDA." in page


H200 = Profile(
    n=4, gpu="NVIDIA H200", dtype="bfloat16", operations=759, launches=1100, host_s=0.015, row_s=0.016, device_s=0.005,
    busy=0.3125, flops=3_200_000_000_000, floor_bytes=1_720_000_000, traffic_bytes=9_000_000_000, floor_s=0.00405,
    roofline_s=0.0058, regime="launch-bound",
)  # fmt: skip


def made_up(**graph: Any) -> dict[str, Any]:
    """A report as an H200 would make it; every figure is invented."""
    replay = Profile(**{**asdict(H200), "host_s": 1e-5, "row_s": 0.0064, "busy": 0.78, "regime": "compute-bound"})
    captured = {"profile": asdict(replay), "gain": 2.5, "capture_s": 1.2, "nbytes": 273_000_000, **graph}
    return {
        "model": "made up [a name]", "eager": asdict(H200), "choice": asdict(choose(H200)), "rows": 50,
        "graph": captured, "unsupported": None,
    }  # fmt: skip


def test_the_page_of_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(made_up(break_even_images=10.0))
    page = capsys.readouterr().out
    for text in (
        "made up [a name]", "1100", "16 ms", "6.4 ms", "10 us", "31%", "3.2 TFLOP", "1.6 GiB", "4.05 ms",
        "Do graphs pay: yes; launch-bound: the host takes 15 ms",
        "Measured: 2.5 times as fast as a graph, for 260.4 MiB.",
        "Break-even: 1.2 s to capture, paid back after 10 images of 50 rows.",
    ):  # fmt: skip
        assert text in page
    assert "needs CUDA" not in page


def test_a_graph_that_is_never_paid_back_and_one_that_could_not_be_captured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_report(made_up(break_even_images=None))
    assert "Break-even: 1.2 s to capture, never paid back." in capsys.readouterr().out
    print_report({**made_up(), "graph": None, "unsupported": "OutOfMemory: no room"})
    assert "Not captured: OutOfMemory: no room." in capsys.readouterr().out


@pytest.mark.cuda
def test_a_gpu_captures_and_says_when_that_is_paid_back(tiny_pipe: Any) -> None:
    try:
        report = measure(tiny_pipe.to("cuda"), 2)
    finally:
        tiny_pipe.to("cpu")
    assert report["unsupported"] is None
    eager, replay = Profile(**report["eager"]), Profile(**report["graph"]["profile"])
    assert eager.launches
    assert replay.launches
    assert eager.flops == replay.flops
    assert report["graph"]["capture_s"] > 0
    saves = replay.row_s < eager.row_s
    assert (report["graph"]["break_even_images"] is not None) == saves
