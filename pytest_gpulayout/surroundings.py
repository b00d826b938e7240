"""What surrounds the processes of a server: facts that its logs do not hold.

Knows which facts decide how NCCL connects two ranks, and how they are named. Leaves reading them to
:mod:`~pytest_gpulayout.adapters.surroundings`, and what they mean to :mod:`~pytest_gpulayout.causes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pytest_gpulayout.nccl_log import LogLine


@dataclass(frozen=True, slots=True)
class RankSurroundings:
    """What surrounds the process of one rank; ``None`` is what could not be read.

    :param host: its host name, which NCCL compares together with the boot id.
    :param environment: its variables of NCCL, CUDA and vLLM as it was started.
    :param configuration: ``NAME=VALUE`` lines of the files that NCCL reads, the one that wins first.
    :param namespaces: kind to identity, e.g. ``{"ipc": "ipc:[4026531839]"}``.
    :param shm_device: device number of its ``/dev/shm``; NCCL shares memory only where it is the same.
    :param shm_bytes: size of that mount. :param verbs: names in its ``/dev/infiniband``.
    :param container: the mark that shows that it runs in one.
    """

    pid: int
    host: str | None = None
    environment: Mapping[str, str] | None = None
    configuration: tuple[LogLine, ...] = ()
    namespaces: Mapping[str, str] = field(default_factory=dict)
    shm_device: int | None = None
    shm_bytes: int | None = None
    verbs: tuple[str, ...] | None = None
    container: str | None = None


@dataclass(frozen=True, slots=True)
class PciSlot:
    """What stands between a GPU and its peers on the PCIe bus; ``None`` is what could not be read.

    :param iommu: type of its IOMMU group: ``identity`` lets DMA pass, ``DMA`` and ``DMA-FQ`` translate it.
    :param acs_redirects: bus ids of the bridges above it that send peer traffic up to the root complex.
    """

    iommu: str | None = None
    acs_redirects: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The machine and the processes of the ranks on it; ``None`` is what could not be read.

    :param ranks: by rank. :param rdma_devices: names in ``/sys/class/infiniband``.
    :param iommu_groups: 0 where no IOMMU is at work. :param slots: GPU by bus id, as sysfs writes it.
    """

    ranks: Mapping[int, RankSurroundings] = field(default_factory=dict)
    rdma_devices: tuple[str, ...] | None = None
    kernel_command_line: str | None = None
    iommu_groups: int | None = None
    slots: Mapping[str, PciSlot] = field(default_factory=dict)
