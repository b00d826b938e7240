from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import scipy.stats

from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.judging import NOISE_PRIORS
from pytest_gpulayout.stats import POWER, Effect, NoisePrior, estimate_effect, median, variance
from pytest_gpulayout.tolerance import Tolerance
from pytest_gpulayout.verdict import FALSE_ALARM, Look, MetricSample, Status, judge_metric

PRIOR = NoisePrior(start_sd=0.02, session_sd=0.01)
NO_PRIOR = NoisePrior(start_sd=0.0, session_sd=0.0, start_df=1e-9, session_df=1e-9)


def test_bounds_are_those_of_student_s_t() -> None:
    effect = Effect(size=0.10, se=0.02, df=7.3)
    t = scipy.stats.t(7.3)
    assert effect.lower(0.01) == pytest.approx(0.10 + 0.02 * t.ppf(0.01))
    assert effect.upper(0.05) == pytest.approx(0.10 + 0.02 * t.ppf(0.95))
    assert effect.detectable(0.01) == pytest.approx(0.02 * (t.ppf(0.99) + t.ppf(POWER)))


def reference(
    current: Sequence[float], sessions: Sequence[Sequence[float]], prior: NoisePrior, floor: float
) -> tuple[float, float, float]:
    """The formulas of the module's docstring with numpy, written down a second time."""
    groups = [np.array(group) for group in (*sessions, current)]
    start_df = prior.start_df + sum(len(group) - 1 for group in groups)
    pooled = sum(group.var() * len(group) for group in groups)
    start = max((prior.start_df * prior.start_sd**2 + pooled) / start_df, floor)
    means = np.array([group.mean() for group in groups[:-1]])
    lengths = np.array([len(group) for group in groups[:-1]])
    k = len(means)
    between = max(0.0, means.var() * k - (k - 1) * start * (1 / lengths).mean())
    session_df = prior.session_df + k - 1
    session = (prior.session_df * prior.session_sd**2 + between) / session_df
    parts = np.array([session * (1 + 1 / k), start * (1 / len(current) + (1 / lengths).sum() / k**2)])
    df = parts.sum() ** 2 / (parts**2 / np.array([session_df, start_df])).sum()
    return float(np.mean(current) - means.mean()), math.sqrt(parts.sum()), float(df)


@pytest.mark.parametrize("floor", [0.0, 0.01])
@pytest.mark.parametrize(
    ("current", "sessions"),
    [
        ([0.1], [[0.0]]),
        ([0.1, 0.2, 0.15], [[0.0]]),
        ([0.1], [[0.0, 0.02, -0.01]]),
        ([0.1, 0.12, 0.2], [[0.0, 0.02, -0.01], [0.3, 0.31], [0.1]]),
        ([0.1, 0.1], [[0.0, 0.0], [0.0, 0.0]]),
    ],
)
def test_effect_is_that_of_the_formulas(current: list[float], sessions: list[list[float]], floor: float) -> None:
    effect = estimate_effect(current, sessions, PRIOR, start_variance_floor=floor)
    assert (effect.size, effect.se, effect.df) == pytest.approx(reference(current, sessions, PRIOR, floor))


def test_one_start_against_one_start_rests_on_the_prior_alone() -> None:
    effect = estimate_effect([0.3], [[0.1]], PRIOR, start_variance_floor=0.0)
    of_sessions, of_starts = 2 * 0.01**2, 2 * 0.02**2
    assert effect.size == pytest.approx(0.2)
    assert effect.se == pytest.approx(math.sqrt(of_sessions + of_starts))
    assert effect.df == pytest.approx((of_sessions + of_starts) ** 2 / (of_sessions**2 / 3 + of_starts**2 / 4))


def noise(count: int, starts: int, *, session_sd: float, start_sd: float, seed: int) -> Iterator[list[float]]:
    rng = random.Random(seed)
    for _ in range(count):
        luck = rng.gauss(0, session_sd)
        yield [luck + rng.gauss(0, start_sd) for _ in range(starts)]


def test_the_prior_vanishes_with_many_sessions() -> None:
    sessions = list(noise(3000, 3, session_sd=0.05, start_sd=0.10, seed=1))
    effect = estimate_effect([0.0, 0.0, 0.0], sessions, PRIOR, start_variance_floor=0.0)
    assert effect.se == pytest.approx(math.sqrt(0.05**2 + 0.10**2 / 3), rel=0.03)
    assert effect.df > 1000


def test_without_a_prior_one_start_per_session_is_the_prediction_t_test() -> None:
    sessions = [[x] for [x] in noise(8, 1, session_sd=0.05, start_sd=0.0, seed=2)]
    effect = estimate_effect([0.07], sessions, NO_PRIOR, start_variance_floor=0.0)
    stored = np.array(sessions).ravel()
    assert effect.se == pytest.approx(stored.std(ddof=1) * math.sqrt(1 + 1 / 8), rel=1e-6)
    assert effect.df == pytest.approx(7)


def test_the_spread_of_the_batches_is_the_least_spread_of_a_start() -> None:
    calm = estimate_effect([0.0] * 3, [[0.0] * 3] * 5, PRIOR, start_variance_floor=0.0)
    restless = estimate_effect([0.0] * 3, [[0.0] * 3] * 5, PRIOR, start_variance_floor=0.01)
    assert restless.se > 5 * calm.se


@pytest.mark.parametrize(("current", "sessions"), [([], [[0.0]]), ([0.0], []), ([0.0], [[0.0], []])])
def test_an_effect_needs_samples(current: list[float], sessions: list[list[float]]) -> None:
    with pytest.raises(MeasurementError, match=r"^an effect needs at least one start now and one in every stored"):
        estimate_effect(current, sessions, PRIOR, start_variance_floor=0.0)


@pytest.mark.parametrize("values", [[3.0], [2.0, 1.0], [5.0, 1.0, 3.0], [4.0, 1.0, 3.0, 2.0]])
def test_median_and_variance_are_numpy_s(values: list[float]) -> None:
    assert median(values) == np.median(values)
    assert variance(values) == pytest.approx(np.var(values, ddof=1) if len(values) > 1 else 0.0)


def test_an_empty_sample_has_no_median() -> None:
    with pytest.raises(MeasurementError, match=r"^a median needs at least one value; found none$"):
        median([])


def simulate(prior: NoisePrior, *, sessions: int, change: float, trials: int, seed: int) -> Counter[Status]:
    """Verdicts on one metric, with noise exactly as the prior says, over all looks that the default policy allows."""
    drawn = noise(trials * (sessions + 1), 3, session_sd=prior.session_sd, start_sd=prior.start_sd, seed=seed)
    found: Counter[Status] = Counter()
    for _ in range(trials):
        stored = [[MetricSample((math.exp(y),)) for y in next(drawn)] for _ in range(sessions)]
        current = [MetricSample((change * math.exp(y),)) for y in next(drawn)]
        for number in (1, 2, 3):
            look = Look(number, 3)
            tolerance = Tolerance("median_tpot_ms", 0.05)
            status = judge_metric(tolerance, current[:number], stored, prior=prior, look=look, metrics=1).status
            if status is not Status.INCONCLUSIVE:
                break
        found[status] += 1
    return found


@pytest.mark.parametrize("platform", ["cuda", "cpu"])
@pytest.mark.parametrize("sessions", [1, 5])
def test_false_alarms_keep_their_level_over_all_looks(platform: str, sessions: int) -> None:
    trials = 2500
    found = simulate(NOISE_PRIORS[platform], sessions=sessions, change=1.0, trials=trials, seed=sessions)
    allowed = scipy.stats.binom(trials, FALSE_ALARM).ppf(0.999)
    assert found[Status.REGRESSION] <= allowed
    assert found[Status.IMPROVEMENT] <= allowed


@pytest.mark.parametrize("platform", ["cuda", "cpu"])
@pytest.mark.parametrize("sessions", [1, 5])
def test_a_change_by_a_factor_of_two_is_always_found(platform: str, sessions: int) -> None:
    assert simulate(NOISE_PRIORS[platform], sessions=sessions, change=2.0, trials=300, seed=7) == {
        Status.REGRESSION: 300
    }
    assert simulate(NOISE_PRIORS[platform], sessions=sessions, change=0.5, trials=300, seed=8) == {
        Status.IMPROVEMENT: 300
    }


def test_a_change_of_the_tolerance_is_seldom_called_a_pass() -> None:
    found = simulate(NOISE_PRIORS["cuda"], sessions=5, change=1.05, trials=2500, seed=3)
    assert found[Status.PASS] <= scipy.stats.binom(2500, 0.05).ppf(0.999)
