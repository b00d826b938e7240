"""What a vLLM server counted, timed and logged in the window of a measurement.

Knows vLLM's Prometheus metrics and iteration log (vLLM 0.32, ``vllm/v1/metrics/loggers.py``). Leaves fetching them to
the adapters, and what follows for the measurement to :mod:`~pytest_gpulayout.validity`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

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
    :param settled: the counters had stopped moving when they were read at the end.
    :param prefix_reset: before the window. :param jit: lines of the log that tell of a compilation in the window.
    :param steps: one per engine; empty without the iteration log.
    :param notes: what could not be found out, and why, a sentence each.
    """

    engines: tuple[EngineDelta, ...] = ()
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
