"""What the ranks of a server on vLLM's CPU backend talk over, where no NCCL runs.

vLLM says in its log when a group falls back to torch.distributed's gloo, and nothing when the group shares memory;
then the proof is that every member has mapped the segment of every member. Reading ``/proc`` is left to adapters.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations

from pytest_gpulayout.causes_case import Finding, at
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.nccl_log import LogLine
from pytest_gpulayout.transport import ALLOW, TransportFamily, TransportReport, TransportUse, TransportVerdict
from pytest_gpulayout.transport_nccl import no_transport_needed
from pytest_gpulayout.vllm_log import VllmLogFacts

_CPU_SHM, _CPU_GLOO = TransportFamily.CPU_SHM.value, TransportFamily.CPU_GLOO.value

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


def judge_cpu(
    layout: Layout, vllm: VllmLogFacts, mapped_segments: Mapping[int, Collection[str]], *, moe: bool = False
) -> TransportReport:
    """Judge a server on vLLM's CPU backend, where no NCCL runs.

    vLLM says in its log when a group falls back to torch.distributed's gloo, and nothing when the group shares
    memory; then the proof is that every member has mapped the segment of every member. Groups other than tp and pp
    never share memory there (``CpuCommunicator.__init__``): that a model with experts sends its tokens over them is
    proved by the line in which vLLM names its all-to-all.

    :param mapped_segments: rank to the paths (or names) of the segments that its process has mapped, e.g.
        ``/dev/shm/vllm_dist_<id>-tp:0-[0-1]-cpushm_0``.
    :param moe: whether data-parallel ranks talk, as those of a model with experts do.
    """
    judge = _Judge(layout.communication_groups(moe=moe), layout, vllm, mapped_segments)
    judge.judge_shared_memory()
    judge.judge_all_to_all()
    open_pairs = [pair for pair in layout.communicating_pairs(moe=moe) if pair not in judge.proved]
    if not judge.kinds:
        judge.findings.append(no_transport_needed(layout))
    judge.name_groups_without_proof(open_pairs)
    slow = any(use.transport == _CPU_GLOO for use in judge.uses)
    missing = [*map("group {}".format, judge.unproved), *("ranks {} and {}".format(*pair) for pair in open_pairs)]
    verdict: TransportVerdict = "socket" if slow else "no-evidence" if missing else "ok"
    gap = f"{missing[0]}: no memory or socket was seen that they share" if missing else None
    return TransportReport(verdict, tuple(judge.uses), findings=tuple(judge.findings), gap=gap)


@dataclass(slots=True)
class _Judge:
    """:param kinds: groups of one replica, by kind.

    :ivar proved: pairs of ranks of which a transport is known. :ivar unproved: groups of which none is.
    """

    kinds: Mapping[str, tuple[tuple[int, ...], ...]]
    layout: Layout
    vllm: VllmLogFacts
    mapped: Mapping[int, Collection[str]]
    uses: list[TransportUse] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    proved: set[tuple[int, int]] = field(default_factory=set)
    unproved: list[_CpuGroup] = field(default_factory=list)

    def judge_shared_memory(self) -> None:
        """Judge the groups that the CPU backend has a shared-memory communicator for."""
        groups = [*self._groups("tp"), *self._groups("pp")]
        for group in groups:
            segments = _shared_segments(group, self.mapped)
            off = next(
                (fact.evidence for fact in self.vllm.cpu_shm_off if fact.group.split(":")[0] == group.name), None
            )
            alone = sum(other.name == group.name for other in groups) == 1
            if off is not None and (alone or segments is None):
                self._add(group, _CPU_GLOO, [off] * len(group.ranks))
                self.findings.append(_gloo_finding(group, off))
            elif segments is not None:
                self._add(group, _CPU_SHM, segments)
            else:
                self.unproved.append(group)
                self.findings.append(_unmapped_finding(group, self.mapped))

    def judge_all_to_all(self) -> None:
        """Judge the groups over which a model with experts sends tokens: ep, or dp where that is the same or all."""
        if not self.vllm.all2all:
            return
        where = self.vllm.all2all[0].evidence
        for group in self._groups("ep" if "ep" in self.kinds else "dp"):
            self._add(group, _CPU_GLOO, [where] * len(group.ranks))
            self.findings.append(_all_to_all_finding(group, where))

    def name_groups_without_proof(self, open_pairs: Collection[tuple[int, int]]) -> None:
        """Say of pairs in no group that shares memory why nothing can be seen of them."""
        grouped = {
            pair for name in ("tp", "pp") for group in self._groups(name) for pair in combinations(group.ranks, 2)
        }
        if outside := [pair for pair in open_pairs if pair not in grouped]:
            a, b = outside[0]
            self.findings.append(
                Finding(
                    f"vLLM's CPU backend shares memory in tp and pp groups only; ranks {a} and {b} talk in another, "
                    "and its log does not say over what",
                    None,
                    None,
                    None,
                    "look in its log for `all2all manager` (cpu_communicator.py)",
                )
            )

    def _groups(self, name: str) -> Iterator[_CpuGroup]:
        for first in range(0, self.layout.gpus, self.layout.ranks):
            for ranks in self.kinds.get(name, ()):
                yield _CpuGroup(name, tuple(rank + first for rank in ranks))

    def _add(self, group: _CpuGroup, transport: str, evidence: Sequence[LogLine]) -> None:
        self.uses += _cpu_uses(group, transport, evidence)
        self.proved |= set(permutations(group.ranks, 2))


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
    return at(
        f"group {group} fell back to gloo over sockets: no common shared memory",
        where,
        "start all ranks on one host with one /dev/shm (docker: --ipc=host) by one vLLM command; "
        f"{ALLOW}{_CPU_SHM.lower()},{_CPU_GLOO.lower()}",
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


def _all_to_all_finding(group: _CpuGroup, where: LogLine) -> Finding:
    return at(
        f"group {group} sends the tokens of experts over gloo's sockets: vLLM's CPU backend shares memory in tp and "
        "pp groups only",
        where,
        f"use a layout of tp alone; {ALLOW}{_CPU_SHM.lower()},{_CPU_GLOO.lower()}",
    )
