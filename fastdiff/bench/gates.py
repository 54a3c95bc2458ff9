"""Figures that no clock makes: the same in every run, so that they gate on any machine, against reports/baselines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

import torch

from fastdiff.bench import files, suite
from fastdiff.bench.arms import Workbench, requests_of, served
from fastdiff.bench.rows import RowBench, count_steps, count_tables
from fastdiff.bench.suite import CountCase, RowCase
from fastdiff.bench.vram import count_syncs, live_tensors, storage_bytes, vram_peak
from fastdiff.bench.worker import counted
from fastdiff.capture import own_code, step_function
from fastdiff.plan import CapturePlan, shipped
from fastdiff.request import Request
from fastdiff.runtime import Runtime
from fastdiff.slots import Slots

BASELINES = Path("reports", "baselines")
PEAK_TOLERANCE = 0.01  # of peak bytes alone: an allocator rounds, a library changes its workspace
ROWS = 4  # by then a multistep sampler is at its full order
BATCHES = (1, 8)

Verdict = Literal["REGRESSION", "not measured", "IMPROVEMENT", "new"]
Value = int | None
"""None: it could not be measured in this run."""
Figure = tuple[str, Value]


@dataclass(frozen=True)
class Change:
    """A figure that is not what the baseline has; None where one of them has none, or could not measure it."""

    name: str
    base: Value
    head: Value
    verdict: Verdict


def figures(bench: Workbench) -> dict[str, Value]:
    """Every figure of the step and of the workbench's model, by name: less is better."""
    with torch.no_grad():
        return dict(
            [
                *(figure for case in suite.load("run").count for figure in _sampler_rows(bench, case)),
                *(_rows_on_cuda(bench) if bench.device.type == "cuda" else _emulated_rows(bench)),
                *_compilation(bench),
                *_served(bench),
                *_state(),
                *_kept(bench),
            ]
        )


def key(device: torch.device) -> str:
    """What figures depend on, as a file name: torch, diffusers, and the kind of device."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = f"torch-{torch.__version__.partition('+')[0]}-diffusers-{version('diffusers')}"
    return re.sub(r"[^a-z0-9.]+", "-", f"{versions}-{kind}".lower())


def baseline(key: str) -> dict[str, Value] | None:
    """The committed figures of the working directory's reports/; None, incomparable, where there are none of `key`."""
    path = BASELINES / f"{key}.json"
    if not path.is_file():
        return None
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected figures by name as JSON, got {error}; write the baseline anew") from None
    if not isinstance(known, dict) or not all(isinstance(value, Value) for value in known.values()):
        raise ValueError(f"{path}: expected figures by name as JSON, got something else; write the baseline anew")
    return known


def save(key: str, figures: Mapping[str, Value]) -> Path:
    """Make `figures` the baseline of `key`."""
    path = BASELINES / f"{key}.json"
    files.write(path, json.dumps(dict(figures), indent=1) + "\n")
    return path


def compare(figures: Mapping[str, Value], baseline: Mapping[str, Value]) -> list[Change]:
    """What changed, regressions first.

    A figure that the run no longer has is one: nobody watches it any more. One that a side has but could not measure is
    neither a change nor none.
    """
    changes = []
    for name in {**baseline, **figures}:
        base, head = baseline.get(name), figures.get(name)
        if (name in figures and head is None) or (name in baseline and base is None):
            changes.append(Change(name, base, head, "not measured"))
        elif base is None:
            changes.append(Change(name, None, head, "new"))
        elif head is None:
            changes.append(Change(name, base, None, "REGRESSION"))
        elif abs(head - base) > (PEAK_TOLERANCE * base if name.startswith("peak bytes") else 0):
            changes.append(Change(name, base, head, "REGRESSION" if head > base else "IMPROVEMENT"))
    return sorted(changes, key=lambda change: get_args(Verdict).index(change.verdict))


# On any machine


def _sampler_rows(bench: Workbench, case: CountCase) -> Iterator[Figure]:
    """The step around a null model, for each of the suite's mixes."""
    rows = RowBench(bench, seed=0)
    for mix in case.mixes:
        samplers = mix[0] if len(mix) == 1 else "mixed"
        for n in case.batches:
            one = RowCase(name="count", samplers=mix, latent_shape=case.latent_shape, batch=n, steps=ROWS)
            counted = count_tables(rows, one)
            yield f"ops per row: {samplers}, batch {n}", max(counted.operations)
            yield f"host syncs per row: {samplers}, batch {n}", max(counted.syncs)


def _emulated_rows(bench: Workbench) -> Iterator[Figure]:
    """The step with the model, as a device would see it. Peak bytes are those beyond weights and slots."""
    runtime = bench.runtime("eager", BATCHES[-1])
    for n in BATCHES:
        slots = Slots(runtime.plan, "cpu")
        for slot, request in enumerate(_requests(bench)[:n]):
            slots.load(slot, runtime.prepare(request))
        counted = count_steps(bench.family.denoiser, slots, n, ROWS)
        yield f"ops per row: model, batch {n}", max(counted.operations)
        yield f"host syncs per row: model, batch {n}", max(counted.syncs)
        yield f"peak bytes of a row: model, batch {n}", counted.peak_bytes - storage_bytes(slots.tensors())


def _compilation(bench: Workbench) -> Iterator[Figure]:
    """What Dynamo makes of the step, with a backend that compiles nothing, and whether other requests need another."""
    from torch._dynamo.utils import counters  # a second's import, for the commands that count

    runtime, n = bench.runtime("eager", BATCHES[-1]), BATCHES[-1]
    slots = Slots(runtime.plan, bench.device, planar=True)
    step = step_function(bench.family.denoiser, slots.batch(n))
    traced = torch.compile(own_code(step, "counted_step"), backend="eager", dynamic=False)
    breaks, graphs = _graph_breaks(), []
    for requests in (_requests(bench), _requests(bench)[::-1], _requests(bench, guidance=1.0)):
        before = counters["stats"]["unique_graphs"]
        for slot, request in enumerate(requests):
            slots.load(slot, runtime.prepare(request))
        for _ in range(2):
            traced()
        graphs.append(counters["stats"]["unique_graphs"] - before)
    yield "compiled graphs: mixed requests, one batch size", graphs[0]
    yield "recompiles: mixed requests, one batch size", sum(graphs[1:])
    yield "graph breaks: mixed requests, one batch size", _graph_breaks() - breaks


def _graph_breaks() -> int:
    from torch._dynamo.utils import counters  # a second's import, for the commands that count

    return sum(counters["graph_break"].values())


def _served(bench: Workbench) -> Iterator[Figure]:
    """All that a session does for prepared requests: the loads, the noise, whatever it does around each step."""
    runtime = bench.runtime("eager", BATCHES[-1])
    states = [runtime.prepare(request) for request in _requests(bench)]
    serve = partial(served, runtime, states, bench.stopwatch())
    serve()
    operations, syncs = counted(serve)
    yield f"ops of a session: {len(states)} requests", operations
    yield f"host syncs of a session: {len(states)} requests", syncs


def _state() -> Iterator[Figure]:
    """All slots of every shipped plan, as they are allocated, on a device that holds nothing."""
    for name in shipped():
        yield f"state bytes: {name}", Slots(CapturePlan.load(name), "meta").nbytes


def _kept(bench: Workbench) -> Iterator[Figure]:
    """Bytes of tensors that requests leave behind, once everything that is kept for good is there."""
    runtime, requests = bench.runtime("eager", BATCHES[-1]), _requests(bench)
    runtime.generate(requests)
    before = _held_bytes(bench.device)
    runtime.generate(requests)
    yield f"bytes left by {len(requests)} requests", max(0, _held_bytes(bench.device) - before)


def _held_bytes(device: torch.device) -> int:
    tensors = live_tensors(device)  # garbage is gone from here on
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else storage_bytes(tensors)


def _requests(bench: Workbench, guidance: float = 3.0) -> list[Request]:
    """As many as the largest batch has slots, of all the samplers that the suite mixes."""
    mix = max((mix for case in suite.load("run").count for mix in case.mixes), key=len)
    return requests_of(bench, mix, (ROWS,), (guidance,), BATCHES[-1], seed=0)


# On CUDA


def _rows_on_cuda(bench: Workbench) -> Iterator[Figure]:
    """The step with the model, eager and captured. Peak bytes are those beyond what was allocated before the row."""
    eager = bench.runtime("eager", BATCHES[-1])
    # Nothing is compiled: kernels that a compiler chose by their speed are not the same twice.
    graphed = Runtime(bench.pipe, BATCHES[-1], "step-graph", batch_sizes=BATCHES, compile="none", certify=False)
    for n in BATCHES:
        profile = eager.profile(n)  # and warm from here on
        yield f"ops per row: model, batch {n}", profile.operations
        yield f"host syncs per row: model, batch {n}", count_syncs(partial(eager.steps, n))
        allocated = torch.cuda.memory_allocated(bench.device)
        peak_bytes = vram_peak(bench.device, partial(eager.steps, n))
        assert peak_bytes is not None
        yield f"peak bytes of a row: model, batch {n}", peak_bytes - allocated
        for name, runtime in (("launches per row", eager), ("graph nodes", graphed)):
            yield f"{name}: model, batch {n}", runtime.profile(n).launches
    graphed.close()
