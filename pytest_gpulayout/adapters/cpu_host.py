"""The CPU platform's devices: the cores that vLLM's ranks are bound to, and the NUMA nodes they lie on.

There is no GPU link to look at, so the names are honest: two ranks on one NUMA node are linked by ``NODE``, ranks on
different nodes by ``SYS``. Cores and nodes are read from /proc and /sys (Linux, ``Documentation/ABI/stable/
sysfs-devices-node``); the binding is vLLM's own variable ``VLLM_CPU_OMP_THREADS_BIND`` (``0-3|4-7``, one list of
cores per rank; ``nobind`` and ``auto`` leave it to the system or to vLLM).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

from pytest_gpulayout.errors import TopologyError
from pytest_gpulayout.links import parse_link_class
from pytest_gpulayout.topology import Device, Topology

BIND_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"


class CpuTopology:
    """One device per rank, on the cores this process may use.

    :param ranks: how many ranks share the machine.
    :param bind: value of ``VLLM_CPU_OMP_THREADS_BIND`` as the user set it, ``None`` to spread the cores evenly.
    """

    def __init__(self, ranks: int, bind: str | None) -> None:
        self._ranks = ranks
        self._bind = bind

    def probe(self) -> Topology:
        """Return the ranks' cores as devices.

        :raises TopologyError: fewer cores than ranks, or a binding that does not name one list per rank.
        """
        nodes = numa_nodes()
        devices = tuple(
            Device(
                index=rank,
                name=f"cores {format_cpus(cores)}",
                uuid=None,
                pci_bus_id=None,
                numa_node=_node_of(cores, nodes),
                cpu_affinity=format_cpus(cores),
                memory_bytes=None,
            )
            for rank, cores in enumerate(self._cores_of_ranks())
        )
        links = {
            (a.index, b.index): parse_link_class("NODE" if a.numa_node == b.numa_node else "SYS")
            for a, b in combinations(devices, 2)
        }
        return Topology(devices=devices, links=links, source="/proc and /sys", recorded=False, platform="cpu")

    def _cores_of_ranks(self) -> list[list[int]]:
        allowed = sorted(os.sched_getaffinity(0))
        if self._bind is None:
            return self._spread(allowed)
        if self._bind in ("nobind", "auto"):
            return [allowed] * self._ranks
        lists = [parse_cpus(part) for part in self._bind.split("|")]
        if len(lists) < self._ranks:
            raise TopologyError(
                f"{self._ranks} ranks need {self._ranks} lists of cores, found {len(lists)}\n"
                f"  in the environment: {BIND_VARIABLE}={self._bind}\n"
                f"  unset it to spread the cores evenly, or write one list per rank, such as 0-3|4-7"
            )
        if not all(lists):
            raise _binding_error(self._bind)
        return lists[: self._ranks]

    def _spread(self, allowed: Sequence[int]) -> list[list[int]]:
        if len(allowed) < self._ranks:
            raise TopologyError(
                f"{self._ranks} ranks need at least {self._ranks} cores, found {len(allowed)} "
                f"({format_cpus(allowed)})\n  on this machine, as far as this process may use it\n"
                f"  choose a smaller layout, such as --gpu-layout=tp{len(allowed)}"
            )
        nodes = numa_nodes()
        ordered = sorted(allowed, key=lambda cpu: (_node_of([cpu], nodes) or 0, cpu))
        share = len(ordered) // self._ranks
        return [sorted(ordered[rank * share : (rank + 1) * share]) for rank in range(self._ranks)]


def binding_of(devices: Sequence[Device]) -> str:
    """Return the value of ``VLLM_CPU_OMP_THREADS_BIND`` that puts each rank on its device's cores."""
    return "|".join(device.cpu_affinity or "" for device in devices)


def numa_nodes() -> dict[int, int]:
    """Core -> NUMA node; a machine without NUMA information has one node, 0."""
    nodes = {}
    for path in Path("/sys/devices/system/node").glob("node[0-9]*/cpulist"):
        node = int(path.parent.name.removeprefix("node"))
        nodes.update(dict.fromkeys(parse_cpus(path.read_text().strip()), node))
    return nodes


def _node_of(cores: Sequence[int], nodes: dict[int, int]) -> int | str | None:
    """The node of these cores; a range such as ``0-1`` when they lie on several."""
    found = sorted({nodes.get(core, 0) for core in cores})
    return found[0] if len(found) == 1 else format_cpus(found) or None


def cpu_model() -> str:
    """The processor's name as /proc/cpuinfo gives it, or the machine type where it gives none."""
    text = Path("/proc/cpuinfo").read_text(errors="replace")
    match = re.search(r"^(?:model name|Model|cpu)\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else os.uname().machine


def parse_cpus(text: str) -> list[int]:
    """``"0-2,5"`` -> ``[0, 1, 2, 5]``.

    :raises TopologyError: the text is not a list of cores.
    """
    cpus: list[int] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise _binding_error(text)
        cpus += range(int(match[1]), int(match[2] or match[1]) + 1)
    return cpus


def _binding_error(text: str) -> TopologyError:
    return TopologyError(
        f"a list of cores such as 0-3,8 was expected, found {text!r}\n"
        f"  in the environment: {BIND_VARIABLE}\n  write numbers and ranges, one list per rank: 0-3|4-7"
    )


def format_cpus(cpus: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``"0-2,5"``."""
    runs: list[list[int]] = []
    for cpu in sorted(set(cpus)):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
