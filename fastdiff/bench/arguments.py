"""What the commands of `python -m fastdiff.bench` share: argument types, one-line errors, the pipeline asked for."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        refuse(message)


def refuse(message: str) -> NoReturn:
    """One line on standard error, exit code 2."""
    sys.stderr.write(f"python -m fastdiff.bench: error: {message}\n")
    raise SystemExit(2)


def folder(text: str) -> Path:
    """A saved diffusers pipeline."""
    path = Path(text)
    if not (path / "model_index.json").is_file():
        raise argparse.ArgumentTypeError(f"expected a folder with a model_index.json, got {text!r}")
    return path


def device(text: str) -> str:
    """A device that torch finds."""
    import torch

    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    if text != "cpu" and int(text.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"torch finds no such CUDA device as {text!r}")
    return text


def scheduler(text: str) -> str:
    """The name of a diffusers class that has a table."""
    from fastdiff.errors import NotLinear
    from fastdiff.stages import scheduler_class

    try:
        scheduler_class(text)
    except (NotLinear, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def shared(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add arguments that several commands have alike."""
    for name in names:
        parser.add_argument(name, **_SHARED[name])


def positive(text: str) -> int:
    """An integer of at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text!r}")
    return int(text)


def plain_name(text: str) -> str:
    """A folder under reports/ that no other command writes."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text) or text == "runs":
        raise argparse.ArgumentTypeError(f"expected a plain folder name other than 'runs', got {text!r}")
    return text


def saved(text: str) -> Path | None:
    """A saved pipeline's folder; None for the shipped one."""
    return None if text == "digits" else folder(text)


_SHARED: dict[str, dict[str, Any]] = {
    "model": {
        "nargs": "?", "type": saved, "metavar": "MODEL", "help": "a saved diffusers pipeline, or digits (the default)",
    },
    "--device": {"type": device, "default": "cpu", "help": "cpu, cuda or cuda:N (default: cpu)"},
    "--json": {"action": "store_true", "help": "print JSON instead of a table"},
}  # fmt: skip


def model_name(model: Path | None) -> str:
    """What reports call the pipeline of `pipeline(model, ...)`."""
    return "fastdiff.models.digits" if model is None else model.name


def pipeline(model: Path | None, device: str) -> tuple[Any, str]:
    """The pipeline saved in a folder (digits if None) on a device, its progress bars off; and its name."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):  # the command's own progress bar is enough
        logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if model is None:
        from fastdiff.models import digits

        pipe = digits()
    else:
        from diffusers import DiffusionPipeline

        try:
            pipe = DiffusionPipeline.from_pretrained(model, local_files_only=True, low_cpu_mem_usage=False)
        except Exception as error:  # a folder can be wrong in as many ways as diffusers has exceptions
            refuse(f"{model} is not a saved diffusers pipeline: {str(error).splitlines()[0]}")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device), model_name(model)
