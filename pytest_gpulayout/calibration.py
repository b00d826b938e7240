"""How far the client is from the truth on this host: the errors of a run against a server that knows what it did.

Knows the comparison. Leaves running it to the adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_gpulayout.errors import MeasurementError

if TYPE_CHECKING:
    from pytest_gpulayout.trace import RequestTrace, RunTrace

_NS_PER_MS = 1e6
_NS_PER_US = 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Client - server of one short run against the built-in mock, both by ``CLOCK_MONOTONIC`` of this host.

    :param streams: requests in flight. :param ttft_ms: of the mock. :param itl_ms: of the mock.
    :param seconds: that it took. :param events_per_s: messages that the mock sent.
    :param median_ttft_error_ms: median of what the client says less median of what the mock did; the others alike.
    :param cpu_us_per_event: CPU time of the client for each message received.
    :param mock_late_ms: how late the mock itself was, see :func:`lateness_ms`.
    """

    streams: int
    ttft_ms: float
    itl_ms: float
    seconds: float
    events_per_s: float
    median_ttft_error_ms: float
    p99_ttft_error_ms: float
    median_itl_error_ms: float
    p99_itl_error_ms: float
    cpu_us_per_event: float
    mock_late_ms: float = 0.0

    @property
    def mock_kept_time(self) -> bool:
        """Whether the client had the load that it was to have; if not, small errors prove nothing."""
        return kept_time(self.mock_late_ms, self.itl_ms)


@dataclass(frozen=True, slots=True)
class SentAnswer:
    """What a server that knows what it did did, ns of ``CLOCK_MONOTONIC``.

    :param fingerprint: ``system_fingerprint`` of this answer. :param request_id: ``X-Request-Id`` of the request.
    :param received_ns: the last byte of the request arrived. :param chunk_ns: (n_chunks,), right before each send.
    """

    fingerprint: str
    request_id: str
    received_ns: int
    chunk_ns: Sequence[int]

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> SentAnswer:
        """Read one entry of what the mock's ``GET /sent`` returns."""
        return cls(document["fingerprint"], document["request_id"], document["received_ns"], document["chunk_ns"])


@dataclass(frozen=True, slots=True)
class LatencyFigures:
    """TTFT and ITL of many answers, ms; percentiles interpolate linearly, ITL pools the gaps of all answers."""

    median_ttft_ms: float
    p99_ttft_ms: float
    median_itl_ms: float
    p99_itl_ms: float

    def __sub__(self, truth: LatencyFigures) -> LatencyFigures:
        return LatencyFigures(
            self.median_ttft_ms - truth.median_ttft_ms,
            self.p99_ttft_ms - truth.p99_ttft_ms,
            self.median_itl_ms - truth.median_itl_ms,
            self.p99_itl_ms - truth.p99_itl_ms,
        )


def latency_figures(answers: Iterable[tuple[int, Sequence[int]]]) -> LatencyFigures:
    """Sum up answers by one definition for both sides: first chunk - start, and chunk - chunk before.

    :param answers: (start in ns, instants of the chunks in ns) of each; the start is the request sent on the
        client's side, and received on the server's.
    :raises MeasurementError: there is no answer, or none with two chunks.
    """
    import numpy as np  # imported late: a pytest start without a calibration never needs it

    ttft_ns, gaps_ns = [], []
    for start_ns, chunk_ns in answers:
        if chunk_ns:
            ttft_ns.append(chunk_ns[0] - start_ns)
            gaps_ns.append(np.diff(np.asarray(chunk_ns, dtype=np.int64)))
    gap_ns = np.concatenate(gaps_ns) if gaps_ns else np.empty(0)
    if not len(gap_ns):
        raise _fault("answers of at least two chunks", f"{len(ttft_ns)} answers, no gap between chunks")
    figures = [np.percentile(sample, share) for sample in (ttft_ns, gap_ns) for share in (50, 99)]
    return LatencyFigures(*(float(figure) / _NS_PER_MS for figure in figures))


def lateness_ms(sent: Iterable[SentAnswer], *, ttft_ms: float, itl_ms: float) -> float:
    """Say how late a server was on the timetable it had, ms: the 99th percentile, of first chunks or of all.

    Its stamps are true however late it is. But a server that cannot follow its timetable sends as fast as it can, one
    message after the other, and to that any client keeps up.

    :param ttft_ms: that it was to have. :param itl_ms: that it was to have.
    :returns: the larger of the two percentiles.
    :raises MeasurementError: there is no answer.
    """
    import numpy as np

    late = []
    for answer in sent:
        chunk_ns = np.asarray(answer.chunk_ns, dtype=np.int64)
        late.append((chunk_ns - answer.received_ns) / _NS_PER_MS - ttft_ms - itl_ms * np.arange(len(chunk_ns)))
    first = [answer[0] for answer in late if len(answer)]
    if not first:
        raise _fault("answers of at least one chunk", f"{len(late)} answers without any")
    return max(float(np.percentile(sample, 99)) for sample in (first, np.concatenate(late)))


def kept_time(late_ms: float, itl_ms: float) -> bool:
    """Judge what :func:`lateness_ms` returned: within half a gap, messages still come as they were meant to."""
    return late_ms <= itl_ms / 2


def pair_answers(
    requests: Sequence[RequestTrace], sent: Iterable[SentAnswer]
) -> list[tuple[RequestTrace, SentAnswer]]:
    """Find for each request what the server says about it, by the fingerprint that its answer carried.

    :param sent: may hold answers to others too, such as those of a warm-up.
    :returns: (n_requests,), in the order of ``requests``.
    :raises MeasurementError: a request failed, is unknown to the server, or has other chunks than were sent.
    """
    by_fingerprint = {answer.fingerprint: answer for answer in sent}
    pairs = []
    for request in requests:
        if not request.ok:
            raise _fault("every request answered", f"request {request.index} failed: {request.error}")
        answer = by_fingerprint.get(str(request.system_fingerprint))
        if answer is None:
            raise _fault("every answer known to the mock", f"request {request.index} ({request.system_fingerprint})")
        if len(answer.chunk_ns) != len(request.chunk_ns):
            found = f"{len(request.chunk_ns)} of {len(answer.chunk_ns)} in request {request.index}"
            raise _fault("every chunk that was sent", found)
        pairs.append((request, answer))
    return pairs


def compare_run(
    run: RunTrace, sent: Iterable[SentAnswer], *, streams: int, ttft_ms: float, itl_ms: float
) -> Calibration:
    """Say how far a run's TTFT and ITL are from what the server did.

    :param streams: requests that were in flight. :param ttft_ms: of the mock. :param itl_ms: of the mock.
    :raises MeasurementError: the two do not belong together, or a request failed.
    """
    pairs = pair_answers(run.requests, sent)
    client = latency_figures((request.send_ns, request.chunk_ns) for request, _ in pairs)
    error = client - latency_figures((answer.received_ns, answer.chunk_ns) for _, answer in pairs)
    events = sum(len(answer.chunk_ns) for _, answer in pairs)
    cpu_ns = sum(client.cpu_ns for batch in run.batches for client in batch.clients)
    return Calibration(
        streams=streams,
        ttft_ms=ttft_ms,
        itl_ms=itl_ms,
        seconds=run.duration_s,
        events_per_s=events / run.duration_s,
        median_ttft_error_ms=error.median_ttft_ms,
        p99_ttft_error_ms=error.p99_ttft_ms,
        median_itl_error_ms=error.median_itl_ms,
        p99_itl_error_ms=error.p99_itl_ms,
        cpu_us_per_event=cpu_ns / _NS_PER_US / events,
        mock_late_ms=lateness_ms((answer for _, answer in pairs), ttft_ms=ttft_ms, itl_ms=itl_ms),
    )


def _fault(required: str, found: str) -> MeasurementError:
    return MeasurementError(
        f"a calibration of the client needs {required}\n  found: {found}\n"
        "  in a run against the built-in mock server on this host\n"
        "  measure again when less runs on this host"
    )
