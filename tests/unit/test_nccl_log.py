from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_gpulayout import nccl_lines
from pytest_gpulayout.nccl_log import (
    LogLine,
    NcclLog,
    RemarkKind,
    channels_in,
    is_socket,
    is_torn,
    merge,
    parse_nccl_log,
)

HEAD = "gpu-a1:310:344 [0] NCCL INFO "


def parse(*lines: str) -> NcclLog:
    return parse_nccl_log(lines, "nccl.log")


@pytest.mark.parametrize(
    ("record", "pair", "transport"),
    [
        ("Ring 00 : 0[2] -> 1[3] via P2P/IPC", (0, 1), "P2P/IPC"),
        ("Ring 01 : 2 -> 3 via P2P/common device", (2, 3), "P2P/common device"),
        ("Ring 00 : 0[1a000] -> 1[1b000] via direct shared memory", (0, 1), "direct shared memory"),
        ("Ring 00 : 1 -> 0 via NET/Socket/0", (1, 0), "NET/Socket/0"),
        ("Ring 00 : 0 -> 1 [receive] via NET/IB/0/GDRDMA", (0, 1), "NET/IB/0/GDRDMA"),
        ("Channel 03 : 4[3d000] -> 5[41000] via P2P/direct pointer/read", (4, 5), "P2P/direct pointer/read"),
        ("Channel 00 : 0[0] -> 6[6] via P2P/indirect/4[4]/read", (0, 6), "P2P/indirect/4[4]/read"),
        ("Channel 02/0 : 7[7] -> 0[0] via P2P/CUMEM/read", (7, 0), "P2P/CUMEM/read"),
        ("Channel 02/0 : 7[7] -> 0[0] via P2P/MNNVL", (7, 0), "P2P/MNNVL"),
        ("Channel 00 : 1[1] -> 2[2] via SHM/CE/direct", (1, 2), "SHM/CE/direct"),
        ("Channel 00/0 : 11[3] -> 12[4] [send] via NET/IB/1(4)/GDRDMA", (11, 12), "NET/IB/1(4)/GDRDMA"),
        ("Channel 00/0 : 1[1] -> 8[0] [send] via NET/IB/0/GDRDMA(PCI)/Shared", (1, 8), "NET/IB/0/GDRDMA(PCI)/Shared"),
        ("Channel 00/1 : 0[0] -> 2[0] [send] via NET/AWS Libfabric/3/GDRDMA", (0, 2), "NET/AWS Libfabric/3/GDRDMA"),
        ("Channel 00/0 : 0[0] -> 1[0] [receive] via NET/IBext_v10/0", (0, 1), "NET/IBext_v10/0"),
        ("Channel 00/0 : 0[0] -> 1[0] [send] via NET/FastSocket/0", (0, 1), "NET/FastSocket/0"),
        # RCCL names the communicator behind the transport.
        ("Channel 00/0 : 0[c1000] -> 1[c6000] via P2P/IPC comm 0x55d0 nRanks 08", (0, 1), "P2P/IPC"),
        # What launchers, people and torn writes put behind it.
        ("Channel 00 : 0[0] -> 1[1] via SHM/direct/direct [repeated 3x across cluster]", (0, 1), "SHM/direct/direct"),
        ("Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM (the others, too)", (0, 1), "P2P/CUMEM"),
        ('Channel 00/0 : 0[0] -\\u003e 1[1] via P2P/CUMEM\\n","stream":"stdout"}', (0, 1), "P2P/CUMEM"),
        ("Channel 00/0 : 0[0] -&gt; 1[1] via P2P/IPC", (0, 1), "P2P/IPC"),
        ("Channel 00/0 : 0[0] -> 1[1] via P2P/IPC/rea", (0, 1), "P2P/IPC/rea"),
        ("Channel 00/0 : 0[0] -> 1[1] [send] via NET/Socket", (0, 1), "NET/Socket"),
        ("Channel 00/0 : 0[0] -> 1[1] via P2P", (0, 1), "P2P"),
        ("Channel 00/0 : 0[0] -> 1[1] via NEW/thing/1", (0, 1), "NEW/thing/1"),
    ],
)
def test_channel_line(record: str, pair: tuple[int, int], transport: str) -> None:
    (channel,) = channels_in(HEAD + record, file="a", line=3)

    assert ((channel.src, channel.dst), channel.transport) == (pair, transport)
    assert parse(HEAD + record).edges == {pair: {transport: 1}}


@pytest.mark.parametrize(
    "line",
    [
        HEAD + "Channel 00/08 : 0 1 2 3",
        HEAD + "Ring 00 : 1 -> 0 -> 1",
        HEAD + "Trees [0] 1/-1/-1->0->-1",
        HEAD + "NET/Socket : Using [0]eth0:192.0.2.7<0>",
        HEAD + "NET/Socket: Using 1 threads and 1 sockets per thread",
        HEAD + "24 coll channels, 0 collnet channels, 16 nvls channels, 32 p2p channels",
        HEAD + "transport/shm.cc:590 -> 2",
        HEAD + "Channel 01/0 : 0[0] -> 1[0] [send] via",
        HEAD + "Channel 01/0 : 0[0] -> 1[0] [send] via gpu-a1:311:345 [1] NCCL INFO Connected all rings",
        "the run used P2P/IPC, and then went via NET/Socket/0",
    ],
)
def test_other_lines_are_no_channels(line: str) -> None:
    log = parse(line)

    assert log.links == {}
    assert log.socket_lines == ()


@pytest.mark.parametrize(
    ("transport", "torn"),
    [
        *((f"NET/{'Socket'[:length]}", True) for length in range(1, 6)),
        *((text, True) for text in ("N", "NE", "NET", "NET/", "NET/Sock/0", "NET/Sock et")),
        *((text, False) for text in ("NET/Socket", "NET/Socket/0", "NET/IB", "NET/SHARP/0", "NET/FastSocket/0")),
        *((text, False) for text in ("P2P", "SHM", "P2P/IPC/rea", "direct shared memory", "COLLNET/SHARP/0")),
    ],
)
def test_torn_transport_is_told(transport: str, torn: bool) -> None:
    assert is_torn(transport) is torn


@pytest.mark.parametrize("kept", ["N", "NET", "NET/Sock"])
@pytest.mark.parametrize("after", ["", " ", "gpu-b2:410:433 [1] NCCL INFO Connected all rings"])
def test_record_cut_inside_a_socket_is_kept_and_marked(kept: str, after: str) -> None:
    line = HEAD + f"Channel 00/0 : 0[0] -> 1[0] [send] via {kept}{after}"

    log = parse("gpu-b2:410:433 [1] NCCL INFO NET/Plugin: none", line)

    assert log.edges == {(0, 1): {kept: 1}}
    assert [where.line for where in log.torn_lines] == [2]


def test_words_behind_a_socket_do_not_hide_it() -> None:
    log = parse(HEAD + "Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket INFO 01-15 loading shard 3/5")

    assert log.transports == {"NET/Socket": 1}


@pytest.mark.parametrize(
    "lines",
    [
        [HEAD + "Channel 00/0 : 0[0] -> 1[0] [send]", "via NET/Socket/0"],
        [HEAD + "Channel 00/0 : 0[0] ->", "1[0] [send] via NET/Socket/0\r"],
        [HEAD + "Channel 00/0 : 0[0] -> 1[0] [send] via", "NET/Socket/0"],
        ["Channel 00/0 : 0[0] -> 1[0] [se", "nd] via NET/Socket/0"],
    ],
)
def test_channel_broken_by_a_line_end_is_put_together(lines: list[str]) -> None:
    log = parse("one", *lines, HEAD + "Connected all rings")

    assert log.transports == {"NET/Socket/0": 1}
    assert [where.line for where in log.socket_lines] == [2]


@pytest.mark.parametrize(
    "lines",
    [
        [HEAD + "Channel 00/0 : 0[0] -> 1[0] [send] via", HEAD + "NET/Socket : Using [0]eth0:192.0.2.7<0>"],
        [HEAD + "Channel 00/0 : 0[0] -> 1[0] [send]", HEAD + "via NET/Socket/0"],
        [HEAD + "Channel 00/0 : 0[0] -> 1[0] [send]", "", "via NET/Socket/0"],
    ],
)
def test_lines_that_do_not_belong_together_are_left_apart(lines: list[str]) -> None:
    assert parse(*lines).links == {}


def test_record_that_only_quotes_a_channel_is_none() -> None:
    quoted = HEAD + "Channel 00/0 : 0[0] -> 1[1] via P2P/IPC"

    assert parse(HEAD + "NCCL_TOPO_FILE set by environment to /x Channel 00/0 : 0[0] -> 1[1] via P2P/IPC").links == {}
    assert len(parse(HEAD + "NCCL_TOPO_FILE set by environment to /x " + quoted).links) == 1


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("NET/Plugin: Could not find: libnccl-net.so", RemarkKind.PLUGIN),
        ("NET/Plugin : No plugin found (libnccl-net.so), using internal implementation", RemarkKind.PLUGIN),
        ("Assigned NET plugin AWS Libfabric to comm", RemarkKind.PLUGIN),
        ("Failed to initialize NET plugin IB", RemarkKind.PLUGIN),
        ("NET/IB : No device found.", RemarkKind.NO_INFINIBAND),
        ("NET/Socket : no interface found", RemarkKind.NO_INTERFACE),
        ("P2P is disabled between connected GPUs 0 and 1. You can repress this", RemarkKind.P2P_DISABLED),
        ("Check P2P Type intraNodeP2pSupport 1 directMode 0", RemarkKind.P2P_CHECK),
        ("cuMem host allocations do not appear to be working; falling back", RemarkKind.CUMEM_HOST_REFUSED),
        ("MNNVL 1 cliqueId 2 cliqueSize 8 cliqueRank 0", RemarkKind.MNNVL),
        ("NVLS multicast support is not available on dev 0", RemarkKind.NVLS_SUPPORT),
        ("Connected NVLS tree", RemarkKind.CONNECTED),
        ("misc/socket.cc:537 -> 2", RemarkKind.ERROR),
        ("/build/rccl/src/transport/net_ib.cc:708 -> 2", RemarkKind.ERROR),
        ("init.cc:12 -> 7", None),  # still in progress
        ("NET/IB : Using [0]mlx5_0:1/IB", None),
        ("Setting affinity for GPU 0 to 0-47", None),
    ],
)
def test_remarks(message: str, kind: RemarkKind | None) -> None:
    log = parse("", HEAD + message, HEAD + message)

    assert [(remark.kind, remark.line) for remark in log.remarks] == (
        [(kind, LogLine("nccl.log", 2, HEAD + message))] if kind else []
    )


def test_errors_and_remarks_are_limited() -> None:
    lines = [HEAD + f"misc/socket.cc:{number} -> 2" for number in range(300)]

    assert len(parse(*lines).errors) == len(merge([parse(*lines), parse(*lines)]).errors) == 50


def test_channel_record_keeps_its_details() -> None:
    (channel,) = channels_in("Channel 05/1 : 2[2] -> 9[1] [receive] via NET/IB/3", file="nccl.gpu-a1.310", line=71)

    assert (channel.channel, channel.connection, channel.direction) == (5, 1, "receive")
    assert (channel.file, channel.line) == ("nccl.gpu-a1.310", 71)


def test_collnet_names_one_rank_and_is_no_edge() -> None:
    log = parse(
        HEAD + "CollNet 00/0 : 3 [send] via COLLNET/SHARP/0/GDRDMA",
        HEAD + "Coll 01 : 3 [receive] via COLLNET/SHARP/1",
    )

    assert log.transports == {"COLLNET/SHARP/0/GDRDMA": 1, "COLLNET/SHARP/1": 1}
    assert log.edges == {}
    assert log.ranks == {3}


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "3: ",
        "[1,0]<stdout>:",
        "[default0]:",
        "[2025-01-02 03:04:05] ",
        "2025-01-02T03:04:05.678Z stdout F ",
        "[pod/worker-0/vllm] 2025-01-02T03:04:05Z ",
        "\x1b[36m(RayWorkerWrapper pid=310, ip=192.0.2.7)\x1b[0m ",
        "[36m(RayWorkerWrapper pid=310)[0m ",
        "(EngineCore_DP0 pid=7) (RayWorkerWrapper pid=310) ",
        "loading:  50%|#####     | 1/2\r",
        "> ",
        "\xff\ufffd ",
    ],
)
def test_prefixes_are_no_obstacle(prefix: str) -> None:
    log = parse(prefix + HEAD + "Channel 00/0 : 0[0] -> 1[1] via P2P/IPC\r\n")

    assert log.edges == {(0, 1): {"P2P/IPC": 1}}
    assert log.speakers == {("gpu-a1", 310)}


def test_several_records_on_a_line_each_count() -> None:
    log = parse(
        HEAD + "Channel 00 : 0[0] -> 1[1] via P2P/IPC " + HEAD + "Channel 01 : 0[0] -> 1[1] via P2P/direct pointer "
        "gpu-b2:410:433 [1] NCCL INFO Channel 00 : 1[1] -> 0[0] via P2P/IPC "
        "gpu-b2:410:433 [1] NCCL INFO Using network IB"
    )

    assert log.edges == {(0, 1): {"P2P/IPC": 1, "P2P/direct pointer": 1}, (1, 0): {"P2P/IPC": 1}}
    assert log.speakers == {("gpu-a1", 310), ("gpu-b2", 410)}
    assert log.network == "IB"


def test_torn_record_that_ends_in_a_host_name_keeps_its_transport() -> None:
    log = parse(HEAD + "cudaDriverVersion 12080", HEAD + "Channel 00 : 0[0] -> 1[1] via P2P/IPC" + HEAD + "Trees [0]")

    assert log.transports == {"P2P/IPC": 1}
    assert log.speakers == {("gpu-a1", 310)}


def test_channel_lines_are_counted_per_end_and_the_first_is_kept() -> None:
    log = parse(
        "something else",
        HEAD + "Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/0",
        "gpu-b2:410:433 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [receive] via NET/Socket/0",
    )

    assert log.transports == {"NET/Socket/0": 2}
    assert log.socket_lines == (LogLine("nccl.log", 2, HEAD + "Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/0"),)


@pytest.mark.parametrize(
    ("transport", "expected"),
    [
        ("NET/Socket/0", True),
        ("NET/Socket", True),
        ("NET/Socket/0/GDRDMA", True),
        ("NET/FastSocket/0", False),
        ("NET/SocketX/0", False),
        ("NET/IB/0", False),
        ("SHM/Socket", False),
    ],
)
def test_socket_is_a_whole_component(transport: str, expected: bool) -> None:
    assert is_socket(transport) is expected


@pytest.mark.parametrize(
    ("line", "network"),
    [
        (HEAD + "Using network Socket", "Socket"),
        (HEAD + "Using network AWS Libfabric\r", "AWS Libfabric"),
        (HEAD + "Using network IBext_v8 [repeated 2x across cluster]", "IBext_v8"),
        (HEAD + "Using network Socket INFO 01-15 08:10:11 loading", "Socket"),
        (HEAD + "Initialized NET plugin Socket", None),
        (HEAD + "Assigned NET plugin Socket to comm", None),
    ],
)
def test_network_is_what_using_network_names(line: str, network: str | None) -> None:
    assert parse(line).network == network


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NCCL version 2.20.5+cuda12.4", "2.20.5+cuda12.4"),
        (HEAD + "NCCL version 2.27.7+cuda13.0", "2.27.7+cuda13.0"),
        ("NCCL version 2.7.8+cuda10.2NCCL version 2.7.8+cuda10.2", "2.7.8+cuda10.2"),
        ("NCCL version 2.12.6azure3+cuda11.4", "2.12.6azure3+cuda11.4"),
        (HEAD + "RCCL version : 2.22.3-HEAD:271856d", "RCCL 2.22.3-HEAD:271856d"),
        (HEAD + "Using non-device net plugin version 0", None),
        (HEAD + "NCCL git version master 3619159", None),
    ],
)
def test_version(line: str, version: str | None) -> None:
    assert parse(line).version == version


def test_init_lines_of_a_rank_are_put_together() -> None:
    log = parse(
        HEAD + "ncclCommInitRank comm 0x5a0 rank 1 nranks 4 cudaDev 0 nvmlDev 3 busId 4b000 commId 0x9f - Init START",
        HEAD + "comm 0x5a0 rank 1 nRanks 4 nNodes 2 localRanks 2 localRank 1 MNNVL 0",
        HEAD + "comm 0x5a0 rank 1 nranks 4 cudaDev 0 nvmlDev 3 busId 4b000 commId 0x9f - Init COMPLETE",
    )

    (member,) = log.comm_ranks
    assert (member.process, member.rank, member.nranks, member.n_nodes) == (("gpu-a1", 310), 1, 4, 2)
    assert (member.cuda_dev, member.nvml_dev, member.bus_id, member.comm_id) == (0, 3, "4b000", "0x9f")
    assert log.nranks == 4
    assert log.ranks == {1}


def test_an_address_used_again_is_another_communicator() -> None:
    log = parse(
        HEAD + "comm 0x5a0 rank 1 nranks 2 cudaDev 0 busId 4b000 - Init COMPLETE",
        HEAD + "comm 0x5a0 rank 0 nranks 8 cudaDev 0 busId 4b000 - Init COMPLETE",
    )

    assert [(member.rank, member.nranks) for member in log.comm_ranks] == [(1, 2), (0, 8)]


def test_two_processes_may_have_the_same_address() -> None:
    log = parse(
        HEAD + "comm 0x5a0 rank 0 nranks 2 cudaDev 0 busId 1000 - Init COMPLETE",
        HEAD.replace("310", "311") + "comm 0x5a0 rank 0 nranks 2 cudaDev 0 busId 1000 - Init COMPLETE",
    )

    assert len(log.comm_ranks) == 2


def nvls_lines(ranks: int, of: int = 2, *, nodes: int | None = 1, made: int | None = None) -> Iterator[str]:
    """Lines of ``ranks`` processes, a communicator of ``of`` ranks; the first ``made`` of them made their buffers."""
    for rank in range(ranks):
        head = f"gpu-a1:{500 + rank}:{600 + rank} [{rank}] NCCL INFO "
        yield (
            head
            + f"ncclCommInitRank comm 0x7f rank {rank} nranks {of} cudaDev 0 nvmlDev {rank} commId 0x1 - Init START"
        )
        yield head + f"NVLS multicast support is available on dev {rank}"
        if nodes is not None:
            yield head + f"comm 0x7f rank {rank} nRanks {of} nNodes {nodes} localRanks {of} localRank {rank} MNNVL 0"
        if made is None or rank < made:
            yield head + f"NVLS comm 0x7f headRank {rank} nHeads {of} nvlsRanks {of} buffSize 4194304 memSize 2097152"


@pytest.mark.parametrize(
    ("lines", "complete"),
    [
        pytest.param(list(nvls_lines(2)), True, id="both ranks"),
        pytest.param(list(nvls_lines(2, nodes=None)), True, id="node count not logged, buffers of all ranks"),
        pytest.param(list(nvls_lines(2, made=1)), False, id="one rank without buffers"),
        pytest.param(list(nvls_lines(2, made=0)), False, id="capability only"),
        pytest.param(list(nvls_lines(2, of=4)), False, id="two ranks of four"),
        pytest.param(list(nvls_lines(2, nodes=2)), False, id="two nodes"),
        pytest.param(list(nvls_lines(1, of=1)), False, id="one rank"),
        pytest.param([HEAD + "NVLS comm 0x7f headRank 0 nHeads 1 buffSize 1"], False, id="rank unknown"),
        pytest.param([HEAD + "Connected NVLS tree"], False, id="tree only"),
    ],
)
def test_nvls_is_evidence_when_every_rank_of_one_node_made_its_buffers(lines: list[str], complete: bool) -> None:
    assert bool(parse(*lines).nvls_communicators()) is complete


def test_environment_and_warnings_are_kept_with_their_lines() -> None:
    log = parse(
        HEAD + "NCCL_P2P_LEVEL set by environment to LOC",
        "",
        "gpu-a1:310:344 [0] shm.cc:87 (ncclShmOpen) NCCL WARN Error: failed to extend /dev/shm/nccl-x1 to 9 bytes",
        HEAD + "NCCL_P2P_DISABLE set by environment to 1.",
    )

    assert {name: value for name, (value, _) in log.environment.items()} == {
        "NCCL_P2P_LEVEL": "LOC",
        "NCCL_P2P_DISABLE": "1",
    }
    assert log.warnings == (LogLine("nccl.log", 3, "Error: failed to extend /dev/shm/nccl-x1 to 9 bytes"),)


TEXT = (
    "NCCL version 2.20.5+cuda12.4\n"
    + HEAD
    + "Using network Socket\r\n"
    + "Fortschritt: größer\n"
    + HEAD
    + "Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read\n"
    + "gpu-a1:311:345 [1] NCCL INFO Channel 00/0 : 1[1] -> 0[0] via P2P/CUMEM/read"
)


@settings(deadline=None)  # the machine is shared
@given(st.lists(st.integers(min_value=0, max_value=len(TEXT.encode())), max_size=6))
def test_bytes_may_be_cut_anywhere(cuts: list[int]) -> None:
    data = TEXT.encode()
    places = [0, *sorted(cuts), len(data)]
    chunks = [data[start:end] for start, end in pairwise(places)]

    assert parse_nccl_log(chunks, "nccl.log") == parse_nccl_log(TEXT.split("\n"), "nccl.log")


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(TEXT.encode("utf-16"), id="UTF-16"),
        pytest.param(TEXT.encode().replace(b"\n", b"\n" + bytes(5000)), id="holes of NULs"),
        pytest.param(TEXT.encode().replace("ö".encode(), b"\xff\xc3"), id="invalid UTF-8"),
        pytest.param(TEXT.replace("\n", " ").replace("\r", " ").encode(), id="line ends lost"),
    ],
)
def test_damaged_bytes_keep_their_records(data: bytes) -> None:
    log = parse_nccl_log([data], "nccl.log")

    assert log.edges == {(0, 1): {"P2P/CUMEM/read": 1}, (1, 0): {"P2P/CUMEM/read": 1}}
    assert (log.version, log.network) == ("2.20.5+cuda12.4", "Socket")


@settings(deadline=None)  # the machine is shared
@given(st.lists(st.one_of(st.binary(max_size=60), st.text(max_size=60)), max_size=5), st.integers(0, 10**6))
def test_no_text_is_an_error(noise: list[str | bytes], number: int) -> None:
    long = f"Channel {number}/0 : 0[0] -> {'9' * 5000}[1] via P2P/IPC"

    assert parse_nccl_log([*noise, "\n", long], "nccl.log").sources == ("nccl.log",)


def test_endless_line_is_read_in_pieces_and_loses_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_lines, "LONGEST_LINE", 1000)
    monkeypatch.setattr(nccl_lines, "BLOCK_BYTES", 100)
    record = (HEAD + "Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read ").encode()

    log = parse_nccl_log((record for _ in range(200)), "nccl.log")

    assert log.transports == {"P2P/CUMEM/read": 200}


def test_nothing_to_read_is_a_value() -> None:
    assert parse_nccl_log([], "empty") == NcclLog(sources=("empty",))
    assert parse("only python output").records == 0
    assert parse(HEAD + "Connected all rings").records == 1


def test_merge_adds_up_and_keeps_where_things_were_seen() -> None:
    first = parse_nccl_log([HEAD + "Channel 00/0 : 0[0] -> 1[1] via P2P/IPC", HEAD + "Using network IB"], "a.log")
    second = parse_nccl_log(
        [
            HEAD.replace("310", "311") + "Channel 00/0 : 1[1] -> 0[0] via P2P/IPC",
            HEAD.replace("310", "311") + "Channel 01/0 : 0[0] -> 1[1] via P2P/IPC",
            HEAD.replace("310", "311") + "Using network Socket",
        ],
        "b.log",
    )

    merged = merge([first, second])

    assert merged.sources == ("a.log", "b.log")
    assert merged.edges == {(0, 1): {"P2P/IPC": 2}, (1, 0): {"P2P/IPC": 1}}
    assert merged.links[0, 1, "P2P/IPC"].first.file == "a.log"
    assert merged.links[1, 0, "P2P/IPC"].first.file == "b.log"
    assert (merged.network, dict(merged.networks)) == ("IB", {"IB": 1, "Socket": 1})
    assert len(merged.speakers) == 2
    assert merge([]) == NcclLog()
