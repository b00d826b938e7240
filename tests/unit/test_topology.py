from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.links import parse_requirement
from pytest_gpulayout.topology import P2pStatus, check_links
from tests.support.machines import PAIRS_OF_NVLINK, machine

REQUIREMENTS = ["nvlink", "nv4", "pix", "pxb", "phb", "node", "any"]


def test_worst_link() -> None:
    assert str(PAIRS_OF_NVLINK.worst()) == "NODE"
    assert str(PAIRS_OF_NVLINK.worst([(3, 0), (1, 2)])) == "NV12"
    assert not PAIRS_OF_NVLINK.all_nvlink
    assert machine(2, {(0, 1): "NV4"}).all_nvlink


def test_unknown_links_have_no_worst() -> None:
    unknown = machine(3, {(0, 1): "NV4", (0, 2): "NV4"}, default=None)
    assert unknown.worst() is None
    assert unknown.link(2, 1) is None
    assert not unknown.settles_links
    assert not unknown.all_nvlink


def test_one_gpu_has_no_link_to_settle() -> None:
    one = machine(1, {})
    assert one.settles_links
    assert one.worst() is None
    assert not one.all_nvlink


def test_violations_name_ranks_and_gpus() -> None:
    layout = parse_layout("tp3")
    required = parse_requirement("nvlink")
    violations = check_links(PAIRS_OF_NVLINK, (3, 0, 1), layout.communicating_pairs(), required)
    assert [str(violation) for violation in violations] == [
        "ranks 0 and 2 (GPUs 3 and 1): link NODE, nvlink required",
        "ranks 1 and 2 (GPUs 0 and 1): link NODE, nvlink required",
    ]


def test_an_unknown_link_violates_all_but_any() -> None:
    unknown = machine(2, {}, default=None)
    for text in REQUIREMENTS:
        violations = check_links(unknown, (0, 1), [(0, 1)], parse_requirement(text))
        assert len(violations) == (0 if text == "any" else 1), text
    violations = check_links(unknown, (0, 1), [(0, 1)], parse_requirement("node"))
    assert str(violations[0]) == "ranks 0 and 1 (GPUs 0 and 1): link unknown, node required"


@pytest.mark.parametrize(
    ("status", "required", "violates"),
    [
        ("NS", "nvlink", True),
        ("NS", "nv4", True),
        ("NS", "pix", False),
        ("OK", "nvlink", False),
        ("NS", "any", False),
    ],
)
def test_nvlink_that_the_driver_refuses(status: str, required: str, violates: bool) -> None:
    topology = replace(machine(2, {(0, 1): "NV4"}), p2p=(P2pStatus(0, 1, "n", status),))
    violations = check_links(topology, (1, 0), [(0, 1)], parse_requirement(required))
    assert bool(violations) == violates
    if violates:
        assert "link NV4, but the driver says NS for NVLink" in str(violations[0])
