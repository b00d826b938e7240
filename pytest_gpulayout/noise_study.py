"""How noisy a machine is, and what a gate on it is worth: a study of sessions in which nothing was changed.

Knows how to take the spread apart (batches, starts, sessions), what size of change a gate of so many starts sees with
so many stored sessions, and how often the gate's own procedure raises a false alarm on starts that were really
measured. Leaves measuring to whoever has the sessions, and words to :mod:`~pytest_gpulayout.noise_text`.

Everything is on the log scale, and reported as a fraction. The model (Kalibera & Jones, "Rigorous benchmarking in
reasonable time", ISMM 2013, section 5) is nested: ``y = mu + session + start + batch``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pytest_gpulayout.baseline import BaselineRun
from pytest_gpulayout.bimodality import Mode, find_modes
from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.stats import NoisePrior, Spread, estimate_spread, mean, variance
from pytest_gpulayout.tolerance import Tolerance
from pytest_gpulayout.verdict import (
    FALSE_ALARM,
    MOST_STARTS,
    Look,
    MetricHistory,
    MetricSample,
    MetricVerdict,
    Status,
    detectable,
    judge_metrics,
    overall_status,
)

STORED = (1, 3, 5, 8, 20)
"""Numbers of stored sessions that the table of detectable changes has."""
PLANNED_SESSIONS = 8
"""Stored sessions that a gate is planned with: with those the spread rests on own data alone."""
CONFIDENCE = 0.90
"""Of the intervals of standard deviations."""

Start = Mapping[str, MetricSample]
"""One server start: each metric's sample."""


@dataclass(frozen=True, slots=True)
class Component:
    """One source of the spread. :param name: ``batches``, ``starts`` or ``sessions``.

    :param sd: relative standard deviation. :param low: and ``high``: its interval of :data:`CONFIDENCE`.
    :param df: degrees of freedom of the mean square that it comes from.
    """

    name: str
    sd: float
    low: float
    high: float
    df: int


@dataclass(frozen=True, slots=True)
class MetricNoise:
    """What a gate on one metric can do.

    :param components: those that there are data for, the innermost first. :param modes: two groups that the starts
        fall into, ``()`` for one.
    :param is_settled: the spread rests on these sessions alone, not on a prior.
    :param detectable: smallest change, as a fraction, by stored sessions (:data:`STORED`); (n_starts,) for gates of
        1 to :data:`~pytest_gpulayout.verdict.MOST_STARTS` starts against sessions of as many.
    """

    tolerance: Tolerance
    components: tuple[Component, ...]
    modes: tuple[Mode, ...]
    is_settled: bool
    detectable: Mapping[int, tuple[float, ...]]

    def needed_starts(self, sessions: int = PLANNED_SESSIONS) -> int | None:
        """Starts from which on a gate sees a change as large as the tolerance; ``None`` where no number is enough."""
        enough = (n for n, seen in enumerate(self.detectable[sessions], 1) if seen <= self.tolerance.fraction)
        return next(enough, None)

    def sees(self, starts: int, sessions: int = PLANNED_SESSIONS) -> float:
        """Smallest change that a gate of so many starts sees, as a fraction."""
        return self.detectable[sessions][starts - 1]


@dataclass(frozen=True, slots=True)
class SameAgainstSame:
    """What the gate said of sessions in which nothing had changed; each count is of resampled gates.

    :param sessions: real ones, each of which was the new one equally often. :param stored: sessions that it was
        compared with. :param starts: most per gate. :param used: mean number of starts until the verdict.
    """

    sessions: int
    stored: int
    starts: int
    verdicts: Mapping[Status, int]
    used: float

    @property
    def resamples(self) -> int:
        """Gates in all."""
        return sum(self.verdicts.values())

    def share(self, *statuses: Status) -> float:
        """Share of the gates that ended in one of these."""
        return sum(self.verdicts.get(status, 0) for status in statuses) / self.resamples

    @property
    def false_alarms(self) -> float:
        """Share of the gates that found a regression where there is none."""
        return self.share(Status.REGRESSION)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of :attr:`false_alarms` for other draws from these starts."""
        return wilson_interval(self.verdicts.get(Status.REGRESSION, 0), self.resamples)

    @property
    def machine_interval(self) -> tuple[float, float]:
        """95 % interval for this machine: each real session counts once, however often it was drawn."""
        return exact_interval(self.false_alarms * self.sessions, self.sessions)

    @property
    def is_too_high(self) -> bool:
        """Whether the false-alarm rate is above what the gate promises, beyond what so few sessions may show."""
        return self.machine_interval[0] > FALSE_ALARM


@dataclass(frozen=True, slots=True)
class NoiseStudy:
    """All that sessions of one key tell of the noise.

    :param starts: (n_sessions,) of each session. :param gate_starts: most starts of the gate that is planned.
    :param prior: what was assumed where the sessions were too few.
    :param same: ``None`` with a single session.
    """

    starts: tuple[int, ...]
    gate_starts: int
    prior: NoisePrior
    metrics: tuple[MetricNoise, ...]
    same: SameAgainstSame | None


def study_noise(
    sessions: Sequence[Sequence[BaselineRun]],
    tolerances: Mapping[str, Tolerance],
    prior: NoisePrior,
    *,
    gate_starts: int,
    resamples: int,
    seed: int,
) -> NoiseStudy:
    """Study sessions of one key in which nothing was changed.

    :param sessions: (n_sessions,) of (n_starts,). :param gate_starts: most starts of the gate that is planned.
    :param resamples: gates that are judged on draws from these starts. :param seed: of the draws.
    :raises MeasurementError: no session, one without a start, or starts without any gated metric.
    """
    gated = _gated(sessions, tolerances)
    logs = {name: _logs(sessions, name) for name in gated}
    metrics = tuple(_metric_noise(logs[name], gated[name], prior, len(gated)) for name in gated)
    same = None
    if len(sessions) > 1:
        starts = [[as_start(run) for run in session] for session in sessions]
        same = judge_same_against_same(starts, gated, prior, gate_starts=gate_starts, resamples=resamples, seed=seed)
    return NoiseStudy(tuple(map(len, sessions)), gate_starts, prior, metrics, same)


def as_start(run: BaselineRun) -> Start:
    """Return the samples of a stored start."""
    return {name: MetricSample(batches) for name, batches in run.metrics.items()}


def _gated(sessions: Sequence[Sequence[BaselineRun]], tolerances: Mapping[str, Tolerance]) -> dict[str, Tolerance]:
    """The tolerances of the metrics that all starts have."""
    runs = [run for session in sessions for run in session]
    gated = {name: item for name, item in tolerances.items() if all(name in run.metrics for run in runs)}
    if not runs or not all(sessions) or not gated:
        found = f"{len(sessions)} sessions of {', '.join(str(len(session)) for session in sessions) or 'no'} starts"
        raise MeasurementError(
            f"sessions of at least one start, with one of the metrics {', '.join(tolerances)} in all of them, were "
            f"required\n  found: {found}\n  in the sessions to study\n"
            "  measure more (--sessions, --starts), or name metrics that were measured (--tolerance METRIC=5%)"
        )
    return gated


# -- the spread, taken apart ---------------------------------------------------------------------------------------

_Logs = Sequence[Sequence[Sequence[float]]]


def _logs(sessions: Sequence[Sequence[BaselineRun]], metric: str) -> _Logs:
    return [[[math.log(batch) for batch in run.metrics[metric]] for run in session] for session in sessions]


def _metric_noise(logs: _Logs, tolerance: Tolerance, prior: NoisePrior, metrics: int) -> MetricNoise:
    values = [[_median_log(batches) for batches in session] for session in logs]
    floor = mean([variance(batches) / len(batches) for session in logs for batches in session])
    spread = estimate_spread(values, (), values[-1][:1], prior, start_variance_floor=floor)

    def reach(stored: int, starts: int) -> float:
        planned = planned_spread(spread, starts=starts)
        return tolerance.fraction_of(detectable(planned, tolerance.margin, metrics, starts, sessions=stored))

    table = {stored: tuple(reach(stored, n) for n in range(1, MOST_STARTS + 1)) for stored in STORED}
    return MetricNoise(
        tolerance=tolerance,
        components=variance_components(logs),
        modes=find_modes([value for session in values for value in session]),
        is_settled=spread.is_settled,
        detectable=table,
    )


def _median_log(batches: Sequence[float]) -> float:
    """The start's value as the gate takes it, see :class:`~pytest_gpulayout.verdict.MetricSample`."""
    return math.log(MetricSample(tuple(map(math.exp, batches))).value)


def planned_spread(spread: Spread, *, starts: int) -> Spread:
    """Return the spread as it will be when all stored sessions have so many starts; the variances stay as found."""
    between = max(0.0, spread.mean_variance - spread.start_variance * spread.inverse_starts)
    return replace(
        spread,
        mean_variance=between + spread.start_variance / starts,
        inverse_starts=1 / starts,
        level_inverse_starts=1 / starts,
    )


def variance_components(logs: _Logs) -> tuple[Component, ...]:
    """Take the spread apart by the analysis of variance of unweighted means.

    Intervals: chi-square for batches; for a difference of mean squares the modified large-sample interval of Ting,
    Burdick, Graybill, Jeyaratnam and Lu (J. Stat. Comput. Simul. 35, 1990; Burdick & Graybill, "Confidence intervals
    on variance components", 1992, section 3.3), which is chi-square, too, where the second one is known.

    :param logs: (n_sessions,) of (n_starts,) of (n_batches,) logs.
    :returns: batches, starts, sessions; without those of which there is only one.
    """
    starts = [batches for session in logs for batches in session]
    means = [[mean(batches) for batches in session] for session in logs]
    of_batches, batches_df = _pooled(starts)
    of_starts, starts_df = _pooled(means)
    of_sessions, sessions_df = _pooled([[mean(session) for session in means]])
    per_start = mean([1 / len(batches) for batches in starts])
    per_session = mean([1 / len(session) for session in means])
    found = (
        _component("batches", (of_batches, batches_df), (0.0, 1)),
        _component("starts", (of_starts, starts_df), (of_batches * per_start, batches_df)),
        _component("sessions", (of_sessions, sessions_df), (of_starts * per_session, starts_df)),
    )
    return tuple(component for component in found if component is not None)


def _pooled(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Mean square within the groups, and its degrees of freedom."""
    df = sum(len(group) - 1 for group in groups)
    return (sum(variance(group) * (len(group) - 1) for group in groups) / df if df else 0.0), df


def _component(name: str, upper: tuple[float, int], lower: tuple[float, int]) -> Component | None:
    """``upper`` and ``lower``: a mean square and its degrees of freedom; the component is their difference."""
    (larger, df), (smaller, smaller_df) = upper, lower
    if df == 0:
        return None
    low, high = _difference_interval(larger, df, smaller, max(1, smaller_df))
    variances = (max(0.0, value) for value in (larger - smaller, low, high))
    sd, sd_low, sd_high = map(math.sqrt, variances)
    return Component(name, sd, sd_low, sd_high, df)


def _difference_interval(s1: float, n1: int, s2: float, n2: int) -> tuple[float, float]:
    """Interval of the difference of the two expected mean squares; notation of Burdick & Graybill."""
    from scipy.special import chdtri, fdtri

    alpha = (1 - CONFIDENCE) / 2
    chi_low_1, chi_high_1 = chdtri(n1, 1 - alpha) / n1, chdtri(n1, alpha) / n1
    chi_low_2, chi_high_2 = chdtri(n2, 1 - alpha) / n2, chdtri(n2, alpha) / n2
    f_high, f_low = fdtri(n1, n2, 1 - alpha), fdtri(n1, n2, alpha)
    g1, h2 = 1 - 1 / chi_high_1, 1 / chi_low_2 - 1
    h1, g2 = 1 / chi_low_1 - 1, 1 - 1 / chi_high_2
    g12 = ((f_high - 1) ** 2 - g1**2 * f_high**2 - h2**2) / f_high
    h12 = ((1 - f_low) ** 2 - h1**2 * f_low**2 - g2**2) / f_low
    below = g1**2 * s1**2 + h2**2 * s2**2 + g12 * s1 * s2
    above = h1**2 * s1**2 + g2**2 * s2**2 + h12 * s1 * s2
    return s1 - s2 - math.sqrt(max(0.0, below)), s1 - s2 + math.sqrt(max(0.0, above))


# -- same against same ---------------------------------------------------------------------------------------------


def judge_same_against_same(
    sessions: Sequence[Sequence[Start]],
    tolerances: Mapping[str, Tolerance],
    prior: NoisePrior,
    *,
    gate_starts: int,
    resamples: int,
    seed: int,
) -> SameAgainstSame:
    """Judge draws from sessions in which nothing had changed, as the gate would.

    Each session is the new one in turn, the stored ones are drawn from the others without replacement, up to
    :data:`PLANNED_SESSIONS`. Of each, up to ``gate_starts`` starts are drawn without replacement; starts of different
    sessions are never mixed, since they do not share their session's luck.

    :param sessions: (n_sessions,) of (n_starts,), at least two.
    """
    draw = random.Random(seed)
    stored = min(PLANNED_SESSIONS, len(sessions) - 1)
    counts: dict[Status, int] = {}
    used = 0

    def some(session: Sequence[Start], most: int = gate_starts) -> list[Start]:
        return draw.sample(session, min(most, len(session)))

    for number in range(resamples):
        new = number % len(sessions)
        others = draw.sample([session for n, session in enumerate(sessions) if n != new], stored)
        current = some(sessions[new], gate_starts + 1)
        verdicts = judge_in_looks(current, [some(other) for other in others], tolerances, prior, of=gate_starts)
        status = overall_status(verdicts)
        counts[status] = counts.get(status, 0) + 1
        used += verdicts[0].n_current + verdicts[0].n_confirming
    most = min(gate_starts, max(map(len, sessions)))
    return SameAgainstSame(len(sessions), stored, most, counts, used / resamples)


def judge_in_looks(
    current: Sequence[Start],
    stored: Sequence[Sequence[Start]],
    tolerances: Mapping[str, Tolerance],
    prior: NoisePrior,
    *,
    of: int,
    first: int = 1,
) -> tuple[MetricVerdict, ...]:
    """Judge starts one after the other, as a gate does that looks after each of them.

    :param current: (n_starts,), in the order in which they are looked at. :param stored: sessions of one level.
    :param of: starts at the last look; one more in ``current`` confirms a regression.
    :param first: starts at the first look.
    :returns: (n_metrics,), of the look that decided, or of the last one.
    """
    looks = min(of, len(current)) - first + 1
    levels = {name: [[start[name] for start in session] for session in stored] for name in tolerances}
    for number in range(first, len(current) + 1):
        seen = current[:number]
        histories = [
            MetricHistory(tolerance, [start[name] for start in seen], levels[name], prior)
            for name, tolerance in tolerances.items()
        ]
        look = Look.after(number - first + 1, looks)
        verdicts = judge_metrics(histories, look)
        if not look.calls_for_another(overall_status(verdicts)):
            break
    return verdicts


def wilson_interval(found: int, of: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, JASA 22, 1927), as :func:`scipy.stats.binomtest` computes it."""
    from scipy.stats import binomtest

    interval = binomtest(found, of).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def exact_interval(found: float, of: int) -> tuple[float, float]:
    """95 % interval of a share (Clopper & Pearson, Biometrika 26, 1934). :param found: need not be whole."""
    from scipy.special import betaincinv

    low = betaincinv(found, of - found + 1, 0.025) if found > 0 else 0.0
    high = betaincinv(found + 1, of - found, 0.975) if found < of else 1.0
    return float(low), float(high)
