"""The rules of the layout: what may import what, what importing costs, what the wheel is made of."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastdiff

PACKAGE = Path(fastdiff.__file__).parent
ORDER = [
    "errors", "frames", "table", "fingerprint", "intercept", "stepper", "probe", "renoising", "rehearsal", "position",
    "scheduler", "request", "plan", "denoiser", "families", "noise", "state", "ownership", "slots", "step", "isolation",
    "weights", "capture", "emulated", "audit", "profile", "stages", "session", "runtime", "forward", "acceleration",
    "models", "bench",
]  # fmt: skip


def imported(path: Path) -> Iterator[str]:
    """First-level fastdiff modules that a file imports, at any depth of nesting."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("fastdiff.") and name.split(".")[1] != "__init__":
                yield name.split(".")[1]


def modules() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            found.setdefault(parts[0], []).append(path)
    return found


def test_every_module_has_its_place() -> None:
    assert set(modules()) <= set(ORDER)


def test_a_module_imports_only_from_modules_above_it() -> None:
    for module, paths in modules().items():
        for path in paths:
            for other in imported(path):
                if other == module:
                    continue
                assert ORDER.index(other) < ORDER.index(module), f"{path.name} imports {other}, which is below it"


def test_only_capture_names_compile_and_graphs() -> None:
    for module, paths in modules().items():
        if module in ("capture", "bench"):
            continue
        for path in paths:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.compile", "torch.cuda.CUDAGraph"):
                    raise AssertionError(f"{path.name} names {ast.unparse(node)}")


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_fastdiff_imports_no_diffusers_and_sets_nothing() -> None:
    printed = run_python(
        "import sys, signal, logging, threading, torch\n"
        "def world(): return (torch.get_rng_state().sum().item(), torch.get_default_dtype(), torch.get_num_threads(),\n"
        "    logging.root.level, len(logging.root.handlers), signal.getsignal(signal.SIGINT), signal.getsignal(15),\n"
        "    torch.is_grad_enabled(), threading.active_count())\n"
        "before = world()\n"
        "import fastdiff\n"
        "fastdiff.Runtime, fastdiff.tabulate, fastdiff.acquire, fastdiff.models\n"
        "print(world() == before, torch.cuda.is_initialized(),\n"
        "      sorted(name for name in ('diffusers', 'pandas', 'rich', 'scipy') if name in sys.modules))\n"
    )
    assert printed == "True False []"


def test_every_public_name_is_there_and_an_unknown_one_is_not() -> None:
    for name in fastdiff.__all__:
        assert getattr(fastdiff, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fastdiff.nothing  # noqa: B018
