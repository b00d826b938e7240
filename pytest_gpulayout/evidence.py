"""Collects what a running server shows about its transports and its start, and has the transports judged."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO

from pytest_gpulayout.all_reduce import judge_all_reduce
from pytest_gpulayout.errors import GpuLayoutError
from pytest_gpulayout.nccl_log import NcclLog, merge, parse_nccl_log
from pytest_gpulayout.replicas import join_reports, split_ranks
from pytest_gpulayout.transport_cpu import judge_cpu
from pytest_gpulayout.transport_nccl import ServerContext, judge_nccl
from pytest_gpulayout.vllm_log import VllmLogFacts, parse_vllm_log

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from pytest_gpulayout.gate import PlacedLayout
    from pytest_gpulayout.ports import Server, ServerProof
    from pytest_gpulayout.topology import Topology
    from pytest_gpulayout.transport import TransportReport

_CHUNK_BYTES = 1 << 17
_READY = "Application startup complete."  # of uvicorn; what a request brings into the log comes after it


def collect_transport(server: Server, placed: PlacedLayout) -> TransportReport:
    """Read NCCL's logs of the server's processes and what vLLM says, or what vLLM's CPU backend shows.

    Of replicas each is looked at by itself, and the reports are joined.

    :param placed: the devices of the server's ranks.
    """
    parts = server.parts()
    if len(parts) == 1:
        return _transport_of(parts[0], placed.topology, placed.placement)
    ranks = server.spec.layout.ranks
    placements = split_ranks(placed.placement, ranks)
    reports = [_transport_of(part, placed.topology, own) for part, own in zip(parts, placements, strict=True)]
    return join_reports(reports, ranks)


def _transport_of(server: Server, topology: Topology, placement: Sequence[int]) -> TransportReport:
    facts = _server_facts(server)
    layout = server.spec.layout
    if server.spec.platform == "cpu":
        return judge_cpu(layout, facts, server.mapped_segments(), moe=server.proof.moe)
    surroundings = server.surroundings()
    context = ServerContext(
        rank_pids=_telling_pids(server.proof),
        topology=topology,
        placement=placement,
        surroundings=surroundings,
        obstacle=server.nccl_log_obstacle(),
        moe=server.proof.moe,
    )
    log = merge(map(_read_nccl_log, server.nccl_logs()))
    report = judge_nccl(log, layout, context)
    first = surroundings.ranks.get(0)
    environment = (first.environment if first else None) or {}
    more = judge_all_reduce(facts, layout, topology, placement, server.spec.arguments, environment)
    return replace(report, findings=(*report.findings, *more))


def _telling_pids(proof: ServerProof) -> Mapping[int, int]:
    """Process id of each rank, which NCCL's lines are known by; nothing where ranks of two nodes have the same."""
    return proof.rank_pids if len(set(proof.rank_pids.values())) == len(proof.rank_pids) else {}


def communication(server: Server, placed: PlacedLayout) -> dict[str, str]:
    """Return what the ranks talk over, to be named where it differs from a baseline's; never raises.

    ``transport``, such as ``P2P/CUMEM``: all that channels use, without their number, since NCCL opens some only when
    they are needed. ``all_reduce``: vLLM's backends of the tensor-parallel group in the order they are tried. What
    cannot be told is left out, and so is all of it for a single rank.
    """
    if server.spec.layout.ranks == 1:
        return {}
    try:
        report, facts = collect_transport(server, placed), startup_facts(server)
    except (GpuLayoutError, OSError):
        return {}  # the transport check tells what is missing; here it is one fact less
    found = {}
    if report.transports and report.verdict != "no-evidence":
        found["transport"] = ", ".join(sorted(report.transports))
    backends = [", ".join(fact.backends) or "none" for fact in facts.all_reduce if fact.group.startswith("tp")]
    if backends:
        found["all_reduce"] = backends[0]
    return found


def startup_facts(server: Server) -> VllmLogFacts:
    """Return what the server's log says until it is ready; nothing where it cannot be read.

    Of replicas what the first says, and the smallest KV cache of all.
    """
    facts = [_startup_facts_of(part) for part in server.parts()]
    caches = [fact.kv_cache_tokens for fact in facts if fact.kv_cache_tokens is not None]
    return replace(facts[0], kv_cache_tokens=min(caches, default=None))


def _startup_facts_of(server: Server) -> VllmLogFacts:
    if server.log is None:
        return VllmLogFacts()
    try:
        with server.log.open(encoding="utf-8", errors="replace") as log:
            return parse_vllm_log(_until_ready(log), str(server.log))
    except OSError:
        return VllmLogFacts()


def _until_ready(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield line
        if _READY in line:
            return


def _server_facts(server: Server) -> VllmLogFacts:
    if server.log is None:  # it says nothing of a server that somebody else runs
        return VllmLogFacts()
    with server.log.open(encoding="utf-8", errors="replace") as log:
        return parse_vllm_log(log, str(server.log))


def _read_nccl_log(path: Path) -> NcclLog:
    with path.open("rb") as file:
        return parse_nccl_log(chunks(file), str(path))


def chunks(file: BinaryIO) -> Iterator[bytes]:
    """Yield a file in the pieces that NCCL's logs are read in fastest."""
    yield from iter(lambda: file.read(_CHUNK_BYTES), b"")
