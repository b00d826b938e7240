"""Public fakes for every port: try a suite, or a plugin of your own, without a GPU, a server or any waiting.

A conftest that runs every test against them::

    from pytest_gpulayout.testing import (
        FakeCollectiveProbe, FakeLoadDriver, FakeServerLauncher, FakeTopologySource
    )

    def pytest_gpulayout_topology_source(settings, layout):
        return FakeTopologySource(gpus=8, link="NV18", platform=settings.platform)

    def pytest_gpulayout_server_launcher(settings, log_dir):
        return FakeServerLauncher(log_dir, transport="P2P/CUMEM")

    def pytest_gpulayout_collective_probe(settings, log_dir):
        return FakeCollectiveProbe(gb_per_s=370)

    def pytest_gpulayout_load_driver(settings):
        return FakeLoadDriver(ttft_ms=20, tpot_ms=5)

The fakes write logs in the formats of NCCL and vLLM, so that the real readers judge them. They import no adapter.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import Any

from pytest_gpulayout.collectives import GroupTimes, ProbeRun, wire_bytes
from pytest_gpulayout.errors import MeasurementError, NodeError, NodeLost, ServerExited, TopologyError
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.links import parse_link_class
from pytest_gpulayout.occupancy import (
    GpuProcess,
    GpuUse,
    Occupancy,
    OccupancyReport,
    await_idle_devices,
    judge_occupancy,
)
from pytest_gpulayout.ports import Endpoint, Platform, ProbeSpec, Progress, ServerProof, ServerSpec
from pytest_gpulayout.replicas import join_ranks, split_spec
from pytest_gpulayout.surroundings import Surroundings
from pytest_gpulayout.topology import Device, Topology
from pytest_gpulayout.topology_document import topology_to_document
from pytest_gpulayout.trace import BatchTrace, ClientWork, Observations, RequestTrace, RunTrace
from pytest_gpulayout.workload import Workload

__all__ = [
    "FakeCollectiveProbe",
    "FakeGpuProcess",
    "FakeGpuProcesses",
    "FakeLoadDriver",
    "FakeNode",
    "FakeNodes",
    "FakeServer",
    "FakeServerLauncher",
    "FakeTopologySource",
    "InMemoryBaselines",
]

_GIB = 2**30
_NS_PER_MS = 1_000_000
_FIRST_PID = 2**22 + 1
"""Linux gives no process an id above 2**22, so nobody can hit a real one by mistake."""
_CHANNELS = 2
_SLOW = "/slow-down-"
"""In the address of a fake server, before its factor: all that a load driver knows of a server is its address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeTopologySource:
    """Devices that are described instead of probed.

    ``FakeTopologySource(gpus=4, link="PIX", links={(0, 1): "NV4", (2, 3): None})`` has one bridge, and one link
    that nobody knows.

    :param link: class of every link that ``links`` does not name; ``None`` for unknown.
    :param links: class by pair of indices (a, b), a < b.
    :param numa_nodes: of the first GPUs; the others are on node 0.
    :param power_limit_w: that is set on every GPU, ``None`` where the driver does not tell.
    :param error: raised by :meth:`probe` instead, as on a machine without a driver.
    """

    gpus: int = 8
    link: str | None = "NV18"
    links: Mapping[tuple[int, int], str | None] = field(default_factory=dict)
    name: str = "NVIDIA H200"
    memory_gib: int = 141
    numa_nodes: Sequence[int] = ()
    platform: Platform = "cuda"
    driver_version: str | None = "580.65.06"
    cuda_version: str | None = "13.0"
    error: TopologyError | None = None
    power_limit_w: int | None = 700

    def probe(self) -> Topology:
        """Return what was described.

        :raises TopologyError: the one that was given as ``error``.
        """
        if self.error is not None:
            raise self.error
        if self.platform == "cpu":
            devices = tuple(
                Device(index, name=f"core {index}", numa_node=0, cpu_affinity=str(index))
                for index in range(self.gpus)
            )
            return Topology(devices, {}, "fake", recorded=False, platform="cpu")
        cells = {pair: self.links.get(pair, self.link) for pair in combinations(range(self.gpus), 2)}
        return Topology(
            devices=tuple(map(self._gpu, range(self.gpus))),
            links={pair: parse_link_class(text) for pair, text in cells.items() if text is not None},
            source="fake",
            recorded=False,
            driver_version=self.driver_version,
            cuda_version=self.cuda_version,
        )

    def _gpu(self, index: int) -> Device:
        return Device(
            index,
            name=self.name,
            uuid=_uuid(index),
            pci_bus_id=f"00000000:{index + 1:02X}:00.0",
            numa_node=self.numa_nodes[index] if index < len(self.numa_nodes) else 0,
            memory_bytes=self.memory_gib * _GIB,
            power_limit_w=self.power_limit_w,
        )


def _uuid(index: int) -> str:
    return f"GPU-00000000-0000-0000-0000-{index:012x}"


class FakeNode:
    """A node that is described instead of reached: it says who it is and what devices it has, and starts nothing.

    ``FakeNode("b", FakeTopologySource(gpus=4, link="PIX"), vllm="0.31.0")`` has another vLLM than its neighbours.

    :param topology: its devices; their UUIDs become its own. :param vllm: version, ``None`` where it has none.
    :param answers: to other requests, by method.
    """

    def __init__(
        self,
        name: str,
        topology: FakeTopologySource | None = None,
        *,
        vllm: str | None = "0.32.0",
        answers: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self._topology = topology or FakeTopologySource()
        self._vllm = vllm
        self._answers = answers or {}
        self.is_lost = False
        """Set it, and the node answers no more."""
        self.is_closed = False
        self.requests: list[tuple[str, Mapping[str, Any]]] = []
        """What it was asked, in order."""

    def request(self, method: str, arguments: Mapping[str, Any], *, timeout_s: float) -> Any:  # noqa: ARG002
        """Answer.

        :raises NodeError: it has no answer to that. :raises NodeLost: :attr:`is_lost` is set.
        """
        self.requests.append((method, arguments))
        if self.is_lost:
            raise NodeLost(f"node {self.name} must stay while a layout runs on it, and is lost", node=self.name)
        if method in self._answers:
            return self._answers[method]
        if method == "hello":
            return self._hello()
        if method == "topology":
            return {"topology": topology_to_document(self._own_topology()), "busy": []}
        raise NodeError(f"a fake node has no answer to {method!r}\n  on node {self.name}", node=self.name)

    def close(self) -> None:
        """Remember that it was closed; may be called again."""
        self.is_closed = True

    def _hello(self) -> dict[str, Any]:
        try:
            own = metadata.version("pytest-gpulayout")
        except metadata.PackageNotFoundError:
            own = None
        return {
            "host": self.name,
            "machine": f"machine of {self.name}",
            "network": f"net of {self.name}",
            "processes": f"pid of {self.name}",
            "pid": _FIRST_PID,
            "addresses": [{"interface": "eth0", "address": "192.0.2.1"}],  # of documentation, RFC 5737
            "python": "/usr/bin/python3",
            "processor": "a fake",
            "versions": {"pytest-gpulayout": own, "python": "3.11", "vllm": self._vllm, "torch": None, "nccl": None},
        }

    def _own_topology(self) -> Topology:
        topology = self._topology.probe()
        devices = [replace(device, uuid=device.uuid and f"{device.uuid}-{self.name}") for device in topology.devices]
        return replace(topology, devices=tuple(devices))


class FakeNodes:
    """Nodes that are described instead of reached.

    ``FakeNodes("a", "b")`` has two with eight GPUs each, ``FakeNodes(FakeNode("a", ...), ...)`` others.
    """

    def __init__(self, *nodes: FakeNode | str) -> None:
        self.nodes = [FakeNode(node) if isinstance(node, str) else node for node in nodes]
        """All of them, in order of their ranks."""

    def open(self, count: int, progress: Progress) -> Sequence[FakeNode]:
        """Return the first ``count`` of them.

        :raises NodeError: there are fewer.
        """
        progress("looking for nodes")
        if count > len(self.nodes):
            names = ", ".join(node.name for node in self.nodes) or "none"
            raise NodeError(f"{count} nodes are required, found {names}", node=f"number {len(self.nodes) + 1}")
        return self.nodes[:count]


@dataclass(frozen=True, slots=True)
class FakeGpuProcess:
    """Somebody else's process on a GPU.

    :param gpu: index. :param name: what is shown for its id. :param leaves_after_s: on the clock of the lists.
    """

    gpu: int
    pid: int = 4242
    memory_bytes: int | None = 8 * _GIB
    name: str = "python train.py (user bob)"
    leaves_after_s: float | None = None


class FakeGpuProcesses:
    """The process lists of a driver, and a clock that moves only when somebody waits.

    ``FakeGpuProcesses(contexts={0: (0, 3)})``: rank 0 of every server has a context on GPU 3, too.

    :param others: processes that are not of the server; the list may be changed at any time.
    :param contexts: indices of the GPUs that a process of the server has contexts on, by rank or by title; a rank
        has one on its own GPU, and ``VLLM::EngineCore`` none, unless it is said here.
    :param hidden: as in a container, process ids are those of the host.
    :param listed: whether the driver lists processes at all; under WSL2 it does not.
    """

    def __init__(
        self,
        *,
        gpus: int = 8,
        others: Sequence[FakeGpuProcess] = (),
        contexts: Mapping[int | str, Sequence[int]] | None = None,
        hidden: bool = False,
        listed: bool = True,
    ) -> None:
        self.others = list(others)
        self.now_s = 0.0
        self._uuids = {index: _uuid(index) for index in range(gpus)}
        self._contexts = {} if contexts is None else contexts
        self._hidden = hidden
        self._listed = listed
        self._servers: list[FakeServer] = []

    def clock(self) -> float:
        """Return the time in seconds."""
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """Let time pass, at once."""
        self.now_s += seconds

    def know(self, devices: Sequence[Device]) -> None:
        """Let these GPUs be there, whatever topology names them; of several nodes also those that share an index."""
        seen: set[int] = set()
        for device in devices:
            uuid = device.uuid or _uuid(device.index)
            if device.index not in seen:
                self._uuids[device.index] = uuid
            elif uuid not in self._uuids.values():
                self._uuids[max(self._uuids) + 1] = uuid
            seen.add(device.index)

    def add(self, server: FakeServer) -> None:
        """Let a server's processes be there."""
        self._servers.append(server)

    def remove(self, server: FakeServer) -> None:
        """Let them be gone."""
        self._servers.remove(server)

    def describe(self, pid: int) -> str:
        """Return the name of somebody else's process."""
        return next((other.name for other in self.others if other.pid == pid), "")

    def snapshot(self) -> Occupancy:
        """Return who is where now."""
        processes = [*self._of_others(), *(process for server in self._servers for process in self._of(server))]
        used = dict.fromkeys(self._uuids.values(), 0)
        for process in processes:
            used[process.uuid] += process.memory_bytes or 0
        return Occupancy(
            gpus=tuple(GpuUse(i, uuid, used[uuid], self._listed) for i, uuid in sorted(self._uuids.items())),
            processes=tuple(processes) if self._listed else (),
        )

    def _of_others(self) -> Iterator[GpuProcess]:
        for other in self.others:
            if other.leaves_after_s is None or self.now_s < other.leaves_after_s:
                yield GpuProcess(self._uuids[other.gpu], other.pid, other.memory_bytes)

    def _of(self, server: FakeServer) -> Iterator[GpuProcess]:
        offset = _FIRST_PID if self._hidden else 0
        contexts: dict[int | str, Sequence[int]] = {
            rank: (self._index_of(device),) for rank, device in enumerate(server.spec.devices)
        }
        for who, indices in (contexts | dict(self._contexts)).items():
            pid = server.pid_of(who)
            if pid is not None:
                yield from (GpuProcess(self._uuids[i], pid + offset, 16 * _GIB) for i in indices)

    def _index_of(self, device: Device) -> int:
        wanted = device.uuid or _uuid(device.index)
        return next(index for index, uuid in self._uuids.items() if uuid == wanted)


class FakeServer:
    """A server that exists on paper: nothing listens at its address.

    Of a layout with replicas (``tp2x2``) :meth:`parts` are the replicas, each a fake server that may die by itself.

    :param folder: an existing folder for its log, and for NCCL's logs.
    :param transport: see :class:`FakeServerLauncher`.
    :param processes: where its processes are; by default each rank on its GPU.
    :param slow_down: factor on all latencies that :class:`FakeLoadDriver` computes for it.
    :param on_stop: called once, when it is stopped.
    :param first_pid: process id of its rank 0.
    """

    def __init__(
        self,
        spec: ServerSpec,
        folder: Path,
        *,
        transport: str | None,
        processes: FakeGpuProcesses | None = None,
        slow_down: float = 1.0,
        on_stop: Callable[[], None] = lambda: None,
        first_pid: int = _FIRST_PID,
    ) -> None:
        ranks = spec.layout.ranks
        name = _fingerprint_factors(spec.layout)
        self.spec = spec
        speed = "" if slow_down == 1 else f"{_SLOW}{slow_down}"
        self.endpoint = Endpoint(f"http://127.0.0.1:9{speed}", spec.model, "fake-key")
        factors = spec.layout.engine_arguments(master_addr="127.0.0.1")
        self.command = ("python", "--model", spec.model, *factors, *spec.arguments)
        self.log = folder / "server.log"
        self._nccl_dir = folder / "nccl"
        self._transport = transport
        self._on_stop = on_stop
        self._stopped = False
        self._cause: str | None = None
        self._replicas: list[FakeServer] = [
            FakeServer(
                own,
                folder / f"replica-{number}",
                transport=transport,
                slow_down=slow_down,
                first_pid=first_pid + number * (ranks + 1),  # an engine is between them
            )
            for number, own in enumerate(split_spec(spec) if spec.layout.replicas > 1 else ())
        ]
        pids = [replica.proof.rank_pids for replica in self._replicas]
        self.proof: ServerProof = ServerProof(
            vllm_version="0.32.0",
            fingerprint=f"vllm-0.32.0{name}-0123abcd",
            rank_pids=join_ranks(pids, ranks) if pids else {rank: first_pid + rank for rank in range(ranks)},
            start_s=1.0,
            proxy="nginx/fake" if pids else "",
            moe=spec.layout.ep and spec.layout.dp > 1,
        )
        self.processes = processes or FakeGpuProcesses()
        self.processes.know(spec.devices)
        self._before = self.processes.snapshot()
        self.processes.add(self)
        self._write_logs()

    def nccl_logs(self) -> Sequence[Path]:
        """Return the files that NCCL would have written, one per rank."""
        own = self._nccl_dir.iterdir() if self._nccl_dir.is_dir() else ()
        return sorted([*own, *(path for replica in self._replicas for path in replica.nccl_logs())])

    def parts(self) -> Sequence[FakeServer]:
        """Return its replicas; itself where it has none."""
        return self._replicas or [self]

    def nccl_log_obstacle(self) -> str | None:
        """Return that nothing hides the channels."""
        return None

    def surroundings(self) -> Surroundings:
        """Return that nothing is known of what surrounds its ranks, which run nowhere."""
        return Surroundings()

    def mapped_segments(self) -> Mapping[int, Collection[str]]:
        """Return the segments of vLLM's shared-memory communicator; none where the transport is another."""
        if self._replicas:
            return join_ranks([replica.mapped_segments() for replica in self._replicas], self.spec.layout.ranks)
        ranks = range(self.spec.layout.ranks)
        if self._transport in (None, "CPU/GLOO") or len(ranks) == 1:
            return dict.fromkeys(ranks, ())
        mapped: dict[int, list[str]] = {rank: [] for rank in ranks}
        kinds = self.spec.layout.communication_groups()
        for name in ("tp", "pp"):
            for group in kinds.get(name, ()):
                numbers = "-".join(map(str, group))
                paths = [f"/dev/shm/vllm_dist_fake-{name}:0-[{numbers}]-cpushm_{at}" for at in range(len(group))]
                for rank in group:
                    mapped[rank] += paths
        return mapped

    def pids(self) -> Mapping[int, str]:
        """Return its processes, process id -> title; with one rank the engine core computes itself."""
        if self._replicas:
            return {pid: title for replica in self._replicas for pid, title in replica.pids().items()}
        ranks = self.proof.rank_pids
        engine = {max(ranks.values()) + 1: "VLLM::EngineCore"}
        if len(ranks) == 1:
            return dict.fromkeys(ranks.values(), "VLLM::EngineCore")
        return {pid: _worker_title(self.spec.layout, rank) for rank, pid in ranks.items()} | engine

    def pid_of(self, who: int | str) -> int | None:
        """Return the process id of a rank, or of the process with this title."""
        if isinstance(who, int):
            return self.proof.rank_pids.get(who)
        return next((pid for pid, title in self.pids().items() if title == who), None)

    def gpu_processes(self) -> OccupancyReport | None:
        """Return on which GPUs its processes are; ``None`` on the CPU platform."""
        if self.spec.platform == "cpu":
            return None
        return judge_occupancy(
            self._before,
            self.processes.snapshot(),
            self.spec.devices,
            self.proof.rank_pids,
            self.pids(),
            self.processes.describe,
        )

    def check_alive(self) -> None:
        """Do nothing until :meth:`die` was called.

        :raises ServerExited: it was, or that of a replica, which is named.
        """
        for number, replica in enumerate(self._replicas):
            try:
                replica.check_alive()
            except ServerExited as error:
                where = f"replica {number} of layout {self.spec.layout}"
                raise ServerExited(f"{where}: {error}", command=error.command, exit_code=error.exit_code) from error
        if self._cause is not None:
            raise ServerExited(
                f"the vLLM server for {self.spec.layout} went away while it was in use\n  cause: {self._cause}",
                command=self.command,
                exit_code=1,
            )

    def die(self, cause: str = "EngineDeadError") -> None:
        """Go away, as an engine that runs out of memory does. :param cause: what its log would say."""
        self._cause = cause

    def stop(self) -> None:
        """End; may be called again."""
        if not self._stopped:
            self._stopped = True
            self.processes.remove(self)
            self._on_stop()

    def _write_logs(self) -> None:
        self._nccl_dir.mkdir(parents=True)
        self.log.write_text("".join(line + "\n" for line in self._vllm_lines()), encoding="utf-8")
        transport = None if self._replicas or self.spec.platform == "cpu" else self._transport
        if self.spec.layout.communication_groups() and transport is not None:
            for rank, pid in self.proof.rank_pids.items():
                text = "".join(line + "\n" for line in _nccl_lines(self.spec.layout, rank, pid, transport))
                (self._nccl_dir / f"nccl.fake-host.{pid}.log").write_text(text, encoding="utf-8")

    def _vllm_lines(self) -> Iterator[str]:
        head = f"(Worker_TP0 pid={_FIRST_PID}) INFO 11-21 04:07:12"
        if self.spec.platform == "cpu" and self.spec.layout.ranks > 1 and self._transport == "CPU/GLOO":
            yield (
                f"{head} [cpu_communicator.py:47] CPU SHM communicator disabled for group tp:0: "
                "ranks span multiple nodes; falling back to torch.distributed for CPU collectives."
            )
        yield f"{head} [api_server.py:500] Application startup complete."


def _fingerprint_factors(layout: Layout) -> str:
    """``-tp2-dp2-ep``, as in vLLM's fingerprint."""
    sizes = (("tp", layout.tp), ("pp", layout.pp), ("dp", layout.dp))
    return "".join(f"-{factor}{size}" for factor, size in sizes if size > 1) + ("-ep" if layout.ep else "")


def _worker_title(layout: Layout, rank: int) -> str:
    """``VLLM::Worker_PP1_TP0``; engines of a dense model leave out which of them they are."""
    sizes = {"PP": layout.pp, "PCP": layout.pcp, "TP": layout.tp, "DCP": layout.dcp}
    sizes = {"DP": layout.dp if layout.ep else 1, **sizes}
    named = [axis for axis, size in sizes.items() if size > 1] + (["EP"] if layout.ep else [])
    places = layout.places(rank)
    return "VLLM::Worker" + "".join(f"_{axis}{places[axis]}" for axis in named)


def _nccl_lines(layout: Layout, rank: int, pid: int, transport: str) -> Iterator[str]:
    """NCCL 2.27's log of one rank, at NCCL_DEBUG=INFO (``src/init.cc``, ``src/transport/*.cc``): a ring per group."""
    head = f"fake-host:{pid}:{pid + 50} [{rank}] NCCL INFO"
    network = "Socket" if transport.startswith("NET/Socket") else "IB"
    yield f"{head} NCCL version 2.27.7+cuda13.0"
    yield f"{head} Using network {network}"
    groups = (ranks for of_kind in layout.communication_groups().values() for ranks in of_kind)
    for number, ranks in enumerate(groups):
        if rank in ranks:
            yield from _communicator_lines(head, number, ranks, rank, transport)


def _communicator_lines(head: str, number: int, ranks: tuple[int, ...], rank: int, transport: str) -> Iterator[str]:
    """What a rank logs of one communicator. :param number: that tells it from the others of this server."""
    me, nranks = ranks.index(rank), len(ranks)
    comm = f"comm 0x55d0c0de{number:02x}{rank:02x} rank {me}"
    yield (
        f"{head} ncclCommInitRankConfig {comm} nranks {nranks} cudaDev {rank} nvmlDev {rank} "
        f"busId {rank + 1}000 commId 0x{0x5EEDF00D + number:x} - Init START"
    )
    yield f"{head} {comm} nRanks {nranks} nNodes 1 localRanks {nranks} localRank {me} MNNVL 0"
    before, own, after = (f"{at % nranks}[{ranks[at % nranks]}]" for at in (me - 1, me, me + 1))
    for channel in range(_CHANNELS):
        name = f"{head} Channel {channel:02d}/0 :"
        if transport.startswith(
            "NET/"
        ):  # a network names both ends, peer to peer and shared memory the sender's only
            yield f"{name} {before} -> {own} [receive] via {transport}"
            yield f"{name} {own} -> {after} [send] via {transport}"
        else:
            yield f"{name} {own} -> {after} via {transport}"


class FakeServerLauncher:
    """Starts :class:`FakeServer`, and remembers what it started and stopped.

    ``FakeServerLauncher(log_dir, failures={2: ServerStartFailed("CUDA out of memory")})`` fails at its second start.

    :param log_dir: an existing folder.
    :param transport: what follows ``via`` in NCCL's log, such as ``"P2P/CUMEM"`` or ``"NET/Socket/0"``; ``None``
        leaves no evidence. On the CPU platform ``"CPU/GLOO"`` is the slow one, everything else is shared memory.
    :param processes: who is on which GPU; by default each rank on its own, and nobody else.
    :param wait_s: how long a start waits for others to leave, on the clock of ``processes``.
    :param slow_down: factor on all latencies of the servers that have this Python, or this among their arguments:
        ``{"/opt/old/bin/python": 1.3, "--enforce-eager": 1.1}``.
    :param failures: what a start raises, by its number, from 1; ``KeyboardInterrupt()`` is Ctrl-C while it loads.
    :param on_event: called with ``"start"`` or ``"stop"`` and the server's spec.
    """

    def __init__(
        self,
        log_dir: Path,
        *,
        transport: str | None = "P2P/CUMEM",
        processes: FakeGpuProcesses | None = None,
        wait_s: float = 0.0,
        slow_down: Mapping[str, float] | None = None,
        failures: Mapping[int, BaseException] | None = None,
        on_event: Callable[[str, ServerSpec], None] | None = None,
    ) -> None:
        self._log_dir = log_dir
        self._transport = transport
        self._processes = processes or FakeGpuProcesses()
        self._wait_s = wait_s
        self._slow_down = slow_down or {}
        self._failures = failures or {}
        self._on_event = on_event
        self.launched: list[ServerSpec] = []
        """What was asked for, failures included, in order."""
        self.servers: list[FakeServer] = []
        """What came up, in order."""
        self.stopped: list[ServerSpec] = []
        """What was stopped, in order."""

    def launch(self, spec: ServerSpec, progress: Progress) -> FakeServer:
        """Return a server at once, or raise what was scripted for this start.

        :raises DevicesBusy: somebody else is on its GPUs, and stays.
        """
        self.launched.append(spec)
        number = len(self.launched)
        if number not in self._failures:
            self._await_idle(spec, progress)
        progress(f"{spec.layout}: vLLM is loading")
        if number in self._failures:
            raise self._failures[number]
        self._tell("start", spec)
        folder = self._log_dir / f"server-{number}-{spec.layout}"
        server = FakeServer(
            spec,
            folder,
            transport=self._transport,
            processes=self._processes,
            slow_down=math.prod(self._slow_down.get(word, 1.0) for word in (spec.python, *spec.arguments)),
            on_stop=lambda: self._stop(spec),
        )
        self.servers.append(server)
        return server

    def _await_idle(self, spec: ServerSpec, progress: Progress) -> None:
        if spec.platform == "cpu":
            return
        self._processes.know(spec.devices)
        await_idle_devices(
            self._processes,
            spec.layout,
            spec.devices,
            wait_s=self._wait_s,
            clock=self._processes.clock,
            sleep=self._processes.sleep,
            progress=progress,
        )

    def _stop(self, spec: ServerSpec) -> None:
        self.stopped.append(spec)
        self._tell("stop", spec)

    def _tell(self, event: str, spec: ServerSpec) -> None:
        if self._on_event is not None:
            self._on_event(event, spec)


class FakeLoadDriver:
    """Computes what a client would have seen, on a clock that is only a number; nothing is sent and nothing waits.

    Every request takes ``ttft_ms`` and then ``tpot_ms`` for each further token, one chunk per token; a freed place
    is taken at once. With ``noise=0`` all metrics are exact: ``median_ttft_ms`` is ``ttft_ms``.

    ``FakeLoadDriver(ttft_ms=20, tpot_ms=5, slow_down=[1.0, 1.3])``: from the second run on, 30 % slower.

    :param noise: relative spread (standard deviation) of the latencies, drawn once per run and once per request.
    :param seed: of the noise. :param slow_down: factor on all latencies: of all runs, or one per run in order, the
        last of which stays. :param fail_requests: so many requests at the start of each run fail.
    :param errors: what a run raises, by its number, from 1.
    :param observations: what else was seen in every run: a throttled GPU, a prefix cache that answered.
    :param clients: what the client's processes tell of every batch.
    """

    def __init__(
        self,
        *,
        ttft_ms: float = 20.0,
        tpot_ms: float = 5.0,
        noise: float = 0.0,
        seed: int = 0,
        slow_down: float | Sequence[float] = 1.0,
        fail_requests: int = 0,
        errors: Mapping[int, MeasurementError] | None = None,
        observations: Observations | None = None,
        clients: Sequence[ClientWork] = (),
    ) -> None:
        self._observations = observations or Observations()
        self._clients = tuple(clients)
        self._ttft_ns = ttft_ms * _NS_PER_MS
        self._tpot_ns = tpot_ms * _NS_PER_MS
        self._noise = noise
        self._random = random.Random(seed)
        self._slow_down = [slow_down] if isinstance(slow_down, (int, float)) else list(slow_down)
        self._fail_requests = fail_requests
        self._errors = errors or {}
        self.runs: list[tuple[Endpoint, Workload]] = []
        """Where each run went, and what it was asked to send."""

    def run(
        self,
        endpoint: Endpoint,
        workload: Workload,
        *,
        seed: int,
        progress: Progress,
        window: AbstractContextManager[object] | None = None,
    ) -> RunTrace:
        """Return the trace of all batches; see :class:`pytest_gpulayout.ports.LoadDriver`.

        :raises MeasurementError: the one that was scripted for this run.
        """
        self.runs.append((endpoint, workload))
        number = len(self.runs)
        progress(f"{workload.name}: sending")
        if number in self._errors:
            raise self._errors[number]
        factor = self._slow_down[min(number, len(self._slow_down)) - 1] * self._spread()
        factor *= float(endpoint.url.partition(_SLOW)[2] or 1)
        indices = itertools.count()
        batches: list[BatchTrace] = []
        now_ns = 10**12
        with window or nullcontext():
            for batch in range(workload.batches):
                batches.append(self._batch(batch, workload, now_ns, factor, indices))
                now_ns = batches[-1].end_ns + _NS_PER_MS
        return RunTrace(
            batches=tuple(batches),
            seed=seed,
            warmup_requests=workload.warmup_requests,
            connections=workload.in_flight,
            timestamp_source="computed",
            started_s=1_700_000_000.0,
            observations=self._observations,
        )

    def _batch(
        self, batch: int, workload: Workload, start_ns: int, factor: float, indices: Iterator[int]
    ) -> BatchTrace:
        free_at = [start_ns] * workload.in_flight
        requests = []
        for index in itertools.islice(indices, workload.requests):
            request = self._request(index, batch, workload, heapq.heappop(free_at), factor * self._spread())
            heapq.heappush(free_at, request.end_ns)
            requests.append(request)
        return BatchTrace(
            index=batch, requests=tuple(requests), start_ns=start_ns, end_ns=max(free_at), clients=self._clients
        )

    def _request(self, index: int, batch: int, workload: Workload, send_ns: int, factor: float) -> RequestTrace:
        tokens = workload.output_tokens
        chunks = tuple(send_ns + round(factor * (self._ttft_ns + n * self._tpot_ns)) for n in range(tokens))
        failed = index < self._fail_requests
        return RequestTrace(
            index=index,
            batch=batch,
            prompt_tokens=workload.input_tokens or 0,
            output_tokens=0 if failed else tokens,
            send_ns=send_ns,
            chunk_ns=() if failed else chunks,
            end_ns=chunks[-1],
            error="HTTP 500: a failure that was asked for" if failed else None,
        )

    def _spread(self) -> float:
        return self._random.lognormvariate(0.0, self._noise)


class FakeCollectiveProbe:
    """Computes what an all-reduce would have taken, by a latency and a bandwidth; nothing is started, nothing waits.

    ``FakeCollectiveProbe(gb_per_s=[370, 24])``: from the second start on, the links are as slow as PCIe.

    :param latency_us: of a message that has hardly any bytes. :param gb_per_s: bus bandwidth of a large one. Both of
        all starts, or one per start in order, the last of which stays.
    :param noise: relative spread (standard deviation) of the times, drawn once per start and once per round.
    :param seed: of the noise. :param transport: what NCCL's log would name; on the CPU platform it is gloo.
    :param errors: what a start raises, by its number, from 1.
    """

    def __init__(
        self,
        *,
        latency_us: float | Sequence[float] = 10.0,
        gb_per_s: float | Sequence[float] = 370.0,
        noise: float = 0.0,
        seed: int = 0,
        transport: str = "P2P/CUMEM",
        errors: Mapping[int, Exception] | None = None,
    ) -> None:
        self._latency_us = _per_start(latency_us)
        self._gb_per_s = _per_start(gb_per_s)
        self._noise = noise
        self._random = random.Random(seed)
        self._transport = transport
        self._errors = errors or {}
        self.specs: list[ProbeSpec] = []
        """What was asked for, failures included, in order."""

    def run(self, spec: ProbeSpec, progress: Progress) -> ProbeRun:
        """Return the times of one start; see :class:`pytest_gpulayout.ports.CollectiveProbe`."""
        self.specs.append(spec)
        number = len(self.specs)
        progress(f"{spec.layout}: probing the links")
        if number in self._errors:
            raise self._errors[number]
        latency_us, gb_per_s = self._latency_us(number), self._gb_per_s(number)
        slow_down = self._spread()

        def round_of(ranks: int) -> dict[str, float]:
            factor = slow_down * self._spread()
            return {
                message.name: factor * (latency_us + wire_bytes(message.size_bytes, ranks) / gb_per_s / 1e3)
                for message in spec.plan.messages()
            }

        groups = tuple(
            GroupTimes(ranks, tuple(round_of(len(ranks)) for _ in range(spec.plan.rounds))) for ranks in spec.groups
        )
        channels = _CHANNELS * sum(map(len, spec.groups))
        if spec.platform == "cpu":
            return ProbeRun(groups, 1.0, "gloo of torch fake", {"CPU/GLOO": channels})
        return ProbeRun(groups, 1.0, "nccl 2.27.7 of torch fake", {self._transport: channels})

    def _spread(self) -> float:
        return self._random.lognormvariate(0.0, self._noise)


def _per_start(value: float | Sequence[float]) -> Callable[[int], float]:
    """The value of each start, by its number from 1; the last one stays."""
    values = [value] if isinstance(value, (int, float)) else list(value)
    return lambda number: values[min(number, len(values)) - 1]


class InMemoryBaselines:
    """A store without files, for code that judges through :mod:`pytest_gpulayout.judging`. :param texts: by path."""

    def __init__(self, texts: Mapping[str, str] | None = None, *, root: str = "memory") -> None:
        self.root = root
        self.texts = dict(texts or {})
        self._writing = threading.RLock()

    def read(self, path: str) -> str | None:
        """Return the text stored under ``path``, ``None`` when there is none."""
        return self.texts.get(path)

    def update(self, path: str, change: Callable[[str | None], str | None]) -> bool:
        """Store what ``change`` makes of what is stored; threads take turns."""
        with self._writing:
            before = self.texts.get(path)
            after = change(before)
            if after is None:
                self.texts.pop(path, None)
            else:
                self.texts[path] = after
        return before is not None

    def paths(self) -> Sequence[str]:
        """Return all stored paths, sorted."""
        return sorted(self.texts)
