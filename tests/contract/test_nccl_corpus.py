"""Recorded NCCL logs with hand-made answers; the corpus is not part of this repository."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_gpulayout.nccl_log import NcclLog, parse_nccl_log
from pytest_gpulayout.transport import TransportFamily, family_of
from pytest_gpulayout.transport_nccl import judge_nccl

ROOT = Path(os.environ.get("GPULAYOUT_CORPUS") or Path(__file__).parents[3] / "shared" / "corpus") / "nccl"
CASES = sorted(path.parent for path in ROOT.glob("*/meta.json"))
NO_CORPUS = "no corpus: set GPULAYOUT_CORPUS to the folder that holds nccl/<case>/log.txt and meta.json"


@pytest.fixture(params=[pytest.param(case, id=case.name) for case in CASES] or [pytest.param(None, id="none")])
def case(request: pytest.FixtureRequest) -> Path:
    if request.param is None:
        pytest.skip(NO_CORPUS)
    assert isinstance(request.param, Path)
    return request.param


@pytest.fixture
def expected(case: Path) -> dict[str, Any]:
    answers: dict[str, Any] = json.loads((case / "meta.json").read_text(encoding="utf-8"))["expected"]
    return answers


@pytest.fixture
def log(case: Path) -> NcclLog:
    return parse_nccl_log(chunks(case, 65536), "log.txt")


def chunks(case: Path, size: int) -> Iterator[bytes]:
    data = (case / "log.txt").read_bytes()
    yield from (data[at : at + size] for at in range(0, len(data), size))


def test_channels(log: NcclLog, expected: dict[str, Any]) -> None:
    counts: Counter[str] = Counter(dict.fromkeys(expected["channels"], 0))
    for transport, lines in log.transports.items():
        family = family_of(transport)
        counts["NET" if family is TransportFamily.SOCKET else family.value] += lines

    assert counts == expected["channels"]


def test_edges(log: NcclLog, expected: dict[str, Any]) -> None:
    if "edges" not in expected:
        pytest.skip("the log has several communicators, whose rank numbers overlap")
    edges = {f"{src}->{dst}": sorted(transports) for (src, dst), transports in log.edges.items()}

    assert edges == {pair: sorted(transports) for pair, transports in expected["edges"].items()}


def test_report(log: NcclLog, expected: dict[str, Any]) -> None:
    report = judge_nccl(log)

    assert report.verdict == expected["verdict"]
    assert report.network == expected["net_backend"]
    assert bool(log.socket_lines) is expected["uses_socket"]
    if "cause" in expected:
        assert expected["cause"] in [finding.cause for finding in report.findings]
    if report.verdict != "ok":
        assert all(finding.advice for finding in report.findings)
        assert report.findings


def test_evidence_is_where_it_is_said_to_be(case: Path, log: NcclLog) -> None:
    lines = (case / "log.txt").read_bytes().split(b"\n")
    for (_, _, transport), seen in log.links.items():
        assert transport.encode() in lines[seen.first.line - 1]


def test_small_chunks_give_the_same(case: Path, log: NcclLog) -> None:
    assert parse_nccl_log(chunks(case, 997), "log.txt") == log
