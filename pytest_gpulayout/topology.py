"""Devices and the links between them: what a machine has, and whether that is as required.

Leaves asking NVML and reading files to the adapters, the text of ``nvidia-smi topo`` to
:mod:`~pytest_gpulayout.topology_text`, JSON to :mod:`~pytest_gpulayout.topology_document`, and choosing devices to
:mod:`~pytest_gpulayout.placement`. Whatever a source does not say is ``None``; nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from pytest_gpulayout.errors import TopologyError
from pytest_gpulayout.links import LinkClass, LinkRequirement

Platform = Literal["cuda", "rocm", "cpu"]

SWITCH = "switch"
"""What :attr:`NvLinks.remote` says of links that end at an NVSwitch."""

_BUS_ID = re.compile(r"([0-9a-fA-F]{4,8}):([0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7])")

P2P_REASONS = {
    "CNS": "the chipset does not support it",
    "GNS": "the GPU does not support it",
    "TNS": "the topology does not support it",
    "DR": "disabled by a registry key of the driver",
    "NS": "not supported",
    "U": "unknown",
}
"""Why a capability is not OK, by status; legend of ``nvidia-smi topo -p2p``."""

P2P_CAPABILITIES = {"r": "read", "w": "write", "n": "NVLink", "a": "atomics", "p": "PCIe"}
"""Words for the letters of ``nvidia-smi topo -p2p``."""


@dataclass(frozen=True, slots=True)
class PcieLink:
    """A device's connection to its PCIe slot; the most is what device and slot can do together.

    An idle GPU lowers its generation to save power, so less than the most is no fault; a lower width is one.
    """

    generation: int | None = None
    width: int | None = None
    max_generation: int | None = None
    max_width: int | None = None


@dataclass(frozen=True, slots=True)
class NvLinks:
    """Those NVLinks of one device that agree in everything but their number.

    :param links: (n_links,), their numbers on the device, ascending.
    :param active: whether they are up.
    :param remote: PCI bus id of the device at the other end, ``"switch"``, ``None`` where it is not said.
    :param version: such as ``"4.0"``. :param speed_mbps: MB/s of each link in one direction.
    """

    links: tuple[int, ...]
    active: bool
    remote: str | None = None
    version: str | None = None
    speed_mbps: int | None = None


@dataclass(frozen=True, slots=True)
class Fabric:
    """A device's registration at the fabric manager, which switches NVLinks need (``nvmlGpuFabricInfo_t``).

    :param state: ``"not started"``, ``"in progress"`` or ``"completed"``.
    :param status: ``"Success"``, or NVML's words for the error with which registration was completed.
    :param clique_id: devices with the same cluster and clique reach each other over NVLink.
    """

    state: str
    status: str
    clique_id: int | None = None
    cluster_uuid: str | None = None

    @property
    def is_ready(self) -> bool:
        """Whether NVLink through the switches can be used."""
        return self.state == "completed" and self.status == "Success"


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or one set of cores on the CPU platform.

    :param index: as the source numbers it; not a rank.
    :param pci_bus_id: ``domain:bus:device.function`` as the source prints it.
    :param numa_node: the node, or a range such as ``"0-3"`` where the source gives one.
    :param cpu_affinity: list of CPUs such as ``"0-13,28-41"``; ``""`` where the source prints an empty cell.
    :param power_limit_w: what it is set to draw at most, not what it draws now.
    :param gpu_numa_id: on Grace the node of the GPU's own memory, which has no CPUs.
    :param mig: whether MIG mode is on: then only instances of the GPU can be used, and they have no peer access.
    :param fault: why the GPU cannot be used at all, such as ``"GPU is lost"``; ``None`` when nothing is wrong.
    """

    index: int
    name: str | None = None
    uuid: str | None = None
    pci_bus_id: str | None = None
    numa_node: int | str | None = None
    cpu_affinity: str | None = None
    memory_bytes: int | None = None
    gpu_numa_id: int | None = None
    mig: bool | None = None
    fault: str | None = None
    pcie: PcieLink | None = None
    nvlinks: tuple[NvLinks, ...] = ()
    fabric: Fabric | None = None
    power_limit_w: int | None = None

    @property
    def is_usable(self) -> bool:
        """Whether a rank can be put on it."""
        return self.fault is None and not self.mig


@dataclass(frozen=True, slots=True)
class P2pStatus:
    """What the driver says about peer access between two devices, as ``nvidia-smi topo -p2p`` prints it.

    :param capability: ``r`` read, ``w`` write, ``n`` NVLink, ``a`` atomics, ``p`` PCIe; ``None`` if not said.
    :param status: ``OK``, ``CNS``, ``GNS``, ``TNS``, ``DR``, ``NS`` or ``U``.
    """

    a: int
    b: int
    capability: str | None
    status: str

    @property
    def refusal(self) -> str | None:
        """``"CNS: the chipset does not support it"``; ``None`` when all is well."""
        return None if self.status == "OK" else f"{self.status}: {P2P_REASONS[self.status]}"


@dataclass(frozen=True, slots=True)
class Topology:
    """The devices of one machine and their links.

    :param links: index pairs (a, b), a < b; a pair that is missing is unknown.
    :param source: ``"NVML"``, or the name of the file.
    :param recorded: it was read from a file, and not probed on this machine.
    :param notes: what the source could not tell and why, a sentence each.
    :param busy: indices of devices that somebody computes on right now; a passing state, so never recorded.
    """

    devices: tuple[Device, ...]
    links: Mapping[tuple[int, int], LinkClass]
    source: str
    recorded: bool
    platform: Platform = "cuda"
    driver_version: str | None = None
    cuda_version: str | None = None
    nvml_version: str | None = None
    p2p: tuple[P2pStatus, ...] = ()
    notes: tuple[str, ...] = ()
    busy: frozenset[int] = frozenset()

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Index pairs (a, b), a < b, of all devices."""
        return tuple(combinations(sorted(device.index for device in self.devices), 2))

    @property
    def settles_links(self) -> bool:
        """Whether every link is known."""
        return all(pair in self.links for pair in self.pairs)

    @property
    def all_nvlink(self) -> bool:
        """Whether there are at least two devices, and NVLink between any two of them."""
        links = [self.link(a, b) for a, b in self.pairs]
        return bool(links) and all(link is not None and link.is_nvlink for link in links)

    @property
    def usable(self) -> tuple[Device, ...]:
        """The devices that ranks can be put on, by index."""
        return tuple(sorted((d for d in self.devices if d.is_usable), key=lambda device: device.index))

    @property
    def nvlink_islands(self) -> tuple[tuple[int, ...], ...]:
        """Indices of devices that NVLink connects, directly or over another one; islands of one are left out."""
        islands: list[set[int]] = []
        for pair in (pair for pair, link in sorted(self.links.items()) if link.is_nvlink or link.name == "XGMI"):
            joined = [island for island in islands if island & set(pair)]
            islands = [island for island in islands if island not in joined] + [set(pair).union(*joined)]
        return tuple(sorted(tuple(sorted(island)) for island in islands))

    def device(self, index: int) -> Device:
        """Return the device with this index.

        :raises TopologyError: there is none.
        """
        for device in self.devices:
            if device.index == index:
                return device
        raise TopologyError(unknown_device(self, str(index)))

    def find(self, text: str) -> Device | None:
        """Return the device with this index or UUID; a UUID may be cut, as CUDA allows, while it is unique."""
        if re.fullmatch(r"[0-9]+", text):
            return next((device for device in self.devices if device.index == int(text)), None)
        if not text.startswith("GPU-"):
            return next((device for device in self.devices if device.uuid == text), None)
        found = [device for device in self.devices if (device.uuid or "").startswith(text)]
        return found[0] if len(found) == 1 else None

    def link(self, a: int, b: int) -> LinkClass | None:
        """Return the link between two devices (indices), ``None`` if it is unknown."""
        return self.links.get((min(a, b), max(a, b)))

    def worst(self, pairs: Iterable[tuple[int, int]] | None = None) -> LinkClass | None:
        """Return the worst link of these index pairs (all by default).

        :returns: ``None`` when there is no pair, and when one of the links is unknown.
        """
        links = [self.link(a, b) for a, b in (self.pairs if pairs is None else pairs)]
        known = [link for link in links if link is not None]
        return min(known) if known and len(known) == len(links) else None

    def p2p_status(self, a: int, b: int, capability: str) -> str | None:
        """Return the status of a capability between two devices, ``None`` if it is unknown."""
        wanted = {(a, b), (b, a)}
        return next((p.status for p in self.p2p if (p.a, p.b) in wanted and p.capability == capability), None)


@dataclass(frozen=True, slots=True)
class LinkViolation:
    """Two ranks whose devices are not connected as required.

    :param device_a: index of the device of ``rank_a``. :param device_b: of ``rank_b``.
    :param found: the link, ``None`` if it is unknown.
    :param nvlink_status: the driver's status for NVLink where that is what fails, else ``None``.
    """

    rank_a: int
    rank_b: int
    device_a: int
    device_b: int
    found: LinkClass | None
    required: LinkRequirement
    nvlink_status: str | None = None

    @property
    def found_text(self) -> str:
        """The link in words, with why it cannot be used where that is what fails."""
        found = "unknown" if self.found is None else str(self.found)
        if self.nvlink_status is not None:
            found += f", but the driver says {self.nvlink_status} for NVLink ({P2P_REASONS[self.nvlink_status]})"
        return found

    def __str__(self) -> str:
        return (
            f"ranks {self.rank_a} and {self.rank_b} (GPUs {self.device_a} and {self.device_b}): "
            f"link {self.found_text}, {self.required} required"
        )


def check_links(
    topology: Topology,
    placement: Sequence[int],
    pairs: Iterable[tuple[int, int]],
    requirement: LinkRequirement,
) -> tuple[LinkViolation, ...]:
    """Return the rank pairs whose link is not good enough, in the order of ``pairs``.

    An unknown link violates every requirement except ``any``. Where NVLink is required, links that are up are not
    enough: the driver can refuse peer access over them (``nvmlDeviceGetP2PStatus``), and that violates too.

    :param placement: index of the device of each rank, in rank order.
    :param pairs: rank pairs that communicate, as :meth:`Layout.communicating_pairs` returns them.
    """
    refused = refused_nvlinks(topology)
    violations = []
    for rank_a, rank_b in pairs:
        a, b = placement[rank_a], placement[rank_b]
        link, status = topology.link(a, b), refused.get(frozenset((a, b)))
        if violates(requirement, link, status):
            told = status if requirement.needs_nvlink and link is not None and link.is_nvlink else None
            violations.append(LinkViolation(rank_a, rank_b, a, b, link, requirement, told))
    return tuple(violations)


def refused_nvlinks(topology: Topology) -> dict[frozenset[int], str]:
    """Return the status of peer access over NVLink, by pair of indices, where it is not OK."""
    statuses: dict[frozenset[int], str] = {}
    for p2p in topology.p2p:
        if p2p.capability == "n":
            statuses.setdefault(frozenset((p2p.a, p2p.b)), p2p.status)
    return {pair: status for pair, status in statuses.items() if status != "OK"}


def violates(requirement: LinkRequirement, link: LinkClass | None, refusal: str | None) -> bool:
    """Whether a link is not good enough. :param refusal: its entry in :func:`refused_nvlinks`."""
    return not requirement.accepts(link) or (requirement.needs_nvlink and refusal is not None)


def normal_bus_id(text: str) -> str | None:
    """Return ``00000000:0F:00.0`` for ``0000:0f:00.0``; NVML writes the domain with 4 or 8 digits.

    :returns: ``None`` for what is no bus id, such as the ``FFFFFFF:FFFF:FF`` of a device that a hypervisor hides.
    """
    match = _BUS_ID.fullmatch(text)
    return f"{int(match[1], 16):08X}:{match[2].upper()}" if match else None


def sysfs_bus_id(text: str) -> str:
    """Return ``0000:0f:00.0`` for ``00000000:0F:00.0``, as Linux names the folder; ``""`` for what is no bus id."""
    match = _BUS_ID.fullmatch(text)
    return f"{int(match[1], 16):04x}:{match[2].lower()}" if match else ""


def unknown_device(topology: Topology, text: str) -> str:
    """Say that a device that was asked for is not there, and which are."""
    return (
        f"GPU {text!r} was asked for, found {device_list(topology)}\n  in {topology.source}\n"
        f"  name a GPU by its index or by its whole UUID; type 'gpulayout topo' to see them"
    )


def device_list(topology: Topology) -> str:
    """``0 NVIDIA H200, 1 NVIDIA H200 (GPU is lost)``: every device, with what is wrong with it."""
    names = [
        f"{device.index} {device.name or ''}".strip() + f" ({why_unusable(device)})" * (not device.is_usable)
        for device in topology.devices
    ]
    return ", ".join(names) or "no GPU at all"


def why_unusable(device: Device) -> str | None:
    """Why no rank can be put on a device; ``None`` when one can."""
    return device.fault or ("MIG is on" if device.mig else None)
