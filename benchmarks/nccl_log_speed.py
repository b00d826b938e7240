"""How fast NCCL's log is read, beside ``grep -c ' via '`` on the same file, and with how much memory.

Writes logs of 1,024 ranks on 128 hosts as ``NCCL_DEBUG_SUBSYS=ALL`` does: every rank initialises the world and the
communicator of its host, then come lines about collectives, tuning, proxies and allocations until the size is
reached. Runs both on one core, in turns, and prints the best of each; the exit code is 1 when a limit is broken.
Usage: python benchmarks/nccl_log_speed.py [--megabytes 1024] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

RANKS = 1024
RANKS_PER_HOST = 8
CHANNELS = 16
LIMIT_RATIO = 3.0
SMALL_MEGABYTES = 256
LIMIT_GROWTH_MB = 16.0

READ = """
import resource, sys, time
from pytest_gpulayout.nccl_log import parse_nccl_log
started = time.perf_counter()
with open(sys.argv[1], "rb") as file:
    log = parse_nccl_log(iter(lambda: file.read(1 << 18), b""), sys.argv[1])
seconds = time.perf_counter() - started
peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(seconds, peak_kb, sum(log.transports.values()), len(log.communicators))
"""


# -- the log ---------------------------------------------------------------------------------------------------------


def head(rank: int, thread: int = 40) -> str:
    """What a line of a rank begins with."""
    host, device = divmod(rank, RANKS_PER_HOST)
    pid = 4000 + 17 * device
    return f"gpu-node-{host:03d}:{pid}:{pid + thread} [{device}] NCCL INFO "


def address(dice: random.Random) -> str:
    """A pointer."""
    return f"0x7f{dice.getrandbits(36):09x}"


def transport_lines(rank: int, nranks: int, base: int) -> Iterator[str]:
    """Channel lines of one rank: rings, then trees; memory within a host, InfiniBand between."""
    me = rank - base
    for name, step in (("rings", 1), ("trees", 2)):
        for channel in range(CHANNELS):
            for src, dst, end in ((me, (me + step) % nranks, "send"), ((me - step) % nranks, me, "receive")):
                peers = f"{src}[{src % RANKS_PER_HOST}] -> {dst}[{dst % RANKS_PER_HOST}]"
                if (src + base) // RANKS_PER_HOST != (dst + base) // RANKS_PER_HOST:
                    nic = channel % RANKS_PER_HOST
                    yield f"Channel {channel:02d}/0 : {peers} [{end}] via NET/IB/{nic}/GDRDMA"
                elif end == "send":
                    yield f"Channel {channel:02d}/0 : {peers} via P2P/CUMEM"
        yield f"Connected all {name}"


def communicator_lines(rank: int, nranks: int, base: int, comm_id: str, dice: random.Random) -> Iterator[str]:
    """Init lines of one rank of one communicator."""
    me, device = rank - base, rank % RANKS_PER_HOST
    comm = address(dice)
    fields = f"rank {me} nranks {nranks} cudaDev {device} nvmlDev {device} busId {device + 1}b000 commId {comm_id}"
    yield "Using network IB"
    yield f"ncclCommInitRankConfig comm {comm} {fields} - Init START"
    yield f"Setting affinity for GPU {device} to 0-47"
    for peer in range(RANKS_PER_HOST):
        yield f"GPU Direct RDMA Enabled for GPU {peer} / HCA {peer} (distance 3 <= 4), read 0 mode Default"
        yield f"GPU/0-{peer + 1}b000 :GPU/0-1b000 (0/5000.0/LOC) GPU/0-2b000 (2/240.0/NVL) CPU/0-0 (3/24.0/PHB)"
        yield f"Tree {peer} : {me - 1} -> {me} -> {me + 1}/-1/-1"
        yield f"Ring {peer:02d} : {me - 1} -> {me} -> {me + 1}"
    nodes = f"nNodes {nranks // RANKS_PER_HOST} localRanks {RANKS_PER_HOST} localRank {device} MNNVL 0"
    yield f"comm {comm} rank {me} nRanks {nranks} {nodes}"
    if me == 0:
        order = " ".join(map(str, range(nranks)))
        yield from (f"Channel {channel:02d}/{CHANNELS} : {order}" for channel in range(CHANNELS))
    yield "Trees " + " ".join(f"[{channel}] {me + 1}/-1/-1->{me}->{me - 1}" for channel in range(CHANNELS))
    yield "P2P Chunksize set to 131072"
    for line in transport_lines(rank, nranks, base):
        yield line
        yield f"channel.cc:{dice.choice((41, 44))} Cuda Alloc Size 1152 pointer {address(dice)}"
    yield f"{CHANNELS} coll channels, 0 nvls channels, 32 p2p channels, 4 p2p channels per peer"
    yield f"ncclCommInitRankConfig comm {comm} {fields} - Init COMPLETE"


def init_lines(rank: int, seed: int) -> Iterator[str]:
    """All that one rank writes before the first collective."""
    dice = random.Random(seed * RANKS + rank)
    host = rank // RANKS_PER_HOST
    yield "Bootstrap: Using eth0:192.0.2.7<0>"
    yield "NCCL_IB_HCA set by environment to mlx5"
    yield "NCCL version 2.27.7+cuda13.0"
    yield "NET/Plugin: Could not find: libnccl-net.so"
    yield "NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [2]mlx5_2:1/IB [RO]; OOB eth0:192.0.2.7<0>"
    yield from communicator_lines(rank, RANKS, 0, "0x9f5c0ffee0000001", dice)
    yield from communicator_lines(rank, RANKS_PER_HOST, host * RANKS_PER_HOST, f"0x5eed{host:012x}", dice)


def working_line(dice: random.Random) -> str:
    """One line of the kinds that fill the log once collectives run."""
    a = dice.random()
    if a < 0.5:
        return (
            f"AllReduce: opCount {dice.getrandbits(14):x} sendbuff {address(dice)} recvbuff {address(dice)} "
            f"count {dice.choice((4096, 65536, 8388608))} datatype 9 op 0 root 0 comm {address(dice)} "
            f"[nranks={dice.choice((RANKS, RANKS_PER_HOST))}] stream {address(dice)}"
        )
    if a < 0.7:
        algorithm, protocol = dice.choice((("RING", "LL"), ("TREE", "LL128"), ("RING", "SIMPLE")))
        size = dice.choice((8192, 131072, 16777216))
        return f"AllReduce: {size} Bytes -> Algo {algorithm} proto {protocol} channel{{Lo..Hi}}={{0..{CHANNELS - 1}}}"
    if a < 0.8:
        return f"ncclPollProxyResponse Received new opId={address(dice)}"
    if a < 0.87:
        return f"proxyProgressAsync opId={address(dice)} op.type=3 op.reqBuff={address(dice)} op.respSize=16 done"
    if a < 0.93:
        local = dice.randrange(RANKS_PER_HOST)
        return f"Connected to proxy localRank {local} -> connection {address(dice)}"
    if a < 0.97:
        return f"New proxy recv connection {dice.randrange(99)} from local rank {dice.randrange(8)}, transport 2"
    return f"transport/net.cc:{dice.randrange(600, 900)} Cuda Host Alloc Size 8388608 pointer {address(dice)}"


def write_log(file: BinaryIO, megabytes: int) -> None:
    """Write a log of the given size."""
    for first in range(0, RANKS, 64):  # 64 ranks at a time write in turns
        streams = {rank: init_lines(rank, seed=1) for rank in range(first, first + 64)}
        while streams:
            for rank in list(streams):
                line = next(streams[rank], None)
                if line is None:
                    del streams[rank]
                else:
                    file.write(f"{head(rank)}{line}\n".encode())
    dice = random.Random(2)
    while file.tell() < megabytes << 20:
        lines = (f"{head(dice.randrange(RANKS), dice.randrange(60))}{working_line(dice)}\n" for _ in range(20000))
        part = "".join(lines).encode()
        for _ in range(8):
            file.write(part[: max(0, (megabytes << 20) - file.tell())])


# -- the measurement -------------------------------------------------------------------------------------------------


def grep_seconds(path: Path) -> tuple[float, int]:
    """Wall time of grep, and what it counts."""
    environment = {**os.environ, "LC_ALL": "C"}
    started = time.perf_counter()
    ran = subprocess.run(["grep", "-c", " via ", path], env=environment, capture_output=True, check=True, timeout=600)
    return time.perf_counter() - started, int(ran.stdout)


def read_seconds(path: Path) -> tuple[float, float, int, int]:
    """Wall time of our reader, its peak memory in MB, and how many channels and communicators it found."""
    command = [sys.executable, "-c", READ, str(path)]
    seconds, peak_kb, channels, communicators = subprocess.run(
        command, capture_output=True, check=True, timeout=600, text=True
    ).stdout.split()
    return float(seconds), int(peak_kb) / 1024, int(channels), int(communicators)


def measure(path: Path, rounds: int) -> tuple[float, float]:
    """Print what both take, the best of ``rounds``; returns the ratio and the reader's peak memory in MB."""
    greps, reads = [], []
    for _ in range(rounds):
        greps.append(grep_seconds(path))
        reads.append(read_seconds(path))
    (grep, lines), (read, peak_mb, channels, communicators) = min(greps), min(reads)
    assert channels == lines, f"grep counts {lines} lines, the reader {channels} channels"
    size_mb = path.stat().st_size / (1 << 20)
    print(
        f"{size_mb:6.0f} MB  grep {grep:6.2f} s  reader {read:6.2f} s  ratio {read / grep:5.2f}  "
        f"peak {peak_mb:6.1f} MB  {channels} channel lines, {communicators} communicators"
    )
    return read / grep, peak_mb


def main() -> int:
    """Measure and print; the exit code is 1 when a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {datetime.now(UTC):%Y-%m-%d}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as name:
        results = []
        for megabytes in (SMALL_MEGABYTES, arguments.megabytes):
            path = Path(name, f"{megabytes}.log")
            with path.open("wb") as file:
                write_log(file, megabytes)
            results.append(measure(path, arguments.rounds))
            path.unlink()
    (_, small_mb), (ratio, large_mb) = results
    kept = ratio <= LIMIT_RATIO and large_mb - small_mb <= LIMIT_GROWTH_MB
    print(f"limits: ratio {LIMIT_RATIO:.0f} at {arguments.megabytes} MB, growth {LIMIT_GROWTH_MB:.0f} MB: ", end="")
    print("kept" if kept else "BROKEN")
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
