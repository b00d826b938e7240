"""What a measurement sends to a server, and how: the named workloads and the reader of a user's own.

Knows sizes and counts. Leaves making prompts and sending them to the load driver.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from pytest_gpulayout.errors import WorkloadError

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

_SCHEMA = "workload"
_ONE_WAVE = -1
_NOT_THE_LOAD = ("name", "batches")
_FIRST_FIELDS = ("name", "input_tokens", "output_tokens", "concurrency", "requests", "batches", "warmup_requests")
_DEFAULTS = {"burstiness": 1.0, "api": "completions"}


Api = Literal["completions", "chat"]
"""``POST /v1/completions`` or ``POST /v1/chat/completions``."""


@dataclass(frozen=True, slots=True)
class RampUp:
    """An arrival rate that grows over a batch, as ``vllm bench serve --ramp-up-strategy`` does.

    :param strategy: how it grows with the share of the requests that were sent. :param start_rate: req/s of the
        first request. :param end_rate: req/s of the last one.
    """

    strategy: Literal["linear", "exponential"]
    start_rate: float
    end_rate: float


@dataclass(frozen=True, slots=True)
class ImageSize:
    """An image that is made for each prompt, in pixels."""

    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is sent, how, and how many.

    A *closed loop* has ``concurrency`` requests in flight until ``requests`` were sent. *Open arrivals* come by
    ``rate`` (or ``ramp_up``), whether the server keeps up or not; ``concurrency`` then is a limit on top, and a
    request that waits for a place waits in the client. Either is repeated ``batches`` times.

    :param name: of the workload; part of a baseline's file name.
    :param input_tokens: exact length of each prompt; ``None`` where ``prompts`` are given.
    :param output_tokens: exact length of each answer; where ``response_schemas`` end it, the most it may have.
    :param requests: in one batch.
    :param concurrency: requests in flight at a time; ``None`` for open arrivals without a limit.
    :param rate: requests per second, ``inf`` for all at once; ``None`` for a closed loop, or with ``ramp_up``.
    :param burstiness: shape of the gamma distribution of the gaps between arrivals; 1 is Poisson, less is burstier,
        ``inf`` is a constant rate. (``vllm bench serve --burstiness``.)
    :param batches: in one run; each is an independent sample.
    :param warmup_requests: sent before the first batch and not measured; one full wave unless given, so that
        the server has seen the shape of the load.
    :param prompts: texts that are sent in turns, instead of random ones.
    :param response_schemas: JSON Schemas that the answers must follow, in turns; ``()`` for free text.
    :param image: goes along with each prompt, and needs the chat API.
    :param shares_prefix: prompts may be answered from the prefix cache; without it that makes a run invalid.
    :param goodput: limits in ms of ``ttft``, ``tpot`` and ``e2el``; a request that keeps all of them is good.
    :raises WorkloadError: fewer requests than ``concurrency``, which then would never be reached.
    """

    name: str
    output_tokens: int
    requests: int
    input_tokens: int | None = None
    concurrency: int | None = None
    rate: float | None = None
    burstiness: float = 1.0
    ramp_up: RampUp | None = None
    batches: int = 4
    warmup_requests: int = _ONE_WAVE
    api: Api = "completions"
    prompts: tuple[str, ...] = ()
    response_schemas: tuple[Mapping[str, Any], ...] = ()
    image: ImageSize | None = None
    shares_prefix: bool = False
    goodput: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.warmup_requests == _ONE_WAVE:
            object.__setattr__(self, "warmup_requests", self.in_flight)
        if self.requests < self.in_flight:
            raise WorkloadError(
                f"a batch needs at least as many requests as are in flight at a time ({self.concurrency})\n"
                f"  found: requests = {self.requests}\n"
                f"  in workload {self.name!r}\n"
                f"  raise requests to {self.concurrency}, or lower concurrency to {self.requests}"
            )

    @property
    def is_open(self) -> bool:
        """Whether requests arrive by a timetable instead of when a place becomes free."""
        return self.rate is not None or self.ramp_up is not None

    @property
    def in_flight(self) -> int:
        """Most requests that can be in flight at a time."""
        return self.requests if self.concurrency is None else self.concurrency

    def to_document(self) -> dict[str, Any]:
        """Return the mapping that :func:`workload_from_mapping` reads, an infinite number as ``"inf"``.

        Fields that the first version did not have are left out at their default, so that fingerprints stay.
        """
        document = {
            key: value
            for key, value in asdict(self).items()
            if key in _FIRST_FIELDS or value not in (None, (), {}, False, _DEFAULTS.get(key))
        }
        return {key: "inf" if value == math.inf else value for key, value in document.items()}

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
