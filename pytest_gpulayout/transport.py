"""Which transport each rank pair uses, whether that is proved, and whether it is allowed.

Knows NCCL's transports and those of vLLM's CPU backend, and what counts as proof for a layout. Leaves reading the
logs to :mod:`~pytest_gpulayout.nccl_log` and :mod:`~pytest_gpulayout.vllm_log`, and reading ``/proc`` to adapters.

============  ======================================================================================================
verdict       meaning
============  ======================================================================================================
socket        a channel goes over NET/Socket (or CPU/GLOO)
shm           none does, and a channel goes through host memory: NCCL's default between GPUs behind different host
              bridges, a loss between GPUs with NVLink or a common PCIe switch
ok            none of both, and the ranks of the layout are all connected by channels
no-evidence   the logs do not show what the ranks use
============  ======================================================================================================

NVLS prints no channel line; it is evidence by itself where every rank of a one-node communicator has made its
buffers. CollNet names one rank per line and proves no pair.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import permutations
from typing import Any, Literal

from pytest_gpulayout.errors import LayoutSyntaxError
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.nccl_log import LogLine, NcclLog, Process, Seen, is_socket
from pytest_gpulayout.vllm_log import VllmLogFacts

TransportVerdict = Literal["ok", "socket", "shm", "no-evidence"]

_CPU_SHM = "CPU/SHM"
_CPU_GLOO = "CPU/GLOO"
_HOW_TO_LOG = (
    "start the server with NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,ENV,GRAPH,P2P,SHM,NET,NVLS "
    "NCCL_DEBUG_FILE=<dir>/nccl.%h.%p, let it answer one request, and pass the logs of all processes"
)


class TransportFamily(StrEnum):
    """What transports have in common; ``--gpu-transport`` speaks of these."""

    P2P = "P2P"
    SHM = "SHM"
    NET = "NET"
    SOCKET = "NET/Socket"
    COLLNET = "COLLNET"
    NVLS = "NVLS"
    CPU_SHM = _CPU_SHM
    CPU_GLOO = _CPU_GLOO
    OTHER = "OTHER"


def family_of(transport: str) -> TransportFamily:
    """Family of the text after ``via``; a name this version does not know is ``OTHER``.

    ``NET/Socket`` is matched as a whole component: ``NET/FastSocket`` is a plugin of its own, hence ``NET``.
    """
    if is_socket(transport):
        return TransportFamily.SOCKET
    if transport == "direct shared memory":  # NCCL before 2.13
        return TransportFamily.SHM
    return _FAMILIES.get(transport) or _FAMILIES.get(transport.split("/")[0], TransportFamily.OTHER)


_FAMILIES = {family.value: family for family in TransportFamily}
_SLOW = (TransportFamily.SOCKET, TransportFamily.CPU_GLOO)


@dataclass(frozen=True, slots=True)
class TransportUse:
    """A transport between two ranks, or of one rank where ``dst`` is ``None`` (CollNet, NVLS).

    :param channels: channel lines that say so. :param first: the first of them; its ``line`` is 0 where the
        evidence is no log line (CPU/SHM: a mapped segment).
    """

    src: int | None
    dst: int | None
    transport: str
    channels: int
    first: LogLine


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to act on, with its evidence; ``file``, ``line`` and ``text`` are ``None`` for an absence."""

    cause: str
    file: str | None
    line: int | None
    text: str | None
    advice: str


@dataclass(frozen=True, slots=True)
class TransportReport:
    """What is proved about the transports of one server.

    :param uses: one entry per (src, dst, transport).
    :param network: plugin that NCCL chose; not a transport in use.
    """

    verdict: TransportVerdict
    uses: tuple[TransportUse, ...] = ()
    network: str | None = None
    nccl_version: str | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def transports(self) -> dict[str, int]:
        """Channel lines per transport, the most frequent first."""
        counts: dict[str, int] = {}
        for use in self.uses:
            counts[use.transport] = counts.get(use.transport, 0) + use.channels
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    @property
    def edges(self) -> dict[tuple[int, int], tuple[TransportUse, ...]]:
        """Uses per (src, dst), in order of the ranks."""
        edges: dict[tuple[int, int], tuple[TransportUse, ...]] = {}
        for use in self.uses:
            if use.src is not None and use.dst is not None:
                pair = (use.src, use.dst)
                edges[pair] = (*edges.get(pair, ()), use)
        return dict(sorted(edges.items()))

    def summary(self) -> str:
        """Return one short text, such as ``P2P/CUMEM x4``."""
        if self.transports:
            text = ", ".join(f"{name} x{count}" for name, count in self.transports.items())
            return text + (" (incomplete)" if self.verdict == "no-evidence" else "")
        return "none needed" if self.verdict == "ok" else "no evidence"

    def to_document(self) -> dict[str, Any]:
        """Return what ``gpulayout nccl --json`` prints."""
        return {
            "verdict": self.verdict,
            "transports": self.transports,
            "edges": [
                {
                    "src": src,
                    "dst": dst,
                    "transports": [use.transport for use in uses],
                    "channels": sum(use.channels for use in uses),
                }
                for (src, dst), uses in self.edges.items()
            ],
            "network": self.network,
            "nccl_version": self.nccl_version,
            "findings": [
                {
                    "cause": finding.cause,
                    "evidence": {"file": finding.file, "line": finding.line, "text": finding.text},
                    "advice": finding.advice,
                }
                for finding in self.findings
            ],
        }


# -- NCCL ------------------------------------------------------------------------------------------------------------


def judge_nccl(log: NcclLog, layout: Layout | None = None) -> TransportReport:
    """Judge NCCL's logs, all processes of one server merged.

    :param layout: what should run. Then every group of it must be connected by channels, its ranks all named; a
        layout whose ranks do not talk needs no evidence. Without it, any channel is evidence.
    """
    uses = _uses(log)
    families = {family_of(use.transport) for use in uses}
    gap = _gap_in(log) if layout is None else _gap_for(log, layout)
    verdict: TransportVerdict
    if TransportFamily.SOCKET in families:
        verdict = "socket"
    elif gap is not None:
        verdict = "no-evidence"
    else:
        verdict = "shm" if TransportFamily.SHM in families else "ok"
    findings = [*_slow_findings(uses, log), *_missing_findings(gap, log), *_layout_findings(log, layout)]
    return TransportReport(verdict, uses, log.network, log.version, tuple(findings))


def _uses(log: NcclLog) -> tuple[TransportUse, ...]:
    def place(item: tuple[tuple[int, int | None, str], Seen]) -> tuple[int, int, str]:
        (src, dst, transport), _ = item
        return (src, -1 if dst is None else dst, transport)

    uses = [
        TransportUse(src, dst, transport, seen.lines, seen.first)
        for (src, dst, transport), seen in sorted(log.links.items(), key=place)
    ]
    if not log.edges and (communicators := log.nvls_communicators()):
        # Channels beside NVLS name the transport already; alone it has to stand for itself.
        members = sum(len(members) for members in communicators)
        uses.append(TransportUse(None, None, "NVLS", members, log.nvls_lines[0]))
    return tuple(uses)


def _gap_in(log: NcclLog) -> str | None:
    """Say what is missing when no layout is known."""
    if log.edges or log.nvls_communicators():
        return None
    if log.records == 0:
        return "no line of NCCL"
    if log.nranks == 1:
        return "no channel between ranks: NCCL ran with one rank"
    return "NCCL's lines name no channel between ranks"


def _gap_for(log: NcclLog, layout: Layout) -> str | None:
    """Say what is missing to prove the layout, ``None`` when nothing is."""
    named = {rank for pair in log.edges for rank in pair}
    if strangers := sorted(rank for rank in named if rank >= layout.ranks):
        has = f"layout {layout} has ranks 0 to {layout.ranks - 1}"
        return f"rank {strangers[-1]} has channels, {has}: another server's log"
    if not layout.communicating_pairs():
        return None
    if not named and not log.nvls_communicators():
        return _gap_in(log)
    size = max(_group_sizes(layout).values())
    if size not in {len(members) for members in log.nvls_communicators()}:
        parts = _connected_parts(range(size), log.edges)
        if len(parts) > 1:
            texts = " and ".join(",".join(map(str, part)) for part in parts)
            return f"layout {layout} connects {size} ranks, no channel line connects ranks {texts}"
    if layout.gpus > size and len(_witnesses(log)) < layout.gpus:
        return f"layout {layout} has {layout.gpus} processes, {len(_witnesses(log))} of them logged a channel"
    return None


def _group_sizes(layout: Layout) -> dict[str, int]:
    """Sizes of the communicators that vLLM makes for the layout; dense dp replicas have none."""
    experts = layout.dp * layout.pcp * layout.tp if layout.ep else 1
    return {"tp": layout.tp, "pp": layout.pp, "pcp": layout.pcp, "ep": experts}


def _witnesses(log: NcclLog) -> set[Process]:
    nvls = {member.process for members in log.nvls_communicators() for member in members}
    return set(log.speakers) | {process for process in nvls if process is not None}


def _connected_parts(ranks: Iterable[int], pairs: Iterable[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Ranks that channels connect with each other, part by part; a ring or tree needs not have every pair."""
    part = {rank: frozenset((rank,)) for rank in ranks}
    for a, b in pairs:
        if a in part and b in part:
            joined = part[a] | part[b]
            part.update(dict.fromkeys(joined, joined))
    return sorted(tuple(sorted(ranks)) for ranks in set(part.values()))


# -- findings --------------------------------------------------------------------------------------------------------

_ALLOW = "if this is wanted, allow it: --gpu-transport="
_ADVICE = {
    TransportFamily.SOCKET: (
        "on one host: give the processes one /dev/shm and one host name (docker: --ipc=host) and unset "
        "NCCL_P2P_DISABLE and NCCL_SHM_DISABLE; between hosts: make the InfiniBand or plugin devices visible"
    ),
    TransportFamily.SHM: (
        "normal between GPUs at PHB, NODE or SYS; between GPUs at NV#, PIX or PXB it is a loss: compare "
        "`gpulayout topo --layout SPEC`, then look for ACS, IOMMU and NCCL_P2P_* settings"
    ),
}
# Settings left over from another machine, by the family they drive traffic to, and the values that do no harm.
_SETTINGS = (
    ("NCCL_P2P_DISABLE", (TransportFamily.SHM, TransportFamily.SOCKET), ("0",)),
    ("NCCL_P2P_LEVEL", (TransportFamily.SHM, TransportFamily.SOCKET), ("SYS", "5")),
    ("NCCL_SHM_DISABLE", (TransportFamily.SOCKET,), ("0",)),
    ("NCCL_IB_DISABLE", (TransportFamily.SOCKET,), ("0",)),
)
_WARNINGS = (
    (
        re.compile(r"shared memory segment|failed to extend /dev/shm|No space left on device"),
        "/dev/shm is too small for NCCL",
        "give the container more: docker run --shm-size=8g or --ipc=host; Kubernetes: emptyDir with medium Memory",
    ),
    (
        re.compile(r"no socket interface found|[Nn]o interface found"),
        "NCCL found no network interface",
        "set NCCL_SOCKET_IFNAME to an interface that exists, or unset it",
    ),
)


def _slow_findings(uses: Sequence[TransportUse], log: NcclLog) -> Iterable[Finding]:
    for family, advice in _ADVICE.items():
        found = [use for use in uses if family_of(use.transport) is family]
        if not found:
            continue
        yield from _setting_findings(log, family)
        pairs = len({(use.src, use.dst) for use in found})
        cause = f"ranks {found[0].src} -> {found[0].dst} use {found[0].transport}"
        yield _finding(cause + (f", {pairs} pairs in all" if pairs > 1 else ""), found[0].first, advice)


def _setting_findings(log: NcclLog, family: TransportFamily) -> Iterable[Finding]:
    for name, families, harmless in _SETTINGS:
        value, where = log.environment.get(name, ("", None))
        if where is not None and family in families and value.upper() not in harmless:
            yield _finding(f"{name} set by environment to {value}", where, f"unset {name}")


def _missing_findings(gap: str | None, log: NcclLog) -> Iterable[Finding]:
    if gap is None:
        return
    for pattern, cause, advice in _WARNINGS:
        if line := next((line for line in log.warnings if pattern.search(line.text)), None):
            yield _finding(cause, line, advice)
    yield Finding(gap, ", ".join(log.sources[:3]) or None, None, None, _HOW_TO_LOG)


def _layout_findings(log: NcclLog, layout: Layout | None) -> Iterable[Finding]:
    if layout is None:
        return
    if not layout.communicating_pairs():
        reason = "has one rank" if layout.gpus == 1 else "has no ranks that talk to each other"
        yield Finding(f"layout {layout} {reason}: no transport is needed", None, None, None, "nothing to do")
    nodes = max((member.n_nodes or 1 for member in log.comm_ranks if member.nranks > 1), default=1)
    if nodes > layout.nodes:
        yield Finding(
            f"NCCL sees {nodes} nodes, layout {layout} has {layout.nodes}",
            ", ".join(log.sources[:3]) or None,
            None,
            f"nNodes {nodes}",
            "processes of one host need one host name and one /dev/shm (docker: --ipc=host), or NCCL_HOSTID",
        )


def _finding(cause: str, where: LogLine, advice: str) -> Finding:
    return Finding(cause, where.file, where.line or None, where.text, advice)


# -- vLLM's CPU backend ----------------------------------------------------------------------------------------------

# VLLM_DIST_IDENT, group, ranks of the group, then the member's number in the group; the names are made by
# _CPUSHMDistributed.make_group_name in vllm/distributed/device_communicators/cpu_communicator.py (0.32).
_SEGMENT = re.compile(
    r"(?:^|/)(?P<ident>[^/]+)-(?P<group>[a-z]+)(?P<number>:\d+)?-\[(?P<ranks>\d+(?:-\d+)*)\]-cpushm_(?P<member>\d{1,9})"
    r"(?: \(deleted\))?$"
)


@dataclass(frozen=True, slots=True)
class _CpuGroup:
    """Ranks (of the layout) that share one communicator of vLLM, in group order."""

    name: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} of ranks {','.join(map(str, self.ranks))}"


def judge_cpu(layout: Layout, vllm: VllmLogFacts, mapped_segments: Mapping[int, Collection[str]]) -> TransportReport:
    """Judge a server on vLLM's CPU backend, where no NCCL runs.

    vLLM says in its log when a group falls back to torch.distributed's gloo, and nothing when the group shares
    memory; then the proof is that every member has mapped the segment of every member.

    :param mapped_segments: rank to the paths (or names) of the segments that its process has mapped, e.g.
        ``/dev/shm/vllm_dist_<id>-tp:0-[0-1]-cpushm_0``.
    """
    uses: list[TransportUse] = []
    findings: list[Finding] = []
    proved: set[tuple[int, int]] = set()
    groups = _cpu_groups(layout)
    for group in groups:
        segments = _shared_segments(group, mapped_segments)
        off = next((fact.evidence for fact in vllm.cpu_shm_off if fact.group.split(":")[0] == group.name), None)
        alone = sum(other.name == group.name for other in groups) == 1
        if off is not None and (alone or segments is None):
            uses += _cpu_uses(group, _CPU_GLOO, [off] * len(group.ranks))
            findings.append(_gloo_finding(group, off))
        elif segments is not None:
            uses += _cpu_uses(group, _CPU_SHM, segments)
        else:
            findings.append(_unmapped_finding(group, mapped_segments))
            continue
        proved |= set(permutations(group.ranks, 2))
    open_pairs = [pair for pair in layout.communicating_pairs() if pair not in proved]
    findings += _cpu_layout_findings(layout, open_pairs, groups)
    slow = any(use.transport == _CPU_GLOO for use in uses)
    verdict: TransportVerdict = "socket" if slow else "no-evidence" if open_pairs else "ok"
    return TransportReport(verdict, tuple(uses), findings=tuple(findings))


def _cpu_groups(layout: Layout) -> list[_CpuGroup]:
    """Groups for which the CPU backend has a shared-memory communicator: tp and pp."""
    groups: list[_CpuGroup] = []
    if layout.tp > 1:
        groups += [_CpuGroup("tp", tuple(range(at, at + layout.tp))) for at in range(0, layout.gpus, layout.tp)]
    if layout.pp > 1:
        stage = layout.pcp * layout.tp
        for start in range(0, layout.gpus, layout.pp * stage):
            for at in range(start, start + stage):
                groups.append(_CpuGroup("pp", tuple(range(at, at + layout.pp * stage, stage))))
    return groups


def _shared_segments(group: _CpuGroup, mapped: Mapping[int, Collection[str]]) -> list[LogLine] | None:
    """The mapped segment of each member, as evidence; ``None`` unless every member maps all of one communicator."""
    size = len(group.ranks)
    per_rank = [_communicators(group.name, size, mapped.get(rank, ())) for rank in group.ranks]
    for key, segments in per_rank[0].items():
        if all(set(other.get(key, ())) >= set(range(size)) for other in per_rank):
            return [
                LogLine(f"memory map of rank {rank}", 0, segments[member]) for member, rank in enumerate(group.ranks)
            ]
    return None


def _communicators(name: str, size: int, paths: Collection[str]) -> dict[tuple[str, ...], dict[int, str]]:
    """Segments by communicator (identity, number, ranks), then by member."""
    found: dict[tuple[str, ...], dict[int, str]] = {}
    for path in paths:
        match = _SEGMENT.search(path)
        if match and match["group"] == name and len(match["ranks"].split("-")) == size:
            key = (match["ident"], match["number"] or "", match["ranks"])
            found.setdefault(key, {})[int(match["member"])] = path
    return found


def _cpu_uses(group: _CpuGroup, transport: str, evidence: Sequence[LogLine]) -> Iterable[TransportUse]:
    for (src, where), (dst, _) in permutations(zip(group.ranks, evidence, strict=True), 2):
        yield TransportUse(src, dst, transport, 1, where)


def _gloo_finding(group: _CpuGroup, where: LogLine) -> Finding:
    return _finding(
        f"group {group} fell back to gloo over sockets: no common shared memory",
        where,
        "start all ranks on one host with one /dev/shm (docker: --ipc=host) by one vLLM command; "
        f"{_ALLOW}{_CPU_SHM.lower()},{_CPU_GLOO.lower()}",
    )


def _unmapped_finding(group: _CpuGroup, mapped: Mapping[int, Collection[str]]) -> Finding:
    counts = ", ".join(f"rank {rank}: {len(mapped[rank]) if rank in mapped else 'unknown'}" for rank in group.ranks)
    return Finding(
        f"group {group}: every rank must map the shared-memory segment of every member, and they do not",
        None,
        None,
        f"segments mapped by {counts}",
        "read the segments while the server runs, as its user; look in its log for `CPU SHM communicator`",
    )


def _cpu_layout_findings(
    layout: Layout, open_pairs: Sequence[tuple[int, int]], groups: Sequence[_CpuGroup]
) -> Iterable[Finding]:
    if not layout.communicating_pairs():
        reason = "has one rank" if layout.gpus == 1 else "has no ranks that talk to each other"
        yield Finding(f"layout {layout} {reason}: no transport is needed", None, None, None, "nothing to do")
    grouped = {pair for group in groups for pair in permutations(group.ranks, 2)}
    if outside := [pair for pair in open_pairs if pair not in grouped]:
        a, b = outside[0]
        yield Finding(
            f"vLLM's CPU backend shares memory in tp and pp groups only; ranks {a} and {b} talk in another one",
            None,
            None,
            None,
            "use a layout of tp and dp on the CPU platform",
        )


# -- what is allowed -------------------------------------------------------------------------------------------------

_WORDS = {family.value.lower(): family for family in TransportFamily}
_WORDS |= {"socket": TransportFamily.SOCKET}


@dataclass(frozen=True, slots=True)
class AllowedTransports:
    """Families that may be used; the default allows everything but sockets."""

    families: frozenset[TransportFamily] = frozenset(TransportFamily) - frozenset(_SLOW)

    def __str__(self) -> str:
        if self == AllowedTransports():
            return "all but " + " and ".join(_SLOW)
        return ", ".join(family for family in TransportFamily if family in self.families)


@dataclass(frozen=True, slots=True)
class TransportViolation:
    """Two ranks (or one, for CollNet and NVLS) use what is not allowed, and the first line that shows it."""

    src: int | None
    dst: int | None
    transport: str
    family: TransportFamily
    file: str
    line: int
    allowed: AllowedTransports

    def __str__(self) -> str:
        who = "the server" if self.src is None else f"rank {self.src}"
        who = who if self.dst is None else f"ranks {self.src} -> {self.dst}"
        where = self.file + (f", line {self.line}" if self.line else "")
        return (
            f"{who}: transport {self.transport}, allowed: {self.allowed}\n"
            f"  in {where}\n"
            f"  {_ALLOW}{','.join(sorted(family.lower() for family in self.allowed.families | {self.family}))}"
        )


def parse_allowed(text: str) -> AllowedTransports:
    """Read a list such as ``p2p,nvls,shm``; families in any case, empty text is the default.

    ``net`` is every network but ``NET/Socket``, which is spelled ``socket`` or ``net/socket``.

    :raises LayoutSyntaxError: with the column of the word that is no family.
    """
    if not text.strip():
        return AllowedTransports()
    families = set()
    column = 1
    for part in text.split(","):
        word = part.strip().lower()
        if word not in _WORDS:
            found = repr(part.strip()) if word else "nothing"
            reason = f"transport: expected one of {', '.join(sorted(_WORDS))}, found {found}"
            raise LayoutSyntaxError(text, column + len(part) - len(part.lstrip()), reason)
        families.add(_WORDS[word])
        column += len(part) + 1
    return AllowedTransports(frozenset(families))


def forbidden(report: TransportReport, allowed: AllowedTransports) -> tuple[TransportViolation, ...]:
    """Every use of a transport that is not allowed, in order of the ranks.

    A report without evidence has nothing to forbid: look at its verdict, too.
    """
    return tuple(
        TransportViolation(use.src, use.dst, use.transport, family, use.first.file, use.first.line, allowed=allowed)
        for use in report.uses
        if (family := family_of(use.transport)) not in allowed.families
    )
