"""Runs the arms of a cell turn by turn in random order, and keeps every raw sample."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fastdiff.bench.machine import GpuState, Nvml
from fastdiff.bench.stats import Ratio, pairs_needed, ratio


class Stopwatch:
    """Adds up the time inside its `with` blocks; work on a CUDA device is waited for at both ends.

    There `gpu_s` is the same by the device's clock, from events on the stream that the work is launched on.
    A plain object, because a generator's context manager costs as much as a row after a real model call.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events = (
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            if device.type == "cuda"
            else None
        )
        self._started = self._gpu_s = self.seconds = 0.0

    @property
    def gpu_s(self) -> float | None:
        """The time by the device's own clock; None without CUDA."""
        return None if self._events is None else self._gpu_s

    def __enter__(self) -> None:
        if self._events is not None:
            torch.cuda.synchronize(self._device)
            self._events[0].record(torch.cuda.current_stream(self._device))
        self._started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if self._events is None:
            self.seconds += time.perf_counter() - self._started
            return
        start, end = self._events
        end.record(torch.cuda.current_stream(self._device))
        torch.cuda.synchronize(self._device)
        self.seconds += time.perf_counter() - self._started
        self._gpu_s += start.elapsed_time(end) / 1e3  # milliseconds


@dataclass(frozen=True)
class Sample:
    """One block of one arm."""

    total_s: float
    loop_s: float | None = None  # the part of it spent in denoise loops, where the arm can tell
    gpu_s: float | None = None  # total_s by the device's own clock, on CUDA
    gpu: GpuState | None = None  # right after the block, on CUDA


Block = Callable[[], Sample]


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """Sampling ends when every interval is narrow enough, or at a cap; what the intervals say plays no part."""

    level: float
    half_width: float  # relative
    max_pairs: int
    max_s: float


def interleave(
    blocks: Mapping[str, Block],
    comparisons: Sequence[tuple[str, str]],
    rule: StopRule,
    seed: int,
    nvml: Nvml | None = None,
) -> dict[str, list[Sample]]:
    """Rounds of one block per arm, in an order drawn anew each round; the garbage collector rests meanwhile.

    `nvml` is asked between blocks, never while one is timed.
    """
    order = np.random.default_rng(seed)
    samples: dict[str, list[Sample]] = {name: [] for name in blocks}
    names = sorted(blocks)
    for name in names:
        blocks[name]()  # warm-up
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        for pairs in range(1, rule.max_pairs + 1):
            for index in order.permutation(len(names)):
                sample = blocks[names[index]]()
                samples[names[index]].append(replace(sample, gpu=nvml.state()) if nvml else sample)
            if pairs < pairs_needed(rule.level):
                continue
            widths = [compare(samples[base], samples[arm], rule.level).half_width for base, arm in comparisons]
            if time.perf_counter() - started > rule.max_s or (widths and max(widths) <= rule.half_width):
                break
    finally:
        if was_enabled:
            gc.enable()
    return samples


def worse(error: float, other: float) -> float:
    """The larger of two errors; none is worse than NaN."""
    return other if math.isnan(other) or other > error else error


def compare(base: Sequence[Sample], arm: Sequence[Sample], level: float) -> Ratio:
    """The paired ratio of whole blocks."""
    return ratio([sample.total_s for sample in base], [sample.total_s for sample in arm], level)
