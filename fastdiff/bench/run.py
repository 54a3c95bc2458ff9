"""`python -m fastdiff.bench run`: measure a suite piece by piece, print it, write reports/runs/<time>/."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastdiff.bench import cells, estimate, files, gates, machine, schema, suite, terminal
from fastdiff.bench.arguments import folder, model_name, pipeline, plain_name, positive, refuse, scheduler, shared
from fastdiff.bench.arms import Workbench
from fastdiff.bench.cells import Piece
from fastdiff.bench.journal import REPORT, RUNS, CannotResume, Journal, commit, stamp, unfinished
from fastdiff.bench.outcome import distrust, exit_code, unmeasured, unvouched, wrong_answers
from fastdiff.bench.rows import RowBench
from fastdiff.bench.suite import Suite
from fastdiff.bench.summary import Report, summarize
from fastdiff.errors import FastdiffError
from fastdiff.families import family_of

NEWEST = Path()
INTERRUPTED = 130  # as a shell has it: 128 and SIGINT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The suite, its overrides, what of it to run, and where the report goes."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--suite", default="run", metavar="NAME", help="run, smoke, ci or a TOML file (default: run)")
    which.add_argument("--quick", action="store_const", const="smoke", dest="suite", help="the suite smoke: a minute")
    parser.add_argument("-k", dest="only", default="", metavar="TEXT", help="only pieces with this in their title")
    parser.add_argument("--list", action="store_true", help="print the pieces' titles and run nothing")
    parser.add_argument("--dry-run", action="store_true", help="print how long each piece takes and run nothing")
    parser.add_argument(
        "--resume", type=Path, nargs="?", const=NEWEST, metavar="FOLDER", help="go on with a killed run (the newest)"
    )
    parser.add_argument("--update-baseline", action="store_true", help="make this run's exact figures the baseline")
    parser.add_argument("--json", action="store_true", help="print the report's JSON instead of tables")
    parser.add_argument("--model", type=folder, metavar="DIR", help="a saved diffusers pipeline (default: digits)")
    shared(parser, "--device")
    parser.add_argument("--batch", type=positive, metavar="N", help="requests at once in concurrent cases")
    parser.add_argument("--scheduler", type=scheduler, metavar="NAME", help="this sampler alone, in every case")
    parser.add_argument("--steps", type=positive, metavar="N", help="denoising steps, in every case")
    parser.add_argument("--seed", type=int, default=0, help="of prompts' latents, noise and the order of arms")
    parser.add_argument("--save", type=plain_name, metavar="NAME", help="write reports/NAME/ as well")


def main(options: argparse.Namespace) -> int:
    """Measure, print and write. 0; 1 where an exact figure grew and is not accepted, 3 where an answer is wrong, 4
    where a piece could not run."""
    try:
        chosen = suite.load(options.suite)
    except (OSError, ValueError) as error:
        refuse(f"--suite: {error}")
    if torch.device(options.device).type == "cuda":
        chosen = chosen.with_graphs()
    chosen = chosen.override(batch=options.batch, scheduler=options.scheduler, steps=options.steps)
    whole = list(cells.pieces(chosen, options.seed))
    pieces = cells.choose(whole, options.only)
    if not pieces:
        refuse(f"-k: no piece of {options.suite} has {options.only!r} in its title; --list shows them")
    if options.update_baseline:
        _check_baseline(options, pieces)
    if options.list or options.dry_run:
        said = [piece.title for piece in pieces]
        if options.dry_run:
            name, model = Path(options.suite).stem, model_name(options.model)
            said = estimate.lines(chosen, name, model, options.device, pieces)
        sys.stdout.write("".join(f"{line}\n" for line in said))
        return 0
    terminal.require_rich()
    torch.set_num_threads(chosen.threads)  # the fingerprint has them
    journal = _journal(options, chosen)
    try:
        report = measure(options, chosen, pieces, journal, complete=len(pieces) == len(whole))
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped after {len(journal.finished)} pieces; the same with --resume goes on from there\n")
        return INTERRUPTED
    write(options, report, journal)
    return exit_code(report)


def _check_baseline(options: argparse.Namespace, pieces: Sequence[Piece]) -> None:
    """Whether what would be written is the shipped model's figures, which a baseline is of."""
    if options.model is not None:
        refuse("--update-baseline: a baseline is of the shipped model's figures, not of another's; leave out --model")
    if not any(piece.section == "gates" for piece in pieces):
        refuse(f"--update-baseline: -k {options.only!r} leaves out the piece 'deterministic figures', which it writes")


def _journal(options: argparse.Namespace, chosen: Suite) -> Journal:
    """A new run's, or that of the run to go on with."""
    known = commit()
    header = {
        "suite": f"{options.suite} {hashlib.sha256(repr(chosen).encode()).hexdigest()[:12]}",
        "only": options.only,
        "seed": options.seed,
        "model": str(options.model or ""),
        "machine": machine.fingerprint(torch.device(options.device))["id"],
        "commit": known["id"] + (" with changes" if known["dirty"] else ""),
        **stamp(),
    }
    try:
        if options.resume is not None:
            return Journal.resume(unfinished() if options.resume == NEWEST else options.resume, header)
        return Journal.start(RUNS / time.strftime("%Y%m%d-%H%M%S"), header)
    except CannotResume as error:
        refuse(f"--resume: {error}")
    except FileExistsError:
        refuse(f"another run was started here within this second; see {RUNS}")


def measure(
    options: argparse.Namespace, chosen: Suite, pieces: Sequence[Piece], journal: Journal, *, complete: bool
) -> dict[str, Any]:
    """The report of `pieces`, all of the suite's if `complete`: those that the journal lacks are measured and added."""
    resumed = len(journal.finished)
    if [one["title"] for one in journal.finished] != [piece.title for piece in pieces[:resumed]]:
        refuse(f"--resume: {journal.folder}: its pieces are not this suite's; start a new run")
    known = _baseline(options)
    pipe, name = pipeline(options.model, options.device)
    try:
        family = family_of(pipe)
    except FastdiffError as error:
        refuse(f"--model: {error}")
    fingerprint = machine.fingerprint(family.device)
    _run_pieces(RowBench(Workbench(pipe), options.seed), pieces[resumed:], chosen.threads, journal)
    raw = cells.assemble(chosen, journal.finished)
    if raw["gates"]:
        changes = None if known is None else gates.compare(raw["gates"]["figures"], known)
        raw["gates"]["changes"] = None if changes is None else [asdict(change) for change in changes]
        raw["gates"]["accepted"] = options.update_baseline
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    weights = [weight for part in parts for weight in part.parameters()]
    report: dict[str, Any] = {
        "schema": schema.SCHEMA,
        "suite": Path(options.suite).stem,
        "created": journal.header["created"],
        "command": journal.header["command"],
        "model": {
            "name": name,
            "parameters": sum(weight.numel() for weight in weights),
            "toy": sum(weight.numel() for weight in family.model.parameters()) < 50_000_000,
            "latent_shape": list(family.latent_shape),
            "dtype": str(family.dtype).removeprefix("torch."),
        },
        "settings": {
            "device": str(family.device),
            "seed": options.seed,
            "threads": chosen.threads,
            "level": chosen.level,
            "half_width": chosen.half_width,
        },
        "machine": fingerprint,
        "commit": commit(),
        "resumed": resumed,
        "complete": complete,
        **raw,
    }
    return {**report, "summary": summarize(report)}


def _run_pieces(row_bench: RowBench, pieces: Sequence[Piece], threads: int, journal: Journal) -> None:
    """Each piece in turn, with a progress bar; what is finished is in the journal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with warnings.catch_warnings(), Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        warnings.simplefilter("ignore")  # samplers at unusual settings divide by zero, and say so at each step
        task = progress.add_task("starting", total=len(pieces))
        for piece in pieces:
            progress.update(task, description=piece.title)
            journal.add(cells.measure(piece, row_bench, threads))
            progress.advance(task)


def _baseline(options: argparse.Namespace) -> dict[str, gates.Value] | None:
    """The committed figures to compare with; those of the shipped model are no baseline for another."""
    if options.model is not None:
        return None
    try:
        return gates.baseline(gates.key(torch.device(options.device)))
    except ValueError as error:
        refuse(str(error))


def write(options: argparse.Namespace, report: dict[str, Any], journal: Journal) -> None:
    """The report into the run's folder, and wherever else the options say; then what to know of it."""
    from fastdiff.bench.page import html
    from fastdiff.bench.report import markdown, print_tables

    text = json.dumps(schema.document(report), indent=1, allow_nan=False) + "\n"
    forms = {REPORT: text, "report.md": markdown(report), "report.html": html(report)}
    folders = [journal.folder, *([Path("reports", options.save)] if options.save else [])]
    for place in folders:
        for name, content in forms.items():
            files.write(place / name, content)
    if options.json:
        sys.stdout.write(text)
    else:
        print_tables(report)
    said = [f"wrote {place / 'report.html'}" for place in folders]
    said += [f"wrong: {one.case}, {one.arm}: {one.reason}" for one in wrong_answers(report)]
    said += [f"not measured: {failed['what']}: {failed['reason']}" for failed in report["unsupported"]]
    said += _said_of_gates(options, report)
    if doubt := distrust(report):
        said.append(f"no time of this run is to be believed: {doubt}")
    if without := unvouched(report):
        said.append(f"this run is {without}")
    sys.stderr.write("".join(f"{line}\n" for line in said))


def _said_of_gates(options: argparse.Namespace, report: Report) -> list[str]:
    measured = report["gates"]
    if not measured:
        return []
    missing = unmeasured(report)
    said = [f"not measured: {name}" for name in missing]
    if options.update_baseline and (wrong := wrong_answers(report)):
        said.append(f"no baseline is written: {len(wrong)} wrong answers, of which nobody knows what they cost")
    elif options.update_baseline:
        known = gates.baseline(measured["key"]) or {}
        figures = {name: known.get(name) if value is None else value for name, value in measured["figures"].items()}
        said.append(f"wrote {gates.save(measured['key'], figures)}")
    elif measured["changes"] is None:
        return [*said, f"incomparable: reports/baselines has no exact figures of {measured['key']} and this model"]
    changes = [one for one in measured["changes"] or () if one["name"] not in missing]
    return said + [f"{one['verdict']}: {one['name']}: {one['base']} -> {one['head']}" for one in changes]
