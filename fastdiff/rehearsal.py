"""A run of a scheduler, rehearsed: each row as sums of tensors, and what it leaves in the scheduler's attributes.

The sums are the unpruned table's. The attributes are seen by walking a pristine copy on tensors of ones in the dtypes
that the real run uses: which of them a step moves, where the latents are, which are passed on and which computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fastdiff.fingerprint import Unsettled, settled
from fastdiff.intercept import Interception
from fastdiff.probe import PROOF_SHAPE, Prober, assemble, probe, table_cache
from fastdiff.stepper import Schedule, Stepper, fork, latents_in, plain_torch
from fastdiff.table import StepTable

Dtypes = tuple[torch.dtype, torch.dtype]
"""Of the sample and of the model output."""

# What stands for a value in an attribute's skeleton. Lists hold more of these; anything else is the value itself.


class Latent(NamedTuple):
    """The latent of this number; 0 is the sample."""

    number: int


class Made(NamedTuple):
    """A tensor of an output that is no latent, such as the x0 prediction."""

    number: int


class Time(NamedTuple):
    """The timestep of this row."""

    row: int


class Size(NamedTuple):
    """The latents' shape from this dimension on."""

    first: int


Skeleton = dict[str, Any]
"""Attributes by name, tensors and timesteps replaced by what stands for them."""


@dataclass(frozen=True)
class Combination:
    """A tensor as a sum over terms: the row's latents, then the model output, phi and the draws."""

    weights: tuple[tuple[int, float], ...]
    dtype: torch.dtype
    passed_on: bool = False  # the one term itself, as the scheduler keeps it, and no copy of it

    def of(self, terms: Sequence[Tensor], work: torch.dtype) -> Tensor:
        """The sum, accumulated in `work`, in as few operations as it has terms; these may be narrower than `work`."""
        if not self.weights:
            return torch.zeros_like(terms[0], dtype=self.dtype)
        (index, weight), *rest = self.weights
        total = terms[index]
        if weight == 1.0 and rest and total.dtype == work:
            (second, scale), *rest = rest
            total = torch.add(total, terms[second], alpha=scale)
        elif weight == 1.0:
            total = total.to(work, copy=True)
        else:
            total = torch.mul(total if total.dtype == work else total.to(work), weight)
        for index, weight in rest:
            total.add_(terms[index], alpha=weight)
        return total if total.dtype == self.dtype else total.to(self.dtype)


@dataclass(frozen=True)
class Row:
    """One row: what the model sees, what is drawn, and every tensor that the step makes."""

    c_in: float
    draws: tuple[torch.dtype, ...]
    clip: Combination | None
    lo: float
    hi: float
    latents: tuple[Combination, ...]  # after the step, the sample first
    made: tuple[Combination, ...]
    output: tuple[tuple[str, Any], ...]  # the fields of the step's output, by skeleton
    work: torch.dtype  # of all arithmetic

    def advance(
        self, latents: Sequence[Tensor], model_output: Tensor, noise: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The latents after this row, and the tensors of its output that are none of them."""
        work, sample = self.work, latents[0]
        wide = sample if sample.dtype == work else sample.to(work)  # once for all sums
        phi = sample
        if self.clip is not None:
            phi = self.clip.of([wide, *latents[1:], model_output], work).clamp_(self.lo, self.hi)
        given = [*latents, model_output, phi, *noise]
        terms = [wide, *given[1:]]

        def made(sum_: Combination) -> Tensor:
            return given[sum_.weights[0][0]] if sum_.passed_on else sum_.of(terms, work)

        return [made(each) for each in self.latents], [made(each) for each in self.made]


@dataclass(frozen=True)
class Rehearsal:
    """All rows of one schedule from one begin index, and the scheduler's moving attributes before and after each."""

    begin: int
    timesteps: Tensor  # [R], on the host
    rows: tuple[Row, ...]
    before: tuple[Skeleton, ...]  # R + 1: at each row's start; only the attributes that a run moves
    scaled: tuple[Skeleton, ...]  # R: what scale_model_input then changes
    moving: frozenset[str]
    output_class: Any
    tuple_length: int  # fields that return_dict=False returns
    finds_itself: bool  # whether the scheduler would begin here without set_begin_index


@dataclass(frozen=True)
class Recipe:
    """What a rehearsal depends on; equal by `key` and `dtypes`."""

    key: tuple[Hashable, ...]  # the template's own first
    template: Any = field(compare=False)  # never stepped
    schedule: Schedule = field(compare=False)
    dtypes: Dtypes


def rehearse(recipe: Recipe) -> Rehearsal | Exception:
    """The rehearsal, or why there is none."""
    try:
        return _rehearsed(recipe)
    except (MemoryError, Unsettled) as error:
        return error.with_traceback(None)


@lru_cache(maxsize=256)
def _rehearsed(recipe: Recipe) -> Rehearsal | Exception:
    """What a step must not probe again: why there is none is remembered too, but for what is of the moment."""
    try:
        of = partial(settled, recipe.template, recipe.key[0])
        table = table_cache.get(("unpruned", recipe.key), of(lambda: probe(recipe.template, recipe.schedule)))
        with plain_torch():
            return of(_Walk(recipe, table).rehearsal)()
    except (MemoryError, Unsettled):
        raise
    except Exception as refused:  # the scheduler's own step() will raise it, or run where the table cannot
        return refused.with_traceback(None)  # which would keep the walk alive


class _Actor(Interception):
    """Answers draws with ones of the dtype that was asked for; otherwise the step is left alone."""

    def is_latent(self, value: Any) -> bool:
        return False


class _FieldStepper(Stepper):
    """A stepper that takes one field of the output for the x0 prediction, so that the prober reads its row."""

    field = ""

    def step(
        self, sample: Tensor, timestep: Tensor, model_output: Tensor, scheduler: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        output = (scheduler or self.scheduler).step(model_output, timestep, sample, **self.step_kwargs)
        return output.prev_sample, getattr(output, self.field)


class _Walk:
    """One walk over a pristine copy, in the run's own dtypes."""

    def __init__(self, recipe: Recipe, table: StepTable) -> None:
        self.recipe, self.table = recipe, table
        self.stepper = Stepper(recipe.template, recipe.schedule)
        if not self.stepper.takes_return_dict:
            raise self.stepper.refuse("its step() takes no return_dict")
        self.shape = torch.Size(PROOF_SHAPE)
        self.work = torch.float64 if torch.float64 in recipe.dtypes else torch.float32
        self.drawn: list[Tensor] = []
        self.times: dict[int, int] = {}  # by the timestep's id
        self.field_rows: dict[str, Tensor] = {}
        if table.x0_source == "output":
            self.field_rows = {"pred_original_sample": table.x0_row, "denoised": table.x0_row}

    def rehearsal(self) -> Rehearsal:
        table, stepper, begin = self.table, self.stepper, self.recipe.schedule.begin_index
        timesteps = list(stepper.timesteps[: len(table)])
        finds_itself = True
        if hasattr(stepper.scheduler, "index_for_timestep"):
            finds_itself = int(stepper.scheduler.index_for_timestep(timesteps[0])) == begin
        ones = [torch.ones(self.shape, dtype=dtype) for dtype in self.recipe.dtypes]
        with _Actor(self.shape, self._draw, torch.clamp, stepper.refuse):
            forked = fork(stepper.scheduler)
            if hasattr(forked, "scale_model_input"):
                forked.scale_model_input(ones[0], timesteps[0])  # without, some warn of what no user did
            short = forked.step(ones[1], timesteps[0], ones[0], **stepper.step_kwargs, return_dict=False)
            rows, before, scaled = [], [], []
            for row, timestep in enumerate(timesteps):
                self.times[id(timestep)] = row
                before.append(self._skeleton())
                stepper.scale(ones[0], timestep)
                scaled.append(self._skeleton())
                read, output = self._row(row, timestep)
                rows.append(read)
            before.append(self._skeleton())
        names = {name for state in before for name in state}
        moving = frozenset(name for name in names if not _constant(name, (*before, *scaled)))

        def kept(states: list[Skeleton]) -> tuple[Skeleton, ...]:
            return tuple({name: value for name, value in state.items() if name in moving} for state in states)

        return Rehearsal(
            begin, table.timesteps, tuple(rows), kept(before), tuple(map(_changes, before, scaled)), moving,
            type(output), len(short), finds_itself,
        )  # fmt: skip

    def _draw(self, size: torch.Size, dtype: torch.dtype) -> Tensor:
        self.drawn.append(torch.ones(size, dtype=dtype))
        return self.drawn[-1]

    def _skeleton(self) -> Skeleton:
        scheduler = self.stepper.scheduler
        paths = {latent.path: 1 + i for i, latent in enumerate(latents_in(scheduler, self.shape))}
        state = {name: self._stand_in(value, name, paths) for name, value in vars(scheduler).items()}
        if paths:
            raise self.stepper.refuse(f"it keeps latents deeper than its attributes: {', '.join(paths)}")
        return state

    def _stand_in(self, value: Any, path: str, paths: dict[str, int]) -> Any:
        if path in paths:
            return Latent(paths.pop(path))
        if isinstance(value, list):
            return [self._stand_in(item, f"{path}[{i!r}]", paths) for i, item in enumerate(value)]
        if id(value) in self.times:
            return Time(self.times[id(value)])
        if isinstance(value, torch.Size) and value == self.shape[len(self.shape) - len(value) :]:
            return Size(len(self.shape) - len(value))
        return value

    def _row(self, row: int, timestep: Tensor) -> tuple[Row, Any]:
        """Step once, and say of every tensor that came of it which sum it is; the output too."""
        table, scheduler, self.drawn = self.table, self.stepper.scheduler, []
        sample, model_output = (torch.ones(self.shape, dtype=dtype) for dtype in self.recipe.dtypes)
        start = [sample, *(latent.value for latent in latents_in(scheduler, self.shape))]
        output = scheduler.step(model_output, timestep, sample, **self.stepper.step_kwargs, return_dict=True)
        end = [output.prev_sample, *(latent.value for latent in latents_in(scheduler, self.shape))]
        if len(self.drawn) != len(table.draws[row]) or len(start) != len(table.latents[row]):
            raise self.stepper.refuse("its steps draw or keep other tensors in other dtypes")
        count, K, work = len(start), table.memory, self.work
        places = {id(tensor): i for i, tensor in enumerate([*start, model_output])}
        places |= {id(tensor): count + 2 + i for i, tensor in enumerate(self.drawn)}

        def sum_of(columns: Tensor, tensor: Tensor) -> Combination:
            values = columns.tolist()  # padded to the table's K latents and Z draws, which this row's terms are not
            values = values[:count] + values[K : K + 2 + len(self.drawn)]
            weights = [(i, value) for i, value in enumerate(values) if value]
            weights.sort(key=lambda weight: weight[1] != 1.0)  # a weight of 1 saves an operation where it comes first
            # The same object with another weight is memory that the step wrote into (PNDM); phi is nobody else's.
            place = count + 1 if tensor.dtype == work else None
            passed_on = weights == [(places.get(id(tensor), place), 1.0)]
            return Combination(tuple(weights), tensor.dtype, passed_on)

        made: list[Combination] = []

        def stand_in(name: str, value: Any) -> Any:
            if isinstance(value, list):
                return [stand_in(name, item) for item in value]
            if not isinstance(value, Tensor) or value.shape != self.shape:
                return value
            for number, tensor in enumerate(end):
                if tensor is value:
                    return Latent(number)
            made.append(sum_of(self._field_row(name)[row], value))
            return Made(len(made) - 1)

        fields = [field.name for field in dataclasses.fields(output)]
        skeleton = tuple((name, stand_in(name, getattr(output, name))) for name in fields)
        weights = torch.cat([table.A[row], table.b[row, :, None], table.d[row, :, None], table.C[row]], dim=1)
        latents = tuple(sum_of(weights[number], tensor) for number, tensor in enumerate(end))
        clip = None
        if any(index == count + 1 for each in (*latents, *made) for index, _ in each.weights):
            r = [*table.r[row, :count].tolist(), float(table.r[row, K])]
            clip = Combination(tuple((i, value) for i, value in enumerate(r) if value), work)
        draws = tuple(tensor.dtype for tensor in self.drawn)
        lo, hi, c_in = (float(column[row]) for column in (table.lo, table.hi, table.c_in))
        return Row(c_in, draws, clip, lo, hi, latents, tuple(made), skeleton, work), output

    def _field_row(self, name: str) -> Tensor:
        """The rows [R, K + 2 + Z] of one field of the output; probed anew for a field that is no x0 prediction."""
        if name not in self.field_rows:
            with _disable_current_modes():
                stepper = _FieldStepper(self.recipe.template, self.recipe.schedule)
                stepper.field = name
                prober = Prober(stepper, 32)
                rows = [prober.row(timestep) for timestep in stepper.timesteps[: len(self.table)]]
                self.field_rows[name] = assemble(rows, self.table.source, 1.0).x0_row
        return self.field_rows[name]


def _constant(name: str, states: Sequence[Skeleton]) -> bool:
    """Whether an attribute is there in every state, always the same, and holds no latent."""
    return all(name in state and same(state[name], states[0][name]) for state in states) and not holds(
        states[0][name], Latent
    )


def _changes(before: Skeleton, after: Skeleton) -> Skeleton:
    return {name: value for name, value in after.items() if name not in before or not same(before[name], value)}


def holds(skeleton: Any, kind: type) -> bool:
    """Whether a `kind` stands anywhere in a skeleton."""
    return any(holds(item, kind) for item in skeleton) if type(skeleton) is list else isinstance(skeleton, kind)


def same(a: Any, b: Any) -> bool:
    """Whether two values of an attribute are equal in content, wherever their tensors are."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.cpu(), b.cpu())
    if hasattr(a, "__array__"):
        return bool((a == b).all()) if a.shape == b.shape else False
    return bool(a == b)
