"""What all cells of `bench gpu` share, and how one says that it cannot run."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from fastdiff.bench import gpu_suite
from fastdiff.bench.gpu_suite import CellCase, GpuSuite
from fastdiff.bench.measure import StopRule
from fastdiff.bench.words import NEEDS_CUDA
from fastdiff.models.geometries import Geometry, geometry


class Unsupported(Exception):
    """A cell that cannot run here, and why."""


@dataclass(frozen=True)
class Settings:
    """What all cells share."""

    device: torch.device
    tiny: bool  # whether it runs, not how fast: see GpuSuite.tiny
    out: Path
    limit_s: float = math.inf  # after which the cell's process is killed

    @property
    def on_cuda(self) -> bool:
        """Whether there is anything to measure."""
        return self.device.type == "cuda"

    @cached_property
    def suite(self) -> GpuSuite:
        """What there is to measure."""
        suite = gpu_suite.load()
        return suite.tiny() if self.tiny else suite

    @property
    def rule(self) -> StopRule:
        """When an arm has been timed often enough."""
        own = self.suite
        return StopRule(level=own.level, half_width=own.half_width, max_pairs=own.max_pairs, max_s=own.max_s)

    def require_cuda(self) -> None:
        """Raise Unsupported on any other device."""
        if not self.on_cuda:
            raise Unsupported(NEEDS_CUDA)

    def compiler(self) -> AbstractContextManager[object]:
        """What torch.compile does within: on a CPU it only traces, to show that it can."""
        return nullcontext() if self.on_cuda else torch.compiler.set_stance("default", force_backend="eager")

    def geometry(self, case: CellCase) -> Geometry:
        """The case's model, built on the device."""
        assert case.geometry is not None  # CellCase asks for it wherever it is needed
        return geometry(case.geometry, self.device, torch.bfloat16)
