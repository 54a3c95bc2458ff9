"""The oracle matrix: every table against the diffusers class that it came from.

A cell is a scheduler class, its options and one schedule. The reference of a cell is the real class, walked with random
model outputs in float64 under `_Reference`, a dispatch mode that drops its down-casts and supplies its draws; nothing
of it is shared with `fastdiff.probe`. `make test` walks each axis on a base case and all pairs of options;
`python -m tests.oracle --full` the product. `--coverage` writes what a reader needs to know about each class.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import itertools
import json
import math
import multiprocessing
import pkgutil
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import diffusers.schedulers
import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff.errors import NotLinear, NumericalError

SHAPE = (2, 3, 4, 5)  # [B, C, H, W], all different
FLOAT64_TOLERANCE = 1e-9
FLOAT32_TOLERANCE = 1e-5
STEPS = (5, 1, 2, 20, 50)
BEGIN = ("0", "1", "middle")

# The classes


@cache
def scheduler_classes() -> dict[str, Any]:
    """Every scheduler class of the installed diffusers, those included that its package does not export."""
    found: dict[str, Any] = {}
    for package in (diffusers.schedulers, importlib.import_module("diffusers.schedulers.deprecated")):
        for module_info in pkgutil.iter_modules(package.__path__):
            if not module_info.name.startswith("scheduling_") or module_info.name.endswith("flax"):
                continue
            module = importlib.import_module(f"{package.__name__}.{module_info.name}")
            found |= {
                name: value
                for name, value in vars(module).items()
                if isinstance(value, type) and name.endswith("Scheduler") and value.__module__ == module.__name__
            }
    return found


# The axes. The first option of an axis is its base.


@dataclass(frozen=True)
class Option:
    """One value of an axis: what it adds to the constructor's and to tabulate's arguments."""

    label: str
    config: Mapping[str, Any] = field(default_factory=dict, compare=False)
    call: Mapping[str, Any] = field(default_factory=dict, compare=False)


Axis = tuple[Option, ...]
Values = Callable[[int], list[float] | np.ndarray | Tensor]  # number of steps -> a custom schedule


def configured(key: str, *values: Any) -> Axis:
    return tuple(Option(f"{key}={value}", config={key: value}) for value in values)


def called(key: str, *values: Any) -> Axis:
    """An argument of set_timesteps or step; its base is to leave it out."""
    return (Option(""), *(Option(f"{key}={value}", call={key: value}) for value in values))


def _falling(high: float, low: float) -> Values:
    return lambda steps: torch.linspace(high, low, steps, dtype=torch.float64).tolist()


def _falling_integers(high: int, low: int) -> Values:
    return lambda steps: [int(t) for t in torch.linspace(high, low, steps).round().tolist()]


# Configuration that any class with the parameter is tried with; the class's own default becomes the base.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "rescale_betas_zero_snr": (False, True),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "steps_offset": (0, 1),
    "solver_order": (1, 2, 3),
    "lower_order_final": (True, False),
    "euler_at_final": (False, True),
    "final_sigmas_type": ("zero", "sigma_min"),
    "predict_x0": (True, False),
    "disable_corrector": ([], [0], [1, 2, 3]),
    "skip_prk_steps": (False, True),
    "clip_sample": (True, False),
    "clip_denoised": (True, False),
    "set_alpha_to_one": (True, False),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "sigma_schedule": ("karras", "exponential"),
    "stochastic_sampling": (False, True),
    "invert_sigmas": (False, True),
    "shift_terminal": (None, 0.1),
    "predictor_order": (1, 2, 3),
    "corrector_order": (1, 2, 3, 4),
    "shift": (1.0, 3.0),
    "flow_shift": (1.0, 3.0),
    "sigma_data": (0.5, 1.0),
    "scheduler_type": ("unipc", "euler"),
    "algorithm_type": ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"),
    "solver_type": ("midpoint", "heun"),
    "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}

# Where a class takes other values than these, or where an option has no effect there (an empty tuple).
EXCEPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "CMStochasticIterativeScheduler": {"sigma_data": (0.5,)},
    "CogVideoXDDIMScheduler": {"clip_sample": (), "prediction_type": ("epsilon", "sample", "v_prediction")},
    "ConsistencyDecoderScheduler": {"sigma_data": (0.5,)},
    "DDIMScheduler": {"prediction_type": ("epsilon", "sample", "v_prediction")},
    "DDIMInverseScheduler": {
        "timestep_spacing": ("leading", "trailing"), "prediction_type": ("epsilon", "sample", "v_prediction"),
    },
    "DDIMParallelScheduler": {"prediction_type": ("epsilon", "sample", "v_prediction")},
    "DDPMScheduler": {"prediction_type": ("epsilon", "sample", "v_prediction")},
    "DDPMParallelScheduler": {"prediction_type": ("epsilon", "sample", "v_prediction")},
    "DEISMultistepScheduler": {"algorithm_type": (), "solver_type": ()},
    "DPMSolverMultistepInverseScheduler": {"variance_type": ()},
    "DPMSolverMultistepScheduler": {"variance_type": ()},
    "DPMSolverSinglestepScheduler": {
        "variance_type": (),
        "algorithm_type": ("dpmsolver++", "dpmsolver", "sde-dpmsolver++"),
    },
    "EDMDPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        "prediction_type": ("epsilon", "v_prediction"),
    },
    "EDMEulerScheduler": {"prediction_type": ("epsilon", "v_prediction")},
    "EulerAncestralDiscreteScheduler": {"prediction_type": ("epsilon", "v_prediction")},
    "EulerDiscreteScheduler": {"prediction_type": ("epsilon", "sample", "v_prediction")},
    "HeliosScheduler": {
        "prediction_type": ("flow_prediction",), "solver_type": ("bh2", "bh1"), "shift_terminal": (),
    },
    "HeunDiscreteScheduler": {"prediction_type": ("epsilon", "v_prediction")},
    "KDPM2AncestralDiscreteScheduler": {"prediction_type": ("epsilon", "v_prediction")},
    "KDPM2DiscreteScheduler": {"prediction_type": ("epsilon", "v_prediction")},
    "LCMScheduler": {"timestep_spacing": (), "prediction_type": ("epsilon", "sample", "v_prediction")},
    "LMSDiscreteScheduler": {"prediction_type": ("epsilon", "sample", "v_prediction")},
    "PNDMScheduler": {"prediction_type": ("epsilon", "v_prediction")},
    "SASolverScheduler": {
        "algorithm_type": ("data_prediction", "noise_prediction"), "variance_type": (), "beta_schedule": (),
    },
    "SCMScheduler": {"prediction_type": ("trigflow",)},
    "TCDScheduler": {
        "timestep_spacing": (), "clip_sample": (), "prediction_type": ("epsilon", "sample", "v_prediction"),
    },
    "UnCLIPScheduler": {
        "prediction_type": ("epsilon", "sample"), "variance_type": (),
        "beta_schedule": (),
    },
    "UniPCMultistepScheduler": {"solver_type": ("bh2", "bh1"), "shift_terminal": ()},
}  # fmt: skip

# What the schedule may be besides the class's own: flags that exclude each other, and custom values.
SIGMA_FLAGS = {
    "karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas",
    "flow": "use_flow_sigmas", "lu": "use_lu_lambdas",
}  # fmt: skip
TIMESTEPS: dict[str, Values] = {
    "CMStochasticIterativeScheduler": _falling_integers(39, 0),
    "FlowMapEulerDiscreteScheduler": _falling(1000.0, 100.0),
    "FlowMatchEulerDiscreteScheduler": _falling(1000.0, 100.0),
    "FlowMatchLCMScheduler": _falling(1000.0, 100.0),
    "LTXEulerAncestralRFScheduler": _falling(1000.0, 100.0),
    "SCMScheduler": lambda steps: [*torch.linspace(1.5, 0.1, steps).tolist(), 0.0],
}
SIGMAS: dict[str, Values] = {
    "EulerDiscreteScheduler": lambda steps: [*torch.linspace(14.0, 0.1, steps).tolist(), 0.0],
    "EDMEulerScheduler": lambda steps: torch.linspace(0.0, 1.0, steps),  # along the ramp between the sigmas
    "MiniMaxH3Scheduler": lambda steps: torch.linspace(1.0, 0.0, steps + 1).tolist(),
    "UniPCMultistepScheduler": lambda steps: np.linspace(1.0, 0.1, steps),
}
SCHEDULES: dict[str, tuple[Option, ...]] = {
    "LCMScheduler": (Option("strength=0.5", call={"strength": 0.5}),),
    "SCMScheduler": (
        Option("intermediate=1.1", call={"intermediate_timesteps": 1.1}),
        Option("no intermediate", call={"intermediate_timesteps": None}),
        Option("max_timesteps=1.5", call={"max_timesteps": 1.5}),
    ),
    "TCDScheduler": (Option("strength=0.5", call={"strength": 0.5}),),
    "UniPCMultistepScheduler": (
        Option("sigma_min, sigma_max", config={"sigma_min": 0.1, "sigma_max": 5.0}),
        Option("flow, shift_terminal", config={"use_flow_sigmas": True, "shift_terminal": 0.1}),
    ),
}

_CHURN = {"s_churn": 2.0, "s_tmin": 0.01, "s_tmax": 50.0, "s_noise": 1.01}
EXTRAS: dict[str, tuple[Axis, ...]] = {
    "DDIMScheduler": (called("eta", 0.5, 1.0), called("use_clipped_model_output", True)),
    "DDIMParallelScheduler": (called("eta", 0.5, 1.0), called("use_clipped_model_output", True)),
    "CogVideoXDDIMScheduler": (called("eta", 1.0), configured("snr_shift_scale", 3.0, 1.0)),
    "EulerDiscreteScheduler": ((Option(""), Option("s_churn", call=_CHURN)),),
    "EDMEulerScheduler": ((Option(""), Option("s_churn", call=_CHURN)),),
    "FlowMatchEulerDiscreteScheduler": ((Option(""), Option("s_churn", call=_CHURN)),),
    "FlowMatchHeunDiscreteScheduler": (
        (Option(""), Option("s_churn", call={"s_churn": 2.0, "s_noise": 1.01})),
    ),
    "FlowMapEulerDiscreteScheduler": (called("r_timestep", 0.0),),
    "HeliosScheduler": (called("stage_index", 0, 1, 2)[1:], called("is_amplify_first_chunk", True)),
    "HeunDiscreteScheduler": (called("num_train_timesteps", 500),),
    "KDPM2DiscreteScheduler": (called("num_train_timesteps", 500),),
    "KDPM2AncestralDiscreteScheduler": (called("num_train_timesteps", 500),),
    "LCMScheduler": (called("original_inference_steps", 100),),
    "TCDScheduler": (called("original_inference_steps", 100), called("eta", 0.0, 1.0)),
    "LMSDiscreteScheduler": (called("order", 1, 2, 3),),
    "LTXEulerAncestralRFScheduler": (configured("eta", 1.0, 0.0), configured("s_noise", 1.0, 0.9)),
    "CMStochasticIterativeScheduler": (configured("s_noise", 1.0, 0.9),),
    "SASolverScheduler": (
        (Option(""), Option("tau=0", config={"tau_func": "zero"}), Option("tau=1", config={"tau_func": "one"})),
    ),
    "UnCLIPScheduler": (called("prev_timestep", 0),),
    "UniPCMultistepScheduler": (
        (Option(""), Option("solver_p", config={"solver_p": "DDIMScheduler"})),
    ),
    "DPMSolverMultistepScheduler": (configured("lambda_min_clipped", -math.inf, -5.1),),
}  # fmt: skip
STEPS_OF = {"ConsistencyDecoderScheduler": (2, 1, 5), "SCMScheduler": (2, 1, 5, 20, 50)}
TRAILING_TIMESTEPS = {"SCMScheduler": 1}  # entries of .timesteps that name the time a schedule arrives at

# Options that no table exists for; anything else that is refused is a failure.
REFUSED_OPTIONS = (
    *configured("thresholding", True),
    *configured("variance_type", "learned_range"),
    *configured("scale_factors", [1.0, 1.5, 2.0, 2.0]),
)

AFFINE = (
    "CMStochasticIterativeScheduler", "CogVideoXDDIMScheduler", "ConsistencyDecoderScheduler",
    "DDIMInverseScheduler", "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepInverseScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "FlowMapEulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler",
    "HeliosScheduler", "HeunDiscreteScheduler", "IPNDMScheduler", "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler", "LCMScheduler", "LMSDiscreteScheduler", "LTXEulerAncestralRFScheduler",
    "MiniMaxH3Scheduler", "PNDMScheduler", "SASolverScheduler", "SCMScheduler", "TCDScheduler",
    "UnCLIPScheduler", "UniPCMultistepScheduler",
)  # fmt: skip


@cache
def axes(name: str) -> dict[str, Axis]:
    """The axes of one class, by name: its own options, its schedules, extras, steps and begin indices."""
    cls = scheduler_classes()[name]
    parameters = inspect.signature(cls).parameters
    found: dict[str, Axis] = {}
    for key, common in OPTIONS.items():
        values = EXCEPTIONS.get(name, {}).get(key, common)
        if key not in parameters or not values:
            continue
        default = parameters[key].default
        ordered = [default, *(value for value in values if value != default)] if default in values else values
        found[key] = configured(key, *ordered)
        if "final_sigmas_type" in parameters:
            found[key] = _without_final_zero(found[key])
    found["schedule"] = _schedules(name, cls, parameters)
    for index, extra in enumerate(EXTRAS.get(name, ())):
        found[f"extra {index}"] = extra
    found["steps"] = tuple(Option(f"steps={steps}") for steps in STEPS_OF.get(name, STEPS))
    found["begin"] = tuple(Option(f"begin={begin}") for begin in BEGIN)
    return {key: axis for key, axis in found.items() if len(axis) > 1 or axis[0].config or axis[0].call}


def _without_final_zero(axis: Axis) -> Axis:
    """The two algorithms that divide by the last sigma take no final sigma of zero."""
    final = {"final_sigmas_type": "sigma_min"}
    return tuple(
        replace(option, config={**option.config, **final})
        if option.config.get("algorithm_type") in ("dpmsolver", "sde-dpmsolver")
        else option
        for option in axis
    )


def _schedules(name: str, cls: Any, parameters: Mapping[str, Any]) -> Axis:
    options = [Option("")]
    options += [Option(label, config={flag: True}) for label, flag in SIGMA_FLAGS.items() if flag in parameters]
    takes = inspect.signature(cls.set_timesteps).parameters
    if "timesteps" in takes:
        alone = {"max_timesteps": None, "intermediate_timesteps": None} if "max_timesteps" in takes else {}
        timesteps = TIMESTEPS.get(name, _falling_integers(990, 9))
        options.append(Option("timesteps", call={"timesteps": timesteps, **alone}))
    if "sigmas" in takes:
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if "UniPC" in name else {}
        options.append(Option("sigmas", config=flow, call={"sigmas": SIGMAS.get(name, _falling(1.0, 0.1))}))
    if "mu" in takes and "use_dynamic_shifting" in parameters:
        for kind in ("exponential", "linear") if "FlowMatch" in name else ("exponential",):
            flow = {"use_flow_sigmas": True} if "use_flow_sigmas" in parameters else {}
            dynamic = {"use_dynamic_shifting": True, "time_shift_type": kind, **flow}
            options.append(Option(f"mu {kind}", config=dynamic, call={"mu": 0.8}))
    return (*options, *SCHEDULES.get(name, ()))


# The cells


@dataclass(frozen=True)
class Cell:
    """One scheduler with its options and one schedule."""

    scheduler: str
    options: tuple[Option, ...]
    steps: int = STEPS[0]
    begin: str = BEGIN[0]

    @property
    def label(self) -> str:
        """What differs from the class's defaults."""
        parts = [option.label for option in self.options if option.label]
        return ", ".join([*parts, f"steps={self.steps}", f"begin={self.begin}"])

    def build(self) -> Any:
        """The diffusers scheduler of this cell."""
        config: dict[str, Any] = {}
        for option in self.options:
            config |= option.config
        if "tau_func" in config:
            level = {"zero": 0.0, "one": 1.0}[config["tau_func"]]
            config["tau_func"] = lambda t: level
        if "solver_p" in config:
            config["solver_p"] = scheduler_classes()[config["solver_p"]]()
        return scheduler_classes()[self.scheduler](**config)

    def arguments(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments of set_timesteps and of step."""
        call: dict[str, Any] = {}
        for option in self.options:
            call |= option.call
        custom = {key: values(self.steps) for key, values in call.items() if callable(values)}
        takes = inspect.signature(scheduler_classes()[self.scheduler].set_timesteps).parameters
        to_set_timesteps = {key: value for key, value in call.items() if key in takes} | custom
        if not custom or takes["num_inference_steps"].default is inspect.Parameter.empty:
            to_set_timesteps["num_inference_steps"] = self.steps
        return to_set_timesteps, {key: value for key, value in call.items() if key not in takes}


def _cell(name: str, chosen: Mapping[str, Option]) -> Cell:
    steps, begin = (chosen[key].label.partition("=")[2] for key in ("steps", "begin"))
    return Cell(
        name, tuple(option for key, option in chosen.items() if key not in ("steps", "begin")), int(steps), begin
    )


def short_cells(name: str) -> list[Cell]:
    """Each axis fully on the base case, then all pairs of options."""
    table = axes(name)
    base = {key: axis[0] for key, axis in table.items()}
    chosen = [base]
    chosen += [{**base, key: option} for key, axis in table.items() for option in axis[1:]]
    chosen += pairwise(table)
    return list(dict.fromkeys(_cell(name, choice) for choice in chosen))


def pairwise(table: Mapping[str, Axis]) -> Iterator[dict[str, Option]]:
    """Choices, one option per axis, such that any two options of two axes meet: a greedy cover."""
    keys = list(table)
    missing = {
        ((a, i), (b, j)): None  # a dict for its order: the cover must not change from run to run
        for a, b in itertools.combinations(keys, 2)
        for i in range(len(table[a]))
        for j in range(len(table[b]))
    }
    while missing:
        (a, i), (b, j) = next(iter(missing))
        choice = {a: i, b: j}
        for key in keys:
            if key not in choice:
                gains = [
                    sum(_pair(keys, (key, index), other) in missing for other in choice.items())
                    for index in range(len(table[key]))
                ]
                choice[key] = gains.index(max(gains))
        for first, second in itertools.combinations(choice.items(), 2):
            missing.pop(_pair(keys, first, second), None)
        yield {key: table[key][choice[key]] for key in keys}


def _pair(
    keys: Sequence[str], first: tuple[str, int], second: tuple[str, int]
) -> tuple[tuple[str, int], tuple[str, int]]:
    return (first, second) if keys.index(first[0]) < keys.index(second[0]) else (second, first)


# The walks


@cache
def _random(count: int, seed: int) -> Tensor:
    """[count, B, C, H, W] in float64, every value a float32 number, so that both precisions start alike."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *SHAPE, generator=generator).double()


class _Draws(TorchDispatchMode):
    """Supplies the noise that a scheduler asks for and records the dtypes; nothing else is touched."""

    def __init__(self, watch: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch, self.saw_not_finite = watch, False
        self.asked: list[torch.dtype] = []
        self.count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # dynamo never sees these walks, and its guard would be a third of their time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__.startswith(("randn", "normal")):
            like = args[0].dtype if isinstance(args[0], Tensor) else torch.get_default_dtype()
            dtype = kwargs.get("dtype") or like
            self.asked.append(dtype)
            self.count += 1
            return self.supply(_random(128, 1)[self.count - 1], dtype)
        result = self.other(func, args, kwargs)
        if self.watch and isinstance(result, Tensor) and result.numel() >= math.prod(SHAPE):
            self.saw_not_finite |= bool(result.is_floating_point() and not result.isfinite().all())
        return result

    def supply(self, noise: Tensor, dtype: torch.dtype) -> Tensor:
        return noise.to(dtype)

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


class _Reference(_Draws):
    """The same, and what is float64 and as large as a latent stays float64."""

    def supply(self, noise: Tensor, dtype: torch.dtype) -> Tensor:
        return noise.clone()

    def other(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        if func.__name__ == "_to_copy.default" and result.is_floating_point() and args[0].dtype == torch.float64:
            return args[0].clone() if args[0].numel() >= math.prod(SHAPE) else result
        return result


@dataclass
class Walk:
    """What one run of the loop saw, row by row."""

    timesteps: Tensor
    begin: int
    start: Tensor
    inputs: list[Tensor] = field(default_factory=list)
    samples: list[Tensor] = field(default_factory=list)
    x0: list[Tensor | None] = field(default_factory=list)
    draws: list[tuple[torch.dtype, ...]] = field(default_factory=list)
    saw_not_finite: bool = False  # inf or NaN in anything as large as a latent, if watched


def begin_index(begin: str, rows: int) -> int:
    return {"0": 0, "1": min(1, rows - 1), "middle": rows // 2}[begin]


def prepare(cell: Cell, scheduler: Any) -> tuple[Tensor, int]:
    """set_timesteps and set_begin_index as diffusers' pipelines call them: the timesteps left, the begin index."""
    scheduler.set_timesteps(**cell.arguments()[0])
    timesteps = scheduler.timesteps
    timesteps = timesteps[: len(timesteps) - TRAILING_TIMESTEPS.get(cell.scheduler, 0)]
    begin = begin_index(cell.begin, len(timesteps))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return timesteps[begin:], begin


def walk(cell: Cell, scheduler: Any, dtype: torch.dtype, watch: bool = False) -> Walk:
    """The real scheduler over random model outputs: under `_Reference` in float64, as it is in float32."""
    timesteps, begin = prepare(cell, scheduler)
    step_arguments = cell.arguments()[1]
    sample = (_random(1, 2)[0] * float(getattr(scheduler, "init_noise_sigma", 1.0))).float().to(dtype)
    seen = Walk(timesteps, begin, sample)
    outputs = _random(128, 3)
    with _Reference(watch) if dtype == torch.float64 else _Draws(watch) as mode:
        for row, timestep in enumerate(timesteps):
            mode.asked = []
            scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
            seen.inputs.append(scale(sample, timestep))
            output = scheduler.step(outputs[row].to(dtype), timestep, sample, **step_arguments)
            sample = output.prev_sample
            seen.samples.append(sample)
            clean = getattr(output, "pred_original_sample", None)
            seen.x0.append(clean if clean is not None else getattr(output, "denoised", None))
            seen.draws.append(tuple(mode.asked))
    seen.saw_not_finite = mode.saw_not_finite
    return seen


def replay(table: fastdiff.StepTable, sample: Tensor) -> Walk:
    """The table over the same model outputs and the same draws."""
    seen, dtype = Walk(table.timesteps, 0, sample), sample.dtype
    outputs, noise, drawn = _random(128, 3), _random(128, 1), 0
    state = table.init(sample)
    for row, draws in enumerate(table.draws):
        eps = list(noise[drawn : drawn + len(draws)].to(dtype))
        drawn += len(draws)
        model_output = outputs[row].to(dtype)
        seen.inputs.append(table.model_input(row, state))
        seen.x0.append(table.x0(row, state, model_output, eps) if table.x0_source else None)
        state = table.advance(row, state, model_output, eps)
        seen.samples.append(state[0])
        seen.draws.append(tuple(torch.float64 if asked is None else asked for asked in draws))
    return seen


def error(expected: Iterable[Tensor | None], got: Iterable[Tensor | None]) -> float:
    """Largest error over largest reference, of the worst row; infinite where either is not finite."""
    worst = 0.0
    for reference, value in zip(expected, got, strict=True):
        if reference is None or value is None:
            continue
        difference = float((value.double() - reference).abs().max() / reference.abs().max().clamp_min(1e-30))
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return worst


# Running cells


@dataclass(frozen=True)
class Outcome:
    """What came of a cell."""

    scheduler: str
    label: str
    kind: str  # "right", "wrong", "raises" (diffusers does, and so does tabulate), "refused"
    detail: str = ""
    memory: int = 0
    x0_source: str | None = None
    most_draws: int = 0  # in one row
    draw_dtypes: tuple[str, ...] = ()
    error_float64: float = 0.0
    error_float32: float = 0.0
    error_float32_diffusers: float = 0.0


def run(cell: Cell) -> Outcome:
    """One cell: the class as it is, the class in float64, the table in both."""
    outcome = Outcome(cell.scheduler, cell.label, "wrong")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if any(option in REFUSED_OPTIONS for option in cell.options):
            try:  # before the walk: a model output that holds a variance too has another shape than the walk's
                tabulate(cell, cell.build(), 0)
            except NotLinear as refused:
                return replace(outcome, kind="refused", detail=str(refused))
            except Exception as raised:  # the walk below must raise the same
                outcome = replace(outcome, detail=repr(raised))
        try:
            pristine = cell.build()
            single = walk(cell, copy.deepcopy(pristine), torch.float32)
        except Exception as raised:  # whatever diffusers raises, tabulate must raise
            return _expect_raise(cell, outcome, raised)
        try:
            table = tabulate(cell, pristine, single.begin)
        except NotLinear as refused:
            return replace(outcome, kind="refused", detail=str(refused))
        except NumericalError as refused:
            return _expect_not_finite(cell, outcome, pristine, refused)
        except Exception as raised:
            return replace(outcome, detail=f"tabulate raised {type(raised).__name__}: {raised}")
        return _compare(outcome, table, walk(cell, pristine, torch.float64), single)


def tabulate(cell: Cell, scheduler: Any, begin: int) -> fastdiff.StepTable:
    to_set_timesteps, to_step = cell.arguments()
    return fastdiff.tabulate(scheduler, **to_set_timesteps, **to_step, begin_index=begin)


def _expect_raise(cell: Cell, outcome: Outcome, raised: Exception) -> Outcome:
    detail = f"{type(raised).__name__}: {' '.join(str(raised).split())}"
    try:
        scheduler = cell.build()
        try:
            begin = prepare(cell, copy.deepcopy(scheduler))[1]
        except Exception:  # the call below must raise the same
            begin = 0
        table = tabulate(cell, scheduler, begin)
    except Exception as again:
        if type(again) is type(raised):
            return replace(outcome, kind="raises", detail=detail)
        return replace(outcome, detail=f"diffusers raises {detail}, tabulate {type(again).__name__}: {again}")
    return replace(outcome, detail=f"diffusers raises {detail}, tabulate gives {table!r}")


def _expect_not_finite(cell: Cell, outcome: Outcome, scheduler: Any, refused: NumericalError) -> Outcome:
    """The class itself must compute inf or NaN on latents, in both precisions (a clamp may hide it afterwards)."""
    for dtype in (torch.float32, torch.float64):
        if not walk(cell, copy.deepcopy(scheduler), dtype, watch=True).saw_not_finite:
            return replace(outcome, detail=f"diffusers is finite in {dtype}, yet {refused}")
    return replace(outcome, kind="not finite", detail=str(refused))


def _compare(outcome: Outcome, table: fastdiff.StepTable, reference: Walk, single: Walk) -> Outcome:
    if len(table) != len(reference.samples):
        return replace(outcome, detail=f"{len(table)} rows for {len(reference.samples)}")
    exact, short = replay(table, reference.start), replay(table, single.start)
    error_float64 = max(
        error(reference.samples, exact.samples),
        error(reference.inputs, exact.inputs),
        error(reference.x0, exact.x0),
    )
    error_float32 = error(reference.samples, short.samples)
    error_diffusers = error(reference.samples, single.samples)
    outcome = replace(
        outcome, memory=table.memory, x0_source=table.x0_source, most_draws=table.max_draws,
        draw_dtypes=tuple(sorted({str(dtype or "the model's dtype") for row in table.draws for dtype in row})),
        error_float64=error_float64, error_float32=error_float32, error_float32_diffusers=error_diffusers,
    )  # fmt: skip
    complaints = []
    if table.timesteps.dtype != reference.timesteps.dtype or not torch.equal(table.timesteps, reference.timesteps):
        complaints.append("other timesteps")
    if exact.draws != reference.draws:
        complaints.append("other draws")
    if (table.x0_source == "output") != any(clean is not None for clean in reference.x0):
        complaints.append(f"x0 from {table.x0_source}")
    if not error_float64 <= FLOAT64_TOLERANCE:
        complaints.append(f"float64 off by {error_float64:.1e}")
    if not error_float32 <= max(FLOAT32_TOLERANCE, 2 * error_diffusers):
        complaints.append(f"float32 off by {error_float32:.1e}, diffusers by {error_diffusers:.1e}")
    return replace(outcome, kind="wrong" if complaints else "right", detail="; ".join(complaints))


# The refusals of whole classes

REFUSED_CLASSES: dict[str, dict[str, Any]] = {
    "AmusedScheduler": {"mask_token_id": 0},
    "BlockRefinementScheduler": {},
    "CogVideoXDPMScheduler": {},
    "CosineDPMSolverMultistepScheduler": {},
    "DDPMWuerstchenScheduler": {},
    "DPMSolverSDEScheduler": {},
    "DiscreteDDIMScheduler": {},
    "EntropyBoundScheduler": {},
    "HeliosDMDScheduler": {},
    "KarrasVeScheduler": {},
    "PiflowScheduler": {},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "1/t", "tsr_k": 1.0, "tsr_sigma": 1.0},
    "RePaintScheduler": {},
    "ScoreSdeVeScheduler": {},
    "ScoreSdeVpScheduler": {},
    "VQDiffusionScheduler": {"num_vec_classes": 16},
}
"""The classes without a table, each with what its constructor needs: Brownian trees, shims and the non-affine."""


def refuse_class(name: str) -> Outcome:
    """A class without a table must say so by name."""
    outcome = Outcome(name, "", "wrong", "it has a table")
    try:
        fastdiff.tabulate(scheduler_classes()[name](**REFUSED_CLASSES[name]), STEPS[0])
    except NotLinear as refused:
        return replace(outcome, kind="refused", detail=str(refused))
    return outcome


def refusable_cells(name: str) -> list[Cell]:
    """The base case with each option that no table exists for."""
    parameters = inspect.signature(scheduler_classes()[name]).parameters
    base = {key: axis[0] for key, axis in axes(name).items()}
    cells = []
    for option in REFUSED_OPTIONS:
        (key,) = option.config
        changes = {k: v for k, v in base.items() if key not in v.config} | {key: option}
        if key in parameters and parameters[key].default != option.config[key]:
            cells.append(_cell(name, changes))
    return cells


# The matrix

CHUNK = 20
KINDS = ("right", "raises", "not finite", "refused", "wrong")


def matrix_cells(name: str, full: bool) -> list[Cell]:
    """The cells of one class, in a fixed order; options that must be refused included."""
    product = product_cells(name) if full else []
    return list(dict.fromkeys((*product, *short_cells(name), *refusable_cells(name))))


def run_matrix(names: Iterable[str], full: bool = False, jobs: int = 2) -> Iterator[tuple[str, list[Outcome]]]:
    """Every cell of `names`, class by class, on `jobs` processes; outcomes in the order of `matrix_cells`."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _prepare_worker) as pool:
        pending = [(name, _submit(pool, name, full)) for name in names]
        for name, chunks in pending:
            yield name, [outcome for chunk in chunks for outcome in chunk.result()]


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()


def _submit(pool: ProcessPoolExecutor, name: str, full: bool) -> list[Future[list[Outcome]]]:
    count = 1 if name in REFUSED_CLASSES else len(matrix_cells(name, full))
    return [pool.submit(_run_chunk, name, full, start, start + CHUNK) for start in range(0, count, CHUNK)]


def _run_chunk(name: str, full: bool, start: int, stop: int) -> list[Outcome]:
    """Cells by number: their schedules are functions, which do not travel between processes."""
    if name in REFUSED_CLASSES:
        return [refuse_class(name)]
    return [run(cell) for cell in matrix_cells(name, full)[start:stop]]


def is_failure(outcome: Outcome) -> bool:
    """A wrong cell, or a refusal that is not one of those allowed."""
    allowed = outcome.scheduler in REFUSED_CLASSES or any(option.label in outcome.label for option in REFUSED_OPTIONS)
    return outcome.kind == "wrong" or (outcome.kind == "refused" and not allowed)


def tally(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """Cells by kind."""
    counts = Counter(outcome.kind for outcome in outcomes)
    return {kind: counts[kind] for kind in KINDS}


# The pages


def coverage(results: Mapping[str, Sequence[Outcome]]) -> str:
    """The page of what is supported, by class. No figure of it depends on the machine."""
    counts = tally(outcome for outcomes in results.values() for outcome in outcomes)
    lines = [
        "# Coverage",
        "",
        "Written by `make coverage` from the matrix of `tests/oracle.py`; a test compares it with a fresh run.",
        "",
        f"{sum(counts.values())} cells of {len(results)} scheduler classes: {counts['right']} tabulated (float64 "
        f"within {FLOAT64_TOLERANCE:g} of the class itself; float32 within {FLOAT32_TOLERANCE:g}, or twice the class's "
        f"own float32 error), {counts['raises']} where diffusers itself raises and `tabulate` raises the same, "
        f"{counts['not finite']} where diffusers' own samples are not finite (`NumericalError`), "
        f"{counts['refused']} refused (`NotLinear`), {counts['wrong']} wrong.",
        "",
        "| class | cells | right | raises | not finite | refused | K | x0 | draws a row |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, outcomes in sorted(results.items()):
        counts, right = tally(outcomes), [outcome for outcome in outcomes if outcome.kind == "right"]
        if right:
            memory = _span(outcome.memory for outcome in right)
            x0 = ", ".join(sorted({outcome.x0_source or "none" for outcome in right}))
            cells = [f"{counts[kind]}" for kind in KINDS[:-1]]
            lines.append(f"| {name} | {len(outcomes)} | {' | '.join(cells)} | {memory} | {x0} | {_draws(right)} |")
    for name, outcomes in sorted(results.items()):
        lines += ["", f"## {name}", ""]
        if name in REFUSED_CLASSES:
            lines.append(outcomes[0].detail)
            continue
        lines.append(f"Options tried: {'; '.join(_described(name))}.")
        for kind, title in (("refused", "Refused"), ("raises", "diffusers raises"), ("not finite", "Not finite")):
            found: dict[str, list[str]] = {}
            for outcome in outcomes:
                if outcome.kind == kind:
                    found.setdefault(_reason(outcome), []).append(outcome.label)
            if found:
                lines += ["", f"{title}:", ""]
            for reason, labels in found.items():
                more = f" (and {len(labels) - 1} more cells)" if len(labels) > 1 else ""
                lines.append(f"- {reason}{more}, first at: {_difference(name, labels[0])}")
    return "\n".join(lines) + "\n"


def _span(values: Iterable[int]) -> str:
    low, high = (lambda seen: (min(seen), max(seen)))(list(values))
    return f"{low}" if low == high else f"{low} to {high}"


def _draws(right: Sequence[Outcome]) -> str:
    dtypes = sorted({dtype for outcome in right for dtype in outcome.draw_dtypes})
    if not dtypes:
        return "0"
    most = max(outcome.most_draws for outcome in right)
    always = all(outcome.most_draws for outcome in right)
    return f"{most if always else f'0 or {most}'}, in {' or '.join(dtypes)}"


def _described(name: str) -> Iterator[str]:
    for key, axis in axes(name).items():
        labels = [option.label.removeprefix(f"{key}=") or "default" for option in axis]
        if len(labels) > 1:
            yield f"{key.split(' ')[0]} {', '.join(labels)}" if not key.startswith("extra") else ", ".join(labels[1:])


def _reason(outcome: Outcome) -> str:
    if outcome.kind == "not finite":
        return "samples of inf or NaN"
    return outcome.detail if len(outcome.detail) < 220 else f"{outcome.detail[:217]}..."


def _difference(name: str, label: str) -> str:
    """What of a cell's label is not its class's base."""
    base = {option.label for option in (axis[0] for axis in axes(name).values())}
    return ", ".join(part for part in _parts(label) if part not in base) or "the base case"


def _parts(label: str) -> list[str]:
    """A label's options; commas inside brackets do not part them."""
    return [part for part in re.split(r", (?![^\[]*\])", label) if part]


# The full product

PRODUCT_AXES = (
    "prediction_type", "schedule", "solver_order", "predictor_order", "corrector_order", "algorithm_type", "steps",
    "begin",
)  # fmt: skip
PRODUCT_STEPS = ("steps=1", "steps=2", "steps=5", "steps=20")
PRODUCT_BEGIN = ("begin=0", "begin=middle")
LEFT_OUT = dict.fromkeys(("SASolverScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"), "extra 0")
PRODUCT_NOTE = (
    "The product over prediction types, schedules (karras, exponential, beta, flow, lu, custom, mu), solver orders "
    "and algorithms, extras, steps {{1, 2, 5, 20}} and begin indices {{0, middle}}, every other option at its base "
    "(SASolver's tau_func, UniPC's solver_p and DPM++'s lambda_min_clipped too); joined with the cells of the suite, "
    "which pair all options and go to 50 steps. The product of every option would be {every:,} cells, weeks of them; "
    "that of the axes above with 50 steps and begin index 1 is about twice this, and more than twice as long."
)


def product_cells(name: str) -> list[Cell]:
    """The product over PRODUCT_AXES and extras."""
    kept: dict[str, Axis] = {}
    for key, axis in axes(name).items():
        if key == "steps":
            kept[key] = tuple(option for option in axis if option.label in PRODUCT_STEPS)
        elif key == "begin":
            kept[key] = tuple(option for option in axis if option.label in PRODUCT_BEGIN)
        elif (key in PRODUCT_AXES or key.startswith("extra")) and key != LEFT_OUT.get(name):
            kept[key] = axis
        else:
            kept[key] = axis[:1]
    return [_cell(name, dict(zip(kept, chosen, strict=True))) for chosen in itertools.product(*kept.values())]


def run_full(out: Path, jobs: int, names: Sequence[str] = AFFINE) -> bool:
    """The full product, class by class, into `out`/summary.json and summary.md; whether all of it is right.

    With `names`, those classes anew, beside what the summary there says about the others.
    """
    began = time.monotonic()
    before = json.loads((out / "summary.json").read_text()) if len(names) < len(AFFINE) else {}
    classes: dict[str, Any] = dict(before.get("classes", {}))
    failed = [line for line in before.get("failures", []) if line.partition(":")[0] not in names]
    for name, outcomes in run_matrix(names, full=True, jobs=jobs):
        right = [outcome for outcome in outcomes if outcome.kind == "right"]
        raised = Counter(outcome.detail[:160] for outcome in outcomes if outcome.kind == "raises")
        classes[name] = {
            "cells": len(outcomes),
            **tally(outcomes),
            "worst_float64": max((outcome.error_float64 for outcome in right), default=None),
            "worst_float32": max((outcome.error_float32 for outcome in right), default=None),
            "worst_float32_diffusers": max((outcome.error_float32_diffusers for outcome in right), default=None),
            "raised": dict(raised.most_common()),
        }
        failed += [f"{name}: {cell.label}: {cell.detail}" for cell in outcomes if is_failure(cell)]
        print(f"{name}: {classes[name]}", flush=True)  # noqa: T201  # a command that takes half an hour
    refused = {name: refuse_class(name).detail for name in REFUSED_CLASSES}
    report = {
        "note": PRODUCT_NOTE.format(every=sum(math.prod(map(len, axes(name).values())) for name in AFFINE)),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "cells": sum(found["cells"] for found in classes.values()),
        **{kind: sum(found[kind] for found in classes.values()) for kind in KINDS},
        "failures": failed[:50],
        "seconds": round(time.monotonic() - began + before.get("seconds", 0.0), 1),
        "classes": classes,
        "refused_classes": refused,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "summary.md").write_text(full_page(report))
    return not failed


def full_page(report: Mapping[str, Any]) -> str:
    """The full product's summary as a page: a pure function of the JSON beside it."""
    lines = [
        "# The oracle matrix, full product", "", report["note"], "",
        f"{report['cells']} cells in {report['seconds']:.0f} s: "
        + ", ".join(f"{report[kind]} {kind}" for kind in KINDS)
        + f". torch {report['versions']['torch']}, diffusers {report['versions']['diffusers']}.", "",
        "Errors are of the worst row of the worst cell, largest error over largest reference; the reference is the "
        "real class in float64.", "",
        "| class | cells | right | raises | not finite | refused | wrong | float64 | float32 | diffusers' float32 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, found in report["classes"].items():
        errors = (found[key] for key in ("worst_float64", "worst_float32", "worst_float32_diffusers"))
        cells = [f"{found[kind]}" for kind in KINDS] + ["" if e is None else f"{e:.1e}" for e in errors]
        lines.append(f"| {name} | {found['cells']} | {' | '.join(cells)} |")
    lines += ["", "Where diffusers itself raises, and `tabulate` the same:", ""]
    for name, found in report["classes"].items():
        lines += [f"- {name}: {detail} ({count} cells)" for detail, count in found["raised"].items()]
    lines += ["", "Classes without a table:", ""]
    lines += [f"- {detail}" for detail in report["refused_classes"].values()]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """`--full --out FOLDER` or `--coverage FILE`; 1 when a cell fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.oracle", description=__doc__)
    parser.add_argument("--full", action="store_true", help="run the full product")
    parser.add_argument(
        "--out", type=Path, default=Path("reports/oracle"), help="where the full product's summary goes"
    )
    parser.add_argument("--classes", nargs="+", default=AFFINE, help="only these, into a summary that exists")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--coverage", type=Path, help="run the short matrix and write the coverage page here")
    chosen = parser.parse_args(arguments)
    _prepare_worker()
    if chosen.full:
        return 0 if run_full(chosen.out, chosen.jobs, chosen.classes) else 1
    if chosen.coverage is None:
        parser.error("expected --full or --coverage FILE")
    results = dict(run_matrix((*AFFINE, *REFUSED_CLASSES), jobs=chosen.jobs))
    chosen.coverage.write_text(coverage(results))
    failures = [outcome for outcomes in results.values() for outcome in outcomes if is_failure(outcome)]
    for outcome in failures:
        print(outcome, file=sys.stderr)  # noqa: T201
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
