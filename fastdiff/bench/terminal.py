"""What a command prints: tables and sentences, on a terminal or into a pipe. By rich, which is of the bench extra."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from fastdiff.bench.arguments import refuse

if TYPE_CHECKING:
    from rich.console import Console

PIPE_COLUMNS = 160  # where there is no terminal to ask


def require_rich() -> None:
    """One line and exit code 2 where rich is missing: for a command to call before it measures."""
    if find_spec("rich") is None:
        refuse("rich is missing: pip install 'fastdiff-runtime[bench]'")


def show(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    words: Collection[int] = (0,),
    note: str = "",
) -> None:
    """A table; the columns `words` hold words, all others figures, which stand to the right."""
    from rich.table import Table
    from rich.text import Text

    caption = Text(_plain(note)) if note else None
    table = Table(title=Text(_plain(title)), title_justify="left", caption=caption, caption_justify="left")
    for number, heading in enumerate(header):
        table.add_column(Text(_plain(heading)), justify="left" if number in words else "right", overflow="fold")
    for cells in rows:
        table.add_row(*(Text(_plain(cell)) for cell in cells))
    _console().print(table)


def say(sentence: str = "", style: str = "") -> None:
    """One line, none of whose characters is markup."""
    from rich.text import Text

    _console().print(Text(_plain(sentence), style=style))


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS)


def _plain(text: str) -> str:
    """Without emphasis, and without the characters that a terminal obeys."""
    return "".join(one if one.isprintable() else " " for one in text.replace("**", ""))
