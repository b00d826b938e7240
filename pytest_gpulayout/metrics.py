"""Latency and throughput from traces, one formula each, as ``vllm bench serve`` computes them.

Source of every formula and key: vLLM 0.32, ``vllm/benchmarks/serve.py`` (``calculate_metrics``, ``benchmark``,
``main_async``). Percentiles interpolate linearly (``numpy.percentile``), the standard deviation is the
population's, ITL pools the gaps of all requests. Other programs mean other things by the same words: guidellm's
TPOT counts the first token, aiperf's ITL is vLLM's TPOT.

One rule differs on purpose: an empty sample has no median. vLLM writes 0 there; we raise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any, Literal

from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.trace import BatchTrace, RequestTrace, RunTrace
from pytest_gpulayout.workload import Workload

_NS_PER_MS = 1e6
_NS_PER_S = 1e9
_PERCENTILES = (50, 90, 95, 99)

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


_LATENCIES = {
    "ttft": "time from the first byte sent to the first chunk of the answer",
    "tpot": "(E2EL - TTFT) / (output tokens - 1), of the requests with more than one output token",
    "itl": "gap between successive chunks, the gaps of all requests pooled",
    "e2el": "time from the first byte sent to the last chunk of the answer",
}
_SPREADS = {"median": "median over a batch", "p99": "99th percentile over a batch, interpolated linearly"}
_THROUGHPUTS = (
    Metric("request_throughput", "req/s", "higher", "requests completed / duration of the batch"),
    Metric("output_throughput", "tok/s", "higher", "output tokens of completed requests / duration of the batch"),
)

METRICS: Mapping[str, Metric] = MappingProxyType(
    {metric.name: metric for metric in _THROUGHPUTS}
    | {
        f"{spread}_{latency}_ms": Metric(
            f"{spread}_{latency}_ms", "ms", "lower", f"{latency.upper()}, {over}: {definition}"
        )
        for latency, definition in _LATENCIES.items()
        for spread, over in _SPREADS.items()
    }
)
"""Everything that :func:`batch_metrics` returns, by name."""


def batch_metrics(run: RunTrace) -> list[dict[str, float]]:
    """Compute the metrics of :data:`METRICS` for each batch, each batch being one independent sample.

    TPOT and ITL are left out where every answer is one token long: there they do not exist.

    :returns: (n_batches,), in the order of the batches.
    :raises MeasurementError: there is no batch, or one without a completed request or without a gap.
    """
    if not run.batches:
        raise _no_samples("at least one batch", "none", "the run")
    return [_metrics_of(batch) for batch in run.batches]


def _metrics_of(batch: BatchTrace) -> dict[str, float]:
    place = f"batch {batch.index}"
    completed = batch.completed
    if not completed:
        raise _no_samples("a completed request", _first_error(batch.requests), place)
    result = _throughputs(completed, _positive_s(batch.duration_s, place))
    del result["total_token_throughput"]
    for latency, sample in _latency_samples(completed, place).items():
        summary = _summary(latency, sample)
        result |= {name: summary[name] for name in (f"median_{latency}_ms", f"p99_{latency}_ms")}
    return result


def vllm_result(run: RunTrace, workload: Workload, *, model: str, backend: str = "openai") -> dict[str, Any]:
    """Write a run as ``vllm bench serve --save-result --save-detailed`` does, plus our object ``gpulayout``.

    As in vLLM's files a failed request is 0.0 in ``ttfts`` and ``latencies``; in ``gpulayout`` it is ``null``.
    ``duration`` is the sum over the batches; statistics that do not exist (TPOT of one token) are ``null``.

    :param backend: vLLM's name of the API that was spoken; ``openai`` is ``/v1/completions``.
    :raises MeasurementError: no request completed.
    """
    completed = tuple(request for request in run.requests if request.ok)
    if not completed:
        raise _no_samples("a completed request", _first_error(run.requests), "the run")
    duration_s = _positive_s(run.duration_s, "the run")
    return {
        **_vllm_header(run, workload, model, backend),
        "duration": duration_s,
        "completed": len(completed),
        "failed": len(run.failed),
        "total_input_tokens": sum(request.prompt_tokens for request in completed),
        "total_output_tokens": sum(request.output_tokens for request in completed),
        **_throughputs(completed, duration_s),
        "request_goodput": None,
        **_vllm_details(run.requests),
        **_peaks(completed),
        "rtfx": 0.0,
        **_vllm_latencies(completed),
        "gpulayout": _own_object(run, workload),
    }


def _vllm_header(run: RunTrace, workload: Workload, model: str, backend: str) -> dict[str, Any]:
    return {
        "date": datetime.fromtimestamp(run.started_s).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": backend,
        "backend": backend,
        "label": None,
        "model_id": model,
        "tokenizer_id": model,
        "num_prompts": len(run.requests),
        "request_rate": "inf",
        "burstiness": 1.0,
        "max_concurrency": workload.concurrency,
    }


def _vllm_details(requests: Sequence[RequestTrace]) -> dict[str, Any]:
    return {
        "input_lens": [request.prompt_tokens for request in requests],
        "output_lens": [request.output_tokens if request.ok else 0 for request in requests],
        "ttfts": [request.ttft_ns / _NS_PER_S if request.ok else 0.0 for request in requests],
        "itls": [[gap / _NS_PER_S for gap in request.itl_ns] if request.ok else [] for request in requests],
        "latencies": [request.e2el_ns / _NS_PER_S if request.ok else 0.0 for request in requests],
        "start_times": [request.send_ns / _NS_PER_S for request in requests],
        # Each stream has its own connection: nothing ever waits for a place in the client.
        "queue_times": [0.0 for _ in requests],
        "generated_texts": [request.text for request in requests],
        "errors": [request.error or "" for request in requests],
    }


def _vllm_latencies(completed: Sequence[RequestTrace]) -> dict[str, float | None]:
    samples = _latency_samples(completed, "the run")
    result: dict[str, float | None] = {}
    for latency in _LATENCIES:
        names = [f"{word}_{latency}_ms" for word in ("mean", "median", "std", *(f"p{p}" for p in _PERCENTILES))]
        result |= _summary(latency, samples[latency]) if latency in samples else dict.fromkeys(names)
    return result


def _throughputs(completed: Sequence[RequestTrace], duration_s: float) -> dict[str, float]:
    prompt_tokens = sum(request.prompt_tokens for request in completed)
    output_tokens = sum(request.output_tokens for request in completed)
    return {
        "request_throughput": len(completed) / duration_s,
        "output_throughput": output_tokens / duration_s,
        "total_token_throughput": (prompt_tokens + output_tokens) / duration_s,
    }


def _latency_samples(completed: Sequence[RequestTrace], place: str) -> dict[str, list[float]]:
    """Pool the latencies of completed requests, in ns, by name.

    :raises MeasurementError: answers of several tokens, all of which arrived in one piece.
    """
    samples: dict[str, list[float]] = {
        "ttft": [request.ttft_ns for request in completed],
        "tpot": [tpot for request in completed if (tpot := request.tpot_ns) is not None],
        "itl": [gap for request in completed for gap in request.itl_ns],
        "e2el": [request.e2el_ns for request in completed],
    }
    if samples["tpot"] and not samples["itl"]:
        found = "every answer arrived in one chunk, as if something between buffered it"
        raise _no_samples("gaps between the chunks of an answer", found, place)
    return {latency: sample for latency, sample in samples.items() if sample}


def _summary(latency: str, sample_ns: Sequence[float]) -> dict[str, float]:
    import numpy as np

    sample_ms = np.asarray(sample_ns, dtype=np.float64) / _NS_PER_MS
    percentiles = np.percentile(sample_ms, _PERCENTILES)
    return {
        f"mean_{latency}_ms": float(np.mean(sample_ms)),
        f"median_{latency}_ms": float(np.median(sample_ms)),
        f"std_{latency}_ms": float(np.std(sample_ms)),
    } | {f"p{p}_{latency}_ms": float(value) for p, value in zip(_PERCENTILES, percentiles, strict=True)}


def _peaks(completed: Sequence[RequestTrace]) -> dict[str, float]:
    """Most chunks, and most requests in flight, in any second counted from the first request (as vLLM counts)."""
    first_ns = min(request.send_ns for request in completed)
    chunks: dict[int, int] = {}
    active: dict[int, int] = {}
    for request in completed:
        for chunk_ns in request.chunk_ns:
            second = int((chunk_ns - first_ns) // _NS_PER_S)
            chunks[second] = chunks.get(second, 0) + 1
        start, end = request.send_ns - first_ns, request.chunk_ns[-1] - first_ns
        for second in range(int(start // _NS_PER_S), int(end // _NS_PER_S) + 1):
            active[second] = active.get(second, 0) + 1
    return {
        "max_output_tokens_per_s": float(max(chunks.values())),
        "max_concurrent_requests": max(active.values()),
    }


def _own_object(run: RunTrace, workload: Workload) -> dict[str, Any]:
    return {
        "workload": workload.to_document(),
        "workload_fingerprint": workload.fingerprint(),
        "seed": run.seed,
        "warmup_requests": run.warmup_requests,
        "timestamp_source": run.timestamp_source,
        "ttft_clock": "starts with the first byte of an encoded request on an open connection",
        "system_fingerprints": list(run.fingerprints),
        "client": {
            "scheduling": run.scheduling,
            "connections": run.connections,
            "reconnects": run.reconnects,
            "loop_lag_max_ms": run.loop_lag_max_ns / _NS_PER_MS,
        },
        "batches": [_batch_object(batch) for batch in run.batches],
        "requests": [_request_object(request) for request in run.requests],
    }


def _batch_object(batch: BatchTrace) -> dict[str, Any]:
    return {
        "index": batch.index,
        "duration_s": batch.duration_s,
        "completed": len(batch.completed),
        "failed": len(batch.requests) - len(batch.completed),
        "reconnects": batch.reconnects,
        "loop_lag_max_ms": batch.loop_lag_max_ns / _NS_PER_MS,
        "clients": [asdict(client) for client in batch.clients],
        "metrics": _metrics_of(batch) if batch.completed else None,
    }


def _request_object(request: RequestTrace) -> dict[str, Any]:
    tpot_ns = request.tpot_ns if request.ok else None
    return {
        "index": request.index,
        "batch": request.batch,
        "ttft_ms": request.ttft_ns / _NS_PER_MS if request.ok else None,
        "tpot_ms": tpot_ns / _NS_PER_MS if tpot_ns is not None else None,
        "e2el_ms": request.e2el_ns / _NS_PER_MS if request.ok else None,
        "chunks": len(request.chunk_ns),
        "error": request.error,
    }


def _positive_s(duration_s: float, place: str) -> float:
    if duration_s <= 0:
        raise _no_samples("a duration above 0 s", f"{duration_s} s", place)
    return duration_s


def _first_error(requests: Sequence[RequestTrace]) -> str:
    errors = [request.error for request in requests if request.error is not None]
    if not errors:
        return "no request at all"
    return f"{len(errors)} of {len(requests)} requests failed, the first with: {errors[0]}"


def _no_samples(required: str, found: str, place: str) -> MeasurementError:
    return MeasurementError(
        f"a metric needs {required}\n  found: {found}\n  in {place}\n  look at the server's log, then measure again"
    )
