"""The processes of a vLLM server on this host that somebody else started, found by the port that it listens on.

Knows the tables of sockets and processes (psutil, Linux) and that vLLM's front end is above, or beside, the processes
of its ranks. Sends no signal. What another user, another container or a forwarder (``kubectl port-forward``, ``ssh
-L``, a proxy) hides is not seen, and that is no error: then nothing is known.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from pytest_gpulayout.adapters.process_table import parents_of, title_of
from pytest_gpulayout.adapters.server_address import ServerAddress
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.process_titles import has_joined_engines, rank_pids

_WORKER, _ENGINE = "VLLM::Worker", "VLLM::EngineCore"


@dataclass(frozen=True, slots=True)
class SeenProcesses:
    """Processes of a server. :param top: the one above all others. :param titles: of all, by process id.

    :param ranks: process id of each rank of the layout that was looked for; all of them.
    """

    top: int
    titles: Mapping[int, str]
    ranks: Mapping[int, int]

    @property
    def computing(self) -> int:
        """How many processes compute: workers, or the engines where these compute themselves."""
        kinds = [sum(title.startswith(kind) for title in self.titles.values()) for kind in (_WORKER, _ENGINE)]
        return kinds[0] or kinds[1]

    @property
    def moe(self) -> bool:
        """Whether its data-parallel engines work in step, as those of a model with experts do."""
        return has_joined_engines(self.titles.values())


def processes_behind(address: ServerAddress, layout: Layout) -> SeenProcesses | None:
    """Return the processes of the server that listens at an address of this host.

    :param layout: whose ranks are looked for.
    :returns: ``None`` where the listener, or one of the ranks, is not seen.
    """
    if not address.is_local:
        return None
    for pid in _listeners(address):
        try:
            found = _around(psutil.Process(pid), layout)
        except psutil.Error:  # it ended, or belongs to another user
            continue
        if found is not None:
            return found
    return None


def _listeners(address: ServerAddress) -> list[int]:
    """Processes that listen at the address; at exactly this one before those at all addresses of the host."""
    try:
        sockets = psutil.net_connections(kind="tcp")
    except (psutil.Error, OSError):
        return []
    listening = [
        (_plain(one.laddr.ip), one.pid)
        for one in sockets
        if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == address.port
    ]
    wanted = _plain(str(address.address[0]))
    exact = [pid for host, pid in listening if host == wanted]
    found = exact or [pid for host, pid in listening if host.is_unspecified]
    return sorted({pid for pid in found if pid is not None} - {os.getpid()})  # of another user's there is no id


def _plain(text: str) -> Any:
    """An address that can be compared: ``::ffff:127.0.0.1`` is ``127.0.0.1``."""
    address = ipaddress.ip_address(text.partition("%")[0])
    return getattr(address, "ipv4_mapped", None) or address


def _around(listener: psutil.Process, layout: Layout) -> SeenProcesses | None:
    """The ranks below the listener; below those above it where it is one of several front ends."""
    for top in (listener, *_vllm_above(listener)):
        processes = [top, *top.children(recursive=True)]
        titles = {process.pid: title_of(process) for process in processes}
        ranks = rank_pids(layout, titles, parents_of(processes))
        if set(ranks) == set(range(layout.ranks)):
            return SeenProcesses(top.pid, titles, ranks)
    return None


def _vllm_above(process: psutil.Process) -> Iterator[psutil.Process]:
    """Its parents, as long as they are vLLM: a shell or a test may be above several servers."""
    for parent in process.parents():
        if "vllm" not in title_of(parent).lower():
            return
        yield parent
