"""The part of a vLLM server that runs on one node of a layout over several; an agent there owns it.

Knows vLLM's native multi-node (0.32, ``vllm/entrypoints/cli/serve.py``, ``run_headless``): the head is an API server
with ``--nnodes``, the others are ``vllm serve --headless --node-rank K`` and answer nobody. Leaves proving the whole
to :mod:`~pytest_gpulayout.adapters.node_server`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import psutil

from pytest_gpulayout.adapters.device_lock import DeviceLocks, LentLocks
from pytest_gpulayout.adapters.numa_binding import bind_server
from pytest_gpulayout.adapters.vllm_process import NUMA_OPTION, GpuWatch, VllmServer, require_vllm
from pytest_gpulayout.errors import ServerStartFailed
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.ports import Platform, ServerSpec
from pytest_gpulayout.topology import Device

_FOLLOWER = ("-m", "pytest_gpulayout.adapters.headless_vllm", "serve")
_RPC_OPTION = "--data-parallel-rpc-port"
_RANK_ENDED = 1


class PartRequest(TypedDict):
    """What a node is asked to start.

    :param node_rank: 0 is the head, which serves. :param host: that it listens on.
    :param master_addr: where the others reach the head. :param master_port: of torch.distributed there.
    :param rpc_port: of data parallelism there.
    """

    layout: str
    model: str
    arguments: list[str]
    platform: Platform
    node_rank: int
    host: str
    master_addr: str
    master_port: int
    rpc_port: int
    api_key: str


class NodePart(VllmServer):
    """The processes of one node: those of a server for one host, told of the others.

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
        options = require_vllm(sys.executable)
        _require_model(request["model"])
        spec = _spec_here(request, devices)
        binding = bind_server(spec, has_flag=NUMA_OPTION in options)
        folder.mkdir()
        super().__init__(
            spec, folder, locks, binding, watch, options=options, api_key=request["api_key"], run_in=folder
        )
        self.port = int(self.endpoint.url.rpartition(":")[2])
        self.command = command_of_node(self.command, request)
        self._ranks: list[psutil.Process] = []
        self._told_of: set[int] = set()

    def adopt(self, pids: Sequence[int]) -> None:
        """Take processes for its ranks: the end of one is the end of the part.

        :raises psutil.NoSuchProcess: one is not here.
        """
        self._ranks = [psutil.Process(pid) for pid in pids]

    @property
    def exit_code(self) -> int | None:
        """Of this node's main process; 1 when a rank has gone, which the log tells then; ``None`` while all run.

        The main processes of the other nodes may end before the one whose rank it was.
        """
        code = self._exit_code()
        gone = [rank.pid for rank in self._ranks if not _runs(rank)]
        if code is not None or not gone:
            return code
        with self.log.open("a", encoding="utf-8") as log:
            for pid in sorted(set(gone) - self._told_of):
                log.write(f"the worker of vLLM with process id {pid} has ended\n")
        self._told_of.update(gone)
        return _RANK_ENDED

    def table(self) -> dict[str, dict[str, object]]:
        """Return title and parent of each process, by process id."""
        titles = self.pids()
        found: dict[str, dict[str, object]] = {}
        for pid, title in titles.items():
            try:
                found[str(pid)] = {"title": title, "parent": psutil.Process(pid).ppid()}
            except psutil.Error:
                continue
        return found


def _runs(process: psutil.Process) -> bool:
    """Whether it has not ended; who started it may not have asked for its exit code yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _spec_here(request: PartRequest, devices: tuple[Device, ...]) -> ServerSpec:
    """The node's part as a server of one host: its devices, and a layout without nodes."""
    return ServerSpec(
        layout=replace(parse_layout(request["layout"]), nodes=1),
        model=request["model"],
        arguments=tuple(request["arguments"]),
        platform=request["platform"],
        devices=devices,
        python=sys.executable,
        start_timeout_s=0.0,
    )


def command_of_node(command: Sequence[str], request: PartRequest) -> list[str]:
    """Return the command of one node from that of a server on one host.

    The user's own arguments stay the last, and win. A follower is no API server.
    """
    layout = parse_layout(request["layout"])
    of_one_host = replace(layout, nodes=1).engine_arguments()
    of_node = layout.engine_arguments(
        node_rank=request["node_rank"], master_addr=request["master_addr"], master_port=request["master_port"]
    )
    more = of_node[len(of_one_host) :]
    if layout.dp > 1:
        more += [_RPC_OPTION, str(request["rpc_port"])]
    words = list(command)
    words[words.index("--host") + 1] = request["host"]
    behind_port = words.index("--port") + 2
    words[behind_port:behind_port] = more
    if request["node_rank"] > 0:
        words[1:3] = _FOLLOWER
    return words


def _require_model(model: str) -> None:
    """A model that is named by its path must be there on every node."""
    if model.startswith(("/", "~", ".")) and not Path(model).expanduser().is_dir():
        raise ServerStartFailed(
            f"the model's folder is required on every node, found none\n  at {model}\n"
            "  copy it there, mount it, or name a hub id: --gpu-model=ORG/NAME"
        )
