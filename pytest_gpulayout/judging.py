"""The use case of a performance gate in stored mode: judge a measurement against what is stored, and store.

Through ports, and with time as an argument. Returns values; turning them into pytest outcomes is the plugin's work.
Paired mode, without stored numbers, is in :mod:`~pytest_gpulayout.pairing`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

from pytest_gpulayout.approval import add_session, change_text, is_change
from pytest_gpulayout.attribution import explain
from pytest_gpulayout.baseline import Baseline, BaselineKey, BaselineSession, Reference
from pytest_gpulayout.baseline_text import baseline_from_text, baseline_to_text
from pytest_gpulayout.drift import describe_drift
from pytest_gpulayout.errors import BaselineError, BaselineForeign, BaselineNotFound, DevicesBusy
from pytest_gpulayout.measurement import Identity, Judgeable, Repeatable
from pytest_gpulayout.metrics import METRICS
from pytest_gpulayout.ports import BaselineStore
from pytest_gpulayout.reasons import (
    left_out_text,
    replaced_texts,
    waiver_text,
    why_again,
    why_open,
    why_provisional,
    why_replaced,
)
from pytest_gpulayout.report import plural
from pytest_gpulayout.siblings import nearest_key, same_but_links, sibling_priors
from pytest_gpulayout.stats import SETTLED_DF, NoisePrior, median
from pytest_gpulayout.tolerance import Tolerance
from pytest_gpulayout.verdict import (
    AdvisoryChange,
    Look,
    MetricHistory,
    MetricVerdict,
    Samples,
    Status,
    Verdict,
    changed_fields,
    judge_metrics,
    overall_status,
)

BaselineMode = Literal["check", "new", "update", "off"]

M = TypeVar("M", bound=Repeatable)
"""A measurement that more starts can be added to: of a server, or of the links."""

NOISE_PRIORS: Mapping[str, NoisePrior] = {
    "cuda": NoisePrior(start_sd=0.015, session_sd=0.01),
    "cpu": NoisePrior(start_sd=0.06, session_sd=0.04),
}
"""Spread that is assumed until stored sessions show their own, by platform; docs/statistics.md says why these."""

MOST_REPLACED = 2
"""Disturbed starts that fresh ones take the place of, per gate: on a machine that disturbs more of them, choosing the
calm ones would no longer tell how fast it is."""

PriorOf = Callable[[str], NoisePrior]
"""What is assumed of the noise of a metric, by its name."""


@dataclass(frozen=True, slots=True)
class GatePolicy:
    """How to judge.

    :param starts: most fresh server starts per gate, besides one that confirms a regression.
    :param budget_s: most seconds of measuring, ``None`` for no limit.
    :param tolerances: the gated metrics. :param may_write: ``False`` where nothing may be stored (in CI).
    :param restarts: ``False`` where the server is somebody else's and no fresh start can be had.
    """

    mode: BaselineMode
    tolerances: Mapping[str, Tolerance]
    prior: NoisePrior
    starts: int
    budget_s: float | None = None
    may_write: bool = True
    restarts: bool = True


@dataclass(frozen=True, slots=True)
class GateInputs(Generic[M]):
    """What a performance gate works with.

    :param measure_again: starts a fresh server and measures the same workload on it once more.
    :param now_utc: wall clock, ISO 8601. :param elapsed_s: seconds since the gate began.
    :param say: takes a line on why one more start is made.
    """

    store: BaselineStore
    policy: GatePolicy
    measure_again: Callable[[M], M]
    now_utc: Callable[[], str]
    elapsed_s: Callable[[], float]
    say: Callable[[str], None]


def judge_performance(measurement: M, inputs: GateInputs[M]) -> tuple[Verdict, M]:
    """Judge a measurement, restarting the server as often as the verdict needs and the policy allows.

    A start that the machine disturbed is replaced by a fresh one, and the verdict says so.

    :returns: the verdict and the measurement with all its starts.
    :raises BaselineNotFound: mode ``check`` and nothing is stored; the message names the nearest key and the field
        that differs. :raises BaselineCorrupt: :raises BaselineForeign: what is stored cannot be used.
    """
    verdict, measurement = _judge(measurement, inputs)
    return replace(verdict, reasons=(*verdict.reasons, *replaced_texts(measurement.replaced))), measurement


def _judge(measurement: M, inputs: GateInputs[M]) -> tuple[Verdict, M]:
    policy, key = inputs.policy, measurement.identity.key
    if policy.mode == "off":
        return invalid_verdict(measurement, _place(inputs.store, key)) or _not_judged(measurement), measurement
    measurement = _undisturbed(measurement, inputs)
    if unfit := _unfit_verdict(measurement, inputs):
        return unfit, measurement
    if policy.mode == "update":
        return _record(measurement, inputs)
    baseline = load_baseline(inputs.store, key)
    if baseline is not None:
        return _judge_in_steps(measurement, baseline, inputs)
    if policy.mode == "check" or not policy.may_write:
        raise _not_found(inputs, measurement.identity)
    return _record(measurement, inputs)


def _not_judged(measurement: Judgeable) -> Verdict:
    reasons = ("not judged: --gpu-baseline=off",)
    return Verdict(Status.NO_BASELINE, reasons=reasons, advisory=advisory_changes(measurement, None))


def load_baseline(store: BaselineStore, key: BaselineKey) -> Baseline | None:
    """Return what is stored for ``key``, ``None`` when nothing is.

    :raises BaselineCorrupt: the file cannot be read. :raises BaselineForeign: it has another key.
    """
    text = store.read(key.path)
    return None if text is None else _own_baseline(text, store, key)


def _own_baseline(text: str, store: BaselineStore, key: BaselineKey) -> Baseline:
    baseline = baseline_from_text(text, _place(store, key))
    if differences := key.differences(baseline.key):
        raise BaselineForeign(
            "a baseline of this model, layout, hardware and workload was required, the stored one is of another:\n"
            + "".join(f"  {difference}\n" for difference in differences)
            + f"  in {_place(store, key)}\n"
            "  replace it by what runs now: --gpu-baseline=update; or keep both: --gpu-baseline-dir=ANOTHER",
            path=_place(store, key),
        )
    return baseline


def _judge_in_steps(measurement: M, baseline: Baseline, inputs: GateInputs[M]) -> tuple[Verdict, M]:
    policy, place = inputs.policy, _place(inputs.store, baseline.key)
    priors = sibling_priors(inputs.store, baseline.key, policy.prior)
    today = inputs.now_utc()[:10]
    while True:
        number = len(measurement.runs)
        no_time = _over_budget(measurement, inputs)
        look = Look.after(number, policy.starts, restarts=policy.restarts)
        if no_time:
            look = replace(look, number=look.of)
        verdict = judge_once(measurement, baseline, policy, look, priors=priors, today=today, place=place)
        if no_time or not look.calls_for_another(verdict.status):
            return verdict, measurement
        inputs.say(why_again(verdict.metrics, number, policy.starts))
        measurement = _undisturbed(inputs.measure_again(measurement), inputs)
        if unfit := _unfit_verdict(measurement, inputs):
            return unfit, measurement


def _undisturbed(measurement: M, inputs: GateInputs[M]) -> M:
    return undisturbed(
        measurement,
        inputs.measure_again,
        name=f"{measurement.start_noun} {len(measurement.runs)}",
        may_start=lambda so_far: not _over_budget(so_far, inputs),
        say=inputs.say,
    )


def undisturbed(
    measurement: M,
    measure_again: Callable[[M], M],
    *,
    name: str,
    may_start: Callable[[M], bool],
    say: Callable[[str], None],
    elsewhere: int = 0,
) -> M:
    """Let a fresh start take the place of the last one where that was disturbed, as often as is allowed.

    :param name: of the last start, for the line that is said. :param may_start: whether there is time for one more.
    :param elsewhere: starts that the same gate has replaced in another measurement.
    :returns: a measurement of as many starts; its last one is still disturbed where replacing it did not help.
    """
    while len(measurement.replaced) + elsewhere < MOST_REPLACED and measurement.is_last_disturbed():
        if not may_start(measurement):
            break
        shorter = measurement.without_last()
        say(why_replaced(name, shorter.replaced[-1]))
        try:
            measurement = measure_again(shorter)
        except DevicesBusy:  # who disturbed it is still there
            break
    return measurement


def invalid_verdict(measurement: Repeatable, place: str) -> Verdict | None:
    """The verdict on numbers that are not sound, ``None`` for those that are."""
    problems = (*measurement.problems(), *measurement.shortfalls())
    return Verdict(Status.INVALID, reasons=problems, baseline_path=place) if problems else None


def _unfit_verdict(measurement: M, inputs: GateInputs[M]) -> Verdict | None:
    """The verdict on numbers that must be neither judged nor stored, ``None`` for others."""
    place = _place(inputs.store, measurement.identity.key)
    if invalid := invalid_verdict(measurement, place):
        return invalid
    unfit = unjudgeable(measurement, inputs.policy.tolerances)
    return Verdict(Status.INVALID, reasons=unfit, baseline_path=place) if unfit else None


def _over_budget(measurement: M, inputs: GateInputs[M]) -> bool:
    """Whether one more start, as long as those so far, would end after the budget."""
    starts = len(measurement.runs) + len(measurement.replaced)
    budget, elapsed = inputs.policy.budget_s, inputs.elapsed_s()
    return budget is not None and elapsed + elapsed / starts > budget


def unjudgeable(measurement: Judgeable, tolerances: Mapping[str, Tolerance]) -> tuple[str, ...]:
    """Say why numbers that may be sound cannot be held against these tolerances; empty when they can.

    What is gated and was not measured makes the whole measurement unfit: else a gate on a name that nobody measures
    would never fail.
    """
    if not tolerances:
        return ("a gated metric was required, found none; name one: --gpu-tolerance=median_tpot_ms=5%",)
    starts = len(measurement.batch_sizes())
    found = {name: len(measurement.samples(name)) for name in tolerances}
    missing = [
        f"{name} is gated, and {plural(starts - count, 'start')} of {starts} did not measure it; leave out what this "
        "workload cannot have (answers of one token have no TPOT) in the fixture gpu_tolerances"
        for name, count in found.items()
        if count < max(starts, 1)
    ]
    sizes = sorted(set(measurement.batch_sizes()))
    if len(sizes) > 1:
        missing.append(f"the starts sent batches of different sizes: {', '.join(f'{size:g}' for size in sizes)}")
    return tuple(missing)


def judge_once(
    measurement: Judgeable,
    baseline: Baseline,
    policy: GatePolicy,
    look: Look,
    *,
    priors: PriorOf | None = None,
    today: str = "",
    place: str = "",
) -> Verdict:
    """Judge what there is now, without starting anything.

    :param priors: what is assumed of the noise, where the stored sessions are too few to tell.
    :param today: ISO 8601 date, for waivers. :param place: where the baseline is, for the report.
    :returns: ``invalid`` where a gated metric was not measured, ``no-baseline`` where one is not stored.
    """
    if unfit := unjudgeable(measurement, policy.tolerances):
        return Verdict(Status.INVALID, reasons=unfit, baseline_path=place)
    epoch, sizes = measurement.identity.epoch, measurement.batch_sizes()
    whole = baseline.reference(epoch, today=today)
    reference, left_out = of_batch_size(whole, sizes)
    histories = _histories(measurement, reference, policy, priors)
    metrics = judge_metrics(histories, look) if histories else ()
    missing = _not_stored(policy, histories)
    waiver = _of_waiver(whole, baseline, measurement, policy, look, priors)
    undecided = why_open(metrics, policy.starts, restarts=policy.restarts)
    told = (*missing, left_out_text(left_out, sizes), *waiver, *undecided)
    changed = what_changed(whole.newest, measurement.identity)
    return Verdict(
        _overall(metrics, missing),
        reasons=tuple(filter(None, told)),
        metrics=metrics,
        advisory=advisory_changes(measurement, reference, gated=policy.tolerances),
        changed=changed,
        cause=explain(metrics, reference, measurement, changed),
        drift=describe_drift(whole.newest.topology, measurement.identity.topology),
        provisional=why_provisional(whole, epoch, metrics, [history.prior.source for history in histories]),
        baseline_path=place,
    )


def _overall(metrics: Sequence[MetricVerdict], missing: Sequence[str]) -> Status:
    """A regression is one whatever else is missing; what is missing is never a pass."""
    status = overall_status(metrics)
    return Status.NO_BASELINE if missing and status is not Status.REGRESSION else status


def of_batch_size(reference: Reference, sizes: Sequence[float]) -> tuple[Reference, tuple[BaselineSession, ...]]:
    """Leave out the sessions whose starts sent other numbers of requests in a batch: medians of few scatter more.

    The key's fingerprint holds the number, so only files that somebody edited have such sessions.

    :returns: the rest, which may be without a session, and what was left out of those with the mean.
    """
    wanted = set(sizes)
    sessions, *others = (
        tuple(one for one in group if _sizes(one) <= wanted) for group in (reference.sessions, *reference.others)
    )
    left_out = tuple(one for one in reference.sessions if not _sizes(one) <= wanted)
    return replace(reference, sessions=sessions, others=tuple(filter(None, others))), left_out


def _sizes(session: BaselineSession) -> set[float]:
    return {run.batch_size for run in session.runs}


def _histories(
    measurement: Judgeable, reference: Reference, policy: GatePolicy, priors: PriorOf | None
) -> list[MetricHistory]:
    """What there is of each gated metric that is stored."""
    histories = []
    for name, tolerance in policy.tolerances.items():
        level, others = reference.level_samples(name), reference.other_samples(name)
        if level:
            prior = priors(name) if priors is not None and _are_few((level, *others)) else policy.prior
            histories.append(MetricHistory(tolerance, measurement.samples(name), level, prior, others))
    return histories


def _are_few(groups: Sequence[Samples]) -> bool:
    """Whether they show too little of the noise to do without an assumption."""
    of_sessions = sum(len(group) - 1 for group in groups)
    of_starts = sum(len(session) - 1 for group in groups for session in group)
    return min(of_sessions, of_starts) < SETTLED_DF


def _not_stored(policy: GatePolicy, histories: Sequence[MetricHistory]) -> list[str]:
    stored = {history.tolerance.metric for history in histories}
    return [
        f"{name} is gated, and no stored session that can be compared has it; record it: --gpu-baseline=update"
        for name in policy.tolerances
        if name not in stored
    ]


_NO_WAIVER = "9999-12-31"  # a day on which each of them is over


def _of_waiver(
    reference: Reference,
    baseline: Baseline,
    measurement: Judgeable,
    policy: GatePolicy,
    look: Look,
    priors: PriorOf | None,
) -> list[str]:
    """That a waiver is in force, or over, or no longer needed: numbers as good as those before it need none."""
    told, accepted = [waiver_text(reference)], reference.accepted
    if accepted is None or not accepted.until or reference.is_expired:
        return told
    without = baseline.reference(measurement.identity.epoch, today=_NO_WAIVER)
    before, _ = of_batch_size(without, measurement.batch_sizes())
    if not before.is_expired:
        return told
    histories = _histories(measurement, before, policy, priors)
    if not _not_stored(policy, histories) and overall_status(judge_metrics(histories, look)).passed:
        told.append(
            f"the waiver until {accepted.until} is no longer needed: these numbers are as good as before it; "
            "end it: --gpu-baseline=update"
        )
    return told


def _record(measurement: M, inputs: GateInputs[M]) -> tuple[Verdict, M]:
    """Measure on as many fresh starts as the policy has, and store them as one more session."""
    key = measurement.identity.key
    place = _place(inputs.store, key)
    if not inputs.policy.may_write:
        raise _not_allowed(place)
    with suppress(BaselineForeign) if inputs.policy.mode == "update" else nullcontext():
        load_baseline(inputs.store, key)  # a file that cannot be used is told before more is measured
    while len(measurement.runs) < inputs.policy.starts and not _over_budget(measurement, inputs):
        measurement = _undisturbed(inputs.measure_again(measurement), inputs)
        if unfit := _unfit_verdict(measurement, inputs):
            return unfit, measurement
    if inputs.policy.mode == "update":
        return _append(measurement, inputs), measurement
    drift = _drift_from_sibling(inputs.store, measurement.identity)
    fresh = baseline_to_text(Baseline(key, (measurement.as_session(inputs.now_utc()),)))
    found: str | None = None

    def add(text: str | None) -> str:
        nonlocal found
        found = text
        return fresh if text is None else text

    inputs.store.update(key.path, add)
    if found is not None:  # somebody else has recorded it in the meantime
        return _judge_in_steps(measurement, _own_baseline(found, inputs.store, key), inputs)
    return Verdict(
        Status.NO_BASELINE,
        reasons=_recorded(measurement, place),
        advisory=advisory_changes(measurement, None),
        drift=drift,
        stored="recorded",
        baseline_path=place,
    ), measurement


def _append(measurement: M, inputs: GateInputs[M]) -> Verdict:
    """Store one more session; where it is better or worse than what is stored, it begins a new level.

    A file of another key is replaced: it is of what this name of a model, workload or machine stood for before.
    """
    store, key = inputs.store, measurement.identity.key
    place = _place(store, key)
    session = measurement.as_session(inputs.now_utc())
    today = session.recorded[:10]
    priors = sibling_priors(store, key, inputs.policy.prior)
    sibling_drift = _drift_from_sibling(store, measurement.identity)
    compared = Verdict(Status.NO_BASELINE)
    notes: tuple[str, ...] = ()

    def add(text: str | None) -> str:
        """Append to what is there now; a second writer may have come first, and the store then asks again."""
        nonlocal compared, notes
        compared, notes = Verdict(Status.NO_BASELINE, advisory=advisory_changes(measurement, None)), ()
        try:
            stored = None if text is None else _own_baseline(text, store, key)
        except BaselineForeign as error:
            stored, notes = None, (f"replaced the baseline of another key; {_difference_of(error)}",)
        if stored is None:
            return baseline_to_text(Baseline(key, (session,)))
        compared = judge_once(measurement, stored, inputs.policy, Look(1, 1), priors=priors, today=today, place=place)
        notes = _what_moved(compared)
        stored = replace(stored, key=stored.key.completed_by(key))
        return baseline_to_text(add_session(stored, session, compared, reason="--gpu-baseline=update"))

    existed = store.update(key.path, add)
    return replace(
        compared,
        status=Status.NO_BASELINE,
        reasons=(*_recorded(measurement, place), *notes),
        drift=compared.drift or sibling_drift,
        stored="updated" if existed else "recorded",
        baseline_path=place,
    )


def _difference_of(error: BaselineForeign) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines() if ": stored " in line)


def _recorded(measurement: Repeatable, place: str) -> tuple[str, ...]:
    starts = plural(len(measurement.runs), measurement.start_noun)
    return f"recorded from {starts} in {place}", "nothing was judged: run again to check against it"


def _what_moved(verdict: Verdict) -> tuple[str, ...]:
    """What is accepted by storing a session, in the words that the file keeps."""
    changes = [change_text(metric) for metric in verdict.metrics if is_change(metric)]
    if not changes:
        return ("nothing got clearly better or worse: one more session beside those stored",)
    return tuple(f"a new level begins here: {change}" for change in changes)


def _not_allowed(place: str) -> BaselineError:
    return BaselineError(
        "a place where baselines may be written was required, and in CI nothing is written\n"
        f"  in {place}\n  record it elsewhere and commit it, or add --gpu-write-in-ci=yes",
        path=place,
    )


def _not_found(inputs: GateInputs[M], identity: Identity) -> BaselineNotFound:
    store, key = inputs.store, identity.key
    lines = ["a stored baseline was required, and there is none", f"  expected in {_place(store, key)}"]
    if drift := _drift_from_sibling(store, identity):
        lines.insert(0, drift)
    if nearest := nearest_key(store, key):
        path, differences = nearest
        lines.append(f"  nearest is {path}, which differs in")
        lines += [f"    {difference}" for difference in differences]
    record = "  record it: run the same command with --gpu-baseline=new"
    ci = ", and not in CI, where nothing is written (or add --gpu-write-in-ci=yes); commit the file"
    lines.append(record if inputs.policy.may_write else record + ci)
    return BaselineNotFound("\n".join(lines), path=_place(store, key))


def _drift_from_sibling(store: BaselineStore, identity: Identity) -> str:
    """How the wiring differs from that of a baseline whose key is the same but for the links; ``""`` without one."""
    sibling = same_but_links(store, identity.key)
    return "" if sibling is None else describe_drift(sibling.sessions[-1].topology, identity.topology)


def what_changed(session: BaselineSession, identity: Identity) -> tuple[str, ...]:
    """Name what differs now from a stored session: driver, NCCL, vLLM, arguments, core binding, host."""
    pairs = ((session.epoch, identity.epoch), (session.sut, identity.sut), (session.covariates, identity.covariates))
    return tuple(change for stored, now in pairs for change in changed_fields(stored, now))


def advisory_changes(
    measurement: Judgeable, reference: Reference | None, *, gated: Mapping[str, Tolerance] | None = None
) -> tuple[AdvisoryChange, ...]:
    """The metrics that are shown and not gated, with their stored values where there are some."""
    rows = []
    for name in METRICS:
        current = [sample.value for sample in measurement.samples(name)]
        if name in (gated or {}) or not current:
            continue
        sessions = reference.level_samples(name) if reference else ()
        stored = [sample.value for session in sessions for sample in session]
        rows.append(AdvisoryChange(name, median(stored) if stored else None, median(current)))
    return tuple(rows)


def _place(store: BaselineStore, key: BaselineKey) -> str:
    return f"{store.root.rstrip('/')}/{key.path}"
