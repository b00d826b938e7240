"""Nodes for tests: agents of this host, each started through a command that gives it a name, and the fake vLLM."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pytest_gpulayout.adapters.node_command import CommandChannel, CommandNodes
from pytest_gpulayout.adapters.node_fleet import NodeFleet
from tests.support.processes import FAKE_VLLM, ROOT

NODE_VARIABLE = "GPULAYOUT_TEST_NODE"
COMMAND = ("env", f"{NODE_VARIABLE}={{node}}", sys.executable, "-P", str(Path(__file__).with_name("own_locks.py")))
"""Runs the rest on "node" {node}, which is this host."""


def use_fake_vllm_on_nodes(monkeypatch: pytest.MonkeyPatch, **behaviour: object) -> None:
    """Let agents, and the servers they start, find our package and the fake vLLM; no cores of the machine are given.

    :param behaviour: see ``fake_vllm/vllm/behaviour.py``; ``nodes={"1": {...}}`` is of one node alone.
    """
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKE_VLLM), str(ROOT)]))
    monkeypatch.setenv("FAKE_VLLM", json.dumps(behaviour))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def open_fleet(names: Sequence[str] = ("a", "b"), command: Sequence[str] = COMMAND) -> NodeFleet:
    """Nodes of this host that find each other over loopback."""
    return NodeFleet(CommandNodes(names, command, sys.executable), "cpu", master_addr="127.0.0.1")


def channel_to(program: str, name: str = "b") -> CommandChannel:
    """A channel to a Python program in place of an agent."""
    return CommandChannel(name, [sys.executable, "-I", "-S", "-c", program])
