"""The certificate: given to models that treat requests apart, refused by name to planted couplings."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff.capture import Steps
from fastdiff.denoiser import Denoiser
from fastdiff.errors import RowsCoupled
from fastdiff.isolation import certify
from fastdiff.plan import CapturePlan, TensorSpec
from fastdiff.slots import Slots
from tests.conftest import LATENT_SHAPE, toy_model

PLAN = CapturePlan(
    latent_shape=LATENT_SHAPE,
    dtype=torch.float32,
    conditioning={"text": TensorSpec((2, 7), torch.float32), "label": TensorSpec((), torch.int64)},
    batch_sizes=(1, 3, 5, 8),
)


def conditioned(sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor) -> Tensor:
    told = conditioning["text"].mean((1, 2)) + 0.1 * conditioning["label"]
    return toy_model(sample, timestep, conditioning, guidance) + told[:, None, None, None]


def mean_over_the_batch(
    sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor
) -> Tensor:
    return sample - sample.mean(0)


def per_tensor_scale(sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor) -> Tensor:
    scale = sample.abs().amax() / 127
    return (sample / scale).round() * scale


def nan_alone_spreads(sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor) -> Tensor:
    return sample + 0 * sample.sum()  # exact for finite neighbours, NaN for any that is not


def text_of_the_neighbour(
    sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor
) -> Tensor:
    return sample + conditioning["text"].roll(1, 0).mean((1, 2))[:, None, None, None]


def label_of_the_neighbour(
    sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor
) -> Tensor:
    return sample + conditioning["label"].roll(1)[:, None, None, None]


@pytest.mark.parametrize("planar", [False, True])
def test_a_model_that_treats_requests_apart_is_certified(planar: bool) -> None:
    slots = Slots(PLAN, "cpu", planar=planar)
    certificate = certify(Steps(conditioned, slots), slots, PLAN.batch_sizes)
    assert certificate.batch_sizes == (1, 3, 5, 8)
    assert certificate.steps == (1 + 2 * 3) + (1 + 2 * 5) + (1 + 2 * 8)
    before = [slots.read(slot, PLAN.memory).view(torch.int32) for slot in range(8)]  # bits: some hold NaN
    Steps(conditioned, slots)(8)  # all are idle
    assert all(torch.equal(slots.read(slot, PLAN.memory).view(torch.int32), bits) for slot, bits in enumerate(before))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (mean_over_the_batch, "when its neighbours changed"),
        (per_tensor_scale, "when its neighbours changed"),
        (nan_alone_spreads, "when its neighbours held NaN"),
        (text_of_the_neighbour, "when its neighbours changed"),
        (label_of_the_neighbour, "when its neighbours changed"),
    ],
)
def test_a_model_that_couples_requests_is_refused(model: Denoiser, message: str) -> None:
    slots = Slots(PLAN, "cpu")
    with pytest.raises(RowsCoupled, match=message):
        certify(Steps(model, slots), slots, PLAN.batch_sizes)


def test_the_shipped_model_is_certified_at_odd_sizes(pipe: Any) -> None:
    runtime = fastdiff.Runtime(pipe, max_batch=8, certify=False)
    certificate = certify(runtime.steps, runtime.slots, (3, 5, 8))
    assert certificate.batch_sizes == (3, 5, 8)


def test_a_runtime_asks_at_its_start_unless_told_not_to(pipe: Any) -> None:
    certified = fastdiff.Runtime(pipe, max_batch=2)
    assert certified.certificate is not None
    assert certified.certificate.seconds > 0
    assert fastdiff.Runtime(pipe, max_batch=1).certificate is None  # nothing to be apart from
    assert fastdiff.Runtime(pipe, max_batch=2, certify=False).certificate is None


def test_a_runtime_over_a_coupled_model_is_refused(pipe: Any) -> None:
    coupled = copy.copy(pipe)
    coupled.unet = copy.deepcopy(pipe.unet)
    coupled.unet.conv_out.register_forward_hook(lambda module, inputs, output: output - output.mean(0))
    with pytest.raises(RowsCoupled, match="couples the requests of a batch"):
        fastdiff.Runtime(coupled, max_batch=2)
    assert fastdiff.Runtime(coupled, max_batch=1).certificate is None


def test_a_model_that_has_become_coupled_is_served_no_more(pipe: Any) -> None:
    own = copy.copy(pipe)
    own.unet = copy.deepcopy(pipe.unet)
    runtime = fastdiff.Runtime(own, max_batch=2)
    runtime.recapture()
    own.unet.conv_out.register_forward_hook(lambda module, inputs, output: output - output.mean(0))
    with pytest.raises(RowsCoupled, match="couples the requests of a batch"):
        runtime.recapture()
    with pytest.raises(RuntimeError, match="this runtime was closed"):
        runtime.generate([fastdiff.Request(prompt="a handwritten two", steps=2)])


def test_a_second_segments_model_is_asked_too() -> None:
    def coupled(sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        return sample - sample.mean(dim=0, keepdim=True)

    slots = Slots(replace(PLAN, segments=2), "cpu")
    certificate = certify(Steps((conditioned, conditioned), slots), slots, (3,))
    assert certificate.steps == 2 * (1 + 2 * 3)
    with pytest.raises(RowsCoupled, match="slot 0 of 3 changed its result"):
        certify(Steps((conditioned, coupled), slots), slots, (3,))
