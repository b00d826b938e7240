"""The GPUs of this machine as NVIDIA's driver library reports them (NVML through ``pynvml``).

Knows the facts about single GPUs; what connects them is read by :mod:`~pytest_gpulayout.adapters.nvml_links`. NVML is
started for one reading and shut down again. What is not answered is ``None``, and a note of the topology says why; a
GPU that cannot be used stays in the list with its fault.

Sources: NVML API reference, "Device Queries" (``nvmlDeviceGetPowerManagementLimit`` is in milliwatts), "Multi
Instance GPU Management", ``nvmlGpuFabricInfo_v2_t``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from ctypes import byref
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from pytest_gpulayout.adapters.cpu_host import format_cpus
from pytest_gpulayout.adapters.nvml_inquiry import (
    BROKEN,
    CLOSED,
    NOT_OF_THIS_DRIVER,
    NOT_OF_THIS_HARDWARE,
    GpuFault,
    GpuInquiry,
    Inquiry,
    fault_words,
)
from pytest_gpulayout.adapters.nvml_library import no_gpu, nvml_library
from pytest_gpulayout.adapters.nvml_links import Ends, Gpu, read_nvlinks, read_paths
from pytest_gpulayout.errors import TopologyError
from pytest_gpulayout.topology import Device, Fabric, PcieLink, Topology, normal_bus_id

VISIBLE_DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"

_SET_WORDS = 64  # words of 64 bits in a set of CPUs or NUMA nodes: 4096 of them
_MW_PER_W = 1000
_SCOPE_NODE = 0  # NVML_AFFINITY_SCOPE_NODE
_FABRIC_STATES = {1: "not started", 2: "in progress", 3: "completed"}  # nvmlGpuFabricState_t; 0 is "not supported"
_FABRIC_COMPLETED = 3
_ARGUMENT_VERSION_MISMATCH = 25  # nvmlReturn_t: the driver does not know this version of a structure
_BUSY_FROM_BYTES = 1 << 30  # a desktop or a driver that keeps itself loaded holds less


class NvmlTopology:
    """The GPUs of this machine.

    :param environ: its ``CUDA_VISIBLE_DEVICES``, if set, restricts the devices to those it lists, by index or UUID.
        Indices are NVML's, which is CUDA's order under ``CUDA_DEVICE_ORDER=PCI_BUS_ID``.
    :param sysfs: where the kernel lists PCI devices, for drivers that do not tell what an NVLink leads to.
    """

    def __init__(self, environ: Mapping[str, str] | None = None, *, sysfs: Path = Path("/sys")) -> None:
        self._environ = os.environ if environ is None else environ
        self._sysfs = sysfs

    def probe(self) -> Topology:
        """Return the GPUs and the links between them.

        :raises TopologyError: there is no driver, no GPU, none that ``CUDA_VISIBLE_DEVICES`` leaves, or none that
            can be used.
        """
        with nvml_library() as nvml:
            count = nvml.nvmlDeviceGetCount()
            if count == 0:
                raise no_gpu("the driver is loaded and lists no GPU")
            return _Machine(Inquiry(nvml), count, self._sysfs).read(self._environ.get(VISIBLE_DEVICES_VARIABLE))


@dataclass(frozen=True, slots=True)
class _Facts:
    """What one GPU told; ``handle`` is ``None`` when it told nothing."""

    device: Device
    handle: Any = None
    ends: Ends = field(default_factory=Ends)
    is_busy: bool = False


@dataclass(frozen=True, slots=True)
class _Machine:
    inquiry: Inquiry
    count: int
    sysfs: Path

    def read(self, visible: str | None) -> Topology:
        """:param visible: value of ``CUDA_VISIBLE_DEVICES``."""
        nvml = self.inquiry.nvml
        driver_version = self.inquiry.ask("driver version", (), nvml.nvmlSystemGetDriverVersion)
        self.inquiry.driver_version = driver_version
        identified = [_identify(self.inquiry, index) for index in range(self.count)]
        known = Topology(tuple(facts.device for facts in identified), {}, "NVML", recorded=False)
        chosen = {device.index for device in _visible(known, visible)}
        buses = _bus_ids(known.devices)
        read = [self._read_gpu(facts, buses) for facts in identified if facts.device.index in chosen]
        answering = [
            Gpu(f.device.index, f.handle, f.device.index in buses.values(), f.ends)
            for f in read
            if f.device.fault is None
        ]
        paths = read_paths(self.inquiry, answering)
        devices = tuple(_with_fault(f.device, paths.faults.get(f.device.index)) for f in read)
        _require_usable(devices)
        return Topology(
            devices=devices,
            links=paths.links,
            source="NVML" if visible is None else f"NVML, {VISIBLE_DEVICES_VARIABLE}={visible}",
            recorded=False,
            driver_version=driver_version,
            cuda_version=_cuda_version(self.inquiry),
            nvml_version=self.inquiry.ask("NVML version", (), nvml.nvmlSystemGetNVMLVersion),
            p2p=paths.p2p,
            notes=(*_fault_notes(devices), *self.inquiry.notes(chosen)),
            busy=frozenset(f.device.index for f in read if f.is_busy and f.device.fault is None),
        )

    def _read_gpu(self, facts: _Facts, buses: Mapping[str, int]) -> _Facts:
        if facts.device.fault is not None:
            return facts
        gpu = GpuInquiry(self.inquiry, facts.device.index, facts.handle)
        try:
            device, is_busy = _read_device(gpu, facts.device)
            nvlinks, ends = read_nvlinks(gpu, buses, self.sysfs)
        except GpuFault as fault:
            return replace(facts, device=_with_fault(facts.device, fault.words))
        return _Facts(replace(device, nvlinks=nvlinks), facts.handle, ends, is_busy)


def _identify(inquiry: Inquiry, index: int) -> _Facts:
    """Ask what a GPU is called; one that does not even tell this cannot be used."""
    nvml, broken = inquiry.nvml, BROKEN | CLOSED
    device = Device(index)
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
    except nvml.NVMLError as error:
        return _Facts(replace(device, fault=fault_words(error)))
    gpu = GpuInquiry(inquiry, index, handle)
    try:
        device = replace(device, name=gpu.ask("name", nvml.nvmlDeviceGetName, broken=broken))
        device = replace(device, uuid=gpu.ask("UUID", nvml.nvmlDeviceGetUUID, broken=broken))
        pci = gpu.ask("PCI bus id", nvml.nvmlDeviceGetPciInfo, broken=broken)
    except GpuFault as fault:
        return _Facts(replace(device, fault=fault.words), handle)
    return _Facts(replace(device, pci_bus_id=None if pci is None else pci.busId), handle)


def _bus_ids(devices: Sequence[Device]) -> dict[str, int]:
    """Index by normal PCI bus id."""
    normal = {device.index: normal_bus_id(device.pci_bus_id or "") for device in devices}
    return {bus_id: index for index, bus_id in normal.items() if bus_id is not None}


def _with_fault(device: Device, fault: str | None) -> Device:
    """What a GPU told before it went away may be half of the truth: only what it is called is kept."""
    if fault is None:
        return device
    return Device(device.index, device.name, device.uuid, device.pci_bus_id, fault=fault)


def _require_usable(devices: Sequence[Device]) -> None:
    if any(device.fault is None for device in devices):
        return
    faults = "".join(f"\n    GPU {device.index}: {device.fault}" for device in devices)
    raise TopologyError(
        f"an NVIDIA GPU that can be used was expected, found none among {len(devices)}:{faults}\n"
        "  in the NVIDIA driver of this machine\n"
        "  look at 'nvidia-smi' and 'dmesg | grep -i NVRM'; a lost GPU needs a reset of the machine"
    )


def _fault_notes(devices: Sequence[Device]) -> list[str]:
    return [f"links of GPU {d.index}: not known, {d.fault}" for d in devices if d.fault is not None]


def _cuda_version(inquiry: Inquiry) -> str | None:
    """``12040`` -> ``"12.4"``"""
    nvml = inquiry.nvml
    answer = inquiry.attempt((), nvml.nvmlSystemGetCudaDriverVersion_v2)
    number = answer.value
    if answer.error is not None:
        number = inquiry.ask("CUDA version", (), nvml.nvmlSystemGetCudaDriverVersion)
    return None if number is None else f"{number // 1000}.{number % 1000 // 10}"


def _read_device(gpu: GpuInquiry, device: Device) -> tuple[Device, bool]:
    """Return all facts about a GPU but its links, and whether somebody computes on it."""
    nvml = gpu.nvml
    memory = gpu.ask("memory", nvml.nvmlDeviceGetMemoryInfo)
    nodes = _members(gpu.ask("NUMA node", nvml.nvmlDeviceGetMemoryAffinity, _SET_WORDS, _SCOPE_NODE))
    cpus = _members(gpu.ask("CPU affinity", nvml.nvmlDeviceGetCpuAffinity, _SET_WORDS))
    full = replace(
        device,
        numa_node=nodes[0] if len(nodes) == 1 else format_cpus(nodes) or None,
        cpu_affinity=format_cpus(cpus) or None,
        memory_bytes=None if memory is None else int(memory.total),
        gpu_numa_id=_gpu_numa_id(gpu, nodes),
        mig=_mig_mode(gpu),
        pcie=_read_pcie(gpu),
        fabric=_read_fabric(gpu),
        power_limit_w=_power_limit_w(gpu),
    )
    return full, _is_busy(gpu, 0 if memory is None else int(memory.used))


def _members(words: Sequence[int] | None) -> list[int]:
    """Numbers of the bits that are set in an array of 64-bit words."""
    set_words = [(i, word) for i, word in enumerate(words or ()) if word]
    return [64 * i + bit for i, word in set_words for bit in range(64) if word >> bit & 1]


def _gpu_numa_id(gpu: GpuInquiry, nodes: Sequence[int]) -> int | None:
    """On Grace the node of the GPU's own memory, which has no CPU; elsewhere NVML repeats the node of the CPUs."""
    usual = NOT_OF_THIS_HARDWARE | NOT_OF_THIS_DRIVER
    node = gpu.ask("GPU NUMA id", gpu.nvml.nvmlDeviceGetNumaNodeId, usual=usual)
    if node is None or node < 0 or node in nodes or not nodes:
        return None
    return int(node)


def _power_limit_w(gpu: GpuInquiry) -> int | None:
    """What is set (``nvidia-smi -pl``); the limit that is enforced may be lower for a while, which is noise here."""
    usual = NOT_OF_THIS_HARDWARE | NOT_OF_THIS_DRIVER
    milliwatts = gpu.ask("power limit", gpu.nvml.nvmlDeviceGetPowerManagementLimit, usual=usual)
    return None if milliwatts is None else round(milliwatts / _MW_PER_W)


def _mig_mode(gpu: GpuInquiry) -> bool | None:
    answer = gpu.attempt(gpu.nvml.nvmlDeviceGetMigMode)
    if answer.error in NOT_OF_THIS_HARDWARE:
        return False
    if answer.error is not None:
        gpu.remember("MIG mode", answer, "nvmlDeviceGetMigMode")
        return None
    current, _pending = answer.value
    return bool(current)


def _read_pcie(gpu: GpuInquiry) -> PcieLink | None:
    nvml = gpu.nvml
    calls = (
        nvml.nvmlDeviceGetCurrPcieLinkGeneration,
        nvml.nvmlDeviceGetCurrPcieLinkWidth,
        nvml.nvmlDeviceGetMaxPcieLinkGeneration,
        nvml.nvmlDeviceGetMaxPcieLinkWidth,
    )
    link = PcieLink(*(gpu.ask("PCIe link", call) for call in calls))
    return None if link == PcieLink() else link


def _read_fabric(gpu: GpuInquiry) -> Fabric | None:
    """Ask for the newer structure first; a driver that knows neither knows no fabric."""
    nvml = gpu.nvml
    info = nvml.c_nvmlGpuFabricInfo_v2_t()
    answer = gpu.attempt(nvml.nvmlDeviceGetGpuFabricInfoV, byref(info))
    if answer.error in NOT_OF_THIS_DRIVER | {_ARGUMENT_VERSION_MISMATCH}:
        info = nvml.c_nvmlGpuFabricInfo_t()
        answer = gpu.attempt(nvml.nvmlDeviceGetGpuFabricInfo, byref(info))
    if answer.error is not None:
        if answer.error not in NOT_OF_THIS_HARDWARE | NOT_OF_THIS_DRIVER:
            gpu.remember("fabric", answer, "nvmlDeviceGetGpuFabricInfo")
        return None
    if info.state not in _FABRIC_STATES:
        return None
    status = "Success" if info.status == 0 else str(nvml.NVMLError(info.status))
    if info.state != _FABRIC_COMPLETED or info.status != 0:
        return Fabric(_FABRIC_STATES[info.state], status)
    cluster = UUID(bytes=bytes(info.clusterUuid))
    return Fabric(_FABRIC_STATES[info.state], status, info.cliqueId, str(cluster) if cluster.int else None)


def _is_busy(gpu: GpuInquiry, used_bytes: int) -> bool:
    """Whether a process computes on a GPU, or, where the driver lists none, its memory is in use."""
    nvml = gpu.nvml
    listed = False
    # The names without a version raise an error of pynvml's own where the newest version is missing.
    for calls in (
        (nvml.nvmlDeviceGetComputeRunningProcesses_v3, nvml.nvmlDeviceGetComputeRunningProcesses_v2),
        (nvml.nvmlDeviceGetMPSComputeRunningProcesses_v3, nvml.nvmlDeviceGetMPSComputeRunningProcesses_v2),
    ):
        answers = (gpu.attempt(call) for call in calls)
        processes = next((answer.value for answer in answers if answer.error is None), None)
        if processes:
            return True
        listed = listed or processes is not None
    return not listed and used_bytes > _BUSY_FROM_BYTES


def _visible(topology: Topology, variable: str | None) -> tuple[Device, ...]:
    """Devices that the variable leaves, in the order of their indices."""
    if variable is None:
        return topology.devices
    wanted = [text.strip() for text in variable.split(",") if text.strip()]
    instances = [text for text in wanted if text.startswith("MIG-")]
    if instances:
        raise TopologyError(
            f"{VISIBLE_DEVICES_VARIABLE} was expected to list whole GPUs, found MIG instances: "
            f"{', '.join(instances)}\n"
            f"  in the environment: {VISIBLE_DEVICES_VARIABLE}={variable}; MIG instances cannot talk to each other\n"
            f"  list whole GPUs ({_listed(topology)}) whose MIG mode is off: nvidia-smi -i INDEX -mig 0"
        )
    chosen = {text: topology.find(text) for text in wanted}
    unknown = [text for text, device in chosen.items() if device is None]
    if unknown or not wanted:
        raise TopologyError(
            f"{VISIBLE_DEVICES_VARIABLE} was expected to list GPUs of this machine, found "
            f"{', '.join(map(repr, unknown)) or 'that it is empty, which hides all'}\n"
            f"  in the environment: {VISIBLE_DEVICES_VARIABLE}={variable}; NVML lists {_listed(topology)}\n"
            f"  unset it, or list indices or UUIDs of these GPUs"
        )
    return tuple(device for device in topology.devices if device in chosen.values())


def _listed(topology: Topology) -> str:
    return ", ".join(f"{device.index} ({device.uuid or device.fault})" for device in topology.devices)
