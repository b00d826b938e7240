"""Timetables of open arrivals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, pstdev
from typing import Any

import pytest

from pytest_gpulayout.arrivals import arrival_offsets_ns
from pytest_gpulayout.workload import RampUp, Workload

SECOND = 1_000_000_000


def workload(**fields: Any) -> Workload:
    base: dict[str, Any] = {"name": "open", "input_tokens": 8, "output_tokens": 8, "requests": 4000}
    return Workload(**(base | fields))


def offsets(seed: int = 1, **fields: Any) -> Sequence[int]:
    drawn = arrival_offsets_ns(workload(**fields), seed=seed)
    assert drawn is not None
    return drawn


def gaps_s(drawn: Sequence[int]) -> list[float]:
    return [(b - a) / SECOND for a, b in pairwise(drawn)]


def test_a_closed_loop_has_no_timetable() -> None:
    assert arrival_offsets_ns(workload(concurrency=4), seed=1) is None


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_of_the_rate_and_the_spread_of_the_burstiness(burstiness: float) -> None:
    gaps = gaps_s(offsets(rate=50.0, burstiness=burstiness))
    assert fmean(gaps) == pytest.approx(1 / 50, rel=0.15)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(burstiness**-0.5, rel=0.15)


def test_infinite_burstiness_is_a_constant_rate() -> None:
    assert list(offsets(rate=4.0, burstiness=math.inf, requests=5)) == [n * SECOND // 4 for n in range(5)]


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert list(offsets(rate=math.inf, requests=5)) == [0] * 5


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        (RampUp("linear", 1.0, 3.0), [0, 1 / 2, 1 / 3]),
        (RampUp("exponential", 1.0, 4.0), [0, 1 / 2, 1 / 4]),
    ],
)
def test_a_ramp_raises_the_rate_with_the_share_of_requests_sent(ramp: RampUp, expected: list[float]) -> None:
    drawn = offsets(ramp_up=ramp, burstiness=math.inf, requests=3)
    assert gaps_s(drawn) == pytest.approx(expected[1:])
    assert drawn[0] == 0


def test_the_seed_alone_decides() -> None:
    assert offsets(seed=3, rate=10.0) == offsets(seed=3, rate=10.0)
    assert offsets(seed=3, rate=10.0) != offsets(seed=4, rate=10.0)
    assert all(a <= b for a, b in pairwise(offsets(rate=10.0)))
    assert offsets(rate=10.0, requests=1)[0] == 0
