"""A host's own loop over a runtime's slots; and whose turn it is."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from fastdiff.capture import Steps
from fastdiff.errors import PlanMismatch
from fastdiff.families import Family
from fastdiff.noise import copy_generator, run_noise
from fastdiff.plan import CapturePlan
from fastdiff.slots import Slots
from fastdiff.state import RequestState
from fastdiff.table import StepTable


class Turn:
    """One host at a time over a runtime's slots: whichever thread and stream it comes from, it finds the work before
    its own enqueued, and no request in them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._holder: threading.Thread | None = None  # no number: those of threads that ended are given out again
        self._done: torch.cuda.Event | None = None  # all that was enqueued at the last `mark`
        self._left: tuple[int, ...] | None = None  # the slots of one who did not park them; its stream is not known

    @property
    def mine(self) -> bool:
        """Whether this thread has it."""
        return self._holder is threading.current_thread()

    @property
    def abandoned(self) -> bool:
        """Whether the thread that has it is over."""
        return self._holder is not None and not self._holder.is_alive()

    def take(self) -> None:
        """Wait for the other threads."""
        if self.mine:
            raise RuntimeError("this thread has a session of this runtime open: close it first")
        self._lock.acquire()
        self._holder = threading.current_thread()

    def prepare(self, slots: Slots) -> None:
        """Let the current stream wait for the other hosts', and park what they left."""
        if self._done is not None:
            torch.cuda.current_stream(self._device).wait_event(self._done)
        if self._left is not None:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            for slot in self._left:
                slots.park(slot)
            self._left = None

    def mark(self) -> None:
        """Whichever stream the next host runs on, it waits for what is enqueued here."""
        if self._device.type == "cuda":
            self._done = torch.cuda.current_stream(self._device).record_event()

    def give(self, left: tuple[int, ...] | None = None) -> None:
        """Let the next one in, who parks what is `left`: the slots of a host that neither did so nor marked its end."""
        if left is not None:
            self._left = (*(self._left or ()), *left)
        self._holder = None
        self._lock.release()


@dataclass
class _Occupant:
    """The host's view of one slot: what was loaded, and how far it and its noise have come."""

    state: RequestState  # as loaded, but for its latents and conditioning, which the slot has since
    table: StepTable
    row: int
    end: int  # rows of the table
    boundary: int  # of them in the first segment
    generator: torch.Generator | None  # after all that was drawn ahead
    drawn_from: int  # the first row of the noise in the ring
    drawn_to: int  # and the row after its last
    before: Tensor | None = None  # the generator's state before that noise was drawn

    @property
    def segment(self) -> int:
        """Of the row to run next."""
        return int(self.row >= self.boundary)

    def after(self, rows: int) -> int:
        """The row after a call that advances each slot by so many: it ends with the segment."""
        return min(self.row + rows, self.end if self.segment else self.boundary)


class Session:
    """A host's own loop: `add` states, `step` until slots finish, `take` them.

    A slot never moves while its request runs. A session belongs to the thread that opened it, and to the stream that
    was current then; tensors go in and come out as copies. Of pinned host memory the device reads what goes in when it
    comes to it: such a tensor must stay as it is until then.
    """

    _turn: Turn | None = None  # closed

    def __init__(self, turn: Turn, family: Family, steps: Steps, slots: Slots, check_model: Callable[[], None]) -> None:
        self._family, self._steps, self._slots, self._plan = family, steps, slots, slots.plan
        self._check_model = check_model
        self._occupants: dict[int, _Occupant] = {}
        self._new = False  # whether one was added since the last step
        self._turn = turn

    @property
    def free(self) -> int:
        """How many more states can be added."""
        self._check_open()
        return self._plan.max_batch - len(self._occupants)

    def add(self, state: RequestState) -> int:
        """Copy a prepared state into the lowest free slot; the slot's number.

        PlanMismatch if none is free or the state does not fit.
        """
        if not isinstance(state, RequestState):
            raise TypeError(
                f"expected a RequestState, got {type(state).__name__}; runtime.prepare(request) makes one of a Request"
            )
        if not self.free:
            raise PlanMismatch(f"all {self._plan.max_batch} slots are taken; take or cancel one, or raise max_batch")
        check_fits(self._plan, state)
        table, _ = state.prepared
        slot = min(set(range(self._plan.max_batch)) - self._occupants.keys())
        kept = replace(state, latents=None, conditioning={}).fork()  # the caller's own may change
        draws = any(table.draws[state.row :])
        generator = copy_generator(kept.generator) if draws and kept.generator is not None else None
        boundary = self._family.boundary(table)
        with torch.no_grad():  # a host's latents or embeddings may want gradients; static memory must not
            self._slots.load(slot, state, boundary)
        self._occupants[slot] = _Occupant(kept, table, state.row, len(table), boundary, generator, state.row, state.row)
        self._new = True
        return slot

    def step(self) -> list[int]:
        """Advance every unfinished slot by one row, in mode "loop-graph" by as many as a graph holds.

        Returns the finished slots that wait to be taken, in rising order. The first step after an `add` advances
        nothing and raises StaleGraph if the model is no longer what was compiled or captured, PlanMismatch if the
        pipeline has another by now; the requests can be taken as they are. Where a KeyboardInterrupt falls into a
        row, that row may have run in part: cancel its requests.
        """
        self._check_open()
        if self._new:
            self._check_model()
            self._steps.check()  # once for all that were added: it looks at every module of the model
            self._new = False
        running = {slot: one for slot, one in self._occupants.items() if one.row < one.end}
        for slot, occupant in running.items():
            self._draw_ahead(slot, occupant)
        with torch.inference_mode(False), torch.no_grad():  # what is compiled or captured is so for either host
            for segment in reversed(range(self._plan.segments)):  # or a slot at the boundary would go on in the second
                if members := [slot for slot, one in running.items() if one.segment == segment]:
                    self._steps(max(members) + 1, segment)
                    for slot in members:  # at once: should the other segment raise, these have run
                        running[slot].row = running[slot].after(self._steps.rows_per_call)
        return sorted(slot for slot, one in self._occupants.items() if one.row >= one.end)

    def take(self, slot: int) -> RequestState:
        """The slot's request as it now stands, copied out; the slot is free again."""
        state = self.fork(slot)
        self.cancel(slot)
        return state

    def fork(self, slot: int) -> RequestState:
        """An independent copy of the slot's request as it now stands, generator included; the slot runs on."""
        occupant = self._occupant(slot)
        copied = occupant.state.fork()
        if copied.generator is not None:
            self._wind(copied.generator, occupant)
        latents, conditioning = self._slots.read(slot, occupant.table.memory), self._slots.conditioning(slot)
        return replace(copied, latents=latents, conditioning=conditioning, row=occupant.row)

    def cancel(self, slot: int) -> None:
        """Free the slot; its request is lost."""
        self._occupant(slot)
        self._slots.park(slot)
        del self._occupants[slot]

    def save(self, slot: int, path: str | Path) -> None:
        """Write the slot's request, as it now stands, to a file that `load` resumes from in any process."""
        self.fork(slot).save(path)

    def load(self, path: str | Path) -> int:
        """Add a request that `save` wrote; the slot's number."""
        return self.add(RequestState.load(path, self._slots.device))

    def close(self) -> None:
        """Cancel what still runs and let other threads in; a second call does nothing."""
        if self._turn is None:
            return
        abandoned = self._turn.abandoned  # then nobody but another thread can
        if not abandoned:
            self._check_open()
        turn, self._turn = self._turn, None
        left: tuple[int, ...] | None = tuple(self._occupants)
        self._occupants.clear()
        try:
            if not abandoned:
                for slot in left or ():
                    self._slots.park(slot)
                turn.mark()
                left = None
        finally:
            turn.give(left)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        """Let others in where nobody closed it. The next session parks its slots: this runs in any thread, at any time,
        in the midst of a capture too."""
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.give(tuple(self._occupants))
            warnings.warn("a session was dropped open: close it, or use it in a `with` block", ResourceWarning, 2, self)

    def _draw_ahead(self, slot: int, occupant: _Occupant) -> None:
        """Fill the slot's ring with the noise of the coming rows, in diffusers' order, and keep the way back."""
        if occupant.generator is None or occupant.drawn_to >= occupant.after(self._steps.rows_per_call):
            return
        if occupant.drawn_to > occupant.row:  # the last call ended at the boundary, short of what was drawn for it
            self._wind(occupant.generator, occupant)
        before, start = occupant.generator.get_state(), occupant.row
        end = min(start + self._plan.ring_depth, occupant.end)
        try:
            self._slots.put_noise(slot, start, self._draw(occupant.generator, occupant, start, end))
        except BaseException:  # no memory for it, say: a host that goes on finds the generator as it was
            occupant.generator.set_state(before)
            raise
        occupant.before, occupant.drawn_from, occupant.drawn_to = before, start, end

    def _wind(self, generator: torch.Generator, occupant: _Occupant) -> None:
        """Set the occupant's generator, or a copy of it, to the row to run next."""
        if occupant.before is not None:
            generator.set_state(occupant.before)
            self._draw(generator, occupant, occupant.drawn_from, occupant.row)

    def _draw(self, generator: torch.Generator, occupant: _Occupant, start: int, end: int) -> Tensor:
        draws = occupant.table.draws[start:end]
        # On the generator's own device: the copy into the ring waits for nothing, one made here would.
        return run_noise(generator, draws, self._plan.latent_shape, occupant.state.dtype, generator.device)

    def _occupant(self, slot: int) -> _Occupant:
        self._check_open()
        if slot not in self._occupants:
            raise ValueError(f"slot: expected one of {sorted(self._occupants)}, got {slot}")
        return self._occupants[slot]

    def _check_open(self) -> None:
        if self._turn is None:
            raise RuntimeError("this session is closed; open another with runtime.session()")
        if not self._turn.mine:
            raise RuntimeError("this session belongs to the thread that opened it: use it there, or open another here")


def check_fits(plan: CapturePlan, state: RequestState) -> None:
    """Raise PlanMismatch or ValueError unless a slot of `plan` can run the state from its row to its end."""
    table, latents = state.prepared
    plan.check(table)
    if not isinstance(state.row, int) or not 0 <= state.row <= len(table):
        raise ValueError(f"row: expected 0 to {len(table)}, the rows of {table.source}'s table, got {state.row!r}")
    shape = (table.memory, *plan.latent_shape)
    if tuple(latents.shape) != shape or not latents.is_floating_point():
        raise PlanMismatch(
            f"latents: expected shape {shape} of a floating dtype, got {tuple(latents.shape)} {latents.dtype}"
        )
    plan.check_conditioning(state.conditioning)
    if any(table.draws[state.row :]) and state.generator is None:
        raise ValueError(f"{table.source} draws noise: the state needs a generator")
