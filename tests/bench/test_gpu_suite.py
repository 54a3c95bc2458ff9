"""bench/gpu.toml parses, what has no meaning is refused, and the tiny variant is the same cells in small."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.bench import gpu_suite
from fastdiff.bench.gpu import cells_of
from fastdiff.bench.gpu_cells import GRAPH_ARMS, MEASURES
from fastdiff.bench.gpu_settings import Settings
from fastdiff.bench.gpu_suite import ARMS, NEEDS, NULL_ARMS, TIERS, load, parse
from fastdiff.bench.suite import find
from fastdiff.models.geometries import GEOMETRIES
from fastdiff.stages import scheduler_class

DOCUMENT: dict[str, Any] = tomllib.loads(find("gpu").read_text(encoding="utf-8"))


def test_the_suite_that_ships_names_samplers_arms_and_cells_that_there_are() -> None:
    suite = load()
    samplers = {*suite.null_model.samplers, *(name for one in suite.ownership for name in one.samplers)}
    samplers |= {cell.sampler for cell in suite.cell if cell.sampler}
    assert all(scheduler_class(name) for name in samplers)
    assert {cell.tier for cell in suite.cell} == set(TIERS)
    assert {cell.measure for cell in suite.cell} == MEASURES.keys() == NEEDS.keys()
    assert set(GRAPH_ARMS) < set(suite.rows.arms) & set(suite.null_model.arms)
    assert (set(suite.rows.arms), set(suite.null_model.arms)) == (set(ARMS), set(NULL_ARMS))


def test_tiny_has_the_same_cells_at_toy_geometries() -> None:
    suite, tiny = load(), load().tiny()
    assert [cell.name for cell in tiny.cell] == [cell.name for cell in suite.cell]
    for cell, small in zip(suite.cell, tiny.cell, strict=True):
        assert small.geometry == (f"tiny-{cell.geometry}" if cell.geometry else None)
        assert small.geometry in (None, *GEOMETRIES)
    assert tiny.max_pairs < suite.max_pairs
    assert tiny.null_model.samplers == suite.null_model.samplers
    assert tiny.ownership == suite.ownership


NULL_MODEL, ROWS = DOCUMENT["null_model"], DOCUMENT["rows"]
CELL = {"tier": "A", "name": "c", "measure": "rows", "geometry": "sd15-512", "batch": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 1}, "the file: unknown key 'budget'"),
        ({"null_model": {"samplers": []}}, r"\[null_model\]: missing key 'latent_shape'"),
        ({"null_model": {**NULL_MODEL, "arms": ["cloned"]}}, "null_model: expected arms of shared, .*, got 'cloned'"),
        ({"rows": {**ROWS, "arms": ["shared"]}}, "rows: expected arms of cloned-deepcopy/eager, .*, got 'shared'"),
        ({"rows": {**ROWS, "arms": ["model/graph"]}}, "rows: compare: expected arms of model/graph, got"),
        ({"rows": 3}, r"^\[rows\]: expected a table, got 3$"),
        ({"cell": [CELL, CELL]}, "two cells have the name 'c'"),
        ({"cell": [{**CELL, "tier": "D"}]}, "c: expected a tier of A, B, C, got 'D'"),
        ({"cell": [{**CELL, "measure": "row"}]}, "c: expected a measure of tests, .*, got 'row'"),
        ({"cell": [{**CELL, "batches": [1]}]}, r"\[\[cell\]\]: unknown key 'batches'"),
        ({"cell": [{**CELL, "geometry": "sd15"}]}, "c: expected a geometry of .*sd15-512.*, got 'sd15'"),
        ({"cell": [{**CELL, "compile": "none"}]}, "c: expected to compile default or max-autotune-.*, got 'none'"),
        ({"cell": [{**CELL, "measure": "graphs"}]}, "c: expected the keys geometry for 'graphs', got batch, geometry"),
        ({"cell": [{**CELL, "max_s": 0}]}, "c: expected max_s > 0, got 0"),
        ({"cell": [{**CELL, "steps": 0}]}, "c: expected steps >= 1, got 0"),
        (
            {"cell": [{"tier": "A", "name": "c", "measure": "rows"}]},
            "c: expected the keys batch, geometry .*, got none",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(changes: dict[str, Any], message: str) -> None:
    parse(DOCUMENT)
    with pytest.raises(ValueError, match=message):
        parse({**DOCUMENT, **changes})


def test_what_the_file_leaves_out_is_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arms = ["cloned-deepcopy", "tensorized/eager"]
    null_model = {**NULL_MODEL, "samplers": ["Euler"], "arms": arms}
    cells = [{"tier": "B", "name": "mine", "measure": "null model", "batch": 1}]
    own = parse({**DOCUMENT, "null_model": null_model, "cell": cells})
    monkeypatch.setattr(gpu_suite, "load", lambda: own)
    (cell,) = cells_of(TIERS, Settings(torch.device("cpu"), True, tmp_path))
    assert (cell.tier, cell.name) == ("B", "mine")
    with torch.no_grad():
        rows = [entry for entry in cell.measure() if entry["kind"] == "rows"]
    assert [entry["samplers"] for entry in rows] == [["Euler"]]
    assert rows[0]["arms"].keys() == {"cloned-deepcopy", "tensorized/eager"}
    assert rows[0]["pairs"] == [["cloned-deepcopy", "tensorized/eager"]]
