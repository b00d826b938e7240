"""How large a change is, and how sure one can be: the statistics of a measuring session against stored ones.

The unit is a **fresh server start**, never a request and never a batch: repeats on one server share its luck
(Kalibera & Jones, "Rigorous benchmarking in reasonable time", ISMM 2013). A *session* is a set of starts on one
machine in one go. Everything here is on a log scale with the sign turned so that **larger is worse**::

    y[s, r] = mu + S[s] + R[s, r]        S: session, sd sigma_S; R: start within the session, sd sigma_R

Knows nothing of metrics, files or verdicts.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass

from pytest_gpulayout.errors import MeasurementError

POWER = 0.80
"""Probability with which a change of the size of :meth:`Effect.detectable` is found."""

SETTLED_DF = 7.0
"""Degrees of freedom from which a spread rests on its own data alone, as with eight sessions of one level."""

Session = Sequence[float]
"""(r,) logs of one session, one per start."""


@dataclass(frozen=True, slots=True)
class NoisePrior:
    """What is assumed of the noise before there is data, and what the assumption weighs.

    A scaled inverse chi-square prior on each variance: ``df`` counts like that many degrees of freedom of data. It is
    dropped when the data have :data:`SETTLED_DF` of their own.

    :param start_sd: relative spread between starts of one session. :param session_sd: between sessions.
    :param source: where it comes from, in words.
    """

    start_sd: float
    session_sd: float
    start_df: float = 4.0
    session_df: float = 3.0
    source: str = "the documented prior"


@dataclass(frozen=True, slots=True)
class Effect:
    """Current minus baseline on the log scale, larger is worse.

    :param size: the estimate. :param se: its standard error. :param df: degrees of freedom of ``se``.
    """

    size: float
    se: float
    df: float

    def lower(self, alpha: float) -> float:
        """One-sided lower bound: the true effect is below it with probability ``alpha`` at most."""
        return self.size - self.se * t_quantile(1 - alpha, self.df)

    def upper(self, alpha: float) -> float:
        """One-sided upper bound: the true effect is above it with probability ``alpha`` at most."""
        return self.size + self.se * t_quantile(1 - alpha, self.df)

    @property
    def p_worse(self) -> float:
        """One-sided p-value of "nothing got worse": small where it did."""
        return t_cdf(-self.size / self.se, self.df)

    @property
    def p_better(self) -> float:
        """One-sided p-value of "nothing got better"."""
        return t_cdf(self.size / self.se, self.df)

    def detectable(self, alpha: float, at_least: float = 0.0) -> float:
        """Smallest true effect that is found with probability :data:`POWER`.

        Found means: a test at level ``alpha`` finds it, and the estimate is ``at_least`` as large. It is as often
        found as is said when ``se`` is the estimate that the test itself uses: an effect of this size is missed where
        the estimate falls ``se * t_quantile(POWER)`` short of it, which is Student's t by definition. For an effect
        that is fixed beforehand the power is that of the noncentral t at ``effect / se``: a little less, 0.79 for 19
        degrees of freedom and 0.77 for 7 (level 0.0033).
        """
        return max(self.se * t_quantile(1 - alpha, self.df), at_least) + self.se * t_quantile(POWER, self.df)


@dataclass(frozen=True, slots=True)
class Spread:
    """How much sessions and starts differ when nothing has changed.

    :param start_variance: between starts of one session. :param start_df: its degrees of freedom.
    :param mean_variance: between means of sessions of ``1 / inverse_starts`` starts; both parts are in it.
    :param mean_df: its degrees of freedom, those of a prior included.
    :param inverse_starts: mean of 1/r over the sessions that ``mean_variance`` comes from.
    :param level_inverse_starts: the same over the K sessions that give the mean.
    :param sessions: K, those that give the mean. :param own_df: of ``mean_df``, what the data have.
    :param prior_df: what the prior has as long as the data have less than :data:`SETTLED_DF`.
    :param is_settled: it rests on its own data alone, not on a prior.
    """

    start_variance: float
    start_df: float
    mean_variance: float
    mean_df: float
    inverse_starts: float
    level_inverse_starts: float
    sessions: int
    own_df: float
    prior_df: float
    is_settled: bool

    @property
    def session_variance(self) -> float:
        """Between sessions, without what comes from their starts."""
        return max(0.0, self.mean_variance - self.start_variance * self.inverse_starts)

    def of_prediction(self, starts: int, *, sessions: int | None = None) -> tuple[float, float]:
        """Return the standard error, and its degrees of freedom, of a new session's mean less the stored mean.

        The new session is one more draw, so this is a *prediction* (Meeker, Hahn & Escobar, "Statistical Intervals",
        2nd ed. 2017, chapter 4)::

            Var = sigma_S^2 (1 + 1/K) + sigma_R^2 (1/r + mean(1/r_k)/K)
            se^2 = s_M^2 (1 + 1/K) + s_R^2 (1/r - h + (mean(1/r_k) - h)/K)

        with ``s_M^2`` the variance between session means, which estimates ``sigma_S^2 + h sigma_R^2``. The same
        number of starts everywhere leaves nothing of the second term: Student's t with K - 1 degrees of freedom.
        Where it would be negative (more starts now than stored) it is left out: the prediction is too wide then,
        never too narrow.

        Degrees of freedom are Satterthwaite's (Biometrics Bull. 2, 1946), and no more than those of ``s_M^2``:
        his formula gives a sum more of them than its less certain part has, so that one start would be worth more
        than three.

        :param starts: r, of the new session. :param sessions: another K, to plan with.
        """
        count = self.sessions if sessions is None else sessions
        df = self.mean_df if sessions is None else self._planned_df(sessions)
        unequal = 1 / starts - self.inverse_starts + (self.level_inverse_starts - self.inverse_starts) / count
        of_sessions = self.mean_variance * (1 + 1 / count)
        of_starts = self.start_variance * max(0.0, unequal)
        variance = of_sessions + of_starts
        satterthwaite = variance**2 / (of_sessions**2 / df + of_starts**2 / self.start_df)
        return math.sqrt(variance), min(satterthwaite, df)

    def _planned_df(self, sessions: int) -> float:
        own = max(0.0, self.own_df + sessions - self.sessions)
        return own if own >= SETTLED_DF else own + self.prior_df


def estimate_spread(
    level: Sequence[Session],
    others: Sequence[Sequence[Session]],
    current: Session,
    prior: NoisePrior,
    *,
    start_variance_floor: float,
) -> Spread:
    """Pool what all stored sessions show of the noise; each group of sessions has a mean of its own.

    :param level: (K,) sessions that the new one is compared with. :param current: the new one.
    :param others: groups of sessions at another level or of another epoch, which tell of the spread only.
    :param start_variance_floor: least possible variance of a start's value, from the spread of its batches.
    :raises MeasurementError: no current start, no session, or a session without a start.
    """
    groups = [level, *filter(None, others)]
    sessions = [session for group in groups for session in group]
    if not current or not level or not all(sessions):
        raise MeasurementError("an effect needs at least one start now and one in every stored session; found none")
    start_variance, start_df, starts_settled = _start_variance([current, *sessions], prior, start_variance_floor)
    inverse = [mean([1 / len(session) for session in group]) for group in groups]
    df = [len(group) - 1.0 for group in groups]
    own_df = sum(df)
    weight = 0.0 if own_df >= SETTLED_DF else prior.session_df
    assumed = prior.session_sd**2 + start_variance * inverse[0]
    squares = math.fsum(sum_of_squares([mean(session) for session in group]) for group in groups)
    pooled = (weight * inverse[0] + math.fsum(map(operator.mul, df, inverse))) / (weight + own_df)
    return Spread(
        start_variance=start_variance,
        start_df=start_df,
        mean_variance=max((weight * assumed + squares) / (weight + own_df), SMALLEST_VARIANCE),
        mean_df=weight + own_df,
        inverse_starts=pooled,
        level_inverse_starts=inverse[0],
        sessions=len(level),
        own_df=own_df,
        prior_df=prior.session_df,
        is_settled=weight == 0 and (starts_settled or 1 / len(current) <= pooled),
    )


SMALLEST_VARIANCE = 1e-12
"""Of numbers that are equal to the last digit: a test of their difference still needs a width."""


def _start_variance(sessions: Sequence[Session], prior: NoisePrior, floor: float) -> tuple[float, float, bool]:
    squares = math.fsum(sum_of_squares(session) for session in sessions)
    df = float(sum(len(session) - 1 for session in sessions))
    weight = 0.0 if df >= SETTLED_DF else prior.start_df
    variance = (weight * prior.start_sd**2 + squares) / (weight + df)
    return max(variance, floor, SMALLEST_VARIANCE), weight + df, weight == 0


def sum_of_squares(values: Sequence[float]) -> float:
    """Sum of squared distances from the mean."""
    if not values:
        return 0.0
    center = mean(values)
    return math.fsum((value - center) ** 2 for value in values)


def estimate_effect(current: Session, level: Sequence[Session], spread: Spread) -> Effect:
    """Return how far this session is from the mean of the stored ones.

    :param level: (K,) stored sessions. :param spread: :func:`estimate_spread` of the same.
    """
    size = mean(current) - mean([mean(session) for session in level])
    return Effect(size, *spread.of_prediction(len(current)))


def median(values: Sequence[float]) -> float:
    """Middle value, the mean of the two middle ones for an even number.

    :raises MeasurementError: the sample is empty.
    """
    if not values:
        raise MeasurementError("a median needs at least one value; found none")
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def variance(values: Sequence[float]) -> float:
    """Unbiased sample variance; 0 for a single value, which says nothing about spread."""
    if len(values) < 2:
        return 0.0
    return sum_of_squares(values) / (len(values) - 1)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, summed without loss; the sample must not be empty."""
    return math.fsum(values) / len(values)


def t_quantile(probability: float, df: float) -> float:
    """Quantile of Student's t."""
    from scipy.special import stdtrit  # imported late: it brings numpy, which a run without a gate never needs

    return float(stdtrit(df, probability))


def t_cdf(value: float, df: float) -> float:
    """Probability that Student's t is below ``value``."""
    from scipy.special import stdtr

    return float(stdtr(df, value))
