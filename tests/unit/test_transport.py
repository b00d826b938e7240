from __future__ import annotations

from collections.abc import Iterable

import pytest

from pytest_gpulayout.errors import LayoutSyntaxError
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.nccl_log import NcclLog, merge, parse_nccl_log
from pytest_gpulayout.report import transport_record
from pytest_gpulayout.transport import (
    AllowedTransports,
    TransportFamily,
    TransportReport,
    TransportVerdict,
    family_of,
    forbidden,
    parse_allowed,
)
from pytest_gpulayout.transport_cpu import judge_cpu
from pytest_gpulayout.transport_nccl import ServerContext, judge_nccl
from pytest_gpulayout.vllm_log import VllmLogFacts, parse_vllm_log


def process(number: int, *messages: str) -> NcclLog:
    """Log of one process, in a file of its own as ``NCCL_DEBUG_FILE=nccl.%h.%p`` makes it."""
    head = f"gpu-a1:{number}:{number + 50} [0] NCCL INFO "
    return parse_nccl_log([head + message for message in messages], f"nccl.gpu-a1.{number}")


def channel(src: int, dst: int, transport: str = "P2P/CUMEM", end: str = "") -> str:
    return f"Channel 00/0 : {src}[{src}] -> {dst}[{dst}] {end}via {transport}"


def ring(*ranks: int, transport: str = "P2P/CUMEM", first_pid: int = 100) -> list[NcclLog]:
    """A process per rank; each sends to the next."""
    following = (*ranks[1:], ranks[0])
    return [
        process(first_pid + at, channel(src, dst, transport))
        for at, (src, dst) in enumerate(zip(ranks, following, strict=True))
    ]


def judge(logs: Iterable[NcclLog], layout: str | None = None) -> TransportReport:
    return judge_nccl(merge(logs), parse_layout(layout) if layout else None)


@pytest.mark.parametrize(
    ("transport", "family"),
    [
        ("P2P/CUMEM/read", TransportFamily.P2P),
        ("P2P/direct pointer", TransportFamily.P2P),
        ("P2P", TransportFamily.P2P),
        ("SHM/direct/direct", TransportFamily.SHM),
        ("direct shared memory", TransportFamily.SHM),
        ("NET/IB/0/GDRDMA", TransportFamily.NET),
        ("NET/AWS Libfabric/0", TransportFamily.NET),
        ("NET/FastSocket/0", TransportFamily.NET),
        ("NET/Socket/0", TransportFamily.SOCKET),
        ("NET/Socket", TransportFamily.SOCKET),
        ("COLLNET/SHARP/0", TransportFamily.COLLNET),
        ("NVLS", TransportFamily.NVLS),
        ("CPU/SHM", TransportFamily.CPU_SHM),
        ("CPU/GLOO", TransportFamily.CPU_GLOO),
        ("NEW/thing", TransportFamily.OTHER),
    ],
)
def test_family(transport: str, family: TransportFamily) -> None:
    assert family_of(transport) is family


@pytest.mark.parametrize(
    ("transports", "verdict"),
    [
        (["P2P/CUMEM"], "ok"),
        (["NET/IB/0/GDRDMA"], "ok"),
        (["NET/FastSocket/0"], "ok"),
        (["P2P/IPC", "SHM/direct/direct"], "shm"),
        (["P2P/IPC", "SHM/direct/direct", "NET/Socket/0"], "socket"),
        ([], "no-evidence"),
    ],
)
def test_verdict_without_a_layout(transports: list[str], verdict: TransportVerdict) -> None:
    log = process(100, *(channel(0, 1, transport) for transport in transports))

    assert judge_nccl(log).verdict == verdict


def test_report_gives_the_documented_json() -> None:
    logs = [
        process(100, "NCCL version 2.27.7+cuda13.0", "Using network IB", *[channel(0, 1, "P2P/CUMEM/read")] * 2),
        process(101, *[channel(1, 0, "P2P/CUMEM/read")] * 2),
    ]

    report = judge(logs, "tp2")

    assert report.summary() == "P2P/CUMEM/read x4"
    assert report.to_document() == {
        "verdict": "ok",
        "transports": {"P2P/CUMEM/read": 4},
        "edges": [
            {"src": 0, "dst": 1, "transports": ["P2P/CUMEM/read"], "channels": 2},
            {"src": 1, "dst": 0, "transports": ["P2P/CUMEM/read"], "channels": 2},
        ],
        "network": "IB",
        "nccl_version": "2.27.7+cuda13.0",
        "findings": [],
    }


@pytest.mark.parametrize(
    ("layout", "logs"),
    [
        ("tp2", ring(0, 1)),
        ("tp4", ring(0, 1, 2, 3)),
        ("tp2pp2", ring(0, 1) + ring(0, 1, first_pid=200)),
        ("dp2tp2", ring(0, 1) + ring(0, 1, first_pid=200)),
        ("tp2x2", ring(0, 1) + ring(0, 1, first_pid=200)),
        ("dp2tp2ep", ring(0, 1, 2, 3)),
    ],
)
def test_layout_is_proved(layout: str, logs: list[NcclLog]) -> None:
    report = judge(logs, layout)

    assert (report.verdict, report.findings) == ("ok", ())


@pytest.mark.parametrize(
    ("layout", "logs", "cause"),
    [
        ("tp2", [], "no line of NCCL"),
        ("tp2", [process(100, "Using network Socket")], "NCCL's lines name no channel between ranks"),
        ("tp2", [process(100, "comm 0x1 rank 0 nranks 1 cudaDev 0 - Init COMPLETE")], "NCCL ran with one rank"),
        ("tp2", [process(100, "CollNet 00/0 : 0 [send] via COLLNET/SHARP/0")], "no channel between ranks"),
        ("tp2", ring(0, 1)[:1], "layout tp2 connects 2 ranks, no line shows over what rank 1 sends"),
        ("tp4", ring(0, 1, 2, 3)[:3], "layout tp4 connects 4 ranks, no line shows over what rank 3 sends"),
        ("tp4", ring(0, 1), "layout tp4 connects 4 ranks, no channel line connects ranks 0,1 and 2 and 3"),
        ("tp4", ring(0, 1) + ring(2, 3), "no channel line connects ranks 0,1 and 2,3"),
        ("tp2pp2", ring(0, 1), "layout tp2pp2 has 4 processes, 2 of them logged a channel"),
        ("dp2tp2ep", ring(0, 1) + ring(0, 1, first_pid=200), "no channel line connects ranks 0,1 and 2 and 3"),
        ("tp2", ring(0, 1, 2, 3), "rank 3 has channels, layout tp2 has ranks 0 to 1: another server's log"),
        ("tp1", ring(0, 1), "rank 1 has channels, layout tp1 has ranks 0 to 0: another server's log"),
    ],
)
def test_layout_is_not_proved(layout: str, logs: list[NcclLog], cause: str) -> None:
    report = judge(logs, layout)

    assert report.verdict == "no-evidence"
    assert cause in report.findings[0].cause
    assert "NCCL_DEBUG=INFO" in report.findings[0].advice
    assert report.summary() == "no evidence" or report.summary().endswith("(incomplete)")


@pytest.mark.parametrize(
    ("layout", "reason"), [("tp1", "layout tp1 has one rank"), ("dp2", "layout dp2 has no ranks that talk")]
)
def test_layout_whose_ranks_do_not_talk_needs_no_evidence_and_says_so(layout: str, reason: str) -> None:
    report = judge([], layout)

    assert (report.verdict, report.summary()) == ("ok", "none needed")
    assert reason in report.findings[0].cause


def test_socket_is_named_with_its_first_line_even_where_other_evidence_is_missing() -> None:
    log = process(100, "Using network Socket", channel(0, 1, "NET/Socket/0", "[send] "))

    report = judge_nccl(log, parse_layout("tp4"))

    assert report.verdict == "socket"
    finding = report.findings[0]
    assert (finding.cause, finding.file, finding.line) == ("ranks 0 -> 1 use NET/Socket/0", "nccl.gpu-a1.100", 2)
    assert finding.text is not None
    assert finding.text.endswith("0[0] -> 1[1] [send] via NET/Socket/0")
    assert "--ipc=host" in finding.advice


@pytest.mark.parametrize(
    ("setting", "transport", "named"),
    [
        ("NCCL_P2P_DISABLE set by environment to 1", "SHM/direct/direct", True),
        ("NCCL_P2P_DISABLE set by environment to 0.", "SHM/direct/direct", False),
        ("NCCL_P2P_LEVEL set by environment to LOC", "SHM/direct/direct", True),
        ("NCCL_P2P_LEVEL set by environment to SYS", "SHM/direct/direct", False),
        ("NCCL_IB_DISABLE set by environment to 1", "NET/Socket/0", True),
        ("NCCL_IB_DISABLE set by environment to 1", "SHM/direct/direct", False),
        ("NCCL_P2P_DISABLE set by environment to 1", "P2P/IPC", False),
    ],
)
def test_left_over_setting_is_the_first_cause(setting: str, transport: str, named: bool) -> None:
    report = judge_nccl(process(100, setting, channel(0, 1, transport)))

    causes = [finding.cause for finding in report.findings]
    assert (setting in causes[:1]) is named


def test_full_shared_memory_is_the_cause_of_missing_channels() -> None:
    log = parse_nccl_log(
        ["a:1:2 [0] shm.cc:90 NCCL WARN Error while creating shared memory segment /dev/shm/nccl-x (size 9)"], "n.log"
    )

    report = judge_nccl(log)

    assert report.findings[0].cause == "/dev/shm is too small for NCCL"
    assert (report.findings[0].file, report.findings[0].line) == ("n.log", 1)


def test_one_host_that_nccl_takes_for_two_is_a_finding() -> None:
    logs = ring(0, 1)
    logs.append(process(100, "comm 0x1 rank 0 nRanks 2 nNodes 2 localRanks 1 localRank 0 MNNVL 0"))

    assert [finding.cause for finding in judge(logs, "tp2").findings] == ["NCCL sees 2 nodes, layout tp2 has 1"]
    assert judge(logs, "tp2@2").findings == ()


def nvls(ranks: int) -> list[NcclLog]:
    return [
        process(
            100 + rank,
            f"ncclCommInitRank comm 0x7 rank {rank} nranks {ranks} cudaDev 0 nvmlDev {rank} commId 0x9 - Init START",
            f"comm 0x7 rank {rank} nRanks {ranks} nNodes 1 localRanks {ranks} localRank {rank} MNNVL 0",
            f"NVLS comm 0x7 headRank {rank} nHeads {ranks} nvlsRanks {ranks} buffSize 1",
        )
        for rank in range(ranks)
    ]


def test_nvls_alone_is_evidence_for_the_layout_of_its_size() -> None:
    report = judge(nvls(4), "tp4")

    assert (report.verdict, report.transports, report.edges) == ("ok", {"NVLS": 4}, {})
    assert judge(nvls(4)).verdict == "ok"
    assert judge(nvls(4), "tp8").verdict == "no-evidence"
    assert judge(nvls(4), "tp4pp2").verdict == "no-evidence"
    assert forbidden(report, parse_allowed("shm"))[0].transport == "NVLS"


def test_nvls_beside_channels_adds_no_channel_line() -> None:
    assert judge(nvls(2) + ring(0, 1)).transports == {"P2P/CUMEM": 2}


# -- what is allowed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "families"),
    [
        ("p2p", {TransportFamily.P2P}),
        ("P2P, nvls,Shm", {TransportFamily.P2P, TransportFamily.NVLS, TransportFamily.SHM}),
        ("net", {TransportFamily.NET}),
        ("socket", {TransportFamily.SOCKET}),
        ("NET/Socket,cpu/gloo", {TransportFamily.SOCKET, TransportFamily.CPU_GLOO}),
        ("", set(TransportFamily) - {TransportFamily.SOCKET, TransportFamily.CPU_GLOO}),
    ],
)
def test_allowed(text: str, families: set[TransportFamily]) -> None:
    assert parse_allowed(text).families == families


@pytest.mark.parametrize(
    ("text", "column", "found"),
    [("nvlink", 1, "'nvlink'"), ("p2p, tcp", 6, "'tcp'"), ("p2p,", 5, "nothing"), ("shm,,p2p", 5, "nothing")],
)
def test_word_that_is_no_family(text: str, column: int, found: str) -> None:
    with pytest.raises(LayoutSyntaxError) as caught:
        parse_allowed(text)

    assert caught.value.column == column
    assert caught.value.reason.startswith(
        "transport: expected one of collnet, cpu/gloo, cpu/shm, net, net/socket, nvls"
    )
    assert caught.value.reason.endswith(f"found {found}")


def test_forbidden_names_ranks_transport_file_and_line() -> None:
    report = judge([process(100, channel(0, 1)), process(101, channel(1, 0, "NET/Socket/0", "[send] "))], "tp2")

    (violation,) = forbidden(report, AllowedTransports())

    assert str(violation) == (
        "ranks 1 -> 0: transport NET/Socket/0, allowed: all but NET/Socket and CPU/GLOO\n"
        "  in nccl.gpu-a1.101, line 1\n"
        "  if this is wanted, allow it: --gpu-transport=collnet,cpu/shm,net,net/socket,nvls,other,p2p,shm"
    )
    assert forbidden(report, parse_allowed("p2p,socket")) == ()


def test_forbidden_reads_collnet_and_unknown_transports_too() -> None:
    report = judge_nccl(process(100, "CollNet 00/0 : 3 [send] via COLLNET/SHARP/0", channel(0, 1, "NEW/thing")))

    found = forbidden(report, parse_allowed("p2p"))

    assert [str(violation).splitlines()[0] for violation in found] == [
        "ranks 0 -> 1: transport NEW/thing, allowed: P2P",
        "rank 3: transport COLLNET/SHARP/0, allowed: P2P",
    ]
    assert forbidden(report, AllowedTransports()) == ()


# -- vLLM's CPU backend ----------------------------------------------------------------------------------------------

NOTHING_SAID = VllmLogFacts()
FALLBACK = parse_vllm_log(
    [
        "(Worker pid=42) INFO 11-21 04:07:12 [cpu_communicator.py:47] CPU SHM communicator disabled for group tp:0: "
        "ranks do not share the same SHM group name, falling back to torch.distributed."
    ],
    "server.log",
)


def segments(ranks: str, members: Iterable[int], group: str = "tp:0", ident: str = "vllm_dist_39fc-0e") -> list[str]:
    return [f"/dev/shm/{ident}-{group}-[{ranks}]-cpushm_{member}" for member in members]


BOTH = segments("0-1", (0, 1))


def test_cpu_group_that_shares_memory() -> None:
    report = judge_cpu(parse_layout("tp2"), NOTHING_SAID, {0: ["/dev/shm/psm_1", *BOTH], 1: BOTH})

    assert (report.verdict, report.transports, report.summary()) == ("ok", {"CPU/SHM": 2}, "CPU/SHM x2")
    assert list(report.edges) == [(0, 1), (1, 0)]
    assert forbidden(report, AllowedTransports()) == ()


@pytest.mark.parametrize(
    ("layout", "mapped"),
    [
        ("tp2pp2", {
            0: BOTH + segments("0-2", (0, 1), "pp:0"), 1: BOTH + segments("1-3", (0, 1), "pp:0"),
            2: segments("2-3", (0, 1)) + segments("0-2", (0, 1), "pp:0"),
            3: segments("2-3", (0, 1)) + segments("1-3", (0, 1), "pp:0"),
        }),
        ("dp2tp2", {
            0: BOTH, 1: BOTH, 2: segments("0-1", (0, 1), ident="29512"), 3: segments("0-1", (0, 1), ident="29512"),
        }),
        ("tp2", {0: [path + " (deleted)" for path in BOTH], 1: [path.removeprefix("/dev/shm/") for path in BOTH]}),
    ],
)  # fmt: skip
def test_cpu_layout_is_proved_group_by_group(layout: str, mapped: dict[int, list[str]]) -> None:
    report = judge_cpu(parse_layout(layout), NOTHING_SAID, mapped)

    assert (report.verdict, report.findings) == ("ok", ())


@pytest.mark.parametrize(
    "mapped",
    [
        pytest.param({}, id="nothing known"),
        pytest.param({0: BOTH}, id="one rank"),
        pytest.param({0: BOTH, 1: BOTH[:1]}, id="a member's segment is missing"),
        pytest.param({0: BOTH, 1: segments("0-1", (0, 1), ident="other")}, id="another communicator"),
        pytest.param({0: BOTH, 1: segments("0-1", (0, 1), "pp:0")}, id="another group"),
        pytest.param({rank: segments("0-1-2-3", range(4)) for rank in (0, 1)}, id="another size"),
        pytest.param({0: ["/dev/shm/psm_1"], 1: ["/dev/shm/psm_1"]}, id="other segments"),
    ],
)
def test_cpu_layout_is_not_proved(mapped: dict[int, list[str]]) -> None:
    report = judge_cpu(parse_layout("tp2"), NOTHING_SAID, mapped)

    assert (report.verdict, report.summary()) == ("no-evidence", "no evidence")
    assert report.findings[0].cause.startswith("group tp of ranks 0,1: every rank must map the shared-memory segment")


@pytest.mark.parametrize("mapped", [{}, {0: BOTH, 1: BOTH}])
def test_cpu_group_that_fell_back_to_gloo(mapped: dict[int, list[str]]) -> None:
    report = judge_cpu(parse_layout("tp2"), FALLBACK, mapped)

    assert (report.verdict, report.transports) == ("socket", {"CPU/GLOO": 2})
    assert (report.findings[0].file, report.findings[0].line) == ("server.log", 1)
    assert [violation.family for violation in forbidden(report, AllowedTransports())] == [
        TransportFamily.CPU_GLOO
    ] * 2
    assert forbidden(report, parse_allowed("cpu/gloo")) == ()


def test_cpu_replica_that_fell_back_does_not_hide_behind_one_that_did_not() -> None:
    report = judge_cpu(parse_layout("tp2x2"), FALLBACK, {0: BOTH, 1: BOTH, 2: [], 3: []})

    assert report.verdict == "socket"
    assert [(use.src, use.dst) for use in report.uses if use.transport == "CPU/GLOO"] == [(2, 3), (3, 2)]


@pytest.mark.parametrize(
    ("layout", "verdict", "cause"),
    [
        ("tp1", "ok", "layout tp1 has one rank: no transport is needed"),
        ("dp2", "ok", "layout dp2 has no ranks that talk to each other: no transport is needed"),
        ("dp2ep", "no-evidence", "vLLM's CPU backend shares memory in tp and pp groups only; ranks 0 and 1"),
    ],
)
def test_cpu_layouts_without_a_shared_memory_group(layout: str, verdict: TransportVerdict, cause: str) -> None:
    report = judge_cpu(parse_layout(layout), NOTHING_SAID, {})

    assert report.verdict == verdict
    assert report.findings[0].cause.startswith(cause)


# Worker.init of CpuCommunicator (vllm/distributed/device_communicators/cpu_communicator.py, 0.32), in its ep group.
ALL2ALL = parse_vllm_log(
    ["(Worker pid=42) INFO 11-21 04:07:12 [cpu_communicator.py:69] Using allgather_reducescatter all2all manager."],
    "server.log",
)
DP2TP2 = {rank: segments("0-1" if rank < 2 else "2-3", (0, 1), ident="e1" if rank < 2 else "e2") for rank in range(4)}


@pytest.mark.parametrize(
    ("layout", "moe", "mapped", "transports"),
    [
        ("dp2", True, {}, {"CPU/GLOO": 2}),
        ("dp2ep", True, {}, {"CPU/GLOO": 2}),
        ("dp2tp2", True, DP2TP2, {"CPU/GLOO": 4, "CPU/SHM": 4}),
        ("dp2tp2ep", True, DP2TP2, {"CPU/GLOO": 12, "CPU/SHM": 4}),
        ("dp2tp2", False, DP2TP2, {"CPU/SHM": 4}),
    ],
)
def test_cpu_engines_of_a_model_with_experts_talk_over_gloo(
    layout: str, moe: bool, mapped: dict[int, list[str]], transports: dict[str, int]
) -> None:
    report = judge_cpu(parse_layout(layout), ALL2ALL, mapped, moe=moe)

    assert (report.transports, report.gap) == (transports, None)
    assert report.verdict == ("socket" if "CPU/GLOO" in transports else "ok")
    if "CPU/GLOO" in transports:
        assert forbidden(report, AllowedTransports())
        assert forbidden(report, parse_allowed("cpu/gloo,cpu/shm")) == ()
        assert (report.findings[0].file, report.findings[0].line) == ("server.log", 1)
        assert "sends the tokens of experts over gloo's sockets" in report.findings[0].cause


def test_cpu_engines_without_the_line_that_shows_their_group_are_not_proved() -> None:
    report = judge_cpu(parse_layout("dp2tp2"), NOTHING_SAID, DP2TP2, moe=True)

    assert (report.verdict, report.gap) == (
        "no-evidence",
        "ranks 0 and 2: no memory or socket was seen that they share",
    )


def test_cpu_socket_that_is_allowed_hides_no_group_without_proof() -> None:
    for layout in ("dp2tp2", "dp2tp2ep"):  # there the ep group has all pairs, and shows nothing of the tp group
        report = judge_cpu(parse_layout(layout), ALL2ALL, {0: DP2TP2[0], 1: DP2TP2[1]}, moe=True)

        assert report.verdict == "socket"
        assert report.gap == "group tp of ranks 2,3: no memory or socket was seen that they share"
        assert not transport_record(layout, report, forbidden(report, parse_allowed("cpu/gloo,cpu/shm")))["ok"]


# -- native factors on GPUs ------------------------------------------------------------------------------------------


def communicator(*ranks: int, number: int = 0, transport: str = "P2P/CUMEM") -> list[NcclLog]:
    """One communicator as PyNcclCommunicator makes it: every rank's init lines, then a ring of its own ranks."""
    n, logs = len(ranks), []
    for me, rank in enumerate(ranks):
        comm = f"comm 0x55{number:02x}{rank:02x} rank {me}"
        call = (
            f"ncclCommInitRank {comm} nranks {n} cudaDev {rank} nvmlDev {rank} busId {rank + 1}000 commId 0x{number}a"
        )
        logs.append(
            process(
                100 + rank,
                f"{call} - Init START",
                f"{call} - Init COMPLETE",
                channel(me, (me + 1) % n, transport),
            )
        )
    return logs


def all_of(*groups: tuple[int, ...]) -> list[NcclLog]:
    return [log for number, ranks in enumerate(groups) for log in communicator(*ranks, number=number)]


NATIVE: dict[str, list[tuple[int, ...]]] = {
    # groups in the order of initialize_model_parallel (vllm/distributed/parallel_state.py, 0.32)
    "pp2": [(0, 1)],
    "tp4dcp2": [(0, 1, 2, 3), (0, 1), (2, 3)],
    "tp2dcp2": [(0, 1), (0, 1)],
    "tp2pcp2": [(0, 1), (2, 3), (0, 2), (1, 3)],
    "tp2pcp2dcp4": [(0, 1), (2, 3), (0, 2, 1, 3), (0, 2), (1, 3)],
    "dp2 moe": [(0, 1), (0, 1)],
    "dp2tp2 moe": [(0, 1), (2, 3), (0, 2), (1, 3), (0, 1, 2, 3)],
    "dp2tp2ep moe": [(0, 1), (2, 3), (0, 2), (1, 3), (0, 1, 2, 3)],
    "dp2tp2": [(0, 1), (2, 3)],
}


def judge_native(name: str, groups: list[tuple[int, ...]]) -> TransportReport:
    text, _, word = name.partition(" ")
    layout = parse_layout(text)
    pids = {rank: 100 + rank for rank in range(layout.ranks)}
    return judge_nccl(merge(all_of(*groups)), layout, ServerContext(rank_pids=pids, moe=word == "moe"))


@pytest.mark.parametrize("name", NATIVE)
def test_native_layout_is_proved_by_its_communicators(name: str) -> None:
    report = judge_native(name, NATIVE[name])

    assert (report.verdict, report.gap) == ("ok", None)


@pytest.mark.parametrize(
    ("name", "missing", "names"),
    [
        ("tp4dcp2", (2, 3), "2,3 (dcp)"),
        ("tp2pcp2", (1, 3), "1,3 (pcp)"),
        ("tp2pcp2dcp4", (0, 2, 1, 3), "0,1,2,3 (dcp)"),
        ("dp2tp2 moe", (0, 2), "0,2 (dp)"),
        ("dp2tp2ep moe", (0, 1, 2, 3), "0,1,2,3 (ep)"),
        ("dp2tp2", (2, 3), "2,3 (tp)"),
    ],
)
def test_native_layout_without_one_of_its_communicators(name: str, missing: tuple[int, ...], names: str) -> None:
    report = judge_native(name, [group for group in NATIVE[name] if group != missing])

    assert report.verdict == "no-evidence"
    assert report.gap == f"layout {name.split()[0]} connects ranks {names}, no channels connect all of them"


def test_dense_engines_need_no_channels_between_them() -> None:
    report = judge_native("dp2", [])

    assert (report.verdict, report.summary()) == ("ok", "none needed")
    assert judge_native("dp2 moe", []).verdict == "no-evidence"


def test_socket_that_is_allowed_hides_no_group_without_proof() -> None:
    logs = [*communicator(0, 1, transport="NET/Socket/0"), *communicator(2, 3, number=1)[:1]]
    pids = {rank: 100 + rank for rank in range(4)}

    report = judge_nccl(merge(logs), parse_layout("dp2tp2"), ServerContext(rank_pids=pids))

    assert report.verdict == "socket"
    assert report.gap == "layout dp2tp2 connects ranks 2,3 (tp), no channels connect all of them"
    assert report.summary().endswith(" (incomplete)")
    assert not transport_record("dp2tp2", report, ())["ok"]
