"""Writes a run as ``vllm bench serve --save-result --save-detailed`` does, so that whatever reads those reads ours.

Knows vLLM's keys and their definitions (vLLM 0.32, ``vllm/benchmarks/serve.py``: ``calculate_metrics``,
``benchmark``, ``main_async``). Leaves what vLLM has no key for to :mod:`~pytest_gpulayout.result_details`, which goes
into one object called ``gpulayout``, and reading to :mod:`~pytest_gpulayout.bench_result`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from pytest_gpulayout.metrics import (
    LATENCIES,
    PERCENTILES,
    count_good,
    first_error,
    latency_samples,
    no_samples,
    positive_s,
    throughputs,
)
from pytest_gpulayout.trace import RequestTrace, RunTrace
from pytest_gpulayout.workload import Workload

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_NS_PER_MS = 1e6
_NS_PER_S = 1e9
_BACKENDS = {"completions": "openai", "chat": "openai-chat"}
_STATISTICS = ("mean", "median", "std", *(f"p{percentile}" for percentile in PERCENTILES))


def vllm_result(run: RunTrace, workload: Workload, *, model: str, backend: str | None = None) -> dict[str, Any]:
    """Return vLLM's result document, plus our object ``gpulayout``.

    As in vLLM's files a failed request is 0.0 in ``ttfts`` and ``latencies``; in ``gpulayout`` it is ``null``.
    ``duration`` is the sum over the batches; statistics that do not exist (TPOT of one token) are ``null``, where
    vLLM writes 0.

    :param backend: vLLM's name of the API that was spoken; of the workload's API unless given.
    :raises MeasurementError: no request completed.
    """
    from pytest_gpulayout.result_details import own_object

    completed = tuple(request for request in run.requests if request.ok)
    if not completed:
        raise no_samples("a completed request", first_error(run.requests), "the run")
    duration_s = positive_s(run.duration_s, "the run")
    good = count_good(completed, workload.goodput) / duration_s if workload.goodput else None
    return {
        **_header(run, workload, model, backend or _BACKENDS[workload.api]),
        "duration": duration_s,
        "completed": len(completed),
        "failed": len(run.failed),
        "total_input_tokens": sum(request.prompt_tokens for request in completed),
        "total_output_tokens": sum(request.output_tokens for request in completed),
        **throughputs(completed, duration_s),
        "request_goodput": good,
        **_details(run, workload),
        **_peaks(completed),
        "rtfx": 0.0,
        **_latencies(completed),
        **_client_queue(run, workload),
        "gpulayout": own_object(run, workload),
    }


def _header(run: RunTrace, workload: Workload, model: str, backend: str) -> dict[str, Any]:
    header = {
        "date": datetime.fromtimestamp(run.started_s).strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": backend,
        "backend": backend,
        "label": None,
        "model_id": model,
        "tokenizer_id": model,
        "num_prompts": len(run.requests),
        "request_rate": _number(math.inf if workload.rate is None else workload.rate),
        "burstiness": _number(workload.burstiness),
        "max_concurrency": workload.concurrency,
    }
    if workload.ramp_up is not None:
        header |= {
            "ramp_up_strategy": workload.ramp_up.strategy,
            "ramp_up_start_rps": workload.ramp_up.start_rate,
            "ramp_up_end_rps": workload.ramp_up.end_rate,
        }
    return header


def _number(value: float) -> float | str:
    """JSON has no infinity; vLLM writes the word, and its plots read the word."""
    return "inf" if math.isinf(value) else value


def _details(run: RunTrace, workload: Workload) -> dict[str, Any]:
    requests = run.requests
    return {
        "input_lens": [request.prompt_tokens for request in requests],
        "output_lens": [request.output_tokens if request.ok else 0 for request in requests],
        "ttfts": [request.ttft_ns / _NS_PER_S if request.ok else 0.0 for request in requests],
        "itls": [_gaps_s(request) if request.ok else [] for request in requests],
        "latencies": [request.e2el_ns / _NS_PER_S if request.ok else 0.0 for request in requests],
        "start_times": [request.send_ns / _NS_PER_S for request in requests],
        "queue_times": [waited_ns / _NS_PER_S for waited_ns in _queue_times_ns(run, workload)],
        "generated_texts": [request.text for request in requests],
        "errors": [request.error or "" for request in requests],
    }


def _gaps_s(request: RequestTrace) -> list[float]:
    import numpy as np

    from pytest_gpulayout.latencies import chunk_instants

    gaps: list[float] = (np.diff(chunk_instants(request)) / _NS_PER_S).tolist()
    return gaps


def _queue_times_ns(run: RunTrace, workload: Workload) -> list[int]:
    """How long each request waited for a place in the client, (n_requests,).

    vLLM runs a closed loop as arrivals that come all at once and wait for ``--max-concurrency``, so there it counts
    from the start.
    """
    if workload.is_open:
        return [request.queued_ns for request in run.requests]
    return [max(0, request.send_ns - batch.start_ns) for batch in run.batches for request in batch.requests]


def _latencies(completed: Sequence[RequestTrace]) -> dict[str, float | None]:
    samples = latency_samples(completed, "the run")
    result: dict[str, float | None] = {}
    for latency in LATENCIES:
        names = [f"{statistic}_{latency}_ms" for statistic in _STATISTICS]
        result |= _statistics(latency, samples[latency]) if latency in samples else dict.fromkeys(names)
    return result


def _client_queue(run: RunTrace, workload: Workload) -> dict[str, float]:
    """Statistics that vLLM has where there is a limit on what is in flight; the second one needs a rate, too."""
    if workload.concurrency is None:
        return {}
    pairs = zip(run.requests, _queue_times_ns(run, workload), strict=True)
    waited = [(request, waited_ns) for request, waited_ns in pairs if request.ok]
    result = _statistics("client_queue_time", [waited_ns / _NS_PER_MS for _, waited_ns in waited])
    if workload.rate is not None and not math.isinf(workload.rate):
        latencies = [(request.e2el_ns + waited_ns) / _NS_PER_MS for request, waited_ns in waited]
        result |= _statistics("e2el_including_client_queue", latencies)
    return result


def _statistics(latency: str, sample_ms: ArrayLike) -> dict[str, float]:
    import numpy as np

    sample = np.asarray(sample_ms, dtype=np.float64)
    values = (np.mean(sample), np.median(sample), np.std(sample), *np.percentile(sample, PERCENTILES))
    return {f"{statistic}_{latency}_ms": float(value) for statistic, value in zip(_STATISTICS, values, strict=True)}


def _peaks(completed: Sequence[RequestTrace]) -> dict[str, float]:
    """Most chunks, and most requests in flight, in any second counted from the first request (as vLLM counts)."""
    import numpy as np

    from pytest_gpulayout.latencies import chunk_instants

    first_ns = min(request.send_ns for request in completed)
    instants = np.concatenate([chunk_instants(request) for request in completed])
    begun = np.array([request.send_ns - first_ns for request in completed]) // int(_NS_PER_S)
    ended = np.array([request.chunk_ns[-1] - first_ns for request in completed]) // int(_NS_PER_S)
    seconds = int(ended.max()) + 2
    active = np.cumsum(np.bincount(begun, minlength=seconds) - np.bincount(ended + 1, minlength=seconds))
    chunks = np.bincount((instants - first_ns) // int(_NS_PER_S))
    return {"max_output_tokens_per_s": float(chunks.max()), "max_concurrent_requests": int(active.max())}
