"""What a runtime makes room for: shapes, dtype, batch sizes and capacities, all fixed before the first request."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Self, get_args

import torch

from fastdiff.errors import PlanMismatch
from fastdiff.table import RowLayout, StepTable

Compile = Literal["none", "default", "max-autotune-no-cudagraphs"]


class TensorSpec(NamedTuple):
    """Shape and dtype of one slot's part of a static tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class CapturePlan:
    """The capacities of a runtime. `replace` from dataclasses varies it; a request that does not fit is refused."""

    latent_shape: tuple[int, ...]  # (C, H, W) of one request
    dtype: torch.dtype  # of model inputs and returned latents
    conditioning: Mapping[str, TensorSpec] = field(default_factory=dict, hash=False)  # one slot's, by name
    batch_sizes: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    memory: int = 4  # K: DPM++ 2M 2, Heun 3, UniPC 4, UniPC of order 3 5, PNDM with Runge-Kutta steps 6
    rows: int = 128  # R
    draws: int = 1  # Z: noise draws per row
    ring_bytes: int = 32 * 2**20  # a slot's noise is drawn ahead for a whole run up to this size, else call by call
    compile: Compile = "default"  # how compiled and captured steps are compiled
    regional: bool = False  # compile the model's repeated blocks and the rest of the step apart, not all as one
    segments: int = 1  # 2 where the early rows and the late ones have a model each, as Wan 2.2's have
    unroll: int = 1  # rows in one graph of mode loop-graph, which needs two or more
    graph_bytes: int | None = None  # device bytes for captured graphs; sizes that do not fit are not captured

    def __post_init__(self) -> None:
        for name, least in (("memory", 1), ("rows", 1), ("unroll", 1), ("draws", 0), ("ring_bytes", 0)):
            if not _at_least(least, getattr(self, name)):
                raise ValueError(f"CapturePlan.{name}: expected an integer >= {least}, got {getattr(self, name)!r}")
        if self.graph_bytes is not None and not _at_least(0, self.graph_bytes):
            raise ValueError(f"CapturePlan.graph_bytes: expected an integer >= 0 or None, got {self.graph_bytes!r}")
        if self.segments not in (1, 2):
            raise ValueError(f"CapturePlan.segments: expected 1 or 2, got {self.segments!r}")
        if not isinstance(self.regional, bool):
            raise ValueError(f"CapturePlan.regional: expected True or False, got {self.regional!r}")
        for name in ("latent_shape", "batch_sizes"):
            sizes = _sizes(name, getattr(self, name))
            if not sizes:
                raise ValueError(f"CapturePlan.{name}: expected at least one size, got none")
            object.__setattr__(self, name, sizes)
        if list(self.batch_sizes) != sorted(set(self.batch_sizes)):
            raise ValueError(f"CapturePlan.batch_sizes: expected rising sizes >= 1, got {self.batch_sizes}")
        if not isinstance(self.dtype, torch.dtype):
            raise ValueError(f"CapturePlan.dtype: expected a dtype such as torch.bfloat16, got {self.dtype!r}")
        if not isinstance(self.conditioning, Mapping):
            raise ValueError(f"CapturePlan.conditioning: expected TensorSpecs by name, got {self.conditioning!r}")
        if self.compile not in get_args(Compile):
            raise ValueError(
                f"CapturePlan.compile: expected one of {', '.join(get_args(Compile))}, got {self.compile!r}"
            )
        specs = {name: _spec(f"conditioning.{name}", spec) for name, spec in self.conditioning.items()}
        object.__setattr__(self, "conditioning", MappingProxyType(specs))

    def __reduce__(self) -> tuple[Any, ...]:
        """For `pickle` and `copy.deepcopy`, which take no mapping proxy."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return partial(type(self), **values | {"conditioning": dict(self.conditioning)}), ()

    @classmethod
    def load(cls, name_or_path: str | Path) -> Self:
        """The plan of a TOML file, or one that ships by its name ("sd15-512"): see graphs/."""
        path = shipped().get(str(name_or_path), Path(name_or_path))
        if not path.is_file():
            raise FileNotFoundError(
                f"plan: expected a TOML file or one of {', '.join(shipped())}, got {str(name_or_path)!r}"
            )
        try:
            return cls.parse(tomllib.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:  # which those of TOML and of UTF-8 are too
            raise ValueError(f"{path}: expected a plan in TOML: {error}") from error

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> Self:
        """A plan from a parsed TOML document; an unknown key or dtype is a ValueError that names it."""
        known = {one.name for one in fields(cls)}
        for key in document:
            if key not in known:
                raise ValueError(f"plan: unknown key {key!r}; expected some of {', '.join(sorted(known))}")
        for key in ("latent_shape", "dtype"):
            if key not in document:
                raise ValueError(f"plan: missing key {key!r}")
        dtype = _dtype("dtype", document["dtype"])
        specs = document.get("conditioning", {})
        if not isinstance(specs, dict):
            raise ValueError(f"plan: conditioning: expected a table, got {specs!r}")
        conditioning = {name: _parsed_spec(f"conditioning.{name}", spec, dtype) for name, spec in specs.items()}
        return cls(**{**document, "dtype": dtype, "conditioning": conditioning})

    @property
    def max_batch(self) -> int:
        """Slots."""
        return self.batch_sizes[-1]

    @property
    def layout(self) -> RowLayout:
        """How a slot's rows are packed."""
        return RowLayout(self.memory, self.draws)

    @property
    def latent_numel(self) -> int:
        """Elements of one latent."""
        return math.prod(self.latent_shape)

    @property
    def ring_depth(self) -> int:
        """Rows of noise that a slot holds: a whole run where that is small, else those of one call."""
        whole_run_bytes = self.rows * self.draws * self.latent_numel * 4
        return self.rows if whole_run_bytes <= self.ring_bytes else min(self.unroll, self.rows)

    @property
    def conditioning_bytes(self) -> int:
        """Device bytes of all slots' conditioning."""
        return self.max_batch * sum(spec.nbytes for spec in self.conditioning.values())

    @property
    def state_bytes(self) -> int:
        """Device bytes of all slots: rows, latents, noise and conditioning. Known before anything is allocated."""
        floats = (self.rows + 1) * self.layout.width
        floats += (self.memory + self.ring_depth * self.draws) * self.latent_numel
        return self.max_batch * (4 * floats + (2 + self.segments) * 8) + self.conditioning_bytes

    def check(self, table: StepTable) -> None:
        """Raise PlanMismatch unless `table` fits, naming the capacity to raise."""
        for name, needed in (("rows", len(table)), ("memory", table.memory), ("draws", table.max_draws)):
            if needed > getattr(self, name):
                raise PlanMismatch(
                    f"{table.source} needs {name} = {needed}, the plan has {getattr(self, name)}; "
                    f"build the runtime with {name}={needed} or more"
                )

    def check_conditioning(self, conditioning: Mapping[str, torch.Tensor]) -> None:
        """Raise PlanMismatch unless one slot's tensors have the plan's names, shapes (text length) and dtypes."""
        found = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in conditioning.items()}
        for name in sorted(self.conditioning.keys() | found.keys()):
            expected, got = self.conditioning.get(name), found.get(name)
            if expected != got:
                raise PlanMismatch(
                    f"conditioning {name}: expected {_spell(expected)}, got {_spell(got)}; "
                    f"pad or cut it, or build the runtime with a plan whose conditioning.{name} is that"
                )


def shipped() -> dict[str, Path]:
    """The plans of graphs/ by name, from the wheel's copy of that folder or from the repository itself."""
    places = (Path(__file__).parents[1] / "graphs", Path(__file__).parent / "graphs")  # of two, the later counts
    return {file.stem: file for place in places for file in sorted(place.glob("*.toml"))}


def _at_least(least: int, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _sizes(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or not all(_at_least(1, size) for size in value):
        raise ValueError(f"CapturePlan.{name}: expected a tuple or list of sizes >= 1, got {value!r}")
    return tuple(value)


def _spec(name: str, spec: Any) -> TensorSpec:
    if not isinstance(spec, TensorSpec) or not isinstance(spec.dtype, torch.dtype):
        raise ValueError(f"CapturePlan.{name}: expected a fastdiff.plan.TensorSpec(shape, torch.dtype), got {spec!r}")
    return spec._replace(shape=_sizes(f"{name}.shape", spec.shape))


def _dtype(key: str, name: Any) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"plan: {key}: expected a dtype such as 'bfloat16', got {name!r}")
    return dtype


def _parsed_spec(key: str, spec: Any, dtype: torch.dtype) -> TensorSpec:
    if not isinstance(spec, dict) or "shape" not in spec or spec.keys() - {"shape", "dtype"}:
        raise ValueError(f"plan: {key}: expected a shape and perhaps a dtype, got {spec!r}")
    own = _dtype(f"{key}.dtype", spec["dtype"]) if "dtype" in spec else dtype
    return TensorSpec(spec["shape"], own)


def _spell(spec: TensorSpec | None) -> str:
    return "none" if spec is None else f"{spec.shape} {str(spec.dtype).removeprefix('torch.')}"
