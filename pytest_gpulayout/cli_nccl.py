"""``gpulayout nccl``: what NCCL logs prove."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pytest_gpulayout.cli_common import (
    FAILED,
    FINE,
    Outcome,
    as_layout,
    command,
    typed,
)

if TYPE_CHECKING:
    from pytest_gpulayout.nccl_log import Communicator
    from pytest_gpulayout.transport import TransportReport

_MOST_COMMUNICATORS, _MOST_PAIRS = 16, 128


def declare_nccl(commands: Any) -> None:
    """Declare the subcommand."""
    parser = command(
        commands,
        "nccl",
        _nccl,
        "say what the NCCL logs of one server prove about its transports",
        "gpulayout nccl /tmp/nccl.*.log",
        "kubectl logs server-0 | gpulayout nccl - --layout tp4 --json",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="logs of all its processes; - is standard input")
    parser.add_argument(
        "--layout",
        type=typed(as_layout),
        metavar="SPEC",
        help="what runs: then every group of it must be connected",
    )


def _nccl(arguments: argparse.Namespace) -> Outcome:
    from pytest_gpulayout.nccl_log import merge, parse_nccl_log
    from pytest_gpulayout.transport_nccl import judge_nccl

    log = merge(parse_nccl_log(_chunks(name), name) for name in arguments.files)
    report = judge_nccl(log, arguments.layout)
    code = FAILED if report.verdict in ("socket", "no-evidence") else FINE
    communicators = [item for item in log.communicators if item.edges]
    document = {**report.to_document(), "communicators": [_communicator_document(item) for item in communicators]}
    return Outcome(code, document, list(_transport_lines(report, communicators)))


def _communicator_document(communicator: Communicator) -> dict[str, Any]:
    """Ranks are the communicator's own; ``key`` is null where channels could not be attributed to one."""
    return {
        "key": communicator.key,
        "nranks": communicator.nranks,
        "hosts": sorted({process[0] for process in communicator.processes}),
        "edges": [
            {"src": src, "dst": dst, "transports": list(counts), "channels": sum(counts.values())}
            for (src, dst), counts in sorted(communicator.edges.items())
        ],
    }


def _chunks(name: str) -> Iterator[bytes]:
    from pytest_gpulayout.evidence import chunks

    if name == "-":
        yield from chunks(sys.stdin.buffer)
        return
    with open(name, "rb") as file:
        yield from chunks(file)


def _transport_lines(report: TransportReport, communicators: Sequence[Communicator]) -> Iterator[str]:
    from pytest_gpulayout.report import aligned, finding_lines

    yield f"verdict: {report.verdict}"
    yield f"transports: {report.summary()}"
    for communicator in communicators[:_MOST_COMMUNICATORS]:
        if len(communicators) > 1:
            yield f"communicator {communicator.key or 'not named'}, {communicator.nranks or 'some'} ranks"
        rows = [
            (f"{src} -> {dst}", transport, str(channels))
            for (src, dst), counts in sorted(communicator.edges.items())
            for transport, channels in counts.items()
        ]
        yield from aligned([("ranks", "transport", "channels"), *rows[:_MOST_PAIRS]])
        if len(rows) > _MOST_PAIRS:
            yield f"... and {len(rows) - _MOST_PAIRS} more pairs: --json has all"
    if len(communicators) > _MOST_COMMUNICATORS:
        yield f"... and {len(communicators) - _MOST_COMMUNICATORS} more communicators: --json has all"
    yield f"network chosen: {report.network or 'not said'}"
    yield f"NCCL: {report.nccl_version or 'not said'}"
    for finding in report.findings:
        cause, *rest = finding_lines(finding)
        yield from (f"finding: {cause}", *rest)
