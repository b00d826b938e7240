"""Which devices a layout runs on."""

from __future__ import annotations

from collections.abc import Sequence

from pytest_gpulayout.errors import TopologyError
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.topology import Topology, device_list, unknown_device

_EXACT_UP_TO_DEVICES = 8


def choose_placement(topology: Topology, layout: Layout, requested: Sequence[str] | None = None) -> tuple[int, ...]:
    """Return the device index of each rank, in rank order.

    What is requested is used exactly as given. Else the placement with the best worst link between communicating
    ranks wins, then the best sum of links, the fewest NUMA nodes, the lowest indices. The search is exact for up to
    8 devices and greedy, but deterministic, above.

    :param requested: indices or UUIDs, one per rank in rank order.
    :raises TopologyError: too few devices, or a request that does not fit layout and machine.
    """
    if requested is not None:
        return _requested_placement(topology, layout, requested)
    if len(topology.devices) < layout.gpus:
        raise TopologyError(_too_few(topology, layout))
    search = _PlacementSearch(topology, layout.communicating_pairs(), layout.gpus)
    return search.exact() if len(topology.devices) <= _EXACT_UP_TO_DEVICES else search.greedy()


def _requested_placement(topology: Topology, layout: Layout, requested: Sequence[str]) -> tuple[int, ...]:
    given = ",".join(requested)
    where = f"  in --gpu-devices={given} (source {topology.source})"
    if len(requested) != layout.gpus:
        raise TopologyError(
            f"layout {layout} needs exactly {layout.gpus} GPUs, {len(requested)} are given\n{where}\n"
            f"  name {layout.gpus}, or leave --gpu-devices out to have the best ones chosen"
        )
    placement = []
    for text in requested:
        device = topology.find(text)
        if device is None:
            raise TopologyError(unknown_device(topology, text))
        if device.index in placement:
            raise TopologyError(
                f"layout {layout} needs {layout.gpus} different GPUs, GPU {device.index} is given twice\n{where}\n"
                f"  name each GPU once; type 'gpulayout topo' to see them"
            )
        placement.append(device.index)
    return tuple(placement)


def _too_few(topology: Topology, layout: Layout) -> str:
    found = len(topology.devices)
    unit = "GPU" if layout.gpus == 1 else "GPUs"
    smaller = f"choose a layout that needs at most {found}, such as --gpu-layout=tp{found}, or "
    return (
        f"layout {layout} needs {layout.gpus} {unit}, found {found} (source {topology.source}): "
        f"{device_list(topology)}\n"
        f"  {smaller if found else ''}run on a machine with at least {layout.gpus} {unit}"
    )


class _PlacementSearch:
    """Finds devices for ranks; the objective is the tuple (worst link, sum of links, - NUMA nodes)."""

    def __init__(self, topology: Topology, pairs: Sequence[tuple[int, int]], ranks: int) -> None:
        self._ranks = ranks
        self._devices = sorted(device.index for device in topology.devices)
        self._numa = {device.index: device.numa_node for device in topology.devices}
        self._quality = {}
        for a, b in topology.pairs:
            link = topology.link(a, b)
            self._quality[a, b] = self._quality[b, a] = link.quality if link else 0
        self._top = max(self._quality.values(), default=0)
        self._peers = [[a for a, b in pairs if b == rank] for rank in range(ranks)]
        self._follows = [rank > 0 and _exchangeable(rank - 1, rank, pairs) for rank in range(ranks)]
        self._best: tuple[int, int, int] | None = None
        self._placement: tuple[int, ...] = ()

    def exact(self) -> tuple[int, ...]:
        """Branch and bound in the order of indices, so that the first of equal placements has the lowest."""
        self._extend([], self._top, 0)
        return self._placement

    def greedy(self) -> tuple[int, ...]:
        """From every device, add the device that suits the next rank best; keep the best start."""
        for start in self._devices:
            chosen = [start]
            while len(chosen) < self._ranks:
                free = [device for device in self._devices if device not in chosen]
                chosen.append(max(free, key=lambda device: self._suits(device, chosen)))
            links = [q for rank, device in enumerate(chosen) for q in self._links(device, chosen[:rank])]
            self._keep(chosen, min(links, default=self._top), sum(links))
            if all(link == self._top for link in links):
                break
        return self._placement

    def _suits(self, device: int, chosen: Sequence[int]) -> tuple[int, int, int, int]:
        links = self._links(device, chosen)
        neighbours = sum(self._numa[other] == self._numa[device] for other in chosen)
        return min(links, default=self._top), sum(links), neighbours, -device

    def _links(self, device: int, chosen: Sequence[int]) -> list[int]:
        """Qualities of the links from the next rank, on this device, to the ranks it talks to."""
        return [self._quality[chosen[peer], device] for peer in self._peers[len(chosen)]]

    def _extend(self, chosen: list[int], worst: int, total: int) -> None:
        rank = len(chosen)
        if rank == self._ranks:
            self._keep(chosen, worst, total)
            return
        links_left = sum(map(len, self._peers[rank + 1 :]))
        for device in self._devices:
            if device in chosen or (self._follows[rank] and device < chosen[-1]):
                continue
            links = self._links(device, chosen)
            new_worst, new_total = min([worst, *links]), total + sum(links)
            bound = (new_worst, new_total + links_left * self._top, -self._nodes([*chosen, device]))
            if self._best is None or bound > self._best:
                self._extend([*chosen, device], new_worst, new_total)

    def _keep(self, chosen: Sequence[int], worst: int, total: int) -> None:
        score = (worst, total, -self._nodes(chosen))
        if self._best is None or score > self._best:
            self._best, self._placement = score, tuple(chosen)

    def _nodes(self, chosen: Sequence[int]) -> int:
        return len({self._numa[device] for device in chosen})


def _exchangeable(a: int, b: int, pairs: Sequence[tuple[int, int]]) -> bool:
    """Whether the ranks talk to the same ranks, so that only one order of their devices need be tried."""
    swap = {a: b, b: a}
    swapped = {tuple(sorted((swap.get(x, x), swap.get(y, y)))) for x, y in pairs}
    return swapped == set(pairs)
