"""What a report's JSON must have for every page to be made of it, and the first place where another's does not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from fastdiff.bench.verdict import Verdict

Shape = Any
"""What JSON must be: a type of `_KINDS`; None, null; a frozenset, one of these words; a tuple, any of these shapes.

[shape] is a list of such; [shape, shape] has exactly these. Of a dict's names, one with a ? may be missing, and `str`
stands for all others.
"""


class Positive(float):
    """As a shape: a number above 0."""


class Some(list[Any]):
    """As a shape: a list of at least one."""


def misfit(value: Any, shape: Shape, where: str) -> str:
    """Where `value` is first not of this shape, and how; empty if it is."""
    if isinstance(shape, tuple):
        found = [misfit(value, one, where) for one in shape]
        return "" if "" in found else found[-1]
    if value is _GONE:
        return f"{where}: missing"
    if isinstance(shape, frozenset):
        fits = isinstance(value, str) and value in shape
        return "" if fits else f"{where}: expected {' or '.join(sorted(shape))}, got {_said(value)}"
    kind = shape if isinstance(shape, type) else dict if isinstance(shape, dict) else list if shape else type(None)
    if not _is(value, kind):
        return f"{where}: expected {_KINDS[kind]}, got {_said(value)}"
    inside = (misfit(part, one, f"{where}, {name}") for name, part, one in _parts(value, shape))
    if isinstance(shape, Some) and not value:
        return f"{where}: expected a list with something in it, got []"
    return next(filter(None, inside), "")


def _parts(value: Any, shape: Shape) -> Iterator[tuple[str, Any, Shape]]:
    """What is inside: name, value and shape."""
    if isinstance(shape, list):
        count = len(value) if len(shape) == 1 else max(len(shape), len(value))
        for index in range(count):
            expected = shape[0] if len(shape) == 1 else shape[index] if index < len(shape) else None
            yield str(index), value[index] if index < len(value) else _GONE, expected
    elif isinstance(shape, dict):
        named = {name.rstrip("?"): name for name in shape if name is not str}
        for name, known in named.items():
            if name in value or known == name:
                yield name, value.get(name, _GONE), shape[known]
        for name in value.keys() - named.keys() if str in shape else ():
            yield name, value[name], shape[str]


def _is(value: Any, kind: type) -> bool:
    if issubclass(kind, float):
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return number and (kind is float or value > 0)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _said(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


_GONE = object()
_KINDS: Mapping[type, str] = {
    str: "text", int: "an integer", float: "a number", Positive: "a number above 0", bool: "true or false",
    list: "a list", dict: "an object", type(None): "null",
}  # fmt: skip

_UNJUDGED = {"verdict": frozenset({"INVALID"}), "change": None, "pairs": int, "reason": str}
_JUDGED = {
    "verdict": frozenset(get_args(Verdict)), "change": float, "low": float, "high": float, "pairs": int, "reason": str,
}  # fmt: skip
_JUDGEMENT = (_UNJUDGED, _JUDGED)
_CHANGE = {"name": str, "base": (None, int), "head": (None, int), "verdict": str}
_MACHINE = {
    "id": str, "system": str, "architecture": str, "cpu": str, "cpus_usable": int, "python": str, "threads": int,
    "packages": {"torch": (None, str), "diffusers": (None, str)}, "gpu": (None, {"name": str, "driver": (None, str)}),
}  # fmt: skip
_RATIO = {"value": Positive, "low": Positive, "high": Positive}
_STEP = {"label": str, "case": str, "base": str, "arm": str}
_SUMMARY_STEP = {**_STEP, "per": str, "base_s": (None, Positive), "arm_s": (None, Positive), "ratio": (None, _RATIO)}
_CLOCKS = {
    "sm_mhz": (None, int), "temperature_c": (None, int), "throttles": (None, [str]), "foreign_processes": (None, int),
}  # fmt: skip
_TIMES = {"total_s": [Positive], "loop_s": [Positive], "gpu?": [(None, _CLOCKS)], "vram_peak_bytes?": (None, int)}
_ARM = (
    {"status": frozenset({"INVALID"}), "reason": str, "error": (None, float), **_TIMES},
    {"status": frozenset({"ok"}), "reason": None, "error": float, **_TIMES},
)
_CASE = {
    "name": str, "samplers": Some([str]), "batch": int, "comparisons": [{"base": str, "arm": str, "ratio": _RATIO}],
}  # fmt: skip
_COUNTED = {"operations": Some([int]), "syncs": Some([int])}

REPORT: Shape = {
    "suite": str, "created": str, "command": [str], "complete": bool, "resumed": int, "machine": _MACHINE,
    "commit": dict, "model": {"name": str, "parameters": int, "toy": bool, "latent_shape": [int], "dtype": str},
    "settings": {"device": str, "seed": int, "threads": int, "level": Positive, "half_width": float},
    "canaries": (
        None, {"a_a?": _JUDGEMENT, "slower_10_percent?": _JUDGEMENT, "doubt?": str, "total_s?": {str: [Positive]}},
    ),
    "gates": (None, {"key": str, "figures": {str: (None, int)}, "changes": (None, [_CHANGE]), "accepted?": bool}),
    "setup": [{"sampler": str, "steps": int, "call_s": {str: Some([Positive])}}],
    "counts": [{"samplers": Some([str]), "batch": int, "diffusers": _COUNTED, "fastdiff": _COUNTED}],
    "fates": [
        {
            "sampler": str, "workload": frozenset({"concurrent-equal", "concurrent-mixed"}), "arm": str,
            "fates": [{"fate": str, "error": (None, str)}],
        }
    ],
    "errors": [{"sampler": str, "steps": int, "diffusers": (None, float), "fastdiff": (None, float)}],
    "memory": [
        {
            "name": str, "latent_shape": [int],
            "entries": [
                {
                    "sampler": str, "ownership": str, "latent_bytes": int, "before_bytes": int, "during_bytes": int,
                    "after_bytes": int, "row_peak_bytes": int,
                }
            ],
        }
    ],
    "rows": [
        {
            **_CASE, "arms": {"diffusers": _ARM, str: _ARM}, "latent_shape": [int], "steps": int, "between": bool,
            "threads": int,
        }
    ],
    "images": [
        {**_CASE, "arms": {str: _ARM}, "workload": str, "rows": int, "compare": [[str, str]]},
    ],
    "unsupported": [{"what": str, "reason": str}],
    "attribution": [_STEP], "no_gain": [_STEP], "target": [dict], "compile_s": {str: float},
    "compile_cache?": {str: str}, "seconds": {"all": float, "compile": float, "pieces": {str: float}},
    "summary": {
        "attribution": [_SUMMARY_STEP], "no_gain": [_SUMMARY_STEP],
        "targets": [{"label": str, "goal": str, "measured": str, "met": (None, bool)}],
    },
}  # fmt: skip
"""report.json's "fastdiff"."""

AB: Shape = {
    "results": {str: {"right": bool, "reason": (None, str)}}, "failed": {str: str}, "changes": [_CHANGE],
    "times": {str: {"judgement": _JUDGEMENT}}, "canaries": (None, {"doubt": str}),
}  # fmt: skip
"""ab.json, as far as it is read here."""

PYTEST_BENCHMARK: Shape = {
    "machine_info": {"cpu?": (None, dict)},
    "benchmarks": [
        {"fullname": str, "stats": {"median": Positive, "q1": Positive, "q3": Positive, "rounds": Positive}}
    ],
}
"""A file of pytest-benchmark, as far as it is compared."""

OWNERS = ("shared", "cloned-deepcopy", "cloned-shallow", "tensorized")


def unmatched(report: Mapping[str, Any]) -> str:
    """What a report of the right shape names and does not have; empty where there is nothing."""
    for case in report["images"]:
        for name in sorted({name for pair in case["compare"] for name in pair} - case["arms"].keys()):
            return f"the report, images, {case['name']}: compares {name!r}, which is none of its arms"
    for case in report["memory"]:
        found = {(one["sampler"], one["ownership"]) for one in case["entries"]}
        for sampler in {sampler for sampler, _ in found}:
            for owner in OWNERS:
                if (sampler, owner) not in found:
                    return f"the report, memory, {case['name']}: {sampler} has no entry of {owner!r}"
    return ""
