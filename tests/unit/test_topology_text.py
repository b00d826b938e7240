from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gpulayout.errors import TopologyFormatError
from pytest_gpulayout.links import parse_link_class
from pytest_gpulayout.topology import Device, Topology
from pytest_gpulayout.topology_text import parse_topology_text

LEGEND = """
Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
  NV#  = Connection traversing a bonded set of # NVLinks
"""

TRIPLE = """\
\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID
GPU0\t X \tNV4\tSYS\tPIX\t0-7,16-23\t0\t\tN/A
GPU1\tNV4\t X \tPHB\tSYS\t0-7,16-23\t0\t\tN/A
GPU2\tSYS\tPHB\t X \tNODE\t8-15\t1\t\tN/A
NIC0\tPIX\tSYS\tNODE\t X \t\t\t\t
"""


def read(text: str) -> Topology:
    return parse_topology_text(text, "topo.txt")


def links_of(topology: Topology) -> dict[tuple[int, int], str]:
    return {pair: str(link) for pair, link in topology.links.items()}


def test_plain_listing() -> None:
    topology = read(TRIPLE + LEGEND)
    assert links_of(topology) == {(0, 1): "NV4", (0, 2): "SYS", (1, 2): "PHB"}
    assert [device.numa_node for device in topology.devices] == [0, 0, 1]
    assert [device.cpu_affinity for device in topology.devices] == ["0-7,16-23", "0-7,16-23", "8-15"]
    assert (topology.source, topology.recorded, topology.platform) == ("topo.txt", True, "cuda")


@pytest.mark.parametrize(
    "text",
    [
        TRIPLE.replace("\n", "\r\n"),
        TRIPLE.expandtabs(8),
        TRIPLE.replace("\t", "  "),
        TRIPLE.replace("\tGPU0\tGPU1", "GPU0\tGPU1", 1),
        TRIPLE.replace("\tGPU0\tGPU1", "\t\x1b[4mGPU0\tGPU1", 1).replace("GPU NUMA ID", "GPU NUMA ID\x1b[0m"),
        TRIPLE.replace("\tGPU0\tGPU1", "\t[4mGPU0\tGPU1", 1).replace("GPU NUMA ID", "GPU NUMA ID[0m"),
        TRIPLE.replace("NIC0", "mlx5_bond_0"),
        TRIPLE.replace("NIC0", "storage"),
        TRIPLE.replace("NIC0\tCPU Affinity", "rocep145s0 CPU Affinity", 1).replace("\nNIC0", "\nrocep145s0"),
        "".join(f"    {line}\n" for line in TRIPLE.splitlines()),
        "".join(f"> {line}\n" for line in TRIPLE.splitlines()),
        "".join(f"worker-1  | {line}\n" for line in TRIPLE.splitlines()),
        "".join(f"2025-05-21T09:40:0{i} {line}\n" for i, line in enumerate(TRIPLE.splitlines())),
        TRIPLE.replace("\n", "\n\n"),
        TRIPLE.replace("NIC0\tPIX", "some other rank wrote this\nNIC0\tPIX"),
        TRIPLE.replace("GPU2\tSYS", "rank 1: using GPU 1\nGPU2\tSYS"),
        TRIPLE + LEGEND + "\n$ date\n" + TRIPLE,
        "GPU0\tGPU1\tGPU2\n\n" + TRIPLE,
        TRIPLE.replace("8-15\t1\t\tN/A", "8-15\t1\t\tN/A   <- the slow one"),
        "\n".join(line for line in TRIPLE.splitlines() if not line.startswith("NIC0")),
        TRIPLE.replace("\n", "\r\r\n"),
        TRIPLE.replace("\t", "\xa0\xa0"),
        "\ufeff" + TRIPLE,
        "\x1b]0;user@node: ~\x07\x1b[?2004l" + TRIPLE.replace("GPU1\t", "\x1b[38:5:2mGPU1\x1b(B\x1b[m\t"),
        TRIPLE.replace("\tGPU0\tGPU1", "\t^[[4mGPU0\tGPU1", 1).replace("GPU NUMA ID", "GPU NUMA ID^[[0m"),
        TRIPLE.replace("GPU2\tSYS", TRIPLE.splitlines()[0] + "\nGPU2\tSYS"),
        TRIPLE + "\nNIC Legend:\n\n  NIC0: mlx5_0\n",
        "GPU 0: NVIDIA A100 80GB PCIe\n" + TRIPLE,
        "\n".join(TRIPLE.splitlines()[i] for i in (0, 4, 3, 1, 2)),
    ],
)
def test_the_same_listing_as_people_keep_it(text: str) -> None:
    assert read(text) == read(TRIPLE)


def test_cells_that_run_into_each_other() -> None:
    text = "GPU0GPU1 mlx5_10mlx5_11CPU Affinity\nGPU0 X NODESYSPXB0-3\nGPU1 NODE XPXBSYS 4-7\n"
    topology = read(text)
    assert links_of(topology) == {(0, 1): "NODE"}
    assert [device.cpu_affinity for device in topology.devices] == ["0-3", "4-7"]


MARKDOWN = """\
| CPU Affinity | NUMA Affinity |      | GPU0 | GPU1 | mlx5_0 |
|--------------|---------------|------|------|------|--------|
| 0-7          | 1             | GPU0 | X    | NV2  | SYS    |
| 8-15         | 0             | GPU1 | NV2  | X    | PHB    |
|              |               | mlx5_0 | SYS | PHB | X      |
"""


@pytest.mark.parametrize(
    "text",
    [
        MARKDOWN,
        MARKDOWN.replace("|      | GPU0", "| From | GPU0"),
        MARKDOWN.replace("| GPU0 | X", "| **GPU0** | `X`"),
        "".join(line.strip("|") + "\n" for line in MARKDOWN.splitlines()),
    ],
)
def test_markdown_table_in_any_column_order(text: str) -> None:
    topology = read(text)
    assert links_of(topology) == {(0, 1): "NV2"}
    assert [(device.numa_node, device.cpu_affinity) for device in topology.devices] == [(1, "0-7"), (0, "8-15")]


@pytest.mark.parametrize(
    ("header", "cells", "cpu", "numa"),
    [
        ("CPU Affinity\tNUMA Affinity\tGPU NUMA ID", "0-7\t0\t\tN/A", "0-7", 0),
        ("CPU Affinity\tNUMA Affinity\tGPU NUMA ID", "\t0\t\tN/A", "", 0),
        ("CPU Affinity\tNUMA Affinity\tGPU NUMA ID", "1\t1\t\tN/A", "1", 1),
        ("CPU Affinity\tNUMA Affinity", "0-127\t\tN/A", "0-127", None),
        ("CPU Affinity\tNUMA Affinity", "0,2,4\t0-3", "0,2,4", "0-3"),
        ("CPU Affinity\tNUMA Affinity", "\t1", "", 1),
        ("CPU Affinity\tNUMA Affinity", "0-7\t", "0-7", None),
        ("CPU Affinity", "0-7", "0-7", None),
        ("CPU Affinity", "", "", None),
        ("", "", None, None),
    ],
)
@pytest.mark.parametrize("width", [None, 8])
def test_affinity_cells(width: int | None, header: str, cells: str, cpu: str | None, numa: object) -> None:
    text = f"\tGPU0\tGPU1\t{header}\nGPU0\t X \tSYS\t{cells}\nGPU1\tSYS\t X \t{cells}\n"
    topology = read(text.expandtabs(width) if width else text)
    assert {(device.cpu_affinity, device.numa_node) for device in topology.devices} == {(cpu, numa)}


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ("0-71\t0\t\t2", 2),
        ("0-71\t0\t\tN/A", None),
        ("\t0\t\t10", 10),
        ("0-71\t\tN/A\t\tN/A", None),
        ("0-71\t0", None),
    ],
)
def test_gpu_numa_id(cells: str, expected: int | None) -> None:
    """On Grace it is the node of the GPU's own memory; elsewhere N/A."""
    text = f"\tGPU0\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\nGPU0\t X \tNODE\t{cells}\n"
    assert [device.gpu_numa_id for device in read(text).devices] == [expected]


def test_rows_and_columns_in_another_order_and_not_of_all_gpus() -> None:
    text = "\tGPU5\tNIC1\tGPU2\nNIC1\tSYS\t X \tPIX\nGPU2\tNV4\tPIX\t X \nGPU5\t X \tSYS\tNV4\n"
    topology = read(text)
    assert links_of(topology) == {(2, 5): "NV4"}
    assert [device.index for device in topology.devices] == [2, 5]


def test_gpus_keep_their_numbers() -> None:
    topology = read("\tGPU4\tGPU10\nGPU4\t X \tNV6\nGPU10\tNV6\t X \n")
    assert [device.index for device in topology.devices] == [4, 10]
    assert links_of(topology) == {(4, 10): "NV6"}


def test_header_that_was_cut_off() -> None:
    rows = [line for line in TRIPLE.splitlines() if line.startswith("GPU")]
    assert links_of(read("\n".join(rows))) == links_of(read(TRIPLE))


@pytest.mark.parametrize("unknown", ["N/A", "???", "ERR!"])
def test_unknown_cells_are_unknown_links(unknown: str) -> None:
    topology = read(TRIPLE.replace("PHB", unknown))
    assert links_of(topology) == {(0, 1): "NV4", (0, 2): "SYS"}
    assert topology.worst() is None


def test_old_name_of_sys_is_kept() -> None:
    topology = read("\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tSOC\t0-5\nGPU1\tSOC\t X \t6-11\n")
    assert links_of(topology) == {(0, 1): "SOC"}
    assert topology.link(0, 1) == parse_link_class("SYS")


P2P = " \tGPU0\tGPU1\tGPU2\t\n GPU0\tX\tOK\tCNS\t\n GPU1\tOK\tX\tNS\t\n GPU2\tCNS\tNS\tX\t\n"


@pytest.mark.parametrize(
    ("command", "capability"),
    [
        ("$ nvidia-smi topo -p2p r\n", "r"),
        ("nvidia-smi topo --p2p_status n\n", "n"),
        ("nvidia-smi topo -p2p\n", None),
        ("nvidia-smi topo -m\n", None),
        ("", None),
    ],
)
def test_p2p_listing(command: str, capability: str | None) -> None:
    topology = read(command + P2P)
    assert [(p.a, p.b, p.status) for p in topology.p2p] == [(0, 1, "OK"), (0, 2, "CNS"), (1, 2, "NS")]
    assert {p.capability for p in topology.p2p} == {capability}
    assert topology.links == {}
    assert not topology.settles_links


def test_links_and_p2p_in_one_file() -> None:
    topology = read(f"nvidia-smi topo -m\n{TRIPLE}{LEGEND}\nnvidia-smi topo -p2p n\n{P2P}{LEGEND}")
    assert links_of(topology) == links_of(read(TRIPLE))
    assert [p.capability for p in topology.p2p] == ["n"] * 3
    assert topology.devices == read(TRIPLE).devices


def test_links_are_those_of_m_where_mp_follows() -> None:
    pcie_only = TRIPLE.replace("NV4", "PHB")
    assert read(f"== topo -m\n{TRIPLE}\n== nvidia-smi topo -mp\n{pcie_only}") == read(TRIPLE)


LISTED = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a70)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a71)
  MIG 3g.20gb     Device  0: (UUID: MIG-1d5ba0d6-d33d-5b2c-924d-9e3d8d2b8a71)
  MIG 1g.5gb      Device  1: (UUID: MIG-2d5ba0d6-d33d-5b2c-924d-9e3d8d2b8a71)
GPU 7: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
"""


@pytest.mark.parametrize("text", [LISTED + TRIPLE, TRIPLE + LEGEND + LISTED, LISTED + LISTED + TRIPLE])
def test_nvidia_smi_l_gives_names_uuids_and_mig(text: str) -> None:
    topology = read(text)
    name, uuid = "NVIDIA A100-SXM4-40GB", "GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a7"
    facts = [(device.name, device.uuid, device.mig) for device in topology.devices]
    assert facts == [(name, f"{uuid}0", None), (name, f"{uuid}1", True), (None, None, None)]
    assert links_of(topology) == links_of(read(TRIPLE))


@pytest.mark.parametrize(
    ("listed", "name"),
    [
        ("GPU 0: NVIDIA L4 (UUID: GPU-xxxxxxxx)\n", "NVIDIA L4"),
        (LISTED + LISTED.replace("8a70", "8b70"), None),
        ("GPU 0: initialised\n", None),
    ],
)
def test_a_uuid_that_is_no_uuid_or_not_the_only_one_is_not_taken(listed: str, name: str | None) -> None:
    device = read(listed + TRIPLE).devices[0]
    assert (device.name, device.uuid, device.mig) == (name, None, None)


ROCM_SMI = """\
============================ ROCm System Management Interface ============================
================================ Weight between two GPUs =================================
       GPU0         GPU1
GPU0   0            15
GPU1   15           0

================================= Hops between two GPUs ==================================
       GPU0         GPU1
GPU0   0            1
GPU1   1            0

=============================== Link Type between two GPUs ===============================
       GPU0         GPU1
GPU0   0            XGMI
GPU1   XGMI         0

======================================= Numa Nodes =======================================
GPU[0]\t\t: (Topology) Numa Node: 0
GPU[0]\t\t: (Topology) Numa Affinity: 0
GPU[1]\t\t: (Topology) Numa Node: 3
GPU[1]\t\t: (Topology) Numa Affinity: 3
================================== End of ROCm SMI Log ===================================
"""

AMD_SMI = """\
ACCESS TABLE:
             0000:0c:00.0 0000:22:00.0
0000:0c:00.0 ENABLED      ENABLED
0000:22:00.0 ENABLED      ENABLED

LINK TYPE TABLE:
             0000:0c:00.0 0000:22:00.0
0000:0c:00.0 SELF         PCIE
0000:22:00.0 PCIE         SELF
"""


def amd_table(title: str, own: str, other: str) -> str:
    header = " " * 13 + "0000:0c:00.0 0000:22:00.0"
    return f"{title} TABLE:\n{header}\n0000:0c:00.0 {own:12} {other}\n0000:22:00.0 {other:12} {own}\n"


ALL_OF_AMD_SMI = "".join(
    amd_table(*words)
    for words in [
        ("ACCESS", "ENABLED", "DISABLED"),
        ("WEIGHT", "0", "40"),
        ("HOPS", "0", "2"),
        ("LINK TYPE", "SELF", "PCIE"),
        ("NUMA BW", "N/A", "50000-100000"),
        ("CACHE COHERANCY", "SELF", "NC"),
        ("ATOMICS", "SELF", "64,32"),
        ("DMA", "SELF", "N/A"),
        ("BI-DIRECTIONAL", "SELF", "T"),
    ]
)


@pytest.mark.parametrize(
    "text",
    [
        ROCM_SMI,
        ROCM_SMI.replace("GPU[0]", "GPU 0 ").replace("GPU[1]", "GPU 1 "),
        ROCM_SMI.replace("===\n", "===\x1b[0m\n").replace("\n===", "\n\x1b[32m==="),
        ROCM_SMI.replace("Weight between", "Link accessibility between").replace("15", "True"),
        "=== Link Type" + ROCM_SMI.split("=== Link Type")[1],
    ],
)
def test_rocm_smi(text: str) -> None:
    topology = read(text)
    assert links_of(topology) == {(0, 1): "XGMI"}
    assert [device.numa_node for device in topology.devices] == [0, 3]
    assert topology.platform == "rocm"


def test_rocm_smi_with_one_gpu() -> None:
    topology = read("====== Link Type between two GPUs ======\n       GPU0         \nGPU0   0            \n")
    assert (len(topology.devices), topology.links, topology.platform) == (1, {}, "rocm")


@pytest.mark.parametrize("text", [AMD_SMI, ALL_OF_AMD_SMI, AMD_SMI + ALL_OF_AMD_SMI])
def test_amd_smi_names_devices_by_bus_id(text: str) -> None:
    topology = read(text)
    assert links_of(topology) == {(0, 1): "PCIE"}
    assert [device.pci_bus_id for device in topology.devices] == ["0000:0c:00.0", "0000:22:00.0"]
    assert topology.platform == "rocm"


def test_amd_smi_without_a_known_link_type() -> None:
    topology = read(amd_table("LINK TYPE", "SELF", "UNKNOWN"))
    assert (len(topology.devices), topology.links, topology.settles_links) == (2, {}, False)


@pytest.mark.parametrize(
    ("text", "line", "column", "message"),
    [
        (ROCM_SMI.split("=== Link Type")[0], 0, 0, "found only AMD's weight, hops\n"),
        (amd_table("DMA", "SELF", "N/A"), 0, 0, "found only AMD's dma\n"),
        (amd_table("LINK TYPE", "SELF", "FAST"), 3, 27, "PCIE) was expected, found 'FAST'"),
        ('[\n    {\n        "gpu": 0,\n', 0, 0, "found JSON, and no table in 3 lines"),
        ("gpu,bdf,weight\n0,0000:0c:00.0,15\n", 0, 0, "found CSV, and no table in 2 lines"),
    ],
)
def test_refuses_what_amd_tools_print_without_links(text: str, line: int, column: int, message: str) -> None:
    with pytest.raises(TopologyFormatError) as error:
        read(text)
    assert message in str(error.value)
    assert (error.value.line, error.value.column) == (line, column)
    assert "record it again, not as JSON or CSV: rocm-smi --showtopo > topo.txt" in str(error.value)


def test_excerpt_with_affinity_only_has_no_links() -> None:
    topology = read("$ nvidia-smi topo -mp\n  CPU Affinity    NUMA Affinity\nGPU0    48-63   3\nGPU1    0-15 1\n\n")
    assert [(device.cpu_affinity, device.numa_node) for device in topology.devices] == [("48-63", 3), ("0-15", 1)]
    assert topology.links == {}
    assert not topology.settles_links


@pytest.mark.parametrize(
    ("text", "line", "column", "message"),
    [
        ("", 0, 0, "a table of links between GPUs was expected, found none in 0 lines"),
        ("no devices were found\n", 0, 0, "found none in 1 line\n"),
        (LEGEND, 0, 0, "found none"),
        ("using GPU0\nGPU0 is ready\n", 0, 0, "found none"),
        ("GPU0 X marks the spot\n", 0, 0, "found none"),
        ("GPU0 X OK\nGPU1 OK X\n", 0, 0, "found none"),
        ("GPU0 X SYS\nGPU1 SYS X NV4\n", 0, 0, "found none"),
        (TRIPLE.replace("NV4\t X ", "SYS\t X "), 3, 6, "expected for GPU1-GPU0 as for GPU0-GPU1 in line 2 (NV4)"),
        (TRIPLE.replace("PHB", "PHX", 1), 3, 14, "a link class (NV#, PIX"),
        (TRIPLE.replace("PHB", "...", 1), 3, 14, "found '...'"),
        (TRIPLE.replace("PHB", "NV0", 1), 3, 14, "found 'NV0'"),
        (TRIPLE.replace(" X \tPHB", "NV4\tPHB"), 3, 10, "X was expected where GPU1 meets itself, found 'NV4'"),
        (TRIPLE.split("GPU2\tSYS")[0], 1, 0, "a row for each of the 3 GPUs of the header was expected, found none"),
        (TRIPLE.split("\tPHB\t X")[0], 4, 1, "4 cells were expected in the row of GPU2"),
        (TRIPLE.replace("GPU1\tNV4", "GPU0\tNV4"), 3, 1, "one row for GPU0 was expected, found a second"),
        (TRIPLE.replace("GPU2\tNIC0", "NIC0", 1), 2, 18, "the header in line 1, found one more, 'PIX'"),
        (TRIPLE.replace("GPU2\t", "GP2\t", 1), 4, 1, "a column for GPU2 was expected in the header in line 1"),
        ("\tGPU0\tGPU0\nGPU0\t X \tSYS\n", 1, 0, "each device once was expected in the header"),
        (TRIPLE + TRIPLE.replace("NV4", "SYS"), 6, 0, "found a table that differs from the one in line 1"),
        ("nvidia-smi topo -mp\n" + TRIPLE, 2, 0, "found topo -mp, which shows PCIe only and never NVLink"),
        ("\tGPU0\nGPU0\t X \tSYS\n", 2, 10, "1 cell was expected in the row of GPU0"),
        (TRIPLE.replace("PHB", "\x1b[31mPHX\x1b[0m", 1), 3, 19, "found 'PHX'"),
        (TRIPLE.replace("PHB", "N" * 60, 1), 3, 14, f"found '{'N' * 37}...'"),
        (f"topo -p2p r\n{P2P}\ntopo -p2p r\n{P2P.replace('CNS', 'NS')}", 8, 0, "one machine was expected"),
        (TRIPLE + "\n" + P2P.replace("GPU2", "GPU3"), 7, 0, "differs from the one in line 1"),
        (P2P.replace("OK", "NS", 1), 3, 7, "(NS), found OK"),
        (P2P.replace("CNS", "SOSO", 1), 2, 12, "a status (OK, CNS, GNS, TNS, DR, NS, U) was expected"),
    ],
)
def test_refuses_what_is_not_settled(text: str, line: int, column: int, message: str) -> None:
    with pytest.raises(TopologyFormatError) as error:
        read(text)
    assert message in str(error.value)
    assert (error.value.line, error.value.column, error.value.source) == (line, column, "topo.txt")
    assert "record it again: nvidia-smi topo -m > topo.txt" in str(error.value)


CPU_LISTS = ["", "0-7", "0-23,48-71", "0,2,4,6,8,10", "3"]


@st.composite
def machines(draw: st.DrawFn) -> Topology:
    """What ``nvidia-smi topo -m`` can say: any links, and affinities that it knows or not."""
    indices = draw(st.lists(st.integers(0, 20), min_size=1, max_size=9, unique=True))
    with_id = draw(st.booleans())
    devices = [
        Device(
            index,
            cpu_affinity=draw(st.sampled_from(CPU_LISTS)),
            numa_node=draw(st.sampled_from([None, 0, 1, 12, "0-3"])),
            gpu_numa_id=draw(st.sampled_from([None, 2, 10])) if with_id else None,
        )
        for index in indices
    ]
    links = [f"NV{n}" for n in (1, 4, 18)] + ["PIX", "PXB", "PHB", "NODE", "SYS"]
    pairs = combinations(sorted(indices), 2)
    return Topology(
        tuple(sorted(devices, key=lambda device: device.index)),
        {pair: parse_link_class(draw(st.sampled_from(links))) for pair in pairs},
        source="topo.txt",
        recorded=True,
    )


def print_as_nvidia_smi(topology: Topology, order: list[Device], nics: int) -> str:
    """A tab before the header, and two before what may be N/A."""
    names = [f"GPU{device.index}" for device in order] + [f"NIC{i}" for i in range(nics)]
    rows = ["\t" + "\t".join([*names, "CPU Affinity", "NUMA Affinity", "GPU NUMA ID"])]
    for device in order:
        cells = [" X " if other is device else str(topology.link(device.index, other.index)) for other in order]
        numa = "\tN/A" if device.numa_node is None else str(device.numa_node)
        gpu_numa = "N/A" if device.gpu_numa_id is None else str(device.gpu_numa_id)
        cells += ["SYS"] * nics + [str(device.cpu_affinity), numa, f"\t{gpu_numa}"]
        rows.append("\t".join([f"GPU{device.index}", *cells]))
    rows += [f"NIC{i}\t" + "\t".join(["SYS"] * len(order) + ["PIX"] * nics) + "\t\t\t\t" for i in range(nics)]
    return "\n".join(rows) + "\n"


@settings(max_examples=100, deadline=None)
@given(data=st.data(), topology=machines(), nics=st.integers(0, 3))
def test_round_trip(data: st.DataObject, topology: Topology, nics: int) -> None:
    """Any matrix that nvidia-smi can print is read as it is, in any order of devices."""
    text = print_as_nvidia_smi(topology, data.draw(st.permutations(topology.devices)), nics)
    assert read(text) == topology
    assert read(text.expandtabs(8)) == topology


@settings(max_examples=150, deadline=None)
@given(
    start=st.integers(0, len(TRIPLE)), length=st.integers(0, 40), filler=st.text("GPUNIC0123 X\tSYSNV|\n", max_size=8)
)
def test_damage_never_changes_a_link(start: int, length: int, filler: str) -> None:
    """A damaged listing is refused, or what is left of it is true."""
    try:
        topology = read(TRIPLE[:start] + filler + TRIPLE[start + length :])
    except TopologyFormatError:
        return
    assert links_of(topology).items() <= links_of(read(TRIPLE)).items()
