"""What a link is published to carry, and whether an all-reduce over it comes near enough.

Knows the data rates of NVLink and PCI Express, and the share of them below which a link is called slow. Leaves what
was measured to :mod:`~pytest_gpulayout.collectives`, and smaller changes to the stored baseline: a link may be fast
enough for its class and still slower than yesterday.

GB/s are 1e9 bytes per second in one direction, per GPU, as those of a bus bandwidth are. Where ranks are linked in
several ways the worst link counts: a ring must cross it. On machines whose NVLinks go to several GPUs directly, NCCL
uses more than one ring, so there the limit is too low and the check is too kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType

from pytest_gpulayout.collectives import PREFILL, CollectiveMeasurement, wire_bytes
from pytest_gpulayout.links import LinkClass
from pytest_gpulayout.occupancy import memory_text
from pytest_gpulayout.topology import Device, Topology

NVLINK_GB_PER_S: Mapping[str, float] = MappingProxyType(
    {"1.0": 20.0, "2.0": 25.0, "2.2": 25.0, "3.0": 25.0, "3.1": 25.0, "4.0": 25.0, "5.0": 50.0}
)
"""One NVLink, by version. Source: NVIDIA's data sheets of P100, V100, A100, H100 and B200, whose totals count both
directions: 900 GB/s of H100 are 18 links of 25 GB/s each way."""

PCIE_GB_PER_S: Mapping[int, float] = MappingProxyType({1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563})
"""One PCIe lane, by generation. Source: PCI Express Base Specification 1.0 to 6.0, the line rate less its encoding
(8b/10b, from 3.0 on 128b/130b, 6.0 in flits of 242/256)."""

LEAST_SHARE: Mapping[str, float] = MappingProxyType(
    {"NV": 0.5, "PIX": 0.4, "PXB": 0.4, "PHB": 0.15, "NODE": 0.15, "SYS": 0.15}
)
"""Share of the limit that an all-reduce must reach, by class of the link. NCCL itself counts on 0.8 of NVLink and on
0.76 of PCIe (NCCL 2.30, ``src/graph/topo.h``, ``SM90_NVLINK_BW`` and ``PCI_BW``), and on as little as 6 GB/s between
sockets (``BDW_QPI_BW``); over a host bridge data may have to pass through its memory. docs/probe.md has measured
figures."""

LATENCY_US = 100.0
"""Allowed beside the time on the wire: more than twice what an all-reduce of 8 bytes takes on eight GPUs over PCIe
(42 us, NVIDIA/nccl#1530)."""


@dataclass(frozen=True, slots=True)
class LinkLimit:
    """What a link carries, and how much of that an all-reduce over it must reach.

    :param devices: indices of the two devices. :param words: where the number comes from.
    :param share: of it that must be reached, above 0.
    """

    link: LinkClass
    devices: tuple[int, int]
    gb_per_s: float
    words: str
    share: float

    def wire_us(self, size_bytes: int, ranks: int) -> float:
        """Return how long an all-reduce may be on the wire. :param size_bytes: of the message."""
        return wire_bytes(size_bytes, ranks) / (self.share * self.gb_per_s) / 1e3

    def least_gb_per_s(self, size_bytes: int, ranks: int) -> float:
        """Return the bus bandwidth below which the link is slow, :data:`LATENCY_US` beside the wire allowed."""
        return wire_bytes(size_bytes, ranks) / (self.wire_us(size_bytes, ranks) + LATENCY_US) / 1e3

    def __str__(self) -> str:
        a, b = self.devices
        return f"{self.link} between GPU {a} and GPU {b} ({self.words} = {self.gb_per_s:.3g} GB/s each way)"


@dataclass(frozen=True, slots=True)
class BandwidthReport:
    """Whether links carry what their class is published to carry.

    :param findings: a sentence for each group of ranks whose link is too slow.
    :param remarks: a sentence for each other group: what was found, or why nothing can be said.
    """

    findings: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


def limit_between(topology: Topology, a: int, b: int, *, least_share: float | None = None) -> LinkLimit | None:
    """Return what the link between two devices (indices) carries, ``None`` where nothing tells.

    That is so for links of AMD's tools, on the CPU platform, and where the topology was recorded without speeds.

    :param least_share: of it that must be reached; ``None`` for that of its class.
    """
    link = topology.link(a, b)
    if link is None or link.name not in LEAST_SHARE or topology.platform != "cuda":
        return None
    of_device = _of_one_nvlink if link.is_nvlink else _of_pcie
    told = [of_device(topology.device(index)) for index in (a, b)]
    known = [one for one in told if one is not None]
    if len(known) < len(told):
        return None
    rate, name = min(known)
    share = LEAST_SHARE[link.name] if least_share is None else least_share
    if link.is_nvlink:
        return LinkLimit(link, (a, b), link.nvlinks * rate, f"{link.nvlinks} x {name}", share)
    return LinkLimit(link, (a, b), rate, name, share)


def _of_one_nvlink(device: Device) -> tuple[float, str] | None:
    """GB/s and name of the slowest of a device's NVLinks that are up, ``None`` where one is not known."""
    rates: list[tuple[float, str]] = []
    for group in device.nvlinks:
        if not group.active:
            continue
        if published := NVLINK_GB_PER_S.get(group.version or ""):
            rates.append((published, f"NVLink {group.version}"))
        elif group.speed_mbps:
            rates.append((group.speed_mbps / 1e3, f"NVLink at {group.speed_mbps} MB/s"))
        else:
            return None
    return min(rates, default=None)


def _of_pcie(device: Device) -> tuple[float, str] | None:
    """GB/s and name of a device's slot: the most that both can do, since an idle GPU lowers its generation."""
    pcie = device.pcie
    rate = None if pcie is None else PCIE_GB_PER_S.get(pcie.max_generation or 0)
    if pcie is None or rate is None or not pcie.max_width:
        return None
    return rate * pcie.max_width, f"PCIe {pcie.max_generation}.0 x{pcie.max_width}"


def judge_bandwidth(
    measurement: CollectiveMeasurement, topology: Topology, placement: Sequence[int]
) -> BandwidthReport:
    """Hold the bus bandwidth of each group of ranks against the published limit of its worst link.

    :param measurement: of at least one start. :param placement: index of the device of each rank, in rank order.
    """
    findings: list[str] = []
    remarks: list[str] = []
    for is_slow, text in _judge_groups(measurement, topology, placement):
        (findings if is_slow else remarks).append(text)
    return BandwidthReport(tuple(findings), tuple(dict.fromkeys(remarks)))


def _judge_groups(
    measurement: CollectiveMeasurement, topology: Topology, placement: Sequence[int]
) -> Iterator[tuple[bool, str]]:
    size_bytes = next(m.size_bytes for m in measurement.plan.messages() if m.name == PREFILL)
    size = memory_text(size_bytes)
    if measurement.plan.least_share == 0:
        yield False, "not held against a published limit: the plan says so (least_share 0)"
        return
    for number, group in enumerate(measurement.runs[0].groups):
        found, ranks = measurement.bandwidth_gb_per_s(number), ",".join(map(str, group.ranks))
        pairs = list(combinations((placement[rank] for rank in group.ranks), 2))
        limits = [limit_between(topology, a, b, least_share=measurement.plan.least_share) for a, b in pairs]
        known = [limit for limit in limits if limit is not None]
        if len(known) < len(pairs):
            yield False, _unknown(topology, *pairs[limits.index(None)])
            continue
        worst = min(known, key=lambda limit: limit.share * limit.gb_per_s)
        if worst.wire_us(size_bytes, len(group.ranks)) < LATENCY_US:
            yield False, f"not held against the published limit: a message of {size} is too small to fill {worst}"
            continue
        least = worst.least_gb_per_s(size_bytes, len(group.ranks))
        required = f"at least {least:.3g} GB/s required of {worst}"
        text = f"ranks {ranks} reach {found:.3g} GB/s with messages of {size}, {required}"
        yield found < least, text


def _unknown(topology: Topology, a: int, b: int) -> str:
    head = "not held against a published limit"
    if topology.platform == "cpu":
        return f"{head}: sockets on one host have none"
    link = topology.link(a, b) or "an unknown link"
    return f"{head}: what {link} between GPU {a} and GPU {b} carries is not known"
