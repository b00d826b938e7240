"""The NVML adapter on the real ``pynvml``, which loads the fake driver library of ``tests/native``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Protocol

import pytest

from pytest_gpulayout.adapters.nvml import NvmlTopology
from pytest_gpulayout.errors import TopologyError
from pytest_gpulayout.topology import Device, Fabric, NvLinks, PcieLink, Topology, normal_bus_id
from pytest_gpulayout.topology_document import topology_from_document, topology_to_document
from pytest_gpulayout.topology_table import topology_to_text
from pytest_gpulayout.topology_text import parse_topology_text
from tests.native.build import (
    DRIVER_NOT_LOADED,
    MEMORY_UNKNOWN,
    FakeFabric,
    FakeGpu,
    FakeLink,
    FakeMachine,
    FakePair,
    build_fake_nvml,
    fake_nvml_environment,
    load_fake_nvml,
    machine_document,
    nvl72,
    uuid_of,
    write_machine,
)

NO_ANSWER, INVALID, NO_PERMISSION, POWER, IRQ, LOST, RESET, UNKNOWN = 3, 2, 4, 8, 11, 15, 16, 999  # nvmlReturn_t
LOST_WORDS = "GPU is lost: it has fallen off the bus or become inaccessible"

NODE_1 = FakeGpu(nodes=(1,), cpus=("14-27", "42-55"))
SWITCHED = FakeGpu(switch_links=18)
TWO, THREE = [FakeGpu()] * 2, [FakeGpu()] * 3
BRIDGED = FakeMachine(TWO, default_pair=FakePair("PHB", nvlinks=4))


class Probe(Protocol):
    def __call__(self, machine: FakeMachine | dict[str, Any], visible: str | None = None) -> Topology: ...


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_nvml(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def probe(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Probe:
    """Return the topology of a fake machine; its sysfs is ``tmp_path/sys``."""
    load_fake_nvml(library, tmp_path / "fake_nvml.json", monkeypatch)

    def probe(machine: FakeMachine | dict[str, Any], visible: str | None = None) -> Topology:
        write_machine(machine, tmp_path)
        environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        return NvmlTopology(environ, sysfs=tmp_path / "sys").probe()

    return probe


def classes(topology: Topology) -> dict[tuple[int, int], str]:
    return {pair: str(link) for pair, link in topology.links.items()}


# -- whole machines --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """:param matrix: rows of classes, ``???`` for unknown; a single class stands for all pairs.
    :param nodes: NUMA node of each GPU, a digit each; ``-`` for unknown.
    """

    matrix: str
    nodes: str
    islands: tuple[tuple[int, ...], ...] = ()
    nvlink_status: str | None = "NS"
    faults: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def link(self, a: int, b: int) -> str | None:
        rows = [row.split() for row in self.matrix.strip().splitlines()]
        cell = rows[0][0] if len(rows) == 1 else rows[a][b]
        assert len(rows) == 1 or rows[b][a] == cell
        return None if cell == "???" else cell


ALL_OF_8 = (tuple(range(8)),)
OLD = "not known, this driver (418.87) has no"
CUBE_MESH = """
    X    NV1  NV1  NV2  NV2  SYS  SYS  SYS
    NV1  X    NV2  NV1  SYS  NV2  SYS  SYS
    NV1  NV2  X    NV2  SYS  SYS  NV1  SYS
    NV2  NV1  NV2  X    SYS  SYS  SYS  NV1
    NV2  SYS  SYS  SYS  X    NV1  NV1  NV2
    SYS  NV2  SYS  SYS  NV1  X    NV2  NV1
    SYS  SYS  NV1  SYS  NV1  NV2  X    NV2
    SYS  SYS  SYS  NV1  NV2  NV1  NV2  X
"""
PAIRS = """
    X    NV12 SYS  SYS
    NV12 X    SYS  SYS
    SYS  SYS  X    NV12
    SYS  SYS  NV12 X
"""
ONE_DOWN = "\n".join(" ".join("NV11" if 5 in (a, b) else "NV12" for b in range(8)) for a in range(8))
ONE_LOST = "\n".join(" ".join("???" if 3 in (a, b) else "NV18" for b in range(8)) for a in range(8))
QUAD = "X NV1 NV1 NV2\nNV1 X NV2 NV1\nNV1 NV2 X NV2\nNV2 NV1 NV2 X"

MACHINES = {
    "rtx3090-2-bridge": Expected("NV4", "00", ((0, 1),), "OK"),
    "rtx3090-2-no-bridge": Expected("PHB", "00"),
    "rtx4090-2-cross-socket": Expected("SYS", "01"),
    "a10g-4": Expected("PHB", "0000"),
    "v100-8-cube-mesh": Expected(CUBE_MESH, "00001111", ALL_OF_8, "OK"),
    "a100-8-nvswitch": Expected("NV12", "33117755", ALL_OF_8, "OK"),
    "a100-8-nvlink-down": Expected(ONE_DOWN, "33117755", ALL_OF_8, "OK"),
    "a100-2-mig-on": Expected("PXB", "00"),
    "h100-8-nvswitch": Expected("NV18", "00001111", ALL_OF_8, "OK"),
    "h100-8-one-lost": Expected(
        ONE_LOST,
        "000-1111",
        ((0, 1, 2, 4, 5, 6, 7),),
        "OK",
        faults={3: LOST_WORDS},
        notes=(f"links of GPU 3: not known, {LOST_WORDS}",),
    ),
    "h100-nvl-4-pairs": Expected(PAIRS, "0011", ((0, 1), (2, 3)), "OK"),
    "gb200-tray-4": Expected("NV18", "0011", ((0, 1, 2, 3),), "OK"),
    "v100-4-driver-418": Expected(
        QUAD,
        "----",
        ((0, 1, 2, 3),),
        "OK",
        notes=(
            f"NUMA node of GPU 0-3: {OLD} nvmlDeviceGetMemoryAffinity",
            f"MIG mode of GPU 0-3: {OLD} nvmlDeviceGetMigMode",
        ),
    ),
}


def test_every_described_machine_is_tested() -> None:
    machines = Path(__file__).parents[1] / "native" / "machines"
    assert sorted(path.stem for path in machines.glob("*.json")) == sorted(MACHINES)


@pytest.mark.parametrize("name", MACHINES)
def test_machine(probe: Probe, name: str) -> None:
    topology, expected = probe(machine_document(name)), MACHINES[name]
    wanted = {pair: expected.link(*pair) for pair in topology.pairs}
    assert classes(topology) == {pair: link for pair, link in wanted.items() if link is not None}
    assert [device.numa_node for device in topology.devices] == [int(n) if n != "-" else None for n in expected.nodes]
    assert topology.nvlink_islands == expected.islands
    assert topology.p2p_status(0, 1, "n") == expected.nvlink_status
    assert {d.index: d.fault for d in topology.devices if d.fault} == dict(expected.faults)
    assert topology.notes == expected.notes
    assert not topology.busy


@pytest.mark.parametrize("name", [name for name, expected in MACHINES.items() if "???" not in expected.matrix])
def test_nvml_and_the_text_of_a_machine_agree(probe: Probe, name: str) -> None:
    probed = probe(machine_document(name))
    read = parse_topology_text(topology_to_text(probed), "topo.txt")
    assert read.links == probed.links
    for ours, printed in zip(probed.devices, read.devices, strict=True):
        assert (printed.numa_node, printed.cpu_affinity) == (ours.numa_node, ours.cpu_affinity)


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_can_be_recorded_and_read_back(probe: Probe, name: str) -> None:
    probed = probe(machine_document(name))
    read = topology_from_document(json.loads(json.dumps(topology_to_document(probed))), "NVML")
    assert replace(read, recorded=False) == probed


def test_72_gpus_are_read_fast(probe: Probe) -> None:
    before = time.process_time()
    topology = probe(nvl72())
    assert time.process_time() - before < 2
    assert (len(topology.pairs), set(classes(topology).values())) == (2556, {"NV18"})
    assert topology.nvlink_islands == (tuple(range(72)),)
    assert {device.fabric for device in topology.devices} == {
        Fabric("completed", "Success", 32766, "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9")
    }
    assert topology.notes == ()


# -- facts of one GPU ------------------------------------------------------------------------------------------------


def test_one_gpu(probe: Probe) -> None:
    topology = probe(FakeMachine())
    assert topology.devices == (
        Device(
            index=0,
            name="NVIDIA H100 80GB HBM3",
            uuid=uuid_of(0),
            pci_bus_id="00000000:0A:00.0",
            numa_node=0,
            cpu_affinity="0-13,28-41",
            memory_bytes=85_520_809_984,
            mig=False,
            pcie=PcieLink(5, 16, 5, 16),
        ),
    )
    assert (dict(topology.links), topology.p2p, topology.notes) == ({}, (), ())
    assert (topology.source, topology.recorded) == ("NVML", False)
    assert (topology.driver_version, topology.cuda_version, topology.nvml_version) == (
        "570.86.10",
        "12.8",
        "12.570.86.10",
    )


@pytest.mark.parametrize(
    ("telemetry", "watts"),
    [
        ({"set_power_limit_mw": 500_000, "power_limit_mw": 250_000, "default_power_limit_mw": 700_000}, 500),
        ({"set_power_limit_mw": 349_999}, 350),
        ({"power_limit_mw": 250_000}, None),
        ({}, None),
    ],
)
def test_the_power_limit_is_the_one_that_is_set(probe: Probe, telemetry: dict[str, int], watts: int | None) -> None:
    topology = probe(FakeMachine([FakeGpu(telemetry=telemetry)]))
    assert (topology.devices[0].power_limit_w, topology.notes) == (watts, ())


def test_a_power_limit_that_is_kept_secret_is_noted(probe: Probe) -> None:
    topology = probe(FakeMachine(errors={"nvmlDeviceGetPowerManagementLimit": NO_PERMISSION}))
    assert topology.devices[0].power_limit_w is None
    assert topology.notes == (
        "power limit of GPU 0: not known, nvmlDeviceGetPowerManagementLimit says 'Insufficient Permissions'",
    )


def test_gpus_of_grace_have_memory_of_their_own(probe: Probe) -> None:
    devices = probe(machine_document("gb200-tray-4")).devices
    assert [device.gpu_numa_id for device in devices] == [2, 10, 18, 26]


def test_elsewhere_nvml_repeats_the_node_of_the_cpus(probe: Probe) -> None:
    assert probe(FakeMachine([FakeGpu(nodes=(1,), numa_id=1)])).devices[0].gpu_numa_id is None


def test_numa_nodes_of_several_are_a_range(probe: Probe) -> None:
    gpu = probe(FakeMachine([FakeGpu(nodes=(0, 1, 2, 3), cpus=("0", "64", "4000-4001"))])).devices[0]
    assert (gpu.numa_node, gpu.cpu_affinity) == ("0-3", "0,64,4000-4001")


def test_mig_mode(probe: Probe) -> None:
    gpus = [FakeGpu(mig=True), FakeGpu(mig=False), FakeGpu(mig=None)]
    topology = probe(FakeMachine(gpus))
    assert [device.mig for device in topology.devices] == [True, False, False]
    assert [device.index for device in topology.usable] == [1, 2]


@pytest.mark.parametrize(
    ("fabric", "expected"),
    [
        (FakeFabric(0), None),
        (FakeFabric(1), Fabric("not started", "Success")),
        (FakeFabric(2), Fabric("in progress", "Success")),
        (FakeFabric(3, clique_id=0), Fabric("completed", "Success", 0)),
        (FakeFabric(3, status=UNKNOWN), Fabric("completed", "Unknown Error")),
        (
            FakeFabric(3, 0, 7, "00112233-4455-6677-8899-aabbccddeeff"),
            Fabric("completed", "Success", 7, "00112233-4455-6677-8899-aabbccddeeff"),
        ),
    ],
)
@pytest.mark.parametrize("missing", [(), ("nvmlDeviceGetGpuFabricInfoV",)])
def test_fabric(probe: Probe, fabric: FakeFabric, expected: Fabric | None, missing: tuple[str, ...]) -> None:
    topology = probe(FakeMachine([FakeGpu(fabric=fabric)], missing=missing))
    assert (topology.devices[0].fabric, topology.notes) == (expected, ())


def test_nvlinks_are_grouped_by_what_they_are(probe: Probe) -> None:
    machine = FakeMachine(
        TWO, default_pair=FakePair(nvlinks=2, nvlinks_down=1), field_errors={164: INVALID, 84: NO_ANSWER}
    )
    assert probe(machine).devices[1].nvlinks == (
        NvLinks((0,), True, "00000000:0A:00.0", "4.0", None),
        NvLinks((1,), True, "00000000:0A:00.0", "4.0", 26_562),
        NvLinks((2,), False),
    )


@pytest.mark.parametrize(("number", "version"), [(1, "1.0"), (5, "3.1"), (8, "6.0"), (99, None), (None, None)])
def test_nvlink_version(probe: Probe, number: int | None, version: str | None) -> None:
    gpu = FakeGpu(nvlinks=[FakeLink(version=number, speed=None)])
    assert probe(FakeMachine([gpu])).devices[0].nvlinks == (NvLinks((0,), True, "switch", version),)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("0000:0f:00.0", "00000000:0F:00.0"),
        ("00010000:C1:00.7", "00010000:C1:00.7"),
        ("FFFFFFF:FFFF:FF", None),
        ("00000000:0F:00.0/../..", None),
        ("", None),
    ],
)
def test_bus_ids_are_compared_in_one_form(text: str, normal: str | None) -> None:
    assert normal_bus_id(text) == normal


@pytest.mark.parametrize(
    ("gpu", "missing", "is_busy"),
    [
        (FakeGpu(), (), False),
        (FakeGpu(processes=[(7, 1 << 20)]), (), True),
        (FakeGpu(processes=[(7, 1 << 20)]), ("nvmlDeviceGetComputeRunningProcesses_v3",), True),
        (FakeGpu(mps=[(7, 1 << 20)]), (), True),
        (FakeGpu(mps=[(7, 1 << 20)]), ("nvmlDeviceGetMPSComputeRunningProcesses_v3",), True),
        (FakeGpu(graphics=[(7, 1 << 31)], memory_used=1 << 31), (), False),
        (FakeGpu(memory_used=1 << 30), "lists", False),
        (FakeGpu(memory_used=(1 << 30) + 1), "lists", True),
        (FakeGpu(memory_used=1 << 31), ("nvmlDeviceGetMemoryInfo",), False),
    ],
)
def test_busy_gpus(probe: Probe, gpu: FakeGpu, missing: tuple[str, ...] | str, is_busy: bool) -> None:
    lists = [f"nvmlDeviceGet{k}RunningProcesses_v{v}" for k in ("Compute", "MPSCompute") for v in (2, 3)]
    topology = probe(FakeMachine([FakeGpu(), gpu], missing=lists if missing == "lists" else tuple(missing)))
    assert topology.busy == ({1} if is_busy else set())


# -- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["PIX", "PXB", "PHB", "NODE", "SYS"])
def test_pcie_classes(probe: Probe, level: str) -> None:
    topology = probe(FakeMachine([FakeGpu(), NODE_1], default_pair=FakePair(level)))
    assert classes(topology) == {(0, 1): level}
    assert [device.numa_node for device in topology.devices] == [0, 1]


def test_direct_nvlinks_are_counted_per_pair(probe: Probe) -> None:
    pairs = {(0, 1): FakePair(nvlinks=4), (0, 2): FakePair(nvlinks=2), (1, 2): FakePair("NODE")}
    topology = probe(FakeMachine(THREE, pairs))
    assert classes(topology) == {(0, 1): "NV4", (0, 2): "NV2", (1, 2): "NODE"}
    assert str(topology.worst()) == "NODE"


def test_links_that_are_down_do_not_count(probe: Probe) -> None:
    pairs = {(0, 1): FakePair("PHB", nvlinks_down=4), (0, 2): FakePair(nvlinks=3, nvlinks_down=1)}
    assert classes(probe(FakeMachine(THREE, pairs))) == {(0, 1): "PHB", (0, 2): "NV3", (1, 2): "SYS"}


def test_a_gpu_with_fewer_switch_links_is_the_worse_end(probe: Probe) -> None:
    assert classes(probe(FakeMachine([SWITCHED, replace(SWITCHED, switch_links=16)]))) == {(0, 1): "NV16"}


@pytest.mark.parametrize(
    ("lists", "expected"),
    [((4, 3), "NV3"), ((4, 0), "PHB")],
)
def test_two_ends_that_disagree(probe: Probe, lists: tuple[int, int], expected: str) -> None:
    gpus = [FakeGpu(nvlinks=[FakeLink(1 - i, count)] if count else ()) for i, count in enumerate(lists)]
    topology = probe(FakeMachine(gpus, default_pair=FakePair("PHB")))
    assert classes(topology) == {(0, 1): expected}
    assert topology.notes == (
        f"NVLinks of GPU 0 and GPU 1: GPU 0 lists 4 that are up, GPU 1 {lists[1]}; the lower number counts",
    )


TYPES_MISSING = ("nvmlDeviceGetNvLinkRemoteDeviceType",)


def test_switches_are_known_by_their_class_in_sysfs(probe: Probe, tmp_path: Path) -> None:
    write_pci_class(tmp_path, "0000:c0:00.0", "0x068000\n")
    topology = probe(FakeMachine([SWITCHED] * 2, missing=TYPES_MISSING, field_errors={147: NO_ANSWER}))
    assert classes(topology) == {(0, 1): "NV18"}
    assert topology.devices[0].nvlinks[0].remote == "switch"


def write_pci_class(tmp_path: Path, bus_id: str, text: str) -> None:
    device = tmp_path / "sys/bus/pci/devices" / bus_id
    device.mkdir(parents=True)
    device.joinpath("class").write_text(text)


@pytest.mark.parametrize("pci_class", ["0x068001", "0x030200"])  # a POWER9 processor, a GPU that is hidden
def test_other_devices_are_no_switches(probe: Probe, tmp_path: Path, pci_class: str) -> None:
    write_pci_class(tmp_path, "0004:c0:00.0", pci_class)
    gpu = FakeGpu(nvlinks=[FakeLink("00000004:C0:00.0", 3)])
    topology = probe(FakeMachine([gpu] * 2, missing=TYPES_MISSING))
    assert classes(topology) == {(0, 1): "SYS"}
    assert topology.devices[0].nvlinks[0].remote == "00000004:C0:00.0"
    assert topology.notes == ()


def test_switches_are_known_by_the_number_of_links_to_them(probe: Probe) -> None:
    topology = probe(FakeMachine([SWITCHED] * 4, missing=TYPES_MISSING))
    assert set(classes(topology).values()) == {"NV18"}
    assert {link.remote for device in topology.devices for link in device.nvlinks} == {"switch"}


WHERE = "where the NVLinks that are up end"
WHICH = "which NVLinks are up"
NEITHER = (
    "link of GPU 0 and GPU 1: not known, the driver says neither {} nor whether the GPUs reach each other over NVLink"
)
HOW_MANY = "link of GPU 0 and GPU 1: NVLink connects them, the driver does not say how many links are up"
AT_MOST = "number of NVLinks of GPU 0 and GPU 1: at most 4, the driver does not say where they end"
HIDDEN = [FakeGpu(nvlinks=[FakeLink(None, count)]) for count in (6, 4)]
NO_STATE = "NVLink state of GPU {}: not known, nvmlDeviceGetNvLinkState says 'Unknown Error'"


@pytest.mark.parametrize(
    ("status", "expected", "notes"),
    [
        (0, "NV4", (AT_MOST,)),
        (5, "NODE", ()),
        (6, None, (NEITHER.format(WHERE),)),
        (
            None,
            None,
            (
                "peer access of GPU 0 and GPU 1: the driver does not say (Not Supported)",
                NEITHER.format(WHERE),
            ),
        ),
    ],
)
def test_links_with_an_unknown_end(
    probe: Probe, status: int | None, expected: str | None, notes: tuple[str, ...]
) -> None:
    pair = FakePair("NODE", p2p={} if status is None else {0: 0, 1: 0, 2: status})
    topology = probe(FakeMachine(HIDDEN, default_pair=pair))
    assert classes(topology) == ({(0, 1): expected} if expected else {})
    assert topology.notes == notes


def test_an_unknown_end_leads_nowhere_if_no_other_gpu_has_links(probe: Probe) -> None:
    machine = FakeMachine([HIDDEN[0], FakeGpu()], default_pair=FakePair("PIX", p2p={2: 6}))
    assert classes(probe(machine)) == {(0, 1): "PIX"}


def test_one_end_that_is_named_is_enough(probe: Probe) -> None:
    gpus = [FakeGpu(nvlinks=[FakeLink(1, 4)]), FakeGpu(nvlinks=[FakeLink(None, 3)])]
    topology = probe(FakeMachine(gpus, default_pair=FakePair(p2p={0: 0, 1: 0, 2: 5})))
    assert (classes(topology), topology.notes) == ({(0, 1): "NV3"}, ())


@pytest.mark.parametrize("error", [NO_PERMISSION, UNKNOWN, 13])
@pytest.mark.parametrize(
    ("status", "expected", "note"), [(0, None, HOW_MANY), (5, "SYS", None), (6, None, NEITHER.format(WHICH))]
)
def test_nvlink_state_that_is_not_told(
    probe: Probe, error: int, status: int, expected: str | None, note: str | None
) -> None:
    machine = FakeMachine(
        TWO, default_pair=FakePair(p2p={0: 0, 1: 0, 2: status}), errors={"nvmlDeviceGetNvLinkState": error}
    )
    topology = probe(machine)
    assert classes(topology) == ({(0, 1): expected} if expected else {})
    words = {
        NO_PERMISSION: "nvmlDeviceGetNvLinkState says 'Insufficient Permissions'",
        UNKNOWN: "nvmlDeviceGetNvLinkState says 'Unknown Error'",
        13: "this driver (570.86.10) has no nvmlDeviceGetNvLinkState",
    }
    assert topology.notes == (f"NVLink state of GPU 0-1: not known, {words[error]}", *filter(None, [note]))


def test_one_link_without_a_state_hides_the_number(probe: Probe) -> None:
    partly = FakeGpu(nvlinks=[FakeLink(1, 3), FakeLink(1, errors={"nvmlDeviceGetNvLinkState": UNKNOWN})])
    machine = FakeMachine([partly, FakeGpu(nvlinks=[FakeLink(0, 4)])], default_pair=FakePair(p2p={0: 0, 1: 0, 2: 0}))
    topology = probe(machine)
    assert classes(topology) == {}
    assert topology.notes == (NO_STATE.format(0), HOW_MANY)


def test_gpus_whose_own_bus_id_is_not_known(probe: Probe) -> None:
    """The others name a bus id that may be theirs: only the driver's word on NVLink tells."""
    pairs = {(0, 1): FakePair(nvlinks=4)}
    topology = probe(FakeMachine(THREE, pairs, FakePair("PIX"), errors={"nvmlDeviceGetPciInfo_v3": {"1": NO_ANSWER}}))
    assert classes(topology) == {(0, 1): "NV4", (0, 2): "PIX", (1, 2): "PIX"}
    topology = probe(FakeMachine(THREE, pairs, FakePair("PIX"), errors={"nvmlDeviceGetPciInfo_v3": NO_ANSWER}))
    assert classes(topology) == {(0, 1): "NV4", (0, 2): "PIX", (1, 2): "PIX"}
    assert topology.notes == ("PCI bus id of GPU 0-2: the driver does not say (Not Supported)", AT_MOST)


def test_p2p_status(probe: Probe) -> None:
    topology = probe(FakeMachine(TWO, default_pair=FakePair(nvlinks=4, p2p={0: 0, 1: 4, 2: 5})))
    assert {status.capability: status.status for status in topology.p2p} == {"r": "OK", "w": "DR", "n": "NS"}
    assert classes(topology) == {(0, 1): "NV4"}


@pytest.mark.parametrize(
    ("number", "word"), [(0, "OK"), (1, "CNS"), (2, "GNS"), (3, "TNS"), (4, "DR"), (5, "NS"), (6, "U"), (7, "U")]
)
def test_every_p2p_status(probe: Probe, number: int, word: str) -> None:
    topology = probe(FakeMachine(TWO, default_pair=FakePair(p2p={0: number, 1: 0, 2: 5})))
    assert topology.p2p_status(1, 0, "r") == word


# -- what is not answered --------------------------------------------------------------------------------------------

HIDDEN_PCIE = "the driver does not say (Not Supported), as in virtual machines that hide PCIe"


@pytest.mark.parametrize(
    ("pairs", "gpus", "where"),
    [
        ({(0, 1)}, 3, "GPU 0 and GPU 1"),
        ({(0, 1), (0, 2), (1, 2)}, 3, "GPU 0-2 among each other"),
        ({(0, 2), (0, 3), (1, 2), (1, 3)}, 4, "GPU 0-1 and GPU 2-3"),
        ({(0, 1), (2, 3)}, 4, "GPU 0 and GPU 1, GPU 2 and GPU 3"),
    ],
)
def test_a_virtual_machine_can_hide_the_ancestor(
    probe: Probe, pairs: set[tuple[int, int]], gpus: int, where: str
) -> None:
    machine = FakeMachine([FakeGpu()] * gpus, dict.fromkeys(pairs, FakePair(None)), FakePair("PHB"))
    topology = probe(machine)
    assert set(topology.pairs) - set(topology.links) == pairs
    assert topology.worst() is None
    assert topology.notes == (f"link of {where}: {HIDDEN_PCIE}",)


def test_an_unknown_level(probe: Probe) -> None:
    document = FakeMachine(TWO).document()
    document["pairs"]["default"]["ancestor"] = 60
    topology = probe(document)
    assert (topology.settles_links, topology.notes) == (
        False,
        ("link of GPU 0 and GPU 1: not known, the driver answers with an unknown level, 60",),
    )


HAS_NO = "not known, this driver (570.86.10) has no"
MISSING_AND_NOTE = {
    "nvmlSystemGetNVMLVersion": "NVML version",
    "nvmlDeviceGetName": "name of GPU 0-1",
    "nvmlDeviceGetUUID": "UUID of GPU 0-1",
    "nvmlDeviceGetPciInfo": "PCI bus id of GPU 0-1",
    "nvmlDeviceGetMemoryInfo": "memory of GPU 0-1",
    "nvmlDeviceGetMemoryAffinity": "NUMA node of GPU 0-1",
    "nvmlDeviceGetCpuAffinity": "CPU affinity of GPU 0-1",
    "nvmlDeviceGetNumaNodeId": None,
    "nvmlDeviceGetMigMode": "MIG mode of GPU 0-1",
    "nvmlDeviceGetCurrPcieLinkGeneration": "PCIe link of GPU 0-1",
    "nvmlDeviceGetCurrPcieLinkWidth": "PCIe link of GPU 0-1",
    "nvmlDeviceGetMaxPcieLinkGeneration": "PCIe link of GPU 0-1",
    "nvmlDeviceGetMaxPcieLinkWidth": "PCIe link of GPU 0-1",
    "nvmlDeviceGetNvLinkState": "NVLink state of GPU 0-1",
    "nvmlDeviceGetNvLinkVersion": "NVLink version of GPU 0-1",
    "nvmlDeviceGetFieldValues": "NVLink speed of GPU 0-1",
    "nvmlDeviceGetNvLinkRemoteDeviceType": None,
    "nvmlDeviceGetNvLinkRemotePciInfo": None,
    "nvmlDeviceGetGpuFabricInfoV": None,
    "nvmlDeviceGetP2PStatus": "peer access of GPU 0 and GPU 1",
    "nvmlDeviceGetTopologyCommonAncestor": None,
    "nvmlDeviceGetComputeRunningProcesses_v3": None,
    "nvmlDeviceGetMPSComputeRunningProcesses_v3": None,
    "nvmlErrorString": None,
}
VERSIONED = {"nvmlDeviceGetPciInfo": "_v3", "nvmlDeviceGetNvLinkRemotePciInfo": "_v2"}


@pytest.mark.parametrize("function", MISSING_AND_NOTE)
def test_a_function_that_is_missing_is_said_where_it_matters(probe: Probe, function: str) -> None:
    symbol = function + VERSIONED.get(function, "")
    topology = probe(replace(BRIDGED, missing=[symbol]))
    subject = MISSING_AND_NOTE[function]
    assert (f"{subject}: {HAS_NO} {function}" in topology.notes) is (subject is not None)
    assert all(device.fault is None for device in topology.devices)
    # Only where the state is unknown, or neither end says where its links lead, the number of links is open.
    assert classes(topology) == ({} if function == "nvmlDeviceGetNvLinkState" else {(0, 1): "NV4"})


def test_a_missing_driver_version(probe: Probe) -> None:
    machine = FakeMachine(missing=["nvmlSystemGetDriverVersion", "nvmlDeviceGetMemoryInfo"])
    topology = probe(machine)
    assert topology.driver_version is None
    assert topology.notes == (
        "driver version: not known, this driver has no nvmlSystemGetDriverVersion",
        "memory of GPU 0: not known, this driver has no nvmlDeviceGetMemoryInfo",
    )


def test_an_older_function_tells_the_cuda_version_too(probe: Probe) -> None:
    older = "nvmlSystemGetCudaDriverVersion"
    topology = probe(FakeMachine(missing=[f"{older}_v2"]))
    assert (topology.cuda_version, topology.notes) == ("12.8", ())
    topology = probe(FakeMachine(missing=[f"{older}_v2", older]))
    assert (topology.cuda_version, topology.notes) == (None, (f"CUDA version: {HAS_NO} {older}",))


def test_a_driver_without_any_function_but_the_first(probe: Probe) -> None:
    kept = {"nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetCount_v2"}
    source = (Path(__file__).parents[1] / "native" / "fake_nvml.c").read_text()
    functions = {
        line.split("(")[0].removeprefix("int ") for line in source.splitlines() if line.startswith("int nvml")
    }
    topology = probe(FakeMachine(TWO, missing=sorted(functions - kept)))
    assert topology.devices == (Device(0), Device(1))
    assert not topology.links
    assert len(topology.notes) == len(set(topology.notes)) > 10


def test_errors_are_told_in_the_words_of_nvml(probe: Probe) -> None:
    errors = {"nvmlDeviceGetCpuAffinity": {"1": UNKNOWN, "2": UNKNOWN}, "nvmlDeviceGetMigMode": {"0": NO_PERMISSION}}
    assert probe(FakeMachine(THREE, errors=errors)).notes == (
        "MIG mode of GPU 0: not known, nvmlDeviceGetMigMode says 'Insufficient Permissions'",
        "CPU affinity of GPU 1-2: not known, nvmlDeviceGetCpuAffinity says 'Unknown Error'",
    )


# -- GPUs that cannot be used ----------------------------------------------------------------------------------------

FAULTS = {
    LOST: LOST_WORDS,
    RESET: "GPU requires restart: it must be reset before it can be used",
    IRQ: "Interrupt Request Issue: the kernel cannot handle its interrupts",
    POWER: "Insufficient External Power: its power cables are not attached properly",
    NO_PERMISSION: "Insufficient Permissions: this user or this container may not use it",
    UNKNOWN: "Unknown Error: the driver does not say what is wrong with it",
}
FIRST_CALLS = ("HandleByIndex_v2", "Name", "UUID", "PciInfo_v3")
LATER_CALLS = (
    *("MemoryInfo", "CpuAffinity", "MigMode", "CurrPcieLinkWidth", "GpuFabricInfoV", "NvLinkState"),
    *("NvLinkRemoteDeviceType", "NvLinkVersion", "FieldValues", "ComputeRunningProcesses_v3"),
)


@pytest.mark.parametrize("error", FAULTS)
@pytest.mark.parametrize("call", FIRST_CALLS)
def test_a_gpu_that_does_not_say_its_name(probe: Probe, call: str, error: int) -> None:
    assert_only_gpu_1_is_at_fault(probe, call, error)


@pytest.mark.parametrize("error", [LOST, RESET, IRQ, POWER])
@pytest.mark.parametrize("call", LATER_CALLS)
def test_a_gpu_that_goes_away_later(probe: Probe, call: str, error: int) -> None:
    assert_only_gpu_1_is_at_fault(probe, call, error)


def assert_only_gpu_1_is_at_fault(probe: Probe, call: str, error: int) -> None:
    machine = FakeMachine([SWITCHED] * 3, errors={f"nvmlDeviceGet{call}": {"1": error}})
    topology = probe(machine)
    assert [device.fault for device in topology.devices] == [None, FAULTS[error], None]
    assert classes(topology) == {(0, 2): "NV18"}
    assert {(status.a, status.b) for status in topology.p2p} == {(0, 2)}
    assert topology.devices[1].memory_bytes is None
    assert topology.notes == (f"links of GPU 1: not known, {FAULTS[error]}",)
    assert topology.busy == set()


def test_a_gpu_lost_at_any_moment(probe: Probe) -> None:
    """Whatever has been asked before: the fault is told, the others are read, and nothing about it is kept."""
    healthy = probe(FakeMachine([SWITCHED] * 4))
    lost_after = 0
    while True:
        gpus = [SWITCHED, replace(SWITCHED, lost_after=lost_after), SWITCHED, SWITCHED]
        topology = probe(FakeMachine(gpus))
        if topology == healthy:
            break
        assert [device.fault for device in topology.devices] == [None, LOST_WORDS, None, None], lost_after
        assert set(classes(topology)) == {(0, 2), (0, 3), (2, 3)}
        assert topology.notes == (f"links of GPU 1: not known, {LOST_WORDS}",)
        lost_after += 1
    assert lost_after > 80


def test_a_pair_that_is_lost_together_is_unknown(probe: Probe) -> None:
    machine = FakeMachine(TWO, errors={"nvmlDeviceGetTopologyCommonAncestor": {"0-1": LOST}})
    topology = probe(machine)
    assert all(device.fault is None for device in topology.devices)
    assert (dict(topology.links), topology.notes) == (
        {},
        (f"link of GPU 0 and GPU 1: not known, NVML says {LOST_WORDS!r} of the two together",),
    )


def test_what_was_told_before_a_gpu_went_away(probe: Probe) -> None:
    machine = FakeMachine(TWO, errors={"nvmlDeviceGetUUID": {"1": LOST}})
    assert probe(machine).devices[1] == Device(1, "NVIDIA H100 80GB HBM3", fault=LOST_WORDS)


def test_no_gpu_that_can_be_used(probe: Probe) -> None:
    machine = FakeMachine(TWO, errors={"nvmlDeviceGetHandleByIndex_v2": {"0": LOST, "1": RESET}})
    with pytest.raises(TopologyError) as caught:
        probe(machine)
    assert str(caught.value) == (
        "an NVIDIA GPU that can be used was expected, found none among 2:\n"
        f"    GPU 0: {FAULTS[LOST]}\n    GPU 1: {FAULTS[RESET]}\n"
        "  in the NVIDIA driver of this machine\n"
        "  look at 'nvidia-smi' and 'dmesg | grep -i NVRM'; a lost GPU needs a reset of the machine"
    )


# -- CUDA_VISIBLE_DEVICES --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "indices"),
    [("2,0", [0, 2]), ("1", [1]), (uuid_of(2), [2]), ("GPU-00000001", [1]), (" 0 , 2 ", [0, 2])],
)
def test_visible_devices_restrict(probe: Probe, variable: str, indices: list[int]) -> None:
    topology = probe(FakeMachine(THREE), variable)
    assert [device.index for device in topology.devices] == indices
    assert set(topology.links) == set(combinations(indices, 2))


def test_hidden_gpus_are_not_spoken_of(probe: Probe) -> None:
    errors = {"nvmlDeviceGetName": {"0": INVALID, "2": LOST}}
    topology = probe(FakeMachine(THREE, errors=errors, default_pair=FakePair(nvlinks=2)), "1")
    assert topology.notes == ()
    assert [link.remote for link in topology.devices[0].nvlinks] == ["00000000:0A:00.0", "00000000:0C:00.0"]


def test_a_visible_gpu_that_is_lost_stays_listed(probe: Probe) -> None:
    machine = FakeMachine(THREE, errors={"nvmlDeviceGetHandleByIndex_v2": {"1": LOST}})
    assert [device.fault for device in probe(machine, "0,1").devices] == [None, LOST_WORDS]
    with pytest.raises(TopologyError, match="found none among 1:\n    GPU 1: GPU is lost"):
        probe(machine, "1")


@pytest.mark.parametrize(
    ("variable", "found"),
    [("7", "found '7'"), ("0,GPU-ffff", "found 'GPU-ffff'"), ("", "found that it is empty"), ("-1", "found '-1'")],
)
def test_visible_devices_that_do_not_exist(probe: Probe, variable: str, found: str) -> None:
    with pytest.raises(TopologyError) as caught:
        probe(FakeMachine(TWO), variable)
    assert found in str(caught.value)
    assert f"CUDA_VISIBLE_DEVICES={variable}; NVML lists 0 ({uuid_of(0)}), 1 ({uuid_of(1)})" in str(caught.value)
    assert "unset it" in str(caught.value)


def test_mig_instances_cannot_be_used(probe: Probe) -> None:
    with pytest.raises(TopologyError) as caught:
        probe(FakeMachine([FakeGpu(mig=True)]), "MIG-4f1d,MIG-GPU-0/1/0")
    assert str(caught.value) == (
        "CUDA_VISIBLE_DEVICES was expected to list whole GPUs, found MIG instances: MIG-4f1d, MIG-GPU-0/1/0\n"
        "  in the environment: CUDA_VISIBLE_DEVICES=MIG-4f1d,MIG-GPU-0/1/0; MIG instances cannot talk to each other\n"
        f"  list whole GPUs (0 ({uuid_of(0)})) whose MIG mode is off: nvidia-smi -i INDEX -mig 0"
    )


# -- no driver -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "why"),
    [
        (FakeMachine(init_error=DRIVER_NOT_LOADED), "NVML says 'Driver Not Loaded'"),
        (FakeMachine(gpus=[]), "the driver is loaded and lists no GPU"),
    ],
)
def test_no_gpu(probe: Probe, machine: FakeMachine, why: str) -> None:
    with pytest.raises(TopologyError) as caught:
        probe(machine)
    assert f"no NVIDIA GPU was found: {why}" in str(caught.value)
    assert "type --gpu-platform=cpu to run vLLM's CPU build, or --gpu-topology=FILE" in str(caught.value)


def test_nvml_that_does_not_count(probe: Probe) -> None:
    with pytest.raises(TopologyError, match=r"found that NVML says 'Function Not Found'\n.*\n  look at 'nvidia-smi'"):
        probe(FakeMachine(missing=["nvmlDeviceGetCount_v2"]))


def test_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def find_none(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", find_none)
    with pytest.raises(TopologyError, match="no NVIDIA GPU was found: NVML says 'NVML Shared Library Not Found'"):
        NvmlTopology({}).probe()


SCRIPT = "from pytest_gpulayout.adapters.nvml import NvmlTopology; print(*NvmlTopology().probe().links.values())"


def test_a_new_process_loads_the_library_by_its_name(library: Path, tmp_path: Path) -> None:
    environ = os.environ | fake_nvml_environment(library, BRIDGED, tmp_path) | {"CUDA_VISIBLE_DEVICES": "0,1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environ, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("NV4\n", "")


# -- the fake itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ['quotes " and \\ slashes / ', "tab\tline\nreturn\r\b\f", "Größe 大 \U0001f600", ""],
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_the_fake_reads_strings(
    probe: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, ascii_only: bool
) -> None:
    text = json.dumps(FakeMachine([FakeGpu(name=name)]).document(), indent=2, ensure_ascii=ascii_only)
    tmp_path.joinpath("by_hand.json").write_text(text)
    monkeypatch.setenv("FAKE_NVML_CONFIG", str(tmp_path / "by_hand.json"))
    assert NvmlTopology({}).probe().devices[0].name == name


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "a value expected at byte 0"),
        ('{"gpus": [', "a value expected at byte 10"),
        ('{"gpus": [1, ]}', "a value expected at byte 13"),
        ('{"gpus": []} x', "the end of the file expected at byte 13"),
        ("{'gpus': []}", "a name in quotes expected at byte 1"),
        ('{"gpus" []}', "a colon expected at byte 8"),
        ('{"gpus": [1 2]}', "a comma or the end of the list expected at byte 12"),
        ('{"driver": "\\x"}', "unknown escape at byte 14"),
        ('{"driver": "\\ud800"}', "second half of a surrogate pair expected at byte 18"),
        ('{"driver": "\\u12g4"}', "four hexadecimal digits expected at byte 16"),
        ('{"driver": "open', "end of the string expected at byte 16"),
        ('{"cuda": 01}', "a comma or the end of the list expected at byte 10"),
        ('{"cuda": 1.}', "digits expected at byte 11"),
        ('{"cuda": 1e}', "digits of the exponent expected at byte 11"),
        ('{"cuda": nul}', "a value expected at byte 9"),
        ("[" * 65, "nested too deeply at byte 64"),
    ],
)
def test_the_fake_refuses_what_is_no_json(
    probe: Probe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    text: str,
    error: str,
) -> None:
    tmp_path.joinpath("by_hand.json").write_text(text)
    monkeypatch.setenv("FAKE_NVML_CONFIG", str(tmp_path / "by_hand.json"))
    with pytest.raises(TopologyError, match="NVML says 'Unknown Error'"):
        NvmlTopology({}).probe()
    assert capfd.readouterr().err == f"fake NVML: {error}\n"


def test_the_fake_reads_process_lists_again_at_each_call(probe: Probe, tmp_path: Path) -> None:
    import pynvml

    write_machine(FakeMachine(), tmp_path)
    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    assert pynvml.nvmlDeviceGetComputeRunningProcesses(handle) == []
    write_machine(FakeMachine([FakeGpu(processes=[(4242, 1 << 40), (77, MEMORY_UNKNOWN)])]), tmp_path)
    found = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    assert [(process.pid, process.usedGpuMemory) for process in found] == [(4242, 1 << 40), (77, None)]
    assert pynvml.nvmlDeviceGetMPSComputeRunningProcesses(handle) == []
    pynvml.nvmlShutdown()
