"""A server over two "nodes", agents of this host, with the fake vLLM: proved node by node, ended whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import requests

from pytest_gpulayout.adapters import node_server
from pytest_gpulayout.adapters.node_fleet import NodeFleet
from pytest_gpulayout.adapters.node_launcher import NodeLauncher
from pytest_gpulayout.adapters.node_server import NodeServer
from pytest_gpulayout.errors import NodeError, NodeLost, ServerError, ServerExited, ServerStartFailed
from pytest_gpulayout.evidence import collect_transport
from pytest_gpulayout.gate import PlacedLayout, place_on_nodes
from pytest_gpulayout.layout import parse_layout
from pytest_gpulayout.links import parse_requirement
from pytest_gpulayout.ports import Endpoint, ServerSpec
from pytest_gpulayout.workload import Workload
from tests.support.nodes import COMMAND, open_fleet, use_fake_vllm_on_nodes
from tests.support.processes import processes_marked, server_spec, wait_until

pytestmark = pytest.mark.end_to_end

FAILS_FOR_B = ("sh", "-c", 'test "$0" != b || exit 7; exec "$@"', "{node}")
Launch = Callable[..., NodeServer]


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:  # tmp_path is made before
    """Marks all processes of a test; none is left after it, and no file in their temporary folder."""
    with tempfile.TemporaryDirectory(prefix="gl-", dir="/tmp") as folder:
        name = f"TEST_MARKER={Path(folder).name}"
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setenv("TEST_MARKER", Path(folder).name)
        yield name
        wait_until(lambda: processes_marked(name) == {}, "the end of all processes", timeout_s=40)
        wait_until(lambda: os.listdir(folder) == [], "an empty temporary folder", timeout_s=30)


@pytest.fixture
def fleet(marker: str) -> Iterator[NodeFleet]:
    fleet = open_fleet()
    yield fleet
    fleet.close()


@pytest.fixture
def launch(fleet: NodeFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    """Launch a fake server over the nodes of the fleet."""
    monkeypatch.setattr(node_server, "FOLLOW_S", 0.1)
    servers: list[NodeServer] = []
    launcher = launcher_of(fleet, tmp_path)

    def launch(layout: str = "tp2@2", *, timeout_s: float = 40, **fake: object) -> NodeServer:
        use_fake_vllm_on_nodes(monkeypatch, **fake)
        server = launcher.launch(spec_of(place(fleet, layout), timeout_s), lambda _: None)
        assert isinstance(server, NodeServer)
        servers.append(server)
        return server

    yield launch
    for server in servers:
        server.stop()


def launcher_of(fleet: NodeFleet, folder: Path) -> NodeLauncher:
    return NodeLauncher(NoLauncher(), lambda _: fleet, folder)


class NoLauncher:
    def launch(self, spec: ServerSpec, progress: object) -> NodeServer:
        raise AssertionError("a layout over nodes is nothing for one host")


def place(fleet: NodeFleet, layout: str = "tp2@2") -> PlacedLayout:
    parsed = parse_layout(layout)
    return place_on_nodes(fleet.topologies(parsed, lambda _: None), parsed, None, parse_requirement("any"))


def spec_of(placed: PlacedLayout, timeout_s: float = 40) -> ServerSpec:
    arguments = ("--max-model-len", "64")
    return ServerSpec(placed.layout, "some/model", arguments, "cpu", placed.every_device, sys.executable, timeout_s)


def kill_main_process(server: NodeServer, node: int) -> None:
    """Of the node's part: the API server, or what only computes."""
    titles = {pid: process.title for pid, process in server._parts[node].processes().items()}
    (main_process,) = [pid for pid, title in titles.items() if " -m " in title]
    os.kill(main_process, signal.SIGKILL)


def death_of(server: NodeServer, within_s: float = 30) -> ServerError:
    """What a test is told when it asks for the server again and again."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            server.check_alive()
        except ServerError as error:
            return error
        time.sleep(0.05)
    raise AssertionError(f"the server still counts as alive after {within_s} s")


# -- up and proved ---------------------------------------------------------------------------------------------------


def test_server_is_proved_node_by_node(launch: Launch, fleet: NodeFleet) -> None:
    server = launch()
    assert server.proof.fingerprint == "vllm-0.32.0-tp2-abcdef12"
    assert [(node.name, node.ranks, node.address) for node in server.proof.nodes] == [
        ("a", (0,), "127.0.0.1"),
        ("b", (1,), "127.0.0.1"),
    ]
    head, follower = (" ".join(node.command) for node in server.proof.nodes)
    assert "--nnodes 2 --node-rank 0 --master-addr 127.0.0.1 --master-port" in head
    assert "--headless" in follower
    assert sorted(server.proof.rank_pids) == [0, 1]
    assert server.endpoint.url.startswith("http://127.0.0.1:")
    assert str(server.endpoint.api_key) not in head + follower
    of_follower = server.log.with_name("node-1.log")  # logs come over with the next poll
    wait_until(lambda: "Starting vLLM server" in server.log.read_text(), "the head's log")
    wait_until(lambda: "headless multiproc executor" in of_follower.read_text(), "the follower's log")
    assert server.parts() == (server,)
    assert server.gpu_processes() is None


def test_ranks_of_two_nodes_are_seen_to_talk_over_sockets(launch: Launch, fleet: NodeFleet) -> None:
    server = launch()
    report = collect_transport(server, place(fleet))
    assert (report.verdict, report.transports) == ("socket", {"CPU/GLOO": 2})
    assert server.mapped_segments() == {0: [], 1: []}


def test_load_is_watched_on_all_nodes(launch: Launch) -> None:
    server = launch()
    workload = Workload(name="w", input_tokens=4, output_tokens=2, concurrency=1, requests=1, batches=1)
    with server.watch(server.endpoint, workload) as _, server.watch_devices() as devices:
        complete(server.endpoint)
    telemetry = devices.seen  # type: ignore[attr-defined]
    assert [own.node for own in telemetry.on_nodes] == ["a", "b"]
    assert all(own.sample_ns for own in telemetry.on_nodes), telemetry.notes


def complete(endpoint: Endpoint) -> None:
    body = {"model": endpoint.model, "prompt": "Hello", "max_tokens": 2}
    headers = {"Authorization": f"Bearer {endpoint.api_key}"}
    assert requests.post(f"{endpoint.url}/v1/completions", json=body, headers=headers, timeout=10).status_code == 200


def test_servers_one_after_the_other_on_the_same_nodes(launch: Launch) -> None:
    first = launch()
    first.stop()
    second = launch()
    assert first.log != second.log
    assert first.log.read_text()
    complete(second.endpoint)


# -- not up ----------------------------------------------------------------------------------------------------------


def test_part_that_does_not_start_is_named_with_its_cause(launch: Launch) -> None:
    ending = {"exit_at_start": {"code": 1, "log": ["OSError: [Errno 98] Address already in use"]}}
    with pytest.raises(ServerStartFailed) as raised:
        launch(nodes={"1": ending})
    message = str(raised.value)
    assert message.startswith("vLLM did not start layout tp2@2: its part on node b")
    assert "ended (exit code 1)\n  cause, on node b: OSError: [Errno 98] Address already in use" in message
    assert "--headless" in message


def test_rank_that_is_missing_on_its_node(launch: Launch) -> None:
    with pytest.raises(ServerStartFailed, match=r"tp2@2 needs ranks 0 on node a[^\n]*, found none\n.*EngineCore"):
        launch(missing_worker=0)


def test_another_layout_than_that_asked_for(launch: Launch) -> None:
    with pytest.raises(ServerStartFailed, match="the server says it is tp1, tp2 was asked for"):
        launch(fingerprint="vllm-0.32.0-abcdef12")


def test_another_python_than_the_one_of_the_nodes(tmp_path: Path) -> None:
    spec = replace(server_spec("tp2@2"), python="/opt/vllm-old/bin/python")
    with pytest.raises(ServerStartFailed, match=r"found another to start: /opt/vllm-old/bin/python\n  in --gpu-base"):
        launcher_of(open_fleet(), tmp_path).launch(spec, lambda _: None)


def test_node_that_cannot_be_reached_is_named(marker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_vllm_on_nodes(monkeypatch)
    fleet = open_fleet(command=FAILS_FOR_B)
    with pytest.raises(NodeError, match=r"node b must answer, .* its agent has ended \(exit code 7\)") as raised:
        fleet.nodes(parse_layout("tp2@2"), lambda _: None)
    assert raised.value.node == "b"
    assert processes_marked(marker) == {}


def test_all_nodes_that_cannot_be_reached_are_named(marker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_vllm_on_nodes(monkeypatch)
    fleet = open_fleet(["a", "b", "c"], command=("sh", "-c", 'test "$0" = a || exit 7; exec "$@"', "{node}"))
    with pytest.raises(NodeError, match=r"node b must answer,[\s\S]*nor do these answer as they must: c"):
        fleet.nodes(parse_layout("tp3@3"), lambda _: None)


# -- gone ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("node", "name"), [(1, "b"), (0, "a")], ids=["follower", "head"])
def test_part_that_ends_is_named_and_takes_others_along(launch: Launch, marker: str, node: int, name: str) -> None:
    server = launch()
    kill_main_process(server, node)
    error = death_of(server)
    assert isinstance(error, ServerExited)
    assert f"went away while it was in use: its part on node {name}" in str(error)
    server.stop()
    assert not [title for title in processes_marked(marker).values() if "VLLM" in title or "vllm" in title]


def test_node_that_is_lost_is_named_and_takes_all_others_along(launch: Launch, fleet: NodeFleet, marker: str) -> None:
    server = launch()
    nodes = fleet.nodes(parse_layout("tp2@2"), lambda _: None)
    os.kill(nodes[1].facts.pid, signal.SIGKILL)
    error = death_of(server)
    assert isinstance(error, NodeLost)
    assert error.node == "b"
    assert "node b must stay while a layout runs on it, and is lost" in str(error)
    server.stop()
    wait_until(lambda: processes_marked(marker) == {}, "the end of all processes", timeout_s=40)
    complete(launch().endpoint)  # the nodes are opened anew


def test_node_that_is_lost_while_the_server_loads(
    fleet: NodeFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_fake_vllm_on_nodes(monkeypatch, hang_at_start=True)
    spec = spec_of(place(fleet))
    agent = fleet.nodes(spec.layout, lambda _: None)[1].facts.pid

    def kill_when_it_loads(text: str) -> None:
        if "vLLM is loading" in text and agent not in killed:
            killed.append(agent)
            os.kill(agent, signal.SIGKILL)

    killed: list[int] = []
    began = time.monotonic()
    with pytest.raises(NodeLost, match="node b must stay while a layout runs on it, and is lost"):
        launcher_of(fleet, tmp_path).launch(spec, kill_when_it_loads)
    assert time.monotonic() - began < 30


def test_killed_test_run_leaves_nothing(marker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_vllm_on_nodes(monkeypatch)
    command = [sys.executable, __file__, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline().startswith("http://127.0.0.1:")
        assert len(processes_marked(marker)) > 6
        run.kill()
    wait_until(lambda: processes_marked(marker) == {}, "the end of all processes", timeout_s=40)


def main(arguments: Sequence[str]) -> None:
    """A test run that can be killed: it launches a server, prints its URL, and lives."""
    fleet = open_fleet(command=COMMAND)
    server = launcher_of(fleet, Path(arguments[0])).launch(spec_of(place(fleet)), lambda _: None)
    sys.stdout.write(f"{server.endpoint.url}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1:])
