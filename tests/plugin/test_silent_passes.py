"""Ways in which a gate could pass without having looked: each ends red, and says why."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_gpulayout.schemas import validate
from tests.support.suite import GATE, Suite

TP1 = "--gpu-layout=tp1"
NEW = "--gpu-baseline=new"


@pytest.fixture
def gate(suite: Suite) -> Suite:
    """One gate, and a settled baseline of the same numbers."""
    suite.write(test_it=GATE)
    suite.run(TP1, NEW)
    suite.settle()
    return suite


def test_the_gate_passes_where_nothing_is_wrong(gate: Suite) -> None:
    assert gate.run(TP1).ret == 0
    gate.run(TP1, "--gpu-inconclusive=fail").assert_outcomes(passed=1)


def is_red(suite: Suite, *arguments: str, says: str) -> pytest.RunResult:
    """Run, and find one failed test with these words. :param says: a line, with ``*`` for anything."""
    before = [file.read_bytes() for file in suite.baselines]
    result = suite.run(TP1, *arguments)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([says])
    assert [file.read_bytes() for file in suite.baselines] == before
    return result


def edit(suite: Suite, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the stored document as somebody with an editor would."""
    (file,) = suite.baselines
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


# -- what is compared with -------------------------------------------------------------------------------------------


def test_missing_key_since_the_file_was_moved(gate: Suite) -> None:
    (file,) = gate.baselines
    file.rename(file.with_name("renamed.json"))

    result = is_red(gate, says="a stored baseline was required, and there is none")
    result.stdout.fnmatch_lines(
        ["  nearest is */renamed.json, which differs in", "    its place: the key is the same, *"]
    )


def test_missing_key_since_nothing_was_ever_stored(suite: Suite) -> None:
    suite.write(test_it=GATE)
    is_red(suite, says="a stored baseline was required, and there is none")


def test_empty_folder_elsewhere(gate: Suite) -> None:
    is_red(gate, "--gpu-baseline-dir=elsewhere", says="a stored baseline was required, and there is none")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("0.0", "*sessions[[]0].runs[[]0].metrics.median_ttft_ms[[]0]: 0.0 *"),
        ("-1.0", "*sessions[[]0].runs[[]0].metrics.median_ttft_ms[[]0]: -1.0 *"),
        ("NaN", "*NaN is not a number*"),
        ("Infinity", "*Infinity is not a number*"),
        ("1e999", "*sessions[[]0].runs[[]0].metrics.median_ttft_ms[[]0]: inf *"),
        ("null", "*sessions[[]0].runs[[]0].metrics.median_ttft_ms[[]0]: None *"),
    ],
)
def test_metric_that_is_no_positive_number_in_the_store(gate: Suite, value: str, told: str) -> None:
    (file,) = gate.baselines
    text, count = re.subn(r'("median_ttft_ms": \[)[0-9.]+', rf"\g<1>{value}", file.read_text(), count=1)
    assert count == 1
    file.write_text(text)

    is_red(gate, says=told)


def test_metric_that_was_taken_out_of_the_store(gate: Suite) -> None:
    def remove(document: dict[str, Any]) -> None:
        for session in document["sessions"]:
            for run in session["runs"]:
                del run["metrics"]["median_ttft_ms"]

    edit(gate, remove)

    told = "no-baseline: median_ttft_ms is gated, and no stored session that can be compared has it; *"
    is_red(gate, "--gpu-results=results.json", says=told)

    document = gate.read_results()
    assert validate(document, "results") == []
    (record,) = [record for record in document["records"] if record["kind"] == "performance"]
    judged = {metric["name"]: metric["verdict"] for metric in record["metrics"]}
    assert (record["verdict"], judged) == ("no-baseline", {"request_throughput": "pass", "median_tpot_ms": "pass"})


def test_stored_sessions_of_fewer_requests(gate: Suite) -> None:
    def shrink(document: dict[str, Any]) -> None:
        for session in document["sessions"]:
            for run in session["runs"]:
                run["requests"] = 4

    edit(gate, shrink)

    result = is_red(gate, says="no-baseline: 9 stored sessions left out: 1 requests in a batch there, 24 now")
    result.stdout.fnmatch_lines(["no-baseline: median_ttft_ms is gated, and no stored session *"])


def test_one_stored_session_of_fewer_requests_is_left_out_and_named(gate: Suite) -> None:
    edit(gate, lambda document: document["sessions"][0]["runs"][0].update(requests=4))

    result = gate.run(TP1)

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["    1 stored session left out: 1, 24 requests in a batch there, 24 now"])


DAMAGE: dict[str, tuple[Callable[[str], str], str]] = {
    "truncated": (lambda text: text[: len(text) // 2], "*this file is none: it is not JSON *"),
    "empty": (lambda text: "", "*this file is none: it is not JSON *"),
    "no document": (lambda text: "[]", "*this file is none: *"),
    "no session": (lambda text: json.dumps({**json.loads(text), "sessions": []}), "*this file is none: *sessions*"),
    "conflict": (
        lambda text: text.replace("\n ]", "\n<<<<<<< HEAD\n=======\n>>>>>>> theirs\n ]", 1),
        "a baseline document was required, found git's conflict markers: the merge is not finished",
    ),
    "newer": (
        lambda text: json.dumps({**json.loads(text), "schema_version": 99}),
        "*found 99: it was written by a newer pytest-gpulayout",
    ),
    "version of nobody": (
        lambda text: json.dumps({**json.loads(text), "schema_version": 0}),
        "*this file is none: *",
    ),
}


@pytest.mark.parametrize("mode", ["check", "new", "update"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_corrupt_file(gate: Suite, damage: str, mode: str) -> None:
    change, told = DAMAGE[damage]
    (file,) = gate.baselines
    text = file.read_text()
    file.write_text(change(text))
    assert file.read_text() != text

    is_red(gate, f"--gpu-baseline={mode}", says=told)


def test_bytes_that_are_no_text(gate: Suite) -> None:
    (file,) = gate.baselines
    file.write_bytes(b"\xff\xfe" + file.read_bytes())

    is_red(gate, says="*baseline *")


def test_folder_in_place_of_the_file(gate: Suite) -> None:
    (file,) = gate.baselines
    file.unlink()
    file.mkdir()

    gate_runs = gate.run(TP1)
    gate_runs.assert_outcomes(failed=1)
    gate_runs.stdout.fnmatch_lines(["*baseline *", f"  in {file}*"])


def test_symlink_that_leads_to_itself(gate: Suite) -> None:
    (file,) = gate.baselines
    file.unlink()
    file.symlink_to(file)

    result = gate.run(TP1)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*baseline *"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_folder_that_cannot_be_read(gate: Suite) -> None:
    (file,) = gate.baselines
    file.chmod(0)

    is_red(gate, says="*Permission denied*")


# -- who compares ----------------------------------------------------------------------------------------------------


def test_renamed_test_still_finds_its_baseline(gate: Suite) -> None:
    """A baseline belongs to model, layout, hardware and workload, not to the name of a test."""
    gate.fakes(driver="slow_down=1.5")
    gate.write(test_it=GATE.replace("test_speed", "test_renamed"))

    is_red(gate, says="regression: median_ttft_ms 30.0 ms, allowed *")


def test_renamed_workload(gate: Suite) -> None:
    renamed = "from dataclasses import replace\nfrom pytest_gpulayout.workload import BUILTIN_WORKLOADS"
    gate.write(
        test_it=f"{renamed}\n"
        "def test_speed(measure, perf_gate, gpu_workload): perf_gate(measure(replace(gpu_workload, name='other')))"
    )

    result = is_red(gate, says="a stored baseline was required, and there is none")
    result.stdout.fnmatch_lines(["    workload.name: stored 'smoke', now 'other'"])


def test_other_workload_of_the_same_name(gate: Suite) -> None:
    gate.write(
        test_it="from dataclasses import replace\n"
        "def test_speed(measure, perf_gate, gpu_workload): perf_gate(measure(replace(gpu_workload, requests=8)))"
    )

    is_red(gate, says="  workload.fingerprint: stored *, now *")


NOBODY = """
@pytest.fixture
def gpu_tolerances(): return {}
"""


@pytest.mark.parametrize("mode", ["check", "new", "update"])
def test_tolerances_that_name_no_metric(gate: Suite, mode: str) -> None:
    gate.fakes(driver="slow_down=1.5", more=NOBODY)

    is_red(gate, f"--gpu-baseline={mode}", says="invalid: a gated metric was required, found none; name one: *")


ONE_TOKEN = "{'input_tokens': 8, 'output_tokens': 1, 'concurrency': 1, 'requests': 8, 'name': 'one'}"


@pytest.mark.parametrize("mode", ["check", "new", "update"])
def test_tolerance_of_a_metric_that_the_workload_cannot_have(gate: Suite, mode: str) -> None:
    gate.write(test_it=f"import pytest\npytestmark = pytest.mark.gpu_workload({ONE_TOKEN})" + GATE)

    is_red(
        gate,
        f"--gpu-baseline={mode}",
        says="invalid: median_tpot_ms is gated, and 1 start of 1 did not measure it; *",
    )


def test_tolerance_of_a_metric_that_does_not_exist(gate: Suite) -> None:
    result = gate.run(TP1, "--gpu-tolerance=median_latency=5%")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*tolerance: unknown metric 'median_latency', did you mean *"])


# -- what is measured ------------------------------------------------------------------------------------------------


def wrapped(body: str) -> str:
    """A driver that changes what the fake one measured. :param body: turns ``trace`` into another one."""
    return f"""
from dataclasses import replace

class Wrapped(FakeLoadDriver):
    def run(self, *arguments, **named):
        trace = super().run(*arguments, **named)
        return {body}

def pytest_gpulayout_load_driver(settings):
    return Wrapped()
"""


FIRST = "replace(trace, batches=tuple(replace(b, requests={}) for b in trace.batches))"


@pytest.mark.parametrize("mode", ["check", "new", "update"])
def test_fewer_requests_than_the_workload_has(gate: Suite, mode: str) -> None:
    gate.fakes(more=wrapped(FIRST.format("b.requests[:12]")))

    is_red(
        gate,
        f"--gpu-baseline={mode}",
        says="invalid: too-few-samples: 4 batches of 24 requests were asked for, found 4 of 12 (server start 1); *",
    )


def test_fewer_batches_than_the_workload_has(gate: Suite) -> None:
    gate.fakes(more=wrapped("replace(trace, batches=trace.batches[:1])"))

    is_red(gate, says="invalid: too-few-samples: 4 batches of 24 requests were asked for, found 1 of 24 (*")


def test_no_request_at_all(gate: Suite) -> None:
    gate.fakes(more=wrapped(FIRST.format("()")))

    result = gate.run(TP1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(failed=1)


@pytest.mark.parametrize("failed", [1, 48, 96])
def test_failed_requests(gate: Suite, failed: int) -> None:
    gate.fakes(driver=f"fail_requests={failed}")

    is_red(gate, says=f"*{failed} of 96 requests failed*")


def test_metric_of_the_measurement_that_is_zero(gate: Suite) -> None:
    """All chunks at once, as a proxy that buffers sends them: every gap is 0."""
    at_once = "tuple(replace(r, chunk_ns=(r.chunk_ns[-1],) * len(r.chunk_ns)) for r in b.requests)"
    gate.fakes(more=wrapped(FIRST.format(at_once)))

    is_red(gate, says="invalid: unfit-metrics: zero or not finite: *median_tpot_ms*; is something buffering *")


def test_clock_of_the_client_that_is_no_number(gate: Suite) -> None:
    nan = "tuple(replace(r, chunk_ns=(float('nan'),) * len(r.chunk_ns)) for r in b.requests)"
    gate.fakes(more=wrapped(FIRST.format(nan)))

    result = gate.run(TP1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(failed=1)


# -- the machine -----------------------------------------------------------------------------------------------------


def test_other_gpu_model(gate: Suite) -> None:
    gate.fakes(topology="name='NVIDIA H100'")

    result = is_red(gate, says="a stored baseline was required, and there is none")
    result.stdout.fnmatch_lines(["    hardware.device: stored 'NVIDIA H200', now 'NVIDIA H100'"])


def test_gpu_of_the_same_name_with_other_memory(gate: Suite) -> None:
    gate.fakes(topology="memory_gib=80")

    is_red(gate, says="  hardware.memory_gib: stored 141, now 80")


def test_other_driver_is_named_and_the_verdict_provisional(gate: Suite) -> None:
    gate.fakes(topology="driver_version='999.1'", driver="slow_down=1.5")

    result = is_red(gate, says="regression: median_ttft_ms 30.0 ms, *")
    result.stdout.fnmatch_lines(["*driver: 580.65.06 -> 999.1*"])
    result.stdout.fnmatch_lines(["  provisional: none of this epoch is stored, compared with *"])


def test_other_driver_is_named_beside_a_pass(gate: Suite) -> None:
    gate.fakes(topology="driver_version='999.1'")

    result = gate.run(TP1)

    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["  smoke: pass, *", "    changed since the baseline: driver: 580.65.06 -> 999.1"])


STRANGER = """
@pytest.fixture
def stranger(vllm_server):
    vllm_server.server.processes.others.append(FakeGpuProcess(0))
"""


def test_foreign_process(gate: Suite) -> None:
    gate.fakes(launcher="processes=FakeGpuProcesses()", more=STRANGER)
    gate.write(test_it="def test_speed(stranger, measure, perf_gate): perf_gate(measure())")

    is_red(gate, says="invalid: foreign-process: pid 4242 python train.py (user bob) is not of the server and *")


def test_clock_cap_by_a_lower_power_limit(gate: Suite) -> None:
    gate.fakes(topology="power_limit_w=400")

    is_red(gate, says="  hardware.power_limit_w: stored 700, now 400")


THROTTLED = """
from pytest_gpulayout.telemetry import DeviceTelemetry, Telemetry
from pytest_gpulayout.trace import Observations

def held(reason):
    seconds = [n * 10**9 for n in range(1, 12)]
    return Observations(telemetry=Telemetry(source="NVML", interval_s=1.0, sample_ns=seconds,
        devices=(DeviceTelemetry(name="GPU 0", throttled={reason: 1.0}),)))
"""


def test_clock_cap_by_heat(gate: Suite) -> None:
    gate.fakes(driver="observations=held('hw_thermal_slowdown')", more=THROTTLED)

    is_red(gate, says="invalid: throttled: GPU 0: hw_thermal_slowdown in 100% of the samples, *")


def test_clock_cap_by_a_setting_is_named(gate: Suite) -> None:
    gate.fakes(driver="slow_down=1.5, observations=held('applications_clocks_setting')", more=THROTTLED)

    result = is_red(gate, says="regression: median_ttft_ms 30.0 ms, *")
    result.stdout.fnmatch_lines(["    GPU 0: applications_clocks_setting"])


# -- how it is run ---------------------------------------------------------------------------------------------------


def test_update_on_ci(gate: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    gate.fakes(driver="slow_down=1.5")
    (file,) = gate.baselines
    before = file.read_text()

    result = gate.run(TP1, "--gpu-baseline=update")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*update writes baselines, and in CI nothing is written"])
    assert file.read_text() == before


def test_off_is_never_called_passed(gate: Suite) -> None:
    gate.fakes(driver="slow_down=1.5")

    result = gate.run(TP1, "--gpu-baseline=off", "-rA")

    assert result.ret == 0
    result.assert_outcomes()
    result.stdout.fnmatch_lines(["*not judged: --gpu-baseline=off", "*= 1 not judged in *"])
    result.stdout.no_re_match_line(r".*(PASSED|\d passed)")


def test_nothing_collected_is_no_pass(gate: Suite) -> None:
    result = gate.run(TP1, "-k", "nothing_of_this_name")

    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_layout_that_no_test_is_for_is_no_pass(gate: Suite) -> None:
    gate.write(test_it="import pytest\npytestmark = pytest.mark.gpu_layout('tp2')" + GATE)

    assert gate.run(TP1).ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_no_layout_skips_and_says_what_to_type(gate: Suite) -> None:
    result = gate.run("-rs")

    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*needs a GPU layout: run with --gpu-layout=tp1 *"])


@pytest.mark.end_to_end
def test_workers_of_xdist_judge_as_well(gate: Suite) -> None:
    pytest.importorskip("xdist")
    gate.fakes(driver="slow_down=1.5")

    result = gate.run(TP1, "-n2", subprocess=True)

    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(failed=1)


@pytest.mark.end_to_end
@pytest.mark.parametrize("arguments", [("-p", "no:terminal"), ("-p", "no:junitxml"), ("-p", "no:cacheprovider")])
def test_a_run_without_other_plugins_is_red_as_well(gate: Suite, arguments: tuple[str, ...]) -> None:
    gate.fakes(driver="slow_down=1.5")

    assert gate.run(TP1, *arguments, subprocess=True).ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.end_to_end
def test_a_run_without_this_plugin_knows_none_of_its_options(gate: Suite) -> None:
    result = gate.run(TP1, "-p", "no:gpulayout", subprocess=True)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*unrecognized arguments: *--gpu-layout=tp1*"])
    assert Path("results.json").exists() is False
