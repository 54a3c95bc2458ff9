"""How long a run will take: as the newest report of the same work took, rather on this machine; else its limits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch

from fastdiff.bench import machine, schema
from fastdiff.bench.cells import Piece
from fastdiff.bench.journal import RUNS
from fastdiff.bench.schema import BadReport
from fastdiff.bench.suite import ImageCase, RowCase, Suite
from fastdiff.bench.summary import Report

REPORTS = Path("reports")  # the working directory's: those that are kept, and in RUNS every run


def lines(chosen: Suite, suite: str, model: str, device: str, pieces: Sequence[Piece]) -> list[str]:
    """A line per piece with its seconds, and what they are: measured before, or limits."""
    known = _newest(chosen, suite, model, device, [piece.title for piece in pieces])
    if known is not None:
        place, report = known
        seconds = report["seconds"]["pieces"]
        return [
            *(f"{seconds[piece.title]:6.0f} s  {piece.title}" for piece in pieces),
            f"{len(pieces)} pieces, about {sum(seconds[piece.title] for piece in pieces):.0f} s in all: what they took "
            f"in {place} of {report['created']}, on {machine.describe(report['machine'])}. Start-up comes on top.",
        ]
    timed = [piece.max_s for piece in pieces if piece.max_s is not None]
    return [
        *(f"{'' if piece.max_s is None else f'{piece.max_s:g} s':>8}  {piece.title}" for piece in pieces),
        f"{len(pieces)} pieces, at most {sum(timed):g} s of sampling in {len(timed)} of them. Warm-up, compilation and "
        f"the pieces without a clock come on top; {REPORTS}/ has no report of the same work that tells how long.",
    ]


def _newest(chosen: Suite, suite: str, model: str, device: str, titles: Sequence[str]) -> tuple[Path, Report] | None:
    """The report, and its folder, that has all these pieces and times of the same cases, rather of this machine."""
    here = _hardware(machine.fingerprint(torch.device(device)))
    found = [
        (place, report)
        for place, report in _reports()
        if (report["suite"], report["model"]["name"]) == (suite, model)
        and report["settings"]["device"].partition(":")[0] == device.partition(":")[0]
        and set(titles) <= report["seconds"]["pieces"].keys()
        and _same_cases(chosen, report)
    ]
    return max(found, key=lambda one: (_hardware(one[1]["machine"]) == here, one[1]["created"]), default=None)


def _hardware(known: Report) -> tuple[str, int, str | None]:
    """What a duration depends on most; a fingerprint changes with every package, too."""
    return known["cpu"], known["cpus_usable"], known["gpu"] and known["gpu"]["name"]


def _reports() -> Iterator[tuple[Path, Report]]:
    for path in chain(REPORTS.glob("*/report.json"), RUNS.glob("*/report.json")):
        try:
            report = schema.load(path)
        except BadReport:  # of an older form: no help here, and no hindrance
            continue
        if report["schema"] == schema.SCHEMA:
            yield path.parent, report


def _same_cases(chosen: Suite, report: Report) -> bool:
    """Whether those that the report has are still what the suite lists: overrides and edits change them."""
    cases: list[RowCase | ImageCase] = [*chosen.row, *chosen.image]
    listed = {case.name: schema.params(asdict(case)) for case in cases}
    measured = {case["name"]: schema.params(case) for case in (*report["rows"], *report["images"])}
    return bool(json.loads(json.dumps({name: listed.get(name) for name in measured})) == measured)
