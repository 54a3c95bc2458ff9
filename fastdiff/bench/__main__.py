"""`python -m fastdiff.bench`: measure, print the tables, write reports/runs/<time>/report.json and report.md."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

SCHEMA = "fastdiff.bench/1"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit code: 0, 2 for arguments that make no sense, 4 where a case could not be measured."""
    options = _parser().parse_args(arguments)
    if find_spec("rich") is None:
        _refuse("rich is missing: pip install 'fastdiff-runtime[bench]'")
    report = _measure(options)
    text = json.dumps(report, indent=1, allow_nan=False)

    from fastdiff.bench.report import markdown, print_tables

    folders = [Path("reports", "runs", time.strftime("%Y%m%d-%H%M%S"))]
    if options.save:
        folders.append(Path("reports", options.save))
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
        (folder / "report.md").write_text(markdown(report), encoding="utf-8")
    if options.json:
        sys.stdout.write(text + "\n")
    else:
        print_tables(report)
    sys.stderr.write("".join(f"wrote {folder / 'report.md'}\n" for folder in folders))
    for failed in report["unsupported"]:
        sys.stderr.write(f"not measured: {failed['what']}: {failed['reason']}\n")
    return 4 if report["unsupported"] else 0


class _Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        _refuse(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m fastdiff.bench",
        description="Measures what each way of owning a scheduler costs. Without arguments: the whole suite.",
    )
    parser.add_argument("command", nargs="?", choices=["run"], default="run", help="what to do (default: run)")
    parser.add_argument("--quick", action="store_true", help="the model eager throughout, within a minute")
    parser.add_argument("--json", action="store_true", help="print the report's JSON instead of tables")
    parser.add_argument(
        "--model", type=_folder, metavar="DIR", help="a saved StableDiffusionPipeline (default: digits)"
    )
    parser.add_argument("--device", type=_device, default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--batch", type=_positive, metavar="N", help="requests at once in concurrent cases")
    parser.add_argument("--scheduler", type=_scheduler, metavar="NAME", help="this sampler alone, in every case")
    parser.add_argument("--steps", type=_positive, metavar="N", help="denoising steps, in every case")
    parser.add_argument("--seed", type=int, default=0, help="of prompts' latents, noise and the order of arms")
    parser.add_argument("--save", type=_name, metavar="NAME", help="write reports/NAME/ as well")
    return parser


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from fastdiff.bench import machine, run, suite
    from fastdiff.bench.summary import summarize

    name = "quick" if options.quick else "run"
    chosen = suite.load(name).override(batch=options.batch, scheduler=options.scheduler, steps=options.steps)
    pipe, model_name = _pipeline(options)
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


def _pipeline(options: argparse.Namespace) -> tuple[Any, str]:
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):  # the command's own progress bar is enough
        logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if options.model is None:
        from fastdiff.models import digits

        pipe, name = digits(), "fastdiff.models.digits"
    else:
        from diffusers import StableDiffusionPipeline

        try:
            pipe = StableDiffusionPipeline.from_pretrained(
                options.model, local_files_only=True, low_cpu_mem_usage=False
            )
        except Exception as error:  # a folder can be wrong in as many ways as diffusers has exceptions
            _refuse(f"--model: {options.model} is not a saved StableDiffusionPipeline: {str(error).splitlines()[0]}")
        name = options.model.name
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(options.device), name


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _folder(text: str) -> Path:
    path = Path(text)
    if not (path / "model_index.json").is_file():
        raise argparse.ArgumentTypeError(f"expected a folder with a model_index.json, got {text!r}")
    return path


def _device(text: str) -> str:
    import torch

    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    if text != "cpu" and int(text.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"torch finds no such CUDA device as {text!r}")
    return text


def _scheduler(text: str) -> str:
    from fastdiff.errors import NotLinear
    from fastdiff.stages import scheduler_class

    try:
        scheduler_class(text)
    except (NotLinear, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text) or text == "runs":
        raise argparse.ArgumentTypeError(f"expected a plain folder name other than 'runs', got {text!r}")
    return text


def _refuse(message: str) -> NoReturn:
    sys.stderr.write(f"python -m fastdiff.bench: error: {message}\n")
    raise SystemExit(2)


if __name__ == "__main__":
    raise SystemExit(main())
