"""The main job on real vLLM: record, check, and a regression that is really there.

One folder, in the order of the file: the baselines of the first test are what the others are checked against.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.real.conftest import Gate, shared_memory

pytestmark = [pytest.mark.real_vllm, pytest.mark.xdist_group("real vllm")]

SUITE = """
import pytest

# Small, so that it ends in time even when it is ten times slower.
pytestmark = pytest.mark.gpu_workload({
    "name": "short", "input_tokens": 32, "output_tokens": 16, "concurrency": 4, "requests": 8, "batches": 3
})

def test_links(gpu_topology):
    gpu_topology.assert_links()
    assert all(str(link) == "NODE" for link in gpu_topology.links)

def test_processes(vllm_server, gpu_layout):
    assert sorted(vllm_server.pids) == list(range(gpu_layout.ranks))
    assert vllm_server.client.get("/health", timeout=10).status_code == 200

def test_transport(transport_report, gpu_layout):
    assert transport_report.transports == ({"CPU/SHM": 2} if gpu_layout.tp == 2 else {})

def test_speed(measure, perf_gate):
    perf_gate(measure())
"""
# A machine with few cores and neighbours: only what is several times slower can be told from noise in one minute.
MARGINS = "--gpu-tolerance=request_throughput=85%,median_ttft_ms=600%,median_tpot_ms=600%"
# Two starts against one stored session of two: where batches scatter much, even these margins stay open.
NOT_RED = {"pass", "improvement", "inconclusive"}
COMMON = (MARGINS, "--gpu-starts=2", "--gpu-results=results.json", "-ra")


SEGMENTS = "vllm_dist_*cpushm*"  # of vLLM's communicator, of whatever server on this machine


@pytest.fixture(scope="module")
def segments_before() -> set[str]:
    return shared_memory(SEGMENTS)


@pytest.fixture(scope="module")
def gate(make_gate: Callable[[], Gate], segments_before: set[str]) -> Gate:
    gate = make_gate()
    (gate.folder / "test_suite.py").write_text(SUITE)
    (gate.folder / "pytest.ini").write_text("[pytest]\n")
    return gate


def test_first_run_records_baselines_for_both_layouts(gate: Gate) -> None:
    result = gate.run("--gpu-layout=tp1,tp2", "--gpu-baseline=new", *COMMON)
    assert result.returncode == 0, result.stdout
    assert "6 passed, 2 baseline recorded" in result.stdout
    assert "recorded from 2 server starts in " in result.stdout
    assert {record["layout"] for record in gate.records("server")} == {"tp1", "tp2"}
    assert len(list((gate.folder / "gpu-baselines").rglob("short.json"))) == 2


def test_second_run_is_not_red_and_prints_the_comparison(gate: Gate) -> None:
    result = gate.run("--gpu-layout=tp1,tp2", *COMMON)
    assert result.returncode == 0, result.stdout
    performance = gate.records("performance")
    assert len(performance) == 2
    assert {record["verdict"] for record in performance} <= NOT_RED, result.stdout
    assert all(record["metrics"] and record["advisory"] for record in performance)
    fingerprints = [record["system_fingerprint"] for record in gate.records("server")]
    assert ["-tp2-" in text for text in fingerprints] == [False, True]


def test_ranks_squeezed_onto_the_same_cores_are_a_regression(gate: Gate) -> None:
    result = gate.run("--gpu-layout=tp2", *COMMON, VLLM_CPU_OMP_THREADS_BIND="nobind")
    assert result.returncode == 1, result.stdout
    (performance,) = gate.records("performance")
    assert performance["verdict"] == "regression"
    assert "regression: request_throughput" in result.stdout
    assert "VLLM_CPU_OMP_THREADS_BIND: set by pytest-gpulayout -> nobind" in result.stdout
    assert "--gpu-baseline=update 'test_suite.py::test_speed[tp2]'" in result.stdout


def test_an_ordinary_run_after_it_is_not_red(gate: Gate) -> None:
    result = gate.run("--gpu-layout=tp2", *COMMON)
    assert result.returncode == 0, result.stdout
    (performance,) = gate.records("performance")
    assert performance["verdict"] in NOT_RED, result.stdout


def test_nothing_is_left_in_shared_memory(segments_before: set[str]) -> None:
    assert shared_memory(SEGMENTS) <= segments_before
