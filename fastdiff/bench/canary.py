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
from fastdiff.bench.rows import null_model
from fastdiff.bench.stats import pairs_needed
from fastdiff.bench.verdict import judge, judge_processes
from fastdiff.capture import Steps
from fastdiff.plan import CapturePlan
from fastdiff.slots import Slots
from fastdiff.state import RequestState

BLOCK_S = 0.02  # long enough for a clock, and for a GPU to keep its own
BASE, SAME, SLOWER = "base", "the same", "a tenth more"
COMPARISONS = ((BASE, SAME), (BASE, SLOWER))
PROCESSES = {"a_a": "the same work in both", "slower_10_percent": "a tenth more work in the head"}
"""What `ab` has its pairs of processes do."""


def blocks(bench: Workbench) -> dict[str, Block]:
    """The arms by name; blocks of a multiple of ten rows, so that a tenth more is exactly that."""
    steps = {name: _steps(bench) for name in (BASE, SAME, SLOWER)}
    tens = math.ceil(BLOCK_S / _block(bench, steps[BASE], 10)().total_s)
    return {name: _block(bench, one, (11 if name == SLOWER else 10) * tens) for name, one in steps.items()}


def judged(total_s: Mapping[str, Sequence[float]], level: float) -> dict[str, Any]:
    """The report's "canaries": both judgements, and why no time of the run counts, empty where nothing is amiss."""
    least = pairs_needed(level)
    same, slower = (judge(total_s[base], total_s[head], level=level, least_pairs=least) for base, head in COMPARISONS)
    amiss = []
    if same.verdict not in ("NO-CHANGE", "INCONCLUSIVE"):
        amiss.append(f"the same work twice was judged {same.verdict}")
    if slower.verdict != "REGRESSION":
        amiss.append(f"a tenth more work was judged {slower.verdict}")
    return {
        "a_a": asdict(same), "slower_10_percent": asdict(slower), "doubt": "; ".join(amiss),
        "total_s": {name: list(times) for name, times in total_s.items()},
    }  # fmt: skip


def judged_processes(log_ratios: Mapping[str, Sequence[float]], *, delta: float, margin: float) -> dict[str, Any]:
    """The same of a comparison in pairs of processes, from ln(head / base) of each pair by canary.

    Too noisy a canary is none that failed: a machine where it is INCONCLUSIVE leaves its cases INCONCLUSIVE too.
    """
    found = {name: judge_processes(values, delta=delta, margin=margin) for name, values in log_ratios.items()}
    amiss = [
        f"{PROCESSES[name]} was judged {one.verdict}"
        for name, one in found.items()
        if one.verdict not in (("NO-CHANGE" if name == "a_a" else "REGRESSION"), "INCONCLUSIVE")
    ]
    return {
        "doubt": "; ".join(amiss),
        **{name: {"judgement": asdict(one), "log_ratios": list(log_ratios[name])} for name, one in found.items()},
    }


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
