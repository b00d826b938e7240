"""What belongs to which replica, and when their shares of a load are uneven."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from pytest_gpulayout.causes_case import Finding
from pytest_gpulayout.nccl_log import LogLine
from pytest_gpulayout.replicas import (
    ReplicaShare,
    join_ranks,
    join_reports,
    replica_shares,
    shares_text,
    split_ranks,
    split_spec,
    uneven_shares,
)
from pytest_gpulayout.server_window import EngineDelta, ServerWindow
from pytest_gpulayout.transport import AllowedTransports, TransportReport, TransportUse, forbidden
from tests.support.processes import server_spec

URLS = ("http://127.0.0.1:4001", "http://127.0.0.1:4002")
LINE = LogLine("nccl.log", 3, "Channel 00/0 : 0[0] -> 1[1] via NET/Socket/0")


# -- what a replica is -----------------------------------------------------------------------------------------------


def test_each_replica_has_the_layout_without_replicas_and_its_own_devices() -> None:
    first, second = split_spec(server_spec("tp2x2", arguments=("--max-model-len", "64")))
    assert (str(first.layout), [device.index for device in first.devices]) == ("tp2", [0, 1])
    assert (str(second.layout), [device.index for device in second.devices]) == ("tp2", [2, 3])
    assert first.arguments == second.arguments == ("--max-model-len", "64")


@pytest.mark.parametrize(("layout", "sizes"), [("tp1x3", [1, 1, 1]), ("dp2tp2x2", [4, 4]), ("tp2", [2])])
def test_no_device_is_of_two_replicas(layout: str, sizes: list[int]) -> None:
    spec = server_spec(layout)
    parts = split_spec(spec)
    assert [len(part.devices) for part in parts] == sizes
    assert tuple(device for part in parts for device in part.devices) == spec.devices


def test_ranks_of_the_whole_come_replica_after_replica() -> None:
    assert split_ranks([5, 3, 0, 2], 2) == [(5, 3), (0, 2)]
    assert join_ranks([{0: "a", 1: "b"}, {1: "d", 0: "c"}], 2) == {0: "a", 1: "b", 2: "c", 3: "d"}


def test_rank_that_is_missing_in_a_replica_is_missing_in_the_whole() -> None:
    assert join_ranks([{0: "a"}, {1: "d"}], 2) == {0: "a", 3: "d"}


# -- what is proved of all -------------------------------------------------------------------------------------------


def report(verdict: Any, *transports: str, **more: Any) -> TransportReport:
    """Ranks 0 and 1 use these."""
    uses = tuple(TransportUse(0, 1, name, 2, LINE) for name in transports)
    return TransportReport(verdict, uses, **more)


@pytest.mark.parametrize(
    ("verdicts", "joined"),
    [
        (("ok", "ok"), "ok"),
        (("ok", "shm"), "shm"),
        (("shm", "socket"), "socket"),
        (("ok", "no-evidence"), "no-evidence"),
        (("no-evidence", "socket"), "no-evidence"),
    ],
)
def test_of_all_no_more_is_proved_than_of_the_worst(verdicts: tuple[str, str], joined: str) -> None:
    assert join_reports([report(verdict) for verdict in verdicts], 2).verdict == joined
    assert join_reports([report(verdict) for verdict in reversed(verdicts)], 2).verdict == joined


def test_uses_are_told_in_the_ranks_of_the_whole() -> None:
    nvls = TransportReport("ok", (TransportUse(None, None, "NVLS", 2, LINE),), network="IB", nccl_version="2.27.5")
    joined = join_reports([nvls, report("ok", "P2P/CUMEM")], 2)
    assert [(use.src, use.dst, use.transport) for use in joined.uses] == [
        (None, None, "NVLS"),
        (2, 3, "P2P/CUMEM"),
    ]
    assert (joined.network, joined.nccl_version) == ("IB", "2.27.5")


def test_transport_of_one_replica_is_forbidden_by_its_rank_in_the_whole() -> None:
    joined = join_reports([report("ok", "P2P/CUMEM"), report("socket", "NET/Socket/0")], 2)
    (violation,) = forbidden(joined, AllowedTransports())
    assert str(violation).startswith("ranks 2 -> 3: transport NET/Socket/0, allowed: ")


def test_findings_and_gaps_name_the_replica() -> None:
    finding = Finding("group tp of ranks 0,1 fell back to gloo", "server.log", 7, "disabled", "start them together")
    joined = join_reports([report("ok"), report("socket", findings=(finding,), gap="rank 1 is not connected")], 2)
    assert [found.cause for found in joined.findings] == ["replica 1: group tp of ranks 0,1 fell back to gloo"]
    assert joined.gap == "replica 1: rank 1 is not connected"
    assert join_reports([report("ok"), report("ok")], 2).gap is None


# -- shares ----------------------------------------------------------------------------------------------------------


def window(*requests: Sequence[int], urls: Sequence[str] = URLS) -> ServerWindow:
    """Two replicas or more. :param requests: that each engine of each replica finished."""
    engines = [
        EngineDelta(replica=url, engine=str(number), finished={"length": count, "stop": 0})
        for url, own in zip(urls, requests, strict=True)
        for number, count in enumerate(own)
    ]
    return ServerWindow(engines=tuple(engines), replicas=tuple(urls))


def complaints(*requests: int, batches: int = 1) -> list[str]:
    urls = [f"http://127.0.0.1:{4001 + number}" for number in range(len(requests))]
    return list(uneven_shares(window(*([count] for count in requests), urls=urls), batches))


def test_engines_of_a_replica_count_together() -> None:
    assert replica_shares(window([10, 20], [15, 15])) == (
        ReplicaShare(0, URLS[0], 30, 0.5),
        ReplicaShare(1, URLS[1], 30, 0.5),
    )


def test_whatever_ended_a_request_it_counts() -> None:
    engines = (
        EngineDelta(replica=URLS[0], engine="0", finished={"stop": 3, "abort": 1}),
        EngineDelta(replica=URLS[1], engine="0"),
    )
    found = replica_shares(ServerWindow(engines=engines, replicas=URLS))
    assert [(share.requests, share.share) for share in found] == [(4, 1.0), (0, 0.0)]


def test_nothing_finished_has_no_share() -> None:
    assert [share.share for share in replica_shares(window([0], [0]))] == [None, None]


def test_server_without_replicas_has_no_shares() -> None:
    engines = (EngineDelta(replica=URLS[0], engine="0", finished={"stop": 30}),)
    assert replica_shares(ServerWindow(engines=engines)) == ()
    assert list(uneven_shares(ServerWindow(engines=engines), 1)) == []
    assert list(uneven_shares(ServerWindow(), 1)) == []


def test_shares_in_a_line() -> None:
    assert shares_text([12, 11]) == "replicas finished 12 + 11 of 23 requests (52%, 48%)"
    assert shares_text([0, 0]) == "replicas finished 0 + 0 of 0 requests (none)"


@pytest.mark.parametrize(
    ("requests", "batches"),
    [
        ((150, 150), 1),
        ((112, 188), 1),  # 38 of 150 off: a quarter, and one for the batch
        ((4, 5), 1),  # an odd number
        ((9, 15), 3),  # one more in each of three batches, and no more than a quarter beside them
        ((75, 75, 75, 75), 1),
        ((1, 2), 3),  # too few to tell
        ((0, 3), 1),
        ((2, 0), 5),
    ],
)
def test_shares_that_are_even(requests: tuple[int, ...], batches: int) -> None:
    assert complaints(*requests, batches=batches) == []


@pytest.mark.parametrize(
    ("requests", "batches", "named"),
    [
        ((111, 189), 1, [0, 1]),
        ((5, 19), 3, [0, 1]),
        ((0, 4), 1, [0, 1]),
        ((0, 4), 5, [0]),  # with five batches little can be told, but none is none
        ((100, 100, 100, 60), 1, [3]),
        ((0, 34, 33, 33), 1, [0, 1, 2, 3]),
    ],
)
def test_shares_that_are_uneven(requests: tuple[int, ...], batches: int, named: list[int]) -> None:
    texts = complaints(*requests, batches=batches)
    assert [int(text.split()[1]) for text in texts] == named


def test_an_uneven_share_is_told_with_numbers() -> None:
    slow, fast = complaints(90, 210)
    assert slow == (
        "replica 0 (http://127.0.0.1:4001) finished 90 of 300 requests (30%), where 150 +- 38 were its part: the "
        "proxy gives a request to the replica that has the fewest, so it was slower than the others, or not always "
        "there; compare their logs and devices"
    )
    assert "finished 210 of 300 requests (70%)" in fast
    assert "it was faster than the others" in fast


def test_counters_that_could_not_be_read_are_no_even_shares() -> None:
    unread = ServerWindow(replicas=URLS, notes=("the server must answer GET /metrics; found: refused",))
    assert list(uneven_shares(unread, 1)) == [
        "how many requests each of the 2 replicas answered is not known: the server must answer GET /metrics; found: "
        "refused"
    ]
    assert replica_shares(unread) == ()
