"""What is proved of a server that somebody else runs, and what cannot be proved from outside.

Knows which statements a gate makes of a server, which evidence there can be for each, and that a layout counts only
when the server itself says so. Leaves asking the server and looking at this host to
:mod:`~pytest_gpulayout.adapters.attached_server`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pytest_gpulayout.errors import ServerStartFailed, UnsupportedLayoutError
from pytest_gpulayout.fingerprint import Fingerprint, parse_fingerprint
from pytest_gpulayout.layout import Layout
from pytest_gpulayout.server_info import SERVER_INFO_PATH, ServerInfo
from pytest_gpulayout.topology import Device, Topology

if TYPE_CHECKING:
    from pytest_gpulayout.measurement import Identity
    from pytest_gpulayout.ports import Platform

NOT_KNOWN_HERE = "not known from here"
"""Source of a topology that holds nothing but the number of devices."""

RECORD_TOPOLOGY = "record it on its host: gpulayout topo --json > topology.json; then --gpu-topology=topology.json"
"""What brings evidence of a topology."""

_ON_ITS_HOST = "run pytest on its host"


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement about a server, and the evidence for it.

    :param what: as it is listed, such as ``its arguments``. :param proof: what shows it, ``""`` where nothing does.
    :param advice: what would bring evidence, ``""`` where nothing can.
    """

    what: str
    proof: str = ""
    advice: str = ""

    @property
    def is_proved(self) -> bool:
        """Whether there is evidence."""
        return bool(self.proof)

    def __str__(self) -> str:
        more = self.proof or self.advice
        return f"{self.what} ({more})" if more else self.what


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What could be seen of a server that runs.

    :param url: where it answers. :param layout: the one that it was confirmed to be.
    :param fingerprint: ``system_fingerprint`` of its answer. :param version: of its vLLM.
    :param started_s: when its process started, seconds since the epoch on its own clock; ``None`` where it does not
        tell. :param topology: where the devices and links come from, ``""`` where they are unknown.
    :param rank_pids: process id of each rank on this host; empty where they are not seen.
    :param sees_devices: whether those devices can be looked at from here: by NVML, or as the cores of this host.
    :param has_nccl_logs: whether somebody gave logs of NCCL that are said to be its own.
    :param info: what it tells of its configuration, ``None`` where it does not.
    """

    url: str
    layout: Layout
    platform: Platform
    fingerprint: str
    version: str
    started_s: float | None = None
    topology: str = ""
    rank_pids: Mapping[int, int] = field(default_factory=dict)
    sees_devices: bool = False
    has_nccl_logs: bool = False
    info: ServerInfo | None = None


def statements_of(sight: Sight) -> tuple[Statement, ...]:
    """Return every statement that a report makes of a server, the proved ones with their evidence."""
    return tuple(_statements(sight))


def _statements(sight: Sight) -> Iterator[Statement]:
    here = bool(sight.rank_pids)
    pids = ", ".join(f"rank {rank} is pid {pid}" for rank, pid in sorted(sight.rank_pids.items()))
    asked = "" if sight.info is None else f", and {SERVER_INFO_PATH.partition('?')[0]}"
    yield Statement("its layout", f"system_fingerprint {sight.fingerprint}{asked}")
    if (sight.layout.ranks == 1 and sight.info is None) or here:
        yield Statement(
            f"that it has {sight.layout.ranks} rank{'s' * (sight.layout.ranks > 1)} and no more",
            f"process table: {pids}" if here else "",
            f"--fingerprint-mode=hash hides larger layouts; {_ON_ITS_HOST}",
        )
    if sight.layout.dp > 1 and not sight.layout.ep and (sight.info is None or sight.info.moe is None) and not here:
        yield Statement("that its engines do not talk, as those of a model without experts", "", _ON_ITS_HOST)
    if sight.layout.nodes > 1:
        yield Statement(f"that it spans {sight.layout.nodes} nodes")
    told = "" if sight.started_s is None else f"/metrics: one process, started {utc_text(sight.started_s)}"
    yield Statement("that one server alone answers there", told, "let its /metrics be reached")
    yield Statement("its topology", sight.topology, RECORD_TOPOLOGY)
    yield from _device_statements(sight)
    if sight.has_nccl_logs:
        yield Statement("that the NCCL logs are of this server and of no other")
    yield Statement("the revision and dtype of its model")
    yield Statement("its arguments")
    yield Statement("what its log tells: compilations while it is measured, backends of its all-reduce")
    yield Statement("that a fresh start of it is as fast", "", "without --gpu-server-url pytest starts servers")


def _device_statements(sight: Sight) -> Iterator[Statement]:
    kind, evidence = ("cores", "/proc") if sight.platform == "cpu" else ("GPUs", "NVML")
    proof = f"{evidence} of this host" if sight.sees_devices else ""
    yield Statement(f"that it runs on {kind}, on which of them, and who else is there", proof, _ON_ITS_HOST)
    yield Statement("how its devices fare under load: clocks, heat, other work", proof and "sampled", _ON_ITS_HOST)


def utc_text(seconds: float) -> str:
    """``2026-11-21T04:07:12Z``. :param seconds: since the epoch."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def remarks_on(sight: Sight) -> tuple[str, ...]:
    """Say beside a verdict what it does not rest on."""
    missing = "; ".join(statement.what for statement in statements_of(sight) if not statement.is_proved)
    lines = [
        f"not proved of the server, which somebody else runs: {missing}",
        "it is one server start, which is not repeated: how lucky it was is in every number as one draw",
    ]
    if not sight.topology:
        where = address_of(sight.url)
        lines.append(f"its hardware is unknown: the baseline is of whatever answers at {where}; {RECORD_TOPOLOGY}")
    return tuple(lines)


# -- the layout ------------------------------------------------------------------------------------------------------


def require_one_server(layout: Layout) -> None:
    """Refuse replicas: of several servers behind one address each answers for itself alone.

    :raises UnsupportedLayoutError: the layout has replicas.
    """
    if layout.replicas > 1:
        raise UnsupportedLayoutError(
            f"a layout of one server was required with --gpu-server-url, found {layout}\n"
            "  of replicas (xN) behind one address no answer tells how many there are\n"
            f"  give the address of one of them, and ask for --gpu-layout={replace(layout, replicas=1)}"
        )


def confirm_configuration(info: ServerInfo | None, layout: Layout, url: str) -> None:
    """Do nothing where the server's configuration is the layout, or is not told and not needed.

    :param info: ``None`` where the server does not tell. :param url: for messages.
    :raises ServerStartFailed: it is another layout, or has factors that nothing else tells.
    """
    where = f"  where: GET {url}{SERVER_INFO_PATH}"
    if info is not None and (contradiction := info.contradiction(layout)):
        raise ServerStartFailed(
            f"the server is not the layout that was asked for: {contradiction}\n{where}\n"
            f"  ask for what it is: --gpu-layout={info.layout}; or give the address of another server"
        )
    if info is None and (layout.pcp > 1 or layout.dcp > 1):
        raise ServerStartFailed(
            f"a server that tells whether it is {layout} was required: its system_fingerprint tells neither pcp nor "
            f"dcp, and it was found not to tell its configuration\n{where}\n"
            "  start it with VLLM_SERVER_DEV_MODE=1 where nobody else reaches it, or let pytest start it: leave "
            "--gpu-server-url out"
        )


def confirm_layout(text: str, layout: Layout, url: str) -> Fingerprint:
    """Return a server's fingerprint where it names the layout that was asked for.

    :param text: ``system_fingerprint`` of an answer. :param url: for messages.
    :raises ServerStartFailed: it does not tell its layout, or tells another one.
    """
    where = f"  where: system_fingerprint of POST {url}/v1/completions"
    found = parse_fingerprint(text)
    if found is None:
        wanted = f"vllm-<version>-{layout}-<hash>"
        raise ServerStartFailed(
            f"the server does not say which layout it runs: system_fingerprint is {text!r}, {wanted} was expected\n"
            f"{where}\n"
            "  a server that somebody else runs is gated by what it says: start it with vLLM >= 0.26 and without "
            "--fingerprint-mode"
        )
    if contradiction := found.contradiction(layout):
        told = Layout(tp=found.tp, pp=found.pp, dp=found.dp, ep=found.ep)
        hidden = "; with --fingerprint-mode=hash it tells no sizes: start it without" if told == Layout() else ""
        raise ServerStartFailed(
            f"the server is not the layout that was asked for: {contradiction} ({text})\n{where}\n"
            f"  ask for what it is: --gpu-layout={told}; or give the address of another server{hidden}"
        )
    return found


# -- the hardware ----------------------------------------------------------------------------------------------------


def address_of(url: str) -> str:
    """``http://vllm.default.svc:8000/a`` -> ``vllm.default.svc:8000/a``; never a user's name or password."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2] + parts.path.rstrip("/")


def unknown_topology(layout: Layout, platform: Platform, url: str) -> Topology:
    """Return as many devices as one node of a layout has, of which nothing is known but where they answer.

    Their name holds the address, so that a baseline of them is never compared with one of a machine that was looked
    at, nor with one of another address.
    """
    unit = "CPU" if platform == "cpu" else "GPU"
    name = f"unknown {unit} at {address_of(url)}"
    devices = tuple(Device(index, name=name) for index in range(layout.gpus_per_node))
    return Topology(devices, {}, NOT_KNOWN_HERE, recorded=False, platform=platform)


def identity_of_attached(identity: Identity, sight: Sight, topology: Topology) -> Identity:
    """Return an identity without what this host and this Python would say of a server that runs elsewhere.

    :param identity: as it would be of a server of ours, on the devices of ``topology``.
    """
    key = identity.key
    model = {**key.model, "name": _model_name(key.model["name"]), "revision": "", "dtype": ""}
    server = {"server": address_of(sight.url)}
    if sight.started_s is not None:
        server["server started"] = utc_text(sight.started_s)
    here = sight.sees_devices
    return replace(
        identity,
        key=replace(key, model=model, hardware=key.hardware if here else _hardware_elsewhere(key.hardware, topology)),
        epoch={**identity.epoch, "nccl": None} if here else _epoch_elsewhere(topology),
        sut={"vllm": sight.version},  # of the rest of its software nothing is known
        covariates={**(identity.covariates if here else _of_the_job(identity.covariates)), **server},
    )


def _model_name(name: str) -> str:
    """Of a folder its last component alone: a path is of the server's host."""
    return (name.rstrip("/").rpartition("/")[2] or name) if name.startswith("/") else name


def _hardware_elsewhere(hardware: Mapping[str, Any], topology: Topology) -> dict[str, Any]:
    """On the CPU platform the facts of this host are in the place of those that nobody knows."""
    if topology.platform != "cpu":
        return dict(hardware)
    names = dict.fromkeys(device.name or "unknown CPU" for device in topology.devices)
    return {**hardware, "device": " and ".join(names), "count": len(topology.devices)}


def _epoch_elsewhere(topology: Topology) -> dict[str, Any]:
    """Driver and CUDA as a recorded topology tells them."""
    return {"driver": topology.driver_version, "cuda": topology.cuda_version, "nccl": None, "kernel": None}


def _of_the_job(covariates: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in covariates.items() if name in ("commit", "image")}
