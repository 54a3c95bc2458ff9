"""JSON that does not fit is named by its first place; JSON that fits by nothing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, Literal, NotRequired

import pytest
from typing_extensions import TypedDict

from fastdiff.bench.forms import Arm, Judgement, Number, Pair, Positive, Times
from fastdiff.bench.shape import misfit


class Form(TypedDict):
    name: str
    times: Times
    more: NotRequired[dict[str, Pair] | None]
    kind: Literal["a", "b"]


FITS = {"name": "x", "times": [1, 0.5], "kind": "b", "and": "what nobody reads"}
RIGHT = {"status": "ok", "reason": None, "error": 0, "total_s": [1], "loop_s": []}
WRONG = {**RIGHT, "status": "INVALID", "reason": "why"}
JUDGED = {"verdict": "INVALID", "change": 0.1, "low": 0, "high": 0.2, "pairs": 20, "reason": "why"}


@pytest.mark.parametrize("more", [{}, {"more": None}, {"more": {}}, {"more": {"y": ["z", "z"]}}])
def test_what_fits(more: dict[str, Any]) -> None:
    assert misfit({**FITS, **more}, Form, "it") == ""


@pytest.mark.parametrize(
    ("value", "form"),
    [(RIGHT, Arm), (WRONG, Arm), (JUDGED, Judgement), ({**JUDGED, "change": None, "low": None}, Judgement)],
)
def test_what_fits_one_of_two(value: Any, form: Any) -> None:
    assert misfit(value, form, "it") == ""


@pytest.mark.parametrize(
    ("value", "form", "expected"),
    [
        ([], Form, "it: expected an object, got []"),
        ({**FITS, "name": None}, Form, "it, name: expected text, got None"),
        ({"name": "x"}, Form, "it, times: missing"),
        ({**FITS, "times": {}}, Form, "it, times: expected a list, got {}"),
        ({**FITS, "times": []}, Form, "it, times: expected a list of at least 1, got []"),
        ({**FITS, "times": [1, 0]}, Form, "it, times, 1: expected a number above 0, got 0"),
        ({**FITS, "times": [float("inf")]}, Form, "it, times, 0: expected a finite number, got inf"),
        ({**FITS, "times": ["1"]}, Form, "it, times, 0: expected a number, got '1'"),
        ({**FITS, "kind": "c"}, Form, "it, kind: expected 'a' or 'b', got 'c'"),
        ({**FITS, "more": {"y": ["z"]}}, Form, "it, more, y: expected a list of at least 2, got ['z']"),
        ({**FITS, "more": {"y": [*"xyz"]}}, Form, "it, more, y: expected a list of at most 2, got ['x', 'y', 'z']"),
        ({**FITS, "more": {"y": ["z", 2]}}, Form, "it, more, y, 1: expected text, got 2"),
        ([], Arm, "it: expected an object, got []"),
        ({}, Arm, "it: expected an object with 'status', got {}"),
        ({"status": 1}, Arm, "it: expected an object whose 'status' is one of 'ok', 'INVALID', got {'status': 1}"),
        ({**RIGHT, "reason": "x"}, Arm, "it, ok, reason: expected null, got 'x'"),
        ({**RIGHT, "error": None}, Arm, "it, ok, error: expected a number, got None"),
        ({**WRONG, "total_s": [0]}, Arm, "it, INVALID, total_s, 0: expected a number above 0, got 0"),
        ({**JUDGED, "high": None}, Judgement, "it, Judged, high: expected a number, got None"),
        (True, int, "it: expected an integer, got True"),
        (1.0, int, "it: expected an integer, got 1.0"),
        ("1", int, "it: expected an integer, got '1'"),
        (True, Number, "it: expected a number, got True"),
        (float("nan"), Number, "it: expected a finite number, got nan"),
        (True, Positive, "it: expected a number, got True"),
        (10**400, Number, "it: expected a number, got 1" + "0" * 39 + "..."),
        (1, bool, "it: expected true or false, got 1"),
        ("x" * 99, int, "it: expected an integer, got '" + "x" * 39 + "..."),
    ],
)
def test_what_does_not_fit_is_named(value: Any, form: Any, expected: str) -> None:
    assert misfit(value, form, "it") == expected


def test_pydantic_is_imported_by_what_reads_a_file_alone() -> None:
    code = "import sys, fastdiff.bench.__main__; print('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"
