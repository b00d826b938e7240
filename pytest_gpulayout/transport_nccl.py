"""What NCCL's logs prove about the transports of a layout.

Knows which communicators vLLM makes for a layout, what connects their ranks, and where NCCL could have used P2P.
Leaves reading the logs to :mod:`~pytest_gpulayout.nccl_log`, and why a transport was chosen to
:mod:`~pytest_gpulayout.causes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from pytest_gpulayout.causes import explain_transports
from pytest_gpulayout.causes_case import Finding, SlowUse
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.links import LinkClass
from pytest_gpulayout.nccl_log import CommRank, Communicator, LogLine, NcclLog, Process, is_torn
from pytest_gpulayout.surroundings import Surroundings
from pytest_gpulayout.topology import Topology
from pytest_gpulayout.transport import TransportFamily, TransportReport, TransportUse, TransportVerdict, family_of

_HOW_TO_LOG = (
    "start the server with NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,ENV,GRAPH,P2P,SHM,NET,NVLS "
    "NCCL_DEBUG_FILE=<dir>/nccl.%h.%p, let it answer one request, and pass the logs of all processes"
)
_LOOK_AT_RANKS = "read these files: a rank without channel lines, or without Init COMPLETE, is the one to look at"
_P2P_BY_DEFAULT = LinkClass("PXB")  # NCCL_P2P_LEVEL, graph/paths.cc: ncclTopoCheckP2p


@dataclass(frozen=True, slots=True)
class ServerContext:
    """What is known of a server beside NCCL's logs; of logs from elsewhere, nothing.

    :param rank_pids: process id of each rank. :param placement: index of the device of each rank, in rank order.
    :param server_lines: of the server's own log, where CUDA's errors stand.
    :param obstacle: why the logs may hold no evidence, in words.
    :param moe: whether data-parallel ranks talk, as those of a model with experts do.
    """

    rank_pids: Mapping[int, int] = field(default_factory=dict)
    topology: Topology | None = None
    placement: Sequence[int] = ()
    surroundings: Surroundings | None = None
    server_lines: Sequence[LogLine] = ()
    obstacle: str | None = None
    moe: bool = False


_FROM_ELSEWHERE = ServerContext()


def judge_nccl(
    log: NcclLog, layout: Layout | None = None, server: ServerContext = _FROM_ELSEWHERE
) -> TransportReport:
    """Judge NCCL's logs, all processes of one server merged.

    :param layout: what should run. Then every group of it must be connected by channels, its ranks all named; a
        layout whose ranks do not talk needs no evidence. Without it, any channel is evidence.
    """
    return _Judge(log, layout, server).report()


@dataclass(frozen=True, slots=True)
class _Judge:
    log: NcclLog
    layout: Layout | None
    server: ServerContext

    def report(self) -> TransportReport:
        uses = self._uses()
        gap = self._gap(uses)
        slow = [*_slow(uses), *self._unconnected(gap)]
        explained = explain_transports(
            self.log,
            slow,
            layout=self.layout,
            surroundings=self.server.surroundings,
            topology=self.server.topology,
            placement=self.server.placement,
            server_lines=self.server.server_lines,
        )
        findings = [*explained, *self._missing(gap), *self._layout_findings()]
        verdict = _verdict(uses, gap)
        return TransportReport(verdict, uses, self.log.network, self.log.version, tuple(findings), gap)

    @property
    def _kinds(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """Groups of the layout that need a communicator, by kind."""
        return {} if self.layout is None else self.layout.communication_groups(moe=self.server.moe)

    @property
    def _groups(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        return ((name, ranks) for name, groups in self._kinds.items() for ranks in groups)

    # -- what is used --------------------------------------------------------------------------------------------

    def _uses(self) -> tuple[TransportUse, ...]:
        """One for each pair of ranks and transport; ranks are the layout's where the processes tell them."""
        found: dict[tuple[int, int | None, str], TransportUse] = {}
        for communicator in self.log.communicators:
            ranks = self._layout_ranks(communicator)
            for (src, dst, transport), seen in communicator.links.items():
                key = (ranks.get(src, src), None if dst is None else ranks.get(dst, dst), transport)
                known = found.get(key)
                possible = self._p2p_possible(communicator, src, dst)
                found[key] = TransportUse(
                    *key,
                    channels=seen.lines + (known.channels if known else 0),
                    first=known.first if known else seen.first,
                    p2p_possible=known.p2p_possible if known and possible is None else possible,
                )
        uses = [
            found[key] for key in sorted(found, key=lambda key: (key[0], -1 if key[1] is None else key[1], key[2]))
        ]
        if not self.log.edges and (communicators := self.log.nvls_communicators()):
            # Channels beside NVLS name the transport already; alone it has to stand for itself.
            members = sum(len(members) for members in communicators)
            uses.append(TransportUse(None, None, "NVLS", members, self.log.nvls_lines[0]))
        return tuple(uses)

    def _layout_ranks(self, communicator: Communicator) -> dict[int, int]:
        """Rank in the communicator to rank of the layout, for those processes that are known."""
        rank_of = {pid: rank for rank, pid in self.server.rank_pids.items()}
        pids = {member.rank: member.process[1] for member in communicator.members if member.process}
        return {rank: rank_of[pid] for rank, pid in pids.items() if pid in rank_of}

    def _p2p_possible(self, communicator: Communicator, src: int, dst: int | None) -> bool | None:
        topology = self.server.topology
        if topology is None or dst is None:
            return None
        a, b = self._device(communicator, src), self._device(communicator, dst)
        link = None if a is None or b is None else topology.link(a, b)
        if a is None or b is None or link is None:
            return None
        if any(topology.p2p_status(a, b, capability) not in (None, "OK") for capability in "rw"):
            return False
        return link >= _P2P_BY_DEFAULT

    def _device(self, communicator: Communicator, rank: int) -> int | None:
        """Index of a rank's device: as NCCL logs it, else as the layout was placed."""
        known = {device.index for device in self.server.topology.devices} if self.server.topology else set()
        member = next((member for member in communicator.members if member.rank == rank), None)
        if member is not None and member.nvml_dev in known:
            return member.nvml_dev
        rank = self._layout_ranks(communicator).get(rank, rank)
        is_whole = self.layout is not None and communicator.nranks in (None, self.layout.ranks)
        if (is_whole or self.server.rank_pids) and rank < len(self.server.placement):
            return self.server.placement[rank]
        return None

    # -- what is missing -----------------------------------------------------------------------------------------

    def _gap(self, uses: Sequence[TransportUse]) -> str | None:
        """Say what is missing to prove anything, or to prove the layout; ``None`` when nothing is."""
        if torn := _torn(uses):
            return (
                f"ranks {torn.src} -> {torn.dst}: the line breaks off at {torn.transport!r}, which may be NET/Socket"
            )
        return self._gap_in_log() if self.layout is None else self._gap_in(self.layout)

    def _gap_in_log(self) -> str | None:
        if self.log.edges or self.log.nvls_communicators():
            return None
        if self.log.records == 0:
            return "no line of NCCL"
        if self.log.nranks == 1:
            return "no channel between ranks: NCCL ran with one rank"
        if self.log.nranks is not None:
            return "NCCL's lines name no channel between ranks: the log ends, or hides, what came after init"
        return "NCCL's lines name no channel between ranks"

    def _gap_in(self, layout: Layout) -> str | None:
        named = {rank for pair in self.log.edges for rank in pair}
        if strangers := sorted(rank for rank in named if rank >= layout.ranks):
            has = f"layout {layout} has ranks 0 to {layout.ranks - 1}"
            return f"rank {strangers[-1]} has channels, {has}: another server's log"
        groups = self._kinds
        if not groups:
            return None
        if not named and not self.log.nvls_communicators():
            return self._gap_in_log()
        if any(comm.nranks == len(self._layout_ranks(comm)) for comm in self.log.communicators):
            return self._gap_of_known_ranks(layout)
        proved = [comm for comm in self.log.communicators if _is_proved(comm)]
        for size, of_size in _by_size(groups).items():
            of_processes = {comm.processes or comm.key for comm in proved if comm.nranks == size}
            if gap := self._gap_of_size(layout, size, of_size, len(of_processes)):
                return gap
        return None

    def _gap_of_known_ranks(self, layout: Layout) -> str | None:
        """With the ranks' process ids, each group must have a communicator of its own."""
        proved = {frozenset(self._layout_ranks(c).values()) for c in self.log.communicators if _is_proved(c)}
        for name, ranks in self._groups:
            if frozenset(ranks) not in proved:
                names = ",".join(map(str, ranks))
                return f"layout {layout} connects ranks {names} ({name}), no channels connect all of them"
        return None

    def _gap_of_size(
        self, layout: Layout, size: int, groups: Sequence[tuple[str, tuple[int, ...]]], proved: int
    ) -> str | None:
        """Without the ranks' process ids, groups of processes that share a communicator of a size are counted.

        :param proved: how many of them channels connect.
        """
        names = "/".join(dict.fromkeys(name for name, _ in groups))
        needed = len(groups) * layout.replicas
        if proved >= needed:
            return None
        loose = next((comm for comm in self.log.communicators if comm.key is None), None)
        begun = [comm for comm in self.log.communicators if comm.nranks == size and not _is_proved(comm)]
        if proved or (loose is None and not begun):
            return (
                f"layout {layout} has {needed} {names} groups of {size} ranks, channels connect {proved} of that size"
            )
        seen = [comm.edges for comm in (*begun, loose) if comm is not None]
        parts, edges = min(
            ((_connected_parts(range(size), edges), edges) for edges in seen), key=lambda candidate: len(candidate[0])
        )
        if len(parts) > 1:
            texts = " and ".join(",".join(map(str, part)) for part in parts)
            return f"layout {layout} connects {size} ranks, no channel line connects ranks {texts}"
        if silent := sorted(set(range(size)) - {src for src, _ in edges}):
            return f"layout {layout} connects {size} ranks, no line shows over what rank {silent[0]} sends"
        speakers = len(_witnesses(self.log))
        known = next((comm.ranks for comm in begun if comm.ranks), frozenset(range(size)))
        if speakers < size and (absent := sorted(set(range(size)) - known)):
            return f"layout {layout} connects {size} ranks, there is no log of rank {absent[0]}"
        if needed > 1 and speakers < layout.gpus:
            return f"layout {layout} has {layout.gpus} processes, {speakers} of them logged a channel"
        return None

    # -- findings ------------------------------------------------------------------------------------------------

    def _unconnected(self, gap: str | None) -> Iterator[SlowUse]:
        """Neighbours in a group that no channel connects, for the causes to explain."""
        if gap is None or self.layout is None:
            return
        seen = {frozenset(pair) for pair in self.log.edges}
        for _, ranks in self._groups:
            for a, b in pairwise(ranks):
                if frozenset((a, b)) not in seen:
                    yield SlowUse(a, b, None)

    def _missing(self, gap: str | None) -> Iterator[Finding]:
        if gap is None:
            return
        was_captured = self.log.records > 0 and bool(self.server.rank_pids)
        advice = self.server.obstacle or (_LOOK_AT_RANKS if was_captured else _HOW_TO_LOG)
        yield Finding(gap, self._sources, None, None, advice)

    @property
    def _sources(self) -> str | None:
        return ", ".join(self.log.sources[:3]) or None

    def _layout_findings(self) -> Iterator[Finding]:
        layout = self.layout
        if layout is None:
            return
        if not self._kinds:
            yield no_transport_needed(layout)
        nodes = max((member.n_nodes or 1 for member in self.log.comm_ranks if member.nranks > 1), default=1)
        if nodes > layout.nodes:
            yield Finding(
                f"NCCL sees {nodes} nodes, layout {layout} has {layout.nodes}",
                self._sources,
                None,
                f"nNodes {nodes}",
                "processes of one host need one host name and one /dev/shm (docker: --ipc=host), or NCCL_HOSTID",
            )


def _verdict(uses: Sequence[TransportUse], gap: str | None) -> TransportVerdict:
    families = {family_of(use.transport) for use in uses}
    if TransportFamily.SOCKET in families:
        return "socket"
    if gap is not None:
        return "no-evidence"
    return "shm" if any(_is_needless_shm(use) for use in uses) else "ok"


def _is_needless_shm(use: TransportUse) -> bool:
    """Shared memory where P2P was possible, or where nobody knows that it was not."""
    return family_of(use.transport) is TransportFamily.SHM and use.p2p_possible is not False


def _slow(uses: Sequence[TransportUse]) -> Iterator[SlowUse]:
    for use in uses:
        if use.src is None or use.dst is None:
            continue
        if family_of(use.transport) is TransportFamily.SOCKET or _is_needless_shm(use):
            yield SlowUse(use.src, use.dst, use.transport, use.first)


def _torn(uses: Sequence[TransportUse]) -> TransportUse | None:
    """A pair of which nothing is known but a transport that breaks off where it could become NET/Socket."""
    whole = {(use.src, use.dst) for use in uses if not is_torn(use.transport)}
    return next((use for use in uses if is_torn(use.transport) and (use.src, use.dst) not in whole), None)


def no_transport_needed(layout: Layout) -> Finding:
    """Say why a layout needs no evidence."""
    reason = "has one rank" if layout.gpus == 1 else "has no ranks that talk to each other"
    return Finding(f"layout {layout} {reason}: no transport is needed", None, None, None, "nothing to do")


def _by_size(
    groups: Mapping[str, Sequence[tuple[int, ...]]],
) -> dict[int, list[tuple[str, tuple[int, ...]]]]:
    """Groups by their size, the largest first."""
    by_size: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    for name, of_name in groups.items():
        for ranks in of_name:
            by_size.setdefault(len(ranks), []).append((name, ranks))
    return dict(sorted(by_size.items(), reverse=True))


def _is_proved(communicator: Communicator) -> bool:
    """Whether every rank has spoken and is seen to send, and channels connect all; a ring has not every pair."""
    nranks = communicator.nranks
    if nranks is None or communicator.nvls:
        return nranks is not None
    if len(communicator.edges) < nranks:  # which also keeps a damaged number from costing anything
        return False
    everybody = set(range(nranks))
    speak = {src for src, _ in communicator.edges} >= everybody and (communicator.ranks or everybody) >= everybody
    return speak and len(_connected_parts(range(nranks), communicator.edges)) == 1


def _connected_parts(ranks: Iterable[int], pairs: Iterable[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Ranks that channels connect with each other, part by part."""
    part = {rank: {rank} for rank in ranks}
    for a, b in pairs:
        if a in part and b in part and part[a] is not part[b]:
            small, large = sorted((part[a], part[b]), key=len)
            large |= small
            part.update(dict.fromkeys(small, large))
    return sorted({tuple(sorted(ranks)) for ranks in part.values()})


def _witnesses(log: NcclLog) -> set[Process]:
    nvls: list[CommRank] = [member for members in log.nvls_communicators() for member in members]
    return set(log.speakers) | {member.process for member in nvls if member.process is not None}
