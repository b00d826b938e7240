"""Which devices a layout runs on: the best placement that there is.

Tensor parallelism talks in every layer, so its groups, which are consecutive ranks, get the best links; then the
other ranks that talk; then devices nobody uses; then as few NUMA nodes as possible; then the lowest indices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pytest_gpulayout.errors import TopologyError
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.links import LinkClass, LinkRequirement, parse_requirement
from pytest_gpulayout.topology import (
    Topology,
    check_links,
    device_list,
    refused_nvlinks,
    unknown_device,
    violates,
    why_unusable,
)

_ANY = parse_requirement("any")
_ALWAYS_EXACT_UP_TO = 8
_MOST_LOOKUPS = 60_000
"""Links looked at on larger machines by each of the two searches, some 30 ms (benchmarks/placement_time.py)."""
_LOOKUPS_PER_STEP = 8
"""What adding a device costs beside its links, in lookups."""

_Score = tuple[int, ...]


def choose_placement(
    topology: Topology,
    layout: Layout,
    requested: Sequence[str] | None = None,
    requirement: LinkRequirement | None = None,
    *,
    moe: bool = False,
) -> tuple[int, ...]:
    """Return the device index of each rank of one node, in rank order.

    What is requested is used exactly as given. Else the best placement is, of those that can be told apart, the one
    with, in this order: the fewest links that violate the requirement; the best worst link and the best sum of links
    within tensor-parallel groups; the same between other ranks that communicate; the fewest busy devices; the fewest
    NUMA nodes per tensor-parallel group, and in all; the lowest indices. The search is exact for up to 8 devices, and
    on larger machines where devices are alike (NVSwitch, PCIe switches); where it would take too long, the best that
    a greedy search found is taken. It is always deterministic.

    :param requested: indices or UUIDs, one per rank in rank order.
    :param moe: whether the model has experts, so that dp ranks talk, too.
    :raises TopologyError: too few devices that can be used, or a request that does not fit layout and machine.
    """
    if requested is not None:
        return _requested_placement(topology, layout, requested)
    if len(topology.usable) < layout.gpus_per_node:
        raise TopologyError(_too_few(topology, layout))
    return _PlacementSearch(topology, layout, requirement or _ANY, layout.node_pairs(moe=moe)).best()


def satisfying_placement(
    topology: Topology, layout: Layout, requirement: LinkRequirement, *, moe: bool = False
) -> tuple[int, ...] | None:
    """Return the best placement whose links are all as required, ``None`` where none was found."""
    if len(topology.usable) < layout.gpus_per_node:
        return None
    placement = choose_placement(topology, layout, requirement=requirement, moe=moe)
    return None if check_links(topology, placement, layout.node_pairs(moe=moe), requirement) else placement


def _requested_placement(topology: Topology, layout: Layout, requested: Sequence[str]) -> tuple[int, ...]:
    given = ",".join(requested)
    where = f"  in --gpu-devices={given} (source {topology.source})"
    if len(requested) != layout.gpus_per_node:
        raise TopologyError(
            f"layout {layout} needs exactly {layout.gpus_per_node} GPUs, {len(requested)} are given\n{where}\n"
            f"  name {layout.gpus_per_node}, or leave --gpu-devices out to have the best ones chosen"
        )
    placement = []
    for text in requested:
        device = topology.find(text)
        if device is None:
            raise TopologyError(unknown_device(topology, text))
        if device.index in placement:
            raise TopologyError(
                f"{layout.gpus_per_node} different GPUs are needed for layout {layout}, GPU {device.index} is given "
                f"twice\n{where}\n"
                f"  name each GPU once; type 'gpulayout topo' to see them"
            )
        if reason := why_unusable(device):
            raise TopologyError(
                f"a GPU that can be used was required, found that GPU {device.index} cannot: {reason}\n{where}\n"
                f"  name another one, or leave --gpu-devices out to have the best ones chosen"
            )
        placement.append(device.index)
    return tuple(placement)


def _too_few(topology: Topology, layout: Layout) -> str:
    found = len(topology.usable)
    unit = "GPU" if layout.gpus_per_node == 1 else "GPUs"
    smaller = f"choose a layout that needs at most {found}, such as --gpu-layout=tp{found}, or "
    return (
        f"layout {layout} needs {layout.gpus_per_node} {unit}, found {found} (source {topology.source}): "
        f"{device_list(topology)}\n"
        f"  {smaller if found else ''}run on a machine with at least {layout.gpus_per_node} {unit}"
    )


@dataclass(frozen=True, slots=True)
class _Partial:
    """Devices of the first ranks, and what they are worth so far."""

    chosen: tuple[int, ...]
    violations: int
    tensor_worst: int
    tensor_sum: int
    other_worst: int
    other_sum: int
    busy: int


class _PlacementSearch:
    """Finds devices for ranks. Positions in ``self._devices`` stand for devices; their order is that of indices."""

    def __init__(
        self, topology: Topology, layout: Layout, requirement: LinkRequirement, pairs: Sequence[tuple[int, int]]
    ) -> None:
        devices = topology.usable
        self._ranks = layout.gpus_per_node
        self._tensor_size = layout.tp
        self._indices = [device.index for device in devices]
        self._numa = [device.numa_node for device in devices]
        self._busy = [device.index in topology.busy for device in devices]
        self._quality, self._violates = _pair_tables(topology, requirement)
        self._top = max((quality for row in self._quality for quality in row), default=0)
        self._kinds = self._kinds_of_devices()
        self._tensor_peers: list[list[int]] = [[] for _ in self._all]
        self._other_peers: list[list[int]] = [[] for _ in self._all]
        for a, b in pairs:
            (self._tensor_peers if self._same_group(a, b) else self._other_peers)[b].append(a)
        self._peers = [[*t, *o] for t, o in zip(self._tensor_peers, self._other_peers, strict=True)]
        self._tensor_links_left = _counts_left(self._tensor_peers)
        self._other_links_left = _counts_left(self._other_peers)
        partners = [set[int]() for _ in self._all]
        for a, b in pairs:
            partners[a].add(b)
            partners[b].add(a)
        # Neighbours of a group that talk to the same others can be exchanged: one order of their devices will do.
        self._follows = [
            rank > 0
            and self._same_group(rank - 1, rank)
            and partners[rank - 1] - {rank} == partners[rank] - {rank - 1}
            for rank in self._all
        ]
        self._nothing = _Partial((), 0, self._top, 0, self._top, 0, 0)
        self._best: tuple[_Score, tuple[int, ...]] | None = None

    @property
    def _all(self) -> range:
        return range(self._ranks)

    def best(self) -> tuple[int, ...]:
        """Search exactly; where that was cut short, see whether a greedy search does better."""
        if not self._search(None if len(self._indices) <= _ALWAYS_EXACT_UP_TO else _MOST_LOOKUPS):
            for placement in self._greedy():
                self._keep(placement)
        assert self._best is not None
        return tuple(self._indices[device] for device in self._best[1])

    def _search(self, lookups: int | None) -> bool:
        """Branch and bound in lexical order, so that the first of equal placements has the lowest indices.

        :param lookups: most links to look at, ``None`` for all. :returns: whether the search was completed.
        """
        open_ = [self._nothing]
        while open_:
            partial = open_.pop()
            rank = len(partial.chosen)
            if self._best is not None and self._bound(partial) <= self._best[0]:
                continue
            if rank == self._ranks:
                self._keep(partial)
                continue
            added = [self._add(partial, device) for device in self._candidates(partial.chosen)]
            open_ += reversed(added)
            if lookups is not None:
                lookups -= len(added) * (_LOOKUPS_PER_STEP + len(self._peers[rank]))
                if lookups < 0:
                    return False
        return True

    def _candidates(self, chosen: tuple[int, ...]) -> Iterator[int]:
        """Devices for the next rank; of those of one kind only the first, since the others lead to the same."""
        tried = set()
        for device, kind in enumerate(self._kinds):
            if device in chosen or kind in tried:
                continue
            tried.add(kind)
            if not self._follows[len(chosen)] or device > chosen[-1]:
                yield device

    def _add(self, partial: _Partial, device: int) -> _Partial:
        rank, chosen, quality = len(partial.chosen), partial.chosen, self._quality[device]
        tensor = [quality[chosen[peer]] for peer in self._tensor_peers[rank]]
        other = [quality[chosen[peer]] for peer in self._other_peers[rank]]
        violates = self._violates[device]
        return _Partial(
            chosen=(*chosen, device),
            violations=partial.violations + sum([violates[chosen[peer]] for peer in self._peers[rank]]),
            tensor_worst=min([*tensor, partial.tensor_worst]),
            tensor_sum=partial.tensor_sum + sum(tensor),
            other_worst=min([*other, partial.other_worst]),
            other_sum=partial.other_sum + sum(other),
            busy=partial.busy + self._busy[device],
        )

    def _bound(self, partial: _Partial) -> _Score:
        """What a partial placement can become at most, larger is better; of a complete one, what it is worth."""
        placed = len(partial.chosen)
        groups = [
            {self._numa[device] for device in partial.chosen[first : first + self._tensor_size]}
            for first in range(0, placed, self._tensor_size)
        ]
        groups_left = -(-self._ranks // self._tensor_size) - len(groups)
        return (
            -partial.violations,
            partial.tensor_worst,
            partial.tensor_sum + self._top * self._tensor_links_left[placed],
            partial.other_worst,
            partial.other_sum + self._top * self._other_links_left[placed],
            -partial.busy,
            -sum(map(len, groups)) - groups_left,
            -len(set().union(*groups)),
        )

    def _keep(self, placement: _Partial) -> None:
        score = self._bound(placement)
        if self._best is None or score > self._best[0]:
            self._best = (score, placement.chosen)

    def _greedy(self) -> Iterator[_Partial]:
        """From devices of each kind, add the device that looks best for the next rank."""
        lookups = sum(_LOOKUPS_PER_STEP + len(peers) for peers in self._peers) * len(self._indices)
        for start in list(self._candidates(()))[: max(1, _MOST_LOOKUPS // lookups)]:
            partial = self._add(self._nothing, start)
            for _ in range(1, self._ranks):
                free = [device for device in range(len(self._indices)) if device not in partial.chosen]
                partial = max((self._add(partial, device) for device in free), key=self._bound)
            yield partial

    def _same_group(self, a: int, b: int) -> bool:
        return a // self._tensor_size == b // self._tensor_size

    def _kinds_of_devices(self) -> list[int]:
        """(n_devices,), equal numbers for devices that are linked to all others in the same way and equally used.

        Exchanging two of a kind changes no score; being of a kind is transitive.
        """
        first_of_kind: list[int] = []
        kinds = []
        for device in range(len(self._indices)):
            kind = next((k for k, first in enumerate(first_of_kind) if self._alike(first, device)), None)
            if kind is None:
                kind = len(first_of_kind)
                first_of_kind.append(device)
            kinds.append(kind)
        return kinds

    def _alike(self, a: int, b: int) -> bool:
        if (self._numa[a], self._busy[a]) != (self._numa[b], self._busy[b]):
            return False
        return _alike_but_for(self._quality, a, b) and _alike_but_for(self._violates, a, b)


def _counts_left(items: Sequence[Sequence[int]]) -> list[int]:
    """(n + 1,), how many there are from each position on."""
    return [sum(map(len, items[position:])) for position in range(len(items) + 1)]


def _pair_tables(topology: Topology, requirement: LinkRequirement) -> tuple[list[list[int]], list[list[bool]]]:
    """(n_devices, n_devices) of link quality, 0 for unknown, and of whether the link violates the requirement."""
    indices = [device.index for device in topology.usable]
    refused = refused_nvlinks(topology)
    quality, violations = [], []
    for a in indices:
        pairs = [(topology.link(a, b), refused.get(frozenset((a, b)))) for b in indices]
        quality.append([_quality(link, refusal) for link, refusal in pairs])
        violations.append([violates(requirement, link, refusal) for link, refusal in pairs])
    return quality, violations


def _quality(link: LinkClass | None, refusal: str | None) -> int:
    """NVLinks over which the driver refuses peer access are worth no more than the way through the host."""
    if link is None:
        return 0
    return LinkClass("SYS").quality if link.is_nvlink and refusal is not None else link.quality


def _alike_but_for(table: Sequence[Sequence[int]], a: int, b: int) -> bool:
    """Whether two rows agree in all columns but their own."""
    row_a, row_b = table[a], table[b]
    if row_a == row_b:
        return True
    return all(x == y for column, (x, y) in enumerate(zip(row_a, row_b, strict=True)) if column not in (a, b))
