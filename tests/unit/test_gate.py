"""Placing layouts: the devices, the links between them, and what is refused before anything starts."""

from __future__ import annotations

import pytest

from pytest_gpulayout.errors import TopologyError, UnsupportedLayoutError
from pytest_gpulayout.gate import place_layout, require_launchable
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.links import parse_requirement
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


@pytest.mark.parametrize("text", ["tp1", "tp2", "tp8"])
def test_tensor_parallelism_on_one_host_can_be_started(text: str) -> None:
    require_launchable(parse_layout(text))


@pytest.mark.parametrize("text", ["pp2", "dp2", "tp2ep", "tp2pcp2", "tp2dcp2", "tp2x2", "tp2@2"])
def test_other_layouts_are_refused_before_anything_starts(text: str) -> None:
    with pytest.raises(UnsupportedLayoutError) as error:
        require_launchable(parse_layout(text))
    first, second, third = str(error.value).split("\n")
    assert first == f"a layout that this version can start was required, found {text}"
    assert second.startswith("  it starts tensor parallelism on one host: ")
    assert third == f"  try --gpu-layout=tp{parse_layout(text).tp}"
