"""The processes below the API server: one engine and its workers, with their titles, log lines and shared memory."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from .behaviour import Behaviour
from .gpu import own_gpu, use_gpus
from .nccl import write_nccl_log

_SEGMENT_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Engine:
    """The engine's process and those of its workers: rank -> process id."""

    pid: int
    worker_pids: dict[int, int]

    def end(self, number: signal.Signals) -> None:
        """Send a signal to all; as in vLLM they do not end by themselves when the API server has gone."""
        for pid in (*self.worker_pids.values(), self.pid):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


def say(process: str, where: str, text: str, *, level: str = "INFO", pid: int | None = None) -> None:
    """Write log lines in the form of ``vllm/logger.py``; every line of a text has the prefix."""
    stamp = time.strftime("%m-%d %H:%M:%S")
    prefix = f"({process} pid={os.getpid() if pid is None else pid}) {level} {stamp} [{where}]"
    sys.stdout.write("".join(f"{prefix} {line}\n" for line in text.splitlines() or [""]))
    sys.stdout.flush()


def worker_name(rank: int, tensor_parallel_size: int) -> str:
    """``Worker_TP1``; sizes of 1 are left out (``vllm/v1/executor/multiproc_executor.py``)."""
    return f"Worker_TP{rank}" if tensor_parallel_size > 1 else "Worker"


def start_engine(model: str, tensor_parallel_size: int, behaviour: Behaviour) -> Engine:
    """Start the engine, which starts its workers; return when all have their titles."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _run_engine(model, tensor_parallel_size, behaviour, writing)
    os.close(writing)
    with open(reading, encoding="ascii") as told:
        worker_pids = json.loads(told.readline())
    return Engine(pid, {int(rank): worker_pid for rank, worker_pid in worker_pids.items()})


def _run_engine(model: str, tensor_parallel_size: int, behaviour: Behaviour, writing: int) -> NoReturn:
    _set_title("VLLM::EngineCore")
    say("EngineCore", "core.py:133", f"Initializing a V1 LLM engine (v0.32.0) with config: model={model!r}")
    # A file for torch.distributed in the temporary folder, whose name the segments share.
    rendezvous = Path(tempfile.gettempdir()) / f"vllm_dist_{uuid.uuid4().hex}"
    rendezvous.touch()
    shared = tensor_parallel_size > 1 and not behaviour.no_shared_memory
    segments = _make_segments(rendezvous.name, tensor_parallel_size) if shared else []
    worker_pids = {}
    for rank in range(tensor_parallel_size):
        if rank != behaviour.missing_worker:
            worker_pids[rank] = _start_worker(rank, tensor_parallel_size, behaviour, rendezvous, segments)
    say("EngineCore", "core.py:402", "init engine (profile, create kv cache, warmup model) took 0.01 s")
    os.write(writing, (json.dumps(worker_pids) + "\n").encode())
    _wait_for_a_signal()


def _start_worker(
    rank: int, tensor_parallel_size: int, behaviour: Behaviour, rendezvous: Path, segments: Sequence[Path]
) -> int:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        name = worker_name(rank, tensor_parallel_size)
        _set_title(f"VLLM::{name}")
        mappings = [_map(segment) for segment in segments]
        _say_rank(rank, tensor_parallel_size, rendezvous)
        if tensor_parallel_size > 1 and not mappings:
            reason = "ranks do not share the same SHM group name, falling back to torch.distributed."
            say("Worker", "cpu_communicator.py:47", f"CPU SHM communicator disabled for group tp:0: {reason}")
        say(name, "cpu_model_runner.py:68", "Starting to load model...")
        _use_gpu(rank, tensor_parallel_size, behaviour, rendezvous)
        os.write(writing, b"+")
        _wait_for_a_signal()
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    return pid


def _use_gpu(rank: int, world_size: int, behaviour: Behaviour, rendezvous: Path) -> None:
    """Compute, and talk to the others, on a machine that has GPUs."""
    own = own_gpu(rank)
    if own is None:
        return
    use_gpus(behaviour.contexts.get(str(rank), [own.uuid]))
    if world_size > 1 and behaviour.nccl is not None:
        write_nccl_log(rank, world_size, behaviour.nccl, comm_id=rendezvous.name.rpartition("_")[2][:16])


def _say_rank(rank: int, world_size: int, rendezvous: Path) -> None:
    place = f"world_size={world_size} rank={rank} local_rank={rank}"
    say("Worker", "parallel_state.py:1906", f"{place} distributed_init_method=file://{rendezvous} backend=gloo")


def _make_segments(identity: str, size: int) -> list[Path]:
    """One per rank, named as in ``cpu_communicator.py``; nobody ever unlinks them."""
    ranks = "-".join(map(str, range(size)))
    paths = [Path(f"/dev/shm/{identity}-tp:0-[{ranks}]-cpushm_{rank}") for rank in range(size)]
    for path in paths:
        path.write_bytes(bytes(_SEGMENT_BYTES))
    return paths


def _map(path: Path) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), _SEGMENT_BYTES)


def _set_title(title: str) -> None:
    """Overwrite this process's arguments in place, as setproctitle does (proc(5): arg_start, arg_end of stat)."""
    numbers = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    start, end = int(numbers[45]), int(numbers[46])
    ctypes.memmove(start, title.encode().ljust(end - start, b"\0"), end - start)


def _wait_for_a_signal() -> NoReturn:
    while True:
        signal.pause()
