"""Which tensors a GPU run would hold on the device, which reads of them the host waits for, how many bytes they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten

_HOST_READS = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select, aten.unique_dim, aten._unique2}
# No kernel runs for these: views, and bookkeeping.
_FREE = {
    aten.view,
    aten._unsafe_view,
    aten._reshape_alias,
    aten.alias,
    aten.detach,
    aten.expand,
    aten.permute,
    aten.select,
    aten.slice,
    aten.split,
    aten.split_with_sizes,
    aten.squeeze,
    aten.t,
    aten.transpose,
    aten.unbind,
    aten.unsqueeze,
    aten.lift_fresh,
    aten._local_scalar_dense,
}
_NOISE = {aten.randn}  # fmt: skip


class EmulatedDevice(TorchDispatchMode):
    """Follows tensors that a GPU run would hold on the device, on any machine, and counts without a clock.

    `put` names the first ones (latents, model outputs, timesteps); whatever an operation makes from one is another.
    `operations` counts those that compute, on either side: what a host issues. `syncs` counts reads of a device tensor
    that the host waits for: `.item()` and its kin, `nonzero`, comparisons as a whole, indexing of a host tensor.
    `peak_bytes` is the most that device tensors took at any one time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch is
        self.operations = self.syncs = self.peak_bytes = 0
        self._held: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()

    def put(self, *tensors: Tensor) -> None:
        """Call these tensors device tensors from now on."""
        for tensor in tensors:
            self._held[tensor] = True

    def holds(self, tensor: Tensor) -> bool:
        """Whether a GPU run would hold it on the device."""
        return tensor in self._held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = func.overloadpacket
        inputs = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        from_device = any(map(self.holds, inputs))
        self.operations += op not in _FREE and op not in _NOISE
        indexes_host = op is aten.index and not self.holds(inputs[0]) and from_device
        self.syncs += from_device and (op in _HOST_READS or indexes_host)
        output = func(*args, **kwargs)
        if from_device and not indexes_host:
            self.put(*(value for value in tree_iter(output) if isinstance(value, Tensor)))
            self.peak_bytes = max(self.peak_bytes, storage_bytes(self._held.keys()))
        return output


def reachable_tensors(holder: Any) -> Iterator[Tensor]:
    """Every tensor in an object's attributes, lists, tuples and dicts, however deep; each object visited once."""
    seen: set[int] = set()
    waiting = [holder]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or value is None or isinstance(value, (str, bytes, int, float, type)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            waiting.extend(value)
        elif hasattr(value, "__dict__"):
            waiting.extend(vars(value).values())


def vram_peak(device: torch.device, work: Callable[[], object]) -> int | None:
    """The most bytes that torch had allocated while `work` ran on a CUDA device; None on any other."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`: what stays allocated for as long as one of them lives."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
