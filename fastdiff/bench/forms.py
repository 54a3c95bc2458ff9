"""What JSON must have for every page to be made of it, as types that pydantic checks it against: only what is read."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on

from fastdiff.bench.verdict import Verdict

Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Times = Annotated[list[Positive], Field(min_length=1)]
Counts = Annotated[list[int], Field(min_length=1)]
Samplers = Annotated[list[str], Field(min_length=1)]
Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


class Unjudged(TypedDict):
    verdict: Literal["INVALID"]
    change: None
    pairs: int
    reason: str


class Judged(TypedDict):
    verdict: Verdict
    change: Number
    low: Number
    high: Number
    pairs: int
    reason: str


Judgement = Judged | Unjudged  # the likelier first: what misfits is said of it


class Change(TypedDict):
    name: str
    base: int | None
    head: int | None
    verdict: str


class Gpu(TypedDict):
    name: str
    driver: str | None


class Packages(TypedDict):
    torch: str | None
    diffusers: str | None


class Machine(TypedDict):
    id: str
    system: str
    architecture: str
    cpu: str
    cpus_usable: int
    python: str
    threads: int
    packages: Packages
    gpu: Gpu | None


class Model(TypedDict):
    name: str
    parameters: int
    toy: bool
    latent_shape: list[int]
    dtype: str


class Settings(TypedDict):
    device: str
    seed: int
    threads: int
    level: Positive
    half_width: Number


class Canaries(TypedDict):
    a_a: NotRequired[Judgement]
    slower_10_percent: NotRequired[Judgement]
    doubt: NotRequired[str]
    total_s: NotRequired[dict[str, list[Positive]]]


class Gates(TypedDict):
    key: str
    figures: dict[str, int | None]
    changes: list[Change] | None
    accepted: NotRequired[bool]


class Setup(TypedDict):
    sampler: str
    steps: int
    call_s: dict[str, Times]


class Counted(TypedDict):
    operations: Counts
    syncs: Counts


class Count(TypedDict):
    samplers: Samplers
    batch: int
    diffusers: Counted
    fastdiff: Counted


class Fate(TypedDict):
    fate: str
    error: str | None


class Fates(TypedDict):
    sampler: str
    workload: Literal["concurrent-equal", "concurrent-mixed"]
    arm: str
    fates: list[Fate]


class Error(TypedDict):
    sampler: str
    steps: int
    diffusers: Number | None
    fastdiff: Number | None


class MemoryEntry(TypedDict):
    sampler: str
    ownership: str
    latent_bytes: int
    before_bytes: int
    during_bytes: int
    after_bytes: int
    row_peak_bytes: int


class Memory(TypedDict):
    name: str
    latent_shape: list[int]
    entries: list[MemoryEntry]


class Clocks(TypedDict):
    sm_mhz: int | None
    temperature_c: int | None
    throttles: list[str] | None
    foreign_processes: int | None


class Timed(TypedDict):
    total_s: list[Positive]
    loop_s: list[Positive]
    gpu: NotRequired[list[Clocks | None]]
    vram_peak_bytes: NotRequired[int | None]


class Right(Timed):
    status: Literal["ok"]
    reason: None
    error: Number


class Wrong(Timed):
    status: Literal["INVALID"]
    reason: str
    error: Number | None


Arm = Annotated[Right | Wrong, Field(discriminator="status")]


class Ratio(TypedDict):
    value: Positive
    low: Positive
    high: Positive


class Comparison(TypedDict):
    base: str
    arm: str
    ratio: Ratio


class Case(TypedDict):
    name: str
    samplers: Samplers
    batch: int
    comparisons: list[Comparison]
    arms: dict[str, Arm]


class Row(Case):
    latent_shape: list[int]
    steps: int
    between: bool
    threads: int


class Image(Case):
    workload: str
    rows: int
    compare: list[Pair]


class Unsupported(TypedDict):
    what: str
    reason: str


class Step(TypedDict):
    label: str
    case: str
    base: str
    arm: str


class MeasuredStep(Step):
    per: str
    base_s: Positive | None
    arm_s: Positive | None
    ratio: Ratio | None


class Target(TypedDict):
    label: str
    goal: str
    measured: str
    met: bool | None


class Summary(TypedDict):
    attribution: list[MeasuredStep]
    no_gain: list[MeasuredStep]
    targets: list[Target]


class Seconds(TypedDict):
    all: Number
    compile: Number
    pieces: dict[str, Number]


class Report(TypedDict):
    """report.json's "fastdiff"."""

    suite: str
    created: str
    command: list[str]
    complete: bool
    resumed: int
    machine: Machine
    commit: dict[str, Any]
    model: Model
    settings: Settings
    canaries: Canaries | None
    gates: Gates | None
    setup: list[Setup]
    counts: list[Count]
    fates: list[Fates]
    errors: list[Error]
    memory: list[Memory]
    rows: list[Row]
    images: list[Image]
    unsupported: list[Unsupported]
    attribution: list[Step]
    no_gain: list[Step]
    target: list[dict[str, Any]]
    compile_s: dict[str, Number]
    compile_cache: NotRequired[dict[str, str]]
    seconds: Seconds
    summary: Summary


class PairResult(TypedDict):
    right: bool
    reason: str | None


class PairTime(TypedDict):
    judgement: Judgement


class PairCanaries(TypedDict):
    doubt: str


class Ab(TypedDict):
    """ab.json."""

    results: dict[str, PairResult]
    failed: dict[str, str]
    changes: list[Change]
    times: dict[str, PairTime]
    canaries: PairCanaries | None


class ForeignMachine(TypedDict):
    cpu: NotRequired[dict[str, Any] | None]


class Statistics(TypedDict):
    median: Positive
    q1: Positive
    q3: Positive
    rounds: Positive


class Benchmark(TypedDict):
    fullname: str
    stats: Statistics


class PytestBenchmark(TypedDict):
    """A file of pytest-benchmark, as far as it is compared."""

    machine_info: ForeignMachine
    benchmarks: list[Benchmark]
