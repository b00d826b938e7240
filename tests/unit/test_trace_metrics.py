from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from pytest_gpulayout.errors import MeasurementError
from pytest_gpulayout.metrics import METRICS, batch_metrics, vllm_result
from pytest_gpulayout.trace import BatchTrace, ClientWork, RequestTrace, RunTrace
from pytest_gpulayout.workload import Workload

MS = 1_000_000
WORKLOAD = Workload(name="three", input_tokens=10, output_tokens=3, concurrency=2, requests=2, batches=1)


def request(index: int, send_ms: int, *chunks_ms: int, batch: int = 0, output_tokens: int = 3) -> RequestTrace:
    return RequestTrace(
        index=index,
        batch=batch,
        prompt_tokens=10,
        output_tokens=output_tokens,
        send_ns=send_ms * MS,
        chunk_ns=tuple(ms * MS for ms in chunks_ms),
        end_ns=(chunks_ms[-1] + 1) * MS if chunks_ms else send_ms * MS,
        system_fingerprint="vllm-0.32.0-tp2-0a1b2c3d",
        text="abc",
    )


def failed(index: int, error: str = "HTTP 500: boom", batch: int = 0) -> RequestTrace:
    return replace(request(index, 1000, batch=batch, output_tokens=0), error=error)


def run_of(*batches: tuple[RequestTrace, ...], batch_ms: int = 2000) -> RunTrace:
    return RunTrace(
        batches=tuple(
            BatchTrace(
                index=index,
                requests=requests,
                start_ns=1000 * MS,
                end_ns=(1000 + batch_ms) * MS,
                reconnects=1,
                clients=(ClientWork(lag_max_ns=(index + 1) * MS, cpu_ns=100 * MS),),
            )
            for index, requests in enumerate(batches)
        ),
        seed=7,
        warmup_requests=2,
        connections=2,
        timestamp_source="test",
        started_s=0.0,
    )


FAST = request(0, 1000, 1100, 1110, 1130)  # TTFT 100, ITL 10 20, E2EL 130, TPOT 15
SLOW = request(1, 1000, 1300, 1330, 1400)  # TTFT 300, ITL 30 70, E2EL 400, TPOT 50


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
    assert set(metrics) == set(METRICS)


def test_every_batch_is_a_sample_of_its_own_and_failed_requests_are_in_none() -> None:
    first, second = batch_metrics(run_of((FAST, failed(1)), (SLOW, SLOW)))
    assert (first["median_ttft_ms"], second["median_ttft_ms"]) == (100.0, 300.0)
    assert (first["request_throughput"], second["request_throughput"]) == (0.5, 1.0)


def test_answers_of_one_token_have_no_tpot_and_no_itl() -> None:
    run = run_of((request(0, 1000, 1100, output_tokens=1),))
    assert {name for name in METRICS if "tpot" in name or "itl" in name} == set(METRICS) - set(batch_metrics(run)[0])
    result = vllm_result(run, WORKLOAD, model="m")
    assert result["median_tpot_ms"] is result["p99_itl_ms"] is None


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
    with pytest.raises(MeasurementError):
        vllm_result(replace(run, batches=run.batches[1:] or run.batches), WORKLOAD, model="m")


def test_directions_and_units() -> None:
    rates = {name for name, metric in METRICS.items() if metric.higher_is_better}
    assert rates == {"request_throughput", "output_throughput"}
    assert all(metric.unit == ("ms" if name.endswith("_ms") else metric.unit) for name, metric in METRICS.items())
    assert all(name == metric.name and metric.definition for name, metric in METRICS.items())


# `vllm bench serve --save-result --save-detailed --percentile-metrics ttft,tpot,itl,e2el`, vLLM 0.32.
VLLM_SCALARS_AND_LISTS = """
    date endpoint_type backend label model_id tokenizer_id num_prompts request_rate burstiness max_concurrency
    duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput
    output_throughput total_token_throughput input_lens output_lens ttfts itls latencies start_times queue_times
    generated_texts errors max_output_tokens_per_s max_concurrent_requests rtfx
"""
VLLM_KEYS = set(VLLM_SCALARS_AND_LISTS.split()) | {
    f"{word}_{x}_ms" for word in ("mean", "median", "std", "p99") for x in ("ttft", "tpot", "itl", "e2el")
}


def test_vllm_result_has_vllm_s_keys_and_values() -> None:
    result = vllm_result(run_of((FAST, SLOW), (failed(2, batch=1), FAST)), WORKLOAD, model="m")
    assert VLLM_KEYS | {"gpulayout"} == {name for name in result if not name.startswith(("p50_", "p90_", "p95_"))}
    assert (result["completed"], result["failed"], result["num_prompts"]) == (3, 1, 4)
    assert (result["duration"], result["request_rate"], result["max_concurrency"]) == (4.0, "inf", 2)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (30, 9)
    assert (result["request_throughput"], result["total_token_throughput"]) == (0.75, 9.75)
    assert result["ttfts"] == [0.1, 0.3, 0.0, 0.1]
    assert result["itls"] == [[0.01, 0.02], [0.03, 0.07], [], [0.01, 0.02]]
    assert result["output_lens"] == [3, 3, 0, 3]
    assert result["errors"] == ["", "", "HTTP 500: boom", ""]
    assert result["mean_itl_ms"] == pytest.approx(80 / 3)
    assert result["std_ttft_ms"] == pytest.approx(math.sqrt(80_000 / 9))
    assert result["p50_e2el_ms"] == result["median_e2el_ms"] == 130.0
    assert (result["max_output_tokens_per_s"], result["max_concurrent_requests"]) == (9.0, 3)


def test_vllm_result_is_json_and_keeps_our_facts_in_one_object() -> None:
    result = json.loads(json.dumps(vllm_result(run_of((FAST, failed(1))), WORKLOAD, model="m")))
    own = result["gpulayout"]
    assert own["workload"] == WORKLOAD.to_document()
    assert own["client"] == {"scheduling": "SCHED_OTHER", "connections": 2, "reconnects": 1, "loop_lag_max_ms": 1.0}
    assert own["system_fingerprints"] == ["vllm-0.32.0-tp2-0a1b2c3d"]
    assert [row["ttft_ms"] for row in own["requests"]] == [100.0, None]


def test_facts_of_a_run_are_sums_or_worst_cases_of_its_batches() -> None:
    run = run_of((FAST, failed(1)), (SLOW,))
    assert (run.duration_s, run.reconnects, run.loop_lag_max_ns) == (4.0, 2, 2 * MS)
    assert [trace.index for trace in run.failed] == [1]
    assert len(run.requests) == 3
