"""JSON that does not fit is named by its first place; JSON that fits by nothing."""

from __future__ import annotations

from typing import Any

import pytest

from fastdiff.bench.shape import Positive, Shape, Some, misfit

SHAPE = {"name": str, "times": Some([Positive]), "more?": (None, {str: [int, str]}), "kind": frozenset({"a", "b"})}
FITS = {"name": "x", "times": [1, 0.5], "kind": "b", "and": "what nobody reads"}


@pytest.mark.parametrize("more", [{}, {"more": None}, {"more": {}}, {"more": {"y": [1, "z"]}}])
def test_what_fits(more: dict[str, Any]) -> None:
    assert misfit({**FITS, **more}, SHAPE, "it") == ""


@pytest.mark.parametrize(
    ("value", "shape", "expected"),
    [
        ([], SHAPE, "it: expected an object, got []"),
        ({**FITS, "name": None}, SHAPE, "it, name: expected text, got None"),
        ({"name": "x"}, SHAPE, "it, times: missing"),
        ({**FITS, "times": []}, SHAPE, "it, times: expected a list with something in it, got []"),
        ({**FITS, "times": [1, 0]}, SHAPE, "it, times, 1: expected a number above 0, got 0"),
        ({**FITS, "times": [float("inf")]}, SHAPE, "it, times, 0: expected a number above 0, got inf"),
        ({**FITS, "kind": "c"}, SHAPE, "it, kind: expected a or b, got 'c'"),
        ({**FITS, "more": {"y": [1]}}, SHAPE, "it, more, y, 1: missing"),
        ({**FITS, "more": {"y": [1, "z", 2]}}, SHAPE, "it, more, y, 2: expected null, got 2"),
        (True, int, "it: expected an integer, got True"),
        (True, float, "it: expected a number, got True"),
        (1, bool, "it: expected true or false, got 1"),
        ("x" * 99, int, "it: expected an integer, got '" + "x" * 39 + "..."),
    ],
)
def test_what_does_not_fit_is_named(value: Any, shape: Shape, expected: str) -> None:
    assert misfit(value, shape, "it") == expected
