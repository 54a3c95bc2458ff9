"""Two comparisons whose outcome is known, in every run: the same work twice, and a tenth more of it.

If the run's own clock finds a change in the first or misses that of the second, no other time of the run is to be
believed. The work is real: rows of the step around a null model, on slots and a step that each arm builds anew; between
two revisions, whose steps may differ on purpose, a row's worth of torch operations in the process of either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

import fastdiff
from fastdiff.bench.arms import Workbench
from fastdiff.bench.measure import Block, Sample
from fastdiff.bench.outcome import CANARIES
from fastdiff.bench.rows import null_model
from fastdiff.bench.stats import pairs_needed
from fastdiff.bench.verdict import Judgement, judge
from fastdiff.capture import Steps
from fastdiff.plan import CapturePlan
from fastdiff.slots import Slots
from fastdiff.state import RequestState

BLOCK_S = 0.02  # long enough for a clock, and for a GPU to keep its own
BASE, SAME, SLOWER = "base", "the same", "a tenth more"
COMPARISONS = ((BASE, SAME), (BASE, SLOWER))
ROWS = {"a_a": {"base": 10, "head": 10}, "slower_10_percent": {"base": 10, "head": 11}}
"""What `ab` has either side of a pair of processes do, as many times over as make a block."""


def blocks(bench: Workbench) -> dict[str, Block]:
    """The arms by name; blocks of a multiple of ten rows, so that a tenth more is exactly that."""
    steps = {name: _steps(bench) for name in (BASE, SAME, SLOWER)}
    tens = math.ceil(BLOCK_S / _block(bench, steps[BASE], 10)().total_s)
    return {name: _block(bench, one, (11 if name == SLOWER else 10) * tens) for name, one in steps.items()}


def judged(total_s: Mapping[str, Sequence[float]], level: float) -> dict[str, Any]:
    """The report's "canaries": both judgements, and why no time of the run counts, empty where nothing is amiss."""
    least = pairs_needed(level)
    same, slower = (judge(total_s[base], total_s[head], level=level, least_pairs=least) for base, head in COMPARISONS)
    return {
        "a_a": asdict(same), "slower_10_percent": asdict(slower), "doubt": doubt(same, slower),
        "total_s": {name: list(times) for name, times in total_s.items()},
    }  # fmt: skip


def doubt(same: Judgement, slower: Judgement) -> str:
    """Why no time beside these two counts, empty where nothing is amiss: the one rule, for whatever clocked them.

    The same work must not be found to have changed; an interval too wide to prove that it did not leaves the other
    cases undecided by itself. A tenth more must be found: where it is missed, so would be a case that is a tenth
    slower, and "no change" says nothing.
    """
    amiss = []
    if same.verdict not in ("NO-CHANGE", "INCONCLUSIVE"):
        amiss.append(f"{CANARIES['a_a']} was judged {same.verdict}")
    if slower.verdict != "REGRESSION":
        amiss.append(f"{CANARIES['slower_10_percent']} was judged {slower.verdict}")
    return "; ".join(amiss)


def _steps(bench: Workbench) -> Steps:
    """A step over one slot that holds a request. Spent rows cost what others do, so the slot is never loaded again."""
    family = bench.family
    table = fastdiff.tabulate(bench.template("DDIM"), 10)
    plan = CapturePlan(latent_shape=family.latent_shape, dtype=torch.float32, batch_sizes=(1,))
    slots = Slots(plan, bench.device)
    latents = table.init(torch.zeros(family.latent_shape, device=bench.device))
    slots.load(0, RequestState(request=None, table=table, latents=latents))
    steps = Steps(null_model, slots)
    with torch.no_grad():
        steps(1)  # makes it
    return steps


def _block(bench: Workbench, steps: Steps, rows: int) -> Block:
    def block() -> Sample:
        watch = bench.stopwatch()
        with torch.no_grad(), watch:
            for _ in range(rows):
                steps(1)
        return Sample(watch.seconds)

    return block
