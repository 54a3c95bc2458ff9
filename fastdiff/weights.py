"""What a captured or compiled step froze of a model, and whether it is still so.

A graph reads weights by address and has every Python number of the model baked in: a LoRA scale, an IP-Adapter scale,
which adapter is active, which hook runs; so has a compiled step whose guards were dropped. Values written in place stay
visible to both; everything else does not.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Hashable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

_SCALARS = (int, float, bool, str, type(None), torch.dtype, torch.device)
_TREE = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
CALL = "_compiled_call_impl"  # a module's own function, compiled: by nn.Module.compile(), or during somebody's step
_SEEN = {"training", *_TREE, *_HOOKS}
_OF_TORCH = frozenset(vars(nn.Module())) - _SEEN | {CALL}  # gradients, state dicts: no forward sees them
_FREEU = ("s1", "s2", "b1", "b2")  # of a UNet's up blocks, where `enable_freeu` puts them
_ADAPTER = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters")  # of a layer of peft

_Address = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]
_MISSING = object()
_NONE: dict[str, Any] = {}


class Weights:
    """The tree of `model` as it is now: modules, tensors' addresses, hooks, and the plain numbers they keep.

    `changed` walks flat lists that are made once, so that it can be asked once per request. It leaves out `settings`,
    for whoever looks at those more often.
    """

    def __init__(self, model: nn.Module | None, settings: Settings | None = None) -> None:
        self._left_out = settings.places if settings else frozenset()
        self._modules: list[tuple[str, nn.Module, type]] = []
        self._dicts: list[tuple[str, dict[Any, Any], int]] = []  # name, a dict that is watched, its length
        self._entries: list[tuple[str, dict[Any, Any], Any, Any]] = []  # name, dict, key, value: must be the same
        self._tensors: list[tuple[str, Tensor, _Address]] = []
        self._lists: list[tuple[str, list[Any], list[Any]]] = []
        for name, module in model.named_modules() if model is not None else ():
            self._modules.append((name or type(module).__name__, module, type(module)))
            self._watch_object(name or type(module).__name__, vars(module), _OF_TORCH)
            for tree in (*_TREE, *_HOOKS):
                self._watch_dict(f"{name}.{tree}" if name else tree, vars(module)[tree])

    def changed(self) -> str | None:
        """What is no longer as it was, by its name in the model; None if a graph still computes the same function."""
        for name, module, kind in self._modules:
            if type(module) is not kind:
                return f"{name} was a {kind.__name__}, is a {type(module).__name__}"
        for name, entries, length in self._dicts:
            if len(entries) != length and _count(entries) != length:
                return f"{name} has {len(entries)} entries, had {length}"
        for name, entries, key, value in self._entries:
            now = entries.get(key, _MISSING)
            if now is not value and not (type(now) is type(value) and _is_same(now, value)):
                return f"{name} was {_spell(value)}, is {_spell(now)}"
        for name, tensor, address in self._tensors:
            if _address(tensor) != address:
                return f"{name} was moved, resized or cast"
        for name, values, before in self._lists:
            if len(values) != len(before) or any(a is not b and a != b for a, b in zip(values, before, strict=True)):
                return f"{name} was {before}, is {values}"
        return None

    def _watch_object(self, name: str, attributes: dict[str, Any], but: frozenset[str]) -> None:
        own = {key: value for key, value in attributes.items() if key not in but}
        self._dicts.append((name, attributes, _count(attributes)))
        for key, value in own.items():
            if key not in (*_TREE, *_HOOKS):
                self._watch(f"{name}.{key}", attributes, key, value)

    def _watch_dict(self, name: str, entries: dict[Any, Any]) -> None:
        self._dicts.append((name, entries, len(entries)))
        for key, value in entries.items():
            self._watch(f"{name}[{key!r}]", entries, key, value)

    def _watch(self, name: str, holder: dict[Any, Any], key: Any, value: Any) -> None:
        if (id(holder), key) in self._left_out:
            return
        self._entries.append((name, holder, key, value))
        if isinstance(value, Tensor):
            self._tensors.append((name, value, _address(value)))
        elif isinstance(value, dict):
            self._watch_dict(name, value)
        elif type(value) is list:
            if _is_plain(value):  # IP-Adapter scales, and whatever else counts
                self._lists.append((name, value, copy.deepcopy(value)))
        elif _is_processor(value):
            self._watch_object(name, vars(value), frozenset())


class Settings:
    """What pipelines and callbacks change of `model` in mid-call, found once and read before every forward.

    Which attention processors run, with what numbers (an IP-Adapter's scale); which adapters are active, how strongly;
    FreeU's factors; whether GLIGEN's fusers do anything.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._attention = [module for module in modules if getattr(module, "processor", None) is not None]
        self._adapters = [vars(module) for module in modules if is_adapter(module)]
        numbers = [vars(module.processor) for module in self._attention if hasattr(module.processor, "__dict__")]
        self._fusers = [vars(module) for module in modules if isinstance(vars(module).get("enabled"), bool)]
        self._blocks = [vars(block) for block in getattr(model, "up_blocks", ())]
        self.places = frozenset(
            [(id(own), name) for own in self._adapters for name in _ADAPTER]
            + [(id(own), "enabled") for own in self._fusers]
            + [(id(own), name) for own in self._blocks for name in _FREEU]
            + [(id(own), name) for own in numbers for name, value in own.items() if _is_setting(value)]
        )

    def now(self) -> tuple[tuple[Hashable, ...], list[Any]]:
        """The settings, and the objects among them: they are told apart by their ids as long as somebody keeps them."""
        values: list[Hashable] = []
        kept: list[Any] = []
        for module in self._attention:
            processor = module.processor
            values.append(id(processor))
            kept.append(processor)
            numbers = getattr(processor, "__dict__", _NONE).values()
            values += [_frozen(value, kept) for value in numbers if _is_setting(value)]
        for own in self._adapters:
            active, scaling = own.get("_active_adapter", ()), own.get("scaling", _NONE)
            names = (active,) if isinstance(active, str) else tuple(active)
            scales = [_rounded(scaling[name]) for name in names if name in scaling]
            values.append((names, own.get("_disable_adapters"), *own.get("merged_adapters", ()), *scales))
        values += [own["enabled"] for own in self._fusers]
        values += [own.get(name) for own in self._blocks for name in _FREEU]
        return tuple(values), kept


def is_adapter(module: nn.Module) -> bool:
    """Whether it is a layer of peft, whose scales diffusers multiplies and divides in each forward that has one."""
    return hasattr(module, "adapter_layer_names")


def _count(attributes: dict[str, Any]) -> int:
    return len(attributes) - (CALL in attributes)


def _is_setting(value: Any) -> bool:
    return isinstance(value, (list, *_SCALARS))


def _is_plain(value: Any) -> bool:
    return isinstance(value, _SCALARS) or (type(value) in (list, tuple) and all(map(_is_plain, value)))


def _frozen(value: Any, kept: list[Any]) -> Hashable:
    if isinstance(value, _SCALARS):
        return value
    if isinstance(value, (list, tuple)):  # an IP-Adapter's scale may be one of lists
        return tuple(_frozen(item, kept) for item in value)
    kept.append(value)
    return id(value)


def _rounded(scale: float) -> float:
    """As tensors take it: diffusers multiplies it by a call's scale and divides it again, and the last bit is lost."""
    return ctypes.c_float(scale).value


def _is_processor(value: Any) -> bool:
    """Attention processors and their like: plain objects of diffusers or the user that a module calls."""
    return callable(value) and hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type, FunctionType))


def _is_same(now: Any, value: Any) -> bool:
    if isinstance(now, float):
        return _rounded(now) == _rounded(value)
    return isinstance(now, _SCALARS) and bool(now == value)


def _address(tensor: Tensor) -> _Address:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _spell(value: Any) -> str:
    if value is _MISSING:
        return "gone"
    return repr(value) if isinstance(value, _SCALARS) else f"another {type(value).__name__}"
