"""Writes NCCL logs: any layout, over any transports, in the words of any version, with faults on demand.

Knows how NCCL (and RCCL) spells its lines from release to release, and which communicators vLLM makes. It shares no
code with the reader: what a line says is kept beside it, as a :class:`Wire`, so that tests can compare. The forms are
those of NVIDIA/nccl, tags v2.4.8 to v2.30.7: ``src/init.cc`` (init, rings, trees, network), ``src/transport/p2p.cc``,
``shm.cc``, ``net.cc``, ``coll_net.cc``, ``nvls.cc`` (channels), ``src/debug.cc`` (heads), ``src/misc/param.cc``
(variables), ``src/misc/shmutils.cc`` (warnings), and of ROCm/rccl.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import chain

from pytest_gpulayout.layout import Layout

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Form:
    """One version's way to write. :param version: as it is logged; ``release`` are its first two numbers."""

    release: tuple[int, int]
    version: str
    rccl: bool = False

    def __str__(self) -> str:
        return f"RCCL {self.version}" if self.rccl else self.version

    @property
    def has_cumem(self) -> bool:
        """Whether P2P memory comes from cuMem, which also makes connections wait for the first collective."""
        return self.release >= (2, 18) and not self.rccl

    @property
    def has_comm_ids(self) -> bool:
        """Whether init lines carry an identity that all ranks share."""
        return self.release >= (2, 14)


FORMS = (
    Form((2, 4), "2.4.8+cuda10.1"),
    Form((2, 7), "2.7.8+cuda10.2"),
    Form((2, 8), "2.8.4+cuda11.2"),
    Form((2, 10), "2.10.3+cuda11.3"),
    Form((2, 12), "2.12.12+cuda11.6"),
    Form((2, 14), "2.14.3+cuda11.7"),
    Form((2, 18), "2.18.5+cuda12.2"),
    Form((2, 20), "2.20.5+cuda12.4"),
    Form((2, 22), "2.22.3+cuda12.6"),
    Form((2, 26), "2.26.2+cuda12.8"),
    Form((2, 29), "2.29.3+cuda13.1"),
    Form((2, 30), "2.30.7+cuda13.2"),
    Form((2, 22), "2.22.3-HEAD:5c0ffee", rccl=True),
)


class Medium(StrEnum):
    """What connects two ranks, whatever a version calls it."""

    P2P = "p2p"
    P2P_READ = "p2p read"
    MNNVL = "mnnvl"
    SHM = "shm"
    IB = "IB"
    PLUGIN = "AWS Libfabric"
    SOCKET = "Socket"

    @property
    def is_network(self) -> bool:
        """Whether both ends log it."""
        return self in (Medium.IB, Medium.PLUGIN, Medium.SOCKET)


class Nvls(StrEnum):
    """NVLink SHARP; alone it leaves no channel line, which only versions with late connections can do."""

    OFF = "off"
    BESIDE = "beside channels"
    ALONE = "alone"


class Fault(StrEnum):
    """What goes wrong in a log."""

    SOCKET_PAIR = "one pair of ranks goes over a socket"
    SHM_PAIR = "one pair of ranks goes through host memory"
    MISSING_RANK = "one process left no log"
    NO_CONNECTIONS = "every log ends before connections are set up"
    P2P_DISABLED = "NCCL_P2P_DISABLE is set"
    SHM_TOO_SMALL = "/dev/shm is full"
    NO_IB_DEVICE = "no RDMA device is visible"


class Kind(StrEnum):
    """What a line is about."""

    HEAD = "version, plugins, network"
    ENVIRONMENT = "a variable"
    INIT = "a rank of a communicator"
    GRAPH = "rings and trees"
    CHANNEL = "a transport"
    NVLS = "buffers made"
    CONNECTED = "an algorithm is connected"
    COMPLETE = "init is done"
    WARNING = "a warning, and what it made fail"


EVIDENCE = frozenset({Kind.CHANNEL, Kind.NVLS})
"""Lines without which nothing is proved."""


@dataclass(frozen=True, slots=True)
class Wire:
    """What a channel line says; CollNet names no ``dst``."""

    src: int
    dst: int | None
    transport: str


@dataclass(frozen=True, slots=True)
class Line:
    """One line. :param rank: of its process, in the layout. :param comm: number of its communicator."""

    rank: int
    kind: Kind
    text: str
    comm: int | None = None
    wire: Wire | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank runs."""

    host: str
    pid: int
    cuda_dev: int
    nvml_dev: int
    bus_id: str


@dataclass(frozen=True, slots=True)
class Comm:
    """One communicator. :param ranks: of the layout, in the order of its own ranks. :param addresses: likewise."""

    name: str
    ranks: tuple[int, ...]
    comm_id: str
    addresses: tuple[str, ...]

    @property
    def nranks(self) -> int:
        """Its size."""
        return len(self.ranks)

    def ring(self) -> Iterator[Pair]:
        """Its own ranks, each with the one that it sends to."""
        yield from ((rank, (rank + 1) % self.nranks) for rank in range(self.nranks))

    def edges(self) -> Iterator[Pair]:
        """Whom the ring connects, then whom the tree (a chain) adds."""
        ring = list(self.ring())
        yield from ring
        yield from ((rank, rank - 1) for rank in range(1, self.nranks) if (rank, rank - 1) not in ring)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What is to be written.

    :param medium: between ranks of one host; ``between_hosts`` where there are several.
    :param media: exceptions, by ranks (a, b) of the layout, a < b. A pair of ranks has one medium in all groups.
    :param channels: per algorithm. :param cumem: ``NCCL_CUMEM_ENABLE``; without it connections are made at once.
    :param collnet: SHARP in the network, too. :param requests: the pipeline has moved data (``/1`` channels).
    :param environment: ``NCCL_*`` variables. :param seed: chooses addresses, process ids and where faults are.
    """

    layout: Layout
    form: Form = FORMS[-2]
    medium: Medium = Medium.P2P
    between_hosts: Medium = Medium.IB
    media: Mapping[Pair, Medium] = field(default_factory=dict)
    channels: int = 2
    cumem: bool = True
    nvls: Nvls = Nvls.OFF
    collnet: bool = False
    requests: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    faults: frozenset[Fault] = frozenset()
    seed: int = 0

    @property
    def lazy(self) -> bool:
        """Whether connections wait for the first collective (``ncclParamRuntimeConnect`` in ``src/init.cc``)."""
        return self.form.release >= (2, 22) and self.form.has_cumem and self.cumem

    @property
    def effective_nvls(self) -> Nvls:
        """What of ``nvls`` this version and layout can do."""
        if self.form.release < (2, 18) or self.form.rccl or self.layout.nodes > 1:
            return Nvls.OFF
        return Nvls.BESIDE if self.nvls is Nvls.ALONE and not self.lazy else self.nvls

    def medium_of(self, a: int, b: int) -> Medium:
        """Medium between two ranks of the layout, settings and missing devices considered."""
        per_host = self.layout.gpus_per_node
        usual = self.medium if a // per_host == b // per_host else self.between_hosts
        medium = self.media.get((min(a, b), max(a, b)), usual)
        if Fault.P2P_DISABLED in self.faults and medium in (Medium.P2P, Medium.P2P_READ, Medium.MNNVL):
            return Medium.SHM
        if Fault.NO_IB_DEVICE in self.faults and medium is Medium.IB:
            return Medium.SOCKET
        return medium


@dataclass(frozen=True, slots=True)
class WrittenLog:
    """The lines of all processes, in the order each wrote them, with what they say.

    :param places: by rank of the layout.
    """

    scenario: Scenario
    places: tuple[Place, ...]
    comms: tuple[Comm, ...]
    lines: tuple[Line, ...]

    def without(self, unwanted: Callable[[Line], bool]) -> WrittenLog:
        """The same without some lines; the expectations follow."""
        return replace(self, lines=tuple(line for line in self.lines if not unwanted(line)))

    def streams(self) -> list[list[str]]:
        """Lines of each process that wrote any; ``names`` are in the same order."""
        return [[line.text for line in self.lines if line.rank == rank] for rank in self._writers()]

    def names(self) -> list[str]:
        """File names as ``NCCL_DEBUG_FILE=nccl.%h.%p`` makes them."""
        return [f"nccl.{self.places[rank].host}.{self.places[rank].pid}" for rank in self._writers()]

    def wires(self, comm: int | None = None) -> Counter[Wire]:
        """Channel lines by what they say, of one communicator or of all."""
        return Counter(
            line.wire for line in self.lines if line.wire is not None and (comm is None or line.comm == comm)
        )

    def transports(self) -> Counter[str]:
        """Channel lines by transport."""
        counts: Counter[str] = Counter()
        for wire, lines in self.wires().items():
            counts[wire.transport] += lines
        return counts

    def edges(self) -> dict[Pair, dict[str, int]]:
        """Channel lines by (src, dst), then by transport."""
        edges: dict[Pair, dict[str, int]] = {}
        for wire, lines in self.wires().items():
            if wire.dst is not None:
                edges.setdefault((wire.src, wire.dst), {})[wire.transport] = lines
        return edges

    def _writers(self) -> list[int]:
        return sorted({line.rank for line in self.lines})


def write_log(scenario: Scenario) -> WrittenLog:
    """Write the log of one server (all replicas of it), the same one for the same scenario."""
    dice = random.Random(scenario.seed)
    places = tuple(_places(scenario.layout, dice))
    comms = tuple(_comms(scenario.layout, dice))
    if comms:
        scenario = _with_faulty_pair(scenario, comms, dice)
    lines = chain.from_iterable(_Process(scenario, places, comms, rank).write() for rank in range(len(places)))
    written = WrittenLog(scenario, places, comms, tuple(lines))
    if comms and Fault.MISSING_RANK in scenario.faults:
        missing = dice.choice(dice.choice(comms).ranks)
        written = written.without(lambda line: line.rank == missing)
    return written


# -- layout ----------------------------------------------------------------------------------------------------------


def groups_of(layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Groups of ranks for which vLLM makes a communicator, in the order of ``initialize_model_parallel``.

    ``vllm/distributed/parallel_state.py`` (0.32); groups of one rank have none, nor have replicas of a dense model.
    """
    for first in range(0, layout.gpus, layout.ranks):
        for name, axes in (("tp", "t"), ("dcp", "d"), ("pcp", "c"), ("pp", "p"), ("dp", "D"), ("ep", "Dct")):
            if layout.ep or "D" not in axes:
                yield from ((name, ranks) for ranks in _along(layout, axes, first) if len(ranks) > 1)


def _along(layout: Layout, axes: str, first: int) -> Iterator[tuple[int, ...]]:
    """Ranks that differ in these coordinates alone; ``d`` cuts tp into pieces of dcp."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.ranks):
        rest, tp = divmod(rank, layout.tp)
        rest, pcp = divmod(rest, layout.pcp)
        dp, pp = divmod(rest, layout.pp)
        place = {"D": dp, "p": pp, "c": pcp, "t": tp // layout.dcp if axes == "d" else tp}
        key = tuple(number for axis, number in place.items() if axis not in axes)
        groups.setdefault(key, []).append(first + rank)
    yield from map(tuple, groups.values())


def _places(layout: Layout, dice: random.Random) -> Iterator[Place]:
    skipped = dice.choice((0, 0, 4))  # CUDA_VISIBLE_DEVICES=4,... renumbers devices
    for node in range(layout.nodes):
        pid = dice.randrange(200, 90000)
        for local in range(layout.gpus_per_node):
            pid += dice.randrange(1, 9)
            bus_id = f"{0x1A + 0x11 * (local + skipped):x}000"
            yield Place(f"llm-node-{node}", pid, local, local + skipped, bus_id)


def _comms(layout: Layout, dice: random.Random) -> Iterator[Comm]:
    for name, ranks in groups_of(layout):
        addresses = tuple(f"0x55{dice.getrandbits(36):09x}0" for _ in ranks)
        yield Comm(name, ranks, f"0x{dice.getrandbits(63) | 1 << 63:x}", addresses)


def _with_faulty_pair(scenario: Scenario, comms: Sequence[Comm], dice: random.Random) -> Scenario:
    comm = dice.choice(comms)
    a, b = sorted(comm.ranks[rank] for rank in dice.choice(list(comm.ring())))
    for fault, medium in ((Fault.SHM_PAIR, Medium.SHM), (Fault.SOCKET_PAIR, Medium.SOCKET)):
        if fault in scenario.faults:
            scenario = replace(scenario, media={**scenario.media, (a, b): medium})
    return scenario


# -- lines -----------------------------------------------------------------------------------------------------------


class _Process:
    """Writes the lines of one rank's process."""

    def __init__(self, scenario: Scenario, places: Sequence[Place], comms: Sequence[Comm], rank: int) -> None:
        self._scenario = scenario
        self._form = scenario.form
        self._release = scenario.form.release
        self._places = places
        self._rank = rank
        self._place = places[rank]
        self._comms = [(number, comm) for number, comm in enumerate(comms) if rank in comm.ranks]
        self._version_said = False

    def write(self) -> Iterator[Line]:
        if not self._comms:  # vLLM makes no communicator for a group of one
            return
        yield from self._prologue()
        for number, comm in self._comms:
            for line in self._communicator(number, comm):
                if Fault.NO_CONNECTIONS in self._scenario.faults and line.kind in {*EVIDENCE, Kind.CONNECTED}:
                    return
                yield line
                if line.kind is Kind.WARNING and " -> 2" in line.text:
                    return
        if self._scenario.requests:
            for number, comm in self._comms:
                if comm.name == "pp":
                    yield from self._stages(number, comm)

    # Once per process: src/bootstrap.cc, src/net.cc (src/plugin/net.cc from 2.27), src/misc/param.cc.

    def _prologue(self) -> Iterator[Line]:
        release, scenario = self._release, self._scenario
        colon = "Bootstrap: " if release >= (2, 24) else "Bootstrap : "
        interface = "[0]eth0" if release < (2, 8) else "eth0"
        yield self._info(Kind.HEAD, f"{colon}Using {interface}:192.0.2.7<0>")
        for name, value in self._environment().items():
            yield self._info(Kind.ENVIRONMENT, f"{name} set by environment to {value}.")
        if release >= (2, 18) and not self._form.rccl:
            yield self._info(Kind.HEAD, "cudaDriverVersion 12080")
        if self._form.rccl:
            yield self._info(Kind.HEAD, f"RCCL version : {self._form.version}")
            yield self._bare("HIP version  : 6.4.43482-5c0ffee1")
            yield self._bare(f"Hostname     : {self._place.host}")
        elif release >= (2, 22):
            yield self._info(Kind.HEAD, f"NCCL version {self._form.version}")
        absent = "NET/Plugin : No plugin found (libnccl-net.so), using internal implementation"
        yield self._info(Kind.HEAD, absent if release < (2, 18) else "NET/Plugin: Could not find: libnccl-net.so.")
        if Fault.NO_IB_DEVICE in scenario.faults or self._network() == "Socket":
            yield self._info(Kind.HEAD, "NET/IB : No device found.")
            yield self._info(Kind.HEAD, "NET/Socket : Using [0]eth0:192.0.2.7<0>")
        else:
            yield self._info(Kind.HEAD, "NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/RoCE [RO]; OOB eth0:192.0.2.7<0>")

    def _environment(self) -> dict[str, str]:
        set_by_fault = {"NCCL_P2P_DISABLE": "1"} if Fault.P2P_DISABLED in self._scenario.faults else {}
        cumem = {} if self._scenario.cumem or self._release < (2, 18) else {"NCCL_CUMEM_ENABLE": "0"}
        return {**self._scenario.environment, **cumem, **set_by_fault}

    def _network(self) -> str:
        others = (rank for rank in range(len(self._places)) if rank != self._rank)
        media = {self._scenario.medium_of(self._rank, rank) for rank in others}
        return next((medium.value for medium in (Medium.IB, Medium.PLUGIN) if medium in media), "Socket")

    # Per communicator: commAlloc, initTransportsRank and ncclCommInitRankFunc in src/init.cc.

    def _communicator(self, number: int, comm: Comm) -> Iterator[Line]:
        me = comm.ranks.index(self._rank)
        yield from self._network_lines(number, me)
        if self._release >= (2, 18):
            yield self._info(Kind.INIT, f"{self._rank_words(comm, me)} - Init START", number)
            if not self._form.rccl:
                has_nvls = "" if self._scenario.effective_nvls is not Nvls.OFF else "not "
                capability = f"NVLS multicast support is {has_nvls}available on dev {self._place.cuda_dev}"
                yield self._info(Kind.HEAD, capability, number)
        if self._release >= (2, 20):
            yield self._info(Kind.INIT, self._node_words(comm, me), number)
        yield from self._graph(number, comm, me)
        if Fault.SHM_TOO_SMALL in self._scenario.faults:
            yield from self._full_shm(number)
            return
        connections = list(self._connections(number, comm, me))
        yield from () if self._scenario.lazy else connections
        yield self._info(Kind.GRAPH, self._counts(), number)
        yield self._info(Kind.COMPLETE, f"{self._rank_words(comm, me)} - Init COMPLETE", number)
        yield from connections if self._scenario.lazy else ()

    def _network_lines(self, number: int, me: int) -> Iterator[Line]:
        network = self._network()
        if self._release >= (2, 27):
            yield self._info(Kind.HEAD, f"Initialized NET plugin {network}", number)
            yield self._info(Kind.HEAD, f"Assigned NET plugin {network} to comm", number)
        if self._release >= (2, 7):
            yield self._info(Kind.HEAD, f"Using network {network}", number)
        if self._release < (2, 22) and me == 0 and not self._version_said:
            self._version_said = True
            yield self._bare(f"NCCL version {self._form.version}")

    def _rank_words(self, comm: Comm, me: int) -> str:
        place, release = self._place, self._release
        words = f"comm {comm.addresses[me]} rank {me} nranks {comm.nranks} cudaDev {place.cuda_dev}"
        if release < (2, 5) or release >= (2, 18):
            words += f" nvmlDev {place.nvml_dev}"
        words += f" busId {place.bus_id}" if release >= (2, 5) else ""
        words += f" commId {comm.comm_id}" if self._form.has_comm_ids else ""
        if self._form.rccl:
            return f"ncclCommInitRank_impl {words}"
        name = "ncclCommInitRankConfig " if release >= (2, 24) else "ncclCommInitRank " if release >= (2, 21) else ""
        return (f"[Rank {me}] " if release >= (2, 29) else "") + name + words

    def _node_words(self, comm: Comm, me: int) -> str:
        hosts = [self._places[rank].host for rank in comm.ranks]
        mine = hosts[me]
        return (
            f"comm {comm.addresses[me]} rank {me} nRanks {comm.nranks} nNodes {len(set(hosts))} "
            f"localRanks {hosts.count(mine)} localRank {hosts[:me].count(mine)} "
            f"MNNVL {int(self._scenario.medium is Medium.MNNVL)}"
        )

    def _graph(self, number: int, comm: Comm, me: int) -> Iterator[Line]:
        channels = range(self._scenario.channels)
        if me == 0:
            width = 4 if self._release < (2, 26) else 1
            order = "".join(f"{rank:{width}d}" + " " * (width == 1) for rank in range(comm.nranks))
            of = "" if self._release < (2, 6) else f"/{len(channels):02d}"
            yield from (self._info(Kind.GRAPH, f"Channel {at:02d}{of} : {order}", number) for at in channels)
        tree = self._tree(comm, me)
        tail = f" comm {comm.addresses[me]} nRanks {comm.nranks:02d} busId {self._place.bus_id}"
        tail = tail if self._form.rccl else ""
        yield self._info(Kind.GRAPH, "Trees " + " ".join(f"[{at}] {tree}" for at in channels) + tail, number)
        if self._release >= (2, 24):
            direct = "intraNodeP2pSupport" if self._release < (2, 27) else "isAllDirectP2p"
            yield self._info(Kind.GRAPH, f"Check P2P Type {direct} 1 directMode 0", number)

    def _tree(self, comm: Comm, me: int) -> str:
        parent, child = me - 1, me + 1 if me + 1 < comm.nranks else -1
        if self._release < (2, 5):
            return f"{parent}->{me}->{child}/-1/-1"
        half = f"{child}/-1/-1->{me}->{parent}"
        return half if self._release >= (2, 8) else f"{half}|{parent}->{me}->{child}/-1/-1"

    def _counts(self) -> str:
        n = self._scenario.channels
        more = f" {n} collnet channels, 0 nvls channels," if self._release >= (2, 20) else ""
        more = " 0 nvls channels," if (2, 18) <= self._release < (2, 20) else more
        return f"{n} coll channels,{more} {n} p2p channels, {n} p2p channels per peer"

    def _full_shm(self, number: int) -> Iterator[Line]:
        where = "include/shm.h:48" if self._release < (2, 12) else "misc/shmutils.cc:72"
        where += " (ncclShmOpen)" if self._release >= (2, 30) else ""
        time = "[2026-01-02 03:04:05] " if self._release >= (2, 26) else ""
        yield self._bare("")
        text = f"{where} NCCL WARN Error while creating shared memory segment /dev/shm/nccl-q7Xy2Z (size 9637888)"
        yield Line(self._rank, Kind.WARNING, f"{time}{self._head(number)} {text}", number)
        for place in ("transport/shm.cc:114", "transport.cc:33", "init.cc:1263"):
            yield self._info(Kind.WARNING, f"{place} -> 2", number)

    # Connections: p2pSendSetup, shmSendSetup, sendSetup and recvSetup in src/transport/.

    def _connections(self, number: int, comm: Comm, me: int) -> Iterator[Line]:
        nvls = self._scenario.effective_nvls
        if nvls is not Nvls.OFF:
            ranks = f" nvlsRanks {comm.nranks}" if self._release >= (2, 26) else ""
            made = f"NVLS comm {comm.addresses[me]} headRank {me} nHeads {comm.nranks}{ranks} buffSize 4194304"
            sizes = "memSize 2097152 nvlsPerRankSize 201326592 nvlsTotalSize 1610612736"
            yield self._info(Kind.NVLS, f"{made} {sizes}", number)
        if nvls is Nvls.ALONE:
            return
        for src, dst in comm.edges():
            yield from self._edge(number, comm, src, dst, connection=0)
        if self._scenario.collnet:
            yield from self._collnet(number, me)
        if self._release >= (2, 8):
            more = ", use ring PXN 0 GDR 1" if self._release >= (2, 24) else ""
            yield self._info(Kind.CONNECTED, "Connected all rings" + more, number)
            yield self._info(Kind.CONNECTED, "Connected all trees", number)

    def _stages(self, number: int, comm: Comm) -> Iterator[Line]:
        for src in range(comm.nranks - 1):
            yield from self._edge(number, comm, src, src + 1, connection=1)

    def _edge(self, number: int, comm: Comm, src: int, dst: int, *, connection: int) -> Iterator[Line]:
        """Lines of this rank about one edge: a network's both ends write, of memory the sender."""
        ranks = comm.ranks[src], comm.ranks[dst]
        medium = self._scenario.medium_of(*ranks)
        ends = ("send", "receive") if medium.is_network else ("send",)
        for end, rank in zip(ends, ranks, strict=False):
            if rank == self._rank:
                wire = Wire(src, dst, self._spell(medium, connection))
                for channel in range(self._scenario.channels):
                    name = self._channel_name(medium, channel, connection)
                    arrow = f"{self._peer(medium, comm, src)} -> {self._peer(medium, comm, dst)}"
                    via = f"[{end}] via" if medium.is_network else "via"
                    text = f"{name} : {arrow} {via} {wire.transport}{self._rccl_tail(comm)}"
                    yield self._info(Kind.CHANNEL, text, number, wire)

    def _collnet(self, number: int, me: int) -> Iterator[Line]:
        word = "Coll 00" if self._release < (2, 9) else "CollNet 00" if self._release < (2, 14) else "CollNet 00/0"
        for end in ("receive", "send"):
            wire = Wire(me, None, "COLLNET/SHARP/0/GDRDMA")
            yield self._info(Kind.CHANNEL, f"{word} : {me} [{end}] via {wire.transport}", number, wire)

    def _channel_name(self, medium: Medium, channel: int, connection: int) -> str:
        word = "Ring" if self._release < (2, 7) else "Channel"
        first = (2, 12) if medium.is_network else (2, 14)
        numbered = self._release >= first and medium is not Medium.SHM
        return f"{word} {channel:02d}" + (f"/{connection}" if numbered else "")

    def _peer(self, medium: Medium, comm: Comm, rank: int) -> str:
        place = self._places[comm.ranks[rank]]
        if self._release < (2, 5):
            return str(rank) if medium.is_network else f"{rank}[{place.cuda_dev}]"
        named_by_bus = self._release < (2, 18) or self._form.rccl
        return f"{rank}[{place.bus_id if named_by_bus else place.nvml_dev}]"

    def _spell(self, medium: Medium, connection: int) -> str:
        if medium is Medium.SHM:
            if self._release < (2, 13):
                return "direct shared memory"
            return "SHM/direct" if self._release >= (2, 30) else "SHM/direct/direct"
        if medium.is_network:
            shared = "/Shared" if connection and self._release >= (2, 8) else ""
            return f"NET/{medium.value}/0" + ("/GDRDMA" if medium is not Medium.SOCKET else "") + shared
        if medium is Medium.MNNVL and self._release >= (2, 20) and self._form.has_cumem:
            return "P2P/MNNVL"
        kind = "P2P/CUMEM" if self._form.has_cumem and self._scenario.cumem else "P2P/IPC"
        return kind + ("/read" if medium is Medium.P2P_READ and self._release >= (2, 7) else "")

    def _rccl_tail(self, comm: Comm) -> str:
        if not self._form.rccl:
            return ""
        return f" comm {comm.addresses[comm.ranks.index(self._rank)]} nRanks {comm.nranks:02d}"

    # Heads: ncclDebugLog in src/debug.cc.

    def _head(self, number: int | None) -> str:
        thread = self._place.pid + (0 if number is None else 40 + number)
        return f"{self._place.host}:{self._place.pid}:{thread} [{self._place.cuda_dev}]"

    def _info(self, kind: Kind, message: str, number: int | None = None, wire: Wire | None = None) -> Line:
        return Line(self._rank, kind, f"{self._head(number)} NCCL INFO {message}", number, wire)

    def _bare(self, text: str) -> Line:
        return Line(self._rank, Kind.HEAD, text)


# -- what others do to lines -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dress:
    """What a launcher or collector puts around a line; ``{rank}`` counts the processes."""

    name: str
    before: str = ""
    after: str = ""

    def __str__(self) -> str:
        return self.name

    def put_on(self, rank: int, text: str) -> str:
        """The line as it arrives."""
        return self.before.format(rank=rank, pid=310 + rank) + text + self.after


DRESSES = (
    Dress("none"),
    Dress("CRLF", after="\r"),
    Dress("bold", "\x1b[1m", "\x1b[0m"),
    Dress("vLLM", "(Worker_TP{rank} pid={pid}) "),
    Dress("Ray on a terminal", "\x1b[36m(RayWorkerWrapper pid={pid}, ip=192.0.2.1)\x1b[0m "),
    Dress("Ray under vLLM", "(EngineCore_DP0 pid=7) (RayWorkerWrapper pid={pid}) "),
    Dress("torchrun", "[default{rank}]:"),
    Dress("mpirun", "[1,{rank}]<stdout>:"),
    Dress("srun", "{rank}: "),
    Dress("Kubernetes", "2026-01-02T03:04:05.678901234Z stdout F "),
    Dress("kubectl", "[pod/llm-{rank}/vllm] "),
    Dress("NCCL_DEBUG_TIMESTAMP_LEVELS", "[2026-01-02 03:04:05] "),
)


def interleave(streams: Sequence[Sequence[str]], seed: int) -> list[str]:
    """One stream of several; each keeps its order."""
    dice = random.Random(seed)
    turns = [number for number, stream in enumerate(streams) for _ in stream]
    dice.shuffle(turns)
    sources = [iter(stream) for stream in streams]
    return [next(sources[turn]) for turn in turns]


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """Pieces of ``data``, cut at ``places`` (taken modulo its length)."""
    at = sorted(place % (len(data) + 1) for place in places)
    return [data[start:end] for start, end in zip([0, *at], [*at, len(data)], strict=True)]
