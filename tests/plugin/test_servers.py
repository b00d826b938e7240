"""Servers: started once for the tests that share one, in which order, and what happens when one fails."""

from __future__ import annotations

import pytest

from tests.support.suite import Suite

THREE_TESTS = """
def test_a(vllm_server): pass
def test_plain(): pass
def test_b(vllm_server): pass
def test_c(gpu_topology): pass
"""


def test_one_start_for_each_layout_and_stopped_before_the_next(suite: Suite) -> None:
    suite.write(test_one=THREE_TESTS, test_two=THREE_TESTS)

    suite.run("--gpu-layout=tp2,tp1").assert_outcomes(passed=14)

    assert suite.events == ["start tp2 org/tiny", "stop tp2 org/tiny", "start tp1 org/tiny", "stop tp1 org/tiny"]


def test_plain_test_between_keeps_the_server(suite: Suite) -> None:
    suite.fakes(
        more="""
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.name)  # as a plugin that shuffles tests may do
"""
    )
    suite.write(test_it=THREE_TESTS.replace("test_plain", "test_a_plain_one"))

    result = suite.run("--gpu-layout=tp1", "-v")

    result.stdout.fnmatch_lines(["*::test_a[[]tp1[]] PASSED*", "*::test_a_plain_one PASSED*", "*::test_b* PASSED*"])
    assert suite.events == ["start tp1 org/tiny", "stop tp1 org/tiny"]


def test_tests_of_one_server_stand_together_and_plain_tests_keep_their_places(suite: Suite) -> None:
    body = """
    import pytest
    def test_plain(): pass
    def test_default(vllm_server): pass
    @pytest.mark.gpu_model("org/other", max_model_len=64)
    def test_other(vllm_server): pass
    """
    suite.write(test_one=body, test_two=body)

    result = suite.run("--gpu-layout=tp1,tp2", "-v")

    result.assert_outcomes(passed=10)
    order = [line.split(" ")[0].replace("test_", "") for line in result.outlines if " PASSED" in line]
    assert order == [
        "one.py::plain",
        *("one.py::default[tp1]", "two.py::default[tp1]", "one.py::other[tp1]", "two.py::other[tp1]"),
        "two.py::plain",
        *("one.py::default[tp2]", "two.py::default[tp2]", "one.py::other[tp2]", "two.py::other[tp2]"),
    ]
    assert [event for event in suite.events if event.startswith("start")] == [
        "start tp1 org/tiny",
        "start tp1 org/other --max-model-len 64",
        "start tp2 org/tiny",
        "start tp2 org/other --max-model-len 64",
    ]


def test_collecting_starts_nothing_and_asks_for_no_gpu(suite: Suite) -> None:
    suite.fakes(topology="error=TopologyError('no NVIDIA driver was found')")
    suite.write(test_it=THREE_TESTS)

    result = suite.run("--gpu-layout=tp1,tp2", "--co", "-q")

    assert result.ret == 0
    result.stdout.fnmatch_lines(["test_it.py::test_a[[]tp1[]]", "test_it.py::test_a[[]tp2[]]"])
    assert suite.events == []


def test_selection_starts_only_what_is_needed(suite: Suite) -> None:
    suite.write(test_it=THREE_TESTS)

    suite.run("--gpu-layout=tp1,tp2", "-k", "tp2 and not test_c").assert_outcomes(passed=2, deselected=5)

    assert suite.events == ["start tp2 org/tiny", "stop tp2 org/tiny"]


FAILS_FIRST = """
def test_fails(vllm_server): assert False, "a plain failure"
def test_passes(vllm_server): pass
"""


def test_stop_at_the_first_failure_leaves_nothing_running(suite: Suite) -> None:
    suite.write(test_it=FAILS_FIRST)

    suite.run("--gpu-layout=tp1,tp2", "-x").assert_outcomes(failed=1)

    assert suite.events == ["start tp1 org/tiny", "stop tp1 org/tiny"]


def test_last_failed_and_failed_first(suite: Suite) -> None:
    suite.write(test_it=FAILS_FIRST)
    suite.run("--gpu-layout=tp1,tp2").assert_outcomes(failed=2, passed=2)

    suite.run("--gpu-layout=tp1,tp2", "--lf").assert_outcomes(failed=2)
    suite.run("--gpu-layout=tp1,tp2", "--ff").assert_outcomes(failed=2, passed=2)

    assert suite.starts == 2 + 2 + 2


def test_stepwise_skips_no_test_that_has_not_run(suite: Suite) -> None:
    body = """
    import pytest
    def test_first(vllm_server): pass
    @pytest.mark.gpu_model("org/other")
    def test_other(vllm_server): pass
    def test_last(vllm_server): assert {}
    """
    suite.write(test_it=body.format(False))
    suite.run("--gpu-layout=tp1", "--sw").assert_outcomes(passed=1, failed=1)
    suite.write(test_it=body.format(True))

    suite.run("--gpu-layout=tp1", "--sw").assert_outcomes(passed=2, deselected=1)


def test_start_failure_is_told_once_and_not_tried_again(suite: Suite) -> None:
    suite.fakes(
        launcher="failures={1: ServerStartFailed('vLLM did not start layout tp1\\n  cause: no kernel image')}"
    )
    suite.write(test_it=THREE_TESTS)

    result = suite.run("--gpu-layout=tp1,tp2")

    result.assert_outcomes(errors=2, passed=5)
    result.stdout.fnmatch_lines(
        [
            "vLLM did not start layout tp1",
            "  cause: no kernel image",
            "vLLM did not start layout tp1",
            "  (told in full by test_it.py::test_a[[]tp1[]]*)",
        ]
    )
    assert suite.events == ["start tp2 org/tiny", "stop tp2 org/tiny"]


def test_server_that_dies_is_reported_by_its_test_and_replaced_for_the_next(suite: Suite) -> None:
    suite.write(
        test_it="""
        def test_before(vllm_server): pass
        def test_kills(vllm_server): vllm_server.server.die("CUDA out of memory")
        def test_after(vllm_server): pass
        """
    )

    result = suite.run("--gpu-layout=tp1", "-v")

    result.assert_outcomes(passed=3, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at teardown of test_kills*",
            "the vLLM server for tp1 went away while it was in use",
            "  cause: CUDA out of memory",
        ]
    )
    assert suite.events == ["start tp1 org/tiny", "stop tp1 org/tiny"] * 2


def test_server_that_dies_under_load_is_the_cause_that_is_told(suite: Suite) -> None:
    suite.fakes(driver="errors={1: MeasurementError('no request was answered')}")
    suite.write(
        test_it="""
        def test_kills(vllm_server, measure):
            vllm_server.server.die("CUDA out of memory")
            measure()
        def test_after(vllm_server, measure): measure()
        """
    )

    result = suite.run("--gpu-layout=tp1")

    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["the vLLM server for tp1 went away while it was in use", "*CUDA out of memory"])
    result.stdout.no_fnmatch_line("*no request was answered*")
    assert suite.starts == 2


def test_load_that_fails_on_a_living_server(suite: Suite) -> None:
    suite.fakes(driver="errors={1: MeasurementError('no request was answered')}")
    suite.write(test_it="def test_it(measure): measure()\ndef test_after(vllm_server): pass")

    result = suite.run("--gpu-layout=tp1")

    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["no request was answered"])
    assert suite.starts == 1


def test_ctrl_c_while_loading(suite: Suite) -> None:
    suite.fakes(launcher="failures={2: KeyboardInterrupt()}")
    suite.write(test_it=THREE_TESTS)

    result = suite.run("--gpu-layout=tp1,tp2")

    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["*interrupted while the server of layout tp2 was loading; it was stopped*"])
    assert suite.events == ["start tp1 org/tiny", "stop tp1 org/tiny"]


def test_ctrl_c_in_a_test_leaves_nothing_running(suite: Suite) -> None:
    suite.write(test_it="def test_it(vllm_server): raise KeyboardInterrupt")

    result = suite.run("--gpu-layout=tp1", subprocess=True)

    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert suite.events == ["start tp1 org/tiny", "stop tp1 org/tiny"]


def test_view_of_the_server(suite: Suite) -> None:
    suite.write(
        test_it="""
        def test_it(vllm_server):
            assert vllm_server.url == "http://127.0.0.1:9"
            assert vllm_server.model == "org/tiny"
            assert sorted(vllm_server.pids) == [0, 1]
            assert vllm_server.fingerprint == "vllm-0.32.0-tp2-0123abcd"
            assert "Application startup complete" in vllm_server.log.read_text()
        """
    )

    suite.run("--gpu-layout=tp2").assert_outcomes(passed=1)


def test_errors_of_a_test_keep_their_traceback(suite: Suite) -> None:
    suite.write(test_it="def test_it(vllm_server, measure):\n    measure()\n    {}['missing']")

    result = suite.run("--gpu-layout=tp1")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [">       {}[[]'missing'[]]", "E       KeyError: 'missing'", "test_it.py:3: KeyError"]
    )
