"""``--gpu-base`` and ``--gpu-base-vllm-args``: another vLLM in place of a stored baseline, in turn on these GPUs."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.support.stream_server import Reply, StreamServer
from tests.support.suite import GATE, Suite

OLD = "--gpu-base-vllm-args=--old"


@pytest.fixture
def gate(suite: Suite) -> Suite:
    suite.write(test_it=GATE)
    return suite


def slow_base(factor: float) -> str:
    return f"slow_down={{'--old': {factor}}}"


def test_equal_sides_pass_without_a_stored_baseline_and_store_nothing(gate: Suite) -> None:
    result = gate.run("--gpu-layout=tp2", OLD, "--gpu-results=results.json")

    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.OK
    assert gate.baselines == []
    result.stdout.fnmatch_lines(
        [
            "gpu layout: in pairs with base this Python with --old, at most 8 starts of each side",
            "tp2: block 1 of at most 8, base this Python with --old: request_throughput +0.0%, *",
            "tp2: block 3 of at most 8, base this Python with --old: request_throughput ?0.0% pass, *",
            "  smoke: pass, 3 server starts against 3 of base this Python with --old  [[]test_it.py::*",
            "    candidate (vLLM 0.32.0) against base this Python with --old (vLLM 0.32.0): 3 blocks, fresh servers "
            "of both sides, in the order CB BC *; the spread between starts is that of these blocks alone",
            "    signs: request_throughput worse in ? of 3 blocks, *",
        ]
    )
    [record] = [r for r in gate.read_results()["records"] if r["kind"] == "performance"]
    assert len(record["runs"]) == len(record["base"]["runs"]) == 3
    assert record["base"]["identity"]["sut"]["arguments"] == "--old"
    assert record["changed"] == ["arguments: --old -> "]
    seeds = [[run["gpulayout"]["seed"] for run in runs] for runs in (record["runs"], record["base"]["runs"])]
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 3


def test_sides_take_turns_and_never_run_together(gate: Suite) -> None:
    gate.run("--gpu-layout=tp1", OLD)

    running, starts = 0, []
    for event in gate.events:
        running += 1 if event.startswith("start") else -1
        assert 0 <= running <= 1
        if event.startswith("start"):
            starts.append(event.endswith("--old"))
    assert running == 0
    blocks = [starts[n : n + 2] for n in range(0, 6, 2)]
    assert blocks[0] == [False, True]
    assert blocks[1] == [True, False]
    assert sorted(blocks[2]) == [False, True]


def test_regression_fails_and_names_both_sides(gate: Suite) -> None:
    gate.fakes(launcher=slow_base(0.7))

    result = gate.run("--gpu-layout=tp1", OLD, "--junitxml=junit.xml")

    result.assert_outcomes(failed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "regression: median_ttft_ms 20.0 ms, allowed <= 15.1 ms (baseline 14.0 ms + 8%)",
            "    change +42.9%, interval +42.9% to +42.9%, n = 3 starts against 3, *",
            "  candidate (vLLM 0.32.0) against base this Python with --old (vLLM 0.32.0): 3 blocks, *",
            "  signs: *median_ttft_ms worse in 3 of 3 blocks*",
            "  layout tp1 on 1 x NVIDIA H200 (GPU 0), model org/tiny, workload smoke",
            "  base this Python with --old",
            "  accept it: let it be the base from now on (--gpu-base), or allow more (--gpu-tolerance)",
        ]
    )
    result.stdout.no_fnmatch_line("*Traceback*")
    [suite] = ElementTree.parse("junit.xml").iter("testsuite")
    assert (suite.get("failures"), suite.get("errors")) == ("1", "0")


def test_improvement_passes(gate: Suite) -> None:
    gate.fakes(launcher=slow_base(2.0))

    result = gate.run("--gpu-layout=tp1", OLD)

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["  smoke: improvement, *", "    median_ttft_ms *  -50.0%  improvement"])


def test_what_stays_open_is_inconclusive_and_says_what_it_takes(gate: Suite) -> None:
    gate.fakes(driver="noise=0.2, seed=3")

    result = gate.run("--gpu-layout=tp1", OLD)

    assert result.ret == 0
    result.assert_outcomes(passed=0)
    result.stdout.fnmatch_lines(
        ["  smoke: inconclusive, 8 server starts against 8 of base *", "    *cannot be ruled out with 8 blocks: *"]
    )
    assert gate.run("--gpu-layout=tp1", OLD, "--gpu-inconclusive=fail").ret == pytest.ExitCode.TESTS_FAILED


def test_starts_and_budget_limit_the_blocks(gate: Suite) -> None:
    gate.fakes(driver="noise=0.2, seed=3")

    by_starts = gate.run("--gpu-layout=tp1", OLD, "--gpu-starts=3")
    by_starts.stdout.fnmatch_lines(["  smoke: inconclusive, 3 server starts against 3 of base *"])
    by_budget = gate.run("--gpu-layout=tp1", OLD, "--gpu-budget=0.001")
    by_budget.stdout.fnmatch_lines(
        [
            "  smoke: inconclusive, 1 server start against 1 of base *",
            "    the budget of 0.001 s ended after 1 block of at most 8; a verdict needs 3 at least: allow more *",
        ]
    )


def test_the_spread_of_a_stored_baseline_is_used_and_the_file_left_alone(
    gate: Suite, pytester: pytest.Pytester
) -> None:
    gate.run("--gpu-layout=tp1", "--gpu-baseline=new", "--gpu-write-in-ci=yes")
    [file] = gate.baselines
    before = file.read_bytes()

    result = gate.run("--gpu-layout=tp1", OLD)

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*; the spread between starts is that of these blocks and of */smoke.json"])
    assert file.read_bytes() == before
    file.write_text("{")
    broken = gate.run("--gpu-layout=tp1", OLD)
    broken.assert_outcomes(passed=1)
    broken.stdout.fnmatch_lines(["*of these blocks alone; what is stored cannot be used: *"])


@pytest.mark.parametrize("number", [2, 4])
def test_a_server_that_does_not_start_fails_the_gate_and_says_whose_it_was(gate: Suite, number: int) -> None:
    gate.fakes(launcher=f"failures={{{number}: ServerStartFailed('CUDA out of memory')}}")

    result = gate.run("--gpu-layout=tp1", OLD)

    result.assert_outcomes(failed=1)
    side, block = ("base this Python with --old", 1) if number == 2 else ("candidate", 2)
    result.stdout.fnmatch_lines(
        [f"the {side} of paired mode could not be measured in block {block}", "CUDA out of *"]
    )
    assert gate.events.count("start tp1 org/tiny --old") == gate.events.count("stop tp1 org/tiny --old")


def test_a_base_that_does_not_start_is_not_tried_again_by_the_next_gate(gate: Suite) -> None:
    gate.write(test_it=GATE + GATE.replace("test_speed", "test_again"))
    gate.fakes(launcher="failures={2: ServerStartFailed('CUDA out of memory')}")

    result = gate.run("--gpu-layout=tp1", OLD)

    result.assert_outcomes(failed=2)
    assert gate.events.count("start tp1 org/tiny --old") == 0


def test_a_base_that_dies_is_named(gate: Suite) -> None:
    gate.fakes(driver="errors={4: MeasurementError('all requests failed')}")

    result = gate.run("--gpu-layout=tp1", OLD)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["the * of paired mode could not be measured in block 2", "all requests failed"])
    assert sum(event.startswith("start") for event in gate.events) == sum(
        event.startswith("stop") for event in gate.events
    )


def test_invalid_numbers_of_either_side_are_no_verdict(gate: Suite) -> None:
    gate.fakes(driver="fail_requests=1")
    result = gate.run("--gpu-layout=tp1", OLD)

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["invalid: candidate: failed-requests: *", "  base this Python with --old"])


def test_ctrl_c_while_the_base_loads_leaves_nothing(gate: Suite) -> None:
    gate.fakes(launcher="failures={2: KeyboardInterrupt()}")

    result = gate.run("--gpu-layout=tp1", OLD)

    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert gate.events == ["start tp1 org/tiny", "stop tp1 org/tiny"]


def test_the_tests_own_server_is_there_afterwards(gate: Suite) -> None:
    gate.write(
        test_it="""
        def test_speed(vllm_server, measure, perf_gate):
            perf_gate(measure())
            assert "--old" not in vllm_server.server.spec.arguments

        def test_next(vllm_server):
            assert "--old" not in vllm_server.server.spec.arguments
        """
    )

    gate.run("--gpu-layout=tp1", OLD).assert_outcomes(passed=2)
    assert sum(event.startswith("start") for event in gate.events) == sum(
        event.startswith("stop") for event in gate.events
    )


def test_a_server_that_has_served_before_is_no_fresh_one(gate: Suite) -> None:
    gate.write(
        test_it="""
        def test_speed(measure, perf_gate):
            measure()
            perf_gate(measure())
        """
    )

    gate.run("--gpu-layout=tp1", OLD).assert_outcomes(passed=1)

    assert gate.starts in (7, 8)  # three of each side, and the one that had served


def test_off_judges_nothing(gate: Suite) -> None:
    result = gate.run("--gpu-layout=tp1", OLD, "--gpu-baseline=off")

    assert gate.starts == 1
    result.stdout.fnmatch_lines(["*1 not judged in *"])


def test_arguments_of_the_marker_stay_on_both_sides(gate: Suite) -> None:
    gate.write(test_it="import pytest\n@pytest.mark.gpu_model('org/tiny', max_num_seqs=4)" + GATE)

    gate.run("--gpu-layout=tp1", "--gpu-vllm-args=--new", OLD).assert_outcomes(passed=1)

    assert set(gate.events) >= {
        "start tp1 org/tiny --new --max-num-seqs 4",
        "start tp1 org/tiny --old --max-num-seqs 4",
    }


# -- another Python --------------------------------------------------------------------------------------------------


def fake_venv(folder: Path, *, vllm: str | None = "0.31.0", where: str = "/opt/old/vllm") -> Path:
    """A folder with a bin/python that answers as an interpreter with this vLLM would."""
    found = {"python": "3.11", "vllm": vllm, "torch": "2.12.0", "folder": where if vllm else None}
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho 'gpulayout-base:{json.dumps(found)}'\n")
    python.chmod(0o755)
    return folder


def test_a_venv_is_served_by_its_python_and_its_versions_are_named(gate: Suite, pytester: pytest.Pytester) -> None:
    venv = fake_venv(pytester.path / "old")
    gate.fakes(launcher=f"slow_down={{{str(venv / 'bin' / 'python')!r}: 0.5}}")

    result = gate.run("--gpu-layout=tp1", "--gpu-base=old")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["regression: median_ttft_ms 20.0 ms, *", "*torch*2.12.0*", "  base old"])


def test_a_base_without_vllm_is_refused_before_anything_starts(gate: Suite, pytester: pytest.Pytester) -> None:
    fake_venv(pytester.path / "old", vllm=None)

    result = gate.run("--gpu-layout=tp1", "--gpu-base=old")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: a base with vLLM was required, and vLLM is not installed in it", "  in */old/*"]
    )
    assert gate.events == []


# -- a URL -----------------------------------------------------------------------------------------------------------


def test_a_running_server_is_one_draw_and_what_is_not_proved_is_named(gate: Suite) -> None:
    gate.model = "m"
    with StreamServer(Reply()) as server:
        result = gate.run("--gpu-layout=tp1", f"--gpu-base={server.url}")

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        [
            "  smoke: pass, 3 server starts against 3 of base http://127.0.0.1:*",
            "    candidate (vLLM 0.32.0) against base http://127.0.0.1:* (vLLM unknown): 3 blocks, fresh servers "
            "of the candidate, *",
            "    the base was one server throughout: *",
            "    not proved of the base: its vLLM version, its layout, its devices *",
        ]
    )
    assert {event for event in gate.events if event.startswith("start")} == {"start tp1 m"}


def test_a_running_server_must_serve_the_model_under_its_name(gate: Suite) -> None:
    with StreamServer(Reply()) as server:
        result = gate.run("--gpu-layout=tp1", f"--gpu-base={server.url}")

    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["the base must serve the model under the same name, org/tiny; found m"])


def test_the_key_of_a_running_server_comes_from_the_environment(gate: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    gate.model = "m"
    with StreamServer(Reply(), api_key="hush") as server:
        refused = gate.run("--gpu-layout=tp1", f"--gpu-base={server.url}")
        monkeypatch.setenv("GPULAYOUT_BASE_API_KEY", "hush")
        accepted = gate.run("--gpu-layout=tp1", f"--gpu-base={server.url}")

    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["ERROR: a base that answers was required, found HTTP 401: it asks for a key", "*"])
    accepted.assert_outcomes(passed=1)
    accepted.stdout.no_fnmatch_line("*hush*")


def test_a_server_that_does_not_answer_is_refused_before_anything_starts(gate: Suite) -> None:
    with StreamServer(Reply()) as server:
        url = server.url
    result = gate.run("--gpu-layout=tp1", f"--gpu-base={url}")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: a server that takes connections is needed"])
    assert gate.events == []


# -- wrong use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu-base=nowhere"], "--gpu-base (ini: gpulayout_base): a Python with vLLM was required, found nothing"),
        (["--gpu-base=."], "--gpu-base (ini: gpulayout_base): a folder with bin/python was required, found none"),
        (["--gpu-base=test_it.py"], "*: a Python that can be run was required, found a file"),
        (["--gpu-base=http://me:secret@h/"], "*: a URL without user, key and query was expected"),
        (["--gpu-base=http://h", OLD], "*: a server that already runs takes no arguments"),
        (["--gpu-base-vllm-args=--port 80"], "--gpu-base-vllm-args *: --port is set by pytest-gpulayout; *"),
        (
            [OLD, "--gpu-starts=2"],
            "--gpu-starts *: 3 to 24 starts of each side were expected with --gpu-base, found 2",
        ),
        ([OLD, "--gpu-starts=25"], "--gpu-starts *: 3 to 24 starts of each side were expected *, found 25"),
        ([OLD, "--gpu-baseline=new"], "--gpu-base and --gpu-baseline=new were both asked for: *"),
        ([OLD, "--gpu-baseline=update"], "--gpu-base and --gpu-baseline=update were both asked for: *"),
    ],
)
def test_wrong_use_is_told_before_anything_starts(gate: Suite, arguments: list[str], message: str) -> None:
    result = gate.run("--gpu-layout=tp1", *arguments)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: {message}"])
    result.stderr.no_fnmatch_line("*secret*")
    assert gate.events == []
