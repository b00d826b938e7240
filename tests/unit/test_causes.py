from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import pytest

from pytest_gpulayout.causes import Finding, SlowUse, explain_transports
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.links import parse_link_class
from pytest_gpulayout.nccl_log import LogLine, NcclLog, is_socket, merge, parse_nccl_log
from pytest_gpulayout.surroundings import PciSlot, RankSurroundings, Surroundings
from pytest_gpulayout.topology import SWITCH, Device, Fabric, NvLinks, P2pStatus, Topology

SHM, SOCKET, P2P = "SHM/direct/direct", "NET/Socket/0", "P2P/CUMEM"
NOTHING: Mapping[str, str] = MappingProxyType({})


# -- what is given ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """Two ranks over one transport, and what is known around them."""

    lines: tuple[str, ...] = ()
    transport: str | None = SHM
    hosts: tuple[str, str] = ("gpu-a1", "gpu-a1")
    surroundings: Surroundings | None = None
    topology: Topology | None = None
    layout: str | None = None
    nodes: int | None = None
    server: tuple[str, ...] = ()

    def findings(self) -> tuple[Finding, ...]:
        log = merge(log_of_rank(rank, self) for rank in (0, 1))
        return explain_transports(
            log,
            self.slow(log),
            layout=parse_layout(self.layout) if self.layout else None,
            surroundings=self.surroundings,
            topology=self.topology,
            placement=(0, 1),
            server_lines=[LogLine("server.log", at, text) for at, text in enumerate(self.server, start=1)],
        )

    def slow(self, log: NcclLog) -> tuple[SlowUse, ...]:
        if self.transport is None:
            return (SlowUse(0, 1, None),)
        return tuple(
            SlowUse(src, dst, transport, seen.first)
            for (src, dst, transport), seen in log.links.items()
            if dst is not None and (is_socket(transport) or transport.startswith("SHM"))
        )

    def causes(self) -> list[str]:
        return [finding.cause for finding in self.findings()]


def log_of_rank(rank: int, given: Given) -> NcclLog:
    """As ``NCCL_DEBUG_FILE=nccl.%h.%p`` writes it; the lines of interest stand in that of rank 0."""
    host = given.hosts[rank]
    nodes = given.nodes or len(set(given.hosts))
    messages = [
        f"ncclCommInitRank comm 0x7a0 rank {rank} nranks 2 cudaDev 0 nvmlDev {rank} commId 0x9f - Init START",
        f"comm 0x7a0 rank {rank} nRanks 2 nNodes {nodes} localRanks {2 // nodes} localRank 0 MNNVL 0",
    ]
    if given.transport is not None:
        end = "[send] " if given.transport.startswith("NET") else ""
        messages.append(f"Channel 00/0 : {rank}[{rank}] -> {1 - rank}[{1 - rank}] {end}via {given.transport}")
    texts = [f"{host}:{100 + rank}:{150 + rank} [0] NCCL INFO {message}" for message in messages]
    first = [line if "NCCL WARN" in line else f"{host}:100:150 [0] NCCL INFO {line}" for line in given.lines]
    return parse_nccl_log([*(first if rank == 0 else []), *texts], f"nccl.{host}.{100 + rank}")


def warning(text: str) -> str:
    return f"gpu-a1:100:150 [0] transport/shm.cc:90 NCCL WARN {text}"


def setting(name: str, value: str) -> str:
    return f"{name} set by environment to {value}"


def machine(
    *environments: Mapping[str, str] | None,
    rdma: tuple[str, ...] | None = None,
    command_line: str | None = None,
    iommu_groups: int | None = None,
    slots: Mapping[str, PciSlot] | None = None,
    **of_each_rank: object,
) -> Surroundings:
    """Ranks 4242, 4243, ... of this machine, by default two with nothing set."""
    ranks = {
        rank: replace(RankSurroundings(4242 + rank, environment=environment), **of_each_rank)  # type: ignore[arg-type]
        for rank, environment in enumerate(environments or (NOTHING, NOTHING))
    }
    return Surroundings(ranks, rdma, command_line, iommu_groups, slots or {})


def second_rank(given: Surroundings, **changes: object) -> Surroundings:
    changed = replace(given.ranks[1], **changes)  # type: ignore[arg-type]
    return replace(given, ranks={**given.ranks, 1: changed})


def gpus(
    link: str = "PIX",
    *,
    name: str = "NVIDIA A40",
    p2p: tuple[tuple[str | None, str], ...] = (),
    nvlinks: tuple[NvLinks, ...] = (),
    fabric: Fabric | None = None,
) -> Topology:
    devices = tuple(
        Device(at, name, f"GPU-{at}", f"00000000:{bus}:00.0", nvlinks=nvlinks, fabric=fabric)
        for at, bus in enumerate(("1A", "1B"))
    )
    statuses = tuple(P2pStatus(0, 1, capability, status) for capability, status in p2p)
    return Topology(devices, {(0, 1): parse_link_class(link)}, "NVML", recorded=False, p2p=statuses)


# -- what is expected ------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A cause with its evidence; ``control`` has no such evidence and must not name the cause."""

    given: Given
    cause: str
    file: str
    text: str
    advice: str
    control: Given

    @property
    def id(self) -> str:
        return self.cause


P2P_OFF = setting("NCCL_P2P_DISABLE", "1")
SHARED = {"ipc": "ipc:[1]", "pid": "pid:[2]", "uts": "uts:[3]"}
DOWN, UP = NvLinks((0, 1, 2, 3), active=False), NvLinks(tuple(range(18)), active=True, remote=SWITCH)
SWITCHED = Given(
    ("Using network IB",), transport=P2P, topology=gpus("NV18", nvlinks=(UP,), fabric=Fabric("completed", "Success"))
)
NO_IB = "NET/IB : No device found."
APART = ("gpu-a1", "gpu-b7")
LOG = "nccl.gpu-a1.100"

SETTINGS = [
    Row(
        Given((P2P_OFF,)),
        P2P_OFF,
        LOG,
        "NCCL_P2P_DISABLE set by environment to 1",
        "unset NCCL_P2P_DISABLE",
        Given((setting("NCCL_P2P_DISABLE", "0"),)),
    ),
    Row(
        Given((setting("NCCL_P2P_LEVEL", "LOC"),)),
        "NCCL_P2P_LEVEL set by environment to LOC",
        LOG,
        "LOC",
        "unset NCCL_P2P_LEVEL",
        Given((setting("NCCL_P2P_LEVEL", "SYS"),)),
    ),
    Row(
        Given(surroundings=machine({}, {"NCCL_P2P_LEVEL": "0"})),
        "NCCL_P2P_LEVEL set by environment to 0",
        "/proc/4243/environ of rank 1",
        "NCCL_P2P_LEVEL=0",
        "unset NCCL_P2P_LEVEL",
        Given(surroundings=machine({}, {"NCCL_P2P_LEVEL": "4"})),
    ),
    Row(
        Given((setting("NCCL_SHM_DISABLE", "1"),), transport=SOCKET),
        "NCCL_SHM_DISABLE set by environment to 1",
        LOG,
        "NCCL_SHM_DISABLE",
        "unset NCCL_SHM_DISABLE",
        Given((setting("NCCL_SHM_DISABLE", "1"),), transport=SOCKET, hosts=APART),
    ),
    Row(
        Given((setting("NCCL_IB_DISABLE", "1"),), transport=SOCKET, hosts=APART),
        "NCCL_IB_DISABLE set by environment to 1",
        LOG,
        "NCCL_IB_DISABLE",
        "unset NCCL_IB_DISABLE",
        Given((setting("NCCL_IB_DISABLE", "1"),), transport=SOCKET),
    ),
    Row(
        Given((setting("NCCL_NET", "Socket"),), transport=SOCKET, hosts=APART),
        "NCCL_NET set by environment to Socket",
        LOG,
        "NCCL_NET",
        "unset NCCL_NET",
        Given((setting("NCCL_NET", "IB"),), transport=SOCKET, hosts=APART),
    ),
    Row(
        Given((setting("NCCL_NET_PLUGIN", "none"),), transport=SOCKET, hosts=APART),
        "NCCL_NET_PLUGIN set by environment to none",
        LOG,
        "NCCL_NET_PLUGIN",
        "unset NCCL_NET_PLUGIN",
        Given((setting("NCCL_NET_PLUGIN", "ofi"),), transport=SOCKET, hosts=APART),
    ),
    Row(
        Given(surroundings=machine(configuration=(LogLine("/etc/nccl.conf of rank 0", 3, "NCCL_P2P_DISABLE=1"),))),
        "NCCL_P2P_DISABLE set by /etc/nccl.conf to 1",
        "/etc/nccl.conf of rank 0",
        "NCCL_P2P_DISABLE=1",
        "take NCCL_P2P_DISABLE out of /etc/nccl.conf",
        Given(surroundings=machine(configuration=(LogLine("/etc/nccl.conf of rank 0", 3, "NCCL_DEBUG=INFO"),))),
    ),
]
PLACES = [
    Row(
        Given((warning("Error: failed to extend /dev/shm/nccl-q1W to 9637892 bytes"),), transport=None),
        "/dev/shm is too small for NCCL",
        LOG,
        "failed to extend /dev/shm",
        "--shm-size",
        Given(
            (warning("Error while attaching to shared memory segment /dev/shm/nccl-q1W (size 64)"),), transport=None
        ),
    ),
    Row(
        Given(
            ("transport/shm.cc:114 -> 2",), transport=None, surroundings=machine(shm_device=57, shm_bytes=64 * 2**20)
        ),
        "/dev/shm is too small for NCCL",
        "/dev/shm of rank 0",
        "64 MiB for 2 ranks",
        "mount -o remount,size=8g /dev/shm",
        Given(("transport/shm.cc:114 -> 2",), transport=None, surroundings=machine(shm_device=57, shm_bytes=2**33)),
    ),
    Row(
        Given(
            transport=None,
            surroundings=machine(shm_device=57, shm_bytes=64 * 2**20, container="/.dockerenv"),
            server=("INFO ready", "Bus error (core dumped)"),
        ),
        "/dev/shm is too small for NCCL",
        "/dev/shm of rank 0",
        "64 MiB",
        "--shm-size",
        Given(transport=None, surroundings=machine(shm_device=57, shm_bytes=64 * 2**20), server=("Killed",)),
    ),
    Row(
        Given(
            (warning("Error while attaching to shared memory segment /dev/shm/nccl-q1W (size 64)"),), transport=None
        ),
        "a rank cannot attach to the shared memory of another: they have separate /dev/shm",
        LOG,
        "attaching",
        "--ipc=host",
        Given((warning("Error while creating shared memory segment /dev/shm/nccl-q1W (size 64)"),), transport=None),
    ),
    Row(
        Given(
            (warning("Error while creating shared memory segment /dev/shm/nccl-q1W: Permission denied (13)"),), None
        ),
        "NCCL may not create files in /dev/shm",
        LOG,
        "Permission denied",
        "1777",
        Given((warning("Call to open failed : Permission denied"),), None),
    ),
    Row(
        Given((setting("NCCL_SOCKET_IFNAME", "eth9"), warning("Bootstrap : no socket interface found")), None),
        "NCCL found no network interface: NCCL_SOCKET_IFNAME is eth9",
        LOG,
        "no socket interface found",
        "ip addr",
        Given((setting("NCCL_SOCKET_IFNAME", "eth9"), "Bootstrap: Using eth9:192.0.2.7<0>"), SOCKET),
    ),
    Row(
        Given((warning("Bootstrap : no socket interface found"),), None),
        "NCCL found no network interface",
        LOG,
        "no socket interface found",
        "ip addr",
        Given(("NET/Socket : Using [0]eth0:192.0.2.7<0>",), None),
    ),
    Row(
        Given((warning("Error: network ofi not found."),), None),
        "NCCL has no network of the name that NCCL_NET asks for",
        LOG,
        "network ofi not found",
        "unset NCCL_NET",
        Given(("Using network IB",), None),
    ),
    Row(
        Given(
            (warning("MNNVL (cliqueSize 8) is available but not working on some system. Check the IMEX channel"),),
            None,
        ),
        "the IMEX channel does not work: NVLink between trays cannot be used",
        LOG,
        "IMEX",
        "nvidia-imex",
        Given(("MNNVL 1 cliqueId 7 cliqueSize 8 cliqueRank 0",), None),
    ),
    Row(
        Given(
            surroundings=second_rank(
                machine(namespaces=SHARED), namespaces={**SHARED, "ipc": "ipc:[9]", "pid": "pid:[8]"}
            )
        ),
        "ranks 0 and 1 are in separate containers with different ipc namespace and pid namespace",
        "/proc/4242 of rank 0 and /proc/4243 of rank 1",
        "ipc namespace: ipc:[1] and ipc:[9]; pid namespace: pid:[2] and pid:[8]",
        "--ipc=host",
        Given(surroundings=machine(namespaces=SHARED)),
    ),
    Row(
        Given(transport=SOCKET, hosts=APART, surroundings=second_rank(machine(shm_device=57), shm_device=61)),
        "ranks 0 and 1 are on one machine with different /dev/shm",
        "/proc/4242 of rank 0 and /proc/4243 of rank 1",
        "/dev/shm: device 57 and device 61",
        "run all ranks in one container",
        Given(transport=SOCKET, hosts=APART, surroundings=second_rank(machine(shm_device=57), shm_device=None)),
    ),
    Row(
        Given(transport=SOCKET, surroundings=machine({"NCCL_HOSTID": "a"}, {"NCCL_HOSTID": "b"})),
        "ranks 0 and 1 are on one machine with different NCCL_HOSTID",
        "/proc/4242 of rank 0 and /proc/4243 of rank 1",
        "NCCL_HOSTID: a and b",
        "run all ranks in one container",
        Given(transport=SOCKET, surroundings=machine({"NCCL_HOSTID": "a"}, {"NCCL_HOSTID": "a"})),
    ),
    Row(
        Given(transport=SOCKET, hosts=APART, layout="tp2"),
        "ranks 0 and 1 have different host names: gpu-a1 and gpu-b7",
        LOG,
        "0[0] -> 1[1] [send] via NET/Socket/0",
        "--uts=host",
        Given(transport=SOCKET, hosts=APART, layout="tp2@2"),
    ),
    Row(
        Given(transport=SOCKET, nodes=2),
        "NCCL takes gpu-a1 for 2 nodes",
        "nccl.gpu-a1.100, nccl.gpu-a1.101",
        "nNodes 2",
        "NCCL_HOSTID",
        Given(transport=SOCKET, hosts=APART),
    ),
    Row(
        Given((NO_IB,), SOCKET, APART),
        "NCCL found no RDMA device",
        LOG,
        NO_IB,
        "ibv_devices",
        Given((NO_IB,), SOCKET),
    ),
    Row(
        Given(transport=SOCKET, hosts=APART, surroundings=Surroundings(rdma_devices=())),
        "the machine has no RDMA device",
        "/sys/class/infiniband",
        "empty",
        "ibv_devices",
        Given(transport=SOCKET, hosts=APART, surroundings=Surroundings(rdma_devices=None)),
    ),
    Row(
        Given((NO_IB,), SOCKET, APART, Surroundings({0: RankSurroundings(7, verbs=())}, rdma_devices=("mlx5_0",))),
        "the container has no RDMA device, the machine has mlx5_0",
        "/dev/infiniband of rank 0",
        "no uverbs device",
        "--device=/dev/infiniband",
        Given(
            (NO_IB,),
            SOCKET,
            APART,
            Surroundings({0: RankSurroundings(7, verbs=("uverbs0",))}, rdma_devices=("mlx5_0",)),
        ),
    ),
    Row(
        Given(
            (setting("NCCL_IB_HCA", "=mlx5_7:1,mlx5_8"),),
            SOCKET,
            APART,
            Surroundings(rdma_devices=("mlx5_0", "mlx5_1")),
        ),
        "NCCL_IB_HCA==mlx5_7:1,mlx5_8 matches none of the RDMA devices mlx5_0, mlx5_1",
        LOG,
        "NCCL_IB_HCA",
        "unset NCCL_IB_HCA",
        Given((setting("NCCL_IB_HCA", "mlx5"),), SOCKET, APART, Surroundings(rdma_devices=("mlx5_0", "mlx5_1"))),
    ),
    Row(
        Given(("NET/Plugin: Could not find: libnccl-net.so. Using internal net plugin.",), SOCKET, APART),
        "NCCL loaded no network plugin",
        LOG,
        "libnccl-net.so",
        "aws-ofi-nccl",
        Given(("NET/Plugin: Could not find: libnccl-net.so. Using internal net plugin.",), SOCKET),
    ),
    Row(
        Given(
            ("cuMem host allocations do not appear to be working; falling back to a /dev/shm/ based implementation.",)
        ),
        "the container has no NUMA memory: NCCL falls back to /dev/shm",
        LOG,
        "cuMem host allocations",
        "SYS_NICE",
        Given(("cuMem host allocations do not appear to be working; falling back to a /dev/shm/ based",), P2P),
    ),
]
REFUSED_LINE = "P2P is disabled between connected GPUs 1 and 0. You can repress this message"
RCCL_IOMMU = warning('Missing "iommu=pt" from kernel command line which can lead to system instablity or hang!')
DEVICES = [
    Row(
        Given((REFUSED_LINE,)),
        "the driver refuses P2P between GPUs 0 and 1",
        LOG,
        "P2P is disabled between connected GPUs 1 and 0",
        "topo -p2p r",
        Given(("Check P2P Type isAllDirectP2p 0 directMode 0",)),
    ),
    Row(
        Given(topology=gpus("PHB", name="NVIDIA GeForce RTX 4090", p2p=(("r", "CNS"), ("w", "CNS")))),
        "the driver refuses P2P between GPUs 0 and 1: CNS: the chipset does not support it",
        "NVML P2P status of GPU 0 and 1",
        "read: CNS",
        "GeForce cards have no P2P over PCIe",
        Given(topology=gpus("PHB", name="NVIDIA GeForce RTX 4090", p2p=(("r", "OK"), ("w", "OK"), ("a", "NS")))),
    ),
    Row(
        Given(topology=gpus("PIX", p2p=(("r", "OK"), ("w", "DR")))),
        "the driver refuses P2P between GPUs 0 and 1: DR: disabled by a registry key of the driver",
        "NVML P2P status of GPU 0 and 1",
        "write: DR",
        "NVreg_RegistryDwords",
        Given(topology=gpus("PIX", p2p=(("r", "U"), ("w", "U")))),
    ),
    Row(
        Given(topology=gpus("NV4", name="NVIDIA GeForce RTX 3090", p2p=(("r", "OK"), ("n", "NS")))),
        "the driver refuses P2P between GPUs 0 and 1: NS: not supported",
        "NVML P2P status of GPU 0 and 1",
        "NVLink: NS",
        "topo -p2p r",
        Given(topology=gpus("PHB", name="NVIDIA GeForce RTX 3090", p2p=(("r", "OK"), ("n", "NS")))),
    ),
    Row(
        Given((warning("P2P is disabled between NVLINK connected GPUs 0 and 1. This should not be the case"),), None),
        "the driver refuses P2P between GPUs that NVLink connects",
        LOG,
        "NVLINK connected GPUs 0 and 1",
        "hardware fault",
        Given((REFUSED_LINE,), None),
    ),
    Row(
        Given((warning("Cuda failure 802 'system not yet initialized'"),), None),
        "the fabric manager is not running: CUDA says that the system is not yet initialized",
        LOG,
        "802",
        "nvidia-fabricmanager",
        Given((warning("Cuda failure 2 'out of memory'"),), None),
    ),
    Row(
        Given(transport=None, server=("RuntimeError: Error 802: system not yet initialized",)),
        "the fabric manager is not running: CUDA says that the system is not yet initialized",
        "server.log",
        "Error 802",
        "nvidia-fabricmanager",
        Given(transport=None, server=("RuntimeError: Error 803: unsupported display driver",)),
    ),
    Row(
        Given(topology=gpus("SYS", fabric=Fabric("not started", "Success"))),
        "the fabric manager has not registered the GPUs: NVLink through the switches cannot be used",
        "NVML fabric state of GPU 0",
        "not started",
        "nvidia-fabricmanager",
        Given(topology=gpus("SYS", fabric=Fabric("completed", "Success"))),
    ),
    Row(
        Given(topology=gpus("SYS", nvlinks=(DOWN,))),
        "GPUs 0 and 1 are linked by SYS, and NVLinks of theirs are down",
        "NVML NVLink state of GPU 0",
        "4 of 4 NVLinks are down",
        "nvidia-smi nvlink -s",
        Given(topology=gpus("SYS")),
    ),
    Row(
        Given(
            topology=gpus("PIX"),
            surroundings=machine(slots={"0000:1b:00.0": PciSlot(acs_redirects=("0000:10:01.0",))}),
        ),
        "ACS sends the peer traffic of GPU 1 up to the root complex",
        "/sys/bus/pci/devices/0000:10:01.0/config",
        "0000:10:01.0",
        "lspci -vvv",
        Given(topology=gpus("PIX"), surroundings=machine(slots={"0000:1b:00.0": PciSlot(acs_redirects=())})),
    ),
    Row(
        Given(topology=gpus("PXB"), surroundings=machine(slots={"0000:1a:00.0": PciSlot(iommu="DMA-FQ")})),
        "the IOMMU translates the DMA of GPU 0",
        "/sys/bus/pci/devices/0000:1a:00.0/iommu_group/type",
        "DMA-FQ",
        "iommu=pt",
        Given(topology=gpus("NV4"), surroundings=machine(slots={"0000:1a:00.0": PciSlot(iommu="DMA-FQ")})),
    ),
    Row(
        Given((REFUSED_LINE,), surroundings=machine(command_line="ro quiet intel_iommu=on,sm_on", iommu_groups=90)),
        "the kernel runs with the IOMMU on, without iommu=pt",
        "/proc/cmdline",
        "intel_iommu=on",
        "iommu=pt",
        Given((REFUSED_LINE,), surroundings=machine(command_line="intel_iommu=on iommu=pt", iommu_groups=90)),
    ),
    Row(
        Given((RCCL_IOMMU,)),
        "the kernel runs without iommu=pt",
        LOG,
        "iommu=pt",
        "iommu=pt",
        Given((RCCL_IOMMU,), P2P),
    ),
]
REMARKS = [
    Row(
        Given(transport="NET/IB/0", hosts=APART),
        "ranks 0 -> 1 use NET/IB/0 without GPUDirect RDMA: data is copied through host memory",
        LOG,
        "via NET/IB/0",
        "nvidia-peermem",
        Given(transport="NET/IB/0/GDRDMA", hosts=APART),
    ),
    Row(
        replace(SWITCHED, lines=(setting("NCCL_NVLS_ENABLE", "0"),)),
        "NVLS is switched off: NCCL_NVLS_ENABLE set by environment to 0",
        LOG,
        "NCCL_NVLS_ENABLE",
        "unset NCCL_NVLS_ENABLE",
        Given((setting("NCCL_NVLS_ENABLE", "0"),), P2P, topology=gpus("NV4", nvlinks=(replace(UP, remote=None),))),
    ),
    Row(
        replace(SWITCHED, surroundings=machine({"NCCL_CUMEM_ENABLE": "0"})),
        "NVLS is switched off: NCCL_CUMEM_ENABLE set by environment to 0",
        "/proc/4242/environ of rank 0",
        "NCCL_CUMEM_ENABLE=0",
        "unset NCCL_CUMEM_ENABLE",
        replace(SWITCHED, surroundings=machine({"NCCL_CUMEM_ENABLE": "1"})),
    ),
    Row(
        replace(SWITCHED, lines=("NVLS multicast support is not available on dev 0 (NVLS_NCHANNELS 0)",)),
        "NVLS is not available, though NVSwitch connects the GPUs",
        LOG,
        "not available on dev 0",
        "Fabric",
        replace(SWITCHED, lines=("NVLS multicast support is available on dev 0 (NVLS_NCHANNELS 16)",)),
    ),
]
ROWS = [pytest.param(row, id=row.cause) for row in (*SETTINGS, *PLACES, *DEVICES, *REMARKS)]


@pytest.mark.parametrize("row", ROWS)
def test_a_cause_comes_with_its_evidence_and_advice(row: Row) -> None:
    finding = next(finding for finding in row.given.findings() if finding.cause == row.cause)

    assert finding.file == row.file
    assert (finding.line is None) is not row.file.endswith((".100", ".log", ".conf of rank 0"))
    assert row.text in (finding.text or "")
    assert row.advice in finding.advice
    assert "\n" not in finding.advice


@pytest.mark.parametrize("row", ROWS)
def test_no_cause_without_evidence(row: Row) -> None:
    assert row.cause not in row.control.causes()


@pytest.mark.parametrize("row", [pytest.param(row, id=row.cause) for row in (*SETTINGS, *PLACES, *DEVICES)])
def test_the_same_facts_around_fast_transports_are_no_finding(row: Row) -> None:
    assert replace(row.given, transport="P2P/CUMEM/read", hosts=("gpu-a1", "gpu-a1")).causes() == []


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.cause) for row in (*SETTINGS, *DEVICES) if row.given.transport]
)
def test_causes_stand_before_what_is_slow(row: Row) -> None:
    causes = row.given.causes()

    assert causes.index(row.cause) < next(
        at for at, cause in enumerate(causes) if cause.startswith("ranks 0 -> 1 use")
    )


# -- details ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("1", True),
        ("0", False),
        ("2", True),
        ("0x1", True),
        ("00", False),
        ("true", False),
        ("", False),
        ("1abc", True),
    ],
)
def test_switches_are_numbers(value: str, named: bool) -> None:
    given = Given(surroundings=machine({"NCCL_P2P_DISABLE": value}))

    assert (f"NCCL_P2P_DISABLE set by environment to {value}" in given.causes()) is named


@pytest.mark.parametrize(
    ("level", "link", "named"),
    [
        *(("LOC", link, True) for link in ("NV4", "PIX", "SYS")),
        *(("NVL", link, named) for link, named in (("NV4", False), ("PIX", True), ("PXB", True), ("SYS", False))),
        *(("PIX", link, named) for link, named in (("NV4", False), ("PIX", False), ("PXB", True), ("PHB", False))),
        *((level, "PXB", False) for level in ("PXB", "PHB", "SYS", "2", "3", "4", "9", "loc", "nonsense")),
        *((level, "PXB", True) for level in ("0", "1")),
        ("PIX", None, True),
        ("PXB", None, False),
    ],
)
def test_levels_are_a_cause_where_the_default_would_allow_the_link(level: str, link: str | None, named: bool) -> None:
    given = Given((setting("NCCL_P2P_LEVEL", level),), topology=gpus(link) if link else None)

    assert (setting("NCCL_P2P_LEVEL", level) in given.causes()) is named


@pytest.mark.parametrize(
    ("surroundings", "advice"),
    [
        (None, "unset NCCL_P2P_DISABLE"),
        (machine({"NCCL_P2P_DISABLE": "1"}, {}), "unset NCCL_P2P_DISABLE"),
        (machine({}, None), "unset NCCL_P2P_DISABLE"),
        (machine({}, {}), "the ranks were started without NCCL_P2P_DISABLE: look for it in /etc/nccl.conf"),
        (
            machine(configuration=(LogLine("/home/u/.nccl.conf of rank 0", 1, "NCCL_P2P_DISABLE=1"),)),
            "take NCCL_P2P_DISABLE out of /home/u/.nccl.conf",
        ),
    ],
)
def test_advice_names_the_place_where_a_variable_was_set(surroundings: Surroundings | None, advice: str) -> None:
    assert Given((P2P_OFF,), surroundings=surroundings).findings()[0].advice.startswith(advice)


@pytest.mark.parametrize(
    ("value", "matches"),
    [
        ("mlx5", True),
        ("mlx5_1:1", True),
        ("=mlx5_1", True),
        ("=mlx5", False),
        ("ib", False),
        ("^mlx5_0", True),
        ("^mlx5", False),
        ("^=mlx5", True),
        ("mlx4,mlx5_1", True),
    ],
)
def test_adapters_are_named_by_prefix_or_in_full(value: str, matches: bool) -> None:
    given = Given((setting("NCCL_IB_HCA", value),), SOCKET, APART, Surroundings(rdma_devices=("mlx5_0", "mlx5_1")))

    assert any("matches none" in cause for cause in given.causes()) is not matches


@pytest.mark.parametrize(
    ("transport", "topology", "advice"),
    [
        (SOCKET, None, "--ipc=host"),
        (SHM, None, "normal between GPUs at PHB, NODE or SYS"),
        (SHM, gpus("NODE"), "NCCL's default: the GPUs are linked by NODE"),
        (SHM, gpus("NV12"), "a loss: the GPUs are linked by NV12"),
        (SHM, gpus("PXB"), "a loss: the GPUs are linked by PXB"),
    ],
)
def test_what_is_slow_comes_last_and_knows_its_links(transport: str, topology: Topology | None, advice: str) -> None:
    finding = Given(transport=transport, topology=topology).findings()[-1]

    assert finding.cause == f"ranks 0 -> 1 use {transport}, 2 pairs in all"
    assert (finding.file, finding.line) == (LOG, 3)
    assert advice in finding.advice


def test_one_finding_for_many_pairs() -> None:
    pairs = [(a, b) for a in range(4) for b in range(a)]
    topology = Topology(
        tuple(Device(at, "NVIDIA L4") for at in range(4)),
        {(b, a): parse_link_class("NODE") for a, b in pairs},
        "topo.json",
        recorded=True,
        p2p=tuple(P2pStatus(b, a, "r", "TNS") for a, b in pairs),
    )
    uses = [SlowUse(a, b, SHM, LogLine("n.log", 1, "via SHM")) for a, b in pairs]

    findings = explain_transports(NcclLog(), uses, topology=topology, placement=(0, 1, 2, 3))

    assert findings[0].cause == (
        "the driver refuses P2P between GPUs 0 and 1 and 5 more pairs: TNS: the topology does not support it"
    )
    assert findings[0].file == "topo.json P2P status of GPU 0 and 1"
    assert len(findings) == 2


def test_hosts_of_a_caller_count_more_than_those_of_the_log() -> None:
    use = SlowUse(0, 1, SOCKET, LogLine("n.log", 1, "via NET/Socket/0"), hosts=("a", "b"))

    causes = [finding.cause for finding in explain_transports(NcclLog(), [use])]

    assert causes[0] == "ranks 0 and 1 have different host names: a and b"


@pytest.mark.parametrize("layout", [None, "tp2", "tp2pp2", "tp2@2"])
@pytest.mark.parametrize(
    "lines",
    [
        ("Using network Socket", "NET/Socket : Using [0]eth0:192.0.2.7<0>", NO_IB),
        ("Bootstrap : Using eth0:192.0.2.7<0>", "NET/Plugin: Could not find: libnccl-net.so. Using internal plugin."),
        (P2P_OFF, setting("NCCL_SHM_DISABLE", "1"), setting("NCCL_SOCKET_IFNAME", "^lo,docker")),
        ("NVLS multicast support is not available on dev 0",),
    ],
)
def test_a_healthy_log_gives_nothing(lines: Iterable[str], layout: str | None) -> None:
    assert Given(tuple(lines), transport=P2P, layout=layout).findings() == ()


def test_a_layout_that_needs_no_channel_is_not_troubled() -> None:
    shm = parse_nccl_log([warning("Error while creating shared memory segment /dev/shm/nccl-x (size 9)")], "n.log")

    assert explain_transports(shm, [], layout=parse_layout("tp1")) == ()
    assert [finding.cause for finding in explain_transports(shm, [])] == ["/dev/shm is too small for NCCL"]
