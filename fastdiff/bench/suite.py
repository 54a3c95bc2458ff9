"""What to measure: a TOML file -> cases. Anything in the file that has no meaning here is refused."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from fastdiff.capture import Mode

Workload = Literal["sequential", "concurrent-equal", "concurrent-mixed"]
ARMS = {
    "pipeline": "one diffusers pipeline call per request",
    "shared-sequential": "one scheduler for all, one request at a time (SGLang's default)",
    "shared-locked": "one scheduler for all, concurrent callers queue for it",
    "shared-racing": "one scheduler for all, no lock: for correctness only, never timed",
    "cloned-deepcopy": "copy.deepcopy per request (SGLang's isolated requests, vLLM-Omni)",
    "cloned-shallow": "copy.copy with its lists copied: the best possible clone",
    "tensorized": "fastdiff: a step table per request, one step for all",
}
MODES: tuple[Mode, ...] = ("eager", "compiled")
GRAPH: Mode = "step-graph"
"""A further mode of tensorized arms, on CUDA."""


@dataclass(frozen=True, kw_only=True)
class ImageCase:
    """Whole requests on the model, text to pixels. `samplers`, `steps` and `guidance` are dealt out in turn."""

    name: str
    workload: Workload
    samplers: tuple[str, ...]
    steps: tuple[int, ...]
    guidance: tuple[float, ...] = (3.0,)
    batch: int = 8
    arms: tuple[str, ...]  # "<arm>/<mode of the model>"
    compare: tuple[tuple[str, str], ...]  # (base, arm)
    max_s: float  # of sampling


@dataclass(frozen=True, kw_only=True)
class RowCase:
    """The sampler alone: rows of `batch` requests with a null model, diffusers step() against the table."""

    name: str
    samplers: tuple[str, ...]
    latent_shape: tuple[int, ...]  # (C, H, W)
    batch: int = 8
    steps: int = 20
    between: bool = False  # each timed row follows a real model call
    max_s: float | None = None  # of sampling; the suite's row_max_s if None
    threads: int = 1  # a small row is too little work to share: two threads would wait for each other
    modes: tuple[Mode, ...] = MODES


@dataclass(frozen=True, kw_only=True)
class SetupCase:
    """What one request costs before its first row, text and noise apart."""

    samplers: tuple[str, ...]
    steps: int = 20


@dataclass(frozen=True, kw_only=True)
class CountCase:
    """Operations and host syncs per row, with a null model."""

    mixes: tuple[tuple[str, ...], ...]
    batches: tuple[int, ...] = (1, 8)
    steps: int = 8  # multistep samplers are at their full order long before
    latent_shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class FateCase:
    """Two requests per sampler, interleaved row by row on the model; `unequal` is the second one's step count."""

    samplers: tuple[str, ...]
    arms: tuple[str, ...]
    steps: int = 4
    unequal: int = 6
    guidance: tuple[float, ...] = (3.0,)


@dataclass(frozen=True, kw_only=True)
class ErrorCase:
    """float32 runs of diffusers and fastdiff against float64, on the same model outputs and noise."""

    samplers: tuple[str, ...]
    latent_shape: tuple[int, ...]
    steps: int = 20
    seeds: int = 4


@dataclass(frozen=True, kw_only=True)
class MemoryCase:
    """Device bytes of one request at a real model's latent shape, with a null model."""

    name: str
    latent_shape: tuple[int, ...]
    samplers: tuple[str, ...]
    steps: int = 6


@dataclass(frozen=True, kw_only=True)
class Step:
    """One line of the attribution table: what changes from `base` to `arm`, two arms of one image or row case."""

    label: str
    case: str
    base: str
    arm: str


@dataclass(frozen=True, kw_only=True)
class Target:
    """A figure to reach: the best of `arms` against `base`. With neither bound it is reported and no more."""

    label: str
    case: str
    base: str
    arms: tuple[str, ...]
    at_least: float | None = None  # on the estimate of the speed-up
    slower_at_most: float | None = None  # on the interval's far end: 0.03 is 3 % slower


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A run: how long to sample, and the cases."""

    threads: int  # torch's intra-op threads
    level: float = 0.99
    half_width: float = 0.01
    max_pairs: int = 40
    row_max_s: float  # of sampling a row or set-up case
    canary_max_s: float = 5.0  # of sampling the canaries
    image: tuple[ImageCase, ...] = ()
    row: tuple[RowCase, ...] = ()
    setup: tuple[SetupCase, ...] = ()
    count: tuple[CountCase, ...] = ()
    fate: tuple[FateCase, ...] = ()
    error: tuple[ErrorCase, ...] = ()
    memory: tuple[MemoryCase, ...] = ()
    attribution: tuple[Step, ...] = ()
    no_gain: tuple[Step, ...] = ()  # where fastdiff is expected not to help
    target: tuple[Target, ...] = ()

    def __post_init__(self) -> None:
        for name in ("threads", "max_pairs"):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"the file: {name}: expected a whole number >= 1, got {count!r}")
        if not (isinstance(self.level, float) and 0 < self.level < 1):
            raise ValueError(f"the file: level: expected a number between 0 and 1, got {self.level!r}")
        for case in self.image:
            _check_arms(case)
        if len({*(case.name for case in self.image), *(case.name for case in self.row)}) != len(self.image) + len(
            self.row
        ):
            raise ValueError("two image or row cases have one name")
        compared = {(case.name, pair) for case in self.image for pair in case.compare}
        compared |= {(case.name, ("diffusers", f"tensorized/{mode}")) for case in self.row for mode in case.modes}
        wanted = [(step.label, step.case, step.base, step.arm) for step in (*self.attribution, *self.no_gain)]
        wanted += [(target.label, target.case, target.base, arm) for target in self.target for arm in target.arms]
        for label, name, base, arm in wanted:
            if (name, (base, arm)) not in compared:
                raise ValueError(f"{label}: no case {name!r} compares {base!r} with {arm!r}")

    def with_graphs(self) -> Suite:
        """The suite with a captured arm beside every compiled one of fastdiff's, for a CUDA device."""
        compiled, graphed = "tensorized/compiled", f"tensorized/{GRAPH}"
        images = tuple(
            replace(case, arms=(*case.arms, graphed), compare=(*case.compare, (compiled, graphed)))
            if compiled in case.arms and graphed not in case.arms
            else case
            for case in self.image
        )
        explained = {step.case for step in self.attribution if step.arm == compiled}
        steps = tuple(
            Step(label="+ graph: the compiled step captured", case=case.name, base=compiled, arm=graphed)
            for case, former in zip(images, self.image, strict=True)
            if case is not former and case.name in explained
        )
        return replace(self, image=images, attribution=(*self.attribution, *steps))

    def override(self, *, batch: int | None, scheduler: str | None, steps: int | None) -> Suite:
        """The suite with every concurrent case's batch, every sampler and step count replaced by those that are given.

        Cases that become the same are run once; what refers to a case that is gone, and targets, which were set for the
        cases as they are listed, go too.
        """
        if batch is None and scheduler is None and steps is None:
            return self
        changes: dict[str, Any] = {}
        for name in _CASES:
            kept: dict[Any, Any] = {}
            for case in getattr(self, name):
                wanted = {
                    "batch": batch if getattr(case, "batch", 1) > 1 else None,
                    "batches": tuple({1: None, batch: None}) if batch else None,
                    "samplers": (scheduler,) if scheduler else None,
                    "mixes": ((scheduler,),) if scheduler else None,
                    "steps": (steps,) if steps and name == "image" else steps,
                    "unequal": steps + 2 if steps else None,  # not as many as the first request's
                }
                changed = replace(case, **{k: v for k, v in wanted.items() if v is not None and hasattr(case, k)})
                nameless = replace(changed, name="") if isinstance(changed, (ImageCase, RowCase)) else changed
                kept.setdefault(nameless, changed)
            changes[name] = tuple(kept.values())
        names = {case.name for case in (*changes["image"], *changes["row"])}
        changes["attribution"] = tuple(step for step in self.attribution if step.case in names)
        changes["no_gain"] = tuple(step for step in self.no_gain if step.case in names and not scheduler)
        return replace(self, **changes, target=())


_CASES: Mapping[str, type[Any]] = {
    "image": ImageCase, "row": RowCase, "setup": SetupCase, "count": CountCase, "fate": FateCase, "error": ErrorCase,
    "memory": MemoryCase,
}  # fmt: skip
_LISTS: Mapping[str, type[Any]] = {**_CASES, "attribution": Step, "no_gain": Step, "target": Target}

T = TypeVar("T")


def load(name: str) -> Suite:
    """The suite of that name or in that file."""
    return parse(tomllib.loads(find(name).read_text(encoding="utf-8")))


def find(name: str) -> Path:
    """The file of a suite, in the wheel's copy of the repository's `bench/` or in the repository; or `name` itself."""
    folders = (Path(__file__).parent / "suites", Path(__file__).parents[2] / "bench")
    for path in (Path(name),) if name.endswith(".toml") else (folder / f"{name}.toml" for folder in folders):
        if path.exists():
            return path
    known = sorted({path.stem for folder in folders for path in folder.glob("*.toml")} - {"gpu"})  # a command's own
    raise FileNotFoundError(f"expected a suite's file or one of {', '.join(known)}, got {name!r}")


def parse(document: Mapping[str, Any]) -> Suite:
    """A suite from a parsed TOML file."""
    lists: dict[str, Any] = {}
    for name, kind in _LISTS.items():
        tables = document.get(name, ())
        if not isinstance(tables, (list, tuple)):
            raise ValueError(f"the file: {name}: expected a list of tables, each under [[{name}]], got {tables!r}")
        lists[name] = tuple(read(kind, f"[[{name}]]", table) for table in tables)
    return read(Suite, "the file", {**document, **lists})


def read(kind: type[T], where: str, table: Mapping[str, Any]) -> T:
    """A dataclass from a table of the file, every list a tuple; `where` is for the error of a key that does not fit."""
    if not isinstance(table, Mapping):
        raise ValueError(f"{where}: expected a table, got {table!r}")
    known = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]  # dataclasses only
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}; expected some of {', '.join(known)}")
    for key, one in known.items():
        if key not in table and one.default is MISSING and one.default_factory is MISSING:
            raise ValueError(f"{where}: missing key {key!r}")
    return kind(**{key: _tuples(value) for key, value in table.items()})


def split(arm: str) -> tuple[str, Mode]:
    """The ownership and the mode of the model that "<ownership>/<mode>" names; diffusers' own step() is eager."""
    name, _, mode = arm.partition("/")
    return name, cast(Mode, mode or "eager")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _check_arms(case: ImageCase) -> None:
    if case.workload not in get_args(Workload):
        raise ValueError(f"{case.name}: expected a workload of {', '.join(get_args(Workload))}, got {case.workload!r}")
    for arm in case.arms:
        name, _, mode = arm.partition("/")
        if name not in ARMS or mode not in MODES + (GRAPH,) * (name == "tensorized"):
            expected = f"'<{'|'.join(ARMS)}>/<{'|'.join(MODES)}>' or 'tensorized/{GRAPH}'"
            raise ValueError(f"{case.name}: expected arms {expected}, got {arm!r}")
        if name == "shared-racing":
            raise ValueError(f"{case.name}: shared-racing is never timed; list it under [[fate]]")
    unknown: Sequence[str] = [arm for pair in case.compare for arm in pair if arm not in case.arms]
    if unknown:
        raise ValueError(f"{case.name}: compares {', '.join(unknown)}, which it does not run")
