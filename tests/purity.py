"""A digest of everything that can be reached from an object: tensors, scalars, lists, configs, modules, generators."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_OPAQUE = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)


def digest(root: Any) -> str:
    """sha256 of the object graph below `root`; equal before and after means that nothing in it was changed."""
    content = hashlib.sha256()
    seen: dict[int, str] = {}
    stack: list[tuple[str, Any]] = [("", root)]
    while stack:
        path, value = stack.pop()
        content.update(f"{path}:{type(value).__name__}".encode())
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
            content.update(repr(value).encode())
            continue
        if isinstance(value, (torch.dtype, torch.device, torch.Size, np.dtype)):
            content.update(str(value).encode())
            continue
        if id(value) in seen:  # the first path by which it was found stands for it
            content.update(seen[id(value)].encode())
            continue
        seen[id(value)] = path
        if isinstance(value, Tensor):
            content.update(f"{value.dtype}{tuple(value.shape)}{value._version}".encode())
            content.update(value.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, np.ndarray):
            content.update(value.tobytes())
        elif isinstance(value, torch.Generator):
            content.update(value.get_state().numpy().tobytes())
        elif isinstance(value, Mapping):
            stack.extend((f"{path}[{key!r}]", item) for key, item in value.items())
            stack.extend((f"{path}.{key}", item) for key, item in getattr(value, "__dict__", {}).items())
        elif isinstance(value, (list, tuple)):
            stack.extend((f"{path}[{index}]", item) for index, item in enumerate(value))
        elif isinstance(value, (set, frozenset)):
            content.update(repr(sorted(map(repr, value))).encode())
        elif not isinstance(value, _OPAQUE):
            stack.extend((f"{path}.{key}", item) for key, item in getattr(value, "__dict__", {}).items())
    return content.hexdigest()
