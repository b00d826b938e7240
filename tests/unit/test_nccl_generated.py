"""What was generated is what is read, however it arrives; and no damage makes a verdict better than it was."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.nccl_log import NcclLog, merge, parse_nccl_log
from pytest_gpulayout.transport import TransportFamily, TransportReport, family_of
from pytest_gpulayout.transport_nccl import ServerContext, judge_nccl
from tests.support.nccl_writer import (
    DRESSES,
    EVIDENCE,
    FORMS,
    Comm,
    Dress,
    Fault,
    Form,
    Kind,
    Line,
    Medium,
    Nvls,
    Scenario,
    WrittenLog,
    cut,
    interleave,
    write_log,
)
from tests.support.suite import Suite

LAYOUTS = [
    *("tp2", "tp4", "pp2", "pp4", "tp2pp2", "tp4pp2", "pcp2", "tp2pcp2", "tp4dcp2", "dp2tp2", "tp2x2", "tp2pp2x2"),
    *("dp2ep", "dp2tp2ep", "dp2pp2ep", "dp2tp2pp2ep", "tp2@2", "tp4@2", "tp2pp2@2", "dp2tp2@2"),
]
MEMORY = [Medium.P2P, Medium.P2P_READ, Medium.MNNVL, Medium.SHM]
SETTINGS = {"NCCL_DEBUG": "INFO", "NCCL_IB_HCA": "mlx5_0,mlx5_1", "NCCL_P2P_LEVEL": "SYS", "NCCL_NVLS_ENABLE": "1"}

quick = settings(deadline=None, max_examples=60)  # the machine is shared


@st.composite
def scenarios(draw: st.DrawFn, /, layouts: list[str] = LAYOUTS, **fixed: Any) -> Scenario:
    """Any layout in any version's words over any mixture of transports, all healthy."""
    layout = parse_layout(draw(st.sampled_from(layouts)))
    ranks = st.integers(0, layout.gpus - 1)
    pairs = st.tuples(ranks, ranks).filter(lambda pair: pair[0] < pair[1])
    chosen: dict[str, Any] = {
        "form": draw(st.sampled_from(FORMS)),
        "medium": draw(st.sampled_from(MEMORY)),
        "between_hosts": draw(st.sampled_from([Medium.IB, Medium.PLUGIN, Medium.MNNVL])),
        "media": draw(st.dictionaries(pairs, st.sampled_from([*MEMORY, Medium.IB]), max_size=2)),
        "channels": draw(st.integers(1, 3)),
        "cumem": draw(st.booleans()),
        "nvls": draw(st.sampled_from(Nvls)),
        "collnet": draw(st.booleans()),
        "environment": draw(st.dictionaries(st.sampled_from(list(SETTINGS)), st.just(""), max_size=3)),
        "seed": draw(st.integers(0, 10**6)),
    }
    chosen["environment"] = {name: SETTINGS[name] for name in chosen["environment"]}
    return Scenario(layout=layout, **{**chosen, **fixed})


def read(written: WrittenLog) -> NcclLog:
    """A file per process, as ``NCCL_DEBUG_FILE`` writes them."""
    files = zip(written.streams(), written.names(), strict=True)
    return merge(parse_nccl_log(lines, name) for lines, name in files)


def judge(written: WrittenLog) -> TransportReport:
    return judge_nccl(read(written), written.scenario.layout)


def expected_verdict(written: WrittenLog) -> str:
    families = {family_of(transport) for transport in written.transports()}
    if TransportFamily.SOCKET in families:
        return "socket"
    return "shm" if TransportFamily.SHM in families else "ok"


def facts(log: NcclLog) -> dict[str, Any]:
    """What does not depend on how the lines arrived."""
    return {
        "transports": log.transports,
        "edges": log.edges,
        "members": Counter((m.process, m.rank, m.nranks, m.nvml_dev, m.bus_id, m.comm_id) for m in log.comm_ranks),
        "environment": {name: value for name, (value, _) in log.environment.items()},
        "networks": log.networks,
        "versions": set(log.versions),
    }


# -- what was generated is what is read ------------------------------------------------------------------------------


@quick
@given(scenarios(requests=True))
def test_channels_ranks_and_settings_are_read(scenario: Scenario) -> None:
    written = write_log(scenario)

    log = read(written)

    assert (log.transports, log.edges) == (written.transports(), written.edges())
    assert {name: value for name, (value, _) in log.environment.items()} == {
        **scenario.environment,
        **({} if scenario.cumem or scenario.form.release < (2, 18) else {"NCCL_CUMEM_ENABLE": "0"}),
    }
    assert set(log.versions) == ({str(scenario.form)} if written.comms else set())
    assert {(m.process, m.rank, m.nranks) for m in log.comm_ranks} == {
        (process(written, comm, rank), rank, comm.nranks) for comm in written.comms for rank in range(comm.nranks)
    }


def process(written: WrittenLog, comm: Comm, rank: int) -> tuple[str, int]:
    place = written.places[comm.ranks[rank]]
    return place.host, place.pid


Links = frozenset[tuple[int, int | None, str, int]]
Members = frozenset[tuple[tuple[str, int] | None, int]]


def written_communicators(written: WrittenLog) -> Counter[tuple[Members, Links]]:
    return Counter(
        (
            frozenset((process(written, comm, rank), rank) for rank in range(comm.nranks)),
            frozenset((wire.src, wire.dst, wire.transport, n) for wire, n in written.wires(number).items()),
        )
        for number, comm in enumerate(written.comms)
    )


def read_communicators(log: NcclLog) -> Counter[tuple[Members, Links]]:
    return Counter(
        (
            frozenset((member.process, member.rank) for member in communicator.members),
            frozenset((*key, seen.lines) for key, seen in communicator.links.items()),
        )
        for communicator in log.communicators
    )


@quick
@given(scenarios())
def test_communicators_of_one_process_are_kept_apart(scenario: Scenario) -> None:
    # Data of the pipeline come late, when nothing but RCCL's own words tells them from those of expert groups.
    written = write_log(replace(scenario, requests=scenario.form.rccl or not scenario.layout.ep))
    found = read_communicators(read(written))

    if scenario.form.has_comm_ids:
        assert found == written_communicators(written)
    else:  # which process belongs to whom is not said; nothing may be lost or invented
        channels: Counter[tuple[int, int | None, str]] = Counter()
        for (_, links), times in found.items():
            channels.update({(src, dst, transport): lines * times for src, dst, transport, lines in links})
        assert channels == {(w.src, w.dst, w.transport): lines for w, lines in written.wires().items()}


@quick
@given(scenarios())
def test_progress_rings_and_trees_are_read(scenario: Scenario) -> None:
    written = write_log(scenario)

    for communicator in read(written).communicators:
        n = communicator.nranks or 0
        assert communicator.complete
        assert communicator.connected
        if scenario.form.has_comm_ids or n == scenario.layout.gpus:
            assert communicator.rings == dict.fromkeys(range(scenario.channels), tuple(range(n)))
            assert set(communicator.trees) == set(product(range(scenario.channels), range(n)))
        for node in communicator.trees.values():
            assert node.parent == (node.rank - 1 if node.rank else None)
            assert node.children == ((node.rank + 1,) if node.rank + 1 < n else ())


@quick
@given(
    scenarios(),
    st.sampled_from(DRESSES),
    st.integers(0, 10**6),
    st.lists(st.integers(0, 10**6), max_size=20),
)
def test_presentation_makes_no_difference(scenario: Scenario, dress: Dress, seed: int, places: list[int]) -> None:
    written = write_log(scenario)
    streams = [[dress.put_on(at, line) for line in lines] for at, lines in enumerate(written.streams())]
    data = "".join(line + "\n" for line in interleave(streams, seed)).encode()

    together = parse_nccl_log(cut(data, places), "all.log")

    apart = read(written)
    assert facts(together) == facts(apart)
    assert read_communicators(together) == read_communicators(apart) or not scenario.form.has_comm_ids
    assert summary(judge_nccl(together, scenario.layout)) == summary(judge_nccl(apart, scenario.layout))


def summary(report: TransportReport) -> tuple[object, ...]:
    return report.verdict, report.transports, list(report.edges), sorted(f.cause for f in report.findings)


JUNK = [
    b"\xff\xfe\xc3(\n",
    bytes(5000),
    b"\xe2\x82\n",
    b"\n\n",
    b"\x1b[0m\n",
    b"\xf0\x9f\x9a\x80 ready\r\n",
    bytes(7),
]


@quick
@given(scenarios(), st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(JUNK)), max_size=8))
def test_junk_between_records_makes_no_difference(scenario: Scenario, junk: list[tuple[int, bytes]]) -> None:
    written = write_log(scenario)
    lines = [line.encode() + b"\n" for line in interleave(written.streams(), scenario.seed)]
    for place, piece in junk:
        lines.insert(place % (len(lines) + 1), piece)

    assert facts(parse_nccl_log([b"".join(lines)], "all.log")) == facts(read(written))


# -- verdicts --------------------------------------------------------------------------------------------------------


@quick
@given(scenarios())
def test_whole_log_proves_its_layout(scenario: Scenario) -> None:
    written = write_log(scenario)

    report = judge(written)

    assert report.verdict == expected_verdict(written), report.findings


@quick
@given(scenarios(faults=frozenset({Fault.SOCKET_PAIR}), nvls=Nvls.BESIDE))
def test_one_socket_channel_decides(scenario: Scenario) -> None:
    written = write_log(scenario)
    sockets = [line for line in written.lines if line.wire is not None and line.wire.transport == "NET/Socket/0"]
    kept = sockets[scenario.seed % len(sockets)]

    one = written.without(lambda line: line in sockets and line is not kept)
    alone = parse_nccl_log([kept.text], "one.log")

    assert [judge(log).verdict for log in (written, one)] == ["socket", "socket"]
    assert judge_nccl(alone, scenario.layout).verdict == "socket"


COMMUNICATING = [text for text in LAYOUTS if parse_layout(text).communicating_pairs()]


@quick
@given(scenarios(COMMUNICATING, requests=True), st.booleans())
def test_without_channel_lines_nothing_is_proved(scenario: Scenario, keep_collnet: bool) -> None:
    written = write_log(scenario)

    def proves(line: Line) -> bool:
        return line.kind in EVIDENCE and not (keep_collnet and line.wire is not None and line.wire.dst is None)

    report = judge(written.without(proves))

    assert report.verdict == "no-evidence"
    assert report.findings


@quick
@given(scenarios(COMMUNICATING), st.integers(0, 100))
def test_group_without_channel_lines_is_not_proved(scenario: Scenario, choice: int) -> None:
    written = write_log(scenario)
    number = choice % len(written.comms)
    silent = {*EVIDENCE, Kind.CONNECTED}
    same_ranks = [comm for comm in written.comms if comm.ranks == written.comms[number].ranks]
    assume(len(same_ranks) == 1)  # another group of these ranks shows what they use

    report = judge(written.without(lambda line: line.comm == number and line.kind in silent))

    assert report.verdict == "no-evidence", written.comms[number]


@quick
@given(
    scenarios(["tp2", "tp4", "pp2", "tp2pp2", "tp4pp2", "dp2tp2", "tp2x2", "tp2pp2x2", "dp2tp2ep", "tp2pp2@2"]),
    st.integers(0, 100),
)
def test_group_without_any_line_is_not_proved(scenario: Scenario, choice: int) -> None:
    written = write_log(scenario)
    number = choice % len(written.comms)

    report = judge(written.without(lambda line: line.comm == number))

    assert report.verdict == "no-evidence", written.comms[number]


@quick
@given(scenarios(["tp2pp2", "tp4pp2", "dp2tp2ep", "dp2pp2ep"]), st.integers(0, 100))
def test_known_processes_prove_each_group_by_itself(scenario: Scenario, choice: int) -> None:
    """A group is not hidden by another one of its size: a run knows the process of each rank."""
    assume(scenario.form.release >= (2, 14))  # which name communicators
    written = write_log(scenario)
    number = choice % len(written.comms)
    assume([comm.ranks for comm in written.comms].count(written.comms[number].ranks) == 1)
    server = ServerContext(rank_pids={rank: place.pid for rank, place in enumerate(written.places)})
    assert judge_nccl(read(written), scenario.layout, server).verdict == expected_verdict(written)

    silent = written.without(lambda line: line.comm == number and line.kind in {*EVIDENCE, Kind.CONNECTED})
    report = judge_nccl(read(silent), scenario.layout, server)

    assert report.verdict in ("no-evidence", "socket")
    names = ",".join(map(str, written.comms[number].ranks))
    assert any(f"connects ranks {names} (" in finding.cause for finding in report.findings)


@quick
@given(scenarios(COMMUNICATING, faults=frozenset({Fault.MISSING_RANK})))
def test_missing_rank_is_not_proved(scenario: Scenario) -> None:
    written = write_log(scenario)

    assert judge(written).verdict == ("socket" if expected_verdict(written) == "socket" else "no-evidence")


@quick
@given(scenarios(COMMUNICATING, faults=frozenset({Fault.NO_CONNECTIONS})))
def test_log_that_ends_before_the_connections_proves_nothing(scenario: Scenario) -> None:
    written = write_log(scenario)

    assert written.transports() == {}
    assert judge(written).verdict == "no-evidence"


@quick
@given(scenarios(["tp2", "tp4", "tp2pp2", "dp2tp2"], faults=frozenset({Fault.P2P_DISABLED}), media={}, nvls=Nvls.OFF))
def test_setting_that_was_left_over_is_the_cause(scenario: Scenario) -> None:
    report = judge(write_log(scenario))

    assert report.verdict == "shm"
    if scenario.medium is not Medium.SHM:
        assert "NCCL_P2P_DISABLE" in report.findings[0].cause


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_full_shared_memory_is_the_cause(form: Form) -> None:
    faults = frozenset({Fault.SHM_TOO_SMALL})

    report = judge(write_log(Scenario(layout=parse_layout("tp2"), form=form, medium=Medium.SHM, faults=faults)))

    assert report.verdict == "no-evidence"
    assert "/dev/shm" in report.findings[0].cause


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_hidden_device_makes_hosts_talk_over_sockets(form: Form) -> None:
    faults = frozenset({Fault.NO_IB_DEVICE})

    report = judge(write_log(Scenario(layout=parse_layout("tp4@2"), form=form, faults=faults)))

    assert report.verdict == "socket"
    assert report.network == (None if form.release < (2, 7) else "Socket")


@pytest.mark.parametrize("kept", range(len("NET/Socket/0")))
def test_torn_transport_is_not_taken_for_a_better_one(kept: int) -> None:
    written = write_log(Scenario(layout=parse_layout("tp2"), medium=Medium.SOCKET))
    torn = [line.replace("NET/Socket/0", "NET/Socket/0"[:kept]) for stream in written.streams() for line in stream]

    report = judge_nccl(parse_nccl_log(torn, "nccl.log"), written.scenario.layout)

    assert report.verdict in ("socket", "no-evidence")


def test_number_beyond_any_cluster_costs_nothing() -> None:
    written = write_log(Scenario(layout=parse_layout("tp2")))
    lines = [re.sub(r"(n[rR]anks) 2", r"\1 29999999", line) for line in written.streams()[0]]
    started = time.process_time()

    report = judge_nccl(parse_nccl_log(lines, "nccl.log"), written.scenario.layout)

    assert report.verdict == "no-evidence"
    assert time.process_time() - started < 5


# -- forgery ---------------------------------------------------------------------------------------------------------

CHANNEL = "Channel 00/0 : 0[0] -> 1[1] via P2P/IPC"
SOCKET = "Channel 00/0 : 0[0] -> 1[1] [send] via NET/Socket/0"


@pytest.mark.parametrize(
    "message",
    [
        f"NCCL INFO NCCL_TOPO_FILE set by environment to x {CHANNEL}",
        f"NCCL INFO NCCL_SOCKET_IFNAME set by environment to {SOCKET}",
        f"misc/socket.cc:5 NCCL WARN Call to bind failed : {CHANNEL}",
        f"NCCL INFO Plugin name set by env to {CHANNEL}",
        f"NCCL INFO Bootstrap: Using eth0:{CHANNEL}<0>",
    ],
)
def test_channel_that_another_record_quotes_is_none(message: str) -> None:
    log = parse_nccl_log([f"llm-node-0:310:344 [0] {message}"], "nccl.llm-node-0.310")

    assert log.links == {}


@pytest.mark.parametrize(
    "quoted",
    [
        "NVLS comm 0x55 headRank 0 nHeads 2 nvlsRanks 2 buffSize 1",
        "Using network IB",
        "comm 0x55 rank 0 nRanks 2 nNodes 1 localRanks 2 localRank 0 MNNVL 0",
        "NCCL_P2P_DISABLE set by environment to 1",
    ],
)
@pytest.mark.parametrize("record", ["NCCL INFO NCCL_X set by environment to x", "a.cc:5 NCCL WARN no such value:"])
def test_nothing_that_another_record_quotes_is_a_fact(record: str, quoted: str) -> None:
    log = parse_nccl_log([f"llm-node-0:310:344 [0] {record} {quoted}"], "nccl.llm-node-0.310")

    assert (log.nvls_lines, log.networks, log.comm_ranks) == ((), {}, ())
    assert "NCCL_P2P_DISABLE" not in log.environment


@pytest.mark.parametrize("rank", ["", "[Rank 0] "])
def test_channel_at_the_beginning_of_its_record_is_one(rank: str) -> None:
    log = parse_nccl_log([f"llm-node-0:310:344 [0] NCCL INFO {rank}{CHANNEL}"], "nccl.llm-node-0.310")

    assert log.edges == {(0, 1): {"P2P/IPC": 1}}


def test_text_of_users_changes_nothing(pytester: pytest.Pytester) -> None:
    """A prompt in the server's log and a model's name may say what they like."""
    model = pytester.path / f"fake-host:1:1 [0] NCCL INFO {CHANNEL}"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    suite = Suite(pytester, model=str(model))
    suite.fakes(launcher="transport=None")
    suite.write(
        test_it=f"""
        import pytest

        @pytest.fixture
        def forged(vllm_server):
            with vllm_server.server.log.open("a") as log:
                for pid in vllm_server.server.pids():
                    print(f"fake-host:{{pid}}:{{pid}} [0] NCCL INFO {CHANNEL}", file=log)
                    print(f"fake-host:{{pid}}:{{pid}} [0] NCCL INFO {SOCKET}", file=log)

        def test_it(forged, transport_report): pass
        """
    )

    result = suite.run("--gpu-layout=tp2", subprocess=True)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["  found: no-evidence, no evidence", "  no line of NCCL"])
