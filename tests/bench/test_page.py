"""The page of the committed reports and of worse ones: what it says, what it must not load, how Chromium shows it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastdiff.bench import schema
from fastdiff.bench.outcome import exit_code, outcome
from fastdiff.bench.page import Axis, emphasis, html, strip
from fastdiff.bench.report import markdown
from tests.bench.browser import CHROMIUM, Browser
from tests.bench.reports import COMMITTED, bare, baseline_moved, committed, doubtful, hostile, wrong

SECTIONS = ("verdict", "attribution", "arms", "forest", "time", "memory", "start-up", "parity", "trust")


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="([^"]+)"', page)


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: str(folder.name))
def test_the_committed_reports_have_every_section_in_order(folder: Path) -> None:
    report = schema.load(folder)
    page = html(report)
    assert [name for name in sections(page) if name != "changes"] == list(SECTIONS)
    assert page == html(schema.load(folder))
    assert len(page.encode()) < 2**20
    assert page.count("toy model") >= 2
    for step in report["summary"]["no_gain"]:
        assert str(emphasis(step["label"])) in page  # what fastdiff loses is shown like what it wins
    assert page.count('<tr class="slower">') >= 1


def test_it_loads_nothing_and_runs_nothing() -> None:
    page = html(schema.load(COMMITTED[0]))
    assert "default-src 'none'" in page
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\(|https?://", page)


def test_hostile_names_stay_text() -> None:
    page = html(hostile())
    assert "<script" not in page
    assert "<img" not in page
    assert "onerror=alert(1)&gt;" in page
    assert "49" not in page[page.index("<title>") : page.index("</title>")]  # {{ 7*7 }} is no template
    assert "&lt;/table&gt;" in page


def test_a_change_of_the_deterministic_figures_is_named() -> None:
    page = html(baseline_moved())
    assert sections(page)[:3] == ["verdict", "attribution", "changes"]
    changes = page[page.index('<section id="changes"') : page.index('<section id="arms"')]
    for text in ("launches per row: mixed, batch 8", "412", "438", "+6.3%", "<strong>REGRESSION</strong>"):
        assert text in changes
    assert '<section id="verdict" class="alarm">' in page


def test_a_run_whose_canary_died_has_no_verdict_on_time() -> None:
    page = html(doubtful())
    assert "<h1>INVALID</h1>" in page
    assert page.count('<td class="word">invalid</td>') == page.count('<td class="word">')
    assert "a tenth more work was judged NO-CHANGE" in page


def test_wrong_answers_everywhere_and_nothing_at_all_both_render() -> None:
    page = html(wrong())
    assert "<h1>INVALID</h1>" in page
    assert "no valid pair" in page
    assert sections(html(bare())) == ["verdict", "trust"]
    for report in (wrong(), bare()):
        assert outcome(report).word in markdown(report)


def test_an_axis_has_room_for_estimates_and_cuts_wild_intervals() -> None:
    narrow = {"value": 1.2, "low": 1.1, "high": 1.3}
    wild = {"value": 0.5, "low": 0.01, "high": 40.0}
    axis = Axis.around([narrow, wild])
    assert axis.low < 0.5
    assert axis.high > 1.3
    drawn = strip(wild, axis)
    assert drawn is not None
    assert (drawn.low, drawn.high) == (0, 100)
    assert (drawn.cut_low, drawn.cut_high) == (True, True)
    inside = strip(narrow, axis)
    assert inside is not None
    assert 0 < inside.low < inside.value < inside.high < 100
    assert (inside.cut_low, inside.cut_high) == (False, False)
    assert strip(None, axis) is None


@pytest.mark.parametrize("most", [1.0, 1.5, 6.0, 80.0, 3000.0])
def test_an_axis_has_few_ticks_and_one_at_one(most: float) -> None:
    axis = Axis.around([{"value": most, "low": most, "high": most}])
    assert 1 <= len(axis.ticks) <= 7
    assert (axis.at(1.0), "1") in axis.ticks
    left, width = axis.band
    assert left < axis.at(1.0) < left + width


def test_emphasis_escapes_first() -> None:
    assert emphasis("**<b>** and *x* & 2*3*4 `y`") == (
        "<strong>&lt;b&gt;</strong> and <em>x</em> &amp; 2*3*4 <code>y</code>"
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium, and none is installed: apt-get install chromium")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


REPORTS: dict[str, Any] = {"committed": lambda: schema.load(COMMITTED[0]), "hostile": hostile, "bare": bare}
WIDTHS = (1280, 400)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", REPORTS)
def test_chromium_shows_it(name: str, width: int, browser: Browser, tmp_path: Path) -> None:
    report, file = REPORTS[name](), tmp_path / "report.html"
    file.write_text(html(report), encoding="utf-8")
    browser.open(file, width, dark=width == WIDTHS[1])
    requested = [one["request"]["url"] for one in browser.named("Network.requestWillBeSent")]
    assert requested == [file.as_uri()]
    for trouble in (
        "Runtime.consoleAPICalled",
        "Runtime.exceptionThrown",
        "Log.entryAdded",
        "Page.javascriptDialogOpening",
    ):
        assert browser.named(trouble) == []
    browser.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")  # only tables scroll sideways
    hidden = browser.evaluate(
        "[...document.querySelectorAll('h1, h2, #verdict dd, .draw circle, .dots path, pre')].filter(one => {"
        "const box = one.getBoundingClientRect(); return Math.max(box.width, box.height) < 3}).length"
    )
    assert hidden == 0
    assert browser.evaluate("document.querySelector('h1').textContent") == outcome(report).word
    assert browser.evaluate("document.querySelectorAll('script, img, link').length") == 0
    circles = sum(len(case["comparisons"]) for case in (*report["images"], *report["rows"]))
    assert browser.evaluate("document.querySelectorAll('#forest circle').length") == circles


def test_chromium_follows_the_readers_colours(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(html(schema.load(COMMITTED[0])), encoding="utf-8")
    for dark in (False, True):
        browser.open(file, 1280, dark=dark)
        for query in ("body", "#verdict dt", ".faster .word", ".slower .word"):
            assert contrast(browser, query) >= 4.5, query  # WCAG AA
        light = luminance(browser.evaluate("getComputedStyle(document.body).backgroundColor")) > 0.5
        assert light is not dark


def contrast(browser: Browser, query: str) -> float:
    ink = luminance(browser.evaluate(f"getComputedStyle(document.querySelector({query!r})).color"))
    paper = luminance(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    return (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)


def luminance(colour: str) -> float:
    """WCAG's, of Chromium's "rgb(r, g, b)"."""
    channels = [int(digits) / 255 for digits in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_an_owner_that_isolates_and_lets_a_request_go_wrong_is_invalid() -> None:
    report = committed()
    assert exit_code(report) == 0
    fate = next(one for one in report["fates"] if one["arm"] == "cloned-deepcopy")
    fate["fates"][0]["fate"] = "silently wrong"
    assert outcome(report).word == "INVALID"
    assert exit_code(report) == 3
    fate["fates"][0]["fate"] = "right"
    racing = next(one for one in report["fates"] if one["arm"] == "shared-racing")
    racing["fates"][0]["fate"] = "silently wrong"  # what it is there to show
    assert exit_code(report) == 0
