"""Starts layouts over several nodes (``@N``), and leaves all others to the launcher of one host.

The server itself is :mod:`~pytest_gpulayout.adapters.node_server`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from pytest_gpulayout.adapters.node_fleet import NodeFleet
from pytest_gpulayout.adapters.node_server import NodeServer
from pytest_gpulayout.errors import NodeLost, ServerStartFailed
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.ports import Progress, Server, ServerLauncher, ServerSpec


class NodeLauncher:
    """Launches servers over the nodes of a run.

    :param launcher: of layouts on one host. :param fleet: returns the nodes of a layout, or says that there are none.
    :param log_dir: an existing folder. :param wait_s: how long to wait for others to leave the devices.
    :param serve: makes a server.
    """

    def __init__(
        self,
        launcher: ServerLauncher,
        fleet: Callable[[Layout], NodeFleet],
        log_dir: Path,
        *,
        wait_s: float = 0.0,
        serve: Callable[..., NodeServer] = NodeServer,
    ) -> None:
        self._launcher = launcher
        self._fleet = fleet
        self._log_dir = log_dir
        self._wait_s = wait_s
        self._serve = serve
        self._started = 0

    def launch(self, spec: ServerSpec, progress: Progress) -> Server:
        """Start a server and return it once it has proved its layout, node by node.

        :raises NodeError: a node is missing, differs from the others, or is lost.
        :raises ServerError: it did not come up; nothing of it is left on any node.
        """
        if spec.layout.nodes == 1:
            return self._launcher.launch(spec, progress)
        if spec.python != sys.executable:
            raise ServerStartFailed(
                f"one Python on all nodes is required for {spec.layout}, found another to start: {spec.python}\n"
                "  in --gpu-base\n"
                "  compare arguments (--gpu-base-vllm-args), or run once for each Python: --gpu-node-python=PATH"
            )
        fleet = self._fleet(spec.layout)
        self._started += 1
        folder = self._log_dir / f"nodes-{self._started}-{spec.layout}"
        try:
            nodes = fleet.nodes(spec.layout, progress)
            fleet.topologies(spec.layout, progress)  # agents know devices by their indices in the last one
            server = self._serve(spec, folder, fleet, nodes, wait_s=self._wait_s)
            with ExitStack() as undo:
                undo.callback(server.stop)
                server.start(progress)
                undo.pop_all()
        except NodeLost:
            fleet.close()
            raise
        return server
