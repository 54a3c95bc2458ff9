"""journal.jsonl: a line per finished piece, on the disk before the next one starts, for a killed run to go on from.

A kill may tear the last line: whoever reads drops it, whoever writes next writes over it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import fastdiff

RUNS = Path("reports", "runs")
NAME = "journal.jsonl"
REPORT = "report.json"  # only a run that has finished has one
SAME = ("suite", "only", "seed", "model", "machine", "commit")
"""What a run and its continuation have in common, besides which the first line holds when and how the run started."""


class CannotResume(ValueError):
    """A journal that is not this run's; one line says why."""


class Journal:
    """The pieces that a run has finished, in memory and on the disk, where the first line says what the run is."""

    def __init__(self, folder: Path, header: Mapping[str, Any], finished: Sequence[dict[str, Any]]) -> None:
        self.folder, self.header, self.finished = folder, header, list(finished)

    @classmethod
    def start(cls, folder: Path, header: Mapping[str, Any]) -> Journal:
        """A new one; FileExistsError where the folder has one."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NAME).touch(exist_ok=False)
        append_line(folder / NAME, header)
        return cls(folder, header, [])

    @classmethod
    def resume(cls, folder: Path, header: Mapping[str, Any]) -> Journal:
        """The one in `folder`, cut to its whole lines. CannotResume if it is of another run than `header` describes."""
        path = folder / NAME
        if not path.is_file():
            raise CannotResume(f"{folder}: expected a run's folder with a {NAME}")
        try:
            known, *finished = read_lines(path)
            differing = [name for name in SAME if known[name] != header[name]]
        except (ValueError, KeyError, TypeError):
            raise CannotResume(f"{path}: expected a run's journal, got something else; start a new run") from None
        for name in differing:
            raise CannotResume(
                f"{folder}: its {name} is {known[name]!r}, this run's is {header[name]!r}; start a new run"
            )
        return cls(folder, known, finished)

    def add(self, piece: dict[str, Any]) -> None:
        """Append a finished piece, and wait until the disk has it."""
        append_line(self.folder / NAME, piece)
        self.finished.append(piece)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a journal, whichever process wrote it; none where there is no file."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [json.loads(line) for line in _whole_lines(file).splitlines()]


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line, and wait until the disk has it. ValueError for what JSON cannot hold."""
    text = json.dumps(line, allow_nan=False) + "\n"
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed: what looks torn may be another process's, half written
        file.truncate(len(_whole_lines(file)))
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def _whole_lines(file: BinaryIO) -> bytes:
    file.seek(0)
    written = file.read()
    return written[: written.rfind(b"\n") + 1]


def unfinished() -> Path:
    """The folder of the newest run that was started here and has no report. CannotResume where there is none."""
    started = (path.parent for path in RUNS.glob(f"*/{NAME}"))
    # Other commands keep journals beside those of runs, which alone are named by their time.
    folders = [one for one in started if re.fullmatch(r"\d{8}-\d{6}", one.name) and not (one / REPORT).exists()]
    if not folders:
        raise CannotResume(f"{RUNS}: no run has been started here that has not finished; start a new run")
    return max(folders)


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def stamp() -> dict[str, Any]:
    """When a command was given, and what it was: of every report that one writes."""
    return {
        "created": now(),
        "command": ["python", "-m", "fastdiff.bench", *sys.argv[1:]],
    }


def commit() -> dict[str, Any]:
    """The commit that fastdiff runs from, as pytest-benchmark describes one; an installed wheel has none."""
    root = Path(fastdiff.__file__).parents[1]
    unversioned = {
        "id": "unversioned", "time": None, "author_time": None, "dirty": False, "project": "fastdiff", "branch": None,
    }  # fmt: skip
    if not (root / ".git").exists():
        return unversioned
    with suppress(OSError, subprocess.CalledProcessError):
        described = _git(root, "show", "-s", "--format=%H %cI %aI", "HEAD").split()
        return {
            "id": described[0],
            "time": described[1],
            "author_time": described[2],
            "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
            "project": "fastdiff",
            "branch": _git(root, "rev-parse", "--abbrev-ref", "HEAD"),
        }
    return unversioned


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()
