from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gpulayout.errors import TopologyError
from pytest_gpulayout.layout import Layout, parse_layout
from pytest_gpulayout.links import LinkRequirement, parse_link_class, parse_requirement
from pytest_gpulayout.placement import choose_placement, satisfying_placement
from pytest_gpulayout.topology import P2pStatus, Topology, check_links
from tests.support.machines import PAIRS_OF_NVLINK, machine


@pytest.mark.parametrize(
    ("topology", "layout", "placement"),
    [
        (PAIRS_OF_NVLINK, "tp1", (0,)),
        (PAIRS_OF_NVLINK, "tp2", (0, 3)),
        (PAIRS_OF_NVLINK, "tp2x2", (0, 3, 1, 2)),
        (PAIRS_OF_NVLINK, "dp2", (0, 1)),
        (PAIRS_OF_NVLINK, "tp4", (0, 1, 2, 3)),
        (machine(4, {}), "tp2", (0, 1)),
        (machine(4, {(2, 3): "PHB"}), "tp2", (2, 3)),
        (machine(4, {(1, 2): "PIX", (2, 3): "PIX"}), "tp2", (2, 3)),
        (machine(4, {(1, 2): "NV4"}, default=None), "tp2", (1, 2)),
        (machine(8, {}, default="NV18"), "tp4", (0, 1, 2, 3)),
        (machine(16, {}, default="NV18"), "tp8", (0, 1, 2, 3, 4, 5, 6, 7)),
        (machine(10, {(4, 7): "NV4"}), "tp2", (4, 7)),
        (machine(10, {(a, a + 5): "NV4" for a in range(5)}), "dp2tp2", (0, 5, 1, 6)),
    ],
)
def test_placement(topology: Topology, layout: str, placement: tuple[int, ...]) -> None:
    assert choose_placement(topology, parse_layout(layout)) == placement


def worth(
    topology: Topology, layout: Layout, requirement: LinkRequirement, placement: Sequence[int]
) -> tuple[int, ...]:
    """The order in which placements are preferred, written down once more as one formula."""
    refused = {(p.a, p.b) for p in topology.p2p if p.capability == "n" and p.status != "OK"}

    def quality(a: int, b: int) -> int:
        link = topology.link(placement[a], placement[b])
        if link is not None and link.is_nvlink and tuple(sorted((placement[a], placement[b]))) in refused:
            return parse_link_class("SYS").quality
        return link.quality if link else 0

    pairs = layout.communicating_pairs()
    tensor = [quality(a, b) for a, b in pairs if a // layout.tp == b // layout.tp]
    other = [quality(a, b) for a, b in pairs if a // layout.tp != b // layout.tp]
    nodes = [topology.device(index).numa_node for index in placement]
    groups = [set(nodes[first : first + layout.tp]) for first in range(0, len(nodes), layout.tp)]
    return (
        -len(check_links(topology, placement, pairs, requirement)),
        min(tensor, default=99),
        sum(tensor),
        min(other, default=99),
        sum(other),
        -len(topology.busy & set(placement)),
        -sum(map(len, groups)),
        -len(set(nodes)),
    )


@settings(max_examples=60, deadline=None)
@given(
    classes=st.lists(st.sampled_from([None, "SYS", "PHB", "NV1", "NV2"]), min_size=10, max_size=10),
    refused=st.sets(st.sampled_from(list(combinations(range(5), 2))), max_size=3),
    busy=st.frozensets(st.integers(0, 4), max_size=3),
    layout=st.sampled_from(["tp2", "tp3", "tp4", "pp3", "tp2pp2", "dp2tp2", "tp2x2", "pp5", "dp2pp2ep"]),
    link=st.sampled_from(["any", "any", "phb", "nvlink", "nv2"]),
)
def test_placement_is_as_good_as_trying_all(
    classes: list[str | None], refused: set[tuple[int, int]], busy: frozenset[int], layout: str, link: str
) -> None:
    pairs_of_5 = list(combinations(range(5), 2))
    links = {pair: text for pair, text in zip(pairs_of_5, classes, strict=True) if text}
    statuses = tuple(P2pStatus(a, b, "n", "NS") for a, b in sorted(refused))
    topology = replace(machine(5, links, default=None), p2p=statuses, busy=busy)
    wanted, requirement = parse_layout(layout), parse_requirement(link)
    everything = list(permutations(range(5), wanted.gpus))
    best = max(worth(topology, wanted, requirement, placement) for placement in everything)
    first = min(p for p in everything if worth(topology, wanted, requirement, p) == best)
    assert choose_placement(topology, wanted, requirement=requirement) == first


@settings(max_examples=6, deadline=None)
@given(
    classes=st.lists(st.sampled_from(["SYS", "NODE", "PIX", "NV1", "NV2"]), min_size=28, max_size=28),
    layout=st.sampled_from(["tp2", "tp3", "tp4", "tp2pp2", "tp2x2"]),
)
def test_placement_of_eight_is_as_good_as_trying_all(classes: list[str], layout: str) -> None:
    topology = machine(8, dict(zip(combinations(range(8), 2), classes, strict=True)))
    wanted, requirement = parse_layout(layout), parse_requirement("any")
    placement = choose_placement(topology, wanted)
    best = max(worth(topology, wanted, requirement, p) for p in permutations(range(8), wanted.gpus))
    assert worth(topology, wanted, requirement, placement) == best


TENSOR_PAIRS = machine(4, {(0, 2): "NV4", (1, 3): "NV4"})


@pytest.mark.parametrize(
    ("layout", "placement"),
    [("tp2pp2", (0, 2, 1, 3)), ("dp2tp2ep", (0, 2, 1, 3)), ("pp2", (0, 2)), ("tp2x2", (0, 2, 1, 3))],
)
def test_tensor_parallel_groups_get_the_best_links(layout: str, placement: tuple[int, ...]) -> None:
    assert choose_placement(TENSOR_PAIRS, parse_layout(layout)) == placement


def test_what_satisfies_the_requirement_comes_before_the_best_links() -> None:
    """Stages over PHB satisfy ``phb`` as a whole; the NVLink pairs would leave the stages SYS apart."""
    links = {(0, 1): "NV4", (2, 3): "NV4"} | dict.fromkeys([(0, 4), (4, 5), (1, 5), (0, 5), (1, 4)], "PHB")
    topology = machine(6, links)
    layout, requirement = parse_layout("tp2pp2"), parse_requirement("phb")
    assert choose_placement(topology, layout) == (0, 1, 2, 3)
    assert satisfying_placement(topology, layout, requirement) == (0, 1, 4, 5)
    assert satisfying_placement(topology, layout, parse_requirement("pix")) is None
    assert satisfying_placement(topology, parse_layout("tp8"), requirement) is None


@pytest.mark.parametrize(
    ("busy", "layout", "placement"),
    [
        ({0}, "tp1", (1,)),
        ({0, 1, 2}, "tp2", (4, 5)),
        ({0, 5}, "tp4", (1, 2, 3, 4)),
        ({0, 1, 2, 3, 4, 5, 6, 7}, "tp2", (0, 1)),
        ({3}, "tp4", (4, 5, 6, 7)),
    ],
)
def test_idle_devices_come_first(busy: set[int], layout: str, placement: tuple[int, ...]) -> None:
    topology = replace(machine(8, {}, default="NV18"), busy=frozenset(busy))
    assert choose_placement(topology, parse_layout(layout)) == placement


def test_better_links_come_before_idle_devices() -> None:
    """A worse pair would be measured against another machine's baseline; whoever sits on the good one is named."""
    assert choose_placement(replace(PAIRS_OF_NVLINK, busy=frozenset({0})), parse_layout("tp2")) == (1, 2)
    busy = replace(machine(4, {(0, 1): "NV4"}), busy=frozenset({0}))
    assert choose_placement(busy, parse_layout("tp2")) == (0, 1)


def test_devices_that_cannot_be_used_are_left_out() -> None:
    whole = machine(4, {}, default="NV18")
    devices = (
        replace(whole.devices[0], fault="GPU is lost"),
        replace(whole.devices[1], mig=True),
        *whole.devices[2:],
    )
    topology = replace(whole, devices=devices)
    assert choose_placement(topology, parse_layout("tp2")) == (2, 3)
    with pytest.raises(TopologyError) as error:
        choose_placement(topology, parse_layout("tp3"))
    assert "needs 3 GPUs, found 2" in str(error.value)
    assert "0 NVIDIA H100 (GPU is lost), 1 NVIDIA H100 (MIG is on), 2 NVIDIA H100" in str(error.value)
    with pytest.raises(TopologyError, match="GPU 0 cannot: GPU is lost"):
        choose_placement(topology, parse_layout("tp2"), ["0", "2"])


def test_a_layout_over_nodes_is_placed_one_node_at_a_time() -> None:
    assert choose_placement(PAIRS_OF_NVLINK, parse_layout("tp2pp2@2")) == (0, 3)
    assert choose_placement(machine(8, {}, default="NV18"), parse_layout("tp8pp2@2")) == tuple(range(8))


def switches_of_four(count: int) -> Topology:
    """PCIe switches with four devices each, half of them on each socket."""

    def link(a: int, b: int) -> str:
        return "PIX" if a // 4 == b // 4 else "NODE" if 2 * a // count == 2 * b // count else "SYS"

    return machine(count, {(a, b): link(a, b) for a, b in combinations(range(count), 2)})


@pytest.mark.parametrize(
    ("topology", "layout", "placement"),
    [
        (switches_of_four(16), "tp4pp4", tuple(range(16))),
        (switches_of_four(16), "tp2pp2", (0, 1, 2, 3)),
        (replace(switches_of_four(16), busy=frozenset({0, 4, 8})), "tp4", (12, 13, 14, 15)),
        (machine(72, {(5, b) if b > 5 else (b, 5): "NV16" for b in range(72) if b != 5}, default="NV18"), "tp8",
         (0, 1, 2, 3, 4, 6, 7, 8)),
        (machine(72, {}, default="NV18"), "tp72", tuple(range(72))),
        (machine(72, {}, default="NV18"), "tp4dp18ep", tuple(range(72))),
    ],
)  # fmt: skip
def test_large_machines(topology: Topology, layout: str, placement: tuple[int, ...]) -> None:
    assert choose_placement(topology, parse_layout(layout)) == placement


def test_large_machines_without_any_order_get_a_good_placement() -> None:
    """Sixteen devices with links of no pattern, in which one group of four is better than all others."""
    good = {2, 7, 11, 14}
    classes = ["SYS", "NODE", "PHB"]
    links = {
        (a, b): "NV4" if {a, b} <= good else classes[(a * 7 + b * 13) % 3] for a, b in combinations(range(16), 2)
    }
    topology = machine(16, links)
    assert choose_placement(topology, parse_layout("tp4")) == (2, 7, 11, 14)
    assert set(choose_placement(topology, parse_layout("tp4pp2"))[:4]) == good


@pytest.mark.parametrize(
    ("requested", "placement"),
    [(["2", "1"], (2, 1)), (["GPU-33-abc", "0"], (3, 0)), (["GPU-1", "GPU-2"], (1, 2))],
)
def test_requested_devices_are_used_as_given(requested: list[str], placement: tuple[int, ...]) -> None:
    assert choose_placement(PAIRS_OF_NVLINK, parse_layout("tp2"), requested) == placement


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        (["0"], "layout tp2 needs exactly 2 GPUs, 1 are given\n  in --gpu-devices=0 (source NVML)"),
        (["0", "1", "2"], "needs exactly 2 GPUs, 3 are given"),
        (["0", "4"], "GPU '4' was asked for, found 0 NVIDIA H100, 1 NVIDIA H100"),
        (["0", "GPU-"], "GPU 'GPU-' was asked for"),
        (["1", "GPU-11-abc"], "2 different GPUs are needed for layout tp2, GPU 1 is given twice"),
    ],
)
def test_requested_devices_that_do_not_fit(requested: list[str], message: str) -> None:
    with pytest.raises(TopologyError) as error:
        choose_placement(PAIRS_OF_NVLINK, parse_layout("tp2"), requested)
    assert message in str(error.value)


def test_too_few_devices() -> None:
    with pytest.raises(TopologyError) as error:
        choose_placement(machine(1, {}), parse_layout("tp4"))
    assert str(error.value) == (
        "layout tp4 needs 4 GPUs, found 1 (source NVML): 0 NVIDIA H100\n"
        "  choose a layout that needs at most 1, such as --gpu-layout=tp1, or run on a machine with at least 4 GPUs"
    )
