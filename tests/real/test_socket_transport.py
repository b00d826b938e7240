"""A socket transport that is really there: vLLM's native multi-node on one host, without a common shared memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.real.conftest import ROOT, Gate, shared_memory
from tests.support.processes import processes_marked

pytestmark = [pytest.mark.real_vllm, pytest.mark.xdist_group("real vllm")]

CONFTEST = """
from tests.support.two_nodes import TwoNodeLauncher

def pytest_gpulayout_server_launcher(settings, log_dir):
    return TwoNodeLauncher(log_dir, log_dir)
"""
SUITE = "from pytest_gpulayout.gates.test_gate import test_transport\n"


@pytest.fixture
def gate(make_gate: Callable[[], Gate]) -> Gate:
    gate = make_gate()
    (gate.folder / "conftest.py").write_text(CONFTEST)
    (gate.folder / "pytest.ini").write_text("[pytest]\n")
    (gate.folder / "test_suite.py").write_text(SUITE)
    return gate


def test_two_nodes_talk_over_gloo_and_fail_the_gate_with_that_cause(gate: Gate) -> None:
    before = shared_memory()
    result = gate.run(
        "--gpu-layout=tp2", "--gpu-results=results.json", PYTHONPATH=str(ROOT), TEST_MARKER=gate.folder.name
    )
    assert result.returncode == 1, result.stdout
    assert "1 failed" in result.stdout
    (transport,) = gate.records("transport")
    assert (transport["verdict"], transport["transports"]) == ("socket", {"CPU/GLOO": 2})
    assert "ranks 0 -> 1: transport CPU/GLOO, allowed: all but NET/Socket and CPU/GLOO" in result.stdout
    assert "fell back to gloo over sockets: no common shared memory" in result.stdout
    assert "CPU SHM communicator disabled for group tp:0" in result.stdout
    assert "start all ranks on one host with one /dev/shm" in result.stdout
    assert processes_marked(f"TEST_MARKER={gate.folder.name}") == {}
    assert shared_memory() == before
