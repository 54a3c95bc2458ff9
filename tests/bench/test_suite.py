"""The TOML files parse; what has no meaning is refused; overrides leave no stale names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastdiff.bench.cells import pieces
from fastdiff.bench.suite import load, parse, split

MINIMAL: dict[str, Any] = {"threads": 1, "row_max_s": 1}
ROW = {"name": "r", "samplers": ["Euler"], "latent_shape": [4, 8, 8]}
IMAGE = {
    "name": "i",
    "workload": "sequential",
    "samplers": ["Euler"],
    "steps": [4],
    "max_s": 1,
    "arms": ["shared-sequential/eager", "tensorized/eager"],
    "compare": [["shared-sequential/eager", "tensorized/eager"]],
}


@pytest.mark.parametrize("name", ["run", "smoke", "ci"])
def test_the_suites_that_ship_parse(name: str) -> None:
    suite = load(name)
    assert suite.level == 0.99
    assert suite.attribution[0].base == "pipeline/eager"
    titles = [piece.title for piece in pieces(suite, 0)]
    assert len(titles) == len(set(titles)) > 10
    assert (titles[0], titles[-1]) == ("deterministic figures", "canaries")


@pytest.mark.parametrize(("name", "within_s"), [("smoke", 40), ("run", 170), ("ci", 480)])
def test_a_suite_samples_no_longer_than_it_may_take(name: str, within_s: float) -> None:
    assert sum(piece.max_s or 0 for piece in pieces(load(name), 0)) <= within_s


def test_a_suite_may_be_any_file_and_another_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("threads = 1\nrow_max_s = 2\n")
    assert load(str(tmp_path / "mine.toml")).row_max_s == 2
    with pytest.raises(FileNotFoundError, match=r"expected a suite's file or one of .*ci.*run.*smoke, got 'full'"):
        load("full")


@pytest.mark.parametrize("name", ["smoke", "ci"])
def test_the_smoke_and_ci_suites_compile_nothing(name: str) -> None:
    suite = load(name)
    assert all(mode == "eager" for case in suite.row for mode in case.modes)
    assert all(arm.endswith("/eager") for case in suite.image for arm in case.arms)


def test_the_run_compiles_at_most_four_callables() -> None:
    suite = load("run")
    steps = {(case.latent_shape, case.batch) for case in suite.row if "compiled" in case.modes}
    models = {
        (arm.startswith("tensorized"), case.batch)
        for case in suite.image
        for arm in case.arms
        if arm.endswith("/compiled")
    }
    assert len(steps) + len(models) <= 4


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({**MINIMAL, "thread": 2}, "the file: unknown key 'thread'"),
        ({"threads": 1}, "missing key 'row_max_s'"),
        ({**MINIMAL, "row": [{**ROW, "sampler": "DDIM"}]}, r"\[\[row\]\]: unknown key 'sampler'"),
        ({**MINIMAL, "row": [{"name": "r"}]}, r"\[\[row\]\]: missing key 'samplers'"),
        ({**MINIMAL, "row": [ROW, ROW]}, "two image or row cases have one name"),
        ({**MINIMAL, "image": [{**IMAGE, "arms": ["shared/eager"]}]}, "expected arms"),
        ({**MINIMAL, "image": [{**IMAGE, "arms": ["shared-racing/eager"], "compare": []}]}, "never timed"),
        ({**MINIMAL, "image": [{**IMAGE, "workload": "parallel"}]}, "expected a workload"),
        ({**MINIMAL, "image": [{**IMAGE, "compare": [["a/eager", "tensorized/eager"]]}]}, "does not run"),
        (
            {**MINIMAL, "row": [ROW], "target": [{"label": "t", "case": "q", "base": "diffusers", "arms": ["x"]}]},
            "no case 'q' compares",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(document)


def test_a_cuda_device_has_a_captured_arm_beside_every_compiled_one() -> None:
    suite = load("run").with_graphs()
    compiled, graphed = "tensorized/compiled", "tensorized/step-graph"
    assert any(graphed in case.arms for case in suite.image)
    for case in suite.image:
        assert (graphed in case.arms) == (compiled in case.arms) == ((compiled, graphed) in case.compare)
    (step,) = [step for step in suite.attribution if step.arm == graphed]
    assert (step.case, step.base) == ("mixed", compiled)
    assert suite.with_graphs() == suite
    assert load("smoke").with_graphs() == load("smoke")
    assert suite.override(batch=4, scheduler=None, steps=None).image[0].batch in (1, 4)


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("diffusers", ("diffusers", "eager")),
        ("pipeline/eager", ("pipeline", "eager")),
        ("tensorized/compiled", ("tensorized", "compiled")),
        ("tensorized/step-graph", ("tensorized", "step-graph")),
    ],
)
def test_an_arm_names_its_mode(arm: str, expected: tuple[str, str]) -> None:
    assert split(arm) == expected


@pytest.mark.parametrize("arm", ["cloned-deepcopy/step-graph", "tensorized/loop-graph", "tensorized/fast"])
def test_an_arm_in_a_mode_that_it_has_not_is_refused(arm: str) -> None:
    with pytest.raises(ValueError, match="expected arms"):
        parse({**MINIMAL, "image": [{**IMAGE, "arms": [arm], "compare": []}]})


def test_overrides_reach_every_case_and_drop_what_they_made_meaningless() -> None:
    suite = load("run").override(batch=4, scheduler="DDIM", steps=3)
    assert {case.samplers for case in suite.image} | {case.samplers for case in suite.row} == {("DDIM",)}
    assert {case.batch for case in suite.image} == {1, 4}
    assert all(case.steps == (3,) for case in suite.image)
    assert all(case.steps == 3 for case in suite.row)
    assert suite.target == ()
    names = {case.name for case in suite.image}
    assert all(step.case in names for step in suite.attribution)
    assert len(suite.row) < len(load("run").row)
    assert load("run").override(batch=None, scheduler=None, steps=None) == load("run")
