"""When the requests of open arrivals are due: a timetable, drawn before the first is sent.

Knows the distributions that ``vllm bench serve`` knows (vLLM 0.32, ``vllm/benchmarks/serve.py``, ``get_request``):
gaps are gamma distributed with the mean 1 / rate and the shape ``burstiness``; 1 is a Poisson process, ``inf`` a
constant rate. Two things differ on purpose. vLLM stretches the gaps so that the last request comes at requests /
rate; after that it is no Poisson process any more. And here the first request is due at once, not a gap later. Leaves
keeping to the timetable to the load driver.
"""

from __future__ import annotations

import math
from array import array

from pytest_gpulayout.workload import RampUp, Workload

_NS_PER_S = 1e9


def arrival_offsets_ns(workload: Workload, *, seed: int) -> array[int] | None:
    """Draw when each request of a batch is due.

    :param seed: of the gaps; the same seed gives the same timetable (``numpy.random.PCG64``).
    :returns: (requests,), ns from the start of the batch, the first 0, never falling; ``None`` for a closed loop.
    """
    if not workload.is_open:
        return None
    rates = _rates(workload)
    if math.inf in rates:
        return array("q", bytes(8 * workload.requests))
    import numpy as np

    gaps_s = 1.0 / np.asarray(rates)
    if not math.isinf(workload.burstiness):
        shape = workload.burstiness
        gaps_s *= np.random.Generator(np.random.PCG64(seed)).gamma(shape, 1.0 / shape, len(rates))
    gaps_s[0] = 0.0
    return array("q", np.cumsum(gaps_s * _NS_PER_S).astype(np.int64).tobytes())


def _rates(workload: Workload) -> list[float]:
    """(requests,), the rate at which each request comes after the one before, in requests per second."""
    if workload.ramp_up is None:
        return [workload.rate or math.inf] * workload.requests
    last = max(workload.requests - 1, 1)
    return [_ramped(workload.ramp_up, index / last) for index in range(workload.requests)]


def _ramped(ramp: RampUp, progress: float) -> float:
    """The rate after a share of the requests, as vLLM's ``_get_current_request_rate`` has it."""
    if ramp.strategy == "linear":
        return ramp.start_rate + (ramp.end_rate - ramp.start_rate) * progress
    return float(ramp.start_rate * (ramp.end_rate / ramp.start_rate) ** progress)
