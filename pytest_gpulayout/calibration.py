"""How far the client is from the truth on this host: the errors of a run against a server that knows what it did.

Knows the comparison. Leaves running it to the adapters.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Client - server of one short run against the built-in mock, both by ``CLOCK_MONOTONIC`` of this host.

    :param streams: requests in flight. :param ttft_ms: of the mock. :param itl_ms: of the mock.
    :param seconds: that it took. :param events_per_s: messages that the mock sent.
    :param median_ttft_error_ms: median of what the client says less median of what the mock did; the others alike.
    :param cpu_us_per_event: CPU time of the client for each message received.
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
