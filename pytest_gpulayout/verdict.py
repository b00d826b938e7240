"""From effects to verdicts: which change is a regression, and what may be called a pass.

The rule, per metric, with margin m (the tolerance on the log scale), L the lower bound at the level of a false alarm,
U the upper bound at the level of a miss, D the smallest change that the gate can see:

=============  =========================================================================================
regression     L > 0, the estimate is at least m/2 (at a true change of m it is below m half the time), and
               every start now is worse than half of the stored ones, one that follows the last look included
improvement    the mirror image
pass           U < m and D <= m: a change that matters is ruled out. Not having seen one is not enough.
               As long as starts may follow, U < D too: a change of the size that is promised to be seen
               may not be passed over in a hurry
inconclusive   neither
=============  =========================================================================================

Levels: 1 % for a false alarm over all gated metrics together (Benjamini and Hochberg, J. R. Stat. Soc. B 57, 1995:
with no true change it bounds the probability of any), 5 % for a miss of each metric. The bound L of a metric is at
the level that the procedure left it (Benjamini and Yekutieli, JASA 100, 2005), so that L > 0 says the same as the
test.

A gate may look after each start. Every look before the last spends little of the level of a false alarm, and the last
one the rest; passes are not in such a hurry to be rare, and each look has the same share of theirs. The levels hold
over all looks by the union bound. Neither a regression nor an improvement is called on one start when there may be
another.

Student's t knows normal noise, and server starts have a tail to the slow side: a few slow ones among three are more
frequent than it says. So every start must show the change, and a regression of the last look calls for one more
start, which has no part in the test and must show it, too. Where nothing has changed a start shows one half the time,
whatever the shape of the noise; a change that can be detected shows in nearly every one.

Scaling a metric changes nothing, and turning its direction around mirrors the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.metrics import METRICS
from pytest_gpulayout.stats import (
    Effect,
    NoisePrior,
    Session,
    Spread,
    estimate_effect,
    estimate_spread,
    mean,
    median,
    variance,
)
from pytest_gpulayout.tolerance import Tolerance, relative_change

FALSE_ALARM = 0.01
MISS = 0.05
_EARLY_ALARM = 0.005
_ALL_EARLY_ALARMS = 0.5
MOST_STARTS = 10
MOST_SESSIONS = 20
"""How far :class:`Requirement` looks for what a margin would take."""


class Status(StrEnum):
    """The four verdicts, and the two states without one."""

    PASS = "pass"
    REGRESSION = "regression"
    IMPROVEMENT = "improvement"
    INCONCLUSIVE = "inconclusive"
    NO_BASELINE = "no-baseline"
    INVALID = "invalid"

    @property
    def passed(self) -> bool:
        """Whether this may be shown as passed."""
        return self in (Status.PASS, Status.IMPROVEMENT)


@dataclass(frozen=True, slots=True)
class MetricSample:
    """One metric of one start: its value in each batch, in the metric's own unit. :param batches: (n_batches,)."""

    batches: tuple[float, ...]

    @property
    def value(self) -> float:
        """The start's value: the median of its batches, which one disturbed batch does not move."""
        return median(self.batches)


Samples = Sequence[Sequence[MetricSample]]
"""(n_sessions,) of (n_starts,) samples of one metric."""


@dataclass(frozen=True, slots=True)
class MetricHistory:
    """One metric in this session and in the stored ones.

    :param current: (r,) starts of this session. :param level: (K,) stored sessions that it is compared with.
    :param others: groups of stored sessions at another level, which tell of the spread only.
    :param prior: what is assumed of the noise as long as there is little of it.
    """

    tolerance: Tolerance
    current: Sequence[MetricSample]
    level: Samples
    prior: NoisePrior
    others: Sequence[Samples] = ()


@dataclass(frozen=True, slots=True)
class Requirement:
    """What it takes to see a change of the size of the margin.

    :param starts: fresh starts per gate, with the sessions that are stored; ``None`` when :data:`MOST_STARTS` are not
        enough. :param sessions: stored sessions, with that many starts; ``None`` when no number up to
        :data:`MOST_SESSIONS` is enough. :param smallest: fraction that can be seen with the most of both.
    """

    starts: int | None
    sessions: int | None
    smallest: float


@dataclass(frozen=True, slots=True)
class MetricVerdict:
    """One metric, judged.

    :param baseline: and ``current``: geometric means over starts, in the metric's unit.
    :param change: current / baseline - 1, in the metric's own direction (throughput: negative is worse).
    :param ci: (low, high) of ``change``, the bounds that the verdict rests on.
    :param tolerance: fraction that it may get worse.
    :param min_detectable: fraction that this gate, with all the starts it may make, finds in 80 of 100 runs.
    :param n_current: starts now. :param n_baseline: stored starts. :param n_sessions: stored sessions.
    :param is_settled: the spread rests on stored sessions alone, not on a prior.
    :param requirement: what a verdict would take; only where it is inconclusive.
    :param n_confirming: starts beyond ``n_current`` that were made to confirm a regression; no number is of them.
    :param ordinary_starts: of a change that the mean shows beyond doubt, the starts of both that do not show it; 0
        where all do.
    """

    name: str
    status: Status
    baseline: float
    current: float
    change: float
    ci: tuple[float, float]
    tolerance: float
    min_detectable: float
    n_current: int
    n_baseline: int
    n_sessions: int = 1
    is_settled: bool = False
    requirement: Requirement | None = None
    n_confirming: int = 0
    ordinary_starts: int = 0


@dataclass(frozen=True, slots=True)
class Look:
    """Which look at the data this is.

    :param number: from 1. :param of: how many there may be.
    :param confirming: starts after those of the last look, which must show the change that it found.
    :param restarts: whether a fresh start can be had; not of a server that somebody else runs.
    """

    number: int
    of: int
    confirming: int = 0
    restarts: bool = True

    @classmethod
    def after(cls, starts: int, of: int, *, restarts: bool = True) -> Look:
        """Return the look after so many starts, of a gate that looks after each of ``of``."""
        return cls(min(starts, of), of, confirming=max(0, starts - of), restarts=restarts)

    def calls_for_another(self, found: Status) -> bool:
        """Whether one more start would serve: the verdict is open, or a regression that nothing has confirmed."""
        if self.is_last:
            return self.restarts and found is Status.REGRESSION and not self.confirming
        return found is Status.INCONCLUSIVE

    @property
    def is_last(self) -> bool:
        """Nothing will be added."""
        return self.number >= self.of

    @property
    def alarm(self) -> float:
        """This look's share of the level of a false alarm."""
        early = min(_EARLY_ALARM, _ALL_EARLY_ALARMS / max(1, self.of - 1))
        return FALSE_ALARM * (1 - early * (self.of - 1) if self.is_last else early)

    @property
    def miss(self) -> float:
        """This look's share of the level of a miss."""
        return MISS / self.of


@dataclass(frozen=True, slots=True)
class _Judged:
    """What is known of one metric before the others are looked at.

    :param ordinary_starts: starts now, those that confirm included, that do not lie on the changed side of the median
        of the stored starts: they show no change.
    """

    history: MetricHistory
    effect: Effect
    spread: Spread
    stored_mean: float
    ordinary_starts: int
    sign: float

    def p_value(self, of_test: float) -> float:
        """Of one direction: 1 where not every start shows the change, so that it is not counted as found."""
        return 1.0 if self.ordinary_starts else of_test


def judge_metrics(histories: Sequence[MetricHistory], look: Look) -> tuple[MetricVerdict, ...]:
    """Judge the gated metrics of this session together against the stored ones.

    :param histories: (n_metrics,), each with at least one start now and one stored session; the last
        ``look.confirming`` of its starts now have no part in the test.
    :param look: ``look.of`` is the number of starts that there may be; the last look is one that no start follows
        but to confirm it, however many there are.
    :returns: one verdict for each, in this order.
    :raises MeasurementError: a metric has no start now, or no stored one, or a value that is no number above zero.
    """
    if not histories:
        return ()
    for history in histories:
        _require_numbers(history)
    judged = [_effect_of(history, look.confirming) for history in histories]
    worse = bound_level([item.p_value(item.effect.p_worse) for item in judged], look.alarm)
    better = bound_level([item.p_value(item.effect.p_better) for item in judged], look.alarm)
    return tuple(_verdict(item, look, worse, better, len(judged)) for item in judged)


def bound_level(p_values: Sequence[float], level: float) -> float:
    """Level at which each bound is taken: ``level * max(1, R) / M``, R of M metrics found by Benjamini-Hochberg."""
    ordered = sorted(p_values)
    count = len(ordered)
    found = max((k for k, p in enumerate(ordered, 1) if p <= level * k / count), default=0)
    return level * max(1, found) / count


def _require_numbers(history: MetricHistory) -> None:
    """Refuse what has no logarithm, and what would leave a metric unjudged."""
    name = history.tolerance.metric
    stored = [session for group in (history.level, *history.others) for session in group]
    if not history.current or not history.level or not all(stored):
        raise MeasurementError(
            "of a gated metric at least one server start now and one in every stored session were required, "
            f"found {len(history.current)} now and {sorted(map(len, stored))} stored\n"
            f"  {name}\n  measure it in every session, or gate other metrics: --gpu-tolerance"
        )
    for where, samples in (("this session", history.current), *(("a stored session", s) for s in stored)):
        for number, sample in enumerate(samples, 1):
            if sample.batches and all(math.isfinite(value) and value > 0 for value in sample.batches):
                continue
            found = ", ".join(f"{value:g}" for value in sample.batches) or "no batch"
            raise MeasurementError(
                f"numbers above zero were required of a gated metric, found {found} {METRICS[name].unit}\n"
                f"  {name}, server start {number} of {where}\n"
                "  measure again; where it is stored, record it anew: --gpu-baseline=update"
            )


def _effect_of(history: MetricHistory, confirming: int) -> _Judged:
    sign = -1.0 if METRICS[history.tolerance.metric].better == "higher" else 1.0
    level, others = log_sessions(history.level, sign), [log_sessions(group, sign) for group in history.others]
    tested = history.current[: len(history.current) - confirming]
    current = _log_session(tested, sign)
    everything = [*tested, *(s for group in (history.level, *history.others) for e in group for s in e)]
    spread = estimate_spread(level, others, current, history.prior, start_variance_floor=batch_noise(everything))
    effect = estimate_effect(current, level, spread)
    ordinary = median([value for session in level for value in session])
    now = _log_session(history.current, sign)
    ordinary_starts = sum((value - ordinary) * effect.size <= 0 for value in now)
    return _Judged(history, effect, spread, mean_of_means(level), ordinary_starts, sign)


def log_sessions(sessions: Samples, sign: float = 1.0) -> list[list[float]]:
    """Logs of the starts of each session, times ``sign``."""
    return [_log_session(session, sign) for session in sessions]


def _log_session(samples: Sequence[MetricSample], sign: float) -> list[float]:
    return [sign * math.log(sample.value) for sample in samples]


def mean_of_means(sessions: Sequence[Session]) -> float:
    """Mean over sessions of their means over starts."""
    return mean([mean(session) for session in sessions])


def _verdict(item: _Judged, look: Look, worse: float, better: float, metrics: int) -> MetricVerdict:
    tolerance, effect, sign = item.history.tolerance, item.effect, item.sign
    starts = len(item.history.current) - look.confirming
    margin = tolerance.margin
    reach = _reach(item.spread, margin / 2, metrics, starts if look.is_last else max(look.of, starts), look.of)
    low, high = effect.lower(worse), effect.upper(look.miss)
    moved = _status(effect, low, effect.upper(better), margin)
    status = None if item.ordinary_starts else moved
    if status is Status.IMPROVEMENT:
        low, high = effect.lower(look.miss), effect.upper(better)
    if status is not None and starts == 1 and not look.is_last:
        status = Status.INCONCLUSIVE
    if status is None:
        ruled_out = margin if look.is_last else min(margin, reach)
        status = Status.PASS if high < ruled_out and reach <= margin else Status.INCONCLUSIVE
    bounds = sorted((relative_change(sign * low), relative_change(sign * high)))
    return MetricVerdict(
        name=tolerance.metric,
        status=status,
        baseline=math.exp(sign * item.stored_mean),
        current=math.exp(sign * (item.stored_mean + effect.size)),
        change=relative_change(sign * effect.size),
        ci=(bounds[0], bounds[1]),
        tolerance=tolerance.fraction,
        min_detectable=tolerance.fraction_of(reach),
        n_current=starts,
        n_baseline=sum(map(len, item.history.level)),
        n_sessions=item.spread.sessions,
        is_settled=item.spread.is_settled,
        requirement=_requirement(item.spread, tolerance, metrics, look) if status is Status.INCONCLUSIVE else None,
        n_confirming=look.confirming,
        ordinary_starts=item.ordinary_starts if moved is not None else 0,
    )


def _status(effect: Effect, low: float, high: float, margin: float) -> Status | None:
    """Which way it moved, by the bounds at the level of a false alarm; ``None`` where that is not certain."""
    if low > 0 and effect.size >= margin / 2:
        return Status.REGRESSION
    return Status.IMPROVEMENT if high < 0 and effect.size <= -margin / 2 else None


def detectable(spread: Spread, margin: float, metrics: int, starts: int, *, sessions: int | None = None) -> float:
    """Smallest change, on the log scale, that a gate of up to ``starts`` starts finds in 80 of 100 runs.

    By its last look alone, with the level of a metric that changes alone: never promised too much.

    :param margin: on the log scale; an estimate below half of it is no regression.
    :param metrics: gated together. :param sessions: stored ones, where not those there are.
    """
    return _reach(spread, margin / 2, metrics, starts, starts, sessions=sessions)


def _reach(
    spread: Spread, at_least: float, metrics: int, starts: int, looks: int, *, sessions: int | None = None
) -> float:
    """What the last of so many looks finds with so many starts; they are fewer where time runs out."""
    planned = Effect(0.0, *spread.of_prediction(starts, sessions=sessions))
    return planned.detectable(Look(looks, looks).alarm / metrics, at_least)


def _requirement(spread: Spread, tolerance: Tolerance, metrics: int, look: Look) -> Requirement:
    return require(spread, tolerance, metrics, most_starts=MOST_STARTS if look.restarts else look.of)


def require(spread: Spread, tolerance: Tolerance, metrics: int, *, most_starts: int = MOST_STARTS) -> Requirement:
    """Find what it takes to see a change as large as the tolerance, with noise as it was found.

    :param most_starts: that a gate could have.
    """
    margin = tolerance.margin

    def sees(starts: int, sessions: int) -> bool:
        return detectable(spread, margin, metrics, starts, sessions=sessions) <= margin

    smallest = detectable(spread, 0.0, metrics, most_starts, sessions=max(spread.sessions, MOST_SESSIONS))
    return Requirement(
        starts=next((n for n in range(1, most_starts + 1) if sees(n, spread.sessions)), None),
        sessions=_from_which_on(
            lambda count: sees(most_starts, count), range(spread.sessions, max(spread.sessions, MOST_SESSIONS) + 1)
        ),
        smallest=tolerance.fraction_of(smallest),
    )


def _from_which_on(holds: Callable[[int], bool], counts: Sequence[int]) -> int | None:
    """The first count from which on it always holds: a prior that is dropped leaves a session more less certain."""
    enough = len(counts)
    while enough and holds(counts[enough - 1]):
        enough -= 1
    return counts[enough] if enough < len(counts) else None


def batch_noise(samples: Sequence[MetricSample]) -> float:
    """Variance that a start's value has from its batches alone: pooled log variance over batches, divided by them."""
    return mean([variance([math.log(b) for b in sample.batches]) / len(sample.batches) for sample in samples])


def overall_status(verdicts: Sequence[MetricVerdict]) -> Status:
    """The gate's verdict: one regression makes it one; a pass needs every gated metric, and at least one."""
    if not verdicts:
        return Status.INCONCLUSIVE
    found = {verdict.status for verdict in verdicts}
    for status in (Status.REGRESSION, Status.INCONCLUSIVE, Status.IMPROVEMENT):
        if status in found:
            return status
    return Status.PASS


@dataclass(frozen=True, slots=True)
class AdvisoryChange:
    """A metric that is shown and not gated: current against baseline, in the metric's unit and direction."""

    name: str
    baseline: float | None
    current: float

    @property
    def change(self) -> float | None:
        """current / baseline - 1, ``None`` without a baseline."""
        return None if self.baseline is None else self.current / self.baseline - 1


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a performance gate found.

    :param reasons: why it is what it is, in sentences; empty for a plain pass.
    :param metrics: the gated ones. :param advisory: the others.
    :param changed: what differs from the stored sessions besides the numbers: driver, vLLM, binding.
    :param provisional: why it rests on less than it should: few stored sessions, a borrowed spread; ``""`` where not.
    :param cause: for a metric that moved: a sentence on what moved it most likely, then the rows of a table.
    :param drift: one line on how the wiring differs from the baseline's; empty where it does not.
    :param stored: what was written: ``"recorded"``, ``"updated"`` or nothing.
    :param baseline_path: where the baseline is, or would be.
    """

    status: Status
    reasons: tuple[str, ...] = ()
    metrics: tuple[MetricVerdict, ...] = ()
    advisory: tuple[AdvisoryChange, ...] = ()
    changed: tuple[str, ...] = ()
    drift: str = ""
    provisional: str = ""
    cause: tuple[str, ...] = ()
    stored: str = ""
    baseline_path: str = ""


def changed_fields(stored: Mapping[str, object], now: Mapping[str, object]) -> tuple[str, ...]:
    """Name what differs between two flat records, as ``driver_version: 570.1 -> 580.2``; ``None`` is unknown."""
    pairs = ((name, stored.get(name), now.get(name)) for name in dict.fromkeys([*stored, *now]))
    return tuple(
        f"{name}: {'unknown' if before is None else before} -> {'unknown' if after is None else after}"
        for name, before, after in pairs
        if before != after
    )
