"""The knee of a sweep."""

from __future__ import annotations

import pytest

from pytest_gpulayout.knee import SweepPoint, find_knee, is_saturated, run_sweep


def server(load: float, *, capacity: float = 40.0, alone_s: float = 0.1) -> SweepPoint:
    """A closed loop on a server that serves in ``alone_s`` until ``capacity`` is reached (asymptotic bounds)."""
    throughput = min(load / alone_s, capacity)
    return SweepPoint(load=load, throughput=throughput, latency_s=load / throughput)


def test_the_knee_of_asymptotic_bounds_is_where_they_meet() -> None:
    knee = find_knee([server(load) for load in (16, 1, 2, 4, 8)])
    assert knee.point.load == 4
    assert knee.saturated


def test_a_sweep_that_stopped_too_early_says_so() -> None:
    knee = find_knee([server(load) for load in (1, 2, 4)])
    assert knee.point.load == 4
    assert not knee.saturated


def test_one_point_is_its_own_knee() -> None:
    assert find_knee([server(3)]).point.load == 3
    assert not is_saturated([server(3)])


def test_without_points_there_is_no_knee() -> None:
    with pytest.raises(ValueError, match="empty"):
        find_knee([])


def test_a_sweep_doubles_until_it_stops_paying_and_refines_once() -> None:
    tried: list[float] = []

    def measure(load: float) -> SweepPoint:
        tried.append(load)
        return server(load, capacity=45.0)

    knee = run_sweep(measure, start=1, limit=1000, whole=True)
    assert tried == [1, 2, 4, 8, 16, 3, 6]
    assert (knee.point.load, knee.saturated) == (4, True)


def test_a_sweep_ends_at_its_limit() -> None:
    knee = run_sweep(server, start=1, limit=3, whole=True)
    assert (knee.point.load, knee.saturated) == (2, False)


def test_a_sweep_over_rates_tries_broken_numbers() -> None:
    tried: list[float] = []

    def measure(load: float) -> SweepPoint:
        tried.append(load)
        return server(load)

    run_sweep(measure, start=0.5, limit=1, whole=False)
    assert tried == pytest.approx([0.5, 1.0, 0.5**0.5])


def test_saturation_is_less_than_5_percent_for_a_doubling() -> None:
    def point(load: float, throughput: float) -> SweepPoint:
        return SweepPoint(load=load, throughput=throughput, latency_s=1.0)

    assert is_saturated([point(4, 100), point(8, 104)])
    assert not is_saturated([point(4, 100), point(8, 106)])
    assert not is_saturated([point(4, 100), point(6, 104)])
