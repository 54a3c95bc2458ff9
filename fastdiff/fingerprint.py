"""What a scheduler's rows depend on, as a cache key: compared in full, because contents are edited in place."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

_SCALARS = frozenset({int, float, bool, str, type(None)})
_NAMED = (torch.dtype, torch.layout, torch.memory_format)  # of which torch makes each once, as enums do
_LEFT_OUT = frozenset(
    {"timesteps", "sigmas", "num_inference_steps", "_step_index", "_begin_index", "timestep_list", "_internal_dict"}
)
"""What set_timesteps or a run's steps write anew, and the config, which is looked at by itself."""


class _Content(NamedTuple):
    """An array in a cache key: compared in full, hashed by its size alone, so that it is read once."""

    kind: Hashable
    content: bytes

    def __hash__(self) -> int:
        return len(self.content)


def freeze(value: Any) -> Hashable:
    """A hashable stand-in that is equal exactly when the contents are; of objects that are no data, which one it is."""
    kind = type(value)
    if kind in _SCALARS:
        return kind, value  # 1, 1.0 and True are different arguments
    if isinstance(value, Tensor):
        return _Content((value.dtype, value.shape), _readable(value).numpy(force=True).tobytes())
    if isinstance(value, np.ndarray):
        return _Content((value.dtype, value.shape), value.tobytes())
    if isinstance(value, Mapping):
        return tuple([(key, freeze(item)) for key, item in value.items()])
    if isinstance(value, (list, tuple)):
        return kind, *map(freeze, value)
    if kind is FunctionType:  # two schedulers of a class may each have made their own of one line
        bound = *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).items(), *_closed_over(value)
        return kind, value.__code__, id(value.__globals__), *map(_freeze_bound, bound)
    if is_scheduler(value):
        return fingerprint(value)
    try:
        hash(value)
    except TypeError:  # a namespace or the like, or a set
        held = getattr(value, "__dict__", None)
        return kind, repr(value) if held is None else tuple((key, _freeze_bound(item)) for key, item in held.items())
    return kind, value


def is_scheduler(value: Any) -> bool:
    """Whether it has what each of diffusers' schedulers has."""
    return hasattr(value, "set_timesteps") and hasattr(value, "step")


def is_latent(value: Any) -> bool:
    """Whether an attribute of a scheduler is what a run's steps left there: all else that it holds is one-dimensional.

    A copy of the scheduler to be probed goes without (`stepper.pristine`), so no row depends on it.
    """
    return isinstance(value, Tensor) and value.ndim > 1


def _closed_over(function: Any) -> list[Any]:
    """What a function's closure holds; an empty cell has nothing."""
    found: list[Any] = []
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):
            found.append(cell.cell_contents)
    return found


def _freeze_bound(value: Any) -> Hashable:
    """Contents of what is plain data; of all else, another function or the scheduler itself, which object it is."""
    if type(value).__hash__ is None and hasattr(value, "__dict__"):
        return type(value), id(value)  # it may hold itself
    if type(value) in _SCALARS or isinstance(value, (Tensor, np.ndarray, list, tuple, Mapping)):
        return freeze(value)
    try:
        return weakref.ref(value)
    except TypeError:
        return freeze(value)


def _readable(tensor: Tensor) -> Tensor:
    """Its memory in a dtype that numpy has."""
    return tensor.view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor


class Fingerprint:
    """A scheduler as a cache key: hashed once, because there are a hundred parts to it."""

    def __init__(self, parts: Hashable) -> None:
        self._parts, self._hash = parts, hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self._parts == other._parts


def fingerprint(scheduler: Any) -> Fingerprint:
    """Class, config items, whatever its attributes hold, and the process's default dtype, in which some compute.

    What `set_timesteps` and a run's steps write is left out, so that a template in use is not a different scheduler.
    """
    seen = _seen.get(scheduler)
    if seen is None or not seen.unchanged(scheduler):
        seen = _Seen(scheduler)
        if not seen.holds_its_scheduler:  # which then would stay in the dictionary for ever
            _seen[scheduler] = seen
    return seen.key


class Unsettled(RuntimeError):
    """Something changed a scheduler, or the process's default dtype, while the scheduler was looked at: ask again."""


def settled(scheduler: Any, key: Hashable, build: Callable[[], T]) -> Callable[[], T]:
    """`build`, which raises Unsettled unless `key` is still the scheduler's afterwards: no cache must keep the rest."""

    def built() -> T:
        made = build()
        if fingerprint(scheduler) != key:
            raise Unsettled(
                f"expected {type(scheduler).__name__} and torch's default dtype to stay as they are while its rows are "
                "made, but another thread changed one of them: ask again"
            )
        return made

    return built


class _Watched(NamedTuple):
    """A tensor, and its live memory as bytes, to be read through numpy without going through torch again."""

    tensor: Tensor
    pointer: int
    dtype: torch.dtype
    shape: torch.Size
    read: Callable[[], bytes]
    content: bytes

    @classmethod
    def of(cls, tensor: Tensor) -> _Watched:
        read = _readable(tensor.detach()).numpy().tobytes  # of an alias
        return cls(tensor, tensor.data_ptr(), tensor.dtype, tensor.shape, read, read())


class _Seen:
    """A scheduler as it was when its key was taken."""

    def __init__(self, scheduler: Any) -> None:
        self._config, self._default_dtype = scheduler.config, torch.get_default_dtype()
        config = {key: (value, freeze(value)) for key, value in self._config.items() if key[0] != "_"}
        self._attributes = {key: value for key, value in vars(scheduler).items() if _counts(key, value)}
        attributes = {key: freeze(value) for key, value in self._attributes.items()}
        self.key = Fingerprint(
            (
                self._default_dtype,
                type(scheduler),
                tuple((key, frozen) for key, (_, frozen) in config.items()),
                tuple(attributes.items()),
            )
        )
        self.holds_its_scheduler = any(
            one is scheduler
            for value in self._attributes.values()
            for one in (getattr(value, "__self__", None), *_closed_over(value))
        )
        # Everything that can change while it stays the same object. A config's own items cannot: it is a FrozenDict.
        self._mutable = [(value, frozen) for value, frozen in config.values() if type(value) not in _SCALARS]
        self._watched: list[_Watched] = []
        for key, value in self._attributes.items():
            if isinstance(value, Tensor) and value.device.type == "cpu":
                self._watched.append(_Watched.of(value))
            elif type(value) not in _SCALARS:
                self._mutable.append((value, attributes[key]))

    def unchanged(self, scheduler: Any) -> bool:
        before, same = self._attributes, 0
        for key, value in vars(scheduler).items():
            if key in before:
                if before[key] is not value:
                    return False
                same += 1
            elif _counts(key, value):
                return False
        if same != len(before) or scheduler.config is not self._config:
            return False
        if torch.get_default_dtype() is not self._default_dtype:
            return False
        for tensor, pointer, dtype, shape, read, content in self._watched:
            moved = tensor.data_ptr() != pointer  # `set_` and `.data =` move it
            if moved or tensor.dtype is not dtype or tensor.shape != shape or read() != content:
                return False
        return all(freeze(value) == frozen for value, frozen in self._mutable)


def _counts(key: str, value: Any) -> bool:
    """Whether rows may depend on this attribute of a scheduler; an object that equals nothing but itself is no data."""
    hashes: Any = type(value).__hash__
    is_data = hashes is not object.__hash__ or isinstance(value, _NAMED) or callable(value) or is_scheduler(value)
    return is_data and key not in _LEFT_OUT and not _is_of_a_run(value)


def _is_of_a_run(value: Any) -> bool:
    """Latents, and lists with room for latents and nothing else in them."""
    if isinstance(value, (list, tuple, dict)):
        items = value.values() if isinstance(value, dict) else value
        return all(item is None or _is_of_a_run(item) for item in items)
    return is_latent(value)


_seen: weakref.WeakKeyDictionary[Any, _Seen] = weakref.WeakKeyDictionary()
