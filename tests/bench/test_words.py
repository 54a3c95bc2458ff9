"""Tables that stay tables whatever stands in them, and figures in few words."""

from __future__ import annotations

import pytest

from fastdiff.bench.words import byte_count, counted, dimensions, duration, number, prefixed, table


def test_a_table_holds_words_to_the_left_and_figures_to_the_right() -> None:
    assert table(("case", "time", ""), [("a | b\n<c>", "1 ms", "slower")], words=(0, 2)).splitlines() == [
        "| case | time |  |",
        "| --- | ---: | --- |",
        "| a \\| b &lt;c> | 1 ms | slower |",
    ]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (number(None), "-"),
        (number(1234567), "1,234,567"),
        (counted(1, "piece"), "1 piece"),
        (counted(0, "piece"), "0 pieces"),
        (dimensions((4, 8, 8)), "4x8x8"),
        (byte_count(None), "-"),
        (byte_count(1023), "1023 B"),
        (byte_count(1024), "1.0 KiB"),
        (byte_count(3 * 2**19), "1.5 MiB"),
        (byte_count(141 * 2**30), "141.0 GiB"),
        (prefixed(0.0123, "s"), "12.3 ms"),
        (prefixed(0.9996, "s"), "1 s"),
        (prefixed(4.5e-5, "s"), "45 us"),
        (prefixed(2.5e-8, "s"), "0.025 us"),
        (prefixed(0, "s"), "0 s"),
        (prefixed(1234, "FLOP"), "1.23 kFLOP"),
        (duration(None, "image"), "-"),
        (duration(0.0123456, "image"), "12.3 ms"),
        (duration(0.0123456, "row"), "12346 us"),
        (duration(0.0000012, "row"), "1.2 us"),
    ],
)
def test_figures(written: str, expected: str) -> None:
    assert written == expected
