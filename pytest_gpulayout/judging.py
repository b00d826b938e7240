"""The use case of a performance gate in stored mode: judge a measurement against what is stored, and store.

Through ports, and with time as an argument. Returns values; turning them into pytest outcomes is the plugin's work.
Paired mode, without stored numbers, is in :mod:`~pytest_gpulayout.pairing`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pytest_gpulayout.approval import add_session
from pytest_gpulayout.attribution import explain
from pytest_gpulayout.baseline import Baseline, BaselineKey, BaselineSession, Reference
from pytest_gpulayout.baseline_text import baseline_from_text, baseline_to_text
from pytest_gpulayout.drift import describe_drift
from pytest_gpulayout.errors import BaselineError, BaselineForeign, BaselineNotFound
from pytest_gpulayout.measurement import Identity, Judgeable, Measurement
from pytest_gpulayout.metrics import METRICS
from pytest_gpulayout.ports import BaselineStore
from pytest_gpulayout.report import plural
from pytest_gpulayout.siblings import nearest_key, same_but_links, sibling_priors
from pytest_gpulayout.stats import SETTLED_DF, NoisePrior, median
from pytest_gpulayout.tolerance import Tolerance, percent_text
from pytest_gpulayout.verdict import (
    MOST_STARTS,
    AdvisoryChange,
    Look,
    MetricHistory,
    MetricVerdict,
    Status,
    Verdict,
    changed_fields,
    judge_metrics,
    overall_status,
)

BaselineMode = Literal["check", "new", "update", "off"]

NOISE_PRIORS: Mapping[str, NoisePrior] = {
    "cuda": NoisePrior(start_sd=0.015, session_sd=0.01),
    "cpu": NoisePrior(start_sd=0.06, session_sd=0.04),
}
"""Spread that is assumed until stored sessions show their own, by platform; docs/statistics.md says why these."""

FEW_SESSIONS = 5
"""A verdict on fewer stored sessions is provisional, wherever its spread comes from."""

PriorOf = Callable[[str], NoisePrior]
"""What is assumed of the noise of a metric, by its name."""


@dataclass(frozen=True, slots=True)
class GatePolicy:
    """How to judge.

    :param starts: most fresh server starts per gate.
    :param budget_s: most seconds of measuring, ``None`` for no limit.
    :param tolerances: the gated metrics. :param may_write: ``False`` where nothing may be stored (in CI).
    """

    mode: BaselineMode
    tolerances: Mapping[str, Tolerance]
    prior: NoisePrior
    starts: int
    budget_s: float | None = None
    may_write: bool = True


@dataclass(frozen=True, slots=True)
class GateInputs:
    """What a performance gate works with.

    :param measure_again: starts a fresh server and measures the same workload on it once more.
    :param now_utc: wall clock, ISO 8601. :param elapsed_s: seconds since the gate began.
    :param say: takes a line on why one more start is made.
    """

    store: BaselineStore
    policy: GatePolicy
    measure_again: Callable[[Measurement], Measurement]
    now_utc: Callable[[], str]
    elapsed_s: Callable[[], float]
    say: Callable[[str], None]


def judge_performance(measurement: Measurement, inputs: GateInputs) -> tuple[Verdict, Measurement]:
    """Judge a measurement, restarting the server as often as the verdict needs and the policy allows.

    :returns: the verdict and the measurement with all its starts.
    :raises BaselineNotFound: mode ``check`` and nothing is stored; the message names the nearest key and the field
        that differs. :raises BaselineCorrupt: :raises BaselineForeign: what is stored cannot be used.
    """
    policy = inputs.policy
    if invalid := invalid_verdict(measurement, _place(inputs.store, measurement.identity.key)):
        return invalid, measurement
    if policy.mode == "off":
        reasons = ("not judged: --gpu-baseline=off",)
        return Verdict(Status.NO_BASELINE, reasons=reasons, advisory=advisory_changes(measurement, None)), measurement
    if policy.mode == "update":
        return _record(measurement, inputs)
    baseline = load_baseline(inputs.store, measurement.identity.key)
    if baseline is not None:
        return _judge_in_steps(measurement, baseline, inputs)
    if policy.mode == "check" or not policy.may_write:
        raise _not_found(inputs, measurement.identity)
    return _record(measurement, inputs)


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
            + f"  in {_place(store, key)}\n  record it for what runs now: --gpu-baseline=update",
            path=_place(store, key),
        )
    return baseline


def _judge_in_steps(measurement: Measurement, baseline: Baseline, inputs: GateInputs) -> tuple[Verdict, Measurement]:
    policy, place = inputs.policy, _place(inputs.store, baseline.key)
    few = len(baseline.sessions) <= SETTLED_DF
    priors = sibling_priors(inputs.store, baseline.key, policy.prior) if few else None
    today = inputs.now_utc()[:10]
    while True:
        number = len(measurement.runs)
        last = number >= policy.starts or over_budget(len(measurement.runs), inputs)
        look = Look(policy.starts if last else number, policy.starts)
        verdict = judge_once(measurement, baseline, policy, look, priors=priors, today=today, place=place)
        if last or verdict.status is not Status.INCONCLUSIVE:
            return verdict, measurement
        inputs.say(_why_again(verdict, number, policy.starts))
        measurement = inputs.measure_again(measurement)
        if invalid := invalid_verdict(measurement, place):
            return invalid, measurement


def _why_again(verdict: Verdict, number: int, most: int) -> str:
    """``start 1 of 3 does not decide median_tpot_ms (+2.1%, between -3.0% and +7.4%): one more``."""
    open_ones = [m for m in verdict.metrics if m.status is Status.INCONCLUSIVE]
    told = ", ".join(f"{m.name} ({m.change:+.1%}, between {m.ci[0]:+.1%} and {m.ci[1]:+.1%})" for m in open_ones)
    return f"start {number} of at most {most} does not decide {told or 'all metrics'}: one more"


def invalid_verdict(measurement: Measurement, place: str) -> Verdict | None:
    """The verdict on numbers that are not sound, ``None`` for those that are."""
    problems = measurement.problems()
    return Verdict(Status.INVALID, reasons=problems, baseline_path=place) if problems else None


def over_budget(starts: int, inputs: GateInputs) -> bool:
    """Whether one more start, as long as those so far, would end after the budget."""
    budget, elapsed = inputs.policy.budget_s, inputs.elapsed_s()
    return budget is not None and elapsed + elapsed / starts > budget


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

    :param priors: what is assumed of the noise, where not ``policy.prior``.
    :param today: ISO 8601 date, for waivers. :param place: where the baseline is, for the report.
    """
    reference = baseline.reference(measurement.identity.epoch, today=today)
    histories: list[MetricHistory] = []
    missing = [] if policy.tolerances else ["no metric is gated: name one, --gpu-tolerance=median_tpot_ms=5%"]
    for name, tolerance in policy.tolerances.items():
        current, level = measurement.samples(name), reference.level_samples(name)
        if not current or not level:
            missing.append(f"{name} has no value {'now' if not current else 'in the baseline'}: it cannot be judged")
            continue
        prior = policy.prior if priors is None else priors(name)
        histories.append(MetricHistory(tolerance, current, level, prior, reference.other_samples(name)))
    metrics = judge_metrics(histories, look) if histories else ()
    status = overall_status(metrics)
    if missing and status is not Status.REGRESSION:
        status = Status.INCONCLUSIVE
    changed = what_changed(reference.newest, measurement.identity)
    return Verdict(
        status,
        reasons=(*missing, *_of_waiver(reference), *_explain(metrics, policy)),
        metrics=metrics,
        advisory=advisory_changes(measurement, reference, gated=policy.tolerances),
        changed=changed,
        cause=explain(metrics, reference, measurement, changed),
        drift=describe_drift(reference.newest.topology, measurement.identity.topology),
        provisional=_why_provisional(reference, histories, metrics),
        baseline_path=place,
    )


def _of_waiver(reference: Reference) -> list[str]:
    accepted = reference.accepted
    if accepted is None or not accepted.until:
        return []
    if reference.is_expired:
        return [f"a waiver ended on {accepted.until} ({accepted.reason}): judged against the level before it"]
    return [f"a waiver until {accepted.until} is in force: {accepted.reason}"]


def _why_provisional(reference: Reference, histories: list[MetricHistory], metrics: tuple[MetricVerdict, ...]) -> str:
    """Why a verdict rests on less than it should, ``""`` where it does not."""
    count = len(reference.sessions)
    unsettled = [h.prior.source for h, m in zip(histories, metrics, strict=True) if not m.is_settled]
    if unsettled:
        sources = ", ".join(dict.fromkeys(unsettled))
        return f"{plural(count, 'stored session')}; the spread rests partly on {sources}"
    return f"{plural(count, 'stored session')} of this level and epoch" if count < FEW_SESSIONS else ""


def _explain(metrics: tuple[MetricVerdict, ...], policy: GatePolicy) -> list[str]:
    """Say for each metric that is not decided what was seen and what it would take."""
    return [
        f"{metric.name}: changed by {metric.change:+.1%}, interval {metric.ci[0]:+.1%} to {metric.ci[1]:+.1%}; "
        f"a change of {percent_text(metric.tolerance)} cannot be ruled out with "
        f"{plural(metric.n_current, 'start')} now and {plural(metric.n_sessions, 'stored session')}: "
        f"{what_it_takes(metric, policy.starts)}"
        for metric in metrics
        if metric.status is Status.INCONCLUSIVE
    ]


def what_it_takes(metric: MetricVerdict, starts: int) -> str:
    """What to do for a verdict on a metric. :param starts: that the gate may make now."""
    needed = metric.requirement
    accept = f"--gpu-tolerance={metric.name}={percent_text(metric.min_detectable)}"
    if needed is None:
        return accept
    if needed.starts is not None and needed.starts > starts:
        return f"allow more starts (--gpu-starts={needed.starts}), or accept a larger tolerance ({accept})"
    if needed.starts is not None:
        return f"it lies near the limit; more starts narrow it (--gpu-starts={min(starts + 2, MOST_STARTS)})"
    if needed.sessions is not None:
        return (
            f"store {needed.sessions} sessions (gpulayout baseline approve RESULTS.json) and allow {MOST_STARTS} "
            f"starts, or accept a larger tolerance ({accept})"
        )
    return (
        f"this machine's noise hides changes below {percent_text(round(needed.smallest, 3))} whatever is measured: "
        f"accept a larger tolerance ({accept}), or compare in pairs (--gpu-base)"
    )


def _record(measurement: Measurement, inputs: GateInputs) -> tuple[Verdict, Measurement]:
    """Measure on as many fresh starts as the policy has, and store them as one more session."""
    key = measurement.identity.key
    place = _place(inputs.store, key)
    while len(measurement.runs) < inputs.policy.starts and not over_budget(len(measurement.runs), inputs):
        measurement = inputs.measure_again(measurement)
        if invalid := invalid_verdict(measurement, place):
            return invalid, measurement
    drift = _drift_from_sibling(inputs.store, measurement.identity)
    session = measurement.as_session(inputs.now_utc())
    found: list[Verdict] = []

    def add(text: str | None) -> str:
        """Append to what is there now; a second writer may have come first, and the store then asks again."""
        found.clear()
        stored = None if text is None else _readable(text, inputs, key)
        if stored is None:
            return baseline_to_text(Baseline(key, (session,)))
        verdict = judge_once(measurement, stored, inputs.policy, Look(1, 1), today=session.recorded[:10], place=place)
        found.append(verdict)
        return baseline_to_text(add_session(stored, session, verdict, reason="--gpu-baseline=update"))

    existed = inputs.store.update(key.path, add)
    starts = plural(len(measurement.runs), "server start")
    reasons = (f"recorded from {starts} in {place}", "nothing was judged: run again to check against it")
    compared = found[0] if found else Verdict(Status.NO_BASELINE, advisory=advisory_changes(measurement, None))
    verdict = replace(
        compared,
        status=Status.NO_BASELINE,
        reasons=reasons,
        drift=drift,
        stored="updated" if existed else "recorded",
        baseline_path=place,
    )
    return verdict, measurement


def _readable(text: str, inputs: GateInputs, key: BaselineKey) -> Baseline | None:
    """What is stored, ``None`` where ``update`` replaces it because nobody could use it."""
    try:
        return _own_baseline(text, inputs.store, key)
    except BaselineError:
        if inputs.policy.mode == "update":
            return None
        raise


def _not_found(inputs: GateInputs, identity: Identity) -> BaselineNotFound:
    store, key = inputs.store, identity.key
    lines = ["a stored baseline was required, and there is none", f"  expected in {_place(store, key)}"]
    if drift := _drift_from_sibling(store, identity):
        lines.insert(0, drift)
    if nearest := nearest_key(store, key):
        path, differences = nearest
        lines.append(f"  nearest is {path}, which differs in")
        lines += [f"    {difference}" for difference in differences]
    if inputs.policy.mode == "new":
        lines.append("  nothing is recorded in CI: record it elsewhere and commit it, or add --gpu-write-in-ci=yes")
    else:
        lines.append("  record it: run the same command with --gpu-baseline=new")
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
