"""A diffusers scheduler -> StepTable, by feeding its own `step()` one-hot basis tensors and reading the rows off.

No sampler's maths is written here. A pristine copy of the scheduler is stepped once per row; the sample, the model
output, every latent-shaped tensor that the scheduler holds, every noise draw and every clamped x0 is a fresh basis
vector, so what comes out is the row. The table is then proved against the scheduler on random tensors.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import NumericalError
from fastdiff.fingerprint import fingerprint, freeze, settled
from fastdiff.intercept import Interception, where
from fastdiff.stepper import Schedule, Stepper, check_scheduler, fork, latents_in, not_linear, plain_torch
from fastdiff.table import Draw, StepTable, TableCache, prune

PROOF_TOLERANCE = 1e-9
PROOF_SHAPE = (2, 5, 3, 4)  # [B, C, H, W], all different
PROOF_SCALES = (0.05, 20.0)  # per batch element: a clamp or threshold shows at one of them

# What each prediction type calls the model output, in terms of (x0, eps), given x_t = alpha x0 + sigma eps.
PREDICTIONS: dict[str, Callable[[float, float], tuple[float, float]]] = {
    "epsilon": lambda alpha, sigma: (0.0, 1.0),
    "sample": lambda alpha, sigma: (1.0, 0.0),
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),
    "flow_prediction": lambda alpha, sigma: (-1.0, 1.0),
}

table_cache = TableCache()
"""Tables by scheduler and arguments; `fastdiff.table_cache.info()` counts."""


def tabulate(
    scheduler: Any,
    num_inference_steps: int | None = None,
    *,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
    begin_index: int = 0,
    **kwargs: Any,
) -> StepTable:
    """The pruned, proved and cached table of `scheduler` for one schedule. The scheduler is never changed.

    `timesteps`, `sigmas` and `mu` go to `set_timesteps` as diffusers' pipelines pass them; `begin_index` drops the rows
    before it (img2img). `kwargs` go by name to `set_timesteps` or `step`, whichever takes them (`eta`, `s_churn`,
    `original_inference_steps`, ...). Safe to call from many threads; each table is built once.

    Raises NotLinear where no table exists, NumericalError where diffusers itself divides by zero, TypeError for a name
    that neither method takes, and whatever diffusers itself raises for a schedule that it refuses.
    """
    check_scheduler(scheduler)
    steps = num_inference_steps
    if steps is not None and (not isinstance(steps, SupportsIndex) or operator.index(steps) < 1):
        raise ValueError(f"num_inference_steps: expected an integer >= 1, got {steps!r}")
    named = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas, "mu": mu} | kwargs

    key = fingerprint(scheduler)

    def build() -> StepTable:
        return prune(probe(scheduler, Schedule.of(scheduler, begin_index, named)))

    return table_cache.get((key, freeze(begin_index), freeze(named)), settled(scheduler, key, build))


@dataclass
class _Trace:
    """What one `step()` did on a basis: [latents at the row's start..., model output, then draws and phi]."""

    draws: list[Draw] = field(default_factory=list)
    noise: list[int] = field(default_factory=list)  # basis index of each draw
    phi: int | None = None  # basis index of the clamped prediction
    r: np.ndarray | None = None  # what was clamped
    lo: float = -math.inf
    hi: float = math.inf
    sample: np.ndarray = field(default_factory=lambda: np.empty(0))  # [W]: the next sample
    x0: np.ndarray | None = None  # [W]: the x0 prediction in the output
    converted: np.ndarray | None = None  # [W]: what convert_model_output made of the model output, if that is x0


@dataclass
class ProbedRow:
    """One probed row."""

    timestep: Tensor
    c_in: float
    start: tuple[str, ...]  # names of the latents at the row's start, the sample first
    end: tuple[str, ...]
    images: np.ndarray  # [len(end), W]: each latent after the step
    trace: _Trace
    x0: np.ndarray | None
    x0_source: str | None


def probe(scheduler: Any, schedule: Schedule) -> StepTable:
    """The full table, unpruned: every latent that the scheduler holds, named by its attribute; proved."""
    with plain_torch():
        rows, suspect, init_noise_sigma = _probe_rows(scheduler, schedule)
        table = assemble(rows, type(scheduler).__name__, init_noise_sigma)
        _require_finite(prune(table), scheduler)
        _prove(table, scheduler, schedule, suspect)
    return table


def _probe_rows(scheduler: Any, schedule: Schedule) -> tuple[list[ProbedRow], str | None, float]:
    width = 32
    while True:
        try:
            stepper = Stepper(scheduler, schedule)
            prober = Prober(stepper, width)
            rows: list[ProbedRow] = []
            for timestep in stepper.timesteps:
                try:
                    rows.append(prober.row(timestep))
                except IndexError:
                    if not rows or timestep != 0 or len(rows) + 1 < len(stepper.timesteps):
                        raise
                    # The schedule ends with the time that it arrives at, from which there is no step (SCM).
            return rows, prober.suspect, float(getattr(stepper.scheduler, "init_noise_sigma", 1.0))
        except _BasisExhaustedError:
            width *= 2


class _BasisExhaustedError(Exception):
    """A row needs more basis vectors than there are; probed again with twice as many."""


class Prober:
    """Reads rows off a stepper, one at a time, with `width` basis vectors."""

    def __init__(self, stepper: Stepper, width: int) -> None:
        self.stepper, self.width = stepper, width
        self.shape = torch.Size((1, 1, 1, width))  # steps are elementwise, so the last dimension holds the basis
        self.suspect: str | None = None
        self._eye = torch.eye(width, dtype=torch.float64)
        self._next = 0

    def _basis(self) -> Tensor:
        if self._next == self.width:
            raise _BasisExhaustedError
        self._next += 1
        return self._eye[self._next - 1].clone().view(self.shape)

    def _read(self, tensor: Tensor) -> np.ndarray:
        if tensor.shape != self.shape:
            raise self.stepper.refuse(
                f"it changes the shape of its latents from {tuple(self.shape)} to {tuple(tensor.shape)}"
            )
        return tensor.detach().double().flatten().numpy().copy()  # a step may go on to write into the tensor

    def row(self, timestep: Tensor) -> ProbedRow:
        """Step once; the row is what the outputs hold of each basis vector."""
        self._next = 0
        scheduler = self.stepper.scheduler
        sample = self._basis()
        held = list(latents_in(scheduler, self.shape))
        for latent in held:
            latent.put(self._basis())
        model_output = self._basis()
        with Interception(self.shape, self._no_draw, self._no_clamp, self.stepper.refuse):
            scaled = self._read(self.stepper.scale(sample, timestep))
        if np.isfinite(scaled).all() and scaled[1:].any():
            raise self.stepper.refuse("scale_model_input is no scaling of the sample")
        converts = hasattr(scheduler, "convert_model_output")
        before = fork(scheduler)
        trace = self._step(scheduler, sample, timestep, model_output)
        latents = list(latents_in(scheduler, self.shape))
        images = np.stack([trace.sample, *(self._read(latent.value) for latent in latents)])
        if np.isfinite(images).all() and images[:, self._next :].any():
            raise self.stepper.refuse("it adds a constant to its latents")
        x0: np.ndarray | None
        x0_source: str | None
        if trace.x0 is not None:
            x0, x0_source = trace.x0, "output"
        elif trace.converted is not None:
            x0, x0_source = trace.converted, "convert_model_output"
        else:
            x0 = None if converts else self._step_to_zero(before, sample, timestep, model_output, trace)
            x0_source = "sigma" if x0 is not None else None
        return ProbedRow(
            timestep=timestep,
            c_in=float(scaled[0]) if np.isfinite(scaled).all() else math.nan,
            start=("sample", *(latent.path for latent in held)),
            end=("sample", *(latent.path for latent in latents)),
            images=images,
            trace=trace,
            x0=x0,
            x0_source=x0_source,
        )

    def _step(self, scheduler: Any, sample: Tensor, timestep: Tensor, model_output: Tensor) -> _Trace:
        trace, given = _Trace(), self._next

        def draw(size: torch.Size, dtype: torch.dtype) -> Tensor:
            if size != self.shape:
                raise self.stepper.refuse("its noise has another shape than its latents")
            trace.draws.append(None if dtype == torch.float64 else dtype)
            trace.noise.append(self._next)
            return self._basis()

        def clamp(value: Tensor, lo: float, hi: float) -> Tensor:
            r = self._read(value)
            if trace.phi is not None or (np.isfinite(r).all() and r[given:].any()):
                what = "clamps twice in a row" if trace.phi is not None else "clamps a noisy latent"
                raise self.stepper.refuse(f"it {what}{where()}")
            trace.phi, trace.r, trace.lo, trace.hi = self._next, r, lo, hi
            return self._basis()

        convert = getattr(scheduler, "convert_model_output", None)
        if convert is not None:

            def watched(*args: Any, **kwargs: Any) -> Any:
                converted = convert(*args, **kwargs)
                if trace.converted is None and isinstance(converted, Tensor) and self._is_x0(scheduler, converted):
                    trace.converted = self._read(converted)
                return converted

            scheduler.convert_model_output = watched  # on this copy alone
        try:
            with Interception(self.shape, draw, clamp, self.stepper.refuse) as interception:
                following, x0 = self.stepper.step(sample, timestep, model_output, scheduler)
        finally:
            if convert is not None:
                del scheduler.convert_model_output
        self.suspect = self.suspect or interception.suspect
        trace.sample = self._read(following)
        trace.x0 = None if x0 is None else self._read(x0)
        return trace

    def _is_x0(self, scheduler: Any, converted: Tensor) -> bool:
        """Whether `convert_model_output` predicts x0: it must undo the scheduler's own `add_noise` exactly.

        The same method predicts eps instead under algorithm_type="dpmsolver" or predict_x0=False.
        """
        if (
            converted.shape != self.shape
            or scheduler.config.get("prediction_type") not in PREDICTIONS
            or not hasattr(scheduler, "add_noise")
        ):
            return False
        index = scheduler.timesteps[scheduler.step_index].reshape(1)
        clean, eps = (self._eye[i].clone().view(self.shape) for i in range(2))
        alpha, sigma = self._read(scheduler.add_noise(clean, eps, index))[:2]
        on_clean, on_eps = PREDICTIONS[scheduler.config.prediction_type](alpha, sigma)
        weights = self._read(converted)
        on_sample, on_output = weights[0], weights[weights.nonzero()[0].max(initial=0)]
        if not weights[1:].any():  # prediction_type="sample" may drop the sample, the rest may not drop the output
            on_output = 0.0
        elif on_output is on_sample or len(weights.nonzero()[0]) > 2:
            return False
        return bool(
            math.isclose(on_sample * alpha + on_output * on_clean, 1.0, abs_tol=1e-4)
            and math.isclose(on_sample * sigma + on_output * on_eps, 0.0, abs_tol=1e-4)
        )

    def _step_to_zero(
        self, scheduler: Any, sample: Tensor, timestep: Tensor, model_output: Tensor, trace: _Trace
    ) -> np.ndarray | None:
        """The sample after the same step taken to sigma 0, which is x0 where the step has no memory and no noise.

        Flow-matching schedulers return no x0 and have no `convert_model_output`; previews and DMD need it.
        """
        sigmas, index = getattr(scheduler, "sigmas", None), getattr(self.stepper.scheduler, "step_index", None)
        if not isinstance(sigmas, Tensor) or index is None or index >= len(sigmas):
            return None
        scheduler.sigmas = sigmas.clone()
        scheduler.sigmas[index] = 0.0
        self._next = given = self._next - len(trace.draws) - (trace.phi is not None)
        zeroed = self._step(scheduler, sample, timestep, model_output)
        x0, phi = zeroed.sample, np.zeros(self.width)
        if zeroed.phi is not None:
            if trace.phi is None or trace.r is None or zeroed.r is None or not np.array_equal(zeroed.r, trace.r):
                return None
            phi[trace.phi] = x0[zeroed.phi]
        memoryless = not x0[1 : given - 1].any() and not x0[zeroed.noise].any() and np.isfinite(x0).all()
        kept = np.zeros(self.width)
        kept[0], kept[given - 1] = x0[0], x0[given - 1]
        return kept + phi if memoryless else None

    def _no_draw(self, size: torch.Size, dtype: torch.dtype) -> Tensor:
        raise self.stepper.refuse("scale_model_input draws noise")

    def _no_clamp(self, value: Tensor, lo: float, hi: float) -> Tensor:
        raise self.stepper.refuse("scale_model_input clamps the sample")


def assemble(rows: list[ProbedRow], source: str, init_noise_sigma: float) -> StepTable:
    """Rows over bases of their own -> one table: every row padded to K latents and Z draws."""
    count = len(rows)
    K = max(len(names) for row in rows for names in (row.start, row.end))
    Z = max(len(row.trace.draws) for row in rows)
    A, b, d = np.zeros((count, K, K)), np.zeros((count, K)), np.zeros((count, K))
    C, r, x0_row = np.zeros((count, K, Z)), np.zeros((count, K + 1)), np.zeros((count, K + 2 + Z))
    sources = {row.x0_source for row in rows}
    x0_source = sources.pop() if len(sources) == 1 else None
    for i, row in enumerate(rows):
        if i and rows[i - 1].end != row.start:
            raise not_linear(source, "its latents change between two steps", "its own step()")
        given, end, trace = len(row.start), len(row.end), row.trace
        A[i, :end, :given] = row.images[:, :given]
        b[i, :end] = row.images[:, given]
        C[i, :end, : len(trace.noise)] = row.images[:, trace.noise]
        if trace.phi is not None and trace.r is not None:
            d[i, :end] = row.images[:, trace.phi]
            r[i, :given], r[i, K] = trace.r[:given], trace.r[given]
        if x0_source and row.x0 is not None:
            x0_row[i, :given], x0_row[i, K] = row.x0[:given], row.x0[given]
            x0_row[i, K + 1] = 0.0 if trace.phi is None else row.x0[trace.phi]
            x0_row[i, K + 2 : K + 2 + len(trace.noise)] = row.x0[trace.noise]
    return StepTable(
        timesteps=torch.stack([row.timestep for row in rows]),
        c_in=torch.tensor([row.c_in for row in rows], dtype=torch.float64),
        A=torch.from_numpy(A), b=torch.from_numpy(b), d=torch.from_numpy(d), C=torch.from_numpy(C),
        r=torch.from_numpy(r),
        lo=torch.tensor([row.trace.lo for row in rows], dtype=torch.float64),
        hi=torch.tensor([row.trace.hi for row in rows], dtype=torch.float64),
        x0_row=torch.from_numpy(x0_row) if x0_source else torch.zeros(0, 0, dtype=torch.float64),
        init_noise_sigma=init_noise_sigma,
        draws=tuple(tuple(row.trace.draws) for row in rows),
        latents=(*(row.start for row in rows), rows[-1].end),
        x0_source=x0_source,
        source=source,
    )  # fmt: skip


def _require_finite(table: StepTable, scheduler: Any) -> None:
    """Refuse a schedule whose samples are inf or NaN in diffusers too: zero-SNR epsilon, a begin between substeps."""
    columns = (table.timesteps, table.c_in, table.A, table.b, table.d, table.C, table.r)
    finite = torch.stack(
        [column.flatten(1).isfinite().all(1) if column.ndim > 1 else column.isfinite() for column in columns]
    )
    if finite.all():
        return
    row = int(finite.all(0).int().argmin())
    defaults = inspect.signature(type(scheduler).__init__).parameters
    options = ", ".join(
        f"{key}={value!r}"
        for key, value in scheduler.config.items()
        if key in defaults and value != defaults[key].default
    )
    raise NumericalError(
        f"{table.source} divides by zero at row {row} of {len(table)} (timestep {table.timesteps[row].item():g}): "
        f"diffusers' own step() computes inf or NaN there too. Options: {options or 'all defaults'}. "
        "Use instead: another prediction_type, final sigma or begin index."
    )


def _prove(table: StepTable, scheduler: Any, schedule: Schedule, suspect: str | None) -> None:
    """Walk the real scheduler and the table side by side on random tensors; they must agree to PROOF_TOLERANCE."""
    stepper = Stepper(scheduler, schedule)
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor(PROOF_SCALES, dtype=torch.float64).view(-1, 1, 1, 1)

    def normal() -> Tensor:
        return torch.randn(PROOF_SHAPE, generator=generator).double()  # exact in float32, should a draw be cast

    noise: list[Tensor] = []

    def draw(size: torch.Size, dtype: torch.dtype) -> Tensor:
        noise.append(normal() * scales)
        return noise[-1].clone()

    sample = normal() * scales * table.init_noise_sigma
    state = table.init(sample)
    error = 0.0
    for row, timestep in enumerate(stepper.timesteps[: len(table)]):
        model_output = normal() * scales
        noise.clear()
        with Interception(sample.shape, draw, torch.clamp, stepper.refuse):
            scaled = stepper.scale(sample, timestep)
            following, x0 = stepper.step(sample, timestep, model_output)
        if len(noise) != len(table.draws[row]) or following.shape != sample.shape:
            error = math.inf
            break
        pairs = [(scaled, table.model_input(row, state))]
        if x0 is not None and table.x0_source == "output":
            pairs.append((x0, table.x0(row, state, model_output, noise)))
        state = table.advance(row, state, model_output, noise)
        sample = following
        pairs.append((sample, state[0]))
        error = max(error, *(_relative_error(expected, got) for expected, got in pairs))
    if error > PROOF_TOLERANCE:
        cause = suspect or "a step depends on more than its latents"
        raise stepper.refuse(f"{cause}; its rows are off by {error:.1e} (allowed {PROOF_TOLERANCE:.0e})")


def _relative_error(expected: Tensor, got: Tensor) -> float:
    """Largest error over largest reference, the worst batch element's."""
    expected, got = expected.flatten(1), got.flatten(1)
    error = float(((expected - got).abs().amax(1) / expected.abs().amax(1).clamp_min(1e-30)).max())
    return math.inf if math.isnan(error) else error  # max() would pass over a NaN
