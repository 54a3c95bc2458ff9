"""`python -m fastdiff.bench report`: a report as a page, Markdown, JUnit or CSV; a folder of reports as its index."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fastdiff.bench import files, outcome, schema, terminal, words
from fastdiff.bench.arguments import refuse
from fastdiff.bench.report import markdown, print_tables
from fastdiff.bench.suite import split
from fastdiff.bench.summary import Report, section, unit_s
from fastdiff.bench.tables import ratio_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """FILE and where to write what is made of it."""
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="report.json, ab.json, a folder with one, or a folder of those"
    )
    parser.add_argument("--html", type=Path, metavar="F", help="write the page")
    parser.add_argument("--markdown", type=Path, metavar="F", help="write Markdown; of a folder of reports, its index")
    parser.add_argument(
        "--junit", type=Path, metavar="F", help="write JUnit XML, one testcase per case; of ab.json, too"
    )
    parser.add_argument("--csv", type=Path, metavar="F", help="write CSV, one row per case and arm")


def main(options: argparse.Namespace) -> int:
    """Write what is asked for; without any of it, print the tables. 0: a verdict is the measuring command's to give."""
    from fastdiff.bench.page import html  # jinja2 and pandas are of the bench extra

    forms: dict[str, Callable[[Report], str]] = {"html": html, "markdown": markdown, "junit": junit, "csv": csv}
    wanted = {name: path for name in forms if (path := getattr(options, name)) is not None}
    try:
        if options.file.is_dir() and not any((options.file / name).exists() for name in schema.NAMES):
            if set(wanted) != {"markdown"}:
                refuse(f"{options.file} is a folder of reports: expected --markdown, for its index, and nothing else")
            texts = {"markdown": index(options.file)}
        else:
            report = schema.load(options.file)
            if report["schema"] == schema.AB:
                if set(wanted) != {"junit"}:
                    refuse(f"{options.file} is of ab: expected --junit and nothing else; ab.md beside it is its page")
                forms = {"junit": junit_of_pair}
            else:
                _check(report, options.file)
            texts = {name: forms[name](report) for name in wanted}
    except schema.BadReport as error:
        refuse(str(error))
    for name, path in wanted.items():
        files.write(path, texts[name])
    if not wanted:
        terminal.require_rich()
        print_tables(report)
    return 0


def _check(report: Report, path: Path) -> Report:
    """BadReport unless it is a run's."""
    if report["schema"] != schema.SCHEMA:
        raise schema.BadReport(f"{path}: expected a report of fastdiff.bench, got one of {report['schema']}")
    return report


def junit(report: Report) -> str:
    """A testcase per case, per deterministic figure that changed, and for the canaries.

    A wrong answer, a figure that got worse and a canary that misbehaved are failures, what could not be measured is an
    error. A case none of whose comparisons came to a conclusion is skipped. An arm slower than another is a result.
    """
    suite = ElementTree.Element("testsuite", name=_legal(f"fastdiff.bench: {report['suite']}"))
    compared = list(outcome.comparisons(report))
    wrong = outcome.wrong_answers(report)
    for case in (*report["images"], *report["rows"]):
        own = [one for one in compared if one.case is case]
        kind = section(case)
        failed = [f"{one.arm}: {one.reason}" for one in wrong if (one.section, one.case) == (kind, case["name"])]
        verdicts = {one.judgement.verdict for one in own}
        seconds = sum(sum(arm["total_s"]) for arm in case["arms"].values())
        node = _testcase(suite, kind, case["name"], seconds)
        if failed:
            _outcome(node, "failure", "INVALID", "; ".join(failed))
        elif own and verdicts <= {"INCONCLUSIVE", "INVALID"}:
            worst = "INVALID" if "INVALID" in verdicts else "INCONCLUSIVE"
            _outcome(node, "skipped", worst, "; ".join({one.judgement.reason: None for one in own}))
        text = "\n".join(f"{one.arm} against {one.base}: {ratio_text(one.ratio)}, {one.word}" for one in own)
        ElementTree.SubElement(node, "system-out").text = _legal(text)
    for one in wrong:
        if one.section in ("fates", "errors"):
            _outcome(_testcase(suite, one.section, f"{one.case}, {one.arm}"), "failure", "INVALID", one.reason)
    for piece in report["unsupported"]:
        _outcome(_testcase(suite, "pieces", piece["what"]), "error", "unsupported", piece["reason"])
    _figures(suite, outcome.changes(report), accepted=outcome.accepted(report))
    without = outcome.unvouched(report)
    if outcome.canaries(report) or without:
        node = _testcase(suite, "instrument", "canaries")
        if doubt := outcome.distrust(report):
            _outcome(node, "failure", "INVALID", doubt)
        elif without:
            _outcome(node, "skipped", "unvouched", without)
    return _written(suite)


def junit_of_pair(report: Report) -> str:
    """A testcase per result, time and changed figure of `ab`'s two revisions, and for its canaries.

    A wrong result, a slower case, a figure that got worse and a time that is not to be believed are failures, what
    could not be measured is an error, an inconclusive time is skipped. A slower case names the figures it grew.
    """
    suite = ElementTree.Element("testsuite", name="fastdiff.bench: ab")
    for name, one in report["results"].items():
        node = _testcase(suite, "results", name)
        if not one["right"]:
            _outcome(node, "failure", "INVALID", one["reason"] or "")
    for name, reason in report["failed"].items():
        _outcome(_testcase(suite, "cases", name), "error", "not measured", reason)
    _figures(suite, report["changes"])
    for name, one in report["times"].items():
        judgement, node = one["judgement"], _testcase(suite, "times", name)
        if judgement["verdict"] == "REGRESSION":
            interval = f"{judgement['change']:+.1%} [{judgement['low']:+.1%}, {judgement['high']:+.1%}]"
            moved = [_moved(change) for change in report["changes"] if change["name"].endswith(f": {name}")]
            _outcome(node, "failure", "REGRESSION", "; ".join([interval, *moved]))
        elif judgement["verdict"] == "INVALID":
            _outcome(node, "failure", "INVALID", judgement["reason"])
        elif judgement["verdict"] == "INCONCLUSIVE":
            _outcome(node, "skipped", "INCONCLUSIVE", judgement["reason"])
    if known := report["canaries"]:
        node = _testcase(suite, "instrument", "canaries")
        if known["doubt"]:
            _outcome(node, "failure", "INVALID", known["doubt"])
    return _written(suite)


def _figures(suite: ElementTree.Element, changes: Sequence[Report], accepted: bool = False) -> None:
    for change in changes:
        node = _testcase(suite, "figures", change["name"])
        if change["verdict"] == "REGRESSION" and not accepted:
            _outcome(node, "failure", "REGRESSION", f"{change['base']} -> {change['head']}")
        elif change["verdict"] == "not measured":
            tag = "error" if change["head"] is None else "skipped"  # the baseline's lack is not this run's
            _outcome(node, tag, "not measured", f"{change['base']} -> {change['head']}")


def _moved(change: Report) -> str:
    return f"{change['name']} {words.number(change['base'])} -> {words.number(change['head'])}"


def _written(suite: ElementTree.Element) -> str:
    """The suite with its sums, as a document."""
    for kind, plural in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
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
        unit = "image" if section(case) == "images" else "row of the batch"
        for arm, measured in case["arms"].items():
            ownership, mode = split(arm)
            one = next((one for one in compared if one.case is case and one.arm == arm), None)
            ratio = (one.ratio if one else None) or {}
            yield {
                **known, "kind": section(case), "case": case["name"], "samplers": " ".join(case["samplers"]),
                "batch": case["batch"], "ownership": ownership, "mode": mode, "status": measured["status"],
                "error": measured["error"], "samples": len(measured["total_s"]), "seconds_per_unit": unit_s(case, arm),
                "unit": unit, "base": one.base if one else None, "ratio": ratio.get("value"), "low": ratio.get("low"),
                "high": ratio.get("high"), "verdict": one.judgement.verdict if one else None,
                "vram_peak_bytes": measured.get("vram_peak_bytes"),
            }  # fmt: skip


def index(folder: Path) -> str:
    """What a folder of reports says, newest first: its README. BadReport where one of them is none."""
    reports = [(path.parent, _check(schema.load(path), path)) for path in folder.glob("*/report.json")]
    reports.sort(key=lambda one: one[1]["created"], reverse=True)
    header = ("report", "machine", "date", "suite", "all that was gained", "verdict", "comparisons")
    rows = [_index_row(*one) for one in reports]
    parts = [
        "# Reports",
        "Written by `python -m fastdiff.bench report reports --markdown reports/README.md`. Times of another machine "
        "are incomparable.",
        words.table(header, rows, words=range(len(header))),
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
        f"{device} ({machine['id']}), torch {machine['packages']['torch']}",
        report["created"][:10],
        report["suite"],
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
