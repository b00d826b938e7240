"""Which communicator a channel belongs to, and which ranks of which processes make up a communicator.

A process has several communicators (tensor, pipeline, data and expert parallel groups, the world), whose rank
numbers overlap; RCCL's channel lines name theirs, NVIDIA's do not. What decides, in this order:

1. the address that the line names (RCCL);
2. an init that goes on in the same thread: connections are made between ``Init START`` and ``Init COMPLETE``;
3. the rank that logged the line and the highest rank in it: they must fit the communicator. Of several that fit, one
   that was initialised in the same thread, then the most recent one: since 2.22 connections are made by the first
   collective, and vLLM runs one as soon as it has made a group;
4. before 2.14 there is no ``Init START``: what a thread logs belongs to the communicator whose ``Init COMPLETE``
   follows.

What none of these decides stays in a communicator without a key. Ranks of several processes belong together by
``commId`` (2.14 and later). Older logs do not say; there, ranks that complement each other are put together in the
order in which launchers number processes, which can be wrong among communicators of one size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pytest_gpulayout.nccl_lines import LogLine
from pytest_gpulayout.nccl_records import (
    Channel,
    CommRank,
    CommRecord,
    NvlsRecord,
    Process,
    Stage,
    TreeNode,
    tree_rank,
    trees_in,
)

Link = tuple[int, int | None, str]
"""(src, dst, transport); ``dst`` is ``None`` for CollNet."""


@dataclass(frozen=True, slots=True)
class Seen:
    """How many channel lines said it, and the first of them."""

    lines: int
    first: LogLine


@dataclass(frozen=True, slots=True)
class CommShare:
    """What one process says about one communicator.

    :param rank: ``None`` for channels that could not be attributed.
    :param trees: its ``Trees`` record, as logged.
    :param connected: an algorithm was connected: by a channel line, ``Connected all ..`` or NVLS.
    :param complete: ``Init COMPLETE`` was logged.
    """

    process: Process | None
    rank: CommRank | None
    links: Mapping[Link, Seen] = field(default_factory=dict)
    rings: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    trees: str | None = None
    connected: bool = False
    complete: bool = False


@dataclass(frozen=True, slots=True)
class Communicator:
    """One communicator, put together from what its ranks say.

    :param key: ``commId``, else process and address of its first rank; ``None`` for channels of unknown ones.
    :param members: ranks with an init line, in order of the ranks.
    :param links: (src, dst, transport) to the channel lines that say so.
    :param rings: channel to the order of ranks; 2.15 and earlier cut it after some 20 ranks.
    :param tree_records: ``Trees`` records of its ranks, as logged; ``trees`` is what they say.
    :param connected_ranks: ranks with a channel line of their own, ``Connected all ..`` or NVLS buffers.
    :param complete_ranks: ranks with ``Init COMPLETE``.
    """

    key: str | None
    nranks: int | None
    members: tuple[CommRank, ...] = ()
    links: Mapping[Link, Seen] = field(default_factory=dict)
    rings: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    tree_records: tuple[str, ...] = ()
    connected_ranks: frozenset[int] = frozenset()
    complete_ranks: frozenset[int] = frozenset()
    processes: frozenset[Process] = frozenset()

    @property
    def edges(self) -> dict[tuple[int, int], dict[str, int]]:
        """Channel lines per transport for each (src, dst)."""
        return edges_of(self.links)

    @property
    def trees(self) -> dict[tuple[int, int], TreeNode]:
        """(channel, rank) to that rank's parent and children."""
        nodes = (item for record in self.tree_records for item in trees_in(record).items())
        return {(channel, node.rank): node for channel, node in nodes}

    @property
    def ranks(self) -> frozenset[int]:
        """Ranks with an init line."""
        return frozenset(member.rank for member in self.members)

    @property
    def connected(self) -> bool:
        """Whether every rank that is known has set up connections."""
        return bool(self.members) and self.ranks <= self.connected_ranks

    @property
    def complete(self) -> bool:
        """Whether every rank that is known has finished its init."""
        return bool(self.members) and self.ranks <= self.complete_ranks

    @property
    def nvls(self) -> bool:
        """Whether all its ranks are known, on one node, and have made NVLS buffers: proof without a channel line."""
        nranks = self.nranks or 0
        if nranks < 2 or len(self.members) != nranks or len(self.ranks) != nranks or max(self.ranks) >= nranks:
            return False
        if not all(member.nvls for member in self.members):
            return False
        if nodes := {member.n_nodes for member in self.members if member.n_nodes is not None}:
            return nodes == {1}
        hosts = {member.host for member in self.members}
        return all(member.nvls_ranks == nranks for member in self.members) or (len(hosts) == 1 and None not in hosts)


def edges_of(links: Mapping[Link, Seen]) -> dict[tuple[int, int], dict[str, int]]:
    """Channel lines per transport for each (src, dst)."""
    edges: dict[tuple[int, int], dict[str, int]] = {}
    for (src, dst, transport), seen in links.items():
        if dst is not None:
            edges.setdefault((src, dst), {})[transport] = seen.lines
    return edges


def merge_links(parts: Iterable[Mapping[Link, Seen]]) -> dict[Link, Seen]:
    """Lines added up; the first part's evidence wins, and within one file the first line."""
    links: dict[Link, Seen] = {}
    for part in parts:
        for key, seen in part.items():
            old = links.get(key)
            links[key] = seen if old is None else Seen(old.lines + seen.lines, _earlier(old.first, seen.first))
    return links


def _earlier(one: LogLine, other: LogLine) -> LogLine:
    return other if other.file == one.file and other.line < one.line else one


# -- ranks of one communicator ---------------------------------------------------------------------------------------


def join_shares(shares: Iterable[CommShare]) -> tuple[Communicator, ...]:
    """Put together what the processes say, communicators in order of their first share."""
    groups: dict[object, list[CommShare]] = {}
    unnamed: list[CommShare] = []
    for share in shares:
        if share.rank is None:
            groups.setdefault(None, []).append(share)
        elif share.rank.comm_id is not None:
            groups.setdefault((share.rank.comm_id, share.rank.nranks), []).append(share)
        else:
            unnamed.append(share)
    for number, group in enumerate(_complements(unnamed)):
        groups[number] = group
    return tuple(_join(group) for group in groups.values())


def _join(group: Sequence[CommShare]) -> Communicator:
    members: dict[tuple[int, Process | None], CommRank] = {}
    rings: dict[int, tuple[int, ...]] = {}
    for share in group:
        if share.rank is not None:
            members.setdefault((share.rank.rank, share.process), share.rank)
        rings.update(share.rings)
    first = group[0].rank
    return Communicator(
        key=_key(first) if first else None,
        nranks=first.nranks if first else None,
        members=tuple(sorted(members.values(), key=lambda member: member.rank)),
        links=merge_links(share.links for share in group),
        rings=rings,
        tree_records=tuple(share.trees for share in group if share.trees),
        connected_ranks=frozenset(share.rank.rank for share in group if share.rank and share.connected),
        complete_ranks=frozenset(share.rank.rank for share in group if share.rank and share.complete),
        processes=frozenset(share.process for share in group if share.process),
    )


def _key(rank: CommRank) -> str:
    if rank.comm_id is not None:
        return rank.comm_id
    return f"{rank.process[0]}:{rank.process[1]} {rank.comm}" if rank.process else rank.comm


def _complements(shares: Sequence[CommShare]) -> Iterator[list[CommShare]]:
    """Groups of ranks without an identity, the n-th that each process made of its size.

    Of several such groups each takes the next rank that it lacks, hosts and devices in order.
    """
    made: Counter[tuple[Process | None, int | None, int]] = Counter()
    rounds: dict[tuple[int, int], list[tuple[CommRank, CommShare]]] = {}
    for share in shares:
        if (rank := share.rank) is not None:
            # A process with several GPUs has several ranks of one communicator.
            maker = (rank.process, rank.cuda_dev, rank.nranks)
            rounds.setdefault((rank.nranks, made[maker]), []).append((rank, share))
            made[maker] += rank.process is not None
    for members in rounds.values():
        groups: list[dict[int, CommShare]] = []
        for rank, share in sorted(members, key=lambda member: _place(member[0])):
            lacking = next((group for group in groups if rank.rank not in group), None)
            if lacking is None:
                groups.append({rank.rank: share})
            else:
                lacking[rank.rank] = share
        yield from (list(group.values()) for group in groups)


def _place(rank: CommRank) -> tuple[str, int, int]:
    host, pid = rank.process or ("", 0)
    device = rank.cuda_dev if rank.nvml_dev is None else rank.nvml_dev
    return host, device or 0, pid


# -- channels of one process -----------------------------------------------------------------------------------------


class Tally:
    """Counts lines that say the same."""

    __slots__ = ("first", "lines")

    def __init__(self, first: LogLine) -> None:
        self.first = first
        self.lines = 0


class _Open:
    """A share that still grows. :param thread: that initialised it."""

    __slots__ = ("complete", "connected", "links", "rank", "rings", "thread", "trees")

    def __init__(self, rank: CommRank | None, thread: int | None) -> None:
        self.rank = rank
        self.thread = thread
        self.links: dict[Link, Tally] = {}
        self.rings: dict[int, tuple[int, ...]] = {}
        self.trees: str | None = None
        self.connected = False
        self.complete = False

    def has_room_for(self, rank: int, highest: int) -> bool:
        """Whether the line of a rank that names others up to ``highest`` can be of this communicator."""
        return self.rank is not None and self.rank.rank == rank and highest < self.rank.nranks

    def frozen(self, process: Process | None) -> CommShare:
        links = {key: Seen(tally.lines, tally.first) for key, tally in self.links.items()}
        connected = self.connected or bool(links) or bool(self.rank and self.rank.nvls)
        return CommShare(process, self.rank, links, self.rings, self.trees, connected, self.complete)


class ProcessComms:
    """The communicators of one process, while its log is read.

    Lines must come in the order in which they were logged.
    """

    def __init__(self, process: Process | None) -> None:
        self._process = process
        self._shares: list[_Open] = []
        self._latest: dict[str, _Open] = {}
        self._starting: dict[int | None, _Open] = {}
        self._waiting: dict[tuple[int | None, str | None], _Open] = {}
        self._logs_starts = False

    def add_rank(self, record: CommRecord, thread: int | None) -> None:
        """Take in a line about a rank of a communicator."""
        rank = self._with_split_id(record)
        share = self._share_of(rank, record.stage, thread)
        # Versions that write one of these write "Init START", too (2.18 and later).
        self._logs_starts |= record.stage in (Stage.START, Stage.KNOWN)
        self._logs_starts |= rank.comm_id is not None and rank.nvml_dev is not None
        if record.stage in (Stage.START, Stage.KNOWN) and not share.complete:
            self._starting[thread] = share
        if record.stage is Stage.COMPLETE:
            share.complete = True
            share.thread = thread
            if self._starting.get(thread) is share:
                del self._starting[thread]
            self._adopt(share, (thread, None))
        self._adopt(share, (None, rank.comm))

    def add_nvls(self, record: NvlsRecord) -> None:
        """Take in that a rank has made its NVLS buffers."""
        share = self._latest.get(record.comm)
        if share is not None and share.rank is not None:
            share.rank = replace(share.rank, nvls=True, nvls_ranks=record.nvls_ranks)

    def tally(self, channel: Channel, thread: int | None, first: LogLine) -> Tally:
        """Where lines like this one are counted, until the next line about a rank."""
        highest = max(channel.src, channel.dst or 0)
        share = self._find(
            thread,
            lambda share: share.has_room_for(channel.rank, highest),
            comm=channel.comm,
            late=channel.connection == 1,
        )
        key = (channel.src, channel.dst, channel.transport)
        return share.links.setdefault(key, Tally(first))

    def add_ring(self, channel: int, order: tuple[int, ...], thread: int | None) -> None:
        """Take in the order of ranks in a channel, which rank 0 logs."""
        self._find(thread, lambda share: share.has_room_for(0, max(order))).rings[channel] = order

    def add_trees(self, record: str, rank: int, thread: int | None) -> None:
        """Take in a rank's place in the trees."""
        self._find(thread, lambda share: share.has_room_for(rank, rank)).trees = record

    def set_connected(self, thread: int | None) -> None:
        """Take in ``Connected all ..``."""
        self._find(thread, lambda _: True).connected = True

    def set_direct_p2p(self, *, all_direct: bool, thread: int | None) -> None:
        """Take in ``Check P2P Type``, which is logged during init."""
        share = self._starting.get(thread)
        if share is not None and share.rank is not None:
            share.rank = replace(share.rank, all_direct_p2p=all_direct)

    def result(self) -> list[CommShare]:
        """What was said about each communicator; lines that fit none come last."""
        newest_first = self._shares[::-1]
        for (thread, _), waiting in self._waiting.items():
            if waiting.rings or waiting.trees:
                continue  # the init of another communicator, whose end is missing
            for share in sorted(newest_first, key=lambda share: share.thread != thread):
                _move(waiting, share)
        left = [waiting for waiting in self._waiting.values() if waiting.links]
        return [share.frozen(self._process) for share in [*self._shares, *left]]

    def _with_split_id(self, record: CommRecord) -> CommRank:
        """A communicator that was split off logs its parent in place of a ``commId``."""
        if record.rank.comm_id is not None or record.split is None:
            return record.rank
        address, number, color = record.split
        parent = self._latest.get(address)
        if parent is None or parent.rank is None or parent.rank.comm_id is None:
            return record.rank
        return replace(record.rank, comm_id=f"{parent.rank.comm_id}/{number}/{color}")

    def _share_of(self, rank: CommRank, stage: Stage, thread: int | None) -> _Open:
        share = self._latest.get(rank.comm)
        if share is not None and share.rank is not None and not (stage is Stage.START and share.complete):
            merged = _merge_ranks(share.rank, rank)
            if merged is not None:
                share.rank = merged
                return share
        new = self._latest[rank.comm] = _Open(rank, thread)
        self._shares.append(new)
        return new

    def _find(
        self, thread: int | None, fits: Callable[[_Open], bool], *, comm: str | None = None, late: bool = False
    ) -> _Open:
        """The share that a line belongs to, or one that waits until that is known."""
        if comm is not None:
            return self._latest.get(comm) or self._wait(None, comm)
        starting = self._starting.get(thread)
        if starting is not None and fits(starting):
            return starting
        if self._logs_starts or late:
            candidates = [share for share in self._shares if fits(share)]
            done = [share for share in candidates if share.complete] or candidates
            if done:
                return next((share for share in reversed(done) if share.thread == thread), done[-1])
        return self._wait(thread, None)

    def _wait(self, thread: int | None, comm: str | None) -> _Open:
        return self._waiting.setdefault((thread, comm), _Open(None, thread))

    def _adopt(self, share: _Open, key: tuple[int | None, str | None]) -> None:
        if key in self._waiting:
            _move(self._waiting[key], share)


def _move(waiting: _Open, share: _Open) -> None:
    """Give what has waited to a share that it fits; what does not fit goes on waiting."""
    for key, tally in list(waiting.links.items()):
        src, dst, transport = key
        # A network's lines come from either end, all others from the sender.
        own = {src, dst} if transport.startswith("NET/") else {src}
        if share.rank is not None and share.rank.rank in own and max(src, dst or 0) < share.rank.nranks:
            kept = share.links.setdefault(key, tally)
            if kept is not tally:
                kept.lines += tally.lines
            del waiting.links[key]
    if waiting.rings and share.has_room_for(0, max(max(order) for order in waiting.rings.values())):
        share.rings.update(waiting.rings)
        waiting.rings = {}
    if waiting.trees and share.rank is not None and share.rank.rank == tree_rank(waiting.trees):
        share.trees, waiting.trees = waiting.trees, None
    if waiting.connected:
        share.connected, waiting.connected = True, False


def _merge_ranks(old: CommRank, new: CommRank) -> CommRank | None:
    """Both lines as one; ``None`` when they contradict each other: the address was used again."""
    facts: dict[str, int | str | bool | None] = {}
    for name in ("rank", "nranks", "cuda_dev", "nvml_dev", "bus_id", "comm_id", "n_nodes", "local_ranks", "mnnvl"):
        before, after = getattr(old, name), getattr(new, name)
        if before is not None and after is not None and before != after:
            return None
        facts[name] = after if before is None else before
    return replace(old, **facts)  # type: ignore[arg-type]
