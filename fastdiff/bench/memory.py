"""`python -m fastdiff.bench memory`: what a runtime takes, phase by phase, in a process that does nothing else."""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.bench.arguments import pipeline, positive, shared
from fastdiff.bench.terminal import require_rich, say, show
from fastdiff.bench.words import byte_count

if TYPE_CHECKING:
    import torch

    from fastdiff.bench.machine import Nvml

SCHEMA = "fastdiff.memory/1"
MODES = ("eager", "compiled", "step-graph")
COMPILE = ("none", "default")
STEPS = 4  # of each request: rows take what they take from the first on
ROUNDS = 3  # of requests in the steady phase


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The process at the end of a phase, and its peaks within. What only a CUDA device has is None elsewhere."""

    name: str
    what: str
    tensor_bytes: int  # on the device, of all tensors that Python holds
    rss_bytes: int | None  # the process's resident host memory, libraries and all; where Linux tells
    rss_peak_bytes: int | None  # so far, not of this phase alone
    allocated_bytes: int | None = None  # by torch's allocator, for tensors and what else asks it
    allocated_peak_bytes: int | None = None
    reserved_bytes: int | None = None  # by torch's allocator, of the device
    reserved_peak_bytes: int | None = None
    pool_bytes: dict[str, int] | None = None  # reserved_bytes by memory pool
    unseen_bytes: int | None = None  # in use on the device and not torch's: contexts, modules, graphs, other processes
    nvml_bytes: int | None = None  # of the device, by this process, as NVML counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, --device, --batch, --mode and --json."""
    shared(parser, "model", "--device", "--json")
    parser.add_argument("--batch", type=positive, default=8, metavar="N", help="slots (default: 8)")
    parser.add_argument("--mode", choices=MODES, help="default: step-graph on CUDA, eager elsewhere")
    parser.add_argument(
        "--compile",
        choices=COMPILE,
        default="default",
        help="what is captured: none captures at once (default: default)",
    )


def main(options: argparse.Namespace) -> int:
    """Measure in a process of its own, print; 0, or what became of that process: 2 for bad arguments, 4 otherwise."""
    if not options.json:
        require_rich()
    mode = options.mode or ("eager" if options.device == "cpu" else "step-graph")
    task = {
        "model": options.model and str(options.model),
        "device": options.device,
        "batch": options.batch,
        "mode": mode,
        "compile": options.compile,
    }
    command = [sys.executable, "-m", "fastdiff.bench.memory", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"the measuring process ended with {done.returncode}"]
        refused = done.returncode == 2  # it says so by itself
        sys.stderr.write(f"{said[-1]}\n" if refused else f"not measured: {said[-1]}\n")
        return 2 if refused else 4
    report = json.loads(done.stdout)
    if options.json:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        print_report(report)
    return 0


def measure(model: Path | None, device: str, batch: int, mode: Any, compile: Any) -> dict[str, Any]:
    """All phases, in this process: call it in one that has done nothing yet."""
    import torch

    from fastdiff.bench.machine import Nvml
    from fastdiff.request import Request
    from fastdiff.runtime import Runtime

    place = torch.empty(0, device=device).device  # with its number
    nvml = Nvml(place)
    phases: list[Phase] = []

    def ends(name: str, what: str) -> None:
        phases.append(_phase(name, what, place, nvml))

    ends("import", "torch and fastdiff")
    pipe, model_name = pipeline(model, device)
    ends("load", "diffusers, and the pipeline on its device")

    runtime = Runtime(pipe, batch, "eager", batch_sizes=(batch,), certify=False)
    prompted, labelled = Request(prompt="a handwritten seven", steps=STEPS), Request(class_label=0, steps=STEPS)
    requests = [prompted if runtime.supports(prompted) is None else labelled] * batch
    runtime.generate(requests)
    runtime.close()
    del runtime
    ends("warm-up", f"{batch} requests served eagerly, text to pixels, and what libraries keep after that")

    runtime = Runtime(pipe, batch, mode, compile=compile, certify=False)
    with torch.no_grad():
        runtime.steps(batch)
    use = runtime.memory()
    ends("capture", f"the slots of a runtime, its step ready in mode {mode}")

    for _ in range(ROUNDS):
        runtime.generate(requests)
    ends("steady", f"{ROUNDS * batch} requests served, text to pixels")

    runtime.close()
    del runtime
    ends("after release", "the runtime closed, the pipeline still there")
    state = nvml.state()
    return {
        "schema": SCHEMA, "model": model_name, "device": _device_name(place), "mode": mode, "batch": batch,
        "weights_bytes": use.weights_bytes, "state_bytes": use.state_bytes,
        "graph_bytes": dict(sorted(use.graph_bytes.items())) if use.pool_bytes is not None else None,
        "foreign_processes": state and state.foreign_processes, "nvml_reason": nvml.process_bytes()[1],
        "phases": [asdict(phase) for phase in phases],
    }  # fmt: skip


def _phase(name: str, what: str, place: torch.device, nvml: Nvml) -> Phase:

    from fastdiff.bench.vram import device_bytes, live_tensors, pool_bytes, settle_device, storage_bytes

    gc.collect()
    rss_bytes, rss_peak_bytes = _resident_bytes()
    host = Phase(
        name=name, what=what, tensor_bytes=storage_bytes(live_tensors(place)), rss_bytes=rss_bytes,
        rss_peak_bytes=rss_peak_bytes,
    )  # fmt: skip
    if place.type != "cuda":
        return host
    settle_device(place)
    pools, nvml_bytes = pool_bytes(place), nvml.process_bytes()[0]
    held = device_bytes(place)
    return replace(
        host,
        allocated_bytes=held.allocated_bytes,
        allocated_peak_bytes=held.allocated_peak_bytes,
        reserved_bytes=held.reserved_bytes,
        reserved_peak_bytes=held.reserved_peak_bytes,
        pool_bytes=pools,
        unseen_bytes=held.used_bytes - held.reserved_bytes,
        nvml_bytes=nvml_bytes,
    )


def _resident_bytes() -> tuple[int | None, int | None]:
    """Now, and the most so far."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None, None
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    now, most = (1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))  # listed in kB
    return now, most


def _device_name(place: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(place) if place.type == "cuda" else str(place)


# The page

_FIGURES = {
    "tensor_bytes": "tensors that Python holds",
    "allocated_bytes": "allocated by torch",
    "allocated_peak_bytes": "the most within the phase",
    "reserved_bytes": "reserved by torch",
    "reserved_peak_bytes": "the most within the phase",
    "unseen_bytes": "in use beside torch: contexts, modules, graphs, other processes",
    "nvml_bytes": "of this process, by NVML",
    "rss_bytes": "resident host memory of the process (RSS)",
    "rss_peak_bytes": "the most so far",
}


def print_report(report: dict[str, Any]) -> None:
    """One table, a column for each phase, and what there is to say of graphs and of NVML."""
    phases = report["phases"]
    rows = [
        (label, *(byte_count(phase[name]) for phase in phases))
        for name, label in _FIGURES.items()
        if any(phase[name] is not None for phase in phases)
    ]
    pools = [phase["pool_bytes"] or {} for phase in phases]
    rows += [
        (f"reserved in pool {pool}", *(byte_count(one.get(pool)) for one in pools))
        for pool in sorted(set().union(*pools))
    ]
    title = f"Memory: {report['model']}, {report['mode']}, {report['batch']} slots, {report['device']}"
    show(title, ("", *(phase["name"] for phase in phases)), rows)
    for phase in phases:
        say(f"{phase['name']}: {phase['what']}.")
    say(f"Weights of the model {byte_count(report['weights_bytes'])}, all slots {byte_count(report['state_bytes'])}.")
    for n, nbytes in (report["graph_bytes"] or {}).items():
        say(f"The graph of batch size {n}: {byte_count(nbytes)} beside the larger ones.")
    if report["nvml_reason"]:
        say(f"Nothing from NVML: {report['nvml_reason']}.")
    if report["foreign_processes"]:
        say(f"Other processes on the device: {report['foreign_processes']}.")


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")  # of samplers: the last line on standard error is the reason of a failure
    sys.stdout.write(json.dumps(measure(**{**task, "model": task["model"] and Path(task["model"])}), allow_nan=False))
