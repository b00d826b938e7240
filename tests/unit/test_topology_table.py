from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.links import parse_link_class
from pytest_gpulayout.topology import Device, NvLinks, P2pStatus, PcieLink, Topology
from pytest_gpulayout.topology_table import colour_links, placement_line, topology_lines, topology_to_text
from pytest_gpulayout.topology_text import parse_topology_text
from tests.support.machines import PAIRS_OF_NVLINK, machine

CLASSES = ["NV1", "NV12", "NV18", "XGMI", "PIX", "PXB", "PHB", "NODE", "PCIE", "SYS", "SOC"]
CPU_LISTS = ["0-7", "0,2,4,6", "0-55,112-167", "5", "", None]


def test_the_table_of_nvidia_smi() -> None:
    topology = Topology(
        devices=(
            Device(10, numa_node="0-1", cpu_affinity="", gpu_numa_id=10),
            Device(2, numa_node=0, cpu_affinity="0-23,48-71"),
            Device(3),
        ),
        links={(2, 10): parse_link_class("NV12"), (2, 3): parse_link_class("SOC")},
        source="topo.txt",
        recorded=True,
    )
    assert topology_to_text(topology).splitlines() == [
        "       GPU2  GPU3  GPU10  CPU Affinity  NUMA Affinity  GPU NUMA ID",
        "GPU2    X    SOC   NV12   0-23,48-71    0              N/A",
        "GPU3   SOC    X    ???    N/A           N/A            N/A",
        "GPU10  NV12  ???    X                   0-1            10",
    ]


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    indices = draw(st.lists(st.integers(0, 120), min_size=1, max_size=9, unique=True))
    devices = [
        Device(
            index,
            numa_node=draw(st.sampled_from([None, 0, 1, 17, "0-1", "0-3"])),
            cpu_affinity=draw(st.sampled_from(CPU_LISTS)),
            gpu_numa_id=draw(st.sampled_from([None, 2, 26])),
        )
        for index in indices
    ]
    topology = Topology(tuple(devices), {}, "t", recorded=True)
    cells = {pair: draw(st.sampled_from([*CLASSES, None])) for pair in topology.pairs}
    return replace(topology, links={pair: parse_link_class(cell) for pair, cell in cells.items() if cell is not None})


def shown(topology: Topology) -> tuple[Any, ...]:
    """What the table shows; a list of CPUs that is not known is read as it is printed."""
    devices = sorted(topology.devices, key=lambda device: device.index)
    facts = [(d.index, d.numa_node, d.cpu_affinity, d.gpu_numa_id) for d in devices]
    printed = [(i, node, "N/A" if cpus is None else cpus, numa_id) for i, node, cpus, numa_id in facts]
    return {pair: str(link) for pair, link in topology.links.items()}, printed


@given(topologies())
def test_the_table_is_read_back(topology: Topology) -> None:
    assert shown(parse_topology_text(topology_to_text(topology), "t")) == shown(topology)


@given(topologies())
def test_all_that_is_said_is_read_back_in_colour_too(topology: Topology) -> None:
    device = replace(topology.devices[0], pci_bus_id="00000000:0F:00.0", uuid="GPU-0f-1", pcie=PcieLink(1, 16, 5, 16))
    detailed = replace(topology, devices=(device, *topology.devices[1:]), notes=("GPU0 and GPU1: not said",))
    lines = [colour_links(line) for line in topology_lines(detailed)]
    assert shown(parse_topology_text("\n".join(lines), "t")) == shown(topology)


def below_the_table(topology: Topology) -> list[str]:
    lines = list(topology_lines(topology))
    return lines[[i for i, line in enumerate(lines) if not line][-1] + 1 :]


def test_what_is_said_of_a_plain_listing() -> None:
    topology = replace(machine(3, {(1, 2): "NV4"}), source="topo.txt", recorded=True)
    assert [re.sub(" +", " ", line) for line in topology_lines(topology)] == [
        "recorded in topo.txt",
        "",
        " GPU0 GPU1 GPU2 CPU Affinity NUMA Affinity GPU NUMA ID",
        "GPU0 X SYS SYS N/A 0 N/A",
        "GPU1 SYS X NV4 N/A 0 N/A",
        "GPU2 SYS NV4 X N/A 1 N/A",
        "",
        "Legend:",
        " NV# # bonded NVLinks",
        " SYS from one NUMA node to another (QPI, UPI)",
        "",
        "GPU name UUID",
        "0 NVIDIA H100 GPU-00-abc",
        "1 NVIDIA H100 GPU-11-abc",
        "2 NVIDIA H100 GPU-22-abc",
        "",
        "worst link: SYS (GPUs 0 and 1, 0 and 2)",
        "NVLink islands: 1-2",
    ]


def test_what_is_said_of_a_machine_that_was_probed() -> None:
    topology = machine(2, {(0, 1): "NV12"})
    up = NvLinks(tuple(range(12)), active=True, remote="switch", version="3.0", speed_mbps=25000)
    device = replace(topology.devices[0], memory_bytes=80 << 30, pci_bus_id="00000000:0F:00.0", mig=False)
    topology = replace(
        topology,
        devices=(
            replace(device, pcie=PcieLink(4, 16, 4, 16), nvlinks=(up,)),
            replace(topology.devices[1], uuid=None, mig=True),
        ),
        driver_version="580.65.06",
        cuda_version="13.0",
        busy=frozenset({1}),
        notes=("NUMA node of GPU 1: this driver does not say",),
    )
    lines = [re.sub(" {2,}", "  ", line) for line in topology_lines(topology)]
    assert lines[0] == "from NVML, driver 580.65.06, CUDA 13.0"
    assert lines[-9:] == [
        "GPU  name  memory  UUID  PCI bus id  PCIe  NVLinks  MIG",
        "0  NVIDIA H100  80.0 GiB  GPU-00-abc  00000000:0F:00.0  gen4 x16  12 up, 25.0 GB/s each (v3.0)  off",
        "1  NVIDIA H100  -  -  -  -  -  on",
        "",
        "worst link: NV12 (GPUs 0 and 1)",
        "NVLink islands: all GPUs",
        "busy: somebody computes on GPU 1 right now",
        "fault: GPU 1 cannot be used whole: MIG is on, and its instances have no peer access",
        "note: NUMA node of GPU 1: this driver does not say",
    ]


@pytest.mark.parametrize(
    ("pcie", "text"),
    [
        (PcieLink(5, 16, 5, 16), "gen5 x16"),
        (PcieLink(4, 8, 5, 16), "gen4 x8 (of gen5 x16)"),
        (PcieLink(1, 16, 5, 16), "gen1 x16 (up to gen5 x16)"),
        (PcieLink(None, 8, None, 16), "x8 (of x16)"),
        (PcieLink(4, None, None, None), "gen4"),
        (PcieLink(), None),
    ],
)
def test_pcie(pcie: PcieLink, text: str | None) -> None:
    assert_device_column(Device(0, pcie=pcie), "PCIe", text)


def nvlinks(count: int, *, active: bool, speed_mbps: int | None = None, version: str | None = None) -> NvLinks:
    return NvLinks(tuple(range(count)), active=active, version=version, speed_mbps=speed_mbps)


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        ((nvlinks(4, active=True),), "4 up"),
        ((nvlinks(18, active=True, speed_mbps=26562, version="4.0"),), "18 up, 26.6 GB/s each (v4.0)"),
        ((nvlinks(10, active=True, speed_mbps=25000), nvlinks(2, active=False)), "10 of 12 up, 25.0 GB/s each"),
        (
            (nvlinks(2, active=True, speed_mbps=25000), nvlinks(2, active=True, speed_mbps=20000)),
            "4 up, 20.0 GB/s the slowest",
        ),
        ((nvlinks(12, active=False, version="3.0"),), "0 of 12 up"),
        ((), None),
    ],
)
def test_nvlinks(groups: tuple[NvLinks, ...], text: str | None) -> None:
    assert_device_column(Device(0, nvlinks=groups), "NVLinks", text)


def assert_device_column(device: Device, title: str, text: str | None) -> None:
    """The list of devices has this column and nothing else; none where nothing is known."""
    lines = list(topology_lines(Topology((device,), {}, "t", recorded=True)))
    listed = [line for line in lines if line.startswith(("GPU ", "0 "))]
    assert listed == ([] if text is None else [f"GPU  {title}", f"0    {text}"])


@pytest.mark.parametrize(
    ("topology", "told"),
    [
        (machine(1, {}), ["worst link: none needed"]),
        (machine(2, {}), ["worst link: SYS (GPUs 0 and 1)", "NVLink islands: none"]),
        (machine(4, {}, "NV18"), ["worst link: NV18 (all pairs)", "NVLink islands: all GPUs"]),
        (PAIRS_OF_NVLINK, ["worst link: NODE (GPUs 0 and 1, 0 and 2, 1 and 3, 2 and 3)", "NVLink islands: 0+3, 1-2"]),
        (
            machine(3, {(0, 1): "NV1", (1, 2): "NV1"}),
            ["worst link: SYS (GPUs 0 and 2)", "NVLink islands: all GPUs, some of them only over others"],
        ),
        (
            machine(3, {(0, 1): "NV4"}, None),
            ["worst link: unknown (GPUs 0 and 2, 1 and 2), of the others NV4 (GPUs 0 and 1)", "NVLink islands: 0-1"],
        ),
        (machine(2, {}, None), ["worst link: unknown (GPUs 0 and 1)", "NVLink islands: none known"]),
        (
            replace(machine(2, {}, "XGMI"), platform="rocm"),
            ["worst link: XGMI (GPUs 0 and 1)", "XGMI islands: all GPUs"],
        ),
    ],
)
def test_worst_link_and_islands(topology: Topology, told: list[str]) -> None:
    assert below_the_table(topology) == told


def statuses(topology: Topology, **status_by_capability: str) -> tuple[P2pStatus, ...]:
    return tuple(P2pStatus(a, b, c, status) for c, status in status_by_capability.items() for a, b in topology.pairs)


FOUR = machine(4, {}, "PHB")


@pytest.mark.parametrize(
    ("p2p", "told"),
    [
        ((), []),
        (statuses(FOUR, r="OK", w="OK", n="OK"), ["peer access: read, write, NVLink OK for all pairs"]),
        (
            statuses(FOUR, r="CNS", w="CNS", n="NS"),
            [
                "peer access: read, write refused for all pairs (CNS: the chipset does not support it)",
                "peer access: NVLink refused for all pairs (NS: not supported)",
            ],
        ),
        (
            (P2pStatus(1, 0, "r", "OK"), P2pStatus(2, 3, "r", "TNS")),
            [
                "peer access: read OK for GPUs 0 and 1",
                "peer access: read refused for GPUs 2 and 3 (TNS: the topology does not support it)",
            ],
        ),
        ((P2pStatus(0, 1, None, "OK"),), ["peer access: (kind not recorded) OK for GPUs 0 and 1"]),
    ],
)
def test_peer_access(p2p: tuple[P2pStatus, ...], told: list[str]) -> None:
    assert below_the_table(replace(FOUR, p2p=p2p))[2:] == told


@pytest.mark.parametrize(
    ("layout", "placement", "told"),
    [
        ("tp1", (2,), "best placement of tp1: GPU 2; worst link none needed"),
        ("tp2", (0, 3), "best placement of tp2: GPU 0, 3; worst link NV12 (GPUs 0 and 3)"),
        ("tp2x2", (0, 3, 1, 2), "best placement of tp2x2: GPU 0, 3, 1, 2; worst link NV12 (all pairs)"),
        ("tp4@2", (1, 2), "best placement of tp4@2 on this node: GPU 1, 2; worst link NV12 (GPUs 1 and 2)"),
    ],
)
def test_placement(layout: str, placement: tuple[int, ...], told: str) -> None:
    assert placement_line(PAIRS_OF_NVLINK, parse_layout(layout), placement) == told


@pytest.mark.parametrize(
    ("line", "codes"),
    [
        ("NV12 NV# XGMI", ["32"] * 3),
        ("PIX PXB", ["33"] * 2),
        ("PHB NODE PCIE SYS SOC", ["31"] * 5),
        ("fault: x", ["31"]),
        ("??? unknown", ["1;31"] * 2),
        ("NVLink NVIDIA PCIe GPU-NV4 X N/A OK nodes", []),
    ],
)
def test_classes_have_their_colours(line: str, codes: list[str]) -> None:
    painted = colour_links(line)
    assert re.findall("\x1b\\[([1-9;0-9]+)m", painted.replace("\x1b[0m", "")) == codes
    assert re.sub("\x1b\\[[0-9;]*m", "", painted) == line
