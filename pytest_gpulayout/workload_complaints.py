"""What is wrong with the mapping of a workload, in the words of its keys.

Knows how to tell an error of JSON Schema to somebody who has never seen one. Leaves what is allowed to
``schemas/workload.schema.json``, whose descriptions are the words used here.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError


def schema_complaints(document: Mapping[str, Any]) -> list[str]:
    """Return what a workload's schema has to say against ``document``; empty when all is well."""
    from jsonschema import Draft202012Validator

    from pytest_gpulayout.schemas import load_schema

    schema = load_schema("workload")
    errors = sorted(Draft202012Validator(schema).iter_errors(dict(document)), key=lambda error: str(error.path))
    return [line for error in errors for line in _complaint(error, schema["properties"])]


def _complaint(error: ValidationError, properties: Mapping[str, Any]) -> list[str]:
    """Say one schema error; it lies in a value, in the set of keys, or in keys that do not fit together."""
    document: Any = error.instance
    if error.path:
        return [_wrong_value(error, properties[str(error.path[0])])]
    if error.validator == "required":
        return [f"no key {error.message.split()[0]}; it has no default"]
    if error.validator == "additionalProperties":
        unknown = sorted(str(key) for key in document if key not in properties)
        return [f"unknown key {key!r}; allowed: {', '.join(properties)}" for key in unknown]
    rule: Any = error.schema
    return [str(rule["description"])]


def _wrong_value(error: ValidationError, rule: Mapping[str, Any]) -> str:
    """Name the place, with the offending part of it, and what the key as a whole may be."""
    place = str(error.path[0]) + "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in list(error.path)[1:]
    )
    if error.validator in ("required", "additionalProperties"):
        found = f"{place}: {error.message}"
    else:
        found = f"{place} = {_BRIEF.repr(error.instance)}"
    return f"{found}; allowed: {_allowed(rule)}"


def _allowed(rule: Mapping[str, Any]) -> str:
    if rule.get("type") == "integer":
        return f"a whole number, at least {rule['minimum']}"
    return str(rule["description"])


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80
