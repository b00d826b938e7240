"""Replicas on real vLLM: two servers of one core each behind nginx, one gate, and one that is killed under load."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.real.conftest import Gate
from tests.support.nginx import has_nginx, nginx_processes
from tests.support.processes import processes_marked

pytestmark = [
    pytest.mark.real_vllm,
    pytest.mark.xdist_group("real vllm"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores, one for each replica"),
]

SUITE = """
import os
import signal
import threading
import time
from pathlib import Path

import pytest

# Open arrivals: two servers, the proxy and the client on two cores take each other's time in a closed loop.
pytestmark = pytest.mark.gpu_workload({
    "name": "short", "input_tokens": 32, "output_tokens": 16, "rate": 4.0, "requests": 24, "batches": 2
})
LONG = {"name": "long", "input_tokens": 32, "output_tokens": 64, "concurrency": 4, "requests": 2000, "batches": 1}

def test_processes(vllm_server):
    parts = vllm_server.server.parts()
    assert [str(part.spec.layout) for part in parts] == ["tp1", "tp1"]
    assert sorted(vllm_server.pids) == [0, 1]
    cores = [part.spec.devices[0].cpu_affinity for part in parts]
    assert len(set(cores)) == 2
    assert vllm_server.client.get("/health", timeout=10).status_code == 200

def test_transport(transport_report):
    assert transport_report.transports == {}

def test_speed(measure, perf_gate):
    perf_gate(measure())

def test_killed(vllm_server, measure):
    gone = vllm_server.server.parts()[1]
    main = next(pid for pid, title in gone.pids().items() if "api_server" in title)
    killed = []

    def kill_under_load():
        import requests
        running = "vllm:num_requests_running{"
        while True:
            lines = requests.get(gone.endpoint.url + "/metrics", timeout=10).text.splitlines()
            if any(line.startswith(running) and not line.endswith(" 0.0") for line in lines):
                break
            time.sleep(0.2)
        killed.append(time.monotonic())
        os.kill(main, signal.SIGKILL)

    threading.Thread(target=kill_under_load, daemon=True).start()
    try:
        measure(LONG)
    finally:
        Path("seconds.txt").write_text(str(time.monotonic() - killed[0]))
"""


@pytest.fixture(scope="module", autouse=True)
def _nginx(request: pytest.FixtureRequest) -> None:
    if not has_nginx():
        reason = "needs nginx: apt-get install nginx-light"
        if request.config.getoption("--require-vllm"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture
def gate(make_gate: Callable[[], Gate]) -> Gate:
    gate = make_gate()
    (gate.folder / "pytest.ini").write_text("[pytest]\n")
    (gate.folder / "test_suite.py").write_text(SUITE)
    return gate


def test_two_replicas_run_through_the_gate_and_share_the_load(gate: Gate) -> None:
    marker = gate.folder.name
    result = gate.run(
        *("--gpu-layout=tp1x2", "--gpu-baseline=new", "--gpu-starts=1", "--gpu-results=results.json", "-ra"),
        *("-k", "not killed"),
        TEST_MARKER=marker,
    )

    assert result.returncode == 0, result.stdout
    assert "2 passed, 1 deselected, 1 baseline recorded" in result.stdout
    (server,) = gate.records("server")
    assert server["proxy"].startswith("nginx/")
    assert len(server["replicas"]) == 2
    assert len({replica["system_fingerprint"] for replica in server["replicas"]}) == 1
    (performance,) = gate.records("performance")
    (run,) = performance["runs"]
    assert run["failed"] == 0
    shares = run["gpulayout"]["server"]["replica_shares"]
    assert sum(share["requests"] for share in shares) == 48
    assert all(share["requests"] >= 15 for share in shares), shares
    assert run["gpulayout"]["server"]["agreement"]["complaints"] == []
    assert run["gpulayout"]["system_fingerprints"] == [server["system_fingerprint"]]
    assert performance["identity"]["key"]["layout"] == "tp1x2"
    assert performance["identity"]["covariates"]["proxy"] == server["proxy"]
    assert "2 replicas behind nginx/" in result.stdout
    assert_nothing_is_left(marker)


def test_replica_that_is_killed_under_load_is_named_within_seconds(gate: Gate) -> None:
    marker = gate.folder.name
    result = gate.run("--gpu-layout=tp1x2", "--gpu-baseline=off", "-k", "killed", TEST_MARKER=marker)

    assert result.returncode == 1, result.stdout
    assert "1 failed" in result.stdout
    assert "replica 1 of layout tp1x2 (cores " in result.stdout
    assert "the vLLM server for tp1 went away while it was in use (ended by SIGKILL)" in result.stdout
    assert float((gate.folder / "seconds.txt").read_text()) < 30
    assert_nothing_is_left(marker)


def assert_nothing_is_left(marker: str) -> None:
    assert processes_marked(f"TEST_MARKER={marker}") == {}
    assert nginx_processes("/tmp/gpulayout-") == []
    assert not list(Path("/dev/shm").glob("vllm_dist_*cpushm*"))
    assert not Path("/tmp/gpulayout-cpu.lock").exists()
