"""Layouts on devices: choosing them, judging the links between them, and refusing what cannot be started."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_gpulayout.errors import LinkError, UnsupportedLayoutError
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.links import LinkClass, LinkRequirement
from pytest_gpulayout.placement import choose_placement, satisfying_placement
from pytest_gpulayout.report import link_failure
from pytest_gpulayout.topology import Device, LinkViolation, Topology, check_links


@dataclass(frozen=True, slots=True)
class PlacedLayout:
    """A layout on the devices that were chosen for it; of a layout over several nodes, the ranks of one node.

    :param placement: (n_ranks,), index of each rank's device in the topology.
    """

    layout: Layout
    topology: Topology
    placement: tuple[int, ...]
    requirement: LinkRequirement

    @property
    def devices(self) -> tuple[Device, ...]:
        """(n_ranks,), in rank order."""
        by_index = {device.index: device for device in self.topology.devices}
        return tuple(by_index[index] for index in self.placement)

    @property
    def links(self) -> tuple[LinkClass | None, ...]:
        """Link of every rank pair that communicates, in the order of the pairs; ``None`` where it is unknown."""
        return tuple(self.topology.link(self.placement[a], self.placement[b]) for a, b in self.layout.node_pairs())

    @property
    def violations(self) -> tuple[LinkViolation, ...]:
        """Pairs whose link is worse than required."""
        return check_links(self.topology, self.placement, self.layout.node_pairs(), self.requirement)

    @property
    def better_placement(self) -> tuple[int, ...] | None:
        """Devices, in rank order, whose links are all as required; ``None`` where none are found."""
        return satisfying_placement(self.topology, self.layout, self.requirement)

    def assert_links(self) -> None:
        """Do nothing when all links are as required.

        :raises LinkError: one is worse, or unknown; the message lists each pair.
        """
        if self.violations:
            raise LinkError(link_failure(self))


def place_layout(
    topology: Topology, layout: Layout, requested: tuple[str, ...] | None, requirement: LinkRequirement
) -> PlacedLayout:
    """Choose the devices of a layout.

    :param requested: indices or UUIDs to use exactly, ``None`` for the best placement.
    :raises TopologyError: too few devices, or a requested one that does not exist.
    """
    placement = choose_placement(topology, layout, requested, requirement)
    return PlacedLayout(layout, topology, placement, requirement)


def require_launchable(layout: Layout) -> None:
    """Refuse what this version cannot start and prove.

    :raises UnsupportedLayoutError: anything but tensor parallelism on one host.
    """
    if layout == Layout(tp=layout.tp):
        return
    raise UnsupportedLayoutError(
        f"a layout that this version can start was required, found {layout}\n"
        "  it starts tensor parallelism on one host: tp1, tp2, tp4, ...; other factors, replicas (xN) and nodes (@N) "
        "are read, and their vLLM arguments are built, but not started yet\n"
        f"  try --gpu-layout=tp{layout.tp}"
    )
