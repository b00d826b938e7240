"""``perf_gate``: each verdict, its words, its letter, its exit code, and how many server starts it takes."""

from __future__ import annotations

import pytest

from tests.support.suite import GATE, Suite


@pytest.fixture
def gate(suite: Suite) -> Suite:
    """A suite with one gate and a stored baseline: TTFT 20 ms, TPOT 5 ms."""
    suite.write(test_it=GATE)
    suite.run("--gpu-layout=tp1", "--gpu-baseline=new")
    (suite.pytester.path / "events.txt").unlink()
    return suite


def test_regression_fails_and_says_what_where_and_what_next(gate: Suite) -> None:
    gate.fakes(driver="slow_down=1.3", topology="driver_version='999.1'")

    result = gate.run("--gpu-layout=tp1")

    result.assert_outcomes(failed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "regression: median_ttft_ms 26.0 ms, allowed <= 21.6 ms (baseline 20.0 ms + 8%)",
            "    change +30.0%, interval +*% to +*%, n = * starts against 3, smallest change that could be seen *%",
            "  changed since the baseline: driver: 580.65.06 -> 999.1",
            "  provisional: fewer than 5 stored sessions, *",
            "  layout tp1 on 1 x NVIDIA H200 (GPU 0), model org/tiny, workload smoke",
            "  /*/gpu-baselines/org-tiny-*/tp1/*/smoke.json",
            "  accept it: pytest --gpu-model=org/tiny --gpu-layout=tp1 "
            "--gpu-baseline=update 'test_it.py::test_speed[[]tp1[]]'",
        ]
    )
    result.stdout.fnmatch_lines(["    request_throughput *  -23.1%  regression"])
    result.stdout.no_fnmatch_line("*Traceback*")
    assert gate.starts == 2


def test_improvement_passes(gate: Suite) -> None:
    gate.fakes(driver="slow_down=0.5")

    result = gate.run("--gpu-layout=tp1")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["  smoke: improvement, *", "    median_ttft_ms *  -50.0%  improvement"])


def test_inconclusive_is_its_own_count_and_never_passed(gate: Suite) -> None:
    gate.fakes(driver="slow_down=[1.25, 0.8, 1.0]")

    result = gate.run("--gpu-layout=tp1")

    assert result.ret == 0
    result.assert_outcomes(passed=0)
    assert "?" in {line.split(" ")[0] for line in result.outlines}
    result.stdout.fnmatch_lines(
        [
            "  smoke: inconclusive, 3 server starts*",
            "*cannot be ruled out with 3 starts now and 3 stored: allow more (--gpu-starts=5)*",
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
    assert gate.starts == 1


def test_budget_ends_measuring(suite: Suite) -> None:
    suite.write(test_it=GATE)

    suite.run("--gpu-layout=tp1", "--gpu-baseline=new", "--gpu-budget=1")

    assert suite.starts == 1


def test_second_gate_of_a_server_goes_on_with_the_fresh_one(gate: Suite) -> None:
    gate.write(test_it=GATE + "def test_after(vllm_server): vllm_server.server.check_alive()")

    gate.run("--gpu-layout=tp1").assert_outcomes(passed=2)

    assert gate.events == ["start tp1 org/tiny", "stop tp1 org/tiny"] * gate.starts


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


def test_metric_that_does_not_exist_is_inconclusive(gate: Suite) -> None:
    one_token = "{'input_tokens': 8, 'output_tokens': 1, 'concurrency': 1, 'requests': 4, 'name': 'one'}"
    gate.write(test_it=f"import pytest\npytestmark = pytest.mark.gpu_workload({one_token})" + GATE)
    gate.run("--gpu-layout=tp1", "--gpu-baseline=new")

    result = gate.run("--gpu-layout=tp1")

    result.stdout.fnmatch_lines(["*median_tpot_ms has no value now: it cannot be judged*", "*1 inconclusive*"])


def test_verdict_is_given_to_the_test(gate: Suite) -> None:
    gate.write(
        test_it="""
        def test_it(measure, perf_gate):
            verdict = perf_gate(measure("smoke"))
            assert verdict.status == "pass"
            assert {metric.name for metric in verdict.metrics} == {
                "request_throughput", "median_ttft_ms", "median_tpot_ms"}
        """
    )

    gate.run("--gpu-layout=tp1").assert_outcomes(passed=1)
