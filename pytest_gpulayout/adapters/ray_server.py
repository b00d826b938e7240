"""One vLLM server whose workers Ray starts on the nodes of its cluster.

The API server runs on the first node, by the agent there; Ray starts a worker for each rank. Which of its actors is
which rank, where and as which process, is asked of Ray (:mod:`~pytest_gpulayout.adapters.ray_nodes`). From then on
the agents look after these processes as after their own. All else is as with vLLM's native way
(:mod:`~pytest_gpulayout.adapters.node_server`).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from pytest_gpulayout.adapters.node_fleet import Node, NodeFleet, on_each
from pytest_gpulayout.adapters.node_part import PartRequest
from pytest_gpulayout.adapters.node_server import NodeServer
from pytest_gpulayout.adapters.ray_nodes import RayNodes
from pytest_gpulayout.adapters.remote_part import RemotePart
from pytest_gpulayout.errors import ServerError
from pytest_gpulayout.nodes import ranks_of
from pytest_gpulayout.ports import Progress, ServerSpec
from pytest_gpulayout.ray_placement import dead_in_log, ray_arguments, require_ray_order

_NCCL_FILES = "/tmp/gpulayout-nccl-"  # every Linux node has the folder, and NCCL makes none


class RayRemotePart(RemotePart):
    """The part of one node, whose workers Ray starts.

    :param environment: what the node's processes must have. :param nccl_files: begin of the path of NCCL's files.
    """

    def __init__(
        self,
        node: Node,
        ranks: range,
        devices: Sequence[int],
        folder: Path,
        *,
        environment: Mapping[str, str],
        nccl_files: str,
    ) -> None:
        super().__init__(node, ranks, devices, folder)
        self._environment = dict(environment)
        self._nccl_files = nccl_files

    def start(self, request: PartRequest) -> int:
        """Start it; return the port that it listens on, if it is the first one."""
        told = self.node.ask(
            "start_ray",
            request=request,
            devices=self.devices,
            environment=self._environment,
            nccl_files=self._nccl_files,
        )
        self.command, self.binding = tuple(told["command"]), str(told["binding"])
        return int(told["port"])


class RayServer(NodeServer):
    """A server over the nodes of a Ray cluster.

    :param ray: the nodes that the fleet has opened.
    """

    def __init__(
        self,
        spec: ServerSpec,
        folder: Path,
        fleet: NodeFleet,
        nodes: Sequence[Node],
        *,
        ray: RayNodes,
        wait_s: float = 0.0,
    ) -> None:
        ray_arguments(spec.layout)  # refuses what cannot be started this way before anything is asked of a node
        for node in nodes:
            chosen = [spec.devices[rank].index for rank in ranks_of(spec.layout, node.rank)]
            require_ray_order(spec.layout, chosen, node.name)
        super().__init__(spec, folder, fleet, nodes, wait_s=wait_s)
        self._ray = ray
        nccl_files = _NCCL_FILES + secrets.token_hex(8)
        self._ray_parts = [
            RayRemotePart(
                part.node,
                part.ranks,
                part.devices,
                folder,
                environment=ray.environment() if part.node.rank == 0 else {},
                nccl_files=nccl_files,
            )
            for part in self._parts
        ]
        self._parts = list(self._ray_parts)

    def start(self, progress: Progress) -> None:
        """Take the devices of all nodes, start the server, and return when the whole has proved itself.

        :raises NodeError: Ray does not hold what the layout leaves free, or has put a rank elsewhere.
        """
        layout, devices = self.spec.layout, self.spec.devices
        chosen = {
            node.node_id: [[str(devices[rank].index), devices[rank].uuid or ""] for rank in part.ranks]
            for node, part in zip(self._ray.nodes, self._ray_parts, strict=False)
        }
        with self._ray.held(layout, chosen):
            super().start(progress)

    def _prove_ranks(self) -> tuple[dict[int, int], list[str]]:
        """Return the process of each rank, and the titles of the first node; every rank must be on its own node."""
        head, *_ = self._ray_parts
        titles = {pid: process.title for pid, process in head.processes().items()}
        head.poll()
        with head.log.open(encoding="utf-8", errors="replace") as log:
            found = self._ray.ranks(self.spec.layout, list(titles), log)
        every = {rank: pid for rank, (_, pid) in found.items()}
        on_each(self._ray_parts, lambda part: part.adopt({rank: every[rank] for rank in part.ranks}))
        return every, list(titles.values())

    def _error(self, kind: type[ServerError], headline: str, otherwise: str = "") -> ServerError:
        """Build the message of a server over several nodes, and name the node whose worker ended first.

        vLLM ends a moment after a worker, so that the first node can seem to be the first to fall.
        """
        with self._ray_parts[0].log.open(encoding="utf-8", errors="replace") as log:
            dead = dead_in_log(log)
        for part in self._ray_parts:
            ranks = [str(rank) for rank in dead if rank in part.ranks]
            if ranks:
                headline += f", after the worker of rank {', '.join(ranks)} on {part.node.facts.words} had ended"
        return super()._error(kind, headline, otherwise)
