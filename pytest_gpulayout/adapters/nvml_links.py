"""NVLinks, PCIe paths and peer access between GPUs as NVML tells them, and the link classes that follow.

Where an NVLink ends is told by four sources, the first that answers counts: the remote device's type; its PCI class
in sysfs (as NCCL does it, ``graph/xml.cc``: NVSwitch is a bridge, 0x068000); the number of links to switches (field
147); and at last, for two GPUs that both have links with an unknown end, whether they reach each other over NVLink.

Sources: NVML API reference, sections "NvLink Methods", "Device Queries" (``nvmlDeviceGetTopologyCommonAncestor``,
``nvmlDeviceGetP2PStatus``) and "Field Value Queries"; ``nvml.h`` of CUDA 13 for the numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from pytest_gpulayout.adapters.nvml_inquiry import (
    NOT_OF_THIS_DRIVER,
    NOT_OF_THIS_HARDWARE,
    GpuFault,
    GpuInquiry,
    Inquiry,
)
from pytest_gpulayout.links import LinkClass
from pytest_gpulayout.topology import SWITCH, NvLinks, P2pStatus, normal_bus_id, sysfs_bus_id

# nvmlGpuTopologyLevel_t. Two GPUs on one board (0) meet at the board's own switch, as nvidia-smi prints it.
_ANCESTORS = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
# nvmlGpuP2PCapsIndex_t, by the letter of `nvidia-smi topo -p2p`. pynvml's own name for READ is a tuple.
_CAPABILITIES = {"r": 0, "w": 1, "n": 2}
# nvmlGpuP2PStatus_t
_STATUSES = {0: "OK", 1: "CNS", 2: "GNS", 3: "TNS", 4: "DR", 5: "NS", 6: "U"}
# nvmlNvlinkVersion_t
_VERSIONS = {1: "1.0", 2: "2.0", 3: "2.2", 4: "3.0", 5: "3.1", 6: "4.0", 7: "5.0", 8: "6.0"}
_REMOTE_IS_GPU, _REMOTE_IS_NPU, _REMOTE_IS_SWITCH = 0, 1, 2  # nvmlIntNvLinkDeviceType_t
_PCI_CLASS_OF_SWITCHES = "0x068000"  # a POWER9 processor is 0x068001
_MOST_LINKS = 36  # NVML_NVLINK_MAX_LINKS of CUDA 13; a lower number of an older pynvml would hide links
_FIELD_SWITCH_LINKS = 147  # NVML_FI_DEV_NVSWITCH_CONNECTED_LINK_COUNT
_FIELD_SPEED = 164  # NVML_FI_DEV_NVLINK_GET_SPEED, for the link in scopeId
# NVML_FI_DEV_NVLINK_SPEED_MBPS_L0 and following, of drivers that do not know the one above.
_FIELDS_SPEED_OF_LINK = (84, 85, 86, 87, 88, 89, 132, 133, 134, 135, 136, 137)


@dataclass(frozen=True, slots=True)
class Ends:
    """Where those NVLinks of one GPU end that are up.

    :param to_gpus: number of links by index of the GPU at the other end.
    :param to_switches: number of links to switches.
    :param to_others: number of links to devices that are no switch, and whose PCI bus id no GPU is known to have.
    :param unidentified: number of links whose other end the driver does not tell.
    :param known: whether NVML tells which links are up at all.
    """

    to_gpus: Mapping[int, int] = field(default_factory=dict)
    to_switches: int = 0
    to_others: int = 0
    unidentified: int = 0
    known: bool = True

    def towards(self, gpu: Gpu) -> int | None:
        """Return the most links that can lead to a GPU, ``None`` if that is not known."""
        if not self.known:
            return None
        unnamed = 0 if gpu.has_bus_id else self.to_others
        return self.to_gpus.get(gpu.index) or self.to_switches or self.unidentified + unnamed


def read_nvlinks(gpu: GpuInquiry, buses: Mapping[str, int], sysfs: Path) -> tuple[tuple[NvLinks, ...], Ends]:
    """Return the NVLinks of a GPU and where they end.

    :param buses: index by PCI bus id (:func:`normal_bus_id`) of all GPUs of the machine, hidden ones too.
    :param sysfs: ``/sys``.
    :raises GpuFault: the GPU cannot be used any more.
    """
    return _NvlinkReader(gpu, buses, sysfs).read()


@dataclass(frozen=True, slots=True)
class _NvlinkReader:
    """Parameters as of :func:`read_nvlinks`."""

    gpu: GpuInquiry
    buses: Mapping[str, int]
    sysfs: Path

    def read(self) -> tuple[tuple[NvLinks, ...], Ends]:
        states = self._states()
        if states is None:
            return (), Ends(known=False)
        remotes = {link: self._remote(link) for link, is_up in states.items() if is_up}
        open_ends = [link for link, remote in remotes.items() if remote is None]
        to_switches = sum(remote == SWITCH for remote in remotes.values())
        more = self._more_switch_links(to_switches, len(open_ends)) if open_ends else 0
        if more == len(open_ends):
            remotes |= dict.fromkeys(open_ends, SWITCH)
        named = [remote for remote in remotes.values() if remote is not None and remote != SWITCH]
        to_gpus = Counter(self.buses[remote] for remote in named if remote in self.buses)
        return self._groups(states, remotes), Ends(
            to_gpus, to_switches + more, len(named) - to_gpus.total(), len(open_ends) - more
        )

    def _states(self) -> dict[int, bool] | None:
        """Whether each link is up, by its number; ``None`` if that is not told."""
        states = {}
        call = self.gpu.nvml.nvmlDeviceGetNvLinkState
        for link in range(_MOST_LINKS):
            answer = self.gpu.attempt(call, link)
            if answer.error is None:
                states[link] = answer.value == 1
            elif answer.error not in NOT_OF_THIS_HARDWARE:
                self.gpu.remember("NVLink state", answer, call.__name__)
                return None
        return states

    def _remote(self, link: int) -> str | None:
        """The PCI bus id of the other end, ``"switch"``, or ``None`` if it cannot be told."""
        nvml = self.gpu.nvml
        kind = self.gpu.attempt(nvml.nvmlDeviceGetNvLinkRemoteDeviceType, link).value
        if kind == _REMOTE_IS_SWITCH:
            return SWITCH
        info = self.gpu.attempt(nvml.nvmlDeviceGetNvLinkRemotePciInfo, link).value
        bus_id = None if info is None else normal_bus_id(info.busId)
        if bus_id is None or bus_id in self.buses or kind in (_REMOTE_IS_GPU, _REMOTE_IS_NPU):
            return bus_id
        pci_class = self._pci_class(bus_id)
        if pci_class == _PCI_CLASS_OF_SWITCHES:
            return SWITCH
        return None if pci_class is None else bus_id

    def _pci_class(self, bus_id: str) -> str | None:
        """What sysfs says of a device, such as ``"0x030200"``; virtual machines and containers may not show it."""
        path = self.sysfs / "bus/pci/devices" / sysfs_bus_id(bus_id) / "class"
        try:
            return path.read_text().strip()
        except OSError:
            return None

    def _more_switch_links(self, identified: int, unidentified: int) -> int:
        """How many of the links with an unknown end lead to a switch."""
        total = self._fields("number of NVLinks to switches", [(_FIELD_SWITCH_LINKS, 0)])[0] or 0
        return max(0, min(total - identified, unidentified))

    def _groups(self, states: Mapping[int, bool], remotes: Mapping[int, str | None]) -> tuple[NvLinks, ...]:
        speeds = self._speeds(list(remotes))
        groups: dict[tuple[bool, str | None, str | None, int | None], list[int]] = {}
        for link, is_up in states.items():
            version = self._version(link) if is_up else None
            groups.setdefault((is_up, remotes.get(link), version, speeds.get(link)), []).append(link)
        return tuple(NvLinks(tuple(links), *facts) for facts, links in groups.items())

    def _version(self, link: int) -> str | None:
        call = self.gpu.nvml.nvmlDeviceGetNvLinkVersion
        number = self.gpu.ask("NVLink version", call, link, usual=NOT_OF_THIS_HARDWARE)
        return _VERSIONS.get(number)

    def _speeds(self, links: Sequence[int]) -> dict[int, int]:
        """MB/s by link; a link whose speed is not told is left out."""
        told = self._fields("NVLink speed", [(_FIELD_SPEED, link) for link in links])
        speeds = dict(zip(links, told, strict=True))
        left = [link for link in links if not speeds[link] and link < len(_FIELDS_SPEED_OF_LINK)]
        told = self._fields("NVLink speed", [(_FIELDS_SPEED_OF_LINK[link], 0) for link in left])
        speeds |= dict(zip(left, told, strict=True))
        return {link: speed for link, speed in speeds.items() if speed}

    def _fields(self, subject: str, wanted: Sequence[tuple[int, int]]) -> list[int | None]:
        """Values of fields (id, scope), in this order; all that are asked for here are unsigned int."""
        if not wanted:
            return []
        call = self.gpu.nvml.nvmlDeviceGetFieldValues
        found = self.gpu.ask(subject, call, list(wanted), usual=NOT_OF_THIS_HARDWARE)
        if found is None:
            return [None] * len(wanted)
        return [int(one.value.uiVal) if one.nvmlReturn == 0 else None for one in found]


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU that answers.

    :param has_bus_id: whether it is known which PCI bus id the other GPUs' NVLinks to it would name.
    """

    index: int
    handle: Any
    has_bus_id: bool
    ends: Ends


@dataclass(frozen=True, slots=True)
class Paths:
    """What connects GPUs.

    :param links: by pair of indices (a, b), a < b; a pair that is missing is unknown.
    :param faults: by index of the GPU, of those that went away while they were asked about.
    """

    links: Mapping[tuple[int, int], LinkClass]
    p2p: tuple[P2pStatus, ...]
    faults: Mapping[int, str]


def read_paths(inquiry: Inquiry, gpus: Sequence[Gpu]) -> Paths:
    """Return what connects each two of the GPUs."""
    links: dict[tuple[int, int], LinkClass | None] = {}
    p2p: list[P2pStatus] = []
    faults: dict[int, str] = {}
    for a, b in combinations(gpus, 2):
        if faults.keys() & {a.index, b.index}:
            continue
        try:
            statuses = _read_p2p(inquiry, a, b)
            links[a.index, b.index] = _read_link(inquiry, a, b, statuses.get("n"))
        except GpuFault as fault:
            faults |= _blame(inquiry, fault, a, b)
            continue
        p2p += [P2pStatus(a.index, b.index, letter, status) for letter, status in statuses.items()]
    return Paths(
        {pair: link for pair, link in links.items() if link is not None and not faults.keys() & set(pair)},
        tuple(status for status in p2p if not faults.keys() & {status.a, status.b}),
        faults,
    )


def _blame(inquiry: Inquiry, fault: GpuFault, a: Gpu, b: Gpu) -> dict[int, str]:
    """Which of two GPUs went away: NVML does not say so when it is asked about both."""
    faults = {}
    for gpu in (a, b):
        try:
            inquiry.attempt((gpu.index,), inquiry.nvml.nvmlDeviceGetMemoryInfo, gpu.handle)
        except GpuFault as own:
            faults[gpu.index] = own.words
    if not faults:
        inquiry.remark("link", (a.index, b.index), f"not known, NVML says {fault.words!r} of the two together")
    return faults


def _read_p2p(inquiry: Inquiry, a: Gpu, b: Gpu) -> dict[str, str]:
    """Status by letter of the capability; what the driver does not tell is left out."""
    call, pair = inquiry.nvml.nvmlDeviceGetP2PStatus, (a.index, b.index)
    numbers = {
        letter: inquiry.ask("peer access", pair, call, a.handle, b.handle, capability)
        for letter, capability in _CAPABILITIES.items()
    }
    return {letter: _STATUSES.get(number, "U") for letter, number in numbers.items() if number is not None}


def _read_link(inquiry: Inquiry, a: Gpu, b: Gpu, nvlink_status: str | None) -> LinkClass | None:
    """NVLinks between the two, directly or through switches; else the nearest common ancestor on PCIe."""
    nvlinks = _nvlinks(inquiry, a, b, nvlink_status)
    if nvlinks is None:
        return None
    return LinkClass("NV", nvlinks) if nvlinks else _read_pcie_path(inquiry, a, b)


def _nvlinks(inquiry: Inquiry, a: Gpu, b: Gpu, nvlink_status: str | None) -> int | None:
    """Number of NVLinks between two GPUs, ``None`` if it is not known.

    :param nvlink_status: of peer access over NVLink, ``None`` where the driver does not tell.
    """
    pair = (a.index, b.index)
    named = (a.ends.to_gpus.get(b.index, 0), b.ends.to_gpus.get(a.index, 0))
    ends = (a.ends.towards(b), b.ends.towards(a))
    if 0 in ends or all(named):
        if named[0] != named[1]:
            words = f"GPU {a.index} lists {named[0]} that are up, GPU {b.index} {named[1]}; the lower number counts"
            inquiry.remark("NVLinks", pair, words)
        return min(named)
    if a.ends.to_switches and b.ends.to_switches:
        return min(a.ends.to_switches, b.ends.to_switches)
    if not any(named) and nvlink_status in (None, "U"):
        inquiry.remark("link", pair, _why_open(ends))
        return None
    if not any(named) and nvlink_status != "OK":
        return 0
    if ends[0] is None or ends[1] is None:
        inquiry.remark("link", pair, "NVLink connects them, the driver does not say how many links are up")
        return None
    if not any(named):
        inquiry.remark(
            "number of NVLinks", pair, f"at most {min(ends[0], ends[1])}, the driver does not say where they end"
        )
    return min(ends[0], ends[1])


def _why_open(ends: tuple[int | None, int | None]) -> str:
    which = "which NVLinks are up" if None in ends else "where the NVLinks that are up end"
    return f"not known, the driver says neither {which} nor whether the GPUs reach each other over NVLink"


def _read_pcie_path(inquiry: Inquiry, a: Gpu, b: Gpu) -> LinkClass | None:
    call, pair = inquiry.nvml.nvmlDeviceGetTopologyCommonAncestor, (a.index, b.index)
    answer = inquiry.attempt(pair, call, a.handle, b.handle)
    if answer.error in NOT_OF_THIS_DRIVER:
        inquiry.remember("link", pair, answer, call.__name__)
    elif answer.error is not None:
        reason = f"the driver does not say ({answer.words}), as in virtual machines that hide PCIe"
        inquiry.remark("link", pair, reason)
    elif answer.value not in _ANCESTORS:
        inquiry.remark("link", pair, f"not known, the driver answers with an unknown level, {answer.value}")
    name = _ANCESTORS.get(answer.value)
    return None if name is None else LinkClass(name)
