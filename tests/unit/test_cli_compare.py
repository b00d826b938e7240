from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_gpulayout.baseline_text import baseline_to_text
from pytest_gpulayout.trace import RunTrace
from pytest_gpulayout.verdict import Status
from tests.support.command_line import Run
from tests.support.compared import MANY, NOISE, WIDE, bench
from tests.support.measurements import baseline_of, measurement_of, results_of, run_of

STORED = baseline_to_text(MANY)
SOUND = results_of(measurement_of(*NOISE))


def write(name: str, text: str | bytes) -> str:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


@pytest.mark.parametrize(
    ("baseline", "measured", "more", "verdict", "code"),
    [
        (STORED, SOUND, "", "pass", 0),
        (STORED, results_of(measurement_of(0.5, 0.5, 0.5)), "", "improvement", 0),
        (STORED, results_of(measurement_of(1.5, 1.5, 1.5)), "", "regression", 1),
        (bench(), bench(), "", "inconclusive", 3),
        (bench(), bench(), f"--tolerance {WIDE}", "pass", 0),
        (bench(), bench(), f"--tolerance {WIDE} --platform cpu", "inconclusive", 3),
        (bench(), bench(median_tpot_ms=20.0), "", "regression", 1),
        (bench(), bench(median_tpot_ms=0.0), f"--tolerance {WIDE}", "invalid", 1),
    ],
)
def test_verdicts_and_exit_codes(run: Run, baseline: str, measured: str, more: str, verdict: str, code: int) -> None:
    arguments = ["compare", write("b.json", baseline), write("m.json", measured), *more.split()]
    ran = run(*arguments, "--json")
    assert (ran.code, ran.document["verdict"], ran.err) == (code, verdict, "")
    assert set(ran.document) == {"verdict", "metrics", "reasons", "changed", "cause", "drift", "provisional"}
    for metric in ran.document["metrics"]:
        assert {"name", "verdict", "change", "ci", "tolerance", "min_detectable", "measurement"} <= set(metric)
    text = run(*arguments)
    assert (text.code, text.out.splitlines()[0]) == (code, f"verdict: {verdict}")


def failed_run() -> RunTrace:
    sound = run_of(1.0, 1.0)
    broken = replace(run_of(1.0, error="HTTP 500").batches[0], index=1)
    return replace(sound, batches=(sound.batches[0], broken))


def of_runs(*runs: RunTrace) -> str:
    return results_of(replace(measurement_of(1.0), runs=runs))


@pytest.mark.parametrize(
    ("baseline", "measurement", "verdict", "told"),
    [
        (None, SOUND, "no-baseline", "a stored baseline was required, and there is none in b.json"),
        (STORED, None, "invalid", "results with a measurement were required, and there are none in m.json"),
        (STORED[:-10], SOUND, "invalid", "a baseline document was required, and this file is none"),
        (STORED, SOUND[:-10], "invalid", "a results file was required, and this file is none: it is not JSON"),
        (STORED, "{}", "invalid", "an object without duration, completed"),
        (STORED, SOUND.replace("0.1,", "NaN,"), "invalid", "NaN is not a number"),
        (STORED, of_runs(), "invalid", "no server start was measured"),
        (STORED, of_runs(failed_run()), "invalid", "failed-requests: 1 of 2 requests failed"),
        (
            STORED,
            of_runs(run_of(1.0, 1.0, fingerprints=["a", "b"])),
            "invalid",
            "several-servers: servers that differ answered: a, b",
        ),
        (
            STORED,
            results_of(measurement_of(1.0), status=Status.INVALID, reasons=("a foreign process",)),
            "invalid",
            "a foreign process",
        ),
        (
            STORED,
            results_of(measurement_of(1.0), status=Status.INVALID),
            "invalid",
            "it was invalid, for a reason that is not recorded",
        ),
        (
            baseline_to_text(baseline_of([1.0], hardware={"device": "H100"})),
            SOUND,
            "invalid",
            "hardware.device: stored 'H100', now 'NVIDIA H200'",
        ),
    ],
)
def test_a_side_that_is_missing_or_invalid_fails(
    run: Run, baseline: str | None, measurement: str | None, verdict: str, told: str
) -> None:
    for name, text in (("b.json", baseline), ("m.json", measurement)):
        if text is not None:
            write(name, text)
    ran = run("compare", "b.json", "m.json", "--json")
    assert (ran.code, ran.document["verdict"], ran.document["metrics"]) == (1, verdict, [])
    assert told in "\n".join(ran.document["reasons"])
    assert told in run("compare", "b.json", "m.json").out


@pytest.mark.parametrize("metric", ["request_throughput", "median_ttft_ms", "median_tpot_ms"])
@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_metric_that_is_no_measurement_fails(run: Run, metric: str, value: float) -> None:
    document = json.loads(SOUND)
    document["records"][0]["runs"][0]["gpulayout"]["batches"][0]["metrics"][metric] = value
    ran = run("compare", write("b.json", STORED), write("m.json", json.dumps(document)), "--json")
    assert (ran.code, ran.document["verdict"]) == (1, "invalid")
    assert "a metric of server start 1 is zero, missing or not finite" in ran.document["reasons"]


def test_several_measurements_are_told_apart(run: Run) -> None:
    other = measurement_of(*NOISE, layout="dp2")
    both = results_of(measurement_of(*NOISE), other)
    slow = results_of(measurement_of(*NOISE), replace(other, runs=measurement_of(3.0, 3.0).runs))
    arguments = ["compare", write("b.json", both), write("m.json", slow), "--tolerance", WIDE]
    document = run(*arguments, "--json").document
    assert document["verdict"] == "regression"
    titles = {metric["measurement"]: metric["verdict"] for metric in document["metrics"]}
    assert titles == {
        "tp2: small on org/tiny (t.py::test_1)": "pass",
        "dp2: small on org/tiny (t.py::test_2)": "regression",
    }
    assert any(cause.startswith("dp2: small on org/tiny (t.py::test_2): ") for cause in document["cause"])
    ran = run(*arguments)
    assert ran.code == 1
    lines = ran.out.splitlines()
    assert "tp2: small on org/tiny (t.py::test_1): pass" in lines
    assert "dp2: small on org/tiny (t.py::test_2): regression" in lines


def test_a_regression_carries_its_cause_and_what_changed(run: Run) -> None:
    measurement = measurement_of(*(1.5 * one for one in NOISE))
    identity = replace(measurement.identity, sut={"vllm": "0.33.0"})
    measured = results_of(replace(measurement, identity=identity))
    arguments = ["compare", write("b.json", STORED), write("m.json", measured)]
    document = run(*arguments, "--json").document
    assert document["changed"] == ["vllm: 0.32.0 -> 0.33.0"]
    assert document["cause"]
    out = run(*arguments).out
    assert document["cause"][0] in out
    assert "0.32.0 -> 0.33.0" in out


def test_what_cannot_be_opened_is_misuse(run: Run) -> None:
    write("b.json", STORED)
    assert run("compare", "b.json", ".").code == 2
    ran = run("compare", write("bytes.json", b"\xff"), "b.json")
    assert (ran.code, "found bytes that are no UTF-8" in ran.err) == (2, True)


def test_help_shows_what_may_be_compared(run: Run) -> None:
    out = run("compare", "--help").out
    assert "vllm bench serve --save-result" in out
    assert "METRIC=5%,..." in out
