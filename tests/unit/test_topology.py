from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gpulayout.adapters.recorded_topology import RecordedTopology
from pytest_gpulayout.errors import LayoutSyntaxError, TopologyError, TopologyFormatError
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.links import parse_link_class, parse_requirement
from pytest_gpulayout.placement import choose_placement
from pytest_gpulayout.schemas import load_schema, validate
from pytest_gpulayout.topology import Device, P2pStatus, Topology, check_links
from pytest_gpulayout.topology_document import topology_from_document, topology_to_document

BEST_TO_WORST = ["NV18", "NV4", "NV1", "XGMI", "PIX", "PXB", "PHB", "NODE", "PCIE", "SYS"]
REQUIREMENTS = ["nvlink", "nv4", "pix", "pxb", "phb", "node", "any"]


def machine(count: int, links: dict[tuple[int, int], str], default: str | None = "SYS") -> Topology:
    """GPUs 0 to count - 1, the first half on NUMA node 0, the second on node 1."""
    classes = {pair: links.get(pair, default) for pair in combinations(range(count), 2)}
    return Topology(
        devices=tuple(
            Device(index=i, name="NVIDIA H100", uuid=f"GPU-{i}{i}-abc", numa_node=2 * i // count)
            for i in range(count)
        ),
        links={pair: parse_link_class(text) for pair, text in classes.items() if text is not None},
        source="NVML",
        recorded=False,
    )


PAIRS_OF_NVLINK = machine(4, {(0, 3): "NV12", (1, 2): "NV12"}, default="NODE")


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


@settings(max_examples=40, deadline=None)
@given(
    classes=st.lists(st.sampled_from([None, "SYS", "PHB", "NV1", "NV2"]), min_size=10, max_size=10),
    layout=st.sampled_from(["tp2", "tp3", "tp4", "pp3", "tp2pp2", "dp2tp2", "tp2x2", "pp5", "dp2pp2ep"]),
)
def test_placement_is_as_good_as_trying_all(classes: list[str | None], layout: str) -> None:
    pairs_of_5 = list(combinations(range(5), 2))
    links = {pair: text for pair, text in zip(pairs_of_5, classes, strict=True) if text}
    topology, wanted = machine(5, links, default=None), parse_layout(layout)
    pairs = wanted.communicating_pairs()

    def score(placement: tuple[int, ...]) -> tuple[int, int, int]:
        found = [topology.link(placement[a], placement[b]) for a, b in pairs]
        qualities = [link.quality if link else 0 for link in found]
        nodes = {topology.device(index).numa_node for index in placement}
        return min(qualities), sum(qualities), -len(nodes)

    everything = list(permutations(range(5), wanted.gpus))
    best = max(score(placement) for placement in everything)
    assert choose_placement(topology, wanted) == min(p for p in everything if score(p) == best)


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
        (["1", "GPU-11-abc"], "needs 2 different GPUs, GPU 1 is given twice"),
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


def test_document_round_trip(tmp_path: Path) -> None:
    topology = replace(
        PAIRS_OF_NVLINK,
        links={pair: link for pair, link in PAIRS_OF_NVLINK.links.items() if pair != (0, 1)},
        driver_version="570.86",
        cuda_version="12.8",
        p2p=(P2pStatus(0, 1, "n", "NS"), P2pStatus(0, 1, None, "OK")),
    )
    document = topology_to_document(topology, placement=(0, 3), pairs=[(0, 1)])
    assert validate(document, "topology") == []
    assert document["links"][0] == {"a": 0, "b": 1, "class": None}
    assert document["placement"] == {"gpus": [0, 3], "worst": "NV12"}
    assert (document["worst"], document["all_nvlink"]) == (None, False)
    path = tmp_path / "node.json"
    path.write_text(json.dumps(document))
    assert RecordedTopology(path).probe() == replace(topology, recorded=True, source="node.json")


def test_document_without_layout_or_links() -> None:
    document = topology_to_document(machine(2, {}, default=None))
    assert document["placement"] is None
    assert document["links"] == []
    assert validate(document, "topology") == []


def gpu(index: int) -> dict[str, Any]:
    return {"index": index}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "$.schema_version: 1 was expected"),
        ({"gpus": [{"name": "H100"}]}, "$.gpus[0]: 'index' is a required property"),
        ({"gpus": [{"index": "0"}]}, "$.gpus[0].index: '0' is not of type 'integer'"),
        ({"links": [{"a": 0, "b": 1, "class": "NVLINK"}]}, "$.links[0].class: 'NVLINK' does not match"),
        ({"linkz": []}, "'linkz' was unexpected"),
        ({"gpus": [gpu(0), gpu(0)]}, "$.gpus[1].index: GPU 0 is listed twice"),
        ({"links": [{"a": 0, "b": 2, "class": "SYS"}]}, "$.links[0]: 0 and 2 are not two GPUs of $.gpus"),
        ({"links": [{"a": 1, "b": 1, "class": "SYS"}]}, "$.links[0]: 1 and 1 are not two GPUs of $.gpus"),
        (
            {"links": [{"a": 0, "b": 1, "class": "SYS"}, {"a": 1, "b": 0, "class": "NV4"}]},
            "$.links[1]: the link of 1 and 0 is listed twice",
        ),
    ],
)
def test_document_with_a_fault(change: dict[str, Any], message: str) -> None:
    document = {"schema_version": 1, "gpus": [gpu(0), gpu(1)], "links": []} | change
    with pytest.raises(TopologyFormatError) as error:
        topology_from_document(document, "node.json")
    assert message in str(error.value)
    assert "in node.json" in str(error.value)
    assert "gpulayout topo --json" in str(error.value)


def test_smallest_document() -> None:
    topology = topology_from_document({"schema_version": 1, "gpus": [gpu(3)], "links": []}, "node.json")
    assert topology.devices == (Device(index=3),)
    assert topology.recorded


def test_schema_is_one() -> None:
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(load_schema("topology"))
    with pytest.raises(FileNotFoundError):
        load_schema("nothing")


def test_recorded_text(tmp_path: Path) -> None:
    path = tmp_path / "topo.txt"
    path.write_text("\ufeff\tGPU0\tGPU1\nGPU0\t X \tPIX\nGPU1\tPIX\t X \n", encoding="utf-8")
    topology = RecordedTopology(path).probe()
    assert (str(topology.link(0, 1)), topology.source, topology.recorded) == ("PIX", "topo.txt", True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "found none: No such file or directory"),
        (b"", "text was expected, found an empty file"),
        (b" \n", "found an empty file"),
        (b"\x7fELF\0\0", "text was expected, found binary data"),
        (b"GPU0 \xff\xfe", "text in UTF-8 was expected, found byte 0xff"),
        (b'{"gpus": [}', "found a fault in it: Expecting value"),
        (b'{"gpus": []}', "$: 'schema_version' is a required property"),
        (b"hello", "a table of links between GPUs was expected, found none in 1 line"),
    ],
)
def test_recorded_file_that_cannot_be_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "node.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TopologyFormatError) as error:
        RecordedTopology(path).probe()
    assert message in str(error.value)
    assert "node.json" in str(error.value)
    assert "gpulayout topo --json >" in str(error.value)
