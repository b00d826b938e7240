"""A slow or missing transport that is to be explained: all that is known, and the questions that several rules ask.

Leaves the rules to :mod:`~pytest_gpulayout.causes` and its neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pytest_gpulayout.layout import Layout
from pytest_gpulayout.links import LinkClass
from pytest_gpulayout.nccl_log import CommRank, LogLine, NcclLog, is_socket
from pytest_gpulayout.surroundings import RankSurroundings, Surroundings
from pytest_gpulayout.topology import Device, Topology


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to act on, with its evidence; ``file``, ``line`` and ``text`` are ``None`` for an absence.

    :param file: a log, or a source by name, such as ``"/proc/4242/environ of rank 0"``; the latter has no line.
    """

    cause: str
    file: str | None
    line: int | None
    text: str | None
    advice: str


@dataclass(frozen=True, slots=True)
class SlowUse:
    """Two ranks that talk over shared memory or a socket, or that must talk and were not seen to.

    :param transport: the text after ``via``; ``None`` where no channel connects them.
    :param first: the first line that says so.
    :param hosts: names of both hosts, where the caller knows better than the log's communicators tell.
    """

    src: int
    dst: int
    transport: str | None
    first: LogLine | None = None
    hosts: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """Everything that is known, and the questions that several rules ask."""

    log: NcclLog
    slow: tuple[SlowUse, ...]
    layout: Layout | None
    surroundings: Surroundings
    topology: Topology | None
    placement: Sequence[int]
    server_lines: tuple[LogLine, ...]

    @property
    def is_troubled(self) -> bool:
        """Whether there is anything to explain; a log without any connection is a failed start."""
        if self.layout is not None and not self.layout.communicating_pairs():
            return bool(self.slow)
        return bool(self.slow) or not (self.log.links or self.log.nvls_lines)

    @property
    def unconnected(self) -> tuple[SlowUse, ...]:
        """Ranks that no channel connects; what NCCL chose is unknown, so only what stops it explains them."""
        return tuple(use for use in self.slow if use.transport is None)

    @property
    def local(self) -> tuple[SlowUse, ...]:
        """Slow transports that can be between processes of one host, where NCCL tries P2P and SHM first."""
        return tuple(use for use in self.slow if use.transport is not None and not self.crosses_hosts(use))

    @property
    def between_hosts(self) -> tuple[SlowUse, ...]:
        """Sockets where a network card could serve; not those of ranks that share a host, or should by the layout."""
        return tuple(
            use
            for use in self.slow
            if use.transport is not None
            and is_socket(use.transport)
            and (self.crosses_hosts(use) or (None in self.hosts(use) and not self._is_for_one_host))
            and not self.ranks_here(use)
        )

    @property
    def _is_for_one_host(self) -> bool:
        return self.layout is not None and self.layout.nodes == 1

    def hosts(self, use: SlowUse) -> tuple[str | None, str | None]:
        """Host names of both ranks as the heads of their lines give them; ``None`` where they do not settle it."""
        if use.hosts is not None:
            return use.hosts
        link = (use.src, use.dst, use.transport or "")
        of_link = [m for comm in self.log.communicators if link in comm.links for m in comm.members]
        members = of_link or self.log.comm_ranks
        return _host(members, use.src), _host(members, use.dst)

    def crosses_hosts(self, use: SlowUse) -> bool:
        """Whether the ranks have different host names."""
        a, b = self.hosts(use)
        return a is not None and b is not None and a != b

    def ranks_here(self, use: SlowUse) -> tuple[RankSurroundings, RankSurroundings] | None:
        """Surroundings of both ranks, when both run on this machine."""
        a, b = self.surroundings.ranks.get(use.src), self.surroundings.ranks.get(use.dst)
        return (a, b) if a is not None and b is not None else None

    def devices(self, use: SlowUse) -> tuple[Device, Device] | None:
        """Devices of both ranks; ``None`` where the topology of this machine does not settle it."""
        if self.topology is None or max(use.src, use.dst) >= len(self.placement):
            return None
        by_index = {device.index: device for device in self.topology.devices}
        a, b = by_index.get(self.placement[use.src]), by_index.get(self.placement[use.dst])
        return (a, b) if a is not None and b is not None and a != b else None

    def link(self, use: SlowUse) -> LinkClass | None:
        """Link between the devices of both ranks."""
        devices = self.devices(use)
        return self.topology.link(devices[0].index, devices[1].index) if devices and self.topology else None

    @property
    def topology_source(self) -> str:
        """Where facts about devices come from, for the evidence."""
        return self.topology.source if self.topology else "no topology"

    def line(self, pattern: str) -> LogLine | None:
        """The first line of NCCL that says it, warnings before remarks."""
        return _first((*self.log.warnings, *(remark.line for remark in self.log.remarks)), pattern)

    def server_line(self, pattern: str) -> LogLine | None:
        """The first line of the server that says it; prompts can stand in there, so ask for nothing of NCCL's."""
        return _first(self.server_lines, pattern)


def _host(members: Iterable[CommRank], rank: int) -> str | None:
    names = {member.host for member in members if member.rank == rank}
    return names.pop() if len(names) == 1 else None


def _first(lines: Iterable[LogLine], pattern: str) -> LogLine | None:
    found = re.compile(pattern)
    return next((line for line in lines if found.search(line.text)), None)


def at(cause: str, where: LogLine, advice: str) -> Finding:
    """A finding whose evidence is a line; line 0 stands for a source that has no lines."""
    return Finding(cause, where.file, where.line or None, where.text, advice)


def and_more(pairs: Iterable[tuple[int, int]]) -> str:
    """``" and 2 more pairs"`` for what a sentence about the first pair leaves out."""
    more = len({(min(pair), max(pair)) for pair in pairs}) - 1
    return f" and {more} more pair{'s' * (more > 1)}" if more > 0 else ""
