"""Which transport each rank pair uses, and whether it is allowed.

Knows the families of NCCL's transports and of those of vLLM's CPU backend, the report on one server, and what
``--gpu-transport`` means. What counts as proof is in :mod:`~pytest_gpulayout.transport_nccl` and
:mod:`~pytest_gpulayout.transport_cpu`, why a transport was chosen in :mod:`~pytest_gpulayout.causes`.

============  ======================================================================================================
verdict       meaning
============  ======================================================================================================
socket        a channel goes over NET/Socket (or CPU/GLOO)
shm           none does, and a channel goes through host memory where the GPUs could reach each other directly, as far
              as the topology is known: between GPUs behind different host bridges it is NCCL's default, and ok
ok            none of both, and the ranks of the layout are all connected by channels
no-evidence   the logs do not show what the ranks use
============  ======================================================================================================

NVLS prints no channel line; it is evidence by itself where every rank of a one-node communicator has made its
buffers. CollNet names one rank per line and proves no pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from pytest_gpulayout.causes_case import Finding
from pytest_gpulayout.errors import LayoutSyntaxError
from pytest_gpulayout.nccl_log import LogLine, is_shm, is_socket

TransportVerdict = Literal["ok", "socket", "shm", "no-evidence"]


class TransportFamily(StrEnum):
    """What transports have in common; ``--gpu-transport`` speaks of these."""

    P2P = "P2P"
    SHM = "SHM"
    NET = "NET"
    SOCKET = "NET/Socket"
    COLLNET = "COLLNET"
    NVLS = "NVLS"
    CPU_SHM = "CPU/SHM"
    CPU_GLOO = "CPU/GLOO"
    OTHER = "OTHER"


def family_of(transport: str) -> TransportFamily:
    """Family of the text after ``via``; a name this version does not know is ``OTHER``.

    ``NET/Socket`` is matched as a whole component: ``NET/FastSocket`` is a plugin of its own, hence ``NET``.
    """
    if is_socket(transport):
        return TransportFamily.SOCKET
    if is_shm(transport):
        return TransportFamily.SHM
    return _FAMILIES.get(transport) or _FAMILIES.get(transport.split("/")[0], TransportFamily.OTHER)


_FAMILIES = {family.value: family for family in TransportFamily}
_SLOW = (TransportFamily.SOCKET, TransportFamily.CPU_GLOO)
ALLOW = "if this is wanted, allow it: --gpu-transport="
"""Begins the advice on a transport that is not allowed."""


@dataclass(frozen=True, slots=True)
class TransportUse:
    """A transport between two ranks, or of one rank where ``dst`` is ``None`` (CollNet, NVLS).

    :param channels: channel lines that say so. :param first: the first of them; its ``line`` is 0 where the
        evidence is no log line (CPU/SHM: a mapped segment).
    :param p2p_possible: whether the topology lets their GPUs reach each other directly, ``None`` where it is unknown.
    """

    src: int | None
    dst: int | None
    transport: str
    channels: int
    first: LogLine
    p2p_possible: bool | None = None


@dataclass(frozen=True, slots=True)
class TransportReport:
    """What is proved about the transports of one server.

    :param uses: one entry per (src, dst, transport).
    :param network: plugin that NCCL chose; not a transport in use.
    :param gap: what is missing to prove the whole layout, also where a socket settles the verdict; else ``None``.
    """

    verdict: TransportVerdict
    uses: tuple[TransportUse, ...] = ()
    network: str | None = None
    nccl_version: str | None = None
    findings: tuple[Finding, ...] = ()
    gap: str | None = None

    @property
    def transports(self) -> dict[str, int]:
        """Channel lines per transport, the most frequent first."""
        counts: dict[str, int] = {}
        for use in self.uses:
            counts[use.transport] = counts.get(use.transport, 0) + use.channels
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    @property
    def edges(self) -> dict[tuple[int, int], tuple[TransportUse, ...]]:
        """Uses per (src, dst), in order of the ranks."""
        edges: dict[tuple[int, int], tuple[TransportUse, ...]] = {}
        for use in self.uses:
            if use.src is not None and use.dst is not None:
                pair = (use.src, use.dst)
                edges[pair] = (*edges.get(pair, ()), use)
        return dict(sorted(edges.items()))

    def summary(self) -> str:
        """Return one short text, such as ``P2P/CUMEM x4``."""
        if self.transports:
            text = ", ".join(f"{name} x{count}" for name, count in self.transports.items())
            return text + (" (incomplete)" if self.verdict == "no-evidence" or self.gap is not None else "")
        return "none needed" if self.verdict == "ok" else "no evidence"

    def to_document(self) -> dict[str, Any]:
        """Return what ``gpulayout nccl --json`` prints."""
        return {
            "verdict": self.verdict,
            "transports": self.transports,
            "edges": [
                {
                    "src": src,
                    "dst": dst,
                    "transports": [use.transport for use in uses],
                    "channels": sum(use.channels for use in uses),
                }
                for (src, dst), uses in self.edges.items()
            ],
            "network": self.network,
            "nccl_version": self.nccl_version,
            "findings": [
                {
                    "cause": finding.cause,
                    "evidence": {"file": finding.file, "line": finding.line, "text": finding.text},
                    "advice": finding.advice,
                }
                for finding in self.findings
            ],
        }


# -- what is allowed -------------------------------------------------------------------------------------------------

_WORDS = {family.value.lower(): family for family in TransportFamily}
_WORDS |= {"socket": TransportFamily.SOCKET}


@dataclass(frozen=True, slots=True)
class AllowedTransports:
    """Families that may be used; the default is all but sockets, and shared memory only where P2P is not possible.

    :param shm_instead_of_p2p: whether shared memory is allowed where GPUs could reach each other directly.
    """

    families: frozenset[TransportFamily] = frozenset(TransportFamily) - frozenset(_SLOW)
    shm_instead_of_p2p: bool = False

    def allows(self, use: TransportUse) -> bool:
        """Whether two ranks may use what they use."""
        family = family_of(use.transport)
        if family is TransportFamily.SHM and use.p2p_possible and not self.shm_instead_of_p2p:
            return False
        return family in self.families

    def __str__(self) -> str:
        if self == AllowedTransports():
            return "all but " + " and ".join(_SLOW) + ""
        return ", ".join(family for family in TransportFamily if family in self.families)


@dataclass(frozen=True, slots=True)
class TransportViolation:
    """Two ranks (or one, for CollNet and NVLS) use what is not allowed, and the first line that shows it."""

    src: int | None
    dst: int | None
    transport: str
    family: TransportFamily
    file: str
    line: int
    allowed: AllowedTransports

    def __str__(self) -> str:
        who = "the server" if self.src is None else f"rank {self.src}"
        who = who if self.dst is None else f"ranks {self.src} -> {self.dst}"
        where = self.file + (f", line {self.line}" if self.line else "")
        allowed = str(self.allowed)
        if self.family in self.allowed.families:
            allowed += ", and shared memory only where the GPUs cannot reach each other directly, which these can"
        return (
            f"{who}: transport {self.transport}, allowed: {allowed}\n"
            f"  in {where}\n"
            f"  {ALLOW}{','.join(sorted(family.lower() for family in self.allowed.families | {self.family}))}"
        )


def parse_allowed(text: str) -> AllowedTransports:
    """Read a list such as ``p2p,nvls,shm``; families in any case, empty text is the default.

    ``net`` is every network but ``NET/Socket``, which is spelled ``socket`` or ``net/socket``.

    :raises LayoutSyntaxError: with the column of the word that is no family.
    """
    if not text.strip():
        return AllowedTransports()
    families = set()
    column = 1
    for part in text.split(","):
        word = part.strip().lower()
        if word not in _WORDS:
            found = repr(part.strip()) if word else "nothing"
            reason = f"transport: expected one of {', '.join(sorted(_WORDS))}, found {found}"
            raise LayoutSyntaxError(text, column + len(part) - len(part.lstrip()), reason)
        families.add(_WORDS[word])
        column += len(part) + 1
    return AllowedTransports(frozenset(families), shm_instead_of_p2p=True)


def forbidden(report: TransportReport, allowed: AllowedTransports) -> tuple[TransportViolation, ...]:
    """Every use of a transport that is not allowed, in order of the ranks.

    A report without evidence has nothing to forbid: look at its verdict, too.
    """
    return tuple(
        TransportViolation(
            use.src, use.dst, use.transport, family_of(use.transport), use.first.file, use.first.line, allowed=allowed
        )
        for use in report.uses
        if not allowed.allows(use)
    )
