"""What an emulated device issued, waited for and held; bytes of tensors, and what torch says of a real device."""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.emulated import EmulatedDevice, Operation, elements
from fastdiff.profile import computes

aten = torch.ops.aten

_NOISE = {aten.randn}
_SYNCS = {"host read", "data-dependent shape"}


class CountingDevice(EmulatedDevice):
    """An emulated device that counts without a clock.

    `operations` counts those that compute, on either side: what a host issues. `syncs` counts reads of a device tensor
    that the host waits for. `peak_bytes` is the most that device tensors took at any one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.syncs = self.peak_bytes = 0

    def issued(self, operation: Operation) -> None:
        op, faults = operation.func.overloadpacket, set(operation.faults())
        self.operations += computes(operation.func) and op not in _NOISE and "host-to-device copy" not in faults
        self.syncs += bool(faults & _SYNCS)
        self.peak_bytes = max(self.peak_bytes, storage_bytes(self.tensors()))


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


def live_tensors(device: torch.device) -> list[Tensor]:
    """Every tensor on the device that Python holds."""
    gc.collect()
    # By type: isinstance would ask every lazy proxy of every library for its class.
    tensors = (one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter))
    return [one for one in tensors if one.device == device and one.layout == torch.strided]


def settle_device(device: torch.device) -> None:
    """Before bytes of a CUDA device are read: garbage, what is under way, cuBLAS's workspaces and torch's cache go.

    Captures clear the workspaces too, so what is left must not depend on which came last.
    """
    gc.collect()
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def pool_bytes(device: torch.device) -> dict[str, int]:
    """What torch reserves of a CUDA device, by memory pool: "0.0" is the common one, the others are of graphs."""
    pools: Counter[str] = Counter()
    for segment in torch.cuda.memory_snapshot():
        if segment["device"] == device.index:
            pools[".".join(map(str, segment["segment_pool_id"]))] += segment["total_size"]
    return dict(sorted(pools.items()))


@dataclass(frozen=True)
class DeviceBytes:
    """What a CUDA device holds, and torch's peaks since this was last asked."""

    allocated_bytes: int  # by torch's allocator, for tensors and what else asks it
    allocated_peak_bytes: int
    reserved_bytes: int  # by torch's allocator, of the device
    reserved_peak_bytes: int
    used_bytes: int  # of the device, by torch and all others: contexts, modules, graphs, other processes


def device_bytes(device: torch.device) -> DeviceBytes:
    """Once the device is done; the next peaks count from here."""
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    found = DeviceBytes(
        allocated_bytes=torch.cuda.memory_allocated(device),
        allocated_peak_bytes=torch.cuda.max_memory_allocated(device),
        reserved_bytes=torch.cuda.memory_reserved(device),
        reserved_peak_bytes=torch.cuda.max_memory_reserved(device),
        used_bytes=total - free,
    )
    torch.cuda.reset_peak_memory_stats(device)
    return found


def vram_peak(device: torch.device, work: Callable[[], object]) -> int | None:
    """The most bytes that torch had allocated while `work` ran on a CUDA device; None on any other."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device)


def count_syncs(work: Callable[[], object]) -> int:
    """How often the host waited for a CUDA device while `work` ran, as torch warns of it."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    return sum("synchronizing CUDA operation" in str(one.message) for one in caught)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`: what stays allocated for as long as one of them lives."""
    storages = {storage._cdata: storage.nbytes() for storage in (elements(one).untyped_storage() for one in tensors)}
    return sum(storages.values())
