"""One side of `ab`: a script that measures the revision on its PYTHONPATH, as lines on its standard input ask.

It runs in older revisions than its own, so it brings its own instruments, imports nothing that was made for it, and
uses of fastdiff only what has long been there: `models.digits`, `Workbench` with its stopwatch, `RowBench.table_rows`
and `table_block`, `requests_of`, `images_of`, `image_block`, `Runtime.generate`, `suite.parse` and `denoise_step`.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff.bench import arms, rows, suite
from fastdiff.bench.arms import Workbench
from fastdiff.bench.measure import Block
from fastdiff.step import denoise_step

aten = torch.ops.aten

COMPILED_SIZES = (1, 8)
PASSES = 2  # over a case's requests, between two counts of live tensors
CANARY_SHAPE = (8, 4, 8, 8)  # of a row's latents
CANARY_OPERATIONS = 20  # about as many as a row has


class Work(NamedTuple):
    """One case in one mode."""

    block: Block  # what is timed
    outputs: Callable[[], list[Tensor]]  # what it computes
    figures: Callable[[], dict[str, int]]  # what can be counted of it, in eager mode


class Side:
    """The model, the schedulers and every case that this revision can run."""

    def __init__(self, task: dict[str, Any]) -> None:
        threads: int = task["suite"]["threads"]
        torch.set_num_threads(threads)
        self.device = torch.device(task["device"])
        self._bench = Workbench(fastdiff.models.digits().to(self.device))
        self._rows = rows.RowBench(self._bench, task["seed"])
        self._seed: int = task["seed"]
        self._canary = torch.ones(CANARY_SHAPE, device=self.device)
        self._work: dict[str, Work] = {}
        self._broken: dict[str, Exception] = {}
        chosen = suite.parse(task["suite"])
        for row in chosen.row:
            for mode in row.modes:
                self._add(f"{row.name}, {mode}", partial(self._row_work, row, mode))
        for image in chosen.image:
            for arm in image.arms:
                self._add(f"{image.name}, {arm}", partial(self._image_work, image, arm))

    def _add(self, name: str, make: Callable[[], Work]) -> None:
        """A case that this revision cannot make is an error to whoever asks about it, and to no other."""
        try:
            self._work[name] = make()
        except Exception as error:
            self._broken[name] = error

    def _named(self, name: str) -> Work:
        if name in self._broken:
            raise self._broken[name]
        return self._work[name]

    def _row_work(self, case: suite.RowCase, mode: Any) -> Work:
        block, lasts = self._rows.table_block(case, mode)

        def outputs() -> list[Tensor]:
            block()
            return lasts

        def figures() -> dict[str, int]:
            if mode != "eager":
                return {}
            block()
            static = self._rows.table_rows(mode, case.latent_shape, case.batch)
            operations, syncs = counted(lambda: static.steps(case.batch))
            figures = {"ops per row": operations, "host syncs per row": syncs, "state bytes": static.slots.nbytes}
            return figures | self._compiled(case)

        return Work(block, outputs, figures)

    def _compiled(self, case: suite.RowCase) -> dict[str, int]:
        """What a compiler makes of the step, without the minutes that inductor takes to generate code."""
        counters = torch._dynamo.utils.counters
        torch._dynamo.reset()
        counters.clear()
        step = torch.compile(denoise_step, backend="eager", dynamic=False)
        with torch.no_grad():
            for n in COMPILED_SIZES:
                batch = self._rows.table_rows("eager", case.latent_shape, n).slots.batch(n)
                for _ in range(3):
                    step(rows.null_model, batch)
        return {
            "compiled graphs and recompiles": counters["stats"]["unique_graphs"],
            "graph breaks": sum(counters["graph_break"].values()),
        }

    def _image_work(self, case: suite.ImageCase, arm: str) -> Work:
        requests = arms.requests_of(self._bench, case.samplers, case.steps, case.guidance, case.batch, self._seed)
        sequential = case.workload == "sequential"

        def outputs() -> list[Tensor]:
            with torch.no_grad():
                return arms.images_of(self._bench, arm, requests, sequential, self._bench.stopwatch())

        def figures() -> dict[str, int]:
            if arm != "tensorized/eager":
                return {}
            runtime = self._bench.runtime("eager", 1 if sequential else case.batch)
            runtime.generate(requests)
            operations, syncs = counted(lambda: runtime.generate(requests))
            before = live_tensors(self.device)
            for _ in range(PASSES):
                runtime.generate(requests)
            after = live_tensors(self.device)
            served = f"{PASSES * case.batch} requests"
            return {
                f"ops of {case.batch} requests": operations,
                f"host syncs of {case.batch} requests": syncs,
                "state bytes": runtime.slots.nbytes,
                f"tensors left by {served}": max(0, after[0] - before[0]),
                f"bytes left by {served}": max(0, after[1] - before[1]),
            }

        return Work(arms.image_block(self._bench, arm, requests, sequential), outputs, figures)

    def figures(self, name: str) -> dict[str, int]:
        """What can be counted of a case."""
        return self._named(name).figures()

    def outputs(self, name: str, path: str) -> None:
        """What a case computes, as one array in a file."""
        np.save(path, torch.stack([output.cpu().float() for output in self._named(name).outputs()]).numpy())

    def settle(self, core: int | None) -> None:
        """Before the first block: no garbage collection from here on, and on one core where there is but one thread."""
        if core is not None and torch.get_num_threads() == 1:
            os.sched_setaffinity(0, {core})
        gc.collect()
        gc.disable()

    def block(self, name: str, repeats: int) -> float:
        """Seconds of so many blocks of a case."""
        work = self._named(name)
        return sum(work.block().total_s for _ in range(repeats))

    def canary(self, rows: int) -> float:
        """Seconds, by this revision's own stopwatch, of so many rows of work that is the same in every revision."""
        watch, sample = self._bench.stopwatch(), self._canary
        with torch.no_grad(), watch:
            for _ in range(rows * CANARY_OPERATIONS):
                sample.mul_(-1.0)
        return watch.seconds


class Counter(TorchDispatchMode):
    """Counts operations that compute, and those that the host waits for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch is
        self.operations = self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_value = torch.Tag.data_dependent_output in func.tags or _has_dynamic_shape(func, args)
        reads = by_value or _leaves_cuda(func, args, kwargs or {})
        self.syncs += reads
        self.operations += not (reads or func.is_view or func.overloadpacket in (aten.detach, aten._unsafe_view))
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Counts calls that would wait for a device, of tensors on the host, where they are no operation."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = func in (Tensor.cpu, Tensor.tolist, Tensor.numpy, Tensor.__array__)
        self.syncs += reads and args[0].device.type == "cpu"
        return func(*args, **(kwargs or {}))


def counted(work: Callable[[], object]) -> tuple[int, int]:
    """Operations and host syncs."""
    with torch.no_grad(), Reads() as reads, Counter() as counter:
        work()
    return counter.operations, counter.syncs + reads.syncs


def _has_dynamic_shape(func: Any, args: Any) -> bool:
    if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return torch.Tag.dynamic_output_shape in func.tags


def _leaves_cuda(func: Any, args: Any, kwargs: Any) -> bool:
    if func.overloadpacket is aten._to_copy:
        target = kwargs.get("device")
        return target is not None and target.type == "cpu" and args[0].device.type == "cuda"
    return func.overloadpacket is aten.copy_ and args[0].device.type == "cpu" and args[1].device.type == "cuda"


def live_tensors(device: torch.device) -> tuple[int, int]:
    """How many tensors Python holds, and the bytes behind them or, on CUDA, all that torch has allocated."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), Tensor)]
    if device.type == "cuda":
        return len(tensors), torch.cuda.memory_allocated(device)
    return len(tensors), sum(dict(_storages(tensors)).values())


def _storages(tensors: list[Tensor]) -> Iterator[tuple[int, int]]:
    for tensor in tensors:
        if tensor.layout is torch.strided and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            yield storage._cdata, storage.nbytes()


def main() -> None:
    """Answer each line with one, until there are no more: {"value": ...} or {"error": ...}."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    warnings.simplefilter("ignore")  # of samplers at unusual settings
    side: Side | None = None
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            if side is None:
                side = Side(*arguments)
                value: Any = fastdiff.__file__
            else:
                value = getattr(side, name)(*arguments)
            answer = {"value": value}
        except Exception as error:  # whatever the revision raises is the answer
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
