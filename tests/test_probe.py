"""The prober: the oracle matrix, what it must leave alone, what it refuses and how it says so."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastdiff
from fastdiff.errors import NotLinear, NumericalError
from fastdiff.probe import probe, table_cache
from fastdiff.stepper import Schedule
from fastdiff.table import prune
from tests import oracle

SHAPE = (2, 3, 4, 5)  # [B, C, H, W]
REPOSITORY = Path(__file__).parent.parent
Matrix = dict[str, list[oracle.Outcome]]


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    """Every test starts with the cache empty and its counters at zero."""
    table_cache.clear()
    yield
    table_cache.clear()


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The oracle matrix


@pytest.fixture(scope="module")
def matrix() -> Matrix:
    """Every cell that the suite runs, on two processes."""
    return dict(oracle.run_matrix((*oracle.AFFINE, *oracle.REFUSED_CLASSES)))


@pytest.mark.parametrize("name", oracle.AFFINE)
def test_every_cell_equals_diffusers_in_float64_and_is_as_good_in_float32(matrix: Matrix, name: str) -> None:
    failures = [f"{cell.label}: {cell.kind}: {cell.detail}" for cell in matrix[name] if oracle.is_failure(cell)]
    assert not failures, "\n".join(failures)
    assert any(cell.kind == "right" for cell in matrix[name])


def test_the_matrix_covers_the_classes_of_diffusers_and_its_count_is_printed(
    matrix: Matrix, capsys: pytest.CaptureFixture[str]
) -> None:
    everything = [cell for cells in matrix.values() for cell in cells]
    counts = oracle.tally(everything)
    right = [cell for cell in everything if cell.kind == "right"]
    with capsys.disabled():
        print(  # noqa: T201  # the count is part of what the suite reports
            f"\noracle matrix: {len(everything)} cells, {counts}; worst float64 error "
            f"{max(cell.error_float64 for cell in right):.1e}"
        )
    assert set(matrix) == set(oracle.scheduler_classes())
    assert len(oracle.AFFINE) == 35
    assert counts["wrong"] == 0
    assert counts["refused"] == sum(1 for cell in everything if cell.kind == "refused" and not oracle.is_failure(cell))
    assert all("Use instead" in cell.detail for cell in everything if cell.kind == "refused")


def test_pndm_and_unclip_raise_at_few_steps_as_diffusers_does(matrix: Matrix) -> None:
    for name, steps in (("PNDMScheduler", 1), ("PNDMScheduler", 2), ("UnCLIPScheduler", 1)):
        assert any(cell.kind == "raises" and f"steps={steps}, " in cell.label for cell in matrix[name])


def test_the_coverage_page_is_up_to_date(matrix: Matrix) -> None:
    committed = (REPOSITORY / "reports" / "coverage.md").read_text()
    classes, _, _ = committed.partition("\n## Pipelines\n")  # of which tests/families/test_coverage.py has the rest
    assert classes == oracle.coverage(matrix), "run `make coverage`"


def test_the_oracle_sees_small_errors() -> None:
    cell = oracle.short_cells("EulerAncestralDiscreteScheduler")[0]
    table = oracle.tabulate(cell, cell.build(), 0)
    walks = [oracle.walk(cell, cell.build(), dtype) for dtype in (torch.float64, torch.float32)]

    def judged(table: fastdiff.StepTable) -> oracle.Outcome:
        return oracle._compare(oracle.Outcome(cell.scheduler, cell.label, "wrong"), table, *walks)

    assert judged(table).kind == "right"
    for planted in (
        dataclasses.replace(table, b=table.b * (1 + 1e-8)),
        dataclasses.replace(table, c_in=table.c_in * (1 + 1e-8)),
        dataclasses.replace(table, x0_row=table.x0_row * (1 + 1e-8)),
        dataclasses.replace(table, C=table.C * (1 + 1e-7)),
        dataclasses.replace(table, timesteps=table.timesteps + 1),
        dataclasses.replace(table, timesteps=table.timesteps.double()),
        dataclasses.replace(table, draws=((torch.float32,),) * len(table)),
    ):
        assert judged(planted).kind == "wrong"


def test_all_pairs_of_options_meet() -> None:
    axes = oracle.axes("EulerDiscreteScheduler")
    chosen = list(oracle.pairwise(axes))
    wanted = {
        (a, one.label, b, other.label) for a in axes for b in axes if a < b for one in axes[a] for other in axes[b]
    }
    met = {(a, choice[a].label, b, choice[b].label) for choice in chosen for a in axes for b in axes if a < b}
    assert met == wanted
    assert len(chosen) < len(wanted) / 10


# Memory


@pytest.mark.parametrize(
    ("name", "config", "memory"),
    [
        ("EulerDiscreteScheduler", {}, 1),
        ("DDIMScheduler", {}, 1),
        ("FlowMatchEulerDiscreteScheduler", {}, 1),
        ("LCMScheduler", {}, 1),
        ("DPMSolverMultistepScheduler", {}, 2),
        ("HeunDiscreteScheduler", {}, 3),
        ("DPMSolverSinglestepScheduler", {}, 3),
        ("UniPCMultistepScheduler", {}, 4),
        ("UniPCMultistepScheduler", {"solver_order": 3}, 5),
        ("SASolverScheduler", {}, 4),
        ("LMSDiscreteScheduler", {}, 4),
        ("IPNDMScheduler", {}, 4),
        ("PNDMScheduler", {"skip_prk_steps": True}, 4),
        ("PNDMScheduler", {}, 6),
    ],
)
def test_memory_after_pruning(name: str, config: dict[str, Any], memory: int) -> None:
    assert fastdiff.tabulate(getattr(diffusers, name)(**config), 20).memory == memory


def test_the_unpruned_table_names_the_attribute_behind_each_latent() -> None:
    scheduler = diffusers.IPNDMScheduler()
    table = probe(scheduler, Schedule.of(scheduler, 0, {"num_inference_steps": 8}))
    assert table.latents[0] == ("sample",)
    assert table.latents[8][:3] == ("sample", "ets[0]", "ets[1]")
    assert table.memory == 9  # the list only grows
    pruned = prune(table)
    assert pruned.memory == 4
    assert pruned.latents[5] == ("sample", "ets[2]", "ets[3]", "ets[4]")


# What must stay as it was


def snapshot(value: Any) -> Any:
    """Everything reachable, by content; tensors by identity too."""
    if isinstance(value, Tensor):
        return id(value), str(value.dtype), value.clone().numpy().tobytes()
    if isinstance(value, np.ndarray):
        return id(value), value.tobytes()
    if isinstance(value, dict):
        attributes = {key: snapshot(item) for key, item in vars(value).items()} if hasattr(value, "__dict__") else {}
        return {key: snapshot(item) for key, item in value.items()}, attributes
    if isinstance(value, (list, tuple)):
        return [snapshot(item) for item in value]
    if hasattr(value, "set_timesteps"):
        return snapshot(vars(value))
    return repr(value)


def walked(name: str, rows: int, **config: Any) -> Any:
    """A scheduler in the middle of a run, its history filled."""
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(10)
    sample = randn(0)
    for row in range(rows):
        sample = scheduler.step(randn(1 + row), scheduler.timesteps[row], sample, return_dict=False)[0]
    return scheduler


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize(
    "name",
    [
        "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "PNDMScheduler", "IPNDMScheduler",
        "HeunDiscreteScheduler", "DEISMultistepScheduler", "DDIMScheduler", "FlowMatchEulerDiscreteScheduler",
    ],
)  # fmt: skip
def test_the_scheduler_is_never_changed_and_its_history_never_seen(name: str, rows: int) -> None:
    scheduler = walked(name, rows)
    before = snapshot(scheduler)
    table = fastdiff.tabulate(scheduler, 6)
    assert snapshot(scheduler) == before
    assert table == fastdiff.tabulate(getattr(diffusers, name)(), 6)


def test_a_nested_scheduler_is_never_changed() -> None:
    scheduler = diffusers.UniPCMultistepScheduler(solver_p=diffusers.DDIMScheduler())
    before = snapshot(scheduler)
    fastdiff.tabulate(scheduler, 6)
    assert snapshot(scheduler) == before


def test_no_global_state_changes() -> None:
    def state() -> tuple[Any, ...]:
        numpy_state: Any = np.random.get_state()  # noqa: NPY002  # the legacy global generator is what must not move
        return (
            torch.get_rng_state().numpy().tobytes(), numpy_state[1].tobytes(), torch.get_default_dtype(),
            torch.is_grad_enabled(), torch.get_num_threads(), torch.is_inference_mode_enabled(),
        )  # fmt: skip

    before = state()
    fastdiff.tabulate(diffusers.EulerAncestralDiscreteScheduler(), 5)
    fastdiff.tabulate(diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), 5)
    with pytest.raises(NotLinear):
        fastdiff.tabulate(Squares(), 5)
    assert state() == before


def test_the_callers_modes_do_not_matter() -> None:
    expected = fastdiff.tabulate(diffusers.UniPCMultistepScheduler(), 5).digest
    table_cache.clear()
    scheduler = diffusers.UniPCMultistepScheduler()
    with torch.inference_mode(), torch.device("meta"):
        table = fastdiff.tabulate(scheduler, 5)
    assert table.digest == expected
    assert torch.equal(table.model_input(0, table.init(randn(0))), randn(0))


# Threads and the cache


def test_eight_threads_build_a_table_once() -> None:
    barrier, tables = threading.Barrier(8), []

    def ask() -> fastdiff.StepTable:
        scheduler = diffusers.UniPCMultistepScheduler()
        barrier.wait()
        return fastdiff.tabulate(scheduler, 12)

    with ThreadPoolExecutor(8) as pool:
        tables = [future.result() for future in [pool.submit(ask) for _ in range(8)]]
    counters = table_cache.info()
    assert all(table is tables[0] for table in tables)
    assert (counters.misses, counters.hits + counters.joined) == (1, 7)


def test_threads_that_probe_different_samplers_do_not_disturb_each_other() -> None:
    names = ["EulerAncestralDiscreteScheduler", "DDIMScheduler", "UniPCMultistepScheduler", "PNDMScheduler"] * 2
    steps = [7, 7, 7, 7, 9, 9, 9, 9]

    def digest(name: str, steps: int) -> str:
        return fastdiff.tabulate(getattr(diffusers, name)(), steps).digest

    alone = [digest(*pair) for pair in zip(names, steps, strict=True)]
    table_cache.clear()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(digest, names, steps))
    assert together == alone


def test_one_scheduler_may_be_tabulated_by_many_threads() -> None:
    scheduler = walked("DPMSolverMultistepScheduler", 3)
    with ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(lambda steps: fastdiff.tabulate(scheduler, steps), range(4, 12)))
    fresh = [fastdiff.tabulate(diffusers.DPMSolverMultistepScheduler(), steps) for steps in range(4, 12)]
    assert tables == fresh


def test_a_cached_lookup_does_not_probe_again() -> None:
    scheduler = Linear()
    first = fastdiff.tabulate(scheduler, 5)
    stepped = Linear.steps_taken
    assert fastdiff.tabulate(scheduler, 5) is first
    assert fastdiff.tabulate(Linear(), 5) is first
    assert Linear.steps_taken == stepped
    assert table_cache.info()[:3] == (2, 1, 0)


def test_a_template_in_use_is_not_another_scheduler() -> None:
    first = fastdiff.tabulate(diffusers.UniPCMultistepScheduler(), 5)
    assert fastdiff.tabulate(walked("UniPCMultistepScheduler", 4), 5) is first


def _edited_alphas() -> Any:
    scheduler = diffusers.DDIMScheduler()
    scheduler.alphas_cumprod[500:] *= 0.9
    return scheduler


def _shifted() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_shift(3.0)
    return scheduler


@pytest.mark.parametrize(
    ("base", "variant", "arguments"),
    [
        (diffusers.DDIMScheduler, _edited_alphas, {}),
        (diffusers.FlowMatchEulerDiscreteScheduler, _shifted, {}),
        (diffusers.DDIMScheduler, diffusers.DDIMScheduler, {"eta": 1.0}),
        (diffusers.DDIMScheduler, diffusers.DDIMScheduler, {"begin_index": 1}),
        (diffusers.EulerDiscreteScheduler, diffusers.EulerDiscreteScheduler, {"s_churn": 1.0}),
        (diffusers.LMSDiscreteScheduler, diffusers.LMSDiscreteScheduler, {"order": 2}),
        (diffusers.DDIMScheduler, lambda: diffusers.DDIMScheduler(clip_sample=False), {}),
    ],
)
def test_the_key_tells_apart_what_samples_differently(
    base: Callable[[], Any], variant: Callable[[], Any], arguments: dict[str, Any]
) -> None:
    table = fastdiff.tabulate(base(), 5)
    other = fastdiff.tabulate(variant(), 5, **arguments)
    assert other != table
    assert other is fastdiff.tabulate(variant(), 5, **arguments)
    assert fastdiff.tabulate(base(), 5) is table


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "DEISMultistepScheduler", "DPMSolverSinglestepScheduler"]
)
def test_an_attribute_set_by_mu_does_not_leak_into_the_next_request(name: str) -> None:
    options = {"use_dynamic_shifting": True, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    scheduler = getattr(diffusers, name)(**options)
    unshifted = fastdiff.tabulate(scheduler, 6)
    scheduler.set_timesteps(6, mu=1.2)
    if name != "DPMSolverSinglestepScheduler":  # whose config is made anew whenever a schedule ends at sigma 0
        assert scheduler.config.flow_shift != scheduler.config["flow_shift"]  # diffusers' leak
    table_cache.clear()
    assert fastdiff.tabulate(scheduler, 6) == unshifted
    shifted = fastdiff.tabulate(scheduler, 6, mu=1.2)
    assert shifted != unshifted
    assert fastdiff.tabulate(scheduler, 6, mu=0.4) not in (shifted, unshifted)
    assert fastdiff.tabulate(scheduler, 6) == unshifted


def test_custom_sigmas_survive_a_scheduler_that_was_prepared_otherwise() -> None:
    sigmas = [1.0, 0.7, 0.2]
    prepared = diffusers.FlowMatchEulerDiscreteScheduler()
    prepared.set_timesteps(20)
    table = fastdiff.tabulate(prepared, sigmas=sigmas)
    assert torch.allclose(table.timesteps, torch.tensor(sigmas) * 1000)
    assert len(fastdiff.tabulate(prepared, 20)) == 20


# Rows


@pytest.mark.parametrize(
    ("name", "config", "steps", "rows"),
    [
        ("HeunDiscreteScheduler", {}, 2, 3),  # timesteps 999, 0, 0: the last is a model evaluation too
        ("PNDMScheduler", {"skip_prk_steps": True}, 5, 6),  # ends at 0 with one row more than steps
        ("PNDMScheduler", {}, 5, 14),
        ("SCMScheduler", {}, 2, 2),  # ends with the time it arrives at, from which there is no step
        ("EulerDiscreteScheduler", {}, 1, 1),
    ],
)
def test_a_row_is_a_model_evaluation(name: str, config: dict[str, Any], steps: int, rows: int) -> None:
    assert len(fastdiff.tabulate(oracle.scheduler_classes()[name](**config), steps)) == rows


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"])
@given(steps=st.integers(1, 8), data=st.data())
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_without_memory_a_begin_index_is_a_suffix(name: str, steps: int, data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, steps - 1))
    whole = fastdiff.tabulate(getattr(diffusers, name)(), steps)
    tail = fastdiff.tabulate(getattr(diffusers, name)(), steps, begin_index=begin)
    for field in ("timesteps", "c_in", "A", "b", "d", "C", "r", "x0_row"):
        assert torch.equal(getattr(tail, field), getattr(whole, field)[begin:])


def test_with_memory_a_begin_index_is_another_table() -> None:
    whole = fastdiff.tabulate(diffusers.DPMSolverMultistepScheduler(), 8)
    tail = fastdiff.tabulate(diffusers.DPMSolverMultistepScheduler(), 8, begin_index=3)
    assert torch.equal(tail.timesteps, whole.timesteps[3:])
    assert not torch.equal(tail.A[0], whole.A[3])  # its first row has no history


# Arguments


@pytest.mark.parametrize("name", ["generator", "sample", "model_output", "etaa", "s_churn"])
def test_a_name_that_neither_method_takes_is_a_type_error(name: str) -> None:
    arguments: dict[str, Any] = {name: 1.0}
    with pytest.raises(TypeError, match=rf"DDIMScheduler takes no '{name}'; it takes eta, use_clipped_model_output"):
        fastdiff.tabulate(diffusers.DDIMScheduler(), 5, **arguments)


def test_what_is_no_scheduler_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="expected a diffusers scheduler, got dict"):
        fastdiff.tabulate({}, 5)
    with pytest.raises(TypeError, match=r"got the class DDIMScheduler; DDIMScheduler\(\) makes a scheduler of it"):
        fastdiff.tabulate(diffusers.DDIMScheduler, 5)
    with pytest.raises(TypeError):
        fastdiff.tabulate(diffusers.DDIMScheduler(), 5, begin_index=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("begin_index", [-1, 5, 99])
def test_a_begin_index_outside_the_schedule_is_a_value_error(begin_index: int) -> None:
    with pytest.raises(ValueError, match="begin_index: expected"):
        fastdiff.tabulate(diffusers.DDIMScheduler(), 5, begin_index=begin_index)


@pytest.mark.parametrize("steps", [0, -1, 2.5, "5"])
def test_a_count_of_steps_that_is_none_is_a_value_error(steps: Any) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps: expected an integer >= 1, got {steps!r}"):
        fastdiff.tabulate(diffusers.DDIMScheduler(), steps)


def test_a_schedule_without_rows_is_a_value_error() -> None:
    timesteps = [999, 979, 959]
    with pytest.raises(ValueError, match="LCMScheduler makes no row"):
        fastdiff.tabulate(diffusers.LCMScheduler(), timesteps=timesteps, strength=0.01)


@pytest.mark.parametrize(
    ("scheduler", "arguments", "row"),
    [
        (lambda: diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"), {}, 0),
        (lambda: diffusers.LCMScheduler(rescale_betas_zero_snr=True), {}, 0),
        (lambda: diffusers.UniPCMultistepScheduler(lower_order_final=False), {}, 4),
        (lambda: diffusers.KDPM2AncestralDiscreteScheduler(), {"begin_index": 1}, 7),
    ],
)
def test_a_schedule_that_divides_by_zero_in_diffusers_is_refused_naming_the_row_and_the_options(
    scheduler: Callable[[], Any], arguments: dict[str, Any], row: int
) -> None:
    with pytest.raises(NumericalError, match=f"Scheduler divides by zero at row {row} of .*Options: .*Use instead"):
        fastdiff.tabulate(scheduler(), 5, **arguments)


# Schedulers that fastdiff has never seen


class Planted(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A user's own scheduler: Euler over a linear ramp, with a hole for something else."""

    order = 1

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self.timesteps = torch.linspace(999, 0, num_train_timesteps)
        self.index = 0

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        self.timesteps = torch.linspace(999, 0, num_inference_steps, device=device)
        self.index = 0

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        self.index += 1
        sample = self.next(sample, model_output, float(timestep) / 1000)
        return SchedulerOutput(prev_sample=sample) if return_dict else (sample,)

    def next(self, x: Tensor, m: Tensor, t: float) -> Tensor:
        raise NotImplementedError


class Linear(Planted):
    """Linear, with a memory of its own in a dict, noise of two dtypes, a clamp and a cast to half precision."""

    steps_taken = 0

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self.held: dict[str, Tensor] = {}

    def next(self, x: Tensor, m: Tensor, t: float) -> Tensor:
        type(self).steps_taken += 1
        previous: Tensor = self.held.get("m", m)
        self.held["m"] = m
        clean = (x - t * (1.5 * m - 0.5 * previous).half()).clamp(-1, 1)
        following: Tensor = (1 - t) * clean + t * m + 0.1 * torch.randn_like(x) + torch.normal(0.0, 0.2, x.shape)
        return following + 0 * torch.randn(x.shape, dtype=torch.float32)


def test_a_linear_scheduler_never_seen_before_works() -> None:
    table = fastdiff.tabulate(Linear(), 6)
    assert (len(table), table.memory, table.clips, table.x0_source) == (6, 2, True, None)
    assert table.draws == ((None, torch.float32, torch.float32),) * 6  # weight 0 or not

    state, previous = table.init(randn(0)), randn(1)
    x = randn(0)
    for row, timestep in enumerate(table.timesteps.tolist()):
        m, eps, t = randn(10 + row), list(randn(20 + row, 3, *SHAPE)), timestep / 1000
        previous = m if row == 0 else previous
        clean = (x - t * (1.5 * m - 0.5 * previous)).clamp(-1, 1)
        x, previous = (1 - t) * clean + t * m + 0.1 * eps[0] + 0.2 * eps[1], m
        assert torch.equal(table.model_input(row, state), state[0])
        state = table.advance(row, state, m, eps)
        assert torch.allclose(state[0], x, rtol=1e-12, atol=1e-12)


class InPlace(Planted):
    """The same kinds of operation, written in place."""

    def next(self, x: Tensor, m: Tensor, t: float) -> Tensor:
        clean = (x - t * m).clamp_(min=-2.0).mul_(0.5)
        clean += torch.empty_like(m).normal_(0.0, 0.5)
        return clean.add_(torch.normal(torch.zeros_like(x), 0.25))


def test_operations_in_place_are_read_alike() -> None:
    table = fastdiff.tabulate(InPlace(), 3)
    x, m, eps = randn(0), randn(1), list(randn(2, 2, *SHAPE))
    expected = (x - m * float(table.timesteps[0]) / 1000).clamp(min=-2.0) * 0.5 + 0.5 * eps[0] + 0.25 * eps[1]
    assert torch.allclose(table.advance(0, table.init(x), m, eps)[0], expected, rtol=1e-12, atol=1e-12)


class Squares(Planted):
    def next(self, x: Tensor, m: Tensor, t: float) -> Tensor:
        return x - t * m + 1e-3 * x * x


class Absolute(Planted):
    def next(self, x: Tensor, m: Tensor, t: float) -> Tensor:
        return x - t * m.abs()


class Normed(Planted):
    def next(self, x: Tensor, m: Tensor, t: float) -> Tensor:
        following: Tensor = x - t * m / m.norm()
        return following


class Uniform(Planted):
    def next(self, x: Tensor, m: Tensor, t: float) -> Tensor:
        return x - t * m + torch.rand(x.shape)


class Item(Planted):
    def next(self, x: Tensor, m: Tensor, t: float) -> Tensor:
        return x - t * m * (1.0 + x[0, 0, 0, 0].item())


class Branch(Planted):
    def next(self, x: Tensor, m: Tensor, t: float) -> Tensor:
        return x - t * m if m.sum() > 0 else x + t * m


class Grows(Planted):
    def next(self, x: Tensor, m: Tensor, t: float) -> Tensor:
        return torch.cat([x - t * m] * 2, dim=-1)


class ClampsNoise(Planted):
    def next(self, x: Tensor, m: Tensor, t: float) -> Tensor:
        return (x - t * m + torch.randn_like(x)).clamp(-1, 1)


class ClampsTwice(Planted):
    def next(self, x: Tensor, m: Tensor, t: float) -> Tensor:
        return (x - t * m).clamp(-1, 1) + m.clamp(-1, 1)


class Offset(Planted):
    def next(self, x: Tensor, m: Tensor, t: float) -> Tensor:
        return x - t * m + 0.25


class Drifts(Planted):
    """Linear in every step, but what it does depends on how often it was stepped since it was made."""

    born = 0

    def next(self, x: Tensor, m: Tensor, t: float) -> Tensor:
        type(self).born += 1
        return x - t * self.born * m


@pytest.mark.parametrize(
    ("planted", "what"),
    [
        (Squares, "mul on a latent"),
        (Absolute, "abs on a latent"),
        (Normed, "linalg_vector_norm on a latent"),
        (Uniform, "it draws rand noise, and only normal noise can be drawn ahead"),
        (Item, "select on a latent"),
        (Branch, "sum on a latent"),
        (ClampsNoise, "it clamps a noisy latent"),
        (ClampsTwice, "it clamps twice in a row"),
    ],
)
def test_a_scheduler_that_is_not_linear_is_refused_naming_the_operation_its_file_and_line(
    planted: type[Planted], what: str
) -> None:
    with pytest.raises(NotLinear) as refused:
        fastdiff.tabulate(planted(), 4)
    line = planted.next.__code__.co_firstlineno + 1
    assert str(refused.value).startswith(f"{planted.__name__} is not a table: {what} (next, test_probe.py:{line})")
    assert "Use instead: its own step()" in str(refused.value)


def test_a_default_dtype_that_changes_meanwhile_is_an_error_and_nothing_is_kept() -> None:
    class Loading(diffusers.EulerDiscreteScheduler):  # type: ignore[misc]
        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
            super().set_timesteps(num_inference_steps, device)
            torch.set_default_dtype(loaded_in)

    loaded_in, one = torch.bfloat16, Loading()
    try:
        with pytest.raises(RuntimeError, match=r"default dtype to stay as they are .* ask again"):
            fastdiff.tabulate(one, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    loaded_in = torch.float32
    assert len(fastdiff.tabulate(one, 4)) == 4


def test_a_subclass_is_refused_with_its_class_unless_it_has_a_step_of_its_own() -> None:
    class Named(diffusers.CosineDPMSolverMultistepScheduler):  # type: ignore[misc]
        pass

    class Own(diffusers.RePaintScheduler):  # type: ignore[misc]
        def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
            return (sample - 0.1 * model_output,)

    with pytest.raises(NotLinear, match="Named is not a table: its noise comes from a Brownian tree"):
        fastdiff.tabulate(Named(), 3)
    with fastdiff.acquire(Named(), "isolate") as lease:
        assert lease.ownership == "cloned"
    assert fastdiff.tabulate(Own(), 3).b.tolist() == [[-0.1]] * 3


def test_a_scheduler_that_adds_a_constant_is_refused() -> None:
    with pytest.raises(NotLinear, match="Offset is not a table: it adds a constant to its latents"):
        fastdiff.tabulate(Offset(), 4)


def test_a_scheduler_that_changes_the_shape_is_refused() -> None:
    with pytest.raises(NotLinear, match="Grows is not a table: it changes the shape of its latents from"):
        fastdiff.tabulate(Grows(), 4)


def test_a_scheduler_that_depends_on_hidden_state_is_refused_by_the_proof() -> None:
    with pytest.raises(NotLinear, match="Drifts is not a table: a step depends on more than its latents"):
        fastdiff.tabulate(Drifts(), 4)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (lambda: diffusers.DDIMScheduler(thresholding=True), ["_threshold_sample", "without thresholding"]),
        (lambda: diffusers.DDPMScheduler(variance_type="learned"), ["variance_type='learned'", "'fixed_small'"]),
        (
            lambda: diffusers.FlowMatchLCMScheduler(scale_factors=[1.0, 2.0, 2.0, 2.0]),
            ["another shape", "without scale_factors"],
        ),
        (lambda: diffusers.CosineDPMSolverMultistepScheduler(), ["Brownian", "DPMSolverMultistepScheduler"]),
        (lambda: diffusers.CogVideoXDPMScheduler(), ["CogVideoXDDIMScheduler"]),
    ],
)
def test_refused_options_are_named_with_what_to_use_instead(scheduler: Callable[[], Any], words: list[str]) -> None:
    refusable = scheduler()
    with pytest.raises(NotLinear) as refused:
        fastdiff.tabulate(refusable, 5)
    for word in (type(refusable).__name__, "is not a table", "Use instead", *words):
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("scheduler", "name"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler, "per_token_timesteps"),
        (diffusers.EDMEulerScheduler, "pred_original_sample"),
    ],
)
def test_an_argument_of_step_that_is_a_tensor_is_refused(scheduler: Callable[[], Any], name: str) -> None:
    arguments: dict[str, Any] = {name: torch.ones(2, 3, 4, 5)}
    with pytest.raises(NotLinear, match=f"with {name} is not a table: .* Use instead: it without {name}"):
        fastdiff.tabulate(scheduler(), 5, **arguments)


def test_an_error_is_not_cached() -> None:
    for _ in range(2):
        with pytest.raises(NotLinear):
            fastdiff.tabulate(Squares(), 4)
    assert table_cache.info()[:2] == (0, 2)


# x0


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "v_prediction"}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverSinglestepScheduler", {}),
        ("UniPCMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
        ("SASolverScheduler", {}),
    ],
)
def test_the_x0_of_a_solver_is_what_its_convert_model_output_makes(name: str, config: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, name)(**config)
    table = fastdiff.tabulate(scheduler, 5)
    assert table.x0_source == "convert_model_output"
    scheduler.set_timesteps(5)
    for row in range(5):
        scheduler._step_index = row
        x, m = randn(row), randn(50 + row)
        state = torch.cat([x[None], randn(90, table.memory - 1, *SHAPE)])
        eps = [randn(70)] * len(table.draws[row])
        expected = scheduler.convert_model_output(m, sample=x)
        assert torch.allclose(table.x0(row, state, m, eps), expected, rtol=1e-6, atol=1e-6)


def test_the_x0_of_flow_matching_is_the_sample_minus_sigma_times_the_velocity() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    table = fastdiff.tabulate(scheduler, 5)
    assert table.x0_source == "sigma"
    scheduler.set_timesteps(5)
    for row, sigma in enumerate(scheduler.sigmas[:-1].double().tolist()):
        x, m = randn(row), randn(50 + row)
        assert torch.allclose(table.x0(row, table.init(x), m), x - sigma * m, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("config", [{"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}])
def test_a_solver_that_converts_to_noise_tells_no_x0(config: dict[str, Any]) -> None:
    table = fastdiff.tabulate(diffusers.DPMSolverMultistepScheduler(**config), 5)
    assert table.x0_source is None
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler predicts no x0"):
        table.x0(0, table.init(randn(0)), randn(1))


# Noise


@pytest.mark.parametrize(
    ("name", "config", "dtype"),
    [
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, torch.float32),
        ("DDPMScheduler", {}, None),
        ("EulerAncestralDiscreteScheduler", {}, None),
    ],
)
def test_a_draw_has_the_dtype_in_which_diffusers_draws_it(name: str, config: dict[str, Any], dtype: Any) -> None:
    scheduler = getattr(diffusers, name)(**config)
    table = fastdiff.tabulate(scheduler, 4)
    scheduler.set_timesteps(4)
    model_output, sample = randn(0).bfloat16(), randn(1).bfloat16()
    with oracle._Draws() as real:
        scheduler.step(model_output, scheduler.timesteps[0], sample)
    assert table.draws[0] == (dtype,)
    assert real.asked == [dtype or torch.bfloat16]


def test_scm_draws_in_the_default_dtype() -> None:
    scheduler = oracle.scheduler_classes()["SCMScheduler"]()
    assert fastdiff.tabulate(scheduler, 2).draws == ((torch.float32,), (torch.float32,))


def test_a_draw_of_weight_zero_is_counted() -> None:
    table = fastdiff.tabulate(diffusers.EulerAncestralDiscreteScheduler(), 4)
    assert table.draws == ((None,),) * 4
    assert not table.C[3].any()
