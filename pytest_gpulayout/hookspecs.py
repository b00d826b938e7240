"""Hooks by which a conftest or another plugin replaces a part of the gate. Each is called once per run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_gpulayout.layout import Layout
    from pytest_gpulayout.ports import (
        CollectiveProbe,
        GpuProcessSource,
        LoadDriver,
        NodeSource,
        ServerLauncher,
        TopologySource,
    )
    from pytest_gpulayout.settings import Settings

__all__ = [
    "pytest_gpulayout_collective_probe",
    "pytest_gpulayout_gpu_processes",
    "pytest_gpulayout_load_driver",
    "pytest_gpulayout_node_source",
    "pytest_gpulayout_server_launcher",
    "pytest_gpulayout_topology_source",
]


@pytest.hookspec(firstresult=True)
def pytest_gpulayout_topology_source(settings: Settings, layout: Layout | None) -> TopologySource | None:
    """Return where devices and links come from; called for each layout, and with ``None`` for the header.

    Example: every test runs on a machine that is described in code::

        def pytest_gpulayout_topology_source(settings, layout):
            return FakeTopologySource(gpus=8, link="NV18")
    """


@pytest.hookspec(firstresult=True)
def pytest_gpulayout_server_launcher(settings: Settings, log_dir: Path) -> ServerLauncher | None:
    """Return what starts servers.

    Example: servers are started by the site's own tool::

        def pytest_gpulayout_server_launcher(settings, log_dir):
            return KubernetesLauncher(namespace="ci", log_dir=log_dir)
    """


@pytest.hookspec(firstresult=True)
def pytest_gpulayout_gpu_processes(settings: Settings) -> GpuProcessSource | None:
    """Return what lists the processes on the GPUs for the servers that vLLM's own launcher starts.

    Example: a site whose containers may not ask NVML, but an agent on the host::

        def pytest_gpulayout_gpu_processes(settings):
            return AgentProcesses("http://127.0.0.1:9400")
    """


@pytest.hookspec(firstresult=True)
def pytest_gpulayout_collective_probe(settings: Settings, log_dir: Path) -> CollectiveProbe | None:
    """Return what measures the links between the ranks before a server starts.

    Example: a site that has its own way of running nccl-tests::

        def pytest_gpulayout_collective_probe(settings, log_dir):
            return NcclTests("/opt/nccl-tests/build/all_reduce_perf", log_dir)
    """


@pytest.hookspec(firstresult=True)
def pytest_gpulayout_node_source(settings: Settings, layout: Layout) -> NodeSource | None:
    """Return what finds the hosts of layouts over several nodes; called until it answers, once per run then.

    Example: pods of a site's own scheduler, each reached by a command::

        def pytest_gpulayout_node_source(settings, layout):
            pods = allocate_pods(layout.nodes, gpus=layout.gpus_per_node)
            return CommandNodes(pods, ("kubectl", "exec", "-i", "{node}", "--"), "/usr/bin/python3")
    """


@pytest.hookspec(firstresult=True)
def pytest_gpulayout_load_driver(settings: Settings) -> LoadDriver | None:
    """Return what sends the load.

    It is not calibrated, and nothing but its own word is known of server and devices: what it puts into
    ``RunTrace.observations`` and ``BatchTrace.clients`` is judged, and what it leaves out is not.

    Example: a unit test of a suite, without any server::

        def pytest_gpulayout_load_driver(settings):
            return FakeLoadDriver(ttft_ms=20, tpot_ms=5)
    """
