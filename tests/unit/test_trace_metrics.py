from __future__ import annotations

from array import array
from dataclasses import replace

import numpy as np
import pytest

from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.metrics import (
    METRICS,
    OTHER_MEANINGS,
    SERVING,
    TAIL_REQUESTS,
    batch_metrics,
    count_good,
    definitions_text,
)
from pytest_gpulayout.trace import RequestTrace, RunTrace
from tests.support.traces import FAST, MS, SLOW, failed, request, run_of

CONDITIONAL = {"request_goodput", "median_ttft_intended_ms"}


def test_latencies_of_one_request() -> None:
    assert (FAST.ttft_ns, FAST.e2el_ns, FAST.tpot_ns) == (100 * MS, 130 * MS, 15 * MS)
    assert FAST.itl_ns == (10 * MS, 20 * MS)


def test_tpot_counts_tokens_and_itl_counts_chunks() -> None:
    merged = request(0, 1000, 1100, 1130, output_tokens=4)
    assert merged.tpot_ns == 10 * MS
    assert merged.itl_ns == (30 * MS,)


def test_one_token_has_a_ttft_and_no_tpot() -> None:
    one = request(0, 1000, 1100, output_tokens=1)
    assert (one.ttft_ns, one.e2el_ns, one.tpot_ns, one.itl_ns) == (100 * MS, 100 * MS, None, ())


@pytest.mark.parametrize("name", ["ttft_ns", "tpot_ns", "itl_ns", "e2el_ns"])
@pytest.mark.parametrize(
    ("trace", "found"),
    [(failed(3), "HTTP 500: boom"), (request(3, 1000), "an answer without a chunk")],
)
def test_a_failed_request_has_no_latency(trace: RequestTrace, found: str, name: str) -> None:
    with pytest.raises(MeasurementError) as error:
        getattr(trace, name)
    assert f"found: {found}\n  in request 3 of batch 0" in str(error.value)


def test_metrics_of_a_batch() -> None:
    (metrics,) = batch_metrics(run_of((FAST, SLOW)))
    assert metrics == pytest.approx(
        {
            "request_throughput": 1.0,
            "output_throughput": 3.0,
            "median_ttft_ms": 200.0,
            "p99_ttft_ms": 298.0,
            "median_tpot_ms": 32.5,
            "p99_tpot_ms": 49.65,
            "median_itl_ms": 25.0,
            "p99_itl_ms": 68.8,
            "median_e2el_ms": 265.0,
            "p99_e2el_ms": 397.3,
        }
    )
    assert set(metrics) == set(SERVING) - CONDITIONAL


def test_every_batch_is_a_sample_of_its_own_and_failed_requests_are_in_none() -> None:
    first, second = batch_metrics(run_of((FAST, failed(1)), (SLOW, SLOW)))
    assert (first["median_ttft_ms"], second["median_ttft_ms"]) == (100.0, 300.0)
    assert (first["request_throughput"], second["request_throughput"]) == (0.5, 1.0)


def test_answers_of_one_token_have_no_tpot_and_no_itl() -> None:
    run = run_of((request(0, 1000, 1100, output_tokens=1),))
    missing = set(SERVING) - CONDITIONAL - set(batch_metrics(run)[0])
    assert missing == {name for name in SERVING if "tpot" in name or "itl" in name}


@pytest.mark.parametrize(
    ("run", "found"),
    [
        (run_of(), "a metric needs at least one batch\n  found: none"),
        (run_of((FAST,), ()), "found: no request at all\n  in batch 1"),
        (
            run_of((failed(0), failed(1))),
            "found: 2 of 2 requests failed, the first with: HTTP 500: boom\n  in batch 0",
        ),
        (run_of((request(0, 1000, 1100),)), "found: every answer arrived in one chunk"),
        (run_of((FAST,), batch_ms=0), "a duration above 0 s\n  found: 0.0 s"),
    ],
)
def test_an_empty_sample_is_an_error_and_never_zero(run: RunTrace, found: str) -> None:
    with pytest.raises(MeasurementError) as error:
        batch_metrics(run)
    assert found in str(error.value)


def test_directions_and_units() -> None:
    rates = {name for name, metric in METRICS.items() if metric.higher_is_better}
    assert rates == {"request_throughput", "output_throughput", "request_goodput", "all_reduce_prefill_gb_per_s"}
    assert all(metric.unit == ("ms" if name.endswith("_ms") else metric.unit) for name, metric in METRICS.items())
    assert all(name == metric.name and metric.definition for name, metric in METRICS.items())


def test_arrays_count_as_tuples_do() -> None:
    run = run_of((replace(FAST, chunk_ns=array("q", FAST.chunk_ns)), SLOW))
    assert batch_metrics(run) == batch_metrics(run_of((FAST, SLOW)))


def test_pooled_gaps_are_those_of_each_request() -> None:
    chunks = [(1100,), (1100, 1101), (1105, 1107, 1111), (1200,), (1300, 1308, 1324)]
    run = run_of(tuple(request(index, 1000, *of_one) for index, of_one in enumerate(chunks)))
    (metrics,) = batch_metrics(run)
    assert metrics["median_itl_ms"] == np.median([1, 2, 4, 8, 16])


def test_open_arrivals_have_a_ttft_from_the_timetable() -> None:
    late = replace(FAST, intended_ns=FAST.send_ns - 40 * MS)
    (metrics,) = batch_metrics(run_of((late, replace(SLOW, intended_ns=SLOW.send_ns))))
    assert (metrics["median_ttft_ms"], metrics["median_ttft_intended_ms"]) == (200.0, 220.0)


ONE_TOKEN = request(2, 1000, 1100, output_tokens=1)


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 100}, 2),
        ({"ttft": 99.999}, 0),
        ({"ttft": 300, "tpot": 15}, 2),
        ({"tpot": 14.999}, 1),
        ({"e2el": 130, "tpot": 50, "ttft": 300}, 2),
        ({"e2el": 1000}, 3),
    ],
)
def test_a_limit_is_kept_by_what_is_at_it_or_below(limits: dict[str, float], good: int) -> None:
    batch = (FAST, SLOW, ONE_TOKEN)
    assert count_good(batch, limits) == good
    (metrics,) = batch_metrics(run_of((*batch, failed(3))), goodput=limits)
    assert metrics["request_goodput"] == good / 2


@pytest.mark.parametrize(("percentile", "enough"), TAIL_REQUESTS.items())
def test_a_tail_needs_as_many_requests_as_leave_one_percent_of_doubt(percentile: int, enough: int) -> None:
    beyond = 1 - percentile / 100

    def at_most_one(n: int) -> float:
        return float((1 - beyond) ** n + n * beyond * (1 - beyond) ** (n - 1))

    assert at_most_one(enough) <= 0.01 < at_most_one(enough - 1)


def test_definitions_name_every_metric_and_every_word() -> None:
    lines = definitions_text()
    assert [line.split()[0] for line in lines[: len(SERVING)]] == list(SERVING)
    assert set(OTHER_MEANINGS) <= set(lines)
    assert "  GuideLLM: E2EL / tokens, so TTFT is in it" in lines


def test_facts_of_a_run_are_sums_or_worst_cases_of_its_batches() -> None:
    run = run_of((FAST, failed(1)), (SLOW,))
    assert (run.duration_s, run.reconnects, run.loop_lag_max_ns) == (4.0, 2, 2 * MS)
    assert [trace.index for trace in run.failed] == [1]
    assert len(run.requests) == 3
