"""Capacities: validated, immutable, named when a request does not fit; and the plans that ship."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.errors import PlanMismatch
from fastdiff.plan import CapturePlan, TensorSpec, shipped
from fastdiff.runtime import Runtime
from fastdiff.slots import Slots

REPOSITORY = Path(__file__).parents[1]
SHIPPED = [
    "digits",
    "dit-xl-256",
    "flux-dev-1024",
    "qwen-image-1024",
    "sd15-512",
    "sd35-medium-1024",
    "sdxl-1024",
    "wan21-1.3b-480p",
    "wan22-a14b-480p",
]


def plan(**fields: Any) -> CapturePlan:
    defaults: dict[str, Any] = {"latent_shape": (4, 8, 8), "dtype": torch.float32}
    return CapturePlan(**defaults | fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [("memory", 0), ("memory", "4"), ("memory", True), ("rows", 0), ("draws", -1), ("unroll", 0), ("ring_bytes", -1),
     ("graph_bytes", -1), ("graph_bytes", 1.5), ("regional", 1), ("compile", "fast"), ("latent_shape", ()),
     ("latent_shape", (4, 0, 8)), ("latent_shape", 4), ("latent_shape", "488"), ("batch_sizes", 4),
     ("dtype", "float32"), ("conditioning", 3), ("batch_sizes", ()), ("batch_sizes", (2, 1)), ("batch_sizes", (0, 1)),
     ("batch_sizes", (1, 1)), ("batch_sizes", (1, "2"))],
)  # fmt: skip
def test_a_capacity_that_makes_no_sense_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"CapturePlan.{field}: expected"):
        plan(**{field: value})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ((2, 16, 64), r"x: expected a fastdiff.plan.TensorSpec\(shape, torch.dtype\), got \(2, 16, 64\)"),
        (TensorSpec((2, 16), "float32"), "x: expected a fastdiff.plan.TensorSpec.*'float32'"),  # type: ignore[arg-type]
        (TensorSpec((2, 0), torch.float32), r"x.shape: expected .*sizes >= 1, got \(2, 0\)"),
        (TensorSpec(2, torch.float32), "x.shape: expected .*sizes >= 1, got 2"),  # type: ignore[arg-type]
    ],
)
def test_conditioning_that_is_no_shape_and_dtype_is_refused_by_name(spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"CapturePlan.conditioning.{message}"):
        plan(conditioning={"x": spec})


def test_lists_are_taken_as_tuples() -> None:
    listed = plan(latent_shape=[4, 8, 8], batch_sizes=[1, 2], conditioning={"x": TensorSpec([3], torch.float32)})  # type: ignore[arg-type]
    assert listed == plan(batch_sizes=(1, 2), conditioning={"x": TensorSpec((3,), torch.float32)})
    assert listed.latent_shape == (4, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_batch": 4, "batch_sizes": (1, 2)}, ValueError, r"max_batch: expected 2, the last of .* \(1, 2\), got 4"),
        ({"plan": "digits"}, TypeError, r"plan: expected a CapturePlan, such as CapturePlan.load\('digits'\), got '"),
        ({"plan": {"rows": 9}}, TypeError, r"plan: expected a CapturePlan, .* got \{'rows': 9\}"),
        ({"mode": "Auto"}, ValueError, "mode: expected one of eager, .*loop-graph, auto, got 'Auto'"),
        ({"dtype": "float16"}, TypeError, "Runtime takes no 'dtype': its capacities are batch_sizes, .*the pipeline's"),
        ({"plan": CapturePlan.load("digits"), "dtype": torch.float16}, TypeError, "Runtime takes no 'dtype'"),
        ({"batch_size": 4}, TypeError, "Runtime takes no 'batch_size': its capacities are batch_sizes, memory, rows"),
        ({"batch_sizes": 4}, ValueError, "CapturePlan.batch_sizes: expected"),
    ],
)  # fmt: skip
def test_a_runtime_says_which_of_its_capacities_it_cannot_take(
    pipe: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Runtime(pipe, **arguments)


def test_max_batch_may_stand_beside_batch_sizes_that_end_with_it(pipe: Any) -> None:
    assert Runtime(pipe, max_batch=2, batch_sizes=[2], certify=False).plan.batch_sizes == (2,)


def test_a_plan_cannot_be_changed() -> None:
    own = plan(conditioning={"text": TensorSpec((2, 3), torch.float32)})
    with pytest.raises(FrozenInstanceError):
        own.rows = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        own.conditioning["more"] = TensorSpec((1,), torch.float32)  # type: ignore[index]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_a_plan_travels(way: Callable[[CapturePlan], CapturePlan]) -> None:
    plan = CapturePlan.load("sd15-512")
    other = way(plan)
    assert other == plan
    assert hash(other) == hash(plan)
    with pytest.raises(TypeError, match="mappingproxy"):
        other.conditioning["text"] = plan.conditioning["prompt_embeds"]  # type: ignore[index]


def test_the_ring_holds_a_whole_run_only_where_that_is_small() -> None:
    assert plan(rows=50).ring_depth == 50
    video = plan(latent_shape=(16, 21, 60, 104), rows=50, unroll=3)
    assert video.ring_depth == 3
    assert video.latent_numel * 4 * 50 > video.ring_bytes
    assert plan(rows=50, ring_bytes=0, unroll=1).ring_depth == 1
    assert plan(rows=2, ring_bytes=0, unroll=4).ring_depth == 2


def test_conditioning_of_another_length_name_or_dtype_is_named() -> None:
    own = plan(conditioning={"text": TensorSpec((77, 8), torch.float32), "label": TensorSpec((2,), torch.int64)})
    fitting = {"text": torch.zeros(77, 8), "label": torch.zeros(2, dtype=torch.int64)}
    own.check_conditioning(fitting)
    for wrong, message in (
        ({"text": torch.zeros(76, 8)}, r"text: expected \(77, 8\) float32, got \(76, 8\) float32; pad or cut it"),
        ({"text": torch.zeros(77, 8).half()}, r"text: expected \(77, 8\) float32, got \(77, 8\) float16"),
        ({"label": torch.zeros(2)}, r"label: expected \(2,\) int64, got \(2,\) float32"),
        ({"mask": torch.zeros(77)}, r"mask: expected none, got \(77,\) float32"),
    ):
        with pytest.raises(PlanMismatch, match=message):
            own.check_conditioning(fitting | wrong)
    with pytest.raises(PlanMismatch, match=r"label: expected \(2,\) int64, got none"):
        own.check_conditioning({"text": fitting["text"]})


def test_every_plan_of_the_repository_loads_by_name_and_by_path() -> None:
    assert sorted(shipped()) == SHIPPED
    for name in SHIPPED:
        own = CapturePlan.load(name)
        assert own == CapturePlan.load(REPOSITORY / "graphs" / f"{name}.toml")
        assert own.dtype == (torch.float32 if name == "digits" else torch.bfloat16)
        assert own.regional == name.endswith(("-1024", "-480p"))
    flux = CapturePlan.load("flux-dev-1024")
    assert (flux.latent_shape, flux.batch_sizes) == ((4096, 64), (1,))
    assert flux.conditioning["pooled_prompt_embeds"] == TensorSpec((768,), torch.bfloat16)
    assert CapturePlan.load("dit-xl-256").conditioning["class_labels"] == TensorSpec((2,), torch.int64)


def test_a_plan_that_is_nowhere_is_refused_with_all_names() -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a TOML file or one of digits, .*, got 'sd3'"):
        CapturePlan.load("sd3")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"rows = ", "Invalid value"), (b"\xff\xfe", "can't decode"), (b"steps = 3", "unknown key 'steps'")],
)
def test_a_file_that_holds_no_plan_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "own.toml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"own.toml: expected a plan in TOML: .*{message}"):
        CapturePlan.load(file)


GOOD = {"latent_shape": [4, 8, 8], "dtype": "float32"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 3}, "plan: unknown key 'steps'; expected some of batch_sizes, "),
        ({"dtype": "float31"}, "plan: dtype: expected a dtype such as 'bfloat16', got 'float31'"),
        ({"dtype": "nn"}, "plan: dtype: expected a dtype such as 'bfloat16', got 'nn'"),
        ({"latent_shape": 4}, "CapturePlan.latent_shape: expected .*sizes >= 1, got 4"),
        ({"latent_shape": [4, 0]}, r"CapturePlan.latent_shape: expected .*sizes >= 1, got \[4, 0\]"),
        ({"batch_sizes": "8"}, "CapturePlan.batch_sizes: expected .*sizes >= 1, got '8'"),
        ({"batch_sizes": [2, 1]}, r"CapturePlan.batch_sizes: expected rising sizes >= 1, got \(2, 1\)"),
        ({"rows": "many"}, "CapturePlan.rows: expected an integer >= 1, got 'many'"),
        ({"regional": "yes"}, "CapturePlan.regional: expected True or False, got 'yes'"),
        (
            {"compile": "reduce-overhead"},
            "CapturePlan.compile: expected one of none, default, .*, got 'reduce-overhead'",
        ),
        ({"conditioning": 3}, "plan: conditioning: expected a table, got 3"),
        ({"conditioning": {"text": [77, 8]}}, r"plan: conditioning.text: expected a shape .*, got \[77, 8\]"),
        ({"conditioning": {"text": {"dtype": "int64"}}}, "plan: conditioning.text: expected a shape"),
        ({"conditioning": {"text": {"shape": [7], "size": 7}}}, "plan: conditioning.text: expected a shape"),
        (
            {"conditioning": {"text": {"shape": [7.5]}}},
            r"CapturePlan.conditioning.text.shape: expected .*, got \[7.5\]",
        ),
        ({"conditioning": {"text": {"shape": [7], "dtype": "x"}}}, "plan: conditioning.text.dtype: expected a dtype"),
    ],
)
def test_what_a_plan_cannot_mean_is_refused_with_its_key(changed: dict[str, Any], message: str) -> None:
    CapturePlan.parse(GOOD)
    with pytest.raises(ValueError, match=message):
        CapturePlan.parse(GOOD | changed)


@pytest.mark.parametrize("key", GOOD)
def test_what_a_plan_must_have_is_asked_for_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=f"plan: missing key '{key}'"):
        CapturePlan.parse({other: value for other, value in GOOD.items() if other != key})


@pytest.mark.parametrize(
    "own",
    [*map(CapturePlan.load, SHIPPED), plan(memory=6, rows=3, draws=0), plan(draws=2, ring_bytes=0, batch_sizes=(1, 3))],
    ids=[*SHIPPED, "no-draws", "short-ring"],
)
def test_the_bytes_of_all_slots_are_known_beforehand(own: CapturePlan) -> None:
    slots = Slots(own, "cpu")
    assert own.state_bytes == slots.nbytes
    without = replace(own, conditioning={})
    assert own.conditioning_bytes == own.state_bytes - without.state_bytes


def test_the_plan_of_the_shipped_pipeline_is_what_a_runtime_derives(pipe: Any) -> None:
    assert Runtime(pipe, certify=False).plan == CapturePlan.load("digits")


def test_the_wheel_carries_the_plans_to_where_they_are_looked_for(tmp_path: Path) -> None:
    from hatchling.builders.wheel import WheelBuilder  # of the environment that builds wheels

    wheel = next(WheelBuilder(str(REPOSITORY)).build(directory=str(tmp_path), versions=["standard"]))
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = "from fastdiff.plan import CapturePlan, shipped; CapturePlan.load('digits'); print(*shipped().values())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    printed = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment, cwd=tmp_path
    ).stdout.split()
    assert printed == [str(tmp_path / "installed" / "fastdiff" / "graphs" / f"{name}.toml") for name in SHIPPED]
