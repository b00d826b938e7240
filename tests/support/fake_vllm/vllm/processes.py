"""The processes below the API server: engines and their workers, with their titles, log lines and shared memory."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from .behaviour import Behaviour
from .gpu import own_gpu, use_gpus
from .nccl import Group, write_nccl_log
from .sizes import Sizes

_SEGMENT_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Engine:
    """The process of one engine and those of its workers: rank of the whole server -> process id."""

    number: int
    pid: int
    worker_pids: dict[int, int]

    def end(self, number: signal.Signals) -> None:
        """Send a signal to all; as in vLLM they do not end by themselves when the API server has gone."""
        for pid in (*self.worker_pids.values(), self.pid):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


@dataclass(frozen=True, slots=True)
class World:
    """What the workers of a server know of each other.

    :param identity: that no other server has. :param nodes: hosts, which hold consecutive ranks.
    :param node_rank: of this one.
    """

    sizes: Sizes
    behaviour: Behaviour
    identity: str
    nodes: int = 1
    node_rank: int = 0

    @property
    def is_shared(self) -> bool:
        """Whether ranks share memory: those of several nodes do not."""
        return self.nodes == 1 and not self.behaviour.no_shared_memory

    @property
    def per_node(self) -> int:
        """Ranks that one node holds."""
        return self.sizes.engine_ranks * self.sizes.dp // self.nodes

    def is_here(self, rank: int) -> bool:
        """Whether a rank of the whole server runs on this node."""
        return rank // self.per_node == self.node_rank and rank != self.behaviour.missing_worker

    def rank(self, engine: int, local: int) -> int:
        """Rank of the whole server, which is the number of its GPU."""
        return engine * self.sizes.engine_ranks + local

    def groups_of(self, engine: int, rank: int) -> list[Group]:
        """Communicators that a worker is in."""
        return [
            Group(name, ranks, uuid.uuid5(uuid.NAMESPACE_OID, f"{self.identity} {name} {ranks}").hex[:16])
            for name, ranks in self.sizes.groups(engine)
            if rank in ranks
        ]

    def own_number(self, engine: int, rank: int) -> int:
        """The rank as the worker's own torch.distributed has it: that of the engine, unless engines are one world."""
        return rank if self.sizes.moe else rank - engine * self.sizes.engine_ranks


def say(process: str, where: str, text: str, *, level: str = "INFO", pid: int | None = None) -> None:
    """Write log lines in the form of ``vllm/logger.py``; every line of a text has the prefix."""
    stamp = time.strftime("%m-%d %H:%M:%S")
    prefix = f"({process} pid={os.getpid() if pid is None else pid}) {level} {stamp} [{where}]"
    sys.stdout.write("".join(f"{prefix} {line}\n" for line in text.splitlines() or [""]))
    sys.stdout.flush()


def start_engines(
    model: str, sizes: Sizes, behaviour: Behaviour, *, nodes: int = 1, meeting: str = ""
) -> list[Engine]:
    """Start the engines, which start their workers; return when all have their titles.

    Several engines have a coordinator, too (``vllm/v1/engine/coordinator.py``), which stands among them here.

    :param meeting: where the nodes of one server meet.
    """
    world = World(sizes, behaviour, meeting or uuid.uuid4().hex, nodes)
    engines = [_start_engine(model, world, number) for number in range(sizes.dp)]
    if sizes.dp > 1:
        engines.append(Engine(sizes.dp, _start_titled("VLLM::DPCoordinator"), {}))
    return engines


def _start_titled(title: str) -> int:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _set_title(title)
        os.write(writing, b"+")
        _wait_for_a_signal()
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    return pid


def _start_engine(model: str, world: World, number: int) -> Engine:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        _run_engine(model, world, number, writing)
    os.close(writing)
    with open(reading, encoding="ascii") as told:
        worker_pids = json.loads(told.readline())
    return Engine(number, pid, {int(rank): worker_pid for rank, worker_pid in worker_pids.items()})


def _run_engine(model: str, world: World, number: int, writing: int) -> NoReturn:
    title = world.sizes.engine_title(number)
    _set_title(f"VLLM::{title}")
    say(title, "core.py:133", f"Initializing a V1 LLM engine (v0.32.0) with config: model={model!r}")
    # A file for torch.distributed in the temporary folder, whose name the segments share.
    rendezvous = Path(tempfile.gettempdir()) / f"vllm_dist_{uuid.uuid4().hex}"
    rendezvous.touch()
    segments = _make_segments(rendezvous.name, world, number) if world.is_shared else {}
    worker_pids = {}
    for local in range(world.sizes.engine_ranks):
        rank = world.rank(number, local)
        if world.is_here(rank):
            worker_pids[rank] = _start_worker(world, number, local, rendezvous, segments)
    say(title, "core.py:402", "init engine (profile, create kv cache, warmup model) took 0.01 s")
    os.write(writing, (json.dumps(worker_pids) + "\n").encode())
    _wait_for_a_signal()


def await_nodes(address: str, port: int, count: int) -> None:
    """Wait until so many other nodes have joined; in vLLM torch.distributed does."""
    if count == 0:
        return
    with socket.create_server((address, port)) as meeting:
        for _ in range(count):
            meeting.accept()[0].close()


def join_nodes(address: str, port: int) -> None:
    """Tell the head that this node is there, as soon as the head listens."""
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
        except OSError:
            time.sleep(0.05)
        else:
            return


def start_workers(sizes: Sizes, behaviour: Behaviour, *, nodes: int, node_rank: int, meeting: str) -> list[int]:
    """Start those of a node without an engine (``vllm/entrypoints/cli/serve.py``, ``run_headless``)."""
    world = World(sizes, behaviour, meeting, nodes, node_rank)
    rendezvous = Path(tempfile.gettempdir()) / f"vllm_dist_{uuid.uuid4().hex}"
    locals_here = [local for local in range(sizes.engine_ranks) if world.is_here(local)]
    return [_start_worker(world, 0, local, rendezvous, {}) for local in locals_here]


def _start_worker(
    world: World, engine: int, local: int, rendezvous: Path, segments: Mapping[Group, Sequence[Path]]
) -> int:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        name, rank = world.sizes.worker_title(engine, local), world.rank(engine, local)
        _set_title(f"VLLM::{name}")
        groups = world.groups_of(engine, rank)
        mappings = [_map(segment) for group in groups for segment in segments.get(group, ())]
        _say_rank(world, engine, rank, rendezvous)
        _say_collectives(groups, shared=bool(mappings))
        say(name, "cpu_model_runner.py:68", "Starting to load model...")
        _use_gpu(world, rank, groups)
        os.write(writing, b"+")
        _wait_for_a_signal()
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    return pid


def _use_gpu(world: World, rank: int, groups: Sequence[Group]) -> None:
    """Compute, and talk to the others, on a machine that has GPUs."""
    behaviour = world.behaviour
    own = own_gpu(rank % world.per_node)
    if own is None:
        return
    use_gpus(behaviour.contexts.get(str(rank), [own.uuid]))
    if groups and behaviour.nccl is not None:
        write_nccl_log(rank, groups, behaviour.nccl)


def _say_rank(world: World, engine: int, rank: int, rendezvous: Path) -> None:
    size = world.sizes.engine_ranks * (world.sizes.dp if world.sizes.moe else 1)
    local = rank - engine * world.sizes.engine_ranks
    place = f"world_size={size} rank={world.own_number(engine, rank)} local_rank={local}"
    say("Worker", "parallel_state.py:1906", f"{place} distributed_init_method=file://{rendezvous} backend=gloo")


def _say_collectives(groups: Sequence[Group], *, shared: bool) -> None:
    """As ``CpuCommunicator.__init__`` does: without shared memory, and of the group that sends tokens to experts."""
    names = [group.name for group in groups]
    if "tp" in names and not shared:
        reason = "ranks do not share the same SHM group name, falling back to torch.distributed."
        say("Worker", "cpu_communicator.py:47", f"CPU SHM communicator disabled for group tp:0: {reason}")
    if "dp" in names:
        say("Worker", "cpu_communicator.py:69", "Using allgather_reducescatter all2all manager.")


def _make_segments(identity: str, world: World, engine: int) -> dict[Group, list[Path]]:
    """One per rank of the groups that share memory, named as in ``cpu_communicator.py``; nobody ever unlinks them."""
    made: dict[Group, list[Path]] = {}
    for local in range(world.sizes.engine_ranks):
        for group in world.groups_of(engine, world.rank(engine, local)):
            if group.name in ("tp", "pp") and group not in made:
                ranks = "-".join(str(world.own_number(engine, rank)) for rank in group.ranks)
                name = f"/dev/shm/{identity}-{group.name}:0-[{ranks}]-cpushm_"
                made[group] = [Path(f"{name}{member}") for member in range(len(group.ranks))]
    for path in (path for paths in made.values() for path in paths):
        path.write_bytes(bytes(_SEGMENT_BYTES))
    return made


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
