"""One node's part of a server as the test run sees it: asked through its agent, its logs copied beside our own.

Leaves the whole server to :mod:`~pytest_gpulayout.adapters.node_server`, and what runs on the node to
:mod:`~pytest_gpulayout.adapters.node_part`.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_gpulayout.adapters.node_fleet import Node
from pytest_gpulayout.adapters.node_part import PartRequest
from pytest_gpulayout.errors import NodeError, NodeLost
from pytest_gpulayout.node_documents import occupancy_from_document, surroundings_from_document
from pytest_gpulayout.occupancy import OccupancyReport
from pytest_gpulayout.surroundings import Surroundings

POLL_S = 10.0
"""How long an agent may take to say that its part still runs; a node that needs longer is taken for lost."""
STOP_S = 50.0

_LOG = "log"


@dataclass(frozen=True, slots=True)
class Process:
    """A process of a node. :param parent: process id of who started it."""

    title: str
    parent: int


class RemotePart:
    """The part of one node. Threads may use it side by side.

    :param ranks: of the layout, those of this node. :param devices: their indices in the node's topology.
    :param folder: an existing one, for the copies of its logs.
    :ivar log: copy of its log. :ivar pids: process id of each of its ranks, by the layout's rank.
    """

    def __init__(self, node: Node, ranks: range, devices: Sequence[int], folder: Path) -> None:
        self.node = node
        self.ranks = ranks
        self.devices = tuple(devices)
        self.log = folder / ("server.log" if node.rank == 0 else f"node-{node.rank}.log")
        self.log.touch()
        self.address = ""
        self.interface = ""
        self.command: tuple[str, ...] = ()
        self.binding = ""
        self.pids: Mapping[int, int] = {}
        self._nccl_folder = folder / f"nccl-node-{node.rank}"
        self._copied: dict[str, int] = {}
        self._copying = threading.Lock()

    @property
    def name(self) -> str:
        """The node, as the user named it."""
        return self.node.name

    # -- life ------------------------------------------------------------------------------------------------------

    def find_way(self, master: str) -> None:
        """Find the address and interface of this node through which it reaches the head.

        :raises NodeError: there is none.
        """
        try:
            route = self.node.ask("route", address=master)
        except NodeLost:
            raise
        except NodeError as error:
            raise NodeError(
                f"a way from {self.node.facts.words} to the head's address {master} is required, found none: "
                f"{str(error).partition(chr(10))[0]}\n"
                "  in its routing table\n  name another address of the head: --gpu-master-addr=ADDRESS",
                node=self.name,
            ) from error
        self.address, self.interface = str(route["address"]), str(route["interface"])

    def ping(self) -> None:
        """Let its agent know that the test run is there."""
        self.node.ask("ping")

    def start(self, request: PartRequest) -> int:
        """Start it; return the port that it listens on, if it is the head."""
        environment = {"VLLM_HOST_IP": self.address}
        if self.interface:
            environment["GLOO_SOCKET_IFNAME"] = self.interface
        told = self.node.ask("start", request=request, devices=self.devices, environment=environment)
        self.command, self.binding = tuple(told["command"]), str(told["binding"])
        return int(told["port"])

    def adopt(self, pids: Mapping[int, int]) -> None:
        """Let the agent take processes for ranks. :param pids: by the layout's rank."""
        self.pids = dict(pids)
        self.node.ask("adopt", pids=list(pids.values()))

    def poll(self) -> int | None:
        """Return its exit code, ``None`` while it runs; copies what is new in its log.

        :raises NodeLost: the node does not answer.
        """
        found = self.node.ask("poll", timeout_s=POLL_S)
        self._copy(_LOG, self.log, int(found["log_bytes"]))
        code = found["exit_code"]
        return None if code is None else int(code)

    def processes(self) -> dict[int, Process]:
        """Return its processes now, by process id."""
        found: Mapping[str, Mapping[str, Any]] = self.node.ask("poll", processes=True)["processes"]
        return {int(pid): Process(str(own["title"]), int(own["parent"])) for pid, own in found.items()}

    def note(self) -> None:
        """Let its keeper remember the shared memory that is mapped now."""
        self.node.ask("note")

    def stop(self) -> None:
        """End it; return when all of it is gone and the last of its log is here.

        :raises NodeError: it cannot be ended.
        """
        self.node.ask("stop", timeout_s=STOP_S)
        if self.command:
            self.poll()

    # -- evidence --------------------------------------------------------------------------------------------------

    def nccl_logs(self) -> list[Path]:
        """Copy what is new in NCCL's files, and return the copies."""
        sizes: Mapping[str, int] = self.node.ask("nccl")["files"]
        if sizes:
            self._nccl_folder.mkdir(exist_ok=True)
        copies = []
        for name, size in sorted(sizes.items()):
            copies.append(self._nccl_folder / Path(name).name)  # never out of the folder, whatever a node says
            self._copy(name, copies[-1], size)
        return copies

    def nccl_log_obstacle(self) -> str | None:
        """Return why they may show no channel; ``None`` when nothing hides them."""
        obstacle = self.node.ask("nccl")["obstacle"]
        return None if obstacle is None else f"on node {self.name}: {obstacle}"

    def surroundings(self) -> Surroundings:
        """Return what surrounds its ranks, by the layout's rank."""
        document = self.node.ask("surroundings", pids=self._by_own_rank())
        return surroundings_from_document(document, first_rank=self.ranks.start)

    def mapped_segments(self) -> dict[int, Collection[str]]:
        """Return what its ranks have mapped, by the layout's rank."""
        found = self.node.ask("segments", pids=list(self.pids.values()))
        return {rank: found[str(pid)] for rank, pid in self.pids.items()}

    def occupancy(self) -> OccupancyReport | None:
        """Return on which GPUs its ranks compute, which begin with 0 here; ``None`` on the CPU platform."""
        document = self.node.ask("occupancy", pids=self._by_own_rank())
        return None if document is None else occupancy_from_document(document)

    def _by_own_rank(self) -> dict[str, int]:
        return {str(rank - self.ranks.start): pid for rank, pid in self.pids.items()}

    def _copy(self, name: str, to: Path, size: int) -> None:
        """Append what is new in a file of the node to its copy here. :param size: what it has now at least."""
        with self._copying:
            while (offset := self._copied.get(name, 0)) < size:
                found = self.node.ask("read", file=name, offset=offset)
                if found["next"] <= offset:  # it was cut
                    return
                with to.open("ab") as copy:
                    copy.write(str(found["text"]).encode("utf-8", "surrogateescape"))
                self._copied[name] = int(found["next"])
