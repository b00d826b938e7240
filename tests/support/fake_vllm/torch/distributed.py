"""``torch.distributed`` of the fake.

``FAKE_TORCH`` names what goes wrong, and the rank to which it happens when it first adds up what is not zero:
``{"die": 1}`` it is killed, ``{"fail": 1}`` it raises, ``{"hang": 1}`` it waits for ever, ``{"wrong": 1}`` what the
others send arrives as zeros. ``{"missing": true}``: there is no PyTorch. ``{"latency_us": 10, "gb_per_s": 370}``: how
long a message takes on a GPU, ``{"nccl": "P2P/CUMEM"}`` by which transport.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlparse

from . import BEHAVIOUR, Tensor, cuda


class _Group:
    """The ranks that found each other. :ivar number: of sums that were exchanged."""

    def __init__(self) -> None:
        self.store = Path()
        self.rank = 0
        self.size = 1
        self.number = 0

    def sum(self, value: float) -> float:
        """Add up what the ranks put beside the store."""
        self.number += 1
        own = self.store.with_name(f"{self.store.name}.{self.number}.{self.rank}")
        unfinished = own.with_name(f"{own.name}.tmp")
        unfinished.write_text(str(value))
        unfinished.rename(own)
        files = [own.with_name(f"{self.store.name}.{self.number}.{rank}") for rank in range(self.size)]
        while not all(file.exists() for file in files):
            time.sleep(0.001)
        return sum(float(file.read_text()) for file in files)


_group = _Group()


def init_process_group(backend: str, *, init_method: str, rank: int, world_size: int, timeout: timedelta) -> None:
    """Find the other ranks."""
    assert timeout.total_seconds() > 0
    _group.store, _group.rank, _group.size = Path(urlparse(init_method).path), rank, world_size
    if backend == "nccl":
        _write_nccl_log()


def all_reduce(tensor: Tensor) -> None:
    """Add up a tensor, in place."""
    if cuda.capturing is not None:
        wire_bytes = tensor.size_bytes * 2 * (_group.size - 1) / _group.size
        cuda.capturing.work_us += BEHAVIOUR["latency_us"] + wire_bytes / BEHAVIOUR["gb_per_s"] / 1e3
        return
    if tensor.value == 0:
        return
    if BEHAVIOUR.get("die") == _group.rank:
        os.kill(os.getpid(), signal.SIGKILL)
    if BEHAVIOUR.get("fail") == _group.rank:
        raise RuntimeError("NCCL error: unhandled system error")
    if BEHAVIOUR.get("hang") == _group.rank:
        signal.pause()
    total = _group.sum(tensor.value)
    tensor.fill_(tensor.value if BEHAVIOUR.get("wrong") == _group.rank else total)


def destroy_process_group() -> None:
    """Leave the others."""


def _write_nccl_log() -> None:
    """The lines that NCCL 2.27 writes for a ring (``src/debug.cc``, ``src/transport/p2p.cc``)."""
    host, pid, rank, size = socket.gethostname(), os.getpid(), _group.rank, _group.size
    path = Path(os.environ["NCCL_DEBUG_FILE"].replace("%h", host).replace("%p", str(pid)))
    head = f"{host}:{pid}:{pid} [{cuda.device}] NCCL INFO"
    after, transport = (rank + 1) % size, BEHAVIOUR.get("nccl", "P2P/CUMEM")
    channels = (f"Channel {n:02d}/0 : {rank}[{rank}] -> {after}[{after}] via {transport}" for n in range(2))
    path.write_text("".join(f"{head} {text}\n" for text in ("NCCL version 2.27.5+cuda12.9", *channels)))
