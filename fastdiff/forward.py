"""A model's forward, compiled or captured once for every way in which it is called."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastdiff.capture import StepGraphs, compiled
from fastdiff.errors import CannotCapture, OutOfMemory
from fastdiff.fingerprint import freeze
from fastdiff.weights import CALL, Settings, Weights

Backend = str | Callable[..., Any]
MOST_KEYS = 64  # what was made for others goes when there are more
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size)

_one_at_a_time = threading.RLock()  # graphs share static memory, and tracing sets flags that a whole process sees


class Forward:
    """Calls `model` by what was compiled or captured for tensors and numbers like the ones that it is given.

    The key is all that dynamo's guards or a graph would have frozen: the tree of the arguments, of each tensor its
    layout and whether it is there twice, the value of everything else; the model's settings, which callbacks and
    pipelines change in mid-call; and what a call has set on its own twin of the model, a config say. All else of the
    model is looked at by `check()`.
    """

    def __init__(self, model: nn.Module, how: Literal["compiled", "graph"], backend: Backend = "inductor") -> None:
        self.model, self.how = model, how
        self.built = 0  # keys, all told
        self.renewed = 0  # times that the model was no longer the one that was compiled or captured
        self._backend = backend
        self._start()

    def _start(self) -> None:
        self._device = next(self.model.parameters()).device
        self._graphs = StepGraphs(self._device, unroll=1) if self.how == "graph" else None
        self._done = torch.cuda.Event() if self._graphs else None
        self._made: dict[Hashable, tuple[Callable[..., Any], list[Any]]] = {}  # and what its key names by id
        self._settings = Settings(self.model)
        self._weights = Weights(self.model, self._settings)

    def check(self) -> None:
        """Forget all if the model is no longer what it was; what is needed is made anew at the next call."""
        with _one_at_a_time:
            if self._weights.changed():
                self.renewed += 1
                self.close()
                self._start()

    def close(self) -> None:
        """Release every graph and everything compiled; a later call makes its own anew."""
        with _one_at_a_time:
            self._made.clear()
            if self._graphs is not None:
                self._graphs.close()

    def __call__(self, own: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the model's twin `own` gives; never an alias of a graph's memory."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled(self._device.type)
        parts = spec, *_key(leaves), *modes, *_differences(own, self.model)
        with _one_at_a_time:
            settings, kept = self._settings.now()
            key = (*parts, settings)
            if key in self._made:
                made, _ = self._made[key]
                return made(*args, **kwargs)
            if len(self._made) >= MOST_KEYS:
                self.close()
            if self._graphs is None:
                made, output = self._compiled(_plain(own), args, kwargs)
            else:
                made = self._captured(self._graphs, _plain(own), leaves, spec)
                output = made(*args, **kwargs)
            self.built += 1
            if self._settings.now()[0] == settings:  # else another thread set them, and nobody knows which are in it
                self._made[key] = made, kept
            return output

    def _compiled(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, called: bool = False
    ) -> tuple[Callable[..., Any], Any]:
        """The forward, compiled, and what it gives for these arguments; `called`: the model was, as it is, before."""
        name = type(model).__name__

        def forward(*args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs)

        made = compiled(forward, f"forward_{name}", "default", self._backend)
        try:
            return made, made(*args, **kwargs)
        except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as error:
            if not called:
                model(*args, **kwargs)  # some fill tables in their first forward, in ways that dynamo does not follow
            if called or self._weights.changed() is None:
                why = str(error).splitlines()[0]
                raise CannotCapture(f"{name}.forward cannot be compiled: {why}; use mode 'eager'") from error
        self._weights = Weights(self.model, self._settings)
        return self._compiled(model, args, kwargs, called=True)

    def _captured(
        self, graphs: StepGraphs, model: nn.Module, leaves: list[Any], spec: pytree.TreeSpec
    ) -> Callable[..., Any]:
        """A graph over copies of the tensors among `leaves`, all of them on the graph's device."""
        device, name, number = self._device, type(self.model).__name__, self.built
        if torch.is_autocast_enabled(device.type):
            raise CannotCapture(
                "autocast frees what a graph would read; load the pipeline in the dtype that it runs in"
            )
        static = [leaf.to(device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(static, spec)
        outputs: list[Any] = []

        def step() -> None:
            outputs[:] = [model(*args, **kwargs)]

        try:
            graphs.capture(number, step)
        except (CannotCapture, OutOfMemory) as error:
            why = str(error.__cause__ or error).splitlines()[0]
            raise type(error)(f"{name}.forward cannot be captured: {why}; use mode 'compiled' or 'eager'") from error
        copies = [_Copy(tensor) if isinstance(tensor, Tensor) else None for tensor in static]

        def replay(*args: Any, **kwargs: Any) -> Any:
            assert self._done is not None
            given, _ = pytree.tree_flatten((args, kwargs))
            with torch.cuda.device(device):
                stream = torch.cuda.current_stream()
                stream.wait_event(self._done)  # graphs of one pool never overlap, whosever stream they run on
                for copy, leaf in zip(copies, given, strict=True):
                    if copy is not None:
                        copy.take(leaf)
                graphs.replay(number)
                output = pytree.tree_map_only(Tensor, Tensor.clone, outputs[0])
                self._done.record(stream)
            return output

        return replay


def twin(module: nn.Module, forward: Forward | None = None) -> nn.Module:
    """`module` with attributes of its own, the same weights, submodules and hooks; calling it calls `forward`."""
    own = object.__new__(type(module))
    vars(own).update(vars(module))
    if forward is not None:
        vars(own)[CALL] = partial(forward, own)
    return own


def _plain(own: nn.Module) -> nn.Module:
    """A twin of a twin that is called as the model is."""
    plain = twin(own)
    vars(plain).pop(CALL, None)
    return plain


def _differences(own: nn.Module, model: nn.Module) -> list[Hashable]:
    """What a call has set on its twin since it was made; what a module holds of modules and weights both have."""
    before = vars(model)
    return [
        (name, freeze(value))
        for name, value in vars(own).items()
        if before.get(name, own) is not value and name != CALL
    ]


class _Copy:
    """A graph's input, written only when there is something new in it."""

    def __init__(self, static: Tensor) -> None:
        self._static = static
        self._taken: Tensor | None = None  # kept, so that no other tensor gets its identity
        self._version = -1

    def take(self, tensor: Tensor) -> None:
        version = -1 if tensor.is_inference() else tensor._version  # inference tensors count no writes
        if tensor is not self._taken or version != self._version or version < 0:
            self._static.copy_(tensor)
            self._taken, self._version = tensor, version


def _key(leaves: Sequence[Any]) -> list[Hashable]:
    """What calls have in common that one compiled forward serves."""
    first: dict[int, int] = {}
    parts: list[Hashable] = []
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            same = first.setdefault(id(leaf), number)  # dynamo takes a tensor that is given twice as one input
            layout = leaf.dtype, leaf.device, leaf.shape, leaf.stride(), leaf.requires_grad
            parts.append((type(leaf), same, *layout))
        elif isinstance(leaf, _PLAIN):
            parts.append((type(leaf), leaf))
        else:
            raise TypeError(
                f"expected tensors, numbers and strings as a model's arguments, got {type(leaf).__name__}, of which "
                "nobody can say whether it changed; use mode 'eager'"
            )
    return parts
