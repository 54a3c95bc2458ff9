"""The first place where JSON is not of its form, and what a report of the right form names and does not have."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import TypeAdapter

OWNERS = ("shared", "cloned-deepcopy", "cloned-shallow", "tensorized")

_EXPECTED = {
    "string_type": "text", "int_type": "an integer", "float_type": "a number", "finite_number": "a finite number",
    "greater_than": "a number above {gt:g}", "bool_type": "true or false", "none_required": "null",
    "list_type": "a list", "too_short": "a list of at least {min_length}", "too_long": "a list of at most {max_length}",
    "dict_type": "an object", "model_attributes_type": "an object", "literal_error": "{expected}",
    "union_tag_not_found": "an object with {discriminator}",
    "union_tag_invalid": "an object whose {discriminator} is one of {expected_tags}",
}  # fmt: skip
"""pydantic's kinds of error in JSON's words."""


def misfit(value: Any, form: Any, where: str) -> str:
    """Where `value` is first not of this type, and how; empty if it is. 1 is not "1", nor is true 1."""
    from pydantic import ValidationError

    try:
        _adapter(form).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ", ".join(map(str, (where, *first["loc"])))
        if first["type"] == "missing":
            return f"{place}: missing"
        expected = _EXPECTED.get(first["type"], "{msg}").format(msg=first["msg"], **first.get("ctx", {}))
        return f"{place}: expected {expected}, got {_said(first['input'])}"
    return ""


@cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter  # only where a file is read: most commands read none

    return TypeAdapter(form)


def _said(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def unmatched(report: Mapping[str, Any]) -> str:
    """What a report of the right form names and does not have; empty where there is nothing."""
    for case in report["rows"]:
        if "diffusers" not in case["arms"]:
            return f"the report, rows, {case['name']}: has no arm of 'diffusers'"
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
