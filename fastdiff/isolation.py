"""A certificate that no request can see its neighbours: the user's own model, asked in bits.

Most models treat the samples of a batch apart; per-tensor quantisation, experts with a capacity or a forgotten
`train()` do not, and then an image depends on who else was being served.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from fastdiff.errors import RowsCoupled
from fastdiff.slots import Slots
from fastdiff.state import RequestState
from fastdiff.stepper import plain_torch
from fastdiff.table import StepTable

Contents = Literal["own", "other", "nan"]


@dataclass(frozen=True)
class Certificate:
    """Every slot of these batch sizes kept its bits while its neighbours changed and while they held NaN."""

    batch_sizes: tuple[int, ...]
    steps: int
    seconds: float


def certify(step: Callable[[int, int], None], slots: Slots, batch_sizes: Sequence[int]) -> Certificate:
    """Run `step(n, segment)` with changed and with NaN neighbours of every slot, for each n, and compare bits.

    Raises RowsCoupled on the first difference. The slots must be idle, and are idle afterwards.
    """
    started, steps = time.perf_counter(), 0
    for segment, n in product(range(slots.plan.segments), batch_sizes):
        if n == 1:
            continue
        probe = _Probe(slots, segment)
        expected = probe.run(step, n, ["own"] * n)
        for slot in range(n):
            for neighbours in ("other", "nan"):
                held: list[Contents] = [neighbours] * n
                held[slot] = "own"
                if not torch.equal(probe.run(step, n, held)[slot], expected[slot]):
                    raise RowsCoupled(
                        f"slot {slot} of {n} changed its result when its neighbours {_SAID[neighbours]}: this model "
                        "couples the requests of a batch (per-tensor quantisation, normalisation over the batch, "
                        "experts with a capacity). Serve it with max_batch=1, or find the operation with "
                        "`python -m fastdiff.bench doctor`"
                    )
        steps += 1 + 2 * n
    for slot in range(slots.plan.max_batch):
        slots.park(slot)
    return Certificate(tuple(batch_sizes), steps, time.perf_counter() - started)


_SAID = {"other": "changed", "nan": "held NaN"}


class _Probe:
    """Requests of one row whose next latents depend on all that a slot holds."""

    def __init__(self, slots: Slots, segment: int) -> None:
        self._slots, self._segment = slots, segment
        self._table = _dense_table(slots.plan.memory, slots.plan.draws)

    def run(self, step: Callable[[int, int], None], n: int, contents: Sequence[Contents]) -> Tensor:
        """The latents [n, K, P], as integers, after one step from the given contents of slots [0, n)."""
        for slot, held in enumerate(contents):
            self._load(slot, held)
        with torch.no_grad():
            step(n, self._segment)
        memory = self._slots.plan.memory
        return torch.stack([self._slots.read(slot, memory) for slot in range(n)]).view(torch.int32)

    @plain_torch()
    def _load(self, slot: int, held: Contents) -> None:
        plan = self._slots.plan
        generator = torch.Generator().manual_seed(2 * slot + (held == "other"))

        def values(*shape: int) -> Tensor:
            return torch.full(shape, math.nan) if held == "nan" else torch.randn(shape, generator=generator)

        conditioning = {
            name: values(*spec.shape).to(spec.dtype)
            if spec.dtype.is_floating_point
            else torch.full(spec.shape, int(held != "own"), dtype=spec.dtype)  # a label: 0 and 1 are valid in any range
            for name, spec in plan.conditioning.items()
        }
        latents = values(plan.memory, *plan.latent_shape)
        state = RequestState(
            request=None, table=self._table, latents=latents, conditioning=conditioning, guidance_scale=3.0
        )
        self._slots.load(slot, state, boundary=0 if self._segment else None)
        if plan.draws:
            self._slots.put_noise(slot, 0, values(1, plan.draws, *plan.latent_shape))


@plain_torch()
def _dense_table(K: int, Z: int) -> StepTable:
    """One row in which every latent, the output, the clamped x0 and every draw reach every latent."""
    generator = torch.Generator().manual_seed(0)

    def weights(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64) / 2 + 0.1

    return StepTable(
        timesteps=torch.tensor([500.0], dtype=torch.float64), c_in=weights(1), A=weights(1, K, K), b=weights(1, K),
        d=weights(1, K), C=weights(1, K, Z), r=weights(1, K + 1), lo=torch.tensor([-1.0], dtype=torch.float64),
        hi=torch.tensor([1.0], dtype=torch.float64), x0_row=weights(0, 0), init_noise_sigma=1.0,
        draws=((None,) * Z,), latents=((), ()), x0_source=None, source="isolation certificate",
    )  # fmt: skip
