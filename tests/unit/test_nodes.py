from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from pytest_gpulayout.errors import LinkError, NodeError
from pytest_gpulayout.gate import PlacedLayout, place_on_nodes
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.links import parse_requirement
from pytest_gpulayout.nodes import (
    NodeAddress,
    NodeFacts,
    facts_from_document,
    head_address,
    joined_occupancy,
    joined_telemetry,
    ranks_of,
    require_same_software,
    taken_over,
)
from pytest_gpulayout.occupancy import GpuUse, OccupancyReport, OccupancyViolation, RankOccupancy
from pytest_gpulayout.report import topology_record
from pytest_gpulayout.telemetry import CPU, DeviceTelemetry, Telemetry, foreign_load, slowdowns, summarize
from pytest_gpulayout.testing import FakeNode, FakeTopologySource
from pytest_gpulayout.topology import Device, Topology

ANY = parse_requirement("any")
VERSIONS: Mapping[str, str | None] = {
    "pytest-gpulayout": "0.1.0",
    "python": "3.11",
    "vllm": "0.32.0",
    "torch": "2.13.0",
    "nccl": "2.29.3",
}


def facts(name: str, **versions: str | None) -> NodeFacts:
    return NodeFacts(
        name=name,
        host=f"host-{name}",
        machine="m",
        network="n",
        processes="p",
        pid=7,
        addresses=(NodeAddress("eth0", f"192.0.2.{ord(name)}"),),
        python="/usr/bin/python3",
        processor="cpu",
        versions={**VERSIONS, **versions},
    )


def topology_of(node_name: str, /, **described: object) -> tuple[str, Topology]:
    node = FakeNode(node_name, FakeTopologySource(**described))  # type: ignore[arg-type]
    return node_name, node._own_topology()


def placed(layout: str, *topologies: tuple[str, Topology], link: str = "any") -> PlacedLayout:
    return place_on_nodes(topologies, parse_layout(layout), None, parse_requirement(link))


# -- who a node is ---------------------------------------------------------------------------------------------------


def test_facts_are_read_from_an_answer() -> None:
    node = FakeNode("b")
    found = facts_from_document("b", node.request("hello", {"environment": {}}, timeout_s=1))
    assert found.addresses == (NodeAddress("eth0", "192.0.2.1"),)
    assert found.versions["vllm"] == "0.32.0"
    assert found.words == "node b"


@pytest.mark.parametrize("answer", [None, [], {}, {"host": "h"}, {"host": "h", "addresses": [{"wrong": 1}]}])
def test_an_answer_of_something_else_names_the_node(answer: object) -> None:
    with pytest.raises(NodeError, match=r"expected on node b, found one that answers otherwise") as raised:
        facts_from_document("b", answer)
    assert raised.value.node == "b"


def test_same_software_passes() -> None:
    require_same_software([facts("a"), facts("b"), facts("c")], "0.1.0")


@pytest.mark.parametrize(
    ("name", "version", "told"),
    [
        ("vllm", "0.31.0", "the same vllm is required on all nodes of a layout, found 0.31.0 on node b"),
        ("torch", None, "the same torch is required on all nodes of a layout, found none on node b"),
        ("nccl", "2.27.7", "found 2.27.7 on node b (host host-b)\n  on node a (host host-a), the head: 2.29.3"),
        ("python", "3.12", "the same python is required"),
        ("pytest-gpulayout", "0.2.0", "the same pytest-gpulayout is required"),
    ],
)
def test_another_version_names_node_and_field(name: str, version: str | None, told: str) -> None:
    with pytest.raises(NodeError) as raised:
        require_same_software([facts("a"), facts("b", **{name: version}), facts("c")], "0.1.0")
    assert told in str(raised.value)
    assert raised.value.node == "b"


def test_no_vllm_says_which_option_names_the_python_that_has_it() -> None:
    told = r"found none on node b[^\n]*\n  in /usr/bin/python3\n.*--gpu-node-python=PATH"
    with pytest.raises(NodeError, match=told):
        require_same_software([facts("a"), facts("b", vllm=None)], "0.1.0")


def test_head_with_another_version_than_the_test_run() -> None:
    with pytest.raises(NodeError, match=r"found 0.1.0 on node a .*\n  in the test run: 0.2.0"):
        require_same_software([facts("a"), facts("b")], "0.2.0")


def test_head_address() -> None:
    assert head_address(facts("a"), None) == "192.0.2.97"
    assert head_address(facts("a"), "10.0.0.1") == "10.0.0.1"
    with pytest.raises(NodeError, match=r"found loopback alone\n.*\n  name one: --gpu-master-addr=ADDRESS"):
        head_address(replace(facts("a"), addresses=()), None)


def test_ranks_are_consecutive() -> None:
    assert [list(ranks_of(parse_layout("tp2pp2@2"), node)) for node in range(2)] == [[0, 1], [2, 3]]


def test_variables_of_the_run_that_hold_on_nodes() -> None:
    environment = {
        "NCCL_IB_DISABLE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "HF_TOKEN": "secret",
        "VLLM_HOST_IP": "192.0.2.1",
        "NCCL_DEBUG_FILE": "/tmp/x",
        "PATH": "/bin",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    assert set(taken_over(environment)) == {"NCCL_IB_DISABLE", "VLLM_CPU_KVCACHE_SPACE", "HF_TOKEN"}


# -- placing ---------------------------------------------------------------------------------------------------------


def test_each_node_gets_its_own_devices_and_ranks() -> None:
    whole = placed("tp2pp2@2", topology_of("a", gpus=2), topology_of("b", gpus=4))
    assert [node.node for node in whole.on_nodes] == ["a", "b"]
    assert [device.uuid and device.uuid[-1] for device in whole.every_device] == ["a", "a", "b", "b"]
    assert [node.pairs for node in whole.on_nodes] == [((0, 1),), ((0, 1),)]
    records = [topology_record(node) for node in whole.on_nodes]
    assert [record["node"] for record in records] == ["a", "b"]
    assert [device["rank"] for record in records for device in record["devices"]] == [0, 1, 2, 3]
    assert records[1]["links"] == [{"a": 2, "b": 3, "class": "NV18"}]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (
            {"gpus": 2, "name": "NVIDIA H100"},
            "found another GPU (of its rank 0) on node b: NVIDIA H100\n  on node a, the head: NVIDIA H200",
        ),
        ({"gpus": 2, "memory_gib": 94}, "found another GPU memory (of its rank 0) on node b: 94 GiB"),
        ({"gpus": 2, "link": "PHB"}, "found another link (between its ranks 0 and 1) on node b: PHB"),
        ({"gpus": 2, "link": None}, "found another link (between its ranks 0 and 1) on node b: unknown"),
        ({"gpus": 1}, "on node b"),
    ],
)
def test_a_node_that_differs_is_named_with_the_field(other: dict[str, object], told: str) -> None:
    with pytest.raises(NodeError) as raised:
        placed("tp4@2", topology_of("a", gpus=2), topology_of("b", **other))
    assert told in str(raised.value)
    assert raised.value.node == "b"


def test_two_names_of_one_machine() -> None:
    one = topology_of("a", gpus=2)
    with pytest.raises(NodeError, match="these are two names of one machine"):
        placed("tp4@2", one, ("b", one[1]))


def cores(*lists: str) -> Topology:
    devices = tuple(Device(index, name=f"cores {text}", cpu_affinity=text) for index, text in enumerate(lists))
    return Topology(devices, {}, "/proc", recorded=False, platform="cpu")


def test_on_the_cpu_platform_the_number_of_cores_counts() -> None:
    placed("tp2@2", ("a", cores("0-3")), ("b", cores("4,5-7")))
    with pytest.raises(NodeError, match=r"another number of cores \(of its rank 0\) on node b: 2\n.*the head: 4"):
        placed("tp2@2", ("a", cores("0-3")), ("b", cores("4-5")))


def test_links_are_judged_on_every_node() -> None:
    whole = placed("tp4@2", topology_of("a", gpus=2, link="PHB"), topology_of("b", gpus=2, link="PHB"), link="nvlink")
    with pytest.raises(LinkError) as raised:
        whole.assert_links()
    assert str(raised.value).count("are required between GPUs that communicate") == 2


# -- one report ------------------------------------------------------------------------------------------------------


def test_what_was_found_on_gpus_is_joined_and_names_nodes() -> None:
    gpu = GpuUse(0, "GPU-0")
    fine = OccupancyReport("process list", (RankOccupancy(0, gpu, 100),))
    stray = OccupancyViolation("stray", "GPU 1 (GPU-1)", 0, 200, "VLLM::Worker_TP1", "1 GiB", "GPU 0 (GPU-0)")
    bad = OccupancyReport("new processes", (RankOccupancy(0, gpu, 200),), (stray,), ("who else",), ("hidden",))
    joined = joined_occupancy([("a", 0, fine), ("b", 1, bad)])
    assert joined.proved_by == "new processes"
    assert [own.rank for own in joined.ranks] == [0, 1]
    assert not joined.ok
    assert "GPU 1 (GPU-1) of node b" in str(joined.violations[0])
    assert "GPU 0 (GPU-0) of node b" in str(joined.violations[0])
    assert joined.violations[0].rank == 1
    assert (joined.not_proved, joined.remarks) == (("node b: who else",), ("node b: hidden",))


def cpu_telemetry(**series: float) -> Telemetry:
    values = {name: (None, value) for name, value in series.items()}
    return Telemetry(
        source="/proc", interval_s=0.5, sample_ns=(0, 10**9), devices=(DeviceTelemetry(name=CPU, series=values),)
    )


def test_telemetry_of_every_node_is_judged_and_named() -> None:
    calm, stolen = cpu_telemetry(busy_percent=50.0), cpu_telemetry(steal_percent=30.0, others_busy_percent=40.0)
    joined = joined_telemetry([("a", calm), ("b", stolen)])
    assert summarize(joined) == "node a: CPU: 50 % busy; node b: CPU: steal 30.0 %, others 40 %"
    (slow,) = slowdowns(joined)
    assert slow.startswith("node b: CPU: other virtual machines took 30 %")
    assert (foreign_load(joined) or "").startswith("node b: other processes used 40 %")
    assert foreign_load(joined_telemetry([("a", calm), ("b", calm)])) is None
