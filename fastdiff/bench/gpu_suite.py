"""What `bench gpu` measures: bench/gpu.toml -> cells. Anything in the file that has no meaning here is refused."""

from __future__ import annotations

import math
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastdiff.bench.suite import MemoryCase, find, read
from fastdiff.models.geometries import GEOMETRIES
from fastdiff.plan import Compile

TIERS = "ABC"  # best first
TENSORIZED = ("tensorized/eager", "tensorized/compiled", "tensorized/step-graph", "tensorized/loop-graph")
NULL_ARMS = ("shared", "cloned-deepcopy", "cloned-shallow", *TENSORIZED)
TREES: Mapping[Compile, str] = {"default": "reduce-overhead", "max-autotune-no-cudagraphs": "max-autotune"}
"""torch.compile's mode that captures graphs by itself, beside each of ours that does not."""
ARMS = (*(f"cloned-deepcopy/{how}" for how in ("eager", "compiled", *TREES.values())), *TENSORIZED, "model/graph")
NEEDS: Mapping[str, frozenset[str]] = {
    "tests": frozenset(),
    "ceilings": frozenset(),
    "null model": frozenset({"batch"}),
    "rows": frozenset({"geometry", "batch"}),
    "graphs": frozenset({"geometry"}),
    "ownership": frozenset(),
    "start": frozenset({"geometry"}),
    "selftest": frozenset(),
}
"""What a cell can measure, and the keys that it then has, `max_s` beside them."""
MAY: Mapping[str, frozenset[str]] = {"rows": frozenset({"sampler", "compile", "steps"})}


@dataclass(frozen=True, kw_only=True)
class CellCase:
    """What is measured together, and done or not done as a whole."""

    tier: str
    name: str
    measure: str
    geometry: str | None = None
    batch: int | None = None
    sampler: str | None = None  # of the requests; DPM++ 2M if None
    compile: Compile | None = None  # how the step and the model are compiled; "default" if None
    steps: int | None = None  # of the requests; [rows]' own if None
    max_s: float | None = None  # its process is killed then; None: the run's budget alone

    def __post_init__(self) -> None:
        for what, known in (("tier", tuple(TIERS)), ("measure", tuple(NEEDS))):
            if getattr(self, what) not in known:
                raise ValueError(f"{self.name}: expected a {what} of {', '.join(known)}, got {getattr(self, what)!r}")
        given = {
            name for name in ("geometry", "batch", "sampler", "compile", "steps") if getattr(self, name) is not None
        }
        needed = NEEDS[self.measure]
        if not needed <= given <= needed | MAY.get(self.measure, frozenset()):
            raise ValueError(
                f"{self.name}: expected the keys {', '.join(sorted(needed)) or 'of every cell'} for {self.measure!r}, "
                f"got {', '.join(sorted(given)) or 'none'}"
            )
        if self.geometry is not None and self.geometry not in GEOMETRIES:
            raise ValueError(f"{self.name}: expected a geometry of {', '.join(GEOMETRIES)}, got {self.geometry!r}")
        if self.compile is not None and self.compile not in TREES:
            raise ValueError(f"{self.name}: expected to compile {' or '.join(TREES)}, got {self.compile!r}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"{self.name}: expected steps >= 1, got {self.steps!r}")
        if self.max_s is not None and not 0 < self.max_s < math.inf:
            raise ValueError(f"{self.name}: expected max_s > 0, got {self.max_s!r}")


@dataclass(frozen=True, kw_only=True)
class NullModel:
    """Rows of the sampler alone."""

    latent_shape: tuple[int, ...]
    samplers: tuple[str, ...]
    steps: int
    tolerance: float
    arms: tuple[str, ...]

    def __post_init__(self) -> None:
        _check("null_model", self.arms, NULL_ARMS)


@dataclass(frozen=True, kw_only=True)
class GeometryRows:
    """Rows of a geometry."""

    steps: int
    guidance: float
    error_ratio: float
    arms: tuple[str, ...]
    compare: tuple[tuple[str, str], ...]  # (base, arm)

    def __post_init__(self) -> None:
        _check("rows", self.arms, ARMS)
        _check("rows: compare", [arm for pair in self.compare for arm in pair], self.arms)


@dataclass(frozen=True, kw_only=True)
class GpuSuite:
    """Everything that `bench gpu` can measure."""

    budget_s: float
    unroll: int
    level: float
    half_width: float
    max_pairs: int
    max_s: float
    null_model: NullModel
    rows: GeometryRows
    ownership: tuple[MemoryCase, ...]
    cell: tuple[CellCase, ...]

    def __post_init__(self) -> None:
        twice = [name for name, count in Counter(cell.name for cell in self.cell).items() if count > 1]
        if twice:
            raise ValueError(f"two cells have the name {twice[0]!r}")

    def tiny(self) -> GpuSuite:
        """Toy geometries, few rows and samples: whether everything runs, not how fast."""
        cells = (replace(cell, geometry=cell.geometry and f"tiny-{cell.geometry}") for cell in self.cell)
        null_model = replace(self.null_model, latent_shape=(4, 8, 8), steps=self.unroll)
        return replace(
            self, level=0.5, half_width=1.0, max_pairs=2, max_s=0.0, null_model=null_model, cell=tuple(cells)
        )  # fmt: skip


def load() -> GpuSuite:
    """bench/gpu.toml."""
    return parse(tomllib.loads(find("gpu").read_text(encoding="utf-8")))


def parse(document: Mapping[str, Any]) -> GpuSuite:
    """The suite from a parsed TOML file."""
    made = dict(document)
    for name, table in (("null_model", NullModel), ("rows", GeometryRows)):
        if name in made:
            made[name] = read(table, f"[{name}]", made[name])
    for name, case in (("ownership", MemoryCase), ("cell", CellCase)):
        made[name] = tuple(read(case, f"[[{name}]]", one) for one in made.get(name, ()))
    return read(GpuSuite, "the file", made)


def _check(where: str, arms: Any, known: tuple[str, ...]) -> None:
    for arm in arms:
        if arm not in known:
            raise ValueError(f"{where}: expected arms of {', '.join(known)}, got {arm!r}")
