"""How long GPUs talk: link classes, their latency and bandwidth, and the time of one collective. All of it estimates.

Knows NCCL's own model of ring and tree (latency + bytes / bandwidth for each protocol), when vLLM uses its one-shot
and two-shot kernel in place of NCCL, and what of a link a program gets. Leaves what is sent to
:mod:`~pytest_gpulayout.model_traffic`.

Sources:

- NCCL 2.27, ``src/graph/tuning.cc``: ``baseLatencies``, ``hwLatencies``, ``llMaxBws``, ``ncclTopoTuneModel`` for the
  formulas; ``src/graph/topo.h``: bandwidth of a NVLink by generation, of PCIe (12 GB/s for generation 3, doubled by
  each), of links between sockets (10 GB/s, ``SKL_QPI_BW``); ``paths.cc``: peer access up to PXB, else shared memory,
  for which half of the PCIe bandwidth is assumed.
- vLLM 0.32, ``custom_all_reduce.py`` (``should_custom_ar``: 2, 4, 6 or 8 GPUs of one node, two or all over NVLink,
  messages up to 8 MiB), ``all_reduce_utils.py`` (``CUSTOM_ALL_REDUCE_MAX_SIZES`` where symmetric memory works),
  ``csrc/custom_all_reduce.cuh`` (one-shot for 2 GPUs, below 512 KiB for up to 4 and below 256 KiB for up to 8).
- The kernel's 4 us and 65 GB/s are fitted to the times that sgl-project/sglang#2904 measured on H100 over NVLink for
  its kernel, which has the same two ways; vLLM's own took some 5 us more there, started without CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pytest_gpulayout.gpu_specs import GpuSpec
from pytest_gpulayout.links import LinkClass

Wire = Literal["nvlink", "pcie", "rdma", "socket"]

SOCKET_US = 30.0
"""What a hop over TCP takes beyond one with RDMA: system calls, host buffers, the kernel's stack; an assumption."""

_BASE_US = {"tree": {"LL": 6.8, "LL128": 14.0, "Simple": 8.4}, "ring": {"LL": 6.6, "LL128": 14.0, "Simple": 8.4}}
_HOP_US: dict[Wire, dict[str, dict[str, float]]] = {
    "nvlink": {
        "tree": {"LL": 0.6, "LL128": 1.25, "Simple": 4.0},
        "ring": {"LL": 0.6, "LL128": 1.9, "Simple": 3.4},
    },
    "pcie": {
        "tree": {"LL": 1.0, "LL128": 1.9, "Simple": 4.0},
        "ring": {"LL": 1.0, "LL128": 2.5, "Simple": 5.7},
    },
    "rdma": {
        "tree": {"LL": 5.0, "LL128": 8.5, "Simple": 14.0},
        "ring": {"LL": 2.7, "LL128": 4.0, "Simple": 14.0},
    },
}
_HOP_US["socket"] = {
    way: {protocol: us + SOCKET_US for protocol, us in hops.items()} for way, hops in _HOP_US["rdma"].items()
}
_NVLINK_GB_PER_S = {"7.0": 20.0, "8.0": 20.0, "8.6": 12.0, "9.0": 20.6, "10.0": 40.1, "10.3": 40.1}
_LL_MOST_GB_PER_S = {"7": 39.0, "8": 87.7, "9": 141.0, "10": 282.0, "12": 282.0}
_PCIE_3_GB_PER_S = 12.0
_BETWEEN_SOCKETS_GB_PER_S = 10.0

_SIZES = (2, 4, 6, 8)
_KERNEL_US, _KERNEL_GB_PER_S = 4.0, 65.0
_MIB = 2**20
_MOST_BYTES = 8 * _MIB
_MOST_BYTES_SWITCHED = {
    "9.0": {2: 64 * _MIB, 4: 32 * _MIB, 6: _MIB // 2, 8: _MIB // 4},
    "10.0": {2: 2 * _MIB, 4: 2 * _MIB, 6: _MIB, 8: _MIB},
    "10.3": {2: 4 * _MIB, 4: 4 * _MIB, 6: 8 * _MIB, 8: 4 * _MIB},
}


@dataclass(frozen=True, slots=True)
class Network:
    """What is between nodes. :param gbit_per_s: of one GPU's share. :param rdma: whether it is RDMA, else TCP."""

    gbit_per_s: float = 25.0
    rdma: bool = False

    def __str__(self) -> str:
        return f"{'RDMA' if self.rdma else 'sockets'} of {self.gbit_per_s:g} Gbit/s"


DEFAULT_NETWORK = Network()


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """What ranks that talk have between them, at its worst place.

    :param name: for people, such as ``"NVLink (18)"``. :param wire: what latency it has.
    :param gb_per_s: what a GPU can send over it while it receives as much.
    :param direct: whether GPUs reach each other's memory. :param switched: whether an NVSwitch is between them.
    :param capability: of the GPUs.
    """

    name: str
    wire: Wire
    gb_per_s: float
    direct: bool
    switched: bool
    capability: str


@dataclass(frozen=True, slots=True)
class Duration:
    """The estimated time of one collective. :param by: who does it, such as ``"NCCL ring LL"``."""

    us: float
    by: str


def link_speed(link: LinkClass, spec: GpuSpec, *, peer_access: bool | None = None) -> LinkSpeed:
    """Return what a link class means between two GPUs.

    :param peer_access: what the driver says about peer access over PCIe, ``None`` where it is not known.
    """
    if link.is_nvlink:
        each = _NVLINK_GB_PER_S.get(spec.capability, _NVLINK_GB_PER_S["9.0"])
        speed = link.nvlinks * each
        return LinkSpeed(f"NVLink x{link.nvlinks}", "nvlink", speed, True, spec.switched, spec.capability)
    gb_per_s = _PCIE_3_GB_PER_S * 2 ** (spec.pcie - 3)
    direct = spec.peer_access if peer_access is None else peer_access
    across = link.name in ("SYS", "PCIE")
    text = f"PCIe {spec.pcie} {link}"
    if direct and link.name in ("PIX", "PXB"):
        return LinkSpeed(f"{text}, peer to peer", "pcie", gb_per_s, True, False, spec.capability)
    shared = min(gb_per_s / 2, _BETWEEN_SOCKETS_GB_PER_S) if across else gb_per_s / 2
    return LinkSpeed(f"{text}, through host memory", "pcie", shared, direct, False, spec.capability)


def network_speed(network: Network, spec: GpuSpec) -> LinkSpeed:
    """Return what a network between nodes gives one GPU."""
    wire: Wire = "rdma" if network.rdma else "socket"
    return LinkSpeed(str(network), wire, network.gbit_per_s / 8, False, False, spec.capability)


def worst_speed(speeds: Iterable[LinkSpeed]) -> LinkSpeed | None:
    """Return the slowest of some links, ``None`` where there is none; direct only where all are."""
    found = sorted(speeds, key=lambda speed: speed.gb_per_s)
    if not found:
        return None
    worst = found[0]
    direct, switched = all(speed.direct for speed in found), all(speed.switched for speed in found)
    return LinkSpeed(worst.name, worst.wire, worst.gb_per_s, direct, switched, worst.capability)


# -- collectives -----------------------------------------------------------------------------------------------------


def all_reduce(ranks: int, size: int, speed: LinkSpeed) -> Duration:
    """Return the time of an all-reduce as vLLM does it. :param size: bytes of the tensor, the same on all ranks."""
    if _uses_own_kernel(ranks, size, speed):
        return _own_kernel(ranks, size, speed)
    return min((*_ring(ranks, size, speed, steps=2 * (ranks - 1)), *_tree(ranks, size, speed)), key=lambda d: d.us)


def all_gather(ranks: int, size: int, speed: LinkSpeed) -> Duration:
    """Return the time of an all-gather, which NCCL's rings do. :param size: bytes that each rank has afterwards."""
    return min(_ring(ranks, size, speed, steps=ranks - 1), key=lambda duration: duration.us)


def reduce_scatter(ranks: int, size: int, speed: LinkSpeed) -> Duration:
    """Return the time of a reduce-scatter, that of an all-gather. :param size: bytes that each rank brings."""
    return all_gather(ranks, size, speed)


def send(size: int, speed: LinkSpeed) -> Duration:
    """Return the time from one GPU to the next. :param size: bytes."""
    base, hop = _BASE_US["ring"]["Simple"], _HOP_US[speed.wire]["ring"]["Simple"]
    return Duration(base + hop + _us(size, speed.gb_per_s), "NCCL send")


def all_to_all(ranks: int, size: int, speed: LinkSpeed) -> Duration:
    """Return the time of an all-to-all. :param size: bytes that each rank sends to all others together."""
    hop = _HOP_US[speed.wire]["ring"]["Simple"]
    return Duration(_BASE_US["ring"]["Simple"] + hop + _us(size, speed.gb_per_s), f"sends to {ranks - 1} ranks")


def _uses_own_kernel(ranks: int, size: int, speed: LinkSpeed) -> bool:
    if ranks not in _SIZES or not speed.direct or (ranks > 2 and speed.wire != "nvlink"):
        return False
    most = _MOST_BYTES
    if speed.switched and speed.capability in _MOST_BYTES_SWITCHED:
        most = min(most, _MOST_BYTES_SWITCHED[speed.capability][ranks])
    return size % 16 == 0 and size < most


def _own_kernel(ranks: int, size: int, speed: LinkSpeed) -> Duration:
    """One-shot: every GPU reads all of the others' data; two-shot: a part of it, and then the others' sums."""
    gb_per_s, hop = min(_KERNEL_GB_PER_S, speed.gb_per_s), 0.0 if speed.wire == "nvlink" else 2.0
    limit = {2: _MOST_BYTES, 4: 512 * 1024}.get(ranks, 256 * 1024)
    if ranks == 2 or size < limit:
        return Duration(_KERNEL_US + hop + _us((ranks - 1) * size, gb_per_s), "vLLM one-shot")
    moved = 2 * (ranks - 1) * size // ranks
    return Duration(_KERNEL_US + 2 * hop + _us(moved, gb_per_s), "vLLM two-shot")


def _ring(ranks: int, size: int, speed: LinkSpeed, *, steps: int) -> list[Duration]:
    """A step for each neighbour; data moves in parts of ``size / ranks``."""
    found = []
    for protocol, gb_per_s in _protocols(speed, most=_most_ll(speed), part=0.5):
        latency = _BASE_US["ring"][protocol] + steps * _HOP_US[speed.wire]["ring"][protocol]
        found.append(Duration(latency + _us(size * steps / ranks, gb_per_s), f"NCCL ring {protocol}"))
    return found


def _tree(ranks: int, size: int, speed: LinkSpeed) -> list[Duration]:
    """Up and down a chain of the node's GPUs; at nine tenths of the bandwidth, all data twice."""
    found = []
    for protocol, gb_per_s in _protocols(speed, most=_most_ll(speed), part=1 / 3.8):
        latency = _BASE_US["tree"][protocol] + 2 * (ranks - 1) * _HOP_US[speed.wire]["tree"][protocol]
        found.append(Duration(latency + _us(2 * size, 0.9 * gb_per_s), f"NCCL tree {protocol}"))
    return found


def _protocols(speed: LinkSpeed, *, most: float, part: float) -> list[tuple[str, float]]:
    """NCCL's protocols and their bandwidth: LL sends a flag with each 4 bytes, LL128 needs NVLink."""
    found = [("LL", min(most, part * speed.gb_per_s)), ("Simple", speed.gb_per_s)]
    if speed.wire == "nvlink":
        found.append(("LL128", 0.92 * speed.gb_per_s))
    return found


def _most_ll(speed: LinkSpeed) -> float:
    return _LL_MOST_GB_PER_S.get(speed.capability.partition(".")[0], _LL_MOST_GB_PER_S["8"])


def _us(size: float, gb_per_s: float) -> float:
    return size / (gb_per_s * 1e3)
