from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.stats import (
    POWER,
    SETTLED_DF,
    Effect,
    NoisePrior,
    Spread,
    estimate_effect,
    estimate_spread,
    median,
    variance,
)

PRIOR = NoisePrior(start_sd=0.02, session_sd=0.01)
ABSURD = NoisePrior(start_sd=9.0, session_sd=7.0)

Sessions = Sequence[Sequence[float]]


def draw(
    rng: np.random.Generator, sizes: Sequence[int], *, session_sd: float = 0.02, start_sd: float = 0.03
) -> list[list[float]]:
    """One session per size: the luck of the session and, on top of it, that of each start."""
    return [list(rng.normal(rng.normal(0, session_sd), start_sd, size)) for size in sizes]


def spread_of(
    current: Sequence[float], level: Sessions, others: Sequence[Sessions] = (), prior: NoisePrior = PRIOR
) -> Spread:
    return estimate_spread(level, others, current, prior, start_variance_floor=0.0)


def effect_of(
    current: Sequence[float], level: Sessions, others: Sequence[Sessions] = (), prior: NoisePrior = PRIOR
) -> Effect:
    return estimate_effect(current, level, spread_of(current, level, others, prior))


def test_bounds_and_p_values_are_those_of_student_s_t() -> None:
    effect = Effect(size=0.10, se=0.02, df=7.3)
    t = scipy.stats.t(7.3)
    assert effect.lower(0.01) == pytest.approx(0.10 + 0.02 * t.ppf(0.01))
    assert effect.upper(0.05) == pytest.approx(0.10 + 0.02 * t.ppf(0.95))
    assert effect.p_worse == pytest.approx(t.sf(5.0))
    assert effect.p_better == pytest.approx(t.cdf(5.0))


@given(st.floats(-3, 3), st.floats(0.01, 2), st.floats(1, 50), st.floats(1e-4, 0.4))
def test_a_bound_says_the_same_as_its_test(size: float, se: float, df: float, alpha: float) -> None:
    effect = Effect(size, se, df)
    if not math.isclose(effect.p_worse, alpha, rel_tol=1e-6):
        assert (effect.lower(alpha) > 0) == (effect.p_worse < alpha)
    if not math.isclose(effect.p_better, alpha, rel_tol=1e-6):
        assert (effect.upper(alpha) < 0) == (effect.p_better < alpha)


@pytest.mark.parametrize("df", [7.0, 9.0, 19.0, 60.0])
@pytest.mark.parametrize("alpha", [0.01, 0.0033])
def test_power_at_the_detectable_effect_is_nearly_that_of_the_noncentral_t(df: float, alpha: float) -> None:
    effect = Effect(0.0, 0.02, df)
    threshold = scipy.stats.t.ppf(1 - alpha, df)
    power = scipy.stats.nct.sf(threshold, df, effect.detectable(alpha) / effect.se)
    assert POWER - 0.035 < power < POWER


@pytest.mark.parametrize(("df", "at_least"), [(3, 0.0), (9, 0.0), (9, 0.05), (19, 0.03)])
def test_an_effect_as_large_as_is_printed_is_found_in_80_of_100(df: int, at_least: float) -> None:
    """Each trial has its own estimate of the noise, prints its own figure, and is given a change of that size."""
    trials = 4000
    rng = np.random.default_rng(df)
    se = np.sqrt(rng.chisquare(df, trials) / df) * 0.01
    found = 0
    for one, luck in zip(se, rng.normal(0, 0.01, trials), strict=True):
        planned = Effect(0.0, float(one), df).detectable(0.005, at_least)
        seen = Effect(planned + float(luck), float(one), df)
        found += seen.lower(0.005) > 0 and seen.size >= at_least
    low, high = scipy.stats.binom(trials, POWER).ppf([0.0005, 0.9995])
    assert low <= found <= high


@pytest.mark.parametrize("prior", [PRIOR, ABSURD], ids=["prior", "absurd prior"])
@pytest.mark.parametrize("starts", [1, 3, 7])
@pytest.mark.parametrize("sessions", [8, 20])
def test_from_eight_sessions_on_it_is_student_s_prediction_test(
    sessions: int, starts: int, prior: NoisePrior
) -> None:
    rng = np.random.default_rng(sessions + starts)
    level = draw(rng, [starts] * sessions)
    current = [0.1 + y for y in draw(rng, [starts])[0]]
    effect = effect_of(current, level, prior=prior)
    means = np.mean(level, axis=1)
    t = (np.mean(current) - means.mean()) / (means.std(ddof=1) * math.sqrt(1 + 1 / sessions))
    assert effect.size / effect.se == pytest.approx(t)
    assert effect.df == pytest.approx(sessions - 1)
    assert spread_of(current, level, prior=prior).is_settled


def test_seven_sessions_still_lean_on_the_prior() -> None:
    level = draw(np.random.default_rng(1), [3] * 7)
    assert not spread_of([0.0] * 3, level).is_settled
    assert effect_of([0.0] * 3, level, prior=ABSURD).se > 10 * effect_of([0.0] * 3, level).se


def test_own_data_at_several_levels_settle_the_spread_together() -> None:
    rng = np.random.default_rng(2)
    level, first, second = draw(rng, [3]), draw(rng, [3] * 5), draw(rng, [3] * 4)
    moved = [[y + 5.0 for y in session] for session in first]
    spread = spread_of([0.0] * 3, level, [moved, second], ABSURD)
    pooled = (4 * np.var(np.mean(first, axis=1), ddof=1) + 3 * np.var(np.mean(second, axis=1), ddof=1)) / 7
    assert (spread.is_settled, spread.mean_df, spread.sessions) == (True, SETTLED_DF, 1)
    assert spread.mean_variance == pytest.approx(pooled)


def anova(current: Sequence[float], level: Sessions, prior: NoisePrior) -> tuple[float, float]:
    """Standard error and degrees of freedom while the prior counts, by numpy, written down a second time."""
    groups = [np.array(session) for session in (*level, current)]
    sizes = np.array([len(session) for session in level])
    start_df = prior.start_df + sum(len(group) - 1 for group in groups)
    start = (prior.start_df * prior.start_sd**2 + sum(group.var() * len(group) for group in groups)) / start_df
    means = np.array([group.mean() for group in groups[:-1]])
    mean_df = prior.session_df + len(means) - 1
    expected = prior.session_sd**2 + start * (1 / sizes).mean()
    of_means = (prior.session_df * expected + means.var() * len(means)) / mean_df
    parts = np.array(
        [of_means * (1 + 1 / len(means)), start * np.clip(1 / len(current) - (1 / sizes).mean(), 0, None)]
    )
    satterthwaite = parts.sum() ** 2 / (parts**2 / np.array([mean_df, start_df])).sum()
    return math.sqrt(parts.sum()), min(satterthwaite, mean_df)


@pytest.mark.parametrize(
    ("current", "level"),
    [
        ([0.1], [[0.0]]),
        ([0.1, 0.2, 0.15], [[0.0]]),
        ([0.1], [[0.0, 0.02, -0.01]]),
        ([0.1, 0.12], [[0.0, 0.02], [0.3, 0.31]]),
        ([0.1], [[0.0, 0.02], [0.3, 0.31], [0.1]]),
        ([0.1, 0.1], [[0.0, 0.0], [0.0, 0.0]]),
    ],
)
def test_a_prior_counts_like_data(current: list[float], level: list[list[float]]) -> None:
    effect = effect_of(current, level)
    assert (effect.se, effect.df) == pytest.approx(anova(current, level, PRIOR))
    assert effect.size == pytest.approx(np.mean(current) - np.mean([np.mean(session) for session in level]))
    assert not spread_of(current, level).is_settled


def test_one_start_against_one_start_rests_on_the_prior_alone() -> None:
    effect = effect_of([0.3], [[0.1]])
    assert effect.size == pytest.approx(0.2)
    assert effect.se == pytest.approx(math.sqrt(2 * (0.01**2 + 0.02**2)))
    assert effect.df == PRIOR.session_df


@pytest.mark.parametrize(
    ("now", "level", "others", "is_exact"),
    [
        (3, [3] * 8, [], True),
        (1, [3] * 8, [], True),
        (1, [1, 2, 3, 4] * 3, [], True),
        (2, [1], [[4] * 6, [3] * 5], True),
        (9, [3] * 9, [], False),
        (1, [5, 5], [[1] * 9], False),
    ],
)
def test_the_standard_error_is_that_of_unequal_starts_too(
    now: int, level: list[int], others: list[list[int]], is_exact: bool
) -> None:
    """In the mean over histories the squared standard error is the variance of the estimate, or above it."""
    trials = 1500
    rng = np.random.default_rng(now + len(level))
    found = []
    for _ in range(trials):
        drawn = [draw(rng, sizes) for sizes in others]
        effect = effect_of(draw(rng, [now])[0], draw(rng, level), drawn)
        found.append((effect.size, effect.se**2))
    sizes, squares = np.array(found).T
    true = 0.02**2 * (1 + 1 / len(level)) + 0.03**2 * (1 / now + np.mean([1 / r for r in level]) / len(level))
    assert np.var(sizes) == pytest.approx(true, rel=0.15)
    error = squares.std() / math.sqrt(trials)
    assert squares.mean() > true - 4 * error
    if is_exact:
        assert squares.mean() < true + 4 * error


@pytest.mark.parametrize("now", [1, 3, 5])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_the_true_effect_is_outside_a_bound_as_often_as_it_says(now: int, alpha: float) -> None:
    trials = 2500
    rng = np.random.default_rng(now)
    outside = [0, 0]
    for _ in range(trials):
        effect = effect_of([0.07 + y for y in draw(rng, [now])[0]], draw(rng, [3] * 9), prior=ABSURD)
        outside[0] += effect.lower(alpha) > 0.07
        outside[1] += effect.upper(alpha) < 0.07
    low, high = scipy.stats.binom(trials, alpha).ppf([0.0005, 0.9995])
    assert max(outside) <= high
    if now == 3:
        assert min(outside) >= low


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=12),
    st.integers(0, 5),
    st.integers(0, 2**32 - 1),
)
def test_more_starts_never_make_the_prediction_worse(level: list[int], other: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    spread = spread_of([0.0], draw(rng, level), [draw(rng, [2] * other)] if other else [])
    planned = [Effect(0.0, *spread.of_prediction(starts)) for starts in range(1, 11)]
    reach = [effect.detectable(0.003) for effect in planned]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(reach))
    assert all(effect.df <= spread.mean_df for effect in planned)


def test_planning_with_other_sessions_knows_when_the_prior_goes() -> None:
    spread = spread_of([0.0], draw(np.random.default_rng(3), [3] * 3))
    df = [spread.of_prediction(3, sessions=count)[1] for count in (1, 3, 7, 8, 20)]
    assert df == pytest.approx([3, 5, 9, 7, 19])
    assert spread.of_prediction(3, sessions=3) == pytest.approx(spread.of_prediction(3))
    settled = spread_of([0.0], draw(np.random.default_rng(3), [3] * 20))
    assert [settled.of_prediction(3, sessions=count)[1] for count in (1, 8, 20)] == pytest.approx([3, 7, 19])


def test_one_start_per_session_settles_where_one_start_is_compared() -> None:
    level = draw(np.random.default_rng(4), [1] * 9)
    assert spread_of([0.0], level).is_settled
    assert spread_of([0.0, 0.0], level).is_settled
    assert not spread_of([0.0], draw(np.random.default_rng(4), [2] * 4), [level]).is_settled


def test_the_spread_of_the_batches_is_the_least_spread_of_a_start() -> None:
    level, current = [[0.0] * 3] * 5, [0.0]
    calm = estimate_spread(level, [], current, PRIOR, start_variance_floor=0.0)
    restless = estimate_spread(level, [], current, PRIOR, start_variance_floor=0.01)
    assert calm.start_variance < 0.01
    assert restless.start_variance == 0.01
    assert restless.of_prediction(1)[0] > 5 * calm.of_prediction(1)[0]


def test_numbers_equal_to_the_last_digit_still_have_a_width() -> None:
    effect = effect_of([0.0] * 3, [[0.0] * 3] * 8)
    assert 0 < effect.se < 1e-5
    assert effect.p_worse == effect.p_better == 0.5


@pytest.mark.parametrize(
    ("current", "level", "others"),
    [([], [[0.0]], []), ([0.0], [], []), ([0.0], [[0.0], []], []), ([0.0], [[0.0]], [[[]]])],
)
def test_an_effect_needs_samples(current: list[float], level: Sessions, others: list[Sessions]) -> None:
    with pytest.raises(MeasurementError, match=r"^an effect needs at least one start now and one in every stored"):
        spread_of(current, level, others)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9))
def test_median_and_variance_are_numpy_s(values: list[float]) -> None:
    assert median(values) == pytest.approx(np.median(values))
    expected = np.var(values, ddof=1) if len(values) > 1 else 0.0
    assert variance(values) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_an_empty_sample_has_no_median() -> None:
    with pytest.raises(MeasurementError, match=r"^a median needs at least one value; found none$"):
        median([])
