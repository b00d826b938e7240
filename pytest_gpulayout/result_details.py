"""What a result says beyond the keys of ``vllm bench serve``: the one object ``gpulayout`` in our documents.

Knows its keys, which ``docs/measuring.md`` lists. Times are in ms unless the key says otherwise, instants in ns of
``CLOCK_MONOTONIC``; what does not exist, or is not known, is ``null`` and never 0. Leaves vLLM's own keys to
:mod:`~pytest_gpulayout.vllm_result`. Brings numpy: import it late.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from pytest_gpulayout.agreement import agreement_document
from pytest_gpulayout.latencies import (
    Sample,
    adjusted_tpot_ms,
    adjusted_tpots,
    inter_chunk_latencies,
    pooled_latencies,
    token_weighted_gaps,
    tokens_per_chunk,
    ttft_from_last_byte,
    ttft_from_timetable,
)
from pytest_gpulayout.metrics import TAIL_REQUESTS, count_good, metrics_of_batch
from pytest_gpulayout.replicas import replica_shares
from pytest_gpulayout.server_window import ServerWindow, ttft_split
from pytest_gpulayout.steady_state import find_steady_state
from pytest_gpulayout.telemetry import Telemetry, summarize
from pytest_gpulayout.trace import BatchTrace, RequestTrace, RunTrace
from pytest_gpulayout.workload import Workload

DETAILS_VERSION = 1
"""Counts up when a key of the object changes its meaning or goes."""

COALESCED_BELOW_MS = 0.5
"""Few engines step that fast: many shorter gaps mean that something on the way sent held-back chunks together."""

_NS_PER_MS = 1e6
_NS_PER_S = 1e9
_LAG_QUANTILES = ("p50", "p99", "max")


def own_object(run: RunTrace, workload: Workload) -> dict[str, Any]:
    """Return the object ``gpulayout`` of a run with at least one completed request."""
    completed = tuple(request for request in run.requests if request.ok)
    seen = run.observations
    return {
        "version": DETAILS_VERSION,
        "workload": workload.to_document(),
        "workload_fingerprint": workload.fingerprint(),
        "seed": run.seed,
        "schedule_ns": [list(offsets) for offsets in run.schedule_ns] or None,
        "warmup_requests": run.warmup_requests,
        "timestamp_source": run.timestamp_source,
        "sent_source": run.sent_source,
        "ttft_clock": "starts with the first byte of an encoded request on an open connection",
        "system_fingerprints": list(run.fingerprints),
        "latencies_ms": _latencies(completed),
        "chunks": _chunks(completed),
        "goodput": _goodput(run, completed, workload),
        "steady_state": jsonable(find_steady_state(run, workload)),
        "client": _client(run),
        "server": None if seen.server is None else _server(seen.server, run),
        "telemetry": None if seen.telemetry is None else _telemetry(seen.telemetry),
        "batches": [_batch(batch, workload) for batch in run.batches],
        "requests": [_request(request) for request in run.requests],
    }


# -- latencies ----------------------------------------------------------------------------------------------------


def _latencies(completed: Sequence[RequestTrace]) -> dict[str, dict[str, float | None]]:
    pooled = pooled_latencies(completed)
    samples = {
        "ttft": pooled["ttft"],
        "ttft_socket": ttft_from_last_byte(completed),
        "ttft_intended": ttft_from_timetable(completed),
        "tpot": pooled["tpot"],
        "tpot_adjusted": adjusted_tpots(completed),
        "itl": pooled["itl"],
        "icl": inter_chunk_latencies(completed),
        "itl_token": token_weighted_gaps(completed),
        "e2el": pooled["e2el"],
    }
    return {name: distribution(sample, requests=len(completed)) for name, sample in samples.items()}


def distribution(sample_ms: Sample, *, requests: int) -> dict[str, float | None]:
    """Return size, mean, median, standard deviation and tails of a sample, a tail only with enough requests.

    :param requests: that the sample comes from; what counts for the tails, since gaps of one request are not
        independent of each other.
    """
    n = len(sample_ms)
    tails = {
        f"p{percentile}": float(np.percentile(sample_ms, percentile)) if n and requests >= enough else None
        for percentile, enough in TAIL_REQUESTS.items()
    }
    if not n:
        return {"n": 0, "requests": requests, "mean": None, "median": None, "std": None, **tails}
    mean, median, std = (float(of(sample_ms)) for of in (np.mean, np.median, np.std))
    return {"n": n, "requests": requests, "mean": mean, "median": median, "std": std, **tails}


def _chunks(completed: Sequence[RequestTrace]) -> dict[str, float | None]:
    gaps = pooled_latencies(completed)["itl"]
    tokens = tokens_per_chunk(completed)
    return {
        "gaps": len(gaps),
        "coalesced_share": float(np.mean(gaps < COALESCED_BELOW_MS)) if len(gaps) else None,
        "coalesced_below_ms": COALESCED_BELOW_MS,
        "tokens_per_chunk_p50": float(np.median(tokens)) if len(tokens) else None,
        "tokens_per_chunk_max": int(tokens.max()) if len(tokens) else None,
    }


def _goodput(run: RunTrace, completed: Sequence[RequestTrace], workload: Workload) -> dict[str, Any] | None:
    if not workload.goodput:
        return None
    good = count_good(completed, workload.goodput)
    return {
        "limits_ms": dict(workload.goodput),
        "good": good,
        "share": good / len(run.requests),
        "req_per_s": good / run.duration_s,
    }


# -- client, server, devices ----------------------------------------------------------------------------------------


def _client(run: RunTrace) -> dict[str, Any]:
    works = [client for batch in run.batches for client in batch.clients]
    events = sum(work.events for work in works)
    cpu_ns = sum(work.cpu_ns for work in works)
    waits = [work.wait_ns for work in works if work.wait_ns is not None]
    return {
        "scheduling": run.scheduling,
        "workers": max((len(batch.clients) for batch in run.batches), default=0),
        "cpus": sorted({cpu for work in works for cpu in work.cpus}),
        "connections": run.connections,
        "reconnects": run.reconnects,
        "connect_ms": sum(request.connect_ns for request in run.requests) / _NS_PER_MS,
        "events": events,
        "unstamped": sum(work.unstamped for work in works),
        "cpu_us_per_event": cpu_ns / events / 1e3 if events else None,
        "cpu_s": cpu_ns / _NS_PER_S,
        "cpu_wait_s": sum(waits) / _NS_PER_S if waits else None,
        "loop_lag_max_ms": run.loop_lag_max_ns / _NS_PER_MS,
        "read_lag_ms": _worst_lag([work.read_lag_ns for work in works]),
        "send_lag_ms": _worst_lag([work.send_lag_ns for work in works]),
        "calibration": jsonable(run.observations.calibration),
    }


def _worst_lag(lags_ns: Sequence[tuple[int, int, int] | None]) -> dict[str, float] | None:
    """Return p50, p99 and max, each of the process and batch where it was worst."""
    known = [lag for lag in lags_ns if lag is not None]
    if not known:
        return None
    worst = (max(values) / _NS_PER_MS for values in zip(*known, strict=True))
    return dict(zip(_LAG_QUANTILES, worst, strict=True))


def _server(window: ServerWindow, run: RunTrace) -> dict[str, Any]:
    return {
        **jsonable(window),
        "prompt_tokens": window.prompt_tokens,
        "generation_tokens": window.generation_tokens,
        "prefix_hit_rate": window.prefix_hit_rate,
        "replica_shares": jsonable(replica_shares(window)),
        "mean_ttft_split_ms": ttft_split(run.requests),
        "agreement": agreement_document(run, window) if window.engines else None,
    }


def _telemetry(telemetry: Telemetry) -> dict[str, Any]:
    return {"summary": summarize(telemetry), **jsonable(telemetry)}


# -- batches and requests -------------------------------------------------------------------------------------------


def _batch(batch: BatchTrace, workload: Workload) -> dict[str, Any]:
    return {
        "index": batch.index,
        "start_ns": batch.start_ns,
        "duration_s": batch.duration_s,
        "completed": len(batch.completed),
        "failed": len(batch.requests) - len(batch.completed),
        "reconnects": batch.reconnects,
        "loop_lag_max_ms": batch.loop_lag_max_ns / _NS_PER_MS,
        "clients": jsonable(batch.clients),
        "metrics": metrics_of_batch(batch, goodput=workload.goodput) if batch.completed else None,
    }


def _request(request: RequestTrace) -> dict[str, Any]:
    first_ns = request.chunk_ns[0] if request.ok else None
    return {
        "index": request.index,
        "batch": request.batch,
        "worker": request.worker,
        "request_id": request.request_id,
        "prompt_tokens": request.prompt_tokens,
        "output_tokens": request.output_tokens,
        "chunks": len(request.chunk_ns),
        "ttft_ms": _since(request.send_ns, first_ns),
        "ttft_socket_ms": _since(request.sent_ns, first_ns),
        "ttft_intended_ms": _since(request.intended_ns, first_ns),
        "first_byte_ms": _since(request.send_ns, request.first_byte_ns),
        "tpot_ms": _in_ms(request.tpot_ns) if request.ok else None,
        "tpot_adjusted_ms": adjusted_tpot_ms(request) if request.ok else None,
        "e2el_ms": _in_ms(request.e2el_ns) if request.ok else None,
        "queued_ms": _in_ms(request.queued_ns),
        "connect_ms": _in_ms(request.connect_ns),
        "server": jsonable(request.server),
        "error": request.error,
    }


def _since(start_ns: int | None, end_ns: int | None) -> float | None:
    return None if start_ns is None or end_ns is None else (end_ns - start_ns) / _NS_PER_MS


def _in_ms(value_ns: float | None) -> float | None:
    return None if value_ns is None else value_ns / _NS_PER_MS


def jsonable(value: Any) -> Any:
    """Return a value of ours as JSON has it: dataclasses and mappings as objects, sequences as arrays.

    A number that is not finite becomes ``None``, since JSON has none.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return [jsonable(item) for item in value]
