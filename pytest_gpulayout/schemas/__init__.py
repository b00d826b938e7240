"""The JSON Schemas (draft 2020-12) of the documents this package reads and writes, and the check against them."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any


def load_schema(name: str) -> dict[str, Any]:
    """Return a schema by its short name, such as ``topology``.

    :raises FileNotFoundError: this package has no schema of that name.
    """
    text = files(__name__).joinpath(f"{name}.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def validate(document: Any, name: str) -> list[str]:
    """Return what is wrong with a document, one message per fault in the order of the document.

    :param document: parsed JSON.
    :param name: short name of the schema.
    :returns: messages such as ``$.gpus[0].index: 'a' is not of type 'integer'``; empty when all is well.
    """
    from jsonschema import Draft202012Validator
    from referencing import Registry, Resource

    shared = load_schema("baseline")  # which the schema of the results refers to
    registry = Resource.from_contents(shared) @ Registry[Any]()
    errors = Draft202012Validator(load_schema(name), registry=registry).iter_errors(document)
    return [
        f"{error.json_path}: {error.message}"
        for error in sorted(errors, key=lambda error: [str(part).zfill(8) for part in error.absolute_path])
    ]


def read_document(text: str, name: str, *, migrate: Callable[[Any], Any] = lambda it: it) -> tuple[Any, list[str]]:
    """Read JSON strictly and check it: ``NaN`` and ``Infinity``, which Python's reader lets pass, are no JSON.

    :param migrate: brings a document of an older schema version to the newest, before it is checked.
    :returns: the document, and what is wrong with it as :func:`validate` says it; ``None`` where it is not JSON.
    """
    try:
        document = migrate(json.loads(text, parse_constant=refuse_constant))
    except (ValueError, RecursionError) as error:
        return None, [f"it is not JSON ({error})"]
    return document, validate(document, name)


def refuse_constant(name: str) -> float:
    """Refuse ``NaN`` and ``Infinity``, as ``parse_constant`` of :func:`json.loads`."""
    raise ValueError(f"{name} is not a number")
