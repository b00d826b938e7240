"""``--gpu-layout``: which tests run, how often, and what is said without it."""

from __future__ import annotations

import pytest

from tests.support.suite import Suite

TWO_TESTS = """
def test_layout(gpu_layout):
    assert str(gpu_layout).startswith("tp")

def test_plain():
    pass
"""


def test_without_a_layout_tests_are_skipped_and_say_what_to_type(suite: Suite) -> None:
    suite.write(test_it=TWO_TESTS)

    result = suite.run("-rs")

    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(
        ["SKIPPED * needs a GPU layout: run with --gpu-layout=tp1 (without GPUs add --gpu-platform=cpu)"]
    )
    result.stdout.no_fnmatch_line("gpu layout:*")


@pytest.mark.parametrize(
    "body",
    [
        "def test_it(request): request.getfixturevalue('gpu_layout')",
        "def test_it(request): request.getfixturevalue('gpu_session')",
        "import pytest\n@pytest.mark.gpu_layout('tp2')\ndef test_it(): raise AssertionError",
        "def test_it(vllm_server): raise AssertionError",
        "def test_it(measure): raise AssertionError",
    ],
)
def test_without_a_layout_no_way_to_a_server_runs(suite: Suite, body: str) -> None:
    suite.write(test_it=body)

    suite.run().assert_outcomes(skipped=1)


@pytest.mark.parametrize(
    ("arguments", "ids"),
    [
        (["--gpu-layout=tp1"], ["tp1"]),
        (["--gpu-layout=tp1,tp2"], ["tp1", "tp2"]),
        (["--gpu-layout=tp2", "--gpu-layout=tp1"], ["tp2", "tp1"]),
        (["--gpu-layout=tp2,tp2,tp1", "--gpu-layout=tp2"], ["tp2", "tp1"]),
        (["--gpu-layout=pp2_tp2,tp2-pp2"], ["tp2pp2"]),
        (["--gpu-layout=dp2tp2ep,tp1x4"], ["dp2tp2ep", "tp1x4"]),
    ],
)
def test_tests_run_once_for_each_layout(suite: Suite, arguments: list[str], ids: list[str]) -> None:
    suite.write(test_it="def test_it(gpu_layout): pass")

    result = suite.run(*arguments, "-v")

    result.assert_outcomes(passed=len(ids))
    result.stdout.fnmatch_lines([f"*::test_it[[]{name}[]] PASSED*" for name in ids])


@pytest.mark.parametrize(
    ("text", "column"), [("tp0", 3), ("tq2", 1), ("tp2tp2", 4), ("tp2,tp02", 3), ("tp2,", 1), ("ep", 1)]
)
def test_unknown_layout_is_misuse_and_names_the_column(suite: Suite, text: str, column: int) -> None:
    suite.write(test_it=TWO_TESTS)

    result = suite.run(f"--gpu-layout={text}")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --gpu-layout (ini: gpulayout_layout): layout: *", f"*^ column {column}"])


@pytest.mark.parametrize(
    ("layout", "outcome"),
    [("tp2", {"deselected": 1, "passed": 1}), ("tp4", {"passed": 2}), ("tp2,tp4", {"deselected": 1, "passed": 3})],
)
def test_marker_deselects_for_other_layouts(suite: Suite, layout: str, outcome: dict[str, int]) -> None:
    suite.write(
        test_it="""
        import pytest

        @pytest.mark.gpu_layout("tp4", "tp8")
        def test_large(gpu_layout):
            assert str(gpu_layout) == "tp4"

        def test_any(gpu_layout):
            pass
        """
    )

    suite.run(f"--gpu-layout={layout}").assert_outcomes(**outcome)


def test_marker_alone_parametrizes(suite: Suite) -> None:
    suite.write(test_it="import pytest\n@pytest.mark.gpu_layout('tp2')\ndef test_it(): pass")

    result = suite.run("--gpu-layout=tp1,tp2", "-v")

    result.assert_outcomes(passed=1, deselected=1)
    result.stdout.fnmatch_lines(["*::test_it[[]tp2[]] PASSED*"])


def test_wrong_layout_in_a_marker_is_misuse(suite: Suite) -> None:
    suite.write(test_it="import pytest\n@pytest.mark.gpu_layout('tp2', 'tpp')\ndef test_it(gpu_layout): pass")

    result = suite.run("--gpu-layout=tp2")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: marker gpu_layout of test_it.py::test_it[[]tp2[]]: layout: expected a factor *", "*^ column 1"]
    )


def test_layout_asked_for_at_run_time_is_refused(suite: Suite) -> None:
    suite.write(test_it="def test_it(request): request.getfixturevalue('vllm_server')")

    result = suite.run("--gpu-layout=tp2")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*name it, or vllm_server, among the test's arguments*"])
    assert suite.events == []


@pytest.mark.parametrize("layout", ["tp2x2@2", "tp4pcp2dcp4"])
def test_layout_that_is_read_but_not_started(suite: Suite, layout: str) -> None:
    suite.write(test_it="def test_it(vllm_server): pass")

    result = suite.run(f"--gpu-layout={layout}")

    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["*a layout that this version can start was required, found *", "*try --gpu-layout=tp*"]
    )
    assert suite.events == []
