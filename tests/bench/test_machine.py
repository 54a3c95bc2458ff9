"""What is read of a GPU, and why there is nothing where there is none."""

from __future__ import annotations

import sys

import pytest
import torch

from fastdiff.bench.machine import GpuState, Nvml, fingerprint, fingerprint_apart
from fastdiff.bench.measure import Sample, StopRule, Stopwatch, interleave

CPU = torch.device("cpu")


def test_a_cpu_has_nothing_to_read_and_says_so() -> None:
    nvml = Nvml(CPU)
    assert nvml.reason == "cpu is no CUDA device"
    assert nvml.state() is None
    assert nvml.process_bytes() == (None, "cpu is no CUDA device")
    assert nvml.driver is None
    assert fingerprint(CPU)["gpu"] is None


def test_another_process_tells_the_same_of_the_machine() -> None:
    own, other = fingerprint(CPU), fingerprint_apart(CPU)
    passing = {"id", "threads", "load_average"}  # of the process, and of the moment
    assert {name: own[name] for name in own.keys() - passing} == {name: other[name] for name in own.keys() - passing}
    assert own.keys() == other.keys()


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    nvml = Nvml(torch.device("cuda"))
    assert nvml.reason == "nvidia-ml-py is missing: pip install 'fastdiff-runtime[bench]'"
    assert nvml.state() is None


@pytest.mark.parametrize(
    ("throttles", "foreign", "flags"),
    [
        ((), 0, ()),
        (("power cap", "application clocks"), 0, ()),
        (("power cap", "thermal slowdown"), 0, ("thermal slowdown",)),
        ((), 2, ("foreign process",)),
        (("hardware slowdown",), 1, ("hardware slowdown", "foreign process")),
        (None, None, ()),
    ],
)
def test_flags(throttles: tuple[str, ...] | None, foreign: int | None, flags: tuple[str, ...]) -> None:
    assert GpuState(sm_mhz=1980, temperature_c=40, throttles=throttles, foreign_processes=foreign).flags == flags


def run(device: torch.device) -> list[Sample]:
    """A few blocks of one arm, watched."""

    def block() -> Sample:
        watch = Stopwatch(device)
        with watch:
            torch.ones(1000, device=device).sum()
        return Sample(watch.seconds, gpu_s=watch.gpu_s)

    rule = StopRule(level=0.99, half_width=1.0, max_pairs=3, max_s=1.0)
    return interleave({"arm": block}, [], rule, seed=0, nvml=Nvml(device))["arm"]


def test_blocks_on_a_cpu_have_wall_time_alone() -> None:
    samples = run(CPU)
    assert len(samples) == 3
    for sample in samples:
        assert sample.total_s > 0
        assert sample.gpu_s is None
        assert sample.gpu is None


@pytest.mark.cuda
def test_blocks_on_a_gpu_have_its_clock_and_state() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    reason = Nvml(device).reason
    for sample in run(device):
        assert sample.gpu_s is not None
        assert 0 < sample.gpu_s < 1
        assert (sample.gpu is None) == (reason is not None)
        if sample.gpu is not None:  # a virtual machine's driver may not tell all: that is None, never 0
            assert sample.gpu.sm_mhz is None or sample.gpu.sm_mhz > 0
            assert sample.gpu.temperature_c is None or sample.gpu.temperature_c > 0


@pytest.mark.cuda
def test_bytes_of_this_process_or_the_reason_why_not() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    held = torch.ones(1_000_000, device=device)
    nbytes, reason = Nvml(device).process_bytes()
    assert (nbytes is None) != (reason is None)
    assert nbytes is None or nbytes > held.nbytes
