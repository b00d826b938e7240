"""What else is seen of a server start beside the metrics that are judged: numbers that tell causes, never verdicts.

Knows the names, units and meanings of these numbers, and how they are taken from a run. Leaves comparing them with
stored ones to :mod:`~pytest_gpulayout.attribution`, and the texts that go with them (transport, versions) to
:class:`~pytest_gpulayout.measurement.Identity`. What nobody looked at is left out, never 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType

from pytest_gpulayout.server_window import ServerWindow, ttft_split
from pytest_gpulayout.stats import median
from pytest_gpulayout.telemetry import CPU, DeviceTelemetry, Telemetry
from pytest_gpulayout.trace import RequestTrace, RunTrace


@dataclass(frozen=True, slots=True)
class Observed:
    """A number that is seen once per server start.

    :param label: what tables and sentences call it. :param meaning: one sentence.
    :param least: relative change below which it is called the same, however little it scatters.
    """

    name: str
    unit: str
    label: str
    meaning: str
    least: float


_PARTS_OF_TTFT = (
    Observed("client_ms", "ms", "client", "mean time that the client took to hand a request to the network", 0.05),
    Observed(
        *("network_and_frontend_ms", "ms", "network and front end"),
        "mean rest of TTFT: the way there and back, and the server's work around its engine; 0 where the server "
        "claims more time than the client saw",
        0.05,
    ),
    Observed("queue_ms", "ms", "queue", "mean time that a request waited in the engine for its first schedule", 0.05),
    Observed("prefill_ms", "ms", "prefill", "mean time from the first schedule to the first token", 0.03),
)

OBSERVED: Mapping[str, Observed] = MappingProxyType(
    {
        item.name: item
        for item in (
            Observed("start_s", "s", "start-up", "from starting the server to its first completion", 0.25),
            Observed("kv_cache_tokens", "tokens", "KV cache", "room for tokens, the smallest of all engines", 0.01),
            Observed("preemptions", "", "preemptions", "times a request lost its place in the KV cache", 0.1),
            *_PARTS_OF_TTFT,
            Observed(
                *("decode_per_token_ms", "ms", "decode, per token"),
                "mean over requests of (E2EL - TTFT) / (output tokens - 1)",
                0.03,
            ),
            Observed("step_ms", "ms", "engine step", "median pure-decode step, of the slowest engine", 0.03),
            Observed("sm_clock_mhz", "MHz", "SM clock", "median under load, of the slowest GPU", 0.02),
            Observed("memory_clock_mhz", "MHz", "memory clock", "median under load, of the slowest GPU", 0.02),
            Observed("cpu_clock_mhz", "MHz", "CPU clock", "median under load, mean over the host's cores", 0.05),
            Observed("power_w", "W", "power", "sum over the GPUs of their medians under load", 0.1),
            Observed("temperature_c", "C", "temperature", "median under load, of the hottest GPU", 0.1),
        )
    }
)
"""All of them by name."""


def observe_start(
    run: RunTrace, *, start_s: float | None = None, kv_cache_tokens: int | None = None
) -> dict[str, float]:
    """Return what is known of one server start, by the names of :data:`OBSERVED`.

    :param run: what was measured on it.
    :param start_s: from starting the server to its first completion. :param kv_cache_tokens: as its log says.
    """
    seen = run.observations
    found: dict[str, float | None] = {"start_s": start_s, "kv_cache_tokens": kv_cache_tokens}
    completed = [request for request in run.requests if request.ok and request.chunk_ns]
    found |= _latency_parts(completed, seen.server)
    if seen.server is not None:
        found |= _of_server(seen.server)
    if seen.telemetry is not None:
        found |= _of_devices(seen.telemetry)
    return {name: _rounded(value) for name in OBSERVED if (value := found.get(name)) is not None}


def _rounded(value: float) -> float:
    """Counts as they are, else six digits: short in a diff, and enough for what moves by a hundredth at least."""
    return float(value) if isinstance(value, int) else float(f"{value:.6g}")


def _latency_parts(completed: Sequence[RequestTrace], window: ServerWindow | None) -> dict[str, float | None]:
    split = ttft_split(completed) or (_split_by_histograms(completed, window) if window is not None else None)
    parts: dict[str, float | None] = {f"{name}_ms": max(0.0, value) for name, value in (split or {}).items()}
    per_token = [tpot_ns / 1e6 for request in completed if (tpot_ns := request.tpot_ns) is not None]
    return parts | {"decode_per_token_ms": fmean(per_token) if per_token else None}


def _split_by_histograms(completed: Sequence[RequestTrace], window: ServerWindow) -> dict[str, float] | None:
    """Split the mean TTFT by the means of the server's histograms, where they are of exactly these requests.

    They count the same instants as :func:`~pytest_gpulayout.server_window.ttft_split` (vLLM 0.32,
    ``vllm/v1/metrics/stats.py``, ``update_from_finished_request``), so a server with and one without
    ``--enable-per-request-metrics`` can be compared.
    """
    queue, prefill = (_mean_over(window, f"request_{name}_time", len(completed)) for name in ("queue", "prefill"))
    if not completed or queue is None or prefill is None:
        return None
    client = fmean(0 if r.sent_ns is None else r.sent_ns - r.send_ns for r in completed) / 1e6
    rest = fmean(request.ttft_ns for request in completed) / 1e6 - client - queue - prefill
    return {"client": client, "network_and_frontend": rest, "queue": queue, "prefill": prefill}


def _mean_over(window: ServerWindow, histogram: str, requests: int) -> float | None:
    """Mean of a histogram in ms, ``None`` unless it counted that many requests."""
    counted = sum(e.histograms[histogram].count for e in window.engines if histogram in e.histograms)
    return window.mean_ms(histogram) if counted == requests else None


def _of_server(window: ServerWindow) -> dict[str, float | None]:
    return {
        "step_ms": max((step.median_ms for step in window.steps), default=None),
        "preemptions": sum(engine.preemptions for engine in window.engines) if window.engines else None,
    }


def _of_devices(telemetry: Telemetry) -> dict[str, float | None]:
    gpus = [device for device in telemetry.devices if device.name != CPU]
    cpus = [device for device in telemetry.devices if device.name == CPU]
    power = list(_medians(gpus, "power_w"))
    return {
        "sm_clock_mhz": min(_medians(gpus, "sm_clock_mhz"), default=None),
        "memory_clock_mhz": min(_medians(gpus, "memory_clock_mhz"), default=None),
        "cpu_clock_mhz": min(_medians(cpus, "frequency_mhz"), default=None),
        "power_w": sum(power) if power and len(power) == len(gpus) else None,
        "temperature_c": max(_medians(gpus, "temperature_c"), default=None),
    }


def _medians(devices: Sequence[DeviceTelemetry], series: str) -> Iterator[float]:
    """Median of each device that has values; its first sample is of the moment before the load."""
    for device in devices:
        values = [value for value in device.series.get(series, ())[1:] if value is not None]
        if values:
            yield median(values)
