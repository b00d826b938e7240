"""Placing layouts: the devices, the links between them, and what is refused before anything starts."""

from __future__ import annotations

import pytest

from pytest_gpulayout.errors import LinkError, TopologyError, UnsupportedLayoutError
from pytest_gpulayout.gate import ModelSizes, place_layout, require_launchable, require_model_fits
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.links import parse_requirement
from pytest_gpulayout.ports import Platform
from pytest_gpulayout.testing import FakeTopologySource


def test_a_layout_is_placed_on_the_best_devices() -> None:
    topology = FakeTopologySource(gpus=4, link="SYS", links={(2, 3): "NV4", (0, 1): None}).probe()
    placed = place_layout(topology, parse_layout("tp2"), None, parse_requirement("nvlink"))
    assert ([device.index for device in placed.devices], placed.violations) == ([2, 3], ())
    assert [str(link) for link in placed.links] == ["NV4"]

    forced = place_layout(topology, parse_layout("tp2"), ("1", "0"), parse_requirement("phb"))
    assert [device.index for device in forced.devices] == [1, 0]
    assert forced.links == (None,)
    assert len(forced.violations) == 1


def test_a_layout_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(TopologyError, match=r"^layout tp8 needs 8 GPUs, found 4 \(source fake\)"):
        place_layout(FakeTopologySource(gpus=4).probe(), parse_layout("tp8"), None, parse_requirement("any"))


def test_engines_of_a_model_with_experts_are_placed_and_judged_by_their_links() -> None:
    links: dict[tuple[int, int], str | None] = {(0, 1): "NV4", (2, 3): "NV4"}
    topology = FakeTopologySource(gpus=4, link="SYS", links=links, numa_nodes=(0, 1, 1, 1)).probe()
    layout, nvlink = parse_layout("dp2"), parse_requirement("nvlink")

    dense = place_layout(topology, layout, ("1", "2"), nvlink)
    assert (dense.pairs, dense.links, dense.violations) == ((), (), ())
    experts = place_layout(topology, layout, ("1", "2"), nvlink, moe=True)
    assert (experts.pairs, [str(link) for link in experts.links]) == (((0, 1),), ["SYS"])
    assert experts.better_placement == (2, 3)
    with pytest.raises(LinkError, match="rank 0 - rank 1: SYS"):
        experts.assert_links()
    assert place_layout(topology, layout, None, nvlink, moe=True).placement == (2, 3)
    assert place_layout(topology, layout, None, nvlink).placement == (1, 2)


# -- what is refused -------------------------------------------------------------------------------------------------

NATIVE = [
    "tp1",
    "tp8",
    "pp2",
    "dp2",
    "tp2ep",
    "dp2tp2ep",
    "tp2pcp2",
    "tp4dcp2",
    "tp2pcp2dcp2",
    "tp2pcp2dcp4",
    "tp2x2",
]


@pytest.mark.parametrize("text", NATIVE)
def test_native_factors_can_be_started_on_gpus(text: str) -> None:
    require_launchable(parse_layout(text), "cuda")


@pytest.mark.parametrize("text", ["tp1", "tp2", "dp2", "dp2tp2", "tp1ep", "tp2x2"])
def test_what_vllms_cpu_build_can_compute(text: str) -> None:
    require_launchable(parse_layout(text), "cpu")


@pytest.mark.parametrize(
    ("text", "platform", "reason", "instead"),
    [
        (
            "tp2x2@2",
            "cuda",
            "replicas (xN) are started on one host; a server over nodes (@N) is one server",
            "tp2x2",
        ),
        ("tp4pcp2dcp4", "cuda", "vLLM 0.32 has groups for dcp 1, 2, 8 beside tp4 pcp2", "tp4pcp2dcp2"),
        (
            "dp2tp2pp2",
            "cpu",
            "vLLM's CPU build (0.32) cannot compute it (pp: its engine ends at the first request)",
            "dp2tp2",
        ),
        (
            "tp4pcp2dcp2",
            "cpu",
            "vLLM's CPU build (0.32) cannot compute it (dcp: its attention cannot split the KV cache over ranks; "
            "pcp: its model runner does not have it)",
            "tp4",
        ),
    ],
)
def test_refused_before_anything_starts(text: str, platform: Platform, reason: str, instead: str) -> None:
    with pytest.raises(UnsupportedLayoutError) as error:
        require_launchable(parse_layout(text), platform)
    assert str(error.value).split("\n") == [
        f"a layout that this version can start was required, found {text}",
        f"  {reason}",
        f"  try --gpu-layout={instead}",
    ]


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("pp2", ModelSizes(2, 0, "c")),
        ("pp3", ModelSizes()),
        ("dp2ep", ModelSizes(2, 8, "c")),
        ("dp2ep", ModelSizes(2, None, "c")),
        ("dp2", ModelSizes(2, 0, "c")),
    ],
)
def test_layout_that_the_model_allows_as_far_as_is_known(text: str, sizes: ModelSizes) -> None:
    require_model_fits(parse_layout(text), sizes, "cuda")


@pytest.mark.parametrize(
    ("text", "experts", "reason", "instead"),
    [
        ("pp3", 0, "3 pipeline stages for a model of 2 layers: each holds one at least", "pp2"),
        ("dp2tp2ep", 0, "ep spreads experts over ranks, and the model has none", "dp2tp2"),
        (
            "dp2tp2",
            8,
            "vLLM's CPU build (0.32) cannot gather experts' tokens over engines: it ends at the first request",
            "tp2",
        ),
    ],
)
def test_layout_that_does_not_fit_the_model(text: str, experts: int, reason: str, instead: str) -> None:
    with pytest.raises(UnsupportedLayoutError) as error:
        require_model_fits(parse_layout(text), ModelSizes(2, experts, "m/config.json"), "cpu")
    assert str(error.value).split("\n") == [
        f"a layout that fits the model was required, found {text}",
        f"  {reason}",
        "  in m/config.json",
        f"  try --gpu-layout={instead}",
    ]
