"""Tables and sentences as they are printed: every name as it stands, no markup and no terminal's command in it."""

from __future__ import annotations

import pytest

from fastdiff.bench.terminal import PIPE_COLUMNS, say, show


def test_a_table_has_words_to_the_left_and_figures_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    show("title", ("what", "where", "count"), [("a", "b", "1"), ("longer", "c", "1,000")], words=(0, 1), note="note")
    printed = capsys.readouterr().out
    lines = [line.split("│")[1:-1] for line in printed.splitlines() if "│" in line]
    assert lines == [[" a      ", " b     ", "     1 "], [" longer ", " c     ", " 1,000 "]]
    assert [word in printed for word in ("title", "what", "note")] == [True] * 3


def test_what_is_said_is_text_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "[red]**a**[/red] :smile: \x1b[31m b\nc"
    say(hostile)
    assert capsys.readouterr().out == "[red]a[/red] :smile:  [31m b c\n"
    show(hostile, (hostile,), [(hostile,)], note=hostile)
    assert capsys.readouterr().out.count("[red]a[/red] :smile:  [31m b c") == 4


def test_a_pipe_is_as_wide_as_our_tables_need(capsys: pytest.CaptureFixture[str]) -> None:
    say("x" * (PIPE_COLUMNS + 1))
    assert [len(line) for line in capsys.readouterr().out.splitlines()] == [PIPE_COLUMNS, 1]
