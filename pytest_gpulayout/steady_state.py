"""The part of a run in which the load was as intended, and whether the server was in a steady state there.

Knows the window and the test for a trend. Leaves what follows for the measurement to
:mod:`~pytest_gpulayout.validity`.

*Window*, of each batch: from the first to the last instant with at least 95 % of the intended number of requests in
flight, as the Rust ``vllm bench`` cuts it (vLLM 0.33, ``steady_state``). In a closed loop that number is the
concurrency (all requests, where they come at once); arrivals at a rate intend none, and theirs is the median over the
time of the batch. Ramp-up and drain, which ``vllm bench serve`` includes in its throughput, lie outside.

*Trend*: end-to-end latency per output token, of the requests that spent half of their time or more in the window, in
the order of sending, as medians of blocks of one full turn or more (requests of one turn share their engine steps
and are no independent samples; arrivals at a rate have no turns, and a queue that grows would look like a single
one). The blocks of all batches are one series. Mann-Kendall test for a monotone trend (Mann, Econometrica 13, 1945;
Kendall's tau against time, ``scipy.stats.kendalltau``), with the variance that autocorrelated values have (Hamed and
Rao, Journal of Hydrology 204, 1998): a host that changes between two speeds and stays for a while in each must not
pass for a trend. Its size by Theil and Sen (``scipy.stats.theilslopes``). All of it is by rank: an outlier, or a
start of a batch that is slower than the rest, moves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pytest_gpulayout.latencies import chunk_instants
from pytest_gpulayout.trace import BatchTrace, RequestTrace, RunTrace
from pytest_gpulayout.workload import Workload

_NS_PER_S = 1e9
_FULL = 0.95
MIN_BLOCKS = 8
"""Fewer cannot tell a trend from chance at :data:`TREND_P_VALUE`, unless they rise one by one."""
_MAX_BLOCKS = 20
"""More would be shorter than what disturbs a busy host, and neighbours would no longer be independent."""
TREND_P_VALUE = 0.001
"""Evidence that a trend needs: a run on a noisy host must not be called unstable by chance. A steady growth shows far
below it."""
_SIGNIFICANT = 1.96
"""Autocorrelations beyond this many standard errors count (5 %, as Hamed and Rao have it)."""
TREND_DRIFT = 0.20
"""Size that a trend needs. Waves that begin together and drift apart change latencies by up to 10 or 15 %."""

SteadyVerdict = Literal["stable", "unstable", "too_short"]
"""``too_short`` says nothing about the server: there were too few full turns to see a trend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyState:
    """:param windows_ns: (n_batches,), first and last instant, ``None`` of a batch that never was at its full load.

    :param seconds: sum over the windows. :param n_requests: completed ones with half of their time in a window.
    :param request_throughput: req/s in the windows, a request that lies in part inside counting as that part.
    :param output_throughput: tok/s in the windows, tokens interpolated between chunks at the edges.
    :param blocks: that the trend was looked for in. :param drift: growth of the latency per token from the first
        block to the last as a share of the median, along the line by Theil and Sen; above 0 is slower.
    :param p_value: chance of such a trend, or a clearer one, in a server that has none.
    """

    windows_ns: tuple[tuple[int, int] | None, ...]
    seconds: float
    n_requests: int
    request_throughput: float | None
    output_throughput: float | None
    blocks: int
    drift: float | None
    p_value: float | None
    verdict: SteadyVerdict


def find_steady_state(run: RunTrace, workload: Workload) -> SteadyState | None:
    """Return the steady part of a run; ``None`` for a ramp, which has none by intent."""
    if workload.ramp_up is not None:
        return None
    timed = workload.rate is not None and not math.isinf(workload.rate)
    levels = [_target(batch) if timed else workload.in_flight for batch in run.batches]
    windows = [_window(batch, level) for batch, level in zip(run.batches, levels, strict=True)]
    seconds = sum((window[1] - window[0]) / _NS_PER_S for window in windows if window)
    pairs = [(batch, window) for batch, window in zip(run.batches, windows, strict=True) if window]
    steady = [_mostly_within(batch.completed, *window) for batch, window in pairs]
    requests = sum(_share_within(request, *window) for batch, window in pairs for request in batch.completed)
    tokens = sum(_tokens_within(request, *window) for batch, window in pairs for request in batch.completed)
    turn = 1 if timed else workload.in_flight
    blocks = _blocks([_latencies_per_token(requests_of_batch) for requests_of_batch in steady], turn)
    drift, p_value, verdict = _trend(blocks)
    return SteadyState(
        windows_ns=tuple(windows),
        seconds=seconds,
        n_requests=sum(map(len, steady)),
        request_throughput=requests / seconds if seconds else None,
        output_throughput=tokens / seconds if seconds else None,
        blocks=len(blocks),
        drift=drift,
        p_value=p_value,
        verdict=verdict,
    )


# -- the window ---------------------------------------------------------------------------------------------------


def _in_flight(batch: BatchTrace) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Instants at which a request began or ended, and how many were in flight from then on."""
    times = np.array([request.send_ns for request in batch.requests] + [request.end_ns for request in batch.requests])
    steps = np.repeat(np.array([1, -1]), len(batch.requests))
    order = np.lexsort((steps, times))
    return times[order], np.cumsum(steps[order])


def _target(batch: BatchTrace) -> float:
    """Median of the requests in flight, over the time of the batch."""
    times, levels = _in_flight(batch)
    if not len(times):
        return 0.0
    durations = np.append(np.diff(times), 0)
    order = np.argsort(levels, kind="stable")
    passed = np.cumsum(durations[order])
    return float(levels[order][np.searchsorted(passed, passed[-1] / 2)])


def _window(batch: BatchTrace, target: float) -> tuple[int, int] | None:
    times, levels = _in_flight(batch)
    full = np.flatnonzero(levels >= max(_FULL * target, 1))
    if not len(full):
        return None
    start, end = int(times[full[0]]), int(times[full[-1] + 1])
    return (start, end) if end > start else None


def _mostly_within(completed: Sequence[RequestTrace], start: int, end: int) -> list[RequestTrace]:
    return [request for request in completed if start <= (request.send_ns + request.end_ns) / 2 <= end]


def _share_within(request: RequestTrace, start: int, end: int) -> float:
    length = request.end_ns - request.send_ns
    inside = min(request.end_ns, end) - max(request.send_ns, start)
    return max(0, inside) / length if length else float(inside >= 0)


def _tokens_within(request: RequestTrace, start: int, end: int) -> float:
    if request.chunk_ns[0] >= start and request.chunk_ns[-1] <= end:
        return request.output_tokens
    instants = chunk_instants(request)
    even = request.output_tokens / len(instants)
    tokens = np.full(len(instants), even) if request.chunk_tokens is None else np.asarray(request.chunk_tokens)
    before, after = np.interp([start, end], instants, np.cumsum(tokens), left=0.0)
    return float(after - before)


# -- the trend ----------------------------------------------------------------------------------------------------


def _latencies_per_token(requests: Sequence[RequestTrace]) -> NDArray[np.float64]:
    return np.array([request.e2el_ns / max(request.output_tokens, 1) for request in requests])


def _blocks(batches: Sequence[NDArray[np.float64]], turn: int) -> list[float]:
    """Medians of blocks of at least one turn of requests, in order; about 20 in all, one per batch at least."""
    total = sum(map(len, batches))
    blocks: list[float] = []
    for values in batches:
        if len(values):
            count = max(1, min(len(values) // turn, round(_MAX_BLOCKS * len(values) / total)))
            blocks += [float(np.median(block)) for block in np.array_split(values, count)]
    return blocks


def _trend(blocks: Sequence[float]) -> tuple[float | None, float | None, SteadyVerdict]:
    from scipy import stats  # imported late: it takes longer to load than everything else here

    if len(blocks) < MIN_BLOCKS:
        return None, None, "too_short"
    if min(blocks) == max(blocks):
        return 0.0, 1.0, "stable"
    count = len(blocks)
    slope = float(stats.theilslopes(blocks).slope)
    drift = slope * (count - 1) / float(np.median(blocks))
    tau = float(stats.kendalltau(range(count), blocks).statistic)
    ranks = stats.rankdata(np.asarray(blocks) - slope * np.arange(count))
    variance = 2 * (2 * count + 5) / (9 * count * (count - 1)) * _inflation(ranks)
    p_value = float(2 * stats.norm.sf(abs(tau) / math.sqrt(variance)))
    unstable = p_value < TREND_P_VALUE and abs(drift) > TREND_DRIFT
    return drift, p_value, "unstable" if unstable else "stable"


def _inflation(ranks: NDArray[np.float64]) -> float:
    """How much wider Kendall's tau scatters than of independent values, at least 1 (Hamed and Rao, equation 9).

    :param ranks: of the values without their trend, in order of time.
    """
    count = len(ranks)
    deviations = ranks - ranks.mean()
    if not deviations.any():  # all of it is trend
        return 1.0
    correlations = np.correlate(deviations, deviations, "full")[count:] / np.sum(deviations**2)
    lags = np.arange(1, count)
    weights = (count - lags) * (count - lags - 1) * (count - lags - 2)
    counted = np.abs(correlations) > _SIGNIFICANT / math.sqrt(count)
    total = float(np.sum(weights[counted] * correlations[counted]))
    return max(1.0, 1 + 2 / (count * (count - 1) * (count - 2)) * total)
