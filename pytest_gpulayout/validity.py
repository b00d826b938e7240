"""Whether a run's numbers may be used: each way in which they can be wrong without looking wrong, by name.

Knows the rules and their limits. Leaves collecting the facts to the load driver and the observers; what nobody looked
at (``None``) is no problem, since a user's own driver need not look at everything.

What the client's processes tell is judged by the *typical batch*: the median over the batches of the worst process. A
run's value is the median of its batches as well, so what disturbed one batch alone has not moved it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pytest_gpulayout.agreement import agreement
from pytest_gpulayout.baseline import is_measurement
from pytest_gpulayout.metrics import batch_metrics
from pytest_gpulayout.replicas import uneven_shares
from pytest_gpulayout.stats import median
from pytest_gpulayout.telemetry import foreign_load, slowdowns

if TYPE_CHECKING:
    from pytest_gpulayout.calibration import Calibration
    from pytest_gpulayout.server_window import ServerWindow
    from pytest_gpulayout.trace import BatchTrace, ClientWork, RunTrace
    from pytest_gpulayout.workload import Workload

ProblemKind = Literal[
    "failed-requests",
    "token-counts",
    "client-bound",
    "prefix-cache",
    "jit-compilation",
    "throttled",
    "foreign-process",
    "unstable",
    "too-few-samples",
    "several-servers",
    "unfit-metrics",
    "uneven-shares",
]
"""What is wrong with a run; ``docs/measuring.md`` says how each is found and what to do."""

TRANSIENT: frozenset[ProblemKind] = frozenset({"client-bound", "throttled", "foreign-process", "unstable"})
"""What the machine's other work or heat may have done to one start, and may well not do to the next. What is not here
belongs to the server, the workload or the address, and a fresh start would only hide it."""

LEAST_COMPLETED = 8
"""Requests that a run of one batch needs. The gate judges medians, and the range of n samples fails to hold the true
median with probability 2 * 0.5**n: with 8 this is 0.8 %, the first below the 1 % that a gate may call falsely. With
several batches their spread shows how little a few requests say, and widens the verdict's interval."""

TTFT_SHARE = 0.05
"""How much of the median TTFT the client may be wrong by: below the smallest change of TTFT that a gate looks for."""
ITL_SHARE = 0.10
"""How much of the median ITL a single gap may be wrong by. Errors of gaps cancel in TPOT, so more than of TTFT."""
LEAST_ERROR_MS = 1.0
"""What no request of a language model is short enough to notice; reading answers that come together and sending as
many requests may take as long."""

TURNAROUND_SHARE = 0.02
"""How long, as a share of E2EL, a closed loop may typically take from an answer to the next request: its throughput
is too low by that much, and 2 % is below every tolerance in use."""
TAIL_TURNAROUND_SHARE = 0.20
"""The same for one request in a hundred, which moves the throughput by a hundredth of it."""
ARRIVAL_SHARE = 0.05
"""How late, as a share of the mean gap or of the median TTFT, one arrival in a hundred may be: less changes neither
the pattern of the arrivals nor the queue that they find."""
STOP_SHARE = 0.20
"""Longest stop of the client, as a share of the median TTFT, where it reads the clock itself."""
TIME_SLICE_MS = 5.0
"""What the scheduler of a busy host may take from any process now and then (Linux, EEVDF: slices of about 3 ms)."""
MOST_CPU = 0.90
"""Share of a core. Beyond it the client is as likely the one that cannot keep up as the server."""
MOST_UNSTAMPED = 0.01
"""Share of the arrivals that may lack the kernel's timestamp; beyond it a 99th percentile may rest on them."""

MOST_PREFIX_HITS = 0.01
"""Share of the prompt tokens that may be found in the prefix cache: random prompts share a token now and then."""

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a run's numbers must be neither judged nor stored.

    :param text: a sentence with the numbers, and what to do.
    """

    kind: ProblemKind
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def find_problems(run: RunTrace, workload: Workload) -> tuple[Problem, ...]:
    """Return all that is wrong with a run; empty when its numbers may be used.

    :raises MeasurementError: the run has no batch, or a request without a failure and without an answer.
    """
    seen = run.observations
    return (
        *_failed_requests(run),
        *_several_servers(run),
        *_too_few_samples(run),
        *_unfit_metrics(run, workload),
        *_token_counts(run),
        *_client_bound(run, workload),
        *_prefix_cache(seen.server, workload),
        *_jit_compilation(seen.server),
        *_throttled(run),
        *_foreign_process(run),
        *_uneven_shares(run),
        *_unstable(run, workload),
    )


# -- the requests ------------------------------------------------------------------------------------------------


def _failed_requests(run: RunTrace) -> Iterator[Problem]:
    if run.failed:
        count = f"{len(run.failed)} of {len(run.requests)} requests failed"
        yield Problem("failed-requests", f"{count}; the first: {run.failed[0].error}")


def _several_servers(run: RunTrace) -> Iterator[Problem]:
    first, more = run.fingerprints[:_SHOWN], len(run.fingerprints) - _SHOWN
    if len(first) > 1:
        found = ", ".join(first) + (f" and {more} more" if more > 0 else "")
        yield Problem("several-servers", f"servers that differ answered: {found}; measure one of them at a time")


def _too_few_samples(run: RunTrace) -> Iterator[Problem]:
    completed = len(run.requests) - len(run.failed)
    batches = sum(bool(batch.completed) for batch in run.batches)
    if batches < 2 and completed < LEAST_COMPLETED and not run.failed:
        yield Problem(
            "too-few-samples",
            f"{completed} completed in a single batch, where a median needs {LEAST_COMPLETED}; "
            "raise requests or batches of the workload",
        )


def _unfit_metrics(run: RunTrace, workload: Workload) -> Iterator[Problem]:
    """A logarithm is taken of every metric. Failed requests explain a metric that does not exist."""
    if run.failed:
        return
    values = (item for batch in batch_metrics(run, goodput=workload.goodput) for item in batch.items())
    if unfit := sorted({name for name, value in values if not is_measurement([value])}):
        why = "no request kept its limits" if unfit == ["request_goodput"] else "is something buffering the answers?"
        yield Problem("unfit-metrics", f"zero or not finite: {', '.join(unfit)}; {why}")


def _token_counts(run: RunTrace) -> Iterator[Problem]:
    uncounted = sum(request.ok and not request.output_tokens for request in run.requests)
    if uncounted:
        yield Problem(
            "token-counts",
            f"the server did not count the tokens of {uncounted} of {len(run.requests)} requests; "
            "it must answer stream_options.include_usage with a usage message",
        )
    if run.observations.server is not None and run.observations.server.engines:
        yield from (Problem("token-counts", text) for text in agreement(run, run.observations.server))


# -- the client --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Typical:
    """Medians over a run in ms, against which errors are held; ``itl`` is ``None`` where answers have one chunk."""

    ttft: float
    itl: float | None
    e2el: float


def _typical(run: RunTrace) -> _Typical | None:
    """``None`` when no request completed."""
    import numpy as np

    from pytest_gpulayout.latencies import pooled_latencies

    completed = [request for request in run.requests if request.ok]
    if not completed:
        return None
    samples = pooled_latencies(completed)
    itl = float(np.median(samples["itl"])) if len(samples["itl"]) else None
    return _Typical(float(np.median(samples["ttft"])), itl, float(np.median(samples["e2el"])))


def _client_bound(run: RunTrace, workload: Workload) -> Iterator[Problem]:
    typical = _typical(run)
    if typical is None:
        return
    texts = [
        *_calibration_errors(run.observations.calibration, typical),
        *_late_timestamps(run, typical),
        *_joined_messages(run, typical),
        *(_late_arrivals(run, workload, typical) if workload.is_open else _late_turnarounds(run, typical)),
        *_busy_processes(run),
        *_connections(run),
    ]
    yield from (Problem("client-bound", text) for text in texts)


def _calibration_errors(calibration: Calibration | None, typical: _Typical) -> Iterator[str]:
    if calibration is None:
        return
    if not calibration.mock_kept_time:
        yield (
            f"at {calibration.streams} streams the client's error on this host could not be found out, since the "
            f"built-in mock was {calibration.mock_late_ms:.3g} ms late itself, twice; free the host's cores"
        )
        return
    errors = [("TTFT", calibration.p99_ttft_error_ms, typical.ttft, TTFT_SHARE)]
    if typical.itl is not None:
        errors.append(("ITL", calibration.p99_itl_error_ms, typical.itl, ITL_SHARE))
    for name, error_ms, median_ms, share in errors:
        limit_ms = max(LEAST_ERROR_MS, share * median_ms)
        if abs(error_ms) > limit_ms:
            yield (
                f"at {calibration.streams} streams this client's p99 {name} is off by {error_ms:+.3g} ms on this "
                f"host (allowed {limit_ms:.3g} ms: {share:.0%} of a median of {median_ms:.3g} ms); "
                "free the host's cores, or measure from another host"
            )


def _late_timestamps(run: RunTrace, typical: _Typical) -> Iterator[str]:
    """Without the kernel's clock an arrival counts when the client gets to it."""
    cost_ms = _of_typical_batch(run, lambda _, client: _cost_per_event_ms(client))
    itl_limit_ms = math.inf if typical.itl is None else ITL_SHARE * typical.itl
    limit_ms = max(LEAST_ERROR_MS, min(TTFT_SHARE * typical.ttft, itl_limit_ms))
    if cost_ms is not None and cost_ms > limit_ms:
        yield (
            f"without the kernel's timestamps an arrival was read {cost_ms:.3g} ms late on average "
            f"(allowed {limit_ms:.3g} ms); free the host's cores, or measure from another host"
        )
    stop_ms = _of_typical_batch(run, lambda _, client: client.lag_max_ns / 1e6 if _is_unstamped(client) else None)
    limit_ms = max(TIME_SLICE_MS, STOP_SHARE * typical.ttft)
    if stop_ms is not None and stop_ms > limit_ms:
        yield (
            f"without the kernel's timestamps the client stood still for {stop_ms:.3g} ms in a batch "
            f"(allowed {limit_ms:.3g} ms: {STOP_SHARE:.0%} of the median TTFT); free the host's cores"
        )


def _joined_messages(run: RunTrace, typical: _Typical) -> Iterator[str]:
    """Messages of one answer that pile up unread share the instant of the last: the kernel joins them."""
    lag_ms = _of_typical_batch(run, lambda _, client: client.read_lag_ns[1] / 1e6 if client.read_lag_ns else None)
    if lag_ms is None or typical.itl is None:
        return
    limit_ms = max(TIME_SLICE_MS, typical.itl)
    if lag_ms > limit_ms:
        yield (
            f"1 in 100 of the arrivals waited {lag_ms:.3g} ms or more to be read (allowed {limit_ms:.3g} ms: the "
            "median ITL), so that messages of one answer were taken for one; free the host's cores, or use more "
            "client processes on cores of their own"
        )


def _is_unstamped(client: ClientWork) -> bool:
    return client.unstamped > MOST_UNSTAMPED * client.events


def _cost_per_event_ms(client: ClientWork) -> float | None:
    """Work and waiting for a CPU that lie between an arrival and its reading, on average."""
    return (client.cpu_ns + (client.wait_ns or 0)) / client.events / 1e6 if _is_unstamped(client) else None


def _late_turnarounds(run: RunTrace, typical: _Typical) -> Iterator[str]:
    """In a closed loop the server idles while the client is late with the next request."""
    for place, name, share, least_ms in (
        (0, "half", TURNAROUND_SHARE, LEAST_ERROR_MS),
        (1, "1 in 100", TAIL_TURNAROUND_SHARE, TIME_SLICE_MS),
    ):
        lag_ms = _send_lag_ms(run, place)
        limit_ms = max(least_ms, share * typical.e2el)
        if lag_ms is not None and lag_ms > limit_ms:
            yield (
                f"{name} of the requests followed {lag_ms:.3g} ms or more after the answer they waited for "
                f"(allowed {limit_ms:.3g} ms: {share:.0%} of the median E2EL); free the host's cores, or use more "
                "client processes"
            )


def _late_arrivals(run: RunTrace, workload: Workload, typical: _Typical) -> Iterator[str]:
    lag_ms = _send_lag_ms(run, 1)
    limit_ms = max(TIME_SLICE_MS, ARRIVAL_SHARE * max(_mean_gap_ms(workload), typical.ttft))
    if lag_ms is not None and lag_ms > limit_ms:
        yield (
            f"1 in 100 of the requests was sent {lag_ms:.3g} ms or more after it was due (allowed {limit_ms:.3g} ms: "
            f"{ARRIVAL_SHARE:.0%} of the mean gap or of the median TTFT); free the host's cores, use more client "
            "processes, or lower the rate"
        )


def _mean_gap_ms(workload: Workload) -> float:
    rate = workload.rate
    if workload.ramp_up is not None:
        rate = (workload.ramp_up.start_rate + workload.ramp_up.end_rate) / 2
    return 1e3 / rate if rate else 0.0


def _busy_processes(run: RunTrace) -> Iterator[str]:
    share = _of_typical_batch(run, lambda batch, client: client.cpu_ns / max(batch.end_ns - batch.start_ns, 1))
    if share is not None and share > MOST_CPU:
        yield (
            f"a process of the client used {share:.0%} of a core (allowed {MOST_CPU:.0%}); "
            "use more client processes, on cores of their own"
        )


def _connections(run: RunTrace) -> Iterator[str]:
    """Whatever opens a connection while a request is due is a latency of the client. A failure explains it."""
    waited = [request.connect_ns for request in run.requests if request.connect_ns]
    if (waited or run.reconnects) and not run.failed:
        longest_ms = max(waited, default=0) / 1e6
        yield (
            f"connections were opened while it was measured: {len(waited)} requests waited for one, "
            f"{longest_ms:.3g} ms at most, and {run.reconnects} had been closed by the other side; let server and "
            "proxy keep them longer, or limit the requests in flight"
        )


def _send_lag_ms(run: RunTrace, place: int) -> float | None:
    return _of_typical_batch(run, lambda _, client: client.send_lag_ns[place] / 1e6 if client.send_lag_ns else None)


def _of_typical_batch(run: RunTrace, value: Callable[[BatchTrace, ClientWork], float | None]) -> float | None:
    """Median over the batches of the worst process, of those that tell; ``None`` when none does."""
    per_batch = [[value(batch, client) for client in batch.clients] for batch in run.batches]
    known = [[value for value in values if value is not None] for values in per_batch]
    worst = [max(values) for values in known if values]
    return median(worst) if worst else None


# -- the server and its devices ----------------------------------------------------------------------------------


def _prefix_cache(window: ServerWindow | None, workload: Workload) -> Iterator[Problem]:
    if window is None or workload.shares_prefix:
        return
    hits = sum(engine.prefix_hits for engine in window.engines)
    refused = window.prefix_reset == "refused" and hits > 0
    rate = window.prefix_hit_rate or 0.0
    if rate > MOST_PREFIX_HITS or refused:
        limit = "none, since the server refused to empty it before" if refused else f"{MOST_PREFIX_HITS:.0%}"
        template = ", or the chat template is what they share" if workload.api == "chat" else ""
        yield Problem(
            "prefix-cache",
            f"{rate:.1%} of the prompt tokens came from the prefix cache (allowed {limit}): others use the server, "
            f"or prompts were sent before{template}; serve with --no-enable-prefix-caching, or say so in the "
            "workload: shares_prefix = true",
        )


def _jit_compilation(window: ServerWindow | None) -> Iterator[Problem]:
    if window is not None and window.jit:
        yield Problem(
            "jit-compilation",
            f"the server compiled kernels while it was measured, {len(window.jit)} log lines, the first: "
            f"{window.jit[0]}; raise warmup_requests of the workload",
        )


def _throttled(run: RunTrace) -> Iterator[Problem]:
    if run.observations.telemetry is not None:
        yield from (Problem("throttled", text) for text in slowdowns(run.observations.telemetry))


def _foreign_process(run: RunTrace) -> Iterator[Problem]:
    if run.observations.telemetry is not None and (text := foreign_load(run.observations.telemetry)):
        yield Problem("foreign-process", text)


def _uneven_shares(run: RunTrace) -> Iterator[Problem]:
    """Failed requests explain them."""
    if run.observations.server is not None and not run.failed:
        texts = uneven_shares(run.observations.server, len(run.batches))
        yield from (Problem("uneven-shares", text) for text in texts)


def _unstable(run: RunTrace, workload: Workload) -> Iterator[Problem]:
    """Too short to tell is no problem: the batches of a run and its fresh starts show its noise, too."""
    if run.failed:
        return
    from pytest_gpulayout.steady_state import find_steady_state

    steady = find_steady_state(run, workload)
    if steady is not None and steady.verdict == "unstable":
        yield Problem(
            "unstable",
            f"the time per token changed by {steady.drift:+.0%} in the course of the run "
            f"(p = {steady.p_value:.1g}, {steady.blocks} blocks); warm up longer, or lower the load below what the "
            "server can keep up with",
        )
