"""The TOML files parse; what has no meaning is refused; overrides leave no stale names."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from fastdiff.bench.__main__ import main
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
        ({**MINIMAL, "threads": "2"}, "^the file: threads: expected a whole number >= 1, got '2'$"),
        ({**MINIMAL, "threads": True}, "^the file: threads: expected a whole number >= 1, got True$"),
        ({**MINIMAL, "threads": 0}, "^the file: threads: expected a whole number >= 1, got 0$"),
        ({**MINIMAL, "max_pairs": 0}, "^the file: max_pairs: expected a whole number >= 1, got 0$"),
        ({**MINIMAL, "level": 1.0}, r"^the file: level: expected a number between 0 and 1, got 1\.0$"),
        ({**MINIMAL, "image": 3}, r"^the file: image: expected a list of tables, each under \[\[image\]\], got 3$"),
        ({**MINIMAL, "image": [3]}, r"^\[\[image\]\]: expected a table, got 3$"),
        ({**MINIMAL, "row": ROW}, r"^the file: row: expected a list of tables, each under \[\[row\]\], got {"),
    ],
)
def test_what_has_no_meaning_is_refused(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(document)


@pytest.mark.parametrize("line", ['threads = "2"', "threads = 0", "threads = 1\nimage = 3", "threads = 1\nlevel = 1.0"])
def test_the_command_refuses_it_in_one_line(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "odd.toml").write_text(f"row_max_s = 1\n{line}\n")
    with pytest.raises(SystemExit) as stopped:
        main(["--suite", str(tmp_path / "odd.toml"), "--list"])
    assert stopped.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "--suite: the file: " in said


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


@pytest.mark.parametrize("name", ["run", "smoke", "ci"])
def test_no_override_leaves_a_name_of_a_case_that_is_gone(name: str) -> None:
    whole = load(name)
    for batch, scheduler, steps in product((None, 1, 8), (None, "Euler", "PNDM"), (None, 1, 6)):
        suite = whole.override(batch=batch, scheduler=scheduler, steps=steps)  # which refuses such a name
        names = {case.name for case in suite.image} | {case.name for case in suite.row}
        assert {step.case for step in suite.no_gain} <= names
    alone = load("ci").override(batch=1, scheduler=None, steps=None)
    assert 0 < len(alone.no_gain) < len(load("ci").no_gain)  # what refers to a case that is left, stays


@pytest.mark.parametrize("steps", [1, 4, 6])
def test_fates_of_unequal_steps_stay_unequal_under_an_override(steps: int) -> None:
    (fate,) = load("ci").override(batch=None, scheduler=None, steps=steps).fate
    assert (fate.steps, fate.unequal) == (steps, steps + 2)
    assert load("ci").override(batch=2, scheduler=None, steps=None).fate == load("ci").fate
