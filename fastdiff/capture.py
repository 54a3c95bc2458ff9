"""Runs the step eagerly or compiled. The only file that names torch.compile."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import FunctionType
from typing import Literal

import torch

from fastdiff.denoiser import Denoiser
from fastdiff.slots import Slots
from fastdiff.step import denoise_step

Mode = Literal["eager", "compiled"]


class Steps:
    """One callable per batch size over one denoiser and its slots; a size is compiled when it is first used."""

    def __init__(self, denoiser: Denoiser, slots: Slots, mode: Mode) -> None:
        if mode not in ("eager", "compiled"):
            raise ValueError(f"mode: expected 'eager' or 'compiled', got {mode!r}")
        self.mode = mode
        self.compile_seconds: dict[int, float] = {}
        self._denoiser, self._slots = denoiser, slots
        self._steps: dict[int, Callable[[], None]] = {}

    def __call__(self, n: int) -> None:
        """Advance slots [0, n) by one row."""
        step = self._steps.get(n)
        if step is None:
            step = self._steps[n] = self._build(n)
        step()

    def _build(self, n: int) -> Callable[[], None]:
        denoiser, batch = self._denoiser, self._slots.batch(n)
        if self.mode == "eager":
            batch = batch.with_views()

        def step() -> None:
            denoise_step(denoiser, batch)

        if self.mode == "eager":
            return step
        compiled = torch.compile(_own_code(step, f"denoise_step_{n}"), fullgraph=True, dynamic=False)

        def first() -> None:
            started = time.perf_counter()
            compiled()
            self.compile_seconds[n] = time.perf_counter() - started
            self._steps[n] = compiled

        return first


def _own_code(function: Callable[[], None], name: str) -> Callable[[], None]:
    """`function` over a code object of its own: dynamo's recompile limit counts per code object."""
    code = function.__code__.replace(co_name=name)
    return FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
