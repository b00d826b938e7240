"""Which adapters a run uses: those that a hook names, else those that the options ask for.

Adapters are imported when they are used; some need packages or libraries that not every run has.
"""

from __future__ import annotations

import os
import sys
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gpulayout.observing import Observer, client_cpus

if TYPE_CHECKING:
    import pytest

    from pytest_gpulayout.adapters.attached_server import Attachment
    from pytest_gpulayout.adapters.base_side import BasePython, BaseServer
    from pytest_gpulayout.adapters.node_fleet import NodeFleet
    from pytest_gpulayout.adapters.node_server import NodeServer
    from pytest_gpulayout.adapters.ray_nodes import RayNodes
    from pytest_gpulayout.layout import Layout
    from pytest_gpulayout.ports import (
        BaselineStore,
        Calibrator,
        CollectiveProbe,
        GpuProcessSource,
        LoadDriver,
        NodeSource,
        Server,
        ServerLauncher,
        TopologySource,
    )
    from pytest_gpulayout.settings import BaseChoice, Settings


class Wiring:
    """Makes the adapters of one run."""

    def __init__(self, config: pytest.Config, settings: Settings) -> None:
        self._config = config
        self._settings = settings
        self._hook: Any = config.hook  # hooks are found by name, so their types are not
        self._fleet: NodeFleet | None = None
        self._ray: RayNodes | None = None

    @cached_property
    def attachment(self) -> Attachment | None:
        """The server that somebody else runs and that is gated in place of one of ours; else nothing."""
        choice = self._settings.attach
        if choice is None:
            return None
        from pytest_gpulayout.adapters.attached_server import Attachment
        from pytest_gpulayout.adapters.nvml import NvmlTopology

        return Attachment(
            choice.url,
            self._settings.platform,
            nccl_logs=choice.nccl_logs,
            recorded=self._described_topology(self._settings.layouts[0]),
            gpus=NvmlTopology,
            gpu_processes=self.gpu_processes,
        )

    def topology_source(self, layout: Layout | None) -> TopologySource:
        """Where devices come from. :param layout: whose ranks share the cores on the CPU platform."""
        source = self._described_topology(layout)
        if source is not None:
            return source
        if self._settings.platform == "cpu":
            from pytest_gpulayout.adapters.cpu_host import BIND_VARIABLE, CpuTopology

            return CpuTopology(layout.gpus_per_node if layout else 1, os.environ.get(BIND_VARIABLE))
        from pytest_gpulayout.adapters.nvml import NvmlTopology

        return NvmlTopology()

    def describes_devices(self, layout: Layout) -> bool:
        """Whether a hook or a file says what devices there are, so that nobody looks for them."""
        return self._described_topology(layout) is not None

    def _described_topology(self, layout: Layout | None) -> TopologySource | None:
        """What a hook or a file says of the devices; nothing to look at them."""
        source: TopologySource | None = self._hook.pytest_gpulayout_topology_source(
            settings=self._settings, layout=layout
        )
        if source is not None or self._settings.topology_file is None:
            return source
        from pytest_gpulayout.adapters.recorded_topology import RecordedTopology

        return RecordedTopology(self._settings.topology_file)

    def launcher(self) -> ServerLauncher:
        """What starts servers; their logs lie in pytest's own temporary folder, which it keeps for a while."""
        if self.attachment is not None:
            return self.attachment
        factory: pytest.TempPathFactory = self._config._tmp_path_factory  # type: ignore[attr-defined]
        log_dir: Path = factory.mktemp("gpulayout")
        launcher: ServerLauncher | None = self._hook.pytest_gpulayout_server_launcher(
            settings=self._settings, log_dir=log_dir
        )
        if launcher is not None:
            return launcher
        from pytest_gpulayout.adapters.node_launcher import NodeLauncher
        from pytest_gpulayout.adapters.replica_launcher import ReplicaLauncher
        from pytest_gpulayout.adapters.vllm_process import VllmLauncher

        wait_s = self._settings.wait_s
        of_one_host = ReplicaLauncher(VllmLauncher(log_dir, self.gpu_processes(), wait_s=wait_s))
        return NodeLauncher(of_one_host, self.require_nodes, log_dir, wait_s=wait_s, serve=self._serve_nodes)

    def fleet(self, layout: Layout) -> NodeFleet | None:
        """The nodes of a layout over several, ``None`` where nobody names any."""
        if self._fleet is None and (source := self._node_source(layout)) is not None:
            from pytest_gpulayout.adapters.node_fleet import NodeFleet

            self._fleet = NodeFleet(source, self._settings.platform, master_addr=self._settings.nodes.master_addr)
        return self._fleet

    def require_nodes(self, layout: Layout) -> NodeFleet:
        """The nodes of a layout over several.

        :raises NodeError: nobody names any.
        """
        if (fleet := self.fleet(layout)) is not None:
            return fleet
        from pytest_gpulayout.errors import NodeError

        raise NodeError(
            f"layout {layout} needs {layout.nodes} nodes, found none\n"
            "  in --gpu-nodes (ini: gpulayout_nodes), RAY_ADDRESS and the hook pytest_gpulayout_node_source\n"
            "  name them: --gpu-nodes=local,NAME; they are reached by ssh, or by --gpu-node-command=...",
            node="number 1",
        )

    def _node_source(self, layout: Layout) -> NodeSource | None:
        source: NodeSource | None = self._hook.pytest_gpulayout_node_source(settings=self._settings, layout=layout)
        choice = self._settings.nodes
        if source is None and not choice.names:
            self._ray = self._ray_nodes()
            return self._ray
        if source is not None:
            return source
        from pytest_gpulayout.adapters.node_command import CommandNodes

        return CommandNodes(choice.names, choice.command, choice.python)

    def _ray_nodes(self) -> RayNodes | None:
        """The nodes of the Ray cluster that the environment names, ``None`` where it names none."""
        from pytest_gpulayout.ray_placement import ADDRESS_VARIABLE, executor_of

        address = os.environ.get(ADDRESS_VARIABLE, "").strip()
        if not address:
            return None
        from pytest_gpulayout.adapters.ray_nodes import NODE_PYTHON, RayNodes

        widest = max(layout.gpus_per_node for layout in self._settings.layouts if layout.nodes > 1)
        python = self._settings.nodes.python
        return RayNodes(
            address,
            widest if self._settings.platform == "cuda" else 0,
            executor=executor_of(os.environ),
            node_python=NODE_PYTHON if python == sys.executable else python,
        )

    def _serve_nodes(self, *what: Any, **more: Any) -> NodeServer:
        """Make a server over several nodes: through Ray on the GPUs of its cluster, else in vLLM's native way."""
        if self._ray is not None and self._settings.platform == "cuda":
            from pytest_gpulayout.adapters.ray_server import RayServer

            return RayServer(*what, ray=self._ray, **more)
        from pytest_gpulayout.adapters.node_server import NodeServer

        return NodeServer(*what, **more)

    def close(self) -> None:
        """Let the nodes go, if there are any."""
        if self._fleet is not None:
            self._fleet.close()

    def collective_probe(self) -> CollectiveProbe:
        """What probes links; what its ranks leave lies beside the logs of servers."""
        factory: pytest.TempPathFactory = self._config._tmp_path_factory  # type: ignore[attr-defined]
        log_dir: Path = factory.mktemp("gpulayout-probe")
        probe: CollectiveProbe | None = self._hook.pytest_gpulayout_collective_probe(
            settings=self._settings, log_dir=log_dir
        )
        if probe is not None:
            return probe
        from pytest_gpulayout.adapters.collective_probe import TorchProbe

        return TorchProbe(log_dir, self.gpu_processes(), wait_s=self._settings.wait_s)

    def gpu_processes(self) -> GpuProcessSource | None:
        """What lists the processes on the GPUs, also where the topology is a recorded one; nothing without GPUs."""
        if self._settings.platform == "cpu":
            return None
        source: GpuProcessSource | None = self._hook.pytest_gpulayout_gpu_processes(settings=self._settings)
        if source is not None:
            return source
        from pytest_gpulayout.adapters.nvml_processes import NvmlProcesses

        return NvmlProcesses()

    def observer(self, server: Server) -> Observer:
        """What sends the load to a server and watches both; a driver that a hook names does its own watching."""
        if self._users_driver is not None:
            return Observer(self._users_driver)
        from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver
        from pytest_gpulayout.adapters.server_watch import ServerWatch
        from pytest_gpulayout.adapters.telemetry_watch import TelemetryWatch

        if (watched := self._watched_nodes(server)) is not None:
            return watched
        spec, pids = server.spec, tuple(server.proof.rank_pids.values())
        cpus = client_cpus(os.sched_getaffinity(0), cores_of(server))
        parts = server.parts()
        replicas = tuple(part.endpoint.url for part in parts) if len(parts) > 1 else ()
        logs = tuple(part.log for part in parts if part.log is not None)

        def watch_devices() -> TelemetryWatch:
            return TelemetryWatch(spec.platform, spec.devices, server_pids=pids)

        is_out_of_sight = self.attachment is not None and not self.attachment.sees_devices
        return Observer(
            OpenAiStreamDriver(cpus=cpus),
            calibrator=self._calibrator,
            watch_server=partial(ServerWatch, logs=logs, replicas=replicas),
            watch_devices=None if is_out_of_sight else watch_devices,
        )

    def _watched_nodes(self, server: Server) -> Observer | None:
        """What watches a server over several nodes, whose processes are not of this host; nothing for others."""
        if server.spec.layout.nodes == 1:
            return None
        from pytest_gpulayout.adapters.node_server import NodeServer
        from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver

        if not isinstance(server, NodeServer):
            return None
        return Observer(
            OpenAiStreamDriver(),
            calibrator=self._calibrator,
            watch_server=server.watch,
            watch_devices=server.watch_devices,
        )

    def observer_of_url(self) -> Observer:
        """What sends the load to a server that runs elsewhere: neither its log nor its devices are seen."""
        if self._users_driver is not None:
            return Observer(self._users_driver)
        from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver
        from pytest_gpulayout.adapters.server_watch import ServerWatch

        return Observer(OpenAiStreamDriver(), calibrator=self._calibrator, watch_server=ServerWatch)

    def base_python(self, choice: BaseChoice) -> BasePython:
        """The other Python of paired mode, and which versions it has; of the one that runs now they are known."""
        from pytest_gpulayout.adapters.base_side import BasePython, find_base_python

        if choice.python == sys.executable:
            return BasePython(choice.name, choice.python, {})
        if choice.python not in self._base_pythons:
            self._base_pythons[choice.python] = find_base_python(choice.name, choice.python)
        return self._base_pythons[choice.python]

    @cached_property
    def _base_pythons(self) -> dict[str, BasePython]:
        return {}

    def base_server(self, choice: BaseChoice) -> BaseServer:
        """The server that already runs, as it answers now."""
        from pytest_gpulayout.adapters.base_side import find_base_server

        return find_base_server(choice.url)

    @cached_property
    def _users_driver(self) -> LoadDriver | None:
        driver: LoadDriver | None = self._hook.pytest_gpulayout_load_driver(settings=self._settings)
        return driver

    @cached_property
    def _calibrator(self) -> Calibrator:
        """One for the run, since it remembers what it measured."""
        from pytest_gpulayout.adapters.calibrator import MockCalibrator

        return MockCalibrator()

    def store(self) -> BaselineStore:
        """Where baselines are."""
        from pytest_gpulayout.adapters.baseline_files import open_baselines

        return open_baselines(self._settings.baseline_dir)


def cores_of(server: Server) -> set[int]:
    """Cores that the ranks are bound to: on the CPU platform as they were told, since each of their threads has its
    own; else as the system says, which is all of them where nobody bound them.
    """
    from pytest_gpulayout.adapters.cpu_host import parse_cpus

    cores: set[int] = set()
    if server.spec.platform == "cpu":
        for device in server.spec.devices:
            cores |= set(parse_cpus(device.cpu_affinity or ""))
        return cores
    for pid in server.proof.rank_pids.values():
        try:
            cores |= os.sched_getaffinity(pid)
        except OSError:  # it ended, or is not visible from here: nothing is known to be free
            return set()
    return cores
