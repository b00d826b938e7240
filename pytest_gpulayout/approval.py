"""Adding a session to a baseline: as one more of its level, or as the first of a new one."""

from __future__ import annotations

from dataclasses import replace

from pytest_gpulayout.baseline import Baseline, BaselineSession, LevelStart
from pytest_gpulayout.metrics import METRICS
from pytest_gpulayout.report import quantity
from pytest_gpulayout.verdict import MetricVerdict, Status, Verdict

_WORSE, _BETTER = "worse", "better"


def add_session(
    baseline: Baseline, session: BaselineSession, verdict: Verdict, *, reason: str, until: str = "", today: str = ""
) -> Baseline:
    """Add a session; where it got better or worse, it begins a new level.

    A level must not move by a session that differs from it: its spread would hold the change. A session that differs
    from nothing joins the level that it was compared with: the newest, or the one before a waiver that is over.

    :param verdict: of the session against the baseline. :param reason: why a change is accepted.
    :param until: last day of a waiver, ISO 8601 date; ``""`` for good. What only got better needs no waiver.
    :param today: ISO 8601 date of the verdict; ``""`` for the day of the session.
    """
    changes = tuple(change_text(metric) for metric in verdict.metrics if is_change(metric))
    if changes:
        worse = any(metric.status is Status.REGRESSION for metric in verdict.metrics)
        begins = LevelStart(reason, changes, until if worse else "")
        return replace(baseline, sessions=(*baseline.sessions, replace(session, begins=begins)))
    place = _end_of_level(baseline, session, today or session.recorded[:10])
    before, after = baseline.sessions[:place], baseline.sessions[place:]
    return replace(baseline, sessions=(*before, replace(session, begins=None), *after))


def _end_of_level(baseline: Baseline, session: BaselineSession, today: str) -> int:
    """Position behind the level that the session was compared with."""
    newest = baseline.reference(session.epoch, today=today).newest
    position = 0
    for level in baseline.levels():
        position += len(level)
        if any(member is newest for member in level):
            return position
    return len(baseline.sessions)


def is_change(metric: MetricVerdict) -> bool:
    """Whether it is better or worse than what is stored, as opposed to equal or undecided."""
    return metric.status in (Status.REGRESSION, Status.IMPROVEMENT)


def change_text(metric: MetricVerdict) -> str:
    """``median_tpot_ms 9.80 ms -> 11.9 ms (+21.4%, worse)``."""
    unit = METRICS[metric.name].unit
    word = _WORSE if metric.status is Status.REGRESSION else _BETTER
    return (
        f"{metric.name} {quantity(metric.baseline, unit)} -> {quantity(metric.current, unit)} "
        f"({metric.change:+.1%}, {word})"
    )


def got_better(start: LevelStart, metric: str) -> bool:
    """Whether a level began because a metric got better, by what :func:`change_text` kept of it."""
    return any(text.startswith(f"{metric} ") and text.endswith(f", {_BETTER})") for text in start.changes)


def got_worse(start: LevelStart) -> bool:
    """Whether a level began with something that got worse."""
    return any(text.endswith(f", {_WORSE})") for text in start.changes)
