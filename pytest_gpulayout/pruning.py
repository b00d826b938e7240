"""Which stored sessions can go without any verdict's mean moving.

A mean is taken over the newest :data:`~pytest_gpulayout.baseline.NEWEST` sessions of one epoch of the level in force,
or of the level before it once a waiver is over. Everything else tells of the spread alone, and is the first to go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pytest_gpulayout.baseline import NEWEST, Baseline, BaselineSession
from pytest_gpulayout.report import plural
from pytest_gpulayout.standing import stand
from pytest_gpulayout.tolerance import Tolerance

Level = Sequence[BaselineSession]


@dataclass(frozen=True, slots=True)
class Pruned:
    """What is left of a baseline, and what went. :param removed: a line for each thing."""

    baseline: Baseline
    removed: tuple[str, ...]


def prune(
    baseline: Baseline, tolerances: Mapping[str, Tolerance], *, today: str, keep: int, expired: bool = False
) -> Pruned:
    """Remove what gives no mean.

    Older sessions than the newest ``keep`` of each epoch of a level; but never one of the newest 20 of a group that
    gives a mean. Levels before those that give a mean, once the level in force tells its spread on its own.

    :param tolerances: the gated metrics. :param today: ISO 8601 date. :param expired: waivers that are over go, too.
    """
    removed: list[str] = []
    levels: list[Level] = list(baseline.levels())
    if expired:
        levels = list(_without_expired(levels, today, removed))
    first = _first_with_mean(levels)
    if first and _is_settled_alone(baseline, levels[first:], tolerances, today):
        removed += [_told("of a level that others followed", level) for level in levels[:first]]
        levels, first = levels[first:], 0
    kept: list[BaselineSession] = []
    for number, level in enumerate(levels):
        rest = _newest_of_each_epoch(level, max(keep, NEWEST) if number >= first else keep)
        if len(rest) < len(level):
            gone = [session for session in level if not _holds(rest, session)]
            removed.append(_told("older than the newest of their level and epoch", gone))
        kept += _begun_as(level, rest)
    return Pruned(replace(baseline, sessions=tuple(kept)), tuple(removed))


def _without_expired(levels: Sequence[Level], today: str, removed: list[str]) -> Iterator[Level]:
    for number, level in enumerate(levels):
        start = level[0].begins
        if number and start is not None and start.is_over(today):
            removed.append(_told(f"of a waiver that ended on {start.until} ({start.reason})", level))
        else:
            yield level


def _first_with_mean(levels: Sequence[Level]) -> int:
    """Position of the oldest level that gives a mean, now or when waivers end."""
    first = len(levels) - 1
    while first and (start := levels[first][0].begins) is not None and start.until:
        first -= 1
    return first


def _is_settled_alone(
    baseline: Baseline, levels: Sequence[Level], tolerances: Mapping[str, Tolerance], today: str
) -> bool:
    alone = replace(baseline, sessions=tuple(session for level in levels for session in level))
    return stand(alone, tolerances, today=today, starts=1).is_settled


def _newest_of_each_epoch(level: Level, keep: int) -> list[BaselineSession]:
    """In the order of the file, as the mean is taken."""
    rest: list[BaselineSession] = []
    for position, session in enumerate(level):
        newer = sum(other.epoch == session.epoch for other in level[position + 1 :])
        if newer < keep:
            rest.append(session)
    return rest


def _begun_as(level: Level, rest: Sequence[BaselineSession]) -> Iterator[BaselineSession]:
    """The rest of a level, beginning as the whole level did: else it would join the one before."""
    for number, session in enumerate(rest):
        yield replace(session, begins=level[0].begins if number == 0 else None)


def _holds(sessions: Sequence[BaselineSession], wanted: BaselineSession) -> bool:
    return any(session is wanted for session in sessions)


def _told(which: str, sessions: Sequence[BaselineSession]) -> str:
    dates = sorted({session.recorded[:10] for session in sessions})
    span = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{plural(len(sessions), 'session')} {which}: {span}"
