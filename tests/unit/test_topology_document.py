from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_gpulayout.adapters.recorded_topology import RecordedTopology
from pytest_gpulayout.errors import TopologyFormatError
from pytest_gpulayout.schemas import load_schema, validate
from pytest_gpulayout.topology import Device, Fabric, NvLinks, P2pStatus, PcieLink, Topology
from pytest_gpulayout.topology_document import topology_from_document, topology_to_document
from tests.support.machines import PAIRS_OF_NVLINK, machine


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


def test_devices_round_trip() -> None:
    device = Device(
        index=0,
        numa_node=0,
        gpu_numa_id=2,
        mig=False,
        pcie=PcieLink(generation=1, width=16, max_generation=5, max_width=16),
        nvlinks=(
            NvLinks((0, 1), active=True, remote="switch", version="5.0", speed_mbps=50000),
            NvLinks((2,), active=False),
        ),
        fabric=Fabric("completed", "Success", clique_id=1, cluster_uuid="2f3c"),
    )
    topology = Topology(
        (device, Device(index=3, fault="GPU is lost")), {}, "NVML", recorded=False, notes=("no NUMA",)
    )
    document = json.loads(json.dumps(topology_to_document(topology)))
    assert validate(document, "topology") == []
    read = topology_from_document(document, "node.json")
    assert (read.devices, read.notes) == (topology.devices, topology.notes)


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
