"""Deterministic figures: the same twice, and a planted operation, sync, tensor or byte is named."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import stages
from fastdiff.bench import gates, rows, schema
from fastdiff.bench.arms import Workbench
from fastdiff.bench.gates import Change, baseline, compare, figures, key, save
from fastdiff.bench.run import _said_of_gates
from fastdiff.bench.suite import CountCase
from fastdiff.denoiser import Denoiser
from fastdiff.families import Family
from fastdiff.plan import CapturePlan
from fastdiff.session import Session
from fastdiff.slots import Batch
from fastdiff.state import RequestState
from fastdiff.step import denoise_step


@pytest.fixture(scope="module", autouse=True)
def one_thread_here() -> Iterator[None]:
    """Rows are counted, not timed, and far too small to share: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bench(pipe: Any) -> Workbench:
    return Workbench(pipe)


@pytest.fixture(scope="module")
def known(bench: Workbench) -> dict[str, int]:
    """Of the shipped model, once for all tests: on a CPU there is nothing that cannot be measured."""
    measured = figures(bench)
    found = {name: value for name, value in measured.items() if value is not None}
    assert found == measured
    return found


def regressions(
    head: Iterable[tuple[str, int | None]], known: dict[str, int]
) -> dict[str, tuple[int | None, int | None]]:
    """Of the figures that one part of the collection makes."""
    with torch.no_grad():
        figures = dict(head)
    changes = compare(figures, {name: known[name] for name in figures})
    return {one.name: (one.base, one.head) for one in changes if one.verdict == "REGRESSION"}


def test_the_same_twice(pipe: Any, known: dict[str, int]) -> None:
    assert figures(Workbench(pipe)) == known


def test_no_figure_is_worse_than_its_committed_baseline(known: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change for the better, or for good reason: `python -m fastdiff.bench --update-baseline`."""
    monkeypatch.chdir(Path(__file__).parents[2])
    own = key(torch.device("cpu"))
    committed = baseline(own)
    if committed is None:
        pytest.skip(f"no baseline for {own}: incomparable")
    assert [change for change in compare(known, committed) if change.verdict == "REGRESSION"] == []


def test_every_kind_is_there_and_the_step_is_as_it_should_be(known: dict[str, int]) -> None:
    def of(start: str) -> set[int]:
        found = {value for name, value in known.items() if name.startswith(start)}
        assert found, start
        return found

    assert of("host syncs per row") == of("recompiles") == of("graph breaks") == of("bytes left by") == {0}
    assert of("compiled graphs") == {1}
    samplers = {value for name, value in known.items() if name.startswith("ops per row") and "model" not in name}
    assert len(samplers) == 1  # whatever the samplers and the batch
    assert known["ops per row: model, batch 8"] == known["ops per row: model, batch 1"] > max(samplers)
    assert 8 * known["peak bytes of a row: model, batch 1"] >= known["peak bytes of a row: model, batch 8"] > 0
    assert known["state bytes: sd15-512"] == CapturePlan.load("sd15-512").state_bytes


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Batch], object]], None]:
    """Has every step do something more, after the real one."""

    def plant(more: Callable[[Batch], object]) -> None:
        def worse(denoiser: Denoiser, batch: Batch) -> None:
            denoise_step(denoiser, batch)
            more(batch)

        monkeypatch.setattr(rows, "denoise_step", worse)

    return plant


@pytest.mark.parametrize(
    ("more", "figure"),
    [
        (lambda batch: batch.planes[0].mul_(1.0), "ops per row"),
        (lambda batch: batch.row[0].item(), "host syncs per row"),
    ],
)
def test_one_more_operation_or_sync_is_named(
    more: Callable[[Batch], object], figure: str, bench: Workbench, known: dict[str, int], plant: Callable[..., None]
) -> None:
    plant(more)
    case = CountCase(mixes=(("Euler",), ("Euler", "PNDM")), latent_shape=(4, 8, 8))
    for part in (gates._sampler_rows(bench, case), gates._emulated_rows(bench)):
        worse = regressions(part, known)
        assert worse
        for name, (base, head) in worse.items():
            assert name.startswith(figure)
            assert base is not None
            assert head == base + 1


def test_a_baseline_is_of_right_answers_and_keeps_what_could_not_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    report = schema.load(root / "reports" / "digits-cpu-1")
    monkeypatch.chdir(tmp_path)
    measured = report["gates"]
    save(measured["key"], {"ops": 3, "lost": 4})
    measured["figures"], options = {"ops": 5, "lost": None}, argparse.Namespace(update_baseline=True)
    arm = report["rows"][0]["arms"]["tensorized/eager"]
    arm["status"], arm["reason"] = "INVALID", "planted"
    assert "no baseline is written: 1 wrong answers" in "".join(_said_of_gates(options, report))
    assert baseline(measured["key"]) == {"ops": 3, "lost": 4}
    arm["status"] = "ok"
    _said_of_gates(options, report)
    assert baseline(measured["key"]) == {"ops": 5, "lost": 4}


def test_a_sync_of_the_session_beside_its_steps_is_named(
    bench: Workbench, known: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Session.step

    def looks(session: Session) -> list[int]:
        float(session._slots.read(0, 1).sum())
        return step(session)

    monkeypatch.setattr(Session, "step", looks)
    worse = regressions(gates._served(bench), known)
    base, head = worse["host syncs of a session: 8 requests"]
    assert base == 0
    assert head is not None
    assert head >= gates.ROWS


def test_a_tensor_kept_for_each_request_is_named(
    bench: Workbench, known: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Tensor] = []
    decode = stages.decode

    def leaks(family: Family, state: RequestState) -> RequestState:
        kept.append(torch.zeros(25))
        return decode(family, state)

    monkeypatch.setattr(stages, "decode", leaks)
    assert regressions(gates._kept(bench), known) == {"bytes left by 8 requests": (0, 800)}


class Reads:
    """A denoiser that branches on a value."""

    def __call__(
        self, sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor
    ) -> Tensor:
        return sample + 1 if guidance.max() > 2 else sample


class Counts:
    """A denoiser that computes with a number of Python's, which changes."""

    calls = 0

    def __call__(
        self, sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], guidance: Tensor
    ) -> Tensor:
        self.calls += 1
        return sample + self.calls


@pytest.mark.parametrize(("worse", "figure"), [(Reads(), "graph breaks"), (Counts(), "recompiles")])
def test_a_graph_break_and_a_recompile_are_named(
    worse: Denoiser, figure: str, bench: Workbench, known: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.family, "denoiser", worse)
    assert f"{figure}: mixed requests, one batch size" in regressions(gates._compilation(bench), known)


def test_a_larger_state_is_named(known: dict[str, int]) -> None:
    own = "state bytes: digits"
    assert compare({**known, own: 2 * known[own]}, known) == [Change(own, known[own], 2 * known[own], "REGRESSION")]


@pytest.mark.parametrize(
    ("name", "base", "head", "verdict"),
    [
        ("ops per row", 100, 101, "REGRESSION"),
        ("ops per row", 100, 99, "IMPROVEMENT"),
        ("ops per row", 100, 100, None),
        ("peak bytes", 1000, 1010, None),
        ("peak bytes", 1000, 1011, "REGRESSION"),
        ("peak bytes", 1000, 989, "IMPROVEMENT"),
        ("peak bytes", 0, 1, "REGRESSION"),
        ("peak bytes", 1000, None, "REGRESSION"),
        ("state bytes: digits", 1_000_000, 1_000_016, "REGRESSION"),  # far below a hundredth, and exact
        ("state bytes: digits", 1_000_000, 999_984, "IMPROVEMENT"),
        ("bytes left by 8 requests", 1_000_000, 1_000_001, "REGRESSION"),
        ("ops per row", None, 3, "new"),
    ],
)
def test_verdicts(name: str, base: int | None, head: int | None, verdict: str | None) -> None:
    def one(value: int | None) -> dict[str, int]:
        return {} if value is None else {name: value}

    assert [change.verdict for change in compare(one(head), one(base))] == ([] if verdict is None else [verdict])


def test_regressions_come_first() -> None:
    base, head = {"a": 1, "b": 2, "c": 3, "e": 4}, {"a": 0, "b": 3, "d": 1, "e": None}
    assert [(one.name, one.verdict) for one in compare(head, base)] == [
        ("b", "REGRESSION"), ("c", "REGRESSION"), ("e", "not measured"), ("a", "IMPROVEMENT"), ("d", "new"),
    ]  # fmt: skip


@pytest.mark.parametrize(("base", "head"), [(450, None), (None, 450), (None, None)])
def test_what_a_side_could_not_measure_is_neither_a_change_nor_none(base: int | None, head: int | None) -> None:
    name = "launches per row: model, batch 1"
    assert compare({name: head}, {name: base}) == [Change(name, base, head, "not measured")]
    assert compare({name: None}, {}) == [Change(name, None, None, "not measured")]
    assert compare({}, {name: None}) == [Change(name, None, None, "not measured")]


def test_a_baseline_is_of_one_key_and_of_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own = key(torch.device("cpu"))
    assert f"torch-{torch.__version__.partition('+')[0]}-diffusers-" in own
    assert own.endswith("-cpu")
    assert baseline(own) is None
    path = save(own, {"ops per row": 21, "launches per row": None})
    assert path == Path("reports", "baselines", f"{own}.json")
    assert baseline(own) == {"ops per row": 21, "launches per row": None}
    assert baseline(own.replace("-cpu", "-nvidia-h200")) is None


@pytest.mark.parametrize("text", ['{"ops": 1', "[1, 2]", '{"ops": "many"}'])
def test_a_baseline_that_is_none_is_refused_in_one_line(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save("broken", {}).write_text(text)
    with pytest.raises(ValueError, match=r"broken\.json: expected figures by name as JSON, got .*; write the") as error:
        baseline("broken")
    assert "\n" not in str(error.value)


@pytest.mark.cuda
def test_launches_nodes_and_real_peaks_twice(tiny_pipe: Any) -> None:
    try:
        first = figures(Workbench(tiny_pipe.to("cuda")))
        again = compare(figures(Workbench(tiny_pipe)), first)
    finally:
        tiny_pipe.to("cpu")
    assert [change for change in again if change.verdict != "not measured"] == []  # a profiler may lose a trace
    for n in gates.BATCHES:
        assert first[f"host syncs per row: model, batch {n}"] == 0
        peak_bytes = first[f"peak bytes of a row: model, batch {n}"]
        assert peak_bytes is not None
        assert peak_bytes > 0
        launches, nodes = (first[f"{name}: model, batch {n}"] for name in ("launches per row", "graph nodes"))
        if launches is not None and nodes is not None:
            assert launches >= nodes > 0
