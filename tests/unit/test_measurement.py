from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.measurement import Measurement
from pytest_gpulayout.trace import RunTrace
from pytest_gpulayout.validity import Problem
from tests.support.measurements import WORKLOAD, identity, measurement_of, run_of


def measured(*runs: RunTrace) -> Measurement:
    return Measurement(identity(), WORKLOAD, runs)


def one_token(run: RunTrace) -> RunTrace:
    """The same run with answers of a single token in its last batch, which have no TPOT."""
    *rest, last = run.batches
    requests = tuple(replace(request, output_tokens=1, chunk_ns=request.chunk_ns[:1]) for request in last.requests)
    return replace(run, batches=(*rest, replace(last, requests=requests)))


def without_time(run: RunTrace) -> RunTrace:
    """The same run with a first batch whose answers took no time, as a clock that stands still shows it."""
    first, *rest = run.batches
    requests = tuple(replace(request, chunk_ns=(0,) * len(request.chunk_ns)) for request in first.requests)
    return replace(run, batches=(replace(first, requests=requests), *rest))


def test_samples_have_one_entry_per_start_and_one_value_per_batch() -> None:
    samples = measured(run_of(1.0, 2.0), run_of(3.0)).samples("median_ttft_ms")
    assert [sample.batches for sample in samples] == [(100.0, 200.0), (300.0,)]
    assert samples[0].value == 150.0


def test_a_start_is_added_at_the_end() -> None:
    measurement = measurement_of(1.0).with_run(run_of(2.0))
    assert [sample.value for sample in measurement.samples("median_tpot_ms")] == [10.0, 20.0]


def test_a_metric_that_does_not_exist_is_left_out() -> None:
    measurement = measured(one_token(run_of(1.0, 1.0)), one_token(run_of(1.0)), run_of(2.0))
    assert [sample.batches for sample in measurement.samples("median_tpot_ms")] == [(10.0,), (20.0,)]
    assert len(measurement.samples("median_ttft_ms")) == 3


def test_sound_measurements_have_no_problems() -> None:
    assert measurement_of(1.0, 1.1).problems() == ()


@pytest.mark.parametrize(
    ("runs", "problem"),
    [
        ((), "no server start was measured"),
        (
            (run_of(1.0, 1.0), run_of(1.0, 1.0, error="HTTP 500: boom")),
            "failed-requests: 2 of 2 requests failed; the first: HTTP 500: boom (server start 2)",
        ),
        (
            (run_of(1.0, 1.0, fingerprints=["vllm-a", "vllm-b"]),),
            "several-servers: servers that differ answered: vllm-a, vllm-b; measure one of them at a time "
            "(server start 1)",
        ),
        (
            (run_of(1.0, 1.0), without_time(run_of(1.0, 1.0))),
            "unfit-metrics: zero or not finite: median_e2el_ms, median_itl_ms, median_tpot_ms, median_ttft_ms, "
            "p99_e2el_ms, p99_itl_ms, p99_tpot_ms, p99_ttft_ms; is something buffering the answers? (server start 2)",
        ),
    ],
)
def test_problems_are_named(runs: tuple[RunTrace, ...], problem: str) -> None:
    assert measured(*runs).problems() == (problem,)


def test_what_was_wrong_beside_a_run_is_a_problem_of_that_start() -> None:
    stranger = Problem("foreign-process", "pid 7 train.py is on GPU 0")
    measurement = measurement_of(1.0).with_run(run_of(1.0, 1.0), (stranger,)).with_run(run_of(1.0, 1.0))
    assert [measurement.problems_of(position) for position in range(3)] == [(), (stranger,), ()]
    assert measurement.problems() == ("foreign-process: pid 7 train.py is on GPU 0 (server start 2)",)


def test_what_else_was_seen_belongs_to_its_start_and_is_stored_with_it() -> None:
    measurement = (
        measurement_of(1.0).with_run(run_of(1.0, 1.0), observed={"start_s": 41.2}).with_run(run_of(1.0, 1.0))
    )
    assert measurement.observed() == ({}, {"start_s": 41.2}, {})
    session = measurement.as_session("2026-11-20T08:00:00Z")
    assert [run.observed for run in session.runs] == [{}, {"start_s": 41.2}, {}]
    assert not {"start_s"} & set(session.runs[1].metrics)


def test_a_run_without_a_batch_is_no_measurement() -> None:
    with pytest.raises(MeasurementError, match="a metric needs at least one batch"):
        measured(run_of()).problems()


def test_a_session_keeps_every_batch_of_every_metric() -> None:
    session = measured(run_of(1.0, 2.0), run_of(3.0)).as_session("2026-11-20T08:00:00Z")
    first, second = session.runs
    assert (first.requests, second.requests) == (2, 1)
    assert first.metrics["median_ttft_ms"] == (100.0, 200.0)
    assert second.metrics["request_throughput"] == (0.33333333,)
    assert (session.recorded, session.epoch, session.sut) == (
        "2026-11-20T08:00:00Z",
        {"driver": "570.1"},
        {"vllm": "0.32.0"},
    )


def test_stored_numbers_are_short_and_never_rounded_to_zero() -> None:
    [run] = measured(run_of(3.0, 1e8)).as_session("now").runs
    assert run.metrics["request_throughput"] == (0.33333333, 1e-8)
    assert run.metrics["median_ttft_ms"] == (300.0, 1e10)


def test_a_metric_that_only_some_batches_have_is_not_stored() -> None:
    [run] = measured(one_token(run_of(1.0, 1.0))).as_session("now").runs
    assert "median_tpot_ms" not in run.metrics
    assert len(run.metrics["median_ttft_ms"]) == 2
