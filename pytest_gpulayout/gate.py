"""The use cases: judge links, and judge speed against stored baselines, through ports.

Returns values; turning them into pytest outcomes is the plugin's work. Takes time as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pytest_gpulayout.baseline import Baseline, BaselineKey, BaselineSession, baseline_from_text, baseline_to_text
from pytest_gpulayout.drift import describe_drift
from pytest_gpulayout.errors import (
    BaselineError,
    BaselineForeign,
    BaselineNotFound,
    LinkError,
    UnsupportedLayoutError,
)
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.links import LinkClass, LinkRequirement
from pytest_gpulayout.measurement import Identity, Judgeable, Measurement
from pytest_gpulayout.metrics import METRICS
from pytest_gpulayout.placement import choose_placement, satisfying_placement
from pytest_gpulayout.ports import BaselineStore
from pytest_gpulayout.report import link_failure, plural
from pytest_gpulayout.results import RecordedMeasurement
from pytest_gpulayout.stats import NoisePrior, median
from pytest_gpulayout.tolerance import Tolerance, percent_text
from pytest_gpulayout.topology import Device, LinkViolation, Topology, check_links
from pytest_gpulayout.verdict import (
    PROVISIONAL_BELOW_SESSIONS,
    AdvisoryChange,
    Look,
    MetricVerdict,
    Status,
    Verdict,
    changed_fields,
    judge_metric,
    overall_status,
)

BaselineMode = Literal["check", "new", "update", "off"]

NOISE_PRIORS: Mapping[str, NoisePrior] = {
    "cuda": NoisePrior(start_sd=0.015, session_sd=0.01),
    "cpu": NoisePrior(start_sd=0.06, session_sd=0.04),
}
"""Spread that is assumed until stored sessions show their own, by platform; docs/statistics.md says why these."""


@dataclass(frozen=True, slots=True)
class PlacedLayout:
    """A layout on the devices that were chosen for it; of a layout over several nodes, the ranks of one node.

    :param placement: (n_ranks,), index of each rank's device in the topology.
    """

    layout: Layout
    topology: Topology
    placement: tuple[int, ...]
    requirement: LinkRequirement

    @property
    def devices(self) -> tuple[Device, ...]:
        """(n_ranks,), in rank order."""
        by_index = {device.index: device for device in self.topology.devices}
        return tuple(by_index[index] for index in self.placement)

    @property
    def links(self) -> tuple[LinkClass | None, ...]:
        """Link of every rank pair that communicates, in the order of the pairs; ``None`` where it is unknown."""
        return tuple(self.topology.link(self.placement[a], self.placement[b]) for a, b in self.layout.node_pairs())

    @property
    def violations(self) -> tuple[LinkViolation, ...]:
        """Pairs whose link is worse than required."""
        return check_links(self.topology, self.placement, self.layout.node_pairs(), self.requirement)

    @property
    def better_placement(self) -> tuple[int, ...] | None:
        """Devices, in rank order, whose links are all as required; ``None`` where none are found."""
        return satisfying_placement(self.topology, self.layout, self.requirement)

    def assert_links(self) -> None:
        """Do nothing when all links are as required.

        :raises LinkError: one is worse, or unknown; the message lists each pair.
        """
        if self.violations:
            raise LinkError(link_failure(self))


def place_layout(
    topology: Topology, layout: Layout, requested: tuple[str, ...] | None, requirement: LinkRequirement
) -> PlacedLayout:
    """Choose the devices of a layout.

    :param requested: indices or UUIDs to use exactly, ``None`` for the best placement.
    :raises TopologyError: too few devices, or a requested one that does not exist.
    """
    placement = choose_placement(topology, layout, requested, requirement)
    return PlacedLayout(layout, topology, placement, requirement)


def require_launchable(layout: Layout) -> None:
    """Refuse what this version cannot start and prove.

    :raises UnsupportedLayoutError: anything but tensor parallelism on one host.
    """
    if layout == Layout(tp=layout.tp):
        return
    raise UnsupportedLayoutError(
        f"a layout that this version can start was required, found {layout}\n"
        "  it starts tensor parallelism on one host: tp1, tp2, tp4, ...; other factors, replicas (xN) and nodes (@N) "
        "are read, and their vLLM arguments are built, but not started yet\n"
        f"  try --gpu-layout=tp{layout.tp}"
    )


@dataclass(frozen=True, slots=True)
class GatePolicy:
    """How to judge.

    :param starts: most fresh server starts per gate.
    :param budget_s: most seconds of measuring, ``None`` for no limit.
    :param tolerances: the gated metrics.
    """

    mode: BaselineMode
    tolerances: Mapping[str, Tolerance]
    prior: NoisePrior
    starts: int
    budget_s: float | None = None


@dataclass(frozen=True, slots=True)
class GateInputs:
    """What a performance gate works with.

    :param measure_again: starts a fresh server and measures the same workload on it once more.
    :param now_utc: wall clock, ISO 8601. :param elapsed_s: seconds since the gate began.
    """

    store: BaselineStore
    policy: GatePolicy
    measure_again: Callable[[Measurement], Measurement]
    now_utc: Callable[[], str]
    elapsed_s: Callable[[], float]


def judge_performance(measurement: Measurement, inputs: GateInputs) -> tuple[Verdict, Measurement]:
    """Judge a measurement, restarting the server as often as the verdict needs and the policy allows.

    :returns: the verdict and the measurement with all its starts.
    :raises BaselineNotFound: mode ``check`` and nothing is stored; the message names the nearest key and the field
        that differs. :raises BaselineCorrupt: :raises BaselineForeign: what is stored cannot be used.
    """
    key = measurement.identity.key
    mode = inputs.policy.mode
    if invalid := _invalid(measurement, inputs.store):
        return invalid, measurement
    if mode == "off":
        reasons = ("not judged: --gpu-baseline=off",)
        return Verdict(Status.NO_BASELINE, reasons=reasons, advisory=_advisory(measurement, None)), measurement
    baseline = None if mode == "update" else load_baseline(inputs.store, key)
    if baseline is None:
        if mode == "check":
            raise _not_found(inputs.store, measurement.identity)
        return _record(measurement, inputs)
    return _judge_in_steps(measurement, baseline, inputs)


def load_baseline(store: BaselineStore, key: BaselineKey) -> Baseline | None:
    """Return what is stored for ``key``, ``None`` when nothing is.

    :raises BaselineCorrupt: the file cannot be read. :raises BaselineForeign: it has another key.
    """
    text = store.read(key.path)
    if text is None:
        return None
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
    policy = inputs.policy
    while True:
        number = len(measurement.runs)
        last = number >= policy.starts or _over_budget(measurement, inputs)
        look = Look(policy.starts if last else number, policy.starts)
        verdict = judge_once(measurement, baseline, policy, look, place=_place(inputs.store, baseline.key))
        if last or verdict.status is not Status.INCONCLUSIVE:
            return verdict, measurement
        measurement = inputs.measure_again(measurement)
        if invalid := _invalid(measurement, inputs.store):
            return invalid, measurement


def _invalid(measurement: Measurement, store: BaselineStore) -> Verdict | None:
    """The verdict on numbers that are not sound, ``None`` for those that are."""
    problems = measurement.problems()
    place = _place(store, measurement.identity.key)
    return Verdict(Status.INVALID, reasons=problems, baseline_path=place) if problems else None


def _over_budget(measurement: Measurement, inputs: GateInputs) -> bool:
    """Whether one more start, as long as those so far, would end after the budget."""
    budget, elapsed = inputs.policy.budget_s, inputs.elapsed_s()
    return budget is not None and elapsed + elapsed / len(measurement.runs) > budget


def judge_once(measurement: Judgeable, baseline: Baseline, policy: GatePolicy, look: Look, *, place: str) -> Verdict:
    """Judge what there is now, without starting anything. :param place: where the baseline is, for the report."""
    metrics: list[MetricVerdict] = []
    missing = [] if policy.tolerances else ["no metric is gated: name one, --gpu-tolerance=median_tpot_ms=5%"]
    for name, tolerance in policy.tolerances.items():
        current, stored = measurement.samples(name), baseline.samples(name)
        if not current or not stored:
            missing.append(f"{name} has no value {'now' if not current else 'in the baseline'}: it cannot be judged")
            continue
        metrics.append(
            judge_metric(tolerance, current, stored, prior=policy.prior, look=look, metrics=len(policy.tolerances))
        )
    status = overall_status(metrics)
    if missing and status is not Status.REGRESSION:
        status = Status.INCONCLUSIVE
    return Verdict(
        status,
        reasons=(*missing, *_explain(metrics, policy)),
        metrics=tuple(metrics),
        advisory=_advisory(measurement, baseline, gated=policy.tolerances),
        changed=what_changed(baseline.sessions[-1], measurement.identity),
        drift=describe_drift(baseline.sessions[-1].topology, measurement.identity.topology),
        provisional=len(baseline.sessions) < PROVISIONAL_BELOW_SESSIONS,
        baseline_path=place,
    )


def _explain(metrics: list[MetricVerdict], policy: GatePolicy) -> list[str]:
    """Say for each metric that is not decided what was seen and what it would take."""
    return [
        f"{metric.name}: changed by {metric.change:+.1%}, interval {metric.ci[0]:+.1%} to {metric.ci[1]:+.1%}; "
        f"a change of {percent_text(metric.tolerance)} cannot be ruled out with "
        f"{plural(metric.n_current, 'start')} now and {metric.n_baseline} stored: "
        f"allow more (--gpu-starts={policy.starts + 2}) "
        f"or accept a larger tolerance (--gpu-tolerance={metric.name}=...)"
        for metric in metrics
        if metric.status is Status.INCONCLUSIVE
    ]


def judge_recorded(
    measurements: Sequence[RecordedMeasurement],
    baseline: Baseline,
    tolerances: Mapping[str, Tolerance],
    *,
    place: str,
) -> Verdict:
    """Judge the last of these measurements that has the baseline's key; all its starts count as one look.

    :param place: where the baseline is, for the report.
    """
    same = [item for item in measurements if not item.identity.key.differences(baseline.key)]
    if not same:
        return Verdict(Status.INVALID, reasons=_no_such_key(measurements, baseline.key), baseline_path=place)
    measurement = same[-1]
    if measurement.problems:
        return Verdict(Status.INVALID, reasons=measurement.problems, baseline_path=place)
    prior = NOISE_PRIORS[baseline.key.hardware["platform"]]
    policy = GatePolicy(mode="check", tolerances=tolerances, prior=prior, starts=len(measurement.runs))
    verdict = judge_once(measurement, baseline, policy, Look(1, 1), place=place)
    if len(same) == 1:
        return verdict
    told = f"{len(same)} measurements have this key; the last one was judged, of {measurement.test}"
    return replace(verdict, reasons=(*verdict.reasons, told))


def _no_such_key(measurements: Sequence[RecordedMeasurement], key: BaselineKey) -> tuple[str, ...]:
    if not measurements:
        return ("the results hold no measurement",)
    nearest = min((item.identity.key.differences(key) for item in measurements), key=len)
    return ("no measurement has the baseline's key; the nearest differs in", *nearest)


def _record(measurement: Measurement, inputs: GateInputs) -> tuple[Verdict, Measurement]:
    """Measure on as many fresh starts as the policy has, and store them as one session."""
    key = measurement.identity.key
    place = _place(inputs.store, key)
    while len(measurement.runs) < inputs.policy.starts and not _over_budget(measurement, inputs):
        measurement = inputs.measure_again(measurement)
        if invalid := _invalid(measurement, inputs.store):
            return invalid, measurement
    existed = key.path in inputs.store.paths()
    drift = _drift_from_sibling(inputs.store, measurement.identity)
    session = measurement.as_session(inputs.now_utc())
    inputs.store.write(key.path, baseline_to_text(Baseline(key, (session,))))
    starts = plural(len(measurement.runs), "server start")
    reasons = (f"recorded from {starts} in {place}", "nothing was judged: run again to check against it")
    verdict = Verdict(
        Status.NO_BASELINE,
        reasons=reasons,
        advisory=_advisory(measurement, None),
        drift=drift,
        stored="updated" if existed else "recorded",
        baseline_path=place,
    )
    return verdict, measurement


def _not_found(store: BaselineStore, identity: Identity) -> BaselineNotFound:
    key = identity.key
    lines = ["a stored baseline was required, and there is none", f"  expected in {_place(store, key)}"]
    if drift := _drift_from_sibling(store, identity):
        lines.insert(0, drift)
    if nearest := _nearest(store, key):
        path, differences = nearest
        lines.append(f"  nearest is {path}, which differs in")
        lines += [f"    {difference}" for difference in differences]
    lines.append("  record it: run the same command with --gpu-baseline=new")
    return BaselineNotFound("\n".join(lines), path=_place(store, key))


def _drift_from_sibling(store: BaselineStore, identity: Identity) -> str:
    """How the wiring differs from that of a baseline whose key is the same but for the links; ``""`` without one."""
    key = identity.key
    model, layout, _, workload = key.path.split("/")
    for path in store.paths():
        if path == key.path or not (path.startswith(f"{model}/{layout}/") and path.endswith(f"/{workload}")):
            continue
        try:
            baseline = baseline_from_text(store.read(path) or "", path)
        except BaselineError:
            continue
        hardware = {**baseline.key.hardware, "links": key.hardware["links"]}
        if not key.differences(replace(baseline.key, hardware=hardware)):
            return describe_drift(baseline.sessions[-1].topology, identity.topology)
    return ""


def _nearest(store: BaselineStore, key: BaselineKey) -> tuple[str, tuple[str, ...]] | None:
    """The stored key with the fewest fields that differ; files that cannot be read are no candidates."""
    candidates = []
    for path in store.paths():
        try:
            baseline = baseline_from_text(store.read(path) or "", path)
        except BaselineError:
            continue
        differences = key.differences(baseline.key)
        candidates.append((len(differences), path, differences))
    return min(candidates)[1:] if candidates else None


def what_changed(session: BaselineSession, identity: Identity) -> tuple[str, ...]:
    """Name what differs now from a stored session: driver, NCCL, vLLM, arguments, core binding, host."""
    pairs = ((session.epoch, identity.epoch), (session.sut, identity.sut), (session.covariates, identity.covariates))
    return tuple(change for stored, now in pairs for change in changed_fields(stored, now))


def _advisory(
    measurement: Judgeable, baseline: Baseline | None, *, gated: Mapping[str, Tolerance] | None = None
) -> tuple[AdvisoryChange, ...]:
    rows = []
    for name in METRICS:
        current = [sample.value for sample in measurement.samples(name)]
        if name in (gated or {}) or not current:
            continue
        sessions = baseline.samples(name) if baseline else ()
        stored = [sample.value for session in sessions for sample in session]
        rows.append(AdvisoryChange(name, median(stored) if stored else None, median(current)))
    return tuple(rows)


def _place(store: BaselineStore, key: BaselineKey) -> str:
    return f"{store.root.rstrip('/')}/{key.path}"
