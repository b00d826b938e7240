"""One pytest run with layouts: its hooks, and what its fixtures ask for. Registered only when a layout was asked for.

Leaves choosing adapters to :mod:`~pytest_gpulayout.wiring`, the running server to :mod:`~pytest_gpulayout.servers`,
and measuring to :mod:`~pytest_gpulayout.performance`; keeps the records of what was found.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpulayout.collection import deselect_others, parametrize, server_group, sort_by_server
from pytest_gpulayout.errors import (
    BaselineError,
    EvidenceError,
    GpuLayoutError,
    LinkError,
    ServerError,
    TopologyError,
)
from pytest_gpulayout.evidence import collect_transport
from pytest_gpulayout.gate import PlacedLayout, place_layout, require_launchable
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.links import parse_requirement
from pytest_gpulayout.live import LiveLine
from pytest_gpulayout.measurement import Measurement
from pytest_gpulayout.options import gpu_options
from pytest_gpulayout.outcomes import fails_test, junit_properties, outcome_of
from pytest_gpulayout.performance import Performance
from pytest_gpulayout.ports import Server, ServerSpec
from pytest_gpulayout.report import (
    Record,
    devices_text,
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
from pytest_gpulayout.settings import Settings, model_of_marker, workload_of_marker
from pytest_gpulayout.topology import why_unusable
from pytest_gpulayout.transport import TransportReport, forbidden
from pytest_gpulayout.validity import Problem
from pytest_gpulayout.verdict import Status, Verdict
from pytest_gpulayout.wiring import Wiring

if TYPE_CHECKING:
    from pytest_gpulayout.links import LinkRequirement
    from pytest_gpulayout.occupancy import OccupancyReport
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
        self._records: list[tuple[str, Record]] = []
        self._placed: dict[tuple[Layout, LinkRequirement], PlacedLayout] = {}
        self._topologies: dict[Layout, Topology] = {}
        self._machine: Topology | None = None
        self._told: dict[str, str] = {}
        self._group: str | None = None
        self._item: pytest.Item | None = None
        self._disturbance = ""

    # -- hooks ---------------------------------------------------------------------------------------------------

    def pytest_report_header(self) -> list[str]:
        """Say what will be tested on what, with every version that belongs to a number."""
        from pytest_gpulayout.adapters.host import software_version

        layouts = ", ".join(map(str, self.settings.layouts))
        versions = ", ".join(
            f"{label} {software_version(name) or 'not installed'}"
            for label, name in (("vLLM", "vllm"), ("torch", "torch"), ("NCCL", "nccl"))
        )
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
        yield from self._messages_alone(item, at_end=self._assert_undisturbed)

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
        self.servers.stop()
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
        if self.settings.results_file is not None:
            terminalreporter.write_line(f"results: {self.settings.results_file}")

    # -- use cases, called by the fixtures -----------------------------------------------------------------------

    def model(self, item: pytest.Item) -> ModelSpec | None:
        """The model of a test: of its marker, else of the options, else none."""
        marker = item.get_closest_marker("gpu_model")
        if marker is not None:
            return model_of_marker(marker)
        return ModelSpec(self.settings.model) if self.settings.model else None

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
        key = (layout, requirement)
        if key not in self._placed:
            topology = self._topology(layout)
            try:
                self._placed[key] = place_layout(topology, layout, self.settings.devices, requirement)
            except TopologyError as error:  # too few devices for what was asked for
                raise GateBreached(str(error)) from error
            self.record(item, topology_record(self._placed[key]))
        return self._placed[key]

    def _topology(self, layout: Layout) -> Topology:
        """What there was before a server of the layout ran: later its own GPUs are busy with it."""
        if layout not in self._topologies:
            self._topologies[layout] = self._wiring.topology_source(layout).probe()
        return self._topologies[layout]

    def record(self, item: pytest.Item, record: Record) -> None:
        """Keep a finding for the summary and the results."""
        item.stash.setdefault(_RECORDS, []).append(record)
        if record["kind"] == "performance":
            item.stash.setdefault(_VERDICTS, []).append({"verdict": record["verdict"], "stored": record["stored"]})
            item.user_properties.extend(junit_properties(record))

    def serve(
        self, item: pytest.Item, placed: PlacedLayout, model: ModelSpec | None, arguments: tuple[str, ...]
    ) -> Server:
        """Return a running server of this layout, model and arguments.

        :raises GpuLayoutError: the links are too bad, the layout cannot be started, no model is named, or the
            server does not come up.
        """
        require_launchable(placed.layout)
        if model is None:
            raise ServerError(
                "a model to serve is required, found none\n  in the command line, the ini file and the markers\n"
                "  name one: --gpu-model=ID_OR_PATH, or @pytest.mark.gpu_model(...)"
            )
        placed.assert_links()
        known = self.servers.current
        server = self.servers.get(self._spec(placed, model, arguments))
        if server is not known:
            self.record(item, server_record(server))
        self.check_processes(item, server, is_new=server is not known)
        return server

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
        if report is None:
            raise EvidenceError(
                "evidence of the GPUs that the server's processes use was required, found none\n"
                f"  from the launcher of layout {server.spec.layout}: {type(server).__name__}.gpu_processes()\n"
                "  let it judge what a GpuProcessSource lists: pytest_gpulayout.occupancy.judge_occupancy(...)"
            )
        if is_new or report.violations:
            self.record(item, processes_record(server.spec.layout, report))
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
            devices=placed.devices,
            python=sys.executable,
            start_timeout_s=self.settings.start_timeout_s,
        )

    def transport(self, item: pytest.Item, server: Server, placed: PlacedLayout) -> TransportReport:
        """Collect the evidence of what the ranks talk over, and fail the test on what is forbidden or missing."""
        report = collect_transport(server, placed)
        violations = forbidden(report, self.settings.transports)
        record = transport_record(server.spec.layout, report, violations)
        self.record(item, record)
        if not record["ok"]:
            raise GateBreached(transport_failure(server.spec.layout, report, violations, self.settings.transports))
        return report

    def judge(self, item: pytest.Item, measurement: Measurement, tolerances: Mapping[str, Tolerance]) -> Verdict:
        """Judge a measurement, record the verdict, and fail the test on what is no pass and no matter of policy."""
        if self.settings.base is not None and self.settings.baseline_mode != "off":
            return self._judge_in_pairs(item, measurement, tolerances, self.settings.base.name)
        try:
            verdict, measurement = self.performance.judge(measurement, tolerances)
        except BaselineError as error:
            reasons = (str(error).partition("\n")[0],)
            verdict = Verdict(Status.NO_BASELINE, reasons=reasons, baseline_path=error.path)
            self.record(item, performance_record(verdict, measurement))
            raise
        self.record(item, performance_record(verdict, measurement))
        self._assert_no_breach(verdict, measurement, self._update_command(item))
        return verdict

    def _judge_in_pairs(
        self, item: pytest.Item, measurement: Measurement, tolerances: Mapping[str, Tolerance], base: str
    ) -> Verdict:
        result = self.performance.judge_in_pairs(measurement, tolerances)
        of_base = None if result.base is None else (base, result.base)
        self.record(item, performance_record(result.verdict, result.candidate, of_base))
        accept = "let it be the base from now on (--gpu-base), or allow more (--gpu-tolerance)"
        self._assert_no_breach(result.verdict, result.candidate, accept)
        return result.verdict

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
            placed = next((p for p in self._placed.values() if p.devices == spec.devices), None)
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

    def _machine_text(self) -> str:
        from pytest_gpulayout.adapters.host import cpu_summary

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
            self._records,
            created=utc_now(),
            platform=self.settings.platform,
            version=version("pytest-gpulayout"),
        )
        problems = validate(document, "results")
        assert not problems, problems
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
