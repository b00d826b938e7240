"""What NCCL's own log says: which rank reaches which, over what, and the lines that explain why.

Turns the text of ``NCCL_DEBUG=INFO`` (NVIDIA's NCCL 2.3 to 2.30, and AMD's RCCL) into facts, each with the line it
came from. What the facts mean for a layout is left to :mod:`~pytest_gpulayout.transport`; opening files to the
callers; the words of single records to :mod:`~pytest_gpulayout.nccl_records`.

A record is ``HOST:PID:TID [CUDADEV] NCCL INFO text`` or ``.. FILE:LINE NCCL WARN text``, but launchers, terminals and
several writers on one stream put things before, between and after records. So records are searched anywhere in a
line, several per line, and a channel that a line's end has broken in two is put together again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from pytest_gpulayout.nccl_communicators import (
    CommShare,
    Communicator,
    Link,
    ProcessComms,
    Seen,
    Tally,
    edges_of,
    join_shares,
    merge_links,
)
from pytest_gpulayout.nccl_lines import Block, LogLine, blocks, interesting_lines, line_text, numbered_lines
from pytest_gpulayout.nccl_records import (
    Channel,
    CommRank,
    Process,
    Remark,
    RemarkKind,
    TreeNode,
    all_direct_p2p,
    channels_in,
    comm_record,
    is_shm,
    is_socket,
    is_torn,
    matches,
    nvls_records,
    remark_kind,
    ring_in,
    tree_rank,
)

__all__ = [
    "Channel",
    "CommRank",
    "CommShare",
    "Communicator",
    "LogLine",
    "NcclLog",
    "Process",
    "Remark",
    "RemarkKind",
    "Seen",
    "TreeNode",
    "channels_in",
    "is_shm",
    "is_socket",
    "is_torn",
    "merge",
    "numbered_lines",
    "parse_nccl_log",
]

_LONGEST_EVIDENCE = 400
_MOST_WARNINGS = 200
_MOST_REMARKS = 50
_MOST_HOSTS = 4096

_HEAD = re.compile(
    r"(?<![\w.-])(?P<host>[A-Za-z0-9][\w.-]{0,252}+):(?P<pid>\d{1,10}):(?P<thread>\d{1,10}) \[-?\d+\]"
    r"(?: \S+:\d+(?: \([^()\s]*\))?)? NCCL (?P<level>[A-Z]+)"
)
# Names of NCCL's own plugins are one word, whatever was put behind them; others may be several.
_NETWORK_CHOSEN = re.compile(
    r"Using network (?P<name>(?:Socket|IB|IBext(?:_v\d+)?)(?![\w.+-])|\w[\w.+-]*(?: \w[\w.+-]*)*)"
)
# Without a head only with the toolkit's version behind it, which all real ones have.
_VERSION = re.compile(
    r"\b(?:NCCL version (?P<nccl>\d{1,4}(?:\.\d{1,4}){1,4}(?:(?!NCCL)[\w-]){0,40}\+cuda\d{1,4}(?:\.\d{1,4}){0,3})"
    r"|RCCL version ?:? ?(?P<rccl>\d{1,4}\.\d{1,4}[\w.]{0,40}\+[\w.:+-]{0,80})"
    r"|(?<=NCCL INFO )(?:(?P<amd>R)|N)CCL version ?:? ?(?P<short>\d{1,4}\.\d{1,4}[\w.:+-]{0,80}))"
)
_CONTEXT = re.compile(r"Using network|CCL version|set by environment|NCCL WARN")
_WARN = re.compile(r"NCCL WARN\s+(?P<text>\S.*)")
_ENVIRONMENT = re.compile(r"(?P<name>NCCL_[A-Z0-9_]{1,80}+) set by environment to (?P<value>\S+)")
_CHANNEL_WORD = re.compile(rb"Channel|Ring|Coll")
_UNBROKEN_CHANNEL = re.compile(
    rb"(?:(?!NCCL)[^>\n]){0,100}?(?<![\w.-])(?P<process>[A-Za-z0-9][\w.-]*+:\d{1,10}):(?P<thread>\d{1,10}) "
    rb"\[-?\d+\] NCCL INFO (?:Channel|Ring) \d{1,6}"
    rb"(?P<channel>(?:/\d{1,6})? : \d{1,9}(?:\[[0-9a-f]+\])? -> \d{1,9}(?:\[[0-9a-f]+\])? "
    rb"(?:\[(?:send|receive)\] )?via (?:P2P|SHM|NET)/[\w/() .-]*)\r?"
)


@dataclass(frozen=True, slots=True)
class NcclLog:
    """Everything the logs of one server say, aggregated; the size depends on ranks, not on lines.

    :param links: (src, dst, transport) to the channel lines that say so; ``dst`` is ``None`` for CollNet. Ranks are
        those of their communicator: ``communicators`` tells them apart.
    :param speakers: processes that logged a channel.
    :param comm_ranks: ranks with an init line, in order of appearance.
    :param shares: what each process says about each communicator; ``communicators`` is made of them.
    :param networks: what ``Using network`` names, with its number of lines, in order of appearance.
    :param versions: as logged, ``RCCL ...`` for AMD's library, in order of appearance.
    :param warnings: ``NCCL WARN`` lines with different texts, at most 200.
    :param environment: NCCL variables that were set, with the first line that shows each.
    :param remarks: lines that explain NCCL's choices, at most 50 different ones of each kind.
    :param records: lines that were read; 0 means that these are not NCCL logs.
    """

    sources: tuple[str, ...] = ()
    links: Mapping[Link, Seen] = field(default_factory=dict)
    speakers: frozenset[Process] = frozenset()
    comm_ranks: tuple[CommRank, ...] = ()
    nvls_lines: tuple[LogLine, ...] = ()
    networks: Mapping[str, int] = field(default_factory=dict)
    versions: tuple[str, ...] = ()
    warnings: tuple[LogLine, ...] = ()
    environment: Mapping[str, tuple[str, LogLine]] = field(default_factory=dict)
    records: int = 0
    shares: tuple[CommShare, ...] = ()
    communicators: tuple[Communicator, ...] = ()
    remarks: tuple[Remark, ...] = ()

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
        return edges_of(self.links)

    @property
    def socket_lines(self) -> tuple[LogLine, ...]:
        """First line of each rank pair that goes over ``NET/Socket``."""
        return tuple(seen.first for key, seen in self.links.items() if is_socket(key[2]))

    @property
    def torn_lines(self) -> tuple[LogLine, ...]:
        """First line of each rank pair whose transport breaks off where it could still become ``NET/Socket``."""
        return tuple(seen.first for key, seen in self.links.items() if is_torn(key[2]))

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

    @property
    def errors(self) -> tuple[LogLine, ...]:
        """Lines such as ``misc/socket.cc:537 -> 2``, by which NCCL passes an error on."""
        return self.lines_of(RemarkKind.ERROR)

    def lines_of(self, kind: RemarkKind) -> tuple[LogLine, ...]:
        """Remarks of one kind."""
        return tuple(remark.line for remark in self.remarks if remark.kind is kind)

    def nvls_communicators(self) -> tuple[tuple[CommRank, ...], ...]:
        """Communicators of one node where every rank made its NVLS buffers: evidence without a channel line."""
        return tuple(communicator.members for communicator in self.communicators if communicator.nvls)


def parse_nccl_log(lines: Iterable[str | bytes], source: str) -> NcclLog:
    """Read one log, as a stream.

    :param lines: text, one line or several per item; or bytes, cut anywhere. NUL bytes, colours, invalid UTF-8,
        CRLF and lines without an end are all met in real logs and do no harm. Pieces of some 100 kB are read fastest.
    :param source: file name for the evidence; ``-`` for standard input.
    :returns: what was found; nothing found is a value, too.
    """
    reader = _Reader(source)
    for block in blocks(lines):
        reader.read(block)
    return reader.result()


def merge(logs: Iterable[NcclLog]) -> NcclLog:
    """Put together the logs of a server's processes; the first log wins where only one value can be kept."""
    parts = list(logs)
    networks: Counter[str] = Counter()
    environment: dict[str, tuple[str, LogLine]] = {}
    for part in parts:
        networks.update(part.networks)
        environment = {**part.environment, **environment}
    shares = tuple(share for part in parts for share in part.shares)
    return NcclLog(
        sources=tuple(source for part in parts for source in part.sources),
        links=merge_links(part.links for part in parts),
        speakers=frozenset().union(*(part.speakers for part in parts)),
        comm_ranks=tuple(member for part in parts for member in part.comm_ranks),
        nvls_lines=tuple(line for part in parts for line in part.nvls_lines),
        networks=dict(networks),
        versions=tuple(dict.fromkeys(version for part in parts for version in part.versions)),
        warnings=tuple(line for part in parts for line in part.warnings)[:_MOST_WARNINGS],
        environment=environment,
        records=sum(part.records for part in parts),
        shares=shares,
        communicators=join_shares(shares),
        remarks=_limited(remark for part in parts for remark in part.remarks),
    )


def _limited(remarks: Iterable[Remark]) -> tuple[Remark, ...]:
    counts: Counter[RemarkKind] = Counter()
    kept = []
    for remark in remarks:
        counts[remark.kind] += 1
        if counts[remark.kind] <= _MOST_REMARKS:
            kept.append(remark)
    return tuple(kept)


class _Record(NamedTuple):
    """A piece of a line: one record, or text without a head.

    :param level: ``INFO``, ``WARN``; empty without a head. :param message: without the head. :param text: with it.
    """

    process: Process | None
    thread: int | None
    level: str
    message: str
    text: str


class _Reader:
    """Aggregates the records of one log."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._processes: dict[Process | None, ProcessComms] = {}
        # Lines of one process that differ in the channel's number only, until its next line about a rank.
        self._known: dict[bytes, dict[tuple[bytes, bytes], Tally]] = {}
        self._nvls_lines: dict[tuple[Process | None, str], LogLine] = {}
        self._networks: Counter[str] = Counter()
        self._versions: dict[str, None] = {}
        self._warnings: dict[str, LogLine] = {}
        self._environment: dict[str, tuple[str, LogLine]] = {}
        self._remarks: dict[tuple[RemarkKind, str], LogLine] = {}
        self._remark_counts: Counter[RemarkKind] = Counter()
        self._hosts: set[str] = set()
        self._names: dict[bytes, Process] = {}
        self._records = 0
        self._is_nccl = False

    def read(self, block: Block) -> None:
        """Take in the lines of a block that are worth it."""
        data = block.data
        self._is_nccl = self._is_nccl or b"NCCL" in data
        match_channel = _UNBROKEN_CHANNEL.fullmatch
        for start, end in interesting_lines(block):
            match = match_channel(data, start, end) if data.find(b" via ", start, end) > 0 else None
            process = match["process"] if match else None
            if match is None or process not in self._names:
                self._read_line(block, start, end)
                continue
            key = (match["thread"], match["channel"])
            known = self._known.setdefault(process, {})
            tally = known.get(key)
            if tally is None:
                tally = known[key] = self._new_tally(block, match)
            tally.lines += 1
            self._records += 1

    def result(self) -> NcclLog:
        shares = tuple(share for process in self._processes.values() for share in process.result())
        links = merge_links(share.links for share in shares)
        return NcclLog(
            sources=(self._source,),
            links=dict(sorted(links.items(), key=lambda item: item[1].first.line)),
            speakers=frozenset(
                share.process
                for share in shares
                if share.process and any(dst is not None for _, dst, _ in share.links)
            ),
            comm_ranks=tuple(share.rank for share in shares if share.rank),
            nvls_lines=tuple(self._nvls_lines.values()),
            networks=dict(self._networks),
            versions=tuple(self._versions),
            warnings=tuple(self._warnings.values()),
            environment=self._environment,
            records=self._records or int(self._is_nccl),
            shares=shares,
            communicators=join_shares(shares),
            remarks=tuple(Remark(kind, line) for (kind, _), line in self._remarks.items()),
        )

    def _new_tally(self, block: Block, match: re.Match[bytes]) -> Tally:
        """Where channel lines like this one are counted; what the pattern lets through is one channel."""
        number = block.number_at(match.start())
        text = line_text(block.data[match.start("process") : match.end()]).strip()
        where = LogLine(self._source, number, text[:_LONGEST_EVIDENCE])
        channel = next(channels_in("Channel 0" + line_text(match["channel"]), file=where.file, line=number))
        return self._comms_of(self._names[match["process"]]).tally(channel, int(match["thread"]), where)

    def _read_line(self, block: Block, start: int, end: int) -> list[Tally]:
        line = line_text(block.data[start:end])
        number = block.number_at(start)
        tallies: list[Tally] = []
        for record in self._split(line):
            where = LogLine(self._source, number, record.text.strip()[:_LONGEST_EVIDENCE])
            self._records += record.process is not None
            if record.level == "WARN":
                self._add_warning(record.message, where)
                continue
            # A search for a word costs less than a pattern that fails, and most lines hold one kind of record.
            if "via" in record.message:
                tallies += self._read_channels(record, where)
            elif record.process is not None:
                self._read_graph(record, where)
            if "comm " in record.message:
                self._read_communicator(record, where)
            if _CONTEXT.search(record.text):
                self._read_context(record, where)
        if not tallies and "via" in line:
            tallies += self._read_broken_channel(block, start, end)
        return tallies

    def _split(self, line: str) -> Iterator[_Record]:
        only = _HEAD.match(line)
        # Nearly all lines are one record from their beginning on.
        heads = (only,) if only and line.find("NCCL ", only.end()) < 0 else _HEAD.finditer(line)
        process: Process | None = None
        thread: int | None = None
        level = ""
        start = message = 0
        for head in heads:
            host = self._host(head["host"])
            end = head.end("host") - len(host)
            if line[start:end].strip():
                yield _Record(process, thread, level, line[message:end], line[start:end])
            process, thread, level = (host, int(head["pid"])), int(head["thread"]), head["level"]
            start, message = end, head.end()
        yield _Record(process, thread, level, line[message:], line[start:])

    def _host(self, text: str) -> str:
        """The host's name, freed from a torn record that ends where it begins (``via P2P/IPCnode1:80:81``)."""
        if text not in self._hosts:
            ends = (text[at:] for at in range(1, len(text)))
            known = next((end for end in ends if end in self._hosts), None)
            if known is not None and not text.removesuffix(known).endswith(("-", ".", "_")):
                return known
            if len(self._hosts) < _MOST_HOSTS:
                self._hosts.add(text)
        return text

    def _comms_of(self, process: Process | None) -> ProcessComms:
        if process not in self._processes:
            self._processes[process] = ProcessComms(process)
            if process is not None:
                self._names[_name(process)] = process
        return self._processes[process]

    def _read_channels(self, record: _Record, where: LogLine) -> Iterator[Tally]:
        for channel in channels_in(record.message, file=where.file, line=where.line, quoted=record.process is None):
            tally = self._comms_of(record.process).tally(channel, record.thread, where)
            tally.lines += 1
            yield tally

    def _read_broken_channel(self, block: Block, start: int, end: int) -> Iterator[Tally]:
        """A line's end stands in a channel's middle: it goes on in the next line, or began in the one before."""
        number = block.number_at(start)
        before, line, after = block.line_before(start), block.data[start:end], block.line_after(end)
        for first, second, at in ((line, after, number), (before, line, number - 1)):
            if not _CHANNEL_WORD.search(first):
                continue
            *_, record = self._split(line_text(first).rstrip())
            rest = next(self._split(line_text(second).strip()))
            is_whole = next(channels_in(record.message, file="", line=0), None) is not None
            if is_whole or rest.process is not None or record.level == "WARN":
                continue
            where = LogLine(self._source, at, f"{record.text.strip()} {rest.text}"[:_LONGEST_EVIDENCE])
            for joint in (" ", ""):
                tallies = list(
                    self._read_channels(record._replace(message=record.message + joint + rest.message), where)
                )
                yield from tallies
                if tallies:
                    return

    def _read_graph(self, record: _Record, where: LogLine) -> None:
        """Rings, trees, and what explains choices; text without a head holds none of it."""
        message = record.message.lstrip()
        comms = self._comms_of(record.process)
        if ring := ring_in(message):
            comms.add_ring(*ring, record.thread)
        elif (rank := tree_rank(message)) is not None:
            comms.add_trees(message, rank, record.thread)
        kind = remark_kind(message)
        if kind is None:
            return
        if kind is RemarkKind.CONNECTED:
            comms.set_connected(record.thread)
        elif kind is RemarkKind.P2P_CHECK and (answer := all_direct_p2p(message)) is not None:
            comms.set_direct_p2p(all_direct=answer, thread=record.thread)
        key = (kind, message)
        if key not in self._remarks and self._remark_counts[kind] < _MOST_REMARKS:
            self._remark_counts[kind] += 1
            self._remarks[key] = where

    def _read_communicator(self, record: _Record, where: LogLine) -> None:
        comms = self._comms_of(record.process)
        headless = record.process is None
        for made in nvls_records(record.message, quoted=headless):
            self._nvls_lines.setdefault((record.process, made.comm), where)
            comms.add_nvls(made)
        found = comm_record(record.message, record.process, quoted=headless)
        if found is not None:
            comms.add_rank(found, record.thread)
            if record.process is not None:
                self._known.pop(_name(record.process), None)

    def _read_context(self, record: _Record, where: LogLine) -> None:
        headless = record.process is None
        for match in matches(_NETWORK_CHOSEN, record.message, quoted=headless):
            self._networks[match["name"]] += 1
        for match in _VERSION.finditer(record.text):
            amd = "RCCL " if match["rccl"] or match["amd"] else ""
            self._versions.setdefault(amd + (match["nccl"] or match["rccl"] or match["short"]))
        for match in matches(_ENVIRONMENT, record.message, quoted=headless):
            self._environment.setdefault(match["name"], (match["value"].rstrip("."), where))
        if headless and (warning := _WARN.search(record.message)):
            self._add_warning(warning["text"], where)

    def _add_warning(self, message: str, where: LogLine) -> None:
        text = message.strip()[:_LONGEST_EVIDENCE]
        if text and len(self._warnings) < _MOST_WARNINGS:
            self._warnings.setdefault(text, LogLine(where.file, where.line, text))


def _name(process: Process) -> bytes:
    return f"{process[0]}:{process[1]}".encode()
