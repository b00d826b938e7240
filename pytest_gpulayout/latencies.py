"""The latencies of many requests as arrays in ms, a million gaps at a time.

Knows how instants become samples. Leaves what follows from samples to :mod:`~pytest_gpulayout.metrics` and
:mod:`~pytest_gpulayout.result_details`. Brings numpy, which a run without a measurement never needs: import it late.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from pytest_gpulayout.trace import RequestTrace

_NS_PER_MS = 1e6

Sample = NDArray[np.float64]
"""(n,), in ms."""


def pooled_latencies(completed: Sequence[RequestTrace]) -> dict[str, Sample]:
    """Return TTFT, TPOT, ITL and E2EL of completed requests by name, the gaps of all requests pooled.

    :returns: ``ttft`` and ``e2el`` (n_requests,), ``tpot`` of those with two tokens or more, ``itl`` (n_gaps,).
    :raises MeasurementError: one of the requests has no chunk.
    """
    return {
        "ttft": _in_ms(request.ttft_ns for request in completed),
        "tpot": _in_ms(tpot for request in completed if (tpot := request.tpot_ns) is not None),
        "itl": _gaps([chunk_instants(request) for request in completed]) / _NS_PER_MS,
        "e2el": _in_ms(request.e2el_ns for request in completed),
    }


def ttft_from_last_byte(completed: Sequence[RequestTrace]) -> Sample:
    """Return first chunk - last byte of the request, of those where that byte's instant is known."""
    return _in_ms(request.chunk_ns[0] - request.sent_ns for request in completed if request.sent_ns is not None)


def ttft_from_timetable(completed: Sequence[RequestTrace]) -> Sample:
    """Return first chunk - the instant the timetable said, of open arrivals; empty in a closed loop."""
    return _in_ms(
        request.chunk_ns[0] - request.intended_ns for request in completed if request.intended_ns is not None
    )


def inter_chunk_latencies(completed: Sequence[RequestTrace]) -> Sample:
    """Return the gaps between chunks that brought tokens (ICL), of the requests whose server counts them."""
    return _gaps([chunks[0] for request in completed if (chunks := token_chunks(request))]) / _NS_PER_MS


def token_weighted_gaps(completed: Sequence[RequestTrace]) -> Sample:
    """Return a sample for each token after the first chunk: a gap g that ended with k tokens gives k times g / k."""
    known = [chunks for request in completed if (chunks := token_chunks(request))]
    if not known:
        return np.empty(0)
    gaps = _gaps([instants for instants, _ in known]) / _NS_PER_MS
    tokens = np.concatenate([tokens[1:] for _, tokens in known])
    return np.repeat(gaps / tokens, tokens)


def tokens_per_chunk(completed: Sequence[RequestTrace]) -> NDArray[np.int64]:
    """Return the tokens of every chunk that brought any, of the requests whose server counts them."""
    known = [chunks[1] for request in completed if (chunks := token_chunks(request))]
    return np.concatenate(known) if known else np.empty(0, dtype=np.int64)


def adjusted_tpot_ms(request: RequestTrace) -> float | None:
    """Return (last - first chunk with tokens) / (tokens after that first chunk); ``None`` where it does not exist.

    TPOT divides by tokens - 1; where several tokens come with the first chunk it is too small by that.
    """
    chunks = token_chunks(request)
    if chunks is None:
        return None
    instants, tokens = chunks
    later = int(tokens[1:].sum())
    return float(instants[-1] - instants[0]) / later / _NS_PER_MS if later else None


def adjusted_tpots(completed: Sequence[RequestTrace]) -> Sample:
    """Return :func:`adjusted_tpot_ms` of those requests that have it."""
    return np.array([tpot for request in completed if (tpot := adjusted_tpot_ms(request)) is not None])


def token_chunks(request: RequestTrace) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Return instants (ns) and tokens of the chunks that brought tokens; ``None`` where the server did not say.

    The first message of a chat has a role and no token; the last one may only say why the answer ended.
    """
    if request.chunk_tokens is None:
        return None
    tokens = np.asarray(request.chunk_tokens, dtype=np.int64)
    bearing = tokens > 0
    return (chunk_instants(request)[bearing], tokens[bearing]) if bearing.any() else None


def chunk_instants(request: RequestTrace) -> NDArray[np.int64]:
    """Return (n_chunks,) in ns, without a copy where the trace keeps an array."""
    return np.asarray(request.chunk_ns, dtype=np.int64)


def _gaps(instants: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Differences within each array, one array after the other; none between two of them."""
    if not instants:
        return np.empty(0, dtype=np.int64)
    lengths = np.array([len(of_request) for of_request in instants])
    return np.delete(np.diff(np.concatenate(instants)), np.cumsum(lengths)[:-1] - 1)


def _in_ms(values_ns: Iterable[float]) -> Sample:
    return np.fromiter(values_ns, dtype=np.float64) / _NS_PER_MS
