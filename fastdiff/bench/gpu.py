"""`python -m fastdiff.bench gpu`: what only CUDA machines tell, cell by cell into a journal that survives a cut."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastdiff
from fastdiff.bench import gpu_cells, machine
from fastdiff.bench.arguments import device, refuse
from fastdiff.bench.gpu_report import MEASURED, markdown, outcomes
from fastdiff.bench.gpu_settings import Settings, Unsupported
from fastdiff.bench.gpu_suite import TIERS, CellCase
from fastdiff.bench.journal import NAME, append_line, commit, now, read_lines
from fastdiff.bench.suite import find

Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A piece of a run: what is measured together, and done or not done as a whole."""

    tier: str
    name: str
    measure: Callable[[], Iterator[Mapping[str, Any]]]
    max_s: float = math.inf  # of its process


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--tier, --out, --budget-s, --tiny, --device, --list and --cell."""
    parser.add_argument("--tier", type=_tiers, default="A", help="A, B, C or several of them, best first (default: A)")
    parser.add_argument(
        "--out", type=Path, default=Path("reports/runs/gpu"), metavar="DIR",
        help="journal and report; what its journal has is not measured again (default: reports/runs/gpu)",
    )  # fmt: skip
    parser.add_argument(
        "--budget-s", type=_seconds, metavar="N",
        help="seconds after which the run is cut and reported (default: what bench/gpu.toml says)",
    )  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="toy geometries, few samples: whether everything runs")
    parser.add_argument("--device", type=device, help="cpu, cuda or cuda:N (default: cuda, where there is one)")
    parser.add_argument("--list", action="store_true", help="list the cells and what became of them, measure nothing")
    parser.add_argument("--cell", metavar="NAME", help="this cell alone, of whichever tier, and again if it is there")


def main(options: argparse.Namespace) -> int:
    """Measure what the journal lacks, write and print the report.

    0; 4 where a cell failed or was not reached; else 1 where a CUDA test failed.
    """
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(_place(options.device), options.tiny, options.out)
    if not settings.on_cuda and not settings.tiny and not options.list:
        refuse("--device: expected a CUDA device for real geometries; on a CPU add --tiny")
    journal = Journal(options.out / NAME)
    cells = cells_of(options.tier if options.cell is None else TIERS, settings)
    if options.cell is not None:
        cells = [cell for cell in cells if cell.name == options.cell]
        if not cells:
            refuse(f"--cell: expected a name that --list --tier ABC shows, got {options.cell!r}")
    if options.list:
        ended = outcomes(journal.read())
        for cell in cells:
            sys.stdout.write(f"{cell.tier}  {ended.get(cell.name, 'not reached'):12}{cell.name}\n")
        return 0
    fingerprint = (machine.fingerprint_apart if settings.on_cuda else machine.fingerprint)(settings.device)
    kind = {
        "device": settings.device.type,
        "gpu": fingerprint["gpu"] and fingerprint["gpu"]["name"],
        "tiny": options.tiny,
        "torch": torch.__version__,
    }
    for record in journal.read():
        if record["event"] == "run" and record["settings"] != kind:
            refuse(f"--out: {options.out} has the journal of {record['settings']}, got {kind}; name another folder")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "machine.json").write_text(json.dumps(fingerprint, indent=1) + "\n", encoding="utf-8")
    planned = [{"tier": cell.tier, "cell": cell.name} for cell in cells]
    journal.append(
        event="run", settings=kind, machine=machine.describe(fingerprint), commit=commit()["id"], cells=planned
    )
    apart = None
    if settings.on_cuda:
        apart = partial(measure_apart, options)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))  # a cut like any other: the cell is killed, all reported
    try:
        run(cells, journal, options.budget_s or settings.suite.budget_s, apart, again=options.cell is not None)
    finally:
        report = markdown(journal.read())
        (options.out / "report.md").write_text(report, encoding="utf-8")
        sys.stdout.write(report)
    records = journal.read()
    ended, tested = outcomes(records), [one["entry"] for one in records if one.get("entry", {}).get("kind") == "tests"]
    if not all(ended.get(cell.name) in MEASURED for cell in cells):
        return 4
    return 1 if tested and tested[-1]["failures"] else 0


def _place(name: str) -> torch.device:
    place = torch.device(name)
    return torch.device("cuda", place.index or 0) if place.type == "cuda" else place


def cells_of(tiers: str, settings: Settings) -> list[Cell]:
    """The cells of these tiers, in the suite's order."""
    return [
        Cell(case.tier, case.name, partial(_entries, settings, case), case.max_s or math.inf)
        for case in settings.suite.cell
        if case.tier in tiers
    ]


def _entries(settings: Settings, case: CellCase) -> Iterator[Mapping[str, Any]]:
    with settings.compiler():
        yield from gpu_cells.MEASURES[case.measure](settings, case)


def code() -> str:
    """A hash of fastdiff's sources and of bench/gpu.toml, by which the page tells cells of different ones apart.

    A machine that is lent a copy of a checkout has no commit to tell, nor has a change that is not committed.
    """
    package, found = Path(fastdiff.__file__).parent, hashlib.sha256()
    for path in sorted([*package.rglob("*.py"), find("gpu")]):
        found.update(path.relative_to(path.parents[1]).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


class Journal:
    """What happened in a run and its cells' processes, in order."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Record]:
        """Every record, whichever process wrote it."""
        return read_lines(self.path)

    def append(self, **record: Any) -> None:
        """Write a record, with the time."""
        append_line(self.path, {**record, "at": now()})


def run(
    cells: Sequence[Cell],
    journal: Journal,
    budget_s: float = math.inf,
    apart: Callable[[Cell, Journal, float], None] | None = None,
    *,
    again: bool = False,
) -> None:
    """Measure every cell of which the journal has no good end (or all, `again`), here or `apart`, within the budget.

    What failed or was cut before comes last: it may do so again, and then has cost no other cell its turn.
    """
    deadline = time.perf_counter() + budget_s
    before = outcomes(journal.read())
    missing = [cell for cell in cells if again or before.get(cell.name) not in MEASURED]
    for cell in sorted(missing, key=lambda cell: cell.name in before):
        left_s = deadline - time.perf_counter()
        if left_s <= 0:
            return
        if math.isfinite(cell.max_s) and left_s < cell.max_s / 2:
            sys.stderr.write(f"{cell.tier}  {cell.name}: not begun, {left_s:.0f} s are too few\n")
            continue  # it would be cut; a shorter one may yet fit
        started = time.perf_counter()
        if apart is not None:
            apart(cell, journal, min(left_s, cell.max_s))
        else:
            measure(cell, journal)
        ended = journal.read()[-1]["status"]
        sys.stderr.write(f"{cell.tier}  {cell.name}: {ended}, {time.perf_counter() - started:.0f} s\n")


def measure(cell: Cell, journal: Journal) -> str:
    """Journal a cell's entries as they come, and its end: ok, failed, unsupported, or cut by whatever ends the run."""
    journal.append(event="start", cell=cell.name, code=code())
    started, status, reason = time.perf_counter(), "cut", None
    try:
        with torch.no_grad():
            for entry in cell.measure():
                journal.append(event="entry", cell=cell.name, entry=entry)
        status = "ok"
    except Unsupported as error:
        status, reason = "unsupported", str(error)
    except Exception as error:  # the next cell may do better
        status, reason = "failed", "".join(traceback.format_exception(error, limit=-3)).strip()
    finally:
        _end(journal, cell, status, reason, time.perf_counter() - started)
    return status


def measure_apart(options: argparse.Namespace, cell: Cell, journal: Journal, limit_s: float) -> None:
    """Measure a cell in a process of its own, killed at its limit.

    With it ends what would slow down or spoil the next cell: a profiler that was attached, compiled code, cached
    memory, a CUDA error, and whatever it started.
    """
    task: dict[str, Any] = {"name": cell.name, "limit_s": limit_s}
    task |= {"device": options.device, "tiny": options.tiny, "out": str(options.out)}
    command = [sys.executable, "-m", "fastdiff.bench.gpu", json.dumps(task)]
    before, started = len(journal.read()), time.perf_counter()
    status, reason = "cut", "the run ended in it"
    try:
        code = wait_for_all(command, limit_s)
        reason = f"killed after {limit_s:.0f} s"
        if code is not None:
            status, reason = "failed", f"its process ended with code {code}"
    finally:
        if not any(record["event"] == "end" for record in journal.read()[before:]):
            _end(journal, cell, status, reason, time.perf_counter() - started)


def wait_for_all(command: Sequence[str], limit_s: float) -> int | None:
    """The exit code of a process; None if it was killed at its limit. Nothing that it started outlives it."""
    with subprocess.Popen(command, process_group=0) as process:
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # tests, compiler workers


def measure_here(name: str, limit_s: float, device: str, tiny: bool, out: str) -> None:
    """What `measure_apart` has its process do."""
    settings = Settings(_place(device), tiny, Path(out), limit_s)
    (cell,) = (cell for cell in cells_of(TIERS, settings) if cell.name == name)
    # Device 0 is current as it is, without the context that only cells which use it should hold.
    if settings.on_cuda and settings.device.index:
        torch.cuda.set_device(settings.device)
    measure(cell, Journal(settings.out / NAME))


def _end(journal: Journal, cell: Cell, status: str, reason: str | None, seconds: float) -> None:
    journal.append(event="end", cell=cell.name, status=status, reason=reason, seconds=seconds)


def _tiers(text: str) -> str:
    if not re.fullmatch(f"[{TIERS}]+", text):
        raise argparse.ArgumentTypeError(f"expected A, B, C or several of them, got {text!r}")
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds > 0, got {text!r}")
    return seconds


if __name__ == "__main__":
    measure_here(**json.loads(sys.argv[1]))
