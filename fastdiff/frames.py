"""Whose line is running: the frame of the code that led to here, beneath torch's frames and those of who asks."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType

import torch

_TORCH = f"{Path(torch.__file__).parent}{os.sep}"


def innermost(*skipped: str) -> FrameType | None:
    """The innermost frame outside torch and the `skipped` files, or folders, which end with a separator."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_TORCH, *skipped)):
        frame = frame.f_back
    return frame
