"""A socket transport that is really there: vLLM over two nodes, which are two agents of this host and need no root.

Their processes share no identity (``VLLM_DIST_IDENT``), so vLLM's CPU backend falls back from shared memory to gloo's
sockets, here over loopback. Two hosts with a cable between them are in ``test_two_namespaces.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.real.conftest import Gate, one_core_each, shared_memory
from tests.support.processes import processes_marked, wait_until

pytestmark = [pytest.mark.real_vllm, pytest.mark.xdist_group("real vllm")]

SUITE = "from pytest_gpulayout.gates.test_gate import test_layout, test_transport\n"
NODES = ("--gpu-nodes=a,b", "--gpu-node-command=env TEST_NODE={node}", "--gpu-master-addr=127.0.0.1")


@pytest.fixture
def gate(make_gate: Callable[[], Gate]) -> Gate:
    gate = make_gate()
    (gate.folder / "pytest.ini").write_text("[pytest]\n")
    (gate.folder / "test_suite.py").write_text(SUITE)
    return gate


def test_two_nodes_talk_over_gloo_and_fail_the_gate_with_that_cause(gate: Gate) -> None:
    before = shared_memory()
    result = gate.run(
        "--gpu-layout=tp2@2",
        "--gpu-results=results.json",
        *NODES,
        VLLM_CPU_OMP_THREADS_BIND=one_core_each(),
        TEST_MARKER=gate.folder.name,
    )
    assert result.returncode == 1, result.stdout
    assert "1 failed, 1 passed" in result.stdout, result.stdout
    (transport,) = gate.records("transport")
    assert (transport["verdict"], transport["transports"]) == ("socket", {"CPU/GLOO": 2})
    assert transport["nodes"] == {"0": "a", "1": "b"}
    assert "ranks 0 -> 1: transport CPU/GLOO, allowed: all but NET/Socket and CPU/GLOO" in result.stdout
    assert "fell back to gloo over sockets: no common shared memory" in result.stdout
    assert "CPU SHM communicator disabled for group tp:0" in result.stdout
    assert "start all ranks on one host with one /dev/shm" in result.stdout
    wait_until(lambda: processes_marked(f"TEST_MARKER={gate.folder.name}") == {}, "the end of all", timeout_s=60)
    assert shared_memory() <= before
