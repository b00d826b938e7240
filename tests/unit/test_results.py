"""What was found wrong with a run is read back from the results, and not found anew."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pytest_gpulayout.report import performance_record, results_document
from pytest_gpulayout.results import RecordedMeasurement, measurements_from_text
from pytest_gpulayout.schemas import validate
from pytest_gpulayout.validity import Problem
from pytest_gpulayout.verdict import Status, Verdict
from tests.support.measurements import measurement_of, run_of

HOT = Problem("throttled", "GPU 0: hw_thermal_slowdown in 40% of the samples")


def document() -> dict[str, Any]:
    """Two starts, the second of which was throttled, in a record that calls it a pass."""
    measurement = measurement_of(1.0).with_run(run_of(1.0, 1.0), (HOT,))
    records = [("t.py::test_a", performance_record(Verdict(Status.PASS), measurement))]
    return results_document(records, created="2026-11-21", platform="cuda", version="0.1.0")


def read(written: dict[str, Any]) -> RecordedMeasurement:
    assert validate(written, "results") == []
    (measurement,) = measurements_from_text(json.dumps(written), "r.json")
    return measurement


def runs(written: dict[str, Any]) -> Any:
    return written["records"][0]["runs"]


def test_problems_come_back_whatever_the_verdict_says() -> None:
    written = document()
    assert [run["gpulayout"]["problems"] for run in runs(written)] == [[], [{"kind": HOT.kind, "text": HOT.text}]]
    measurement = read(written)
    assert measurement.problems == (f"throttled: {HOT.text} (server start 2)",)
    assert measurement.runs == ()


def test_what_else_was_seen_comes_back_with_its_start() -> None:
    seen = {"start_s": 41.2, "preemptions": 0.0}
    measurement = measurement_of(1.0).with_run(run_of(1.0, 1.0), observed=seen)
    records = [("t.py::test_a", performance_record(Verdict(Status.PASS), measurement))]
    written = results_document(records, created="2026-11-21", platform="cuda", version="0.1.0")
    read_back = read(written)
    assert read_back.observed() == measurement.observed() == ({}, seen)
    assert read_back.runs == measurement.as_session("2026-11-21").runs
    for run in runs(written):
        del run["gpulayout"]["observed"]
    assert read(written).observed() == ({}, {})


@pytest.mark.parametrize("value", [-1.0, "41 s", None])
def test_what_else_was_seen_is_numbers(value: object) -> None:
    written = document()
    runs(written)[0]["gpulayout"]["observed"] = {"start_s": value}
    assert validate(written, "results") != []


def test_the_cause_is_part_of_the_document() -> None:
    verdict = Verdict(Status.REGRESSION, cause=("median_tpot_ms rose by 21%: ...", "a table"))
    records = [("t.py::test_a", performance_record(verdict, measurement_of(1.0)))]
    written = results_document(records, created="2026-11-21", platform="cuda", version="0.1.0")
    assert validate(written, "results") == []
    assert written["records"][0]["cause"] == list(verdict.cause)


@pytest.mark.parametrize(("failed", "problems"), [(0, ()), (1, ("1 of 2 requests failed on server start 2",))])
def test_results_of_a_version_that_did_not_keep_its_findings(failed: int, problems: tuple[str, ...]) -> None:
    written = document()
    for run in runs(written):
        del run["gpulayout"]["problems"]
    runs(written)[1]["failed"] = failed
    measurement = read(written)
    assert measurement.problems == problems
    assert len(measurement.runs) == (0 if problems else 2)


def test_a_kind_that_does_not_exist_is_no_results_file() -> None:
    written = document()
    runs(written)[1]["gpulayout"]["problems"][0]["kind"] = "bad luck"
    assert validate(written, "results") != []
