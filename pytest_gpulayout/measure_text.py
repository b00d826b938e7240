"""What ``gpulayout measure`` tells people: the load, the numbers, what was seen beside them, and what is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pytest_gpulayout.agreement import compare_sides
from pytest_gpulayout.metrics import METRICS, batch_metrics
from pytest_gpulayout.report import aligned, plural, quantity
from pytest_gpulayout.server_window import ttft_split, ttft_split_text
from pytest_gpulayout.stats import median
from pytest_gpulayout.telemetry import summarize

if TYPE_CHECKING:
    from pytest_gpulayout.knee import Knee
    from pytest_gpulayout.ports import Endpoint
    from pytest_gpulayout.server_window import ServerWindow
    from pytest_gpulayout.trace import RunTrace
    from pytest_gpulayout.validity import Problem
    from pytest_gpulayout.workload import Workload

_SWEEP_COLUMNS = ("request_throughput", "output_throughput", "median_ttft_ms", "median_tpot_ms", "median_e2el_ms")


def load_text(workload: Workload) -> str:
    """How requests are sent, and how long they and their answers are."""
    if workload.ramp_up is not None:
        ramp = workload.ramp_up
        how = f"from {ramp.start_rate:g} to {ramp.end_rate:g} req/s ({ramp.strategy})"
    elif workload.rate is not None:
        how = "all at once" if math.isinf(workload.rate) else f"{workload.rate:g} req/s"
    else:
        how = f"{workload.concurrency} at a time"
    if workload.is_open and workload.concurrency is not None:
        how += f", {workload.concurrency} at a time at most"
    into = f"{workload.input_tokens} tokens in" if workload.input_tokens else "prompts given"
    return f"{how}, {into}, {workload.output_tokens} out"


def measured_lines(run: RunTrace, workload: Workload, endpoint: Endpoint, problems: Sequence[Problem]) -> list[str]:
    """All that a person wants to know of one run, most important first."""
    lines = [f"{endpoint.model} at {endpoint.url}", f"{plural(len(run.requests), 'request')}, {load_text(workload)}"]
    lines += aligned(
        [("metric", "median of batches", "lowest", "highest"), *_rows(batch_metrics(run, goodput=workload.goodput))]
    )
    lines += _seen(run)
    return [*lines, *(f"invalid: {problem}" for problem in problems)]


def _rows(batches: Sequence[Mapping[str, float]]) -> Iterator[Sequence[str]]:
    for name, metric in METRICS.items():
        if values := [batch[name] for batch in batches if name in batch]:
            yield name, *(quantity(f(values), metric.unit) for f in (median, min, max))


def _seen(run: RunTrace) -> Iterator[str]:
    """What was observed beside the numbers, a line each."""
    if split := ttft_split(run.requests):
        yield ttft_split_text(split)
    yield f"client: {_client_text(run)}"
    if run.observations.telemetry is not None:
        yield summarize(run.observations.telemetry)
    if (window := run.observations.server) is not None:
        if window.engines:
            yield f"server: {_server_text(run, window)}"
        yield from (f"server: {note}" for note in window.notes)


def _server_text(run: RunTrace, window: ServerWindow) -> str:
    """How the server's own counters compare; where they must be equal and are not, the run is invalid, too."""
    sides = compare_sides(run, window)
    counts = (("requests", sides.requests), ("tokens in", sides.prompt_tokens), ("tokens out", sides.output_tokens))
    parts = [f"{both.server} {what} (client {both.client})" for what, both in counts]
    if window.prefix_hit_rate is not None:
        parts.append(f"prefix cache hits {window.prefix_hit_rate:.1%}")
    if sides.e2el_excess_ms is not None:
        parts.append(f"mean E2EL of the client {sides.e2el_excess_ms:+.1f} ms")
    return ", ".join(parts)


def _client_text(run: RunTrace) -> str:
    clients = [client for batch in run.batches for client in batch.clients]
    parts = [run.timestamp_source]
    if events := sum(client.events for client in clients):
        parts.append(f"{sum(client.cpu_ns for client in clients) / events / 1e3:.1f} us CPU per event")
    if calibration := run.observations.calibration:
        parts.append(
            f"its own error at {calibration.streams} streams: TTFT {calibration.median_ttft_error_ms:+.2f} ms "
            f"(p99 {calibration.p99_ttft_error_ms:+.2f}), ITL p99 {calibration.p99_itl_error_ms:+.2f} ms"
        )
    return "; ".join(parts)


def sweep_lines(points: Sequence[Mapping[str, Any]], knee: Knee, workload: Workload) -> list[str]:
    """A row for each load, and the knee. :param points: result documents with their ``load``, by load."""
    unit = "req/s" if workload.is_open else "in flight"
    header = (unit, *_SWEEP_COLUMNS)
    rows = [
        (f"{point['load']:g}", *(quantity(point[name], METRICS[name].unit) for name in _SWEEP_COLUMNS))
        for point in points
    ]
    best = knee.point
    found = (
        f"knee: {best.load:g} {unit}, {best.throughput:.2f} req/s with a median E2EL of {best.latency_s * 1e3:.0f} ms"
    )
    if not knee.saturated:
        found += "; the server was not saturated yet: raise --sweep-to"
    return [*aligned([header, *rows]), found]
