"""What a scheduler's `step()` does to tensors, seen from below: draws and clamps answered, down-casts undone."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.errors import NotLinear
from fastdiff.frames import innermost

aten = torch.ops.aten

_PACKAGE = f"{Path(__file__).parent}{os.sep}"

# What a scheduler may do to a latent and stay linear; anything else is remembered as the first suspect.
_LINEAR = {
    aten.add, aten.sub, aten.rsub, aten.neg, aten.clone, aten.detach, aten.alias, aten.lift_fresh, aten._to_copy,
    aten.view, aten._unsafe_view, aten._reshape_alias, aten.unsqueeze, aten.squeeze, aten.expand, aten.permute,
    aten.transpose, aten.t, aten.stack, aten.cat, aten.split, aten.unbind,
    aten.zeros_like, aten.empty_like, aten.copy_, aten.add_, aten.sub_, aten.zero_, aten.repeat, aten.new_zeros,
    aten.new_empty, aten.split_with_sizes, aten.chunk, aten.positive,
}  # fmt: skip
_BILINEAR = {aten.mul, aten.mul_, aten.bmm, aten.mm, aten.matmul, aten.einsum, aten.lerp, aten.addcmul, aten.where}
_QUOTIENT = {aten.div, aten.div_}
_NARROWING = {aten.select, aten.slice, aten.sum}  # linear while what is left is a latent
_NORMAL = {aten.randn, aten.randn_like, aten.normal, aten.normal_, aten.normal_functional}
_OTHER_NOISE = {
    aten.rand, aten.rand_like, aten.uniform, aten.uniform_, aten.bernoulli, aten.bernoulli_, aten.multinomial,
    aten.randint, aten.randint_like, aten.randperm, aten.exponential_, aten.geometric_, aten.cauchy_,
    aten.log_normal_, aten.random_, aten.poisson,
}  # fmt: skip
_CLAMP = {aten.clamp, aten.clamp_min, aten.clamp_max, aten.clamp_, aten.clamp_min_, aten.clamp_max_, aten.clip}


class Interception(TorchDispatchMode):
    """Answers the noise draws and clamps of one `step()`, keeps latents in float64, notes the first non-linear op.

    Per thread by construction; nothing of torch or diffusers is patched.
    """

    def __init__(
        self,
        shape: torch.Size,
        draw: Callable[[torch.Size, torch.dtype], Tensor],
        clamp: Callable[[Tensor, float, float], Tensor],
        refuse: Callable[[str], NotLinear],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ndim, self.last, self.numel = len(shape), shape[-1], shape.numel()
        self.draw, self.clamp, self.refuse = draw, clamp, refuse
        self.suspect: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # dynamo never sees a probe, and its guard would cost half of one

    def is_latent(self, value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and value.dtype == torch.float64
            and (
                (value.ndim >= self.ndim and value.shape[-1] == self.last)
                or (value.ndim > 1 and value.numel() == self.numel)  # reshaped, as thresholding does
            )
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = _ANSWERS.get(id(func), _UNKNOWN)  # by id: hashing an overload is a Python call, 17,000 a UniPC table
        if answer is _UNKNOWN:
            answer = _ANSWERS[id(func)] = _answer(func)
        if answer is not None:
            answered = answer(self, func, args, kwargs or {})
            if answered is not None:
                return answered
        return func(*args, **kwargs) if kwargs else func(*args)

    def other_noise(self, func: Any, args: Any, kwargs: Any) -> None:
        name = func.overloadpacket.__name__
        raise self.refuse(f"it draws {name} noise, and only normal noise can be drawn ahead{where()}")

    def normal(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        op, tensors = func.overloadpacket, [value for value in args if isinstance(value, Tensor)]
        if tensors:
            size, default = tensors[0].shape, tensors[0].dtype
        else:
            size = torch.Size(args[2] if op is aten.normal else args[0])
            default = torch.get_default_dtype()
        drawn: Tensor = self.draw(size, kwargs.get("dtype") or default)
        if op is aten.randn or op is aten.randn_like:
            return drawn
        mean, std = (*args[op is not aten.normal :], *(0.0, 1.0))[:2]
        drawn = drawn * std + mean
        return args[0].copy_(drawn) if op is aten.normal_ else drawn

    def down_cast(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        dtype = kwargs.get("dtype")
        if dtype is not None and dtype.is_floating_point and self.is_latent(args[0]):
            return torch.clone(args[0])
        return None

    def clamped(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        if not self.is_latent(args[0]):
            return None
        name = func.overloadpacket.__name__
        sides = {"clamp_min": ("min",), "clamp_max": ("max",)}.get(name.rstrip("_"), ("min", "max"))
        bounds = dict(zip(sides, args[1:], strict=False)) | kwargs
        lo, hi = (bounds.get(side) for side in ("min", "max"))
        if any(isinstance(bound, Tensor) and bound.ndim for bound in (lo, hi)):
            raise self.refuse(f"it clamps latents by bounds that may depend on them{where()}")
        phi = self.clamp(args[0], -math.inf if lo is None else float(lo), math.inf if hi is None else float(hi))
        return args[0].copy_(phi) if name.endswith("_") else phi

    def bilinear(self, func: Any, args: Any, kwargs: Any) -> None:
        if self._count(args) > 1:
            self.unknown(func, args, kwargs)

    def quotient(self, func: Any, args: Any, kwargs: Any) -> None:
        if self.is_latent(args[1]):
            self.unknown(func, args, kwargs)

    def narrowing(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        narrowed: Tensor = func(*args, **kwargs)
        if self.is_latent(args[0]) and not self.is_latent(narrowed):
            self.unknown(func, args, kwargs)
        return narrowed

    def unknown(self, func: Any, args: Any, kwargs: Any) -> None:
        if self.suspect is None and self._count((args, *kwargs.values())):
            self.suspect = f"{func.overloadpacket.__name__} on a latent{where()}"

    def _count(self, values: Any) -> int:
        return sum(
            self._count(value) if isinstance(value, (list, tuple)) else self.is_latent(value) for value in values
        )


_Answer = Callable[[Interception, Any, Any, Any], Tensor | None]


def _answer(func: Any) -> _Answer | None:
    """Which method answers an overload; None for those that are linear whatever they are given."""
    op = func.overloadpacket
    if op is aten._to_copy:
        return Interception.down_cast
    if op in _LINEAR:
        return None
    methods: list[tuple[set[Any], _Answer]] = [
        (_OTHER_NOISE, Interception.other_noise),
        (_NORMAL, Interception.normal),
        (_CLAMP, Interception.clamped),
        (_BILINEAR, Interception.bilinear),
        (_QUOTIENT, Interception.quotient),
        (_NARROWING, Interception.narrowing),
    ]
    return next((method for ops, method in methods if op in ops), Interception.unknown)


_UNKNOWN: Any = object()
_ANSWERS: dict[int, _Answer | None] = {}  # overloads live as long as torch does, so their ids do not come back


def where() -> str:
    """The innermost frame outside torch and this package, as ` (function, file:line)`."""
    frame = innermost(_PACKAGE)
    if frame is None:
        return ""
    return f" ({frame.f_code.co_name}, {Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
