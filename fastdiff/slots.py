"""Every tensor with a fixed address. A slot is one request's place in them; a step reads and writes nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.plan import CapturePlan
from fastdiff.state import RequestState
from fastdiff.table import GUIDANCE, SCALARS, RowLayout, pack


class Row(NamedTuple):
    """The coefficients that each of n slots applies next."""

    t: Tensor  # [n]
    guidance: Tensor  # [n]
    c_in: Tensor  # [n, 1, 1]
    lo: Tensor  # [n, 1, 1]
    hi: Tensor  # [n, 1, 1]
    clip: tuple[Tensor, ...]  # r: K + 1 times [n, 1, 1]
    weights: tuple[tuple[Tensor, ...], ...]  # A | b | d | C: for each plane of k latents, K + 2 + Z times [n, k, 1]

    @classmethod
    def of(cls, coefficients: Tensor, layout: RowLayout, planes: Sequence[int]) -> Row:
        """Views of packed rows [n, F], for planes of so many latents each."""
        n, K = len(coefficients), layout.memory
        scalars, clip, weights = coefficients[:, :, None, None].split([SCALARS, K + 1, K * layout.terms], dim=1)
        t, c_in, guidance, lo, hi = scalars.unbind(1)
        by_plane = weights.view(n, K, layout.terms, 1).split(list(planes), dim=1)
        terms = tuple(tuple(plane.unbind(2)) for plane in by_plane)
        return cls(t.view(n), guidance.view(n), c_in, lo, hi, tuple(clip.unbind(1)), terms)


class Batch(NamedTuple):
    """Slots [0, n) as one step sees them: views, made once, P = latent elements."""

    layout: RowLayout
    latent_shape: tuple[int, ...]
    dtype: torch.dtype
    slot: Tensor  # [n] int64: 0, 1, ..., n - 1
    table: Tensor  # [n, R + 1, F] float32: packed rows; the row after a request's last repeats it, and is never applied
    row: Tensor  # [n] int64: the row to run next
    end: Tensor  # [n] int64: the row after the last of this segment; 0 in an idle slot
    planes: tuple[Tensor, ...]  # [n, k, P] float32 each: the K latents, in one plane or in one each
    noise: Tensor  # [n, D, Z, P] float32: a ring, row i at i mod D
    conditioning: dict[str, Tensor]  # [n, ...] each
    begin: Tensor | None = None  # [n] int64: the first row of this segment; None in the first
    static: Static | None = None

    def current(self) -> Row:
        """Gather each slot's next row."""
        if self.static is None:
            return Row.of(self.table[self.slot, self.row], self.layout, [plane.shape[1] for plane in self.planes])
        packed, first, coefficients, row, _ = self.static
        torch.index_select(packed, 0, first + self.row, out=coefficients)
        return row

    def latents(self) -> tuple[Tensor, ...]:
        """K times [n, 1, P]."""
        if self.static is not None:
            return self.static.latents
        return tuple(latent for plane in self.planes for latent in plane[:, :, None].unbind(1))

    @torch.inference_mode(False)
    def with_views(self) -> Batch:
        """The same batch with the views of a step made beforehand.

        A step in eager mode is as long as its dispatches, and half of them are views. A compiler wants none of this:
        it would see thirty inputs that alias each other.
        """
        coefficients = torch.zeros(len(self.slot), self.layout.width, dtype=torch.float32, device=self.table.device)
        return self._replace(
            static=Static(
                packed=self.table.flatten(0, 1),
                first=self.slot * self.table.shape[1],
                coefficients=coefficients,
                row=Row.of(coefficients, self.layout, [plane.shape[1] for plane in self.planes]),
                latents=self.latents(),
            )
        )


class Static(NamedTuple):
    """Where an eager step gathers its rows to, and the views that it works on."""

    packed: Tensor  # [n (R + 1), F], the table
    first: Tensor  # [n] int64: each slot's first row in it
    coefficients: Tensor  # [n, F]
    row: Row  # of the coefficients
    latents: tuple[Tensor, ...]  # K times [n, 1, P]


class Slots:
    """The static memory of a runtime: `plan.max_batch` slots on `device`.

    Not thread-safe: one session at a time loads, steps and takes. Nothing here waits for the device: loads are copies
    on the caller's current stream, in order with the steps that it enqueues there.

    `planar` gives every latent a tensor of its own: a compiler then fuses all K updates into one kernel that writes in
    place, which it cannot where they share one. An eager step wants them in one, for a Kth of the operations.
    """

    @torch.inference_mode(False)  # no step outside of it could write into tensors that were made within
    def __init__(self, plan: CapturePlan, device: torch.device | str, *, planar: bool = False) -> None:
        self.plan, self.device = plan, torch.device(device)
        slots, layout, P = plan.max_batch, plan.layout, plan.latent_numel
        planes = (1,) * plan.memory if planar else (plan.memory,)
        self._all = Batch(
            layout=layout,
            latent_shape=plan.latent_shape,
            dtype=plan.dtype,
            slot=torch.arange(slots, device=device),
            table=torch.zeros(slots, plan.rows + 1, layout.width, dtype=torch.float32, device=device),
            row=torch.zeros(slots, dtype=torch.int64, device=device),
            end=torch.zeros(slots, dtype=torch.int64, device=device),
            planes=tuple(torch.zeros(slots, latents, P, dtype=torch.float32, device=device) for latents in planes),
            noise=torch.zeros(slots, plan.ring_depth, plan.draws, P, dtype=torch.float32, device=device),
            conditioning={
                name: torch.zeros(slots, *spec.shape, dtype=spec.dtype, device=device)
                for name, spec in plan.conditioning.items()
            },
        )
        self._boundary = torch.zeros(slots, dtype=torch.int64, device=device) if plan.segments == 2 else None
        self._batches = {
            (segment, size): self._view(slice(size), segment)
            for segment in range(plan.segments)
            for size in plan.batch_sizes
        }
        self._planar = planar
        self._places = [self._view(slot) for slot in range(slots)]  # made once: a view costs as much as a copy
        self._memories = [[self._memory(place, k) for k in range(plan.memory + 1)] for place in self._places]
        self._has_noise = [False] * slots

    def _view(self, part: slice | int, segment: int | None = None) -> Batch:
        own = self._all
        view = own._replace(
            **{name: getattr(own, name)[part] for name in ("slot", "table", "row", "end", "noise")},
            planes=tuple(plane[part] for plane in own.planes),
            conditioning={name: tensor[part] for name, tensor in own.conditioning.items()},
        )
        if self._boundary is None or segment is None:
            return view
        boundary = self._boundary[part]
        return view._replace(begin=boundary) if segment else view._replace(end=boundary)

    def _memory(self, place: Batch, k: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Where a slot holds k latents, and the latents that it then has to spare."""
        if self._planar:
            return place.planes[:k], place.planes[k:]
        (plane,) = place.planes
        return (plane[:k],), (plane[k:],) if k < len(plane) else ()

    def batch(self, n: int, segment: int = 0) -> Batch:
        """Slots [0, n), for an n of the plan's batch sizes; a step over it runs the rows of one segment alone."""
        return self._batches[segment, n]

    @property
    def nbytes(self) -> int:
        """Device bytes of all slots."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def conditioning_bytes(self) -> int:
        """Device bytes of all slots' conditioning, which `nbytes` counts too."""
        return sum(tensor.nbytes for tensor in self._all.conditioning.values())

    def tensors(self) -> list[Tensor]:
        """Every static tensor, for accounting and for tests of addresses."""
        own = self._all
        counters = [own.slot, own.row, own.end, *([] if self._boundary is None else [self._boundary])]
        return [*counters, own.table, *own.planes, own.noise, *own.conditioning.values()]

    def load(self, slot: int, state: RequestState, boundary: int | None = None) -> None:
        """Write all of a request's state into `slot`, over whatever was there: nothing of a former request stays.

        `boundary` is the first row of the second segment; None leaves all rows to the first.
        """
        table, latents = state.prepared
        self.plan.check(table)
        place = self._places[slot]
        if boundary is None:
            boundary = len(table)
        packed = pack(table, place.layout)
        place.table[: len(packed)].copy_(packed, non_blocking=True)
        if state.guidance_scale != 1.0:
            place.table[: len(packed), GUIDANCE].fill_(state.guidance_scale)
        if state.guidance_scale_2 is not None:
            place.table[boundary : len(packed), GUIDANCE].fill_(state.guidance_scale_2)
        own = latents.flatten(1)  # [k, P]
        held, idle = self._memories[slot][len(own)]
        for plane, latent in zip(held, own.split(1) if self._planar else (own,), strict=True):
            plane.copy_(latent, non_blocking=True)
        for plane in idle:
            plane.zero_()  # its weight is 0, and 0 * nan is nan
        if self._has_noise[slot]:
            place.noise.zero_()
            self._has_noise[slot] = False
        for name, tensor in place.conditioning.items():
            tensor.copy_(state.conditioning[name], non_blocking=True)
        place.row.fill_(state.row)
        place.end.fill_(len(table))
        if self._boundary is not None:
            self._boundary[slot].fill_(boundary)

    def put_noise(self, slot: int, row: int, noise: Tensor) -> None:
        """Write the draws [rows, Z, *latent_shape] of `row` and the rows after it into the slot's ring."""
        ring, first = self._places[slot].noise, row % self.plan.ring_depth
        self._has_noise[slot] = True
        until_the_end = self.plan.ring_depth - first
        for start, part in ((first, noise[:until_the_end]), (0, noise[until_the_end:])):
            ring[start : start + len(part), : part.shape[1]].copy_(part.flatten(2), non_blocking=True)

    def read(self, slot: int, memory: int) -> Tensor:
        """A copy of the slot's latents [K, C, H, W]."""
        latents = torch.cat(self._places[slot].planes)[:memory]  # a copy, of one plane too
        return latents.view(memory, *self.plan.latent_shape)

    def conditioning(self, slot: int) -> dict[str, Tensor]:
        """A copy of the slot's conditioning, [...] each."""
        return {name: tensor.clone() for name, tensor in self._places[slot].conditioning.items()}

    def park(self, slot: int) -> None:
        """Stop the slot where it is: steps pass it by until the next load."""
        self._places[slot].end.fill_(0)
        if self._boundary is not None:
            self._boundary[slot].fill_(0)
