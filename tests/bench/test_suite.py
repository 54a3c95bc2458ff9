"""The TOML files parse; what has no meaning is refused; overrides leave no stale names."""

from __future__ import annotations

from typing import Any

import pytest

from fastdiff.bench.run import count_pieces
from fastdiff.bench.suite import load, parse

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


@pytest.mark.parametrize("name", ["run", "quick"])
def test_the_suites_that_ship_parse(name: str) -> None:
    suite = load(name)
    assert suite.level == 0.99
    assert suite.attribution[0].base == "pipeline/eager"
    assert count_pieces(suite) > 10


def test_quick_compiles_nothing() -> None:
    suite = load("quick")
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
