"""What NCCL's own log says: which rank reaches which, over what, and the lines that explain why.

Knows the text of ``NCCL_DEBUG=INFO`` (NVIDIA/nccl ``src/debug.cc``, ``src/transport/*.cc``, 2.3 to 2.30, and
ROCm/rccl) and turns it into facts, each with the line it came from. What the facts mean for a layout is left to
:mod:`~pytest_gpulayout.transport`; opening files to the callers.

A record is ``HOST:PID:TID [CUDADEV] NCCL INFO text``, but launchers, terminals and several writers on one stream
put things before, between and after records. So records are searched anywhere in a line, several per line::

    Channel NN[/C] : a[dev] -> b[dev] [send] via NET/IB/0/GDRDMA      2.7 and later; "Ring" before
    CollNet NN/C : r [send] via COLLNET/SHARP/0                       one rank, no arrow; "Coll" to 2.8
    NVLS comm 0x.. headRank R nHeads N nvlsRanks N buffSize ..        buffers made: in use, though no "via"
    comm 0x.. rank R nranks N cudaDev D nvmlDev V busId B commId 0x.. - Init START
    comm 0x.. rank R nRanks N nNodes K localRanks L localRank l MNNVL m

``Using network X`` names the plugin that was chosen, not a transport that is used.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

Direction = Literal["send", "receive"]
Process = tuple[str, int]
"""Host name and process id, as the line's head gives them."""

_DIRECTIONS: dict[str, Direction] = {"send": "send", "receive": "receive"}

LONGEST_LINE = 1 << 20
"""Bytes after which a line without an end is read in pieces, so that memory stays bounded."""
_LONGEST_EVIDENCE = 400
_MOST_WARNINGS = 200

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\[\d{1,3}(?:;\d{1,3})*m")
_NUL_BYTES = re.compile(rb"\0{2,}")
_NULS = re.compile(r"\0{2,}")
_WORTH_READING = re.compile(r"NCCL|RCCL|via |NVLS comm|comm 0x|Using network")
_HEAD = re.compile(
    r"(?<![\w.-])(?P<host>[A-Za-z0-9][\w.-]{0,252}+):(?P<pid>\d{1,10}):\d{1,10} \[-?\d+\]"
    r"(?: \S+:\d+(?: \([^()\s]*\))?)? NCCL [A-Z]+"
)

_WORD = r"[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_]+)*(?:\([^()\s]*\))?"
_REST = rf"(?:/{_WORD})*"
_PLUGIN_DEVICE = r"/-?\d+(?:\(-?\d+\))?"
# A plugin's name is free text and may hold a space ("AWS Libfabric"); its device number ends it.
_NETWORK = rf"[^/\[\](){{}}<>:\"\\\s](?:[^/\[\](){{}}<>:\"\\\r\n\t]{{0,62}}[^/\s])?{_PLUGIN_DEVICE}"
_TRANSPORT = (
    r"direct shared memory"
    rf"|P2P/(?:direct pointer|common device|indirect/\d+\[[0-9a-fA-F]+\]){_REST}"
    rf"|(?:COLLNET|NET)/{_NETWORK}{_REST}"
    rf"|(?:P2P|SHM|NET|COLLNET)\b{_REST}"
    rf"|[A-Z][A-Z0-9_]+/{_WORD}{_REST}"
)
_ARROW = r"-(?:>|&gt;|\\u003e)"
_CHANNEL = re.compile(
    r"(?:Channel|Ring)\s+(?P<channel>\d{1,6})(?:/(?P<connection>\d{1,6}))?\s*:\s*"
    rf"(?P<src>\d{{1,9}})(?:\[[0-9a-fA-F]+\])?\s*{_ARROW}\s*(?P<dst>\d{{1,9}})(?:\[[0-9a-fA-F]+\])?\s*"
    rf"(?:\[(?P<direction>send|receive)\]\s*)?via\s+(?P<transport>{_TRANSPORT})"
)
_COLLNET = re.compile(
    r"Coll(?:Net)?\s+(?P<channel>\d{1,6})(?:/(?P<connection>\d{1,6}))?\s*:\s*(?P<src>\d{1,9})\s*"
    rf"\[(?P<direction>send|receive)\]\s*via\s+(?P<transport>{_TRANSPORT})"
)
# Names of NCCL's own plugins are one word, whatever was put behind them; others may be several.
_NETWORK_CHOSEN = re.compile(
    r"Using network (?P<name>(?:Socket|IB|IBext(?:_v\d+)?)(?![\w.+-])|\w[\w.+-]*(?: \w[\w.+-]*)*)"
)
_VERSION = re.compile(
    r"\b(?:NCCL version (?P<nccl>\d+\.\d+(?:\.\d+)*(?:(?!NCCL)[\w-])*(?:\+cuda\d+(?:\.\d+)*)?)"
    r"|RCCL version\s*:?\s*(?P<rccl>\d+\.\d+[\w.:+-]*))"
)
_COMM = re.compile(
    r"comm (?P<comm>0x[0-9a-f]+) rank (?P<rank>\d{1,9}) n[rR]anks (?P<nranks>\d{1,9})\b(?P<rest>[^\r\n]*)"
)
_COMM_FIELD = re.compile(r"\b(cudaDev|nvmlDev|busId|commId|nNodes) (0x[0-9a-f]{1,32}|[0-9a-f]{1,16})\b")
_NVLS = re.compile(r"NVLS comm (?P<comm>0x[0-9a-f]+) headRank -?\d+ nHeads \d+(?: nvlsRanks (?P<ranks>\d{1,9}))?")
_WARN = re.compile(r"NCCL WARN\s+(?P<text>\S[^\r\n]*)")
_ENVIRONMENT = re.compile(r"(?P<name>NCCL_[A-Z0-9_]+) set by environment to (?P<value>\S+)")


@dataclass(frozen=True, slots=True)
class LogLine:
    """A piece of evidence: where it stands, and its text without colours, cut at 400 characters.

    :param line: 1-based.
    """

    file: str
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Channel:
    """One ``Channel ... via`` line; CollNet names one rank, so its ``dst`` is ``None``.

    :param src: rank in that communicator, not a device. :param dst: likewise.
    :param transport: the text after ``via``, verbatim.
    :param direction: which end of a network channel logged it; ``None`` for P2P and SHM (the sender does).
    :param connection: 0 collectives, 1 send/recv; ``None`` where the line does not say.
    """

    src: int
    dst: int | None
    transport: str
    direction: Direction | None
    channel: int
    connection: int | None
    line: int
    file: str


@dataclass(frozen=True, slots=True)
class Seen:
    """How many channel lines said it, and the first of them."""

    lines: int
    first: LogLine


@dataclass(frozen=True, slots=True)
class CommRank:
    """One rank of one communicator, put together from its init lines; what they left open is ``None``.

    :param comm: address in its process. :param comm_id: the same in all ranks (2.14 and later).
    :param nvml_dev: index of the GPU on its host; ``cuda_dev`` is renumbered by ``CUDA_VISIBLE_DEVICES``.
    :param nvls: an ``NVLS comm`` line stands for it. :param nvls_ranks: ranks that share these buffers.
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


@dataclass(frozen=True, slots=True)
class NcclLog:
    """Everything the logs of one server say, aggregated; the size depends on ranks, not on lines.

    :param links: (src, dst, transport) to the channel lines that say so; ``dst`` is ``None`` for CollNet.
    :param speakers: processes that logged a channel.
    :param networks: what ``Using network`` names, with its number of lines, in order of appearance.
    :param versions: as logged, ``RCCL ...`` for AMD's library, in order of appearance.
    :param warnings: ``NCCL WARN`` lines with different texts, at most 200.
    :param environment: NCCL variables that were set, with the first line that shows each.
    :param records: lines of NCCL in any form; 0 means that these are not NCCL logs.
    """

    sources: tuple[str, ...] = ()
    links: Mapping[tuple[int, int | None, str], Seen] = field(default_factory=dict)
    speakers: frozenset[Process] = frozenset()
    comm_ranks: tuple[CommRank, ...] = ()
    nvls_lines: tuple[LogLine, ...] = ()
    networks: Mapping[str, int] = field(default_factory=dict)
    versions: tuple[str, ...] = ()
    warnings: tuple[LogLine, ...] = ()
    environment: Mapping[str, tuple[str, LogLine]] = field(default_factory=dict)
    records: int = 0

    @property
    def transports(self) -> Counter[str]:
        """Channel lines per transport; both ends of a network channel count."""
        counts: Counter[str] = Counter()
        for (_, _, transport), seen in self.links.items():
            counts[transport] += seen.lines
        return counts

    @property
    def edges(self) -> dict[tuple[int, int], dict[str, int]]:
        """Channel lines per transport for each (src, dst)."""
        edges: dict[tuple[int, int], dict[str, int]] = {}
        for (src, dst, transport), seen in self.links.items():
            if dst is not None:
                edges.setdefault((src, dst), {})[transport] = seen.lines
        return edges

    @property
    def socket_lines(self) -> tuple[LogLine, ...]:
        """First line of each rank pair that goes over ``NET/Socket``."""
        return tuple(seen.first for key, seen in self.links.items() if is_socket(key[2]))

    @property
    def network(self) -> str | None:
        """The network plugin chosen; the first where logs differ."""
        return next(iter(self.networks), None)

    @property
    def version(self) -> str | None:
        """NCCL's (or RCCL's) version; the first where logs differ."""
        return next(iter(self.versions), None)

    @property
    def ranks(self) -> frozenset[int]:
        """Ranks that a channel or an init line names."""
        named = {rank for src, dst, _ in self.links for rank in (src, dst) if rank is not None}
        return frozenset(named | {member.rank for member in self.comm_ranks})

    @property
    def nranks(self) -> int | None:
        """Size of the largest communicator, as its init lines say."""
        return max((member.nranks for member in self.comm_ranks), default=None)

    def nvls_communicators(self) -> tuple[tuple[CommRank, ...], ...]:
        """Communicators of one node where every rank made its NVLS buffers: evidence without a channel line."""
        members: dict[tuple[str | None, int], list[CommRank]] = {}
        for member in self.comm_ranks:
            members.setdefault((member.comm_id, member.nranks), []).append(member)
        return tuple(tuple(group) for group in members.values() if _all_nvls_on_one_node(group))


def _all_nvls_on_one_node(group: Sequence[CommRank]) -> bool:
    nranks = group[0].nranks
    if nranks < 2 or sorted(member.rank for member in group) != list(range(nranks)):
        return False
    if not all(member.nvls for member in group):
        return False
    if nodes := {member.n_nodes for member in group if member.n_nodes is not None}:
        return nodes == {1}
    hosts = {member.process[0] if member.process else None for member in group}
    return all(member.nvls_ranks == nranks for member in group) or (len(hosts) == 1 and None not in hosts)


def is_socket(transport: str) -> bool:
    """Whether a transport is ``NET/Socket``; ``NET/FastSocket`` is another thing."""
    return transport.split("/")[:2] == ["NET", "Socket"]


def channels_in(text: str, *, file: str, line: int) -> Iterator[Channel]:
    """Every channel that a piece of text names, CollNet included."""
    for pattern in (_CHANNEL, _COLLNET):
        for match in pattern.finditer(text):
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
            )


def parse_nccl_log(lines: Iterable[str | bytes], source: str) -> NcclLog:
    """Read one log, as a stream.

    :param lines: text, one line or several per item; or bytes, cut anywhere. NUL bytes, colours, invalid UTF-8,
        CRLF and lines without an end are all met in real logs and do no harm.
    :param source: file name for the evidence; ``-`` for standard input.
    :returns: what was found; nothing found is a value, too.
    """
    reader = _Reader(source)
    for number, line in numbered_lines(lines):
        if _WORTH_READING.search(line):
            reader.read(number, line)
    return reader.result()


def merge(logs: Iterable[NcclLog]) -> NcclLog:
    """Put together the logs of a server's processes; the first log wins where only one value can be kept."""
    parts = list(logs)
    links: dict[tuple[int, int | None, str], Seen] = {}
    networks: Counter[str] = Counter()
    environment: dict[str, tuple[str, LogLine]] = {}
    for part in parts:
        for key, seen in part.links.items():
            links[key] = Seen(links[key].lines + seen.lines, links[key].first) if key in links else seen
        networks.update(part.networks)
        environment = {**part.environment, **environment}
    return NcclLog(
        sources=tuple(source for part in parts for source in part.sources),
        links=links,
        speakers=frozenset().union(*(part.speakers for part in parts)),
        comm_ranks=tuple(member for part in parts for member in part.comm_ranks),
        nvls_lines=tuple(line for part in parts for line in part.nvls_lines),
        networks=dict(networks),
        versions=tuple(dict.fromkeys(version for part in parts for version in part.versions)),
        warnings=tuple(line for part in parts for line in part.warnings)[:_MOST_WARNINGS],
        environment=environment,
        records=sum(part.records for part in parts),
    )


def numbered_lines(lines: Iterable[str | bytes]) -> Iterator[tuple[int, str]]:
    """Lines with their 1-based number, clean of NULs and colours.

    :param lines: text, one line or several per item; or bytes, cut anywhere.
    """
    number = 1
    rest = b""
    for item in lines:
        if isinstance(item, str):
            for line in item.removesuffix("\n").split("\n"):
                yield number, _clean(line)
                number += 1
            continue
        # Holes of a file that several processes write are NULs; a NUL beside each letter is UTF-16.
        *whole, rest = (rest + _NUL_BYTES.sub(b" ", item)).split(b"\n")
        for raw in whole:
            yield number, _clean(raw.decode("utf-8", "replace"))
            number += 1
        while len(rest) > LONGEST_LINE:
            piece, rest = rest[:LONGEST_LINE], rest[LONGEST_LINE:]
            if cut := _last_head(piece):
                piece, rest = piece[:cut], piece[cut:] + rest
            yield number, _clean(piece.decode("utf-8", "replace"))
    if rest:
        yield number, _clean(rest.decode("utf-8", "replace"))


def _last_head(piece: bytes) -> int:
    """Where the last record begins, which may be whole only with what follows; 0 when it is too far back."""
    start = 0
    for head in _HEAD.finditer(piece.decode("latin-1"), LONGEST_LINE // 2):
        start = head.start()
    return start


def _clean(line: str) -> str:
    if "\0" in line:
        line = _NULS.sub(" ", line).replace("\0", "")
    return _ANSI.sub("", line) if "[" in line else line


class _Reader:
    """Aggregates the records of one log."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._links: dict[tuple[int, int | None, str], Seen] = {}
        self._speakers: set[Process] = set()
        self._comm_ranks: list[CommRank] = []
        self._latest: dict[tuple[Process | None, str], int] = {}
        self._nvls_lines: dict[tuple[Process | None, str], LogLine] = {}
        self._networks: Counter[str] = Counter()
        self._versions: dict[str, None] = {}
        self._warnings: dict[str, LogLine] = {}
        self._environment: dict[str, tuple[str, LogLine]] = {}
        self._hosts: set[str] = set()
        self._records = 0

    def read(self, number: int, line: str) -> None:
        """Take in one line; the text in front of its first record may hold a record without a head."""
        for process, text in self._split(line):
            where = LogLine(self._source, number, text.strip()[:_LONGEST_EVIDENCE])
            # A search for a word costs less than a pattern that fails, and most lines hold one kind of record.
            if "via" in text:
                self._read_channels(process, text, where)
            if "comm" in text:
                self._read_communicator(process, text, where)
            if any(word in text for word in ("Using network", "version", "set by environment", "WARN")):
                self._read_context(text, where)

    def result(self) -> NcclLog:
        return NcclLog(
            sources=(self._source,),
            links=self._links,
            speakers=frozenset(self._speakers),
            comm_ranks=tuple(self._comm_ranks),
            nvls_lines=tuple(self._nvls_lines.values()),
            networks=dict(self._networks),
            versions=tuple(self._versions),
            warnings=tuple(self._warnings.values()),
            environment=self._environment,
            records=self._records,
        )

    def _split(self, line: str) -> Iterator[tuple[Process | None, str]]:
        process: Process | None = None
        start = 0
        for head in _HEAD.finditer(line):
            host = self._host(head["host"])
            end = head.end("host") - len(host)
            if line[start:end].strip():
                yield process, line[start:end]
            process, start = (host, int(head["pid"])), end
            self._records += 1
        self._records += process is None and "NCCL" in line
        yield process, line[start:]

    def _host(self, text: str) -> str:
        """The host's name, freed from a torn record that ends where it begins (``via P2P/IPCnode1:80:81``)."""
        if text not in self._hosts:
            known = max((host for host in self._hosts if text.endswith(host)), key=len, default=None)
            if known is not None and not text.removesuffix(known).endswith(("-", ".", "_")):
                return known
            if len(self._hosts) < 4096:
                self._hosts.add(text)
        return text

    def _read_channels(self, process: Process | None, text: str, where: LogLine) -> None:
        for channel in channels_in(text, file=where.file, line=where.line):
            key = (channel.src, channel.dst, channel.transport)
            seen = self._links.get(key)
            self._links[key] = Seen(seen.lines + 1, seen.first) if seen else Seen(1, where)
            if process is not None and channel.dst is not None:
                self._speakers.add(process)

    def _read_communicator(self, process: Process | None, text: str, where: LogLine) -> None:
        for match in _NVLS.finditer(text):
            key = (process, match["comm"])
            self._nvls_lines.setdefault(key, where)
            if key in self._latest:
                at = self._latest[key]
                ranks = int(match["ranks"]) if match["ranks"] else None
                self._comm_ranks[at] = replace(self._comm_ranks[at], nvls=True, nvls_ranks=ranks)
        for match in _COMM.finditer(text):
            self._add_comm_rank(_comm_rank(process, match))

    def _add_comm_rank(self, new: CommRank) -> None:
        at = self._latest.get((new.process, new.comm))
        if at is not None and (merged := _merge_comm_ranks(self._comm_ranks[at], new)):
            self._comm_ranks[at] = merged
            return
        self._latest[new.process, new.comm] = len(self._comm_ranks)
        self._comm_ranks.append(new)

    def _read_context(self, text: str, where: LogLine) -> None:
        for match in _NETWORK_CHOSEN.finditer(text):
            self._networks[match["name"]] += 1
        for match in _VERSION.finditer(text):
            self._versions.setdefault(match["nccl"] or f"RCCL {match['rccl']}")
        for match in _ENVIRONMENT.finditer(text):
            self._environment.setdefault(match["name"], (match["value"].rstrip("."), where))
        for match in _WARN.finditer(text):
            message = match["text"].strip()[:_LONGEST_EVIDENCE]
            if len(self._warnings) < _MOST_WARNINGS:
                self._warnings.setdefault(message, LogLine(where.file, where.line, message))


def _comm_rank(process: Process | None, match: re.Match[str]) -> CommRank:
    fields = dict(_COMM_FIELD.findall(match["rest"]))

    def number(name: str) -> int | None:
        return int(fields[name]) if fields.get(name, "").isdecimal() else None

    return CommRank(
        process=process,
        comm=match["comm"],
        rank=int(match["rank"]),
        nranks=int(match["nranks"]),
        cuda_dev=number("cudaDev"),
        nvml_dev=number("nvmlDev"),
        bus_id=fields.get("busId"),
        comm_id=fields.get("commId"),
        n_nodes=number("nNodes"),
    )


def _merge_comm_ranks(old: CommRank, new: CommRank) -> CommRank | None:
    """Both lines as one; ``None`` when they contradict each other: the address was used again."""
    facts: dict[str, int | str | None] = {}
    for name in ("rank", "nranks", "cuda_dev", "nvml_dev", "bus_id", "comm_id", "n_nodes"):
        before, after = getattr(old, name), getattr(new, name)
        if before is not None and after is not None and before != after:
            return None
        facts[name] = after if before is None else before
    return replace(old, **facts)  # type: ignore[arg-type]
