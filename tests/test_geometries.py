"""Geometries: as large as published, pure on the device, finite in bfloat16, and each request apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fastdiff.audit import audit
from fastdiff.models.geometries import GEOMETRIES, Geometry, Inputs, geometry
from fastdiff.slots import Slots
from fastdiff.step import denoise_step
from tests.test_step import HOST_READS, OpCounter

REAL = [name for name in GEOMETRIES if not name.startswith("tiny-")]
TINY = [name for name in GEOMETRIES if name.startswith("tiny-")]


@cache
def tiny(name: str, dtype: torch.dtype) -> Geometry:
    return geometry(name, "cpu", dtype)


@cache
def on_meta(name: str) -> Geometry:
    """At full size, without memory: shapes and devices are those of any other device."""
    return geometry(name, "meta", torch.bfloat16)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_a_name_that_is_none_is_refused_with_all_that_are() -> None:
    with pytest.raises(ValueError, match=r"expected one of sd15-512, .*, tiny-wan21-1.3b-480p, got 'sd3'"):
        geometry("sd3", "cpu", torch.float32)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("sd15-512", 859_520_964),
        ("sdxl-1024", 2_567_463_684),
        ("flux-dev-1024", 11_901_408_320),
        ("wan21-1.3b-480p", 1_418_996_800),
    ],
)
def test_a_real_geometry_has_the_published_number_of_parameters(name: str, published: int) -> None:
    assert count(on_meta(name).model) == published


def test_dit_has_them_too_but_for_the_embedding_that_diffusers_keeps_in_every_block() -> None:
    model: Any = on_meta("dit-xl-256").model
    repeated = sum(count(block.norm1.emb) for block in model.transformer_blocks[1:])
    assert abs(count(model) - repeated - 675e6) < 1e6


@pytest.mark.parametrize(("name", "about"), [("sd35-medium-1024", 2.5e9), ("qwen-image-1024", 20e9)])
def test_these_are_as_large_as_their_publishers_round_them(name: str, about: float) -> None:
    """Positions that are stored with the weights are counted with them."""
    model = on_meta(name).model
    assert abs(sum(tensor.numel() for tensor in model.state_dict().values()) - about) < 0.03 * about


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class DeviceSpy(TorchDispatchMode):
    """Remembers on which devices tensors were made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.made_on: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.made_on |= {leaf.device.type for leaf in tree_leaves(output) if isinstance(leaf, Tensor)}
        return output


def empty_inputs(own: Geometry, n: int) -> Inputs:
    conditioning = {name: torch.empty(n, *spec.shape, dtype=spec.dtype) for name, spec in own.plan.conditioning.items()}
    return Inputs(
        torch.empty(n, *own.plan.latent_shape, dtype=own.plan.dtype), torch.empty(n), conditioning, torch.empty(n)
    )


@pytest.mark.parametrize("name", REAL)
def test_a_real_geometry_fits_its_plan_and_makes_nothing_on_the_host(name: str) -> None:
    own = on_meta(name)
    for n in (2, 1):
        with torch.device("meta"):
            inputs = empty_inputs(own, n)
        with DeviceSpy() as spy:
            output = own.denoiser(*inputs)
        assert output.shape == (n, *own.plan.latent_shape)
        assert spy.made_on == {"meta"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", TINY)
def test_outputs_are_finite_and_none_is_zero(name: str, dtype: torch.dtype) -> None:
    own = tiny(name, dtype)
    assert own.toy
    assert {parameter.dtype for parameter in own.model.parameters()} == {dtype}
    inputs = own.inputs(3, seed=1)
    assert all(tensor.all() for tensor in (inputs.sample, inputs.timestep))
    assert all(tensor.all() for tensor in inputs.conditioning.values() if tensor.dtype != torch.bool)
    output = own.denoiser(*inputs).float()
    assert output.isfinite().all()
    assert output.std() > 0.01
    assert (output != 0).float().mean() > 0.99


def test_convolutions_keep_their_weights_as_kernels_read_them() -> None:
    """Else inductor lays each of them out anew in every row."""
    convolutions = [one for one in tiny("tiny-sd15-512", torch.float32).model.modules() if isinstance(one, nn.Conv2d)]
    assert all(one.weight.is_contiguous(memory_format=torch.channels_last) for one in convolutions)
    assert any(not one.weight.is_contiguous() for one in convolutions)


@pytest.mark.parametrize("name", TINY)
def test_a_request_has_its_own_output_at_every_batch_size(name: str) -> None:
    own = tiny(name, torch.float32)
    inputs = own.inputs(4)
    together = own.denoiser(*inputs)
    for n in (1, 3):
        part = Inputs(
            inputs.sample[:n],
            inputs.timestep[:n],
            {k: v[:n] for k, v in inputs.conditioning.items()},
            inputs.guidance[:n],
        )
        torch.testing.assert_close(own.denoiser(*part), together[:n], rtol=1e-4, atol=1e-4)


def test_flux_is_called_as_its_pipeline_calls_it() -> None:
    own = tiny("tiny-flux-dev-1024", torch.float32)
    inputs = own.inputs(2)
    expected = own.model(
        inputs.sample,
        inputs.conditioning["prompt_embeds"],
        inputs.conditioning["pooled_prompt_embeds"],
        inputs.timestep / 1000,
        FluxPipeline._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32),
        torch.zeros(8, 3),
        inputs.guidance,
        return_dict=False,
    )[0]
    assert torch.equal(own.denoiser(*inputs), expected)


@pytest.mark.parametrize("name", TINY)
def test_every_input_reaches_the_output(name: str) -> None:
    own = tiny(name, torch.float32)
    first, other = own.inputs(2, seed=0), own.inputs(2, seed=1)
    output = own.denoiser(*first)
    changed = {field: first._replace(**{field: getattr(other, field)}) for field in ("sample", "timestep", "guidance")}
    for field in first.conditioning:
        changed[field] = first._replace(conditioning=first.conditioning | {field: other.conditioning[field]})
    for field, inputs in changed.items():
        assert (own.denoiser(*inputs) - output).abs().amax() > 1e-4, field


@pytest.mark.parametrize("name", TINY)
def test_weights_and_inputs_are_the_same_every_time_and_no_state_of_torch_is_touched(name: str) -> None:
    before, dtype = torch.get_rng_state(), torch.get_default_dtype()
    own = geometry(name, "cpu", torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == dtype
    again = tiny(name, torch.bfloat16)
    assert torch.equal(own.denoiser(*own.inputs(2, seed=3)), again.denoiser(*again.inputs(2, seed=3)))


@pytest.mark.parametrize("name", TINY)
def test_a_step_over_its_slots_reads_nothing_on_the_host(name: str) -> None:
    own = tiny(name, torch.bfloat16)
    slots = Slots(own.plan, "cpu")
    for n in own.plan.batch_sizes[:2]:
        with OpCounter() as counter:
            denoise_step(own.denoiser, slots.batch(n))
        assert not HOST_READS & counter.ops.keys()


@pytest.mark.parametrize(
    "name", ["tiny-sdxl-1024", "tiny-flux-dev-1024", "tiny-sd35-medium-1024", "tiny-qwen-image-1024"]
)
def test_a_step_is_safe_to_capture_and_keeps_its_slots_apart(name: str) -> None:
    """What a denoiser holds beside its model is put on the audited device with it, as buffers."""
    own = tiny(name, torch.float32)
    assert isinstance(own.denoiser, partial)
    call, (model, *made) = own.denoiser.func, own.denoiser.args
    leaves, structure = tree_flatten(made)
    held = nn.Module()
    held.add_module("model", model)
    for i, leaf in enumerate(leaves):
        held.register_buffer(f"made_{i}", leaf)

    def denoiser(sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor) -> Tensor:
        here = tree_unflatten([held.get_buffer(f"made_{i}") for i in range(len(leaves))], structure)
        output: Tensor = call(model, *here, sample, timestep, conditioning, guidance)
        return output

    assert audit(denoiser, Slots(own.plan, "cpu").batch(2), held) == []


@pytest.mark.cuda
@pytest.mark.parametrize("name", TINY)
def test_on_a_gpu_a_captured_call_follows_its_inputs(name: str) -> None:
    own = geometry(name, "cuda", torch.bfloat16)
    assert {tensor.device.type for tensor in (*own.model.parameters(), *own.model.buffers())} == {"cuda"}
    inputs, others = own.inputs(2, seed=0), own.inputs(2, seed=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        own.denoiser(*inputs)  # libraries set themselves up, which a capture forbids
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = own.denoiser(*inputs)
    for place, values in zip(tree_leaves(inputs), tree_leaves(others), strict=True):
        place.copy_(values)
    graph.replay()
    torch.testing.assert_close(output, own.denoiser(*others), rtol=0.05, atol=0.05)
