"""Binds a server on GPUs to the CPUs near them: where the scheduler may move it, equal runs differ.

All processes of the server get the CPUs of its GPUs (``sched_setaffinity(2)``, set by the keeper). vLLM can also bind
each worker and its memory to one NUMA node: ``--numa-bind --numa-bind-nodes 0 0 1 1``, a node per visible GPU. It
starts the worker through ``numactl --cpunodebind=N --membind=N`` then (``vllm/utils/numa_utils.py``, 0.32), which
must be installed and permitted, or the server dies. The nodes are always named, since vLLM does not look for them
itself where the affinity is already constrained.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pytest_gpulayout.adapters.cpu_host import format_cpus, numa_nodes, parse_cpus
from pytest_gpulayout.errors import TopologyError
from pytest_gpulayout.ports import ServerSpec
from pytest_gpulayout.topology import Device

_USERS_ARGUMENT = re.compile(r"--(?:no[-_])?numa[-_]bind[^=]*")  # vLLM takes "_" for "-"
_START_METHOD_VARIABLE = "VLLM_WORKER_MULTIPROC_METHOD"
_NUMACTL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Binding:
    """What a server is bound to.

    :param cpus: for all of its processes, ``None`` to leave them where they are.
    :param arguments: for ``vllm serve``, which binds its workers.
    :param words: what is bound, or why nothing is; ``""`` where the server does not run on GPUs.
    """

    cpus: frozenset[int] | None
    arguments: tuple[str, ...]
    words: str


def bind_server(spec: ServerSpec, *, has_flag: bool) -> Binding:
    """Return what the server is to be bound to on this machine; ranks on CPUs have a binding of their own.

    :param has_flag: whether this vLLM has ``--numa-bind``.
    """
    if spec.platform == "cpu":
        return Binding(None, (), "")
    # vLLM's wrapper takes effect on processes that are spawned, and `vllm serve` spawns unless it is told otherwise.
    spawns = os.environ.get(_START_METHOD_VARIABLE, "spawn") == "spawn"
    # With both, vLLM looks up the node of another GPU: it counts tp * pp ranks per engine (numa_utils.py, 0.32).
    is_counted = spec.layout.dp == 1 or spec.layout.pcp == 1
    return plan_binding(
        spec.devices,
        frozenset(os.sched_getaffinity(0)),
        node_of_cpu=numa_nodes(),
        has_flag=has_flag and spawns and is_counted,
        cpus_under_numactl=cpus_under_numactl,
        arguments=spec.arguments,
    )


def plan_binding(
    devices: Sequence[Device],
    allowed_cpus: frozenset[int],
    *,
    node_of_cpu: Mapping[int, int],
    has_flag: bool,
    cpus_under_numactl: Callable[[int], frozenset[int] | None],
    arguments: Sequence[str],
) -> Binding:
    """Decide what a server is bound to; who binds it in its arguments is left alone.

    :param devices: (n_ranks,), in rank order.
    :param allowed_cpus: those that this process may use; the server never gets others.
    :param node_of_cpu: NUMA node of each CPU of the machine.
    :param has_flag: whether ``--numa-bind`` can be given.
    :param cpus_under_numactl: see :func:`cpus_under_numactl`; asked for the nodes of the devices.
    :param arguments: of ``vllm serve``, as the user gave them.
    """
    for argument in arguments:
        if match := _USERS_ARGUMENT.match(argument):
            return Binding(None, (), f"left to the server's argument {match[0]}")
    cpus, words = _server_cpus(devices, allowed_cpus)
    nodes = _worker_nodes(devices, set(node_of_cpu.values())) if has_flag else ()
    if not nodes:
        return Binding(cpus, (), words)
    if obstacle := _numactl_obstacle(nodes, allowed_cpus, cpus_under_numactl):
        return Binding(cpus, (), f"{words}; workers: no --numa-bind, since {obstacle}")
    nodes_argument = ("--numa-bind-nodes", *map(str, nodes))
    return Binding(cpus, ("--numa-bind", *nodes_argument), f"{words}; workers: {' '.join(nodes_argument)}")


def _server_cpus(devices: Sequence[Device], allowed: frozenset[int]) -> tuple[frozenset[int] | None, str]:
    """The allowed CPUs near the devices, and words for them or for why there is nothing to bind."""
    near: frozenset[int] = frozenset()
    for device in devices:
        cpus = _affinity(device)
        if not cpus:
            return None, f"not bound: the CPUs of GPU {device.index} are not known"
        near |= cpus
    gpus = "GPU " + ", ".join(str(device.index) for device in devices)
    if not near & allowed:
        return None, f"not bound: only CPUs {_format(allowed)} may be used, {gpus} is near CPUs {_format(near)}"
    if allowed <= near:
        return None, f"not bound: all CPUs that may be used ({_format(allowed)}) are near {gpus}"
    return near & allowed, f"CPUs {_format(near & allowed)}{_node_words(devices)}"


def _affinity(device: Device) -> frozenset[int] | None:
    """The CPUs near a device, ``None`` where its source gives none or something that is no list of CPUs."""
    try:
        return frozenset(parse_cpus(device.cpu_affinity or ""))
    except TopologyError:
        return None


def _node_words(devices: Sequence[Device]) -> str:
    nodes = {str(device.numa_node) for device in devices if device.numa_node is not None}
    if not nodes or any(device.numa_node is None for device in devices):
        return ""
    several = len(nodes) > 1 or not next(iter(nodes)).isdigit()
    return f" (NUMA node{'s' * several} {', '.join(sorted(nodes, key=lambda node: (len(node), node)))})"


def _worker_nodes(devices: Sequence[Device], nodes_with_cpus: set[int]) -> tuple[int, ...]:
    """The NUMA node of each device; empty where one is not known, and on a machine with nothing to choose from."""
    nodes = tuple(device.numa_node for device in devices if isinstance(device.numa_node, int))
    settled = len(nodes) == len(devices) and nodes_with_cpus.issuperset(nodes)
    return nodes if settled and len(nodes_with_cpus) > 1 else ()


def _numactl_obstacle(
    nodes: Iterable[int], allowed: frozenset[int], cpus_under_numactl: Callable[[int], frozenset[int] | None]
) -> str | None:
    """Why vLLM must not start workers through numactl; ``None`` when it may."""
    for node in sorted(set(nodes)):
        cpus = cpus_under_numactl(node)
        if cpus is None:
            command = f"numactl --cpunodebind={node} --membind={node} true"
            return f"'{command}' fails (install numactl; a container needs --cap-add SYS_NICE, too)"
        if foreign := cpus - allowed:
            return f"numactl would give them CPUs {_format(foreign)}, which may not be used"
    return None


def cpus_under_numactl(node: int) -> frozenset[int] | None:
    """Return the CPUs of a process that numactl binds to a NUMA node, ``None`` where it cannot.

    They are asked for, since numactl does not care what the caller's own affinity was: it undoes ``taskset``.
    """
    command = ["numactl", f"--cpunodebind={node}", f"--membind={node}", "cat", "/proc/self/status"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_NUMACTL_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    cpus = re.search(r"^Cpus_allowed_list:\s*([\d,-]+)$", done.stdout, re.MULTILINE)
    return frozenset(parse_cpus(cpus[1])) if done.returncode == 0 and cpus else None


def _format(cpus: Iterable[int]) -> str:
    return format_cpus(list(cpus))
