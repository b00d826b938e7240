"""Which adapters a run uses: those that a hook names, else those that the options ask for.

Adapters are imported when they are used; some need packages or libraries that not every run has.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

    from pytest_gpulayout.layout import Layout
    from pytest_gpulayout.ports import BaselineStore, GpuProcessSource, LoadDriver, ServerLauncher, TopologySource
    from pytest_gpulayout.settings import Settings


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

    def driver(self) -> LoadDriver:
        """What sends the load."""
        driver: LoadDriver | None = self._hook.pytest_gpulayout_load_driver(settings=self._settings)
        if driver is not None:
            return driver
        from pytest_gpulayout.adapters.openai_stream import OpenAiStreamDriver

        return OpenAiStreamDriver()

    def store(self) -> BaselineStore:
        """Where baselines are."""
        from pytest_gpulayout.adapters.baseline_files import open_baselines

        return open_baselines(self._settings.baseline_dir)
