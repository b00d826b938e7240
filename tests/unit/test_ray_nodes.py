"""Nodes of a Ray cluster, through the process that talks to Ray; Ray itself is that of ``tests/support/fake_ray``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_gpulayout.adapters import ray_nodes as module
from pytest_gpulayout.adapters.node_command import CommandChannel, CommandNodes
from pytest_gpulayout.adapters.ray_nodes import RayNodes, last_error, ray_nodes
from pytest_gpulayout.errors import NodeError, NodeLost
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.ray_placement import RayNode
from pytest_gpulayout.settings import NodeChoice
from pytest_gpulayout.wiring import Wiring

pytestmark = pytest.mark.end_to_end

FAKE_RAY = Path(__file__).parents[1] / "support" / "fake_ray"
AGENT = """
import json, os, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["method"] == "die":
        os._exit(3)
    print(json.dumps({"id": request["id"], "result": request["method"].upper()}), flush=True)
    if request["method"] == "bye":
        break
"""


def entries(address: str, gpus: int, *, name: str = "", host: str = "", alive: bool = True) -> dict[str, Any]:
    """A node as ``ray.nodes()`` lists it."""
    return {
        "NodeManagerAddress": address,
        "NodeName": name or address,
        "NodeManagerHostname": host,
        "Resources": {"CPU": 4.0} | ({"GPU": float(gpus)} if gpus else {}),
        "Alive": alive,
    }


CLUSTER: dict[str, Any] = {
    "address": "10.0.0.1:6379",
    "home": "aa",
    "nodes": {
        "aa": entries("10.0.0.1", 2, host="gpu-1"),
        "bb": entries("10.0.0.2", 4, host="gpu-2"),
        "cc": entries("10.0.0.3", 0, host="head"),
        "dd": entries("10.0.0.4", 8, host="gpu-4", alive=False),
    },
    "free": {"aa": ["0", "1"], "bb": ["0", "1", "2", "3"]},
}

UseCluster = Callable[..., None]
OpenNodes = Callable[[RayNodes, int], Sequence[CommandChannel]]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> UseCluster:
    """Says what the cluster is like from now on: the one above, but for changes."""
    monkeypatch.setenv("PYTHONPATH", str(FAKE_RAY))

    def use(**changes: Any) -> None:
        monkeypatch.setenv("FAKE_RAY", json.dumps(CLUSTER | changes))

    use()
    return use


@pytest.fixture
def open_nodes(cluster: UseCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenNodes]:
    """Opens nodes on which an agent answers in capitals, and closes them in the end."""
    monkeypatch.setattr(module, "AGENT", ("-c", AGENT))
    with ExitStack() as stack:

        def opened(nodes: RayNodes, count: int) -> Sequence[CommandChannel]:
            channels = nodes.open(count, ignore)
            for channel in channels:
                stack.callback(channel.close)
            return channels

        yield opened


def ignore(text: str) -> None:
    pass


def hello(channel: CommandChannel) -> Any:
    return channel.request("hello", {}, timeout_s=20)


# -- channels --------------------------------------------------------------------------------------------------------


def test_an_agent_runs_on_each_node_in_the_order_of_the_ranks(open_nodes: OpenNodes) -> None:
    channels = open_nodes(RayNodes("auto", 1), 2)

    assert [channel.name for channel in channels] == ["gpu-1", "gpu-2"]
    assert [hello(channel) for channel in channels] == ["HELLO", "HELLO"]


def test_dead_nodes_and_those_without_gpus_do_not_count(open_nodes: OpenNodes) -> None:
    with pytest.raises(NodeError) as caught:
        open_nodes(RayNodes("auto", 1), 3)

    assert str(caught.value).splitlines()[:2] == [
        "3 nodes with 1 GPU free on each were required of the Ray cluster, found 2 of its 3",
        "  gpu-1 (10.0.0.1): 2 of 2 GPUs free",
    ]
    assert caught.value.node == "head"


def test_a_node_whose_agent_cannot_be_started_leaves_no_other_one(
    cluster: UseCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Starting(CommandChannel):
        def __init__(self, name: str, command: Sequence[str]) -> None:
            events.append(f"start {name}")
            if name == "gpu-2":
                raise NodeError("no process", node=name)

        def close(self) -> None:
            events.append("close")

    monkeypatch.setattr(module, "CommandChannel", Starting)

    with pytest.raises(NodeError, match="no process"):
        RayNodes("auto", 1).open(2, ignore)

    assert events == ["start gpu-1", "start gpu-2", "close"]


def test_a_node_that_goes_is_lost_with_ray_s_words_and_the_others_stay(
    open_nodes: OpenNodes, cluster: UseCluster
) -> None:
    cluster(lost=["bb"])
    first, second = open_nodes(RayNodes("auto", 1), 2)

    with pytest.raises(NodeError) as caught:
        hello(second)

    assert "The actor died unexpectedly before finishing this task.; Its node has gone." in str(caught.value)
    assert caught.value.node == "gpu-2"
    assert hello(first) == "HELLO"


def test_an_agent_that_dies_is_a_lost_node(open_nodes: OpenNodes) -> None:
    first, second = open_nodes(RayNodes("auto", 1), 2)
    hello(second)

    with pytest.raises(NodeLost, match="node gpu-2 must stay while a layout runs on it, and is lost"):
        second.request("die", {}, timeout_s=20)

    assert hello(first) == "HELLO"


def test_the_agent_runs_in_ray_s_interpreter_unless_another_is_named() -> None:
    node = RayNode("aa", "gpu-1", "10.0.0.1", 1, 1)
    *_, task, wish = RayNodes("auto", 1).command(node, ["{python}", "-V"])

    assert task == "run"
    assert json.loads(wish) == {"address": "auto", "node": "aa", "command": ["{python}", "-V"]}


# -- what can go wrong before ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "address", "lines"),
    [
        pytest.param(
            {"error": "Could not find any running Ray instance."},
            "auto",
            ["a Ray cluster that answers is required", "Could not find any running Ray instance.", ": ray status"],
            id="nobody answers",
        ),
        pytest.param(
            {
                "error": "Version mismatch: The cluster was started with:\n    Ray: 2.40.0\n    Python: 3.10.1\n"
                "This process was started with:\n    Ray: 2.99.0\n    Python: 3.11.7",
                "error_type": "RuntimeError",
            },
            "auto",
            ["the Ray cluster's own versions of Ray and Python are required", "Ray: 2.40.0; Python: 3.10.1", "ray=="],
            id="other versions",
        ),
        pytest.param(
            {
                "log": "[W 30042] gcs_client.cc:210: Failed to get cluster ID from GCS server: Unauthenticated: RPC "
                "error: InvalidAuthToken: Authentication token is missing or incorrect\n",
                "error": "Failed to connect to Ray cluster at 10.0.0.1:6379",
            },
            "10.0.0.1:6379",
            ["the token of the Ray cluster is required", "Failed to connect to Ray cluster", "RAY_AUTH_TOKEN_PATH"],
            id="another token",
        ),
        pytest.param(
            {"error": "Token authentication is enabled but no authentication token was found.\nEnsure that ..."},
            "auto",
            ["the token of the Ray cluster is required: Token authentication is enabled", "RAY_AUTH_MODE=token"],
            id="no token",
        ),
        pytest.param(
            {},
            "ray://10.0.0.1:10001",
            ["as its nodes know it is required", "at RAY_ADDRESS=ray://10.0.0.1:10001", "RAY_ADDRESS=auto"],
            id="Ray client",
        ),
        pytest.param(
            {"error": "a bug", "error_type": "ZeroDivisionError"},
            "auto",
            ["a Ray cluster that answers is required", "ZeroDivisionError: a bug"],
            id="something else",
        ),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_told_with_what_to_do(
    cluster: UseCluster, state: dict[str, str], address: str, lines: list[str]
) -> None:
    cluster(**state)

    with pytest.raises(NodeError) as caught:
        RayNodes(address, 1).open(1, ignore)

    assert [line for line in lines if line not in str(caught.value)] == []
    assert caught.value.node == address


def test_a_cluster_that_never_answers_is_given_up(cluster: UseCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(silent=True)
    monkeypatch.setattr(module, "_LIMIT_S", 1)

    with pytest.raises(NodeError, match="no answer within 1 s"):
        RayNodes("auto", 1).open(1, ignore)


def test_without_ray_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\nfound = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'ray' else found(name, *more)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    with pytest.raises(NodeError) as caught:
        RayNodes("auto", 1).open(1, ignore)

    assert "the package ray is not installed in " in str(caught.value)
    assert "pip install 'pytest-gpulayout[ray]'" in str(caught.value)


def test_a_python_that_is_not_there_is_named() -> None:
    with pytest.raises(NodeError, match="/no/such/python: No such file or directory"):
        RayNodes("auto", 1, python="/no/such/python").open(1, ignore)


# -- vLLM's executor -------------------------------------------------------------------------------------------------


def test_the_server_gets_the_address_of_the_cluster_not_the_word_of_the_user(open_nodes: OpenNodes) -> None:
    nodes = RayNodes("auto", 1)
    open_nodes(nodes, 2)

    assert nodes.environment()["RAY_ADDRESS"] == "10.0.0.1:6379"
    assert nodes.environment()["VLLM_HOST_IP"] == "10.0.0.1"


def test_nothing_is_held_where_all_gpus_are_used(
    open_nodes: OpenNodes, cluster: UseCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster(free={"aa": ["0", "1"], "bb": ["2", "3"]})
    nodes = RayNodes("auto", 2)
    open_nodes(nodes, 2)
    monkeypatch.setattr(RayNodes, "_start", pytest.fail)

    with nodes.held(parse_layout("tp4@2")):
        pass


def test_gpus_are_held_while_the_server_starts(open_nodes: OpenNodes) -> None:
    nodes = RayNodes("auto", 1)
    open_nodes(nodes, 2)

    with nodes.held(parse_layout("tp2@2"), {"bb": [["2", "GPU-2"]]}):
        pass


def test_gpus_that_somebody_took_meanwhile_stop_the_start(open_nodes: OpenNodes) -> None:
    nodes = RayNodes("auto", 1)
    open_nodes(nodes, 2)

    with (
        pytest.raises(NodeError, match="GPU 7 of node bb is not free") as caught,
        nodes.held(parse_layout("tp2@2"), {"bb": [["7"]]}),
    ):
        pytest.fail("nothing is held")

    assert "ray status" in str(caught.value)


def actor(name: str | None, node: str, pid: int, *, job: str = "01", state: str = "ALIVE") -> dict[str, Any]:
    return {
        "Name": name,
        "ActorClassName": "RayWorkerProc",
        "Address": {"NodeID": node},
        "Pid": pid,
        "JobID": job,
        "State": state,
    }


JOBS = [
    {"JobID": "01", "DriverPid": 42, "DriverIPAddress": "10.0.0.1", "IsDead": False},
    {"JobID": "02", "DriverPid": 43, "DriverIPAddress": "10.0.0.1", "IsDead": False},
    {"JobID": "03", "DriverPid": 42, "DriverIPAddress": "10.0.0.2", "IsDead": False},
    {"JobID": "04", "DriverPid": 42, "DriverIPAddress": "10.0.0.1", "IsDead": True},
]
ACTORS = [
    actor("vllm_Worker_3f2a1_TP1", "bb", 78),
    actor("vllm_Worker_3f2a1_TP0", "aa", 77),
    actor(None, "aa", 79),
    actor("vllm_Worker_3f2a1_TP1", "bb", 70, state="DEAD"),
    *(actor("vllm_Worker_99999_TP1", "aa", 80, job=job) for job in ("02", "03", "04")),
]


def test_ranks_are_those_workers_that_the_server_itself_has_started(
    open_nodes: OpenNodes, cluster: UseCluster
) -> None:
    cluster(jobs=JOBS, actors=ACTORS)
    nodes = RayNodes("auto", 1)
    open_nodes(nodes, 2)

    found = nodes.ranks(parse_layout("tp2@2"), [40, 42], [])

    assert {rank: (node.name, pid) for rank, (node, pid) in found.items()} == {0: ("gpu-1", 77), 1: ("gpu-2", 78)}


def test_a_rank_that_ray_put_elsewhere_fails_with_the_node(open_nodes: OpenNodes, cluster: UseCluster) -> None:
    cluster(jobs=JOBS, actors=[actor("vllm_Worker_3f2a1_TP0", "aa", 77), actor("vllm_Worker_3f2a1_TP1", "aa", 78)])
    nodes = RayNodes("auto", 1)
    open_nodes(nodes, 2)

    with pytest.raises(NodeError, match="rank 1 of layout tp2@2 was required on node gpu-2, found it on node gpu-1"):
        nodes.ranks(parse_layout("tp2@2"), [42], [])


def test_workers_of_the_older_executor_are_known_by_the_log(open_nodes: OpenNodes) -> None:
    nodes = RayNodes("auto", 1, executor="v1")
    open_nodes(nodes, 2)
    line = "(RayWorkerWrapper pid={}{}) INFO 11-21 10:00:09 [parallel_state.py:1906] world_size=2 rank={} local_rank="

    found = nodes.ranks(parse_layout("tp2@2"), [42], [line.format(77, "", 0), line.format(78, ", ip=10.0.0.2", 1)])

    assert {rank: (node.name, pid) for rank, (node, pid) in found.items()} == {0: ("gpu-1", 77), 1: ("gpu-2", 78)}


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "names"),
    [
        pytest.param([("", "gpu-1", "10.0.0.1"), ("", "gpu-2", "10.0.0.2")], ["gpu-1", "gpu-2"], id="host names"),
        pytest.param([("left", "x", "10.0.0.1"), ("", "x", "10.0.0.2")], ["left", "10.0.0.2"], id="given, address"),
        pytest.param(
            [("", "x", "127.0.0.1"), ("", "x", "127.0.0.1")],
            ["127.0.0.1 (00000000)", "127.0.0.1 (11111111)"],
            id="all the same",
        ),
    ],
)
def test_names_of_nodes_are_those_that_people_know_and_no_two_are_the_same(
    given: list[tuple[str, str, str]], names: list[str]
) -> None:
    found = ray_nodes(
        [
            {"id": str(i) * 56, "name": name or at, "hostname": host, "address": at, "gpus": 1, "free_gpus": 0}
            for i, (name, host, at) in enumerate(given)
        ]
    )

    assert [node.name for node in found] == names
    assert found[0] == RayNode("0" * 56, names[0], given[0][2], 1, 0)


@pytest.mark.parametrize("errors", ["", "Traceback\nKeyError: 1", '{"error": "lost", "text": "x"}\nthen more'])
def test_only_the_last_line_of_the_driver_is_its_word(errors: str) -> None:
    assert last_error(errors) is None


# -- which nodes a run takes -----------------------------------------------------------------------------------------


def source_of(platform: str = "cuda", **nodes: Any) -> Any:
    """Where a run with ``tp2@2`` and ``tp4@2`` gets its nodes from."""
    config: Any = SimpleNamespace(hook=SimpleNamespace(pytest_gpulayout_node_source=lambda **asked: None))
    layouts = tuple(map(parse_layout, ("tp1", "tp2@2", "tp4@2")))
    settings: Any = SimpleNamespace(platform=platform, layouts=layouts, nodes=NodeChoice(**nodes))
    fleet = Wiring(config, settings).fleet(layouts[1])
    return None if fleet is None else vars(fleet)["_source"]


def test_nodes_come_from_ray_where_the_environment_names_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")

    found = source_of(python="/opt/python")

    assert isinstance(found, RayNodes)
    assert {name: value for name, value in vars(found).items() if name != "_python"} == {
        "_address": "10.0.0.1:6379",
        "_gpus_per_node": 2,
        "_executor": "v2",
        "_node_python": "/opt/python",
        "_cluster": None,
        "nodes": (),
    }


def test_without_gpus_no_node_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")

    assert vars(source_of("cpu"))["_gpus_per_node"] == 0
    assert vars(source_of("cpu"))["_node_python"] == "{python}"


def test_nodes_that_the_user_names_come_before_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")

    assert isinstance(source_of(names=("a", "b"), command=("ssh", "{node}")), CommandNodes)


@pytest.mark.parametrize("address", ["", " ", None])
def test_without_either_there_are_no_nodes(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)

    assert source_of() is None
