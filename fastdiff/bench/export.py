"""`python -m fastdiff.bench report`: a report as a page, Markdown, JUnit or CSV; a folder of reports as its index."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fastdiff.bench import outcome, schema
from fastdiff.bench.arguments import refuse
from fastdiff.bench.report import escape, markdown, print_tables, ratio_text
from fastdiff.bench.suite import split
from fastdiff.bench.summary import Report, unit_s


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE and where to write what is made of it."""
    parser.add_argument("file", type=Path, metavar="FILE", help="report.json, a folder with one, or a folder of those")
    parser.add_argument("--html", type=Path, metavar="F", help="write the page")
    parser.add_argument("--markdown", type=Path, metavar="F", help="write Markdown; of a folder of reports, its index")
    parser.add_argument("--junit", type=Path, metavar="F", help="write JUnit XML, one testcase per case")
    parser.add_argument("--csv", type=Path, metavar="F", help="write CSV, one row per case and arm")


def main(options: argparse.Namespace) -> int:
    """Write what is asked for; without any of it, print the tables. 0: a verdict is the measuring command's to give."""
    from fastdiff.bench.page import html  # jinja2 and pandas are of the bench extra

    forms = {"html": html, "markdown": markdown, "junit": junit, "csv": csv}
    wanted = {name: path for name in forms if (path := getattr(options, name)) is not None}
    try:
        if options.file.is_dir() and not (options.file / "report.json").exists():
            if set(wanted) != {"markdown"}:
                refuse(f"{options.file} is a folder of reports: expected --markdown, for its index, and nothing else")
            texts = {"markdown": index(options.file)}
        else:
            report = schema.load(options.file)
            if report["schema"] != schema.SCHEMA:
                refuse(f"{options.file}: expected a report of fastdiff.bench, got one of {report['schema']}")
            texts = {name: forms[name](report) for name in wanted}
    except schema.BadReport as error:
        refuse(str(error))
    for name, path in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts[name], encoding="utf-8")
    if not wanted:
        print_tables(report)
    return 0


def junit(report: Report) -> str:
    """A testcase per case, per deterministic figure that changed, and for the canaries.

    A wrong answer, a figure that got worse and a canary that misbehaved are failures. What could not run, and a case
    none of whose comparisons came to a conclusion, is skipped. An arm slower than another is a result, no failure.
    """
    suite = ElementTree.Element("testsuite", name=f"fastdiff.bench: {report['suite']}")
    compared = list(outcome.comparisons(report))
    wrong = outcome.wrong_answers(report)
    for case in (*report["images"], *report["rows"]):
        own = [one for one in compared if one.case is case]
        failed = [f"{arm}: {reason}" for other, arm, reason in wrong if other is case]
        verdicts = {one.judgement.verdict for one in own}
        seconds = sum(sum(arm["total_s"]) for arm in case["arms"].values())
        node = _testcase(suite, "images" if "workload" in case else "rows", case["name"], seconds)
        if failed:
            _outcome(node, "failure", "INVALID", "; ".join(failed))
        elif own and verdicts <= {"INCONCLUSIVE", "INVALID"}:
            kind = "INVALID" if "INVALID" in verdicts else "INCONCLUSIVE"
            _outcome(node, "skipped", kind, "; ".join({one.judgement.reason: None for one in own}))
        text = "\n".join(f"{one.arm} against {one.base}: {ratio_text(one.ratio)}, {one.word}" for one in own)
        ElementTree.SubElement(node, "system-out").text = _legal(text)
    for one in report["unsupported"]:
        _outcome(_testcase(suite, "pieces", one["what"]), "skipped", "unsupported", one["reason"])
    for change in outcome.changes(report):
        node = _testcase(suite, "figures", change["name"])
        if change["verdict"] == "REGRESSION":
            _outcome(node, "failure", "REGRESSION", f"{change['base']} -> {change['head']}")
        elif change["verdict"] == "not measured":
            _outcome(node, "skipped", "not measured", f"{change['base']} -> {change['head']}")
    for sampler in outcome.not_finite(report):
        _outcome(_testcase(suite, "errors", sampler), "failure", "INVALID", "infinities or NaN against float64")
    without = outcome.unvouched(report)
    if outcome.canaries(report) or without:
        node = _testcase(suite, "instrument", "canaries")
        if doubt := outcome.distrust(report):
            _outcome(node, "failure", "INVALID", doubt)
        elif without:
            _outcome(node, "skipped", "unvouched", without)
    for kind, plural in (("failure", "failures"), ("skipped", "skipped")):
        suite.set(plural, str(len(suite.findall(f"testcase/{kind}"))))
    suite.set("tests", str(len(suite.findall("testcase"))))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def csv(report: Report) -> str:
    """A row per case and arm. The ratio is over the first base that the case compares the arm with."""
    import pandas

    text: str = pandas.DataFrame(list(_arms(report)), columns=_COLUMNS).to_csv(index=False)
    return text


_COLUMNS = (
    "created", "machine", "model", "kind", "case", "samplers", "batch", "ownership", "mode", "status", "error",
    "samples", "seconds_per_unit", "unit", "base", "ratio", "low", "high", "verdict", "vram_peak_bytes",
)  # fmt: skip


def _arms(report: Report) -> Iterator[dict[str, Any]]:
    known = {"created": report["created"], "machine": report["machine"]["id"], "model": report["model"]["name"]}
    compared = list(outcome.comparisons(report))
    for case in (*report["images"], *report["rows"]):
        kind, unit = ("images", "image") if "workload" in case else ("rows", "row of the batch")
        for arm, measured in case["arms"].items():
            ownership, mode = split(arm)
            one = next((one for one in compared if one.case is case and one.arm == arm), None)
            ratio = (one.ratio if one else None) or {}
            yield {
                **known, "kind": kind, "case": case["name"], "samplers": " ".join(case["samplers"]),
                "batch": case["batch"], "ownership": ownership, "mode": mode, "status": measured["status"],
                "error": measured["error"], "samples": len(measured["total_s"]), "seconds_per_unit": unit_s(case, arm),
                "unit": unit, "base": one.base if one else None, "ratio": ratio.get("value"), "low": ratio.get("low"),
                "high": ratio.get("high"), "verdict": one.judgement.verdict if one else None,
                "vram_peak_bytes": measured.get("vram_peak_bytes"),
            }  # fmt: skip


def index(folder: Path) -> str:
    """What a folder of reports says, newest first: its README. BadReport where one of them is none."""
    reports = [(path.parent, schema.load(path)) for path in folder.glob("*/report.json")]
    reports.sort(key=lambda one: one[1]["created"], reverse=True)
    header = ["report", "machine", "date", "suite", "all that was gained", "verdict", "comparisons"]
    rows = (header, ["---"] * len(header), *(_index_row(*one) for one in reports))
    parts = [
        "# Reports",
        "Written by `python -m fastdiff.bench report reports --markdown reports/README.md`. Times of another machine "
        "are incomparable.",
        "\n".join("| " + " | ".join(cells) + " |" for cells in rows),
    ]
    if baselines := sorted((folder / "baselines").glob("*.json")):
        keys = "\n".join(f"- [{path.stem}](baselines/{path.name})" for path in baselines)
        parts += ["Baselines of the deterministic figures, by what they depend on:", keys]
    if (folder / "NOTES.md").exists():
        parts.append("[NOTES.md](NOTES.md) reads them.")
    return "\n\n".join(parts) + "\n"


def _index_row(place: Path, report: Report) -> list[str]:
    page = f", [page]({place.name}/report.html)" if (place / "report.html").exists() else ""
    machine = report["machine"]
    device = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {machine['cpus_usable']} CPUs"
    step = outcome.headline(report)
    gain = ratio_text(step["ratio"]) + (", toy model" if report["model"]["toy"] else "") if step else ""
    return [
        f"[{place.name}]({place.name}/report.md){page}",
        escape(f"{device} ({machine['id']}), torch {machine['packages']['torch']}"),
        report["created"][:10],
        escape(report["suite"]),
        gain,
        outcome.outcome(report).word,
        ", ".join(f"{count} {word}" for word, count in outcome.tally(report).items()),
    ]


def _testcase(suite: ElementTree.Element, kind: str, name: str, seconds: float = 0.0) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=kind, name=_legal(name), time=f"{seconds:.3f}")


def _outcome(node: ElementTree.Element, tag: str, kind: str, message: str) -> None:
    ElementTree.SubElement(node, tag, type=kind, message=_legal(f"{kind}: {message}"))


def _legal(text: str) -> str:
    """Without the characters that XML has no way to write."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)
