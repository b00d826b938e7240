"""NCCL's log of one rank, with ``NCCL_DEBUG=INFO``, in the words of NCCL 2.27.

Sources: NVIDIA/nccl v2.27.5, ``src/debug.cc`` (file name, head of a line), ``src/init.cc`` (communicator),
``src/transport/p2p.cc``, ``shm.cc`` and ``net.cc`` (channels, which follow the init lines: they are connected by the
first collective).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from .gpu import visible_gpus

_CHANNELS = 2


def write_nccl_log(rank: int, nranks: int, transport: str, *, comm_id: str) -> None:
    """Write what ``NCCL_DEBUG_FILE`` asks for. :param transport: between all ranks, the text after ``via``."""
    pattern = os.environ.get("NCCL_DEBUG_FILE")
    if pattern is None or os.environ.get("NCCL_DEBUG") != "INFO":
        return
    host, pid = socket.gethostname(), os.getpid()
    head = f"{host}:{pid}:{pid} [{rank}] NCCL INFO"
    texts = [*_init(rank, nranks, comm_id), *_connections(rank, nranks, transport)]
    path = Path(pattern.replace("%h", host).replace("%p", str(pid)))
    path.write_text("".join(f"{head} {text}\n" for text in texts), encoding="utf-8")


def _init(rank: int, nranks: int, comm_id: str) -> Iterator[str]:
    gpu = visible_gpus()[rank]
    bus_id = f"{int(re.sub('[:.]', '', gpu.bus_id), 16):x}"
    comm = f"comm 0x55d0c0de{rank:04x} rank {rank}"
    called = f"ncclCommInitRankConfig {comm} nranks {nranks} cudaDev {rank} nvmlDev {gpu.index} busId {bus_id}"
    yield "Bootstrap: Using eth0:192.0.2.7<0>"
    yield "cudaDriverVersion 12080"
    yield "NCCL version 2.27.5+cuda12.9"
    yield "NET/Plugin: Could not find: libnccl-net.so."
    yield "NET/IB : No device found."
    yield "NET/Socket : Using [0]eth0:192.0.2.7<0>"
    yield "Initialized NET plugin Socket"
    yield "Assigned NET plugin Socket to comm"
    yield "Using network Socket"
    yield f"{called} commId 0x{comm_id} - Init START"
    yield f"{comm} nRanks {nranks} nNodes 1 localRanks {nranks} localRank {rank} MNNVL 0"
    if rank == 0:
        order = " ".join(map(str, range(nranks)))
        yield from (f"Channel {channel:02d}/{_CHANNELS:02d} : {order}" for channel in range(_CHANNELS))
    yield "Check P2P Type isAllDirectP2p 1 directMode 0"
    counts = f"{_CHANNELS} coll channels, {_CHANNELS} collnet channels, 0 nvls channels"
    yield f"{counts}, {_CHANNELS} p2p channels, {_CHANNELS} p2p channels per peer"
    yield f"{called} commId 0x{comm_id} - Init COMPLETE"


def _connections(rank: int, nranks: int, transport: str) -> Iterator[str]:
    """The ring. Both ends of a network's channel log it, of memory only the sender does."""
    gpus = visible_gpus()
    before, after = (rank - 1) % nranks, (rank + 1) % nranks
    is_network = transport.startswith("NET/")
    ends = [(before, rank, "[receive] "), (rank, after, "[send] ")] if is_network else [(rank, after, "")]
    number = "" if transport.startswith("SHM/") else "/0"
    for src, dst, end in ends:
        for channel in range(_CHANNELS):
            arrow = f"{src}[{gpus[src].index}] -> {dst}[{gpus[dst].index}]"
            yield f"Channel {channel:02d}{number} : {arrow} {end}via {transport}"
    yield "Connected all rings, use ring PXN 0 GDR 1"
