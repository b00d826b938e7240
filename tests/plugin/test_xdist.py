"""With pytest-xdist: a server belongs to one worker, and the controller tells what the workers found."""

from __future__ import annotations

from collections import Counter

import pytest

from pytest_gpulayout.schemas import validate
from tests.support.suite import GATE, Suite

pytest.importorskip("xdist")
pytestmark = pytest.mark.end_to_end

TESTS = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_server(vllm_server, number): pass

@pytest.mark.gpu_model("org/other")
@pytest.mark.parametrize("number", range(3))
def test_other(vllm_server, number): pass

@pytest.mark.parametrize("number", range(3))
def test_plain(number): pass
"""


@pytest.mark.parametrize("distribution", [(), ("--dist=loadgroup",), ("--dist=worksteal",)])
def test_each_server_is_started_once_by_one_worker(suite: Suite, distribution: tuple[str, ...]) -> None:
    suite.write(test_one=TESTS, test_two=TESTS)

    result = suite.run("--gpu-layout=tp1,tp2", "-n2", *distribution, subprocess=True)

    result.assert_outcomes(passed=30)
    starts = Counter(event.rpartition(" @")[0] for event in suite.events if event.startswith("start"))
    assert starts == {
        "start tp1 org/tiny": 1,
        "start tp1 org/other": 1,
        "start tp2 org/tiny": 1,
        "start tp2 org/other": 1,
    }
    for worker in ("@gw0", "@gw1"):
        of_worker = [event for event in suite.events if event.endswith(worker)]
        assert [event.split()[0] for event in of_worker] == ["start", "stop"] * (len(of_worker) // 2)


def test_verdicts_of_workers_reach_the_terminal_and_the_results(suite: Suite) -> None:
    suite.write(test_it=GATE)

    recorded = suite.run("--gpu-layout=tp1,tp2", "-n2", "--gpu-baseline=new", subprocess=True)
    recorded.stdout.fnmatch_lines(["*2 baseline recorded in *"])
    suite.fakes(driver="slow_down=1.4")
    result = suite.run("--gpu-layout=tp1,tp2", "-n2", "--gpu-results=results.json", subprocess=True)

    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(["regression: median_ttft_ms 28.0 ms, *"])
    result.stdout.fnmatch_lines(["  accept it: pytest *--gpu-baseline=update 'test_it.py::test_speed[[]tp?[]]'"])
    result.stdout.fnmatch_lines(["tp?: worst link *, vLLM 0.32.0, ready in 1 s", "  smoke: regression, *"])
    document = suite.read_results()
    assert validate(document, "results") == []
    assert sum(record["kind"] == "performance" for record in document["records"]) == 2


def test_gate_does_not_switch_itself_off(suite: Suite) -> None:
    suite.write(test_it=GATE)

    suite.run("--gpu-layout=tp1", "-n2", subprocess=True).assert_outcomes(failed=1)


def test_machine_without_gpus_is_refused_by_the_controller(suite: Suite) -> None:
    suite.fakes(topology="error=TopologyError('no NVIDIA driver was found')")
    suite.write(test_it=GATE)

    result = suite.run("--gpu-layout=tp1", "-n2", subprocess=True)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: no NVIDIA driver was found"])


def test_without_a_layout_nothing_changes(suite: Suite) -> None:
    suite.write(test_it=TESTS)

    suite.run("-n2", subprocess=True).assert_outcomes(passed=3, skipped=6)
