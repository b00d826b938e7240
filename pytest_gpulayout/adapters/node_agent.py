"""What runs on each node of a layout over several: it does what the test run asks, and leaves nothing behind.

Run as ``python -m pytest_gpulayout.adapters.node_agent``. Standard input holds one request a line,
``{"id": 1, "method": "poll", "arguments": {}}``; standard output one reply a line, ``{"id": 1, "result": ...}`` or
``{"id": 1, "error": {"kind": "DevicesBusy", "text": "..."}}``. So every program that starts a command on a node and
connects its input and output will do: ``ssh``, ``kubectl exec -i``, ``srun``, ``docker exec -i``, ``ip netns exec``.
No port, no token and no folder is shared between nodes.

When its input ends, and when nobody has asked anything for :data:`SILENCE_S` while something runs here, the agent
ends what it has started. A keeper (:mod:`~pytest_gpulayout.adapters.keeper`) does it where the agent itself was
killed, and a janitor removes its folder then.

======================  ==========================================================================================
method                  answers
======================  ==========================================================================================
hello                   who this is; takes variables of the test run over
topology                devices and links, as ``gpulayout topo --json`` prints them
ping                    nothing; a test run that waits for long is not silent
route                   which of its own addresses and interfaces reaches another address
ports                   ports that are free
reserve                 takes locks and looks who computes on the devices; nothing when all is free
start                   starts this node's part of a server
adopt                   which processes here are ranks of the server: the end of one is the end of its part
poll                    exit code, size of the log, and on demand the processes
read                    a part of the log, or of a file of NCCL
nccl                    NCCL's files and what hides channels from them
segments, surroundings  what ranks have mapped, and what surrounds them
occupancy               on which GPUs they compute
telemetry_start, _stop  watches the devices
note                    lets the keeper remember the shared memory that is mapped now
stop, bye               ends the server; ends the agent
======================  ==========================================================================================
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from pytest_gpulayout.adapters import keeper as keeper_script
from pytest_gpulayout.adapters.cpu_host import BIND_VARIABLE, CpuTopology
from pytest_gpulayout.adapters.device_lock import DeviceLocks, LentLocks, lock_names
from pytest_gpulayout.adapters.node_host import free_ports, host_facts, own_lists, own_version, route_to
from pytest_gpulayout.adapters.node_part import NodePart, PartRequest
from pytest_gpulayout.adapters.nvml import NvmlTopology
from pytest_gpulayout.adapters.nvml_processes import NvmlProcesses
from pytest_gpulayout.adapters.surroundings import read_surroundings
from pytest_gpulayout.adapters.telemetry_watch import TelemetryWatch
from pytest_gpulayout.adapters.vllm_process import GpuWatch
from pytest_gpulayout.errors import DevicesBusy, GpuLayoutError
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.node_documents import (
    occupancy_to_document,
    surroundings_to_document,
    telemetry_to_document,
)
from pytest_gpulayout.occupancy import await_idle_devices
from pytest_gpulayout.ports import Platform
from pytest_gpulayout.topology import Device, Topology
from pytest_gpulayout.topology_document import topology_to_document

SILENCE_S = 25.0
"""A test run asks every second or two while a server runs; one that is silent for longer cannot reach this node."""

_MOST_BYTES = 1 << 18
_ERRORS = (
    *(GpuLayoutError, OSError, ValueError, LookupError, TypeError, AssertionError),
    *(psutil.Error, subprocess.SubprocessError),
)
# The agent's folder goes when nothing writes to it any more; the end of the agent is the end of this script's input.
_JANITOR = """
import os, shutil, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdin.read()
for _ in range(120):
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    if not os.path.exists(sys.argv[1]):
        break
    time.sleep(0.5)
"""


class _Held(Exception):
    """Somebody else holds a lock; never leaves this module."""


class NodeAgent:
    """Answers requests of one test run. Close it: it ends what it has started."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="gpulayout-node-"))
        self._janitor = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _JANITOR, str(self._folder)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._topology: Topology | None = None
        self._locks: DeviceLocks | None = None
        self._watch: GpuWatch | None = None
        self._part: NodePart | None = None
        self._is_running = False
        self._parts = 0
        self._telemetry: TelemetryWatch | None = None
        self.is_over = False

    @property
    def is_busy(self) -> bool:
        """Whether something runs or is held here."""
        return self._is_running or self._locks is not None or self._telemetry is not None

    def answer(self, method: str, arguments: Mapping[str, Any]) -> Any:
        """Do what is asked and return what JSON can hold.

        :raises ValueError: there is no such method, so the other side is of another version.
        """
        if method not in _METHODS:
            raise ValueError(f"the agent of pytest-gpulayout {own_version()} does not know {method!r}")
        return _METHODS[method](self, **arguments)

    def close(self) -> None:
        """End everything; may be called again."""
        self.is_over = True
        try:
            self.telemetry_stop()
            self.stop()
        finally:
            assert self._janitor.stdin is not None
            self._janitor.stdin.close()
            self._janitor.wait()

    # -- who this is ---------------------------------------------------------------------------------------------

    def hello(self, environment: Mapping[str, str]) -> dict[str, Any]:
        """Say who this is. :param environment: variables of the test run that hold here, too."""
        os.environ.update(environment)
        return host_facts()

    def topology(self, platform: Platform, ranks: int, first_rank: int, all_ranks: int) -> dict[str, Any]:
        """Return devices and links. :param ranks: of this node, from ``first_rank`` on, of ``all_ranks`` in all."""
        if platform == "cpu":
            lists = own_lists(os.environ.get(BIND_VARIABLE), ranks, first_rank, all_ranks)
            self._topology = CpuTopology(ranks, lists).probe()
        else:
            self._topology = NvmlTopology().probe()
        return {"topology": topology_to_document(self._topology), "busy": sorted(self._topology.busy)}

    def ping(self) -> None:
        """Know that the test run is there."""

    def route(self, address: str) -> dict[str, str]:
        """Return the own address, and its interface, from which packets to ``address`` leave."""
        own, interface = route_to(address)
        return {"address": own, "interface": interface}

    def ports(self, address: str, count: int) -> list[int]:
        """Return ports of an own address that nobody listens on now."""
        return free_ports(address, count)

    # -- a server ------------------------------------------------------------------------------------------------

    def reserve(
        self, layout: str, platform: Platform, devices: Sequence[int], owner: str, *, locked: bool
    ) -> dict[str, str]:
        """Take the devices, unless somebody has them; return who, nothing when they are ours.

        :param devices: indices of the topology. :param owner: shown to those who wait.
        :param locked: whether this node takes locks; of several nodes on one machine, one does for its CPUs.
        :returns: ``held``: a lock is waited for. ``busy``: others compute there.
        """
        chosen = self._chosen(devices)
        if locked and self._locks is None:
            try:
                self._locks = DeviceLocks(lock_names(platform, chosen), owner, _refuse)
            except _Held as held:
                return {"held": str(held)}
        if platform == "cuda":
            try:
                self._watch = _idle_gpus(layout, chosen)
            except DevicesBusy as busy:
                return {"busy": str(busy)}
        return {}

    def start(self, request: PartRequest, devices: Sequence[int], environment: Mapping[str, str]) -> dict[str, Any]:
        """Start this node's part of a server.

        :param devices: indices of the topology, in order of the node's ranks.
        :param environment: variables for it, where this node has none of that name.
        """
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        return self._begin(NodePart, request, devices)

    def _begin(self, kind: type[NodePart], request: PartRequest, devices: Sequence[int]) -> dict[str, Any]:
        self._parts += 1
        locks = self._locks or LentLocks((), ())
        part = kind(request, self._chosen(devices), self._folder / str(self._parts), locks, self._watch)
        self._part, self._locks, self._is_running = part, None, True  # it frees the locks when it has ended
        part.begin()
        return {"command": list(part.command), "port": part.port, "binding": part.binding}

    def poll(self, *, processes: bool = False) -> dict[str, Any]:
        """Return the exit code, ``None`` while the server runs, and the size of its log.

        :param processes: whether to list them, too: process id -> title and process id of its parent.
        """
        part = self._started
        found = {"exit_code": part.exit_code, "log_bytes": part.log.stat().st_size}
        return found | ({"processes": part.table()} if processes else {})

    def adopt(self, pids: Sequence[int]) -> None:
        """Take processes of this node for ranks of the server."""
        self._started.adopt(pids)

    def read(self, file: str, offset: int) -> dict[str, Any]:
        """Return a part of a file, of at most 256 KiB. :param file: ``log``, or a name of :meth:`nccl`."""
        part = self._started
        path = part.log if file == "log" else next(path for path in part.nccl_logs() if path.name == file)
        with path.open("rb") as opened:
            opened.seek(offset)
            content = opened.read(_MOST_BYTES)
        return {"text": content.decode("utf-8", "surrogateescape"), "next": offset + len(content)}

    def nccl(self) -> dict[str, Any]:
        """Return size by name of NCCL's files, and why they may show no channel."""
        part = self._started
        sizes = {path.name: path.stat().st_size for path in part.nccl_logs()}
        return {"files": sizes, "obstacle": part.nccl_log_obstacle()}

    def segments(self, pids: Sequence[int]) -> dict[str, list[str]]:
        """Return the shared-memory segments that processes have mapped, by process id."""
        return {str(pid): sorted(keeper_script.mapped_segments([pid])) for pid in pids}

    def surroundings(self, pids: Mapping[str, int]) -> dict[str, Any]:
        """Return what surrounds the processes of ranks. :param pids: process id of each rank."""
        return surroundings_to_document(read_surroundings(_numbered(pids)))

    def occupancy(self, pids: Mapping[str, int]) -> dict[str, Any] | None:
        """Return on which GPUs this node's ranks compute; ``None`` on the CPU platform.

        :param pids: process id of each rank, which begin with 0 on each node.
        """
        part = self._started
        if self._watch is None:
            return None
        return occupancy_to_document(self._watch.report(part.spec.devices, _numbered(pids), part.pids))

    def note(self) -> None:
        """Let the keeper remember the shared memory that is mapped now."""
        self._started.note_segments()

    def stop(self) -> None:
        """End the server and free its devices; its logs can still be read."""
        if self._part is not None:
            self._part.stop()
        self._is_running = False
        if self._locks is not None:
            self._locks.release()
            self._locks = None
        self._watch = None

    @property
    def _started(self) -> NodePart:
        if self._part is None:
            raise ValueError("nothing was started here")
        return self._part

    def _chosen(self, indices: Sequence[int]) -> tuple[Device, ...]:
        if self._topology is None:
            raise ValueError("the topology was not asked for, so indices of devices mean nothing")
        return tuple(self._topology.device(index) for index in indices)

    # -- devices under load --------------------------------------------------------------------------------------

    def telemetry_start(self, platform: Platform, devices: Sequence[int], pids: Sequence[int]) -> None:
        """Begin to watch devices. :param pids: of processes at the top of trees whose CPU time is not foreign."""
        self.telemetry_stop()  # of a load that broke off
        self._telemetry = TelemetryWatch(platform, self._chosen(devices), server_pids=pids)
        self._telemetry.__enter__()

    def telemetry_stop(self) -> dict[str, Any] | None:
        """Return what was seen; ``None`` where nothing was watched."""
        watch, self._telemetry = self._telemetry, None
        if watch is None:
            return None
        watch.__exit__(None, None, None)
        return telemetry_to_document(watch.seen)


_METHODS: Mapping[str, Callable[..., Any]] = {
    "hello": NodeAgent.hello,
    "topology": NodeAgent.topology,
    "ping": NodeAgent.ping,
    "route": NodeAgent.route,
    "ports": NodeAgent.ports,
    "reserve": NodeAgent.reserve,
    "start": NodeAgent.start,
    "adopt": NodeAgent.adopt,
    "poll": NodeAgent.poll,
    "read": NodeAgent.read,
    "nccl": NodeAgent.nccl,
    "segments": NodeAgent.segments,
    "surroundings": NodeAgent.surroundings,
    "occupancy": NodeAgent.occupancy,
    "telemetry_start": NodeAgent.telemetry_start,
    "telemetry_stop": NodeAgent.telemetry_stop,
    "note": NodeAgent.note,
    "stop": NodeAgent.stop,
    "bye": NodeAgent.close,
}
"""What can be asked, by name."""


def _idle_gpus(layout: str, devices: Sequence[Device]) -> GpuWatch:
    """Who is on the GPUs, once nobody is on these; those who have just ended get a few seconds."""
    source = NvmlProcesses()
    before = await_idle_devices(
        source,
        parse_layout(layout),
        devices,
        wait_s=0.0,
        clock=time.monotonic,
        sleep=time.sleep,
        progress=lambda _text: None,
    )
    return GpuWatch(source, before)


def _numbered(pids: Mapping[str, int]) -> dict[int, int]:
    return {int(rank): pid for rank, pid in pids.items()}


def _refuse(text: str) -> None:
    raise _Held(text)


# -- requests and replies --------------------------------------------------------------------------------------------


class _Lines:
    """Lines of a file descriptor, waited for until a time."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._unread = b""

    def next(self, limit_s: float | None) -> bytes | None:
        """Return the next line, ``None`` where the input has ended or nothing came in time."""
        while b"\n" not in self._unread:
            if not select.select([self._descriptor], [], [], limit_s)[0]:
                return None
            chunk = os.read(self._descriptor, 1 << 16)
            if not chunk:
                return None
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line


def reply_to(agent: NodeAgent, line: bytes) -> bytes:
    """Answer one request; what goes wrong becomes a reply as well."""
    number = None
    try:
        request = json.loads(line)
        number = request["id"]
        reply = {"id": number, "result": agent.answer(request["method"], request["arguments"])}
    except _ERRORS as error:
        traceback.print_exc()  # its place is the standard error, whose end the test run shows when a node is lost
        reply = {"id": number, "error": {"kind": type(error).__name__, "text": str(error) or type(error).__name__}}
    return json.dumps(reply).encode() + b"\n"


def run(agent: NodeAgent, requests: int, replies: int) -> None:
    """Answer requests until there are no more, or the test run is silent for too long.

    :param requests: file descriptor to read from. :param replies: and to write to.
    """
    lines = _Lines(requests)
    while not agent.is_over:
        line = lines.next(SILENCE_S if agent.is_busy else None)
        if line is None:
            return
        reply = reply_to(agent, line)
        try:
            while reply:
                reply = reply[os.write(replies, reply) :]
        except BrokenPipeError:
            return


def main(make: Callable[[], NodeAgent] = NodeAgent) -> None:
    """Entry point: keep standard output for replies, leave the terminal's Ctrl-C to the test run, and leave nothing.

    :param make: makes the agent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    replies = os.dup(1)
    os.dup2(2, 1)  # whatever prints here must not stand between replies
    agent = make()
    try:
        run(agent, 0, replies)
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        agent.close()


if __name__ == "__main__":
    main()
