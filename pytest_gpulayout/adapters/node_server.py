"""One vLLM server over several nodes: started part by part through agents, proved as a whole, followed and ended.

The proof is that of a server on one host (:mod:`~pytest_gpulayout.adapters.vllm_process`), and that every rank is a
process of the node that the layout puts it on. While it runs, all nodes are asked every :data:`FOLLOW_S`: where a
part has ended, or a node is lost, the others are ended at once. Ranks that wait for it in a collective would do so
for minutes (``VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS``, NCCL's watchdog), and requests with them.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pytest_gpulayout.adapters.device_lock import LentLocks
from pytest_gpulayout.adapters.kept_process import describe_exit
from pytest_gpulayout.adapters.node_fleet import Node, NodeFleet, on_each
from pytest_gpulayout.adapters.node_host import machine_identity, namespace
from pytest_gpulayout.adapters.node_part import PartRequest
from pytest_gpulayout.adapters.node_watch import AfterCopy, NodesTelemetry
from pytest_gpulayout.adapters.numa_binding import Binding
from pytest_gpulayout.adapters.remote_part import RemotePart
from pytest_gpulayout.adapters.server_watch import ServerWatch
from pytest_gpulayout.adapters.vllm_process import VllmServer
from pytest_gpulayout.errors import DevicesBusy, NodeError, NodeLost, ServerError, ServerStartFailed
from pytest_gpulayout.nodes import head_address, joined_occupancy, ranks_of
from pytest_gpulayout.occupancy import OccupancyReport
from pytest_gpulayout.ports import Endpoint, NodeProof, Progress, ServerSpec, Watch
from pytest_gpulayout.process_titles import rank_pids
from pytest_gpulayout.server_window import ServerWindow
from pytest_gpulayout.surroundings import Surroundings
from pytest_gpulayout.telemetry import Telemetry
from pytest_gpulayout.vllm_log import error_cause
from pytest_gpulayout.workload import Workload

FOLLOW_S = 1.0
"""Between two looks at all nodes; an agent that is not asked for much longer ends its part."""

_LOOPBACK = "127.0.0.1"
_RESERVE_S = 1.0
_TAIL_LINES = 8
_NAME_OPTION = "--served-model-name"


class NodeServer(VllmServer):
    """A server whose processes are on other hosts.

    :param folder: for copies of its logs, which is made for it. :param fleet: that the nodes are of.
    :param wait_s: how long others may keep the devices.
    """

    def __init__(
        self, spec: ServerSpec, folder: Path, fleet: NodeFleet, nodes: Sequence[Node], *, wait_s: float = 0.0
    ) -> None:
        master = head_address(nodes[0].facts, fleet.master_addr)
        folder.mkdir(parents=True)
        of_one_host = replace(spec, layout=replace(spec.layout, nodes=1))
        super().__init__(of_one_host, folder, LentLocks((), ()), Binding(None, (), ""))
        self._run_dir.rmdir()  # each node has its own, and nobody would remove this one where pytest is killed
        self.spec = spec
        self._fleet = fleet
        self._wait_s = wait_s
        self._parts = [
            RemotePart(node, ranks, [spec.devices[rank].index for rank in ranks], folder)
            for node in nodes
            for ranks in [ranks_of(spec.layout, node.rank)]
        ]
        self._master = master
        self._looking = threading.RLock()
        self._fallen: tuple[RemotePart, int] | None = None
        self._lost: NodeError | None = None
        self._is_over = threading.Event()
        self._follower: threading.Thread | None = None

    # -- life ------------------------------------------------------------------------------------------------------

    def start(self, progress: Progress) -> None:
        """Take the devices of all nodes, start all parts, and return when the whole has proved itself."""
        for part in self._parts:
            part.find_way(self._master)
        self._reserve(progress)
        self.begin()
        self.finish_start(progress)

    def _reserve(self, progress: Progress) -> None:
        """Take the devices node by node, in one order, so that two runs cannot wait for each other."""
        begun = time.monotonic()
        machines: set[str] = set()
        for part in sorted(self._parts, key=lambda part: (part.node.facts.machine, part.node.facts.host)):
            machine = part.node.facts.machine or part.name
            locked = self.spec.platform == "cuda" or machine not in machines
            machines.add(machine)
            while waiting := self._try_to_reserve(part, locked=locked):
                busy = waiting.get("busy")
                if busy is not None and time.monotonic() - begun >= self._wait_s:
                    raise DevicesBusy(f"{busy}\n  on node {part.name}", pids=())
                progress(f"{self.spec.layout}: node {part.name}: {(busy or waiting['held']).partition(chr(10))[0]}")
                time.sleep(_RESERVE_S)
                on_each(self._parts, RemotePart.ping)  # a node that holds locks and hears nothing would let them go

    def _try_to_reserve(self, part: RemotePart, *, locked: bool) -> Mapping[str, str]:
        found: Mapping[str, str] = part.node.ask(
            "reserve",
            layout=str(replace(self.spec.layout, nodes=1)),
            platform=self.spec.platform,
            devices=part.devices,
            owner=f"pytest, layout {self.spec.layout}",
            locked=locked,
        )
        return found

    def begin(self) -> None:
        """Start all parts, and return while they load."""
        self._started_s = time.monotonic()
        head, *followers = self._parts
        host = self._host_of_server()
        master_port, rpc_port = head.node.ask("ports", address=self._master, count=2)
        model, naming = self._model()
        request: PartRequest = {
            "layout": str(self.spec.layout),
            "model": model,
            "arguments": [*naming, *self.spec.arguments],
            "platform": self.spec.platform,
            "node_rank": 0,
            "host": host,
            "master_addr": self._master,
            "master_port": master_port,
            "rpc_port": rpc_port,
            "api_key": secrets.token_urlsafe(24),
        }
        port = head.start(request)
        shown = f"[{host}]" if ":" in host else host
        self.endpoint = Endpoint(f"http://{shown}:{port}", self.spec.model, request["api_key"])
        self.command = list(head.command)
        on_each(followers, lambda part: part.start({**request, "node_rank": part.node.rank}))
        self.binding = "; ".join(f"node {part.name}: {part.binding}" for part in self._parts if part.binding)
        self._follower = threading.Thread(target=self._follow, name=f"nodes of {self.spec.layout}", daemon=True)
        self._follower.start()

    def _host_of_server(self) -> str:
        """Loopback where the head is in this network, else the address at which the other nodes find it, too."""
        head = self._parts[0].node.facts
        is_here = head.network and (head.machine, head.network) == (machine_identity(), namespace("net"))
        return _LOOPBACK if is_here else self._master

    def _model(self) -> tuple[str, list[str]]:
        """The model as nodes find it, and what keeps its name; their agents run in folders of their own."""
        model = self.spec.model
        if not Path(model).is_dir() or os.path.isabs(model):
            return model, []
        is_named = any(argument.startswith(_NAME_OPTION) for argument in self.spec.arguments)
        return os.path.abspath(model), [] if is_named else [_NAME_OPTION, model]

    def finish_start(self, progress: Progress) -> None:
        """Return when the server that was begun has proved itself; see :meth:`start`."""
        super().finish_start(progress)
        self.proof = replace(self.proof, nodes=tuple(map(_node_proof, self._parts)))

    def note_segments(self) -> None:
        """Let the keepers of all nodes remember the shared memory that is mapped now."""
        on_each(self._parts, RemotePart.note)

    def ask_to_end(self) -> None:
        """Do nothing yet: agents end their parts while they are asked to, see :meth:`stop`."""

    def stop(self) -> None:
        """End all parts, and return when they are gone; may be called again.

        :raises NodeError: a part cannot be ended.
        """
        self._is_over.set()
        if self._follower is not None:
            self._follower.join()
            self._follower = None
        failures = [error for error in on_each(self._parts, _stop) if error is not None]
        super().stop()
        lost = [error for error in failures if isinstance(error, NodeLost)]
        if lost or self._lost is not None:
            self._fleet.close()  # ends what the other agents hold; the next layout opens what is there then
        if failures and not lost:
            raise failures[0]

    # -- following -------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Look at all nodes until the end; where one falls, end all, so that nobody waits for it."""
        while not self._is_over.wait(FOLLOW_S):
            with self._looking:
                self._look()
            if self._fallen is not None or self._lost is not None:
                on_each(self._parts, _stop)
                return

    def _look(self) -> None:
        """Find out whether all parts run, unless it is known that one does not."""
        for part in self._parts:
            if self._fallen is not None or self._lost is not None:
                return
            try:
                code = part.poll()
            except NodeError as error:
                self._lost = error
            else:
                self._fallen = None if code is None else (part, code)

    def _exit_code(self) -> int | None:
        """Exit code of the part that ended first, ``None`` while all run.

        :raises NodeLost: a node is lost.
        """
        if not self._parts or not self._parts[-1].command:
            return None
        with self._looking:
            self._look()
        if self._lost is not None:
            told = f"{self._lost}\n  layout {self.spec.layout}, whose other nodes are ended, too"
            raise NodeLost(told, node=self._lost.node)
        return None if self._fallen is None else self._fallen[1]

    # -- evidence --------------------------------------------------------------------------------------------------

    def nccl_logs(self) -> Sequence[Path]:
        """Return copies of NCCL's files of all nodes, in a folder for each."""
        return [path for paths in on_each(self._parts, RemotePart.nccl_logs) for path in paths]

    def nccl_log_obstacle(self) -> str | None:
        """Return why NCCL's files may show no channel, as far as the environment of a node tells."""
        obstacles = on_each(self._parts, RemotePart.nccl_log_obstacle)
        return next((obstacle for obstacle in obstacles if obstacle is not None), None)

    def surroundings(self) -> Surroundings:
        """Return what surrounds the ranks of the head: causes look for what ranks of one machine do not share."""
        return self._parts[0].surroundings()

    def mapped_segments(self) -> Mapping[int, Collection[str]]:
        """Return the segments under /dev/shm that each rank has mapped now, on its own node."""
        return {
            rank: paths for part in on_each(self._parts, RemotePart.mapped_segments) for rank, paths in part.items()
        }

    def gpu_processes(self) -> OccupancyReport | None:
        """Return on which GPUs the ranks of all nodes compute now; ``None`` on the CPU platform."""
        reports = on_each(self._parts, RemotePart.occupancy)
        found = [(part.name, part.ranks.start, own) for part, own in zip(self._parts, reports, strict=True) if own]
        return joined_occupancy(found) if len(found) == len(self._parts) else None

    def _prove_ranks(self) -> tuple[dict[int, int], list[str]]:
        """Return the process of each rank, and all titles; every rank must be on its own node."""
        every: dict[int, int] = {}
        every_title: list[str] = []
        for part, processes in zip(self._parts, on_each(self._parts, RemotePart.processes), strict=True):
            titles = {pid: process.title for pid, process in processes.items()}
            parents = {pid: process.parent for pid, process in processes.items()}
            found = rank_pids(self.spec.layout, titles, parents)
            if set(found) != set(part.ranks):
                raise self._wrong_ranks(part, titles, found)
            part.adopt(found)
            every |= found
            every_title += titles.values()
        return every, every_title

    def _wrong_ranks(self, part: RemotePart, titles: Mapping[int, str], ranks: Collection[int]) -> ServerStartFailed:
        listed = ", ".join(sorted(title for title in titles.values() if "VLLM::" in title)) or "no VLLM::..."
        found = ", ".join(map(str, sorted(ranks))) or "none"
        return ServerStartFailed(
            f"layout {self.spec.layout} needs ranks {', '.join(map(str, part.ranks))} on {part.node.facts.words}, "
            f"found {found}\n  process table of the node's part of the server: {listed}\n"
            f"  read its log: less {part.log}\n"
            f"  vLLM names its processes with setproctitle: {part.node.facts.python} -m pip install setproctitle",
            command=part.command,
        )

    # -- watching a load -------------------------------------------------------------------------------------------

    def copy_logs(self) -> None:
        """Copy what is new in the log of the head; what it says of a load is read from the copy."""
        self._parts[0].poll()

    def watch(self, endpoint: Endpoint, workload: Workload) -> Watch[ServerWindow]:
        """Return what looks at the server while a load runs."""
        return AfterCopy(ServerWatch(endpoint, workload, logs=(self.log,)), self.copy_logs)

    def watch_devices(self) -> Watch[Telemetry]:
        """Return what looks at the devices of all nodes while a load runs."""
        return NodesTelemetry(self._parts, self.spec.platform)

    # -- messages --------------------------------------------------------------------------------------------------

    def _error(self, kind: type[ServerError], headline: str, otherwise: str = "") -> ServerError:
        """Build the one message a user gets, from the logs of all nodes, the one that ended first before the others.

        :param otherwise: the cause to give when no log has one.
        """
        code = self._exit_code()
        fallen = self._fallen[0] if self._fallen is not None else None
        if fallen is not None and code is not None:
            headline = f"{headline}: its part on {fallen.node.facts.words} ended ({describe_exit(code)})"
        parts = sorted(self._parts, key=lambda part: part is not fallen)
        logs = {part.name: part.log.read_text(encoding="utf-8", errors="replace").splitlines() for part in parts}
        causes = {name: cause for name, lines in logs.items() if (cause := error_cause(lines))}
        lines = [f"  cause, on node {name}: {cause}" for name, cause in causes.items()]
        shown = next((part for part in parts if part.name in causes), parts[0])
        tail = [line for line in logs[shown.name] if line.strip()][-_TAIL_LINES:]
        message = "\n".join(
            [
                headline,
                *(lines or [f"  cause: {otherwise or 'the logs do not say'}"]),
                f"  command on node {shown.name}: {' '.join(shown.command)}",
                f"  log of node {shown.name}: {shown.log}, its last lines:",
                *(f"    {line[:200]}" for line in tail),
                f"  read them: less {' '.join(str(part.log) for part in self._parts)}",
            ]
        )
        return kind(message, command=shown.command, exit_code=code, log_tail=tail)


def _stop(part: RemotePart) -> NodeError | None:
    try:
        part.stop()
    except NodeError as error:
        return error
    return None


def _node_proof(part: RemotePart) -> NodeProof:
    facts = part.node.facts
    return NodeProof(facts.name, facts.host, part.address, tuple(part.ranks), part.command, part.binding)
