"""Takes saved results into stored baselines: what gets better, worse or new by them, and what must be refused.

First everything is planned, without writing; a plan with one refusal is written nowhere. Sessions of one key are
planned oldest first, each against what the ones before it leave. Asking people, and files, is left to the command.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from pytest_gpulayout.approval import add_session, change_text, is_change
from pytest_gpulayout.baseline import Baseline, BaselineSession
from pytest_gpulayout.baseline_text import baseline_from_text, baseline_to_text
from pytest_gpulayout.errors import BaselineError
from pytest_gpulayout.gated import documented_prior, gated_of, is_of_links
from pytest_gpulayout.judging import GatePolicy, judge_once, unjudgeable
from pytest_gpulayout.ports import BaselineStore
from pytest_gpulayout.results import RecordedMeasurement
from pytest_gpulayout.siblings import sibling_priors
from pytest_gpulayout.tolerance import Tolerance
from pytest_gpulayout.verdict import Look, Status, Verdict, changed_fields


class Category(StrEnum):
    """What a session is to the baseline that it is added to."""

    NEW = "new"
    WORSE = "worse"
    BETTER = "better"
    UNDECIDED = "undecided"
    EQUAL = "equal"


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms sessions are taken.

    :param today: ISO 8601 date. :param reason: why a change is accepted. :param until: last day of a waiver.
    """

    tolerances: Mapping[str, Tolerance]
    today: str
    allow_worse: bool = False
    reason: str = ""
    until: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A measurement that is to become a session. :param source: the results file that it is in."""

    source: str
    measurement: RecordedMeasurement

    @property
    def path(self) -> str:
        """Where its baseline lies."""
        return self.measurement.identity.key.path


@dataclass(frozen=True, slots=True)
class Step:
    """What taking one session means.

    :param category: ``None`` where it was not judged, because it is refused.
    :param changes: what got better or worse, as the file keeps it. :param changed: fields of the epoch and of the
        software that differ from what it was compared with. :param refusals: why it must not be taken.
    """

    candidate: Candidate
    category: Category | None
    changes: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of one baseline.

    :param before: the text that the plan was made for. :param after: the new text; ``None`` where it is refused.
    """

    path: str
    before: str | None
    after: str | None
    steps: tuple[Step, ...]


def newest_of_each_key(
    source: str, measurements: Sequence[RecordedMeasurement]
) -> tuple[list[Candidate], list[Candidate]]:
    """Choose the last measurement of each key in a results file, as ``gpulayout compare`` does.

    Several of one key in one file are of one measuring session: they share its luck and must not count twice.

    :returns: those to take, and those that are left out. What is unsound is never left out.
    """
    taken: list[Candidate] = []
    left_out: list[Candidate] = []
    for position, item in enumerate(measurements):
        has_later = any(later.identity.key == item.identity.key for later in measurements[position + 1 :])
        (left_out if has_later and not item.problems else taken).append(Candidate(source, item))
    return taken, left_out


def plan_approval(store: BaselineStore, candidates: Iterable[Candidate], terms: Terms) -> tuple[Plan, ...]:
    """Plan what becomes of each baseline, in order of their paths.

    :raises BaselineError: one that is stored cannot be read.
    """
    by_path: dict[str, list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda item: (item.path, item.measurement.created)):
        by_path.setdefault(candidate.path, []).append(candidate)
    return tuple(plan_path(store, path, store.read(path), group, terms) for path, group in by_path.items())


def plan_path(
    store: BaselineStore, path: str, text: str | None, candidates: Sequence[Candidate], terms: Terms
) -> Plan:
    """Plan what becomes of one baseline. :param text: what is stored there now. :param candidates: oldest first."""
    baseline = None if text is None else baseline_from_text(text, path)
    steps = []
    for candidate in candidates:
        step, baseline = _take(store, baseline, candidate, terms)
        steps.append(step)
    refused = any(step.refusals for step in steps)
    after = None if refused or baseline is None else baseline_to_text(baseline)
    return Plan(path, text, after, tuple(steps))


def approve(store: BaselineStore, plan: Plan, terms: Terms) -> None:
    """Write what was planned; where another writer was faster, plan anew for what is there now.

    :raises BaselineError: what is there now refuses these sessions; nothing of this baseline is written.
    """

    def change(text: str | None) -> str | None:
        current = plan
        if text != plan.before:
            current = plan_path(store, plan.path, text, [step.candidate for step in plan.steps], terms)
        if current.after is None:
            told = "; ".join(refusal for step in current.steps for refusal in step.refusals)
            raise BaselineError(
                f"the baseline that was looked at was required, and another writer has changed it: {told}\n"
                f"  in {plan.path}, which is as that writer left it\n  look at it and approve again",
                path=plan.path,
            )
        return current.after

    store.update(plan.path, change)


def _take(
    store: BaselineStore, baseline: Baseline | None, candidate: Candidate, terms: Terms
) -> tuple[Step, Baseline | None]:
    measurement = candidate.measurement
    refusals = _unsound(measurement, gated_of(measurement.identity.key, terms.tolerances))
    session = measurement.as_session()
    if baseline is not None and not refusals:
        refusals = measurement.identity.key.differences(baseline.key) or _clashes(baseline, session)
    if refusals:
        return Step(candidate, None, refusals=refusals), baseline
    if baseline is None:
        return Step(candidate, Category.NEW), Baseline(measurement.identity.key, (session,))
    verdict = _judge(store, baseline, measurement, terms)
    category = _category(verdict)
    reference = baseline.reference(session.epoch, today=terms.today).newest
    changed = (*changed_fields(reference.epoch, session.epoch), *changed_fields(reference.sut, session.sut))
    changes = tuple(change_text(metric) for metric in verdict.metrics if is_change(metric))
    if category is Category.WORSE and not terms.allow_worse:
        refusals = ("it makes the baseline worse",)
    step = Step(candidate, category, changes, changed, refusals)
    if refusals:
        return step, baseline
    reason = terms.reason or "gpulayout baseline approve"
    baseline = replace(baseline, key=baseline.key.completed_by(measurement.identity.key))
    return step, add_session(baseline, session, verdict, reason=reason, until=terms.until, today=terms.today)


def _unsound(measurement: RecordedMeasurement, tolerances: Mapping[str, Tolerance]) -> tuple[str, ...]:
    """Why a measurement must not be stored, whatever is there already."""
    found = list(measurement.problems or unjudgeable(measurement, tolerances))
    if measurement.recorded_topology:
        found.append(
            f"the topology was read from {measurement.recorded_topology} and not probed: nobody knows what it ran on"
        )
    return tuple(found)


def _clashes(baseline: Baseline, session: BaselineSession) -> tuple[str, ...]:
    """Why a sound session must not join these."""
    numbers = tuple(run.metrics for run in session.runs)
    for stored in baseline.sessions:
        if tuple(run.metrics for run in stored.runs) == numbers:
            return (f"the same numbers are stored already, as the session of {stored.recorded}",)
    before, now = baseline.sessions[-1].runs[0].batch_size, session.runs[0].batch_size
    if before != now:
        what = "all-reduces" if is_of_links(baseline.key) else "requests"
        return (f"a batch has {now:g} {what}, where those of the newest stored session have {before:g}",)
    return ()


def _judge(store: BaselineStore, baseline: Baseline, measurement: RecordedMeasurement, terms: Terms) -> Verdict:
    """Judge all starts as one look, with the spread that a gate would assume."""
    prior, tolerances = documented_prior(baseline.key), gated_of(baseline.key, terms.tolerances)
    policy = GatePolicy(mode="check", tolerances=tolerances, prior=prior, starts=len(measurement.runs))
    priors = sibling_priors(store, baseline.key, prior)
    return judge_once(measurement, baseline, policy, Look(1, 1), priors=priors, today=terms.today)


def _category(verdict: Verdict) -> Category:
    found = {metric.status for metric in verdict.metrics}
    if Status.REGRESSION in found:
        return Category.WORSE
    if Status.IMPROVEMENT in found:
        return Category.BETTER
    return Category.EQUAL if verdict.status is Status.PASS else Category.UNDECIDED
