"""Runs the step eagerly, compiled or as captured CUDA graphs. The library's only file that names either."""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType, TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from fastdiff.denoiser import Denoiser
from fastdiff.errors import CannotCapture, OutOfMemory, PlanMismatch, StaleGraph
from fastdiff.plan import Compile
from fastdiff.slots import Batch, Row, Slots
from fastdiff.step import denoise_step, update
from fastdiff.weights import CALL, Weights

Mode = Literal["eager", "compiled", "step-graph", "loop-graph"]
GRAPH_MODES = ("step-graph", "loop-graph")
StepFunction = Callable[[], None]
"""Advances the slots of one segment and batch size by one row."""
Key = tuple[int, int]
"""A segment and a batch size."""

WARM_UP_STEPS = 3  # the first compiles; libraries pick algorithms and take workspaces in the others


@dataclass(frozen=True)
class Built:
    """What one batch size took to make ready."""

    compile_s: float = 0.0  # the first call
    warm_up_s: float = 0.0
    capture_s: float = 0.0
    torch_bytes: int = 0  # that torch reserved for its graph, beyond what the sizes before it had
    driver_bytes: int = 0  # of the device, beside those: the graph itself, modules, workspaces of libraries


@dataclass
class Counters:
    """What became of calls and graphs."""

    hits: int = 0  # replays of exactly the size asked for
    misses: int = 0  # replays of a larger graph
    captures: int = 0  # of graphs that were kept
    evictions: int = 0  # of those, to make room


class Steps:
    """The step over one runtime's slots, in one mode, for each segment and batch size of its plan.

    Eager steps cost nothing to make; compiled ones are compiled when a size is first used; graphs are captured here,
    every size, largest first, and afterwards only replayed.
    """

    def __init__(
        self,
        denoiser: Denoiser | Sequence[Denoiser],
        slots: Slots,
        mode: Mode = "eager",
        model: nn.Module | Sequence[nn.Module] | None = None,
        *,
        progress: bool = False,
    ) -> None:
        """`denoiser` and the `model` that it calls: one, or one for each segment of the slots' plan."""
        if mode not in get_args(Mode):
            raise ValueError(f"mode: expected one of {', '.join(get_args(Mode))}, got {mode!r}")
        if mode == "loop-graph" and slots.plan.unroll == 1:
            raise ValueError("mode 'loop-graph' needs unroll >= 2, the rows in one graph; one row is mode 'step-graph'")
        if mode == "compiled" and slots.plan.compile == "none":
            raise ValueError("mode 'compiled' needs a plan whose compile is not 'none'; mode 'eager' compiles nothing")
        self.mode, self.plan = mode, slots.plan
        self.rows_per_call = slots.plan.unroll if mode == "loop-graph" else 1
        self.built: dict[Key, Built] = {}
        self._slots, self._progress = slots, progress
        self._denoisers = (denoiser,) if callable(denoiser) else tuple(denoiser)
        self._models = (model,) if model is None or isinstance(model, nn.Module) else tuple(model)
        self._functions: dict[Key, StepFunction] = {}
        self._graphs: StepGraphs | None = None
        self._weights: list[Weights] = []
        self.recapture()

    @property
    def graphs(self) -> StepGraphs | None:
        """The captured graphs, in a mode that has them."""
        return self._graphs

    def __call__(self, count: int, segment: int = 0) -> None:
        """Advance those of slots [0, count) that are in `segment` by `rows_per_call` rows, or to the segment's end.

        At the smallest batch size that holds them; the other slots stay as they are.
        """
        function = self._functions.get((segment, count))
        if function is None:
            function = self._functions[segment, count] = self._ready(segment, count)
        function()

    def _ready(self, segment: int, count: int) -> StepFunction:
        """What advances `count` slots, looked up once: between model calls each further line of Python is cold."""
        if self._graphs is not None:
            return partial(self._graphs.replay, count, segment)
        if self.mode in GRAPH_MODES:
            raise CannotCapture("the graphs were released, or could not be captured anew: call recapture()")
        key = segment, smallest(self.plan.batch_sizes, count)
        if key in self.built:
            return self._functions[key]
        function = self._make(*key)

        def first() -> None:
            started = time.perf_counter()
            function()
            self.built[key] = Built(compile_s=time.perf_counter() - started if self.mode == "compiled" else 0.0)
            self._functions[key] = self._functions[segment, count] = function

        return first

    def check(self) -> None:
        """Raise StaleGraph if the model is no longer what was compiled or captured."""
        if change := next(filter(None, (weights.changed() for weights in self._weights)), None):
            raise StaleGraph(f"the {self.mode} step is stale: {change}; call recapture() to take the model as it is")

    def recapture(self) -> None:
        """Release what was captured or compiled before, and capture every batch size anew; compiled steps are compiled
        anew when they are next used. The slots must be idle."""
        self.close()
        if self.mode == "eager":
            return  # and sees the model as it is
        if self.mode != "compiled":
            graphs = StepGraphs(self._slots.device, self.rows_per_call)
            keys = [(segment, n) for n in self.plan.batch_sizes[::-1] for segment in range(self.plan.segments)]
            for segment, n in tqdm(keys, desc=f"capture {self.mode}", disable=not self._progress):
                graphs.capture(n, self._make(segment, n), self.plan.graph_bytes, segment)
            self._graphs, self.built = graphs, graphs.built
        self._weights = [Weights(model) for model in self._models]

    def capture(self, n: int) -> None:
        """Capture a size that the byte budget left out; the least used go where they must. The slots must be idle."""
        if self.mode not in GRAPH_MODES:
            raise CannotCapture(f"mode {self.mode!r} has no graphs; build with mode 'step-graph' or 'loop-graph'")
        if n not in self.plan.batch_sizes:
            raise PlanMismatch(f"expected one of the plan's batch sizes {self.plan.batch_sizes}, got {n}")
        if self._graphs is None:
            raise CannotCapture("the graphs were released: call recapture()")
        for segment in range(self.plan.segments):
            if n not in self._graphs.sizes(segment):
                self._graphs.capture(n, self._make(segment, n), segment=segment)
        self._graphs.make_room(self.plan.graph_bytes, keep=n)
        self._functions.clear()  # which replay sizes that may be gone

    def close(self) -> None:
        """Release all graphs and compiled steps."""
        if self._graphs is not None:
            self._graphs.close()
        self._graphs, self._weights = None, []
        self._functions.clear()
        self.built = {}

    def _make(self, segment: int, n: int) -> StepFunction:
        batch, denoiser = self._slots.batch(n, segment), self._denoisers[segment]
        if self.mode == "eager" or self.plan.compile == "none":
            return step_function(denoiser, batch.with_views())
        if self.plan.regional:
            return regional(denoiser, batch, self._models[segment], self.plan.compile)
        return compiled(step_function(denoiser, batch), f"denoise_step_{n}", self.plan.compile)


def smallest(sizes: Sequence[int], count: int) -> int:
    """The first of rising `sizes` that holds `count` slots."""
    for size in sizes:
        if size >= count:
            return size
    raise PlanMismatch(f"expected at most {sizes[-1]} slots, got {count}; raise max_batch")


# Callables: eager, compiled as a whole, compiled by region


def step_function(denoiser: Denoiser, batch: Batch) -> StepFunction:
    """The step over one batch, as it is."""

    def step() -> None:
        denoise_step(denoiser, batch)

    return step


def compiled(
    function: Callable[..., Any], name: str, how: Compile, backend: str | Callable[..., Any] = "inductor"
) -> Callable[..., Any]:
    """`function` compiled as one graph, over a code object of its own: dynamo's recompile limit counts per code.

    Its guards are dropped, but for torch's global state. They would look in each call whether shapes, weights and the
    model's attributes are as they were traced: the memory here is static, and `Weights` looks once per request. Shapes
    are static without `dynamic=False`, which costs a tenth of a call: a code object of its own sees one of each.
    """
    options = {**torch._inductor.list_mode_options(how), "guard_filter_fn": _of_global_state}
    return torch.compile(own_code(function, name), fullgraph=True, options=options, backend=backend)


def _of_global_state(guards: Sequence[Any]) -> list[bool]:
    return [guard.guard_type == "GLOBAL_STATE" for guard in guards]  # autocast and its like: a host may change them


def regional(
    denoiser: Denoiser, batch: Batch, model: nn.Module | None, how: Compile, backend: str = "inductor"
) -> StepFunction:
    """The step with the model's repeated blocks compiled once for all of them, the update compiled, the rest eager.

    For large models, whose full compilation would be repeated for every batch size.
    """
    n = len(batch.slot)
    blocks = Regions(model, n, how, backend)
    views = batch.with_views()

    def own_update(row: Row, model_output: Tensor) -> None:
        update(batch, row, model_output)

    compiled_update = compiled(own_update, f"update_{n}", how, backend)

    def step() -> None:
        with blocks:
            denoise_step(denoiser, views, lambda _, row, model_output: compiled_update(row, model_output))

    return step


class Regions:
    """A model's repeated blocks, compiled; in place only inside a `with`, and for its thread: the model is the user's,
    and other runtimes' too."""

    _placing = threading.Lock()
    _mine = threading.local()  # whose `calls` a thread inside a `with` makes, by block

    def __init__(self, model: nn.Module | None, n: int, how: Compile, backend: str | Callable[..., Any]) -> None:
        names = getattr(model, "_repeated_blocks", None) or getattr(model, "_no_split_modules", None)  # as SD 3 has it
        if model is None or not names:
            raise PlanMismatch(
                f"{type(model).__name__} names no _repeated_blocks and no _no_split_modules to compile; set "
                "regional = false"
            )
        call = own_code(nn.Module._call_impl, f"block_{n}")  # one code for all blocks of a size, so they share graphs
        mode = None if how == "default" else how
        self._calls = {
            block: torch.compile(MethodType(call, block), fullgraph=True, dynamic=False, mode=mode, backend=backend)
            for block in model.modules()
            if type(block).__name__ in names
        }

    def __enter__(self) -> None:
        with self._placing:
            for block in self._calls:
                call = vars(block).get(CALL)
                if not isinstance(call, _Call):
                    call = vars(block)[CALL] = _Call(block, former=call)
                call.users += 1
        self._outside = getattr(self._mine, "calls", None)
        self._mine.calls = self._calls

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mine.calls = self._outside
        with self._placing:
            for block in self._calls:
                call = vars(block).get(CALL)
                if not isinstance(call, _Call):  # the user compiled it meanwhile
                    continue
                call.users -= 1
                if call.users:
                    continue
                if call.former is None:
                    del vars(block)[CALL]
                else:
                    vars(block)[CALL] = call.former


@dataclass
class _Call:
    """A block's call while some thread is in a step by regions: compiled in that one, in others what it was."""

    block: nn.Module
    former: Callable[..., Any] | None  # what the user compiled
    users: int = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = (getattr(Regions._mine, "calls", None) or {}).get(self.block, self.former)
        return self.block._call_impl(*args, **kwargs) if call is None else call(*args, **kwargs)


_serials = itertools.count()


def own_code(function: Callable[..., Any], name: str) -> FunctionType:
    """`function` over a code object of its own, for which dynamo has compiled nothing and knows no shapes yet."""
    assert isinstance(function, FunctionType)
    name = f"{name}_{next(_serials)}"  # dynamo remembers shapes by file, line and name
    # By its file dynamo knows torch's own functions, which it wraps into one code object for all.
    code = function.__code__.replace(co_name=name, co_filename=__file__)
    own = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return own


# Graphs


class StepGraphs:
    """CUDA graphs of the step by segment and batch size: one memory pool, one stream, replayed one at a time.

    The captures of a process take turns. Meanwhile no other thread may enqueue on streams of its own: the capture
    stream is one of the 32 that torch hands out in turn, and what lands on it would be captured too. So capture before
    you serve. (It is not one of high priority: graphs keep the priority of the stream that they were captured on.)
    """

    def __init__(self, device: torch.device, unroll: int) -> None:
        if device.type != "cuda":
            raise CannotCapture(
                f"CUDA graphs need a CUDA device, the model is on {device}; move the pipeline, or use mode 'eager' or "
                "'compiled'"
            )
        self.built: dict[Key, Built] = {}
        self.counters = Counters()
        self._device, self._unroll = device, unroll
        self._graphs: dict[Key, torch.cuda.CUDAGraph] = {}
        self._functions: dict[Key, StepFunction] = {}  # a compiled step owns constants that its graph reads
        self._replays: dict[Key, int] = {}
        self._sizes: dict[int, tuple[int, ...]] = {}
        self._pools: list[torch.cuda.MemPool] = []  # the last is captured into, the others hold what they held
        self._stream = torch.cuda.Stream(self._device)

    @property
    def pool_bytes(self) -> int:
        """What torch holds for the graphs' activations, which all sizes share."""
        return sum(segment["total_size"] for pool in self._pools for segment in pool.snapshot())

    @property
    def nbytes(self) -> int:
        """Device bytes of all graphs: the pool, and what the driver took for the graphs themselves."""
        return self.pool_bytes + sum(built.driver_bytes for built in self.built.values())

    def sizes(self, segment: int = 0) -> tuple[int, ...]:
        """The batch sizes that are captured, rising."""
        return self._sizes.get(segment, ())

    def replay(self, count: int, segment: int = 0) -> None:
        """Enqueue the graph of the smallest size that holds slots [0, count) on the caller's current stream."""
        n = smallest(self.sizes(segment), count)
        if n == count:
            self.counters.hits += 1
        else:
            self.counters.misses += 1
        self._replays[segment, n] += 1
        self._graphs[segment, n].replay()

    def capture(self, n: int, function: StepFunction, budget_bytes: int | None = None, segment: int = 0) -> bool:
        """Warm up, compile and capture size n; False, and no graph kept, if it would not fit the budget."""
        key = segment, n
        with _one_capture, torch.cuda.device(self._device), torch.no_grad():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            if not self._pools:
                self._pools.append(torch.cuda.MemPool())
            pool_before, reserved_before = self.pool_bytes, torch.cuda.memory_reserved()
            free_before, _ = torch.cuda.mem_get_info()
            try:
                compile_s = self._timed(function)  # outside the pool: autotuning allocates for itself
                with _no_garbage_collection():
                    with torch.cuda.use_mem_pool(self._pools[-1]):
                        warm_up_s = sum(self._timed(function) for _ in range(WARM_UP_STEPS - 1))
                    graph, capture_s = self._captured(n, function)
            except torch.OutOfMemoryError as error:
                raise OutOfMemory(
                    f"no room to capture batch size {n} beside {self.sizes(segment)}: {str(error).splitlines()[0]}; "
                    "lower max_batch, or set graph_bytes so that fewer sizes are captured"
                ) from error
            torch.cuda.empty_cache()
            free_after, _ = torch.cuda.mem_get_info()
            reserved = torch.cuda.memory_reserved() - reserved_before
        first = not self.sizes(segment)
        self._graphs[key], self._functions[key], self._replays[key] = graph, function, 0
        self._count_sizes(segment)
        self.built[key] = Built(
            compile_s=compile_s,
            warm_up_s=warm_up_s,
            capture_s=capture_s,
            torch_bytes=self.pool_bytes - pool_before,
            driver_bytes=max(0, free_before - free_after - reserved),
        )
        if budget_bytes is not None and self.nbytes > budget_bytes:
            needed = self.nbytes
            self._drop(key)
            if first:
                raise OutOfMemory(
                    f"the graph of batch size {n} takes {needed} bytes, graph_bytes is {budget_bytes}; raise it, or "
                    "lower max_batch"
                )
            return False
        self.counters.captures += 1
        return True

    def make_room(self, budget_bytes: int | None, keep: int) -> None:
        """Evict the least used graphs, the largest size and `keep` apart, until the budget holds."""
        while budget_bytes is not None and self.nbytes > budget_bytes:
            others = [(segment, n) for segment, n in self._graphs if n not in (keep, self.sizes(segment)[-1])]
            if not others:
                sizes = sorted({n for _, n in self._graphs})
                raise OutOfMemory(f"the graphs of batch sizes {sizes} take {self.nbytes} bytes, not {budget_bytes}")
            self._drop(min(others, key=self._replays.__getitem__))
            self.counters.evictions += 1

    def close(self) -> None:
        """Release every graph and the pool, once all that was enqueued has run; a later capture makes its own anew."""
        with _one_capture:  # in whose midst no pool may die
            torch.cuda.synchronize(self._device)
            for graph in self._graphs.values():
                graph.reset()
            for entries in (self._graphs, self._functions, self._replays, self.built, self._sizes, self._pools):
                entries.clear()

    def _drop(self, key: Key) -> None:
        self._graphs.pop(key).reset()
        for entries in (self._functions, self._replays, self.built):
            entries.pop(key)
        self._count_sizes(key[0])

    def _count_sizes(self, segment: int) -> None:
        self._sizes[segment] = tuple(sorted(n for own, n in self._graphs if own == segment))

    def _timed(self, function: StepFunction) -> float:
        """Seconds of one call on the capture stream, waited for."""
        started = time.perf_counter()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()
        self._stream.synchronize()
        return time.perf_counter() - started

    def _captured(self, n: int, function: StepFunction) -> tuple[torch.cuda.CUDAGraph, float]:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph, started = torch.cuda.CUDAGraph(), time.perf_counter()
        pool: Any = self._pools[-1].id  # a plain tuple, which torch types as a handle of its own
        references = self._pools[-1].use_count()
        with torch.cuda.stream(self._stream):
            torch._C._cuda_clearCublasWorkspaces()  # the graph's own is of its pool, whoever clears cuBLAS's later
            try:
                with torch.inference_mode(False):  # in which the generator's tensors would serve no capture outside
                    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                for _ in range(self._unroll):
                    function()
                graph.capture_end()
            except BaseException as error:
                self._abandon(graph, references)
                if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, Exception):
                    raise
                why = (str(error) or type(error).__name__).splitlines()[0]
                raise CannotCapture(
                    f"the step cannot be captured at batch size {n}: {why}; "
                    "`python -m fastdiff.bench doctor` names the operation, its file and line; then call recapture()"
                ) from error
            finally:
                torch._C._cuda_clearCublasWorkspaces()  # back to the pool: the next size takes the same
        return graph, time.perf_counter() - started

    def _abandon(self, graph: torch.cuda.CUDAGraph, references: int) -> None:
        """End a capture that failed, and leave its pool, to which there were so many references, if it is spoilt.

        Where the stream's capture was invalid torch 2.11 ends nothing but that: its two allocators go on recording to
        the pool, which is never released, and its generator refuses to draw. The allocator of device memory is told
        here; that of pinned memory cannot be, and keeps the pool's id and a pointer to the graph for ever. Later
        versions do more and more of this by themselves, so it is asked what is left.
        """
        device, pool = torch.cuda.current_device(), self._pools[-1]
        try:
            graph.capture_end()
        except RuntimeError:
            _abandoned.append(graph)
            with suppress(RuntimeError):  # it is not recording
                torch._C._cuda_endAllocateToPool(device, pool.id)
            graph.reset()
            if pool.use_count() > references:
                torch._C._cuda_releasePool(device, pool.id)
            self._pools.append(torch.cuda.MemPool())
            _end_capture_of_the_generator()
        else:
            graph.reset()


_one_capture = threading.RLock()  # torch's allocator clears its cache for one, and must not in the midst of another
_abandoned: list[torch.cuda.CUDAGraph] = []


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A pool that died in a reference cycle would be freed in the midst of a capture, and torch aborts the process."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _end_capture_of_the_generator() -> None:
    """By a capture that succeeds: torch tells the default generator of the end in no other place."""
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(False), torch.cuda.stream(torch.cuda.Stream()):
        scratch = torch.empty(1, device="cuda")
        graph.capture_begin(capture_error_mode="thread_local")
        scratch.zero_()  # torch warns of an empty graph
        graph.capture_end()
    graph.reset()
