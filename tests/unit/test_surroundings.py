from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from pytest_gpulayout.adapters.surroundings import read_surroundings
from pytest_gpulayout.nccl_log import LogLine
from pytest_gpulayout.surroundings import PciSlot, RankSurroundings, Surroundings

GPU, NIC = "0000:1a:00.0", "0000:1c:00.0"
BRIDGES = ("0000:00:01.0", "0000:18:00.0")


def write(path: Path, content: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


class Machine:
    """A ``/proc`` and a ``/sys`` to be read."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.sys = folder / "proc", folder / "sys"
        self.own_uts = "uts:[4026531838]"
        self.link(self.proc / "self" / "ns" / "uts", self.own_uts)

    def read(self, *pids: int) -> Surroundings:
        return read_surroundings(dict(enumerate(pids)), proc=self.proc, sys=self.sys)

    def rank(self, pid: int) -> RankSurroundings:
        return self.read(pid).ranks[0]

    def process(self, pid: int, files: Mapping[str, str | bytes]) -> Path:
        folder = self.proc / str(pid)
        for name, content in files.items():
            write(folder / name, content)
        return folder

    def link(self, path: Path, target: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    def pci(self, bus_id: str, below: tuple[str, ...], files: Mapping[str, str | bytes]) -> None:
        """A device in its place below its bridges, and the link under ``bus``."""
        folder = self.sys.joinpath("devices", "pci0000:00", *below, bus_id)
        for name, content in files.items():
            write(folder / name, content)
        self.link(self.sys / "bus" / "pci" / "devices" / bus_id, str(folder))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# -- a process -------------------------------------------------------------------------------------------------------


def test_only_variables_of_nccl_cuda_and_vllm_are_kept_and_no_secret(machine: Machine) -> None:
    variables = {
        "NCCL_P2P_DISABLE": "1",
        "NCCL_SOCKET_IFNAME": "=eth0,eth1",
        "CUDA_VISIBLE_DEVICES": "0,1",
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "",
        "VLLM_API_KEY": "sk-1",
        "VLLM_S3_SECRET": "s",
        "CUDA_AUTH_TOKEN": "t",
        "HF_TOKEN": "h",
        "HOME": "/root",
        "MY_NCCL_DEBUG": "x",
    }
    environ = b"\0".join(f"{name}={value}".encode() for name, value in variables.items()) + b"\0\xff\0=\0junk"
    machine.process(42, {"environ": environ})

    assert machine.rank(42).environment == {
        "CUDA_VISIBLE_DEVICES": "0,1",
        "NCCL_P2P_DISABLE": "1",
        "NCCL_SOCKET_IFNAME": "=eth0,eth1",
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "",
    }


def test_namespaces(machine: Machine) -> None:
    for kind in ("ipc", "pid", "mnt", "net", "uts", "user"):
        machine.link(machine.proc / "42" / "ns" / kind, f"{kind}:[4026531838]")

    assert machine.rank(42).namespaces == {
        kind: f"{kind}:[4026531838]" for kind in ("ipc", "pid", "mnt", "net", "uts")
    }


@pytest.mark.parametrize(
    ("uts", "host"),
    [("uts:[4026531838]", "gpu-a1"), ("uts:[4026532999]", "pod-7"), (None, "pod-7")],
)
def test_host_name_is_that_of_the_kernel_in_its_own_namespace_alone(
    machine: Machine, uts: str | None, host: str
) -> None:
    write(machine.proc / "sys" / "kernel" / "hostname", "gpu-a1\n")
    folder = machine.process(42, {"root/etc/hostname": "pod-7\n"})
    if uts is not None:
        machine.link(folder / "ns" / "uts", uts)

    assert machine.rank(42).host == host


def test_shared_memory_is_that_of_the_process(machine: Machine) -> None:
    shm = machine.proc / "42" / "root" / "dev" / "shm"
    shm.mkdir(parents=True)
    size = os.statvfs(shm)
    rank = machine.rank(42)

    assert rank.shm_device == shm.stat().st_dev
    assert rank.shm_bytes == size.f_blocks * size.f_frsize


@pytest.mark.parametrize(
    ("files", "verbs"),
    [
        ({"root/dev/infiniband/uverbs0": "", "root/dev/infiniband/rdma_cm": ""}, ("rdma_cm", "uverbs0")),
        ({"root/dev/null": ""}, ()),
        ({"environ": ""}, None),
    ],
)
def test_rdma_devices_that_a_process_can_open(
    machine: Machine, files: dict[str, str | bytes], verbs: tuple[str, ...] | None
) -> None:
    machine.process(42, files)

    assert machine.rank(42).verbs == verbs


@pytest.mark.parametrize(
    ("files", "mark"),
    [
        ({"root/.dockerenv": ""}, "/.dockerenv"),
        ({"root/run/.containerenv": 'engine="podman-5"'}, "/run/.containerenv"),
        ({"cgroup": "0::/kubepods.slice/kubepods-burstable.slice/cri-1.scope\n"}, "cgroup kubepods"),
        ({"cgroup": "0::/user.slice/user-1000.slice/session-2.scope\n"}, None),
        ({}, None),
    ],
)
def test_container_marks(machine: Machine, files: dict[str, str | bytes], mark: str | None) -> None:
    machine.process(42, files)

    assert machine.rank(42).container == mark


PASSWD = "root:x:0:0:root:/root:/bin/sh\nserve:x:1000:1000::/home/serve:/bin/sh\nbroken\n"
STATUS = "Name:\tpython\nUid:\t1000\t1000\t1000\t1000\n"


def test_files_of_nccl_are_read_in_the_root_of_the_process_the_user_s_first(machine: Machine) -> None:
    files = {
        "status": STATUS,
        "root/etc/passwd": PASSWD,
        "root/etc/nccl.conf": "# cluster\nNCCL_DEBUG=WARN\n\nNCCL_P2P_DISABLE = 1 \nOTHER=2\nNCCL_AUTH_TOKEN=x\n",
        "root/home/serve/.nccl.conf": "NCCL_IB_DISABLE=1",
    }
    machine.process(42, files)

    assert machine.rank(42).configuration == (
        LogLine("/home/serve/.nccl.conf of rank 0", 1, "NCCL_IB_DISABLE=1"),
        LogLine("/etc/nccl.conf of rank 0", 2, "NCCL_DEBUG=WARN"),
        LogLine("/etc/nccl.conf of rank 0", 4, "NCCL_P2P_DISABLE=1"),
    )


@pytest.mark.parametrize(
    ("environ", "passwd", "found"),
    [
        ("NCCL_CONF_FILE=/opt/site.conf\0", PASSWD, ["/opt/site.conf of rank 0"]),
        ("", PASSWD, ["/home/serve/.nccl.conf of rank 0"]),
        ("", "root:x:0:0:root:/root:/bin/sh\n", []),
    ],
)
def test_a_variable_names_another_file_of_the_user(
    machine: Machine, environ: str, passwd: str, found: list[str]
) -> None:
    files = {
        "status": STATUS,
        "environ": environ,
        "root/etc/passwd": passwd,
        "root/opt/site.conf": "NCCL_NET=Socket",
        "root/home/serve/.nccl.conf": "NCCL_NET=IB",
    }
    machine.process(42, files)

    assert [line.file for line in machine.rank(42).configuration] == found


def test_a_process_that_is_gone_leaves_everything_open(machine: Machine) -> None:
    assert machine.rank(999) == RankSurroundings(pid=999)


def test_a_file_that_may_not_be_read_leaves_its_fact_open(machine: Machine) -> None:
    folder = machine.process(42, {"root/etc/hostname": "pod-7"})
    (folder / "environ").mkdir()

    assert machine.rank(42).environment is None
    assert machine.rank(42).host == "pod-7"


def test_this_process_can_be_read() -> None:
    rank = read_surroundings({3: os.getpid()}).ranks[3]

    assert rank.pid == os.getpid()
    assert rank.namespaces["ipc"] == os.readlink("/proc/self/ns/ipc")
    assert rank.shm_bytes is not None
    assert rank.environment is not None


# -- the machine -----------------------------------------------------------------------------------------------------


def test_machine_without_anything_to_read(machine: Machine) -> None:
    assert machine.read() == Surroundings()


def test_kernel_and_iommu(machine: Machine) -> None:
    write(machine.proc / "cmdline", "ro quiet iommu=pt\n")
    for group in ("0", "1"):
        (machine.sys / "kernel" / "iommu_groups" / group).mkdir(parents=True)
    found = machine.read()

    assert (found.kernel_command_line, found.iommu_groups) == ("ro quiet iommu=pt", 2)


@pytest.mark.parametrize(
    ("folders", "devices"),
    [
        (("class/infiniband/mlx5_1", "class/infiniband/mlx5_0"), ("mlx5_0", "mlx5_1")),
        (("class/net",), ()),
        ((), None),
    ],
)
def test_rdma_devices(machine: Machine, folders: tuple[str, ...], devices: tuple[str, ...] | None) -> None:
    for folder in folders:
        (machine.sys / folder).mkdir(parents=True)

    assert machine.read().rdma_devices == devices


def config(*capabilities: tuple[int, int, int], size: int = 4096) -> bytes:
    """Configuration space with extended capabilities, each (id, offset, the word at +6), in a chain."""
    space = bytearray(size)
    for at, (identity, offset, word) in enumerate(capabilities):
        following = capabilities[at + 1][1] if at + 1 < len(capabilities) else 0
        space[offset : offset + 4] = (identity | 1 << 16 | following << 20).to_bytes(4, "little")
        space[offset + 6 : offset + 8] = word.to_bytes(2, "little")
    return bytes(space)


AER, ACS = 0x0001, 0x000D


@pytest.mark.parametrize(
    ("spaces", "redirects"),
    [
        ((config((AER, 0x100, 0), (ACS, 0x148, 0x1D)), config((ACS, 0x100, 0x00))), (BRIDGES[0],)),
        ((config((ACS, 0x100, 0x08)), config((ACS, 0x100, 0x04))), BRIDGES),
        ((config((ACS, 0x100, 0x11)), config((AER, 0x100, 0xFFFF))), ()),
        ((config(size=256), config((ACS, 0x100, 0x04))), (BRIDGES[1],)),
        ((config(size=64), config(size=256)), None),
        ((config((AER, 0x100, 0), (AER, 0x140, 0), (AER, 0x100, 0)), config()), ()),
        ((config((AER, 0xFFC, 0)), b"\xff" * 4096), ()),
    ],
    ids=["one", "both", "source validation only", "one unread", "unread", "chain in a circle", "junk"],
)
def test_bridges_above_a_gpu_that_redirect_peer_traffic(
    machine: Machine, spaces: tuple[bytes, bytes], redirects: tuple[str, ...] | None
) -> None:
    machine.pci(BRIDGES[0], (), {"class": "0x060400\n", "config": spaces[0]})
    machine.pci(BRIDGES[1], BRIDGES[:1], {"class": "0x060400\n", "config": spaces[1]})
    machine.pci(GPU, BRIDGES, {"class": "0x030200\n", "vendor": "0x10de\n", "config": config()})

    assert machine.read().slots == {GPU: PciSlot(iommu=None, acs_redirects=redirects)}


@pytest.mark.parametrize(
    ("files", "slot"),
    [
        ({"class": "0x030200", "vendor": "0x10de", "iommu_group/type": "DMA-FQ\n"}, PciSlot("DMA-FQ")),
        ({"class": "0x030000", "vendor": "0x1002", "iommu_group/type": "identity\n"}, PciSlot("identity")),
        ({"class": "0x030000", "vendor": "0x1a03"}, None),
        ({"class": "0x020700", "vendor": "0x15b3"}, None),
        ({}, None),
    ],
    ids=["NVIDIA", "AMD", "board graphics", "network card", "unread"],
)
def test_slots_are_those_of_gpus(machine: Machine, files: dict[str, str | bytes], slot: PciSlot | None) -> None:
    machine.pci(NIC, (), files or {"uevent": ""})

    assert machine.read().slots == ({NIC: slot} if slot else {})
