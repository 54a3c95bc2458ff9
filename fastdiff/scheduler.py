"""The drop-in: a diffusers scheduler whose `step()` is a table row.

    pipe.scheduler = fastdiff.table_scheduler(pipe.scheduler)

A handle is the scheduler itself (class, config, attributes, signatures) but for three methods. `set_timesteps` notes
the schedule, `scale_model_input` and `step` apply the table's row. The scheduler's own attributes stay the memory: a
row reads its latents there and leaves there what the original would have left. So any step that is not on the schedule
can be the original's own, before and after it the table's.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastdiff.errors import FastdiffError
from fastdiff.fingerprint import is_latent
from fastdiff.intercept import Interception
from fastdiff.position import Position, Reason, Snapshot
from fastdiff.stepper import check_scheduler


class TableStats(NamedTuple):
    """Steps of one handle: rows of a table, and the original's own `step()`."""

    hits: int
    fallbacks: int


def table_scheduler(scheduler: Any, *, strict: bool = False) -> Any:
    """A copy of `scheduler` whose `step()` is a table row, of a subclass of its class; `scheduler` is not changed.

    A step that no table covers (a timestep that is not the schedule's next, edited memory, an option that is not
    linear) is the original's own and gives its result; the first one warns, with `strict` any raises FastdiffError.
    A write in mid-run that moves no version counter of torch, through `tensor.data` or `tensor.numpy()`, is not seen,
    by `strict` neither: the step stays the table's. Raises NotLinear for a class that has no table.
    """
    check_scheduler(scheduler)
    handle = object.__new__(table_scheduler_class(_original(type(scheduler))))
    vars(handle).update(copy.deepcopy(vars(scheduler)))
    handle._table_state().strict = strict
    return handle


def table_scheduler_class(cls: type) -> Any:
    """The subclass of the diffusers scheduler class `cls` whose instances are handles: one class, whoever asks."""
    with _classes_lock:
        if cls not in _classes:
            _classes[cls] = cls if issubclass(cls, TableScheduler) else _subclass(cls)
        return _classes[cls]


_classes: dict[type, type] = {}
_classes_lock = threading.Lock()


def _original(cls: type) -> type:
    return cls._table_calls.cls if issubclass(cls, TableScheduler) else cls


@dataclass(frozen=True)
class _Calls:
    """A scheduler class, and how the arguments of its methods are named."""

    cls: Any
    step_names: tuple[str, ...]
    defaults: dict[str, Any]  # of step's
    scale_names: tuple[str, ...]
    schedule: inspect.Signature

    @classmethod
    def of(cls, original: Any) -> _Calls:
        step = list(inspect.signature(original.step).parameters.values())[1:]
        scale = inspect.signature(original.scale_model_input) if hasattr(original, "scale_model_input") else None
        return cls(
            cls=original,
            step_names=tuple(parameter.name for parameter in step),
            defaults={parameter.name: parameter.default for parameter in step},
            scale_names=tuple(scale.parameters)[1:] if scale else (),
            schedule=inspect.signature(original.set_timesteps),
        )

    def arguments(self, handle: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a `set_timesteps` that say what the schedule is, the caller's arrays copied."""
        bound = self.schedule.bind(handle, *args, **kwargs).arguments
        named: dict[str, Any] = {}
        for name, value in list(bound.items())[1:]:
            if self.schedule.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                named |= value
            elif name != "device":
                named[name] = value
        return {name: copy.deepcopy(value) for name, value in named.items()}

    def step_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments of a `step` by name; None where they are such that the original raises TypeError."""
        given = dict(zip(self.step_names, args, strict=False)) | kwargs
        complete = {"model_output", "timestep", "sample"} <= given.keys() <= self.defaults.keys()
        return given if complete and len(given) == len(args) + len(kwargs) else None

    def options(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a `step` that are not their defaults."""
        return {
            name: value
            for name, value in given.items()
            if not (value is (default := self.defaults[name]) or (_is_plain(value) and value == default))
        }


def _subclass(cls: Any) -> type:
    """`cls` with the table's `step`, and `set_timesteps` and `scale_model_input` around its own; nothing more."""
    calls = _Calls.of(cls)

    @functools.wraps(cls.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._table_step(args, kwargs)

    @functools.wraps(cls.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._table_set_timesteps(args, kwargs)

    methods: dict[str, Any] = {"step": step, "set_timesteps": set_timesteps}
    if "timestep" in calls.scale_names:  # other classes scale nothing

        @functools.wraps(cls.scale_model_input)
        def scale_model_input(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._table_scale(args, kwargs)

        methods["scale_model_input"] = scale_model_input
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (TableScheduler, cls), {**named, **methods, "__slots__": (), "_table_calls": calls})


class TableScheduler:
    """What a handle has beyond its scheduler's class. `table_scheduler` makes handles; this names them."""

    __slots__ = ("_table",)
    _table_calls: _Calls
    _table: _Table

    @property
    def stats(self) -> TableStats:
        """How many steps of this handle were rows of a table, and how many were the original's own."""
        table = self._table_state()
        return TableStats(table.hits, table.fallbacks)

    def for_request(self) -> Self:
        """A handle for one request: the same schedule at its start, for the price of copying a few dicts.

        Tables (timesteps, sigmas, alphas) are shared until `set_timesteps` makes new ones: to edit one, replace it.
        """
        position = self._table_state().position
        return self._table_copy(position.copied if position.start is None else position.anew)

    def __copy__(self) -> Self:
        return self._table_copy(self._table_state().position.copied)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The current row, memory and counts, and nothing shared that anyone writes into."""
        restored, parts = self.__reduce__()
        position = self._table.position
        memo[id(position.template)] = position.template
        with _counting_writes():
            for value in vars(self).values():
                if isinstance(value, Tensor) and id(value) not in memo:
                    memo[id(value)] = value.clone()  # its own deepcopy takes ten times as long
            copied: Self = restored(*copy.deepcopy(parts, memo))
        if position.arguments is not None and "timesteps" not in position.edited():
            copied._table.position.twin = position.held["timesteps"]
        return copied

    def __reduce__(self) -> Any:
        table = self._table_state()
        position = table.position
        told = {name: getattr(table, name) for name in ("strict", "lent", "settled", "hits", "fallbacks")}
        place = {name: getattr(position, name) for name in ("template", "arguments", "begin", "start", "first")}
        return _restored, (self._table_calls.cls, position.held, position.edited(), told, place)

    def _table_state(self) -> _Table:
        try:
            return self._table
        except AttributeError:  # made by its class, as from_config does
            self._table = _Table(Position.resting(vars(self)))
            return self._table

    def _table_copy(self, over: Callable[[dict[str, Any]], Position]) -> Self:
        """A handle whose position `over` makes, and whose attributes it fills; its first step finds the row."""
        table, copied = self._table, object.__new__(type(self))
        copied._table = _Table(over(vars(copied)), table.strict, table.lent, table.settled)
        return copied

    def _table_set_timesteps(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original's own, its arguments noted."""
        calls, table, held = self._table_calls, self._table_state(), vars(self)
        arguments = calls.arguments(self, args, kwargs)
        before = table.position
        if table.lent is not None and held["_internal_dict"] is table.lent:
            held["_internal_dict"] = before.left.values["_internal_dict"] = table.settled  # mu was the last request's
        table.lent = table.settled = None
        settled = held["_internal_dict"] = _settled(held["_internal_dict"])
        template = _template(calls.cls, before)
        if arguments.get("mu") is not None:  # some classes write it into their config
            table.settled, table.lent = settled, type(settled)(settled)
            held["_internal_dict"] = table.lent
        table.position = Position.resting(held)  # should the original raise
        with _counting_writes():
            returned = calls.cls.set_timesteps(self, *args, **kwargs)
        table.position = Position.scheduled(held, template, arguments)
        # What the last run was asked for is a good guess at what this one will be.
        table.position.options, table.position.dtypes = before.options, before.dtypes
        return returned

    def _table_scale(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`scale_model_input`, a row's c_in."""
        calls, table = self._table_calls, self._table_state()
        position = table.position
        given = dict(zip(calls.scale_names, args, strict=False)) | kwargs
        sample = given.get("sample")
        if (
            not isinstance(sample, Tensor)
            or _is_probed()
            or position.find(given.get("timestep"), sample) is not None  # the step will say so
        ):
            return self._table_original(calls.cls.scale_model_input, args, kwargs)
        position.scale(sample)
        c_in = position.current[1].c_in
        return sample if c_in == 1.0 else sample * c_in

    def _table_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`step`: a row of the table, or the original's own."""
        calls, table = self._table_calls, self._table_state()
        position = table.position
        given = calls.step_arguments(args, kwargs)
        if given is None or _is_probed():
            return calls.cls.step(self, *args, **kwargs)
        model_output, timestep, sample = given.pop("model_output"), given.pop("timestep"), given.pop("sample")
        generator, return_dict = given.pop("generator", None), given.pop("return_dict", True)
        options = calls.options(given) if given else given
        reason: Reason | None = _unfit(sample, model_output, options)
        if reason is None:
            reason = position.find(timestep, sample, options, (sample.dtype, model_output.dtype))
        if reason is not None:
            return self._table_fall_back(reason, timestep, args, kwargs)
        rehearsal, row = position.current
        noise = _noise(row.draws, sample, generator) if row.draws else []
        latents, made = row.advance([sample, *position.latents], model_output, noise)
        position.advance(latents)
        table.hits += 1
        if return_dict:
            return rehearsal.output_class(**{name: position.fill(value, latents, made) for name, value in row.output})
        return tuple(position.fill(value, latents, made) for _, value in row.output[: rehearsal.tuple_length])

    def _table_fall_back(self, reason: Reason, timestep: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original's own step, on the attributes as they are."""
        table, position = self._table, self._table.position
        place = f"{type(self).__name__}{position.place(timestep)}"
        why = f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else reason
        if table.strict:
            if isinstance(reason, FastdiffError):
                raise type(reason)(*reason.args)
            raise FastdiffError(f"{place}: expected the next step of its schedule, but {why}")
        if not table.fallbacks:
            warnings.warn(f"{place}: its own step() runs in place of the table's: {why}", stacklevel=4)
        table.fallbacks += 1
        if position.start is None:
            position.begin_run()
        try:
            return self._table_original(self._table_calls.cls.step, args, kwargs)
        finally:
            position.row = -1
            if position.rehearsal is not None:  # edited memory has had its step
                held = position.held
                position.left.take(held, (name for name in position.rehearsal.moving if name in held))

    def _table_original(self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method of the original; what it changes is nobody's edit."""
        position, held = self._table.position, vars(self)
        before = Snapshot.of(held)
        try:
            return method(self, *args, **kwargs)
        finally:
            if changed := before.touched(held):
                position.row = -1
            position.left.take(held, changed)


@dataclass(slots=True)
class _Table:
    """What a handle knows beyond its attributes."""

    position: Position
    strict: bool = False
    lent: Any = None  # the config that set_timesteps(mu=) wrote into, and the one that it stands for
    settled: Any = None
    hits: int = 0
    fallbacks: int = 0


def _restored(
    cls: Any, held: dict[str, Any], edited: list[str], told: dict[str, Any], place: dict[str, Any]
) -> TableScheduler:
    """The inverse of `TableScheduler.__reduce__`: the rehearsal is looked up again at the first step."""
    handle: TableScheduler = object.__new__(table_scheduler_class(cls))
    vars(handle).update(held)
    held = vars(handle)
    if place["template"] is None:
        position = Position.resting(held)
    else:
        position = Position.scheduled(held, place["template"], place["arguments"])
    position.begin, position.start, position.first = place["begin"], place["start"], place["first"]
    position.left.edited.update(edited)
    handle._table = _Table(position, **told)
    return handle


def _template(cls: Any, before: Position) -> Any:
    """The scheduler at rest that a handle was at its last `set_timesteps`, with what was edited since."""
    touched = list(before.held) if before.template is None else before.touched()
    if not touched:
        return before.template
    template = object.__new__(cls)
    vars(template).update({} if before.template is None else vars(before.template))
    vars(template).update({name: _at_rest(before.held[name]) for name in touched})
    return template


def _at_rest(value: Any) -> Any:
    """A copy of an attribute without latents: a template must neither change nor keep a request's memory alive."""
    if isinstance(value, Tensor):
        return None if is_latent(value) else value.detach().clone()
    return list(map(_at_rest, value)) if type(value) is list else copy.deepcopy(value)


def _settled(config: Any) -> Any:
    """A config whose items are what its attributes say: people edit those, and schedulers read them."""
    if all(getattr(config, key, value) is value for key, value in config.items()):
        return config
    return type(config)({key: getattr(config, key, value) for key, value in config.items()})


def _unfit(sample: Any, model_output: Any, options: dict[str, Any]) -> str | None:
    """What of a step's arguments no row covers."""
    if not isinstance(sample, Tensor) or not isinstance(model_output, Tensor):
        return "the sample or the model output is no tensor"
    if sample.shape != model_output.shape:
        return f"the model output is {tuple(model_output.shape)} and the sample {tuple(sample.shape)}"
    for name, value in options.items():
        if not _is_plain(value):
            return f"{name} is given, and rows hold numbers alone"
    return None


def _noise(draws: tuple[torch.dtype, ...], sample: Tensor, generator: Any) -> list[Tensor]:
    from diffusers.utils.torch_utils import randn_tensor  # which knows lists of generators and where each draws

    return [randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=dtype) for dtype in draws]


@contextmanager
def _counting_writes() -> Iterator[None]:
    """No inference mode, whose tensors do not count what is written into them."""
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


def _is_probed() -> bool:
    """Whether the original is being probed through this handle, which must then be the original."""
    return isinstance(_get_current_dispatch_mode(), Interception)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (int, float, str))
