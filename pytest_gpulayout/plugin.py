"""The pytest plugin: options, markers and fixtures. Thin, and light: nothing heavy is imported without a layout.

Fixtures call one function of the run's :class:`~pytest_gpulayout.session.GpuSession`, which exists only when
``--gpu-layout`` (or its ini key) names a layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from pytest_gpulayout import options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from pytest_gpulayout.collectives import CollectiveMeasurement, ProbePlan
    from pytest_gpulayout.gate import PlacedLayout
    from pytest_gpulayout.layout import Layout
    from pytest_gpulayout.layout_gates import PerfGate
    from pytest_gpulayout.links import LinkRequirement
    from pytest_gpulayout.measurement import Measurement
    from pytest_gpulayout.servers import ModelSpec, ServerView
    from pytest_gpulayout.session import GpuSession
    from pytest_gpulayout.tolerance import Tolerance
    from pytest_gpulayout.transport import TransportReport
    from pytest_gpulayout.verdict import Verdict
    from pytest_gpulayout.workload import Workload

SESSION = pytest.StashKey["GpuSession"]()

_NO_LAYOUT = "needs a GPU layout: run with --gpu-layout=tp1"
_MARKERS = (
    'gpu_layout(*specs, link=None): run for these layouts only, such as "tp2"; link is the worst link class allowed',
    'gpu_model(id, **vllm_args): serve this model, e.g. gpu_model("org/name", max_model_len=4096)',
    "gpu_workload(name_or_dict): measure this workload, a name or a dict with requests, concurrency, ...",
    "gpu_better_than(other, metric, factor=1): fail unless what the test measured is more than factor times as good "
    'as the same of another layout of this run, e.g. gpu_better_than("tp1", "request_throughput", 1.5)',
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    options.declare(parser)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Declare the hooks by which a conftest replaces parts of the gate."""
    from pytest_gpulayout import hookspecs

    pluginmanager.add_hookspecs(hookspecs)


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, and the session object where layouts were asked for.

    Not first: what comes after pytest's own ``--ff`` has the last word on the order of the tests.
    """
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)
    if not options.layouts_wanted(config):
        return
    from pytest_gpulayout.session import GpuSession
    from pytest_gpulayout.settings import settings_from_config

    session = GpuSession(config, settings_from_config(config))
    config.stash[SESSION] = session
    config.pluginmanager.register(session, "gpulayout-session")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests that need a layout when none was asked for."""
    if SESSION not in config.stash:
        reason = f"{_NO_LAYOUT} (without GPUs add --gpu-platform=cpu)"
        for item in items:
            is_marked = any(item.get_closest_marker(name) for name in ("gpu_layout", "gpu_better_than"))
            if is_marked or "gpu_layout" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def gpu_session(request: pytest.FixtureRequest) -> GpuSession:
    """The run's state; skips without ``--gpu-layout``. For plugins; tests use the fixtures below."""
    session = request.config.stash.get(SESSION, None)
    if session is None:
        pytest.skip(_NO_LAYOUT)
    return session


@pytest.fixture(scope="session")
def gpu_layout(request: pytest.FixtureRequest) -> Layout:
    """The layout under test; a test that uses it runs once for each layout of ``--gpu-layout``."""
    if SESSION not in request.config.stash:
        pytest.skip(_NO_LAYOUT)
    if not hasattr(request, "param"):
        pytest.fail("gpu_layout was asked for at run time: name it, or vllm_server, among the test's arguments")
    layout: Layout = request.param
    return layout


@pytest.fixture
def gpu_model(request: pytest.FixtureRequest, gpu_session: GpuSession) -> ModelSpec | None:
    """The model to serve: of the ``gpu_model`` marker, else of ``--gpu-model``. Override it to choose by code."""
    return gpu_session.model(request.node)


@pytest.fixture
def gpu_vllm_args(gpu_session: GpuSession) -> tuple[str, ...]:
    """More arguments for ``vllm serve``: those of ``--gpu-vllm-args``. Override it to add some by code."""
    return gpu_session.settings.vllm_args


@pytest.fixture
def gpu_link(request: pytest.FixtureRequest, gpu_session: GpuSession) -> LinkRequirement:
    """The worst link allowed: of the ``gpu_layout`` marker, else of ``--gpu-link``."""
    return gpu_session.link(request.node)


@pytest.fixture
def gpu_workload(request: pytest.FixtureRequest, gpu_session: GpuSession) -> Workload:
    """The workload to measure: of the ``gpu_workload`` marker, else of ``--gpu-workload``."""
    return gpu_session.workload(request.node)


@pytest.fixture
def gpu_tolerances(gpu_session: GpuSession) -> Mapping[str, Tolerance]:
    """The gated metrics and how much worse each may get: those of ``--gpu-tolerance``."""
    from pytest_gpulayout.collectives import serving_tolerances

    return serving_tolerances(gpu_session.settings.tolerances)


@pytest.fixture
def gpu_topology(
    request: pytest.FixtureRequest, gpu_session: GpuSession, gpu_layout: Layout, gpu_link: LinkRequirement
) -> PlacedLayout:
    """The devices chosen for the layout, in rank order, with the links between them and ``violations``."""
    return gpu_session.place(request.node, gpu_layout, gpu_link)


@pytest.fixture
def gpu_probe_plan(gpu_session: GpuSession, gpu_model: ModelSpec | None, gpu_vllm_args: tuple[str, ...]) -> ProbePlan:
    """What ``collective_probe`` sends: messages of the model's size. Override it to choose by code."""
    return gpu_session.probing.plan(gpu_model, gpu_vllm_args)


@pytest.fixture
def gpu_probe_tolerances(gpu_session: GpuSession) -> Mapping[str, Tolerance]:
    """How much worse each metric of the probe may get: 15 %, or as ``--gpu-tolerance`` says."""
    from pytest_gpulayout.collectives import probe_tolerances

    return probe_tolerances(gpu_session.settings.tolerances)


@pytest.fixture
def collective_probe(
    gpu_session: GpuSession, gpu_topology: PlacedLayout, gpu_probe_plan: ProbePlan
) -> CollectiveMeasurement:
    """Latency and bus bandwidth of an all-reduce between the layout's devices, measured before its server starts.

    Skips where no ranks talk to each other. A server that runs on the devices is stopped, and starts again when it is
    asked for: name this fixture before ``vllm_server``.
    """
    if reason := gpu_session.probing.why_not(gpu_topology):
        pytest.skip(reason)
    return gpu_session.probing.measure(gpu_topology, gpu_probe_plan)


@pytest.fixture
def collective_gate(
    request: pytest.FixtureRequest,
    gpu_session: GpuSession,
    gpu_topology: PlacedLayout,
    gpu_probe_tolerances: Mapping[str, Tolerance],
) -> Callable[[CollectiveMeasurement], Verdict]:
    """``collective_gate(collective_probe)`` judges links by the baseline and by what they are published to carry."""

    def collective_gate(measurement: CollectiveMeasurement) -> Verdict:
        return gpu_session.judge_links(request.node, measurement, gpu_topology, gpu_probe_tolerances)

    return collective_gate


@pytest.fixture
def vllm_server(
    request: pytest.FixtureRequest,
    gpu_session: GpuSession,
    gpu_topology: PlacedLayout,
    gpu_model: ModelSpec | None,
    gpu_vllm_args: tuple[str, ...],
) -> Iterator[ServerView]:
    """A running vLLM of the layout: ``url``, ``client``, ``log``, ``pids``; started once for tests that share it."""
    from pytest_gpulayout.servers import ServerView

    gpu_session.serve(request.node, gpu_topology, gpu_model, gpu_vllm_args)
    view = ServerView(gpu_session.servers)
    yield view
    view.close()
    gpu_session.servers.check()  # told by the test in which it went away, not by the next one


@pytest.fixture
def transport_report(
    request: pytest.FixtureRequest, gpu_session: GpuSession, gpu_topology: PlacedLayout, vllm_server: ServerView
) -> TransportReport:
    """What the ranks talk over, with evidence; fails on a transport that is not allowed and on missing evidence."""
    return gpu_session.transport(request.node, vllm_server.server, gpu_topology)


@pytest.fixture
def measure(
    request: pytest.FixtureRequest,
    gpu_session: GpuSession,
    gpu_topology: PlacedLayout,
    gpu_model: ModelSpec,
    gpu_vllm_args: tuple[str, ...],
    gpu_workload: Workload,
    vllm_server: ServerView,
) -> Callable[..., Measurement]:
    """``measure(workload=None)`` sends a workload (default: ``gpu_workload``) and returns the measurement."""
    from pytest_gpulayout.workload import as_workload

    def measure(workload: Workload | str | Mapping[str, object] | None = None) -> Measurement:
        wanted = gpu_workload if workload is None else as_workload(workload, gpu_session.settings.workloads)
        return gpu_session.measure(request.node, vllm_server.server, gpu_topology, gpu_model, gpu_vllm_args, wanted)

    return measure


@pytest.fixture
def perf_gate(
    request: pytest.FixtureRequest,
    gpu_session: GpuSession,
    vllm_server: ServerView,  # noqa: ARG001 - a verdict may need fresh starts of it
    gpu_tolerances: Mapping[str, Tolerance],
) -> PerfGate:
    """``perf_gate(measurement)`` judges against the baseline; fails on a regression, no baseline, invalid numbers.

    ``perf_gate.better_than(other, metric, factor)`` judges what was measured last against another layout of the run.
    """
    from pytest_gpulayout.layout_gates import PerfGate

    return PerfGate(
        lambda measurement: gpu_session.judge(request.node, measurement, gpu_tolerances),
        lambda claim: gpu_session.better_than(request.node, claim),
    )
