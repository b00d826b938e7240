"""Real vLLM over two hosts that are network namespaces: its slowness has a cause, and a dead node has a name."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from pytest_gpulayout.adapters.process_table import title_of
from tests.real.conftest import Gate, one_core_each, shared_memory
from tests.support.namespaces import Namespace, two_namespaces
from tests.support.processes import processes_marked, wait_until

pytestmark = [pytest.mark.real_vllm, pytest.mark.xdist_group("real vllm")]

SUITE = """
import pytest
from pytest_gpulayout.gates.test_gate import test_layout, test_links, test_transport

pytestmark = pytest.mark.gpu_workload({
    "name": "short", "input_tokens": 32, "output_tokens": 16, "concurrency": 4, "requests": 8, "batches": 3
})

def test_speed(measure):
    measure()
"""
UNDER_LOAD = """
import threading, time
from pathlib import Path
import pytest

def tell_when_requests_run(server):
    running = 0.0
    while not running:
        time.sleep(0.2)
        lines = server.client.get("/metrics", timeout=10).text.splitlines()
        running = sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))
    Path("up").touch()

@pytest.mark.gpu_workload({
    "name": "long", "input_tokens": 32, "output_tokens": 256, "concurrency": 4, "requests": 400, "batches": 1
})
def test_speed(vllm_server, measure):
    threading.Thread(target=tell_when_requests_run, args=(vllm_server,), daemon=True).start()
    measure()
"""
OVER_NODES = ("--gpu-node-command=ip netns exec {node}", "--gpu-baseline=off", "--gpu-results=results.json", "-ra")
DEADLINE_S = 30


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Namespace, Namespace]]:
    with two_namespaces() as pair:
        yield pair


@pytest.fixture
def gate(make_gate: Callable[[], Gate]) -> Gate:
    gate = make_gate()
    (gate.folder / "pytest.ini").write_text("[pytest]\n")
    return gate


def start(gate: Gate, head: Namespace, *arguments: str) -> subprocess.Popen[str]:
    """pytest on the head."""
    extra = {"VLLM_CPU_OMP_THREADS_BIND": one_core_each(), "TEST_MARKER": gate.folder.name}
    return subprocess.Popen(
        head.command(*gate.command(*arguments, *OVER_NODES)),
        cwd=gate.folder,
        env=gate.environment(extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def assert_nothing_is_left(gate: Gate, before: set[str]) -> None:
    wait_until(lambda: processes_marked(f"TEST_MARKER={gate.folder.name}") == {}, "the end of all", timeout_s=60)
    assert shared_memory() <= before


def test_two_hosts_pass_the_same_gate_but_for_the_transport_which_makes_them_slow(
    gate: Gate, hosts: tuple[Namespace, Namespace]
) -> None:
    head, follower = hosts
    before = shared_memory()
    (gate.folder / "test_suite.py").write_text(SUITE)

    run = start(gate, head, "--gpu-layout=tp2,tp2@2", f"--gpu-nodes=local,{follower.name}")
    output = run.communicate(timeout=800)[0]

    assert run.returncode == 1, output
    assert "7 passed" in output, output
    assert "FAILED test_suite.py::test_transport[tp2@2]" in output, output
    transports = {record["layout"]: record for record in gate.records("transport")}
    assert transports["tp2"]["transports"] == {"CPU/SHM": 2}
    assert (transports["tp2@2"]["verdict"], transports["tp2@2"]["transports"]) == ("socket", {"CPU/GLOO": 2})
    assert transports["tp2@2"]["nodes"] == {"0": "local", "1": follower.name}
    assert "fell back to gloo over sockets: no common shared memory" in output
    (server,) = [record for record in gate.records("server") if record["layout"] == "tp2@2"]
    assert [node["address"] for node in server["nodes"]] == [head.address, follower.address]
    assert [node["ranks"] for node in server["nodes"]] == [[0], [1]]
    assert f"--master-addr {head.address}" in " ".join(server["command"])
    assert "--host 127.0.0.1" in " ".join(server["command"])
    runs = {record["layout"]: record["runs"] for record in gate.records("performance")}
    assert set(runs) == {"tp2", "tp2@2"}
    for (run,) in runs.values():
        assert run["gpulayout"]["telemetry"]["devices"]
    (comparison,) = gate.records("comparison")
    assert {row["layout"]: row["transport"] for row in comparison["rows"]} == {"tp2": "CPU/SHM", "tp2@2": "CPU/GLOO"}
    advice = comparison["advice"]
    if advice["winners"]["throughput"] == ["tp2"]:  # else others on this machine slowed down tp2 alone
        assert "the 2 ranks of tp2@2 exchange data in every step" in advice["sentence"]
        assert "over the network of 2 nodes by CPU/GLOO" in advice["sentence"]
    assert_nothing_is_left(gate, before)


def test_host_whose_part_ends_under_load_is_named_in_time(gate: Gate, hosts: tuple[Namespace, Namespace]) -> None:
    head, follower = hosts
    before = shared_memory()
    (gate.folder / "test_suite.py").write_text(UNDER_LOAD)

    run = start(gate, head, "--gpu-layout=tp2@2", f"--gpu-nodes=local,{follower.name}")
    wait_until(lambda: (gate.folder / "up").exists() or run.poll() is not None, "requests in flight", timeout_s=400)
    assert run.poll() is None, run.communicate()[0]
    # By title: what sets titles overwrites the environment in which the mark stands.
    (part,) = [process for process in psutil.process_iter() if title_of(process).startswith("VLLM::Worker_TP1")]
    part.kill()
    killed = time.monotonic()
    output = run.communicate(timeout=120)[0]
    took_s = time.monotonic() - killed

    assert run.returncode == 1, output
    assert f"went away while it was in use: its part on node {follower.name}" in output, output
    assert took_s < DEADLINE_S, f"{took_s:.0f} s\n{output}"
    assert_nothing_is_left(gate, before)
