"""What a measurement sends to a server, and how: the named workloads and the reader of a user's own.

Knows sizes and counts. Leaves making prompts and sending them to the load driver.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pytest_gpulayout.errors import WorkloadError

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

_SCHEMA = "workload"
_ONE_WAVE = -1
_NOT_THE_LOAD = ("name", "batches")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A closed loop: ``concurrency`` requests are in flight until ``requests`` were sent, ``batches`` times.

    :param name: of the workload; part of a baseline's file name.
    :param input_tokens: exact length of each prompt. :param output_tokens: exact length of each answer.
    :param concurrency: requests in flight at a time. :param requests: in one batch.
    :param batches: in one run; each is an independent sample.
    :param warmup_requests: sent before the first batch and not measured; one full wave unless given, so that
        the server has seen the shape of the load.
    :raises WorkloadError: fewer requests than ``concurrency``, which then would never be reached.
    """

    name: str
    input_tokens: int
    output_tokens: int
    concurrency: int
    requests: int
    batches: int = 4
    warmup_requests: int = _ONE_WAVE

    def __post_init__(self) -> None:
        if self.warmup_requests == _ONE_WAVE:
            object.__setattr__(self, "warmup_requests", self.concurrency)
        if self.requests < self.concurrency:
            raise WorkloadError(
                f"a batch needs at least as many requests as are in flight at a time ({self.concurrency})\n"
                f"  found: requests = {self.requests}\n"
                f"  in workload {self.name!r}\n"
                f"  raise requests to {self.concurrency}, or lower concurrency to {self.requests}"
            )

    def to_document(self) -> dict[str, Any]:
        """Return the mapping that :func:`workload_from_mapping` reads."""
        return asdict(self)

    def fingerprint(self) -> str:
        """Return 12 hex digits that differ for another load: all but the name and the number of batches.

        A field that a later version adds must be left out here at its default, or stored baselines get lost.
        """
        load = {key: value for key, value in self.to_document().items() if key not in _NOT_THE_LOAD}
        return hashlib.sha256(json.dumps(load, sort_keys=True).encode()).hexdigest()[:12]


BUILTIN_WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        workload.name: workload
        for workload in (
            Workload(name="smoke", input_tokens=64, output_tokens=32, concurrency=4, requests=24, batches=4),
        )
    }
)
"""The workloads that a name alone selects."""


def find_workload(name: str) -> Workload:
    """Return a built-in workload.

    :raises WorkloadError: there is none of this name; the message lists those there are.
    """
    if name not in BUILTIN_WORKLOADS:
        raise WorkloadError(
            "a workload must be one of the built-in ones\n"
            f"  found: {name!r}\n  in the name of a workload\n"
            f"  use one of: {', '.join(BUILTIN_WORKLOADS)}; or describe your own: "
            "@pytest.mark.gpu_workload({'input_tokens': 64, 'output_tokens': 32, 'concurrency': 4, 'requests': 24})"
        )
    return BUILTIN_WORKLOADS[name]


def workload_from_mapping(mapping: Mapping[str, Any]) -> Workload:
    """Read a workload that a user describes; ``schemas/workload.schema.json`` says what is allowed.

    One without a ``name`` is called ``custom-`` and its fingerprint, so that no two share a baseline.

    :raises WorkloadError: an unknown, missing or wrong key; the message names it, what was found and what is
        allowed.
    """
    document = dict(mapping)
    complaints = _complaints(document)
    name = document.pop("name", "custom")
    if complaints:
        found = "\n         ".join(complaints)
        raise WorkloadError(
            f"a workload must follow its schema\n  found: {found}\n  in workload {name!r}\n"
            "  correct these keys where the workload is described"
        )
    # JSON Schema counts 4.0 as an integer.
    workload = Workload(name=str(name), **{key: int(value) for key, value in document.items()})
    return workload if "name" in mapping else replace(workload, name=f"custom-{workload.fingerprint()}")


def _complaints(document: Mapping[str, Any]) -> list[str]:
    from jsonschema import Draft202012Validator

    from pytest_gpulayout.schemas import load_schema

    schema = load_schema(_SCHEMA)
    errors = sorted(Draft202012Validator(schema).iter_errors(document), key=lambda error: str(error.path))
    return [line for error in errors for line in _complaint(error, schema["properties"])]


def _complaint(error: ValidationError, properties: Mapping[str, Any]) -> list[str]:
    """Say one schema error in the words of the keys; an error lies in a value or in the set of keys."""
    document: Any = error.instance
    if error.path:
        key = str(error.path[0])
        return [f"{key} = {document!r}; allowed: {_allowed(properties[key])}"]
    if error.validator == "required":
        return [f"no key {error.message.split()[0]}; it has no default"]
    unknown = sorted(str(key) for key in document if key not in properties)
    return [f"unknown key {key!r}; allowed: {', '.join(properties)}" for key in unknown]


def _allowed(rule: Mapping[str, Any]) -> str:
    if rule["type"] == "integer":
        return f"a whole number, at least {rule['minimum']}"
    return "text of 1 to 64 letters, digits, dots, dashes and underscores, the first a letter or digit"


def as_workload(value: Workload | str | Mapping[str, Any]) -> Workload:
    """Return a workload that is given as itself, by name, or as a mapping.

    :raises WorkloadError: the name is unknown, or the mapping breaks the schema.
    """
    if isinstance(value, Workload):
        return value
    return find_workload(value) if isinstance(value, str) else workload_from_mapping(value)
