"""Requests in, images out: diffusers' images, whatever else is in the batch."""

from __future__ import annotations

import copy
import re
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch

import fastdiff
from fastdiff import (
    CapturePlan,
    NotLinear,
    NumericalError,
    PlanMismatch,
    Request,
    Runtime,
)
from fastdiff.noise import copy_generator
from fastdiff.stages import scheduler_of
from tests.conftest import Unrolled

MIXED = [
    Request(prompt="a handwritten one", steps=4, guidance_scale=3.0, seed=1, scheduler="Euler"),
    Request(prompt="a handwritten two", steps=7, guidance_scale=1.0, seed=2, scheduler="EulerAncestral"),
    Request(prompt="a handwritten three", steps=5, guidance_scale=5.0, seed=3, scheduler="UniPCMultistep"),
    Request(prompt="a handwritten four", steps=6, seed=4, negative_prompt="a handwritten nine"),
    Request(prompt="a handwritten five", steps=3, guidance_scale=2.0, seed=5, scheduler="Heun"),
    Request(prompt="a handwritten six", steps=4, seed=6, scheduler="PNDM"),
    Request(prompt="a handwritten seven", steps=5, seed=7, scheduler="LCM", guidance_scale=1.5),
    Request(prompt="a handwritten eight", seed=8, scheduler="DDPM", timesteps=[900, 500, 200]),
    Request(prompt="a handwritten nine", seed=9, scheduler="EulerDiscrete", sigmas=[12.0, 4.0, 1.0]),
    Request(prompt="a handwritten zero", seed=10, steps=5, scheduler_options={"eta": 1.0}),
    Request(prompt="a handwritten one", seed=11, steps=5, scheduler="TCD"),  # whose own eta is not the pipeline's
]


def diffusers_image(pipe: Any, request: Request) -> torch.Tensor:
    """The untouched pipeline's own image for the same request."""
    components = {name: part for name, part in pipe.components.items() if name != "scheduler"}
    template = scheduler_of(pipe.scheduler, request.scheduler)
    own = type(pipe)(**components, scheduler=type(template).from_config(template.config), requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": request.steps, "guidance_scale": request.guidance_scale}
    output = own(
        request.prompt,
        negative_prompt=request.negative_prompt,
        timesteps=request.timesteps,
        sigmas=request.sigmas,
        eta=request.scheduler_options.get("eta", 0.0),
        generator=torch.Generator().manual_seed(request.seed),
        output_type="pt",
        **{name: value for name, value in asked.items() if value is not None},
    )
    return output.images[0]  # type: ignore[no-any-return]  # diffusers is untyped


def test_a_mixed_batch_gives_every_request_its_own_diffusers_image(pipe: Any, runtime: Runtime) -> None:
    """Eleven requests over four slots: samplers, steps, guidance, seeds, prompts and schedules all differ."""
    for result in runtime.generate(MIXED):
        assert result.error is None
        assert result.image is not None
        expected = diffusers_image(pipe, result.request)
        assert (result.image - expected).abs().max() <= 1e-4, result.request


def test_embeddings_and_latents_may_be_given(pipe: Any, runtime: Runtime) -> None:
    request = MIXED[0]
    positive, negative = pipe.encode_prompt(request.prompt, "cpu", 1, True)
    latents = torch.randn(runtime.plan.latent_shape, generator=torch.Generator().manual_seed(request.seed))
    given = Request(
        prompt_embeds=positive[0], negative_prompt_embeds=negative[0], latents=latents,
        steps=4, guidance_scale=3.0, scheduler="Euler",
    )  # fmt: skip
    expected, got = runtime.generate([request])[0], runtime.generate([given])[0]
    assert torch.equal(expected.latents, got.latents)


def test_generate_leaves_requests_in_order_and_refuses_none_at_all(runtime: Runtime) -> None:
    with pytest.raises(ValueError, match="requests: expected at least one request, got none"):
        runtime.generate([])
    results = runtime.generate(MIXED[:6])
    assert [result.request for result in results] == MIXED[:6]
    assert [result.rows for result in results] == [4, 7, 5, 6, 5, 13]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"scheduler": "Eular"}, ValueError, "expected one of"),
        ({"scheduler": "DPMSolverSDE"}, NotLinear, "Brownian"),
        ({"scheduler": "DDPM", "steps": 400}, PlanMismatch, "needs rows = 400"),
        ({"scheduler_options": {"etta": 1.0}}, TypeError, "etta"),
        ({"latents": torch.zeros(1, 8, 8)}, PlanMismatch, "latents: expected shape"),
        ({"latents": torch.full((4, 8, 8), float("nan"))}, ValueError, "latents: expected finite"),
        ({"negative_prompt_embeds": torch.zeros(3, 3)}, PlanMismatch, "negative_prompt_embeds: expected shape"),
        ({"steps": 2000}, ValueError, "2000"),
        ({"steps": 1000}, ValueError, "got DDIMScheduler, which raises IndexError: "),  # diffusers' own accident
        ({"scheduler": "Helios"}, ValueError, "got Helios, which raises KeyError: "),
        ({"scheduler": 7}, TypeError, "expected a diffusers scheduler, got int"),
    ],
)
def test_an_unsupported_request_raises_before_model_work_and_names_its_index(
    pipe: Any, runtime: Runtime, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    bad = Request(prompt="x", **fields)
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(error, match=rf"requests\[1\]: .*{message}"):
            runtime.generate([MIXED[0], bad])
    finally:
        hook.remove()
    assert not calls
    reason = runtime.supports(bad)
    assert reason is not None
    assert message in reason
    assert runtime.supports(MIXED[0]) is None


def test_something_else_than_a_request_is_refused(runtime: Runtime) -> None:
    with pytest.raises(TypeError, match=r"requests\[0\]: expected a fastdiff.Request, got str"):
        runtime.generate(["a handwritten seven"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="requests: expected a list of requests, got one Request: put it in a list"):
        runtime.generate(MIXED[0])  # type: ignore[arg-type]


def test_any_iterable_of_requests_will_do(runtime: Runtime) -> None:
    results = runtime.generate(request for request in MIXED[:2])
    assert [result.request for result in results] == MIXED[:2]


def test_an_image_that_is_not_finite_is_that_results_error_and_no_others(runtime: Runtime) -> None:
    poisoned = Request(prompt="x", steps=4, seed=1, guidance_scale=1e38, scheduler="Euler")
    alone = runtime.generate([MIXED[0], Request(prompt="x", steps=4, seed=1, scheduler="Euler")])
    together = runtime.generate([MIXED[0], poisoned])
    assert isinstance(together[1].error, NumericalError)
    assert together[1].image is None
    assert together[0].error is None
    assert torch.equal(together[0].latents, alone[0].latents)


def test_an_image_that_cannot_be_decoded_is_that_results_error_and_no_others(pipe: Any) -> None:
    calls: list[int] = []

    held: list[weakref.ref[torch.Tensor]] = []

    def second_fails(module: Any, given: Any, output: torch.Tensor) -> None:
        calls.append(len(calls))
        if len(calls) == 2:
            held.extend(map(weakref.ref, (*given, output)))
            raise torch.OutOfMemoryError("no room for an image")

    own = Runtime(pipe, max_batch=2, certify=False)
    after = pipe.vae.decoder.conv_out.register_forward_hook(second_fails)
    try:
        results = own.generate(MIXED[:3])
    finally:
        after.remove()
    assert len(held) == 2
    assert [one() for one in held] == [None, None]  # the error holds none of what the image took
    error = results[1].error
    assert error is not None
    assert "in decode" in error.__notes__[0]  # and says where it was
    assert [result.image is None for result in results] == [False, True, False]
    with pytest.raises(torch.OutOfMemoryError, match="no room for an image"):
        results[1].to_pil()
    assert torch.equal(results[1].latents, own.generate(MIXED[:3])[1].latents)


@pytest.mark.parametrize("mode", ["eager", "compiled"])  # nothing is compiled: it is looked at before
def test_another_model_in_the_pipeline_is_refused(mode: Any) -> None:
    own = fastdiff.models.digits()
    served, request = Runtime(own, max_batch=1, mode=mode), Request(prompt="a handwritten two", steps=2)
    state, former = served.prepare(request), own.unet
    own.unet = copy.deepcopy(former)
    with pytest.raises(PlanMismatch, match=r"expected the unet that this runtime was built with, got another; build"):
        served.generate([request])
    assert "expected the unet" in str(served.supports(request))
    with served.session() as session:
        slot = session.add(state)
        with pytest.raises(PlanMismatch, match="expected the unet"):
            session.step()
        assert session.take(slot).row == 0
    own.unet = former
    assert served.supports(request) is None
    own.unet.to(torch.bfloat16)
    with pytest.raises(PlanMismatch, match=r"expected the unet in torch.float32 on cpu, .* got torch.bfloat16 on cpu"):
        served.generate([request])


def test_bad_constructor_arguments_are_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match="max_batch: expected an integer >= 1, got 0"):
        Runtime(pipe, max_batch=0)
    with pytest.raises(PlanMismatch, match="divisible by"):
        Runtime(pipe, height=33, width=32)
    with pytest.raises(PlanMismatch, match=r"expected one of .*StableDiffusionPipeline.*, got str"):
        Runtime("pipe")


def test_another_size_than_the_models_own(pipe: Any) -> None:
    result = Runtime(pipe, max_batch=1, height=64, width=32).generate([MIXED[0]])[0]
    assert result.image is not None
    assert result.image.shape[1:] == (64, 32)


# Modes, plans and memory


def test_auto_says_what_it_chose_and_why(pipe: Any) -> None:
    runtime = Runtime(pipe, max_batch=2, mode="auto", compile="none")
    assert runtime.choice is not None
    assert (runtime.choice.mode, runtime.steps.mode) == ("eager", "eager")
    assert "graphs need a CUDA device" in runtime.choice.reason
    assert runtime.generate([MIXED[0]])[0].mode == "eager"
    plain = Runtime(pipe, max_batch=2)
    assert plain.choice is None
    assert plain.counters is None


@pytest.mark.compiles
def test_auto_compiles_where_graphs_do_not_pay_and_takes_the_faster(pipe: Any) -> None:
    runtime = Runtime(pipe, max_batch=4, mode="auto", batch_sizes=(4,), memory=6)  # the step compiled below
    assert runtime.choice is not None
    assert runtime.choice.mode == runtime.steps.mode == runtime.generate([MIXED[0]])[0].mode
    assert re.fullmatch(
        "graphs need a CUDA device, and the model is not on one; a row takes [0-9.]+ ms compiled and [0-9.]+ ms eager",
        runtime.choice.reason,
    )


def test_a_plan_is_taken_as_it_is_or_refused(pipe: Any) -> None:
    plan = CapturePlan.load("digits")
    runtime = Runtime(pipe, plan=plan, memory=6)
    assert runtime.plan == replace(plan, memory=6)
    assert runtime.generate([MIXED[0]])[0].error is None
    with pytest.raises(PlanMismatch, match="latent_shape: the pipeline has"):
        Runtime(pipe, plan=CapturePlan.load("sd15-512"))
    with pytest.raises(ValueError, match="at most one of plan and max_batch"):
        Runtime(pipe, 4, plan=plan)


def test_memory_is_what_the_tensors_take(pipe: Any) -> None:
    runtime = Runtime(pipe, max_batch=2, certify=False)
    runtime.generate([Request(prompt="a handwritten two", steps=1)])
    memory = runtime.memory()
    assert memory.weights_bytes == sum(weight.nbytes for weight in pipe.unet.parameters())
    assert memory.state_bytes == sum(tensor.nbytes for tensor in runtime.slots.tensors())
    assert memory.conditioning_bytes == 2 * 2 * 16 * 64 * 4
    assert (memory.graph_bytes, memory.left_out) == ({}, ())
    assert (memory.pool_bytes, memory.reserved_bytes, memory.driver_bytes) == (None, None, None)
    for _ in range(2):
        runtime.close()
    assert not hasattr(runtime, "slots")
    for _ in range(2):  # the lock is free again
        with pytest.raises(RuntimeError, match="this runtime was closed"):
            runtime.session()


def test_a_closed_runtime_says_so_whatever_it_is_asked_for(pipe: Any) -> None:
    runtime = Runtime(pipe, max_batch=1)
    runtime.close()
    asked: list[Callable[[], Any]] = [
        runtime.memory, runtime.profile, runtime.recapture, lambda: runtime.counters,
        lambda: runtime.prepare(MIXED[0]), lambda: runtime.generate(MIXED[:1]),
    ]  # fmt: skip
    for ask in asked:
        with pytest.raises(RuntimeError, match="this runtime was closed; build another"):
            ask()
    assert runtime.supports(MIXED[0]) == "RuntimeError: this runtime was closed; build another"


def test_a_profile_leaves_the_slots_as_they_were(runtime: Runtime) -> None:
    before = [tensor.clone().view(torch.uint8) for tensor in runtime.slots.tensors()]  # bits: slots may hold NaN
    profile = runtime.profile(2)
    assert (profile.n, profile.regime, profile.launches) == (2, None, None)
    assert profile.operations > 100
    after = [tensor.view(torch.uint8) for tensor in runtime.slots.tensors()]
    assert all(map(torch.equal, before, after))


# Runtime.denoise, the seam for hosts with stages of their own


@pytest.mark.parametrize("scheduler", ["DDIM", "EulerAncestral"])
def test_denoise_is_generate_without_the_stages(runtime: Runtime, scheduler: str) -> None:
    requests = [
        Request(prompt=f"a handwritten {word}", steps=4, seed=3, scheduler=scheduler) for word in ("one", "six")
    ]
    states = [runtime.prepare(request) for request in requests]
    generators = [copy_generator(state.generator) for state in states if state.generator is not None]
    before = [generator.get_state() for generator in generators]
    table = states[0].prepared[0]
    latents = runtime.denoise(
        torch.stack([state.prepared[1][0] for state in states]),
        {"prompt_embeds": torch.stack([state.conditioning["prompt_embeds"] for state in states])},
        table,
        states[0].guidance_scale,
        generators=generators,
    )
    expected = torch.stack([result.latents for result in runtime.generate(requests)])
    assert torch.equal(latents, expected)
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, before, strict=True))


def test_hosts_decode_as_generate_does(runtime: Runtime) -> None:
    """Without gradients, whose graphs would hold the decoder's activations."""
    (expected,) = runtime.generate(MIXED[:1])
    with torch.enable_grad(), runtime.session() as session:
        slot = session.add(runtime.prepare(MIXED[0]))
        while slot not in session.step():
            pass
        image = runtime.decode(session.take(slot))
    assert expected.image is not None
    assert torch.equal(image, expected.image)
    assert not image.requires_grad


def test_a_profile_runs_steps_as_a_session_does(pipe: Any, runtime: Runtime) -> None:
    """In inference mode they would be compiled once more."""
    found: list[bool] = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: found.append(torch.is_inference_mode_enabled()))
    with torch.inference_mode():
        runtime.profile()
    hook.remove()
    assert found
    assert not any(found)


def test_tensors_that_want_gradients_leave_the_slots_without(runtime: Runtime) -> None:
    state = runtime.prepare(Request(prompt="a handwritten two", steps=2))
    table, latents = state.prepared[0], state.prepared[1][:1]
    conditioning = {name: tensor.clone().requires_grad_() for name, tensor in state.conditioning.items()}
    wanted = runtime.denoise(latents, {name: tensor[None] for name, tensor in state.conditioning.items()}, table)
    given = {name: tensor[None] for name, tensor in conditioning.items()}
    assert torch.equal(runtime.denoise(latents.clone().requires_grad_(), given, table), wanted)
    assert not any(tensor.requires_grad for tensor in runtime.slots.tensors())


def test_denoise_refuses_what_does_not_fit(runtime: Runtime) -> None:
    state = runtime.prepare(MIXED[1])
    latents, conditioning = state.prepared[1][:1], {"prompt_embeds": state.conditioning["prompt_embeds"][None]}
    table = state.prepared[0]
    with pytest.raises(ValueError, match="guidance: expected one for each of 1 latents, got 2"):
        runtime.denoise(latents, conditioning, table, [1.0, 2.0])
    with pytest.raises(ValueError, match="draws noise: the state needs a generator"):
        runtime.denoise(latents, conditioning, table)
    with pytest.raises(PlanMismatch, match=r"conditioning prompt_embeds: expected \(2, 16, 64\) float32, got none"):
        runtime.denoise(latents, {}, table)
    with pytest.raises(PlanMismatch, match="latents: expected shape"):
        runtime.denoise(latents[:, :2], conditioning, table)
    with pytest.raises(ValueError, match="latents: expected at least one latent, got none"):
        runtime.denoise(latents[:0], {name: tensor[:0] for name, tensor in conditioning.items()}, table)
    with pytest.raises(ValueError, match="conditioning prompt_embeds: expected one for each of 1 latents, got 2"):
        runtime.denoise(latents, {name: tensor.repeat(2, 1, 1, 1) for name, tensor in conditioning.items()}, table)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"guidance": float("nan")}, ValueError, "guidance: expected finite numbers of float32, got"),
        ({"guidance": torch.tensor(3.0)}, TypeError, "guidance: expected a float for each latent, got Tensor"),
        ({"guidance": [None]}, TypeError, "guidance: expected a float for each latent, got NoneType"),
        ({"guidance": "3"}, TypeError, "guidance: expected a float for each latent, got str"),
        ({"table": diffusers.DDIMScheduler()}, TypeError, "table: expected a StepTable for each .*, got DDIMScheduler"),
        ({"generators": torch.Generator()}, TypeError, "generators: expected a list of 1, .*, got Generator"),
        (
            {"latents": torch.zeros(4, 8, 8)},
            PlanMismatch,
            r"latents: expected shape \(N, 4, 8, 8\) .*, got \(4, 8, 8\)",
        ),
        ({"latents": torch.zeros(1, 4, 8, 8).long()}, PlanMismatch, "latents: expected .* floating dtype, got .*int64"),
        ({"latents": [1]}, PlanMismatch, "latents: expected shape .*, got list"),
        (
            {"conditioning": {"prompt_embeds": [1]}},
            TypeError,
            "conditioning prompt_embeds: expected a tensor .*, got list",
        ),
        (
            {"conditioning": {"prompt_embeds": torch.tensor(1.0)}},
            ValueError,
            "conditioning prompt_embeds: expected one for each of 1 latents, got one number",
        ),
    ],
)
def test_denoise_says_what_it_takes(
    runtime: Runtime, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    state = runtime.prepare(MIXED[0])
    own: dict[str, Any] = {"latents": state.prepared[1][:1], "table": state.prepared[0], "guidance": 3}
    own["conditioning"] = {name: tensor[None] for name, tensor in state.conditioning.items()}
    assert runtime.denoise(**own).shape == (1, *runtime.plan.latent_shape)
    with pytest.raises(error, match=message):
        runtime.denoise(**(own | given))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spoilt", ["latents", "prompt_embeds"])
def test_denoise_refuses_what_is_not_finite_before_any_model_work(
    pipe: Any, runtime: Runtime, spoilt: str, value: float
) -> None:
    state, calls = runtime.prepare(MIXED[0]), []
    given = {"latents": state.prepared[1][:1], "prompt_embeds": state.conditioning["prompt_embeds"][None]}
    given[spoilt] = given[spoilt].clone()
    given[spoilt].view(-1)[-1] = value
    hook = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ValueError, match=f"^{spoilt}: expected finite values, got NaN or infinity"):
            runtime.denoise(given["latents"], {"prompt_embeds": given["prompt_embeds"]}, state.prepared[0])
    finally:
        hook.remove()
    assert not calls


@pytest.mark.parametrize("second", ["a table that is too long", "no generator"])
def test_denoise_refuses_the_last_request_before_the_first_has_run(pipe: Any, second: str) -> None:
    own, calls = Runtime(pipe, max_batch=1, rows=8, certify=False), []
    states = [own.prepare(Request(prompt="a handwritten two", steps=4, scheduler=name)) for name in ("DDIM", "LCM")]
    tables = [states[0].prepared[0], states[1].prepared[0]]
    if second != "no generator":
        tables[1] = fastdiff.tabulate(pipe.scheduler, 9)
    conditioning = {"prompt_embeds": torch.stack([state.conditioning["prompt_embeds"] for state in states])}
    hook = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises((PlanMismatch, ValueError), match=r"needs rows = 9|needs a generator"):
            own.denoise(torch.zeros(2, *own.plan.latent_shape), conditioning, tables)
    finally:
        hook.remove()
    assert not calls


def test_an_error_of_the_text_encoder_says_whose_text_it_was(pipe: Any, runtime: Runtime) -> None:
    def fails(module: Any, inputs: Any) -> None:
        if encoded.append(1) or len(encoded) == 2:  # type: ignore[func-returns-value]
            raise LookupError("no such token")

    encoded: list[int] = []
    hook = pipe.text_encoder.register_forward_pre_hook(fails)
    try:
        with pytest.raises(LookupError, match="no such token") as raised:
            runtime.generate([Request(prompt="a handwritten two", guidance_scale=1.0, steps=2)] * 3)
    finally:
        hook.remove()
    assert raised.value.__notes__ == ["in requests[1]"]


@pytest.mark.parametrize("ring_bytes", [0, 32 * 2**20])
@pytest.mark.parametrize("unroll", [2, 4])
def test_several_rows_a_call_are_as_many_calls(pipe: Any, runtime: Runtime, unroll: int, ring_bytes: int) -> None:
    """Tables of 3 to 7 rows, with noise and without: those that end within a call are held until it is over."""
    own = Runtime(pipe, max_batch=4, memory=6, unroll=unroll, ring_bytes=ring_bytes, certify=False)
    own.steps = Unrolled(own)
    assert own.plan.ring_depth == (own.plan.rows if ring_bytes else unroll)
    for unrolled, alone in zip(own.generate(MIXED), runtime.generate(MIXED), strict=True):
        assert unrolled.rows == alone.rows
        torch.testing.assert_close(unrolled.latents, alone.latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("built_in", [True, False])
@pytest.mark.parametrize("mode", [True, False])
def test_a_runtime_serves_hosts_in_inference_mode_and_others(mode: bool, built_in: bool, device: str) -> None:
    request = Request(prompt="a handwritten two", steps=3, scheduler="EulerAncestral")
    pipe = fastdiff.models.digits().to(device)
    with torch.inference_mode(built_in):
        own = Runtime(pipe, max_batch=2, mode="eager" if device == "cpu" else "step-graph", compile="none")
    fastdiff.table_cache.clear()
    with torch.inference_mode(mode):
        assert not own.prepare(request).prepared[0].A.is_inference()  # all who ask for it get this one
        one = own.generate([request])[0].latents
        with ThreadPoolExecutor(1) as elsewhere:  # the mode is a thread's own
            two = elsewhere.submit(lambda: own.generate([request])[0].latents).result()
    with torch.inference_mode(not mode):
        three = own.generate([request])[0].latents
    assert torch.equal(one, two)
    assert torch.equal(one, three)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_default_dtype_of_the_host_changes_nothing(pipe: Any, runtime: Runtime, dtype: torch.dtype) -> None:
    request = Request(prompt="a handwritten two", steps=5, seed=1, scheduler="EulerAncestral")
    expected = runtime.generate([request])[0].latents
    torch.set_default_dtype(dtype)
    try:
        within = Runtime(pipe, max_batch=2, certify=False)
        made = within.generate([request])[0].latents
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(made, expected)
    assert torch.equal(within.generate([request])[0].latents, made)


def test_a_runtime_that_is_closed_meanwhile_gives_the_results_that_it_made(pipe: Any) -> None:
    own = Runtime(pipe, max_batch=2, certify=False)
    with ThreadPoolExecutor(1) as elsewhere:
        closing: list[Any] = []

        def close_soon(*_: Any) -> None:
            if not closing:
                closing.append(elsewhere.submit(own.close))  # waits for the session, and is next

        before = pipe.unet.register_forward_pre_hook(close_soon)
        try:
            results = own.generate(MIXED[:2])
        finally:
            before.remove()
        closing[0].result(timeout=60)
    assert [result.image is None for result in results] == [False, False]
    with pytest.raises(RuntimeError, match="was closed"):
        own.generate(MIXED[:2])


def test_a_table_from_any_scheduler_object_is_served(pipe: Any, runtime: Runtime) -> None:
    own = diffusers.DEISMultistepScheduler.from_config(pipe.scheduler.config, solver_order=3)
    request = Request(prompt="a handwritten five", steps=6, seed=5, scheduler=own)
    image = runtime.generate([request])[0].image
    assert image is not None
    assert (image - diffusers_image(pipe, request)).abs().max() <= 1e-4


def test_threads_may_call_generate_at_once(runtime: Runtime) -> None:
    alone = [runtime.generate([request])[0].latents for request in MIXED[:4]]
    barrier = threading.Barrier(4)

    def make(request: Request) -> torch.Tensor:
        barrier.wait()
        return runtime.generate([request])[0].latents

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(make, MIXED[:4]))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.compiles
def test_compiled_images_are_the_eager_ones(pipe: Any, runtime: Runtime) -> None:
    compiled = Runtime(pipe, max_batch=4, mode="compiled", batch_sizes=(4,), memory=6)
    for own, reference in zip(compiled.generate(MIXED[:6]), runtime.generate(MIXED[:6]), strict=True):
        assert own.image is not None
        assert reference.image is not None
        assert (own.image - reference.image).abs().max() <= 1e-4
    assert fastdiff.table_cache.info().size > 0
