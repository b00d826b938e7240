from __future__ import annotations

from collections.abc import Sequence

import pytest

from pytest_gpulayout.nccl_log import Communicator, NcclLog, merge, parse_nccl_log


def head(pid: int, thread: int = 0, host: str = "gpu-a1", dev: int = 0) -> str:
    return f"{host}:{pid}:{pid + thread} [{dev}] NCCL INFO "


def comm(address: str, rank: int, nranks: int, comm_id: str | None = "0xc1", *, dev: int = 0) -> str:
    identity = f" commId {comm_id}" if comm_id else ""
    nvml = f" nvmlDev {dev}" if comm_id else ""
    return f"comm {address} rank {rank} nranks {nranks} cudaDev {dev}{nvml} busId {dev + 1}b000{identity}"


def start(address: str, rank: int, nranks: int, comm_id: str | None) -> str:
    return f"ncclCommInitRank {comm(address, rank, nranks, comm_id)} - Init START"


def complete(address: str, rank: int, nranks: int, comm_id: str | None) -> str:
    return f"ncclCommInitRank {comm(address, rank, nranks, comm_id)} - Init COMPLETE"


def channel(src: int, dst: int, transport: str = "P2P/CUMEM", *, connection: int = 0) -> str:
    end = "[send] " if transport.startswith("NET/") else ""
    return f"Channel 00/{connection} : {src}[{src}] -> {dst}[{dst}] {end}via {transport}"


def parse(*lines: str, source: str = "nccl.log") -> NcclLog:
    return parse_nccl_log(lines, source)


def edges(communicators: Sequence[Communicator]) -> dict[str | None, dict[tuple[int, int], dict[str, int]]]:
    return {communicator.key: communicator.edges for communicator in communicators}


def process(pid: int, *messages: str, thread: int = 0) -> list[str]:
    return [head(pid, thread) + message for message in messages]


def test_connections_made_during_init_belong_to_it() -> None:
    log = parse(
        *process(10, start("0xa", 0, 4, "0x1"), channel(0, 1), complete("0xa", 0, 4, "0x1")),
        *process(10, start("0xb", 0, 2, "0x2"), channel(0, 1, "NET/IB/0"), complete("0xb", 0, 2, "0x2")),
    )

    assert edges(log.communicators) == {"0x1": {(0, 1): {"P2P/CUMEM": 1}}, "0x2": {(0, 1): {"NET/IB/0": 1}}}
    assert log.edges == {(0, 1): {"P2P/CUMEM": 1, "NET/IB/0": 1}}


def test_inits_of_two_threads_at_once_are_told_apart() -> None:
    first, second = head(10, 1), head(10, 2)

    log = parse(
        first + start("0xa", 0, 2, "0x1"),
        second + start("0xb", 0, 2, "0x2"),
        second + channel(0, 1, "NET/IB/0"),
        first + channel(0, 1),
        first + complete("0xa", 0, 2, "0x1"),
        second + complete("0xb", 0, 2, "0x2"),
    )

    assert edges(log.communicators) == {"0x1": {(0, 1): {"P2P/CUMEM": 1}}, "0x2": {(0, 1): {"NET/IB/0": 1}}}


def test_late_connections_belong_to_the_latest_communicator_that_their_ranks_fit() -> None:
    """Since 2.22 the first collective connects, in a thread of its own."""
    log = parse(
        *process(10, start("0xa", 2, 4, "0x1"), complete("0xa", 2, 4, "0x1")),
        *process(10, channel(2, 3), "Connected all rings", thread=7),
        *process(10, start("0xb", 0, 2, "0x2"), complete("0xb", 0, 2, "0x2")),
        *process(10, channel(0, 1), thread=8),
        *process(10, channel(2, 1, "SHM/direct/direct"), thread=8),
        *process(10, start("0xc", 0, 2, "0x3"), complete("0xc", 0, 2, "0x3")),
        *process(10, channel(0, 1, "NET/IB/0"), thread=9),
    )

    assert edges(log.communicators) == {
        "0x1": {(2, 3): {"P2P/CUMEM": 1}, (2, 1): {"SHM/direct/direct": 1}},
        "0x2": {(0, 1): {"P2P/CUMEM": 1}},
        "0x3": {(0, 1): {"NET/IB/0": 1}},
    }


def test_receiver_of_a_network_channel_is_the_rank_that_logged_it() -> None:
    log = parse(
        *process(10, start("0xa", 0, 2, "0x1"), complete("0xa", 0, 2, "0x1")),
        *process(10, start("0xb", 1, 2, "0x2"), complete("0xb", 1, 2, "0x2")),
        *process(10, "Channel 00/0 : 1[0] -> 0[0] [receive] via NET/IB/0", thread=3),
    )

    assert edges(log.communicators) == {"0x1": {(1, 0): {"NET/IB/0": 1}}, "0x2": {}}


def test_old_logs_name_the_communicator_after_its_channels() -> None:
    """Up to 2.13 there is no Init START and no commId."""
    log = parse(
        *process(10, "Channel 00/02 :    0   1", "Trees [0] 1/-1/-1->0->-1", channel(0, 1), thread=1),
        *process(10, channel(2, 3, "direct shared memory"), "Connected all rings", thread=2),
        *process(10, f"{comm('0xa', 0, 2, None)} - Init COMPLETE", thread=1),
        *process(10, f"{comm('0xb', 2, 4, None)} - Init COMPLETE", thread=2),
    )

    first, second = log.communicators
    assert edges([first, second]) == {
        "gpu-a1:10 0xa": {(0, 1): {"P2P/CUMEM": 1}},
        "gpu-a1:10 0xb": {(2, 3): {"direct shared memory": 1}},
    }
    assert first.rings == {0: (0, 1)}
    assert (first.trees[0, 0].parent, first.trees[0, 0].children) == (None, (1,))
    assert second.connected
    assert second.complete


def test_rccl_names_the_communicator() -> None:
    log = parse(
        *process(10, start("0xa", 0, 2, "0x1"), start("0xb", 0, 2, "0x2")),
        *process(10, channel(0, 1, "P2P/IPC comm 0xa nRanks 02"), channel(0, 1, "P2P/IPC comm 0xb nRanks 02")),
        *process(10, channel(0, 1, "P2P/IPC comm 0xa nRanks 02")),
    )

    assert edges(log.communicators) == {"0x1": {(0, 1): {"P2P/IPC": 2}}, "0x2": {(0, 1): {"P2P/IPC": 1}}}


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(process(10, channel(0, 1)), id="no init line"),
        pytest.param([channel(0, 1)], id="no head"),
        pytest.param([*process(10, start("0xa", 3, 4, "0x1")), *process(10, channel(0, 1))], id="another rank"),
        pytest.param([*process(11, start("0xa", 0, 4, "0x1")), *process(10, channel(0, 1))], id="another process"),
        pytest.param([*process(10, start("0xa", 0, 2, "0x1")), *process(10, channel(0, 5))], id="rank too high"),
    ],
)
def test_channels_that_fit_no_communicator_have_none(lines: list[str]) -> None:
    log = parse(*lines)

    unknown = next(communicator for communicator in log.communicators if communicator.key is None)
    assert len(unknown.edges) == 1
    assert (unknown.nranks, unknown.members, unknown.connected) == (None, (), False)
    assert len(log.links) == 1
    assert all(not communicator.links for communicator in log.communicators if communicator.key)


def test_end_of_the_log_gives_what_waits_to_the_communicator_it_fits() -> None:
    log = parse(
        *process(10, f"{comm('0xa', 0, 2, None)} - Init COMPLETE"),
        *process(10, channel(0, 1, connection=1), thread=5),
    )

    assert edges(log.communicators) == {"gpu-a1:10 0xa": {(0, 1): {"P2P/CUMEM": 1}}}


def test_unfinished_init_keeps_its_channels_from_other_communicators() -> None:
    log = parse(
        *process(10, f"{comm('0xa', 0, 2, None)} - Init COMPLETE", thread=1),
        *process(10, "Trees [0] 1/-1/-1->0->-1", channel(0, 1, "NET/IB/0"), thread=2),
    )

    assert edges(log.communicators) == {"gpu-a1:10 0xa": {}, None: {(0, 1): {"NET/IB/0": 1}}}


def test_ranks_of_several_files_are_joined_by_identity() -> None:
    files = [
        parse(
            *process(pid, start("0xa", rank, 2, "0x1"), channel(rank, 1 - rank), complete("0xa", rank, 2, "0x1")),
            source=f"nccl.{pid}",
        )
        for rank, pid in enumerate((10, 11))
    ]

    (joined,) = merge(files).communicators

    assert [(member.rank, member.process, member.host) for member in joined.members] == [
        (0, ("gpu-a1", 10), "gpu-a1"),
        (1, ("gpu-a1", 11), "gpu-a1"),
    ]
    assert joined.edges == {(0, 1): {"P2P/CUMEM": 1}, (1, 0): {"P2P/CUMEM": 1}}
    assert joined.links[1, 0, "P2P/CUMEM"].first.file == "nccl.11"
    assert joined.complete
    assert joined.connected
    assert joined.processes == {("gpu-a1", 10), ("gpu-a1", 11)}


def test_ranks_without_identity_are_joined_where_they_complement_each_other() -> None:
    """Four processes, each with a group of two and one of four."""
    lines = []
    for number in (3, 1, 0, 2):
        small = f"{comm(f'0xa{number}', number % 2, 2, None, dev=number)} - Init COMPLETE"
        large = f"{comm(f'0xb{number}', number, 4, None, dev=number)} - Init COMPLETE"
        lines += process(10 + number, small, large)

    log = parse(*lines)

    groups = {
        frozenset(member.process[1] for member in found.members if member.process) for found in log.communicators
    }
    assert groups == {frozenset({10, 11}), frozenset({12, 13}), frozenset({10, 11, 12, 13})}


def test_several_ranks_of_one_process_are_one_communicator() -> None:
    log = parse(
        head(10, dev=0) + f"{comm('0xa', 0, 2, None, dev=0)} - Init COMPLETE",
        head(10, dev=1) + f"{comm('0xb', 1, 2, None, dev=1)} - Init COMPLETE",
    )

    assert [[member.rank for member in found.members] for found in log.communicators] == [[0, 1]]


def test_split_communicators_are_joined_by_their_parent() -> None:
    split = "rank {0} nranks 2 cudaDev 0 nvmlDev 0 busId 1b000 parent {1} splitCount 1 color 7 key 0- Init COMPLETE"
    lines = []
    for rank, pid in enumerate((10, 11)):
        lines += process(pid, start("0xa", rank, 2, "0x1"), complete("0xa", rank, 2, "0x1"))
        lines += process(pid, f"ncclCommSplit comm 0xb {split.format(rank, '0xa')}")

    log = parse(*lines)

    assert {found.key: len(found.members) for found in log.communicators} == {"0x1": 2, "0x1/1/7": 2}


@pytest.mark.parametrize(
    ("messages", "connected", "finished"),
    [
        ([start("0xa", 0, 2, "0x1")], False, False),
        ([start("0xa", 0, 2, "0x1"), complete("0xa", 0, 2, "0x1")], False, True),
        ([start("0xa", 0, 2, "0x1"), channel(0, 1)], True, False),
        ([complete("0xa", 0, 2, "0x1"), "Connected all rings, use ring PXN 0 GDR 1"], True, True),
        ([start("0xa", 0, 2, "0x1"), "NVLS comm 0xa headRank 0 nHeads 2 nvlsRanks 2 buffSize 1"], True, False),
    ],
)
def test_how_far_a_communicator_came(messages: list[str], connected: bool, finished: bool) -> None:
    (found,) = parse(*process(10, *messages)).communicators

    assert (found.connected, found.complete) == (connected, finished)


def test_address_used_again_after_the_end_is_another_communicator() -> None:
    log = parse(
        *process(10, start("0xa", 0, 2, "0x1"), channel(0, 1), complete("0xa", 0, 2, "0x1")),
        *process(10, start("0xa", 0, 2, "0x2"), channel(0, 1, "NET/IB/0"), complete("0xa", 0, 2, "0x2")),
    )

    assert edges(log.communicators) == {"0x1": {(0, 1): {"P2P/CUMEM": 1}}, "0x2": {(0, 1): {"NET/IB/0": 1}}}


@pytest.mark.parametrize(
    ("record", "parent", "children"),
    [
        ("Trees [0] 1/-1/-1->0->-1", None, (1,)),
        ("Trees [0] 1/4/-1->0->3", 3, (1, 4)),
        ("Trees [0] 1/-1/-1->0->3|3->0->1/-1/-1 [1] 2/-1/-1->0->-1", 3, (1,)),
        ("Trees [0] 3->0->1/2/-1", 3, (1, 2)),
        ("Trees [0] -1/-1/-1->0->3 comm 0xa nRanks 04 busId 1b000", 3, ()),
    ],
)
def test_trees(record: str, parent: int | None, children: tuple[int, ...]) -> None:
    (found,) = parse(*process(10, start("0xa", 0, 8, "0x1"), record)).communicators

    node = found.trees[0, 0]
    assert (node.rank, node.parent, node.children) == (0, parent, children)


def test_facts_of_a_rank() -> None:
    log = parse(
        *process(
            10,
            start("0xa", 0, 8, "0x1"),
            "comm 0xa rank 0 nRanks 8 nNodes 2 localRanks 4 localRank 0 MNNVL 1",
            "Check P2P Type isAllDirectP2p 0 directMode 0",
        )
    )

    (member,) = log.comm_ranks
    assert (member.n_nodes, member.local_ranks, member.mnnvl, member.all_direct_p2p) == (2, 4, True, False)
