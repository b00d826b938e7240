"""GPUs, links and processes as NVIDIA's driver library reports them (NVML through ``pynvml``).

Knows how NVML's answers become the classes of ``nvidia-smi topo -m``. Each call starts NVML and shuts it down again.
Older drivers lack functions and virtual machines refuse some: what is not answered is ``None``.

Sources: NVML API reference, sections "NvLink Methods", "Device Queries" (``nvmlDeviceGetTopologyCommonAncestor``,
``nvmlDeviceGetP2PStatus``) and "Field Value Queries"; ``nvml.h`` of CUDA 13 for the numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from pytest_gpulayout.adapters.cpu_host import format_cpus
from pytest_gpulayout.adapters.nvml_library import no_gpu, nvml_library, optional
from pytest_gpulayout.errors import TopologyError
from pytest_gpulayout.links import LinkClass
from pytest_gpulayout.topology import Device, P2pStatus, Topology

VISIBLE_DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"

# nvmlGpuTopologyLevel_t. Two GPUs on one board (0) meet at the board's own switch, as nvidia-smi prints it.
_ANCESTORS = {0: "PIX", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
# nvmlGpuP2PCapsIndex_t, by the letter of `nvidia-smi topo -p2p`. pynvml's own name for READ is a tuple.
_CAPABILITIES = {"r": 0, "w": 1, "n": 2}
# nvmlGpuP2PStatus_t
_STATUSES = {0: "OK", 1: "CNS", 2: "GNS", 3: "TNS", 4: "DR", 5: "NS", 6: "U"}
_REMOTE_IS_SWITCH = 2  # nvmlIntNvLinkDeviceType_t
_FIELD_SWITCH_LINKS = 147  # NVML_FI_DEV_NVSWITCH_CONNECTED_LINK_COUNT
_SET_WORDS = 64  # words of 64 bits in a set of CPUs or NUMA nodes: 4096 of them


class NvmlTopology:
    """The GPUs of this machine.

    :param environ: its ``CUDA_VISIBLE_DEVICES``, if set, restricts the devices to those it lists, by index or UUID.
        Indices are NVML's, which is CUDA's order under ``CUDA_DEVICE_ORDER=PCI_BUS_ID``.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        self._environ = os.environ if environ is None else environ

    def probe(self) -> Topology:
        """Return the GPUs and the links between them.

        :raises TopologyError: there is no driver, no GPU, or none that ``CUDA_VISIBLE_DEVICES`` leaves.
        """
        with nvml_library() as nvml:
            count = nvml.nvmlDeviceGetCount()
            if count == 0:
                raise no_gpu("the driver is loaded and lists no GPU")
            everything = Topology(tuple(_read_device(nvml, i) for i in range(count)), {}, "NVML", recorded=False)
            devices = _visible(everything, self._environ.get(VISIBLE_DEVICES_VARIABLE))
            ports = [_read_ports(nvml, device) for device in devices]
            links = {(a.index, b.index): _link(nvml, a, b) for a, b in combinations(ports, 2)}
            return Topology(
                devices=devices,
                links={pair: link for pair, link in links.items() if link is not None},
                source="NVML",
                recorded=False,
                driver_version=optional(nvml.nvmlSystemGetDriverVersion),
                cuda_version=_cuda_version(nvml),
                p2p=tuple(_read_p2p(nvml, ports)),
            )


def _read_device(nvml: Any, index: int) -> Device:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = optional(nvml.nvmlDeviceGetMemoryInfo, handle)
    # Not nvmlDeviceGetNumaNodeId: on Grace that is the node of the GPU's own memory, which has no CPU.
    nodes = _members(optional(nvml.nvmlDeviceGetMemoryAffinity, handle, _SET_WORDS, 0))
    cpus = _members(optional(nvml.nvmlDeviceGetCpuAffinity, handle, _SET_WORDS))
    return Device(
        index=index,
        name=nvml.nvmlDeviceGetName(handle),
        uuid=nvml.nvmlDeviceGetUUID(handle),
        pci_bus_id=nvml.nvmlDeviceGetPciInfo(handle).busId,
        numa_node=nodes[0] if len(nodes) == 1 else format_cpus(nodes) or None,
        cpu_affinity=format_cpus(cpus) or None,
        memory_bytes=None if memory is None else int(memory.total),
    )


def _members(words: Sequence[int] | None) -> list[int]:
    """Numbers of the bits that are set in an array of 64-bit words."""
    return [64 * i + bit for i, word in enumerate(words or ()) for bit in range(64) if word >> bit & 1]


def _cuda_version(nvml: Any) -> str | None:
    """``12040`` -> ``"12.4"``"""
    number = optional(nvml.nvmlSystemGetCudaDriverVersion_v2)
    return None if number is None else f"{number // 1000}.{number % 1000 // 10}"


def _visible(topology: Topology, variable: str | None) -> tuple[Device, ...]:
    """Devices that the variable leaves, in the order of their indices."""
    if variable is None:
        return topology.devices
    wanted = [text.strip() for text in variable.split(",") if text.strip()]
    chosen = {text: topology.find(text) for text in wanted}
    unknown = [text for text, device in chosen.items() if device is None]
    if unknown or not wanted:
        listed = ", ".join(f"{device.index} ({device.uuid})" for device in topology.devices)
        raise TopologyError(
            f"{VISIBLE_DEVICES_VARIABLE} was expected to list GPUs of this machine, found "
            f"{', '.join(map(repr, unknown)) or 'that it is empty, which hides all'}\n"
            f"  in the environment: {VISIBLE_DEVICES_VARIABLE}={variable}; NVML lists {listed}\n"
            f"  unset it, or list indices or UUIDs of these GPUs"
        )
    return tuple(device for device in topology.devices if device in chosen.values())


@dataclass(frozen=True, slots=True)
class _Ports:
    """One GPU's handle and the other ends of its active NVLinks.

    :param remote_bus_ids: of the links that end at a device NVML can name, one entry per link.
    :param switch_links: links that end at an NVSwitch.
    """

    index: int
    handle: Any
    bus_id: str
    remote_bus_ids: tuple[str, ...]
    switch_links: int


def _read_ports(nvml: Any, device: Device) -> _Ports:
    handle = nvml.nvmlDeviceGetHandleByIndex(device.index)
    remotes, switch_links, types_known = [], 0, True
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        if optional(nvml.nvmlDeviceGetNvLinkState, handle, link) != 1:
            continue
        kind = optional(nvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link)
        types_known = types_known and kind is not None
        if kind == _REMOTE_IS_SWITCH:
            switch_links += 1
        elif remote := optional(nvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link):
            remotes.append(_normal_bus_id(remote.busId))
    if not types_known:
        switch_links = max(switch_links, _switch_links_by_field(nvml, handle))
    own = _normal_bus_id(device.pci_bus_id or "")
    return _Ports(device.index, handle, own, tuple(remotes), switch_links)


def _switch_links_by_field(nvml: Any, handle: Any) -> int:
    values = optional(nvml.nvmlDeviceGetFieldValues, handle, [_FIELD_SWITCH_LINKS])
    return int(values[0].value.uiVal) if values is not None and values[0].nvmlReturn == 0 else 0


def _normal_bus_id(text: str) -> str:
    """``00000000:0F:00.0`` and ``0000:0f:00.0`` name one device: NVML writes the domain with 4 or 8 digits."""
    domain, _, rest = text.lower().partition(":")
    return f"{domain.lstrip('0')}:{rest}"


def _link(nvml: Any, a: _Ports, b: _Ports) -> LinkClass | None:
    """NVLinks between the two, directly or through switches; else the nearest common ancestor on PCIe."""
    direct = min(a.remote_bus_ids.count(b.bus_id), b.remote_bus_ids.count(a.bus_id))
    nvlinks = direct or min(a.switch_links, b.switch_links)
    if nvlinks:
        return LinkClass("NV", nvlinks)
    level = optional(nvml.nvmlDeviceGetTopologyCommonAncestor, a.handle, b.handle)
    name = _ANCESTORS.get(level)
    return None if name is None else LinkClass(name)


def _read_p2p(nvml: Any, ports: Sequence[_Ports]) -> Iterator[P2pStatus]:
    for a, b in combinations(ports, 2):
        for letter, capability in _CAPABILITIES.items():
            status = optional(nvml.nvmlDeviceGetP2PStatus, a.handle, b.handle, capability)
            if status is not None:
                yield P2pStatus(a.index, b.index, letter, _STATUSES.get(status, "U"))
