"""What surrounds the ranks of a running server, read from ``/proc`` and ``/sys`` (Linux, ``proc(5)``, ``sysfs(5)``).

Reads facts for :mod:`~pytest_gpulayout.causes` and judges none. Each fact that cannot be read (another user's
process, one that is gone, a system without IOMMU) is ``None`` by itself. Of an environment only variables of NCCL,
CUDA and vLLM are kept, and none that can hold a secret.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pytest_gpulayout.nccl_log import LogLine
from pytest_gpulayout.surroundings import PciSlot, RankSurroundings, Surroundings

_VARIABLE = re.compile(r"(?:NCCL|VLLM|CUDA)_[A-Z0-9_]+")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")
_SETTING = re.compile(r"\s*(?P<name>NCCL_[A-Z0-9_]+)\s*=\s*(?P<value>.*?)\s*")
_NAMESPACES = ("ipc", "pid", "mnt", "net", "uts")
_CONTAINER_FILES = (".dockerenv", "run/.containerenv")
_CONTAINER_GROUP = re.compile(r"docker|kubepods|containerd|libpod|lxc|crio")

_BUS_ID = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_GPU_VENDORS = ("0x10de", "0x1002")
_DISPLAY_CLASS = "0x03"
# PCI Express Base Specification, 7.9.2 (list of extended capabilities) and 7.7.11 (ACS); the names are those of
# Linux, include/uapi/linux/pci_regs.h: PCI_EXT_CAP_ID_ACS, PCI_ACS_CTRL, PCI_ACS_RR, PCI_ACS_CR.
_FIRST_EXTENDED = 0x100
_ACS_CAPABILITY = 0x000D
_ACS_CONTROL = 0x06
_ACS_REDIRECTS = 0x04 | 0x08


def read_surroundings(
    rank_pids: Mapping[int, int], *, proc: Path = Path("/proc"), sys: Path = Path("/sys")
) -> Surroundings:
    """Read what surrounds these processes of this machine.

    :param rank_pids: process id of each rank. :param proc: another root for tests. :param sys: likewise.
    """
    groups = _names(sys / "kernel" / "iommu_groups")
    return Surroundings(
        ranks={rank: _rank(rank, pid, proc) for rank, pid in rank_pids.items()},
        rdma_devices=_rdma_devices(sys),
        kernel_command_line=_text(proc / "cmdline"),
        iommu_groups=None if groups is None else len(groups),
        slots=dict(_slots(sys)),
    )


def _rank(rank: int, pid: int, proc: Path) -> RankSurroundings:
    folder = proc / str(pid)
    environment = _all_variables(folder / "environ")
    shm = folder / "root" / "dev" / "shm"
    return RankSurroundings(
        pid=pid,
        host=_host(folder, proc),
        environment=None if environment is None else _harmless(environment),
        configuration=tuple(_configuration(rank, folder, environment or {})),
        namespaces={kind: name for kind in _NAMESPACES if (name := _link(folder / "ns" / kind))},
        shm_device=_device(shm),
        shm_bytes=_size(shm),
        verbs=_verbs(folder / "root" / "dev"),
        container=_container(folder),
    )


# -- a process -------------------------------------------------------------------------------------------------------


def _all_variables(path: Path) -> dict[str, str] | None:
    text = _text(path)
    if text is None:
        return None
    pairs = (part.partition("=") for part in text.split("\0") if "=" in part)
    return {name: value for name, _, value in pairs}


def _harmless(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(environment.items())
        if _VARIABLE.fullmatch(name) and not _SECRET.search(name)
    }


def _host(folder: Path, proc: Path) -> str | None:
    """The kernel tells the name of the reader's own namespace alone; a container keeps its name in a file, too."""
    own, other = _link(proc / "self" / "ns" / "uts"), _link(folder / "ns" / "uts")
    if own is not None and own == other:
        return _first_line(proc / "sys" / "kernel" / "hostname")
    return _first_line(folder / "root" / "etc" / "hostname")


def _configuration(rank: int, folder: Path, environment: Mapping[str, str]) -> Iterator[LogLine]:
    """Settings in the files that NCCL reads (``src/misc/param.cc``, ``initEnv``), the file that wins first."""
    home = _home(folder)
    user_file = environment.get("NCCL_CONF_FILE") or (f"{home}/.nccl.conf" if home else None)
    for path in filter(None, (user_file, "/etc/nccl.conf")):
        text = _text(folder / "root" / path.lstrip("/"))
        for number, line in enumerate((text or "").splitlines(), start=1):
            match = _SETTING.fullmatch(line)
            if match and not _SECRET.search(match["name"]):
                yield LogLine(f"{path} of rank {rank}", number, f"{match['name']}={match['value']}")


def _home(folder: Path) -> str | None:
    """Home of the process's user as its own passwd names it; NCCL does not ask ``$HOME``."""
    status = re.search(r"^Uid:\s+(\d+)", _text(folder / "status") or "", re.MULTILINE)
    for line in (_text(folder / "root" / "etc" / "passwd") or "").splitlines():
        fields = line.split(":")
        if status and len(fields) >= 6 and fields[2] == status[1]:
            return fields[5]
    return None


def _verbs(devices: Path) -> tuple[str, ...] | None:
    """Names in ``/dev/infiniband``; none where there is no such folder, unknown where ``/dev`` cannot be read."""
    if _names(devices) is None:
        return None
    return _names(devices / "infiniband") or ()


def _container(folder: Path) -> str | None:
    for name in _CONTAINER_FILES:
        if _exists(folder / "root" / name):
            return f"/{name}"
    match = _CONTAINER_GROUP.search(_text(folder / "cgroup") or "")
    return f"cgroup {match[0]}" if match else None


# -- the machine -----------------------------------------------------------------------------------------------------


def _rdma_devices(sys: Path) -> tuple[str, ...] | None:
    """Without the kernel's RDMA modules there is no such folder, and no device."""
    if _names(sys / "class") is None:
        return None
    return _names(sys / "class" / "infiniband") or ()


def _slots(sys: Path) -> Iterator[tuple[str, PciSlot]]:
    """Every GPU of NVIDIA and AMD, by bus id."""
    devices = sys / "bus" / "pci" / "devices"
    for bus_id in _names(devices) or ():
        folder = devices / bus_id
        is_display = (_text(folder / "class") or "").startswith(_DISPLAY_CLASS)
        if is_display and (_text(folder / "vendor") or "").strip() in _GPU_VENDORS:
            yield bus_id, PciSlot(_first_line(folder / "iommu_group" / "type"), _acs_redirects(folder, devices))


def _acs_redirects(gpu: Path, devices: Path) -> tuple[str, ...] | None:
    """Bridges above a GPU that redirect; the path of a device names its bridges, from the root down."""
    above = [part for part in Path(os.path.realpath(gpu)).parts[:-1] if _BUS_ID.fullmatch(part)]
    controls = {bus_id: _acs_control(_bytes(devices / bus_id / "config")) for bus_id in above}
    if all(control is None for control in controls.values()):
        return None
    return tuple(bus_id for bus_id, control in controls.items() if (control or 0) & _ACS_REDIRECTS)


def _acs_control(config: bytes | None) -> int | None:
    """The ACS control register; ``None`` where extended capabilities cannot be read, which takes root.

    A device without the capability redirects nothing: 0.
    """
    if config is None or len(config) <= _FIRST_EXTENDED:
        return None
    at, seen = _FIRST_EXTENDED, set[int]()
    while at >= _FIRST_EXTENDED and at + _ACS_CONTROL + 2 <= len(config) and at not in seen:
        seen.add(at)
        header = int.from_bytes(config[at : at + 4], "little")
        if header & 0xFFFF == _ACS_CAPABILITY:
            return int.from_bytes(config[at + _ACS_CONTROL : at + _ACS_CONTROL + 2], "little")
        at = header >> 20 & 0xFFC
    return 0


# -- files that may not be there -------------------------------------------------------------------------------------


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _text(path: Path) -> str | None:
    content = _bytes(path)
    return None if content is None else content.decode("utf-8", "replace").removesuffix("\n")


def _first_line(path: Path) -> str | None:
    lines = (_text(path) or "").splitlines()
    return lines[0].strip() or None if lines else None


def _names(folder: Path) -> tuple[str, ...] | None:
    try:
        return tuple(sorted(os.listdir(folder)))
    except OSError:
        return None


def _link(path: Path) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except OSError:
        return False
    return True


def _device(path: Path) -> int | None:
    try:
        return path.stat().st_dev
    except OSError:
        return None


def _size(folder: Path) -> int | None:
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return status.f_blocks * status.f_frsize
