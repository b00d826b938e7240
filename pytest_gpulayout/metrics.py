"""What the metrics are, and their values for each batch: one formula each, as ``vllm bench serve`` computes them.

Source of every formula: vLLM 0.32, ``vllm/benchmarks/serve.py`` (``calculate_metrics``) and
``vllm/benchmarks/lib/endpoint_request_func.py``. Percentiles interpolate linearly (``numpy.percentile``), the
standard deviation is the population's, ITL pools the gaps of all requests. Other programs mean other things by the
same words: :data:`OTHER_MEANINGS`.

One rule differs on purpose: an empty sample has no median. vLLM writes 0 there; we raise. Leaves the document that
holds the numbers to :mod:`~pytest_gpulayout.vllm_result`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.trace import BatchTrace, RequestTrace, RunTrace

if TYPE_CHECKING:
    from pytest_gpulayout.latencies import Sample

PERCENTILES = (50, 90, 95, 99)
"""Of every latency, in results; ``vllm bench serve --metric-percentiles``."""

TAIL_REQUESTS: Mapping[int, int] = MappingProxyType({90: 64, 95: 130, 99: 662})
"""Requests that a percentile needs before its value is worth more than a guess.

With fewer, the chance that at most one of them lies beyond the true percentile is above 1 %: the count that MLPerf
LoadGen asks for at 99 % confidence before it stops early (mlcommons/inference, ``loadgen/early_stopping.cc``).
"""

_NS_PER_MS = 1e6

Direction = Literal["lower", "higher"]
"""Which way is better."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A number a gate can judge. :param better: which way is better. :param definition: one sentence."""

    name: str
    unit: str
    better: Direction
    definition: str

    @property
    def higher_is_better(self) -> bool:
        """True for a rate, False for a time."""
        return self.better == "higher"


LATENCIES: Mapping[str, str] = MappingProxyType(
    {
        "ttft": "time from the first byte sent to the first chunk of the answer",
        "tpot": "(E2EL - TTFT) / (output tokens - 1), of the requests with more than one output token",
        "itl": "gap between successive chunks, the gaps of all requests pooled",
        "e2el": "time from the first byte sent to the last chunk of the answer",
    }
)
"""The latencies of ``vllm bench serve``, by the word in their keys."""

_SPREADS = {"median": "median over a batch", "p99": "99th percentile over a batch, interpolated linearly"}
_THROUGHPUTS = (
    Metric("request_throughput", "req/s", "higher", "requests completed / duration of the batch"),
    Metric("output_throughput", "tok/s", "higher", "output tokens of completed requests / duration of the batch"),
)
_WITH_CONDITIONS = (
    Metric(
        "request_goodput",
        "req/s",
        "higher",
        "requests within all limits of the workload / duration of the batch; only where the workload has limits",
    ),
    Metric(
        "median_ttft_intended_ms",
        "ms",
        "lower",
        "TTFT, median over a batch: time from the instant the timetable said to the first chunk, so that waiting in "
        "the client counts; only for open arrivals",
    ),
)

DECODE_BATCHES = (1, 8, 64)
"""Sequences of a decode step, one token of each, whose messages a probe of the links adds up."""

COLLECTIVES: Mapping[str, Metric] = MappingProxyType(
    {
        f"all_reduce_batch{batch}_us": Metric(
            f"all_reduce_batch{batch}_us",
            "us",
            "lower",
            f"time of an all-reduce of a decode step with {batch} in flight, mean over a round, slowest rank",
        )
        for batch in DECODE_BATCHES
    }
    | {
        "all_reduce_prefill_gb_per_s": Metric(
            "all_reduce_prefill_gb_per_s",
            "GB/s",
            "higher",
            "bus bandwidth of an all-reduce of a prefill of 8192 tokens: bytes / time * 2 (n - 1) / n with n ranks",
        )
    }
)
"""What :mod:`~pytest_gpulayout.collectives` measures before a server starts, by name."""

SERVING: Mapping[str, Metric] = MappingProxyType(
    {metric.name: metric for metric in _THROUGHPUTS}
    | {
        f"{spread}_{latency}_ms": Metric(
            f"{spread}_{latency}_ms", "ms", "lower", f"{latency.upper()}, {over}: {definition}"
        )
        for latency, definition in LATENCIES.items()
        for spread, over in _SPREADS.items()
    }
    | {metric.name: metric for metric in _WITH_CONDITIONS}
)
"""Everything that :func:`batch_metrics` can return, by name."""

METRICS: Mapping[str, Metric] = MappingProxyType({**SERVING, **COLLECTIVES})
"""All that a gate can be about, by name."""

OTHER_MEANINGS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "ITL": {
            "here and vllm bench serve": "gap between chunks, whatever number of tokens they hold",
            "GuideLLM": "(last - first token) / (tokens - 1): our TPOT",
            "AIPerf": "(E2EL - TTFT) / (tokens - 1): our TPOT; gaps between chunks are its ICL",
            "inference-perf": "gap between chunks with content",
            "llmperf": "E2EL / tokens, so TTFT is in it",
            "vLLM's /metrics": "gap between steps of the engine, as its front end receives them",
        },
        "TPOT": {
            "here and vllm bench serve": "(E2EL - TTFT) / (tokens - 1)",
            "GuideLLM": "E2EL / tokens, so TTFT is in it",
            "AIPerf": "does not have it: its ITL is our TPOT",
            "inference-perf": "as here; its NTPOT is E2EL / tokens",
            "vLLM's /metrics": "decode time in the engine / (tokens - 1)",
        },
        "start of TTFT": {
            "here": "first byte of an encoded request on an open connection",
            "vllm bench serve": "before the body is encoded and a connection found or opened",
            "GuideLLM": "start of the request, by the wall clock",
            "AIPerf": "sending; its effective latency starts when the request was due",
            "inference-perf": "before the request is made",
            "llmperf": "before the request is made, on a new connection each time",
            "vLLM's /metrics": "the request was parsed and is about to be tokenized",
        },
        "end of TTFT": {
            "here and vllm bench serve": "first message with choices, even with an empty text",
            "GuideLLM, AIPerf, inference-perf, llmperf": "first text",
            "vLLM's /metrics": "the front end received the engine's first output",
        },
        "constant rate": {
            "here, vllm bench serve, GuideLLM and AIPerf": "equal gaps",
            "inference-perf": "exponential gaps, scaled to the rate",
        },
        "percentile": {
            "here, vllm bench serve, AIPerf and inference-perf": "interpolated linearly",
            "GuideLLM": "step of the cumulative distribution",
            "vLLM's /metrics": "interpolated within a bucket of a histogram",
        },
    }
)
"""What a word means here and elsewhere: word -> program -> meaning (GuideLLM 0.8, AIPerf, inference-perf and llmperf
as of August 2026, vLLM 0.32)."""


def definitions_text() -> list[str]:
    """Return a line for each metric, then what its words mean in other programs."""
    width = max(map(len, SERVING))
    lines = [
        f"{metric.name:<{width}}  {metric.unit}, {metric.better} is better: {metric.definition}"
        for metric in SERVING.values()
    ]
    lines += ["", "the same words elsewhere"]
    for word, meanings in OTHER_MEANINGS.items():
        lines.append(f"{word}")
        lines += [f"  {program}: {meaning}" for program, meaning in meanings.items()]
    return lines


def batch_metrics(run: RunTrace, *, goodput: Mapping[str, float] | None = None) -> list[dict[str, float]]:
    """Compute the metrics of :data:`SERVING` for each batch, each batch being one independent sample.

    TPOT and ITL are left out where every answer is one token long: there they do not exist.

    :param goodput: limits in ms of ``ttft``, ``tpot`` and ``e2el``, as a workload has them.
    :returns: (n_batches,), in the order of the batches.
    :raises MeasurementError: there is no batch, or one without a completed request or without a gap.
    """
    if not run.batches:
        raise no_samples("at least one batch", "none", "the run")
    return [metrics_of_batch(batch, goodput=goodput) for batch in run.batches]


def metrics_of_batch(batch: BatchTrace, *, goodput: Mapping[str, float] | None = None) -> dict[str, float]:
    """Compute the metrics of one batch; see :func:`batch_metrics`."""
    import numpy as np  # imported late: a run that measures nothing never needs it

    from pytest_gpulayout.latencies import ttft_from_timetable

    place = f"batch {batch.index}"
    completed = batch.completed
    if not completed:
        raise no_samples("a completed request", first_error(batch.requests), place)
    duration_s = positive_s(batch.duration_s, place)
    result = throughputs(completed, duration_s)
    del result["total_token_throughput"]
    for latency, sample_ms in latency_samples(completed, place).items():
        median, p99 = np.percentile(sample_ms, (50, 99))
        result |= {f"median_{latency}_ms": float(median), f"p99_{latency}_ms": float(p99)}
    if goodput:
        result["request_goodput"] = count_good(completed, goodput) / duration_s
    if len(intended := ttft_from_timetable(completed)):
        result["median_ttft_intended_ms"] = float(np.median(intended))
    return result


def throughputs(completed: Sequence[RequestTrace], duration_s: float) -> dict[str, float]:
    """Return requests, output tokens and all tokens of completed requests per second, by vLLM's keys."""
    prompt_tokens = sum(request.prompt_tokens for request in completed)
    output_tokens = sum(request.output_tokens for request in completed)
    return {
        "request_throughput": len(completed) / duration_s,
        "output_throughput": output_tokens / duration_s,
        "total_token_throughput": (prompt_tokens + output_tokens) / duration_s,
    }


def count_good(completed: Sequence[RequestTrace], limits: Mapping[str, float]) -> int:
    """Count the requests that keep all limits; as in vLLM, one without a TPOT keeps any limit of it.

    :param limits: in ms, of ``ttft``, ``tpot`` and ``e2el``; keeping one means being at it or below.
    """
    return sum(
        all(value / _NS_PER_MS <= limits[name] for name, value in _limited(request).items() if name in limits)
        for request in completed
    )


def _limited(request: RequestTrace) -> dict[str, float]:
    return {"ttft": request.ttft_ns, "tpot": request.tpot_ns or 0.0, "e2el": request.e2el_ns}


def latency_samples(completed: Sequence[RequestTrace], place: str) -> dict[str, Sample]:
    """Return the latencies of completed requests in ms by name, those that exist.

    :param place: where they come from, for messages.
    :raises MeasurementError: answers of several tokens, all of which arrived in one piece.
    """
    from pytest_gpulayout.latencies import pooled_latencies

    samples = pooled_latencies(completed)
    if len(samples["tpot"]) and not len(samples["itl"]):
        found = "every answer arrived in one chunk, as if something between buffered it"
        raise no_samples("gaps between the chunks of an answer", found, place)
    return {latency: sample for latency, sample in samples.items() if len(sample)}


def positive_s(duration_s: float, place: str) -> float:
    """Return a duration that rates can be divided by.

    :raises MeasurementError: it is not above zero.
    """
    if duration_s <= 0:
        raise no_samples("a duration above 0 s", f"{duration_s} s", place)
    return duration_s


def first_error(requests: Sequence[RequestTrace]) -> str:
    """Say how many requests failed, and how the first one did."""
    errors = [request.error for request in requests if request.error is not None]
    if not errors:
        return "no request at all"
    return f"{len(errors)} of {len(requests)} requests failed, the first with: {errors[0]}"


def no_samples(required: str, found: str, place: str) -> MeasurementError:
    """Return the error that says that a metric does not exist."""
    return MeasurementError(
        f"a metric needs {required}\n  found: {found}\n  in {place}\n  look at the server's log, then measure again"
    )
