"""What a measurement sends to a server, and how: the named workloads, and a user's own as a mapping.

Knows sizes, counts and what fits together. Leaves making prompts to :mod:`pytest_gpulayout.adapters.prompts`, the
timetable to :mod:`~pytest_gpulayout.arrivals`, complaints about a mapping to
:mod:`~pytest_gpulayout.workload_complaints` and files to :mod:`pytest_gpulayout.adapters.workload_files`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from pytest_gpulayout.answer_schemas import ANSWER_SCHEMAS
from pytest_gpulayout.errors import WorkloadError
from pytest_gpulayout.workload_complaints import schema_complaints

_ONE_WAVE = -1
_MOST_WARMUP_BY_RATE = 32
PROBE = "collectives"
"""In place of a workload's name in the key of a probe of the links; no workload has it."""

_NOT_THE_LOAD = ("name", "batches", "goodput")
_COUNTS = ("input_tokens", "output_tokens", "concurrency", "requests", "batches")
_ALWAYS_WRITTEN = ("batches", "warmup_requests")

Api = Literal["completions", "chat"]
"""``POST /v1/completions`` or ``POST /v1/chat/completions``."""

GOODPUT_NAMES = ("ttft", "tpot", "e2el")
"""What a limit can be set on, as ``vllm bench serve --goodput`` names it."""


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
    :param warmup_requests: sent before the first batch and not measured. Unless given one full wave, so that the
        server has seen the shape of the load; of arrivals by a rate, whose wave nobody knows, 32 at most.
    :param prompts: texts that are sent in turns, instead of random ones.
    :param response_schemas: JSON Schemas that the answers must follow, in turns; ``()`` for free text.
    :param image: goes along with each prompt, and needs the chat API.
    :param shares_prefix: prompts may be answered from the prefix cache; without it that makes a run invalid.
    :param goodput: limits in ms of ``ttft``, ``tpot`` and ``e2el``; a request that keeps all of them is good.
    :raises WorkloadError: fields that do not fit together, such as fewer requests than ``concurrency``.
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
    response_schemas: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    image: ImageSize | None = None
    shares_prefix: bool = False
    goodput: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if (mistake := next(_mistakes(self), None)) is not None:
            raise WorkloadError(
                f"{mistake.required}\n  found: {mistake.found}\n  in workload {self.name!r}\n  {mistake.advice}"
            )
        if self.warmup_requests == _ONE_WAVE:
            object.__setattr__(self, "warmup_requests", self._one_wave())

    @property
    def is_open(self) -> bool:
        """Whether requests arrive by a timetable instead of when a place becomes free."""
        return self.rate is not None or self.ramp_up is not None

    @property
    def expects_exact_output(self) -> bool:
        """Whether each answer has ``output_tokens`` tokens; one that follows a JSON Schema may end earlier."""
        return not self.response_schemas

    @property
    def in_flight(self) -> int:
        """Most requests that can be in flight at a time."""
        return self.requests if self.concurrency is None else self.concurrency

    def _one_wave(self) -> int:
        if self.concurrency is None and self.rate != math.inf:
            return min(self.requests, _MOST_WARMUP_BY_RATE)
        return self.in_flight

    def to_document(self) -> dict[str, Any]:
        """Return the mapping that :func:`workload_from_mapping` reads; an infinite number is ``"inf"`` in it.

        Fields at their default are left out, so that a field which a later version adds changes no fingerprint. The
        two that the first version always wrote stay.
        """
        return {
            name: _as_json(value)
            for name, value in asdict(self).items()
            if name in _ALWAYS_WRITTEN or value != _DEFAULTS[name]
        }

    def fingerprint(self) -> str:
        """Return 12 hex digits that differ for another load: all but the name, the number of batches and limits.

        A field that a later version adds must have a default, or stored baselines get lost.
        """
        load = {key: value for key, value in self.to_document().items() if key not in _NOT_THE_LOAD}
        return hashlib.sha256(json.dumps(load, sort_keys=True).encode()).hexdigest()[:12]


_DEFAULTS = {
    entry.name: entry.default_factory() if entry.default_factory is not MISSING else entry.default
    for entry in fields(Workload)
}


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return "inf" if value == math.inf else value


class _Mistake(NamedTuple):
    required: str
    found: str
    advice: str


def _mistakes(workload: Workload) -> Iterator[_Mistake]:
    """What does not fit together, the most telling first."""
    yield from _wrong_numbers(workload)
    yield from _wrong_arrivals(workload)
    yield from _wrong_requests(workload)


def _wrong_numbers(workload: Workload) -> Iterator[_Mistake]:
    if workload.name == PROBE:
        yield _Mistake(f"another name than that of the probe of the links, {PROBE}", PROBE, "rename the workload")
    counts = {name: getattr(workload, name) for name in _COUNTS}
    if workload.image is not None:
        counts |= {f"image.{side}": pixels for side, pixels in asdict(workload.image).items()}
    for name, value in counts.items():
        if value is not None and value < 1:
            yield _Mistake(f"{name} must be at least 1", f"{name} = {value}", f"correct {name}")
    if workload.warmup_requests < _ONE_WAVE:
        found = f"warmup_requests = {workload.warmup_requests}"
        yield _Mistake("warmup_requests must be at least 0", found, "use 0 to send none")
    for name, limit in workload.goodput.items():
        if name not in GOODPUT_NAMES or not 0 < limit < math.inf:
            yield _Mistake(
                f"a limit of goodput is a number of ms above 0, of one of {', '.join(GOODPUT_NAMES)}",
                f"{name} = {limit}",
                "write it as goodput = {ttft = 200, tpot = 20, e2el = 5000}",
            )


def _wrong_arrivals(workload: Workload) -> Iterator[_Mistake]:
    rate, ramp = workload.rate, workload.ramp_up
    if workload.concurrency is None and not workload.is_open:
        yield _Mistake(
            "a workload needs concurrency for a closed loop, or rate or ramp_up for arrivals by a timetable",
            "none of the three",
            "add one: concurrency = 4, or rate = 2.5, or rate = inf for all at once",
        )
    if rate is not None and ramp is not None:
        advice = "leave one of them out: the ramp has its own rates"
        yield _Mistake("requests arrive by rate or by ramp_up, not by both", f"rate = {rate} and ramp_up", advice)
    if rate is not None and not rate > 0:
        yield _Mistake("rate must be above 0 req/s", f"rate = {rate}", "use inf to send all requests at once")
    if ramp is not None and not all(0 < value < math.inf for value in (ramp.start_rate, ramp.end_rate)):
        found = f"from {ramp.start_rate} to {ramp.end_rate} req/s"
        yield _Mistake("both rates of ramp_up must be above 0 and finite", found, "start at a low rate, such as 0.5")
    if not workload.burstiness > 0:
        found = f"burstiness = {workload.burstiness}"
        yield _Mistake("burstiness must be above 0", found, "use 1 for Poisson arrivals, inf for a constant rate")
    if workload.burstiness != 1 and not workload.is_open:
        found = f"burstiness = {workload.burstiness} in a closed loop, where nothing arrives by chance"
        yield _Mistake("burstiness needs arrivals by rate or ramp_up", found, "add rate, or leave burstiness out")


def _wrong_requests(workload: Workload) -> Iterator[_Mistake]:
    if (workload.input_tokens is None) == (not workload.prompts):
        yield _Mistake(
            "a workload needs exactly one of input_tokens and prompts",
            "both" if workload.prompts else "neither",
            "give input_tokens for random prompts of that length, or prompts for texts of your own",
        )
    if "" in workload.prompts:
        found = f"prompt {workload.prompts.index('') + 1} of {len(workload.prompts)} is empty"
        yield _Mistake("each of the prompts must be a text", found, "leave the empty ones out")
    if workload.image is not None and workload.api != "chat":
        yield _Mistake("an image can only be sent to the chat API", f"api = {workload.api!r}", "set api = 'chat'")
    if workload.requests < workload.in_flight:
        most = workload.in_flight
        yield _Mistake(
            f"a batch needs at least as many requests as are in flight at a time ({most})",
            f"requests = {workload.requests}",
            f"raise requests to {most}, or lower concurrency to {workload.requests}",
        )


BUILTIN_WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        workload.name: workload
        for workload in (
            Workload(name="smoke", input_tokens=64, output_tokens=32, concurrency=4, requests=24, batches=4),
            Workload(
                name="structured-100",
                input_tokens=1000,
                output_tokens=500,
                concurrency=100,
                requests=200,
                batches=4,
                response_schemas=ANSWER_SCHEMAS,
            ),
            Workload(name="random-300", input_tokens=100, output_tokens=600, rate=math.inf, requests=300, batches=3),
            Workload(
                name="single-image-latency",
                input_tokens=64,
                output_tokens=128,
                concurrency=1,
                requests=8,
                batches=4,
                warmup_requests=3,
                api="chat",
                image=ImageSize(1024, 768),
            ),
        )
    }
)
"""The workloads that a name alone selects."""


def find_workload(name: str, extra: Mapping[str, Workload] = MappingProxyType({})) -> Workload:
    """Return a workload by name: a built-in one, or one of the user's.

    :param extra: the user's own, by name.
    :raises WorkloadError: there is none of this name; the message lists those there are.
    """
    known = {**extra, **BUILTIN_WORKLOADS}
    if name not in known:
        raise WorkloadError(
            "a workload must be a built-in one, or one of your own\n"
            f"  found: {name!r}\n  in the name of a workload\n"
            f"  use one of: {', '.join([*BUILTIN_WORKLOADS, *extra])}; or describe your own: in pyproject.toml under "
            f"[tool.pytest-gpulayout.workloads.{name if name.isidentifier() else 'NAME'}], in a file (FILE.toml), or "
            "@pytest.mark.gpu_workload({'input_tokens': 64, 'output_tokens': 32, 'concurrency': 4, 'requests': 24})"
        )
    return known[name]


def workload_from_mapping(mapping: Mapping[str, Any]) -> Workload:
    """Read a workload that a user describes; ``schemas/workload.schema.json`` says what is allowed.

    One without a ``name`` is called ``custom-`` and its fingerprint, so that no two share a baseline.

    :raises WorkloadError: an unknown, missing or wrong key; the message names it, what was found and what is
        allowed.
    """
    document = dict(mapping)
    complaints = schema_complaints(document)
    name = document.pop("name", "custom")
    if complaints:
        found = "\n         ".join(complaints)
        raise WorkloadError(
            f"a workload must follow its schema\n  found: {found}\n  in workload {name!r}\n"
            "  correct these keys where the workload is described"
        )
    values = {key: _READERS.get(key, int)(value) for key, value in document.items()}
    workload = Workload(name=str(name), **values)
    return workload if "name" in mapping else replace(workload, name=f"custom-{workload.fingerprint()}")


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "rate": float,  # which reads "inf" as well
    "burstiness": float,
    "ramp_up": lambda value: RampUp(value["strategy"], float(value["start_rate"]), float(value["end_rate"])),
    "api": str,
    "prompts": tuple,
    "response_schemas": tuple,
    "image": lambda value: ImageSize(int(value["width"]), int(value["height"])),
    "shares_prefix": bool,
    "goodput": lambda value: {name: float(limit) for name, limit in value.items()},
}
"""How each field is read; all others are whole numbers, and JSON Schema counts 4.0 as one."""


def as_workload(
    value: Workload | str | Mapping[str, Any], extra: Mapping[str, Workload] = MappingProxyType({})
) -> Workload:
    """Return a workload that is given as itself, by name, or as a mapping.

    :param extra: the user's own, by name.
    :raises WorkloadError: the name is unknown, or the mapping breaks the schema.
    """
    if isinstance(value, Workload):
        return value
    return find_workload(value, extra) if isinstance(value, str) else workload_from_mapping(value)
