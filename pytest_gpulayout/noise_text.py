"""A study of the noise in words, and as a document: what the machine can see, and how often it is wrong.

Knows no formula; those are in :mod:`~pytest_gpulayout.noise_study`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from pytest_gpulayout.bimodality import Mode
from pytest_gpulayout.noise_study import (
    CONFIDENCE,
    PLANNED_SESSIONS,
    STORED,
    Component,
    MetricNoise,
    NoiseStudy,
    SameAgainstSame,
)
from pytest_gpulayout.report import aligned, plural
from pytest_gpulayout.tolerance import percent_text
from pytest_gpulayout.verdict import FALSE_ALARM, MOST_STARTS, Status


def study_lines(study: NoiseStudy) -> list[str]:
    """Return the study for people: what matters to them first, then where it comes from."""
    lines = [headline(study), f"from {_sessions_text(study)}"]
    if not all(metric.is_settled for metric in study.metrics):
        lines.append(f"these are too few to tell the spread by themselves: it rests partly on {study.prior.source}")
    lines += [*_same_lines(study.same), "", *_component_lines(study.metrics)]
    lines += [_modes_line(metric) for metric in study.metrics if metric.modes]
    return [*lines, "", *_table_lines(study.metrics)]


def headline(study: NoiseStudy) -> str:
    """``with 3 starts per gate and 8 stored sessions this machine sees changes of 7.9% (median_tpot_ms); ...``."""
    starts = study.gate_starts
    seen = ", ".join(f"{metric.sees(starts):.1%} ({metric.tolerance.metric})" for metric in study.metrics)
    return (
        f"with {plural(starts, 'start')} per gate and {PLANNED_SESSIONS} stored sessions this machine sees changes "
        f"of {seen}; {_needs(study)}"
    )


def _needs(study: NoiseStudy) -> str:
    if needed := _starts_for_all(study.metrics, PLANNED_SESSIONS):
        return f"your margins need {plural(needed, 'start')} (--gpu-starts={needed})"
    blind = [metric for metric in study.metrics if metric.needed_starts() is None]
    margins = ", ".join(f"{percent_text(metric.tolerance.fraction)} of {metric.tolerance.metric}" for metric in blind)
    accepted = ",".join(f"{metric.tolerance.metric}={_up(metric.sees(study.gate_starts))}" for metric in blind)
    more = ""
    if needed := _starts_for_all(study.metrics, STORED[-1]):
        more = f"store {STORED[-1]} sessions of {plural(needed, 'start')} (--gpu-starts={needed}), "
    return (
        f"up to {MOST_STARTS} starts are not enough for {margins}: {more}accept larger tolerances "
        f"(--gpu-tolerance={accepted}), or compare in pairs (--gpu-base)"
    )


def _starts_for_all(metrics: Sequence[MetricNoise], sessions: int) -> int | None:
    """Starts with which each tolerance can be seen, ``None`` where that takes more than there may be."""
    needed = [metric.needed_starts(sessions) for metric in metrics]
    known = [starts for starts in needed if starts is not None]
    return max(known) if len(known) == len(needed) else None


def _up(fraction: float) -> str:
    """A tolerance that is not below the fraction: ``0.1691`` -> ``17%``."""
    return f"{math.ceil(100 * fraction)}%"


def _sessions_text(study: NoiseStudy) -> str:
    each = sorted(set(study.starts))
    starts = plural(each[0], "start") if len(each) == 1 else f"{each[0]} to {each[-1]} starts"
    return f"{plural(len(study.starts), 'session')} of {starts}, nothing changed between them"


def _same_lines(same: SameAgainstSame | None) -> Iterator[str]:
    if same is None:
        yield "false alarms: unknown, since there is no second session to compare with"
        return
    low, high = same.interval
    machine_low, machine_high = same.machine_interval
    yield (
        f"false alarms: {same.false_alarms:.1%} of {same.resamples} gates on draws from these starts "
        f"(95 % interval {low:.1%} to {high:.1%}); each real session counted once: {machine_low:.1%} to "
        f"{machine_high:.1%}"
    )
    yield (
        f"  each of up to {plural(same.starts, 'start')} against {plural(same.stored, 'session')}: "
        f"pass {same.share(Status.PASS):.1%}, improvement {same.share(Status.IMPROVEMENT):.1%}, "
        f"inconclusive {same.share(Status.INCONCLUSIVE):.1%}; {same.used:.1f} starts on average"
    )
    if same.is_too_high:
        yield (
            f"  more than the {FALSE_ALARM:.0%} that the gate allows itself: sessions of this machine differ more "
            "than their starts tell; store more of them, or compare in pairs (--gpu-base)"
        )


def _component_lines(metrics: Sequence[MetricNoise]) -> Iterator[str]:
    names = list(dict.fromkeys(component.name for metric in metrics for component in metric.components))
    yield f"relative standard deviation between ({CONFIDENCE:.0%} interval)"
    rows = [
        (metric.tolerance.metric, *(_component_text(metric.components, name) for name in names)) for metric in metrics
    ]
    yield from aligned([("metric", *names), *rows])


def _component_text(components: Sequence[Component], name: str) -> str:
    found = [f"{c.sd:.1%} ({c.low:.1%} to {c.high:.1%})" for c in components if c.name == name]
    return found[0] if found else "unknown"


def _modes_line(metric: MetricNoise) -> str:
    lower, upper = metric.modes
    return (
        f"{metric.tolerance.metric} has two levels, {_apart(metric.modes):.1%} apart, {lower.share:.0%} and "
        f"{upper.share:.0%} of the starts on them: find what the starts choose (autotuning, clocks) before judging it"
    )


def _apart(modes: Sequence[Mode]) -> float:
    return math.expm1(modes[-1].center - modes[0].center)


def _table_lines(metrics: Sequence[MetricNoise]) -> Iterator[str]:
    yield "smallest change that 80 of 100 gates find, by starts (of the gate and of each stored session)"
    header = ("metric", "stored sessions", *map(str, range(1, MOST_STARTS + 1)))
    rows = [
        (metric.tolerance.metric, str(stored), *(f"{fraction:.1%}" for fraction in fractions))
        for metric in metrics
        for stored, fractions in metric.detectable.items()
    ]
    yield from aligned([header, *rows])


def study_document(study: NoiseStudy) -> dict[str, Any]:
    """Return the study for programs; all spreads and changes are fractions."""
    return {
        "starts_of_sessions": list(study.starts),
        "gate_starts": study.gate_starts,
        "planned_sessions": PLANNED_SESSIONS,
        "prior": asdict(study.prior),
        "metrics": {metric.tolerance.metric: _metric_document(metric, study.gate_starts) for metric in study.metrics},
        "same_against_same": None if study.same is None else _same_document(study.same),
    }


def _metric_document(metric: MetricNoise, gate_starts: int) -> dict[str, Any]:
    return {
        "tolerance": metric.tolerance.fraction,
        "smallest_detectable": metric.sees(gate_starts),
        "needed_starts": metric.needed_starts(),
        "is_settled": metric.is_settled,
        "sd": {component.name: _component_document(component) for component in metric.components},
        "bimodal": [{"share": mode.share, "center": math.exp(mode.center)} for mode in metric.modes],
        "detectable_by_stored_sessions": {str(stored): list(row) for stored, row in metric.detectable.items()},
    }


def _component_document(component: Component) -> dict[str, float]:
    return {"sd": component.sd, "low": component.low, "high": component.high, "df": component.df}


def _same_document(same: SameAgainstSame) -> dict[str, Any]:
    return {
        "resamples": same.resamples,
        "sessions": same.sessions,
        "stored_sessions": same.stored,
        "starts": same.starts,
        "mean_starts": same.used,
        "false_alarms": same.false_alarms,
        "interval": list(same.interval),
        "machine_interval": list(same.machine_interval),
        "verdicts": {str(status): count for status, count in sorted(same.verdicts.items())},
    }
