"""The drop-in scheduler: the original's results, attributes and manners, by table; and by its own step off schedule."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff import rehearsal
from fastdiff.errors import FastdiffError, NotLinear
from fastdiff.fingerprint import Unsettled
from fastdiff.probe import probe, table_cache
from fastdiff.rehearsal import same
from fastdiff.scheduler import TableScheduler, table_scheduler, table_scheduler_class
from tests import oracle

SHAPE = (2, 3, 4, 5)  # [B, C, H, W], all different
Cell = oracle.Cell
Hook = Callable[[int, Any], None]
SPENT = ("timestep_list",)  # where the original keeps the last run's timesteps until it has as many of this one's


@pytest.fixture(autouse=True)
def no_warning_is_lost() -> Iterator[None]:
    """A fallback that a test does not expect fails it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*its own step.*")
        yield


def base(name: str) -> Cell:
    return oracle.short_cells(name)[0]


def randn(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loop(
    scheduler: Any,
    timesteps: Any,
    hook: Hook | None = None,
    dtype: torch.dtype = torch.float32,
    return_dict: bool = True,
    seed: int = 0,
    **arguments: Any,
) -> list[tuple[Any, ...]]:
    """A diffusers loop over a model that depends on its input: what the model saw, and what each step gave."""
    if "generator" in inspect.signature(scheduler.step).parameters:
        arguments = {"generator": torch.Generator().manual_seed(7), **arguments}
    sample = (randn(seed) * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(dtype)
    seen = []
    for row, timestep in enumerate(timesteps):
        if hook:
            hook(row, scheduler)
        scaled = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        model_output = randn(100 + row, dtype) + 0.1 * scaled
        output = scheduler.step(model_output, timestep, sample, **arguments, return_dict=return_dict)
        seen.append((scaled, *(output.to_tuple() if return_dict else output)))
        sample = output[0]
    return seen


def run(cell: Cell, scheduler: Any, **options: Any) -> list[tuple[Any, ...]]:
    timesteps, _ = oracle.prepare(cell, scheduler)
    return loop(scheduler, timesteps, **cell.arguments()[1], **options)


def worst(expected: Any, got: Any) -> float:
    """Largest error over largest reference, of any tensor in two nested results of the same structure and dtypes."""
    if isinstance(expected, Tensor):
        assert isinstance(got, Tensor)
        assert (expected.shape, expected.dtype) == (got.shape, got.dtype)
        reference = expected.double().abs().max().clamp_min(1e-30)
        return float((expected.double() - got.double()).abs().max() / reference)
    if isinstance(expected, (list, tuple)):
        assert type(expected) is type(got)
        assert len(expected) == len(got)
        return max((worst(*pair) for pair in zip(expected, got, strict=True)), default=0.0)
    assert same(expected, got), f"{expected!r} is not {got!r}"
    return 0.0


def assert_attributes_equal(original: Any, handle: Any, but: tuple[str, ...] = ()) -> None:
    """Every attribute as the original has it, so that the original could go on from here."""
    assert vars(handle).keys() == vars(original).keys()
    for name, value in vars(original).items():
        if name in but or inspect.isfunction(value):
            continue
        got = vars(handle)[name]
        if isinstance(value, Tensor) and value.isnan().any():  # KDPM2's first interpolated sigma
            value, got = value.nan_to_num(), got.nan_to_num()
        # Derivatives are differences that the original divides by small sigmas; the table takes them as they are.
        assert worst(value, got) <= 1e-4, name


# Every class


@pytest.mark.parametrize("name", oracle.AFFINE)
def test_equals_the_original_in_float32_twice_over(name: str) -> None:
    cell = base(name)
    original, handle = cell.build(), table_scheduler(cell.build(), strict=True)
    for return_dict in (True, False):  # the second run finds the first one's leftovers, as in a pipeline
        states: list[Any] = []

        def compare(row: int, scheduler: Any, states: list[Any] = states) -> None:
            assert_attributes_equal(states[row], scheduler, but=SPENT if scheduler.stats.hits > 4 else ())

        def keep(row: int, scheduler: Any, states: list[Any] = states) -> None:
            states.append(copy.deepcopy(scheduler))

        expected = run(cell, original, hook=keep, return_dict=return_dict)
        got = run(cell, handle, hook=compare, return_dict=return_dict)
        assert worst(expected, got) <= 1e-5
        assert_attributes_equal(original, handle)
    assert handle.stats == (2 * len(expected), 0)


@pytest.mark.parametrize("name", oracle.AFFINE)
def test_is_no_worse_than_the_original_in_half_precision(name: str) -> None:
    cell = base(name)
    original, handle = cell.build(), table_scheduler(cell.build(), strict=True)
    errors = {"original": 0.0, "handle": 0.0}
    for seed in range(16):
        exact = run(cell, cell.build(), seed=seed)[-1][1]
        for key, scheduler in (("original", original), ("handle", handle)):
            got = run(cell, scheduler, seed=seed, dtype=torch.bfloat16)[-1][1]
            errors[key] += float((got.double() - exact.double()).abs().mean() / exact.double().abs().mean())
    assert errors["handle"] <= 1.05 * errors["original"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", "eta=0.5"),
        ("TCDScheduler", "eta=1.0"),
        ("EulerDiscreteScheduler", "s_churn"),
        ("EulerDiscreteScheduler", "timesteps"),
        ("LMSDiscreteScheduler", "order=2"),
        ("PNDMScheduler", "skip_prk_steps=True"),
        ("UniPCMultistepScheduler", "solver_order=3"),
        ("UniPCMultistepScheduler", "solver_p"),
        ("UniPCMultistepScheduler", "mu exponential"),
        ("DPMSolverMultistepScheduler", "algorithm_type=sde-dpmsolver++"),
        ("DPMSolverMultistepScheduler", "mu exponential"),
        ("FlowMatchEulerDiscreteScheduler", "mu exponential"),
        ("FlowMatchEulerDiscreteScheduler", "begin=middle"),
        ("EulerDiscreteScheduler", "begin=middle"),
        ("DDIMScheduler", "begin=middle"),
        ("PNDMScheduler", "begin=middle"),
        ("HeunDiscreteScheduler", "steps=2"),
    ],
)
def test_equals_the_original_with_options(name: str, options: str) -> None:
    cells = [cell for cell in oracle.short_cells(name) if options in cell.label]
    cell = min(cells, key=lambda cell: len([part for part in cell.label.split(", ") if part not in base(name).label]))
    handle = table_scheduler(cell.build(), strict=True)
    expected, got = run(cell, cell.build()), run(cell, handle)
    exact = run(cell, cell.build(), dtype=torch.float64)[-1][1]
    own = worst(exact, expected[-1][1].double())  # two steps of Heun: the original's own error is larger
    assert worst(expected, got) <= max(1e-5, 2 * own)
    assert handle.stats == (len(expected), 0)


# What a handle is


@pytest.mark.parametrize("name", oracle.AFFINE)
def test_is_the_class_that_it_was_made_of(name: str) -> None:
    original = base(name).build()
    handle = table_scheduler(original)
    cls = type(original)
    assert isinstance(handle, cls)
    assert (type(handle).__name__, type(handle).__module__) == (cls.__name__, cls.__module__)
    assert table_scheduler_class(cls) is type(handle)
    assert table_scheduler_class(type(handle)) is type(handle)
    assert "__init__" not in vars(type(handle))
    assert inspect.signature(type(handle)) == inspect.signature(cls)
    for method in ("step", "set_timesteps", "scale_model_input", "add_noise"):
        if hasattr(original, method):
            assert inspect.signature(getattr(handle, method)) == inspect.signature(getattr(original, method))
    public = {key for key in dir(original) if not key.startswith("_")}
    assert {key for key in dir(handle) if not key.startswith("_")} == public | {"stats", "for_request"}
    assert vars(handle).keys() == vars(original).keys()
    for absent in ("init_noise_sigma", "scale_model_input", "set_begin_index", "_reset_stateful_cache"):
        assert hasattr(handle, absent) == hasattr(original, absent)


def test_making_one_changes_nothing_of_the_scheduler() -> None:
    original = diffusers.DPMSolverMultistepScheduler()
    before = {key: copy.deepcopy(value) for key, value in vars(original).items()}
    handle = table_scheduler(original)
    handle.set_timesteps(5)
    loop(handle, handle.timesteps)
    assert type(original) is diffusers.DPMSolverMultistepScheduler
    assert all(same(value, vars(original)[key]) for key, value in before.items())


def test_configs_files_and_pickles(tmp_path: Path) -> None:
    handle = table_scheduler(diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear"), strict=True)
    again: Any = type(handle).from_config(handle.config)
    assert isinstance(again, table_scheduler_class(diffusers.EulerDiscreteScheduler))
    assert dict(again.config) == dict(handle.config)
    assert type(diffusers.EulerDiscreteScheduler.from_config(handle.config)) is diffusers.EulerDiscreteScheduler
    handle.save_pretrained(tmp_path)
    loaded = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path)
    assert loaded.config.beta_schedule == "scaled_linear"
    assert type(handle).from_pretrained(tmp_path).config.beta_schedule == "scaled_linear"
    other = diffusers.UniPCMultistepScheduler.from_config(handle.config)
    assert other.config.beta_schedule == "scaled_linear"
    again.set_timesteps(4)
    expected = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear")
    expected.set_timesteps(4)
    assert worst(loop(expected, expected.timesteps), loop(again, again.timesteps)) <= 1e-5
    assert again.stats == (4, 0)


def test_a_class_without_a_table_is_refused_at_once() -> None:
    with pytest.raises(NotLinear, match="DPMSolverSDEScheduler is not a table"):
        table_scheduler(diffusers.DPMSolverSDEScheduler())
    with pytest.raises(TypeError, match="expected a diffusers scheduler, got dict"):
        table_scheduler({})
    with pytest.raises(TypeError, match=r"got the class DDIMScheduler; DDIMScheduler\(\) makes a scheduler of it"):
        table_scheduler(diffusers.DDIMScheduler)


def test_a_handle_can_be_tabulated_itself() -> None:
    handle = table_scheduler(diffusers.UniPCMultistepScheduler(), strict=True)
    handle.set_timesteps(6)
    loop(handle, handle.timesteps[:3])
    assert fastdiff.tabulate(handle, 6) == fastdiff.tabulate(diffusers.UniPCMultistepScheduler(), 6)
    with fastdiff.acquire(handle, "isolate", isolated="cloned") as lease:
        lease.scheduler.set_timesteps(6)
        loop(lease.scheduler, lease.scheduler.timesteps)
        assert lease.scheduler.stats == (6, 0)


# What a step costs


class Operations(TorchDispatchMode):
    """Counts operations, and those that read a device from the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.all, self.reads = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.all += name != "select"  # a view of one timestep
        self.reads += name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", oracle.AFFINE)
def test_no_step_reads_a_tensor_from_the_host(name: str) -> None:
    cell = base(name)
    handle = table_scheduler(cell.build(), strict=True)
    run(cell, handle)
    timesteps, _ = oracle.prepare(cell, handle)
    counts = []

    def count(row: int, scheduler: Any) -> None:
        counts.append((operations.all, operations.reads))

    with Operations() as operations:
        loop(handle, timesteps, hook=count, **cell.arguments()[1])
    assert operations.reads == counts[1][1]  # the first step compares the schedule, and on the CPU alone
    assert handle.stats.fallbacks == 0


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("FlowMatchEulerDiscreteScheduler", 1), ("EulerDiscreteScheduler", 2), ("DPMSolverMultistepScheduler", 5),
        ("DDIMScheduler", 5), ("UniPCMultistepScheduler", 12),
    ],
)  # fmt: skip
def test_a_step_is_a_few_operations(name: str, most: int) -> None:
    handle = table_scheduler(getattr(diffusers, name)(), strict=True)
    handle.set_timesteps(10)
    sample = randn(0)
    for row, timestep in enumerate(handle.timesteps):
        if hasattr(handle, "scale_model_input"):
            handle.scale_model_input(sample, timestep)
        model_output = randn(row)
        with Operations() as operations:
            sample = handle.step(model_output, timestep, sample, return_dict=False)[0]
        if 0 < row < 9:
            assert operations.all <= most


@pytest.mark.cuda
@pytest.mark.parametrize(
    "name",
    ["EulerDiscreteScheduler", "DDIMScheduler", "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_waits_for_the_device(name: str, dtype: torch.dtype) -> None:
    def run(scheduler: Any, strictly: bool) -> Tensor:
        scheduler.set_timesteps(6, device="cuda")
        sample = randn(0, dtype).cuda() * float(getattr(scheduler, "init_noise_sigma", 1.0))
        outputs = [randn(1 + row, dtype).cuda() for row in range(6)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if strictly else "default")
        try:
            for model_output, timestep in zip(outputs, scheduler.timesteps, strict=True):
                if hasattr(scheduler, "scale_model_input"):
                    scheduler.scale_model_input(sample, timestep)
                sample = scheduler.step(model_output, timestep, sample, return_dict=False)[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sample

    original, handle = getattr(diffusers, name)(), table_scheduler(getattr(diffusers, name)(), strict=True)
    run(handle, strictly=False)  # probes, and remembers
    expected, got = run(original, strictly=False), run(handle, strictly=True)
    assert worst(expected, got) <= (1e-5 if dtype == torch.float32 else 5e-2)
    assert handle.stats == (12, 0)


# Off the schedule


def pair(scheduler: Any) -> tuple[Any, Any]:
    """A scheduler, and a handle of it."""
    return scheduler, table_scheduler(scheduler)


def both(original: Any, handle: Any, act: Callable[[Any], Any]) -> int:
    """Do the same to both; they must give the same. The number of steps that the handle left to the original."""
    before = handle.stats
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert worst(act(original), act(handle)) <= 1e-5
    assert_attributes_equal(original, handle, but=(*SPENT, "_internal_dict"))  # edited attributes become items
    return int(handle.stats.fallbacks - before.fallbacks)


def with_foreign(scheduler: Any) -> Any:
    """A run whose third timestep is none of the schedule's."""
    scheduler.set_timesteps(8)
    timesteps = [timestep.clone() if row == 2 else timestep for row, timestep in enumerate(scheduler.timesteps)]
    timesteps[2] += 1
    return loop(scheduler, timesteps)


@pytest.mark.parametrize(
    ("name", "fallbacks"),
    [("DDIMScheduler", 1), ("DPMSolverMultistepScheduler", 1), ("UniPCMultistepScheduler", 3), ("LCMScheduler", 1)],
)  # UniPC keeps the timesteps of as many rows as its order
def test_a_foreign_timestep_is_the_originals_and_the_run_goes_on_by_table(name: str, fallbacks: int) -> None:
    original, handle = pair(getattr(diffusers, name)())
    assert both(original, handle, with_foreign) == fallbacks
    assert handle.stats.hits == 8 - fallbacks


def test_timesteps_are_found_by_value_too() -> None:
    for name in ("DDIMScheduler", "PNDMScheduler", "FlowMatchEulerDiscreteScheduler"):
        original, handle = pair(getattr(diffusers, name)())
        for scheduler in (original, handle):
            scheduler.set_timesteps(6)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(0)
        assert both(original, handle, lambda scheduler: loop(scheduler, scheduler.timesteps.clone())) == 0
    numbers = diffusers.DDIMScheduler()
    original, handle = pair(numbers)
    for scheduler in (original, handle):
        scheduler.set_timesteps(6)
    assert both(original, handle, lambda scheduler: loop(scheduler, scheduler.timesteps.tolist())) == 0


def test_the_original_still_refuses_what_it_refuses() -> None:
    handle = table_scheduler(diffusers.EulerDiscreteScheduler())
    handle.set_timesteps(4)
    with pytest.raises(TypeError, match="sample"):
        handle.step(randn(0), handle.timesteps[0])
    with pytest.raises(TypeError, match="nothing"):
        handle.step(randn(0), handle.timesteps[0], randn(0), nothing=1)
    fresh = table_scheduler(diffusers.UniPCMultistepScheduler())
    warnings.simplefilter("ignore")
    with pytest.raises(ValueError, match="integer indices"):
        handle.step(randn(0), 3, randn(1))
    with pytest.raises(ValueError, match="set_timesteps"):
        fresh.step(randn(0), 3, randn(0))


def halve_history(row: int, scheduler: Any) -> None:
    if row == 3:
        scheduler.model_outputs[-1] = scheduler.model_outputs[-1] * 0.5


def forget_sample(row: int, scheduler: Any) -> None:
    if row == 3:
        scheduler.last_sample = None


def start_over(row: int, scheduler: Any) -> None:
    if row == 3:
        scheduler.lower_order_nums = 0


def stretch_sigmas(row: int, scheduler: Any) -> None:
    if row == 3:
        scheduler.sigmas = scheduler.sigmas * 1.01


def copy_tables(row: int, scheduler: Any) -> None:
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.clone()  # what add_noise does on another device
    scheduler.sigmas = scheduler.sigmas.clone()


@pytest.mark.parametrize(
    ("name", "edit", "fallbacks"),
    [
        ("DPMSolverMultistepScheduler", halve_history, 1),
        ("UniPCMultistepScheduler", halve_history, 1),
        ("UniPCMultistepScheduler", forget_sample, 1),
        ("DPMSolverMultistepScheduler", start_over, 2),  # it takes two steps to be of second order again
        ("UniPCMultistepScheduler", stretch_sigmas, 5),  # no row of the schedule is left
        ("UniPCMultistepScheduler", copy_tables, 0),
    ],
)
def test_edits_in_mid_run_are_honoured_by_the_originals_step(name: str, edit: Hook, fallbacks: int) -> None:
    def edited(scheduler: Any) -> Any:
        scheduler.set_timesteps(8)
        return loop(scheduler, scheduler.timesteps, hook=edit)

    original, handle = pair(getattr(diffusers, name)())
    assert both(original, handle, edited) == fallbacks


def stretch_data(row: int, scheduler: Any) -> None:
    if row == 3:
        scheduler.sigmas.data[4] *= 0.5


def stretch_array(row: int, scheduler: Any) -> None:
    if row == 3:
        scheduler.sigmas.numpy()[4] *= 0.5


@pytest.mark.parametrize("edit", [stretch_data, stretch_array])
def test_what_no_version_counter_tells_is_not_seen_as_the_docstring_says(edit: Hook) -> None:
    handle = table_scheduler(diffusers.EulerDiscreteScheduler(), strict=True)
    runs = []
    for hook in (edit, None):
        handle.set_timesteps(8)
        runs.append(loop(handle, handle.timesteps, hook=hook))
    assert worst(*runs) == 0.0
    assert handle.stats == (16, 0)
    assert "tensor.data" in (table_scheduler.__doc__ or "")


def repeat_last_sigma(scheduler: Any) -> None:
    scheduler.sigmas[-1] = scheduler.sigmas[-2]  # Cosmos pipelines, after set_timesteps


def scale_sigmas(scheduler: Any) -> None:
    scheduler.sigmas.mul_(1.01)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler", "EDMEulerScheduler"])
@pytest.mark.parametrize("edit", [repeat_last_sigma, scale_sigmas])
@pytest.mark.parametrize("inference", [False, True])
def test_a_schedule_that_was_written_into_is_the_originals(
    name: str, edit: Callable[[Any], None], inference: bool
) -> None:
    def edited(scheduler: Any) -> Any:
        with torch.inference_mode(inference):
            scheduler.set_timesteps(8)
            edit(scheduler)
            return loop(scheduler, scheduler.timesteps)

    def plain(scheduler: Any) -> Any:
        scheduler.set_timesteps(8)
        return loop(scheduler, scheduler.timesteps)

    original, handle = pair(getattr(diffusers, name)())
    for _ in range(2):
        assert both(original, handle, edited) == 8
    request = handle.for_request()  # of a run that began with an edit
    with pytest.warns(UserWarning, match="sigmas was edited"):
        request.step(randn(0), request.timesteps[0], randn(1))
    assert both(original, handle, plain) == 0  # the edit was to that schedule alone


@pytest.mark.parametrize("name", oracle.AFFINE)
@pytest.mark.parametrize("row", [0, 2])
def test_no_write_into_an_attribute_is_missed(name: str, row: int) -> None:
    """Each tensor, array and list of numbers, in place, before the run and within it."""
    cell = base(name)
    scheduler = cell.build()
    oracle.prepare(cell, scheduler)
    attributes = [key for key, value in vars(scheduler).items() if written(value)]
    assert "timesteps" in attributes
    fallbacks = []
    for attribute in attributes:

        def edit(at: int, scheduler: Any, attribute: str = attribute) -> None:
            if at == row:
                assert written(vars(scheduler)[attribute])

        original, handle = pair(cell.build())
        expected = outcome(partial(run, cell, original, hook=edit))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = outcome(partial(run, cell, handle, hook=edit))
        if isinstance(expected, str):
            assert got == expected, attribute
        else:
            assert worst(expected, got) <= 1e-5, attribute
        fallbacks.append(handle.stats.fallbacks)
    assert all(fallbacks) or len(expected) <= row


def written(value: Any) -> bool:
    """Write into a table: whether it is one."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim < 2:
        value *= 0.75 if isinstance(value, Tensor) and value.dtype.is_floating_point else 1
        value += 0 if isinstance(value, Tensor) and value.dtype.is_floating_point else 1
        return True
    if type(value) is list and value and type(value[0]) is int:
        value[-1] = 3 - value[-1]
        return True
    return False


def outcome(act: Callable[[], Any]) -> Any:
    """What it gives, or what it raises."""
    try:
        return act()
    except (ValueError, IndexError, RuntimeError) as error:
        return repr(error)


@pytest.mark.parametrize(("name", "fallbacks"), [("EulerDiscreteScheduler", 4), ("DDIMScheduler", 0)])
def test_a_step_done_twice_is_what_it_is_in_the_original(name: str, fallbacks: int) -> None:
    def twice(scheduler: Any) -> Any:
        scheduler.set_timesteps(8)
        return loop(scheduler, [*scheduler.timesteps[:4], *scheduler.timesteps[3:7]])

    original, handle = pair(getattr(diffusers, name)())
    assert both(original, handle, twice) == fallbacks


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "DDIMScheduler"])
def test_set_timesteps_in_mid_run_begins_anew(name: str) -> None:
    def interrupted(scheduler: Any) -> Any:
        scheduler.set_timesteps(9)
        first = loop(scheduler, scheduler.timesteps[:5])
        scheduler.set_timesteps(6)
        return first + loop(scheduler, scheduler.timesteps)

    original, handle = pair(getattr(diffusers, name)())
    assert both(original, handle, interrupted) == 0


def test_an_abandoned_run_without_set_timesteps_is_the_originals() -> None:
    def abandoned(scheduler: Any) -> Any:
        scheduler.set_timesteps(9)
        first = loop(scheduler, scheduler.timesteps[:5])
        return first + loop(scheduler, scheduler.timesteps[:3])

    original, handle = pair(diffusers.PNDMScheduler())
    assert both(original, handle, abandoned) > 0


def test_arguments_that_no_row_covers() -> None:
    original, handle = pair(diffusers.DDIMScheduler())
    for scheduler in (original, handle):
        scheduler.set_timesteps(5)
    given: dict[str, Any] = {"eta": 1.0, "variance_noise": randn(3), "generator": None}
    assert both(original, handle, lambda scheduler: loop(scheduler, scheduler.timesteps, **given)) == 5
    etas = [0.0, 0.3, 0.6, 0.0, 1.0]  # another option a row is another table's row, and no fallback

    def varied(scheduler: Any) -> Any:
        generator = torch.Generator().manual_seed(1)
        return [
            scheduler.step(randn(row), timestep, randn(9), eta=etas[row], generator=generator, return_dict=False)
            for row, timestep in enumerate(scheduler.timesteps)
        ]

    assert both(original, handle, varied) == 0


def test_the_first_fallback_warns_and_strict_raises() -> None:
    def off_schedule(handle: Any) -> None:
        handle.set_timesteps(6)
        loop(handle, handle.timesteps[:2])
        for _ in range(2):
            handle.step(randn(0), handle.timesteps[2] + 1, randn(0))

    handle = table_scheduler(diffusers.DPMSolverMultistepScheduler())
    with pytest.warns(UserWarning, match="DPMSolverMultistepScheduler at row 2 .*: its own step.*timestep") as caught:
        off_schedule(handle)
    ours = [warning for warning in caught if "its own step" in str(warning.message)]
    assert [Path(warning.filename) for warning in ours] == [Path(__file__)]
    assert handle.stats == (2, 2)
    with pytest.warns(UserWarning, match="DDIMScheduler at row 2 .*: its own step"):  # which keeps no index itself
        off_schedule(table_scheduler(diffusers.DDIMScheduler()))
    strict = table_scheduler(diffusers.DPMSolverMultistepScheduler(), strict=True)
    with pytest.raises(FastdiffError, match=r"DPMSolverMultistepScheduler at row 2 .*: expected the next"):
        off_schedule(strict)
    loop(strict, strict.timesteps[2:])  # nothing moved
    assert strict.stats == (6, 0)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])  # without and with an index of its own
@pytest.mark.parametrize("steps", [0, 2])
def test_a_fallback_says_which_row_of_an_image_to_image_run_it_is(name: str, steps: int) -> None:
    handle = table_scheduler(getattr(diffusers, name)())
    handle.set_timesteps(8)
    loop(handle, handle.timesteps[5:])  # an earlier run from elsewhere
    handle = handle.for_request()
    handle.set_timesteps(8)
    timesteps = handle.timesteps[3:]
    loop(handle, timesteps[:steps])
    handle.alphas_cumprod.mul_(0.5)
    with pytest.warns(UserWarning, match=rf"{name} at row {steps} \(timesteps\[{3 + steps}\]\): its own step"):
        loop(handle, timesteps[steps:])


def test_an_option_that_is_not_linear_falls_back_and_strict_raises() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(thresholding=True)
    original, handle = pair(scheduler)
    for one in (original, handle):
        one.set_timesteps(5)
    assert both(original, handle, lambda scheduler: loop(scheduler, scheduler.timesteps)) == 5
    strict = table_scheduler(scheduler, strict=True)
    strict.set_timesteps(5)
    with pytest.raises(NotLinear, match="thresholding"):
        loop(strict, strict.timesteps)


# Configs


def test_an_edited_config_counts() -> None:
    original, handle = pair(diffusers.DDIMScheduler())

    def run(scheduler: Any) -> Any:
        scheduler.set_timesteps(5)
        return loop(scheduler, scheduler.timesteps)

    assert both(original, handle, run) == 0
    for scheduler in (original, handle):
        scheduler.config.prediction_type = "v_prediction"  # an attribute of the config: not how, but it is done
    assert both(original, handle, run) == 0
    for scheduler in (original, handle):
        scheduler.register_to_config(prediction_type="sample", clip_sample=False)
    assert both(original, handle, run) == 0
    for scheduler in (original, handle):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    assert both(original, handle, run) == 0
    for scheduler in (original, handle):
        scheduler.alphas_cumprod.mul_(0.99)
    assert both(original, handle, run) == 0


def test_mu_is_the_requests_and_not_the_next_ones() -> None:
    config = {"use_dynamic_shifting": True, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    template = diffusers.DPMSolverMultistepScheduler(**config)
    handle = table_scheduler(template, strict=True)
    other = handle.for_request()
    copied = copy.deepcopy(handle)
    for mu in (1.2, None, 0.4):
        expected = diffusers.DPMSolverMultistepScheduler(**config)
        expected.set_timesteps(5, mu=mu)
        handle.set_timesteps(5, mu=mu)
        assert worst(loop(expected, expected.timesteps), loop(handle, handle.timesteps)) <= 1e-5
    for untouched in (template, other, copied):
        assert untouched.config.flow_shift == 1.0
    assert handle.stats == (15, 0)
    fresh = diffusers.DPMSolverMultistepScheduler(**config)
    fresh.set_timesteps(5)
    for copied in (handle, copy.deepcopy(handle), pickle.loads(pickle.dumps(handle)), handle.for_request()):
        assert copied.config.flow_shift == expected.config.flow_shift != 1.0  # as the original has it, during the run
        copied.set_timesteps(5)
        assert torch.equal(copied.timesteps, fresh.timesteps)
        assert copied.config.flow_shift == 1.0


def test_options_of_one_run_are_not_anothers() -> None:
    """A step that fits no row, under other options, must not leave the options with the old rows."""
    original, handle = pair(diffusers.EulerDiscreteScheduler())

    def run(scheduler: Any) -> Any:
        scheduler.set_timesteps(6)
        first = loop(scheduler, scheduler.timesteps[:3])
        generator = torch.Generator().manual_seed(1)
        seen = [first]
        for row in (1, 3):  # out of turn, then another
            timestep = scheduler.timesteps[row]
            arguments = {"s_churn": 3.0, "generator": generator, "return_dict": False}
            seen.append([scheduler.step(randn(row), timestep, randn(9), **arguments)])
        return seen

    assert both(original, handle, run) == 2


# Copies

SOME = (
    "UniPCMultistepScheduler",
    "PNDMScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "EulerAncestralDiscreteScheduler",
)


def draws(seed: int) -> Any:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", [*SOME, "FlowMatchLCMScheduler", "SASolverScheduler", "DPMSolverSinglestepScheduler"])
def test_a_copy_in_mid_run_is_a_request_with_its_row_and_memory(name: str) -> None:
    handle = table_scheduler(base(name).build(), strict=True)
    handle.set_timesteps(7)
    handle.for_request()
    rows = list(handle.timesteps)
    whole = loop(handle.for_request(), rows)
    first = loop(handle, rows[:4])
    assert worst(whole[:4], first) == 0.0
    copies = [copy.deepcopy(handle), copy.deepcopy(copy.copy(handle))]
    if name != "SASolverScheduler":  # holds a lambda, so that the original cannot be pickled either
        copies.append(pickle.loads(pickle.dumps(handle)))
    request = handle.for_request()
    assert request.stats == (0, 0)
    assert worst(whole, loop(request, request.timesteps)) == 0.0

    def rest(scheduler: Any) -> Any:
        sample, seen = first[-1][1], []
        arguments = {"generator": draws(3)} if "generator" in inspect.signature(scheduler.step).parameters else {}
        for row, timestep in list(enumerate(scheduler.timesteps))[4:]:
            sample = scheduler.step(randn(100 + row), timestep, sample, **arguments).prev_sample
            seen.append(sample)
        return seen

    expected = rest(handle)
    for copied in copies:
        assert isinstance(copied, TableScheduler)
        assert worst(expected, rest(copied)) == 0.0
        assert copied.stats.fallbacks == 0
        assert_attributes_equal(handle, copied)


def test_a_request_shares_tables_and_no_memory() -> None:
    handle = table_scheduler(diffusers.UniPCMultistepScheduler(), strict=True)
    handle.set_timesteps(7)
    loop(handle, handle.timesteps[:4])
    copied, request = copy.deepcopy(handle), handle.for_request()
    assert handle.alphas_cumprod is request.alphas_cumprod
    assert copied.model_outputs[1] is not handle.model_outputs[1]
    assert copied.last_sample.data_ptr() != handle.last_sample.data_ptr()
    assert request.model_outputs == [None, None]
    assert (request.last_sample, request.step_index, copied.step_index) == (None, None, 4)
    copied.model_outputs[1].zero_()
    assert handle.model_outputs[1].any()
    request.model_outputs[0] = "mine"
    assert handle.for_request().model_outputs == [None, None]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("attribute", ["sigmas", "timesteps", "alphas_cumprod"])
def test_a_deep_copy_is_independent(attribute: str, inference: bool) -> None:
    original = diffusers.EulerDiscreteScheduler()
    plain = copy.deepcopy(original)
    plain.set_timesteps(7)
    expected = loop(plain, plain.timesteps)
    handle = table_scheduler(original, strict=True)
    original.alphas_cumprod.zero_()  # a handle is a copy of its scheduler
    handle.set_timesteps(7)
    with torch.inference_mode(inference):
        copied, other = copy.deepcopy((handle, handle))
        again = copy.deepcopy(copied)
        assert copied is other
        vars(copied)[attribute].mul_(0.5)
        assert worst(expected, loop(handle, handle.timesteps)) <= 1e-5
        assert worst(expected, loop(again, again.timesteps)) <= 1e-5
        with pytest.raises(FastdiffError, match=f"but {attribute} (was edited|are not those)"):
            copied.step(randn(0), copied.timesteps[0], randn(1))
        again.set_timesteps(7)
        assert worst(expected, loop(again, again.timesteps)) <= 1e-5
    assert handle.stats.fallbacks == again.stats.fallbacks == 0


def test_a_deep_copy_is_stepped_by_the_timesteps_of_either() -> None:
    """As vLLM-Omni does; by memory, so that no device is asked."""
    handle = table_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(), strict=True)
    handle.set_timesteps(6)
    expected = loop(handle, handle.timesteps)
    copied = copy.deepcopy(handle.for_request())
    copied.set_begin_index(0)
    own = copy.deepcopy(copied)
    reads = []

    def count(row: int, scheduler: Any) -> None:
        reads.append(operations.reads)

    with Operations() as operations:
        assert worst(expected, loop(copied, handle.timesteps, hook=count)) == 0.0
    assert reads[1:] == [reads[1]] * 5
    assert worst(expected, loop(own, own.timesteps)) == 0.0


def test_a_write_into_a_shared_table_is_the_originals_in_every_request() -> None:
    original, handle = pair(diffusers.UniPCMultistepScheduler())
    for scheduler in (original, handle):
        scheduler.set_timesteps(7)
        loop(scheduler, scheduler.timesteps)
    request = handle.for_request()
    request.sigmas.mul_(1.1)
    original.set_timesteps(7)
    original.sigmas.mul_(1.1)
    assert both(original, request, lambda scheduler: loop(scheduler, scheduler.timesteps)) == 7
    with pytest.warns(UserWarning, match="sigmas was edited"):
        loop(handle.for_request(), handle.timesteps)


def test_an_edit_survives_a_copy() -> None:
    handle = table_scheduler(diffusers.DPMSolverMultistepScheduler(), strict=True)
    handle.set_timesteps(7)
    loop(handle, handle.timesteps[:4])
    handle.model_outputs[-1] = handle.model_outputs[-1] * 2
    for copied in (copy.deepcopy(handle), copy.copy(handle), pickle.loads(pickle.dumps(handle))):
        with pytest.raises(FastdiffError, match="model_outputs was edited"):
            copied.step(randn(0), copied.timesteps[4], randn(1))
    handle.set_timesteps(7)
    loop(handle, handle.timesteps[:4])
    handle.sigmas[-1] = handle.sigmas[-2]
    for copied in (copy.deepcopy(handle), copy.copy(handle), pickle.loads(pickle.dumps(handle)), handle.for_request()):
        with pytest.raises(FastdiffError, match="sigmas was edited"):
            copied.step(randn(0), copied.timesteps[0 if copied.step_index is None else 4], randn(1))


def test_handles_run_side_by_side_in_threads() -> None:
    template = table_scheduler(diffusers.UniPCMultistepScheduler(), strict=True)

    def ask(number: int) -> Any:
        handle = template.for_request()
        handle.set_timesteps(5 + number % 3)
        return loop(handle, handle.timesteps, seed=number)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(ask, range(24)))
    for number, result in enumerate(results):
        original = diffusers.UniPCMultistepScheduler()
        original.set_timesteps(5 + number % 3)
        assert worst(loop(original, original.timesteps, seed=number), result) <= 1e-5


# Hosts: what serving frameworks call, in their order


def sglang_reset(scheduler: Any) -> None:
    """Of SGLang's `DenoisingStage._before_denoising_loop`, by attribute name."""
    order = getattr(scheduler.config, "solver_order", 1)
    blank = {
        "_step_index": None, "_begin_index": None, "lower_order_nums": 0, "last_sample": None, "this_order": 0,
        "model_outputs": [None] * order, "timestep_list": [None] * order,
    }  # fmt: skip
    for name, value in blank.items():
        if hasattr(scheduler, name):
            setattr(scheduler, name, value)
    scheduler.set_begin_index(0)


@pytest.mark.parametrize(
    "name",
    [
        "FlowMatchEulerDiscreteScheduler",
        "UniPCMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
    ],
)
def test_sglangs_call_sequence(name: str) -> None:
    template, stage = pair(getattr(diffusers, name)())

    def serve(template: Any) -> Any:
        seen = []
        for isolated in (True, False, False):  # a clone for one request, then the stage's own for two
            scheduler = copy.deepcopy(template) if isolated else template
            scheduler.set_timesteps(6, device="cpu")
            for _ in range(2):  # the second loop is over the same schedule: the timesteps were there already
                sglang_reset(scheduler)
                sample = randn(0)
                for row, timestep in enumerate(scheduler.timesteps):
                    if hasattr(scheduler, "scale_model_input"):
                        scheduler.scale_model_input(sample, timestep)
                    sample = scheduler.step(
                        model_output=randn(row), timestep=timestep, sample=sample, return_dict=False
                    )[0]
                seen.append(sample)
        return seen

    assert both(template, stage, serve) == 0
    assert stage.stats.fallbacks == 0


def test_vllm_omnis_call_sequence() -> None:
    template, handle = pair(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))

    def serve(template: Any) -> Any:
        requests = []
        for number in range(3):
            scheduler = copy.deepcopy(template)
            scheduler.set_timesteps(4 + number, mu=0.5 + number, device="cpu")
            scheduler.set_begin_index(0)
            requests.append([scheduler, 0, randn(number)[:1]])
        while any(row < len(scheduler.timesteps) for scheduler, row, _ in requests):
            for request in requests:  # a batched model call, then each request's own step
                scheduler, row, sample = request
                if row < len(scheduler.timesteps):
                    stepped = scheduler.step(randn(row)[:1], scheduler.timesteps[row], sample, return_dict=False)
                    request[1:] = [row + 1, stepped[0]]
        fallbacks = [scheduler.stats.fallbacks for scheduler, _, _ in requests if isinstance(scheduler, TableScheduler)]
        assert not any(fallbacks)
        return [sample for _, _, sample in requests]

    assert both(template, handle, serve) == 0


# Pipelines


def call(pipe: Any, scheduler: Any, **arguments: Any) -> tuple[Tensor, list[Tensor]]:
    """A pipeline's own image, and the latents that a callback saw."""
    seen: list[Tensor] = []

    def callback(pipe: Any, row: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["latents"].clone())
        return {"latents": tensors["latents"] * 0.99} if row == 1 else {}  # a callback may change them

    own, pipe.scheduler = pipe.scheduler, scheduler
    try:
        images: Tensor = pipe(**arguments, callback_on_step_end=callback, output_type="pt").images
    finally:
        pipe.scheduler = own
    return images, seen


def generators(count: int) -> list[torch.Generator]:
    return [draws(seed) for seed in range(count)]


def assert_pipelines_equal(pipe: Any, scheduler: Any, **arguments: Any) -> None:
    handle = table_scheduler(scheduler, strict=True)
    for _ in range(2):
        expected = call(pipe, scheduler, generator=generators(2), **arguments)
        got = call(pipe, handle, generator=generators(2), **arguments)
        assert worst(expected, got) <= 1e-4
    assert handle.stats.hits == 2 * len(expected[1])
    assert handle.stats.fallbacks == 0


PROMPTS = ["a handwritten seven", "a handwritten two"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("EulerAncestralDiscreteScheduler", {}), ("UniPCMultistepScheduler", {}), ("DDIMScheduler", {"eta": 0.7}),
        ("PNDMScheduler", {}), ("HeunDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", {"timesteps": [900, 500, 100]}),
    ],
)  # fmt: skip
def test_stable_diffusion(pipe: Any, name: str, arguments: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    assert_pipelines_equal(pipe, scheduler, prompt=PROMPTS, num_inference_steps=6, guidance_scale=3.0, **arguments)


@pytest.mark.parametrize(
    "name",
    [
        "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "DDIMScheduler", "PNDMScheduler", "LCMScheduler",
        "HeunDiscreteScheduler",
    ],
)  # fmt: skip
def test_image_to_image(pipe: Any, name: str) -> None:
    image_to_image = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    image_to_image.set_progress_bar_config(disable=True)
    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    image = torch.rand(2, 3, 32, 32, generator=draws(0))
    assert_pipelines_equal(
        image_to_image, scheduler, prompt=PROMPTS, image=image, strength=0.6, num_inference_steps=9, guidance_scale=3.0
    )


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_flux_with_mu(name: str) -> None:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        axes_dims_rope=(4, 4, 8), joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if name.startswith("UniPC") else {}
    scheduler = getattr(diffusers, name)(use_dynamic_shifting=True, **flow)
    flux = diffusers.FluxPipeline(
        scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=transformer,
    )  # fmt: skip
    flux.set_progress_bar_config(disable=True)
    embeddings = {
        "prompt_embeds": torch.randn(2, 7, 32, generator=draws(0)),
        "pooled_prompt_embeds": torch.randn(2, 32, generator=draws(1)),
    }
    assert_pipelines_equal(flux, scheduler, **embeddings, height=32, width=32, num_inference_steps=5)


def test_saving_a_pipeline_keeps_its_scheduler(pipe: Any, tmp_path: Path) -> None:
    own = pipe.scheduler
    try:
        pipe.scheduler = table_scheduler(own)
        pipe.save_pretrained(tmp_path)
        assert pipe.config["scheduler"] == ("diffusers", type(own).__name__)
    finally:
        pipe.scheduler = own
    assert type(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path).scheduler) is type(own)


@pytest.mark.parametrize("name", ["EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete", "HeunDiscrete"])
def test_probing_logs_nothing_of_what_no_user_did(name: str) -> None:
    """Some schedulers warn when `step` comes without `scale_model_input` before it."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign, assignment]
    logger = logging.getLogger("diffusers")
    logger.addHandler(handler)
    try:
        fastdiff.table_cache.clear()
        scheduler = getattr(diffusers, f"{name}Scheduler")(num_train_timesteps=997)  # rehearsed by no other test
        handle = table_scheduler(scheduler)
        handle.set_timesteps(3)
        loop(handle, handle.timesteps)
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []


@pytest.mark.parametrize("begin", [None, 4])
@pytest.mark.parametrize("name", ["FlowMatchHeunDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_noise_that_is_added_before_the_first_row_sets_its_index(name: str, begin: int | None) -> None:
    """`scale_noise` of image-to-image looks the first timestep up, and leaves its index for `step`."""
    template = getattr(diffusers, name)(shift=3.0)
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    made = []
    for scheduler in (copy.deepcopy(template), fastdiff.table_scheduler(template, strict=True)):
        scheduler.set_timesteps(6)
        if begin is not None:
            scheduler.set_begin_index(begin)
        timesteps = scheduler.timesteps[begin or 0 :]
        sample = scheduler.scale_noise(noise.flip(1), timesteps[:1], noise)
        for t in timesteps:
            sample = scheduler.step(torch.sin(sample), t, sample).prev_sample
        made.append(sample)
    torch.testing.assert_close(made[1], made[0])


@pytest.mark.parametrize("error", [Unsettled("ask again"), MemoryError()])
def test_why_there_was_no_rehearsal_is_forgotten_where_it_was_of_the_moment(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """One call falls back, and says so; the next one has its table."""

    def disturbed(*args: Any) -> Any:
        raise error

    table_cache.clear()
    sample, handles = torch.ones(1, 2, 2, 2), [fastdiff.table_scheduler(diffusers.LCMScheduler()) for _ in range(2)]
    for handle in handles:
        handle.set_timesteps(3, original_inference_steps=30 + len(str(error)))
    monkeypatch.setattr(rehearsal, "probe", disturbed)
    with pytest.warns(UserWarning, match="its own step"):
        handles[0].step(sample, handles[0].timesteps[0], sample, generator=torch.Generator())
    monkeypatch.undo()
    handles[1].step(sample, handles[1].timesteps[0], sample, generator=torch.Generator())
    assert [handle.stats for handle in handles] == [(0, 1), (1, 0)]


def test_a_table_that_was_made_while_the_default_dtype_changed_is_in_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the unpruned one, of which a rehearsal goes on."""

    def disturbed(*args: Any) -> Any:
        torch.set_default_dtype(torch.float16)
        return rightly(*args)

    table_cache.clear()
    rightly, sample = probe, torch.ones(1, 2, 2, 2)
    original, *handles = diffusers.LCMScheduler(), *(table_scheduler(diffusers.LCMScheduler()) for _ in range(2))
    for scheduler in (original, *handles):
        scheduler.set_timesteps(3, original_inference_steps=41)
    monkeypatch.setattr(rehearsal, "probe", disturbed)
    try:
        with pytest.warns(UserWarning, match="its own step"):
            handles[0].step(sample, handles[0].timesteps[0], sample, generator=torch.Generator())
    finally:
        torch.set_default_dtype(torch.float32)
    monkeypatch.undo()
    expected, made = (
        one.step(sample, one.timesteps[0], sample, generator=torch.Generator().manual_seed(0)).prev_sample
        for one in (original, handles[1])
    )
    torch.testing.assert_close(made, expected)
    assert [handle.stats for handle in handles] == [(0, 1), (1, 0)]
