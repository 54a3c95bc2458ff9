"""Counts of a row against counts made another way, the decision on profiles made up, and slots left as they were."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

import fastdiff
from fastdiff import Request, Runtime, profile
from fastdiff.capture import Steps
from fastdiff.denoiser import Denoiser
from fastdiff.families import family_of
from fastdiff.plan import CapturePlan, TensorSpec
from fastdiff.profile import RATES, TRIES, Profile, break_even, choose, profile_step, trace_kernels
from fastdiff.slots import Slots
from fastdiff.step import denoise_step
from tests.conftest import LATENT_SHAPE, random_state, table, toy_model

P = math.prod(LATENT_SHAPE)
N = 3


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts need one call; the clock is not tested here."""
    monkeypatch.setattr(profile, "TIMED_CALLS", (1, 1))
    monkeypatch.setattr(profile, "WARM_UP_CALLS", 0)


def slots_of(rows: int = 12, device: str = "cpu", **capacities: Any) -> Slots:
    plan = CapturePlan(
        latent_shape=LATENT_SHAPE, dtype=torch.float32, batch_sizes=(N,), rows=rows, compile="none", **capacities
    )
    return Slots(plan, device)


def profiled(denoiser: Denoiser, slots: Slots, model: nn.Module | None = None) -> Profile:
    batch = slots.batch(N)
    weights = [] if model is None else list(model.parameters())
    return profile_step(lambda: denoise_step(denoiser, batch), denoiser, batch, weights)


def alone(model: Callable[[Tensor], Tensor]) -> Denoiser:
    """A denoiser that looks at the sample alone."""

    def denoiser(sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor) -> Tensor:
        return model(sample).view_as(sample)

    return denoiser


identity = alone(lambda sample: sample)


def test_flops_and_traffic_of_a_linear_layer_and_a_convolution_by_hand() -> None:
    linear = nn.Linear(P, P, bias=False)
    channels, height, width = LATENT_SHAPE
    convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    none = profiled(identity, slots_of())
    one = profiled(alone(lambda sample: linear(sample.flatten(1))), slots_of())
    two = profiled(alone(convolution), slots_of())
    assert none.flops == 0
    assert one.flops == 2 * N * P * P
    assert two.flops == 2 * N * height * width * channels * channels * 3 * 3
    assert one.operations == two.operations == none.operations + 1
    assert one.traffic_bytes - none.traffic_bytes == 4 * (N * P + P * P + N * P)
    assert two.traffic_bytes - none.traffic_bytes == 4 * (N * P + channels * channels * 9 + N * P)


def test_the_floor_is_weights_and_state() -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3).half())
    slots = slots_of(conditioning={"prompt_embeds": TensorSpec((4, 2), torch.bfloat16)})
    weights_bytes = 4 * (7 * 5 + 5) + 2 * (5 * 3 + 3)
    with_weights, without = profiled(identity, slots, model), profiled(identity, slots)
    assert with_weights.floor_bytes - without.floor_bytes == weights_bytes
    conditioning, coefficients, noise, end = 2 * 4 * 2, 4 * slots.plan.layout.width, 4 * P, 8
    latents, row = 4 * slots.plan.memory * P, 8
    assert without.floor_bytes == N * (conditioning + coefficients + noise + end + 2 * (latents + row))


def test_capacities_that_a_row_does_not_touch_cost_nothing() -> None:
    few, many = (replace(profiled(toy_model, slots_of(rows)), host_s=0.0, row_s=0.0) for rows in (12, 120))
    assert few == many


class Writes(TorchDispatchMode):
    """Counts operations that fill memory: a storage that no argument has, or an argument in place."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        before, after = (
            {one.untyped_storage().data_ptr() for one in tree_iter(values) if isinstance(one, Tensor)}
            for values in ((args, kwargs), output)
        )
        allocates = str(func.overloadpacket).startswith(("aten.empty", "aten.new_empty"))
        self.count += not allocates and (func._schema.is_mutable or not after <= before)
        return output


def test_inference_mode_counts_the_same() -> None:
    convolution = nn.Conv2d(LATENT_SHAPE[0], LATENT_SHAPE[0], 3, padding=1)
    linear = nn.Linear(LATENT_SHAPE[2], LATENT_SHAPE[2])
    model = alone(lambda sample: linear(convolution(sample)))

    def counts() -> Profile:
        return replace(profiled(model, slots_of()), host_s=0.0, row_s=0.0)

    expected = counts()
    with torch.inference_mode():
        assert counts() == expected


def attention_flops(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    batch, heads, length, width = query  # and values as wide as queries
    return 2 * (2 * batch * heads * length * key[2] * width)


def test_a_row_of_the_shipped_model_counted_two_ways(pipe: Any) -> None:
    family = family_of(pipe)
    plan = CapturePlan(
        latent_shape=family.latent_shape, dtype=family.dtype, conditioning=family.conditioning, batch_sizes=(N,)
    )
    batch = Slots(plan, "cpu").batch(N)
    own = profile_step(lambda: denoise_step(family.denoiser, batch), family.denoiser, batch, family.model.parameters())
    eager, on_cpu = batch.with_views(), torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={on_cpu: attention_flops}) as flops:
        denoise_step(family.denoiser, eager)
    with torch.no_grad(), Writes() as writes:
        denoise_step(family.denoiser, eager)
    assert own.operations == writes.count
    assert own.flops == flops.get_total_flops()
    assert on_cpu in flops.get_flop_counts()["Global"]  # the attention, which torch leaves out on the CPU
    assert own.floor_bytes > sum(one.nbytes for one in family.model.parameters())
    assert own.traffic_bytes > own.floor_bytes


def test_nothing_changes_though_the_slots_hold_nan_or_the_step_fails() -> None:
    linear = nn.Linear(P, P)

    def model(sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor) -> Tensor:
        output: Tensor = linear(sample.flatten(1)).view_as(sample)
        return output * guidance.view(-1, 1, 1, 1)

    slots = slots_of(conditioning={"label": TensorSpec((1,), torch.int64), "text": TensorSpec((2, 2), torch.float16)})
    for slot in range(N):
        state = random_state(table("UniPCMultistepScheduler"), slot)
        state.conditioning = {"label": torch.tensor([7]), "text": torch.rand(2, 2).half()}
        if slot == 1:
            state.latents = torch.full_like(state.prepared[1], math.nan)
        slots.load(slot, state)
    batch, held = slots.batch(N), [*slots.tensors(), *linear.parameters()]
    before = [one.detach().clone() for one in held]
    addresses, seed = [one.data_ptr() for one in held], torch.get_rng_state()

    def fails() -> None:
        assert torch.isfinite(batch.planes[0]).all()  # nothing of NaN is timed
        raise RuntimeError("out of order")

    profiled(model, slots)
    with pytest.raises(RuntimeError, match="out of order"):
        profile_step(fails, model, batch, [])
    assert [one.data_ptr() for one in held] == addresses
    assert torch.equal(torch.get_rng_state(), seed)
    for one, was in zip(held, before, strict=True):
        assert torch.equal(one.detach().view(torch.uint8), was.view(torch.uint8))


def test_no_slot_moves_while_it_is_profiled() -> None:
    """Random rows, applied again and again, would lead to infinity and to rows that do not exist."""
    slots = slots_of()
    for slot in range(N):
        slots.load(slot, random_state(table("EulerDiscreteScheduler"), slot))
    batch, seen = slots.batch(N), []

    def step() -> None:
        denoise_step(toy_model, batch)
        seen.append((batch.row.tolist(), batch.planes[0].clone()))

    profile_step(step, toy_model, batch, [])
    step()
    (row, latents), (row_after, latents_after) = seen
    assert (row, row_after) == ([0] * N, [1] * N)
    assert not torch.equal(latents, latents_after)


def test_what_only_cuda_tells_is_none_and_json_keeps_everything() -> None:
    own = profiled(toy_model, slots_of())
    assert own.n == N
    assert own.dtype == "float32"
    assert own.host_s == own.row_s > 0
    unknown = {name for name, value in asdict(own).items() if value is None}
    assert unknown == {"gpu", "launches", "device_s", "busy", "floor_s", "roofline_s", "regime"}
    for one in (own, LAUNCH_BOUND):
        assert Profile(**json.loads(json.dumps(asdict(one), allow_nan=False))) == one


def test_a_call_of_many_rows_is_divided_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    call = profile._Measured(host_s=0.4, row_s=0.8, launches=12, device_s=0.2)
    monkeypatch.setattr(profile, "_measure_host", lambda step: call)
    batch, counted = slots_of().batch(N), profiled(toy_model, slots_of())
    own = profile_step(lambda: None, toy_model, batch, [], rows_per_call=4)
    expected = {"host_s": 0.1, "row_s": 0.2, "launches": 3, "device_s": 0.05, "busy": 0.25, "regime": "launch-bound"}
    assert asdict(own) == {**asdict(counted), **expected}


# Deciding

LAUNCH_BOUND = Profile(
    n=1, gpu="NVIDIA H200", dtype="bfloat16", operations=759, launches=1000, host_s=0.015, row_s=0.0152, device_s=0.003,
    busy=0.197, flops=10**12, floor_bytes=10**9, traffic_bytes=10**10, floor_s=0.002, roofline_s=0.0029,
    regime="launch-bound",
)  # fmt: skip
COMPUTE_BOUND = replace(LAUNCH_BOUND, host_s=0.035, device_s=0.143, row_s=0.145, busy=0.986, regime="compute-bound")


def test_graphs_pay_where_the_host_is_slower_than_the_device() -> None:
    choice = choose(LAUNCH_BOUND)
    assert choice.mode == "step-graph"
    assert choice.gain == pytest.approx(5.0)
    assert choice.reason == (
        "launch-bound: the host takes 15 ms to enqueue a row that the device runs in 3 ms, "
        "so graphs should make it 5 times faster"
    )


@pytest.mark.parametrize(
    ("graph_bytes", "cost"), [(None, "a memory pool of their own"), (3_900_000_000, "3.9 GB")], ids=["unknown", "known"]
)
def test_a_compute_bound_row_stays_eager_and_says_what_graphs_would_cost(graph_bytes: int | None, cost: str) -> None:
    choice = choose(COMPUTE_BOUND, graph_bytes)
    assert (choice.mode, choice.gain) == ("eager", 1.0)
    assert choice.reason == (
        "compute-bound: the device takes 143 ms for a row that the host enqueues in 35 ms, "
        f"so graphs would gain nothing and cost {cost}"
    )


def test_rows_unrolled_into_one_graph_are_a_loop_graph() -> None:
    assert choose(LAUNCH_BOUND, unroll=4).mode == "loop-graph"
    assert choose(COMPUTE_BOUND, unroll=4).mode == "eager"


@pytest.mark.parametrize(("faster", "mode"), [(1.3, "compiled"), (1.01, "eager"), (0.8, "eager")])
def test_where_graphs_do_not_pay_the_faster_of_compiled_and_eager_is_chosen(faster: float, mode: str) -> None:
    compiled = replace(COMPUTE_BOUND, row_s=COMPUTE_BOUND.row_s / faster)
    choice = choose(COMPUTE_BOUND, compiled=compiled)
    assert choice.mode == mode
    assert choice.gain == (pytest.approx(faster) if mode == "compiled" else 1.0)
    assert f"{compiled.row_s * 1e3:.3g} ms compiled" in choice.reason
    assert choose(LAUNCH_BOUND, compiled=compiled).mode == "step-graph"  # a graph holds compiled kernels


def test_host_and_device_alike_are_compute_bound() -> None:
    assert choose(replace(LAUNCH_BOUND, host_s=0.003)).mode == "eager"


@pytest.mark.parametrize("device_s", [None, 0.0])
def test_without_a_kernel_seen_nothing_is_claimed(device_s: float | None) -> None:
    choice = choose(replace(LAUNCH_BOUND, device_s=device_s))
    assert (choice.mode, choice.gain) == ("eager", None)
    assert choice.reason == "no whole trace of a row was had on NVIDIA H200, so nothing says that graphs pay"
    assert profile.regime_of(0.015, device_s) is None


def test_without_cuda_the_choice_is_eager_and_says_why() -> None:
    choice = choose(profiled(toy_model, slots_of()))
    assert (choice.mode, choice.gain) == ("eager", None)
    assert choice.reason == "graphs need a CUDA device, and the model is not on one"


@pytest.mark.parametrize(("field", "value"), [("host_s", math.nan), ("device_s", math.inf), ("row_s", -1.0)])
def test_a_profile_of_no_numbers_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"Profile\.{field}: expected a finite number >= 0, got {value}"):
        Profile(**{**asdict(LAUNCH_BOUND), field: value})


def test_a_capture_is_paid_back_after_so_many_images() -> None:
    assert break_even(2.0, 0.01, 50) == pytest.approx(4.0)
    assert break_even(2.0, 0.01, 50 / 8) == pytest.approx(32.0)
    assert break_even(0.0, 0.01, 50) == 0.0
    assert break_even(2.0, 0.0, 50) is None
    assert break_even(2.0, -0.01, 50) is None


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((math.nan, 0.01, 50), "capture_s"), ((-1.0, 0.01, 50), "capture_s"), ((2.0, math.nan, 50), "saved_per_row_s"),
     ((2.0, 0.01, 0), "rows_per_image"), ((2.0, 0.01, math.inf), "rows_per_image")],
)  # fmt: skip
def test_a_break_even_of_no_numbers_is_refused(arguments: tuple[float, float, float], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a finite number"):
        break_even(*arguments)


def test_the_floor_is_the_slower_of_flops_and_bytes() -> None:
    h200 = RATES["NVIDIA H200", "bfloat16"]
    assert h200.least_s(6_760_000_000_000, 5_130_000_000) == pytest.approx(8.56e-3, rel=1e-3)  # SDXL 1024, one sample
    assert h200.least_s(237_000_000_000, 1_500_000_000) == pytest.approx(
        0.349e-3, rel=1e-3
    )  # DiT-XL/2 256: its weights


# On a GPU


@pytest.mark.cuda
def test_a_gpu_tells_launches_times_and_the_regime() -> None:
    none = profiled(identity, slots_of(device="cuda"))
    two = profiled(alone(lambda sample: sample.sin().cos()), slots_of(device="cuda"))
    assert none.launches is not None
    assert two.launches == none.launches + 2
    for one in (none, two):
        assert one.gpu == torch.cuda.get_device_name()
        assert one.device_s is not None
        assert one.device_s > 0
        assert one.busy is not None
        assert 0 < one.busy <= 1
        assert one.regime == profile.regime_of(one.host_s, one.device_s)
        assert (one.floor_s, one.roofline_s) == (None, None)  # float32 has no rates


@pytest.mark.cuda
def test_auto_takes_graphs_for_a_small_model() -> None:
    """Its row is all launches on any GPU."""
    pipe, request = fastdiff.models.digits().to("cuda"), Request(prompt="a handwritten two", steps=4)
    auto, eager = Runtime(pipe, max_batch=1, mode="auto", compile="none"), Runtime(pipe, max_batch=1)
    assert auto.choice is not None
    assert auto.choice.mode == auto.steps.mode == "step-graph"
    assert "launch-bound" in auto.choice.reason
    assert torch.equal(auto.generate([request])[0].latents, eager.generate([request])[0].latents)
    auto.close()
    eager.close()


@pytest.mark.cuda
@pytest.mark.compiles
def test_the_compiled_step_outside_the_model_is_one_kernel_and_the_row_counter() -> None:
    slots = Slots(replace(slots_of().plan, compile="default"), "cuda", planar=True)
    step = partial(Steps(identity, slots, "step-graph"), N)
    calls = 10
    traces = (len(trace_kernels(step, calls)) for _ in range(TRIES))  # some of which lose kernels
    assert 2 * calls in traces


@pytest.mark.cuda
def test_a_graph_is_profiled_kernel_by_kernel_and_counted_as_the_row_it_captured() -> None:
    slots = slots_of(device="cuda")
    modes = [Steps(toy_model, slots, mode) for mode in ("eager", "step-graph")]
    eager, replay = (profile_step(partial(steps, N), toy_model, slots.batch(N), []) for steps in modes)
    assert eager.launches is not None
    assert replay.launches is not None
    copies = len(slots.batch(N).planes)  # of latents back into their place; nothing says that a graph's are listed
    assert eager.launches - copies <= replay.launches <= eager.launches
    assert (replay.operations, replay.flops, replay.traffic_bytes) == (
        eager.operations, eager.flops, eager.traffic_bytes,
    )  # fmt: skip
