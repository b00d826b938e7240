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


@dataclass(frozen=True, slots=True)
class NoisePrior:
    """What is assumed of the noise before there is data, and what the assumption weighs.

    A scaled inverse chi-square prior on each variance: ``df`` counts like that many degrees of freedom of data.

    :param start_sd: relative spread between starts of one session. :param session_sd: between sessions.
    """

    start_sd: float
    session_sd: float
    start_df: float = 4.0
    session_df: float = 3.0


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
        return self.size - self.se * _t_quantile(1 - alpha, self.df)

    def upper(self, alpha: float) -> float:
        """One-sided upper bound: the true effect is above it with probability ``alpha`` at most."""
        return self.size + self.se * _t_quantile(1 - alpha, self.df)

    def detectable(self, alpha: float) -> float:
        """Smallest true effect that a test at level ``alpha`` finds with probability :data:`POWER`."""
        return self.se * (_t_quantile(1 - alpha, self.df) + _t_quantile(POWER, self.df))


def estimate_effect(
    current: Sequence[float], sessions: Sequence[Sequence[float]], prior: NoisePrior, *, start_variance_floor: float
) -> Effect:
    """Compare this session's starts with those of the stored sessions.

    Variances are pooled with their prior; the standard error is that of a *prediction* (this session is one more
    draw from the sessions)::

        se^2 = s_S^2 (1 + 1/K) + s_R^2 (1/r + (1/K^2) sum 1/r_k)        df by Satterthwaite

    :param current: (r,) logs of this session, one per start. :param sessions: K stored ones, each (r_k,).
    :param start_variance_floor: least possible variance of a start's value, from the spread of its batches.
    :raises MeasurementError: no current start, no session, or a session without a start.
    """
    if not current or not sessions or not all(sessions):
        raise MeasurementError("an effect needs at least one start now and one in every stored session; found none")
    start_variance, start_df = _start_variance([*sessions, current], prior, start_variance_floor)
    means = [_mean(session) for session in sessions]
    inverse_starts = sum(1 / len(session) for session in sessions) / len(sessions)
    session_variance, session_df = _session_variance(means, start_variance * inverse_starts, prior)
    of_sessions = session_variance * (1 + 1 / len(sessions))
    of_starts = start_variance * (1 / len(current) + inverse_starts / len(sessions))
    variance = of_sessions + of_starts
    df = variance**2 / (of_sessions**2 / session_df + of_starts**2 / start_df)
    return Effect(_mean(current) - _mean(means), math.sqrt(variance), df)


def _start_variance(sessions: Sequence[Sequence[float]], prior: NoisePrior, floor: float) -> tuple[float, float]:
    squares = sum((value - _mean(session)) ** 2 for session in sessions for value in session)
    df = prior.start_df + sum(len(session) - 1 for session in sessions)
    return max((prior.start_df * prior.start_sd**2 + squares) / df, floor), df


def _session_variance(means: Sequence[float], of_a_mean: float, prior: NoisePrior) -> tuple[float, float]:
    """Variance between sessions; what the starts alone explain of the spread of the means is taken off."""
    spread = sum((mean - _mean(means)) ** 2 for mean in means)
    explained = (len(means) - 1) * of_a_mean
    df = prior.session_df + len(means) - 1
    return (prior.session_df * prior.session_sd**2 + max(0.0, spread - explained)) / df, df


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


def _t_quantile(probability: float, df: float) -> float:
    from scipy.special import stdtrit  # imported late: it brings numpy, which a run without a gate never needs

    return float(stdtrit(df, probability))
