"""The agent on a node where Ray starts the workers; a worker here is a process of the test."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_gpulayout.adapters import ray_agent
from pytest_gpulayout.adapters.node_part import PartRequest
from pytest_gpulayout.adapters.ray_agent import RayAgent, command_with_ray
from tests.support.processes import use_fake_vllm, wait_until

pytestmark = pytest.mark.end_to_end

REQUEST: PartRequest = {
    "layout": "tp2@2",
    "model": "org/model",
    "arguments": ["--max-model-len", "2048"],
    "platform": "cuda",
    "node_rank": 1,
    "host": "127.0.0.1",
    "master_addr": "127.0.0.1",
    "master_port": 1,
    "rpc_port": 2,
    "api_key": "secret",
}


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[RayAgent]:
    """Knows one device; what it changes in the environment is undone."""
    for name in ("NCCL_DEBUG_FILE", "NCCL_DEBUG", "RAY_ADDRESS", "VLLM_HOST_IP"):
        monkeypatch.setenv(name, "")  # so that they are as before in the end
        monkeypatch.delenv(name)
    monkeypatch.setattr(ray_agent, "WORKERS_S", 0.2)
    use_fake_vllm(monkeypatch)
    agent = RayAgent()
    agent.answer("topology", {"platform": "cpu", "ranks": 1, "first_rank": 0, "all_ranks": 1})
    try:
        yield agent
    finally:
        agent.close()


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as own:
        yield own
        own.kill()


def start(agent: RayAgent, nccl_files: Path, **changes: Any) -> Any:
    wish = {
        "request": REQUEST | changes,
        "devices": [0],
        "environment": {"RAY_ADDRESS": "10.0.0.1:6379"},
        "nccl_files": str(nccl_files),
    }
    return agent.answer("start_ray", wish)


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_first_node_s_command_names_ray_and_no_nodes() -> None:
    command = [*("python", "-m", "server", "--host", "10.0.0.1", "--port", "8000"), "--tensor-parallel-size", "2"]

    assert command_with_ray([*command, "--max-model-len", "9"], ["--max-model-len", "9"]) == [
        *("python", "-m", "server", "--host", "10.0.0.1", "--port", "8000"),
        *("--distributed-executor-backend", "ray", "--tensor-parallel-size", "2", "--max-model-len", "9"),
    ]


def test_numa_binding_is_left_out_unless_it_is_the_user_s() -> None:
    command = ["python", "--port", "8000", "--numa-bind", "--numa-bind-nodes", "0", "1", "--seed", "0", "--numa-bind"]

    assert command_with_ray(command, ["--numa-bind"]) == [
        *("python", "--port", "8000", "--distributed-executor-backend", "ray", "--seed", "0", "--numa-bind"),
    ]


# -- parts -----------------------------------------------------------------------------------------------------------


def test_on_other_nodes_nothing_is_started(agent: RayAgent, tmp_path: Path) -> None:
    told = start(agent, tmp_path / "nccl")

    assert told["command"] == ["(vLLM's", "workers,", "started", "by", "Ray)"]
    assert agent.answer("poll", {"processes": True}) == {"exit_code": None, "log_bytes": 0, "processes": {}}


def test_an_adopted_worker_is_a_process_of_the_part_and_its_end_is_told(
    agent: RayAgent, worker: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    start(agent, tmp_path / "nccl")
    agent.answer("adopt", {"pids": [worker.pid]})
    assert agent.answer("poll", {})["exit_code"] is None
    assert list(agent.answer("poll", {"processes": True})["processes"]) == [str(worker.pid)]

    worker.kill()
    worker.wait()

    assert agent.answer("poll", {})["exit_code"] == 1
    assert agent.answer("poll", {})["exit_code"] == 1
    assert agent.answer("read", {"file": "log", "offset": 0})["text"] == (
        f"the worker of vLLM with process id {worker.pid} has ended\n"
    )


def test_nccl_files_of_adopted_workers_come_back_and_go_with_the_agent(
    agent: RayAgent, worker: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    start(agent, tmp_path / "nccl")
    host = socket.gethostname().partition(".")[0]
    own, other = (tmp_path / f"nccl.{host}.{pid}.log" for pid in (worker.pid, 1))
    own.write_text("NCCL INFO")
    other.write_text("of somebody else's worker")
    agent.answer("adopt", {"pids": [worker.pid]})

    found = agent.answer("nccl", {})

    assert found == {"files": {own.name: 9}, "obstacle": None}
    assert agent.answer("read", {"file": own.name, "offset": 5})["text"] == "INFO"
    agent.close()
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_outlives_its_server_is_killed(
    agent: RayAgent, worker: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    start(agent, tmp_path / "nccl")
    agent.answer("adopt", {"pids": [worker.pid]})

    agent.answer("stop", {})

    assert not psutil.pid_exists(worker.pid)


def test_the_first_node_runs_the_server_with_the_cluster_s_address(agent: RayAgent, tmp_path: Path) -> None:
    told = start(agent, tmp_path / "nccl", node_rank=0, platform="cpu")

    assert told["command"][told["command"].index("--port") + 2 :][:2] == ["--distributed-executor-backend", "ray"]
    assert "--nnodes" not in told["command"]
    wait_until(lambda: agent.answer("poll", {})["log_bytes"] > 0, "a word of the server")
    titles = [process["title"] for process in agent.answer("poll", {"processes": True})["processes"].values()]
    assert any("api_server" in title or "VLLM" in title for title in titles)
    agent.answer("stop", {})
    assert agent.answer("poll", {"processes": True})["processes"] == {}
