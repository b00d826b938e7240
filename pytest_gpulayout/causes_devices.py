"""What GPUs, their links, the driver and the PCIe bus do not allow.

Knows what NCCL asks of them before it connects two ranks of one host (NVIDIA/nccl 2.30 ``src/graph/paths.cc``,
``ncclTopoCheckP2p``), and what only shows in the machine: IOMMU and ACS leave no line in NVIDIA's log.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from pytest_gpulayout.causes_case import Case, Finding, SlowUse, and_more, at
from pytest_gpulayout.surroundings import PciSlot
from pytest_gpulayout.topology import P2P_CAPABILITIES, Device, P2pStatus, sysfs_bus_id
from pytest_gpulayout.topology_faults import name_gpus

_REFUSED_ADVICE = {
    "CNS": "look at the BIOS (ACS, Above 4G decoding), the IOMMU, and whether the virtual machine hides the switch",
    "GNS": "expected of these GPUs without NVLink; if it is wanted, allow shared memory: --gpu-transport=p2p,shm",
    "TNS": "use GPUs behind one PCIe switch or with NVLink: gpulayout topo shows the best placement",
    "DR": "take the registry key out of the driver's module options (NVreg_RegistryDwords) and reload it",
    "NS": "look at nvidia-smi topo -p2p r: virtual GPUs and some clouds have no P2P; then allow shared memory",
}
_GEFORCE_ADVICE = (
    "GeForce cards have no P2P over PCIe in NVIDIA's driver: an NVLink bridge where the card takes one, "
    "or allow shared memory: --gpu-transport=p2p,shm"
)


def p2p_refused(case: Case) -> Iterator[Finding]:
    """NVML's status is what NCCL asks, and says why; NCCL's own line names the pair only."""
    refused = [(use, status) for use in case.local for status in [_refusal(case, use)] if status is not None]
    for use, status in refused[:1]:
        geforce = status.status != "DR" and _is_geforce(case, use)
        more = and_more((use.src, use.dst) for use, _ in refused)
        yield Finding(
            f"the driver refuses P2P between {name_gpus(sorted((status.a, status.b)))}{more}: {status.refusal}",
            f"{case.topology_source} P2P status of GPU {status.a} and {status.b}",
            None,
            f"{P2P_CAPABILITIES.get(status.capability or '', 'P2P')}: {status.status}",
            _GEFORCE_ADVICE if geforce else _REFUSED_ADVICE[status.status],
        )
    if not refused and case.local and (line := case.line(_P2P_DISABLED)):
        match = re.search(_P2P_DISABLED, line.text)
        gpus = name_gpus(sorted((int(match[1]), int(match[2])))) if match else "the GPUs"
        geforce = all(_is_geforce(case, use) for use in case.local)
        advice = _GEFORCE_ADVICE if geforce else "type nvidia-smi topo -p2p r to see why; then allow shared memory"
        yield at(f"the driver refuses P2P between {gpus}", line, advice)


def nvlink_refused(case: Case) -> Iterator[Finding]:
    """NCCL gives up where NVLink is there and the driver refuses it."""
    if line := case.line(r"P2P is disabled between NVLINK connected GPUs"):
        yield at(
            "the driver refuses P2P between GPUs that NVLink connects",
            line,
            "look for a hardware fault: nvidia-smi nvlink -s, nvidia-smi topo -p2p n, dmesg | grep -i xid",
        )


_P2P_DISABLED = r"P2P is disabled between connected GPUs (\d{1,9}) and (\d{1,9})"


def _is_geforce(case: Case, use: SlowUse) -> bool:
    """Whether consumer cards are to be connected without NVLink."""
    link = case.link(use)
    named = any("GeForce" in (device.name or "") for device in case.devices(use) or ())
    return named and (link is None or not link.is_nvlink)


def _refusal(case: Case, use: SlowUse) -> P2pStatus | None:
    """The status for reading or writing that is not OK; NCCL asks for both. An unknown one is no evidence."""
    pair = {device.index for device in case.devices(use) or ()}
    link = case.link(use)
    asked = {"r", "w", None, *(("n",) if link is not None and link.is_nvlink else ())}
    statuses = case.topology.p2p if case.topology else ()
    refused = (status for status in statuses if status.capability in asked and status.status in _REFUSED_ADVICE)
    return next((status for status in refused if {status.a, status.b} == pair), None)


def fabric_manager_down(case: Case) -> Iterator[Finding]:
    """CUDA's error 802 (``cudaErrorSystemNotReady``): no GPU behind NVSwitch works before the fabric manager."""
    if line := case.line(_NOT_INITIALIZED) or case.server_line(_NOT_INITIALIZED):
        yield at(
            "the fabric manager is not running: CUDA says that the system is not yet initialized",
            line,
            "systemctl start nvidia-fabricmanager, of the driver's version; nvidia-smi -q must show Fabric: Success",
        )


_NOT_INITIALIZED = r"system not yet initialized|cudaErrorSystemNotReady|CUDA_ERROR_SYSTEM_NOT_READY"


def fabric_not_ready(case: Case) -> Iterator[Finding]:
    """GPUs behind NVSwitch that the fabric manager has not registered."""
    for device in _slow_devices(case):
        if device.fabric is not None and not device.fabric.is_ready:
            yield Finding(
                "the fabric manager has not registered the GPUs: NVLink through the switches cannot be used",
                f"{case.topology_source} fabric state of GPU {device.index}",
                None,
                f"{device.fabric.state}, {device.fabric.status}",
                "systemctl status nvidia-fabricmanager; it must run in the version of the driver",
            )
            return


def _slow_devices(case: Case) -> list[Device]:
    """Devices of ranks that are slow on one host or unconnected, each once, by index."""
    found = {device.index: device for use in (*case.local, *case.unconnected) for device in case.devices(use) or ()}
    return [found[index] for index in sorted(found)]


def nvlinks_down(case: Case) -> Iterator[Finding]:
    """GPUs that NVLink does not connect, with NVLinks that are down; a lost bridge looks like one never bought."""
    for use in case.local:
        link = case.link(use)
        if link is None or link.name in ("NV", "XGMI"):
            continue
        for device in case.devices(use) or ():
            down = sum(len(group.links) for group in device.nvlinks if not group.active)
            if down:
                total = sum(len(group.links) for group in device.nvlinks)
                yield Finding(
                    f"{name_gpus(sorted(d.index for d in case.devices(use) or ()))} are linked by {link}, "
                    "and NVLinks of theirs are down",
                    f"{case.topology_source} NVLink state of GPU {device.index}",
                    None,
                    f"{down} of {total} NVLinks are down",
                    "if a bridge belongs there, seat it again and look at nvidia-smi nvlink -s",
                )
                return


def iommu_or_acs(case: Case) -> Iterator[Finding]:
    """Both stand in the way of P2P over PCIe alone, and only between GPUs that NCCL would connect."""
    warned = case.line(_P2P_DISABLED) is not None
    for use in case.local:
        link, devices = case.link(use), case.devices(use) or ()
        if (link is not None and link.name in ("PIX", "PXB")) or (warned and (link is None or not link.is_nvlink)):
            finding = _acs(case, devices) or _iommu(case, devices)
            if finding is not None:
                yield finding
                return
    line = case.line(r"Missing \"iommu=pt\" from kernel command line")
    if line is not None and (case.local or case.unconnected):
        yield at("the kernel runs without iommu=pt", line, _IOMMU_ADVICE)


_IOMMU_ADVICE = "add iommu=pt to the kernel command line and reboot, or switch the IOMMU off in the BIOS"


def _acs(case: Case, devices: Iterable[Device]) -> Finding | None:
    for device in devices:
        if (slot := _slot(case, device)) and slot.acs_redirects:
            return Finding(
                f"ACS sends the peer traffic of GPU {device.index} up to the root complex",
                f"/sys/bus/pci/devices/{slot.acs_redirects[0]}/config",
                None,
                f"ACSCtl ReqRedir or CmpltRedir at {', '.join(slot.acs_redirects)}",
                "switch ACS off in the BIOS, or with setpci at these bridges; lspci -vvv shows ACSCtl",
            )
    return None


def _iommu(case: Case, devices: Sequence[Device]) -> Finding | None:
    known = [slot for device in devices if (slot := _slot(case, device)) and slot.iommu is not None]
    for device in devices:
        slot = _slot(case, device)
        if slot is not None and (slot.iommu or "").startswith("DMA"):
            where = f"/sys/bus/pci/devices/{sysfs_bus_id(device.pci_bus_id or '')}/iommu_group/type"
            return Finding(
                f"the IOMMU translates the DMA of GPU {device.index}", where, None, slot.iommu, _IOMMU_ADVICE
            )
    asked = _iommu_asked_for(case.surroundings.kernel_command_line or "")
    if known or case.surroundings.iommu_groups == 0 or not asked:
        return None
    return Finding("the kernel runs with the IOMMU on, without iommu=pt", "/proc/cmdline", None, asked, _IOMMU_ADVICE)


# Parameters of the kernel, Documentation/admin-guide/kernel-parameters.txt; a parameter can have several values.
_IOMMU_ON = {"intel_iommu=on", "amd_iommu=on", "iommu=on", "iommu=force", "iommu=nopt", "iommu.passthrough=0"}
_IOMMU_OFF = {"iommu=pt", "iommu=off", "intel_iommu=off", "amd_iommu=off", "iommu.passthrough=1"}


def _iommu_asked_for(command_line: str) -> str:
    """Parameters that switch the IOMMU on; ``""`` where there are none, or where one of them lets DMA pass."""
    words = (word.partition("=") for word in command_line.split())
    given = [f"{name}={value}" for name, _, values in words for value in values.split(",")]
    return "" if _IOMMU_OFF & set(given) else " ".join(word for word in given if word in _IOMMU_ON)


def _slot(case: Case, device: Device) -> PciSlot | None:
    return case.surroundings.slots.get(sysfs_bus_id(device.pci_bus_id)) if device.pci_bus_id else None
