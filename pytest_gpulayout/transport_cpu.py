"""What the ranks of a server on vLLM's CPU backend talk over, where no NCCL runs.

vLLM says in its log when a group falls back to torch.distributed's gloo, and nothing when the group shares memory;
then the proof is that every member has mapped the segment of every member. Reading ``/proc`` is left to adapters.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

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
    kinds = layout.communication_groups()
    return [
        _CpuGroup(name, tuple(rank + first for rank in ranks))
        for name in ("tp", "pp")
        for first in range(0, layout.gpus, layout.ranks)
        for ranks in kinds.get(name, ())
    ]


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


def _cpu_layout_findings(
    layout: Layout, open_pairs: Sequence[tuple[int, int]], groups: Sequence[_CpuGroup]
) -> Iterable[Finding]:
    if not layout.communicating_pairs():
        yield no_transport_needed(layout)
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
