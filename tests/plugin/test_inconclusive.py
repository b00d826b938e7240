"""``--gpu-inconclusive``: its own letter, word and count, and never a pass wherever the gate was asked."""

from __future__ import annotations

import pytest

from tests.support.suite import GATE, Suite


@pytest.fixture
def gate(suite: Suite) -> Suite:
    """One stored session: too few to rule out a change of 5 %."""
    suite.write(test_it=GATE)
    suite.run("--gpu-layout=tp1", "--gpu-baseline=new")
    return suite


def letters(result: pytest.RunResult) -> str:
    """What stands before ``[100%]``."""
    return next(line.split(" ")[0] for line in result.outlines if line.endswith("[100%]"))


def test_warn_has_its_own_letter_and_count_and_is_no_pass(gate: Suite) -> None:
    result = gate.run("--gpu-layout=tp1")

    assert (result.ret, letters(result)) == (0, "?")
    result.assert_outcomes()
    result.stdout.fnmatch_lines(
        [
            "  smoke: inconclusive, 3 server starts *",
            "    median_ttft_ms * inconclusive",
            "    median_ttft_ms: changed by *, interval * to *; changes below * could go unseen with 3 starts now "
            "and 1 stored session: *--gpu-tolerance=median_ttft_ms=*%*",
            "*= 1 inconclusive in *",
        ]
    )


@pytest.mark.parametrize("arguments", [("-v",), ("-rA",), ("-v", "-rA"), ("-q",), ("-rP",)], ids=" ".join)
def test_no_output_calls_it_passed(gate: Suite, arguments: tuple[str, ...]) -> None:
    result = gate.run("--gpu-layout=tp1", *arguments)

    assert result.ret == 0
    result.stdout.no_re_match_line(r".*(PASSED|\d passed|= PASSES =)")
    result.stdout.fnmatch_lines(["*1 inconclusive in *"])
    if "-v" in arguments:
        result.stdout.fnmatch_lines(["*test_speed[[]tp1[]] INCONCLUSIVE *"])


@pytest.mark.parametrize("origin", ["option", "ini"])
def test_fail_fails_the_test_and_says_what_it_would_take(gate: Suite, origin: str) -> None:
    if origin == "ini":
        gate.ini("gpulayout_inconclusive = fail")
    option = ["--gpu-inconclusive=fail"] if origin == "option" else []

    result = gate.run("--gpu-layout=tp1", *option)

    assert (result.ret, letters(result)) == (pytest.ExitCode.TESTS_FAILED, "F")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "inconclusive: median_ttft_ms: changed by *, interval * to *; changes below * could go unseen with *",
            "  provisional: 1 stored session; the spread rests partly on the documented prior",
            "  layout tp1 on 1 x NVIDIA H200 (GPU 0), model org/tiny, workload smoke",
            "  accept it: pytest *--gpu-baseline=update *",
        ]
    )
    result.stdout.no_fnmatch_line("*Traceback*")


IN_A_FIXTURE = """
import pytest

@pytest.fixture
def verdict(measure, perf_gate):
    return perf_gate(measure())

def test_speed(verdict): assert verdict.status == "inconclusive"
"""


def test_a_gate_in_a_fixture_counts_for_the_test(gate: Suite) -> None:
    gate.write(test_it=IN_A_FIXTURE)

    result = gate.run("--gpu-layout=tp1", "-v")

    result.assert_outcomes()
    result.stdout.fnmatch_lines(["*test_speed[[]tp1[]] INCONCLUSIVE *", "*1 inconclusive in *"])
    gate.run("--gpu-layout=tp1", "--gpu-inconclusive=fail").assert_outcomes(failed=1)


AFTER_THE_TEST = """
import pytest

@pytest.fixture
def gate(measure, perf_gate):
    yield
    perf_gate(measure())

def test_speed(gate): pass
"""


def test_a_gate_after_the_test_is_counted_beside_it(gate: Suite) -> None:
    gate.write(test_it=AFTER_THE_TEST)

    result = gate.run("--gpu-layout=tp1")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*1 passed, 1 inconclusive in *"])


OTHER = "{'name': 'other', 'input_tokens': 8, 'output_tokens': 8, 'concurrency': 2, 'requests': 8}"
TWICE = f"""
def test_speed(measure, perf_gate):
    perf_gate(measure())
    perf_gate(measure({OTHER}))
"""


def test_one_of_two_gates_is_enough(gate: Suite) -> None:
    gate.settle()
    gate.write(test_it=TWICE)
    gate.run("--gpu-layout=tp1", "--gpu-baseline=new").stdout.fnmatch_lines(["*1 baseline recorded*"])

    result = gate.run("--gpu-layout=tp1")

    result.assert_outcomes()
    result.stdout.fnmatch_lines(["  smoke: pass, *", "  other: inconclusive, *", "*1 inconclusive in *"])


@pytest.mark.end_to_end
@pytest.mark.parametrize(("policy", "code", "counts"), [("warn", 0, "2 inconclusive in"), ("fail", 1, "2 failed in")])
def test_workers_tell_the_controller(gate: Suite, policy: str, code: int, counts: str) -> None:
    pytest.importorskip("xdist")
    gate.run("--gpu-layout=tp1,tp2", "--gpu-baseline=new")

    result = gate.run("--gpu-layout=tp1,tp2", "-n2", f"--gpu-inconclusive={policy}", subprocess=True)

    assert result.ret == code
    result.stdout.fnmatch_lines([f"*{counts} *"])
