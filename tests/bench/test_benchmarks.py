"""The pytest-benchmark files of bench/ run. They are timed by `pytest bench/ --benchmark-only`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_runs_once() -> None:
    """Untimed; the one that compiles is left out."""
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-disable", "-m", "not compiles", "-rA"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for function in ("tabulate_cold", "tabulate_cached", "acquire", "load", "denoise_step[eager]"):
        assert f"::test_{function}" in done.stdout
