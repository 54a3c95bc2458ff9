"""How tables, numbers, times and bytes are written in Markdown and on a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence

NONE = "-"
NEEDS_CUDA = "needs CUDA"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: Collection[int] = (0,)) -> str:
    """A Markdown table, escaped; the columns `words` hold words, all others figures, which stand to the right."""
    rule = ["---" if column in words else "---:" for column in range(len(header))]
    head, *others = ([escape(cell) for cell in cells] for cells in (header, *rows))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *others))


def escape(text: str) -> str:
    """Names are others' words: no tag, no column and no line begins inside of one."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").split())


def number(count: int | None) -> str:
    """With its thousands apart."""
    return NONE if count is None else f"{count:,}"


def counted(count: int, what: str) -> str:
    """`1 piece`, `2 pieces`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def byte_count(count: int | None) -> str:
    """With a binary prefix."""
    if count is None:
        return NONE
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def dimensions(shape: Sequence[int]) -> str:
    """`4x8x8`."""
    return "x".join(map(str, shape))


def prefixed(value: float, unit: str) -> str:
    """Three digits and a decimal prefix: 0.0123, "s" -> 12.3 ms."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m")):
        if value >= 0.9995 * factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value * 1e6:.3g} u{unit}" if value else f"0 {unit}"


def duration(seconds: float | None, per: str) -> str:
    """Milliseconds per image, microseconds per row."""
    if seconds is None:
        return NONE
    if per == "image":
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.0f} us" if seconds >= 1e-5 else f"{seconds * 1e6:.1f} us"
