"""Few-step sampling as DMD does it (Yin et al. 2024, arXiv 2405.14867): predict x0, noise it to the next timestep."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.fingerprint import fingerprint, settled
from fastdiff.intercept import Interception
from fastdiff.probe import ProbedRow, Prober, table_cache
from fastdiff.stepper import Schedule, Stepper, check_scheduler, not_linear, plain_torch
from fastdiff.table import StepTable


def renoise(scheduler: Any, timesteps: Sequence[float]) -> StepTable:
    """The table of DMD-style few-step sampling: at each timestep predict x0, then noise it to the next timestep.

    The x0 rows and the noising come from `scheduler`'s schedule over all its training timesteps, at the entry nearest
    to each of `timesteps` (as FastVideo's and SGLang's DMD stages look it up); the last row ends at x0 itself.
    One draw a row but the last. The scheduler is never changed.

    Raises NotLinear where the scheduler tells no x0, ValueError for timesteps that do not fall or are none of its own.
    """
    check_scheduler(scheduler)
    times = [float(t) for t in timesteps]
    if not times or any(later >= earlier for earlier, later in pairwise(times)):
        raise ValueError(f"timesteps: expected a falling sequence of at least one, got {times}")
    most = int(scheduler.config.num_train_timesteps)
    if not all(0 <= t <= most for t in times):
        raise ValueError(f"timesteps: expected numbers from 0 to {most}, num_train_timesteps, got {times}")
    key = fingerprint(scheduler)
    return table_cache.get((key, "renoise", tuple(times)), settled(scheduler, key, lambda: _renoise(scheduler, times)))


@plain_torch()
def _renoise(scheduler: Any, times: list[float]) -> StepTable:
    name = type(scheduler).__name__
    steps = int(scheduler.config.num_train_timesteps)
    of_all = {"original_inference_steps": steps} if hasattr(scheduler.config, "original_inference_steps") else {}
    whole = Schedule.of(scheduler, 0, {"num_inference_steps": steps} | of_all)
    entries = Stepper(scheduler, whole).timesteps
    rows: list[ProbedRow] = []
    levels: list[tuple[float, float]] = []
    for t in times:
        index = int((entries.double() - t).abs().argmin())
        stepper = Stepper(scheduler, Schedule(whole.set_timesteps, whole.step, index))
        prober = Prober(stepper, 32)
        row = prober.row(entries[index])
        if row.x0 is None:
            raise not_linear(
                f"{name} re-noised", f"it tells no x0 at timestep {t:g}", "FlowMatchEulerDiscreteScheduler or LCM"
            )
        levels.append(_noise_level(scheduler, whole, entries[index]))
        rows.append(row)
    count = len(rows)
    A, b, d, C = np.zeros((count, 1, 1)), np.zeros((count, 1)), np.zeros((count, 1)), np.zeros((count, 1, 1))
    r, x0_row = np.zeros((count, 2)), np.zeros((count, 4))
    for i, row in enumerate(rows):
        assert row.x0 is not None
        alpha, sigma = levels[i + 1] if i + 1 < count else (1.0, 0.0)
        phi = 0.0 if row.trace.phi is None else row.x0[row.trace.phi]
        x0_row[i, :3] = row.x0[0], row.x0[len(row.start)], phi
        if row.trace.r is not None:
            r[i] = row.trace.r[0], row.trace.r[len(row.start)]
        A[i], b[i], d[i], C[i] = alpha * x0_row[i, 0], alpha * x0_row[i, 1], alpha * phi, sigma
    return StepTable(
        timesteps=torch.tensor(times, dtype=torch.float32),
        c_in=torch.tensor([row.c_in for row in rows], dtype=torch.float64),
        A=torch.from_numpy(A), b=torch.from_numpy(b), d=torch.from_numpy(d), C=torch.from_numpy(C),
        r=torch.from_numpy(r),
        lo=torch.tensor([row.trace.lo for row in rows], dtype=torch.float64),
        hi=torch.tensor([row.trace.hi for row in rows], dtype=torch.float64),
        x0_row=torch.from_numpy(x0_row),
        init_noise_sigma=float(getattr(scheduler, "init_noise_sigma", 1.0)),
        draws=tuple((None,) if i + 1 < count else () for i in range(count)),
        latents=(("sample",),) * (count + 1),
        x0_source=rows[0].x0_source,
        source=f"{name} renoised",
    )  # fmt: skip


def _noise_level(scheduler: Any, schedule: Schedule, timestep: Tensor) -> tuple[float, float]:
    """(alpha, sigma) of the scheduler's own `add_noise` (or `scale_noise`) at `timestep`."""
    stepper = Stepper(scheduler, schedule)
    own = stepper.scheduler
    if hasattr(own, "_begin_index"):
        own._begin_index = None  # else add_noise takes the begin index for the timestep's
    clean, eps = torch.eye(2, dtype=torch.float64)[:, None, None, None].unbind(0)
    with Interception(clean.shape, lambda size, dtype: torch.zeros(size), torch.clamp, stepper.refuse):
        if hasattr(own, "add_noise"):
            noisy = own.add_noise(clean, eps, timestep.reshape(1))
        elif hasattr(own, "scale_noise"):
            noisy = own.scale_noise(clean, timestep.reshape(1), eps)
        else:
            raise not_linear(
                f"{stepper.name} re-noised",
                "it has neither add_noise nor scale_noise",
                "FlowMatchEulerDiscreteScheduler",
            )
    alpha, sigma = noisy.flatten().tolist()
    return alpha, sigma
