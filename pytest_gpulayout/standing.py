"""What a baseline is worth: how much its sessions differ, and how small a change it can show.

Judges nothing; the same spread and the same smallest change as in a verdict, for stored sessions alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pytest_gpulayout.baseline import Baseline, Reference
from pytest_gpulayout.bimodality import Mode, find_modes
from pytest_gpulayout.gated import documented_prior, gated_of
from pytest_gpulayout.judging import PriorOf
from pytest_gpulayout.metrics import METRICS
from pytest_gpulayout.reasons import FEW_SESSIONS
from pytest_gpulayout.report import plural
from pytest_gpulayout.stats import Spread, estimate_spread
from pytest_gpulayout.tolerance import Tolerance
from pytest_gpulayout.verdict import (
    MOST_STARTS,
    Requirement,
    Samples,
    batch_noise,
    detectable,
    log_sessions,
    mean_of_means,
    require,
)


@dataclass(frozen=True, slots=True)
class MetricStanding:
    """One metric of the stored sessions that a measurement would be compared with.

    :param mean: geometric mean over sessions, in the metric's unit.
    :param start_sd: relative spread between starts of one session. :param session_sd: between sessions, without what
        comes from their starts. :param modes: two groups that the starts fall into; empty where they do not.
    :param is_settled: the spread rests on stored sessions alone, not on an assumption.
    :param tolerance: fraction that it may get worse, ``None`` where it is not gated; then the next two are, too.
    :param min_detectable: fraction that a gate finds in 80 of 100 runs. :param requirement: what the tolerance takes.
    """

    name: str
    mean: float
    start_sd: float
    session_sd: float
    sessions: int
    starts: int
    is_settled: bool
    modes: tuple[Mode, ...]
    tolerance: float | None = None
    min_detectable: float | None = None
    requirement: Requirement | None = None

    @property
    def shows_its_margin(self) -> bool:
        """Whether a change as large as the tolerance can be seen."""
        return self.tolerance is None or self.min_detectable is None or self.min_detectable <= self.tolerance


@dataclass(frozen=True, slots=True)
class Standing:
    """A whole baseline. :param reference: what a measurement would be compared with."""

    reference: Reference
    metrics: tuple[MetricStanding, ...]

    @property
    def is_settled(self) -> bool:
        """Whether verdicts on it are more than provisional."""
        gated = [metric for metric in self.metrics if metric.tolerance is not None]
        return len(self.reference.sessions) >= FEW_SESSIONS and all(metric.is_settled for metric in gated)

    @property
    def state(self) -> str:
        """``settled``, ``provisional``, with ``waiver until 2026-12-31`` or ``waiver ended on`` that day."""
        state = "settled" if self.is_settled else "provisional"
        accepted = self.reference.accepted
        if accepted is None or not accepted.until:
            return state
        return f"{state}, waiver {'ended on' if self.reference.is_expired else 'until'} {accepted.until}"


def stand(
    baseline: Baseline,
    tolerances: Mapping[str, Tolerance],
    *,
    today: str,
    starts: int,
    priors: PriorOf | None = None,
) -> Standing:
    """Work out what a baseline is worth today.

    :param tolerances: of the gated metrics of all keys. :param today: ISO 8601 date, for waivers.
    :param starts: that a gate may make. :param priors: what is assumed of the noise, where not the documented prior.
    """
    reference = baseline.reference(today=today)
    documented, tolerances = documented_prior(baseline.key), gated_of(baseline.key, tolerances)
    found = []
    for name in METRICS:
        level, others = reference.level_samples(name), reference.other_samples(name)
        if level:
            prior = documented if priors is None else priors(name)
            starts_of_all = [start for group in (level, *others) for session in group for start in session]
            spread = estimate_spread(
                log_sessions(level),
                [log_sessions(group) for group in others],
                log_sessions(level)[-1][:1],
                prior,
                start_variance_floor=batch_noise(starts_of_all),
            )
            found.append(_standing(name, level, spread, tolerances, starts))
    return Standing(reference, tuple(found))


def _standing(
    name: str, level: Samples, spread: Spread, tolerances: Mapping[str, Tolerance], starts: int
) -> MetricStanding:
    logs = log_sessions(level)
    standing = MetricStanding(
        name=name,
        mean=math.exp(mean_of_means(logs)),
        start_sd=math.sqrt(spread.start_variance),
        session_sd=math.sqrt(spread.session_variance),
        sessions=len(level),
        starts=sum(map(len, level)),
        is_settled=spread.is_settled,
        modes=find_modes([value for session in logs for value in session]),
    )
    tolerance = tolerances.get(name)
    if tolerance is None:
        return standing
    reach = detectable(spread, tolerance.margin, len(tolerances), starts)
    return replace(
        standing,
        tolerance=tolerance.fraction,
        min_detectable=tolerance.fraction_of(reach),
        requirement=require(spread, tolerance, len(tolerances)),
    )


def takes_text(metric: MetricStanding, starts: int) -> str:
    """What it takes to see a change as large as the tolerance, ``""`` where nothing more.

    :param starts: that a gate may make.
    """
    needed = metric.requirement
    if needed is None or metric.shows_its_margin:
        return ""
    if needed.starts is not None and needed.starts > starts:
        return f"--gpu-starts={needed.starts}"
    if needed.sessions is not None:
        return f"{plural(needed.sessions, 'stored session')} and --gpu-starts={MOST_STARTS}"
    return f"a tolerance of {needed.smallest:.1%}, or pairs (--gpu-base)"
