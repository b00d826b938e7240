"""What single records of NCCL's log say: channels, ranks of communicators, rings, trees, and what explains them.

Knows the text of ``NCCL_DEBUG=INFO`` (NVIDIA/nccl ``src/debug.cc``, ``src/init.cc``, ``src/transport/*.cc``, 2.3 to
2.30, and ROCm/rccl). Leaves finding records to :mod:`~pytest_gpulayout.nccl_log`, and which communicator a channel
belongs to, to :mod:`~pytest_gpulayout.nccl_communicators`. ::

    Channel NN[/C] : a[dev] -> b[dev] [send] via NET/IB/0/GDRDMA      2.7 and later; "Ring" before
    CollNet NN/C : r [send] via COLLNET/SHARP/0                       one rank, no arrow; "Coll" to 2.8
    NVLS comm 0x.. headRank R nHeads N nvlsRanks N buffSize ..        buffers made: in use, though no "via"
    comm 0x.. rank R nranks N cudaDev D nvmlDev V busId B commId 0x.. - Init START
    comm 0x.. rank R nRanks N nNodes K localRanks L localRank l MNNVL m
    Channel 00/08 : 0 1 2 3                                           a ring, by rank 0
    Trees [0] 1/-1/-1->0->-1 [1] ..                                   children -> rank -> parent, by each rank

``Using network X`` names the plugin that was chosen, not a transport that is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from pytest_gpulayout.nccl_lines import LogLine

Direction = Literal["send", "receive"]
Process = tuple[str, int]
"""Host name and process id, as the line's head gives them."""

_DIRECTIONS: dict[str, Direction] = {"send": "send", "receive": "receive"}

_WORD = r"[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_]+)*(?:\([^()\s]*\))?"
_REST = rf"(?:/{_WORD})*"
_PLUGIN_DEVICE = r"/-?\d+(?:\(-?\d+\))?"
# A plugin's name is free text and may hold a space ("AWS Libfabric"); its device number ends it.
_NETWORK = rf"[^/\[\](){{}}<>:\"\\\s](?:[^/\[\](){{}}<>:\"\\\r\n\t]{{0,62}}[^/\s])?{_PLUGIN_DEVICE}"
_TRANSPORT = (
    r"direct shared memory"
    rf"|P2P/(?:direct pointer|common device|indirect/\d+\[[0-9a-fA-F]+\]){_REST}"
    rf"|NET/Socket(?![\w.+-]){_REST}"
    rf"|(?:COLLNET|NET)/{_NETWORK}{_REST}"
    rf"|(?:P2P|SHM|NET|COLLNET)\b{_REST}"
    rf"|[A-Z][A-Z0-9_]+/{_WORD}{_REST}"
    r"|NE?(?=\s*$)"
)
_ARROW = r"-(?:>|&gt;|\\u003e)"
_CHANNEL = re.compile(
    r"(?:Channel|Ring)\s+(?P<channel>\d{1,6})(?:/(?P<connection>\d{1,6}))?\s*:\s*"
    rf"(?P<src>\d{{1,9}})(?:\[[0-9a-fA-F]+\])?\s*{_ARROW}\s*(?P<dst>\d{{1,9}})(?:\[[0-9a-fA-F]+\])?\s*"
    rf"(?:\[(?P<direction>send|receive)\]\s*)?via\s+(?P<transport>{_TRANSPORT})"
    r"(?: comm (?P<comm>0x[0-9a-f]+)(?: nRanks \d+)?)?"
)
_COLLNET = re.compile(
    r"Coll(?:Net)?\s+(?P<channel>\d{1,6})(?:/(?P<connection>\d{1,6}))?\s*:\s*(?P<src>\d{1,9})\s*"
    rf"\[(?P<direction>send|receive)\]\s*via\s+(?P<transport>{_TRANSPORT})"
    r"(?: comm (?P<comm>0x[0-9a-f]+)(?: nRanks \d+)?)?"
)
_BEGINNING = re.compile(r"\s*(?:\[Rank \d+\] )?")


def matches(pattern: re.Pattern[str], text: str, *, quoted: bool) -> Iterator[re.Match[str]]:
    """Where a pattern is found.

    :param quoted: anywhere; else at the beginning only, because a record that begins otherwise merely quotes it:
        ``NCCL_X set by environment to Channel ..``.
    """
    if quoted:
        yield from pattern.finditer(text)
    elif match := pattern.match(text, _beginning_of(text)):
        yield match


def _beginning_of(text: str) -> int:
    match = _BEGINNING.match(text)
    return match.end() if match else 0


def is_socket(transport: str) -> bool:
    """Whether a transport is ``NET/Socket``; ``NET/FastSocket`` is another thing."""
    return transport.split("/")[:2] == ["NET", "Socket"]


def is_shm(transport: str) -> bool:
    """Whether data goes through host memory; NCCL before 2.13 has words for it."""
    return transport.split("/")[0] == "SHM" or transport == "direct shared memory"


def is_torn(transport: str) -> bool:
    """Whether a transport breaks off where it could still become ``NET/Socket``, e.g. ``NET/Sock``.

    A network's transport has a device behind its name; ``NET/IB`` without one is cut, too, but no socket.
    """
    first, _, rest = transport.partition("/")
    if not rest:
        return first in ("N", "NE", "NET")
    name = re.split(r"[/ ]", rest, maxsplit=1)[0]
    return first == "NET" and "Socket".startswith(name) and name != "Socket"


@dataclass(frozen=True, slots=True)
class Channel:
    """One ``Channel ... via`` line; CollNet names one rank, so its ``dst`` is ``None``.

    :param src: rank in that communicator, not a device. :param dst: likewise.
    :param transport: the text after ``via``, verbatim.
    :param direction: which end of a network channel logged it; ``None`` for P2P and SHM (the sender does).
    :param connection: 0 collectives, 1 send/recv; ``None`` where the line does not say.
    :param comm: address of the communicator, which only RCCL names.
    """

    src: int
    dst: int | None
    transport: str
    direction: Direction | None
    channel: int
    connection: int | None
    line: int
    file: str
    comm: str | None = None

    @property
    def rank(self) -> int:
        """The rank that logged it."""
        return self.dst if self.direction == "receive" and self.dst is not None else self.src

    @property
    def torn(self) -> bool:
        """Whether the transport breaks off where it could still become ``NET/Socket``."""
        return is_torn(self.transport)


def channels_in(text: str, *, file: str, line: int, quoted: bool = True) -> Iterator[Channel]:
    """Every channel that a piece of text names, CollNet included.

    :param quoted: also those that stand neither at the beginning nor behind another one, see :func:`matches`.
    """
    at = None if quoted else _beginning_of(text)
    for pattern in (_CHANNEL, _COLLNET):
        for match in pattern.finditer(text):
            if at is not None and text[at : match.start()].strip():
                break
            at = at if at is None else match.end()
            found = match.groupdict()
            yield Channel(
                src=int(found["src"]),
                dst=int(found["dst"]) if "dst" in found else None,
                transport=found["transport"],
                direction=_DIRECTIONS.get(found["direction"]),
                channel=int(found["channel"]),
                connection=int(found["connection"]) if found["connection"] else None,
                line=line,
                file=file,
                comm=found["comm"],
            )


# -- ranks of communicators ------------------------------------------------------------------------------------------


class Stage(StrEnum):
    """What a line about a rank of a communicator reports."""

    START = "Init START"
    KNOWN = "nNodes"
    COMPLETE = "Init COMPLETE"
    OTHER = ""


@dataclass(frozen=True, slots=True)
class CommRank:
    """One rank of one communicator, put together from its init lines; what they left open is ``None``.

    :param comm: address in its process.
    :param comm_id: the same in all ranks (2.14 and later); for a split one made up of its parent's.
    :param nvml_dev: index of the GPU on its host; ``cuda_dev`` is renumbered by ``CUDA_VISIBLE_DEVICES``.
    :param nvls: an ``NVLS comm`` line stands for it. :param nvls_ranks: ranks that share these buffers.
    :param mnnvl: whether NVLink connects several nodes.
    :param all_direct_p2p: whether all ranks of this node can reach each other by P2P (2.24 and later); true, too,
        of a node with one rank.
    """

    process: Process | None
    comm: str
    rank: int
    nranks: int
    cuda_dev: int | None = None
    nvml_dev: int | None = None
    bus_id: str | None = None
    comm_id: str | None = None
    n_nodes: int | None = None
    nvls: bool = False
    nvls_ranks: int | None = None
    local_ranks: int | None = None
    mnnvl: bool | None = None
    all_direct_p2p: bool | None = None

    @property
    def host(self) -> str | None:
        """The host name that its lines begin with."""
        return self.process[0] if self.process else None


@dataclass(frozen=True, slots=True)
class CommRecord:
    """One line about a rank. :param split: parent's address, number and colour, where it came of a split."""

    rank: CommRank
    stage: Stage
    split: tuple[str, str, str] | None = None


@dataclass(frozen=True, slots=True)
class NvlsRecord:
    """One ``NVLS comm`` line: this rank has made its buffers."""

    comm: str
    nvls_ranks: int | None


@dataclass(frozen=True, slots=True)
class TreeNode:
    """One rank's place in the tree of one channel; ``None`` at the root."""

    rank: int
    parent: int | None
    children: tuple[int, ...]


_COMM = re.compile(
    r"(?:[A-Za-z_]\w* )?comm (?P<comm>0x[0-9a-f]+) rank (?P<rank>\d{1,9}) n[rR]anks (?P<nranks>\d{1,9})"
    r"(?P<rest> (?:cudaDev|nNodes) [^\r\n]*)"
)
_COMM_FIELD = re.compile(
    r"\b(cudaDev|nvmlDev|busId|commId|nNodes|localRanks|MNNVL) (0x[0-9a-f]{1,32}|[0-9a-f]{1,16})\b"
)
_SPLIT = re.compile(r"\bparent (0x[0-9a-f]+) splitCount (\d{1,9}) color (-?\d{1,10})")
_NVLS = re.compile(r"NVLS comm (?P<comm>0x[0-9a-f]+) headRank -?\d+ nHeads \d+(?: nvlsRanks (?P<ranks>\d{1,9}))?")
_RING = re.compile(r"\s*Channel (?P<channel>\d{1,6})(?:/\d+)? :(?P<ranks>(?:\s+\d{1,9}(?![\d\[/]))+)(?!\s*->)")
_TREES = re.compile(r"\s*Trees \[\d+\] [-\d/]+->(?P<rank>\d{1,9})->")
_TREE = re.compile(r"\[(\d{1,6})\] (-?\d{1,9}(?:/-?\d{1,9}){0,2})->(\d{1,9})->(-?\d{1,9}(?:/-?\d{1,9}){0,2})")
_P2P_CHECK = re.compile(r"\s*Check P2P Type (?:intraNodeP2pSupport|isAllDirectP2p) (?P<all>\d)")


def comm_record(text: str, process: Process | None, *, quoted: bool = True) -> CommRecord | None:
    """The line about a rank that a record is; ``None`` when it is something else."""
    match = next(matches(_COMM, text, quoted=quoted), None)
    if match is None:
        return None
    fields = dict(_COMM_FIELD.findall(match["rest"]))

    def number(name: str) -> int | None:
        return int(fields[name]) if fields.get(name, "").isdecimal() else None

    mnnvl = number("MNNVL")
    rank = CommRank(
        process=process,
        comm=match["comm"],
        rank=int(match["rank"]),
        nranks=int(match["nranks"]),
        cuda_dev=number("cudaDev"),
        nvml_dev=number("nvmlDev"),
        bus_id=fields.get("busId"),
        comm_id=fields.get("commId"),
        n_nodes=number("nNodes"),
        local_ranks=number("localRanks"),
        mnnvl=None if mnnvl is None else bool(mnnvl),
    )
    stage = next(stage for stage in Stage if stage.value in match["rest"])
    split = _SPLIT.search(match["rest"])
    return CommRecord(rank, stage, (split[1], split[2], split[3]) if split else None)


def nvls_records(text: str, *, quoted: bool = True) -> Iterator[NvlsRecord]:
    """Every ``NVLS comm`` line of a piece of text."""
    for match in matches(_NVLS, text, quoted=quoted):
        yield NvlsRecord(match["comm"], int(match["ranks"]) if match["ranks"] else None)


def ring_in(text: str) -> tuple[int, tuple[int, ...]] | None:
    """Channel and order of ranks; older versions cut the line after some 20 ranks."""
    if match := _RING.match(text):
        return int(match["channel"]), tuple(map(int, match["ranks"].split()))
    return None


def tree_rank(text: str) -> int | None:
    """The rank whose place in the trees a record gives; ``None`` when it is something else."""
    match = _TREES.match(text)
    return int(match["rank"]) if match else None


def trees_in(text: str) -> dict[int, TreeNode]:
    """This rank's place in the tree of each channel, from a record for which :func:`tree_rank` knows a rank.

    From 2.8: children -> rank -> parent. From 2.5 a second, mirrored tree follows behind ``|``, which is left out;
    2.4 has parent -> rank -> children, told by which side holds three.
    """
    trees = {}
    for channel, left, rank, right in _TREE.findall(text):
        below, above = (right, left) if "/" in right and "/" not in left else (left, right)
        children = tuple(int(child) for child in below.split("/") if not child.startswith("-"))
        parent = None if above.startswith("-") or "/" in above else int(above)
        trees[int(channel)] = TreeNode(int(rank), parent, children)
    return trees


def all_direct_p2p(text: str) -> bool | None:
    """What a ``Check P2P Type`` line says; ``None`` when it is something else."""
    match = _P2P_CHECK.match(text)
    return match["all"] != "0" if match else None


# -- what explains them ----------------------------------------------------------------------------------------------


class RemarkKind(StrEnum):
    """Lines that explain a choice of NCCL; none of them shows what is used."""

    ERROR = "an error was passed on"
    PLUGIN = "network plugin"
    NO_INFINIBAND = "no InfiniBand device"
    NO_INTERFACE = "no network interface"
    P2P_DISABLED = "P2P is disabled between connected GPUs"
    P2P_CHECK = "P2P between all GPUs of the node"
    CUMEM_HOST_REFUSED = "host memory by cuMem is refused"
    MNNVL = "NVLink between nodes"
    NVLS_SUPPORT = "NVLS is supported or not"
    CONNECTED = "an algorithm has set up its connections"


@dataclass(frozen=True, slots=True)
class Remark:
    """One such line."""

    kind: RemarkKind
    line: LogLine


_REMARKS = {
    # ncclResult_t of src/nccl.h.in: 1 CUDA, 2 system, 3 internal, 4 argument, 5 usage, 6 remote, 7 in progress.
    RemarkKind.ERROR: r"[a-z/][\w./-]*+:\d+ -> [1-6]\b",
    RemarkKind.NO_INFINIBAND: r"NET/IB ?: No device found",
    RemarkKind.NO_INTERFACE: r"NET/Socket ?: [Nn]o interface found",
    RemarkKind.PLUGIN: r"NET/Plugin\b|(?:Assigned|Initialized|Failed to initialize) NET plugin ",
    RemarkKind.P2P_DISABLED: r"P2P is disabled between ",
    RemarkKind.P2P_CHECK: r"Check P2P Type ",
    RemarkKind.CUMEM_HOST_REFUSED: r"cuMem host allocations do not appear to be working",
    RemarkKind.MNNVL: r"MNNVL (?:busId|\d) ",
    RemarkKind.NVLS_SUPPORT: r"NVLS multicast support is ",
    RemarkKind.CONNECTED: r"Connected (?:all (?:rings|trees)|NVLS tree)",
}
_REMARK = re.compile("|".join(f"(?P<{kind.name}>{pattern})" for kind, pattern in _REMARKS.items()))


def remark_kind(message: str) -> RemarkKind | None:
    """What a record explains; ``None`` for most."""
    match = _REMARK.match(message)
    return RemarkKind[match.lastgroup] if match and match.lastgroup else None
