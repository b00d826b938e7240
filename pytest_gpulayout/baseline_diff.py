"""What changed between two states of stored baselines, for whoever reviews the change.

Knows documents; where each state comes from (a folder, a URL, a revision) is left to others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pytest_gpulayout.baseline import Baseline, BaselineSession, LevelStart, Reference
from pytest_gpulayout.metrics import METRICS
from pytest_gpulayout.report import aligned, plural, quantity
from pytest_gpulayout.verdict import changed_fields, log_sessions, mean_of_means

Happened = Literal["new", "removed", "changed"]


@dataclass(frozen=True, slots=True)
class MetricShift:
    """The mean that a metric is compared with, before and after. :param old: ``None`` where there was none."""

    name: str
    old: float | None
    new: float | None

    @property
    def change(self) -> float | None:
        """new / old - 1."""
        return None if self.old is None or self.new is None else self.new / self.old - 1


@dataclass(frozen=True, slots=True)
class BaselineDiff:
    """What happened to one baseline.

    :param added: sessions by the time of their recording, ``removed`` likewise; ``edited`` have other contents now.
    :param begun: levels that were begun. :param changed: fields of the epoch and the software of the newest session.
    :param key: fields of the key, where the file has another one now.
    """

    path: str
    happened: Happened
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    edited: tuple[str, ...] = ()
    begun: tuple[LevelStart, ...] = ()
    changed: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    metrics: tuple[MetricShift, ...] = ()


def diff_baselines(
    old: Mapping[str, Baseline], new: Mapping[str, Baseline], *, today: str
) -> tuple[BaselineDiff, ...]:
    """Compare two states, in order of the paths; what is equal is left out.

    :param old: by path, ``new`` likewise. :param today: ISO 8601 date, for waivers.
    """
    paths = sorted(path for path in {*old, *new} if old.get(path) != new.get(path))
    return tuple(_diff(path, old.get(path), new.get(path), today) for path in paths)


def _diff(path: str, old: Baseline | None, new: Baseline | None, today: str) -> BaselineDiff:
    before = None if old is None else old.reference(today=today)
    after = None if new is None else new.reference(today=today)
    gone = _not_in(old, new)
    come = _not_in(new, old)
    edited = {session.recorded for session in gone} & {session.recorded for session in come}
    return BaselineDiff(
        path,
        "new" if old is None else "removed" if new is None else "changed",
        added=tuple(session.recorded for session in come if session.recorded not in edited),
        removed=tuple(session.recorded for session in gone if session.recorded not in edited),
        edited=tuple(sorted(edited)),
        begun=tuple(session.begins for session in come if session.begins is not None),
        changed=_changed(before, after),
        key=() if old is None or new is None else new.key.differences(old.key),
        metrics=tuple(_shifts(before, after)),
    )


def _not_in(these: Baseline | None, those: Baseline | None) -> list[BaselineSession]:
    known = () if those is None else those.sessions
    return [] if these is None else [session for session in these.sessions if session not in known]


def _changed(before: Reference | None, after: Reference | None) -> tuple[str, ...]:
    if before is None or after is None:
        return ()
    old, new = before.newest, after.newest
    return (*changed_fields(old.epoch, new.epoch), *changed_fields(old.sut, new.sut))


def _shifts(before: Reference | None, after: Reference | None) -> Iterator[MetricShift]:
    for name in METRICS:
        shift = MetricShift(name, _mean(before, name), _mean(after, name))
        if shift.old is not None or shift.new is not None:
            yield shift


def _mean(reference: Reference | None, metric: str) -> float | None:
    level = () if reference is None else reference.level_samples(metric)
    return math.exp(mean_of_means(log_sessions(level))) if level else None


# -- for readers ---------------------------------------------------------------------------------------------------


def diff_document(diff: BaselineDiff) -> dict[str, Any]:
    """One baseline as JSON."""
    return {
        "path": diff.path,
        "happened": diff.happened,
        "sessions": {"added": list(diff.added), "removed": list(diff.removed), "edited": list(diff.edited)},
        "levels": [
            {"reason": start.reason, "changes": list(start.changes), "until": start.until} for start in diff.begun
        ],
        "key": list(diff.key),
        "changed": list(diff.changed),
        "metrics": [
            {"name": shift.name, "old": shift.old, "new": shift.new, "change": shift.change} for shift in diff.metrics
        ],
    }


def diff_lines(diff: BaselineDiff) -> Iterator[str]:
    """One baseline as text."""
    yield f"{diff.happened}: {diff.path}"
    yield from (f"  {fact}" for fact in _facts(diff))
    rows = [_row(shift) for shift in diff.metrics]
    yield from (f"  {line}" for line in aligned([("metric", "old mean", "new mean", "change"), *rows]))


def _facts(diff: BaselineDiff) -> Iterator[str]:
    for what, sessions in (("added", diff.added), ("removed", diff.removed), ("edited", diff.edited)):
        if sessions:
            yield f"{plural(len(sessions), 'session')} {what}: {', '.join(sessions)}"
    for start in diff.begun:
        waiver = f", a waiver until {start.until}" if start.until else ""
        yield f"level begun{waiver}: {start.reason}"
        yield from (f"  {change}" for change in start.changes)
    yield from (f"key: {difference}" for difference in diff.key)
    yield from (f"changed: {field}" for field in diff.changed)


def _row(shift: MetricShift) -> tuple[str, str, str, str]:
    unit = METRICS[shift.name].unit
    old, new = ("-" if value is None else quantity(value, unit) for value in (shift.old, shift.new))
    change = "-" if shift.change is None else _change_text(shift.name, shift.change)
    return shift.name, old, new, change


def _change_text(metric: str, change: float) -> str:
    if round(change, 4) == 0:
        return "+0.0%"
    worse = (change < 0) == METRICS[metric].higher_is_better
    return f"{change:+.1%} {'worse' if worse else 'better'}"


def diff_markdown(diffs: Sequence[BaselineDiff]) -> Iterator[str]:
    """All baselines as Markdown, for a comment on a pull request."""
    if not diffs:
        yield "No stored baseline changed."
    for diff in diffs:
        yield f"**{diff.happened}** `{diff.path}`"
        yield ""
        facts = [f"- {_plain(fact.strip())}" for fact in _facts(diff)]
        yield from [*facts, ""] if facts else []
        yield "| metric | old mean | new mean | change |"
        yield "|---|---:|---:|---:|"
        yield from (f"| {' | '.join(_row(shift))} |" for shift in diff.metrics)
        yield ""


def _plain(text: str) -> str:
    """Text of other people, with what Markdown would take for markup made harmless."""
    for character in "\\`*_[]<>|#":
        text = text.replace(character, f"\\{character}")
    return text
