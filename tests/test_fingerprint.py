"""Every way of changing a scheduler changes its fingerprint, and only a change does."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.fingerprint import fingerprint, freeze


def scheduler() -> Any:
    return diffusers.UniPCMultistepScheduler(disable_corrector=[1])


def _in_place(scheduler: Any) -> None:
    scheduler.alphas_cumprod[3] += 0.001


def _through_data(scheduler: Any) -> None:
    scheduler.sigma_t.data[3] += 0.001


def _through_numpy(scheduler: Any) -> None:
    scheduler.lambda_t.numpy()[3] += 0.001


def _other_memory(scheduler: Any) -> None:
    scheduler.betas.data = scheduler.betas + 0.001


def _fewer(scheduler: Any) -> None:
    scheduler.betas.resize_(500)


def _replaced(scheduler: Any) -> None:
    scheduler.alpha_t = scheduler.alpha_t + 0.001


def _scalar(scheduler: Any) -> None:
    scheduler.init_noise_sigma = 2.0


def _new_attribute(scheduler: Any) -> None:
    scheduler._shift = 3.0


def _deleted(scheduler: Any) -> None:
    del scheduler.predict_x0


def _registered(scheduler: Any) -> None:
    scheduler.register_to_config(solver_order=3)


def _list_in_config(scheduler: Any) -> None:
    scheduler.config["disable_corrector"].append(2)


def _numbers(scheduler: Any) -> None:
    scheduler.gains = [1.0, 0.5]


def _mapping(scheduler: Any) -> None:
    scheduler.gains = {"first": (1.0, 2), "last": 0.5}


def _numpy_scalar(scheduler: Any) -> None:
    scheduler._shift = np.float64(3.0)


def _with_gaps(scheduler: Any) -> None:
    scheduler.gains = [None, torch.tensor(1.0)]


def _in_words(scheduler: Any) -> None:
    scheduler.gains = {"first": np.ones((2, 2)), "of": {1.5}}


def _namespace(scheduler: Any) -> None:
    scheduler.gains = SimpleNamespace(first=1.0, table=np.arange(5000))


def _dtype(scheduler: Any) -> None:
    scheduler.computes_in = torch.float64


def _level(scheduler: Any) -> None:
    scheduler.level = Fraction(1, 3)


def _nested(scheduler: Any) -> None:
    scheduler.inner = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)


def _function(scheduler: Any) -> None:
    scheduler.convert_model_output = lambda model_output, sample: model_output


CHANGES = (
    _in_place, _through_data, _through_numpy, _other_memory, _fewer, _replaced, _scalar, _new_attribute, _deleted,
    _registered, _list_in_config, _numbers, _mapping, _numpy_scalar, _with_gaps, _in_words, _namespace, _dtype,
    _level, _nested, _function,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_however_it_was_made(change: Callable[[Any], None]) -> None:
    one = scheduler()
    before = fingerprint(one)
    assert fingerprint(one) is before
    change(one)
    after = fingerprint(one)
    assert after != before
    assert fingerprint(one) is after


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_change_gives_the_same_fingerprint(change: Callable[[Any], None]) -> None:
    one, other = scheduler(), scheduler()
    fingerprint(one)
    for each in (one, other):
        change(each)
    assert fingerprint(one) == fingerprint(other)
    assert hash(fingerprint(one)) == hash(fingerprint(other))
    assert fingerprint(copy.deepcopy(one)) == fingerprint(one)


@pytest.mark.parametrize("shape", [(), (4,)])
def test_tensors_that_numpy_has_no_dtype_for_are_read_too(shape: tuple[int, ...]) -> None:
    one = scheduler()
    one.init_noise_sigma = torch.ones(shape, dtype=torch.bfloat16)
    before = fingerprint(one)
    assert fingerprint(one) is before
    one.init_noise_sigma += 1
    assert fingerprint(one) != before


def test_functions_are_told_apart_by_what_they_do() -> None:
    """Two of one line, over the same values, are the same: each SASolver makes its own."""

    def closure(value: float) -> Any:
        return lambda t: value

    assert freeze(closure(0.5)) == freeze(closure(0.5))
    assert freeze(closure(0.5)) != freeze(closure(1.0))
    assert fingerprint(diffusers.SASolverScheduler()) == fingerprint(diffusers.SASolverScheduler())
    one = diffusers.SASolverScheduler()
    before = fastdiff.tabulate(one, 6)
    one.tau_func = lambda t: 0.0
    assert fastdiff.tabulate(one, 6) != before


def test_a_function_may_name_itself_and_what_is_not_there_yet() -> None:
    def countdown(t: int) -> int:
        return countdown(t - 1) if t else later

    one = scheduler()
    one.countdown = countdown
    before = fingerprint(one)
    later = 3
    assert fingerprint(one) != before
    assert fingerprint(one) == fingerprint(one)


@pytest.mark.parametrize("of_its_own", [lambda one: one.set_begin_index, lambda one: lambda t: one.config])
def test_a_scheduler_that_holds_itself_is_let_go(of_its_own: Callable[[Any], Any]) -> None:
    one = scheduler()
    one.rescale = of_its_own(one)
    assert fingerprint(one) == fingerprint(one)
    alive = weakref.ref(one)
    del one
    gc.collect()
    assert alive() is None


def test_a_prepared_template_is_no_other_scheduler() -> None:
    one = scheduler()
    before = fingerprint(one)
    one.set_timesteps(4)
    assert fingerprint(one) is before


@pytest.mark.parametrize("name", ["UniPCMultistep", "SASolver", "PNDM", "HeunDiscrete", "DPMSolverSinglestep"])
def test_a_template_that_ran_is_the_same_after_each_run(name: str) -> None:
    """The latents and timesteps that a run leaves in it are the run's."""
    one = getattr(diffusers, f"{name}Scheduler")()
    prints = []
    for steps in (6, 7):
        one.set_timesteps(steps)
        for t in one.timesteps:
            one.step(torch.ones(1, 2, 2, 2), t, torch.ones(1, 2, 2, 2))
        one.set_timesteps(8)
        prints.append(fingerprint(one))
    assert prints[0] == prints[1]


@pytest.mark.parametrize("change", [_nested, _namespace])
def test_a_change_within_what_a_scheduler_holds_is_seen(change: Callable[[Any], None]) -> None:
    one = scheduler()
    change(one)
    before = fingerprint(one)
    if change is _nested:
        one.inner.set_shift(5.0)
    else:
        one.gains.table[2500] += 1
    assert fingerprint(one) != before


def _itself(scheduler: Any) -> None:
    scheduler.gains = SimpleNamespace(first=1.0, of=scheduler)
    scheduler.gains.whole = scheduler.gains


def _frozen_with_a_list(scheduler: Any) -> None:
    scheduler.gains = dataclasses.make_dataclass("Gains", ["first"], frozen=True)([1.0])


@pytest.mark.parametrize("change", [_itself, _frozen_with_a_list])
def test_what_holds_itself_or_cannot_be_hashed_is_followed(change: Callable[[Any], None]) -> None:
    one = scheduler()
    change(one)
    before = fingerprint(one)
    assert fingerprint(one) is before
    one.gains.__dict__["first"] = [2.0]
    assert fingerprint(one) != before


def test_an_object_that_equals_nothing_but_itself_is_no_data() -> None:
    """A copy of the scheduler has another, and is the same scheduler; what refers back to it does not keep it alive."""

    class Tag:
        def __init__(self, owner: Any) -> None:
            self.owner = owner

    one = scheduler()
    one.tag, one.generator = Tag(one), torch.Generator()
    assert fingerprint(one) == fingerprint(scheduler())
    alive = weakref.ref(one)
    del one
    gc.collect()
    assert alive() is None


def test_a_shift_of_numpys_type_is_that_shift() -> None:
    """`set_shift(np.float64(3))` once got the table of whichever shift came first."""
    one = diffusers.FlowMatchEulerDiscreteScheduler()
    tables = []
    for shift in (np.float64(3.0), np.float64(6.0), 6.0):
        one.set_shift(shift)
        tables.append(fastdiff.tabulate(one, 5))
    assert tables[0] != tables[1]
    assert tables[1] == tables[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_table_made_under_another_default_dtype_is_not_served_under_this_one(dtype: torch.dtype) -> None:
    """Which is the whole process's: a loader of models sets it while others ask for tables. LCM computes in it."""
    one = diffusers.LCMScheduler()
    expected = fastdiff.tabulate(one, 4)
    fastdiff.table_cache.clear()
    torch.set_default_dtype(dtype)
    try:
        assert fastdiff.tabulate(one, 4) != expected
    finally:
        torch.set_default_dtype(torch.float32)
    assert fastdiff.tabulate(one, 4) == expected


def test_a_changed_scheduler_gets_another_table() -> None:
    one = diffusers.DDIMScheduler()
    table = fastdiff.tabulate(one, 4)
    alphas = one.alphas_cumprod.numpy()
    alphas *= 0.9
    assert fastdiff.tabulate(one, 4) != table


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 1.0), (1, True), (np.array([1]), np.array([1.0])), (torch.ones(2), torch.ones(1, 2)), ([1], (1,))],
)
def test_values_of_other_types_are_other_values(one: Any, other: Any) -> None:
    assert freeze(one) != freeze(other)
    assert freeze(one) == freeze(copy.deepcopy(one))
