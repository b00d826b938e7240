"""Judges numbers that are read back, without pytest: ``gpulayout compare``.

Knows what belongs together: what has the same key, and where a file has none, the same load as far as both tell it.
Leaves reading to :mod:`~pytest_gpulayout.compared_files` and the rule to :mod:`~pytest_gpulayout.judging`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pytest_gpulayout.baseline import Baseline, BaselineSession
from pytest_gpulayout.compared_files import Load, Recorded
from pytest_gpulayout.gated import documented_prior, gated_of
from pytest_gpulayout.judging import GatePolicy, judge_once
from pytest_gpulayout.measurement import Identity
from pytest_gpulayout.report import plural
from pytest_gpulayout.results import RecordedMeasurement
from pytest_gpulayout.tolerance import Tolerance
from pytest_gpulayout.verdict import Look, Status, Verdict

SAME_TOKENS = 0.01
"""Tokens per request, in the mean, that differ by less are of one load: what is drawn differs from seed to seed."""

_SEVERITY = (
    Status.REGRESSION,
    Status.INVALID,
    Status.NO_BASELINE,
    Status.INCONCLUSIVE,
    Status.IMPROVEMENT,
    Status.PASS,
)
_TELLING = ("num_prompts", "request_rate", "burstiness", "max_concurrency")
_UNKNOWN_TO_BENCH = ("layout", "GPUs", "driver", "vLLM", "revision", "dtype")


@dataclass(frozen=True, slots=True)
class Compared:
    """One thing that was measured, and how it stands against the baseline. :param title: for people."""

    title: str
    verdict: Verdict


def compare_recorded(
    measured: Sequence[Recorded], stored: Sequence[Recorded], tolerances: Mapping[str, Tolerance], *, today: str
) -> tuple[Compared, ...]:
    """Judge what was measured against what is stored, each key by itself.

    Of several measurements of one key the last is judged. Each key that is stored must have been measured, and each
    that was measured be stored; of a baseline document, which holds a single key, only the first holds.

    :param today: ISO 8601 date, for waivers. :returns: at least one.
    """
    chosen = _last_of_each(stored)
    compared = [_compare_one(measured, one, tolerances, today) for one in chosen]
    if stored[0].kind == "baseline":
        return tuple(compared)
    left = [one for one in _last_of_each(measured) if all(_differences(one, known) for known in chosen)]
    if len(measured) == len(chosen) == len(left) == 1:
        return tuple(compared)  # one of each, and not of the same: the verdict on the first says how they differ
    return (*compared, *(_not_stored(one, chosen) for one in left))


def overall(compared: Sequence[Compared]) -> Status:
    """The verdict on all of them: the worst one."""
    return min((one.verdict.status for one in compared), key=_SEVERITY.index)


def _last_of_each(side: Sequence[Recorded]) -> list[Recorded]:
    """The last of those that belong together, in the order of the first."""
    found: list[Recorded] = []
    for one in side:
        same = next((n for n, known in enumerate(found) if not _differences(one, known)), None)
        if same is None:
            found.append(one)
        else:
            told = f"{one.place} holds several measurements of {one.title}: the last one counts"
            found[same] = replace(one, notes=(*one.notes, told))
    return found


def _compare_one(
    measured: Sequence[Recorded], stored: Recorded, tolerances: Mapping[str, Tolerance], today: str
) -> Compared:
    same = [one for one in measured if not _differences(one, stored)]
    if not same:
        nearest = min(measured, key=lambda one: len(_differences(one, stored)))
        what = "has the baseline's key" if stored.is_identified else "is of the baseline's load"
        differs = (f"no measurement {what}; the nearest differs in", *_differences(nearest, stored))
        reasons = (*nearest.problems, *differs)
        return Compared(stored.title, Verdict(Status.INVALID, reasons=reasons, baseline_path=stored.place))
    now = same[-1]
    verdict = _judge(now, stored, tolerances, today)
    told = (*stored.notes, *now.notes)
    if len(same) > 1:
        told = (*told, f"{len(same)} measurements have this key; the last one was judged: {now.title}")
    return Compared(now.title, replace(verdict, reasons=(*verdict.reasons, *told)))


def _not_stored(one: Recorded, stored: Sequence[Recorded]) -> Compared:
    nearest = min((_differences(one, known) for known in stored), key=len)
    reasons = (f"{one.place} has {one.title}, and the baseline has not; the nearest differs in", *nearest)
    return Compared(one.title, Verdict(Status.NO_BASELINE, reasons=reasons, baseline_path=stored[0].place))


# -- identity ----------------------------------------------------------------------------------------------------


def _differences(now: Recorded, stored: Recorded) -> tuple[str, ...]:
    """Name each field that makes them incomparable, as far as both files tell."""
    if now.is_identified and stored.is_identified:
        return now.baseline.key.differences(stored.baseline.key)
    return tuple(
        f"{name}: stored {_text(stored.load[name])}, now {_text(now.load[name])}"
        for name in stored.load
        if name in now.load and not _is_same(name, stored.load, now.load)
    )


def _is_same(name: str, stored: Load, now: Load) -> bool:
    before, after = stored[name], now[name]
    if name == "model":
        return _model_name(str(before)) == _model_name(str(after))
    if name.endswith("per request") and isinstance(before, float) and isinstance(after, float):
        return math.isclose(before, after, rel_tol=SAME_TOKENS)
    return before == after


def _model_name(text: str) -> str:
    """Of a folder its last component: the same folder has another path on another machine."""
    return text.rstrip("/").rpartition("/")[2] if text.startswith(("/", ".", "~")) else text


def _text(value: str | float) -> str:
    return repr(value) if isinstance(value, str) else f"{value:.6g}"


def _not_proved(now: Recorded, stored: Recorded) -> Iterator[str]:
    """What a file of ``vllm bench serve`` leaves open."""
    if now.is_identified and stored.is_identified:
        return
    both = now.load.keys() & stored.load.keys()
    prompts = () if "workload" in both else ("prompts", *(name for name in _TELLING if name not in both))
    yield (
        f"not proved, since the files do not tell: same {', '.join((*_UNKNOWN_TO_BENCH, *prompts))}; results of "
        "pytest --gpu-results tell them"
    )


# -- judging -----------------------------------------------------------------------------------------------------


def _judge(now: Recorded, stored: Recorded, tolerances: Mapping[str, Tolerance], today: str) -> Verdict:
    place = stored.place
    if stored.kind == "baseline" and any(_is_same_session(now.newest, one) for one in stored.baseline.sessions):
        reason = f"the measurement of {now.place} is one of the baseline's own sessions: it would be judged by itself"
        return Verdict(Status.INVALID, reasons=(reason,), baseline_path=place)
    problems = (
        *now.problems,
        *(f"{problem}, of the baseline" for problem in stored.problems),
        *_without_value(now, tolerances),
        *_without_value(stored, tolerances),
    )
    if problems:
        return Verdict(Status.INVALID, reasons=problems, baseline_path=place)
    if not (now.is_identified and stored.is_identified):
        now, stored = now.by_start(), stored.by_start()
    baseline, measurement = _as_one_identity(now, stored)
    key = (now if now.is_identified else stored).baseline.key
    policy = GatePolicy("check", gated_of(key, tolerances), documented_prior(key), starts=len(measurement.runs))
    verdict = judge_once(measurement, baseline, policy, Look(1, 1), today=today, place=place)
    told = [*verdict.reasons, *_not_proved(now, stored)]
    if now.newest.runs == stored.newest.runs:
        told.append("both files hold the same numbers to the last digit: the same measurement on both sides?")
    if verdict.status is Status.INCONCLUSIVE:
        told.append(_what_helps(now, stored))
    return replace(verdict, reasons=tuple(told))


def _is_same_session(a: BaselineSession, b: BaselineSession) -> bool:
    return (a.recorded, a.runs) == (b.recorded, b.runs)


def _without_value(side: Recorded, tolerances: Mapping[str, Tolerance]) -> Iterator[str]:
    for name, text in side.unfit.items():
        if name in tolerances:
            yield f"unfit-metrics: {name} is {text}, which is no measurement (in {side.place})"


def _what_helps(now: Recorded, stored: Recorded) -> str:
    starts, sessions = len(now.newest.runs), len(stored.baseline.sessions)
    return (
        f"the files hold {plural(starts, 'server start')} now and {plural(sessions, 'session')} as the baseline; "
        "more of either shows smaller changes: measure with pytest --gpu-starts=N --gpu-results=FILE.json, and "
        "gather sessions with gpulayout baseline approve"
    )


def _as_one_identity(now: Recorded, stored: Recorded) -> tuple[Baseline, RecordedMeasurement]:
    """A file that tells nothing of its machine is no other one: what it does not tell is not called a change."""
    baseline, session, key = stored.baseline, now.newest, now.baseline.key
    if not now.is_identified:
        session, key = _facts_of(stored.newest, session), baseline.key
    elif not stored.is_identified:
        baseline = replace(baseline, sessions=tuple(_facts_of(session, one) for one in baseline.sessions))
    identity = Identity(key, session.epoch, session.sut, session.covariates, session.topology)
    return baseline, RecordedMeasurement(now.title, identity, session.runs, ())


def _facts_of(known: BaselineSession, session: BaselineSession) -> BaselineSession:
    return replace(session, epoch=known.epoch, sut=known.sut, covariates=known.covariates, topology=known.topology)
