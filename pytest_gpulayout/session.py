"""One pytest run with layouts: its hooks, and what its fixtures ask for. Registered only when a layout was asked for.

Leaves choosing adapters to :mod:`~pytest_gpulayout.wiring`, the running server to :mod:`~pytest_gpulayout.servers`,
and measuring to :mod:`~pytest_gpulayout.performance`; keeps the records of what was found.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpulayout.attribution import with_links
from pytest_gpulayout.collection import BETTER_THAN, deselect_others, parametrize, server_group, sort_by_server
from pytest_gpulayout.errors import (
    BaselineError,
    EvidenceError,
    GpuLayoutError,
    LinkError,
    NodeError,
    ServerError,
    TopologyError,
)
from pytest_gpulayout.evidence import collect_transport
from pytest_gpulayout.gate import PlacedLayout, place_layout, place_on_nodes, require_launchable, require_model_fits
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.layout_gates import LayoutGates, unjudged
from pytest_gpulayout.links import parse_requirement
from pytest_gpulayout.live import LiveLine
from pytest_gpulayout.measurement import Measurement
from pytest_gpulayout.options import gpu_options
from pytest_gpulayout.outcomes import fails_test, junit_properties, outcome_of, relative_properties
from pytest_gpulayout.performance import Performance
from pytest_gpulayout.ports import Server, ServerSpec
from pytest_gpulayout.probing import Probing
from pytest_gpulayout.relative import relative_lines, relative_record
from pytest_gpulayout.report import (
    Record,
    collectives_record,
    devices_text,
    link_speed_failure,
    naming_nodes,
    performance_record,
    processes_failure,
    processes_record,
    results_document,
    server_record,
    summary_lines,
    topology_record,
    transport_failure,
    transport_record,
    verdict_lines,
)
from pytest_gpulayout.servers import ModelSpec, ServerOwner
from pytest_gpulayout.settings import Settings, claim_of_marker, model_of_marker, workload_of_marker
from pytest_gpulayout.topology import why_unusable
from pytest_gpulayout.transport import TransportReport, forbidden
from pytest_gpulayout.validity import Problem
from pytest_gpulayout.verdict import Status, Verdict
from pytest_gpulayout.wiring import Wiring

if TYPE_CHECKING:
    from pytest_gpulayout.collectives import CollectiveMeasurement
    from pytest_gpulayout.links import LinkRequirement
    from pytest_gpulayout.occupancy import OccupancyReport
    from pytest_gpulayout.relative import Claim, RelativeVerdict
    from pytest_gpulayout.tolerance import Tolerance
    from pytest_gpulayout.topology import Topology
    from pytest_gpulayout.workload import Workload

_RECORDS = pytest.StashKey[list[Record]]()
_VERDICTS = pytest.StashKey[list[Record]]()
_BREACHED = pytest.StashKey[bool]()


class GateBreached(GpuLayoutError):
    """A verdict on its way to a failed test: what was asked for is not so, as opposed to: could not be found out."""


class GpuSession:
    """Hooks and use cases of one run."""

    def __init__(self, config: pytest.Config, settings: Settings) -> None:
        self.settings = settings
        self._config = config
        self._wiring = Wiring(config, settings)
        self.live = LiveLine(config)
        self.servers = ServerOwner(self._wiring.launcher, self.live)
        self.performance = Performance(settings, self._wiring, self.servers, self.live, self._follow_load)
        self.probing = Probing(settings, self._wiring, self.servers, self.live)
        self.layouts = self._layout_gates()
        self._records: list[tuple[str, Record]] = []
        self._placed: dict[tuple[Layout, LinkRequirement, bool], PlacedLayout] = {}
        self._topologies: dict[Layout, Topology] = {}
        self._machine: Topology | None = None
        self._told: dict[str, str] = {}
        self._group: str | None = None
        self._item: pytest.Item | None = None
        self._disturbance = ""

    def _layout_gates(self) -> LayoutGates:
        from pytest_gpulayout.adapters.host import utc_now

        return LayoutGates(
            self.settings,
            self._wiring,
            self.performance,
            self.servers,
            self.live,
            is_worker=hasattr(self._config, "workerinput"),
            began_utc=utc_now(),
        )

    # -- hooks ---------------------------------------------------------------------------------------------------

    def pytest_report_header(self) -> list[str]:
        """Say what will be tested on what, with every version that belongs to a number."""
        from pytest_gpulayout.adapters.host import software_version

        layouts = ", ".join(map(str, self.settings.layouts))
        versions = ", ".join(
            f"{label} {software_version(name) or 'not installed'}"
            for label, name in (("vLLM", "vllm"), ("torch", "torch"), ("NCCL", "nccl"))
        )
        if self._wiring.attachment is not None:
            versions = "nothing is started here: the server is judged by what it says and shows"
        return [
            f"gpu layout: {layouts} on {self.settings.platform}, {self._machine_text()}",
            f"gpu layout: {versions}",
            f"gpu layout: {self._reference_text()}",
        ]

    def _reference_text(self) -> str:
        base = self.settings.base
        if base is not None and self.settings.baseline_mode != "off":
            return f"in pairs with base {base.name}, at most {self.settings.starts} starts of each side"
        return f"baselines in {self.settings.baseline_dir} ({self._baseline_text()})"

    def _baseline_text(self) -> str:
        mode = self.settings.baseline_mode
        return mode if self.settings.may_write else f"{mode}, nothing is written in CI"

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Refuse a run that cannot work before anything is started: no GPU and no explicit ``cpu``."""
        if session.config.option.collectonly or hasattr(session.config, "workerinput"):
            return
        try:
            if self._wiring.attachment is not None:
                self._wiring.attachment.check(self.settings.model)
            elif not self._is_all_elsewhere:
                self._probe_machine()
            self.performance.check_base()
        except GpuLayoutError as error:
            raise pytest.UsageError(str(error)) from error

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, None, None]:
        """Turn this package's errors in fixtures into their message alone."""
        self._disturbance = ""
        yield from self._messages_alone(item)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        """Turn this package's errors in a test into their message alone."""
        yield from self._messages_alone(item, at_end=partial(self._after_test, item))

    def _messages_alone(
        self, item: pytest.Item, at_end: Callable[[], None] = lambda: None
    ) -> Generator[None, None, None]:
        """Show an error without traceback, since its text is complete; what was told before is only referred to.

        :param at_end: called when there was no error.
        """
        self._item = item
        try:
            yield
            at_end()
        except GpuLayoutError as error:
            message = str(error)
            item.stash[_BREACHED] = isinstance(error, (GateBreached, LinkError, BaselineError))
        else:
            return
        told_by = self._told.setdefault(message, item.nodeid)
        if told_by != item.nodeid:
            message = f"{message.partition(chr(10))[0]}\n  (told in full by {told_by})"
        pytest.fail(message, pytrace=False)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, None, None]:
        """Stop the server after the last test, and before one that needs another: its devices are free then."""
        yield from self._messages_alone(item)
        self._group = server_group(item) or self._group
        next_group = server_group(nextitem) if nextitem is not None else ""
        if next_group is not None and next_group != self._group:
            self.servers.stop()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        """Give all tests of a layout to one worker of pytest-xdist."""
        from pytest_gpulayout.distribution import make_scheduler

        return make_scheduler(config, log, self.settings.layouts)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run tests that need a layout once for each."""
        parametrize(metafunc, self.settings.layouts)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
        """Leave out tests for other layouts, and put tests of one server side by side."""
        deselect_others(config, items)
        sort_by_server(items, self.settings.layouts)  # --stepwise leaves out what lies before the last failure
        yield
        sort_by_server(items, self.settings.layouts)

    def pytest_sessionfinish(self) -> None:
        """Leave nothing running, whatever way the run ended; write the results."""
        try:
            self.servers.stop()
        finally:
            self._wiring.close()
        self.live.clear()
        if self.settings.results_file is not None and not hasattr(self._config, "workerinput"):
            self._write_results(self.settings.results_file)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Attach the records of a test to its report, which pytest-xdist carries to the controller.

        A gate that was breached in a fixture counts as a failed test; pytest would call it an error.
        """
        report = yield
        if report.when == "setup" and report.failed and item.stash.get(_BREACHED, False):
            report.when = "call"
        records = item.stash.get(_RECORDS, [])
        if records:
            report.gpulayout = list(records)  # type: ignore[attr-defined]
            records.clear()
        verdicts = item.stash.get(_VERDICTS, [])
        if verdicts and report.when != "setup":  # what a fixture has asked the gate counts for the test
            report.gpulayout_verdicts = list(verdicts)  # type: ignore[attr-defined]
            verdicts.clear()
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect records, from this process or from a worker."""
        self._records += [(report.nodeid, record) for record in getattr(report, "gpulayout", [])]

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Give verdicts that are no pass their own letter and count."""
        return outcome_of(getattr(report, "gpulayout_verdicts", [])) if report.passed else None

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the table of all layouts."""
        if not self._records:
            return
        terminalreporter.write_sep("=", "gpu layout")
        for line in summary_lines(self._records):
            terminalreporter.write_line(line)
        for line in self.layouts.summary(self._records).lines:
            terminalreporter.write_line(line)
        if self.settings.results_file is not None:
            terminalreporter.write_line(f"results: {self.settings.results_file}")

    # -- use cases, called by the fixtures -----------------------------------------------------------------------

    def model(self, item: pytest.Item) -> ModelSpec | None:
        """The model of a test: of its marker, of the options, or of the server that already runs; else none."""
        marker, attachment = item.get_closest_marker("gpu_model"), self._wiring.attachment
        wanted: ModelSpec | None
        if marker is not None:
            wanted = model_of_marker(marker) if attachment is None else model_of_marker(marker, check=str)
        else:
            wanted = ModelSpec(self.settings.model) if self.settings.model else None
        if attachment is None:
            return wanted
        if wanted is None:
            return ModelSpec(attachment.served(None))
        return ModelSpec(attachment.served(wanted.name), wanted.arguments)

    def link(self, item: pytest.Item) -> LinkRequirement:
        """The link requirement of a test: of its marker, else of the options."""
        marker = item.get_closest_marker("gpu_layout")
        wanted = marker.kwargs.get("link") if marker is not None else None
        return self.settings.link if wanted is None else parse_requirement(wanted)

    def workload(self, item: pytest.Item) -> Workload:
        """The workload of a test: of its marker, else of the options."""
        marker = item.get_closest_marker("gpu_workload")
        return self.settings.workload if marker is None else workload_of_marker(marker, self.settings.workloads)

    def place(self, item: pytest.Item, layout: Layout, requirement: LinkRequirement) -> PlacedLayout:
        """Choose the devices of a layout; the same answer for the whole run."""
        moe = layout.dp > 1 and self._has_experts(item)
        key = (layout, requirement, moe)
        if key not in self._placed:
            try:
                self._placed[key] = self._place(layout, requirement, moe=moe)
            except (TopologyError, NodeError) as error:  # too few devices, or nodes, for what was asked for
                raise GateBreached(str(error)) from error
            for node in self._placed[key].on_nodes:
                self.record(item, topology_record(node))
        return self._placed[key]

    def _place(self, layout: Layout, requirement: LinkRequirement, *, moe: bool) -> PlacedLayout:
        if layout.nodes > 1 and self._wiring.attachment is None:
            require_launchable(layout, self.settings.platform)
            fleet = self._wiring.fleet(layout)
            if fleet is not None:
                topologies = fleet.topologies(layout, self.live.update)
                self.live.clear()
                return place_on_nodes(topologies, layout, self.settings.devices, requirement, moe=moe)
            if not self._wiring.describes_devices(layout):
                self._wiring.require_nodes(layout)
        topology = self._topology(layout)
        devices = self._requested_devices(topology, layout)
        return place_layout(topology, layout, devices, requirement, moe=moe)

    def _topology(self, layout: Layout) -> Topology:
        """What there was before a server of the layout ran: later its own GPUs are busy with it."""
        if layout not in self._topologies:
            attachment = self._wiring.attachment
            self._topologies[layout] = (
                self._wiring.topology_source(layout).probe() if attachment is None else attachment.topology_of(layout)
            )
        return self._topologies[layout]

    def _requested_devices(self, topology: Topology, layout: Layout) -> tuple[str, ...] | None:
        """Those of the options, else those that a server that already runs is on, else none: they are chosen."""
        attachment = self._wiring.attachment
        if attachment is None or self.settings.devices is not None:
            return self.settings.devices
        return attachment.devices_of(layout, topology)

    def record(self, item: pytest.Item, record: Record) -> None:
        """Keep a finding for the summary and the results."""
        item.stash.setdefault(_RECORDS, []).append(record)
        if record["kind"] in ("performance", "collectives"):
            item.stash.setdefault(_VERDICTS, []).append({"verdict": record["verdict"], "stored": record["stored"]})
            item.user_properties.extend(junit_properties(record))
        elif record["kind"] == "better-than":
            item.stash.setdefault(_VERDICTS, []).append({"verdict": record["verdict"], "stored": ""})
            item.user_properties.extend(relative_properties(record))

    def serve(
        self, item: pytest.Item, placed: PlacedLayout, model: ModelSpec | None, arguments: tuple[str, ...]
    ) -> Server:
        """Return a running server of this layout, model and arguments.

        :raises GpuLayoutError: the links are too bad, the layout cannot be started, no model is named, or the
            server does not come up.
        """
        if self._wiring.attachment is None:
            require_launchable(placed.layout, self.settings.platform)
        elif arguments:
            raise ServerError(
                f"no arguments were required for a server that already runs, found {shlex.join(arguments)}\n"
                "  from the fixture gpu_vllm_args\n  leave them out, or --gpu-server-url"
            )
        if model is None:
            raise ServerError(
                "a model to serve is required, found none\n  in the command line, the ini file and the markers\n"
                "  name one: --gpu-model=ID_OR_PATH, or @pytest.mark.gpu_model(...)"
            )
        if self._wiring.attachment is None:
            self._assert_model_fits(placed.layout, model, arguments)
        placed.assert_links()
        known = self.servers.current
        server = self.servers.get(self._spec(placed, model, arguments))
        if server is not known:
            self.record(item, server_record(server))
        self._assert_links_of_engines(item, placed, server)
        self.check_processes(item, server, is_new=server is not known)
        return server

    def _assert_model_fits(self, layout: Layout, model: ModelSpec, arguments: tuple[str, ...]) -> None:
        """Refuse a layout that the model's config.json shows to be impossible; what only vLLM knows, it says."""
        if layout.pp > 1 or layout.dp > 1 or layout.ep:
            from pytest_gpulayout.adapters.model_facts import sizes_of

            sizes = sizes_of(model.name, (*arguments, *model.arguments))
            require_model_fits(layout, sizes, self.settings.platform)

    def _has_experts(self, item: pytest.Item) -> bool:
        """Whether the model's config.json is at hand, before the start, and names experts."""
        from pytest_gpulayout.adapters.model_facts import sizes_of

        model = self.model(item)
        arguments = self.settings.vllm_args if model is None else (*self.settings.vllm_args, *model.arguments)
        return model is not None and bool(sizes_of(model.name, arguments).experts)

    def _assert_links_of_engines(self, item: pytest.Item, placed: PlacedLayout, server: Server) -> None:
        """Judge the links between data-parallel engines, too, where only the server has shown that they talk."""
        if server.proof.moe and not placed.moe:
            placed = placed.with_experts()
            for node in placed.on_nodes:
                self.record(item, topology_record(node))
            placed.assert_links()

    def check_processes(self, item: pytest.Item, server: Server, *, is_new: bool = False) -> None:
        """Fail the test when a rank is not on its GPU, or somebody is where nobody should be.

        :param is_new: record what was found even when nothing is wrong.
        """
        report = self._look_at_processes(item, server, is_new=is_new)
        if report is not None and report.violations:
            raise GateBreached(processes_failure(server.spec, report))

    def _look_at_processes(self, item: pytest.Item, server: Server, *, is_new: bool) -> OccupancyReport | None:
        """Return on which GPUs its processes compute, and record it when there is something to tell."""
        if server.spec.platform == "cpu":
            return None
        report = server.gpu_processes()
        if report is None and server.proof.is_attached:
            return None  # it stands among what is not proved
        if report is None:
            raise EvidenceError(
                "evidence of the GPUs that the server's processes use was required, found none\n"
                f"  from the launcher of layout {server.spec.layout}: {type(server).__name__}.gpu_processes()\n"
                "  let it judge what a GpuProcessSource lists: pytest_gpulayout.occupancy.judge_occupancy(...)"
            )
        if is_new or report.violations:
            self.record(item, naming_nodes(processes_record(server.spec.layout, report), server.proof))
        return report

    def _follow_load(self) -> tuple[Problem, ...]:
        """After each run of load: numbers count for nothing when somebody else computed on the GPUs meanwhile.

        :raises GateBreached: it is the server itself that is where it must not be.
        """
        server = self.servers.current
        if self._item is None or server is None:
            return ()
        report = self._look_at_processes(self._item, server, is_new=False)
        if report is None or not report.violations:
            return ()
        self._disturbance = processes_failure(server.spec, report)
        if any(violation.kind != "foreign" for violation in report.violations):
            raise GateBreached(self._disturbance)
        advice = "end it, or choose other GPUs: --gpu-devices=..."
        return tuple(Problem("foreign-process", f"{violation}; {advice}") for violation in report.violations)

    def _assert_undisturbed(self) -> None:
        """Fail a test that has measured beside somebody else and has not asked a gate, which would have told."""
        if self._disturbance:
            raise GateBreached(self._disturbance)

    def _spec(self, placed: PlacedLayout, model: ModelSpec, arguments: tuple[str, ...]) -> ServerSpec:
        return ServerSpec(
            layout=placed.layout,
            model=model.name,
            arguments=(*arguments, *model.arguments),
            platform=self.settings.platform,
            devices=placed.every_device,
            python=sys.executable,
            start_timeout_s=self.settings.start_timeout_s,
        )

    def transport(self, item: pytest.Item, server: Server, placed: PlacedLayout) -> TransportReport:
        """Collect the evidence of what the ranks talk over, and fail the test on what is forbidden or missing."""
        report = collect_transport(server, placed)
        violations = forbidden(report, self.settings.transports)
        record = naming_nodes(transport_record(server.spec.layout, report, violations), server.proof)
        self.record(item, record)
        if not record["ok"]:
            raise GateBreached(transport_failure(server.spec.layout, report, violations, self.settings.transports))
        return report

    def measure(
        self,
        item: pytest.Item,
        server: Server,
        placed: PlacedLayout,
        model: ModelSpec,
        arguments: tuple[str, ...],
        workload: Workload,
    ) -> Measurement:
        """Measure a workload on the running server, and know it when another layout is compared with this one."""
        measurement = self.performance.measure(server, placed, model, arguments, workload)
        self.layouts.note(item.nodeid, server.spec, measurement)
        return measurement

    def better_than(self, item: pytest.Item, claim: Claim) -> RelativeVerdict | None:
        """Judge what a test has measured last against another layout of this run, record and assert it.

        :returns: ``None`` where it is that layout itself: its numbers are kept, and it is shown as not judged.
        """
        own = self.layouts.last_of(item.nodeid)
        if own.layout == str(claim.other):
            self.layouts.replace_disturbed(own)
            self._keep_unjudged(item, f"measured for the layouts that are compared with {claim.other}", is_told=True)
            return None
        tests = [item.nodeid]
        try:
            judged = self.layouts.judge(own, claim)
            tests.append(judged.other_test)
        finally:
            self._keep_unjudged(item, f"measured for the comparison with {claim.other}", tests=tests)
        verdict = judged.verdict
        self.record(item, relative_record(verdict, judged.own.workload.to_document()))
        if verdict.status == "fail" or (verdict.status == "inconclusive" and self.settings.inconclusive == "fail"):
            raise GateBreached("\n".join(relative_lines(verdict, self._where(judged.own), judged.other_test)))
        return verdict

    def _keep_unjudged(
        self, item: pytest.Item, why: str, *, tests: Sequence[str] = (), is_told: bool = False
    ) -> None:
        """Record what was measured and not judged, so that the table of layouts has it.

        :param tests: that measured it, if not this one alone. :param is_told: the test shows that it was not judged.
        :raises GateBreached: it is told, and the numbers are invalid.
        """
        for measurement in self.layouts.unrecorded(*(tests or [item.nodeid])):
            self.layouts.recorded(measurement, measurement)
            if (verdict := unjudged(measurement, why)) is None:
                continue
            record = performance_record(verdict, measurement)
            if is_told:
                self.record(item, record)
                if verdict.status is Status.INVALID:
                    self._assert_no_breach(verdict, measurement, "")
            else:
                item.stash.setdefault(_RECORDS, []).append(record)

    def _after_test(self, item: pytest.Item) -> None:
        """Judge what the markers of a test claim, then look at what happened beside it."""
        breaches = []
        for marker in item.iter_markers(BETTER_THAN):
            try:
                self.better_than(item, claim_of_marker(marker))
            except GateBreached as breach:
                breaches.append(str(breach))
        if breaches:
            raise GateBreached("\n".join(breaches))
        self._assert_undisturbed()
        if len(self.settings.layouts) > 1:
            self._keep_unjudged(item, "measured, and no gate was asked")

    def judge(self, item: pytest.Item, measurement: Measurement, tolerances: Mapping[str, Tolerance]) -> Verdict:
        """Judge a measurement, record the verdict, and fail the test on what is no pass and no matter of policy."""
        if self.settings.base is not None and self.settings.baseline_mode != "off":
            return self._judge_in_pairs(item, measurement, tolerances, self.settings.base.name)
        before = measurement
        try:
            verdict, measurement = self.performance.judge(measurement, tolerances)
        except BaselineError as error:
            reasons = (str(error).partition("\n")[0],)
            verdict = Verdict(Status.NO_BASELINE, reasons=reasons, baseline_path=error.path)
            self.record(item, performance_record(verdict, measurement))
            self.layouts.recorded(before, before)
            raise
        verdict = self._beside_links(verdict)
        self.record(item, performance_record(verdict, measurement))
        self.layouts.recorded(before, measurement)
        self._assert_no_breach(verdict, measurement, self._update_command(item))
        return verdict

    def _judge_in_pairs(
        self, item: pytest.Item, measurement: Measurement, tolerances: Mapping[str, Tolerance], base: str
    ) -> Verdict:
        result = self.performance.judge_in_pairs(measurement, tolerances)
        result = replace(result, verdict=self._beside_links(result.verdict))
        of_base = None if result.base is None else (base, result.base)
        self.record(item, performance_record(result.verdict, result.candidate, of_base))
        self.layouts.recorded(measurement, result.candidate)
        accept = "let it be the base from now on (--gpu-base), or allow more (--gpu-tolerance)"
        self._assert_no_breach(result.verdict, result.candidate, accept)
        return result.verdict

    def _beside_links(self, verdict: Verdict) -> Verdict:
        """Add to the cause of what moved whether the links themselves were slower, where they were probed."""
        spec = self.servers.wanted
        if spec is None or not verdict.cause:
            return verdict
        return replace(verdict, cause=with_links(verdict.cause, self.probing.told(spec)))

    def judge_links(
        self,
        item: pytest.Item,
        measurement: CollectiveMeasurement,
        placed: PlacedLayout,
        tolerances: Mapping[str, Tolerance],
    ) -> Verdict:
        """Judge a probe of the links, record the verdict, and fail the test on a link that is slow or got slower."""
        judged = self.probing.judge(measurement, placed, tolerances)
        verdict, plan = judged.verdict, judged.measurement.plan
        self.record(item, collectives_record(placed.layout, verdict, judged.measurement, judged.bandwidth))
        where = f"layout {placed.layout} on {devices_text(placed)}, hidden size {plan.hidden_size}, {plan.dtype}"
        if judged.bandwidth.findings:
            raise GateBreached(link_speed_failure(judged.bandwidth, where))
        if judged.error is not None:
            raise judged.error
        is_left_open = verdict.status is Status.NO_BASELINE and self.settings.base is not None
        if fails_test(verdict, self.settings) and not is_left_open:
            raise GateBreached("\n".join(verdict_lines(verdict, where, self._update_command(item))))
        return verdict

    def _assert_no_breach(self, verdict: Verdict, measurement: Measurement, accept: str) -> None:
        if verdict.status is Status.INVALID:
            self._disturbance = ""  # it is among the reasons
        if fails_test(verdict, self.settings):
            raise GateBreached("\n".join(verdict_lines(verdict, self._where(measurement), accept)))

    def _where(self, measurement: Measurement) -> str:
        spec = self.servers.wanted
        key = measurement.identity.key
        devices = ""
        if spec is not None:
            placed = next((p for p in self._placed.values() if p.every_device == spec.devices), None)
            devices = f" on {devices_text(placed)}" if placed else ""
        return f"layout {key.layout}{devices}, model {key.model['name']}, workload {key.workload['name']}"

    def _update_command(self, item: pytest.Item) -> str:
        """The command that accepts this test's numbers and no others: the options of this run, and this test."""
        invocation = self._config.invocation_params
        options = gpu_options(invocation.args)
        words = [option for option in options if not option.startswith(("--gpu-baseline=", "--gpu-results="))]
        if self._config.option.inifilename:
            words += ["-c", str(self._config.option.inifilename)]
        name = item.nodeid.partition("::")[2]
        if item.path.is_relative_to(self._config.rootpath):
            test = [f"{os.path.relpath(item.path, invocation.dir)}::{name}"]
        else:  # a test of an installed package has no path that pytest would take
            test = ["--pyargs", f"{item.getparent(pytest.Module).obj.__name__}::{name}"]  # type: ignore[union-attr]
        return shlex.join(["pytest", *words, "--gpu-baseline=update", *test])

    def _probe_machine(self) -> Topology:
        """What there is, for the header and for the check that there is anything; asked once."""
        self._machine = self._machine or self._wiring.topology_source(None).probe()
        return self._machine

    @property
    def _is_all_elsewhere(self) -> bool:
        """Whether every layout runs on nodes that the options name, so that this host needs no GPU."""
        return bool(self.settings.nodes.names) and all(layout.nodes > 1 for layout in self.settings.layouts)

    def _machine_text(self) -> str:
        from pytest_gpulayout.adapters.host import cpu_summary

        if self._wiring.attachment is not None:
            return self._wiring.attachment.summary()
        if self._is_all_elsewhere:
            return f"nodes {', '.join(self.settings.nodes.names)}"
        try:
            topology = self._probe_machine()
        except GpuLayoutError as error:
            return str(error).partition("\n")[0]
        if topology.platform == "cpu":
            return f"{cpu_summary()} (vLLM's CPU build)"
        usable = topology.usable
        names = ", ".join(dict.fromkeys(device.name or "unknown GPU" for device in usable)) or "usable GPU"
        pairs = list(topology.links)
        worst = topology.worst(pairs) if pairs else None
        source = f"recorded in {topology.source}" if topology.recorded else f"driver {topology.driver_version}"
        others = [f"GPU {d.index} not usable ({why_unusable(d)})" for d in topology.devices if not d.is_usable]
        return ", ".join([f"{len(usable)} x {names}", f"worst link {worst or 'none'}", source, *others])

    def _write_results(self, path: Path) -> None:
        from importlib.metadata import version

        from pytest_gpulayout.adapters.host import utc_now
        from pytest_gpulayout.schemas import validate

        document = results_document(
            [*self._records, *(("", record) for record in self.layouts.summary(self._records).records)],
            created=utc_now(),
            platform=self.settings.platform,
            version=version("pytest-gpulayout"),
        )
        problems = validate(document, "results")
        assert not problems, problems
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
