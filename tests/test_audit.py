"""Planted faults are found on their lines; honest steps have none; a recorded step freezes what a graph freezes."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastdiff.audit import Finding, Kind, RecordedStep, audit, randomize
from fastdiff.emulated import DeviceTensor, EmulatedDevice
from fastdiff.errors import CannotCapture
from fastdiff.families import Family, family_of
from fastdiff.plan import CapturePlan, TensorSpec
from fastdiff.slots import Batch, Slots
from fastdiff.step import denoise_step
from tests.conftest import LATENT_SHAPE, random_state, table, toy_model
from tests.test_step import N, load_all, mixed_states, plan

SOURCE = Path(__file__).read_text().splitlines()
CONDITIONING = {"text": TensorSpec((4,), torch.float32), "label": TensorSpec((), torch.int64)}


def line_of(plant: str) -> int:
    """The number of the one line that ends in a comment with this name."""
    (number,) = [number for number, line in enumerate(SOURCE, start=1) if line.endswith(f"# plant: {plant}")]
    return number


def batch_of(n: int = 3, **capacities: Any) -> Batch:
    own = CapturePlan(
        latent_shape=LATENT_SHAPE,
        dtype=torch.float32,
        batch_sizes=(n,),
        rows=12,
        conditioning=CONDITIONING,
        **capacities,
    )
    return Slots(own, "cpu").batch(n)


def seen(findings: list[Finding]) -> set[tuple[str, str, int]]:
    return {(finding.kind, Path(finding.file).name, finding.line) for finding in findings}


def at(kind: str, plant: str) -> tuple[str, str, int]:
    return kind, Path(__file__).name, line_of(plant)


class Planted:
    """Denoisers with one fault each, by name."""

    def __init__(self) -> None:
        self.calls = 0
        self.coefficients = [1.0, 0.5, 0.25, 0.125]
        self.before: Tensor | None = None
        self.host = torch.tensor(0.5)
        self.host_table = torch.linspace(0, 1, 1000)

    def python_counter(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        self.calls += 1
        return sample * self.calls  # plant: python_counter

    def coefficient(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        self.calls += 1
        return torch.add(sample, sample, alpha=self.coefficients[self.calls % 4])  # plant: coefficient

    def branch(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % 2:
            return sample.tanh()  # plant: branch
        return sample.sin()

    def item(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        scale = timestep[0].item() > -1  # plant: item
        return sample * int(scale)

    def truth(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        return sample if (timestep >= 0).all() else -sample  # plant: truth

    def to_list(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        return sample * len(timestep.tolist())  # plant: to_list

    def to_cpu(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        timestep.cpu()  # plant: to_cpu
        return sample

    def host_index(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        self.host_table[timestep.long()]  # plant: host_index
        return sample

    def nonzero(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        (sample > 0).nonzero()  # plant: nonzero
        return sample

    def boolean_index(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        sample[sample > 0]  # plant: boolean_index
        return sample

    def repeats(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        sample.repeat_interleave(torch.ones_like(timestep).long(), dim=0)  # plant: repeats
        return sample

    def host_operand(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        return sample * self.host  # plant: host_operand

    def copied_in(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        weight = torch.tensor([0.5, 2.0], device=sample.device)  # plant: copied_in
        return sample * weight.view(1, 2, 1, 1)

    def new_tensor(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        return sample * sample.new_tensor(2.0)  # plant: new_tensor

    def moved_in(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        frequencies = torch.arange(LATENT_SHAPE[-1])
        return sample * frequencies.to(sample.device)  # plant: moved_in

    def random(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        return sample + torch.randn_like(sample)  # plant: random

    def carried(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        before = sample if self.before is None else self.before
        self.before = sample.tanh()
        return sample + before  # plant: carried

    def rebound(self, sample: Tensor, timestep: Tensor, conditioning: dict[str, Tensor], guidance: Tensor) -> Tensor:
        conditioning["text"] = conditioning["text"] + 1  # plant: rebound
        return sample

    def readdressed(
        self, sample: Tensor, timestep: Tensor, conditioning: dict[str, Tensor], guidance: Tensor
    ) -> Tensor:
        conditioning["text"].data = conditioning["text"] + 1  # plant: readdressed
        return sample * conditioning["text"].sum(1).view(-1, 1, 1, 1)

    def set_to(self, sample: Tensor, timestep: Tensor, conditioning: dict[str, Tensor], guidance: Tensor) -> Tensor:
        conditioning["text"].set_(conditioning["text"] + 1)  # type: ignore[call-overload]  # plant: set_to
        return sample * conditioning["text"].sum(1).view(-1, 1, 1, 1)

    def quantised(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        return (sample / sample.abs().amax()).round()  # plant: quantised

    def mean(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        return sample - sample.mean(dim=0)  # plant: mean

    def first_timestep(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        return sample * timestep[0]  # plant: first_timestep

    def first_label(
        self, sample: Tensor, timestep: Tensor, conditioning: dict[str, Tensor], guidance: Tensor
    ) -> Tensor:
        return sample * conditioning["label"].cumsum(0).view(-1, 1, 1, 1)  # plant: first_label

    def nan_alone(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        broken = sample.isnan().any(dim=0)  # plant: nan_alone
        return sample.masked_fill(broken, 0)


PLANTS = {
    "frozen scalar": ["python_counter", "coefficient"],
    "frozen branch": ["branch"],
    "host read": ["item", "truth", "to_list", "to_cpu", "host_index"],
    "data-dependent shape": ["nonzero", "boolean_index", "repeats"],
    "host operand": ["host_operand"],
    "host-to-device copy": ["copied_in", "new_tensor", "moved_in"],
    "random draw": ["random"],
    "carried tensor": ["carried"],
    "rebound tensor": ["rebound", "readdressed", "set_to"],
    "row coupling": ["mean", "quantised", "first_timestep", "first_label", "nan_alone"],
}


@pytest.mark.parametrize(("kind", "plant"), [(kind, plant) for kind, plants in PLANTS.items() for plant in plants])
def test_a_planted_fault_is_found_where_it_was_planted(kind: str, plant: str) -> None:
    assert seen(audit(getattr(Planted(), plant), batch_of())) == {at(kind, plant)}


def test_every_kind_of_finding_has_a_plant() -> None:
    assert set(PLANTS) == set(get_args(Kind))


def test_a_finding_says_what_to_do_and_how_often() -> None:
    def twice(sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        for _ in range(2):
            sample.flatten()[0].item()
        return sample

    (finding,) = audit(twice, batch_of())
    assert finding.operation == "aten._local_scalar_dense.default"
    assert finding.count == 2
    assert "read it before the step" in finding.message


class Rebinding(nn.Module):
    """A module that counts its calls, in place or by another tensor."""

    calls: Tensor

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("calls", torch.zeros(()))
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        if self.in_place:
            self.calls += 1
        else:
            self.calls = self.calls + 1  # plant: buffer
        return sample * self.weight * self.calls


def test_a_buffer_may_be_written_and_not_replaced() -> None:
    honest, planted = Rebinding(in_place=True), Rebinding(in_place=False)
    assert audit(honest, batch_of(), honest) == []
    assert seen(audit(planted, batch_of(), planted)) == {at("rebound tensor", "buffer")}
    for model in (honest, planted):
        assert model.calls == 0  # as before the audit
        assert type(model.calls) is Tensor
        assert isinstance(model.weight, nn.Parameter)


def test_a_model_that_was_not_named_is_a_host_tensor_to_the_step() -> None:
    model = Rebinding(in_place=True)
    assert {finding.kind for finding in audit(model, batch_of())} == {"host operand"}


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(LATENT_SHAPE[0])

    def forward(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        normed: Tensor = self.norm(sample)  # plant: norm
        return normed


def test_batch_norm_couples_rows_in_training_and_not_in_evaluation() -> None:
    model = Normed()
    assert at("row coupling", "norm") in seen(audit(model, batch_of(), model))
    assert audit(model.eval(), batch_of(), model) == []
    assert model.norm.running_mean is not None
    assert (model.norm.running_mean == 0).all()


def test_an_honest_step_has_no_findings() -> None:
    for n in (1, 3):
        assert audit(toy_model, batch_of(n)) == []
    assert audit(toy_model, batch_of(draws=0)) == []


def honest_tricks(sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
    """What looks like a fault and is none."""
    sample = sample.clone()
    sample[:, 0] = 0.5
    sample[sample > 1] = 0.0
    sample.unsqueeze_(0).squeeze_(0)
    zeros = torch.zeros(LATENT_SHAPE[-1], device=sample.device)
    frequencies = torch.arange(LATENT_SHAPE[-1], device=timestep.device).to(timestep.device, timestep.dtype)
    with torch.autocast(sample.device.type, enabled=False), torch.inference_mode():
        scale = torch.where(guidance > 1, guidance, 1.0).to(sample.device).double().float()
    attended = nn.functional.scaled_dot_product_attention(sample, sample, sample, attn_mask=sample[..., :3] > 0)
    tripled = attended.repeat_interleave(torch.full_like(timestep, 3).long(), dim=0, output_size=3 * len(timestep))
    counted = torch.tensor([1.0, 2.0]).sum().item()  # on the host alone
    return tripled[::3] * scale.view(-1, 1, 1, 1) + zeros + frequencies + counted


def test_what_only_looks_like_a_fault_is_none() -> None:
    assert audit(honest_tricks, batch_of()) == []


def test_a_cache_that_the_first_step_fills_is_no_fault_and_holds_plain_tensors_afterwards() -> None:
    kept: dict[str, Tensor] = {}

    @lru_cache(maxsize=1)
    def frequencies(device: torch.device) -> Tensor:
        return torch.arange(LATENT_SHAPE[-1], device=device) / 7

    def cached(sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        if not kept:
            kept["scale"] = torch.full((), 3.0, device=sample.device) * 2
        return sample * kept["scale"] + frequencies(sample.device)

    assert audit(cached, batch_of()) == []
    assert type(kept["scale"]) is Tensor
    assert kept["scale"].item() == 6
    assert cached(torch.zeros(2, *LATENT_SHAPE), torch.zeros(2), {}, torch.zeros(2)).device.type == "cpu"


def test_slots_and_the_random_state_are_as_before() -> None:
    slots, states = Slots(plan(), "cpu"), mixed_states()
    load_all(slots, states)
    before, state = [tensor.clone() for tensor in slots.tensors()], torch.get_rng_state()
    audit(Planted().random, slots.batch(N))
    assert all(map(torch.equal, slots.tensors(), before))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_step_that_raises_raises_and_leaves_its_model_alone() -> None:
    model = Normed()

    def broken(sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        model(sample, timestep, conditioning, guidance)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        audit(broken, batch_of(), model)
    assert isinstance(model.norm.weight, nn.Parameter)
    assert type(model._parameters) is dict


def digits_batch(family: Family) -> Batch:
    own = CapturePlan(
        latent_shape=family.latent_shape, dtype=family.dtype, batch_sizes=(2,), conditioning=family.conditioning
    )
    return Slots(own, "cpu").batch(2)


def test_the_digits_denoiser_has_no_findings_in_inference_mode_either(pipe: Any) -> None:
    family = family_of(pipe)
    for denoiser in (family.denoiser, torch.inference_mode()(family.denoiser)):
        assert audit(denoiser, digits_batch(family), family.model) == []


def test_the_digits_step_is_recorded_bitwise(pipe: Any) -> None:
    family = family_of(pipe)
    batch = digits_batch(family)
    randomize(batch, seed=0)
    step = RecordedStep(family.denoiser, batch)
    copy = tree_map_only(Tensor, torch.clone, batch)
    for _ in range(2):
        step.replay()
        with torch.no_grad():
            denoise_step(family.denoiser, copy)
    assert all(map(torch.equal, batch.planes, copy.planes))
    assert torch.isfinite(batch.planes[0]).all()


def test_a_device_tensor_is_on_the_device_as_far_as_python_can_see() -> None:
    device = EmulatedDevice()
    latent = device.put(torch.arange(4.0))
    with device:
        derived, host = (latent * 2)[1:], torch.ones(3)
        made = torch.zeros(3, device=latent.device)
        assert derived.device == made.device == device.device
        assert derived.is_cuda
        assert host.device.type == "cpu"
        assert derived.to(latent.device) is derived
        assert derived.tolist() == [2, 4, 6]
        assert type((derived + made).cpu()) is Tensor
    with pytest.raises(RuntimeError, match="outside of it"):
        derived + 1


def run_both(denoiser: Callable[..., Tensor], swap: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Latents after each row of mixed samplers, stepped eagerly and replayed from a recording."""
    eager, recorded = Slots(plan(), "cpu"), Slots(plan(), "cpu")
    for slots in (eager, recorded):
        load_all(slots, mixed_states())
    step = RecordedStep(denoiser, recorded.batch(N))
    pairs = []
    for number in range(10):
        if swap and number == 3:
            for slots in (eager, recorded):
                slots.load(1, random_state(table("DPMSolverMultistepScheduler", 7), seed=9))
        denoise_step(denoiser, eager.batch(N))
        step.replay()
        pairs += [(eager.read(slot, plan().memory), recorded.read(slot, plan().memory)) for slot in range(N)]
    return pairs


@pytest.mark.parametrize("swap", [False, True], ids=["as loaded", "a table swapped"])
def test_a_recorded_step_is_bitwise_the_eager_one(swap: bool) -> None:
    assert all(torch.equal(eager, recorded) for eager, recorded in run_both(toy_model, swap))


def test_a_swapped_table_makes_a_difference() -> None:
    as_loaded, swapped = run_both(toy_model), run_both(toy_model, swap=True)
    assert not torch.equal(as_loaded[-N + 1][1], swapped[-N + 1][1])


def test_recording_leaves_the_slots_as_they_were() -> None:
    slots = Slots(plan(), "cpu")
    load_all(slots, mixed_states())
    before = [tensor.clone() for tensor in slots.tensors()]
    RecordedStep(toy_model, slots.batch(N))
    assert all(map(torch.equal, slots.tensors(), before))


@pytest.mark.parametrize("plant", ["python_counter", "coefficient", "branch", "carried"])
def test_a_recorded_step_freezes_python(plant: str) -> None:
    assert not all(torch.equal(eager, recorded) for eager, recorded in run_both(getattr(Planted(), plant)))


def test_a_recorded_step_follows_weights_that_are_written_in_place() -> None:
    model = Rebinding(in_place=True)
    slots = Slots(plan(), "cpu")
    load_all(slots, mixed_states())
    step = RecordedStep(model, slots.batch(N))
    with torch.no_grad():
        model.weight.fill_(torch.nan)
    step.replay()
    assert slots.read(0, 1).isnan().all()


def test_a_step_that_reads_on_the_host_cannot_be_recorded() -> None:
    with pytest.raises(CannotCapture, match=r"fastdiff.audit.audit says where"):
        RecordedStep(Planted().item, batch_of())


def test_device_tensors_do_not_outlive_the_audit() -> None:
    import gc

    planted = Planted()
    audit(planted.carried, batch_of())
    assert type(planted.before) is Tensor
    assert not [one for one in gc.get_objects() if type(one) is DeviceTensor]
