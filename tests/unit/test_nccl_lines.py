from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gpulayout import nccl_lines, nccl_log
from pytest_gpulayout.nccl_lines import Block, blocks, numbered_lines
from pytest_gpulayout.nccl_log import NcclLog, parse_nccl_log

HEAD = "gpu-a1:310:344 [0] NCCL INFO "
RECORDS = [
    HEAD + "Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read",
    HEAD + "Channel 01/0 : 1[1] -> 0[0] [receive] via NET/Socket/0",
    HEAD + "Channel 01/0 : 0[0] -> 1[1] via P2P/CUMEM/read",
    HEAD + "Channel 00/1 : 0[0] -> 1[1] via P2P/CUMEM/read comm 0x5a0 nRanks 02",
    HEAD + "Channel 02/0 : 0[0] -> 1[1] [send] via NET/",
    HEAD + "CollNet 00/0 : 3 [send] via COLLNET/SHARP/0",
    HEAD + "Channel 00/0 : 0[0] -> 1[1] [send]",
    "via NET/IB/0/GDRDMA",
    HEAD + "Channel 00/0 : 0[0] -> 1[1] via",
    "SHM/direct/direct",
    HEAD + "Channel 00/02 :    0   1",
    HEAD + "Trees [0] 1/-1/-1->0->-1",
    HEAD + "ncclCommInitRank comm 0x5a0 rank 0 nranks 2 cudaDev 0 nvmlDev 3 busId 4b000 commId 0x9f - Init START",
    HEAD + "comm 0x5a0 rank 0 nRanks 2 nNodes 1 localRanks 2 localRank 0 MNNVL 0",
    HEAD + "[Rank 0] ncclCommInitRank comm 0x5a0 rank 0 nranks 2 cudaDev 0 busId 4b000 commId 0x9f - Init COMPLETE",
    HEAD + "Using network IB",
    "NCCL version 2.20.5+cuda12.4",
    HEAD + "RCCL version : 2.22.3-HEAD:271856d",
    HEAD + "NCCL_P2P_LEVEL set by environment to LOC",
    HEAD + "NVLS comm 0x5a0 headRank 0 nHeads 2 nvlsRanks 2 buffSize 1",
    HEAD + "NVLS multicast support is available on dev 0",
    HEAD + "Connected all trees",
    HEAD + "NET/IB : No device found.",
    HEAD + "Assigned NET plugin IB to comm",
    HEAD + "P2P is disabled between connected GPUs 0 and 1",
    HEAD + "cuMem host allocations do not appear to be working; falling back to a /dev/shm/ based implementation",
    HEAD + "Check P2P Type isAllDirectP2p 1 directMode 0",
    HEAD + "MNNVL busId 0x19000 fabric UUID 0.0 cliqueId 0x0 state 3 healthMask 0x0",
    HEAD + "misc/socket.cc:537 -> 2",
    HEAD + "net.cc:20 -> 3",
    "gpu-a1:310:344 [0] misc/shmutils.cc:72 NCCL WARN Error: failed to extend /dev/shm/nccl-x to 9 bytes",
    '{"log":"' + HEAD + 'Channel 00/0 : 0[0] -\\u003e 1[1] via P2P/IPC\\n","stream":"stdout"}',
]
HALVES = RECORDS[6:10]
NOISE = [
    HEAD
    + "AllReduce: opCount 1 sendbuff 0x7f00 recvbuff 0x7f01 count 8 datatype 9 op 0 root 0 comm 0x5a0 [nranks=2]",
    HEAD + "AllReduce: 8192 Bytes -> Algo RING proto LL channel{Lo..Hi}={0..15}",
    HEAD + "New proxy send connection 0 from local rank 1, transport 0",
    HEAD + "Connected to proxy localRank 0 -> connection 0x7fd1",
    HEAD + "ncclPollProxyResponse Received new opId=0x1",
    "INFO 01-15 08:10:11 loading",
    "",
    "größer \ufffd",
]
DIRT = ["", "\r", "\x1b[0m", "\0", "\0\0\0", "\x1b[36m(RayWorkerWrapper pid=7)\x1b[0m ", "[36m", " \\u001b[0m"]

lines_of_a_log = st.lists(
    st.tuples(st.sampled_from(RECORDS + NOISE), st.sampled_from(DIRT), st.sampled_from(DIRT)).map(
        lambda parts: parts[1] + parts[0] + parts[2]
    ),
    max_size=12,
)


def every_line(block: Block) -> list[tuple[int, int]]:
    """What the search is compared with."""
    found = []
    start = block.start
    while start < block.end:
        found.append((start, block.end_of(start)))
        start = found[-1][1] + 1
    return found


def facts(log: NcclLog) -> NcclLog:
    return replace(log, records=0)


@settings(deadline=None)  # the machine is shared
@given(lines_of_a_log, st.sampled_from(["\n", "\n\n", " "]), st.lists(st.integers(0, 2000), max_size=5))
def test_search_finds_what_reading_every_line_finds(lines: list[str], between: str, places: list[int]) -> None:
    data = between.join(lines).encode()
    cuts = [0, *sorted(place for place in places if place < len(data)), len(data)]
    pieces = [data[start:end] for start, end in pairwise(cuts)]

    found = parse_nccl_log(pieces, "nccl.log")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nccl_log, "interesting_lines", every_line)
        assert facts(parse_nccl_log([data], "nccl.log")) == facts(found)


@settings(deadline=None)  # the machine is shared
@given(lines_of_a_log, st.sampled_from(["\n", " "]))
def test_lines_that_differ_in_the_channel_only_are_read_alike(lines: list[str], between: str) -> None:
    data = between.join(lines * 2).encode()

    found = parse_nccl_log([data], "nccl.log")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nccl_log, "_UNBROKEN_CHANNEL", re.compile(rb"(?!)"))
        assert parse_nccl_log([data], "nccl.log") == found


@settings(deadline=None)  # the machine is shared
@given(lines_of_a_log, st.integers(1, 400))
def test_size_of_blocks_makes_no_difference(lines: list[str], size: int) -> None:
    data = "\n".join(lines).encode()
    whole = parse_nccl_log([data], "nccl.log")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nccl_lines, "BLOCK_BYTES", size)
        cut = parse_nccl_log((data[at : at + size] for at in range(0, len(data), size)), "nccl.log")

    assert cut == whole


@pytest.mark.parametrize("record", [record for record in RECORDS if record not in HALVES])
def test_every_kind_of_record_is_found_among_others(record: str) -> None:
    start = (
        HEAD + "ncclCommInitRank comm 0x5a1 rank 0 nranks 2 cudaDev 0 nvmlDev 3 busId 4b000 commId 0x1 - Init START"
    )
    filling = [HEAD + f"ncclPollProxyResponse Received new opId=0x{number:x}" for number in range(50)]

    log = parse_nccl_log([start, *filling, record, *filling], "nccl.log")

    assert facts(log) != facts(parse_nccl_log([start, *filling], "nccl.log"))


def numbers(items: list[str | bytes]) -> list[tuple[int, str]]:
    return list(numbered_lines(items))


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([], []),
        (["a", "b\n", "c\nd"], [(1, "a"), (2, "b"), (3, "c"), (4, "d")]),
        ([b"a\nb", b"c\n", b"\nd"], [(1, "a"), (2, "bc"), (3, ""), (4, "d")]),
        ([b"\x1b[1ma\x1b[0m\n", b"[36mb[0m"], [(1, "a"), (2, "b")]),
        ([b"a\0", b"\0\0", b"b"], [(1, "a b")]),
        (["ab\n".encode("utf-16-le")], [(1, "ab")]),
        ([b"\xff\n"], [(1, "\ufffd")]),
        (["\ud800"], [(1, "?")]),
    ],
)
def test_numbered_lines(items: list[str | bytes], expected: list[tuple[int, str]]) -> None:
    assert numbers(items) == expected


def test_memory_holds_few_blocks() -> None:
    line = b"x" * 65535 + b"\n"
    taken = 0

    def items() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(100):
            taken += len(line)
            yield line

    given = 0
    for block in blocks(items()):
        given += block.end - block.start
        assert taken - given <= 2 * nccl_lines.BLOCK_BYTES

    assert given == taken == 100 * len(line)


def test_hole_of_a_file_costs_no_memory() -> None:
    hole = bytes(1 << 16)

    (block,) = blocks([b"a", *(hole for _ in range(100)), b"b\n"])

    assert block.data == b"a b\n"
