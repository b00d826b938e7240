from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.judging import NOISE_PRIORS
from pytest_gpulayout.noise_study import judge_in_looks
from pytest_gpulayout.stats import POWER, NoisePrior, estimate_effect, estimate_spread
from pytest_gpulayout.tolerance import DEFAULT_TOLERANCES, Tolerance
from pytest_gpulayout.verdict import (
    FALSE_ALARM,
    MISS,
    MOST_SESSIONS,
    MOST_STARTS,
    AdvisoryChange,
    Look,
    MetricHistory,
    MetricSample,
    MetricVerdict,
    Status,
    bound_level,
    changed_fields,
    detectable,
    judge_metrics,
    overall_status,
)

PRIOR = NoisePrior(start_sd=0.005, session_sd=0.005)
CUDA = NOISE_PRIORS["cuda"]
LATENCY = Tolerance("median_tpot_ms", 0.05)
TIMES = ("median_tpot_ms", "median_ttft_ms", "p99_ttft_ms")
RATE = Tolerance("request_throughput", 0.05)
SHIPPED = tuple(Tolerance(name, fraction) for name, fraction in DEFAULT_TOLERANCES.items())
ONLY = Look(1, 1)
MILDER = (Status.IMPROVEMENT, Status.PASS, Status.INCONCLUSIVE, Status.REGRESSION)


def starts(*values: float) -> list[MetricSample]:
    return [MetricSample((value,)) for value in values]


def history(
    tolerance: Tolerance, current: Sequence[float], level: Sequence[Sequence[float]], prior: NoisePrior = PRIOR
) -> MetricHistory:
    return MetricHistory(tolerance, starts(*current), [starts(*session) for session in level], prior)


def judge(
    tolerance: Tolerance,
    *current: float,
    look: Look = ONLY,
    prior: NoisePrior = PRIOR,
    level: Sequence[Sequence[float]] = ((100, 100, 100),) * 3,
) -> MetricVerdict:
    return judge_metrics([history(tolerance, current, level, prior)], look)[0]


@pytest.mark.parametrize(
    ("tolerance", "current", "status"),
    [
        (LATENCY, 130.0, Status.REGRESSION),
        (LATENCY, 104.9, Status.REGRESSION),
        (LATENCY, 101.5, Status.PASS),
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
    assert (verdict.n_current, verdict.n_baseline, verdict.n_sessions, verdict.tolerance) == (3, 9, 3, 0.05)


def test_without_enough_evidence_it_is_no_pass() -> None:
    wide = NoisePrior(start_sd=0.10, session_sd=0.05)
    for current in (95.0, 100.0, 104.0, 110.0):
        verdict = judge(LATENCY, current, prior=wide)
        assert verdict.status is Status.INCONCLUSIVE
        assert verdict.ci[1] > 0.05
        assert verdict.min_detectable > 0.05


def test_no_pass_where_a_change_of_the_margin_could_not_have_been_seen() -> None:
    """However good the numbers look: the bound is far below the margin here."""
    verdict = judge(LATENCY, 96.0, 96.0, 96.0, level=[[97.5] * 3, [102.5] * 3] * 6)
    assert verdict.ci[1] < 0.05
    assert verdict.min_detectable > 0.05
    assert verdict.status is Status.INCONCLUSIVE


@pytest.mark.parametrize(
    ("current", "status", "ordinary"),
    [
        ((130.0, 130.0, 100.5), Status.REGRESSION, 0),
        ((130.0, 130.0, 99.5), Status.INCONCLUSIVE, 1),
        ((140.0, 99.0, 99.0), Status.INCONCLUSIVE, 2),
        ((70.0, 70.0, 99.5), Status.IMPROVEMENT, 0),
        ((70.0, 70.0, 100.5), Status.PASS, 1),  # not worse, and no improvement either
        ((100.5, 99.5, 100.0), Status.PASS, 0),
    ],
)
def test_a_change_shows_in_every_start(current: Sequence[float], status: Status, ordinary: int) -> None:
    """A few slow starts beside an ordinary one are no change, however far their mean lies away."""
    level = [[100.0, 100.2, 99.8], [100.1, 99.9, 100.0], [100.0, 100.0, 100.0]] * 4
    prior = NoisePrior(start_sd=0.001, session_sd=0.001)
    for tolerance, values in ((LATENCY, current), (RATE, [10_000 / value for value in current])):
        verdict = judge(tolerance, *values, level=level, prior=prior)
        assert (verdict.status, verdict.ordinary_starts) == (status, ordinary)


@pytest.mark.parametrize(
    ("confirming", "status", "ordinary"),
    [(101.0, Status.REGRESSION, 0), (300.0, Status.REGRESSION, 0), (99.5, Status.INCONCLUSIVE, 1)],
)
def test_a_start_that_confirms_has_no_part_in_the_test(confirming: float, status: Status, ordinary: int) -> None:
    level = [[100.0, 100.2, 99.8], [100.1, 99.9, 100.0], [100.0, 100.0, 100.0]] * 4
    for tolerance, sign in ((LATENCY, 1), (RATE, -1)):
        current = [100 * (value / 100) ** sign for value in (110.0, 112.0, 108.0, confirming)]
        before = judge(tolerance, *current[:3], level=level, look=Look(3, 3))
        after = judge(tolerance, *current, level=level, look=Look(3, 3, confirming=1))
        assert before.status is Status.REGRESSION
        assert (after.status, after.ordinary_starts, after.n_confirming) == (status, ordinary, 1)
        assert (after.current, after.change, after.n_current) == (before.current, before.change, 3)
        assert status is not Status.REGRESSION or after.ci == before.ci


def test_the_batches_of_a_start_that_confirms_widen_nothing() -> None:
    """The noise of batches is a floor of the spread: that of a start without part in the test is none."""
    level = [[MetricSample((100.0,))] * 3] * 10
    prior = NoisePrior(start_sd=0.001, session_sd=0.001)
    tested, restless = [MetricSample((110.0,))] * 2, MetricSample((60.0, 110.0, 180.0))
    before = judge_metrics([MetricHistory(LATENCY, tested, level, prior)], Look(2, 2))
    after = judge_metrics([MetricHistory(LATENCY, [*tested, restless], level, prior)], Look(2, 2, confirming=1))
    assert (after[0].ci, after[0].min_detectable) == (before[0].ci, before[0].min_detectable)


def test_half_of_the_stored_starts_are_ordinary_however_slow_the_others_are() -> None:
    """A tail to the slow side moves the mean of what is stored, and not what an ordinary start is."""
    level = [[100.0, 100.0, 106.0]] * 10
    verdict = judge(LATENCY, 101.5, 112.0, 112.0, level=level, prior=NoisePrior(start_sd=0.001, session_sd=0.001))
    assert verdict.baseline > 101.5
    assert (verdict.status, verdict.ordinary_starts) == (Status.REGRESSION, 0)


@pytest.mark.parametrize(
    ("starts", "look", "called_for"),
    [
        (1, Look(1, 3), {Status.INCONCLUSIVE}),
        (2, Look(2, 3), {Status.INCONCLUSIVE}),
        (3, Look(3, 3), {Status.REGRESSION}),
        (4, Look(3, 3, confirming=1), set()),
    ],
)
def test_when_one_more_start_would_serve(starts: int, look: Look, called_for: set[Status]) -> None:
    assert Look.after(starts, 3) == look
    assert {status for status in Status if look.calls_for_another(status)} == called_for


def test_a_small_change_that_is_certain_is_no_regression() -> None:
    verdict = judge(LATENCY, 102.0, 102.0, 102.0, prior=NoisePrior(start_sd=1e-4, session_sd=1e-4))
    assert verdict.ci[0] > 0
    assert verdict.status is Status.PASS


def test_bounds_are_at_the_level_of_a_false_alarm_and_of_a_miss() -> None:
    look = Look(2, 3)
    verdict = judge_metrics([history(RATE, [99.0], [[100.0] * 3] * 3)] * 3, look)[0]
    logs = [[-math.log(100)] * 3] * 3
    spread = estimate_spread(logs, [], [-math.log(99)], PRIOR, start_variance_floor=0.0)
    effect = estimate_effect([-math.log(99)], logs, spread)
    worse, better = effect.upper(look.miss), effect.lower(look.alarm / 3)
    assert verdict.ci == pytest.approx((math.expm1(-worse), math.expm1(-better)))
    assert verdict.min_detectable == pytest.approx(-math.expm1(-detectable(spread, RATE.margin, 3, 3)))


def test_the_bound_of_an_improvement_is_the_one_it_rests_on() -> None:
    better, worse = judge(LATENCY, 90.0, 90.0, 90.0), judge(RATE, 90.0, 90.0, 90.0)
    assert (better.status, worse.status) == (Status.IMPROVEMENT, Status.REGRESSION)
    assert better.ci == pytest.approx(worse.ci)


@given(st.lists(st.floats(-5, 0).map(lambda x: 10**x), min_size=1, max_size=12), st.sampled_from([0.01, 0.05]))
def test_metrics_are_found_as_by_benjamini_and_hochberg(p_values: list[float], level: float) -> None:
    rejected = scipy.stats.false_discovery_control(p_values, method="bh") <= level * (1 - 1e-9)
    bound = bound_level(p_values, level)
    assert all(p <= bound * (1 + 1e-9) for p, found in zip(p_values, rejected, strict=True) if found)
    surely_not = scipy.stats.false_discovery_control(p_values, method="bh") > level * (1 + 1e-9)
    assert all(p >= bound * (1 - 1e-9) for p, kept in zip(p_values, surely_not, strict=True) if kept)
    assert level / len(p_values) <= bound <= level * (1 + 1e-9)


def test_more_metrics_make_each_harder_to_fail() -> None:
    quiet, loud = history(LATENCY, [100.0] * 3, [[100.0] * 3] * 3), history(LATENCY, [102.0] * 3, [[100.0] * 3] * 3)
    alone, among = judge_metrics([loud], ONLY)[0], judge_metrics([loud, *[quiet] * 11], ONLY)[0]
    assert among.ci[0] < alone.ci[0]
    assert among.min_detectable > alone.min_detectable


def test_verdicts_come_in_the_order_of_the_metrics() -> None:
    one, other = history(LATENCY, [130.0] * 3, [[100.0] * 3] * 3), history(RATE, [100.0] * 3, [[100.0] * 3] * 3)
    assert [v.status for v in judge_metrics([one, other], ONLY)] == [Status.REGRESSION, Status.PASS]
    assert [v.status for v in judge_metrics([other, one], ONLY)] == [Status.PASS, Status.REGRESSION]
    assert judge_metrics([], ONLY) == ()


@pytest.mark.parametrize(("tolerance", "worse", "better"), [(LATENCY, 300.0, 30.0), (RATE, 30.0, 300.0)])
def test_one_start_decides_no_change_when_there_may_be_another(
    tolerance: Tolerance, worse: float, better: float
) -> None:
    for value, status in ((worse, Status.REGRESSION), (better, Status.IMPROVEMENT)):
        assert judge(tolerance, value, look=Look(1, 3)).status is Status.INCONCLUSIVE
        assert judge(tolerance, value, value, look=Look(2, 3)).status is status
        assert judge(tolerance, value, look=Look(1, 1)).status is status
        assert judge(tolerance, value, look=Look(3, 3)).status is status


def test_one_start_may_pass() -> None:
    assert judge(LATENCY, 99.0, look=Look(1, 3)).status is Status.PASS


def test_an_early_pass_rules_out_what_a_later_look_would_find() -> None:
    """An upper bound between the smallest detectable change and the margin waits for the last look."""
    early, last = judge(LATENCY, 101.8, 101.8, look=Look(2, 3)), judge(LATENCY, 101.8, 101.8, look=Look(3, 3))
    assert early.min_detectable < early.ci[1] < 0.05
    assert early.status is Status.INCONCLUSIVE
    assert last.status is Status.PASS


def test_where_time_runs_out_only_the_starts_that_were_made_count() -> None:
    level = [[100 * math.exp(y + e) for e in (-0.02, 0, 0.02)] for y in (-0.003, 0, 0.003)]
    cut_short, whole = judge(LATENCY, 100.0, look=Look(3, 3), level=level), judge(LATENCY, *[100.0] * 3, level=level)
    assert cut_short.min_detectable > whole.min_detectable


@pytest.mark.parametrize("of", [1, 2, 3, 6, 10, 51, 101, 102, 1000])
def test_levels_of_all_looks_add_up_to_the_whole(of: int) -> None:
    looks = [Look(number, of) for number in range(1, of + 1)]
    assert sum(look.alarm for look in looks) == pytest.approx(FALSE_ALARM)
    assert sum(look.miss for look in looks) == pytest.approx(MISS)
    assert min(look.alarm for look in looks) > 0
    assert looks[-1].alarm >= FALSE_ALARM / 2


def test_one_disturbed_batch_does_not_move_a_start() -> None:
    assert MetricSample((100.0, 101.0, 900.0)).value == 101.0


def test_noisy_batches_widen_the_interval() -> None:
    noisy = [MetricSample((80.0, 100.0, 125.0))]
    wide = judge_metrics([MetricHistory(LATENCY, noisy, [noisy * 3] * 3, PRIOR)], ONLY)[0]
    assert wide.ci[1] > judge(LATENCY, 100.0).ci[1] * 3


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["this session", "a stored session", "another level"])
def test_what_is_no_number_above_zero_is_refused(value: float, where: str) -> None:
    good, bad = starts(100.0, 100.0), [MetricSample((100.0,)), MetricSample((100.0, value, 100.0))]
    parts = {
        "this session": MetricHistory(LATENCY, bad, [good], PRIOR),
        "a stored session": MetricHistory(LATENCY, good, [good, bad], PRIOR),
        "another level": MetricHistory(LATENCY, good, [good], PRIOR, [[good], [bad]]),
    }
    with pytest.raises(MeasurementError) as error:
        judge_metrics([history(RATE, [1.0], [[1.0]]), parts[where]], ONLY)
    told = "this session" if where == "this session" else "a stored session"
    assert str(error.value) == (
        f"numbers above zero were required of a gated metric, found 100, {value:g}, 100 ms\n"
        f"  median_tpot_ms, server start 2 of {told}\n"
        "  measure again; where it is stored, record it anew: --gpu-baseline=update"
    )


@pytest.mark.parametrize(
    ("current", "level", "found"),
    [
        ([], [[100.0]], "found 0 now and [1] stored"),
        ([100.0], [], "found 1 now and [] stored"),
        ([100.0], [[100.0, 100.0], []], "found 1 now and [0, 2] stored"),
    ],
)
def test_a_metric_without_samples_is_refused(current: list[float], level: list[list[float]], found: str) -> None:
    with pytest.raises(MeasurementError) as error:
        judge(LATENCY, *current, level=level)
    assert found in str(error.value)
    assert str(error.value).splitlines()[1:] == [
        "  median_tpot_ms",
        "  measure it in every session, or gate other metrics: --gpu-tolerance",
    ]


def test_a_start_without_a_batch_is_refused() -> None:
    with pytest.raises(
        MeasurementError, match=r"found no batch ms\n  median_tpot_ms, server start 1 of this session"
    ):
        judge_metrics([MetricHistory(LATENCY, [MetricSample(())], [starts(100.0)], PRIOR)], ONLY)


def test_differences_beyond_all_measure_have_a_verdict() -> None:
    wild = judge(LATENCY, 1e-300, 1e300, level=[[1e300, 1e-300], [1e-300, 1e-300]])
    assert wild.status is Status.INCONCLUSIVE
    assert all(map(math.isfinite, (*wild.ci, wild.change, wild.min_detectable)))


def sessions(count: int, seed: int, *, session_sd: float, start_sd: float) -> list[list[float]]:
    """The last one is the current one."""
    rng = np.random.default_rng(seed)
    return [list(np.exp(rng.normal(rng.normal(0, session_sd), start_sd, 3))) for _ in range(count + 1)]


seeds = st.integers(0, 2**32 - 1)
counts = st.integers(1, 10)
sds = st.floats(0.001, 0.1)
looks = st.sampled_from([Look(1, 1), Look(1, 3), Look(2, 3), Look(3, 3)])


@given(seeds, counts, sds, sds, looks, st.floats(1e-9, 1e9))
def test_a_unit_changes_nothing(
    seed: int, count: int, session_sd: float, start_sd: float, look: Look, factor: float
) -> None:
    drawn = sessions(count, seed, session_sd=session_sd, start_sd=start_sd)
    *level, current = drawn
    *scaled_level, scaled = [[factor * value for value in session] for session in drawn]
    one = judge_metrics([history(t, current, level, CUDA) for t in SHIPPED], look)
    other = judge_metrics([history(t, scaled, scaled_level, CUDA) for t in SHIPPED], look)
    for before, after in zip(one, other, strict=True):
        assert after.status is before.status
        assert after.ci == pytest.approx(before.ci, abs=1e-6)
        assert after.min_detectable == pytest.approx(before.min_detectable, rel=1e-6)
        if before.requirement and after.requirement:
            assert after.requirement.smallest == pytest.approx(before.requirement.smallest, rel=1e-6)


@given(seeds, counts, sds, sds, looks, st.floats(1.0, 2.0), st.integers(0, 2))
def test_a_worse_metric_is_never_judged_more_mildly(
    seed: int, count: int, session_sd: float, start_sd: float, look: Look, factor: float, worse: int
) -> None:
    """Neither itself nor any other; all starts are slower by the same factor."""
    *level, current = sessions(count, seed, session_sd=session_sd, start_sd=start_sd)
    before = [history(LATENCY, current, level, CUDA) for _ in range(3)]
    after = [*before]
    after[worse] = history(LATENCY, [factor * value for value in current], level, CUDA)
    for index, (one, other) in enumerate(zip(judge_metrics(before, look), judge_metrics(after, look), strict=True)):
        assert MILDER.index(other.status) >= MILDER.index(one.status), index


@given(seeds, counts, sds, sds, looks, st.floats(-0.3, 0.3))
def test_the_other_direction_is_the_mirror_image(
    seed: int, count: int, session_sd: float, start_sd: float, look: Look, shift: float
) -> None:
    """A time and its inverse, a rate, have one verdict; a time and the inverse of a time have opposite ones."""
    drawn = sessions(count, seed, session_sd=session_sd, start_sd=start_sd)
    drawn[-1] = [value * math.exp(shift) for value in drawn[-1]]
    *level, current = drawn
    *inverse_level, inverse = [[1 / value for value in session] for session in drawn]
    fraction = -math.expm1(-LATENCY.margin)
    time = judge(LATENCY, *current, look=look, prior=CUDA, level=level)
    rate = judge(Tolerance(RATE.metric, fraction), *inverse, look=look, prior=CUDA, level=inverse_level)
    assert rate.status is time.status
    assert rate.change == pytest.approx(1 / (1 + time.change) - 1)
    assert rate.ci == pytest.approx([1 / (1 + bound) - 1 for bound in reversed(time.ci)])
    turned = judge(LATENCY, *inverse, look=look, prior=CUDA, level=inverse_level)
    opposite = {Status.REGRESSION: Status.IMPROVEMENT, Status.IMPROVEMENT: Status.REGRESSION}
    if time.status in opposite:
        assert turned.status is opposite[time.status]
    else:
        assert turned.status not in opposite


@given(seeds, counts, sds, sds)
def test_what_is_required_is_enough(seed: int, count: int, session_sd: float, start_sd: float) -> None:
    *level, current = sessions(count, seed, session_sd=session_sd, start_sd=start_sd)
    verdict = judge(LATENCY, *current, prior=CUDA, level=level)
    logs = [[math.log(value) for value in session] for session in (*level, current)]
    spread = estimate_spread(logs[:-1], [], logs[-1], CUDA, start_variance_floor=0.0)
    needed = verdict.requirement
    if needed is None:
        return
    margin = LATENCY.margin

    def sees(starts: int, sessions: int) -> bool:
        return detectable(spread, margin, 1, starts, sessions=sessions) <= margin

    if needed.starts is not None:
        assert sees(needed.starts, count)
        assert needed.starts == 1 or not sees(needed.starts - 1, count)
    if needed.sessions is not None:
        assert all(sees(MOST_STARTS, k) for k in range(needed.sessions, MOST_SESSIONS + 1))
    else:
        assert not sees(MOST_STARTS, MOST_SESSIONS)
    assert needed.smallest > 0


def simulate(
    rng: np.random.Generator,
    noise: NoisePrior,
    *,
    stored: int,
    looks: int,
    metrics: int = 1,
    change: float | None = 0.0,
) -> Status:
    """One gate with fresh noise, independent between metrics; ``None`` changes the first by what it can detect."""
    drawn = []
    for _ in range(metrics):
        logs = rng.normal(0, noise.session_sd, (stored + 1, 1)) + rng.normal(0, noise.start_sd, (stored + 1, 4))
        drawn.append(np.exp(logs))
    drawn[0][-1] *= 1 + (_detectable(drawn, noise, looks) if change is None else change)
    tolerances = {name: Tolerance(name, LATENCY.fraction) for name in TIMES[:metrics]}
    *sessions, current = (
        [dict(zip(tolerances, starts(*values), strict=True)) for values in session]
        for session in np.moveaxis(np.array(drawn), 0, -1)
    )
    verdicts = judge_in_looks(current, [s[:3] for s in sessions], tolerances, noise, of=3, first=4 - looks)
    return overall_status(verdicts)


def _detectable(drawn: Sequence[np.ndarray[Any, np.dtype[np.float64]]], noise: NoisePrior, looks: int) -> float:
    histories = [history(LATENCY, values[-1][:3], [s[:3] for s in values[:-1]], noise) for values in drawn]
    return judge_metrics(histories, Look(looks, looks))[0].min_detectable


@pytest.mark.parametrize(
    ("stored", "looks", "metrics", "trials"),
    [(8, 1, 1, 3000), (8, 3, 1, 1200), (12, 2, 3, 400), (1, 3, 1, 1200), (4, 3, 3, 400)],
)
def test_false_alarms_keep_their_level_over_all_looks(stored: int, looks: int, metrics: int, trials: int) -> None:
    rng = np.random.default_rng(stored)
    found = [simulate(rng, CUDA, stored=stored, looks=looks, metrics=metrics) for _ in range(trials)]
    allowed = scipy.stats.binom(trials, FALSE_ALARM).ppf(0.999)
    assert found.count(Status.REGRESSION) <= allowed
    assert found.count(Status.IMPROVEMENT) <= allowed


def test_false_alarms_of_one_look_are_as_frequent_as_meant() -> None:
    """The level is used up: with it, and no other, goes the power. Half the margin plays no part at this noise."""
    rng = np.random.default_rng(5)
    noise, trials = NoisePrior(start_sd=0.05, session_sd=0.04), 4000
    found = [simulate(rng, noise, stored=8, looks=1) for _ in range(trials)]
    assert found.count(Status.REGRESSION) >= scipy.stats.binom(trials, FALSE_ALARM).ppf(0.001)


@pytest.mark.parametrize(
    ("noise", "looks", "metrics"),
    [
        (NoisePrior(0.015, 0.02), 1, 1),
        (NoisePrior(0.015, 0.02), 3, 1),
        (NoisePrior(0.004, 0.006), 3, 1),
        (NoisePrior(0.015, 0.002), 3, 2),
    ],
    ids=["wide, one look", "wide", "narrow", "between starts"],
)
def test_the_smallest_detectable_change_is_found_in_80_of_100(noise: NoisePrior, looks: int, metrics: int) -> None:
    """The figure that is printed, by the whole procedure: early looks may pass, and must not at this change."""
    trials = 700
    rng = np.random.default_rng(6)
    found = [simulate(rng, noise, stored=9, looks=looks, metrics=metrics, change=None) for _ in range(trials)]
    low, high = scipy.stats.binom(trials, [POWER - 0.015, POWER + 0.015]).ppf([0.001, 0.999])
    assert low <= found.count(Status.REGRESSION) <= high


@pytest.mark.parametrize("stored", [1, 5, 9])
def test_a_change_by_a_factor_of_two_is_always_found(stored: int) -> None:
    rng = np.random.default_rng(7)
    for prior in NOISE_PRIORS.values():
        found = {simulate(rng, prior, stored=stored, looks=3, change=1.0) for _ in range(100)}
        assert found == {Status.REGRESSION}


def test_a_change_of_the_margin_is_seldom_called_a_pass() -> None:
    rng = np.random.default_rng(8)
    quiet, trials = NoisePrior(start_sd=0.008, session_sd=0.008), 1500
    found = [simulate(rng, quiet, stored=9, looks=3, change=0.05) for _ in range(trials)]
    assert found.count(Status.PASS) <= scipy.stats.binom(trials, MISS).ppf(0.999)


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


def test_where_the_server_is_never_started_anew_what_is_required_holds_for_one_start() -> None:
    level = ((100, 101, 99), (101, 102, 100), (99, 100, 98))
    ours = judge(LATENCY, 103.0, prior=CUDA, level=level)
    theirs = judge(LATENCY, 103.0, look=Look(1, 1, restarts=False), prior=CUDA, level=level)

    assert (ours.status, ours.ci) == (Status.INCONCLUSIVE, theirs.ci)
    assert theirs.status is ours.status
    assert ours.requirement is not None
    assert theirs.requirement is not None
    assert theirs.requirement.starts in (None, 1)
    assert theirs.requirement.smallest > ours.requirement.smallest
