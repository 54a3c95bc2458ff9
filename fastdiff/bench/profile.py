"""`python -m fastdiff.bench profile`: what one row costs, where, and whether CUDA graphs pay on this model and card."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from fastdiff.bench.arguments import pipeline, positive, shared
from fastdiff.bench.terminal import require_rich, say, show
from fastdiff.bench.words import NEEDS_CUDA, byte_count, prefixed
from fastdiff.errors import FastdiffError
from fastdiff.profile import Profile, break_even, choose
from fastdiff.request import Request
from fastdiff.runtime import Runtime
from fastdiff.stages import table_of

SCHEMA = "fastdiff.profile/1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --device, --batch and --json."""
    shared(parser, "model", "--device", "--json")
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="requests in a row (default: 1)")


def main(options: argparse.Namespace) -> int:
    """Profile, print; 0, or 4 where the row could not be captured."""
    if not options.json:
        require_rich()
    pipe, name = pipeline(options.model, options.device)
    report = {"schema": SCHEMA, "model": name, **measure(pipe, options.batch)}
    if options.json:
        sys.stdout.write(json.dumps(report, indent=1, allow_nan=False) + "\n")
    else:
        print_report(report)
    return 4 if report["unsupported"] else 0


def measure(pipe: Any, n: int) -> dict[str, Any]:
    """The profile of an eager row of n requests and, on CUDA, of its graph; as JSON knows it."""
    runtime = Runtime(pipe, max_batch=n, mode="eager", batch_sizes=(n,), certify=False)
    eager = runtime.profile()
    rows = len(table_of(runtime.family, Request(prompt="")))
    runtime.close()
    graph, unsupported = None, None
    if eager.gpu is not None:
        try:
            graph = _capture(pipe, eager, rows)
        except FastdiffError as error:
            unsupported = f"{type(error).__name__}: {error}"
    choice = choose(eager, graph["nbytes"] if graph else None)
    return {
        "eager": asdict(eager),
        "choice": asdict(choice),
        "rows": rows,
        "graph": graph,
        "unsupported": unsupported,
    }


def _capture(pipe: Any, eager: Profile, rows: int) -> dict[str, Any]:
    """The replay, what it saves and what it cost. Nothing is compiled: a compiler's gain is not the graph's."""
    runtime = Runtime(pipe, max_batch=eager.n, mode="step-graph", batch_sizes=(eager.n,), compile="none", certify=False)
    replay, built = runtime.profile(), runtime.steps.built[0, eager.n]
    runtime.close()
    capture_s = built.compile_s + built.warm_up_s + built.capture_s
    return {
        "profile": asdict(replay),
        "gain": eager.row_s / replay.row_s,
        "capture_s": capture_s,
        "nbytes": built.torch_bytes + built.driver_bytes,
        "break_even_images": break_even(capture_s, eager.row_s - replay.row_s, rows / eager.n),
    }


# The page

_FIGURES = {
    "launches": ("launches: kernels, copies, fills", ""),
    "row_s": ("time of a row", "s"),
    "host_s": ("host time", "s"),
    "device_s": ("device time", "s"),
    "busy": ("device busy", "%"),
    "regime": ("regime", ""),
}
"""What differs between modes, by field of a profile: label and unit."""
_COUNTS = {
    "operations": ("operations", ""),
    "flops": ("FLOPs", "FLOP"),
    "floor_bytes": ("bytes, at the least", "B"),
    "traffic_bytes": ("bytes, operation by operation", "B"),
    "floor_s": ("floor of any mode", "s"),
    "roofline_s": ("floor of eager mode", "s"),
}
"""What is of the row, in whatever mode."""


def print_report(report: dict[str, Any]) -> None:
    """One table and two sentences on a terminal."""
    eager, graph = report["eager"], report["graph"]
    title = f"A row of {eager['n']}: {report['model']}, {eager['dtype']}, {eager['gpu'] or 'cpu'}"
    show(title, ("", "eager", "graph") if graph else ("", "eager"), list(_cells(eager, graph)))
    for label, sentence in _sentences(report):
        say(f"{label}: {sentence}.")


def _cells(eager: dict[str, Any], graph: dict[str, Any] | None) -> Iterator[tuple[str, ...]]:
    for name, (label, unit) in _FIGURES.items():
        modes = [eager, graph["profile"]] if graph else [eager]
        yield label, *(_figure(mode, name, unit) for mode in modes)
    for name, (label, unit) in _COUNTS.items():
        yield label, _figure(eager, name, unit)


def _sentences(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    choice, graph = report["choice"], report["graph"]
    if report["eager"]["gpu"] is None:
        yield "Do graphs pay", f"{NEEDS_CUDA}: {choice['reason']}"
        yield "Break-even", NEEDS_CUDA
        return
    yield "Do graphs pay", f"{'yes' if choice['mode'] == 'step-graph' else 'no'}; {choice['reason']}"
    if graph is None:
        yield "Not captured", report["unsupported"]
        return
    images = graph["break_even_images"]
    yield "Measured", f"{graph['gain']:.3g} times as fast as a graph, for {byte_count(graph['nbytes'])}"
    paid_back = "never paid back" if images is None else f"paid back after {images:.3g} images of {report['rows']} rows"
    yield "Break-even", f"{prefixed(graph['capture_s'], 's')} to capture, {paid_back}"


def _figure(profile: dict[str, Any], name: str, unit: str) -> str:
    value = profile[name]
    if value is None:
        unknown = f"no rates for it in {profile['dtype']}" if name in ("floor_s", "roofline_s") else "not seen"
        return unknown if profile["gpu"] else NEEDS_CUDA
    if unit == "%":
        return f"{value:.0%}"
    if unit == "B":
        return byte_count(value)
    return prefixed(value, unit) if unit else str(value)
