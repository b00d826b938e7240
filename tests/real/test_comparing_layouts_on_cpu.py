"""Layouts of real vLLM in one run: the table, the advice, and claims that hold and that do not."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest

from tests.real.conftest import Gate
from tests.support.nginx import has_nginx

pytestmark = [pytest.mark.real_vllm, pytest.mark.xdist_group("real vllm")]

SUITE = """
import pytest

# Small, so that it ends in time even when it is ten times slower.
pytestmark = pytest.mark.gpu_workload({
    "name": "short", "input_tokens": 32, "output_tokens": 16, "concurrency": 4, "requests": 8, "batches": 3
})

def test_transport(transport_report):
    assert transport_report.verdict == "ok"

@pytest.mark.gpu_better_than("tp1", "request_throughput", 0.01)
def test_speed(measure):
    measure()

@pytest.mark.gpu_layout("tp2")
def test_too_much(measure, perf_gate):
    measure()
    perf_gate.better_than("tp1", "request_throughput", 100)
"""


@pytest.fixture(scope="module")
def layouts(request: pytest.FixtureRequest) -> str:
    if has_nginx():
        return "tp1,tp2,tp1x2"
    if request.config.getoption("--require-vllm"):
        pytest.fail("needs nginx: apt-get install nginx-light")
    return "tp1,tp2"


@pytest.fixture(scope="module")
def run(layouts: str, make_gate: Callable[[], Gate]) -> tuple[Gate, subprocess.CompletedProcess[str]]:
    gate = make_gate()
    (gate.folder / "test_suite.py").write_text(SUITE)
    (gate.folder / "pytest.ini").write_text("[pytest]\n")
    options = ("--gpu-starts=1", "--gpu-hour-cost=0.05", "--gpu-results=results.json", "-ra")
    return gate, gate.run(f"--gpu-layout={layouts}", *options)


@pytest.fixture
def comparison(run: tuple[Gate, subprocess.CompletedProcess[str]]) -> dict[str, Any]:
    gate, result = run
    found = gate.records("comparison")
    assert len(found) == 1, result.stdout
    return found[0]


def test_claims_that_hold_pass_and_those_that_do_not_fail(
    run: tuple[Gate, subprocess.CompletedProcess[str]], layouts: str
) -> None:
    gate, result = run
    compared = len(layouts.split(",")) - 1

    assert result.returncode == 1, result.stdout
    counts = result.stdout.splitlines()[-1]
    assert f" 1 failed, {2 * compared + 1} passed, " in counts, result.stdout
    assert ", 1 not judged in " in counts, result.stdout
    assert "fail: tp2 is required to be more than 100 times as good as tp1 in request_throughput" in result.stdout
    assert [record["verdict"] for record in gate.records("better-than")].count("pass") == compared


def test_the_table_has_what_was_measured(
    run: tuple[Gate, subprocess.CompletedProcess[str]], comparison: dict[str, Any], layouts: str
) -> None:
    gate, result = run
    rows = {row["layout"]: row for row in comparison["rows"]}

    assert set(rows) == set(layouts.split(","))
    assert "layouts compared: short on tiny-qwen2, 95% intervals" in result.stdout
    assert "  cost at 0.05 USD per core and hour" in result.stdout
    assert rows["tp2"]["transport"] == "CPU/SHM"
    assert rows["tp2"]["worst_link"] == "NODE"
    first: dict[str, dict[str, Any]] = {}
    for record in gate.records("performance"):
        first.setdefault(record["layout"], record)
    for layout, record in first.items():
        (start,) = record["runs"]
        batches = [batch["metrics"]["request_throughput"] for batch in start["gpulayout"]["batches"]]
        figures = rows[layout]["figures"]
        assert figures["request_throughput"]["value"] == pytest.approx(median(batches))
        assert figures["usd_per_1000_requests"]["value"] == pytest.approx(
            rows[layout]["units"] * 0.05 / 3600 / median(batches) * 1000
        )
        assert rows[layout]["busy_percent"] > 0


def test_the_advice_is_right_for_this_machine(comparison: dict[str, Any], run: tuple[Gate, Any]) -> None:
    """Whoever is fastest by the plain numbers is among the winners, and nobody wins who is far behind."""
    _, result = run
    rates = {row["layout"]: row["figures"]["request_throughput"]["value"] for row in comparison["rows"]}
    latencies = {row["layout"]: row["figures"]["median_e2el_ms"]["value"] for row in comparison["rows"]}
    winners = comparison["advice"]["winners"]

    assert max(rates, key=lambda layout: rates[layout]) in winners["throughput"]
    assert min(latencies, key=lambda layout: latencies[layout]) in winners["latency"]
    assert winners["cost per request"] == winners["throughput"]  # the machine is the same
    assert all(rates[layout] > max(rates.values()) / 3 for layout in winners["throughput"])
    assert f"  advice: {comparison['advice']['sentence']}" in result.stdout.splitlines()
    assert "the documented prior for starts that measure less than 10 s, " in comparison["advice"]["reasons"][-1]
