"""The regime of a step: what the host and the device do for one row, what the hardware allows, whether graphs pay."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from fastdiff.denoiser import Denoiser
from fastdiff.slots import Batch
from fastdiff.step import denoise_step

Regime = Literal["launch-bound", "compute-bound"]

aten = torch.ops.aten

WARM_UP_CALLS = 3
TIMED_S = 1.0  # calls are timed for this long, at least and at most as many as these
TIMED_CALLS = (5, 50)
TRIES = 3  # at a trace of kernels, which now and then loses some
TRACED_CALLS = 3  # under torch's profiler, which slows the host and is therefore no clock for it


class Rates(NamedTuple):
    """What a device sustains on random data."""

    flops_per_s: float
    bytes_per_s: float

    def least_s(self, flops: int, nbytes: int) -> float:
        """No work of so many FLOPs over so many bytes takes less time."""
        return max(flops / self.flops_per_s, nbytes / self.bytes_per_s)


RATES = {("NVIDIA H200", "bfloat16"): Rates(790e12, 4.3e12)}  # as others report; `make gpu` measures its own card
"""By a device's CUDA name and the dtype of the model's inputs; a device that is not here has no floor."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What one row of n slots costs. What only a CUDA device can tell is None elsewhere."""

    n: int
    gpu: str | None  # the CUDA device's name
    dtype: str  # of model inputs
    operations: int  # aten operations that compute, were nothing compiled or captured; views and allocations are free
    launches: int | None  # kernels, copies and fills that the device ran; a graph's are launched as one
    host_s: float  # to enqueue a row, from an idle queue on; a row of thousands fills it and waits. Without CUDA: row_s
    row_s: float  # a row in a loop of rows, nothing waited for in between
    device_s: float | None  # all kernels of the row, without the gaps between them
    busy: float | None  # the share of row_s in which the device works
    flops: int  # of matrix products, convolutions and attention
    floor_bytes: int  # weights and conditioning read once, state read and written once
    traffic_bytes: int  # what each operation of the eager row reads and writes, added up
    floor_s: float | None  # no implementation of the row is faster: FLOPs or floor_bytes at the device's rates
    roofline_s: float | None  # no eager one is: the same for each operation and its own traffic, added up
    regime: Regime | None

    def __post_init__(self) -> None:
        for name in (one.name for one in fields(self)):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"Profile.{name}: expected a finite number >= 0, got {value}")


@dataclass(frozen=True)
class Choice:
    """Which mode the measurements speak for, and why."""

    mode: Literal["eager", "compiled", "step-graph", "loop-graph"]
    reason: str  # one sentence with the figures that decided
    gain: float | None  # how many times faster a row should get than an eager one; None where nothing can be said


WORTH = 1.02  # times faster, for a compiled row to be worth its compilation


def choose(
    eager: Profile, graph_bytes: int | None = None, *, compiled: Profile | None = None, unroll: int = 1
) -> Choice:
    """The mode for a model, from the profile of an eager row: graphs pay where the host takes longer than the device.

    `graph_bytes`: what the graph takes, where that is known. `compiled`: the same row compiled, where it was measured;
    the faster of the two is chosen where graphs do not pay. `unroll`: rows in one graph.
    """
    reason, gain = _graphs_pay(eager, graph_bytes)
    if gain is not None and gain > 1.0:
        return Choice("loop-graph" if unroll > 1 else "step-graph", reason, gain)
    if compiled is None:
        return Choice("eager", reason, gain)
    faster = eager.row_s / compiled.row_s
    measured = f"{reason}; a row takes {compiled.row_s * 1e3:.3g} ms compiled and {eager.row_s * 1e3:.3g} ms eager"
    return Choice("compiled", measured, faster) if faster > WORTH else Choice("eager", measured, 1.0)


def _graphs_pay(eager: Profile, graph_bytes: int | None) -> tuple[str, float | None]:
    """Why they do or do not, and how many times faster they should make a row."""
    if eager.gpu is None:
        return "graphs need a CUDA device, and the model is not on one", None
    if not eager.device_s:
        return f"no whole trace of a row was had on {eager.gpu}, so nothing says that graphs pay", None
    host, device = f"{eager.host_s * 1e3:.3g} ms", f"{eager.device_s * 1e3:.3g} ms"
    if regime_of(eager.host_s, eager.device_s) == "launch-bound":
        gain = eager.host_s / eager.device_s
        reason = f"launch-bound: the host takes {host} to enqueue a row that the device runs in {device}"
        return f"{reason}, so graphs should make it {gain:.3g} times faster", gain
    memory = "a memory pool of their own" if graph_bytes is None else f"{graph_bytes / 1e9:.3g} GB"
    reason = f"compute-bound: the device takes {device} for a row that the host enqueues in {host}"
    return f"{reason}, so graphs would gain nothing and cost {memory}", 1.0


def regime_of(host_s: float, device_s: float | None) -> Regime | None:
    """What a row waits for; None where the device's time is unknown: the CPU is host and device in one."""
    if not device_s:
        return None
    return "launch-bound" if host_s > device_s else "compute-bound"


def break_even(capture_s: float, saved_per_row_s: float, rows_per_image: float) -> float | None:
    """After how many images a capture is paid back; None when it never is.

    A row of n slots serves n images at once: `rows_per_image` is the rows of a schedule divided by n.
    """
    if not (math.isfinite(capture_s) and capture_s >= 0):
        raise ValueError(f"capture_s: expected a finite number >= 0, got {capture_s}")
    if not math.isfinite(saved_per_row_s):
        raise ValueError(f"saved_per_row_s: expected a finite number, got {saved_per_row_s}")
    if not (math.isfinite(rows_per_image) and rows_per_image > 0):
        raise ValueError(f"rows_per_image: expected a finite number > 0, got {rows_per_image}")
    return capture_s / (saved_per_row_s * rows_per_image) if saved_per_row_s > 0 else None


def profile_step(
    step: Callable[[], None], denoiser: Denoiser, batch: Batch, weights: Iterable[Tensor], rows_per_call: int = 1
) -> Profile:
    """The profile of `step`, which advances `batch` by `rows_per_call` rows in whatever mode.

    Counts are of the eager row, which a graph's replay hides. The slots hold random numbers meanwhile, and afterwards
    bitwise what they held; nothing of the model changes.
    """
    device = batch.row.device
    on_cuda = device.type == "cuda"
    gpu = torch.cuda.get_device_name(device) if on_cuda else None
    dtype = str(batch.dtype).removeprefix("torch.")
    with torch.no_grad(), _random_contents(batch):
        counted = _count_operations(denoiser, batch)
        measured = _measure_cuda(step, device) if on_cuda else _measure_host(step)
    floor_bytes = _floor_bytes(batch, weights)
    flops, traffic_bytes = sum(one.flops for one in counted), sum(one.nbytes for one in counted)
    host_s, row_s = measured.host_s / rows_per_call, measured.row_s / rows_per_call
    device_s = None if measured.device_s is None else measured.device_s / rows_per_call
    rates = RATES.get((gpu or "", dtype))
    return Profile(
        n=len(batch.slot),
        gpu=gpu,
        dtype=dtype,
        operations=len(counted),
        launches=None if measured.launches is None else round(measured.launches / rows_per_call),
        host_s=host_s,
        row_s=row_s,
        device_s=device_s,
        busy=min(1.0, device_s / row_s) if device_s else None,
        flops=flops,
        floor_bytes=floor_bytes,
        traffic_bytes=traffic_bytes,
        floor_s=rates.least_s(flops, floor_bytes) if rates else None,
        roofline_s=sum(rates.least_s(one.flops, one.nbytes) for one in counted) if rates else None,
        regime=regime_of(host_s, device_s),
    )


@contextmanager
def _random_contents(batch: Batch) -> Iterator[None]:
    """Random numbers in what the model is shown, every slot held; afterwards what was there.

    On zeros, which idle slots hold, a GPU is faster than on any request.
    """
    labels_apart = (one for one in batch.conditioning.values() if one.is_floating_point())
    shown = [*batch.planes, *labels_apart]
    saved = [(tensor, tensor.clone()) for tensor in (batch.table, batch.end, *shown)]
    generator = torch.Generator(batch.row.device).manual_seed(0)
    try:
        batch.table.uniform_(generator=generator)  # timesteps too, that a model may look up
        for tensor in shown:
            tensor.normal_(generator=generator)
        batch.end.zero_()  # random rows would drive the latents to infinity
        yield
    finally:
        for tensor, contents in saved:
            tensor.copy_(contents)


# Counting, on any machine

_FREE = {
    aten._unsafe_view,
    aten._local_scalar_dense,
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    torch.ops.prim.device,
}
_GATHERS = {aten.index, aten.index_select, aten.gather, aten.embedding}
_FLOPS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
}


def computes(func: Any) -> bool:
    """Whether something runs for an operation: nothing does for a view, which its schema tells, or an allocation."""
    return not func.is_view and func.overloadpacket not in _FREE


class _Operation(NamedTuple):
    """One operation that computes."""

    flops: int
    nbytes: int  # read and written


def _count_operations(denoiser: Denoiser, batch: Batch) -> list[_Operation]:
    """What a row in eager mode dispatches, in order."""
    batch, counter = batch.with_views(), _Counter()
    with counter:
        denoise_step(denoiser, batch)
    return counter.operations


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch is
        self.operations: list[_Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # there `linear`, `to` and their like arrive whole
            with self:
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output, op = func(*args, **kwargs), func.overloadpacket
        if computes(func):
            flops = _FLOPS[op](*args, **kwargs, out_val=output) if op in _FLOPS else 0
            self.operations.append(_Operation(flops, _traffic_bytes(op, args, kwargs, output)))
        return output


def _traffic_bytes(op: Any, args: Any, kwargs: Any, output: Any) -> int:
    """Bytes of an operation's distinct tensors, inputs and outputs; a gather reads no more than it writes."""
    tensors = {id(one): one for one in tree_iter((args, kwargs, output)) if isinstance(one, Tensor)}
    source = tensors.pop(id(args[0])) if op in _GATHERS else None
    total: int = sum(map(_nbytes, tensors.values()))
    if source is not None:
        total += min(_nbytes(source), sum(_nbytes(one) for one in tree_iter(output) if isinstance(one, Tensor)))
    return total


def _nbytes(tensor: Tensor) -> int:
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())  # an expanded one is larger than what it reads


def _floor_bytes(batch: Batch, weights: Iterable[Tensor]) -> int:
    row_of_each = (batch.table[:, 0], batch.noise[:, 0], batch.end)
    read = sum(tensor.nbytes for tensor in (*weights, *batch.conditioning.values(), *row_of_each))
    return read + 2 * sum(tensor.nbytes for tensor in (*batch.planes, batch.row))


# Measuring


class _Measured(NamedTuple):
    """Of one call, which may be several rows."""

    host_s: float
    row_s: float
    launches: int | None = None
    device_s: float | None = None


def _measure_host(step: Callable[[], None]) -> _Measured:
    call_s = median(_time_calls(step, lambda: None))
    return _Measured(call_s, call_s)


def _measure_cuda(step: Callable[[], None], device: torch.device) -> _Measured:
    with torch.cuda.device(device):
        calls_s = _time_calls(step, torch.cuda.synchronize)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in calls_s:
            step()
        end.record()
        end.synchronize()
        loop_s = start.elapsed_time(end) / 1e3
        host_s, row_s = median(calls_s), loop_s / len(calls_s)
        for _ in range(TRIES):
            kernels = trace_kernels(step, TRACED_CALLS)
            launches, lost = divmod(len(kernels), TRACED_CALLS)
            if launches and not lost:
                return _Measured(host_s, row_s, launches, sum(one.seconds for one in kernels) / TRACED_CALLS)
    return _Measured(host_s, row_s)  # the profiler may not read the device's counters, or drops some each time


def _time_calls(step: Callable[[], None], wait: Callable[[], None]) -> list[float]:
    """Wall time of single calls, each begun with nothing under way and not waited for."""
    for _ in range(WARM_UP_CALLS):
        step()
    least, most = TIMED_CALLS
    calls_s: list[float] = []
    deadline = time.perf_counter() + TIMED_S
    while len(calls_s) < least or (len(calls_s) < most and time.perf_counter() < deadline):
        wait()
        started = time.perf_counter()
        step()
        calls_s.append(time.perf_counter() - started)
    return calls_s


class Kernel(NamedTuple):
    """A kernel, copy or fill, and how long it ran on the device."""

    name: str
    seconds: float


def trace_kernels(step: Callable[[], None], calls: int) -> list[Kernel]:
    """What ran on the device in so many calls, those of a graph one by one.

    Calls the step 2 x `calls` times: in the first half the device's tracing starts up and may lose kernels.
    """
    windows = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], schedule=windows) as profiler:
        for _ in range(2):
            for _ in range(calls):
                step()
            torch.cuda.synchronize()
            profiler.step()
    return [
        Kernel(event.name, event.time_range.elapsed_us() / 1e6)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
