"""NCCL's log of one rank, with ``NCCL_DEBUG=INFO``, in the words of NCCL 2.27.

Sources: NVIDIA/nccl v2.27.5, ``src/debug.cc`` (file name, head of a line), ``src/init.cc`` (communicator),
``src/transport/p2p.cc``, ``shm.cc`` and ``net.cc`` (channels, which follow the init lines: they are connected by the
first collective).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .gpu import VisibleGpu, visible_gpus

_CHANNELS = 2


@dataclass(frozen=True, slots=True)
class Group:
    """One communicator. :param ranks: of the server, in its own order. :param comm_id: that all of them share."""

    name: str
    ranks: tuple[int, ...]
    comm_id: str


def write_nccl_log(rank: int, groups: Sequence[Group], transport: str) -> None:
    """Write what ``NCCL_DEBUG_FILE`` asks for, one communicator after the other, as vLLM makes them.

    :param rank: of the server. :param transport: between all ranks, the text after ``via``.
    """
    pattern = os.environ.get("NCCL_DEBUG_FILE")
    if pattern is None or os.environ.get("NCCL_DEBUG") != "INFO":
        return
    host, pid = socket.gethostname(), os.getpid()
    head = f"{host}:{pid}:{pid} [{rank}] NCCL INFO"
    texts = list(_process())
    for number, group in enumerate(groups):
        texts += _init(rank, group, number)
        texts += _connections(rank, group, transport)
    path = Path(pattern.replace("%h", host).replace("%p", str(pid)))
    path.write_text("".join(f"{head} {text}\n" for text in texts), encoding="utf-8")


def _process() -> Iterator[str]:
    yield "Bootstrap: Using eth0:192.0.2.7<0>"
    yield "cudaDriverVersion 12080"
    yield "NCCL version 2.27.5+cuda12.9"
    yield "NET/Plugin: Could not find: libnccl-net.so."
    yield "NET/IB : No device found."
    yield "NET/Socket : Using [0]eth0:192.0.2.7<0>"


def _init(rank: int, group: Group, number: int) -> Iterator[str]:
    """A rank joins a communicator. :param number: of the communicator in this process."""
    me, nranks = group.ranks.index(rank), len(group.ranks)
    gpu = _gpu_of(rank)
    bus_id = f"{int(re.sub('[:.]', '', gpu.bus_id), 16):x}"
    comm = f"comm 0x55d0c0de{number:02x}{rank:02x} rank {me}"
    called = f"ncclCommInitRankConfig {comm} nranks {nranks} cudaDev {rank} nvmlDev {gpu.index} busId {bus_id}"
    yield "Initialized NET plugin Socket"
    yield "Assigned NET plugin Socket to comm"
    yield "Using network Socket"
    yield f"{called} commId 0x{group.comm_id} - Init START"
    yield f"{comm} nRanks {nranks} nNodes 1 localRanks {nranks} localRank {me} MNNVL 0"
    if me == 0:
        order = " ".join(map(str, range(nranks)))
        yield from (f"Channel {channel:02d}/{_CHANNELS:02d} : {order}" for channel in range(_CHANNELS))
    yield "Check P2P Type isAllDirectP2p 1 directMode 0"
    counts = f"{_CHANNELS} coll channels, {_CHANNELS} collnet channels, 0 nvls channels"
    yield f"{counts}, {_CHANNELS} p2p channels, {_CHANNELS} p2p channels per peer"
    yield f"{called} commId 0x{group.comm_id} - Init COMPLETE"


def _gpu_of(rank: int) -> VisibleGpu:
    """Its GPU; that of a rank on another node has the same number there."""
    here = visible_gpus()
    return here[rank % len(here)]


def _connections(rank: int, group: Group, transport: str) -> Iterator[str]:
    """The ring. Both ends of a network's channel log it, of memory only the sender does."""
    gpus = [_gpu_of(member).index for member in group.ranks]
    me, nranks = group.ranks.index(rank), len(group.ranks)
    before, after = (me - 1) % nranks, (me + 1) % nranks
    is_network = transport.startswith("NET/")
    ends = [(before, me, "[receive] "), (me, after, "[send] ")] if is_network else [(me, after, "")]
    number = "" if transport.startswith("SHM/") else "/0"
    for src, dst, end in ends:
        for channel in range(_CHANNELS):
            yield f"Channel {channel:02d}{number} : {src}[{gpus[src]}] -> {dst}[{gpus[dst]}] {end}via {transport}"
    yield "Connected all rings, use ring PXN 0 GDR 1"
