from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pytest_gpulayout.stats import NoisePrior, estimate_effect
from pytest_gpulayout.tolerance import Tolerance
from pytest_gpulayout.verdict import (
    FALSE_ALARM,
    MISS,
    AdvisoryChange,
    Look,
    MetricSample,
    MetricVerdict,
    Status,
    changed_fields,
    judge_metric,
    overall_status,
)

PRIOR = NoisePrior(start_sd=0.005, session_sd=0.005)
LATENCY = Tolerance("median_tpot_ms", 0.05)
RATE = Tolerance("request_throughput", 0.05)
ONLY = Look(1, 1)


def starts(*values: float) -> list[MetricSample]:
    return [MetricSample((value, value)) for value in values]


def judge(
    tolerance: Tolerance, *current: float, look: Look = ONLY, metrics: int = 1, prior: NoisePrior = PRIOR
) -> MetricVerdict:
    """Against three sessions of three starts at 100."""
    return judge_metric(
        tolerance, starts(*current), [starts(100, 100, 100)] * 3, prior=prior, look=look, metrics=metrics
    )


@pytest.mark.parametrize(
    ("tolerance", "current", "status"),
    [
        (LATENCY, 130.0, Status.REGRESSION),
        (LATENCY, 104.9, Status.REGRESSION),
        (LATENCY, 102.0, Status.PASS),
        (LATENCY, 100.0, Status.PASS),
        (LATENCY, 98.5, Status.PASS),
        (LATENCY, 70.0, Status.IMPROVEMENT),
        (RATE, 70.0, Status.REGRESSION),
        (RATE, 95.1, Status.REGRESSION),
        (RATE, 98.5, Status.PASS),
        (RATE, 100.0, Status.PASS),
        (RATE, 130.0, Status.IMPROVEMENT),
    ],
)
def test_a_time_that_rises_and_a_rate_that_falls_are_worse(
    tolerance: Tolerance, current: float, status: Status
) -> None:
    verdict = judge(tolerance, current, current, current)
    assert verdict.status is status
    assert (verdict.baseline, verdict.current) == pytest.approx((100.0, current))
    assert verdict.change == pytest.approx(current / 100 - 1)
    assert verdict.ci[0] < verdict.change < verdict.ci[1]
    assert (verdict.n_current, verdict.n_baseline, verdict.tolerance) == (3, 9, 0.05)


def test_without_enough_evidence_it_is_no_pass() -> None:
    wide = NoisePrior(start_sd=0.10, session_sd=0.05)
    for current in (95.0, 100.0, 104.0, 110.0):
        verdict = judge(LATENCY, current, prior=wide)
        assert verdict.status is Status.INCONCLUSIVE
        assert verdict.ci[1] > 0.05
        assert verdict.min_detectable > 0.05


def test_a_small_change_that_is_certain_is_no_regression() -> None:
    exact = NoisePrior(start_sd=1e-4, session_sd=1e-4)
    verdict = judge(LATENCY, 102.0, 102.0, 102.0, prior=exact)
    assert verdict.ci[0] > 0
    assert verdict.status is Status.PASS


def test_bounds_are_at_the_level_of_a_false_alarm_and_of_a_miss() -> None:
    verdict = judge(RATE, 90.0, look=Look(2, 3), metrics=3)
    logs = [[-math.log(100)] * 3] * 3
    effect = estimate_effect([-math.log(90)], logs, PRIOR, start_variance_floor=0.0)
    worse, better = effect.upper(0.1 * MISS), effect.lower(0.1 * FALSE_ALARM / 3)
    assert verdict.ci == pytest.approx((math.expm1(-worse), math.expm1(-better)))
    assert verdict.min_detectable == pytest.approx(-math.expm1(-effect.detectable(0.1 * FALSE_ALARM / 3)))


def test_more_metrics_make_each_harder_to_fail() -> None:
    assert judge(LATENCY, 110.0, metrics=12).ci[0] < judge(LATENCY, 110.0, metrics=1).ci[0]


def test_the_first_look_is_never_a_regression_when_there_may_be_another() -> None:
    assert judge(LATENCY, 300.0, look=Look(1, 3)).status is Status.INCONCLUSIVE
    assert judge(LATENCY, 300.0, 300.0, look=Look(2, 3)).status is Status.REGRESSION
    assert judge(LATENCY, 300.0, look=Look(1, 1)).status is Status.REGRESSION
    assert judge(LATENCY, 300.0, look=Look(3, 3)).status is Status.REGRESSION


def test_the_first_look_may_pass() -> None:
    assert judge(LATENCY, 99.0, look=Look(1, 3)).status is Status.PASS
    assert judge(LATENCY, 60.0, look=Look(1, 3)).status is Status.IMPROVEMENT


@pytest.mark.parametrize("of", [1, 2, 3, 6, 7, 11, 12, 100])
def test_levels_of_all_looks_add_up_to_the_whole(of: int) -> None:
    levels = [Look(number, of).level(0.01) for number in range(1, of + 1)]
    assert sum(levels) == pytest.approx(0.01)
    assert min(levels) > 0
    assert levels[-1] >= 0.005


def test_one_disturbed_batch_does_not_move_a_start() -> None:
    assert MetricSample((100.0, 101.0, 900.0)).value == 101.0


def test_noisy_batches_widen_the_interval() -> None:
    noisy = [MetricSample((80.0, 100.0, 125.0))] * 3
    wide = judge_metric(LATENCY, noisy, [noisy] * 3, prior=PRIOR, look=ONLY, metrics=1)
    assert wide.ci[1] > judge(LATENCY, 100.0, 100.0, 100.0).ci[1] * 3


@pytest.mark.parametrize(
    ("found", "overall"),
    [
        ("", "inconclusive"),
        ("pass", "pass"),
        ("pass pass", "pass"),
        ("pass improvement", "improvement"),
        ("improvement inconclusive", "inconclusive"),
        ("pass inconclusive", "inconclusive"),
        ("inconclusive regression improvement pass", "regression"),
        ("regression improvement", "regression"),
    ],
)
def test_overall_status(found: str, overall: str) -> None:
    verdict = judge(LATENCY, 100.0)
    verdicts = [replace(verdict, status=Status(status)) for status in found.split()]
    assert overall_status(verdicts) is Status(overall)


def test_only_pass_and_improvement_are_shown_as_passed() -> None:
    assert [status for status in Status if status.passed] == [Status.PASS, Status.IMPROVEMENT]


def test_advisory_change() -> None:
    assert AdvisoryChange("p99_ttft_ms", 100.0, 110.0).change == pytest.approx(0.10)
    assert AdvisoryChange("p99_ttft_ms", None, 110.0).change is None


@pytest.mark.parametrize(
    ("stored", "now", "told"),
    [
        ({"driver": "570"}, {"driver": "570"}, ()),
        ({"driver": "570", "cuda": "12"}, {"driver": "580", "cuda": "12"}, ("driver: 570 -> 580",)),
        ({"driver": "570"}, {}, ("driver: 570 -> unknown",)),
        ({}, {"driver": "580"}, ("driver: unknown -> 580",)),
        ({"nccl": None}, {}, ()),
        ({"nccl": None}, {"nccl": "2.27"}, ("nccl: unknown -> 2.27",)),
        ({"a": 1, "b": 1}, {"b": 2, "c": 3, "a": 2}, ("a: 1 -> 2", "b: 1 -> 2", "c: unknown -> 3")),
    ],
)
def test_changed_fields(stored: dict[str, object], now: dict[str, object], told: tuple[str, ...]) -> None:
    assert changed_fields(stored, now) == told
