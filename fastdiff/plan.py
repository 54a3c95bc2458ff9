"""What a runtime makes room for: shapes, dtype, batch sizes and capacities, all fixed before the first request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from fastdiff.errors import PlanMismatch
from fastdiff.table import RowLayout, StepTable


@dataclass(frozen=True, kw_only=True)
class CapturePlan:
    """The capacities of a runtime. `replace` from dataclasses varies it; a request that does not fit is refused."""

    latent_shape: tuple[int, ...]  # (C, H, W) of one request
    dtype: torch.dtype  # of model inputs, conditioning and returned latents
    conditioning: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # one slot's shape by name
    batch_sizes: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    memory: int = 4  # K: DPM++ 2M 2, Heun 3, UniPC 4, UniPC of order 3 5, PNDM with Runge-Kutta steps 6
    rows: int = 128  # R
    draws: int = 1  # Z: noise draws per row
    ring_bytes: int = 32 * 2**20  # a slot's noise is drawn ahead for a whole run up to this size, else row by row

    def __post_init__(self) -> None:
        for name in ("memory", "rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"CapturePlan.{name}: expected >= 1, got {getattr(self, name)}")
        if self.draws < 0:
            raise ValueError(f"CapturePlan.draws: expected >= 0, got {self.draws}")
        if not self.latent_shape or min(self.latent_shape) < 1:
            raise ValueError(f"CapturePlan.latent_shape: expected sizes >= 1, got {self.latent_shape}")
        if not self.batch_sizes or list(self.batch_sizes) != sorted(set(self.batch_sizes)) or self.batch_sizes[0] < 1:
            raise ValueError(f"CapturePlan.batch_sizes: expected rising sizes >= 1, got {self.batch_sizes}")
        object.__setattr__(self, "conditioning", MappingProxyType(dict(self.conditioning)))

    @property
    def max_batch(self) -> int:
        """Slots."""
        return self.batch_sizes[-1]

    @property
    def layout(self) -> RowLayout:
        """How a slot's rows are packed."""
        return RowLayout(self.memory, self.draws)

    @property
    def latent_numel(self) -> int:
        """Elements of one latent."""
        return math.prod(self.latent_shape)

    @property
    def ring_depth(self) -> int:
        """Rows of noise that a slot holds: a whole run where that is small, else one."""
        whole_run_bytes = self.rows * self.draws * self.latent_numel * 4
        return self.rows if whole_run_bytes <= self.ring_bytes else 1

    @property
    def state_bytes(self) -> int:
        """Device bytes of all slots: rows, latents, noise and conditioning."""
        conditioning = sum(map(math.prod, self.conditioning.values())) * self.dtype.itemsize
        floats = (self.rows + 1) * self.layout.width
        floats += (self.memory + self.ring_depth * self.draws) * self.latent_numel
        return self.max_batch * (4 * floats + conditioning + 3 * 8)

    def size_for(self, count: int) -> int:
        """The smallest batch size that serves slots [0, count)."""
        for size in self.batch_sizes:
            if size >= count:
                return size
        raise PlanMismatch(f"expected at most {self.max_batch} slots, got {count}; raise max_batch")

    def check(self, table: StepTable) -> None:
        """Raise PlanMismatch unless `table` fits, naming the capacity to raise."""
        for name, needed in (("rows", len(table)), ("memory", table.memory), ("draws", table.max_draws)):
            if needed > getattr(self, name):
                raise PlanMismatch(
                    f"{table.source} needs {name} = {needed}, the plan has {getattr(self, name)}; "
                    f"build the runtime with {name}={needed} or more"
                )
