"""A real Ray cluster of two nodes on this host: placement, collection, the failure of a node, and nothing left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_gpulayout.adapters.node_command import CommandChannel
from pytest_gpulayout.adapters.ray_nodes import RayNodes
from pytest_gpulayout.errors import NodeError, NodeLost
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.ray_placement import RayNode, bundles
from tests.support.processes import wait_until
from tests.support.ray_cluster import ADDRESSES, GPUS, NEEDS_RAY, RayHosts

pytestmark = NEEDS_RAY

# The steps by which vLLM 0.32 places its workers (initialize_ray_cluster and get_bundles_sorted_by_node in
# vllm/v1/executor/ray_utils.py, RayExecutorV2._init_executor in ray_executor_v2.py), with workers that do nothing.
ENGINE = """
import json, os, sys
import ray
from ray.util import placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

class RayWorkerProc:
    def where(self):
        context = ray.get_runtime_context()
        return os.getpid(), context.get_node_id(), context.get_accelerator_ids()["GPU"]

ray.init(log_to_driver=False)
bundles = json.loads(sys.argv[1])
group = placement_group(bundles, strategy="PACK")
ray.get(group.ready(), timeout=60)
node_of = placement_group_table(group)["bundles_to_node_id"]
driver = ray.get_runtime_context().get_node_id()
order = sorted(range(len(bundles)), key=lambda bundle: (0 if node_of[bundle] == driver else 1, node_of[bundle]))
workers = [
    ray.remote(RayWorkerProc)
    .options(
        name=f"vllm_Worker_3f2a1_TP{rank}" if len(bundles) > 1 else "vllm_Worker_3f2a1",
        num_cpus=0,
        num_gpus=1,
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=bundle
        ),
    )
    .remote()
    for rank, bundle in enumerate(order)
]
print(json.dumps({"driver": driver, "workers": ray.get([worker.where.remote() for worker in workers])}), flush=True)
sys.stdin.read()
"""
# vLLM's own functions, on the CPU build, which only lacks the name of Ray's resource.
VLLM_PLACES = """
import json
from types import SimpleNamespace
import ray
from vllm.platforms import current_platform
type(current_platform).ray_device_key = "GPU"
from vllm.v1.executor import ray_utils
config = SimpleNamespace(world_size=2, tensor_parallel_size=2, placement_group=None, ray_runtime_env=None)
ray_utils.initialize_ray_cluster(config, require_gpu_on_driver=False)
specs = config.placement_group.bundle_specs
found = ray_utils.get_bundles_sorted_by_node(config.placement_group)
names = [ray_utils.build_actor_name("3f2a1", rank, 2, 1, 1) for rank in range(2)]
driver = ray.get_runtime_context().get_node_id()
print(json.dumps({"specs": specs, "nodes": [node for _, node, _ in found], "names": names, "driver": driver}))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHosts]:
    cluster = RayHosts(tmp_path_factory.mktemp("ray"))
    try:
        cluster.start(ADDRESSES[0])
        cluster.start(ADDRESSES[1])
        yield cluster
    finally:
        cluster.stop()


def ignore(text: str) -> None:
    pass


@contextmanager
def opened(nodes: RayNodes, count: int) -> Iterator[Sequence[CommandChannel]]:
    with ExitStack() as stack:
        channels = nodes.open(count, ignore)
        for channel in channels:
            stack.enter_context(closing(channel))
        yield channels


@contextmanager
def engine(cluster: RayHosts, world_size: int) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Workers that are placed as vLLM places its own; process id of their driver, and where they are."""
    command = [sys.executable, "-c", ENGINE, json.dumps(bundles(world_size, "v2", ""))]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            yield process.pid, json.loads(process.stdout.readline())
        finally:
            process.kill()


def await_free_gpus(cluster: RayHosts) -> None:
    """What ended a moment ago has given its GPUs back."""
    wait_until(lambda: all(node.free_gpus == GPUS for node in known_nodes(cluster)), "free GPUs", timeout_s=30)


def known_nodes(cluster: RayHosts) -> Sequence[RayNode]:
    nodes = RayNodes(cluster.address, 0)
    nodes.choose(2)
    return nodes.nodes


# -- collection ------------------------------------------------------------------------------------------------------


def test_each_node_tells_who_it_is_and_what_it_has(cluster: RayHosts) -> None:
    with opened(RayNodes(cluster.address, 1), 2) as channels:
        facts = [channel.request("hello", {"environment": {}}, timeout_s=30) for channel in channels]
        wish = {"platform": "cpu", "ranks": 1, "first_rank": 0, "all_ranks": 1}
        topologies = [channel.request("topology", wish, timeout_s=30) for channel in channels]

    assert sorted(channel.name for channel in channels) == list(ADDRESSES[:2])
    assert len({fact["pid"] for fact in facts}) == 2
    assert {fact["python"] for fact in facts} == {sys.executable}
    assert [document["topology"]["platform"] for document in topologies] == ["cpu", "cpu"]


def test_too_few_nodes_are_told_with_what_there_is(cluster: RayHosts) -> None:
    with pytest.raises(NodeError) as caught:
        RayNodes(cluster.address, GPUS + 1).open(2, ignore)

    assert "2 nodes with 3 GPUs free on each were required of the Ray cluster, found 0 of its 2" in str(caught.value)
    assert "127.0.0.3 (127.0.0.3): 2 of 2 GPUs free" in str(caught.value)


def test_nobody_at_the_address_is_told_at_once() -> None:
    with pytest.raises(NodeError, match=r"a Ray cluster that answers is required.*: nobody listens there"):
        RayNodes("127.0.0.1:1", 1).open(1, ignore)


# -- placement -------------------------------------------------------------------------------------------------------


def test_vllm_s_request_is_packed_on_one_node_and_that_is_found(cluster: RayHosts) -> None:
    nodes = RayNodes(cluster.address, 1)
    with opened(nodes, 2), engine(cluster, 2) as (driver, seen):
        assert len({node for _, node, _ in seen["workers"]}) == 1
        with pytest.raises(NodeError, match="of layout tp2@2 was required on node "):
            nodes.ranks(parse_layout("tp2@2"), [driver], [])


def test_with_the_surplus_held_each_node_gets_its_share_and_ranks_are_proved(cluster: RayHosts) -> None:
    await_free_gpus(cluster)
    nodes = RayNodes(cluster.address, 1)
    with opened(nodes, 2), ExitStack() as held:
        left = {node.node_id: [["1", "GPU-1"]] for node in nodes.nodes}
        held.enter_context(nodes.held(parse_layout("tp2@2"), left))
        with engine(cluster, 2) as (driver, seen):
            held.close()
            found = nodes.ranks(parse_layout("tp2@2"), [driver], [])

    assert seen["driver"] == nodes.nodes[0].node_id
    assert [node for _, node, _ in seen["workers"]] == [node.node_id for node in nodes.nodes]
    assert [gpus for _, _, gpus in seen["workers"]] == [["1"], ["1"]]
    assert {rank: (node.node_id, pid) for rank, (node, pid) in found.items()} == {
        rank: (node, pid) for rank, (pid, node, _) in enumerate(seen["workers"])
    }


@pytest.mark.real_vllm
def test_vllm_s_own_functions_place_ranks_so(cluster: RayHosts) -> None:
    await_free_gpus(cluster)
    nodes = RayNodes(cluster.address, 1)
    environment = {**os.environ, "RAY_ADDRESS": cluster.address, "VLLM_TARGET_DEVICE": "cpu"}
    with opened(nodes, 2), nodes.held(parse_layout("tp2@2")):
        done = subprocess.run(
            [sys.executable, "-c", VLLM_PLACES], env=environment, capture_output=True, text=True, timeout=300
        )

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.strip().rpartition("\n")[2])
    assert told["specs"] == bundles(2, "v2", "")
    assert told["driver"] == nodes.nodes[0].node_id
    assert told["nodes"] == [node.node_id for node in nodes.nodes]
    assert told["names"] == ["vllm_Worker_3f2a1_TP0", "vllm_Worker_3f2a1_TP1"]


# -- ends ------------------------------------------------------------------------------------------------------------


def folders() -> set[str]:
    return {str(path) for path in Path(tempfile.gettempdir()).glob("gpulayout-node-*")}


def ask_until(end_s: float, channel: CommandChannel) -> None:
    while time.monotonic() < end_s:
        channel.request("ports", {"address": "127.0.0.1", "count": 1}, timeout_s=20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_test_run_that_is_killed_leaves_no_agent(cluster: RayHosts, number: signal.Signals) -> None:
    before = folders()
    with opened(RayNodes(cluster.address, 1), 2) as channels:
        pids = [channel.request("hello", {"environment": {}}, timeout_s=30)["pid"] for channel in channels]
        assert folders() - before
        for process in psutil.Process().children():
            if "ray_driver.py" in " ".join(process.cmdline()):
                process.send_signal(number)
        wait_until(lambda: not any(map(psutil.pid_exists, pids)), "the end of the agents", timeout_s=30)
        wait_until(lambda: folders() == before, "the end of their folders", timeout_s=30)


def test_a_node_that_is_cut_off_is_lost_by_name_and_leaves_nothing(cluster: RayHosts) -> None:
    before = folders()
    cluster.start(ADDRESSES[2])
    with opened(RayNodes(cluster.address, 1), 3) as channels:
        facts = {
            channel.name: channel.request("hello", {"environment": {}}, timeout_s=30)["pid"] for channel in channels
        }
        third = next(channel for channel in channels if channel.name == ADDRESSES[2])
        began = time.monotonic()
        cluster.kill(ADDRESSES[2])
        with pytest.raises(NodeLost) as caught:
            ask_until(began + 60, third)
        assert time.monotonic() - began < 30
        assert caught.value.node == ADDRESSES[2]
        assert f"node {ADDRESSES[2]} must stay while a layout runs on it, and is lost" in str(caught.value)
        for channel in channels:
            if channel is not third:
                assert channel.request("ports", {"address": "127.0.0.1", "count": 1}, timeout_s=20)
    wait_until(lambda: not any(map(psutil.pid_exists, facts.values())), "the end of the agents", timeout_s=30)
    wait_until(lambda: folders() == before, "the end of their folders", timeout_s=30)
