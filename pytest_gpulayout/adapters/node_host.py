"""Facts about the host that an agent runs on: who it is, its addresses, free ports, its share of a binding.

Leaves answering to :mod:`~pytest_gpulayout.adapters.node_agent`, and what the facts of several nodes mean together to
:mod:`~pytest_gpulayout.nodes`.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import metadata
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil

from pytest_gpulayout.adapters.cpu_host import cpu_model
from pytest_gpulayout.adapters.host import software_version

_ANY_PORT = 9  # "discard"; a datagram socket that is connected to it sends nothing
_FAMILIES = (socket.AF_INET, socket.AF_INET6)


def own_version() -> str | None:
    """Version of this package, ``None`` where it runs from a folder without being installed."""
    try:
        return metadata.version("pytest-gpulayout")
    except metadata.PackageNotFoundError:
        return None


def machine_identity() -> str:
    """Another one after each start of a kernel (Linux, ``random(4)``); ``""`` where it cannot be read."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def namespace(kind: str) -> str:
    """Identity of a namespace of this process, such as ``net:[4026531840]``; ``""`` where it cannot be read."""
    try:
        return os.readlink(f"/proc/self/ns/{kind}")
    except OSError:
        return ""


def host_facts() -> dict[str, Any]:
    """Return the answer to ``hello``; :class:`~pytest_gpulayout.nodes.NodeFacts` says what its parts mean."""
    versions = {name: software_version(name) for name in ("vllm", "torch", "nccl")}
    if versions["vllm"] is None and find_spec("vllm") is not None:
        versions["vllm"] = "not installed as a package"
    own = {"pytest-gpulayout": own_version(), "python": ".".join(platform.python_version_tuple()[:2])}
    return {
        "host": socket.gethostname(),
        "machine": machine_identity(),
        "network": namespace("net"),
        "processes": namespace("pid"),
        "pid": os.getpid(),
        "addresses": [{"interface": interface, "address": address} for interface, address in _reachable()],
        "python": sys.executable,
        "processor": cpu_model(),
        "versions": {**own, **versions},
    }


def _addresses() -> Iterator[tuple[str, str]]:
    """Interface and address, without a zone, of all interfaces that are up, in the order of the system."""
    states = psutil.net_if_stats()
    for interface, entries in psutil.net_if_addrs().items():
        if interface in states and states[interface].isup:
            for entry in entries:
                if entry.family in _FAMILIES:
                    yield interface, entry.address.partition("%")[0]


def _reachable() -> list[tuple[str, str]]:
    """Those that other hosts may reach, IPv4 first."""
    found = [(interface, address, ip_address(address)) for interface, address in _addresses()]
    outside = [entry for entry in found if not (entry[2].is_loopback or entry[2].is_link_local)]
    return [entry[:2] for entry in sorted(outside, key=lambda entry: entry[2].version)]


def route_to(address: str) -> tuple[str, str]:
    """Return the own address, and its interface, from which packets to ``address`` leave; sends none.

    :raises OSError: there is no way there.
    """
    family, kind, number, _, target = socket.getaddrinfo(address, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, number) as probe:
        probe.connect(target)
        own = str(probe.getsockname()[0])
    return own, next((interface for interface, at in _addresses() if at == own), "")


def free_ports(address: str, count: int) -> list[int]:
    """Return ports of an own address that nobody listens on now.

    :raises OSError: it is no address of this host.
    """
    family, kind, number, _, target = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    ports = []
    with ExitStack() as stack:
        for _ in range(count):
            probe = stack.enter_context(socket.socket(family, kind, number))
            probe.bind(target)
            ports.append(int(probe.getsockname()[1]))
    return ports


def own_lists(bind: str | None, ranks: int, first_rank: int, all_ranks: int) -> str | None:
    """Return this node's part of ``VLLM_CPU_OMP_THREADS_BIND``, which may name the cores of all ranks of a layout.

    :param bind: its value, ``None`` where it is not set. :param ranks: of this node, from ``first_rank`` on.
    """
    lists = (bind or "").split("|")
    if len(lists) < max(2, all_ranks):
        return bind
    return "|".join(lists[first_rank : first_rank + ranks])
