"""`python -m fastdiff.bench`: measure, print the tables, write reports/runs/<time>/report.json and report.md."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastdiff.bench import doctor, profile
from fastdiff.bench.arguments import Parser, device, folder, pipeline, plain_name, positive, refuse, scheduler

SCHEMA = "fastdiff.bench/1"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit code: 0, 2 for arguments that make no sense, others as each command says."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given.insert(0, "run")
    options = _parser().parse_args(given)
    if find_spec("rich") is None:
        refuse("rich is missing: pip install 'fastdiff-runtime[bench]'")
    code: int = options.main(options)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m fastdiff.bench",
        description="Measures what each way of owning a scheduler costs. Without a command: run, with run's options.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, add, call, text in (
        ("run", _add_arguments, _run, "the whole suite, or --quick"),
        ("doctor", doctor.add_arguments, doctor.main, "what keeps a pipeline's step from being captured"),
        ("profile", profile.add_arguments, profile.main, "what a row costs and whether graphs pay"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        add(command)
        command.set_defaults(main=call)
    return parser


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="the model eager throughout, within a minute")
    parser.add_argument("--json", action="store_true", help="print the report's JSON instead of tables")
    parser.add_argument("--model", type=folder, metavar="DIR", help="a saved diffusers pipeline (default: digits)")
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--batch", type=positive, metavar="N", help="requests at once in concurrent cases")
    parser.add_argument("--scheduler", type=scheduler, metavar="NAME", help="this sampler alone, in every case")
    parser.add_argument("--steps", type=positive, metavar="N", help="denoising steps, in every case")
    parser.add_argument("--seed", type=int, default=0, help="of prompts' latents, noise and the order of arms")
    parser.add_argument("--save", type=plain_name, metavar="NAME", help="write reports/NAME/ as well")


def _run(options: argparse.Namespace) -> int:
    """Measure, print and write; 0, or 4 where a case could not be measured."""
    report = _measure(options)
    text = json.dumps(report, indent=1, allow_nan=False)

    from fastdiff.bench.report import markdown, print_tables

    folders = [Path("reports", "runs", time.strftime("%Y%m%d-%H%M%S"))]
    if options.save:
        folders.append(Path("reports", options.save))
    for place in folders:
        place.mkdir(parents=True, exist_ok=True)
        (place / "report.json").write_text(text + "\n", encoding="utf-8")
        (place / "report.md").write_text(markdown(report), encoding="utf-8")
    if options.json:
        sys.stdout.write(text + "\n")
    else:
        print_tables(report)
    sys.stderr.write("".join(f"wrote {place / 'report.md'}\n" for place in folders))
    for failed in report["unsupported"]:
        sys.stderr.write(f"not measured: {failed['what']}: {failed['reason']}\n")
    return 4 if report["unsupported"] else 0


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from fastdiff.bench import machine, run, suite
    from fastdiff.bench.summary import summarize
    from fastdiff.errors import FastdiffError
    from fastdiff.families import family_of

    name = "quick" if options.quick else "run"
    chosen = suite.load(name).override(batch=options.batch, scheduler=options.scheduler, steps=options.steps)
    pipe, model_name = pipeline(options.model, options.device)
    try:
        family_of(pipe)
    except FastdiffError as error:
        refuse(f"--model: {error}")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with warnings.catch_warnings(), Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        warnings.simplefilter("ignore")  # samplers at unusual settings divide by zero, and say so at each step
        task = progress.add_task("starting", total=run.count_pieces(chosen))

        def say(what: str) -> None:
            progress.update(task, description=what, advance=1)

        raw = run.run(pipe, chosen, options.seed, say)
    unet = pipe.unet
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "suite": name,
        "created": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "command": ["python", "-m", "fastdiff.bench", *sys.argv[1:]],
        "model": {
            "name": model_name,
            "parameters": sum(
                weight.numel() for part in (unet, pipe.vae, pipe.text_encoder) for weight in part.parameters()
            ),
            "toy": sum(weight.numel() for weight in unet.parameters()) < 50_000_000,
            "latent_shape": list(raw.pop("latent_shape")),
            "dtype": str(unet.dtype).removeprefix("torch."),
        },
        "settings": {
            "device": str(unet.device),
            "seed": options.seed,
            "threads": torch.get_num_threads(),
            "level": chosen.level,
            "half_width": chosen.half_width,
        },
        "machine": machine.fingerprint(unet.device),
        **raw,
    }
    return {**report, "summary": summarize(report)}


if __name__ == "__main__":
    raise SystemExit(main())
