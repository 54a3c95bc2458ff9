"""The frame that a message names: the host's, whatever its file is called."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import fastdiff
from fastdiff.frames import innermost
from fastdiff.intercept import where

PACKAGE = Path(fastdiff.__file__).parent
TORCH = Path(torch.__file__).parent


def asked_from(file: Path) -> str:
    """What `where` tells a function of this file."""
    told = {"where": where}
    exec(compile("def ask():\n    return where()\n", str(file), "exec"), told)
    return told["ask"]()


@pytest.mark.parametrize("package", [PACKAGE, TORCH])
def test_a_package_beside_ours_or_torchs_whose_name_begins_alike_is_the_hosts(package: Path) -> None:
    assert asked_from(package.with_name(f"{package.name}_x") / "host.py") == " (ask, host.py:2)"


@pytest.mark.parametrize("package", [PACKAGE, TORCH])
def test_frames_of_ours_and_of_torch_are_passed_over(package: Path) -> None:
    assert asked_from(package / "inside.py").startswith(" (asked_from, test_frames.py:")


def test_there_may_be_no_frame() -> None:
    assert innermost(os.sep, "<") is None  # every file, and what has none
