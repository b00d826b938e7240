"""An agent on a node where Ray starts vLLM's workers: it starts the API server on the first one, and adopts the rest.

Run as ``python -m pytest_gpulayout.adapters.ray_agent``; it answers all that
:mod:`~pytest_gpulayout.adapters.node_agent` does, and

=========  =============================================================================================
start_ray  starts this node's part of a server: the API server on the first node, nothing on the others
=========  =============================================================================================

Workers are children of Ray, not of this agent, so no keeper ends them. Ray does when vLLM's engine has gone; what is
left of them after :data:`WORKERS_S` is killed, since it holds GPUs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from pytest_gpulayout.adapters import node_agent
from pytest_gpulayout.adapters.device_lock import DeviceLocks, LentLocks
from pytest_gpulayout.adapters.node_agent import NodeAgent
from pytest_gpulayout.adapters.node_part import NodePart, PartRequest
from pytest_gpulayout.adapters.vllm_process import NUMA_OPTION, GpuWatch
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.ray_placement import RAY_ARGUMENTS
from pytest_gpulayout.topology import Device

WORKERS_S = 40.0
"""How long workers may take to end once the server is asked to; that has 35 s for itself."""

_BESIDE_RAY = ("(vLLM's", "workers,", "started", "by", "Ray)")
# Ray's workers write NCCL's files where the whole cluster has a folder; they go with the agent, however that ends.
_SWEEPER = """
import glob, os, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdin.read()
for path in glob.glob(glob.escape(sys.argv[1]) + "*"):
    os.unlink(path)
"""


class RayPart(NodePart):
    """The processes of one node: those that Ray has started, and on the first node the API server.

    :param request: of the whole layout; its ``node_rank`` 0 is the first node.
    :param devices: in order of the node's ranks. :param folder: for its logs, which is made for it.
    """

    def __init__(
        self,
        request: PartRequest,
        devices: tuple[Device, ...],
        folder: Path,
        locks: DeviceLocks | LentLocks,
        watch: GpuWatch | None,
    ) -> None:
        of_one_host = str(replace(parse_layout(request["layout"]), nodes=1))
        super().__init__({**request, "layout": of_one_host, "node_rank": 0}, devices, folder, locks, watch)
        self.serves = request["node_rank"] == 0
        if self.serves:
            self.command = command_with_ray(self.command, request["arguments"])
        else:
            self.command, self.binding = list(_BESIDE_RAY), ""

    def begin(self) -> None:
        """Start the API server, where this is its node."""
        if self.serves:
            super().begin()
            return
        self.log.touch()
        shutil.rmtree(self._run_dir, ignore_errors=True)  # no keeper is there to do it later

    def adopt(self, pids: Sequence[int]) -> None:
        """Take processes for ranks of the server.

        :raises psutil.NoSuchProcess: one is not here.
        """
        super().adopt(pids)
        self._seen.update(pids)

    def pids(self) -> Mapping[int, str]:
        """Return the processes now, pid -> title; Ray gives its workers titles of its own."""
        found = dict(super().pids())
        for worker in self._ranks:
            try:
                found[worker.pid] = " ".join(worker.cmdline()).strip()
            except psutil.Error:
                continue
        return found

    def stop(self) -> None:
        """End the API server, and see that no worker outlives it; may be called again."""
        super().stop()
        _, alive = psutil.wait_procs(self._ranks, timeout=WORKERS_S)
        for worker in alive:
            try:
                worker.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(alive, timeout=WORKERS_S)


def command_with_ray(command: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Return the command of a server whose workers Ray starts.

    ``--numa-bind`` is left out: it binds processes that vLLM starts itself.

    :param command: of a server on one host. :param arguments: the user's own, which stay as they are, at its end.
    """
    own = len(command) - len(arguments)
    words, skipped = list[str](), False
    for word in command[:own]:
        skipped = word.startswith(NUMA_OPTION) or (skipped and not word.startswith("-"))
        if not skipped:
            words.append(word)
    behind_port = words.index("--port") + 2
    words[behind_port:behind_port] = RAY_ARGUMENTS
    return [*words, *command[own:]]


class RayAgent(NodeAgent):
    """Answers requests of one test run on a node of a Ray cluster. Close it: it ends what it has started."""

    def __init__(self) -> None:
        super().__init__()
        self._sweepers: list[subprocess.Popen[bytes]] = []

    def answer(self, method: str, arguments: Mapping[str, Any]) -> Any:
        """Do what is asked and return what JSON can hold; see :meth:`NodeAgent.answer`."""
        if method in _METHODS:
            return _METHODS[method](self, **arguments)
        return super().answer(method, arguments)

    def start_ray(
        self, request: PartRequest, devices: Sequence[int], environment: Mapping[str, str], nccl_files: str
    ) -> dict[str, Any]:
        """Start this node's part of a server.

        :param devices: indices of the topology, in order of the node's ranks.
        :param environment: variables that it must have.
        :param nccl_files: begin of the path of NCCL's files, equal on all nodes, since vLLM hands on the variables of
            the first node to all workers.
        """
        os.environ.update(environment)
        os.environ.setdefault("NCCL_DEBUG_FILE", f"{nccl_files}.%h.%p.log")
        self._sweepers.append(
            subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _SWEEPER, nccl_files],
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
        )
        return self._begin(RayPart, request, devices)

    def close(self) -> None:
        """End everything; may be called again."""
        try:
            super().close()
        finally:
            for sweeper in self._sweepers:
                assert sweeper.stdin is not None
                sweeper.stdin.close()
                sweeper.wait()


_METHODS: Mapping[str, Callable[..., Any]] = {
    "start_ray": RayAgent.start_ray,
    "bye": RayAgent.close,
}
"""What can be asked beside what every agent answers, by name."""


if __name__ == "__main__":
    node_agent.main(RayAgent)
