"""What happened to every request of a measurement, as instants of one clock.

Knows instants and the differences that have a name: TTFT, TPOT, ITL, E2EL of one request. Leaves sending to
the load driver and anything over several requests to :mod:`~pytest_gpulayout.metrics`.

All instants are nanoseconds of ``CLOCK_MONOTONIC``, which on Linux is one clock for all processes of a host.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from pytest_gpulayout.errors import MeasurementError

_NS_PER_S = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTrace:
    """One streamed request, the definitions of its latencies being those of ``vllm bench serve``.

    (vLLM 0.32, ``vllm/benchmarks/lib/endpoint_request_func.py``, with one difference: ``send_ns`` is taken when
    the first byte of an already encoded request goes out on an open connection, where vLLM's clock also runs
    over encoding, waiting for a connection and connecting.)

    :param index: number of the request in the whole run, from 0. :param batch: number of its batch, from 0.
    :param prompt_tokens: as the server counted them; as sent where it did not.
    :param output_tokens: as the server counted them; 0 where it did not.
    :param send_ns: the first byte of the request was handed to the kernel.
    :param chunk_ns: (n_chunks,), arrival of each message with a non-empty ``choices``, in order.
    :param end_ns: the end of the response, of a failed request the moment it failed.
    :param chunk_tokens: (n_chunks,), tokens in each of these messages, or ``None`` where the server did not say.
    :param error: why the request counts as failed, in the server's words where it had some.
    :param system_fingerprint: what the server says about itself in the response.
    :param text: what was generated.
    """

    index: int
    batch: int
    prompt_tokens: int
    output_tokens: int
    send_ns: int
    chunk_ns: tuple[int, ...]
    end_ns: int
    chunk_tokens: tuple[int, ...] | None = None
    error: str | None = None
    system_fingerprint: str | None = None
    text: str = ""

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

    def _arrivals(self) -> tuple[int, ...]:
        if self.error is not None or not self.chunk_ns:
            raise MeasurementError(
                "a latency needs a request that succeeded and at least one chunk of its answer\n"
                f"  found: {self.error or 'an answer without a chunk'}\n"
                f"  in request {self.index} of batch {self.batch}\n"
                "  look at the server's log, then measure again"
            )
        return self.chunk_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTrace:
    """Requests that were in flight together; all of them ended before the next batch began.

    :param index: number of the batch, from 0. :param requests: (n_requests,), in the order of sending.
    :param start_ns: just before the first request was sent. :param end_ns: the last response was complete.
    :param reconnects: connections that had to be opened again, between the requests or after one failed.
    :param loop_lag_max_ns: longest time the client was busy with something else than waiting for data; a chunk
        can be stamped at most so much too late by the client's own work.
    :param client_cpu_ns: CPU time of the client's thread between start and end.
    :param client_wait_ns: time this thread was ready to run and had no CPU, all instants of which came late;
        ``None`` where the kernel does not tell.
    """

    index: int
    requests: tuple[RequestTrace, ...]
    start_ns: int
    end_ns: int
    reconnects: int = 0
    loop_lag_max_ns: int = 0
    client_cpu_ns: int = 0
    client_wait_ns: int | None = None

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
    :param timestamp_source: where an instant comes from, in words.
    :param scheduling: policy the client's thread ran under, ``SCHED_FIFO`` or ``SCHED_OTHER``.
    :param started_s: wall clock at the start, seconds since the epoch; for people, never for arithmetic.
    """

    batches: tuple[BatchTrace, ...]
    seed: int
    warmup_requests: int
    connections: int
    timestamp_source: str
    started_s: float
    scheduling: str = "SCHED_OTHER"

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
