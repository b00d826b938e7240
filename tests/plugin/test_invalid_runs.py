"""Runs whose numbers look right and are not: exit code, letter and words, and nothing judged or stored."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pytest_gpulayout.schemas import validate
from tests.support.suite import GATE, Suite

IMPORTS = """
from pytest_gpulayout.calibration import Calibration
from pytest_gpulayout.server_window import EngineDelta, ServerWindow
from pytest_gpulayout.telemetry import CPU, DeviceTelemetry, Telemetry
from pytest_gpulayout.trace import ClientWork, Observations

def counted(**changes):
    exact = {"prompt_tokens": 96 * 64, "generation_tokens": 96 * 32, "finished": {"length": 96}}
    exact["prefix_queries"] = exact["prompt_tokens"]
    return ServerWindow(engines=(EngineDelta(replica="here", engine="0", **(exact | changes)),))

def sampled(**device):
    seconds = [n * 10**9 for n in range(1, 12)]
    devices = (DeviceTelemetry(**device),)
    return Telemetry(source="NVML", interval_s=1.0, sample_ns=seconds, devices=devices)
"""

CASES = {
    "prefix-cache": (
        "observations=Observations(server=counted(prefix_hits=3072))",
        "50.0% of the prompt tokens came from the prefix cache (allowed 1%): *",
    ),
    "client-bound": (
        "clients=[ClientWork(events=800, read_lag_ns=(0, 0, 0), send_lag_ns=(9_000_000, 9_000_000, 9_000_000))]",
        "half of the requests followed 9 ms or more after the answer they waited for (allowed 3.5 ms: *",
    ),
    "jit-compilation": (
        "observations=Observations(server=ServerWindow(jit=('Triton JIT compilation during inference: _fwd',)))",
        "the server compiled kernels while it was measured, 1 log lines, the first: Triton JIT *: _fwd; *",
    ),
    "throttled": (
        "observations=Observations(telemetry=sampled(name='GPU 0', throttled={'hw_thermal_slowdown': 0.4}))",
        "GPU 0: hw_thermal_slowdown in 40% of the samples, *",
    ),
    "foreign-process": (
        "observations=Observations(telemetry=sampled(name=CPU, series={'others_busy_percent': [70.0] * 11}))",
        "other processes used 70 % of this machine's CPUs, *",
    ),
    "token-counts": (
        "observations=Observations(server=counted(generation_tokens=96 * 32 + 7))",
        "*3079*",
    ),
}
"""Kind -> arguments of the load driver, and the words of the message. Median E2EL of the fake: 20 + 31 * 5 ms."""


@pytest.fixture
def gate(suite: Suite) -> Suite:
    """A suite with one gate and a stored baseline."""
    suite.write(test_it=GATE)
    suite.run("--gpu-layout=tp1", "--gpu-baseline=new")
    suite.settle()
    return suite


@pytest.mark.parametrize("kind", CASES)
def test_fails_with_its_kind_and_words(gate: Suite, kind: str) -> None:
    driver, words = CASES[kind]
    gate.fakes(driver=driver, more=IMPORTS)

    result = gate.run("--gpu-layout=tp1", "--gpu-results=results.json")

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(failed=1)
    assert "F" in {line.split(" ")[0] for line in result.outlines}
    result.stdout.fnmatch_lines(
        [
            f"invalid: {kind}: {words} (server start 1)",
            "  layout tp1 on 1 x NVIDIA H200 (GPU 0), model org/tiny, workload smoke",
            "  nothing was judged or stored: mend the cause and run again",
            "  smoke: invalid, 1 server start *",
            f"    {kind}: {words} (server start 1)",
        ]
    )
    result.stdout.no_fnmatch_line("*Traceback*")


@pytest.mark.parametrize("kind", CASES)
def test_is_recorded_with_its_kind(gate: Suite, kind: str) -> None:
    gate.fakes(driver=CASES[kind][0], more=IMPORTS)

    gate.run("--gpu-layout=tp1", "--gpu-results=results.json")

    document = gate.read_results()
    assert validate(document, "results") == []
    (record,) = [record for record in document["records"] if record["kind"] == "performance"]
    assert (record["verdict"], record["stored"], record["metrics"]) == ("invalid", "", [])
    assert [problem["kind"] for problem in record["runs"][0]["gpulayout"]["problems"]] == [kind]


@pytest.mark.parametrize("mode", ["new", "update", "off"])
def test_stores_nothing_in_any_mode(gate: Suite, mode: str) -> None:
    (file,) = gate.baselines
    before = file.read_text()
    gate.fakes(driver=CASES["jit-compilation"][0], more=IMPORTS)

    gate.run("--gpu-layout=tp1", f"--gpu-baseline={mode}").assert_outcomes(failed=1)

    assert file.read_text() == before


def test_nothing_is_compared_with_it_later(gate: Suite) -> None:
    """``gpulayout compare`` reads what was found from the results."""
    gate.fakes(driver=CASES["throttled"][0], more=IMPORTS)
    gate.run("--gpu-layout=tp1", "--gpu-results=results.json")
    (baseline,) = gate.baselines

    result = gate.pytester.run(sys.executable, "-m", "pytest_gpulayout", "compare", str(baseline), "results.json")

    assert result.ret == 1
    result.stdout.fnmatch_lines(["*throttled: GPU 0: hw_thermal_slowdown in 40% of the samples, *(server start 1)"])


def test_sound_observations_pass_and_are_summed_up_in_a_line(gate: Suite) -> None:
    sound = "server=counted(), telemetry=sampled(name='GPU 0', series={'utilization_percent': [97.0] * 11})"
    gate.fakes(driver=f"observations=Observations({sound})", more=IMPORTS)

    result = gate.run("--gpu-layout=tp1", "--gpu-results=results.json")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["  smoke: pass, *", "    GPU 0: 97 % busy"])
    document = gate.read_results()
    assert validate(document, "results") == []
    (record,) = [record for record in document["records"] if record["kind"] == "performance"]
    assert [run["gpulayout"]["problems"] for run in record["runs"]] == [[]] * len(record["runs"])


STRANGER = """
@pytest.fixture
def stranger(vllm_server):
    vllm_server.server.processes.others.append(FakeGpuProcess(0))
"""


def stranger(suite: Suite, test: str) -> None:
    suite.fakes(launcher="processes=FakeGpuProcesses()", more=STRANGER)
    suite.write(test_it=test)


def test_somebody_on_the_gpu_makes_the_run_invalid(suite: Suite) -> None:
    stranger(suite, "def test_speed(stranger, measure, perf_gate): perf_gate(measure())")

    result = suite.run("--gpu-layout=tp1", "--gpu-baseline=new", "--gpu-results=results.json")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "invalid: foreign-process: pid 4242 python train.py (user bob) is not of the server and computes on "
            "GPU 0 (*), 8.0 GiB; end it, or choose other GPUs: --gpu-devices=... (server start 1)"
        ]
    )
    assert suite.baselines == []
    document = suite.read_results()
    assert validate(document, "results") == []
    kinds = {record["kind"]: record for record in document["records"]}
    assert (kinds["performance"]["verdict"], kinds["processes"]["ok"]) == ("invalid", False)


def test_somebody_on_the_gpu_fails_a_test_that_asks_no_gate(suite: Suite) -> None:
    stranger(suite, "def test_speed(stranger, measure): assert measure().problems()[0].startswith('foreign-process')")

    result = suite.run("--gpu-layout=tp1")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["  found: pid 4242 python train.py (user bob) is not of the server and computes on *"]
    )


def test_a_driver_of_the_suite_s_own_is_not_calibrated(suite: Suite) -> None:
    """The calibration, and the server's counts, belong to the package's own driver."""
    suite.write(test_it="def test_it(measure): assert measure().runs[0].observations.calibration is None")

    suite.run("--gpu-layout=tp1").assert_outcomes(passed=1)
    assert not Path("results.json").exists()
