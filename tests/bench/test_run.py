"""A small suite end to end on a tiny pipeline: what is measured, what is refused as wrong, what the page says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.bench import arms, canary, cells, gates, schema
from fastdiff.bench.__main__ import main
from fastdiff.bench.arms import Workbench
from fastdiff.bench.outcome import exit_code, outcome
from fastdiff.bench.report import markdown, markdown_table
from fastdiff.bench.rows import RowBench
from fastdiff.bench.suite import FateCase, Suite, load, parse
from fastdiff.bench.summary import summarize
from fastdiff.bench.tables import attribution_table, tables
from fastdiff.slots import Slots
from tests.families.tiny_pipelines import shared


def measured(pipe: Any, suite: Suite) -> dict[str, Any]:
    """The sections of a report, but for those that every run has."""
    row_bench = RowBench(Workbench(pipe), 0)
    chosen = [piece for piece in cells.pieces(suite, 0) if piece.section not in ("gates", "canaries")]
    return cells.assemble(suite, [cells.measure(piece, row_bench, suite.threads) for piece in chosen])


def fates_of(pipe: Any, samplers: tuple[str, ...], arm_names: tuple[str, ...]) -> dict[tuple[str, str, str], list[str]]:
    case = FateCase(samplers=samplers, arms=arm_names, steps=4, unequal=6)
    raw = measured(pipe, Suite(threads=1, row_max_s=0, fate=(case,)))
    return {
        (one["sampler"], one["workload"], one["arm"]): [
            f"{fate['fate']} {fate['error'] or ''}".strip() for fate in one["fates"]
        ]
        for one in raw["fates"]
    }


def test_racing_requests_raise_for_euler_and_are_silently_wrong_for_pndm(tiny_pipe: Any) -> None:
    fates = fates_of(tiny_pipe, ("Euler", "PNDM", "DDIM"), ("shared-racing",))
    assert fates["Euler", "concurrent-equal", "shared-racing"] == ["raised IndexError"] * 2
    assert fates["PNDM", "concurrent-equal", "shared-racing"] == ["silently wrong"] * 2
    assert fates["DDIM", "concurrent-equal", "shared-racing"] == ["right"] * 2
    assert "silently wrong" in fates["DDIM", "concurrent-mixed", "shared-racing"]


def test_every_other_arm_gets_interleaved_requests_right(tiny_pipe: Any) -> None:
    safe = ("shared-locked", "cloned-deepcopy", "cloned-shallow", "tensorized")
    fates = fates_of(tiny_pipe, ("PNDM", "EulerAncestral"), safe)
    assert set(map(tuple, fates.values())) == {("right", "right")}


IMAGE_SUITE: dict[str, Any] = {
    "threads": 1,
    "half_width": 1.0,
    "max_pairs": 8,
    "row_max_s": 0,
    "image": [
        {
            "name": "mixed",
            "workload": "concurrent-mixed",
            "samplers": ["PNDM", "EulerAncestral"],
            "steps": [3, 2],
            "batch": 2,
            "max_s": 0,
            "arms": [
                "pipeline/eager", "shared-locked/eager", "cloned-deepcopy/eager", "cloned-shallow/eager",
                "tensorized/eager",
            ],
            "compare": [["pipeline/eager", "cloned-shallow/eager"], ["cloned-shallow/eager", "tensorized/eager"]],
        }
    ],
    "attribution": [
        {"label": "+ batching", "case": "mixed", "base": "pipeline/eager", "arm": "cloned-shallow/eager"},
        {"label": "+ tensorized", "case": "mixed", "base": "cloned-shallow/eager", "arm": "tensorized/eager"},
    ],
    "target": [
        {
            "label": "fast", "case": "mixed", "base": "cloned-shallow/eager", "arms": ["tensorized/eager"],
            "at_least": 1e-6,
        }
    ],
}  # fmt: skip


def around(raw: dict[str, Any]) -> dict[str, Any]:
    """`raw` with what the command adds, so that a page can be made of it."""
    report = {
        "suite": "test",
        "created": "today",
        "command": ["test"],
        "model": {"name": "tiny", "parameters": 1, "toy": True, "latent_shape": [4, 8, 8], "dtype": "float32"},
        "settings": {"device": "cpu", "seed": 0, "threads": 1, "level": 0.99, "half_width": 1.0},
        "machine": {
            "id": "0", "cpu": "a CPU", "cpus_usable": 1, "threads": 1, "gpu": None, "python": "3",
            "packages": {"torch": "2", "diffusers": "0"},
        },
        "complete": True,
        **raw,
    }  # fmt: skip
    return {**report, "summary": summarize(report)}


@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline"])
def test_a_pipeline_with_a_schedule_and_latents_of_its_own_is_measured(name: str) -> None:
    """Both shift their schedule by the image's size and pack their latents."""
    arms = ["pipeline/eager", "cloned-deepcopy/eager", "tensorized/eager"]
    image = {**IMAGE_SUITE["image"][0], "samplers": ["FlowMatchEuler"], "arms": arms, "compare": []}
    raw = measured(shared(name), parse({"threads": 1, "row_max_s": 0, "max_pairs": 1, "image": [image]}))
    assert raw["unsupported"] == []
    assert [arm["status"] for arm in raw["images"][0]["arms"].values()] == ["ok"] * 3


def test_an_arm_that_cannot_run_fails_alone_and_is_told(tiny_pipe: Any) -> None:
    """As where a model cannot be captured; here, for want of a device."""
    (image,) = IMAGE_SUITE["image"]
    graph, other = "tensorized/step-graph", "cloned-shallow/eager"
    image = {**image, "arms": [graph, other], "compare": [[other, graph]]}
    step = {"label": "+ graph", "case": "mixed", "base": other, "arm": graph}
    raw = measured(tiny_pipe, parse({**IMAGE_SUITE, "image": [image], "attribution": [step], "target": []}))
    (unsupported,) = raw["unsupported"]
    assert unsupported["what"] == "images: mixed"
    assert unsupported["reason"].startswith(f"ArmsFailed: {graph}: CannotCapture: CUDA graphs need a CUDA device")
    (case,) = raw["images"]
    assert [len(arm["total_s"]) for arm in case["arms"].values()] == [8]
    assert case["compare"] == case["comparisons"] == []
    page = markdown(around(raw))
    assert "CUDA graphs need a CUDA device" in page
    assert exit_code(around(raw)) == 4

    alone = {**image, "arms": [graph], "compare": []}
    raw = measured(tiny_pipe, parse({**IMAGE_SUITE, "image": [alone], "attribution": [], "target": []}))
    assert raw["images"] == []
    assert len(raw["unsupported"]) == 1


def test_every_ownership_gives_the_image_of_the_request_alone(tiny_pipe: Any) -> None:
    raw = measured(tiny_pipe, parse(IMAGE_SUITE))
    found = raw["images"][0]["arms"]
    assert {name: arm["status"] for name, arm in found.items()} == dict.fromkeys(found, "ok")
    assert found["pipeline/eager"]["error"] == 0
    assert found["shared-locked/eager"]["error"] == 0
    assert all(len(arm["total_s"]) == 8 for arm in found.values())
    report = around(raw)
    assert [target["met"] for target in report["summary"]["targets"]] == [True]
    assert raw["unsupported"] == []
    assert "toy model" in markdown(report)


def test_a_fast_wrong_answer_is_invalid(tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(template: Any) -> Any:
        clone = copy.deepcopy(template)
        clone.register_to_config(prediction_type="v_prediction")
        return clone

    monkeypatch.setitem(arms.ARM_OWNERS, "cloned-shallow", wrong)
    raw = measured(tiny_pipe, parse(IMAGE_SUITE))
    case = raw["images"][0]
    assert case["arms"]["cloned-shallow/eager"]["status"] == "INVALID"
    assert case["arms"]["cloned-shallow/eager"]["total_s"] == []
    assert case["comparisons"] == []
    report = around(raw)
    assert exit_code(report) == 3
    assert [target["met"] for target in report["summary"]["targets"]] == [False]
    assert "no valid pair" in markdown_table(attribution_table(report))
    assert "INVALID: a wrong answer" in markdown(report)


@pytest.mark.parametrize("section", ["images", "rows"])
def test_an_answer_that_goes_wrong_while_it_is_timed_is_invalid(
    section: str, tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right in every check before the clock runs: the fourth pass and those after it take a short cut."""
    calls, arm = 0, "tensorized/eager"
    if section == "images":
        serve = arms.tensorized

        def hurried(runtime: Any, requests: Any, watch: Any) -> list[Tensor]:
            nonlocal calls
            calls += 1
            made = serve(runtime, requests, watch)
            return made if calls < 4 else [torch.zeros_like(image) for image in made]

        monkeypatch.setattr(arms, "tensorized", hurried)
        base = "shared-locked/eager"
        one = {**IMAGE_SUITE["image"][0], "arms": [base, arm], "compare": [[base, arm]]}
    else:
        read = Slots.read

        def stale(slots: Slots, slot: int, memory: int) -> Tensor:
            nonlocal calls
            calls += 1
            return read(slots, slot, memory) * (1.0 if calls < 4 else 0.5)

        monkeypatch.setattr(Slots, "read", stale)
        one = {
            "name": "row",
            "samplers": ["Euler"],
            "latent_shape": [1, 2, 3],
            "batch": 1,
            "steps": 3,
            "modes": ["eager"],
        }
    suite = {"threads": 1, "row_max_s": 0, "max_pairs": 8, section.removesuffix("s"): [one]}
    (case,) = measured(tiny_pipe, parse(suite))[section]
    assert calls >= 4
    assert case["arms"][arm]["status"] == "INVALID"
    assert case["arms"][arm]["total_s"] == []
    assert "differs from the reference by" in case["arms"][arm]["reason"]
    assert case["comparisons"] == []
    assert [one["status"] for name, one in case["arms"].items() if name != arm] == ["ok"]


@pytest.fixture(scope="module")
def quick(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `--quick` ran, at its smallest."""
    import os

    threads, home, folder = torch.get_num_threads(), Path.cwd(), tmp_path_factory.mktemp("quick")
    os.chdir(folder)
    try:
        assert main(["--quick", "--model", str(tiny_folder), "--steps", "3", "--batch", "2", "--save", "kept"]) == 0
    finally:
        os.chdir(home)
        torch.set_num_threads(threads)
    return folder


def test_the_command_writes_a_report_twice_when_asked_to(quick: Path) -> None:
    (run_folder,) = (quick / "reports" / "runs").iterdir()
    for name in ("report.json", "report.md", "report.html"):
        assert (run_folder / name).read_bytes() == (quick / "reports" / "kept" / name).read_bytes()


def test_the_page_is_a_pure_function_of_the_json(quick: Path) -> None:
    page = (quick / "reports" / "kept" / "report.md").read_text()
    report = schema.load(quick / "reports" / "kept")
    assert markdown(report) == page == markdown(schema.load(quick / "reports" / "kept"))
    raw = {key: value for key, value in report.items() if key != "summary"}
    assert summarize(raw) == report["summary"]
    assert page.isascii()


def test_the_page_opens_with_the_attribution(quick: Path) -> None:
    report = schema.load(quick / "reports" / "kept")
    page = (quick / "reports" / "kept" / "report.md").read_text()
    titles = [table.title for table in tables(report)]
    assert titles[0].startswith("What each step is worth")
    assert titles[1] == "Targets"
    assert markdown_table(attribution_table(report)) in page
    for section in ("Memory", "Fate of the images", "Error against float64", "Operations and host syncs"):
        assert any(title.startswith(section) for title in titles)


def test_the_report_keeps_raw_samples_and_the_machine(quick: Path) -> None:
    report = schema.load(quick / "reports" / "kept")
    assert (report["schema"], report["suite"], report["complete"]) == ("fastdiff.bench/1", "smoke", True)
    assert len(report["machine"]["id"]) == 12
    assert report["model"]["toy"]
    assert report["unsupported"] == []
    for case in (*report["images"], *report["rows"]):
        lengths = {len(arm["total_s"]) for arm in case["arms"].values()}
        assert len(lengths) == 1
        assert lengths.pop() >= 8


def test_every_run_carries_its_canaries_and_its_exact_figures(quick: Path) -> None:
    report = schema.load(quick / "reports" / "kept")
    lengths = {len(times) for times in report["canaries"]["total_s"].values()}
    assert len(lengths) == 1
    assert lengths.pop() >= 8
    known = report["canaries"]
    assert canary.judged(known["total_s"], report["settings"]["level"]) == known  # what its samples say
    found = known["slower_10_percent"]["verdict"] == "REGRESSION"
    same = known["a_a"]["verdict"] in ("NO-CHANGE", "INCONCLUSIVE")
    assert (known["doubt"] == "") == (found and same)
    assert report["gates"]["figures"]["host syncs per row: mixed, batch 8"] == 0
    assert report["gates"]["changes"] is None  # the baseline is the shipped model's, and this is another


def test_a_run_gates_on_the_committed_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    only = ["--quick", "-k", "deterministic figures", "--json"]
    assert main([*only, "--update-baseline"]) == 0
    (path,) = (tmp_path / "reports" / "baselines").iterdir()
    assert f"wrote {gates.BASELINES / path.name}" in capsys.readouterr().err
    figures = json.loads(path.read_text())
    name = "ops per row: mixed, batch 8"
    path.write_text(json.dumps({**figures, name: figures[name] - 1, "gone": 1}))
    assert main(only) == 1
    captured = capsys.readouterr()
    assert f"REGRESSION: {name}: {figures[name] - 1} -> {figures[name]}" in captured.err
    grown = path.read_text()
    assert main([*only, "--update-baseline"]) == 0  # accepted, and said
    accepted = capsys.readouterr()
    assert f"REGRESSION: {name}: {figures[name] - 1} -> {figures[name]}" in accepted.err
    assert outcome(json.loads(accepted.out)["fastdiff"]).word == "ACCEPTED"
    assert json.loads(path.read_text()) == figures
    path.write_text(grown)
    report = json.loads(captured.out)["fastdiff"]
    assert {one["name"] for one in report["gates"]["changes"]} == {name, "gone"}
    assert not report["complete"]  # a part of the suite, and nothing is said of the rest
    assert report["summary"] == {"attribution": [], "no_gain": [], "targets": []}
    assert report["canaries"] is None


def test_a_timed_piece_brings_the_canaries_along() -> None:
    whole = list(cells.pieces(load("smoke"), 0))

    def chosen(text: str) -> list[str]:
        return [piece.title for piece in cells.choose(whole, text)]

    assert chosen("") == [piece.title for piece in whole]
    assert chosen("images: mixed") == ["images: mixed", "canaries"]
    assert chosen("set-up: Euler") == ["set-up: Euler", "canaries"]
    assert chosen("deterministic figures") == ["deterministic figures"]  # nothing there is timed
    assert chosen("canaries") == ["canaries"]
    assert chosen("nothing like it") == []


@pytest.mark.compiles
def test_a_first_call_is_cold_with_an_empty_cache_and_warm_with_a_full_one(
    tiny_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    case = {
        "name": "row", "samplers": ["Euler"], "latent_shape": [1, 2, 3], "batch": 1, "steps": 3, "modes": ["compiled"]
    }  # fmt: skip
    suite = parse({"threads": 1, "row_max_s": 0, "row": [case]})
    what = "null-model step, 1x2x3, batch 1"
    for expected in ("cold", "warm"):
        raw = measured(tiny_pipe, suite)
        assert raw["compile_cache"] == {what: expected}
        assert raw["compile_s"].keys() == {what}
        torch._dynamo.reset()  # or the second would find the first one's code in this process


def test_what_cannot_run_is_listed_with_its_reason_and_the_rest_runs(tiny_pipe: Any) -> None:
    suite = {
        "threads": 1,
        "row_max_s": 0,
        "setup": [{"samplers": ["CosineDPMSolverMultistep", "Euler"], "steps": 3}],
        "row": [
            {"name": "too long", "samplers": ["DDPM"], "latent_shape": [4, 8, 8], "steps": 500, "modes": ["eager"]}
        ],
        "no_gain": [{"label": "x", "case": "too long", "base": "diffusers", "arm": "tensorized/eager"}],
        "target": [{"label": "t", "case": "too long", "base": "diffusers", "arms": ["tensorized/eager"]}],
    }
    raw = measured(tiny_pipe, parse(suite))
    assert [one["sampler"] for one in raw["setup"]] == ["Euler"]
    reasons = {one["what"]: one["reason"] for one in raw["unsupported"]}
    assert "CosineDPMSolverMultistepScheduler" in reasons["set-up: CosineDPMSolverMultistep"]
    assert "PlanMismatch" in reasons["rows: too long"]
    report = around(raw)
    assert report["summary"]["targets"][0]["met"] is False
    assert exit_code(report) == 4
    assert "## Unsupported" in markdown(report)
