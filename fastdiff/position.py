"""Where a scheduler is in its schedule: which row its next step is, told by its attributes and the timestep.

The attributes of the scheduler are the memory of the run, so nothing can be out of step with them: a row is taken when
they are what that row begins with, whoever left them so, and otherwise there is a reason why not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import is_
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fastdiff.fingerprint import fingerprint, freeze
from fastdiff.rehearsal import Dtypes, Latent, Made, Recipe, Rehearsal, Row, Size, Skeleton, Time, holds, rehearse, same
from fastdiff.stepper import Schedule

_ABSENT: Any = object()

Reason = str | Exception
"""Why a step is no row of the table."""


@dataclass(slots=True)
class Snapshot:
    """Attributes as they were at some time: knows which were replaced or written into since."""

    values: dict[str, Any] = field(default_factory=dict)
    lists: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # the items of those that are lists
    tables: dict[str, tuple[Callable[[], Any], Any]] = field(default_factory=dict)  # what tells a write; what it told
    edited: set[str] = field(default_factory=set)  # changed before that time, and not by this package

    @classmethod
    def of(cls, held: dict[str, Any], edited: Iterable[str] = ()) -> Self:
        """The attributes as they are, but for those `edited`, which stay changed."""
        snapshot = cls()
        snapshot.take(held, held)
        snapshot.edited.update(edited)
        return snapshot

    def __reduce__(self) -> Any:  # a copied tensor counts its writes from zero
        return type(self).of, (self.restored(), {*self.edited, *self._written()})

    def take(self, held: dict[str, Any], names: Iterable[str]) -> None:
        """These attributes as they are now."""
        for name in names:
            value = self.values[name] = held[name]
            self.lists.pop(name, None)
            self.tables.pop(name, None)
            self.edited.discard(name)
            if type(value) is list:
                self.lists[name] = tuple(value)
            elif (told := _told(value)) is not None:
                self.tables[name] = told, told()

    def restored(self) -> dict[str, Any]:
        """The attributes, their lists with the items that they had."""
        return self.values | {name: list(items) for name, items in self.lists.items()}

    def over(self, held: dict[str, Any]) -> Snapshot:
        """The same of a copy of the attributes, which has lists of its own and shares all else."""
        own = {name: held[name] for name in self.lists if name in held}
        return Snapshot(self.values | own, dict(self.lists), dict(self.tables), set(self.edited))

    def touched(self, held: dict[str, Any]) -> list[str]:
        """The attributes that are other objects or lists of other items, or were written into."""
        values = self.values
        names = [name for name, items in self.lists.items() if not _holds_just(held.get(name), items)]
        names += self._written()
        if not self.edited and len(held) == len(values) and all(map(is_, held.values(), values.values())):
            return names
        known = {*names, *self.edited}
        return [
            name
            for name, value in held.items()
            if name in known or (value is not values.get(name, _ABSENT) and name not in self.lists)
        ]

    def differs(self, held: dict[str, Any], name: str) -> bool:
        """Whether a touched attribute has other contents, too; of what was written into they are not known."""
        if name in self.edited or name in self._written():
            return True
        was = list(self.lists[name]) if name in self.lists else self.values.get(name, _ABSENT)
        return not same(held.get(name, _ABSENT), was)

    def _written(self) -> list[str]:
        return [name for name, (told, what) in self.tables.items() if told() != what]


@dataclass(slots=True)
class Position:
    """A scheduler's place in its schedule. What it refers to is shared between copies and never written into."""

    held: dict[str, Any]  # the scheduler's attributes themselves
    # The schedule, as set_timesteps was told it
    template: Any = None  # the original scheduler at rest, never stepped nor edited
    arguments: dict[str, Any] | None = None
    key: tuple[Any, ...] = ()
    # The run
    rehearsal: Rehearsal | None = None
    begin: int | None = None
    options: dict[str, Any] = field(default_factory=dict)  # step's arguments that rows depend on
    dtypes: Dtypes | None = None
    row: int = -1  # the next; -1 where it must be found
    index: int = 0  # of the next step's timestep, as far as is known
    latents: list[Tensor] = field(default_factory=list)  # at the row's start, without the sample
    pointer: int = 0  # where the timesteps lie, and bytes from one to the next
    stride: int = 0
    twin: Tensor | None = None  # the timesteps of which this deep copy's are one: hosts step it by those, too
    left: Snapshot = field(default_factory=Snapshot)  # by this package: what is touched, someone else changed
    start: Snapshot | None = None  # at the run's first step
    first: int = 0  # of its timestep: of a class without memory, `begin` may be earlier

    @classmethod
    def resting(cls, held: dict[str, Any]) -> Position:
        """Before any schedule."""
        return cls(held, left=Snapshot.of(held))

    @classmethod
    def scheduled(cls, held: dict[str, Any], template: Any, arguments: dict[str, Any]) -> Position:
        """After `set_timesteps` with these arguments."""
        key = (fingerprint(template), freeze(arguments))
        return cls(held, template, arguments, key, left=Snapshot.of(held))

    def anew(self, held: dict[str, Any]) -> Position:
        """The same schedule at the start of this run, over `held`, which is filled."""
        assert self.start is not None
        held.update(self.start.restored())
        return self._over(held, self.start)

    def copied(self, held: dict[str, Any]) -> Position:
        """The same position over `held`, which is filled: every list copied, all else shared."""
        held.update(self.held)
        for name in [name for name, value in held.items() if type(value) is list]:
            held[name] = list(held[name])
        position = self._over(held, self.left)
        position.start, position.first = self.start, self.first
        return position

    def _over(self, held: dict[str, Any], left: Snapshot) -> Position:
        return Position(
            held, self.template, self.arguments, self.key, self.rehearsal, self.begin, self.options, self.dtypes,
            left=left.over(held),
        )  # fmt: skip

    def touched(self) -> list[str]:
        """The attributes that someone else changed since this package left them; before any schedule, none."""
        return [] if self.template is None else self.left.touched(self.held)

    def edited(self) -> list[str]:
        """Those touched that have other contents, too."""
        return [name for name in self.touched() if self.left.differs(self.held, name)]

    def begin_run(self) -> None:
        """Remember what the run starts from."""
        self.first, self.start = self.index, Snapshot.of(self.held, self.edited())

    # Finding the row

    def find(
        self, timestep: Any, sample: Tensor, options: dict[str, Any] | None = None, dtypes: Dtypes | None = None
    ) -> Reason | None:
        """Come to the row of `timestep`, or say why there is none. Without `options` they may be any."""
        if (
            self.rehearsal is not None
            and self.begin is not None
            and 0 <= self.row < len(self.rehearsal.rows)
            and self._is_timestep(timestep, self.begin + self.row)
            and (options is None or self._is_for(sample, options, dtypes))
            and not self.touched()
        ):
            return None
        self.row = -1
        if self.arguments is None:
            return "set_timesteps was not called on it"
        index = self._locate(timestep)
        if index is None:
            return "the timestep is none of the schedule's"
        reason: Reason | None = None
        for begin in self._begins(index):
            reason = self._adopt(begin, index - begin, sample, options, dtypes)
            if reason is None:
                break
        return reason

    def place(self, timestep: Any) -> str:
        """Which step one of `timestep` is, to be read: the row of its run, and the entry of the timesteps."""
        if self.arguments is None:
            return ""
        self._locate(timestep)
        begins = self.start is None or self.held.get("_step_index", _ABSENT) is None
        row = 0 if begins else max(self.index - self.first, 0)
        return f" at row {row} (timesteps[{self.index}])"

    def _locate(self, timestep: Any) -> int | None:
        """The index of `timestep`, if it is one of the schedule's; notes it, else the one that is due."""
        due = (self.held.get("_step_index"), self.held.get("_begin_index"))
        self.index = next((index for index in due if index is not None), self.index)
        index = self._index(timestep)
        self.index = self.index if index is None else index
        return index

    def _is_timestep(self, value: Any, index: int) -> bool:
        """Whether `value` is entry `index` of the timesteps, by where it lies in memory: no host read."""
        return type(value) is Tensor and value.ndim == 0 and value.data_ptr() == self.pointer + index * self.stride

    def _is_for(self, sample: Tensor, options: dict[str, Any], dtypes: Dtypes | None) -> bool:
        return (
            options == self.options
            and dtypes == self.dtypes
            and (not self.latents or self.latents[0].shape == sample.shape)
        )

    def _index(self, timestep: Any) -> int | None:
        """Where in the timesteps `timestep` is: by memory; else by value, unless a device would have to be asked."""
        timesteps = self.held.get("timesteps")
        if not isinstance(timesteps, Tensor) or timesteps.ndim != 1:
            return None
        if isinstance(timestep, Tensor):
            if type(timestep) is not Tensor or timestep.ndim or timestep.dtype != timesteps.dtype:
                return None
            for entries in (timesteps, self.twin):
                if entries is not None:
                    self.pointer, self.stride = entries.data_ptr(), entries.stride(0) * entries.element_size()
                    index, rest = divmod(timestep.data_ptr() - self.pointer, self.stride)
                    if rest == 0 and 0 <= index < len(entries):
                        return index
            if timestep.device.type != "cpu":
                return None
            timestep = timestep.item()
        if timesteps.device.type != "cpu" or type(timestep) is not (
            float if timesteps.dtype.is_floating_point else int  # other kinds are refused by some classes
        ):
            return None
        found = [index for index, value in enumerate(timesteps.tolist()) if value == timestep]
        return self.index if self.index in found else next(iter(found), None)  # a value may be there twice

    def _begins(self, index: int) -> Collection[int]:
        """The begin indices from which a run may have come to `index`."""
        if self.held.get("_step_index", _ABSENT) is None:
            return (index,)
        begin = (self.held.get("_begin_index") or 0) if self.begin is None else self.begin
        if "_step_index" in self.held or begin == index:
            return (begin,)
        # A class that keeps no index may have begun anywhere, unless it holds the memory of another row.
        rested = self.rehearsal is None or all(
            _matches(expected, self.held.get(name), None, {}, None)
            for name, expected in self.rehearsal.before[0].items()
        )
        return (begin, index) if rested else (begin,)

    def _adopt(
        self, begin: int, row: int, sample: Tensor, options: dict[str, Any] | None, dtypes: Dtypes | None
    ) -> Reason | None:
        """Go on at `row` of the run from `begin` if the attributes are what it begins with; else say what is not."""
        held = self.held
        options = self.options if options is None else options
        dtypes = dtypes or self.dtypes or (sample.dtype, sample.dtype)
        rehearsal = self._rehearsed(begin, options, dtypes)
        if not isinstance(rehearsal, Rehearsal):
            return rehearsal
        if not 0 <= row < len(rehearsal.rows):
            return f"it is none of the rows of a run that begins at index {begin}"
        if row == 0 and held.get("_step_index", _ABSENT) is None:
            chosen = held.get("_begin_index")
            if chosen not in (None, begin):
                return f"the begin index is {chosen} and the timestep that of index {begin}"
            if chosen is None and not rehearsal.finds_itself:
                return "the timestep is there twice, and no begin index says which is meant"
        touched = self.touched()
        for name in touched:
            if name not in rehearsal.moving and name != "_begin_index" and self.left.differs(held, name):
                return f"{name} was edited"
        latents: dict[int, Tensor] = {}
        times = held["timesteps"][begin:]
        for name, expected in rehearsal.before[row].items():
            if name in touched and holds(expected, Latent):
                return f"{name} was edited"
            value, scaled = held.get(name, _ABSENT), rehearsal.scaled[row].get(name, expected)
            if not (
                _matches(expected, value, times, latents, sample.shape)
                or _matches(scaled, value, times, latents, sample.shape)
                or (row == 0 and (self._is_at_rest(name, touched) or (name, value) == ("_step_index", begin)))
            ):
                return f"{name} is not what this row begins with"
        self.rehearsal, self.begin, self.options, self.dtypes, self.row = rehearsal, begin, options, dtypes, row
        self.latents = [latents[number] for number in sorted(latents)]
        self.left, self.index = Snapshot.of(held), begin + row
        if row == 0 or self.start is None or self.index < self.first:
            self.begin_run()
        return None

    def _rehearsed(self, begin: int, options: dict[str, Any], dtypes: Dtypes) -> Rehearsal | Reason:
        """The rehearsal of the run from `begin`, this position's own where it is that one."""
        if self.rehearsal is not None and (begin, options, dtypes) == (self.rehearsal.begin, self.options, self.dtypes):
            return self.rehearsal
        assert self.arguments is not None
        schedule = Schedule(self.arguments, options, begin)
        found = rehearse(Recipe((*self.key, begin, freeze(options)), self.template, schedule, dtypes))
        if isinstance(found, Rehearsal):
            timesteps = self.held["timesteps"][begin : begin + len(found.rows)]
            if timesteps.device.type == "cpu" and not torch.equal(timesteps, found.timesteps):
                return "timesteps are not those that the same set_timesteps makes elsewhere"
        return found

    def _is_at_rest(self, name: str, touched: list[str]) -> bool:
        """Whether an attribute is as set_timesteps left it, the memory of an earlier run included: then it is spent."""
        return name not in touched if self.start is None else not self.start.differs(self.held, name)

    # What a row leaves

    @property
    def current(self) -> tuple[Rehearsal, Row]:
        """The run, and the row of it that `find` came to."""
        assert self.rehearsal is not None
        return self.rehearsal, self.rehearsal.rows[self.row]

    def scale(self, sample: Tensor) -> None:
        """Leave what `scale_model_input` would have left."""
        self._put(self.current[0].scaled[self.row], [sample, *self.latents])

    def advance(self, latents: list[Tensor]) -> None:
        """Leave what the original's step would have left, with these latents, the sample first."""
        rehearsal, _ = self.current
        self.row += 1
        self.index += 1
        self.latents = latents[1:]
        self._put(rehearsal.before[self.row], latents)

    def fill(self, skeleton: Any, latents: Sequence[Tensor], made: Sequence[Tensor] = ()) -> Any:
        """A skeleton with the tensors in it."""
        kind = type(skeleton)
        if kind is Latent:
            return latents[skeleton.number]
        if kind is list:
            return [self.fill(item, latents, made) for item in skeleton]
        if kind is Made:
            return made[skeleton.number]
        if kind is Time:
            return self.held["timesteps"][(self.begin or 0) + skeleton.row]
        return latents[0].shape[skeleton.first :] if kind is Size else skeleton

    def _put(self, skeleton: Skeleton, latents: Sequence[Tensor]) -> None:
        for name, value in skeleton.items():
            self.held[name] = self.fill(value, latents)
        self.left.take(self.held, skeleton)


def _matches(
    expected: Any, value: Any, times: Tensor | None, latents: dict[int, Tensor], shape: torch.Size | None
) -> bool:
    """Whether an attribute is what its skeleton says, in a run over `times`; collects the latents that it holds."""
    if isinstance(expected, Latent):
        if not isinstance(value, Tensor) or value.shape != shape:
            return False
        latents[expected.number] = value
        return True
    if isinstance(expected, Time):
        return times is not None and isinstance(value, Tensor) and same(value, times[expected.row])
    if isinstance(expected, Size):
        return shape is not None and bool(value == shape[expected.first :])
    if type(expected) is list:
        return (
            type(value) is list
            and len(value) == len(expected)
            and all(_matches(*pair, times, latents, shape) for pair in zip(expected, value, strict=True))
        )
    return same(expected, value)


def _holds_just(value: Any, kept: Sequence[Any]) -> bool:
    """Whether a list holds these objects."""
    return type(value) is list and len(value) == len(kept) and all(map(is_, value, kept))


def _told(value: Any) -> Callable[[], Any] | None:
    """What tells by its changes that a table was written into; None of a latent, which a row reads as it is."""
    if isinstance(value, np.ndarray):
        return value.tobytes
    if not isinstance(value, Tensor) or value.ndim > 1:
        return None
    if not value.is_inference():
        return partial(getattr, value, "_version")
    if value.device.type != "cpu":
        return None  # its contents would have to be waited for
    bits = (torch.int8, torch.int16, torch.int32, torch.int64)[value.element_size().bit_length() - 1]
    return value.view(bits).numpy().tobytes
