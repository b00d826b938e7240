"""How large a change is, and how sure one can be: the statistics of a measuring session against stored ones.

The unit is a **fresh server start**, never a request and never a batch: repeats on one server share its luck
(Kalibera & Jones, "Rigorous benchmarking in reasonable time", ISMM 2013). A *session* is a set of starts on one
machine in one go. Everything here is on a log scale with the sign turned so that **larger is worse**::

    y[s, r] = mu + S[s] + R[s, r]        S: session, sd sigma_S; R: start within the session, sd sigma_R

Knows nothing of metrics, files or verdicts.
"""

from __future__ import annotations

import math
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

        Found means: a test at level ``alpha`` finds it, and the estimate is ``at_least`` as large.
        """
        return max(self.se * t_quantile(1 - alpha, self.df), at_least) + self.se * t_quantile(POWER, self.df)


@dataclass(frozen=True, slots=True)
class Spread:
    """How much sessions and starts differ when nothing has changed.

    :param start_variance: between starts of one session. :param mean_variance: between means of stored sessions,
        each of ``1 / inverse_starts`` starts; both parts are in it.
    :param inverse_starts: mean of 1/r over the stored sessions. :param sessions: K, those that give the mean.
    :param is_settled: it rests on its own data alone, not on a prior.
    """

    start_variance: float
    start_df: float
    mean_variance: float
    mean_df: float
    inverse_starts: float
    sessions: int
    is_settled: bool

    def of_prediction(self, starts: int, *, sessions: int | None = None) -> tuple[float, float]:
        """Return the standard error, and its degrees of freedom, of a new session's mean less the stored mean.

        The new session is one more draw, so this is a *prediction*::

            se^2 = s_M^2 (1 + 1/K) + s_R^2 (1/r - mean(1/r_k))        df by Satterthwaite

        With as many starts as the stored sessions the second term is nothing, and the test is Student's t with K - 1
        degrees of freedom. With more starts it is left out: the prediction is too wide then, never too narrow.

        :param starts: r, of the new session. :param sessions: another K, to plan with.
        """
        count = sessions or self.sessions
        df = self.mean_df + (count - self.sessions if sessions else 0)
        of_sessions = self.mean_variance * (1 + 1 / count)
        of_starts = self.start_variance * max(0.0, 1 / starts - self.inverse_starts)
        variance = of_sessions + of_starts
        return math.sqrt(variance), variance**2 / (of_sessions**2 / df + of_starts**2 / self.start_df)


def estimate_spread(
    level: Sequence[Session],
    others: Sequence[Sequence[Session]],
    current: Session,
    prior: NoisePrior,
    *,
    start_variance_floor: float,
) -> Spread:
    """Pool what all stored sessions show of the noise; each group of sessions has a mean of its own.

    :param level: (K,) sessions that the new one is compared with. :param others: groups of sessions at another level
        (another driver, before an accepted change), which tell of the spread only.
    :param current: the new session; its starts tell of the spread between starts.
    :param start_variance_floor: least possible variance of a start's value, from the spread of its batches.
    :raises MeasurementError: no current start, no session, or a session without a start.
    """
    groups = [level, *others]
    if not current or not level or not all(session for group in groups for session in group):
        raise MeasurementError("an effect needs at least one start now and one in every stored session; found none")
    start_variance, start_df, starts_settled = _start_variance(
        [current, *(session for group in groups for session in group)], prior, start_variance_floor
    )
    inverse_starts = _mean([1 / len(session) for session in level])
    means = [[_mean(session) for session in group] for group in groups]
    squares = sum((mean - _mean(group)) ** 2 for group in means for mean in group)
    df = float(sum(len(group) - 1 for group in means))
    assumed = prior.session_sd**2 + start_variance * inverse_starts
    weight = 0.0 if df >= SETTLED_DF else prior.session_df
    return Spread(
        start_variance=start_variance,
        start_df=start_df,
        mean_variance=max((weight * assumed + squares) / (weight + df), _SMALLEST_VARIANCE),
        mean_df=weight + df,
        inverse_starts=inverse_starts,
        sessions=len(level),
        is_settled=weight == 0 and starts_settled,
    )


_SMALLEST_VARIANCE = 1e-12  # equal numbers to the last digit: a test of their difference still needs a width


def _start_variance(sessions: Sequence[Session], prior: NoisePrior, floor: float) -> tuple[float, float, bool]:
    squares = sum((value - _mean(session)) ** 2 for session in sessions for value in session)
    df = float(sum(len(session) - 1 for session in sessions))
    weight = 0.0 if df >= SETTLED_DF else prior.start_df
    variance = (weight * prior.start_sd**2 + squares) / (weight + df)
    return max(variance, floor, _SMALLEST_VARIANCE), weight + df, weight == 0


def estimate_effect(current: Session, level: Sequence[Session], spread: Spread) -> Effect:
    """Return how far this session is from the mean of the stored ones.

    :param level: (K,) stored sessions. :param spread: :func:`estimate_spread` of the same.
    """
    size = _mean(current) - _mean([_mean(session) for session in level])
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
    return sum((value - _mean(values)) ** 2 for value in values) / (len(values) - 1)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def t_quantile(probability: float, df: float) -> float:
    """Quantile of Student's t."""
    from scipy.special import stdtrit  # imported late: it brings numpy, which a run without a gate never needs

    return float(stdtrit(df, probability))


def t_cdf(value: float, df: float) -> float:
    """Probability that Student's t is below ``value``."""
    from scipy.special import stdtr

    return float(stdtr(df, value))
