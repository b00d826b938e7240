"""The noise of a machine: variance components, what a gate sees, and false alarms on real starts."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats as scipy_stats

from pytest_gpulayout.baseline import BaselineRun
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.judging import NOISE_PRIORS
from pytest_gpulayout.noise_study import (
    STORED,
    NoiseStudy,
    SameAgainstSame,
    as_start,
    exact_interval,
    judge_in_looks,
    study_noise,
    variance_components,
    wilson_interval,
)
from pytest_gpulayout.noise_text import headline, study_document, study_lines
from pytest_gpulayout.stats import NoisePrior
from pytest_gpulayout.tolerance import Tolerance, parse_tolerances
from pytest_gpulayout.verdict import MOST_STARTS, Status

TPOT = "median_tpot_ms"
ONE = {TPOT: Tolerance(TPOT, 0.05)}
PRIOR = NoisePrior(0.02, 0.01)


def start(*batches: float, metric: str = TPOT) -> BaselineRun:
    return BaselineRun(24, {metric: batches})


def drawn(
    sessions: int, starts: int, *, of_sessions: float, of_starts: float, of_batches: float = 0.0, seed: int = 1
) -> list[list[BaselineRun]]:
    """Sessions of the nested model, four batches a start."""
    rng = random.Random(seed)
    pool = []
    for _ in range(sessions):
        level = rng.gauss(0, of_sessions)
        centers = [level + rng.gauss(0, of_starts) for _ in range(starts)]
        pool.append([start(*(10 * math.exp(c + rng.gauss(0, of_batches)) for _ in range(4))) for c in centers])
    return pool


def study(sessions: Sequence[Sequence[BaselineRun]], **changes: int) -> NoiseStudy:
    settings = {"gate_starts": 3, "resamples": 60, "seed": 1} | changes
    return study_noise(sessions, ONE, PRIOR, **settings)


# -- variance components -------------------------------------------------------------------------------------------


def test_components_are_those_of_a_nested_analysis_of_variance() -> None:
    logs = np.random.default_rng(7).normal(0, 0.03, (5, 4, 3)) + np.random.default_rng(8).normal(0, 0.05, (5, 4, 1))
    batches, starts, sessions = variance_components(logs.tolist())

    within = logs.var(axis=2, ddof=1).mean()
    of_starts = logs.mean(axis=2).var(axis=1, ddof=1).mean()
    of_sessions = logs.mean(axis=(1, 2)).var(ddof=1)
    assert [c.name for c in (batches, starts, sessions)] == ["batches", "starts", "sessions"]
    assert [c.df for c in (batches, starts, sessions)] == [5 * 4 * 2, 5 * 3, 4]
    assert batches.sd**2 == pytest.approx(within)
    assert starts.sd**2 == pytest.approx(of_starts - within / 3)
    assert sessions.sd**2 == pytest.approx(max(0, of_sessions - of_starts / 4))


def test_the_interval_of_a_plain_variance_is_that_of_chi_square() -> None:
    logs = np.random.default_rng(7).normal(0, 0.03, (2, 3, 5)).tolist()
    batches = variance_components(logs)[0]
    df = 2 * 3 * 4
    low, high = (float(scipy_stats.chi2.ppf(p, df)) for p in (0.95, 0.05))
    assert batches.low**2 == pytest.approx(batches.sd**2 * df / low)
    assert batches.high**2 == pytest.approx(batches.sd**2 * df / high)


@pytest.mark.parametrize(("sessions", "starts"), [(4, 4), (12, 3)])
def test_the_interval_of_a_difference_covers_the_truth_as_often_as_it_says(sessions: int, starts: int) -> None:
    rng = np.random.default_rng(3)
    below = above = 0
    for _ in range(400):
        logs = (
            rng.normal(0, 0.04, (sessions, 1, 1))
            + rng.normal(0, 0.03, (sessions, starts, 1))
            + rng.normal(0, 0.02, (sessions, starts, 3))
        )
        component = variance_components(logs.tolist())[2]
        below += component.high < 0.04
        above += component.low > 0.04
    for missed in (below, above):  # 5 % each; 400 trials leave 2 standard errors of 2.2 %
        assert 0.02 <= missed / 400 <= 0.085


def test_what_there_is_only_one_of_has_no_component() -> None:
    assert [c.name for c in variance_components([[[0.1, 0.2], [0.1, 0.3]]])] == ["batches", "starts"]
    assert variance_components([[[0.1]]]) == ()


# -- what a gate sees ----------------------------------------------------------------------------------------------


def test_the_smallest_change_is_that_of_the_prediction_test() -> None:
    sessions = [[start(10 * math.exp(value))] for value in (-0.03, 0.01, 0.02, 0.0, -0.01, 0.03, 0.0, 0.01, -0.03)]
    (metric,) = study(sessions).metrics
    variance = np.var([-0.03, 0.01, 0.02, 0.0, -0.01, 0.03, 0.0, 0.01, -0.03], ddof=1)
    of_one_start = math.sqrt(variance * (1 + 1 / 8))
    quantiles = scipy_stats.t.ppf(0.99, 7) + scipy_stats.t.ppf(0.8, 7)
    assert metric.is_settled
    assert metric.detectable[8][0] == pytest.approx(math.expm1(of_one_start * quantiles), rel=1e-6)


def test_more_starts_and_more_sessions_see_more() -> None:
    (metric,) = study(drawn(9, 4, of_sessions=0.01, of_starts=0.03)).metrics
    rows = [metric.detectable[stored] for stored in STORED]
    assert all(len(row) == MOST_STARTS for row in rows)
    assert all(more < fewer for row in rows for fewer, more in pairwise(row))
    assert all(more < fewer for fewer, more in pairwise([row[2] for row in rows]))
    assert metric.sees(3) == metric.detectable[8][2]


def test_the_starts_that_a_margin_needs_are_the_first_that_see_it() -> None:
    (metric,) = study(drawn(9, 4, of_sessions=0.0, of_starts=0.015)).metrics
    needed = metric.needed_starts()
    assert needed is not None
    assert 1 < needed < MOST_STARTS
    assert metric.sees(needed) <= 0.05 < metric.sees(needed - 1)


def test_sessions_of_more_starts_than_the_gate_lose_nothing_and_gain_nothing() -> None:
    """The plan is for stored sessions of the gate's own number of starts, however many were measured."""
    (few,) = study(drawn(40, 2, of_sessions=0.0, of_starts=0.03, seed=2)).metrics
    (many,) = study(drawn(40, 8, of_sessions=0.0, of_starts=0.03, seed=2)).metrics
    assert few.sees(3) == pytest.approx(many.sees(3), rel=0.25)


# -- same against same ---------------------------------------------------------------------------------------------


def test_draws_are_the_same_with_the_same_seed_and_others_with_another() -> None:
    sessions = drawn(6, 5, of_sessions=0.01, of_starts=0.02, of_batches=0.01)
    first, again, other = (study(sessions, seed=seed).same for seed in (1, 1, 2))
    assert first is not None
    assert first == again
    assert first != other
    assert first.resamples == 60
    assert (first.sessions, first.stored, first.starts) == (6, 5, 3)


def test_with_nine_sessions_eight_are_stored() -> None:
    same = study(drawn(12, 2, of_sessions=0.01, of_starts=0.02)).same
    assert same is not None
    assert (same.stored, same.starts) == (8, 2)


def test_quiet_sessions_pass_and_raise_no_alarm() -> None:
    same = study(drawn(9, 3, of_sessions=0.002, of_starts=0.004)).same
    assert same is not None
    assert same.share(Status.PASS) > 0.9
    assert same.false_alarms == 0.0
    assert not same.is_too_high


def test_sessions_that_jump_now_and_then_raise_alarms() -> None:
    quiet = [drawn(1, 3, of_sessions=0.0, of_starts=0.003, seed=n)[0] for n in range(36)]
    jumps = [[start(12.0 + n / 100) for n in range(3)] for _ in range(4)]
    same = study([*quiet, *jumps], resamples=400).same
    assert same is not None
    assert same.false_alarms > 0.02
    assert same.interval[0] < same.false_alarms < same.interval[1]


def test_a_rate_is_too_high_only_when_enough_sessions_say_so() -> None:
    """One odd session of three alarms in a third of the gates, and still is only one session."""

    def of(sessions: int, red: int) -> SameAgainstSame:
        return SameAgainstSame(sessions, 2, 3, {Status.REGRESSION: red, Status.PASS: sessions - red}, 3.0)

    assert not of(3, 1).is_too_high
    assert not of(10, 1).is_too_high
    assert of(10, 2).is_too_high


def test_starts_of_one_session_stay_together() -> None:
    """One session of nine is slower: it alone raises an alarm, when it is the new one. Mixed, others would, too."""
    quiet = drawn(8, 4, of_sessions=0.002, of_starts=0.002)
    same = study([*quiet, [start(14.0 + n / 100) for n in range(4)]], resamples=90).same
    assert same is not None
    assert same.verdicts[Status.REGRESSION] == 10


def test_a_clear_regression_stops_at_the_second_start() -> None:
    sessions = drawn(9, 3, of_sessions=0.002, of_starts=0.004)
    stored = [[as_start(run) for run in session] for session in sessions]
    slow = [as_start(start(value)) for value in (13.0, 13.1, 13.2)]
    (verdict,) = judge_in_looks(slow, stored, ONE, PRIOR, of=3)
    assert (verdict.status, verdict.n_current) == (Status.REGRESSION, 2)


def test_intervals_of_shares() -> None:
    assert wilson_interval(0, 2000) == pytest.approx((0.0, 0.001917), abs=1e-6)
    assert exact_interval(1, 3) == pytest.approx((0.008404, 0.905701), abs=1e-6)
    assert exact_interval(0, 3) == pytest.approx((0.0, 0.707598), abs=1e-6)
    assert exact_interval(3, 3)[1] == 1.0


# -- the study -----------------------------------------------------------------------------------------------------


def test_one_session_tells_the_spread_of_starts_and_no_false_alarms() -> None:
    found = study(drawn(1, 6, of_sessions=0.0, of_starts=0.02))
    assert found.same is None
    lines = study_lines(found)
    assert "false alarms: unknown, since there is no second session to compare with" in lines
    assert "sessions" not in next(line for line in lines if line.startswith("metric  "))


@pytest.mark.parametrize("sessions", [[], [[]], [[start(1.0)], []], [[start(1.0, metric="p99_itl_ms")]]])
def test_nothing_to_study(sessions: list[list[BaselineRun]]) -> None:
    with pytest.raises(MeasurementError, match="were required\n  found: ") as caught:
        study(sessions)
    assert TPOT in str(caught.value)


def test_metrics_that_not_all_starts_have_are_left_out() -> None:
    runs = [BaselineRun(1, {TPOT: (10.0 + n,), "median_ttft_ms": (20.0,)}) for n in range(3)]
    found = study_noise([runs, [start(10.0)]], parse_tolerances(""), PRIOR, gate_starts=3, resamples=5, seed=1)
    assert [metric.tolerance.metric for metric in found.metrics] == [TPOT]


def test_the_first_line_says_what_matters() -> None:
    found = study(drawn(9, 4, of_sessions=0.0, of_starts=0.015))
    (metric,) = found.metrics
    needed = metric.needed_starts()
    assert headline(found) == (
        f"with 3 starts per gate and 8 stored sessions this machine sees changes of {metric.sees(3):.1%} ({TPOT}); "
        f"your margins need {needed} starts (--gpu-starts={needed})"
    )
    assert study_lines(found)[0] == headline(found)


def test_a_machine_that_is_too_noisy_is_told_what_to_do() -> None:
    text = headline(study(drawn(9, 4, of_sessions=0.05, of_starts=0.015)))
    assert (
        f"up to 10 starts are not enough for 5% of {TPOT}: accept larger tolerances (--gpu-tolerance={TPOT}=" in text
    )
    assert text.endswith("%), or compare in pairs (--gpu-base)")


def test_more_sessions_are_named_where_they_are_enough() -> None:
    found = study(drawn(30, 4, of_sessions=0.012, of_starts=0.01))
    (metric,) = found.metrics
    assert metric.needed_starts(8) is None
    needed = metric.needed_starts(20)
    assert f"store 20 sessions of {needed} starts (--gpu-starts={needed}), accept" in headline(found)


def test_a_spread_that_rests_on_the_prior_says_so() -> None:
    assert any(
        "rests partly on the documented prior" in line
        for line in study_lines(study(drawn(2, 2, of_sessions=0, of_starts=0.01)))
    )
    settled = study_lines(study(drawn(9, 3, of_sessions=0.01, of_starts=0.01)))
    assert not any("prior" in line for line in settled)


def test_two_levels_of_starts_are_shown() -> None:
    sessions = [[start(10.0 + n / 50), start(12.0 + n / 50)] for n in range(8)]
    found = study(sessions)
    (line,) = (line for line in study_lines(found) if "two levels" in line)
    assert line.startswith(f"{TPOT} has two levels, 19.9% apart, 50% and 50% of the starts on them")
    assert [mode["share"] for mode in study_document(found)["metrics"][TPOT]["bimodal"]] == [0.5, 0.5]


def test_the_document_is_plain_json_and_has_what_the_lines_say() -> None:
    found = study(drawn(4, 3, of_sessions=0.01, of_starts=0.02))
    document = json.loads(json.dumps(study_document(found), allow_nan=False))
    metric = document["metrics"][TPOT]
    assert document["starts_of_sessions"] == [3, 3, 3, 3]
    assert metric["smallest_detectable"] == metric["detectable_by_stored_sessions"]["8"][2]
    assert set(metric["sd"]) == {"batches", "starts", "sessions"}
    same = document["same_against_same"]
    assert sum(same["verdicts"].values()) == same["resamples"] == 60


def test_the_priors_of_both_platforms_can_be_used() -> None:
    for prior in NOISE_PRIORS.values():
        found = study_noise([[start(10.0)], [start(10.1)]], ONE, prior, gate_starts=1, resamples=4, seed=1)
        assert not found.metrics[0].is_settled
