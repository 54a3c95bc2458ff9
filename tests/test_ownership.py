"""Who holds the loop's state, and the findings of the review of SGLang's PR #23716."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import torch

import fastdiff
from fastdiff.ownership import acquire
from tests.oracle import scheduler_classes
from tests.purity import digest


def template() -> Any:
    return diffusers.UniPCMultistepScheduler()


def test_none_is_never_replaced_by_a_template_silently() -> None:
    with pytest.raises(TypeError, match="got None"):
        acquire(None)


@pytest.mark.parametrize(
    ("given", "named"),
    [("Euler", "got str"), (object(), "got object"), (diffusers.EulerDiscreteScheduler, "got the class EulerDiscrete")],
)
def test_what_is_no_scheduler_is_refused_at_once(given: Any, named: str) -> None:
    with pytest.raises(TypeError, match=f"expected a diffusers scheduler, {named}"):
        acquire(given)


def test_a_whole_pipeline_is_no_scheduler(pipe: Any) -> None:
    with pytest.raises(TypeError, match="expected a diffusers scheduler, got StableDiffusionPipeline"):
        acquire(pipe)


@pytest.mark.parametrize("name", ["DPMSolverSDEScheduler", "ScoreSdeVpScheduler"])
def test_a_class_without_a_table_is_leased_as_a_copy_where_it_is_isolated(name: str) -> None:
    own = scheduler_classes()[name]()
    with acquire(own) as first, acquire(own) as second, acquire(own, "isolate") as third:
        assert [lease.ownership for lease in (first, second, third)] == ["shared", "cloned", "cloned"]
        assert len({id(lease.scheduler) for lease in (first, second, third)}) == 3
        assert first.scheduler is own


@pytest.mark.parametrize(("argument", "value"), [("policy", "share"), ("isolated", "shared")])
def test_unknown_words_are_refused(argument: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}: expected"):
        acquire(template(), **{argument: value})  # type: ignore[arg-type]


def test_auto_shares_a_sequential_load_and_isolates_a_concurrent_one() -> None:
    own = template()
    for _ in range(3):
        with acquire(own) as lease:
            assert lease.ownership == "shared"
            assert lease.scheduler is own
    with acquire(own) as first, acquire(own) as second, acquire(own, isolated="cloned") as third:
        assert [lease.ownership for lease in (first, second, third)] == ["shared", "tensorized", "cloned"]
        assert third.scheduler is not own
        assert isinstance(second.tabulate(5), fastdiff.StepTable)
    with acquire(own) as again:
        assert again.ownership == "shared"


def test_a_request_that_outlives_the_stage_is_isolated() -> None:
    with acquire(template(), outlives=True) as lease:
        assert lease.ownership == "tensorized"
    with pytest.raises(RuntimeError, match="outlives the stage"):
        acquire(template(), "reuse", outlives=True)


def test_reuse_serves_one_request_at_a_time() -> None:
    own = template()
    with acquire(own, "reuse"), pytest.raises(RuntimeError, match="1 already hold it"):
        acquire(own, "reuse")
    with acquire(own, "reuse") as lease:
        assert lease.scheduler is own


def test_a_lease_is_given_back_once_and_unusable_afterwards() -> None:
    own = template()
    other, lease = acquire(own), acquire(own)
    lease.release()
    lease.release()
    with pytest.raises(RuntimeError, match="1 already hold it"):
        acquire(own, "reuse")
    with pytest.raises(RuntimeError, match="given back"):
        lease.tabulate(5)
    other.release()
    with acquire(own) as again:
        assert again.ownership == "shared"


def test_leases_do_not_keep_a_template_alive() -> None:
    own = template()
    acquire(own).release()
    acquire(own, "isolate").release()
    alive = weakref.ref(own)
    del own
    gc.collect()
    assert alive() is None


def test_a_dropped_lease_warns_and_is_given_back() -> None:
    own = template()
    with pytest.warns(ResourceWarning, match="a lease was dropped: release it"):
        acquire(own).scheduler.set_timesteps(4)
    with acquire(own, "reuse") as lease:
        assert lease.scheduler is own


def test_leases_are_counted_right_by_many_threads() -> None:
    own, barrier = template(), threading.Barrier(8)

    def lease_many(_: int) -> list[str]:
        seen: list[str] = []
        with acquire(own) as lease:
            barrier.wait()  # all eight hold one at this moment
            seen.append(lease.ownership)
        for _ in range(200):
            with acquire(own) as lease:
                pass
        return seen

    with ThreadPoolExecutor(8) as pool:
        owners = [owner for seen in pool.map(lease_many, range(8)) for owner in seen]
    assert sorted(owners) == ["shared"] + ["tensorized"] * 7
    with acquire(own) as lease:
        assert lease.ownership == "shared"


def test_each_kind_of_lease_refuses_the_other_kinds_interface() -> None:
    with acquire(template(), "isolate") as lease, pytest.raises(TypeError, match=r"use \.tabulate"):
        _ = lease.scheduler
    with acquire(template(), "reuse") as lease, pytest.raises(TypeError, match=r"use \.scheduler"):
        lease.tabulate(5)


# The review of SGLang's PR #23716


def test_a_prepared_request_is_never_cloned_again_unprepared() -> None:
    """A fresh deepcopy in a later stage lost the custom sigmas that an earlier one had set."""
    sigmas = [0.9, 0.5, 0.2]
    own = diffusers.FlowMatchEulerDiscreteScheduler()
    with acquire(own, "isolate", isolated="cloned") as lease:
        lease.scheduler.set_timesteps(sigmas=sigmas)
        assert lease.scheduler.sigmas.tolist() == pytest.approx([*sigmas, 0.0])
        assert lease.scheduler is lease.scheduler
    with acquire(own, "isolate") as lease:
        prepared = lease.tabulate(sigmas=sigmas)
        state = fastdiff.RequestState(request=None, table=prepared, latents=prepared.init(torch.zeros(1, 2, 2)))
        assert state.fork().table is state.restart(torch.zeros(1, 2, 2)).table is prepared
    assert (prepared.timesteps / 1000).tolist() == pytest.approx(sigmas)


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "DEISMultistepScheduler", "DPMSolverSinglestepScheduler"]
)
def test_what_mu_sets_does_not_leak_into_the_next_request(name: str) -> None:
    """`set_timesteps(mu=)` writes `flow_shift` into the config's attributes, where a deepcopy keeps it."""
    own = getattr(diffusers, name)(use_flow_sigmas=True, prediction_type="flow_prediction", use_dynamic_shifting=True,
                                   time_shift_type="exponential", lower_order_final=True)  # fmt: skip
    before = fastdiff.tabulate(own, 6, mu=0.3)
    with acquire(own, "reuse") as lease:
        lease.scheduler.set_timesteps(6, mu=1.2)
    assert own.config.flow_shift != own.config["flow_shift"]  # the leak is there
    with acquire(own, "isolate", isolated="cloned") as lease:
        assert lease.scheduler.config.flow_shift == own.config["flow_shift"]
    assert fastdiff.tabulate(own, 6, mu=0.3) is before


def test_isolated_leases_leave_the_template_as_it_is() -> None:
    own = template()
    before = digest(own)
    with acquire(own, "isolate", isolated="cloned") as lease:
        lease.scheduler.set_timesteps(5)
        sample = torch.ones(1, 1, 2, 2)
        for timestep in lease.scheduler.timesteps:
            sample = lease.scheduler.step(sample, timestep, sample).prev_sample
    with acquire(own, "isolate") as lease:
        lease.tabulate(5)
    assert digest(own) == before
