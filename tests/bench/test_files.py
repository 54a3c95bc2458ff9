"""A file is whole or as it was before, and nothing is left beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdiff.bench import files


def test_a_file_is_replaced_and_its_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.json"
    for text in ("one", "two é"):
        files.write(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    files.write(path, "before")
    with pytest.raises(UnicodeEncodeError):
        files.write(path, "cut off \ud800")  # no text that UTF-8 has
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
