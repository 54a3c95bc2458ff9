"""Tier 1: one line on any diffusers pipeline, whose calls stay as they are.

    fastdiff.accelerate(pipe)  # or mode="compiled", mode="graph"

The pipeline's scheduler becomes the drop-in, its denoisers' forwards are compiled or captured where the mode says so,
and threads may call it at once, each with arguments of its own.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from fastdiff.errors import CannotCapture
from fastdiff.families.base import ENCODING
from fastdiff.forward import Backend, Forward, twin
from fastdiff.scheduler import TableScheduler, table_scheduler
from fastdiff.weights import is_adapter

AccelerateMode = Literal["eager", "compiled", "graph"]
DENOISERS = ("unet", "transformer", "transformer_2", "unconditional_transformer", "prior", "decoder")
SCHEDULE = ("timesteps", "sigmas", "num_inference_steps")  # of the last call, for people to read

_moving = threading.RLock()  # calls that move, cast or rescale weights, or keep something in the model


class AccelerateStats(NamedTuple):
    """What became of one pipeline's calls since it was accelerated."""

    calls: int  # that ended, an error included
    rows: int  # steps of a scheduler that were rows of a table
    fallbacks: int  # and those that were its own step()
    built: int  # forwards that were compiled or captured
    renewed: int  # times that a denoiser had changed, so that all of its forwards went


def accelerate(pipe: Any, mode: AccelerateMode = "eager", *, _backend: Backend = "inductor") -> Acceleration:
    """Accelerate `pipe` in place until the handle's `restore()`; calls, callbacks and components stay as they are.

    "eager" replaces the scheduler alone. "compiled" compiles the denoisers' forwards, "graph" captures them as CUDA
    graphs, each at the first call with tensors of other shapes, other plain arguments or other settings of the model:
    which adapters are active, their scales, an IP-Adapter's, attention processors. Settings may change in mid-call, by
    a callback; all else of a denoiser is looked at once per pipeline call, at its start, and if it changed (weights
    replaced, adapters loaded) everything is compiled or captured anew.

    A callback gets the call's own pipe: what it sets there (`_interrupt`, `_guidance_scale`) is that call's. What it
    sets in a model, adapters or an IP-Adapter's scale, is every call's, from then on and in other threads too. A
    pipeline takes one call at a time if it offloads, has LoRA layers, or changes its models in each call: perturbs
    attention, switches fusers, casts its autoencoder or keeps frames in its layers. With offload or other hooks there
    is only "eager". A copy of an accelerated pipeline is not accelerated.
    """
    return Acceleration(pipe, mode, _backend)


@contextmanager
def accelerated(pipe: Any, mode: AccelerateMode = "eager", *, _backend: Backend = "inductor") -> Iterator[Acceleration]:
    """`accelerate`, and `restore()` on leaving the `with` block."""
    acceleration = accelerate(pipe, mode, _backend=_backend)
    try:
        yield acceleration
    finally:
        acceleration.restore()


class Acceleration:
    """One pipeline's acceleration: `restore()` ends it, `stats` says what it did."""

    _original: Any = None  # scheduler
    _template: Any = None  # of the calls' handles

    def __init__(self, pipe: Any, mode: AccelerateMode, backend: Backend) -> None:
        if mode not in get_args(AccelerateMode):
            raise ValueError(f"mode: expected one of {', '.join(get_args(AccelerateMode))}, got {mode!r}")
        _check_pipeline(pipe, mode)
        former = _acceleration(pipe)
        if former and former.pipe is pipe:
            raise RuntimeError(f"this {type(pipe).__name__} is accelerated already: call its handle's restore() first")
        self.mode, self._backend = mode, backend
        self.pipe: Any = pipe
        self.cls: Any = former.cls if former else type(pipe)  # a copy of an accelerated pipe is of its class
        self.calls: list[Any] = []  # the pipes of those in flight
        self._lock = threading.Lock()
        self._counts = (0, 0, 0)  # calls, rows, fallbacks
        self._forwards: dict[str, Forward] = {}
        self._find_forwards(_is_hooked(_modules(pipe)))
        self._find_scheduler()
        pipe.__class__ = _subclass(self.cls, self)  # Python looks __call__ up on the type, so the type it must be

    @property
    def stats(self) -> AccelerateStats:
        """Counts since the pipeline was accelerated."""
        made = [(one.built, one.renewed) for one in self._forwards.values()]
        return AccelerateStats(*self._counts, built=sum(one for one, _ in made), renewed=sum(one for _, one in made))

    def restore(self) -> None:
        """Make the pipeline what it was, its scheduler too unless it was replaced since; a second call does nothing."""
        if _acceleration(self.pipe) is self:
            self.pipe.__class__ = self.cls
            if self.pipe.scheduler is self._template:
                vars(self.pipe)["scheduler"] = self._original
            for forward in self._forwards.values():
                forward.close()

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The pipeline's own call, on a pipe of its own: diffusers keeps what was asked for on the pipe itself."""
        modules = _modules(self.pipe)
        hooked = _is_hooked(modules)
        alone = hooked or any(map(is_adapter, modules)) or _changes_its_models(self.pipe, modules)
        with _moving if alone else nullcontext():
            with self._lock:
                self._find_forwards(hooked)  # not while another call changes the model
                self._find_scheduler()
                held, forwards = dict(vars(self.pipe)), dict(self._forwards)
            own = {name: _own(value, hooked, forwards.get(name)) for name, value in held.items()}
            pipe = object.__new__(type(self.pipe))
            vars(pipe).update(own)
            self.calls.append(pipe)
            try:
                return self.cls.__call__(pipe, *args, **kwargs)
            finally:
                self._end(pipe, own)

    def _end(self, pipe: Any, own: dict[str, Any]) -> None:
        """Leave on the user's pipe what the call left on its own: whoever reads `guidance_scale` reads the last one's.

        Components and their config are as they were; of the scheduler, people read the schedule.
        """
        replaced = vars(pipe)["scheduler"]  # a copy of its own, where a pipeline steps several: with the counts so far
        scheduler = replaced if isinstance(replaced, TableScheduler) else own["scheduler"]
        with self._lock:
            self.calls.remove(pipe)
            calls, rows, fallbacks = self._counts
            self._counts = (calls + 1, rows + scheduler.stats.hits, fallbacks + scheduler.stats.fallbacks)
            for name, value in vars(pipe).items():
                given = own.get(name, own)  # itself where it is new
                if not (value is given or name == "_internal_dict" or _is_component(given)):
                    vars(self.pipe)[name] = value
            vars(self._template).update({name: vars(scheduler)[name] for name in SCHEDULE if name in vars(scheduler)})

    def _find_scheduler(self) -> None:
        """Make the template; again where the pipe's scheduler was replaced, as people do at any time."""
        scheduler = self.pipe.scheduler
        if scheduler is not self._template:
            is_handle = isinstance(scheduler, TableScheduler)  # the user's own, which may be strict
            self._original = scheduler
            self._template = copy.deepcopy(scheduler) if is_handle else table_scheduler(scheduler)
            vars(self.pipe)["scheduler"] = self._template  # the config has its class already

    def _find_forwards(self, hooked: bool) -> None:
        """The forwards of the denoisers that the pipe has now, as they are now."""
        if self.mode == "eager":
            return
        if hooked:
            raise CannotCapture(f"mode {self.mode!r} runs no hooks of offload or caches; remove them, or use 'eager'")
        if _hooks_in(guider := getattr(self.pipe, "guider", None)):
            raise CannotCapture(f"mode {self.mode!r} runs no hooks, as {type(guider).__name__} sets them; use 'eager'")
        for name in DENOISERS:
            model = getattr(self.pipe, name, None)
            if not isinstance(model, nn.Module):
                self._forwards.pop(name, None)
            elif name in self._forwards and self._forwards[name].model is model:
                self._forwards[name].check()
            else:
                self._forwards[name] = Forward(model, self.mode, self._backend)


def _check_pipeline(pipe: Any, mode: AccelerateMode) -> None:
    from diffusers import DiffusionPipeline

    name = type(pipe).__name__
    if not (isinstance(pipe, DiffusionPipeline) and hasattr(pipe, "scheduler")):
        raise TypeError(f"expected a diffusers pipeline with a scheduler, got {name}")
    if inner := [key for key, value in vars(pipe).items() if isinstance(value, DiffusionPipeline)]:
        raise TypeError(f"{name} calls pipelines of its own: accelerate {' and '.join(inner)} instead")
    if mode != "eager" and not any(isinstance(getattr(pipe, key, None), nn.Module) for key in DENOISERS):
        raise TypeError(
            f"mode {mode!r}: expected a pipeline with one of {', '.join(DENOISERS)}, got {name}; use mode 'eager'"
        )


def _acceleration(pipe: Any) -> Acceleration | None:
    return getattr(type(pipe), "_acceleration", None)


def _subclass(cls: Any, acceleration: Acceleration) -> Any:
    """`cls` of one accelerated pipe and the pipes of its calls, by the same name, which is what diffusers saves."""

    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return acceleration.call(args, kwargs) if self is acceleration.pipe else cls.__call__(self, *args, **kwargs)

    def set_attribute(self: Any, name: str, value: Any) -> None:
        cls.__setattr__(self, name, value)
        if name == "_interrupt" and self is acceleration.pipe:
            for pipe in list(acceleration.calls):  # setting it from outside stops what is in flight
                vars(pipe)[name] = value

    def reduce(self: Any, protocol: Any) -> Any:
        """A copy, and what is pickled, is of the class that pickle finds by its name."""
        return object.__new__, (cls,), *cls.__reduce_ex__(self, protocol)[2:]

    encoders = {
        name: _one_at_a_time(method)
        for name in dir(cls)
        if "prompt" in name and isinstance(method := inspect.getattr_static(cls, name), FunctionType)
    }
    own = {
        "__call__": call,
        "__setattr__": set_attribute,
        "__reduce_ex__": reduce,
        "_acceleration": acceleration,
        "__slots__": (),
    }
    own |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), encoders | own)


def _one_at_a_time(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def locked(*args: Any, **kwargs: Any) -> Any:
        with ENCODING:
            return method(*args, **kwargs)

    return locked


def _own(value: Any, hooked: bool, forward: Forward | None) -> Any:
    """What one call writes into, of a pipe's attribute: some autoencoders keep a video's frames on themselves.

    Text encoders are no one's own: a first call to one leaves hooks in its layers, and says so on itself alone.
    """
    from diffusers import ModelMixin

    if isinstance(value, nn.Module):
        return twin(value, forward) if forward or (isinstance(value, ModelMixin) and not hooked) else value
    if isinstance(value, TableScheduler):
        return value.for_request()
    return copy.deepcopy(value) if _is_component(value) else value  # the other scheduler of a pipeline that has two


def _is_component(value: Any) -> bool:
    return isinstance(value, nn.Module) or hasattr(value, "set_timesteps")


def _modules(pipe: Any) -> list[nn.Module]:
    models = [value for value in list(vars(pipe).values()) if isinstance(value, nn.Module)]
    return [module for model in models for module in model.modules()]


def _is_hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether a model is offloaded, placed or cached by hooks, which know the module itself and no twin."""
    return any("_hf_hook" in vars(one) or getattr(vars(one).get("_diffusers_hook"), "hooks", None) for one in modules)


def _changes_its_models(pipe: Any, modules: Iterable[nn.Module]) -> bool:
    """Whether each call changes a model and back, or keeps something of its own in what all calls share.

    The autoencoder's dtype (SDXL, unless all is float32), attention (PAG, SAG, LEdits++), fusers (GLIGEN), weights
    (Shap-E); what a guider goes by (HunyuanImage), an image's size (OmniGen), frames (EasyAnimate).
    """
    cls = type(pipe)
    names = set(_names(cls.__call__))
    for method in [inspect.getattr_static(cls, name, None) for name in names]:
        names.update(_names(method) if isinstance(method, FunctionType) else ())
    # Not of the autoencoder alone: another call may just have cast it.
    half = any(getattr(part, "dtype", torch.float32) != torch.float32 for part in vars(pipe).values())
    if names & {"set_attn_processor", "enable_fuser"} or (half and "force_upcast" in names):
        return True
    kept = any(getattr(pipe, name, None) is not None for name in ("guider", "shap_e_renderer", "multimodal_processor"))
    return kept or any("prev_features" in vars(module) for module in modules)


def _hooks_in(guider: Any) -> bool:
    """Whether a guider of diffusers puts hooks into the model's layers in mid-call, to skip or disturb them."""
    from diffusers.guiders import BaseGuidance

    return isinstance(guider, BaseGuidance) and type(guider).prepare_models is not BaseGuidance.prepare_models


def _names(function: Any) -> tuple[str, ...]:
    """All that it looks up by name: globals, attributes, methods."""
    names: tuple[str, ...] = inspect.unwrap(function).__code__.co_names
    return names
