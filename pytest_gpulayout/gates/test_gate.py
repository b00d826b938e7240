"""The built-in gate: links, their speed, transport and speed of one model in one or several layouts."""

from __future__ import annotations

from collections.abc import Callable

from pytest_gpulayout.collectives import CollectiveMeasurement
from pytest_gpulayout.gate import PlacedLayout
from pytest_gpulayout.measurement import Measurement
from pytest_gpulayout.servers import ServerView
from pytest_gpulayout.transport import TransportReport
from pytest_gpulayout.verdict import Verdict


def test_links(gpu_topology: PlacedLayout) -> None:
    """The GPUs that communicate are linked as required."""
    gpu_topology.assert_links()


def test_collectives(
    collective_probe: CollectiveMeasurement, collective_gate: Callable[[CollectiveMeasurement], Verdict]
) -> None:
    """Before a server starts: an all-reduce is as fast as stored, and as the links are published to be."""
    collective_gate(collective_probe)


def test_layout(vllm_server: ServerView) -> None:
    """A server comes up, answers, and proves that it runs the layout, on its GPUs and on no others."""
    assert vllm_server.fingerprint
    assert vllm_server.pids or vllm_server.not_proved  # processes elsewhere are not seen, and that is said
    processes = vllm_server.gpu_processes
    assert processes is None or not processes.violations


def test_transport(transport_report: TransportReport) -> None:
    """Every pair of ranks that must talk does, and not over a forbidden transport."""
    assert transport_report.verdict != "no-evidence"


def test_performance(measure: Callable[[], Measurement], perf_gate: Callable[[Measurement], Verdict]) -> None:
    """Latency and throughput lie within the stored baseline."""
    perf_gate(measure())
