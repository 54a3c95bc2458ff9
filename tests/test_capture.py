"""Compiled and captured steps: the results of the same callable uncaptured, whatever the slots hold when they run."""

from __future__ import annotations

import gc
import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fastdiff
from fastdiff import Request, Runtime, capture
from fastdiff.capture import Counters, Mode, Regions, StepGraphs, Steps, compiled, regional, smallest, step_function
from fastdiff.errors import CannotCapture, OutOfMemory, PlanMismatch, StaleGraph
from fastdiff.isolation import certify
from fastdiff.models.geometries import GEOMETRIES, geometry
from fastdiff.plan import CapturePlan
from fastdiff.slots import Slots
from fastdiff.step import denoise_step
from fastdiff.weights import Weights
from tests.conftest import LATENT_SHAPE, SAMPLERS, random_state, table, toy_model
from tests.test_step import late_model, load_all, mixed_states

N = len(SAMPLERS)
PLAN = CapturePlan(latent_shape=LATENT_SHAPE, dtype=torch.float32, batch_sizes=(1, 3, N), rows=12)


SEGMENT_BYTES = 2 * 2**20  # what torch's allocator takes at least


def equal_slots(one: Slots, other: Slots) -> bool:
    return all(torch.equal(one.read(slot, PLAN.memory).cpu(), other.read(slot, PLAN.memory).cpu()) for slot in range(N))


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode: expected one of eager, compiled, step-graph, loop-graph, got 'fast'"):
        Steps(toy_model, Slots(PLAN, "cpu"), "fast")  # type: ignore[arg-type]


def test_modes_and_plans_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="'compiled' needs a plan whose compile is not 'none'"):
        Steps(toy_model, Slots(replace(PLAN, compile="none"), "cpu"), "compiled")
    with pytest.raises(ValueError, match="'loop-graph' needs unroll >= 2"):
        Steps(toy_model, Slots(PLAN, "cpu"), "loop-graph")


@pytest.mark.parametrize("mode", ["step-graph", "loop-graph"])
def test_graphs_without_cuda_are_an_error_and_no_quiet_eager_run(pipe: Any, mode: Mode) -> None:
    slots = Slots(replace(PLAN, unroll=2), "cpu")
    with pytest.raises(CannotCapture, match="need a CUDA device, the model is on cpu"):
        Steps(toy_model, slots, mode)
    with pytest.raises(CannotCapture, match="need a CUDA device, the model is on cpu"):
        Runtime(pipe, max_batch=1, mode=mode, unroll=2)


def test_only_graph_modes_capture() -> None:
    steps = Steps(toy_model, Slots(PLAN, "cpu"))
    with pytest.raises(CannotCapture, match="mode 'eager' has no graphs"):
        steps.capture(1)


def test_the_smallest_size_that_holds_a_count() -> None:
    assert [smallest((1, 2, 4), count) for count in (1, 2, 3, 4)] == [1, 2, 4, 4]
    with pytest.raises(PlanMismatch, match="at most 4 slots, got 5"):
        smallest((1, 2, 4), 5)


@pytest.mark.parametrize("planar", [False, True])
def test_views_made_beforehand_and_planes_apart_change_no_bit(planar: bool) -> None:
    plain, viewed = Slots(PLAN, "cpu"), Slots(PLAN, "cpu", planar=planar)
    steps = Steps(toy_model, viewed, "eager")
    for slots in (plain, viewed):
        load_all(slots, mixed_states())
    for _ in range(10):
        denoise_step(toy_model, plain.batch(N))
        steps(N)
        assert equal_slots(plain, viewed)


@pytest.mark.compiles
def test_compiled_is_eager_and_no_coefficient_is_frozen() -> None:
    """One compiled callable a segment serves tables, rows and latents that it was not compiled with."""
    plan = replace(PLAN, segments=2)
    models = (toy_model, late_model)
    eager_slots, compiled_slots = Slots(plan, "cpu"), Slots(plan, "cpu", planar=True)
    eager, inductor = Steps(models, eager_slots, "eager"), Steps(models, compiled_slots, "compiled")
    for order in (1, -1):  # the second time every slot gets another table
        states = mixed_states()[::order]
        for slots in (eager_slots, compiled_slots):
            load_all(slots, states, boundary=2)
        for _ in range(10):
            with torch.no_grad():
                for segment in (1, 0):
                    eager(N, segment)
                    inductor(N, segment)
            for slot in range(N):
                torch.testing.assert_close(
                    compiled_slots.read(slot, PLAN.memory), eager_slots.read(slot, PLAN.memory), rtol=1e-5, atol=1e-5
                )
    assert inductor.built[0, N].compile_s > eager.built[0, N].compile_s == 0


@pytest.mark.compiles
def test_the_step_outside_the_model_is_one_kernel_and_the_row_counter() -> None:
    """Gather, input scale, all K updates and their writes in place are fused; what is left is `row + 1` of n numbers.

    A null model leaves nothing between the head and the tail of a step. Inductor's C++ counts a loop nest twice, once
    for its vector form.
    """
    from torch._inductor import metrics
    from torch._inductor.utils import fresh_cache

    slots = Slots(replace(PLAN, latent_shape=(4, 8, 8)), "cpu", planar=True)
    metrics.reset()
    with torch.no_grad(), fresh_cache():  # a cached kernel is not counted
        Steps(lambda sample, timestep, conditioning, guidance: sample, slots, "compiled")(N)
    assert metrics.generated_kernel_count == 4


def test_twenty_variants_compile_in_one_process() -> None:
    """Dynamo gives up after eight variants of one code object; each variant has a code object of its own."""
    sizes = tuple(range(1, 21))
    slots = Slots(replace(PLAN, batch_sizes=sizes), "cpu", planar=True)
    before = counters["stats"]["unique_graphs"]
    with torch.no_grad():
        for n in sizes:
            one = compiled(step_function(toy_model, slots.batch(n)), f"variant_{n}", "default", backend="eager")
            for _ in range(2):
                one()
    assert counters["stats"]["unique_graphs"] == before + len(sizes)


def test_compiled_steps_look_at_the_global_state_alone() -> None:
    """Guards on the model are the watched weights' work, once per request; autocast is the host's, at any time."""
    scale = {"by": 2.0}
    double = compiled(lambda x: x @ x * scale["by"], "double", "default", backend="eager")
    x = torch.eye(2)
    assert torch.equal(double(x), 2 * x)
    scale["by"] = 3.0
    assert torch.equal(double(x), 2 * x)  # which is why the weights are watched
    with torch.autocast("cpu", torch.bfloat16):
        assert double(x).dtype == torch.bfloat16


def test_shapes_are_static_whatever_was_compiled_before() -> None:
    """One name at several sizes: dynamo would make the second one dynamic, which is a slower kernel."""
    seen: list[list[Any]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append([one for one in inputs if not isinstance(one, Tensor)])
        return graph.forward

    for shape in ((4, 8, 8), (4, 6, 10), (2, 4, 4)):
        slots = Slots(replace(PLAN, latent_shape=shape), "cpu", planar=True)
        with torch.no_grad():
            compiled(step_function(toy_model, slots.batch(N)), "one_name", "default", backend=backend)()
    assert seen == [[], [], []]  # no symbolic sizes among the inputs


@pytest.mark.compiles
def test_a_compiled_step_sees_weights_written_in_place_and_refuses_others() -> None:
    torch.manual_seed(0)
    model = Blocks()
    linear = next(module for module in model.modules() if isinstance(module, nn.Linear))
    slots, reference = Slots(PLAN, "cpu", planar=True), Slots(PLAN, "cpu")
    steps, eager = Steps(model, slots, "compiled", model), Steps(model, reference, "eager", model)
    for own in (slots, reference):
        load_all(own, mixed_states())

    def agree() -> bool:
        steps(N)
        eager(N)
        return all(torch.allclose(slots.read(i, 1), reference.read(i, 1), rtol=1e-5, atol=1e-5) for i in range(N))

    with torch.no_grad():
        assert agree()
        linear.weight.mul_(0.5)
        steps.check()
        assert agree()
        linear.weight = nn.Parameter(torch.randn(5, 5))
        with pytest.raises(StaleGraph, match=r"compiled step is stale: blocks\.0\.linear.*recapture\(\)"):
            steps.check()
        steps.recapture()
        steps.check()
        assert agree()


def test_as_many_variants_of_a_models_blocks_compile_in_one_process() -> None:
    sizes, model = tuple(range(1, 13)), Blocks()
    slots = Slots(replace(PLAN, batch_sizes=sizes), "cpu", planar=True)
    with torch.no_grad():
        for n in sizes:
            regional(model, slots.batch(n), model, "default", backend="eager")()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Blocks(nn.Module):
    """A model of repeated blocks, as diffusers marks them, and a denoiser of the same call."""

    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        for block in self.blocks:
            sample = block(sample)
        return sample


def test_regional_compilation_is_the_eager_step_and_leaves_the_model_as_it_was() -> None:
    model = Blocks()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    eager_slots, slots = Slots(PLAN, "cpu"), Slots(PLAN, "cpu", planar=True)
    eager = Steps(model, eager_slots, "eager")
    for own in (eager_slots, slots):
        load_all(own, mixed_states())
    seen: list[int] = []
    with torch.no_grad():
        for n in (N, 3):
            step = regional(model, slots.batch(n), model, "default", backend="eager")
            for _ in range(4):
                eager(n)
                step()
                seen.append(n)
                assert equal_slots(eager_slots, slots)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    mine = torch.compile(model.blocks[0]._call_impl, backend="eager")  # what the user compiled stays the user's
    model.blocks[0]._compiled_call_impl = mine
    with Regions(model, N, "default", "eager"):
        assert all(block._compiled_call_impl not in (None, mine) for block in model.blocks)
    assert model.blocks[0]._compiled_call_impl is mine
    assert "_compiled_call_impl" not in vars(model.blocks[1])


def test_regions_are_compiled_for_their_own_thread_alone() -> None:
    """Two runtimes over one model, each in a step of its own thread, and a third that runs it as it is."""
    model, called = Blocks(), list[str]()
    weights = Weights(model)
    mine = model.blocks[1]._compiled_call_impl = torch.compile(model.blocks[1]._call_impl, backend="eager")

    def backend(name: str) -> Any:
        def compiles(graph: Any, _: Any) -> Any:
            def runs(*inputs: Tensor) -> Any:
                called.append(name)
                return graph(*inputs)

            return runs

        return compiles

    regions = {name: Regions(model, 1, "default", backend(name)) for name in ("one", "other")}
    inside, leave = ({name: threading.Event() for name in regions} for _ in range(2))

    def run(name: str) -> None:
        with regions[name]:
            inside[name].set()
            assert leave[name].wait(60)
            model.blocks[0](torch.ones(1, 5))

    with ThreadPoolExecutor(2) as pool, torch.no_grad():
        steps = {name: pool.submit(run, name) for name in regions}
        assert all(one.wait(60) for one in inside.values())
        model.blocks[0](torch.ones(1, 5))
        assert called == []
        assert weights.changed() is Weights(model).changed() is None
        for name in ("other", "one"):  # the first to come is the last to go
            leave[name].set()
            steps[name].result(60)
    assert called == ["other", "one"]
    with torch.no_grad(), regions["one"], regions["other"]:
        model.blocks[0](torch.ones(1, 5))
        model.blocks[2].compile(backend="eager")  # meanwhile, by the user
    assert called == ["other", "one", "other"]
    assert vars(model.blocks[2])["_compiled_call_impl"] is not None
    assert "_compiled_call_impl" not in vars(model.blocks[0])
    assert model.blocks[1]._compiled_call_impl is mine


def test_regional_compilation_needs_repeated_blocks() -> None:
    with pytest.raises(PlanMismatch, match="Linear names no _repeated_blocks and no _no_split_modules"):
        Regions(nn.Linear(1, 1), 1, "default", "eager")


REGIONAL = [name for name in GEOMETRIES if f"tiny-{name}" in GEOMETRIES and CapturePlan.load(name).regional]


@pytest.mark.parametrize("name", REGIONAL)
def test_every_shipped_regional_plan_finds_blocks_and_few_variants_of_them(name: str) -> None:
    """Not one variant a block, and far from the eight at which dynamo gives up."""
    own = geometry(f"tiny-{name}", "cpu", torch.float32)
    inputs, before = own.inputs(2), counters["stats"]["unique_graphs"]
    regions = Regions(own.model, 2, "default", "eager")
    with torch.no_grad():
        expected = own.denoiser(*inputs)
        for _ in range(2):
            with regions:
                assert torch.equal(own.denoiser(*inputs), expected)
    assert 1 <= counters["stats"]["unique_graphs"] - before <= 4


@pytest.mark.compiles
def test_what_was_compiled_survives_a_restart_in_torchs_own_cache(tmp_path: Path) -> None:
    script = """
        import json

        import torch
        from torch._dynamo.utils import counters

        from fastdiff.capture import Steps
        from fastdiff.plan import CapturePlan
        from fastdiff.slots import Slots

        plan = CapturePlan(latent_shape=(1, 2, 2), dtype=torch.float32, batch_sizes=(1,), rows=2)
        slots = Slots(plan, "cpu", planar=True)
        with torch.no_grad():
            Steps(lambda sample, timestep, conditioning, guidance: sample, slots, "compiled")(1)
        print(json.dumps(counters["inductor"]))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    first, second = (
        json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
        for _ in range(2)
    )
    assert first["fxgraph_cache_miss"] == second["fxgraph_cache_hit"] == 1
    assert not first.get("fxgraph_cache_hit", 0) + second.get("fxgraph_cache_miss", 0)


def test_what_a_capture_takes_of_torch_is_there() -> None:
    """Found without a GPU: names that torch keeps private or calls beta, and may drop or rename."""
    private = set(re.findall(r"torch\._C\.(\w+)", inspect.getsource(capture)))
    stubs = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text()  # a build for CPUs has the names alone
    assert len(private) == 3
    assert all(f"def {name}(" in stubs for name in private)
    begin = inspect.signature(torch.cuda.CUDAGraph.capture_begin).parameters
    assert begin["pool"].default is None
    assert "capture_error_mode" in begin
    assert {"capture_end", "replay", "reset"} <= vars(torch.cuda.CUDAGraph).keys()
    assert {"id", "snapshot", "use_count"} <= vars(torch.cuda.MemPool).keys()
    assert "pool" in inspect.signature(torch.cuda.use_mem_pool).parameters
    assert torch._inductor.list_mode_options("default") == {}
    assert torch._inductor.list_mode_options("max-autotune-no-cudagraphs")["max_autotune"]


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_the_hosts_again_after_a_capture_that_failed(enabled: bool) -> None:
    def fails() -> None:
        with capture._no_garbage_collection():
            assert not gc.isenabled()
            raise RuntimeError("out of order")

    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(RuntimeError, match="out of order"):
            fails()
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


# CUDA


@pytest.fixture
def cuda_pipe() -> Iterator[Any]:
    yield fastdiff.models.digits().to("cuda")
    gc.collect()
    torch.cuda.empty_cache()


def cuda_slots(**changes: Any) -> Slots:
    return Slots(replace(PLAN, **{"compile": "none"} | changes), "cuda", planar=True)


@pytest.fixture(scope="module", params=["none", "default"])
def graphed(request: pytest.FixtureRequest) -> Iterator[tuple[Slots, Steps]]:
    """Graphs of odd sizes too, captured once for several tests: on a GPU compiling is most of their time."""
    slots = cuda_slots(compile=request.param, batch_sizes=(3, 5, N))
    steps = Steps(toy_model, slots, "step-graph")
    yield slots, steps
    steps.close()


@pytest.mark.cuda
def test_graphs_of_inference_mode_and_others_follow_each_other() -> None:
    """In a process of its own: the tensors of torch's generator are made for the first graph that there is."""
    script = """
        import torch

        from fastdiff.capture import StepGraphs

        graphs, x = StepGraphs(torch.device("cuda"), unroll=1), torch.zeros(3, device="cuda")

        def step():
            x.add_(1)

        with torch.inference_mode():
            graphs.capture(1, step)
        graphs.capture(2, step)
        x.zero_()
        graphs.replay(1)
        with torch.inference_mode():
            graphs.replay(2)
        assert x.tolist() == [2, 2, 2]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


@pytest.mark.cuda
@pytest.mark.parametrize(("how", "unroll"), [("none", 1), ("none", 4), ("default", 4)])
def test_captured_is_the_same_callable_uncaptured_bitwise(how: Any, unroll: int) -> None:
    """Mixed samplers in two segments, then other tables in the same slots."""
    sizes = PLAN.batch_sizes if how == "none" else (N,)
    changes: dict[str, Any] = {"compile": how, "unroll": unroll, "segments": 2, "batch_sizes": sizes}
    uncaptured, captured, models = cuda_slots(**changes), cuda_slots(**changes), (toy_model, late_model)
    plain = Steps(models, uncaptured, "eager" if how == "none" else "compiled")
    graphs = Steps(models, captured, "step-graph" if unroll == 1 else "loop-graph")
    assert graphs.graphs is not None
    assert graphs.graphs.sizes(0) == graphs.graphs.sizes(1) == sizes
    for order in (1, -1):
        states = mixed_states()[::order]
        for slots in (uncaptured, captured):
            load_all(slots, states, boundary=2)
        for _ in range(12 // unroll + 1):  # a call ends with the segment
            with torch.no_grad():
                for segment in (1, 0):
                    for _ in range(unroll):
                        plain(N, segment)
                    graphs(N, segment)
            assert equal_slots(uncaptured, captured)


@pytest.mark.cuda
def test_graphs_isolate_their_slots(graphed: tuple[Slots, Steps]) -> None:
    slots, steps = graphed
    assert certify(steps, slots, (3, 5, N)).batch_sizes == (3, 5, N)


@pytest.mark.cuda
def test_replays_wait_for_nothing_and_allocate_nothing(graphed: tuple[Slots, Steps]) -> None:
    slots, steps = graphed
    assert steps.graphs is not None
    load_all(slots, mixed_states())
    torch.cuda.synchronize()
    counted = steps.graphs.counters
    hits, misses, before = counted.hits, counted.misses, torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for count in (N, 1, 3, 5, N):
            steps(count)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert (counted.hits - hits, counted.misses - misses) == (4, 1)


@pytest.mark.cuda
def test_nothing_stays_in_a_slot_that_a_nan_request_left_in_a_graph(graphed: tuple[Slots, Steps]) -> None:
    slots, steps = graphed

    def run() -> list[Tensor]:
        slots.load(0, random_state(table("EulerDiscreteScheduler"), 1))
        latents = []
        for _ in range(5):
            steps(3)
            latents.append(slots.read(0, PLAN.memory))
        return latents

    fresh = run()
    poison = random_state(table("UniPCMultistepScheduler"), 0)
    poison.latents = torch.full_like(poison.prepared[1], float("nan"))
    slots.load(0, poison)
    slots.put_noise(0, 0, torch.full((1, 1, *LATENT_SHAPE), float("nan")))
    for _ in range(3):
        steps(3)
    assert slots.read(0, 1).isnan().all()
    for one, other in zip(fresh, run(), strict=True):
        assert torch.isfinite(other).all()
        assert torch.equal(one, other)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_thousand_requests_move_no_static_tensor_and_grow_no_memory(device: str) -> None:
    """Real mixed requests of four rows and more, a third of them cancelled or forked."""
    pipe = fastdiff.models.digits().to(device)
    mode: Mode = "eager" if device == "cpu" else "step-graph"
    runtime = Runtime(pipe, max_batch=8, mode=mode, compile="none")
    names = ("DDIM", "EulerAncestral", "UniPCMultistep", "DPMSolverMultistep", "Heun")
    encoded = runtime.prepare(Request(prompt="a handwritten two"))
    embeds = encoded.conditioning["prompt_embeds"]

    gone: Counter[str] = Counter()

    def serve(first: int, last: int) -> None:
        with runtime.session() as session:
            for number in range(first, last):
                while session.free < 2:  # one for a fork
                    for slot in session.step():
                        session.take(slot)
                request = Request(
                    prompt_embeds=embeds[1],
                    negative_prompt_embeds=embeds[0],
                    steps=4 + number % 3,
                    seed=number,
                    scheduler=names[number % len(names)],
                )
                slot = session.add(runtime.prepare(request))
                if number % 3 == 0:
                    for _ in range(number % 4):  # before the first row, or in its midst
                        session.step()
                    what = "forked" if number % 2 else "cancelled"
                    gone[what] += 1
                    if what == "forked":
                        session.add(session.fork(slot))
                    else:
                        session.cancel(slot)

    def held() -> tuple[int, ...]:
        gc.collect()
        if device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated(), torch.cuda.memory_reserved() // SEGMENT_BYTES
        # By type: isinstance would ask every lazy proxy of every library for its class.
        return (sum(one.nbytes for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)),)

    with torch.no_grad():
        for count in range(1, 9):
            runtime.steps(count)  # every size has been used
    serve(0, 50)
    addresses, before = [tensor.data_ptr() for tensor in runtime.slots.tensors()], held()
    gone.clear()
    for first in range(50, 1050, 100):
        serve(first, first + 100)
        assert [tensor.data_ptr() for tensor in runtime.slots.tensors()] == addresses
    now = held()
    assert now[0] == before[0]
    assert sum(now[1:]) <= sum(before[1:]) + 1  # other sizes of temporaries may take a segment more, once
    assert gone == {"cancelled": 166, "forked": 167}


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["eager", "step-graph"])
def test_a_session_waits_for_what_the_constructor_enqueued_on_another_stream(cuda_pipe: Any, mode: Mode) -> None:
    request = Request(prompt="a handwritten two", steps=3)
    expected = Runtime(cuda_pipe, max_batch=1).generate([request])[0].latents
    torch.cuda._sleep(10**8)  # cycles: the slots are filled after them
    own = Runtime(cuda_pipe, max_batch=1, mode=mode, compile="none")
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch.equal(own.generate([request])[0].latents, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["step-graph", "loop-graph"])
def test_a_graphed_runtime_makes_the_images_of_an_eager_one(cuda_pipe: Any, mode: Mode) -> None:
    requests = [
        Request(prompt=f"a handwritten {word}", steps=3 + seed, seed=seed, scheduler=name)
        for seed, (word, name) in enumerate(zip(("one", "two", "six", "nine"), list(SAMPLERS)[:4], strict=True))
    ]
    eager = Runtime(cuda_pipe, max_batch=4).generate(requests)
    graphed = Runtime(cuda_pipe, max_batch=4, mode=mode, compile="none", unroll=4).generate(requests)
    for one, other in zip(eager, graphed, strict=True):
        assert one.mode == "eager"
        assert other.mode == mode
        assert torch.equal(one.latents, other.latents)


@pytest.mark.cuda
def test_stale_graphs_are_refused_until_recaptured(cuda_pipe: Any) -> None:
    runtime = Runtime(cuda_pipe, max_batch=1, mode="step-graph", compile="none")
    request = Request(prompt="a handwritten four", steps=4)
    with torch.no_grad():
        cuda_pipe.unet.conv_in.weight.mul_(0.9)  # in place: the graph sees it
    changed = runtime.generate([request])[0].latents
    assert torch.equal(changed, Runtime(cuda_pipe, max_batch=1).generate([request])[0].latents)
    cuda_pipe.unet.conv_in.weight = nn.Parameter(cuda_pipe.unet.conv_in.weight * 0.5)
    with pytest.raises(StaleGraph, match=r"conv_in.*recapture\(\)"):
        runtime.generate([request])
    runtime.recapture()
    assert not torch.equal(runtime.generate([request])[0].latents, changed)


@pytest.mark.cuda
def test_the_byte_budget_is_settled_in_the_constructor() -> None:
    slots = cuda_slots()
    free = Steps(toy_model, slots, "step-graph").graphs
    assert free is not None
    assert free.nbytes > 0
    with pytest.raises(OutOfMemory, match=f"the graph of batch size {N} takes"):
        Steps(toy_model, cuda_slots(graph_bytes=0), "step-graph")


@pytest.mark.cuda
def test_the_least_used_graph_goes_for_one_that_the_budget_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepGraphs, "nbytes", property(lambda graphs: 10 * len(graphs._graphs)))
    slots = cuda_slots(graph_bytes=20)
    steps = Steps(toy_model, slots, "step-graph")
    graphs = steps.graphs
    assert graphs is not None
    assert graphs.sizes() == (3, N)
    assert graphs.counters == Counters(captures=2)
    load_all(slots, mixed_states())
    for count in (1, N):
        steps(count)
    assert graphs.counters == Counters(hits=1, misses=1, captures=2)
    steps.capture(1)
    assert graphs.sizes() == (1, N)
    for count in (1, 3):
        steps(count)
    assert graphs.counters == Counters(hits=2, misses=2, captures=3, evictions=1)


@pytest.mark.cuda
def test_what_a_capture_took_is_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps(toy_model, cuda_slots(), "step-graph", progress=True)
    assert list(steps.built) == [(0, n) for n in reversed(PLAN.batch_sizes)]  # the largest first
    for built in steps.built.values():
        assert min(built.compile_s, built.warm_up_s, built.capture_s) > 0
        assert min(built.torch_bytes, built.driver_bytes) >= 0
    assert (
        f"capture step-graph: 100%|##########| {len(PLAN.batch_sizes)}/{len(PLAN.batch_sizes)}"
        in capsys.readouterr().err.replace("█", "#")
    )


@pytest.mark.cuda
def test_a_step_that_cannot_be_captured_says_why() -> None:
    def reads(sample: Tensor, timestep: Tensor, conditioning: Any, guidance: Tensor) -> Tensor:
        return sample * timestep.max().item()

    with pytest.raises(CannotCapture, match="cannot be captured at batch size"):
        Steps(reads, cuda_slots(), "step-graph")
    assert torch.ones(3, device="cuda").sum().item() == 3  # and the device is as usable as before


@pytest.mark.cuda
def test_a_failed_capture_spoils_nothing_that_was_or_will_be_captured() -> None:
    graphs, x = StepGraphs(torch.device("cuda"), unroll=1), torch.zeros(3, device="cuda")
    collected: list[bool] = []

    def good() -> None:
        collected.append(gc.isenabled())
        x.add_(torch.ones_like(x))

    def raises() -> None:
        x.add_(torch.ones_like(x))
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("out of order")

    def reads() -> None:
        x.add_(x.sum().item())

    graphs.capture(1, good)
    assert collected == [True, False, False, False]  # it compiles, warms up and is captured
    for number, bad in enumerate((raises, reads, reads)):
        with pytest.raises(CannotCapture, match="cannot be captured at batch size 2"):
            graphs.capture(2, bad)
        assert torch.randn(3, device="cuda").isfinite().all()  # torch's generator is in no capture
        assert gc.isenabled()
        graphs.capture(3 + number, good)
        torch.cuda.empty_cache()
    x.zero_()
    for size in graphs.sizes():
        graphs.replay(size)
    assert graphs.sizes() == (1, 3, 4, 5)
    assert x.tolist() == [4, 4, 4]
    assert graphs.pool_bytes > 0
    graphs.close()
    assert graphs.pool_bytes == 0
    graphs.capture(1, good)  # closed, not dead
    graphs.replay(1)


@pytest.mark.cuda
def test_releasing_a_runtime_gives_everything_back(cuda_pipe: Any) -> None:
    def used() -> tuple[int, int]:
        gc.collect()
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    Runtime(cuda_pipe, max_batch=2).generate([Request(prompt="a handwritten two", steps=2)])  # what libraries keep
    before = used()
    runtime = Runtime(cuda_pipe, max_batch=4, mode="step-graph", compile="none")
    assert runtime.memory().pool_bytes
    assert used() > before
    runtime.close()
    assert used() == before
