"""Layouts on devices: choosing them, judging the links between them, and refusing what cannot be started."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_gpulayout.errors import LinkError, NodeError, TopologyError, UnsupportedLayoutError
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.links import LinkClass, LinkRequirement
from pytest_gpulayout.nodes import require_alike
from pytest_gpulayout.placement import choose_placement, satisfying_placement
from pytest_gpulayout.report import link_failure
from pytest_gpulayout.topology import Device, LinkViolation, Topology, check_links

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_gpulayout.ports import Platform


@dataclass(frozen=True, slots=True)
class PlacedLayout:
    """A layout on the devices that were chosen for it; of a layout over several nodes, the ranks of one node.

    :param placement: (n_ranks,), index of each rank's device in the topology.
    :param moe: whether the model has experts, so that dp ranks talk, too; as far as it is known before the start.
    :param node: name of the node that these ranks are on, ``""`` for this host; the first node is the head,
    :param followers: and these are the others, of which ``node_rank`` counts the position.
    """

    layout: Layout
    topology: Topology
    placement: tuple[int, ...]
    requirement: LinkRequirement
    moe: bool = False
    node: str = ""
    node_rank: int = 0
    followers: tuple[PlacedLayout, ...] = ()

    @property
    def on_nodes(self) -> tuple[PlacedLayout, ...]:
        """The ranks of each node, the head first; of a layout on one host, this alone."""
        return (self, *self.followers)

    @property
    def first_rank(self) -> int:
        """The layout's number of its first rank; all others here are numbered from 0 on each node."""
        return self.node_rank * self.layout.gpus_per_node

    @property
    def every_device(self) -> tuple[Device, ...]:
        """(n_ranks,), of all nodes, in rank order."""
        return tuple(device for node in self.on_nodes for device in node.devices)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Rank pairs that communicate."""
        return self.layout.node_pairs(self.node_rank, moe=self.moe)

    @property
    def devices(self) -> tuple[Device, ...]:
        """(n_ranks,), in rank order."""
        by_index = {device.index: device for device in self.topology.devices}
        return tuple(by_index[index] for index in self.placement)

    @property
    def links(self) -> tuple[LinkClass | None, ...]:
        """Link of every rank pair that communicates, in the order of the pairs; ``None`` where it is unknown."""
        return tuple(self.topology.link(self.placement[a], self.placement[b]) for a, b in self.pairs)

    @property
    def violations(self) -> tuple[LinkViolation, ...]:
        """Pairs whose link is worse than required."""
        return check_links(self.topology, self.placement, self.pairs, self.requirement)

    @property
    def better_placement(self) -> tuple[int, ...] | None:
        """Devices, in rank order, whose links are all as required; ``None`` where none are found."""
        return satisfying_placement(self.topology, self.layout, self.requirement, moe=self.moe)

    def with_experts(self) -> PlacedLayout:
        """Return the same of a model that has turned out to have experts."""
        followers = tuple(follower.with_experts() for follower in self.followers)
        return self if self.moe else replace(self, moe=True, followers=followers)

    def assert_links(self) -> None:
        """Do nothing when all links are as required.

        :raises LinkError: one is worse, or unknown; the message lists each pair.
        """
        bad = [node for node in self.on_nodes if node.violations]
        if bad:
            raise LinkError("\n".join(map(link_failure, bad)))


def place_layout(
    topology: Topology,
    layout: Layout,
    requested: tuple[str, ...] | None,
    requirement: LinkRequirement,
    *,
    moe: bool = False,
) -> PlacedLayout:
    """Choose the devices of a layout.

    :param requested: indices or UUIDs to use exactly, ``None`` for the best placement.
    :param moe: whether the model has experts.
    :raises TopologyError: too few devices, or a requested one that does not exist.
    """
    placement = choose_placement(topology, layout, requested, requirement, moe=moe)
    return PlacedLayout(layout, topology, placement, requirement, moe)


def place_on_nodes(
    topologies: Sequence[tuple[str, Topology]],
    layout: Layout,
    requested: tuple[str, ...] | None,
    requirement: LinkRequirement,
    *,
    moe: bool = False,
) -> PlacedLayout:
    """Choose the devices of a layout over several nodes, node by node.

    :param topologies: name and topology of each node, in order of their ranks.
    :param requested: indices to use exactly on every node, ``None`` for the best placement on each.
    :returns: the ranks of the head, with those of the other nodes.
    :raises NodeError: a node has too few devices, or others than the head, or other links between them.
    """
    placed = []
    for node_rank, (name, topology) in enumerate(topologies):
        try:
            own = place_layout(topology, layout, requested, requirement, moe=moe)
        except TopologyError as error:
            raise NodeError(f"{error}\n  on node {name}", node=name) from error
        placed.append(replace(own, node=name, node_rank=node_rank))
    whole = replace(placed[0], followers=tuple(placed[1:]))
    require_alike(whole)
    return whole


_NOT_ON_CPU = {
    "pp": "its engine ends at the first request",
    "dcp": "its attention cannot split the KV cache over ranks",  # vllm/v1/worker/cp_utils.py
    "pcp": "its model runner does not have it",  # vllm/config/vllm.py
    "ep": "its kernel knows no experts of other ranks",  # csrc/cpu/cpu_fused_moe.cpp
}
"""Factors that need GPUs, and what happens without (vLLM 0.32)."""


def require_launchable(layout: Layout, platform: Platform) -> None:
    """Refuse what this version, or vLLM, cannot start, whatever the model.

    :raises UnsupportedLayoutError: replicas over nodes; a dcp that vLLM has no groups for; what vLLM's CPU build
        cannot compute.
    """
    reason, instead = "", layout
    if layout.nodes > 1 and layout.replicas > 1:
        reason = "replicas (xN) are started on one host; a server over nodes (@N) is one server"
        instead = replace(layout, nodes=1)
    elif layout.pcp > 1 and layout.dcp not in (sizes := sorted({1, layout.pcp, layout.tp * layout.pcp})):
        reason = f"vLLM 0.32 has groups for dcp {', '.join(map(str, sizes))} beside tp{layout.tp} pcp{layout.pcp}"
        instead = replace(layout, dcp=layout.pcp)
    elif platform == "cpu" and (missing := _missing_on_cpu(layout)):
        reasons = "; ".join(f"{name}: {_NOT_ON_CPU[name]}" for name in missing)
        reason = f"vLLM's CPU build (0.32) cannot compute it ({reasons})"
        instead = Layout(tp=layout.tp, dp=layout.dp, replicas=layout.replicas)
    if reason:
        raise UnsupportedLayoutError(
            f"a layout that this version can start was required, found {layout}\n  {reason}\n"
            f"  try --gpu-layout={instead}"
        )


def _missing_on_cpu(layout: Layout) -> list[str]:
    factors = {"pp": layout.pp > 1, "dcp": layout.dcp > 1, "pcp": layout.pcp > 1}
    factors["ep"] = layout.ep and layout.ranks > 1
    return [name for name, is_used in factors.items() if is_used]


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What of a model limits its layouts; ``None`` where nothing at hand tells.

    :param layers: of the language model. :param experts: of a layer, 0 for a dense model. :param source: the file.
    """

    layers: int | None = None
    experts: int | None = None
    source: str = ""


def require_model_fits(layout: Layout, model: ModelSizes, platform: Platform) -> None:
    """Refuse what no start could bring up, as far as the model's config.json tells; the rest is left to vLLM.

    vLLM 0.32 refuses ``ep`` for a dense model only when it starts, and gives a stage without layers no attention.

    :raises UnsupportedLayoutError: more pipeline stages than layers; ``ep`` and no experts; on the CPU platform
        engines of a model with experts.
    """
    reason, instead = "", layout
    if model.layers is not None and layout.pp > model.layers:
        reason = f"{layout.pp} pipeline stages for a model of {model.layers} layers: each holds one at least"
        instead = replace(layout, pp=model.layers)
    elif layout.ep and model.experts == 0:
        reason = "ep spreads experts over ranks, and the model has none"
        instead = replace(layout, ep=False)
    elif platform == "cpu" and layout.dp > 1 and model.experts:
        reason = "vLLM's CPU build (0.32) cannot gather experts' tokens over engines: it ends at the first request"
        instead = replace(layout, dp=1)
    if reason:
        raise UnsupportedLayoutError(
            f"a layout that fits the model was required, found {layout}\n  {reason}\n  in {model.source}\n"
            f"  try --gpu-layout={instead}"
        )
