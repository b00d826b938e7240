"""From effects to verdicts: which change is a regression, and what may be called a pass.

The rule, per metric, with margin m (the tolerance on the log scale), L the lower bound at the level of a false alarm,
U the upper bound at the level of a miss:

=============  =========================================================================================
regression     L > 0 and the estimate is at least m/2 (at a true change of m it is below m half the time)
improvement    the mirror image
pass           U < m: a change that matters is ruled out. Not having seen one is not enough
inconclusive   neither
=============  =========================================================================================

Levels: 1 % for a false alarm over all gated metrics together (Bonferroni), 5 % for a miss. A gate may look after each
start; every look before the last spends a tenth of the level, all of them half of it at most, and the last one the
rest, so that the levels hold over all looks by the union bound. A regression is never called on one start when there
may be another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pytest_gpulayout.metrics import METRICS
from pytest_gpulayout.stats import Effect, NoisePrior, estimate_effect, median, variance
from pytest_gpulayout.tolerance import Tolerance

FALSE_ALARM = 0.01
MISS = 0.05
_EARLY_SHARE = 0.1
_MOST_EARLY = 0.5
PROVISIONAL_BELOW_SESSIONS = 5


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


@dataclass(frozen=True, slots=True)
class MetricVerdict:
    """One metric, judged.

    :param baseline: and ``current``: geometric means over starts, in the metric's unit.
    :param change: current / baseline - 1, in the metric's own direction (throughput: negative is worse).
    :param ci: (low, high) of ``change``, the bounds that the verdict rests on.
    :param tolerance: fraction that it may get worse. :param min_detectable: fraction that would have been seen.
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


@dataclass(frozen=True, slots=True)
class Look:
    """Which look at the data this is. :param number: from 1. :param of: how many there may be."""

    number: int
    of: int

    def level(self, overall: float) -> float:
        """This look's share of an overall level."""
        early = min(_EARLY_SHARE, _MOST_EARLY / (self.of - 1)) if self.of > 1 else 0.0
        return overall * (early if self.number < self.of else 1 - early * (self.of - 1))


def judge_metric(
    tolerance: Tolerance,
    current: Sequence[MetricSample],
    sessions: Sequence[Sequence[MetricSample]],
    *,
    prior: NoisePrior,
    look: Look,
    metrics: int,
) -> MetricVerdict:
    """Judge one metric of this session against the stored ones.

    :param current: (r,) starts of this session. :param sessions: (K,) stored sessions, each (r_k,) starts.
    :param metrics: how many metrics are gated together.
    """
    sign = -1.0 if METRICS[tolerance.metric].better == "higher" else 1.0
    logs = [sign * math.log(sample.value) for sample in current]
    stored = [[sign * math.log(sample.value) for sample in session] for session in sessions]
    everything = [*current, *(sample for session in sessions for sample in session)]
    effect = estimate_effect(logs, stored, prior, start_variance_floor=_batch_noise(everything))
    alarm_level = look.level(FALSE_ALARM) / metrics
    low, high = effect.lower(alarm_level), effect.upper(look.level(MISS))
    status = _status(effect, low, high, tolerance.margin, alarm_level)
    if status is Status.REGRESSION and look.number == 1 and look.of > 1:
        status = Status.INCONCLUSIVE
    bounds = sorted((math.expm1(sign * low), math.expm1(sign * high)))
    mean_stored = math.fsum(math.fsum(s) / len(s) for s in stored) / len(stored)
    return MetricVerdict(
        name=tolerance.metric,
        status=status,
        baseline=math.exp(sign * mean_stored),
        current=math.exp(sign * (mean_stored + effect.size)),
        change=math.expm1(sign * effect.size),
        ci=(bounds[0], bounds[1]),
        tolerance=tolerance.fraction,
        min_detectable=abs(math.expm1(sign * effect.detectable(alarm_level))),
        n_current=len(current),
        n_baseline=sum(map(len, sessions)),
    )


def _status(effect: Effect, low: float, high: float, margin: float, alarm_level: float) -> Status:
    if low > 0 and effect.size >= margin / 2:
        return Status.REGRESSION
    if effect.upper(alarm_level) < 0 and effect.size <= -margin / 2:
        return Status.IMPROVEMENT
    return Status.PASS if high < margin else Status.INCONCLUSIVE


def _batch_noise(samples: Sequence[MetricSample]) -> float:
    """Variance that a start's value has from its batches alone: pooled log variance over batches, divided by them."""
    per_start = [variance([math.log(b) for b in sample.batches]) / len(sample.batches) for sample in samples]
    return math.fsum(per_start) / len(per_start)


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
    :param provisional: few stored sessions: the spread rests mostly on the documented prior.
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
    provisional: bool = False
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
