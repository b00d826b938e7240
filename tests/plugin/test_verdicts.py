"""``perf_gate``: each verdict, its words, its letter, its exit code, and how many server starts it takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from pytest_gpulayout.baseline_text import baseline_from_text, baseline_to_text
from tests.support.suite import GATE, Suite


def recorded(suite: Suite, layout: str = "tp1") -> Suite:
    """With one gate and one stored session: TTFT 20 ms, TPOT 5 ms."""
    suite.write(test_it=GATE)
    suite.run(f"--gpu-layout={layout}", "--gpu-baseline=new")
    (suite.pytester.path / "events.txt").unlink()
    return suite


@pytest.fixture
def gate(suite: Suite) -> Suite:
    """A suite with one gate and one stored session of tp1."""
    return recorded(suite)


@pytest.fixture
def settled(gate: Suite) -> Suite:
    """The same with nine stored sessions, which leave no doubt."""
    (file,) = gate.baselines
    baseline = baseline_from_text(file.read_text(), str(file))
    (session,) = baseline.sessions
    sessions = tuple(replace(session, recorded=f"2026-11-{day:02}T08:00:00Z") for day in range(1, 10))
    file.write_text(baseline_to_text(replace(baseline, sessions=sessions)))
    return gate


def failure(lines: Iterable[str]) -> list[str]:
    """What is said of the failed test, up to the summary."""
    text = list(lines)
    start = next(n for n, line in enumerate(text) if line.startswith("____") and "test_speed" in line)
    return text[start + 1 : next(n for n, line in enumerate(text) if " gpu layout ===" in line)]


def test_regression_fails_and_says_what_where_and_what_next(gate: Suite) -> None:
    gate.fakes(driver="slow_down=1.3", topology="driver_version='999.1'")

    result = gate.run("--gpu-layout=tp1")

    result.assert_outcomes(failed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "regression: request_throughput fell by 23%, median_ttft_ms rose by 30% and median_tpot_ms rose *",
            "regression: median_ttft_ms 26.0 ms, allowed <= 21.6 ms (baseline 20.0 ms + 8%)",
            "    change +30.0%, interval +*% to +*%, n = 3 starts against 3 and 1 that confirms, smallest "
            "change that could be seen *%",
            "  changed since the baseline: driver: 580.65.06 -> 999.1",
            "  provisional: 1 stored session*",
            "  layout tp1 on 1 x NVIDIA H200 (GPU 0), model org/tiny, workload smoke",
            "  /*/gpu-baselines/org-tiny-*/tp1/*/smoke.json",
            "  accept it: pytest --gpu-model=org/tiny --gpu-layout=tp1 "
            "--gpu-baseline=update 'test_it.py::test_speed[[]tp1[]]'",
        ]
    )
    result.stdout.fnmatch_lines(["    request_throughput *  -23.1%  regression"])
    result.stdout.no_fnmatch_line("*Traceback*")
    assert gate.starts == 4  # the fourth confirms it


def test_a_regression_carries_what_else_changed(suite: Suite) -> None:
    recorded(suite, "tp2")
    suite.fakes(driver="tpot_ms=15.0", launcher="transport='NET/IB/0'", topology="driver_version='999.1'")

    result = suite.run("--gpu-layout=tp2", "--gpu-results=results.json")

    result.assert_outcomes(failed=1)
    first, *rest = failure(result.outlines)
    sentence = (
        "median_tpot_ms rose by 200% and request_throughput fell by 64%: decode takes longer (5.00 -> 15.0 ms a "
        "token), the time to the first token is as before; along with it, the transport changed from P2P/CUMEM to "
        "NET/IB/0 and the driver from 580.65.06 to 999.1 since the baseline"
    )
    assert first == f"regression: {sentence}"
    table = [
        "  beside the verdict           baseline         now              change",
        "  time to first token, median  20.0 ms          20.0 ms          as before",
        "  decode, per token            5.00 ms a token  15.0 ms a token  +200.0%",
        "  changed since the baseline: transport: P2P/CUMEM -> NET/IB/0",
        "  changed since the baseline: driver: 580.65.06 -> 999.1",
        "  not compared, since not recorded on both sides: clocks and KV-cache size",
    ]
    assert rest[rest.index(table[0]) :][: len(table)] == table
    assert not [line for line in rest[: rest.index(table[0])] if "transport" in line]
    result.stdout.fnmatch_lines(["  smoke: regression, *", f"    {sentence}", "    metric *", f"  {table[-1]}"])
    (record,) = (r for r in suite.read_results()["records"] if r["kind"] == "performance")
    assert record["cause"] == [sentence, *(line.removeprefix("  ") for line in table)]
    assert record["identity"]["covariates"]["transport"] == "NET/IB/0"
    assert [run["gpulayout"]["observed"] for run in record["runs"]] == [
        {"start_s": 1.0, "decode_per_token_ms": 15.0}
    ] * len(record["runs"])


def test_a_regression_that_nothing_else_went_along_with_says_so(suite: Suite) -> None:
    recorded(suite, "tp2")
    suite.fakes(driver="ttft_ms=60.0")

    result = suite.run("--gpu-layout=tp2")

    assert failure(result.outlines)[0].endswith(
        ": the first token takes longer (20.0 -> 60.0 ms), decode is as before; nothing else that was recorded "
        "changed: same vLLM, driver, wiring, transport and arguments; not compared, since not recorded on both "
        "sides: clocks and KV-cache size"
    )


def test_what_devices_and_server_showed_is_stored_and_compared(suite: Suite) -> None:
    more = """
from pytest_gpulayout.server_window import EngineDelta, HistogramDelta, ServerWindow
from pytest_gpulayout.telemetry import DeviceTelemetry, Telemetry
from pytest_gpulayout.trace import Observations

def pytest_gpulayout_load_driver(settings):
    seconds = {"request_queue_time": %s, "request_prefill_time": 0.015}
    histograms = {name: HistogramDelta(96 * mean, 96) for name, mean in seconds.items()}
    engine = EngineDelta(replica="r", engine="0", prompt_tokens=6144, generation_tokens=3072, histograms=histograms,
                         finished={"length": 96})
    clocks = DeviceTelemetry(name="GPU 0", series={"sm_clock_mhz": (300.0, %s)})
    return FakeLoadDriver(ttft_ms=%s, observations=Observations(
        server=ServerWindow(engines=(engine,)),
        telemetry=Telemetry(source="NVML", interval_s=0.5, devices=(clocks,))))
"""
    suite.fakes(more=more % (0.001, 1980.0, 20))
    recorded(suite)
    suite.fakes(more=more % (0.041, 1410.0, 60))

    result = suite.run("--gpu-layout=tp1")

    result.stdout.fnmatch_lines(
        [
            "regression: median_ttft_ms rose by 200%: requests wait longer in the queue (1.00 -> 41.0 ms), client, "
            "network/front end, prefill and decode are as before; along with it, the SM clock changed from 1,980 MHz "
            "to 1,410 MHz since the baseline",
            "  queue                  1.00 ms          41.0 ms          41 times",
            "  SM clock               1,980 MHz        1,410 MHz        -28.8%",
        ]
    )


def test_improvement_passes_and_is_explained(gate: Suite) -> None:
    gate.fakes(driver="slow_down=0.5")

    result = gate.run("--gpu-layout=tp1")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            "  smoke: improvement, *",
            "    request_throughput rose by 100%, *: the first token takes shorter (20.0 -> 10.0 ms) and *",
            "    median_ttft_ms *  -50.0%  improvement",
        ]
    )


def test_inconclusive_is_its_own_count_and_never_passed(gate: Suite) -> None:
    gate.fakes(driver="slow_down=[1.25, 0.8, 1.0]")

    result = gate.run("--gpu-layout=tp1")

    assert result.ret == 0
    result.assert_outcomes(passed=0)
    assert "?" in {line.split(" ")[0] for line in result.outlines}
    result.stdout.fnmatch_lines(
        [
            "  smoke: inconclusive, 3 server starts*",
            "*cannot be ruled out with 3 starts now and 1 stored session: *",
            "*1 inconclusive in *",
        ]
    )
    assert gate.starts == 3


def test_inconclusive_can_fail(gate: Suite) -> None:
    gate.fakes(driver="slow_down=[1.25, 0.8, 1.0]")

    result = gate.run("--gpu-layout=tp1", "--gpu-inconclusive=fail")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["inconclusive: median_ttft_ms: changed by *"])


@pytest.mark.parametrize("mode", ["check", "new", "update", "off"])
def test_failed_requests_are_invalid_in_every_mode(gate: Suite, mode: str) -> None:
    (file,) = gate.baselines
    before = file.read_text()
    gate.fakes(driver="fail_requests=2")

    result = gate.run("--gpu-layout=tp1", f"--gpu-baseline={mode}")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "invalid: failed-requests: 2 of 96 requests failed; the first: HTTP 500: * (server start 1)",
            "  nothing was judged or stored: mend the cause and run again",
            "  smoke: invalid, 1 server start *",
        ]
    )
    assert file.read_text() == before


def test_all_requests_failed(gate: Suite) -> None:
    gate.fakes(driver="fail_requests=96")

    result = gate.run("--gpu-layout=tp1")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["  found: 96 of 96 requests failed, the first with: HTTP 500: *"])


@pytest.mark.parametrize(("starts", "used"), [("1", 1), ("2", 2), ("5", 5)])
def test_starts_limit_a_recording(suite: Suite, starts: str, used: int) -> None:
    suite.write(test_it=GATE)

    suite.run("--gpu-layout=tp1", "--gpu-baseline=new", f"--gpu-starts={starts}")

    assert suite.starts == used


def test_starts_limit_a_verdict(gate: Suite) -> None:
    gate.fakes(driver="slow_down=1.5")

    result = gate.run("--gpu-layout=tp1", "--gpu-starts=1")

    result.assert_outcomes(failed=1)
    assert gate.starts == 2  # the second confirms the regression


def test_budget_ends_measuring(suite: Suite) -> None:
    suite.write(test_it=GATE)

    suite.run("--gpu-layout=tp1", "--gpu-baseline=new", "--gpu-budget=1")

    assert suite.starts == 1


def test_second_gate_of_a_server_goes_on_with_the_fresh_one(settled: Suite) -> None:
    settled.write(test_it=GATE + "def test_after(vllm_server): vllm_server.server.check_alive()")

    settled.run("--gpu-layout=tp1").assert_outcomes(passed=2)

    assert settled.events == ["start tp1 org/tiny", "stop tp1 org/tiny"] * settled.starts


def test_server_that_does_not_come_up_again_is_the_cause(gate: Suite) -> None:
    gate.fakes(launcher="failures={2: ServerStartFailed('vLLM did not start again')}")
    gate.write(test_it=GATE + "def test_after(vllm_server): pass")

    result = gate.run("--gpu-layout=tp1")

    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["vLLM did not start again"])


def test_tolerance_makes_a_metric_gated_or_lax(gate: Suite) -> None:
    gate.fakes(driver="slow_down=1.3")
    lax = "--gpu-tolerance=median_ttft_ms=100%,median_tpot_ms=100%,request_throughput=60%"

    gate.run("--gpu-layout=tp1", lax).assert_outcomes(passed=1)
    result = gate.run("--gpu-layout=tp1", lax + ",p99_itl_ms=0.05")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["regression: p99_itl_ms 6.50 ms, allowed <= 5.25 ms (baseline 5.00 ms + 5%)"])


@pytest.mark.parametrize("mode", ["check", "new", "update"])
def test_metric_that_a_workload_cannot_have_is_never_a_pass(suite: Suite, mode: str) -> None:
    one_token = "{'input_tokens': 8, 'output_tokens': 1, 'concurrency': 1, 'requests': 4, 'name': 'one'}"
    suite.write(test_it=f"import pytest\npytestmark = pytest.mark.gpu_workload({one_token})" + GATE)

    result = suite.run("--gpu-layout=tp1", f"--gpu-baseline={mode}")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*median_tpot_ms is gated, and *"])
    assert suite.baselines == []


def test_verdict_is_given_to_the_test(settled: Suite) -> None:
    settled.write(
        test_it="""
        def test_it(measure, perf_gate):
            verdict = perf_gate(measure("smoke"))
            assert verdict.status == "pass"
            assert {metric.name for metric in verdict.metrics} == {
                "request_throughput", "median_ttft_ms", "median_tpot_ms"}
        """
    )

    settled.run("--gpu-layout=tp1").assert_outcomes(passed=1)
