"""What a vLLM server counted, timed and logged in the window of a measurement.

Knows vLLM's Prometheus metrics (vLLM 0.32, class ``PrometheusStatLogger`` of ``vllm/v1/metrics/loggers.py``) and how
they grew. Leaves fetching them to the adapters, lines of the log to :mod:`~pytest_gpulayout.iteration_log`, comparing
with the client's side to :mod:`~pytest_gpulayout.agreement`, and what follows for the measurement to
:mod:`~pytest_gpulayout.validity`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from pytest_gpulayout.errors import MeasurementError

if TYPE_CHECKING:
    from pytest_gpulayout.trace import RequestTrace

PrefixReset = Literal["done", "refused", "unavailable", "not asked"]
"""What became of the request to forget all prefixes before the window."""


@dataclass(frozen=True, slots=True)
class HistogramDelta:
    """Growth of a Prometheus histogram: its ``_sum`` in seconds and its ``_count``."""

    sum_s: float
    count: int

    @property
    def mean_ms(self) -> float | None:
        """Mean of what was added, ``None`` if that is nothing."""
        return self.sum_s / self.count * 1e3 if self.count else None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineDelta:
    """What one engine (a data-parallel rank of one replica) counted in the window.

    :param replica: base URL that was scraped. :param engine: label ``engine``, the data-parallel rank.
    :param finished: requests by ``finished_reason``, those with growth only.
    :param histograms: by the metric's name without ``vllm:`` and ``_seconds``: ``time_to_first_token``,
        ``inter_token_latency``, ``request_time_per_output_token``, ``e2e_request_latency``, ``request_queue_time``,
        ``request_prefill_time``, ``request_decode_time``, ``request_inference_time``.
    """

    replica: str
    engine: str
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generation_tokens: int = 0
    finished: Mapping[str, int] = field(default_factory=dict)
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    histograms: Mapping[str, HistogramDelta] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Engine steps of the window, from the iteration log (``--enable-logging-iteration-details``).

    Pure-decode steps at the modal number of requests: nothing the client does can move them.

    :param engine: data-parallel rank. :param steps: all steps of the window.
    :param decode_steps: those that were used.
    :param requests: modal number of requests of a pure-decode step. :param dummy_steps: steps without a request.
    """

    engine: str
    steps: int
    decode_steps: int
    dummy_steps: int
    requests: int
    median_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerWindow:
    """The server's side of a measured window.

    :param engines: one per replica and engine; empty where the metrics could not be read.
    :param replicas: base URLs of the servers behind the address that was measured, where there are several.
    :param settled: the counters had stopped moving when they were read at the end.
    :param prefix_reset: before the window. :param jit: lines of the log that tell of a compilation in the window.
    :param steps: one per engine; empty without the iteration log.
    :param notes: what could not be found out, and why, a sentence each.
    """

    engines: tuple[EngineDelta, ...] = ()
    replicas: tuple[str, ...] = ()
    settled: bool = True
    prefix_reset: PrefixReset = "not asked"
    jit: tuple[str, ...] = ()
    steps: tuple[StepTimes, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def generation_tokens(self) -> int:
        """Over all engines."""
        return sum(engine.generation_tokens for engine in self.engines)

    @property
    def prompt_tokens(self) -> int:
        """Over all engines."""
        return sum(engine.prompt_tokens for engine in self.engines)

    @property
    def prefix_hit_rate(self) -> float | None:
        """Share of the tokens that were looked up in the prefix cache and found; ``None`` when none were."""
        queries = sum(engine.prefix_queries for engine in self.engines)
        return sum(engine.prefix_hits for engine in self.engines) / queries if queries else None

    def mean_ms(self, histogram: str) -> float | None:
        """Mean over all engines of one of their histograms; ``None`` when nothing was added to it."""
        found = [engine.histograms[histogram] for engine in self.engines if histogram in engine.histograms]
        return HistogramDelta(sum(delta.sum_s for delta in found), sum(delta.count for delta in found)).mean_ms


# -- reading /metrics ----------------------------------------------------------------------------------------------

# Counters get "_total" and histograms "_sum" and "_count" (Prometheus text format 0.0.4).
_PROMPT_TOKENS = "vllm:prompt_tokens_total"
_GENERATION_TOKENS = "vllm:generation_tokens_total"
_FINISHED = "vllm:request_success_total"
_CACHED_TOKENS = "vllm:prompt_tokens_cached_total"
_PREEMPTIONS = "vllm:num_preemptions_total"
_PREFIX_QUERIES = "vllm:prefix_cache_queries_total"
_PREFIX_HITS = "vllm:prefix_cache_hits_total"
_NEEDED = (_PROMPT_TOKENS, _GENERATION_TOKENS, _FINISHED)
_IN_FLIGHT = ("vllm:num_requests_running", "vllm:num_requests_waiting")
_HISTOGRAMS = (
    *("time_to_first_token", "inter_token_latency", "request_time_per_output_token", "e2e_request_latency"),
    *("request_queue_time", "request_prefill_time", "request_decode_time", "request_inference_time"),
)
_PARTS = {name: tuple(f"vllm:{name}_seconds_{part}" for part in ("sum", "count")) for name in _HISTOGRAMS}
_COUNTERS = frozenset({*_NEEDED, _CACHED_TOKENS, _PREEMPTIONS, _PREFIX_QUERIES, _PREFIX_HITS}.union(*_PARTS.values()))
_PROCESS_START = "process_start_time_seconds"
_METRICS_ADVICE = "give the address of a vLLM server itself, not of something in front of several"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSnapshot:
    """What one engine has counted since its server started.

    :param replica: base URL that was scraped. :param engine: label ``engine``.
    :param in_flight: requests that it runs or keeps waiting, as it last said.
    :param counters: by the sample's name; those that only grow, the parts of histograms among them.
    :param finished: requests by ``finished_reason``.
    :param process_start_s: of the server that answered, seconds since the epoch; ``None`` where it does not say,
        as with several API servers.
    """

    replica: str
    engine: str
    in_flight: float
    counters: Mapping[str, float]
    finished: Mapping[str, float]
    process_start_s: float | None = None


def parse_metrics(text: str, replica: str) -> dict[str, EngineSnapshot]:
    """Read what ``GET /metrics`` of a vLLM server answered.

    :param replica: base URL of the server, for messages and results.
    :returns: by the label ``engine``, the data-parallel rank.
    :raises MeasurementError: not Prometheus' text format, or no counters of a vLLM server in it.
    """
    counters: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    finished: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    in_flight: dict[str, float] = defaultdict(float)
    started: float | None = None
    for name, labels, value in _samples(text, replica):
        engine = labels.get("engine", "0")
        if name == _PROCESS_START:
            started = value
        if name in _COUNTERS:  # summed, since one engine may serve a model under several names
            counters[engine][name] += value
        if name == _FINISHED:
            finished[engine][labels.get("finished_reason", "")] += value
        if name in _IN_FLIGHT:
            in_flight[engine] += value
    if missing := [name for name in _NEEDED if not any(name in known for known in counters.values())]:
        raise _fault("the counters of a vLLM server", f"none called {', '.join(missing)}", replica)
    return {
        engine: EngineSnapshot(
            replica=replica,
            engine=engine,
            in_flight=in_flight[engine],
            counters=dict(counters[engine]),
            finished=dict(finished[engine]),
            process_start_s=started,
        )
        for engine in sorted(counters)
    }


def _samples(text: str, replica: str) -> Iterator[tuple[str, Mapping[str, str], float]]:
    from prometheus_client.parser import text_string_to_metric_families  # imported late: it brings a web server

    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if math.isfinite(sample.value):
                    yield sample.name, sample.labels, sample.value
    except ValueError as error:
        raise _fault("metrics in Prometheus' text format", str(error) or repr(text[:80]), replica) from error


def deltas(before: Mapping[str, EngineSnapshot], after: Mapping[str, EngineSnapshot]) -> tuple[EngineDelta, ...]:
    """Say by how much the counters of one replica grew between two scrapes, engine by engine.

    An engine that joined meanwhile has counted from 0.

    :raises MeasurementError: they are not the counters of the same process, or an engine is gone.
    """
    if gone := before.keys() - after.keys():
        replica = before[min(gone)].replica
        raise _fault("the same engines before and after the load", f"engine {', '.join(sorted(gone))} gone", replica)
    return tuple(_delta(before.get(engine), after[engine]) for engine in after)


def _delta(before: EngineSnapshot | None, after: EngineSnapshot) -> EngineDelta:
    grown = _growth(before.counters if before else {}, after.counters, after.replica)
    finished = _growth(before.finished if before else {}, after.finished, after.replica)
    if before is not None and before.process_start_s != after.process_start_s:
        raise _fault("one server before and after the load", "another process answered after it", after.replica)

    def count(name: str) -> int:
        return round(grown.get(name, 0))

    return EngineDelta(
        replica=after.replica,
        engine=after.engine,
        prompt_tokens=count(_PROMPT_TOKENS),
        cached_prompt_tokens=count(_CACHED_TOKENS),
        generation_tokens=count(_GENERATION_TOKENS),
        finished={reason: round(number) for reason, number in finished.items() if number},
        preemptions=count(_PREEMPTIONS),
        prefix_queries=count(_PREFIX_QUERIES),
        prefix_hits=count(_PREFIX_HITS),
        histograms={
            name: HistogramDelta(grown[total], count(number))
            for name, (total, number) in _PARTS.items()
            if total in grown and number in grown
        },
    )


def _growth(before: Mapping[str, float], after: Mapping[str, float], replica: str) -> dict[str, float]:
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    if shrunk := sorted(name for name, growth in grown.items() if growth < 0):
        raise _fault("counters that only grow", f"{', '.join(shrunk)} went back: the server was restarted", replica)
    return grown


def _fault(required: str, found: str, replica: str) -> MeasurementError:
    return MeasurementError(
        f"the server's side of a measurement needs {required}\n  found: {found}\n  at {replica}/metrics\n"
        f"  {_METRICS_ADVICE}"
    )


# -- the two sides of one request ----------------------------------------------------------------------------------


def ttft_split_text(split: Mapping[str, float]) -> str:
    """Say in a line what :func:`ttft_split` found."""
    parts = " + ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in split.items())
    return f"mean TTFT {sum(split.values()):.1f} ms = {parts}"


def ttft_split(requests: Sequence[RequestTrace]) -> dict[str, float] | None:
    """Split the mean TTFT into where it was spent, in ms; the parts add up to it.

    ``client``: handing the request to the network, first byte to last (0 where nobody knows when the last byte left).
    ``queue``: waiting in the engine. ``prefill``: first schedule to first token. ``network_and_frontend``: what is
    left, which is the way there and back, proxies, and the server's own work around the engine; below 0 when the
    server claims more time than the client saw.

    :param requests: of one run; failed ones do not count.
    :returns: ``None`` unless the server timed each of them (``vllm serve --enable-per-request-metrics``).
    """
    rows = [_ttft_parts(request) for request in requests if request.ok]
    known = [row for row in rows if row is not None]
    if not known or len(known) < len(rows):
        return None
    client, queue, prefill, ttft = (fmean(part) for part in zip(*known, strict=True))
    return {
        "client": client,
        "network_and_frontend": ttft - client - queue - prefill,
        "queue": queue,
        "prefill": prefill,
    }


def _ttft_parts(request: RequestTrace) -> tuple[float, float, float, float] | None:
    """Client, queue, prefill and the whole, in ms."""
    server = request.server
    if server is None or server.queue_ms is None or server.prefill_ms is None:
        return None
    sending_ns = 0 if request.sent_ns is None else request.sent_ns - request.send_ns
    return sending_ns / 1e6, server.queue_ms, server.prefill_ms, request.ttft_ns / 1e6
