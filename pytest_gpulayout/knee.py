"""The knee of a sweep: the load up to which more requests in flight still pay.

Knows one rule, power = throughput / latency (Kleinrock, "Power and deterministic rules of thumb for probabilistic
problems in computer communications", ICC 1979): the load with the most power is the knee; before it throughput is
given away, after it latency is. And which loads to try. Leaves measuring to others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_SATURATED_GAIN = 0.05
"""Below this gain in throughput from doubling the load, the server has no more to give."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """One load and what came of it. :param load: requests in flight, or requests per second.

    :param throughput: requests per second. :param latency_s: median end-to-end latency.
    """

    load: float
    throughput: float
    latency_s: float

    @property
    def power(self) -> float:
        """Throughput / latency, requests per second squared."""
        return self.throughput / self.latency_s


@dataclass(frozen=True, slots=True)
class Knee:
    """:param point: with the most power. :param saturated: whether the sweep went on until more load gave no more."""

    point: SweepPoint
    saturated: bool


def find_knee(points: Sequence[SweepPoint]) -> Knee:
    """Return the point with the most power; of equals the smaller load.

    :param points: (n_points,), at least one, in any order.
    :raises ValueError: there is no point.
    """
    ordered = sorted(points, key=lambda point: point.load)
    return Knee(max(ordered, key=lambda point: point.power), is_saturated(ordered))


def is_saturated(points: Sequence[SweepPoint]) -> bool:
    """Whether the last step up gained less than 5 % of throughput for each doubling of the load.

    :param points: (n_points,), by load.
    """
    if len(points) == 1:
        return False
    before, last = points[-2:]
    doublings = max(last.load / before.load - 1, 1e-9)
    return last.throughput < before.throughput * (1 + _SATURATED_GAIN * doublings)


def _between(points: Sequence[SweepPoint], knee: SweepPoint, *, whole: bool) -> tuple[float, ...]:
    """Return the loads that tell more about where the knee is: the geometric middles to its neighbours.

    :param points: (n_points,), by load. :param whole: a load is a number of requests in flight.
    """
    loads = [point.load for point in points]
    at = loads.index(knee.load)
    pairs = [(loads[i], loads[i + 1]) for i in (at - 1, at) if 0 <= i < len(loads) - 1]
    middles = [(low * high) ** 0.5 for low, high in pairs]
    if whole:
        middles = [float(round(middle)) for middle in middles]
    return tuple(middle for middle in dict.fromkeys(middles) if middle not in loads)


def run_sweep(measure: Callable[[float], SweepPoint], *, start: float, limit: float, whole: bool) -> Knee:
    """Double the load until that stops paying, then look once more on both sides of the knee.

    :param measure: measures at a load. :param limit: the greatest load to try.
    :param whole: a load is a number of requests in flight, and not a rate."""
    points = [measure(start)]
    while not is_saturated(points) and points[-1].load * 2 <= limit:
        points.append(measure(points[-1].load * 2))
    saturated = is_saturated(points)
    points += [measure(load) for load in _between(points, find_knee(points).point, whole=whole)]
    return Knee(find_knee(points).point, saturated)
