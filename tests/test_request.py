"""Requests are checked where they are made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from fastdiff import PlanMismatch, Request, Result


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of prompt, prompt_embeds and class_label"),
        ({"prompt": "x", "prompt_embeds": torch.zeros(1)}, "exactly one of prompt, prompt_embeds and class_label"),
        ({"prompt": "x", "steps": 0}, "steps: expected an integer >= 1, got 0"),
        ({"prompt": "x", "steps": True}, "steps: expected an integer >= 1, got True"),
        ({"prompt": "x", "seed": True}, "seed: expected a 64-bit integer, got True"),
        ({"prompt": "x", "steps": 2.5}, "steps: expected an integer >= 1, got 2.5"),
        ({"prompt": "x", "guidance_scale": float("nan")}, "guidance_scale: expected a finite number"),
        (
            {"prompt": "x", "scheduler_options": {"eta": None}},
            "scheduler_options: expected a value for 'eta', got None",
        ),
        ({"prompt": "x", "guidance_scale": 1e39}, "guidance_scale: expected a finite number of float32"),
        ({"prompt": "x", "guidance_scale": "high"}, "guidance_scale: expected a finite number"),
        ({"prompt": "x", "seed": 2**64}, "seed: expected a 64-bit integer"),
        ({"prompt": "x", "guidance_rescale": 1.5}, "guidance_rescale: expected a number from 0 to 1, got 1.5"),
        ({"prompt": "x", "guidance_rescale": "high"}, "guidance_rescale: expected a number from 0 to 1, got 'high'"),
        ({"prompt": "x", "pooled_prompt_embeds": torch.zeros(1)}, "expected prompt_embeds beside them, got none"),
        ({"prompt": "x", "timesteps": [1], "sigmas": [1.0]}, "at most one of timesteps and sigmas"),
        ({"prompt": "x", "negative_prompt": "y", "negative_prompt_embeds": torch.zeros(1)}, "at most one of negative"),
        ({"prompt": "a seven \ud83d"}, "^prompt: expected Unicode, got half a character"),
        ({"prompt": "x", "negative_prompt": "\udcff"}, "^negative_prompt: expected Unicode, got half a character"),
        ({"prompt": "x", "seed": np.float64(3)}, "seed: expected a 64-bit integer, got 3.0"),
        ({"prompt": 7}, "^prompt: expected one text, got 7; make a request of each"),
        ({"prompt": ["a", "b"]}, r"^prompt: expected one text, got \['a', 'b'\]; make a request of each"),
        ({"prompt": "x", "negative_prompt": 5}, "negative_prompt: expected one text, got 5"),
        ({"prompt": "x", "latents": [1]}, "latents: expected a tensor of a floating dtype, got list; convert it"),
        (
            {"prompt_embeds": torch.zeros(1).numpy()},
            "prompt_embeds: expected a tensor of a floating dtype, got ndarray",
        ),
        ({"prompt_embeds": torch.zeros(1).long()}, "prompt_embeds: expected .* floating dtype, got torch.int64"),
        (
            {"prompt": "x", "scheduler": DDIMScheduler},
            r"scheduler: expected .*, got a class; make one: DDIMScheduler\(\)",
        ),
        (
            {"prompt": "x", "scheduler_options": None},
            "scheduler_options: expected a mapping .*, got None; leave it out",
        ),
    ],
)
def test_bad_requests_say_what_was_expected(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**fields)


def test_numbers_of_numpys_types_are_those_numbers() -> None:
    given = Request(prompt="a \U0001f600", seed=np.uint64(7), steps=np.int32(4), guidance_scale=np.float32(2.5))  # type: ignore[arg-type]
    assert [(type(value), value) for value in (given.seed, given.steps, given.guidance_scale)] == [
        (int, 7), (int, 4), (float, 2.5),
    ]  # fmt: skip


def test_the_schedule_is_what_tabulate_takes() -> None:
    assert Request(prompt="x").schedule == {"num_inference_steps": 50}
    assert Request(prompt="x", sigmas=[1.0, 0.5]).schedule == {"sigmas": [1.0, 0.5]}
    assert Request(prompt="x", steps=3, scheduler_options={"eta": 1.0}).schedule == {
        "num_inference_steps": 3,
        "eta": 1.0,
    }


def test_steps_are_another_default_only_where_the_request_says_nothing() -> None:
    assert Request(prompt="x").with_steps(28).schedule == {"num_inference_steps": 28}
    assert Request(prompt="x", steps=3).with_steps(28).schedule == {"num_inference_steps": 3}
    assert Request(prompt="x", sigmas=[1.0]).with_steps(28).schedule == {"sigmas": [1.0]}


def test_a_tensor_of_another_shape_names_what_the_plan_has_room_for() -> None:
    request = Request(prompt_embeds=torch.zeros(3, 2), latents=torch.zeros(4, 8, 8))
    request.check_tensors("latent_shape", latents=(4, 8, 8))
    with pytest.raises(
        PlanMismatch,
        match=r"^latents: expected shape \(4, 8, 4\), got \(4, 8, 8\); the plan's latent_shape holds no other: bring "
        r"it into that shape, or build the runtime for its height and width",
    ):
        request.check_tensors("latent_shape", latents=(4, 8, 4))
    with pytest.raises(
        PlanMismatch,
        match=r"got \(3, 2\); the plan's conditioning.prompt_embeds holds no other: .* max_sequence_length",
    ):
        request.check_tensors("conditioning.prompt_embeds", prompt_embeds=(4, 2))


def test_a_result_without_an_image_raises_its_own_error() -> None:
    failed = Result(
        request=Request(prompt="x"),
        latents=torch.zeros(1),
        image=None,
        rows=1,
        mode="eager",
        error=ArithmeticError("no"),
    )
    with pytest.raises(ArithmeticError, match="no"):
        failed.to_pil()
    made = Result(request=Request(prompt="x"), latents=torch.zeros(1), image=torch.ones(1, 2, 3), rows=1, mode="eager")
    assert made.to_pil().size == (3, 2)
