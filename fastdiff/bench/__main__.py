"""`python -m fastdiff.bench`: the command line. Each command is a module with `add_arguments` and `main`."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from fastdiff.bench import ab, compare, doctor, export, gpu, memory, profile, run, selftest
from fastdiff.bench.arguments import Parser, refuse
from fastdiff.errors import FastdiffError


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit code: 0; 1 regression or finding, 2 usage, 3 invalid, 4 what could not be measured."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given.insert(0, "run")
    options = _parser().parse_args(given)
    try:
        code: int = options.main(options)
    except FastdiffError as error:
        refuse(f"{type(error).__name__}: {error}")
    except Exception:  # Python's own code for it is 1, which says regression
        traceback.print_exc()
        return 4
    return code


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m fastdiff.bench",
        description="Measures what each way of owning a scheduler costs. Without a command: run, with run's options.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, module, text in (
        ("run", run, "measure a suite; --quick is the smallest"),
        ("compare", compare, "two reports, unpaired: evidence on time, a gate on counts"),
        ("ab", ab, "is one commit slower than another: the gate of a pull request"),
        ("selftest", selftest, "whether times mean anything on this machine"),
        ("doctor", doctor, "what keeps a pipeline's step from being captured"),
        ("memory", memory, "what a runtime takes, phase by phase"),
        ("report", export, "a report as a page, Markdown, JUnit or CSV; a folder's index"),
        ("gpu", gpu, "everything that only a CUDA machine can tell, cell by cell"),
        ("profile", profile, "what a row costs and whether graphs pay"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
