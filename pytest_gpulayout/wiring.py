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

    from pytest_gpulayout.adapters.base_side import BasePython, BaseServer
    from pytest_gpulayout.layout import Layout
    from pytest_gpulayout.ports import (
        BaselineStore,
        Calibrator,
        GpuProcessSource,
        LoadDriver,
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

    def topology_source(self, layout: Layout | None) -> TopologySource:
        """Where devices come from. :param layout: whose ranks share the cores on the CPU platform."""
        source: TopologySource | None = self._hook.pytest_gpulayout_topology_source(
            settings=self._settings, layout=layout
        )
        if source is not None:
            return source
        if self._settings.topology_file is not None:
            from pytest_gpulayout.adapters.recorded_topology import RecordedTopology

            return RecordedTopology(self._settings.topology_file)
        if self._settings.platform == "cpu":
            from pytest_gpulayout.adapters.cpu_host import BIND_VARIABLE, CpuTopology

            return CpuTopology(layout.ranks if layout else 1, os.environ.get(BIND_VARIABLE))
        from pytest_gpulayout.adapters.nvml import NvmlTopology

        return NvmlTopology()

    def launcher(self) -> ServerLauncher:
        """What starts servers; their logs lie in pytest's own temporary folder, which it keeps for a while."""
        factory: pytest.TempPathFactory = self._config._tmp_path_factory  # type: ignore[attr-defined]
        log_dir: Path = factory.mktemp("gpulayout")
        launcher: ServerLauncher | None = self._hook.pytest_gpulayout_server_launcher(
            settings=self._settings, log_dir=log_dir
        )
        if launcher is not None:
            return launcher
        from pytest_gpulayout.adapters.vllm_process import VllmLauncher

        return VllmLauncher(log_dir, self.gpu_processes(), wait_s=self._settings.wait_s)

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

        spec, pids = server.spec, tuple(server.proof.rank_pids.values())
        cpus = client_cpus(os.sched_getaffinity(0), cores_of(server))
        return Observer(
            OpenAiStreamDriver(cpus=cpus),
            calibrator=self._calibrator,
            watch_server=partial(ServerWatch, log=server.log),
            watch_devices=lambda: TelemetryWatch(spec.platform, spec.devices, server_pids=pids),
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
