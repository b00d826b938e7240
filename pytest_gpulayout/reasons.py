"""The sentences beside a verdict in stored mode: what it rests on, why it is open, and what it would take.

Knows verdicts, stored sessions and the options that a user may type. Leaves the numbers to
:mod:`~pytest_gpulayout.verdict` and lines and tables to :mod:`~pytest_gpulayout.report`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pytest_gpulayout.baseline import BaselineSession, Reference
from pytest_gpulayout.metrics import METRICS
from pytest_gpulayout.report import plural
from pytest_gpulayout.tolerance import percent_text
from pytest_gpulayout.verdict import MOST_STARTS, MetricVerdict, Requirement, Status, overall_status

_MORE_SESSIONS = "more stored sessions narrow it (gpulayout baseline approve RESULTS.json)"

FEW_SESSIONS = 5
"""A verdict on fewer stored sessions is provisional, wherever its spread comes from."""


def why_again(metrics: Sequence[MetricVerdict], number: int, most: int) -> str:
    """``start 1 of at most 3 does not decide median_tpot_ms (+2.1%, between -3.0% and +7.4%): one more``.

    At the last one: ``start 3 of at most 3 shows a regression of ...: one more to confirm it``.
    """
    start = f"start {number} of at most {most}"
    if overall_status(metrics) is Status.REGRESSION:
        return f"{start} shows a regression of {_told(metrics, Status.REGRESSION)}: one more to confirm it"
    return f"{start} does not decide {_told(metrics, Status.INCONCLUSIVE) or 'all metrics'}: one more"


def _told(metrics: Sequence[MetricVerdict], status: Status) -> str:
    return ", ".join(
        f"{m.name} ({m.change:+.1%}, between {m.ci[0]:+.1%} and {m.ci[1]:+.1%})"
        for m in metrics
        if m.status is status
    )


def why_replaced(start: str, problems: str) -> str:
    """``server start 2 was disturbed, and is measured anew (unstable: ...)``. :param start: in words."""
    return f"{start} was disturbed, and is measured anew ({problems})"


def replaced_texts(replaced: Iterable[str], whose: str = "") -> list[str]:
    """What became of starts that were disturbed. :param replaced: the problems of each. :param whose: in words."""
    return [f"a server start {whose}was disturbed, and measured anew ({problems})" for problems in replaced]


def waiver_text(reference: Reference) -> str:
    """That a waiver is in force, or over; ``""`` where the level is no waiver's."""
    accepted = reference.accepted
    if accepted is None or not accepted.until:
        return ""
    if reference.is_expired:
        return f"a waiver ended on {accepted.until} ({accepted.reason}): judged against the level before it"
    return f"a waiver until {accepted.until} is in force: {accepted.reason}"


def left_out_text(sessions: Sequence[BaselineSession], sizes: Iterable[float]) -> str:
    """That stored sessions are of another sample size, and are not compared with; ``""`` for none."""
    if not sessions:
        return ""
    found = ", ".join(f"{size:g}" for size in sorted({run.batch_size for one in sessions for run in one.runs}))
    now = ", ".join(f"{size:g}" for size in sorted(sizes))
    return f"{plural(len(sessions), 'stored session')} left out: {found} requests in a batch there, {now} now"


def why_provisional(
    reference: Reference, epoch: Mapping[str, Any], metrics: Sequence[MetricVerdict], sources: Sequence[str]
) -> str:
    """Why a verdict rests on less than it should, ``""`` where it does not.

    :param epoch: of the measurement. :param sources: where what is assumed of each metric's noise comes from.
    """
    count = len(reference.sessions)
    told = []
    if unsettled := dict.fromkeys(s for s, m in zip(sources, metrics, strict=True) if not m.is_settled):
        told.append(f"{plural(count, 'stored session')}; the spread rests partly on {', '.join(unsettled)}")
    elif count < FEW_SESSIONS:
        told.append(f"{plural(count, 'stored session')} of this level and epoch")
    if reference.newest.epoch != epoch:
        told.append(f"none of this epoch is stored, compared with {reference.newest.recorded[:10]}")
    return "; ".join(told)


def stopped_early(metrics: Sequence[MetricVerdict]) -> list[str]:
    """That metrics are left undecided because another one got worse, which no further start would change."""
    open_ones = [metric.name for metric in metrics if metric.status is Status.INCONCLUSIVE]
    return [f"not decided, since a regression ends the gate: {', '.join(open_ones)}"] if open_ones else []


def why_open(metrics: Sequence[MetricVerdict], starts: int, *, restarts: bool = True) -> list[str]:
    """For each metric that is not decided, what was seen and what it would take.

    :param starts: allowed per gate. :param restarts: whether more could be allowed.
    """
    if overall_status(metrics) is Status.REGRESSION:
        return stopped_early(metrics)
    return [
        f"{metric.name}: changed by {metric.change:+.1%}, interval {metric.ci[0]:+.1%} to {metric.ci[1]:+.1%}; "
        f"{_unknown(metric)} with "
        f"{plural(metric.n_current, 'start')} now and {plural(metric.n_sessions, 'stored session')}: "
        f"{what_it_takes(metric, starts, restarts=restarts)}"
        for metric in metrics
        if metric.status is Status.INCONCLUSIVE
    ]


def _unknown(metric: MetricVerdict) -> str:
    """What keeps a metric from a pass: the interval holds a change that matters, or such a change could go unseen."""
    if _worst(metric) < metric.tolerance < metric.min_detectable:
        return f"changes below {percent_text(_rounded_up(metric.min_detectable))} could go unseen"
    return f"a change of {percent_text(metric.tolerance)} cannot be ruled out"


def what_it_takes(metric: MetricVerdict, starts: int, *, restarts: bool = True) -> str:
    """What to do for a verdict on a metric that has none.

    :param starts: that the gate may make now. :param restarts: whether it could be allowed more.
    """
    accept = f"accept a larger tolerance (--gpu-tolerance={metric.name}={percent_text(_enough(metric))})"
    needed = metric.requirement
    if metric.ordinary_starts:
        starts_now = plural(metric.n_current + metric.n_confirming, "start")
        return (
            f"{metric.ordinary_starts} of {starts_now} did not change, so a few slow ones may be all of it; "
            f"{_narrow(starts)}, or {accept}"
        )
    if metric.n_current < starts:
        return f"the budget ended before {plural(starts, 'start')}; allow more seconds (--gpu-budget), or {accept}"
    if needed is None:
        return accept
    if not restarts:
        return f"{_without_restarts(needed)}, or {accept}"
    if needed.starts is not None and needed.starts > starts:
        return f"allow more starts (--gpu-starts={needed.starts}), or {accept}"
    if needed.starts is not None:
        return f"it lies near the limit; {_narrow(starts)}, or {accept}"
    if needed.sessions is not None:
        return (
            f"store {needed.sessions} sessions (--gpu-baseline=update, or gpulayout baseline approve RESULTS.json) "
            f"and allow {MOST_STARTS} starts, or {accept}"
        )
    return (
        f"this machine's noise hides changes below {percent_text(_rounded_up(needed.smallest))} whatever is "
        f"measured: {accept}, or compare in pairs (--gpu-base)"
    )


def _without_restarts(needed: Requirement) -> str:
    """Of a server that is not started anew: what is stored is measured on its later starts, by whoever makes them."""
    if needed.starts is not None:
        return f"it lies near the limit; {_MORE_SESSIONS}"
    if needed.sessions is not None:
        return f"store {needed.sessions} sessions, each of another start of the server (--gpu-baseline=update)"
    smallest = percent_text(_rounded_up(needed.smallest))
    return f"one start of a server hides changes below {smallest} here, whatever is stored"


def _narrow(starts: int) -> str:
    if starts < MOST_STARTS:
        return f"more starts narrow it (--gpu-starts={min(starts + 2, MOST_STARTS)})"
    return _MORE_SESSIONS


def _enough(metric: MetricVerdict) -> float:
    """The smallest tolerance, in steps of 0.1 %, with which these numbers would have passed."""
    return _rounded_up(max(metric.min_detectable, _worst(metric)))


def _worst(metric: MetricVerdict) -> float:
    """The end of the interval where it is worst, as a fraction of the stored value."""
    return metric.ci[1] if METRICS[metric.name].better == "lower" else -metric.ci[0]


def _rounded_up(fraction: float) -> float:
    return math.ceil(fraction * 1000) / 1000
