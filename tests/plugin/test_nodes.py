"""Layouts over several nodes, as users ask for them: options, what is refused, and one report of all nodes."""

from __future__ import annotations

import shlex
import sys

import pytest

from tests.support.nodes import COMMAND, use_fake_vllm_on_nodes
from tests.support.processes import processes_marked, wait_until
from tests.support.suite import Suite

TESTS = """
def test_links(gpu_topology): gpu_topology.assert_links()
def test_server(vllm_server): assert sorted(vllm_server.pids) == [0, 1]
"""
NODES = """
def pytest_gpulayout_node_source(settings, layout):
    return FakeNodes({nodes})
"""


def use_nodes(suite: Suite, nodes: str, **fakes: str) -> None:
    """Let a hook name the nodes, and nothing the devices of this host."""
    suite.fakes(more=NODES.format(nodes=nodes), **fakes)


def test_devices_of_every_node_are_placed_and_recorded(suite: Suite) -> None:
    use_nodes(suite, '"a", "b"')
    suite.write(test_it="def test_it(vllm_server): pass")

    result = suite.run("--gpu-layout=tp4@2", f"--gpu-results={suite.results}")

    result.assert_outcomes(passed=1)
    records = [record for record in suite.read_results()["records"] if record["kind"] == "topology"]
    assert [record["node"] for record in records] == ["a", "b"]
    assert [[device["rank"] for device in record["devices"]] for record in records] == [[0, 1], [2, 3]]
    assert records[1]["devices"][0]["uuid"].endswith("-b")
    result.stdout.fnmatch_lines(["*node a: worst link NV18, node b: worst link NV18*"])


def test_node_with_another_vllm_fails_with_its_name(suite: Suite) -> None:
    use_nodes(suite, '"a", FakeNode("b", vllm="0.31.0")')
    suite.write(test_it=TESTS)

    result = suite.run("--gpu-layout=tp2@2")

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["the same vllm is required on all nodes of a layout, found 0.31.0 on node b"])
    assert suite.starts == 0


def test_node_with_other_links_fails_with_its_name(suite: Suite) -> None:
    use_nodes(suite, '"a", FakeNode("b", FakeTopologySource(link="PHB"))')
    suite.write(test_it=TESTS)

    result = suite.run("--gpu-layout=tp4@2")

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        ["nodes of one kind are required for layout tp4@2, found another link (*ranks 0 and 1) on node b: PHB"]
    )
    assert suite.starts == 0


def test_node_with_too_few_gpus_fails_with_its_name(suite: Suite) -> None:
    use_nodes(suite, '"a", FakeNode("b", FakeTopologySource(gpus=1))')
    suite.write(test_it=TESTS)

    result = suite.run("--gpu-layout=tp4@2")

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*on node b"])


def test_too_few_nodes(suite: Suite) -> None:
    use_nodes(suite, '"a"')
    suite.write(test_it=TESTS)

    result = suite.run("--gpu-layout=tp2@2")

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["2 nodes are required, found a"])


def test_links_are_required_on_every_node(suite: Suite) -> None:
    use_nodes(suite, '*[FakeNode(name, FakeTopologySource(link="SYS")) for name in "ab"]')
    suite.write(test_it=TESTS)

    result = suite.run("--gpu-layout=tp4@2", "--gpu-link=nvlink")

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["*rank 0 - rank 1: SYS*", "*topology from fake of node b*"])


def test_nodes_that_nobody_names(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    suite.pytester.makeconftest("")
    suite.write(test_it=TESTS)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    result = suite.run("--gpu-layout=tp2@2", "--gpu-platform=cpu")

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        ["layout tp2@2 needs 2 nodes, found none", "  in --gpu-nodes *", "  name them: --gpu-nodes=local,NAME;*"]
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpu-nodes=a"], "--gpu-nodes: layout tp2@2 needs 2 nodes, found 1: a"),
        (["--gpu-nodes=a,a"], "--gpu-nodes (ini: gpulayout_nodes): different nodes were expected, found a twice"),
        (["--gpu-nodes=a,-oProxy=x"], "names of hosts, separated by commas, were expected, found '-oProxy=x'"),
        (["--gpu-nodes=a,,b"], "were expected, found ''"),
        (["--gpu-node-command=ssh"], "{node} was expected in the command"),
        (["--gpu-node-command=ssh '{node}"], "No closing quotation"),
        (["--gpu-topology=t.json"], "--gpu-topology and layout tp2@2 were both asked for"),
        (["--gpu-vllm-args=--node-rank 1"], "--node-rank is set by pytest-gpulayout; use --gpu-nodes"),
    ],
)
def test_wrong_options(suite: Suite, arguments: list[str], told: str) -> None:
    suite.write(test_it=TESTS)

    result = suite.run("--gpu-layout=tp2@2", *arguments)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert told in result.stderr.str()


def test_replicas_over_nodes_are_refused(suite: Suite) -> None:
    use_nodes(suite, '"a", "b"')
    suite.write(test_it=TESTS)

    result = suite.run("--gpu-layout=tp1x2@2")

    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["  replicas (xN) are started on one host*", "  try --gpu-layout=tp1x2"])


# -- with agents, and the fake vLLM ----------------------------------------------------------------------------------

AGENTS = (
    "--gpu-platform=cpu",
    "--gpu-nodes=a,b",
    f"--gpu-node-command={shlex.join(COMMAND)}",
    f"--gpu-node-python={sys.executable}",
    "--gpu-master-addr=127.0.0.1",
)


@pytest.fixture
def agents(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Options for two agents of this host."""
    suite.pytester.makeconftest("")
    use_fake_vllm_on_nodes(monkeypatch)
    monkeypatch.setenv("TEST_MARKER", suite.pytester.path.name)
    return AGENTS


def assert_nothing_is_left(suite: Suite) -> None:
    marker = f"TEST_MARKER={suite.pytester.path.name}"
    wait_until(lambda: processes_marked(marker) == {}, "the end of all processes", timeout_s=40)


def test_one_report_of_all_nodes(suite: Suite, agents: tuple[str, ...]) -> None:
    suite.write(test_it="def test_it(vllm_server): pass\ndef test_transport(transport_report): pass")

    result = suite.run("--gpu-layout=tp2@2", *agents, f"--gpu-results={suite.results}", subprocess=True)

    result.assert_outcomes(passed=1, failed=1)
    records = suite.read_results()["records"]
    (server,) = [record for record in records if record["kind"] == "server"]
    assert [(node["name"], node["ranks"]) for node in server["nodes"]] == [("a", [0]), ("b", [1])]
    (transport,) = [record for record in records if record["kind"] == "transport"]
    assert transport["nodes"] == {"0": "a", "1": "b"}
    assert transport["transports"] == {"CPU/GLOO": 2}
    result.stdout.fnmatch_lines(
        [
            "*transport CPU/GLOO x2 FAILED, vLLM 0.32.0, ready in *, on 2 nodes: a, b",
            "  group tp of ranks 0,1 fell back to gloo over sockets: no common shared memory*",
        ]
    )
    assert_nothing_is_left(suite)


def test_node_that_is_lost_in_a_test_is_named_there(suite: Suite, agents: tuple[str, ...]) -> None:
    suite.write(
        test_it="""
        import os, signal
        def test_kills(vllm_server):
            os.kill(vllm_server.server._parts[1].node.facts.pid, signal.SIGKILL)
        def test_after(vllm_server): pass
        """
    )

    result = suite.run("--gpu-layout=tp2@2", *agents, subprocess=True)

    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(
        ["*ERROR at teardown of test_kills*", "node b must stay while a layout runs on it, and is lost*"]
    )
    assert_nothing_is_left(suite)


def test_header_names_nodes_and_asks_this_host_for_nothing(suite: Suite, agents: tuple[str, ...]) -> None:
    suite.write(test_it="def test_plain(): pass")

    result = suite.run("--gpu-layout=tp2@2", *agents[1:])  # for GPUs, of which this host needs none

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["gpu layout: tp2@2 on cuda, nodes a, b"])
