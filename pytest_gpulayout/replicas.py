"""Independent replicas of one layout (``xN``): what each of them is, and whether each carried its share of a load.

Knows how a layout, its devices and its ranks fall apart into replicas, how the reports on them are joined, and which
shares of the requests are told to be uneven. Leaves starting them to the adapters, and what follows from an uneven
share to :mod:`~pytest_gpulayout.validity`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from pytest_gpulayout.transport import TransportReport, TransportUse, TransportVerdict

if TYPE_CHECKING:
    from pytest_gpulayout.ports import ServerSpec
    from pytest_gpulayout.server_window import ServerWindow

UNEVEN_SHARE = 0.25
"""How far, as a share of its fair part, the requests of a replica may be from it. A proxy that gives each request to
the replica with the fewest open ones evens out numbers, not speeds: who answers faster is sooner free, so a share
tells how fast a replica was beside the others. Equal servers on equal devices differ by some percent; one that is a
quarter off is another one (a slow link, a clock held down, cores shared with somebody) or was not always there, and
the throughput of the layout is no longer N times that of one server."""

_WORST_FIRST: tuple[TransportVerdict, ...] = ("no-evidence", "socket", "shm", "ok")
_LEAST_PER_REPLICA = 2

Value = TypeVar("Value")


# -- what a replica is -----------------------------------------------------------------------------------------------


def split_spec(spec: ServerSpec) -> tuple[ServerSpec, ...]:
    """Return what each replica is started as: the layout without replicas, on its own devices.

    :param spec: of all; its devices are those of the first replica, then those of the next.
    """
    layout = replace(spec.layout, replicas=1)
    return tuple(replace(spec, layout=layout, devices=own) for own in split_ranks(spec.devices, layout.ranks))


def split_ranks(values: Sequence[Value], ranks: int) -> list[tuple[Value, ...]]:
    """Return what belongs to the ranks of each replica.

    :param values: (n_replicas * ranks,), replica after replica. :param ranks: of one replica.
    """
    return [tuple(values[first : first + ranks]) for first in range(0, len(values), ranks)]


def join_ranks(of_replicas: Sequence[Mapping[int, Value]], ranks: int) -> dict[int, Value]:
    """Return what each rank of the whole has: rank r of replica k is rank k * ranks + r.

    :param of_replicas: by rank, of each replica. :param ranks: of one replica.
    """
    return {number * ranks + rank: value for number, own in enumerate(of_replicas) for rank, value in own.items()}


def join_reports(reports: Sequence[TransportReport], ranks: int) -> TransportReport:
    """Return what is proved of all replicas: no more than of the one of which least is.

    :param reports: of each replica, in its own ranks. :param ranks: of one replica.
    """
    return TransportReport(
        verdict=next(verdict for verdict in _WORST_FIRST if any(report.verdict == verdict for report in reports)),
        uses=tuple(_moved(use, number * ranks) for number, report in enumerate(reports) for use in report.uses),
        network=next((report.network for report in reports if report.network), None),
        nccl_version=next((report.nccl_version for report in reports if report.nccl_version), None),
        gap="; ".join(f"replica {number}: {report.gap}" for number, report in enumerate(reports) if report.gap)
        or None,
        findings=tuple(
            replace(finding, cause=f"replica {number}: {finding.cause}")
            for number, report in enumerate(reports)
            for finding in report.findings
        ),
    )


def _moved(use: TransportUse, first: int) -> TransportUse:
    src, dst = (None if rank is None else rank + first for rank in (use.src, use.dst))
    return replace(use, src=src, dst=dst)


# -- what a replica did ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ReplicaShare:
    """What one replica contributed in a window.

    :param replica: its number, in the order of the ranks. :param url: base URL.
    :param requests: that it finished. :param share: of all that were finished, ``None`` where none were.
    """

    replica: int
    url: str
    requests: int
    share: float | None


def replica_shares(window: ServerWindow) -> tuple[ReplicaShare, ...]:
    """Return what each replica contributed, in the order of the ranks; empty for a server without replicas.

    Also empty where their counters could not be read.
    """
    if not window.replicas or not window.engines:
        return ()
    finished = {
        url: sum(sum(engine.finished.values()) for engine in window.engines if engine.replica == url)
        for url in window.replicas
    }
    total = sum(finished.values())
    return tuple(
        ReplicaShare(number, url, requests, requests / total if total else None)
        for number, (url, requests) in enumerate(finished.items())
    )


def shares_text(requests: Sequence[int]) -> str:
    """Say in a line how many requests each replica finished. :param requests: in the order of the ranks."""
    total = sum(requests)
    shares = ", ".join(f"{number / total:.0%}" for number in requests) if total else "none"
    return f"replicas finished {' + '.join(map(str, requests))} of {total} requests ({shares})"


def uneven_shares(window: ServerWindow, batches: int) -> Iterator[str]:
    """Yield a sentence for each replica whose share is uneven, or one where nothing is known of the shares.

    A batch that does not divide evenly leaves one request more or less to each.

    :param batches: of the run.
    """
    if window.replicas and not window.engines:
        why = "; ".join(window.notes) or "their counters were not read"
        yield f"how many requests each of the {len(window.replicas)} replicas answered is not known: {why}"
    shares = replica_shares(window)
    total = sum(share.requests for share in shares)
    if not shares or total < _LEAST_PER_REPLICA * len(shares):
        return
    fair = total / len(shares)
    allowed = UNEVEN_SHARE * fair + batches
    for share in shares:
        if abs(share.requests - fair) > allowed or not share.requests:
            yield (
                f"replica {share.replica} ({share.url}) finished {share.requests} of {total} requests "
                f"({share.share:.0%}), where {fair:.0f} +- {allowed:.0f} were its part: the proxy gives a request to "
                f"the replica that has the fewest, so it was {'slower' if share.requests < fair else 'faster'} than "
                "the others, or not always there; compare their logs and devices"
            )
