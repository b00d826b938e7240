"""What happened to every request of a measurement, as instants of one clock.

Knows instants and the differences that have a name: TTFT, TPOT, ITL, E2EL of one request. Leaves sending to
the load driver, anything over several requests to :mod:`~pytest_gpulayout.metrics`, and whether the numbers can be
used to :mod:`~pytest_gpulayout.validity`.

All instants are nanoseconds of ``CLOCK_MONOTONIC``, which on Linux is one clock for all processes of a host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from pytest_gpulayout.errors import MeasurementError

if TYPE_CHECKING:
    from pytest_gpulayout.calibration import Calibration
    from pytest_gpulayout.server_window import ServerWindow
    from pytest_gpulayout.telemetry import Telemetry

_NS_PER_S = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTimings:
    """What the server itself timed of one request, in ms; ``None`` where it did not say.

    ``metrics`` of the last message with ``usage``, with ``vllm serve --enable-per-request-metrics`` (vLLM 0.32,
    ``vllm/entrypoints/generate/base/protocol.py``, ``PerRequestMetrics``).

    :param queue_ms: arrival in the engine to the first schedule. :param prefill_ms: first schedule to the first
        token (vLLM calls it ``time_to_first_token_ms``). :param generation_ms: first token to the last.
    """

    queue_ms: float | None = None
    prefill_ms: float | None = None
    generation_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTrace:
    """One streamed request, the definitions of its latencies being those of ``vllm bench serve``.

    (vLLM 0.32, ``vllm/benchmarks/lib/endpoint_request_func.py``, with one difference: ``send_ns`` is taken when
    the first byte of an already encoded request goes out on an open connection, where vLLM's clock also runs
    over encoding, waiting for a connection and connecting.)

    :param index: number of the request in the whole run, from 0. :param batch: number of its batch, from 0.
    :param prompt_tokens: as the server counted them; as sent where it did not.
    :param output_tokens: as the server counted them; 0 where it did not.
    :param send_ns: just before the first byte of the request was handed to the kernel.
    :param sent_ns: the last byte of the request left, as the kernel saw it (a packet given to the network device)
        or, without the kernel's word, when the call that handed it over returned; ``None`` if nothing was sent.
    :param intended_ns: when an open arrival was due; ``None`` in a closed loop, where a request is due when a place
        becomes free.
    :param queued_ns: how long the request was due and waited for a place in the client (``max_concurrency``).
    :param first_byte_ns: first byte of the HTTP answer, which mostly is the headers; ``None`` if there was none.
    :param connect_ns: time spent on opening a connection while the request was due; 0 on one that was open.
    :param chunk_ns: (n_chunks,), arrival of each message with a non-empty ``choices``, in order.
    :param end_ns: the end of the response, of a failed request the moment it failed.
    :param chunk_tokens: (n_chunks,), tokens in each of these messages, or ``None`` where the server did not say.
    :param worker: number of the client process that sent it. :param request_id: sent as ``X-Request-Id``.
    :param server: the server's own timings of this request, where it gave them.
    :param error: why the request counts as failed, in the server's words where it had some.
    :param system_fingerprint: what the server says about itself in the response.
    :param text: what was generated.
    """

    index: int
    batch: int
    prompt_tokens: int
    output_tokens: int
    send_ns: int
    chunk_ns: Sequence[int]
    end_ns: int
    chunk_tokens: Sequence[int] | None = None
    error: str | None = None
    system_fingerprint: str | None = None
    text: str = ""
    sent_ns: int | None = None
    intended_ns: int | None = None
    queued_ns: int = 0
    first_byte_ns: int | None = None
    connect_ns: int = 0
    worker: int = 0
    request_id: str = ""
    server: ServerTimings | None = None

    @property
    def ok(self) -> bool:
        """Whether the request did all that was asked of it."""
        return self.error is None

    @property
    def ttft_ns(self) -> int:
        """Time to first token: first chunk - send.

        :raises MeasurementError: the request failed, or nothing arrived.
        """
        return self._arrivals()[0] - self.send_ns

    @property
    def e2el_ns(self) -> int:
        """End-to-end latency: last chunk - send; messages without ``choices`` (usage) do not count.

        :raises MeasurementError: the request failed, or nothing arrived.
        """
        return self._arrivals()[-1] - self.send_ns

    @property
    def itl_ns(self) -> tuple[int, ...]:
        """Inter-token latencies: the gaps between successive chunks, (n_chunks - 1,); gaps, not tokens.

        :raises MeasurementError: the request failed, or nothing arrived.
        """
        return tuple(later - earlier for earlier, later in pairwise(self._arrivals()))

    @property
    def tpot_ns(self) -> float | None:
        """Time per output token without the first: (E2EL - TTFT) / (tokens - 1); ``None`` for one token.

        :raises MeasurementError: the request failed, or nothing arrived.
        """
        decode_ns = self.e2el_ns - self.ttft_ns
        return decode_ns / (self.output_tokens - 1) if self.output_tokens > 1 else None

    def _arrivals(self) -> Sequence[int]:
        if self.error is not None or not self.chunk_ns:
            raise MeasurementError(
                "a latency needs a request that succeeded and at least one chunk of its answer\n"
                f"  found: {self.error or 'an answer without a chunk'}\n"
                f"  in request {self.index} of batch {self.batch}\n"
                "  look at the server's log, then measure again"
            )
        return self.chunk_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientWork:
    """What one process of the client tells of itself, for one batch.

    :param events: pieces of answers that were received. :param unstamped: those without the kernel's timestamp,
        which count with the time that the client read them.
    :param cpu_ns: CPU time of its thread. :param wait_ns: time this thread was ready to run and had no CPU;
        ``None`` where the kernel does not tell.
    :param lag_max_ns: longest time it was busy with something else than waiting for data.
    :param read_lag_ns: (p50, p99, max) of arrival in the kernel -> read by the client; ``None`` without the
        kernel's timestamps. No instant is late by it, but a request that waits for an answer is sent so much later.
    :param send_lag_ns: (p50, p99, max) of due -> sent, over its requests: in a closed loop due when the answer
        before was complete, in an open one when the timetable said so (and there was a place).
    :param cpus: it was pinned to, empty where it was not. :param scheduling: policy of its thread.
    """

    events: int = 0
    unstamped: int = 0
    cpu_ns: int = 0
    wait_ns: int | None = None
    lag_max_ns: int = 0
    read_lag_ns: tuple[int, int, int] | None = None
    send_lag_ns: tuple[int, int, int] | None = None
    cpus: tuple[int, ...] = ()
    scheduling: str = "SCHED_OTHER"


@dataclass(frozen=True, slots=True, kw_only=True)
class Observations:
    """What else was seen while a run was measured; ``None`` for what nobody looked at.

    :param calibration: how far this client was from the truth on this host, just before.
    :param server: what the server counted and logged in the same window.
    :param telemetry: how the devices fared in the same window.
    """

    calibration: Calibration | None = None
    server: ServerWindow | None = None
    telemetry: Telemetry | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTrace:
    """Requests that were in flight together; all of them ended before the next batch began.

    :param index: number of the batch, from 0. :param requests: (n_requests,), in the order of sending.
    :param start_ns: just before the first request was sent. :param end_ns: the last response was complete.
    :param reconnects: connections that had to be opened again while the batch ran.
    :param clients: (n_workers,), what the client's processes tell of themselves, in the order of their numbers.
    """

    index: int
    requests: tuple[RequestTrace, ...]
    start_ns: int
    end_ns: int
    reconnects: int = 0
    clients: tuple[ClientWork, ...] = ()

    @property
    def loop_lag_max_ns(self) -> int:
        """Longest time a process of the client was busy with something else than waiting for data."""
        return max((client.lag_max_ns for client in self.clients), default=0)

    @property
    def completed(self) -> tuple[RequestTrace, ...]:
        """The requests that did not fail."""
        return tuple(request for request in self.requests if request.ok)

    @property
    def duration_s(self) -> float:
        """From the first request to the end of the last response, ramp-up and drain included."""
        return (self.end_ns - self.start_ns) / _NS_PER_S


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTrace:
    """One workload on one server.

    :param batches: in the order they ran. :param seed: of the prompts.
    :param warmup_requests: sent before the first batch, answered, and not kept.
    :param connections: open at a time.
    :param timestamp_source: where an arrival (``chunk_ns``, ``first_byte_ns``) comes from, in words.
    :param sent_source: where ``sent_ns`` comes from, in words.
    :param started_s: wall clock at the start, seconds since the epoch; for people, never for arithmetic.
    :param schedule_ns: (n_requests,) of each batch, when an open arrival was due, from the batch's start; empty in
        a closed loop. The seed of the gaps is ``seed``.
    :param observations: what else was seen in the window from the first batch's start to the last one's end.
    """

    batches: tuple[BatchTrace, ...]
    seed: int
    warmup_requests: int
    connections: int
    timestamp_source: str
    started_s: float
    sent_source: str = ""
    schedule_ns: tuple[Sequence[int], ...] = ()
    observations: Observations = field(default_factory=Observations)

    @property
    def scheduling(self) -> str:
        """Policies that the client's threads ran under, ``SCHED_FIFO`` or ``SCHED_OTHER``."""
        policies = {client.scheduling for batch in self.batches for client in batch.clients}
        return ", ".join(sorted(policies)) or "SCHED_OTHER"

    @property
    def requests(self) -> tuple[RequestTrace, ...]:
        """All requests of all batches, in order."""
        return tuple(request for batch in self.batches for request in batch.requests)

    @property
    def failed(self) -> tuple[RequestTrace, ...]:
        """The requests that failed, in order."""
        return tuple(request for request in self.requests if not request.ok)

    @property
    def duration_s(self) -> float:
        """Sum over the batches; the pauses between them are nobody's time."""
        return sum(batch.duration_s for batch in self.batches)

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """What the servers said about themselves, each once, in order of appearance."""
        return tuple(dict.fromkeys(r.system_fingerprint for r in self.requests if r.system_fingerprint))

    @property
    def loop_lag_max_ns(self) -> int:
        """The worst of all batches."""
        return max((batch.loop_lag_max_ns for batch in self.batches), default=0)

    @property
    def reconnects(self) -> int:
        """Sum over all batches."""
        return sum(batch.reconnects for batch in self.batches)
