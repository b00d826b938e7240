"""Channels to whatever answers at the other end of a command, and what is told of those that do not."""

from __future__ import annotations

import sys

import pytest

from pytest_gpulayout.adapters.node_command import CommandChannel, CommandNodes
from pytest_gpulayout.errors import NodeError, NodeLost
from tests.support.nodes import channel_to

pytestmark = pytest.mark.end_to_end

ECHO = """
import json, sys
print("Welcome to the cluster, last login: never", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["method"] == "fail":
        reply = {"error": {"kind": "OSError", "text": "no such thing\\n  look elsewhere"}}
    elif request["method"] == "die":
        sys.exit("the node is on fire")
    elif request["method"] == "stay silent":
        continue
    else:
        reply = {"result": request["arguments"]}
    print("printed by a library", json.dumps({"id": -1}), sep="\\n")
    print(json.dumps({"id": request["id"], **reply}), flush=True)
"""


def test_requests_and_replies_between_other_output() -> None:
    channel = channel_to(ECHO)
    for number in range(3):
        assert channel.request("echo", {"number": number}, timeout_s=10) == {"number": number}
    channel.close()
    channel.close()


def test_refusal_names_the_node_and_leaves_the_channel_open() -> None:
    channel = channel_to(ECHO)
    with pytest.raises(NodeError, match=r"no such thing\n  look elsewhere\n  on node b") as raised:
        channel.request("fail", {}, timeout_s=10)
    assert not isinstance(raised.value, NodeLost)
    assert channel.request("echo", {"still": "there"}, timeout_s=10) == {"still": "there"}
    channel.close()


def test_node_that_dies_is_lost_with_its_last_words() -> None:
    channel = channel_to(ECHO)
    channel.request("echo", {}, timeout_s=10)
    for _ in range(2):  # whoever asks later is told the same
        with pytest.raises(NodeLost) as raised:
            channel.request("die", {}, timeout_s=10)
        assert "node b must stay while a layout runs on it, and is lost: its agent has ended" in str(raised.value)
        assert "the node is on fire" in str(raised.value)
        assert raised.value.node == "b"
    channel.close()


def test_node_that_falls_silent_is_lost() -> None:
    channel = channel_to(ECHO)
    channel.request("echo", {}, timeout_s=10)
    with pytest.raises(NodeLost, match="is lost: no answer within 0 s"):
        channel.request("stay silent", {}, timeout_s=0.2)
    channel.close()


def test_command_that_fails_shows_what_it_said() -> None:
    channel = channel_to("import sys; sys.exit('Permission denied (publickey).')")
    with pytest.raises(NodeError) as raised:
        channel.request("hello", {}, timeout_s=10)
    message = str(raised.value)
    assert "node b must answer, by an agent of pytest-gpulayout, and does not: its agent has ended" in message
    assert "(exit code 1)" in message
    assert "Permission denied (publickey)." in message
    assert "--gpu-node-command=" in message
    assert not isinstance(raised.value, NodeLost)
    channel.close()


def test_command_that_is_not_there() -> None:
    with pytest.raises(NodeError, match="cannot be started: No such file or directory\n  /no/such/ssh b"):
        CommandChannel("b", ["/no/such/ssh", "b"])


def test_nodes_are_started_by_their_command_and_this_host_without_one() -> None:
    nodes = CommandNodes(["local", "b"], ("ssh", "-4", "{node}.example", "--"), "/opt/python")
    assert nodes._words("local")[0] == sys.executable
    assert nodes._words("b") == [
        *("ssh", "-4", "b.example", "--", "/opt/python"),
        *("-P", "-m", "pytest_gpulayout.adapters.node_agent"),
    ]


def test_too_few_nodes() -> None:
    with pytest.raises(NodeError, match="3 nodes are required, found 2: a, b\n  in --gpu-nodes"):
        CommandNodes(["a", "b"], ("env",), "python").open(3, lambda _: None)
