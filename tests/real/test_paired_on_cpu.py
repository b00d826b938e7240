"""Paired mode against real vLLM (CPU build): one flag changed, fresh servers of both sides in turn."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.real.conftest import VLLM_ARGUMENTS, Gate

pytestmark = pytest.mark.real_vllm

SUITE = """
import pytest

@pytest.mark.gpu_workload({"input_tokens": 64, "output_tokens": 32, "concurrency": 4, "requests": 32, "batches": 2})
def test_speed(vllm_server, measure, perf_gate):
    perf_gate(measure())
"""
WIDE = "--gpu-tolerance=request_throughput=20%,median_ttft_ms=50%,median_tpot_ms=50%"


def test_one_request_at_a_time_is_a_regression_that_names_the_flag(make_gate: Callable[[], Gate]) -> None:
    gate = make_gate()
    (gate.folder / "test_it.py").write_text(SUITE)

    done = gate.run(
        "--gpu-layout=tp1",
        f"--gpu-vllm-args={VLLM_ARGUMENTS} --max-num-seqs 1",
        f"--gpu-base-vllm-args={VLLM_ARGUMENTS}",
        "--gpu-starts=4",
        "--gpu-results=results.json",
        WIDE,
    )

    assert done.returncode == 1, done.stdout + done.stderr
    [record] = gate.records("performance")
    assert record["verdict"] == "regression", done.stdout
    throughput = record["metrics"][0]
    assert throughput["name"] == "request_throughput"
    assert throughput["change"] < -0.3
    # The first metric that is clear ends the gate: requests that wait their turn show in one of these two.
    red = {metric["name"] for metric in record["metrics"] if metric["verdict"] == "regression"}
    assert red & {"request_throughput", "median_ttft_ms"}, done.stdout
    assert record["changed"] == [f"arguments: {VLLM_ARGUMENTS} -> {VLLM_ARGUMENTS} --max-num-seqs 1"]
    assert 3 <= len(record["runs"]) == len(record["base"]["runs"]) <= 4
    seeds = [[run["gpulayout"]["seed"] for run in runs] for runs in (record["runs"], record["base"]["runs"])]
    assert seeds[0] == seeds[1]
    assert not list(gate.folder.glob("gpu-baselines/**/*.json"))
