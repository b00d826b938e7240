"""The hosts of a layout over several nodes: what each says of itself, and whether they fit together.

Knows which facts must agree between nodes, at which address the head is reached, which variables of the test run its
nodes take over, and how what was found on each node becomes one report. Leaves talking to nodes to
:mod:`~pytest_gpulayout.adapters.node_fleet`, and servers on them to :mod:`~pytest_gpulayout.adapters.node_launcher`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_gpulayout.errors import NodeError
from pytest_gpulayout.occupancy import OccupancyReport, OccupancyViolation, ProvedBy
from pytest_gpulayout.telemetry import Telemetry

if TYPE_CHECKING:
    from pytest_gpulayout.gate import PlacedLayout
    from pytest_gpulayout.layout import Layout
    from pytest_gpulayout.topology import Device

_GIB = 2**30
_MUST_AGREE = ("pytest-gpulayout", "python", "vllm", "torch", "nccl")
_WEAKEST_FIRST: tuple[ProvedBy, ...] = ("device memory", "new processes", "process list")

# Those that vLLM's own Ray executor copies to its nodes (vllm/ray/ray_env.py, 0.32), and those of gloo.
_TAKEN_OVER = ("VLLM_", "NCCL_", "GLOO_", "UCX_", "LMCACHE_", "HF_", "HUGGING_FACE_")
_OF_ONE_HOST = frozenset(
    {
        *("VLLM_HOST_IP", "VLLM_API_KEY", "VLLM_CACHE_ROOT", "VLLM_CONFIG_ROOT", "VLLM_NCCL_SO_PATH"),
        *("NCCL_DEBUG_FILE", "NCCL_HOSTID", "NCCL_TOPO_FILE", "HF_HOME", "HF_HUB_CACHE"),
    }
)


@dataclass(frozen=True, slots=True)
class NodeAddress:
    """An address of a node. :param interface: that has it, such as ``eth0``."""

    interface: str
    address: str


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a node says of itself.

    :param name: as the user named it. :param host: its host name.
    :param machine: identity of its kernel: nodes that share it run on one machine; ``""`` where it is not known.
    :param network: identity of its network namespace, :param processes: and of that of its process ids.
    :param pid: of its agent. :param addresses: of interfaces that are up, without loopback; the first is preferred.
    :param python: interpreter that starts servers there. :param processor: name of its CPUs.
    :param versions: of ``pytest-gpulayout``, ``python``, ``vllm``, ``torch``, ``nccl``; ``None`` where there is none.
    """

    name: str
    host: str
    machine: str
    network: str
    processes: str
    pid: int
    addresses: tuple[NodeAddress, ...]
    python: str
    processor: str
    versions: Mapping[str, str | None]

    @property
    def words(self) -> str:
        """``node a (host gpu-17)``."""
        return f"node {self.name}" + (f" (host {self.host})" if self.host != self.name else "")


def facts_from_document(name: str, document: Any) -> NodeFacts:
    """Read a node's answer to ``hello``.

    :raises NodeError: it is none.
    """
    try:
        return NodeFacts(
            name=name,
            host=str(document["host"]),
            machine=str(document["machine"]),
            network=str(document["network"]),
            processes=str(document["processes"]),
            pid=int(document["pid"]),
            addresses=tuple(NodeAddress(**entry) for entry in document["addresses"]),
            python=str(document["python"]),
            processor=str(document["processor"]),
            versions=dict(document["versions"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise NodeError(
            f"the agent of pytest-gpulayout was expected on node {name}, found one that answers otherwise "
            f"({type(error).__name__}: {error})\n"
            "  in its answer to 'hello'\n"
            "  install the same version of pytest-gpulayout there as here",
            node=name,
        ) from error


# -- do they fit together --------------------------------------------------------------------------------------------


def require_same_software(nodes: Sequence[NodeFacts], own_version: str | None) -> None:
    """Do nothing where all nodes can run one server.

    Versions must be equal: vLLM's nodes exchange pickled objects and lines of their own protocol, and NCCL's that of
    NCCL.

    :param nodes: in order of their ranks. :param own_version: of pytest-gpulayout in the test run.
    :raises NodeError: one has another version, or no vLLM.
    """
    head = nodes[0]
    if head.versions.get("pytest-gpulayout") != own_version:
        raise _another_version(head, "pytest-gpulayout", "in the test run", own_version)
    for node in nodes:
        if node.versions.get("vllm") is None:
            raise NodeError(
                f"vLLM is required on all nodes of a layout, found none on {node.words}\n"
                f"  in {node.python}\n"
                "  install it there, or name the Python that has it: --gpu-node-python=PATH",
                node=node.name,
            )
        for name in _MUST_AGREE:
            if node.versions.get(name) != head.versions.get(name):
                raise _another_version(node, name, f"on {head.words}, the head", head.versions.get(name))


def _another_version(node: NodeFacts, name: str, where: str, wanted: str | None) -> NodeError:
    return NodeError(
        f"the same {name} is required on all nodes of a layout, found {node.versions.get(name) or 'none'} "
        f"on {node.words}\n"
        f"  {where}: {wanted or 'none'}\n"
        f"  in {node.python} of {node.words}\n"
        "  install the same version there, or name the Python that has it: --gpu-node-python=PATH",
        node=node.name,
    )


def require_alike(placed: PlacedLayout) -> None:
    """Do nothing where the devices chosen on all nodes are of one kind, with the same links between them.

    :raises NodeError: a node differs, or shows a device of another node; the message names node and field.
    """
    _require_disjoint(placed)
    head, *others = placed.on_nodes
    for node in others:
        for field, here, there in _differences(head, node):
            raise NodeError(
                f"nodes of one kind are required for layout {placed.layout}, found another {field} "
                f"on node {node.node}: {there}\n"
                f"  on node {head.node}, the head: {here}\n"
                f"  in the topologies of both nodes ({node.topology.source})\n"
                f"  mend node {node.node}, or name nodes that are alike: --gpu-nodes=...",
                node=node.node,
            )


def _require_disjoint(placed: PlacedLayout) -> None:
    owners: dict[str, str] = {}
    for node in placed.on_nodes:
        for device in node.devices:
            owner = owners.setdefault(device.uuid, node.node) if device.uuid else node.node
            if owner != node.node:
                raise NodeError(
                    f"devices of its own are required on each node of layout {placed.layout}, found "
                    f"{device.uuid} on node {owner} and on node {node.node}\n"
                    "  in the topologies of both nodes\n"
                    "  these are two names of one machine: name another one, --gpu-nodes=...",
                    node=node.node,
                )


def _differences(head: PlacedLayout, node: PlacedLayout) -> Iterator[tuple[str, str, str]]:
    """Field, and what it is on the head and on the node."""
    for rank, (a, b) in enumerate(zip(head.devices, node.devices, strict=True)):
        kinds = zip(_kind(a, head.topology.platform), _kind(b, node.topology.platform), strict=True)
        for (field, here), (_, there) in kinds:
            if here != there:
                yield f"{field} (of its rank {rank})", here, there
    if head.pairs == node.pairs:
        for pair, own, other in zip(head.pairs, head.links, node.links, strict=True):
            if own != other:
                ranks = " and ".join(map(str, pair))
                yield f"link (between its ranks {ranks})", str(own or "unknown"), str(other or "unknown")


def _kind(device: Device, platform: str) -> Iterator[tuple[str, str]]:
    if platform == "cpu":
        yield "number of cores", str(_count_cpus(device.cpu_affinity or ""))
        return
    yield "GPU", device.name or "unknown"
    yield "GPU memory", "unknown" if device.memory_bytes is None else f"{device.memory_bytes / _GIB:.0f} GiB"


def _count_cpus(text: str) -> int:
    """``"0-2,5"`` -> 4."""
    spans = [part.partition("-") for part in text.split(",") if part]
    return sum(int(last or first) - int(first) + 1 for first, _, last in spans)


def head_address(head: NodeFacts, wanted: str | None) -> str:
    """Return the address at which the other nodes find the head.

    :param wanted: of ``--gpu-master-addr``.
    :raises NodeError: nothing is wanted, and it has none but loopback.
    """
    if wanted:
        return wanted
    if head.addresses:
        return head.addresses[0].address
    raise NodeError(
        f"an address that other nodes can reach is required of {head.words}, the head, found loopback alone\n"
        "  among its interfaces that are up\n  name one: --gpu-master-addr=ADDRESS",
        node=head.name,
    )


def ranks_of(layout: Layout, node_rank: int) -> range:
    """Return the ranks that one node holds; they are consecutive (``vllm/config/parallel.py``, 0.32, ``nnodes``)."""
    return range(node_rank * layout.gpus_per_node, (node_rank + 1) * layout.gpus_per_node)


def taken_over(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the test run that its nodes take over.

    Those of vLLM and of what it talks through, so that a choice made for the run holds everywhere; not those that
    name a folder or an address of one host.
    """
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_TAKEN_OVER) and name not in _OF_ONE_HOST
    }


# -- one report of all nodes -----------------------------------------------------------------------------------------


def joined_occupancy(parts: Sequence[tuple[str, int, OccupancyReport]]) -> OccupancyReport:
    """Join what was found on the GPUs of each node; every finding names its node.

    :param parts: the node's name, the first of its ranks, and its report, whose ranks begin with 0.
    """
    found = [report.proved_by for _, _, report in parts]
    return OccupancyReport(
        proved_by=next(kind for kind in _WEAKEST_FIRST if kind in found),
        ranks=tuple(replace(own, rank=own.rank + first) for _, first, report in parts for own in report.ranks),
        violations=tuple(_of_node(own, name, first) for name, first, report in parts for own in report.violations),
        not_proved=tuple(f"node {name}: {text}" for name, _, report in parts for text in report.not_proved),
        remarks=tuple(f"node {name}: {text}" for name, _, report in parts for text in report.remarks),
    )


def _of_node(violation: OccupancyViolation, name: str, first: int) -> OccupancyViolation:
    rank = None if violation.rank is None else violation.rank + first
    home = violation.home and f"{violation.home} of node {name}"
    return replace(violation, gpu=f"{violation.gpu} of node {name}", rank=rank, home=home)


def joined_telemetry(parts: Sequence[tuple[str, Telemetry]]) -> Telemetry:
    """Return the head's telemetry with that of the other nodes beside it. :param parts: (n_nodes,), by name."""
    (name, head), *others = parts
    followers = tuple(replace(telemetry, node=other) for other, telemetry in others)
    return replace(head, node=name, followers=followers)
