"""Adding a session to a baseline: as one more of its level, or as the first of a new one."""

from __future__ import annotations

from dataclasses import replace

from pytest_gpulayout.baseline import Baseline, BaselineSession, LevelStart
from pytest_gpulayout.metrics import METRICS
from pytest_gpulayout.report import quantity
from pytest_gpulayout.verdict import MetricVerdict, Status, Verdict


def add_session(
    baseline: Baseline, session: BaselineSession, verdict: Verdict, *, reason: str, until: str = ""
) -> Baseline:
    """Append a session; where it got better or worse, it begins a new level.

    A level must not move by a session that differs from it: its spread would hold the change.

    :param verdict: of the session against the baseline. :param reason: why a change is accepted.
    :param until: last day of a waiver, ISO 8601 date; ``""`` for good.
    """
    changes = tuple(change_text(metric) for metric in verdict.metrics if is_change(metric))
    begins = LevelStart(reason, changes, until) if changes else None
    return replace(baseline, sessions=(*baseline.sessions, replace(session, begins=begins)))


def is_change(metric: MetricVerdict) -> bool:
    """Whether it is better or worse than what is stored, as opposed to equal or undecided."""
    return metric.status in (Status.REGRESSION, Status.IMPROVEMENT)


def change_text(metric: MetricVerdict) -> str:
    """``median_tpot_ms 9.80 ms -> 11.9 ms (+21.4%, worse)``."""
    unit = METRICS[metric.name].unit
    word = "worse" if metric.status is Status.REGRESSION else "better"
    return (
        f"{metric.name} {quantity(metric.baseline, unit)} -> {quantity(metric.current, unit)} "
        f"({metric.change:+.1%}, {word})"
    )
