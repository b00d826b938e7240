"""The probe of the links on real PyTorch: two ranks on two cores, over gloo. No server is started."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable

import pytest

from tests.real.conftest import Gate
from tests.real.test_wrong_use import MARKER, left_running, wait_until_none_is_left
from tests.support.processes import wait_until

pytestmark = [pytest.mark.real_vllm, pytest.mark.xdist_group("real vllm")]

SUITE = """
def test_links(collective_probe, collective_gate):
    collective_gate(collective_probe)
"""
# A machine with few cores and neighbours: only what is several times slower can be told from noise with two starts.
MARGINS = "--gpu-tolerance=" + ",".join(
    [*(f"all_reduce_batch{batch}_us=900%" for batch in (1, 8, 64)), "all_reduce_prefill_gb_per_s=90%"]
)
COMMON = ("--gpu-layout=tp2", "--gpu-starts=2", "--gpu-results=results.json", MARGINS)


@pytest.fixture(scope="module")
def gate(make_gate: Callable[[], Gate]) -> Gate:
    gate = make_gate()
    (gate.folder / "test_suite.py").write_text(SUITE)
    (gate.folder / "pytest.ini").write_text("[pytest]\n")
    return gate


def test_first_run_records_what_the_sockets_of_this_machine_do(gate: Gate) -> None:
    result = gate.run(*COMMON, "--gpu-baseline=new")
    assert result.returncode == 0, result.stdout
    assert "1 baseline recorded" in result.stdout
    (record,) = gate.records("collectives")
    assert record["backend"].startswith("gloo of torch 2.")
    assert record["transports"] == {"CPU/GLOO": 2}
    assert (record["workload"]["hidden_size"], record["workload"]["dtype"]) == (256, "bfloat16")
    assert record["remarks"] == ["not held against a published limit: sockets on one host have none"]
    values = {row["name"]: row["current"] for row in record["advisory"]}
    assert 1 < values["all_reduce_batch1_us"] < 1e5, values
    assert 0.01 < values["all_reduce_prefill_gb_per_s"] < 100, values
    assert gate.records("server") == []
    assert len(list((gate.folder / "gpu-baselines" / "hidden-256").rglob("collectives.json"))) == 1


def test_second_run_is_judged_against_it(gate: Gate) -> None:
    result = gate.run(*COMMON)
    assert result.returncode == 0, result.stdout
    (record,) = gate.records("collectives")
    assert record["verdict"] in {"pass", "improvement", "inconclusive"}, result.stdout
    assert [metric["name"] for metric in record["metrics"]] == [
        "all_reduce_batch1_us",
        "all_reduce_batch8_us",
        "all_reduce_batch64_us",
        "all_reduce_prefill_gb_per_s",
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill-9"])
def test_end_of_pytest_while_ranks_are_at_work(gate: Gate, number: signal.Signals) -> None:
    marker = f"probe-{number.name}"
    with tempfile.TemporaryDirectory(prefix="gl-", dir="/tmp") as temporary:
        process = gate.start(*COMMON, "--gpu-baseline=off", **{MARKER: marker, "TMPDIR": temporary})
        # pytest, a keeper, the process above the ranks, and both of them; others may hold the cores for a while
        wait_until(lambda: len(left_running(marker)) >= 5, "the ranks", 300)
        os.kill(process.pid, number)
        output, _ = process.communicate(timeout=60)
        left = wait_until_none_is_left(marker)
        assert not left, [" ".join(process.cmdline()) for process in left]
        assert not [name for name in os.listdir(temporary) if name.startswith("gpulayout-")], output
