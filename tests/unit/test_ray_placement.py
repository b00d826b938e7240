"""Which rank lands on which node, as vLLM 0.32 decides it."""

from __future__ import annotations

import itertools

import pytest

from pytest_gpulayout.errors import NodeError, UnsupportedLayoutError
from pytest_gpulayout.layout import Layout, parse_layout
from pytest_gpulayout.ray_placement import (
    RayNode,
    RayWorker,
    bundles,
    choose_nodes,
    dead_in_log,
    executor_of,
    prove_ranks,
    rank_of_worker,
    rank_order,
    rank_order_v1,
    ray_arguments,
    ray_environment,
    require_ray_order,
    to_hold,
    workers_in_log,
)


def node(name: str, address: str = "", *, gpus: int = 4, free: int | None = None) -> RayNode:
    return RayNode(f"id-{name}", name, address or f"10.0.0.{ord(name)}", gpus, gpus if free is None else free)


A, B, C = node("a"), node("b"), node("c")


# -- the order of ranks ----------------------------------------------------------------------------------------------


def test_ranks_go_to_the_drivers_node_first_then_by_node_id_and_bundles_of_a_node_keep_their_order() -> None:
    # The example in the docstring of get_bundles_sorted_by_node, vllm/v1/executor/ray_utils.py.
    assert rank_order(["node-C", "node-A", "node-B", "node-C", "node-A", "node-B"], "node-A") == (1, 4, 2, 5, 0, 3)


def test_a_driver_without_gpus_changes_nothing() -> None:
    assert rank_order(["b", "a", "b", "a"], "driver") == (1, 3, 0, 2)


@pytest.mark.parametrize(
    ("addresses", "driver", "order"),
    [
        pytest.param(["10.0.0.2", "10.0.0.1"], "10.0.0.1", (1, 0), id="driver first"),
        pytest.param(["10.0.0.2", "10.0.0.2", "10.0.0.3"], "10.0.0.1", (2, 0, 1), id="fewer workers first"),
        pytest.param(["10.0.0.9", "10.0.0.10"], "10.0.0.1", (1, 0), id="addresses are text"),
        pytest.param(["2", "1", "2", "1"], "1", (1, 3, 0, 2), id="workers of a node keep their order"),
    ],
)
def test_the_older_executor_orders_by_driver_number_and_address(
    addresses: list[str], driver: str, order: tuple[int, ...]
) -> None:
    assert rank_order_v1(addresses, driver) == order


def vllms_name(instance: str, rank: int, tp: int, pp: int, pcp: int) -> str:
    """``build_actor_name`` of vllm/v1/executor/ray_utils.py, 0.32."""
    name = f"vllm_Worker_{instance}"
    if tp > 1:
        name += f"_TP{rank % tp}"
    if pp > 1:
        name += f"_PP{(rank // tp) % pp}"
    if pcp > 1:
        name += f"_PCP{rank // (tp * pp)}"
    return name


@pytest.mark.parametrize(("tp", "pp", "pcp"), list(itertools.product((1, 2, 3), (1, 2), (1, 2))))
def test_every_rank_is_read_from_the_name_that_vllm_gives_its_worker(tp: int, pp: int, pcp: int) -> None:
    layout = Layout(tp=tp, pp=pp, pcp=pcp)

    found = [rank_of_worker(vllms_name("3f2a1", rank, tp, pp, pcp), layout) for rank in range(layout.ranks)]

    assert found == list(range(layout.ranks))


@pytest.mark.parametrize(
    "name",
    ["", "trainer", "vllm_Worker_", "vllm_Worker_3f2a1", "vllm_Worker_3f2a1_TP2", "vllm_Worker_3f2a1_TP0_PP0"],
)
def test_a_name_that_does_not_fit_tells_no_rank(name: str) -> None:
    assert rank_of_worker(name, Layout(tp=2)) is None


# -- what is asked of Ray --------------------------------------------------------------------------------------------


def test_one_bundle_of_one_gpu_per_rank() -> None:
    assert bundles(2, "v2", "10.0.0.1") == [{"GPU": 1.0}, {"GPU": 1.0}]
    assert bundles(2, "v1", "10.0.0.1") == [{"GPU": 1.0, "node:10.0.0.1": 0.001}, {"GPU": 1.0}]


@pytest.mark.parametrize(
    ("environment", "executor"),
    [
        ({}, "v2"),
        ({"VLLM_USE_RAY_V2_EXECUTOR_BACKEND": "1"}, "v2"),
        ({"VLLM_USE_RAY_V2_EXECUTOR_BACKEND": "0"}, "v1"),
        ({"VLLM_RAY_BUNDLE_INDICES": ""}, "v2"),
    ],
)
def test_vllm_takes_its_new_executor_unless_told_otherwise(environment: dict[str, str], executor: str) -> None:
    assert executor_of(environment) == executor


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "true", "0 or 1 was expected, found 'true'"),
        ("VLLM_RAY_BUNDLE_INDICES", "1,0", "found one by hand: 1,0"),
    ],
)
def test_what_would_not_give_the_order_of_the_layout_is_refused(name: str, value: str, found: str) -> None:
    with pytest.raises(UnsupportedLayoutError) as caught:
        executor_of({name: value})

    assert found in str(caught.value)
    assert f"in the environment: {name}" in str(caught.value)
    assert f"unset {name}" in str(caught.value)


def test_arguments_name_the_executor_and_no_nodes() -> None:
    assert ray_arguments(parse_layout("tp8pp2@2")) == [
        *("--tensor-parallel-size", "8", "--pipeline-parallel-size", "2"),
        *("--distributed-executor-backend", "ray"),
    ]


def test_data_parallel_engines_are_refused() -> None:
    with pytest.raises(UnsupportedLayoutError, match=r"found dp2tp2@2\n.*\n.*--gpu-layout=dp2tp2@2 --gpu-nodes="):
        ray_arguments(parse_layout("dp2tp2@2"))


def test_the_server_is_told_its_cluster_and_the_address_that_ray_knows() -> None:
    assert ray_environment("10.0.0.1:6379", "10.0.0.2") == {
        "RAY_ADDRESS": "10.0.0.1:6379",
        "RAY_DEDUP_LOGS": "0",
        "VLLM_HOST_IP": "10.0.0.2",
    }


# -- nodes -----------------------------------------------------------------------------------------------------------


def test_the_node_of_the_test_run_comes_first_and_the_others_as_vllm_orders_them() -> None:
    far, near = RayNode("id-1", "far", "10.0.0.9", 4, 4), RayNode("id-2", "near", "10.0.0.3", 4, 4)
    home = RayNode("id-9", "home", "10.0.0.5", 4, 4)

    assert choose_nodes([far, near, home], 3, 4, "id-9") == (home, far, near)
    assert choose_nodes([far, near, home], 3, 4, "id-9", "v1") == (home, near, far)
    assert choose_nodes([far, near, home], 2, 4, "id-9") == (home, near)


def test_a_node_of_the_test_run_without_gpus_is_left_out() -> None:
    assert choose_nodes([node("h", gpus=0), B, A], 2, 4, "id-h") == (A, B)


def test_the_ranks_of_the_chosen_nodes_follow_each_other() -> None:
    nodes = choose_nodes([C, A, B], 3, 2, B.node_id)
    order = rank_order([one.node_id for one in (A, C, B, A, C, B)], nodes[0].node_id)

    assert [(A, C, B, A, C, B)[bundle] for bundle in order] == [one for one in nodes for _ in range(2)]


def test_too_few_nodes_are_listed_with_what_they_have() -> None:
    with pytest.raises(NodeError) as caught:
        choose_nodes([A, node("b", gpus=8, free=3)], 2, 4, A.node_id)

    assert str(caught.value).splitlines() == [
        "2 nodes with 4 GPUs free on each were required of the Ray cluster, found 1 of its 2",
        "  a (10.0.0.97): 4 of 4 GPUs free",
        "  b (10.0.0.98): 3 of 8 GPUs free",
        "  add nodes (ray start --address=HEAD:6379), free their GPUs (ray status), or take fewer nodes",
    ]
    assert caught.value.node == "b"


def test_without_gpus_only_the_number_of_nodes_counts() -> None:
    bare = [node("a", gpus=0), node("b", gpus=0)]

    assert choose_nodes(bare, 2, 0, "id-a") == tuple(bare)
    with pytest.raises(NodeError, match=r"^3 nodes were required of the Ray cluster, found 2 of its 2"):
        choose_nodes(bare, 3, 0, "id-a")


def test_all_but_the_share_of_each_node_is_held() -> None:
    assert to_hold([A, B, C], [A, B], 4) == {C.node_id: 4}
    assert to_hold([A, node("b", gpus=8, free=6), node("c", gpus=0)], [A, B], 1) == {A.node_id: 3, B.node_id: 5}
    assert to_hold([A, B], [A, B], 4) == {}


# -- where ranks are -------------------------------------------------------------------------------------------------

# Ray puts the first bracket before a line of a worker (print_worker_logs, python/ray/_private/worker.py), in colour
# also into a file, and vLLM's EngineCore one before that of its own output.
LOG = """\
(APIServer pid=40) INFO 11-21 10:00:00 [utils.py:300] non-default args: {'tensor_parallel_size': 2}
(EngineCore pid=42) (RayWorkerProc pid=77) INFO 11-21 10:00:09 [parallel_state.py:1906] world_size=2 rank=0 \
local_rank=0 distributed_init_method=tcp://10.0.0.97:4711 backend=nccl
(EngineCore pid=42) \x1b[36m(RayWorkerProc pid=78, ip=10.0.0.98)\x1b[0m INFO 11-21 10:00:09 [parallel_state.py:1906] \
world_size=2 rank=1 local_rank=0 distributed_init_method=tcp://10.0.0.97:4711 backend=nccl
(EngineCore pid=42) (RayWorkerProc pid=99, ip=10.0.0.99) INFO 11-21 10:01:09 [parallel_state.py:1906] world_size=2 \
rank=1 local_rank=0 distributed_init_method=tcp://10.0.0.97:4711 backend=nccl
(EngineCore pid=42) (RayWorkerProc pid=98, ip=10.0.0.98) INFO 11-21 10:01:10 [logger.py:40] prompt: world_size=2 \
rank=7 local_rank=0
"""


@pytest.mark.parametrize("kind", ["RayWorkerProc", "RayWorkerWrapper"])
def test_the_log_tells_address_and_process_of_each_rank_once(kind: str) -> None:
    lines = LOG.replace("RayWorkerProc", kind).splitlines()

    assert workers_in_log(lines, [A, B]) == (RayWorker(0, A.node_id, 77), RayWorker(1, B.node_id, 78))


def test_a_log_without_such_lines_proves_nothing() -> None:
    with pytest.raises(NodeError, match="rank 0 of layout tp2@2 was required on node a, found none"):
        prove_ranks(workers_in_log(LOG.splitlines()[:1], [A, B]), parse_layout("tp2@2"), [A, B])


def test_ranks_are_where_the_layout_has_them() -> None:
    workers = [RayWorker(rank, (A, B)[rank // 2].node_id, 100 + rank) for rank in (3, 1, 0, 2)]

    found = prove_ranks(workers, parse_layout("tp4@2"), [A, B])

    assert found == {0: (A, 100), 1: (A, 101), 2: (B, 102), 3: (B, 103)}
    assert list(found) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("workers", "message", "name"),
    [
        pytest.param([], "rank 0 of layout tp2@2 was required on node a, found none", "a", id="none"),
        pytest.param(
            [RayWorker(0, "id-a", 1)], "rank 1 of layout tp2@2 was required on node b, found none", "b", id="one"
        ),
        pytest.param(
            [RayWorker(0, "id-a", 1), RayWorker(1, "id-a", 2)],
            "rank 1 of layout tp2@2 was required on node b, found it on node a",
            "b",
            id="packed on one node",
        ),
        pytest.param(
            [RayWorker(0, "id-x", 1)], "was required on node a, found it on another (id-x)", "a", id="elsewhere"
        ),
        pytest.param(
            [RayWorker(0, "id-a", 1), RayWorker(0, "id-a", 2)],
            "rank 0 of layout tp2@2 was required on node a, found processes 1 and 2",
            "a",
            id="two servers",
        ),
    ],
)
def test_a_rank_that_is_missing_or_elsewhere_fails_with_its_node(
    workers: list[RayWorker], message: str, name: str
) -> None:
    with pytest.raises(NodeError) as caught:
        prove_ranks(workers, parse_layout("tp2@2"), [A, B])

    assert message in str(caught.value)
    assert caught.value.node == name


def test_the_ranks_that_vllm_saw_end_are_read_from_its_log() -> None:
    line = (
        "(EngineCore pid=42) ERROR 11-21 10:09:00 [ray_executor_v2.py:526] RayWorkerProc rank={} died unexpectedly, "
    )

    assert dead_in_log([*LOG.splitlines(), line.format("[3, 1]"), line.format("[0]")]) == (3, 1)
    assert dead_in_log(LOG.splitlines()) == ()
    assert dead_in_log(["prompt: RayWorkerProc rank=[1] died unexpectedly"]) == ()


def test_gpus_of_a_node_are_taken_in_ascending_order_alone() -> None:
    require_ray_order(parse_layout("tp4@2"), [0, 2], "a")

    with pytest.raises(UnsupportedLayoutError, match=r"found 2,0\n  chosen for the ranks of node a.*\n.*=0,2$"):
        require_ray_order(parse_layout("tp4@2"), [2, 0], "a")
