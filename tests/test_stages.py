"""Stages are pure: whatever a request changes is in the state that comes back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch

from fastdiff import Request, RequestState, stages
from fastdiff.errors import NotLinear
from fastdiff.families import Family, family_of
from tests.purity import digest

Stage = Callable[[Family, RequestState], RequestState]
PIPELINE: list[Stage] = [stages.encode, stages.schedule, stages.prepare_latents, stages.denoise, stages.decode]


@pytest.fixture
def family(pipe: Any) -> Family:
    return family_of(pipe)


def run(family: Family, request: Request, until: Stage) -> RequestState:
    """The state that `until` is given."""
    state = RequestState(request=request)
    for stage in PIPELINE[: PIPELINE.index(until)]:
        state = stage(family, state)
    return state


@pytest.mark.parametrize("scheduler", ["DDIM", "UniPCMultistep", "EulerAncestral", None])
def test_no_stage_changes_the_components_or_the_state_that_it_was_given(family: Family, scheduler: str | None) -> None:
    state = RequestState(request=Request(prompt="a handwritten two", steps=3, seed=1, scheduler=scheduler))
    for stage in PIPELINE:
        components, given = digest(family), digest(state)
        after = stage(family, state)
        assert digest(family) == components, f"{stage.__name__} changed the components"
        assert digest(state) == given, f"{stage.__name__} changed its input"
        assert stage is stages.schedule or digest(after) != given
        state = after
    assert state.finished
    assert state.image is not None


@pytest.mark.parametrize(
    "mutate",
    [
        lambda pipe: pipe.scheduler.set_timesteps(7),
        lambda pipe: setattr(pipe, "_guidance_scale", 1234.5),  # of no other test on the shared pipe
        lambda pipe: pipe.unet.config.__dict__.update(sample_size=9),
        lambda pipe: pipe.vae.decoder.conv_in.bias.data.add_(1e-7),
        lambda pipe: pipe.unet.register_buffer("planted", torch.zeros(1)),
    ],
    ids=["scheduler", "pipe attribute", "config attribute", "weight", "buffer"],
)
def test_the_digest_catches_a_planted_mutation(pipe: Any, mutate: Callable[[Any], None]) -> None:
    import copy

    own = copy.deepcopy(pipe)
    family = family_of(own)
    before = digest(family)
    assert digest(family) == before
    mutate(own)
    assert digest(family) != before


def test_a_prepared_request_keeps_its_table(family: Family) -> None:
    """A stage that prepared again would lose what the request asked for (a finding of PR #23716's review)."""
    state = run(family, Request(prompt="x", timesteps=[800, 500, 100], scheduler="DDPM"), stages.prepare_latents)
    assert state.table is not None
    assert state.table.timesteps.tolist() == [800, 500, 100]
    other = replace(state, request=Request(prompt="x", steps=20))
    assert stages.schedule(family, other).table is state.table


def test_a_named_scheduler_follows_the_templates_config() -> None:
    template = diffusers.DDIMScheduler(prediction_type="v_prediction")
    first = stages.scheduler_of(template, "Euler")
    assert stages.scheduler_of(template, "Euler") is first
    template.register_to_config(prediction_type="sample")
    second = stages.scheduler_of(template, "Euler")
    assert (first.config.prediction_type, second.config.prediction_type) == ("v_prediction", "sample")
    assert stages.scheduler_of(template, "Euler") is second


def test_the_denoise_stage_stops_and_goes_on_where_it_was(family: Family) -> None:
    state = run(family, Request(prompt="x", steps=6, scheduler="UniPC" + "Multistep"), stages.denoise)
    whole = stages.denoise(family, state)
    halves = stages.denoise(family, stages.denoise(family, state, rows=2))
    assert (halves.row, halves.finished) == (6, True)
    assert torch.equal(whole.prepared[1], halves.prepared[1])


@pytest.mark.parametrize(
    "name", ["Euler", "EulerDiscrete", "EulerDiscreteScheduler", "UniPCMultistep", "DDIM", "DDIMScheduler", "LMS"]
)
def test_a_scheduler_name_needs_neither_suffix(name: str) -> None:
    assert name.removesuffix("Scheduler").removesuffix("Discrete") in stages.scheduler_class(name).__name__


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"expected one of .*DDIM, .*Euler, .*UniPCMultistep.*; got 'k-diffusion'"):
        stages.scheduler_class("k-diffusion")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("UniPC", "UniPCMultistep"),
        ("euler", "Euler"),
        ("Eular", "Euler"),
        ("eulerdiscretescheduler", "Euler"),
        ("ddim", "DDIM"),
        ("DPMSolverMultiStep", "DPMSolverMultistep"),
        ("DMPSolverMultistep", "DPMSolverMultistep"),
        ("Euler a", "EulerAncestral"),
    ],
)
def test_a_name_that_is_nearly_one_is_told_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"schedulers, such as {nearest}\b.*; got '{name}'") as refused:
        stages.scheduler_class(name)
    assert str(refused.value).count(",") <= 3  # one before three names


@pytest.mark.parametrize("name", ["DPM++", "DPM++ 2M", "dpmpp_2m"])
def test_a_papers_name_is_told_the_family(name: str) -> None:
    with pytest.raises(ValueError, match=r"such as .*\bDPMSolverMultistep\b") as refused:
        stages.scheduler_class(name)
    assert "Euler" not in str(refused.value)


def test_names_are_found_where_an_optional_package_of_diffusers_is_missing() -> None:
    """diffusers puts stand-ins in place of what needs torchsde, and they raise at the first look."""
    code = (
        "import sys; sys.modules['torchsde'] = None\n"
        "from fastdiff.stages import scheduler_class\n"
        "print(scheduler_class('Euler').__name__)\n"
        "try: scheduler_class('DPMSolverSDE')\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed.split() == ["EulerDiscreteScheduler", "NotLinear"]


def test_a_known_name_without_a_table_says_why(family: Family) -> None:
    with pytest.raises(NotLinear, match="DPMSolverSDEScheduler is not a table"):
        stages.table_of(family, Request(prompt="x", scheduler="DPMSolverSDE", steps=3))


def test_a_name_takes_the_templates_config_and_is_made_once() -> None:
    template = diffusers.DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    made = stages.scheduler_of(template, "Euler")
    assert made.config.prediction_type == "v_prediction"
    assert stages.scheduler_of(template, "Euler") is made
    assert stages.scheduler_of(template, None) is template
    assert stages.scheduler_of(template, made) is made
