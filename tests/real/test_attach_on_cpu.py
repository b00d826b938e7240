"""A real vLLM that somebody else has started, gated by its address: on this host, so processes are evidence too."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from pytest_gpulayout.adapters.vllm_process import free_port
from tests.real.conftest import PYTEST, VLLM_ARGUMENTS, Gate
from tests.support.processes import end_with_segments, wait_until

pytestmark = [pytest.mark.real_vllm, pytest.mark.xdist_group("real vllm")]

SUITE = """
import pytest
from pytest_gpulayout.gates.test_gate import test_layout, test_links, test_performance, test_transport

pytestmark = pytest.mark.gpu_workload({
    "name": "short", "input_tokens": 32, "output_tokens": 16, "concurrency": 4, "requests": 8, "batches": 3
})
"""
# A machine with few cores and neighbours, and one start: only what is several times slower can be told from noise.
MARGINS = "--gpu-tolerance=request_throughput=85%,median_ttft_ms=600%,median_tpot_ms=600%"
KEY = "somebody-s-key"


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address; it lives as long as the tests of this file, whatever these do."""
    log = tmp_path_factory.mktemp("attached") / "server.log"
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--tensor-parallel-size", "2", *VLLM_ARGUMENTS.split()]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "VLLM_"))}
    environment = {
        **kept,
        "VLLM_API_KEY": KEY,
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: is_healthy(url) or process.poll() is not None, "vLLM is ready", timeout_s=300)
        assert process.poll() is None, log.read_text()[-2000:]
        yield url
        assert process.poll() is None, "it was ended by the gate"
    finally:
        end_with_segments(process, timeout_s=60)


def is_healthy(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=2).status_code == 200
    except requests.RequestException:
        return False


@pytest.fixture(scope="module")
def gate(make_gate: Callable[[], Gate]) -> Gate:
    gate = make_gate()
    (gate.folder / "test_suite.py").write_text(SUITE)
    (gate.folder / "pytest.ini").write_text("[pytest]\n")
    return gate


def attach(gate: Gate, url: str, *arguments: str, key: str = KEY) -> subprocess.CompletedProcess[str]:
    """Gate the server as a user would who knows nothing but its address."""
    command = [*PYTEST, "--gpu-platform=cpu", "-ra", f"--gpu-server-url={url}", MARGINS]
    command += ["--gpu-results=results.json", *arguments]
    return subprocess.run(
        command,
        cwd=gate.folder,
        env=gate.environment({"GPULAYOUT_SERVER_API_KEY": key}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_its_layout_ranks_and_shared_memory_are_proved_and_its_numbers_recorded(gate: Gate, server: str) -> None:
    result = attach(gate, server, "--gpu-layout=tp2", "--gpu-baseline=new")

    assert result.returncode == 0, result.stdout
    assert "3 passed, 1 baseline recorded" in result.stdout
    assert f"attached to vLLM 0.32.0 at {server}" in result.stdout
    (record,) = gate.records("server")
    assert (record["attached"], record["model"], sorted(record["rank_pids"])) == (server, "tiny", ["0", "1"])
    assert any(text.startswith("that it has 2 ranks and no more (process table: ") for text in record["proved"])
    assert "its arguments" in record["not_proved"]
    (transport,) = gate.records("transport")
    assert (transport["verdict"], transport["transports"]) == ("ok", {"CPU/SHM": 2})
    (performance,) = gate.records("performance")
    assert len(performance["runs"]) == 1
    assert performance["runs"][0]["gpulayout"]["telemetry"]["source"] == "/proc"
    assert KEY not in result.stdout + (gate.folder / "results.json").read_text()


def test_it_is_judged_on_one_start_and_is_not_red(gate: Gate, server: str) -> None:
    result = attach(gate, server, "--gpu-layout=tp2")

    assert result.returncode == 0, result.stdout
    (performance,) = gate.records("performance")
    assert performance["verdict"] in {"pass", "improvement", "inconclusive"}, result.stdout
    assert any(reason.startswith("not proved of the server") for reason in performance["reasons"])
    assert "--gpu-starts" not in result.stdout


def test_another_layout_and_a_wrong_key_are_refused(gate: Gate, server: str) -> None:
    other = attach(gate, server, "--gpu-layout=tp1", "-k", "layout")
    assert other.returncode == 1, other.stdout
    assert "the server says it is tp2, tp1 was asked for" in other.stdout
    assert "ask for what it is: --gpu-layout=tp2" in other.stdout
    refused = attach(gate, server, "--gpu-layout=tp2", key="wrong")
    assert refused.returncode == 4, refused.stdout
    assert "it refuses the key" in refused.stderr


def test_after_all_that_it_still_serves(server: str) -> None:
    answer = requests.get(f"{server}/v1/models", headers={"Authorization": f"Bearer {KEY}"}, timeout=10)
    assert [model["id"] for model in answer.json()["data"]] == ["tiny"]
