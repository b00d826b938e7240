"""Paired mode's statistics against independent computations, and what they promise in many drawn gates."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.pairs import (
    LATER_LOOKS,
    LOOKS,
    OVERALL,
    PairedHistory,
    StartSpread,
    is_look,
    judge_pairs,
    level_per_look,
    looks_of,
    sign_count,
    spread_of_starts,
)
from pytest_gpulayout.tolerance import Tolerance
from pytest_gpulayout.verdict import MetricSample, MetricVerdict, Status

TPOT = Tolerance("median_tpot_ms", 0.05)
RATE = Tolerance("request_throughput", 0.05)
BASE = 10.0


def samples(values: Sequence[float] | np.ndarray) -> list[MetricSample]:
    return [MetricSample((value,)) for value in values]


def history(
    differences: Sequence[float] | np.ndarray,
    *,
    tolerance: Tolerance = TPOT,
    stored: StartSpread | None = None,
    base_restarts: bool = True,
    luck: Sequence[float] | None = None,
) -> PairedHistory:
    """Blocks with these logs of candidate / base. :param luck: log of each base start."""
    base = [BASE * math.exp(value) for value in luck or [0.0] * len(differences)]
    candidate = [value * math.exp(d) for value, d in zip(base, differences, strict=True)]
    return PairedHistory(tolerance, samples(candidate), samples(base), stored, base_restarts)


def only(found: tuple[MetricVerdict, ...]) -> MetricVerdict:
    [verdict] = found
    return verdict


# -- one look --------------------------------------------------------------------------------------------------------


def test_effect_and_bounds_are_those_of_a_paired_t_test() -> None:
    candidate, base = [10.9, 10.2, 10.7, 10.1], [10.0, 10.1, 9.9, 10.3]
    verdict = only(judge_pairs([PairedHistory(TPOT, samples(candidate), samples(base))]))

    d = np.log(candidate) - np.log(base)
    n = len(d)
    level = 0.01 * 0.274  # the share of the table for one metric and nothing stored
    low = d.mean() - stats.t.ppf(1 - level, n - 1) * stats.sem(d)
    high = d.mean() + stats.t.ppf(1 - 0.05 * 0.337, n - 1) * stats.sem(d)
    assert verdict.change == pytest.approx(math.expm1(d.mean()))
    assert verdict.ci == pytest.approx((math.expm1(low), math.expm1(high)))
    assert verdict.baseline == pytest.approx(stats.gmean(base))
    assert verdict.current == pytest.approx(stats.gmean(candidate))
    assert (verdict.n_current, verdict.n_baseline, verdict.n_sessions) == (4, 4, 0)
    assert verdict.status is Status.INCONCLUSIVE


def test_stored_spread_is_pooled_with_its_degrees_of_freedom() -> None:
    d = np.array([0.01, 0.03, 0.02])
    stored = StartSpread(variance=0.02**2, df=10)
    verdict = only(judge_pairs([history(d, stored=stored)]))

    variance = (10 * 2 * 0.02**2 + d.var(ddof=1) * 2) / 12
    level = level_per_look(0.01, 10, 8)
    low = d.mean() - stats.t.ppf(1 - level, 12) * math.sqrt(variance / 3)
    assert verdict.ci[0] == pytest.approx(math.expm1(low))


def test_a_stored_spread_weighs_sixteen_degrees_of_freedom_at_most() -> None:
    d = [0.01, 0.03, 0.02]
    many, sixteen = (judge_pairs([history(d, stored=StartSpread(0.0004, df))]) for df in (400, 16))

    assert many == sixteen


def test_blocks_that_scatter_far_more_than_what_is_stored_stand_alone() -> None:
    d = [0.30, -0.30, 0.1, 0.0]
    quiet = StartSpread(variance=0.001**2, df=16)

    assert judge_pairs([history(d, stored=quiet)]) == judge_pairs([history(d)])
    calm = StartSpread(variance=0.2**2, df=16)
    assert judge_pairs([history(d, stored=calm)]) != judge_pairs([history(d)])


def test_smallest_detectable_change_is_missed_in_one_of_five_runs() -> None:
    d = np.array([0.01, -0.01, 0.015])
    verdict = only(judge_pairs([history(d)]))

    change, sd, margin = math.log1p(verdict.min_detectable), d.std(ddof=1), math.log(1.05)
    at_end = stats.nct.cdf(stats.t.ppf(1 - 0.00274, 7), 7, change / (sd / math.sqrt(8)))
    passed_early = [
        stats.nct.sf(stats.t.ppf(1 - 0.01685, n - 1), n - 1, (margin - change) / (sd / math.sqrt(n)))
        for n in (3, 4, 5, 6)
    ]
    assert at_end + sum(passed_early) == pytest.approx(0.2, abs=0.002)


def test_after_few_blocks_that_are_all_only_what_they_show_counts() -> None:
    d = [0.05, -0.05, 0.04, 0.0]

    planned, ended = (only(judge_pairs([history(d)], is_last=last)).min_detectable for last in (False, True))

    assert ended > planned


def test_a_base_that_is_one_draw_is_less_certain() -> None:
    d = np.array([0.10, 0.11, 0.12])
    verdict = only(judge_pairs([history(d, base_restarts=False)]))

    se = d.std(ddof=1) * math.sqrt(1 / 3 + 1)
    low = d.mean() - stats.t.ppf(1 - level_per_look(0.01, 0, 8), 2) * se
    assert verdict.ci[0] == pytest.approx(math.expm1(low))
    assert verdict.n_baseline == 1
    stored = StartSpread(0.01**2, 16)  # only one of the two sides is a new draw in each block
    pooled = math.sqrt((16 * 0.01**2 + d.var(ddof=1) * 2) / 18 * (1 / 3 + 1))
    low = d.mean() - stats.t.ppf(1 - level_per_look(0.01, 16, 8), 18) * pooled
    assert only(judge_pairs([history(d, stored=stored, base_restarts=False)])).ci[0] == pytest.approx(math.expm1(low))


# -- verdicts --------------------------------------------------------------------------------------------------------

STEADY = [0.001, -0.001, 0.0005, -0.0005, 0.001, -0.001, 0.0007, -0.0007]


@pytest.mark.parametrize(
    ("shift", "status"),
    [
        (0.0, Status.PASS),
        (0.015, Status.PASS),  # certain, and less than half of what matters
        (0.04, Status.REGRESSION),
        (0.30, Status.REGRESSION),
        (-0.30, Status.IMPROVEMENT),
    ],
)
@pytest.mark.parametrize("tolerance", [TPOT, RATE])
def test_a_steady_change_is_judged_by_its_size(shift: float, status: Status, tolerance: Tolerance) -> None:
    sign = 1 if tolerance is TPOT else -1
    d = [sign * (value + shift) for value in STEADY]

    verdict = only(judge_pairs([history(d, tolerance=tolerance)]))

    assert verdict.status is status
    assert verdict.ci[0] <= verdict.change <= verdict.ci[1]


def test_a_decided_metric_keeps_the_look_that_decided_it() -> None:
    early = only(judge_pairs([history(STEADY[:3])]))
    later = only(judge_pairs([history([*STEADY[:3], 0.5, 0.6, 0.5, 0.6, 0.5])]))

    assert early.status is Status.PASS
    assert later == early
    assert later.n_current == 3


def test_nothing_is_decided_between_looks_unless_it_is_the_last() -> None:
    wild = [0.2, -0.1, 0.25, -0.2, 0.2, -0.1]
    d = [*wild, 0.1]

    assert not is_look(7, 8)
    assert only(judge_pairs([history(STEADY[:2])])).status is Status.INCONCLUSIVE
    assert only(judge_pairs([history(d)])).status is Status.INCONCLUSIVE
    assert only(judge_pairs([history([0.3, 0.31])], is_last=True)).status is Status.INCONCLUSIVE
    slow = [0.2, 0.0, 0.2, 0.02, 0.18, 0.04, 0.2]
    assert only(judge_pairs([history(slow)], most=24)).status is Status.INCONCLUSIVE
    assert only(judge_pairs([history(slow)], most=7)).n_current == 7


def test_pass_is_not_claimed_where_a_change_could_not_be_seen() -> None:
    d = [-0.2, -0.1, -0.3]  # far better, with a scatter in which eight blocks would not show 5 %
    verdict = only(judge_pairs([history(d)]))

    assert verdict.min_detectable > TPOT.fraction
    assert verdict.status is Status.INCONCLUSIVE


def test_what_it_takes_grows_with_the_noise() -> None:
    def needed(scale: float) -> int | None:
        d = [scale * value for value in (1.0, -1.0, 0.5, -0.5, 1.0, -1.0, 0.7, -0.7)]
        requirement = only(judge_pairs([history(d)])).requirement
        assert requirement is not None
        return requirement.starts

    counts = [needed(scale) for scale in (0.04, 0.05, 0.06)]
    assert counts == sorted(counts, key=lambda count: count or math.inf)
    assert counts[0] is not None
    assert counts[0] > 8
    assert needed(1.0) is None


def test_scaling_changes_nothing_and_more_is_never_milder() -> None:
    order = [Status.IMPROVEMENT, Status.PASS, Status.INCONCLUSIVE, Status.REGRESSION]
    severity = []
    for shift in np.linspace(-0.2, 0.2, 81):
        d = [value * 8 + shift for value in STEADY]
        verdict = only(judge_pairs([history(d)]))
        scaled = only(judge_pairs([history(d, luck=[7.0] * 8)]))
        assert scaled.status is verdict.status
        assert scaled.ci == pytest.approx(verdict.ci)
        severity.append(order.index(verdict.status))
    past_better = severity[severity.index(1) :]
    assert past_better == sorted(past_better)


def test_signs_are_counted_in_the_direction_of_worse() -> None:
    assert sign_count(history([0.1, -0.1, 0.2])) == "worse in 2 of 3 blocks"
    assert sign_count(history([0.1, -0.1, 0.2], tolerance=RATE)) == "worse in 1 of 3 blocks"


def test_equal_numbers_to_the_last_digit_are_judged() -> None:
    assert only(judge_pairs([history([0.0, 0.0, 0.0])])).status is Status.PASS
    assert only(judge_pairs([history([0.1, 0.1, 0.1])])).status is Status.REGRESSION


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("side", ["candidate", "base"])
def test_a_value_that_is_no_number_above_zero_is_refused(value: float, side: str) -> None:
    good, bad = samples([10.0, 10.0, 10.0]), samples([10.0, value, 10.0])
    pair = PairedHistory(TPOT, bad, good) if side == "candidate" else PairedHistory(TPOT, good, bad)

    with pytest.raises(MeasurementError, match=r"median_tpot_ms: numbers above zero were required .*\n"):
        judge_pairs([pair])


def test_sides_and_metrics_must_have_the_same_blocks() -> None:
    with pytest.raises(MeasurementError, match=r"at least two blocks, .* found 2, 3"):
        judge_pairs([PairedHistory(TPOT, samples([1.0, 1.0]), samples([1.0, 1.0, 1.0]))])
    with pytest.raises(MeasurementError, match="found 1"):
        judge_pairs([history([0.0])])
    with pytest.raises(MeasurementError, match="found none"):
        judge_pairs([])


def test_stored_spread_is_pooled_over_sessions_of_all_groups() -> None:
    logs = [[[0.0, 0.02, 0.01], [0.5, 0.54]], [[0.1]]]
    groups = [[samples(np.exp(session)) for session in group] for group in logs]

    spread = spread_of_starts(groups)

    assert spread is not None
    assert spread.df == 3
    expected = (2 * np.var([0.0, 0.02, 0.01], ddof=1) + np.var([0.5, 0.54], ddof=1)) / 3
    assert spread.variance == pytest.approx(expected)
    assert spread_of_starts([[samples([1.0])], [samples([2.0])]]) is None


# -- levels ----------------------------------------------------------------------------------------------------------


def test_levels_are_those_of_the_table_and_never_above_it() -> None:
    assert looks_of(8) == LOOKS == (3, 4, 5, 6, 8)
    assert looks_of(24) == (*LOOKS, *LATER_LOOKS)
    assert (looks_of(7), looks_of(10)) == ((3, 4, 5, 6, 7), (3, 4, 5, 6, 8, 10))
    assert level_per_look(0.01, 0, 8) == pytest.approx(0.00274)
    assert level_per_look(0.01, 16, 8) == pytest.approx(0.00334)
    assert level_per_look(0.01, 15.9, 8) == level_per_look(0.01, 8, 8)
    assert level_per_look(0.01 / 100, 0, 8) == pytest.approx(0.0001 / 5)


@pytest.mark.parametrize("most", [3, 5, 8, 10, 24])
def test_levels_rise_with_the_overall_level_and_stay_between_sharing_and_all(most: int) -> None:
    for df in (0, 2, 4, 8, 16):
        levels = [level_per_look(overall, df, most) for overall in np.geomspace(1e-5, 0.05, 200)]
        assert levels == sorted(levels)
    for overall in OVERALL:
        assert overall / len(looks_of(24)) <= level_per_look(overall, 0, most) < overall


@pytest.mark.parametrize("base_restarts", [True, False])
@pytest.mark.parametrize(("overall", "most", "stored_df"), [(0.05, 8, 0), (0.05, 8, 16), (0.01, 8, 0), (0.05, 24, 4)])
def test_all_looks_together_keep_the_level(overall: float, most: int, stored_df: int, base_restarts: bool) -> None:
    benchmarks = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, benchmarks)
    try:
        from paired_levels import false_alarms  # type: ignore[import-not-found]
    finally:
        sys.path.remove(benchmarks)
    draws = 60_000

    found = false_alarms(np.random.default_rng(7), draws, overall, most, stored_df, base_restarts=base_restarts)

    assert 0.3 * overall < found <= overall + 3 * math.sqrt(overall * (1 - overall) / draws)


def gates(effect: float, sd: float, stored_df: int, count: int, metrics: int = 1) -> list[tuple[MetricVerdict, ...]]:
    rng = np.random.default_rng([11, stored_df, round(1000 * effect)])
    found = []
    for _ in range(count):
        histories = []
        for _ in range(metrics):
            logs = rng.normal(0, sd, (2, 8)) + np.array([[effect], [0.0]])
            stored = StartSpread(sd**2 * rng.chisquare(stored_df) / stored_df, stored_df) if stored_df else None
            histories.append(PairedHistory(TPOT, samples(np.exp(logs[0])), samples(np.exp(logs[1])), stored))
        found.append(judge_pairs(histories))
    return found


def share(found: Sequence[tuple[MetricVerdict, ...]], status: Status) -> float:
    return float(np.mean([any(metric.status is status for metric in metrics) for metrics in found]))


def test_drawn_gates_find_what_is_there_and_nothing_else() -> None:
    same, slower = gates(0.0, 0.0158, 16, 700), gates(math.log(1.05), 0.0158, 16, 700)

    assert share(same, Status.REGRESSION) <= 0.01 + 3 * math.sqrt(0.01 * 0.99 / 700)
    assert share(same, Status.PASS) > 0.93
    assert share(slower, Status.REGRESSION) > 0.93
    assert np.mean([verdict.n_current for [verdict] in slower]) < 4


def test_three_metrics_together_raise_no_more_false_alarms_than_one() -> None:
    same = gates(0.0, 0.03, 0, 250, metrics=3)

    assert share(same, Status.REGRESSION) <= 0.01 + 3 * math.sqrt(0.01 * 0.99 / 250)


def test_the_smallest_detectable_change_is_found_as_often_as_promised() -> None:
    sd = 0.0158
    planned = np.median([verdict.min_detectable for [verdict] in gates(0.0, sd, 16, 300)])

    found = share(gates(math.log1p(float(planned)), sd, 16, 500), Status.REGRESSION)

    assert found > 0.78 - 3 * math.sqrt(0.8 * 0.2 / 500)
