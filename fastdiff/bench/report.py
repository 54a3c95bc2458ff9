"""A report's JSON -> its page in Markdown or on a terminal. Pure: the same JSON gives the same page."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from fastdiff.bench import outcome, terminal, words
from fastdiff.bench.machine import describe
from fastdiff.bench.summary import Report
from fastdiff.bench.tables import Table, meaning, ratio_text, tables, toy
from fastdiff.bench.words import dimensions, escape

STEP_SUMMARY_BYTES = 2**20 - 1  # GitHub refuses a longer one


def markdown(report: Report, limit: int = STEP_SUMMARY_BYTES) -> str:
    """The whole page in at most `limit` bytes: what CI takes as a step's summary."""
    parts = [f"# fastdiff.bench: {escape(report['suite'])}", verdict_list(report), *map(escape, introduction(report))]
    for table in tables(report):
        parts += [f"## {escape(table.title)}", *([escape(table.note)] if table.note else []), markdown_table(table)]
    return _cut("\n\n".join(parts) + "\n", limit)


def markdown_table(table: Table) -> str:
    """The bare table, as the README quotes it."""
    return words.table(table.header, table.rows)


def verdict_list(report: Report) -> str:
    """The verdict and what it rests on, as a Markdown list."""
    whole = outcome.outcome(report)
    lines = [f"**{whole.word}**: {escape(whole.sentence)}."]
    lines += [f"- {label}: {escape(text)}" for label, text in facts(report)]
    return "\n".join([lines[0], "", *lines[1:]])


def facts(report: Report) -> Iterator[tuple[str, str]]:
    """What the verdict rests on: label and one line each."""
    doubt = outcome.distrust(report)
    if step := outcome.headline(report):
        gain = f"{ratio_text(step['ratio'])} over {meaning(step['base'])}{toy(report)}"
        yield "Gain", f"INVALID: {gain}" if doubt else gain
    tally = outcome.tally(report)
    if tally:
        yield "Comparisons", ", ".join(f"{count} {word}" for word, count in tally.items())
    canaries = "; ".join(_canary(*one) for one in outcome.canaries(report)) or "none in this run"
    yield "Canaries", f"{canaries}. Amiss: {doubt}" if doubt else canaries
    yield "Deterministic figures", _gates(report)
    wrong = outcome.wrong_answers(report)
    arms = sum(len(case["arms"]) for case in (*report["images"], *report["rows"]))
    right = arms - sum(one.section in ("images", "rows") for one in wrong)
    answers = f"{right} of {arms} arms right" if arms else "no arm checked"
    others = [f"{one.case}, {one.arm}: {one.reason}" for one in wrong if one.section in ("fates", "errors")]
    yield "Answers", "; ".join([answers, *others])
    bounded = [target for target in report["summary"]["targets"] if target["met"] is not None]
    if bounded:
        missed = [target["label"] for target in bounded if not target["met"]]
        met = f"{len(bounded) - len(missed)} of {len(bounded)} met"
        yield "Targets", f"{met}; not: {'; '.join(missed)}" if missed else met
    if report["unsupported"]:
        yield "Not measured", "; ".join(one["what"] for one in report["unsupported"])


def _canary(label: str, judgement: Mapping[str, Any]) -> str:
    if judgement["change"] is None:
        return f"{label}: {judgement['verdict']}, {judgement['reason']}"
    word, interval = outcome.WORDS[judgement["verdict"]], f"[{judgement['low']:+.1%}, {judgement['high']:+.1%}]"
    return f"{label}: {word}, {judgement['change']:+.1%} {interval} in time"


def _gates(report: Report) -> str:
    """What became of the deterministic figures, in words."""
    gates = report.get("gates")
    if not gates:
        return "none in this run"
    missing = outcome.unmeasured(report)
    count = len(gates["figures"]) - len(missing)
    unknown = f"; not measured: {', '.join(missing)}" if missing else ""
    if gates.get("changes") is None:
        return f"{count} counted; no baseline for {gates['key']}{unknown}"
    return f"{count} compared with {gates['key']}; {outcome.moved(report)}{unknown}"


def introduction(report: Report) -> list[str]:
    """What was measured on what, in a few paragraphs of one line."""
    model, settings = report["model"], report["settings"]
    toy = "**A toy model**: ratios of a real one will differ. " if model["toy"] else ""
    return [
        f"{toy}Model: {model['name']}, {model['parameters']:,} parameters, latents "
        f"{dimensions(model['latent_shape'])}, {model['dtype']}, on {settings['device']}.",
        f"Machine: {describe(report['machine'])}.",
        f"{report['created']}, seed {settings['seed']}, {report['seconds']['all']:.0f} s, "
        f"{report['seconds']['compile']:.0f} s of it compiling: `{command(report)}`",
        f"Arms run turn by turn in random order; a ratio is the Hodges-Lehmann estimate of base / arm with its "
        f"{settings['level']:.0%} Wilcoxon interval; times are medians. Above 1 the arm is faster than its base.",
    ]


def command(report: Report) -> str:
    """The exact command."""
    return shlex.join(report["command"])


def print_tables(report: Report) -> None:
    """The same page on a terminal."""
    whole = outcome.outcome(report)
    terminal.say(f"{whole.word}: {whole.sentence}.", style="bold")
    for label, text in facts(report):
        terminal.say(f"  {label}: {text}")
    terminal.say()
    for paragraph in introduction(report):
        terminal.say(paragraph)
    for table in tables(report):
        terminal.say()
        terminal.show(table.title, table.header, table.rows, note=table.note)


def _cut(text: str, limit: int) -> str:
    """`text`, or as many of its lines as fit, and a line that says so."""
    encoded = text.encode()
    if len(encoded) <= limit:
        return text
    note = f"\n\nCut here: the whole page has {len(encoded):,} bytes, {limit:,} are allowed. report.json has it all.\n"
    kept = encoded[: max(0, limit - len(note.encode()))].rpartition(b"\n")[0]
    return kept.decode() + note
