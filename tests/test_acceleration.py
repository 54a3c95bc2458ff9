"""Tier 1: a pipeline accelerated in place makes the images that it made, in threads too, and comes back untouched."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.guiders import SkipLayerGuidance
from torch import Tensor, nn

import fastdiff
from fastdiff.acceleration import _changes_its_models
from fastdiff.errors import CannotCapture, NotLinear
from fastdiff.forward import Forward, _Copy, twin
from fastdiff.scheduler import TableScheduler
from tests.families.tiny_pipelines import PIPELINES

STEPS, GUIDANCE = 5, 3.0


@pytest.fixture
def own() -> Any:
    """A digits pipeline of the test's own, which it may change."""
    return fastdiff.models.digits()


def image(pipe: Any, seed: int = 0, **arguments: Any) -> Tensor:
    named = {
        "prompt": "a handwritten seven", "num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "pt",
        "generator": torch.Generator().manual_seed(seed), **arguments,
    }  # fmt: skip
    images: Tensor = pipe(**named).images
    return images


def drop_in(pipe: Any, **arguments: Any) -> Tensor:
    """The image with the drop-in scheduler and nothing else."""
    kept = pipe.scheduler
    pipe.scheduler = fastdiff.table_scheduler(kept, strict=True)
    try:
        return image(pipe, **arguments)
    finally:
        pipe.scheduler = kept


def near(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-4)


# One call


CALLS: list[dict[str, Any]] = [
    {},
    {"guidance_scale": 1.0},
    {"guidance_rescale": 0.5},
    {"prompt": ["a handwritten one", "a handwritten two"], "negative_prompt": ["five", "six"]},
    {"prompt": ["a handwritten one"] * 2, "generator": [torch.Generator().manual_seed(seed) for seed in (3, 4)]},
    {"latents": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))},
]


@pytest.mark.parametrize("arguments", CALLS, ids=lambda arguments: "-".join(arguments) or "plain")
def test_the_image_is_bitwise_the_drop_ins_and_nearly_the_untouched_pipes(pipe: Any, arguments: dict[str, Any]) -> None:
    if "latents" in arguments:
        side, channels = pipe.unet.config.sample_size, pipe.unet.config.in_channels
        arguments = {"latents": torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(5))}

    def fresh() -> dict[str, Any]:
        return copy.copy(arguments) | (
            {"generator": [one.clone_state() for one in arguments["generator"]]} if "generator" in arguments else {}
        )

    untouched, expected = image(pipe, **fresh()), drop_in(pipe, **fresh())
    with fastdiff.accelerated(pipe) as handle:
        assert torch.equal(image(pipe, **fresh()), expected)
        assert torch.equal(image(pipe, **fresh()), expected)
    assert near(untouched, expected)
    assert handle.stats == (2, 2 * STEPS, 0, 0, 0)


def test_flux_keeps_its_image() -> None:
    flux, call = PIPELINES["FluxPipeline"](), PIPELINES["FluxPipeline"].call
    untouched, expected = image(flux, **call), drop_in(flux, **call)
    with fastdiff.accelerated(flux):
        assert torch.equal(image(flux, **call), expected)
    with fastdiff.accelerated(flux, "compiled", _backend="eager") as handle:
        assert near(image(flux, **call), untouched)
    assert handle.stats.built == 1
    assert not vars(flux.transformer).get("_compiled_call_impl")


def test_what_a_call_leaves_on_the_pipe_is_what_it_left_before(own: Any) -> None:
    reference = fastdiff.models.digits()
    image(reference, guidance_rescale=0.5)
    with fastdiff.accelerated(own):
        image(own, guidance_rescale=0.5)
        assert (own.guidance_scale, own.guidance_rescale, own.num_timesteps) == (GUIDANCE, 0.5, STEPS)
        assert torch.equal(own.scheduler.timesteps, reference.scheduler.timesteps)
        image(own, guidance_scale=2.0, num_inference_steps=3)
        assert (own.guidance_scale, own.guidance_rescale, own.clip_skip) == (2.0, 0.0, None)
        assert len(own.scheduler.timesteps) == own.num_timesteps == 3
    assert vars(own).keys() == vars(reference).keys()


def test_image_to_image_from_the_same_components(own: Any) -> None:
    given = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    arguments: dict[str, Any] = {"image": given, "strength": 0.6, "num_inference_steps": 9}
    plain = diffusers.StableDiffusionImg2ImgPipeline(**own.components, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    untouched = image(plain, **arguments)
    with fastdiff.accelerated(plain), fastdiff.accelerated(own):  # both at once, over one model
        assert near(image(plain, **arguments), untouched)
        image(own)
        assert near(image(plain, **arguments), untouched)
    with fastdiff.accelerated(own):
        derived = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(own)
        assert type(derived) is diffusers.StableDiffusionImg2ImgPipeline
        assert near(image(derived, **arguments), untouched)


# Callbacks


def test_a_callback_changes_its_calls_latents_guidance_and_end(pipe: Any) -> None:
    def run(changes: Callable[[Any, int, dict[str, Any]], None]) -> tuple[Tensor, int]:
        seen = []

        def callback(call: Any, row: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            assert isinstance(call, diffusers.StableDiffusionPipeline)
            assert torch.equal(call.scheduler.timesteps[row], timestep)
            seen.append(row)
            changes(call, row, tensors)
            return tensors

        return image(pipe, callback_on_step_end=callback), len(seen)

    def scale(call: Any, row: int, tensors: dict[str, Any]) -> None:
        tensors["latents"] = tensors["latents"] * 0.9

    def strengthen(call: Any, row: int, tensors: dict[str, Any]) -> None:
        call._guidance_scale = 6.0

    def stop(call: Any, row: int, tensors: dict[str, Any]) -> None:
        call._interrupt = row >= 1

    plain = image(pipe)
    for changes in (scale, strengthen, stop):
        untouched, rows = run(changes)
        assert not near(untouched, plain)
        with fastdiff.accelerated(pipe) as handle:
            got, same_rows = run(changes)
        assert near(got, untouched)
        assert same_rows == rows
        assert handle.stats.fallbacks == 0


def test_interrupting_the_pipe_from_outside_stops_what_is_in_flight(own: Any) -> None:
    seen = []

    def callback(call: Any, row: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(row)
        if row == 1:
            own._interrupt = True
        return tensors

    with fastdiff.accelerated(own) as handle:
        image(own, callback_on_step_end=callback)
        assert handle.stats.rows == len(seen) == 2
        image(own)
    assert handle.stats.rows == 2 + STEPS


def test_a_call_that_raises_leaves_the_pipe_usable(own: Any) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise KeyError("mine")

    expected = drop_in(own)
    with fastdiff.accelerated(own) as handle:
        with pytest.raises(KeyError, match="mine"):
            image(own, callback_on_step_end=fail)
        assert handle.calls == []
        assert torch.equal(image(own), expected)


# Threads


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_threads_get_the_images_that_each_gets_alone(own: Any, mode: Any) -> None:
    """Other guidance, steps, prompts and rescaling; an image in four is interrupted."""

    def stop(call: Any, row: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        call._interrupt = row >= 2
        return tensors

    asked: list[dict[str, Any]] = [
        {"guidance_scale": 1.5, "num_inference_steps": 4, "prompt": "a handwritten two"},
        {"guidance_scale": 7.0, "num_inference_steps": 7, "guidance_rescale": 0.7},
        {"guidance_scale": 1.0, "num_inference_steps": 5},
        {"guidance_scale": 3.0, "num_inference_steps": 6, "callback_on_step_end": stop},
    ]
    with fastdiff.accelerated(own, mode, _backend="eager") as handle:
        alone = [image(own, seed, **one) for seed, one in enumerate(asked)]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                barrier = threading.Barrier(4)

                def run(seed: int, barrier: threading.Barrier = barrier) -> Tensor:
                    barrier.wait()
                    return image(own, seed, **asked[seed])

                for expected, got in zip(alone, pool.map(run, range(4)), strict=True):
                    assert torch.equal(expected, got)
        assert handle.stats.calls == 16
        assert handle.stats.fallbacks == 0
        assert handle.stats.built == (2 if mode == "compiled" else 0)  # with guidance and without
    for one, (seed, expected) in zip(asked, enumerate(alone), strict=True):
        assert near(image(own, seed, **one), expected)


@pytest.mark.parametrize(
    "name",
    ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler"],
)
def test_threads_of_every_kind_of_sampler(own: Any, name: str) -> None:
    """Samplers with memory and with noise; and one that is replaced between calls, as people do."""
    with fastdiff.accelerated(own):
        own.scheduler = getattr(diffusers, name).from_config(own.scheduler.config)
        alone = [image(own, seed, num_inference_steps=4 + seed) for seed in range(2)]
        assert isinstance(own.scheduler, TableScheduler)
        with ThreadPoolExecutor(2) as pool:
            for _ in range(3):
                images = pool.map(lambda seed: image(own, seed, num_inference_steps=4 + seed), range(2))
                assert all(map(torch.equal, alone, images))
    assert type(own.scheduler) is getattr(diffusers, name)


def test_two_pipes_over_one_model_with_other_samplers_in_threads(own: Any) -> None:
    other = diffusers.StableDiffusionPipeline(**own.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    other.scheduler = diffusers.UniPCMultistepScheduler.from_config(own.scheduler.config)
    with fastdiff.accelerated(own), fastdiff.accelerated(other), ThreadPoolExecutor(2) as pool:
        alone = [image(one) for one in (own, other)]
        for _ in range(3):
            assert all(map(torch.equal, alone, pool.map(image, (own, other))))


def test_attributes_that_a_component_sets_on_itself_in_a_call_are_the_calls(own: Any) -> None:
    """Some autoencoders keep a video's frames on themselves while they decode."""
    met, seen = threading.Barrier(2), []
    decode = type(own.vae).decode

    class Keeper(type(own.vae)):  # type: ignore[misc]
        def decode(self, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.kept = latents
            met.wait()
            seen.append(self.kept is latents)
            return decode(self, latents, *args, **kwargs)

    own.vae.__class__ = Keeper
    with fastdiff.accelerated(own), ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda seed: image(own, seed), range(2)))
    assert seen == [True, True]
    assert not hasattr(own.vae, "kept")


def test_a_pipeline_that_casts_its_autoencoder_takes_one_call_at_a_time() -> None:
    """Stable Diffusion XL decodes in float32 whatever its dtype is, and casts the autoencoder back."""
    xl = PIPELINES["StableDiffusionXLPipeline"]().to(torch.float16)
    inside, met = [0], []
    decode = type(xl.vae).decode

    class Watched(type(xl.vae)):  # type: ignore[misc]
        def decode(self, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            inside[0] += 1
            met.append((inside[0], self.dtype, latents.dtype))
            time.sleep(0.2)  # long enough for another to come
            try:
                return decode(self, latents, *args, **kwargs)
            finally:
                inside[0] -= 1

    xl.vae.__class__ = Watched
    with fastdiff.accelerated(xl), ThreadPoolExecutor(3) as pool:
        alone = [image(xl, seed) for seed in range(3)]
        hooks = hooks_of(xl.text_encoder)
        assert all(map(torch.equal, alone, pool.map(lambda seed: image(xl, seed), range(3))))
        assert hooks_of(xl.text_encoder) == hooks > 0  # that record hidden states, installed by the first call
    assert met == [(1, torch.float32, torch.float32)] * 6
    assert xl.vae.dtype == torch.float16


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ({"unet": torch.float32, "vae": torch.float32}, False),
        ({"unet": torch.float16, "vae": torch.float16}, True),
        ({"unet": torch.float16, "vae": torch.float32}, True),  # for now: another call has cast it
    ],
)
def test_a_cast_is_expected_by_the_models_that_stay_as_they_are(dtypes: dict[str, torch.dtype], expected: bool) -> None:
    xl = PIPELINES["StableDiffusionXLPipeline"]()
    for name, dtype in dtypes.items():
        getattr(xl, name).to(dtype)
    assert _changes_its_models(xl, []) == expected
    assert not _changes_its_models(fastdiff.models.digits().to(torch.float16), [])


def test_a_guider_that_hooks_into_the_model_is_eager(own: Any) -> None:
    own.guider = SkipLayerGuidance(skip_layer_guidance_layers=[0])
    with pytest.raises(CannotCapture, match="mode 'compiled' runs no hooks, as SkipLayerGuidance sets them"):
        fastdiff.accelerate(own, "compiled", _backend="eager")


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


# In place, and back


def test_restoring_leaves_no_trace(own: Any) -> None:
    def world() -> dict[str, Any]:
        held = {f"pipe.{name}": value for name, value in vars(own).items()}
        for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            held |= {f"{name}.{key}": value for key, value in vars(getattr(own, name)).items()}
        return held | {"class": type(own), "vae": type(own.vae), "unet": type(own.unet)}

    image(own)
    for mode in ("eager", "compiled"):
        before, scheduler = world(), own.scheduler
        handle = fastdiff.accelerate(own, mode, _backend="eager")
        assert own.scheduler is not scheduler
        image(own)
        handle.restore()
        after = world()
        assert before.keys() == after.keys()
        assert [name for name in before if before[name] is not after[name]] == []
        handle.restore()  # does nothing
    expected = image(own)
    handle = fastdiff.accelerate(own)
    own.scheduler = mine = diffusers.DDIMScheduler.from_config(own.scheduler.config)
    handle.restore()
    assert own.scheduler is mine
    own.scheduler = scheduler
    assert torch.equal(image(own), expected)


def test_it_is_the_pipeline_that_it_was(own: Any, tmp_path: Path) -> None:
    cls, config, components = type(own), dict(own.config), own.components
    with fastdiff.accelerated(own):
        assert isinstance(own, cls)
        assert inspect.signature(own.__call__) == inspect.signature(
            cls(**components, requires_safety_checker=False).__call__
        )
        assert repr(type(own)) == repr(cls)
        image(own)
        assert dict(own.config) == config
        assert own.components.keys() == components.keys()
        assert [name for name, value in own.components.items() if value is not components[name]] == ["scheduler"]
        own.save_pretrained(tmp_path)
        expected = image(own)
        for copied in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
            assert torch.equal(image(copied), expected)
            assert copied.unet is not own.unet
            assert type(copied) is cls
        fastdiff.accelerate(copied).restore()
        assert type(copied) is cls
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == cls.__name__
    assert index["scheduler"] == ["diffusers", type(own.scheduler).__name__]
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert type(loaded) is cls


def test_what_cannot_be_accelerated_is_refused_and_left_as_it_is(own: Any) -> None:
    held, cls = dict(vars(own)), type(own)
    with pytest.raises(ValueError, match="one of eager, compiled, graph, got 'fast'"):
        fastdiff.accelerate(own, "fast")  # type: ignore[arg-type]
    for other in (own.unet, None):
        with pytest.raises(TypeError, match="expected a diffusers pipeline with a scheduler, got "):
            fastdiff.accelerate(other)
    with pytest.raises(TypeError, match=r"one of unet, .*, got DDPMPipeline; use mode 'eager'"):
        fastdiff.accelerate(diffusers.DDPMPipeline(unet=None, scheduler=own.scheduler), "compiled")
    with fastdiff.accelerated(own), pytest.raises(RuntimeError, match=r"accelerated already.*restore\(\) first"):
        fastdiff.accelerate(own)
    assert vars(own) == held
    own.prior = fastdiff.models.digits()
    with pytest.raises(TypeError, match="calls pipelines of its own: accelerate prior instead"):
        fastdiff.accelerate(own)
    del own.prior
    own.scheduler = diffusers.KarrasVeScheduler()
    with pytest.raises(NotLinear, match="KarrasVe"):
        fastdiff.accelerate(own)
    assert type(own) is cls


def test_graphs_without_cuda_are_refused_at_once(own: Any) -> None:
    with pytest.raises(CannotCapture, match=r"need a CUDA device, the model is on cpu.*'eager' or 'compiled'"):
        fastdiff.accelerate(own, "graph")
    assert type(own) is diffusers.StableDiffusionPipeline


def test_hooks_are_eager_and_one_call_at_a_time(own: Any) -> None:
    """A hook of diffusers stands for offload, which needs a device to offload from."""
    inside, most = [0], [0]

    class Watch(diffusers.hooks.ModelHook):  # type: ignore[misc]
        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.fn_ref.original_forward(*args, **kwargs)

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            return args, kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            inside[0] -= 1
            return output

    expected = image(own)
    diffusers.hooks.HookRegistry.check_if_exists_or_initialize(own.unet).register_hook(Watch(), "watch")
    with pytest.raises(CannotCapture, match="runs no hooks"):
        fastdiff.accelerate(own, "compiled")
    with fastdiff.accelerated(own), ThreadPoolExecutor(3) as pool:
        for got in pool.map(lambda _: image(own), range(3)):
            assert near(got, expected)
    assert most == [1]


@pytest.mark.parametrize("strict", [True, False])
def test_a_handle_of_the_users_own_is_kept_as_it_is(own: Any, strict: bool) -> None:
    """Put on the pipe before or after accelerating; its strictness counts, and it comes back."""

    def leave_the_schedule(call: Any, row: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        call.scheduler._step_index = 0
        return tensors

    mine = fastdiff.table_scheduler(diffusers.EulerDiscreteScheduler.from_config(own.scheduler.config), strict=strict)
    own.scheduler = mine
    expected = image(own)
    for late in (False, True):
        own.scheduler = diffusers.DDIMScheduler.from_config(mine.config) if late else mine
        handle = fastdiff.accelerate(own)
        own.scheduler = mine if late else own.scheduler
        assert torch.equal(image(own), expected)
        assert len(own.scheduler.timesteps) == STEPS
        image(own, num_inference_steps=3)
        assert len(own.scheduler.timesteps) == 3
        if strict:
            with pytest.raises(fastdiff.FastdiffError, match="expected the next step of its schedule"):
                image(own, callback_on_step_end=leave_the_schedule)
        else:
            with pytest.warns(UserWarning, match=r"its own step\(\) runs"):
                image(own, callback_on_step_end=leave_the_schedule)
        handle.restore()
        assert own.scheduler is mine


# Compiled


def test_weights_in_place_are_seen_and_others_compiled_anew(own: Any) -> None:
    with fastdiff.accelerated(own, "compiled", _backend="eager") as handle:
        before = image(own)
        with torch.no_grad():
            own.unet.conv_in.weight.mul_(0.5)
        halved = image(own)
        assert handle.stats[3:] == (1, 0)
        own.unet.conv_in.weight = nn.Parameter(own.unet.conv_in.weight.detach() * 2, requires_grad=False)
        assert torch.equal(image(own), before)
        assert handle.stats[3:] == (2, 1)
        own.unet = copy.deepcopy(own.unet)  # another model altogether
        with torch.no_grad():
            own.unet.conv_in.weight.mul_(0.5)
        assert torch.equal(image(own), halved)


def test_freeu_that_a_callback_switches_is_in_the_rows_after_it(own: Any) -> None:
    def switch(call: Any, row: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if row == 0:
            call.enable_freeu(s1=0.5, s2=0.4, b1=1.6, b2=1.9)
        elif row == 2:
            call.disable_freeu()
        return tensors

    plain, switched = image(own), image(own, callback_on_step_end=switch)
    assert not near(switched, plain)
    with fastdiff.accelerated(own, "compiled", _backend="eager"):
        for _ in range(2):
            assert near(image(own), plain)
            assert near(image(own, callback_on_step_end=switch), switched)


def test_a_config_that_is_changed_in_mid_call_is_in_the_rows_after_it(own: Any) -> None:
    """As SkyReels-V2 sets how frames see each other: on the call's own twin of the model."""

    def center(call: Any, row: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        call.unet.register_to_config(center_input_sample=row == 1)
        return tensors

    plain, centered = image(own), image(own, callback_on_step_end=center)
    assert not near(centered, plain)
    with fastdiff.accelerated(own, "compiled", _backend="eager") as handle:
        for _ in range(2):
            assert near(image(own), plain)
            assert near(image(own, callback_on_step_end=center), centered)
    assert (handle.stats.built, handle.stats.renewed) == (3, 0)  # as it came, set, and set back


class Toy(nn.Module):
    """A model whose result depends on every kind of argument."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Any, scale: float = 1.0, extra: Any = None, how: Any = None) -> Any:
        sample = self.linear(sample) * scale + timestep
        if extra is not None:
            sample = sample + extra["shift"][0] * extra["shift"][1]
        return (sample.sin() if how == ["sin"] else sample,)


def test_the_key_is_all_that_a_compiled_forward_froze() -> None:
    model = Toy()
    forward = Forward(model, "compiled", "eager")
    called = twin(model, forward)
    assert isinstance(called, Toy)
    assert "_compiled_call_impl" not in vars(model)
    a, b, t = torch.randn(2, 4), torch.randn(2, 4), torch.tensor(3)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((a, t), {}),
        ((torch.randn(3, 4), t), {}),
        ((a.T.contiguous().T, t), {}),  # another layout
        ((a, t.float()), {}),
        ((a, 3), {}),
        ((a, 3.0), {}),
        ((a, t), {"scale": 2.0}),
        ((a, t), {"scale": 2.5}),
        ((a, t), {"extra": {"shift": (b, 2.0)}}),
        ((a, t), {"extra": {"shift": [b, 2.0]}}),
        ((a, t), {"extra": {"shift": (b, 3.0)}}),
        ((a, t), {"extra": {"shift": (b, b)}}),  # one tensor twice
        ((a, t), {"extra": {"shift": (b, a)}}),
        ((a, t), {"extra": {"shift": (b, b.clone())}}),
        ((a, t), {"how": ["sin"]}),
        ((a, t), {"how": ["cos"]}),
    ]
    with torch.no_grad():
        for _ in range(2):
            for number, (args, kwargs) in enumerate(calls):
                assert torch.equal(called(*args, **kwargs)[0], model(*args, **kwargs)[0]), number
        assert forward.built == len(calls)
        other = (b.clone(), torch.tensor(7))
        assert torch.equal(called(*other)[0], model(*other)[0])  # the first again: tensors are no part of a key
        assert forward.built == len(calls)
        with torch.autocast("cpu", torch.bfloat16):
            assert called(a, t)[0].dtype == model(a, t)[0].dtype == torch.bfloat16
        assert forward.built == len(calls) + 1
        with pytest.raises(TypeError, match="numbers and strings as a model's arguments, got object"):
            called(a, t, extra=object())


class Scaled(Toy):
    """A model with settings, as an attention layer has them."""

    def __init__(self) -> None:
        super().__init__()
        self.processor = Scale()

    def forward(self, sample: Tensor, timestep: Any, *_: Any, **__: Any) -> Any:
        return (self.linear(sample) * self.processor.scale[0],)


class Scale:
    def __init__(self) -> None:
        self.scale = [2.0]

    def __call__(self) -> None:
        """Makes it a processor."""


def test_settings_are_part_of_the_key_and_a_race_for_them_leaves_none() -> None:
    model, x = Scaled(), torch.randn(2, 4)
    raced: list[bool] = []

    def backend(graph: Any, inputs: Any) -> Any:
        if not raced:  # another thread's callback, while this one compiles
            raced.append(True)
            model.processor.scale[0] = 3.0
        return graph

    forward = Forward(model, "compiled", backend)
    with torch.no_grad():
        forward(model, x, 0)
        for scale in (3.0, 2.0, 3.0, 2.0):
            model.processor.scale[0] = scale
            assert torch.equal(forward(model, x, 0)[0], model(x, 0)[0])
        assert forward.built == 3  # the first was kept by nobody
        former, model.processor = model.processor, Scale()
        model.processor.scale[0] = 5.0
        assert torch.equal(forward(model, x, 0)[0], model(x, 0)[0])
        model.processor = former
        forward.check()
        assert torch.equal(forward(model, x, 0)[0], model(x, 0)[0])
    assert (forward.built, forward.renewed) == (4, 0)


def test_a_model_that_cannot_be_compiled_is_refused_in_one_line() -> None:
    class Reads(nn.Linear):
        def forward(self, sample: Tensor) -> Tensor:
            return super().forward(sample if sample.sum().item() > 0 else -sample)

    model = Reads(4, 4)
    with pytest.raises(CannotCapture, match=r"^Reads.forward cannot be compiled: .*; use mode 'eager'$"):
        twin(model, Forward(model, "compiled", "eager"))(torch.ones(1, 4))


def test_forgetting_is_bounded_and_seen() -> None:
    from fastdiff.forward import MOST_KEYS

    model = Toy()
    forward = Forward(model, "compiled", "eager")
    x = torch.randn(1, 4)
    with torch.no_grad():
        for scale in range(MOST_KEYS + 1):
            forward(model, x, 0, scale=float(scale))
        assert forward.built == MOST_KEYS + 1
        forward(model, x, 0, scale=float(MOST_KEYS))  # the last is there
        assert forward.built == MOST_KEYS + 1
        forward(model, x, 0, scale=0.0)  # the first went with all before the last
    assert forward.built == MOST_KEYS + 2


def test_a_graphs_input_is_copied_when_there_is_something_new_in_it() -> None:
    static = torch.zeros(3)
    copied = _Copy(static)

    def taken(tensor: Tensor) -> bool:
        static.fill_(-1.0)
        copied.take(tensor)
        return torch.equal(static, tensor)

    given = torch.ones(3)
    assert taken(given)
    assert not taken(given)
    assert taken(given.mul_(2))
    assert taken(given.clone())
    with torch.inference_mode():
        uncounted = torch.ones(3)
        assert taken(uncounted)
        assert taken(uncounted)


@pytest.mark.compiles
def test_inductor_makes_nearly_the_image_and_leaves_the_model() -> None:
    own = PIPELINES["StableDiffusionPipeline"]()
    expected = image(own)
    with fastdiff.accelerated(own, "compiled") as handle:
        assert near(image(own), expected)
        assert near(image(own), expected)
        assert handle.stats.built == 1
    assert torch.equal(image(own), expected)


# CUDA


@pytest.fixture
def cuda_pipe() -> Any:
    return fastdiff.models.digits().to("cuda")


@pytest.mark.cuda
def test_a_graph_makes_the_drop_ins_image(cuda_pipe: Any) -> None:
    expected, unguided = drop_in(cuda_pipe), drop_in(cuda_pipe, guidance_scale=1.0)
    with fastdiff.accelerated(cuda_pipe, "graph") as handle:
        for _ in range(2):
            assert near(image(cuda_pipe), expected)
            assert near(image(cuda_pipe, guidance_scale=1.0), unguided)
        assert handle.stats.built == 2


@pytest.mark.cuda
def test_a_graphs_output_is_the_callers_and_its_inputs_are_taken_when_they_change() -> None:
    model = Toy().cuda()
    forward = Forward(model, "graph")
    x, t = torch.randn(2, 4, device="cuda"), torch.tensor(3.0, device="cuda")
    with torch.no_grad():
        first = forward(model, x, t)[0]
        kept = first.clone()
        x.mul_(2)  # the same tensor, another version
        assert torch.equal(forward(model, x, t)[0], model(x, t)[0])
        other = x + 1
        assert torch.equal(forward(model, other, t)[0], model(other, t)[0])
        assert torch.equal(forward(model, x, t)[0], model(x, t)[0])
        assert torch.equal(forward(model, x, torch.tensor(3.0))[0], model(x, t)[0])  # a timestep on the host
        assert torch.equal(first, kept)
        with torch.inference_mode():
            inner = x.clone()
            assert torch.equal(forward(model, inner, t)[0], model(inner, t)[0])
            inner.add_(1)  # which counts no version
            assert torch.equal(forward(model, inner, t)[0], model(inner, t)[0])
        with torch.autocast("cuda", torch.bfloat16), pytest.raises(CannotCapture, match="autocast"):
            forward(model, x, t)
        reading = HostRead().cuda()
        with pytest.raises(CannotCapture, match=r"HostRead\.forward cannot be captured.*'compiled' or 'eager'"):
            twin(reading, Forward(reading, "graph"))(x, t)


class HostRead(Toy):
    def forward(self, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        return (sample * timestep.item(),)


@pytest.mark.cuda
def test_graphs_see_weights_in_place_and_are_captured_anew_for_others(cuda_pipe: Any) -> None:
    with fastdiff.accelerated(cuda_pipe, "graph") as handle:
        before = image(cuda_pipe)
        with torch.no_grad():
            cuda_pipe.unet.conv_in.weight.mul_(0.5)
        halved = image(cuda_pipe)
        assert not near(halved, before)
        cuda_pipe.unet.conv_in.weight = nn.Parameter(cuda_pipe.unet.conv_in.weight.detach() * 2, requires_grad=False)
        assert near(image(cuda_pipe), before)
        assert handle.stats[3:] == (2, 1)


@pytest.mark.cuda
def test_threads_share_graphs_on_streams_of_their_own(cuda_pipe: Any) -> None:
    asked: list[dict[str, Any]] = [{"guidance_scale": 1.5 + seed, "num_inference_steps": 5 + seed} for seed in range(4)]

    def run(seed: int) -> Tensor:
        with torch.cuda.stream(torch.cuda.Stream()):
            got = image(cuda_pipe, seed, **asked[seed])
            torch.cuda.current_stream().synchronize()
        return got

    with fastdiff.accelerated(cuda_pipe, "graph") as handle:
        alone = list(map(run, range(4)))
        with ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                assert all(map(torch.equal, alone, pool.map(run, range(4))))
        assert handle.stats.built == 1
