"""The probe of the links in a run: what it sends, what it measured, and how that is judged.

Leaves starting it to the adapters, what a number means to :mod:`~pytest_gpulayout.collectives` and
:mod:`~pytest_gpulayout.link_limits`, and turning verdicts into outcomes to :mod:`~pytest_gpulayout.session`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_gpulayout.attribution import told_of_links
from pytest_gpulayout.collectives import (
    ELEMENT_BYTES,
    NOISE_PRIORS,
    CollectiveMeasurement,
    ProbePlan,
    no_probe_needed,
    probe_groups,
    probe_tolerances,
    transports_text,
)
from pytest_gpulayout.errors import BaselineError, BaselineNotFound, GpuLayoutError
from pytest_gpulayout.judging import (
    GateInputs,
    GatePolicy,
    advisory_changes,
    judge_once,
    judge_performance,
    load_baseline,
)
from pytest_gpulayout.link_limits import BandwidthReport, judge_bandwidth
from pytest_gpulayout.ports import ProbeSpec
from pytest_gpulayout.verdict import Look, Status, Verdict

if TYPE_CHECKING:
    from pytest_gpulayout.collectives import ProbeRun
    from pytest_gpulayout.gate import PlacedLayout
    from pytest_gpulayout.layout import Layout
    from pytest_gpulayout.live import LiveLine
    from pytest_gpulayout.ports import CollectiveProbe, ServerSpec
    from pytest_gpulayout.servers import ModelSpec, ServerOwner
    from pytest_gpulayout.settings import Settings
    from pytest_gpulayout.tolerance import Tolerance
    from pytest_gpulayout.topology import Device
    from pytest_gpulayout.wiring import Wiring

_STARTS_IN_PAIRS = 3  # --gpu-starts counts blocks there
_Key = tuple["Layout", "tuple[Device, ...]", bool]
"""Layout, devices in rank order, and whether the model has experts: what the links between ranks depend on."""


@dataclass(frozen=True, slots=True)
class ProbeJudgement:
    """What was found about the links of a layout.

    :param measurement: with all its starts. :param error: why the baseline could not be used, if it could not.
    """

    verdict: Verdict
    bandwidth: BandwidthReport
    measurement: CollectiveMeasurement
    error: BaselineError | None = None


class Probing:
    """The probes of one run; each is made once, however many tests ask for it."""

    def __init__(self, settings: Settings, wiring: Wiring, servers: ServerOwner, live: LiveLine) -> None:
        self._settings = settings
        self._wiring = wiring
        self._servers = servers
        self._live = live
        self._probe: CollectiveProbe | None = None
        self._measured: dict[tuple[_Key, ProbePlan], tuple[PlacedLayout, CollectiveMeasurement]] = {}
        self._failures: dict[tuple[_Key, ProbePlan], GpuLayoutError] = {}
        self._judged: dict[_Key, ProbeJudgement] = {}

    def plan(self, model: ModelSpec | None, arguments: tuple[str, ...]) -> ProbePlan:
        """Return a probe with messages of the model's size, as far as its config.json is at hand.

        :param arguments: of the server, without those of the model's marker.
        """
        from pytest_gpulayout.adapters.model_facts import dtype_of, hidden_size_of

        if model is None:
            return ProbePlan()
        every = (*arguments, *model.arguments)
        dtype = dtype_of(model.name, every).partition(" ")[0]
        plan = ProbePlan(dtype=dtype) if dtype in ELEMENT_BYTES else ProbePlan()
        hidden = hidden_size_of(model.name, every)
        if hidden is None:
            return replace(plan, origin=f"the default, since no config.json of {model.name} is at hand")
        return replace(plan, hidden_size=hidden, origin=f"the config.json of {model.name}")

    def why_not(self, placed: PlacedLayout) -> str:
        """Why there is nothing to probe, or no way to; ``""`` where there is."""
        layout = placed.layout
        if self._settings.attach is not None:
            return f"{layout}: somebody else's server computes on the devices, so their links cannot be probed"
        if layout.nodes > 1:
            return f"{layout}: links are probed on one host, and not yet between nodes"
        return "" if probe_groups(layout, moe=placed.moe) else no_probe_needed(layout)

    def measure(self, placed: PlacedLayout, plan: ProbePlan) -> CollectiveMeasurement:
        """Probe the links of a layout, without a server on its devices; the same answer for the whole run.

        :raises GpuLayoutError: the links are worse than required, or nothing could be measured.
        """
        from pytest_gpulayout.adapters.host import identify

        placed.assert_links()
        key = (_key(placed), plan)
        if key in self._failures:
            raise self._failures[key]
        if key not in self._measured:
            try:
                run = self._run(placed, plan)
            except GpuLayoutError as error:
                self._failures[key] = error
                raise
            identity = identify(placed, model=plan.model_identity(), arguments=(), workload=plan, proof=None)
            if transports := transports_text([run]):
                identity = replace(identity, covariates={**identity.covariates, "transport": transports})
            self._measured[key] = placed, CollectiveMeasurement(identity, plan, (run,))
        return self._measured[key][1]

    def _run(self, placed: PlacedLayout, plan: ProbePlan) -> ProbeRun:
        self._servers.vacate()  # its devices are locked, and it would take its share of the links
        self._probe = self._probe or self._wiring.collective_probe()
        spec = ProbeSpec(
            layout=placed.layout,
            groups=probe_groups(placed.layout, moe=placed.moe),
            devices=placed.devices,
            platform=self._settings.platform,
            python=sys.executable,
            plan=plan,
        )
        try:
            run = self._probe.run(spec, self._live.update)
        finally:
            self._live.clear()
        self._live.say(f"{placed.layout}: links probed in {run.duration_s:.0f} s, {run.backend}")
        return run

    def judge(
        self, measurement: CollectiveMeasurement, placed: PlacedLayout, tolerances: Mapping[str, Tolerance]
    ) -> ProbeJudgement:
        """Judge a probe against the stored baseline, and against what its links are published to carry.

        What is below the published limit is never stored: it would be the measure of what follows.
        """
        bandwidth = judge_bandwidth(measurement, placed.topology, placed.placement)
        verdict = _unjudged(measurement, "not stored: a link is too slow for its class")
        error: BaselineError | None = None
        if not bandwidth.findings or self._settings.baseline_mode in ("check", "off"):
            try:
                verdict, measurement = judge_performance(measurement, self._inputs(measurement, placed, tolerances))
            except BaselineError as raised:
                error = raised
                verdict = _unjudged(measurement, _first_line(raised), raised.path)
            bandwidth = judge_bandwidth(measurement, placed.topology, placed.placement)
        if isinstance(error, BaselineNotFound) and self._settings.base is not None:
            error = None  # paired mode needs nothing stored
        judgement = ProbeJudgement(verdict, bandwidth, measurement, error)
        self._judged[_key(placed)] = judgement
        return judgement

    def _inputs(
        self, measurement: CollectiveMeasurement, placed: PlacedLayout, tolerances: Mapping[str, Tolerance]
    ) -> GateInputs[CollectiveMeasurement]:
        from pytest_gpulayout.adapters.host import utc_now

        began = time.monotonic() - measurement.runs[0].duration_s

        def measure_again(so_far: CollectiveMeasurement) -> CollectiveMeasurement:
            self._live.say(f"{placed.layout}: links: fresh start {len(so_far.runs) + 1} of the probe")
            return so_far.with_run(self._run(placed, so_far.plan))

        return GateInputs(
            store=self._wiring.store(),
            policy=self._policy(tolerances),
            measure_again=measure_again,
            now_utc=utc_now,
            elapsed_s=lambda: time.monotonic() - began,
            say=self._live.say,
        )

    def _policy(self, tolerances: Mapping[str, Tolerance]) -> GatePolicy:
        settings = self._settings
        return GatePolicy(
            mode=settings.baseline_mode,
            tolerances=tolerances,
            prior=NOISE_PRIORS[settings.platform],
            starts=settings.starts if settings.base is None else _STARTS_IN_PAIRS,
            budget_s=settings.budget_s,
            may_write=settings.may_write,
        )

    def told(self, spec: ServerSpec) -> str:
        """Say whether the links of a server's devices are slow themselves; ``""`` where they were not probed.

        A probe that no gate has judged is compared with what is stored now.
        """
        of_server = (spec.layout, spec.devices)
        for key, judgement in self._judged.items():
            if key[:2] == of_server:
                return told_of_links(judgement.verdict, judgement.bandwidth.findings)
        for (key, _), (placed, measurement) in self._measured.items():
            if key[:2] == of_server:
                bandwidth = judge_bandwidth(measurement, placed.topology, placed.placement)
                return told_of_links(self._compared(measurement), bandwidth.findings)
        return ""

    def _compared(self, measurement: CollectiveMeasurement) -> Verdict:
        from pytest_gpulayout.adapters.host import utc_now

        if problems := measurement.problems():
            return _unjudged(measurement, problems[0])
        try:
            baseline = load_baseline(self._wiring.store(), measurement.identity.key)
        except BaselineError as error:
            return _unjudged(measurement, _first_line(error), error.path)
        if baseline is None:
            return _unjudged(measurement, "no baseline of it is stored")
        policy = self._policy(probe_tolerances(self._settings.tolerances))
        starts = len(measurement.runs)
        return judge_once(measurement, baseline, policy, Look(starts, starts), today=utc_now()[:10])


def _key(placed: PlacedLayout) -> _Key:
    return placed.layout, placed.devices, placed.moe


def _unjudged(measurement: CollectiveMeasurement, reason: str, place: str = "") -> Verdict:
    """No verdict, with the numbers all the same."""
    shown = advisory_changes(measurement, None)
    return Verdict(Status.NO_BASELINE, reasons=(reason,), advisory=shown, baseline_path=place)


def _first_line(error: BaselineError) -> str:
    return str(error).partition("\n")[0]
