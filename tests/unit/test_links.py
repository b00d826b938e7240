from __future__ import annotations

import pytest

from pytest_gpulayout.errors import LayoutSyntaxError
from pytest_gpulayout.links import parse_link_class, parse_requirement

BEST_TO_WORST = ["NV18", "NV4", "NV1", "XGMI", "PIX", "PXB", "PHB", "NODE", "PCIE", "SYS"]
REQUIREMENTS = ["nvlink", "nv4", "pix", "pxb", "phb", "node", "any"]


def test_link_classes_are_totally_ordered() -> None:
    links = [parse_link_class(text) for text in BEST_TO_WORST]
    assert sorted(links, reverse=True) == links
    assert [str(link) for link in links] == BEST_TO_WORST


def test_soc_is_sys_under_its_old_name() -> None:
    soc = parse_link_class("SOC")
    assert soc == parse_link_class("SYS")
    assert str(soc) == "SOC"


@pytest.mark.parametrize("text", ["", "NV", "NV0", "nv4", "X", "N/A", "NVL", "PIX ", "NV4x"])
def test_not_a_link_class(text: str) -> None:
    with pytest.raises(LayoutSyntaxError, match="expected NV#, PIX, PXB, PHB, NODE, SYS, XGMI or PCIE"):
        parse_link_class(text)


@pytest.mark.parametrize(
    ("requirement", "worst_accepted"),
    [("nvlink", "NV1"), ("nv4", "NV4"), ("pix", "PIX"), ("pxb", "PXB"), ("phb", "PHB"), ("node", "NODE")],
)
def test_requirement_accepts_its_class_and_better(requirement: str, worst_accepted: str) -> None:
    required = parse_requirement(requirement)
    accepted = [text for text in BEST_TO_WORST if required.accepts(parse_link_class(text))]
    assert accepted == BEST_TO_WORST[: BEST_TO_WORST.index(worst_accepted) + 1]
    assert not required.accepts(None)


def test_any_accepts_what_is_unknown() -> None:
    assert parse_requirement("any").accepts(None)
    assert parse_requirement("any").accepts(parse_link_class("SYS"))


@pytest.mark.parametrize("text", REQUIREMENTS)
def test_requirement_round_trip(text: str) -> None:
    assert str(parse_requirement(text)) == text
    assert parse_requirement(text.upper()) == parse_requirement(text)


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("", 1, "expected nvlink, nvN, pix, pxb, phb, node or any, found ''"),
        ("sys", 1, "found 'sys'"),
        (" pix", 1, "found ' pix'"),
        ("nv", 3, "expected a number of NVLinks after 'nv', such as nv4"),
        ("nv0", 3, "expected a number of NVLinks"),
        ("nv04", 3, "expected a number of NVLinks"),
        ("nv4+", 4, "expected a number of NVLinks"),
        ("nvlink4", 7, "expected nothing after 'nvlink'"),
        ("pixb", 4, "expected nothing after 'pix'"),
    ],
)
def test_wrong_requirement(text: str, column: int, message: str) -> None:
    with pytest.raises(LayoutSyntaxError) as error:
        parse_requirement(text)
    assert message in str(error.value)
    assert error.value.column == column
