"""What this team asks of its model's servers, in every layout it deploys."""

from collections.abc import Callable

import pytest

from pytest_gpulayout import Measurement, PlacedLayout, ServerView, TransportReport, Verdict

CHAT = {"input_tokens": 64, "output_tokens": 32, "concurrency": 4, "requests": 24, "batches": 4, "name": "chat"}


def test_links(gpu_topology: PlacedLayout) -> None:
    """The GPUs that talk to each other are wired as --gpu-link asks."""
    gpu_topology.assert_links()


def test_answers(vllm_server: ServerView) -> None:
    """The server answers, and says which layout it runs."""
    body = {"model": vllm_server.model, "prompt": "The bridge is", "max_tokens": 4}
    response = vllm_server.client.post("/v1/completions", json=body, timeout=60)
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] > 0
    assert response.json()["system_fingerprint"] == vllm_server.fingerprint


@pytest.mark.gpu_layout("tp2")
def test_one_process_per_rank(vllm_server: ServerView) -> None:
    """Only for tp2: it is left out when another layout runs."""
    assert sorted(vllm_server.pids) == [0, 1]


def test_transport(transport_report: TransportReport) -> None:
    """No pair of ranks falls back to a TCP socket."""
    assert "NET/Socket" not in " ".join(transport_report.transports)


@pytest.mark.gpu_workload(CHAT)
def test_chat_speed(measure: Callable[[], Measurement], perf_gate: Callable[[Measurement], Verdict]) -> None:
    """Latency and throughput of our usual load lie within the stored baseline."""
    perf_gate(measure())
