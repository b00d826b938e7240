"""How vLLM's Ray executor spreads a layout over a Ray cluster: what it asks for, and which rank lands on which node.

Knows the placement groups, the order of the ranks, the names of the workers and the arguments of vLLM 0.32
(``vllm/v1/executor/ray_utils.py``, ``ray_executor_v2.py``, ``ray_executor.py``). Leaves talking to Ray to
:mod:`~pytest_gpulayout.adapters.ray_nodes`.

vLLM asks Ray for one bundle of one GPU per rank with the strategy ``PACK``: as few nodes as possible. A layout over
two nodes is therefore two nodes only where no node has room for more than its share, which is why GPUs that the
layout does not use are held while the server starts (:func:`to_hold`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pytest_gpulayout.errors import NodeError, UnsupportedLayoutError
from pytest_gpulayout.layout import Layout

RayExecutor = Literal["v2", "v1"]
"""``RayExecutorV2``, which vLLM 0.32 takes unless told otherwise, and ``RayDistributedExecutor``."""

ADDRESS_VARIABLE = "RAY_ADDRESS"
RAY_ARGUMENTS = ("--distributed-executor-backend", "ray")
_EXECUTOR_VARIABLE = "VLLM_USE_RAY_V2_EXECUTOR_BACKEND"
_BUNDLES_VARIABLE = "VLLM_RAY_BUNDLE_INDICES"

_NODE_SHARE = 0.001  # of Ray's resource "node:ADDRESS", which every node has once
_WORKER_NAME = re.compile(r"vllm_Worker_.+?(?P<places>(?:_(?:TP|PP|PCP)\d+)*)")
_PLACE = re.compile(r"_(TP|PP|PCP)(\d+)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# print_worker_logs in python/ray/_private/worker.py; a worker on the node of the driver has no address there.
_LOG_PREFIX = re.compile(r"\((?:RayWorkerProc|RayWorkerWrapper) pid=(?P<pid>\d{1,10})(?:, ip=(?P<ip>[^()\s]+))?\) ")
# RayExecutorV2.start_worker_monitor in vllm/v1/executor/ray_executor_v2.py.
_DEAD = re.compile(
    r"\[(?:[^\]\s]*/)?ray_executor_v2\.py:\d+\] RayWorkerProc rank=\[(?P<ranks>[\d, ]+)\] died unexpectedly"
)
# init_distributed_environment in vllm/distributed/parallel_state.py, written by every rank.
_RANK = re.compile(r"\[(?:[^\]\s]*/)?parallel_state\.py:\d+\] world_size=\d{1,9} rank=(?P<rank>\d{1,9}) local_rank=")


@dataclass(frozen=True, slots=True)
class RayNode:
    """A living node of a Ray cluster.

    :param node_id: Ray's own, in hexadecimal digits. :param name: for people, unique in the cluster.
    :param address: as the nodes know it. :param gpus: that Ray may hand out there.
    :param free_gpus: those of them that nobody has now.
    """

    node_id: str
    name: str
    address: str
    gpus: int
    free_gpus: int


@dataclass(frozen=True, slots=True)
class RayWorker:
    """A rank that was found. :param node_id: see :class:`RayNode`. :param pid: on its node."""

    rank: int
    node_id: str
    pid: int


# -- before the start ------------------------------------------------------------------------------------------------


def executor_of(environment: Mapping[str, str]) -> RayExecutor:
    """Return which of its two Ray executors vLLM 0.32 takes (``vllm/envs.py``: the new one unless told 0).

    :raises UnsupportedLayoutError: the variable is no number, with which vLLM would not start, or ranks are put into
        bundles by hand, which only makes sense in a placement group of the user's own.
    """
    text = environment.get(_EXECUTOR_VARIABLE, "1")
    if not re.fullmatch(r"\s*[+-]?\d+\s*", text):
        raise UnsupportedLayoutError(
            f"0 or 1 was expected, found {text!r}\n  in the environment: {_EXECUTOR_VARIABLE}\n"
            f"  vLLM would refuse it: unset {_EXECUTOR_VARIABLE}"
        )
    if by_hand := environment.get(_BUNDLES_VARIABLE):
        raise UnsupportedLayoutError(
            f"the order of ranks that follows from the layout is required, found one by hand: {by_hand}\n"
            f"  in the environment: {_BUNDLES_VARIABLE}\n  unset {_BUNDLES_VARIABLE}"
        )
    return "v2" if int(text) else "v1"


def choose_nodes(
    nodes: Sequence[RayNode], count: int, gpus_per_node: int, home: str, executor: RayExecutor = "v2"
) -> tuple[RayNode, ...]:
    """Choose the nodes of a layout, in the order of its ranks: the first one runs the API server.

    The node of the test run comes first where it has the GPUs, so that the server is reached without leaving it; the
    others are chosen by address, so that a cluster that was started anew gives the same ones.

    :param count: how many are needed. :param gpus_per_node: 0 where none are needed.
    :param home: id of the node that the test run is on.
    :raises NodeError: too few nodes, or too few with enough free GPUs; it lists them.
    """
    fitting = [node for node in nodes if node.free_gpus >= gpus_per_node]
    if len(fitting) < count:
        raise _too_few(nodes, fitting, count, gpus_per_node)
    chosen = sorted(fitting, key=lambda node: (node.node_id != home, node.address, node.node_id))[:count]
    if executor == "v2":
        order = rank_order([node.node_id for node in chosen], chosen[0].node_id)
    else:
        order = rank_order_v1([node.address for node in chosen], chosen[0].address)
    return tuple(chosen[index] for index in order)


def _too_few(nodes: Sequence[RayNode], fitting: Sequence[RayNode], count: int, gpus_per_node: int) -> NodeError:
    wanted = f"{count} nodes" + (f" with {_gpus(gpus_per_node)} free on each" if gpus_per_node else "")
    lines = [f"{wanted} were required of the Ray cluster, found {len(fitting)} of its {len(nodes)}"]
    for node in nodes:
        lines.append(f"  {node.name} ({node.address}): {node.free_gpus} of {_gpus(node.gpus)} free")
    lines.append("  add nodes (ray start --address=HEAD:6379), free their GPUs (ray status), or take fewer nodes")
    lacking = next((node.name for node in nodes if node not in fitting), "")
    return NodeError("\n".join(lines), node=lacking)


def _gpus(number: int) -> str:
    return f"{number} GPU" if number == 1 else f"{number} GPUs"


def to_hold(nodes: Sequence[RayNode], chosen: Sequence[RayNode], gpus_per_node: int) -> dict[str, int]:
    """Return how many GPUs of each node must not be free while vLLM asks for its own; node id -> number, none of 0.

    With these held, every node has room for its share and no more, and ``PACK`` has one answer only.
    """
    shares = {node.node_id: gpus_per_node for node in chosen}
    surplus = {node.node_id: node.free_gpus - shares.get(node.node_id, 0) for node in nodes}
    return {node_id: number for node_id, number in surplus.items() if number > 0}


def bundles(world_size: int, executor: RayExecutor, driver_address: str) -> list[dict[str, float]]:
    """Return the bundles that vLLM asks Ray for (``initialize_ray_cluster`` in ``ray_utils.py``).

    :param driver_address: of the node of vLLM's engine; the older executor wants a GPU of it.
    """
    wanted: list[dict[str, float]] = [{"GPU": 1.0} for _ in range(world_size)]
    if executor == "v1":
        wanted[0][f"node:{driver_address}"] = _NODE_SHARE
    return wanted


def ray_arguments(layout: Layout) -> list[str]:
    """Return the ``vllm serve`` arguments of a layout whose ranks are placed by Ray.

    Its nodes are no argument: with this executor ``--nnodes`` is refused (``vllm/config/parallel.py``).

    :raises UnsupportedLayoutError: data parallelism, whose engines Ray places by rules of their own.
    """
    if layout.dp > 1:
        raise UnsupportedLayoutError(
            f"a layout that vLLM can spread over nodes through Ray was required, found {layout}\n"
            "  its data parallel engines (dp) are placed there by other rules, which this version does not check\n"
            f"  name the nodes, and vLLM's native way is taken: --gpu-layout={layout} --gpu-nodes=NAME,NAME"
        )
    return [*replace(layout, nodes=1).engine_arguments(), *RAY_ARGUMENTS]


def require_ray_order(layout: Layout, devices: Sequence[int], node: str) -> None:
    """Do nothing where the ranks of a node take its GPUs in ascending order, as they do with both Ray executors.

    :param devices: indices of the GPUs of a node, in order of its ranks. :param node: its name.
    :raises UnsupportedLayoutError: they do not.
    """
    if list(devices) != sorted(devices):
        found, wanted = (",".join(map(str, order)) for order in (devices, sorted(devices)))
        raise UnsupportedLayoutError(
            f"GPUs in ascending order are required for layout {layout} through Ray, found {found}\n"
            f"  chosen for the ranks of node {node}; vLLM sorts those that Ray gives it\n"
            f"  name them in that order: --gpu-devices={wanted}"
        )


def ray_environment(cluster_address: str, node_address: str) -> dict[str, str]:
    """Return what the environment of the API server needs, so that vLLM finds this cluster and is heard in full.

    :param cluster_address: ``HOST:PORT`` of the cluster's control store. :param node_address: of the server's node.

    Ray would fold lines of several workers into one (``RAY_DEDUP_LOGS``), and vLLM would take the address that leads
    to the internet (``get_ip`` in ``vllm/utils/network_utils.py``), which need not be the one that Ray knows.
    """
    return {ADDRESS_VARIABLE: cluster_address, "RAY_DEDUP_LOGS": "0", "VLLM_HOST_IP": node_address}


# -- which rank is where ---------------------------------------------------------------------------------------------


def rank_order(bundle_nodes: Sequence[str], driver: str) -> tuple[int, ...]:
    """Return the bundle of each rank as ``RayExecutorV2`` orders them: driver's node first, then by node id.

    Source: ``get_bundles_sorted_by_node`` in ``ray_utils.py``; bundles of one node keep their order.

    :param bundle_nodes: node id of each bundle. :param driver: id of the node that vLLM's engine runs on.
    """
    order = sorted(enumerate(bundle_nodes), key=lambda bundle: (bundle[1] != driver, bundle[1]))
    return tuple(index for index, _ in order)


def rank_order_v1(bundle_addresses: Sequence[str], driver: str) -> tuple[int, ...]:
    """Return the bundle of each rank as ``RayDistributedExecutor`` orders them.

    Driver's node first, then nodes with fewer workers, then by address, compared as text
    (``sort_by_driver_then_worker_ip`` in ``ray_executor.py``).

    :param bundle_addresses: of each bundle's node. :param driver: address of vLLM's engine.
    """
    workers = Counter(bundle_addresses)
    order = sorted(
        enumerate(bundle_addresses), key=lambda bundle: (bundle[1] != driver, workers[bundle[1]], bundle[1])
    )
    return tuple(index for index, _ in order)


def rank_of_worker(name: str, layout: Layout) -> int | None:
    """Return the rank that a worker's name tells; ``None`` for a name of something else, or of another layout.

    ``vllm_Worker_<instance>_TP1_PP0`` (``build_actor_name`` in ``ray_utils.py``): places of sizes of 1 are left out,
    and they count from the rank in the order tp, pp, pcp. Workers of ``RayDistributedExecutor`` have no name.
    """
    match = _WORKER_NAME.fullmatch(name)
    if match is None:
        return None
    places = {kind: int(number) for kind, number in _PLACE.findall(match["places"])}
    sizes = {"TP": layout.tp, "PP": layout.pp, "PCP": layout.pcp}
    if set(places) != {kind for kind, size in sizes.items() if size > 1}:
        return None
    if any(number >= sizes[kind] for kind, number in places.items()):
        return None
    tp, pp, pcp = (places.get(kind, 0) for kind in ("TP", "PP", "PCP"))
    return tp + layout.tp * (pp + layout.pp * pcp)


def workers_in_log(lines: Iterable[str], nodes: Sequence[RayNode]) -> tuple[RayWorker, ...]:
    """Return the ranks that the server's log tells of through Ray, each with its first line.

    Both executors write it, in this form; a worker on the node of the engine has no address::

        (EngineCore pid=42) (RayWorkerProc pid=97, ip=10.0.0.2) ... [parallel_state.py:1906] world_size=2 rank=1 ...

    What a request brings into the log comes later, and is not the first line of a rank.

    :param nodes: of the layout; the engine runs on the first one.
    """
    by_address = {node.address: node.node_id for node in nodes}
    found: dict[int, RayWorker] = {}
    for line in lines:
        plain = _COLOUR.sub("", line)
        prefix = _LOG_PREFIX.search(plain)
        told = _RANK.search(plain, prefix.end()) if prefix else None
        if prefix and told:
            rank, address = int(told["rank"]), prefix["ip"] or nodes[0].address
            found.setdefault(rank, RayWorker(rank, by_address.get(address, address), int(prefix["pid"])))
    return tuple(found[rank] for rank in sorted(found))


def dead_in_log(lines: Iterable[str]) -> tuple[int, ...]:
    """Return the ranks whose workers ended unasked, as vLLM's log tells; its older executor does not."""
    for line in lines:
        if found := _DEAD.search(_COLOUR.sub("", line)):
            return tuple(int(rank) for rank in found["ranks"].split(",") if rank.strip())
    return ()


def prove_ranks(
    workers: Iterable[RayWorker], layout: Layout, nodes: Sequence[RayNode]
) -> dict[int, tuple[RayNode, int]]:
    """Return where each rank is: its node and its process id there.

    :param workers: of the server. :param nodes: as :func:`choose_nodes` gave them.
    :raises NodeError: a rank is missing, twice there, or not on the node of the layout; it names the node.
    """
    by_id = {node.node_id: node for node in nodes}
    share = layout.ranks // layout.nodes
    found: dict[int, tuple[RayNode, int]] = {}
    for worker in workers:
        if worker.rank >= layout.ranks:
            continue
        wanted = nodes[worker.rank // share]
        if worker.node_id != wanted.node_id:
            there = f"node {by_id[worker.node_id].name}" if worker.node_id in by_id else f"another ({worker.node_id})"
            raise _misplaced(layout, worker.rank, wanted, f"it on {there}")
        if worker.rank in found:
            raise _misplaced(layout, worker.rank, wanted, f"processes {found[worker.rank][1]} and {worker.pid}")
        found[worker.rank] = (wanted, worker.pid)
    for rank in range(layout.ranks):
        if rank not in found:
            raise _misplaced(layout, rank, nodes[rank // share], "none")
    return dict(sorted(found.items()))


def _misplaced(layout: Layout, rank: int, wanted: RayNode, found: str) -> NodeError:
    return NodeError(
        f"one worker for rank {rank} of layout {layout} was required on node {wanted.name}, found {found}\n"
        "  in Ray's list of actors (vllm_Worker_...), or where those have no names in the server's log\n"
        "  see where its workers are (ray list actors), and run it on a cluster that nobody else uses (ray status)",
        node=wanted.name,
    )
